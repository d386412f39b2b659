//! A worker's connections to one host. See LIFECYCLE.md.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::{Rc, Weak},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use tokio::sync::{Mutex, Notify};

use super::{
    Cluster, ConnectError, Host, HostCounter, Issued, Seen, WorkerCluster, WorkerHost,
    connect::{Dial, SocketSettings, Source, UpstreamInfo, UpstreamStream, connect},
};
use crate::{
    config::model::Http2Options,
    http::{
        body::Body,
        codec::{
            Incoming,
            h1::{ClientConnection, SendError},
            h2, is_protocol_error,
        },
        headers::{is_grpc, names::GRPC_STATUS},
    },
    stats::{Counter, Metered},
    tls::AlpnFallback,
};

/// Why no connection could be had.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The host could not be connected to.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The HTTP/2 preface or the first settings failed.
    #[error("protocol error: {0}")]
    Handshake(::h2::Error),
    /// A circuit breaker is open.
    #[error("overflow")]
    Overflow,
}

/// What a request may be sent with.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// HTTP/1.1
    Http1,
    /// HTTP/2
    Http2(&'a Http2Options),
    /// What the host chooses in the TLS handshake.
    Auto(&'a Http2Options),
    /// No protocol: bytes.
    Tcp,
}

/// This worker's connections to one host, by the source address that they keep.
#[derive(Default)]
pub struct Pool {
    direct: Rc<SourcePool>,
    by_source: RefCell<HashMap<Source, Rc<SourcePool>>>,
    retired: Cell<bool>,
}

#[derive(Default)]
struct SourcePool {
    /// The last one used is used first, so that the others can grow old.
    idle: RefCell<Vec<Rc<Http1Connection>>>,
    http2: RefCell<Option<Rc<Http2Connection>>>,
    /// One connect at a time where one connection serves all.
    http2_connect: Mutex<()>,
    /// The host has chosen HTTP/1.1 where it had the choice.
    chose_http1: Cell<bool>,
    open: Cell<u32>,
    /// Told when a connection comes back or goes, for those that wait at a circuit breaker.
    released: Notify,
}

/// Closed when nobody holds it any more: neither the pool nor a borrower.
struct Http1Connection {
    client: Rc<ClientConnection>,
    info: Rc<UpstreamInfo>,
    requests: Rc<Cell<u32>>,
    idle_since: Cell<Option<Instant>>,
    _open: OpenConnection,
}

struct Http2Connection {
    client: Rc<h2::ClientConnection>,
    info: Rc<UpstreamInfo>,
    requests: Rc<Cell<u32>>,
    /// Streams in flight, and since when there are none.
    active: Cell<u32>,
    idle_since: Cell<Option<Instant>>,
}

/// A connection that is lent out for one request. Dropped without [`release`](Self::release), an HTTP/1 connection
/// is closed: nobody knows what is still to come on it.
pub struct Connection {
    sender: Sender,
    home: Weak<SourcePool>,
    pool: Weak<Pool>,
    issued: Issued,
    max_requests: u32,
    /// Counts connections that have carried as many.
    worn_out: Counter,
    /// It has carried requests before: the host may have closed it in the meantime.
    pub reused: bool,
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
        // The host goes away, for whatever reason, and says that it has not looked at this one: those that it has looked at are told
        // by the end of the connection.
        Some(_) if error.is_go_away() && error.is_remote() => ResetReason::Refused,
        _ if is_protocol_error(error) => ResetReason::Protocol,
        Some(_) => ResetReason::Remote,
        None => ResetReason::Closed,
    }
}

/// What a request is sent with.
pub enum Sender {
    /// HTTP/1.1
    #[expect(private_interfaces, reason = "only named so that callers can tell the protocol")]
    Http1(Rc<Http1Connection>),
    /// HTTP/2
    #[expect(private_interfaces, reason = "only named so that callers can tell the protocol")]
    Http2(Rc<Http2Connection>),
}

impl Pool {
    fn source(&self, source: Option<Source>) -> Rc<SourcePool> {
        match source {
            None => Rc::clone(&self.direct),
            Some(source) => {
                let mut by_source = self.by_source.borrow_mut();
                // Sources come and go, as pods do: whenever the map would grow, those without a connection leave it.
                if by_source.len() == by_source.capacity() {
                    by_source.retain(|_, pool| pool.open.get() > 0 || Rc::strong_count(pool) > 1);
                }
                Rc::clone(by_source.entry(source).or_default())
            }
        }
    }

