//! Clients that do not read, whose responses share a connection to their host with others: what waits for them takes up the connection's
//! window. No more requests may stand still because of that than with the real Envoy.

use std::collections::HashMap;
use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::http1::Response;
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
/// A stream's window, which is the smallest that there may be, and the connection's.
const WINDOW: usize = 65_535;
const STREAMS: usize = 4;
const PROBE: usize = 40_000;
const ROUTES: &str = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s, idle_timeout: 0s}}]}";

/// How much has been sent on each path.
type Sent = Arc<Mutex<HashMap<String, usize>>>;

async fn respond(path: String, mut respond: h2::server::SendResponse<Bytes>, sent: Sent) -> Result<()> {
    let mut stream = respond.send_response(http::Response::new(()), false)?;
    let mut left = if path == "/probe" { PROBE } else { usize::MAX };
    while left > 0 {
        stream.reserve_capacity(left.min(16 * 1024));
        let capacity = std::future::poll_fn(|cx| stream.poll_capacity(cx)).await.context("no stream")??;
        let piece = capacity.min(left);
        left -= piece;
        stream.send_data(vec![b'x'; piece].into(), left == 0)?;
        *sent.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_default() += piece;
    }
    Ok(())
}

/// A host that sends without end, but for `/probe`; and the connections that it was asked on.
fn start_host(sent: &Sent) -> Result<(u16, Arc<Mutex<usize>>)> {
    let (sent, connections) = (Arc::clone(sent), Arc::new(Mutex::new(0)));
    let counted = Arc::clone(&connections);
    let port = server::start_async(move |stream| {
        let sent = Arc::clone(&sent);
        *counted.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        async move {
            let mut connection = h2::server::handshake(stream).await?;
            while let Some(request) = connection.accept().await {
                let (request, responder) = request?;
                let path = request.uri().path().to_owned();
                let sent = Arc::clone(&sent);
                // A proxy that breaks off is no failure of the host.
                tokio::spawn(async move { drop(respond(path, responder, sent).await) });
            }
            Ok(())
        }
    })?;
    Ok((port, connections))
}

fn ask(web: u16, path: &str) -> Result<TcpStream> {
    let mut client = TcpStream::connect(("127.0.0.1", web))?;
    write!(client, "GET {path} HTTP/1.1\r\nhost: a.test\r\n\r\n")?;
    Ok(client)
}

/// Whether a request has its whole response beside so many that nobody reads.
fn passes(kind: Kind, unread: usize) -> Result<bool> {
    let sent = Sent::default();
    let (app, connections) = start_host(&sent)?;
    let web = free_port()?;
    let options = format!(
        "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": \
         type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
         {{http2_protocol_options: {{initial_stream_window_size: {WINDOW}, initial_connection_window_size: {}}}}}}}}}",
        STREAMS * WINDOW
    );
    let yaml =
        Bootstrap::new().http(web, ROUTES, &["stream_idle_timeout: 0s"]).cluster("app", &[app], &[&options]).yaml();
    let _daemon = Daemon::start(kind, &yaml)?;
    let clients: Vec<_> = (0..unread).map(|number| ask(web, &format!("/{number}"))).collect::<Result<_>>()?;
    // As long as sockets take something, more is sent.
    let (mut before, mut quiet) = (HashMap::new(), 0);
    wait_until(DEADLINE, "the host to have sent what it may", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = sent.lock().unwrap_or_else(PoisonError::into_inner).clone();
        quiet = if now == before && now.len() == unread { quiet + 1 } else { 0 };
        before = now;
        ensure!(quiet >= 20, "it still sends");
        Ok(())
    })?;
    let probe = ask(web, "/probe")?;
    probe.set_read_timeout(Some(Duration::from_secs(10)))?;
    let answer = Response::read(&mut BufReader::new(probe), "GET");
    ensure!(*connections.lock().unwrap_or_else(PoisonError::into_inner) == 1, "there is more than one connection");
    drop(clients);
    Ok(answer.is_ok_and(|answer| answer.body.len() == PROBE))
}

#[test]
fn responses_that_nobody_reads_hold_up_no_more_than_in_envoy() -> Result<()> {
    for unread in [1, STREAMS - 1, STREAMS + 2] {
        let (envoy, culvert) = (passes(Kind::Envoy, unread)?, passes(Kind::Culvert, unread)?);
        assert!(culvert || !envoy, "{unread} unread responses: Envoy {envoy}, culvertd {culvert}");
        // There is window enough for these, and for one more.
        assert!(culvert || unread >= STREAMS, "{unread} unread responses hold up others");
    }
    Ok(())
}
