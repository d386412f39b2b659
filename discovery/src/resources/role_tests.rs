//! What sidecars and edge proxies are given.

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as FilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener};
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::DownstreamTlsContext;

use super::edge::{EdgeListener, EdgeOptions, EdgeOverrides};
use super::*;
use crate::kubernetes::manifest::parse;
use crate::mesh::join;
use crate::registry::{Cluster as RegistryCluster, ClusterInfo, Registry, SourceHealth};

const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80, targetPort: web}, {name: raw, port: 81, targetPort: 9000}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: users-1, labels: {kubernetes.io/service-name: users}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: raw, port: 9000}]
endpoints: [{addresses: [10.1.0.1]}]
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: users}
spec:
  egress: [web]
  circuitBreakers: {maxRequests: 30}
  rateLimit: {requests: 100, per: 1s}
  timeouts: {idle: 7s}
  mtls: {authority: shop/users, subjectAltNames: ['spiffe://mesh/users']}
  edge: {domains: [shop.example, '*.shop.example'], prefix: /users}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.11, ports: [{name: raw, port: 70}, {name: http, port: 80, targetPort: 8080}]}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: web}
spec: {edge: {domains: [shop.example]}}
---
apiVersion: v1
kind: Service
metadata: {name: orders}
spec: {clusterIP: 10.96.0.12, ports: [{name: http, port: 80}]}
";

fn mesh(text: &str) -> Arc<Mesh> {
    let cluster = RegistryCluster {
        info: ClusterInfo { name: "east".into(), ..Default::default() },
        objects: Some(Arc::new(parse(text).unwrap())),
        health: SourceHealth::default(),
        drained: false,
    };
    Arc::new(join(&Registry { version: 1, clusters: vec![cluster], waited: false }))
}

fn edge_options() -> Options {
    let listener = |port, tls: Option<&str>| EdgeListener {
        address: std::net::Ipv4Addr::UNSPECIFIED.into(),
        port,
        tls: tls.map(str::to_owned),
    };
    let listeners = vec![listener(8080, None), listener(8443, Some("shop/edge"))];
    Options { edge: Some(EdgeOptions { listeners, ..EdgeOptions::default() }), ..Options::default() }
}

fn viewer(kind: ProxyKind, role: Role, services: &[&str]) -> Viewer {
    let services = services.iter().map(|name| ObjectKey::new("default", *name)).collect();
    Viewer { kind, role, services, ..Viewer::default() }
}

fn names(view: &View, type_url: &str) -> Vec<String> {
    view.of_type(type_url).unwrap().resources.keys().map(ToString::to_string).collect()
}

fn get<M: Message + Default>(view: &View, type_url: &str, name: &str) -> M {
    M::decode(&*view.of_type(type_url).unwrap().resources[name].body().value).unwrap()
}

/// The chain of a port.
fn chain(listener: &Listener, port: u32) -> Option<&FilterChain> {
    listener.filter_chains.iter().find(|chain| {
        chain.filter_chain_match.as_ref().and_then(|rule| rule.destination_port.as_ref()).map(|it| it.value)
            == Some(port)
    })
}

fn text(chain: &FilterChain) -> String {
    // Names and clusters are readable in what is packed.
    chain.filters.iter().map(|filter| String::from_utf8_lossy(&filter.encode_to_vec()).into_owned()).collect()
}

