//! `ServiceManifest`: what is to hold for calls of one service, and what its own pods may call.
//!
//! It is written as a Kubernetes custom resource, among the manifests of a cluster. Every field is checked while it is read,
//! so that an error names the field; unknown fields are errors.

pub(crate) mod apply;
mod edge;
pub mod files;
mod overrides;

use std::collections::BTreeSet;
use std::fmt;
use std::num::NonZeroU32;
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

pub use self::apply::{egress_of, exposed_services, is_rest_on_demand};
pub use self::edge::{Domains, Edge, Prefix};
pub use self::overrides::{AddressRange, OverrideAction, OverridePolicy, OverrideSources};
use crate::kubernetes::ObjectKey;
use crate::mesh::Protocol;

/// The longest time that can be stated.
const LONGEST: Duration = Duration::from_secs(24 * 60 * 60);
/// The most services that an allow-list may name.
const MAX_EGRESS: usize = 10_000;

/// What a `ServiceManifest` says (its `spec`). What is not stated is as it is without a manifest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ServiceManifest {
    /// What its ports speak, whatever their names say.
    #[serde(deserialize_with = "protocol")]
    pub protocol: Option<Protocol>,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Which calls are tried again.
    pub retries: Option<Retries>,
    /// How much may be under way at a time, in each proxy.
    pub circuit_breakers: CircuitBreakers,
    /// When an endpoint is left out for a while because calls of it fail.
    pub outlier_detection: Option<OutlierDetection>,
    /// How many requests a time each proxy lets through.
    pub rate_limit: Option<RateLimit>,
    /// How proxies find out which endpoints work.
    pub health_check: Option<HealthCheck>,
    /// How its endpoints are spoken to over TLS.
    pub mtls: Option<Mtls>,
    /// The services that its pods may call; all if it is not stated.
    pub egress: Option<Egress>,
    /// Whether proxies of its pods are given the rest when a request needs it; else that is passed through.
    pub on_demand: bool,
    /// What requests may ask for that name it in overrides.
    pub overrides: Option<OverridePolicy>,
    /// Where it is found from outside the mesh; nowhere if it is not stated.
    pub edge: Option<Edge>,
    /// When its object was made, in seconds since the epoch, if that is known.
    #[serde(skip)]
    pub created: Option<i64>,
}

/// How long things may take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Timeouts {
    /// Connecting.
    pub connect: Option<Span>,
    /// A whole request with its retries; `0s` is no limit.
    pub request: Option<SpanOrZero>,
    /// How long a connection may be without requests, or without bytes.
    pub idle: Option<Span>,
}

/// Which calls are tried again.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Retries {
    /// How often, besides the first try; 0 turns retries off.
    pub attempts: u8,
    /// What of. Without it only of what cannot have reached the service.
    pub retry_on: Option<BTreeSet<RetryOn>>,
    /// What `retryOn` was called once, as objects may have it that are stored already.
    pub on: Option<BTreeSet<RetryOn>>,
    /// How long each try may take.
    pub per_try_timeout: Option<Span>,
}

impl Retries {
    /// What of, by whichever name; `retryOn` counts where both are there.
    #[must_use]
    pub fn conditions(&self) -> Option<&BTreeSet<RetryOn>> {
        self.retry_on.as_ref().or(self.on.as_ref())
    }
}

/// What makes a call be tried again, by Envoy's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(
    missing_docs,
    reason = "Envoy documents them: config/http/router_filter, x-envoy-retry-on and x-envoy-retry-grpc-on"
)]
pub enum RetryOn {
    #[serde(rename = "5xx")]
    ServerError,
    GatewayError,
    Reset,
    ResetBeforeRequest,
    ConnectFailure,
    EnvoyRatelimited,
    #[serde(rename = "retriable-4xx")]
    Retriable4xx,
    RefusedStream,
    Cancelled,
    DeadlineExceeded,
    Internal,
    ResourceExhausted,
    Unavailable,
}

impl RetryOn {
    /// Envoy's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ServerError => "5xx",
            Self::GatewayError => "gateway-error",
            Self::Reset => "reset",
            Self::ResetBeforeRequest => "reset-before-request",
            Self::ConnectFailure => "connect-failure",
            Self::EnvoyRatelimited => "envoy-ratelimited",
            Self::Retriable4xx => "retriable-4xx",
            Self::RefusedStream => "refused-stream",
            Self::Cancelled => "cancelled",
            Self::DeadlineExceeded => "deadline-exceeded",
            Self::Internal => "internal",
            Self::ResourceExhausted => "resource-exhausted",
            Self::Unavailable => "unavailable",
        }
    }
}

