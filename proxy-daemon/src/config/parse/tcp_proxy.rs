use std::{sync::Arc, time::Duration};

use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::{TcpProxy, tcp_proxy::ClusterSpecifier};

use super::{
    access_log::access_logs,
    common::{Result, duration, limit, number, required},
    route::weighted,
    support::join,
};
use crate::config::model::{ClusterChoice, TcpProxyConfig};

pub(super) fn tcp_proxy(proxy: &TcpProxy, path: &str) -> Result<TcpProxyConfig> {
    let cluster = match &proxy.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => ClusterChoice::Cluster(Arc::from(name.as_str())),
        Some(ClusterSpecifier::WeightedClusters(clusters)) => {
            let weights = clusters.clusters.iter().map(|cluster| (cluster.name.as_str(), cluster.weight));
            ClusterChoice::Weighted(weighted(weights, &join(path, "weighted_clusters"))?)
        }
        None => return Err(required(path, "cluster")),
    };
    Ok(TcpProxyConfig {
        stat_prefix: proxy.stat_prefix.clone(),
        cluster,
        idle_timeout: limit(proxy.idle_timeout, Some(Duration::from_secs(3600)), path, "idle_timeout")?,
        max_connect_attempts: number(proxy.max_connect_attempts, 1).max(1),
        max_downstream_connection_duration: duration(
            proxy.max_downstream_connection_duration,
            path,
            "max_downstream_connection_duration",
        )?,
        access_logs: access_logs(&proxy.access_log, &join(path, "access_log"))?,
    })
}
