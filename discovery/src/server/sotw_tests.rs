use std::collections::BTreeMap;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::google::rpc;

use super::*;
use crate::resources::ProxyKind;
use crate::server::test_support::snapshot;

const CDS: &str = type_url::CLUSTER;
const EDS: &str = type_url::ENDPOINT;
const LDS: &str = type_url::LISTENER;
const RDS: &str = type_url::ROUTE;

/// A client of one session. It remembers the nonces, as real ones do.
#[derive(Default)]
struct Client {
    session: SotwSession,
    names: BTreeMap<&'static str, Vec<String>>,
}

impl Client {
    fn request(&mut self, type_url: &'static str, nonce: &str, error: Option<&str>) {
        let request = DiscoveryRequest {
            type_url: type_url.to_owned(),
            resource_names: self.names.get(type_url).cloned().unwrap_or_default(),
            response_nonce: nonce.to_owned(),
            error_detail: error.map(|message| rpc::Status { message: message.to_owned(), ..Default::default() }),
            ..Default::default()
        };
        self.session.handle(request).unwrap();
    }

    fn subscribe(&mut self, type_url: &'static str, names: &[&str], nonce: &str) {
        self.names.insert(type_url, names.iter().map(|name| (*name).to_owned()).collect());
        self.request(type_url, nonce, None);
    }

    fn ack(&mut self, response: &Response) {
        let type_url = [CDS, EDS, LDS, RDS].into_iter().find(|url| *url == response.type_url).unwrap();
        self.request(type_url, &response.nonce, None);
    }

    /// Takes and acknowledges all that there is; gives the last part of each type's URL, in order.
    fn take_all(&mut self, snapshot: &Snapshot) -> Vec<&'static str> {
        let mut types = Vec::new();
        while let Some(response) = self.session.poll(snapshot) {
            types.push([CDS, EDS, LDS, RDS].into_iter().find(|url| *url == response.type_url).unwrap());
            self.ack(&response);
        }
        types
    }

    /// A client that has subscribed as Envoy does and has everything of this snapshot.
    fn in_sync(snapshot: &Snapshot, endpoints: &[&str], routes: &[&str]) -> Self {
        let mut client = Self::default();
        client.subscribe(CDS, &[], "");
        client.subscribe(EDS, endpoints, "");
        client.subscribe(LDS, &[], "");
        client.subscribe(RDS, routes, "");
        client.take_all(snapshot);
        client
    }
}

fn names(response: &Response, snapshot: &Snapshot) -> Vec<String> {
    let all = snapshot.resources(ProxyKind::Foreign).of_type(&response.type_url).unwrap();
    let is_newest = |resource: &Arc<Resource>| all.resources.get(&resource.name) == Some(resource);
    let name_of = |resource| if is_newest(resource) { resource.name.to_string() } else { "(older)".to_owned() };
    response.resources.iter().map(name_of).collect()
}

#[test]
fn everything_comes_in_order_once() {
    let snapshot = snapshot(&[("users", "http", 80), ("orders", "http", 81)]);
    let mut client = Client::default();
    client.subscribe(RDS, &["outbound_http_80"], "");
    client.subscribe(LDS, &[], "");
    client.subscribe(EDS, &["users.default:80"], "");
    client.subscribe(CDS, &[], "");
    let responses: Vec<_> = std::iter::from_fn(|| client.session.poll(&snapshot)).collect();
    let types: Vec<_> = responses.iter().map(|response| &*response.type_url).collect();
    assert_eq!(types, [CDS, EDS, LDS, RDS]);
    assert_eq!(names(&responses[0], &snapshot), ["orders.default:81", "original_dst", "users.default:80"]);
    assert_eq!(names(&responses[1], &snapshot), ["users.default:80"]);
    assert_eq!(names(&responses[3], &snapshot), ["outbound_http_80"]);
    for response in &responses {
        client.ack(response);
    }
    assert_eq!(client.session.poll(&snapshot), None);
}

#[test]
fn only_types_that_changed_are_pushed() {
    let before = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&before, &["users.default:80"], &["outbound_http_80"]);
    // Another endpoint changes EDS alone.
    let after = crate::server::test_support::snapshot_with(&[("users", "http", 80)], &["10.1.0.1", "10.1.0.2"]);
    assert_eq!(client.take_all(&after), [EDS]);
    // Another service adds to CDS and RDS; EDS is not pushed, as its endpoints are not subscribed yet.
    let more = crate::server::test_support::snapshot_with(
        &[("users", "http", 80), ("orders", "http", 80)],
        &["10.1.0.1", "10.1.0.2"],
    );
    assert_eq!(client.take_all(&more), [CDS, RDS]);
}

