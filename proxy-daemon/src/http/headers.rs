//! What the connection manager does to headers, by the rules of facts such as trust and hop-by-hop (RFC 9110, 7.6.1).

use std::net::{IpAddr, SocketAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_TYPE, HOST, SERVER, TE, TRANSFER_ENCODING, UPGRADE, VIA},
    uri::PathAndQuery,
};

use super::{
    request_id,
    stream::{LocalReply, RequestHead, ResponseHead},
};
use crate::{
    access_log::{Record, ResponseFlags},
    config::model::{
        AddedValue, ForwardClientCert, HeaderAdd, HeaderAppendAction, HeaderMutations, HttpConnectionManagerConfig,
        ServerHeaderTransformation,
    },
    tls::TlsInfo,
};

/// Header names that have no constant in `http`.
pub(crate) mod names {
    use http::HeaderName;

    macro_rules! names {
        ($($ident:ident = $text:literal)*) => { $(pub(crate) const $ident: HeaderName = HeaderName::from_static($text);)* };
    }
    names! {
        KEEP_ALIVE = "keep-alive"
        PROXY_CONNECTION = "proxy-connection"
        X_FORWARDED_FOR = "x-forwarded-for"
        X_FORWARDED_CLIENT_CERT = "x-forwarded-client-cert"
        X_FORWARDED_HOST = "x-forwarded-host"
        X_FORWARDED_PORT = "x-forwarded-port"
        X_FORWARDED_PROTO = "x-forwarded-proto"
        X_REQUEST_ID = "x-request-id"
        X_ENVOY_INTERNAL = "x-envoy-internal"
        X_ENVOY_EXTERNAL_ADDRESS = "x-envoy-external-address"
        X_ENVOY_EXPECTED_RQ_TIMEOUT_MS = "x-envoy-expected-rq-timeout-ms"
        X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS = "x-envoy-upstream-rq-timeout-ms"
        X_ENVOY_UPSTREAM_SERVICE_TIME = "x-envoy-upstream-service-time"
        X_ENVOY_ORIGINAL_HOST = "x-envoy-original-host"
        X_ENVOY_ORIGINAL_PATH = "x-envoy-original-path"
        X_ENVOY_ATTEMPT_COUNT = "x-envoy-attempt-count"
        X_ENVOY_OVERLOADED = "x-envoy-overloaded"
        X_ENVOY_ORIGINAL_DST_HOST = "x-envoy-original-dst-host"
        X_ENVOY_RETRY_ON = "x-envoy-retry-on"
        X_ENVOY_RETRY_GRPC_ON = "x-envoy-retry-grpc-on"
        X_ENVOY_MAX_RETRIES = "x-envoy-max-retries"
        X_ENVOY_RETRIABLE_STATUS_CODES = "x-envoy-retriable-status-codes"
        X_ENVOY_RETRIABLE_HEADER_NAMES = "x-envoy-retriable-header-names"
        X_ENVOY_HEDGE_ON_PER_TRY_TIMEOUT = "x-envoy-hedge-on-per-try-timeout"
        X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS = "x-envoy-upstream-rq-per-try-timeout-ms"
        X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE = "x-envoy-upstream-rq-timeout-alt-response"
        X_ENVOY_IS_TIMEOUT_RETRY = "x-envoy-is-timeout-retry"
        X_ENVOY_RATELIMITED = "x-envoy-ratelimited"
        GRPC_STATUS = "grpc-status"
        GRPC_TIMEOUT = "grpc-timeout"
        GRPC_MESSAGE = "grpc-message"
    }
}
use names::*;

/// Obeyed from internal clients only, and removed from all others.
const INTERNAL_ONLY: [&str; 15] = [
    "x-envoy-internal",
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-max-retries",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-force-trace",
    "x-envoy-ip-tags",
    "x-envoy-original-url",
    "x-envoy-hedge-on-per-try-timeout",
];

/// Removed from requests that enter the mesh.
const EDGE_ONLY: [&str; 3] =
    ["x-envoy-decorator-operation", "x-envoy-downstream-service-cluster", "x-envoy-downstream-service-node"];

/// Whether a message carries gRPC.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(CONTENT_TYPE) else { return false };
    let rest = value.as_bytes().strip_prefix(b"application/grpc");
    rest.is_some_and(|rest| rest.is_empty() || rest[0] == b'+')
}

