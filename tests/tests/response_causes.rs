//! Why a request failed, as culvertd and the real Envoy tell it: status and body to the client, flags and details to the log.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_tests::app::App;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port, scratch_dir};
use culvert_tests::wait_until;
use nix::sys::signal::Signal;
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

/// What an HTTP/2 server says first: empty SETTINGS.
const H2_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// The log's line: the path, and why.
const FORMAT: &str = "%REQ(:PATH)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% \
    %UPSTREAM_TRANSPORT_FAILURE_REASON% %UPSTREAM_HOST_NAME_WITHOUT_PORT%\\n";

/// The paths that are asked for, and where they lead; `cluster` is the first part where nothing else is said.
const ROUTES: &str = r#"
- name: all
  domains: ["*"]
  routes:
  - {match: {prefix: /direct}, direct_response: {status: 418, body: {inline_string: "short"}}}
  - {match: {prefix: /redirect}, redirect: {path_redirect: /new}}
  - {match: {prefix: /cluster-header-404}, route: {cluster_header: x-cluster, cluster_not_found_response_code: NOT_FOUND}}
  - {match: {prefix: /cluster-header}, route: {cluster_header: x-cluster}}
  - {match: {prefix: /route-timeout}, route: {cluster: silent, timeout: 0.3s}}
  - match: {prefix: /per-try-timeout}
    route: {cluster: silent, timeout: 5s, retry_policy: {retry_on: connect-failure, per_try_timeout: 0.3s}}
  - match: {prefix: /per-try-retried}
    route: {cluster: silent, timeout: 5s, retry_policy: {retry_on: 5xx, num_retries: 1, per_try_timeout: 0.3s}}
  - {match: {prefix: /idle}, route: {cluster: silent, timeout: 0s, idle_timeout: 0.3s}}
  - {match: {prefix: /duration}, route: {cluster: silent, max_stream_duration: {max_stream_duration: 0.3s}}}
  - {match: {prefix: /pauses-duration}, route: {cluster: pauses, max_stream_duration: {max_stream_duration: 0.3s}}}
  - {match: {prefix: /pauses-timeout}, route: {cluster: pauses, timeout: 0.3s}}
  - {match: {prefix: /pauses-idle}, route: {cluster: pauses, timeout: 0s, idle_timeout: 0.3s}}
  - match: {prefix: /pauses-try-idle}
    route: {cluster: pauses, timeout: 5s, retry_policy: {retry_on: connect-failure, per_try_idle_timeout: 0.3s}}
  - match: {prefix: /try-idle}
    route: {cluster: silent, timeout: 5s, retry_policy: {retry_on: connect-failure, per_try_idle_timeout: 0.3s}}
  - match: {prefix: /dead-retried}
    route: {cluster: dead, retry_policy: {retry_on: connect-failure, num_retries: 1}}
  - match: {prefix: /closes-retried}
    route: {cluster: closes, retry_policy: {retry_on: reset, num_retries: 1}}
  - match: {prefix: /status-retried}
    route: {cluster: app, retry_policy: {retry_on: 5xx, num_retries: 1}}
"#;

/// Clusters by name, each with a route `/<name>`.
const CLUSTERS: [&str; 21] = [
    "app",
    "dead",
    "unreachable",
    "empty",
    "silent",
    "closes",
    "closes-at-once",
    "resets",
    "garbage",
    "half-head",
    "cut",
    "pauses",
    "no-requests",
    "no-pending",
    "no-connections",
    "maintenance",
    "h2-refuses",
    "h2-resets",
    "h2-goes-away",
    "h2-garbage",
    "h2-closes",
];

