//! Watches the two bodies of a stream.

use std::{
    borrow::Cow,
    cell::RefCell,
    rc::Rc,
    task::{Context, Poll},
};

use http::HeaderMap;

use super::{
    body::{BodyError, Observer},
    conn_manager::ConnState,
    headers::names::GRPC_STATUS,
    stream::Progress,
    stream_end::{MAX_DURATION, StreamEnd, grpc_failed},
    timers::{Expired, Timers},
};
use crate::{access_log::ResponseFlags, runtime::clock, upstream::Connection};

/// Counts a request's body while it passes.
pub(super) struct RequestObserver {
    progress: Rc<Progress>,
    state: Rc<ConnState>,
    /// Nothing is read of it.
    held: bool,
}

impl RequestObserver {
    pub(super) fn new(progress: Rc<Progress>, state: Rc<ConnState>) -> RequestObserver {
        RequestObserver { progress, state, held: false }
    }
}

impl Observer for RequestObserver {
    fn data(&mut self, bytes: usize) {
        if std::mem::take(&mut self.held) {
            self.state.manager.stats.downstream_flow_control_resumed_reading_total.inc();
            self.progress.upload.get().inspect(|upload| upload.drained.inc());
        }
        self.progress.received.set(self.progress.received.get() + bytes as u64);
        let now = clock::now();
        self.progress.last_activity.set(now);
        self.state.last_progress.set(now);
    }

    fn idle(&mut self, _cx: &mut Context<'_>) -> Poll<BodyError> {
        Poll::Pending
    }

    fn held(&mut self) {
        if !std::mem::replace(&mut self.held, true) {
            self.state.manager.stats.downstream_flow_control_paused_reading_total.inc();
            self.progress.upload.get().inspect(|upload| upload.backed_up.inc());
        }
    }

    fn end(&mut self, _trailers: Option<&HeaderMap>) {
        self.progress.complete();
    }

    fn error(&mut self, _error: &BodyError) {}
}

/// Who settles a stream's accounts.
#[expect(clippy::large_enum_variant, reason = "most are the large one, and a box costs each request an allocation")]
pub(super) enum EndHolder {
    /// The observer of the response's body alone.
    Own(StreamEnd),
    /// While filters look at the response, the connection manager too: they may answer in its place.
    Shared(Rc<RefCell<StreamEnd>>),
}

impl EndHolder {
    fn with<R>(&mut self, settle: impl FnOnce(&mut StreamEnd) -> R) -> R {
        match self {
            EndHolder::Own(end) => settle(end),
            EndHolder::Shared(end) => settle(&mut end.borrow_mut()),
        }
    }
}

/// Watches a response's body: limits, byte count, and what becomes of the upstream connection.
pub(super) struct ResponseObserver {
    end: EndHolder,
    timers: Timers,
    connection: Option<Connection>,
    /// Nothing is read of it.
    held: bool,
}

impl ResponseObserver {
    pub(super) fn new(end: EndHolder, timers: Timers, connection: Connection) -> ResponseObserver {
        ResponseObserver { end, timers, connection: Some(connection), held: false }
    }
}

impl Observer for ResponseObserver {
    fn data(&mut self, bytes: usize) {
        let resumes = std::mem::take(&mut self.held);
        self.end.with(|end| {
            if resumes {
                end.count_routed(|stats| stats.upstream_flow_control_resumed_reading_total.inc());
            }
            end.data(bytes);
        });
    }

    fn held(&mut self) {
        if !std::mem::replace(&mut self.held, true) {
            self.end.with(|end| end.count_routed(|stats| stats.upstream_flow_control_paused_reading_total.inc()));
        }
    }

    fn idle(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        self.timers.poll(cx).map(|expired| {
            let (flag, text) = match expired {
                Expired::Route => {
                    self.end.with(|end| end.route_expired());
                    (ResponseFlags::UT, "upstream response timeout")
                }
                Expired::Idle => {
                    self.end.with(|end| {
                        end.state.manager.stats.downstream_rq_idle_timeout.inc();
                        end.details = Cow::Borrowed("stream_idle_timeout");
                    });
                    (ResponseFlags::SI, "stream idle timeout")
                }
                Expired::Duration => {
                    self.end.with(|end| {
                        end.state.manager.stats.downstream_rq_max_duration_reached.inc();
                        end.details = Cow::Borrowed(MAX_DURATION);
                    });
                    // No flag, as in Envoy: the client had its answer's head in time.
                    (ResponseFlags::default(), "downstream duration timeout")
                }
                Expired::Attempt => {
                    self.end.with(|end| end.attempt_expired());
                    (ResponseFlags::UMSDR, "upstream max stream duration reached")
                }
                Expired::PerTryIdle => {
                    self.end.with(|end| end.per_try_idle_expired());
                    (ResponseFlags::UT, "upstream idle timeout")
                }
                Expired::Answered => (ResponseFlags::default(), "the request was answered after its response began"),
                Expired::Request => (ResponseFlags::default(), "request timeout"),
                Expired::Malformed(error) => {
                    self.end.with(|end| {
                        end.state.count_protocol_error();
                        end.details = Cow::Borrowed(error.details);
                    });
                    (ResponseFlags::DPE, "malformed request")
                }
            };
            self.end.with(|end| end.flags |= flag);
            text.into()
        })
    }

    fn end(&mut self, trailers: Option<&HeaderMap>) {
        self.end.with(|end| {
            end.complete = true;
            if let Some(trailers) = trailers {
                end.keep_trailers(trailers);
            }
            if end.switched && end.http1 && end.progress.request_complete.get().is_some() {
                // It was the client that closed the tunnel.
                end.client_left();
            }
            if end.grpc {
                end.judge(grpc_failed(trailers.and_then(|trailers| trailers.get(GRPC_STATUS))));
            }
        });
        if let Some(connection) = self.connection.take() {
            trailers.iter().for_each(|trailers| connection.heard_trailers(trailers));
            connection.release();
        }
    }

    fn error(&mut self, error: &BodyError) {
        if let Some(connection) = self.connection.take() {
            connection.broke_off(error);
        }
        self.end.with(|end| end.response_failed(error));
    }
}
