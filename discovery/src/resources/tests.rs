use std::net::Ipv4Addr;

use culvert_xds_client::api::culvert::overrides::v1::{Action as OverrideAction, OffloadedService, Policy};
use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::core::v3::HealthStatus;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;

use super::*;
use crate::kubernetes::ObjectKey;
use crate::kubernetes::manifest::parse;
use crate::mesh::{Protocol, join};
use crate::registry::{Cluster as RegistryCluster, ClusterInfo, Registry, SourceHealth};

const EAST: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIPs: [10.96.0.10, 'fd00:96::10'], selector: {app: users}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: users-1, labels: {kubernetes.io/service-name: users}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints:
- {addresses: [10.1.0.1], zone: eu-1b}
- {addresses: [10.1.0.2]}
- {addresses: [10.1.0.3], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.1.0.9]}
---
apiVersion: v1
kind: Pod
metadata: {name: users-x, labels: {app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: feature-x}}
status: {podIP: 10.1.0.9}
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {clusterIP: 10.96.0.11, ports: [{port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{name: grpc, port: 80}, {name: raw, port: 81}]}
";
const WEST: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.97.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: users-1, labels: {kubernetes.io/service-name: users}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.2.0.1]}]
";

fn build(options: &Options) -> Snapshot {
    let cluster = |name: &str, region: &str, zone: &str, text| RegistryCluster {
        info: ClusterInfo { name: name.into(), region: region.into(), zone: zone.into(), ..Default::default() },
        objects: Some(Arc::new(parse(text).unwrap())),
        health: SourceHealth::default(),
        drained: false,
    };
    let clusters = vec![cluster("east", "eu", "eu-1a", EAST), cluster("west", "us", "us-1", WEST)];
    Snapshot::build(Arc::new(join(&Registry { version: 1, clusters, waited: false })), options)
}

fn get<M: Message + Default>(snapshot: &Snapshot, kind: ProxyKind, type_url: &str, name: &str) -> M {
    let resource = &snapshot.resources(kind).of_type(type_url).unwrap().resources[name];
    let body = resource.body();
    assert_eq!((&*resource.name, &*body.type_url), (name, type_url));
    M::decode(&*body.value).unwrap()
}

fn names(snapshot: &Snapshot, type_url: &str) -> Vec<String> {
    snapshot
        .resources(ProxyKind::Culvert)
        .of_type(type_url)
        .unwrap()
        .resources
        .keys()
        .map(ToString::to_string)
        .collect()
}

#[test]
fn a_cluster_per_service_port() {
    let snapshot = build(&Options::default());
    let expected = ["db.shop:5432", "headless.shop:80", "headless.shop:81", "original_dst", "users.default:80"];
    assert_eq!(names(&snapshot, type_url::CLUSTER), expected);
    let cluster: Cluster = get(&snapshot, ProxyKind::Culvert, type_url::CLUSTER, "users.default:80");
    assert_eq!(cluster.cluster_discovery_type, Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())));
    assert_eq!(cluster.connect_timeout.map(|timeout| timeout.seconds), Some(1));
    assert_eq!(cluster.typed_extension_protocol_options.len(), 1);
    let tcp: Cluster = get(&snapshot, ProxyKind::Culvert, type_url::CLUSTER, "db.shop:5432");
    assert!(tcp.typed_extension_protocol_options.is_empty());
    let h2: Cluster = get(&snapshot, ProxyKind::Culvert, type_url::CLUSTER, "headless.shop:80");
    assert_ne!(h2.typed_extension_protocol_options, cluster.typed_extension_protocol_options);
}

#[test]
fn the_passthrough_cluster_obeys_no_header() {
    let snapshot = build(&Options::default());
    for kind in [ProxyKind::Culvert, ProxyKind::Foreign] {
        let cluster: Cluster = get(&snapshot, kind, type_url::CLUSTER, ORIGINAL_DST_CLUSTER);
        assert_eq!(cluster.lb_policy, i32::from(LbPolicy::ClusterProvided));
        assert_eq!(cluster.lb_config, None);
    }
}

