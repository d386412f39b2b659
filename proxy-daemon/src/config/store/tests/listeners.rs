//! Listeners: bound, warming, started, replaced, removed.

use super::*;

#[test]
fn a_listener_serves_on_while_its_next_version_waits() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "one")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("one", "users")]));
    assert_eq!(calls.take(), ["routes one", "listener in"]);

    store.update(update(Listener::type_url(), vec![listener("in", "two")]));
    assert_eq!(calls.take(), [""; 0]);
    let snapshot = store.snapshot();
    let entry = &snapshot.of(&Listener::type_url())[0];
    let route_name = |version: &Option<Arc<Version>>| {
        let listener = json::any_to_json(&version.as_ref()?.body);
        let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
        manager["rds"]["route_config_name"].as_str().map(str::to_owned)
    };
    assert_eq!(route_name(&entry.active).as_deref(), Some("one"));
    assert_eq!(route_name(&entry.warming).as_deref(), Some("two"));
    let unready = &snapshot.unready[0];
    assert_eq!((unready.listener.as_str(), unready.is_static), ("in", false));
    assert_eq!(unready.targets, ["shared target RdsRouteConfigSubscription RDS init two"]);
    let known = snapshot.of(&RouteConfiguration::type_url());
    assert_eq!((known[1].name.as_str(), known[1].missing), ("two", Some(Missing::Requested)));

    store.update(update(RouteConfiguration::type_url(), vec![routes("two", "users")]));
    assert_eq!(calls.take(), ["routes two", "listener in", "no routes one"]);
}

#[test]
fn a_removed_listener_goes_and_its_routes_are_not_wanted_any_more() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web"), listener("never", "other")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    calls.take();
    let outcome = store.update(removal(Listener::type_url(), "in"));
    assert_eq!(calls.take(), ["no listener in", "no routes web"]);
    assert_eq!(names(&outcome, RouteConfiguration::type_url()), ["other"]);
    store.update(removal(Listener::type_url(), "never"));
    assert_eq!(calls.take(), ["no listener never", "no routes other"]);
    assert!(store.is_initialized(), "nobody waits");
}

#[test]
fn the_override_filter_subscribes_to_offloaded_services() {
    let (store, calls) = running();
    let filter = "      - name: override\n        typed_config: { \"@type\": type.googleapis.com/culvert.extensions.\
                  filters.http.overrides.v1.Override, original_dst_cluster: offloaded }";
    let outcome = store.update(update(Listener::type_url(), vec![listener("plain", "web")]));
    assert_eq!(names(&outcome, OffloadedService::type_url()), [""; 0]);
    let with_filter = resource::<Listener>("in", &listener_yaml("in", "web", filter));
    let outcome = store.update(update(Listener::type_url(), vec![with_filter]));
    assert_eq!(names(&outcome, OffloadedService::type_url()), ["*"]);
    assert_eq!(names(&outcome, OverrideShare::type_url()), ["*"]);

    let service = |address: &str| {
        let endpoint = format!("{{ revision: r, address: {address}, port: 80 }}");
        resource::<OffloadedService>("users", &format!("{{ cluster_name: users, endpoints: [{endpoint}] }}"))
    };
    store.update(update(OffloadedService::type_url(), vec![service("10.0.0.9")]));
    assert_eq!(calls.take(), ["offloaded true"]);
    let outcome = store.update(update(OffloadedService::type_url(), vec![service("nowhere")]));
    assert_eq!(outcome.rejected()[0].message, "endpoints[0].address: \"nowhere\" is not an IP address");
    assert_eq!(calls.take(), ["offloaded true"], "the last good one stays");
    store.update(removal(OffloadedService::type_url(), "users"));
    assert_eq!(calls.take(), ["offloaded false"]);

    let share = |token: &str| {
        let overrides = "{ version: 1, overrides: [{ service: users, revision: r }] }";
        resource::<OverrideShare>("s", &format!("{{ token: {token}, expires: 1, overrides: {overrides} }}"))
    };
    store.update(update(OverrideShare::type_url(), vec![share("abcd2345")]));
    assert_eq!(calls.take(), ["offloaded true"]);
    let outcome = store.update(update(OverrideShare::type_url(), vec![share("x")]));
    assert_eq!(outcome.rejected()[0].message, "token: must be 8 to 64 of a-z0-9");
    assert_eq!(calls.take(), ["offloaded true"], "the last good one stays");
    store.update(removal(OverrideShare::type_url(), "s"));
    assert_eq!(calls.take(), ["offloaded false"]);
}

