use envoy_types::pb::envoy::config::core::v3::Locality as LocalityMessage;
use envoy_types::pb::envoy::config::core::v3::health_check::HealthChecker;
use envoy_types::pb::envoy::service::health::v3::{ClusterEndpointsHealth, EndpointHealth, LocalityEndpointsHealth};

use super::*;
use crate::kubernetes::manifest::parse;
use crate::mesh::join;
use crate::registry::{Cluster, ClusterInfo, Registry};
use crate::resources::socket_address;

const USERS: &str = "users.default:80";
const SECOND: Duration = Duration::from_secs(1);

/// `users` with endpoints at these addresses, in these zones, and a second service without any.
fn mesh(endpoints: &[(&str, &str)], check: &str) -> Mesh {
    let listed: Vec<_> =
        endpoints.iter().map(|(address, zone)| format!("{{addresses: [{address}], zone: {zone}}}")).collect();
    let text = format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: users}}
spec: {{clusterIP: 10.96.0.1, ports: [{{name: http, port: 80}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: front}}
spec: {{clusterIP: 10.96.0.2, ports: [{{name: http, port: 80}}]}}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: front}}
spec: {{egress: []}}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: users}}
spec: {{healthCheck: {{{check} interval: 2s, timeout: 1s}}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: users-1, labels: {{kubernetes.io/service-name: users}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{}]
",
        listed.join(", ")
    );
    let info = ClusterInfo { name: "east".into(), region: "eu".into(), ..Default::default() };
    let objects = Some(Arc::new(parse(&text).unwrap()));
    let cluster = Cluster { info, objects, health: Default::default(), drained: false };
    join(&Registry { version: 1, clusters: vec![cluster], ..Default::default() })
}

fn checks(checkers: usize) -> Checks {
    Checks::new(Settings { interval: SECOND, checkers })
}

fn node(id: &str, zone: &str, cluster: &str) -> Node {
    let locality = LocalityMessage { region: "eu".into(), zone: zone.into(), ..Default::default() };
    Node { id: id.into(), cluster: cluster.into(), locality: Some(locality), ..Default::default() }
}

fn join_at(checks: &Checks, node: &Node, now: Instant) -> CheckerHandle {
    let protocols = [Protocol::Http, Protocol::Tcp].map(i32::from);
    checks.join_at(node, crate::server::viewer(node), &Capability { health_check_protocols: protocols.into() }, now)
}

fn join_as(checks: &Checks, node: &Node) -> CheckerHandle {
    join_at(checks, node, Instant::now())
}

/// What a checker was told to check, by Envoy cluster and address.
fn told(checker: &CheckerHandle) -> Vec<String> {
    let specifier = checker.specifiers.borrow().clone();
    let clusters = specifier.iter().flat_map(|specifier| &specifier.cluster_health_checks);
    let endpoints = clusters.flat_map(|cluster| {
        let endpoints = cluster.locality_endpoints.iter().flat_map(|locality| &locality.endpoints);
        endpoints.map(|endpoint| format!("{} {}", cluster.cluster_name, address_of(endpoint).unwrap().ip()))
    });
    endpoints.collect()
}

fn said(address: &str, status: HealthStatus) -> EndpointHealthResponse {
    let endpoint =
        Endpoint { address: Some(socket_address(address.parse().unwrap(), 8080, false)), ..Default::default() };
    let health = EndpointHealth { endpoint: Some(endpoint), health_status: status.into(), ..Default::default() };
    let locality = LocalityEndpointsHealth { endpoints_health: vec![health], ..Default::default() };
    EndpointHealthResponse {
        cluster_endpoints_health: vec![ClusterEndpointsHealth {
            cluster_name: USERS.into(),
            locality_endpoints_health: vec![locality],
        }],
        ..Default::default()
    }
}

/// The addresses of the endpoints that do not work.
fn failed(checks: &Checks) -> Vec<String> {
    checks.failed().0.values().flatten().map(|(_, address)| address.ip().to_string()).collect()
}

