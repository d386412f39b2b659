//! Sends a request to its cluster, as often as the retry policy allows, and answers for the upstream where it fails.

use std::{cell::Cell, rc::Rc, time::Instant};

use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header::HOST};

use super::{
    body::Body,
    codec::{Incoming, h1::Upgrade},
    headers::{self, names::*},
    mirror::mirror,
    observe::StreamEnd,
    redirect::rewrite_path,
    replay::Replay,
    retry::{Failure, RetryState, Verdict},
    route_match::{RouteRef, authority},
    stream::{LocalReply, RequestHead, StreamCx},
    timeouts::Timeouts,
    timers::{Expired, Timers},
    waiting,
};
use crate::{
    access_log::ResponseFlags,
    config::model::{ForwardAction, HeaderMutations, HostRewrite, UpstreamProtocol},
    upstream::{
        ConnectError, Connection, HostCounter, PickCx, PoolError, Reset, ResetReason, Wanted, WorkerCluster, WorkerHost,
    },
};

/// An upstream's answer.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) connection: Connection,
    pub(super) timers: Timers,
    /// How many attempts it took.
    pub(super) attempts: u32,
}

/// Sends the request that `head` and `body` are.
pub(super) async fn forward(
    cx: &StreamCx,
    end: &mut StreamEnd,
    action: &ForwardAction,
    mut head: RequestHead,
    mut body: Body,
) -> Result<Answer, LocalReply> {
    let config = &end.state.manager.config;
    let Some(cluster) = cx.cluster.as_ref().map(Rc::clone) else {
        end.state.manager.stats.no_cluster.inc();
        return Err(LocalReply::new(action.cluster_not_found_status, "", ResponseFlags::NC, "cluster_not_found"));
    };
    if cluster.cluster.refuses_for_maintenance() {
        return Err(maintenance(&cluster));
    }
    let virtual_host = cx.route.as_ref().map(RouteRef::virtual_host);
    let policy = action.retry_policy.as_deref().or(virtual_host.and_then(|host| host.retry_policy.as_deref()));
    let timeouts = Timeouts::take(action, policy, config.max_stream_duration, &mut head);
    timeouts.tell(&mut head, cx);
    finish_request(cx, action, &mut head);
    let mut retry = RetryState::take(policy, &mut head);
    let limit = cx.route.as_ref().and_then(|route| route.body_buffer_limit);
    let limit = limit.or(virtual_host.and_then(|host| host.body_buffer_limit));
    let limit = limit.unwrap_or(u64::from(cx.connection.buffer_limit));
    let counter = cluster.cluster.stats.retry_or_shadow_abandoned;
    let mirrors = match virtual_host {
        Some(host) if action.mirrors.is_empty() => &host.mirrors,
        _ => &action.mirrors,
    };
    // What follows an upgrade is no request.
    if !mirrors.is_empty() && head.extensions.get::<Upgrade>().is_none() {
        mirror(mirrors, cx, &head, &mut body, timeouts.global, (limit, counter));
    }
    if let Some(retry) = retry.as_mut().filter(|_| !matches!(body, Body::Empty)) {
        retry.body = Some(Replay::new(std::mem::take(&mut body), limit, counter));
    }
    let idle = action.idle_timeout.unwrap_or(config.stream_idle_timeout);
    end.state.allow_stall(idle);
    let mut timers = Timers::new(Rc::clone(&cx.progress), cx.started, timeouts.global, idle, config.request_timeout);

    timers.limit_duration(timeouts.stream);
    let mut attempts =
        Attempts { cx, cluster: &cluster, action, timeouts: &timeouts, retry, count: 0, until: Cell::new(None) };
    let result = tokio::select! {
        biased;
        result = attempts.run(end, head, body) => result,
        expired = timers.expired() => Err(expire(end, &cluster, expired, &timeouts)),
    };
    let (count, until) = (attempts.count, attempts.until.get());
    drop(attempts);
    let (response, connection) = result.map_err(|mut reply| {
        if virtual_host.is_some_and(|host| host.include_attempt_count_in_response) {
            reply.headers.push((X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(count)));
        }
        reply
    })?;
    timers.limit_pauses(timeouts.per_try_idle);
    timers.limit_attempt(until);
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        timers.request_answered();
    }
    Ok(Answer { response, connection, timers, attempts: count })
}

