use std::collections::BTreeMap;
use std::net::IpAddr;

use super::*;
use crate::kubernetes::{ObjectKey, ServicePort, SliceEndpoint, TargetPort};

fn service(ports: &str) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: users}}, spec: {{clusterIP: 10.0.0.1, ports: {ports}}}}}"
    )
}

fn slice(address_type: &str, endpoint: &str) -> String {
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: {address_type}, endpoints: [{endpoint}],
          ports: [{{name: http, port: 80}}],
          metadata: {{name: users-1, labels: {{kubernetes.io/service-name: users}}}}}}"
    )
}

fn endpoint(text: &str) -> SliceEndpoint {
    let objects = parse(&slice("IPv4", text)).unwrap();
    objects.slices[&ObjectKey::new("default", "users-1")].endpoints[0].clone()
}

#[test]
fn a_service_is_read() {
    let text = r#"
apiVersion: v1
kind: Service
metadata: {name: users, namespace: shop, annotations: {culvert.dev/weight: '50', culvert.dev/merge: 'false', x: y}}
spec:
  type: ClusterIP
  clusterIP: 10.0.0.1
  clusterIPs: [10.0.0.1, "fd00::1"]
  selector: {app: users}
  ports:
  - {name: http, port: 80, targetPort: web, appProtocol: http}
  - {name: dns, port: 53, protocol: UDP}
  - {name: grpc, port: 90}
"#;
    let objects = parse(text).unwrap();
    let port = |name: &str, port, target_port, app_protocol: Option<&str>| ServicePort {
        name: name.into(),
        port,
        target_port,
        app_protocol: app_protocol.map(str::to_owned),
    };
    let expected = Service {
        cluster_ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        prefers_ipv6: false,
        ports: vec![
            port("http", 80, TargetPort::Name("web".into()), Some("http")),
            port("grpc", 90, TargetPort::Number(90), None),
        ],
        selector: BTreeMap::from([("app".into(), "users".into())]),
        external_name: None,
        publish_not_ready: false,
        weight: Some(50),
        merge: Some(false),
        stays_out: false,
    };
    assert_eq!(*objects.services, BTreeMap::from([(ObjectKey::new("shop", "users"), Arc::new(expected))]));
}

#[test]
fn headless_services_have_no_address_and_external_ones_a_name() {
    let headless = service("[{port: 80}]").replace("10.0.0.1", "None");
    assert_eq!(parse(&headless).unwrap().services.values().next().unwrap().cluster_ips, Vec::<IpAddr>::new());
    let external = service("[]").replace("clusterIP: 10.0.0.1", "type: ExternalName, externalName: example.org");
    let external = parse(&external).unwrap();
    assert_eq!(external.services.values().next().unwrap().external_name.as_deref(), Some("example.org"));
    let families = headless.replace("clusterIP", "ipFamilies: [IPv6, IPv4], clusterIP");
    assert!(parse(&families).unwrap().services.values().next().unwrap().prefers_ipv6);
}

#[test]
fn pods_that_will_go_are_leaving_before_they_do() {
    let pod = |metadata: &str, status: &str| {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, uid: u1{metadata}}}, status: {{podIP: 10.0.0.9{status}}}}}"
        );
        let pod = parse(&text).unwrap().pods[&ObjectKey::new("default", "a")].clone();
        (pod.leaving, pod.ended, pod.matters())
    };
    assert_eq!(pod("", ", conditions: [{type: Ready, status: 'True'}]"), (false, false, false));
    assert_eq!(pod(", deletionTimestamp: '2024-01-01T00:00:00Z'", ""), (true, false, true));
    assert_eq!(pod("", ", conditions: [{type: DisruptionTarget, status: 'True'}]"), (true, false, true));
    assert_eq!(pod("", ", conditions: [{type: DisruptionTarget, status: 'False'}]"), (false, false, false));
    assert_eq!(pod("", ", phase: Succeeded"), (false, true, true));
    assert_eq!(pod(", annotations: {culvert.dev/weight: '0'}", ""), (false, false, true));
}

