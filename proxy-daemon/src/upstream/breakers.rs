//! What circuit breakers look at: how much of each kind a cluster has under way, for each priority; and the statistics
//! `circuit_breakers.<priority>.*`, which are looked up and not counted.

use std::rc::Rc;

use super::{Cluster, ClusterMap, WorkerCluster};
use crate::stats::{HiddenGauge, Metric};

/// What there may be only so much of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Resource {
    /// Connections to all hosts.
    Connections,
    /// Requests that wait for a connection.
    Pending,
    /// Requests at a time.
    Requests,
}

/// What a cluster has under way. As in Envoy each priority is counted alone, and nothing that another cluster of the same statistics, or
/// the one that was replaced, has. Every worker counts in slots of its own.
#[derive(Debug, Default)]
pub(crate) struct Breakers([[HiddenGauge; 3]; 2]);

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

/// A connection of a TCP proxy, at the circuit breaker of the default priority for as long as this lives.
pub(crate) struct Tunnelled(Rc<WorkerCluster>);

impl Tunnelled {
    pub(crate) fn to(cluster: &Rc<WorkerCluster>) -> Tunnelled {
        cluster.cluster.stats.upstream_cx_active.inc();
        cluster.cluster.breakers.take(Resource::Connections, false);
        Tunnelled(Rc::clone(cluster))
    }
}

impl Drop for Tunnelled {
    fn drop(&mut self) {
        self.0.cluster.stats.upstream_cx_active.dec();
        self.0.cluster.breakers.give_back(Resource::Connections, false);
    }
}

impl Cluster {
    /// Whether there may be no more of it in that priority.
    #[inline]
    pub(crate) fn is_full(&self, resource: Resource, high: bool) -> bool {
        let limits = self.limits(high);
        let most = match resource {
            Resource::Connections => limits.max_connections(),
            Resource::Pending => limits.max_pending_requests(),
            Resource::Requests => limits.max_requests(),
        };
        self.breakers.in_use(resource, high) >= u64::from(most)
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
            // Pools are not limited.
            add("cx_pool_open", false);
            add("rq_pending_open", cluster.is_full(Resource::Pending, high));
            add("rq_open", cluster.is_full(Resource::Requests, high));
            add("rq_retry_open", cluster.retries_are_exhausted(high));
        }
    }
    gauges
}
