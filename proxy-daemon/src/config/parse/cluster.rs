use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::{
            CircuitBreakers, Cluster,
            circuit_breakers::Thresholds as CircuitBreakersThresholds,
            cluster::{ClusterDiscoveryType, ClusterProtocolSelection, CustomClusterType, DiscoveryType, LbConfig},
            upstream_connection_options::FirstAddressFamilyVersion,
        },
        core::v3::RoutingPriority,
    },
    extensions::{
        clusters::{
            aggregate::v3::ClusterConfig as AggregateCluster, dns::v3::DnsCluster,
            dynamic_forward_proxy::v3::ClusterConfig as ForwardProxyCluster,
        },
        upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, UseDownstreamHttpConfig,
                explicit_http_config::ProtocolConfig,
            },
        },
    },
};
use prost::Name as _;

use super::{
    bind::upstream_bind,
    common::{Result, duration, header_name, http2, limit, number, port, required, type_name},
    config_source::config_source,
    dns, dynamic_forward_proxy,
    endpoint::{health_status, written},
    health_check::health_checks_of,
    http1::http1_client,
    load_balancing::load_balancing,
    orca,
    outlier_detection::outlier_detection,
    peer_name,
    pool::pool,
    redis,
    support::{self, join},
    tls::{socket_matches, upstream_socket},
};
use crate::config::{
    FieldError,
    model::{
        Check, ClusterConfig, Discovery, HappyEyeballs, HealthOptions, LbPolicy, OverrideStatuses, ResourceRef,
        RetryBudget, TcpKeepalive, Thresholds, TrackedStats, UpstreamProtocol,
    },
};

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

/// A checked cluster.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn cluster(cluster: &Cluster, path: &str) -> Result<ClusterConfig> {
    support::check(cluster, path)?;
    let mut tls = upstream_socket(cluster.transport_socket.as_ref(), path)?;
    let mut socket_matches = socket_matches(cluster, path)?;
    let (lb_policy, lb) = load_balancing(cluster, path)?;
    let discovery = discovery(cluster, &lb_policy, path)?;
    let assignment_path = join(path, "load_assignment");
    let names = discovery.dns().is_some();
    let endpoints = match &cluster.load_assignment {
        Some(assignment) => written(assignment, names, &assignment_path)?,
        None => Vec::new(),
    };
    let health = health(cluster, path)?;
    if matches!(discovery, Discovery::LogicalDns(_)) && !matches!(&endpoints[..], [one] if one.endpoints.len() == 1) {
        let text = match &cluster.load_assignment {
            Some(_) => "LOGICAL_DNS clusters must have a single locality_lb_endpoint and a single lb_endpoint",
            None => "LOGICAL_DNS clusters must have a single host",
        };
        return Err(FieldError::new(assignment_path, text));
    }
    let bind = cluster.upstream_bind_config.as_ref();
    let bind = bind.map(|bind| upstream_bind(bind, &join(path, "upstream_bind_config"))).transpose()?;
    let reported_metrics = orca::reported(cluster, &discovery, path)?;
    let (http, http_path) = http_options(cluster, path)?;
    dynamic_forward_proxy::tls(&discovery, http.as_ref(), &mut tls, &mut socket_matches, &http_path)?;
    if breakers_of_hosts_that_requests_name(cluster, &discovery) {
        return Err(FieldError::unsupported(join(path, "circuit_breakers.per_host_thresholds")));
    }
    let peer_name = peer_name::options(&discovery, http.as_ref(), &http_path)?;
    let hour = Some(Duration::from_secs(3600));
    let common = http.as_ref().and_then(|options| options.common_http_protocol_options).unwrap_or_default();
    let common_path = join(&http_path, "common_http_protocol_options");
    // What it is does not matter: no update is held back.
    let window = cluster.common_lb_config.as_ref().and_then(|config| config.update_merge_window);
    duration(window, &join(path, "common_lb_config"), "update_merge_window")?;
    let max_stream_duration = duration(common.max_stream_duration, &common_path, "max_stream_duration")?;
    #[expect(deprecated, reason = "the field that HttpProtocolOptions replaced, which Envoy still takes")]
    let max_requests = common.max_requests_per_connection.or(cluster.max_requests_per_connection);
    let encrypted = tls.is_some() && socket_matches.0.iter().all(|it| it.tls.is_some());
    let protocol = protocol(http.as_ref(), encrypted, &http_path)?;
    let asks_grpc = health.checks.iter().position(|check| matches!(check.check, Check::Grpc(_)));
    if let Some(index) = asks_grpc
        && matches!(protocol, UpstreamProtocol::Http1)
    {
        let text = format!("{} cluster must support HTTP/2 for gRPC healthchecking", cluster.name);
        return Err(FieldError::new(join(path, &format!("health_checks[{index}].grpc_health_check")), text));
    }
    Ok(ClusterConfig {
        name: cluster.name.as_str().into(),
        stat_name: if cluster.alt_stat_name.is_empty() { &cluster.name } else { &cluster.alt_stat_name }
            .replace(':', "_"),
        discovery,
        lb_policy,
        lb,
        reported_metrics,
        connect_timeout: duration(cluster.connect_timeout, path, "connect_timeout")?.unwrap_or(Duration::from_secs(5)),
        protocol,
        http1: http1_client(http.as_ref(), &http_path)?,
        max_requests_per_connection: number(max_requests, 0),
        max_stream_duration: max_stream_duration.filter(|limit| !limit.is_zero()),
        idle_timeout: limit(common.idle_timeout, hour, &common_path, "idle_timeout")?,
        pool: pool(cluster, &common, &common_path)?,
        circuit_breakers: circuit_breakers(cluster.circuit_breakers.as_ref(), &join(path, "circuit_breakers"))?,
        per_connection_buffer_limit_bytes: number(cluster.per_connection_buffer_limit_bytes, 1 << 20),
        tcp_keepalive: keepalive(cluster),
        bind: bind.map(Arc::new),
        happy_eyeballs: happy_eyeballs(cluster, path)?,
        tls,
        socket_matches,
        peer_name,
        health,
        tracked: tracked(cluster),
        endpoints,
    })
}

