mod registry;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

pub(super) use registry::Local;
pub use registry::{ClusterChange, ClusterMap, Clusters};

use super::{
    ClusterStats, Dropped, NamedHosts,
    aggregate::Plan,
    breakers::{Breakers, Resource},
    health_check::ClusterChecks,
    host::{Host, HostCounters, HostSet},
    limits::{Limits, RuntimeLimits},
    making::{Making, build},
    orca::{Orca, Reports},
    original_dst::Destinations,
    outlier::OutlierDetector,
    recent::Recent,
    sockets::Sockets,
    vitals::Vitals,
};
use crate::{
    config::model::{ClusterConfig, Discovery, LocalityEndpoints, SocketIndex},
    layered_runtime::with_values,
    stats,
    tls::{ClientTls, Secrets},
};

/// A cluster as all workers share it.
#[derive(Debug)]
pub struct Cluster {
    /// As configured.
    pub config: ClusterConfig,
    /// Slots of its counters. Connections hold on to them, and not to the cluster.
    pub stats: Arc<ClusterStats>,
    /// Requests and connections refused at a circuit breaker, for load reports.
    pub(crate) dropped: Dropped,
    /// Requests that were dropped as `drop_overloads` says, for load reports.
    pub(crate) dropped_overload: Dropped,
    /// What hosts that requests name, and that are not among `hosts`, count together.
    pub(crate) unlisted: Option<Arc<HostCounters>>,
    /// The hosts of a dynamic forward proxy.
    pub(crate) named: NamedHosts,
    /// Of an ORIGINAL_DST cluster.
    pub(super) destinations: Option<Destinations>,
    limits: RuntimeLimits,
    /// What counts at its circuit breakers. Connections hold on to it.
    pub(crate) breakers: Arc<Breakers>,
    retries: Retries,
    /// How its connections are encrypted.
    pub sockets: Sockets,
    /// Which hosts are ejected; `None` where none ever is.
    pub(crate) outlier: Option<OutlierDetector>,
    checks: Option<Arc<ClusterChecks>>,
    /// What its hosts are asked to report of their load; `None`: nothing.
    orca: Option<Arc<Orca>>,
    /// Where hosts report their load apart from responses: tells of changes of the hosts; `true`: it is not used any more.
    pub(super) outside: Option<watch::Sender<bool>>,
    hosts: ArcSwap<HostSet>,
    hosts_version: AtomicU64,
    /// Of an aggregate.
    pub(super) plan: Option<ArcSwap<Plan>>,
}

/// What retries are limited by, of the default priority and of the high one. Workers share it, as the limit is the cluster's; what every request
/// reads is on other cache lines.
#[derive(Debug)]
#[repr(align(64))]
struct Retries {
    /// Retries under way.
    active: [AtomicU32; 2],
    /// Whether there was ever one wanted.
    asked: [AtomicBool; 2],
    /// What `budget_interval` asks for, which all attempts write.
    recent: [Option<Recent>; 2],
}

impl Cluster {
    fn new(
        config: ClusterConfig,
        stats: ClusterStats,
        (outlier, checks, orca): (Option<OutlierDetector>, Option<Arc<ClusterChecks>>, Option<Arc<Orca>>),
        hosts: Arc<HostSet>,
        workers: usize,
        secrets: &Arc<Secrets>,
    ) -> Cluster {
        stats.publish_hosts(&config, &hosts, None, workers);
        // Hosts that requests name come later, one by one.
        let named = matches!(config.discovery, Discovery::OriginalDst { .. } | Discovery::DynamicForwardProxy { .. });
        if !named {
            stats.membership_change.add(hosts.priorities_other_than(&HostSet::default()));
        }
        let limits = with_values(|values| RuntimeLimits::new(&config, values));
        let destinations =
            matches!(config.discovery, Discovery::OriginalDst { .. }).then(|| Destinations::new(workers));
        let plan = matches!(config.discovery, Discovery::Aggregate { .. }).then(ArcSwap::default);
        let recent = config.circuit_breakers.each_ref().map(|it| it.retry_budget.as_ref()?.interval.map(Recent::new));
        let has_stream = config.lb.weights.as_ref().is_some_and(|weights| weights.stream.is_some());
        let outside = has_stream.then(watch::Sender::default);
        let sockets = Sockets::new(&config, stats.scope(), secrets, Arc::clone);
        Cluster {
            config,
            stats: Arc::new(stats),
            limits,
            breakers: Arc::default(),
            retries: Retries { active: Default::default(), asked: Default::default(), recent },
            dropped: Dropped::new(),
            dropped_overload: Dropped::new(),
            unlisted: named.then(|| Arc::new(HostCounters::new(workers))),
            named: NamedHosts::default(),
            destinations,
            sockets,
            outlier,
            checks,
            orca,
            outside,
            hosts: ArcSwap::new(hosts),
            hosts_version: AtomicU64::new(1),
            plan,
        }
    }

    /// The circuit breakers of the default or the high priority.
    pub fn limits(&self, high: bool) -> &Limits {
        &self.limits.breakers[usize::from(high)]
    }

    /// How many retries there may be at a time.
    fn retry_limit(&self, high: bool) -> u32 {
        match &self.config.circuit_breakers[usize::from(high)].retry_budget {
            None => self.limits(high).max_retries(),
            Some(budget) => {
                let requests = match &self.retries.recent[usize::from(high)] {
                    Some(recent) => recent.count(),
                    // Those that wait for a connection are among them.
                    None => self.breakers.in_use(Resource::Requests, high),
                };
                let share = requests as f64 * budget.percent / 100.0;
                (share as u32).max(budget.min_concurrency)
            }
        }
    }

