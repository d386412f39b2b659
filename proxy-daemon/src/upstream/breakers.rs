//! What circuit breakers look at: how much of each kind a cluster has under way, for each priority; and the statistics
//! `circuit_breakers.<priority>.*`, which are looked up and not counted.

use std::rc::Rc;

use super::{Cluster, ClusterMap, HostCounter, WorkerCluster, WorkerHost};
use crate::{
    config::model::Thresholds,
    stats::{HiddenGauge, Metric},
};

/// What there may be only so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Connections to all hosts.
    Connections,
    /// Requests that wait for a connection.
    Pending,
    /// Requests at a time.
    Requests,
    /// Connection pools, where there is a limit.
    Pools,
}

/// What a cluster has under way. As in Envoy each priority is counted alone, and nothing that another cluster of the same statistics, or
/// the one that was replaced, has. Every worker counts in slots of its own.
#[derive(Debug, Default)]
pub(crate) struct Breakers([[HiddenGauge; 4]; 2]);

impl Breakers {
    fn gauge(&self, resource: Resource, high: bool) -> &HiddenGauge {
        &self.0[usize::from(high)][resource as usize]
    }

    /// One more. [`give_back`](Self::give_back) must follow.
    #[inline]
    pub(crate) fn take(&self, resource: Resource, high: bool) {
        self.gauge(resource, high).inc();
    }

    /// One less.
    #[inline]
    pub(crate) fn give_back(&self, resource: Resource, high: bool) {
        self.gauge(resource, high).dec();
    }

    /// How much is under way.
    #[inline]
    pub(crate) fn in_use(&self, resource: Resource, high: bool) -> u64 {
        self.gauge(resource, high).value()
    }
}

/// A connection of a TCP proxy, at the circuit breaker of the default priority and at its host for as long as this lives.
pub(crate) struct Tunnelled {
    cluster: Rc<WorkerCluster>,
    host: Rc<WorkerHost>,
}

impl Tunnelled {
    /// Waits while the host has as many connections as it may, and this worker's TCP proxies have some of them. `None`: no more may wait.
    pub(crate) async fn to(cluster: &Rc<WorkerCluster>, host: &Rc<WorkerHost>) -> Option<Tunnelled> {
        let (stats, mut waits) = (&cluster.cluster.stats, None);
        while host.is_full(&cluster.cluster, false) && host.pool.tunnels.get() > 0 {
            if waits.is_none() {
                stats.upstream_cx_overflow.inc();
                waits = Some(Pending::new(cluster, false)?);
            }
            host.pool.tunnel_ended.notified().await;
        }
        stats.upstream_cx_active.inc();
        cluster.cluster.breakers.take(Resource::Connections, false);
        host.count(HostCounter::CxActive, 1);
        host.pool.tunnels.set(host.pool.tunnels.get() + 1);
        Some(Tunnelled { cluster: Rc::clone(cluster), host: Rc::clone(host) })
    }
}

impl Drop for Tunnelled {
    fn drop(&mut self) {
        let Tunnelled { cluster, host } = self;
        cluster.cluster.stats.upstream_cx_active.dec();
        cluster.cluster.breakers.give_back(Resource::Connections, false);
        host.count(HostCounter::CxActive, -1);
        host.pool.tunnels.set(host.pool.tunnels.get() - 1);
        host.pool.tunnel_ended.notify_one();
    }
}

/// A request, or a connection, that waits for a connection to a host, at the circuit breaker for as long as this lives.
pub(super) struct Pending<'a> {
    cluster: &'a WorkerCluster,
    high: bool,
}

impl Pending<'_> {
    /// `None`: as many wait as may, which is counted.
    pub(super) fn new(cluster: &WorkerCluster, high: bool) -> Option<Pending<'_>> {
        if cluster.cluster.is_full(Resource::Pending, high) {
            cluster.cluster.stats.upstream_rq_pending_overflow.inc();
            return None;
        }
        cluster.cluster.breakers.take(Resource::Pending, high);
        Some(Pending { cluster, high })
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.cluster.cluster.breakers.give_back(Resource::Pending, self.high);
    }
}

