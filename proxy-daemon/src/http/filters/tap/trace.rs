//! What is recorded of one stream.

use std::{
    cell::RefCell,
    fmt,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::SystemTime,
};

use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            Address, HeaderMap as ProtoHeaders, HeaderValue as ProtoHeader, SocketAddress, address, socket_address,
        },
        data::tap::v3::{
            Body as ProtoBody, Connection, HttpBufferedTrace, HttpStreamedTraceSegment, TraceWrapper, body::BodyType,
            http_buffered_trace::Message, http_streamed_trace_segment::MessagePiece, trace_wrapper::Trace as Kind,
        },
    },
    google::protobuf::Timestamp,
};
use http::{
    HeaderMap, StatusCode,
    header::{DATE, HOST},
};
use http_body::{Body as _, Frame, SizeHint};

use super::{
    Recorded, TapConfig,
    matcher::{Event, Statuses},
    output::text_of,
};
use crate::http::filters::shared::Kept;
use crate::{
    http::{
        body::{Body, BodyError, WrappedBody},
        codec, redirect,
        route_match::authority,
        stream::{RequestHead, ResponseHead},
    },
    stats::Counter,
};

/// A tap of one stream.
pub(in crate::http) struct Trace {
    config: Kept<TapConfig>,
    recorded: Recorded,
    rq_tapped: Counter,
    id: u64,
    /// Our end of the client's connection, and its own.
    downstream: (SocketAddr, SocketAddr),
    state: RefCell<State>,
}

struct State {
    statuses: Statuses,
    request: Part,
    response: Part,
    /// Pieces of bodies are sent on as they come: as in Envoy also where the stream turns out not to match.
    streams: bool,
    /// Nothing has been sent on.
    first: bool,
}

/// What has come of a message and is still held.
#[derive(Default)]
struct Part {
    headers: Option<Vec<ProtoHeader>>,
    body: Option<Held>,
    trailers: Option<Vec<ProtoHeader>>,
    received: Option<SystemTime>,
}

#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    truncated: bool,
}

impl Held {
    /// Keeps as much of the piece as `limit` leaves room for.
    fn add(&mut self, piece: &[u8], limit: usize) {
        let kept = piece.len().min(limit.saturating_sub(self.bytes.len()));
        self.bytes.extend_from_slice(&piece[..kept]);
        self.truncated |= kept < piece.len();
    }
}

