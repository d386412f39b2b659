//! Which failures are tried again (facts of `retry_on`), and after how long.

use std::{
    rc::Rc,
    sync::LazyLock,
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName, StatusCode};
use serde_json::Value;

use super::{
    headers::names::*,
    replay::Replay,
    request_stats::{Counted, RequestStats},
    route_match::{header_matches, values_match},
    stream::{RequestHead, ResponseHead},
};
use crate::{
    config::model::{
        DEFAULT_BASE_INTERVAL, LbMetadata, MatchedHeader, RateLimitedBackOff, RetryHostPredicate, RetryOn, RetryPolicy,
    },
    layered_runtime::{Key, RuntimeInteger},
    upstream::{Chosen, ResetReason, TriedPriorities, WorkerCluster, WorkerHost},
};

/// Milliseconds, where the policy has no base of its own.
static BASE_BACK_OFF: LazyLock<Key> = LazyLock::new(|| Key::new("upstream.base_retry_backoff_ms"));
/// The percentage of retries that are made at all.
static USE_RETRY: LazyLock<RuntimeInteger> =
    LazyLock::new(|| RuntimeInteger { default: 100, key: Key::optional("upstream.use_retry") });
/// Of routes without a policy, whose clients ask for retries.
static NO_POLICY: LazyLock<RetryPolicy> = LazyLock::new(RetryPolicy::default);

/// How an attempt failed without a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// A circuit breaker refused it.
    Overflow,
    /// There are as many connection pools as may be: it is as if there were no host.
    NoPool,
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
    /// `per_try_idle_timeout` passed.
    PerTryIdleTimeout,
    /// It took longer than an attempt may, from its beginning to its end.
    MaxDuration,
}

impl Failure {
    /// That of an attempt that was reset. `unsent`: nothing of it had been sent.
    pub(super) fn of_reset(unsent: bool, reason: ResetReason) -> Failure {
        match (unsent, reason) {
            // As if it had been sent: the host has spoken first, and not HTTP/2.
            (_, ResetReason::Protocol) => Failure::AfterRequest,
            (true, _) => Failure::BeforeRequest,
            (false, ResetReason::Refused | ResetReason::GoneAway) => Failure::Refused,
            (false, _) => Failure::AfterRequest,
        }
    }
}

/// Whether one more attempt is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is.
    Retry,
    /// The policy does not want one.
    No,
    /// There were as many as there may be.
    LimitExceeded,
    /// A circuit breaker allows no more.
    Overflow,
}

/// The retries of one request: what its route's policy and its client allow.
pub(super) struct RetryState<'a> {
    policy: &'a RetryPolicy,
    on: RetryOn,
    remaining: u64,
    retries: u32,
    /// `x-envoy-retriable-status-codes`
    status_codes: Vec<u32>,
    /// `x-envoy-retriable-header-names`
    header_names: Vec<HeaderName>,
    /// How long the last response has asked to wait.
    asked: Option<Duration>,
    /// An attempt has sent something.
    started: bool,
    /// The hosts of the attempts so far, where they are to be avoided.
    tried: Vec<Rc<WorkerHost>>,
    /// The priorities of the attempts so far, where they are to be avoided.
    pub(super) priorities: Option<TriedPriorities>,
    slot: Option<RetrySlot>,
    /// One that is late gets another beside it.
    pub(super) hedges: bool,
    /// What the request is counted under besides its cluster.
    counted: Option<Rc<Counted>>,
    /// The request's body, where it has one.
    pub(super) body: Option<Replay>,
}

