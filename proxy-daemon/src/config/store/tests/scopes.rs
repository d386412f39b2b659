//! SRDS: scopes, and the routes that they name.

use envoy_types::pb::envoy::config::route::v3::ScopedRouteConfiguration;

use super::*;
use crate::on_demand::{self, Messages, OnDemand, Wait, Wanted};

pub(super) fn scope(name: &str, routes: &str, key: &str) -> Resource {
    let yaml = format!(
        "{{ name: {name}, route_configuration_name: '{routes}', key: {{ fragments: [{{ string_key: {key} }}] }} }}"
    );
    resource::<ScopedRouteConfiguration>(name, &yaml)
}

fn scopes(added: Vec<Resource>) -> Update {
    update(ScopedRouteConfiguration::type_url(), added)
}

pub(super) fn scoped_listener(name: &str) -> Resource {
    let scoped = format!(
        "scoped_routes: {{ name: s, scope_key_builder: {{ fragments: [{{ header_value_extractor: {{ name: x, index: 0 }} \
         }}] }}, rds_config_source: {ADS}, scoped_rds: {{ scoped_rds_config_source: {ADS} }} }}"
    );
    let rds = format!("rds: {{ route_config_name: none, config_source: {ADS} }}");
    let yaml = listener_yaml(name, "none", "");
    assert!(yaml.contains(&rds));
    resource::<Listener>(name, &yaml.replace(&rds, &scoped))
}

fn counted(listener: &str, leaf: &str) -> u64 {
    crate::stats::gauge(&format!("http.store_{listener}.scoped_rds.s.{leaf}")).value()
}

#[test]
fn a_listener_waits_for_its_scopes_and_for_their_routes() {
    let (store, calls) = running();
    let told = store.update(update(Listener::type_url(), vec![scoped_listener("in")]));
    assert_eq!(names(&told, ScopedRouteConfiguration::type_url()), ["*"]);
    assert_eq!(names(&told, RouteConfiguration::type_url()), [""; 0]);
    assert_eq!(told.rejected(), [], "a listener that waits is answered for");

    let told = store.update(scopes(vec![scope("a", "r1", "one"), scope("b", "r2", "two"), scope("c", "r1", "three")]));
    assert_eq!(told.rejected(), []);
    assert_eq!(names(&told, RouteConfiguration::type_url()), ["r1", "r2"]);
    assert_eq!(calls.take(), ["scopes a b c"]);
    store.update(update(RouteConfiguration::type_url(), vec![routes("r1", "x")]));
    assert_eq!(calls.take(), ["routes r1"]);
    store.update(update(RouteConfiguration::type_url(), vec![routes("r2", "x")]));
    assert_eq!(calls.take(), ["routes r2", "listener in"]);

    let mut next = scopes(vec![scope("b", "r3", "two")]);
    next.removed = vec!["a".to_owned()];
    let told = store.update(next);
    assert_eq!(names(&told, RouteConfiguration::type_url()), ["r1", "r3"]);
    assert_eq!(calls.take(), ["scopes b c", "no routes r2"]);

    let told = store.update(removal(Listener::type_url(), "in"));
    assert!(matches!(told.wanted.get(&ScopedRouteConfiguration::type_url()), Some(Interest::None)));
    assert!(matches!(told.wanted.get(&RouteConfiguration::type_url()), Some(Interest::None)));
    let mut gone = calls.take();
    gone.sort();
    assert_eq!(gone, ["no listener in", "no routes r1", "no routes r3", "no scopes"]);
}

#[test]
fn a_listener_does_not_wait_for_scopes_for_ever() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![scoped_listener("in")]));
    store.later(Duration::from_secs(14));
    assert_eq!(calls.take(), [""; 0]);
    store.later(Duration::from_secs(16));
    assert_eq!(calls.take(), ["listener in"]);
    store.update(scopes(vec![scope("a", "r1", "one")]));
    assert_eq!(calls.take(), ["scopes a"]);
}

