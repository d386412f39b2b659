//! Seeded simulation: the core against a model server, over a network that loses the connection, while the server's
//! resources change and some of them are bad. Checked throughout: nothing in use disappears that the server did not
//! remove. Checked at the end: client and server agree.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use prost::Message as _;

use super::type_url::{CLUSTER, ENDPOINT};
use super::*;

const SEEDS: u64 = 300;
const STEPS: usize = 400;
const TYPES: [&str; 2] = [CLUSTER, ENDPOINT];

/// Versions are points in time. A resource is bad, and rejected by the sink, in some of them.
fn is_bad(version: u64) -> bool {
    version.is_multiple_of(5)
}

fn body(type_url: &str, name: &str, version: u64) -> Any {
    let message = Cluster { name: name.to_owned(), alt_stat_name: version.to_string(), ..Default::default() };
    Any { type_url: type_url.to_owned(), value: message.encode_to_vec() }
}

/// What the server has.
#[derive(Default)]
struct World {
    now: u64,
    /// By type: the time of the last change, and each resource's version.
    types: BTreeMap<&'static str, (u64, BTreeMap<String, u64>)>,
    /// When each resource was last removed.
    removed: BTreeMap<(&'static str, String), u64>,
}

impl World {
    fn set(&mut self, type_url: &'static str, name: &str) {
        self.now += 1;
        let (changed, resources) = self.types.entry(type_url).or_default();
        *changed = self.now;
        resources.insert(name.to_owned(), self.now);
    }

    fn remove(&mut self, type_url: &'static str, name: &str) {
        let (changed, resources) = self.types.entry(type_url).or_default();
        if resources.remove(name).is_some() {
            self.now += 1;
            *changed = self.now;
            self.removed.insert((type_url, name.to_owned()), self.now);
        }
    }

    /// A random change.
    fn change(&mut self, rng: &mut fastrand::Rng) {
        let type_url = TYPES[rng.usize(..TYPES.len())];
        let name = format!("r{}", rng.u8(..8));
        if rng.u8(..3) == 0 { self.remove(type_url, &name) } else { self.set(type_url, &name) }
    }

    /// Brings every bad resource to a good version.
    fn repair(&mut self) {
        for type_url in TYPES {
            let names: Vec<String> = self.types.entry(type_url).or_default().1.keys().cloned().collect();
            for name in names {
                while self.types[type_url].1.get(&name).is_some_and(|version| is_bad(*version)) {
                    self.set(type_url, &name);
                }
            }
        }
    }

    fn resources(&self, type_url: &str) -> BTreeMap<String, u64> {
        self.types.get(type_url).map(|(_, resources)| resources.clone()).unwrap_or_default()
    }
}

/// The server's side of one stream.
#[derive(Default)]
struct Session {
    nonce: u64,
    types: BTreeMap<String, Subscribed>,
}

#[derive(Default)]
struct Subscribed {
    wildcard: bool,
    names: BTreeSet<String>,
    named: bool,
    /// The nonce that must be answered before more is sent.
    unanswered: Option<String>,
    /// SotW: the last version sent, or claimed by the client. Delta: the client's versions.
    sent: String,
    known: BTreeMap<String, String>,
    /// SotW: something must be sent whatever the version.
    due: bool,
}

impl Subscribed {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }
}

impl Session {
    fn request(&mut self, request: Request) {
        match request {
            Request::Sotw(request) => {
                let first = !self.types.contains_key(&request.type_url);
                let state = self.types.entry(request.type_url).or_default();
                if !request.response_nonce.is_empty() {
                    if state.unanswered.as_ref().is_some_and(|nonce| *nonce != request.response_nonce) {
                        return; // stale
                    }
                    state.unanswered = None;
                }
                let names: BTreeSet<String> = request.resource_names.into_iter().filter(|name| name != "*").collect();
                state.named |= !names.is_empty();
                state.wildcard = names.is_empty() && !state.named;
                if first {
                    state.sent = request.version_info;
                } else {
                    state.due |= names.difference(&state.names).next().is_some();
                }
                state.names = names;
            }
            Request::Delta(request) => {
                let first = !self.types.contains_key(&request.type_url);
                let state = self.types.entry(request.type_url).or_default();
                if state.unanswered.as_ref() == Some(&request.response_nonce) {
                    state.unanswered = None;
                }
                if first {
                    state.wildcard = request.resource_names_subscribe.is_empty();
                    state.known = request.initial_resource_versions.into_iter().collect();
                }
                for name in request.resource_names_unsubscribe {
                    state.names.remove(&name);
                    state.known.remove(&name);
                }
                for name in request.resource_names_subscribe {
                    if !first {
                        state.known.remove(&name);
                    }
                    state.names.insert(name);
                }
            }
        }
    }

