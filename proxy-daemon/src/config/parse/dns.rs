//! How the names of clusters are looked up.

use std::{net::SocketAddr, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::{
            bootstrap::v3::Bootstrap,
            cluster::v3::{Cluster, cluster::DnsLookupFamily as ProtoFamily},
            core::v3::{Address, DnsResolverOptions, TypedExtensionConfig, address, socket_address::Protocol},
        },
        extensions::{
            clusters::{common::dns::v3::DnsLookupFamily as CommonFamily, dns::v3::DnsCluster},
            common::dynamic_forward_proxy::v3::DnsCacheConfig,
            network::dns_resolver::{cares::v3::CaresDnsResolverConfig, getaddrinfo::v3::GetAddrInfoDnsResolverConfig},
        },
    },
    google::protobuf::{Any, Duration as ProtoDuration},
};
use prost::Name as _;

use super::{
    common::{Result, duration, ip, number, required, socket_address, type_name},
    support::join,
};
use crate::config::{
    FieldError,
    model::{Discovery, DnsLookupFamily, DnsOptions, DnsResolver, DnsServers},
};

/// Of a STRICT_DNS or LOGICAL_DNS cluster.
#[expect(deprecated, reason = "the fields that DnsCluster replaced, which Envoy still takes")]
pub(super) fn of_cluster(cluster: &Cluster, path: &str) -> Result<DnsOptions> {
    let default = DnsOptions::default();
    let refresh_rate = rate(cluster.dns_refresh_rate, path, "dns_refresh_rate")?.unwrap_or(default.refresh_rate);
    let failure = cluster.dns_failure_refresh_rate.as_ref();
    let failure = failure.map(|rate| (rate.base_interval, rate.max_interval));
    let typed = cluster.typed_dns_resolver_config.as_ref();
    let tcp = cluster.use_tcp_for_dns_lookups;
    let resolver = match (typed, &cluster.dns_resolution_config) {
        (Some(config), _) => Some(resolver(config, &join(path, "typed_dns_resolver_config"))?),
        (None, Some(config)) => {
            let path = join(path, "dns_resolution_config");
            Some(DnsResolver::Servers(servers(&config.resolvers, config.dns_resolver_options.as_ref(), &path)?))
        }
        (None, None) if cluster.dns_resolvers.is_empty() && !tcp => None,
        (None, None) => {
            let servers = addresses(&cluster.dns_resolvers, path, "dns_resolvers")?;
            Some(DnsResolver::Servers(DnsServers { servers, tcp, ..DnsServers::default() }))
        }
    };
    Ok(DnsOptions {
        refresh_rate,
        failure_refresh: failure_refresh(failure, &join(path, "dns_failure_refresh_rate"))?,
        respect_ttl: cluster.respect_dns_ttl,
        min_ttl: Duration::ZERO,
        jitter: duration(cluster.dns_jitter, path, "dns_jitter")?.unwrap_or_default(),
        family: family(cluster.dns_lookup_family),
        resolver,
        wait_for_warm: waits(cluster),
    })
}

/// Of a cache of names.
#[expect(deprecated, reason = "the fields that typed_dns_resolver_config replaced, which Envoy still takes")]
pub(super) fn of_cache(config: &DnsCacheConfig, path: &str) -> Result<DnsOptions> {
    let default = DnsOptions { refresh_rate: Duration::from_secs(60), ..DnsOptions::default() };
    let failure = config.dns_failure_refresh_rate.as_ref();
    let failure = failure.map(|rate| (rate.base_interval, rate.max_interval));
    let resolver = match (&config.typed_dns_resolver_config, &config.dns_resolution_config) {
        (Some(config), _) => Some(resolver(config, &join(path, "typed_dns_resolver_config"))?),
        (None, Some(config)) => {
            let path = join(path, "dns_resolution_config");
            Some(DnsResolver::Servers(servers(&config.resolvers, config.dns_resolver_options.as_ref(), &path)?))
        }
        (None, None) if config.use_tcp_for_dns_lookups => {
            Some(DnsResolver::Servers(DnsServers { tcp: true, ..DnsServers::default() }))
        }
        (None, None) => None,
    };
    Ok(DnsOptions {
        refresh_rate: rate(config.dns_refresh_rate, path, "dns_refresh_rate")?.unwrap_or(default.refresh_rate),
        failure_refresh: failure_refresh(failure, &join(path, "dns_failure_refresh_rate"))?,
        family: family(config.dns_lookup_family),
        resolver,
        ..default
    })
}

