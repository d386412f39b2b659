//! LDS: the listener of node proxies and sidecars that takes the pods' redirected outbound connections.
//!
//! ```text
//! TCP service   virtual address + port -> tcp_proxy to the service's cluster
//! HTTP port     port alone             -> HTTP connection manager, routes of that port by Host (and address)
//! anything else                        -> tcp_proxy to where the client wanted to go
//! ```
//! A proxy that may ask for what it was not given has HTTP chains for the ports of all services: its routes know their names, and the filter
//! `envoy.filters.http.on_demand` asks for their clusters.
//!
//! HTTP chains match the port alone, so that a service is found by name even when its address is not known, which is
//! the case for headless services.

use std::collections::BTreeMap;
use std::net::IpAddr;

use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::Override;
use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::accesslog::v3::access_log::ConfigType as AccessLogConfig;
use envoy_types::pb::envoy::config::core::v3::{CidrRange, Http1ProtocolOptions};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as FilterConfig;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType as ListenerFilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::envoy::extensions::filters::http::on_demand::v3::{OnDemand, OnDemandCds};
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, RouteSpecifier, UpgradeConfig,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_filter::ConfigType as HttpFilterConfig;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds,
};
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::google::protobuf::{Any, BoolValue, UInt32Value};

use super::clusters::{over_ads, socket_address};
use super::routes::route_configuration_name;
use super::{ORIGINAL_DST_CLUSTER, OUTBOUND_LISTENER, Options, ProxyKind, Role, pack, policy, sidecar};
use crate::mesh::{Mesh, cluster_name};
use crate::policy::Span;

/// `rest`: everything, where a proxy of this mesh may ask for it.
pub(super) fn outbound(
    mesh: &Mesh,
    rest: Option<&Mesh>,
    options: &Options,
    (kind, role): (ProxyKind, Role),
) -> Listener {
    let mut filter_chains = Vec::new();
    // The ports with HTTP services, and whether requests to any of those are counted.
    let mut http_ports: BTreeMap<u16, bool> = BTreeMap::new();
    for (key, service) in &mesh.services {
        for (port, described) in &service.ports {
            if !described.protocol.is_http() && !described.vips.is_empty() {
                let idle = service.manifest.as_ref().and_then(|manifest| manifest.timeouts.idle);
                filter_chains.push(tcp_chain(&cluster_name(key, *port), &described.vips, *port, idle));
            }
        }
    }
    for service in rest.unwrap_or(mesh).services.values() {
        let counted = service.manifest.as_ref().is_some_and(|manifest| manifest.rate_limit.is_some());
        for (port, _) in service.ports.iter().filter(|(_, described)| described.protocol.is_http()) {
            *http_ports.entry(*port).or_default() |= counted;
        }
    }
    let asks = rest.is_some();
    filter_chains
        .extend(http_ports.into_iter().map(|(port, counted)| http_chain(port, (counted, asks), options, kind)));
    let mut listener = Listener {
        name: OUTBOUND_LISTENER.to_owned(),
        listener_filters: vec![original_dst_filter()],
        default_filter_chain: Some(passthrough(ORIGINAL_DST_CLUSTER)),
        ..Default::default()
    };
    if role == Role::Sidecar {
        let addresses = sidecar::outbound_addresses(options);
        sidecar::listen_at(&mut listener, &addresses, options.outbound_port);
        filter_chains.push(sidecar::itself(options.outbound_port, &addresses));
    } else {
        let dual_stack = options.outbound_address.is_unspecified() && options.outbound_address.is_ipv6();
        listener.address = Some(socket_address(options.outbound_address, options.outbound_port, dual_stack));
        listener.transparent = Some(BoolValue { value: true });
        let original_src = listener_filter("envoy.filters.listener.original_src", pack(&OriginalSrc::default()));
        listener.listener_filters.push(original_src);
    }
    listener.filter_chains = filter_chains;
    listener
}

/// Where the client wanted to go, by what the kernel knows of redirected connections.
pub(super) fn original_dst_filter() -> ListenerFilter {
    listener_filter("envoy.filters.listener.original_dst", pack(&OriginalDst::default()))
}

/// The chain to where the client wanted to go, by this cluster.
pub(super) fn passthrough(cluster: &str) -> FilterChain {
    FilterChain {
        name: "passthrough".to_owned(),
        filters: vec![tcp_proxy("passthrough", cluster, None)],
        ..Default::default()
    }
}

