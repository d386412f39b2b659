//! Servers that misbehave, and what of Envoy's behaviour at the edges is the protocol's.

use std::time::{Duration, Instant};

use super::tests::{body, core, delta, names, reject, show, sotw};
use super::type_url::{CLUSTER, ENDPOINT, LISTENER, ROUTE, RUNTIME, SECRET, VIRTUAL_HOST};
use super::*;

fn asked(variant: Variant, type_url: &str, interest: Interest) -> Core {
    let mut core = core(variant);
    core.set_interest(type_url, interest);
    core.connected();
    core.outgoing();
    core
}

/// Handles a response and finishes it; returns the update, and what is sent.
fn take(core: &mut Core, response: Response) -> (Update, Vec<String>) {
    let Handled::Update(token, update) = core.handle(response, Instant::now()) else { panic!("ignored") };
    core.finish(token, Outcome::default());
    (update, core.outgoing().iter().map(show).collect())
}

fn added(update: &Update) -> Vec<&str> {
    update.added.iter().map(|resource| resource.name.as_str()).collect()
}

fn sotw_of(type_url: &str, resources: Vec<Any>) -> Response {
    let (version_info, type_url, nonce) = ("1".to_owned(), type_url.to_owned(), "n".to_owned());
    Response::Sotw(DiscoveryResponse { version_info, type_url, nonce, resources, ..Default::default() })
}

#[test]
fn what_cannot_be_told_apart_removes_nothing() {
    let unnamed = body(CLUSTER, "", "1");
    let undecodable =
        Any { type_url: "type.googleapis.com/envoy.service.discovery.v3.Resource".to_owned(), value: vec![0xff] };
    for odd in [unnamed, undecodable, body(LISTENER, "c", "1")] {
        let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
        take(&mut core, sotw(CLUSTER, "1", "1", &["a", "b"]));
        let (update, _) = take(&mut core, sotw_of(CLUSTER, vec![odd.clone(), body(CLUSTER, "a", "1")]));
        assert!(update.removed.is_empty() && !update.complete, "{odd:?} may have been b: {update:?}");
        let (update, _) = take(&mut core, sotw(CLUSTER, "3", "3", &["a"]));
        assert_eq!(update.removed, ["b"]);
    }
}

#[test]
fn empty_sotw_clusters_and_listeners_remove_all_and_anything_else_that_is_empty_keeps() {
    for (variant, type_url, removes) in [
        (Variant::Sotw, CLUSTER, true),
        (Variant::Sotw, LISTENER, true),
        (Variant::Sotw, ENDPOINT, false),
        (Variant::Sotw, ROUTE, false),
        (Variant::Sotw, SECRET, false),
        (Variant::Delta, CLUSTER, false),
        (Variant::Delta, LISTENER, false),
        (Variant::Delta, ENDPOINT, false),
        (Variant::Delta, ROUTE, false),
    ] {
        let mut core = asked(variant, type_url, names(&["a", "b"]));
        let (full, empty) = match variant {
            Variant::Sotw => (sotw(type_url, "1", "1", &["a", "b"]), sotw(type_url, "2", "2", &[])),
            Variant::Delta => (delta(type_url, "1", &["a@1", "b@1"], &[]), delta(type_url, "2", &[], &[])),
        };
        take(&mut core, full);
        let (update, sent) = take(&mut core, empty);
        assert_eq!(update.removed.len(), if removes { 2 } else { 0 }, "{variant:?} {type_url}");
        assert!(sent[0].ends_with("nonce=2"), "it is acknowledged: {}", sent[0]);
    }
}

#[test]
fn delta_removal_of_endpoints_routes_and_secrets_in_use_is_acknowledged_and_they_stay() {
    for (type_url, stays) in
        [(ENDPOINT, true), (ROUTE, true), (SECRET, true), (RUNTIME, false), (VIRTUAL_HOST, false), (CLUSTER, false)]
    {
        let mut core = asked(Variant::Delta, type_url, names(&["a"]));
        take(&mut core, delta(type_url, "1", &["a@1"], &[]));
        let (update, sent) = take(&mut core, delta(type_url, "2", &[], &["a"]));
        assert_eq!((update.removed.is_empty(), !update.absent.is_empty()), (stays, stays), "{type_url}");
        assert!(sent[0].ends_with("nonce=2"));
    }
}

#[test]
fn delta_removal_of_what_was_never_sent_is_acknowledged_and_tells_of_absent_names() {
    let mut core = asked(Variant::Delta, ENDPOINT, names(&["a", "b"]));
    let (update, sent) = take(&mut core, delta(ENDPOINT, "1", &[], &["a", "a", "never asked for"]));
    assert_eq!((update.removed.len(), update.absent), (0, vec!["a".to_owned(), "a".to_owned()]));
    assert_eq!(sent, ["ClusterLoadAssignment + - have= nonce=1"]);
    let mut core = asked(Variant::Delta, CLUSTER, Interest::WildcardAnd(["on-demand".to_owned()].into()));
    let (update, _) = take(&mut core, delta(CLUSTER, "1", &[], &["on-demand", "other"]));
    assert_eq!((update.removed.len(), update.absent), (0, vec!["on-demand".to_owned()]));
}

#[test]
fn a_response_without_a_nonce_is_answered_without_one() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    assert_eq!(take(&mut core, sotw(CLUSTER, "1", "", &["a"])).1, ["Cluster v=1 names= nonce="]);
    let mut core = asked(Variant::Delta, CLUSTER, Interest::Wildcard);
    assert_eq!(take(&mut core, delta(CLUSTER, "", &["a@1"], &[])).1, ["Cluster + - have= nonce="]);
}

