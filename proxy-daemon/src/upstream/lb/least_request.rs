//! `LEAST_REQUEST`: of a few random hosts, the least busy one for its weight (the power of two choices).

use std::rc::Rc;

use super::{LoadBalancer, Wish, WorkerHost};

pub(super) struct LeastRequest {
    choices: u32,
}

impl LeastRequest {
    pub(super) fn new(choices: u32) -> LeastRequest {
        LeastRequest { choices: choices.max(2) }
    }
}

impl LoadBalancer for LeastRequest {
    fn pick(&mut self, hosts: &[Rc<WorkerHost>], _wish: Wish) -> Option<usize> {
        if hosts.is_empty() {
            return None;
        }
        // Compared as active/weight without a division: a/w < b/v is a*v < b*w.
        let cost = |index: usize| (u64::from(hosts[index].active()) + 1, u64::from(hosts[index].host.weight));
        let mut best = fastrand::usize(..hosts.len());
        for _ in 1..self.choices {
            let other = fastrand::usize(..hosts.len());
            let ((active, weight), (best_active, best_weight)) = (cost(other), cost(best));
            if active * best_weight < best_active * weight {
                best = other;
            }
        }
        Some(best)
    }
}