impl<'a> RetryState<'a> {
    /// Takes the client's wishes out of the request.
    pub(super) fn take(
        (policy, hedges): (Option<&'a RetryPolicy>, bool),
        head: &mut RequestHead,
        counted: Option<Rc<Counted>>,
    ) -> Option<RetryState<'a>> {
        let asked = head.headers.keys().any(is_retry_header);
        if policy.is_none() && !asked {
            return None;
        }
        let policy = policy.unwrap_or(&NO_POLICY);
        let mut state = RetryState {
            policy,
            on: policy.retry_on,
            remaining: u64::from(policy.num_retries),
            retries: 0,
            status_codes: Vec::new(),
            header_names: Vec::new(),
            asked: None,
            started: false,
            tried: Vec::new(),
            priorities: policy.retry_priority.map(TriedPriorities::new),
            slot: None,
            hedges,
            counted,
            body: None,
        };
        if let Some(kinds) = text(&head.headers, &X_ENVOY_RETRY_ON) {
            state.on.add(kinds);
        }
        if let Some(kinds) = text(&head.headers, &X_ENVOY_RETRY_GRPC_ON) {
            state.on.add_grpc(kinds);
        }
        let only = &policy.retriable_request_headers;
        if !only.is_empty() && !only.iter().any(|matcher| header_matches(matcher, head)) {
            state.on = RetryOn::default();
        }
        if asked {
            match text(&head.headers, &X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT) {
                Some("true") => state.hedges = true,
                Some("false") => state.hedges = false,
                _ => {}
            }
            if let Some(most) = text(&head.headers, &X_ENVOY_MAX_RETRIES).and_then(|text| text.trim().parse().ok()) {
                state.remaining = most;
            }
            let codes = text(&head.headers, &X_ENVOY_RETRIABLE_STATUS_CODES).unwrap_or_default().split(',');
            state.status_codes = codes.filter_map(|code| code.trim().parse().ok()).collect();
            let names = text(&head.headers, &X_ENVOY_RETRIABLE_HEADER_NAMES).unwrap_or_default().split(',');
            state.header_names = names.filter_map(|name| name.trim().parse().ok()).collect();
            RETRY_HEADERS.iter().for_each(|name| drop(head.headers.remove(name)));
        }
        state.on.is_anything().then_some(state)
    }

    /// Whether an attempt that failed so is tried again.
    pub(super) fn judge_failure(&mut self, failure: Failure, cluster: &Rc<WorkerCluster>, high: bool) -> Verdict {
        let unsent = matches!(failure, Failure::Connect | Failure::BeforeRequest);
        self.started |= !unsent;
        let wanted = wants_failure(&self.on, failure, self.started);
        self.judge(wanted, cluster, high)
    }

    /// Whether there is one more attempt beside one that is late: whatever failures are tried again.
    pub(super) fn judge_late(&mut self, cluster: &Rc<WorkerCluster>, high: bool) -> Verdict {
        self.started = true;
        self.judge(true, cluster, high)
    }

    /// Whether a response like this is tried again.
    pub(super) fn judge_response(&mut self, head: &ResponseHead, cluster: &Rc<WorkerCluster>, high: bool) -> Verdict {
        self.started = true;
        let wanted = self.wants_response(head);
        if let (true, Some(rate_limited)) = (wanted, &self.policy.rate_limited) {
            // Less than that is no wait at all.
            let asked = reset_interval(rate_limited, &head.headers, SystemTime::now());
            self.asked = asked.filter(|asked| *asked > Duration::from_millis(1));
        }
        self.judge(wanted, cluster, high)
    }

