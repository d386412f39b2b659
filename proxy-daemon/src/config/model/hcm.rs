use std::{ops::Range, sync::Arc, time::Duration};

use http::HeaderValue;

use super::{
    AccessLogConfig, Cidr, Http1Options, IpDetection, LocalReplies, MatchTree, ResourceRef, RouteConfig, Scheme,
    ScopedRoutes, SecretRef, SecretType, UpgradeRule,
};
use crate::http::{
    filters::{DiscoveredFilter, EarlyMutations, FilterSource},
    match_input::RequestInput,
};

/// A checked `HttpConnectionManager`. Durations that are `None` are disabled.
#[derive(Debug)]
pub struct HttpConnectionManagerConfig {
    /// `http.<stat_prefix>.` in stats names.
    pub stat_prefix: String,
    /// Which protocols a client may speak.
    pub codec_type: CodecType,
    /// Where the routes come from.
    pub routes: RouteSource,
    /// In the order in which a request meets them; the last is the router. After them come those of `upgrades`.
    pub http_filters: Vec<HttpFilterEntry>,
    /// The places of those that a request meets which asks for no other protocol.
    pub chain: Range<usize>,
    /// The `server` response header. Default `envoy`.
    pub server_name: HeaderValue,
    /// What becomes of an upstream's `server` header.
    pub server_header: ServerHeaderTransformation,
    /// The peer's address is the client's address, and is appended to `x-forwarded-for`.
    pub use_remote_address: bool,
    /// How many proxies in front are trusted to have written `x-forwarded-for`.
    pub xff_num_trusted_hops: u32,
    /// `x-forwarded-for` is left as it came.
    pub skip_xff_append: bool,
    /// How clients' addresses are found, where not by `use_remote_address`; the first that finds one counts. Empty: by
    /// `x-forwarded-for`, as the fields before this one say.
    pub ip_detection: Box<[IpDetection]>,
    /// Upstreams are told the name of this service.
    pub add_user_agent: bool,
    /// The scheme that requests are taken to have come by, whatever they say: also their `x-forwarded-proto`.
    pub scheme: Option<Scheme>,
    /// Client addresses that count as internal; empty: none.
    pub internal_ranges: Vec<Cidr>,
    /// A request without `x-request-id` gets one.
    pub generate_request_id: bool,
    /// An edge request keeps the `x-request-id` it came with.
    pub preserve_external_request_id: bool,
    /// A kept id says that it is not traced.
    pub pack_trace_reason: bool,
    /// Responses carry the request's `x-request-id`.
    pub always_set_request_id_in_response: bool,
    /// `via` is appended with this in both directions.
    pub via: Option<HeaderValue>,
    /// A connection without a stream is closed after this. Default 1 h.
    pub idle_timeout: Option<Duration>,
    /// A stream without progress is reset after this. Default 5 min.
    pub stream_idle_timeout: Option<Duration>,
    /// The whole request must have arrived within this.
    pub request_timeout: Option<Duration>,
    /// The request's headers must have arrived within this.
    pub request_headers_timeout: Option<Duration>,
    /// A connection is drained after this.
    pub max_connection_duration: Option<Duration>,
    /// `max_connection_duration_jitter`: that is longer by up to this part of it.
    pub duration_jitter: f64,
    /// A connection is drained after so many requests; 0: never.
    pub max_requests_per_connection: u32,
    /// Limit of a request's header bytes, in KiB. Default 60.
    pub max_request_headers_kb: u32,
    /// Limit of a request's header count. Default 100.
    pub max_headers_count: u32,
    /// `/a/../b` becomes `/b` before the route is chosen.
    pub normalize_path: bool,
    /// `//` becomes `/`.
    pub merge_slashes: bool,
    /// What becomes of a request's headers then, in this order.
    pub early_mutations: Box<[EarlyMutations]>,
    /// What becomes of a request's host, path and header names before its route is chosen.
    pub rules: RequestRules,
    /// A stream may last so long, where its route does not say.
    pub max_stream_duration: Option<Duration>,
    /// A connection that is old or idle has so long until it ends: what comes meanwhile is served. Default 5 s.
    pub drain_timeout: Duration,
    /// It may have longer, at random, by as much as this share of that. Default 0.
    pub drain_jitter: f64,
    /// An HTTP/1 connection that is old ends with the next response, however long that takes.
    pub http1_safe_max_connection_duration: bool,
    /// A request that is answered with 400 leaves its HTTP/1 connection open, where it has been read as a whole.
    pub http1_stays_open: bool,
    /// A line is written when a request's head is there, beside the one at its end.
    pub log_new_requests: bool,
    /// The request's `expect` is the upstream's business, and its interim responses are passed on.
    pub proxy_100_continue: bool,
    /// So often a line is written of a request that is under way.
    pub log_interval: Option<Duration>,
    /// An HTTP/2 client must take what is left of a response that is here whole within this; `None`: it has for ever.
    pub stream_flush_timeout: Option<Duration>,
    /// And one when a client has got the protocol that it asked for.
    pub log_tunnels: bool,
    /// Responses say why they are not the upstream's; `None`: they do not.
    pub proxy_status: Option<Box<ProxyStatus>>,
    /// HTTP/2 hosts are told the scheme that they are spoken to by.
    pub scheme_matches_upstream: bool,
    /// A client that is still sending has so long to see the last answer. Default 1 s.
    pub delayed_close_timeout: Option<Duration>,
    /// What becomes of the answers that are made here; `None`: they stay.
    pub local_replies: Option<Arc<LocalReplies>>,
    /// HTTP/1 as clients may speak it.
    pub http1: Http1Options,
    /// HTTP/2 limits.
    pub http2: Http2Options,
    /// One line a request.
    pub access_logs: Vec<AccessLogConfig>,
    /// What becomes of `x-forwarded-client-cert`.
    pub forward_client_cert: ForwardedCert,
    /// The same of the requests that it finds something for.
    pub forward_client_cert_matcher: Option<MatchTree<RequestInput, ForwardedCert>>,
    /// Which other protocols requests may ask for, where their route does not say.
    pub upgrades: Box<[UpgradeRule]>,
}

