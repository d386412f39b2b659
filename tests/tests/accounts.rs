//! What is counted, and told, of requests that are not whole when they are answered, or that are nobody's, with culvertd and with the real
//! Envoy on the same bootstrap.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];
const ROUTES: &str =
    "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 0s}}]}";

/// A host that answers as soon as it has a request's head.
fn hasty() -> Result<u16> {
    server::start(|mut stream| {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            ensure!(stream.read(&mut byte)? == 1, "no whole head");
            head.push(byte[0]);
        }
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")?;
        // Until the proxy is done with it.
        let _ = stream.read_to_end(&mut head);
        Ok(())
    })
}

/// The status of the answer to a request whose body does not end, and whether it says how long the host took.
fn early_answer(web: u16, http2: bool) -> Result<(u16, bool)> {
    if !http2 {
        let mut client = TcpStream::connect(("127.0.0.1", web))?;
        client.set_read_timeout(Some(DEADLINE))?;
        client.write_all(b"POST / HTTP/1.1\r\nhost: a.test\r\ncontent-length: 100\r\n\r\nbeginning")?;
        let answer = Response::read(&mut BufReader::new(client), "POST")?;
        return Ok((answer.status, answer.headers.get("x-envoy-upstream-service-time").is_some()));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(("127.0.0.1", web)).await?;
        let (mut sender, connection) = h2::client::handshake(stream).await?;
        let driver = tokio::spawn(connection);
        let request = http::Request::post("http://a.test/").body(())?;
        let (response, mut body) = sender.send_request(request, false)?;
        body.send_data(bytes::Bytes::from_static(b"beginning"), false)?;
        let response = tokio::time::timeout(DEADLINE, response).await.context("no answer")??;
        let told = response.headers().contains_key("x-envoy-upstream-service-time");
        driver.abort();
        Ok((response.status().as_u16(), told))
    })
}

/// Hosts may answer before a request is complete. How long they took cannot be told then.
#[test]
fn early_answers_are_counted_as_by_envoy() -> Result<()> {
    for http2 in [false, true] {
        let mut seen = Vec::new();
        for kind in KINDS {
            let web = free_port()?;
            let yaml = Bootstrap::new().http(web, ROUTES, &[]).cluster("app", &[hasty()?], &[]).yaml();
            let daemon = Daemon::start(kind, &yaml)?;
            let answer = early_answer(web, http2).with_context(|| format!("{kind:?}, HTTP/2: {http2}"))?;
            let counted = daemon.stats()?.get("http.ingress.downstream_rq_response_before_rq_complete");
            seen.push((answer, counted));
        }
        assert_eq!(seen[0], seen[1], "HTTP/2: {http2}");
        assert_eq!(seen[0], ((200, false), 1), "HTTP/2: {http2}");
    }
    Ok(())
}

/// Health checks that are passed on are no requests in a cluster's statistics of responses.
#[test]
fn health_checks_are_not_counted_as_by_envoy() -> Result<()> {
    const COUNTERS: [&str; 9] = [
        "cluster.app.upstream_rq_200",
        "cluster.app.upstream_rq_2xx",
        "cluster.app.upstream_rq_503",
        "cluster.app.upstream_rq_5xx",
        "cluster.app.upstream_rq_completed",
        "cluster.app.upstream_rq_total",
        "http.ingress.downstream_rq_2xx",
        "http.ingress.downstream_rq_5xx",
        "http.ingress.downstream_rq_total",
    ];
    let filter = "http_filters:\n          - name: envoy.filters.http.health_check\n            typed_config: {\"@type\": \
                  type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck, pass_through_mode: true, headers: \
                  [{name: \":path\", string_match: {prefix: /health}}]}\n";
    let mut seen = Vec::new();
    for kind in KINDS {
        let host = server::start(|stream| {
            let mut stream = BufReader::new(stream);
            while let Some(request) = Request::read(&mut stream)? {
                let status = if request.target.ends_with("bad") { 503 } else { 200 };
                Response::new(status, "text/plain", b"ok".to_vec()).write(stream.get_mut(), false)?;
            }
            Ok(())
        })?;
        let web = free_port()?;
        let yaml = Bootstrap::new().http(web, ROUTES, &[]).cluster("app", &[host], &[]).yaml();
        let daemon = Daemon::start(kind, &yaml.replace("http_filters:\n", filter))?;
        for path in ["/health", "/health/bad", "/", "/health"] {
            let answer = fetch(web, Request::get(path)).with_context(|| format!("{kind:?}: {path}"))?;
            assert_eq!(answer.status, if path.ends_with("bad") { 503 } else { 200 }, "{kind:?}: {path}");
        }
        let counts = wait_until(DEADLINE, "all to be counted", || {
            let stats = daemon.stats()?;
            ensure!(stats.get("cluster.app.upstream_rq_total") == 4, "not yet");
            ensure!(stats.get("http.ingress.downstream_rq_active") == 0, "not yet");
            Ok(COUNTERS.map(|name| (name, stats.get(name))))
        })?;
        seen.push(counts);
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0][0].1, 1, "{seen:?}");
    Ok(())
}

