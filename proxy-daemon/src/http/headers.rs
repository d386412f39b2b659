//! What the connection manager does to headers, by the rules of facts such as trust and hop-by-hop (RFC 9110, 7.6.1).

use std::borrow::Cow;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE, HOST, SERVER, TE, TRANSFER_ENCODING, UPGRADE, VIA},
};

use super::{
    illegal,
    look::Look as _,
    path::{percent_encode, set_path},
    stream::{LocalReply, RequestHead, ResponseHead},
};
use crate::{
    access_log::{Headers, Record, ResponseFlags},
    config::model::{
        AddedValue, HeaderAdd, HeaderAppendAction, HeaderMutations, HttpConnectionManagerConfig,
        ServerHeaderTransformation,
    },
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
        X_ENVOY_FORCE_TRACE = "x-envoy-force-trace"
        X_ENVOY_DOWNSTREAM_SERVICE_CLUSTER = "x-envoy-downstream-service-cluster"
        X_ENVOY_DOWNSTREAM_SERVICE_NODE = "x-envoy-downstream-service-node"
        X_ENVOY_INTERNAL = "x-envoy-internal"
        X_ENVOY_EXTERNAL_ADDRESS = "x-envoy-external-address"
        X_ENVOY_EXPECTED_RQ_TIMEOUT_MS = "x-envoy-expected-rq-timeout-ms"
        X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS = "x-envoy-upstream-rq-timeout-ms"
        X_ENVOY_UPSTREAM_SERVICE_TIME = "x-envoy-upstream-service-time"
        X_ENVOY_ORIGINAL_HOST = "x-envoy-original-host"
        X_ENVOY_ORIGINAL_URL = "x-envoy-original-url"
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
        X_ENVOY_UPSTREAM_STREAM_DURATION_MS = "x-envoy-upstream-stream-duration-ms"
        X_ENVOY_UPSTREAM_RQ_PER_TRY_TIMEOUT_MS = "x-envoy-upstream-rq-per-try-timeout-ms"
        X_ENVOY_UPSTREAM_ALT_STAT_NAME = "x-envoy-upstream-alt-stat-name"
        X_ENVOY_UPSTREAM_RQ_TIMEOUT_ALT_RESPONSE = "x-envoy-upstream-rq-timeout-alt-response"
        X_ENVOY_IS_TIMEOUT_RETRY = "x-envoy-is-timeout-retry"
        X_ENVOY_RATELIMITED = "x-envoy-ratelimited"
        GRPC_STATUS = "grpc-status"
        GRPC_TIMEOUT = "grpc-timeout"
        GRPC_MESSAGE = "grpc-message"
    }
}
use names::*;

/// Whether a message carries gRPC.
pub fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = headers.first(&CONTENT_TYPE) else { return false };
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
        return Ok(());
    }
    // CONNECT's target is its host.
    let host = head.method == Method::CONNECT || head.headers.has(&HOST);
    if !host || connection_nominates(&head.headers, "host") {
        return Err(LocalReply::new(StatusCode::BAD_REQUEST, "", none, "missing_host_header"));
    }
    refused.map_or(Ok(()), Err)
}

/// Whether a client asks for another protocol. An offer of HTTP/2 is passed over, as RFC 9113 lets a server do.
pub(super) fn wants_upgrade(headers: &HeaderMap) -> bool {
    headers.first(&UPGRADE).is_some_and(|to| !to.as_bytes().eq_ignore_ascii_case(b"h2c"))
        && connection_nominates(headers, "upgrade")
}

fn connection_nominates(headers: &HeaderMap, token: &str) -> bool {
    nominated(headers).any(|nominated| nominated.eq_ignore_ascii_case(token))
}

