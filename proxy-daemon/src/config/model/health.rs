use std::sync::Arc;

use super::{HealthCheckConfig, OverrideStatuses};
use crate::layered_runtime::RuntimeInteger;

/// How the hosts of a cluster are found to be well or not, besides what discovery says of them.
#[derive(Debug, Clone, Default)]
pub struct HealthOptions {
    /// By how requests fare: `Cluster.outlier_detection`.
    pub outlier_detection: Option<Arc<OutlierDetection>>,
    /// By asking them: `Cluster.health_checks`. All have to pass.
    pub checks: Vec<Arc<HealthCheckConfig>>,
    /// A host that discovery does not have any more goes, also where it passes its checks: `ignore_health_on_host_removal`.
    pub ignore_on_removal: bool,
    /// A host is not counted before its first check: `common_lb_config.ignore_new_hosts_until_first_hc`.
    pub excludes_unchecked: bool,
    /// How a host may stand that requests name by themselves.
    pub override_statuses: OverrideStatuses,
}

/// What may have a host ejected: `envoy.data.cluster.v3.OutlierEjectionType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Ejection {
    /// 5xx in a row.
    Consecutive5xx,
    /// 502, 503 and 504 in a row.
    ConsecutiveGatewayFailure,
    /// Connections in a row that failed, or on which nothing came in time.
    ConsecutiveLocalOriginFailure,
    /// The share of requests that succeed is far from that of the other hosts.
    SuccessRate,
    /// Likewise, of connections.
    SuccessRateLocalOrigin,
    /// More than so many percent of requests fail.
    FailurePercentage,
    /// Likewise, of connections.
    FailurePercentageLocalOrigin,
}

impl Ejection {
    /// All of them, each at the place that its number says.
    pub const ALL: [Ejection; 7] = [
        Ejection::Consecutive5xx,
        Ejection::ConsecutiveGatewayFailure,
        Ejection::ConsecutiveLocalOriginFailure,
        Ejection::SuccessRate,
        Ejection::SuccessRateLocalOrigin,
        Ejection::FailurePercentage,
        Ejection::FailurePercentageLocalOrigin,
    ];

    /// How many of them come in a row; these are the first.
    pub const CONSECUTIVE: usize = 3;
}

/// A checked `envoy.config.cluster.v3.OutlierDetection`. Each number may be replaced by the runtime value
/// `outlier_detection.<field>`, that of a time by `outlier_detection.<field>_ms`.
#[derive(Debug, Clone, PartialEq)]
pub struct OutlierDetection {
    /// Milliseconds between two looks at all hosts. Default 10 s.
    pub interval: RuntimeInteger,
    /// Milliseconds for which a host is ejected the first time. Default 30 s.
    pub base_ejection_time: RuntimeInteger,
    /// Milliseconds for which it is ejected at most, however often it was. Default 300 s.
    pub max_ejection_time: RuntimeInteger,
    /// Up to so many milliseconds are added. Default 0.
    pub max_ejection_time_jitter: RuntimeInteger,
    /// So many percent of the hosts may be ejected at a time. Default 10.
    pub max_ejection_percent: RuntimeInteger,
    /// One host may be ejected whatever the percentage is.
    pub always_eject_one_host: bool,
    /// What connections come to is counted apart from what comes through them.
    pub split_external_local_origin_errors: bool,
    /// So many in a row, by [`Ejection`]. Default 5 each.
    pub consecutive: [RuntimeInteger; Ejection::CONSECUTIVE],
    /// What is detected has an effect so many times in a hundred, by [`Ejection`].
    pub enforcing: [RuntimeInteger; 7],
    /// So many hosts must have had enough requests. Default 5.
    pub success_rate_minimum_hosts: RuntimeInteger,
    /// So many requests in an interval are enough. Default 100.
    pub success_rate_request_volume: RuntimeInteger,
    /// So many thousandths of the standard deviation are far. Default 1900.
    pub success_rate_stdev_factor: RuntimeInteger,
    /// So many percent of requests that fail are too many. Default 85.
    pub failure_percentage_threshold: RuntimeInteger,
    /// So many hosts must have had enough requests. Default 5.
    pub failure_percentage_minimum_hosts: RuntimeInteger,
    /// So many requests in an interval are enough. Default 50.
    pub failure_percentage_request_volume: RuntimeInteger,
    /// An ejected host that passes an active health check comes back at once. Default true.
    pub successful_active_health_check_uneject_host: bool,
    /// `detect_degraded_hosts`: a host that says `x-envoy-degraded` in its responses is used last for a while. Default false.
    pub detects_degraded: bool,
}
