//! Log-linear histograms: sixteen buckets a power of two, so that a quantile is at most about 3 % off.

use std::{
    array, ptr,
    sync::atomic::{AtomicPtr, AtomicU64, Ordering},
};

/// Buckets of one octave (the values between two powers of two).
const OCTAVE: usize = 16;
/// log2 of [`OCTAVE`].
const OCTAVE_BITS: u32 = OCTAVE.trailing_zeros();
/// The values below 16, each a bucket of its own, and an octave for each further power of two.
const OCTAVES: usize = (u64::BITS - OCTAVE_BITS + 1) as usize;

/// The quantiles that `/stats` prints, as Envoy does.
pub const QUANTILES: [f64; 10] = [0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0];

/// The upper bounds of the buckets that `/stats/prometheus` prints: Envoy's default ones.
pub const PROMETHEUS_BOUNDS: [f64; 19] = [
    0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0, 30000.0, 60000.0, 300000.0,
    600000.0, 1800000.0, 3600000.0,
];

type Octave = [AtomicU64; OCTAVE];

/// What one thread recorded. An octave is allocated when its first value comes: a histogram of latencies needs five or
/// six of the 61, and there may be ten thousand histograms a worker.
pub(super) struct Buckets {
    octaves: [AtomicPtr<Octave>; OCTAVES],
    sum: AtomicU64,
}

impl Default for Buckets {
    fn default() -> Buckets {
        Buckets { octaves: array::from_fn(|_| AtomicPtr::new(ptr::null_mut())), sum: AtomicU64::new(0) }
    }
}

/// Which octave, and which bucket in it.
#[inline]
fn place(value: u64) -> (usize, usize) {
    let octave = (u64::BITS - value.leading_zeros()).saturating_sub(OCTAVE_BITS);
    // From the second octave on the highest set bit is implied, so the first one and the rest share the formula.
    let bucket = if octave == 0 { value } else { value >> (octave - 1) };
    (octave as usize, bucket as usize % OCTAVE)
}

/// The smallest value of a bucket, and how many values it holds.
fn bounds(octave: usize, bucket: usize) -> (f64, f64) {
    match octave {
        0 => (bucket as f64, 1.0),
        _ => {
            let width = 2f64.powi(octave as i32 - 1);
            ((OCTAVE + bucket) as f64 * width, width)
        }
    }
}

impl Buckets {
    fn octave(&self, index: usize) -> Option<&Octave> {
        // SAFETY: null, or published by `octave_or_new` with Release; freed only with `self`.
        unsafe { self.octaves[index].load(Ordering::Acquire).as_ref() }
    }

    fn octave_or_new(&self, index: usize) -> &Octave {
        if let Some(octave) = self.octave(index) {
            return octave;
        }
        let new = Box::into_raw(Box::new(Octave::default()));
        match self.octaves[index].compare_exchange(ptr::null_mut(), new, Ordering::AcqRel, Ordering::Acquire) {
            // SAFETY: just made by `Box::into_raw`; published, it is freed only with `self`.
            Ok(_) => unsafe { &*new },
            Err(winner) => {
                // SAFETY: `new` was not published; `winner` is not null and is freed only with `self`.
                unsafe {
                    drop(Box::from_raw(new));
                    &*winner
                }
            }
        }
    }

    /// For buckets that only the calling thread writes.
    #[inline]
    pub(super) fn record_alone(&self, value: u64) {
        let (octave, bucket) = place(value);
        let bucket = &self.octave_or_new(octave)[bucket];
        bucket.store(bucket.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
        self.sum.store(self.sum.load(Ordering::Relaxed).wrapping_add(value), Ordering::Relaxed);
    }

    /// For buckets that several threads write.
    pub(super) fn record_shared(&self, value: u64) {
        let (octave, bucket) = place(value);
        self.octave_or_new(octave)[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(value, Ordering::Relaxed);
    }

    /// Forgets everything. Nobody may be recording.
    pub(super) fn clear(&self) {
        for octave in (0..OCTAVES).filter_map(|index| self.octave(index)) {
            octave.iter().for_each(|bucket| bucket.store(0, Ordering::Relaxed));
        }
        self.sum.store(0, Ordering::Relaxed);
    }

    /// Adds what was recorded to `total`.
    pub(super) fn merge_into(&self, total: &mut Summary) {
        for index in 0..OCTAVES {
            let Some(octave) = self.octave(index) else { continue };
            for (bucket, count) in octave.iter().enumerate() {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    total.add(index * OCTAVE + bucket, count);
                }
            }
        }
        total.sum = total.sum.wrapping_add(self.sum.load(Ordering::Relaxed));
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        for octave in &mut self.octaves {
            let octave = *octave.get_mut();
            if !octave.is_null() {
                // SAFETY: came from `Box::into_raw`, and `&mut self` says that nobody else has it.
                drop(unsafe { Box::from_raw(octave) });
            }
        }
    }
}

/// All threads' recordings, merged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Bucket number and count, in the order of the values; no empty ones.
    buckets: Vec<(usize, u64)>,
    sum: u64,
}

