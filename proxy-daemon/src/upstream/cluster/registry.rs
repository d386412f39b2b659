//! All clusters, as the control thread changes them.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwap;

use super::Cluster;
use crate::{
    config::model::{ClusterConfig, Discovery, LocalNode, LocalityEndpoints},
    layered_runtime::observe,
    stats,
    tls::Secrets,
    upstream::{
        ClusterStats,
        aggregate::{Aggregates, replan},
        health_check::{Changed, ClusterChecks},
        host::{Host, HostSet},
        lb::LocalZones,
        limits::cluster_of,
        making::{Making, build, of_hosts},
        orca::Orca,
        outlier::OutlierDetector,
    },
};

/// Where this node is, and what its own cluster says of zones.
#[derive(Debug, Default)]
pub(in crate::upstream) struct Local {
    pub(in crate::upstream) node: LocalNode,
    pub(in crate::upstream) zones: Option<LocalZones>,
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
    pub(in crate::upstream) fn change_health(&self, cluster: &Arc<Cluster>, change: impl FnOnce() -> bool) -> bool {
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
    pub(in crate::upstream) fn set_destinations(
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
    pub(in crate::upstream) fn reweigh(&self, cluster: &Arc<Cluster>) -> bool {
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
    pub(in crate::upstream) fn take_checks(&self, checks: &ClusterChecks, take: impl FnOnce() -> Changed) {
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
