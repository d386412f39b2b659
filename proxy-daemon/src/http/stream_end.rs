//! The accounts of a stream, which are settled when it ends, however it ends.

mod logs;

use std::{
    borrow::Cow,
    cell::Cell,
    rc::Rc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderValue, StatusCode, header::CONNECTION};

use super::{
    body::BodyError,
    codec::{h1::CodecError, h2_error},
    conn_manager::ConnState,
    filters::HttpFilter,
    headers::names::GRPC_STATUS,
    logged::LogParts,
    look::Look as _,
    proxy_status,
    request_stats::{Counted, RequestStats},
    sizes::Sizes,
    stats::HcmStats,
    stream::{LocalReply, Progress, ResponseHead, StreamCx, VIA_UPSTREAM},
};
use crate::{
    access_log::ResponseFlags,
    runtime::clock,
    upstream::{Chosen, ClusterStats, Decrement, HostCounter, Seen, UpstreamInfo, WorkerCluster, WorkerHost},
};

/// The details of a stream that has lasted too long.
pub(super) const MAX_DURATION: &str = "max_duration_timeout";

/// The accounts of one stream: settled when this is dropped.
pub(super) struct StreamEnd {
    pub(super) state: Rc<ConnState>,
    pub(super) progress: Rc<Progress>,
    pub(super) started: Instant,
    /// Only kept where an access log wants it.
    log: Option<Box<LogParts>>,
    pub(super) status: Option<StatusCode>,
    pub(super) flags: ResponseFlags,
    pub(super) details: Cow<'static, str>,
    /// There are details, and they are empty.
    pub(super) clears_details: bool,
    /// The attempt's host, and the cluster that it is of.
    pub(super) host: Option<(Rc<WorkerCluster>, Rc<WorkerHost>)>,
    /// The priority at that cluster's circuit breakers.
    high: bool,
    /// What the request and the attempt may take, where that is told of.
    pub(super) budget: Option<Budget>,
    pub(super) notes: Notes,
    /// The host's part in the current attempt is settled: a success, an error, or neither.
    judged: bool,
    /// The client speaks HTTP/1.
    pub(super) http1: bool,
    /// The client speaks gRPC.
    pub(super) grpc: bool,
    /// The request is internal.
    pub(super) internal: bool,
    /// The response is a canary's.
    canary: bool,
    pub(super) complete: bool,
    /// The response's body has not come whole.
    broke_off: bool,
    /// It ends with a redirect that is followed here, which no client sees.
    redirected: bool,
    /// The response is in another protocol than HTTP.
    pub(super) switched: bool,
    /// The request's id, where responses carry it.
    pub(super) request_id: Option<HeaderValue>,
    /// It has asked for another protocol, and may.
    pub(super) upgrade: Option<Decrement>,
    /// They live as long as the stream.
    pub(super) filters: Vec<Box<dyn HttpFilter>>,
}

/// How long a request and each of its attempts may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Budget {
    /// Of all attempts together.
    pub(super) global: Option<Duration>,
    /// Of each.
    pub(super) per_try: Option<Duration>,
    /// When the current one began.
    pub(super) attempt: Instant,
}

/// What attempts note of themselves while they are under way.
#[derive(Default)]
pub(super) struct Notes {
    /// What the request is counted under besides its cluster.
    pub(super) counted: Option<Rc<Counted>>,
    /// The connection to the host, once there is one.
    pub(super) upstream: Cell<Option<Rc<UpstreamInfo>>>,
    /// Why there was none.
    pub(super) transport_failure: Cell<Option<Box<str>>>,
    /// There was a connection to the attempt's host, and there were too many requests.
    pub(super) refused: Cell<bool>,
    /// How large its messages are, where the cluster tells.
    pub(super) sizes: Option<Rc<Sizes>>,
}

impl Notes {
    /// Counts under what the request is counted besides its cluster.
    pub(super) fn count(&self, count: impl Fn(&RequestStats)) {
        if let Some(counted) = &self.counted {
            counted.each(count);
        }
    }

