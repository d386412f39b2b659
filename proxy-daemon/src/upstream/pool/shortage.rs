//! When connections are opened: for requests that wait, and those that `preconnect_policy` has opened before a request needs them.

use std::{
    cell::Cell,
    rc::{Rc, Weak},
};

use super::{Need, SourcePool, Wanted};
use crate::upstream::{Standing, WorkerCluster, WorkerHost, ahead::wants_more, breakers::Resource};

/// So many are begun at a time at most, as by Envoy.
const AT_ONCE: u32 = 3;

/// A request that has a connection, or waits for one.
pub(super) struct Demand {
    pool: Weak<SourcePool>,
    /// Those of all of the cluster's pools.
    of_cluster: Option<Rc<Cell<u32>>>,
}

impl Drop for Demand {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            pool.demand.set(pool.demand.get() - 1);
        }
        if let Some(of_cluster) = &self.of_cluster {
            of_cluster.set(of_cluster.get() - 1);
        }
    }
}

/// Room that there will be when a connect is through.
pub(super) struct Coming(Rc<SourcePool>, u64);

impl Coming {
    pub(super) fn new(pool: &Rc<SourcePool>, requests: u32) -> Coming {
        pool.coming.set(pool.coming.get() + u64::from(requests));
        Coming(Rc::clone(pool), requests.into())
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.coming.set(self.0.coming.get() - self.1);
    }
}

impl SourcePool {
    /// There is one more request; `None`: nobody counts them.
    pub(super) fn demand(self: &Rc<Self>, cluster: &WorkerCluster) -> Option<Demand> {
        let of_cluster = cluster.ahead.as_ref().map(|(_, ahead)| Rc::clone(&ahead.demand));
        if of_cluster.is_none() && cluster.cluster.config.pool.preconnect.is_none() {
            return None;
        }
        self.demand.set(self.demand.get() + 1);
        of_cluster.as_ref().inspect(|of_cluster| of_cluster.set(of_cluster.get() + 1));
        Some(Demand { pool: Rc::downgrade(self), of_cluster })
    }
}

impl Need<'_> {
    /// Whether connections are opened that no request needs. An HTTP/2 connection has room for many requests.
    fn spares(&self, pool: &SourcePool) -> bool {
        match self.wanted {
            Wanted::Http1 => true,
            Wanted::Auto(_) => pool.chose_http1.get(),
            Wanted::Http2(_) | Wanted::Tcp => false,
        }
    }

    /// How many requests a new connection has room for. One, where that is not known yet.
    pub(super) fn room(&self) -> u32 {
        match self.wanted {
            Wanted::Http1 | Wanted::Tcp | Wanted::Auto(_) => 1,
            Wanted::Http2(options) => {
                let most = options.max_concurrent_streams.max(1);
                match self.cluster.cluster.config.max_requests_per_connection {
                    0 => most,
                    requests => most.min(requests),
                }
            }
        }
    }
}

impl WorkerHost {
    /// Begins connects where more requests wait than those that are under way have room for, or where there are fewer to spare than
    /// wanted. A pool without any connection may always open one, as in Envoy: its requests would wait for ever.
    pub(super) fn connect_more(self: &Rc<Self>, need: &Need<'_>, pool: &Rc<SourcePool>) {
        for _ in 0..AT_ONCE {
            if !self.is_short(need, pool) || !self.connect_one(need, pool) {
                return;
            }
        }
    }

    /// Begins one connect; `false`: there are as many connections as there may be.
    fn connect_one(self: &Rc<Self>, need: &Need<'_>, pool: &Rc<SourcePool>) -> bool {
        let cluster = &need.cluster.cluster;
        let fits = !cluster.is_full(Resource::Connections, need.high) && !self.is_full(cluster, need.high);
        if !fits {
            need.cluster.cluster.stats.upstream_cx_overflow.inc();
        }
        if fits || pool.open.get() == 0 {
            self.begin_connect(need, pool);
        }
        fits
    }

    /// Connects to the hosts of requests to come, where there are fewer connections to all hosts than wanted: before a request itself has
    /// one, as in Envoy.
    pub(super) fn connect_ahead(need: &Need<'_>) {
        let Some((ratio, ahead)) = &need.cluster.ahead else { return };
        for _ in 0..AT_ONCE {
            if !wants_more(ahead.demand.get(), ahead.open.get(), *ratio) {
                return;
            }
            let Some(host) = need.cluster.choose_ahead() else { return };
            let pool = host.pool.of(need);
            let is_short = need.spares(&pool) && wants_more(pool.demand.get(), pool.open.get(), *ratio);
            let is_well = is_short && host.host.standing() == Standing::Healthy;
            if !is_well || host.admit(need, &pool).is_err() || !host.connect_one(need, &pool) {
                return;
            }
        }
    }

    fn is_short(&self, need: &Need<'_>, pool: &SourcePool) -> bool {
        if pool.waiting.count() as u64 > pool.coming.get() {
            return true;
        }
        let ratio = need.cluster.cluster.config.pool.preconnect.filter(|_| need.spares(pool));
        ratio.is_some_and(|ratio| {
            // Only a host that is well is worth it.
            f64::from(pool.demand.get()) * ratio > f64::from(pool.open.get())
                && self.host.standing() == Standing::Healthy
        })
    }
}
