use std::collections::HashMap;

use envoy_types::pb::google::rpc;

use super::*;
use crate::resources::ProxyKind;
use crate::server::test_support::{snapshot, snapshot_with};

const CDS: &str = type_url::CLUSTER;
const EDS: &str = type_url::ENDPOINT;
const LDS: &str = type_url::LISTENER;
const RDS: &str = type_url::ROUTE;

#[derive(Default)]
struct Client {
    session: DeltaSession,
}

impl Client {
    fn subscribe(&mut self, type_url: &str, names: &[&str]) {
        self.send(DeltaDiscoveryRequest { resource_names_subscribe: owned(names), ..request(type_url) });
    }

    fn unsubscribe(&mut self, type_url: &str, names: &[&str]) {
        self.send(DeltaDiscoveryRequest { resource_names_unsubscribe: owned(names), ..request(type_url) });
    }

    fn ack(&mut self, response: &Response) {
        self.send(DeltaDiscoveryRequest { response_nonce: response.nonce.clone(), ..request(&response.type_url) });
    }

    fn nack(&mut self, response: &Response) {
        self.send(DeltaDiscoveryRequest {
            response_nonce: response.nonce.clone(),
            error_detail: Some(rpc::Status { message: "no".into(), ..Default::default() }),
            ..request(&response.type_url)
        });
    }

    fn send(&mut self, request: DeltaDiscoveryRequest) {
        self.session.handle(request).unwrap();
    }

    /// Takes and acknowledges all that there is, each as `TypeName +added -removed`.
    fn take_all(&mut self, snapshot: &Snapshot) -> Vec<String> {
        let mut taken = Vec::new();
        while let Some(response) = self.session.poll(snapshot) {
            taken.push(in_short(&response));
            self.ack(&response);
        }
        taken
    }

    fn in_sync(snapshot: &Snapshot, endpoints: &[&str], routes: &[&str]) -> Self {
        let mut client = Self::default();
        client.subscribe(CDS, &[]);
        client.subscribe(LDS, &[]);
        client.subscribe(EDS, endpoints);
        client.subscribe(RDS, routes);
        client.take_all(snapshot);
        client
    }
}

fn request(type_url: &str) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest { type_url: type_url.to_owned(), ..Default::default() }
}

fn owned(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn in_short(response: &Response) -> String {
    let mut text = response.type_url.rsplit('.').next().unwrap().to_owned();
    for resource in &response.resources {
        text.push_str(&format!(" +{}", resource.name));
    }
    for name in &response.removed {
        text.push_str(&format!(" -{name}"));
    }
    text
}

#[test]
fn everything_comes_in_order_and_then_only_changes() {
    let before = snapshot(&[("users", "http", 80)]);
    let mut client = Client::default();
    client.subscribe(RDS, &["outbound_http_80"]);
    client.subscribe(LDS, &[]);
    client.subscribe(EDS, &["users.default:80"]);
    client.subscribe(CDS, &["*"]);
    assert_eq!(
        client.take_all(&before),
        [
            "Cluster +original_dst +users.default:80",
            "ClusterLoadAssignment +users.default:80",
            "Listener +outbound",
            "RouteConfiguration +outbound_http_80",
        ]
    );
    let after = snapshot_with(&[("users", "http", 80)], &["10.1.0.1", "10.1.0.2"]);
    assert_eq!(client.take_all(&after), ["ClusterLoadAssignment +users.default:80"]);
    let more = snapshot_with(&[("users", "http", 80), ("orders", "http", 81)], &["10.1.0.1", "10.1.0.2"]);
    assert_eq!(client.take_all(&more), ["Cluster +orders.default:81", "Listener +outbound"]);
}

#[test]
fn what_does_not_exist_is_said_to_be_removed_and_sent_when_it_appears() {
    let mut client = Client::default();
    client.subscribe(EDS, &["users.default:80"]);
    assert_eq!(client.take_all(&snapshot(&[])), ["ClusterLoadAssignment -users.default:80"]);
    let appeared = snapshot(&[("users", "http", 80)]);
    assert_eq!(client.take_all(&appeared), ["ClusterLoadAssignment +users.default:80"]);
}

#[test]
fn a_wildcard_with_nothing_is_answered_once() {
    let mut client = Client::default();
    client.subscribe(type_url::OFFLOADED_SERVICE, &[]);
    assert_eq!(client.take_all(&snapshot(&[])), ["OffloadedService"]);
}

#[test]
fn removals_wait_for_routes_additions_do_not() {
    let before = snapshot(&[("orders", "http", 80)]);
    let after = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&before, &["orders.default:80"], &["outbound_http_80"]);
    let added = client.session.poll(&after).unwrap();
    assert_eq!(in_short(&added), "Cluster +users.default:80");
    let routes = client.session.poll(&after).unwrap();
    assert_eq!(in_short(&routes), "RouteConfiguration +outbound_http_80");
    client.ack(&added);
    assert_eq!(client.session.poll(&after), None, "the routes are not in force yet");
    client.ack(&routes);
    assert_eq!(client.take_all(&after), ["Cluster -orders.default:80", "ClusterLoadAssignment -orders.default:80"]);
}