/// The requests: path and further headers.
const REQUESTS: [(&str, &str); 42] = [
    ("/app", ""),
    ("/app?status=503", ""),
    ("/status-retried?status=503", ""),
    ("/direct", ""),
    ("/redirect", ""),
    ("/nowhere", ""),
    ("/cluster-header-404", "x-cluster: missing\r\n"),
    ("/cluster-header", ""),
    ("/cluster-header?named", "x-cluster: missing\r\n"),
    ("/empty", ""),
    ("/dead", ""),
    ("/dead-retried", ""),
    ("/unreachable", ""),
    ("/closes", ""),
    ("/closes-retried", ""),
    ("/closes-at-once", ""),
    ("/resets", ""),
    ("/garbage", ""),
    ("/half-head", ""),
    ("/cut", ""),
    ("/route-timeout", ""),
    ("/per-try-timeout", ""),
    ("/per-try-retried", ""),
    ("/idle", ""),
    ("/duration", ""),
    ("/duration?grpc", "content-type: application/grpc\r\n"),
    ("/try-idle", ""),
    ("/pauses-duration", ""),
    ("/pauses-timeout", ""),
    ("/pauses-idle", ""),
    ("/pauses-try-idle", ""),
    ("/no-requests", ""),
    ("/no-pending", ""),
    ("/no-connections", ""),
    ("/maintenance", ""),
    ("/app?upgrade", "upgrade: websocket\r\nconnection: upgrade\r\n"),
    ("/h2-refuses", ""),
    ("/h2-resets", ""),
    ("/h2-goes-away", ""),
    ("/h2-garbage", ""),
    ("/h2-closes", ""),
    ("/empty?grpc", "content-type: application/grpc\r\n"),
];

/// Causes of which culvertd is known to tell something else, and why.
const DIFFERENT: [(&str, &str); 1] =
    [("/half-head", "a head that ends in the middle is 503 UC: the codec does not tell it from no head at all")];

/// A server on a port of its own that does the same with each connection.
fn server(serve: impl Fn(TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Result<u16> {
    culvert_tests::server::start(move |stream| Ok(serve(stream)?))
}

/// Waits for a request's head.
fn head(stream: &mut TcpStream) -> std::io::Result<()> {
    let mut seen = Vec::new();
    let mut byte = [0; 1];
    while !seen.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte)?;
        seen.push(byte[0]);
    }
    Ok(())
}

/// A server that answers each request with `bytes`, and closes.
fn answers(bytes: &'static [u8]) -> Result<u16> {
    server(move |mut stream| {
        head(&mut stream)?;
        stream.write_all(bytes)?;
        stream.shutdown(Shutdown::Write)
    })
}

/// A server of HTTP/2 that answers the first request with `frames`; where `closes`, it then closes.
fn h2(frames: &'static [u8], closes: bool) -> Result<u16> {
    server(move |mut stream| {
        let mut preface = [0; 24];
        stream.read_exact(&mut preface)?;
        stream.write_all(H2_SETTINGS)?;
        loop {
            let mut frame = [0; 9];
            stream.read_exact(&mut frame)?;
            let length = u32::from_be_bytes([0, frame[0], frame[1], frame[2]]);
            std::io::copy(&mut Read::by_ref(&mut stream).take(length.into()), &mut std::io::sink())?;
            // HEADERS
            if frame[3] == 1 {
                break;
            }
        }
        stream.write_all(frames)?;
        if closes {
            return stream.shutdown(Shutdown::Both);
        }
        std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
    })
}

/// A port that neither accepts nor refuses: whoever waits to be accepted fills the queue.
fn unreachable() -> Result<(u16, Vec<TcpStream>, TcpListener)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    listen(&listener, Backlog::new(0)?)?;
    let address = listener.local_addr()?;
    let waiting = (0..2).filter_map(|_| TcpStream::connect_timeout(&address, Duration::from_millis(200)).ok());
    Ok((address.port(), waiting.collect(), listener))
}

fn upstream(cluster: &str) -> Result<Vec<u16>> {
    let silent = || server(|mut stream| std::io::copy(&mut stream, &mut std::io::sink()).map(drop));
    Ok(vec![match cluster {
        "app" | "no-requests" | "no-pending" | "no-connections" | "maintenance" => {
            App { pod: "app".to_owned(), revision: "main".to_owned(), upstream: None }.start()?
        }
        "dead" => free_port()?,
        "empty" => return Ok(Vec::new()),
        "silent" => silent()?,
        "closes" => answers(b"")?,
        "closes-at-once" => server(|stream| stream.shutdown(Shutdown::Both))?,
        "resets" => server(|mut stream| {
            head(&mut stream)?;
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            setsockopt(&stream, sockopt::Linger, &linger).map_err(std::io::Error::from)
        })?,
        "garbage" => answers(b"nonsense\r\n\r\n")?,
        "half-head" => answers(b"HTTP/1.1 200 OK\r\ncontent-le")?,
        "pauses" => server(|mut stream| {
            head(&mut stream)?;
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\na part")?;
            std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
        })?,
        "cut" => answers(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ncut")?,

        "h2-refuses" => h2(&[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 7], false)?,
        "h2-resets" => h2(&[0, 0, 4, 3, 0, 0, 0, 0, 1, 0, 0, 0, 2], false)?,
        "h2-goes-away" => h2(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], false)?,
        "h2-garbage" => h2(b"nonsense that is no frame of HTTP/2 at all", false)?,
        "h2-closes" => h2(b"", true)?,
        other => anyhow::bail!("no upstream for {other}"),
    }])
}

