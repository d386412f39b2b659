use std::time::Duration;

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::config::core::v3::RetryPolicy as CallPolicy;
use envoy_types::pb::envoy::config::route::v3::{
    HeaderMatcher as ProtoHeader, RetryPolicy as ProtoPolicy,
    retry_policy::{
        RateLimitedRetryBackOff, ResetHeaderFormat, RetryHostPredicate as ProtoPredicate,
        retry_host_predicate::ConfigType, retry_priority::ConfigType as PriorityConfig,
    },
};
use envoy_types::pb::envoy::extensions::retry::host::{
    omit_canary_hosts::v3::OmitCanaryHostsPredicate, omit_host_metadata::v3::OmitHostMetadataConfig,
    previous_hosts::v3::PreviousHostsPredicate,
};
use envoy_types::pb::envoy::extensions::retry::priority::previous_priorities::v3::PreviousPrioritiesConfig;

use super::{
    common::{Result, duration, header_name, number, required, type_name},
    matcher,
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{
            DEFAULT_BASE_INTERVAL, HeaderMatcher, RateLimitedBackOff, ResetHeader, RetryHostPredicate, RetryOn,
            RetryPolicy,
        },
    },
    http::metadata::object,
};

/// More picks than this find no other host either.
const MAX_HOST_SELECTION_ATTEMPTS: u32 = 1000;
/// The base of the pauses between calls, where nothing else is said.
const DEFAULT_BASE_OF_CALLS: Duration = Duration::from_secs(1);
/// The longest wait that an upstream may ask for, where nothing else is said.
const RATE_LIMITED_MAX_INTERVAL: Duration = Duration::from_secs(300);

pub(super) fn retry_policy(policy: &ProtoPolicy, path: &str) -> Result<RetryPolicy> {
    let back_off = policy.retry_back_off.unwrap_or_default();
    let back_off_path = join(path, "retry_back_off");
    let base = duration(back_off.base_interval, &back_off_path, "base_interval")?;
    let max = duration(back_off.max_interval, &back_off_path, "max_interval")?;
    if max.is_some_and(|max| max < base.unwrap_or(DEFAULT_BASE_INTERVAL)) {
        let text = "max_interval must be greater than or equal to the base_interval";
        return Err(FieldError::new(join(&back_off_path, "max_interval"), text));
    }
    let rate_limited = policy.rate_limited_retry_back_off.as_ref();
    let rate_limited = rate_limited.map(|back_off| self::rate_limited(back_off, path)).transpose()?;
    if let Some(predicate) = policy.retry_options_predicates.first() {
        // Envoy's words: it has none.
        let wanted = predicate.typed_config.as_ref().map(type_name).unwrap_or_default();
        let text =
            format!("Didn't find a registered implementation for '{}' with type URL: '{wanted}'", predicate.name);
        return Err(FieldError::new(format!("{}[0].typed_config", join(path, "retry_options_predicates")), text));
    }
    // Envoy makes a number without a sign of it: fewer than none are without end. Here they have one.
    let attempts = match policy.host_selection_retry_max_attempts {
        0 => 1,
        attempts => u32::try_from(attempts).unwrap_or(u32::MAX),
    };
    Ok(RetryPolicy {
        retry_on: retry_on(&policy.retry_on, path),
        num_retries: number(policy.num_retries, 1),
        per_try_timeout: duration(policy.per_try_timeout, path, "per_try_timeout")?.filter(|limit| !limit.is_zero()),
        per_try_idle_timeout: duration(policy.per_try_idle_timeout, path, "per_try_idle_timeout")?
            .filter(|limit| !limit.is_zero()),
        base_interval: base,
        max_interval: max,
        retriable_status_codes: policy.retriable_status_codes.clone(),
        retriable_headers: headers(&policy.retriable_headers, path, "retriable_headers")?,
        retriable_request_headers: headers(&policy.retriable_request_headers, path, "retriable_request_headers")?,
        rate_limited,
        host_predicates: host_predicates(policy, path)?,
        host_selection_attempts: attempts.min(MAX_HOST_SELECTION_ATTEMPTS),
        retry_priority: retry_priority(policy, path)?,
    })
}

