//! Names to slots, and slots to values. Locked when a name is looked up and when values are read, never on the request
//! path.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, RwLock},
};

use super::{
    Counter, Gauge, Histogram, Scope, Summary,
    group::{Group, Leaves, Root},
    histogram::Buckets,
    slab,
    tags::TaggedName,
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

/// One name in the registry that is not in a group.
pub(super) struct Entry {
    pub(super) name: Arc<TaggedName>,
    pub(super) slot: u32,
}

/// The last flush of a histogram.
#[derive(Default)]
pub(super) struct Interval {
    pub(super) total: Summary,
    pub(super) recorded: Summary,
}

pub(super) struct Registry {
    /// The groups of the scopes that have labels, by the names of their roots, which end with a dot.
    pub(super) groups: BTreeMap<Arc<str>, Group>,
    /// What comes after the roots.
    pub(super) leaves: Leaves,
    /// The groups in which something is removed.
    with_removed: HashSet<Arc<str>>,
    /// The other names that are shown.
    pub(super) shown: BTreeMap<(Arc<str>, Kind), Entry>,
    /// Those whose scope is gone: they keep their slots, because handles to them may still be about.
    removed: HashMap<(Arc<str>, Kind), Removed>,
    /// How many hold each scope, by its name.
    leases: HashMap<String, usize>,
    /// Texts that are in no group, by their names.
    pub(super) texts: BTreeMap<Arc<str>, (Arc<TaggedName>, Arc<str>)>,
    pub(super) slots: Slots,
    pub(super) intervals: HashMap<u32, Interval>,
    /// Gauges that are set: nobody will take them down.
    pub(super) set: HashSet<u32>,
    /// How many may be removed before the slots of those that nobody holds are looked for.
    crowded: usize,
}

/// Which slots are handed out.
pub(super) struct Slots {
    /// Slots handed out. Slot 0 is never given a name: it is what names share when there are too many.
    values: usize,
    pub(super) histograms: usize,
    /// Slots handed out once, and free again.
    free_values: Vec<u32>,
    free_histograms: Vec<u32>,
}

/// A statistic that is not shown any more.
struct Removed {
    entry: Entry,
    /// The name of the scope with which it went.
    scope: Arc<str>,
}

/// Fewer removed statistics than this wait for the next flush.
const CROWDED: usize = 4096;

/// Scopes that were let go of: a worker that ends the last stream of a removed cluster should not wait for the registry.
static RELEASED: Mutex<Vec<Scope>> = Mutex::new(Vec::new());

/// Slots of counters without a name that were let go of.
static RELEASED_HIDDEN: Mutex<Vec<u32>> = Mutex::new(Vec::new());

/// Held for reading by those who read values without the registry: slots are not given to other names meanwhile.
pub(super) static READING: RwLock<()> = RwLock::new(());

static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(|| {
    slab::grow(1, 1);
    Mutex::new(Registry {
        groups: BTreeMap::new(),
        leaves: Leaves::default(),
        with_removed: HashSet::new(),
        shown: BTreeMap::new(),
        removed: HashMap::new(),
        leases: HashMap::new(),
        texts: BTreeMap::new(),
        slots: Slots { values: 1, histograms: 1, free_values: Vec::new(), free_histograms: Vec::new() },
        intervals: HashMap::new(),
        set: HashSet::new(),
        crowded: CROWDED,
    })
});

pub(super) fn lock() -> MutexGuard<'static, Registry> {
    // Nothing in here leaves the maps half-changed, so a panic elsewhere while locked does not matter.
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slots {
    /// A slot that nobody has; `None` where there is none left.
    fn take(&mut self, kind: Kind) -> Option<u32> {
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

    /// Makes a slot free that nobody can write any more.
    fn give_back(&mut self, kind: Kind, slot: u32) {
        if kind == Kind::Histogram {
            slab::all().filter_map(|slab| slab.buckets(slot)).for_each(Buckets::clear);
            self.free_histograms.push(slot);
        } else {
            slab::clear(slot);
            self.free_values.push(slot);
        }
    }
}

impl Registry {
    /// The slot of a name of which nobody said where a label ends, or that has none.
    fn slot(&mut self, name: TaggedName, kind: Kind) -> u32 {
        let key = (Arc::clone(&name.full), kind);
        if let Some(entry) = self.shown.get_mut(&key) {
            if name.exact && !entry.name.exact {
                entry.name = Arc::new(name);
            }
            return entry.slot;
        }
        if !name.exact
            && let Some((root, leaf)) = self.group_of(&name.full)
        {
            return self.slot_in(&root, leaf, kind);
        }
        let slot = match self.removed.remove(&key) {
            Some(Removed { entry: old, .. }) => {
                // As in Envoy, what is created anew begins at zero. A gauge is what is still open: it stays.
                if kind == Kind::Counter {
                    reset(old.slot);
                }
                old.slot
            }
            None => match self.slots.take(kind) {
                Some(slot) => slot,
                None => return 0,
            },
        };
        self.shown.insert(key, Entry { name: Arc::new(name), slot });
        slot
    }

    /// The group with the longest root that a name begins with, and the rest of the name.
    fn group_of<'a>(&self, name: &'a str) -> Option<(Arc<Root>, &'a str)> {
        let dots = name.rmatch_indices('.').map(|(at, _)| name.split_at(at + 1));
        let mut found = dots.filter_map(|(root, leaf)| Some((Arc::clone(&self.groups.get(root)?.root), leaf)));
        found.next()
    }

    /// The slot of a name in a group.
    fn slot_in(&mut self, root: &Arc<Root>, leaf: &str, kind: Kind) -> u32 {
        self.group(root);
        let Registry { groups, leaves, slots, .. } = self;
        let Some(group) = groups.get_mut(&root.name) else { return 0 };
        let known = leaves.find(leaf, kind);
        if let Some(slot) = known.and_then(|leaf| group.slot(leaf)) {
            return slot;
        }
        if let Some((leaf, slot)) = known.and_then(|leaf| Some((leaf, group.take_removed(leaf)?))) {
            // As in Envoy, what is created anew begins at zero. A gauge is what is still open: it stays.
            if kind == Kind::Counter {
                reset(slot);
            }
            group.show(leaf, slot);
            return slot;
        }
        let Some(slot) = slots.take(kind) else { return 0 };
        group.show(leaves.hold(leaf, kind), slot);
        slot
    }

    /// The group of a root. If it is new, it takes in the names that were guessed to be something else.
    fn group(&mut self, root: &Arc<Root>) -> &mut Group {
        let Registry { groups, leaves, shown, .. } = self;
        groups.entry(Arc::clone(&root.name)).or_insert_with(|| {
            let mut group = Group::new(root);
            let start = (Arc::clone(&root.name), Kind::Counter);
            let under = shown.range(start..).take_while(|((name, _), _)| name.starts_with(&*root.name));
            let guessed: Vec<_> = under.filter(|(_, entry)| !entry.name.exact).map(|(key, _)| key.clone()).collect();
            for key in guessed {
                if let Some(entry) = shown.remove(&key) {
                    group.show(leaves.hold(&key.0[root.name.len()..], key.1), entry.slot);
                }
            }
            group
        })
    }
}

impl Registry {
    /// Takes away the scopes that nobody holds any more, and the counters without a name.
    pub(super) fn settle(&mut self) {
        let hidden = std::mem::take(&mut *RELEASED_HIDDEN.lock().unwrap_or_else(PoisonError::into_inner));
        hidden.into_iter().for_each(|slot| self.slots.give_back(Kind::Counter, slot));
        let released = std::mem::take(&mut *RELEASED.lock().unwrap_or_else(PoisonError::into_inner));
        for scope in released {
            let name = scope.name();
            if let Some(holders) = self.leases.get_mut(&name) {
                *holders -= 1;
                if *holders == 0 {
                    self.leases.remove(&name);
                    self.remove(&scope);
                }
            }
        }
    }

    fn remove(&mut self, scope: &Scope) {
        let of = scope.name();
        let prefix = format!("{of}.");
        let start: Arc<str> = prefix.as_str().into();
        let Registry { groups, leaves, with_removed, .. } = self;
        // `cluster.a` is not the owner of `cluster.a.b.upstream_cx_total` where `a.b` is a cluster too.
        let mut remove = |group: &mut Group, is_in: &dyn Fn(&str) -> bool| {
            let removed = group.shown.extract_if(.., |(leaf, _)| is_in(&leaves.get(*leaf).name));
            group.removed.extend(removed);
            group.removed_with.clone_from(&of);
            let texts: Vec<_> = group.texts.extract_if(.., |(leaf, _)| is_in(&leaves.get(*leaf).name)).collect();
            texts.into_iter().for_each(|(leaf, _)| leaves.release(leaf));
            with_removed.insert(Arc::clone(&group.root.name));
        };
        let under = groups.range_mut(Arc::clone(&start)..).take_while(|(root, _)| root.starts_with(&prefix));
        under.filter(|(_, group)| scope.owns(&group.root.labels)).for_each(|(_, group)| remove(group, &|_| true));
        let within = scope.leaf("");
        if !within.is_empty()
            && let Some(group) = groups.get_mut(&scope.root().name)
        {
            remove(group, &|leaf| leaf.starts_with(&*within));
        }
        let keys: Vec<_> = self
            .shown
            .range((Arc::clone(&start), Kind::Counter)..)
            .take_while(|((name, _), _)| name.starts_with(&prefix))
            .filter(|(_, entry)| scope.owns(&entry.name.labels))
            .map(|(key, _)| key.clone())
            .collect();
        let of: Arc<str> = of.into();
        for key in keys {
            if let Some(entry) = self.shown.remove(&key) {
                self.removed.insert(key, Removed { entry, scope: Arc::clone(&of) });
            }
        }
        let texts = self.texts.range(start..).take_while(|(name, _)| name.starts_with(&prefix));
        let texts: Vec<_> = texts.filter(|(_, (name, _))| scope.owns(&name.labels)).map(|it| it.0.clone()).collect();
        texts.iter().for_each(|name| drop(self.texts.remove(name)));
    }

    /// How many are removed and still have their slots.
    fn removed(&self) -> usize {
        let groups = self.with_removed.iter().filter_map(|root| self.groups.get(root));
        self.removed.len() + groups.map(|group| group.removed.len()).sum::<usize>()
    }

    /// Makes the slots of removed statistics free that nobody can write any more: their scope is held by nobody, and all its
    /// gauges are at zero. A guard that takes a gauge down when it is dropped may outlive what holds the scope.
    pub(super) fn reclaim(&mut self) {
        let Ok(_nobody_reads) = READING.try_write() else { return };
        let Registry { groups, leaves, with_removed, removed, leases, slots, intervals, set, .. } = self;
        let is_up = |kind, slot| kind == Kind::Gauge && !set.contains(&slot) && slab::sum(slot) != 0;
        let whole = removed.iter().filter(|((_, kind), it)| is_up(*kind, it.entry.slot)).map(|(_, it)| &*it.scope);
        let in_groups = with_removed
            .iter()
            .filter_map(|root| groups.get(root))
            .filter(|group| group.removed.iter().any(|(leaf, slot)| is_up(leaves.get(*leaf).kind, *slot)));
        let busy = whole.chain(in_groups.map(|group| &*group.removed_with)).map(str::to_owned);
        let busy: HashSet<String> = busy.collect();
        let is_busy = |scope: &str| busy.contains(scope) || leases.contains_key(scope);
        let mut give_back = |kind, slot| {
            slots.give_back(kind, slot);
            if kind == Kind::Histogram {
                intervals.remove(&slot);
            } else {
                set.remove(&slot);
            }
        };
        removed.retain(|(_, kind), Removed { entry, scope }| {
            let stays = is_busy(scope);
            if !stays {
                give_back(*kind, entry.slot);
            }
            stays
        });
        with_removed.retain(|root| {
            let Some(group) = groups.get_mut(root) else { return false };
            if is_busy(&group.removed_with) {
                return true;
            }
            for (leaf, slot) in std::mem::take(&mut group.removed) {
                give_back(leaves.get(leaf).kind, slot);
                leaves.release(leaf);
            }
            if group.is_empty() {
                groups.remove(root);
            }
            false
        });
        self.crowded = CROWDED.max(self.removed() * 2);
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
        *registry.leases.entry(scope.name()).or_default() += 1;
        if registry.removed() > registry.crowded {
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

/// The scope, with the root that the registry has by that name, if it does: one copy of the name for all that hold it.
pub(super) fn shared(scope: Scope) -> Scope {
    match lock().groups.get(&scope.root().name) {
        Some(group) if *group.root == **scope.root() => scope.with_root(Arc::clone(&group.root)),
        _ => scope,
    }
}

/// Sets a text.
pub(super) fn set_text(name: TaggedName, text: &str) {
    let mut registry = lock();
    match registry.texts.get_mut(&name.full) {
        Some((_, known)) if **known == *text => {}
        Some((_, known)) => *known = text.into(),
        None => drop(registry.texts.insert(Arc::clone(&name.full), (Arc::new(name), text.into()))),
    }
}

/// Sets a text in a scope.
pub(super) fn set_text_in(scope: &Scope, leaf: &str, text: &str) {
    if scope.root().labels.is_empty() {
        return set_text(scope.full(leaf), text);
    }
    let mut registry = lock();
    registry.group(scope.root());
    let Registry { groups, leaves, .. } = &mut *registry;
    let Some(group) = groups.get_mut(&scope.root().name) else { return };
    let leaf = scope.leaf(leaf);
    let known = leaves.find(&leaf, Kind::TextReadout);
    match group.texts.iter_mut().find(|(leaf, _)| Some(*leaf) == known) {
        Some((_, known)) if **known == *text => {}
        Some((_, known)) => *known = text.into(),
        None => group.texts.push((leaves.hold(&leaf, Kind::TextReadout), text.into())),
    }
}

/// The slot of a name in a scope.
pub(super) fn slot(scope: &Scope, leaf: &str, kind: Kind) -> u32 {
    let mut registry = lock();
    if scope.root().labels.is_empty() {
        registry.slot(scope.full(leaf), kind)
    } else {
        registry.slot_in(scope.root(), &scope.leaf(leaf), kind)
    }
}

fn reset(slot: u32) {
    slab::add_shared(slot, slab::sum(slot).wrapping_neg());
}

pub(super) fn counter(name: TaggedName) -> Counter {
    Counter(lock().slot(name, Kind::Counter))
}

/// A slot at zero for a counter without a name. It has one owner, which gives it back by [`release_hidden`].
pub(super) fn hidden_slot() -> u32 {
    let mut registry = lock();
    registry.settle();
    registry.slots.take(Kind::Counter).unwrap_or(0)
}

/// Later, for a worker may be the last that has it and should not wait for the registry.
pub(super) fn release_hidden(slot: u32) {
    if slot != 0 {
        RELEASED_HIDDEN.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
    }
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
    if !slab::lease(registry.slots.values, registry.slots.histograms) {
        tracing::warn!(worker = index, "too many worker threads for counters of their own: this one shares");
    }
}

/// Makes all counters zero, as `POST /reset_counters` does.
pub fn reset_counters() {
    reset_counters_where(|_| true);
}

/// Makes the counters of these names zero.
pub(super) fn reset_counters_where(wanted: impl Fn(&str) -> bool) {
    let registry = lock();
    for ((name, kind), entry) in &registry.shown {
        if *kind == Kind::Counter && wanted(name) {
            reset(entry.slot);
        }
    }
    let mut name = String::new();
    for group in registry.groups.values() {
        for (leaf, slot) in &group.shown {
            let leaf = registry.leaves.get(*leaf);
            name.clear();
            name.extend([&*group.root.name, &*leaf.name]);
            if leaf.kind == Kind::Counter && wanted(&name) {
                reset(*slot);
            }
        }
    }
}

/// Takes everything under `scope` out of what is shown. Handles stay valid; a name that is asked for again is shown again,
/// its counter from zero. See [`Lease`] for who does it.
#[cfg(test)]
pub(super) fn remove_scope(scope: &Scope) {
    lock().remove(scope);
}

/// How many slots were ever made.
#[cfg(test)]
pub(crate) fn slots() -> usize {
    lock().slots.values
}
