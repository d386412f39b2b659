//! The active checks of a cluster's hosts, and what their results do to them.
//!
//! They begin before the cluster is used, which waits until each host has been checked once, and they end with that version of it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};

use tokio::sync::mpsc;

use super::{Failure, Health, HealthCheckStats, HealthChecker, Place, Report, Target, Way, event_log::Line};
use crate::{
    access_log::EventLog,
    config::model::{
        ClusterConfig, Discovery, Endpoint, EndpointAddress, HealthCheckConfig, HealthStatus, LocalityEndpoints,
        SocketMatches, UpstreamBind, UpstreamTlsContext,
    },
    stats::{Counter, Lease, Scope},
    tls::Secrets,
    upstream::{
        Cluster, Clusters, Host,
        sockets::Sockets,
        stats::socket_matches,
        vitals::{HealthFlag, Vitals},
    },
};

/// The checks of one version of a cluster.
pub struct ClusterChecks {
    config: Arc<HealthCheckConfig>,
    cluster: Arc<str>,
    /// Hosts that have not been checked are not counted: `ignore_new_hosts_until_first_hc`.
    excludes_new: bool,
    /// Hosts that are well do not stay where discovery does not have them: `ignore_health_on_host_removal`.
    removes_at_once: bool,
    stats: HealthCheckStats,
    traffic: super::HasTraffic,
    sockets: Sockets,
    matches: SocketMatches,
    /// What counts connections by their sockets.
    matched: Arc<[Counter]>,
    bind: Option<Arc<UpstreamBind>>,
    logs: Vec<EventLog>,
    reports: mpsc::UnboundedSender<CheckedReport>,
    inner: Mutex<Inner>,
    /// The name of the one host of a LOGICAL_DNS cluster, by which it is known wherever it is.
    logical: Option<EndpointAddress>,
    /// Once it is used.
    used_by: OnceLock<Weak<Cluster>>,
    _lease: Lease,
}

impl std::fmt::Debug for ClusterChecks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterChecks").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    hosts: HashMap<EndpointAddress, Checked>,
    /// How many of them have not been checked once.
    unchecked: usize,
    /// Told when there are none of those.
    warm: Option<Box<dyn FnOnce() + Send>>,
    /// What discovery has said last.
    said: Arc<[LocalityEndpoints]>,
}

struct Checked {
    endpoint: Endpoint,
    /// Where it is, without endpoints.
    group: LocalityEndpoints,
    vitals: Arc<Vitals>,
    place: Place,
    _checker: HealthChecker,
    first: bool,
}

/// A check of the host that is known by this, if it is the host with these vitals.
struct CheckedReport {
    key: EndpointAddress,
    vitals: Arc<Vitals>,
    report: Report,
}

/// What reports have changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::upstream) struct Changed {
    /// Hosts stand otherwise.
    pub(in crate::upstream) standing: bool,
    /// Hosts that only their health has kept have failed.
    pub(in crate::upstream) leave: bool,
}

