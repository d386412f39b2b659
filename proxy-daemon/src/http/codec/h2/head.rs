//! Requests' heads, where RFC 9113 asks for more than the crate does.

use h2::{Reason, ext::Protocol};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, TE, TRANSFER_ENCODING, UPGRADE},
    request::Parts,
};

use crate::{
    config::model::{HttpConnectionManagerConfig, Underscores},
    http::{codec::h1::Upgrade, look::Look as _},
};

/// Why a stream is reset instead of answered: how its client is told, and Envoy's word for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::http::codec) struct Malformed {
    pub(super) reason: Reason,
    pub(super) details: &'static str,
}

const MESSAGE: Malformed = Malformed { reason: Reason::PROTOCOL_ERROR, details: "http2.violation.of.messaging.rule" };
const TOO_MANY: Malformed = Malformed { reason: Reason::INTERNAL_ERROR, details: "http2.too_many_headers" };
const TOO_LARGE: Malformed = Malformed { reason: Reason::INTERNAL_ERROR, details: "http2.headers_too_large" };
pub(super) const UNDERSCORE: Malformed =
    Malformed { reason: Reason::INTERNAL_ERROR, details: "http2.unexpected_underscore" };

/// `:method`, `:scheme`, `:path` and `:authority` count as headers.
const PSEUDO_HEADERS: usize = 4;

/// Refuses a head that is malformed, or too large, or that two servers could read differently; else makes of it what it would be in
/// HTTP/1.1.
pub(in crate::http::codec) fn settle(head: &mut Parts, config: &HttpConnectionManagerConfig) -> Result<(), Malformed> {
    let Parts { method, uri, headers, .. } = head;
    let connects = *method == Method::CONNECT;
    if let Some(authority) = uri.authority() {
        // RFC 9113, section 8.3.1: without the userinfo that URIs once had.
        if authority.as_str().is_empty() || authority.as_str().contains('@') || uri.scheme_str() == Some("") {
            return Err(MESSAGE);
        }
        // It says the same, or is not to be believed.
        headers.take(&HOST);
    } else if connects || headers.get_all(HOST).iter().count() != 1 {
        return Err(MESSAGE);
    }
    // The type calls a path without anything before its query `/`, and hosts would get what is there.
    let path = uri.path_and_query().map(|path| path.as_str());
    let is_path = |path: &str| path.starts_with('/') || path == "*" && *method == Method::OPTIONS;
    if !path.map_or(connects, is_path) {
        return Err(MESSAGE);
    }
    if headers.repeats(&CONTENT_LENGTH) {
        return Err(MESSAGE);
    }
    if headers.len() + PSEUDO_HEADERS > config.max_headers_count as usize {
        return Err(TOO_MANY);
    }
    let fields: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    if fields + path.map_or(0, str::len) > config.max_request_headers_kb as usize * 1024 {
        return Err(TOO_LARGE);
    }
    if config.rules.underscores == Underscores::Reject && headers.keys().any(|name| name.as_str().contains('_')) {
        return Err(UNDERSCORE);
    }
    join_cookies(headers);
    Ok(())
}

/// A request for another protocol becomes what it is in HTTP/1.1 (RFC 8441): that is how it is routed, and what it is allowed by.
pub(in crate::http::codec) fn downgrade(head: &mut Parts) {
    if head.method != Method::CONNECT {
        return;
    }
    head.extensions.insert(Upgrade);
    let protocol = head.extensions.remove::<Protocol>();
    if let Some(protocol) = protocol.and_then(|protocol| HeaderValue::from_str(protocol.as_str()).ok()) {
        head.method = Method::GET;
        head.headers.insert(UPGRADE, protocol);
        head.headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    }
}

/// RFC 9113, section 8.2.3: crumbs are one field again where they go on by HTTP/1.1.
fn join_cookies(headers: &mut HeaderMap) {
    if !headers.repeats(&COOKIE) {
        return;
    }
    let crumbs: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    // Valid values and separators make a valid value.
    if let Ok(joined) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        headers.insert(COOKIE, joined);
    }
}

/// Whether trailers say what only a head may say: of the message's length, or of where it goes.
pub(super) fn is_trailer(trailers: &HeaderMap) -> bool {
    const OF_HEADS: [HeaderName; 4] = [CONTENT_LENGTH, TRANSFER_ENCODING, HOST, TE];
    !OF_HEADS.iter().any(|name| trailers.has(name))
}

#[cfg(test)]
mod tests {
    use http::{Request, Uri};

    use super::*;

    #[test]
    fn what_has_no_path_before_its_query_is_malformed() {
        for (method, path, good) in [
            ("GET", "/a?b", true),
            ("GET", "?b", false),
            ("GET", "*", false),
            ("OPTIONS", "*", true),
            ("OPTIONS", "?b", false),
            ("CONNECT", "/a", true),
            ("CONNECT", "?b", false),
        ] {
            let uri = Uri::builder().scheme("http").authority("a").path_and_query(path).build().unwrap();
            let (mut head, ()) = Request::builder().method(method).uri(uri).body(()).unwrap().into_parts();
            let settled = settle(&mut head, &HttpConnectionManagerConfig::default());
            assert_eq!(settled, if good { Ok(()) } else { Err(MESSAGE) }, "{method} {path}");
        }
        let (mut tunnel, ()) = Request::connect("a:80").body(()).unwrap().into_parts();
        assert_eq!(settle(&mut tunnel, &HttpConnectionManagerConfig::default()), Ok(()));
    }
}
