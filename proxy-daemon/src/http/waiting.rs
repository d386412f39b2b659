//! Requests that wait for a filter, and responses whose bodies filters have changed.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::StatusCode;
use http_body::{Frame, SizeHint};

use super::{
    body::{Body, BodyError, WrappedBody},
    conn_manager::ConnState,
    filters::{Flow, Waiting},
    stream::{LocalReply, Progress, StreamCx},
    stream_end::StreamEnd,
    timers::{Expired, Timers},
};
use crate::{access_log::ResponseFlags, config::model::RouteAction};

/// gRPC's status of what took too long.
const DEADLINE_EXCEEDED: u16 = 4;

/// The limits of a request that waits for a filter.
pub(super) fn limits(state: &ConnState, cx: &StreamCx) -> Timers {
    let config = &state.manager.config;
    let idle = match cx.route.as_ref().map(|route| &route.action) {
        Some(RouteAction::Forward(action)) => action.idle_timeout.unwrap_or(config.stream_idle_timeout),
        _ => config.stream_idle_timeout,
    };
    let mut limits =
        Timers::new(&cx.worker.sleeps, Rc::clone(&cx.progress), cx.started, None, idle, config.request_timeout);
    limits.limit_duration(config.max_stream_duration);
    limits
}

/// What the filter came to, or the answer to a request that has waited for too long.
pub(super) async fn within(waiting: Waiting<'_>, mut limits: Timers, state: &ConnState, progress: &Progress) -> Flow {
    tokio::select! {
        biased;
        flow = waiting => flow,
        expired = limits.expired() => Flow::Respond(expire(state, progress, expired)),
    }
}

/// The answer where one of the limits of the connection manager has passed.
pub(super) fn expire(state: &ConnState, progress: &Progress, expired: Expired) -> LocalReply {
    let stats = &state.manager.stats;
    if expired == Expired::Answered
        && let Some(reply) = progress.take_answer()
    {
        return reply;
    }
    if expired == Expired::Request {
        stats.downstream_rq_timeout.inc();
        let (status, text) = (StatusCode::REQUEST_TIMEOUT, "request timeout");
        return LocalReply::new(status, text, ResponseFlags::default(), "request_overall_timeout");
    }
    if let Expired::Malformed(error) = expired {
        state.count_protocol_error();
        return error.into();
    }
    if expired == Expired::Duration {
        stats.downstream_rq_max_duration_reached.inc();
        let complete = progress.request_complete.get().is_some();
        let status = if complete { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
        let text = "downstream duration timeout";
        // No flag, as in Envoy.
        let mut reply = LocalReply::new(status, text, ResponseFlags::default(), "max_duration_timeout");
        reply.grpc_status = Some(DEADLINE_EXCEEDED);
        return reply;
    }
    stats.downstream_rq_idle_timeout.inc();
    let complete = progress.request_complete.get().is_some();
    let status = if complete { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
    LocalReply::new(status, "stream timeout", ResponseFlags::SI, "stream_idle_timeout")
}

/// A response's body that filters have put theirs around: what comes out of it is what the client gets.
pub(super) struct Counted {
    body: Body,
    progress: Rc<Progress>,
    /// Of an answer that was made here: nobody else has it.
    end: Option<StreamEnd>,
}

impl Counted {
    pub(super) fn new(body: Body, progress: Rc<Progress>, end: Option<StreamEnd>) -> Counted {
        progress.sent_otherwise.set(true);
        // What filters have read ahead is not sent yet.
        progress.sent.set(0);
        Counted { body, progress, end }
    }

    fn complete(&mut self) {
        if let Some(end) = &mut self.end {
            end.complete = true;
        }
    }
}

impl WrappedBody for Counted {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.body)
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                let bytes = frame.data_ref().map_or(0, Bytes::len);
                self.progress.sent.set(self.progress.sent.get() + bytes as u64);
                if self.body.is_end_stream() {
                    self.complete();
                }
            }
            Poll::Ready(None | Some(Err(_))) => self.complete(),
            Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
