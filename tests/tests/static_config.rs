//! culvertd on a static bootstrap, without root and without interception: routes, timeouts, load balancing, HTTP/2, TCP, the
//! admin interface, and how it ends.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::wait_until;
use nix::sys::signal::Signal;
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);
const TO_APP: &str = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
const H2: &str = r#"typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}"#;

fn app(pod: &str) -> Result<u16> {
    App { pod: pod.to_owned(), revision: "main".to_owned(), upstream: None }.start()
}

fn json(response: &Response) -> Result<Value> {
    ensure!(response.status == 200, "status {}: {}", response.status, response.text());
    serde_json::from_slice(&response.body).with_context(|| response.text())
}

#[test]
fn requests_spread_over_endpoints_and_connections_are_kept() -> Result<()> {
    let (one, two) = (app("one")?, app("two")?);
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[one, two], &[]).yaml();
    let daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let mut pods = Vec::new();
    for _ in 0..10 {
        let answer = json(&fetch(port, Request::get("/"))?)?;
        pods.push(answer["pod"].as_str().unwrap_or_default().to_owned());
    }
    assert_eq!(pods.iter().filter(|pod| *pod == "one").count(), 5, "round robin: {pods:?}");
    let stats = daemon.stats()?;
    assert_eq!(stats.get("cluster.app.upstream_rq_total"), 10);
    assert_eq!(stats.get("cluster.app.upstream_cx_total"), 2, "one connection an endpoint is enough");
    assert_eq!(stats.get("http.ingress.downstream_cx_total"), 10);
    Ok(())
}

#[test]
fn http2_on_both_sides() -> Result<()> {
    let upstream = app("app")?;
    let (front, back) = (free_port()?, free_port()?);
    // The second listener is the HTTP/2 upstream of the first.
    let yaml = Bootstrap::new()
        .http(front, &TO_APP.replace("cluster: app", "cluster: back"), &[])
        .http(back, TO_APP, &["codec_type: HTTP2"])
        .cluster("back", &[back], &[H2])
        .cluster("app", &[upstream], &[])
        .yaml();
    let daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let body = scratch_dir()?.join("body");
    std::fs::write(&body, vec![b'x'; 1 << 20])?;
    let url = format!("http://127.0.0.1:{front}/path?q");
    for protocol in ["--http2-prior-knowledge", "--http1.1"] {
        let data = format!("@{}", body.display());
        let output = Command::new("curl")
            .args(["-sS", "--fail", "-m", "10", protocol, "--data-binary", &data, &url])
            .output()
            .context("running curl")?;
        ensure!(output.status.success(), "{protocol}: {}", String::from_utf8_lossy(&output.stderr));
        let answer: Value = serde_json::from_slice(&output.stdout)?;
        assert_eq!((&answer["method"], &answer["path"]), (&"POST".into(), &"/path?q".into()), "{protocol}");
        assert_eq!(answer["body_bytes"], 1 << 20, "{protocol}");
    }
    let stats = daemon.stats()?;
    assert_eq!(stats.get("cluster.back.upstream_cx_http2_total"), 1, "one HTTP/2 connection carries both");
    assert_eq!(stats.get("http.ingress.downstream_cx_http2_total"), 2);
    Ok(())
}

#[test]
fn circuit_breakers_refuse_what_is_too_much() -> Result<()> {
    let upstream = app("app")?;
    let port = free_port()?;
    let breaker = "circuit_breakers: {thresholds: [{max_connections: 1, max_pending_requests: 1, max_requests: 1}]}";
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[upstream], &[breaker]).yaml();
    let daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let statuses: Result<Vec<u16>> = thread::scope(|scope| {
        let calls: Vec<_> = (0..5).map(|_| scope.spawn(|| fetch(port, Request::get("/?delay_ms=500")))).collect();
        calls.into_iter().map(|call| call.join().expect("no panic").map(|response| response.status)).collect()
    });
    let statuses = statuses?;
    let refused = statuses.iter().filter(|status| **status == 503).count();
    assert!((3..5).contains(&refused), "one runs, one waits, the rest is refused: {statuses:?}");
    let stats = daemon.stats()?;
    let overflows = ["upstream_rq_pending_overflow", "upstream_rq_active_overflow"];
    let counted: u64 = overflows.iter().map(|name| stats.get(&format!("cluster.app.{name}"))).sum();
    assert_eq!(counted, refused as u64);
    Ok(())
}

#[test]
fn names_are_resolved() -> Result<()> {
    let upstream = app("app")?;
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[upstream], &[]).yaml();
    let yaml = yaml.replace("type: STATIC", "type: STRICT_DNS").replace(
        &format!("address: 127.0.0.1, port_value: {upstream}"),
        &format!("address: localhost, port_value: {upstream}"),
    );
    let daemon = Daemon::start(Kind::Culvert, &format!("{yaml}    dns_lookup_family: V4_ONLY\n"))?;
    wait_until(DEADLINE, "localhost to be resolved", || json(&fetch(port, Request::get("/"))?))?;
    assert_eq!(daemon.stats()?.get("cluster.app.membership_healthy"), 1);
    Ok(())
}

