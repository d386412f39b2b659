//! What a service's manifest makes of its clusters, routes and chains.

use std::collections::HashMap;
use std::time::Duration as Time;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, OutlierDetection};
use envoy_types::pb::envoy::config::core::v3::health_check::{
    GrpcHealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck,
};
use envoy_types::pb::envoy::config::core::v3::{HealthCheck, RuntimeFractionalPercent};
use envoy_types::pb::envoy::config::route::v3::RetryPolicy;
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::r#type::v3::fractional_percent::DenominatorType;
use envoy_types::pb::envoy::r#type::v3::{CodecClientType, FractionalPercent, TokenBucket};
use envoy_types::pb::google::protobuf::{Any, Duration, UInt32Value};

use super::pack;
use crate::mesh::Protocol;
use crate::policy::{self, Retries, ServiceManifest};

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
    let policy::CircuitBreakers { max_connections, max_pending_requests, max_requests, max_retries } =
        manifest.circuit_breakers;
    if manifest.circuit_breakers != policy::CircuitBreakers::default() {
        let thresholds = Thresholds {
            max_connections: max_connections.map(number),
            max_pending_requests: max_pending_requests.map(number),
            max_requests: max_requests.map(number),
            max_retries: max_retries.map(number),
            ..Default::default()
        };
        cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![thresholds], ..Default::default() });
    }
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
    let checks = manifest.health_check.iter().filter(|check| check.by.by_callers());
    cluster.health_checks = checks.map(|check| health_check(check, protocol)).collect();
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

/// What is tried again. `otherwise` holds where the manifest does not say of what.
pub(super) fn retry_policy(retries: &Retries, otherwise: &str) -> Option<RetryPolicy> {
    let Retries { attempts, on, per_try_timeout } = retries;
    let retry_on = match on {
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