impl ClusterChecks {
    /// Begins to check these endpoints, where the cluster has checks. `warm` is told when each has been checked once, later. Must be
    /// called within the control runtime.
    pub(crate) fn start(
        config: &ClusterConfig,
        endpoints: &Arc<[LocalityEndpoints]>,
        clusters: &Arc<Clusters>,
        secrets: &Arc<Secrets>,
        warm: Option<Box<dyn FnOnce() + Send>>,
    ) -> Option<Arc<ClusterChecks>> {
        let health = &config.health;
        let check = Arc::clone(health.check.as_ref()?);
        let scope = Scope::cluster(&config.stat_name);
        let lease = scope.lease();
        let total = scope.counter("upstream_cx_total");
        let open = |path: &std::path::PathBuf| {
            let opened = EventLog::open(path);
            opened.inspect_err(|error| tracing::warn!(cluster = %config.name, "health check events: {error}")).ok()
        };
        let (reports, received) = mpsc::unbounded_channel();
        let checks = Arc::new(ClusterChecks {
            logs: check.event_logs.iter().filter_map(open).collect(),
            cluster: Arc::clone(&config.name),
            excludes_new: health.excludes_unchecked,
            removes_at_once: health.ignore_on_removal,
            stats: HealthCheckStats::new(scope.clone()),
            traffic: Arc::new(move || total.value() > 0),
            sockets: Sockets::new(config, &scope, secrets, |tls| tls_of(&check, tls)),
            matches: config.socket_matches.clone(),
            matched: socket_matches(config, &scope),
            bind: config.bind.clone(),
            config: check,
            reports,
            logical: name_of(config),
            inner: Mutex::default(),
            used_by: OnceLock::new(),
            _lease: lease,
        });
        for group in endpoints.iter() {
            for endpoint in &group.endpoints {
                checks.vitals(endpoint, group);
            }
        }
        let mut inner = checks.lock();
        inner.said = Arc::clone(endpoints);
        inner.warm = warm;
        drop(inner);
        tokio::spawn(take_reports(Arc::downgrade(clusters), Arc::downgrade(&checks), received));
        Some(checks)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole before anything can panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster is used from now on.
    pub(in crate::upstream) fn used_by(&self, cluster: &Arc<Cluster>) {
        // There is one for each version.
        let _ = self.used_by.set(Arc::downgrade(cluster));
    }

    /// The cluster that uses it.
    pub(in crate::upstream) fn cluster(&self) -> Option<Arc<Cluster>> {
        self.used_by.get()?.upgrade()
    }

    /// What a host at this address is known by.
    fn key(&self, address: &EndpointAddress) -> EndpointAddress {
        self.logical.as_ref().unwrap_or(address).clone()
    }

    /// How an endpoint is reached for checks.
    fn way(&self, endpoint: &Endpoint) -> Way {
        let details = endpoint.details.as_deref();
        let labels = self.config.socket_labels.as_ref();
        let localitys = details.and_then(|details| details.locality_socket_labels.as_deref());
        let index = match labels {
            Some(labels) => self.matches.by(Some(labels), localitys),
            None => self.matches.of(details),
        };
        let chosen = labels.and_then(|_| self.matched.get(usize::from(index.0)).copied());
        Way { address: target(endpoint), tls: self.sockets.get(index).cloned(), chosen }
    }

    /// What is known of a host, which is checked from now on; `None` where it shall not be.
    pub(in crate::upstream) fn vitals(&self, endpoint: &Endpoint, group: &LocalityEndpoints) -> Option<Arc<Vitals>> {
        let check = endpoint.check();
        if matches!(endpoint.address, EndpointAddress::Dns { .. }) {
            return None;
        }
        let group = || LocalityEndpoints { endpoints: Vec::new(), ..group.clone() };
        let key = self.key(&endpoint.address);
        let mut inner = self.lock();
        if check.is_some_and(|check| check.disabled) {
            // It may have been checked until now.
            if inner.hosts.remove(&key).is_some_and(|old| old.first) {
                inner.unchecked -= 1;
            }
            return None;
        }
        if let Some(known) = inner.hosts.get_mut(&key)
            && known.endpoint.check() == endpoint.check()
        {
            if known.endpoint.address != endpoint.address || known.endpoint.details != endpoint.details {
                known.place.move_to(self.way(endpoint));
            }
            (known.endpoint, known.group) = (endpoint.clone(), group());
            return Some(Arc::clone(&known.vitals));
        }
        let vitals = Arc::new(Vitals::default());
        // The host of a LOGICAL_DNS cluster is taken to be well until a check fails, as in Envoy.
        let health = Health { healthy: self.logical.is_some(), ..Health::default() };
        vitals.set(HealthFlag::FailedActiveHc, !health.healthy);
        vitals.set(HealthFlag::PendingActiveHc, self.excludes_new && !health.healthy);
        self.begin(&mut inner, key, endpoint.clone(), group(), &vitals, health);
        Some(vitals)
    }

    /// Checks a host of an ORIGINAL_DST cluster from now on, which is taken to be well, as by Envoy.
    pub(in crate::upstream) fn check_listed(&self, host: &Host) {
        let Some(vitals) = &host.vitals else { return };
        let endpoint = Endpoint {
            address: host.address.clone(),
            weight: host.weight,
            health: host.health,
            hostname: host.hostname.clone(),
            details: host.details.clone(),
            additional_addresses: Box::default(),
        };
        let group = LocalityEndpoints::default();
        let health = Health { healthy: true, ..Health::default() };
        self.begin(&mut self.lock(), host.address.clone(), endpoint, group, vitals, health);
    }

    fn begin(
        &self,
        inner: &mut Inner,
        key: EndpointAddress,
        endpoint: Endpoint,
        group: LocalityEndpoints,
        vitals: &Arc<Vitals>,
        health: Health,
    ) {
        let place = Place::new(self.way(&endpoint));
        let target = Target {
            place: place.clone(),
            name: endpoint.hostname.clone(),
            host: endpoint.check().and_then(|check| check.hostname.clone()),
            bind: self.bind.clone(),
        };
        let (reports, of, known_by) = (self.reports.clone(), Arc::clone(vitals), key.clone());
        let told = Box::new(move |report| {
            // The receiver ends with the cluster.
            let _ = reports.send(CheckedReport { key: known_by.clone(), vitals: Arc::clone(&of), report });
        });
        let (config, stats, traffic) = (Arc::clone(&self.config), self.stats.clone(), Arc::clone(&self.traffic));
        let checker = HealthChecker::start_told(config, target, health, stats, traffic, Some(told));
        vitals.is_checked_by(checker.passive());
        let vitals = Arc::clone(vitals);
        let checked = Checked { endpoint, group, vitals, place, _checker: checker, first: true };
        inner.unchecked += 1;
        if inner.hosts.insert(key, checked).is_some_and(|old| old.first) {
            inner.unchecked -= 1;
        }
    }

    /// What the cluster's endpoints are where discovery says these: those that are well stay until they fail.
    pub(in crate::upstream) fn with_kept(&self, said: &Arc<[LocalityEndpoints]>) -> Vec<LocalityEndpoints> {
        let mut endpoints = said.to_vec();
        let mut inner = self.lock();
        inner.said = Arc::clone(said);
        let there: HashSet<_> =
            said.iter().flat_map(|group| &group.endpoints).map(|endpoint| self.key(&endpoint.address)).collect();
        for (key, checked) in &inner.hosts {
            let gone = !there.contains(key);
            let ill = checked.vitals.has(HealthFlag::FailedActiveHc)
                || matches!(
                    checked.endpoint.health,
                    HealthStatus::Unhealthy | HealthStatus::Timeout | HealthStatus::Draining
                );
            let keep = gone && !ill && !self.removes_at_once;
            checked.vitals.set(HealthFlag::PendingDynamicRemoval, keep);
            if !keep {
                continue;
            }
            let same = |group: &&mut LocalityEndpoints| {
                group.locality == checked.group.locality && group.priority == checked.group.priority
            };
            match endpoints.iter_mut().find(same) {
                Some(group) => group.endpoints.push(checked.endpoint.clone()),
                None => endpoints
                    .push(LocalityEndpoints { endpoints: vec![checked.endpoint.clone()], ..checked.group.clone() }),
            }
        }
        endpoints
    }

    /// What discovery has said last.
    pub(in crate::upstream) fn said(&self) -> Arc<[LocalityEndpoints]> {
        Arc::clone(&self.lock().said)
    }

    /// Ends the checks of all hosts but these.
    pub(in crate::upstream) fn retain(&self, is_there: impl Fn(&EndpointAddress) -> bool) {
        let mut inner = self.lock();
        let gone: Vec<_> = inner.hosts.extract_if(|_, checked| !is_there(&checked.endpoint.address)).collect();
        inner.unchecked -= gone.iter().filter(|(_, checked)| checked.first).count();
    }

    /// Ends all checks.
    pub(in crate::upstream) fn stop(&self) {
        self.retain(|_| false);
    }

    /// Takes results up, under the lock of the clusters.
    fn take(&self, reports: &[CheckedReport]) -> Changed {
        let mut changed = Changed::default();
        let mut inner = self.lock();
        for CheckedReport { key, vitals, report } in reports {
            let Some(checked) = inner.hosts.get_mut(key) else { continue };
            if !Arc::ptr_eq(&checked.vitals, vitals) {
                continue;
            }
            let Health { healthy, degraded, timed_out, .. } = report.health;
            if healthy && !report.before.healthy {
                vitals.is_well();
            }
            let passive = report.result == Err(Failure::Passive);
            let excluded = !healthy && (passive || vitals.has(HealthFlag::ExcludedViaImmediateHcFail));
            for (flag, on) in [
                (HealthFlag::FailedActiveHc, !healthy),
                (HealthFlag::DegradedActiveHc, degraded),
                (HealthFlag::ActiveHcTimeout, timed_out && !healthy),
                (HealthFlag::PendingActiveHc, false),
                (HealthFlag::ExcludedViaImmediateHcFail, excluded),
            ] {
                changed.standing |= vitals.set(flag, on);
            }
            changed.leave |= !healthy && vitals.has(HealthFlag::PendingDynamicRemoval);
            if !self.logs.is_empty() {
                let line = Line { config: &self.config, cluster: &self.cluster, report };
                for event in line.events(&checked.endpoint, &checked.group.locality) {
                    self.logs.iter().for_each(|log| log.write(&event));
                }
            }
            if std::mem::take(&mut checked.first) {
                inner.unchecked -= 1;
            }
        }
        changed
    }

    /// Tells who waits for it that each host has been checked.
    fn tell_warm(&self) {
        let mut inner = self.lock();
        let warm = if inner.unchecked == 0 { inner.warm.take() } else { None };
        drop(inner);
        if let Some(warm) = warm {
            warm();
        }
    }
}

async fn take_reports(
    clusters: Weak<Clusters>,
    checks: Weak<ClusterChecks>,
    mut received: mpsc::UnboundedReceiver<CheckedReport>,
) {
    // There may be nothing to check.
    if let Some(checks) = checks.upgrade() {
        checks.tell_warm();
    }
    let mut reports = Vec::new();
    while received.recv_many(&mut reports, usize::MAX).await > 0 {
        let (Some(clusters), Some(checks)) = (clusters.upgrade(), checks.upgrade()) else { return };
        clusters.take_checks(&checks, || checks.take(&reports));
        if let Some(outlier) = checks.cluster().as_ref().and_then(|cluster| cluster.outlier.as_ref()) {
            let passed = reports.iter().filter(|it| it.report.result.is_ok() && it.report.health.healthy);
            passed
                .filter(|it| it.vitals.has(HealthFlag::FailedOutlierCheck))
                .for_each(|it| outlier.passed_check(&it.vitals));
        }
        checks.tell_warm();
        reports.clear();
    }
}

/// Where an endpoint is checked.
fn target(endpoint: &Endpoint) -> EndpointAddress {
    let check = endpoint.check();
    check.map_or_else(|| endpoint.address.clone(), |check| check.target(&endpoint.address))
}

/// Of a LOGICAL_DNS cluster.
fn name_of(config: &ClusterConfig) -> Option<EndpointAddress> {
    let logical = matches!(config.discovery, Discovery::LogicalDns(_));
    let endpoint = config.endpoints.iter().find_map(|group| group.endpoints.first());
    endpoint.filter(|_| logical).map(|endpoint| endpoint.address.clone())
}

/// How connections of checks are encrypted: as the cluster's, with what the check says.
fn tls_of(check: &HealthCheckConfig, tls: &Arc<UpstreamTlsContext>) -> Arc<UpstreamTlsContext> {
    if check.alpn_protocols.is_empty() {
        return Arc::clone(tls);
    }
    let mut own = UpstreamTlsContext::clone(tls);
    own.common.alpn_protocols.clone_from(&check.alpn_protocols);
    Arc::new(own)
}
