//! What access logs show of requests, kept until their lines are written.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    rc::Rc,
    time::{Instant, SystemTime},
};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version, header::HOST};

use super::{
    RouteRef,
    conn_manager::ConnState,
    headers::names::{X_ENVOY_ATTEMPT_COUNT, X_ENVOY_ORIGINAL_HOST, X_FORWARDED_HOST, X_FORWARDED_PROTO},
    live_log::LiveLog,
    redirect::scheme,
    stream::{HostRewritten, Progress, RequestHead},
};
use crate::{
    access_log::{AccessLog, Headers, Record, Times},
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
            started: SystemTime::now() - started.elapsed(),
            target: None,
            scheme: None,
            version: Version::HTTP_11,
            host: None,
            request: Vec::new(),
            refused_by: None,
            response: Vec::new(),
            trailers: Vec::new(),
            answered: None,
            route: None,
            cluster: None,
            remote: None,
            live,
        }
    }

    /// Keeps the request as it is now: its headers of these names.
    pub(super) fn keep_request(&mut self, head: &RequestHead, names: &[HeaderName]) {
        self.target = Some((head.method.clone(), head.uri.clone()));
        // Without that header nobody has said it yet.
        self.scheme = head.headers.contains_key(X_FORWARDED_PROTO).then(|| scheme(head));
        self.version = head.version;
        self.host = head.headers.get(HOST).cloned();
        self.request = only(&head.headers, names);
    }

    /// The host was told that it is attempt `number`.
    pub(super) fn keep_attempt(&mut self, number: u32, names: &[HeaderName]) {
        if names.contains(&X_ENVOY_ATTEMPT_COUNT) {
            self.request.retain(|(name, _)| *name != X_ENVOY_ATTEMPT_COUNT);
            self.request.push((X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(number)));
        }
    }

    /// The host was asked by its own `name`, and told what the request was for.
    pub(super) fn rewrite_host(&mut self, name: &str, told: HostRewritten, names: &[HeaderName]) {
        let Ok(name) = HeaderValue::from_str(name) else { return };
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
    }

    /// Adds a header that only the codec gives a response, where it has none of that name.
    pub(super) fn complete_response(
        &mut self,
        name: HeaderName,
        names: &[HeaderName],
        make: impl FnOnce() -> HeaderValue,
    ) {
        if names.contains(&name) && !self.response.iter().any(|(known, _)| *known == name) {
            self.response.push((name, make()));
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
            duration: started.elapsed(),
            attempts: progress.attempts.get(),
            grpc_messages: progress.grpc_messages.get(),
            upstream_protocol: progress.upstream_protocol.get(),
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
}

impl LoggedHeaders {
    pub(super) fn new(logs: &[AccessLog]) -> LoggedHeaders {
        let unique = |names: BTreeSet<&str>| names.into_iter().filter_map(|name| name.parse().ok()).collect();
        LoggedHeaders {
            request: unique(logs.iter().flat_map(AccessLog::request_headers).map(HeaderName::as_str).collect()),
            response: unique(logs.iter().flat_map(AccessLog::response_headers).map(HeaderName::as_str).collect()),
            trailers: unique(logs.iter().flat_map(AccessLog::response_trailers).map(HeaderName::as_str).collect()),
        }
    }
}

/// Only these headers; of several values the first, which is the one that logs show.
pub(super) fn only(headers: &HeaderMap, names: &[HeaderName]) -> Vec<(HeaderName, HeaderValue)> {
    names.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}
