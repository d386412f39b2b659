//! One stream to a processor, for one request and its response. `LIFECYCLE.md` has its states.

mod receive;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use envoy_types::pb::{
    envoy::service::ext_proc::v3::{
        CommonResponse, HeaderMutation, ImmediateResponse, ProcessingRequest, ProtocolConfiguration,
        processing_request::Request,
    },
    google::protobuf::Struct,
};
use http::{HeaderMap, StatusCode};
use tokio::time::{Instant, Sleep};

use super::{
    config::Settings,
    messages,
    mode::{BodyMode, Mode, Side},
    rules::{Limits, Target},
    told::Merged,
};
use crate::http::filters::shared::Kept;
use crate::{
    access_log::ResponseFlags,
    http::{
        call::grpc_stream::{Ended, Prepared, Stream},
        changes::list,
        stream::{LocalReply, Progress},
    },
};

/// How long a processor has to end its side of a stream that has ended on ours.
const REMOTE_CLOSE: Duration = Duration::from_secs(1);
/// So many times the buffer's limit of pieces may wait where what the processor says to the other side comes behind them: a host may answer
/// before it has taken the request, and may take no more of that before its answer is taken. While a `message_timeout` runs there is no limit.
const BEFORE_OTHERS: usize = 16;

/// What a side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Await {
    Headers,
    Body,
    Trailers,
}

/// What a processor says to one message.
pub(super) enum Reply {
    /// To headers, or to a body.
    Common(Box<CommonResponse>),
    Trailers(Option<HeaderMutation>),
}

/// What a side comes to.
pub(super) enum Outcome {
    Reply(Reply),
    /// The processor has no further part in the stream.
    Over,
    /// The client gets this.
    Answer(LocalReply),
}

/// What comes back of a body whose processor answers when it likes ([`BodyMode::Duplex`]).
pub(super) enum Streamed {
    Piece(Bytes),
    /// There is no more of it.
    End,
    /// There is no more of the body, and its trailers are to be changed so.
    Trailers(Option<HeaderMutation>),
    /// The processor has no further part in the stream.
    Over,
    /// The client gets this.
    Answer(LocalReply),
}

#[derive(Default)]
struct SideState {
    awaits: Cell<Option<Await>>,
    reply: RefCell<Option<Reply>>,
    deadline: Cell<Option<Instant>>,
    /// The processor has asked for more time.
    extended: Cell<bool>,
    no_body: Cell<bool>,
    /// The piece that the processor is shown is the last one.
    last_piece: Cell<bool>,
    /// It has been shown a piece.
    body_shown: Cell<bool>,
    trailers_shown: Cell<bool>,
    /// Pieces of its own that nobody has taken yet, how many bytes they are, and whether the last one is there.
    pieces: RefCell<VecDeque<Bytes>>,
    piece_bytes: Cell<usize>,
    pieces_ended: Cell<bool>,
    /// Nobody takes any more of them.
    abandoned: Cell<bool>,
    /// What it says to trailers where it may have said something before that nobody has taken yet.
    trailers: RefCell<Option<Option<HeaderMutation>>>,
    waker: RefCell<Option<Waker>>,
    /// What the processor is told with the first message.
    attributes: RefCell<Option<Struct>>,
}

/// The stream, from before it is opened.
pub(super) struct Session {
    pub(super) settings: Kept<Settings>,
    pub(super) merged: Merged,
    pub(super) mode: Cell<Mode>,
    pub(super) progress: Rc<Progress>,
    pub(super) limits: Limits,
    /// How much of a body may be in memory, in bytes.
    pub(super) buffer_limit: usize,
    prepared: RefCell<Option<Prepared>>,
    stream: RefCell<Option<Stream>>,
    over: Cell<bool>,
    answer: RefCell<Option<LocalReply>>,
    protocol_told: Cell<bool>,
    sides: [SideState; 2],
}

impl Session {
    pub(super) fn new(
        settings: Kept<Settings>,
        merged: Merged,
        prepared: Option<Prepared>,
        progress: Rc<Progress>,
        limits: Limits,
        buffer_limit: usize,
    ) -> Rc<Session> {
        Rc::new(Session {
            mode: Cell::new(merged.mode.unwrap_or(settings.mode)),
            settings,
            merged,
            progress,
            limits,
            buffer_limit,
            prepared: RefCell::new(prepared),
            stream: RefCell::new(None),
            over: Cell::new(false),
            answer: RefCell::new(None),
            protocol_told: Cell::new(false),
            sides: Default::default(),
        })
    }

