//! Runtime values, of culvertd and of the real Envoy on the same bootstrap: what `/runtime` shows, what `/runtime_modify` and
//! a swapped directory change, and what the keys do to requests.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::app::{App, Client};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::peers::Peer;
use culvert_tests::wait_until;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(10);
/// Envoy writes its logs out every ten seconds.
const FLUSHED: Duration = Duration::from_secs(30);
const ROUTES: &str = r#"
- name: all
  domains: ["*"]
  routes:
  - match: {prefix: /share, runtime_fraction: {default_value: {numerator: 0}, runtime_key: share}}
    direct_response: {status: 201}
  - match: {prefix: /disk, runtime_fraction: {default_value: {numerator: 0}, runtime_key: deep.share}}
    direct_response: {status: 201}
  - match: {prefix: /app}
    route: {cluster: app}
  - match: {prefix: /weighted}
    route: {weighted_clusters: {runtime_key_prefix: weight, clusters: [{name: app, weight: 50}, {name: none, weight: 50}]}}
  - match: {prefix: /}
    direct_response: {status: 404}
"#;

/// A proxy under test.
struct Proxy {
    kind: Kind,
    daemon: Daemon,
    port: u16,
}

impl Proxy {
    fn start(kind: Kind, app: u16, root: &Path) -> Result<Proxy> {
        let port = free_port()?;
        let log = format!(
            "access_log: [{{name: a, filter: {{runtime_filter: {{runtime_key: sampled, percent_sampled: {{numerator: 10}}}}}}, \
             typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: \
             {}/{kind:?}.log, log_format: {{text_format_source: {{inline_string: \"%REQ(X-REQUEST-ID)%\\n\"}}}}}}}}]",
            root.display()
        );
        let resources =
            Bootstrap::new().http(port, ROUTES, &[&log]).cluster("app", &[app], &[]).cluster("none", &[], &[]).yaml();
        let yaml = format!(
            "layered_runtime:
  layers:
  - {{name: base, static_layer: {{share: 100, text: hello, nest: {{a: 2.5, b: {{c: true}}}}, big: 1234567}}}}
  - {{name: disk, disk_layer: {{symlink_root: {}/current, subdirectory: app}}}}
  - {{name: absent, disk_layer: {{symlink_root: {}/current, subdirectory: other}}}}
  - {{name: admin, admin_layer: {{}}}}
{resources}",
            root.display(),
            root.display()
        );
        Ok(Proxy { kind, daemon: Daemon::start(kind, &yaml)?, port })
    }

    fn status(&self, path: &str) -> Result<u16> {
        Ok(fetch(self.port, Request::get(path))?.status)
    }

    fn post(&self, path: &str) -> Result<Response> {
        let mut client = Client::new(&format!("http://{}", self.daemon.admin_address()))?;
        client.send(Request { method: "POST".to_owned(), ..Request::get(path).header("connection", "close") })
    }

    fn modify(&self, values: &str) -> Result<()> {
        let answer = self.post(&format!("/runtime_modify?{values}"))?;
        ensure!(answer.status == 200, "{values}: {}", answer.text());
        Ok(())
    }

