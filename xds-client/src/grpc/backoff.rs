//! How long to wait before the next attempt.

use std::time::Duration;

/// The upper end of the first wait.
const BASE: Duration = Duration::from_millis(500);
/// The upper end of all waits.
const CAP: Duration = Duration::from_secs(30);

/// Envoy's jittered exponential backoff: the n-th wait is evenly distributed up to `BASE` x 2^n, at most `CAP`.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    attempts: u32,
}

impl Backoff {
    /// The next wait.
    pub(super) fn next(&mut self) -> Duration {
        let limit = BASE.saturating_mul(2_u32.saturating_pow(self.attempts)).min(CAP);
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
        for _ in 0..100 {
            let mut backoff = Backoff::default();
            assert!(backoff.next() <= BASE);
            assert!(backoff.next() <= BASE * 2);
            for _ in 0..1000 {
                assert!(backoff.next() <= CAP);
            }
            backoff.reset();
            assert!(backoff.next() <= BASE);
        }
    }

    #[test]
    fn waits_are_spread() {
        let waits: std::collections::BTreeSet<_> = (0..100).map(|_| Backoff::default().next()).collect();
        assert!(waits.len() > 50, "many clients would come back at the same moment: {waits:?}");
    }
}
