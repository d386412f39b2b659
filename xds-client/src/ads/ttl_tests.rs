//! Resources that are good for some time only.

use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use prost::Message as _;

use super::tests::{body, core, names, reject, show};
use super::type_url::{CLUSTER, ENDPOINT};
use super::*;

const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

fn seconds(seconds: i64) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds, nanos: 0 })
}

/// A response with these; a resource without a version is a heartbeat.
fn response(variant: Variant, type_url: &str, version: &str, resources: &[(&str, Option<&str>, i64)]) -> Response {
    let wrappers = resources.iter().map(|(name, content, ttl)| Wrapper {
        name: (*name).to_owned(),
        version: version.to_owned(),
        ttl: seconds(*ttl).filter(|ttl| ttl.seconds > 0),
        resource: content.map(|content| body(type_url, name, content)),
        ..Default::default()
    });
    let (type_url, nonce) = (type_url.to_owned(), "n".to_owned());
    match variant {
        Variant::Sotw => {
            let any = |wrapper: Wrapper| {
                let wrapper = Wrapper { version: String::new(), ..wrapper };
                Any { type_url: WRAPPER.to_owned(), value: wrapper.encode_to_vec() }
            };
            let (version_info, resources) = (version.to_owned(), wrappers.map(any).collect());
            Response::Sotw(DiscoveryResponse { version_info, resources, type_url, nonce, ..Default::default() })
        }
        Variant::Delta => {
            let resources = wrappers.collect();
            Response::Delta(DeltaDiscoveryResponse { resources, type_url, nonce, ..Default::default() })
        }
    }
}

/// A client of both types, at a point in time that the test moves on.
struct Client {
    core: Core,
    variant: Variant,
    now: Instant,
}

impl Client {
    fn new(variant: Variant, type_url: &str, interest: Interest) -> Client {
        let mut core = core(variant);
        core.set_interest(type_url, interest);
        core.connected();
        core.outgoing();
        Client { core, variant, now: Instant::now() }
    }

    fn wait(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    fn take(&mut self, type_url: &str, version: &str, resources: &[(&str, Option<&str>, i64)]) -> Update {
        let response = response(self.variant, type_url, version, resources);
        let Handled::Update(token, update) = self.core.handle(response, self.now) else { panic!("ignored") };
        assert_eq!(self.core.finish(token, Outcome::default()), []);
        self.core.outgoing();
        update
    }

    fn expire(&mut self) -> Vec<String> {
        let updates = self.core.expire(self.now);
        let removed = updates.into_iter().flat_map(|(token, update)| {
            self.core.finish(token, Outcome::default());
            update.removed
        });
        removed.collect()
    }

    fn left(&self) -> Option<u64> {
        self.core.next_expiry().map(|at| (at - self.now).as_secs())
    }
}

#[test]
fn a_resource_of_any_type_is_removed_when_its_time_is_up() {
    for variant in [Variant::Sotw, Variant::Delta] {
        for (type_url, interest) in [(CLUSTER, Interest::Wildcard), (ENDPOINT, names(&["a", "b", "c"]))] {
            let mut client = Client::new(variant, type_url, interest);
            let all = [("a", Some("1"), 10), ("b", Some("1"), 20), ("c", Some("1"), 0)];
            assert_eq!(client.take(type_url, "1", &all).added.len(), 3);
            assert_eq!(client.left(), Some(10));
            client.wait(9);
            assert_eq!(client.expire(), [""; 0]);
            client.wait(1);
            assert_eq!(client.expire(), ["a"]);
            assert_eq!(client.left(), Some(10));
            client.wait(100);
            assert_eq!((client.expire(), client.left()), (vec!["b".to_owned()], None));
            assert_eq!(client.core.outgoing(), [], "nobody is told");
            // A new stream does not claim to have them.
            client.core.connected();
            let first = show(&client.core.outgoing()[0]);
            match variant {
                Variant::Sotw => assert!(first.contains(" v= "), "{first}"),
                Variant::Delta => assert!(first.contains(" have=c@1 "), "{first}"),
            }
        }
    }
}

#[test]
fn a_heartbeat_prolongs_a_resource_and_is_not_handed_out() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut client = Client::new(variant, CLUSTER, Interest::Wildcard);
        client.take(CLUSTER, "1", &[("a", Some("1"), 10), ("b", Some("1"), 0)]);
        client.wait(9);
        let update = client.take(CLUSTER, "1", &[("a", None, 10)]);
        // Not even in state of the world does it say that b is gone.
        assert_eq!((update.added.len(), update.removed.len(), update.complete), (0, 0, false));
        assert_eq!(client.left(), Some(10));
        client.wait(9);
        assert_eq!(client.expire(), [""; 0]);
        client.wait(1);
        assert_eq!(client.expire(), ["a"]);
    }
}

