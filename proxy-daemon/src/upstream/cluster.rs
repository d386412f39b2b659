use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use super::{
    ClusterStats, Dropped, NamedHosts,
    aggregate::{Aggregates, Plan, replan},
    breakers::{Breakers, Resource},
    health_check::{Changed, ClusterChecks},
    host::{Host, HostCounters, HostSet},
    lb::LocalZones,
    limits::{Limits, RuntimeLimits, cluster_of},
    making::{Making, build, of_hosts},
    orca::{Orca, Reports},
    original_dst::Destinations,
    outlier::OutlierDetector,
    recent::Recent,
    sockets::Sockets,
    vitals::Vitals,
};
use crate::{
    config::model::{ClusterConfig, Discovery, LocalNode, LocalityEndpoints, SocketIndex},
    layered_runtime::{observe, with_values},
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
            retries: Retries { active: Default::default(), recent },
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

    /// There may be no further retry now.
    pub(super) fn retries_are_exhausted(&self, high: bool) -> bool {
        self.retries_left(high) == 0
    }

    /// How many more retries there may be now.
    pub(super) fn retries_left(&self, high: bool) -> u32 {
        self.retry_limit(high).saturating_sub(self.retries.active[usize::from(high)].load(Ordering::Relaxed))
    }

    /// Counts one more retry, if there may be one; [`end_retry`](Self::end_retry) must follow then.
    pub(crate) fn begin_retry(&self, high: bool) -> bool {
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

/// Where this node is, and what its own cluster says of zones.
#[derive(Debug, Default)]
pub(super) struct Local {
    pub(super) node: LocalNode,
    pub(super) zones: Option<LocalZones>,
    aggregates: Aggregates,
}

/// Every cluster, by name.
pub type ClusterMap = HashMap<Arc<str>, Arc<Cluster>>;

/// A change of the registry.
#[derive(Debug)]
pub enum ClusterChange {
    /// Adds a cluster, or replaces the one of the same name. With the endpoints that EDS or DNS says it has; without, a
    /// replaced EDS or DNS cluster keeps its hosts.
    /// The checks are those that have begun before it is used.
    Upsert(Box<ClusterConfig>, Option<Arc<[LocalityEndpoints]>>, Option<Arc<ClusterChecks>>),
    /// Forgets a cluster; requests in flight finish.
    Remove(Arc<str>),
}

/// The registry of clusters: written by the control thread, read by workers through a version number.
#[derive(Debug)]
pub struct Clusters {
    map: ArcSwap<ClusterMap>,
    version: AtomicU64,
    workers: usize,
    secrets: Arc<Secrets>,
    /// Held while anything changes.
    local: Mutex<Local>,
}

impl Clusters {
    /// None yet.
    pub fn new(workers: usize) -> Clusters {
        let secrets = Arc::default();
        Clusters { map: ArcSwap::default(), version: AtomicU64::new(1), workers, secrets, local: Mutex::default() }
    }

    /// Says where this node is, and which cluster it is of. Before there are any clusters.
    pub fn set_local_node(&self, node: LocalNode) {
        let zones = node.cluster.is_some().then(LocalZones::default);
        *self.lock() = Local { node, zones, ..Local::default() };
    }

    fn lock(&self) -> MutexGuard<'_, Local> {
        // Whatever panicked had changed nothing, or all of it.
        self.local.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The secrets that clusters find theirs in.
    pub fn secrets(&self) -> &Arc<Secrets> {
        &self.secrets
    }

    /// All clusters now.
    pub fn load(&self) -> Arc<ClusterMap> {
        self.map.load_full()
    }

    /// Grows with every cluster that is added, replaced or removed.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Adds a cluster, or replaces the one of the same name. A replaced EDS or DNS cluster keeps its hosts.
    pub fn upsert(&self, config: ClusterConfig) {
        self.change(vec![ClusterChange::Upsert(Box::new(config), None, None)]);
    }

    /// Forgets a cluster; requests in flight finish.
    pub fn remove(&self, name: &str) {
        self.change(vec![ClusterChange::Remove(name.into())]);
    }

    /// Carries out all of these at once.
    pub fn change(&self, changes: Vec<ClusterChange>) {
        if changes.is_empty() {
            return;
        }
        let mut local = self.lock();
        let mut next = ClusterMap::clone(&self.map.load());
        let (mut gone, mut changed) = (Vec::new(), Vec::new());
        for change in changes {
            match change {
                ClusterChange::Upsert(config, endpoints, checks) => {
                    let name = Arc::clone(&config.name);
                    let cluster = self.build(*config, endpoints.as_deref(), checks, next.get(&name), &local);
                    local.aggregates.add(&cluster);
                    changed.push(Arc::clone(&name));
                    gone.extend(next.insert(name, cluster));
                }
                ClusterChange::Remove(name) => {
                    gone.extend(next.remove(&name));
                    local.aggregates.remove(&name);
                    changed.push(name);
                }
            }
        }
        changed.iter().filter_map(|name| next.get(name)).for_each(|cluster| replan(cluster, &next));
        local.aggregates.follow(changed.iter().map(|name| &**name), &next);
        self.map.store(Arc::new(next));
        self.version.fetch_add(1, Ordering::Release);
        // Requests in flight may keep a cluster for long; nobody needs to know its hosts' health any more.
        gone.iter().filter_map(|cluster| cluster.checks.as_ref()).for_each(|checks| checks.stop());
        gone.iter()
            .filter_map(|cluster| cluster.outside.as_ref())
            .for_each(|outside| outside.send_modify(|over| *over = true));
        self.follow_local(&mut local);
    }

    /// Has every cluster take note where the hosts of this node's own one have changed.
    fn follow_local(&self, local: &mut Local) {
        let Some(name) = &local.node.cluster else { return };
        let map = self.map.load();
        let hosts = map.get(name).map(|cluster| cluster.hosts()).unwrap_or_default();
        let zones = LocalZones::new(hosts.levels.first(), &hosts.hosts);
        if local.zones.replace(zones.clone()) != Some(zones) {
            map.values().for_each(|cluster| cluster.rebalance(self.workers, local));
        }
    }

    /// A cluster that replaces `before`. Hosts whose addresses stay keep their counters.
    fn build(
        &self,
        config: ClusterConfig,
        endpoints: Option<&[LocalityEndpoints]>,
        checks: Option<Arc<ClusterChecks>>,
        before: Option<&Arc<Cluster>>,
        local: &Local,
    ) -> Arc<Cluster> {
        let finds_the_same = before.is_some_and(|old| old.config.finds_as(&config));
        // What discovery said of hosts that are checked, with how each is, is still true where both look in the same place.
        let said = before.filter(|_| finds_the_same).and_then(|old| old.checks.as_ref()).map(|checks| checks.said());
        let before = before.map(|old| old.hosts()).unwrap_or_default();
        let stats = ClusterStats::new(&config);
        let scope = stats.scope();
        let outlier = config.health.outlier_detection.as_ref();
        let outlier = outlier.map(|outlier| OutlierDetector::new(outlier, scope.clone(), self.workers));
        let orca = Orca::new(&config, self.workers);
        let making = Making {
            config: &config,
            stats: &stats,
            workers: self.workers,
            local,
            outlier: outlier.as_ref(),
            checks: checks.as_deref(),
            orca: orca.as_ref(),
            keeps_vitals: false,
        };
        let hosts = match (&config.discovery, endpoints) {
            (Discovery::Static, _) => Arc::new(build(&config.endpoints, &before, &making)),
            (Discovery::StrictDns(_) | Discovery::LogicalDns(_) | Discovery::Eds { .. }, Some(endpoints)) => {
                Arc::new(build(endpoints, &before, &making))
            }
            (Discovery::StrictDns(_) | Discovery::LogicalDns(_) | Discovery::Eds { .. }, None) => {
                // Hosts from elsewhere are none of this cluster's.
                Arc::new(match said {
                    Some(said) => build(&said, &before, &making),
                    None if finds_the_same => making.again(&before),
                    None => build(&[], &before, &making),
                })
            }
            (
                Discovery::OriginalDst { .. } | Discovery::Aggregate { .. } | Discovery::DynamicForwardProxy { .. },
                _,
            ) => Arc::default(),
        };
        let cluster = Cluster::new(config, stats, (outlier, checks, orca), hosts, self.workers, &self.secrets);
        let cluster = Arc::new(cluster);
        if let Some(checks) = &cluster.checks {
            checks.used_by(&cluster);
            let hosts = cluster.hosts.load();
            checks.retain(|address| hosts.at(address).is_some());
        }
        cluster
    }

    /// Replaces a cluster's hosts; `false` where there is no such cluster.
    pub fn set_endpoints(&self, name: &str, endpoints: &[LocalityEndpoints]) -> bool {
        let mut local = self.lock();
        let map = self.map.load();
        let cluster = map.get(name);
        if let Some(cluster) = cluster {
            cluster.set_endpoints(endpoints, self.workers, &local);
            local.aggregates.follow([name].into_iter(), &map);
        }
        if local.node.cluster.as_deref() == Some(name) {
            self.follow_local(&mut local);
        }
        cluster.is_some()
    }

    /// Carries out a change of what is known of a cluster's hosts, and has them chosen anew where it returns `true`. `false`: the cluster
    /// is gone or has been replaced, and nothing was done.
    pub(super) fn change_health(&self, cluster: &Arc<Cluster>, change: impl FnOnce() -> bool) -> bool {
        let mut local = self.lock();
        let name = &cluster.config.name;
        if !self.map.load().get(name).is_some_and(|now| Arc::ptr_eq(now, cluster)) {
            return false;
        }
        if change() {
            cluster.rebalance(self.workers, &local);
            local.aggregates.follow([&**name].into_iter(), &self.map.load());
            stats::counter("cluster_manager.cluster_updated").inc();
            if local.node.cluster.as_ref() == Some(name) {
                self.follow_local(&mut local);
            }
        }
        true
    }

    /// Replaces the hosts of an ORIGINAL_DST cluster by those that `change` returns, the first ones of which it has already; `None`: they are
    /// as they were. `false`: the cluster is gone or has been replaced.
    pub(super) fn set_destinations(
        &self,
        cluster: &Arc<Cluster>,
        change: impl FnOnce(&HostSet) -> Option<(Vec<Arc<Host>>, usize)>,
    ) -> bool {
        let local = self.lock();
        if !self.map.load().get(&cluster.config.name).is_some_and(|now| Arc::ptr_eq(now, cluster)) {
            return false;
        }
        let before = cluster.hosts.load();
        let Some((hosts, listed)) = change(&before) else { return true };
        let set = of_hosts(hosts, listed, &before, &local);
        if let Some(checks) = &cluster.checks {
            set.hosts[listed..].iter().for_each(|host| checks.check_listed(host));
            checks.retain(|address| set.at(address).is_some());
        }
        cluster.set_hosts(set, self.workers);
        cluster.stats.membership_change.inc();
        stats::counter("cluster_manager.cluster_updated").inc();
        if let Some(outlier) = &cluster.outlier {
            outlier.hosts_changed();
        }
        true
    }

    /// Weighs a cluster's hosts by what they report of their load. `false`: the cluster is gone or has been replaced.
    pub(super) fn reweigh(&self, cluster: &Arc<Cluster>) -> bool {
        let mut local = self.lock();
        let name = &cluster.config.name;
        if !self.map.load().get(name).is_some_and(|now| Arc::ptr_eq(now, cluster)) {
            return false;
        }
        let hosts = cluster.hosts.load();
        if cluster.orca.as_ref().is_some_and(|orca| !orca.weigh(&hosts.hosts).is_empty()) {
            cluster.rebalance(self.workers, &local);
            if local.node.cluster.as_ref() == Some(name) {
                self.follow_local(&mut local);
            }
        }
        true
    }

    /// Takes up results of active health checks.
    pub(super) fn take_checks(&self, checks: &ClusterChecks, take: impl FnOnce() -> Changed) {
        let mut local = self.lock();
        let changed = take();
        let Some(cluster) = checks.cluster().filter(|_| changed.standing) else { return };
        let name = &cluster.config.name;
        if !self.map.load().get(name).is_some_and(|now| Arc::ptr_eq(now, &cluster)) {
            return;
        }
        if changed.leave {
            cluster.set_endpoints(&checks.said(), self.workers, &local);
        } else {
            cluster.rebalance(self.workers, &local);
            stats::counter("cluster_manager.cluster_updated").inc();
        }
        local.aggregates.follow([&**name].into_iter(), &self.map.load());
        if local.node.cluster.as_ref() == Some(name) {
            self.follow_local(&mut local);
        }
    }

    /// Keeps the clusters' limits in step with the runtime values, for as long as the registry lives.
    pub fn follow_runtime(self: &Arc<Clusters>) {
        let clusters = Arc::downgrade(self);
        observe(move |before, after| {
            let Some(clusters) = clusters.upgrade() else { return false };
            let named: HashSet<&str> = before.keys().chain(after.keys()).filter_map(|key| cluster_of(key)).collect();
            if !named.is_empty() {
                // A cluster that is being added has read the values before this, or is in the map after this.
                let _one_at_a_time = clusters.lock();
                let map = clusters.map.load();
                named.into_iter().filter_map(|name| map.get(name)).for_each(|it| it.limits.set(&it.config, after));
            }
            true
        });
    }
}

#[cfg(test)]
#[path = "cluster_tests.rs"]
mod tests;