    /// Nothing idle is kept from now on.
    pub(super) fn retire(&self) {
        self.retired.set(true);
        let by_source = self.by_source.borrow();
        for pool in by_source.values().chain([&self.direct]) {
            let idle = std::mem::take(&mut *pool.idle.borrow_mut());
            drop(idle);
            // Its streams finish: the last one lets go of it.
            pool.http2.borrow_mut().take();
        }
    }
}

/// A connection to one of the cluster's hosts whose bytes are counted.
fn metered(cluster: &WorkerCluster, stream: UpstreamStream) -> Metered<UpstreamStream> {
    let stats = &cluster.cluster.stats;
    Metered::new(stream, stats.upstream_cx_rx_bytes_total, stats.upstream_cx_tx_bytes_total)
}

/// Counts a request as one that waits for a connection, until the guard is dropped.
///
/// # Errors
/// As many wait as may.
fn wait(cluster: &WorkerCluster, high: bool) -> Result<Decrement, PoolError> {
    let (limits, stats) = (cluster.cluster.limits(high), &cluster.cluster.stats);
    if stats.upstream_rq_pending_active.value() >= u64::from(limits.max_pending_requests()) {
        stats.upstream_rq_pending_overflow.inc();
        return Err(PoolError::Overflow);
    }
    stats.upstream_rq_pending_total.inc();
    Ok(Decrement::after_inc(stats.upstream_rq_pending_active))
}

impl WorkerHost {
    /// A request that was meant for this host is refused because the cluster has as many as it may. Envoy, which looks only when there
    /// is a connection, counts that as the host's error, unless the request may not even wait for one.
    pub fn count_refused(&self, cluster: &WorkerCluster, high: bool) {
        let (limits, stats) = (cluster.cluster.limits(high), &cluster.cluster.stats);
        if stats.upstream_rq_pending_active.value() < u64::from(limits.max_pending_requests()) {
            self.count(HostCounter::RqError, 1);
        }
    }

    /// A connection for one request: an idle one, or a new one within the cluster's limits.
    pub async fn acquire(
        self: &Rc<Self>,
        cluster: &WorkerCluster,
        wanted: Wanted<'_>,
        source: Option<Source>,
        high_priority: bool,
    ) -> Result<Connection, PoolError> {
        let acquired = self.acquire_unseen(cluster, wanted, source, high_priority).await;
        match &acquired {
            Ok(_) => self.saw(Seen::Connected),
            Err(PoolError::Connect(_) | PoolError::Handshake(_)) => self.saw(Seen::ConnectFailed),
            // It is not the host's fault.
            Err(PoolError::Overflow) => {}
        }
        acquired
    }

    async fn acquire_unseen(
        self: &Rc<Self>,
        cluster: &WorkerCluster,
        wanted: Wanted<'_>,
        source: Option<Source>,
        high_priority: bool,
    ) -> Result<Connection, PoolError> {
        let pool = self.pool.source(source);
        let lend = |sender, reused| Connection {
            sender,
            home: Rc::downgrade(&pool),
            pool: Rc::downgrade(&self.pool),
            issued: Issued::to(self),
            max_requests: cluster.cluster.config.max_requests_per_connection,
            worn_out: cluster.cluster.stats.upstream_cx_max_requests,
            reused,
        };
        // A request without a connection is one of those that wait, while its own is opened too.
        let mut pending = None;
        let opened = loop {
            let http1 = match wanted {
                Wanted::Http1 | Wanted::Tcp => true,
                Wanted::Http2(_) => false,
                Wanted::Auto(_) => pool.chose_http1.get(),
            };
            if http1 {
                let idle = if matches!(wanted, Wanted::Tcp) { None } else { pool.take_idle() };
                if let Some(idle) = idle {
                    return Ok(lend(Sender::Http1(idle), true));
                }
                if pending.is_none() {
                    pending = Some(wait(cluster, high_priority)?);
                }
                if self.may_open(cluster, &pool, high_priority).await {
                    break Box::pin(self.open(cluster, &pool, source, wanted)).await?;
                }
                continue;
            }
            if let Some(shared) = pool.shared_http2() {
                return Ok(lend(Sender::Http2(shared), true));
            }
            if pending.is_none() {
                pending = Some(wait(cluster, high_priority)?);
            }
            let _one_at_a_time = pool.http2_connect.lock().await;
            if let Some(shared) = pool.shared_http2() {
                return Ok(lend(Sender::Http2(shared), true));
            }
            if matches!(wanted, Wanted::Auto(_)) && pool.chose_http1.get() {
                continue;
            }
            break Box::pin(self.open(cluster, &pool, source, wanted)).await?;
        };
        Ok(lend(opened, false))
    }