#[test]
fn a_sidecar_has_a_listener_for_what_calls_its_pod() {
    let snapshot = Snapshot::build(mesh(OBJECTS), &Options::default());
    let view = snapshot.view(&viewer(ProxyKind::Foreign, Role::Sidecar, &["users"]), None);
    assert_eq!(names(&view, type_url::LISTENER), [INBOUND_LISTENER, OUTBOUND_LISTENER]);
    let expected = [
        "inbound_passthrough",
        "inbound_users.default:80",
        "inbound_users.default:81",
        "nowhere",
        "original_dst",
        "users.default:80",
        "users.default:81",
        "web.default:70",
        "web.default:80",
    ];
    assert_eq!(names(&view, type_url::CLUSTER), expected, "orders is none of those that it may call");
    let own: Cluster = get(&view, type_url::CLUSTER, "inbound_users.default:80");
    assert_eq!(own.circuit_breakers.unwrap().thresholds[0].max_requests.unwrap().value, 30);
    assert!(own.transport_socket.is_none() && own.health_checks.is_empty(), "it is the pod itself");
    for cluster in ["inbound_users.default:80", "inbound_users.default:81", "inbound_passthrough"] {
        let cluster: Cluster = get(&view, type_url::CLUSTER, cluster);
        let options = cluster.upstream_bind_config.unwrap().socket_options;
        assert_eq!((options.len(), options[0].level, options[0].name), (1, 1, 12), "else it comes back for ever");
    }

    let inbound: Listener = get(&view, type_url::LISTENER, INBOUND_LISTENER);
    assert!(inbound.transparent.is_none());
    let [http, raw, itself] = [8080, 9000, 15006].map(|port| chain(&inbound, port).unwrap());
    assert!(
        text(http).contains("inbound_users.default:80") && text(http).contains("local_ratelimit"),
        "{}",
        text(http)
    );
    assert!(text(raw).contains("tcp_proxy") && text(raw).contains("inbound_users.default:81"), "{}", text(raw));
    assert!(text(itself).contains("nowhere"));
    let Some(ConfigType::TypedConfig(tls)) = http.transport_socket.as_ref().unwrap().config_type.as_ref() else {
        panic!("no TLS")
    };
    let tls = DownstreamTlsContext::decode(&*tls.value).unwrap();
    assert!(tls.require_client_certificate.unwrap().value);
    let tls = format!("{:?}", tls.common_tls_context);
    assert!(tls.contains("\"own\"") && tls.contains("\"shop/users/ca\""), "{tls}");

    let outbound: Listener = get(&view, type_url::LISTENER, OUTBOUND_LISTENER);
    let filters: Vec<_> = outbound.listener_filters.iter().map(|filter| &*filter.name).collect();
    assert_eq!((outbound.transparent, filters), (None, vec!["envoy.filters.listener.original_dst"]));
    let addresses = format!("{:?} {:?}", outbound.address, outbound.additional_addresses);
    assert!(addresses.contains("\"127.0.0.1\"") && addresses.contains("\"::1\""), "{addresses}");
    assert!(text(chain(&outbound, 15001).unwrap()).contains("nowhere"));

    // Without `egress` it has everything, and what is the same for all is not made anew.
    let everything = snapshot.view(&viewer(ProxyKind::Foreign, Role::Sidecar, &["web"]), None);
    assert!(names(&everything, type_url::CLUSTER).contains(&"orders.default:80".to_owned()));
    let all = snapshot.resources(ProxyKind::Foreign);
    for type_url in [type_url::ENDPOINT, type_url::ROUTE] {
        assert!(Arc::ptr_eq(everything.of_type(type_url).unwrap(), all.of_type(type_url).unwrap()), "{type_url}");
    }
    // Another one shares with it what they have in common, now and after a change.
    let orders = viewer(ProxyKind::Foreign, Role::Sidecar, &["orders"]);
    let outbound = |view: &View| Arc::clone(&view.of_type(type_url::LISTENER).unwrap().resources[OUTBOUND_LISTENER]);
    let other = snapshot.view(&orders, None);
    assert!(Arc::ptr_eq(&outbound(&everything), &outbound(&other)));
    assert_ne!(names(&everything, type_url::CLUSTER), names(&other, type_url::CLUSTER));
    let changed =
        OBJECTS.replace("{name: http, port: 80, targetPort: 8080}", "{name: http, port: 90, targetPort: 8080}");
    let next = snapshot.next(mesh(&changed), &[ObjectKey::new("default", "web")].into());
    let (web, other) = (viewer(ProxyKind::Foreign, Role::Sidecar, &["web"]), next.view(&orders, Some(&other)));
    let everything = next.view(&web, Some(&everything));
    assert!(Arc::ptr_eq(&outbound(&everything), &outbound(&other)));
    for (view, viewer) in [(&everything, &web), (&other, &orders)] {
        let anew = Snapshot::build(mesh(&changed), &Options::default()).view(viewer, None);
        for type_url in [type_url::CLUSTER, type_url::LISTENER] {
            assert_eq!(view.of_type(type_url).unwrap().version, anew.of_type(type_url).unwrap().version, "{type_url}");
        }
    }
    assert!(names(&other, type_url::CLUSTER).contains(&"web.default:90".to_owned()));
    // gRPC's own client has no listeners of a proxy, whatever it says.
    let grpc = snapshot.view(&viewer(ProxyKind::Grpc, Role::Sidecar, &["web"]), None);
    assert!(Arc::ptr_eq(&grpc.set, snapshot.resources(ProxyKind::Grpc)));
}