    /// What the test looks at, one line each.
    fn look(&self, root: &Path) -> Result<Vec<String>> {
        let mut seen = Vec::new();
        let runtime = |seen: &mut Vec<String>| -> Result<()> {
            let shown: Value = serde_json::from_str(&self.daemon.admin("/runtime")?)?;
            seen.push(shown.to_string());
            let stats = self.daemon.admin("/stats?filter=^runtime\\.")?;
            seen.extend(stats.lines().map(str::to_owned));
            Ok(())
        };
        runtime(&mut seen)?;
        let mut see = |what: &str, value: String| seen.push(format!("{what}: {value}"));
        see("share 100", self.status("/share")?.to_string());
        see("disk", self.status("/disk")?.to_string());
        for (values, path) in [
            ("share=0", "/share"),
            ("share=%7Bnumerator:%20100%7D", "/share"),
            ("share=text", "/share"),
            ("share=", "/share"),
            ("weight.none=0", "/weighted"),
            ("weight.app=0", "/weighted"),
            ("weight.none=&weight.app=", "/share"),
            ("upstream.maintenance_mode.app=100", "/app"),
            ("upstream.maintenance_mode.app=", "/app"),
            ("circuit_breakers.app.default.max_requests=0", "/app"),
            ("circuit_breakers.app.default.max_requests=", "/app"),
        ] {
            self.modify(values)?;
            let answer = fetch(self.port, Request::get(path))?;
            let body = if answer.status == 200 { String::new() } else { answer.text() };
            let overloaded = answer.headers.get("x-envoy-overloaded").unwrap_or_default().to_owned();
            see(values, format!("{} {overloaded} {body}", answer.status));
        }
        for path in ["/runtime_modify", "/runtime_modify?a=x:%20%5B"] {
            let answer = self.post(path)?;
            // The texts of YAML errors are the parser's own.
            see(
                path,
                format!("{} {}", answer.status, if answer.status == 503 { String::new() } else { answer.text() }),
            );
        }
        for id in 0..40 {
            let id = format!("{id:08x}-1111-4111-8111-111111111111");
            ensure!(fetch(self.port, Request::get("/").header("x-request-id", &id))?.status == 404);
        }
        // Requests before these have ids of their own.
        let log = root.join(format!("{:?}.log", self.kind));
        let sampled = wait_until(FLUSHED, "ten lines in the access log", || {
            let lines = fs::read_to_string(&log)?;
            let lines: Vec<_> = lines.lines().filter(|line| line.ends_with("-1111-4111-8111-111111111111")).collect();
            ensure!(lines.len() >= 10, "{lines:?}");
            Ok(lines.join(" "))
        })?;
        see("sampled", sampled);
        self.modify("left=1")?;
        runtime(&mut seen)?;
        Ok(seen)
    }
}

#[test]
fn envoy_and_culvertd_show_and_obey_the_same_values() -> Result<()> {
    let app = App { pod: "app".to_owned(), revision: "main".to_owned(), upstream: None }.start()?;
    let root = scratch_dir()?;
    for (version, share) in [("v1", "100\n"), ("v2", "# nobody\n0")] {
        fs::create_dir_all(root.join(version).join("app/deep"))?;
        fs::write(root.join(version).join("app/deep/share"), share)?;
        fs::write(root.join(version).join("app/version"), version)?;
    }
    symlink("v1", root.join("current"))?;
    let envoy = Proxy::start(Kind::Envoy, app, &root)?;
    let culvert = Proxy::start(Kind::Culvert, app, &root)?;
    let (of_envoy, of_culvert) = (envoy.look(&root)?, culvert.look(&root)?);
    let differences: Vec<_> = of_envoy.iter().zip(&of_culvert).filter(|(envoy, culvert)| envoy != culvert).collect();
    assert!(differences.is_empty() && of_envoy.len() == of_culvert.len(), "Envoy, culvertd: {differences:#?}");
    assert!(of_culvert.contains(&"disk: 201".to_owned()), "{of_culvert:#?}");

    symlink("v2", root.join("next"))?;
    fs::rename(root.join("next"), root.join("current"))?;
    for proxy in [&envoy, &culvert] {
        wait_until(DEADLINE, "the other directory's value", || {
            let status = proxy.status("/disk")?;
            ensure!(status == 404, "status {status}");
            Ok(())
        })?;
        let shown: Value = serde_json::from_str(&proxy.daemon.admin("/runtime")?)?;
        assert_eq!(shown["entries"]["version"]["final_value"], "v2");
    }
    fs::remove_dir_all(&root).context("removing the scratch directory")
}