fn fields(cluster: &str) -> Vec<&'static str> {
    match cluster {
        "no-requests" => vec!["circuit_breakers: {thresholds: [{max_requests: 0}]}"],
        "no-pending" => vec!["circuit_breakers: {thresholds: [{max_pending_requests: 0}]}"],
        "no-connections" => {
            vec!["circuit_breakers: {thresholds: [{max_connections: 0}]}"]
        }
        name if name.starts_with("h2-") => vec![
            "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
             type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
             {http2_protocol_options: {}}}}",
        ],
        _ => Vec::new(),
    }
}

/// What was told of each request, by its path.
fn causes(kind: Kind) -> Result<BTreeMap<String, String>> {
    let port = free_port()?;
    let log = scratch_dir()?.join("access.log");
    let access_log = format!(
        "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.\
         FileAccessLog, path: {}, log_format: {{text_format_source: {{inline_string: \"{FORMAT}\"}}}}}}}}]",
        log.display()
    );
    let own = CLUSTERS.map(|name| format!("  - {{match: {{path: /{name}}}, route: {{cluster: {name}}}}}\n")).concat();
    let (full, _waiting, _listener) = unreachable()?;
    let mut bootstrap = Bootstrap::new().http(port, &format!("{ROUTES}{own}"), &[&access_log]);
    for name in CLUSTERS {
        let ports = if name == "unreachable" { vec![full] } else { upstream(name)? };
        bootstrap = bootstrap.cluster(name, &ports, &fields(name));
    }
    let maintenance = "static_layer: {upstream.maintenance_mode.maintenance: 100}";
    let yaml = format!("{}layered_runtime: {{layers: [{{name: static, {maintenance}}}]}}\n", bootstrap.yaml());
    let daemon = Daemon::start(kind, &yaml)?;
    let mut told = BTreeMap::new();
    for (path, headers) in REQUESTS {
        let close = if headers.contains("connection:") { "" } else { "connection: close\r\n" };
        let request = format!("GET {path} HTTP/1.1\r\nhost: test.example\r\n{headers}{close}\r\n");
        let seen = match fetch_raw(port, request.as_bytes(), "GET") {
            Ok(response) if response.status == 200 && response.text().contains("\"pod\"") => {
                format!("{}", response.status)
            }
            Ok(response) if path.contains("status=") => format!("{}", response.status),
            Ok(response) => {
                let overloaded = response.headers.get("x-envoy-overloaded").map(|_| " overloaded").unwrap_or_default();
                let grpc = response.headers.get("grpc-message").unwrap_or_default();
                format!("{}{overloaded} {:?} {grpc}", response.status, response.text())
            }
            Err(_) => "a response that is cut".to_owned(),
        };
        told.insert(path.to_owned(), seen);
    }
    // Both flush on SIGTERM.
    daemon.signal(Signal::SIGTERM)?;
    let lines = wait_until(Duration::from_secs(12), "a line for each request", || {
        let text = std::fs::read_to_string(&log)?;
        anyhow::ensure!(text.lines().count() >= REQUESTS.len(), "{text}");
        Ok(text)
    })?;
    for line in lines.lines() {
        let (path, rest) = line.split_once(' ').context("a path")?;
        told.entry(path.to_owned()).or_default().push_str(&format!("\n  log: {rest}"));
    }
    Ok(told)
}

#[test]
fn causes_are_told_as_by_envoy() -> Result<()> {
    let (envoy, culvert) = (causes(Kind::Envoy)?, causes(Kind::Culvert)?);
    let mut differences = Vec::new();
    for (path, expected) in &envoy {
        let seen = culvert.get(path).map_or("", String::as_str);
        let known = DIFFERENT.iter().any(|(known, _)| known == path);
        if expected == seen && known {
            differences.push(format!("--- {path}: the same by now, take it off DIFFERENT"));
        } else if expected != seen && !known {
            differences.push(format!("--- {path}\nEnvoy:\n  {expected}\nculvertd:\n  {seen}\n"));
        }
    }
    assert!(differences.is_empty(), "{} causes differ:\n{}", differences.len(), differences.join("\n"));
    Ok(())
}