fn tracked(cluster: &Cluster) -> TrackedStats {
    let tracked = cluster.track_cluster_stats.unwrap_or_default();
    #[expect(deprecated, reason = "the field that track_cluster_stats replaced, which Envoy still takes")]
    let timeout_budgets = tracked.timeout_budgets || cluster.track_timeout_budgets;
    TrackedStats {
        timeout_budgets,
        request_response_sizes: tracked.request_response_sizes,
        per_endpoint: tracked.per_endpoint_stats,
    }
}

/// What such hosts have is not counted for each of them.
fn breakers_of_hosts_that_requests_name(cluster: &Cluster, discovery: &Discovery) -> bool {
    let named = matches!(discovery, Discovery::OriginalDst { .. } | Discovery::DynamicForwardProxy { .. });
    named && cluster.circuit_breakers.as_ref().is_some_and(|breakers| !breakers.per_host_thresholds.is_empty())
}

fn health(cluster: &Cluster, path: &str) -> Result<HealthOptions> {
    let mut options = HealthOptions::default();
    if let Some(config) = &cluster.outlier_detection {
        let path = join(path, "outlier_detection");
        options.outlier_detection = Some(Arc::new(outlier_detection(config, &path)?));
    }
    options.ignore_on_removal = cluster.ignore_health_on_host_removal;
    options.excludes_unchecked =
        cluster.common_lb_config.as_ref().is_some_and(|config| config.ignore_new_hosts_until_first_hc);
    if let Some(set) = cluster.common_lb_config.as_ref().and_then(|config| config.override_host_status.as_ref()) {
        options.override_statuses = OverrideStatuses::new(set.statuses().map(health_status));
    }
    options.checks = health_checks_of(cluster, path)?;
    Ok(options)
}

/// Of `lb_policy`; those of `load_balancing_policy` may, as in Envoy.
fn hashes_by_hostname(cluster: &Cluster) -> bool {
    let common = cluster.common_lb_config.as_ref();
    let hashing = common.and_then(|config| config.consistent_hashing_lb_config.as_ref());
    hashing.is_some_and(|config| config.use_hostname_for_hashing)
}