#[test]
fn nothing_is_sent_before_the_last_response_is_answered_and_then_only_the_newest() {
    let [first, second, third] = [1, 2, 3].map(|n| {
        let addresses: Vec<_> = (1..=n).map(|i| format!("10.1.0.{i}")).collect();
        let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
        crate::server::test_support::snapshot_with(&[("users", "http", 80)], &addresses)
    });
    let mut client = Client::default();
    client.subscribe(EDS, &["users.default:80"], "");
    let response = client.session.poll(&first).unwrap();
    assert_eq!(client.session.poll(&second), None);
    assert_eq!(client.session.poll(&third), None);
    client.ack(&response);
    let response = client.session.poll(&third).unwrap();
    assert_eq!(names(&response, &third), ["users.default:80"]);
    client.ack(&response);
    assert_eq!(client.session.poll(&third), None);
}

#[test]
fn a_stale_nonce_is_ignored() {
    let snapshot = snapshot(&[("users", "http", 80), ("orders", "http", 80)]);
    let mut client = Client::default();
    client.subscribe(EDS, &["users.default:80"], "");
    let first = client.session.poll(&snapshot).unwrap();
    client.subscribe(EDS, &["users.default:80", "orders.default:80"], &first.nonce);
    let second = client.session.poll(&snapshot).unwrap();
    assert_eq!(second.resources.len(), 2);
    // What crossed the second response on its way neither acknowledges it nor changes the subscription.
    client.subscribe(EDS, &["users.default:80"], &first.nonce);
    assert_eq!(client.session.poll(&snapshot), None);
    assert_eq!(client.session.status().types[EDS].acked, client.session.status().types[EDS].sent);
    let after =
        crate::server::test_support::snapshot_with(&[("users", "http", 80), ("orders", "http", 80)], &["10.1.0.9"]);
    assert_eq!(client.session.poll(&after), None, "the second response is still unanswered");
    client.subscribe(EDS, &["users.default:80", "orders.default:80"], &second.nonce);
    assert_eq!(client.session.poll(&after).unwrap().resources.len(), 2);
}

#[test]
fn a_rejected_version_is_not_sent_again_but_the_next_one_is() {
    let bad = snapshot(&[("users", "http", 80)]);
    let mut client = Client::default();
    client.subscribe(CDS, &[], "");
    let response = client.session.poll(&bad).unwrap();
    client.request(CDS, &response.nonce, Some("clusters[0]: no\nthank you"));
    assert_eq!(client.session.poll(&bad), None);
    let status = client.session.status().types[CDS].clone();
    assert_eq!(status.acked, None);
    let nack = status.nack.unwrap();
    assert_eq!((&*nack.version, &*nack.reason), (&*response.version, "clusters[0]: no thank you"));
    let good = snapshot(&[("orders", "http", 80)]);
    let response = client.session.poll(&good).unwrap();
    client.ack(&response);
    assert_eq!(client.session.status().types[CDS].acked.as_deref(), Some(&*response.version));
}

#[test]
fn a_first_request_is_answered_even_with_nothing() {
    let empty = snapshot(&[]);
    let mut client = Client::default();
    client.subscribe(EDS, &["ghost.default:80"], "");
    assert_eq!(client.session.poll(&empty).unwrap().resources, []);
    let mut client = Client::default();
    let request = DiscoveryRequest { type_url: "type.googleapis.com/who.knows".into(), ..Default::default() };
    client.session.handle(request).unwrap();
    assert_eq!(client.session.poll(&empty).unwrap().resources, []);
}

#[test]
fn a_resource_that_appears_later_is_sent() {
    let mut client = Client::in_sync(&snapshot(&[]), &["users.default:80"], &[]);
    assert!(client.take_all(&snapshot(&[("users", "http", 80)])).contains(&EDS));
}

#[test]
fn clusters_go_only_after_the_routes_that_used_them() {
    let before = snapshot(&[("users", "http", 80), ("orders", "http", 80)]);
    let after = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&before, &["users.default:80", "orders.default:80"], &["outbound_http_80"]);
    let routes = client.session.poll(&after).unwrap();
    assert_eq!(routes.type_url, RDS);
    assert_eq!(client.session.poll(&after), None, "the routes are not in force yet");
    client.ack(&routes);
    let clusters = client.session.poll(&after).unwrap();
    assert_eq!(clusters.type_url, CDS);
    assert_eq!(names(&clusters, &after), ["original_dst", "users.default:80"]);
    client.ack(&clusters);
    assert_eq!(client.session.poll(&after), None);
}

