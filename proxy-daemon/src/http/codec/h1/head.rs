//! Message heads, from bytes. Strict: what RFC 9112 lets a recipient repair is refused here, because what this proxy reads in
//! one way the next server may read in another.

use std::{net::Ipv6Addr, sync::LazyLock};

use bytes::{Buf as _, Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING},
    uri::PathAndQuery,
};
use memchr::{memchr, memchr_iter, memmem, memrchr};

use super::{buffers, error::CodecError};
use crate::{
    config::model::Http1Options,
    http::{look::Look as _, path::path_and_query},
};

type Result<T> = std::result::Result<T, CodecError>;

/// What a head may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes, start line and all.
    pub bytes: usize,
    /// Fields.
    pub headers: usize,
    /// Any method; else those that Envoy knows.
    pub any_method: bool,
}

/// How the length of a message's body is told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    #[default]
    None,
    /// `content-length`
    Length(u64),
    /// `transfer-encoding: chunked`
    Chunked,
    /// It ends with the connection: responses only.
    UntilClose,
}

/// A head's target when it is no path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A path, or a URL, which is a path and a host by now.
    Path,
    /// A path with a fragment, which no client sends.
    Fragment,
    /// `OPTIONS *`, URLs without a path but with a query, and URLs where none are taken.
    NoPath,
    /// CONNECT's.
    Authority,
}

/// A request's head.
#[derive(Debug)]
pub struct RequestHead {
    /// Method, target, version, fields. An absolute target's authority is the `host` field.
    pub parts: http::request::Parts,
    /// What follows it.
    pub framing: Framing,
    /// What the target is.
    pub target: Target,
}

/// A response's head.
#[derive(Debug)]
pub struct ResponseHead {
    /// Status, version, fields.
    pub parts: http::response::Parts,
    /// The length and transfer coding as told; the request's method and the status also count, see [`response_framing`].
    pub told: Framing,
}

/// Looks for a head's end in what has arrived so far, without looking at anything twice.
#[derive(Debug, Default, Clone, Copy)]
pub struct Scanner {
    scanned: usize,
    lines: usize,
    start_line_checked: bool,
}

/// Which side's heads are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Clients'.
    Request,
    /// Servers'.
    Response,
}

/// Finds the end of a head. Made once: that costs more than to look through a short head.
static END: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\r\n\r\n"));

impl Scanner {
    /// Takes the head off the buffer once it is there whole, with its empty line. The limits, and what can be told from a part,
    /// are looked at before that.
    ///
    /// # Errors
    /// The head is too large, or cannot become one.
    pub fn take(&mut self, buffer: &mut BytesMut, kind: Kind, limits: Limits) -> Result<Option<Bytes>> {
        if self.scanned == 0 {
            self.skip_empty_lines(buffer, kind)?;
            match (buffer.first(), kind) {
                (None | Some(b'\r'), _) => return Ok(None),
                // Every method that there is begins so; TLS and other protocols do not.
                (Some(_), Kind::Request) if limits.any_method => {}
                (Some(b'A'..=b'Z'), Kind::Request) | (Some(b'H'), Kind::Response) => {}
                (Some(_), _) => return Err(CodecError::CODEC),
            }
        }
        let from = self.scanned.saturating_sub(3);
        if let Some(end) = END.find(&buffer[from..]) {
            let end = from + end + 4;
            if end > limits.bytes {
                return Err(CodecError::HEADERS_TOO_LARGE);
            }
            *self = Scanner::default();
            // A copy, so that the buffer is free for the next read while the head is in use.
            let head = Bytes::copy_from_slice(&buffer[..end]);
            buffer.advance(end);
            return Ok(Some(head));
        }
        self.check_part(buffer, kind, limits)?;
        Ok(None)
    }

    /// Empty lines before a request are passed over (RFC 9112, section 2.2).
    fn skip_empty_lines(&mut self, buffer: &mut BytesMut, kind: Kind) -> Result<()> {
        while kind == Kind::Request && buffer.starts_with(b"\r\n") {
            buffer.advance(2);
            self.lines += 1;
            if self.lines > 16 {
                return Err(CodecError::CODEC);
            }
        }
        Ok(())
    }

