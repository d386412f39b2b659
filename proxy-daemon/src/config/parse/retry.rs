use envoy_types::pb::envoy::config::route::v3::RetryPolicy as ProtoPolicy;
use http::StatusCode;

use super::{
    common::{Result, duration, number},
    support::join,
};
use crate::config::{
    FieldError,
    model::{DEFAULT_BASE_INTERVAL, RetryOn, RetryPolicy},
};

pub(super) fn retry_policy(policy: &ProtoPolicy, path: &str) -> Result<RetryPolicy> {
    let back_off = policy.retry_back_off.unwrap_or_default();
    let back_off_path = join(path, "retry_back_off");
    let base = duration(back_off.base_interval, &back_off_path, "base_interval")?;
    let max = duration(back_off.max_interval, &back_off_path, "max_interval")?;
    if max.is_some_and(|max| max < base.unwrap_or(DEFAULT_BASE_INTERVAL)) {
        let text = "max_interval must be greater than or equal to the base_interval";
        return Err(FieldError::new(join(&back_off_path, "max_interval"), text));
    }
    let status = |code: &u32| {
        let status = u16::try_from(*code).ok().and_then(|code| StatusCode::from_u16(code).ok());
        status.ok_or_else(|| FieldError::new(join(path, "retriable_status_codes"), format!("{code} is not a status")))
    };
    Ok(RetryPolicy {
        retry_on: retry_on(&policy.retry_on, path)?,
        num_retries: number(policy.num_retries, 1),
        per_try_timeout: duration(policy.per_try_timeout, path, "per_try_timeout")?.filter(|limit| !limit.is_zero()),
        base_interval: base,
        max_interval: max,
        retriable_status_codes: policy.retriable_status_codes.iter().map(status).collect::<Result<_>>()?,
    })
}

fn retry_on(kinds: &str, path: &str) -> Result<RetryOn> {
    let mut on = RetryOn::default();
    for kind in kinds.split(',').map(str::trim).filter(|kind| !kind.is_empty()) {
        match kind {
            "5xx" => on.server_error = true,
            "gateway-error" => on.gateway_error = true,
            "reset" => on.reset = true,
            "reset-before-request" => on.reset_before_request = true,
            "connect-failure" => on.connect_failure = true,
            "refused-stream" => on.refused_stream = true,
            "retriable-4xx" => on.retriable_4xx = true,
            "retriable-status-codes" => on.retriable_status_codes = true,
            "envoy-ratelimited"
            | "retriable-headers"
            | "http3-post-connect-failure"
            | "cancelled"
            | "deadline-exceeded"
            | "internal"
            | "resource-exhausted"
            | "unavailable" => {
                return Err(FieldError::new(join(path, "retry_on"), format!("{kind} is not supported by culvert yet")));
            }
            // Envoy passes over what it does not know.
            unknown => tracing::warn!(field = %join(path, "retry_on"), kind = unknown, "unknown kind of retry"),
        }
    }
    Ok(on)
}
