//! Connections as the pool has them: how they are opened, watched while nobody uses them, and counted.

use std::{
    cell::Cell,
    pin::pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use super::{PoolError, SourcePool, Wanted, lent::Sender};
use crate::{
    config::model::Http2Options,
    http::codec::{h1, h2},
    stats::{Gauge, Metered},
    tls::AlpnFallback,
    upstream::{
        Cluster, ConnectError, Host, HostCounter, WorkerCluster, WorkerHost,
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
}

impl WorkerHost {
    pub(super) async fn open(
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
                let timed_out = matches!(error, ConnectError::Timeout);
                if timed_out {
                    stats.upstream_cx_connect_timeout.inc();
                }
                open.by_host.set(!timed_out);
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
            client: Rc::new(h1::ClientConnection::new(metered(cluster, stream))),
            requests: Rc::clone(&open.requests),
            idle_since: Cell::new(None),
            drains: Cell::new(false),
            open,
        });
        let (watched, client) = (Rc::downgrade(&connection), Rc::downgrade(&connection.client));
        let (limit, shared) = (cluster.cluster.config.idle_timeout, Arc::clone(&cluster.cluster));
        let life = shared.config.pool.max_connection_duration;
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
                () = elapsed(life) => {
                    shared.stats.upstream_cx_max_duration_reached.inc();
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
        let life = cluster.cluster.config.pool.max_connection_duration;
        tokio::task::spawn_local(async move {
            let idle = idle_watch(limit, || watched.upgrade().map(|connection| connection.idle_since.get()));
            let mut driver = pin!(driver);
            tokio::select! {
                result = &mut driver => {
                    // It also ends when nobody holds it any more.
                    open.by_host.set(watched.strong_count() > 0);
                    log_end(result);
                }
                () = idle => open.cluster.stats.upstream_cx_idle_timeout.inc(),
                () = elapsed(life) => {
                    open.cluster.stats.upstream_cx_max_duration_reached.inc();
                    if let (Some(home), Some(connection)) = (home.upgrade(), watched.upgrade()) {
                        home.forget_http2(&connection);
                    }
                    // It ends with the last of its streams.
                    log_end(driver.await);
                }
            }
            if let Some(connection) = watched.upgrade() {
                connection.client.close();
                open.in_use.set(connection.active.get() > 0);
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
    cluster: Arc<Cluster>,
    host: Arc<Host>,
    worker: usize,
    pool: Weak<SourcePool>,
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
            by_host: Cell::new(false),
            in_use: Cell::new(false),
        }
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        let stats = &self.cluster.stats;
        stats.upstream_cx_active.dec();
        stats.count_end(self.by_host.get(), self.in_use.get());
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
