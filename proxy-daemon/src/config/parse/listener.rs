use std::{net::IpAddr, sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        core::v3::{Address, TrafficDirection},
        listener::v3::{
            Filter, FilterChain as ProtoChain, FilterChainMatch as ProtoMatch, Listener as ProtoListener,
            ListenerFilterChainMatchPredicate as ProtoPortRule, filter::ConfigType,
            filter_chain_match::ConnectionSourceType, listener_filter, listener_filter_chain_match_predicate,
        },
    },
    extensions::filters::{
        listener::{original_src::v3::OriginalSrc as ProtoSrc, tls_inspector::v3::TlsInspector},
        network::sni_dynamic_forward_proxy::v3::{FilterConfig as SniForwardProxy, filter_config::PortSpecifier},
    },
};
use prost::Name as _;

use super::{
    access_log::access_logs,
    common::{Result, cidrs, duration, ip, limit, number, port, required, socket_address, type_name},
    dynamic_forward_proxy::dns_cache,
    http_connection_manager::http_connection_manager,
    support::{self, join},
    tcp_proxy::tcp_proxy,
    tls::downstream_socket,
};
use crate::config::{
    FieldError,
    model::{
        FilterChain, FilterChainMatch, ListenAddress, Listener, NetworkFilterConfig, OriginalSrc, PortRule,
        SniForwardProxyConfig, SourceType, TransportProtocol,
    },
};

/// A checked listener.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn listener(listener: &ProtoListener, path: &str) -> Result<Listener> {
    support::check(listener, path)?;
    // Every worker has a socket of its own, and every listener is bound: both can be said, and neither unsaid.
    for (value, field) in [(&listener.enable_reuse_port, "enable_reuse_port"), (&listener.bind_to_port, "bind_to_port")]
    {
        if value.is_some_and(|value| !value.value) {
            return Err(FieldError::new(join(path, field), "false is not supported by culvert yet"));
        }
    }
    let address = listener.address.as_ref().ok_or_else(|| required(path, "address"))?;
    let mut addresses = vec![listen_address(address, &join(path, "address"))?];
    for (index, additional) in listener.additional_addresses.iter().enumerate() {
        let path = format!("{}[{index}].address", join(path, "additional_addresses"));
        let address = additional.address.as_ref().ok_or_else(|| FieldError::new(&path, "value is required"))?;
        addresses.push(listen_address(address, &path)?);
    }
    let name = match listener.name.as_str() {
        "" => addresses[0].address.to_string(),
        name => name.to_owned(),
    };
    let chain = |chain: &ProtoChain, path: String| Ok(Arc::new(filter_chain(chain, &path)?));
    let chains = listener.filter_chains.iter().enumerate();
    let chains = chains.map(|(index, item)| chain(item, format!("{}[{index}]", join(path, "filter_chains"))));
    let filter_chains: Vec<_> = chains.collect::<Result<_>>()?;
    distinct(&filter_chains, path)?;
    let default = listener.default_filter_chain.as_ref();
    let default_filter_chain = default.map(|item| chain(item, join(path, "default_filter_chain"))).transpose()?;
    if filter_chains.is_empty() && default_filter_chain.is_none() {
        return Err(FieldError::new(join(path, "filter_chains"), "no filter chains specified"));
    }
    let mut filters = listener_filters(listener, path)?;
    if filters.tls_inspector.is_none() && filter_chains.iter().any(|chain| needs_tls_inspector(&chain.chain_match)) {
        tracing::warn!(
            listener = %name,
            "filter chain match rules require envoy.filters.listener.tls_inspector, which isn't configured: it is added"
        );
        filters.tls_inspector = Some(MAX_CLIENT_HELLO);
    }
    Ok(Listener {
        name: name.into(),
        addresses,
        inbound: listener.traffic_direction == TrafficDirection::Inbound as i32,
        stat_prefix: listener.stat_prefix.clone(),
        transparent: listener.transparent.is_some_and(|value| value.value),
        freebind: listener.freebind.is_some_and(|value| value.value),
        backlog: number(listener.tcp_backlog_size, 4096),
        use_original_dst: filters.original_dst,
        original_src: filters.original_src,
        tls_inspector: filters.tls_inspector,
        not_inspected: filters.not_inspected,
        listener_filters_timeout: limit(
            listener.listener_filters_timeout,
            Some(Duration::from_secs(15)),
            path,
            "listener_filters_timeout",
        )?,
        continue_on_listener_filters_timeout: listener.continue_on_listener_filters_timeout,
        filter_chains,
        default_filter_chain,
        per_connection_buffer_limit_bytes: number(listener.per_connection_buffer_limit_bytes, 1 << 20),
        access_logs: access_logs(&listener.access_log, &join(path, "access_log"))?,
    })
}

