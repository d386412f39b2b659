//! culvertd and the real Envoy on the same bootstrap and the same control plane: both end with the same `/config_dump`,
//! `/clusters` and `/listeners`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::control_plane::{ControlPlane, Push, Resource};
use culvert_tests::daemon::{Daemon, Kind};
use culvert_tests::wait_until;
use envoy_types::pb::envoy::config::{
    cluster::v3::{
        Cluster,
        cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig},
    },
    core::v3::{
        Address, AggregatedConfigSource, ApiVersion, ConfigSource, SocketAddress, address,
        config_source::ConfigSourceSpecifier, socket_address::PortSpecifier,
    },
    endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
    listener::v3::{Filter, FilterChain, Listener, filter::ConfigType},
    route::v3::{
        Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route, route_action::ClusterSpecifier,
        route_match::PathSpecifier,
    },
};
use envoy_types::pb::envoy::extensions::filters::{
    http::router::v3::Router,
    network::{
        http_connection_manager::v3::{
            HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier,
            http_filter::ConfigType as FilterConfig,
        },
        tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier as TcpCluster},
    },
};
use envoy_types::pb::google::protobuf::{Any, Duration as ProtoDuration};
use prost::{Message, Name};
use serde_json::Value;

/// How long both may take to agree.
const PATIENCE: Duration = Duration::from_secs(20);

/// Where the two may differ, by the end of the path, and why. One that is never met must leave the table.
const STATIC_DIFFERENCES: [(&str, &str); 9] = [
    ("node.user_agent_name", "each says who it is"),
    ("node.user_agent_version", "Envoy has user_agent_build_version"),
    ("node.user_agent_build_version", "culvertd has user_agent_version"),
    ("node.extensions", "culvertd lists what it has in docs/support.md"),
    ("rq_pending_active", "culvertd counts what waits for a connection by cluster, not by host"),
    ("host_statuses[8080].hostname", "Envoy gives a host that was looked up the name that was looked up"),
    ("lb_endpoints[8080].endpoint.hostname", "as above"),
    ("lb_endpoints[8080].metadata", "Envoy gives a host that was looked up empty metadata"),
    ("[od].host_statuses", "culvertd prints the empty list"),
];

/// The same for what a control plane delivers. Not all are met each time: it depends on what drains at the moment.
const DYNAMIC_DIFFERENCES: [(&str, &str); 11] = [
    ("node.user_agent_name", "each says who it is"),
    ("node.user_agent_version", "Envoy has user_agent_build_version"),
    ("node.user_agent_build_version", "culvertd has user_agent_version"),
    ("node.extensions", "culvertd lists what it has in docs/support.md"),
    ("rq_pending_active", "culvertd counts what waits for a connection by cluster, not by host"),
    ("[bad].error_state.version_info", "Envoy leaves out which version it refused"),
    ("dynamic_listeners[]", "Envoy lists a refused listener a second time, without its name"),
    ("dynamic_listeners[tcp]", "Envoy lists a removed listener for as long as its connections may drain"),
    ("dynamic_route_configs[one]", "Envoy keeps what a draining listener reads"),
    ("[web].active_state.version_info", "Envoy keeps the version of before where only filter chains changed"),
    ("ListenersConfigDump.version_info", "culvertd says it only where all resources have it"),
];

const STATIC: &str = r#"
node: {id: n1, cluster: c1, metadata: {a: 1, b: [x, {c: null}]}, locality: {zone: z}}
static_resources:
  listeners:
  - name: web
    address: {socket_address: {address: 127.0.0.1, port_value: 0}}
    per_connection_buffer_limit_bytes: 1024
    filter_chains:
    - filter_chain_match: {source_prefix_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}
      filters:
      - name: tcp
        typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t,
          cluster: fixed}
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: web
          route_config:
            name: local
            request_headers_to_add: [{header: {key: x-a, value: b}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - {match: {prefix: /}, route: {weighted_clusters: {clusters: [{name: app, weight: 30}, {name: fixed, weight: 70}]}}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
  clusters:
  - name: app
    type: STRICT_DNS
    dns_lookup_family: V4_ONLY
    load_assignment:
      cluster_name: app
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 8080}}}}]}]
  - name: fixed
    alt_stat_name: other
    connect_timeout: 0.25s
    circuit_breakers: {thresholds: [{max_connections: 7}, {priority: HIGH, max_retries: 9}]}
    load_assignment:
      cluster_name: fixed
      endpoints:
      - locality: {region: r, zone: z}
        lb_endpoints:
        - {endpoint: {hostname: h, address: {socket_address: {address: 127.0.0.1, port_value: 8081}}}, load_balancing_weight: 3}
        - {endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 8082}}}, health_status: DRAINING}
      - locality: {region: s}
        priority: 1
        lb_endpoints: [{endpoint: {address: {socket_address: {address: "::1", port_value: 8083}}}, health_status: DEGRADED}]
  - {name: od, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}
