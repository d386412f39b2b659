use std::sync::Arc;

use super::*;
use crate::kubernetes::manifest::parse;
use crate::mesh::{Mesh, join};
use crate::registry::{Cluster, ClusterInfo, Registry};

pub(crate) const FULL: &str = "
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: users}
spec:
  protocol: http2
  timeouts: {connect: 250ms, request: 1.5s, idle: 2m}
  retries: {attempts: 3, retryOn: [5xx, retriable-4xx, connect-failure], perTryTimeout: 500ms}
  circuitBreakers: {maxConnections: 10, maxPendingRequests: 20, maxRequests: 30, maxRetries: 4}
  outlierDetection: {consecutive5xx: 7, interval: 5s, baseEjectionTime: 10s, maxEjectionPercent: 50}
  rateLimit: {requests: 100, per: 1s, burst: 200}
  healthCheck: {path: /healthz, interval: 5s, timeout: 1s, unhealthyThreshold: 4, healthyThreshold: 1}
  egress: [orders, payments.shop]
";
const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: 10.96.0.11, ports: [{port: 5432}]}
";

fn spec(spec: &str) -> Result<ServiceManifest, String> {
    let text =
        format!("apiVersion: culvert.dev/v1alpha1\nkind: ServiceManifest\nmetadata: {{name: users}}\nspec: {spec}\n");
    let objects = parse(&text).map_err(|error| error.to_string())?;
    Ok(ServiceManifest::clone(&objects.manifests[&ObjectKey::new("default", "users")]))
}

fn mesh(clusters: &[&str]) -> Mesh {
    let clusters = clusters.iter().zip(["east", "west"]).map(|(text, name)| Cluster {
        info: ClusterInfo { name: name.into(), ..Default::default() },
        objects: Some(Arc::new(parse(text).unwrap())),
        health: Default::default(),
        drained: false,
    });
    let registry = Registry { version: 1, clusters: clusters.collect(), ..Default::default() };
    join(&registry)
}

#[test]
fn a_manifest_is_read() {
    let objects = parse(FULL).unwrap();
    let manifest = &objects.manifests[&ObjectKey::new("default", "users")];
    assert_eq!(manifest.protocol, Some(Protocol::Http2));
    assert_eq!(manifest.timeouts.request, Some(SpanOrZero(Duration::from_millis(1500))));
    assert_eq!(manifest.timeouts.idle, Some(Span(Duration::from_secs(120))));
    let on: Vec<_> = manifest.retries.as_ref().unwrap().retry_on.as_ref().unwrap().iter().map(|on| on.name()).collect();
    assert_eq!(on, ["5xx", "connect-failure", "retriable-4xx"]);
    let egress: Vec<_> = manifest.egress.as_ref().unwrap().0.iter().map(|name| name.seen_from("default")).collect();
    assert_eq!(egress, [ObjectKey::new("default", "orders"), ObjectKey::new("shop", "payments")]);
    assert_eq!(spec("{}"), Ok(ServiceManifest::default()));
    assert_eq!(spec("{timeouts: {request: 0s}}").unwrap().timeouts.request, Some(SpanOrZero(Duration::ZERO)));
}

#[test]
fn what_is_wrong_is_named_with_its_field() {
    for (text, field, reason) in [
        ("{timeout: {}}", "spec.timeout", "unknown field `timeout`"),
        ("{protocol: quic}", "spec.protocol", "`quic` is not tcp, http, http2 or grpc"),
        ("{timeouts: {request: 15}}", "spec.timeouts.request", "expected a string"),
        ("{timeouts: {request: 15x}}", "spec.timeouts.request", "`15x` is not a time such as 250ms"),
        ("{timeouts: {request: -1s}}", "spec.timeouts.request", "is not a time"),
        ("{timeouts: {request: 25h}}", "spec.timeouts.request", "of at most 24h"),
        ("{timeouts: {request: 1..5s}}", "spec.timeouts.request", "is not a time"),
        ("{timeouts: {connect: 0s}}", "spec.timeouts.connect", "a time above zero is needed"),
        ("{retries: {attempts: 300}}", "spec.retries.attempts", "300"),
        ("{retries: {attempts: 1, retryOn: [sometimes]}}", "spec.retries.retryOn[0]", "unknown variant `sometimes`"),
        ("{rateLimit: {requests: 0, per: 1s}}", "spec.rateLimit.requests", "a number above 0"),
        ("{rateLimit: {requests: 1, per: 1ms}}", "spec.rateLimit.per", "at least 50ms is needed"),
        ("{rateLimit: {requests: 1}}", "spec.rateLimit", "missing field `per`"),
        ("{outlierDetection: {maxEjectionPercent: 101}}", "spec.outlierDetection.maxEjectionPercent", "more than 100"),
        ("{healthCheck: {path: healthz, interval: 1s, timeout: 1s}}", "spec.healthCheck.path", "begins with `/`"),
        ("{edge: {domains: []}}", "spec.edge.domains", "without a host name"),
        ("{edge: {domains: [a.example, 'a.example:80']}}", "spec.edge.domains", "`a.example:80` is not a host name"),
        ("{edge: {domains: ['a.*']}}", "spec.edge.domains", "`a.*` is not a host name"),
        ("{edge: {domains: [a], prefix: /a/}}", "spec.edge.prefix", "does not end with it"),
        ("{edge: {domains: [a], prefix: a}}", "spec.edge.prefix", "begins with `/`"),
        ("{edge: {domains: [a], port: 0}}", "spec.edge.port", "a number above 0"),
        ("{edge: {domains: [a], port: 70000}}", "spec.edge.port", "a number above 0 and at most 65535"),
        ("{egress: [orders, 'a..c']}", "spec.egress[1]", "`a..c` is not a service"),
    ] {
        let error = spec(text).unwrap_err();
        assert!(error.starts_with(&format!("ServiceManifest default/users: {field}")), "{error} does not name {field}");
        assert!(error.contains(reason), "{error} does not say {reason}");
    }
}

