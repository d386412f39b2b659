//! Names to slots, and slots to values. Locked when a name is looked up and when values are read, never on the request
//! path.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError},
};

use super::{
    Counter, Gauge, Histogram, Scope, Summary, slab,
    tags::{self, TaggedName},
};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution.
    Histogram,
}

/// One name in the registry.
#[derive(Debug)]
struct Entry {
    name: TaggedName,
    kind: Kind,
    slot: u32,
}

/// One statistic with its value at the time of the snapshot.
#[derive(Debug, Clone)]
pub struct Metric {
    entry: Arc<Entry>,
    /// Its value.
    pub value: Value,
}

impl Metric {
    /// A counter that somebody else keeps, for example the kernel's side.
    pub fn external(name: &str, value: u64) -> Metric {
        let entry = Arc::new(Entry { name: tags::from_name(name), kind: Kind::Counter, slot: 0 });
        Metric { entry, value: Value::Counter(value) }
    }

    /// Its full name, as `/stats` prints it.
    pub fn name(&self) -> &str {
        &self.entry.name.full
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        self.entry.kind
    }

    /// Its name without the parts that are labels.
    pub fn base_name(&self) -> &str {
        &self.entry.name.base
    }

    /// Label names and values, in the order in which they stand in the name.
    pub fn labels(&self) -> &[(&'static str, Arc<str>)] {
        &self.entry.name.labels
    }

    /// Whether it ever counted anything: `usedonly`.
    pub fn is_used(&self) -> bool {
        match &self.value {
            Value::Counter(value) => *value != 0,
            Value::Gauge { used, .. } => *used,
            Value::Histogram { cumulative, .. } => cumulative.count() != 0,
        }
    }
}

/// A statistic's value.
#[derive(Debug, Clone)]
pub enum Value {
    /// A counter's.
    Counter(u64),
    /// A gauge's.
    Gauge {
        /// The sum over all threads.
        value: u64,
        /// Whether any thread has a share other than 0.
        used: bool,
    },
    /// A histogram's.
    Histogram {
        /// What was recorded between the last two flushes.
        interval: Summary,
        /// What was recorded since the process began.
        cumulative: Summary,
    },
}

/// The last flush of a histogram.
#[derive(Default)]
struct Interval {
    total: Summary,
    recorded: Summary,
}

struct Registry {
    /// Those that are shown, in the order of their names.
    shown: BTreeMap<(Arc<str>, Kind), Arc<Entry>>,
    /// Those whose scope is gone: they keep their slots, because handles to them may still be about.
    removed: HashMap<(Arc<str>, Kind), Arc<Entry>>,
    /// Slots of counters that are never shown.
    hidden: HashMap<Box<str>, u32>,
    /// Slots handed out. Slot 0 is never given a name: it is what names share when there are too many.
    values: usize,
    histograms: usize,
    intervals: HashMap<u32, Interval>,
}

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(|| {
    slab::grow(1, 1);
    Mutex::new(Registry {
        shown: BTreeMap::new(),
        removed: HashMap::new(),
        hidden: HashMap::new(),
        values: 1,
        histograms: 1,
        intervals: HashMap::new(),
    })
});

fn lock() -> MutexGuard<'static, Registry> {
    // Nothing in here leaves the maps half-changed, so a panic elsewhere while locked does not matter.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    fn slot(&mut self, name: TaggedName, kind: Kind) -> u32 {
        let key = (Arc::clone(&name.full), kind);
        if let Some(entry) = self.shown.get_mut(&key) {
            if name.exact && !entry.name.exact {
                *entry = Arc::new(Entry { name, kind, slot: entry.slot });
            }
            return entry.slot;
        }
        let entry = match self.removed.remove(&key) {
            Some(old) => {
                // As in Envoy, what is created anew begins at zero. A gauge is what is still open: it stays.
                if kind == Kind::Counter {
                    reset(old.slot);
                }
                Arc::new(Entry { name, kind, slot: old.slot })
            }
            None => {
                let Some(slot) = self.new_slot(kind) else { return 0 };
                Arc::new(Entry { name, kind, slot })
            }
        };
        let slot = entry.slot;
        self.shown.insert(key, entry);
        slot
    }

    /// A slot that nobody has; `None` where there is none left.
    fn new_slot(&mut self, kind: Kind) -> Option<u32> {
        let next = if kind == Kind::Histogram { &mut self.histograms } else { &mut self.values };
        if *next == slab::MAX_SLOTS {
            return None;
        }
        let slot = *next as u32;
        *next += 1;
        // Before the slot is handed out, so that whoever has it finds its chunk.
        slab::grow(self.values, self.histograms);
        Some(slot)
    }
}