"#;

const DYNAMIC: &str = r#"
node: {id: n1, cluster: c1}
dynamic_resources:
  ads_config: {api_type: GRPC, transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: xds}}]}
  cds_config: {ads: {}, resource_api_version: V3}
  lds_config: {ads: {}, resource_api_version: V3}
static_resources:
  clusters:
  - name: xds
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {http2_protocol_options: {}}
    load_assignment: {cluster_name: xds, endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address:
      {address: 127.0.0.1, port_value: @PORT@}}}}]}]}
"#;

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn resource<M: Message + Name>(name: &str, message: &M) -> Resource {
    Resource { name: name.to_owned(), version: String::new(), body: any(message) }
}

fn ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default())),
        ..Default::default()
    }
}

fn socket(port: u32) -> Option<Address> {
    let socket = SocketAddress {
        address: "127.0.0.1".to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..Default::default()
    };
    Some(Address { address: Some(address::Address::SocketAddress(socket)) })
}

fn eds_cluster(name: &str, service: &str, timeout: i64) -> Resource {
    let cluster = Cluster {
        name: name.to_owned(),
        connect_timeout: Some(ProtoDuration { seconds: timeout, nanos: 0 }),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads()), service_name: service.to_owned() }),
        ..Default::default()
    };
    resource(name, &cluster)
}

fn assignment(name: &str, ports: &[u32]) -> Resource {
    let endpoint = |port: &u32| LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: socket(*port), ..Default::default() })),
        ..Default::default()
    };
    let group = LocalityLbEndpoints { lb_endpoints: ports.iter().map(endpoint).collect(), ..Default::default() };
    let message = ClusterLoadAssignment { cluster_name: name.to_owned(), endpoints: vec![group], ..Default::default() };
    resource(name, &message)
}

fn routes(name: &str, cluster: &str) -> RouteConfiguration {
    let action =
        RouteAction { cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())), ..Default::default() };
    let route = Route {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..Default::default() }),
        action: Some(route::Action::Route(action)),
        ..Default::default()
    };
    let host = VirtualHost {
        name: "all".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route],
        ..Default::default()
    };
    RouteConfiguration { name: name.to_owned(), virtual_hosts: vec![host], ..Default::default() }
}

fn listener(name: &str, filter: Option<Any>) -> Resource {
    let filters =
        filter.map(|config| Filter { name: "f".to_owned(), config_type: Some(ConfigType::TypedConfig(config)) });
    let chain = FilterChain { filters: filters.into_iter().collect(), ..Default::default() };
    // One without filters is refused by both.
    let filter_chains = if chain.filters.is_empty() { Vec::new() } else { vec![chain] };
    let message = Listener { name: name.to_owned(), address: socket(0), filter_chains, ..Default::default() };
    resource(name, &message)
}

fn http(specifier: RouteSpecifier) -> Option<Any> {
    let router = HttpFilter {
        name: "envoy.filters.http.router".to_owned(),
        config_type: Some(FilterConfig::TypedConfig(any(&Router::default()))),
        ..Default::default()
    };
    Some(any(&HttpConnectionManager {
        stat_prefix: "web".to_owned(),
        http_filters: vec![router],
        route_specifier: Some(specifier),
        ..Default::default()
    }))
}

fn rds(name: &str) -> Option<Any> {
    http(RouteSpecifier::Rds(Rds { route_config_name: name.to_owned(), config_source: Some(ads()) }))
}

fn tcp(cluster: &str) -> Option<Any> {
    Some(any(&TcpProxy {
        stat_prefix: "t".to_owned(),
        cluster_specifier: Some(TcpCluster::Cluster(cluster.to_owned())),
        ..Default::default()
    }))
}

