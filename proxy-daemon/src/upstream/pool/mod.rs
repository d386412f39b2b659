//! A worker's connections to one host. See LIFECYCLE.md.

mod clients;
mod counted;
mod lent;
mod opened;
mod shortage;
mod waiting;

use std::{
    cell::{Cell, OnceCell, RefCell},
    hash::RandomState,
    rc::Rc,
};

use hashbrown::Equivalent;
use tokio::sync::Notify;

pub use clients::{Client, OwnPools};
pub use lent::{Connection, Reset, ResetReason};
pub(crate) use opened::Decrement;

use self::{
    counted::{Counted, Resting},
    lent::{Sender, Stream},
    opened::{Http1Connection, Http2Connection},
    waiting::Waiting,
};
use super::{ConnectError, HostCounter, Seen, WorkerCluster, WorkerHost, breakers::Pending, connect::Source};
use crate::{config::model::Http2Options, tls::PeerName};

/// Why no connection could be had.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    /// The host could not be connected to.
    #[error(transparent)]
    Connect(Rc<ConnectError>),
    /// The HTTP/2 preface or the first settings failed.
    #[error("protocol error: {0}")]
    Handshake(Rc<::h2::Error>),
    /// A circuit breaker is open.
    #[error("overflow")]
    Overflow,
    /// There is a connection, and as many requests as may be.
    #[error("overflow")]
    TooManyRequests,
    /// There are as many pools as may be.
    #[error("no connection pool")]
    NoPool,
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

/// Ways to use a host that have pools of their own, as in Envoy: what may be wanted, for each priority.
const WAYS: usize = 8;

/// What a request needs a connection for.
#[derive(Clone, Copy)]
struct Need<'a> {
    cluster: &'a Rc<WorkerCluster>,
    wanted: Wanted<'a>,
    source: Option<Source>,
    /// What the request calls the host, where the handshake goes by that.
    peer: Option<&'a PeerName>,
    /// The client's connection, where each has pools of its own.
    client: Option<Client<'a>>,
    high: bool,
}

impl Need<'_> {
    fn way(&self) -> usize {
        let kind = match self.wanted {
            Wanted::Http1 => 0,
            Wanted::Http2(_) => 1,
            Wanted::Auto(_) => 2,
            Wanted::Tcp => 3,
        };
        kind * 2 + usize::from(self.high)
    }
}

/// What makes connections of one kind different from each other.
#[derive(PartialEq, Eq, Hash)]
struct Key {
    source: Option<Source>,
    peer: Option<Box<str>>,
    client: Option<u64>,
    way: usize,
}

/// The same, borrowed.
#[derive(Hash)]
struct KeyRef<'a> {
    source: Option<Source>,
    peer: Option<&'a str>,
    client: Option<u64>,
    way: usize,
}

impl Equivalent<Key> for KeyRef<'_> {
    fn equivalent(&self, key: &Key) -> bool {
        (self.source, self.peer, self.client, self.way) == (key.source, key.peer.as_deref(), key.client, key.way)
    }
}

/// This worker's connections to one host, by what they are for, by the source address that they keep, by what the host has been
/// called in the TLS handshake, and by whom they are for.
#[derive(Default)]
pub struct Pool {
    direct: [OnceCell<Rc<SourcePool>>; WAYS],
    by_key: RefCell<hashbrown::HashMap<Key, Rc<SourcePool>, RandomState>>,
    /// Those of them that make room for others.
    resting: Rc<Resting>,
    retired: Cell<bool>,
    /// The last connect has failed, and nobody has asked.
    failed: Cell<bool>,
    /// The host has gone away from requests that it has not looked at.
    loses: Cell<bool>,
    /// Connections of earlier ages are not used again.
    age: Cell<u32>,
    /// How often what a TCP proxy has was to end.
    closings: Cell<u32>,
    closed: Notify,
    /// Connections of TCP proxies, which are not of the pools.
    pub(super) tunnels: Cell<u32>,
    /// Told of the end of each.
    pub(super) tunnel_ended: Notify,
}