fn reset(slot: u32) {
    slab::add_shared(slot, slab::sum(slot).wrapping_neg());
}

pub(super) fn counter(name: TaggedName) -> Counter {
    Counter(lock().slot(name, Kind::Counter))
}

pub(super) fn hidden_counter(key: &str) -> Counter {
    let mut registry = lock();
    if let Some(slot) = registry.hidden.get(key) {
        return Counter(*slot);
    }
    let Some(slot) = registry.new_slot(Kind::Counter) else { return Counter(0) };
    registry.hidden.insert(key.into(), slot);
    Counter(slot)
}

pub(super) fn gauge(name: TaggedName) -> Gauge {
    Gauge(lock().slot(name, Kind::Gauge))
}

pub(super) fn histogram(name: TaggedName) -> Histogram {
    Histogram(lock().slot(name, Kind::Histogram))
}

pub(super) fn set_gauge(gauge: Gauge, value: u64) {
    let _one_at_a_time = lock();
    slab::add_shared(gauge.0, value.wrapping_sub(slab::sum(gauge.0)));
}

pub(super) fn summary(histogram: Histogram) -> Summary {
    let mut total = Summary::default();
    slab::all().filter_map(|slab| slab.buckets(histogram.0)).for_each(|buckets| buckets.merge_into(&mut total));
    total
}

/// Gives the calling thread counters of its own: call it first on every worker thread. They are given back when the
/// thread ends, and what they counted stays counted. `index` is the worker's number, for the log.
pub fn register_worker(index: usize) {
    let registry = lock();
    if !slab::lease(registry.values, registry.histograms) {
        tracing::warn!(worker = index, "too many worker threads for counters of their own: this one shares");
    }
}

/// Every statistic with its value, in the order of the names.
pub fn snapshot() -> Vec<Metric> {
    let registry = lock();
    let entries: Vec<_> = registry.shown.values().cloned().collect();
    let intervals: HashMap<u32, Summary> =
        registry.intervals.iter().map(|(slot, interval)| (*slot, interval.recorded.clone())).collect();
    drop(registry);
    let value = |entry: &Entry| match entry.kind {
        Kind::Counter => Value::Counter(slab::sum(entry.slot)),
        Kind::Gauge => {
            Value::Gauge { value: Gauge(entry.slot).value(), used: slab::all().any(|slab| slab.value(entry.slot) != 0) }
        }
        Kind::Histogram => Value::Histogram {
            interval: intervals.get(&entry.slot).cloned().unwrap_or_default(),
            cumulative: summary(Histogram(entry.slot)),
        },
    };
    entries.into_iter().map(|entry| Metric { value: value(&entry), entry }).collect()
}

/// Ends the histograms' interval and begins the next: `/stats` shows the one that ended. Envoy's flush interval is 5 s.
pub fn flush_intervals() {
    let slots: Vec<u32> =
        lock().shown.values().filter(|entry| entry.kind == Kind::Histogram).map(|entry| entry.slot).collect();
    let totals: Vec<_> = slots.into_iter().map(|slot| (slot, summary(Histogram(slot)))).collect();
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

/// Makes all counters zero, as `POST /reset_counters` does.
pub fn reset_counters() {
    reset_counters_where(|_| true);
}

/// Makes the counters of these names zero.
pub(super) fn reset_counters_where(wanted: impl Fn(&str) -> bool) {
    let registry = lock();
    let counters = registry.shown.values().filter(|entry| entry.kind == Kind::Counter);
    counters.filter(|entry| wanted(&entry.name.full)).for_each(|entry| reset(entry.slot));
}

/// Takes everything under `scope` out of what is shown, for example when its cluster is removed. Handles stay valid; a
/// name that is asked for again is shown again, its counter from zero.
pub fn remove_scope(scope: &Scope) {
    let prefix = format!("{}.", scope.name());
    let mut registry = lock();
    let start = (Arc::from(prefix.as_str()), Kind::Counter);
    // `cluster.a` is not the owner of `cluster.a.b.upstream_cx_total` where `a.b` is a cluster too.
    let keys: Vec<_> = registry
        .shown
        .range(start..)
        .take_while(|((name, _), _)| name.starts_with(&prefix))
        .filter(|(_, entry)| scope.owns(&entry.name.labels))
        .map(|(key, _)| key.clone())
        .collect();
    for key in keys {
        if let Some(entry) = registry.shown.remove(&key) {
            registry.removed.insert(key, entry);
        }
    }
}
