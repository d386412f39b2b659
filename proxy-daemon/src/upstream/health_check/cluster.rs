//! The active checks of a cluster's hosts, and what their results do to them.
//!
//! They begin before the cluster is used, which waits until each host has been checked once, and they end with that version of it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak},
};

use tokio::sync::mpsc;

use super::{
    Failure, Gauges, Health, HealthCheckStats, HealthChecker, Place, Report, Shown, Target, Way, event_log::Line,
};
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
    /// Which there are; at least one.
    checks: Box<[OneCheck]>,
    /// Hosts by what all checks together say, where there are several.
    gauges: Option<Gauges>,
    cluster: Arc<str>,
    /// Hosts that have not been checked are not counted: `ignore_new_hosts_until_first_hc`.
    excludes_new: bool,
    /// Hosts that are well do not stay where discovery does not have them: `ignore_health_on_host_removal`.
    removes_at_once: bool,
    traffic: super::HasTraffic,
    matches: SocketMatches,
    /// What counts connections by their sockets.
    matched: Arc<[Counter]>,
    bind: Option<Arc<UpstreamBind>>,
    reports: mpsc::UnboundedSender<CheckedReport>,
    inner: Mutex<Inner>,
    /// The name of the one host of a LOGICAL_DNS cluster, by which it is known wherever it is.
    logical: Option<EndpointAddress>,
    /// Once it is used.
    used_by: OnceLock<Weak<Cluster>>,
    _lease: Lease,
}

/// What every host is asked.
struct OneCheck {
    config: Arc<HealthCheckConfig>,
    stats: HealthCheckStats,
    sockets: Sockets,
    logs: Vec<EventLog>,
}

impl std::fmt::Debug for ClusterChecks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterChecks").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Inner {
    hosts: HashMap<EndpointAddress, Checked>,
    /// How many of them have not been checked once by each check.
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
    /// By each check, in their order.
    by_check: Box<[ByCheck]>,
    /// How many of them have said nothing yet.
    awaited: usize,
    /// Counts it where there are several checks, once all have said something.
    shown: Option<Shown>,
}

/// What one check has found out about a host.
struct ByCheck {
    place: Place,
    checker: HealthChecker,
    first: bool,
    health: Health,
    /// It has said in a response that it is not well.
    excluded: bool,
}

/// What all checks together have found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found {
    healthy: bool,
    degraded: bool,
    timed_out: bool,
    excluded: bool,
}

impl Checked {
    fn found(&self) -> Found {
        let any = |is: fn(&ByCheck) -> bool| self.by_check.iter().any(is);
        Found {
            healthy: !any(|it| !it.health.healthy),
            degraded: any(|it| it.health.degraded),
            timed_out: any(|it| it.health.timed_out && !it.health.healthy),
            excluded: any(|it| it.excluded),
        }
    }
}