#[test]
fn most_of_those_who_know_have_to_say_so() {
    let (checks, mesh, start) = (checks(3), mesh(&[("10.1.0.1", "a")], "path: /healthz,"), Instant::now());
    let checkers = ["one", "two", "three"].map(|id| join_as(&checks, &node(id, "a", "")));
    checks.divide(&mesh, start);
    for checker in &checkers {
        assert_eq!(told(checker), ["users.default:80 10.1.0.1"]);
    }
    let later = start + 10 * SECOND;
    let say = |index: usize, status| checks.report(&checkers[index].name, &said("10.1.0.1", status), later);
    say(0, HealthStatus::Healthy);
    assert_eq!(failed(&checks), [""; 0]);
    say(1, HealthStatus::Unhealthy);
    assert_eq!(failed(&checks), [""; 0], "one of two");
    say(2, HealthStatus::Timeout);
    assert_eq!(failed(&checks), ["10.1.0.1"], "two of three");
    assert_eq!(*checks.watch().borrow(), 1);
    say(2, HealthStatus::Unknown);
    assert_eq!(failed(&checks), ["10.1.0.1"], "who says nothing changes nothing");
    say(2, HealthStatus::Degraded);
    assert_eq!(failed(&checks), [""; 0], "degraded is not broken");
    let status = checks.status();
    assert_eq!((status.len(), status[2].node.as_str(), status[2].failed), (3, "two", 1), "{status:?}");
}

#[test]
fn what_has_not_been_checked_yet_is_not_believed_to_be_broken() {
    let (checks, mesh, start) = (checks(1), mesh(&[("10.1.0.1", "a")], ""), Instant::now());
    let checker = join_as(&checks, &node("one", "a", ""));
    checks.divide(&mesh, start);
    // A timeout, an interval and a report later it must have been.
    let bad = said("10.1.0.1", HealthStatus::Unhealthy);
    checks.report(&checker.name, &bad, start + SECOND);
    assert_eq!(failed(&checks), [""; 0]);
    checks.report(&checker.name, &bad, start + 5 * SECOND);
    assert_eq!(failed(&checks), ["10.1.0.1"]);
    // What was not given counts for nothing.
    checks.report(&checker.name, &said("10.1.0.9", HealthStatus::Unhealthy), start + 5 * SECOND);
    assert_eq!((failed(&checks), checks.counts()), (vec!["10.1.0.1".to_owned()], (3, 1)));
}

#[test]
fn who_is_silent_or_gone_counts_a_while_longer() {
    let (checks, mesh, start) = (checks(1), mesh(&[("10.1.0.1", "a")], ""), Instant::now());
    let checker = join_as(&checks, &node("one", "a", ""));
    checks.divide(&mesh, start);
    let bad = said("10.1.0.1", HealthStatus::Unhealthy);
    let at = |seconds: u32| start + seconds * SECOND;
    checks.report(&checker.name, &bad, at(5));
    checks.divide(&mesh, at(7));
    assert_eq!(failed(&checks), ["10.1.0.1"]);
    checks.divide(&mesh, at(9));
    assert_eq!(failed(&checks), ["10.1.0.1"], "it is found to be silent");
    checks.divide(&mesh, at(12));
    assert_eq!(failed(&checks), [""; 0], "nobody knows any more");
    // It comes back as if nothing had been.
    checks.report(&checker.name, &bad, at(13));
    assert_eq!(failed(&checks), ["10.1.0.1"]);
    // Its stream is gone, and so is what it said when the same node does not come back in time.
    let name = Arc::clone(&checker.name);
    drop(checker);
    checks.divide(&mesh, at(14));
    let again = join_at(&checks, &node("one", "a", ""), at(14));
    checks.divide(&mesh, at(15));
    checks.report(&name, &bad, at(30));
    checks.divide(&mesh, at(31));
    assert_eq!(failed(&checks), ["10.1.0.1"], "it was away for a moment only");
    drop(again);
    checks.divide(&mesh, at(32));
    checks.divide(&mesh, at(36));
    assert_eq!((failed(&checks), checks.status()), (vec![], vec![]));
    // An endpoint that is gone is forgotten at once.
    let last = join_at(&checks, &node("one", "a", ""), at(40));
    checks.divide(&mesh, at(40));
    checks.report(&last.name, &bad, at(50));
    assert_eq!(failed(&checks), ["10.1.0.1"]);
    checks.divide(&super::tests::mesh(&[("10.1.0.2", "a")], ""), at(50));
    assert_eq!(failed(&checks), [""; 0]);
}

