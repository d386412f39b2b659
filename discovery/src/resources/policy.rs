//! What a service's manifest makes of its clusters, routes and chains.

use std::collections::HashMap;
use std::time::Duration as Time;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, OutlierDetection};
use envoy_types::pb::envoy::config::core::v3::health_check::{
    GrpcHealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck,
};
use envoy_types::pb::envoy::config::core::v3::transport_socket::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{HealthCheck, RuntimeFractionalPercent, TransportSocket};
use envoy_types::pb::envoy::config::route::v3::RetryPolicy;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::common_tls_context::{
    CombinedCertificateValidationContext, ValidationContextType,
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::subject_alt_name_matcher::SanType;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::{
    CertificateValidationContext, CommonTlsContext, DownstreamTlsContext, SdsSecretConfig, SubjectAltNameMatcher,
    UpstreamTlsContext,
};
use envoy_types::pb::envoy::r#type::matcher::v3::StringMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::envoy::r#type::v3::{CodecClientType, FractionalPercent, TokenBucket};
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration, UInt32Value};

use super::clusters::over_ads;
use super::pack;
use crate::mesh::Protocol;
use crate::policy::{self, Retries, ServiceManifest};
use crate::secrets;

/// The name of the filter that counts requests.
pub(super) const RATE_LIMIT_FILTER: &str = "envoy.filters.http.local_ratelimit";
const RATE_LIMIT_STATS: &str = "service";

/// A time in the proto's form.
pub(crate) fn duration(time: Time) -> Duration {
    // At most a day.
    let seconds = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Duration { seconds, nanos: i32::try_from(time.subsec_nanos()).unwrap_or_default() }
}

fn number(value: u32) -> UInt32Value {
    UInt32Value { value }
}

/// Adds to a cluster what is stated about it.
pub(super) fn shape(cluster: &mut Cluster, manifest: &ServiceManifest, protocol: Protocol) {
    if let Some(connect) = manifest.timeouts.connect {
        cluster.connect_timeout = Some(duration(connect.0));
    }
    cluster.circuit_breakers = circuit_breakers(manifest);
    cluster.outlier_detection = manifest.outlier_detection.as_ref().map(|outliers| {
        let policy::OutlierDetection { consecutive_5xx, interval, base_ejection_time, max_ejection_percent } = outliers;
        OutlierDetection {
            consecutive_5xx: consecutive_5xx.map(number),
            interval: interval.map(|span| duration(span.0)),
            base_ejection_time: base_ejection_time.map(|span| duration(span.0)),
            max_ejection_percent: max_ejection_percent.map(|percent| number(percent.0)),
            ..Default::default()
        }
    });
    let checks = manifest.checks_of_callers().into_iter();
    cluster.health_checks = checks.map(|check| health_check(check, protocol)).collect();
    cluster.transport_socket = manifest.mtls.as_ref().map(|mtls| transport_socket(mtls, protocol));
}

/// How much may be under way at a time, if that is stated.
pub(super) fn circuit_breakers(manifest: &ServiceManifest) -> Option<CircuitBreakers> {
    let policy::CircuitBreakers { max_connections, max_pending_requests, max_requests, max_retries } =
        manifest.circuit_breakers;
    let thresholds = || Thresholds {
        max_connections: max_connections.map(number),
        max_pending_requests: max_pending_requests.map(number),
        max_requests: max_requests.map(number),
        max_retries: max_retries.map(number),
        ..Default::default()
    };
    let stated = manifest.circuit_breakers != policy::CircuitBreakers::default();
    stated.then(|| CircuitBreakers { thresholds: vec![thresholds()], ..Default::default() })
}

/// How an endpoint that speaks this protocol is checked.
pub(crate) fn health_check(check: &policy::HealthCheck, protocol: Protocol) -> HealthCheck {
    let policy::HealthCheck { path, interval, timeout, unhealthy_threshold, healthy_threshold, by: _ } = check;
    let checker = match (path, protocol) {
        // Nothing is known to be asked: connecting is all that can be tried.
        (_, Protocol::Tcp) | (None, Protocol::Http1 | Protocol::Http2) => {
            HealthChecker::TcpHealthCheck(TcpHealthCheck::default())
        }
        (None, Protocol::Grpc) => HealthChecker::GrpcHealthCheck(GrpcHealthCheck::default()),
        (Some(path), _) => HealthChecker::HttpHealthCheck(HttpHealthCheck {
            path: path.0.clone(),
            codec_client_type: match protocol {
                Protocol::Http2 | Protocol::Grpc => CodecClientType::Http2.into(),
                Protocol::Http1 | Protocol::Tcp => CodecClientType::Http1.into(),
            },
            ..Default::default()
        }),
    };
    HealthCheck {
        timeout: Some(duration(timeout.0)),
        interval: Some(duration(interval.0)),
        unhealthy_threshold: Some(number(unhealthy_threshold.map_or(3, Into::into))),
        healthy_threshold: Some(number(healthy_threshold.map_or(2, Into::into))),
        health_checker: Some(checker),
        ..Default::default()
    }
}

