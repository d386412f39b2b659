//! How often requests may be sent.

use std::time::Duration;

use tokio::time::Instant;

use crate::source::RateLimit;

/// A token bucket. It starts full.
#[derive(Debug)]
pub(super) struct Bucket {
    limit: RateLimit,
    tokens: u32,
    /// Since when the next token fills.
    since: Instant,
}

impl Bucket {
    pub(super) fn new(limit: RateLimit) -> Bucket {
        Bucket { limit, tokens: limit.max_tokens, since: Instant::now() }
    }

    /// Takes a token out, if there is one.
    pub(super) fn take(&mut self) -> bool {
        self.fill();
        let taken = self.tokens > 0;
        if taken {
            self.tokens -= 1;
        }
        taken
    }

    /// When the next token will be there, at the latest.
    pub(super) fn next(&self) -> Instant {
        // A day, where the rate is so small that it cannot be told from none.
        let day = Duration::from_secs(86_400);
        self.since + self.limit.fill_interval.min(day)
    }

    fn fill(&mut self) {
        let interval = self.limit.fill_interval.as_nanos().max(1);
        let filled = self.since.elapsed().as_nanos() / interval;
        if filled == 0 {
            return;
        }
        self.tokens = u32::try_from(filled).unwrap_or(u32::MAX).saturating_add(self.tokens).min(self.limit.max_tokens);
        // What is left of an interval counts for the next token.
        let rest = u64::try_from(self.since.elapsed().as_nanos() % interval).unwrap_or_default();
        self.since = Instant::now() - Duration::from_nanos(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_bucket_lets_a_burst_through_and_then_one_an_interval() {
        let interval = Duration::from_millis(100);
        let mut bucket = Bucket::new(RateLimit { max_tokens: 2, fill_interval: interval });
        assert!(bucket.take() && bucket.take());
        assert!(!bucket.take());
        tokio::time::sleep_until(bucket.next()).await;
        assert!(bucket.take());
        assert!(!bucket.take());
        tokio::time::sleep(interval * 10).await;
        assert!(bucket.take() && bucket.take() && !bucket.take(), "no more than max_tokens");
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_bucket_without_tokens_stays_empty() {
        let mut bucket = Bucket::new(RateLimit { max_tokens: 0, fill_interval: Duration::MAX });
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert!(!bucket.take());
        assert!(bucket.next() > Instant::now());
    }
}
