//! Requests that have begun a little while ago.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Parts of the interval, each with a count of its own.
const PARTS: u64 = 10;

/// How many requests have begun within an interval, to a tenth of it. Shared by workers: only clusters that ask for it have one.
#[derive(Debug)]
pub(super) struct Recent {
    since: Instant,
    /// At least a microsecond.
    part: Duration,
    /// The number of a part (from its lower 32 bits), and how many have begun in it.
    counts: [AtomicU64; PARTS as usize],
}

impl Recent {
    /// Of the requests from now on.
    pub(super) fn new(interval: Duration) -> Recent {
        let part = (interval / PARTS as u32).max(Duration::from_micros(1));
        // What is 0 is of the first part, and nothing has begun in it.
        Recent { since: Instant::now(), part, counts: Default::default() }
    }

    /// The number of the part that is now. Numbers come again after 2^32 parts, which is harmless: a count that old is then taken
    /// for a new one, once.
    fn now(&self) -> u64 {
        self.part_at(Instant::now())
    }

    fn part_at(&self, at: Instant) -> u64 {
        (at.saturating_duration_since(self.since).as_nanos() / self.part.as_nanos()) as u64 & u64::from(u32::MAX)
    }

    /// One has begun.
    pub(super) fn begun(&self) {
        self.begun_in(self.now());
    }

    fn begun_in(&self, part: u64) {
        let count = &self.counts[(part % PARTS) as usize];
        let more = |known: u64| {
            let counted = if known >> 32 == part { known & u64::from(u32::MAX) } else { 0 };
            Some(part << 32 | (counted + 1).min(u64::from(u32::MAX)))
        };
        // It always has a new value.
        let _ = count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
    }

    /// How many have begun within the interval.
    pub(super) fn count(&self) -> u64 {
        self.count_until(self.now())
    }

    fn count_until(&self, now: u64) -> u64 {
        let counts = self.counts.iter().map(|count| count.load(Ordering::Relaxed));
        let recent = counts.filter(|count| now.wrapping_sub(count >> 32) & u64::from(u32::MAX) < PARTS);
        recent.map(|count| count & u64::from(u32::MAX)).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_older_than_the_interval_does_not_count() {
        let recent = Recent::new(Duration::from_secs(10));
        let second = |seconds: u64| recent.part_at(recent.since + Duration::from_secs(seconds));
        assert_eq!(recent.count_until(second(0)), 0);
        for at in [0, 0, 3, 9] {
            recent.begun_in(second(at));
        }
        assert_eq!(recent.count_until(second(9)), 4);
        assert_eq!(recent.count_until(second(10)), 2);
        recent.begun_in(second(13));
        assert_eq!(recent.count_until(second(13)), 2, "the place of the third second is taken");
        assert_eq!(recent.count_until(second(18)), 2);
        assert_eq!(recent.count_until(second(19)), 1);
        assert_eq!(recent.count_until(second(23)), 0);
        assert_eq!(recent.count_until(second(1000)), 0);
    }

    #[test]
    fn the_shortest_interval_is_one() {
        let recent = Recent::new(Duration::from_nanos(1));
        recent.begun();
        assert!(recent.count() <= 1);
    }
}