    fn judge(&mut self, wanted: bool, cluster: &Rc<WorkerCluster>, high: bool) -> Verdict {
        if self.body.as_ref().is_some_and(Replay::is_abandoned) {
            self.slot = None;
            return Verdict::No;
        }
        let stats = &cluster.cluster.stats;
        if self.slot.take().is_some() && !wanted {
            stats.upstream_rq_retry_success.inc();
            self.count(|stats| stats.upstream_rq_retry_success.inc());
        }
        if !wanted {
            return Verdict::No;
        }
        if self.remaining == 0 {
            stats.upstream_rq_retry_limit_exceeded.inc();
            self.count(|stats| stats.upstream_rq_retry_limit_exceeded.inc());
            return Verdict::LimitExceeded;
        }
        self.remaining -= 1;
        let Some(slot) = RetrySlot::take(cluster, high) else {
            stats.upstream_rq_retry_overflow.inc();
            self.count(|stats| stats.upstream_rq_retry_overflow.inc());
            return Verdict::Overflow;
        };
        if !is_enabled() {
            return Verdict::No;
        }
        stats.upstream_rq_retry.inc();
        self.count(|stats| stats.upstream_rq_retry.inc());
        self.slot = Some(slot);
        self.retries = self.retries.saturating_add(1);
        Verdict::Retry
    }

    fn count(&self, count: impl Fn(&RequestStats)) {
        if let Some(counted) = &self.counted {
            counted.each(count);
        }
    }

    /// How long the next attempt waits for its turn.
    pub(super) fn pause(&mut self, cluster: &WorkerCluster) -> Duration {
        match self.asked.take() {
            Some(asked) => {
                cluster.cluster.stats.upstream_rq_retry_backoff_ratelimited.inc();
                asked.saturating_add(asked.mul_f64(fastrand::f64() / 2.0))
            }
            None => {
                cluster.cluster.stats.upstream_rq_retry_backoff_exponential.inc();
                back_off(self.policy, self.retries)
            }
        }
    }

    /// Whether an attempt is worth a copy of the request: where it may be wanted again when it is gone.
    pub(super) fn needs_copy(&self, http1: bool) -> bool {
        let on = RetryOn { connect_failure: false, reset_before_request: false, refused_stream: false, ..self.on };
        self.remaining > 0 && (on.is_anything() || self.on.refused_stream && !http1)
    }

    /// The host of an attempt that is to be made again.
    pub(super) fn avoid(&mut self, cluster: &WorkerCluster, chosen: &Chosen) {
        if let Some(priorities) = &self.priorities {
            priorities.add(cluster.priority_of(chosen));
        }
        if self.policy.host_predicates.iter().any(|it| matches!(it, RetryHostPredicate::PreviousHosts)) {
            self.tried.push(Rc::clone(&chosen.host));
        }
    }

    /// How often another host is looked for in place of one that is to be passed over.
    pub(super) fn host_selection_attempts(&self) -> u32 {
        let any = self.retries > 0 && !self.policy.host_predicates.is_empty();
        if any { self.policy.host_selection_attempts } else { 0 }
    }

    /// Whether the host is to be passed over.
    pub(super) fn avoids(&self, host: &WorkerHost) -> bool {
        let metadata = host.host.metadata();
        self.policy.host_predicates.iter().any(|predicate| match predicate {
            RetryHostPredicate::PreviousHosts => self.tried.iter().any(|it| it.host.address == host.host.address),
            RetryHostPredicate::OmitCanaryHosts => metadata.is_some_and(|it| it.get("canary") == Some(&true.into())),
            RetryHostPredicate::OmitHostMetadata(labels) => {
                !labels.is_empty() && metadata.is_some_and(|metadata| has_labels(metadata, labels))
            }
        })
    }

    pub(super) fn wants_response(&self, head: &ResponseHead) -> bool {
        let (on, policy, status) = (&self.on, self.policy, head.status);
        if head.headers.contains_key(X_ENVOY_RATELIMITED) {
            return on.rate_limited;
        }
        let code = u32::from(status.as_u16());
        (on.server_error && status.is_server_error())
            || (on.gateway_error && matches!(code, 502..=504))
            || (on.retriable_4xx && status == StatusCode::CONFLICT)
            || (on.retriable_status_codes
                && (policy.retriable_status_codes.contains(&code) || self.status_codes.contains(&code)))
            || (on.retriable_headers && self.has_retriable_header(&head.headers))
            || (on.grpc_statuses != 0 && wants_grpc(on.grpc_statuses, &head.headers))
    }