impl Default for HttpConnectionManagerConfig {
    /// Envoy's defaults, with neither routes nor filters.
    fn default() -> HttpConnectionManagerConfig {
        HttpConnectionManagerConfig {
            stat_prefix: String::new(),
            codec_type: CodecType::Auto,
            routes: RouteSource::Static(Arc::default()),
            http_filters: Vec::new(),
            chain: 0..0,
            server_name: HeaderValue::from_static("envoy"),
            server_header: ServerHeaderTransformation::Overwrite,
            use_remote_address: false,
            xff_num_trusted_hops: 0,
            skip_xff_append: false,
            ip_detection: Box::default(),
            add_user_agent: false,
            scheme: None,
            internal_ranges: Vec::new(),
            generate_request_id: true,
            preserve_external_request_id: false,
            pack_trace_reason: true,
            always_set_request_id_in_response: false,
            via: None,
            idle_timeout: Some(Duration::from_secs(3600)),
            stream_idle_timeout: Some(Duration::from_secs(300)),
            request_timeout: None,
            request_headers_timeout: None,
            max_connection_duration: None,
            duration_jitter: 0.0,
            max_requests_per_connection: 0,
            max_request_headers_kb: 60,
            max_headers_count: 100,
            normalize_path: false,
            merge_slashes: false,
            early_mutations: Box::default(),
            rules: RequestRules::default(),
            max_stream_duration: None,
            delayed_close_timeout: Some(Duration::from_secs(1)),
            drain_timeout: Duration::from_secs(5),
            drain_jitter: 0.0,
            http1_safe_max_connection_duration: false,
            http1_stays_open: false,
            log_new_requests: false,
            proxy_100_continue: false,
            log_interval: None,
            stream_flush_timeout: Some(Duration::from_secs(300)),
            log_tunnels: false,
            proxy_status: None,
            scheme_matches_upstream: false,
            local_replies: None,
            http1: Http1Options::default(),
            http2: Http2Options::default(),
            access_logs: Vec::new(),
            forward_client_cert: ForwardedCert::default(),
            forward_client_cert_matcher: None,
            upgrades: Box::default(),
        }
    }
}