#[test]
fn nodes_are_places() {
    let text = "{apiVersion: v1, kind: Node, metadata: {name: n1.example, labels: {topology.kubernetes.io/zone: z}}}";
    let node = Node { region: String::new(), zone: "z".into() };
    assert_eq!(*parse(text).unwrap().nodes, BTreeMap::from([(ObjectKey::new("", "n1.example"), Arc::new(node))]));
}

#[test]
fn absent_conditions_have_their_documented_meaning() {
    let conditions = |text: &str| {
        let SliceEndpoint { ready, serving, terminating, .. } = endpoint(&format!("{{addresses: [10.0.0.2]{text}}}"));
        (ready, serving, terminating)
    };
    assert_eq!(conditions(""), (true, true, false));
    assert_eq!(conditions(", conditions: {}"), (true, true, false));
    assert_eq!(conditions(", conditions: {ready: null}"), (true, true, false));
    assert_eq!(conditions(", conditions: {ready: false}"), (false, false, false));
    assert_eq!(conditions(", conditions: {ready: false, serving: true, terminating: true}"), (false, true, true));
}

#[test]
fn only_the_first_address_of_an_endpoint_counts() {
    assert_eq!(endpoint("{addresses: [10.0.0.2, 10.0.0.3]}").address, "10.0.0.2".parse::<IpAddr>().unwrap());
}

#[test]
fn target_references_lead_to_pods_only() {
    let pod = endpoint("{addresses: [10.0.0.2], targetRef: {kind: Pod, name: a, uid: u1}}");
    assert_eq!((pod.pod, pod.target_uid.as_deref()), (Some(ObjectKey::new("default", "a")), Some("u1")));
    let node = endpoint("{addresses: [10.0.0.2], targetRef: {kind: Node, name: a}}");
    assert_eq!(node.pod, None);
}

#[test]
fn pods_are_ready_unless_something_says_otherwise() {
    let ready = |metadata: &str, status: &str| {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a{metadata}}}, status: {{podIP: 10.0.0.9{status}}}}}"
        );
        parse(&text).unwrap().pods[&ObjectKey::new("default", "a")].ready
    };
    assert!(ready("", ""));
    assert!(ready("", ", phase: Running, conditions: [{type: Ready, status: 'True'}]"));
    assert!(!ready("", ", conditions: [{type: Ready, status: 'False'}]"));
    assert!(!ready("", ", phase: Failed"));
    assert!(!ready(", deletionTimestamp: '2024-01-01T00:00:00Z'", ""));
}

#[test]
fn lists_are_unpacked_and_other_kinds_passed_over() {
    let text = format!(
        "apiVersion: v1\nkind: List\nitems:\n- {}\n- {{apiVersion: apps/v1, kind: Deployment, metadata: {{name: x}}}}\n---\n\
         # an empty document\n---\n{{apiVersion: example.org/v1, kind: Service, anything: goes}}\n",
        service("[{port: 80}]").replace('\n', " ")
    );
    let objects = parse(&text).unwrap();
    assert_eq!((objects.services.len(), objects.slices.len(), objects.pods.len()), (1, 0, 0));
    assert_eq!(parse("").unwrap(), Objects::default());
}

#[test]
fn json_is_read_too() {
    let text = r#"{"apiVersion":"v1","kind":"Service","metadata":{"name":"a"},"spec":{"ports":[{"port":80}]}}"#;
    assert_eq!(parse(text).unwrap().services.len(), 1);
}

