//! Pools that a client's connection has to itself, with `connection_pool_per_downstream_connection`.

use std::{
    cell::{OnceCell, RefCell},
    rc::{Rc, Weak},
};

use super::SourcePool;

/// A client's connection.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// Unique in the process.
    pub id: u64,
    /// Those that it has got until now.
    pub pools: &'a OwnPools,
}

/// The pools of one client's connection. With it their idle connections go, which nobody else could use; what is under way finishes.
/// (Envoy leaves them to `idle_timeout`.) Most clients have none, and pay for none.
#[derive(Debug, Default)]
pub struct OwnPools(OnceCell<Box<RefCell<Vec<Weak<SourcePool>>>>>);

impl OwnPools {
    pub(super) fn add(&self, pool: &Rc<SourcePool>) {
        let mut pools = self.0.get_or_init(Box::default).borrow_mut();
        // Hosts come and go while a client stays.
        if pools.len() == pools.capacity() {
            pools.retain(|pool| pool.strong_count() > 0);
        }
        pools.push(Rc::downgrade(pool));
    }
}

impl Drop for OwnPools {
    fn drop(&mut self) {
        let Some(pools) = self.0.take() else { return };
        for pool in pools.take().iter().filter_map(Weak::upgrade) {
            pool.is_over.set(true);
            pool.let_go();
        }
    }
}