    fn check_part(&mut self, buffer: &[u8], kind: Kind, limits: Limits) -> Result<()> {
        if buffer.len() > limits.bytes {
            return Err(CodecError::HEADERS_TOO_LARGE);
        }
        for end in memchr_iter(b'\n', &buffer[self.scanned..]).map(|end| self.scanned + end) {
            if end == 0 || buffer[end - 1] != b'\r' {
                return Err(CodecError::CODEC);
            }
            if !self.start_line_checked {
                match kind {
                    Kind::Request => drop(request_line(&buffer[..end - 1], limits)?),
                    Kind::Response => drop(status_line(&buffer[..end - 1])?),
                }
                self.start_line_checked = true;
                self.lines = 0;
            } else {
                self.lines += 1;
                if self.lines > limits.headers {
                    return Err(CodecError::TOO_MANY_HEADERS);
                }
            }
        }
        self.scanned = buffer.len();
        Ok(())
    }
}

struct RequestLine<'a> {
    method: Method,
    target: &'a [u8],
    version: Version,
}

fn request_line(line: &[u8], limits: Limits) -> Result<RequestLine<'_>> {
    let space = memchr(b' ', line).ok_or(CodecError::CODEC)?;
    let (name, rest) = (&line[..space], &line[space + 1..]);
    let method = method(name, limits.any_method)?;
    let Some(last) = memrchr(b' ', rest) else {
        // HTTP/0.9 has no version.
        return Err(if rest.starts_with(b"/") { CodecError::LOW_VERSION } else { CodecError::CODEC });
    };
    let (target, version) = (&rest[..last], &rest[last + 1..]);
    if target.is_empty() || target.contains(&b' ') {
        return Err(CodecError::CODEC);
    }
    let version = match version {
        b"HTTP/1.1" => Version::HTTP_11,
        b"HTTP/1.0" => Version::HTTP_10,
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => return Err(CodecError::LOW_VERSION),
        _ => return Err(CodecError::CODEC),
    };
    Ok(RequestLine { method, target, version })
}

/// The methods that Envoy knows: others are refused, unless any will do.
fn method(name: &[u8], any: bool) -> Result<Method> {
    match name {
        b"GET" => Ok(Method::GET),
        b"POST" => Ok(Method::POST),
        b"PUT" | b"DELETE" | b"HEAD" | b"OPTIONS" | b"PATCH" | b"CONNECT" | b"TRACE" | b"ACL" | b"BIND"
        | b"CHECKOUT" | b"COPY" | b"LINK" | b"LOCK" | b"MERGE" | b"MKACTIVITY" | b"MKCALENDAR" | b"MKCOL" | b"MOVE"
        | b"MSEARCH" | b"NOTIFY" | b"PROPFIND" | b"PROPPATCH" | b"PURGE" | b"REBIND" | b"REPORT" | b"SEARCH"
        | b"SOURCE" | b"SUBSCRIBE" | b"UNBIND" | b"UNLINK" | b"UNLOCK" | b"UNSUBSCRIBE" => {
            Method::from_bytes(name).map_err(|_| CodecError::CODEC)
        }
        _ if any => Method::from_bytes(name).map_err(|_| CodecError::CODEC),
        _ => Err(CodecError::CODEC),
    }
}

fn status_line(line: &[u8]) -> Result<(StatusCode, Version)> {
    let version = match line.get(..9) {
        Some(b"HTTP/1.1 ") => Version::HTTP_11,
        Some(b"HTTP/1.0 ") => Version::HTTP_10,
        _ => return Err(CodecError::CODEC),
    };
    let (digits, rest) = line[9..].split_at_checked(3).ok_or(CodecError::CODEC)?;
    if !rest.is_empty() && rest[0] != b' ' {
        return Err(CodecError::CODEC);
    }
    if rest.iter().any(|&byte| !is_text(byte)) {
        return Err(CodecError::INVALID_CHARACTERS);
    }
    let status = StatusCode::from_bytes(digits).map_err(|_| CodecError::CODEC)?;
    Ok((status, version))
}

/// What may stand in a field's value, a reason or a chunk's extension.
pub(super) fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// The lengths that a head tells.
#[derive(Default)]
struct Told {
    length: Option<u64>,
    lengths: usize,
    chunked: bool,
    codings: usize,
    hosts: usize,
}

impl Told {
    fn framing(&self, otherwise: Framing) -> Result<Framing> {
        match (self.lengths, self.codings) {
            (0, 0) => Ok(otherwise),
            (1, 0) => self.length.map(Framing::Length).ok_or(CodecError::CODEC),
            (0, 1) if self.chunked => Ok(Framing::Chunked),
            (0, _) => Err(CodecError::TRANSFER_ENCODING),
            (_, 0) => Err(CodecError::CODEC),
            (_, _) => Err(CodecError::LENGTH_AND_CHUNKED),
        }
    }
}

