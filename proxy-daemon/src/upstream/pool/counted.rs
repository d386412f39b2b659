//! `max_connection_pools`: how many pools a cluster has, in all workers. As by Envoy a pool is one of them for as long as it has a
//! connection, or a request that waits for one; TCP proxies have none.

use std::{
    cell::RefCell,
    collections::VecDeque,
    rc::{Rc, Weak},
    sync::Arc,
};

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
    /// Where it says that it has come to rest.
    resting: Rc<Resting>,
}

/// Pools of a host that have been without a request since they were counted, by priority. Some may have requests again.
#[derive(Default)]
pub(super) struct Resting([RefCell<VecDeque<Weak<SourcePool>>>; 2]);

impl Resting {
    fn of(&self, high: bool) -> &RefCell<VecDeque<Weak<SourcePool>>> {
        &self.0[usize::from(high)]
    }

    fn add(&self, pool: &Rc<SourcePool>, high: bool) {
        let mut pools = self.of(high).borrow_mut();
        // Those whose clients have gone leave before it grows, and it grows by enough for that to be rare.
        if pools.len() == pools.capacity() {
            pools.retain(|pool| pool.strong_count() > 0);
            let known = pools.len();
            pools.reserve(known + 1);
        }
        pools.push_back(Rc::downgrade(pool));
    }

    fn next(&self, high: bool) -> Option<Rc<SourcePool>> {
        let mut pools = self.of(high).borrow_mut();
        std::iter::from_fn(|| pools.pop_front()).find_map(|pool| pool.upgrade())
    }
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
    pub(super) fn admit(&self, need: &Need<'_>, pool: &Rc<SourcePool>) -> Result<(), PoolError> {
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
        let (breakers, resting) = (Arc::clone(&cluster.breakers), Rc::clone(&self.pool.resting));
        pool.counted.replace(Some(Counted { breakers, high: need.high, resting }));
        Ok(())
    }
}

impl Pool {
    /// Closes a pool of that priority that no request uses; `false`: there is none.
    fn free_one(&self, high: bool) -> bool {
        while let Some(pool) = self.resting.next(high) {
            pool.rests.set(false);
            // It will say so again when its requests have ended.
            if pool.is_unused() && pool.is_counted_as(high) {
                pool.let_go();
                drop(pool.counted.take());
                return true;
            }
        }
        false
    }
}

impl SourcePool {
    fn is_unused(&self) -> bool {
        let resting = self.http2.borrow().iter().filter(|connection| connection.active.get() == 0).count();
        let idle = self.idle.borrow().len() + resting;
        self.waiting.count() == 0 && idle == self.open.get() as usize
    }

    fn is_counted_as(&self, high: bool) -> bool {
        self.counted.borrow().as_ref().is_some_and(|counted| counted.high == high)
    }

    /// A request has ended, or a connection is there that no request has: the pool may be one that makes room for others.
    pub(super) fn rest(self: &Rc<Self>) {
        if let Some(counted) = &*self.counted.borrow()
            && !self.rests.get()
            && self.is_unused()
        {
            self.rests.set(true);
            counted.resting.add(self, counted.high);
        }
    }

    /// A connection has gone, or a request that waited: without any there is no pool.
    pub(super) fn settle(self: &Rc<Self>) {
        if self.open.get() == 0 && self.waiting.count() == 0 {
            drop(self.counted.take());
        }
        self.rest();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_that_are_gone_are_not_kept() {
        let resting = Resting::default();
        let stays: Rc<SourcePool> = Rc::default();
        resting.add(&stays, false);
        (0..100_000).for_each(|_| resting.add(&Rc::default(), false));
        assert!(resting.of(false).borrow().capacity() < 100, "they are");
        assert!(resting.next(true).is_none(), "it is of the other priority");
        assert!(resting.next(false).is_some_and(|pool| Rc::ptr_eq(&pool, &stays)));
        assert!(resting.next(false).is_none());
    }

    #[test]
    fn a_host_that_is_asked_for_room_looks_at_no_pool_twice() {
        let host = Pool::default();
        let pools: Vec<Rc<SourcePool>> = (0..1000).map(|_| Rc::default()).collect();
        for pool in &pools {
            let counted = Counted { breakers: Arc::default(), high: false, resting: Rc::clone(&host.resting) };
            counted.breakers.take(Resource::Pools, false);
            pool.counted.replace(Some(counted));
            pool.rest();
            // A second time is not another one.
            pool.rest();
            // A request has come.
            pool.open.set(1);
        }
        assert_eq!(host.resting.of(false).borrow().len(), pools.len());
        assert!(!host.free_one(false));
        assert!(host.resting.of(false).borrow().is_empty(), "those that are in use are looked for again and again");
        pools[700].open.set(0);
        pools[700].rest();
        assert!(!host.free_one(true));
        assert!(host.free_one(false) && pools[700].counted.borrow().is_none());
        assert!(!host.free_one(false));
    }
}