#[test]
fn endpoints_by_locality_with_health_and_without_offloaded_ones() {
    let snapshot = build(&Options::default());
    let assignment: ClusterLoadAssignment = get(&snapshot, ProxyKind::Foreign, type_url::ENDPOINT, "users.default:80");
    let mut found = Vec::new();
    for locality in &assignment.endpoints {
        let weight = locality.load_balancing_weight.map(|weight| weight.value as usize);
        assert_eq!(weight, Some(locality.lb_endpoints.len()), "gRPC ignores localities without a weight");
        let place = locality.locality.as_ref().unwrap();
        for endpoint in &locality.lb_endpoints {
            let Some(HostIdentifier::Endpoint(host)) = &endpoint.host_identifier else { panic!("no endpoint") };
            let address = format!("{:?}", host.address);
            let ip = ["10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.9", "10.2.0.1"]
                .into_iter()
                .find(|ip| address.contains(ip));
            assert!(address.contains("PortValue(8080)"), "{address}");
            found.push((place.region.as_str(), place.zone.as_str(), ip.unwrap(), endpoint.health_status()));
        }
    }
    assert_eq!(
        found,
        [
            ("eu", "eu-1a", "10.1.0.2", HealthStatus::Healthy),
            ("eu", "eu-1a", "10.1.0.3", HealthStatus::Draining),
            ("eu", "eu-1b", "10.1.0.1", HealthStatus::Healthy),
            ("us", "us-1", "10.2.0.1", HealthStatus::Healthy),
        ]
    );
    let empty: ClusterLoadAssignment = get(&snapshot, ProxyKind::Foreign, type_url::ENDPOINT, "db.shop:5432");
    assert_eq!((empty.cluster_name.as_str(), empty.endpoints.len()), ("db.shop:5432", 0));
}

