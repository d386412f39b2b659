//! Sends a request to its cluster, as often as the retry policy allows, and answers for the upstream where it fails.

use std::{rc::Rc, time::Duration};

use http::{HeaderValue, Request, Response, StatusCode, Uri, Version, header::HOST};

use super::{
    body::Body,
    codec::Incoming,
    headers::{self, names::*},
    observe::StreamEnd,
    redirect::rewrite_path,
    retry::{self, Failure},
    route_match::authority,
    stream::{LocalReply, RequestHead, StreamCx},
    timers::{Expired, Timers},
    waiting,
};
use crate::{
    access_log::ResponseFlags,
    config::model::{ForwardAction, HeaderMutations, HostRewrite, RetryPolicy, UpstreamProtocol},
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
    body: Body,
) -> Result<Answer, LocalReply> {
    let config = &end.state.manager.config;
    let Some(cluster) = cx.cluster.as_ref().map(Rc::clone) else {
        end.state.manager.stats.no_cluster.inc();
        return Err(LocalReply::new(action.cluster_not_found_status, "", ResponseFlags::NC, "cluster_not_found"));
    };
    if cluster.cluster.refuses_for_maintenance() {
        return Err(maintenance(&cluster));
    }
    let suppress = cx.suppress_envoy_headers;
    let timeout = route_timeout(cx, action, &head);
    finish_request(cx, action, &mut head, timeout, suppress);
    let idle = action.idle_timeout.unwrap_or(config.stream_idle_timeout);
    end.state.allow_stall(idle);
    let mut timers = Timers::new(Rc::clone(&cx.progress), cx.started, timeout, idle, config.request_timeout);

    let policy =
        action.retry_policy.as_ref().or(cx.route.as_ref().and_then(|r| r.virtual_host().retry_policy.as_ref()));
    let mut attempts =
        Attempts { cx, cluster: &cluster, action, policy: policy.map(|policy| &**policy), count: 0, retrying: None };
    let result = tokio::select! {
        biased;
        result = attempts.run(end, head, body) => result,
        expired = timers.expired() => Err(expire(end, &cluster, expired)),
    };
    let count = attempts.count;
    drop(attempts);
    let (response, connection) = result?;
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

/// The time that the whole exchange may take: the route's, or an internal client's.
fn route_timeout(cx: &StreamCx, action: &ForwardAction, head: &RequestHead) -> Option<Duration> {
    let asked = head.headers.get(X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS).filter(|_| cx.internal);
    match asked.and_then(|value| value.to_str().ok()?.parse().ok()) {
        Some(0) => None,
        Some(milliseconds) => Some(Duration::from_millis(milliseconds)),
        None => action.timeout,
    }
}

/// What the router does to a request's head, once for all attempts.
fn finish_request(
    cx: &StreamCx,
    action: &ForwardAction,
    head: &mut RequestHead,
    timeout: Option<Duration>,
    suppress: bool,
) {
    if cx.internal {
        head.headers.remove(X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS);
    }
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
    if let (Some(timeout), false) = (timeout, suppress) {
        let mut digits = itoa::Buffer::new();
        if let Ok(value) = HeaderValue::from_str(digits.format(timeout.as_millis() as u64)) {
            head.headers.insert(X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, value);
        }
    }
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

fn expire(end: &mut StreamEnd, cluster: &WorkerCluster, expired: Expired) -> LocalReply {
    match expired {
        Expired::Route => {
            cluster.cluster.stats.upstream_rq_timeout.inc();
            cluster.cluster.stats.upstream_rq.inc(StatusCode::GATEWAY_TIMEOUT.as_u16());
            end.judge(true);
            if let Some((_, host)) = &end.host {
                host.count(HostCounter::RqTimeout, 1);
            }
            let text = "upstream request timeout";
            LocalReply::new(StatusCode::GATEWAY_TIMEOUT, text, ResponseFlags::UT, "response_timeout")
        }
        Expired::Idle | Expired::Request | Expired::Malformed(_) => waiting::expire(&end.state, &end.progress, expired),
    }
}

struct Attempts<'a> {
    cx: &'a StreamCx,
    cluster: &'a Rc<WorkerCluster>,
    action: &'a ForwardAction,
    policy: Option<&'a RetryPolicy>,
    count: u32,
    /// Counts this request as a retry from its second attempt on.
    retrying: Option<RetrySlot>,
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
            let kept = self.copy_for_retry(&head, &body);
            match self.attempt(&host, head, body).await {
                Ok((response, connection)) => {
                    let status = response.status();
                    stats.upstream_rq.inc(status.as_u16());
                    let wanted = self.policy.is_some_and(|policy| retry::wants_status(policy, status));
                    let again = wanted && !self.is_exhausted(end);
                    match kept.filter(|_| again) {
                        Some(copy) if self.may_retry().await => (head, body) = (copy, Body::Empty),
                        _ => {
                            let (head, body) = response.into_parts();
                            end.judge_response(&head, http_body::Body::is_end_stream(&body));
                            return Ok((Response::from_parts(head, body), connection));
                        }
                    }
                }
                Err(mut failed) => {
                    let request = failed.request.take().or_else(|| kept.map(|copy| Box::new((copy, Body::Empty))));
                    let free = failed.stale && request.is_some();
                    if !free && (!self.wants(&failed) || self.is_exhausted(end)) {
                        return Err(self.give_up(end, failed));
                    }
                    let Some(again) = request else { return Err(self.give_up(end, failed)) };
                    if free {
                        self.count -= 1;
                        end.excuse_host();
                    } else if !self.may_retry().await {
                        return Err(self.give_up(end, failed));
                    }
                    (head, body) = *again;
                }
            }
        }
    }

    fn choose(&self, end: &mut StreamEnd, head: &RequestHead) -> Result<Rc<WorkerHost>, LocalReply> {
        end.leave_host();
        let stats = &self.cluster.cluster.stats;
        let limits = self.cluster.cluster.limits(self.action.high_priority);
        if stats.upstream_rq_active.value() >= u64::from(limits.max_requests()) {
            stats.upstream_rq_pending_overflow.inc();
            self.cluster.cluster.dropped.inc();
            return Err(overloaded());
        }
        let pick = PickCx {
            override_dst: self.cx.override_dst,
            headers: Some(&head.headers),
            original_dst: self.cx.connection.original_dst,
        };
        let Some(host) = self.cluster.pick(&pick) else {
            stats.upstream_cx_none_healthy.inc();
            let (status, text) = (StatusCode::SERVICE_UNAVAILABLE, "no healthy upstream");
            return Err(LocalReply::new(status, text, ResponseFlags::UH, "no_healthy_upstream"));
        };
        stats.upstream_rq_total.inc();
        end.set_host(self.cluster, &host);
        Ok(host)
    }

    /// A copy of the head, where a failure after it was sent may be tried again. A body that streams cannot be.
    fn copy_for_retry(&self, head: &RequestHead, body: &Body) -> Option<RequestHead> {
        let policy = self.policy?;
        let left = self.count <= policy.num_retries;
        let wanted = retry::may_want_status(policy)
            || policy.retry_on.refused_stream && !matches!(self.protocol(head), Wanted::Http1);
        (left && wanted && matches!(body, Body::Empty)).then(|| head.clone())
    }

    fn protocol(&self, head: &RequestHead) -> Wanted<'_> {
        match &self.cluster.cluster.config.protocol {
            UpstreamProtocol::Http1 => Wanted::Http1,
            UpstreamProtocol::Http2(options) => Wanted::Http2(options),
            UpstreamProtocol::Downstream(options) if head.version == Version::HTTP_2 => Wanted::Http2(options),
            UpstreamProtocol::Downstream(_) => Wanted::Http1,
            UpstreamProtocol::Auto(options) => Wanted::Auto(options),
        }
    }

    async fn attempt(
        &self,
        host: &Rc<WorkerHost>,
        head: RequestHead,
        body: Body,
    ) -> Result<(Response<Incoming>, Connection), Failed> {
        let limit = self.policy.and_then(|policy| policy.per_try_timeout);
        let attempt = self.send(host, head, body);
        let Some(limit) = limit else { return attempt.await };
        tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_elapsed| {
            self.cluster.cluster.stats.upstream_rq_per_try_timeout.inc();
            Err(Failed {
                failure: Failure::PerTryTimeout,
                reason: "upstream request timeout",
                transport: None,
                status: StatusCode::GATEWAY_TIMEOUT,
                flags: ResponseFlags::UT,
                request: None,
                stale: false,
            })
        })
    }

    async fn send(
        &self,
        host: &Rc<WorkerHost>,
        head: RequestHead,
        body: Body,
    ) -> Result<(Response<Incoming>, Connection), Failed> {
        let (source, high) = (self.cx.connection.source, self.action.high_priority);
        let wanted = self.protocol(&head);
        let connection = match host.acquire(self.cluster, wanted, source, high).await {
            Ok(connection) => connection,
            Err(error) => return Err(connect_failed(error, head, body)),
        };
        let request = self.upstream_request(host, head, body, connection.is_http2());
        let stats = &self.cluster.cluster.stats;
        match connection.send(request, |status| stats.upstream_rq.inc(status.as_u16())).await {
            Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => Err(Failed {
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

    fn wants(&self, failed: &Failed) -> bool {
        self.policy.is_some_and(|policy| retry::wants_failure(policy, failed.failure))
    }

    /// Whether there were as many retries as there may be, of those that are wanted.
    fn is_exhausted(&self, end: &mut StreamEnd) -> bool {
        let exhausted = self.policy.is_some_and(|policy| self.count > policy.num_retries);
        if exhausted {
            self.cluster.cluster.stats.upstream_rq_retry_limit_exceeded.inc();
            end.flags |= ResponseFlags::URX;
        }
        exhausted
    }

    /// Whether one more attempt is allowed; if so, waits for its turn.
    async fn may_retry(&mut self) -> bool {
        let Some(policy) = self.policy else { return false };
        let stats = &self.cluster.cluster.stats;
        if self.retrying.is_none() {
            let limits = self.cluster.cluster.limits(self.action.high_priority);
            self.retrying = RetrySlot::take(self.cluster, limits.max_retries());
            if self.retrying.is_none() {
                stats.upstream_rq_retry_overflow.inc();
                return false;
            }
        }
        if !retry::is_enabled() {
            return false;
        }
        stats.upstream_rq_retry.inc();
        tokio::time::sleep(retry::back_off(policy, self.count)).await;
        true
    }

    fn give_up(&self, end: &mut StreamEnd, failed: Failed) -> LocalReply {
        let stats = &self.cluster.cluster.stats;
        stats.upstream_rq.inc(failed.status.as_u16());
        if failed.reason == "overflow" {
            end.excuse_host();
            self.cluster.cluster.dropped.inc();
            return overloaded();
        }
        end.judge(true);
        if failed.failure == Failure::PerTryTimeout {
            return LocalReply::new(
                failed.status,
                "upstream request timeout",
                failed.flags,
                "upstream_per_try_timeout",
            );
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

/// One of the cluster's retries at a time, of this worker.
struct RetrySlot(Rc<WorkerCluster>);

impl RetrySlot {
    fn take(cluster: &Rc<WorkerCluster>, limit: u32) -> Option<RetrySlot> {
        let active = cluster.active_retries.get();
        (active < limit).then(|| {
            cluster.active_retries.set(active + 1);
            RetrySlot(Rc::clone(cluster))
        })
    }
}

impl Drop for RetrySlot {
    fn drop(&mut self) {
        self.0.active_retries.set(self.0.active_retries.get() - 1);
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
        // As the system words it, without the number.
        PoolError::Connect(ConnectError::Io(error)) => {
            let text = error.to_string();
            Some(format!("delayed connect error: {}", text.split(" (os error").next().unwrap_or_default()))
        }
        _ => None,
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
    Failed { failure: Failure::Connect, reason, transport, status, flags, request, stale: false }
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
fn to_http1(head: &mut RequestHead) {
    if head.uri.authority().is_some() {
        if let Ok(host) = HeaderValue::from_str(authority(head)) {
            head.headers.insert(HOST, host);
        }
        head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
    }
    head.version = Version::HTTP_11;
}

/// A whole URI and no `host` header (RFC 9113, section 8.3.1).
fn to_http2(head: &mut RequestHead) {
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