#[test]
fn the_same_content_again_prolongs_a_resource_or_lifts_its_limit() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut client = Client::new(variant, CLUSTER, Interest::Wildcard);
        client.take(CLUSTER, "1", &[("a", Some("1"), 10)]);
        client.wait(5);
        let update = client.take(CLUSTER, "2", &[("a", Some("1"), 10)]);
        assert_eq!((update.added.len(), update.unchanged.len()), (0, 1));
        assert_eq!(client.left(), Some(10));
        client.take(CLUSTER, "3", &[("a", Some("1"), 0)]);
        assert_eq!(client.left(), None);
    }
}

#[test]
fn a_heartbeat_of_what_is_not_here_is_rejected() {
    for variant in [Variant::Sotw, Variant::Delta] {
        let mut client = Client::new(variant, ENDPOINT, names(&["a", "b"]));
        client.take(ENDPOINT, "1", &[("a", Some("1"), 10)]);
        for (version, name, rejected) in [("1", "b", true), ("2", "a", variant == Variant::Delta), ("1", "c", false)] {
            let response = response(variant, ENDPOINT, version, &[(name, None, 10)]);
            let Handled::Update(token, _) = client.core.handle(response, client.now) else { panic!("ignored") };
            let rejections = client.core.finish(token, Outcome::default());
            assert_eq!(!rejections.is_empty(), rejected, "{name} {version}: {rejections:?}");
        }
        assert_eq!(client.left(), Some(10));
    }
}

/// As in Envoy: the server does not know yet that this version was refused, and it is not in force.
#[test]
fn a_heartbeat_of_what_was_refused_is_rejected_and_prolongs_nothing() {
    let mut client = Client::new(Variant::Delta, CLUSTER, Interest::Wildcard);
    client.take(CLUSTER, "1", &[("a", Some("1"), 14)]);
    let refused = response(Variant::Delta, CLUSTER, "2", &[("a", Some("2"), 4)]);
    let Handled::Update(token, _) = client.core.handle(refused, client.now) else { panic!("ignored") };
    client.core.finish(token, Outcome { rejected: reject(&["a"]) });
    client.wait(3);
    let heartbeat = response(Variant::Delta, CLUSTER, "2", &[("a", None, 4)]);
    let Handled::Update(token, _) = client.core.handle(heartbeat, client.now) else { panic!("ignored") };
    assert_eq!(client.core.finish(token, Outcome::default()).len(), 1);
    assert_eq!(client.left(), Some(1));
}

#[test]
fn what_expires_while_it_is_being_applied_is_removed_after_it() {
    let mut client = Client::new(Variant::Delta, CLUSTER, Interest::Wildcard);
    let response = response(Variant::Delta, CLUSTER, "1", &[("a", Some("1"), 10)]);
    let Handled::Update(token, _) = client.core.handle(response, client.now) else { panic!("ignored") };
    client.wait(10);
    let mut updates = client.core.expire(client.now);
    let (removal, update) = updates.pop().unwrap();
    assert_eq!(update.removed, ["a"]);
    client.core.finish(token, Outcome::default());
    client.core.finish(removal, Outcome::default());
    client.core.connected();
    assert_eq!(show(&client.core.outgoing()[0]), "Cluster node + - have= nonce=");
}

#[test]
fn a_resource_that_was_refused_or_lost_interest_in_leaves_no_timer() {
    let mut client = Client::new(Variant::Delta, ENDPOINT, names(&["a", "b"]));
    client.take(ENDPOINT, "1", &[("a", Some("1"), 10)]);
    client.core.set_interest(ENDPOINT, names(&["b"]));
    assert_eq!(client.left(), None);
    let response = response(Variant::Delta, ENDPOINT, "1", &[("b", Some("1"), 10)]);
    let Handled::Update(token, _) = client.core.handle(response, client.now) else { panic!("ignored") };
    client.core.finish(token, Outcome { rejected: reject(&["b"]) });
    client.wait(10);
    assert_eq!(client.expire(), ["b"], "that it was refused is forgotten as well");
    assert_eq!(client.left(), None);
}

#[test]
fn a_time_beyond_the_clock_never_ends() {
    let mut client = Client::new(Variant::Delta, CLUSTER, Interest::Wildcard);
    client.take(CLUSTER, "1", &[("a", Some("1"), i64::MAX)]);
    assert_eq!(client.left(), None);
}
