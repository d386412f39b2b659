//! Any changes, in any order, with streams that are lost meanwhile: in the end what clusters and listeners need is in force.

use std::collections::BTreeSet;

use prost::Message as _;

use super::{
    driven::{Driven, Server, both},
    *,
};
use crate::config::model::INITIAL_FETCH_TIMEOUT;

const SEEDS: u64 = 100;
/// Changes of one run.
const CHANGES: usize = 40;
/// Names of each type.
const NAMES: usize = 4;

fn name(kind: &str, rng: &mut fastrand::Rng) -> String {
    format!("{kind}{}", rng.usize(..NAMES))
}

fn change(server: &mut Server, rng: &mut fastrand::Rng) {
    let (cluster, service) = (name("cluster", rng), name("service", rng));
    let (listening, web) = (name("listener", rng), name("routes", rng));
    match rng.u8(..8) {
        0 => server.remove(Cluster::type_url(), &cluster),
        1 | 2 => server.set(Cluster::type_url(), eds_cluster_of(&cluster, &service)),
        3 => server.remove(Listener::type_url(), &listening),
        4 | 5 => server.set(Listener::type_url(), listener(&listening, &web)),
        // What is asked for by name comes and changes; what a server removes of it stays in force.
        6 => {
            let ports: Vec<u16> = (1..=rng.u16(1..10)).collect();
            server.set(ClusterLoadAssignment::type_url(), assignment(&service, &ports));
        }
        _ => server.set(RouteConfiguration::type_url(), routes(&web, &cluster)),
    }
}

/// The number of hosts that the server has for a service.
fn hosts(server: &Server, service: &str) -> Option<usize> {
    let (_, body) = server.resources.get(&ClusterLoadAssignment::type_url())?.get(service)?;
    let message = ClusterLoadAssignment::decode(&*body.value).expect("an assignment");
    Some(message.endpoints.iter().map(|group| group.lb_endpoints.len()).sum())
}

/// Lets all sides come to rest, and does not wait any longer for what the server does not have: it sends nothing more of a type
/// before it has an answer.
fn rest(it: &mut Driven) {
    loop {
        it.run();
        it.store.later(INITIAL_FETCH_TIMEOUT);
        if !it.round() {
            return;
        }
    }
}

/// Both are at rest: what the data plane has is what the server has.
fn check(it: &Driven) {
    let none = BTreeMap::new();
    let all = |type_url: String| it.server.resources.get(&type_url).unwrap_or(&none);
    let (clusters, listeners) = (all(Cluster::type_url()), all(Listener::type_url()));
    let (mut services, mut wanted_routes) = (BTreeSet::new(), BTreeSet::new());
    for (name, (_, body)) in clusters {
        let message = Cluster::decode(&*body.value).expect("a cluster");
        let service = message.eds_cluster_config.expect("it has one").service_name;
        let hosts = hosts(&it.server, &service).unwrap_or_default();
        assert_eq!(it.view.clusters.get(name), Some(&hosts), "{name} with {service}");
        services.insert(service);
    }
    for (name, (_, body)) in listeners {
        let message = Listener::decode(&*body.value).expect("a listener");
        let parsed = parse::listener(&message, "").expect("it is right");
        let manager = parsed.connection_managers().next().expect("it has one");
        let model::RouteSource::Rds(rds) = &manager.routes else { panic!("they come from RDS") };
        assert!(it.view.listeners.contains(name), "{name} with {}", rds.name);
        assert_eq!(it.view.routes.contains(&*rds.name), all(RouteConfiguration::type_url()).contains_key(&*rds.name));
        wanted_routes.insert(rds.name.to_string());
    }
    assert!(it.view.clusters.keys().all(|name| clusters.contains_key(name)), "{:?}", it.view.clusters);
    assert!(it.view.listeners.iter().all(|name| listeners.contains_key(name)), "{:?}", it.view.listeners);
    // What is shown as in force is what the server has now.
    for (type_url, needed) in
        [(ClusterLoadAssignment::type_url(), services), (RouteConfiguration::type_url(), wanted_routes)]
    {
        let snapshot = it.store.snapshot();
        let shown = snapshot.of(&type_url);
        assert_eq!(shown.iter().map(|it| it.name.clone()).collect::<BTreeSet<_>>(), needed);
        for shown in shown {
            let newest = all(type_url.clone()).get(&shown.name).map(|(_, body)| body);
            assert_eq!(shown.active.as_ref().map(|active| &active.body), newest, "{}", shown.name);
        }
    }
}

#[test]
fn what_is_needed_is_in_force_when_all_is_at_rest() {
    both(|variant| {
        for seed in 0..SEEDS {
            let mut rng = fastrand::Rng::with_seed(seed);
            let mut it = Driven::new(variant, Server::default());
            let _failed = Failed(seed);
            for _ in 0..CHANGES {
                change(&mut it.server, &mut rng);
                if rng.u8(..20) == 0 {
                    it.lose_stream();
                }
                for _ in 0..rng.usize(..6) {
                    it.round();
                }
                if rng.u8(..4) == 0 {
                    rest(&mut it);
                    check(&it);
                }
            }
            // Nothing is missing any more.
            for index in 0..NAMES {
                it.server.set(ClusterLoadAssignment::type_url(), assignment(&format!("service{index}"), &[1]));
                it.server.set(RouteConfiguration::type_url(), routes(&format!("routes{index}"), "nobody"));
            }
            rest(&mut it);
            check(&it);
            assert_eq!(it.rejected, []);
        }
    });
}

/// Says which run has failed.
struct Failed(u64);

impl Drop for Failed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("seed {} failed", self.0);
        }
    }
}
