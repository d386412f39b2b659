//! How long connections to hosts are kept, and what they may bring.

use envoy_types::pb::envoy::config::{cluster::v3::Cluster, core::v3::HttpProtocolOptions};

use super::common::{Result, limit};
use crate::config::model::{HeadLimits, PoolOptions};

/// Of a cluster, and of its `common_http_protocol_options`, which are at `path`.
pub(super) fn pool(cluster: &Cluster, common: &HttpProtocolOptions, path: &str) -> Result<PoolOptions> {
    let preconnect = cluster.preconnect_policy.as_ref();
    let predictive = preconnect.and_then(|policy| policy.predictive_preconnect_ratio).map(|ratio| ratio.value);
    let ratio = preconnect.and_then(|policy| policy.per_upstream_preconnect_ratio).map(|ratio| ratio.value);
    let lb = cluster.common_lb_config.as_ref();
    Ok(PoolOptions {
        max_connection_duration: limit(common.max_connection_duration, None, path, "max_connection_duration")?,
        duration_jitter: common.max_connection_duration_jitter.map_or(0.0, |jitter| jitter.value / 100.0),
        closes_failed: cluster.close_connections_on_host_health_failure,
        drains_on_change: lb.is_some_and(|config| config.close_connections_on_host_set_change),
        preconnect: ratio.filter(|ratio| *ratio > 1.0),
        predictive: predictive.filter(|ratio| *ratio > 1.0),
        per_client: cluster.connection_pool_per_downstream_connection,
        heads: HeadLimits {
            kilobytes: common.max_response_headers_kb.map(|limit| limit.value),
            count: common.max_headers_count.map(|limit| limit.value),
        },
    })
}