fn family(family: i32) -> DnsLookupFamily {
    match ProtoFamily::try_from(family) {
        Ok(ProtoFamily::V4Only) => DnsLookupFamily::V4Only,
        Ok(ProtoFamily::V6Only) => DnsLookupFamily::V6Only,
        Ok(ProtoFamily::V4Preferred) => DnsLookupFamily::V4Preferred,
        Ok(ProtoFamily::All) => DnsLookupFamily::All,
        Ok(ProtoFamily::Auto) | Err(_) => DnsLookupFamily::Auto,
    }
}

/// A `cluster_type` of `DnsCluster`.
pub(super) fn of_extension(cluster: &Cluster, config: &Any, path: &str) -> Result<Discovery> {
    let config: DnsCluster = unpack(config, path)?;
    let default = DnsOptions::default();
    let refresh_rate = rate(config.dns_refresh_rate, path, "dns_refresh_rate")?.unwrap_or(default.refresh_rate);
    let failure = config.dns_failure_refresh_rate.as_ref();
    let failure = failure.map(|rate| (rate.base_interval, rate.max_interval));
    let min_ttl = duration(config.dns_min_refresh_rate, path, "dns_min_refresh_rate")?;
    if min_ttl.is_some_and(|least| least < Duration::from_secs(1)) {
        return Err(FieldError::new(join(path, "dns_min_refresh_rate"), "value must be at least 1s"));
    }
    let typed = config.typed_dns_resolver_config.as_ref();
    let options = DnsOptions {
        refresh_rate,
        failure_refresh: failure_refresh(failure, &join(path, "dns_failure_refresh_rate"))?,
        respect_ttl: config.respect_dns_ttl,
        min_ttl: min_ttl.unwrap_or_default(),
        jitter: duration(config.dns_jitter, path, "dns_jitter")?.unwrap_or_default(),
        family: match CommonFamily::try_from(config.dns_lookup_family) {
            Ok(CommonFamily::V4Only) => DnsLookupFamily::V4Only,
            Ok(CommonFamily::V6Only) => DnsLookupFamily::V6Only,
            Ok(CommonFamily::V4Preferred) => DnsLookupFamily::V4Preferred,
            Ok(CommonFamily::All) => DnsLookupFamily::All,
            Ok(CommonFamily::Unspecified | CommonFamily::Auto) | Err(_) => DnsLookupFamily::Auto,
        },
        resolver: typed.map(|typed| resolver(typed, &join(path, "typed_dns_resolver_config"))).transpose()?,
        wait_for_warm: waits(cluster),
    };
    let one = config.all_addresses_in_single_endpoint;
    Ok(if one { Discovery::LogicalDns(options) } else { Discovery::StrictDns(options) })
}

/// What clusters that name no resolver use.
#[expect(deprecated, reason = "the fields that typed_dns_resolver_config replaced, which Envoy still takes")]
pub(super) fn of_bootstrap(bootstrap: &Bootstrap) -> Result<DnsResolver> {
    if let Some(config) = &bootstrap.typed_dns_resolver_config {
        return resolver(config, "typed_dns_resolver_config");
    }
    match &bootstrap.dns_resolution_config {
        Some(config) => {
            let options = config.dns_resolver_options.as_ref();
            Ok(DnsResolver::Servers(servers(&config.resolvers, options, "dns_resolution_config")?))
        }
        None => {
            let tcp = bootstrap.use_tcp_for_dns_lookups;
            Ok(DnsResolver::Servers(DnsServers { tcp, ..DnsServers::default() }))
        }
    }
}