/// The answer to a request that `upstream.maintenance_mode.<cluster>` refuses.
fn maintenance(cluster: &WorkerCluster) -> LocalReply {
    let stats = &cluster.cluster.stats;
    stats.upstream_rq_maintenance_mode.inc();
    stats.upstream_rq.inc(StatusCode::SERVICE_UNAVAILABLE.as_u16());
    let status = StatusCode::SERVICE_UNAVAILABLE;
    let mut reply = LocalReply::new(status, "maintenance mode", ResponseFlags::UO, "maintenance_mode");
    reply.headers.push((X_ENVOY_OVERLOADED, HeaderValue::from_static("true")));
    reply
}

/// What the router does to a request's head, once for all attempts.
fn finish_request(cx: &StreamCx, action: &ForwardAction, head: &mut RequestHead) {
    let suppress = cx.suppress_envoy_headers;
    if let Some(route) = &cx.route {
        mutate_request(cx, head);
        // Before the path is rewritten: it may be made of that.
        let host = match &action.host_rewrite {
            HostRewrite::Literal(host) => Some(host.clone()),
            HostRewrite::Header(name) => head.headers.get(name).filter(|host| !host.is_empty()).cloned(),
            HostRewrite::PathRegex(rewrite) => HeaderValue::from_str(&rewrite.apply(head.uri.path())).ok(),
            HostRewrite::Auto | HostRewrite::None => None,
        };
        // The weighted cluster's comes first, as in Envoy, and is no rewrite that upstreams are told of.
        if let Some(host) = cx.weighted_options().and_then(|options| options.host_rewrite.clone()) {
            set_host(head, host, false, true);
        }
        if let Some(host) = host {
            set_host(head, host, action.append_x_forwarded_host, suppress);
        }
        let path = rewrite_path(head.uri.path(), &route.route_match.path, &action.path_rewrite);
        // What is no path cannot be sent.
        if let Some(mut path) = path.filter(|path| path.starts_with('/')) {
            if let Some(query) = head.uri.query() {
                path = format!("{path}?{query}");
            }
            let before = head.uri.path_and_query().and_then(|path| HeaderValue::from_str(path.as_str()).ok());
            if let Some(before) = before.filter(|_| !suppress) {
                head.headers.insert(X_ENVOY_ORIGINAL_PATH, before);
            }
            headers::set_path(head, &path);
        }
    }
    cx.keep_request(head);
}

/// Applies the mutations of all levels.
fn mutate_request(cx: &StreamCx, head: &mut RequestHead) {
    if cx.header_mutations().all(HeaderMutations::is_empty) {
        return;
    }
    cx.format_request(head, |headers, record| {
        for mutations in cx.header_mutations() {
            headers::mutate_request(headers, mutations, record);
        }
    });
}

/// Replaces the request's host; the one before it is told in further headers.
fn set_host(head: &mut RequestHead, host: HeaderValue, append_forwarded: bool, suppress: bool) {
    let before = HeaderValue::from_str(authority(head)).ok().filter(|before| !before.is_empty());
    if let Some(before) = before {
        if append_forwarded {
            headers::append(&mut head.headers, X_FORWARDED_HOST, &before, ",");
        }
        if !suppress && before != host {
            head.headers.insert(X_ENVOY_ORIGINAL_HOST, before);
        }
    }
    if head.uri.authority().is_some() {
        head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
    }
    head.headers.insert(HOST, host);
}