fn discovery(cluster: &Cluster, lb_policy: &LbPolicy, path: &str) -> Result<Discovery> {
    let (kind, extension) = match &cluster.cluster_discovery_type {
        Some(ClusterDiscoveryType::Type(kind)) => {
            (DiscoveryType::try_from(*kind).unwrap_or(DiscoveryType::Static), None)
        }
        Some(ClusterDiscoveryType::ClusterType(custom)) => {
            let extension = extension(custom, cluster, path)?;
            let kind = match extension {
                Discovery::LogicalDns(_) => DiscoveryType::LogicalDns,
                Discovery::StrictDns(_) => DiscoveryType::StrictDns,
                _ => DiscoveryType::Static,
            };
            (kind, Some(extension))
        }
        None => (DiscoveryType::Static, None),
    };
    if cluster.eds_cluster_config.is_some() && kind != DiscoveryType::Eds {
        return Err(FieldError::new(join(path, "eds_cluster_config"), "eds_cluster_config set in a non-EDS cluster"));
    }
    if cluster.load_assignment.is_some() && kind == DiscoveryType::Eds {
        return Err(FieldError::new(join(path, "load_assignment"), "load_assignment set in an EDS cluster"));
    }
    // Other hosts have no names.
    if hashes_by_hostname(cluster) && !matches!(kind, DiscoveryType::StrictDns | DiscoveryType::LogicalDns) {
        let kind = kind.as_str_name().to_lowercase();
        let text = format!(
            "Cannot use hostname for consistent hashing loadbalancing for cluster of type: 'envoy.cluster.{kind}'"
        );
        return Err(FieldError::new(join(path, "common_lb_config.consistent_hashing_lb_config"), text));
    }
    let discovery = match extension {
        Some(discovery) => discovery,
        None => of_type(kind, cluster, path)?,
    };
    let provided = *lb_policy == LbPolicy::ClusterProvided;
    if provided != discovery.chooses_hosts() {
        let text =
            "CLUSTER_PROVIDED goes with clusters that choose hosts themselves, and only with them: set both or neither";
        return Err(FieldError::new(join(path, "lb_policy"), text));
    }
    Ok(discovery)
}

fn of_type(kind: DiscoveryType, cluster: &Cluster, path: &str) -> Result<Discovery> {
    match kind {
        DiscoveryType::Static => Ok(Discovery::Static),
        DiscoveryType::StrictDns => Ok(Discovery::StrictDns(dns::of_cluster(cluster, path)?)),
        DiscoveryType::LogicalDns => Ok(Discovery::LogicalDns(dns::of_cluster(cluster, path)?)),
        DiscoveryType::Eds => {
            let config = cluster.eds_cluster_config.as_ref().ok_or_else(|| required(path, "eds_cluster_config"))?;
            let eds_path = join(path, "eds_cluster_config.eds_config");
            let from = config_source(config.eds_config.as_ref(), &eds_path)?;
            let name = if config.service_name.is_empty() { &cluster.name } else { &config.service_name };
            Ok(Discovery::Eds { endpoints: ResourceRef::new(name, from) })
        }
        DiscoveryType::OriginalDst => original_dst(cluster, path),
    }
}

/// The kinds of `cluster_type` that are known.
fn extension(custom: &CustomClusterType, cluster: &Cluster, cluster_path: &str) -> Result<Discovery> {
    let path = join(cluster_path, "cluster_type");
    let config = custom.typed_config.as_ref().ok_or_else(|| required(&path, "typed_config"))?;
    let path = join(&path, "typed_config");
    let wanted = type_name(config);
    if wanted == DnsCluster::full_name() {
        return dns::of_extension(cluster, config, &path);
    }
    if wanted == AggregateCluster::full_name() {
        if cluster.load_assignment.is_some() {
            return Err(FieldError::new(join(cluster_path, "load_assignment"), "an aggregate has no hosts of its own"));
        }
        let AggregateCluster { clusters } = unpack(config, &path)?;
        return Ok(Discovery::Aggregate { clusters: clusters.iter().map(|name| name.as_str().into()).collect() });
    }
    if wanted == ForwardProxyCluster::full_name() {
        for (set, field) in [
            (cluster.load_assignment.is_some(), "load_assignment"),
            (cluster.outlier_detection.is_some(), "outlier_detection"),
            (!cluster.health_checks.is_empty(), "health_checks"),
        ] {
            if set {
                return Err(FieldError::unsupported(join(cluster_path, field)));
            }
        }
        return dynamic_forward_proxy::of_extension(config, &path);
    }
    let known = format!("{} and {}", DnsCluster::full_name(), AggregateCluster::full_name());
    Err(FieldError::unsupported_value(path, wanted, &known))
}

fn original_dst(cluster: &Cluster, path: &str) -> Result<Discovery> {
    if cluster.load_assignment.is_some() {
        let text = "an ORIGINAL_DST cluster finds its hosts by itself: load_assignment must not be set";
        return Err(FieldError::new(join(path, "load_assignment"), text));
    }
    let (mut http_header, mut port_override) = (None, None);
    if let Some(LbConfig::OriginalDstLbConfig(config)) = &cluster.lb_config {
        let path = join(path, "original_dst_lb_config");
        if !config.use_http_header && !config.http_header_name.is_empty() {
            let text = "has no effect without use_http_header";
            return Err(FieldError::new(join(&path, "http_header_name"), text));
        }
        if config.use_http_header {
            let name = Some(config.http_header_name.as_str()).filter(|name| !name.is_empty());
            let name = name.unwrap_or("x-envoy-original-dst-host");
            http_header = Some(header_name(name, &join(&path, "http_header_name"))?);
        }
        port_override = config
            .upstream_port_override
            .map(|value| port(value.value, &path, "upstream_port_override"))
            .transpose()?;
    }
    let cleanup_interval =
        duration(cluster.cleanup_interval, path, "cleanup_interval")?.unwrap_or(Duration::from_secs(5));
    Ok(Discovery::OriginalDst { http_header, port_override, cleanup_interval })
}