#[test]
fn another_service_of_the_pod_does_not_open_a_port() {
    let more = "---
apiVersion: v1
kind: Service
metadata: {name: admin}
spec: {clusterIP: 10.96.0.13, ports: [{name: http, port: 80, targetPort: 8080}]}
";
    let snapshot = Snapshot::build(mesh(&format!("{OBJECTS}{more}")), &Options::default());
    let encrypts = |services: &[&str]| {
        let view = snapshot.view(&viewer(ProxyKind::Culvert, Role::Sidecar, services), None);
        let inbound: Listener = get(&view, type_url::LISTENER, INBOUND_LISTENER);
        chain(&inbound, 8080).unwrap().transport_socket.is_some()
    };
    assert!(!encrypts(&["admin"]) && encrypts(&["users"]));
    assert!(encrypts(&["admin", "users"]), "whose name comes first");
}

#[test]
fn the_port_of_a_pod_that_is_named_can_come_later() {
    let before = mesh(&OBJECTS.replace("ports: [{name: http, port: 8080}, {name: raw", "ports: [{name: raw"));
    let snapshot = Snapshot::build(before, &Options::default());
    let sidecar = viewer(ProxyKind::Culvert, Role::Sidecar, &["users"]);
    let view = snapshot.view(&sidecar, None);
    let ports = |view: &View| {
        let inbound: Listener = get(view, type_url::LISTENER, INBOUND_LISTENER);
        let passes = text(inbound.default_filter_chain.as_ref().unwrap()).contains("inbound_passthrough");
        ([8080, 9000].map(|port| chain(&inbound, port).is_some()), passes)
    };
    assert_eq!(ports(&view), ([false, true], false), "any port may be the one with mTLS");
    let after = snapshot.next(mesh(OBJECTS), &[ObjectKey::new("default", "users")].into());
    assert_eq!(ports(&after.view(&sidecar, Some(&view))), ([true, true], true));
}

