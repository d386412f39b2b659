//! Requests that proxies make themselves, further attempts at requests, and what comes before an answer: with culvertd and with the real
//! Envoy on the same bootstrap.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::{server, wait_until};
use socket2::SockRef;

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A host that answers all requests like this.
fn host(answer: &'static [u8]) -> Result<u16> {
    server::start(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        while Request::read(&mut reader)?.is_some() {
            stream.write_all(answer)?;
        }
        Ok(())
    })
}

/// A bootstrap whose listener asks the cluster `authz` about each request to the cluster `app`.
fn asking(web: u16, app: u16, authz: u16) -> String {
    let filter = format!(
        r#"          http_filters:
          - name: envoy.filters.http.ext_authz
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
              http_service: {{server_uri: {{uri: "http://127.0.0.1:{authz}", cluster: authz, timeout: 10s}}}}
"#
    );
    let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    let bootstrap = Bootstrap::new().http(web, routes, &[]).cluster("app", &[app], &[]).cluster("authz", &[authz], &[]);
    bootstrap.yaml().replace("          http_filters:\n", &filter)
}

#[test]
fn a_call_does_not_fail_with_a_connection_that_died_with_its_answer() -> Result<()> {
    let authz = server::start(|mut stream| {
        if Request::read(&mut BufReader::new(stream.try_clone()?))?.is_some() {
            // The FIN is in the packet of the answer: later, it might cross the next request, of which nobody knows what became.
            SockRef::from(&stream).set_tcp_cork(true)?;
            stream.write_all(ANSWER)?;
        }
        Ok(())
    })?;
    let (web, app) = (free_port()?, host(ANSWER)?);
    let daemon = Daemon::start(Kind::Culvert, &asking(web, app, authz))?;
    for number in 0..300 {
        let response = fetch(web, Request::get("/"))?;
        ensure!(response.status == 200, "request {number}: {}", response.status);
    }
    ensure!(daemon.stats()?.get("cluster.authz.upstream_cx_total") == 300, "each call needs a connection");
    Ok(())
}

#[test]
fn calls_go_by_maintenance_mode_as_by_envoy() -> Result<()> {
    let outcome = |kind| -> Result<String> {
        let (web, app, authz) = (free_port()?, host(ANSWER)?, host(ANSWER)?);
        let runtime =
            "layered_runtime: {layers: [{name: static, static_layer: {upstream.maintenance_mode.authz: 100}}]}\n";
        let daemon = Daemon::start(kind, &format!("{runtime}{}", asking(web, app, authz)))?;
        let response = fetch(web, Request::get("/"))?;
        let stats = daemon.stats()?;
        let counted = ["upstream_rq_maintenance_mode", "upstream_rq_503", "upstream_rq_total", "upstream_cx_total"];
        let counted = counted.map(|name| stats.get(&format!("cluster.authz.{name}")));
        Ok(format!("{} {:?}, counted {counted:?}", response.status, response.text()))
    };
    let (envoy, culvert) = (outcome(Kind::Envoy)?, outcome(Kind::Culvert)?);
    ensure!(envoy.starts_with("403") && envoy.contains("counted [1, 1, 0, 0]"), "{envoy}");
    assert_eq!(culvert, envoy);
    Ok(())
}

