//! ext_proc with `FULL_DUPLEX_STREAMED` requests, and a host that answers before it has taken its request: what is said to the response comes
//! behind pieces that nobody takes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytes::{Bytes, BytesMut};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::{server, wait_until};
use serde_json::json;

use super::services::{decode, encode, next};
use super::slow_clients::{messages, say, serve, stands_still};

const DEADLINE: Duration = Duration::from_secs(60);
/// More than the kernel keeps for a host that does not read.
const UPLOAD: usize = 24 << 20;
/// `message_timeout`, in seconds.
const LIMIT: u64 = 10;

/// Sends a request's body back as it is, piece by piece, and has nothing to say to a response.
async fn send_back(
    mut asked: h2::RecvStream,
    mut respond: h2::server::SendResponse<Bytes>,
    sent: &AtomicU64,
) -> Result<()> {
    let (request, response) = messages()?;
    let head = http::Response::builder().header("content-type", "application/grpc").body(())?;
    let mut out = respond.send_response(head, false)?;
    let mut read = BytesMut::new();
    while let Some(message) = next(&mut asked, &mut read).await? {
        let message = decode(&request, &message)?;
        for (name, answer) in [
            ("requestHeaders", json!({"request_headers": {}})),
            ("responseHeaders", json!({"response_headers": {}})),
            ("responseBody", json!({"response_body": {}})),
        ] {
            if message.get(name).is_some() {
                say(&mut out, encode(&response, &answer)?, &AtomicU64::new(0)).await?;
            }
        }
        if let Some(body) = message.get("requestBody") {
            let ends = body.get("endOfStream").is_some_and(|ends| ends == true);
            let piece = body.get("body").cloned().unwrap_or(json!(""));
            let piece = json!({"streamed_response": {"body": piece, "end_of_stream": ends}});
            let piece = json!({"request_body": {"response": {"body_mutation": piece}}});
            say(&mut out, encode(&response, &piece)?, sent).await?;
        }
    }
    Ok(())
}

/// A host that answers when nothing goes on, and takes no more of the request.
fn host(sent: Arc<AtomicU64>, done: Arc<AtomicBool>) -> Result<u16> {
    server::start(move |mut stream| {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        stands_still(&sent)?;
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")?;
        wait_until(2 * DEADLINE, "the end", || {
            ensure!(done.load(Ordering::Relaxed));
            Ok(())
        })
    })
}

fn answer(kind: Kind) -> Result<String> {
    let done = Arc::new(AtomicBool::new(false));
    let (grpc, sent) = serve(move |asked, respond, sent| async move { send_back(asked, respond, &sent).await })?;
    let (app, port) = (host(sent, Arc::clone(&done))?, free_port()?);
    let filter = format!(
        "          http_filters:\n          - name: ext_proc\n            typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor, grpc_service: {{envoy_grpc: \
         {{cluster_name: grpc}}}}, message_timeout: {LIMIT}s, processing_mode: {{request_body_mode: FULL_DUPLEX_STREAMED, \
         request_trailer_mode: SEND, response_body_mode: BUFFERED}}}}\n"
    );
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {initial_stream_window_size: 65535, initial_connection_window_size: 1048576}}}}";
    let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";
    let bootstrap =
        Bootstrap::new().http(port, routes, &[]).cluster("app", &[app], &[]).cluster("grpc", &[grpc], &[http2]);
    let yaml = bootstrap.yaml().replace("          http_filters:\n", &filter);
    let yaml =
        yaml.replace("    filter_chains:\n", "    per_connection_buffer_limit_bytes: 32768\n    filter_chains:\n");
    let _proxy = Daemon::start(kind, &yaml)?;
    let mut client = TcpStream::connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(DEADLINE))?;
    let mut writer = client.try_clone()?;
    thread::spawn(move || {
        let head = format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {UPLOAD}\r\n\r\n");
        // It need not take all of it.
        let _ = writer.write_all(head.as_bytes()).and_then(|()| writer.write_all(&vec![b'x'; UPLOAD]));
    });
    let (mut got, mut buffer) = (Vec::new(), [0; 4096]);
    while !got.ends_with(b"hello") {
        match client.read(&mut buffer)? {
            0 => break,
            length => got.extend_from_slice(&buffer[..length]),
        }
    }
    done.store(true, Ordering::Relaxed);
    let got = String::from_utf8_lossy(&got);
    let [first, last] = [got.lines().next(), got.lines().last()].map(Option::unwrap_or_default);
    Ok(format!("{first}, {last}"))
}

pub fn answer_early() -> Result<()> {
    let (envoy, culvert) = (answer(Kind::Envoy)?, answer(Kind::Culvert)?);
    ensure!(envoy == "HTTP/1.1 200 OK, hello" && culvert == envoy, "Envoy:    {envoy}\nculvertd: {culvert}");
    Ok(())
}
