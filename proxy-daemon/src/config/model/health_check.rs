use std::{path::PathBuf, time::Duration};

use http::{
    HeaderValue, Method,
    uri::{Authority, PathAndQuery},
};

use super::{HeaderMutations, LbMetadata, StringMatcher};

/// A checked `envoy.config.core.v3.HealthCheck`.
#[derive(Debug)]
pub struct HealthCheckConfig {
    /// What it is called in statistics; empty: nothing, and there is no other check.
    pub name: String,
    /// Limit of one check, its connect included.
    pub timeout: Duration,
    /// Between checks of a host that is as it was.
    pub interval: Duration,
    /// The first check waits for a random part of this.
    pub initial_jitter: Duration,
    /// A random part of this is added to each wait.
    pub interval_jitter: Duration,
    /// A random part of so many percent of the wait is added to it.
    pub interval_jitter_percent: u32,
    /// Checks that must fail before a healthy host is unhealthy.
    pub unhealthy_threshold: u32,
    /// Checks that must pass before an unhealthy host is healthy.
    pub healthy_threshold: u32,
    /// Checks go over one connection, as long as it lasts. Default true.
    pub reuse_connection: bool,
    /// Instead of all others while the cluster has had no traffic. Default 60 s.
    pub no_traffic_interval: Duration,
    /// Likewise, for a healthy host. Default: `no_traffic_interval`.
    pub no_traffic_healthy_interval: Duration,
    /// For an unhealthy host. Default: `interval`.
    pub unhealthy_interval: Duration,
    /// After a failure that has not made the host unhealthy yet. Default: `unhealthy_interval`.
    pub unhealthy_edge_interval: Duration,
    /// After a success that has not made the host healthy yet. Default: `interval`.
    pub healthy_edge_interval: Duration,
    /// Every check that fails is logged, and not only the first. Default false.
    pub always_log_failures: bool,
    /// Every check that passes is logged. Default false.
    pub always_log_success: bool,
    /// Where changes are logged.
    pub event_logs: Vec<PathBuf>,
    /// `tls_options.alpn_protocols`: what is said in handshakes of checks instead of what the cluster says. Empty: that.
    pub alpn_protocols: Vec<Vec<u8>>,
    /// `transport_socket_match_criteria`: what chooses the transport socket instead of what hosts say of themselves.
    pub socket_labels: Option<LbMetadata>,
    /// What is asked.
    pub check: Check,
}

/// What a health check asks.
#[derive(Debug)]
pub enum Check {
    /// A request.
    Http(Box<HttpCheck>),
    /// Bytes, or only a connection.
    Tcp(TcpCheck),
    /// `grpc.health.v1.Health`.
    Grpc(GrpcCheck),
    /// `envoy.health_checkers.redis`
    Redis(RedisCheck),
}

/// `HealthCheck.HttpHealthCheck`.
#[derive(Debug)]
pub struct HttpCheck {
    /// The host header: `host`, else the cluster's name.
    pub host: HeaderValue,
    /// It is the cluster's name: an endpoint may say another one.
    pub host_is_default: bool,
    /// The path.
    pub path: PathAndQuery,
    /// The method. Default GET.
    pub method: Method,
    /// The request's body.
    pub send: Vec<u8>,
    /// What the response's body must contain, in this order.
    pub receive: Vec<Vec<u8>>,
    /// How many bytes of the response's body are looked at; 0: all. Default 1024.
    pub response_buffer_size: u64,
    /// `request_headers_to_add` and `request_headers_to_remove`.
    pub headers: HeaderMutations,
    /// Statuses (start, end; the end excluded) of a healthy host. Default 200.
    pub expected_statuses: Vec<(u16, u16)>,
    /// Statuses that count towards `unhealthy_threshold` instead of at once.
    pub retriable_statuses: Vec<(u16, u16)>,
    /// HTTP/2 with prior knowledge, else HTTP/1.1.
    pub http2: bool,
    /// What `x-envoy-upstream-healthchecked-cluster` must be.
    pub service_name_matcher: Option<StringMatcher>,
}

/// `HealthCheck.TcpHealthCheck`.
#[derive(Debug, Default)]
pub struct TcpCheck {
    /// What is sent; may be empty.
    pub send: Vec<u8>,
    /// What must come back, in this order; empty: the connection is enough.
    pub receive: Vec<Vec<u8>>,
}

/// `HealthCheck.GrpcHealthCheck`.
#[derive(Debug)]
pub struct GrpcCheck {
    /// The service that is asked about; empty: the server.
    pub service_name: String,
    /// `:authority`: `authority`, else the cluster's name.
    pub authority: Authority,
    /// It is the cluster's name: an endpoint may say another one.
    pub authority_is_default: bool,
    /// `initial_metadata`.
    pub headers: HeaderMutations,
}

/// `envoy.extensions.health_checkers.redis.v3.Redis`.
#[derive(Debug)]
pub struct RedisCheck {
    /// A host that has this key is not well; empty: it is asked with PING whether it is there.
    pub key: Vec<u8>,
    /// What it is told first: the user, which may be empty, and the password.
    pub auth: Option<(Vec<u8>, Vec<u8>)>,
}
