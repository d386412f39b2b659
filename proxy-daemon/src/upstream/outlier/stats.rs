//! `cluster.<name>.outlier_detection.*`, as Envoy names them.

use std::sync::Arc;

use crate::{
    config::model::Ejection,
    stats::{Counter, Gauge, Lease, Scope},
};

#[derive(Debug, Clone)]
pub(super) struct OutlierStats {
    pub(super) ejections_active: Gauge,
    pub(super) ejections_enforced_total: Counter,
    pub(super) ejections_overflow: Counter,
    /// Deprecated in Envoy, and still counted.
    pub(super) ejections_total: Counter,
    pub(super) ejections_consecutive_5xx: Counter,
    pub(super) ejections_success_rate: Counter,
    /// Hosts that have called themselves degraded.
    pub(super) ejections_detected_degradation: Counter,
    detected: [Counter; 7],
    enforced: [Counter; 7],
    _lease: Arc<Lease>,
}

/// In the order of [`Ejection`].
const NAMES: [&str; 7] = [
    "consecutive_5xx",
    "consecutive_gateway_failure",
    "consecutive_local_origin_failure",
    "success_rate",
    "local_origin_success_rate",
    "failure_percentage",
    "local_origin_failure_percentage",
];

impl OutlierStats {
    /// Those of a cluster, whose scope `cluster` is.
    pub(super) fn new(cluster: Scope) -> OutlierStats {
        let scope = cluster.child("outlier_detection");
        let lease = Arc::new(scope.lease());
        OutlierStats {
            ejections_active: scope.gauge("ejections_active"),
            ejections_enforced_total: scope.counter("ejections_enforced_total"),
            ejections_overflow: scope.counter("ejections_overflow"),
            ejections_total: scope.counter("ejections_total"),
            ejections_consecutive_5xx: scope.counter("ejections_consecutive_5xx"),
            ejections_success_rate: scope.counter("ejections_success_rate"),
            ejections_detected_degradation: scope.counter("ejections_detected_degradation"),
            detected: NAMES.map(|name| scope.counter(&format!("ejections_detected_{name}"))),
            enforced: NAMES.map(|name| scope.counter(&format!("ejections_enforced_{name}"))),
            _lease: lease,
        }
    }

    pub(super) fn detected(&self, kind: Ejection) -> Counter {
        self.detected[kind as usize]
    }

    pub(super) fn enforced(&self, kind: Ejection) -> Counter {
        self.enforced[kind as usize]
    }
}
