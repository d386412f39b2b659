//! Requests that Culvert makes itself, from a worker to a cluster's hosts: copies of requests, and what filters ask other services.
//!
//! They go by the cluster's circuit breakers, balancer, pools and statistics, like those of clients. What comes back is read up to a
//! bound, and for a time. Whoever drops a call breaks it off: an HTTP/2 stream is reset, an HTTP/1 connection closed.

pub(crate) mod grpc;
pub(crate) mod grpc_stream;

use std::{
    net::IpAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, StatusCode};
use http_body_util::BodyExt as _;

use super::{
    body::Body,
    codec::Incoming,
    hash_policy::hash_of,
    headers::{self, names::*},
    illegal,
    retry::{self, RetryState, Verdict},
    route_match::authority,
    stream::{RequestHead, ResponseHead, StreamCx},
    upstream_head,
};
use crate::{
    config::model::{HashPolicy, MetadataMatch, RetryPolicy},
    upstream::{
        Chosen, Connection, Overload, PickCx, PoolError, Reset, ResetReason, Seen, Source, WorkerCluster, WorkerHost,
    },
};

/// Why there is no answer, or not a whole one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// As many requests are under way as may be.
    Overflow,
    /// The cluster has no host.
    NoHost,
    /// No connection to the host could be had, or it broke off before the answer's head.
    Reset,
    /// It took too long.
    TimedOut,
    /// The answer broke off after its head.
    Broken,
    /// The answer is longer than it may be.
    TooLong,
}

/// A call under way, at the circuit breaker and at its host.
struct UnderWay {
    cluster: Rc<WorkerCluster>,
    chosen: Chosen,
    started: Instant,
    /// The answer is a canary's.
    canary: bool,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.chosen.cluster.cluster.end_request(false);
        let (stats, elapsed) = (&self.cluster.cluster.stats, self.started.elapsed().as_millis() as u64);
        stats.record_time(elapsed, true);
        if self.canary {
            stats.record_canary_time(elapsed);
        }
        self.chosen.host.end_request();
    }
}

/// An answer whose body is still to come.
pub(super) struct Answer {
    /// Status and headers.
    pub(super) head: ResponseHead,
    body: Incoming,
    connection: Connection,
    under_way: UnderWay,
}

/// Marks a request as one that a proxy has made: `x-envoy-internal`.
pub(super) fn mark_internal(head: &mut RequestHead) {
    head.headers.insert(X_ENVOY_INTERNAL, HeaderValue::from_static("true"));
}

/// Tells how long the answer is waited for.
pub(super) fn expect_within(head: &mut RequestHead, limit: Duration) {
    let milliseconds = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    head.headers.insert(X_ENVOY_EXPECTED_RQ_TIMEOUT_MS, HeaderValue::from(milliseconds));
}

/// Marks a request as one that a proxy has made: `x-envoy-internal`, and the node in `x-forwarded-for`.
pub(super) fn mark(head: &mut RequestHead, cx: &StreamCx) {
    mark_from(head, own_address(cx));
}

/// This node's address, as those are told it that a stream's calls go to.
pub(super) fn own_address(cx: &StreamCx) -> IpAddr {
    cx.connection.node_ip.unwrap_or_else(|| cx.connection.local.ip())
}

/// [`mark`], of a call that no stream makes.
fn mark_from(head: &mut RequestHead, own: IpAddr) {
    mark_internal(head);
    if let Ok(own) = HeaderValue::from_str(&own.to_string()) {
        headers::append(&mut head.headers, X_FORWARDED_FOR, &own, ",");
    }
}

/// Sends a request to one of the cluster's hosts and waits for the answer's head. `source`: the address that it shall come from.
///
/// # Errors
/// Why there is none; the cluster has counted it.
pub(super) async fn send(
    cluster: &Rc<WorkerCluster>,
    source: Option<Source>,
    head: RequestHead,
    body: Body,
) -> Result<Answer, Failure> {
    send_to(cluster, source, (None, None), head, body).await
}

/// The same, to a host whose metadata says this, or that this hash chooses.
pub(super) async fn send_to(
    cluster: &Rc<WorkerCluster>,
    source: Option<Source>,
    (metadata_match, hash): (Option<&MetadataMatch>, Option<u64>),
    head: RequestHead,
    body: Body,
) -> Result<Answer, Failure> {
    admit(cluster, &head)?;
    let ended = attempt(cluster, (source, metadata_match, hash), head, body, None).await;
    ended.map_err(|ended| ended.unwrap_or(Failure::Reset))
}