fn expire(end: &mut StreamEnd, cluster: &WorkerCluster, expired: Expired, timeouts: &Timeouts) -> LocalReply {
    match expired {
        Expired::Route => {
            cluster.cluster.stats.upstream_rq_timeout.inc();
            cluster.cluster.stats.upstream_rq.inc(timeouts.status.as_u16());
            end.judge(true);
            if let Some((_, host)) = &end.host {
                host.count(HostCounter::RqTimeout, 1);
            }
            LocalReply::new(timeouts.status, timeouts.text(), ResponseFlags::UT, "response_timeout")
        }
        Expired::Attempt
        | Expired::Duration
        | Expired::Idle
        | Expired::PerTryIdle
        | Expired::Request
        | Expired::Malformed(_) => waiting::expire(&end.state, &end.progress, expired),
    }
}

struct Attempts<'a> {
    cx: &'a StreamCx,
    cluster: &'a Rc<WorkerCluster>,
    action: &'a ForwardAction,
    timeouts: &'a Timeouts,
    retry: Option<RetryState<'a>>,
    count: u32,
    /// The attempt that is under way may last until then.
    until: Cell<Option<Instant>>,
}

/// How one attempt failed.
struct Failed {
    failure: Failure,
    /// As Envoy words it.
    reason: &'static str,
    /// What the transport said of it, where that is known.
    transport: Option<String>,
    status: StatusCode,
    flags: ResponseFlags,
    /// The request, where it can be sent again.
    request: Option<Box<(RequestHead, Body)>>,
    /// A pooled connection had died unnoticed and nothing was sent: the next attempt is free.
    stale: bool,
}

