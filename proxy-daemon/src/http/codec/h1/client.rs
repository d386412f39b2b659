//! The side that hosts are spoken to: no task drives it; a request writes, reads and waits in the task that it comes from.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use tokio::io::AsyncWrite as _;

use super::{
    buffers,
    case::OriginalCase,
    decode::{Decoder, Item},
    encode::{self, BodyLength, Upgrade, Writer},
    error::CodecError,
    head::{self, Framing, Kind, Limits, Scanner, response_framing},
};
use crate::{
    config::model::{HeadLimits, HeaderKeyFormat, Http1ClientOptions},
    http::{
        body::{Body, BodyError},
        codec::Incoming,
    },
    stats::Metered,
    upstream::UpstreamStream,
};

/// `max_response_headers_kb` where nothing else is said.
const KILOBYTES: u32 = 80;
/// So many interim responses are passed over.
const INTERIM: u32 = 16;

/// Why there is no response.
pub enum SendError {
    /// The connection was closed before any of the request was written; here it is again.
    Unsent(Box<Request<Body>>),
    /// The connection broke.
    Closed,
    /// The host's answer is not to be believed.
    Protocol(CodecError),
}

/// A connection to a host, on which one request at a time is made.
pub struct ClientConnection {
    inner: RefCell<Inner>,
    /// The task that watches the connection while it is idle.
    watcher: RefCell<Option<Waker>>,
    busy: Cell<bool>,
}

struct Inner {
    stream: Metered<UpstreamStream>,
    options: Http1ClientOptions,
    limits: Limits,
    buffer: BytesMut,
    scanner: Scanner,
    decoder: Decoder,
    writer: Writer,
    upload: Upload,
    /// It may carry another request after this one.
    kept: bool,
    /// The response says that there is no further one.
    last: bool,
    /// A request is out whose response's head has not come.
    awaited: bool,
    eof: bool,
}

/// What is still to be sent of a request.
#[derive(Default)]
struct Upload {
    body: Body,
    framing: Framing,
    ended: bool,
    broken: bool,
    /// Some of the body has been taken.
    touched: bool,
    /// The host has not agreed yet to the protocol that the body is of.
    paused: bool,
    /// Its end is the end of what is written.
    shuts: bool,
    /// All of it has been written, as far as the host takes it.
    sent: bool,
}

impl ClientConnection {
    /// For a connection that nothing has been said on.
    pub fn new(stream: Metered<UpstreamStream>, options: Http1ClientOptions, heads: HeadLimits) -> ClientConnection {
        let limits = Limits {
            bytes: heads.kilobytes.unwrap_or(KILOBYTES) as usize * 1024,
            headers: heads.count.unwrap_or(HeadLimits::COUNT) as usize,
            any_method: false,
        };
        let inner = Inner {
            stream,
            options,
            limits,
            buffer: BytesMut::new(),
            scanner: Scanner::default(),
            decoder: Decoder::Done,
            writer: Writer::in_case(options.header_key_format),
            upload: Upload { ended: true, sent: true, ..Upload::default() },
            kept: true,
            last: false,
            awaited: false,
            eof: false,
        };
        ClientConnection { inner: RefCell::new(inner), watcher: RefCell::default(), busy: Cell::new(true) }
    }