/// `HttpConnectionManager.ProxyStatusConfig`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyStatus {
    /// Who says it.
    pub name: ProxyName,
    /// With what `%RESPONSE_CODE_DETAILS%` says.
    pub details: bool,
    /// And with the response's flags.
    pub flags: bool,
    /// The response's status is the one that RFC 9209 recommends.
    pub recommended_status: bool,
}

/// What a proxy is called in `proxy-status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProxyName {
    /// As `server_name` says.
    Server,
    /// By the node's id.
    Node,
    /// By this name.
    Literal(String),
}

/// How requests are made the same before their routes are chosen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestRules {
    /// Which ports go from hosts.
    pub strip_port: StripPort,
    /// A dot at the end of a host goes.
    pub strip_trailing_host_dot: bool,
    /// What becomes of a path with `%2F` or `%5C`.
    pub escaped_slashes: EscapedSlashes,
    /// What becomes of a header with `_` in its name.
    pub underscores: Underscores,
    /// `x-forwarded-port` is the port of the listener, unless a proxy that is trusted has told another.
    pub append_x_forwarded_port: bool,
}

/// `strip_matching_host_port`, `strip_any_host_port`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum StripPort {
    /// They stay.
    #[default]
    None,
    /// The listener's own.
    Matching,
    /// All.
    Any,
}

/// `HttpConnectionManager.PathWithEscapedSlashesAction`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EscapedSlashes {
    /// It stays.
    #[default]
    Keep,
    /// The request is refused with 400.
    Reject,
    /// The client is told to ask for the path without them.
    Redirect,
    /// They become slashes.
    Unescape,
}

/// `HttpProtocolOptions.HeadersWithUnderscoresAction`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Underscores {
    /// It stays.
    #[default]
    Allow,
    /// The request is refused with 400.
    Reject,
    /// It goes.
    Drop,
}

/// `HttpConnectionManager.ForwardClientCertConfig`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForwardedCert {
    /// What becomes of the header.
    pub mode: ForwardClientCert,
    /// What it says of a client's certificate, where it is written.
    pub details: ClientCertDetails,
}

/// `HttpConnectionManager.ForwardClientCertDetails`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ForwardClientCert {
    /// Hosts do not get it.
    #[default]
    Sanitize,
    /// What a client with a certificate sends is passed on.
    ForwardOnly,
    /// What a client with a certificate sends is passed on, and what its certificate says is added.
    AppendForward,
    /// It says what the client's certificate says, whatever the client sends.
    SanitizeSet,
    /// What any client sends is passed on.
    AlwaysForwardOnly,
}

/// `HttpConnectionManager.SetCurrentClientCertDetails`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientCertDetails {
    /// `Subject`
    pub subject: bool,
    /// `Cert`: the certificate itself.
    pub cert: bool,
    /// `Chain`: all that the client has shown.
    pub chain: bool,
    /// `DNS`, for each of these names.
    pub dns: bool,
    /// `URI`, for each of these names.
    pub uri: bool,
    /// `Issuer`
    pub issuer: bool,
    /// In JSON, where the client has not said anything in the other format.
    pub json: bool,
}

impl HttpConnectionManagerConfig {
    /// The route configuration that RDS delivers for it.
    pub fn rds(&self) -> Option<&ResourceRef> {
        match &self.routes {
            RouteSource::Rds(wanted) => Some(wanted),
            RouteSource::Static(_) | RouteSource::Scoped(_) => None,
        }
    }

    /// Its scopes, where it has any.
    pub fn scoped(&self) -> Option<&ScopedRoutes> {
        match &self.routes {
            RouteSource::Scoped(scoped) => Some(scoped),
            RouteSource::Static(_) | RouteSource::Rds(_) => None,
        }
    }