/// How much may be under way at a time, in each proxy. 1024 (retries: 3) if not stated.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CircuitBreakers {
    /// Connections.
    pub max_connections: Option<u32>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests.
    pub max_requests: Option<u32>,
    /// Retries.
    pub max_retries: Option<u32>,
}

/// When an endpoint is left out for a while.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutlierDetection {
    /// So many failures in a row (5).
    pub consecutive_5xx: Option<u32>,
    /// How often it is looked at (10 s).
    pub interval: Option<Span>,
    /// For how long, the first time (30 s).
    pub base_ejection_time: Option<Span>,
    /// The most of a service's endpoints that are left out (10).
    pub max_ejection_percent: Option<Percent>,
}

/// How many requests a time each proxy lets through.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct RateLimit {
    /// So many.
    pub requests: NonZeroU32,
    /// In this time, at least 50 ms.
    pub per: FillInterval,
    /// So many at once after a pause; as `requests` if not stated.
    pub burst: Option<NonZeroU32>,
}

/// How proxies find out which endpoints work: with a path by an HTTP request; without, of gRPC services by gRPC's health
/// protocol and of others by connecting.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HealthCheck {
    /// What is asked for; 200 is healthy.
    pub path: Option<UrlPath>,
    /// How often.
    pub interval: Span,
    /// How long the answer may take.
    pub timeout: Span,
    /// After how many failures an endpoint does not work (3).
    pub unhealthy_threshold: Option<NonZeroU32>,
    /// After how many successes it works again (2).
    pub healthy_threshold: Option<NonZeroU32>,
    /// Who checks.
    #[serde(default)]
    pub by: CheckedBy,
}

/// TLS between a proxy and the endpoints of a service, with secrets that proxies are given (SDS).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mtls {
    /// The secret whose authorities sign the endpoints' certificates.
    pub authority: SecretName,
    /// What an endpoint's certificate has to have one of: SPIFFE IDs and other URIs, or DNS names.
    pub subject_alt_names: SubjectAltNames,
    /// The secret with the certificate that the proxy shows; the node's own one without it.
    pub certificate: Option<SecretName>,
}

/// The name of a secret: that of a directory, or `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SecretName(pub String);

/// At least one name.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct SubjectAltNames(pub Vec<String>);

impl TryFrom<String> for SecretName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let part =
            |part: &str| !part.is_empty() && part.len() <= 253 && part.bytes().all(|byte| byte.is_ascii_graphic());
        let good = text.split('/').count() <= 2 && text.split('/').all(part);
        if good {
            Ok(Self(text))
        } else {
            Err(format!("`{}` is not a secret: NAME, or NAMESPACE/NAME", text.escape_debug()))
        }
    }
}

impl TryFrom<Vec<String>> for SubjectAltNames {
    type Error = String;
    fn try_from(names: Vec<String>) -> Result<Self, String> {
        if names.is_empty() || names.iter().any(String::is_empty) {
            return Err("without a name anybody would do whom the authority has signed".to_owned());
        }
        Ok(Self(names))
    }
}

/// Who checks endpoints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CheckedBy {
    /// Both of the others.
    #[default]
    Everyone,
    /// Each proxy that calls the service, for itself.
    Callers,
    /// The proxies that check for discovery (HDS), for all.
    Checkers,
}

impl ServiceManifest {
    /// Whether it says nothing but what its pods may call: all that can hold for pods of no service.
    #[must_use]
    pub fn is_of_callers_alone(&self) -> bool {
        let Self { egress, on_demand, created, .. } = self;
        *self == Self { egress: egress.clone(), on_demand: *on_demand, created: *created, ..Self::default() }
    }

    /// Whether another one says the same, whenever it was made.
    #[must_use]
    pub fn says_as(&self, other: &Self) -> bool {
        *self == Self { created: self.created, ..other.clone() }
    }

    /// How proxies that call the service check it for themselves.
    #[must_use]
    pub fn checks_of_callers(&self) -> Option<&HealthCheck> {
        self.health_check.as_ref().filter(|check| check.by != CheckedBy::Checkers || self.mtls.is_some())
    }