    fn has_retriable_header(&self, headers: &HeaderMap) -> bool {
        let by_policy = self.policy.retriable_headers.iter().any(|matcher| match &matcher.name {
            MatchedHeader::Name(name) => values_match(matcher, name, headers),
            // A response has none of these.
            _ => false,
        });
        by_policy || self.header_names.iter().any(|name| headers.contains_key(name))
    }
}

/// What a client may say of retries; none of it is passed on.
const RETRY_HEADERS: [HeaderName; 6] = [
    X_ENVOY_RETRY_ON,
    X_ENVOY_RETRY_GRPC_ON,
    X_ENVOY_MAX_RETRIES,
    X_ENVOY_RETRIABLE_STATUS_CODES,
    X_ENVOY_RETRIABLE_HEADER_NAMES,
    X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT,
];

/// One look at the names that there are is cheaper than a look-up of each that might be there.
fn is_retry_header(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-envoy-") && RETRY_HEADERS.contains(name)
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn wants_grpc(statuses: u32, headers: &HeaderMap) -> bool {
    let status = text(headers, &GRPC_STATUS).and_then(|status| status.parse::<u32>().ok());
    status.is_some_and(|status| status < 32 && statuses & (1 << status) != 0)
}

fn wants_failure(on: &RetryOn, failure: Failure, started: bool) -> bool {
    let any_reset = on.server_error || on.gateway_error || on.reset;
    match failure {
        Failure::Overflow | Failure::NoPool => false,
        Failure::Connect if on.connect_failure => true,
        Failure::Refused if on.refused_stream => true,
        _ => any_reset || on.reset_before_request && !started,
    }
}

/// Whether a host's metadata says all of this; of a list one item will do.
fn has_labels(metadata: &LbMetadata, labels: &LbMetadata) -> bool {
    labels.iter().all(|(name, wanted)| match metadata.get(name) {
        Some(Value::Array(items)) => items.contains(wanted),
        value => value == Some(wanted),
    })
}

/// How long the response asks to wait.
fn reset_interval(policy: &RateLimitedBackOff, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    policy.reset_headers.iter().find_map(|header| {
        let seconds: u64 = text(headers, &header.name)?.trim().parse().ok()?;
        let seconds = if header.is_unix_timestamp {
            seconds.checked_sub(now.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())?
        } else {
            seconds
        };
        Some(Duration::from_secs(seconds)).filter(|interval| *interval <= policy.max_interval)
    })
}

/// One of the cluster's retries at a time.
struct RetrySlot(Rc<WorkerCluster>, bool);

impl RetrySlot {
    fn take(cluster: &Rc<WorkerCluster>, high: bool) -> Option<RetrySlot> {
        cluster.cluster.begin_retry(high).then(|| RetrySlot(Rc::clone(cluster), high))
    }
}

impl Drop for RetrySlot {
    fn drop(&mut self) {
        self.0.cluster.end_retry(self.1);
    }
}

/// Whether this retry is made, as far as `upstream.use_retry` goes.
fn is_enabled() -> bool {
    match USE_RETRY.get() {
        100.. => true,
        share => fastrand::u64(..100) < share,
    }
}

/// The pause before retry number `retry` (from 1): random in [0, (2^retry - 1) * base], at most `max_interval`.
fn back_off(policy: &RetryPolicy, retry: u32) -> Duration {
    let steps = 2_u32.saturating_pow(retry).saturating_sub(1);
    let base = policy.base_interval.or_else(|| BASE_BACK_OFF.integer().map(Duration::from_millis));
    let base = base.unwrap_or(DEFAULT_BASE_INTERVAL);
    let ceiling = base.saturating_mul(steps).min(policy.max_interval.unwrap_or(base.saturating_mul(10)));
    ceiling.mul_f64(fastrand::f64())
}

#[cfg(test)]
#[path = "retry_tests.rs"]
mod tests;