/// How a cluster speaks HTTP, and where that stands; `None`: as it does where nothing is said.
fn http_options(cluster: &Cluster, cluster_path: &str) -> Result<(Option<HttpProtocolOptions>, String)> {
    let path = join(cluster_path, "typed_extension_protocol_options");
    // Nobody else asks Redis servers.
    let redis = redis::is_checked(cluster);
    let is_known = |name: &String| name == HTTP_OPTIONS || (redis && name == redis::OPTIONS);
    if let Some(name) = cluster.typed_extension_protocol_options.keys().find(|name| !is_known(name)) {
        return Err(FieldError::unsupported(format!("{path}[\"{name}\"]")));
    }
    let at = format!("{path}[\"{HTTP_OPTIONS}\"]");
    match cluster.typed_extension_protocol_options.get(HTTP_OPTIONS) {
        Some(any) => Ok((Some(unpack(any, &at)?), at)),
        None => Ok((old_http_options(cluster, cluster_path)?, cluster_path.to_owned())),
    }
}

/// What the fields say that `HttpProtocolOptions` has replaced. As in Envoy they do not count beside it.
#[expect(deprecated, reason = "Envoy still takes them")]
fn old_http_options(cluster: &Cluster, path: &str) -> Result<Option<HttpProtocolOptions>> {
    let as_the_client = cluster.protocol_selection == ClusterProtocolSelection::UseDownstreamProtocol as i32;
    let (one, two) = (cluster.http_protocol_options.clone(), cluster.http2_protocol_options.clone());
    if one.is_some() && two.is_some() && !as_the_client {
        let text =
            "cluster: Both HTTP1 and HTTP2 options may only be configured with non-default 'protocol_selection' values";
        return Err(FieldError::new(join(path, "http_protocol_options"), text));
    }
    let common = cluster.common_http_protocol_options;
    let names = cluster.upstream_http_protocol_options.clone();
    if one.is_none() && two.is_none() && common.is_none() && names.is_none() && !as_the_client {
        return Ok(None);
    }
    let protocol = match (as_the_client, two) {
        (true, http2_protocol_options) => {
            UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
                http_protocol_options: one,
                http2_protocol_options,
                ..UseDownstreamHttpConfig::default()
            })
        }
        (false, Some(two)) => UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(two)),
        }),
        (false, None) => UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::HttpProtocolOptions(one.unwrap_or_default())),
        }),
    };
    Ok(Some(HttpProtocolOptions {
        common_http_protocol_options: common,
        upstream_http_protocol_options: names,
        upstream_protocol_options: Some(protocol),
        ..HttpProtocolOptions::default()
    }))
}

/// Of the options at `path`.
fn protocol(http: Option<&HttpProtocolOptions>, tls: bool, path: &str) -> Result<UpstreamProtocol> {
    let Some(options) = http else { return Ok(UpstreamProtocol::Http1) };
    match &options.upstream_protocol_options {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match &explicit.protocol_config {
            Some(ProtocolConfig::HttpProtocolOptions(_)) => Ok(UpstreamProtocol::Http1),
            Some(ProtocolConfig::Http2ProtocolOptions(options)) => Ok(UpstreamProtocol::Http2(http2(Some(options)))),
            _ => Err(FieldError::unsupported(join(path, "explicit_http_config"))),
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(options)) => {
            Ok(UpstreamProtocol::Downstream(http2(options.http2_protocol_options.as_ref())))
        }
        Some(UpstreamProtocolOptions::AutoConfig(_)) if !tls => {
            let text = "lets the TLS handshake choose the protocol: the cluster needs a TLS transport_socket, and no match with another";
            Err(FieldError::new(join(path, "auto_config"), text))
        }
        Some(UpstreamProtocolOptions::AutoConfig(options)) => {
            Ok(UpstreamProtocol::Auto(http2(options.http2_protocol_options.as_ref())))
        }
        None => Err(required(path, "upstream_protocol_options")),
    }
}

