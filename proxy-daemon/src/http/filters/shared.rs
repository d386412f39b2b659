//! What all workers read and streams hold on to, without a count that several workers write.

use std::{ops::Deref, sync::Arc};

use thread_local::ThreadLocal;

/// A filter's configuration. An [`Arc`] would be cloned for each stream, and its count written by every worker: here each thread has an
/// `Arc` of its own around the one that is shared.
#[derive(Debug)]
pub(super) struct Shared<T: Send + Sync> {
    value: Arc<T>,
    // It is large.
    of_threads: Box<ThreadLocal<Arc<OfThread<T>>>>,
}

/// What a thread's streams share: one reference to the value.
#[derive(Debug)]
struct OfThread<T>(Arc<T>);

/// What a stream holds on to: it may outlive the filter, which ECDS replaces while it serves.
#[derive(Debug)]
pub(in crate::http) struct Kept<T>(Arc<OfThread<T>>);

impl<T: Send + Sync> Shared<T> {
    pub(super) fn new(value: T) -> Shared<T> {
        Shared { value: Arc::new(value), of_threads: Box::default() }
    }

    /// For a stream of this thread's.
    pub(super) fn keep(&self) -> Kept<T> {
        Kept(Arc::clone(self.of_threads.get_or(|| Arc::new(OfThread(Arc::clone(&self.value))))))
    }
}

impl<T: Send + Sync> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: Send + Sync> FromIterator<T> for Shared<Box<[T]>> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        Shared::new(items.into_iter().collect())
    }
}

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Kept<T> {
        Kept(Arc::clone(&self.0))
    }
}

impl<T> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_count_in_their_thread_alone() {
        let shared = Shared::new("settings".to_owned());
        let streams: Vec<_> = (0..3).map(|_| shared.keep()).collect();
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(Arc::strong_count(&shared.keep().0), 2, "the thread's own and the stream's"));
        });
        assert_eq!(Arc::strong_count(&streams[0].0), 4);
        // The value's own count has one for each thread.
        assert_eq!(Arc::strong_count(&shared.value), 3);
        drop(shared);
        assert_eq!(*streams[2], "settings");
    }
}
