use std::collections::BTreeSet;
use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Duration;
use prost::Message as _;

use super::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE};
use super::*;

const OTHER: &str = "type.googleapis.com/culvert.overrides.v1.OffloadedService";

pub(super) fn core(variant: Variant) -> Core {
    Core::new(Node { id: "node".to_owned(), ..Default::default() }, variant)
}

pub(super) fn names(names: &[&str]) -> Interest {
    Interest::Names(names.iter().map(|name| (*name).to_owned()).collect())
}

/// A resource of any type: field 1 is the name in all of them. Differs from version to version.
pub(super) fn body(type_url: &str, name: &str, version: &str) -> Any {
    let bytes =
        Cluster { name: name.to_owned(), alt_stat_name: version.to_owned(), ..Default::default() }.encode_to_vec();
    Any { type_url: type_url.to_owned(), value: bytes }
}

pub(super) fn sotw(type_url: &str, version: &str, nonce: &str, names: &[&str]) -> Response {
    Response::Sotw(DiscoveryResponse {
        version_info: version.to_owned(),
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources: names.iter().map(|name| body(type_url, name, version)).collect(),
        ..Default::default()
    })
}

/// `added` as name@version.
pub(super) fn delta(type_url: &str, nonce: &str, added: &[&str], removed: &[&str]) -> Response {
    let resource = |added: &&str| {
        let (name, version) = added.split_once('@').unwrap();
        Wrapper {
            name: name.to_owned(),
            version: version.to_owned(),
            resource: Some(body(type_url, name, version)),
            ..Default::default()
        }
    };
    Response::Delta(DeltaDiscoveryResponse {
        type_url: type_url.to_owned(),
        nonce: nonce.to_owned(),
        resources: added.iter().map(resource).collect(),
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    })
}

/// A request in one line: type, version, names or changes, nonce, error.
pub(super) fn show(request: &Request) -> String {
    let short = |type_url: &str| type_url.rsplit('.').next().unwrap().to_owned();
    let sorted = |names: &[String]| {
        let mut names = names.to_vec();
        names.sort();
        names.join(",")
    };
    match request {
        Request::Sotw(r) => {
            let node = if r.node.is_some() { " node" } else { "" };
            let error = r.error_detail.as_ref().map(|e| format!(" error={:?}", e.message)).unwrap_or_default();
            let (version, names) = (&r.version_info, sorted(&r.resource_names));
            format!("{}{node} v={version} names={names} nonce={}{error}", short(&r.type_url), r.response_nonce)
        }
        Request::Delta(r) => {
            let node = if r.node.is_some() { " node" } else { "" };
            let error = r.error_detail.as_ref().map(|e| format!(" error={:?}", e.message)).unwrap_or_default();
            let initial: BTreeSet<_> =
                r.initial_resource_versions.iter().map(|(name, version)| format!("{name}@{version}")).collect();
            let initial = initial.into_iter().collect::<Vec<_>>().join(",");
            let (add, remove) = (sorted(&r.resource_names_subscribe), sorted(&r.resource_names_unsubscribe));
            format!("{}{node} +{add} -{remove} have={initial} nonce={}{error}", short(&r.type_url), r.response_nonce)
        }
    }
}

/// Asserts what the core sends next.
macro_rules! sends {
    ($core:expr, $($line:expr),* $(,)?) => {
        let sent: Vec<String> = $core.outgoing().iter().map(show).collect();
        let expected: Vec<String> = vec![$($line.to_string()),*];
        assert_eq!(sent, expected);
    };
}

/// Handles a response, asserts what is handed out as added and removed names, and finishes it with the rejections.
macro_rules! update {
    ($core:expr, $response:expr, added $added:expr, removed $removed:expr $(, rejects $rejected:expr)?) => {{
        let Handled::Update(token, update) = $core.handle($response, Instant::now()) else { panic!("ignored") };
        let added: Vec<&str> = update.added.iter().map(|resource| resource.name.as_str()).collect();
        let expected: [&str; _] = $added;
        assert_eq!(added, expected, "added");
        let expected: [&str; _] = $removed;
        assert_eq!(update.removed, expected, "removed");
        #[allow(unused_mut, unused_assignments, reason = "rejections are optional")]
        let mut outcome = Outcome::default();
        $(outcome.rejected = reject(&$rejected);)?
        $core.finish(token, outcome)
    }};
}

pub(super) fn reject(names: &[&str]) -> Vec<Rejection> {
    names.iter().map(|name| Rejection { name: (*name).to_owned(), message: "bad".to_owned() }).collect()
}