    /// The secrets that its filters need.
    pub fn secrets(&self) -> impl Iterator<Item = (SecretType, &SecretRef)> {
        let secrets = self.http_filters.iter().filter_map(|entry| entry.source.secret());
        secrets.map(|secret| (SecretType::GenericSecret, secret))
    }

    /// The filters that ECDS configures.
    pub fn discovered_filters(&self) -> impl Iterator<Item = &Arc<DiscoveredFilter>> {
        self.http_filters.iter().filter_map(|entry| entry.source.discovered())
    }
}

/// A configured HTTP filter.
#[derive(Debug, Clone)]
pub struct HttpFilterEntry {
    /// The name in the configuration: per-route configuration is found by it.
    pub name: Arc<str>,
    /// It takes part only where a route says so.
    pub disabled: bool,
    /// Where its configuration is had from.
    pub source: FilterSource,
}

/// `HttpConnectionManager.CodecType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodecType {
    /// HTTP/2 where the connection begins with its preface, else HTTP/1.
    Auto,
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
}

/// Where a connection manager's routes come from.
#[derive(Debug, Clone)]
pub enum RouteSource {
    /// Written into the listener.
    Static(Arc<RouteConfig>),
    /// The route discovery service.
    Rds(ResourceRef),
    /// One of many route configurations, chosen by what the request says.
    Scoped(Arc<ScopedRoutes>),
}

/// `HttpConnectionManager.ServerHeaderTransformation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerHeaderTransformation {
    /// Ours replaces the upstream's.
    Overwrite,
    /// Ours is set where the upstream sent none.
    AppendIfAbsent,
    /// The upstream's passes, and none is added.
    PassThrough,
}

/// `Http2ProtocolOptions`, for both sides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http2Options {
    /// Streams at a time on one connection. Envoy's default is 1024 (since 1.36).
    pub max_concurrent_streams: u32,
    /// Bytes of a stream's flow-control window. Default 16 MiB.
    pub initial_stream_window_size: u32,
    /// Bytes of the connection's flow-control window. Default 24 MiB.
    pub initial_connection_window_size: u32,
    /// Other protocols may be asked for by CONNECT with a protocol (RFC 8441).
    pub allow_connect: bool,
    /// Frames without anything in them that a client may send in a row. Default 1.
    pub max_consecutive_inbound_frames_with_empty_payload: u32,
    /// PRIORITY frames for each stream that a client has opened. Default 100.
    pub max_inbound_priority_frames_per_stream: u32,
    /// WINDOW_UPDATE frames for each DATA frame that a client was sent. Default 10.
    pub max_inbound_window_update_frames_per_data_frame_sent: u32,
    /// The size of the table that the other side may compress headers with, in bytes. Default 4096.
    pub hpack_table_size: Option<u32>,
    /// `connection_keepalive`; `None`: there are no pings.
    pub keepalive: Option<Http2Keepalive>,
    /// `override_stream_error_on_invalid_http_message`: what is malformed is no matter of the connection. That it costs its stream alone
    /// is so in any case; this says what is counted.
    pub counts_streams: bool,
}

/// Pings of an HTTP/2 connection: `KeepaliveSettings`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Http2Keepalive {
    /// From the answer to one to the next one.
    pub interval: Duration,
    /// How long an answer may take.
    pub timeout: Duration,
    /// By which `interval` is longer at most, at random.
    pub jitter: Duration,
}

impl Default for Http2Options {
    fn default() -> Http2Options {
        Http2Options {
            max_concurrent_streams: 1024,
            initial_stream_window_size: 16 << 20,
            initial_connection_window_size: 24 << 20,
            allow_connect: false,
            max_consecutive_inbound_frames_with_empty_payload: 1,
            max_inbound_priority_frames_per_stream: 100,
            max_inbound_window_update_frames_per_data_frame_sent: 10,
            hpack_table_size: None,
            keepalive: None,
            counts_streams: false,
        }
    }
}
