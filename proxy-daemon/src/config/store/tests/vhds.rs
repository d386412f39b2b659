//! Virtual hosts of VHDS.

use envoy_types::pb::envoy::config::route::v3::VirtualHost;

use prost::Message as _;

use super::*;
use crate::on_demand::{self, Messages, OnDemand, Wait, Wanted};

fn routes_with_vhds(domain: &str) -> Resource {
    routes_named("web", domain)
}

fn routes_named(name: &str, domain: &str) -> Resource {
    let host = format!("{{ name: own, domains: ['{domain}'] }}");
    let yaml = format!("{{ name: {name}, virtual_hosts: [{host}], vhds: {{ config_source: {ADS} }} }}");
    resource::<RouteConfiguration>(name, &yaml)
}

fn host(name: &str, domain: &str) -> Resource {
    resource::<VirtualHost>(&format!("web/{name}"), &format!("{{ name: {name}, domains: ['{domain}'] }}"))
}

fn hosts(added: Vec<Resource>) -> Update {
    update(VirtualHost::type_url(), added)
}

fn ask(store: &Fixture, (asking, messages): &mut (OnDemand, Messages), name: &str) -> Wait {
    let wanted = Wanted::VirtualHost { source: Arc::default(), name: name.into() };
    let wait = asking.ask(wanted).expect("there is room");
    store.heed(messages.now());
    wait
}

fn is_over(wait: &mut Wait) -> bool {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::pin!(wait.over()).poll(&mut cx).is_ready()
}

/// A store whose listener has its routes, and waits for their virtual hosts.
fn with_routes() -> (Fixture, Recorder) {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    let told = store.update(update(RouteConfiguration::type_url(), vec![routes_with_vhds("own.test")]));
    assert_eq!(told.wanted.get(&VirtualHost::type_url()), Some(&Interest::Wildcard));
    assert!(!calls.take().iter().any(|line| line == "listener in"), "it waits for the virtual hosts");
    (store, calls)
}

#[test]
fn a_listener_waits_for_the_first_virtual_hosts() {
    let (store, calls) = with_routes();
    assert!(store.update(hosts(vec![host("a", "a.test")])).rejected().is_empty());
    assert_eq!(calls.take(), ["routes web", "listener in"]);
    // It is shown with them.
    let shown = store.snapshot();
    let shown = shown.of(&RouteConfiguration::type_url())[0].active.clone().expect("it is in force");
    let shown = RouteConfiguration::decode(&*shown.body.value).expect("a route configuration");
    let named: Vec<_> = shown.virtual_hosts.iter().map(|host| host.name.as_str()).collect();
    assert_eq!((named, shown.vhds.is_some()), (vec!["own", "a"], true));
    // Those of no route configuration change nothing.
    let mut other = host("b", "b.test");
    other.name = "other/b".to_owned();
    assert!(store.update(hosts(vec![other])).rejected().is_empty());
    assert!(calls.take().is_empty());
    store.update(removal(VirtualHost::type_url(), "web/a"));
    assert_eq!(calls.take(), ["routes web"]);

    let told = store.update(removal(Listener::type_url(), "in"));
    assert_eq!(told.wanted.get(&VirtualHost::type_url()), Some(&Interest::None));
}

#[test]
fn a_listener_does_not_wait_for_ever() {
    let (store, calls) = with_routes();
    store.later(Duration::from_secs(15));
    assert!(calls.take().iter().any(|line| line == "listener in"));
}

#[test]
fn a_domain_belongs_to_one_virtual_host() {
    let (store, _) = with_routes();
    let rejected =
        store.update(hosts(vec![host("a", "own.test"), host("b", "b.test"), host("c", "b.test")])).rejected();
    let names: Vec<_> = rejected.iter().map(|it| it.name.as_str()).collect();
    assert_eq!(names, ["web/a", "web/c"]);
    assert!(rejected[0].message.contains("Duplicate entry of domain own.test"), "{rejected:?}");
    // A newer version of its own is no duplicate.
    let newer = host("b", "b.test, x.test");
    assert!(store.update(hosts(vec![newer])).rejected().is_empty());
}