/// Refuses what two parsers could read differently, and what this proxy does not do. `refused`: the codec has done so.
pub(super) fn check_request(
    head: &RequestHead,
    max_headers: u32,
    refused: Option<LocalReply>,
) -> Result<(), LocalReply> {
    let none = ResponseFlags::default();
    if head.headers.len() > max_headers as usize {
        let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        return Err(LocalReply::new(status, "", ResponseFlags::DPE, "too_many_headers"));
    }
    if head.version == Version::HTTP_2 {
        return if head.method == Method::CONNECT { Err(no_route()) } else { Ok(()) };
    }
    let mut reply = if head.method == Method::CONNECT {
        no_route()
    } else if !head.headers.contains_key(HOST) || connection_nominates(&head.headers, "host") {
        LocalReply::new(StatusCode::BAD_REQUEST, "", none, "missing_host_header")
    } else if let Some(refused) = refused {
        return Err(refused);
    } else {
        return Ok(());
    };
    // What follows may not be HTTP.
    reply.headers.push((CONNECTION, HeaderValue::from_static("close")));
    Err(reply)
}

fn no_route() -> LocalReply {
    LocalReply::new(StatusCode::NOT_FOUND, "", ResponseFlags::NR, "route_not_found")
}

/// Whether a client asks for another protocol. An offer of HTTP/2 is passed over, as RFC 9113 lets a server do.
pub(super) fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|to| !to.as_bytes().eq_ignore_ascii_case(b"h2c"))
        && connection_nominates(headers, "upgrade")
}

fn connection_nominates(headers: &HeaderMap, token: &str) -> bool {
    let values = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|nominated| nominated.trim().eq_ignore_ascii_case(token))
}

/// What trust made of a request.
pub(super) struct Trusted {
    pub(super) remote: SocketAddr,
    pub(super) internal: bool,
}

/// Makes a client's request fit to be routed: hop-by-hop headers, trust, request id, path.
pub(super) fn prepare_request(
    head: &mut RequestHead,
    config: &HttpConnectionManagerConfig,
    peer: SocketAddr,
    local_ip: IpAddr,
    tls: Option<&TlsInfo>,
) -> Trusted {
    strip_hop_by_hop(&mut head.headers);
    let trusted = resolve_client(head, config, peer, local_ip);
    let headers = &mut head.headers;
    let scheme = HeaderValue::from_static(if tls.is_some() { "https" } else { "http" });
    forward_client_cert(headers, config, tls);
    if config.use_remote_address && config.xff_num_trusted_hops == 0 {
        headers.insert(X_FORWARDED_PROTO, scheme);
    } else {
        headers.entry(X_FORWARDED_PROTO).or_insert(scheme);
    }
    let edge = config.use_remote_address && !trusted.internal;
    if !trusted.internal && headers.keys().any(is_envoys) {
        INTERNAL_ONLY.iter().for_each(|name| drop(headers.remove(*name)));
        if edge {
            EDGE_ONLY.iter().for_each(|name| drop(headers.remove(*name)));
        }
    }
    if trusted.internal {
        headers.insert(X_ENVOY_INTERNAL, HeaderValue::from_static("true"));
    }
    if edge {
        if let Ok(value) = HeaderValue::from_str(&trusted.remote.ip().to_string()) {
            headers.insert(X_ENVOY_EXTERNAL_ADDRESS, value);
        }
        if !config.preserve_external_request_id {
            headers.remove(X_REQUEST_ID);
        }
    }
    if config.generate_request_id && !headers.contains_key(X_REQUEST_ID) {
        headers.insert(X_REQUEST_ID, request_id::generate());
    }
    if let Some(via) = &config.via {
        append(headers, VIA, via, ", ");
    }
    if config.normalize_path || config.merge_slashes {
        normalize(head, config);
    }
    trusted
}

