//! culvert-discovery and clients that are not ours: the real Envoy, and gRPC's own xDS client.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::binaries::binary;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port, scratch_dir};
use culvert_tests::peers::Peer;
use culvert_tests::stats::admin_get;
use culvert_tests::wait_until;

const DEADLINE: Duration = Duration::from_secs(20);

/// A running culvert-discovery; dropping it kills it.
struct Discovery {
    child: Child,
    xds: u16,
}

impl Discovery {
    fn start(manifests: &Path) -> Result<Discovery> {
        let (xds, http) = (free_port()?, free_port()?);
        let child = Command::new(binary("culvert-discovery")?)
            .args(["--cluster", &format!("east={},region=eu,zone=eu-1", manifests.display())])
            .args(["--listen", &format!("127.0.0.1:{xds}"), "--http", &format!("127.0.0.1:{http}")])
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
