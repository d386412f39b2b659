//! What access logs show of requests, kept until their lines are written.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    rc::Rc,
    time::{Instant, SystemTime},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, DATE, HOST},
};

use super::{
    RouteRef,
    conn_manager::ConnState,
    headers::names::{X_ENVOY_ATTEMPT_COUNT, X_ENVOY_ORIGINAL_HOST, X_FORWARDED_HOST, X_FORWARDED_PROTO},
    live_log::LiveLog,
    look::Look as _,
    redirect::scheme,
    stream::{HostRewritten, Progress, RequestHead},
};
use crate::{
    access_log::{AccessLog, HeaderBytes, Headers, Record, Times},
    runtime::clock,
    upstream::{WorkerCluster, WorkerHost},
};

/// What is kept of a stream for its lines.
#[derive(Clone)]
pub(super) struct LogParts {
    pub(super) started: SystemTime,
    /// None where the head never came, or could not be read.
    pub(super) target: Option<(Method, Uri)>,
    /// None where it is not known yet.
    pub(super) scheme: Option<&'static str>,
    pub(super) version: Version,
    pub(super) host: Option<HeaderValue>,
    pub(super) request: Vec<(HeaderName, HeaderValue)>,
    /// A circuit breaker has refused the attempt: what is shown in the place of its host.
    pub(super) refused_by: Option<Option<Rc<WorkerHost>>>,
    pub(super) response: Vec<(HeaderName, HeaderValue)>,
    pub(super) trailers: Vec<(HeaderName, HeaderValue)>,
    /// Counted where a log shows them.
    pub(super) header_bytes: HeaderBytes,
    /// When the client got the response's head.
    pub(super) answered: Option<Instant>,
    pub(super) route: Option<RouteRef>,
    pub(super) cluster: Option<Rc<WorkerCluster>>,
    pub(super) remote: Option<SocketAddr>,
    /// Writes a line now and then, where that is configured.
    pub(super) live: Option<Rc<LiveLog>>,
}

impl LogParts {
    /// Of a stream without a head.
    pub(super) fn new(started: Instant, live: Option<Rc<LiveLog>>) -> LogParts {
        LogParts {
            started: clock::wall(started),
            target: None,
            scheme: None,
            version: Version::HTTP_11,
            host: None,
            request: Vec::new(),
            refused_by: None,
            response: Vec::new(),
            trailers: Vec::new(),
            header_bytes: HeaderBytes::default(),
            answered: None,
            route: None,
            cluster: None,
            remote: None,
            live,
        }
    }

    /// Keeps the request as it is now: its headers that are logged.
    pub(super) fn keep_request(&mut self, head: &RequestHead, logged: &LoggedHeaders) {
        self.target = Some((head.method.clone(), head.uri.clone()));
        // Without that header nobody has said it yet.
        self.scheme = head.headers.has(&X_FORWARDED_PROTO).then(|| scheme(head));
        self.version = head.version;
        self.host = head.headers.first(&HOST).cloned();
        self.request = only(&head.headers, &logged.request);
        if logged.bytes {
            self.header_bytes.request = request_bytes(head);
        }
    }

    /// Keeps a response's headers that are logged.
    pub(super) fn keep_response(&mut self, status: StatusCode, headers: &HeaderMap, logged: &LoggedHeaders) {
        self.response = only(headers, &logged.response);
        if logged.bytes {
            self.header_bytes.response = response_bytes(status, headers);
        }
    }

    /// Keeps a response's trailers that are logged.
    pub(super) fn keep_trailers(&mut self, trailers: &HeaderMap, logged: &LoggedHeaders) {
        self.trailers = only(trailers, &logged.trailers);
        if logged.bytes {
            self.header_bytes.trailers = bytes_of(trailers);
        }
    }

    /// The host was told that it is attempt `number`.
    pub(super) fn keep_attempt(&mut self, number: u32, names: &[HeaderName]) {
        if names.contains(&X_ENVOY_ATTEMPT_COUNT) {
            let before = kept_bytes(&self.request);
            self.request.retain(|(name, _)| *name != X_ENVOY_ATTEMPT_COUNT);
            self.request.push((X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(number)));
            replace_bytes(&mut self.header_bytes.request, before, kept_bytes(&self.request));
        }
    }