#[test]
fn clusters_stay_while_newer_users_of_them_are_refused() {
    let (users, orders, mail) = (("users", "http", 80), ("orders", "http", 80), ("mail", "tcp", 90));
    // The last one goes, which a route used, or a listener.
    for (before, refused, mending) in
        [([mail, users, orders], RDS, ("new", "http", 80)), ([users, orders, mail], LDS, ("new", "tcp", 91))]
    {
        let mut client = Client::in_sync(&snapshot(&before), &["other.default:80"], &["outbound_http_80"]);
        let after = snapshot(&before[..2]);
        let response = client.session.poll(&after).unwrap();
        assert_eq!(response.type_url, refused);
        client.request(refused, &response.nonce, Some("no"));
        assert_eq!(client.session.poll(&after), None, "{refused}: the older ones are in use");
        // Saying again what it wants is no ACK.
        client.request(refused, &response.nonce, None);
        assert_eq!(client.session.poll(&after), None, "{refused}");
        let mended = snapshot(&[before[0], before[1], mending]);
        assert_eq!(client.take_all(&mended), [CDS, refused, CDS]);
        let gone = if refused == RDS { "orders.default:80" } else { "mail.default:90" };
        assert!(!client.session.types[CDS].sent.contains_key(gone), "{refused}");
    }
}

#[test]
fn additions_do_not_wait_for_removals() {
    let before = snapshot(&[("orders", "http", 80)]);
    let after = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&before, &["orders.default:80"], &["outbound_http_80"]);
    let clusters = client.session.poll(&after).unwrap();
    assert_eq!(names(&clusters, &after), ["(older)", "original_dst", "users.default:80"]);
    client.ack(&clusters);
    assert_eq!(client.take_all(&after), [RDS, CDS]);
}

#[test]
fn a_removed_cluster_goes_at_once_when_nothing_can_use_it() {
    // A client without listeners and routes, and one whose routes were not touched.
    let before = snapshot(&[("users", "tcp", 90)]);
    let after = snapshot(&[]);
    let mut lonely = Client::default();
    lonely.subscribe(CDS, &[], "");
    lonely.take_all(&before);
    assert_eq!(lonely.take_all(&after), [CDS]);
    let mut other = Client::in_sync(&before, &[], &["outbound_http_1"]);
    assert_eq!(other.take_all(&after), [LDS, CDS]);
}

#[test]
fn a_service_that_comes_back_is_sent_again() {
    let (with, without) = (snapshot(&[("users", "http", 80)]), snapshot(&[]));
    let mut client = Client::in_sync(&with, &["users.default:80"], &["outbound_http_80"]);
    client.take_all(&without);
    client.subscribe(EDS, &[], &last_nonce(&client, EDS));
    assert!(client.take_all(&with).contains(&CDS));
    client.subscribe(EDS, &["users.default:80"], &last_nonce(&client, EDS));
    assert_eq!(client.take_all(&with), [EDS]);
}

fn last_nonce(client: &Client, type_url: &str) -> String {
    client.session.types[type_url].nonce.clone().unwrap()
}

#[test]
fn an_empty_list_after_names_means_none() {
    let snapshot = snapshot(&[("users", "http", 80)]);
    let mut client = Client::in_sync(&snapshot, &["users.default:80"], &[]);
    client.subscribe(EDS, &[], &last_nonce(&client, EDS));
    let after = crate::server::test_support::snapshot_with(&[("users", "http", 80)], &["10.1.0.7"]);
    assert_eq!(client.take_all(&after), [] as [&str; 0]);
    client.subscribe(EDS, &["*"], &last_nonce(&client, EDS));
    assert_eq!(client.take_all(&after), [EDS]);
}

#[test]
fn culvert_proxies_get_the_override_filter_and_others_do_not() {
    let snapshot = snapshot(&[("users", "http", 80)]);
    for (agent, expected) in [("culvert", true), ("envoy", false)] {
        let mut session = SotwSession::default();
        let node = Node { user_agent_name: agent.into(), id: "n".into(), ..Default::default() };
        let request = DiscoveryRequest { type_url: LDS.into(), node: Some(node), ..Default::default() };
        session.handle(request).unwrap();
        let body = session.poll(&snapshot).unwrap().resources.remove(0).body().value;
        let name = b"culvert.filters.http.override";
        assert_eq!(body.windows(name.len()).any(|window| window == name), expected, "{agent}");
    }
}

#[test]
fn streams_are_bounded() {
    let mut session = SotwSession::default();
    assert!(session.handle(DiscoveryRequest::default()).is_err());
    for i in 0..super::super::MAX_TYPES {
        session.handle(DiscoveryRequest { type_url: format!("t{i}"), ..Default::default() }).unwrap();
    }
    let error = session.handle(DiscoveryRequest { type_url: "more".into(), ..Default::default() }).unwrap_err();
    assert_eq!(error.code(), tonic::Code::ResourceExhausted);
}
