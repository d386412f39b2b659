//! `envoy.filters.http.grpc_web`: gRPC for browsers, in binary or in base64, with the trailers at the end of the body.

use std::{
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::grpc_web::v3::GrpcWeb, google::protobuf::Any};
use http::{
    HeaderMap, HeaderName, HeaderValue, StatusCode,
    header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, TE},
};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting,
    grpc_counts::{Call, service_and_method},
};
use crate::{
    access_log::ResponseFlags,
    config::FieldError,
    grpc_status,
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::{
            is_grpc,
            names::{GRPC_MESSAGE, GRPC_STATUS},
        },
        local_reply::grpc_message,
        stream::{LocalReply, Progress, RequestHead, ResponseHead, StreamCx},
    },
};

const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

const BINARY: &str = "application/grpc-web";
const BINARY_PROTO: &str = "application/grpc-web+proto";
const TEXT: &str = "application/grpc-web-text";
const TEXT_PROTO: &str = "application/grpc-web-text+proto";

/// The flag of the frame that holds the trailers.
const TRAILERS: u8 = 0b1000_0000;

/// The most of an answer that is no gRPC that becomes a `grpc-message`: Envoy's limit.
const MAX_MESSAGE: usize = 16_384;

#[derive(Debug)]
struct GrpcWebFactory;

/// A request of gRPC-Web.
struct GrpcWebFilter {
    /// The client wants base64.
    text: bool,
    call: Option<Rc<Call>>,
}

fn is_one_of(headers: &HeaderMap, name: HeaderName, kinds: &[&str]) -> bool {
    headers.get(name).and_then(|value| value.to_str().ok()).is_some_and(|value| kinds.contains(&value))
}

impl HttpFilterFactory for GrpcWebFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if !is_one_of(&head.headers, CONTENT_TYPE, &[BINARY, BINARY_PROTO, TEXT, TEXT_PROTO]) {
            return Flow::Continue;
        }
        let call = service_and_method(head).and_then(|named| Call::new(cx, "grpc-web", Some(named)));
        let headers = &mut head.headers;
        headers.remove(CONTENT_LENGTH);
        if is_one_of(headers, CONTENT_TYPE, &[TEXT, TEXT_PROTO]) && !body.is_end_stream() {
            let progress = Rc::clone(&cx.progress);
            body.wrap(|body| Decoded { body, held: Vec::new(), progress, ended: false });
        }
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(TE, HeaderValue::from_static("trailers"));
        headers.entry(GRPC_ACCEPT_ENCODING).or_insert(HeaderValue::from_static("identity"));
        let text = is_one_of(headers, ACCEPT, &[TEXT, TEXT_PROTO]);
        instances.push(Box::new(GrpcWebFilter { text, call: call.map(Rc::new) }));
        Flow::Continue
    }
}

/// Whether an answer is gRPC, or gRPC-Web already.
fn is_grpc_answer(head: &ResponseHead, ended: bool) -> bool {
    if ended && head.headers.contains_key(GRPC_STATUS) {
        return true;
    }
    let kind = head.headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim_end();
    let web = [BINARY, BINARY_PROTO].iter().any(|known| known.eq_ignore_ascii_case(kind));
    head.status == StatusCode::OK && (web || !ended && is_grpc(&head.headers))
}

/// Makes an answer that is no gRPC one: what it says becomes the message.
fn transform(head: &mut ResponseHead, body: &mut Body, said: &[u8]) {
    if let Ok(message) = HeaderValue::from_str(&grpc_message(said)) {
        head.headers.insert(GRPC_MESSAGE, message);
    }
    head.headers.insert(GRPC_STATUS, HeaderValue::from(grpc_status::of_http(head.status.as_u16())));
    head.headers.insert(CONTENT_LENGTH, HeaderValue::from(0));
    *body = Body::Empty;
}

impl HttpFilter for GrpcWebFilter {
    fn response(&mut self, head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        if let Some(call) = &self.call {
            call.charge(head.headers.get(GRPC_STATUS));
        }
        let ended = body.is_end_stream();
        let is_grpc = is_grpc_answer(head, ended);
        head.headers.remove(CONTENT_LENGTH);
        let kind = if self.text { TEXT_PROTO } else { BINARY_PROTO };
        head.headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
        if ended {
            return Flow::Continue;
        }
        if !is_grpc {
            let Body::Full(said) = body else { return Flow::Wait };
            let said = std::mem::take(said);
            transform(head, body, &said);
            return Flow::Continue;
        }
        let (encoder, call) = (self.text.then(Encoder::default), self.call.clone());
        body.wrap(|body| Framed { body, encoder, call, ended: false });
        Flow::Continue
    }

    fn wait_response<'a>(
        &'a mut self,
        head: &'a mut ResponseHead,
        body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        // The client gets none of it.
        cx.progress.sent_otherwise.set(true);
        Box::pin(async move {
            let mut said = Vec::new();
            while let Some(Ok(frame)) = body.frame().await {
                if let Some(data) = frame.data_ref() {
                    said.extend_from_slice(&data[..data.len().min(MAX_MESSAGE - said.len())]);
                }
            }
            transform(head, body, &said);
            Flow::Continue
        })
    }
}

/// A request's body that comes in base64.
struct Decoded {
    body: Body,
    /// Less than four characters, which do not make bytes yet.
    held: Vec<u8>,
    progress: Rc<Progress>,
    ended: bool,
}

impl Decoded {
    /// The request is answered with 400.
    fn refuse(&self, details: &'static str) -> BodyError {
        let (status, text) = (StatusCode::BAD_REQUEST, "Bad gRPC-web request, invalid base64 data.");
        let reply = LocalReply::new(status, text, ResponseFlags::default(), details);
        self.progress.instead.replace(Some(Box::new(reply)));
        BodyError::from("invalid base64 data")
    }

