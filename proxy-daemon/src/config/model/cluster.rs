use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use http::{HeaderName, HeaderValue};

use super::{
    AssignmentPolicy, DnsOptions, HealthOptions, Http1ClientOptions, Http2Options, LbMetadata, LbOptions, LbPolicy,
    MatchedHeader, OrcaMetric, PoolOptions, ResourceRef, SecretRef, SecretType, UpstreamBind, UpstreamTlsContext,
};
use crate::{
    tls::PeerName,
    upstream::{DnsCache, split},
};

/// A checked `envoy.config.cluster.v3.Cluster`.
#[derive(Debug, Clone)]
pub struct ClusterConfig {
    /// Its name, unique in the process.
    pub name: Arc<str>,
    /// `cluster.<this>.` in stats names: `alt_stat_name`, else the name, with `:` as `_`.
    pub stat_name: String,
    /// How its hosts are found.
    pub discovery: Discovery,
    /// How a host is chosen.
    pub lb_policy: LbPolicy,
    /// What holds for all policies alike.
    pub lb: LbOptions,
    /// `lrs_report_endpoint_metrics`: what load reports tell of what hosts report.
    pub reported_metrics: Arc<[OrcaMetric]>,
    /// Limit of one connect. Default 5 s.
    pub connect_timeout: Duration,
    /// What is spoken to its hosts.
    pub protocol: UpstreamProtocol,
    /// How HTTP/1.1 is spoken to them, where it is.
    pub http1: Http1ClientOptions,
    /// `max_requests_per_connection`; 0: no limit.
    pub max_requests_per_connection: u32,
    /// `common_http_protocol_options.max_stream_duration`: of an attempt, from its connection on.
    pub max_stream_duration: Option<Duration>,
    /// An idle pooled connection is closed after this; `None`: never. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// What else holds for connections that are kept.
    pub pool: PoolOptions,
    /// Limits of the default and of the high priority.
    pub circuit_breakers: [Thresholds; 2],
    /// Soft limit in bytes of what is buffered for one connection.
    pub per_connection_buffer_limit_bytes: u32,
    /// `upstream_connection_options.tcp_keepalive`.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// `upstream_bind_config`
    pub bind: Option<Arc<UpstreamBind>>,
    /// Which of a host's addresses come first.
    pub happy_eyeballs: HappyEyeballs,
    /// How its connections are encrypted; `None`: they are plain.
    pub tls: Option<Arc<UpstreamTlsContext>>,
    /// `transport_socket_matches`: how connections to hosts are encrypted of which this is said.
    pub socket_matches: SocketMatches,
    /// `upstream_http_protocol_options`: what a request makes of the handshake with its host; `None`: nothing.
    pub peer_name: Option<PeerNameOptions>,
    /// How its hosts are found to be well or not.
    pub health: HealthOptions,
    /// `track_cluster_stats`: statistics that clusters do not have unless they are asked for.
    pub tracked: TrackedStats,
    /// The hosts of STATIC clusters, and the names of STRICT_DNS and LOGICAL_DNS clusters.
    pub endpoints: Vec<LocalityEndpoints>,
}

/// `TrackClusterStats`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TrackedStats {
    /// How much of their time requests have used.
    pub timeout_budgets: bool,
    /// How large requests and responses are.
    pub request_response_sizes: bool,
    /// What each host counts.
    pub per_endpoint: bool,
}

impl ClusterConfig {
    /// Whether hosts are chosen by hashes of what routes say.
    pub fn wants_hash(&self) -> bool {
        self.lb_policy.wants_hash() && self.lb.hash_policy.is_empty()
    }

    /// Whether connections of the one are as those of the other would be.
    pub fn connects_as(&self, other: &ClusterConfig) -> bool {
        self.protocol == other.protocol
            && self.tcp_keepalive == other.tcp_keepalive
            && self.tls == other.tls
            && self.socket_matches == other.socket_matches
            && self.peer_name == other.peer_name
            && self.bind == other.bind
            && self.idle_timeout == other.idle_timeout
            && self.pool == other.pool
    }

