//! A connection that is lent out for one request, and what can become of that.

use std::{
    cell::Cell,
    rc::{Rc, Weak},
};

use super::{
    Pool, Ready, SourcePool,
    opened::{Http1Connection, Http2Connection},
    shortage::Demand,
};
use crate::{
    grpc_status,
    http::{
        body::{Body, BodyError},
        codec::{Incoming, h1::SendError, h2, h2_error, is_protocol_error},
        headers::{is_grpc, names::GRPC_STATUS},
        look::Look as _,
    },
    runtime::clock,
    stats::Counter,
    upstream::{Issued, Seen, UpstreamInfo, WorkerCluster, WorkerHost},
};

/// A connection that is lent out for one request. Dropped without [`release`](Self::release), an HTTP/1 connection
/// is closed: nobody knows what is still to come on it.
pub struct Connection {
    sender: Sender,
    home: Weak<SourcePool>,
    pool: Weak<Pool>,
    issued: Issued,
    /// Of the pool, when it was lent.
    age: u32,
    wear: Wear,
    /// Counts responses that say that they are a connection's last.
    close_notify: Counter,
    _demand: Option<Demand>,
    /// It has carried requests before: the host may have closed it in the meantime.
    pub reused: bool,
    /// The host's load is wanted, and the response's headers do not report it.
    awaits_report: Cell<bool>,
    resets: Resets,
}

/// Streams of HTTP/2 that do not end by themselves are counted, each attempt's, as by Envoy.
struct Resets {
    /// By the host.
    received: Counter,
    /// By this side.
    sent: Counter,
    /// A request is under way, and its end has not been seen.
    open: Cell<bool>,
}

impl Resets {
    /// The stream ended in this way.
    fn ended(&self, reason: ResetReason) {
        self.open.set(false);
        match reason {
            ResetReason::Remote => self.received.inc(),
            ResetReason::Protocol => self.sent.inc(),
            // Those that were refused are counted by no one, and those that went with their connection with that.
            ResetReason::Closed | ResetReason::Refused | ResetReason::GoneAway => {}
        }
    }
}

impl Drop for Resets {
    fn drop(&mut self) {
        if self.open.get() {
            self.sent.inc();
        }
    }
}

/// Why a request that was sent has no response.
pub struct Reset {
    /// The request, where none of it was sent.
    pub request: Option<Box<http::Request<Body>>>,
    /// What happened.
    pub reason: ResetReason,
}

/// What ended a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetReason {
    /// The connection was closed.
    Closed,
    /// The host does not speak the protocol as it should.
    Protocol,
    /// The host refused the stream without looking at it.
    Refused,
    /// The host goes away, and says that it has not looked at the stream (RFC 9113, section 6.8). Whether that is held against it, whoever
    /// has sent the request says: not where the request is moved.
    GoneAway,
    /// The host reset the stream.
    Remote,
}

impl Reset {
    fn http1(error: SendError) -> Reset {
        match error {
            SendError::Unsent(request) => Reset { request: Some(request), reason: ResetReason::Closed },
            SendError::Closed => Reset { request: None, reason: ResetReason::Closed },
            SendError::Protocol(_) => Reset { request: None, reason: ResetReason::Protocol },
        }
    }
}

fn h2_reason(error: &::h2::Error) -> ResetReason {
    match error.reason() {
        Some(::h2::Reason::REFUSED_STREAM) => ResetReason::Refused,
        // For whatever reason: those that it has looked at are told by the end of the connection.
        Some(_) if error.is_go_away() && error.is_remote() => ResetReason::GoneAway,
        _ if is_protocol_error(error) => ResetReason::Protocol,
        Some(_) => ResetReason::Remote,
        None => ResetReason::Closed,
    }
}

/// What a request is sent with.
pub(super) enum Sender {
    Http1(Rc<Http1Connection>),
    Http2(Stream),
}

/// Room for one request on an HTTP/2 connection.
pub(super) struct Stream {
    pub(super) connection: Rc<Http2Connection>,
    home: Weak<SourcePool>,
}

impl Stream {
    pub(super) fn new(connection: &Rc<Http2Connection>, home: &Rc<SourcePool>) -> Stream {
        connection.active.set(connection.active.get() + 1);
        connection.idle_since.set(None);
        // Others may want it before this request has been sent.
        connection.wear.count(&connection.requests);
        if connection.wear.is_out(&connection.requests) {
            home.forget_http2(connection);
        }
        Stream { connection: Rc::clone(connection), home: Rc::downgrade(home) }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let active = self.connection.active.get() - 1;
        self.connection.active.set(active);
        if active == 0 {
            self.connection.idle_since.set(Some(clock::now()));
        }
        if let Some(home) = self.home.upgrade() {
            home.offer(&self.connection);
        }
    }
}

/// `max_requests_per_connection`.
#[derive(Clone, Copy)]
pub(super) struct Wear {
    /// 0: as many as there are.
    max_requests: u32,
    /// Counts connections that have carried as many.
    worn_out: Counter,
}

impl Wear {
    pub(super) fn of(cluster: &WorkerCluster) -> Wear {
        let max_requests = cluster.cluster.config.max_requests_per_connection;
        Wear { max_requests, worn_out: cluster.cluster.stats.upstream_cx_max_requests }
    }

    fn count(self, requests: &Cell<u32>) {
        requests.set(requests.get() + 1);
        if requests.get() == self.max_requests {
            self.worn_out.inc();
        }
    }

    fn is_out(self, requests: &Cell<u32>) -> bool {
        self.max_requests != 0 && requests.get() >= self.max_requests
    }
}

