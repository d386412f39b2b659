use super::*;
use crate::kubernetes::TargetPort;
use crate::kubernetes::manifest::parse;
use crate::registry::{Cluster, SourceHealth};

fn cluster(name: &str, manifests: &str) -> Cluster {
    let info = ClusterInfo { name: name.into(), region: format!("{name}-r"), zone: format!("{name}-z"), apart: false };
    Cluster { info, objects: Some(parse(manifests).unwrap().into()), health: SourceHealth::default(), drained: false }
}

fn mesh(clusters: Vec<Cluster>) -> Mesh {
    join(&Registry { version: 1, clusters, waited: false })
}

fn port(mesh: &Mesh, number: u16) -> &MeshPort {
    &mesh.services[&ObjectKey::new("default", "users")].ports[&number]
}

fn addresses(port: &MeshPort) -> Vec<String> {
    port.endpoints.iter().map(|endpoint| format!("{} {:?}", endpoint.address, endpoint.health)).collect()
}

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.1, selector: {app: users}, ports: [{name: http, port: 80, targetPort: web}]}
---
";

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: users}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: {endpoints}
---
"
    )
}

fn offloaded_pod(name: &str, address: &str, revision: &str) -> String {
    format!(
        "
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  labels: {{app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: {revision}}}
spec: {{containers: [{{ports: [{{name: web, containerPort: 9090}}]}}]}}
status: {{podIP: {address}}}
---
"
    )
}

