//! Everything, names beside it, and collections.

use std::time::Instant;

use super::tests::{body, core, delta, names, show, sotw};
use super::type_url::{CLUSTER, LISTENER, VIRTUAL_HOST};
use super::*;

fn and(names: &[&str]) -> Interest {
    Interest::WildcardAnd(names.iter().map(|name| (*name).to_owned()).collect())
}

fn sent(core: &mut Core) -> Vec<String> {
    core.outgoing().iter().map(show).collect()
}

fn take(core: &mut Core, response: Response) -> Update {
    let Handled::Update(token, update) = core.handle(response, Instant::now()) else { panic!("ignored") };
    core.finish(token, Outcome::default());
    core.outgoing();
    update
}

#[test]
fn delta_names_are_added_to_a_legacy_wildcard_and_taken_back() {
    let mut core = core(Variant::Delta);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.connected();
    assert_eq!(sent(&mut core), ["Cluster node + - have= nonce="]);
    core.set_wanted(CLUSTER, "a", true);
    assert_eq!(sent(&mut core), ["Cluster +a - have= nonce="]);
    take(&mut core, delta(CLUSTER, "n", &["a@1", "b@1"], &[]));
    core.set_wanted(CLUSTER, "a", false);
    assert_eq!(sent(&mut core), ["Cluster + -a have= nonce="]);
    // It may be one that the wildcard brings: the server says so, or that it is gone.
    assert_eq!(take(&mut core, delta(CLUSTER, "n", &[], &["a"])).removed, ["a"]);
}

#[test]
fn a_new_stream_asks_for_the_wildcard_by_name_where_there_are_names() {
    for (variant, expected) in
        [(Variant::Sotw, "Cluster node v= names=*,a nonce="), (Variant::Delta, "Cluster node +*,a - have= nonce=")]
    {
        let mut core = core(variant);
        core.set_interest(CLUSTER, and(&["a"]));
        core.connected();
        assert_eq!(sent(&mut core), [expected]);
    }
}

#[test]
fn a_star_among_names_is_the_wildcard_and_can_be_subscribed_to_and_unsubscribed_from() {
    let mut core = core(Variant::Delta);
    core.set_interest(CLUSTER, names(&["*", "a"]));
    assert_eq!(*core.interest(CLUSTER), and(&["a"]));
    core.connected();
    core.outgoing();
    take(&mut core, delta(CLUSTER, "n", &["a@1", "b@1"], &[]));
    core.set_wanted(CLUSTER, "*", false);
    assert_eq!(*core.interest(CLUSTER), names(&["a"]));
    assert_eq!(sent(&mut core), ["Cluster + -* have= nonce="]);
    core.set_wanted(CLUSTER, "*", true);
    assert_eq!(sent(&mut core), ["Cluster +* - have= nonce="]);
    core.connected();
    // What came with the wildcard alone was forgotten.
    assert_eq!(sent(&mut core), ["Cluster node +*,a - have=a@1 nonce="]);
}

#[test]
fn sotw_without_the_wildcard_only_the_names_are_left() {
    let mut core = core(Variant::Sotw);
    core.set_interest(CLUSTER, and(&["a"]));
    core.connected();
    core.outgoing();
    take(&mut core, sotw(CLUSTER, "1", "n", &["a", "b"]));
    core.set_interest(CLUSTER, names(&["a"]));
    assert_eq!(sent(&mut core), ["Cluster v=1 names=a nonce=n"]);
    core.set_interest(CLUSTER, Interest::None);
    assert_eq!(sent(&mut core), ["Cluster v=1 names= nonce=n"]);
    // What is wanted again is not here any more.
    core.set_interest(CLUSTER, names(&["a"]));
    assert_eq!(sent(&mut core), ["Cluster v= names=a nonce=n"]);
}

#[test]
fn one_name_more_or_less_is_the_same_as_all_names_anew() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let (mut one, mut all) = (core(variant), core(variant));
        for core in [&mut one, &mut all] {
            core.set_interest(LISTENER, names(&["a", "b"]));
            core.connected();
            core.outgoing();
        }
        one.set_wanted(LISTENER, "b", false);
        one.set_wanted(LISTENER, "c", true);
        one.set_wanted(LISTENER, "c", true);
        all.set_interest(LISTENER, names(&["a", "c"]));
        assert_eq!(one.interest(LISTENER), all.interest(LISTENER));
        assert_eq!(sent(&mut one), sent(&mut all));
        one.set_wanted("never", "b", false);
        for name in ["a", "c"] {
            one.set_wanted(LISTENER, name, false);
        }
        assert_eq!(*one.interest(LISTENER), Interest::None);
    }
}

#[test]
fn members_of_a_collection_are_wanted_and_removed_with_it() {
    let collection = "xdstp://auth/envoy.config.listener.v3.Listener/x/*?b=2&a=1";
    let member = "xdstp://auth/envoy.config.listener.v3.Listener/x/one?a=1&b=2";
    let other = "xdstp://auth/envoy.config.listener.v3.Listener/y/one?a=1&b=2";
    let mut core = core(Variant::Delta);
    core.set_interest(LISTENER, names(&[collection]));
    core.connected();
    // Parameters have one order.
    let normal = "xdstp://auth/envoy.config.listener.v3.Listener/x/*?a=1&b=2";
    assert_eq!(sent(&mut core), [format!("Listener node +{normal} - have= nonce=")]);
    let shuffled = "xdstp://auth/envoy.config.listener.v3.Listener/x/one?b=2&a=1";
    let update = take(&mut core, delta(LISTENER, "n", &[&format!("{shuffled}@1"), &format!("{other}@1")], &[]));
    assert_eq!(update.added.len(), 1);
    assert_eq!(update.added[0].name, member);
    assert_eq!(take(&mut core, delta(LISTENER, "n", &[], &[shuffled])).removed, [member]);
    take(&mut core, delta(LISTENER, "n", &[&format!("{member}@2")], &[]));
    core.set_interest(LISTENER, names(&["z"]));
    core.connected();
    assert_eq!(sent(&mut core), ["Listener node +z - have= nonce="]);
}

#[test]
fn virtual_hosts_are_wanted_by_their_route_configuration_and_come_with_aliases() {
    let mut core = core(Variant::Delta);
    core.set_interest(VIRTUAL_HOST, names(&["routes"]));
    core.connected();
    core.outgoing();
    core.set_wanted(VIRTUAL_HOST, "routes/a.example", true);
    assert_eq!(sent(&mut core), ["VirtualHost +routes/a.example - have= nonce="]);
    let resource = |name: &str, alias: &str, has_body: bool| DeltaResource {
        name: name.to_owned(),
        aliases: vec![alias.to_owned()],
        version: "1".to_owned(),
        resource: has_body.then(|| body(VIRTUAL_HOST, name, "1")),
        ..Default::default()
    };
    let response = Response::Delta(DeltaDiscoveryResponse {
        type_url: VIRTUAL_HOST.to_owned(),
        nonce: "n".to_owned(),
        resources: vec![
            resource("routes/a", "routes/a.example", true),
            resource("routes/b.example", "routes/b.example", false),
            resource("elsewhere/c", "elsewhere/c.example", true),
        ],
        ..Default::default()
    });
    let update = take(&mut core, response);
    assert_eq!(update.added.len(), 1);
    assert_eq!(
        (&*update.added[0].name, &update.added[0].aliases[..]),
        ("routes/a", &["routes/a.example".to_owned()][..])
    );
    assert_eq!(update.absent, ["routes/b.example"]);
}

type DeltaResource = envoy_types::pb::envoy::service::discovery::v3::Resource;
