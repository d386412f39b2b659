//! The side that clients speak to: one task a connection, in which its requests are served one after the other.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, Method, Request, Response, StatusCode, Version,
    header::{CONNECTION, EXPECT, HOST},
};
use http_body::Body as _;
use tokio::io::AsyncWrite as _;

mod bodies;

use self::bodies::Outgoing;
pub use self::bodies::RequestBody;
use super::{
    buffers,
    case::OriginalCase,
    decode::{Decoder, Item},
    encode::{self, BodyLength, ResponseCx, Upgrade, Writer},
    error::CodecError,
    head::{self, Framing, Kind, Limits, Scanner, Target},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{HeaderKeyFormat, HttpConnectionManagerConfig},
    http::{
        begun::Begun, body::Body, boxed::boxed, codec::Incoming, conn_manager::ConnState, headers, look::Look as _,
        stats::ConnectionEnd, stream::LocalReply,
    },
    listener::DownstreamStream,
    runtime::clock,
    stats::Metered,
};

/// What a client has sent ahead of its turn is read up to this, in bytes; the rest waits in the kernel.
const PIPELINED: usize = 16 * 1024;

/// As much of a body is looked at before its request is forwarded.
const LOOKED_AT: usize = 4 * 1024;

/// A client's connection.
pub(in crate::http) struct ServerConnection {
    inner: RefCell<Inner>,
    last: Cell<Last>,
}

/// Which request is the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Last {
    NotYet,
    /// The one that comes next: its client is told by `connection: close`.
    Next,
    /// The one in flight; where there is none, the connection ends.
    Current,
}

struct Inner {
    stream: Metered<DownstreamStream>,
    buffer: BytesMut,
    scanner: Scanner,
    decoder: Decoder,
    limits: Limits,
    enable_trailers: bool,
    /// Which request the decoder belongs to.
    serial: u64,
    /// The client has closed its side.
    eof: bool,
    malformed: bool,
    /// The client has the protocol that it asked for.
    upgraded: bool,
    begun: Option<Box<Begun>>,
    /// The connection's task, for when a body that another task reads comes upon the connection's end.
    task: Option<Waker>,
}

/// What came instead of a request's head.
enum Received {
    Head(Bytes),
    /// The connection ends. `partial`: within a head.
    Closed {
        partial: bool,
    },
    Refused(CodecError),
    Late(LocalReply),
}

/// Whether the connection serves another request.
#[derive(PartialEq, Eq)]
enum After {
    Next,
    /// The client has nothing more to say.
    Close,
    /// The client may still be sending.
    Linger,
    /// The client is gone.
    Gone,
    /// The answer broke off.
    Broken,
}

impl ServerConnection {
    /// For a connection of which `buffer` has been read already.
    pub(in crate::http) fn new(
        stream: Metered<DownstreamStream>,
        buffer: BytesMut,
        config: &HttpConnectionManagerConfig,
    ) -> Rc<ServerConnection> {
        let limits = Limits {
            bytes: config.max_request_headers_kb as usize * 1024,
            headers: config.max_headers_count as usize,
            any_method: config.http1.allow_custom_methods,
        };
        let inner = Inner {
            stream,
            buffer,
            scanner: Scanner::default(),
            decoder: Decoder::Done,
            limits,
            enable_trailers: config.http1.enable_trailers,
            serial: 0,
            eof: false,
            malformed: false,
            upgraded: false,
            begun: None,
            task: None,
        };
        Rc::new(ServerConnection { inner: RefCell::new(inner), last: Cell::new(Last::NotYet) })
    }

    /// The next answer tells the client that it is the last one. An idle connection stays open for that: closing it would
    /// cost a client a request that it sends at the same moment.
    pub(in crate::http) fn drain(&self) {
        self.last.set(Last::Next);
    }

    /// The request that is being served is the last one. Where there is none, [`serve`](Self::serve) ends when it is polled again.
    pub(in crate::http) fn graceful_shutdown(&self) {
        self.last.set(Last::Current);
    }

