//! Earliest deadline first: whoever has waited longest for its weight is next, in O(log n).

use std::{cmp::Ordering, collections::BinaryHeap};

/// A schedule of what is known by numbers. Sixteen bytes an entry.
#[derive(Debug)]
pub(super) struct Edf(BinaryHeap<Entry>);

#[derive(Debug)]
struct Entry {
    deadline: f64,
    index: u32,
    /// Breaks ties, so that equal entries take turns.
    order: u32,
}

impl Edf {
    /// For `weights`, all of them greater than 0. It starts anywhere, so that workers do not all begin with the same.
    pub(super) fn new(weights: impl Iterator<Item = f64>) -> Edf {
        // There are never more hosts than fit.
        let entries = weights.enumerate().map(|(index, weight)| {
            let index = index as u32;
            Entry { deadline: fastrand::f64() / weight, index, order: index }
        });
        Edf(entries.collect())
    }

    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.0.capacity() * size_of::<Entry>()
    }

    /// The next one, which has its next turn by the weight that it has now.
    pub(super) fn next(&mut self, weight: impl FnOnce(u32) -> f64) -> Option<u32> {
        // Their number fits.
        let len = self.0.len() as u32;
        let mut top = self.0.peek_mut()?;
        let index = top.index;
        top.deadline += 1.0 / weight(index);
        top.order = top.order.wrapping_add(len);
        Some(index)
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

    #[test]
    fn weights_give_shares() {
        let weights = [1.0, 2.0, 5.0];
        let mut edf = Edf::new(weights.into_iter());
        let mut counts = [0_i64; 3];
        for _ in 0..800 {
            counts[edf.next(|index| weights[index as usize]).unwrap() as usize] += 1;
        }
        for (count, share) in counts.iter().zip([100, 200, 500]) {
            assert!((count - share).abs() <= 1, "{counts:?}");
        }
    }

    #[test]
    fn nobody_has_no_turn() {
        assert_eq!(Edf::new([].into_iter()).next(|_| 1.0), None);
    }
}