/// A result of a check, by its number, of the host that is known by this, if it is the host with these vitals.
struct CheckedReport {
    key: EndpointAddress,
    vitals: Arc<Vitals>,
    check: usize,
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
        if health.checks.is_empty() {
            return None;
        }
        let scope = Scope::cluster(&config.stat_name);
        let lease = scope.lease();
        let total = scope.counter("upstream_cx_total");
        let open = |path: &std::path::PathBuf| {
            let opened = EventLog::open(path);
            opened.inspect_err(|error| tracing::warn!(cluster = %config.name, "health check events: {error}")).ok()
        };
        let (reports, received) = mpsc::unbounded_channel();
        let one = |check: &Arc<HealthCheckConfig>| OneCheck {
            stats: HealthCheckStats::new(scope.clone(), &check.name),
            sockets: Sockets::new(config, &scope, secrets, |tls| tls_of(check, tls)),
            logs: check.event_logs.iter().filter_map(open).collect(),
            config: Arc::clone(check),
        };
        let checks = Arc::new(ClusterChecks {
            checks: health.checks.iter().map(one).collect(),
            gauges: (health.checks.len() > 1).then(|| Gauges::new(&scope.clone().child("health_check"))),
            cluster: Arc::clone(&config.name),
            excludes_new: health.excludes_unchecked,
            removes_at_once: health.ignore_on_removal,
            traffic: Arc::new(move || total.value() > 0),
            matches: config.socket_matches.clone(),
            matched: socket_matches(&config.socket_matches, &scope),
            bind: config.bind.clone(),
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

    /// How an endpoint is reached for a check.
    fn way(&self, check: &OneCheck, endpoint: &Endpoint) -> Way {
        let details = endpoint.details.as_deref();
        let labels = check.config.socket_labels.as_ref();
        let localitys = details.and_then(|details| details.locality_socket_labels.as_deref());
        let index = match labels {
            Some(labels) => self.matches.by(Some(labels), localitys),
            None => self.matches.of(details),
        };
        let chosen = labels.and_then(|_| self.matched.get(usize::from(index.0)).copied());
        let (host, tls) = (Host::text_of(&endpoint.address), check.sockets.get(index).cloned());
        Way { address: target(endpoint), host, tls, chosen }
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
            if inner.hosts.remove(&key).is_some_and(|old| old.awaited > 0) {
                inner.unchecked -= 1;
            }
            return None;
        }
        if let Some(known) = inner.hosts.get_mut(&key)
            && known.endpoint.check() == endpoint.check()
        {
            if known.endpoint.address != endpoint.address || known.endpoint.details != endpoint.details {
                for (check, known) in self.checks.iter().zip(&known.by_check) {
                    known.place.move_to(self.way(check, endpoint));
                }
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
            hostname: host.hostname().into(),
            details: host.details().cloned(),
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
        let by_check = |(number, check): (usize, &OneCheck)| {
            let place = Place::new(self.way(check, &endpoint));
            let target = Target {
                place: place.clone(),
                name: endpoint.hostname.clone(),
                host: endpoint.check().and_then(|check| check.hostname.clone()),
                bind: self.bind.clone(),
            };
            let (reports, of, known_by) = (self.reports.clone(), Arc::clone(vitals), key.clone());
            let told = Box::new(move |report| {
                let (key, vitals) = (known_by.clone(), Arc::clone(&of));
                // The receiver ends with the cluster.
                let _ = reports.send(CheckedReport { key, vitals, check: number, report });
            });
            let (config, stats, traffic) = (Arc::clone(&check.config), check.stats.clone(), Arc::clone(&self.traffic));
            let checker = HealthChecker::start_told(config, target, health, stats, traffic, Some(told));
            ByCheck { place, checker, first: true, health, excluded: false }
        };
        let by_check: Box<[_]> = self.checks.iter().enumerate().map(by_check).collect();
        // What a host says of itself goes to one of several, as in Envoy.
        if let Some(last) = by_check.last() {
            vitals.is_checked_by(last.checker.passive());
        }
        let (vitals, awaited) = (Arc::clone(vitals), by_check.len());
        let checked = Checked { endpoint, group, vitals, by_check, awaited, shown: None };
        inner.unchecked += 1;
        if inner.hosts.insert(key, checked).is_some_and(|old| old.awaited > 0) {
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
        inner.unchecked -= gone.iter().filter(|(_, checked)| checked.awaited > 0).count();
    }

    /// Ends all checks.
    pub(in crate::upstream) fn stop(&self) {
        self.retain(|_| false);
    }

    /// Takes results up, under the lock of the clusters.
    fn take(&self, reports: &[CheckedReport]) -> Changed {
        let mut changed = Changed::default();
        let mut inner = self.lock();
        for CheckedReport { key, vitals, check, report } in reports {
            let Some(checked) = inner.hosts.get_mut(key).filter(|it| Arc::ptr_eq(&it.vitals, vitals)) else { continue };
            let (Some(by), Some(check)) = (checked.by_check.get_mut(*check), self.checks.get(*check)) else { continue };
            by.health = report.health;
            by.excluded = !report.health.healthy && (report.result == Err(Failure::Passive) || by.excluded);
            let first = std::mem::take(&mut by.first);
            if !check.logs.is_empty() {
                let line = Line { config: &check.config, cluster: &self.cluster, report };
                for event in line.events(&checked.endpoint, &checked.group.locality) {
                    check.logs.iter().for_each(|log| log.write(&event));
                }
            }
            checked.awaited -= usize::from(first);
            // Before each check has said something a host may get worse, as one that was taken to be well, and no better.
            let pending = checked.awaited > 0;
            if pending && report.health.healthy {
                continue;
            }
            let Found { healthy, degraded, timed_out, excluded } = checked.found();
            if healthy && vitals.has(HealthFlag::FailedActiveHc) {
                vitals.is_well();
            }
            if let Some(gauges) = &self.gauges {
                let shown = checked.shown.get_or_insert_with(|| Shown::new(gauges, Health::default()));
                shown.show(healthy, degraded);
            }
            for (flag, on) in [
                (HealthFlag::FailedActiveHc, !healthy),
                (HealthFlag::DegradedActiveHc, degraded),
                (HealthFlag::ActiveHcTimeout, timed_out),
                (HealthFlag::PendingActiveHc, pending && vitals.has(HealthFlag::PendingActiveHc)),
                (HealthFlag::ExcludedViaImmediateHcFail, excluded),
            ] {
                changed.standing |= vitals.set(flag, on);
            }
            changed.leave |= !healthy && vitals.has(HealthFlag::PendingDynamicRemoval);
            if first && !pending {
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