    /// The host was asked by its own `name`, and told what the request was for.
    pub(super) fn rewrite_host(&mut self, name: &str, told: HostRewritten, names: &[HeaderName]) {
        let Ok(name) = HeaderValue::from_str(name) else { return };
        let bytes_before = kept_bytes(&self.request) + self.authority_bytes();
        let target = self.target.as_ref().and_then(|(_, uri)| uri.authority());
        let before = target.and_then(|authority| HeaderValue::from_str(authority.as_str()).ok()).or(self.host.take());
        if let Some(before) = before.filter(|before| !before.is_empty()) {
            if told.forwarded && names.contains(&X_FORWARDED_HOST) {
                let first = self.request.iter_mut().find(|(name, _)| *name == X_FORWARDED_HOST);
                match first {
                    None => self.request.push((X_FORWARDED_HOST, before.clone())),
                    Some((_, first)) => {
                        let joined = [first.as_bytes(), before.as_bytes()].join(&b","[..]);
                        // Valid values with a comma between them are one.
                        *first = HeaderValue::from_bytes(&joined).unwrap_or_else(|_| first.clone());
                    }
                }
            }
            if !told.suppress && names.contains(&X_ENVOY_ORIGINAL_HOST) {
                self.request.retain(|(name, _)| *name != X_ENVOY_ORIGINAL_HOST);
                self.request.push((X_ENVOY_ORIGINAL_HOST, before));
            }
        }
        if let Some((_, uri)) = &mut self.target
            && let Some(path) = uri.path_and_query().filter(|_| uri.authority().is_some())
        {
            *uri = Uri::from(path.clone());
        }
        self.host = Some(name);
        let bytes = kept_bytes(&self.request) + self.authority_bytes();
        replace_bytes(&mut self.header_bytes.request, bytes_before, bytes);
    }

    /// How long the host is that the request asks for.
    fn authority_bytes(&self) -> u64 {
        let target =
            self.target.as_ref().and_then(|(_, uri)| uri.authority()).map(|authority| authority.as_str().len());
        target.or(self.host.as_ref().map(HeaderValue::len)).unwrap_or(0) as u64
    }

    /// Adds a header that only the codec gives a response, where it has none of that name.
    pub(super) fn complete_response(
        &mut self,
        name: HeaderName,
        names: &[HeaderName],
        make: impl FnOnce() -> HeaderValue,
    ) {
        if names.contains(&name) && !self.response.iter().any(|(known, _)| *known == name) {
            let (name, value) = (name, make());
            self.header_bytes.response += (name.as_str().len() + value.len()) as u64;
            self.response.push((name, value));
        }
    }

    /// What a line can tell of them, of the stream's connection, and of how far its bodies have come.
    pub(super) fn record<'a>(&'a self, state: &'a ConnState, progress: &Progress, started: Instant) -> Record<'a> {
        let connection = &state.connection;
        let host = self.host.as_ref().and_then(|host| host.to_str().ok());
        let (method, uri) = self.target.as_ref().map(|(method, uri)| (method, uri)).unzip();
        let route = self.route.as_ref().map(|route| route.name.as_str());
        Record {
            health_check: progress.health_check.get(),
            start: self.started,
            duration: clock::since(started),
            attempts: progress.attempts.get(),
            grpc_messages: progress.grpc_messages.get(),
            upstream_protocol: progress.upstream_protocol.get(),
            // The end is later than what else was noted in this turn.
            times: Times { sent_first: self.answered, end: Some(Instant::now()), ..progress.times(started) },
            response_trailers: Some(Headers::Kept(&self.trailers)),
            route_metadata: self.route.as_ref().and_then(|route| route.metadata.as_deref()),
            protocol: Some(super::protocol_name(self.version)),
            method: method.map(Method::as_str),
            path: uri.and_then(|uri| uri.path_and_query()).map(|path| path.as_str()),
            scheme: self.scheme,
            authority: uri.and_then(|uri| uri.authority()).map(|authority| authority.as_str()).or(host),
            request_headers: Some(Headers::Kept(&self.request)),
            response_headers: Some(Headers::Kept(&self.response)),
            header_bytes: self.header_bytes,
            bytes_received: progress.received.get(),
            bytes_sent: progress.sent.get(),
            upstream_cluster: self.cluster.as_ref().map(|cluster| &*cluster.cluster.config.name),
            route_name: route.filter(|name| !name.is_empty()),
            downstream_remote_address: self.remote.or(Some(connection.remote)),
            ..connection.record()
        }
    }
}

