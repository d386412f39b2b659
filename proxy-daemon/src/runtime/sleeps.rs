//! Timers that the streams and connections of a worker take turns with.
//!
//! Most of them are set for a limit that nothing ever reaches. A new one is put into the runtime's wheel and later taken out again, under
//! a lock; one that is in the wheel is moved to a later time by writing down that time. So those that are not needed any more stay there
//! for whoever is next.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::time::Sleep;

use super::clock;

/// So many of each length are kept.
const KEPT: usize = 64;
/// Lengths are told apart by their binary logarithm, in milliseconds, up to 49 days: a timer that was set for an hour would have to go
/// through the wheel to be one for a second.
const LENGTHS: usize = 32;

/// A worker's timers that nobody uses at the moment.
#[derive(Debug, Default)]
pub struct Sleeps([RefCell<Vec<Pin<Box<Sleep>>>>; LENGTHS]);

impl Sleeps {
    /// A timer for this moment.
    pub fn until(self: &Rc<Self>, at: Instant) -> Lent {
        self.lend(clock::now(), at)
    }

    fn lend(self: &Rc<Self>, now: Instant, at: Instant) -> Lent {
        let milliseconds = at.saturating_duration_since(now).as_millis();
        let length = (u128::BITS - milliseconds.leading_zeros()).min(LENGTHS as u32 - 1) as usize;
        let kept = self.0[length].borrow_mut().pop();
        let mut sleep = kept.unwrap_or_else(|| Box::pin(tokio::time::sleep_until(at.into())));
        // It may have gone off meanwhile, or somebody's waker may be with it: that one is woken once for nothing.
        if sleep.deadline() != at.into() {
            sleep.as_mut().reset(at.into());
        }
        Lent { sleep: Some(sleep), at, length, home: Rc::clone(self) }
    }

    /// A timer for as long as this, from now on.
    pub fn sleep(self: &Rc<Self>, length: Duration) -> Lent {
        let now = clock::now();
        // As good as never, where no clock goes so far.
        self.lend(now, now.checked_add(length).unwrap_or_else(|| now + Duration::from_secs(86_400 * 365)))
    }
}

/// A timer that is lent to a stream or connection: ready at its time.
#[derive(Debug)]
pub struct Lent {
    /// None only when it is dropped.
    sleep: Option<Pin<Box<Sleep>>>,
    at: Instant,
    length: usize,
    home: Rc<Sleeps>,
}

impl Lent {
    /// When it goes off.
    pub fn deadline(&self) -> Instant {
        self.at
    }

    /// Sets it to another time.
    pub fn reset(&mut self, at: Instant) {
        self.at = at;
        if let Some(sleep) = &mut self.sleep {
            sleep.as_mut().reset(at.into());
        }
    }
}

impl Future for Lent {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.get_mut().sleep {
            Some(sleep) => sleep.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut kept = self.home.0[self.length].borrow_mut();
        if kept.len() < KEPT {
            kept.extend(self.sleep.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_timer_that_is_not_needed_is_the_next_ones() {
        let sleeps = Rc::new(Sleeps::default());
        let kept = || sleeps.0.iter().map(|kept| kept.borrow().len()).sum::<usize>();
        let mut unneeded = sleeps.sleep(Duration::from_millis(20));
        let polled = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut unneeded).poll(cx))).await;
        assert!(polled.is_pending());
        drop(unneeded);
        assert_eq!(kept(), 1);
        for _ in 0..2 {
            // As long as the first one by its logarithm: it is moved, and then, when it has gone off, set anew.
            let (began, length) = (Instant::now(), Duration::from_millis(30));
            let sleep = sleeps.sleep(length);
            assert_eq!(kept(), 0);
            sleep.await;
            assert!(began.elapsed() >= length);
            assert_eq!(kept(), 1);
        }
        let other = sleeps.sleep(Duration::from_secs(3600));
        assert_eq!(kept(), 1, "one of another length stays where it is");
        drop(other);
        assert_eq!(kept(), 2);
    }
}
