//! What one request carries on its way through filters and router.

use std::{
    borrow::Cow,
    cell::{Cell, RefCell},
    net::SocketAddr,
    rc::Rc,
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderValue, StatusCode};

use super::{MatchCx, RouteRef, codec::h1::CodecError};
use crate::{
    access_log::ResponseFlags, listener::ConnectionInfo, runtime::Worker, tls::TlsInfo, upstream::WorkerCluster,
};

/// A request without its body.
pub type RequestHead = http::request::Parts;
/// A response without its body.
pub type ResponseHead = http::response::Parts;

/// An answer that does not come from an upstream.
#[derive(Debug)]
pub struct LocalReply {
    /// The status; a gRPC request gets 200 and the `grpc-status` that corresponds.
    pub status: StatusCode,
    /// Plain text; may be empty.
    pub body: Bytes,
    /// Why, for the access log.
    pub flags: ResponseFlags,
    /// `%RESPONSE_CODE_DETAILS%`
    pub details: Cow<'static, str>,
    /// Further headers.
    pub headers: Vec<(http::HeaderName, HeaderValue)>,
    /// What a gRPC client gets for the status; `None`: what corresponds to it.
    pub grpc_status: Option<u16>,
}

impl LocalReply {
    /// An answer with a body of plain text.
    pub fn new(
        status: StatusCode,
        body: impl Into<Bytes>,
        flags: ResponseFlags,
        details: impl Into<Cow<'static, str>>,
    ) -> LocalReply {
        LocalReply { status, body: body.into(), flags, details: details.into(), headers: Vec::new(), grpc_status: None }
    }
}

/// What filters and router know and decide about a stream.
pub struct StreamCx {
    /// The worker that serves the stream.
    pub worker: Rc<Worker>,
    /// The downstream connection.
    pub connection: Rc<ConnectionInfo>,
    /// Client address after `x-forwarded-for` was looked at.
    pub remote: SocketAddr,
    /// The request is internal: its `x-envoy-*` headers are obeyed.
    pub internal: bool,
    /// The chosen route; `None` only where none matched.
    pub route: Option<RouteRef>,
    /// The cluster that the route chose, where it exists.
    pub cluster: Option<Rc<WorkerCluster>>,
    /// Set by a filter: the request goes here, through an ORIGINAL_DST cluster.
    pub override_dst: Option<SocketAddr>,
    /// Set by filters for the access log, whether the request is answered here or not.
    pub flags: ResponseFlags,
    /// `suppress_envoy_headers` of the stream's router.
    pub suppress_envoy_headers: bool,
    /// The stream's random number: routes and weighted clusters are chosen by it.
    pub random: u64,
    /// When the first byte of the request's head was seen, at the latest.
    pub started: Instant,
    /// What can be told about the request's body while it passes.
    pub progress: Rc<Progress>,
}

impl StreamCx {
    /// What its route is chosen by.
    pub(super) fn match_cx(&self) -> MatchCx {
        let certificate_presented = self.connection.tls.as_ref().is_some_and(TlsInfo::has_certificate);
        MatchCx { random: self.random, certificate_presented }
    }
}

/// How far the two bodies have come.
#[derive(Debug)]
pub struct Progress {
    /// Body bytes from the client.
    pub received: Cell<u64>,
    /// Body bytes to the client.
    pub sent: Cell<u64>,
    /// Filters change the response's body: what an upstream sends is not what the client gets.
    pub sent_otherwise: Cell<bool>,
    /// When the request was complete.
    pub request_complete: Cell<Option<Instant>>,
    /// When anything last passed in either direction.
    pub last_activity: Cell<Instant>,
    /// The request turned out not to be HTTP in the middle of its body.
    pub malformed: Cell<Option<CodecError>>,
    /// Woken when the request is complete, or malformed.
    pub waker: RefCell<Option<std::task::Waker>>,
}

impl Progress {
    /// For a request that began at `started`.
    pub fn new(started: Instant, complete: bool) -> Rc<Progress> {
        Rc::new(Progress {
            received: Cell::new(0),
            sent: Cell::new(0),
            sent_otherwise: Cell::new(false),
            request_complete: Cell::new(complete.then_some(started)),
            last_activity: Cell::new(started),
            malformed: Cell::new(None),
            waker: RefCell::new(None),
        })
    }

    /// The request will never be whole.
    pub fn refuse(&self, error: CodecError) {
        self.malformed.set(Some(error));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// The request has passed whole.
    pub fn complete(&self) {
        let now = Instant::now();
        self.last_activity.set(now);
        if self.request_complete.replace(Some(now)).is_none()
            && let Some(waker) = self.waker.take()
        {
            waker.wake();
        }
    }
}