/// The same, as often as the policy has it. `body` makes a body for each attempt.
pub(super) async fn send_by(
    cluster: &Rc<WorkerCluster>,
    policy: Option<&RetryPolicy>,
    mut head: RequestHead,
    body: impl Fn() -> Body,
) -> Result<Answer, Failure> {
    let limit = policy.and_then(|policy| policy.per_try_timeout);
    let Some(mut retry) = policy.and_then(|policy| RetryState::take((Some(policy), false), &mut head, None)) else {
        return send(cluster, None, head, body()).await;
    };
    admit(cluster, &head)?;
    loop {
        let attempt = attempt(cluster, (None, None, None), head.clone(), body(), Some(&mut retry));
        let ended = match limit {
            None => attempt.await,
            Some(limit) => match tokio::time::timeout(limit, attempt).await {
                Ok(ended) => ended,
                Err(_) => {
                    let stats = &cluster.cluster.stats;
                    stats.upstream_rq_per_try_timeout.inc();
                    Err(match retry.judge_failure(retry::Failure::PerTryTimeout, cluster, false) {
                        Verdict::Retry => None,
                        _ => {
                            stats.charge(StatusCode::GATEWAY_TIMEOUT.as_u16(), true);
                            Some(Failure::TimedOut)
                        }
                    })
                }
            },
        };
        match ended {
            Ok(answer) => return Ok(answer),
            Err(Some(failure)) => return Err(failure),
            Err(None) => tokio::time::sleep(retry.pause(cluster)).await,
        }
    }
}

/// Whether the request may be sent to the cluster now.
fn admit(cluster: &WorkerCluster, head: &RequestHead) -> Result<(), Failure> {
    let stats = &cluster.cluster.stats;
    if illegal::refusal(head).is_some() {
        return Err(Failure::Reset);
    }
    if cluster.cluster.refuses_for_maintenance() {
        stats.upstream_rq_maintenance_mode.inc();
        stats.charge(StatusCode::SERVICE_UNAVAILABLE.as_u16(), true);
        return Err(Failure::Overflow);
    }
    if cluster.overload() != Overload::Passes {
        cluster.cluster.dropped_overload.inc();
        stats.charge(StatusCode::SERVICE_UNAVAILABLE.as_u16(), true);
        return Err(Failure::Overflow);
    }
    Ok(())
}

/// One attempt at a request. `Err(None)`: there is to be another.
async fn attempt(
    cluster: &Rc<WorkerCluster>,
    (source, metadata_match, hash): (Option<Source>, Option<&MetadataMatch>, Option<u64>),
    mut head: RequestHead,
    mut body: Body,
    mut retry: Option<&mut RetryState<'_>>,
) -> Result<Answer, Option<Failure>> {
    let stats = &cluster.cluster.stats;
    let (headers, host) = (Some(&head.headers), Some(authority(&head)));
    let pick = PickCx { headers, host, metadata_match, hash, ..PickCx::default() };
    let hash = |policies: &[HashPolicy]| hash_of(policies, Some(&head), None, &mut Vec::new());
    let Some(chosen) = cluster.choose(pick, hash) else {
        stats.upstream_cx_none_healthy.inc();
        return Err(Some(Failure::NoHost));
    };
    // An aggregate's member, which has limits of its own.
    let (member, host) = (Rc::clone(&chosen.cluster), Rc::clone(&chosen.host));
    let member_stats = &member.cluster.stats;
    member.cluster.begin_request(false);
    cluster.cluster.attempt_begins(false);
    host.begin_request();
    let mut under_way = UnderWay { cluster: Rc::clone(cluster), chosen, started: Instant::now(), canary: false };
    let charge = |status: StatusCode, canary: bool| {
        stats.charge(status.as_u16(), true);
        if canary {
            stats.charge_canary(status.as_u16());
        }
        canary
    };
    let failed = |retry: Option<&mut RetryState<'_>>, failure| {
        let verdict = retry.map(|retry| retry.judge_failure(failure, cluster, false));
        if verdict == Some(Verdict::Retry) {
            return None;
        }
        charge(StatusCode::SERVICE_UNAVAILABLE, host.host.is_canary());
        Some(Failure::Reset)
    };
    let wanted = upstream_head::protocol(&member, &head);
    let peer = upstream_head::peer_name(cluster, &head);
    loop {
        let connection = match host.acquire(&member, wanted, (source, peer.as_ref(), None), false).await {
            Ok(connection) => connection,
            Err(error) => {
                if let PoolError::Connect(_) = error {
                    member_stats.upstream_rq_pending_failure_eject.inc();
                }
                let overflow = matches!(error, PoolError::Overflow | PoolError::TooManyRequests | PoolError::NoPool);
                if overflow {
                    member.cluster.dropped.inc();
                }
                let failure = if overflow { retry::Failure::Overflow } else { retry::Failure::Connect };
                return Err(failed(retry, failure));
            }
        };
        member_stats.upstream_rq_total.inc();
        if connection.is_http2() {
            upstream_head::to_http2(&mut head);
        } else {
            upstream_head::to_http1(&mut head);
        }
        let interim = |status, headers: HeaderMap| {
            charge(status, host.host.answers_as_canary(&headers));
        };
        match connection.send(Request::from_parts(head, body), interim).await {
            Ok(response) => {
                let (head, body) = response.into_parts();
                if let Some(retry) = &mut retry
                    && retry.judge_response(&head, cluster, false) == Verdict::Retry
                {
                    stats.count_retried(head.status.as_u16());
                    if http_body::Body::is_end_stream(&body) {
                        connection.release();
                    }
                    return Err(None);
                }
                under_way.canary = charge(head.status, host.host.answers_as_canary(&head.headers));
                return Ok(Answer { head, body, connection, under_way });
            }
            // It died in the pool: another one is tried, until one is new.
            Err(Reset { request: Some(unsent), .. }) if connection.reused => (head, body) = unsent.into_parts(),
            Err(reset) => {
                if reset.reason == ResetReason::GoneAway {
                    host.saw(Seen::ConnectFailed);
                }
                return Err(failed(retry, retry::Failure::of_reset(reset.request.is_some(), reset.reason)));
            }
        }
    }
}

