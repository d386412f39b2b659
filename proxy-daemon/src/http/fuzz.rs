//! What the fuzzers call: bytes in, and nothing may panic or take long, and what comes out must hold. `fuzz/` gives them to libFuzzer;
//! `tests/mutations.rs` runs them on mutations of examples.

use std::{net::SocketAddr, sync::Arc};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, header::HOST};

use super::{
    MatchCx, RouteTable, call,
    codec::fuzz::head_of,
    filters, headers, internal_redirect, normal, path,
    redirect::{rewrite_path, rewrite_prefix},
    route_match, timeouts, trust, upstream_head,
};
use crate::{
    access_log::{HeaderFormat, Headers, Record},
    config::{
        self,
        model::{Cidr, HttpConnectionManagerConfig, IpDetection, PathMatch, PathRewrite, TrustedXff},
    },
};

/// A JSON Web Token, and the keys that it may be signed by.
pub fn token(bytes: &[u8]) {
    filters::fuzz_token(bytes);
}

/// The messages of a gRPC body, and those that a service answers with.
pub fn grpc_messages(bytes: &[u8]) {
    filters::fuzz_grpc_messages(bytes);
    call::grpc::fuzz(bytes);
}

/// A body of gRPC-Web, in base64.
pub fn grpc_web(bytes: &[u8]) {
    filters::fuzz_grpc_web(bytes);
}

/// A body that may be compressed.
pub fn compression(bytes: &[u8]) {
    filters::fuzz_compression(bytes);
}

/// What a client says its session is.
pub fn session(bytes: &[u8]) {
    filters::fuzz_session(bytes);
}

/// A client's request, as it is made fit to be routed and to be sent on: the first byte says how that is configured, then comes a line with
/// the method, one with the target, and one for each field.
pub fn request(bytes: &[u8]) {
    let Some((options, bytes)) = bytes.split_first() else { return };
    let Some(mut head) = head_of(bytes) else { return };
    let is_set = |bit: u8| options & 1 << bit != 0;
    let own = Cidr::new([10, 0, 0, 0].into(), 8);
    let trusted = TrustedXff::Ranges(own.into_iter().collect());
    let by_header = IpDetection::Header { name: HeaderName::from_static("x-ip"), trusted: is_set(4), reject: None };
    let detection = [by_header, IpDetection::Xff { trusted, append: is_set(5) }];
    let config = HttpConnectionManagerConfig {
        use_remote_address: is_set(0),
        skip_xff_append: is_set(1),
        preserve_external_request_id: is_set(2),
        ip_detection: if is_set(3) && !is_set(0) { detection.into() } else { Box::default() },
        xff_num_trusted_hops: u32::from(options >> 6),
        internal_ranges: own.into_iter().collect(),
        ..HttpConnectionManagerConfig::default()
    };
    let peer = SocketAddr::from(([10, 0, 0, 9], 4321));
    if headers::check_request(&head, 100, None).is_err() || headers::nominates_too_much(&head.headers) {
        return;
    }
    if head.method == Method::CONNECT && head.uri.authority().is_none() {
        return;
    }
    let before = head.headers.clone();
    let Ok(trusted) = trust::prepare_request(&mut head, &config, peer, peer.ip(), None) else { return };
    for name in ["connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade"] {
        assert!(!head.headers.contains_key(name), "{name}");
    }
    assert!(head.headers.get("te").is_none_or(|te| te == "trailers"));
    assert_eq!(before.contains_key(HOST), head.headers.contains_key(HOST));
    if config.use_remote_address && config.xff_num_trusted_hops == 0 {
        assert_eq!(trusted.remote, peer);
        assert_eq!(trusted.internal, !before.contains_key("x-forwarded-for"));
    }
    if !trusted.internal {
        assert!(!["x-envoy-internal", "x-envoy-retry-on"].iter().any(|name| head.headers.contains_key(*name)));
    }
    for value in head.headers.values() {
        let Ok(text) = std::str::from_utf8(value.as_bytes()) else { continue };
        if let Some(timeout) = timeouts::grpc_timeout(text) {
            let told = timeouts::to_grpc_timeout(timeout);
            assert!(told.to_str().ok().and_then(timeouts::grpc_timeout).is_some_and(|told| told <= timeout));
        }
        assert_eq!(path::decode(&path::encode(text.as_bytes(), path::is_unreserved)), text.as_bytes());
        if let Ok(path) = path::path_and_query(text) {
            assert!(path.as_str().starts_with('/') || path == "*", "{path}");
        }
        if let Some(url) = internal_redirect::absolute(value) {
            assert!(
                url.path().starts_with('/') && url.authority().is_some_and(|it| !it.as_str().contains('@')),
                "{url}"
            );
        }
    }
    let _ = route_match::cookie(&head.headers, "a");
    let called = route_match::authority(&head).to_owned();
    let is_name = http::uri::Authority::try_from(called.as_str()).is_ok();
    upstream_head::to_http2(&mut head);
    upstream_head::to_http1(&mut head);
    assert!(!is_name || route_match::authority(&head) == called, "{called:?} in {head:?}");
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
