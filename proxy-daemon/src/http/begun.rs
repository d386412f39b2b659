//! A stream from its first byte on, before anything is known of it.

use std::{rc::Rc, time::Instant};

use http::{Request, Response, StatusCode, Version};

use super::{
    body::Body,
    codec::Incoming,
    conn_manager::ConnState,
    local_reply::{self, Asked},
    request,
    stream::{LocalReply, Progress, RequestHead},
    stream_end::StreamEnd,
};
use crate::{access_log::ResponseFlags, config::model::HttpConnectionManagerConfig};

/// A stream that has begun: it counts, and is logged however it ends.
pub(super) struct Begun {
    pub(super) end: StreamEnd,
    pub(super) progress: Rc<Progress>,
    pub(super) started: Instant,
}

impl Begun {
    pub(super) fn new(state: &Rc<ConnState>, started: Instant, version: Version) -> Begun {
        state.count_request(version != Version::HTTP_2);
        let progress = Progress::new(started, false);
        let end = StreamEnd::new(Rc::clone(state), Rc::clone(&progress), started);
        Begun { end, progress, started }
    }

    /// Its head is here.
    #[inline(always)]
    pub(super) fn handle(
        self,
        request: Request<Incoming>,
        refused: Option<LocalReply>,
    ) -> impl Future<Output = Response<Body>> {
        request::handle(self, request, refused)
    }

    /// Its head is one that gets no answer.
    pub(super) fn refuse(mut self, head: &RequestHead, details: &'static str) {
        self.end.keep_request(head);
        self.end.flags |= ResponseFlags::DPE;
        self.end.details = details.into();
    }

    /// The answer where there will be no head.
    pub(super) fn answer_without_head(mut self, reply: LocalReply) -> Response<Body> {
        self.end.keep_no_request();
        local_reply::answer(self.end, reply, false, false, Asked::Nothing)
    }

    /// Ends when the head takes too long, with what the client is told.
    pub(super) fn late_head(&mut self) -> impl Future<Output = LocalReply> + use<> {
        self.end.keep_no_request();
        let (state, started) = (Rc::clone(&self.end.state), self.started);
        async move {
            let config = state.config();
            let limits = [
                (config.request_headers_timeout, "request header timeout", "request_header_timeout"),
                (config.request_timeout, "request timeout", "request_overall_timeout"),
                (config.stream_idle_timeout, "stream timeout", "stream_idle_timeout"),
            ];
            let first = limits.into_iter().filter_map(|(limit, text, details)| Some((limit?, text, details)));
            let Some((limit, text, details)) = first.min_by_key(|(limit, ..)| *limit) else {
                return std::future::pending().await;
            };
            tokio::time::sleep_until((started + limit).into()).await;
            let (stats, mut flags) = (&state.manager.stats, ResponseFlags::default());
            match details {
                "request_header_timeout" => stats.downstream_rq_header_timeout.inc(),
                "request_overall_timeout" => stats.downstream_rq_timeout.inc(),
                _ => {
                    stats.downstream_rq_idle_timeout.inc();
                    flags = ResponseFlags::SI;
                }
            }
            LocalReply::new(StatusCode::REQUEST_TIMEOUT, text, flags, details)
        }
    }
}

/// What the codec counts.
impl ConnState {
    pub(super) fn config(&self) -> &HttpConnectionManagerConfig {
        &self.manager.config
    }

    /// A client does not speak HTTP as it should.
    pub(super) fn count_protocol_error(&self) {
        self.manager.stats.downstream_cx_protocol_error.inc();
    }

    /// A stream has begun.
    pub(super) fn count_request(&self, http1: bool) {
        let stats = &self.manager.stats;
        if http1 { stats.downstream_rq_http1_total.inc() } else { stats.downstream_rq_http2_total.inc() }
    }

    /// A client was told something before its answer.
    pub(super) fn count_interim(&self, status: StatusCode) {
        self.manager.count_response(status);
    }

    /// A response begins before its request is complete.
    pub(super) fn count_early_response(&self) {
        self.manager.stats.downstream_rq_response_before_rq_complete.inc();
    }

    /// A stream ends before its request is complete.
    pub(super) fn count_reset(&self) {
        self.manager.stats.downstream_rq_rx_reset.inc();
    }

    /// A target is no path.
    pub(super) fn count_non_relative_path(&self) {
        self.manager.stats.downstream_rq_non_relative_path.inc();
    }

    /// A client is told to ask for another form of its path.
    pub(super) fn count_redirected_path(&self) {
        self.manager.stats.downstream_rq_redirected_with_normalized_path.inc();
    }

    /// A path cannot be made a normal one.
    pub(super) fn count_failed_normalization(&self) {
        self.manager.stats.downstream_rq_failed_path_normalization.inc();
    }
}