#[derive(Default)]
struct SourcePool {
    /// The last one used is used first, so that the others can grow old.
    idle: RefCell<Vec<Rc<Http1Connection>>>,
    /// Those that have room for another request. The last one has it.
    http2: RefCell<Vec<Rc<Http2Connection>>>,
    /// The host has chosen HTTP/1.1 where it had the choice.
    chose_http1: Cell<bool>,
    /// Nothing is kept in it any more: its client has gone.
    is_over: Cell<bool>,
    open: Cell<u32>,
    /// Where it is one of those that there may be only so many of.
    counted: RefCell<Option<Counted>>,
    /// Its host has been told that no request uses it.
    rests: Cell<bool>,
    /// For how many requests there will be room when the connects that are under way are through.
    coming: Cell<u64>,
    /// Requests that have a connection, or wait for one: counted where the cluster has connections to spare.
    demand: Cell<u32>,
    /// Requests without a connection. While there are any, nothing is idle, and no HTTP/2 connection has room.
    waiting: Waiting,
    /// Told when a connection is gone, for those that wait: there may be room for another one.
    gone: Notify,
}

impl Pool {
    fn of(&self, need: &Need<'_>) -> Rc<SourcePool> {
        let way = need.way();
        if need.source.is_none() && need.peer.is_none() && need.client.is_none() {
            return Rc::clone(self.direct[way].get_or_init(Rc::default));
        }
        let (source, peer) = (need.source, need.peer.map(|peer| &*peer.name));
        let client = need.client.map(|client| client.id);
        let mut by_key = self.by_key.borrow_mut();
        if let Some(known) = by_key.get(&KeyRef { source, peer, client, way }) {
            return Rc::clone(known);
        }
        // Sources come and go, as pods do, and so do names and clients: whenever the map would grow, those without a connection leave it.
        if by_key.len() == by_key.capacity() {
            by_key.retain(|_, pool| pool.open.get() > 0 || Rc::strong_count(pool) > 1);
        }
        let new: Rc<SourcePool> = Rc::default();
        if let Some(client) = need.client {
            client.pools.add(&new);
        }
        by_key.insert(Key { source, peer: peer.map(Into::into), client, way }, Rc::clone(&new));
        new
    }

    /// Whether what was opened or lent at that age may be used again.
    fn keeps(&self, age: u32) -> bool {
        !self.retired.get() && self.age.get() == age
    }

    #[cfg(test)]
    pub(super) fn is_retired(&self) -> bool {
        self.retired.get()
    }

    /// What the last connect came to.
    pub(super) fn set_failure(&self, failed: bool) {
        self.failed.set(failed);
    }

    /// Whether the last connect has failed; asked once for each failure.
    pub(super) fn take_failure(&self) -> bool {
        self.failed.take()
    }

    fn set_loses(&self) {
        self.loses.set(true);
    }

    /// Whether connections have ended with requests on them that the host had not looked at: they can be sent again.
    pub fn loses(&self) -> bool {
        self.loses.get()
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
        let by_key = self.by_key.borrow();
        for pool in by_key.values().chain(self.direct.iter().filter_map(OnceCell::get)) {
            pool.let_go();
        }
    }
}

/// Counts a request as one that waits for a connection, until the guard is dropped.
///
/// # Errors
/// As many wait as may.
fn wait(cluster: &WorkerCluster, high: bool) -> Result<(Decrement, Pending<'_>), PoolError> {
    let stats = &cluster.cluster.stats;
    let counted = Pending::new(cluster, high).ok_or(PoolError::Overflow)?;
    stats.upstream_rq_pending_total.inc();
    Ok((Decrement::after_inc(stats.upstream_rq_pending_active), counted))
}