/// What `connection` has in its lists.
fn nominated(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    let values = headers.every(&CONNECTION).into_iter().flatten().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Whether `connection` names what trust rests on, or more than any client has reason to, by Envoy's count.
pub(super) fn nominates_too_much(headers: &HeaderMap) -> bool {
    const MOST: usize = 10;
    let never = |name: &str| {
        let known = [X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO];
        name.starts_with(':') || known.iter().any(|known| name.eq_ignore_ascii_case(known.as_str()))
    };
    nominated(headers).enumerate().any(|(index, name)| index >= MOST || never(name))
}

/// Appends to a header; of several lines one is made first, as in Envoy.
pub(super) fn append(headers: &mut HeaderMap, name: HeaderName, value: &HeaderValue, separator: &str) {
    join_lines(headers, &name);
    let before = headers.get(&name).filter(|before| !before.is_empty());
    if before.is_some_and(illegal::is_value) || illegal::is_value(value) {
        headers.insert(name, illegal::value());
        return;
    }
    let joined = before.map(|before| [before.as_bytes(), separator.as_bytes(), value.as_bytes()].concat());
    let value = match joined {
        // Two valid values and a separator make a valid value.
        Some(bytes) => HeaderValue::from_bytes(&bytes).unwrap_or_else(|_| value.clone()),
        None => value.clone(),
    };
    headers.insert(name, value);
}

/// Makes one line of several.
pub(super) fn join_lines(headers: &mut HeaderMap, name: &HeaderName) {
    if !headers.repeats(name) {
        return;
    }
    if headers.get_all(name).iter().any(illegal::is_value) {
        headers.insert(name, illegal::value());
        return;
    }
    let lines: Vec<_> = headers.get_all(name).iter().map(HeaderValue::as_bytes).collect();
    // Valid values and commas make a valid value.
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b","[..])) {
        headers.insert(name, joined);
    }
}

/// What concerns one connection only; `strip_hop_by_hop` knows their places.
static HOP_BY_HOP: [HeaderName; 6] = [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TRANSFER_ENCODING, UPGRADE, TE];

/// Whether `te` has `trailers` in its list, which gRPC needs.
fn says_trailers(headers: &HeaderMap) -> bool {
    let values = headers.every(&TE).into_iter().flatten().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|coding| coding.trim().eq_ignore_ascii_case("trailers"))
}

/// What of that `connection` nominates is removed: not what a client must not be able to, the headers that routing and trust rest on.
fn removable(headers: &HeaderMap) -> Vec<HeaderName> {
    let names = nominated(headers).filter(|name| {
        // Most connections say one of these, which are no headers or are removed anyway.
        !["", "close", "keep-alive", "te"].iter().any(|plain| name.eq_ignore_ascii_case(plain))
    });
    let names = names.filter_map(|name| HeaderName::from_bytes(name.as_bytes()).ok());
    names.filter(|name| !name.as_str().starts_with("x-forwarded") && !name.as_str().starts_with("x-envoy")).collect()
}

/// Removes what concerns one connection only, including what `connection` nominates.
pub(super) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    // One look at all of them costs less than to look six up.
    let mut present = [None; HOP_BY_HOP.len()];
    for name in headers.keys() {
        let index = match name.as_str() {
            "connection" => 0,
            "keep-alive" => 1,
            "proxy-connection" => 2,
            "transfer-encoding" => 3,
            "upgrade" => 4,
            "te" => 5,
            _ => continue,
        };
        present[index] = Some(&HOP_BY_HOP[index]);
    }
    for name in present.into_iter().flatten() {
        if *name == TE && says_trailers(headers) {
            headers.insert(TE, HeaderValue::from_static("trailers"));
            continue;
        }
        let nominated = if *name == CONNECTION { removable(headers) } else { Vec::new() };
        headers.remove(name);
        nominated.iter().for_each(|name| drop(headers.remove(name)));
    }
}

/// Makes a path a normal one, as configured: what need not be escaped is not, and what should be is, backslashes are slashes, dot
/// segments are resolved (RFC 3986, 5.2.4 and 6.2.2); then slashes are joined.
pub(super) fn normalize(head: &mut RequestHead, config: &HttpConnectionManagerConfig) {
    let path = head.uri.path();
    if !path.starts_with('/') {
        return;
    }
    // Most paths are normal already. What might not be has one of these.
    let odd = path.bytes().any(|byte| !byte.is_ascii_alphanumeric() && !matches!(byte, b'/' | b'-' | b'_' | b'~'));
    if !odd && !path.contains("//") {
        return;
    }
    let mut normal = path.to_owned();
    if config.normalize_path {
        normal = escape(&resolve_dots(&unescape(path)));
    }
    if config.merge_slashes {
        let mut before = None;
        normal.retain(|next| before.replace(next) != Some('/') || next != '/');
    }
    if normal == path {
        return;
    }
    if let Some(query) = head.uri.query() {
        normal.push('?');
        normal.push_str(query);
    }
    // It fits: it is the path that was there, but for a few characters.
    let _ = set_path(head, &normal);
}

