//! Sources that cannot be had, and addresses that others have.

use super::*;

fn grpc(cluster: &str) -> String {
    format!(
        "{{ api_config_source: {{ api_type: GRPC, transport_api_version: V3, grpc_services: [{{ envoy_grpc: \
         {{ cluster_name: {cluster} }} }}] }} }}"
    )
}

const UNKNOWN: &str =
    "must have a statically defined non-EDS cluster: 'nobody' does not exist, was added via api, or is an EDS cluster";

fn rejected(store: &Fixture, type_url: String, resource: Resource) -> String {
    let rejected = store.update(update(type_url, vec![resource])).rejected();
    assert_eq!(rejected.len(), 1, "{rejected:?}");
    rejected[0].message.clone()
}

fn at(port: u16, name: &str) -> Resource {
    resource::<Listener>(name, &listener_yaml(name, "web", "").replace("port_value: 0", &format!("port_value: {port}")))
}

#[test]
fn a_cluster_whose_endpoints_cannot_be_had_is_rejected_with_the_path() {
    let (store, calls) = running();
    let cluster = |source: &str| {
        resource::<Cluster>("a", &format!("{{ name: a, type: EDS, eds_cluster_config: {{ eds_config: {source} }} }}"))
    };
    let path = "eds_cluster_config.eds_config";
    assert_eq!(rejected(&store, Cluster::type_url(), cluster(&grpc("nobody"))), format!("{path}: {UNKNOWN}"));
    let text = rejected(&store, Cluster::type_url(), cluster(&grpc("behind")));
    assert!(text.starts_with(path) && text.ends_with("not supported by culvert yet"), "{text}");
    assert_eq!(calls.take(), [""; 0]);
    // One that can be had is waited for.
    assert!(store.update(update(Cluster::type_url(), vec![cluster(&grpc("xds"))])).is_open());
}

#[test]
fn ads_that_is_not_configured_is_rejected_in_envoys_words() {
    let (store, _) = running();
    store.lock().sources.ads = None;
    assert_eq!(
        rejected(&store, Cluster::type_url(), eds_cluster("a")),
        "eds_cluster_config.eds_config: ADS must be configured to support an ADS config source"
    );
}

#[test]
fn a_listener_whose_routes_cannot_be_had_is_rejected_with_the_path() {
    let (store, calls) = running();
    let yaml = listener_yaml("in", "web", "").replace(ADS, &grpc("nobody"));
    let text = rejected(&store, Listener::type_url(), resource::<Listener>("in", &yaml));
    assert_eq!(text, format!("filter_chains[0].filters[0].typed_config.rds.config_source: {UNKNOWN}"));
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn of_two_listeners_with_one_address_the_first_has_it() {
    let (store, _) = running();
    let two = store.update(update(Listener::type_url(), vec![at(8080, "one"), at(8080, "two")]));
    let rejected = two.rejected();
    assert_eq!(rejected.iter().map(|it| it.name.as_str()).collect::<Vec<_>>(), ["two"]);
    assert_eq!(
        rejected[0].message,
        "address: error adding listener: 'two' has duplicate address '127.0.0.1:8080' as existing listener 'one'"
    );
    // Where the other one goes in the same response, it is free.
    let mut swap = update(Listener::type_url(), vec![at(8080, "two")]);
    swap.removed = vec!["one".to_owned()];
    assert_eq!(store.update(swap).rejected(), []);
    assert_eq!(store.update(update(Listener::type_url(), vec![at(0, "any"), at(0, "too")])).rejected(), []);
}

#[test]
fn an_address_is_free_when_no_version_of_a_listener_has_it_any_more() {
    let (store, calls) = running();
    let counted = || {
        let state = store.lock();
        (state.listeners.active, state.listeners.warming)
    };
    store.update(update(Listener::type_url(), vec![at(8080, "one")]));
    assert_eq!(counted(), (0, 1));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "nobody")]));
    assert_eq!(counted(), (1, 0));
    // What is to replace it cannot be bound: the version before serves on.
    calls.unbindable.lock().unwrap().insert("one".to_owned(), "cannot bind".to_owned());
    store.update(update(Listener::type_url(), vec![at(8081, "one")]));
    assert_eq!(counted(), (1, 1));
    for port in [8080, 8081] {
        assert_eq!(store.update(update(Listener::type_url(), vec![at(port, "two")])).rejected().len(), 1, "{port}");
    }
    calls.unbindable.lock().unwrap().clear();
    store.later(Duration::from_secs(1));
    assert_eq!(counted(), (1, 0));
    assert_eq!(store.update(update(Listener::type_url(), vec![at(8081, "two")])).rejected().len(), 1);
    assert_eq!(store.update(update(Listener::type_url(), vec![at(8080, "two")])).rejected(), []);
    assert_eq!(counted(), (2, 0));
    store.update(removal(Listener::type_url(), "one"));
    assert_eq!(store.update(update(Listener::type_url(), vec![at(8081, "three")])).rejected(), []);
    store.update(removal(Listener::type_url(), "two"));
    store.update(removal(Listener::type_url(), "three"));
    assert_eq!(counted(), (0, 0));
    assert!(store.lock().listeners.addresses.is_empty());
}