#[test]
fn removals_wait_while_newer_users_are_refused() {
    let (users, orders, mail) = (("users", "http", 80), ("orders", "http", 80), ("mail", "tcp", 90));
    // The last one goes, which a route used, or a listener.
    for (before, refused, mending, expected) in [
        (
            [mail, users, orders],
            "RouteConfiguration +outbound_http_80",
            ("new", "http", 80),
            ["Cluster +new.default:80", "Cluster -orders.default:80"],
        ),
        (
            [users, orders, mail],
            "Listener +outbound",
            ("new", "tcp", 91),
            ["Cluster +new.default:91", "Cluster -mail.default:90"],
        ),
    ] {
        let mut client = Client::in_sync(&snapshot(&before), &["other.default:80"], &["outbound_http_80"]);
        let after = snapshot(&before[..2]);
        let response = client.session.poll(&after).unwrap();
        assert_eq!(in_short(&response), refused);
        client.nack(&response);
        assert_eq!(client.session.poll(&after), None, "{refused}: the older one is in use");
        let mended = snapshot(&[before[0], before[1], mending]);
        assert_eq!(client.take_all(&mended), [expected[0], refused, expected[1]]);
    }
}

#[test]
fn a_refused_part_of_a_large_change_is_not_mended_by_the_next_part() {
    let mut state = TypeState::default();
    state.answered(vec!["a".into(), "b".into()], false);
    state.answered(vec!["c".into()], true);
    assert_eq!(state.rejected.len(), 2);
    state.answered(vec!["a".into()], true);
    assert!(state.rejected.is_empty());
}

#[test]
fn routes_go_only_after_the_listener_that_used_them() {
    let before = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&before, &["other.default:80"], &["outbound_http_80"]);
    let after = snapshot(&[]);
    let listener = client.session.poll(&after).unwrap();
    assert_eq!(in_short(&listener), "Listener +outbound");
    assert_eq!(client.session.poll(&after), None);
    client.ack(&listener);
    assert_eq!(client.take_all(&after), ["RouteConfiguration -outbound_http_80", "Cluster -users.default:80"]);
}

#[test]
fn a_stale_nonce_acknowledges_nothing_but_its_subscriptions_count() {
    let snapshot = snapshot(&[("users", "http", 80), ("orders", "http", 80)]);
    let mut client = Client::default();
    client.subscribe(EDS, &["users.default:80"]);
    let first = client.session.poll(&snapshot).unwrap();
    client.send(DeltaDiscoveryRequest {
        response_nonce: "stale".into(),
        resource_names_subscribe: owned(&["orders.default:80"]),
        ..request(EDS)
    });
    assert_eq!(client.session.poll(&snapshot), None, "the first response is still unanswered");
    client.ack(&first);
    assert_eq!(client.take_all(&snapshot), ["ClusterLoadAssignment +orders.default:80"]);
}

