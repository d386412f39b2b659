//! Heads and bodies, to bytes.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes};
use http::{
    HeaderMap, HeaderName, Method, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, DATE, TRANSFER_ENCODING},
};
use tokio::io::AsyncWrite;

use super::{
    buffers,
    case::{OriginalCase, to_proper_case},
    head::{Framing, length},
};
use crate::{config::model::HeaderKeyFormat, http::look::Look as _};

/// A body's piece up to this is copied behind the head: cheaper than one more slice for the kernel.
const COPIED: usize = 4096;
/// No more small pieces are gathered for one write than this, in bytes.
const GATHERED: usize = 32 * 1024;

/// What is to be written, in this order: a head with what is small, one large piece of a body, and that piece's end.
#[derive(Default)]
pub(super) struct Writer {
    out: Vec<u8>,
    large: Bytes,
    tail: &'static [u8],
    written: usize,
    /// Something of it is out.
    started: bool,
    /// Names of fields are written as `Content-Length`, where they are not to be as they came.
    proper_case: bool,
}

impl Writer {
    /// Writes names of fields in proper case, or in lower case.
    pub(super) fn in_case(format: HeaderKeyFormat) -> Writer {
        Writer { proper_case: format == HeaderKeyFormat::ProperCaseWords, ..Writer::default() }
    }

    /// Adds what `write` appends: lines of which the first is none of a field.
    pub(super) fn head<T>(&mut self, case: Option<&OriginalCase>, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        let proper_case = self.proper_case;
        let out = self.out();
        let from = out.len();
        let result = write(out);
        match case {
            Some(case) => case.restore(&mut out[from..]),
            None if proper_case => to_proper_case(&mut out[from..]),
            None => {}
        }
        result
    }

    /// Begins a message.
    pub(super) fn begin(&mut self) {
        self.started = false;
    }

    /// Whether any of the message has been written.
    pub(super) fn has_started(&self) -> bool {
        self.started
    }

    /// Where heads are put.
    pub(super) fn out(&mut self) -> &mut Vec<u8> {
        if self.out.capacity() == 0 {
            self.out = buffers::out();
        }
        &mut self.out
    }

    pub(super) fn is_empty(&self) -> bool {
        self.out.len() == self.written && self.large.is_empty() && self.tail.is_empty()
    }

    /// Whether another piece may be added before this is written.
    pub(super) fn has_room(&self) -> bool {
        self.large.is_empty() && self.tail.is_empty() && self.out.len() < GATHERED
    }

    /// Adds a piece of a body; only where [`has_room`](Self::has_room).
    pub(super) fn data(&mut self, data: Bytes, chunked: bool) {
        if data.is_empty() {
            return;
        }
        let out = self.out();
        if chunked {
            hex(out, data.len());
        }
        let end: &[u8] = if chunked { b"\r\n" } else { b"" };
        if data.len() <= COPIED {
            out.extend_from_slice(&data);
            out.extend_from_slice(end);
            buffers::recycle(data);
        } else {
            self.large = data;
            self.tail = if chunked { b"\r\n" } else { b"" };
        }
    }

    /// Ends a chunked body; only where [`has_room`](Self::has_room).
    pub(super) fn last_chunk(&mut self, trailers: Option<&HeaderMap>) {
        self.head(None, |out| {
            out.extend_from_slice(b"0\r\n");
            for (name, value) in trailers.into_iter().flatten().filter(|(name, _)| !is_framing(name)) {
                field(out, name.as_str(), value.as_bytes());
            }
            out.extend_from_slice(b"\r\n");
        });
    }

