//! ECDS: filters in their places.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;

use super::*;
use crate::{config::model::INITIAL_FETCH_TIMEOUT, stats};

pub(super) const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const OVERRIDE: &str = "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override";

pub(super) fn router(name: &str, suppress: bool) -> Resource {
    extension(name, &format!("{{ '@type': {ROUTER}, suppress_envoy_headers: {suppress} }}"))
}

fn extension(name: &str, config: &str) -> Resource {
    resource::<TypedExtensionConfig>(name, &format!("{{ name: {name}, typed_config: {config} }}"))
}

/// A listener whose one filter, by name, is discovered; `more` is added to its `ExtensionConfigSource`.
pub(super) fn listener_of(name: &str, filter: &str, type_url: &str, more: &str) -> Resource {
    let discovery = format!("{{ config_source: {ADS}, type_urls: [{type_url}]{more} }}");
    let routes = "{ name: r, virtual_hosts: [{ name: v, domains: ['*'], routes: [{ match: { prefix: / }, \
                  direct_response: { status: 200 } }] }] }";
    let yaml = format!(
        r#"
name: {name}
address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }}
filter_chains:
- filters:
  - name: hcm
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
      stat_prefix: ecds_{name}
      route_config: {routes}
      http_filters:
      - {{ name: {filter}, config_discovery: {discovery} }}
"#
    );
    resource::<Listener>(name, &yaml)
}

fn ecds(added: Vec<Resource>) -> Update {
    update(TypedExtensionConfig::type_url(), added)
}

/// `extension_config_discovery.http_filter.<filter>.<leaf>`
fn counted(filter: &str, leaf: &str) -> u64 {
    stats::counter(&format!("extension_config_discovery.http_filter.{filter}.{leaf}")).value()
}

#[test]
fn a_listener_waits_for_its_filter_and_every_place_gets_it() {
    let (store, calls) = running();
    let told = store.update(update(
        Listener::type_url(),
        vec![listener_of("a", "ext.one", ROUTER, ""), listener_of("b", "ext.one", ROUTER, "")],
    ));
    assert_eq!(told.rejected(), [], "they are bound");
    assert_eq!(names(&told, TypedExtensionConfig::type_url()), ["ext.one"]);
    assert_eq!(calls.take(), [""; 0]);
    assert_eq!(store.snapshot().unready[0].targets, ["shared target FilterConfigSubscription init ext.one"]);

    assert_eq!(store.update(ecds(vec![router("ext.one", true)])).rejected(), []);
    let filter = "filter ext.one RouterFilter { suppress_envoy_headers: true, respect_expected_rq_timeout: false, strict_checks: None }";
    assert_eq!(calls.take(), [filter, filter, "listener a", "listener b"]);
    assert_eq!(counted("ext.one", "config_reload"), 1);
    // The same again is no news, and a new version of a listener has it at once.
    store.update(ecds(vec![router("ext.one", true)]));
    assert_eq!(calls.take(), [""; 0]);
    assert_eq!((counted("ext.one", "config_reload"), counted("ext.one", "update_success")), (1, 2));
    store.update(update(
        Listener::type_url(),
        vec![listener_of(
            "a",
            "ext.one",
            ROUTER,
            ", default_config: { \
         '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }",
        )],
    ));
    assert_eq!(calls.take(), [filter, "listener a"]);

    let known = store.snapshot();
    let known = known.of(&TypedExtensionConfig::type_url());
    assert_eq!(known[0].active.as_ref().map(|active| active.version.as_str()), Some("1"));
    let told = store.update(update(Listener::type_url(), Vec::new()));
    assert!(told.wanted.is_empty(), "nothing was removed");
    store.update(removal(Listener::type_url(), "a"));
    let told = store.update(removal(Listener::type_url(), "b"));
    assert_eq!(told.wanted.get(&TypedExtensionConfig::type_url()), Some(&Interest::None));
}