#[test]
fn mistakes_are_named_with_object_and_field() {
    let pod = |status: &str| format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, status: {{{status}}}}}");
    let cases = [
        (service("[{port: 70000}]"), "Service default/users: spec.ports[0].port: port 70000 is out of range"),
        (service("[{port: 0}]"), "spec.ports[0].port: port 0 is out of range"),
        (service("[{port: 80, targetPort: -1}]"), "spec.ports[0].targetPort: port -1 is out of range"),
        (service("[{port: eighty}]"), "Service default/users: spec.ports[0].port: invalid type"),
        (service("[{port: 80, protocol: ICMP}]"), "spec.ports[0].protocol: `ICMP` is not TCP, UDP or SCTP"),
        (service("[{name: x}]"), "Service default/users: spec.ports[0]: missing field `port`"),
        (service("[]").replace("10.0.0.1", "10.0.0"), "spec.clusterIP: `10.0.0` is not an IPv4 or IPv6 address"),
        (service("[]").replace("name: users", "name: a.b"), "cannot contain `.`"),
        (service("[]").replace("name: users", "name: Users"), "metadata.name: `Users` is not a Kubernetes name"),
        (
            service("[]").replace("name: users", "labels: {}"),
            "Service default/(no name): metadata: missing field `name`",
        ),
        (
            slice("IPv4", "{addresses: [example.org]}"),
            "EndpointSlice default/users-1: endpoints[0].addresses[0]: `example.org`",
        ),
        (
            service("[]").replace("name: users", "name: users, annotations: {culvert.dev/weight: '-1'}"),
            "metadata.annotations.culvert.dev/weight: `-1` is not a whole number from 0 to 1000",
        ),
        (
            service("[]").replace("name: users", "name: users, annotations: {culvert.dev/merge: 'no'}"),
            "metadata.annotations.culvert.dev/merge: `no` is neither",
        ),
        (service("[]").replace("clusterIP", "type: ExternalName, clusterIP"), "spec.externalName: `` is not the name"),
        (slice("IPv6", "{addresses: [10.0.0.1]}"), "`10.0.0.1` is not of the slice's addressType IPv6"),
        (slice("IPv4", "{addresses: []}"), "endpoints[0].addresses: is empty"),
        (slice("IPX", ""), "addressType: `IPX` is not IPv4, IPv6 or FQDN"),
        (slice("IPv4", "").replace("80", "65536"), "ports[0].port: port 65536 is out of range"),
        (pod("podIP: 1.2.3"), "Pod default/a: status.podIP: `1.2.3`"),
        (pod("podIPs: [{ip: x}]"), "Pod default/a: status.podIPs[0].ip: `x`"),
        (
            "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {culvert.dev/offloaded: true}}}".into(),
            "Pod default/a: metadata.labels.culvert.dev/offloaded: invalid type: boolean `true`, expected a string",
        ),
        (format!("{}\n---\n{}", service("[]"), service("[]")), "Service default/users is defined twice in this file"),
        ("just text".into(), "document 1: not a Kubernetes object"),
        ("kind: Service".into(), "document 1: apiVersion is missing"),
        ("a: [".into(), "not valid YAML"),
        ("a: 1\na: 2".into(), "duplicate mapping key"),
    ];
    for (text, expected) in cases {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not contain {expected:?}");
        assert!(!error.contains('\n'), "more than one line: {error:?}");
    }
}

#[test]
fn ports_of_sidecars_have_names_too() {
    let text = "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {culvert.dev/offloaded: 'true'}}, spec: {containers: [{ports: \
                [{name: admin, containerPort: 1}]}], initContainers: [{ports: [{name: once, containerPort: 2}]}, {restartPolicy: Always, \
                ports: [{name: web, containerPort: 80}, {name: admin, containerPort: 3}]}]}}";
    let ports = |text: &str| parse(text).unwrap().pods.values().next().unwrap().ports.clone();
    assert!(ports(text).into_iter().eq([("admin".to_owned(), 1), ("web".to_owned(), 80)]), "{:?}", ports(text));
    let error = parse(&text.replace("80", "80000")).unwrap_err().to_string();
    assert!(error.contains("spec.initContainers[1].ports[0].containerPort"), "{error}");
}

#[test]
fn hostile_yaml_is_bounded() {
    let started = std::time::Instant::now();
    // Ten levels of ten aliases each would be ten billion nodes.
    let mut bomb = "a0: &a0 [x, x]\n".to_owned();
    for level in 1..11 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
    }
    assert!(parse(&bomb).is_err());
    assert!(parse(&"[".repeat(100_000)).is_err());
    assert!(parse(&format!("{}{}", "{apiVersion: v1, kind: List, items: [".repeat(20), "]}".repeat(20))).is_ok());
    assert!(started.elapsed() < std::time::Duration::from_secs(5));
}