    /// Sends a request and waits for its response's head. `interim` is told of the 1xx that come before it.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn send(
        self: &Rc<Self>,
        request: Request<Body>,
        mut interim: impl FnMut(StatusCode, HeaderMap),
    ) -> Result<Response<Incoming>, SendError> {
        let (parts, body) = request.into_parts();
        let to_head = parts.method == Method::HEAD;
        let connect = parts.method == Method::CONNECT;
        let upgrade = connect || parts.extensions.get::<Upgrade>().is_some();
        {
            let mut inner = self.inner.borrow_mut();
            let length = BodyLength { ended: body.is_end_stream(), exact: None };
            (inner.kept, inner.awaited) = (false, true);
            inner.writer.begin();
            let case = parts.extensions.get::<OriginalCase>();
            let framing = inner.writer.head(case, |out| encode::request(out, &parts, length));
            // A tunnel's end is told to the host; whoever speaks another protocol than HTTP tells it in that.
            inner.upload =
                Upload { body, framing, ended: length.ended, paused: upgrade, shuts: connect, ..Upload::default() };
        }
        // Until a byte is out, the request can be had back.
        let mut parts = Some(parts);
        let mut poll_answer = |cx: &mut Context<'_>| {
            let mut inner = self.inner.borrow_mut();
            let writing = inner.poll_upload(cx);
            if inner.writer.has_started() {
                parts.take().into_iter().for_each(|parts| buffers::give_headers(parts.headers));
            } else if writing.is_ready()
                && !inner.upload.touched
                && let Some(parts) = parts.take()
            {
                let body = std::mem::take(&mut inner.upload.body);
                return Poll::Ready(Err(SendError::Unsent(Box::new(Request::from_parts(parts, body)))));
            }
            match inner.poll_head(cx) {
                // A host that refuses a body may answer and close before it has read all of it.
                Poll::Pending if matches!(writing, Poll::Ready(Err(()))) && inner.upload.broken => {
                    Poll::Ready(Err(SendError::Closed))
                }
                polled => polled,
            }
        };
        for _ in 0..INTERIM {
            match poll_fn(&mut poll_answer).await {
                Ok(head) if upgrade && !connect && head.parts.status == StatusCode::SWITCHING_PROTOCOLS => {
                    return self.begin_response(head, to_head, connect);
                }
                Ok(head) if head.parts.status.is_informational() => {
                    let status = head.parts.status;
                    interim(status, head.parts.headers);
                    if status == StatusCode::SWITCHING_PROTOCOLS {
                        return Err(SendError::Protocol(CodecError::CODEC));
                    }
                }
                result => return self.begin_response(result?, to_head, connect),
            }
        }
        Err(SendError::Protocol(CodecError::CODEC))
    }

    /// Sends `first` and then `body` as they are; what the host sends is the response's body.
    pub fn tunnel(self: &Rc<Self>, first: Vec<u8>, body: Body) -> Response<Incoming> {
        let mut inner = self.inner.borrow_mut();
        inner.kept = false;
        inner.writer.begin();
        inner.writer.out().extend_from_slice(&first);
        inner.upload = Upload { body, framing: Framing::UntilClose, shuts: true, ..Upload::default() };
        inner.decoder = Decoder::UntilClose;
        drop(inner);
        Response::new(Incoming::Upstream(ResponseBody(Rc::clone(self))))
    }

    fn begin_response(
        self: &Rc<Self>,
        head: head::ResponseHead,
        to_head: bool,
        connect: bool,
    ) -> Result<Response<Incoming>, SendError> {
        let head::ResponseHead { parts, told } = head;
        let switched = parts.status == StatusCode::SWITCHING_PROTOCOLS || connect && parts.status.is_success();
        let framing = if switched { Framing::UntilClose } else { response_framing(told, parts.status, to_head) };
        let mut inner = self.inner.borrow_mut();
        if inner.upload.paused {
            inner.upload.paused = false;
            if !switched {
                inner.upload.give_up();
            }
        }
        inner.last = !encode::is_kept(parts.version, &parts.headers);
        inner.kept = framing != Framing::UntilClose && !inner.last;
        inner.decoder = Decoder::new(framing);
        inner.awaited = false;
        let done = inner.decoder.is_done();
        drop(inner);
        let body = if done { Incoming::Empty } else { Incoming::Upstream(ResponseBody(Rc::clone(self))) };
        Ok(Response::from_parts(parts, body))
    }

    /// Whether the response whose head has come says that there is no further one.
    pub fn is_last(&self) -> bool {
        self.inner.borrow().last
    }

    /// Whether another request can be made: both sides are through with the last one, and nothing came after it.
    pub fn is_reusable(&self) -> bool {
        let inner = self.inner.borrow();
        inner.kept && !inner.eof && inner.decoder.is_done() && inner.upload.is_done() && inner.buffer.is_empty()
    }

    /// The host has closed it.
    pub fn is_closed_by_host(&self) -> bool {
        self.inner.borrow().eof
    }

    /// A response has not passed whole.
    pub fn is_in_use(&self) -> bool {
        let inner = self.inner.borrow();
        inner.awaited || !inner.decoder.is_done()
    }

    /// More has come than was asked for.
    pub fn has_surplus(&self) -> bool {
        let inner = self.inner.borrow();
        inner.decoder.is_done() && !inner.buffer.is_empty()
    }

    /// Nobody uses it now: the watcher is woken when the host says anything. False: it has.
    pub fn park(&self) -> bool {
        self.busy.set(false);
        self.inner.borrow_mut().upload.body = Body::Empty;
        let watcher = self.watcher.borrow();
        let waker = watcher.as_ref().unwrap_or(Waker::noop());
        self.inner.borrow_mut().poll_quiet(&mut Context::from_waker(waker)).is_pending()
    }

    /// Takes it into use again. False: the host has closed it, or has said something that nobody asked for.
    pub fn unpark(&self) -> bool {
        self.busy.set(true);
        self.inner.borrow_mut().poll_quiet(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Ready when the host closes the idle connection; the caller is the watcher from now on.
    pub fn poll_idle(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.watcher.replace(Some(cx.waker().clone()));
        if self.busy.get() { Poll::Pending } else { self.inner.borrow_mut().poll_quiet(cx) }
    }
}

impl Drop for ClientConnection {
    fn drop(&mut self) {
        if let Some(watcher) = self.watcher.get_mut().take() {
            watcher.wake();
        }
    }
}

impl Inner {
    /// Sends what can be sent; ready when all is, or nothing more can be.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ()>> {
        loop {
            let waiting = self.upload.gather(cx, &mut self.writer, self.options.enable_trailers);
            if self.writer.poll_write(&mut self.stream, cx).map_err(|_| self.upload.give_up())?.is_pending() {
                if !self.upload.ended {
                    self.upload.body.hold();
                }
                return Poll::Pending;
            }
            if self.upload.ended {
                if self.upload.shuts && !self.upload.broken {
                    // A host that is gone already needs no half-close.
                    let _ = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
                    self.upload.shuts = false;
                }
                self.upload.sent = true;
                return Poll::Ready(if self.upload.broken { Err(()) } else { Ok(()) });
            }
            if waiting {
                return Poll::Pending;
            }
        }
    }

    fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.eof |= !ready!(buffers::poll_fill(&mut self.stream, &mut self.buffer, cx));
        Poll::Ready(())
    }

    fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<head::ResponseHead, SendError>> {
        loop {
            match self.scanner.take(&mut self.buffer, Kind::Response, self.limits) {
                Ok(Some(head)) => return Poll::Ready(self.understand(&head).map_err(SendError::Protocol)),
                Ok(None) if self.eof => return Poll::Ready(Err(SendError::Closed)),
                Ok(None) => ready!(self.poll_fill(cx)),
                Err(error) => return Poll::Ready(Err(SendError::Protocol(error))),
            }
        }
    }

    fn understand(&self, head: &Bytes) -> Result<head::ResponseHead, CodecError> {
        let mut understood = head::response(head, self.limits)?;
        if let HeaderKeyFormat::PreserveCase(preserve) = self.options.header_key_format {
            understood.parts.extensions.insert(OriginalCase::of(head, preserve));
        }
        Ok(understood)
    }

    /// Ready when there is something to be read, which there should not be.
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.eof || !self.buffer.is_empty() {
            return Poll::Ready(());
        }
        self.poll_fill(cx)
    }
}