impl Summary {
    fn add(&mut self, bucket: usize, count: u64) {
        match self.buckets.binary_search_by_key(&bucket, |(index, _)| *index) {
            Ok(at) => self.buckets[at].1 += count,
            Err(at) => self.buckets.insert(at, (bucket, count)),
        }
    }

    /// How many values were recorded.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// The sum of the recorded values.
    pub fn sum(&self) -> u64 {
        self.sum
    }

    /// The value below which the share `q` (0 to 1) of the recorded values lies; NaN where nothing was recorded.
    /// Within a bucket the values are taken as spread evenly, as Envoy takes them.
    pub fn quantile(&self, q: f64) -> f64 {
        let rank = q * self.count() as f64;
        let mut below = 0.0;
        for (index, (bucket, count)) in self.buckets.iter().enumerate() {
            let (low, width) = bounds(bucket / OCTAVE, bucket % OCTAVE);
            let count = *count as f64;
            if below + count >= rank || index + 1 == self.buckets.len() {
                // A bucket of one value has no spread.
                let spread = if width > 1.0 { width } else { 0.0 };
                return low + spread * ((rank - below) / count).clamp(0.0, 1.0);
            }
            below += count;
        }
        f64::NAN
    }

    /// How many values were at most `bound`; a bucket that holds the bound counts by its share below it.
    pub fn at_most(&self, bound: f64) -> u64 {
        let mut total = 0;
        for (bucket, count) in &self.buckets {
            let (low, width) = bounds(bucket / OCTAVE, bucket % OCTAVE);
            if low > bound {
                break;
            }
            // The bucket's values are whole numbers: low, low + 1, .. low + width - 1.
            let share = ((bound.floor() - low + 1.0) / width).min(1.0);
            total += (*count as f64 * share).round() as u64;
        }
        total
    }

    /// What was recorded since `earlier`.
    pub fn since(&self, earlier: &Summary) -> Summary {
        let mut old = earlier.buckets.iter().peekable();
        let buckets = self.buckets.iter().filter_map(|(bucket, count)| {
            while old.next_if(|(index, _)| index < bucket).is_some() {}
            let before = old.next_if(|(index, _)| index == bucket).map_or(0, |(_, count)| *count);
            let new = count.saturating_sub(before);
            (new > 0).then_some((*bucket, new))
        });
        Summary { buckets: buckets.collect(), sum: self.sum.wrapping_sub(earlier.sum) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Summary {
        let (buckets, mut summary) = (Buckets::default(), Summary::default());
        values.into_iter().for_each(|value| buckets.record_alone(value));
        buckets.merge_into(&mut summary);
        summary
    }

    #[test]
    fn every_value_lies_within_its_bucket() {
        let edges = (0..64).flat_map(|bit| [(1u64 << bit).wrapping_sub(1), 1 << bit, (1 << bit) + 1]);
        for value in edges.chain(0..5000).chain([u64::MAX]) {
            let (octave, bucket) = place(value);
            let (low, width) = bounds(octave, bucket);
            assert!(low <= value as f64 && value as f64 <= low + width, "{value}: {low} + {width}");
            assert!(width <= (value as f64 / 16.0).max(1.0), "{value}: a bucket {width} wide");
        }
    }

    #[test]
    fn quantiles_are_near() {
        let summary = of(1..=10_000);
        assert_eq!(summary.count(), 10_000);
        assert_eq!(summary.sum(), 50_005_000);
        for q in QUANTILES {
            let (found, exact) = (summary.quantile(q), q * 10_000.0);
            assert!((found - exact).abs() <= exact * 0.03 + 1.0, "P{}: {found}, not {exact}", q * 100.0);
        }
        assert!(of([]).quantile(0.5).is_nan());
        assert_eq!(of([3, 3, 3]).quantile(0.5), 3.0);
    }

    #[test]
    fn counts_what_is_at_most_a_bound() {
        let summary = of([0, 1, 1, 7, 300]);
        let counts: Vec<u64> = PROMETHEUS_BOUNDS[..9].iter().map(|bound| summary.at_most(*bound)).collect();
        assert_eq!(counts, [1, 3, 3, 4, 4, 4, 4, 4, 5]);
        assert_eq!(summary.at_most(f64::INFINITY), 5);
    }

    #[test]
    fn an_interval_is_the_difference() {
        let (early, late) = (of([1, 5, 900]), of([1, 1, 5, 40, 900]));
        assert_eq!(late.since(&early), of([1, 40]));
        assert_eq!(late.since(&late), of([]));
    }
}
