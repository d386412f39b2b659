//! What connections are counted by, and how a client that leaves is logged, beside the real Envoy.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::server;
use culvert_tests::wait_until;
use nix::sys::signal::Signal;

const ROUTES: &str = r#"
- name: all
  domains: ["*"]
  routes:
  - match: {connect_matcher: {}}
    route: {cluster: app, upgrade_configs: [{upgrade_type: CONNECT, connect_config: {}}]}
  - {match: {prefix: /one}, route: {cluster: one}}
  - {match: {prefix: /dead}, route: {cluster: dead}}
  - {match: {prefix: /direct}, direct_response: {status: 404}}
  - match: {prefix: /long}
    route: {cluster: app, max_stream_duration: {max_stream_duration: 0.5s}}
  - {match: {prefix: /}, route: {cluster: app}}
"#;

/// A host whose answers to `/long` and `/part` do not end, and that repeats what is said in another protocol.
fn host() -> Result<u16> {
    server::start(|stream| {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            let switches = request.headers.get("upgrade").is_some();
            let answer: &[u8] = match request.target.as_str() {
                _ if switches => {
                    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"
                }
                "/long" | "/part" => b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
                _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            };
            stream.get_mut().write_all(answer)?;
            if switches || answer.ends_with(b"abc") {
                let mut bytes = [0; 64];
                loop {
                    let read = stream.read(&mut bytes)?;
                    if read == 0 {
                        return Ok(());
                    }
                    stream.get_mut().write_all(&bytes[..read])?;
                }
            }
        }
        Ok(())
    })
}

/// Sends `request`, reads until `until` has come, and leaves.
fn leave(port: u16, request: &str, until: &str) -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(request.as_bytes())?;
    let (mut seen, mut bytes) = (Vec::new(), [0; 1024]);
    while !String::from_utf8_lossy(&seen).contains(until) {
        let read = stream.read(&mut bytes)?;
        ensure!(read > 0, "it has closed after {:?}", String::from_utf8_lossy(&seen));
        seen.extend_from_slice(&bytes[..read]);
    }
    Ok(())
}

fn start(kind: Kind, manager: &[&str]) -> Result<(Daemon, u16)> {
    let (host, port) = (host()?, free_port()?);
    let yaml = Bootstrap::new()
        .http(port, ROUTES, manager)
        .cluster("app", &[host], &["circuit_breakers: {thresholds: [{max_requests: 1}]}"])
        .cluster("one", &[host], &["max_requests_per_connection: 1"])
        .cluster("dead", &[free_port()?], &[])
        .yaml();
    Ok((Daemon::start(kind, &yaml)?, port))
}

fn get(port: u16, path: &str) -> Result<u16> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
    Ok(fetch_raw(port, request.as_bytes(), "GET")?.status)
}

