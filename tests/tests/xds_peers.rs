//! culvertd, and the real Envoy beside it, driven by control planes that are not ours: gRPC's own stack (grpcio with its own
//! generated messages), and sovereign (polled over REST).

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::peers::Peer;
use culvert_tests::wait_until;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(20);

fn app(pod: &str) -> Result<u16> {
    App { pod: pod.to_owned(), revision: "main".to_owned(), upstream: None }.start()
}

fn ads() -> Value {
    json!({ "resource_api_version": "V3", "ads": {} })
}

fn cluster(name: &str) -> Value {
    json!({
        "@type": "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        "name": name, "type": "EDS", "connect_timeout": "1s", "eds_cluster_config": { "eds_config": ads() },
    })
}

fn endpoints(name: &str, port: u16) -> Value {
    let address = json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } });
    json!({
        "@type": "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
        "cluster_name": name, "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
    })
}

fn listener(port: u16) -> Value {
    json!({
        "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
        "name": "in",
        "address": { "socket_address": { "address": "127.0.0.1", "port_value": port } },
        "filter_chains": [{ "filters": [{
            "name": "envoy.filters.network.http_connection_manager",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
                "stat_prefix": "in",
                "rds": { "route_config_name": "web", "config_source": ads() },
                "http_filters": [{
                    "name": "envoy.filters.http.router",
                    "typed_config": { "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" },
                }],
            },
        }] }],
    })
}

fn routes(cluster: &str) -> Value {
    json!({
        "@type": "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
        "name": "web",
        "virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster } }],
        }],
    })
}

/// Waits until the listener answers in the name of `pod`.
fn served_by(port: u16, pod: &str) -> Result<()> {
    wait_until(DEADLINE, &format!("an answer of {pod}"), || {
        let response = fetch(port, Request::get("/"))?;
        let answer: Value = serde_json::from_slice(&response.body).with_context(|| response.text())?;
        ensure!(answer["pod"] == pod, "{} {answer}", response.status);
        Ok(())
    })
}

/// One control plane's life: everything comes, endpoints move, routes move, a bad cluster is refused, the listener goes.
fn grpc_control_plane(kind: Kind, api_type: &str) -> Result<()> {
    let (one, two) = (app("one")?, app("two")?);
    let port = free_port()?;
    let all = |at: u16, route: &str| {
        json!([cluster("a"), endpoints("a", at), cluster("b"), endpoints("b", two), listener(port), routes(route)])
    };
    let mut peer = Peer::grpc(&all(one, "a"))?;
    let daemon = Daemon::start(kind, &ads_bootstrap(peer.port, api_type))?;
    served_by(port, "one")?;
    for what in
        ["cluster.v3.Cluster", "endpoint.v3.ClusterLoadAssignment", "listener.v3.Listener", "RouteConfiguration"]
    {
        peer.event(|event| event["ack"].as_str().is_some_and(|url| url.ends_with(what)))?;
    }
    peer.serve(&all(two, "a"))?;
    served_by(port, "two")?;
    peer.serve(&all(one, "a"))?;
    served_by(port, "one")?;
    peer.serve(&all(one, "b"))?;
    served_by(port, "two")?;

    let mut bad = all(one, "b");
    bad[0]["connect_timeout"] = json!("0s");
    peer.serve(&bad)?;
    let nack = peer.event(|event| event["nack"].as_str().is_some_and(|url| url.ends_with("cluster.v3.Cluster")))?;
    let error = nack["error"].as_str().unwrap_or_default();
    ensure!(error.to_lowercase().contains("connect") && error.contains("greater than 0"), "{nack}");
    served_by(port, "two")?;

    peer.serve(&json!([cluster("a"), endpoints("a", one), cluster("b"), endpoints("b", two)]))?;
    wait_until(DEADLINE, "the listener to close", || {
        ensure!(fetch(port, Request::get("/")).is_err(), "it still answers");
        Ok(())
    })?;
    drop(daemon);
    Ok(())
}

#[test]
fn culvertd_takes_the_state_of_the_world_from_grpcio() -> Result<()> {
    grpc_control_plane(Kind::Culvert, "GRPC")
}