/// The fields of `head` from `at` on, up to its empty line.
fn fields(head: &Bytes, mut at: usize, limit: usize) -> Result<(HeaderMap, Told)> {
    let (mut headers, mut told) = (buffers::headers(), Told::default());
    let end = head.len() - 2;
    while at < end {
        let line_end = at + memchr(b'\n', &head[at..end]).ok_or(CodecError::CODEC)?;
        if line_end == at || head[line_end - 1] != b'\r' {
            return Err(CodecError::CODEC);
        }
        if headers.len() == limit {
            return Err(CodecError::TOO_MANY_HEADERS);
        }
        let (name, value) = field(head, at, line_end - 1)?;
        if name == CONTENT_LENGTH {
            told.lengths += 1;
            told.length = length(value.as_bytes());
        } else if name == TRANSFER_ENCODING {
            told.codings += 1;
            told.chunked = value.as_bytes().eq_ignore_ascii_case(b"chunked");
        } else if name == HOST {
            told.hosts += 1;
        }
        // The map has a limit of its own, which a configuration may be above.
        headers.try_append(name, value).map_err(|_| CodecError::TOO_MANY_HEADERS)?;
        at = line_end + 1;
    }
    Ok((headers, told))
}

/// One field, in `head[start..end]`.
fn field(head: &Bytes, start: usize, end: usize) -> Result<(HeaderName, HeaderValue)> {
    let colon = start + memchr(b':', &head[start..end]).ok_or(CodecError::CODEC)?;
    let name = &head[start..colon];
    let name = HeaderName::from_bytes(name).map_err(|_| match name.contains(&0) {
        true => CodecError::INVALID_CHARACTERS,
        false => CodecError::CODEC,
    })?;
    let (mut from, mut to) = (colon + 1, end);
    while from < to && matches!(head[from], b' ' | b'\t') {
        from += 1;
    }
    while to > from && matches!(head[to - 1], b' ' | b'\t') {
        to -= 1;
    }
    let value = HeaderValue::from_maybe_shared(head.slice(from..to)).map_err(|_| CodecError::INVALID_CHARACTERS)?;
    Ok((name, value))
}

