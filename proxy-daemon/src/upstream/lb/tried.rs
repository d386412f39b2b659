//! `envoy.retry_priorities.previous_priorities`: a retry goes to other priorities than the attempts before it.

use std::cell::RefCell;

use super::load::{Load, Target};

/// The priorities that the attempts at one request have been made at.
#[derive(Debug, Default)]
pub struct TriedPriorities {
    /// After so many attempts more, their priorities get nothing. At least 1.
    frequency: usize,
    tried: RefCell<Vec<Option<u32>>>,
    excluded: RefCell<Vec<Option<u32>>>,
}

impl TriedPriorities {
    /// None yet; `frequency`: `update_frequency`.
    pub fn new(frequency: u32) -> TriedPriorities {
        TriedPriorities { frequency: frequency.max(1) as usize, ..TriedPriorities::default() }
    }

    /// An attempt has been made at this priority.
    /// `None`: at one that there is no more.
    pub fn add(&self, priority: Option<u32>) {
        let mut tried = self.tried.borrow_mut();
        tried.push(priority);
        if tried.len().is_multiple_of(self.frequency) {
            self.excluded.borrow_mut().clone_from(&tried);
        }
    }

    /// Where this random number goes; `None`: as if nothing had been tried.
    pub(in crate::upstream) fn target(&self, load: &Load, number: u64) -> Option<Target> {
        let mut excluded = self.excluded.borrow_mut();
        if excluded.is_empty() {
            return None;
        }
        let shares = load.without(|priority| excluded.contains(&Some(priority as u32))).or_else(|| {
            // All have been: it begins anew.
            excluded.clear();
            self.tried.borrow_mut().clear();
            load.without(|_| false)
        });
        shares.map(|shares| shares.target(number))
    }
}