    /// Whether there is a connection to the host.
    pub(super) fn has_connection(&self) -> bool {
        let upstream = self.upstream.take();
        let connected = upstream.is_some();
        self.upstream.set(upstream);
        connected
    }

    /// Counts a response of the cluster's, or the answer in its place; `internal`: the request is; `canary`: the host is one.
    pub(super) fn charge(&self, cluster: &WorkerCluster, status: StatusCode, (internal, canary): (bool, bool)) {
        let stats = &cluster.cluster.stats;
        stats.charge(status.as_u16(), internal);
        if canary {
            stats.charge_canary(status.as_u16());
        }
        self.count(|stats| stats.upstream_rq.inc(status.as_u16()));
    }
}

/// Whether a gRPC status (none: the host broke off) is one that Envoy takes for the host's error: those that it maps to a
/// 5xx.
pub(super) fn grpc_failed(status: Option<&HeaderValue>) -> bool {
    const UNKNOWN: u8 = 2;
    let code = status.and_then(|status| status.to_str().ok()?.parse().ok()).unwrap_or(UNKNOWN);
    // Unknown, DeadlineExceeded, Unimplemented, Internal, Unavailable, DataLoss, and what is no status.
    matches!(code, UNKNOWN | 4 | 12..=15 | 17..)
}

/// How a response's body broke off.
enum Broken {
    /// The host has reset the stream.
    Reset,
    /// The connection has broken.
    Closed,
    /// What came is no message, or not all of one.
    Malformed,
}

impl Broken {
    fn of(error: &BodyError) -> Broken {
        match h2_error(&**error) {
            Some(error) if error.is_remote() && error.reason().is_some() => Broken::Reset,
            Some(error) if error.is_io() => Broken::Closed,
            // An HTTP/1 body that ends too early is a protocol error, as in Envoy.
            _ => Broken::Malformed,
        }
    }
}

/// The answer in the place of a response that broke off before any of it was sent, and that nobody is told of otherwise.
pub(super) fn broken_response(error: &BodyError) -> LocalReply {
    let (status, flags, reason) = match Broken::of(error) {
        Broken::Reset => (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UR, "remote reset"),
        Broken::Closed => (StatusCode::SERVICE_UNAVAILABLE, ResponseFlags::UC, "connection termination"),
        Broken::Malformed => (StatusCode::BAD_GATEWAY, ResponseFlags::UPE, "protocol error"),
    };
    let text = format!("upstream connect error or disconnect/reset before headers. reset reason: {reason}");
    LocalReply::new(status, text, flags, "")
}

impl StreamEnd {
    pub(super) fn new(state: Rc<ConnState>, progress: Rc<Progress>, started: Instant) -> StreamEnd {
        let stats = &state.manager.stats;
        stats.downstream_rq_total.inc();
        stats.downstream_rq_active.inc();
        state.stream_begins();
        StreamEnd {
            state,
            progress,
            started,
            log: None,
            status: None,
            flags: ResponseFlags::default(),
            details: Cow::Borrowed(""),
            clears_details: false,
            host: None,
            high: false,
            budget: None,
            notes: Notes::default(),
            judged: false,
            http1: true,
            grpc: false,
            internal: false,
            canary: false,
            complete: false,
            broke_off: false,
            redirected: false,
            switched: false,
            request_id: None,
            upgrade: None,
            filters: Vec::new(),
        }
    }

    /// The client is gone before the end.
    pub(super) fn client_left(&mut self) {
        let (flag, details) = match self.progress.reset_by_client.get() {
            true => (ResponseFlags::DR, "http2.remote_reset"),
            false => (ResponseFlags::DC, "downstream_remote_disconnect"),
        };
        self.flags |= flag;
        self.details = Cow::Borrowed(details);
    }

    /// Counts under what the request is counted besides its cluster.
    pub(super) fn count(&self, count: impl Fn(&RequestStats)) {
        self.notes.count(count);
    }

    /// Counts the answer in the place of a response of this host's, where one was chosen.
    pub(super) fn charge(&self, cluster: &WorkerCluster, status: StatusCode, host: Option<&WorkerHost>) {
        self.charge_as(cluster, status, host.is_some_and(|host| host.host.is_canary()));
    }

