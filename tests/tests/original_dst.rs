//! ORIGINAL_DST clusters, of culvertd and of the real Envoy: hosts come with the requests that name them, are watched like others, and go
//! when nobody uses them.

use std::collections::BTreeSet;
use std::io::BufReader;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);
const BY_HEADER: &str =
    "type: ORIGINAL_DST\n    lb_policy: CLUSTER_PROVIDED\n    original_dst_lb_config: {use_http_header: true}";

/// A host, and what it answers to requests and to checks.
struct Upstream {
    port: u16,
    status: Arc<AtomicU16>,
    check: Arc<AtomicU16>,
}

impl Upstream {
    fn start() -> Result<Upstream> {
        let (status, check) = (Arc::new(AtomicU16::new(200)), Arc::new(AtomicU16::new(200)));
        let says = (Arc::clone(&status), Arc::clone(&check));
        let port = server::start(move |mut stream| {
            let mut reader = BufReader::new(stream.try_clone()?);
            while let Some(request) = Request::read(&mut reader)? {
                let status = if request.target == "/check" { &says.1 } else { &says.0 };
                Response::new(status.load(Ordering::Relaxed), "text/plain", Vec::new()).write(&mut stream, false)?;
            }
            Ok(())
        })?;
        Ok(Upstream { port, status, check })
    }
}

struct Proxy {
    daemon: Daemon,
    port: u16,
}

impl Proxy {
    fn start(kind: Kind, fields: &str) -> Result<Proxy> {
        let port = free_port()?;
        let hosts = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster: named}}]}";
        let bootstrap = Bootstrap::new().http(port, hosts, &[]).cluster_of("named", &[BY_HEADER, fields]);
        Ok(Proxy { daemon: Daemon::start(kind, &bootstrap.yaml())?, port })
    }

    /// The status of a request to this destination.
    fn ask(&self, destination: &str) -> Result<u16> {
        Ok(fetch(self.port, Request::get("/").header("x-envoy-original-dst-host", destination))?.status)
    }

    /// What `/clusters` says of hosts, without what is counted: `address::field::value`.
    fn hosts(&self) -> Result<BTreeSet<String>> {
        let clusters = self.daemon.admin("/clusters")?;
        let lines = clusters.lines().filter_map(|line| line.strip_prefix("named::127.0.0.1:"));
        Ok(lines.filter(|line| !line.contains("::cx_") && !line.contains("::rq_")).map(str::to_owned).collect())
    }

    fn wait_flags(&self, what: &str, port: u16, flags: &str) -> Result<()> {
        wait_until(DEADLINE, what, || {
            let hosts = self.hosts()?;
            ensure!(hosts.contains(&format!("{port}::health_flags::{flags}")), "{hosts:?}");
            Ok(())
        })
    }

    fn stat(&self, name: &str) -> Result<u64> {
        Ok(self.daemon.stats()?.get(&format!("cluster.named.{name}")))
    }

    fn wait_stat(&self, name: &str, value: u64) -> Result<()> {
        wait_until(DEADLINE, &format!("{name} to be {value}"), || {
            let now = self.stat(name)?;
            ensure!(now == value, "it is {now}");
            Ok(())
        })
    }
}

const KINDS: [Kind; 2] = [Kind::Envoy, Kind::Culvert];

#[test]
fn hosts_are_listed_until_nobody_uses_them_as_by_envoy() -> Result<()> {
    let upstream = Upstream::start()?;
    let mut listed = Vec::new();
    for kind in KINDS {
        // Connections that are idle for so long are closed: a host with one stays.
        let idle = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                    type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: \
                    {idle_timeout: 3s}, explicit_http_config: {http_protocol_options: {}}}}";
        let proxy = Proxy::start(kind, &format!("cleanup_interval: 0.2s\n    {idle}"))?;
        ensure!(proxy.stat("membership_change")? == 0, "{kind:?}: nothing has changed yet");
        ensure!(proxy.ask(&format!("127.0.0.1:{}", upstream.port))? == 200, "{kind:?}");
        proxy.wait_stat("membership_total", 1)?;
        ensure!(proxy.stat("membership_healthy")? == 1, "{kind:?}");
        listed.push(proxy.hosts()?);
        // Nothing is asked for from now on.
        let mut kept = 0;
        wait_until(DEADLINE, "the connection to grow old", || {
            let active = proxy.stat("upstream_cx_active")?;
            // The host of a connection that there still was is read after that.
            kept += u64::from(active == 1 && proxy.stat("membership_total")? == 1);
            ensure!(active == 0, "it is open");
            Ok(())
        })?;
        ensure!(kept > 10, "{kind:?}: the host has to stay as long as its connection: seen {kept} times");
        proxy.wait_stat("membership_total", 0)?;
        ensure!(proxy.hosts()?.is_empty(), "{kind:?}");
        ensure!(proxy.stat("membership_change")? == 2, "{kind:?}: it came and went");
        // It comes back.
        ensure!(proxy.ask(&format!("127.0.0.1:{}", upstream.port))? == 200, "{kind:?}");
        proxy.wait_stat("membership_total", 1)?;
    }
    ensure!(listed[0].contains(&format!("{}::hostname::named127.0.0.1:{0}", upstream.port)), "{listed:?}");
    assert_eq!(listed[1], listed[0]);
    Ok(())
}