impl From<Held> for ProtoBody {
    fn from(held: Held) -> ProtoBody {
        ProtoBody { body_type: Some(BodyType::AsBytes(held.bytes)), truncated: held.truncated }
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Trace").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Trace {
    pub(super) fn new(
        config: Kept<TapConfig>,
        recorded: Recorded,
        rq_tapped: Counter,
        id: u64,
        downstream: (SocketAddr, SocketAddr),
    ) -> Rc<Trace> {
        let statuses = config.matcher.begin();
        let (request, response) = (Part::default(), Part::default());
        let state = State { statuses, request, response, streams: false, first: true };
        Rc::new(Trace { config, recorded, rq_tapped, id, downstream, state: RefCell::new(state) })
    }

    /// The request has come.
    pub(super) fn request(&self, head: &RequestHead) {
        let state = &mut *self.state.borrow_mut();
        state.request.headers = Some(request_headers(head));
        state.request.received = Some(SystemTime::now());
        if self.streams(state, Event::RequestHeaders(head)) {
            self.send_headers(state, false);
        }
    }

    /// The request as it is now, after other filters or the router.
    pub(in crate::http) fn request_now(&self, head: &RequestHead) {
        let request = &mut self.state.borrow_mut().request;
        if request.headers.is_some() {
            request.headers = Some(request_headers(head));
        }
    }

    /// The response has come.
    pub(super) fn response(&self, head: &ResponseHead) {
        let state = &mut *self.state.borrow_mut();
        state.response.headers = Some(response_headers(head.status, &head.headers));
        state.response.received = Some(SystemTime::now());
        if self.streams(state, Event::ResponseHeaders(head)) {
            self.flush_request(state);
            self.send_headers(state, true);
        }
    }

    /// The response as the client gets it.
    pub(in crate::http) fn response_now(&self, status: StatusCode, headers: &HeaderMap) {
        let response = &mut self.state.borrow_mut().response;
        if response.headers.is_some() {
            let mut all = response_headers(status, headers);
            // What is made here has it from the codec.
            if !headers.contains_key(DATE) {
                all.push(header(DATE.as_str(), text_of(codec::date().as_bytes())));
            }
            response.headers = Some(all);
        }
    }

    /// A piece of a body passes.
    pub(super) fn data(&self, piece: &[u8], of_response: bool) {
        let state = &mut *self.state.borrow_mut();
        let event = if of_response { Event::ResponseBody(piece) } else { Event::RequestBody(piece) };
        self.config.matcher.see(event, &mut state.statuses);
        let limit = if of_response { self.config.max_buffered_tx } else { self.config.max_buffered_rx };
        if state.streams {
            let mut held = Held::default();
            held.add(piece, limit);
            self.send(state, body_piece(held, of_response));
        } else if !self.config.streaming || state.statuses.may_change() {
            let part = if of_response { &mut state.response } else { &mut state.request };
            part.body.get_or_insert_default().add(piece, limit);
        }
    }

    /// Trailers pass.
    fn trailers(&self, trailers: &HeaderMap, of_response: bool) {
        let state = &mut *self.state.borrow_mut();
        let part = if of_response { &mut state.response } else { &mut state.request };
        part.trailers = Some(map_headers(trailers));
        let event = match of_response {
            true => Event::ResponseTrailers(trailers),
            false => Event::RequestTrailers(trailers),
        };
        if self.streams(state, event) {
            self.flush_request(state);
            if of_response {
                self.send_headers(state, true);
                self.send_body(state, true);
                self.send_trailers(state, true);
            }
        }
    }

    /// The stream has ended. `upstream`: our end of the connection to its host, and the host's.
    pub(in crate::http) fn end(&self, upstream: (Option<SocketAddr>, Option<SocketAddr>)) {
        let state = &mut *self.state.borrow_mut();
        if !state.statuses.matches() {
            return;
        }
        self.rq_tapped.inc();
        if self.config.streaming {
            return;
        }
        let message = |part: &mut Part| {
            let received = part.received.filter(|_| self.recorded.headers_received_time);
            let part = std::mem::take(part);
            let none = part.headers.is_none() && part.body.is_none() && part.trailers.is_none();
            (!none).then(|| Message {
                headers: part.headers.unwrap_or_default(),
                body: part.body.map(Into::into),
                trailers: part.trailers.unwrap_or_default(),
                headers_received_time: received.map(timestamp),
            })
        };
        let (local, remote) = self.downstream;
        let downstream =
            Connection { local_address: Some(proto_address(local)), remote_address: Some(proto_address(remote)) };
        let upstream =
            Connection { local_address: upstream.0.map(proto_address), remote_address: upstream.1.map(proto_address) };
        let trace = HttpBufferedTrace {
            request: message(&mut state.request),
            response: message(&mut state.response),
            downstream_connection: self.recorded.downstream_connection.then_some(downstream),
            upstream_connection: self.recorded.upstream_connection.then_some(upstream),
        };
        self.submit(state, Kind::HttpBufferedTrace(trace));
    }

    /// Whether what has come is sent on, and what comes of bodies from now on.
    fn streams(&self, state: &mut State, event: Event<'_>) -> bool {
        self.config.matcher.see(event, &mut state.statuses);
        let streams = self.config.streaming && state.statuses.matches();
        state.streams |= streams;
        streams
    }

    /// Sends on what is held of the request.
    fn flush_request(&self, state: &mut State) {
        self.send_headers(state, false);
        self.send_body(state, false);
        self.send_trailers(state, false);
    }

    fn send_headers(&self, state: &mut State, of_response: bool) {
        let part = if of_response { &mut state.response } else { &mut state.request };
        let Some(headers) = part.headers.take().map(|headers| ProtoHeaders { headers }) else { return };
        let piece = match of_response {
            true => MessagePiece::ResponseHeaders(headers),
            false => MessagePiece::RequestHeaders(headers),
        };
        self.send(state, piece);
    }

    fn send_body(&self, state: &mut State, of_response: bool) {
        let part = if of_response { &mut state.response } else { &mut state.request };
        if let Some(held) = part.body.take() {
            self.send(state, body_piece(held, of_response));
        }
    }

    fn send_trailers(&self, state: &mut State, of_response: bool) {
        let part = if of_response { &mut state.response } else { &mut state.request };
        let Some(headers) = part.trailers.take().map(|headers| ProtoHeaders { headers }) else { return };
        let piece = match of_response {
            true => MessagePiece::ResponseTrailers(headers),
            false => MessagePiece::RequestTrailers(headers),
        };
        self.send(state, piece);
    }

    fn send(&self, state: &mut State, piece: MessagePiece) {
        let segment = HttpStreamedTraceSegment { trace_id: self.id, message_piece: Some(piece) };
        self.submit(state, Kind::HttpStreamedTraceSegment(segment));
    }

    fn submit(&self, state: &mut State, trace: Kind) {
        let first = std::mem::take(&mut state.first);
        let configured_sample_rate = self.config.sample_rate.filter(|_| first);
        self.config.sink.submit(TraceWrapper { trace: Some(trace), configured_sample_rate }, self.id, first);
    }
}

/// In microseconds, as Envoy has it.
fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let nanos = i32::try_from(since.subsec_micros() * 1000).unwrap_or_default();
    Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanos }
}

