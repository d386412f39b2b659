//! `track_cluster_stats.per_endpoint_stats`: statistics of each host, which are looked up and not counted.

use super::{ClusterMap, HostCounter, Standing};
use crate::stats::Metric;

/// What each host counts, of the clusters that tell: `cluster.<name>.endpoint.<address>.*`.
pub fn endpoint_metrics(clusters: &ClusterMap) -> Vec<Metric> {
    let mut metrics = Vec::new();
    for cluster in clusters.values().filter(|cluster| cluster.config.tracked.per_endpoint) {
        let named = cluster.named.all();
        for host in cluster.hosts().hosts.iter().chain(&named) {
            let scope = cluster.stats.scope().clone().endpoint(host.display(), host.hostname());
            for (counter, name) in HostCounter::ALL {
                let value = host.counters.sum(counter);
                metrics.push(match counter {
                    HostCounter::CxActive | HostCounter::RqActive => Metric::gauge_in(&scope, name, value),
                    _ => Metric::counter_in(&scope, name, value),
                });
            }
            let healthy = host.standing() == Standing::Healthy;
            metrics.push(Metric::gauge_in(&scope, "healthy", u64::from(healthy)));
        }
    }
    metrics
}
