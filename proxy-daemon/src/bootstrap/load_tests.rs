//! Flags and files in, a bootstrap or one line out.

use std::path::PathBuf;

use clap::Parser;

use super::*;

const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";

/// A file that is gone with its value.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str, text: impl AsRef<[u8]>) -> TempFile {
        let path = std::env::temp_dir().join(format!("culvert-load-{}-{name}", std::process::id()));
        std::fs::write(&path, text).unwrap();
        TempFile(path)
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn with(arguments: &[&str]) -> Result<(Message, Bootstrap), LoadError> {
    load(&Flags::try_parse_from(["culvertd"].iter().chain(arguments)).unwrap())
}

fn error(arguments: &[&str]) -> String {
    with(arguments).unwrap_err().to_string()
}

#[test]
fn a_wrong_field_is_named_with_its_line() {
    let file =
        TempFile::new("field.yaml", "static_resources:\n  clusters:\n  - name: up\n    lrs_server: { self: {} }\n");
    let path = file.0.display().to_string();
    assert_eq!(
        error(&["-c", &path]),
        format!("{path}: static_resources.clusters[0].lrs_server: not supported by culvert yet (line 4, column 5)")
    );
}

#[test]
fn what_is_no_text_is_found_by_its_line() {
    let file = TempFile::new("bytes.yaml", b"node:\n  id: \xc3\xa9\xff\n");
    let path = file.0.display().to_string();
    assert_eq!(error(&["-c", &path]), format!("{path}: not UTF-8 (line 2, column 8)"));
}

#[test]
fn an_unknown_field_is_named_with_its_line() {
    let file = TempFile::new("unknown.yaml", "admin:\n  adress: {}\n");
    let path = file.0.display().to_string();
    let text = error(&["-c", &path]);
    assert!(text.starts_with(&format!("{path}: admin.adress: ")), "{text}");
    assert!(text.ends_with("(line 2, column 3)"), "{text}");
    assert!(!text.contains('\n'), "{text}");
}

#[test]
fn json_is_read_as_well() {
    let file =
        TempFile::new("ok.json", "{\n\t\"static_resources\": {\n\t\t\"clusters\": [{\"name\": \"up\"}]\n\t}\n}\n");
    let (_, bootstrap) = with(&["-c", &file.0.display().to_string()]).unwrap();
    assert_eq!(&*bootstrap.clusters[0].name, "up");
}

#[test]
fn text_of_the_command_line_is_merged_over_the_file() {
    let file =
        TempFile::new("base.yaml", "node: { id: a, cluster: c }\nstatic_resources: { clusters: [{ name: one }] }\n");
    let path = file.0.display().to_string();
    let overlay = "node: { id: b }\nstatic_resources: { clusters: [{ name: two }] }";
    let (message, bootstrap) = with(&["-c", &path, "--config-yaml", overlay]).unwrap();
    let names: Vec<_> = bootstrap.clusters.iter().map(|cluster| &*cluster.name).collect();
    assert_eq!(names, ["one", "two"]);
    let node = message.node.unwrap();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("b", "c"));

    let text = error(&["-c", &path, "--config-yaml", "static_resources: { clusters: [{ name: one }] }"]);
    assert_eq!(text, format!("{path} with --config-yaml: static_resources.clusters[1].name: duplicate name 'one'"));
}

#[test]
fn flags_say_who_the_node_is() {
    let arguments =
        ["--config-yaml", "node: { id: a }", "--service-node", "n", "--service-cluster", "c", "--service-zone", "z"];
    let node = with(&arguments).unwrap().1.sources.node;
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("n", "c"));
    assert_eq!(node.locality.unwrap().zone, "z");
    assert_eq!(node.user_agent_name, "culvert");
}

#[test]
fn a_control_plane_needs_a_node_id() {
    let ads = "
static_resources:
  clusters:
  - name: xds
    load_assignment:
      cluster_name: xds
      endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } }] }]
dynamic_resources:
  ads_config: { api_type: GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: xds } }] }
  cds_config: { resource_api_version: V3, ads: {} }
