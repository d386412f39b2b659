//! What the fuzzers call: bytes in, and nothing may panic or take long, and what comes out must hold. `fuzz/` gives them to libFuzzer;
//! `tests/mutations.rs` runs them on mutations of examples.

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};

use super::{
    MatchCx, RouteTable, filters, headers, normal,
    redirect::{rewrite_path, rewrite_prefix},
};
use crate::{
    access_log::{HeaderFormat, Headers, Record},
    config::{
        self,
        model::{HttpConnectionManagerConfig, PathMatch, PathRewrite},
    },
};

/// A JSON Web Token, and the keys that it may be signed by.
pub fn token(bytes: &[u8]) {
    filters::fuzz_token(bytes);
}

/// The messages of a gRPC body.
pub fn grpc_messages(bytes: &[u8]) {
    filters::fuzz_grpc_messages(bytes);
}

/// A path as a connection manager makes it a normal one; the first byte says how it is configured. What is normal stays as it is, and
/// nothing is left of what servers could read differently.
pub fn path(bytes: &[u8]) {
    let Some((options, path)) = bytes.split_first() else { return };
    let Ok(uri) = Uri::try_from(path) else { return };
    let config = HttpConnectionManagerConfig {
        normalize_path: options & 1 != 0,
        merge_slashes: options & 2 != 0,
        ..HttpConnectionManagerConfig::default()
    };
    let (mut head, ()) = Request::new(()).into_parts();
    head.uri = uri;
    let query = head.uri.query().map(str::to_owned);
    headers::normalize(&mut head, &config);
    let once = head.uri.clone();
    headers::normalize(&mut head, &config);
    assert_eq!(head.uri, once);
    assert_eq!(once.query(), query.as_deref());
    let path = once.path();
    if path.starts_with('/') && config.normalize_path {
        assert!(!path.contains('\\'), "{path}");
        assert!(!path.split('/').any(|segment| matches!(segment, "." | "..")), "{path}");
    }
    if path.starts_with('/') && config.merge_slashes {
        assert!(!path.contains("//"), "{path}");
    }
    if let Some(unescaped) = normal::unescaped(path) {
        assert!(unescaped.len() < path.len());
    }
    let prefix = PathMatch::Prefix(path.get(..path.len() / 2).unwrap_or_default().into());
    assert!(rewrite_prefix(path, &prefix, "/x").starts_with("/x"));
}

/// Three lines: a template that paths match, one that they become, and a path.
pub fn uri_template(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let mut lines = text.splitn(3, '\n');
    let (Some(matched), Some(rewrite), Some(path)) = (lines.next(), lines.next(), lines.next()) else { return };
    let Ok((matched, pieces)) = config::fuzz::uri_templates(matched, rewrite) else { return };
    let matches = PathMatch::Template(matched.clone());
    let rewritten = rewrite_path(path, &matches, &PathRewrite::Template(pieces));
    assert_eq!(rewritten.is_some(), matched.is_match(path));
    if let Some(rewritten) = rewritten {
        assert!(rewritten.starts_with('/'), "{rewritten}");
    }
}

/// A route configuration in JSON and, behind an empty line, a request: its method, its target and its headers, a line each. The route
/// that an index finds is the first of all that match.
pub fn routes(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (config, request) = text.split_once("\n\n").unwrap_or((text, ""));
    let mut lines = request.split('\n');
    let mut request = Request::builder().method(lines.next().unwrap_or_default()).uri(lines.next().unwrap_or("/"));
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        request = request.header(name, value);
    }
    let Ok(request) = request.body(()) else { return };
    let Some(config) = config::fuzz::routes(config) else { return };
    let table = RouteTable::new(Arc::new(config));
    let (head, ()) = request.into_parts();
    for random in [0, u64::MAX / 3] {
        let cx = MatchCx { random, ..MatchCx::default() };
        assert_eq!(table.find(&head, &cx), table.find_slowly(&head, &cx), "{head:?}");
    }
}

/// A format of a header's value and, behind the first line, a header that it may name.
pub fn header_format(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let (format, value) = text.split_once('\n').unwrap_or((text, ""));
    let Ok(Ok(format)) = HeaderFormat::parse(format) else { return };
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static("x-a"), value);
    }
    let record = Record {
        missing: "",
        request_headers: Some(Headers::All(&headers)),
        response_headers: Some(Headers::All(&headers)),
        path: Some(value),
        ..Record::default()
    };
    if let Some(made) = format.value(&record) {
        assert!(!made.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)));
    }
}
