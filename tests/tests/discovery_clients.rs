//! culvert-discovery and clients that are not ours: the real Envoy, and gRPC's own xDS client.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::binaries::binary;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::peers::Peer;
use culvert_tests::stats::admin_get;
use culvert_tests::wait_until;
use culvert_xds_client::overrides::Overrides;

const DEADLINE: Duration = Duration::from_secs(20);

/// A running culvert-discovery; dropping it kills it.
struct Discovery {
    child: Child,
    xds: u16,
}

impl Discovery {
    fn start(manifests: &Path) -> Result<Discovery> {
        Discovery::start_with(manifests, &[])
    }

    fn start_with(manifests: &Path, further: &[&str]) -> Result<Discovery> {
        let (xds, http) = (free_port()?, free_port()?);
        let child = Command::new(binary("culvert-discovery")?)
            .args(["--cluster", &format!("east={},region=eu,zone=eu-1", manifests.display())])
            .args(["--listen", &format!("127.0.0.1:{xds}"), "--http", &format!("127.0.0.1:{http}")])
            .args(further)
            .stdin(Stdio::null())
            .spawn()
            .context("starting culvert-discovery")?;
        let discovery = Discovery { child, xds };
        wait_until(DEADLINE, "culvert-discovery", || admin_get(&format!("127.0.0.1:{http}"), "/status"))?;
        Ok(discovery)
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes a gRPC service `echo` with one endpoint, 127.0.0.1 at `port`.
fn write_service(directory: &Path, port: u16) -> Result<()> {
    let text = format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: echo}}
spec: {{clusterIP: 10.96.0.1, selector: {{app: echo}}, ports: [{{name: grpc, port: 80, targetPort: {port}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: echo-1, labels: {{kubernetes.io/service-name: echo}}}}
addressType: IPv4
ports: [{{name: grpc, port: {port}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
"
    );
    // In one step: discovery reads whole files only.
    let partial = directory.join(".echo.yaml");
    fs::write(&partial, text)?;
    fs::rename(partial, directory.join("echo.yaml")).context("writing the manifest")
}

#[test]
fn grpc_finds_a_service_and_follows_its_endpoints() -> Result<()> {
    let (one, two) = (Peer::grpc_service("one")?, Peer::grpc_service("two")?);
    let manifests = scratch_dir()?;
    write_service(&manifests, one.port)?;
    let discovery = Discovery::start(&manifests)?;
    for target in ["xds:///echo.default:80", "xds:///echo.default.svc.cluster.local:80"] {
        let mut caller = Peer::grpc_caller(target, discovery.xds)?;
        assert_eq!(caller.call()?, "one", "{target}");
        write_service(&manifests, two.port)?;
        wait_until(DEADLINE, "the caller to follow", || {
            let answer = caller.call()?;
            ensure!(answer == "two", "{answer} answers");
            Ok(())
        })?;
        write_service(&manifests, one.port)?;
    }
    fs::remove_dir_all(manifests)?;
    Ok(())
}

/// A client that reads what there is not (gRPC's proposal A88) need not wait until it believes that nothing comes.
#[test]
fn grpc_hears_at_once_that_there_is_no_such_service() -> Result<()> {
    let one = Peer::grpc_service("one")?;
    let manifests = scratch_dir()?;
    write_service(&manifests, one.port)?;
    let discovery = Discovery::start(&manifests)?;
    let mut caller = Peer::grpc_asker("xds:///nosuch.default:80", discovery.xds)?;
    let before = Instant::now();
    let error = caller.call().err().context("somebody answers")?.to_string();
    ensure!(error.contains("nosuch.default:80: does not exist"), "{error}");
    // Without it, it is 15 s.
    ensure!(before.elapsed() < Duration::from_secs(10), "{:?}", before.elapsed());
    fs::remove_dir_all(manifests)?;
    Ok(())
}

/// Both variants: the clusters, endpoints, listener and routes that discovery makes are to Envoy's taste.
#[test]
fn envoy_takes_everything() -> Result<()> {
    let manifests = scratch_dir()?;
    write_service(&manifests, 1)?;
    let discovery = Discovery::start(&manifests)?;
    for api_type in ["GRPC", "DELTA_GRPC"] {
        let yaml = ads_bootstrap(discovery.xds, api_type);
        let envoy = Daemon::start(Kind::Envoy, &yaml)?;
        wait_until(DEADLINE, "Envoy to have the service", || {
            let stats = envoy.stats()?;
            for (name, value) in [
                ("cluster_manager.cds.update_rejected", 0),
                ("listener_manager.lds.update_rejected", 0),
                ("cluster.echo.default:80.membership_healthy", 1),
            ] {
                // In Envoy a colon in a name becomes an underscore.
                let name = name.replace("echo.default:80", "echo.default_80");
                ensure!(stats.get(&name) == value, "{name} is {}", stats.get(&name));
            }
            ensure!(stats.get("cluster_manager.cds.update_success") >= 1, "no clusters yet");
            let dump = envoy.admin("/config_dump")?;
            ensure!(dump.contains("outbound_http_80"), "no listener yet");
            Ok(())
        })
        .with_context(|| format!("{api_type}: {}", envoy.stderr()))?;
        write_service(&manifests, 2)?;
        wait_until(DEADLINE, "Envoy to see the endpoint move", || {
            let clusters = envoy.admin("/clusters")?;
            ensure!(clusters.contains("127.0.0.1:2::"), "{clusters}");
            Ok(())
        })?;
        write_service(&manifests, 1)?;
    }
    fs::remove_dir_all(manifests)?;
    Ok(())
}

/// Answers at an address of its own, which load balancing leaves out.
fn offloaded_pod() -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.5:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 17\r\n\r\n";
            let _ = write!(stream, "{head}{{\"pod\":\"users-x\"}}");
        }
    });
    Ok(port)
}

/// A node whose pods may call one service is given another one by the first request to it, with its endpoints from then on.
#[test]
fn what_egress_leaves_out_comes_on_demand() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let app = |pod: &str| App { pod: pod.into(), revision: String::new(), upstream: None }.start();
        let (orders, users, later) = (app("orders")?, app("users")?, app("users-2")?);
        let feature = offloaded_pod()?;
        let manifests = scratch_dir()?;
        // The services' port is the listener's own: requests that come to it are meant for that port.
        let port = free_port()?;
        let write = |name: &str, endpoint: u16| -> Result<()> {
            let text = format!(
                "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{selector: {{app: {name}}}, ports: \
                 [{{name: http, port: {port}, targetPort: {feature}}}]}}}}\n---\n\
                 apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}-1, labels: \
                 {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\nports: [{{name: http, port: {endpoint}}}]\n\
                 endpoints: [{{addresses: [127.0.0.1]}}]\n"
            );
            let partial = manifests.join(format!(".{name}.yaml"));
            fs::write(&partial, text)?;
            fs::rename(partial, manifests.join(format!("{name}.yaml"))).context("writing a manifest")
        };
        // The node is of the service `test`.
        for (name, endpoint) in [("test", 1), ("orders", orders), ("users", users)] {
            write(name, endpoint)?;
        }
        let policy = "{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {name: test}, spec: {egress: [orders], \
                      onDemand: true}}";
        fs::write(manifests.join("policy.yaml"), policy)?;
        let offloaded = "{apiVersion: v1, kind: Pod, metadata: {name: users-x, labels: {app: users, culvert.dev/offloaded: 'true', \
                         culvert.dev/revision: x}}, status: {podIP: 127.0.0.5}}";
        fs::write(manifests.join("offloaded.yaml"), offloaded)?;
        let own = port.to_string();
        let discovery =
            Discovery::start_with(&manifests, &["--outbound-address", "127.0.0.1", "--outbound-port", &own])?;
        let proxy = Daemon::start(kind, &ads_bootstrap(discovery.xds, "DELTA_GRPC"))?;
        let answered = |host: &str| -> Result<String> {
            let response = fetch(port, Request::get("/").header("host", host))?;
            ensure!(response.status == 200, "{host}: {} {}", response.status, response.text());
            let answer: serde_json::Value = serde_json::from_str(&response.text())?;
            Ok(answer["pod"].as_str().unwrap_or_default().to_owned())
        };
        let pod = wait_until(DEADLINE, "what the node is given", || answered("orders"))?;
        assert_eq!(pod, "orders");
        let name = format!("users.default:{port}::");
        let clusters = proxy.admin("/clusters")?;
        ensure!(clusters.contains(&format!("orders.default:{port}::")) && !clusters.contains(&name), "{clusters}");
        // The first request waits, and none fails.
        assert_eq!(answered("users")?, "users", "{kind:?}");
        ensure!(proxy.admin("/clusters")?.contains(&name), "{kind:?}");
        write("users", later)?;
        wait_until(DEADLINE, "its endpoints to be followed", || {
            let pod = answered("users")?;
            ensure!(pod == "users-2", "{pod}");
            Ok(())
        })?;
        if kind == Kind::Culvert {
            // What goes with it comes too: its revisions.
            let item = Overrides::new([("users", "x")])?.to_baggage_item();
            wait_until(DEADLINE, "its revision to be reached", || {
                let request = Request::get("/").header("host", "users").header("ot-baggage-overrides", &item);
                let text = fetch(port, request)?.text();
                ensure!(text.contains("\"users-x\""), "{text}");
                Ok(())
            })?;
        }
        fs::remove_dir_all(manifests)?;
    }
    Ok(())
}