    fn side(&self, side: Side) -> &SideState {
        let [request, response] = &self.sides;
        match side {
            Side::Request => request,
            Side::Response => response,
        }
    }

    /// Whether the processor has no further part in the stream.
    pub(super) fn is_over(&self) -> bool {
        self.over.get()
    }

    /// Whether it is far behind with what it only watches.
    pub(super) fn is_behind(&self) -> bool {
        self.stream.borrow().as_ref().is_some_and(|stream| stream.queued() > self.buffer_limit)
    }

    /// Has the task woken when the processor has caught up.
    pub(super) fn wake_when_taken(&self, cx: &Context<'_>) {
        if let Some(stream) = &*self.stream.borrow() {
            stream.wake_when_taken(cx.waker());
        }
    }

    /// The processor is told these with the next message of a side.
    pub(super) fn tell_attributes(&self, side: Side, attributes: Struct) {
        self.side(side).attributes.replace(Some(attributes));
    }

    /// What it has not been told.
    pub(super) fn take_attributes(&self, side: Side) -> Option<Struct> {
        self.side(side).attributes.take()
    }

    pub(super) fn has_no_body(&self, side: Side) {
        self.side(side).no_body.set(true);
    }

    /// Sends a message. `awaits`: what is waited for then; `None` where the processor only watches.
    pub(super) fn send(self: &Rc<Self>, side: Side, awaits: Option<Await>, request: Request) {
        if self.is_over() {
            return;
        }
        self.open();
        let state = self.side(side);
        match &request {
            Request::RequestBody(body) | Request::ResponseBody(body) => {
                state.last_piece.set(body.end_of_stream);
                state.body_shown.set(true);
            }
            Request::RequestTrailers(_) | Request::ResponseTrailers(_) => state.trailers_shown.set(true),
            Request::RequestHeaders(_) | Request::ResponseHeaders(_) => {}
        }
        let Mode([of_request, of_response]) = self.mode.get();
        let first = !self.protocol_told.replace(true) && !self.settings.observability;
        let attributes = self.take_attributes(side).map(|values| ("envoy.filters.http.ext_proc".to_owned(), values));
        let message = ProcessingRequest {
            attributes: attributes.into_iter().collect(),
            metadata_context: Some(messages::metadata(&self.merged.forwarded, &self.progress)),
            observability_mode: self.settings.observability,
            protocol_config: first.then(|| ProtocolConfiguration {
                request_body_mode: of_request.body.number(),
                response_body_mode: of_response.body.number(),
                send_body_without_waiting_for_header_response: false,
            }),
            request: Some(request),
            ..ProcessingRequest::default()
        };
        // It may have failed at once.
        let stream = self.stream.borrow();
        let Some(stream) = &*stream else { return };
        stream.send(&message);
        self.settings.stats.stream_msgs_sent.inc();
        if self.is_duplex(side) {
            // Answers come in their order, when it likes.
            state.deadline.set(None);
            if state.awaits.get().is_none() {
                state.awaits.set(awaits);
            }
        } else if awaits.is_some() {
            state.awaits.set(awaits);
            state.extended.set(false);
            state.deadline.set(Some(Instant::now() + self.settings.message_timeout));
        }
        self.hold_up(stream);
    }

    fn open(self: &Rc<Self>) {
        let Some(prepared) = self.prepared.take() else { return };
        self.settings.stats.streams_started.inc();
        let session = Rc::downgrade(self);
        let stream = prepared.open(move |event| {
            let Some(session) = session.upgrade() else { return };
            match event {
                Ok(response) => session.receive(response),
                Err(ended) => session.ended(&ended),
            }
        });
        self.stream.replace(Some(stream));
    }

