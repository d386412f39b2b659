//! `max_connection_pools`: how many pools a cluster has, in all workers. As by Envoy a pool is one of them for as long as it has a
//! connection, or a request that waits for one; TCP proxies have none.

use std::{cell::OnceCell, sync::Arc};

use super::{Need, Pool, PoolError, SourcePool, Wanted};
use crate::{
    config::model::Thresholds,
    upstream::{
        WorkerHost,
        breakers::{Breakers, Resource},
    },
};

/// One of a cluster's pools, for as long as this lives.
pub(super) struct Counted {
    breakers: Arc<Breakers>,
    high: bool,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.breakers.give_back(Resource::Pools, self.high);
    }
}

impl WorkerHost {
    /// The pool is about to have its first connection. Where there are as many pools as may be, one of this host's that no request uses
    /// makes room.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn admit(&self, need: &Need<'_>, pool: &SourcePool) -> Result<(), PoolError> {
        let cluster = &need.cluster.cluster;
        let is_limited = cluster.limits(need.high).max_connection_pools() != Thresholds::ANY_POOLS;
        if !is_limited || matches!(need.wanted, Wanted::Tcp) || pool.counted.borrow().is_some() {
            return Ok(());
        }
        if cluster.is_full(Resource::Pools, need.high) && !self.pool.free_one(need.high) {
            cluster.stats.upstream_cx_pool_overflow.inc();
            return Err(PoolError::NoPool);
        }
        cluster.breakers.take(Resource::Pools, need.high);
        pool.counted.replace(Some(Counted { breakers: Arc::clone(&cluster.breakers), high: need.high }));
        Ok(())
    }
}

impl Pool {
    /// Closes a pool of that priority that no request uses; `false`: there is none.
    fn free_one(&self, high: bool) -> bool {
        let by_key = self.by_key.borrow();
        let mut pools = by_key.values().chain(self.direct.iter().filter_map(OnceCell::get));
        let Some(unused) = pools.find(|pool| pool.is_unused(high)) else { return false };
        unused.let_go();
        drop(unused.counted.take());
        true
    }
}

impl SourcePool {
    fn is_unused(&self, high: bool) -> bool {
        let is_one = self.counted.borrow().as_ref().is_some_and(|counted| counted.high == high);
        let resting = self.http2.borrow().iter().filter(|connection| connection.active.get() == 0).count();
        let idle = self.idle.borrow().len() + resting;
        is_one && self.waiting.count() == 0 && idle == self.open.get() as usize
    }

    /// A connection has gone, or a request that waited: without any there is no pool.
    pub(super) fn settle(&self) {
        if self.open.get() == 0 && self.waiting.count() == 0 {
            drop(self.counted.take());
        }
    }
}