#[test]
fn an_edge_proxy_has_what_manifests_let_in() {
    let snapshot = Snapshot::build(mesh(OBJECTS), &edge_options());
    let view = snapshot.view(&viewer(ProxyKind::Culvert, Role::Edge, &[]), None);
    assert_eq!(names(&view, type_url::LISTENER), ["edge_8080", "edge_8443"]);
    let clusters = names(&view, type_url::CLUSTER);
    assert_eq!(clusters, ["original_dst", "users.default:80", "web.default:80"], "not what nothing leads to");
    assert_eq!(names(&view, type_url::ENDPOINT), ["users.default:80", "web.default:80"]);
    assert_eq!(names(&view, type_url::ROUTE), [EDGE_ROUTES]);
    let routes: RouteConfiguration = get(&view, type_url::ROUTE, EDGE_ROUTES);
    assert!(routes.ignore_port_in_host_matching && routes.request_headers_to_remove.is_empty());
    let found: Vec<_> = routes
        .virtual_hosts
        .iter()
        .map(|host| {
            let to = host.routes.iter().map(|route| {
                let path = match route.r#match.as_ref().unwrap().path_specifier.as_ref().unwrap() {
                    PathSpecifier::Prefix(path) | PathSpecifier::PathSeparatedPrefix(path) => path.clone(),
                    other => panic!("{other:?}"),
                };
                (path, !route.typed_per_filter_config.is_empty())
            });
            (&*host.domains[0], to.collect::<Vec<_>>())
        })
        .collect();
    let users = || ("/users".to_owned(), true);
    assert_eq!(found, [("*.shop.example", vec![users()]), ("shop.example", vec![users(), ("/".to_owned(), false)])]);

    let listener: Listener = get(&view, type_url::LISTENER, "edge_8443");
    let Some(ConfigType::TypedConfig(tls)) =
        listener.filter_chains[0].transport_socket.as_ref().unwrap().config_type.as_ref()
    else {
        panic!("no TLS")
    };
    assert!(String::from_utf8_lossy(&tls.value).contains("shop/edge"));
    let listener: Listener = get(&view, type_url::LISTENER, "edge_8080");
    let Some(FilterConfig::TypedConfig(manager)) = listener.filter_chains[0].filters[0].config_type.as_ref() else {
        panic!("no manager")
    };
    let manager = HttpConnectionManager::decode(&*manager.value).unwrap();
    assert!(manager.use_remote_address.unwrap().value);
    assert_eq!(manager.http_filters[0].name, "culvert.filters.http.override");

    // Envoy has no such filter: its routes take the headers out.
    let view = snapshot.view(&viewer(ProxyKind::Foreign, Role::Edge, &["users"]), None);
    let routes: RouteConfiguration = get(&view, type_url::ROUTE, EDGE_ROUTES);
    assert!(routes.request_headers_to_remove.contains(&"baggage".to_owned()));
    let mut keeps = edge_options();
    keeps.edge.as_mut().unwrap().overrides = EdgeOverrides::Keep;
    let keeping = Snapshot::build(mesh(OBJECTS), &keeps);
    let view = keeping.view(&viewer(ProxyKind::Foreign, Role::Edge, &[]), None);
    let routes: RouteConfiguration = get(&view, type_url::ROUTE, EDGE_ROUTES);
    // Nobody outside may say what only overrides may.
    assert_eq!(routes.request_headers_to_remove, ["x-culvert-config", "x-envoy-original-dst-host"]);

    // A service that is let in later is there, one that is not any more is not.
    let edge = viewer(ProxyKind::Culvert, Role::Edge, &[]);
    let view = snapshot.view(&edge, None);
    let orders = "---\napiVersion: culvert.dev/v1alpha1\nkind: ServiceManifest\nmetadata: {name: orders}\nspec: {edge: {domains: [o.example]}}\n";
    let changed = OBJECTS.replace("spec: {edge: {domains: [shop.example]}}", "spec: {}") + orders;
    let keys = ["orders", "web"].map(|name| ObjectKey::new("default", name)).into();
    let view = snapshot.next(mesh(&changed), &keys).view(&edge, Some(&view));
    let clusters = names(&view, type_url::CLUSTER);
    assert_eq!(clusters, ["orders.default:80", "original_dst", "users.default:80"]);
}