/// What the control plane has: by type, a version and the resources.
type World = BTreeMap<String, (String, Vec<Resource>)>;

fn world<const N: usize>(version: &str, types: [(String, Vec<Resource>); N]) -> World {
    types.into_iter().map(|(type_url, resources)| (type_url, (version.to_owned(), resources))).collect()
}

/// A proxy with a control plane of its own.
struct Driven {
    daemon: Daemon,
    port: u16,
    worlds: Sender<World>,
}

impl Driven {
    fn start(kind: Kind, first: World) -> Result<Driven> {
        let control = ControlPlane::start()?;
        let port = control.address.port();
        let (worlds, next) = channel::<World>();
        std::thread::spawn(move || {
            let mut world = first;
            let mut asked: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            let mut nonce = 0;
            let Ok(stream) = control.stream(PATIENCE) else { return };
            let mut push = |world: &World, type_url: &String, names: &BTreeSet<String>| {
                let Some((version, resources)) = world.get(type_url) else { return };
                let wanted = |it: &&Resource| names.is_empty() || names.contains(&it.name);
                let resources: Vec<_> = resources.iter().filter(wanted).cloned().collect();
                // A server that does not have what is asked for by name waits.
                if !resources.is_empty() || names.is_empty() {
                    nonce += 1;
                    let (type_url, version, nonce) = (type_url.clone(), version.clone(), nonce.to_string());
                    stream.push(Push { type_url, version, nonce, resources, removed: Vec::new() });
                }
            };
            // Ends with the client.
            while let Ok(request) = stream.next(Duration::from_millis(20)) {
                if let Ok(next) = next.try_recv() {
                    let changed: Vec<_> = next.keys().cloned().collect();
                    world.extend(next);
                    for type_url in changed {
                        if let Some(names) = asked.get(&type_url) {
                            push(&world, &type_url, names);
                        }
                    }
                }
                let Some(request) = request else { continue };
                let names: BTreeSet<_> = request.names.into_iter().collect();
                if asked.get(&request.type_url) != Some(&names) {
                    push(&world, &request.type_url, &names);
                    asked.insert(request.type_url, names);
                }
            }
        });
        let daemon = Daemon::start(kind, &DYNAMIC.replace("@PORT@", &port.to_string()))?;
        Ok(Driven { daemon, port, worlds })
    }
}

/// The admin pages, each as JSON without what must differ: times, reasons, and ports of their own.
fn pages(daemon: &Daemon, xds: u16) -> Result<Value> {
    let page = |path: &str| -> Result<Value> { Ok(serde_json::from_str(&daemon.admin(path)?)?) };
    let mut dump = page("/config_dump?include_eds")?;
    let sections = dump["configs"].as_array_mut().map(std::mem::take).unwrap_or_default();
    let mut by_name = serde_json::Map::new();
    for section in sections {
        let name = section["@type"].as_str().unwrap_or_default().rsplit('.').next().unwrap_or_default().to_owned();
        by_name.insert(name, section);
    }
    let mut all = serde_json::json!({
        "config_dump": by_name,
        "clusters": page("/clusters?format=json")?,
        "listeners": page("/listeners?format=json")?,
    });
    all["config_dump"]["BootstrapConfigDump"]["bootstrap"]["admin"].take();
    let listeners = all["listeners"]["listener_statuses"].as_array_mut();
    for listener in listeners.into_iter().flatten() {
        // Given by the kernel.
        listener["local_address"]["socket_address"]["port_value"].take();
    }
    normalise(&mut all, xds);
    Ok(all)
}

fn normalise(value: &mut Value, xds: u16) {
    match value {
        Value::Object(fields) => {
            for name in ["last_updated", "last_update_attempt", "details", "value"] {
                fields.remove(name);
            }
            fields.values_mut().for_each(|value| normalise(value, xds));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| normalise(value, xds)),
        Value::Number(number) if number.as_u64() == Some(xds.into()) => *value = "the control plane's port".into(),
        _ => {}
    }
}

/// The name by which an element of a list is found in the other's list.
fn name_of(value: &Value) -> Option<String> {
    const WHERE: [&str; 9] = [
        "/name",
        "/cluster_name",
        "/cluster/name",
        "/listener/name",
        "/route_config/name",
        "/endpoint_config/cluster_name",
        "/address/socket_address/port_value",
        "/endpoint/address/socket_address/port_value",
        "/locality/region",
    ];
    let found = WHERE.iter().find_map(|path| value.pointer(path))?;
    Some(found.as_str().map_or_else(|| found.to_string(), str::to_owned))
}

