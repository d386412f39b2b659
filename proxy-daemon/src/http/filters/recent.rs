//! What filters keep of what they have seen last.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
    sync::Arc,
};

/// Values by names. Beyond `most` of them the one that has not been used for the longest time is forgotten.
#[derive(Debug)]
pub(super) struct Recent<K: ?Sized, V> {
    most: usize,
    uses: u64,
    /// With their last uses.
    values: HashMap<Arc<K>, (u64, V)>,
    by_use: BTreeMap<u64, Arc<K>>,
}

impl<K: Hash + Eq + ?Sized, V> Recent<K, V> {
    pub(super) fn new(most: usize) -> Recent<K, V> {
        Recent { most, uses: 0, values: HashMap::new(), by_use: BTreeMap::new() }
    }

    /// Uses a value.
    pub(super) fn get(&mut self, name: &K) -> Option<&V> {
        let (last, value) = self.values.get_mut(name)?;
        self.uses += 1;
        if let Some(name) = self.by_use.remove(last) {
            self.by_use.insert(self.uses, name);
        }
        *last = self.uses;
        Some(value)
    }

    /// Keeps a value of a name that has none.
    pub(super) fn insert(&mut self, name: Arc<K>, value: V) {
        self.uses += 1;
        self.values.insert(Arc::clone(&name), (self.uses, value));
        self.by_use.insert(self.uses, name);
        if self.values.len() > self.most
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.values.remove(&oldest);
        }
    }

    /// Forgets a value.
    pub(super) fn forget(&mut self, name: &K) {
        if let Some((last, _)) = self.values.remove(name) {
            self.by_use.remove(&last);
        }
    }
    /// How many values there are, and how many last uses.
    #[cfg(test)]
    pub(super) fn lengths(&self) -> (usize, usize) {
        (self.values.len(), self.by_use.len())
    }
}
