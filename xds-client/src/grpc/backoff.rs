//! How long to wait before the next attempt.

use std::time::Duration;

use crate::source::BackoffLimits;

/// Envoy's limits for xDS.
const DEFAULT: BackoffLimits = BackoffLimits { base: Duration::from_millis(500), max: Duration::from_secs(30) };

/// Envoy's jittered exponential backoff: the n-th wait is evenly distributed up to `base` x 2^n, at most `max`.
#[derive(Debug)]
pub(super) struct Backoff {
    limits: BackoffLimits,
    attempts: u32,
}

impl Backoff {
    /// Within these limits; `None`: Envoy's.
    pub(super) fn new(limits: Option<BackoffLimits>) -> Backoff {
        Backoff { limits: limits.unwrap_or(DEFAULT), attempts: 0 }
    }

    /// The next wait.
    pub(super) fn next(&mut self) -> Duration {
        let limit = self.limits.base.saturating_mul(2_u32.saturating_pow(self.attempts)).min(self.limits.max);
        self.attempts = self.attempts.saturating_add(1);
        limit.mul_f64(fastrand::f64())
    }

    /// Starts again: the server is well.
    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_start_again() {
        let short = BackoffLimits { base: Duration::from_millis(1), max: Duration::from_millis(3) };
        for limits in [None, Some(short)] {
            let BackoffLimits { base, max } = limits.unwrap_or(DEFAULT);
            for _ in 0..100 {
                let mut backoff = Backoff::new(limits);
                assert!(backoff.next() <= base);
                assert!(backoff.next() <= base * 2);
                for _ in 0..1000 {
                    assert!(backoff.next() <= max);
                }
                backoff.reset();
                assert!(backoff.next() <= base);
            }
        }
    }

    #[test]
    fn waits_are_spread() {
        let waits: std::collections::BTreeSet<_> = (0..100).map(|_| Backoff::new(None).next()).collect();
        assert!(waits.len() > 50, "many clients would come back at the same moment: {waits:?}");
    }
}
