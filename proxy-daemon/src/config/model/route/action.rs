use std::{ops::Range, sync::Arc, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};

use super::{
    AddedValue, ClusterChoice, FilterConfigOf, HashPolicy, InternalRedirectPolicy, PathRewrite, RegexRewrite,
    RetryPolicy,
};
use crate::{
    config::model::{MetadataMatch, RateLimit, ReplyFormat},
    http::filters::EarlyMutations,
    layered_runtime::RuntimeFraction,
};

/// What a route does with a request.
#[derive(Debug)]
pub enum RouteAction {
    /// Sends it to a cluster.
    Forward(Box<ForwardAction>),
    /// Answers it with a redirect.
    Redirect(Box<RedirectAction>),
    /// Answers it.
    DirectResponse {
        /// The status.
        status: StatusCode,
        /// The body; may be empty.
        body: bytes::Bytes,
        /// What is made of it for each answer; `None`: it is as it is.
        format: Option<Box<ReplyFormat>>,
    },
}

/// Envoy's message `RouteAction`.
#[derive(Debug)]
pub struct ForwardAction {
    /// Where to.
    pub cluster: ClusterChoice,
    /// The answer to a request whose cluster does not exist. Default 503.
    pub cluster_not_found_status: StatusCode,
    /// From the end of the request to the end of the response; `None`: no limit. Default 15 s.
    pub timeout: Option<Duration>,
    /// Overrides the connection manager's `stream_idle_timeout`; `Some(None)` disables it.
    pub idle_timeout: Option<Option<Duration>>,
    /// The same of `stream_flush_timeout`.
    pub flush_timeout: Option<Option<Duration>>,
    /// How long the whole stream may last; `timeout` says nothing then.
    pub max_stream_duration: Option<MaxStreamDuration>,
    /// `max_grpc_timeout`: of gRPC requests, in the place of `timeout`.
    pub grpc_timeout: Option<GrpcTimeout>,
    /// Which failures are tried again.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// `hedge_policy`: an attempt that is late gets another beside it. `None`: as the virtual host says.
    pub hedge_on_per_try_timeout: Option<bool>,
    /// Which of the upstream's redirects are followed; `None`: clients get them all.
    pub internal_redirect: Option<Box<InternalRedirectPolicy>>,
    /// What the path becomes.
    pub path_rewrite: PathRewrite,
    /// Replaces the request's host.
    pub host_rewrite: HostRewrite,
    /// `cors`, as the filter's own parser reads it.
    pub cors: Option<FilterConfigOf>,
    /// A host that is replaced is appended to `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// Circuit breakers of the high priority count this request.
    pub high_priority: bool,
    /// Which other protocols requests may ask for; those that are not named here are the connection manager's to allow.
    pub upgrades: Box<[UpgradeRule]>,
    /// Who gets a copy of requests; empty: those of the virtual host.
    pub mirrors: Box<[MirrorPolicy]>,
    /// What its requests are counted under.
    pub rate_limits: Box<[RateLimit]>,
    /// What they are hashed by, where the cluster's load balancer wants a hash.
    pub hash_policy: Box<[HashPolicy]>,
    /// They are counted under what the virtual host says too.
    pub include_vh_rate_limits: bool,
    /// What the metadata of their hosts has to say, where the cluster has subsets.
    pub metadata_match: Option<MetadataMatch>,
}

impl ForwardAction {
    /// With Envoy's defaults.
    pub fn to(cluster: ClusterChoice) -> ForwardAction {
        ForwardAction {
            cluster,
            cluster_not_found_status: StatusCode::SERVICE_UNAVAILABLE,
            timeout: Some(Duration::from_secs(15)),
            idle_timeout: None,
            flush_timeout: None,
            max_stream_duration: None,
            grpc_timeout: None,
            retry_policy: None,
            hedge_on_per_try_timeout: None,
            internal_redirect: None,
            path_rewrite: PathRewrite::None,
            host_rewrite: HostRewrite::None,
            cors: None,
            append_x_forwarded_host: false,
            high_priority: false,
            upgrades: Box::default(),
            mirrors: Box::default(),
            rate_limits: Box::default(),
            hash_policy: Box::default(),
            include_vh_rate_limits: false,
            metadata_match: None,
        }
    }
}

