//! How names are kept: the front part once for a group (a cluster, a listener, a prefix), the back parts once for all groups.
//! Ten thousand clusters have a hundred statistics each, and all of them the same hundred.

use std::{collections::HashMap, sync::Arc};

use super::{
    Kind,
    tags::{self, Label},
};

/// The front part of a group's names.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Root {
    /// With a dot at its end: `cluster.users.`; empty for names that have no label.
    pub(super) name: Arc<str>,
    /// Without the parts that are labels: `cluster.`.
    pub(super) base: Box<str>,
    pub(super) labels: Box<[Label]>,
}

/// The back part of a name, after a root's dot.
#[derive(Debug)]
pub(super) struct Leaf {
    pub(super) name: Arc<str>,
    /// Without a response code that is a label.
    pub(super) base: Option<Box<str>>,
    /// The response code.
    pub(super) labels: Box<[Label]>,
    pub(super) kind: Kind,
}

/// The back parts of all groups' names, by number.
#[derive(Default)]
pub(super) struct Leaves {
    /// With how many hold each one.
    table: Vec<Option<(Arc<Leaf>, usize)>>,
    free: Vec<u32>,
    numbers: HashMap<Arc<str>, [Option<u32>; 4]>,
}

impl Leaves {
    /// The number of a leaf, held once more: give it back with [`Leaves::release`].
    pub(super) fn hold(&mut self, name: &str, kind: Kind) -> u32 {
        if let Some(number) = self.find(name, kind) {
            if let Some((_, holders)) = &mut self.table[number as usize] {
                *holders += 1;
            }
            return number;
        }
        let mut labels = Vec::new();
        let base = tags::response_code(name, &mut labels).map(String::into_boxed_str);
        let name: Arc<str> = name.into();
        let leaf = Arc::new(Leaf { name: Arc::clone(&name), base, labels: labels.into(), kind });
        // As many leaves as slots at most, which are numbered in 32 bits.
        let number = self.free.pop().unwrap_or(self.table.len() as u32);
        if number as usize == self.table.len() {
            self.table.push(None);
        }
        self.table[number as usize] = Some((leaf, 1));
        self.numbers.entry(name).or_default()[kind as usize] = Some(number);
        number
    }

    /// The number of a leaf that somebody holds.
    pub(super) fn find(&self, name: &str, kind: Kind) -> Option<u32> {
        self.numbers.get(name)?[kind as usize]
    }

    pub(super) fn release(&mut self, number: u32) {
        let Some(cell) = self.table.get_mut(number as usize) else { return };
        let Some((leaf, holders)) = cell else { return };
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        if let Some(numbers) = self.numbers.get_mut(&leaf.name) {
            numbers[leaf.kind as usize] = None;
            if numbers.iter().all(Option::is_none) {
                self.numbers.remove(&leaf.name);
            }
        }
        *cell = None;
        self.free.push(number);
    }

    /// The leaf of a number that is held.
    pub(super) fn get(&self, number: u32) -> &Arc<Leaf> {
        let leaf = self.table.get(number as usize).and_then(Option::as_ref);
        &leaf.expect("a group holds the leaves it has numbers of").0
    }
}

/// The statistics whose names begin with one root: leaves and slots.
pub(super) struct Group {
    pub(super) root: Arc<Root>,
    /// In the order of the leaves' numbers.
    pub(super) shown: Vec<(u32, u32)>,
    /// Those whose scope is gone: they keep their slots, because handles to them may still be about.
    pub(super) removed: Vec<(u32, u32)>,
    /// The name of the scope with which the last of them went.
    pub(super) removed_with: String,
    pub(super) texts: Vec<(u32, Arc<str>)>,
}

impl Group {
    pub(super) fn new(root: &Arc<Root>) -> Group {
        Group {
            root: Arc::clone(root),
            shown: Vec::new(),
            removed: Vec::new(),
            removed_with: String::new(),
            texts: Vec::new(),
        }
    }

    /// The slot of a leaf that is shown.
    pub(super) fn slot(&self, leaf: u32) -> Option<u32> {
        let at = self.shown.binary_search_by_key(&leaf, |it| it.0).ok()?;
        Some(self.shown[at].1)
    }

    /// Shows a leaf that was not shown.
    pub(super) fn show(&mut self, leaf: u32, slot: u32) {
        if self.shown.len() == self.shown.capacity() {
            // There are thousands of groups, which grow only at their beginning: little room to spare.
            self.shown.reserve_exact(8 + self.shown.len() / 16);
        }
        let at = self.shown.partition_point(|it| it.0 < leaf);
        self.shown.insert(at, (leaf, slot));
    }

    /// The slot of a leaf that was removed, which is no longer.
    pub(super) fn take_removed(&mut self, leaf: u32) -> Option<u32> {
        let at = self.removed.iter().position(|it| it.0 == leaf)?;
        Some(self.removed.swap_remove(at).1)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.shown.is_empty() && self.removed.is_empty() && self.texts.is_empty()
    }
}