fn listener_filter(name: &str, config: Any) -> ListenerFilter {
    let config_type = Some(ListenerFilterConfig::TypedConfig(config));
    ListenerFilter { name: name.to_owned(), config_type, ..Default::default() }
}

fn network_filter(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(FilterConfig::TypedConfig(config)) }
}

pub(super) fn http_filter(name: &str, config: Any) -> HttpFilter {
    let config_type = Some(HttpFilterConfig::TypedConfig(config));
    HttpFilter { name: name.to_owned(), config_type, ..Default::default() }
}

/// The filter that every list of HTTP filters ends with.
pub(super) fn router() -> HttpFilter {
    http_filter("envoy.filters.http.router", pack(&Router::default()))
}

/// The filter that only culvertd knows.
pub(super) fn override_filter(configured: Override) -> HttpFilter {
    let config = Override { original_dst_cluster: ORIGINAL_DST_CLUSTER.to_owned(), ..configured };
    let config = Any {
        type_url: "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override".to_owned(),
        value: prost::Message::encode_to_vec(&config),
    };
    http_filter("culvert.filters.http.override", config)
}

/// A connection manager as a filter, for all versions of HTTP, and for WebSockets: what works without a proxy works with one.
pub(super) fn manager_filter(manager: HttpConnectionManager) -> Filter {
    let websocket = UpgradeConfig { upgrade_type: "websocket".to_owned(), ..Default::default() };
    let manager = HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        http_protocol_options: Some(Http1ProtocolOptions { accept_http_10: true, ..Default::default() }),
        upgrade_configs: vec![websocket],
        ..manager
    };
    network_filter("envoy.filters.network.http_connection_manager", pack(&manager))
}

/// Where proxies write what they are asked, if they are to.
pub(super) fn access_log(options: &Options) -> Vec<AccessLog> {
    let log = options.access_log.iter().map(|path| AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        config_type: Some(AccessLogConfig::TypedConfig(pack(&FileAccessLog {
            path: path.clone(),
            access_log_format: None,
        }))),
        ..Default::default()
    });
    log.collect()
}

pub(super) fn tcp_proxy(stat_prefix: &str, cluster: &str, idle: Option<Span>) -> Filter {
    let config = TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        idle_timeout: idle.map(|idle| policy::duration(idle.0)),
        ..Default::default()
    };
    network_filter("envoy.filters.network.tcp_proxy", pack(&config))
}

/// Connections to a port, of these addresses if there are any.
pub(super) fn matching_port(port: u16, addresses: &[IpAddr]) -> Option<FilterChainMatch> {
    let destination_port = Some(UInt32Value { value: port.into() });
    let ranges = addresses.iter().map(|address| CidrRange {
        address_prefix: address.to_string(),
        prefix_len: Some(UInt32Value { value: if address.is_ipv4() { 32 } else { 128 } }),
    });
    Some(FilterChainMatch { destination_port, prefix_ranges: ranges.collect(), ..Default::default() })
}

fn tcp_chain(cluster: &str, vips: &[IpAddr], port: u16, idle: Option<Span>) -> FilterChain {
    FilterChain {
        name: cluster.to_owned(),
        filter_chain_match: matching_port(port, vips),
        filters: vec![tcp_proxy(cluster, cluster, idle)],
        ..Default::default()
    }
}

/// `counted`: requests to some of its services are. `asks`: for the clusters of others, on demand.
fn http_chain(port: u16, (counted, asks): (bool, bool), options: &Options, kind: ProxyKind) -> FilterChain {
    let mut http_filters = Vec::new();
    if asks {
        // Before the others, which a request meets anew when its cluster is there.
        let config = OnDemand { odcds: Some(OnDemandCds { source: Some(over_ads()), ..Default::default() }) };
        http_filters.push(http_filter("envoy.filters.http.on_demand", pack(&config)));
    }
    if kind == ProxyKind::Culvert {
        http_filters.push(override_filter(options.overrides.clone()));
    }
    if counted {
        http_filters.push(http_filter(policy::RATE_LIMIT_FILTER, policy::rate_limit_filter()));
    }
    http_filters.push(router());
    let name = route_configuration_name(port);
    let manager = HttpConnectionManager {
        stat_prefix: name.clone(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(over_ads()),
            route_config_name: name.clone(),
        })),
        http_filters,
        access_log: access_log(options),
        ..Default::default()
    };
    FilterChain {
        name,
        filter_chain_match: matching_port(port, &[]),
        filters: vec![manager_filter(manager)],
        ..Default::default()
    }
}