#[test]
fn asks_in_order_with_the_node_once() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut core = core(variant);
        core.set_interest(OTHER, Interest::Wildcard);
        core.set_interest(ROUTE, names(&["r"]));
        core.set_interest(LISTENER, Interest::Wildcard);
        core.set_interest(ENDPOINT, names(&["a", "b"]));
        core.set_interest(CLUSTER, Interest::Wildcard);
        core.set_interest("never", Interest::None);
        assert_eq!(core.outgoing(), [], "there is no stream");
        core.connected();
        match variant {
            Variant::Sotw => {
                sends!(
                    core,
                    "Cluster node v= names= nonce=",
                    "ClusterLoadAssignment v= names=a,b nonce=",
                    "Listener v= names= nonce=",
                    "RouteConfiguration v= names=r nonce=",
                    "OffloadedService v= names= nonce=",
                );
            }
            Variant::Delta => {
                sends!(
                    core,
                    "Cluster node + - have= nonce=",
                    "ClusterLoadAssignment +a,b - have= nonce=",
                    "Listener + - have= nonce=",
                    "RouteConfiguration +r - have= nonce=",
                    "OffloadedService + - have= nonce=",
                );
            }
        }
        sends!(core,);
    }
}

#[test]
fn sotw_acknowledges_only_what_was_finished() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    let Handled::Update(token, update) = core.handle(sotw(CLUSTER, "1", "n1", &["a"]), Instant::now()) else {
        panic!("ignored")
    };
    assert!(update.complete);
    sends!(core,);
    core.set_interest(ENDPOINT, names(&["a"]));
    core.finish(token, Outcome::default());
    sends!(core, "Cluster v=1 names= nonce=n1", "ClusterLoadAssignment v= names=a nonce=");
}

#[test]
fn sotw_removes_absent_clusters_and_listeners_and_keeps_endpoints_and_routes() {
    for (type_url, removed) in
        [(CLUSTER, vec!["a", "b"]), (LISTENER, vec!["a", "b"]), (ENDPOINT, vec![]), (ROUTE, vec![])]
    {
        for interest in [names(&["a", "b", "c"]), Interest::Wildcard] {
            let wildcard = interest == Interest::Wildcard;
            let mut core = core(Variant::Sotw);
            core.set_interest(type_url, interest);
            core.connected();
            core.outgoing();
            update!(core, sotw(type_url, "1", "1", &["a", "b"]), added ["a", "b"], removed []);
            let Handled::Update(_, update) = core.handle(sotw(type_url, "2", "2", &[]), Instant::now()) else {
                panic!("ignored")
            };
            let expected = if wildcard { vec!["a", "b"] } else { removed.clone() };
            assert_eq!(update.removed, expected, "{type_url}");
            assert_eq!(update.complete, !expected.is_empty());
        }
    }
}

#[test]
fn sotw_nack_names_each_resource_and_keeps_the_last_good_version() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    update!(core, sotw(CLUSTER, "1", "n1", &["a", "b"]), added ["a", "b"], removed []);
    sends!(core, "Cluster v=1 names= nonce=n1");
    let rejected = update!(core, sotw(CLUSTER, "2", "n2", &["a", "c", "d"]), added ["a", "c", "d"], removed ["b"], rejects ["a", "c"]);
    assert_eq!(rejected.len(), 2);
    sends!(core, "Cluster v=1 names= nonce=n2 error=\"a: bad\\nc: bad\"");
    // a is in force in its old version, b was removed, c is known as refused, d was taken.
    update!(core, sotw(CLUSTER, "3", "n3", &[]), added [], removed ["a", "c", "d"]);
    sends!(core, "Cluster v=3 names= nonce=n3");
}

#[test]
fn of_duplicate_names_the_first_is_applied_and_the_response_rejected() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    update!(core, sotw(CLUSTER, "1", "n1", &["a"]), added ["a"], removed []);
    core.outgoing();
    update!(core, sotw(CLUSTER, "2", "n2", &["a", "b", "a"]), added ["a", "b"], removed []);
    sends!(core, "Cluster v=1 names= nonce=n2 error=\"a: name: occurs twice in one response, again in resources[2]\"");

    let mut core = self::core(Variant::Delta);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    update!(core, delta(CLUSTER, "n1", &["a@1", "b@1", "a@2"], &["b"]), added ["a"], removed []);
    sends!(
        core,
        "Cluster + - have= nonce=n1 error=\"a: name: occurs twice in one response, again in resources[2]\\nb: name: both sent and removed in one response\""
    );
}

