use std::time::{Duration, SystemTime};

use crate::stats::{Counter, Gauge, Histogram, Lease, Scope};

/// Counters of the cluster and the listener manager, by Envoy's names.
pub(super) struct StoreStats {
    pub(super) clusters: KindStats,
    pub(super) listeners: KindStats,
    pub(super) only_clusters: ClusterCounts,
    pub(super) only_listeners: ListenerCounts,
}

impl StoreStats {
    pub(super) fn new() -> StoreStats {
        let (clusters, listeners) = (Scope::new("cluster_manager"), Scope::new("listener_manager"));
        // Updates are never merged, and workers are not pinned to processors.
        for never in ["cluster_updated_via_merge", "update_merge_cancelled", "update_out_of_merge_window"] {
            clusters.counter(never);
        }
        clusters.counter("cluster_updated");
        listeners.counter("listener_stopped");
        listeners.gauge("workers_pinned").set(0);
        let cds = clusters.child("cds");
        StoreStats {
            only_clusters: ClusterCounts {
                config_reload: cds.counter("config_reload"),
                config_reload_time_ms: cds.gauge("config_reload_time_ms"),
            },
            only_listeners: ListenerCounts {
                in_place_updated: listeners.counter("listener_in_place_updated"),
                draining: listeners.gauge("total_listeners_draining"),
                draining_chains: listeners.gauge("total_filter_chains_draining"),
            },
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
    pub(super) added: Counter,
    pub(super) modified: Counter,
    pub(super) removed: Counter,
    pub(super) active: Gauge,
    pub(super) warming: Gauge,
    /// `listener_create_success` and `listener_create_failure`.
    pub(super) succeeded: Counter,
    pub(super) failed: Counter,
    update_success: Counter,
    update_rejected: Counter,
    pub(super) init_fetch_timeout: Counter,
    update_duration: Histogram,
}

/// What is counted for clusters alone.
pub(super) struct ClusterCounts {
    config_reload: Counter,
    config_reload_time_ms: Gauge,
}

impl ClusterCounts {
    /// Clusters have been added, changed or removed.
    pub(super) fn reloaded(&self) {
        self.config_reload.inc();
        self.config_reload_time_ms.set(now_ms());
    }
}

/// What is counted for listeners alone.
pub(super) struct ListenerCounts {
    pub(super) in_place_updated: Counter,
    pub(super) draining: Gauge,
    pub(super) draining_chains: Gauge,
}

/// Milliseconds since 1970.
pub(super) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

impl KindStats {
    fn new(manager: &str, noun: &str, [active, warming]: [&str; 2], discovery: &str) -> KindStats {
        let scope = Scope::new(manager);
        let api = Scope::new(manager).child(discovery);
        let listeners = Scope::new("listener_manager");
        KindStats {
            added: scope.counter(&format!("{noun}_added")),
            modified: scope.counter(&format!("{noun}_modified")),
            removed: scope.counter(&format!("{noun}_removed")),
            active: scope.gauge(active),
            warming: scope.gauge(warming),
            succeeded: listeners.counter("listener_create_success"),
            failed: listeners.counter("listener_create_failure"),
            update_success: api.counter("update_success"),
            update_rejected: api.counter("update_rejected"),
            init_fetch_timeout: api.counter("init_fetch_timeout"),
            update_duration: api.histogram("update_duration"),
        }
    }

    /// An update was taken in so long.
    pub(super) fn took(&self, time: Duration) {
        self.update_duration.record(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    }

    /// Counts one update, as a whole accepted or not.
    pub(super) fn answered(&self, accepted: bool) {
        if accepted { self.update_success.inc() } else { self.update_rejected.inc() }
    }
}

/// What is counted for a connection manager whose scopes come by SRDS.
pub(super) struct ScopedCounts(Scope);

impl ScopedCounts {
    pub(super) fn new(stat_prefix: &str, name: &str) -> ScopedCounts {
        ScopedCounts(Scope::http(stat_prefix).child("scoped_rds").tagged("envoy_scoped_rds_config", name))
    }

    /// An update came; `changed`: something of it is in force now.
    pub(super) fn updated(&self, changed: bool) {
        let reloads = self.0.counter("config_reload");
        if changed {
            reloads.inc();
            self.0.gauge("config_reload_time_ms").set(now_ms());
        }
    }

    /// How many scopes there are; of how many the route configuration is asked for; of how many it is had on demand.
    pub(super) fn scopes(&self, all: usize, active: usize, on_demand: usize) {
        self.0.gauge("all_scopes").set(all as u64);
        self.0.gauge("active_scopes").set(active as u64);
        self.0.gauge("on_demand_scopes").set(on_demand as u64);
    }
}

/// Counts `sds.<name>.key_rotation_failed`: files that were replaced and cannot be used.
pub(super) fn rotation_failed(name: &str) {
    secret_scope(name).counter("key_rotation_failed").inc();
}

/// Shows `key_rotation_failed` of a secret of SDS from when it is asked for, as Envoy does, for as long as the lease is held.
/// The rest is counted with the subscription.
pub(super) fn secret_wanted(name: &str) -> Lease {
    let scope = secret_scope(name);
    let lease = scope.lease();
    scope.counter("key_rotation_failed");
    lease
}

fn secret_scope(name: &str) -> Scope {
    Scope::new("sds").child(name)
}

/// `http.<prefix>.rds.vhds.<route configuration>.`
pub(super) struct VhdsCounts(Scope);

impl VhdsCounts {
    pub(super) fn new(prefix: &str, routes: &str) -> VhdsCounts {
        VhdsCounts(Scope::http(prefix).child("rds").child("vhds").child(routes))
    }

    /// A name was asked for, or everything was for the first time.
    pub(super) fn asked(&self) {
        self.0.counter("update_attempt").inc();
    }

    /// Counts an update.
    pub(super) fn answered(&self, accepted: bool) {
        // Envoy counts each answer as an attempt as well.
        self.asked();
        let (success, rejected) = (self.0.counter("update_success"), self.0.counter("update_rejected"));
        let reload = self.0.counter("config_reload");
        if accepted {
            success.inc();
            reload.inc();
        } else {
            rejected.inc();
        }
    }
}
