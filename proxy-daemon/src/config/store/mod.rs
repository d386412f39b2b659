//! What the bootstrap holds and xDS delivers: parsed, kept for `/config_dump`, and handed to the data plane.
//!
//! Each resource is accepted or refused by itself; a refused one leaves its last good version in force. A listener goes
//! live when its routes and the endpoints of its clusters have arrived, or when it has waited for [`WARMING_LIMIT`].

mod apply;
mod counts;
mod resources;
mod snapshot;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use culvert_xds_client::{
    ads::{Done, Interest, Outcome, Rejection, Sink, Update},
    api::culvert::overrides::v1::OffloadedService,
    json::{self, UnknownFields},
    source::Source,
    sources::Subscriptions,
};
use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use prost::Name;
use tokio::{sync::Notify, time::Instant};

pub use self::apply::{Applier, Apply};
use self::counts::StoreStats;
pub(super) use self::resources::Resources;
use super::{
    FieldError,
    model::{self, ClusterConfig, Discovery, LocalityEndpoints, NetworkFilterConfig, RouteConfig, RouteSource},
    parse,
    status::Version,
};
use crate::http::filters::OffloadedTable;

/// How long a listener waits for what it needs before it goes live without (`initial_fetch_timeout`'s default).
pub const WARMING_LIMIT: Duration = Duration::from_secs(15);

/// Whether resources with unknown fields are rejected: a property of the process, as the flag is that sets it.
static REJECT_UNKNOWN_FIELDS: AtomicBool = AtomicBool::new(false);

/// Sets what becomes of fields of xDS resources that the API does not have; Envoy's default, and ours, is to ignore them.
pub fn set_unknown_fields(unknown: UnknownFields) {
    REJECT_UNKNOWN_FIELDS.store(unknown == UnknownFields::Reject, Ordering::Relaxed);
}

/// What becomes of unknown fields in xDS resources.
pub fn unknown_fields() -> UnknownFields {
    if REJECT_UNKNOWN_FIELDS.load(Ordering::Relaxed) { UnknownFields::Reject } else { UnknownFields::Ignore }
}

/// All resources.
pub(in crate::config) struct State {
    pub(super) clusters: Resources,
    pub(super) endpoints: Resources,
    pub(super) listeners: Resources,
    pub(super) routes: Resources,
    /// What serves now: a listener's newer version may be waiting in `warming`.
    pub(super) live: BTreeMap<String, Arc<Version>>,
    /// Listeners that wait for routes or endpoints, and until when at most.
    pub(super) warming: BTreeMap<String, Instant>,
    /// Clusters and listeners of the bootstrap, which xDS does not replace.
    static_clusters: BTreeSet<String>,
    static_listeners: BTreeSet<String>,
    eds: BTreeMap<String, EdsCluster>,
    assignments: BTreeMap<String, Vec<LocalityEndpoints>>,
    parsed_listeners: BTreeMap<String, Arc<model::Listener>>,
    parsed_routes: BTreeMap<String, Arc<RouteConfig>>,
    offloaded: BTreeMap<String, OffloadedService>,
    /// Types that the control plane is asked for from the start, and those that it has answered.
    expected: BTreeSet<String>,
    answered: BTreeSet<String>,
    /// When the first answers are waited for no longer.
    patience: Instant,
}

struct EdsCluster {
    service_name: Arc<str>,
    stat_name: String,
}

struct Shared<A> {
    state: Mutex<State>,
    apply: A,
    stats: StoreStats,
    changed: Notify,
    subscriptions: Subscriptions,
}

/// The sink of the xDS client. Cheap to clone: `/config_dump` holds one as well.
pub struct ConfigStore<A = Applier>(Arc<Shared<A>>);