#[test]
fn what_cannot_hold_at_the_edge_is_said() {
    for (text, expected) in [
        (
            OBJECTS.replace("prefix: /users}", "port: 81}"),
            "ServiceManifest default/users: spec.edge cannot hold, as no port 81 of it speaks HTTP",
        ),
        (
            OBJECTS.replace(", prefix: /users}", "}"),
            "ServiceManifest default/web: spec.edge: shop.example/ is what ServiceManifest default/users has, which counts",
        ),
    ] {
        let warnings = &mesh(&text).warnings;
        assert!(warnings.iter().any(|warning| warning == expected), "{warnings:?}");
    }
    let read = |text: &str| {
        let options: EdgeOptions = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
        options.check([15001, 15006])
    };
    assert_eq!(read("{listeners: [{port: 80}, {port: 443, tls: a}], overrides: keep}"), Ok(()));
    for (text, expected) in [
        ("{listeners: []}", "edge.listeners: an edge proxy needs a listener"),
        ("{listeners: [{port: 0}]}", "edge.listeners[0].port: 0"),
        ("{listeners: [{port: 8}, {port: 8}]}", "edge.listeners[1].port: 8 is taken"),
        (
            "{listeners: [{port: 8}, {port: 15006}]}",
            "edge.listeners[1].port: 15006 is the outbound or the inbound port",
        ),
        ("{listeners: [{port: 8}], trusted_hops: 101}", "edge.trusted_hops: at most 100"),
        ("{listeners: [{port: 8, tls: ''}]}", "edge.listeners[0].tls"),
        ("{listeners: [{port: 8}], overrides: strip_external}", "edge.overrides: strip_external needs"),
        ("{listeners: [{port: 8}], overrides: none}", "none"),
        ("{listeners: [{port: 8, address: x}]}", "address"),
        ("{listeners: [{port: 8}], internal_ranges: [10.0.0.0]}", "not an address range"),
    ] {
        let error = read(text).unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn a_new_manifest_takes_no_calls_away_from_an_older_one() {
    let manifest = |name: &str, created: &str| {
        format!(
            "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: {name}{created}}}
spec: {{edge: {{domains: [shop.example]}}}}
"
        )
    };
    let services = OBJECTS.replace("spec: {edge: {domains: [shop.example]}}", "spec: {}");
    let owner = |orders: &str, web: &str| {
        let text = services.replace(
            "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: web}
spec: {}
",
            "",
        );
        let mesh = mesh(&(text + &manifest("orders", orders) + &manifest("web", web)));
        let claims = edge::claims(&mesh, |_, _, _, _| {});
        let owner = claims["shop.example"].values().find(|(key, _)| key.name != "users").unwrap().0.name.clone();
        (owner, mesh.warnings.iter().filter(|warning| warning.contains("which counts")).count())
    };
    let (old, new) = (", creationTimestamp: '2024-01-01T00:00:00Z'", ", creationTimestamp: '2025-01-01T00:00:00Z'");
    for (orders, web, expected) in
        [(new, old, "web"), (old, new, "orders"), (old, old, "orders"), ("", "", "orders"), (old, "", "web")]
    {
        assert_eq!(owner(orders, web), (expected.to_owned(), 1), "{orders} {web}");
    }
}

#[test]
fn what_a_node_is_for_it_says_itself() {
    use envoy_types::pb::envoy::config::core::v3::Node;
    use envoy_types::pb::google::protobuf::value::Kind;
    use envoy_types::pb::google::protobuf::{Struct, Value};
    let node = |kind| {
        let fields = [(role::METADATA.to_owned(), Value { kind: Some(kind) })].into();
        Role::of(&Node { metadata: Some(Struct { fields }), ..Node::default() })
    };
    assert_eq!(Role::of(&Node::default()), Ok(Role::Node));
    for role in Role::ALL {
        assert_eq!(node(Kind::StringValue(role.to_string())), Ok(role));
    }
    let error = node(Kind::StringValue("gateway\n".to_owned())).unwrap_err();
    assert_eq!(error, "node.metadata `culvert.proxy`: `gateway\\n` is not node, sidecar or edge");
    assert!(node(Kind::NumberValue(1.0)).unwrap_err().contains("is no text"));
}