    /// The bytes of all characters that are there, four by four: what browsers send may be several texts after each other.
    fn decode(&mut self, data: &[u8]) -> Result<Bytes, BodyError> {
        self.held.extend_from_slice(data);
        let whole = self.held.len() / 4 * 4;
        let mut bytes = Vec::with_capacity(whole / 4 * 3);
        for four in self.held[..whole].chunks_exact(4) {
            STANDARD.decode_vec(four, &mut bytes).map_err(|_| self.refuse("grpc_base_64_decode_failed"))?;
        }
        self.held.drain(..whole);
        Ok(bytes.into())
    }
}

impl WrappedBody for Decoded {}

impl http_body::Body for Decoded {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        while !this.ended {
            let frame = ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose()?;
            let Some(frame) = frame else {
                this.ended = true;
                if !this.held.is_empty() {
                    return Poll::Ready(Some(Err(this.refuse("grpc_base_64_decode_failed_bad_size"))));
                }
                break;
            };
            match frame.into_data() {
                Ok(data) => {
                    let data = this.decode(&data)?;
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                Err(trailers) => {
                    this.ended = true;
                    return Poll::Ready(Some(Ok(trailers)));
                }
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

/// Base64 of frames, each by itself, as their bytes come.
#[derive(Debug, Default)]
struct Encoder {
    /// Bytes of the frame's header that have come.
    header: u8,
    length: u32,
    /// Bytes of the frame that are to come.
    left: u32,
    /// Less than three bytes, which do not make four characters yet.
    held: Vec<u8>,
}

impl Encoder {
    fn encode(&mut self, mut data: &[u8], out: &mut String) {
        while let Some((first, rest)) = data.split_first() {
            if self.header < 5 {
                if self.header > 0 {
                    self.length = self.length << 8 | u32::from(*first);
                }
                self.header += 1;
                self.left = self.length;
                self.held.push(*first);
                data = rest;
            } else {
                let taken = data.len().min(self.left as usize);
                self.held.extend_from_slice(&data[..taken]);
                // At most `left`.
                self.left -= taken as u32;
                data = &data[taken..];
            }
            let ended = self.header == 5 && self.left == 0;
            let whole = if ended { self.held.len() } else { self.held.len() / 3 * 3 };
            STANDARD.encode_string(&self.held[..whole], out);
            self.held.drain(..whole);
            if ended {
                (self.header, self.length) = (0, 0);
            }
        }
    }
}

/// A response's body with its trailers at its end.
struct Framed {
    body: Body,
    /// `None`: in binary.
    encoder: Option<Encoder>,
    call: Option<Rc<Call>>,
    ended: bool,
}

/// A frame that holds trailers.
fn trailers_frame(trailers: &HeaderMap) -> Vec<u8> {
    let mut frame = vec![TRAILERS, 0, 0, 0, 0];
    for (name, value) in trailers {
        frame.extend_from_slice(&[name.as_str().as_bytes(), b":", value.as_bytes(), b"\r\n"].concat());
    }
    let length = u32::try_from(frame.len() - 5).unwrap_or(u32::MAX);
    frame[1..5].copy_from_slice(&length.to_be_bytes());
    frame
}

impl WrappedBody for Framed {}

impl http_body::Body for Framed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        while !this.ended {
            let Some(frame) = ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose()? else {
                this.ended = true;
                break;
            };
            let data = match frame.into_data() {
                Ok(data) => data,
                Err(frame) => {
                    this.ended = true;
                    let trailers = frame.into_trailers().unwrap_or_default();
                    if let Some(call) = &this.call {
                        call.charge(trailers.get(GRPC_STATUS));
                    }
                    let frame = trailers_frame(&trailers);
                    let frame = if this.encoder.is_some() { STANDARD.encode(frame).into_bytes() } else { frame };
                    return Poll::Ready(Some(Ok(Frame::data(frame.into()))));
                }
            };
            let Some(encoder) = &mut this.encoder else { return Poll::Ready(Some(Ok(Frame::data(data)))) };
            let mut text = String::with_capacity(data.len().div_ceil(3) * 4 + 4);
            encoder.encode(&data, &mut text);
            if !text.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(text.into()))));
            }
        }
        Poll::Ready(None)
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let GrpcWeb {} = unpack(typed_config, cx.path)?;
    Ok(Arc::new(GrpcWebFactory))
}

/// What the fuzzer `grpc_web` feeds: a body, whose first byte says how it is parted. It makes no difference where, and what is encoded is
/// decoded again.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let Some((size, body)) = bytes.split_first() else { return };
    let (size, whole) = (usize::from(*size).max(1), body.len().max(1));
    let decoded = |text: &[u8], size: usize| {
        let progress = Progress::new(std::time::Instant::now(), false);
        let mut decoding = Decoded { body: Body::Empty, held: Vec::new(), progress, ended: false };
        let pieces: Result<Vec<Bytes>, BodyError> = text.chunks(size).map(|piece| decoding.decode(piece)).collect();
        pieces.ok().map(|pieces| pieces.concat())
    };
    assert_eq!(decoded(body, size), decoded(body, whole));
    let encoded = |size: usize| {
        let (mut encoder, mut text) = (Encoder::default(), String::new());
        body.chunks(size).for_each(|piece| encoder.encode(piece, &mut text));
        (text, encoder.held)
    };
    let (text, held) = encoded(size);
    let again = decoded(text.as_bytes(), size).map(|decoded| [decoded, held.clone()].concat());
    assert_eq!(again.as_deref(), Some(body));
    assert_eq!((text, held), encoded(whole));
}

#[cfg(test)]
#[path = "grpc_web_tests.rs"]
mod tests;