impl<A> Clone for ConfigStore<A> {
    fn clone(&self) -> ConfigStore<A> {
        ConfigStore(Arc::clone(&self.0))
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Empty. `expected` are the type URLs of which everything is asked for from the start, and where it comes from.
    pub fn new(
        apply: A,
        expected: impl IntoIterator<Item = (String, Source)>,
        subscriptions: Subscriptions,
    ) -> ConfigStore<A> {
        let expected: BTreeMap<String, Source> = expected.into_iter().collect();
        let state = State {
            clusters: Resources::default(),
            endpoints: Resources::default(),
            listeners: Resources::default(),
            routes: Resources::default(),
            live: BTreeMap::new(),
            warming: BTreeMap::new(),
            static_clusters: BTreeSet::new(),
            static_listeners: BTreeSet::new(),
            eds: BTreeMap::new(),
            assignments: BTreeMap::new(),
            parsed_listeners: BTreeMap::new(),
            parsed_routes: BTreeMap::new(),
            offloaded: BTreeMap::new(),
            expected: expected.keys().cloned().collect(),
            answered: BTreeSet::new(),
            patience: Instant::now() + WARMING_LIMIT,
        };
        let (stats, changed) = (StoreStats::new(), Notify::new());
        for (type_url, source) in expected {
            subscriptions.set(source, type_url, Interest::Wildcard);
        }
        ConfigStore(Arc::new(Shared { state: Mutex::new(state), apply, stats, changed, subscriptions }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here leaves resources that were not applied yet: the next update applies them.
        self.0.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Takes the bootstrap's resources in. Its clusters are in force at once; returned are the listeners that need
    /// nothing from the control plane, for the caller to start. The others go live when they have what they need.
    pub fn add_static(
        &self,
        clusters: Vec<ClusterConfig>,
        listeners: Vec<model::Listener>,
    ) -> Vec<Arc<model::Listener>> {
        let mut state = self.lock();
        for cluster in clusters {
            state.static_clusters.insert(cluster.name.to_string());
            remember_eds(&mut state.eds, &cluster);
            self.0.apply.upsert_cluster(cluster);
        }
        let mut ready = Vec::new();
        for listener in listeners {
            let (name, listener) = (listener.name.to_string(), Arc::new(listener));
            state.static_listeners.insert(name.clone());
            state.parsed_listeners.insert(name.clone(), Arc::clone(&listener));
            match state.lack(&listener) {
                None => ready.push(listener),
                Some(_) => drop(state.warming.insert(name, Instant::now() + WARMING_LIMIT)),
            }
        }
        self.publish(&state);
        self.subscribe(&state);
        self.0.changed.notify_one();
        ready
    }

    /// Says what is wanted of the control plane beyond what it is asked for from the start.
    fn subscribe(&self, state: &State) {
        for (type_url, interest) in state.interests() {
            self.0.subscriptions.set(Source::Ads, type_url, interest);
        }
    }

    /// Whether the control plane has answered all that it is asked for from the start.
    pub fn is_answered(&self) -> bool {
        let state = self.lock();
        state.expected.is_subset(&state.answered)
    }

    /// Whether the control plane has answered what it is asked for from the start, and every listener is live.
    pub fn is_initialized(&self) -> bool {
        let state = self.lock();
        (state.expected.is_subset(&state.answered) || Instant::now() >= state.patience) && state.warming.is_empty()
    }

    /// Lets listeners that have waited too long go live without. Runs as long as the process.
    pub async fn end_warming(self) {
        loop {
            let next = self.lock().warming.values().min().copied();
            let due = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = due => self.release(&mut self.lock(), Instant::now()),
                () = self.0.changed.notified() => {}
            }
        }
    }

    fn clusters(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let State { clusters, eds, assignments, static_clusters, .. } = &mut *state;
        let outcome = clusters.accept(update.added, update.complete, |resource| {
            if static_clusters.contains(&resource.name) {
                return Err(FieldError::new("name", "is the name of a cluster of the bootstrap, which stays"));
            }
            let config = resources::parse(resource, |message: &Cluster| &message.name, parse::cluster)?;
            remember_eds(eds, &config);
            self.0.apply.upsert_cluster(config);
            if let Some(endpoints) = eds.get(&resource.name).and_then(|eds| assignments.get(&*eds.service_name)) {
                self.0.apply.set_endpoints(&resource.name, endpoints);
            }
            Ok(())
        });
        self.0.stats.clusters.count(&outcome);
        for name in update.removed {
            if state.clusters.remove(&name) {
                state.eds.remove(&name);
                self.0.apply.remove_cluster(&name);
                self.0.stats.clusters.removed.inc();
            }
        }
        let wanted: BTreeSet<&str> = state.eds.values().map(|eds| &*eds.service_name).collect();
        state.assignments.retain(|name, _| wanted.contains(name.as_str()));
        state.endpoints.keep(&wanted);
        outcome.errors
    }

    fn endpoints(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let State { endpoints, eds, assignments, .. } = state;
        let outcome = endpoints.accept(update.added, update.complete, |resource| {
            let users = || eds.iter().filter(|(_, eds)| *eds.service_name == *resource.name);
            let name: fn(&ClusterLoadAssignment) -> &str = |message| &message.cluster_name;
            let parsed = resources::parse(resource, name, parse::endpoints);
            for (_, eds) in users() {
                counts::cluster_update(&eds.stat_name, parsed.is_ok());
            }
            let parsed = parsed?;
            for (cluster, _) in users() {
                self.0.apply.set_endpoints(cluster, &parsed);
            }
            // Nobody asked for it: accepted and forgotten, as in Envoy.
            if users().next().is_some() {
                assignments.insert(resource.name.clone(), parsed);
            }
            Ok(())
        });
        outcome.errors
    }

    fn listeners(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let State { listeners, parsed_listeners, warming, static_listeners, .. } = &mut *state;
        let outcome = listeners.accept(update.added, update.complete, |resource| {
            if static_listeners.contains(&resource.name) {
                return Err(FieldError::new("name", "is the name of a listener of the bootstrap, which stays"));
            }
            let listener = resources::parse(resource, |message: &Listener| &message.name, parse::listener)?;
            parsed_listeners.insert(resource.name.clone(), Arc::new(listener));
            warming.insert(resource.name.clone(), Instant::now() + WARMING_LIMIT);
            Ok(())
        });
        self.0.stats.listeners.count(&outcome);
        for name in update.removed {
            if state.listeners.remove(&name) {
                state.parsed_listeners.remove(&name);
                state.warming.remove(&name);
                if state.live.remove(&name).is_some() {
                    self.0.apply.remove_listener(&name);
                }
                self.0.stats.listeners.removed.inc();
            }
        }
        let wanted: BTreeSet<&str> =
            state.parsed_listeners.values().flat_map(|it| it.rds_names()).map(|it| &**it).collect();
        state.routes.keep(&wanted);
        state.parsed_routes.retain(|name, _| wanted.contains(name.as_str()));
        outcome.errors
    }

    fn routes(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let State { routes, parsed_routes, parsed_listeners, clusters, static_clusters, .. } = state;
        let outcome = routes.accept(update.added, update.complete, |resource| {
            let name: fn(&RouteConfiguration) -> &str = |message| &message.name;
            let parsed = resources::parse(resource, name, parse::route_config).and_then(|routes| {
                let known = |name: &str| clusters.accepted.contains_key(name) || static_clusters.contains(name);
                match routes.unknown_cluster(known) {
                    Some(name) if routes.validate_clusters == Some(true) => {
                        Err(FieldError::new("virtual_hosts", format!("route: unknown cluster '{name}'")))
                    }
                    _ => Ok(Arc::new(routes)),
                }
            });
            let managers = parsed_listeners.values().flat_map(|listener| listener.connection_managers());
            let users = managers.filter(|it| matches!(&it.routes, RouteSource::Rds(name) if **name == *resource.name));
            for prefix in users.map(|manager| &*manager.stat_prefix).collect::<BTreeSet<_>>() {
                counts::route_update(prefix, &resource.name, parsed.is_ok());
            }
            let parsed = parsed?;
            self.0.apply.set_routes(&resource.name, Arc::clone(&parsed));
            parsed_routes.insert(resource.name.clone(), parsed);
            Ok(())
        });
        outcome.errors
    }

    fn offloaded(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let mut errors = Vec::new();
        for resource in update.added {
            let parsed = json::unpack::<OffloadedService>(&resource.body, "").map_err(FieldError::from);
            match parsed.and_then(|service| OffloadedTable::from_resources([&service]).map(|_| service)) {
                Ok(service) => drop(state.offloaded.insert(resource.name, service)),
                Err(error) => errors.push(Rejection { name: resource.name, message: error.to_string() }),
            }
        }
        for name in update.removed {
            state.offloaded.remove(&name);
        }
        match OffloadedTable::from_resources(state.offloaded.values()) {
            Ok(table) => self.0.apply.set_offloaded(table),
            // Each was checked by itself above.
            Err(error) => tracing::error!(%error, "offloaded services are inconsistent"),
        }
        errors
    }

    /// Lets every listener go live that has what it needs, or has waited for long enough.
    fn release(&self, state: &mut State, now: Instant) {
        let mut ready = Vec::new();
        for (name, until) in &state.warming {
            let Some(listener) = state.parsed_listeners.get(name) else { continue };
            let lack = state.lack(listener);
            if let Some(lack) = &lack
                && now >= *until
            {
                tracing::warn!(listener = %name, waited = ?WARMING_LIMIT, "listener goes live without {lack}");
            }
            if lack.is_none() || now >= *until {
                ready.push(Arc::clone(listener));
            }
        }
        for listener in ready {
            state.warming.remove(&*listener.name);
            if let Some(stored) = state.listeners.accepted.get(&*listener.name) {
                state.live.insert(listener.name.to_string(), stored.clone());
            }
            self.0.apply.upsert_listener(listener);
        }
        self.publish(state);
    }

    fn publish(&self, state: &State) {
        let clusters = state.clusters.accepted.len() + state.static_clusters.len();
        let empty = state.eds.values().filter(|eds| !state.assignments.contains_key(&*eds.service_name)).count();
        self.0.stats.clusters.active.set((clusters - empty) as u64);
        self.0.stats.clusters.warming.set(empty as u64);
        let waiting = state.static_listeners.iter().filter(|name| state.warming.contains_key(*name)).count();
        self.0.stats.listeners.active.set((state.live.len() + state.static_listeners.len() - waiting) as u64);
        self.0.stats.listeners.warming.set(state.warming.len() as u64);
    }
}

impl<A: Apply> Sink for ConfigStore<A> {
    fn update(&self, _: &Source, update: Update, done: Done) {
        let mut state = self.lock();
        let type_url = update.type_url.clone();
        let kind = |url: String| type_url == url;
        let rejected = if kind(Cluster::type_url()) {
            self.clusters(&mut state, update)
        } else if kind(ClusterLoadAssignment::type_url()) {
            self.endpoints(&mut state, update)
        } else if kind(Listener::type_url()) {
            self.listeners(&mut state, update)
        } else if kind(RouteConfiguration::type_url()) {
            self.routes(&mut state, update)
        } else if kind(OffloadedService::type_url()) {
            self.offloaded(&mut state, update)
        } else {
            Vec::new()
        };
        for rejection in &rejected {
            tracing::warn!(
                %type_url,
                name = %rejection.name,
                error = %rejection.message,
                "resource refused; its last good version stays in force",
            );
        }
        state.answered.insert(type_url);
        self.release(&mut state, Instant::now());
        self.0.changed.notify_one();
        self.subscribe(&state);
        done.finish(Outcome { rejected });
    }
}

fn remember_eds(known: &mut BTreeMap<String, EdsCluster>, config: &ClusterConfig) {
    match &config.discovery {
        Discovery::Eds { service_name } => {
            let eds = EdsCluster { service_name: Arc::clone(service_name), stat_name: config.stat_name.clone() };
            known.insert(config.name.to_string(), eds);
        }
        _ => drop(known.remove(&*config.name)),
    }
}

impl State {
    /// What a listener still waits for.
    fn lack(&self, listener: &model::Listener) -> Option<String> {
        let clusters = Cluster::type_url();
        if self.expected.contains(&clusters) && !self.answered.contains(&clusters) {
            return Some("the clusters".to_owned());
        }
        if let Some(name) = listener.rds_names().find(|name| !self.parsed_routes.contains_key(&***name)) {
            return Some(format!("the route configuration {name:?}"));
        }
        let has_endpoints =
            |name: &str| self.eds.get(name).is_none_or(|eds| self.assignments.contains_key(&*eds.service_name));
        let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
        for filter in chains.flat_map(|chain| &chain.filters) {
            let empty = match filter {
                NetworkFilterConfig::TcpProxy(proxy) => {
                    proxy.cluster.names().into_iter().find(|name| !has_endpoints(name)).map(str::to_owned)
                }
                NetworkFilterConfig::HttpConnectionManager(manager) => match &manager.routes {
                    RouteSource::Static(routes) => routes.unknown_cluster(has_endpoints).map(str::to_owned),
                    RouteSource::Rds(name) => {
                        let routes = self.parsed_routes.get(&**name);
                        routes.and_then(|routes| routes.unknown_cluster(has_endpoints).map(str::to_owned))
                    }
                },
            };
            if let Some(name) = empty {
                return Some(format!("the endpoints of cluster {name:?}"));
            }
        }
        None
    }

    /// What follows from the resources in force.
    fn interests(&self) -> Vec<(String, Interest)> {
        let names = |names: BTreeSet<String>| if names.is_empty() { Interest::None } else { Interest::Names(names) };
        let listeners = || self.parsed_listeners.values();
        let routes = listeners().flat_map(|listener| listener.rds_names()).map(ToString::to_string).collect();
        let mut filters = listeners().flat_map(|it| it.connection_managers()).flat_map(|manager| &manager.http_filters);
        let overrides = filters.any(|filter| filter.factory.needs_offloaded_services());
        vec![
            (
                ClusterLoadAssignment::type_url(),
                names(self.eds.values().map(|it| it.service_name.to_string()).collect()),
            ),
            (RouteConfiguration::type_url(), names(routes)),
            (OffloadedService::type_url(), if overrides { Interest::Wildcard } else { Interest::None }),
        ]
    }
}

#[cfg(test)]
mod tests;
