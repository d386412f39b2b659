//! Clusters, listeners and secrets come and go: what is counted for them goes with them.

use super::{
    secrets::{sds, tcp_listener},
    *,
};
use crate::{listener::ActiveListener, stats};

/// How many names come and go.
const NAMES: usize = 10_000;

/// As many at a time.
const BATCH: usize = 500;

fn cluster(name: &str) -> Resource {
    let endpoint = "endpoint: { address: { socket_address: { address: 10.0.0.1, port_value: 80 } } }";
    let assignment = format!("{{ cluster_name: a, endpoints: [{{ lb_endpoints: [{{ {endpoint} }}] }}] }}");
    resource::<Cluster>(name, &format!("{{ name: '{name}', load_assignment: {assignment} }}"))
}

/// All names that are shown, and the slots that were ever made.
fn shown() -> (usize, usize) {
    stats::flush_intervals();
    (stats::snapshot().len(), stats::slots())
}

#[test]
fn what_is_counted_for_clusters_goes_with_them() {
    let (store, calls) = running();
    calls.build();
    let churn = |names: std::ops::Range<usize>| {
        for first in names.step_by(BATCH) {
            let names: Vec<_> = (first..first + BATCH).map(|index| format!("churned.{index}")).collect();
            // Half of them wait for endpoints that never come.
            let resources = names.iter().enumerate();
            let resources = resources.map(|(at, name)| if at % 2 == 0 { cluster(name) } else { eds_cluster(name) });
            store.update(update(Cluster::type_url(), resources.collect()));
            let built = calls.clusters();
            assert_eq!(built.len(), BATCH / 2);
            for cluster in built.values() {
                cluster.stats.upstream_rq.inc(200);
                cluster.stats.upstream_cx_active.inc();
                cluster.stats.upstream_rq_time.record(1);
                cluster.dropped.inc();
            }
            assert!(stats::snapshot().iter().any(|it| it.name() == format!("cluster.{}.upstream_rq_200", names[0])));
            store.update(Update { type_url: Cluster::type_url(), removed: names, ..Default::default() });
            assert_eq!(calls.clusters().len(), 0);
            // Requests that are under way when their cluster is removed end later.
            built.values().for_each(|cluster| cluster.stats.upstream_cx_active.dec());
        }
    };
    churn(0..BATCH);
    let before = shown();
    churn(0..NAMES);
    let (names, slots) = shown();
    // Other tests of the same process count too, but not thousands.
    assert!(names < before.0 + BATCH, "{before:?} names and slots have become {names} and {slots}");
    assert!(slots < before.1 + BATCH, "{before:?} names and slots have become {names} and {slots}");
    assert!(!stats::snapshot().iter().any(|it| it.name().contains("churned")));
}

#[test]
fn what_is_counted_for_listeners_and_secrets_goes_with_them() {
    let (store, calls) = running();
    calls.build();
    let secrets = Arc::clone(calls.built.get().expect("clusters are built").secrets());
    let churn = |names: std::ops::Range<usize>| {
        for index in names {
            let name = format!("churned.{index}");
            let received = tcp_listener(&name, &sds(&format!("secret.{name}")), "");
            let mut message: Listener = json::unpack(&received.body, "").unwrap();
            message.stat_prefix.clone_from(&name);
            let config = Arc::new(parse::listener(&message, "").unwrap());
            let no_routes = |_: &model::RouteSource| unreachable!("a TCP proxy has none");
            let built = ActiveListener::new(config, None, None, no_routes, &secrets).unwrap();
            let scope = format!("listener.{name}.");
            assert!(stats::snapshot().iter().any(|it| it.name().starts_with(&scope)));
            store.update(update(Listener::type_url(), vec![received]));
            let rotations = format!("sds.secret.{name}.key_rotation_failed");
            assert!(stats::snapshot().iter().any(|it| it.name() == rotations));
            store.update(removal(Listener::type_url(), &name));
            // It drains first.
            drop(built);
            assert!(secrets.is_empty(), "{secrets:?}");
            calls.take();
            if index % 20 == 19 {
                // As the daemon does every few seconds.
                stats::flush_intervals();
            }
        }
    };
    churn(0..20);
    let before = shown();
    churn(0..200);
    let (names, slots) = shown();
    assert!(names < before.0 + 200, "{before:?} names and slots have become {names} and {slots}");
    assert!(slots < before.1 + 200, "{before:?} names and slots have become {names} and {slots}");
    assert!(!stats::snapshot().iter().any(|it| it.name().contains("churned")));
}