/// With hedging the attempts are others' business than without.
#[test]
fn connections_of_answers_that_are_tried_again_are_used_again() -> Result<()> {
    for hedging in ["", "hedge_policy: {hedge_on_per_try_timeout: true}, "] {
        for kind in KINDS {
            let app = host(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")?;
            let route = format!(
                "route: {{cluster: app, {hedging}retry_policy: {{retry_on: 5xx, num_retries: 3, per_try_timeout: 10s, \
                 retry_back_off: {{base_interval: 0.001s}}}}}}"
            );
            let routes = format!("- {{name: all, domains: ['*'], routes: [{{match: {{prefix: /}}, {route}}}]}}");
            let web = free_port()?;
            let daemon =
                Daemon::start(kind, &Bootstrap::new().http(web, &routes, &[]).cluster("app", &[app], &[]).yaml())?;
            ensure!(fetch(web, Request::get("/"))?.status == 503);
            wait_until(DEADLINE, "four attempts on one connection", || {
                let stats = daemon.stats()?;
                let counted =
                    ["upstream_rq_total", "upstream_cx_total"].map(|name| stats.get(&format!("cluster.app.{name}")));
                ensure!(counted == [4, 1], "{kind:?}, {hedging:?}: {counted:?}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The host has said that it is at work on the request, when the rest of it turns out to be none: no chunk, or not what a filter reads.
#[test]
fn a_request_that_breaks_after_an_interim_answer_is_refused_as_by_envoy() -> Result<()> {
    let outcome = |kind, rest: &str| -> Result<(String, bool)> {
        let app = server::start(|mut stream| {
            let mut reader = BufReader::new(stream.try_clone()?);
            let mut line = String::new();
            while reader.read_line(&mut line)? > 2 {
                line.clear();
            }
            stream.write_all(b"HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n")?;
            // It answers when it has the whole request.
            drop(reader.read_to_end(&mut Vec::new()));
            Ok(())
        })?;
        let routes =
            "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";
        let web = free_port()?;
        let bootstrap = Bootstrap::new().http(web, routes, &["stream_idle_timeout: 0s"]).cluster("app", &[app], &[]);
        let filter = "          http_filters:\n          - {name: grpc_web, typed_config: {\"@type\": \
                      type.googleapis.com/envoy.extensions.filters.http.grpc_web.v3.GrpcWeb}}\n";
        let daemon = Daemon::start(kind, &bootstrap.yaml().replace("          http_filters:\n", filter))?;
        let mut client = TcpStream::connect(("127.0.0.1", web))?;
        client.set_read_timeout(Some(DEADLINE))?;
        client.write_all(
            b"POST /a/b HTTP/1.1\r\nhost: a\r\ncontent-type: application/grpc-web-text\r\ntransfer-encoding: \
              chunked\r\n\r\n4\r\nAAAA\r\n",
        )?;
        wait_until(DEADLINE, "the host's interim answer", || {
            ensure!(daemon.stats()?.get("cluster.app.upstream_rq_1xx") == 1, "{kind:?}");
            Ok(())
        })?;
        client.write_all(rest.as_bytes())?;
        let mut answer = String::new();
        let mut reader = BufReader::new(client);
        while !answer.contains("HTTP/1.1 4") && !answer.contains("HTTP/1.1 5") {
            let more = reader.read_line(&mut answer).with_context(|| format!("{kind:?}, {rest}: {answer}"))?;
            ensure!(more > 0, "{kind:?}, {rest}: {answer}");
        }
        let last = answer.rsplit("HTTP/1.1 ").next().unwrap_or_default();
        Ok((last.trim_end().to_owned(), answer.contains("103 Early Hints")))
    };
    for rest in ["no size\r\n", "4\r\n####\r\n"] {
        let (envoy, culvert) = (outcome(Kind::Envoy, rest)?, outcome(Kind::Culvert, rest)?);
        ensure!(envoy.0 == "400 Bad Request", "{rest}: {envoy:?}");
        assert_eq!(culvert, envoy, "{rest}");
    }
    Ok(())
}

#[test]
fn start_time_is_when_the_request_began() -> Result<()> {
    const DELAY: Duration = Duration::from_secs(2);
    for kind in KINDS {
        let app = server::start(|mut stream| {
            let mut reader = BufReader::new(stream.try_clone()?);
            while Request::read(&mut reader)?.is_some() {
                thread::sleep(DELAY);
                stream.write_all(ANSWER)?;
            }
            Ok(())
        })?;
        let routes = "- {name: all, domains: ['*'], response_headers_to_add: [{header: {key: x-began, value: '%START_TIME(%s%3f)%'}}], \
                      routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let web = free_port()?;
        let _daemon = Daemon::start(kind, &Bootstrap::new().http(web, routes, &[]).cluster("app", &[app], &[]).yaml())?;
        let before = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let response = fetch(web, Request::get("/"))?;
        let after = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
        let began: u128 = response.headers.get("x-began").context("x-began")?.parse()?;
        // The clocks of processes agree, but for the last millisecond.
        ensure!((before - 1..=after - DELAY.as_millis() + 1).contains(&began), "{kind:?}: {before} {began} {after}");
    }
    Ok(())
}