impl Attempts<'_> {
    async fn run(
        &mut self,
        end: &mut StreamEnd,
        mut head: RequestHead,
        mut body: Body,
    ) -> Result<(Response<Incoming>, Connection), LocalReply> {
        let stats = &self.cluster.cluster.stats;
        loop {
            self.count += 1;
            let host = self.choose(end, &head)?;
            let kept = self.copy_for_retry(&head);
            if let Some(replay) = self.retry.as_ref().and_then(|retry| retry.body.as_ref()) {
                body = replay.reader();
            }
            let mut timed_out = false;
            match self.attempt(end, &host, head, body).await {
                Ok((response, connection)) => {
                    let (response, incoming) = response.into_parts();
                    let verdict =
                        self.judge(end, |retry, cluster, high| retry.judge_response(&response, cluster, high));
                    match kept.filter(|_| verdict == Verdict::Retry) {
                        Some(copy) => {
                            stats.count_retried(response.status.as_u16());
                            (head, body) = (copy, Body::Empty);
                        }
                        None => {
                            stats.upstream_rq.inc(response.status.as_u16());
                            end.judge_response(&response, http_body::Body::is_end_stream(&incoming));
                            return Ok((Response::from_parts(response, incoming), connection));
                        }
                    }
                }
                Err(mut failed) => {
                    let request = failed.request.take().or_else(|| kept.map(|copy| Box::new((copy, Body::Empty))));
                    let request = match request {
                        // The next attempt is free.
                        Some(again) if failed.stale => {
                            self.count -= 1;
                            end.excuse_host();
                            (head, body) = *again;
                            continue;
                        }
                        request => request,
                    };
                    let failure = failed.failure;
                    let verdict = self.judge(end, |retry, cluster, high| retry.judge_failure(failure, cluster, high));
                    let Some(again) = request.filter(|_| verdict == Verdict::Retry) else {
                        return Err(self.give_up(end, failed));
                    };
                    timed_out = matches!(failure, Failure::PerTryTimeout | Failure::PerTryIdleTimeout);
                    (head, body) = *again;
                }
            }
            self.prepare_retry(&host, &mut head, timed_out).await;
        }
    }

    /// Whether there is one more attempt; the log is told why not.
    fn judge(
        &mut self,
        end: &mut StreamEnd,
        judge: impl FnOnce(&mut RetryState<'_>, &Rc<WorkerCluster>, bool) -> Verdict,
    ) -> Verdict {
        let Some(retry) = &mut self.retry else { return Verdict::No };
        let verdict = judge(retry, self.cluster, self.action.high_priority);
        match verdict {
            Verdict::LimitExceeded => end.flags |= ResponseFlags::URX,
            Verdict::Overflow => end.flags |= ResponseFlags::UO,
            Verdict::Retry | Verdict::No => {}
        }
        verdict
    }

    /// Waits for the next attempt's turn.
    async fn prepare_retry(&mut self, host: &Rc<WorkerHost>, head: &mut RequestHead, timed_out: bool) {
        if let Some(retry) = &mut self.retry {
            retry.avoid(host);
            retry.back_off(self.cluster).await;
        }
        self.timeouts.tell_again(head, self.cx);
        if self.cx.route.as_ref().is_some_and(|route| route.virtual_host().include_is_timeout_retry_header) {
            let value = HeaderValue::from_static(if timed_out { "true" } else { "false" });
            head.headers.insert(X_ENVOY_IS_TIMEOUT_RETRY, value);
        }
    }

    fn choose(&self, end: &mut StreamEnd, head: &RequestHead) -> Result<Rc<WorkerHost>, LocalReply> {
        end.leave_host();
        let stats = &self.cluster.cluster.stats;
        let limits = self.cluster.cluster.limits(self.action.high_priority);
        let pick = PickCx {
            override_dst: self.cx.override_dst,
            headers: Some(&head.headers),
            original_dst: self.cx.connection.original_dst,
        };
        let mut host = self.cluster.pick(&pick);
        for _ in 0..self.retry.as_ref().map_or(0, RetryState::host_selection_attempts) {
            let avoided = |host: &&Rc<WorkerHost>| self.retry.as_ref().is_some_and(|retry| retry.avoids(host));
            if host.as_ref().filter(avoided).is_none() {
                break;
            }
            host = self.cluster.pick(&pick);
        }
        let Some(host) = host else {
            stats.upstream_cx_none_healthy.inc();
            let (status, text) = (StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream");
            return Err(LocalReply::new(status, text, ResponseFlags::UH, "no_healthy_upstream"));
        };
        if stats.upstream_rq_active.value() >= u64::from(limits.max_requests()) {
            stats.upstream_rq_pending_overflow.inc();
            self.cluster.cluster.dropped.inc();
            host.count_refused(self.cluster, self.action.high_priority);
            return Err(overloaded());
        }
        stats.upstream_rq_total.inc();
        end.set_host(self.cluster, &host);
        Ok(host)
    }

    /// A copy of the head, where a failure after it was sent may be tried again.
    fn copy_for_retry(&self, head: &RequestHead) -> Option<RequestHead> {
        let http1 = matches!(protocol(self.cluster, head), Wanted::Http1);
        self.retry.as_ref().filter(|retry| retry.needs_copy(http1)).map(|_| head.clone())
    }

    /// One attempt.
    async fn attempt(
        &self,
        end: &mut StreamEnd,
        host: &Rc<WorkerHost>,
        head: RequestHead,
        body: Body,
    ) -> Result<(Response<Incoming>, Connection), Failed> {
        let (source, high) = (self.cx.connection.source, self.action.high_priority);
        let wanted = protocol(self.cluster, &head);
        let connection = match host.acquire(self.cluster, wanted, source, high).await {
            Ok(connection) => connection,
            Err(error) => {
                let failed = connect_failed(error, head, body);
                end.transport_failure.clone_from(&failed.transport);
                return Err(failed);
            }
        };
        end.upstream = Some(Rc::clone(connection.info()));
        let upgrade = head.extensions.get::<Upgrade>().is_some();
        if upgrade && connection.is_http2() {
            let (reason, status) = ("upgrades need a host that speaks HTTP/1.1", StatusCode::BAD_GATEWAY);
            let (failure, flags) = (Failure::AfterRequest, ResponseFlags::UPE);
            return Err(Failed { failure, reason, transport: None, status, flags, request: None, stale: false });
        }
        let request = self.upstream_request(host, head, body, connection.is_http2());
        let stats = &self.cluster.cluster.stats;
        let mut limit = self.timeouts.of_try(&self.cx.progress);
        self.until.set(limit.until);
        let sent = tokio::select! {
            biased;
            sent = connection.send(request, |status| stats.upstream_rq.inc(status.as_u16())) => sent,
            failure = limit.expired() => return Err(self.timed_out(host, failure)),
        };
        match sent {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS && !upgrade => Err(Failed {
                failure: Failure::AfterRequest,
                reason: "protocol error",
                transport: None,
                status: StatusCode::BAD_GATEWAY,
                flags: ResponseFlags::UPE,
                request: None,
                stale: false,
            }),
            Ok(response) => Ok((response, connection)),
            Err(error) => {
                if error.reason == ResetReason::Protocol {
                    stats.upstream_cx_protocol_error.inc();
                }
                Err(reset(error, connection.reused))
            }
        }
    }

    /// The request as this host shall see it.
    fn upstream_request(&self, host: &WorkerHost, mut head: RequestHead, body: Body, http2: bool) -> Request<Body> {
        let name = Some(&host.host.hostname).filter(|name| !name.is_empty());
        if let (HostRewrite::Auto, Some(name)) = (&self.action.host_rewrite, name)
            && let Ok(name) = HeaderValue::from_str(name)
        {
            let suppress = self.cx.suppress_envoy_headers;
            set_host(&mut head, name, self.action.append_x_forwarded_host, suppress);
        }
        if self.cx.route.as_ref().is_some_and(|route| route.virtual_host().include_request_attempt_count) {
            head.headers.insert(X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(self.count));
        }
        if http2 {
            to_http2(&mut head);
        } else {
            to_http1(&mut head);
        }
        Request::from_parts(head, body)
    }

    fn timed_out(&self, host: &WorkerHost, failure: Failure) -> Failed {
        let stats = &self.cluster.cluster.stats;
        if failure == Failure::MaxDuration {
            stats.upstream_rq_max_duration_reached.inc();
            let complete = self.cx.progress.request_complete.get().is_some();
            let status = if complete { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
            let (reason, flags) = ("local reset", ResponseFlags::UMSDR);
            return Failed { failure, reason, transport: None, status, flags, request: None, stale: false };
        }
        let flags = if failure == Failure::PerTryIdleTimeout {
            stats.upstream_rq_per_try_idle_timeout.inc();
            ResponseFlags::SI
        } else {
            stats.upstream_rq_per_try_timeout.inc();
            ResponseFlags::UT
        };
        host.count(HostCounter::RqTimeout, 1);
        let (status, reason) = (self.timeouts.status, "upstream request timeout");
        Failed { failure, reason, transport: None, status, flags, request: None, stale: false }
    }

    fn give_up(&self, end: &mut StreamEnd, failed: Failed) -> LocalReply {
        let stats = &self.cluster.cluster.stats;
        if failed.failure == Failure::MaxDuration {
            end.judge(true);
            let (text, details) = ("upstream max stream duration reached", "upstream_max_stream_duration_reached");
            return LocalReply::new(failed.status, text, failed.flags, details);
        }
        stats.upstream_rq.inc(failed.status.as_u16());
        if failed.failure == Failure::Overflow {
            end.excuse_host();
            self.cluster.cluster.dropped.inc();
            return overloaded();
        }
        end.judge(true);
        let details = match failed.failure {
            Failure::PerTryTimeout => Some("upstream_per_try_timeout"),
            Failure::PerTryIdleTimeout => Some("upstream_per_try_idle_timeout"),
            _ => None,
        };
        if let Some(details) = details {
            return LocalReply::new(failed.status, self.timeouts.text(), failed.flags, details);
        }
        if failed.flags == ResponseFlags::UR {
            stats.upstream_rq_rx_reset.inc();
        }
        let (retried, reason) = (self.count > 1, failed.reason);
        let reset = if retried { "retried and the latest reset reason" } else { "reset reason" };
        let text = format!("upstream connect error or disconnect/reset before headers. {reset}: {reason}");
        let mut details = format!("upstream_reset_before_response_started{{{reason}");
        if let Some(cause) = failed.transport {
            details = format!("{details}|{cause}");
        }
        // Details are one word, for the logs.
        let details = format!("{details}}}").replace(' ', "_");
        LocalReply::new(failed.status, text, failed.flags, details)
    }
}

/// What a cluster's hosts are spoken to.
pub(super) fn protocol<'a>(cluster: &'a WorkerCluster, head: &RequestHead) -> Wanted<'a> {
    match &cluster.cluster.config.protocol {
        UpstreamProtocol::Http1 => Wanted::Http1,
        UpstreamProtocol::Http2(options) => Wanted::Http2(options),
        UpstreamProtocol::Downstream(options) if head.version == Version::HTTP_2 => Wanted::Http2(options),
        UpstreamProtocol::Downstream(_) => Wanted::Http1,
        UpstreamProtocol::Auto(options) => Wanted::Auto(options),
    }
}