#[test]
fn slices_are_joined_and_conditions_decide() {
    let manifests = [
        SERVICE.to_owned(),
        slice("a", "[{addresses: [10.1.0.1], zone: z1}, {addresses: [10.1.0.2], conditions: {ready: false}}]"),
        slice("b", "[{addresses: [10.1.0.3], conditions: {ready: false, serving: true, terminating: true}}]"),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    let port = port(&mesh, 80);
    assert_eq!(addresses(port), ["10.1.0.1:8080 Healthy", "10.1.0.3:8080 Draining"]);
    let places: Vec<_> = port.endpoints.iter().map(|e| (&*e.locality.region, &*e.locality.zone)).collect();
    assert_eq!(places, [("east-r", "z1"), ("east-r", "east-z")]);
}

#[test]
fn an_endpoint_in_two_slices_is_one_endpoint_and_its_better_state_counts() {
    let drains = "conditions: {ready: false, serving: true, terminating: true}";
    let manifests = [
        SERVICE.to_owned(),
        slice("a", &format!("[{{addresses: [10.1.0.1], {drains}}}, {{addresses: [10.1.0.2], targetRef: {{uid: u}}}}]")),
        slice("b", "[{addresses: [10.1.0.1]}, {addresses: [10.1.0.2], targetRef: {uid: u}}]"),
        slice("c", "[{addresses: [10.1.0.2]}]"),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    assert_eq!(addresses(port(&mesh, 80)), ["10.1.0.1:8080 Healthy", "10.1.0.2:8080 Healthy"]);
}

#[test]
fn a_dual_stack_pod_is_one_endpoint_of_the_services_first_family() {
    let v4 = slice("a", "[{addresses: [10.1.0.1], targetRef: {uid: u}}]");
    let v6 = slice("b", "[{addresses: ['fd00::1'], targetRef: {uid: u}}]").replace("IPv4", "IPv6");
    let mesh4 = mesh(vec![cluster("east", &[SERVICE, &v4, &v6].concat())]);
    assert_eq!(addresses(port(&mesh4, 80)), ["10.1.0.1:8080 Healthy"]);
    let service6 = SERVICE.replace("10.96.0.1", "'fd00:96::1'");
    let mesh6 = mesh(vec![cluster("east", &[&*service6, &v4, &v6].concat())]);
    assert_eq!(addresses(port(&mesh6, 80)), ["[fd00::1]:8080 Healthy"]);
}

#[test]
fn offloaded_pods_are_left_out_however_the_slice_names_them() {
    let manifests = [
        SERVICE.to_owned(),
        slice(
            "a",
            "[{addresses: [10.1.0.1]}, {addresses: [10.1.0.8], targetRef: {kind: Pod, name: x}}, {addresses: [10.1.0.9]}]",
        ),
        offloaded_pod("x", "10.1.0.7", "one"),
        offloaded_pod("y", "10.1.0.9", "two"),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    let port = port(&mesh, 80);
    assert_eq!(addresses(port), ["10.1.0.1:8080 Healthy"]);
    let offloaded: Vec<_> = port.offloaded.iter().map(|o| format!("{} {} {}", o.revision, o.address, o.pod)).collect();
    assert_eq!(offloaded, ["one 10.1.0.7:9090 default/x", "two 10.1.0.9:9090 default/y"]);
}

#[test]
fn an_offloaded_pod_that_cannot_be_reached_is_not_listed() {
    let unready = offloaded_pod("x", "10.1.0.7", "one")
        .replace("podIP: 10.1.0.7", "podIP: 10.1.0.7, conditions: [{type: Ready, status: 'False'}]");
    let other_app = offloaded_pod("y", "10.1.0.8", "one").replace("app: users", "app: orders");
    let other_namespace = offloaded_pod("z", "10.1.0.9", "one").replace("name: z", "name: z\n  namespace: shop");
    let nameless = offloaded_pod("n", "10.1.0.6", "''");
    let no_port = offloaded_pod("p", "10.1.0.5", "one").replace("name: web", "name: admin");
    let manifests = [SERVICE, &unready, &other_app, &other_namespace, &nameless, &no_port].concat();
    let mesh = mesh(vec![cluster("east", &manifests)]);
    assert_eq!(port(&mesh, 80).offloaded, []);
    assert!(
        mesh.warnings
            .iter()
            .any(|w| w.contains("default/n") && w.contains("no label or annotation culvert.dev/revision"))
    );
    assert!(mesh.warnings.iter().any(|w| w.contains("default/p") && w.contains("no container port")));
}

#[test]
fn an_ended_offloaded_pod_does_not_take_its_former_address_along() {
    let ended = offloaded_pod("x", "10.1.0.1", "one").replace("podIP:", "phase: Succeeded, podIP:");
    let manifests =
        [SERVICE, &slice("a", "[{addresses: [10.1.0.1], targetRef: {kind: Pod, name: new}}]"), &ended].concat();
    let mesh = mesh(vec![cluster("east", &manifests)]);
    assert_eq!(addresses(port(&mesh, 80)), ["10.1.0.1:8080 Healthy"]);
}

#[test]
fn equal_services_of_several_clusters_are_one() {
    let east = cluster("east", &[SERVICE, &slice("a", "[{addresses: [10.1.0.1]}]")].concat());
    let west_service = SERVICE.replace("10.96.0.1", "10.97.0.1");
    let west = cluster("west", &[&*west_service, &slice("a", "[{addresses: [10.2.0.1]}]")].concat());
    let mesh = mesh(vec![east, west]);
    let port = port(&mesh, 80);
    assert_eq!(addresses(port), ["10.1.0.1:8080 Healthy", "10.2.0.1:8080 Healthy"]);
    assert_eq!(port.vips, ["10.96.0.1", "10.97.0.1"].map(|vip| vip.parse::<IpAddr>().unwrap()));
    assert_eq!(mesh.services[&ObjectKey::new("default", "users")].clusters, ["east", "west"]);
    assert_eq!(mesh.warnings, Vec::<String>::new());
}

#[test]
fn an_address_that_two_services_claim_is_nobodys() {
    let west = SERVICE.replace("name: users", "name: accounts").replace("app: users", "app: accounts");
    let mesh = mesh(vec![cluster("east", SERVICE), cluster("west", &west)]);
    assert_eq!(port(&mesh, 80).vips, Vec::<IpAddr>::new());
    assert_eq!(mesh.services[&ObjectKey::new("default", "accounts")].ports[&80].vips, Vec::<IpAddr>::new());
    assert_eq!(mesh.warnings.len(), 1);
    assert!(mesh.warnings[0].contains("10.96.0.1:80") && mesh.warnings[0].contains("is passed through"));
}

#[test]
fn the_first_clusters_protocol_counts() {
    let west = SERVICE.replace("name: http", "name: db");
    let mesh = mesh(vec![cluster("east", SERVICE), cluster("west", &west)]);
    assert_eq!(port(&mesh, 80).protocol, Protocol::Http1);
    assert!(
        mesh.warnings[0].contains("port 80 of Service default/users is tcp in cluster west"),
        "{:?}",
        mesh.warnings
    );
}

#[test]
fn ports_match_by_name() {
    let service = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {ports: [{name: http, port: 80, targetPort: 8080}, {name: admin, port: 81, targetPort: 8081}]}
---
";
    let every_port = slice("b", "[{addresses: [10.1.0.2]}]").replace("name: http, port: 8080", "name: admin");
    let mesh = mesh(vec![cluster("east", &[service, &slice("a", "[{addresses: [10.1.0.1]}]"), &every_port].concat())]);
    assert_eq!(addresses(port(&mesh, 80)), ["10.1.0.1:8080 Healthy"]);
    assert_eq!(addresses(port(&mesh, 81)), ["10.1.0.2:8081 Healthy"]);
}

#[test]
fn protocols_follow_app_protocol_then_name() {
    for (name, app_protocol, expected) in [
        ("http", None, Protocol::Http1),
        ("http-web", None, Protocol::Http1),
        ("http2", None, Protocol::Http2),
        ("h2c-x", None, Protocol::Http2),
        ("grpc", None, Protocol::Grpc),
        ("https", None, Protocol::Tcp),
        ("httpx", None, Protocol::Tcp),
        ("", None, Protocol::Tcp),
        ("db", Some("http"), Protocol::Http1),
        ("db", Some("kubernetes.io/h2c"), Protocol::Http2),
        ("http", Some("kubernetes.io/wss"), Protocol::Tcp),
        ("http", Some("redis"), Protocol::Tcp),
    ] {
        let app_protocol = app_protocol.map(str::to_owned);
        let port = ServicePort { name: name.into(), port: 1, target_port: TargetPort::Number(1), app_protocol };
        assert_eq!(Protocol::of(&port), expected, "{port:?}");
    }
}

fn pod(name: &str, metadata: &str, status: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}, uid: {name}-uid{metadata}}}, status: {{{status}}}}}\n---\n"
    )
}