/// Unreserved characters are written as themselves, also those that only others like them make (`%%32e`): what is read again is
/// read the same.
fn unescape(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for next in path.chars() {
        text.push(if next == '\\' { '/' } else { next });
        while let Some(code) = last_escape(&text) {
            text.truncate(text.len() - 3);
            text.push(code);
        }
    }
    text
}

/// What the escape stands for that a text ends with, where that is an unreserved character.
fn last_escape(text: &str) -> Option<char> {
    let [b'%', high, low] = *text.as_bytes().last_chunk()? else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let code = char::from(u8::try_from(digit(high)? * 16 + digit(low)?).ok()?);
    (code.is_ascii_alphanumeric() || "-._~".contains(code)).then_some(code)
}

/// What Envoy's URL library escapes in paths, of what may be there.
fn escape(path: &str) -> String {
    let mut text = String::with_capacity(path.len());
    for next in path.chars() {
        match next {
            '"' | '^' | '{' | '|' | '}' => percent_encode(next, &mut text),
            _ => text.push(next),
        }
    }
    text
}

fn resolve_dots(path: &str) -> String {
    let mut segments: Vec<&str> = Vec::new();
    let mut parts = path[1..].split('/').peekable();
    while let Some(segment) = parts.next() {
        match segment {
            "." => {}
            ".." => drop(segments.pop()),
            _ => {
                segments.push(segment);
                continue;
            }
        }
        if parts.peek().is_none() {
            segments.push("");
        }
    }
    format!("/{}", segments.join("/"))
}

/// What all responses say of this proxy, wherever they come from.
pub(super) fn sign_response(
    head: &mut ResponseHead,
    config: &HttpConnectionManagerConfig,
    request_id: Option<&HeaderValue>,
) {
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
    if let Some(id) = request_id {
        head.headers.insert(X_REQUEST_ID, id.clone());
    }
}

/// Applies `request_headers_to_remove` and `request_headers_to_add`. `record` is what formats are filled from; it is told the
/// headers as they are at the time.
pub(crate) fn mutate_request(headers: &mut HeaderMap, mutations: &HeaderMutations, record: &Record<'_>) {
    mutations.request_remove.iter().for_each(|name| drop(headers.remove(name)));
    for add in &mutations.request_add {
        let value = match &add.value {
            AddedValue::Literal(value) => Some(value.clone()),
            AddedValue::Format(format) => {
                let record = Record { request_headers: Some(Headers::All(headers)), ..*record };
                Some(format.value(&record).unwrap_or_else(illegal::value))
            }
        };
        apply(headers, add, value);
    }
}

/// Adds headers to a request that is none of a client's.
pub(super) fn add(headers: &mut HeaderMap, added: &[HeaderAdd], record: &Record<'_>) {
    for add in added {
        let value = match &add.value {
            AddedValue::Literal(value) => Some(value.clone()),
            AddedValue::Format(format) => Some(format.value(record).unwrap_or_else(illegal::value)),
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
            AddedValue::Format(format) => {
                format.value(&Record { response_headers: Some(Headers::All(headers)), ..*record })
            }
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

/// All values of a header, with commas between them; `None` where it is not there.
pub(super) fn joined<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, str>> {
    joined_by(headers, name, ",")
}

/// All values of a header, with `between` between them; `None` where it is not there.
pub(super) fn joined_by<'a>(headers: &'a HeaderMap, name: &HeaderName, between: &str) -> Option<Cow<'a, str>> {
    let mut values = headers.get_all(name).iter().map(|value| String::from_utf8_lossy(value.as_bytes()));
    let first = values.next()?;
    Some(values.fold(first, |all, value| (all.into_owned() + between + &value).into()))
}

#[cfg(test)]
#[path = "headers_tests.rs"]
mod tests;