    /// Counts the response of the attempt's host.
    pub(super) fn charge_response(&mut self, cluster: &WorkerCluster, status: StatusCode, headers: &HeaderMap) {
        self.canary = self.host.as_ref().is_some_and(|(_, host)| host.host.answers_as_canary(headers));
        self.charge_as(cluster, status, self.canary);
    }

    fn charge_as(&self, cluster: &WorkerCluster, status: StatusCode, canary: bool) {
        // Health checks are nobody's requests.
        if !self.progress.health_check.get() {
            self.notes.charge(cluster, status, (self.internal, canary));
        }
    }

    /// The attempt's host.
    pub(super) fn attempted(&self) -> Option<&WorkerHost> {
        self.host.as_ref().map(|(_, host)| &**host)
    }

    /// What logs say of why the response is what it is.
    pub(super) fn told_details(&self) -> Option<&str> {
        (self.clears_details || !self.details.is_empty()).then_some(&*self.details)
    }

    /// The client may have the protocol that it asks for.
    pub(super) fn upgraded(&mut self, stats: &HcmStats) {
        stats.downstream_cx_upgrades_total.inc();
        self.upgrade = Some(Decrement::after_inc(stats.downstream_cx_upgrades_active));
    }

    /// `proxy_status_config`
    pub(super) fn tell_proxy_status(&self, head: &mut ResponseHead) {
        let config = self.state.config();
        if let Some(told) = &config.proxy_status {
            proxy_status::tell(config, told, self.flags, &self.details, head);
        }
    }

    /// The stream that follows this one with the same client: its request is here whole.
    pub(super) fn renewed(&self) -> StreamEnd {
        let progress = Progress::new(clock::now(), true);
        progress.received.set(self.progress.received.get());
        let mut next = StreamEnd::new(Rc::clone(&self.state), progress, clock::now());
        self.state.count_request(self.http1);
        (next.http1, next.grpc, next.request_id) = (self.http1, self.grpc, self.request_id.clone());
        next
    }

    /// The stream ends with a redirect that is followed here.
    pub(super) fn redirected(&mut self, response: &ResponseHead) {
        (self.complete, self.redirected) = (true, true);
        self.details = Cow::Borrowed("internal_redirect");
        self.keep_response(response.status, &response.headers);
    }

    /// The request is led on in the place of this response: the stream that follows.
    pub(super) fn led_on(&mut self, response: &ResponseHead) -> StreamEnd {
        self.redirected(response);
        self.renewed()
    }

    /// An upstream's response is what the client gets.
    pub(super) fn came_from_upstream(&mut self, response: &mut ResponseHead, cx: &StreamCx) {
        self.flags |= cx.flags;
        if self.details.is_empty() {
            self.details = Cow::Borrowed(VIA_UPSTREAM);
        }
        self.tell_proxy_status(response);
        self.keep_response(response.status, &response.headers);
        if response.status == StatusCode::SWITCHING_PROTOCOLS && self.state.config().log_tunnels {
            self.log_now(None, cx, "DownstreamTunnelSuccessfullyEstablished");
        }
    }

    /// So much of the response's body has come.
    pub(super) fn data(&mut self, bytes: usize) {
        self.notes.sizes.as_ref().inspect(|sizes| sizes.received(bytes));
        let progress = &self.progress;
        if !progress.sent_otherwise.get() {
            progress.sent.set(progress.sent.get() + bytes as u64);
        }
        let now = clock::now();
        progress.last_activity.set(now);
        progress.last_response.set(now);
        self.state.last_progress.set(now);
    }

    /// Counts with the cluster that the route has chosen.
    pub(super) fn count_routed(&self, count: impl FnOnce(&ClusterStats)) {
        if let Some((cluster, _)) = &self.host {
            let aggregate = self.progress.aggregate.borrow();
            count(&aggregate.as_ref().unwrap_or(cluster).cluster.stats);
        }
    }

