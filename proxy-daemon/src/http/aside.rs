//! What a connection waits for beside its work, at no cost to the work.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use futures_util::task::AtomicWaker;

pin_project_lite::pin_project! {
/// A future that is polled only when it was woken itself, not whenever its task runs: a drain signal takes a lock that workers
/// share, and a timer's check is not free, so neither may be looked at once a request.
pub(super) struct Aside<F> {
    #[pin]
    future: F,
    shared: Arc<Shared>,
    waker: Waker,
}
}

struct Shared {
    woken: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.task.wake();
    }
}

/// Sets `future` aside.
pub(super) fn aside<F: Future>(future: F) -> Aside<F> {
    let shared = Arc::new(Shared { woken: AtomicBool::new(true), task: AtomicWaker::new() });
    Aside { future, waker: Waker::from(Arc::clone(&shared)), shared }
}

impl<F: Future> Future for Aside<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        this.shared.task.register(cx.waker());
        if !this.shared.woken.swap(false, Ordering::AcqRel) {
            return Poll::Pending;
        }
        this.future.poll(&mut Context::from_waker(this.waker))
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, task::Poll};

    use super::*;

    #[tokio::test]
    async fn it_is_polled_when_it_was_woken_and_not_whenever_its_task_runs() {
        let (polls, sender) = (Cell::new(0), tokio::sync::Notify::new());
        let mut told = std::pin::pin!(sender.notified());
        let mut waiting = std::pin::pin!(aside(std::future::poll_fn(|cx| {
            polls.set(polls.get() + 1);
            told.as_mut().poll(cx)
        })));
        for _ in 0..3 {
            let polled = std::future::poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await;
            assert!(polled.is_pending());
        }
        assert_eq!(polls.get(), 1);
        sender.notify_waiters();
        waiting.await;
        assert_eq!(polls.get(), 2);
    }
}