    /// What has come of the message that was sent last for this side.
    pub(super) fn poll_reply(
        &self,
        side: Side,
        timer: &mut Option<Pin<Box<Sleep>>>,
        cx: &mut Context<'_>,
    ) -> Poll<Outcome> {
        let state = self.side(side);
        loop {
            if let Some(reply) = state.reply.take() {
                return Poll::Ready(Outcome::Reply(reply));
            }
            if self.is_over() {
                return Poll::Ready(self.take_answer(side).map_or(Outcome::Over, Outcome::Answer));
            }
            state.waker.replace(Some(cx.waker().clone()));
            let Some(deadline) = state.deadline.get() else {
                return if state.awaits.get().is_some() { Poll::Pending } else { Poll::Ready(Outcome::Over) };
            };
            let sleep = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
            if sleep.deadline() != deadline {
                sleep.as_mut().reset(deadline);
            }
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.timed_out();
        }
    }

    /// What has come back of a body, whenever it was shown.
    pub(super) fn poll_streamed(&self, side: Side, cx: &mut Context<'_>) -> Poll<Streamed> {
        let state = self.side(side);
        let piece = state.pieces.borrow_mut().pop_front();
        if let Some(piece) = piece {
            state.piece_bytes.set(state.piece_bytes.get() - piece.len());
            self.stream.borrow().as_ref().inspect(|stream| self.hold_up(stream));
            return Poll::Ready(Streamed::Piece(piece));
        }
        if state.pieces_ended.get() {
            return Poll::Ready(Streamed::End);
        }
        if let Some(mutation) = state.trailers.take() {
            return Poll::Ready(Streamed::Trailers(mutation));
        }
        if self.is_over() {
            return Poll::Ready(self.take_answer(side).map_or(Streamed::Over, Streamed::Answer));
        }
        state.waker.replace(Some(cx.waker().clone()));
        Poll::Pending
    }

    /// Has the processor wait with what it sends while there is more of it than may be in memory.
    fn hold_up(&self, stream: &Stream) {
        let is_full = |side, other| {
            let other = self.side(other);
            let waits = other.awaits.get().is_some() && other.pieces.borrow().is_empty() && !other.abandoned.get();
            let most = match waits {
                // The processor has that long, and is not to be late for what it is not asked.
                true if other.deadline.get().is_some() => usize::MAX,
                true => self.buffer_limit.saturating_mul(BEFORE_OTHERS),
                false => self.buffer_limit,
            };
            self.side(side).piece_bytes.get() > most
        };
        stream.hold(is_full(Side::Request, Side::Response) || is_full(Side::Response, Side::Request));
    }

    /// Nobody takes what comes back of a body any more.
    pub(super) fn abandon(&self, side: Side) {
        let state = self.side(side);
        state.abandoned.set(true);
        state.pieces.borrow_mut().clear();
        state.piece_bytes.set(0);
        self.stream.borrow().as_ref().inspect(|stream| self.hold_up(stream));
    }

    /// The answer that the client gets, where it is this side that has to give it.
    fn take_answer(&self, side: Side) -> Option<LocalReply> {
        // A response that waits is what the answer takes the place of.
        let other = side == Side::Request && self.side(Side::Response).awaits.get().is_some();
        self.side(side).awaits.set(None);
        if other { None } else { self.answer.take() }
    }

    fn is_duplex(&self, side: Side) -> bool {
        self.mode.get().of(side).body == BodyMode::Duplex
    }

    /// Whether the stream can go on without the processor, should that fail: not where it may have pieces of a body that nobody else has.
    fn fails_open(&self) -> bool {
        let shown = |side| self.is_duplex(side) && self.side(side).body_shown.get();
        self.merged.failure_mode_allow && !shown(Side::Request) && !shown(Side::Response)
    }

    /// Whether it has such pieces.
    fn holds_body(&self) -> bool {
        let holds = |side| {
            let state = self.side(side);
            self.is_duplex(side) && state.body_shown.get() && state.awaits.get().is_some()
        };
        holds(Side::Request) || holds(Side::Response)
    }

    /// An answer that nobody has asked for.
    fn spurious(&self, details: &str) {
        let stats = &self.settings.stats;
        stats.spurious_msgs_received.inc();
        self.reset();
        if self.fails_open() {
            stats.failure_mode_allowed.inc();
            self.end(None);
        } else {
            self.end(Some(self.error(details)));
        }
    }

