//! What access logs show of requests, kept until their lines are written.

use std::{collections::BTreeSet, net::SocketAddr, rc::Rc, time::SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, Version};

use super::RouteRef;
use crate::{access_log::AccessLog, upstream::WorkerCluster};

/// What is kept of a stream for its lines.
pub(super) struct LogParts {
    pub(super) started: SystemTime,
    /// None where the head never came, or could not be read.
    pub(super) target: Option<(Method, Uri)>,
    pub(super) version: Version,
    pub(super) host: Option<HeaderValue>,
    pub(super) request: Vec<(HeaderName, HeaderValue)>,
    pub(super) response: Vec<(HeaderName, HeaderValue)>,
    pub(super) route: Option<RouteRef>,
    pub(super) cluster: Option<Rc<WorkerCluster>>,
    pub(super) remote: Option<SocketAddr>,
}

/// The headers that a connection manager's access logs show.
#[derive(Debug)]
pub(super) struct LoggedHeaders {
    pub(super) request: Vec<HeaderName>,
    pub(super) response: Vec<HeaderName>,
}

impl LoggedHeaders {
    pub(super) fn new(logs: &[AccessLog]) -> LoggedHeaders {
        let unique = |names: BTreeSet<&str>| names.into_iter().filter_map(|name| name.parse().ok()).collect();
        LoggedHeaders {
            request: unique(logs.iter().flat_map(AccessLog::request_headers).map(HeaderName::as_str).collect()),
            response: unique(logs.iter().flat_map(AccessLog::response_headers).map(HeaderName::as_str).collect()),
        }
    }
}

/// Only these headers; of several values the first, which is the one that logs show.
pub(super) fn only(headers: &HeaderMap, names: &[HeaderName]) -> Vec<(HeaderName, HeaderValue)> {
    names.iter().filter_map(|name| Some((name.clone(), headers.get(name)?.clone()))).collect()
}