/// How calls that the proxy makes itself are tried again.
///
/// # Errors
/// The field that is wrong or not honoured.
pub(crate) fn of_calls(policy: &CallPolicy, path: &str) -> Result<RetryPolicy> {
    let back_off = policy.retry_back_off.unwrap_or_default();
    let path_of = join(path, "retry_back_off");
    let base = duration(back_off.base_interval, &path_of, "base_interval")?.unwrap_or(DEFAULT_BASE_OF_CALLS);
    let max = duration(back_off.max_interval, &path_of, "max_interval")?.unwrap_or(base.saturating_mul(10));
    if max < base {
        let text = "max_interval must be greater than or equal to the base_interval";
        return Err(FieldError::new(join(&path_of, "max_interval"), text));
    }
    Ok(RetryPolicy {
        // Without any, nothing is tried again, as in Envoy.
        retry_on: retry_on(&policy.retry_on, path),
        num_retries: number(policy.num_retries, 1),
        // As in Envoy.
        per_try_timeout: Some(max),
        base_interval: Some(base),
        max_interval: Some(max),
        ..RetryPolicy::default()
    })
}

fn headers(matchers: &[ProtoHeader], path: &str, field: &str) -> Result<Vec<HeaderMatcher>> {
    let parse =
        |(index, item): (usize, &ProtoHeader)| matcher::header(item, &format!("{}[{index}]", join(path, field)));
    matchers.iter().enumerate().map(parse).collect()
}

fn rate_limited(back_off: &RateLimitedRetryBackOff, path: &str) -> Result<RateLimitedBackOff> {
    let path = join(path, "rate_limited_retry_back_off");
    let parse = |(index, header): (usize, &envoy_types::pb::envoy::config::route::v3::retry_policy::ResetHeader)| {
        let path = format!("{}[{index}]", join(&path, "reset_headers"));
        Ok(ResetHeader {
            name: header_name(&header.name, &join(&path, "name"))?,
            is_unix_timestamp: header.format == ResetHeaderFormat::UnixTimestamp as i32,
        })
    };
    let max_interval = duration(back_off.max_interval, &path, "max_interval")?;
    Ok(RateLimitedBackOff {
        reset_headers: back_off.reset_headers.iter().enumerate().map(parse).collect::<Result<_>>()?,
        max_interval: max_interval.unwrap_or(RATE_LIMITED_MAX_INTERVAL),
    })
}

fn host_predicates(policy: &ProtoPolicy, path: &str) -> Result<Box<[RetryHostPredicate]>> {
    let parse = |(index, predicate): (usize, &ProtoPredicate)| {
        let path = format!("{}[{index}].typed_config", join(path, "retry_host_predicate"));
        let Some(ConfigType::TypedConfig(config)) = &predicate.config_type else {
            return Err(required(&path, "typed_config"));
        };
        match type_name(config) {
            "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate" => {
                let PreviousHostsPredicate {} = unpack(config, &path)?;
                Ok(RetryHostPredicate::PreviousHosts)
            }
            "envoy.extensions.retry.host.omit_canary_hosts.v3.OmitCanaryHostsPredicate" => {
                let OmitCanaryHostsPredicate {} = unpack(config, &path)?;
                Ok(RetryHostPredicate::OmitCanaryHosts)
            }
            "envoy.extensions.retry.host.omit_host_metadata.v3.OmitHostMetadataConfig" => {
                let config: OmitHostMetadataConfig = unpack(config, &path)?;
                let fields = config.metadata_match.as_ref().and_then(|it| it.filter_metadata.get("envoy.lb"));
                Ok(RetryHostPredicate::OmitHostMetadata(fields.map(object).unwrap_or_default()))
            }
            _ => Err(FieldError::unsupported(path)),
        }
    };
    policy.retry_host_predicate.iter().enumerate().map(parse).collect()
}

fn retry_priority(policy: &ProtoPolicy, path: &str) -> Result<Option<u32>> {
    let Some(priority) = &policy.retry_priority else { return Ok(None) };
    let path = join(path, "retry_priority.typed_config");
    let Some(PriorityConfig::TypedConfig(config)) = &priority.config_type else {
        return Err(required(&path, "typed_config"));
    };
    let PreviousPrioritiesConfig { update_frequency } = unpack(config, &path)?;
    Ok(Some(u32::try_from(update_frequency).unwrap_or(1).max(1)))
}

fn retry_on(kinds: &str, path: &str) -> RetryOn {
    let mut on = RetryOn::default();
    on.add(kinds);
    on.add_grpc(kinds);
    let mut known = RetryOn::default();
    for kind in kinds.split(',').map(str::trim).filter(|kind| RetryOn::grpc_status(kind).is_none()) {
        // Envoy passes over what it does not know.
        if let Some(unknown) = known.add(kind) {
            tracing::warn!(field = %join(path, "retry_on"), kind = unknown, "unknown kind of retry");
        }
    }
    on
}