#[test]
fn resources_that_are_no_resources_are_rejected() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    let wrapped = |wrapper: Wrapper| Any {
        type_url: "type.googleapis.com/envoy.service.discovery.v3.Resource".to_owned(),
        value: wrapper.encode_to_vec(),
    };
    let ttl = Some(Duration { seconds: 1, nanos: 0 });
    let response = DiscoveryResponse {
        version_info: "1".to_owned(),
        type_url: CLUSTER.to_owned(),
        nonce: "n".to_owned(),
        resources: vec![
            body(CLUSTER, "", "1"),
            body(LISTENER, "l", "1"),
            Any { type_url: CLUSTER.to_owned(), value: vec![0xff] },
            wrapped(Wrapper {
                name: "t".to_owned(),
                ttl: Some(Duration { seconds: -1, nanos: 0 }),
                resource: Some(body(CLUSTER, "t", "1")),
                ..Default::default()
            }),
            wrapped(Wrapper { name: "w".to_owned(), resource: Some(body(CLUSTER, "w", "1")), ..Default::default() }),
            wrapped(Wrapper { name: "u".to_owned(), ttl, ..Default::default() }),
        ],
        ..Default::default()
    };
    let rejected = update!(core, Response::Sotw(response), added ["w"], removed []);
    let texts: Vec<String> = rejected.iter().map(|r| format!("{}: {}", r.name, r.message)).collect();
    assert_eq!(
        texts,
        [
            ": resources[0].name: the resource has none",
            "l: resources[1]: a type.googleapis.com/envoy.config.listener.v3.Listener in a response of type type.googleapis.com/envoy.config.cluster.v3.Cluster",
            ": resources[2]: cannot decode envoy.config.cluster.v3.Cluster: failed to decode Protobuf message: invalid varint",
            "t: ttl: is negative, or no duration",
            "u: resource: there is none, and version \"\" is not the one in force",
        ]
    );
}

#[test]
fn what_needs_no_answer_is_ignored() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    assert_eq!(core.handle(sotw(CLUSTER, "1", "n", &[]), Instant::now()), Handled::Ignored(Ignored::NotConnected));
    core.connected();
    assert_eq!(
        core.handle(sotw(CLUSTER, "1", "n", &[]), Instant::now()),
        Handled::Ignored(Ignored::UnknownType),
        "nothing was asked yet"
    );
    core.outgoing();
    assert_eq!(
        core.handle(sotw("no.such/Type", "1", "n", &[]), Instant::now()),
        Handled::Ignored(Ignored::UnknownType)
    );
    assert_eq!(core.handle(delta(CLUSTER, "n", &[], &[]), Instant::now()), Handled::Ignored(Ignored::WrongVariant));
}

#[test]
fn a_nonce_that_comes_again_is_answered_again() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut core = core(variant);
        core.set_interest(CLUSTER, Interest::Wildcard);
        core.connected();
        core.outgoing();
        for version in ["1", "2"] {
            match variant {
                Variant::Sotw => update!(core, sotw(CLUSTER, version, "n", &["a"]), added ["a"], removed []),
                Variant::Delta => {
                    update!(core, delta(CLUSTER, "n", &[&format!("a@{version}")], &[]), added ["a"], removed [])
                }
            };
            let sent = core.outgoing();
            assert_eq!(sent.len(), 1);
            assert!(show(&sent[0]).ends_with("nonce=n"));
        }
    }
}

#[test]
fn what_nobody_asked_for_is_acknowledged_and_dropped() {
    let mut core = core(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a"]));
    core.connected();
    core.outgoing();
    update!(core, sotw(ENDPOINT, "1", "n1", &["a", "x"]), added ["a"], removed []);
    sends!(core, "ClusterLoadAssignment v=1 names=a nonce=n1");
    core.set_interest(ENDPOINT, Interest::None);
    // With the version, as Envoy says it.
    sends!(core, "ClusterLoadAssignment v=1 names= nonce=n1");
    update!(core, sotw(ENDPOINT, "2", "n2", &["a"]), added [], removed []);
    sends!(core, "ClusterLoadAssignment v=2 names= nonce=n2");
}

#[test]
fn sotw_reconnect_sends_the_last_version_and_no_nonce() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    update!(core, sotw(CLUSTER, "c1", "n1", &["a"]), added ["a"], removed []);
    update!(core, sotw(ENDPOINT, "e1", "n2", &["a"]), added ["a"], removed []);
    core.disconnected();
    assert_eq!(core.outgoing(), []);
    core.connected();
    // b never came: the version would tell the server that it did.
    sends!(core, "Cluster node v=c1 names= nonce=", "ClusterLoadAssignment v= names=a,b nonce=");
    update!(core, sotw(ENDPOINT, "e1", "n1", &["a", "b"]), added ["b"], removed []);
    core.disconnected();
    core.connected();
    sends!(core, "Cluster node v=c1 names= nonce=", "ClusterLoadAssignment v=e1 names=a,b nonce=");
}

