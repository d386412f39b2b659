//! What xDS has delivered: parsed, kept for `/config_dump`, and handed to the data plane.
//!
//! Each resource is accepted or refused by itself; a refused one leaves its last good version in force. A listener goes
//! live when the routes that it names have arrived and every EDS cluster has its endpoints, or when the wait is over.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, SystemTime},
};

use culvert_xds_client::{
    Any,
    ads::{Interest, Outcome, Rejection, Resource, Sink, Update},
    api::culvert::overrides::v1::OffloadedService,
    json,
};
use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use prost::Name;
use tokio::sync::mpsc;

use super::{
    FieldError,
    model::{self, Discovery, LocalityEndpoints, NetworkFilterConfig, RouteSource},
    parse,
};
use crate::{
    http::filters::OffloadedTable,
    runtime::DataPlane,
    stats::{self, Counter, Gauge, Scope},
};

/// How long a listener waits for what it needs before it goes live without (`initial_fetch_timeout`'s default).
const WARMING_LIMIT: Duration = Duration::from_secs(15);

/// What the store does to the data plane. Implemented by [`DataPlane`]; tests record instead.
pub trait Apply: Send + 'static {
    /// See [`DataPlane::upsert_cluster`].
    fn upsert_cluster(&self, config: model::ClusterConfig);
    /// See [`DataPlane::remove_cluster`].
    fn remove_cluster(&self, name: &str);
    /// See [`DataPlane::set_endpoints`].
    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]);
    /// See [`DataPlane::set_routes`].
    fn set_routes(&self, name: &str, routes: Arc<model::RouteConfig>);
    /// See [`DataPlane::set_offloaded`].
    fn set_offloaded(&self, table: OffloadedTable);
    /// See [`DataPlane::upsert_listener`]. Happens later, in order.
    fn upsert_listener(&self, listener: Arc<model::Listener>);
    /// See [`DataPlane::remove_listener`]. Happens later, in order.
    fn remove_listener(&self, name: &str);
}

/// A version of a resource that is in force.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) version: String,
    pub(super) body: Any,
    pub(super) updated: SystemTime,
    /// Why a later version was refused.
    pub(super) error: Option<(String, SystemTime)>,
}

/// All resources in force.
#[derive(Default)]
pub(super) struct State {
    pub(super) clusters: BTreeMap<String, Stored>,
    pub(super) endpoints: BTreeMap<String, Stored>,
    pub(super) listeners: BTreeMap<String, Stored>,
    pub(super) routes: BTreeMap<String, Stored>,
    offloaded: BTreeMap<String, OffloadedService>,
    assignments: BTreeMap<String, Vec<LocalityEndpoints>>,
    /// EDS clusters: cluster name -> resource name.
    eds: BTreeMap<String, Arc<str>>,
    parsed_listeners: BTreeMap<String, Arc<model::Listener>>,
    /// Listeners that wait for routes or endpoints.
    warming: BTreeSet<String>,
    /// The wait is over: listeners go live with what is there.
    impatient: bool,
    answered: BTreeSet<String>,
}

/// The sink of the xDS client. Cheap to clone: `/config_dump` holds one as well.
pub struct ConfigStore<A = Applier> {
    state: Arc<Mutex<State>>,
    apply: Arc<A>,
    stats: StoreStats,
}

impl<A> Clone for ConfigStore<A> {
    fn clone(&self) -> ConfigStore<A> {
        ConfigStore { state: Arc::clone(&self.state), apply: Arc::clone(&self.apply), stats: self.stats }
    }
}

#[derive(Clone, Copy)]
struct StoreStats {
    clusters: KindStats,
    listeners: KindStats,
}

#[derive(Clone, Copy)]
struct KindStats {
    added: Counter,
    modified: Counter,
    removed: Counter,
    active: Gauge,
    warming: Gauge,
    update_success: Counter,
    update_rejected: Counter,
}

impl KindStats {
    fn new(manager: &str, noun: &str, active: &str, discovery: &str) -> KindStats {
        let scope = Scope::new(manager);
        KindStats {
            added: scope.counter(&format!("{noun}_added")),
            modified: scope.counter(&format!("{noun}_modified")),
            removed: scope.counter(&format!("{noun}_removed")),
            active: scope.gauge(active),
            warming: scope.gauge(&active.replace("active", "warming")),
            update_success: scope.counter(&format!("{discovery}.update_success")),
            update_rejected: scope.counter(&format!("{discovery}.update_rejected")),
        }
    }
}

