//! `preconnect_policy`: connections that are opened before a request needs them.

use std::{
    cell::Cell,
    rc::{Rc, Weak},
    time::Instant,
};

use super::{SourcePool, Wanted, lent::Sender};
use crate::upstream::{Seen, Source, Standing, WorkerCluster, WorkerHost};

/// So many are begun for the sake of one request at most, as by Envoy.
const AT_ONCE: u32 = 3;

/// A pool's requests, and what it has begun for them: counted where the cluster has connections to spare.
#[derive(Default)]
pub(super) struct Spare {
    /// Requests that have a connection, or wait for one.
    demand: Cell<u32>,
    /// Connections that are about to be opened.
    planned: Cell<u32>,
}

/// A request that has a connection, or waits for one.
pub(super) struct Demand(Weak<SourcePool>);

impl Drop for Demand {
    fn drop(&mut self) {
        if let Some(pool) = self.0.upgrade() {
            pool.spare.demand.set(pool.spare.demand.get() - 1);
        }
    }
}

impl SourcePool {
    /// There is one more request.
    pub(super) fn demand(self: &Rc<Self>) -> Demand {
        self.spare.demand.set(self.spare.demand.get() + 1);
        Demand(Rc::downgrade(self))
    }

    /// Whether there are fewer connections than wanted; `more` are about to be there.
    fn is_short(&self, ratio: f64, more: u32) -> bool {
        f64::from(self.spare.demand.get()) * ratio > f64::from(self.open.get() + self.spare.planned.get() + more)
    }
}

impl WorkerHost {
    /// Opens HTTP/1.1 connections to spare. `own`: a request is about to open that many.
    pub(super) fn preconnect(
        self: &Rc<Self>,
        cluster: &Rc<WorkerCluster>,
        pool: &Rc<SourcePool>,
        source: Option<Source>,
        own: u32,
    ) {
        let Some(ratio) = cluster.cluster.config.pool.preconnect else { return };
        // Only a host that is well is worth it.
        if self.host.standing() != Standing::Healthy {
            return;
        }
        let (limits, stats) = (cluster.cluster.limits(false), &cluster.cluster.stats);
        for _ in 0..AT_ONCE {
            if !pool.is_short(ratio, own) {
                return;
            }
            let planned = u64::from(pool.spare.planned.get() + own);
            if stats.upstream_cx_active.value() + planned >= u64::from(limits.max_connections()) {
                stats.upstream_cx_overflow.inc();
                return;
            }
            pool.spare.planned.set(pool.spare.planned.get() + 1);
            let (host, cluster, pool) = (Rc::clone(self), Rc::clone(cluster), Rc::clone(pool));
            tokio::task::spawn_local(async move { host.open_spare(&cluster, &pool, source).await });
        }
    }

    async fn open_spare(&self, cluster: &WorkerCluster, pool: &Rc<SourcePool>, source: Option<Source>) {
        let age = self.pool.age.get();
        // It counts as open from now on.
        pool.spare.planned.set(pool.spare.planned.get() - 1);
        let opened = match self.open(cluster, pool, source, Wanted::Http1).await {
            Ok(Sender::Http1(opened)) => opened,
            // Nobody has asked for that.
            Ok(Sender::Http2(_)) => return,
            Err(_) => return self.saw(Seen::ConnectFailed),
        };
        self.saw(Seen::Connected);
        if !self.pool.retired.get() && self.pool.age.get() == age && opened.client.park() {
            opened.idle_since.set(Some(Instant::now()));
            pool.idle.borrow_mut().push(opened);
            pool.released.notify_one();
        }
    }
}