    /// How proxies check it that do so for discovery. They have no certificates for it.
    #[must_use]
    pub fn checks_of_checkers(&self) -> Option<&HealthCheck> {
        self.health_check.as_ref().filter(|check| check.by != CheckedBy::Callers && self.mtls.is_none())
    }
}

/// A time above zero, written `250ms`, `1.5s`, `2m` or `1h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Span(pub Duration);

/// A time, written like [`Span`], that may be zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SpanOrZero(pub Duration);

/// A time of at least 50 ms: Envoy fills rate limits no more often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Span")]
pub struct FillInterval(pub Duration);

/// 0 to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "u32")]
pub struct Percent(pub u32);

/// A path that begins with `/`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct UrlPath(pub String);

/// Services that may be called.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<ServiceName>")]
pub struct Egress(pub Vec<ServiceName>);

/// A service, written `name` (in the namespace of the manifest) or `name.namespace`; `name.namespace.cluster` if it is kept
/// apart.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct ServiceName {
    name: String,
    namespace: Option<String>,
}

impl ServiceName {
    /// The service that is meant by a manifest in this namespace.
    #[must_use]
    pub fn seen_from(&self, namespace: &str) -> ObjectKey {
        ObjectKey::new(self.namespace.as_deref().unwrap_or(namespace), &*self.name)
    }
}

fn span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as 250ms, 1.5s, 2m or 1h, of at most 24h");
    let unit = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(wrong)?;
    let (number, unit) = text.split_at(unit);
    let seconds = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    // Neither signs nor exponents.
    if !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return Err(wrong());
    }
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let micros = (number * seconds * 1e6).round();
    // The check against the longest time comes first; below it the cast is exact.
    if !(0.0..=LONGEST.as_secs_f64() * 1e6).contains(&micros) {
        return Err(wrong());
    }
    Ok(Duration::from_micros(micros as u64))
}

impl TryFrom<String> for Span {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        match span(&text)? {
            Duration::ZERO => Err("a time above zero is needed".to_owned()),
            time => Ok(Self(time)),
        }
    }
}

impl TryFrom<String> for SpanOrZero {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        span(&text).map(Self)
    }
}

impl TryFrom<Span> for FillInterval {
    type Error = String;
    fn try_from(Span(time): Span) -> Result<Self, String> {
        if time < Duration::from_millis(50) { Err("at least 50ms is needed".to_owned()) } else { Ok(Self(time)) }
    }
}

impl TryFrom<u32> for Percent {
    type Error = String;
    fn try_from(number: u32) -> Result<Self, String> {
        if number > 100 { Err(format!("{number} is more than 100 percent")) } else { Ok(Self(number)) }
    }
}

impl TryFrom<String> for UrlPath {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let good = text.starts_with('/') && text.len() <= 1024 && text.bytes().all(|byte| byte.is_ascii_graphic());
        if good { Ok(Self(text)) } else { Err("a path that begins with `/` is needed".to_owned()) }
    }
}

impl TryFrom<Vec<ServiceName>> for Egress {
    type Error = String;
    fn try_from(names: Vec<ServiceName>) -> Result<Self, String> {
        if names.len() > MAX_EGRESS { Err(format!("more than {MAX_EGRESS} services")) } else { Ok(Self(names)) }
    }
}

impl TryFrom<String> for ServiceName {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let (name, namespace) = match text.split_once('.') {
            Some((name, namespace)) => (name, Some(namespace)),
            None => (text.as_str(), None),
        };
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        let is_label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(known);
        if !is_label(name) || namespace.is_some_and(|namespace| !namespace.split('.').all(is_label)) {
            return Err(format!("`{text}` is not a service: name, or name.namespace"));
        }
        Ok(Self { name: name.to_owned(), namespace: namespace.map(str::to_owned) })
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.namespace.as_ref().map_or(Ok(()), |namespace| write!(f, ".{namespace}"))
    }
}

fn protocol<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Protocol>, D::Error> {
    let Some(name) = Option::<String>::deserialize(from)? else { return Ok(None) };
    match name.as_str() {
        "tcp" => Ok(Some(Protocol::Tcp)),
        "http" | "http2" | "grpc" => Ok(Protocol::parse(&name)),
        _ => Err(D::Error::custom(format!("`{name}` is not tcp, http, http2 or grpc"))),
    }
}

#[cfg(test)]
pub(crate) mod tests;