/// Refuses chains of which two have the same rule for some connections, as Envoy does. A chain with several ports or ranges
/// stands for a rule for each; a wider range beside a narrower one is another rule.
fn distinct(chains: &[Arc<FilterChain>], path: &str) -> Result<()> {
    for (index, chain) in chains.iter().enumerate() {
        let here = || format!("{}[{index}].filter_chain_match", join(path, "filter_chains"));
        if chain.chain_match.repeats_itself() {
            return Err(FieldError::new(here(), "names a port or an address range twice"));
        }
        if let Some(first) = chains[..index].iter().position(|other| other.chain_match.overlaps(&chain.chain_match)) {
            let text = format!("has a matching rule in common with filter_chains[{first}]");
            return Err(FieldError::new(here(), text));
        }
    }
    Ok(())
}

fn listen_address(address: &Address, path: &str) -> Result<ListenAddress> {
    let (socket, port) = socket_address(address, path)?;
    let ip = ip(socket, path)?;
    let may_be_both = match ip {
        IpAddr::V6(v6) => v6.is_unspecified() || v6.to_ipv4_mapped().is_some(),
        IpAddr::V4(_) => false,
    };
    if socket.ipv4_compat && !may_be_both {
        let text = "only the address '::' and IPv4-mapped ones can set ipv4_compat";
        return Err(FieldError::new(join(path, "socket_address.ipv4_compat"), text));
    }
    Ok(ListenAddress { address: (ip, port).into(), ipv4_compat: socket.ipv4_compat && ip.is_ipv6() })
}

/// How much of a client's first message is looked at where nothing else is said, in bytes.
const MAX_CLIENT_HELLO: usize = 16 * 1024;

#[derive(Default)]
struct ListenerFilters {
    original_dst: bool,
    original_src: Option<OriginalSrc>,
    tls_inspector: Option<usize>,
    not_inspected: Option<PortRule>,
}

fn listener_filters(listener: &ProtoListener, path_of: &str) -> Result<ListenerFilters> {
    let mut filters = ListenerFilters::default();
    for (index, filter) in listener.listener_filters.iter().enumerate() {
        let path = format!("{}[{index}].typed_config", join(path_of, "listener_filters"));
        let Some(listener_filter::ConfigType::TypedConfig(config)) = &filter.config_type else {
            return Err(FieldError::new(path, "value is required"));
        };
        let kind = config.type_url.rsplit('.').next();
        if filter.filter_disabled.is_some() && kind != Some("TlsInspector") {
            let path = format!("{}[{index}].filter_disabled", join(path_of, "listener_filters"));
            return Err(FieldError::unsupported(path));
        }
        match kind {
            Some("OriginalDst") => filters.original_dst = true,
            Some("OriginalSrc") => {
                let ProtoSrc { mark, .. } = unpack(config, &path)?;
                filters.original_src = Some(OriginalSrc { mark });
            }
            Some("TlsInspector") => {
                let inspector: TlsInspector = unpack(config, &path)?;
                let most = inspector.max_client_hello_size.map_or(MAX_CLIENT_HELLO, |size| size.value as usize);
                filters.tls_inspector = Some(most.min(MAX_CLIENT_HELLO));
                filters.not_inspected = filter
                    .filter_disabled
                    .as_ref()
                    .map(|rule| {
                        port_rule(rule, &format!("{}[{index}].filter_disabled", join(path_of, "listener_filters")))
                    })
                    .transpose()?;
            }
            _ => return Err(FieldError::unsupported(path)),
        }
    }
    Ok(filters)
}

fn port_rule(rule: &ProtoPortRule, path: &str) -> Result<PortRule> {
    use listener_filter_chain_match_predicate::Rule;
    let all = |rules: &[ProtoPortRule], field: &str| -> Result<Vec<PortRule>> {
        let rule = |(index, rule)| port_rule(rule, &format!("{path}.{field}.rules[{index}]"));
        rules.iter().enumerate().map(rule).collect()
    };
    Ok(match &rule.rule {
        Some(Rule::OrMatch(set)) => PortRule::Any(all(&set.rules, "or_match")?),
        Some(Rule::AndMatch(set)) => PortRule::All(all(&set.rules, "and_match")?),
        Some(Rule::NotMatch(rule)) => PortRule::Not(Box::new(port_rule(rule, &format!("{path}.not_match"))?)),
        Some(Rule::AnyMatch(_)) => PortRule::Always,
        Some(Rule::DestinationPortRange(range)) => PortRule::Ports(range.start, range.end),
        None => return Err(FieldError::new(path, "a rule is required")),
    })
}

/// Whether the rule looks at what only a TLS client's first message tells.
fn needs_tls_inspector(rule: &FilterChainMatch) -> bool {
    match rule.transport_protocol {
        Some(TransportProtocol::Tls) => true,
        Some(TransportProtocol::RawBuffer) => false,
        None => !rule.server_names.is_empty() || !rule.application_protocols.is_empty(),
    }
}