#[test]
fn a_filter_that_does_not_fit_is_refused_by_name_and_the_one_before_stays() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener_of("a", "ext.two", ROUTER, "")]));
    let fails = |config: &str| {
        let rejected = store.update(ecds(vec![extension("ext.two", config)])).rejected();
        assert_eq!(rejected[0].name, "ext.two");
        rejected[0].message.clone()
    };
    assert_eq!(
        fails(&format!("{{ '@type': {OVERRIDE}, original_dst_cluster: o }}")),
        "typed_config: Error: filter config has type URL culvert.extensions.filters.http.overrides.v1.Override but \
         expect envoy.extensions.filters.http.router.v3.Router."
    );
    // What is refused is not waited for: there is no filter, which each request is told.
    assert_eq!(calls.take(), ["listener a"]);
    assert_eq!((counted("ext.two", "config_fail"), counted("ext.two", "update_rejected")), (1, 1));
    store.update(ecds(vec![router("ext.two", false)]));
    assert_eq!(
        calls.take(),
        [
            "filter ext.two RouterFilter { suppress_envoy_headers: false, respect_expected_rq_timeout: false, strict_checks: None }"
        ]
    );
    assert_eq!(
        fails(&format!("{{ '@type': {ROUTER}, start_child_span: true }}")),
        "typed_config.start_child_span: not supported by culvert yet"
    );
    assert_eq!(calls.take(), [""; 0]);
    let known = store.snapshot();
    let known = &known.of(&TypedExtensionConfig::type_url())[0];
    assert!(known.active.is_some() && known.failure.is_some());
}

#[test]
fn a_place_that_cannot_have_what_others_have_is_left_to_its_default() {
    let (store, calls) = running();
    store.update(update(Listener::type_url(), vec![listener_of("a", "ext.three", ROUTER, "")]));
    store.update(ecds(vec![router("ext.three", false)]));
    calls.take();
    let told = store.update(update(Listener::type_url(), vec![listener_of("b", "ext.three", OVERRIDE, "")]));
    assert_eq!(told.rejected(), []);
    assert_eq!(calls.take(), ["listener b"]);
    assert_eq!(counted("ext.three", "config_conflict"), 1);
    // From now on no configuration fits both.
    assert_eq!(store.update(ecds(vec![router("ext.three", true)])).rejected().len(), 1);
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn a_default_serves_without_warming_after_the_wait_and_after_a_removal() {
    let (store, calls) = running();
    let default = format!(", default_config: {{ '@type': {ROUTER} }}");
    let at_once = format!("{default}, apply_default_config_without_warming: true");
    store.update(update(Listener::type_url(), vec![listener_of("a", "ext.four", ROUTER, &at_once)]));
    assert_eq!(calls.take(), ["listener a"], "nothing is waited for");
    store.update(update(Listener::type_url(), vec![listener_of("b", "ext.five", ROUTER, &default)]));
    assert_eq!(calls.take(), [""; 0]);
    store.later(INITIAL_FETCH_TIMEOUT);
    assert_eq!(calls.take(), ["listener b"]);
    assert_eq!((counted("ext.five", "init_fetch_timeout"), counted("ext.five", "config_fail")), (1, 1));

    store.update(ecds(vec![router("ext.four", true)]));
    assert_eq!(
        calls.take(),
        [
            "filter ext.four RouterFilter { suppress_envoy_headers: true, respect_expected_rq_timeout: false, strict_checks: None }"
        ]
    );
    store.update(removal(TypedExtensionConfig::type_url(), "ext.four"));
    assert_eq!(calls.take(), ["filter ext.four as by default"]);
    assert_eq!(counted("ext.four", "config_reload"), 2);
    store.update(ecds(vec![router("ext.four", true)]));
    assert_eq!(
        calls.take(),
        [
            "filter ext.four RouterFilter { suppress_envoy_headers: true, respect_expected_rq_timeout: false, strict_checks: None }"
        ],
        "news again"
    );
}

#[test]
fn a_discovered_override_filter_subscribes_to_offloaded_services() {
    let (store, _) = running();
    let told = store.update(update(Listener::type_url(), vec![listener_of("a", "ext.six", OVERRIDE, "")]));
    assert_eq!(names(&told, OffloadedService::type_url()), ["*"]);
}