";
    let text = error(&["--config-yaml", ads]);
    let needed = "a control plane needs to know this node: set node.";
    assert_eq!(text, format!("--config-yaml: node.id: {needed}id or --service-node (line 2, column 1)"));
    let text = error(&["--config-yaml", ads, "--service-node", "n"]);
    assert_eq!(text, format!("--config-yaml: node.cluster: {needed}cluster or --service-cluster (line 2, column 1)"));
    let (_, bootstrap) = with(&["--config-yaml", ads, "--service-node", "n", "--service-cluster", "c"]).unwrap();
    let server = bootstrap.sources.ads.unwrap();
    assert_eq!(bootstrap.sources.servers["xds"].endpoints, ["127.0.0.1:1"]);
    assert_eq!(server.variant, culvert_xds_client::ads::Variant::Sotw);
    assert!(bootstrap.cds.is_some() && bootstrap.lds.is_none());
}

#[test]
fn every_source_needs_a_node_id() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let source = format!("{{ path_config_source: {{ path: {} }} }}", file.path().display());
    let tls = format!(
        "transport_socket: {{ name: t, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.\
         UpstreamTlsContext, common_tls_context: {{ validation_context_sds_secret_config: {{ name: s, sds_config: {source} }} }} }} }}"
    );
    for yaml in [
        format!("dynamic_resources: {{ cds_config: {source} }}"),
        format!("dynamic_resources: {{ lds_config: {source} }}"),
        format!(
            "static_resources: {{ clusters: [{{ name: c, type: EDS, eds_cluster_config: {{ eds_config: {source} }} }}] }}"
        ),
        format!("static_resources: {{ clusters: [{{ name: c, {tls} }}] }}"),
        format!("layered_runtime: {{ layers: [{{ name: l, rtds_layer: {{ name: r, rtds_config: {source} }} }}] }}"),
    ] {
        let text = error(&["--config-yaml", &yaml]);
        assert!(text.contains("node.id: a control plane needs to know this node"), "{text}");
        with(&["--config-yaml", &yaml, "--service-node", "n", "--service-cluster", "c"]).unwrap();
    }
}

#[test]
fn files_that_cannot_be_used_are_named() {
    assert!(error(&["-c", "/nowhere/x.yaml"]).starts_with("/nowhere/x.yaml: cannot be read: No such file"));
    assert!(error(&["-c", "/nowhere/x.pb"]).contains("use YAML or JSON"));
    assert!(error(&[]).contains("name a file with -c"));
    // Never ends by itself.
    assert!(error(&["-c", "/dev/zero"]).contains("is longer than"));
}

#[test]
fn hostile_yaml_ends_soon_and_in_one_line() {
    let bomb = format!(
        "a: &a [{}]\nb: &b [{}]\nc: &c [{}]\nd: &d [{}]\ne: [{}]\n",
        ["x"; 20].join(","),
        ["*a"; 20].join(","),
        ["*b"; 20].join(","),
        ["*c"; 20].join(","),
        ["*d"; 20].join(",")
    );
    for text in [bomb.as_str(), "a: &a [*a]", "admin: {", &"[".repeat(100_000), "- 1\n- 2"] {
        let begun = std::time::Instant::now();
        let line = error(&[&format!("--config-yaml={text}")]);
        assert!(!line.contains('\n'), "{line}");
        assert!(begun.elapsed().as_secs() < 5, "{line}");
    }
}

#[test]
fn static_routes_name_clusters_of_the_bootstrap() {
    let yaml = |config: &str| {
        format!(
            "static_resources: {{ listeners: [{{ name: l, address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 \
             }} }}, filter_chains: [{{ filters: [{{ name: h, typed_config: {{ \"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
             stat_prefix: s, http_filters: [{{ name: r, typed_config: {{ \"@type\": {ROUTER} }} }}], route_config: {{ \
             {config} virtual_hosts: [{{ name: v, domains: [\"*\"], routes: [{{ match: {{ prefix: / }}, route: {{ cluster: \
             nobody }} }}] }}] }} }} }}] }}] }}] }}"
        )
    };
    let text = error(&["--config-yaml", &yaml("")]);
    assert!(text.contains("route_config.virtual_hosts[0].routes[0].route: unknown cluster 'nobody'"), "{text}");
    assert!(with(&["--config-yaml", &yaml("validate_clusters: false,")]).is_ok());
}

#[test]
fn what_has_no_source_does_not_name_one() {
    assert_eq!(with(&[]).unwrap_err().to_string(), "no bootstrap: name a file with -c, or write it with --config-yaml");
}