fn of_pod(address: &str, name: &str) -> String {
    format!("{{addresses: [{address}], targetRef: {{kind: Pod, name: {name}, uid: {name}-uid}}}}")
}

#[test]
fn a_pod_drains_before_its_slice_says_so() {
    let endpoints = ["a", "b", "c", "d", "e", "f"]
        .iter()
        .enumerate()
        .map(|(i, name)| of_pod(&format!("10.1.0.{}", i + 1), name))
        .chain(["{addresses: [10.1.0.7]}".to_owned(), "{addresses: [10.1.0.8]}".to_owned()])
        .collect::<Vec<_>>()
        .join(", ");
    let manifests = [
        SERVICE.to_owned(),
        slice("s", &format!("[{endpoints}]")),
        pod("a", ", deletionTimestamp: '2024-01-01T00:00:00Z'", "podIP: 10.1.0.1"),
        pod("b", "", "podIP: 10.1.0.2, conditions: [{type: DisruptionTarget, status: 'True'}]"),
        pod("c", "", "podIP: 10.1.0.3, phase: Failed"),
        // The next pod of a StatefulSet has its predecessor's name, and another uid.
        pod("d", ", deletionTimestamp: '2024-01-01T00:00:00Z'", "podIP: 10.1.0.4").replace("d-uid", "another"),
        // A slice that names no pod.
        pod("g", ", deletionTimestamp: '2024-01-01T00:00:00Z'", "podIP: 10.1.0.7"),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    let expected = ["1:8080 Draining", "2:8080 Draining", "4:8080 Healthy", "5:8080 Healthy", "6:8080 Healthy"];
    let expected: Vec<_> =
        expected.iter().chain(&["7:8080 Draining", "8:8080 Healthy"]).map(|e| format!("10.1.0.{e}")).collect();
    assert_eq!(addresses(port(&mesh, 80)), expected);
}

#[test]
fn more_draining_endpoints_than_healthy_ones_are_left_out() {
    let drains = "conditions: {ready: false, serving: true, terminating: true}";
    let endpoints = |healthy: u8, draining: u8| {
        let list: Vec<_> = (0..healthy + draining)
            .map(|i| format!("{{addresses: [10.1.0.{i}], {}}}", if i < healthy { "zone: z" } else { drains }))
            .collect();
        let manifests = [SERVICE, &slice("a", &format!("[{}]", list.join(", ")))].concat();
        let mesh = mesh(vec![cluster("east", &manifests)]);
        let health = |wanted| port(&mesh, 80).endpoints.iter().filter(|e| e.health == wanted).count();
        (health(Health::Healthy), health(Health::Draining))
    };
    assert_eq!(endpoints(2, 2), (2, 2));
    assert_eq!(endpoints(2, 3), (2, 0));
    // With none healthy they are better than nothing.
    assert_eq!(endpoints(0, 3), (0, 3));
}

#[test]
fn a_service_may_want_its_unready_endpoints() {
    let service = SERVICE.replace("spec: {", "spec: {publishNotReadyAddresses: true, ");
    let manifests = [
        service,
        slice(
            "a",
            "[{addresses: [10.1.0.1], conditions: {ready: false}}, {addresses: [10.1.0.2], targetRef: {kind: Pod, name: a}}]",
        ),
        pod("a", ", deletionTimestamp: '2024-01-01T00:00:00Z'", "podIP: 10.1.0.2"),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    assert_eq!(addresses(port(&mesh, 80)), ["10.1.0.1:8080 Healthy", "10.1.0.2:8080 Healthy"]);
}

#[test]
fn a_dual_stack_endpoint_has_its_other_address_too() {
    let v4 = slice("a", "[{addresses: [10.1.0.1], targetRef: {uid: u}}]");
    let v6 = slice("b", "[{addresses: ['fd00::1'], targetRef: {uid: u}}]").replace("IPv4", "IPv6");
    let both = [&*v4, &*v6].concat();
    for (service, first, other) in [
        (SERVICE.to_owned(), "10.1.0.1:8080", "[fd00::1]:8080"),
        // A headless service has only its families to go by.
        (SERVICE.replace("10.96.0.1", "None, ipFamilies: [IPv6, IPv4]"), "[fd00::1]:8080", "10.1.0.1:8080"),
    ] {
        let mesh = mesh(vec![cluster("east", &[&*service, &*both].concat())]);
        let [endpoint] = &*port(&mesh, 80).endpoints else { panic!("one endpoint expected: {mesh:?}") };
        assert_eq!(endpoint.address.to_string(), first);
        assert_eq!(endpoint.other_family.map(|address| address.to_string()).as_deref(), Some(other));
    }
    // An address that drains is no second way to one that does not.
    let drains = v6.replace("targetRef", "conditions: {ready: false, serving: true, terminating: true}, targetRef");
    let mesh = mesh(vec![cluster("east", &[SERVICE, &*v4, &*drains].concat())]);
    assert_eq!(port(&mesh, 80).endpoints[0].other_family, None);
}

#[test]
fn weights_of_service_and_pod_multiply() {
    let service = SERVICE.replace("name: users}", "name: users, annotations: {culvert.dev/weight: '50'}}");
    let slice =
        slice("s", &format!("[{}, {}, {}]", of_pod("10.1.0.1", "a"), of_pod("10.1.0.2", "b"), of_pod("10.1.0.3", "c")));
    let manifests = [
        service,
        slice,
        pod("b", ", annotations: {culvert.dev/weight: '300'}", ""),
        pod("c", ", annotations: {culvert.dev/weight: '0'}", ""),
    ];
    let mesh = mesh(vec![cluster("east", &manifests.concat())]);
    let found: Vec<_> = port(&mesh, 80).endpoints.iter().map(|e| (e.weight.map(NonZeroU32::get), e.health)).collect();
    assert_eq!(found, [(Some(50), Health::Healthy), (Some(150), Health::Healthy), (Some(100), Health::Draining)]);
}

#[test]
fn places_come_from_slices_then_nodes_then_the_configuration() {
    let node = "
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {topology.kubernetes.io/region: nr, topology.kubernetes.io/zone: nz}}
---
";
    let endpoints = "[{addresses: [10.1.0.1], nodeName: n1}, {addresses: [10.1.0.2], nodeName: n1, zone: sz}, {addresses: [10.1.0.3]}]";
    let mesh = mesh(vec![cluster("east", &[SERVICE, node, &slice("a", endpoints)].concat())]);
    let places: Vec<_> = port(&mesh, 80).endpoints.iter().map(|e| (&*e.locality.region, &*e.locality.zone)).collect();
    assert_eq!(places, [("nr", "nz"), ("nr", "sz"), ("east-r", "east-z")]);
}

#[test]
fn an_external_name_is_a_host_without_endpoints() {
    let external = SERVICE.replace("clusterIP: 10.96.0.1", "type: ExternalName, externalName: users.example.org.");
    let here = [SERVICE, &slice("a", "[{addresses: [10.1.0.1]}]")].concat();
    let mesh1 = mesh(vec![cluster("east", &external), cluster("west", &here)]);
    let expected = External { host: "users.example.org".into(), port: 80 };
    assert_eq!(port(&mesh1, 80).external.as_ref(), Some(&expected));
    assert_eq!(port(&mesh1, 80).endpoints, []);
    assert!(
        mesh1.warnings[0].contains("is in the cluster in cluster west, and the external name"),
        "{:?}",
        mesh1.warnings
    );
    let mesh2 = mesh(vec![cluster("west", &here), cluster("east", &external)]);
    assert_eq!((port(&mesh2, 80).external.as_ref(), port(&mesh2, 80).endpoints.len()), (None, 1));
}

#[test]
fn services_are_kept_apart_by_cluster_or_by_annotation() {
    let manifests = |third: u8| {
        [
            SERVICE.replace("10.96.0.1", &format!("10.96.0.{third}")),
            slice("a", &format!("[{{addresses: [10.{third}.0.1]}}]")),
        ]
        .concat()
    };
    let names = |mesh: &Mesh| mesh.services.keys().map(|key| cluster_name(key, 80)).collect::<Vec<_>>();
    let mut west = cluster("west", &manifests(2));
    west.info.apart = true;
    let mesh1 = mesh(vec![cluster("east", &manifests(1)), west.clone()]);
    assert_eq!(names(&mesh1), ["users.default:80", "users.default.west:80"]);
    assert_eq!(addresses(port(&mesh1, 80)), ["10.1.0.1:8080 Healthy"]);
    let apart = &mesh1.services[&ObjectKey::new("default.west", "users")].ports[&80];
    assert_eq!((addresses(apart), apart.vips.len()), (vec!["10.2.0.1:8080 Healthy".to_owned()], 1));
    let says = |value: &str| {
        manifests(2).replace(
            "metadata: {name: users}",
            &format!("metadata: {{name: users, annotations: {{culvert.dev/merge: '{value}'}}}}"),
        )
    };
    west.objects = Some(parse(&says("true")).unwrap().into());
    assert_eq!(names(&mesh(vec![cluster("east", &manifests(1)), west])), ["users.default:80"]);
    let mesh2 = mesh(vec![cluster("east", &manifests(1)), cluster("west", &says("false"))]);
    assert_eq!(names(&mesh2), ["users.default:80", "users.default.west:80"]);
}

#[test]
fn what_serves_one_cluster_is_no_service_of_all() {
    let own = |third: u8| {
        let dns = [SERVICE, &slice("a", &format!("[{{addresses: [10.{third}.0.1]}}]"))].concat();
        let api = SERVICE.replace("name: users", "name: kubernetes").replace("10.96.0.1", "10.96.0.3");
        dns.replace("metadata: {name: users", "metadata: {namespace: kube-system, name: users")
            .replace("metadata: {name: a", "metadata: {namespace: kube-system, name: a")
            + &api
    };
    let mesh1 = mesh(vec![cluster("east", &own(1)), cluster("west", &own(2))]);
    let names: Vec<_> = mesh1.services.keys().map(|key| cluster_name(key, 80)).collect();
    assert_eq!(names, ["users.kube-system.east:80", "users.kube-system.west:80"]);
    for (namespace, address) in
        [("kube-system.east", "10.1.0.1:8080 Healthy"), ("kube-system.west", "10.2.0.1:8080 Healthy")]
    {
        let port = &mesh1.services[&ObjectKey::new(namespace, "users")].ports[&80];
        assert_eq!(
            (addresses(port), &*port.vips),
            (vec![address.to_owned()], &[][..]),
            "both clusters have this address"
        );
    }
    assert_eq!(mesh1.warnings, [""; 0], "that is as it should be");
    // What a cluster's pods call their API server by is no other cluster's service for them.
    let api = SERVICE.replace("name: users", "name: kubernetes");
    let mesh1 = mesh(vec![cluster("east", SERVICE), cluster("west", &api)]);
    assert_eq!((mesh1.services.len(), &*port(&mesh1, 80).vips), (1, &[][..]));
    let [warning] = &*mesh1.warnings else { panic!("one warning expected: {:?}", mesh1.warnings) };
    assert!(
        warning.contains(
            "10.96.0.1:80 is the address of default/users in cluster east and of default/kubernetes, which is"
        )
    );
    let mesh1 = mesh(vec![cluster("west", &api.replace("port: 80", "port: 443")), cluster("east", SERVICE)]);
    assert_eq!((port(&mesh1, 80).vips.len(), mesh1.warnings.len()), (1, 0));
    // So is what is answered on the client's own node, unless it says that it is a service of all.
    let agent = SERVICE.replace("spec: {", "spec: {internalTrafficPolicy: Local, ");
    assert!(mesh(vec![cluster("east", &agent)]).services.is_empty());
    let merged = agent.replace("name: users", "name: users, annotations: {culvert.dev/merge: \"true\"}");
    assert_eq!(mesh(vec![cluster("east", &merged)]).services.len(), 1);
}

#[test]
fn a_drained_cluster_gives_up_what_others_can_take_over() {
    let only = SERVICE.replace("users", "lonely").replace("10.96.0.1", "10.96.0.2")
        + &slice("l", "[{addresses: [10.2.0.9]}]").replace("users", "lonely");
    let west = [SERVICE, &slice("a", "[{addresses: [10.2.0.1]}]"), &only].concat();
    let east = [SERVICE, &slice("a", "[{addresses: [10.1.0.1]}, {addresses: [10.1.0.2]}]")].concat();
    let mut west = cluster("west", &west);
    west.drained = true;
    let mesh1 = mesh(vec![cluster("east", &east), west.clone()]);
    let expected = ["10.1.0.1:8080 Healthy", "10.1.0.2:8080 Healthy", "10.2.0.1:8080 Draining"];
    assert_eq!(addresses(port(&mesh1, 80)), expected);
    let lonely = &mesh1.services[&ObjectKey::new("default", "lonely")].ports[&80];
    assert_eq!(addresses(lonely), ["10.2.0.9:8080 Healthy"]);
    let [warning] = &*mesh1.warnings else { panic!("one warning expected: {:?}", mesh1.warnings) };
    assert!(
        warning.contains("cluster west is drained") && warning.ends_with("requests: lonely.default:80"),
        "{warning}"
    );
    // Nothing healthy elsewhere: draining it would be an outage.
    let unready = east.replace(
        "{addresses: [10.1.0.1]}, {addresses: [10.1.0.2]}",
        "{addresses: [10.1.0.1], conditions: {ready: false}}",
    );
    let mesh2 = mesh(vec![cluster("east", &unready), west]);
    assert_eq!(addresses(port(&mesh2, 80)), ["10.2.0.1:8080 Healthy"]);
    assert!(mesh2.warnings[0].contains("2 service ports"), "{:?}", mesh2.warnings);
}

#[test]
fn an_address_of_a_service_that_is_not_selected_is_not_another_cluster_s() {
    let vip = |selected: &str, hidden: &[(&str, u16)]| {
        let mut objects = parse(selected).unwrap();
        let addresses = hidden.iter().map(|(ip, port)| (ip.parse().unwrap(), *port)).collect();
        let hidden = crate::kubernetes::VirtualIps(addresses);
        objects.virtual_ips = Arc::new([(ObjectKey::new("default", "users"), Arc::new(hidden))].into());
        let west = Cluster { objects: Some(objects.into()), ..cluster("west", "") };
        let mesh = mesh(vec![cluster("east", SERVICE), west]);
        (port(&mesh, 80).vips.len(), mesh.warnings.len())
    };
    assert_eq!(vip("", &[("10.96.0.1", 81), ("10.96.0.2", 80)]), (1, 0));
    assert_eq!(vip("", &[("10.96.0.1", 80)]), (0, 1), "it is east's and west's: neither's");
    // The same service, which is selected.
    assert_eq!(vip(SERVICE, &[("10.96.0.1", 80)]), (1, 0));
}

#[test]
fn a_revision_may_be_an_annotation_and_a_label_that_is_nearly_true_keeps_a_pod_out() {
    let text = |label: &str, annotation: &str| {
        let pod = offloaded_pod("users-x", "10.0.0.9", "gone").replace(", culvert.dev/revision: gone", "");
        let pod = pod.replace("offloaded: 'true'", &format!("offloaded: '{label}'"));
        let pod =
            pod.replace("  labels:", &format!("  annotations: {{culvert.dev/revision: '{annotation}'}}\n  labels:"));
        [SERVICE, &slice("a", "[{addresses: [10.0.0.9]}, {addresses: [10.0.0.1]}]"), &pod].concat()
    };
    let seen = |label: &str, annotation: &str| {
        let mesh = mesh(vec![cluster("east", &text(label, annotation))]);
        let port = port(&mesh, 80);
        let revisions: Vec<_> = port.offloaded.iter().map(|endpoint| endpoint.revision.clone()).collect();
        (port.endpoints.len(), revisions, mesh.warnings)
    };
    assert_eq!(seen("true", "feature-x"), (1, vec!["feature-x".to_owned()], Vec::new()));
    let (endpoints, revisions, warnings) = seen("True", "feature-x");
    assert_eq!((endpoints, revisions.len(), warnings.len()), (1, 1, 1));
    assert!(warnings[0].contains("`True`, which is taken for `true`"), "{warnings:?}");
    let (endpoints, revisions, warnings) = seen("true", "a b");
    assert_eq!((endpoints, revisions.len(), warnings.len()), (1, 0, 1));
    assert!(warnings[0].contains("as revision `a b`, which no request can name"), "{warnings:?}");
    assert_eq!(seen("false", "feature-x").0, 2, "it is not offloaded");
}