    /// The attempt has lasted for too long, in the middle of its answer.
    pub(super) fn attempt_expired(&mut self) {
        if let Some((cluster, _)) = &self.host {
            cluster.cluster.stats.upstream_rq_max_duration_reached.inc();
        }
        self.details = Cow::Borrowed("upstream_max_stream_duration_reached");
    }

    /// The answer has not come to its end in time.
    pub(super) fn route_expired(&mut self) {
        if let Some((cluster, host)) = &self.host {
            let aggregate = self.progress.aggregate.borrow();
            let routed = aggregate.as_ref().unwrap_or(cluster);
            routed.cluster.stats.upstream_rq_timeout.inc();
            host.count(HostCounter::RqTimeout, 1);
        }
        self.count(|stats| stats.upstream_rq_timeout.inc());
        self.details = Cow::Borrowed("response_timeout");
    }

    /// The upstream has said nothing for too long, in the middle of its answer.
    pub(super) fn per_try_idle_expired(&mut self) {
        if let Some((cluster, host)) = &self.host {
            let aggregate = self.progress.aggregate.borrow();
            let routed = aggregate.as_ref().unwrap_or(cluster);
            routed.cluster.stats.upstream_rq_per_try_idle_timeout.inc();
            host.count(HostCounter::RqTimeout, 1);
            host.saw(Seen::TimedOut(StatusCode::GATEWAY_TIMEOUT.as_u16()));
        }
        self.details = Cow::Borrowed("upstream_per_try_idle_timeout");
    }

    /// The response's body broke off.
    pub(super) fn response_failed(&mut self, error: &BodyError) {
        (self.complete, self.broke_off) = (true, true);
        self.judge(true);
        if self.flags.is_empty() && self.details != MAX_DURATION {
            let (flag, details) = match Broken::of(error) {
                Broken::Reset => (ResponseFlags::UR, "upstream_reset_after_response_started{remote_reset}"),
                Broken::Closed => (ResponseFlags::UC, "upstream_reset_after_response_started{connection_termination}"),
                Broken::Malformed => (ResponseFlags::UPE, "upstream_reset_after_response_started{protocol_error}"),
            };
            self.flags |= flag;
            self.details = Cow::Borrowed(details);
            if let Some((_, host)) = &self.host {
                host.saw(Seen::ConnectFailed);
            }
            if let Some((cluster, _)) = self.host.as_ref().filter(|_| error.is::<CodecError>()) {
                cluster.cluster.stats.upstream_cx_protocol_error.inc();
            }
        }
        self.state.manager.stats.rq_reset_after_downstream_response_started.inc();
    }

    /// The attempt before has failed: its host and its place at the circuit breaker are free again.
    pub(super) fn leave_host(&mut self) {
        self.judge(true);
        if let Some((cluster, before)) = self.host.take() {
            if let Some(budget) = self.budget {
                self.tell_attempt(&cluster, budget);
            }
            cluster.cluster.end_request(self.high);
            before.end_request();
        }
    }

    /// Tells how much of its time the attempt has used.
    fn tell_attempt(&self, cluster: &Rc<WorkerCluster>, budget: Budget) {
        let aggregate = self.progress.aggregate.borrow();
        let routed = aggregate.as_ref().unwrap_or(cluster);
        if let Some(budgets) = &routed.cluster.stats.budgets {
            budgets.attempt(clock::since(budget.attempt), budget.per_try);
        }
    }

    /// Tells how much of their time the request and its last attempt have used.
    fn tell_budgets(&self, cluster: &Rc<WorkerCluster>, budget: Budget) {
        let timed_out = self.flags.contains(ResponseFlags::UT);
        let answered = self.complete && self.progress.answered.get().is_some() && !self.broke_off;
        if timed_out || answered {
            let aggregate = self.progress.aggregate.borrow();
            let routed = aggregate.as_ref().unwrap_or(cluster);
            let began = self.progress.request_complete.get().unwrap_or(self.started);
            if let Some(budgets) = &routed.cluster.stats.budgets {
                budgets.request(clock::since(began), budget.global);
            }
        }
        // Where the request was over before there was an answer, that says nothing of the attempt.
        if !(timed_out && self.details == "response_timeout") {
            self.tell_attempt(cluster, budget);
        }
    }