impl WorkerHost {
    /// Whether the host may have no more connections of that priority: those of all workers count, and of all priorities, as by Envoy.
    pub(super) fn is_full(&self, cluster: &Cluster, high: bool) -> bool {
        let most = cluster.config.circuit_breakers[usize::from(high)].max_connections_per_host;
        most.is_some_and(|most| self.host.counters.sum(HostCounter::CxActive) >= u64::from(most))
    }
}

impl Cluster {
    /// Whether there may be no more of it in that priority.
    #[inline]
    pub(crate) fn is_full(&self, resource: Resource, high: bool) -> bool {
        self.left(resource, high) == 0
    }

    /// How much more of it there may be in that priority.
    #[inline]
    fn left(&self, resource: Resource, high: bool) -> u64 {
        let limits = self.limits(high);
        let most = match resource {
            Resource::Connections => limits.max_connections(),
            Resource::Pending => limits.max_pending_requests(),
            Resource::Requests => return u64::from(limits.max_requests()).saturating_sub(self.served(high)),
            Resource::Pools => limits.max_connection_pools(),
        };
        u64::from(most).saturating_sub(self.breakers.in_use(resource, high))
    }

    /// Requests that have a connection. As by Envoy, those that wait for one are none of the requests yet.
    fn served(&self, high: bool) -> u64 {
        self.breakers.in_use(Resource::Requests, high).saturating_sub(self.breakers.in_use(Resource::Pending, high))
    }

    /// Whether there are more requests with a connection than there may be, the one that asks among them.
    #[inline]
    pub(super) fn has_too_many_requests(&self, high: bool) -> bool {
        let most = u64::from(self.limits(high).max_requests());
        // Mostly there are fewer, with those that wait.
        self.breakers.in_use(Resource::Requests, high) > most && self.served(high) > most
    }

    /// One more request is under way; [`end_request`](Self::end_request) must follow.
    pub(crate) fn begin_request(&self, high: bool) {
        self.stats.upstream_rq_active.inc();
        self.breakers.take(Resource::Requests, high);
    }

    /// A request that began is over.
    pub(crate) fn end_request(&self, high: bool) {
        self.stats.upstream_rq_active.dec();
        self.breakers.give_back(Resource::Requests, high);
    }
}

/// Whether each circuit breaker of each cluster is open: nothing more fits.
pub fn breaker_gauges(clusters: &ClusterMap) -> Vec<Metric> {
    let mut gauges = Vec::new();
    for cluster in clusters.values() {
        let scope = cluster.stats.scope();
        for (priority, high) in [("default", false), ("high", true)] {
            let mut add = |name: &str, open: bool| {
                gauges.push(Metric::gauge_in(scope, &format!("circuit_breakers.{priority}.{name}"), u64::from(open)));
            };
            add("cx_open", cluster.is_full(Resource::Connections, high));
            add("cx_pool_open", cluster.is_full(Resource::Pools, high));
            add("rq_pending_open", cluster.is_full(Resource::Pending, high));
            add("rq_open", cluster.is_full(Resource::Requests, high));
            add("rq_retry_open", cluster.retries_are_exhausted(high));
            if !cluster.config.circuit_breakers[usize::from(high)].tracks_remaining {
                continue;
            }
            let mut add = |name: &str, left: u64| {
                gauges.push(Metric::gauge_in(scope, &format!("circuit_breakers.{priority}.{name}"), left));
            };
            add("remaining_cx", cluster.left(Resource::Connections, high));
            let pools = cluster.left(Resource::Pools, high);
            let any = cluster.limits(high).max_connection_pools() == Thresholds::ANY_POOLS;
            add("remaining_cx_pools", if any { u64::MAX } else { pools });
            add("remaining_pending", cluster.left(Resource::Pending, high));
            add("remaining_rq", cluster.left(Resource::Requests, high));
            add("remaining_retries", cluster.retries_left(high).into());
        }
    }
    gauges
}