#[test]
fn a_response_without_a_version_is_applied() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    let (update, sent) = take(&mut core, sotw(CLUSTER, "", "n", &["a"]));
    assert_eq!((added(&update), sent), (vec!["a"], vec!["Cluster v= names= nonce=n".to_owned()]));
    let mut core = asked(Variant::Delta, CLUSTER, Interest::Wildcard);
    let (update, _) = take(&mut core, delta(CLUSTER, "n", &["a@"], &[]));
    assert_eq!(added(&update), ["a"]);
    core.connected();
    assert_eq!(show(&core.outgoing()[0]), "Cluster node + - have=a@ nonce=");
}

#[test]
fn a_response_without_a_type_or_of_one_that_nobody_asked_for_is_passed_over_and_the_stream_goes_on() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    for type_url in ["", "no.such/Type", ENDPOINT] {
        let response = sotw(type_url, "1", "n", &["a"]);
        assert_eq!(core.handle(response, Instant::now()), Handled::Ignored(Ignored::UnknownType));
    }
    assert_eq!(core.outgoing(), []);
    assert_eq!(added(&take(&mut core, sotw(CLUSTER, "1", "n", &["a"])).0), ["a"]);
}

#[test]
fn a_version_that_goes_back_is_applied_like_any_other() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    for version in ["2", "1", "2"] {
        let (update, sent) = take(&mut core, sotw(CLUSTER, version, version, &["a"]));
        assert_eq!((added(&update), sent), (vec!["a"], vec![format!("Cluster v={version} names= nonce={version}")]));
    }
}

#[test]
fn the_same_again_is_acknowledged_and_handed_out_by_name_only() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    take(&mut core, sotw(CLUSTER, "1", "1", &["a", "b"]));
    let resources = vec![body(CLUSTER, "a", "1"), body(CLUSTER, "b", "changed")];
    let (update, sent) = take(&mut core, sotw_of(CLUSTER, resources));
    assert_eq!((added(&update), &update.unchanged[..]), (vec!["b"], &["a".into()][..]));
    assert_eq!(sent, ["Cluster v=1 names= nonce=n"]);
}

#[test]
fn what_was_refused_is_handed_out_each_time_it_comes_and_refused_each_time() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    for nonce in ["1", "2"] {
        let Handled::Update(token, update) = core.handle(sotw(CLUSTER, "1", nonce, &["a"]), Instant::now()) else {
            panic!("ignored")
        };
        assert_eq!(added(&update), ["a"]);
        core.finish(token, Outcome { rejected: reject(&["a"]) });
        assert_eq!(show(&core.outgoing()[0]), format!("Cluster v= names= nonce={nonce} error=\"a: bad\""));
    }
}

#[test]
fn names_with_odd_characters_are_names_like_any_other() {
    let odd = ["", "a b", "a\nb", "a\0b", "\u{1f980}", "../../x", "%s%n", "\"quoted\"", &"x".repeat(10_000)];
    for variant in [Variant::Sotw, Variant::Delta] {
        let odd = &odd[1..];
        let mut core = asked(variant, CLUSTER, Interest::Wildcard);
        let versions: Vec<String> = odd.iter().map(|name| format!("{name}@1")).collect();
        let versions: Vec<&str> = versions.iter().map(String::as_str).collect();
        let response = match variant {
            Variant::Sotw => sotw(CLUSTER, "1", "n", odd),
            Variant::Delta => delta(CLUSTER, "n", &versions, &[]),
        };
        assert_eq!(added(&take(&mut core, response).0), odd);
    }
}

#[test]
fn a_million_names_that_nobody_asked_for_cost_nothing_but_their_reading() {
    let mut core = asked(Variant::Sotw, ENDPOINT, names(&["a"]));
    let stranger = Any { type_url: ENDPOINT.to_owned(), value: b"\x0a\x01z".to_vec() };
    let (update, sent) = take(&mut core, sotw_of(ENDPOINT, vec![stranger; 1_000_000]));
    assert_eq!((update.added.len(), update.unchanged.len()), (0, 0));
    assert_eq!(sent, ["ClusterLoadAssignment v=1 names=a nonce=n"]);
}

#[test]
fn of_a_hundred_thousand_faults_the_first_are_told() {
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    let response = sotw_of(CLUSTER, vec![body(CLUSTER, "a", "1"); 100_000]);
    let Handled::Update(token, update) = core.handle(response, Instant::now()) else { panic!("ignored") };
    assert_eq!(added(&update), ["a"], "the first is applied, as in Envoy");
    let rejected = core.finish(token, Outcome::default());
    assert_eq!(rejected.len(), 1000);
    assert_eq!(rejected[999].message, "and others are at fault as well");
}

#[test]
fn one_change_of_ten_thousand_costs_no_more_than_reading_them() {
    // Nothing in here may grow with the square of the number: 20 rounds take well under a second even unoptimised.
    let names: Vec<String> = (0..10_000).map(|i| format!("cluster-{i}")).collect();
    let all = |round: usize| -> Vec<Any> {
        let version = |i: usize| if i == round { "changed" } else { "1" };
        names.iter().enumerate().map(|(i, name)| body(CLUSTER, name, version(i))).collect()
    };
    let mut core = asked(Variant::Sotw, CLUSTER, Interest::Wildcard);
    take(&mut core, sotw_of(CLUSTER, all(usize::MAX)));
    let mut spent = Duration::ZERO;
    for round in 0..5 {
        let response = sotw_of(CLUSTER, all(round));
        let start = Instant::now();
        let (update, _) = take(&mut core, response);
        spent += start.elapsed();
        assert_eq!(update.added.len(), if round == 0 { 1 } else { 2 });
        assert_eq!(update.added.len() + update.unchanged.len(), 10_000);
    }
    assert!(spent < Duration::from_secs(20), "{spent:?}");
}
