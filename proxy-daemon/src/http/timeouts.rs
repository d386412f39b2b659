//! How long a request and each of its attempts may take: what the route, its retry policy and the client say.

use std::{
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{
    headers::{is_grpc, names::*},
    look::Look as _,
    retry::Failure,
    stream::{Progress, RequestHead, StreamCx},
};
use crate::{
    config::model::{ForwardAction, GrpcTimeout, MaxStreamDuration, RetryPolicy},
    runtime::clock,
};

/// The limits of one request.
pub(super) struct Timeouts {
    /// Of all attempts together.
    pub(super) global: Option<Duration>,
    per_try: Option<Duration>,
    /// An attempt that is late goes on beside the next one: it has as long as all of them.
    pub(super) hedges: bool,
    /// Of an upstream's silence.
    pub(super) per_try_idle: Option<Duration>,
    /// Of each attempt, from the moment that it has a connection to the end of its answer, where the client says: 0 is no limit.
    attempt: Option<Duration>,
    /// Of the whole stream, from its beginning.
    pub(super) stream: Option<Duration>,
    /// The answer where one has passed.
    pub(super) status: StatusCode,
    /// Upstreams are told in `grpc-timeout`, too.
    tells_grpc: bool,
}

impl Timeouts {
    /// Takes the client's wishes out of the request. Only trusted clients' have come so far.
    /// `stream`: how long the stream may last where its route does not say. `respects`: what the proxy before this one expects counts for more.
    pub(super) fn take(
        action: &ForwardAction,
        policy: Option<&RetryPolicy>,
        (stream, respects): (Option<Duration>, bool),
        head: &mut RequestHead,
    ) -> Timeouts {
        let mut timeouts = Timeouts {
            global: match action.grpc_timeout.filter(|_| is_grpc(&head.headers)) {
                Some(limits) => of_grpc(limits, &head.headers),
                None => action.timeout,
            },
            tells_grpc: action.grpc_timeout.is_some() && is_grpc(&head.headers),
            per_try: policy.and_then(|policy| policy.per_try_timeout),
            per_try_idle: policy.and_then(|policy| policy.per_try_idle_timeout),
            hedges: false,
            attempt: None,
            stream: match action.max_stream_duration {
                Some(limits) => stream_limit(limits, stream, &mut head.headers),
                None => stream,
            },
            status: StatusCode::GATEWAY_TIMEOUT,
        };
        if head.headers.keys().any(|name| name.as_str().starts_with("x-envoy-upstream-")) {
            let asked = head.headers.remove(&X_ENVOY_UPSTREAM_STREAM_DURATION_MS);
            let asked = asked.and_then(|value| value.to_str().ok()?.trim().parse().ok());
            timeouts.attempt = asked.map(Duration::from_millis);
            // As in Envoy it stays then, and says nothing.
            if !respects || !head.headers.has(&X_ENVOY_EXPECTED_RQ_TIMEOUT_MS) {
                timeouts.global = wish(&mut head.headers, &X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS, timeouts.global);
            }
            timeouts.per_try = wish(&mut head.headers, &X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS, timeouts.per_try);
            // For a proxy, and not for its host; nothing is counted under it.
            head.headers.remove(X_ENVOY_UPSTREAM_ALT_STAT_NAME);
            if head.headers.remove(X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE).is_some() {
                timeouts.status = StatusCode::NO_CONTENT;
            }
        }
        if respects && head.headers.has(&X_ENVOY_EXPECTED_RQ_TIMEOUT_MS) {
            timeouts.global = said(head.headers.get(&X_ENVOY_EXPECTED_RQ_TIMEOUT_MS), timeouts.global);
        }
        // One that is no shorter says nothing.
        timeouts.per_try = timeouts.per_try.filter(|limit| timeouts.global.is_none_or(|global| *limit < global));
        timeouts
    }

    /// Whether an attempt may be late before the request is.
    pub(super) fn has_per_try(&self) -> bool {
        self.per_try.is_some()
    }

    /// Of each attempt.
    pub(super) fn per_try(&self) -> Option<Duration> {
        self.per_try
    }

    /// Tells the upstream of the first attempt how long it has.
    pub(super) fn tell(&self, head: &mut RequestHead, cx: &StreamCx) {
        self.tell_after(Duration::ZERO, head, cx);
    }

    /// Tells the upstream of a further attempt how long it has.
    pub(super) fn tell_again(&self, head: &mut RequestHead, cx: &StreamCx) {
        let elapsed = cx.progress.request_complete.get().map_or(Duration::ZERO, clock::since);
        self.tell_after(elapsed, head, cx);
    }

    fn tell_after(&self, elapsed: Duration, head: &mut RequestHead, cx: &StreamCx) {
        if cx.suppress_envoy_headers && !self.tells_grpc {
            return;
        }
        let Some(expected) = self.expected(elapsed) else { return };
        if self.tells_grpc {
            head.headers.insert(GRPC_TIMEOUT, to_grpc_timeout(expected));
        }
        if cx.suppress_envoy_headers {
            return;
        }
        let mut digits = itoa::Buffer::new();
        if let Ok(value) = HeaderValue::from_str(digits.format(expected.as_millis() as u64)) {
            head.headers.insert(X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, value);
        }
    }

    /// How long an attempt has that begins so long after the request was complete.
    fn expected(&self, elapsed: Duration) -> Option<Duration> {
        let expected = self.per_try.filter(|_| !self.hedges).or(self.global)?;
        // 0 would be no limit.
        let left = self.global.map(|global| global.saturating_sub(elapsed).max(Duration::from_millis(1)));
        Some(expected.min(left.unwrap_or(expected)))
    }

    /// The body of the answer where a limit has passed.
    pub(super) fn text(&self) -> &'static str {
        if self.status == StatusCode::GATEWAY_TIMEOUT { "upstream request timeout" } else { "" }
    }

    /// The limits of an attempt that has a connection now. `duration`: its cluster's, where the client does not say.
    pub(super) fn of_try(&self, duration: Option<Duration>, progress: &Rc<Progress>) -> TryLimit {
        let both = [(self.per_try, Failure::PerTryTimeout), (self.per_try_idle, Failure::PerTryIdleTimeout)];
        let first = both.into_iter().filter_map(|(limit, failure)| Some((limit?, failure)));
        let limit = first.min_by_key(|(limit, _)| *limit);
        let since = clock::now();
        let until = self.attempt.or(duration).filter(|limit| !limit.is_zero()).map(|limit| since + limit);
        TryLimit { progress: Rc::clone(progress), limit, since, until, sleep: None }
    }
}

