use super::resources::Accepted;
use crate::stats::{Counter, Gauge, Scope};

/// Counters of the cluster and the listener manager, by Envoy's names.
pub(super) struct StoreStats {
    pub(super) clusters: KindStats,
    pub(super) listeners: KindStats,
}

impl StoreStats {
    pub(super) fn new() -> StoreStats {
        StoreStats {
            clusters: KindStats::new("cluster_manager", "cluster", ["active_clusters", "warming_clusters"], "cds"),
            listeners: KindStats::new(
                "listener_manager",
                "listener",
                ["total_listeners_active", "total_listeners_warming"],
                "lds",
            ),
        }
    }
}

pub(super) struct KindStats {
    added: Counter,
    modified: Counter,
    pub(super) removed: Counter,
    pub(super) active: Gauge,
    pub(super) warming: Gauge,
    update_success: Counter,
    update_rejected: Counter,
}

impl KindStats {
    fn new(manager: &str, noun: &str, [active, warming]: [&str; 2], discovery: &str) -> KindStats {
        let scope = Scope::new(manager);
        let api = Scope::new(manager).child(discovery);
        KindStats {
            added: scope.counter(&format!("{noun}_added")),
            modified: scope.counter(&format!("{noun}_modified")),
            removed: scope.counter(&format!("{noun}_removed")),
            active: scope.gauge(active),
            warming: scope.gauge(warming),
            update_success: api.counter("update_success"),
            update_rejected: api.counter("update_rejected"),
        }
    }

    /// Counts one update.
    pub(super) fn count(&self, outcome: &Accepted) {
        self.added.add(outcome.added);
        self.modified.add(outcome.modified);
        if outcome.errors.is_empty() { self.update_success.inc() } else { self.update_rejected.inc() }
    }
}

/// Counts `cluster.<name>.update_success` or `update_rejected`, of EDS.
pub(super) fn cluster_update(stat_name: &str, accepted: bool) {
    let scope = Scope::cluster(stat_name);
    scope.counter(if accepted { "update_success" } else { "update_rejected" }).inc();
}

/// Counts `http.<prefix>.rds.<name>.update_success` or `update_rejected`.
pub(super) fn route_update(stat_prefix: &str, name: &str, accepted: bool) {
    let scope = Scope::http(stat_prefix).child("rds").tagged("envoy_rds_route_config", name);
    scope.counter(if accepted { "update_success" } else { "update_rejected" }).inc();
}