    /// Serves requests until the connection ends, and says how it did.
    pub(in crate::http) async fn serve(self: Rc<Self>, state: Rc<ConnState>) -> ConnectionEnd {
        let mut writer = Writer::in_case(state.config().http1.header_key_format);
        loop {
            let received = self.receive(&state).await;
            let after = match received {
                Received::Closed { partial } => {
                    return ConnectionEnd { by_client: self.inner.borrow().eof, in_use: partial };
                }
                // What a request needs is there while there is one, and no longer: most connections are idle.
                Received::Refused(error) => Box::pin(self.refuse(&state, error, &mut writer)).await,
                Received::Late(reply) => Box::pin(self.reply(&state, reply, &mut writer)).await,
                Received::Head(head) => boxed(|| self.exchange(&state, &head, &mut writer)).await,
            };
            match after {
                After::Next => {}
                After::Gone => return ConnectionEnd { by_client: true, in_use: true },
                After::Broken => return ConnectionEnd::HERE,
                After::Close => return self.close(Duration::ZERO, &state).await,
                After::Linger => {
                    let linger = state.config().delayed_close_timeout.unwrap_or_default();
                    return self.close(linger, &state).await;
                }
            }
        }
    }

    /// Waits for a request's head.
    async fn receive(&self, state: &Rc<ConnState>) -> Received {
        let first = poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            if self.last.get() == Last::Current && inner.buffer.is_empty() {
                return Poll::Ready(Some(Received::Closed { partial: false }));
            }
            match inner.poll_head(cx) {
                Poll::Ready(received) => Poll::Ready(Some(received)),
                Poll::Pending if inner.buffer.is_empty() => Poll::Pending,
                Poll::Pending => Poll::Ready(None),
            }
        });
        if let Some(received) = first.await {
            return received;
        }
        // Its first bytes are here: the request has begun, and its time runs.
        let mut begun = Begun::new(state, clock::now(), Version::HTTP_11);
        let late = Box::pin(begun.late_head());
        self.inner.borrow_mut().begun = Some(Box::new(begun));
        tokio::select! {
            biased;
            received = poll_fn(|cx| self.inner.borrow_mut().poll_head(cx)) => received,
            reply = late => Received::Late(reply),
        }
    }

    fn begun(&self, state: &Rc<ConnState>) -> Begun {
        let begun = self.inner.borrow_mut().begun.take();
        begun.map_or_else(|| Begun::new(state, clock::now(), Version::HTTP_11), |begun| *begun)
    }

    /// Answers what is no request.
    async fn refuse(&self, state: &Rc<ConnState>, error: CodecError, writer: &mut Writer) -> After {
        state.count_protocol_error();
        tracing::debug!(details = error.details, "refused a request");
        self.reply(state, error.into(), writer).await
    }

    /// Answers a request of which there is no head.
    async fn reply(&self, state: &Rc<ConnState>, reply: LocalReply, writer: &mut Writer) -> After {
        // Nothing can be said of where a next request would begin.
        self.inner.borrow_mut().decoder = Decoder::UntilClose;
        state.closes.set(true);
        let response = self.begun(state).answer_without_head(reply);
        let cx = ResponseCx { to_head: false, to_connect: false, http_10: false, close: true, keep_alive: false };
        self.respond(state, response, cx, writer).await
    }

    /// One request and its response.
    async fn exchange(self: &Rc<Self>, state: &Rc<ConnState>, bytes: &Bytes, writer: &mut Writer) -> After {
        let (config, limits) = (state.config(), self.inner.borrow().limits);
        let head = match head::request(bytes, limits, &config.http1) {
            Ok(head) => head,
            Err(error) => return self.refuse(state, error, writer).await,
        };
        let head::RequestHead { mut parts, framing, target } = head;
        if let HeaderKeyFormat::PreserveCase(preserve) = config.http1.header_key_format {
            parts.extensions.insert(OriginalCase::of(bytes, preserve));
        }
        let begun = self.begun(state);
        let connect = parts.method == Method::CONNECT;
        let upgrade = connect || parts.version == Version::HTTP_11 && headers::wants_upgrade(&parts.headers);
        if connect {
            // The target says it.
            parts.headers.remove(HOST);
        }
        let mut refused = refused(target, state).or_else(|| self.malformed_start(framing, state));
        if upgrade {
            parts.extensions.insert(Upgrade);
            if !matches!(framing, Framing::None | Framing::Length(0)) {
                // Two servers would read what follows in two ways.
                refused.get_or_insert_with(|| CodecError::UPGRADE_WITH_BODY.into());
            }
        }
        if let (Version::HTTP_10, Some(host)) = (parts.version, &config.http1.default_host_for_http_10) {
            parts.headers.entry(HOST).or_insert_with(|| host.clone());
        }
        let cx = ResponseCx {
            to_head: parts.method == Method::HEAD,
            to_connect: connect,
            http_10: parts.version == Version::HTTP_10,
            close: false,
            keep_alive: encode::is_kept(parts.version, &parts.headers),
        };
        let serial = {
            let mut inner = self.inner.borrow_mut();
            inner.decoder = if upgrade { Decoder::UntilClose } else { Decoder::new(framing) };
            inner.serial += 1;
            inner.serial
        };
        let progress = Rc::clone(&begun.progress);
        state.closes.set(!cx.keep_alive);
        if config.proxy_100_continue {
            if parts.version == Version::HTTP_11 {
                progress.want_interim();
            }
        } else if parts.headers.first(&EXPECT).is_some_and(|it| it.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
            parts.headers.remove(EXPECT);
            if parts.version == Version::HTTP_11 {
                state.count_interim(StatusCode::CONTINUE);
                writer.head(None, |out| encode::interim(out, StatusCode::CONTINUE, &HeaderMap::new()));
                if poll_fn(|cx| writer.poll_write(&mut self.inner.borrow_mut().stream, cx)).await.is_err() {
                    return After::Gone;
                }
            }
        }
        let body = match framing {
            Framing::None | Framing::Length(0) if !upgrade => Incoming::Empty,
            _ => Incoming::Downstream(RequestBody {
                connection: Rc::clone(self),
                serial,
                progress: Rc::clone(&begun.progress),
            }),
        };
        let response = {
            let mut handler = pin!(begun.handle(Request::from_parts(parts, body), refused));
            poll_fn(|cx| {
                let polled = handler.as_mut().poll(cx);
                for (status, headers) in progress.take_interim() {
                    state.count_interim(status);
                    writer.head(None, |out| encode::interim(out, status, &headers));
                }
                match polled {
                    Poll::Ready(response) => Poll::Ready(Some(response)),
                    Poll::Pending => {
                        if !writer.is_empty() {
                            let written = writer.poll_write(&mut self.inner.borrow_mut().stream, cx);
                            if let Poll::Ready(Err(_)) = written {
                                return Poll::Ready(None);
                            }
                        }
                        self.poll_gone(cx).map(|()| None)
                    }
                }
            })
            .await
        };
        match response {
            Some(response) => self.respond(state, response, cx, writer).await,
            None => After::Gone,
        }
    }

    /// Looks at the beginning of a chunked body, as far as it is there already: where that is malformed, nothing is forwarded.
    fn malformed_start(&self, framing: Framing, state: &ConnState) -> Option<LocalReply> {
        let inner = self.inner.borrow();
        if framing != Framing::Chunked || inner.buffer.is_empty() {
            return None;
        }
        let (mut decoder, mut copy) =
            (Decoder::new(framing), BytesMut::from(&inner.buffer[..inner.buffer.len().min(LOOKED_AT)]));
        loop {
            match decoder.decode(&mut copy, inner.limits) {
                Ok(Some(Item::Data(_))) => {}
                Ok(Some(Item::End(_)) | None) => return None,
                Err(error) => {
                    state.count_protocol_error();
                    return Some(error.into());
                }
            }
        }
    }

    /// Writes a response, and says what becomes of the connection.
    async fn respond(
        &self,
        state: &Rc<ConnState>,
        response: Response<Body>,
        mut cx: ResponseCx,
        writer: &mut Writer,
    ) -> After {
        let (parts, mut body) = response.into_parts();
        let upgraded = parts.status == StatusCode::SWITCHING_PROTOCOLS || cx.to_connect && parts.status.is_success();
        let (complete, enable_trailers) = {
            let mut inner = self.inner.borrow_mut();
            inner.upgraded = upgraded;
            (inner.decoder.is_done(), inner.enable_trailers)
        };
        let asked = !cx.keep_alive;
        // Nobody waits for the rest of a request that has its response.
        cx.close |= !complete || asked || self.last.get() != Last::NotYet || parts.headers.has(&CONNECTION);
        if !cx.close && !upgraded && state.is_to_leave() {
            cx.close = true;
            state.manager.stats.downstream_cx_drain_close.inc();
        }
        state.closes.set(cx.close);
        if !complete && !upgraded {
            state.count_early_response();
        }
        let length = BodyLength { ended: body.is_end_stream(), exact: body.size_hint().exact() };
        let case = parts.extensions.get::<OriginalCase>();
        let status = (parts.status, case.and_then(OriginalCase::reason));
        let framing = writer.head(case, |out| encode::response(out, status, &parts.headers, length, cx));
        buffers::give_headers(parts.headers);
        let mut out = Outgoing { body: &mut body, framing, enable_trailers, ended: false, broken: false };
        let written = poll_fn(|cx| out.poll(cx, self, writer)).await;
        let broken = out.broken;
        let complete = self.inner.borrow().decoder.is_done();
        // One that the client breaks off is counted as such.
        if !complete && (written.is_ok() || !upgraded) {
            state.count_reset();
        }
        let ahead = !self.inner.borrow().buffer.is_empty();
        match written {
            Err(()) if broken => After::Broken,
            Err(()) => After::Gone,
            Ok(()) if cx.close && asked && complete && !ahead => After::Close,
            Ok(()) if cx.close || framing == Framing::UntilClose => After::Linger,
            Ok(()) => After::Next,
        }
    }

    /// Ready when the client is gone. Reads ahead while it waits, but only so much.
    fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut inner = self.inner.borrow_mut();
        loop {
            if inner.eof {
                return Poll::Ready(());
            }
            // Nobody takes anything of what follows an upgrade before that is agreed to.
            let ahead = inner.decoder.is_done() || matches!(inner.decoder, Decoder::UntilClose) && !inner.upgraded;
            if !ahead || inner.buffer.len() >= PIPELINED {
                // Whoever reads the body will see it.
                inner.task.get_or_insert_with(|| cx.waker().clone()).clone_from(cx.waker());
                return Poll::Pending;
            }
            ready!(inner.poll_fill(cx));
        }
    }

    fn is_upgraded(&self) -> bool {
        self.inner.borrow().upgraded
    }

    /// Says that nothing more will be written, and waits for the client to be done, at most so long: a connection that is closed
    /// while there is something to be read is reset, and takes the last response with it.
    async fn close(&self, linger: Duration, state: &ConnState) -> ConnectionEnd {
        // Whoever closes a socket says as much.
        if linger.is_zero() && self.inner.borrow().stream.is_plain() {
            return ConnectionEnd::HERE;
        }
        let shut = poll_fn(|cx| Pin::new(&mut self.inner.borrow_mut().stream).poll_shutdown(cx)).await;
        if linger.is_zero() {
            return ConnectionEnd::HERE;
        }
        if shut.is_err() {
            return ConnectionEnd { by_client: true, in_use: false };
        }
        let drained = poll_fn(|cx| {
            let mut inner = self.inner.borrow_mut();
            loop {
                inner.buffer.clear();
                if inner.eof {
                    return Poll::Ready(());
                }
                ready!(inner.poll_fill(cx));
            }
        });
        let by_client = tokio::time::timeout(linger, drained).await.is_ok();
        if !by_client {
            state.manager.stats.downstream_cx_delayed_close_timeout.inc();
        }
        ConnectionEnd { by_client, in_use: false }
    }
}