impl Answer {
    /// The next piece of the body, or the trailers; `None` at its end.
    ///
    /// # Errors
    /// The answer broke off.
    pub(super) async fn frame(&mut self) -> Result<Option<http_body::Frame<Bytes>>, Failure> {
        self.body.frame().await.transpose().map_err(|_| Failure::Broken)
    }

    /// What it is an answer on: its host, and the connection.
    pub(super) fn upstream(&self) -> (&Rc<WorkerHost>, &Connection) {
        (&self.under_way.chosen.host, &self.connection)
    }

    /// The body, which is read while something is still sent.
    pub(super) fn body(&mut self) -> &mut Incoming {
        &mut self.body
    }

    /// The whole answer has been read: its connection may be used again.
    pub(super) fn release(self) {
        self.connection.release();
    }

    /// Reads the body, of at most `limit` bytes, and its trailers.
    ///
    /// # Errors
    /// It broke off, or it is longer.
    pub(super) async fn read(mut self, limit: usize) -> Result<(ResponseHead, Bytes, Option<HeaderMap>), Failure> {
        let (mut data, mut trailers) = (bytes::BytesMut::new(), None);
        while let Some(frame) = self.frame().await? {
            match frame.into_data() {
                Ok(piece) if data.len() + piece.len() > limit => return Err(Failure::TooLong),
                Ok(piece) => data.extend_from_slice(&piece),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
        let Answer { head, connection, .. } = self;
        connection.release();
        Ok((head, data.freeze(), trailers))
    }

    /// Reads to the end what nobody is interested in.
    pub(super) async fn discard(mut self) {
        while let Ok(frame) = self.frame().await {
            if frame.is_none() {
                return self.release();
            }
        }
    }
}

/// What becomes of a call within `limit`; without one it may take for ever.
///
/// # Errors
/// The call's, or [`Failure::TimedOut`], which the cluster has counted.
pub(super) async fn within<T>(
    cluster: &WorkerCluster,
    limit: Option<Duration>,
    call: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    match limit {
        None => call.await,
        Some(limit) => until(cluster, tokio::time::sleep(limit), call).await,
    }
}

/// What becomes of a call that may take until `expired`.
///
/// # Errors
/// As [`within`].
pub(super) async fn until<T>(
    cluster: &WorkerCluster,
    expired: impl Future<Output = ()>,
    call: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    tokio::select! {
        biased;
        called = call => called,
        () = expired => {
            cluster.cluster.stats.upstream_rq_timeout.inc();
            cluster.cluster.stats.charge(StatusCode::GATEWAY_TIMEOUT.as_u16(), true);
            Err(Failure::TimedOut)
        }
    }
}