#[test]
fn clients_that_leave_are_logged_as_by_envoy() -> Result<()> {
    let lines = |kind| -> Result<Vec<String>> {
        let log = scratch_dir()?.join("access.log");
        let format =
            "%PROTOCOL% %REQ(:METHOD)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %BYTES_SENT%\\n";
        let access_log = format!(
            "access_log: [{{name: file, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: \
             {{text_format_source: {{inline_string: \"{format}\"}}}}}}}}]",
            log.display()
        );
        let upgrades = "upgrade_configs: [{upgrade_type: websocket}, {upgrade_type: CONNECT}]";
        let (daemon, port) = start(kind, &[&access_log, upgrades])?;
        let upgrade = "GET / HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nhello";
        let logged = |count: usize| {
            wait_until(Duration::from_secs(12), "a line for each request", || {
                let text = std::fs::read_to_string(&log).unwrap_or_default();
                ensure!(text.lines().count() >= count, "{text}");
                Ok(text)
            })
        };
        leave(port, upgrade, "hello")?;
        leave(port, "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\nGET /ok HTTP/1.1\r\n\r\n", "ok")?;
        leave(port, "GET /part HTTP/1.1\r\nhost: a\r\n\r\n", "abc")?;
        // Its answer is cut.
        let _ = get(port, "/long");
        ensure!(get(port, "/direct")? == 404, "the direct response");
        // Both flush on SIGTERM.
        daemon.signal(Signal::SIGTERM)?;
        let mut lines: Vec<_> = logged(5)?.lines().map(str::to_owned).collect();
        lines.sort();
        Ok(lines)
    };
    let (envoy, culvert) = (lines(Kind::Envoy)?, lines(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}

/// What the ends of connections are counted by, and gauges that are 0 again.
#[test]
fn ends_of_connections_are_counted_as_by_envoy() -> Result<()> {
    let counted = |kind| -> Result<Vec<String>> {
        let (daemon, port) = start(kind, &["delayed_close_timeout: 0.2s"])?;
        let ended = |count: u64| {
            wait_until(Duration::from_secs(10), "the end of the connection", || {
                let seen = daemon.stats()?.get("http.ingress.downstream_cx_destroy");
                ensure!(seen == count, "{seen} have ended");
                Ok(())
            })
        };
        // The client goes with its answer, in the middle of it, in the middle of a head, and before it has said anything.
        leave(port, "GET /direct HTTP/1.1\r\nhost: a\r\n\r\n", "404")?;
        ended(1)?;
        leave(port, "GET /part HTTP/1.1\r\nhost: a\r\n\r\n", "abc")?;
        ended(2)?;
        leave(port, "GET /direct HTTP/1.1\r\nho", "")?;
        ended(3)?;
        leave(port, "", "")?;
        ended(4)?;
        // The proxy closes: the client wants it, does not go, and sends what is no request.
        ensure!(get(port, "/one")? == 200, "an answer");
        ended(5)?;
        ensure!(get(port, "/dead")? == 503, "a host that refuses connections");
        ended(6)?;
        let mut stays = TcpStream::connect(("127.0.0.1", port))?;
        stays.write_all(b"nonsense\r\n\r\n")?;
        ended(7)?;
        drop(stays);
        let of_client = ["", "_local", "_remote", "_active_rq", "_local_active_rq", "_remote_active_rq"];
        let of_client = of_client.map(|end| format!("http.ingress.downstream_cx_destroy{end}"));
        let of_hosts = ["", "_local", "_remote", "_with_active_rq", "_local_with_active_rq", "_remote_with_active_rq"];
        let of_hosts = ["app", "one", "dead"]
            .into_iter()
            .flat_map(|cluster| of_hosts.map(|end| format!("cluster.{cluster}.upstream_cx_destroy{end}")));
        let others = ["downstream_cx_delayed_close_timeout", "tracing.health_check", "tracing.random_sampling"];
        let names = of_client.into_iter().chain(of_hosts).chain(others.map(|name| format!("http.ingress.{name}")));
        let names: Vec<_> = names.collect();
        let gone = |name| {
            wait_until(Duration::from_secs(10), "no connection is left", || {
                let stats = daemon.stats()?;
                ensure!(stats.get(name) == 0, "{name} is {}", stats.get(name));
                Ok(())
            })
        };
        gone("http.ingress.downstream_cx_active")?;
        gone("cluster.one.upstream_cx_active")?;
        gone("cluster.app.upstream_cx_active")?;
        let stats = daemon.stats()?;
        let mut lines = Vec::new();
        for name in &names {
            ensure!(stats.has(name), "{name} is missing");
            lines.push(format!("{name} {}", stats.get(name)));
        }
        let used = daemon.admin("/stats?usedonly&type=Gauges")?;
        for gauge in
            ["http.ingress.downstream_cx_active", "cluster.app.upstream_cx_active", "cluster.app.upstream_rq_active"]
        {
            lines.push(format!("{gauge} is used: {}", used.contains(&format!("{gauge}: 0\n"))));
        }
        lines.push(format!("http2 gauge is used: {}", used.contains("http.ingress.downstream_cx_http2_active")));
        Ok(lines)
    };
    let (envoy, culvert) = (counted(Kind::Envoy)?, counted(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}

#[test]
fn connections_are_counted_as_by_envoy() -> Result<()> {
    let counted = |kind| -> Result<Vec<String>> {
        let (daemon, port) = start(kind, &[])?;
        for path in ["/", "/one", "/one", "/dead", "/direct"] {
            get(port, path)?;
        }
        // It holds the only request that there may be.
        let mut part = TcpStream::connect(("127.0.0.1", port))?;
        part.write_all(b"GET /part HTTP/1.1\r\nhost: a\r\n\r\n")?;
        ensure!(part.read(&mut [0; 1024])? > 0, "no answer");
        let names = [
            "cluster.app.circuit_breakers.default.rq_open",
            "cluster.app.circuit_breakers.default.cx_open",
            "cluster.app.circuit_breakers.default.cx_pool_open",
            "cluster.app.circuit_breakers.default.rq_pending_open",
            "cluster.app.circuit_breakers.default.rq_retry_open",
            "cluster.app.circuit_breakers.high.rq_open",
            "cluster.one.upstream_cx_max_requests",
            "cluster.one.upstream_rq_total",
            "cluster.dead.upstream_rq_total",
            "cluster.dead.upstream_rq_pending_failure_eject",
        ]
        .map(str::to_owned);
        let listener = format!("listener.127.0.0.1_{port}.http.ingress.downstream_rq_");
        let of_listener = ["4xx", "5xx"].map(|name| format!("{listener}{name}"));
        let bytes = ["cluster.app.upstream_cx", "http.ingress.downstream_cx"];
        let bytes = bytes.iter().flat_map(|of| ["rx", "tx"].map(|way| format!("{of}_{way}_bytes_total")));
        wait_until(Duration::from_secs(10), "the statistics", || {
            let stats = daemon.stats()?;
            ensure!(stats.get(&names[0]) == 1, "the circuit breaker is closed");
            let shown = |name: &String| format!("{} {}", name.replace(&port.to_string(), "PORT"), stats.get(name));
            let mut lines: Vec<_> = names.iter().chain(&of_listener).map(shown).collect();
            for name in bytes.clone() {
                ensure!(stats.get(&name) > 0, "{name} is {}", stats.get(&name));
                lines.push(name);
            }
            for name in names.iter().chain(&of_listener) {
                ensure!(stats.has(name), "{name} is missing");
            }
            Ok(lines)
        })
        .with_context(|| format!("{kind:?}"))
    };
    let (envoy, culvert) = (counted(Kind::Envoy)?, counted(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}
