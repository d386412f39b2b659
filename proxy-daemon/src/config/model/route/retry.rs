use std::time::Duration;

use http::HeaderName;

use super::HeaderMatcher;
use crate::config::model::LbMetadata;

/// The base of a retry's pause where nothing else is configured.
pub const DEFAULT_BASE_INTERVAL: Duration = Duration::from_millis(25);

/// `RetryPolicy`.
#[derive(Debug)]
pub struct RetryPolicy {
    /// What is tried again.
    pub retry_on: RetryOn,
    /// How often, beyond the first attempt. Default 1.
    pub num_retries: u32,
    /// Limit of one attempt.
    pub per_try_timeout: Option<Duration>,
    /// `retry_back_off`: `upstream.base_retry_backoff_ms` by default, and without that 25 ms.
    pub base_interval: Option<Duration>,
    /// Ten times the base by default.
    pub max_interval: Option<Duration>,
    /// For `retriable-status-codes`.
    pub retriable_status_codes: Vec<u32>,
    /// An attempt whose upstream says nothing for so long has failed.
    pub per_try_idle_timeout: Option<Duration>,
    /// For `retriable-headers`: a response that one of them matches.
    pub retriable_headers: Vec<HeaderMatcher>,
    /// Only requests that one of them matches are tried again; empty: all.
    pub retriable_request_headers: Vec<HeaderMatcher>,
    /// `rate_limited_retry_back_off`
    pub rate_limited: Option<RateLimitedBackOff>,
    /// Hosts that one of these is against are passed over.
    pub host_predicates: Box<[RetryHostPredicate]>,
    /// How often another host is looked for where the one that was picked is to be passed over. Default 1.
    pub host_selection_attempts: u32,
    /// `previous_priorities`: after so many attempts more, their priorities are avoided.
    pub retry_priority: Option<u32>,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            retry_on: RetryOn::default(),
            num_retries: 1,
            per_try_timeout: None,
            base_interval: None,
            max_interval: None,
            retriable_status_codes: Vec::new(),
            per_try_idle_timeout: None,
            retriable_headers: Vec::new(),
            retriable_request_headers: Vec::new(),
            rate_limited: None,
            host_predicates: Box::default(),
            host_selection_attempts: 1,
            retry_priority: None,
        }
    }
}

/// One of `RetryPolicy.retry_host_predicate`.
#[derive(Debug)]
pub enum RetryHostPredicate {
    /// `previous_hosts`: against those that have failed the request.
    PreviousHosts,
    /// `omit_canary_hosts`: against those whose metadata says `canary` under `envoy.lb`.
    OmitCanaryHosts,
    /// `omit_host_metadata`: against those whose metadata says all of this under `envoy.lb`; nothing: against none.
    OmitHostMetadata(LbMetadata),
}

/// `RetryPolicy.RateLimitedRetryBackOff`: upstreams say when to come back.
#[derive(Debug)]
pub struct RateLimitedBackOff {
    /// The first that a response has, and that says no more than `max_interval`, counts.
    pub reset_headers: Vec<ResetHeader>,
    /// Default 5 minutes.
    pub max_interval: Duration,
}

/// `RetryPolicy.ResetHeader`
#[derive(Debug)]
pub struct ResetHeader {
    /// The header.
    pub name: HeaderName,
    /// Its value is a time in seconds since 1970, not a number of seconds from now.
    pub is_unix_timestamp: bool,
}

/// The kinds of failure of `retry_on`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// `5xx`: any 5xx, or no response at all.
    pub server_error: bool,
    /// `gateway-error`: 502, 503, 504.
    pub gateway_error: bool,
    /// `reset`: no response at all.
    pub reset: bool,
    /// `reset-before-request`: no response, and the request's headers had not been sent.
    pub reset_before_request: bool,
    /// `connect-failure`
    pub connect_failure: bool,
    /// `refused-stream`
    pub refused_stream: bool,
    /// `retriable-4xx`: 409.
    pub retriable_4xx: bool,
    /// `retriable-status-codes`
    pub retriable_status_codes: bool,
    /// `retriable-headers`
    pub retriable_headers: bool,
    /// `envoy-ratelimited`: responses with `x-envoy-ratelimited`, which nothing else retries.
    pub rate_limited: bool,
    /// `cancelled`, `deadline-exceeded`, `internal`, `resource-exhausted`, `unavailable`: a bit for each gRPC status.
    pub grpc_statuses: u32,
}

impl RetryOn {
    /// Takes over the kinds of a list such as `retry_on`, but for those of gRPC.
    ///
    /// Returns the first word that is no such kind.
    pub fn add<'a>(&mut self, kinds: &'a str) -> Option<&'a str> {
        let mut unknown = None;
        for kind in kinds.split(',').map(str::trim).filter(|kind| !kind.is_empty()) {
            match kind {
                "5xx" => self.server_error = true,
                "gateway-error" => self.gateway_error = true,
                "reset" => self.reset = true,
                "reset-before-request" => self.reset_before_request = true,
                "connect-failure" => self.connect_failure = true,
                "refused-stream" => self.refused_stream = true,
                "retriable-4xx" => self.retriable_4xx = true,
                "retriable-status-codes" => self.retriable_status_codes = true,
                "retriable-headers" => self.retriable_headers = true,
                "envoy-ratelimited" => self.rate_limited = true,
                // No upstream is spoken to in HTTP/3.
                "http3-post-connect-failure" => {}
                other => unknown = unknown.or(Some(other)),
            }
        }
        unknown
    }

    /// Takes over the kinds of gRPC of a list such as `x-envoy-retry-grpc-on`.
    pub fn add_grpc(&mut self, kinds: &str) {
        for kind in kinds.split(',').map(str::trim) {
            self.grpc_statuses |= RetryOn::grpc_status(kind).map_or(0, |status| 1 << status);
        }
    }

    /// Whether all words of a list such as `retry_on` are known; `grpc`: of one such as `x-envoy-retry-grpc-on`.
    pub fn is_valid(kinds: &str, grpc: bool) -> bool {
        if !grpc {
            return RetryOn::default().add(kinds).is_none();
        }
        let mut kinds = kinds.split(',').map(str::trim).filter(|kind| !kind.is_empty());
        kinds.all(|kind| RetryOn::grpc_status(kind).is_some())
    }

    /// The gRPC status that this kind of retry is about.
    pub fn grpc_status(kind: &str) -> Option<u32> {
        Some(match kind {
            "cancelled" => 1,
            "deadline-exceeded" => 4,
            "resource-exhausted" => 8,
            "internal" => 13,
            "unavailable" => 14,
            _ => return None,
        })
    }

    /// Whether anything at all is tried again.
    pub fn is_anything(&self) -> bool {
        *self != RetryOn::default()
    }
}