/// Targets that are well-formed but lead nowhere; the texts are Envoy's.
fn refused(target: Target, state: &ConnState) -> Option<LocalReply> {
    let (status, details) = match target {
        Target::Path | Target::Authority => return None,
        Target::NoPath => {
            state.count_non_relative_path();
            (StatusCode::NOT_FOUND, "absolute_path_rejected")
        }
        Target::Fragment => {
            state.count_failed_normalization();
            (StatusCode::BAD_REQUEST, "path_normalization_failed")
        }
    };
    Some(LocalReply::new(status, "", ResponseFlags::default(), details))
}

impl Inner {
    /// Reads once. The end of the connection is noted.
    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.eof |= !ready!(buffers::poll_fill(&mut self.stream, &mut self.buffer, cx));
        Poll::Ready(())
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Received> {
        loop {
            match self.scanner.take(&mut self.buffer, Kind::Request, self.limits) {
                Ok(Some(head)) => return Poll::Ready(Received::Head(head)),
                Ok(None) if self.eof => {
                    self.begun = None;
                    return Poll::Ready(Received::Closed { partial: !self.buffer.is_empty() });
                }
                Ok(None) => ready!(self.poll_fill(cx)),
                Err(error) => return Poll::Ready(Received::Refused(error)),
            }
        }
    }
}
