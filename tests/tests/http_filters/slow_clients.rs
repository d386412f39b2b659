//! ext_proc with `FULL_DUPLEX_STREAMED`: a service that has more to say than its client takes.

use std::future::poll_fn;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::{server, wait_until};
use culvert_xds_client::json::pool;
use prost_reflect::MessageDescriptor;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use super::services::{decode, encode, next};
use super::upstream;

/// How much the service has to say, in bytes, and by how much at a time.
const ALL: usize = 32 << 20;
const PIECE: usize = 64 * 1024;

/// What may be on its way: the buffer's limit and the windows below, and what the kernel keeps for a client.
const ON_ITS_WAY: u64 = 12 << 20;

/// A service that puts [`ALL`] in the place of a response's body, and how much of it has gone.
fn processor() -> Result<(u16, Arc<AtomicU64>)> {
    serve(|asked, respond, sent| async move { process(asked, respond, &sent).await })
}

/// A service of streams, each of which gets a counter that is returned with its port.
pub fn serve<F: Future<Output = Result<()>> + Send + 'static>(
    process: impl Fn(h2::RecvStream, h2::server::SendResponse<Bytes>, Arc<AtomicU64>) -> F + Send + Clone + 'static,
) -> Result<(u16, Arc<AtomicU64>)> {
    let sent = Arc::new(AtomicU64::new(0));
    let counter = Arc::clone(&sent);
    let port = server::start_async(move |stream| {
        let (counter, process) = (Arc::clone(&counter), process.clone());
        async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, respond) = request?;
                let counter = Arc::clone(&counter);
                // A proxy that breaks off is no failure of the service.
                let processed = process(request.into_body(), respond, counter);
                tokio::spawn(async move { drop(processed.await) });
            }
            Ok(())
        }
    })?;
    Ok((port, sent))
}

/// What such a service is asked, and what it answers.
pub fn messages() -> Result<(MessageDescriptor, MessageDescriptor)> {
    let message = |name: &str| {
        pool().get_message_by_name(&format!("envoy.service.ext_proc.v3.{name}")).context("an unknown message")
    };
    Ok((message("ProcessingRequest")?, message("ProcessingResponse")?))
}

async fn process(
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
        if message.get("responseHeaders").is_some() {
            out.send_data(encode(&response, &json!({"response_headers": {}}))?, false)?;
        }
        if message.pointer("/responseBody/endOfStream").is_some_and(|ends| ends == true) {
            break;
        }
    }
    let piece = |bytes: &[u8], ends: bool| {
        let body = base64::engine::general_purpose::STANDARD.encode(bytes);
        let piece = json!({"streamed_response": {"body": body, "end_of_stream": ends}});
        encode(&response, &json!({"response_body": {"response": {"body_mutation": piece}}}))
    };
    let (one, last) = (piece(&[b'x'; PIECE], false)?, piece(b"", true)?);
    for bytes in std::iter::repeat_n(one, ALL / PIECE).chain([last]) {
        say(&mut out, bytes, sent).await?;
    }
    let mut status = http::HeaderMap::new();
    status.insert("grpc-status", http::HeaderValue::from_static("0"));
    Ok(out.send_trailers(status)?)
}

/// Sends a message, as soon as it is taken.
pub async fn say(out: &mut h2::SendStream<Bytes>, mut bytes: Bytes, sent: &AtomicU64) -> Result<()> {
    while !bytes.is_empty() {
        out.reserve_capacity(bytes.len());
        let room = poll_fn(|cx| out.poll_capacity(cx)).await.context("the stream has ended")??;
        let part = bytes.split_to(room.min(bytes.len()));
        sent.fetch_add(part.len() as u64, Ordering::Relaxed);
        out.send_data(part, false)?;
    }
    Ok(())
}

/// Waits until nothing more goes; gives how much has gone.
pub fn stands_still(sent: &AtomicU64) -> Result<u64> {
    let mut last = (0, 0);
    wait_until(Duration::from_secs(60), "everything to stand still", || {
        let now = sent.load(Ordering::Relaxed);
        last = if last.0 == now { (now, last.1 + 1) } else { (now, 0) };
        // Looked at every 20 ms.
        ensure!(now > 0 && last.1 >= 40, "{now} bytes have gone");
        Ok(now)
    })
}

/// A client for which the kernel keeps little.
fn client(port: u16) -> Result<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_recv_buffer_size(64 * 1024)?;
    socket.connect(&SocketAddr::from(([127, 0, 0, 1], port)).into())?;
    let client = TcpStream::from(socket);
    client.set_read_timeout(Some(Duration::from_secs(60)))?;
    Ok(client)
}

/// What a client that reads gets: how many bytes of the service's.
fn read_all(client: &mut TcpStream) -> Result<usize> {
    let (mut count, mut buffer) = (0, vec![0; PIECE]);
    loop {
        match client.read(&mut buffer)? {
            0 => return Ok(count),
            length => count += buffer[..length].iter().filter(|byte| **byte == b'x').count(),
        }
    }
}

pub fn hold_up_a_processor() -> Result<()> {
    let filter = "          http_filters:\n          - name: ext_proc\n            typed_config: {\"@type\": \
                  type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor, grpc_service: {envoy_grpc: \
                  {cluster_name: grpc}}, message_timeout: 10s, processing_mode: {request_header_mode: SKIP, response_body_mode: \
                  FULL_DUPLEX_STREAMED, response_trailer_mode: SEND}}\n";
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {initial_stream_window_size: 65535, initial_connection_window_size: 65535}}}}";
    let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";
    let (grpc, sent) = processor()?;
    let (app, port) = (upstream::start("a", Arc::default())?, free_port()?);
    let bootstrap =
        Bootstrap::new().http(port, routes, &[]).cluster("app", &[app], &[]).cluster("grpc", &[grpc], &[http2]);
    // Envoy takes all of it.
    let proxy = Daemon::start(Kind::Culvert, &bootstrap.yaml().replace("          http_filters:\n", filter))?;
    let before = proxy.memory()?;
    let mut client = client(port)?;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nx-id: 1\r\nx-do: 200+bytes=10\r\nconnection: close\r\n\r\n")?;
    let gone = stands_still(&sent)?;
    let grown = proxy.memory()?.saturating_sub(before);
    println!("{gone} bytes have gone, and it has grown by {grown}");
    ensure!(gone < ON_ITS_WAY, "{gone} bytes have gone");
    ensure!(grown < ON_ITS_WAY, "it has grown by {grown} bytes");
    // It goes on when somebody reads.
    let read = read_all(&mut client)?;
    // Names of headers may have that letter.
    ensure!((ALL..ALL + 1000).contains(&read), "{read} bytes have come");
    Ok(())
}