#[test]
fn tcp_passes_both_ways_and_half_closes() -> Result<()> {
    let upstream = TcpListener::bind("127.0.0.1:0")?;
    let upstream_port = upstream.local_addr()?.port();
    // Answers only once the client has said that it is done.
    thread::spawn(move || {
        while let Ok((mut stream, _)) = upstream.accept() {
            thread::spawn(move || {
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                let _ = stream.write_all(&all);
            });
        }
    });
    let port = free_port()?;
    let yaml = Bootstrap::new().tcp(port, "raw").cluster("raw", &[upstream_port], &[]).yaml();
    let daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(&sent)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut received = Vec::new();
    stream.read_to_end(&mut received)?;
    assert!(received == sent, "{} bytes sent, {} came back", sent.len(), received.len());
    wait_until(DEADLINE, "the bytes to be counted", || {
        let stats = daemon.stats()?;
        let counted =
            (stats.get("tcp.tcp.downstream_cx_rx_bytes_total"), stats.get("tcp.tcp.downstream_cx_tx_bytes_total"));
        ensure!(counted == (3_000_000, 3_000_000), "{counted:?}");
        Ok(())
    })
}

#[test]
fn the_admin_interface() -> Result<()> {
    let upstream = app("app")?;
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[upstream], &[]).yaml();
    let flags = ["--service-node", "n1", "--service-cluster", "c1"];
    let daemon = Daemon::start_with(Kind::Culvert, &yaml, &flags)?;
    fetch(port, Request::get("/"))?;

    assert_eq!(daemon.admin("/ready")?, "LIVE\n");
    assert!(daemon.admin("/listeners")?.contains(&format!("http_{port}::127.0.0.1:{port}")));
    let clusters = daemon.admin("/clusters")?;
    for line in ["app::default_priority::max_connections::1024", &format!("app::127.0.0.1:{upstream}::rq_total::1")] {
        assert!(clusters.contains(line), "{line} is not in\n{clusters}");
    }
    let prometheus = daemon.admin("/stats/prometheus")?;
    for line in [
        "# TYPE envoy_cluster_upstream_rq_total counter",
        "envoy_cluster_upstream_rq_total{envoy_cluster_name=\"app\"} 1",
        "envoy_cluster_upstream_rq{envoy_response_code=\"200\",envoy_cluster_name=\"app\"} 1",
    ] {
        assert!(prometheus.contains(line), "{line} is not in\n{prometheus}");
    }
    let info: Value = serde_json::from_str(&daemon.admin("/server_info")?)?;
    assert_eq!((&info["state"], &info["node"]["id"]), (&"LIVE".into(), &"n1".into()), "{info}");
    let dump = daemon.admin("/config_dump")?;
    let parsed: Value = serde_json::from_str(&dump)?;
    let kinds: Vec<&str> =
        parsed["configs"].as_array().context("configs")?.iter().filter_map(|config| config["@type"].as_str()).collect();
    for kind in ["BootstrapConfigDump", "ClustersConfigDump", "ListenersConfigDump"] {
        assert!(kinds.iter().any(|found| found.ends_with(kind)), "{kind} is not in {kinds:?}");
    }
    assert!(daemon.stats()?.get("server.live") == 1);
    Ok(())
}

#[test]
fn sigterm_lets_requests_in_flight_finish() -> Result<()> {
    let upstream = app("app")?;
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[upstream], &[]).yaml();
    let mut daemon = Daemon::start_with(Kind::Culvert, &yaml, &["--drain-time-s", "10"])?;
    let mut in_flight = TcpStream::connect(("127.0.0.1", port))?;
    Request::get("/?delay_ms=1500").header("host", "a").write(&mut in_flight)?;
    wait_until(DEADLINE, "the request to be upstream", || {
        ensure!(daemon.stats()?.get("cluster.app.upstream_rq_active") == 1, "not yet");
        Ok(())
    })?;
    let told = Instant::now();
    daemon.signal(Signal::SIGTERM)?;
    wait_until(DEADLINE, "new connections to be refused", || {
        ensure!(TcpStream::connect(("127.0.0.1", port)).is_err(), "still accepted");
        Ok(())
    })?;
    assert!(told.elapsed() < Duration::from_secs(1), "the listener is closed at once");
    let response = Response::read(&mut BufReader::new(in_flight), "GET")?;
    assert_eq!(response.status, 200);
    assert_eq!(response.headers.get("connection"), Some("close"), "the client is told not to come again");
    let status = daemon.wait(DEADLINE)?;
    assert!(status.success(), "{status}: {}", daemon.stderr());
    Ok(())
}

#[test]
fn quitquitquit_ends_it() -> Result<()> {
    let port = free_port()?;
    let yaml = Bootstrap::new().http(port, TO_APP, &[]).cluster("app", &[port], &[]).yaml();
    let mut daemon = Daemon::start(Kind::Culvert, &yaml)?;
    let admin = daemon.admin_address().rsplit_once(':').context("a port")?.1.parse()?;
    let mut post = Request::get("/quitquitquit").header("content-length", "0");
    assert_eq!(fetch(admin, post.clone())?.status, 405, "a GET must not end it");
    post.method = "POST".to_owned();
    assert_eq!(fetch(admin, post)?.status, 200);
    assert!(daemon.wait(DEADLINE)?.success());
    Ok(())
}