impl Connection {
    pub(super) fn new(
        host: &Rc<WorkerHost>,
        cluster: &WorkerCluster,
        home: &Rc<SourcePool>,
        ready: Ready,
        demand: Option<Demand>,
    ) -> Connection {
        Connection {
            sender: ready.sender,
            home: Rc::downgrade(home),
            pool: Rc::downgrade(&host.pool),
            issued: Issued::to(host),
            age: host.pool.age.get(),
            wear: Wear::of(cluster),
            close_notify: cluster.cluster.stats.upstream_cx_close_notify,
            reused: ready.reused,
            _demand: demand,
            awaits_report: Cell::new(false),
            resets: Resets {
                received: cluster.cluster.stats.upstream_rq_rx_reset,
                sent: cluster.cluster.stats.upstream_rq_tx_reset,
                open: Cell::new(false),
            },
        }
    }

    /// Whether what is malformed is counted as its stream's, and not as the connection's.
    pub fn counts_streams(&self) -> bool {
        matches!(&self.sender, Sender::Http2(stream) if stream.connection.counts_streams)
    }

    /// Whether it speaks HTTP/2.
    pub fn is_http2(&self) -> bool {
        matches!(self.sender, Sender::Http2(_))
    }

    /// The protocol, as access logs have it.
    pub fn protocol(&self) -> &'static str {
        if self.is_http2() { "HTTP/2" } else { "HTTP/1.1" }
    }

    /// What access logs tell of it.
    pub fn info(&self) -> &Rc<UpstreamInfo> {
        match &self.sender {
            Sender::Http1(connection) => &connection.info,
            Sender::Http2(stream) => &stream.connection.info,
        }
    }

    /// Sends `first` and then `body` as they are; what the host sends is the response's body. Only of one that was had for
    /// [`Wanted::Tcp`].
    pub fn tunnel(&self, first: Vec<u8>, body: Body) -> http::Response<Incoming> {
        match &self.sender {
            Sender::Http1(connection) => connection.client.tunnel(first, body),
            // Nobody asks for that.
            Sender::Http2(_) => http::Response::new(Incoming::Empty),
        }
    }

    /// Sends the request and waits for the response's head. `interim` is told of the 1xx that come before it.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn send(
        &self,
        request: http::Request<Body>,
        interim: impl FnMut(http::StatusCode, http::HeaderMap),
    ) -> Result<http::Response<Incoming>, Reset> {
        let host = &self.issued.0;
        // Only where somebody goes by it.
        let grpc = host.host.vitals.is_some() && is_grpc(request.headers());
        let sent = match &self.sender {
            Sender::Http1(connection) => {
                self.wear.count(&connection.requests);
                let sent = connection.client.send(request, interim).await.map_err(Reset::http1);
                if sent.is_ok() && connection.client.is_last() {
                    self.close_notify.inc();
                }
                sent
            }
            Sender::Http2(stream) => {
                self.resets.open.set(true);
                let sent = stream.connection.client.send(request, interim).await.map_err(|error| match error {
                    h2::SendError::Unsent(request, error) => {
                        let reason = error.as_ref().map_or(ResetReason::Closed, h2_reason);
                        Reset { request: Some(request), reason }
                    }
                    h2::SendError::Reset(error) => Reset { request: None, reason: h2_reason(&error) },
                    // As if the host had reset it, as in Envoy.
                    h2::SendError::TooMany => Reset { request: None, reason: ResetReason::Remote },
                });
                if let Err(reset) = &sent {
                    self.resets.ended(reset.reason);
                }
                sent
            }
        };
        match &sent {
            Ok(response) => {
                let status = seen_status(response, grpc);
                host.saw(Seen::Status(status));
                self.awaits_report.set(host.heard(status, response.headers()));
            }
            // It died in the pool: another one is tried.
            Err(reset) if reset.request.is_some() && self.reused => {}
            // Whoever has sent it knows whether it is moved.
            Err(Reset { reason: ResetReason::GoneAway, .. }) => host.pool.set_loses(),
            Err(_) => host.saw(Seen::ConnectFailed),
        }
        sent
    }

    /// The response has these trailers.
    pub fn heard_trailers(&self, trailers: &http::HeaderMap) {
        if self.awaits_report.get() {
            self.issued.0.reports(trailers);
        }
    }

    /// The response's body broke off, or nobody waits for its end.
    pub fn broke_off(self, error: &BodyError) {
        if let Some(error) = h2_error(&**error).filter(|_| self.is_http2()) {
            self.resets.ended(h2_reason(error));
        }
    }

    /// The response has passed whole: the connection may be used again.
    pub fn release(self) {
        self.resets.open.set(false);
        let Sender::Http1(connection) = &self.sender else { return };
        let Some(home) = self.home.upgrade().filter(|home| self.is_of_age() && !home.is_over.get()) else { return };
        let kept = connection.keeps && !connection.drains.get() && !self.wear.is_out(&connection.requests);
        if kept && connection.client.is_reusable() && connection.client.park() {
            connection.idle_since.set(Some(clock::now()));
            home.idle.borrow_mut().push(Rc::clone(connection));
            home.hand_out();
            home.rest();
        }
    }

    fn is_of_age(&self) -> bool {
        self.pool.upgrade().is_some_and(|pool| pool.keeps(self.age))
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Sender::Http2(stream) = &self.sender
            && let Some(home) = self.home.upgrade()
            && (home.is_over.get() || !self.is_of_age())
        {
            home.forget_http2(&stream.connection);
        }
    }
}

/// The status that a response stands for: of gRPC the one that its status in the head is mapped to, where there is one.
fn seen_status(response: &http::Response<Incoming>, grpc: bool) -> u16 {
    let status = response.headers().first(&GRPC_STATUS).filter(|_| grpc);
    status.map_or(response.status().as_u16(), |status| {
        grpc_status::to_http(status.to_str().ok().and_then(|text| text.parse().ok()))
    })
}