/// How long a gRPC request may take; `None`: no limit.
fn of_grpc(limits: GrpcTimeout, headers: &HeaderMap) -> Option<Duration> {
    let asked = headers.first(&GRPC_TIMEOUT).and_then(|timeout| grpc_timeout(timeout.to_str().ok()?));
    // An offset that leaves nothing is none: 0 is no limit.
    let asked = asked.map(|asked| if limits.offset < asked { asked - limits.offset } else { asked });
    let asked = asked.filter(|asked| !asked.is_zero());
    let max = Some(limits.max).filter(|max| !max.is_zero());
    asked.into_iter().chain(max).min()
}

/// How long the stream may last; the upstream of a gRPC request is told.
fn stream_limit(limits: MaxStreamDuration, otherwise: Option<Duration>, headers: &mut HeaderMap) -> Option<Duration> {
    let asked = headers.first(&GRPC_TIMEOUT).and_then(|timeout| grpc_timeout(timeout.to_str().ok()?));
    let limit = match (asked, limits.grpc_max) {
        (Some(asked), Some(most)) => {
            let capped = if most.is_zero() { asked } else { asked.min(most) };
            capped.saturating_sub(limits.grpc_offset.unwrap_or_default())
        }
        _ => limits.max.or(otherwise).filter(|max| !max.is_zero())?,
    };
    // What cannot be read is told anew as well.
    if headers.has(&GRPC_TIMEOUT) && is_grpc(headers) {
        headers.insert(GRPC_TIMEOUT, to_grpc_timeout(limit));
    }
    Some(limit)
}

/// At most eight digits and a unit; whole milliseconds.
pub(super) fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let number: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_millis(number.div_ceil(1000)),
        "n" => Duration::from_millis(number.div_ceil(1_000_000)),
        _ => return None,
    })
}

/// A time limit as `grpc-timeout` has it: in the shortest unit that eight digits are enough for, milliseconds at best.
pub(super) fn to_grpc_timeout(limit: Duration) -> HeaderValue {
    const MAX: u128 = 99_999_999;
    let milliseconds = limit.as_millis();
    let units = [('m', 1), ('S', 1000), ('M', 60_000), ('H', 3_600_000)];
    let fits = units.into_iter().find(|(_, unit)| milliseconds / unit <= MAX);
    let text = fits.map_or_else(|| format!("{MAX}H"), |(name, unit)| format!("{}{name}", milliseconds / unit));
    // Digits and a letter are always valid.
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("0m"))
}

/// A header's milliseconds, where it has any; 0 is no limit. The header goes.
fn wish(headers: &mut HeaderMap, name: &HeaderName, otherwise: Option<Duration>) -> Option<Duration> {
    said(headers.remove(name).as_ref(), otherwise)
}

