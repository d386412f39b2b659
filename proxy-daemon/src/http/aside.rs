//! What a connection waits for beside its work, at no cost to the work.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

pin_project_lite::pin_project! {
/// A future that is polled only when it was woken itself, not whenever its task runs: a drain signal takes a lock that workers
/// share, and a timer's check is not free, so neither may be looked at once a request.
pub(super) struct Aside<F> {
    #[pin]
    future: F,
    // What the future was given to wake, once it was polled.
    given: Option<(Arc<Bell>, Waker)>,
}
}

/// Wakes a task, and says that it did.
struct Bell {
    rung: AtomicBool,
    task: Waker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.rung.store(true, Ordering::Release);
        self.task.wake_by_ref();
    }
}

/// Sets `future` aside.
pub(super) fn aside<F: Future>(future: F) -> Aside<F> {
    Aside { future, given: None }
}

impl<F: Future> Future for Aside<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        match this.given {
            Some((bell, _)) if bell.task.will_wake(cx.waker()) => {
                // Rung after this, it wakes the task once more.
                if !bell.rung.load(Ordering::Relaxed) {
                    return Poll::Pending;
                }
                bell.rung.swap(false, Ordering::AcqRel);
            }
            _ => {
                let bell = Arc::new(Bell { rung: AtomicBool::new(false), task: cx.waker().clone() });
                *this.given = Some((Arc::clone(&bell), Waker::from(bell)));
            }
        }
        let Some((_, waker)) = this.given else { return Poll::Pending };
        this.future.poll(&mut Context::from_waker(waker))
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