fn body_piece(held: Held, of_response: bool) -> MessagePiece {
    match of_response {
        true => MessagePiece::ResponseBodyChunk(held.into()),
        false => MessagePiece::RequestBodyChunk(held.into()),
    }
}

fn request_headers(head: &RequestHead) -> Vec<ProtoHeader> {
    let path = head.uri.path_and_query().map(|path| path.as_str());
    let pseudo = [
        (":authority", Some(authority(head))),
        (":path", path),
        (":method", Some(head.method.as_str())),
        (":scheme", Some(head.uri.scheme_str().unwrap_or_else(|| redirect::scheme(head)))),
    ];
    let pseudo = pseudo.into_iter().filter_map(|(name, value)| Some(header(name, value?.to_owned())));
    let others = head.headers.iter().filter(|(name, _)| *name != HOST);
    pseudo.chain(others.map(|(name, value)| header(name.as_str(), text_of(value.as_bytes())))).collect()
}

fn response_headers(status: StatusCode, headers: &HeaderMap) -> Vec<ProtoHeader> {
    let mut all = vec![header(":status", status.as_str().to_owned())];
    all.extend(map_headers(headers));
    all
}

fn map_headers(headers: &HeaderMap) -> Vec<ProtoHeader> {
    headers.iter().map(|(name, value)| header(name.as_str(), text_of(value.as_bytes()))).collect()
}

fn header(name: &str, value: String) -> ProtoHeader {
    ProtoHeader { key: name.to_owned(), value, raw_value: Vec::new() }
}

fn proto_address(address: SocketAddr) -> Address {
    let port = Some(socket_address::PortSpecifier::PortValue(u32::from(address.port())));
    let address = address.ip().to_canonical().to_string();
    let socket = SocketAddress { address, port_specifier: port, ..SocketAddress::default() };
    Address { address: Some(address::Address::SocketAddress(socket)) }
}

/// A body whose pieces are recorded as they pass.
pub(super) struct Tapped {
    body: Body,
    trace: Rc<Trace>,
    of_response: bool,
}

impl Tapped {
    /// Records a body as it passes.
    pub(super) fn wrap(body: &mut Body, trace: &Rc<Trace>, of_response: bool) {
        match body {
            Body::Empty => {}
            // It is here already.
            Body::Full(bytes) => {
                if !bytes.is_empty() {
                    trace.data(bytes, of_response);
                }
            }
            body => {
                if !body.is_end_stream() {
                    let trace = Rc::clone(trace);
                    body.wrap(|body| Tapped { body, trace, of_response });
                }
            }
        }
    }
}

impl WrappedBody for Tapped {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.body)
    }
}

impl http_body::Body for Tapped {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame {
            match (frame.data_ref(), frame.trailers_ref()) {
                (Some(data), _) => self.trace.data(data, self.of_response),
                (None, Some(trailers)) => self.trace.trailers(trailers, self.of_response),
                (None, None) => {}
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