fn overloaded() -> LocalReply {
    let text = "upstream connect error or disconnect/reset before headers. reset reason: overflow";
    let details = "upstream_reset_before_response_started{overflow}";
    let mut reply = LocalReply::new(StatusCode::SERVICE_UNAVAILABLE, text, ResponseFlags::UO, details);
    reply.headers.push((X_ENVOY_OVERLOADED, HeaderValue::from_static("true")));
    reply
}

fn connect_failed(error: PoolError, head: RequestHead, body: Body) -> Failed {
    let transport = match &error {
        PoolError::Connect(error) => error.transport_failure(),
        PoolError::Handshake(_) | PoolError::Overflow => None,
    };
    let (reason, status, flags): (&'static str, _, _) = match error {
        PoolError::Overflow => ("overflow", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UO),
        PoolError::Connect(ConnectError::Timeout) => {
            ("connection timeout", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UF)
        }
        PoolError::Connect(ConnectError::Io(_) | ConnectError::Tls(_)) => {
            ("remote connection failure", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UF)
        }
        PoolError::Handshake(_) => ("connection termination", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UC),
    };
    let request = Some(Box::new((head, body)));
    let failure = if reason == "overflow" { Failure::Overflow } else { Failure::Connect };
    Failed { failure, reason, transport, status, flags, request, stale: false }
}