/// Every path at which the two differ, with both values.
fn differences(path: &str, ours: Option<&Value>, theirs: Option<&Value>, found: &mut Vec<(String, String)>) {
    match (ours, theirs) {
        (Some(Value::Object(ours)), Some(Value::Object(theirs))) => {
            for key in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
                differences(&format!("{path}.{key}"), ours.get(key), theirs.get(key), found);
            }
        }
        (Some(Value::Array(ours)), Some(Value::Array(theirs))) => {
            let objects = ours.iter().chain(theirs).all(Value::is_object);
            let keyed = |items: &[Value]| -> BTreeMap<String, Value> {
                let key = |(index, item): (usize, &Value)| match objects {
                    true => (name_of(item).unwrap_or_default(), item.clone()),
                    false => (index.to_string(), item.clone()),
                };
                items.iter().enumerate().map(key).collect()
            };
            let (ours, theirs) = (keyed(ours), keyed(theirs));
            for key in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
                differences(&format!("{path}[{key}]"), ours.get(key), theirs.get(key), found);
            }
        }
        (ours, theirs) if ours == theirs => {}
        (ours, theirs) => found.push((path.to_owned(), format!("culvertd {ours:?}, Envoy {theirs:?}"))),
    }
}

/// Waits until both say the same, but for what `allowed` names; returns which of those were met.
fn agree(ours: (&Daemon, u16), theirs: (&Daemon, u16), allowed: &[(&str, &str)]) -> Result<BTreeSet<String>> {
    wait_until(PATIENCE, "culvertd and Envoy to agree", || {
        let mut found = Vec::new();
        differences("", Some(&pages(ours.0, ours.1)?), Some(&pages(theirs.0, theirs.1)?), &mut found);
        let mut met = BTreeSet::new();
        let mut unexpected = Vec::new();
        for (path, values) in found {
            match allowed.iter().find(|(suffix, _)| path.trim_end_matches(']').ends_with(suffix.trim_end_matches(']')))
            {
                Some((suffix, _)) => drop(met.insert((*suffix).to_owned())),
                None => unexpected.push(format!("{path}: {values}")),
            }
        }
        ensure!(unexpected.is_empty(), "they differ:\n{}", unexpected.join("\n"));
        Ok(met)
    })
}

#[test]
fn the_same_static_configuration() -> Result<()> {
    let (ours, theirs) = (Daemon::start(Kind::Culvert, STATIC)?, Daemon::start(Kind::Envoy, STATIC)?);
    let met = agree((&ours, 0), (&theirs, 0), &STATIC_DIFFERENCES)?;
    let listed: BTreeSet<_> = STATIC_DIFFERENCES.iter().map(|(suffix, _)| (*suffix).to_owned()).collect();
    assert_eq!(met, listed, "a difference that is gone must leave the table");
    // Texts of refusals.
    for path in [
        "/config_dump?resource=bogus",
        "/config_dump?resource=bootstrap",
        "/config_dump?resource=static_endpoint_configs",
        "/config_dump?mask=bogus",
        "/config_dump?mask=static_clusters.cluster",
        "/config_dump?mask=static_clusters,static_listeners",
        "/clusters?filter=(",
    ] {
        let answers = [&ours, &theirs].map(|daemon| daemon.admin(path).expect_err(path).to_string());
        let addresses = [ours.admin_address(), theirs.admin_address()];
        let answers: BTreeSet<_> = addresses.iter().zip(answers).map(|(at, it)| it.replace(*at, "")).collect();
        assert_eq!(answers.len(), 1, "{path}: {answers:?}");
    }
    // What is asked for.
    for path in [
        "/config_dump?resource=static_clusters&mask=cluster.name,cluster.load_assignment.cluster_name",
        "/config_dump?resource=static_clusters&name_regex=f.*&mask=cluster",
        "/config_dump?resource=static_route_configs&mask=route_config.virtual_hosts",
        "/config_dump?mask=static_clusters&name_regex=app",
        "/config_dump?mask=bootstrap.node.id,bootstrap.static_resources.clusters",
        "/config_dump?resource=static_listeners&mask=listener.address.socket_address.port_value&name_regex=web",
        "/config_dump?resource=dynamic_listeners",
        "/config_dump?include_eds&resource=static_endpoint_configs&mask=endpoint_config.policy&name_regex=od",
        "/init_dump",
        "/init_dump?mask=listener",
    ] {
        let answers = [&ours, &theirs].map(|daemon| match daemon.admin(path) {
            Ok(text) => {
                let mut json = serde_json::from_str(&text).unwrap_or_default();
                normalise(&mut json, 0);
                if let Some(configs) = json["configs"].as_array_mut() {
                    configs.sort_by_key(|config| config.to_string());
                }
                json
            }
            // Envoy prints a mask that it cannot use with a remark on the format.
            Err(error) => Value::from(error.to_string().contains("could not be successfully used")),
        });
        assert_eq!(answers[0], answers[1], "{path}");
    }
    Ok(())
}

