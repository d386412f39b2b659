//! Clusters and virtual hosts that are asked for when a request needs them: culvertd and the real Envoy on the same
//! configuration and the same control plane, whose every message the test decides.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::app::App;
use culvert_tests::bootstrap::ads_bootstrap;
use culvert_tests::control_plane::ControlPlane;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress, address, socket_address,
};
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
};
use envoy_types::pb::envoy::config::route::v3::{
    DirectResponseAction, Route, RouteConfiguration, RouteMatch, ScopedRouteConfiguration, Vhds, VirtualHost,
    route::Action,
    route_match::PathSpecifier,
    scoped_route_configuration::{
        Key,
        key::{Fragment, fragment},
    },
};
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use envoy_types::pb::google::protobuf::Any;
use prost::{Message, Name};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(10);

/// A bootstrap with a listener that has the filter. `manager` are lines of its connection manager: where its routes come from.
fn bootstrap(control_plane: u16, port: u16, on_demand: &str, manager: &str) -> String {
    let listener = format!(
        r#"
  listeners:
  - name: front
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          access_log:
          - name: out
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog
              log_format: {{text_format_source: {{inline_string: "%REQ(x-id)% %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% %UPSTREAM_CLUSTER%\n"}}}}
          {manager}
          http_filters:
          - name: envoy.filters.http.on_demand
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.on_demand.v3.OnDemand{on_demand}}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#
    );
    ads_bootstrap(control_plane, "DELTA_GRPC").replace("static_resources:\n", &format!("static_resources:{listener}"))
}

/// What a control plane was asked, a line a request.
#[derive(Clone, Default)]
struct Asked(Arc<Mutex<Vec<String>>>);

impl Asked {
    fn note(&self, line: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Serves a control plane for as long as the test lasts: `answer` gets the type and the names of each subscription, and says
/// what is sent.
fn serve(
    server: ControlPlane,
    mut answer: impl FnMut(&str, &[String]) -> Option<DeltaDiscoveryResponse> + Send + 'static,
) -> Asked {
    let asked = Asked::default();
    let noted = asked.clone();
    thread::spawn(move || {
        while let Ok(stream) = server.stream(DEADLINE * 6) {
            let mut nonce = 0;
            while let Ok(request) = stream.next(DEADLINE) {
                let Some(request) = request else { continue };
                let short = request.type_url.rsplit('.').next().unwrap_or_default().to_owned();
                if !request.nonce.is_empty() {
                    if let Some(error) = request.error {
                        noted.note(format!("{short} refused: {error}"));
                    }
                    if request.names.is_empty() && request.unsubscribed.is_empty() {
                        continue;
                    }
                }
                let initial = if request.initial_versions.is_empty() { "" } else { " with versions" };
                noted.note(format!("{short} +{:?} -{:?}{initial}", request.names, request.unsubscribed));
                if let Some(mut response) = answer(&short, &request.names) {
                    nonce += 1;
                    (response.nonce, response.type_url) = (nonce.to_string(), request.type_url);
                    stream.push_delta(response);
                }
            }
        }
    });
    asked
}

fn resource<M: Message + Name>(name: &str, message: &M) -> Resource {
    let body = Any { type_url: M::type_url(), value: message.encode_to_vec() };
    Resource { name: name.to_owned(), version: "1".to_owned(), resource: Some(body), ..Default::default() }
}

fn cluster(name: &str, port: u16) -> Resource {
    let socket = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
        ..Default::default()
    };
    let address = Address { address: Some(address::Address::SocketAddress(socket)) };
    let endpoint = Endpoint { address: Some(address), ..Default::default() };
    let endpoint = LbEndpoint { host_identifier: Some(HostIdentifier::Endpoint(endpoint)), ..Default::default() };
    let group = LocalityLbEndpoints { lb_endpoints: vec![endpoint], ..Default::default() };
    let assignment =
        ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints: vec![group], ..Default::default() };
    resource(name, &Cluster { name: name.to_owned(), load_assignment: Some(assignment), ..Default::default() })
}