    /// Whether what was found out about hosts for the one is true of the other: where both look in the same place.
    pub fn finds_as(&self, other: &ClusterConfig) -> bool {
        match (&self.discovery, &other.discovery) {
            (Discovery::StrictDns(_), Discovery::StrictDns(_))
            | (Discovery::LogicalDns(_), Discovery::LogicalDns(_)) => self.endpoints == other.endpoints,
            (one, another) => one == another,
        }
    }

    /// The secrets that its connections need, with what each has to be.
    pub fn secrets(&self) -> impl Iterator<Item = (SecretType, &SecretRef)> {
        self.sockets().flatten().flat_map(|tls| tls.common.secrets())
    }

    /// How connections are encrypted, by [`SocketIndex`].
    pub fn sockets(&self) -> impl Iterator<Item = Option<&Arc<UpstreamTlsContext>>> {
        std::iter::once(self.tls.as_ref()).chain(self.socket_matches.0.iter().map(|it| it.tls.as_ref()))
    }
}

/// `Cluster.type`, with what belongs to each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Discovery {
    /// Written into the cluster.
    Static,
    /// Names are looked up, and every address is a host.
    StrictDns(DnsOptions),
    /// One name is looked up, and what it stands for now is one host.
    LogicalDns(DnsOptions),
    /// The endpoint discovery service.
    Eds {
        /// `service_name`, else the cluster's name, and where it comes from.
        endpoints: ResourceRef,
    },
    /// The connection's own destination, or what a header or filter names.
    OriginalDst {
        /// `http_header_name` where `use_http_header` is set.
        http_header: Option<HeaderName>,
        /// Replaces the destination's port.
        port_override: Option<u16>,
        /// A host without use is forgotten after this. Default 5 s.
        cleanup_interval: Duration,
    },
    /// `envoy.clusters.aggregate`: the priorities of other clusters, one after the other.
    Aggregate {
        /// Their names, as configured.
        clusters: Arc<[Arc<str>]>,
    },
    /// `envoy.clusters.dynamic_forward_proxy`: the host that a request names.
    DynamicForwardProxy {
        /// Where names are known.
        cache: Arc<DnsCache>,
        /// `allow_insecure_cluster_options`
        insecure: bool,
    },
}

impl Discovery {
    /// The cluster says itself which host a request goes to: `CLUSTER_PROVIDED`.
    pub fn chooses_hosts(&self) -> bool {
        matches!(
            self,
            Discovery::OriginalDst { .. } | Discovery::Aggregate { .. } | Discovery::DynamicForwardProxy { .. }
        )
    }

    /// How names are looked up, where they are.
    pub fn dns(&self) -> Option<&DnsOptions> {
        match self {
            Discovery::StrictDns(options) | Discovery::LogicalDns(options) => Some(options),
            Discovery::Static
            | Discovery::Eds { .. }
            | Discovery::OriginalDst { .. }
            | Discovery::Aggregate { .. }
            | Discovery::DynamicForwardProxy { .. } => None,
        }
    }
}

/// What is spoken to a cluster's hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UpstreamProtocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2(Http2Options),
    /// What the client speaks.
    Downstream(Http2Options),
    /// What the host chooses in the TLS handshake.
    Auto(Http2Options),
}

/// `UpstreamHttpProtocolOptions`: the name that a request calls its host, in the TLS handshake with that. Something of it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerNameOptions {
    /// `auto_sni`: it is sent, unless it is an address.
    pub sent: bool,
    /// `auto_san_validation`: the host's certificate must be for it.
    pub checked: bool,
    /// `override_auto_sni_header`: where the name is, if that says anything; `None`: the request's host.
    pub header: Option<MatchedHeader>,
}

impl PeerNameOptions {
    /// What a host is called where a request's host, or what is in its place, is this; `None`: the handshake does not go by it.
    pub fn of(&self, authority: &str) -> Option<PeerName> {
        let name = split(authority).0;
        let sent = self.sent && name.parse::<IpAddr>().is_err();
        (sent || self.checked).then(|| PeerName { name: name.to_ascii_lowercase().into(), sent, checked: self.checked })
    }
}

