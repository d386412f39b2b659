//! Clients and hosts that break off, with culvertd and with the real Envoy on the same bootstrap: no host is blamed for a client of HTTP/2
//! that leaves its upload, and resets of TCP connections go through.

use std::io::Read as _;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};
use nix::sys::signal::Signal;

const DEADLINE: Duration = Duration::from_secs(30);
const ROUTES: &str =
    "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";
const HOST: [&str; 2] = [
    "common_lb_config: {healthy_panic_threshold: {value: 0}}",
    "outlier_detection: {consecutive_5xx: 2, consecutive_gateway_failure: 2, enforcing_consecutive_gateway_failure: 100, \
     max_ejection_percent: 100, interval: 1s}",
];
const BUFFER: &str = "http_filters:\n          - name: envoy.filters.http.buffer\n            typed_config: {\"@type\": \
                      type.googleapis.com/envoy.extensions.filters.http.buffer.v3.Buffer, max_request_bytes: 1000}\n";

/// When a client leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
enum When {
    /// Its upload is on its way to the host.
    Upload,
    /// A filter waits for the whole of its request.
    Buffered,
    /// Its answer has begun.
    Answer,
}

/// How it leaves.
#[derive(Debug, Clone, Copy)]
enum Leaves {
    /// It resets the stream.
    Reset,
    /// It closes the connection.
    Closes,
}

/// Begins an upload, and leaves once `reached` says that it has come as far as it can.
async fn upload(port: u16, leaves: Leaves, when: When, reached: impl FnOnce() -> Result<()>) -> Result<()> {
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
    let (sender, connection) = h2::client::handshake(stream).await?;
    let connection = tokio::spawn(connection);
    let mut sender = sender.ready().await?;
    let request = http::Request::post("http://a/upload").body(())?;
    let (mut response, mut body) = sender.send_request(request, false)?;
    body.send_data(Bytes::from_static(b"hel"), false)?;
    tokio::task::block_in_place(reached)?;
    if when == When::Answer {
        let answer = tokio::time::timeout(DEADLINE, &mut response).await??;
        assert_eq!(answer.status(), 200);
    }
    match leaves {
        Leaves::Reset => {
            body.send_reset(h2::Reason::CANCEL);
            drop((response, body));
            // The connection stays until the reset is out: another request on it has its answer.
            let (answer, _) =
                sender.ready().await?.send_request(http::Request::get("http://a/next").body(())?, true)?;
            assert_eq!(tokio::time::timeout(DEADLINE, answer).await??.status(), 200);
        }
        Leaves::Closes => {
            // The streams are dropped after the connection: before, they would be reset.
            connection.abort();
            let _ = connection.await;
            drop((response, body));
        }
    }
    Ok(())
}