impl WorkerHost {
    /// A connection for one request: one that has room for it, or a new one within the cluster's limits. `peer`: what the request calls the
    /// host, where the handshake goes by that; `client`: the connection that it came on.
    ///
    /// # Errors
    /// No connection may be waited for, or a connect failed: with one, all requests that wait fail.
    pub async fn acquire(
        self: &Rc<Self>,
        cluster: &Rc<WorkerCluster>,
        wanted: Wanted<'_>,
        (source, peer, client): (Option<Source>, Option<&PeerName>, Option<Client<'_>>),
        high_priority: bool,
    ) -> Result<Connection, PoolError> {
        // Without TLS nobody is asked for anything.
        let peer = peer.filter(|_| cluster.cluster.tls_of(&self.host).is_some());
        let client = client.filter(|_| cluster.cluster.config.pool.per_client);
        let acquired = self.acquire_unseen(&Need { cluster, wanted, source, peer, client, high: high_priority }).await;
        match &acquired {
            Ok(_) => self.saw(Seen::Connected),
            Err(PoolError::Connect(_) | PoolError::Handshake(_)) => self.saw(Seen::ConnectFailed),
            // It is not the host's fault.
            Err(PoolError::Overflow | PoolError::TooManyRequests | PoolError::NoPool) => {}
        }
        acquired
    }

    async fn acquire_unseen(self: &Rc<Self>, need: &Need<'_>) -> Result<Connection, PoolError> {
        let cluster = need.cluster;
        let pool = self.pool.of(need);
        WorkerHost::connect_ahead(need);
        let demand = pool.demand(cluster);
        let ready = match pool.take_ready() {
            Some(ready) => {
                if demand.is_some() {
                    self.connect_more(need, &pool);
                }
                ready
            }
            None => {
                // A request without a connection is one of those that wait, while its own is opened too.
                self.admit(need, &pool)?;
                let _pending = wait(cluster, need.high).inspect_err(|_| pool.settle())?;
                Box::pin(self.handed(need, &pool)).await?
            }
        };
        // As by Envoy, which looks when there is a connection.
        if cluster.cluster.has_too_many_requests(need.high) {
            // A stream leaves room when it is dropped.
            if let Sender::Http1(connection) = ready.sender {
                pool.hand_on(connection, ready.reused);
            }
            cluster.cluster.stats.upstream_rq_active_overflow.inc();
            self.count(HostCounter::RqError, 1);
            return Err(PoolError::TooManyRequests);
        }
        Ok(Connection::new(self, cluster, &pool, ready, demand))
    }

    /// Waits until there is a connection: those that have waited longest have it first.
    async fn handed(self: &Rc<Self>, need: &Need<'_>, pool: &Rc<SourcePool>) -> Result<Ready, PoolError> {
        let mut waiter = pool.join(&self.pool);
        self.connect_more(need, pool);
        loop {
            tokio::select! {
                biased;
                handed = waiter.handed() => return handed,
                () = pool.gone.notified() => self.connect_more(need, pool),
            }
        }
    }
}

/// A connection that has room for a request.
struct Ready {
    sender: Sender,
    /// It has carried requests before: the host may have closed it in the meantime.
    reused: bool,
}

impl SourcePool {
    /// No connection that there is now is used again.
    fn let_go(&self) {
        let idle = std::mem::take(&mut *self.idle.borrow_mut());
        drop(idle);
        // Its streams finish: the last one lets go of it.
        let http2 = std::mem::take(&mut *self.http2.borrow_mut());
        http2.iter().for_each(|connection| connection.forget());
    }

    fn take_ready(self: &Rc<Self>) -> Option<Ready> {
        if let Some(stream) = self.take_stream() {
            let reused = stream.connection.requests.get() > 1;
            return Some(Ready { sender: Sender::Http2(stream), reused });
        }
        self.take_idle().map(|idle| Ready { sender: Sender::Http1(idle), reused: true })
    }

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

    fn take_stream(self: &Rc<Self>) -> Option<Stream> {
        loop {
            let connection = Rc::clone(self.http2.borrow().last()?);
            let stream = connection.has_room().then(|| Stream::new(&connection, self));
            // Full now, or since its host has changed its mind.
            if !connection.has_room() {
                self.unlist(&connection);
            }
            if stream.is_some() {
                return stream;
            }
        }
    }

    /// The connection may have room again.
    fn offer(self: &Rc<Self>, connection: &Rc<Http2Connection>) {
        if connection.has_room() && !connection.listed.replace(true) {
            self.http2.borrow_mut().push(Rc::clone(connection));
        }
        self.hand_out();
        self.rest();
    }

    fn unlist(&self, connection: &Rc<Http2Connection>) {
        if connection.listed.take() {
            let mut listed = self.http2.borrow_mut();
            // From the end: mostly it is the last one.
            if let Some(at) = listed.iter().rposition(|it| Rc::ptr_eq(it, connection)) {
                listed.remove(at);
            }
        }
    }

    /// It has no further requests.
    fn forget_http2(&self, connection: &Rc<Http2Connection>) {
        self.unlist(connection);
        connection.forget();
    }
}
