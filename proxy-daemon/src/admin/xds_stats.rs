//! `control_plane.*`, `cluster_manager.cds.*` and `listener_manager.lds.*`: what the xDS clients count, by Envoy's names.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::stats::{Metric, version_number};
use culvert_xds_client::{
    ads::type_url,
    json,
    source::Source,
    stats::{ClientStats, SourceStats, TypeStats},
};

/// The types that one subscription is for, with the scope of its statistics. Those of other types are counted where they
/// are used: by cluster, by route configuration.
const SCOPES: [(&str, &str); 2] =
    [(type_url::CLUSTER, "cluster_manager.cds"), (type_url::LISTENER, "listener_manager.lds")];

/// The statistics of all clients now.
pub fn xds_stats(sources: &SourceStats) -> Vec<Metric> {
    let mut metrics = vec![
        Metric::external("server.dynamic_unknown_fields", json::DYNAMIC_FIELDS.count()),
        Metric::external("server.static_unknown_fields", json::STATIC_FIELDS.count()),
    ];
    for (source, _, client) in sources.clients() {
        if source == Source::Ads {
            control_plane(&client, &mut metrics);
        }
        for (type_url, stats) in client.types() {
            if let Some((_, scope)) = SCOPES.iter().find(|(known, _)| *known == type_url) {
                subscription(scope, &stats, &mut metrics);
            }
        }
    }
    metrics
}

fn control_plane(client: &ClientStats, metrics: &mut Vec<Metric>) {
    metrics.extend([
        Metric::external_gauge("control_plane.connected_state", client.connected().into()),
        Metric::external_gauge("control_plane.pending_requests", client.pending_requests.load(Relaxed)),
        Metric::external("control_plane.rate_limit_enforced", client.rate_limit_enforced.load(Relaxed)),
        Metric::external_text("control_plane.identifier", &client.identifier()),
    ]);
}

fn subscription(scope: &str, stats: &TypeStats, metrics: &mut Vec<Metric>) {
    let counter = |name: &str, value: &AtomicU64| Metric::external(&format!("{scope}.{name}"), value.load(Relaxed));
    let version = stats.version();
    metrics.extend([
        counter("update_attempt", &stats.update_attempt),
        counter("update_success", &stats.update_success),
        counter("update_failure", &stats.update_failure),
        counter("update_rejected", &stats.update_rejected),
        Metric::external_gauge(&format!("{scope}.update_time"), stats.update_time.load(Relaxed)),
        Metric::external_gauge(&format!("{scope}.version"), version_number(&version)),
        Metric::external_text(&format!("{scope}.version_text"), &version),
    ]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::{HistogramBuckets, write_text};

    #[test]
    fn envoys_names_and_numbers() {
        let client = ClientStats::default();
        let stats = client.of(type_url::CLUSTER);
        stats.update_attempt.store(3, Relaxed);
        let mut metrics = Vec::new();
        control_plane(&client, &mut metrics);
        subscription("cluster_manager.cds", &stats, &mut metrics);
        let mut text = String::new();
        write_text(&mut text, &metrics, HistogramBuckets::Summary).unwrap();
        assert_eq!(
            text,
            "control_plane.identifier: \"\"\ncluster_manager.cds.version_text: \"\"\ncontrol_plane.connected_state: 0\n\
             control_plane.pending_requests: 0\ncontrol_plane.rate_limit_enforced: 0\n\
             cluster_manager.cds.update_attempt: 3\ncluster_manager.cds.update_success: 0\n\
             cluster_manager.cds.update_failure: 0\ncluster_manager.cds.update_rejected: 0\n\
             cluster_manager.cds.update_time: 0\ncluster_manager.cds.version: 0\n"
        );
        // What Envoy 1.40 shows for the version "c1".
        assert_eq!(version_number("c1"), 814_672_407_442_807_801);
    }
}
