//! Requests that are dropped before a host is chosen: `ClusterLoadAssignment.policy.drop_overloads`.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use crate::{
    config::model::{DropOverload, LocalityEndpoints},
    layered_runtime::with_values,
    stats::HiddenCounter,
};

/// In percent, what the share may be at most.
const LIMIT: &str = "load_balancing_policy.drop_overload_limit";
const ALL: u32 = 1_000_000;

/// The share of a cluster's requests that is dropped.
#[derive(Debug, Clone, Default)]
pub(super) struct Drops {
    /// Of a million requests.
    share: u32,
    configured: Option<Arc<DropOverload>>,
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overload {
    /// It goes on.
    Passes,
    /// It is among those that are dropped.
    Drops,
    /// It is dropped, as all are.
    DropsAll,
}

impl Drops {
    /// As an assignment has it. As in Envoy, the runtime value is that of the moment.
    pub(super) fn new(endpoints: &[LocalityEndpoints]) -> Drops {
        let Some(configured) = endpoints.first().and_then(|group| group.policy.drop_overload.as_ref()) else {
            return Drops::default();
        };
        let limit = with_values(|values| values.get(LIMIT)?.integer).unwrap_or(100).min(100) as u32;
        let share = configured.per_million.min(limit * (ALL / 100));
        Drops { share, configured: Some(Arc::clone(configured)) }
    }

    /// What becomes of the next request.
    pub(super) fn decide(&self) -> Overload {
        match self.share {
            0 => Overload::Passes,
            ALL => Overload::DropsAll,
            share if fastrand::u32(..ALL) < share => Overload::Drops,
            _ => Overload::Passes,
        }
    }

    /// What load reports call those that are dropped.
    pub(super) fn category(&self) -> &str {
        self.configured.as_ref().map_or("", |configured| &configured.category)
    }
}

/// Requests that no host has seen, for load reports: there is one reporter.
#[derive(Debug)]
pub(crate) struct Dropped {
    counter: HiddenCounter,
    latched: AtomicU64,
}

impl Dropped {
    pub(super) fn new() -> Dropped {
        Dropped { counter: HiddenCounter::new(), latched: AtomicU64::new(0) }
    }

    /// One more.
    pub(crate) fn inc(&self) {
        self.counter.inc();
    }

    /// How many since the last call.
    pub(crate) fn latch(&self) -> u64 {
        let sum = self.counter.value();
        sum.wrapping_sub(self.latched.swap(sum, Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_dropped() {
        let drops = |share| Drops { share, configured: None };
        assert_eq!((drops(0).decide(), drops(ALL).decide()), (Overload::Passes, Overload::DropsAll));
        let half = drops(ALL / 2);
        let dropped = (0..10_000).filter(|_| half.decide() == Overload::Drops).count();
        assert!((4_500..5_500).contains(&dropped), "{dropped}");
    }
}
