//! What proxies find out about endpoints that they were told to check (health discovery, HDS).
//!
//! ```text
//! mesh -> work (who checks what) -> a checker's stream -> what it says -> failed -> mesh
//! ```
//! Rules:
//! - Each endpoint of a service with a health check is given to several checkers, the nearest ones that may know the service.
//! - An endpoint does not work if more than half of those who say something about it say so.
//! - Who was given an endpoint and says that it does not work is not believed before it can have checked it: a checker
//!   calls what it has not checked yet unhealthy. What is said of others' endpoints is ignored.
//! - What a checker said counts while it reports, and for [`PATIENCE`] intervals after it stopped, or was given other work.

mod work;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::address::Address as AddressKind;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{HealthStatus, Node};
use envoy_types::pb::envoy::config::endpoint::v3::Endpoint;
use envoy_types::pb::envoy::service::health::v3::capability::Protocol;
use envoy_types::pb::envoy::service::health::v3::{Capability, EndpointHealthResponse, HealthCheckSpecifier};
use serde::Serialize;
use tokio::sync::{Notify, watch};

use self::work::Candidate;
use crate::kubernetes::ObjectKey;
use crate::mesh::{Health, Locality, Mesh, MeshService};
use crate::policy::egress_of;
use crate::resources::{Snapshot, Viewer};

/// For how many report intervals a checker may be silent.
pub const PATIENCE: u32 = 3;
/// The shortest time between two divisions of the work.
const BETWEEN_DIVISIONS: Duration = Duration::from_millis(250);

/// What is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// How often checkers report.
    pub interval: Duration,
    /// How many check each endpoint.
    pub checkers: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(2), checkers: 3 }
    }
}

/// An endpoint of a service's port.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Target {
    service: ObjectKey,
    port: u16,
    address: SocketAddr,
}

/// Endpoints that do not work, by service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Failed(BTreeMap<ObjectKey, BTreeSet<(u16, SocketAddr)>>);

impl Failed {
    /// The services that are not the same in both.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = ObjectKey> + 'a {
        let all = self.0.keys().chain(other.0.keys());
        all.filter(|key| self.0.get(key) != other.0.get(key)).cloned()
    }

    /// Marks the endpoints of a service that do not work. Those that drain are as they are.
    pub fn mark(&self, key: &ObjectKey, service: &mut MeshService) {
        let Some(failed) = self.0.get(key) else { return };
        for (port, described) in &mut service.ports {
            for endpoint in &mut described.endpoints {
                if endpoint.health == Health::Healthy && failed.contains(&(*port, endpoint.address)) {
                    endpoint.health = Health::Unhealthy;
                }
            }
        }
    }

    fn set(&mut self, target: &Target, has_failed: bool) -> bool {
        let place = (target.port, target.address);
        if has_failed {
            return self.0.entry(target.service.clone()).or_default().insert(place);
        }
        let Some(of_service) = self.0.get_mut(&target.service) else { return false };
        let removed = of_service.remove(&place);
        if of_service.is_empty() {
            self.0.remove(&target.service);
        }
        removed
    }
}

/// A node that checks endpoints.
#[derive(Debug)]
struct Checker {
    viewer: Viewer,
    locality: Locality,
    http: bool,
    tcp: bool,
    /// How many streams it has: one, but for the moment in which a lost one is not known to be lost.
    streams: usize,
    /// Since when the newest of them is there.
    opened: Instant,
    /// When it last said anything.
    heard: Instant,
    given: HashMap<String, HashMap<SocketAddr, Given>>,
    specifier: watch::Sender<Option<Arc<HealthCheckSpecifier>>>,
}

/// An endpoint that a checker was given, by the name of the Envoy cluster and its address.
#[derive(Debug, Clone)]
struct Given {
    target: Target,
    since: Instant,
    /// How long a first check may take until it is reported.
    first_check: Duration,
}

/// What a checker has said of an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Word {
    works: bool,
    /// Until when it counts, if that is foreseen.
    until: Option<Instant>,
}

#[derive(Debug, Default)]
struct State {
    checkers: BTreeMap<Arc<str>, Checker>,
    said: HashMap<Target, BTreeMap<Arc<str>, Word>>,
    failed: Failed,
    reports: u64,
    ignored: u64,
}

/// A checker at `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CheckerStatus {
    /// The id of its node.
    pub node: String,
    /// Where it is.
    pub region: String,
    /// Where it is.
    pub zone: String,
    /// Whether it reports.
    pub reports: bool,
    /// How many endpoints it was given.
    pub endpoints: usize,
    /// Of how many it says that they do not work.
    pub failed: usize,
}