#[test]
fn an_update_finished_after_its_stream_counts_but_is_not_answered() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    let Handled::Update(token, _) = core.handle(sotw(CLUSTER, "1", "n1", &["a"]), Instant::now()) else {
        panic!("ignored")
    };
    core.disconnected();
    core.finish(token, Outcome::default());
    core.connected();
    sends!(core, "Cluster node v=1 names= nonce=");
}

#[test]
fn delta_reconnect_sends_what_is_in_force() {
    let mut core = core(Variant::Delta);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    update!(core, delta(CLUSTER, "n1", &["a@1", "b@1", "c@1"], &[]), added ["a", "b", "c"], removed [], rejects ["c"]);
    update!(core, delta(CLUSTER, "n2", &["a@2"], &["b"]), added["a"], removed["b"]);
    update!(core, delta(ENDPOINT, "n3", &["a@1", "b@1"], &[]), added ["a", "b"], removed []);
    sends!(
        core,
        "Cluster + - have= nonce=n1 error=\"c: bad\"",
        "Cluster + - have= nonce=n2",
        "ClusterLoadAssignment + - have= nonce=n3",
    );
    // Endpoints in use stay in force when the server drops them, but the client does not claim to have them.
    update!(core, delta(ENDPOINT, "n4", &[], &["a"]), added [], removed []);
    core.connected();
    sends!(core, "Cluster node + - have=a@2 nonce=", "ClusterLoadAssignment +a,b - have=b@1 nonce=");
}

#[test]
fn delta_subscribes_and_unsubscribes() {
    let mut core = core(Variant::Delta);
    core.set_interest(ENDPOINT, names(&[]));
    core.connected();
    sends!(core,);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    sends!(core, "ClusterLoadAssignment node +a,b - have= nonce=");
    core.set_interest(ENDPOINT, names(&["b", "c"]));
    sends!(core, "ClusterLoadAssignment +c -a have= nonce=");
    core.set_interest(ENDPOINT, Interest::Wildcard);
    sends!(core, "ClusterLoadAssignment +* -b,c have= nonce=");
    core.set_interest(ENDPOINT, Interest::None);
    sends!(core, "ClusterLoadAssignment + -* have= nonce=");
}

#[test]
fn what_is_wanted_again_is_asked_for_again() {
    let mut core = core(Variant::Delta);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    update!(core, delta(ENDPOINT, "n1", &["a@1", "b@1"], &[]), added ["a", "b"], removed []);
    core.outgoing();
    core.set_interest(ENDPOINT, names(&["a"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    sends!(core, "ClusterLoadAssignment + -b have= nonce=", "ClusterLoadAssignment +b - have= nonce=");

    let mut core = self::core(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.set_interest(OTHER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    update!(core, sotw(ENDPOINT, "1", "n1", &["a", "b"]), added ["a", "b"], removed []);
    update!(core, sotw(OTHER, "1", "n2", &["o"]), added ["o"], removed []);
    core.outgoing();
    core.set_interest(ENDPOINT, names(&["a"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.set_interest(OTHER, Interest::None);
    sends!(core, "ClusterLoadAssignment v=1 names=a nonce=n1", "ClusterLoadAssignment v=1 names=a,b nonce=n1",);
    // Without the version, for the server has to send everything again.
    core.set_interest(OTHER, Interest::Wildcard);
    sends!(core, "OffloadedService v= names= nonce=n2");
}

#[test]
fn sotw_wildcard_after_names_is_spelled_out() {
    let mut core = core(Variant::Sotw);
    core.set_interest(OTHER, names(&["a"]));
    core.connected();
    sends!(core, "OffloadedService node v= names=a nonce=");
    core.set_interest(OTHER, Interest::Wildcard);
    sends!(core, "OffloadedService v= names=* nonce=");
}

#[test]
fn a_nack_stays_readable() {
    let mut core = core(Variant::Delta);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    core.outgoing();
    let Handled::Update(token, _) = core.handle(delta(CLUSTER, "n1", &[], &[]), Instant::now()) else {
        panic!("ignored")
    };
    let rejection = |i| Rejection { name: format!("cluster-{i}"), message: "x".repeat(100) };
    core.finish(token, Outcome { rejected: (0..10_000).map(rejection).collect() });
    let Some(Request::Delta(request)) = core.outgoing().pop() else { panic!("no request") };
    let message = request.error_detail.unwrap().message;
    assert!(message.len() < 17 * 1024 && message.ends_with(" more"), "{} bytes", message.len());
}
