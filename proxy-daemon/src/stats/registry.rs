//! Names to slots, and slots to values. Locked when a name is looked up and when values are read, never on the request
//! path.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock},
};

use super::{
    Counter, Gauge, Histogram, Scope, Summary,
    histogram::Buckets,
    slab,
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
    /// A text, such as a version.
    TextReadout,
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

    /// A gauge that somebody else keeps.
    pub fn external_gauge(name: &str, value: u64) -> Metric {
        let entry = Arc::new(Entry { name: tags::from_name(name), kind: Kind::Gauge, slot: 0 });
        Metric { entry, value: Value::Gauge { value, used: true } }
    }

    /// A text that somebody else keeps.
    pub fn external_text(name: &str, text: &str) -> Metric {
        let entry = Arc::new(Entry { name: tags::from_name(name), kind: Kind::TextReadout, slot: 0 });
        Metric { entry, value: Value::Text(text.into()) }
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
            Value::Text(text) => !text.is_empty(),
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
    /// A text readout's.
    Text(Arc<str>),
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
    removed: HashMap<(Arc<str>, Kind), Removed>,
    /// How many hold each scope, by its name.
    leases: HashMap<Arc<str>, usize>,
    /// Texts, by their names.
    texts: BTreeMap<Arc<str>, (Arc<Entry>, Arc<str>)>,
    /// Slots of counters that are never shown.
    hidden: HashMap<Box<str>, u32>,
    /// Slots handed out. Slot 0 is never given a name: it is what names share when there are too many.
    values: usize,
    histograms: usize,
    /// Slots handed out once, and free again.
    free_values: Vec<u32>,
    free_histograms: Vec<u32>,
    intervals: HashMap<u32, Interval>,
    /// Gauges that are set: nobody will take them down.
    set: HashSet<u32>,
    /// How many may be removed before the slots of those that nobody holds are looked for.
    crowded: usize,
}

/// A statistic that is not shown any more.
struct Removed {
    entry: Arc<Entry>,
    /// The name of the scope with which it went.
    scope: Arc<str>,
}

/// Fewer removed statistics than this wait for the next flush.
const CROWDED: usize = 4096;

/// Scopes that were let go of: a worker that ends the last stream of a removed cluster should not wait for the registry.
static RELEASED: Mutex<Vec<Scope>> = Mutex::new(Vec::new());

/// Held for reading by those who read values without the registry: slots are not given to other names meanwhile.
static READING: RwLock<()> = RwLock::new(());

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(|| {
    slab::grow(1, 1);
    Mutex::new(Registry {
        shown: BTreeMap::new(),
        removed: HashMap::new(),
        leases: HashMap::new(),
        texts: BTreeMap::new(),
        hidden: HashMap::new(),
        values: 1,
        histograms: 1,
        free_values: Vec::new(),
        free_histograms: Vec::new(),
        intervals: HashMap::new(),
        set: HashSet::new(),
        crowded: CROWDED,
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
            Some(Removed { entry: old, .. }) => {
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
        let (next, free) = if kind == Kind::Histogram {
            (&mut self.histograms, &mut self.free_histograms)
        } else {
            (&mut self.values, &mut self.free_values)
        };
        if let Some(slot) = free.pop() {
            return Some(slot);
        }
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

impl Registry {
    /// Takes away the scopes that nobody holds any more.
    fn settle(&mut self) {
        let released = std::mem::take(&mut *RELEASED.lock().unwrap_or_else(PoisonError::into_inner));
        for scope in released {
            if let Some(holders) = self.leases.get_mut(scope.name()) {
                *holders -= 1;
                if *holders == 0 {
                    self.leases.remove(scope.name());
                    self.remove(&scope);
                }
            }
        }
    }

    fn remove(&mut self, scope: &Scope) {
        let prefix = format!("{}.", scope.name());
        let start: Arc<str> = prefix.as_str().into();
        // `cluster.a` is not the owner of `cluster.a.b.upstream_cx_total` where `a.b` is a cluster too.
        let keys: Vec<_> = self
            .shown
            .range((Arc::clone(&start), Kind::Counter)..)
            .take_while(|((name, _), _)| name.starts_with(&prefix))
            .filter(|(_, entry)| scope.owns(&entry.name.labels))
            .map(|(key, _)| key.clone())
            .collect();
        let of: Arc<str> = scope.name().into();
        for key in keys {
            if let Some(entry) = self.shown.remove(&key) {
                self.removed.insert(key, Removed { entry, scope: Arc::clone(&of) });
            }
        }
        let texts = self.texts.range(start..).take_while(|(name, _)| name.starts_with(&prefix));
        let texts: Vec<_> =
            texts.filter(|(_, (entry, _))| scope.owns(&entry.name.labels)).map(|it| it.0.clone()).collect();
        texts.iter().for_each(|name| drop(self.texts.remove(name)));
    }

    /// Makes the slots of removed statistics free that nobody can write any more: their scope is held by nobody, and all its
    /// gauges are at zero. A guard that takes a gauge down when it is dropped may outlive what holds the scope.
    fn reclaim(&mut self) {
        let Ok(_nobody_reads) = READING.try_write() else { return };
        let is_up =
            |entry: &Entry| entry.kind == Kind::Gauge && !self.set.contains(&entry.slot) && slab::sum(entry.slot) != 0;
        let busy = self.removed.values().filter(|it| is_up(&it.entry) || self.leases.contains_key(&it.scope));
        let busy: HashSet<_> = busy.map(|it| Arc::clone(&it.scope)).collect();
        let Registry { removed, free_values, free_histograms, intervals, set, .. } = self;
        removed.retain(|_, Removed { entry, scope }| {
            if busy.contains(scope) {
                return true;
            }
            if entry.kind == Kind::Histogram {
                slab::all().filter_map(|slab| slab.buckets(entry.slot)).for_each(Buckets::clear);
                intervals.remove(&entry.slot);
                free_histograms.push(entry.slot);
            } else {
                slab::clear(entry.slot);
                set.remove(&entry.slot);
                free_values.push(entry.slot);
            }
            false
        });
        self.crowded = CROWDED.max(self.removed.len() * 2);
    }
}

/// A hold on a scope. When the last hold on it is dropped, its statistics are no longer shown, and their slots are given to
/// others once every gauge in it is back at zero.
///
/// Whatever keeps handles of a scope that can go away (a cluster's, a listener's, a prefix') keeps one of these beside them.
#[derive(Debug)]
pub struct Lease(Scope);

impl Lease {
    pub(super) fn new(scope: &Scope) -> Lease {
        let mut registry = lock();
        // First: what was let go of before begins anew, as in Envoy.
        registry.settle();
        *registry.leases.entry(scope.name().into()).or_default() += 1;
        if registry.removed.len() > registry.crowded {
            registry.reclaim();
        }
        Lease(scope.clone())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        RELEASED.lock().unwrap_or_else(PoisonError::into_inner).push(self.0.clone());
    }
}

/// Sets a text.
pub(super) fn set_text(name: TaggedName, text: &str) {
    let mut registry = lock();
    match registry.texts.get_mut(&name.full) {
        Some((_, known)) if **known == *text => {}
        Some((_, known)) => *known = text.into(),
        None => {
            let entry = Arc::new(Entry { name, kind: Kind::TextReadout, slot: 0 });
            registry.texts.insert(Arc::clone(&entry.name.full), (entry, text.into()));
        }
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
    let mut registry = lock();
    registry.set.insert(gauge.0);
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
    let _slots_stay = READING.read().unwrap_or_else(PoisonError::into_inner);
    let mut registry = lock();
    registry.settle();
    let texts: Vec<_> = registry.texts.values().cloned().collect();
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
        // Kept elsewhere.
        Kind::TextReadout => Value::Text(Arc::default()),
    };
    let texts = texts.into_iter().map(|(entry, text)| Metric { entry, value: Value::Text(text) });
    entries.into_iter().map(|entry| Metric { value: value(&entry), entry }).chain(texts).collect()
}

/// Ends the histograms' interval and begins the next: `/stats` shows the one that ended. Envoy's flush interval is 5 s.
///
/// Slots that nobody uses any more become free here.
pub fn flush_intervals() {
    {
        let mut registry = lock();
        registry.settle();
        registry.reclaim();
    }
    let _slots_stay = READING.read().unwrap_or_else(PoisonError::into_inner);
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

/// Takes everything under `scope` out of what is shown. Handles stay valid; a name that is asked for again is shown again,
/// its counter from zero. See [`Lease`] for who does it.
#[cfg(test)]
pub(super) fn remove_scope(scope: &Scope) {
    lock().remove(scope);
}

/// How many slots were ever made.
#[cfg(test)]
pub(super) fn slots() -> usize {
    lock().values
}