impl<A: Apply> ConfigStore<A> {
    /// Empty.
    pub fn new(apply: A) -> ConfigStore<A> {
        let stats = StoreStats {
            clusters: KindStats::new("cluster_manager", "cluster", "active_clusters", "cds"),
            listeners: KindStats::new("listener_manager", "listener", "total_listeners_active", "lds"),
        };
        ConfigStore { state: Arc::default(), apply: Arc::new(apply), stats }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in here leaves resources that were not applied yet: the next update applies them.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Whether CDS and LDS have been answered and every listener is live.
    pub fn is_initialized(&self) -> bool {
        let state = self.lock();
        let answered = |name: String| state.answered.contains(&name);
        (answered(Cluster::type_url()) && answered(Listener::type_url()) || state.impatient) && state.warming.is_empty()
    }

    /// Lets listeners go live with what is there, once [`WARMING_LIMIT`] has passed.
    pub async fn end_warming(self) {
        tokio::time::sleep(WARMING_LIMIT).await;
        let mut state = self.lock();
        state.impatient = true;
        self.release(&mut state);
    }

    fn clusters(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let rejected = accept(&mut state.clusters, update.added, |resource| {
            let config =
                parse_resource(resource, &resource.name, |message: &Cluster| message.name.as_str(), parse::cluster)?;
            match &config.discovery {
                Discovery::Eds { service_name } => {
                    state.eds.insert(resource.name.clone(), Arc::clone(service_name));
                }
                _ => drop(state.eds.remove(&resource.name)),
            }
            let known = state.eds.get(&resource.name).and_then(|name| state.assignments.get(&**name));
            self.apply.upsert_cluster(config);
            if let Some(endpoints) = known {
                self.apply.set_endpoints(&resource.name, endpoints);
            }
            Ok(())
        });
        count(self.stats.clusters, &rejected);
        for name in update.removed {
            if state.clusters.remove(&name).is_some() {
                state.eds.remove(&name);
                self.apply.remove_cluster(&name);
                self.stats.clusters.removed.inc();
            }
        }
        let wanted: BTreeSet<&str> = state.eds.values().map(|name| &**name).collect();
        state.assignments.retain(|name, _| wanted.contains(name.as_str()));
        state.endpoints.retain(|name, _| wanted.contains(name.as_str()));
        self.stats.clusters.active.set(state.clusters.len() as u64);
        rejected.errors
    }

    fn endpoints(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let (eds, assignments) = (&state.eds, &mut state.assignments);
        let rejected = accept(&mut state.endpoints, update.added, |resource| {
            let users: Vec<_> = eds.iter().filter(|(_, service)| ***service == *resource.name).collect();
            let name: fn(&ClusterLoadAssignment) -> &str = |message| &message.cluster_name;
            let parsed = parse_resource(resource, &resource.name, name, parse::endpoints)?;
            for (cluster, _) in &users {
                self.apply.set_endpoints(cluster, &parsed);
                stats::counter(&format!("cluster.{}.update_success", cluster.replace(':', "_"))).inc();
            }
            // Nobody asked for it: accepted and forgotten, as in Envoy.
            if !users.is_empty() {
                assignments.insert(resource.name.clone(), parsed);
            }
            Ok(())
        });
        rejected.errors
    }

    fn listeners(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let (parsed_listeners, warming) = (&mut state.parsed_listeners, &mut state.warming);
        let rejected = accept(&mut state.listeners, update.added, |resource| {
            let name: fn(&Listener) -> &str = |message| &message.name;
            let listener = parse_resource(resource, &resource.name, name, parse::listener)?;
            parsed_listeners.insert(resource.name.clone(), Arc::new(listener));
            warming.insert(resource.name.clone());
            Ok(())
        });
        count(self.stats.listeners, &rejected);
        for name in update.removed {
            if state.listeners.remove(&name).is_some() {
                state.parsed_listeners.remove(&name);
                state.warming.remove(&name);
                self.apply.remove_listener(&name);
                self.stats.listeners.removed.inc();
            }
        }
        rejected.errors
    }

    fn routes(&self, state: &mut State, update: Update) -> Vec<Rejection> {
        let rejected = accept(&mut state.routes, update.added, |resource| {
            let name: fn(&RouteConfiguration) -> &str = |message| &message.name;
            let routes = parse_resource(resource, &resource.name, name, parse::route_config)?;
            self.apply.set_routes(&resource.name, Arc::new(routes));
            Ok(())
        });
        rejected.errors
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
            Ok(table) => self.apply.set_offloaded(table),
            // Each was checked by itself above.
            Err(error) => tracing::error!(%error, "offloaded services are inconsistent"),
        }
        errors
    }

