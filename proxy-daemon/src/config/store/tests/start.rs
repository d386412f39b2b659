//! The order of the start, and what the bootstrap holds.

use super::*;

#[test]
fn static_resources_are_neither_replaced_nor_removed() {
    let (clusters, listeners) = static_resources();
    let (store, calls) = store_with(&[Cluster::type_url(), Listener::type_url()], clusters, listeners);
    store.later(Duration::from_secs(16));
    store.later(Duration::from_secs(32));
    calls.take();
    // Accepted and without effect, as in Envoy.
    assert_eq!(store.update(update(Cluster::type_url(), vec![eds_cluster("users")])).rejected(), []);
    assert_eq!(store.update(update(Listener::type_url(), vec![listener("plain", "web")])).rejected(), []);
    assert_eq!(store.update(removal(Cluster::type_url(), "users")).rejected(), []);
    assert_eq!(store.update(removal(Listener::type_url(), "plain")).rejected(), []);
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn listeners_are_asked_for_when_the_clusters_are_warm() {
    let (store, calls) = store(&[Cluster::type_url(), Listener::type_url()]);
    let wanted = store.wanted();
    assert_eq!(wanted.keys().collect::<Vec<_>>(), [&Cluster::type_url()]);
    let cds = store.update(update(Cluster::type_url(), vec![eds_cluster("users")]));
    assert_eq!(cds.wanted.keys().collect::<Vec<_>>(), [&ClusterLoadAssignment::type_url()]);
    let eds = store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("users", &[80])]));
    assert_eq!(calls.take(), ["cluster users with 1"]);
    assert_eq!(eds.wanted.keys().collect::<Vec<_>>(), [&Listener::type_url()]);
    assert!(!store.is_initialized());
    store.update(update(Listener::type_url(), vec![listener("in", "web")]));
    assert!(!store.is_initialized());
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    assert_eq!(calls.take(), ["routes web", "listener in"]);
    assert!(store.is_initialized());
}

#[test]
fn a_control_plane_that_never_answers_holds_nothing_up_for_ever() {
    let (clusters, listeners) = static_resources();
    let (store, calls) = store_with(&[Cluster::type_url(), Listener::type_url()], clusters, listeners);
    assert_eq!(calls.take(), ["cluster xds"]);
    store.later(Duration::from_secs(16));
    assert_eq!(calls.take(), ["cluster users", "listener plain"]);
    assert!(!store.is_initialized());
    store.later(Duration::from_secs(32));
    assert_eq!(calls.take(), ["listener routed"]);
    assert!(store.is_initialized() && !store.is_answered());
}

#[tokio::test(start_paused = true)]
async fn waits_are_ended_by_the_clock() {
    let (store, calls) = store(&[Cluster::type_url()]);
    tokio::spawn(store.store.clone().keep_time());
    let begun = Instant::now();
    store.store.initialized().await.unwrap();
    assert_eq!(begun.elapsed().as_secs(), 15);
    assert_eq!(calls.take(), [""; 0]);
}

#[test]
fn static_resources_are_subscribed_to_and_wait_as_well() {
    let (clusters, listeners) = static_resources();
    let (store, calls) = store_with(&[], clusters, listeners);
    assert_eq!(calls.take(), ["cluster xds"], "no listener before the clusters are warm");
    let told = store.update(update(ClusterLoadAssignment::type_url(), Vec::new()));
    assert_eq!(names(&told, ClusterLoadAssignment::type_url()), ["users"]);
    assert_eq!(names(&told, RouteConfiguration::type_url()), [""; 0]);
    let told = store.update(update(ClusterLoadAssignment::type_url(), vec![assignment("users", &[80])]));
    assert_eq!(names(&told, RouteConfiguration::type_url()), ["web"]);
    assert_eq!(calls.take(), ["cluster users with 1", "listener plain"]);
    assert!(!store.is_initialized());
    store.update(update(RouteConfiguration::type_url(), vec![routes("web", "users")]));
    assert_eq!(calls.take(), ["routes web", "listener routed"]);
    assert!(store.is_initialized());
}

#[tokio::test]
async fn a_static_listener_that_cannot_be_bound_ends_the_start() {
    let (clusters, listeners) = static_resources();
    let calls = Recorder::default();
    calls.unbindable.lock().unwrap().insert("plain".to_owned(), "cannot bind".to_owned());
    let (subscriptions, wanted) = Subscriptions::channel();
    let store = ConfigStore::new(calls.clone(), StartUp::default(), subscriptions);
    store.start(clusters, listeners);
    let fixture = Fixture { store, calls, wanted: Mutex::new(wanted), known: Mutex::default() };
    fixture.workers();
    assert_eq!(fixture.store.initialized().await.unwrap_err(), "listener \"plain\": cannot bind");
}