/// What a client says of its certificate is no proof of one: it is passed on, or written, only as configured.
fn forward_client_cert(headers: &mut HeaderMap, config: &HttpConnectionManagerConfig, tls: Option<&TlsInfo>) {
    let mode = config.forward_client_cert;
    if mode == ForwardClientCert::AlwaysForwardOnly {
        return;
    }
    let tls = match tls.filter(|tls| mode != ForwardClientCert::Sanitize && tls.has_certificate()) {
        Some(_) if mode == ForwardClientCert::ForwardOnly => return,
        Some(tls) => tls,
        None => return drop(headers.remove(X_FORWARDED_CLIENT_CERT)),
    };
    match tls.forwarded(&config.client_cert_details) {
        Some(value) if mode == ForwardClientCert::AppendForward => {
            // Of several lines one is made, as in Envoy.
            let lines = headers.get_all(X_FORWARDED_CLIENT_CERT).into_iter().chain([value]);
            let lines: Vec<_> = lines.map(HeaderValue::as_bytes).filter(|line| !line.is_empty()).collect();
            if let Ok(all) = HeaderValue::from_bytes(&lines.join(&b","[..])) {
                headers.insert(X_FORWARDED_CLIENT_CERT, all);
            }
        }
        Some(value) => drop(headers.insert(X_FORWARDED_CLIENT_CERT, value.clone())),
        None => drop(headers.remove(X_FORWARDED_CLIENT_CERT)),
    }
}

/// Finds the client's address and whether it is internal, and appends to `x-forwarded-for`.
fn resolve_client(
    head: &mut RequestHead,
    config: &HttpConnectionManagerConfig,
    peer: SocketAddr,
    local_ip: IpAddr,
) -> Trusted {
    let hops = config.xff_num_trusted_hops as usize;
    let (mut remote, single);
    if config.use_remote_address {
        single = !head.headers.contains_key(X_FORWARDED_FOR);
        remote = peer;
        if hops > 0 {
            remote = forwarded_for(&head.headers, hops - 1).unwrap_or(peer);
        }
        if !config.skip_xff_append {
            // Envoy writes a loopback client as the node's own address.
            let ip = if peer.ip().is_loopback() { local_ip } else { peer.ip() };
            if let Ok(value) = HeaderValue::from_str(&ip.to_string()) {
                append(&mut head.headers, X_FORWARDED_FOR, &value, ",");
            }
        }
    } else {
        single = has_single_forwarded_for(&head.headers);
        remote = forwarded_for(&head.headers, hops).unwrap_or(peer);
    }
    let ip = remote.ip().to_canonical();
    let internal = single && config.internal_ranges.iter().any(|range| range.contains(ip));
    Trusted { remote, internal }
}

/// The `x-forwarded-for` address that stands `skip` places from the right.
fn forwarded_for(headers: &HeaderMap, skip: usize) -> Option<SocketAddr> {
    let value = headers.get_all(X_FORWARDED_FOR).iter().next_back()?.to_str().ok()?;
    let ip: IpAddr = value.rsplit(',').nth(skip)?.trim().parse().ok()?;
    Some(SocketAddr::new(ip, 0))
}

fn has_single_forwarded_for(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(X_FORWARDED_FOR).iter();
    matches!((values.next(), values.next()), (Some(only), None) if !only.as_bytes().contains(&b','))
}

pub(super) fn append(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue, separator: &str) {
    let joined = headers.get(&name).map(|before| [before.as_bytes(), separator.as_bytes(), value.as_bytes()].concat());
    let value = match joined {
        // Two valid values and a separator make a valid value.
        Some(bytes) => HeaderValue::from_bytes(&bytes).unwrap_or_else(|_| value.clone()),
        None => value.clone(),
    };
    headers.insert(name, value);
}

/// One look at the few names that there are is cheaper than a look-up of each name that might be there.
fn is_envoys(name: &HeaderName) -> bool {
    name.as_str().starts_with("x-envoy-")
}

fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(name.as_str(), "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" | "te")
}

/// Removes what concerns one connection only, including what `connection` nominates.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if !headers.keys().any(is_hop_by_hop) {
        return;
    }
    if let Some(connection) = headers.remove(CONNECTION) {
        for nominated in connection.to_str().unwrap_or_default().split(',').map(str::trim) {
            // A client must not be able to remove the headers that routing and trust rest on.
            let plain = !matches!(nominated, "" | "close" | "keep-alive" | "te");
            if plain && !nominated.starts_with("x-forwarded") && !nominated.starts_with("x-envoy") {
                headers.remove(nominated);
            }
        }
    }
    headers.remove(KEEP_ALIVE);
    headers.remove(PROXY_CONNECTION);
    headers.remove(TRANSFER_ENCODING);
    headers.remove(UPGRADE);
    if headers.get(TE).is_some_and(|te| te != "trailers") {
        headers.remove(TE);
    }
}