#[test]
fn a_reconnecting_client_gets_only_what_changed() {
    let before = snapshot(&[("users", "http", 80), ("orders", "http", 81)]);
    let all = before.resources(ProxyKind::Foreign).of_type(CDS).unwrap();
    let versions: HashMap<_, _> = all.resources.values().map(|r| (r.name.to_string(), r.version.to_string())).collect();
    let reconnect = |snapshot: &Snapshot| {
        let mut client = Client::default();
        client.send(DeltaDiscoveryRequest { initial_resource_versions: versions.clone(), ..request(CDS) });
        (client.take_all(snapshot), client.session)
    };
    let (sent, session) = reconnect(&before);
    assert_eq!(sent, [] as [&str; 0]);
    // What it has is known all the same.
    let status = &session.status().types[CDS];
    let version = Some(all.version.to_string());
    assert_eq!((&status.sent, &status.acked), (&version, &version));
    let held = session.held();
    assert_eq!(held.len(), all.resources.size());
    assert!(held.iter().all(|held| held.state == HeldState::Accepted && held.resource.is_some()), "{held:?}");
    let after = snapshot(&[("users", "grpc", 80), ("new", "http", 82)]);
    assert_eq!(reconnect(&after).0, ["Cluster +new.default:82 +users.default:80 -orders.default:81"]);
}

#[test]
fn a_reconnecting_client_with_names_gets_only_what_changed() {
    let before = snapshot(&[("users", "http", 80), ("orders", "http", 81)]);
    let all = before.resources(ProxyKind::Foreign).of_type(EDS).unwrap();
    let versions: HashMap<_, _> = all.resources.values().map(|r| (r.name.to_string(), r.version.to_string())).collect();
    let mut client = Client::default();
    client.send(DeltaDiscoveryRequest {
        initial_resource_versions: versions,
        resource_names_subscribe: owned(&["users.default:80", "orders.default:81", "new.default:82"]),
        ..request(EDS)
    });
    let after = snapshot(&[("users", "http", 80), ("new", "http", 82)]);
    assert_eq!(
        client.take_all(&after),
        ["ClusterLoadAssignment +new.default:82 -orders.default:81"],
        "users is known and unchanged"
    );
}

#[test]
fn a_wildcard_after_names_brings_the_rest_and_names_after_it_stay() {
    let both = snapshot(&[("users", "http", 80), ("orders", "http", 81)]);
    let mut client = Client::default();
    client.subscribe(EDS, &["users.default:80"]);
    client.take_all(&both);
    client.subscribe(EDS, &["*"]);
    assert_eq!(client.take_all(&both), ["ClusterLoadAssignment +orders.default:81"]);
    client.unsubscribe(EDS, &["*"]);
    assert_eq!(client.take_all(&both), [] as [&str; 0]);
    let other = snapshot_with(&[("users", "http", 80), ("orders", "http", 81)], &["10.1.0.9"]);
    assert_eq!(client.take_all(&other), ["ClusterLoadAssignment +users.default:80"]);
    client.subscribe(EDS, &["*"]);
    assert_eq!(client.take_all(&other), ["ClusterLoadAssignment +orders.default:81"], "it may have dropped this one");
    // Under a wildcard, what is unsubscribed by name is wanted all the same.
    client.unsubscribe(EDS, &["users.default:80"]);
    assert_eq!(client.take_all(&other), ["ClusterLoadAssignment +users.default:80"]);
}

/// The snapshot that follows another, in which these services have other endpoints, or are gone.
fn after(before: &Snapshot, services: &[(&str, &str, u16)], address: &str) -> Snapshot {
    let mesh = snapshot_with(services, &[address]).mesh;
    let all = before.mesh.services.keys().chain(mesh.services.keys());
    let changed = all.filter(|key| before.mesh.services.get(*key) != mesh.services.get(*key)).cloned().collect();
    before.next(mesh, &changed)
}

