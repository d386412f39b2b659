//! Connections to hosts that fail before a host is asked, or that a host says the end of, beside the real Envoy: what clients and logs are
//! told of them, and what is counted.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(20);

/// What hosts are connected to from, and with: the first two are this side's own failures, the third one is none.
const BINDS: [(&str, &str); 4] = [
    // Of the addresses for documentation: no machine has it.
    ("bind", "upstream_bind_config: {source_address: {address: 192.0.2.1, port_value: 0}}"),
    (
        "option",
        "upstream_bind_config: {source_address: {address: 127.0.0.1, port_value: 0}, socket_options: [{level: 6, name: 4096, \
         int_value: 1, state: STATE_PREBIND}]}",
    ),
    (
        "late_option",
        "upstream_bind_config: {source_address: {address: 127.0.0.1, port_value: 0}, socket_options: [{level: 6, name: 4096, \
         int_value: 1, state: STATE_BOUND}]}",
    ),
    ("refused", ""),
];

const COUNTED: [&str; 13] = [
    "bind_errors",
    "upstream_cx_total",
    "upstream_cx_http1_total",
    "upstream_cx_connect_fail",
    "upstream_cx_connect_timeout",
    "upstream_cx_connect_attempts_exceeded",
    "upstream_cx_destroy",
    "upstream_cx_destroy_local",
    "upstream_cx_destroy_remote",
    "upstream_cx_destroy_with_active_rq",
    "upstream_rq_total",
    "upstream_rq_pending_total",
    "upstream_rq_pending_failure_eject",
];