    /// The next response, if there is anything to say.
    fn response(&mut self, world: &World, variant: Variant) -> Option<Response> {
        for (type_url, state) in &mut self.types {
            if state.unanswered.is_some() {
                continue;
            }
            let resources = world.resources(type_url);
            let wanted: Vec<_> = resources.iter().filter(|(name, _)| state.wants(name)).collect();
            let nonce = (self.nonce + 1).to_string();
            let response = match variant {
                Variant::Sotw => {
                    let version = world.types.get(type_url.as_str()).map_or(0, |(changed, _)| *changed).to_string();
                    if state.sent == version && !state.due || state.names.is_empty() && !state.wildcard {
                        continue;
                    }
                    (state.due, state.sent) = (false, version.clone());
                    Response::Sotw(DiscoveryResponse {
                        version_info: version,
                        type_url: type_url.clone(),
                        nonce: nonce.clone(),
                        resources: wanted.iter().map(|(name, version)| body(type_url, name, **version)).collect(),
                        ..Default::default()
                    })
                }
                Variant::Delta => {
                    let changed: Vec<_> =
                        wanted.iter().filter(|(name, v)| state.known.get(*name) != Some(&v.to_string())).collect();
                    let removed: Vec<String> =
                        state.known.keys().filter(|name| !resources.contains_key(*name)).cloned().collect();
                    if changed.is_empty() && removed.is_empty() {
                        continue;
                    }
                    let resources = changed.iter().map(|(name, version)| Wrapper {
                        name: (*name).clone(),
                        version: version.to_string(),
                        resource: Some(body(type_url, name, **version)),
                        ..Default::default()
                    });
                    let response = DeltaDiscoveryResponse {
                        type_url: type_url.clone(),
                        nonce: nonce.clone(),
                        resources: resources.collect(),
                        removed_resources: removed.clone(),
                        ..Default::default()
                    };
                    state.known.extend(changed.iter().map(|(name, version)| ((*name).clone(), version.to_string())));
                    state.known.retain(|name, _| !removed.contains(name));
                    Response::Delta(response)
                }
            };
            self.nonce += 1;
            state.unanswered = Some(nonce);
            return Some(response);
        }
        None
    }
}

/// What is in force at the client: name -> version, by type.
#[derive(Default)]
struct InForce {
    clusters: BTreeMap<String, u64>,
    endpoints: BTreeMap<String, u64>,
}

impl InForce {
    /// Returns the outcome, and what is wanted of EDS from now on where that has changed.
    fn apply(&mut self, update: Update, world: &World) -> (Outcome, Option<Interest>) {
        let mut outcome = Outcome::default();
        let is_cds = update.type_url == CLUSTER;
        let store = if is_cds { &mut self.clusters } else { &mut self.endpoints };
        for resource in &update.added {
            let message = Cluster::decode(resource.body.value.as_slice()).unwrap();
            let version = message.alt_stat_name.parse().unwrap();
            if is_bad(version) {
                outcome.rejected.push(Rejection { name: resource.name.clone(), message: "bad".to_owned() });
            } else {
                store.insert(resource.name.clone(), version);
            }
        }
        for name in &update.removed {
            assert!(is_cds, "endpoints {name} of a cluster in use were removed");
            // What was refused is removed as well.
            let Some(held) = store.remove(name) else { continue };
            let removed = world.removed.get(&(CLUSTER, name.clone()));
            assert!(removed.is_some_and(|at| *at > held), "cluster {name} was removed without the server's wish");
        }
        if is_cds {
            self.endpoints.retain(|name, _| self.clusters.contains_key(name));
            return (outcome, Some(Interest::Names(self.clusters.keys().cloned().collect())));
        }
        (outcome, None)
    }
}