    /// The processor has ended the stream.
    fn ended(&self, ended: &Ended) {
        let stats = &self.settings.stats;
        if ended.status != 0 {
            stats.streams_failed.inc();
        }
        self.stream.borrow_mut().take();
        if self.is_over() {
            return;
        }
        stats.server_half_closed.inc();
        if ended.status != 0 && !self.fails_open() {
            let details = format!("ext_proc_error_gRPC_error_{}{{{}}}", ended.status, ended.message);
            return self.end(Some(self.error(&details)));
        }
        stats.streams_closed.inc();
        if self.holds_body() {
            // What it has is lost, and what is left of the message is another one.
            return self.end(Some(self.error("ext_proc_error_stream_closed_within_a_body")));
        }
        if ended.status != 0 {
            // Envoy counts it for the failure, and for the end.
            stats.server_half_closed.inc();
            stats.failure_mode_allowed.inc();
        }
        self.end(None);
    }

    fn timed_out(&self) {
        let stats = &self.settings.stats;
        stats.message_timeouts.inc();
        self.reset();
        if self.fails_open() {
            stats.failure_mode_allowed.inc();
            return self.end(None);
        }
        let details = "ext_proc_error_per-message_timeout_exceeded";
        let answer = LocalReply::new(StatusCode::GATEWAY_TIMEOUT, "", ResponseFlags::default(), details);
        self.end(Some(answer));
    }

    /// The answer to a request where a change that the processor asks for is refused.
    pub(super) fn refuse(&self, details: &str) -> LocalReply {
        self.reset();
        self.end(None);
        self.settings.stats.immediate_responses_sent.inc();
        self.error(details)
    }

    fn error(&self, details: &str) -> LocalReply {
        LocalReply::new(self.settings.status_on_error, "", ResponseFlags::default(), one_word(details))
    }

    /// Nothing more is shown to the processor.
    fn end(&self, answer: Option<LocalReply>) {
        self.over.set(true);
        if answer.is_some() {
            self.settings.stats.immediate_responses_sent.inc();
        }
        self.answer.replace(answer);
        self.sides.iter().for_each(wake);
    }

    /// There is nothing more to be shown.
    pub(super) fn close(&self) {
        self.over.set(true);
        self.finish();
    }

    /// Ends our side of the stream, and lets the processor end its own.
    fn finish(&self) {
        let stream = self.stream.borrow_mut().take();
        if let Some(stream) = stream {
            self.settings.stats.streams_closed.inc();
            stream.finish(REMOTE_CLOSE);
        }
    }

    /// Breaks the stream off.
    fn reset(&self) {
        if self.stream.borrow_mut().take().is_some() {
            self.settings.stats.streams_closed.inc();
        }
    }

    fn answer_of(&self, answer: ImmediateResponse) -> LocalReply {
        let code = answer.status.map_or(0, |status| status.code);
        let status = u16::try_from(code).ok().filter(|code| *code >= 200);
        let status = status.and_then(|code| StatusCode::from_u16(code).ok()).unwrap_or(StatusCode::OK);
        let mut headers = HeaderMap::new();
        if let Some(mutation) = &answer.headers {
            let rejected = self.settings.stats.rejected_header_mutations;
            let mut target = Target::Fields(&mut headers);
            // What is refused leaves the answer as far as it has come.
            let _ = self.settings.rules.apply(mutation, &mut target, false, true, self.limits, rejected);
        }
        let details = one_word(&answer.details);
        let mut reply = LocalReply::new(status, answer.body, ResponseFlags::default(), details);
        reply.headers = list(headers);
        reply.grpc_status = answer.grpc_status.map(|status| u16::try_from(status.status).unwrap_or(2));
        reply
    }
}

fn wake(state: &SideState) {
    if let Some(waker) = state.waker.take() {
        waker.wake();
    }
}

/// As access logs show it.
fn one_word(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join("_")
}

impl Drop for Session {
    fn drop(&mut self) {
        let Some(stream) = self.stream.get_mut().take() else { return };
        if self.settings.observability {
            let closed = self.settings.stats.streams_closed;
            stream.linger(self.settings.deferred_close_timeout, move || closed.inc());
        } else {
            self.settings.stats.streams_closed.inc();
            stream.finish(REMOTE_CLOSE);
        }
    }
}
