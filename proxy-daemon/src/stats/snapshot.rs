//! What the registry's slots hold, read without holding the registry.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError},
};

use super::{
    Gauge, Histogram, Kind, Metric, Summary, Value,
    metric::Name,
    registry::{READING, lock, summary},
    slab,
};

/// Every statistic with its value, in the order of the names; texts after the others.
pub fn snapshot() -> Vec<Metric> {
    let _slots_stay = READING.read().unwrap_or_else(PoisonError::into_inner);
    let mut registry = lock();
    registry.settle();
    let (mut found, mut texts) = (Vec::new(), Vec::new());
    for group in registry.groups.values() {
        let name = |leaf: u32| Name::Parts(Arc::clone(&group.root), Arc::clone(registry.leaves.get(leaf)));
        let from = found.len();
        found.extend(group.shown.iter().map(|(leaf, slot)| (name(*leaf), registry.leaves.get(*leaf).kind, *slot)));
        found[from..].sort_by(|a, b| a.0.leaf().cmp(b.0.leaf()));
        texts.extend(group.texts.iter().map(|(leaf, text)| (name(*leaf), Arc::clone(text))));
    }
    let shown = registry.shown.iter();
    found.extend(shown.map(|((_, kind), entry)| (Name::Whole(Arc::clone(&entry.name)), *kind, entry.slot)));
    texts.extend(registry.texts.values().map(|(name, text)| (Name::Whole(Arc::clone(name)), Arc::clone(text))));
    let intervals: HashMap<u32, Summary> =
        registry.intervals.iter().map(|(slot, interval)| (*slot, interval.recorded.clone())).collect();
    // Those that count up and down may be below zero for a moment; those that are set may hold any number.
    let gauges = found.iter().filter(|(_, kind, slot)| *kind == Kind::Gauge && registry.set.contains(slot));
    let set: HashSet<u32> = gauges.map(|(_, _, slot)| *slot).collect();
    drop(registry);
    let value = |kind: Kind, slot: u32| match kind {
        Kind::Counter => Value::Counter(slab::sum(slot)),
        Kind::Gauge => Value::Gauge {
            value: if set.contains(&slot) { slab::sum(slot) } else { Gauge(slot).value() },
            used: set.contains(&slot) || slab::all().any(|slab| slab.is_used(slot)),
        },
        Kind::Histogram => Value::Histogram {
            interval: intervals.get(&slot).cloned().unwrap_or_default(),
            cumulative: summary(Histogram(slot)),
        },
        // Kept elsewhere.
        Kind::TextReadout => Value::Text(Arc::default()),
    };
    let mut metrics: Vec<_> =
        found.into_iter().map(|(name, kind, slot)| Metric { name, kind, value: value(kind, slot) }).collect();
    metrics.sort_by(Metric::order);
    let from = metrics.len();
    let text = |(name, text)| Metric { name, kind: Kind::TextReadout, value: Value::Text(text) };
    metrics.extend(texts.into_iter().map(text));
    metrics[from..].sort_by(Metric::order);
    metrics
}

/// Ends the histograms' interval and begins the next: `/stats` shows the one that ended. Envoy's flush interval is 5 s.
///
/// Slots that nobody uses any more become free here.
pub fn flush_intervals() {
    let histograms = {
        let mut registry = lock();
        registry.settle();
        registry.reclaim();
        registry.slots.histograms as u32
    };
    let _slots_stay = READING.read().unwrap_or_else(PoisonError::into_inner);
    // Most of a large configuration's histograms never saw a value.
    let used = (1..histograms).filter(|slot| slab::all().any(|slab| slab.buckets(*slot).is_some()));
    let totals: Vec<_> = used.map(|slot| (slot, summary(Histogram(slot)))).collect();
    let mut registry = lock();
    for (slot, total) in totals {
        if total.count() == 0 {
            continue;
        }
        let interval = registry.intervals.entry(slot).or_default();
        interval.recorded = total.since(&interval.total);
        interval.total = total;
    }
}