struct Simulation {
    rng: fastrand::Rng,
    variant: Variant,
    core: Core,
    in_force: InForce,
    world: World,
    session: Option<Session>,
    to_server: VecDeque<Request>,
    to_client: VecDeque<Response>,
    /// An update that is being applied while the world goes on.
    applying: Option<(Token, Outcome)>,
}

impl Simulation {
    fn new(seed: u64, variant: Variant) -> Self {
        let mut core = Core::new(Node::default(), variant);
        core.set_interest(CLUSTER, Interest::Wildcard);
        Simulation {
            rng: fastrand::Rng::with_seed(seed),
            variant,
            core,
            in_force: InForce::default(),
            world: World::default(),
            session: None,
            to_server: VecDeque::new(),
            to_client: VecDeque::new(),
            applying: None,
        }
    }

    fn connect(&mut self) {
        self.disconnect();
        self.core.connected();
        self.session = Some(Session::default());
    }

    /// Whatever is under way is lost.
    fn disconnect(&mut self) {
        self.core.disconnected();
        self.session = None;
        self.to_server.clear();
        self.to_client.clear();
    }

    /// Moves one message, or carries on with an update. Returns whether anything happened.
    fn progress(&mut self) -> bool {
        let outgoing = self.core.outgoing();
        let mut moved = !outgoing.is_empty();
        self.to_server.extend(outgoing);
        if let Some(session) = &mut self.session {
            if let Some(request) = self.to_server.pop_front() {
                session.request(request);
                moved = true;
            }
            if let Some(response) = session.response(&self.world, self.variant) {
                // A server that repeats itself.
                let copies = if self.rng.u8(..10) == 0 { 2 } else { 1 };
                self.to_client.extend(std::iter::repeat_n(response, copies));
                moved = true;
            }
        }
        if let Some((token, outcome)) = self.applying.take() {
            self.core.finish(token, outcome);
            return true;
        }
        if let Some(response) = self.to_client.pop_front() {
            moved = true;
            if let Handled::Update(token, update) = self.core.handle(response, Instant::now()) {
                let (outcome, endpoints) = self.in_force.apply(update, &self.world);
                if let Some(endpoints) = endpoints {
                    self.core.set_interest(ENDPOINT, endpoints);
                }
                self.applying = Some((token, outcome));
            }
        }
        moved
    }

    fn step(&mut self) {
        match self.rng.u8(..20) {
            0 => self.connect(),
            1 if self.rng.bool() => self.disconnect(),
            2..=6 => self.world.change(&mut self.rng),
            _ => drop(self.progress()),
        }
    }

    fn settle(&mut self) {
        self.world.repair();
        if self.session.is_none() {
            self.connect();
        }
        let mut moves = 0;
        while self.progress() {
            moves += 1;
            assert!(moves < 10_000, "client and server never come to rest");
        }
    }

    fn check(&self) {
        assert_eq!(self.in_force.clusters, self.world.resources(CLUSTER), "clusters differ");
        let endpoints = self.world.resources(ENDPOINT);
        for name in self.in_force.clusters.keys() {
            // Endpoints that the server does not have any more stay as they were.
            if let Some(version) = endpoints.get(name) {
                assert_eq!(self.in_force.endpoints.get(name), Some(version), "endpoints of {name} differ");
            }
        }
    }
}

fn simulate(variant: Variant) {
    for seed in 0..SEEDS {
        let outcome = std::panic::catch_unwind(|| {
            let mut simulation = Simulation::new(seed, variant);
            for round in 0..3 {
                for _ in 0..STEPS / 3 {
                    simulation.step();
                }
                if round > 0 {
                    simulation.settle();
                    simulation.check();
                }
            }
        });
        if let Err(panic) = outcome {
            eprintln!("seed {seed} of {variant:?} failed");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn sotw_converges() {
    simulate(Variant::Sotw);
}

#[test]
fn delta_converges() {
    simulate(Variant::Delta);
}