    async fn open(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        source: Option<Source>,
        wanted: Wanted<'_>,
    ) -> Result<Sender, PoolError> {
        let alpn = match wanted {
            Wanted::Http1 => AlpnFallback::Http1,
            Wanted::Tcp => AlpnFallback::None,
            Wanted::Http2(_) => AlpnFallback::Http2,
            Wanted::Auto(_) => AlpnFallback::Auto,
        };
        let (stream, open) = self.dial(cluster, pool, source, alpn).await?;
        let http2 = match wanted {
            Wanted::Http1 | Wanted::Tcp => None,
            Wanted::Http2(options) => Some(options),
            Wanted::Auto(options) => {
                let options = Some(options).filter(|_| stream.alpn() == Some(b"h2"));
                // The host may choose otherwise the next time.
                pool.chose_http1.set(options.is_none());
                options
            }
        };
        match http2 {
            Some(options) => self.start_http2(cluster, pool, stream, open, options).await.map(Sender::Http2),
            None => {
                if !matches!(wanted, Wanted::Tcp) {
                    cluster.cluster.stats.upstream_cx_http1_total.inc();
                }
                Ok(Sender::Http1(self.start_http1(cluster, pool, stream, open)))
            }
        }
    }

    /// Whether a connection may be opened. Where the limit is reached, waits for one to be released and says no; a
    /// pool without any connection may always open one, as in Envoy.
    async fn may_open(&self, cluster: &WorkerCluster, pool: &SourcePool, high: bool) -> bool {
        let (limits, stats) = (cluster.cluster.limits(high), &cluster.cluster.stats);
        if pool.open.get() == 0 || stats.upstream_cx_active.value() < u64::from(limits.max_connections()) {
            return true;
        }
        stats.upstream_cx_overflow.inc();
        pool.released.notified().await;
        false
    }

    /// Opens the socket and counts how that went.
    async fn dial(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        source: Option<Source>,
        alpn: AlpnFallback,
    ) -> Result<(UpstreamStream, OpenConnection), PoolError> {
        let (config, stats) = (&cluster.cluster.config, &cluster.cluster.stats);
        let open = OpenConnection::new(cluster, self, pool);
        let dial = Dial {
            socket: SocketSettings::new(config, source),
            happy_eyeballs: config.happy_eyeballs,
            limit: config.connect_timeout,
            tls: cluster.cluster.tls.as_deref(),
            alpn,
            connected: &open.connected,
        };
        match connect(&self.host, dial).await {
            Ok(stream) => {
                stats.upstream_cx_connect_ms.record(open.since.elapsed().as_millis() as u64);
                Ok((stream, open))
            }
            Err(error) => {
                stats.upstream_cx_connect_fail.inc();
                self.count(HostCounter::CxConnectFail, 1);
                if matches!(error, ConnectError::Timeout) {
                    stats.upstream_cx_connect_timeout.inc();
                }
                Err(error.into())
            }
        }
    }

    fn start_http1(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        stream: UpstreamStream,
        open: OpenConnection,
    ) -> Rc<Http1Connection> {
        let connection = Rc::new(Http1Connection {
            info: Rc::new(stream.info(open.since, open.connected.get())),
            client: Rc::new(ClientConnection::new(metered(cluster, stream))),
            requests: Rc::clone(&open.requests),
            idle_since: Cell::new(None),
            _open: open,
        });
        let (watched, client) = (Rc::downgrade(&connection), Rc::downgrade(&connection.client));
        let (limit, shared) = (cluster.cluster.config.idle_timeout, Arc::clone(&cluster.cluster));
        let home = Rc::downgrade(pool);
        // It only sleeps while the connection is in use.
        tokio::task::spawn_local(async move {
            let idle = idle_watch(limit, || watched.upgrade().map(|connection| connection.idle_since.get()));
            let closed =
                std::future::poll_fn(|cx| client.upgrade().map_or(Poll::Ready(()), |client| client.poll_idle(cx)));
            tokio::select! {
                biased;
                () = closed => {}
                () = idle => shared.stats.upstream_cx_idle_timeout.inc(),
            }
            if let (Some(home), Some(connection)) = (home.upgrade(), watched.upgrade()) {
                home.idle.borrow_mut().retain(|idle| !Rc::ptr_eq(idle, &connection));
            }
        });
        connection
    }