/// `CircuitBreakers.Thresholds`. Defaults: 1024 of each, 3 retries, any number of pools.
#[derive(Debug, Clone, PartialEq)]
pub struct Thresholds {
    /// Connections to all hosts.
    pub max_connections: u32,
    /// Connections to each host, of `per_host_thresholds`.
    pub max_connections_per_host: Option<u32>,
    /// Connection pools of all hosts and workers.
    pub max_connection_pools: u32,
    /// Requests that wait for a connection.
    pub max_pending_requests: u32,
    /// Requests at a time.
    pub max_requests: u32,
    /// Retries at a time.
    pub max_retries: u32,
    /// Counts instead of `max_retries`.
    pub retry_budget: Option<RetryBudget>,
    /// `track_remaining`: statistics tell how much more there may be.
    pub tracks_remaining: bool,
}

/// `CircuitBreakers.Thresholds.RetryBudget`
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RetryBudget {
    /// Of the requests that are under way or wait, so many in a hundred may be retries. Default 20.
    pub percent: f64,
    /// So many retries may be made at a time in any case. Default 3.
    pub min_concurrency: u32,
    /// Not those that are under way or wait count, but those that have begun within this; `None`: they do.
    pub interval: Option<Duration>,
}

impl Thresholds {
    /// Of connection pools: without a limit.
    pub const ANY_POOLS: u32 = u32::MAX;
}

impl Default for Thresholds {
    fn default() -> Thresholds {
        Thresholds {
            max_connections: 1024,
            max_connections_per_host: None,
            max_connection_pools: Thresholds::ANY_POOLS,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
            tracks_remaining: false,
        }
    }
}

/// `TcpKeepalive`: `None` leaves the system's setting.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TcpKeepalive {
    /// Probes without an answer before the connection is dead.
    pub probes: Option<u32>,
    /// Idle time before the first probe.
    pub time: Option<Duration>,
    /// Time between probes.
    pub interval: Option<Duration>,
}

/// `UpstreamConnectionOptions.HappyEyeballsConfig`: how the addresses of a host that has several take turns (RFC 8305, 4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HappyEyeballs {
    /// Of the first family: IPv6 or not; `None`: that of the first address.
    pub first_is_v6: Option<bool>,
    /// So many addresses of the first family come before one of the other. Default 1.
    pub first_count: u32,
}

impl Default for HappyEyeballs {
    fn default() -> HappyEyeballs {
        HappyEyeballs { first_is_v6: None, first_count: 1 }
    }
}

/// The endpoints of one locality at one priority.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LocalityEndpoints {
    /// Where they are.
    pub locality: Locality,
    /// Its share of the load where localities are weighted; 0: none.
    pub weight: u32,
    /// Of the assignment that it is of.
    pub policy: AssignmentPolicy,
    /// 0 is used first.
    pub priority: u32,
    /// In the order of the configuration.
    pub endpoints: Vec<Endpoint>,
}

/// `envoy.config.core.v3.Locality`.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Locality {
    /// For example a cloud's region.
    pub region: String,
    /// A zone of the region.
    pub zone: String,
    /// A part of the zone.
    pub sub_zone: String,
}

/// `LbEndpoint`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: EndpointAddress,
    /// Where else it does: tried in turn where `address` does not answer.
    pub additional_addresses: Box<[SocketAddr]>,
    /// Its share of the load; at least 1.
    pub weight: u32,
    /// What discovery says of it.
    pub health: HealthStatus,
    /// For `auto_host_rewrite`; may be empty.
    pub hostname: Box<str>,
    /// What else is said of it, where anything is.
    pub details: Option<Arc<EndpointDetails>>,
}

impl Endpoint {
    /// How it is checked, where that is other than how it is used.
    pub fn check(&self) -> Option<&EndpointCheck> {
        self.details.as_ref()?.check.as_ref()
    }
}

