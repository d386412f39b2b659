//! Connections as the pool has them: how they are opened, watched while nobody uses them, and counted.

use std::{
    cell::Cell,
    pin::pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use super::{Need, PoolError, SourcePool, Wanted, lent::Wear, shortage::Coming};
use crate::{
    config::model::Http2Options,
    http::codec::{h1, h2},
    stats::{Gauge, Metered},
    tls::{AlpnFallback, PeerName},
    upstream::{
        ClusterStats, ConnectError, Host, HostCounter, WorkerCluster, WorkerHost,
        breakers::{Breakers, Resource},
        connect::{Dial, SocketSettings, Source, UpstreamInfo, UpstreamStream, connect},
    },
};

/// Closed when nobody holds it any more: neither the pool nor a borrower.
pub(super) struct Http1Connection {
    pub(super) client: Rc<h1::ClientConnection>,
    pub(super) info: Rc<UpstreamInfo>,
    pub(super) requests: Rc<Cell<u32>>,
    pub(super) idle_since: Cell<Option<Instant>>,
    /// It is not used again.
    pub(super) drains: Cell<bool>,
    /// It may be used for several requests.
    pub(super) keeps: bool,
    open: OpenConnection,
}

impl Drop for Http1Connection {
    fn drop(&mut self) {
        self.open.by_host.set(self.client.is_closed_by_host());
        self.open.in_use.set(self.client.is_in_use());
    }
}

pub(super) struct Http2Connection {
    pub(super) client: Rc<h2::ClientConnection>,
    pub(super) info: Rc<UpstreamInfo>,
    pub(super) requests: Rc<Cell<u32>>,
    /// Streams in flight, and since when there are none.
    pub(super) active: Cell<u32>,
    pub(super) idle_since: Cell<Option<Instant>>,
    pub(super) wear: Wear,
    /// It is among those that have room.
    pub(super) listed: Cell<bool>,
    /// It has no further requests.
    forgotten: Cell<bool>,
    /// Of the cluster, for the streams at a time.
    most: u32,
    /// What is malformed is counted as its stream's.
    pub(super) counts_streams: bool,
}

impl Http2Connection {
    /// Whether it takes one more request.
    pub(super) fn has_room(&self) -> bool {
        let active = self.active.get();
        !self.forgotten.get()
            && !self.client.is_closed()
            && active < self.most
            && (active as usize) < self.client.limit()
    }

    /// It has no further requests. The caller sees to it that it is not listed.
    pub(super) fn forget(&self) {
        self.forgotten.set(true);
        self.listed.set(false);
    }
}

/// What a connection is opened with.
#[derive(Clone)]
enum Speaks {
    Http1,
    Tcp,
    Http2(Http2Options),
    Auto(Http2Options),
}

enum Opened {
    Http1(Rc<Http1Connection>),
    Http2(Rc<Http2Connection>),
}

impl WorkerHost {
    /// Opens a connection in a task of its own: whoever waits for it may go. Those that have waited longest have it.
    pub(super) fn begin_connect(self: &Rc<Self>, need: &Need<'_>, pool: &Rc<SourcePool>) {
        let speaks = match need.wanted {
            Wanted::Http1 => Speaks::Http1,
            Wanted::Tcp => Speaks::Tcp,
            Wanted::Http2(options) => Speaks::Http2(options.clone()),
            Wanted::Auto(options) => Speaks::Auto(options.clone()),
        };
        // It counts from now on.
        let open = OpenConnection::new(need, self, pool);
        let coming = Coming::new(pool, need.room());
        let (age, way) = (self.pool.age.get(), (need.source, need.peer.cloned()));
        let (host, cluster, pool) = (Rc::clone(self), Rc::clone(need.cluster), Rc::clone(pool));
        tokio::task::spawn_local(async move {
            let opened = host.open(&cluster, &pool, way, speaks, open).await;
            drop(coming);
            match opened {
                Ok(Opened::Http1(connection)) => {
                    // With hosts of another age those that wait are content, and nobody else.
                    if pool.waiting.count() > 0 || host.pool.keeps(age) {
                        pool.hand_on(connection, false);
                    }
                }
                Ok(Opened::Http2(connection)) => {
                    pool.offer(&connection);
                    if !host.pool.keeps(age) || pool.is_over.get() {
                        pool.forget_http2(&connection);
                    }
                }
                Err(error) => pool.fail(&error),
            }
        });
    }

    async fn open(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        (source, peer): (Option<Source>, Option<PeerName>),
        speaks: Speaks,
        open: OpenConnection,
    ) -> Result<Opened, PoolError> {
        let alpn = match speaks {
            Speaks::Http1 => AlpnFallback::Http1,
            Speaks::Tcp => AlpnFallback::None,
            Speaks::Http2(_) => AlpnFallback::Http2,
            Speaks::Auto(_) => AlpnFallback::Auto,
        };
        let stats = &cluster.cluster.stats;
        match speaks {
            Speaks::Http1 => stats.count_http1(),
            Speaks::Http2(_) => stats.upstream_cx_http2_total.inc(),
            // What it comes to is seen later.
            Speaks::Auto(_) | Speaks::Tcp => {}
        }
        let (stream, open) = self.dial(cluster, (source, peer.as_ref()), alpn, open).await?;
        let (http2, is_tcp) = match speaks {
            Speaks::Http1 => (None, false),
            Speaks::Tcp => (None, true),
            Speaks::Http2(options) => (Some(options), false),
            Speaks::Auto(options) => {
                let options = Some(options).filter(|_| stream.alpn() == Some(b"h2"));
                // The host may choose otherwise the next time.
                pool.chose_http1.set(options.is_none());
                match options {
                    Some(_) => stats.upstream_cx_http2_total.inc(),
                    None => stats.count_http1(),
                }
                (options, false)
            }
        };
        match http2 {
            Some(options) => self.start_http2(cluster, pool, stream, open, &options).await.map(Opened::Http2),
            None => Ok(Opened::Http1(self.start_http1(cluster, pool, stream, open, !is_tcp))),
        }
    }

    /// Opens the socket and counts how that went.
    async fn dial(
        &self,
        cluster: &WorkerCluster,
        (source, peer): (Option<Source>, Option<&PeerName>),
        alpn: AlpnFallback,
        open: OpenConnection,
    ) -> Result<(UpstreamStream, OpenConnection), PoolError> {
        let (config, stats) = (&cluster.cluster.config, &cluster.cluster.stats);
        let dial = Dial {
            socket: SocketSettings::new(config, source),
            happy_eyeballs: config.happy_eyeballs,
            limit: config.connect_timeout,
            tls: cluster.cluster.tls_of(&self.host),
            peer,
            alpn,
            connected: &open.connected,
        };
        match connect(&self.host, dial).await {
            Ok(stream) => {
                self.pool.set_failure(false);
                stats.upstream_cx_connect_ms.record(open.since.elapsed().as_millis() as u64);
                Ok((stream, open))
            }
            Err(error) => {
                stats.count_failed_connect(&error);
                self.connect_failed();
                open.by_host.set(!error.is_local() && !matches!(error, ConnectError::Timeout));
                Err(PoolError::Connect(Rc::new(error)))
            }
        }
    }

    fn start_http1(
        &self,
        cluster: &WorkerCluster,
        pool: &Rc<SourcePool>,
        stream: UpstreamStream,
        open: OpenConnection,
        keeps: bool,
    ) -> Rc<Http1Connection> {
        let config = &cluster.cluster.config;
        let connection = Rc::new(Http1Connection {
            info: Rc::new(stream.info(open.since, open.connected.get())),
            client: Rc::new(h1::ClientConnection::new(metered(cluster, stream), config.http1, config.pool.heads)),
            requests: Rc::clone(&open.requests),
            idle_since: Cell::new(None),
            drains: Cell::new(false),
            keeps,
            open,
        });
        let (watched, client) = (Rc::downgrade(&connection), Rc::downgrade(&connection.client));
        let (limit, stats) = (cluster.cluster.config.idle_timeout, Arc::clone(&cluster.cluster.stats));
        let life = cluster.cluster.config.pool.lifetime();
        let home = Rc::downgrade(pool);
        // It only sleeps while the connection is in use.
        tokio::task::spawn_local(async move {
            let idle = idle_watch(limit, || watched.upgrade().map(|connection| connection.idle_since.get()));
            let closed =
                std::future::poll_fn(|cx| client.upgrade().map_or(Poll::Ready(()), |client| client.poll_idle(cx)));
            tokio::select! {
                biased;
                () = closed => {}
                () = idle => stats.upstream_cx_idle_timeout.inc(),
                () = elapsed(life) => {
                    stats.upstream_cx_max_duration_reached.inc();
                    // The request that has it finishes.
                    watched.upgrade().inspect(|connection| connection.drains.set(true));
                }
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
        let stream = h2::Goaways::new(metered(cluster, stream), cluster.cluster.stats.upstream_cx_close_notify);
        let started = h2::ClientConnection::start(stream, options, buffer, cluster.cluster.config.pool.heads).await;
        let (client, driver) = started.map_err(|error| PoolError::Handshake(Rc::new(error)))?;
        let connection = Rc::new(Http2Connection {
            client,
            info,
            requests: Rc::clone(&open.requests),
            active: Cell::new(0),
            idle_since: Cell::new(Some(Instant::now())),
            wear: Wear::of(cluster),
            listed: Cell::new(false),
            forgotten: Cell::new(false),
            most: options.max_concurrent_streams.max(1),
            counts_streams: options.counts_streams,
        });
        let (watched, home) = (Rc::downgrade(&connection), Rc::downgrade(pool));
        let limit = cluster.cluster.config.idle_timeout;
        let life = cluster.cluster.config.pool.lifetime();
        tokio::task::spawn_local(async move {
            let idle = idle_watch(limit, || watched.upgrade().map(|connection| connection.idle_since.get()));
            let mut driver = pin!(driver);
            let mut driver = std::future::poll_fn(|cx| {
                let polled = driver.as_mut().poll(cx);
                if let (Some(home), Some(connection)) = (home.upgrade(), watched.upgrade())
                    && connection.client.has_new_limit()
                {
                    home.offer(&connection);
                }
                polled
            });
            let mut blames = false;
            tokio::select! {
                result = &mut driver => {
                    // It also ends when nobody holds it any more, and where the host does not speak HTTP/2.
                    let by_us = result.as_ref().is_err_and(::h2::Error::is_library);
                    open.by_host.set(watched.strong_count() > 0 && !by_us);
                    // As by Envoy, whose requests have gone by then.
                    blames = by_us;
                    log_end(result);
                }
                () = idle => open.stats.upstream_cx_idle_timeout.inc(),
                () = elapsed(life) => {
                    open.stats.upstream_cx_max_duration_reached.inc();
                    if let (Some(home), Some(connection)) = (home.upgrade(), watched.upgrade()) {
                        home.forget_http2(&connection);
                    }
                    // It ends with the last of its streams.
                    log_end(driver.await);
                }
            }
            if let Some(connection) = watched.upgrade() {
                connection.client.close();
                open.in_use.set(connection.active.get() > 0 && !blames);
                home.upgrade().inspect(|home| home.forget_http2(&connection));
            }
            drop(open);
        });
        Ok(connection)
    }
}

/// A connection to one of the cluster's hosts whose bytes are counted.
fn metered(cluster: &WorkerCluster, stream: UpstreamStream) -> Metered<UpstreamStream> {
    let stats = &cluster.cluster.stats;
    Metered::new(stream, stats.upstream_cx_rx_bytes_total, stats.upstream_cx_tx_bytes_total)
}

/// Ends when `limit` has passed; without one, never.
async fn elapsed(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
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

fn log_end(result: Result<(), ::h2::Error>) {
    if let Err(error) = result {
        tracing::debug!(%error, "upstream connection ended");
    }
}

/// Counts an open connection for as long as it lives.
struct OpenConnection {
    /// Not the cluster, which would stay with all of its hosts.
    stats: Arc<ClusterStats>,
    /// With its priority.
    breakers: (Arc<Breakers>, bool),
    host: Arc<Host>,
    worker: usize,
    pool: Weak<SourcePool>,
    /// Those of all of the cluster's pools, where somebody counts them.
    of_cluster: Option<Rc<Cell<u32>>>,
    since: Instant,
    /// When it was there, before its TLS handshake.
    connected: Cell<Option<Instant>>,
    /// How many it has carried.
    requests: Rc<Cell<u32>>,
    /// What its end is counted as.
    by_host: Cell<bool>,
    in_use: Cell<bool>,
}

impl OpenConnection {
    fn new(need: &Need<'_>, host: &WorkerHost, pool: &Rc<SourcePool>) -> OpenConnection {
        let (cluster, high) = (need.cluster, need.high);
        cluster.cluster.breakers.take(Resource::Connections, high);
        let stats = &cluster.cluster.stats;
        stats.upstream_cx_total.inc();
        stats.upstream_cx_active.inc();
        host.count(HostCounter::CxTotal, 1);
        host.count(HostCounter::CxActive, 1);
        pool.open.set(pool.open.get() + 1);
        let of_cluster = cluster.ahead.as_ref().map(|(_, ahead)| Rc::clone(&ahead.open));
        of_cluster.as_ref().inspect(|open| open.set(open.get() + 1));
        OpenConnection {
            of_cluster,
            stats: Arc::clone(&cluster.cluster.stats),
            breakers: (Arc::clone(&cluster.cluster.breakers), high),
            host: Arc::clone(&host.host),
            worker: cluster.worker(),
            pool: Rc::downgrade(pool),
            since: Instant::now(),
            connected: Cell::new(None),
            requests: Rc::default(),
            by_host: Cell::new(false),
            in_use: Cell::new(false),
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let (breakers, high) = &self.breakers;
        breakers.give_back(Resource::Connections, *high);
        let stats = &self.stats;
        stats.upstream_cx_active.dec();
        stats.count_end(self.by_host.get(), self.in_use.get());
        stats.upstream_cx_length_ms.record(self.since.elapsed().as_millis() as u64);
        if self.requests.get() > 0 {
            stats.upstream_rq_per_cx.record(self.requests.get().into());
        }
        self.host.counters.add(self.worker, HostCounter::CxActive, -1);
        if let Some(open) = &self.of_cluster {
            open.set(open.get() - 1);
        }
        if let Some(pool) = self.pool.upgrade() {
            pool.open.set(pool.open.get() - 1);
            // Without anybody it would be news for whoever comes next.
            if pool.waiting.count() > 0 {
                pool.gone.notify_one();
            }
            pool.settle();
        }
    }
}

/// A gauge that is one higher for as long as this lives.
pub(crate) struct Decrement(Gauge);

impl Decrement {
    /// Adds one now, and takes it away when dropped.
    pub(crate) fn after_inc(gauge: Gauge) -> Decrement {
        gauge.inc();
        Decrement(gauge)
    }
}

impl Drop for Decrement {
    fn drop(&mut self) {
        self.0.dec();
    }
}