#[test]
fn culvertd_takes_increments_from_grpcio() -> Result<()> {
    grpc_control_plane(Kind::Culvert, "DELTA_GRPC")
}

#[test]
fn envoy_takes_both_from_grpcio_as_the_tests_expect() -> Result<()> {
    grpc_control_plane(Kind::Envoy, "GRPC")?;
    grpc_control_plane(Kind::Envoy, "DELTA_GRPC")
}

/// sovereign renders templates over a context that it reads again every second.
const SOVEREIGN: &str = "
templates:
  default:
  - { type: clusters, spec: { protocol: file, serialization: jinja2, path: '@DIR@/clusters.yaml' } }
  - { type: endpoints, spec: { protocol: file, serialization: jinja2, path: '@DIR@/endpoints.yaml' } }
  - { type: routes, spec: { protocol: file, serialization: jinja2, path: '@DIR@/routes.yaml' } }
template_context:
  refresh: true
  refresh_rate: 1
  context:
    mesh: { protocol: file, serialization: yaml, path: '@DIR@/mesh.yaml' }
";

const REST: &str = "{ resource_api_version: V3, api_config_source: { api_type: REST, transport_api_version: V3, \
                    cluster_names: [sovereign], refresh_delay: 0.1s, request_timeout: 1s } }";

fn sovereign(mesh: &str) -> Result<Peer> {
    let clusters = format!(
        r#"
resources:
{{% for name, ports in mesh.services.items() %}}
- "@type": type.googleapis.com/envoy.config.cluster.v3.Cluster
  name: {{{{ name }}}}
  connect_timeout: 1s
  type: EDS
  eds_cluster_config: {{ eds_config: {REST} }}
{{% endfor %}}
"#
    );
    let endpoints = r#"
resources:
{% for name, ports in mesh.services.items() %}
- "@type": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment
  cluster_name: {{ name }}
  endpoints:
  - lb_endpoints:
    {% for port in ports %}
    - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: {{ port }} } } }
    {% endfor %}
{% endfor %}
"#;
    let routes = r#"
resources:
- "@type": type.googleapis.com/envoy.config.route.v3.RouteConfiguration
  name: web
  virtual_hosts:
  - { name: all, domains: ["*"], routes: [{ match: { prefix: / }, route: { cluster: "{{ mesh.route }}" } }] }
"#;
    Peer::sovereign(&[
        ("sovereign.yaml", SOVEREIGN),
        ("clusters.yaml", &clusters),
        ("endpoints.yaml", endpoints),
        ("routes.yaml", routes),
        ("mesh.yaml", mesh),
    ])
}

fn rest_control_plane(kind: Kind) -> Result<()> {
    let (one, two) = (app("one")?, app("two")?);
    let port = free_port()?;
    let mesh = |at: u16, route: &str| format!("route: {route}\nservices:\n  a: [{at}]\n  b: [{two}]\n");
    let peer = sovereign(&mesh(one, "a"))?;
    let yaml = format!(
        r#"
node: {{ id: node-1, cluster: peers }}
dynamic_resources:
  cds_config: {REST}
static_resources:
  clusters:
  - name: sovereign
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: sovereign
      endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: {} }} }} }} }}] }}]
  listeners:
  - name: in
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: {port} }} }}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: in
          rds: {{ route_config_name: web, config_source: {REST} }}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
"#,
        peer.port
    );
    let daemon = Daemon::start(kind, &yaml)?;
    served_by(port, "one")?;
    std::fs::write(peer.dir.join("mesh.yaml"), mesh(two, "a"))?;
    served_by(port, "two")?;
    std::fs::write(peer.dir.join("mesh.yaml"), mesh(one, "b"))?;
    wait_until(DEADLINE, "the endpoints of a to move back", || {
        let clusters = daemon.admin("/clusters")?;
        ensure!(clusters.contains(&format!("a::127.0.0.1:{one}::")), "{clusters}");
        Ok(())
    })?;
    served_by(port, "two")
}

#[test]
fn culvertd_polls_sovereign() -> Result<()> {
    rest_control_plane(Kind::Culvert)
}

#[test]
fn envoy_polls_sovereign_as_the_tests_expect() -> Result<()> {
    rest_control_plane(Kind::Envoy)
}