impl Upload {
    /// The host has been given all of it. What has only been taken from the body may still wait for the socket: whatever came after it on
    /// the connection would be read as its end.
    fn is_done(&self) -> bool {
        self.ended && self.sent && !self.broken
    }

    /// The host takes no more of it.
    fn give_up(&mut self) {
        (self.ended, self.broken) = (true, true);
    }

    /// Takes from the body what one write can carry; whether the body has nothing at the moment.
    fn gather(&mut self, cx: &mut Context<'_>, writer: &mut Writer, enable_trailers: bool) -> bool {
        while !self.ended && writer.has_room() {
            if self.paused {
                return true;
            }
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return true,
                Poll::Ready(Some(Ok(frame))) => {
                    self.touched = true;
                    match frame.into_data() {
                        Ok(data) => self.data(data, writer),
                        Err(frame) if enable_trailers && self.framing == Framing::Chunked => {
                            writer.last_chunk(frame.trailers_ref());
                            self.ended = true;
                        }
                        Err(_) => {}
                    }
                }
                Poll::Ready(Some(Err(_))) => self.give_up(),
                Poll::Ready(None) => {
                    self.ended = true;
                    match self.framing {
                        Framing::Chunked => writer.last_chunk(None),
                        Framing::Length(1..) => self.broken = true,
                        _ => {}
                    }
                }
            }
        }
        false
    }

    fn data(&mut self, data: Bytes, writer: &mut Writer) {
        match &mut self.framing {
            Framing::Chunked => writer.data(data, true),
            Framing::Length(left) => match left.checked_sub(data.len() as u64) {
                Some(rest) => {
                    *left = rest;
                    writer.data(data, false);
                    // The length is all: nobody need ask the body whether that was its end.
                    if rest == 0 && self.body.is_end_stream() {
                        self.ended = true;
                    }
                }
                None => self.give_up(),
            },
            Framing::UntilClose => writer.data(data, false),
            Framing::None => {}
        }
    }
}