fn filter_chain(chain: &ProtoChain, path: &str) -> Result<FilterChain> {
    let tls = downstream_socket(chain.transport_socket.as_ref(), path)?;
    let timeout = "transport_socket_connect_timeout";
    let timeout = duration(chain.transport_socket_connect_timeout, path, timeout)?.filter(|limit| !limit.is_zero());
    let parse = |(index, filter): (usize, &Filter)| {
        network_filter(filter, &format!("{}[{index}].typed_config", join(path, "filters")))
    };
    let filters: Vec<_> = chain.filters.iter().enumerate().map(parse).collect::<Result<_>>()?;
    let filters_path = join(path, "filters");
    let Some((last, before)) = filters.split_last() else {
        let text = "a chain without a network filter is not supported by culvert yet";
        return Err(FieldError::new(filters_path, text));
    };
    let is_terminal = |filter: &NetworkFilterConfig| !matches!(filter, NetworkFilterConfig::SniForwardProxy(_));
    if before.iter().any(is_terminal) {
        return Err(FieldError::new(filters_path, "a terminal filter must be the last of its chain"));
    }
    if !is_terminal(last) {
        let text = "a filter that is not terminal must not be the last of its chain";
        return Err(FieldError::new(format!("{filters_path}[{}]", before.len()), text));
    }
    if before.len() > 1 || (before.len() == 1 && !matches!(last, NetworkFilterConfig::TcpProxy(_))) {
        // One goes before a TCP proxy.
        return Err(FieldError::unsupported(format!("{filters_path}[{}]", before.len() - 1)));
    }
    let chain_match = match &chain.filter_chain_match {
        Some(chain_match) => filter_chain_match(chain_match, &join(path, "filter_chain_match"))?,
        None => FilterChainMatch::default(),
    };
    let name = chain.name.as_str().into();
    Ok(FilterChain { name, chain_match, tls, transport_socket_connect_timeout: timeout, filters })
}

fn network_filter(filter: &Filter, path: &str) -> Result<NetworkFilterConfig> {
    let Some(ConfigType::TypedConfig(config)) = &filter.config_type else {
        return Err(FieldError::new(path, "value is required"));
    };
    if type_name(config) == SniForwardProxy::full_name() {
        let config = sni_forward_proxy(&unpack(config, path)?, path)?;
        return Ok(NetworkFilterConfig::SniForwardProxy(Arc::new(config)));
    }
    match config.type_url.rsplit('.').next() {
        Some("TcpProxy") => Ok(NetworkFilterConfig::TcpProxy(Arc::new(tcp_proxy(&unpack(config, path)?, path)?))),
        Some("HttpConnectionManager") => Ok(NetworkFilterConfig::HttpConnectionManager(Arc::new(
            http_connection_manager(&unpack(config, path)?, path)?,
        ))),
        _ => Err(FieldError::unsupported(path)),
    }
}

fn sni_forward_proxy(proxy: &SniForwardProxy, path: &str) -> Result<SniForwardProxyConfig> {
    let cache = proxy.dns_cache_config.as_ref().ok_or_else(|| required(path, "dns_cache_config"))?;
    let port = match proxy.port_specifier {
        Some(PortSpecifier::PortValue(value)) => port(value, path, "port_value")?,
        // Envoy takes that, asks for port 0, and never has a host.
        None => return Err(required(path, "port_value")),
    };
    Ok(SniForwardProxyConfig { cache: dns_cache(cache, &join(path, "dns_cache_config"))?, port })
}

fn filter_chain_match(chain: &ProtoMatch, path: &str) -> Result<FilterChainMatch> {
    let transport_protocol = match chain.transport_protocol.as_str() {
        "" => None,
        "tls" => Some(TransportProtocol::Tls),
        "raw_buffer" => Some(TransportProtocol::RawBuffer),
        other => {
            let path = join(path, "transport_protocol");
            return Err(FieldError::unsupported_value(path, format!("{other:?}"), "\"tls\" and \"raw_buffer\""));
        }
    };
    let server_names = chain.server_names.iter().enumerate().map(|(index, name)| {
        if name.strip_prefix("*.").unwrap_or(name).contains('*') {
            let path = format!("{}[{index}]", join(path, "server_names"));
            return Err(FieldError::new(path, "partial wildcards are not supported in \"server_names\""));
        }
        Ok(name.to_ascii_lowercase())
    });
    let destination = chain.destination_port.as_ref().map(|value| port(value.value, path, "destination_port"));
    let source_type = match ConnectionSourceType::try_from(chain.source_type) {
        Ok(ConnectionSourceType::SameIpOrLoopback) => SourceType::SameIpOrLoopback,
        Ok(ConnectionSourceType::External) => SourceType::External,
        _ => SourceType::Any,
    };
    let direct = "direct_source_prefix_ranges";
    Ok(FilterChainMatch {
        destination_port: destination.transpose()?,
        prefix_ranges: cidrs(&chain.prefix_ranges, path, "prefix_ranges")?,
        server_names: server_names.collect::<Result<_>>()?,
        transport_protocol,
        application_protocols: chain.application_protocols.clone(),
        direct_source_prefix_ranges: cidrs(&chain.direct_source_prefix_ranges, path, direct)?,
        source_type,
        source_prefix_ranges: cidrs(&chain.source_prefix_ranges, path, "source_prefix_ranges")?,
        source_ports: chain.source_ports.iter().map(|n| port(*n, path, "source_ports")).collect::<Result<_>>()?,
    })
}