fn seen(kind: Kind, leaves: Leaves, when: When) -> Result<Vec<String>> {
    let (told, begun): (_, Receiver<()>) = channel();
    let told = std::sync::Mutex::new(told);
    let host = server::start(move |stream| {
        let mut stream = std::io::BufReader::new(stream);
        let mut head = Vec::new();
        loop {
            let mut byte = [0];
            if stream.read(&mut byte)? == 0 {
                return Ok(());
            }
            head.push(byte[0]);
            if head.starts_with(b"POST") && head.ends_with(b"\r\n\r\n3\r\nhel\r\n") {
                if when == When::Answer {
                    let part = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc";
                    std::io::Write::write_all(stream.get_mut(), part)?;
                }
                let _ = told.lock().map(|told| told.send(()));
            } else if head.starts_with(b"GET") && head.ends_with(b"\r\n\r\n") {
                std::io::Write::write_all(stream.get_mut(), b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
                head.clear();
            }
        }
    })?;
    let port = free_port()?;
    let log = scratch_dir()?.join("access.log");
    let access_log = format!(
        "access_log: [{{name: file, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
         {{text_format_source: {{inline_string: \"%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\\n\"}}}}}}}}]",
        log.display()
    );
    let yaml = Bootstrap::new().http(port, ROUTES, &[&access_log]).cluster("app", &[host], &HOST).yaml();
    let yaml = if when == When::Buffered { yaml.replace("http_filters:\n", BUFFER) } else { yaml };
    let daemon = Daemon::start(kind, &yaml)?;
    let active = |count: u64| {
        wait_until(DEADLINE, "requests to begin and to end", || {
            let seen = daemon.stats()?.get("http.ingress.downstream_rq_active");
            ensure!(seen == count, "{seen} are active");
            Ok(())
        })
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    for number in 1..=4 {
        let reached = || match when {
            When::Upload | When::Answer => begun.recv_timeout(DEADLINE).context("the upload did not reach the host"),
            When::Buffered => active(1),
        };
        runtime.block_on(upload(port, leaves, when, reached))?;
        active(0).with_context(|| format!("upload {number}"))?;
    }
    let answer = fetch(port, Request::get("/after"))?;
    ensure!(answer.status == 200, "{kind:?}, {leaves:?}: after all that: {} {}", answer.status, answer.text());
    let stats = daemon.stats()?;
    let mut seen = Vec::new();
    for name in [
        "cluster.app.upstream_rq_503",
        "cluster.app.upstream_rq_5xx",
        "cluster.app.outlier_detection.ejections_enforced_total",
        "cluster.app.upstream_rq_tx_reset",
        "http.ingress.downstream_rq_4xx",
        "http.ingress.downstream_rq_5xx",
        "http.ingress.downstream_rq_rx_reset",
    ] {
        seen.push(format!("{name} {}", stats.get(name)));
    }
    // Both flush on SIGTERM.
    daemon.signal(Signal::SIGTERM)?;
    let text = wait_until(DEADLINE, "a line for each upload", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        ensure!(text.lines().filter(|line| line.starts_with("/upload ")).count() == 4, "{text}");
        Ok(text)
    })?;
    seen.extend(text.lines().filter(|line| line.starts_with("/upload ")).map(str::to_owned));
    Ok(seen)
}

fn beside_envoy(leaves: Leaves, when: When) -> Result<()> {
    let (envoy, culvert) = (seen(Kind::Envoy, leaves, when)?, seen(Kind::Culvert, leaves, when)?);
    assert_eq!(culvert, envoy, "{leaves:?}, {when:?}");
    Ok(())
}

/// What the other end of a TCP proxy sees of an end that resets its connection after some bytes: what is cut off must not look whole.
fn reset_through(kind: Kind, by_host: bool) -> Result<String> {
    /// Reads until the end, whatever that is.
    fn seen(mut stream: &std::net::TcpStream) -> String {
        let mut got = Vec::new();
        let end = stream.read_to_end(&mut got).map(|_| ()).map_err(|error| error.kind());
        format!("{:?} {end:?}", String::from_utf8_lossy(&got))
    }
    fn reset_after(mut stream: std::net::TcpStream, go: &Receiver<()>) -> Result<()> {
        std::io::Write::write_all(&mut stream, b"part")?;
        go.recv_timeout(DEADLINE).context("the other end has not got anything")?;
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        Ok(())
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = free_port()?;
    let log = scratch_dir()?.join("access.log");
    let proxy = format!(
        "cluster: app, access_log: [{{name: file, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
         {{text_format_source: {{inline_string: \"%RESPONSE_FLAGS%\\n\"}}}}}}}}]",
        log.display()
    );
    let yaml = Bootstrap::new().tcp_of(port, &proxy).cluster("app", &[listener.local_addr()?.port()], &[]).yaml();
    let daemon = Daemon::start(kind, &yaml)?;
    let client = std::net::TcpStream::connect(("127.0.0.1", port))?;
    let (host, _) = listener.accept()?;
    let (one, other) = if by_host { (host, client) } else { (client, host) };
    other.set_read_timeout(Some(DEADLINE))?;
    let (go, gone) = channel();
    let resets = std::thread::spawn(move || reset_after(one, &gone));
    // It has come before the reset does.
    let mut first = [0; 4];
    ensure!(other.peek(&mut first)? > 0, "nothing came");
    go.send(())?;
    let seen = seen(&other);
    resets.join().map_err(|_| anyhow::anyhow!("the end that resets panicked"))??;
    // Both flush on SIGTERM.
    daemon.signal(Signal::SIGTERM)?;
    let flags = wait_until(DEADLINE, "a line in the log", || {
        let text = std::fs::read_to_string(&log).unwrap_or_default();
        ensure!(text.ends_with('\n'), "{text}");
        Ok(text)
    })?;
    Ok(format!("{seen} {}", flags.trim_end()))
}

#[test]
fn resets_go_through_a_tcp_proxy() -> Result<()> {
    for by_host in [true, false] {
        let [envoy, culvert] = [reset_through(Kind::Envoy, by_host)?, reset_through(Kind::Culvert, by_host)?];
        let flags = if by_host { "UR" } else { "-" };
        assert_eq!(envoy, format!("\"part\" Err(ConnectionReset) {flags}"), "by the host: {by_host}");
        assert_eq!(culvert, envoy, "by the host: {by_host}");
    }
    Ok(())
}

/// A listener of a host that is not there, and that is asked for again after a while, and a client of it.
fn connecting(kind: Kind, fields: &str) -> Result<(Daemon, std::net::TcpStream)> {
    let port = free_port()?;
    let proxy = format!(
        "cluster: app, max_connect_attempts: 1000000, backoff_options: {{base_interval: 3600s, max_interval: 3600s}}{fields}"
    );
    let daemon =
        Daemon::start(kind, &Bootstrap::new().tcp_of(port, &proxy).cluster("app", &[free_port()?], &[]).yaml())?;
    let client = std::net::TcpStream::connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(DEADLINE))?;
    wait_until(DEADLINE, "an attempt", || {
        ensure!(daemon.stats()?.get("cluster.app.upstream_cx_connect_fail") > 0);
        Ok(())
    })?;
    Ok((daemon, client))
}

#[test]
fn a_connection_that_waits_for_its_host_lasts_no_longer_than_it_may() -> Result<()> {
    for tunnel in ["", ", tunneling_config: {hostname: 'a:80'}"] {
        let mut seen = Vec::new();
        for kind in [Kind::Envoy, Kind::Culvert] {
            let fields = format!(", max_downstream_connection_duration: 3s{tunnel}");
            let (daemon, mut client) = connecting(kind, &fields)?;
            let end = client.read_to_end(&mut Vec::new()).map_err(|error| error.kind());
            let counted = daemon.stats()?.get("tcp.tcp.max_downstream_connection_duration");
            seen.push(format!("{end:?} {counted}"));
        }
        assert_eq!(seen[0], "Ok(0) 1");
        assert_eq!(seen[1], seen[0], "{tunnel:?}");
    }
    Ok(())
}

/// Envoy does not look at its client then.
#[test]
fn nobody_connects_for_a_client_that_has_reset_its_connection() -> Result<()> {
    for tunnel in ["", ", tunneling_config: {hostname: 'a:80'}"] {
        let (daemon, client) = connecting(Kind::Culvert, tunnel)?;
        ensure!(daemon.stats()?.get("tcp.tcp.downstream_cx_active") == 1, "it is gone already");
        socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        drop(client);
        wait_until(DEADLINE, "its end", || {
            let active = daemon.stats()?.get("tcp.tcp.downstream_cx_active");
            ensure!(active == 0, "{active} connections, {tunnel:?}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn no_host_is_blamed_for_a_reset_upload() -> Result<()> {
    beside_envoy(Leaves::Reset, When::Upload)
}

#[test]
fn no_host_is_blamed_for_a_client_that_goes() -> Result<()> {
    beside_envoy(Leaves::Closes, When::Upload)
}

#[test]
fn a_client_that_goes_while_its_request_is_buffered_has_no_answer() -> Result<()> {
    beside_envoy(Leaves::Reset, When::Buffered)?;
    beside_envoy(Leaves::Closes, When::Buffered)
}

#[test]
fn a_client_that_goes_in_the_middle_of_its_answer() -> Result<()> {
    beside_envoy(Leaves::Reset, When::Answer)?;
    beside_envoy(Leaves::Closes, When::Answer)
}