fn waits(cluster: &Cluster) -> bool {
    cluster.wait_for_warm_on_init.is_none_or(|waits| waits.value)
}

/// A time between look-ups: at least a millisecond.
fn rate(value: Option<ProtoDuration>, path: &str, field: &str) -> Result<Option<Duration>> {
    let value = duration(value, path, field)?;
    match value {
        Some(rate) if rate < Duration::from_millis(1) => {
            Err(FieldError::new(join(path, field), "value must be at least 1ms"))
        }
        other => Ok(other),
    }
}

fn failure_refresh(
    rates: Option<(Option<ProtoDuration>, Option<ProtoDuration>)>,
    path: &str,
) -> Result<Option<(Duration, Duration)>> {
    let Some((base, max)) = rates else { return Ok(None) };
    let base = rate(base, path, "base_interval")?.ok_or_else(|| required(path, "base_interval"))?;
    let max = rate(max, path, "max_interval")?.unwrap_or(base.saturating_mul(10));
    if max < base {
        let text = "dns_failure_refresh_rate must have max_interval greater than or equal to the base_interval";
        return Err(FieldError::new(path, text));
    }
    Ok(Some((base, max)))
}

fn resolver(config: &TypedExtensionConfig, path: &str) -> Result<DnsResolver> {
    let config = config.typed_config.as_ref().ok_or_else(|| required(path, "typed_config"))?;
    let path = join(path, "typed_config");
    let wanted = type_name(config);
    if wanted == GetAddrInfoDnsResolverConfig::full_name() {
        return Ok(DnsResolver::GetAddrInfo);
    }
    if wanted != CaresDnsResolverConfig::full_name() {
        let text = format!("{wanted} is not supported; CaresDnsResolverConfig and GetAddrInfoDnsResolverConfig are");
        return Err(FieldError::new(path, text));
    }
    let config: CaresDnsResolverConfig = unpack(config, &path)?;
    let common = servers(&config.resolvers, config.dns_resolver_options.as_ref(), &path)?;
    let timeout = config.query_timeout_seconds.map_or(common.timeout, |seconds| Duration::from_secs(seconds.value));
    Ok(DnsResolver::Servers(DnsServers {
        as_fallback: config.use_resolvers_as_fallback,
        // Envoy takes a 0 here, and asks all the same.
        timeout: timeout.max(Duration::from_secs(1)),
        tries: number(config.query_tries, common.tries).max(1),
        rotate: config.rotate_nameservers,
        cache: Duration::from_secs(number(config.qcache_max_ttl, 0).into()),
        ..common
    }))
}

fn servers(resolvers: &[Address], options: Option<&DnsResolverOptions>, path: &str) -> Result<DnsServers> {
    Ok(DnsServers {
        servers: addresses(resolvers, path, "resolvers")?,
        tcp: options.is_some_and(|options| options.use_tcp_for_dns_lookups),
        no_search: options.is_some_and(|options| options.no_default_search_domain),
        ..DnsServers::default()
    })
}

fn addresses(resolvers: &[Address], path: &str, field: &str) -> Result<Vec<SocketAddr>> {
    let parse = |(index, address): (usize, &Address)| {
        let path = format!("{}[{index}]", join(path, field));
        // Servers are asked by UDP first, whatever the address says: both are taken, as in Envoy.
        let mut address = address.clone();
        if let Some(address::Address::SocketAddress(socket)) = &mut address.address {
            socket.set_protocol(Protocol::Tcp);
        }
        let (socket, port) = socket_address(&address, &path)?;
        Ok((ip(socket, &path)?, port).into())
    };
    resolvers.iter().enumerate().map(parse).collect()
}