/// Resolves dot segments (RFC 3986, 5.2.4) and joins slashes, as configured.
pub(super) fn normalize(head: &mut RequestHead, config: &HttpConnectionManagerConfig) {
    let path = head.uri.path();
    if !path.starts_with('/') {
        return;
    }
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = path[1..].split('/').peekable();
    while let Some(segment) = parts.next() {
        let last = parts.peek().is_none();
        let dots = match segment.to_ascii_lowercase().as_str() {
            "." | "%2e" => 1,
            ".." | ".%2e" | "%2e." | "%2e%2e" => 2,
            _ => 0,
        };
        match dots {
            1 if config.normalize_path => {
                if last {
                    segments.push("");
                }
            }
            2 if config.normalize_path => {
                segments.pop();
                if last {
                    segments.push("");
                }
            }
            _ if config.merge_slashes && segment.is_empty() && !last => {}
            _ => segments.push(segment),
        }
    }
    let mut path = format!("/{}", segments.join("/"));
    if path == head.uri.path() {
        return;
    }
    if let Some(query) = head.uri.query() {
        path.push('?');
        path.push_str(query);
    }
    set_path(head, &path);
}

/// Replaces the path and the query; an impossible path leaves them as they are.
pub(super) fn set_path(head: &mut RequestHead, path_and_query: &str) {
    let Ok(path) = PathAndQuery::try_from(path_and_query) else { return };
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.path_and_query = Some(path);
    if parts.scheme.is_none() {
        parts.authority = None;
    }
    // A path with the scheme and authority of a valid URI is a valid URI.
    head.uri = Uri::from_parts(parts).unwrap_or_default();
}

/// Makes an upstream's response fit for the client.
pub(super) fn prepare_response(head: &mut ResponseHead, config: &HttpConnectionManagerConfig) {
    strip_hop_by_hop(&mut head.headers);
    match config.server_header {
        ServerHeaderTransformation::Overwrite => {
            head.headers.insert(SERVER, config.server_name.clone());
        }
        ServerHeaderTransformation::AppendIfAbsent => {
            head.headers.entry(SERVER).or_insert_with(|| config.server_name.clone());
        }
        ServerHeaderTransformation::PassThrough => {}
    }
    if let Some(via) = &config.via {
        append(&mut head.headers, VIA, via, ", ");
    }
}

/// Applies `request_headers_to_remove` and `request_headers_to_add`. `record` is what formats are filled from; it is told the
/// headers as they are at the time.
pub(crate) fn mutate_request(headers: &mut HeaderMap, mutations: &HeaderMutations, record: &Record<'_>) {
    mutations.request_remove.iter().for_each(|name| drop(headers.remove(name)));
    for add in &mutations.request_add {
        let value = match &add.value {
            AddedValue::Literal(value) => Some(value.clone()),
            AddedValue::Format(format) => format.value(&Record { request_headers: Some(headers), ..*record }),
        };
        apply(headers, add, value);
    }
}

/// Applies `response_headers_to_remove` and `response_headers_to_add`.
pub(super) fn mutate_response(headers: &mut HeaderMap, mutations: &HeaderMutations, record: &Record<'_>) {
    mutations.response_remove.iter().for_each(|name| drop(headers.remove(name)));
    for add in &mutations.response_add {
        let value = match &add.value {
            AddedValue::Literal(value) => Some(value.clone()),
            AddedValue::Format(format) => format.value(&Record { response_headers: Some(headers), ..*record }),
        };
        apply(headers, add, value);
    }
}

fn apply(headers: &mut HeaderMap, add: &HeaderAdd, value: Option<HeaderValue>) {
    // An empty value is not added, as in Envoy.
    let Some(value) = value.filter(|value| add.keep_empty_value || !value.is_empty()) else { return };
    let name = &add.name;
    match add.action {
        HeaderAppendAction::AppendIfExistsOrAdd => drop(headers.append(name, value)),
        HeaderAppendAction::AddIfAbsent if headers.contains_key(name) => {}
        HeaderAppendAction::OverwriteIfExists if !headers.contains_key(name) => {}
        _ => drop(headers.insert(name, value)),
    }
}

#[cfg(test)]
#[path = "headers_tests.rs"]
mod tests;