/// `RouteAction.RequestMirrorPolicy`
#[derive(Debug)]
pub struct MirrorPolicy {
    /// Who gets a copy.
    pub cluster: MirrorCluster,
    /// Of only this share of the requests, by the stream's random number.
    pub share: Option<RuntimeFraction>,
    /// The copy's host ends in `-shadow`.
    pub suffix: bool,
    /// What becomes of the copy's headers.
    pub mutations: EarlyMutations,
    /// The copy's host; it has no further suffix then.
    pub host: Option<HeaderValue>,
}

/// The cluster of a mirror policy.
#[derive(Debug)]
pub enum MirrorCluster {
    /// `cluster`
    Name(Box<str>),
    /// `cluster_header`
    Header(HeaderName),
}

/// `upgrade_configs`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpgradeRule {
    /// As the header `upgrade` names it; compared without case.
    pub protocol: Box<str>,
    /// Requests may ask for it.
    pub enabled: bool,
    /// Of CONNECT: tunnels end here, and hosts get what is in them.
    pub connect: Option<ConnectConfig>,
    /// Of a connection manager: the places in `http_filters` of the filters that such requests meet; `None`: all requests'.
    pub filters: Option<Range<usize>>,
}

/// `RouteAction.UpgradeConfig.ConnectConfig`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectConfig {
    /// What a host is told of the client first.
    pub proxy_protocol: Option<ProxyProtocol>,
    /// POST is as good as CONNECT.
    pub allow_post: bool,
}

/// `ProxyProtocolConfig.Version`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyProtocol {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

/// `RouteAction.max_grpc_timeout`, `grpc_timeout_offset`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcTimeout {
    /// The longest that a `grpc-timeout` may ask for, and what requests without one have; 0 is no limit.
    pub max: Duration,
    /// The time that is taken off a `grpc-timeout` that is longer.
    pub offset: Duration,
}

/// `RouteAction.MaxStreamDuration`: 0 is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MaxStreamDuration {
    /// From the stream's beginning.
    pub max: Option<Duration>,
    /// Requests with a `grpc-timeout` may take so long as that says, and at most this.
    pub grpc_max: Option<Duration>,
    /// The time that is taken off a `grpc-timeout`.
    pub grpc_offset: Option<Duration>,
}

/// Which host name the upstream sees.
#[derive(Debug, Clone)]
pub enum HostRewrite {
    /// The client's.
    None,
    /// This one.
    Literal(HeaderValue),
    /// The chosen endpoint's `hostname`, where it has one.
    Auto,
    /// The value of this request header, where it is there and not empty.
    Header(HeaderName),
    /// What the path, without its query, is rewritten to.
    PathRegex(Box<RegexRewrite>),
    /// Made of what formats can tell of the request; an empty one is none.
    Format(AddedValue),
}

/// `RedirectAction`.
#[derive(Debug)]
pub struct RedirectAction {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    /// `https_redirect` or `scheme_redirect`.
    pub scheme: Option<Box<str>>,
    /// Replaces the host.
    pub host: Option<Box<str>>,
    /// Replaces the port.
    pub port: Option<u16>,
    /// Replaces the path.
    pub path: RedirectPath,
    /// The query is not carried over.
    pub strip_query: bool,
}

/// `RedirectAction.path_rewrite_specifier`.
#[derive(Debug)]
pub enum RedirectPath {
    /// The request's own.
    Keep,
    /// This one; where it holds a `?`, the request's query is dropped.
    Replace(Box<str>),
    /// Replaces what the path match consumed.
    PrefixRewrite(Box<str>),
    /// Replaces every match in the path.
    RegexRewrite(Box<RegexRewrite>),
    /// Made of what formats can tell of the request; an empty one is none.
    Format(AddedValue),
}
