//! Bodies that pass slowly, in many pieces, or not at all, with culvertd and with the real Envoy on the same bootstrap.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const ROUTES: &str =
    "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";

/// Reads a request's head and nothing of what follows it.
fn read_head(stream: &mut TcpStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        ensure!(stream.read(&mut byte)? == 1, "no whole head");
        head.push(byte[0]);
    }
    Ok(String::from_utf8(head)?)
}

/// A host answers before it has read the request, all of which the proxy has: what is left of it may not become part of what follows on
/// the connection, which is not used again. (Envoy does use it, behind what is left: the next request waits until the host has read that.)
#[test]
fn an_early_answer_leaves_no_connection_in_the_middle_of_a_request() -> Result<()> {
    // More than sockets hold.
    const SIZE: usize = 24 << 20;
    let (go, wait) = channel::<()>();
    let (told, read) = channel();
    let (first, wait) = (AtomicUsize::new(0), Mutex::new(Some((wait, told))));
    let host = server::start(move |mut stream| {
        let is_first = first.fetch_add(1, SeqCst) == 0;
        loop {
            let head = read_head(&mut stream)?;
            ensure!(head.starts_with(if is_first { "POST /first " } else { "GET /second " }), "{head}");
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
            let waiting = if is_first { wait.lock().ok().and_then(|mut wait| wait.take()) } else { None };
            if let Some((go, told)) = waiting {
                // As long as nothing is read, nothing more can be written.
                go.recv()?;
                let mut body = Vec::new();
                // Whether it is reset or closed is the proxy's business.
                let _ = stream.read_to_end(&mut body);
                told.send(body)?;
                return Ok(());
            }
        }
    })?;
    let web = free_port()?;
    let buffer = "http_filters:\n          - name: envoy.filters.http.buffer\n            typed_config: {\"@type\": \
                  type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer, max_request_bytes: 33554432}\n";
    let yaml = Bootstrap::new().http(web, ROUTES, &[]).cluster("app", &[host], &[]).yaml();
    let _daemon = Daemon::start(Kind::Culvert, &yaml.replace("http_filters:\n", buffer))?;
    let mut client = TcpStream::connect(("127.0.0.1", web))?;
    client.set_read_timeout(Some(DEADLINE))?;
    write!(client, "POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: {SIZE}\r\n\r\n")?;
    client.write_all(&vec![b'x'; SIZE])?;
    let mut client = BufReader::new(client);
    let answer = Response::read(&mut client, "POST").context("the early answer")?;
    assert_eq!(answer.status, 200);
    for _ in 0..3 {
        let answer = fetch(web, Request::get("/second")).context("the second request")?;
        assert_eq!((answer.status, answer.text().as_str()), (200, "ok"));
    }
    go.send(())?;
    let body = read.recv_timeout(DEADLINE).context("what the host has read")?;
    ensure!(body.len() <= SIZE && body.iter().all(|byte| *byte == b'x'), "more than the body came");
    Ok(())
}

/// An upload that lasts longer than a stream may be idle is not idle, though nothing comes back meanwhile.
#[test]
fn an_upload_is_no_idle_stream() -> Result<()> {
    const PIECES: usize = 14;
    for kind in KINDS {
        let host = server::start(|stream| {
            let mut stream = BufReader::new(stream);
            let request = Request::read(&mut stream)?.context("no request")?;
            let text = request.body.len().to_string().into_bytes();
            Response::new(200, "text/plain", text).write(stream.get_mut(), false)
        })?;
        let web = free_port()?;
        let yaml = Bootstrap::new().http(web, ROUTES, &["stream_idle_timeout: 1s"]).cluster("app", &[host], &[]).yaml();
        let _daemon = Daemon::start(kind, &yaml)?;
        let mut client = TcpStream::connect(("127.0.0.1", web))?;
        client.set_read_timeout(Some(DEADLINE))?;
        write!(client, "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {PIECES}\r\n\r\n")?;
        let begun = Instant::now();
        for piece in 1..=PIECES {
            // It is the client that is slow.
            thread::sleep((Duration::from_millis(250) * piece as u32).saturating_sub(begun.elapsed()));
            client.write_all(b"x").with_context(|| format!("{kind:?}: piece {piece}"))?;
        }
        let answer = Response::read(&mut BufReader::new(client), "POST").with_context(|| format!("{kind:?}"))?;
        assert_eq!((answer.status, answer.text()), (200, PIECES.to_string()), "{kind:?}");
    }
    Ok(())
}

/// Bodies of more chunks than any limit on what stands around them, both ways.
#[test]
fn a_body_may_have_many_chunks() -> Result<()> {
    const CHUNKS: usize = 40_000;
    let chunks = || [b"1\r\nx\r\n".repeat(CHUNKS), b"0\r\n\r\n".to_vec()].concat();
    for kind in KINDS {
        let host = server::start(move |stream| {
            let mut stream = BufReader::new(stream);
            let request = Request::read(&mut stream)?.context("no request")?;
            ensure!(request.body.len() == CHUNKS, "{} chunks", request.body.len());
            let stream = stream.get_mut();
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
            Ok(stream.write_all(&chunks())?)
        })?;
        let web = free_port()?;
        let yaml = Bootstrap::new().http(web, ROUTES, &[]).cluster("app", &[host], &[]).yaml();
        let _daemon = Daemon::start(kind, &yaml)?;
        let mut client = TcpStream::connect(("127.0.0.1", web))?;
        client.set_read_timeout(Some(DEADLINE))?;
        client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")?;
        client.write_all(&chunks())?;
        let answer = Response::read(&mut BufReader::new(client), "POST").with_context(|| format!("{kind:?}"))?;
        assert_eq!((answer.status, answer.body.len()), (200, CHUNKS), "{kind:?}");
    }
    Ok(())
}

/// A host that sends faster than its client reads is no reason to let a request last for longer than its route says.
#[test]
fn a_client_that_does_not_read_is_in_time_or_cut_off() -> Result<()> {
    for (version, kind) in [("1.1", Kind::Envoy), ("1.1", Kind::Culvert), ("2", Kind::Envoy), ("2", Kind::Culvert)] {
        let host = server::start(|mut stream| {
            read_head(&mut stream)?;
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n")?;
            loop {
                stream.write_all(&[b'x'; 64 * 1024])?;
            }
        })?;
        let web = free_port()?;
        let routes = ROUTES.replace("timeout: 0s", "timeout: 1s");
        let yaml = Bootstrap::new().http(web, &routes, &[]).cluster("app", &[host], &[]).yaml();
        let daemon = Daemon::start(kind, &yaml)?;
        let mut client = TcpStream::connect(("127.0.0.1", web))?;
        client.set_read_timeout(Some(DEADLINE))?;
        match version {
            "1.1" => client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")?,
            // SETTINGS; GET, http, /, and an authority that is not compressed. The stream's window is never opened again.
            _ => client.write_all(
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x06\x01\x05\0\0\0\x01\x82\x86\x84\x41\x01a",
            )?,
        }
        let what = format!("{kind:?}, HTTP/{version}: the end of the request");
        wait_until(DEADLINE, &what, || {
            let stats = daemon.stats()?;
            let (timeouts, active) =
                (stats.get("cluster.app.upstream_rq_timeout"), stats.get("cluster.app.upstream_rq_active"));
            ensure!((timeouts, active) == (1, 0), "{timeouts} timeouts, {active} requests active");
            Ok(())
        })?;
    }
    Ok(())
}
