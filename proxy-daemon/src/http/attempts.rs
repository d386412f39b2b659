//! The attempts at a request: one host each, as many as the retry policy allows, and the answer where the last one fails.

mod failed;
mod one;

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    ops::Deref,
    rc::Rc,
    time::Instant,
};

use http::{HeaderValue, Response, StatusCode};

pub(super) use self::failed::Failed;
use super::{
    body::Body,
    choice::{self, named_host},
    codec::Incoming,
    forward::admits,
    hash_policy,
    headers::names::*,
    retry::{Failure, RetryState, Verdict},
    route_match::authority,
    stream::{LocalReply, OverrideHost, RequestHead, StreamCx},
    stream_end::StreamEnd,
    timeouts::Timeouts,
    upstream_head::protocol,
};
use crate::{
    access_log::ResponseFlags,
    config::model::{ForwardAction, MetadataMatch},
    tls::PeerName,
    upstream::{Chosen, Connection, PickCx, Seen, Wanted, WorkerCluster},
};

/// What all attempts at one request have in common.
#[derive(Clone, Copy)]
pub(super) struct Shared<'a> {
    pub(super) cx: &'a StreamCx,
    pub(super) cluster: &'a Rc<WorkerCluster>,
    pub(super) action: &'a ForwardAction,
    pub(super) timeouts: &'a Timeouts,
    /// What the request calls its hosts, where handshakes with them go by that.
    pub(super) peer: Option<&'a PeerName>,
    /// The same of `unless_connected`.
    pub(super) other_peer: Option<&'a PeerName>,
    /// `scheme_header_transformation.match_upstream`
    pub(super) scheme_matches_upstream: bool,
}

/// All attempts at one request.
pub(super) struct Attempts<'a> {
    pub(super) shared: Shared<'a>,
    pub(super) retry: Option<RetryState<'a>>,
    pub(super) count: u32,
    /// How many there are at a time, where that may be more than one.
    pub(super) under_way: Cell<usize>,
    /// What balancers go by that hash.
    pub(super) hash: Option<u64>,
    /// Those that were made for a balancer with a policy of its own, the last time that it chose.
    pub(super) cookies: RefCell<Vec<HeaderValue>>,
    /// What balancers with subsets go by.
    pub(super) metadata_match: Option<Cow<'a, MetadataMatch>>,
    /// How many of the hosts that the request names have had their turn.
    pub(super) named: Cell<usize>,
    /// The attempt that is under way may last until then.
    pub(super) until: Cell<Option<Instant>>,
}

impl<'a> Deref for Attempts<'a> {
    type Target = Shared<'a>;

    fn deref(&self) -> &Shared<'a> {
        &self.shared
    }
}

/// How often a request is sent again because its host went away without having looked at it.
const MAX_MOVES: u32 = 3;

impl<'a> Attempts<'a> {
    /// Where nobody could be connected to in a tunnel, the request goes where it would have gone from here on, as its first attempt. Gives
    /// whether it does.
    ///
    /// # Errors
    /// The answer of a cluster that takes no requests now.
    pub(super) fn leaves_tunnel(&mut self, failed: &Failed, end: &StreamEnd) -> Result<bool, LocalReply> {
        let Shared { cx, action, other_peer, .. } = self.shared;
        let Some(cluster) = cx.unless_connected.as_ref().filter(|_| failed.is_unconnected()) else { return Ok(false) };
        if cx.progress.left_tunnel.replace(true) {
            return Ok(false);
        }
        self.count -= 1;
        self.shared = Shared { cluster, peer: other_peer, ..self.shared };
        self.metadata_match = choice::metadata_match(cx, action, cluster);
        admits(cx, end, cluster)?;
        Ok(true)
    }
}