fn reset(Reset { request, reason }: Reset, reused: bool) -> Failed {
    let unsent = request.is_some();
    let failure = match (unsent, reason) {
        (true, _) => Failure::BeforeRequest,
        (false, ResetReason::Refused) => Failure::Refused,
        (false, _) => Failure::AfterRequest,
    };
    let (reason, status, flags) = match reason {
        ResetReason::Protocol => ("protocol error", StatusCode::BAD_GATEWAY, ResponseFlags::UPE),
        ResetReason::Refused => ("remote refused stream reset", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UR),
        ResetReason::Remote => ("remote reset", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UR),
        ResetReason::Closed => ("connection termination", StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UC),
    };
    let request = request.map(|request| Box::new(request.into_parts()));
    Failed { failure, reason, transport: None, status, flags, request, stale: unsent && reused }
}

/// Origin form and a `host` header.
pub(super) fn to_http1(head: &mut RequestHead) {
    if head.uri.authority().is_some() {
        if let Ok(host) = HeaderValue::from_str(authority(head)) {
            head.headers.insert(HOST, host);
        }
        head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
    }
    head.version = Version::HTTP_11;
}

/// A whole URI and no `host` header (RFC 9113, section 8.3.1).
pub(super) fn to_http2(head: &mut RequestHead) {
    if let Some(host) = head.headers.remove(HOST).filter(|_| head.uri.authority().is_none()) {
        let https = super::redirect::scheme(head) == "https";
        let mut parts = std::mem::take(&mut head.uri).into_parts();
        parts.scheme = Some(if https { http::uri::Scheme::HTTPS } else { http::uri::Scheme::HTTP });
        parts.authority = http::uri::Authority::try_from(host.as_bytes()).ok();
        if parts.path_and_query.is_none() {
            parts.path_and_query = Some(http::uri::PathAndQuery::from_static("/"));
        }
        if parts.authority.is_none() {
            parts.scheme = None;
        }
        // A scheme only with an authority, and always a path: always valid.
        head.uri = Uri::from_parts(parts).unwrap_or_default();
    }
    head.version = Version::HTTP_2;
}