#[test]
fn weights_and_canaries_are_sent() {
    let endpoint = |last: u8, weight: Option<u32>, canary| crate::mesh::Endpoint {
        address: ([10, 0, 0, last], 80).into(),
        other_family: None,
        locality: crate::mesh::Locality::default(),
        health: crate::mesh::Health::Healthy,
        cluster: "registered".into(),
        weight: weight.and_then(std::num::NonZeroU32::new),
        canary,
    };
    let endpoints = vec![endpoint(1, Some(7), true), endpoint(2, None, false)];
    let port = crate::mesh::MeshPort {
        protocol: Protocol::Http1,
        vips: vec![],
        external: None,
        endpoints,
        offloaded: vec![],
        targets: [80].into(),
    };
    let mut mesh = Mesh::default();
    let service = MeshService { ports: BTreeMap::from([(80, port)]), ..Default::default() };
    mesh.services.insert(ObjectKey::new("default", "users"), Arc::new(service));
    let snapshot = Snapshot::build(Arc::new(mesh), &Options::default());
    let assignment: ClusterLoadAssignment = get(&snapshot, ProxyKind::Culvert, type_url::ENDPOINT, "users.default:80");
    let [locality] = &*assignment.endpoints else { panic!("one locality expected") };
    assert_eq!(locality.load_balancing_weight.map(|weight| weight.value), Some(8));
    let [canary, plain] = &*locality.lb_endpoints else { panic!("two endpoints expected") };
    assert_eq!(canary.load_balancing_weight.map(|weight| weight.value), Some(7));
    let metadata = format!("{:?}", canary.metadata);
    assert!(metadata.contains(r#""envoy.lb": Struct"#) && metadata.contains("BoolValue(true)"), "{metadata}");
    assert_eq!((plain.load_balancing_weight, &plain.metadata), (None, &None));
}

#[test]
fn offloaded_endpoints_are_a_resource_of_their_own() {
    let snapshot = build(&Options::default());
    assert_eq!(names(&snapshot, type_url::OFFLOADED_SERVICE), ["users.default:80"]);
    let offloaded: OffloadedService =
        get(&snapshot, ProxyKind::Culvert, type_url::OFFLOADED_SERVICE, "users.default:80");
    assert_eq!((&*offloaded.cluster_name, &*offloaded.service), ("users.default:80", "users.default"));
    let [endpoint] = &*offloaded.endpoints else { panic!("one endpoint expected: {offloaded:?}") };
    assert_eq!(
        (&*endpoint.revision, &*endpoint.address, endpoint.port, &*endpoint.pod),
        ("feature-x", "10.1.0.9", 8080, "default/users-x")
    );
}

fn in_short(chain: &FilterChain) -> String {
    let rule = chain.filter_chain_match.as_ref();
    let ranges = rule.map(|rule| rule.prefix_ranges.iter()).into_iter().flatten();
    let ranges: Vec<_> =
        ranges.map(|r| format!("{}/{}", r.address_prefix, r.prefix_len.as_ref().unwrap().value)).collect();
    let port = rule.and_then(|rule| rule.destination_port.as_ref()).map(|port| port.value);
    let filters: Vec<_> = chain.filters.iter().map(|filter| filter.name.rsplit('.').next().unwrap()).collect();
    format!("{} {} {:?} {}", chain.name, ranges.join(","), port, filters.join(","))
}

#[test]
fn one_listener_for_tcp_by_address_http_by_port_and_the_rest() {
    let options = Options { outbound_port: 15801, ..Options::default() };
    let listener: Listener = get(&build(&options), ProxyKind::Foreign, type_url::LISTENER, OUTBOUND_LISTENER);
    let chains: Vec<_> = listener.filter_chains.iter().map(in_short).collect();
    assert_eq!(
        chains,
        ["db.shop:5432 10.96.0.11/32 Some(5432) tcp_proxy", "outbound_http_80  Some(80) http_connection_manager",]
    );
    assert_eq!(in_short(listener.default_filter_chain.as_ref().unwrap()), "passthrough  None tcp_proxy");
    let filters: Vec<_> = listener.listener_filters.iter().map(|filter| &*filter.name).collect();
    assert_eq!(filters, ["envoy.filters.listener.original_dst", "envoy.filters.listener.original_src"]);
    assert_eq!(listener.transparent.map(|value| value.value), Some(true));
    let address = format!("{:?}", listener.address);
    assert!(
        address.contains("\"::\"") && address.contains("ipv4_compat: true") && address.contains("15801"),
        "{address}"
    );
    let v4 = Options { outbound_address: Ipv4Addr::LOCALHOST.into(), ..Options::default() };
    let listener: Listener = get(&build(&v4), ProxyKind::Foreign, type_url::LISTENER, OUTBOUND_LISTENER);
    assert!(format!("{:?}", listener.address).contains("ipv4_compat: false"));
}

#[test]
fn grpc_clients_get_an_api_listener_for_each_name_of_an_http_port() {
    let snapshot = build(&Options::default());
    let resources = snapshot.resources(ProxyKind::Grpc).of_type(type_url::LISTENER).unwrap();
    let names: Vec<_> = resources.resources.keys().map(|name| &**name).collect();
    let expected = [
        "headless.shop.svc.cluster.local:80",
        "headless.shop:80",
        "users.default.svc.cluster.local:80",
        "users.default:80",
    ];
    assert_eq!(names, expected);
    let listener: Listener = get(&snapshot, ProxyKind::Grpc, type_url::LISTENER, expected[2]);
    let manager = listener.api_listener.unwrap().api_listener.unwrap();
    let manager = HttpConnectionManager::decode(&*manager.value).unwrap();
    let text = format!("{:?}", manager.route_specifier);
    assert!(text.contains(r#"Cluster("users.default:80")"#) && text.contains("RouteConfig"), "{text}");
    assert_eq!(manager.http_filters.last().unwrap().name, "envoy.filters.http.router");
}

#[test]
fn the_access_log_is_an_option() {
    let contains = |options: &Options| {
        let listener: Listener = get(&build(options), ProxyKind::Foreign, type_url::LISTENER, OUTBOUND_LISTENER);
        let text = listener.encode_to_vec();
        text.windows(9).any(|window| window == b"/a/b/path")
    };
    assert!(!contains(&Options::default()));
    assert!(contains(&Options { access_log: Some("/a/b/path".into()), ..Options::default() }));
}

#[test]
fn override_filters_are_configured_for_culvert_alone() {
    let overrides = Override { require_opt_in: true, ..Override::default() };
    let options = Options { overrides, ..Options::default() };
    let config =
        Override { original_dst_cluster: ORIGINAL_DST_CLUSTER.to_owned(), require_opt_in: true, ..Override::default() };
    let config = config.encode_to_vec();
    let contains = |kind| {
        let listener: Listener = get(&build(&options), kind, type_url::LISTENER, OUTBOUND_LISTENER);
        listener.encode_to_vec().windows(config.len()).any(|window| window == config)
    };
    assert!(contains(ProxyKind::Culvert) && !contains(ProxyKind::Foreign));
}

#[test]
fn a_service_says_what_may_be_asked_for() {
    let snapshot = of("
{apiVersion: v1, kind: Service, metadata: {name: users}, spec: {clusterIP: 10.0.0.1, ports: [{name: http, port: 80}]}}
---
{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {name: users}, spec: {overrides: {allowed: true,
  actions: [delay]}}}");
    let told: OffloadedService = get(&snapshot, ProxyKind::Culvert, type_url::OFFLOADED_SERVICE, "users.default:80");
    let policy = Policy { allowed: true, actions: vec![OverrideAction::Delay.into()], sources: None };
    assert_eq!((told.endpoints.len(), told.policy), (0, Some(policy)));
}

#[test]
fn a_virtual_host_per_service_and_one_for_the_rest() {
    let snapshot = build(&Options::default());
    assert_eq!(names(&snapshot, type_url::ROUTE), ["outbound_http_80"]);
    let routes: RouteConfiguration = get(&snapshot, ProxyKind::Culvert, type_url::ROUTE, "outbound_http_80");
    let hosts: Vec<_> = routes.virtual_hosts.iter().map(|host| (&*host.name, host.domains.len())).collect();
    assert_eq!(hosts, [("users.default:80", 14), ("headless.shop:80", 6), ("passthrough", 1)]);
    let users = &routes.virtual_hosts[0];
    for domain in [
        "users",
        "users:80",
        "users.default",
        "users.default.svc.cluster.local:80",
        "10.96.0.10",
        "[fd00:96::10]:80",
        "10.97.0.10:80",
    ] {
        assert!(users.domains.iter().any(|known| known == domain), "{domain} is not in {:?}", users.domains);
    }
    assert!(!routes.virtual_hosts[1].domains.contains(&"headless".to_owned()), "only namespace default goes without");
    let timeout = |index: usize| match &routes.virtual_hosts[index].routes[0].action {
        Some(Action::Route(action)) => (action.timeout.as_ref().unwrap().seconds, action.retry_policy.is_some()),
        other => panic!("not a route: {other:?}"),
    };
    assert_eq!((timeout(0), timeout(1), timeout(2)), ((15, true), (0, true), (0, false)));
    let mut domains: Vec<_> = routes.virtual_hosts.iter().flat_map(|host| &host.domains).collect();
    let count = domains.len();
    domains.sort();
    domains.dedup();
    assert_eq!(domains.len(), count, "a domain in two virtual hosts makes proxies reject the whole table");
}

#[test]
fn versions_follow_content_and_nothing_else() {
    let (one, two) = (build(&Options::default()), build(&Options::default()));
    let other = build(&Options { outbound_port: 1, ..Options::default() });
    for type_url in PUSH_ORDER {
        let version =
            |snapshot: &Snapshot| snapshot.resources(ProxyKind::Culvert).of_type(type_url).unwrap().version.clone();
        assert_eq!(version(&one), version(&two));
        assert_eq!(version(&one) == version(&other), type_url != type_url::LISTENER, "{type_url}");
    }
}

fn of(manifests: &str) -> Snapshot {
    let info = ClusterInfo { name: "east".into(), ..Default::default() };
    let objects = Some(Arc::new(parse(manifests).unwrap()));
    let cluster = RegistryCluster { info, objects, health: SourceHealth::default(), drained: false };
    let registry = Registry { version: 1, clusters: vec![cluster], waited: false };
    Snapshot::build(Arc::new(join(&registry)), &Options::default())
}

#[test]
fn an_external_name_is_a_cluster_that_proxies_resolve() {
    let snapshot = of("
apiVersion: v1
kind: Service
metadata: {name: mail}
spec: {type: ExternalName, externalName: mail.example.org, ports: [{name: http, port: 8025}]}
");
    let cluster: Cluster = get(&snapshot, ProxyKind::Culvert, type_url::CLUSTER, "mail.default:8025");
    assert_eq!(cluster.cluster_discovery_type, Some(ClusterDiscoveryType::Type(DiscoveryType::LogicalDns.into())));
    let text = format!("{:?}", cluster.load_assignment);
    assert!(text.contains("\"mail.example.org\"") && text.contains("8025"), "{text}");
    assert_eq!(names(&snapshot, type_url::ENDPOINT), Vec::<String>::new());
    let routes: RouteConfiguration = get(&snapshot, ProxyKind::Culvert, type_url::ROUTE, "outbound_http_8025");
    assert_eq!(routes.virtual_hosts[0].name, "mail.default:8025");
}

#[test]
fn weights_and_second_addresses_are_served_where_there_are_any() {
    let text = |weight: &str| {
        let text = "
apiVersion: v1
kind: Service
metadata: {name: users, annotations: {WEIGHT}}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: four, labels: {kubernetes.io/service-name: users}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.1.0.1], targetRef: {uid: u}}, {addresses: [10.1.0.2]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: six, labels: {kubernetes.io/service-name: users}}
addressType: IPv6
ports: [{name: http, port: 8080}]
endpoints: [{addresses: ['fd00::1'], targetRef: {uid: u}}]
";
        text.replace("WEIGHT", weight)
    };
    let assignment = |weight: &str| -> ClusterLoadAssignment {
        get(&of(&text(weight)), ProxyKind::Culvert, type_url::ENDPOINT, "users.default:80")
    };
    let locality = |assignment: &ClusterLoadAssignment| assignment.endpoints[0].clone();
    let weight = |weight: &Option<envoy_types::pb::google::protobuf::UInt32Value>| weight.as_ref().map(|w| w.value);
    let plain = locality(&assignment(""));
    assert_eq!(
        (weight(&plain.load_balancing_weight), weight(&plain.lb_endpoints[0].load_balancing_weight)),
        (Some(2), None)
    );
    let Some(HostIdentifier::Endpoint(endpoint)) = &plain.lb_endpoints[0].host_identifier else { panic!("no address") };
    assert!(format!("{:?}", endpoint.additional_addresses).contains("fd00::1"), "{endpoint:?}");
    let light = locality(&assignment("culvert.dev/weight: '20'"));
    assert_eq!(
        (weight(&light.load_balancing_weight), weight(&light.lb_endpoints[0].load_balancing_weight)),
        (Some(40), Some(20))
    );
}
