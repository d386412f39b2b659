//! Clusters: taken, refused, warming, removed.

use super::*;

#[test]
fn one_bad_resource_does_not_hold_up_the_others() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let bad = resource::<Cluster>("a", "{ name: a, http_protocol_options: { allow_chunked_length: true } }");
    let worse = resource::<Cluster>("c", "{ name: c, per_connection_buffer_high_watermark_timeout: 1s }");
    let outcome = store.update(update(Cluster::type_url(), vec![bad, eds_cluster("b"), worse]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("b", &[80])]));
    let rejected = outcome.rejected();
    let rejected: Vec<_> = rejected.iter().map(|it| (it.name.as_str(), it.message.as_str())).collect();
    assert_eq!(
        rejected,
        [
            ("a", "http_protocol_options.allow_chunked_length: not supported by culvert yet"),
            ("c", "per_connection_buffer_high_watermark_timeout: not supported by culvert yet")
        ]
    );
    assert_eq!(calls.take(), ["cluster b with 1"]);
    assert_eq!(names(&outcome, ClusterLoadAssignment::type_url()), ["a", "b"], "the last good version stays");

    let snapshot = store.snapshot();
    let clusters = snapshot.of(&Cluster::type_url());
    assert!(clusters[0].active.is_some());
    let details = &clusters[0].failure.as_ref().unwrap().details;
    assert_eq!(details, "http_protocol_options.allow_chunked_length: not supported by culvert yet");
    assert!(clusters[1].failure.is_none());
    assert!(clusters[2].active.is_none(), "no version of it was ever taken");
    assert_eq!(json::any_to_json(&clusters[2].failure.as_ref().unwrap().attempt.body)["name"], "c");

    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    assert!(store.snapshot().of(&Cluster::type_url())[0].failure.is_none());
}

#[test]
fn content_of_another_type_or_name_is_refused() {
    let (store, calls) = running();
    let mut renamed = eds_cluster("a");
    renamed.name = "b".to_owned();
    let other = Resource { name: "c".to_owned(), ..routes("c", "x") };
    let outcome = store.update(update(Cluster::type_url(), vec![renamed, other]));
    let rejected = outcome.rejected();
    assert_eq!(rejected[0].message, "name: the resource is named \"b\", and its content \"a\"");
    assert!(rejected[1].message.contains("RouteConfiguration"), "{:?}", rejected[1]);
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn what_did_not_change_is_left_alone() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let again = Resource { version: "2".to_owned(), ..eds_cluster("a") };
    store.update(update(Cluster::type_url(), vec![again]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    assert_eq!(calls.take(), [""; 0]);
    assert_eq!(store.snapshot().of(&Cluster::type_url())[0].active.as_ref().unwrap().version, "2");
}

#[test]
fn updates_are_counted_by_envoys_names() {
    let (store, _) = running();
    let count = |name: &str| crate::stats::counter(name).value();
    let before = ["cluster_manager.cluster_added", "cluster_manager.cds.update_success"].map(count);
    store.update(update(Cluster::type_url(), vec![eds_cluster("counted:80")]));
    store.update(update(Listener::type_url(), vec![listener("counted", "web")]));
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "counted:80")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("counted:80", &[80])]));
    let after = ["cluster_manager.cluster_added", "cluster_manager.cds.update_success"].map(count);
    assert!(after[0] > before[0] && after[1] > before[1], "{before:?} {after:?}");
    assert_eq!(store.metric("cluster.counted_80.update_success"), Some(1));
    assert_eq!(store.metric("http.store_counted.rds.web.update_success"), Some(1));
    // The first request, and its answer.
    assert_eq!(store.metric("cluster.counted_80.update_attempt"), Some(2));
    store.failed(&Source::Ads, None);
    assert_eq!(store.metric("cluster.counted_80.update_failure"), Some(1));
    let mut second = update(ClusterLoadAssignment::type_url(), vec![assignment("counted:80", &[81])]);
    second.version = "c1".to_owned();
    store.update(second);
    // What Envoy 1.40 shows for it.
    assert_eq!(store.metric("cluster.counted_80.version"), Some(814_672_407_442_807_801));
    assert!(store.metric("cluster.counted_80.update_time").is_some_and(|at| at > 1_700_000_000_000));
    store.update(removal(Cluster::type_url(), "counted:80"));
    assert_eq!(store.metric("cluster.counted_80.update_success"), None, "it goes with the cluster");
}

