//! What time it is, asked once for each turn that a task of a worker has.
//!
//! A request notes a dozen moments, most of them several in one turn of its task: between reading and writing nothing takes long. The
//! kernel's answer takes as long as a hundred of our own instructions.

use std::{
    cell::Cell,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant, SystemTime},
};

#[derive(Debug, Clone, Copy)]
enum Known {
    /// It is nobody's turn: the kernel is asked each time.
    Never,
    /// Nobody has asked in this turn.
    NotYet,
    /// The answer of this turn.
    Now(Instant),
}

thread_local! {
    static KNOWN: Cell<Known> = const { Cell::new(Known::Never) };
}

/// The time; within a turn, that of its first call.
pub fn now() -> Instant {
    match KNOWN.get() {
        Known::Now(now) => now,
        Known::NotYet => {
            let now = Instant::now();
            KNOWN.set(Known::Now(now));
            now
        }
        Known::Never => Instant::now(),
    }
}

/// The time of day at that moment, which was not long ago. Both clocks are compared anew once a second.
pub fn wall(then: Instant) -> SystemTime {
    thread_local! {
        static COMPARED: Cell<Option<(Instant, SystemTime)>> = const { Cell::new(None) };
    }
    let now = now();
    let known = COMPARED.get().filter(|(at, _)| now.saturating_duration_since(*at) < Duration::from_secs(1));
    let (at, wall) = known.unwrap_or_else(|| {
        let both = (Instant::now(), SystemTime::now());
        COMPARED.set(Some(both));
        both
    });
    match then.checked_duration_since(at) {
        Some(after) => wall + after,
        None => wall - at.saturating_duration_since(then),
    }
}

/// How long ago that was; zero where it is still to come.
pub fn since(then: Instant) -> Duration {
    now().saturating_duration_since(then)
}

pin_project_lite::pin_project! {
/// A future whose polls are turns.
pub struct Turns<F> {
    #[pin]
    future: F,
}
}

/// Has each poll of `future` be a turn. What takes long within one, or waits without giving way, must not be measured by [`now`].
#[inline(always)]
pub fn in_turns<F>(future: F) -> Turns<F> {
    Turns { future }
}

/// Ends a turn, also where that panics. Within another turn it only begins that anew.
struct Turn(Known);

impl Drop for Turn {
    fn drop(&mut self) {
        KNOWN.set(self.0);
    }
}

impl<F: Future> Future for Turns<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _turn = Turn(KNOWN.replace(Known::NotYet));
        self.project().future.poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_time_stands_still_for_a_turn() {
        let passes = || {
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(1) {}
        };
        let before = now();
        passes();
        assert!(since(before) >= Duration::from_millis(1), "outside of turns it goes on");
        let (first, second) = in_turns(async {
            let first = now();
            passes();
            assert_eq!((now(), since(first)), (first, Duration::ZERO));
            tokio::task::yield_now().await;
            (first, now())
        })
        .await;
        assert!(second - first >= Duration::from_millis(1), "the next turn has a time of its own");
        let apart = wall(second).duration_since(SystemTime::now() - since(second));
        let apart = apart.unwrap_or_else(|error| error.duration());
        assert!(apart < Duration::from_secs(1), "{apart:?}");
        let after = now();
        passes();
        assert!(now() > after);
    }
}
