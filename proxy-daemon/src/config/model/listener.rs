use std::{collections::HashSet, net::SocketAddr, sync::Arc, time::Duration};

use super::{
    AccessLogConfig, AddedValue, Cidr, ClusterChoice, DownstreamTlsContext, HashPolicy, HeaderAdd,
    HttpConnectionManagerConfig, MetadataMatch, ResourceRef, RouteConfig, RouteSource, ScopeRoutes, ScopeSource,
    SecretRef, SecretType,
};
use crate::{http::filters::DiscoveredFilter, upstream::DnsCache};

/// A checked `envoy.config.listener.v3.Listener`.
#[derive(Debug)]
pub struct Listener {
    /// Its name, unique in the process.
    pub name: Arc<str>,
    /// Addresses to listen on: `address`, then `additional_addresses`.
    pub addresses: Vec<ListenAddress>,
    /// `traffic_direction` is `INBOUND`: what `/drain_listeners?inboundonly` is about.
    pub inbound: bool,
    /// What stands for the address in stats names; empty: the address itself with `:` as `_`.
    pub stat_prefix: String,
    /// Sockets accept connections to addresses that are not this host's (IP_TRANSPARENT).
    pub transparent: bool,
    /// Sockets may bind addresses that do not exist yet (IP_FREEBIND).
    pub freebind: bool,
    /// The accept queue's length.
    pub backlog: u32,
    /// `envoy.filters.listener.original_dst`: the connection's own destination takes part in the chain match and in
    /// ORIGINAL_DST clusters.
    pub use_original_dst: bool,
    /// `envoy.filters.listener.original_src`: upstream connections keep the client's address.
    pub original_src: Option<OriginalSrc>,
    /// `envoy.filters.listener.tls_inspector`: how much of a client's first message may be looked at, in bytes; `None`: it is
    /// not looked at.
    pub tls_inspector: Option<usize>,
    /// `filter_disabled` of that filter: connections whose first message is not waited for, so that servers that speak first are heard
    /// at once.
    pub not_inspected: Option<PortRule>,
    /// A connection whose listener filters have not finished after this is closed; `None`: never. Default 15 s.
    pub listener_filters_timeout: Option<Duration>,
    /// Such a connection is served with what is known of it.
    pub continue_on_listener_filters_timeout: bool,
    /// In the order of the configuration.
    pub filter_chains: Vec<Arc<FilterChain>>,
    /// What serves a connection that no chain matches; without it the connection is closed.
    pub default_filter_chain: Option<Arc<FilterChain>>,
    /// Soft limit in bytes of what is buffered for one connection.
    pub per_connection_buffer_limit_bytes: u32,
    /// Logs of connections, one line each.
    pub access_logs: Vec<AccessLogConfig>,
}

impl Listener {
    /// The connection managers of all chains.
    pub fn connection_managers(&self) -> impl Iterator<Item = &Arc<HttpConnectionManagerConfig>> {
        let chains = self.filter_chains.iter().chain(&self.default_filter_chain);
        chains.flat_map(|chain| &chain.filters).filter_map(|filter| match filter {
            NetworkFilterConfig::HttpConnectionManager(config) => Some(config),
            NetworkFilterConfig::TcpProxy(_) | NetworkFilterConfig::SniForwardProxy(_) => None,
        })
    }

