//! Which failures are tried again (facts of `retry_on`), and after how long.

use std::{sync::LazyLock, time::Duration};

use http::StatusCode;

use crate::{
    config::model::{DEFAULT_BASE_INTERVAL, RetryPolicy},
    layered_runtime::{Key, RuntimeInteger},
};

/// Milliseconds, where the policy has no base of its own.
static BASE_BACK_OFF: LazyLock<Key> = LazyLock::new(|| Key::new("upstream.base_retry_backoff_ms"));
/// The percentage of retries that are made at all.
static USE_RETRY: LazyLock<RuntimeInteger> =
    LazyLock::new(|| RuntimeInteger { default: 100, key: Key::optional("upstream.use_retry") });

/// How an attempt failed without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// No connection could be opened: nothing was sent.
    Connect,
    /// The connection broke before any of the request was sent.
    BeforeRequest,
    /// The upstream refused the stream (REFUSED_STREAM, or a GOAWAY that excludes it): it did nothing with it.
    Refused,
    /// The connection or stream broke after the request was sent.
    AfterRequest,
    /// `per_try_timeout` passed.
    PerTryTimeout,
}

/// Whether the policy wants a failure without a response tried again.
pub(super) fn wants_failure(policy: &RetryPolicy, failure: Failure) -> bool {
    let on = &policy.retry_on;
    let any_reset = on.server_error || on.gateway_error || on.reset;
    match failure {
        Failure::Connect => any_reset || on.connect_failure || on.reset_before_request,
        Failure::BeforeRequest => any_reset || on.reset_before_request,
        Failure::Refused => any_reset || on.refused_stream,
        Failure::AfterRequest => any_reset,
        Failure::PerTryTimeout => any_reset,
    }
}

/// Whether the policy wants a response tried again.
pub(super) fn wants_status(policy: &RetryPolicy, status: StatusCode) -> bool {
    let on = &policy.retry_on;
    (on.server_error && status.is_server_error())
        || (on.gateway_error && matches!(status.as_u16(), 502..=504))
        || (on.retriable_4xx && status == StatusCode::CONFLICT)
        || (on.retriable_status_codes && policy.retriable_status_codes.contains(&status))
}

/// Whether any response at all may be tried again: only then is a copy of the request kept.
pub(super) fn may_want_status(policy: &RetryPolicy) -> bool {
    let on = &policy.retry_on;
    on.server_error || on.gateway_error || on.retriable_4xx || on.retriable_status_codes || on.reset
}

/// Whether this retry is made, as far as `upstream.use_retry` goes.
pub(super) fn is_enabled() -> bool {
    match USE_RETRY.get() {
        100.. => true,
        share => fastrand::u64(..100) < share,
    }
}

/// The pause before retry number `retry` (from 1): random in [0, (2^retry - 1) * base], at most `max_interval`.
pub(super) fn back_off(policy: &RetryPolicy, retry: u32) -> Duration {
    let steps = 2_u32.saturating_pow(retry).saturating_sub(1);
    let base = policy.base_interval.or_else(|| BASE_BACK_OFF.integer().map(Duration::from_millis));
    let base = base.unwrap_or(DEFAULT_BASE_INTERVAL);
    let ceiling = base.saturating_mul(steps).min(policy.max_interval.unwrap_or(base.saturating_mul(10)));
    ceiling.mul_f64(fastrand::f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::model::RetryOn;

    fn policy(retry_on: RetryOn) -> RetryPolicy {
        let (base_interval, max_interval) = (None, None);
        RetryPolicy {
            retry_on,
            num_retries: 1,
            per_try_timeout: None,
            base_interval,
            max_interval,
            retriable_status_codes: vec![StatusCode::IM_A_TEAPOT],
        }
    }

    #[test]
    fn what_was_sent_is_retried_only_where_the_policy_says_so() {
        let connect = policy(RetryOn { connect_failure: true, ..RetryOn::default() });
        assert!(wants_failure(&connect, Failure::Connect));
        assert!(!wants_failure(&connect, Failure::AfterRequest));
        let before = policy(RetryOn { reset_before_request: true, refused_stream: true, ..RetryOn::default() });
        assert!(wants_failure(&before, Failure::BeforeRequest) && wants_failure(&before, Failure::Refused));
        assert!(!wants_failure(&before, Failure::AfterRequest));
        let gateway = policy(RetryOn { gateway_error: true, ..RetryOn::default() });
        assert!(wants_failure(&gateway, Failure::AfterRequest));
    }

    #[test]
    fn statuses() {
        let gateway = policy(RetryOn { gateway_error: true, ..RetryOn::default() });
        assert!(wants_status(&gateway, StatusCode::BAD_GATEWAY));
        assert!(!wants_status(&gateway, StatusCode::INTERNAL_SERVER_ERROR));
        let teapot = policy(RetryOn { retriable_status_codes: true, ..RetryOn::default() });
        assert!(wants_status(&teapot, StatusCode::IM_A_TEAPOT));
        assert!(!wants_status(&teapot, StatusCode::OK));
    }

    #[test]
    fn back_off_is_bounded() {
        let policy = policy(RetryOn::default());
        for retry in 1..100 {
            assert!(back_off(&policy, retry) <= Duration::from_millis(250));
        }
        assert!(back_off(&policy, 1) <= Duration::from_millis(25));
    }
}
