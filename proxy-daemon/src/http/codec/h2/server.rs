//! The side that clients speak to: a task for the connection, and one for each stream.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use h2::{
    Reason, RecvStream,
    server::{Connection, Handshake, SendResponse},
};
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    header::{CONTENT_LENGTH, DATE, EXPECT, HeaderValue},
};
use http_body::Body as _;

use super::{
    body::ReceivedBody,
    head,
    keepalive::Keepalive,
    scrub::Scrubbed,
    send::{Broken, Outbox, Piece, send_body},
    watch::Watch,
};
use crate::{
    http::{
        begun::Begun,
        body::Body,
        boxed::boxed,
        codec::{Incoming, date},
        conn_manager::ConnState,
        headers,
        io::DownstreamIo,
        look::Look as _,
        stats::ConnectionEnd,
    },
    runtime::clock,
};

/// So many streams are borne with before it is judged how many of them their client has reset, as in Envoy.
const STREAMS: u64 = 500;
/// A stream that its client resets so soon has cost it nothing.
const PREMATURE: Duration = Duration::from_secs(1);

/// A client's connection: ends with it, or with what the client did wrong.
pub(in crate::http) struct ServerConnection {
    stage: Stage,
    shared: Rc<Shared>,
    closing: bool,
    /// The client has been told that it is hopeless.
    expelled: bool,
    keepalive: Option<Keepalive>,
}

enum Stage {
    Handshake(Handshake<Scrubbed<DownstreamIo>, Piece>),
    Serving(Connection<Scrubbed<DownstreamIo>, Piece>),
}

/// What a connection's streams share.
struct Shared {
    state: Rc<ConnState>,
    outbox: Rc<Outbox>,
    /// Streams that have ended, and how many of them were reset before there was an answer.
    ended: Cell<u64>,
    premature: Cell<u64>,
    /// The client only opens streams to reset them.
    hopeless: Cell<bool>,
    /// The connection's task.
    task: RefCell<Option<Waker>>,
}

impl Shared {
    /// A stream has ended; `reset`: by its client, without an answer, so long after it began.
    fn stream_ended(&self, reset: Option<Duration>) {
        self.ended.set(self.ended.get() + 1);
        if reset.is_none_or(|after| after > PREMATURE) {
            return;
        }
        self.premature.set(self.premature.get() + 1);
        // From the moment on from which the client could not make it good.
        if self.premature.get() * 2 >= self.ended.get().max(STREAMS) && !self.hopeless.replace(true) {
            self.state.manager.stats.downstream_rq_too_many_premature_resets.inc();
            if let Some(task) = self.task.take() {
                task.wake();
            }
        }
    }
}

impl ServerConnection {
    /// For a connection whose preface is still to be read.
    pub(in crate::http) fn new(mut io: DownstreamIo, state: &Rc<ConnState>) -> ServerConnection {
        io.watch(Watch::new(state));
        let config = state.config();
        let buffer = state.connection.buffer_limit;
        // The crate counts 32 bytes more for each field, and answers by itself what is beyond its limit: it comes second.
        let fields = config.max_headers_count.saturating_mul(32).saturating_add(4096);
        let list = config.max_request_headers_kb.saturating_mul(1024).saturating_add(fields);
        let mut builder = h2::server::Builder::new();
        builder
            .max_concurrent_streams(config.http2.max_concurrent_streams)
            .initial_window_size(config.http2.initial_stream_window_size)
            .initial_connection_window_size(config.http2.initial_connection_window_size)
            .max_header_list_size(list)
            .max_send_buffer_size((buffer as usize).clamp(16 * 1024, 256 * 1024))
            // Streams that are reset in the same write that opens them are judged with the others.
            .max_pending_accept_reset_streams(STREAMS as usize);
        if let Some(size) = config.http2.hpack_table_size {
            builder.header_table_size(size);
        }
        if config.http2.allow_connect {
            builder.enable_connect_protocol();
        }
        let stage = Stage::Handshake(builder.handshake(Scrubbed::client(io, list)));
        let shared = Rc::new(Shared {
            state: Rc::clone(state),
            outbox: Outbox::new(buffer),
            ended: Cell::new(0),
            premature: Cell::new(0),
            hopeless: Cell::new(false),
            task: RefCell::default(),
        });
        ServerConnection { stage, shared, closing: false, expelled: false, keepalive: None }
    }

    /// The client is told that no further stream is served; those that there are are.
    pub(in crate::http) fn graceful_shutdown(mut self: Pin<&mut Self>) {
        self.closing = true;
        if let Stage::Serving(connection) = &mut self.stage {
            connection.graceful_shutdown();
        }
    }
}