    /// All filter chains.
    pub fn chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.filter_chains.iter().chain(&self.default_filter_chain)
    }

    /// The secrets that its connections need, with what each has to be.
    pub fn secrets(&self) -> impl Iterator<Item = (SecretType, &SecretRef)> {
        let of_chains = self.chains().filter_map(|chain| chain.tls.as_ref()).flat_map(|tls| tls.secrets());
        of_chains.chain(self.connection_managers().flat_map(|manager| manager.secrets()))
    }

    /// The HTTP filters that ECDS configures.
    pub fn discovered_filters(&self) -> impl Iterator<Item = &Arc<DiscoveredFilter>> {
        self.connection_managers().flat_map(|manager| manager.discovered_filters())
    }

    /// The route configurations that are written into it, within scopes as well, each with its path.
    pub fn own_routes(&self) -> Vec<(String, &RouteConfig)> {
        let mut all = Vec::new();
        let chains = self.filter_chains.iter().enumerate();
        let chains = chains.map(|(index, chain)| (format!("filter_chains[{index}]"), chain));
        let default = self.default_filter_chain.iter().map(|chain| ("default_filter_chain".to_owned(), chain));
        for (path, chain) in chains.chain(default) {
            for (index, filter) in chain.filters.iter().enumerate() {
                let NetworkFilterConfig::HttpConnectionManager(manager) = filter else { continue };
                let path = format!("{path}.filters[{index}].typed_config");
                match &manager.routes {
                    RouteSource::Static(routes) => all.push((format!("{path}.route_config"), &**routes)),
                    RouteSource::Scoped(scoped) => {
                        let ScopeSource::Inline(scopes) = &scoped.scopes else { continue };
                        let path = format!(
                            "{path}.scoped_routes.scoped_route_configurations_list.scoped_route_configurations"
                        );
                        all.extend(scopes.iter().enumerate().filter_map(|(index, scope)| match &scope.routes {
                            ScopeRoutes::Inline(routes) => {
                                Some((format!("{path}[{index}].route_configuration"), &**routes))
                            }
                            ScopeRoutes::Named { .. } => None,
                        }));
                    }
                    RouteSource::Rds(_) => {}
                }
            }
        }
        all
    }

    /// The route configurations that RDS is to deliver for it.
    pub fn rds(&self) -> impl Iterator<Item = &ResourceRef> {
        self.connection_managers().filter_map(|manager| manager.rds())
    }
}

/// A listening address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenAddress {
    /// Port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// An IPv6 socket that takes IPv4 connections as well.
    pub ipv4_compat: bool,
}

/// `envoy.config.listener.v3.ListenerFilterChainMatchPredicate`: a rule by the port that a connection was going to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PortRule {
    /// One of them holds.
    Any(Vec<PortRule>),
    /// All of them hold.
    All(Vec<PortRule>),
    /// It does not hold.
    Not(Box<PortRule>),
    /// It holds for all ports.
    Always,
    /// From the first to before the second.
    Ports(i32, i32),
}

impl PortRule {
    /// Whether it holds for this port.
    #[must_use]
    pub fn holds(&self, port: u16) -> bool {
        match self {
            Self::Any(rules) => rules.iter().any(|rule| rule.holds(port)),
            Self::All(rules) => rules.iter().all(|rule| rule.holds(port)),
            Self::Not(rule) => !rule.holds(port),
            Self::Always => true,
            Self::Ports(start, end) => (*start..*end).contains(&i32::from(port)),
        }
    }
}

/// Upstream connections keep the downstream connection's source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OriginalSrc {
    /// SO_MARK of the upstream sockets; 0 sets none.
    pub mark: u32,
}

/// One filter chain. The last filter is terminal, so there is exactly one for as long as only terminal filters exist.
#[derive(Debug)]
pub struct FilterChain {
    /// May be empty.
    pub name: Arc<str>,
    /// Which connections it serves.
    pub chain_match: FilterChainMatch,
    /// How its connections are decrypted; `None`: they are plain.
    pub tls: Option<Arc<DownstreamTlsContext>>,
    /// A handshake that takes longer is given up; `None`: any time.
    pub transport_socket_connect_timeout: Option<Duration>,
    /// In the order in which a connection meets them; never empty.
    pub filters: Vec<NetworkFilterConfig>,
}

/// `FilterChainMatch`: an empty list or `None` matches everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct FilterChainMatch {
    /// The connection's (original) destination port.
    pub destination_port: Option<u16>,
    /// The connection's (original) destination address: the longest prefix wins.
    pub prefix_ranges: Vec<Cidr>,
    /// The server that a TLS client asks for, in lower case: a name, or `*.` and a domain.
    pub server_names: Vec<String>,
    /// What the connection begins with.
    pub transport_protocol: Option<TransportProtocol>,
    /// One of the protocols that a TLS client offers.
    pub application_protocols: Vec<String>,
    /// The address that the connection came from.
    pub direct_source_prefix_ranges: Vec<Cidr>,
    /// Local or external clients only.
    pub source_type: SourceType,
    /// The client's address.
    pub source_prefix_ranges: Vec<Cidr>,
    /// The client's port.
    pub source_ports: Vec<u16>,
}

