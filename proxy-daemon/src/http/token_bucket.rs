//! A token bucket that all workers share without a lock.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A bucket that is filled steadily: the tokens of a fill are spread over their interval, as in Envoy. It begins full.
///
/// All that it keeps is the time at which it would have been empty: every token that is taken moves that on by what a token takes
/// to come.
#[derive(Debug)]
pub struct TokenBucket {
    since: Instant,
    max_tokens: f64,
    /// Nanoseconds that a token takes to come.
    per_token: f64,
    /// Nanoseconds after `since`, as the bits of an `f64`.
    empty_at: AtomicU64,
}

impl TokenBucket {
    /// Of at most `max_tokens`, with `tokens_per_fill` coming in every `interval`, at least one.
    pub fn new(max_tokens: u64, tokens_per_fill: u64, interval: Duration) -> TokenBucket {
        let max_tokens = max_tokens as f64;
        let per_token = interval.as_nanos() as f64 / tokens_per_fill.max(1) as f64;
        let full = -max_tokens * per_token;
        // The clock of those who take.
        let since = tokio::time::Instant::now().into_std();
        TokenBucket { since, max_tokens, per_token, empty_at: AtomicU64::new(full.to_bits()) }
    }

    /// Takes a token, unless there is none at `now`.
    pub fn take(&self, now: Instant) -> bool {
        self.take_up_to(1, now) == 1
    }

    /// Takes so many tokens, unless there are fewer at `now`. As in Envoy, there are never none to be had.
    pub fn take_all(&self, wanted: u64, now: Instant) -> bool {
        let now = self.nanoseconds(now);
        let full = now - self.max_tokens * self.per_token;
        let next = |bits| {
            let empty_at = f64::from_bits(bits).max(full);
            let there = ((now - empty_at) / self.per_token).floor();
            (wanted > 0 && there >= wanted as f64).then_some((empty_at + wanted as f64 * self.per_token).to_bits())
        };
        self.empty_at.try_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }

    /// Takes the tokens that there are at `now`, at most `wanted`; says how many.
    pub fn take_up_to(&self, wanted: usize, now: Instant) -> usize {
        let now = self.nanoseconds(now);
        let full = now - self.max_tokens * self.per_token;
        let mut taken = 0.0;
        let next = |bits| {
            let empty_at = f64::from_bits(bits).max(full);
            taken = ((now - empty_at) / self.per_token).floor().clamp(0.0, wanted as f64);
            (taken > 0.0).then_some((empty_at + taken * self.per_token).to_bits())
        };
        let done = self.empty_at.try_update(Ordering::Relaxed, Ordering::Relaxed, next);
        if done.is_ok() { taken as usize } else { 0 }
    }

    /// The most tokens that it holds.
    pub fn max_tokens(&self) -> u64 {
        self.max_tokens as u64
    }

    /// How many tokens there are at `now`, parts of one too.
    pub fn remaining(&self, now: Instant) -> f64 {
        let empty_at = f64::from_bits(self.empty_at.load(Ordering::Relaxed));
        ((self.nanoseconds(now) - empty_at) / self.per_token).clamp(0.0, self.max_tokens)
    }

    /// How long the next token takes to come.
    pub fn next(&self, now: Instant) -> Duration {
        let missing = (1.0 - self.remaining(now)).max(0.0);
        Duration::from_nanos((missing * self.per_token) as u64)
    }

    /// How long a token takes to come.
    pub fn per_token(&self) -> Duration {
        Duration::from_nanos(self.per_token as u64)
    }

    fn nanoseconds(&self, now: Instant) -> f64 {
        now.saturating_duration_since(self.since).as_nanos() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_what_it_holds_and_is_filled_steadily() {
        let bucket = TokenBucket::new(3, 2, Duration::from_secs(1));
        let at = |milliseconds| bucket.since + Duration::from_millis(milliseconds);
        assert_eq!((0..5).map(|_| bucket.take(at(0))).collect::<Vec<_>>(), [true, true, true, false, false]);
        assert_eq!(bucket.next(at(0)), Duration::from_millis(500));
        assert!(!bucket.take(at(499)));
        assert!(bucket.take(at(500)), "two a second: one every half second");
        assert!(!bucket.take(at(500)));
        assert_eq!(bucket.remaining(at(1250)), 1.5);
        assert_eq!(bucket.remaining(at(60_000)), 3.0, "never more than it holds");
        assert_eq!((0..4).map(|_| bucket.take(at(60_000))).collect::<Vec<_>>(), [true, true, true, false]);
    }

    #[test]
    fn a_bucket_gives_as_many_as_there_are() {
        let bucket = TokenBucket::new(1000, 1000, Duration::from_secs(1));
        let at = |milliseconds| bucket.since + Duration::from_millis(milliseconds);
        assert_eq!(
            (bucket.take_up_to(600, at(0)), bucket.take_up_to(600, at(0)), bucket.take_up_to(1, at(0))),
            (600, 400, 0)
        );
        assert_eq!((bucket.take_up_to(600, at(250)), bucket.take_up_to(0, at(500))), (250, 0));
        assert_eq!(bucket.take_up_to(usize::MAX, at(60_000)), 1000);
    }

    #[test]
    fn a_bucket_gives_all_that_is_wanted_or_none() {
        let bucket = TokenBucket::new(5, 5, Duration::from_secs(1));
        let at = |milliseconds| bucket.since + Duration::from_millis(milliseconds);
        assert_eq!([3, 3, 2, 1].map(|wanted| bucket.take_all(wanted, at(0))), [true, false, true, false]);
        assert_eq!([2, 1].map(|wanted| bucket.take_all(wanted, at(200))), [false, true]);
        assert!(!bucket.take_all(u64::MAX, at(60_000)), "more than it holds");
        assert!(!bucket.take_all(0, at(60_000)));
    }

    #[test]
    fn a_bucket_that_holds_none_gives_none() {
        let bucket = TokenBucket::new(0, 0, Duration::from_secs(1));
        assert_eq!(bucket.take_up_to(1, bucket.since + Duration::from_secs(60)), 0);
    }
}