/// A response's body, which is read when it is asked for. What is left of the request is sent meanwhile.
pub struct ResponseBody(Rc<ClientConnection>);

impl ResponseBody {
    /// Sends on what there is of the request, while nobody can take more of the response.
    pub(in crate::http) fn send_on(&mut self, cx: &mut Context<'_>) {
        let mut inner = self.0.inner.borrow_mut();
        if !inner.upload.sent {
            let _ = inner.poll_upload(cx);
        }
    }

    pub(in crate::http) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut inner = self.0.inner.borrow_mut();
        let inner = &mut *inner;
        if !inner.upload.sent {
            let _ = inner.poll_upload(cx);
        }
        loop {
            match inner.decoder.decode(&mut inner.buffer, inner.limits) {
                Ok(Some(Item::Data(data))) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Some(Item::End(trailers))) => {
                    if inner.options.enable_trailers && !trailers.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                    }
                    buffers::give_headers(trailers);
                    return Poll::Ready(None);
                }
                Ok(None) if inner.eof && matches!(inner.decoder, Decoder::UntilClose) => {
                    inner.decoder = Decoder::Done;
                    return Poll::Ready(None);
                }
                Ok(None) if inner.eof => return Poll::Ready(Some(Err(CodecError::CODEC.into()))),
                Ok(None) => ready!(inner.poll_fill(cx)),
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    pub(in crate::http) fn is_end_stream(&self) -> bool {
        self.0.inner.borrow().decoder.is_done()
    }

    pub(in crate::http) fn size_hint(&self) -> SizeHint {
        match self.0.inner.borrow().decoder {
            Decoder::Done => SizeHint::with_exact(0),
            Decoder::Length(left) => SizeHint::with_exact(left),
            Decoder::Chunked(_) | Decoder::UntilClose => SizeHint::default(),
        }
    }
}
