//! Who passes contexts on: what the daemons of two nodes count, and discovery tells.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use culvert_tests::daemon::scratch_dir;
use culvert_tests::stats::admin_get;
use culvert_tests::wait_until;
use serde_json::Value;

use super::harness::{DEADLINE, Mesh, culvert, header};

/// A service whose one pod has an address that requests can come from.
const FRONT: &str = "
apiVersion: v1
kind: Service
metadata: {name: front}
spec: {clusterIP: 10.96.0.2, selector: {app: front}, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: front-1, labels: {kubernetes.io/service-name: front}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [127.0.0.3]}]
";
const TRACE: &str = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";

/// A request from an address.
fn curl(from: &str, port: u16, path: &str, header: &str) -> Result<()> {
    let url = format!("http://127.0.0.1:{port}{path}");
    let status = Command::new("curl")
        .args(["-sS", "-m", "20", "-o", "/dev/null", "-w", "%{http_code}", "--interface", from, "-H", header, &url])
        .output()?;
    ensure!(status.stdout == b"200", "{status:?}");
    Ok(())
}

/// What the command says of `front`, taken from discovery.
fn doctor(mesh: &Mesh) -> Result<Value> {
    let said = culvert(&["override", "doctor", "--discovery", &mesh.discovery.url, "--output", "json"])?;
    let said: Value = serde_json::from_str(&said)?;
    let mut services = said["services"].as_array().context("no services")?.iter();
    services.find(|it| it["service"] == "front.default").cloned().with_context(|| format!("{said:#}"))
}

#[test]
fn discovery_tells_who_drops_contexts_over_all_nodes() -> Result<()> {
    let config = scratch_dir()?.join("discovery.yaml");
    std::fs::write(&config, "load_report_interval: 1\n")?;
    let mesh = Mesh::start_with(&["--config", &config.display().to_string()])?;
    mesh.discovery.write("front.yaml", FRONT)?;
    let (_other, port) = mesh.node("other", mesh.discovery.xds)?;
    wait_until(DEADLINE, "front to be in the mesh", || {
        let status = mesh.discovery.status()?;
        ensure!(status["services"].as_array().is_some_and(|it| it.len() == 2), "{status:#}");
        Ok(())
    })?;

    // It is called through one node's daemon, and calls others through its own.
    let (name, value) = &header(&["--set", "users=feature-x"])?[0];
    let overrides = format!("{name}: {value}");
    for _ in 0..20 {
        curl("127.0.0.9", mesh.port, "/front", &overrides)?;
    }
    curl("127.0.0.3", port, "/", TRACE)?;
    curl("127.0.0.3", port, "/", TRACE)?;
    let dropping = wait_until(DEADLINE, "both nodes' reports", || {
        let front = doctor(&mesh)?;
        ensure!(front["went"]["trace_only"] == 2 && front["came"]["overrides"] == 20, "{front:#}");
        Ok(front)
    })?;
    assert_eq!(dropping["verdict"], "DROPS them: it passes on trace headers, but not their baggage");
    let said = culvert(&["override", "doctor", "--discovery", &mesh.discovery.url])?;
    ensure!(said.lines().any(|line| line.starts_with("front.default") && line.contains("DROPS")), "{said}");
    let metrics = admin_get(mesh.discovery.url.trim_start_matches("http://"), "/metrics")?;
    ensure!(metrics.contains("\nculvert_discovery_context_dropped{service=\"front.default\"} 1\n"), "{metrics}");

    // It is mended. What was told once is not told again.
    for _ in 0..3 {
        curl("127.0.0.3", port, "/", &overrides)?;
    }
    let mended = wait_until(DEADLINE, "it to pass them on", || {
        let front = doctor(&mesh)?;
        ensure!(front["drops"] == false && front["went"]["overrides"] == 3, "{front:#}");
        Ok(front)
    })?;
    assert_eq!((&mended["came"]["overrides"], &mended["went"]["trace_only"]), (&20.into(), &2.into()), "{mended:#}");
    Ok(())
}

#[test]
fn where_nobody_reports_the_command_says_what_is_missing() -> Result<()> {
    let discovery = super::harness::Discovery::start(&[])?;
    let said = culvert(&["override", "doctor", "--discovery", &discovery.url])?;
    ensure!(said.starts_with("no daemon has reported to discovery") && said.contains("load_stats_config"), "{said}");
    Ok(())
}