/// A secret that comes over the stream that this comes over.
fn secret(name: String) -> SdsSecretConfig {
    SdsSecretConfig { name, sds_config: Some(over_ads()) }
}

fn tls(context: Any) -> TransportSocket {
    let config_type = Some(ConfigType::TypedConfig(context));
    TransportSocket { name: "envoy.transport_sockets.tls".to_owned(), config_type }
}

fn alpn(protocols: &[&str]) -> Vec<String> {
    protocols.iter().map(|name| (*name).to_owned()).collect()
}

/// How the sidecar of an endpoint is spoken to: with its own certificate, by those whose certificates the same authority has signed.
pub(super) fn downstream_tls(mtls: &policy::Mtls, protocol: Protocol) -> TransportSocket {
    let context = CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret(secrets::OWN.to_owned())],
        validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(secret(
            secrets::authorities_of(&mtls.authority.0),
        ))),
        alpn_protocols: if protocol.is_http() { alpn(&["h2", "http/1.1"]) } else { Vec::new() },
        ..Default::default()
    };
    tls(pack(&DownstreamTlsContext {
        common_tls_context: Some(context),
        require_client_certificate: Some(BoolValue { value: true }),
        ..Default::default()
    }))
}

/// How an edge proxy is spoken to.
pub(super) fn edge_tls(certificate: &str) -> TransportSocket {
    let context = CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret(certificate.to_owned())],
        alpn_protocols: alpn(&["h2", "http/1.1"]),
        ..Default::default()
    };
    tls(pack(&DownstreamTlsContext { common_tls_context: Some(context), ..Default::default() }))
}

/// How an endpoint is spoken to.
fn transport_socket(mtls: &policy::Mtls, protocol: Protocol) -> TransportSocket {
    let policy::Mtls { authority, subject_alt_names, certificate } = mtls;
    let names = subject_alt_names.0.iter().map(|name| {
        let san_type = if name.contains("://") { SanType::Uri } else { SanType::Dns };
        let matcher = StringMatcher { match_pattern: Some(MatchPattern::Exact(name.clone())), ..Default::default() };
        SubjectAltNameMatcher { san_type: san_type.into(), matcher: Some(matcher), ..Default::default() }
    });
    let validation = CombinedCertificateValidationContext {
        default_validation_context: Some(CertificateValidationContext {
            match_typed_subject_alt_names: names.collect(),
            ..Default::default()
        }),
        validation_context_sds_secret_config: Some(secret(secrets::authorities_of(&authority.0))),
        ..Default::default()
    };
    let own = certificate.as_ref().map_or(secrets::OWN, |name| &name.0);
    let protocols: &[&str] = match protocol {
        Protocol::Tcp => &[],
        Protocol::Http1 => &["http/1.1"],
        Protocol::Http2 | Protocol::Grpc => &["h2"],
    };
    let common = CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![secret(own.to_owned())],
        validation_context_type: Some(ValidationContextType::CombinedValidationContext(validation)),
        alpn_protocols: alpn(protocols),
        ..Default::default()
    };
    tls(pack(&UpstreamTlsContext { common_tls_context: Some(common), ..Default::default() }))
}

/// What is tried again. `otherwise` holds where the manifest does not say of what.
pub(super) fn retry_policy(retries: &Retries, otherwise: &str) -> Option<RetryPolicy> {
    let Retries { attempts, per_try_timeout, .. } = retries;
    let retry_on = match retries.conditions() {
        Some(on) => on.iter().map(|on| on.name()).collect::<Vec<_>>().join(","),
        None => otherwise.to_owned(),
    };
    (*attempts > 0).then(|| RetryPolicy {
        retry_on,
        num_retries: Some(number(u32::from(*attempts))),
        per_try_timeout: per_try_timeout.map(|span| duration(span.0)),
        ..Default::default()
    })
}

/// The filter of a chain, which counts nothing by itself.
pub(super) fn rate_limit_filter() -> Any {
    pack(&LocalRateLimit { stat_prefix: RATE_LIMIT_STATS.to_owned(), ..Default::default() })
}

/// What a service's virtual host has for that filter.
pub(super) fn rate_limit(manifest: &ServiceManifest) -> HashMap<String, Any> {
    let always = || {
        let all = FractionalPercent { numerator: 100, denominator: DenominatorType::Hundred.into() };
        Some(RuntimeFractionalPercent { default_value: Some(all), runtime_key: String::new() })
    };
    let limit = manifest.rate_limit.as_ref().map(|limit| {
        let bucket = TokenBucket {
            max_tokens: limit.burst.unwrap_or(limit.requests).into(),
            tokens_per_fill: Some(number(limit.requests.into())),
            fill_interval: Some(duration(limit.per.0)),
        };
        let config = LocalRateLimit {
            stat_prefix: RATE_LIMIT_STATS.to_owned(),
            token_bucket: Some(bucket),
            filter_enabled: always(),
            filter_enforced: always(),
            ..Default::default()
        };
        (RATE_LIMIT_FILTER.to_owned(), pack(&config))
    });
    limit.into_iter().collect()
}
