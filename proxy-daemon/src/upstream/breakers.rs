//! `circuit_breakers.<priority>.*` of clusters, which are looked up and not counted.

use super::ClusterMap;
use crate::stats::Metric;

/// Whether each circuit breaker of each cluster is open: nothing more fits.
pub fn breaker_gauges(clusters: &ClusterMap) -> Vec<Metric> {
    let mut gauges = Vec::new();
    for cluster in clusters.values() {
        let (stats, scope) = (&cluster.stats, cluster.stats.scope());
        let connections = stats.upstream_cx_active.value();
        let pending = stats.upstream_rq_pending_active.value();
        let requests = stats.upstream_rq_active.value();
        for (priority, high) in [("default", false), ("high", true)] {
            let limits = cluster.limits(high);
            let mut add = |name: &str, open: bool| {
                gauges.push(Metric::gauge_in(scope, &format!("circuit_breakers.{priority}.{name}"), u64::from(open)));
            };
            add("cx_open", connections >= limits.max_connections().into());
            // Pools are not limited.
            add("cx_pool_open", false);
            add("rq_pending_open", pending >= limits.max_pending_requests().into());
            add("rq_open", requests >= limits.max_requests().into());
            add("rq_retry_open", cluster.retries_are_exhausted(high));
        }
    }
    gauges
}