#[test]
fn work_goes_to_those_near_who_may_know_and_can() {
    let near = [("10.1.0.1", "a"), ("10.1.0.2", "b")];
    let (checks, mesh, now) = (checks(1), mesh(&near, "path: /healthz,"), Instant::now());
    let (a, b) = (join_as(&checks, &node("a", "a", "")), join_as(&checks, &node("b", "b", "")));
    // Of pods that may not call users, and of a proxy that cannot check by HTTP.
    let front = join_as(&checks, &node("front", "a", "front"));
    let old = node("old", "a", "");
    let old = checks.join(&old, crate::server::viewer(&old), &Capability::default());
    checks.divide(&mesh, now);
    assert_eq!((told(&a), told(&b)), (vec![format!("{} 10.1.0.1", USERS)], vec![format!("{} 10.1.0.2", USERS)]));
    assert_eq!((told(&front).len(), told(&old).len()), (0, 0));
    let specifier = a.specifiers.borrow().clone().unwrap();
    let check = &specifier.cluster_health_checks[0].health_checks[0];
    assert!(matches!(&check.health_checker, Some(HealthChecker::HttpHealthCheck(http)) if http.path == "/healthz"));
    assert_eq!((check.no_traffic_interval, specifier.interval.unwrap().seconds), (check.interval, 1));
    // Who goes leaves its work to others.
    drop(b);
    checks.divide(&mesh, now);
    assert_eq!(told(&a).len(), 2);
    // Work that callers do is nobody's here.
    checks.divide(&super::tests::mesh(&near, "by: callers,"), now);
    assert_eq!(told(&a), [""; 0]);
}

#[test]
fn work_is_divided_evenly_and_moves_little() {
    let addresses: Vec<_> = (0..1000).map(|i| format!("10.1.{}.{}", i / 250, i % 250)).collect();
    let endpoints: Vec<_> = addresses.iter().map(|address| (address.as_str(), "a")).collect();
    let (checks, mesh, now) = (checks(2), mesh(&endpoints, ""), Instant::now());
    let mut checkers: Vec<_> = (0..10).map(|i| join_as(&checks, &node(&format!("n{i}"), "a", ""))).collect();
    checks.divide(&mesh, now);
    let before: Vec<BTreeSet<_>> = checkers.iter().map(|checker| told(checker).into_iter().collect()).collect();
    assert_eq!(before.iter().map(BTreeSet::len).sum::<usize>(), 2000, "each twice");
    for part in &before {
        assert!((80..400).contains(&part.len()), "{}", part.len());
    }
    checkers.push(join_as(&checks, &node("n10", "a", "")));
    checks.divide(&mesh, now);
    let moved: usize = checkers
        .iter()
        .zip(&before)
        .map(|(checker, part)| part.difference(&told(checker).into_iter().collect()).count())
        .sum();
    assert_eq!(moved, told(&checkers[10]).len(), "only what the new one does");
}

#[test]
fn endpoints_that_do_not_work_are_marked_unless_they_drain() {
    let mesh = mesh(&[("10.1.0.1", "a"), ("10.1.0.2", "a")], "");
    let key = ObjectKey::new("default", "users");
    let mut service = MeshService::clone(&mesh.services[&key]);
    service.ports.get_mut(&80).unwrap().endpoints[1].health = Health::Draining;
    let mut failed = Failed::default();
    for address in ["10.1.0.1:8080", "10.1.0.2:8080", "10.1.0.3:8080"] {
        let address = address.parse().unwrap();
        assert!(failed.set(&Target { service: key.clone(), port: 80, address }, true));
    }
    failed.mark(&key, &mut service);
    let health: Vec<_> = service.ports[&80].endpoints.iter().map(|endpoint| endpoint.health).collect();
    assert_eq!(health, [Health::Unhealthy, Health::Draining]);
    assert_eq!(failed.differing(&Failed::default()).collect::<Vec<_>>(), [key]);
}