    async fn start_http2(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        stream: UpstreamStream,
        open: OpenConnection,
        options: &Http2Options,
    ) -> Result<Rc<Http2Connection>, PoolError> {
        let info = Rc::new(stream.info(open.since, open.connected.get()));
        let buffer = cluster.cluster.config.per_connection_buffer_limit_bytes;
        let started = h2::ClientConnection::start(metered(cluster, stream), options, buffer).await;
        let (client, driver) = started.map_err(PoolError::Handshake)?;
        cluster.cluster.stats.upstream_cx_http2_total.inc();
        let connection = Rc::new(Http2Connection {
            client,
            info,
            requests: Rc::clone(&open.requests),
            active: Cell::new(0),
            idle_since: Cell::new(Some(Instant::now())),
        });
        pool.http2.replace(Some(Rc::clone(&connection)));
        let (watched, home) = (Rc::downgrade(&connection), Rc::downgrade(pool));
        let limit = cluster.cluster.config.idle_timeout;
        tokio::task::spawn_local(async move {
            let idle = idle_watch(limit, || watched.upgrade().map(|connection| connection.idle_since.get()));
            tokio::select! {
                result = driver => log_end(result),
                () = idle => open.cluster.stats.upstream_cx_idle_timeout.inc(),
            }
            if let Some(connection) = watched.upgrade() {
                connection.client.close();
                home.upgrade().inspect(|home| home.forget_http2(&connection));
            }
            drop(open);
        });
        Ok(connection)
    }
}

impl SourcePool {
    fn take_idle(&self) -> Option<Rc<Http1Connection>> {
        loop {
            // One that the host has closed is dropped, which the pool is told of: it must not be borrowed then.
            let connection = self.idle.borrow_mut().pop()?;
            connection.idle_since.set(None);
            if connection.client.unpark() {
                return Some(connection);
            }
        }
    }

    fn shared_http2(&self) -> Option<Rc<Http2Connection>> {
        let mut slot = self.http2.borrow_mut();
        if slot.as_ref().is_some_and(|connection| connection.client.is_closed()) {
            *slot = None;
        }
        slot.as_ref().map(Rc::clone)
    }

    fn forget_http2(&self, connection: &Rc<Http2Connection>) {
        let mut slot = self.http2.borrow_mut();
        if slot.as_ref().is_some_and(|current| Rc::ptr_eq(current, connection)) {
            *slot = None;
        }
    }
}

impl Connection {
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
            Sender::Http2(connection) => &connection.info,
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

    fn count_request(&self, requests: &Cell<u32>) {
        requests.set(requests.get() + 1);
        if requests.get() == self.max_requests {
            self.worn_out.inc();
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
                self.count_request(&connection.requests);
                connection.client.send(request, interim).await.map_err(Reset::http1)
            }
            Sender::Http2(connection) => {
                self.count_request(&connection.requests);
                connection.active.set(connection.active.get() + 1);
                connection.idle_since.set(None);
                connection.client.send(request, interim).await.map_err(|error| match error {
                    h2::SendError::Unsent(request, error) => {
                        Reset { request: Some(request), reason: h2_reason(&error) }
                    }
                    h2::SendError::Reset(error) => Reset { request: None, reason: h2_reason(&error) },
                })
            }
        };
        match &sent {
            Ok(response) => {
                host.saw(Seen::Status(seen_status(response, grpc)));
                host.heard(response.headers());
            }
            // It died in the pool: another one is tried.
            Err(reset) if reset.request.is_some() && self.reused => {}
            Err(_) => host.saw(Seen::ConnectFailed),
        }
        sent
    }

    /// The response has passed whole: the connection may be used again.
    pub fn release(self) {
        let Some(home) = self.home.upgrade() else { return };
        let retired = self.pool.upgrade().is_none_or(|pool| pool.retired.get());
        if let Sender::Http1(connection) = &self.sender {
            let worn_out = self.max_requests != 0 && connection.requests.get() >= self.max_requests;
            if !retired && !worn_out && connection.client.is_reusable() && connection.client.park() {
                connection.idle_since.set(Some(Instant::now()));
                home.idle.borrow_mut().push(Rc::clone(connection));
            }
        } else if let Sender::Http2(connection) = &self.sender {
            let worn_out = self.max_requests != 0 && connection.requests.get() >= self.max_requests;
            if retired || worn_out {
                home.forget_http2(connection);
            }
        }
        home.released.notify_one();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Sender::Http2(connection) = &self.sender {
            let active = connection.active.get().saturating_sub(1);
            connection.active.set(active);
            if active == 0 {
                connection.idle_since.set(Some(Instant::now()));
            }
        }
    }
}