fn circuit_breakers(breakers: Option<&CircuitBreakers>, path: &str) -> Result<[Thresholds; 2]> {
    let mut limits: [Option<Thresholds>; 2] = Default::default();
    let of_each_host = breakers.map(|breakers| of_each_host(breakers, path)).transpose()?.unwrap_or_default();
    let all = breakers.map(|breakers| breakers.thresholds.as_slice()).unwrap_or_default();
    for (index, thresholds) in all.iter().enumerate() {
        let default = Thresholds::default();
        let high = thresholds.priority == RoutingPriority::High as i32;
        let limits = &mut limits[usize::from(high)];
        // As in Envoy the first of a priority counts.
        if limits.is_some() {
            continue;
        }
        *limits = Some(Thresholds {
            max_connections: number(thresholds.max_connections, default.max_connections),
            max_connections_per_host: of_each_host[usize::from(high)].flatten(),
            max_connection_pools: number(thresholds.max_connection_pools, default.max_connection_pools),
            max_pending_requests: number(thresholds.max_pending_requests, default.max_pending_requests),
            max_requests: number(thresholds.max_requests, default.max_requests),
            max_retries: number(thresholds.max_retries, default.max_retries),
            retry_budget: match &thresholds.retry_budget {
                None => None,
                Some(budget) => {
                    let path = format!("{}[{index}].retry_budget", join(path, "thresholds"));
                    Some(RetryBudget {
                        percent: budget.budget_percent.map_or(20.0, |percent| percent.value),
                        min_concurrency: number(budget.min_retry_concurrency, 3),
                        interval: limit(budget.budget_interval, None, &path, "budget_interval")?,
                    })
                }
            },
            tracks_remaining: thresholds.track_remaining,
        });
    }
    let [default, high] = limits;
    let all = [(default, of_each_host[0]), (high, of_each_host[1])];
    Ok(all.map(|(limits, of_each)| {
        let of_each = of_each.flatten();
        limits.unwrap_or_else(|| Thresholds { max_connections_per_host: of_each, ..Thresholds::default() })
    }))
}

/// What `per_host_thresholds` say of connections, for the default priority and for the high one: the first of a priority counts.
fn of_each_host(breakers: &CircuitBreakers, path: &str) -> Result<[Option<Option<u32>>; 2]> {
    let mut limits = [None; 2];
    for (index, thresholds) in breakers.per_host_thresholds.iter().enumerate() {
        let only = CircuitBreakersThresholds {
            priority: thresholds.priority,
            max_connections: thresholds.max_connections,
            ..Default::default()
        };
        if *thresholds != only {
            let path = format!("{}[{index}]", join(path, "per_host_thresholds"));
            return Err(FieldError::new(path, "Unsupported field in per_host_thresholds"));
        }
        let high = thresholds.priority == RoutingPriority::High as i32;
        limits[usize::from(high)].get_or_insert(thresholds.max_connections.map(|most| most.value));
    }
    Ok(limits)
}

fn happy_eyeballs(cluster: &Cluster, path: &str) -> Result<HappyEyeballs> {
    let options = cluster.upstream_connection_options.as_ref();
    let Some(config) = options.and_then(|options| options.happy_eyeballs_config) else {
        return Ok(HappyEyeballs::default());
    };
    let path = join(path, "upstream_connection_options.happy_eyeballs_config");
    let first_is_v6 = match FirstAddressFamilyVersion::try_from(config.first_address_family_version) {
        Ok(FirstAddressFamilyVersion::Default) | Err(_) => None,
        Ok(FirstAddressFamilyVersion::V4) => Some(false),
        Ok(FirstAddressFamilyVersion::V6) => Some(true),
        Ok(other @ (FirstAddressFamilyVersion::Pipe | FirstAddressFamilyVersion::Internal)) => {
            let path = join(&path, "first_address_family_version");
            return Err(FieldError::unsupported_value(path, other.as_str_name(), "DEFAULT, V4 and V6"));
        }
    };
    let first_count = number(config.first_address_family_count, 1);
    if first_count == 0 {
        let text = "value must be greater than or equal to 1";
        return Err(FieldError::new(join(&path, "first_address_family_count"), text));
    }
    Ok(HappyEyeballs { first_is_v6, first_count })
}

fn keepalive(cluster: &Cluster) -> Option<TcpKeepalive> {
    let keepalive = cluster.upstream_connection_options.as_ref()?.tcp_keepalive.as_ref()?;
    let seconds = |value: u32| Duration::from_secs(u64::from(value));
    Some(TcpKeepalive {
        probes: keepalive.keepalive_probes.map(|value| value.value),
        time: keepalive.keepalive_time.map(|value| seconds(value.value)),
        interval: keepalive.keepalive_interval.map(|value| seconds(value.value)),
    })
}