/// The headers that a connection manager's access logs show.
#[derive(Debug)]
pub(super) struct LoggedHeaders {
    pub(super) request: Vec<HeaderName>,
    pub(super) response: Vec<HeaderName>,
    pub(super) trailers: Vec<HeaderName>,
    /// They show how long all of them are.
    pub(super) bytes: bool,
}

impl LoggedHeaders {
    pub(super) fn new(logs: &[AccessLog]) -> LoggedHeaders {
        let bytes = logs.iter().any(AccessLog::shows_header_bytes);
        // What is added to them after they were counted has to be known, to be counted as well.
        let (mut request, mut response) = (BTreeSet::new(), BTreeSet::new());
        let (of_request, of_response) =
            ([X_ENVOY_ATTEMPT_COUNT, X_FORWARDED_HOST, X_ENVOY_ORIGINAL_HOST], [DATE, CONTENT_LENGTH, CONNECTION]);
        if bytes {
            request.extend(of_request.iter().map(HeaderName::as_str));
            response.extend(of_response.iter().map(HeaderName::as_str));
        }
        request.extend(logs.iter().flat_map(AccessLog::request_headers).map(HeaderName::as_str));
        response.extend(logs.iter().flat_map(AccessLog::response_headers).map(HeaderName::as_str));
        let trailers = logs.iter().flat_map(AccessLog::response_trailers).map(HeaderName::as_str).collect();
        let parse = |names: BTreeSet<&str>| names.into_iter().filter_map(|name| name.parse().ok()).collect();
        LoggedHeaders { request: parse(request), response: parse(response), trailers: parse(trailers), bytes }
    }
}

/// Only these headers.
fn only(headers: &HeaderMap, names: &[HeaderName]) -> Vec<(HeaderName, HeaderValue)> {
    let mut kept = Vec::new();
    for name in names {
        kept.extend(headers.get_all(name).into_iter().map(|value| (name.clone(), value.clone())));
    }
    kept
}

/// How long their names and values are.
fn bytes_of(headers: &HeaderMap) -> u64 {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>() as u64
}

fn kept_bytes(headers: &[(HeaderName, HeaderValue)]) -> u64 {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum::<usize>() as u64
}

/// What was as long as `before` is as long as `after`, where anything is counted.
fn replace_bytes(total: &mut u64, before: u64, after: u64) {
    if *total > 0 {
        *total = (*total + after).saturating_sub(before);
    }
}

/// How long the names and values of a response's headers are, with its status.
pub(super) fn response_bytes(status: StatusCode, headers: &HeaderMap) -> u64 {
    bytes_of(headers) + (":status".len() + status.as_str().len()) as u64
}

/// How long the names and values of a request's headers are, with its pseudo-headers.
pub(super) fn request_bytes(head: &RequestHead) -> u64 {
    let host = head.headers.first(&HOST).map_or(0, HeaderValue::len);
    // The name of the host's pseudo-header is the longer one.
    let of_headers = bytes_of(&head.headers) - if host > 0 { ("host".len() + host) as u64 } else { 0 };
    let authority = head.uri.authority().map_or(host, |authority| authority.as_str().len());
    let path = head.uri.path_and_query().map_or(0, |path| ":path".len() + path.as_str().len());
    let authority = if authority > 0 { ":authority".len() + authority } else { 0 };
    let method = ":method".len() + head.method.as_str().len();
    of_headers + (method + path + authority + ":scheme".len() + scheme(head).len()) as u64
}