/// Ends when the connection has been idle for `limit`. `idle_since` is `None` once the connection is gone, and its
/// value is `None` while it is in use.
async fn idle_watch(limit: Option<Duration>, idle_since: impl Fn() -> Option<Option<Instant>>) {
    let Some(limit) = limit else { return std::future::pending().await };
    loop {
        let Some(since) = idle_since() else { return std::future::pending().await };
        let left = since.map_or(limit, |since| limit.saturating_sub(since.elapsed()));
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left).await;
    }
}

/// The status that a response stands for: of gRPC the one that its status in the head is mapped to, where there is one.
fn seen_status(response: &http::Response<Incoming>, grpc: bool) -> u16 {
    let status = response.headers().get(GRPC_STATUS).filter(|_| grpc);
    status.map_or(response.status().as_u16(), grpc_to_http)
}

/// The HTTP status that a `grpc-status` stands for.
fn grpc_to_http(status: &http::HeaderValue) -> u16 {
    match status.to_str().ok().and_then(|text| text.parse::<u32>().ok()) {
        Some(0) => 200,
        Some(1) => 499,
        Some(3 | 9 | 11) => 400,
        Some(4) => 504,
        Some(5) => 404,
        Some(6 | 10) => 409,
        Some(7) => 403,
        Some(8) => 429,
        Some(12) => 501,
        Some(14) => 503,
        Some(16) => 401,
        // Unknown, Internal, DataLoss, and what is no status.
        _ => 500,
    }
}

fn log_end(result: Result<(), ::h2::Error>) {
    if let Err(error) = result {
        tracing::debug!(%error, "upstream connection ended");
    }
}

/// Counts an open connection for as long as it lives.
pub(super) struct OpenConnection {
    cluster: Arc<Cluster>,
    host: Arc<Host>,
    worker: usize,
    pool: Weak<SourcePool>,
    since: Instant,
    /// When it was there, before its TLS handshake.
    connected: Cell<Option<Instant>>,
    /// How many it has carried.
    requests: Rc<Cell<u32>>,
}

impl OpenConnection {
    fn new(cluster: &WorkerCluster, host: &WorkerHost, pool: &Rc<SourcePool>) -> OpenConnection {
        let stats = &cluster.cluster.stats;
        stats.upstream_cx_total.inc();
        stats.upstream_cx_active.inc();
        host.count(HostCounter::CxTotal, 1);
        host.count(HostCounter::CxActive, 1);
        pool.open.set(pool.open.get() + 1);
        OpenConnection {
            cluster: Arc::clone(&cluster.cluster),
            host: Arc::clone(&host.host),
            worker: cluster.worker(),
            pool: Rc::downgrade(pool),
            since: Instant::now(),
            connected: Cell::new(None),
            requests: Rc::default(),
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let stats = &self.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.upstream_cx_destroy.inc();
        stats.upstream_cx_length_ms.record(self.since.elapsed().as_millis() as u64);
        if self.requests.get() > 0 {
            stats.upstream_rq_per_cx.record(self.requests.get().into());
        }
        self.host.counters.add(self.worker, HostCounter::CxActive, -1);
        if let Some(pool) = self.pool.upgrade() {
            pool.open.set(pool.open.get() - 1);
            pool.released.notify_one();
        }
    }
}

/// A gauge that is one higher for as long as this lives.
pub(crate) struct Decrement(crate::stats::Gauge);

impl Decrement {
    /// Adds one now, and takes it away when dropped.
    pub(crate) fn after_inc(gauge: crate::stats::Gauge) -> Decrement {
        gauge.inc();
        Decrement(gauge)
    }
}

impl Drop for Decrement {
    fn drop(&mut self) {
        self.0.dec();
    }
}