/// What is said of few endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointDetails {
    /// What its metadata says under `envoy.lb`.
    pub metadata: Option<LbMetadata>,
    /// What its metadata says under `envoy.transport_socket_match`.
    pub socket_labels: Option<LbMetadata>,
    /// What that of its locality says there.
    pub locality_socket_labels: Option<Arc<LbMetadata>>,
    /// How it is checked, where that is other than how it is used.
    pub check: Option<EndpointCheck>,
}

/// `Cluster.TransportSocketMatch`: how connections to some of the hosts are encrypted.
#[derive(Debug, Clone, PartialEq)]
pub struct SocketMatch {
    /// Its name, in statistics.
    pub name: Box<str>,
    /// What a host's metadata has to say.
    pub labels: LbMetadata,
    /// `None`: they are plain.
    pub tls: Option<Arc<UpstreamTlsContext>>,
}

/// `Cluster.transport_socket_matches`
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SocketMatches(pub Arc<[SocketMatch]>);

impl SocketMatches {
    /// How connections to a host are encrypted of which this is said.
    pub fn of(&self, details: Option<&EndpointDetails>) -> SocketIndex {
        let own = details.and_then(|details| details.socket_labels.as_ref());
        self.by(own, details.and_then(|details| details.locality_socket_labels.as_deref()))
    }

    /// The first match of what is said of a host itself, else of what is said of its locality.
    pub fn by(&self, own: Option<&LbMetadata>, localitys: Option<&LbMetadata>) -> SocketIndex {
        let has = |said: Option<&LbMetadata>, wanted: &LbMetadata| {
            wanted.iter().all(|(name, value)| said.and_then(|said| said.get(name)) == Some(value))
        };
        let first = |said| self.0.iter().position(|it| has(said, &it.labels));
        // There are never more than fit: the configuration is refused otherwise.
        SocketIndex(first(own).or_else(|| first(localitys)).map_or(0, |number| number as u16 + 1))
    }
}

/// The place of a transport socket among those of a cluster: 0 is the cluster's own, and then come its matches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SocketIndex(pub u16);

/// `Endpoint.HealthCheckConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EndpointCheck {
    /// Where it is checked instead of at its own address.
    pub address: Option<EndpointAddress>,
    /// The port of that.
    pub port: Option<u16>,
    /// What it is called in checks that do not say it themselves.
    pub hostname: Option<HeaderValue>,
    /// It is not checked, and well.
    pub disabled: bool,
}

impl EndpointCheck {
    /// Where the endpoint at `address` is checked.
    pub fn target(&self, address: &EndpointAddress) -> EndpointAddress {
        match (self.address.as_ref().unwrap_or(address).clone(), self.port) {
            (EndpointAddress::Ip(mut address), Some(port)) => {
                address.set_port(port);
                EndpointAddress::Ip(address)
            }
            (address, _) => address,
        }
    }
}

/// Where an endpoint listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum EndpointAddress {
    /// A literal address.
    Ip(SocketAddr),
    /// A name to look up: STRICT_DNS and LOGICAL_DNS only.
    Dns {
        /// The name.
        host: Box<str>,
        /// The port.
        port: u16,
    },
    /// A Unix socket.
    Pipe(PathBuf),
}

impl EndpointAddress {
    /// As the transports of xDS want it (`Server::endpoints`).
    pub fn dial(&self) -> String {
        match self {
            EndpointAddress::Ip(address) => address.to_string(),
            EndpointAddress::Dns { host, port } => format!("{host}:{port}"),
            EndpointAddress::Pipe(path) => format!("unix:{}", path.display()),
        }
    }
}

/// `envoy.config.core.v3.HealthStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HealthStatus {
    /// Treated as healthy.
    Unknown,
    /// May be used.
    Healthy,
    /// Not used.
    Unhealthy,
    /// Finishes what it has and gets nothing new.
    Draining,
    /// Treated as unhealthy.
    Timeout,
    /// Used where no healthy host is left.
    Degraded,
}

impl HealthStatus {
    /// Whether new requests may go there.
    pub fn is_usable(self) -> bool {
        matches!(self, HealthStatus::Unknown | HealthStatus::Healthy | HealthStatus::Degraded)
    }
}
