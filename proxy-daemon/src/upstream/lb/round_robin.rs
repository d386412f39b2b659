//! `ROUND_ROBIN`: in turn where all weights are equal, else by earliest deadline first, as Envoy's.

use std::{cmp::Ordering, collections::BinaryHeap, rc::Rc};

use super::{LoadBalancer, Wish, WorkerHost};

pub(super) enum RoundRobin {
    Equal { next: usize },
    Weighted { heap: BinaryHeap<Entry> },
}

pub(super) struct Entry {
    deadline: f64,
    /// Breaks ties, so that equal hosts take turns.
    order: u64,
    index: usize,
    step: f64,
}

impl RoundRobin {
    /// Starts anywhere, so that workers do not all begin with the same host.
    pub(super) fn new(hosts: &[Rc<WorkerHost>]) -> RoundRobin {
        RoundRobin::from_weights(hosts.iter().map(|host| host.host.weight))
    }

    fn from_weights(weights: impl ExactSizeIterator<Item = u32> + Clone) -> RoundRobin {
        let first = weights.clone().next().unwrap_or(1);
        if weights.clone().all(|weight| weight == first) {
            return RoundRobin::Equal { next: fastrand::usize(..weights.len().max(1)) };
        }
        let heap = weights.enumerate().map(|(index, weight)| {
            let step = 1.0 / f64::from(weight.max(1));
            Entry { deadline: step * fastrand::f64(), order: index as u64, index, step }
        });
        RoundRobin::Weighted { heap: heap.collect() }
    }
}

impl LoadBalancer for RoundRobin {
    fn pick(&mut self, hosts: &[Rc<WorkerHost>], _wish: Wish) -> Option<usize> {
        self.next(hosts.len())
    }
}

impl RoundRobin {
    fn next(&mut self, hosts: usize) -> Option<usize> {
        match self {
            RoundRobin::Equal { next } => {
                let index = if *next < hosts { *next } else { 0 };
                *next = index + 1;
                (hosts > 0).then_some(index)
            }
            RoundRobin::Weighted { heap } => {
                let mut top = heap.peek_mut()?;
                let index = top.index;
                top.deadline += top.step;
                top.order = top.order.wrapping_add(hosts as u64);
                Some(index)
            }
        }
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> Ordering {
        // Reversed: the heap's greatest is the earliest deadline.
        other.deadline.total_cmp(&self.deadline).then(other.order.cmp(&self.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Entry {}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(weights: &[u32], picks: usize) -> Vec<usize> {
        let mut balancer = RoundRobin::from_weights(weights.iter().copied());
        let mut counts = vec![0; weights.len()];
        for _ in 0..picks {
            counts[balancer.next(weights.len()).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn equal_weights_take_turns() {
        assert_eq!(counts(&[7, 7, 7], 30), [10, 10, 10]);
    }

    #[test]
    fn weights_give_shares() {
        let counts = counts(&[1, 2, 5], 800);
        for (count, share) in counts.iter().zip([100_i64, 200, 500]) {
            assert!((*count as i64 - share).abs() <= 1, "{counts:?}");
        }
    }

    #[test]
    fn no_host_no_pick() {
        assert_eq!(RoundRobin::from_weights([].into_iter()).next(0), None);
    }
}