#[test]
fn a_new_cluster_is_used_when_its_endpoints_are_there_and_only_then_answered_for() {
    let (store, calls) = running();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("a"), eds_cluster("b")]));
    assert_eq!(names(&cds, ClusterLoadAssignment::type_url()), ["a", "b"]);
    assert!(cds.is_open());
    assert_eq!(calls.take(), [""; 0]);
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    assert_eq!(calls.take(), ["cluster a with 1"], "one does not wait for the other");
    assert!(cds.is_open());
    let eds = store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("b", &[80, 81])]));
    assert_eq!(calls.take(), ["cluster b with 2"]);
    assert_eq!(eds.rejected(), []);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn endpoints_that_do_not_come_are_given_up() {
    let (store, calls) = running();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("late")]));
    store.later(Duration::from_secs(14));
    assert!(cds.is_open());
    store.later(Duration::from_secs(16));
    assert_eq!(calls.take(), ["cluster late"]);
    assert_eq!(cds.rejected(), []);
    assert_eq!(store.metric("cluster.late.init_fetch_timeout"), Some(1));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("late", &[80])]));
    assert_eq!(calls.take(), ["late has 1"], "they are taken all the same");
}

#[test]
fn the_parameters_of_a_name_may_stand_in_any_order() {
    let (store, calls) = running();
    let named = |order: &str| format!("xdstp://au/envoy.config.endpoint.v3.ClusterLoadAssignment/users?{order}");
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", &named("zone=x&cell=1"))]));
    let asked = names(&cds, ClusterLoadAssignment::type_url());
    assert_eq!(asked, [named("cell=1&zone=x")]);
    // The client hands it out by its one name; its content has it as the server wrote it.
    let answer = Resource { name: named("cell=1&zone=x"), ..assignment(&named("zone=x&cell=1"), &[80]) };
    assert_eq!(store.update(update(ClusterLoadAssignment::type_url(), vec![answer])).rejected(), []);
    assert_eq!(calls.take(), ["cluster a with 1"]);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn endpoints_that_are_refused_are_not_waited_for() {
    let (store, calls) = running();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    let yaml = "{ cluster_name: a, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: \
                users.local, port_value: 80 } } } }] }] }";
    let bad = resource::<ClusterLoadAssignment>("a", yaml);
    assert_eq!(store.update(update(ClusterLoadAssignment::type_url(), vec![bad])).rejected().len(), 1);
    assert_eq!(calls.take(), ["cluster a"]);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn a_changed_cluster_serves_its_old_version_until_the_new_one_is_warm() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "other")]));
    assert_eq!(names(&cds, ClusterLoadAssignment::type_url()), ["a", "other"]);
    assert!(cds.is_open());
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80, 81])]));
    assert_eq!(calls.take(), ["a has 2"], "the old version is kept up to date");
    let snapshot = store.snapshot();
    let known = &snapshot.of(&Cluster::type_url())[0];
    assert!(known.active.is_some() && known.warming.is_some());
    let eds = store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("other", &[90])]));
    assert_eq!(calls.take(), ["cluster a with 1"]);
    assert_eq!(names(&eds, ClusterLoadAssignment::type_url()), ["other"]);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn a_changed_cluster_with_the_same_endpoints_need_not_wait() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    calls.take();
    let yaml = format!("{{ name: a, type: EDS, eds_cluster_config: {{ eds_config: {ADS} }}, connect_timeout: 1s }}");
    let cds = store.update(update(Cluster::type_url(), vec![resource::<Cluster>("a", &yaml)]));
    assert_eq!(calls.take(), ["cluster a with 1"]);
    assert_eq!(cds.rejected(), []);
}

#[test]
fn a_warming_cluster_may_be_replaced_reverted_and_removed() {
    let (store, calls) = running();
    let first = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "one")]));
    let second = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "two")]));
    assert_eq!(first.rejected(), [], "what it asked for is not wanted any more");
    assert_eq!(names(&second, ClusterLoadAssignment::type_url()), ["two"]);
    assert!(second.is_open());
    // The same again: both wait for the same.
    let third = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "two")]));
    assert!(third.is_open());
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("two", &[80])]));
    assert_eq!(third.rejected(), []);
    assert_eq!(calls.take(), ["cluster a with 1"]);

    let change = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "three")]));
    assert!(change.is_open());
    let back = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "two")]));
    assert_eq!((change.rejected(), back.rejected()), (vec![], vec![]));
    assert_eq!(calls.take(), [""; 0], "what is in force stays");

    let change = store.update(update(Cluster::type_url(), vec![eds_cluster_of("a", "four")]));
    let removed = store.update(removal(Cluster::type_url(), "a"));
    assert_eq!(names(&removed, ClusterLoadAssignment::type_url()), [""; 0]);
    assert_eq!((change.rejected(), removed.rejected()), (vec![], vec![]));
    assert_eq!(calls.take(), ["no cluster a"]);
    store.later(Duration::from_secs(60));
    assert_eq!(calls.take(), [""; 0], "nothing of it is left");
}

#[test]
fn a_removed_cluster_forgets_its_endpoints() {
    let (store, calls) = running();
    store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("a", &[80])]));
    store.update(removal(Cluster::type_url(), "a"));
    calls.take();
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("a")]));
    assert!(cds.is_open());
    assert_eq!(calls.take(), [""; 0], "old endpoints do not come back");
}

