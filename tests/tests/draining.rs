//! Clients are told to leave with their answers: while the daemon fails health checks, and while it drains in good order. With
//! culvertd and with the real Envoy on the same bootstrap.

use std::io::{BufReader, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const ROUTES: &str = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
const HEALTH_CHECK: &str = "http_filters:\n          - name: envoy.filters.http.health_check\n            typed_config: {\"@type\": \
                            type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck, \
                            pass_through_mode: false, headers: [{name: ':path', string_match: {exact: /hc}}]}\n";

fn start(kind: Kind, inbound: bool, flags: &[&str]) -> Result<(Daemon, u16)> {
    let host = server::start(|stream| {
        let mut stream = BufReader::new(stream);
        while Request::read(&mut stream)?.is_some() {
            stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        }
        Ok(())
    })?;
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, ROUTES, &[]).cluster("app", &[host], &[]).yaml();
    let yaml = yaml.replace("http_filters:\n", HEALTH_CHECK);
    let yaml = if inbound {
        yaml.replacen("    filter_chains:", "    traffic_direction: INBOUND\n    filter_chains:", 1)
    } else {
        yaml
    };
    ensure!(yaml.contains("INBOUND") == inbound, "{yaml}");
    Ok((Daemon::start_with(kind, &yaml, flags)?, port))
}

fn post(daemon: &Daemon, path: &str) -> Result<String> {
    let port = daemon.admin_address().rsplit(':').next().context("a port")?.parse()?;
    let request = Request { method: "POST".to_owned(), ..Request::get(path) };
    Ok(fetch(port, request)?.text())
}

/// What an answer on a connection that stays open says.
fn told(client: &mut BufReader<TcpStream>, path: &str) -> Result<String> {
    write!(client.get_mut(), "GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")?;
    let answer = Response::read(client, "GET")?;
    let header = |name| answer.headers.get(name).unwrap_or("-").to_owned();
    Ok(format!(
        "{path} {} connection {} immediate {}",
        answer.status,
        header("connection"),
        header("x-envoy-immediate-health-check-fail")
    ))
}

fn connect(port: u16) -> Result<BufReader<TcpStream>> {
    let client = TcpStream::connect(("127.0.0.1", port))?;
    client.set_read_timeout(Some(DEADLINE))?;
    Ok(BufReader::new(client))
}

/// Whether HTTP/2 is told GOAWAY with an answer.
fn http2_goes(port: u16) -> Result<bool> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        let (sender, connection) = h2::client::handshake(stream).await?;
        let mut connection = tokio::spawn(connection);
        let mut sender = sender.ready().await?;
        let (answer, _) = sender.send_request(http::Request::get("http://a/").body(())?, true)?;
        ensure!(tokio::time::timeout(DEADLINE, answer).await??.status() == 200);
        // After GOAWAY it ends by itself.
        let ends = tokio::time::timeout(Duration::from_secs(2), &mut connection).await;
        Ok(ends.is_ok())
    })
}

#[test]
fn while_health_checks_fail() -> Result<()> {
    let seen = |kind| -> Result<Vec<String>> {
        let (daemon, port) = start(kind, false, &["--drain-time-s", "1"])?;
        let mut client = connect(port)?;
        let mut seen = vec![told(&mut client, "/")?, told(&mut client, "/hc")?];
        post(&daemon, "/healthcheck/fail")?;
        seen.push(told(&mut client, "/")?);
        seen.push(told(&mut connect(port)?, "/")?);
        seen.push(told(&mut connect(port)?, "/hc")?);
        seen.push(format!("HTTP/2 goes: {}", http2_goes(port)?));
        for name in ["downstream_cx_drain_close", "downstream_rq_total"] {
            seen.push(format!("{name} {}", daemon.stats()?.get(&format!("http.ingress.{name}"))));
        }
        post(&daemon, "/healthcheck/ok")?;
        seen.push(told(&mut connect(port)?, "/")?);
        Ok(seen)
    };
    assert_eq!(seen(Kind::Culvert)?, seen(Kind::Envoy)?);
    Ok(())
}

/// What a proxy is asked before its pod is stopped: listeners stay open, and clients move on.
#[test]
fn while_it_drains_in_good_order() -> Result<()> {
    let seen = |kind, inbound, query: &str| -> Result<Vec<String>> {
        let (daemon, port) = start(kind, inbound, &["--drain-time-s", "1"])?;
        let mut seen = vec![told(&mut connect(port)?, "/")?];
        seen.push(post(&daemon, &format!("/drain_listeners?{query}"))?);
        // The longer it drains, the more are told.
        let until = |what: &str| {
            wait_until(DEADLINE, &format!("{kind:?}, {query}, inbound: {inbound}"), || {
                let now = connect(port).and_then(|mut client| told(&mut client, "/"));
                let now = now.unwrap_or_else(|_| "closed".to_owned());
                ensure!(now.contains(what), "{now}");
                Ok(now)
            })
        };
        let all_leave = inbound || !query.contains("inboundonly");
        seen.push(until(match (all_leave, query.contains("skip_exit")) {
            (true, true) => "connection close",
            (true, false) => "closed",
            (false, _) => "connection -",
        })?);
        Ok(seen)
    };
    for (inbound, query) in [
        (false, "graceful&skip_exit"),
        (false, "graceful"),
        (true, "graceful&skip_exit&inboundonly"),
        (false, "graceful&inboundonly"),
        (true, "inboundonly"),
        (false, "inboundonly"),
        (false, "skip_exit"),
    ] {
        assert_eq!(
            seen(Kind::Culvert, inbound, query)?,
            seen(Kind::Envoy, inbound, query)?,
            "{query}, inbound: {inbound}"
        );
    }
    Ok(())
}