    /// Writes as much as the other side takes; ready when that was all.
    pub(super) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let out = &self.out[self.written..];
            let written = if self.large.is_empty() && self.tail.is_empty() {
                ready!(Pin::new(&mut *stream).poll_write(cx, out))?
            } else {
                let slices = [IoSlice::new(out), IoSlice::new(&self.large), IoSlice::new(self.tail)];
                // An empty slice in front is legal and costs nothing.
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &slices))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written);
        }
        self.clear();
        // TLS keeps what the socket did not take.
        Pin::new(stream).poll_flush(cx)
    }

    fn advance(&mut self, mut written: usize) {
        self.started = true;
        let head = written.min(self.out.len() - self.written);
        self.written += head;
        written -= head;
        let large = written.min(self.large.len());
        self.large.advance(large);
        self.tail = &self.tail[written - large..];
        if self.large.is_empty() && large > 0 {
            buffers::recycle(std::mem::take(&mut self.large));
        }
    }

    /// Forgets what is left.
    pub(super) fn clear(&mut self) {
        buffers::give_out(std::mem::take(&mut self.out));
        (self.large, self.tail, self.written) = (Bytes::new(), b"", 0);
    }
}

/// The line in front of a chunk.
fn hex(out: &mut Vec<u8>, mut size: usize) {
    let mut digits = [0; 18];
    let mut at = 16;
    digits[16..].copy_from_slice(b"\r\n");
    while {
        at -= 1;
        digits[at] = b"0123456789abcdef"[size & 15];
        size >>= 4;
        size != 0
    } {}
    out.extend_from_slice(&digits[at..]);
}

fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn content_length(out: &mut Vec<u8>, length: u64) {
    field(out, "content-length", itoa::Buffer::new().format(length).as_bytes());
}

/// What tells where a message ends: the codec's own business.
fn is_framing(name: &HeaderName) -> bool {
    name == CONTENT_LENGTH || name == TRANSFER_ENCODING || name == CONNECTION
}

/// Whether a header is written as it stands. `connection` says what a message with an upgrade upgrades to.
fn is_written(name: &HeaderName, upgrade: bool) -> bool {
    !is_framing(name) || upgrade && name == CONNECTION
}

/// The length that the headers tell, where they tell one.
fn told_length(headers: &HeaderMap) -> Option<u64> {
    let told = headers.first(&CONTENT_LENGTH)?;
    if headers.repeats(&CONTENT_LENGTH) { None } else { length(told.as_bytes()) }
}

/// In the extensions of a request that asks for another protocol, or for a tunnel: its body is what follows it, until the connection ends.
#[derive(Debug, Clone, Copy)]
pub struct Upgrade;

/// What a body can say of itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct BodyLength {
    /// There is none.
    pub(super) ended: bool,
    /// Its length, where that is known.
    pub(super) exact: Option<u64>,
}

/// Appends a request's head; how its body must be written.
pub(super) fn request(out: &mut Vec<u8>, parts: &http::request::Parts, body: BodyLength) -> Framing {
    out.extend_from_slice(parts.method.as_str().as_bytes());
    out.push(b' ');
    let target = match (&parts.method, parts.uri.authority()) {
        (&Method::CONNECT, Some(authority)) => authority.as_str(),
        _ => parts.uri.path_and_query().map_or("/", |target| target.as_str()),
    };
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    let upgrade = parts.extensions.get::<Upgrade>().is_some();
    let connect = parts.method == Method::CONNECT;
    for (name, value) in parts.headers.iter().filter(|(name, _)| is_written(name, upgrade && !connect)) {
        field(out, name.as_str(), value.as_bytes());
    }
    if upgrade || connect {
        out.extend_from_slice(b"\r\n");
        return Framing::UntilClose;
    }
    let told = told_length(&parts.headers);
    let framing = if body.ended {
        // Those that are expected to have a body must say that they have none.
        let bodiless = matches!(parts.method, Method::GET | Method::HEAD | Method::DELETE | Method::TRACE);
        if told.is_some() || !bodiless {
            content_length(out, 0);
        }
        Framing::None
    } else if let Some(length) = told {
        content_length(out, length);
        Framing::Length(length)
    } else {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        Framing::Chunked
    };
    out.extend_from_slice(b"\r\n");
    framing
}

/// What a response's head depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResponseCx {
    /// The request was HEAD.
    pub(super) to_head: bool,
    /// The request was CONNECT.
    pub(super) to_connect: bool,
    /// The client speaks HTTP/1.0.
    pub(super) http_10: bool,
    /// The connection is closed afterwards.
    pub(super) close: bool,
    /// The client has asked for a connection that is kept, which is told it in HTTP/1.0.
    pub(super) keep_alive: bool,
}