impl Attempts<'_> {
    /// The answer of the first attempt that is not to be followed by another.
    #[inline(always)]
    pub(super) async fn run(
        &mut self,
        end: &mut StreamEnd,
        mut head: RequestHead,
        mut body: Body,
    ) -> Result<(Response<Incoming>, Connection), LocalReply> {
        if self.retry.as_ref().is_some_and(|retry| retry.hedges) && self.timeouts.has_per_try() {
            return Box::pin(self.run_hedged(end, head)).await;
        }
        let mut moves = 0;
        loop {
            self.count += 1;
            let chosen = self.choose(end, &head)?;
            let kept = self.copy_for_retry(&chosen, &head, &body);
            if let Some(replay) = self.retry.as_ref().and_then(|retry| retry.body.as_ref()) {
                body = replay.reader();
            }
            let mut timed_out = false;
            let shared = self.shared;
            match shared.attempt((&end.notes, &self.until), &chosen, (head, body), self.count, None).await {
                Ok((response, connection)) => {
                    let (response, incoming) = response.into_parts();
                    let verdict =
                        self.judge(end, |retry, cluster, high| retry.judge_response(&response, cluster, high));
                    match kept.filter(|_| verdict == Verdict::Retry) {
                        Some(copy) => {
                            self.cluster.cluster.stats.count_retried(response.status.as_u16());
                            set_aside(&incoming, connection);
                            (head, body) = copy;
                        }
                        None => {
                            end.judge_response(&response, http_body::Body::is_end_stream(&incoming));
                            return Ok((Response::from_parts(response, incoming), connection));
                        }
                    }
                }
                Err(mut failed) => {
                    if let Some(reply) = self.cx.progress.instead.take() {
                        // The request is at fault, and not its host.
                        end.excuse_host();
                        return Err(*reply);
                    }
                    let request = failed.request.take().or_else(|| kept.map(Box::new));
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
                    let request = match request {
                        Some(again) if self.leaves_tunnel(&failed, end)? => {
                            (head, body) = *again;
                            continue;
                        }
                        request => request,
                    };
                    let failure = failed.failure;
                    let verdict = self.judge(end, |retry, cluster, high| retry.judge_failure(failure, cluster, high));
                    // It is as if it had not been sent there.
                    let moves_on = verdict == Verdict::No && failed.gone_away && moves < MAX_MOVES && self.has_body();
                    if failed.gone_away && !(moves_on && request.is_some()) {
                        chosen.host.saw(Seen::ConnectFailed);
                    }
                    let again = match request {
                        Some(again) if verdict == Verdict::Retry => again,
                        Some(again) if moves_on => {
                            moves += 1;
                            self.count -= 1;
                            end.excuse_host();
                            (head, body) = *again;
                            continue;
                        }
                        _ => return Err(self.give_up(end, failed)),
                    };
                    timed_out = matches!(failure, Failure::PerTryTimeout | Failure::PerTryIdleTimeout);
                    (head, body) = *again;
                }
            }
            self.prepare_retry(&chosen, &mut head, timed_out).await;
            end.keep_sent(&head);
        }
    }

    /// Whether there is one more attempt; the log is told why not.
    pub(super) fn judge(
        &mut self,
        end: &mut StreamEnd,
        judge: impl FnOnce(&mut RetryState<'_>, &Rc<WorkerCluster>, bool) -> Verdict,
    ) -> Verdict {
        let Some(retry) = &mut self.retry else { return Verdict::No };
        let verdict = judge(retry, self.shared.cluster, self.shared.action.high_priority);
        match verdict {
            Verdict::LimitExceeded => end.flags |= ResponseFlags::URX,
            Verdict::Overflow => end.flags |= ResponseFlags::UO,
            Verdict::Retry | Verdict::No => {}
        }
        verdict
    }

    /// Waits for the next attempt's turn.
    async fn prepare_retry(&mut self, chosen: &Chosen, head: &mut RequestHead, timed_out: bool) {
        if let Some(retry) = &mut self.retry {
            retry.avoid(self.shared.cluster, chosen);
            let pause = retry.pause(self.shared.cluster);
            tokio::time::sleep(pause).await;
        }
        self.tell_retry(head, timed_out);
    }

    /// Tells the upstream of a further attempt that it is one.
    pub(super) fn tell_retry(&self, head: &mut RequestHead, timed_out: bool) {
        self.timeouts.tell_again(head, self.cx);
        if self.cx.route.as_ref().is_some_and(|route| route.virtual_host().include_is_timeout_retry_header) {
            let value = HeaderValue::from_static(if timed_out { "true" } else { "false" });
            head.headers.insert(X_ENVOY_IS_TIMEOUT_RETRY, value);
        }
    }

    pub(super) fn choose(&self, end: &mut StreamEnd, head: &RequestHead) -> Result<Chosen, LocalReply> {
        end.leave_host();
        self.cx.progress.attempts.set(self.count);
        if self.cx.route.as_ref().is_some_and(|route| route.virtual_host().include_request_attempt_count) {
            end.keep_attempt(self.count);
        }
        let pick = PickCx {
            override_dst: self.cx.override_dst.filter(|_| !self.cx.progress.left_tunnel.get()),
            headers: Some(&head.headers),
            host: Some(authority(head)),
            original_dst: self.cx.connection.original_dst,
            hash: self.hash,
            attempt: 0,
            metadata_match: self.metadata_match.as_deref(),
            tried: self.retry.as_ref().and_then(|retry| retry.priorities.as_ref()),
            ..PickCx::default()
        };
        let choose = |attempt: u32| {
            let (cluster, mut pick) = self.cluster.place(PickCx { attempt, ..pick })?;
            let policies = &*cluster.cluster.config.lb.hash_policy;
            if !policies.is_empty() {
                let mut made = Vec::new();
                pick.hash = hash_policy::hash(policies, head, self.cx, &mut made);
                self.cookies.replace(made);
            }
            let host = named_host(self.cx, head, &cluster, &self.named).or_else(|| cluster.pick(&pick))?;
            Some(Chosen { cluster, host })
        };
        let wanted = self.cx.override_host.as_ref().filter(|_| self.count == 1);
        let overridden = wanted.map(|wanted| (wanted, self.cluster.host_at(&wanted.address)));
        let statuses = self.cluster.cluster.config.health.override_statuses;
        let mut chosen = match &overridden {
            Some((_, Some(host))) if statuses.has(host.host.status()) => {
                let chosen = Chosen { cluster: Rc::clone(self.cluster), host: Rc::clone(host) };
                return Ok(self.take(end, chosen));
            }
            Some((OverrideHost { strict: Some(status), .. }, host)) => {
                // One that is there and may not be used is another matter.
                let status = if host.is_some() { StatusCode::SERVICE_UNAVAILABLE } else { *status };
                return Err(self.no_host(end, status));
            }
            Some(_) | None => choose(0),
        };
        for attempt in 1..=self.retry.as_ref().map_or(0, RetryState::host_selection_attempts) {
            let avoided = |chosen: &&Chosen| self.retry.as_ref().is_some_and(|retry| retry.avoids(&chosen.host));
            if chosen.as_ref().filter(avoided).is_none() {
                break;
            }
            chosen = choose(attempt);
        }
        match chosen {
            Some(chosen) => Ok(self.take(end, chosen)),
            None => Err(self.no_host(end, StatusCode::SERVICE_UNAVAILABLE)),
        }
    }

    fn no_host(&self, end: &StreamEnd, status: StatusCode) -> LocalReply {
        end.charge(self.cluster, status, None);
        self.cluster.cluster.stats.upstream_cx_none_healthy.inc();
        LocalReply::new(status, "no healthy upstream", ResponseFlags::UH, "no_healthy_upstream")
    }

    /// The attempt's host is this one.
    fn take(&self, end: &mut StreamEnd, chosen: Chosen) -> Chosen {
        end.set_host(self.cluster, &chosen, self.action.high_priority);
        self.cluster.cluster.attempt_begins(self.action.high_priority);
        chosen
    }

    /// A copy of the request, where a failure after it was sent may be tried again, or its host is known to go away without having looked at
    /// what it was sent: a copy of the head costs too much to have one of each request. The body is there where no retry policy keeps that.
    fn copy_for_retry(&self, chosen: &Chosen, head: &RequestHead, body: &Body) -> Option<(RequestHead, Body)> {
        let http1 = || matches!(protocol(&chosen.cluster, head), Wanted::Http1);
        let retry = self.retry.as_ref();
        let loses = chosen.host.pool.loses();
        if !loses && !retry.is_some_and(|retry| retry.needs_copy(http1())) {
            return None;
        }
        let whole = match body {
            Body::Full(bytes) => Some(Body::Full(bytes.clone())),
            body => (http_body::Body::is_end_stream(body) || retry.is_some_and(|retry| retry.body.is_some()))
                .then_some(Body::Empty),
        };
        let may_move = loses && whole.is_some();
        (may_move || retry.is_some_and(|retry| retry.needs_copy(http1())))
            .then(|| (head.clone(), whole.unwrap_or_default()))
    }

    /// Whether all of the request's body that has been sent can be sent again, where it has one.
    fn has_body(&self) -> bool {
        self.retry.as_ref().and_then(|retry| retry.body.as_ref()).is_none_or(|replay| !replay.is_abandoned())
    }

    pub(super) fn give_up(&self, end: &mut StreamEnd, failed: Failed) -> LocalReply {
        let member = end.host.as_ref().map_or_else(|| Rc::clone(self.cluster), |(cluster, _)| Rc::clone(cluster));
        if failed.failure == Failure::MaxDuration {
            end.judge(true);
            let (text, details) = ("upstream max stream duration reached", "upstream_max_stream_duration_reached");
            return LocalReply::new(failed.status, text, failed.flags, details);
        }
        if failed.failure == Failure::NoPool {
            end.excuse_host();
            end.leave_host();
            end.charge(self.cluster, failed.status, None);
            return LocalReply::new(failed.status, "no healthy upstream", failed.flags, "no_healthy_upstream");
        }
        end.charge(self.cluster, failed.status, end.attempted());
        if failed.failure == Failure::Overflow {
            end.excuse_host();
            let refused_by = end.host.as_ref().filter(|_| end.notes.refused.take()).map(|(_, host)| Rc::clone(host));
            end.keep_refused(refused_by);
            member.cluster.dropped.inc();
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

fn overloaded() -> LocalReply {
    let text = "upstream connect error or disconnect/reset before headers. reset reason: overflow";
    let details = "upstream_reset_before_response_started{overflow}";
    let mut reply = LocalReply::new(StatusCode::SERVICE_UNAVAILABLE, text, ResponseFlags::UO, details);
    reply.headers.push((X_ENVOY_OVERLOADED, HeaderValue::from_static("true")));
    reply
}

/// A response is not the client's. Its connection may be used again, unless there is more of it to come.
pub(super) fn set_aside(incoming: &Incoming, connection: Connection) {
    if http_body::Body::is_end_stream(incoming) {
        connection.release();
    }
}
