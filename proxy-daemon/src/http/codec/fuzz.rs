//! What the fuzzers call: bytes in, and nothing may panic, hang or read beyond what there is. `fuzz/` gives them to libFuzzer;
//! `tests/mutations.rs` runs them on mutations of examples.

use bytes::BytesMut;

use http::{
    HeaderName, HeaderValue, Method, Request, Uri,
    header::{CONTENT_LENGTH, COOKIE, HOST},
    request::Parts,
};

use super::{
    h1::{self, Decoder, Framing, Item, Kind, Limits, Scanner},
    h2::{self, head, scrub, watch},
};
use crate::config::model::Http1Options;
use crate::config::model::HttpConnectionManagerConfig;

const LIMITS: Limits = Limits { bytes: 4096, headers: 32, any_method: false };

/// A head that arrives whole, and the same one byte at a time: whether it is taken must not depend on that, and a head that is
/// accepted has been read in one way only.
fn head(bytes: &[u8], kind: Kind) -> Option<bytes::Bytes> {
    let mut whole = BytesMut::from(bytes);
    let taken = Scanner::default().take(&mut whole, kind, LIMITS);
    let (mut scanner, mut buffer) = (Scanner::default(), BytesMut::new());
    let mut dripped = Ok(None);
    for byte in bytes {
        buffer.extend_from_slice(&[*byte]);
        dripped = scanner.take(&mut buffer, kind, LIMITS);
        if !matches!(dripped, Ok(None)) {
            break;
        }
    }
    let taken = taken.ok().flatten()?;
    // What comes in pieces may be refused earlier, but is never read differently.
    if let Ok(Some(dripped)) = dripped {
        assert_eq!(taken, dripped);
    }
    Some(taken)
}

/// A request's head.
pub fn request_head(bytes: &[u8]) {
    let Some(head) = head(bytes, Kind::Request) else { return };
    let options = Http1Options { accept_http_10: true, ..Http1Options::default() };
    if let Ok(request) = h1::request(&head, LIMITS, &options) {
        assert!(request.parts.headers.get_all("host").iter().count() <= 1);
        assert!(request.framing != Framing::UntilClose);
        assert!(!head[..head.len() - 4].windows(2).any(|pair| pair[1] == b'\n' && pair[0] != b'\r'));
    }
}

/// A response's head.
pub fn response_head(bytes: &[u8]) {
    let Some(head) = head(bytes, Kind::Response) else { return };
    let _ = h1::response(&head, LIMITS);
}

/// A chunked body: whole and one byte at a time it must come to the same.
pub fn chunks(bytes: &[u8]) {
    let whole = decode(bytes, bytes.len().max(1));
    let dripped = decode(bytes, 1);
    assert_eq!(whole, dripped);
}

/// The body as far as it came, and whether it ended (or failed: none).
fn decode(bytes: &[u8], step: usize) -> Option<(Vec<u8>, bool)> {
    let (mut decoder, mut buffer, mut body) = (Decoder::new(Framing::Chunked), BytesMut::new(), Vec::new());
    for piece in bytes.chunks(step) {
        buffer.extend_from_slice(piece);
        loop {
            match decoder.decode(&mut buffer, LIMITS) {
                Ok(Some(Item::Data(data))) => body.extend_from_slice(&data),
                Ok(Some(Item::End(_))) => return Some((body, true)),
                Ok(None) => break,
                Err(_) => return None,
            }
        }
    }
    Some((body, false))
}

/// Frames, whole and in pieces: the same ones are found, and the same is made of their header blocks.
pub fn http2_frames(bytes: &[u8]) {
    let whole = watch::frames(bytes, bytes.len().max(1));
    let scrubbed = scrub::scrubbed(bytes, bytes.len().max(1));
    for size in [1, 7, 9, 10] {
        assert_eq!(watch::frames(bytes, size), whole, "in pieces of {size}");
        assert_eq!(scrub::scrubbed(bytes, size), scrubbed, "in pieces of {size}");
    }
}

/// Header blocks of HTTP/2, as the crate `h2` gets them.
pub fn http2_blocks(bytes: &[u8]) {
    h2::fuzz::blocks(bytes);
}

/// A head that is made of a line with the method, one with the URI, and one for each field.
pub(in crate::http) fn head_of(bytes: &[u8]) -> Option<Parts> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    let (method, uri) = (lines.next()?, lines.next()?);
    let (mut parts, ()) = Request::new(()).into_parts();
    (parts.method, parts.uri) = (Method::from_bytes(method).ok()?, Uri::try_from(uri).ok()?);
    for line in lines {
        let mut halves = line.splitn(2, |byte| *byte == b':');
        let name = halves.next().and_then(|name| HeaderName::from_bytes(name).ok());
        let value = halves.next().and_then(|value| HeaderValue::from_bytes(value).ok());
        if let (Some(name), Some(value)) = (name, value) {
            parts.headers.append(name, value);
        }
    }
    Some(parts)
}

/// A head as HTTP/2 has it. What is taken has one host, one length and one cookie, and a path or none.
pub fn http2_head(bytes: &[u8]) {
    let Some(mut parts) = head_of(bytes) else { return };
    if head::settle(&mut parts, &HttpConnectionManagerConfig::default()).is_err() {
        return;
    }
    let count = |name| parts.headers.get_all(name).iter().count();
    assert_eq!(count(HOST) + usize::from(parts.uri.authority().is_some()), 1);
    assert!(count(CONTENT_LENGTH) <= 1 && count(COOKIE) <= 1);
    let target = parts.uri.path_and_query().map_or("", |path| path.as_str());
    let none = if parts.method == Method::CONNECT { "" } else { "*" };
    assert!(target.starts_with('/') || target == none && matches!(parts.method, Method::CONNECT | Method::OPTIONS));
    head::downgrade(&mut parts);
}