/// The layer `mesh`, and a cluster, so that there is something else to ask for.
fn resources(values: &Value) -> Value {
    json!([
        { "@type": "type.googleapis.com/envoy.service.runtime.v3.Runtime", "name": "mesh", "layer": values },
        { "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster", "name": "later", "type": "STATIC" },
    ])
}

/// One control plane's layer: it comes before all else, changes, is refused, and goes.
fn layer_of_a_control_plane(kind: Kind, api_type: &str) -> Result<()> {
    let mut peer = Peer::grpc(&resources(&json!({ "share": 100, "nest": { "x": "y" } })))?;
    let port = free_port()?;
    let http2 = r#"typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {"@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: {http2_protocol_options: {}}}}"#;
    let resources_of_file = Bootstrap::new()
        .http(port, ROUTES, &[])
        .cluster("app", &[], &[])
        .cluster("none", &[], &[])
        .cluster("xds", &[peer.port], &[http2])
        .yaml();
    let yaml = format!(
        "node: {{id: node-1, cluster: peers}}
layered_runtime:
  layers:
  - {{name: base, static_layer: {{share: 0}}}}
  - {{name: mesh, rtds_layer: {{name: mesh, rtds_config: {{resource_api_version: V3, ads: {{}}}}}}}}
dynamic_resources:
  ads_config: {{api_type: {api_type}, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: xds}}}}]}}
  cds_config: {{resource_api_version: V3, ads: {{}}}}
{resources_of_file}"
    );
    let daemon = Daemon::start(kind, &yaml)?;
    ensure!(fetch(port, Request::get("/share"))?.status == 201, "the layer is there before the listener serves");
    let shown: Value = serde_json::from_str(&daemon.admin("/runtime")?)?;
    assert_eq!(shown["layers"], json!(["base", "mesh"]));
    assert_eq!(shown["entries"]["nest.x"], json!({ "final_value": "y", "layer_values": ["", "y"] }));
    peer.event(|event| event["ack"].as_str().is_some_and(|url| url.ends_with("cluster.v3.Cluster")))?;
    let events = peer.events();
    let position = |key: &str, kind: &str| {
        events.iter().position(|event| event[key].as_str().is_some_and(|url| url.ends_with(kind)))
    };
    // Envoy's answer to RTDS comes after its request for clusters, ours before it.
    let order = [position("subscribe", "Runtime"), position("subscribe", "cluster.v3.Cluster")];
    ensure!(order[0].is_some() && order[0] < order[1], "RTDS before CDS: {events:?}");

    let becomes = |status: u16| {
        wait_until(DEADLINE, &format!("status {status}"), || {
            let now = fetch(port, Request::get("/share"))?.status;
            ensure!(now == status, "status {now}");
            Ok(())
        })
    };
    peer.serve(&resources(&json!({ "share": 0 })))?;
    becomes(404)?;
    peer.serve(&resources(&json!({ "share": 100 })))?;
    becomes(201)?;
    peer.serve(&resources(&json!({ "share": [1] })))?;
    let nack = peer.event(|event| event["nack"].as_str().is_some_and(|url| url.ends_with("Runtime")))?;
    let error = nack["error"].as_str().unwrap_or_default();
    ensure!(error.contains("Invalid runtime entry value for share"), "{nack}");
    becomes(201)?;
    if api_type == "DELTA_GRPC" {
        peer.serve(&json!([resources(&json!({}))[1]]))?;
        becomes(404)?;
    }
    assert_eq!(daemon.stats()?.get("runtime.update_rejected"), 1);
    Ok(())
}

#[test]
fn culvertd_takes_layers_from_a_control_plane() -> Result<()> {
    layer_of_a_control_plane(Kind::Culvert, "GRPC")?;
    layer_of_a_control_plane(Kind::Culvert, "DELTA_GRPC")
}

#[test]
fn envoy_takes_layers_as_the_tests_expect() -> Result<()> {
    layer_of_a_control_plane(Kind::Envoy, "GRPC")?;
    layer_of_a_control_plane(Kind::Envoy, "DELTA_GRPC")
}