/// `respect_expected_rq_timeout`: how long a request may take is what the proxy before this one expects.
#[test]
fn expectations_are_respected_as_by_envoy() -> Result<()> {
    const TRUSTED: &str = "x-forwarded-for: 10.0.0.1\r\n";
    let requests = [
        ("/hang", format!("{TRUSTED}x-envoy-expected-rq-timeout-ms: 300\r\n")),
        ("/hang", format!("{TRUSTED}x-envoy-expected-rq-timeout-ms: 300\r\nx-envoy-upstream-rq-timeout-ms: 9000\r\n")),
        ("/hang", format!("{TRUSTED}x-envoy-upstream-rq-timeout-ms: 300\r\n")),
        ("/slow", format!("{TRUSTED}x-envoy-expected-rq-timeout-ms: soon\r\nx-envoy-upstream-rq-timeout-ms: 0\r\n")),
        ("/slow", format!("{TRUSTED}x-envoy-expected-rq-timeout-ms: 0\r\n")),
        ("/slow", format!("{TRUSTED}x-envoy-expected-rq-timeout-ms: 9000\r\n")),
        ("/hang", "x-envoy-expected-rq-timeout-ms: 9000\r\n".to_owned()),
        ("/", String::new()),
    ];
    let mut seen = Vec::new();
    for kind in KINDS {
        let (told, heads) = std::sync::mpsc::channel();
        let host = server::start(move |stream| {
            let mut stream = BufReader::new(stream);
            while let Some(request) = Request::read(&mut stream)? {
                let of_time = |name: &&str| name.ends_with("timeout-ms");
                let names = request.headers.0.iter().map(|(name, value)| format!("{name}: {value}"));
                let mut names: Vec<_> =
                    names.filter(|line| line.split(':').next().is_some_and(|name| of_time(&name))).collect();
                names.sort();
                told.send(names)?;
                // It is the host that is slow.
                std::thread::sleep(Duration::from_millis(match request.target.as_str() {
                    "/hang" => 5000,
                    "/slow" => 1500,
                    _ => 0,
                }));
                Response::new(200, "text/plain", b"ok".to_vec()).write(stream.get_mut(), false)?;
            }
            Ok(())
        })?;
        let web = free_port()?;
        let routes = ROUTES.replace("timeout: 0s", "timeout: 1s");
        let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}";
        let yaml = Bootstrap::new().http(web, &routes, &[internal]).cluster("app", &[host], &[]).yaml();
        let yaml = yaml.replace("router.v3.Router}", "router.v3.Router, respect_expected_rq_timeout: true}");
        let _daemon = Daemon::start(kind, &yaml)?;
        for (path, headers) in &requests {
            let mut client = TcpStream::connect(("127.0.0.1", web))?;
            client.set_read_timeout(Some(DEADLINE))?;
            write!(client, "GET {path} HTTP/1.1\r\nhost: a.test\r\n{headers}connection: close\r\n\r\n")?;
            let answer =
                Response::read(&mut BufReader::new(client), "GET").with_context(|| format!("{kind:?}: {path}"))?;
            let head = heads.recv_timeout(DEADLINE)?;
            seen.push(format!("{path} {headers:?}: {} {}, {head:?}", answer.status, answer.text()));
        }
    }
    let (envoy, culvert) = seen.split_at(requests.len());
    assert_eq!(envoy, culvert);
    assert!(envoy[0].contains(" 504 ") && envoy[5].contains(" 200 ok"), "{envoy:?}");
    Ok(())
}