/// The virtual hosts that a route configuration is shown with.
fn shown(store: &Fixture, routes: &str) -> Vec<String> {
    let shown = store.snapshot();
    let shown = shown.of(&RouteConfiguration::type_url()).iter().find(|it| it.name == routes).expect("it is known");
    let shown = shown.active.as_ref().expect("it is in force");
    let shown = RouteConfiguration::decode(&*shown.body.value).expect("a route configuration");
    shown.virtual_hosts.into_iter().map(|host| host.name).collect()
}

#[test]
fn virtual_hosts_may_come_before_their_routes() {
    let (store, calls) = with_routes();
    let early = |domain: &str| Resource { name: "other/b".to_owned(), ..host("b", domain) };
    let gone = Resource { name: "other/gone".to_owned(), ..host("gone", "gone.test") };
    store.update(hosts(vec![host("a", "a.test"), early("b.test"), gone]));
    store.update(removal(VirtualHost::type_url(), "other/gone"));
    calls.take();
    // The server does not send them again, however often their listener comes and goes.
    for _ in 0..2 {
        store.update(update(Listener::type_url(), vec![listener("second", "other")]));
        store.update(update(RouteConfiguration::type_url(), vec![routes_named("other", "second.test")]));
        assert_eq!(calls.take(), ["routes other", "listener second"], "the source has answered before");
        assert_eq!(shown(&store, "other"), ["own", "b"]);
        store.update(hosts(vec![early("b.test, c.test")]));
        assert_eq!(calls.take(), ["routes other"]);
        store.update(removal(Listener::type_url(), "second"));
        calls.take();
    }
    // Nor where what they are beside has none for a while.
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "nobody")]));
    let told = store.wanted();
    store.update(update(RouteConfiguration::type_url(), vec![routes_with_vhds("own.test")]));
    // That source was not asked any more, and sends everything anew.
    assert_eq!(told, BTreeMap::new());
    assert_eq!(shown(&store, "web"), ["own"]);
}

#[test]
fn a_virtual_host_that_is_mended_is_not_shown_as_refused() {
    let (store, _) = with_routes();
    let failed = || store.snapshot().of(&VirtualHost::type_url()).iter().filter(|it| it.failure.is_some()).count();
    assert_eq!(store.update(hosts(vec![host("a", "own.test")])).rejected().len(), 1);
    assert_eq!(failed(), 1);
    assert_eq!(store.update(hosts(vec![host("a", "a.test")])).rejected(), []);
    assert_eq!(failed(), 0);
    // Nor is one whose route configuration has gone.
    assert_eq!(store.update(hosts(vec![host("b", "own.test")])).rejected().len(), 1);
    store.update(removal(Listener::type_url(), "in"));
    assert!(store.snapshot().of(&VirtualHost::type_url()).is_empty());
}

#[tokio::test]
async fn requests_wait_for_their_host() {
    let (store, _) = with_routes();
    store.update(hosts(Vec::new()));
    let mut requests = on_demand::channel();
    let (mut late, mut none) = (ask(&store, &mut requests, "web/late.test"), ask(&store, &mut requests, "web/no.test"));
    let interest = |names: &[&str]| Interest::WildcardAnd(names.iter().map(|&name| name.to_owned()).collect());
    assert_eq!(store.wanted().remove(&VirtualHost::type_url()), Some(interest(&["web/late.test", "web/no.test"])));
    store.update(hosts(vec![host("x", "late.test")]));
    assert!(is_over(&mut late) && !is_over(&mut none));
    let told = store.update(Update { absent: vec!["web/no.test".to_owned()], ..hosts(Vec::new()) });
    assert!(is_over(&mut none));
    assert_eq!(told.wanted.get(&VirtualHost::type_url()), Some(&interest(&["web/late.test"])));
    assert!(is_over(&mut ask(&store, &mut requests, "web/late.test")), "it is there");

    // What is gone is asked for again.
    let told = store.update(removal(VirtualHost::type_url(), "web/x"));
    assert_eq!(told.wanted.get(&VirtualHost::type_url()), Some(&Interest::Wildcard));
    let mut again = ask(&store, &mut requests, "web/late.test");
    assert!(!is_over(&mut again));
    assert_eq!(store.wanted().remove(&VirtualHost::type_url()), Some(interest(&["web/late.test"])));
}