    /// A request, or another attempt at it, has got a host.
    pub(crate) fn attempt_begins(&self, high: bool) {
        if let Some(recent) = &self.retries.recent[usize::from(high)] {
            recent.begun();
        }
    }

    /// Whether there are as many retries as may be. As by Envoy `max_retries` tells, also where a budget decides; without any there are not.
    pub(super) fn retries_are_exhausted(&self, high: bool) -> bool {
        let active = self.retries.active[usize::from(high)].load(Ordering::Relaxed);
        active > 0 && active >= self.limits(high).max_retries()
    }

    /// How many more retries there may be now; with a budget 0 as by Envoy, once somebody has asked for one.
    pub(super) fn retries_left(&self, high: bool) -> u32 {
        let has_budget = self.config.circuit_breakers[usize::from(high)].retry_budget.is_some();
        if has_budget && self.retries.asked[usize::from(high)].load(Ordering::Relaxed) {
            return 0;
        }
        let active = self.retries.active[usize::from(high)].load(Ordering::Relaxed);
        self.limits(high).max_retries().saturating_sub(active)
    }

    /// Counts one more retry, if there may be one; [`end_retry`](Self::end_retry) must follow then.
    pub(crate) fn begin_retry(&self, high: bool) -> bool {
        let asked = &self.retries.asked[usize::from(high)];
        if !asked.load(Ordering::Relaxed) {
            asked.store(true, Ordering::Relaxed);
        }
        let limit = self.retry_limit(high);
        let more = |retries| (retries < limit).then_some(retries + 1);
        self.retries.active[usize::from(high)].fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok()
    }

    /// A retry that began is over.
    pub(crate) fn end_retry(&self, high: bool) {
        self.retries.active[usize::from(high)].fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether this request is among those that `upstream.maintenance_mode.<cluster>` refuses.
    pub fn refuses_for_maintenance(&self) -> bool {
        self.limits.refuses()
    }

    /// The hosts now.
    pub fn hosts(&self) -> Arc<HostSet> {
        self.hosts.load_full()
    }

    /// Grows with every change of the hosts, so that a worker need only compare it.
    pub fn hosts_version(&self) -> u64 {
        self.hosts_version.load(Ordering::Acquire)
    }

    /// Replaces the hosts. One that stays keeps its counters and, in each worker, its connections.
    fn set_endpoints(&self, endpoints: &[LocalityEndpoints], workers: usize, local: &Local) {
        let kept = self.checks.as_ref().map(|checks| checks.with_kept(&endpoints.into()));
        let endpoints = kept.as_deref().unwrap_or(endpoints);
        let making = self.making(workers, local);
        let before = self.hosts.load();
        self.set_hosts(build(endpoints, &before, &making), workers);
        self.stats.membership_change.add(self.hosts.load().priorities_other_than(&before));
        // What EDS and DNS say first is what the cluster begins with: this is of one in use.
        stats::counter("cluster_manager.cluster_updated").inc();
        if let Some(checks) = &self.checks {
            let hosts = self.hosts.load();
            checks.retain(|address| hosts.at(address).is_some());
        }
        if let Some(outlier) = &self.outlier {
            outlier.hosts_changed();
        }
    }

    fn making<'a>(&'a self, workers: usize, local: &'a Local) -> Making<'a> {
        let (outlier, checks, orca) = (self.outlier.as_ref(), self.checks.as_deref(), self.orca.as_ref());
        let (config, stats) = (&self.config, &self.stats);
        Making { config, stats, workers, local, outlier, checks, orca, keeps_vitals: true }
    }

    /// Chooses anew: this node's own cluster has changed, or hosts stand otherwise.
    fn rebalance(&self, workers: usize, local: &Local) {
        let making = self.making(workers, local);
        self.set_hosts(making.again(&self.hosts.load()), workers);
    }

    fn set_hosts(&self, next: HostSet, workers: usize) {
        self.stats.publish_hosts(&self.config, &next, Some(&self.hosts.load()), workers);
        self.hosts.store(Arc::new(next));
        self.hosts_moved();
    }

    /// How connections to a host are encrypted.
    pub fn tls_of(&self, host: &Host) -> Option<&ClientTls> {
        self.sockets.get(host.socket).map(|tls| &**tls)
    }

    /// How connections to a host are encrypted that a request has named: nothing is said of it.
    pub(super) fn socket_of_new(&self) -> SocketIndex {
        let socket = self.config.socket_matches.of(None);
        self.stats.count_socket(socket);
        socket
    }

    /// What is found out about a host that a request has named, where anything is.
    pub(super) fn vitals_of_new(&self) -> Option<Arc<Vitals>> {
        if self.outlier.is_none() && self.checks.is_none() && self.orca.is_none() {
            return None;
        }
        let vitals = Vitals::new(self.outlier.as_ref().map(|outlier| outlier.monitor()));
        if let Some(orca) = &self.orca {
            vitals.keep_reports(|| Reports::new(orca));
        }
        Some(Arc::new(vitals))
    }

    /// Workers have to look anew.
    pub(super) fn hosts_moved(&self) {
        self.hosts_version.fetch_add(1, Ordering::Release);
        if let Some(outside) = &self.outside {
            outside.send_modify(|_| {});
        }
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
