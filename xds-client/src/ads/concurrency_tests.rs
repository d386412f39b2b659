//! Updates that are finished late, and not in the order in which they were handed out.

use std::time::Instant;

use super::tests::{core, delta, names, reject, show, sotw};
use super::type_url::{CLUSTER, ENDPOINT};
use super::*;

fn take(core: &mut Core, response: Response) -> (Token, Vec<String>, Vec<String>) {
    let Handled::Update(token, update) = core.handle(response, Instant::now()) else { panic!("ignored") };
    (token, update.added.into_iter().map(|resource| resource.name).collect(), update.removed)
}

fn finish(core: &mut Core, token: Token, rejected: &[&str]) {
    core.finish(token, Outcome { rejected: reject(rejected) });
}

fn sent(core: &mut Core) -> Vec<String> {
    core.outgoing().iter().map(show).collect()
}

/// A client that has asked for all clusters and the endpoints of `a`.
fn asked(variant: Variant) -> Core {
    let mut core = core(variant);
    core.set_interest(CLUSTER, Interest::Wildcard);
    core.set_interest(ENDPOINT, names(&["a"]));
    core.connected();
    core.outgoing();
    core
}

#[test]
fn other_types_go_on_while_an_update_is_applied() {
    let mut core = asked(Variant::Sotw);
    let (clusters, ..) = take(&mut core, sotw(CLUSTER, "1", "c1", &["a", "b"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v= names=a,b nonce="]);
    let (endpoints, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a", "b"]));
    finish(&mut core, endpoints, &[]);
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=1 names=a,b nonce=e1"]);
    finish(&mut core, clusters, &[]);
    assert_eq!(sent(&mut core), ["Cluster v=1 names= nonce=c1"]);
}

#[test]
fn a_newer_response_of_the_same_type_is_handed_out_and_each_is_answered_in_turn() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut core = asked(variant);
        let (responses, answers) = match variant {
            Variant::Sotw => (
                [sotw(CLUSTER, "1", "c1", &["a", "b"]), sotw(CLUSTER, "2", "c2", &["a", "c"])],
                ["Cluster v= names= nonce=c1 error=\"a: bad\"", "Cluster v=2 names= nonce=c2"],
            ),
            Variant::Delta => (
                [delta(CLUSTER, "c1", &["a@1", "b@1"], &[]), delta(CLUSTER, "c2", &["a@2", "c@1"], &["b"])],
                ["Cluster + - have= nonce=c1 error=\"a: bad\"", "Cluster + - have= nonce=c2"],
            ),
        };
        let [first, second] = responses;
        let (first, added, removed) = take(&mut core, first);
        assert_eq!((added, removed), (vec!["a".to_owned(), "b".to_owned()], vec![]));
        let (second, added, removed) = take(&mut core, second);
        // b was handed out: its removal is as well, before it is in force.
        assert_eq!((added, removed), (vec!["a".to_owned(), "c".to_owned()], vec!["b".to_owned()]));
        assert_eq!(sent(&mut core), [""; 0]);
        finish(&mut core, first, &["a"]);
        assert_eq!(sent(&mut core), [answers[0]]);
        finish(&mut core, second, &[]);
        assert_eq!(sent(&mut core), [answers[1]]);
    }
}

#[test]
fn sotw_an_answer_that_comes_after_a_newer_one_is_superseded() {
    let mut core = asked(Variant::Sotw);
    let (first, ..) = take(&mut core, sotw(CLUSTER, "1", "c1", &["a", "b"]));
    let (second, ..) = take(&mut core, sotw(CLUSTER, "2", "c2", &["a"]));
    finish(&mut core, second, &[]);
    assert_eq!(sent(&mut core), ["Cluster v=2 names= nonce=c2"]);
    finish(&mut core, first, &[]);
    assert_eq!(sent(&mut core), [""; 0]);
    // The older update has not brought back what the newer one removed, nor its version.
    let (third, _, removed) = take(&mut core, sotw(CLUSTER, "3", "c3", &[]));
    assert_eq!(removed, ["a"]);
    core.abandon(third);
    core.connected();
    assert_eq!(sent(&mut core)[0], "Cluster node v=2 names= nonce=");
}

#[test]
fn delta_every_response_is_answered_in_whatever_order() {
    let mut core = asked(Variant::Delta);
    let (first, ..) = take(&mut core, delta(CLUSTER, "c1", &["a@1", "b@1", "d@1"], &[]));
    let (second, ..) = take(&mut core, delta(CLUSTER, "c2", &["a@2", "d@2"], &["b"]));
    finish(&mut core, second, &["d"]);
    finish(&mut core, first, &[]);
    assert_eq!(sent(&mut core), ["Cluster + - have= nonce=c2 error=\"d: bad\"", "Cluster + - have= nonce=c1"]);
    core.connected();
    // d's newer version was refused, so its older one is in force.
    assert_eq!(sent(&mut core)[0], "Cluster node + - have=a@2,d@1 nonce=");
}

#[test]
fn sotw_what_is_wanted_waits_for_the_answer_to_the_newest_response() {
    // Servers pass over a request with another nonce than that of the newest response, and all that it says.
    let mut core = asked(Variant::Sotw);
    let (first, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    assert_eq!(sent(&mut core), [""; 0]);
    let (second, ..) = take(&mut core, sotw(ENDPOINT, "2", "e2", &["a"]));
    finish(&mut core, first, &[]);
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=1 names=a,b nonce=e1"]);
    core.set_interest(ENDPOINT, names(&["b"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    finish(&mut core, second, &[]);
    assert_eq!(
        sent(&mut core),
        ["ClusterLoadAssignment v=2 names=b nonce=e2", "ClusterLoadAssignment v=2 names=a,b nonce=e2"]
    );
}

#[test]
fn an_update_that_is_given_up_is_not_answered_and_holds_nothing_up() {
    let mut core = asked(Variant::Sotw);
    let (first, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a"]));
    finish(&mut core, first, &[]);
    core.outgoing();
    let (second, ..) = take(&mut core, sotw(ENDPOINT, "2", "e2", &["a"]));
    core.abandon(second);
    assert_eq!(sent(&mut core), [""; 0]);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=1 names=a,b nonce=e1"]);
}

#[test]
fn what_was_lost_interest_in_while_it_was_applied_is_not_held() {
    let mut core = asked(Variant::Delta);
    let (first, ..) = take(&mut core, delta(ENDPOINT, "e1", &["a@1"], &[]));
    core.set_interest(ENDPOINT, Interest::None);
    core.set_interest(ENDPOINT, names(&["a"]));
    finish(&mut core, first, &[]);
    assert_eq!(
        sent(&mut core),
        [
            "ClusterLoadAssignment + - have= nonce=e1",
            "ClusterLoadAssignment + -a have= nonce=",
            "ClusterLoadAssignment +a - have= nonce="
        ]
    );
    core.connected();
    assert_eq!(sent(&mut core)[1], "ClusterLoadAssignment +a - have= nonce=");
}

#[test]
fn an_update_that_outlives_its_stream_counts_against_the_next_ones() {
    let mut core = asked(Variant::Sotw);
    let (old, ..) = take(&mut core, sotw(CLUSTER, "1", "c1", &["a", "b"]));
    core.connected();
    assert_eq!(sent(&mut core)[0], "Cluster node v= names= nonce=");
    let (new, _, removed) = take(&mut core, sotw(CLUSTER, "2", "c1", &["b"]));
    assert_eq!(removed, ["a"]);
    finish(&mut core, old, &[]);
    assert_eq!(sent(&mut core), [""; 0]);
    finish(&mut core, new, &[]);
    assert_eq!(sent(&mut core), ["Cluster v=2 names= nonce=c1"]);
}

#[test]
fn sotw_what_was_asked_for_again_with_a_stale_nonce_is_asked_for_once_more() {
    let mut core = asked(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.outgoing();
    let (first, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a", "b"]));
    finish(&mut core, first, &[]);
    core.outgoing();
    core.set_interest(ENDPOINT, names(&["a"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    let again = |nonce, v| {
        [("a", v), ("a,b", v)].map(|(names, v)| format!("ClusterLoadAssignment v={v} names={names} nonce={nonce}"))
    };
    assert_eq!(sent(&mut core), again("e1", "1"));
    // The server was sending this meanwhile, of what had changed only, and passes over both.
    let (second, ..) = take(&mut core, sotw(ENDPOINT, "2", "e2", &["a"]));
    finish(&mut core, second, &[]);
    assert_eq!(sent(&mut core), again("e2", "2"));
    let (third, added, _) = take(&mut core, sotw(ENDPOINT, "2", "e3", &["b"]));
    assert_eq!(added, ["b"]);
    finish(&mut core, third, &[]);
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=2 names=a,b nonce=e3"]);
}

/// The server was sending `e2` when it got what was asked for with `e1`, and passed over all of that.
#[test]
fn a_name_that_was_dropped_and_wanted_again_behind_the_servers_back_is_asked_for_again() {
    let mut core = core(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    let (token, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a", "b"]));
    finish(&mut core, token, &[]);
    core.set_interest(ENDPOINT, names(&["b"]));
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=1 names=b nonce=e1"], "the answer says it");
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=1 names=a,b nonce=e1"]);
    let (token, ..) = take(&mut core, sotw(ENDPOINT, "2", "e2", &["b"]));
    finish(&mut core, token, &[]);
    // To the server nothing but this is a change.
    let again = ["ClusterLoadAssignment v=2 names=b nonce=e2", "ClusterLoadAssignment v=2 names=a,b nonce=e2"];
    assert_eq!(sent(&mut core), again);
    let (token, ..) = take(&mut core, sotw(ENDPOINT, "2", "e3", &["a", "b"]));
    finish(&mut core, token, &[]);
    assert_eq!(sent(&mut core), ["ClusterLoadAssignment v=2 names=a,b nonce=e3"], "it has come");
}

/// The same, and `e2` came while the name was not wanted: the answer to it is the last chance.
#[test]
fn a_name_that_came_while_it_was_not_wanted_is_left_out_before_it_is_asked_for() {
    let mut core = core(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    let (token, ..) = take(&mut core, sotw(ENDPOINT, "1", "e1", &["a", "b"]));
    finish(&mut core, token, &[]);
    core.set_interest(ENDPOINT, names(&["b"]));
    core.outgoing();
    let (token, added, _) = take(&mut core, sotw(ENDPOINT, "2", "e2", &["a", "b"]));
    assert_eq!(added, ["b"]);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    finish(&mut core, token, &[]);
    let again = ["ClusterLoadAssignment v=2 names=b nonce=e2", "ClusterLoadAssignment v=2 names=a,b nonce=e2"];
    assert_eq!(sent(&mut core), again);
}

#[test]
fn a_server_that_answers_without_a_name_each_time_is_not_asked_for_ever() {
    let mut core = core(Variant::Sotw);
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    core.connected();
    core.outgoing();
    core.set_interest(ENDPOINT, names(&["b"]));
    core.set_interest(ENDPOINT, names(&["a", "b"]));
    assert_eq!(sent(&mut core).len(), 2);
    let mut requests = Vec::new();
    for nonce in 0..20 {
        let (token, ..) = take(&mut core, sotw(ENDPOINT, "1", &nonce.to_string(), &["b"]));
        finish(&mut core, token, &[]);
        requests.push(sent(&mut core).len());
    }
    assert_eq!((requests[0], requests.last()), (2, Some(&1)), "{requests:?}");
}