    /// Lets every listener go live that has what it needs.
    fn release(&self, state: &mut State) {
        let endpoints_known = state.eds.values().all(|service| state.assignments.contains_key(&**service));
        let ready: Vec<String> = state
            .warming
            .iter()
            .filter(|name| {
                let routes =
                    state.parsed_listeners.get(*name).map(|listener| route_names(listener)).unwrap_or_default();
                state.impatient || endpoints_known && routes.iter().all(|name| state.routes.contains_key(name))
            })
            .cloned()
            .collect();
        for name in ready {
            state.warming.remove(&name);
            if let Some(listener) = state.parsed_listeners.get(&name) {
                self.apply.upsert_listener(Arc::clone(listener));
            }
        }
        let active = state.parsed_listeners.len() - state.warming.len();
        self.stats.listeners.active.set(active as u64);
        self.stats.listeners.warming.set(state.warming.len() as u64);
    }
}

impl<A: Apply> Sink for ConfigStore<A> {
    fn update(&mut self, update: Update) -> Outcome {
        let mut state = self.lock();
        let type_url = update.type_url.clone();
        let rejected = match type_url.as_str() {
            url if url == Cluster::type_url() => self.clusters(&mut state, update),
            url if url == ClusterLoadAssignment::type_url() => self.endpoints(&mut state, update),
            url if url == Listener::type_url() => self.listeners(&mut state, update),
            url if url == RouteConfiguration::type_url() => self.routes(&mut state, update),
            url if url == OffloadedService::type_url() => self.offloaded(&mut state, update),
            _ => Vec::new(),
        };
        for rejection in &rejected {
            tracing::warn!(%type_url, name = %rejection.name, error = %rejection.message, "resource refused; its last good version stays in force");
        }
        state.answered.insert(type_url);
        self.release(&mut state);
        Outcome { rejected, subscriptions: interests(&state) }
    }
}

/// What follows from the resources in force.
fn interests(state: &State) -> Vec<(String, Interest)> {
    let names = |names: BTreeSet<String>| if names.is_empty() { Interest::None } else { Interest::Names(names) };
    let routes = state.parsed_listeners.values().flat_map(|listener| route_names(listener)).collect();
    let overrides = state.parsed_listeners.values().any(|listener| uses_overrides(listener));
    vec![
        (ClusterLoadAssignment::type_url(), names(state.eds.values().map(|name| name.to_string()).collect())),
        (RouteConfiguration::type_url(), names(routes)),
        (OffloadedService::type_url(), if overrides { Interest::Wildcard } else { Interest::None }),
    ]
}

fn connection_managers(listener: &model::Listener) -> impl Iterator<Item = &Arc<model::HttpConnectionManagerConfig>> {
    let chains = listener.filter_chains.iter().chain(&listener.default_filter_chain);
    chains.flat_map(|chain| &chain.filters).filter_map(|filter| match filter {
        NetworkFilterConfig::HttpConnectionManager(config) => Some(config),
        NetworkFilterConfig::TcpProxy(_) => None,
    })
}

fn route_names(listener: &model::Listener) -> BTreeSet<String> {
    let sources = connection_managers(listener).map(|config| &config.routes);
    sources
        .filter_map(|source| if let RouteSource::Rds(name) = source { Some(name.to_string()) } else { None })
        .collect()
}

fn uses_overrides(listener: &model::Listener) -> bool {
    let mut filters = connection_managers(listener).flat_map(|config| &config.http_filters);
    filters.any(|filter| filter.factory.needs_offloaded_services())
}

