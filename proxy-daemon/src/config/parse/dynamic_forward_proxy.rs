//! Clusters and caches of the dynamic forward proxy.

use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::SocketAddress,
        extensions::{
            clusters::dynamic_forward_proxy::v3::{
                ClusterConfig as ForwardProxyCluster, cluster_config::ClusterImplementationSpecifier,
            },
            common::dynamic_forward_proxy::v3::DnsCacheConfig,
            upstreams::http::v3::HttpProtocolOptions,
        },
    },
    google::protobuf::Any,
};

use super::{
    common::{Result, duration, number},
    dns,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{Discovery, DnsCacheOptions, SocketMatches, UpstreamTlsContext},
    },
    upstream::DnsCache,
};

/// A `cluster_type` of this kind.
pub(super) fn of_extension(config: &Any, path: &str) -> Result<Discovery> {
    let config: ForwardProxyCluster = unpack(config, path)?;
    let path_of_cache = join(path, "dns_cache_config");
    let cache = match &config.cluster_implementation_specifier {
        Some(ClusterImplementationSpecifier::DnsCacheConfig(cache)) => dns_cache(cache, &path_of_cache)?,
        Some(ClusterImplementationSpecifier::SubClustersConfig(_)) => {
            return Err(FieldError::unsupported(join(path, "sub_clusters_config")));
        }
        // Envoy takes that, and the cluster has no hosts.
        None => return Err(FieldError::new(path_of_cache, "value is required")),
    };
    Ok(Discovery::DynamicForwardProxy { cache, insecure: config.allow_insecure_cluster_options })
}

/// What holds for the transport sockets of such a cluster: hosts are asked for by the names that requests call them. That they must have
/// certificates for them is said by [`peer_name::options`](super::peer_name::options).
pub(super) fn tls(
    discovery: &Discovery,
    http: Option<&HttpProtocolOptions>,
    tls: &mut Option<Arc<UpstreamTlsContext>>,
    matches: &mut SocketMatches,
    path: &str,
) -> Result<()> {
    let options = http.and_then(|http| http.upstream_http_protocol_options.as_ref());
    let Discovery::DynamicForwardProxy { insecure, .. } = discovery else { return Ok(()) };
    let (sni, names) = match (http, options) {
        (None, _) => (true, true),
        (Some(_), options) => options.map_or((false, false), |options| (options.auto_sni, options.auto_san_validation)),
    };
    let secure = sni && names;
    if !secure && !insecure {
        let text = "dynamic_forward_proxy cluster must have auto_sni and auto_san_validation true unless \
                    allow_insecure_cluster_options is set.";
        return Err(FieldError::new(join(path, "upstream_http_protocol_options"), text));
    }
    // They have just been made: nobody else has them.
    let matches = Arc::get_mut(&mut matches.0).into_iter().flatten().filter_map(|it| it.tls.as_mut());
    for tls in tls.iter_mut().chain(matches).filter_map(Arc::get_mut) {
        tls.auto_host_sni |= sni;
    }
    Ok(())
}

/// The cache of a `DnsCacheConfig`.
pub(crate) fn dns_cache(config: &DnsCacheConfig, path: &str) -> Result<Arc<DnsCache>> {
    let max_hosts = number(config.max_hosts, 1024);
    if config.preresolve_hostnames.len() > max_hosts as usize {
        let text = format!(
            "DNS Cache [{}] configured with preresolve_hostnames={} larger than max_hosts={max_hosts}",
            config.name,
            config.preresolve_hostnames.len()
        );
        return Err(FieldError::new(join(path, "preresolve_hostnames"), text));
    }
    let seconds = Duration::from_secs;
    let query_timeout = duration(config.dns_query_timeout, path, "dns_query_timeout")?.unwrap_or(seconds(5));
    let breaker = config.dns_cache_circuit_breaker.as_ref();
    let options = DnsCacheOptions {
        name: config.name.as_str().into(),
        dns: dns::of_cache(config, path)?,
        min_refresh: duration(config.dns_min_refresh_rate, path, "dns_min_refresh_rate")?.unwrap_or(seconds(5)),
        host_ttl: duration(config.host_ttl, path, "host_ttl")?.unwrap_or(seconds(300)),
        max_hosts,
        query_timeout: Some(query_timeout).filter(|limit| !limit.is_zero()),
        max_pending: number(breaker.and_then(|breaker| breaker.max_pending_requests), 1024),
        preresolved: config.preresolve_hostnames.iter().map(preresolved).collect(),
    };
    DnsCache::of(options).map_err(|text| FieldError::new(path, text))
}

fn preresolved(address: &SocketAddress) -> Box<str> {
    use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
    let port = match &address.port_specifier {
        Some(PortSpecifier::PortValue(port)) => *port,
        _ => 0,
    };
    match address.address.contains(':') {
        true => format!("[{}]:{port}", address.address).into(),
        false => format!("{}:{port}", address.address).into(),
    }
}
