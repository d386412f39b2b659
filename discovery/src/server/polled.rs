//! The views of clients that poll. Between two polls nobody else may hold on to one, which would be made anew each time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::resources::ResourceSet;

/// How long a view is kept for the next poll. Envoy's `refresh_delay` is seconds.
const KEPT: Duration = Duration::from_secs(60);

/// The views of the last minute.
#[derive(Debug, Default)]
pub(super) struct Polled(Mutex<Views>);

#[derive(Debug, Default)]
struct Views {
    /// By where they are in memory, when they were last given.
    kept: HashMap<usize, (Arc<ResourceSet>, Instant)>,
    looked_through: Option<Instant>,
}

impl Polled {
    /// Keeps what a client is given.
    pub(super) fn keep(&self, set: &Arc<ResourceSet>) {
        let now = Instant::now();
        let mut views = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        views.kept.insert(Arc::as_ptr(set).addr(), (Arc::clone(set), now));
        if views.looked_through.is_none_or(|at| now - at >= KEPT) {
            views.looked_through = Some(now);
            views.kept.retain(|_, (_, given)| now - *given < KEPT);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn views_are_kept_from_one_poll_to_the_next() {
        let (polled, often, once) = (Polled::default(), Arc::default(), Arc::<ResourceSet>::default());
        polled.keep(&once);
        for _ in 0..6 {
            polled.keep(&often);
            assert_eq!(Arc::strong_count(&often), 2);
            tokio::time::advance(KEPT / 3).await;
        }
        assert_eq!(Arc::strong_count(&once), 1);
    }
}