/// A header's milliseconds, where it has any; 0 is no limit.
fn said(value: Option<&HeaderValue>, otherwise: Option<Duration>) -> Option<Duration> {
    match value.and_then(|value| value.to_str().ok()?.trim().parse().ok()) {
        Some(0) => None,
        Some(milliseconds) => Some(Duration::from_millis(milliseconds)),
        None => otherwise,
    }
}

/// Passes when an attempt has taken too long, from its connection and from the end of the request on.
pub(super) struct TryLimit {
    progress: Rc<Progress>,
    limit: Option<(Duration, Failure)>,
    pub(super) since: Instant,
    /// Then it is over, whatever has come by then.
    pub(super) until: Option<Instant>,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl TryLimit {
    /// Ends with the limit that has passed. The stream's own timers wake its task when the request is complete.
    pub(super) async fn expired(&mut self) -> Failure {
        match self.until {
            None => self.answer_is_late().await,
            Some(until) => tokio::select! {
                biased;
                failure = self.answer_is_late() => failure,
                () = tokio::time::sleep_until(until.into()) => Failure::MaxDuration,
            },
        }
    }

    async fn answer_is_late(&mut self) -> Failure {
        let Some((limit, failure)) = self.limit else { return std::future::pending().await };
        std::future::poll_fn(|cx| {
            let Some(complete) = self.progress.awaited_since() else { return Poll::Pending };
            let from = complete.max(self.since);
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until((from + limit).into())));
            sleep.as_mut().poll(cx).map(|()| failure)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &'static str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn grpc_timeouts_are_capped() {
        let second = Some(Duration::from_secs(1));
        let limits = MaxStreamDuration { max: Some(Duration::from_secs(9)), grpc_max: second, grpc_offset: None };
        let asks = |limits, asked| {
            stream_limit(limits, None, &mut headers(&[("grpc-timeout", asked)])).map(|limit| limit.as_millis())
        };
        assert_eq!(asks(limits, "300m"), Some(300));
        assert_eq!(asks(limits, "1500u"), Some(2));
        assert_eq!(asks(limits, "2S"), Some(1000));
        assert_eq!(asks(limits, "2x"), Some(9000));
        let offset = Some(Duration::from_millis(400));
        assert_eq!(asks(MaxStreamDuration { grpc_offset: offset, ..limits }, "300m"), Some(0));
        assert_eq!(asks(MaxStreamDuration { grpc_max: Some(Duration::ZERO), ..limits }, "99H"), Some(356_400_000));
        assert_eq!(asks(MaxStreamDuration { grpc_max: None, ..limits }, "1m"), Some(9000));
        let mut told = headers(&[("grpc-timeout", "2S"), ("content-type", "application/grpc")]);
        stream_limit(limits, None, &mut told);
        assert_eq!(told[GRPC_TIMEOUT], "1000m");
        let mut unreadable = headers(&[("grpc-timeout", "-1m"), ("content-type", "application/grpc")]);
        stream_limit(limits, None, &mut unreadable);
        assert_eq!(unreadable[GRPC_TIMEOUT], "9000m");
        assert_eq!(to_grpc_timeout(Duration::from_secs(99_999_999)), "99999999S");
        assert_eq!(to_grpc_timeout(Duration::from_secs(100_000_000)), "1666666M");
        assert_eq!(to_grpc_timeout(Duration::from_secs(1 << 60)), "99999999H", "the most that can be said");
    }

    #[test]
    fn an_attempt_that_is_hedged_has_all_the_time() {
        let mut timeouts = Timeouts {
            global: Some(Duration::from_secs(2)),
            per_try: Some(Duration::from_millis(200)),
            hedges: false,
            per_try_idle: None,
            attempt: None,
            stream: None,
            status: StatusCode::GATEWAY_TIMEOUT,
            tells_grpc: false,
        };
        assert_eq!(timeouts.expected(Duration::ZERO), Some(Duration::from_millis(200)));
        assert_eq!(timeouts.expected(Duration::from_millis(1900)), Some(Duration::from_millis(100)));
        timeouts.hedges = true;
        assert_eq!(timeouts.expected(Duration::ZERO), Some(Duration::from_secs(2)));
        assert_eq!(timeouts.expected(Duration::from_millis(500)), Some(Duration::from_millis(1500)));
    }

    #[test]
    fn wishes_are_milliseconds() {
        let mut headers = headers(&[("a", "15"), ("b", "0"), ("c", "soon")]);
        let route = Some(Duration::from_secs(1));
        let mut wish = |name| wish(&mut headers, &HeaderName::from_static(name), route);
        assert_eq!(wish("a"), Some(Duration::from_millis(15)));
        assert_eq!(wish("b"), None);
        assert_eq!((wish("c"), wish("d")), (route, route));
        assert!(headers.is_empty());
    }
}