/// The status that a request gets.
fn get(port: u16, id: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<u16> {
    let mut request = Request::get("/").header("x-id", id);
    for (name, value) in headers {
        request = request.header(name, value);
    }
    if !body.is_empty() {
        (request.method, request.body) = ("POST".to_owned(), body.to_vec());
    }
    Ok(fetch(port, request)?.status)
}

/// The access log, when it has `lines`.
fn log(daemon: &Daemon, lines: usize) -> Result<Vec<String>> {
    wait_until(DEADLINE, "the access log", || {
        let text = daemon.stdout();
        let mut all: Vec<_> = text.lines().map(str::to_owned).collect();
        all.sort();
        ensure!(all.len() >= lines, "{all:#?}");
        Ok(all)
    })
}

fn app() -> Result<u16> {
    App { pod: "app".to_owned(), revision: "1".to_owned(), upstream: None }.start()
}

const BY_HEADER: &str = "route_config: {name: local, virtual_hosts: [{name: all, domains: ['*'], routes: [{match: \
                         {prefix: /}, route: {cluster_header: x-cluster}}]}]}";

/// What a proxy asks for and answers where clusters are had on demand.
fn clusters(kind: Kind) -> Result<Vec<String>> {
    let (app, port) = (app()?, free_port()?);
    let server = ControlPlane::start()?;
    let control_plane = server.address.port();
    let asked = serve(server, move |of, names| match of {
        "Cluster" if names.iter().any(|name| name == "never") => None,
        "Cluster" => Some(DeltaDiscoveryResponse {
            resources: names.iter().filter(|it| it.starts_with("late")).map(|name| cluster(name, app)).collect(),
            removed_resources: names.iter().filter(|it| it.starts_with("no")).cloned().collect(),
            ..Default::default()
        }),
        _ => Some(DeltaDiscoveryResponse::default()),
    });
    let on_demand = ", odcds: {source: {resource_api_version: V3, ads: {}}, timeout: 1s}";
    let daemon = Daemon::start(kind, &bootstrap(control_plane, port, on_demand, BY_HEADER))?;
    let mut seen = Vec::new();
    for (id, name, body) in [
        ("late", "late-1", &b""[..]),
        ("again", "late-1", b""),
        ("body", "late-2", b"some body"),
        ("none", "no-1", b""),
        ("never", "never", b""),
        ("unnamed", "", b""),
    ] {
        let headers = [("x-cluster", name)];
        seen.push(format!("{id}: {}", get(port, id, if name.is_empty() { &[] } else { &headers }, body)?));
    }
    seen.extend(log(&daemon, 6)?);
    seen.extend(asked.all());
    let stats = daemon.stats()?;
    let own = ["downstream_rq_total", "downstream_rq_5xx", "downstream_rq_active", "no_cluster", "rq_total"];
    let of_clusters = ["update_attempt", "update_failure", "update_rejected", "update_success", "init_fetch_timeout"];
    let names = own.map(|leaf| format!("http.ingress.{leaf}")).into_iter();
    for name in names.chain(of_clusters.map(|leaf| format!("cluster_manager.odcds.{leaf}"))) {
        seen.push(format!("{name}: {}", stats.get(&name)));
    }
    Ok(seen)
}

#[test]
fn clusters_on_demand_are_had_as_by_envoy() -> Result<()> {
    let mut ours = clusters(Kind::Culvert)?;
    // Envoy goes on asking for what does not exist.
    let left_out = r#"Cluster +[] -["no-1"]"#;
    ensure!(ours.iter().any(|line| line == left_out), "{ours:#?}");
    ours.retain(|line| line != left_out);
    assert_eq!(ours, clusters(Kind::Envoy)?);
    Ok(())
}

const VIA_RDS: &str = "rds: {route_config_name: web, config_source: {resource_api_version: V3, ads: {}}}";

/// A virtual host that answers for `domain`, as what was asked for under `alias`.
fn virtual_host(name: &str, domain: &str, status: u32, aliases: &[String]) -> Resource {
    let host = own_host(name, domain, status);
    Resource { aliases: aliases.to_vec(), ..resource(&format!("web/{name}"), &host) }
}

/// What a proxy asks for and answers where virtual hosts are had on demand.
fn virtual_hosts(kind: Kind) -> Result<Vec<String>> {
    let port = free_port()?;
    let server = ControlPlane::start()?;
    let control_plane = server.address.port();
    let mut first = true;
    let asked = serve(server, move |of, names| match of {
        "RouteConfiguration" => {
            let ads = ConfigSource {
                resource_api_version: ApiVersion::V3.into(),
                config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
                ..Default::default()
            };
            let routes = RouteConfiguration {
                name: "web".to_owned(),
                virtual_hosts: vec![own_host("own", "own.test", 201)],
                vhds: Some(Vhds { config_source: Some(ads) }),
                ..Default::default()
            };
            Some(DeltaDiscoveryResponse { resources: vec![resource("web", &routes)], ..Default::default() })
        }
        "VirtualHost" if std::mem::take(&mut first) => {
            let resources = vec![virtual_host("pushed", "pushed.test", 202, &[])];
            Some(DeltaDiscoveryResponse { resources, ..Default::default() })
        }
        "VirtualHost" if names.is_empty() || names.iter().any(|name| name.contains("never")) => None,
        "VirtualHost" => {
            let answer = |alias: &String| {
                let domain = alias.strip_prefix("web/").unwrap_or_default();
                let aliases = std::slice::from_ref(alias);
                match domain {
                    "late.test" | "upper.test" | "body.test" | "port.test:81" => {
                        virtual_host(&format!("vh-{}", domain.replace(':', "-")), domain, 203, aliases)
                    }
                    // There is none.
                    _ => Resource {
                        name: alias.clone(),
                        version: "1".to_owned(),
                        aliases: aliases.to_vec(),
                        ..Default::default()
                    },
                }
            };
            Some(DeltaDiscoveryResponse { resources: names.iter().map(answer).collect(), ..Default::default() })
        }
        _ => Some(DeltaDiscoveryResponse::default()),
    });
    let daemon = Daemon::start(
        kind,
        &bootstrap(control_plane, port, "", &format!("{VIA_RDS}\n          stream_idle_timeout: 2s")),
    )?;
    let mut seen = Vec::new();
    for (id, host, body) in [
        ("own", "own.test", &b""[..]),
        ("pushed", "pushed.test", b""),
        ("late", "late.test", b""),
        ("again", "late.test", b""),
        ("upper", "UPPER.test", b""),
        ("port", "port.test:81", b""),
        ("body", "body.test", b"some body"),
        ("none", "none.test", b""),
        ("never", "never.test", b""),
    ] {
        seen.push(format!("{id}: {}", get(port, id, &[("host", host)], body)?));
    }
    seen.extend(log(&daemon, 9)?);
    seen.extend(asked.all());
    let stats = daemon.stats()?;
    let dump: Value = serde_json::from_str(&daemon.admin("/config_dump")?)?;
    let sections = dump["configs"].as_array().into_iter().flatten();
    for routes in sections.filter_map(|section| section["dynamic_route_configs"].as_array()).flatten() {
        let hosts = routes["route_config"]["virtual_hosts"].as_array().into_iter().flatten();
        // The version is left out: Envoy's is that of the response (`system_version_info`), ours the resource's.
        seen.push(format!("shown: {:?}", hosts.map(|host| &host["name"]).collect::<Vec<_>>()));
    }
    for leaf in ["update_attempt", "update_success", "update_rejected", "config_reload"] {
        seen.push(format!("vhds.{leaf}: {}", stats.get(&format!("http.ingress.rds.vhds.web.{leaf}"))));
    }
    for leaf in ["downstream_rq_total", "downstream_rq_4xx", "downstream_rq_idle_timeout", "no_route"] {
        seen.push(format!("{leaf}: {}", stats.get(&format!("http.ingress.{leaf}"))));
    }
    Ok(seen)
}

fn own_host(name: &str, domain: &str, status: u32) -> VirtualHost {
    let action = DirectResponseAction { status, ..Default::default() };
    let rule = RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..Default::default() };
    let route = Route { r#match: Some(rule), action: Some(Action::DirectResponse(action)), ..Default::default() };
    VirtualHost { name: name.to_owned(), domains: vec![domain.to_owned()], routes: vec![route], ..Default::default() }
}

#[test]
fn virtual_hosts_on_demand_are_had_as_by_envoy() -> Result<()> {
    let mut ours = virtual_hosts(Kind::Culvert)?;
    // Envoy goes on asking for what does not exist.
    let left_out = r#"VirtualHost +[] -["web/none.test"]"#;
    ensure!(ours.iter().any(|line| line == left_out), "{ours:#?}");
    ours.retain(|line| line != left_out);
    assert_eq!(ours, virtual_hosts(Kind::Envoy)?);
    Ok(())
}

const VIA_SRDS: &str = "scoped_routes: {name: scopes, scope_key_builder: {fragments: [{header_value_extractor: {name: \
                        x-scope, index: 0}}]}, rds_config_source: {resource_api_version: V3, ads: {}, \
                        initial_fetch_timeout: 1s}, scoped_rds: {scoped_rds_config_source: {resource_api_version: V3, \
                        ads: {}}}}";

/// A scope whose key is its name, and whose routes are had on demand under that name, unless it begins with `eager`.
fn scope(name: &str) -> Resource {
    let fragment = Fragment { r#type: Some(fragment::Type::StringKey(name.to_owned())) };
    let scope = ScopedRouteConfiguration {
        name: name.to_owned(),
        route_configuration_name: name.split_once('.').map_or(name, |(routes, _)| routes).to_owned(),
        key: Some(Key { fragments: vec![fragment] }),
        on_demand: !name.starts_with("eager"),
        ..Default::default()
    };
    resource(name, &scope)
}

/// What a proxy asks for and answers where the routes of scopes are had on demand.
fn scopes(kind: Kind) -> Result<Vec<String>> {
    let port = free_port()?;
    let server = ControlPlane::start()?;
    let control_plane = server.address.port();
    let asked = serve(server, move |of, names| match of {
        "ScopedRouteConfiguration" => {
            let all = ["eager", "late", "late.too", "body", "other-host", "none", "bad", "never", "lazy"];
            Some(DeltaDiscoveryResponse { resources: all.map(scope).to_vec(), ..Default::default() })
        }
        "RouteConfiguration" if names.iter().all(|name| name == "never") => None,
        "RouteConfiguration" => {
            let (none, some): (Vec<_>, Vec<_>) = names.iter().partition(|name| **name == "none");
            let answer = |name: &&String| {
                let domain = if **name == "other-host" { "other.test" } else { "*" };
                let mut host = own_host("all", domain, 201);
                if **name == "bad" {
                    host.domains.push("*".to_owned());
                }
                let hosts = vec![host];
                let routes =
                    RouteConfiguration { name: String::clone(name), virtual_hosts: hosts, ..Default::default() };
                resource(name, &routes)
            };
            Some(DeltaDiscoveryResponse {
                resources: some.iter().map(answer).collect(),
                removed_resources: none.into_iter().cloned().collect(),
                ..Default::default()
            })
        }
        _ => Some(DeltaDiscoveryResponse::default()),
    });
    let manager = format!("{VIA_SRDS}\n          stream_idle_timeout: 2s");
    let daemon = Daemon::start(kind, &bootstrap(control_plane, port, "", &manager))?;
    let mut seen = Vec::new();
    let ids = [
        ("eager", "eager", &b""[..]),
        ("late", "late", b""),
        ("again", "late", b""),
        ("shared", "late.too", b""),
        ("body", "body", b"some body"),
        ("other-host", "other-host", b""),
        ("unknown", "unknown", b""),
        ("none", "none", b""),
        ("none-again", "none", b""),
        ("bad", "bad", b""),
        ("never", "never", b""),
        ("never-again", "never", b""),
    ];
    for (id, scope, body) in ids {
        seen.push(format!("{id}: {}", get(port, id, &[("x-scope", scope)], body)?));
    }
    seen.extend(log(&daemon, ids.len())?);
    // In which order what comes before the first request is asked for is not the point.
    let asked = asked.all().into_iter().filter(|line| !line.ends_with(" +[] -[]"));
    // Nor is in which words.
    seen.extend(asked.map(|line| line.split_inclusive(" refused").next().unwrap_or_default().to_owned()));
    let stats = daemon.stats()?;
    for leaf in ["all_scopes", "active_scopes", "on_demand_scopes", "config_reload", "update_success"] {
        seen.push(format!("scopes.{leaf}: {}", stats.get(&format!("http.ingress.scoped_rds.scopes.{leaf}"))));
    }
    for leaf in ["downstream_rq_total", "downstream_rq_4xx", "downstream_rq_idle_timeout", "no_route"] {
        seen.push(format!("{leaf}: {}", stats.get(&format!("http.ingress.{leaf}"))));
    }
    Ok(seen)
}

#[test]
fn routes_of_scopes_are_had_on_demand_as_by_envoy() -> Result<()> {
    let e = scopes(Kind::Envoy)?;
    for l in &e {
        println!("{l}");
    }
    assert_eq!(scopes(Kind::Culvert)?, e);
    Ok(())
}
