use super::*;
use crate::kubernetes::manifest::parse;
use crate::registry::{Cluster, SourceHealth};

fn cluster(name: &str, manifests: &str) -> Cluster {
    let info = ClusterInfo { name: name.into(), region: format!("{name}-r"), zone: format!("{name}-z") };
    Cluster { info, objects: Some(parse(manifests).unwrap().into()), health: SourceHealth::default() }
}

fn mesh(clusters: Vec<Cluster>) -> Mesh {
    join(&Registry { version: 1, clusters })
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
    assert!(mesh.warnings.iter().any(|w| w.contains("default/n") && w.contains("no label culvert.dev/revision")));
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
fn an_address_that_two_services_claim_leads_to_the_first_clusters_one() {
    let west = SERVICE.replace("name: users", "name: accounts").replace("app: users", "app: accounts");
    let mesh = mesh(vec![cluster("east", SERVICE), cluster("west", &west)]);
    assert_eq!(port(&mesh, 80).vips, ["10.96.0.1".parse::<IpAddr>().unwrap()]);
    assert_eq!(mesh.services[&ObjectKey::new("default", "accounts")].ports[&80].vips, Vec::<IpAddr>::new());
    assert_eq!(mesh.warnings.len(), 1);
    assert!(mesh.warnings[0].contains("10.96.0.1:80") && mesh.warnings[0].contains("leads to default/users"));
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
