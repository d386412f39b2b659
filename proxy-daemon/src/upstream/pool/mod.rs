//! A worker's connections to one host. See LIFECYCLE.md.

mod lent;
mod opened;
mod preconnect;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
};

use tokio::sync::{Mutex, Notify};

pub use lent::{Connection, Reset, ResetReason};
pub(crate) use opened::Decrement;

use self::{
    lent::Sender,
    opened::{Http1Connection, Http2Connection},
    preconnect::Spare,
};
use super::{ConnectError, HostCounter, Seen, WorkerCluster, WorkerHost, connect::Source};
use crate::config::model::Http2Options;

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
    /// Connections of earlier ages are not used again.
    age: Cell<u32>,
    /// How often what a TCP proxy has was to end.
    closings: Cell<u32>,
    closed: Notify,
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
    spare: Spare,
    /// Told when a connection comes back or goes, for those that wait at a circuit breaker.
    released: Notify,
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

    #[cfg(test)]
    pub(super) fn is_retired(&self) -> bool {
        self.retired.get()
    }

    /// Nothing idle is kept from now on.
    pub(super) fn retire(&self) {
        self.retired.set(true);
        self.let_go();
    }

    /// No connection that there is now is used again: what is in flight finishes.
    pub(super) fn drain(&self) {
        self.age.set(self.age.get().wrapping_add(1));
        self.let_go();
    }

    /// As [`drain`](Self::drain), and what a TCP proxy has ends at once.
    pub(super) fn close(&self) {
        self.drain();
        self.closings.set(self.closings.get().wrapping_add(1));
        self.closed.notify_waiters();
    }

    /// How often it has been closed.
    pub fn closings(&self) -> u32 {
        self.closings.get()
    }

    /// Waits until it is closed once more than it was at that time.
    pub async fn closed_since(&self, closings: u32) {
        // Nothing comes in between: all of it is of this thread.
        while self.closings.get() == closings {
            self.closed.notified().await;
        }
    }

    fn let_go(&self) {
        let by_source = self.by_source.borrow();
        for pool in by_source.values().chain([&self.direct]) {
            let idle = std::mem::take(&mut *pool.idle.borrow_mut());
            drop(idle);
            // Its streams finish: the last one lets go of it.
            pool.http2.borrow_mut().take();
        }
    }
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
        cluster: &Rc<WorkerCluster>,
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
        cluster: &Rc<WorkerCluster>,
        wanted: Wanted<'_>,
        source: Option<Source>,
        high_priority: bool,
    ) -> Result<Connection, PoolError> {
        let pool = self.pool.source(source);
        let mut demand = cluster.cluster.config.pool.preconnect.map(|_| pool.demand());
        let mut lend = |sender, reused| Connection::new(self, cluster, &pool, (sender, demand.take()), reused);
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
                    self.preconnect(cluster, &pool, source, 0);
                    return Ok(lend(Sender::Http1(idle), true));
                }
                if pending.is_none() {
                    pending = Some(wait(cluster, high_priority)?);
                }
                if self.may_open(cluster, &pool, high_priority).await {
                    if !matches!(wanted, Wanted::Tcp) {
                        self.preconnect(cluster, &pool, source, 1);
                    }
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
