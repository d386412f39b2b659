//! Connections for requests to come: `preconnect_policy.predictive_preconnect_ratio`. The hosts of the next requests are chosen beforehand,
//! and connected to, in each worker.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    rc::Rc,
};

use super::{PickCx, WorkerHost};
use crate::config::model::{ClusterConfig, LbPolicy};

/// What a worker has prepared for requests to come, of one cluster.
#[derive(Default)]
pub(super) struct Ahead {
    /// The hosts of the next ones, in their order.
    hosts: RefCell<VecDeque<Rc<WorkerHost>>>,
    /// Requests that have a connection, or wait for one.
    pub(super) demand: Rc<Cell<u32>>,
    /// Connections, also those that are being opened.
    pub(super) open: Rc<Cell<u32>>,
}

impl Ahead {
    /// How many connections there are to be for each request; `None`: as many as requests need. What chooses hosts by more than the hosts
    /// cannot choose any beforehand, as in Envoy.
    pub(super) fn ratio(config: &ClusterConfig) -> Option<f64> {
        let chooses = matches!(config.lb_policy, LbPolicy::RoundRobin | LbPolicy::LeastRequest(_) | LbPolicy::Random);
        config.pool.predictive.filter(|_| chooses && config.lb.subsets.is_none())
    }

    /// The host that was chosen for the next request; not for one that goes by more than the others.
    pub(super) fn take(&self, cx: &PickCx<'_>) -> Option<Rc<WorkerHost>> {
        let plain = cx.attempt == 0 && cx.tried.is_none() && cx.target.is_none();
        if plain { self.hosts.borrow_mut().pop_front() } else { None }
    }

    /// One more is chosen by `choose`, unless there are `most` already.
    pub(super) fn add(&self, most: usize, choose: impl FnOnce() -> Option<Rc<WorkerHost>>) -> Option<Rc<WorkerHost>> {
        if self.hosts.borrow().len() >= most {
            return None;
        }
        let host = choose()?;
        self.hosts.borrow_mut().push_back(Rc::clone(&host));
        Some(host)
    }

    /// The hosts are others now, or stand otherwise.
    pub(super) fn forget(&self) {
        self.hosts.borrow_mut().clear();
    }
}

/// Whether so many requests, and one more, want more connections than there are.
pub(super) fn wants_more(demand: u32, open: u32, ratio: f64) -> bool {
    f64::from(demand.saturating_add(1)) * ratio > f64::from(open)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_wanted_for_the_requests_and_the_one_that_comes() {
        assert!(wants_more(0, 1, 1.5));
        assert!(!wants_more(0, 2, 1.5));
        assert!(wants_more(1, 2, 1.5));
        assert!(!wants_more(1, 3, 1.5));
        assert!(!wants_more(u32::MAX, u32::MAX, 1.0));
    }
}