impl Future for ServerConnection {
    type Output = Result<ConnectionEnd, h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        this.shared.task.borrow_mut().get_or_insert_with(|| cx.waker().clone()).clone_from(cx.waker());
        loop {
            match &mut this.stage {
                Stage::Handshake(handshake) => {
                    let mut connection = ready!(Pin::new(handshake).poll(cx))?;
                    if this.closing {
                        connection.graceful_shutdown();
                    }
                    let settings = this.shared.state.config().http2.keepalive;
                    this.keepalive = Keepalive::new(settings, settings.and_then(|_| connection.ping_pong()));
                    this.stage = Stage::Serving(connection);
                }
                Stage::Serving(connection) => {
                    if this.keepalive.as_mut().is_some_and(|keepalive| keepalive.poll(cx).is_ready()) {
                        // Its streams end with it.
                        this.shared.state.manager.codecs.keepalive_timeout.inc();
                        return Poll::Ready(Ok(this.shared.state.end()));
                    }
                    if this.shared.hopeless.get() && !this.expelled {
                        this.expelled = true;
                        connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                    }
                    match ready!(connection.poll_accept(cx)) {
                        Some(Ok((request, respond))) => {
                            let shared = Rc::clone(&this.shared);
                            tokio::task::spawn_local(boxed(|| clock::in_turns(serve(shared, request, respond))));
                        }
                        Some(Err(error)) => return Poll::Ready(Err(error)),
                        None => return Poll::Ready(Ok(this.shared.state.end())),
                    }
                }
            }
        }
    }
}

/// One stream.
async fn serve(shared: Rc<Shared>, request: Request<RecvStream>, mut respond: SendResponse<Piece>) {
    let (state, started) = (&shared.state, clock::now());
    let begun = Begun::new(state, started, Version::HTTP_2);
    let (mut parts, stream) = request.into_parts();
    if let Err(malformed) = head::settle(&mut parts, state.config()) {
        if malformed == head::UNDERSCORE {
            state.manager.codecs.http2_rejected_with_underscores.inc();
        }
        begun.refuse(&parts, malformed.details);
        shared.stream_ended(None);
        return respond.send_reset(malformed.reason);
    }
    let to_head = parts.method == Method::HEAD;
    head::downgrade(&mut parts);
    let progress = Rc::clone(&begun.progress);
    if state.config().proxy_100_continue {
        progress.want_interim();
    } else if parts.headers.first(&EXPECT).is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        parts.headers.remove(EXPECT);
        if send_interim(state, &mut respond, StatusCode::CONTINUE, HeaderMap::new()).is_err() {
            return shared.stream_ended(Some(clock::since(started)));
        }
    }
    let body = match stream.is_end_stream() {
        true => Incoming::Empty,
        false => Incoming::Http2(ReceivedBody::request(stream, &parts.headers, &begun.progress)),
    };
    let response = {
        let mut handler = pin!(begun.handle(Request::from_parts(parts, body), None));
        poll_fn(|cx| {
            let polled = handler.as_mut().poll(cx);
            for (status, headers) in progress.take_interim() {
                // Whoever is gone already is seen to be just below, or when the response is sent.
                let _ = send_interim(state, &mut respond, status, headers);
            }
            match polled {
                Poll::Ready(response) => Poll::Ready(Some(response)),
                // The client may have lost interest, or may be gone.
                Poll::Pending => respond.poll_reset(cx).map(|reset| {
                    progress.reset_by_client.set(reset.is_ok());
                    None
                }),
            }
        })
        .await
    };
    let Some(response) = response else { return shared.stream_ended(Some(clock::since(started))) };
    if state.is_to_leave() {
        state.leave();
    }
    if progress.request_complete.get().is_none() && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        state.count_early_response();
    }
    let (response, mut body) = response_head(response, to_head);
    let end = body.is_end_stream();
    match respond.send_response(response, end) {
        // Broken off, the client has been told, or has said so itself.
        Ok(mut stream) if !end => {
            let flush = progress.flush.get().unwrap_or(state.config().stream_flush_timeout);
            match send_body(&mut body, &mut stream, &shared.outbox, flush).await {
                Err(Broken::NotTaken) => state.manager.codecs.tx_flush_timeout.inc(),
                // Where it was this side that has, the body has ended before.
                Err(Broken::Off) => {
                    let reset = stream.poll_reset(&mut Context::from_waker(Waker::noop()));
                    progress.reset_by_client.set(matches!(reset, Poll::Ready(Ok(_))));
                }
                Ok(()) | Err(Broken::Late) => {}
            }
        }
        Ok(_) => {}
        Err(error) => {
            tracing::debug!(%error, "a response cannot be sent");
            respond.send_reset(Reason::INTERNAL_ERROR);
        }
    }
    shared.stream_ended(None);
}

/// Sends a response that comes before the response.
fn send_interim(
    state: &ConnState,
    respond: &mut SendResponse<Piece>,
    status: StatusCode,
    headers: HeaderMap,
) -> Result<(), h2::Error> {
    state.count_interim(status);
    let mut interim = Response::new(());
    *interim.status_mut() = status;
    *interim.headers_mut() = headers;
    respond.send_informational(interim)
}

/// The head as it is sent.
fn response_head(response: Response<Body>, to_head: bool) -> (Response<()>, Body) {
    let (mut parts, body) = response.into_parts();
    headers::strip_hop_by_hop(&mut parts.headers);
    if parts.status == StatusCode::SWITCHING_PROTOCOLS {
        // RFC 8441, section 5: it is just a stream.
        parts.status = StatusCode::OK;
        parts.headers.remove(CONTENT_LENGTH);
    }
    parts.headers.entry(DATE).or_insert_with(date);
    if !body.is_end_stream()
        && !to_head
        && let Some(length) = body.size_hint().exact()
    {
        parts.headers.entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
    let mut response = Response::new(());
    *response.status_mut() = parts.status;
    *response.headers_mut() = parts.headers;
    (response, body)
}