#[test]
fn all_clusters_of_an_update_change_at_once() {
    let (store, calls) = running();
    let fixed = |name: &str| resource::<Cluster>(name, &format!("{{ name: {name}, type: STATIC }}"));
    store.update(update(Cluster::type_url(), vec![fixed("a"), fixed("b")]));
    calls.take();
    let mut change = update(Cluster::type_url(), vec![fixed("c"), fixed("d")]);
    change.removed = vec!["a".to_owned()];
    assert_eq!(store.update(change).rejected(), []);
    assert_eq!(calls.take(), ["cluster c", "cluster d", "no cluster a"], "added before removed");
    assert_eq!(calls.batches(), 2);
}

/// A cluster whose one host is a name; `timeout` tells its versions apart.
fn dns_cluster(timeout: u32) -> Resource {
    dns_cluster_named("dns", timeout)
}

fn dns_cluster_named(name: &str, timeout: u32) -> Resource {
    let host = "{ endpoint: { address: { socket_address: { address: app.test, port_value: 80 } } } }";
    let yaml = format!(
        "{{ name: {name}, type: STRICT_DNS, connect_timeout: {timeout}s, load_assignment: {{ cluster_name: {name}, endpoints: [{{ \
         lb_endpoints: [{host}] }}] }} }}"
    );
    resource::<Cluster>(name, &yaml)
}

fn found(ports: &[u16]) -> Option<Arc<[LocalityEndpoints]>> {
    match Kind::Endpoints.parse("dns", &assignment("dns", ports).body) {
        Ok(super::super::kinds::Value::Endpoints(endpoints)) => Some(endpoints),
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_are_looked_up_before_a_cluster_serves() {
    let (store, calls) = running();
    let told = store.update(update(Cluster::type_url(), vec![dns_cluster(1)]));
    assert!(told.is_open() && calls.take().is_empty(), "it is not known yet");
    assert!(store.snapshot().of(&Cluster::type_url())[0].warming.is_some());
    calls.resolve_as("dns", found(&[80, 81]));
    assert_eq!((told.rejected(), calls.take()), (Vec::new(), vec!["cluster dns with 2".to_owned()]));

    // A version that is replaced while its name is looked up has no say any more.
    let second = store.update(update(Cluster::type_url(), vec![dns_cluster(2)]));
    let third = store.update(update(Cluster::type_url(), vec![dns_cluster(3)]));
    assert!(!second.is_open() && third.is_open());
    calls.resolve_as("dns", found(&[80]));
    assert!(third.is_open() && calls.take().is_empty());
    // A look-up that fails ends the wait: the cluster keeps the hosts that it has.
    calls.resolve_as("dns", None);
    assert_eq!((third.rejected(), calls.take()), (Vec::new(), vec!["cluster dns".to_owned()]));

    // One that is gone is not added by what comes late.
    let told = store.update(update(Cluster::type_url(), vec![dns_cluster(4)]));
    store.update(removal(Cluster::type_url(), "dns"));
    assert!(!told.is_open());
    calls.take();
    calls.resolve_as("dns", found(&[80]));
    assert!(calls.take().is_empty());
}

#[test]
fn listeners_wait_for_the_names_of_the_bootstraps_clusters() {
    let cluster = resources::parse("dns", &dns_cluster(1).body, |it: &Cluster| &it.name, parse::cluster).unwrap();
    let (store, calls) = store_with(&[Listener::type_url()], vec![cluster], Vec::new());
    assert!(store.wanted().is_empty() && !store.is_initialized());
    calls.resolve_as("dns", found(&[80]));
    assert_eq!(calls.take(), ["cluster dns with 1"]);
    assert_eq!(store.wanted().into_keys().collect::<Vec<_>>(), [Listener::type_url()]);
}

#[test]
fn names_that_are_found_about_the_same_time_change_clusters_once() {
    let (store, calls) = running();
    let names: Vec<_> = (0..6).map(|index| format!("dns{index}")).collect();
    let clusters = names.iter().map(|name| dns_cluster_named(name, 1)).collect();
    let told = store.update(update(Cluster::type_url(), clusters));
    for name in &names[..3] {
        calls.resolve_as(name, found(&[80]));
    }
    assert_eq!((calls.take(), calls.batches()), (Vec::new(), 0));
    store.later(super::super::clusters::GATHERED);
    assert_eq!(calls.take(), ["cluster dns0 with 1", "cluster dns1 with 1", "cluster dns2 with 1"]);
    assert_eq!(calls.batches(), 1);
    calls.resolve_as(&names[3], found(&[80]));
    calls.resolve_as(&names[4], None);
    assert!(told.is_open() && calls.take().is_empty());
    // Nothing is left to wait for.
    calls.resolve_as(&names[5], found(&[80]));
    assert_eq!(calls.take(), ["cluster dns3 with 1", "cluster dns4", "cluster dns5 with 1"]);
    assert_eq!((calls.batches(), told.rejected()), (2, Vec::new()));
}