fn log(path: &str, text: &str) -> String {
    format!(
        "access_log: [{{name: file, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
         path: {path}, log_format: {{text_format_source: {{inline_string: \"{text} %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% \
         %UPSTREAM_TRANSPORT_FAILURE_REASON% %UPSTREAM_HOST% %UPSTREAM_REQUEST_ATTEMPT_COUNT%\\n\"}}}}}}}}]"
    )
}

/// What a request and a TCP proxy's connection meet: the answer, lines of logs, and what is counted.
fn meets(kind: Kind, bind: &str, app: u16) -> Result<Vec<String>> {
    let (port, tcp, path) = (free_port()?, free_port()?, scratch_dir()?.join("log"));
    let path_text = path.display().to_string();
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    let outlier = "outlier_detection: {consecutive_5xx: 2, interval: 100s, max_ejection_percent: 100}";
    let bootstrap = Bootstrap::new()
        .http(port, routes, &[&log(&path_text, "http")])
        .tcp_of(tcp, &format!("cluster: app, {}", log(&path_text, "tcp")))
        .cluster("app", &[app], &[bind, outlier, "common_lb_config: {healthy_panic_threshold: {value: 100}}"]);
    // It shows access logs after this, and not ten seconds.
    let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
    let daemon = Daemon::start_with(kind, &bootstrap.yaml(), flags)?;
    let response = fetch(port, Request::get("/"))?;
    let mut met = vec![format!("{} {}", response.status, response.text())];
    let mut stream = TcpStream::connect(("127.0.0.1", tcp))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    // It may be reset: what was written has not been read.
    let _ = stream.read_to_end(&mut answer);
    drop(stream);
    met.push(format!("tcp: {}", String::from_utf8_lossy(&answer)));
    let lines = wait_until(DEADLINE, "both lines of the log", || {
        let text = fs::read_to_string(&path)?;
        ensure!(text.lines().count() == 2, "{text}");
        Ok(text)
    })?;
    met.extend(lines.lines().map(|line| line.replace(&app.to_string(), "PORT")));
    let counted = wait_until(DEADLINE, "what is counted", || {
        let stats = daemon.stats()?;
        let count = |name: &str| stats.get(&format!("cluster.app.{name}"));
        // The end of the last one comes a moment after its client's.
        let ended = count("upstream_cx_destroy") == 2;
        ensure!(ended, "{} have ended", count("upstream_cx_destroy"));
        // Two failures in a row have the host ejected; of this side's own, those of requests count, and the TCP proxy's does not.
        let by_host = count("upstream_cx_connect_fail") == 2 && count("upstream_cx_destroy_remote") == 2;
        let ejected = count("outlier_detection.ejections_enforced_total");
        ensure!(ejected == u64::from(by_host), "{ejected} hosts are ejected");
        let missing = COUNTED.iter().find(|name| !stats.has(&format!("cluster.app.{name}")));
        ensure!(missing.is_none(), "{missing:?} is missing");
        Ok(COUNTED.map(|name| format!("{name} {}", count(name))))
    })?;
    met.extend(counted);
    Ok(met)
}

#[test]
fn what_this_side_fails_at_is_not_the_hosts_as_in_envoy() -> Result<()> {
    let app = server::start(|stream| {
        let mut stream = BufReader::new(stream);
        if Request::read(&mut stream)?.is_some() {
            let answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok";
            stream.get_mut().write_all(answer)?;
        }
        Ok(())
    })?;
    for (name, bind) in BINDS {
        let app = if name == "refused" { free_port()? } else { app };
        let envoy = meets(Kind::Envoy, bind, app).with_context(|| format!("Envoy: {name}"))?;
        let culvert = meets(Kind::Culvert, bind, app).with_context(|| format!("culvertd: {name}"))?;
        assert_eq!(culvert, envoy, "{name}");
        let local = envoy[0].contains("local connection failure");
        assert_eq!(local, name == "bind" || name == "option", "{name}: {}", envoy[0]);
        assert_eq!(envoy[0].starts_with("200"), name == "late_option", "{name}: {}", envoy[0]);
    }
    Ok(())
}

#[test]
fn a_host_that_says_that_it_closes_is_counted_as_by_envoy() -> Result<()> {
    let app = server::start(|stream| {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            let answer: &[u8] = match request.target.as_str() {
                "/last" => b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
                "/old" => b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
                // It closes without a word.
                "/unsaid" => b"HTTP/1.1 200 OK\r\n\r\nok",
                _ => b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok",
            };
            stream.get_mut().write_all(answer)?;
            if request.target != "/" {
                break;
            }
        }
        Ok(())
    })?;
    let counted = |kind| -> Result<Vec<u64>> {
        let port = free_port()?;
        let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let daemon = Daemon::start(kind, &Bootstrap::new().http(port, routes, &[]).cluster("app", &[app], &[]).yaml())?;
        let mut counts = Vec::new();
        for path in ["/", "/last", "/", "/old", "/unsaid", "/last"] {
            let response = fetch(port, Request::get(path))?;
            ensure!(response.status == 200 && response.text() == "ok", "{kind:?}: {path}");
            counts.push(daemon.stats()?.get("cluster.app.upstream_cx_close_notify"));
        }
        Ok(counts)
    };
    let (envoy, culvert) = (counted(Kind::Envoy)?, counted(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    assert_eq!(envoy.last(), Some(&3));
    Ok(())
}

/// Of a TCP proxy that had to connect twice, the log says so, and why.
#[test]
fn hosts_that_tcp_proxies_had_to_try_are_logged_as_by_envoy() -> Result<()> {
    let app = || server::start(|mut stream| Ok(stream.write_all(b"ok")?));
    // In their turn: some connections meet the host that is none first.
    let (one, two) = (app()?, app()?);
    let lines = |kind| -> Result<BTreeSet<String>> {
        let (tcp, closed, path) = (free_port()?, free_port()?, scratch_dir()?.join("log"));
        let proxy = format!("cluster: app, max_connect_attempts: 2, {}", log(&path.display().to_string(), "tcp"));
        let bootstrap = Bootstrap::new().tcp_of(tcp, &proxy).cluster("app", &[one, two, closed], &[]);
        let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
        let _daemon = Daemon::start_with(kind, &bootstrap.yaml(), flags)?;
        wait_until(DEADLINE, "lines of both kinds", || {
            let mut answer = String::new();
            let mut stream = TcpStream::connect(("127.0.0.1", tcp))?;
            stream.set_read_timeout(Some(DEADLINE))?;
            stream.read_to_string(&mut answer)?;
            ensure!(answer == "ok", "{answer}");
            let text =
                fs::read_to_string(&path)?.replace(&format!(":{one}"), ":APP").replace(&format!(":{two}"), ":APP");
            let lines: BTreeSet<_> = text.lines().map(str::to_owned).collect();
            ensure!(lines.len() == 2, "{text}");
            Ok(lines)
        })
    };
    let (envoy, culvert) = (lines(Kind::Envoy)?, lines(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}
