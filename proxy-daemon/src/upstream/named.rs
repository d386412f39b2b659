//! What filters count below a cluster's name.

use std::{
    cell::{OnceCell, RefCell},
    collections::HashMap,
};

use super::WorkerCluster;
use crate::stats::{Counter, Histogram};

/// By what follows the cluster's name.
type ByName<T> = RefCell<HashMap<Box<str>, T>>;

/// What has been counted. Few clusters have any histograms.
#[derive(Default)]
pub(super) struct Named {
    counters: ByName<Counter>,
    histograms: OnceCell<Box<ByName<Histogram>>>,
}

impl WorkerCluster {
    /// The counter `cluster.<name>.<leaf>`, of a filter: `leaf` is of the configuration.
    pub fn counter(&self, leaf: &str) -> Counter {
        let mut counters = self.named.counters.borrow_mut();
        if let Some(known) = counters.get(leaf) {
            return *known;
        }
        let counter = self.cluster.stats.scope().counter(leaf);
        counters.insert(leaf.into(), counter);
        counter
    }

    /// The same where `leaf` is of a request; `None` where that would be more than `most` counters.
    pub fn counter_within(&self, leaf: &str, most: usize) -> Option<Counter> {
        let counters = self.named.counters.borrow();
        let room = counters.contains_key(leaf) || counters.len() < most;
        drop(counters);
        room.then(|| self.counter(leaf))
    }

    /// The histogram `cluster.<name>.<leaf>`, where `leaf` is of a request; `None` where that would be more than `most` histograms.
    pub fn histogram_within(&self, leaf: &str, most: usize) -> Option<Histogram> {
        let mut histograms = self.named.histograms.get_or_init(Box::default).borrow_mut();
        if let Some(known) = histograms.get(leaf) {
            return Some(*known);
        }
        let histogram = (histograms.len() < most).then(|| self.cluster.stats.scope().histogram(leaf))?;
        histograms.insert(leaf.into(), histogram);
        Some(histogram)
    }
}