#[test]
fn a_host_that_is_never_reached_goes_as_well() -> Result<()> {
    for kind in KINDS {
        let proxy = Proxy::start(kind, "cleanup_interval: 0.2s\n    connect_timeout: 1s")?;
        let nobody = format!("127.0.0.1:{}", free_port()?);
        for _ in 0..3 {
            ensure!(proxy.ask(&nobody)? == 503, "{kind:?}");
        }
        proxy.wait_stat("membership_total", 0)?;
        // It came and went: more than once where the requests took longer than the interval.
        let changes = proxy.stat("membership_change")?;
        ensure!(changes >= 2 && changes % 2 == 0, "{kind:?}: {changes}");
    }
    Ok(())
}

#[test]
fn hosts_are_checked_as_by_envoy() -> Result<()> {
    let upstream = Upstream::start()?;
    let destination = format!("127.0.0.1:{}", upstream.port);
    for kind in KINDS {
        upstream.check.store(500, Ordering::Relaxed);
        let check = "health_checks: [{timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 2, \
                     healthy_threshold: 2, http_health_check: {path: /check, retriable_statuses: [{start: 500, end: 501}]}}]\n    \
                     common_lb_config: {healthy_panic_threshold: {value: 0}}";
        let proxy = Proxy::start(kind, check)?;
        ensure!(proxy.ask(&destination)? == 200, "{kind:?}");
        proxy.wait_flags("it to fail", upstream.port, "/failed_active_hc")?;
        ensure!(proxy.stat("membership_healthy")? == 0, "{kind:?}");
        ensure!(proxy.stat("health_check.healthy")? == 0, "{kind:?}");
        // It was taken to be well: the first check was not enough.
        ensure!(proxy.stat("health_check.failure")? >= 2, "{kind:?}");
        let before = proxy.stat("upstream_cx_total")?;
        // Whoever names a host means it. The connection that there was is not used again.
        ensure!(proxy.ask(&destination)? == 200, "{kind:?}");
        ensure!(proxy.stat("upstream_cx_total")? == before + 1, "{kind:?}");
        upstream.check.store(200, Ordering::Relaxed);
        proxy.wait_flags("it to pass", upstream.port, "healthy")?;
        ensure!(proxy.stat("health_check.healthy")? == 1, "{kind:?}");
        ensure!(proxy.stat("health_check.success")? >= 2, "{kind:?}");
    }
    Ok(())
}

#[test]
fn checks_end_with_their_host() -> Result<()> {
    let upstream = Upstream::start()?;
    for kind in KINDS {
        upstream.check.store(200, Ordering::Relaxed);
        let check = "cleanup_interval: 0.2s\n    health_checks: [{timeout: 5s, interval: 0.1s, no_traffic_interval: 0.1s, \
                     unhealthy_threshold: 2, healthy_threshold: 2, http_health_check: {path: /check}}]";
        let proxy = Proxy::start(kind, check)?;
        ensure!(proxy.ask(&format!("127.0.0.1:{}", upstream.port))? == 200, "{kind:?}");
        proxy.wait_stat("membership_total", 1)?;
        proxy.wait_stat("health_check.healthy", 1)?;
        // Its connections are not kept when it fails, and so nothing keeps the host.
        upstream.check.store(500, Ordering::Relaxed);
        proxy.wait_stat("membership_total", 0)?;
        let after = proxy.stat("health_check.attempt")?;
        // As many checks as there would have been: none of them came.
        std::thread::sleep(Duration::from_millis(500));
        ensure!(proxy.stat("health_check.attempt")? <= after + 1, "{kind:?}");
        ensure!(proxy.stat("health_check.healthy")? == 0, "{kind:?}");
    }
    Ok(())
}

#[test]
fn hosts_that_fail_are_ejected_as_by_envoy() -> Result<()> {
    let (upstream, other) = (Upstream::start()?, Upstream::start()?);
    let (destination, well) = (format!("127.0.0.1:{}", upstream.port), format!("127.0.0.1:{}", other.port));
    for kind in KINDS {
        let outlier = "outlier_detection: {consecutive_5xx: 3, interval: 0.2s, base_ejection_time: 1s, max_ejection_percent: 100}";
        let proxy = Proxy::start(kind, outlier)?;
        ensure!(proxy.ask(&well)? == 200, "{kind:?}");
        // Failures count from the moment on in which the control thread has the host, in Envoy too.
        ensure!(proxy.ask(&destination)? == 200, "{kind:?}");
        proxy.wait_flags("it to be listed", upstream.port, "healthy")?;
        upstream.status.store(500, Ordering::Relaxed);
        for _ in 0..3 {
            ensure!(proxy.ask(&destination)? == 500, "{kind:?}");
        }
        proxy.wait_stat("outlier_detection.ejections_enforced_consecutive_5xx", 1)?;
        proxy.wait_flags("it to be ejected", upstream.port, "/failed_outlier_check")?;
        let hosts = proxy.hosts()?;
        ensure!(hosts.contains(&format!("{}::health_flags::healthy", other.port)), "{kind:?}: {hosts:?}");
        upstream.status.store(200, Ordering::Relaxed);
        ensure!(proxy.ask(&destination)? == 200, "{kind:?}: whoever names a host means it");
        proxy.wait_flags("it to be back", upstream.port, "healthy")?;
        ensure!(proxy.stat("outlier_detection.ejections_active")? == 0, "{kind:?}");
    }
    Ok(())
}
