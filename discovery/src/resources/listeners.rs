//! LDS: the one listener that takes the pods' redirected outbound connections.
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
use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as FilterConfig;
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType as ListenerFilterConfig;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, ListenerFilter};
use envoy_types::pb::envoy::extensions::access_loggers::file::v3::FileAccessLog;
use envoy_types::pb::envoy::extensions::filters::http::on_demand::v3::{OnDemand, OnDemandCds};
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::listener::original_dst::v3::OriginalDst;
use envoy_types::pb::envoy::extensions::filters::listener::original_src::v3::OriginalSrc;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::{
    CodecType, RouteSpecifier,
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
use super::{ORIGINAL_DST_CLUSTER, OUTBOUND_LISTENER, Options, ProxyKind, pack, policy};
use crate::mesh::{Mesh, cluster_name};
use crate::policy::Span;

pub(super) fn listeners(
    mesh: &Mesh,
    rest: Option<&Mesh>,
    options: &Options,
    kind: ProxyKind,
) -> Vec<(String, Listener)> {
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
    let passthrough = FilterChain {
        name: "passthrough".to_owned(),
        filters: vec![tcp_proxy("passthrough", ORIGINAL_DST_CLUSTER, None)],
        ..Default::default()
    };
    let dual_stack = options.outbound_address.is_unspecified() && options.outbound_address.is_ipv6();
    let listener = Listener {
        name: OUTBOUND_LISTENER.to_owned(),
        address: Some(socket_address(options.outbound_address, options.outbound_port, dual_stack)),
        transparent: Some(BoolValue { value: true }),
        listener_filters: vec![
            listener_filter("envoy.filters.listener.original_dst", pack(&OriginalDst::default())),
            listener_filter("envoy.filters.listener.original_src", pack(&OriginalSrc::default())),
        ],
        filter_chains,
        default_filter_chain: Some(passthrough),
        ..Default::default()
    };
    vec![(OUTBOUND_LISTENER.to_owned(), listener)]
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

fn tcp_proxy(stat_prefix: &str, cluster: &str, idle: Option<Span>) -> Filter {
    let config = TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        idle_timeout: idle.map(|idle| policy::duration(idle.0)),
        ..Default::default()
    };
    network_filter("envoy.filters.network.tcp_proxy", pack(&config))
}

fn matching_port(port: u16, prefix_ranges: Vec<CidrRange>) -> Option<FilterChainMatch> {
    let destination_port = Some(UInt32Value { value: port.into() });
    Some(FilterChainMatch { destination_port, prefix_ranges, ..Default::default() })
}

fn tcp_chain(cluster: &str, vips: &[IpAddr], port: u16, idle: Option<Span>) -> FilterChain {
    let ranges = vips.iter().map(|vip| CidrRange {
        address_prefix: vip.to_string(),
        prefix_len: Some(UInt32Value { value: if vip.is_ipv4() { 32 } else { 128 } }),
    });
    FilterChain {
        name: cluster.to_owned(),
        filter_chain_match: matching_port(port, ranges.collect()),
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
        let config = Override { original_dst_cluster: ORIGINAL_DST_CLUSTER.to_owned(), ..options.overrides.clone() };
        let config = Any {
            type_url: "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override".to_owned(),
            value: prost::Message::encode_to_vec(&config),
        };
        http_filters.push(http_filter("culvert.filters.http.override", config));
    }
    if counted {
        http_filters.push(http_filter(policy::RATE_LIMIT_FILTER, policy::rate_limit_filter()));
    }
    http_filters.push(http_filter("envoy.filters.http.router", pack(&Router::default())));
    let access_log = options.access_log.iter().map(|path| AccessLog {
        name: "envoy.access_loggers.file".to_owned(),
        config_type: Some(AccessLogConfig::TypedConfig(pack(&FileAccessLog {
            path: path.clone(),
            access_log_format: None,
        }))),
        ..Default::default()
    });
    let name = route_configuration_name(port);
    let manager = HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        stat_prefix: name.clone(),
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(over_ads()),
            route_config_name: name.clone(),
        })),
        http_filters,
        access_log: access_log.collect(),
        ..Default::default()
    };
    FilterChain {
        name,
        filter_chain_match: matching_port(port, Vec::new()),
        filters: vec![network_filter("envoy.filters.network.http_connection_manager", pack(&manager))],
        ..Default::default()
    }
}