#[test]
fn the_first_cluster_s_manifest_counts_and_what_cannot_hold_is_said() {
    let other = FULL.replace("attempts: 3", "attempts: 2");
    let mesh = mesh(&[&format!("{SERVICES}---{FULL}"), &format!("{other}---{}", FULL.replace("users", "nobody"))]);
    let users = &mesh.services[&ObjectKey::new("default", "users")];
    assert_eq!(users.ports[&80].protocol, Protocol::Http2);
    assert_eq!(users.manifest.as_ref().unwrap().retries.as_ref().unwrap().attempts, 3);
    assert_eq!(
        mesh.warnings,
        [
            "ServiceManifest default/users: spec.egress names default/orders, which is no service of the mesh: what goes there \
             is passed through",
            "ServiceManifest default/users: spec.egress names shop/payments, which is no service of the mesh: what goes there \
             is passed through",
            "ServiceManifest default/nobody: spec.egress names default/orders, which is no service of the mesh: what goes there \
             is passed through",
            "ServiceManifest default/nobody: spec.egress names shop/payments, which is no service of the mesh: what goes there \
             is passed through",
            "ServiceManifest default/nobody is of no service: there is none of this name, so only spec.egress and spec.onDemand \
             of it hold, for proxies of that name",
            "ServiceManifest default/users is another one in cluster west than in cluster east, which counts",
        ]
    );
    let tcp = "
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: db}
spec: {retries: {attempts: 1}, rateLimit: {requests: 1, per: 1s}, timeouts: {connect: 1s}}
";
    let warning =
        "ServiceManifest default/db: spec.retries and spec.rateLimit cannot hold for port 5432, which speaks tcp";
    assert_eq!(super::tests::mesh(&[&format!("{SERVICES}---{tcp}")]).warnings, [warning]);
}

#[test]
fn a_service_that_is_kept_apart_has_the_manifest_of_its_own_cluster() {
    let text = format!("{SERVICES}---{FULL}");
    let cluster = |name: &str, text: &str, apart| Cluster {
        info: ClusterInfo { name: name.into(), apart, ..Default::default() },
        objects: Some(Arc::new(parse(text).unwrap())),
        health: Default::default(),
        drained: false,
    };
    let clusters = vec![cluster("east", SERVICES, false), cluster("west", &text, true)];
    let registry = Registry { version: 1, clusters, ..Default::default() };
    let mesh = join(&registry);
    let has = |namespace: &str| mesh.services[&ObjectKey::new(namespace, "users")].manifest.is_some();
    assert_eq!((has("default"), has("default.west")), (false, true));
    let of_manifests = |warning: &&String| warning.contains("ServiceManifest") && !warning.contains("spec.egress");
    assert_eq!(mesh.warnings.iter().find(of_manifests), None);
    // Both clusters have the same addresses: neither of the services is found by them.
    assert!(mesh.services.values().all(|service| service.ports.values().all(|port| port.vips.is_empty())));
}

#[test]
fn what_pods_may_call_is_the_sum_of_what_their_services_may() {
    let key = |name: &str| ObjectKey::new("default", name);
    let db = "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: db}
spec: {egress: []}
";
    let mesh = mesh(&[&format!("{SERVICES}---{FULL}{db}")]);
    let of = |names: &[&str]| egress_of(&mesh, &names.iter().map(|name| key(name)).collect());
    assert_eq!(of(&["db"]), Some(BTreeSet::from([key("db")])));
    let both = BTreeSet::from([key("db"), key("users"), key("orders"), ObjectKey::new("shop", "payments")]);
    assert_eq!(of(&["db", "users"]), Some(both));
    // Whoever states nothing, or is not known, may call all.
    assert_eq!(of(&[]), None);
    assert_eq!(of(&["db", "nobody"]), None);
}

#[test]
fn an_egress_holds_for_pods_of_no_service_too() {
    let front = "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: front}
spec: {egress: [users, nobody], onDemand: true}
";
    let mesh = |front: &str| super::tests::mesh(&[&format!("{SERVICES}{front}")]);
    let key = |name: &str| ObjectKey::new("default", name);
    let callers = BTreeSet::from([key("front")]);
    let found = mesh(front);
    assert_eq!(egress_of(&found, &callers), Some(BTreeSet::from([key("front"), key("users"), key("nobody")])));
    assert!(is_rest_on_demand(&found, &callers) && !found.services.contains_key(&key("front")));
    assert!(found.warnings.len() == 1 && found.warnings[0].contains("names default/nobody"), "{:?}", found.warnings);
    // What cannot hold is said.
    let more = mesh(&front.replace(", onDemand: true", ", timeouts: {connect: 1s}"));
    let of_none = "is of no service: there is none of this name, so only spec.egress and spec.onDemand";
    assert!(more.warnings.iter().any(|warning| warning.contains(of_none)), "{:?}", more.warnings);
    // A service of that name is what the manifest is of, and has its endpoints among those that are given.
    let service = SERVICES.replace("name: db", "name: front");
    let of_service = super::tests::mesh(&[&format!("{service}{front}")]);
    assert!(of_service.callers.is_empty());
    assert_eq!(egress_of(&of_service, &callers), egress_of(&found, &callers));
}
