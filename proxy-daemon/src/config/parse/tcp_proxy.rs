use std::{sync::Arc, time::Duration};

use envoy_types::pb::envoy::{
    config::core::v3::BackoffStrategy,
    extensions::filters::network::tcp_proxy::v3::{
        TcpProxy,
        tcp_proxy::{ClusterSpecifier, TunnelingConfig},
    },
    r#type::v3::{HashPolicy as ProtoPolicy, hash_policy::PolicySpecifier},
};
use http::uri::PathAndQuery;

use super::{
    access_log::access_logs,
    common::{Result, duration, header_value, headers_to_add, limit, number, required},
    route_action::{asked_of_hosts, weighted},
    support::join,
};
use crate::{
    access_log::HeaderFormat,
    config::{
        FieldError,
        model::{
            AddedValue, ClusterChoice, HashPolicy, HashSource, MetadataMatch, TcpProxyConfig, Tunneling,
            WeightedOptions,
        },
    },
};

pub(super) fn tcp_proxy(proxy: &TcpProxy, path: &str) -> Result<TcpProxyConfig> {
    let asked = MetadataMatch::with(None, asked_of_hosts(proxy.metadata_match.as_ref()));
    let cluster = match &proxy.cluster_specifier {
        Some(ClusterSpecifier::Cluster(name)) => ClusterChoice::Cluster(Arc::from(name.as_str())),
        Some(ClusterSpecifier::WeightedClusters(clusters)) => {
            let weights = clusters.clusters.iter().map(|cluster| (cluster.name.as_str(), cluster.weight));
            let path = join(path, "weighted_clusters");
            if let Some(index) = clusters.clusters.iter().position(|cluster| cluster.name.is_empty()) {
                return Err(required(&format!("{}[{index}]", join(&path, "clusters")), "name"));
            }
            let mut weighted = weighted(weights, &path)?;
            let options = clusters.clusters.iter().map(|cluster| {
                let own = asked_of_hosts(cluster.metadata_match.as_ref());
                let metadata_match = MetadataMatch::with(asked.as_ref(), own);
                WeightedOptions { metadata_match, ..WeightedOptions::default() }
            });
            weighted.options = options.collect();
            ClusterChoice::Weighted(weighted)
        }
        None => return Err(required(path, "cluster")),
    };
    Ok(TcpProxyConfig {
        stat_prefix: proxy.stat_prefix.clone(),
        cluster,
        metadata_match: asked,
        idle_timeout: limit(proxy.idle_timeout, Some(Duration::from_secs(3600)), path, "idle_timeout")?,
        max_connect_attempts: number(proxy.max_connect_attempts, 1).max(1),
        max_downstream_connection_duration: duration(
            proxy.max_downstream_connection_duration,
            path,
            "max_downstream_connection_duration",
        )?,
        duration_jitter: (proxy.max_downstream_connection_duration_jitter_percentage)
            .map_or(0.0, |jitter| jitter.value / 100.0),
        hash_policy: proxy.hash_policy.iter().map(|policy| hash_policy(policy, path)).collect::<Result<_>>()?,
        backoff: proxy
            .backoff_options
            .map(|backoff| self::backoff(&backoff, &join(path, "backoff_options")))
            .transpose()?,
        access_logs: access_logs(&proxy.access_log, &join(path, "access_log"))?,
        tunneling: match &proxy.tunneling_config {
            Some(config) => Some(tunneling(config, &join(path, "tunneling_config"))?),
            None => None,
        },
    })
}

fn hash_policy(policy: &ProtoPolicy, path: &str) -> Result<HashPolicy> {
    match &policy.policy_specifier {
        Some(PolicySpecifier::SourceIp(_)) => Ok(HashPolicy { source: HashSource::SourceIp, terminal: false }),
        // The state of connections is refused by the table of honoured fields.
        Some(PolicySpecifier::FilterState(_)) | None => {
            Err(required(&format!("{}[0]", join(path, "hash_policy")), "policy_specifier"))
        }
    }
}

/// Between two attempts to connect a client that has left, and has not said so, costs a connection.
const LONGEST_PAUSE: Duration = Duration::from_secs(3600);

fn backoff(backoff: &BackoffStrategy, path: &str) -> Result<(Duration, Duration)> {
    let base = duration(backoff.base_interval, path, "base_interval")?;
    let base = base.ok_or_else(|| required(path, "base_interval"))?;
    let usual = base.saturating_mul(10).min(LONGEST_PAUSE.max(base));
    let max = duration(backoff.max_interval, path, "max_interval")?.unwrap_or(usual);
    for (interval, name) in [(base, "base_interval"), (max, "max_interval")] {
        if interval > LONGEST_PAUSE {
            return Err(FieldError::new(join(path, name), "no client is kept waiting for longer than an hour"));
        }
    }
    if max < base {
        let text = "max_interval must be greater than or equal to the base_interval";
        return Err(FieldError::new(join(path, "max_interval"), text));
    }
    Ok((base, max))
}

fn tunneling(config: &TunnelingConfig, path: &str) -> Result<Tunneling> {
    if config.hostname.is_empty() {
        return Err(required(path, "hostname"));
    }
    let hostname_path = join(path, "hostname");
    let hostname = HeaderFormat::parse(&config.hostname).map_err(|text| FieldError::new(&hostname_path, text))?;
    let post_path = match config.post_path.as_str() {
        "" if config.use_post => Some(PathAndQuery::from_static("/")),
        "" => None,
        _ if !config.use_post => {
            // Envoy's words.
            return Err(FieldError::new(join(path, "post_path"), "Can't set a post path when POST method isn't used"));
        }
        text => {
            let is_path = |path: &PathAndQuery| path.as_str().starts_with('/');
            let post_path = PathAndQuery::try_from(text).ok().filter(is_path);
            Some(post_path.ok_or_else(|| FieldError::new(join(path, "post_path"), format!("{text:?} is no path")))?)
        }
    };
    Ok(Tunneling {
        hostname: match hostname {
            Ok(format) => AddedValue::Format(Arc::new(format)),
            Err(literal) => AddedValue::Literal(header_value(&literal, &hostname_path)?),
        },
        post_path,
        headers: headers_to_add(&config.headers_to_add, path, "headers_to_add")?,
    })
}