/// Appends a response's head, with its reason where that is no usual one; how its body must be written. With [`Framing::UntilClose`] the connection must be closed: with
/// 101 the client has another protocol from there on.
pub(super) fn response(
    out: &mut Vec<u8>,
    (status, reason): (StatusCode, Option<&[u8]>),
    headers: &HeaderMap,
    body: BodyLength,
    cx: ResponseCx,
) -> Framing {
    status_line(out, if cx.http_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " }, status, reason);
    let mut dated = false;
    let upgrade = status == StatusCode::SWITCHING_PROTOCOLS;
    for (name, value) in headers.iter().filter(|(name, _)| is_written(name, upgrade)) {
        dated |= name == DATE;
        field(out, name.as_str(), value.as_bytes());
    }
    if !dated {
        super::super::with_date(|date| field(out, DATE.as_str(), date.as_bytes()));
    }
    if upgrade || cx.to_connect && status.is_success() {
        if !upgrade && status != StatusCode::OK {
            // As in Envoy: another success is no reason to expect more.
            out.extend_from_slice(b"connection: close\r\n");
        }
        out.extend_from_slice(b"\r\n");
        return Framing::UntilClose;
    }
    let told = told_length(headers);
    let no_length = status.is_informational() || status == StatusCode::NO_CONTENT;
    let framing = if no_length {
        Framing::None
    } else if let Some(length) = told {
        content_length(out, length);
        let none = cx.to_head || status == StatusCode::NOT_MODIFIED;
        if none { Framing::None } else { Framing::Length(length) }
    } else if status == StatusCode::NOT_MODIFIED {
        Framing::None
    } else if body.ended && !cx.to_head {
        content_length(out, 0);
        Framing::None
    } else if let Some(length) = body.exact.filter(|_| !cx.to_head) {
        content_length(out, length);
        Framing::Length(length)
    } else if cx.http_10 {
        if cx.to_head { Framing::None } else { Framing::UntilClose }
    } else {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        if cx.to_head { Framing::None } else { Framing::Chunked }
    };
    if cx.close || framing == Framing::UntilClose {
        out.extend_from_slice(b"connection: close\r\n");
    } else if cx.keep_alive && cx.http_10 {
        out.extend_from_slice(b"connection: keep-alive\r\n");
    }
    out.extend_from_slice(b"\r\n");
    framing
}

/// A status in words: Envoy's.
fn reason(status: StatusCode) -> &'static str {
    match status.as_u16() {
        203 => "Non-Authoritative Information",
        418 | 451 => "Unknown",
        599 => "Last Unassigned Server Error Code",
        _ => status.canonical_reason().unwrap_or("Unknown"),
    }
}

/// Appends the head of a response that comes before the response.
pub(super) fn interim(out: &mut Vec<u8>, status: StatusCode, headers: &HeaderMap) {
    status_line(out, b"HTTP/1.1 ", status, None);
    for (name, value) in headers.iter().filter(|(name, _)| !is_framing(name)) {
        field(out, name.as_str(), value.as_bytes());
    }
    out.extend_from_slice(b"\r\n");
}

fn status_line(out: &mut Vec<u8>, version: &[u8], status: StatusCode, told: Option<&[u8]>) {
    out.extend_from_slice(version);
    out.extend_from_slice(status.as_str().as_bytes());
    out.push(b' ');
    out.extend_from_slice(told.unwrap_or_else(|| reason(status).as_bytes()));
    out.extend_from_slice(b"\r\n");
}

/// Whether a message's `connection` fields have this token.
pub(super) fn connection_says(headers: &HeaderMap, token: &str) -> bool {
    let values = headers.every(&CONNECTION).into_iter().flatten().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(token))
}

/// Whether the sender of a message keeps its connection.
pub(super) fn is_kept(version: Version, headers: &HeaderMap) -> bool {
    match version {
        Version::HTTP_11 => !connection_says(headers, "close"),
        _ => connection_says(headers, "keep-alive") && !connection_says(headers, "close"),
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