/// How a batch of resources went.
struct Accepted {
    added: u64,
    modified: u64,
    errors: Vec<Rejection>,
}

fn count(stats: KindStats, accepted: &Accepted) {
    stats.added.add(accepted.added);
    stats.modified.add(accepted.modified);
    if accepted.errors.is_empty() { stats.update_success.inc() } else { stats.update_rejected.inc() }
}

/// Takes each resource by itself; one that did not change is not taken again.
fn accept(
    known: &mut BTreeMap<String, Stored>,
    resources: Vec<Resource>,
    mut take: impl FnMut(&Resource) -> Result<(), FieldError>,
) -> Accepted {
    let mut accepted = Accepted { added: 0, modified: 0, errors: Vec::new() };
    for resource in resources {
        let before = known.get_mut(&resource.name);
        if let Some(before) = before.filter(|before| before.body == resource.body) {
            (before.version, before.error) = (resource.version, None);
            continue;
        }
        match take(&resource) {
            Ok(()) => {
                let Resource { name, version, body, .. } = resource;
                let stored = Stored { version, body, updated: SystemTime::now(), error: None };
                match known.insert(name, stored) {
                    None => accepted.added += 1,
                    Some(_) => accepted.modified += 1,
                }
            }
            Err(error) => {
                let message = error.to_string();
                if let Some(before) = known.get_mut(&resource.name) {
                    before.error = Some((message.clone(), SystemTime::now()));
                }
                accepted.errors.push(Rejection { name: resource.name, message });
            }
        }
    }
    accepted
}

/// Unpacks, validates and parses a resource, which must carry its own name.
fn parse_resource<M, T>(
    resource: &Resource,
    expected: &str,
    name: fn(&M) -> &str,
    parse: impl Fn(&M, &str) -> Result<T, FieldError>,
) -> Result<T, FieldError>
where
    M: prost::Message + Name + Default,
{
    let message: M = json::unpack(&resource.body, "")?;
    json::validate(&message)?;
    if name(&message) != expected {
        let text = format!("the resource is named {expected:?}, and its content {:?}", name(&message));
        return Err(FieldError::new("name", text));
    }
    parse(&message, "")
}

/// Applies to the data plane; listener changes, which have to wait for the workers, are carried out one after another.
pub struct Applier {
    plane: DataPlane,
    listeners: mpsc::UnboundedSender<ListenerChange>,
}

enum ListenerChange {
    Upsert(Arc<model::Listener>),
    Remove(String),
}

impl Applier {
    /// Must be called within the control runtime.
    pub fn new(plane: DataPlane) -> Applier {
        let (listeners, mut changes) = mpsc::unbounded_channel();
        let worker = plane.clone();
        let failures = stats::counter("listener_manager.listener_create_failure");
        let successes = stats::counter("listener_manager.listener_create_success");
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                match change {
                    ListenerChange::Remove(name) => worker.remove_listener(&name).await,
                    ListenerChange::Upsert(listener) => {
                        let name = Arc::clone(&listener.name);
                        match worker.upsert_listener(listener).await {
                            Ok(()) => successes.inc(),
                            Err(error) => {
                                failures.inc();
                                tracing::error!(listener = %name, %error, "listener is not serving");
                            }
                        }
                    }
                }
            }
        });
        Applier { plane, listeners }
    }
}

impl Apply for Applier {
    fn upsert_cluster(&self, config: model::ClusterConfig) {
        self.plane.upsert_cluster(config);
    }

    fn remove_cluster(&self, name: &str) {
        self.plane.remove_cluster(name);
    }

    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        self.plane.set_endpoints(cluster, endpoints);
    }

    fn set_routes(&self, name: &str, routes: Arc<model::RouteConfig>) {
        self.plane.set_routes(name, routes);
    }

    fn set_offloaded(&self, table: OffloadedTable) {
        self.plane.set_offloaded(table);
    }

    fn upsert_listener(&self, listener: Arc<model::Listener>) {
        // The task ends with the process: nobody is left to be told.
        let _ = self.listeners.send(ListenerChange::Upsert(listener));
    }

    fn remove_listener(&self, name: &str) {
        let _ = self.listeners.send(ListenerChange::Remove(name.to_owned()));
    }
}