    /// Counts the attempt as the host's success or error, unless that is settled.
    pub(super) fn judge(&mut self, failed: bool) {
        if let Some((_, host)) = self.host.as_ref().filter(|_| !self.judged) {
            host.count(if failed { HostCounter::RqError } else { HostCounter::RqSuccess }, 1);
            self.judged = true;
        }
    }

    /// The attempt counts neither way: the host never had it.
    pub(super) fn excuse_host(&mut self) {
        self.judged = true;
    }

    /// Judges by a response's head, as Envoy does: what comes after it no longer counts, but for gRPC, whose status
    /// may come last.
    pub(super) fn judge_response(&mut self, head: &ResponseHead, ended: bool) {
        let failed = head.status.is_server_error();
        if failed || !self.grpc {
            self.judge(failed);
        } else if ended {
            self.judge(grpc_failed(head.headers.first(&GRPC_STATUS)));
        }
    }

    /// The host of the next attempt; the one before it is done with.
    pub(super) fn set_host(&mut self, routed: &Rc<WorkerCluster>, Chosen { cluster, host }: &Chosen, high: bool) {
        self.leave_host();
        if let Some(log) = &mut self.log {
            log.refused_by = None;
        }
        self.progress.aggregate.replace((!Rc::ptr_eq(routed, cluster)).then(|| Rc::clone(routed)));
        cluster.cluster.begin_request(high);
        self.high = high;
        host.begin_request();
        self.host = Some((Rc::clone(cluster), Rc::clone(host)));
        if let Some(budget) = &mut self.budget {
            budget.attempt = clock::now();
        }
        self.notes = Notes { counted: self.notes.counted.take(), sizes: Sizes::of(routed), ..Notes::default() };
        self.judged = false;
        self.update_live();
    }
}

impl Drop for StreamEnd {
    fn drop(&mut self) {
        let stats = &self.state.manager.stats;
        stats.downstream_rq_active.dec();
        let elapsed = clock::since(self.started).as_millis() as u64;
        stats.downstream_rq_time.record(elapsed);
        if !self.complete {
            stats.downstream_rq_rx_reset.inc();
            if self.details.is_empty() || self.details == VIA_UPSTREAM {
                self.client_left();
            }
        }
        if let Some(status) = self.status.filter(|_| !self.redirected && !self.progress.health_check.get()) {
            self.state.manager.count_response(status);
        }
        if let Some((cluster, host)) = &self.host {
            let aggregate = self.progress.aggregate.borrow();
            let routed = aggregate.as_ref().unwrap_or(cluster);
            if !self.progress.health_check.get() {
                routed.cluster.stats.record_time(elapsed, self.internal);
                if self.canary {
                    routed.cluster.stats.record_canary_time(elapsed);
                }
                self.count(|stats| stats.upstream_rq_time.record(elapsed));
            }
            if let Some(budget) = self.budget {
                self.tell_budgets(cluster, budget);
            }
            cluster.cluster.end_request(self.high);
            host.end_request();
        }
        if let Some(mut log) = self.log.take() {
            if let (Some((_, host)), Some(rewritten)) = (&self.host, self.progress.host_rewritten.get()) {
                log.rewrite_host(host.host.hostname(), rewritten, &self.state.manager.logged.request);
            }
            if self.http1 && self.status.is_some() && !self.redirected && self.state.closes.get() {
                let names = &self.state.manager.logged.response;
                log.complete_response(CONNECTION, names, || HeaderValue::from_static("close"));
            }
            self.write_logs(&log, "DownstreamEnd");
        }
        let at_end = self.progress.at_end.take();
        if !at_end.is_empty() {
            self.tell_end(|record| at_end.into_iter().for_each(|then| then(record)));
        }
        for tap in self.progress.taps.take() {
            let upstream = self.notes.upstream.take();
            let local = upstream.as_ref().and_then(|upstream| upstream.local);
            self.notes.upstream.set(upstream);
            let host = self.host.as_ref().and_then(|(_, host)| host.host.display().parse().ok());
            tap.end((local, host));
        }
        self.state.stream_ends();
    }
}