#[test]
fn the_same_control_plane() -> Result<()> {
    let (clusters, endpoints) = (Cluster::type_url(), ClusterLoadAssignment::type_url());
    let (listeners, tables) = (Listener::type_url(), RouteConfiguration::type_url());
    let inline = || listener("inline", http(RouteSpecifier::RouteConfig(routes("local", "a"))));
    let first = world(
        "1",
        [
            (clusters.clone(), vec![eds_cluster("a", "", 1), eds_cluster("b", "of-b", 1)]),
            (endpoints, vec![assignment("a", &[8081, 8082]), assignment("of-b", &[8083])]),
            (listeners.clone(), vec![listener("web", rds("one")), inline(), listener("tcp", tcp("b"))]),
            (tables.clone(), vec![resource("one", &routes("one", "a")), resource("two", &routes("two", "b"))]),
        ],
    );
    let ours = Driven::start(Kind::Culvert, first.clone())?;
    let theirs = Driven::start(Kind::Envoy, first)?;
    let both = || agree((&ours.daemon, ours.port), (&theirs.daemon, theirs.port), &DYNAMIC_DIFFERENCES);
    let push = |next: World| [&ours, &theirs].map(|it| drop(it.worlds.send(next.clone())));
    // Both agree while nothing has come, too.
    let arrived = |there: &dyn Fn(&Daemon) -> Result<bool>| {
        wait_until(PATIENCE, "the push to arrive", || {
            ensure!(there(&ours.daemon)? && there(&theirs.daemon)?, "not yet");
            Ok(())
        })
    };
    both()?;
    assert!(ours.daemon.admin("/config_dump")?.contains("\"tcp\""), "the first push is in force");

    // Changed and removed clusters, other routes, a listener that goes.
    push(world("2", [(clusters.clone(), vec![eds_cluster("a", "", 3)])]));
    push(world("2", [(listeners.clone(), vec![listener("web", rds("two")), inline()])]));
    push(world("2", [(tables, vec![resource("two", &routes("two", "a"))])]));
    arrived(&|daemon| Ok(!daemon.admin("/listeners")?.contains("tcp")))?;
    arrived(&|daemon| Ok(daemon.admin("/config_dump?resource=dynamic_active_clusters")?.contains("\"3s\"")))?;
    both()?;

    // A listener that waits for its routes, and one that is refused.
    let more = vec![listener("web", rds("two")), inline(), listener("waits", rds("never")), listener("bad", None)];
    push(world("3", [(listeners, more)]));
    arrived(&|daemon| Ok(daemon.admin("/config_dump?resource=dynamic_listeners")?.contains("failed_configuration")))?;
    both()?;
    let waits = ours.daemon.admin("/config_dump?resource=dynamic_listeners&name_regex=waits")?;
    assert!(waits.contains("warming_state") && !waits.contains("active_state"), "{waits}");
    let bad = ours.daemon.admin("/config_dump?resource=dynamic_listeners&name_regex=bad")?;
    assert!(bad.contains("failed_configuration") && bad.contains("details"), "{bad}");
    let init = ours.daemon.admin("/init_dump")?;
    assert!(init.contains("shared target RdsRouteConfigSubscription RDS init never"), "{init}");
    assert!(theirs.daemon.admin("/init_dump")?.contains("shared target RdsRouteConfigSubscription RDS init never"));
    Ok(())
}