impl FilterChainMatch {
    /// Whether both have a rule in common, when each combination of a port and a range counts as a rule.
    pub fn overlaps(&self, other: &FilterChainMatch) -> bool {
        self.destination_port == other.destination_port
            && self.source_type == other.source_type
            && share(&self.prefix_ranges, &other.prefix_ranges)
            && share(&self.server_names, &other.server_names)
            && self.transport_protocol == other.transport_protocol
            && share(&self.application_protocols, &other.application_protocols)
            && share(&self.direct_source_prefix_ranges, &other.direct_source_prefix_ranges)
            && share(&self.source_prefix_ranges, &other.source_prefix_ranges)
            && share(&self.source_ports, &other.source_ports)
    }

    /// Whether a list of it names something twice.
    pub fn repeats_itself(&self) -> bool {
        let ranges = [&self.prefix_ranges, &self.direct_source_prefix_ranges, &self.source_prefix_ranges];
        ranges.into_iter().any(|ranges| repeats(ranges))
            || repeats(&self.source_ports)
            || repeats(&self.server_names)
            || repeats(&self.application_protocols)
    }
}

/// Whether two lists have an item in common; an empty one stands for "any", which is an item of its own.
fn share<T: Eq + std::hash::Hash>(one: &[T], other: &[T]) -> bool {
    let set: HashSet<&T> = one.iter().collect();
    if set.is_empty() { other.is_empty() } else { other.iter().any(|item| set.contains(item)) }
}

fn repeats<T: Eq + std::hash::Hash>(items: &[T]) -> bool {
    let mut seen = HashSet::new();
    !items.iter().all(|item| seen.insert(item))
}

/// `FilterChainMatch.transport_protocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransportProtocol {
    /// `tls`
    Tls,
    /// `raw_buffer`: anything else.
    RawBuffer,
}

/// `FilterChainMatch.ConnectionSourceType`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum SourceType {
    /// Any client.
    #[default]
    Any,
    /// A client on this host: its address is loopback or equals the destination.
    SameIpOrLoopback,
    /// Any other client.
    External,
}

/// A configured L4 filter.
#[derive(Debug, Clone)]
pub enum NetworkFilterConfig {
    /// `envoy.filters.network.tcp_proxy`
    TcpProxy(Arc<TcpProxyConfig>),
    /// `envoy.filters.network.http_connection_manager`
    HttpConnectionManager(Arc<HttpConnectionManagerConfig>),
    /// `envoy.filters.network.sni_dynamic_forward_proxy`, before a TCP proxy.
    SniForwardProxy(Arc<SniForwardProxyConfig>),
}

/// A checked `FilterConfig` of `envoy.filters.network.sni_dynamic_forward_proxy`.
#[derive(Debug)]
pub struct SniForwardProxyConfig {
    /// Where names are known.
    pub cache: Arc<DnsCache>,
    /// The port at which the hosts of all names are asked for.
    pub port: u16,
}

/// A checked `TcpProxy`.
#[derive(Debug)]
pub struct TcpProxyConfig {
    /// `tcp.<stat_prefix>.` in stats names.
    pub stat_prefix: String,
    /// Where connections go. Never `ClusterChoice::Header`.
    pub cluster: ClusterChoice,
    /// What the host's metadata has to say, where the weighted cluster says nothing of its own.
    pub metadata_match: Option<MetadataMatch>,
    /// Without a byte in either direction for this long, the connection is closed; `None`: never. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// How many hosts are tried before the connection is given up; at least 1.
    pub max_connect_attempts: u32,
    /// The connection is closed after this long whatever it does.
    pub max_downstream_connection_duration: Option<Duration>,
    /// `max_downstream_connection_duration_jitter_percentage`: that is longer by up to this part of it.
    pub duration_jitter: f64,
    /// What connections are hashed by, where the cluster's load balancer wants a hash.
    pub hash_policy: Box<[HashPolicy]>,
    /// `backoff_options`: the longest pause before the second attempt to connect, and before any; `None`: there is none.
    pub backoff: Option<(Duration, Duration)>,
    /// One line a connection.
    pub access_logs: Vec<AccessLogConfig>,
    /// Hosts are spoken to by HTTP, and get what passes in a request's body.
    pub tunneling: Option<Tunneling>,
}

/// `TcpProxy.TunnelingConfig`
#[derive(Debug)]
pub struct Tunneling {
    /// Where the tunnel leads to: the request's host.
    pub hostname: AddedValue,
    /// It is a POST, to this path; `None`: CONNECT.
    pub post_path: Option<http::uri::PathAndQuery>,
    /// Further headers of the request.
    pub headers: Vec<HeaderAdd>,
}