/// Who checks what, and what became of it.
#[derive(Debug, Clone)]
pub struct Checks {
    settings: Settings,
    state: Arc<Mutex<State>>,
    changes: watch::Sender<u64>,
    news: Arc<Notify>,
}

impl Checks {
    /// Nobody checks anything yet.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings, state: Arc::default(), changes: watch::channel(0).0, news: Arc::default() }
    }

    /// Changes each time that other endpoints do not work.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The endpoints that do not work.
    #[must_use]
    pub fn failed(&self) -> Failed {
        self.state().failed.clone()
    }

    /// How many reports came, and how many endpoints in them were not given to who reported.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let state = self.state();
        (state.reports, state.ignored)
    }

    /// The checkers, by node.
    #[must_use]
    pub fn status(&self) -> Vec<CheckerStatus> {
        let (state, now) = (self.state(), Instant::now());
        let mut failed: HashMap<&Arc<str>, usize> = HashMap::new();
        for (node, word) in state.said.values().flatten() {
            *failed.entry(node).or_default() += usize::from(!word.works);
        }
        let status = state.checkers.iter().map(|(node, checker)| CheckerStatus {
            node: node.to_string(),
            region: checker.locality.region.clone(),
            zone: checker.locality.zone.clone(),
            reports: self.is_alive(checker, now),
            endpoints: checker.given.values().map(HashMap::len).sum(),
            failed: failed.get(node).copied().unwrap_or_default(),
        });
        status.collect()
    }

    /// Divides the work whenever there is other work or somebody else to do it, and forgets what has become too old.
    pub async fn run(self, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            self.divide(&snapshot.mesh, Instant::now());
            tokio::time::sleep(BETWEEN_DIVISIONS).await;
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                () = self.news.notified() => {}
                () = tokio::time::sleep(self.settings.interval) => {}
            }
        }
    }

    /// Adds a stream of a checker until the handle is dropped.
    pub(crate) fn join(&self, node: &Node, viewer: Viewer, capability: &Capability) -> CheckerHandle {
        self.join_at(node, viewer, capability, Instant::now())
    }

    fn join_at(&self, node: &Node, viewer: Viewer, capability: &Capability, now: Instant) -> CheckerHandle {
        let locality = node.locality.clone().unwrap_or_default();
        let locality = Locality { region: locality.region, zone: locality.zone };
        let can = |protocol: Protocol| capability.health_check_protocols.contains(&protocol.into());
        let (http, tcp) = (can(Protocol::Http), can(Protocol::Tcp));
        let name: Arc<str> = node.id.as_str().into();
        let mut state = self.state();
        let known = state.checkers.remove(&name);
        let (streams, given, specifier) = match known {
            Some(known) => (known.streams + 1, known.given, known.specifier),
            None => (1, HashMap::new(), watch::channel(None).0),
        };
        // Seen at once: what it checks may be the same as before.
        let mut specifiers = specifier.subscribe();
        specifiers.mark_changed();
        let checker = Checker { viewer, locality, http, tcp, streams, opened: now, heard: now, given, specifier };
        state.checkers.insert(Arc::clone(&name), checker);
        drop(state);
        self.news.notify_one();
        CheckerHandle { name, checks: self.clone(), specifiers }
    }

    fn is_alive(&self, checker: &Checker, now: Instant) -> bool {
        checker.streams > 0 && now.saturating_duration_since(checker.heard) <= self.patience()
    }

    fn patience(&self) -> Duration {
        self.settings.interval * PATIENCE
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // What is half done when a thread panics is done again at the next division.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives each checker its part of the work.
    fn divide(&self, mesh: &Mesh, now: Instant) {
        let mut state = self.state();
        let State { checkers, said, failed, .. } = &mut *state;
        if checkers.is_empty() && said.is_empty() {
            return;
        }
        let patience = self.patience();
        checkers.retain(|_, checker| checker.streams > 0 || now.saturating_duration_since(checker.heard) <= patience);
        let able = checkers.iter_mut().filter(|(_, checker)| self.is_alive(checker, now));
        let able: Vec<(&Arc<str>, &mut Checker)> = able.collect();
        let candidates = able.iter().map(|(name, checker)| Candidate {
            name,
            locality: &checker.locality,
            scope: egress_of(mesh, &checker.viewer.services),
            http: checker.http,
            tcp: checker.tcp,
        });
        let divided = work::divide(mesh, &candidates.collect::<Vec<_>>(), self.settings.checkers);
        for ((_, checker), portion) in able.into_iter().zip(divided.portions) {
            let mut given: HashMap<String, HashMap<SocketAddr, Given>> = HashMap::new();
            for (target, name, check) in portion.targets() {
                let known = checker.given.get(name).and_then(|of_cluster| of_cluster.get(&target.address));
                let since = known.map_or(now, |known| known.since);
                let first_check = check.timeout.0 + check.interval.0 + self.settings.interval;
                let place = given.entry(name.to_owned()).or_default();
                place.insert(target.address, Given { target, since, first_check });
            }
            checker.given = given;
            let specifier = portion.specifier(self.settings.interval);
            checker.specifier.send_if_modified(|known| {
                let changed = known.as_deref() != Some(&specifier);
                if changed {
                    *known = Some(Arc::new(specifier));
                }
                changed
            });
        }
        let mut changed = false;
        said.retain(|target, words| {
            let there = divided.all.contains(target);
            for (name, word) in words.iter_mut() {
                let checker = checkers.get(name).filter(|checker| self.is_alive(checker, now));
                let given = checker.is_some_and(|checker| checker.was_given(target));
                if !given && word.until.is_none() {
                    word.until = Some(now + patience);
                }
            }
            words.retain(|_, word| there && word.until.is_none_or(|until| until > now));
            changed |= failed.set(target, has_failed(words));
            !words.is_empty()
        });
        drop(state);
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Takes in what a checker says.
    fn report(&self, name: &Arc<str>, report: &EndpointHealthResponse, now: Instant) {
        let mut state = self.state();
        state.reports += 1;
        let State { checkers, said, failed, ignored, .. } = &mut *state;
        let Some(checker) = checkers.get_mut(name) else { return };
        let was_silent = !self.is_alive(checker, now);
        checker.heard = now;
        let mut changed = false;
        for cluster in &report.cluster_endpoints_health {
            let given = checker.given.get(&cluster.cluster_name);
            let endpoints = cluster.locality_endpoints_health.iter().flat_map(|locality| &locality.endpoints_health);
            for endpoint in endpoints {
                let address = endpoint.endpoint.as_ref().and_then(address_of);
                let given = address.and_then(|address| given?.get(&address));
                let Some(Given { target, since, first_check }) = given else {
                    *ignored += 1;
                    continue;
                };
                let works = match endpoint.health_status() {
                    HealthStatus::Healthy | HealthStatus::Degraded => true,
                    HealthStatus::Unhealthy | HealthStatus::Timeout | HealthStatus::Draining => false,
                    HealthStatus::Unknown => continue,
                };
                let unchecked = now.saturating_duration_since(checker.opened.max(*since)) < *first_check;
                if !works && unchecked {
                    continue;
                }
                let word = Word { works, until: None };
                let words = said.entry(target.clone()).or_default();
                if words.insert(Arc::clone(name), word) != Some(word) {
                    changed |= failed.set(target, has_failed(words));
                }
            }
        }
        drop(state);
        if was_silent {
            self.news.notify_one();
        }
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }
}

/// Whether most of those who know say that it does not work.
fn has_failed(words: &BTreeMap<Arc<str>, Word>) -> bool {
    let failing = words.values().filter(|word| !word.works).count();
    2 * failing > words.len()
}

fn address_of(endpoint: &Endpoint) -> Option<SocketAddr> {
    let Some(AddressKind::SocketAddress(address)) = &endpoint.address.as_ref()?.address else { return None };
    let Some(PortSpecifier::PortValue(port)) = address.port_specifier else { return None };
    Some(SocketAddr::new(address.address.parse().ok()?, u16::try_from(port).ok()?))
}

impl Checker {
    fn was_given(&self, target: &Target) -> bool {
        let name = crate::mesh::cluster_name(&target.service, target.port);
        self.given.get(&name).is_some_and(|of_cluster| of_cluster.contains_key(&target.address))
    }
}

/// One stream of a checker.
#[derive(Debug)]
pub(crate) struct CheckerHandle {
    name: Arc<str>,
    checks: Checks,
    specifiers: watch::Receiver<Option<Arc<HealthCheckSpecifier>>>,
}

impl CheckerHandle {
    /// What it is to check next, when that is something else.
    pub(crate) async fn work(&mut self) -> Arc<HealthCheckSpecifier> {
        loop {
            if self.specifiers.changed().await.is_err() {
                // The sender is kept as long as there is a stream.
                std::future::pending::<()>().await;
            }
            if let Some(specifier) = self.specifiers.borrow_and_update().clone() {
                return specifier;
            }
        }
    }

    /// Takes in what it says.
    pub(crate) fn report(&self, report: &EndpointHealthResponse) {
        self.checks.report(&self.name, report, Instant::now());
    }
}

impl Drop for CheckerHandle {
    fn drop(&mut self) {
        if let Some(checker) = self.checks.state().checkers.get_mut(&self.name) {
            checker.streams = checker.streams.saturating_sub(1);
        }
        self.checks.news.notify_one();
    }
}

#[cfg(test)]
mod tests;