/// Digits only: no sign, no list.
pub(super) fn length(value: &[u8]) -> Option<u64> {
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Reads a request's head, as [`Scanner::take`] has found it.
///
/// # Errors
/// Why it is refused.
pub fn request(head: &Bytes, limits: Limits, options: &Http1Options) -> Result<RequestHead> {
    let line_end = memchr(b'\n', head).filter(|&end| end > 0 && head[end - 1] == b'\r').ok_or(CodecError::CODEC)?;
    let RequestLine { method, target, version } = request_line(&head[..line_end - 1], limits)?;
    let target = 1 + method.as_str().len()..1 + method.as_str().len() + target.len();
    let (mut headers, told) = fields(head, line_end + 1, limits.headers)?;
    if version != Version::HTTP_11 && !options.accept_http_10 {
        return Err(CodecError::LOW_VERSION);
    }
    let framing = told.framing(Framing::None)?;
    if version != Version::HTTP_11 && told.codings > 0 {
        return Err(CodecError::TRANSFER_ENCODING);
    }
    if told.hosts > 1 {
        return Err(CodecError::DUPLICATE_HOST);
    }
    let (uri, target) = uri(head, target, &method, &mut headers, options.refuses_absolute_url)?;
    if headers.first(&HOST).is_some_and(|host| !host.as_bytes().iter().all(|&byte| is_authority(byte))) {
        return Err(CodecError::AUTHORITY);
    }
    let (mut parts, ()) = http::Request::new(()).into_parts();
    (parts.method, parts.uri, parts.version, parts.headers) = (method, uri, version, headers);
    Ok(RequestHead { parts, framing, target })
}

fn is_authority(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@[]%".contains(&byte)
}

/// Whether this stands for a server in a URL: a name or an address, and perhaps a port. More may stand in `host`, as in Envoy.
fn is_host_of_url(host: &[u8]) -> bool {
    let Ok(host) = std::str::from_utf8(host) else { return false };
    let (is_host, port) = match host.strip_prefix('[').and_then(|host| host.split_once(']')) {
        Some((address, rest)) => (address.parse::<Ipv6Addr>().is_ok(), rest),
        None => {
            let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
            let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.');
            (!name.is_empty() && name.bytes().all(is_name), port)
        }
    };
    let is_port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok();
    is_host && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

/// The target as a path; an absolute target's host becomes the request's.
fn uri(
    head: &Bytes,
    target: std::ops::Range<usize>,
    method: &Method,
    headers: &mut HeaderMap,
    relative_only: bool,
) -> Result<(Uri, Target)> {
    let text = &head[target.clone()];
    if text.iter().any(|&byte| matches!(byte, 0 | 0x0b | 0x7f)) {
        return Err(CodecError::INVALID_CHARACTERS);
    }
    if *method == Method::CONNECT {
        let authority = http::uri::Authority::try_from(text).map_err(|_| CodecError::URL)?;
        if authority.port_u16().is_none() || authority.as_str().contains('@') {
            return Err(CodecError::URL);
        }
        return Ok((Uri::from(authority), Target::Authority));
    }
    let from = if text[0] == b'/' {
        target.start
    } else if text == b"*" {
        return if *method == Method::OPTIONS {
            Ok((Uri::from_static("*"), Target::NoPath))
        } else {
            Err(CodecError::URL)
        };
    } else {
        let Some(colon) = memmem::find(text, b"://") else { return Err(CodecError::CODEC) };
        if !text[..colon].eq_ignore_ascii_case(b"http") && !text[..colon].eq_ignore_ascii_case(b"https") {
            return Err(CodecError::SCHEME);
        }
        let rest = &text[colon + 3..];
        let end = rest.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(rest.len());
        // Whoever is named before the host is no part of it.
        let host = rest[..end].rsplit(|&byte| byte == b'@').next().unwrap_or_default();
        if !is_host_of_url(host) {
            return Err(CodecError::URL);
        }
        if relative_only {
            return Ok((Uri::from(PathAndQuery::from_static("/")), Target::NoPath));
        }
        headers.insert(HOST, HeaderValue::from_bytes(host).map_err(|_| CodecError::URL)?);
        match rest.get(end) {
            None => return Ok((Uri::from(PathAndQuery::from_static("/")), Target::Path)),
            Some(b'/') => target.start + colon + 3 + end,
            Some(_) => return Ok((Uri::from(PathAndQuery::from_static("/")), Target::NoPath)),
        }
    };
    let path = head.slice(from..target.end);
    if !path.iter().all(|byte| (b'!'..=b'~').contains(byte)) {
        return Err(CodecError::CODEC);
    }
    let kind = if memchr(b'#', &path).is_some() { Target::Fragment } else { Target::Path };
    let path = PathAndQuery::from_maybe_shared(path).or_else(|_| {
        // All of them are graphic characters, but some may not stand there.
        let text = std::str::from_utf8(&head[from..target.end]).map_err(|_| CodecError::CODEC)?;
        path_and_query(text).map_err(|_| CodecError::CODEC)
    })?;
    Ok((Uri::from(path), kind))
}

/// Reads a response's head, as [`Scanner::take`] has found it.
///
/// # Errors
/// Why it is refused.
pub fn response(head: &Bytes, limits: Limits) -> Result<ResponseHead> {
    let line_end = memchr(b'\n', head).filter(|&end| end > 0 && head[end - 1] == b'\r').ok_or(CodecError::CODEC)?;
    let (status, version) = status_line(&head[..line_end - 1])?;
    let (mut headers, told) = fields(head, line_end + 1, limits.headers)?;
    let told = told.framing(Framing::UntilClose)?;
    if status.is_informational() || status == StatusCode::NO_CONTENT {
        // RFC 9112, section 6: neither belongs there, and another reader may wait for a body. A length of 0 does no harm.
        match told {
            Framing::Length(1..) => return Err(CodecError::CODEC),
            Framing::Chunked => return Err(CodecError::TRANSFER_ENCODING),
            Framing::Length(0) => drop(headers.remove(CONTENT_LENGTH)),
            Framing::UntilClose | Framing::None => {}
        }
    }
    if told == Framing::Chunked && version != Version::HTTP_11 {
        return Err(CodecError::TRANSFER_ENCODING);
    }
    let (mut parts, ()) = http::Response::new(()).into_parts();
    (parts.status, parts.version, parts.headers) = (status, version, headers);
    Ok(ResponseHead { parts, told })
}

/// How the body of the response to a request is framed (RFC 9112, section 6.3).
pub fn response_framing(told: Framing, status: StatusCode, to_head: bool) -> Framing {
    let none = to_head || status.is_informational() || matches!(status.as_u16(), 204 | 304);
    if none { Framing::None } else { told }
}

/// Reads the fields of a trailer section, which ends with an empty line.
///
/// # Errors
/// Why it is refused.
pub fn trailers(section: &Bytes, limits: Limits) -> Result<HeaderMap> {
    if section.len() == 2 {
        return Ok(HeaderMap::new());
    }
    fields(section, 0, limits.headers).map(|(headers, _)| headers)
}

#[cfg(test)]
#[path = "head_tests.rs"]
mod tests;