#[test]
fn two_scopes_cannot_have_one_key() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![scoped_listener("counted")]));
    let (all, active) = (|| counted("counted", "all_scopes"), || counted("counted", "active_scopes"));
    let told = store.update(scopes(vec![scope("a", "r", "one"), scope("b", "r", "two")]));
    assert_eq!(told.rejected(), []);
    store.update(update(RouteConfiguration::type_url(), vec![routes("r", "x")]));
    assert_eq!((all(), active()), (2, 2));
    calls.take();
    let key = |name: &str| {
        let state = store.lock();
        let set = state.scopes.values().next().unwrap();
        let body = &set.by_name[name].stored.as_ref().unwrap().body;
        json::unpack::<ScopedRouteConfiguration>(body, "").unwrap().key.unwrap().fragments[0].clone()
    };
    let (one, two) = (key("a"), key("b"));

    // They change places: no conflict.
    let told = store.update(scopes(vec![scope("a", "r", "two"), scope("b", "r", "one")]));
    assert_eq!(told.rejected(), []);
    assert_eq!((key("a"), key("b")), (two.clone(), one.clone()));

    let told = store.update(scopes(vec![scope("c", "r", "one"), scope("d", "later", "four")]));
    let rejected = told.rejected();
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0].name, "c");
    assert_eq!(rejected[0].message, "scope key conflict found, first scope is 'b', second scope is 'c'");
    assert_eq!(calls.take(), ["scopes a b", "scopes a b d"]);
    assert_eq!((all(), active()), (3, 3), "be its routes there or not");

    // b takes a's new key and is refused; a, which took b's, has to give it back.
    let told = store.update(scopes(vec![scope("a", "r", "one"), scope("b", "r", "four")]));
    assert_eq!(told.rejected().iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["b", "a"]);
    assert_eq!((key("a"), key("b")), (two, one));
    assert_eq!(calls.take(), [""; 0]);
    let snapshot = store.snapshot();
    let failed = snapshot.of(&ScopedRouteConfiguration::type_url()).iter().filter(|it| it.failure.is_some());
    assert_eq!(failed.map(|it| it.name.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
    assert_eq!((&*snapshot.scoped[0].name, snapshot.scoped[0].scopes.len()), ("s", 3));
}

#[test]
fn a_scope_that_is_wrong_is_refused_by_itself() {
    let (store, _) = running();
    store.update(update(Listener::type_url(), vec![scoped_listener("in")]));
    let key = "key: { fragments: [{ string_key: k }] }";
    let scope_of =
        |name: &str, rest: &str| resource::<ScopedRouteConfiguration>(name, &format!("{{ name: {name}, {rest} }}"));
    let told = store.update(scopes(vec![
        scope_of("none", key),
        scope_of("both", &format!("{key}, route_configuration_name: r, route_configuration: {{ name: i }}")),
        scope_of("good", &format!("{key}, route_configuration_name: r")),
    ]));
    let rejected: Vec<_> = told.rejected().into_iter().map(|it| format!("{}: {}", it.name, it.message)).collect();
    assert_eq!(
        rejected,
        [
            "none: route_configuration_name: At least one of route_configuration_name or route_configuration must be set.",
            "both: route_configuration: Only one of route_configuration_name or route_configuration can be set.",
        ]
    );
    assert_eq!(names(&told, RouteConfiguration::type_url()), ["r"]);
}

fn lazy_scope(name: &str, routes: &str, key: &str) -> Resource {
    let yaml = format!(
        "{{ name: {name}, on_demand: true, route_configuration_name: '{routes}', key: {{ fragments: [{{ string_key: {key} \
         }}] }} }}"
    );
    resource::<ScopedRouteConfiguration>(name, &yaml)
}

fn ask(store: &Fixture, (asking, messages): &mut (OnDemand, Messages), name: &str) -> Wait {
    let wanted = Wanted::Routes { scopes: Arc::default(), source: Arc::default(), name: name.into() };
    let wait = asking.ask(wanted).expect("there is room");
    store.heed(messages.now());
    wait
}

fn is_over(wait: &mut Wait) -> bool {
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    std::pin::pin!(wait.over()).poll(&mut cx).is_ready()
}

fn asked_for(store: &Fixture) -> Option<Interest> {
    store.wanted().remove(&RouteConfiguration::type_url())
}

#[tokio::test]
async fn routes_on_demand_are_asked_for_by_the_first_request() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![scoped_listener("lazy")]));
    let told = store.update(scopes(vec![lazy_scope("a", "r1", "one"), lazy_scope("b", "r2", "two")]));
    assert_eq!((told.rejected(), names(&told, RouteConfiguration::type_url())), (vec![], vec![""; 0]));
    assert_eq!(calls.take(), ["scopes a b", "listener lazy"], "nothing is waited for");
    let gauges = || ["all_scopes", "active_scopes", "on_demand_scopes"].map(|leaf| counted("lazy", leaf));
    assert_eq!(gauges(), [2, 0, 2]);

    let mut requests = on_demand::channel();
    let interest = |names: &[&str]| Interest::Names(names.iter().map(|&name| name.to_owned()).collect());
    let (mut one, mut two) = (ask(&store, &mut requests, "r1"), ask(&store, &mut requests, "r1"));
    assert_eq!(asked_for(&store), Some(interest(&["r1"])));
    assert_eq!(gauges(), [2, 1, 2]);
    assert!(is_over(&mut ask(&store, &mut requests, "r3")), "no scope names it");
    // What cannot be used ends no wait, and neither does time.
    let bad = resource::<RouteConfiguration>("r1", "{ name: r1, virtual_hosts: [{ name: '', domains: ['*'] }] }");
    assert_eq!(store.update(update(RouteConfiguration::type_url(), vec![bad])).rejected().len(), 1);
    store.later(Duration::from_secs(15));
    assert!(!is_over(&mut one) && !is_over(&mut two));
    store.update(update(RouteConfiguration::type_url(), vec![routes("r1", "x")]));
    assert_eq!(calls.take(), ["routes r1"]);
    assert!(is_over(&mut one) && is_over(&mut two));
    assert!(is_over(&mut ask(&store, &mut requests, "r1")), "they are there");

    // Another version of the listener has them too; those of a scope that has gone are not asked for any longer.
    let other = scoped_listener("lazy").body;
    let other = Resource { version: "2".to_owned(), body: other, ..scoped_listener("lazy") };
    let told = store.update(update(Listener::type_url(), vec![other]));
    assert_eq!(told.wanted.get(&RouteConfiguration::type_url()), None);
    let mut gone = ask(&store, &mut requests, "r2");
    assert_eq!(asked_for(&store), Some(interest(&["r1", "r2"])));
    let mut next = scopes(vec![lazy_scope("a", "r1", "four")]);
    next.removed = vec!["b".to_owned()];
    let told = store.update(next);
    assert!(is_over(&mut gone));
    assert_eq!(names(&told, RouteConfiguration::type_url()), ["r1"]);
    assert_eq!(calls.take(), ["scopes a", "no routes r2"]);
    assert_eq!(gauges(), [1, 1, 1]);

    let mut last = ask(&store, &mut requests, "r1");
    assert!(is_over(&mut last));
    let told = store.update(removal(Listener::type_url(), "lazy"));
    assert!(matches!(told.wanted.get(&RouteConfiguration::type_url()), Some(Interest::None)));
}

#[tokio::test]
async fn a_listener_that_warms_does_not_wait_for_routes_on_demand() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![scoped_listener("in")]));
    store.update(scopes(vec![lazy_scope("a", "r1", "one")]));
    let mut requests = on_demand::channel();
    let mut wait = ask(&store, &mut requests, "r1");
    calls.take();
    store.update(update(Listener::type_url(), vec![scoped_listener("other")]));
    assert_eq!(calls.take(), ["listener other"]);
    store.update(removal(Listener::type_url(), "in"));
    assert!(!is_over(&mut wait));
    // Without a listener that has the scopes nobody can tell.
    store.update(removal(Listener::type_url(), "other"));
    assert!(is_over(&mut wait));
}