#[test]
fn a_listener_is_bound_at_once_and_serves_when_its_routes_are_there() {
    let (store, calls) = running();
    let lds = store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    assert_eq!(names(&lds, RouteConfiguration::type_url()), ["web"]);
    assert_eq!(lds.rejected(), [], "it is bound; servers may send routes only after that");
    assert_eq!(calls.take(), [""; 0]);
    let rds = store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    assert_eq!(rds.rejected(), []);
    assert_eq!(calls.take(), ["routes web", "listener in"]);
}

#[test]
fn routes_that_do_not_come_are_given_up() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "late")]));
    store.later(Duration::from_secs(14));
    assert_eq!(calls.take(), [""; 0]);
    store.later(Duration::from_secs(16));
    assert_eq!(calls.take(), ["listener in"]);
    assert_eq!(store.metric("http.store_in.rds.late.init_fetch_timeout"), Some(1));
}

#[test]
fn routes_that_are_refused_are_not_waited_for() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    let bad = resource::<RouteConfiguration>("web", "{ name: web, virtual_hosts: [{ name: v }] }");
    assert_eq!(store.update(update(RouteConfiguration::type_url(), vec![bad])).rejected().len(), 1);
    assert_eq!(calls.take(), ["listener in"]);
}

#[test]
fn a_listener_that_cannot_be_bound_is_rejected_and_tried_again() {
    let (store, calls) = running();
    calls.unbindable.lock().unwrap().insert("in".to_owned(), "cannot bind".to_owned());
    let lds = store.update(update(Listener::type_url(), vec![listener("in", "web"), listener("other", "web")]));
    let rejection = Rejection { name: "in".to_owned(), message: "cannot bind".to_owned() };
    assert_eq!(lds.rejected(), std::slice::from_ref(&rejection));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    assert_eq!(calls.take(), ["routes web", "listener other"]);
    let failed = store.snapshot().of(&Listener::type_url())[0].failure.clone().unwrap();
    assert_eq!(failed.details, "cannot bind");
    assert!(!store.store.is_in_force());
    let again = store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    assert_eq!(again.rejected(), [rejection], "it is still not in force");

    store.later(Duration::from_secs(2));
    assert_eq!(calls.take(), [""; 0]);
    calls.unbindable.lock().unwrap().clear();
    store.later(Duration::from_secs(4));
    assert_eq!(calls.take(), ["listener in"]);
    assert!(store.snapshot().of(&Listener::type_url())[0].failure.is_none());
    assert!(store.store.is_in_force());
}

#[test]
fn a_replaced_listener_that_cannot_be_bound_leaves_the_old_one_serving() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    calls.take();
    calls.unbindable.lock().unwrap().insert("in".to_owned(), "cannot bind".to_owned());
    let lds = store.update(update(Listener::type_url(), vec![listener("in", "two")]));
    assert_eq!(lds.rejected().len(), 1);
    assert_eq!(calls.take(), [""; 0]);
    let snapshot = store.snapshot();
    let known = &snapshot.of(&Listener::type_url())[0];
    assert!(known.active.is_some() && known.failure.is_some());
}

#[test]
fn a_warming_listener_may_be_replaced_and_removed() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener("in", "one")]));
    let second = store.update(update(Listener::type_url(), vec![listener("in", "two")]));
    assert_eq!(names(&second, RouteConfiguration::type_url()), ["two"]);
    store.update(update(RouteConfiguration::type_url(), vec![routes("one", "users")]));
    assert_eq!(calls.take(), ["no routes one"], "they are not wanted any more");
    let removed = store.update(removal(Listener::type_url(), "in"));
    assert_eq!(names(&removed, RouteConfiguration::type_url()), [""; 0]);
    assert_eq!(calls.take(), ["no listener in", "no routes two"]);
    store.later(Duration::from_secs(60));
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn an_update_that_is_replaced_before_it_is_bound_is_answered() {
    let (store, _) = running();
    let send = |resource| {
        let (sender, outcome) = std::sync::mpsc::channel();
        let done = Done::new(move |outcome| sender.send(outcome.expect("not forgotten")).unwrap());
        store.store.update(&Source::Ads, update(Listener::type_url(), vec![resource]), done);
        outcome
    };
    // The workers do nothing meanwhile.
    let (first, same, second) = (send(listener("in", "one")), send(listener("in", "one")), send(listener("in", "two")));
    assert_eq!(first.try_recv().unwrap().rejected, []);
    assert_eq!(same.try_recv().unwrap().rejected, []);
    assert!(second.try_recv().is_err());
    store.workers();
    assert_eq!(second.try_recv().unwrap().rejected, []);
}