#[test]
fn what_follows_from_a_snapshot_is_found_by_what_changed() {
    let users_and = |port| [("users", "http", 80), ("orders", "http", port)];
    let first = snapshot(&users_and(81));
    let mut client = Client::in_sync(&first, &["users.default:80", "orders.default:81"], &["outbound_http_80"]);
    let mut named = Client::default();
    named.subscribe(EDS, &["users.default:80"]);
    named.take_all(&first);
    let second = after(&first, &users_and(81), "10.1.0.2");
    let expected = ["ClusterLoadAssignment +orders.default:81 +users.default:80"];
    assert_eq!(client.take_all(&second), expected);
    let third = after(&second, &users_and(82), "10.1.0.2");
    assert_eq!(named.take_all(&third), ["ClusterLoadAssignment +users.default:80"], "two changes behind");
    let expected = [
        "Cluster +orders.default:82",
        "Listener +outbound",
        "Cluster -orders.default:81",
        "ClusterLoadAssignment -orders.default:81",
    ];
    assert_eq!(client.take_all(&third), expected);
    assert_eq!(client.take_all(&third), [] as [&str; 0]);
    // As if it had been made from nothing.
    let scratch = snapshot_with(&users_and(82), &["10.1.0.2"]);
    for type_url in crate::resources::PUSH_ORDER {
        let version =
            |snapshot: &Snapshot| snapshot.resources(ProxyKind::Culvert).of_type(type_url).unwrap().version.clone();
        assert_eq!(version(&third), version(&scratch), "{type_url}");
    }
    // So far behind that nobody knows any more what has changed.
    let mut newest = third;
    for i in 0..200 {
        newest = after(&newest, &users_and(82), &format!("10.1.1.{i}"));
    }
    assert_eq!(named.take_all(&newest), ["ClusterLoadAssignment +users.default:80"]);
    assert_eq!(client.take_all(&newest), ["ClusterLoadAssignment +users.default:80"]);
}

#[test]
fn subscribing_again_sends_again() {
    let snapshot = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&snapshot, &["users.default:80"], &[]);
    client.subscribe(EDS, &["users.default:80"]);
    assert_eq!(client.take_all(&snapshot), ["ClusterLoadAssignment +users.default:80"]);
    client.unsubscribe(EDS, &["users.default:80"]);
    let after = snapshot_with(&[("users", "http", 80)], &["10.1.0.9"]);
    assert_eq!(client.take_all(&after), [] as [&str; 0]);
    client.subscribe(EDS, &["users.default:80"]);
    assert_eq!(client.take_all(&after), ["ClusterLoadAssignment +users.default:80"]);
}

#[test]
fn a_service_that_comes_back_is_sent_again() {
    let (with, without) = (snapshot(&[("users", "http", 80)]), snapshot(&[]));
    let mut client = Client::in_sync(&with, &["users.default:80"], &["outbound_http_80"]);
    client.take_all(&without);
    assert_eq!(
        client.take_all(&with),
        [
            "Cluster +users.default:80",
            "ClusterLoadAssignment +users.default:80",
            "Listener +outbound",
            "RouteConfiguration +outbound_http_80",
        ]
    );
}

#[test]
fn a_rejected_resource_is_not_sent_again_until_it_changes() {
    let bad = snapshot(&[("users", "http", 80)]);
    let mut client = Client::default();
    client.subscribe(CDS, &[]);
    let response = client.session.poll(&bad).unwrap();
    client.nack(&response);
    assert_eq!(client.session.poll(&bad), None);
    assert_eq!(client.session.status().types[CDS].nack.as_ref().map(|nack| &*nack.reason), Some("no"));
    assert_eq!(client.take_all(&snapshot(&[("users", "grpc", 80)])), ["Cluster +users.default:80"]);
}

#[test]
fn a_large_change_goes_in_several_responses() {
    let names: Vec<String> = (0..20).map(|i| format!("service-{i:02}")).collect();
    let services: Vec<_> = names.iter().map(|name| (name.as_str(), "http", 80)).collect();
    let snapshot = snapshot(&services);
    let mut client = Client::default();
    client.session.response_bytes = 1000;
    client.subscribe(CDS, &[]);
    let (mut responses, mut resources) = (0, 0);
    while let Some(response) = client.session.poll(&snapshot) {
        let bytes: usize = response.resources.iter().map(|resource| resource.length()).sum();
        assert!(bytes <= 1000, "{bytes} bytes in one response");
        responses += 1;
        resources += response.resources.len();
        client.ack(&response);
    }
    assert_eq!(resources, 21);
    assert!(responses > 1, "all in one response");
}
