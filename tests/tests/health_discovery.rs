//! culvert-discovery has proxies check endpoints: the real Envoy and culvertd find out what does not work, and proxies hear of it.

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::stats::admin_get;
use culvert_tests::{server, wait_until};
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(30);

/// A host whose health can be changed.
struct Host {
    port: u16,
    works: Arc<AtomicBool>,
    checks: Arc<AtomicUsize>,
}

impl Host {
    fn start() -> Result<Host> {
        let (works, checks) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
        let (state, count) = (Arc::clone(&works), Arc::clone(&checks));
        let port = server::start(move |stream: TcpStream| {
            let mut stream = std::io::BufReader::new(stream);
            while let Some(request) = Request::read(&mut stream)? {
                count.fetch_add(usize::from(request.target == "/healthz"), Ordering::SeqCst);
                let status = if state.load(Ordering::SeqCst) { 200 } else { 503 };
                Response::new(status, "text/plain", Vec::new()).write(stream.get_mut(), false)?;
            }
            Ok(())
        })?;
        Ok(Host { port, works, checks })
    }
}

/// A running culvert-discovery; dropping it kills it.
struct Discovery {
    child: Child,
    xds: u16,
    http: String,
}

impl Discovery {
    fn start(hosts: &[Host]) -> Result<Discovery> {
        let directory = scratch_dir()?;
        // One slice a host: slices of one port each.
        let slices = hosts.iter().enumerate().map(|(index, host)| {
            format!(
                "
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: users-{index}, labels: {{kubernetes.io/service-name: users}}}}
addressType: IPv4
ports: [{{name: http, port: {}}}]
endpoints: [{{addresses: [127.0.0.1], targetRef: {{kind: Pod, name: users-{index}, uid: u{index}}}}}]",
                host.port
            )
        });
        let objects = format!(
            "
apiVersion: v1
kind: Service
metadata: {{name: users}}
spec: {{clusterIP: 10.96.0.1, ports: [{{name: http, port: 80}}]}}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: users}}
spec:
  healthCheck: {{path: /healthz, interval: 200ms, timeout: 1s, unhealthyThreshold: 2, healthyThreshold: 2, by: checkers}}{}
",
            slices.collect::<String>()
        );
        fs::create_dir(directory.join("east"))?;
        fs::write(directory.join("east/all.yaml"), objects)?;
        let (xds, http) = (free_port()?, free_port()?);
        let config = directory.join("discovery.yaml");
        let text = format!(
            "{{listen: '127.0.0.1:{xds}', http: '127.0.0.1:{http}', health_report_interval: 1, clusters: [{{name: east, \
             manifests: {}}}]}}",
            directory.join("east").display()
        );
        fs::write(&config, text)?;
        let child = Command::new(binary("culvert-discovery")?)
            .arg("-c")
            .arg(&config)
            .stdin(Stdio::null())
            .spawn()
            .context("starting culvert-discovery")?;
        let discovery = Discovery { child, xds, http: format!("127.0.0.1:{http}") };
        wait_until(DEADLINE, "culvert-discovery", || admin_get(&discovery.http, "/ready"))?;
        Ok(discovery)
    }

    fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&admin_get(&self.http, "/status")?)?)
    }

    /// Waits until endpoints are as wanted, each with its port.
    fn until_health(&self, wanted: &[(&Host, &str)]) -> Result<()> {
        wait_until(DEADLINE, "the endpoints' health", || {
            let status = self.status()?;
            let endpoints = status["services"][0]["endpoints"].as_array().context("no endpoints")?;
            for (host, health) in wanted {
                let address = json!(format!("127.0.0.1:{}", host.port));
                let endpoint = endpoints.iter().find(|endpoint| endpoint["address"] == address);
                ensure!(endpoint.is_some_and(|endpoint| endpoint["health"] == *health), "{endpoints:?}");
            }
            Ok(())
        })
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A proxy that is given clusters and endpoints, and checks what it is told to.
fn checker(kind: Kind, discovery: &Discovery) -> Result<Daemon> {
    let hds =
        "hds_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}";
    let yaml = ads_bootstrap(discovery.xds, "DELTA_GRPC");
    let without_listeners: Vec<&str> = yaml.lines().filter(|line| !line.contains("lds_config")).collect();
    Daemon::start(kind, &format!("{hds}\n{}\n", without_listeners.join("\n")))
}

fn proxies_find_out(kind: Kind) -> Result<()> {
    let hosts = [Host::start()?, Host::start()?];
    let discovery = Discovery::start(&hosts)?;
    let proxy = checker(kind, &discovery)?;
    wait_until(DEADLINE, "a report of both", || {
        let checker = &discovery.status()?["checkers"][0];
        let expected =
            json!({"node": "node-1", "region": "", "zone": "", "reports": true, "endpoints": 2, "failed": 0});
        ensure!(*checker == expected, "{checker}");
        ensure!(hosts.iter().all(|host| host.checks.load(Ordering::SeqCst) > 2), "not checked yet");
        Ok(())
    })?;
    discovery.until_health(&[(&hosts[0], "healthy"), (&hosts[1], "healthy")])?;
    let flags = |host: &Host| -> Result<String> {
        let clusters = proxy.admin("/clusters")?;
        let start = format!("users.default:80::127.0.0.1:{}::health_flags::", host.port);
        let line = clusters.lines().find_map(|line| line.strip_prefix(&start));
        line.map(str::to_owned).with_context(|| format!("{start} is not in {clusters}"))
    };
    let until_flags = |host: &Host, wanted: &str| {
        wait_until(DEADLINE, "the proxy to hear of it", || {
            let found = flags(host)?;
            ensure!(found == wanted, "{found}");
            Ok(())
        })
    };
    until_flags(&hosts[1], "healthy")?;
    hosts[1].works.store(false, Ordering::SeqCst);
    discovery.until_health(&[(&hosts[0], "healthy"), (&hosts[1], "unhealthy")])?;
    // It is EDS that tells it: the proxy has no health check of its own.
    until_flags(&hosts[1], "/failed_eds_health")?;
    assert_eq!(flags(&hosts[0])?, "healthy");
    let metrics = admin_get(&discovery.http, "/metrics")?;
    for line in ["culvert_discovery_endpoints{health=\"unhealthy\"} 1\n", "culvert_discovery_health_checkers 1\n"] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    hosts[1].works.store(true, Ordering::SeqCst);
    discovery.until_health(&[(&hosts[1], "healthy")])?;
    until_flags(&hosts[1], "healthy")?;
    // What a proxy said that is gone counts for a moment only.
    hosts[0].works.store(false, Ordering::SeqCst);
    discovery.until_health(&[(&hosts[0], "unhealthy")])?;
    drop(proxy);
    discovery.until_health(&[(&hosts[0], "healthy")])?;
    assert_eq!(discovery.status()?["checkers"], json!([]));
    Ok(())
}

#[test]
fn envoy_checks_for_all() -> Result<()> {
    proxies_find_out(Kind::Envoy)
}

#[test]
fn culvertd_checks_for_all() -> Result<()> {
    proxies_find_out(Kind::Culvert)
}
