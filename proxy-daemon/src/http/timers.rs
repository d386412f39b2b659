//! The time limits of one stream, kept in one timer.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use super::{codec::h1::CodecError, stream::Progress};
use crate::runtime::{Lent, Sleeps, clock};

/// Which limit passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expired {
    /// The route's timeout: the response took too long after the request was complete.
    Route,
    /// The stream took too long, from its beginning.
    Duration,
    /// Nothing passed in either direction for too long.
    Idle,
    /// The upstream sent nothing for too long.
    PerTryIdle,
    /// The attempt took too long, from its connection on.
    Attempt,
    /// The request took too long to arrive.
    Request,
    /// A filter has answered the request while its body passed.
    Answered,
    /// The rest of the request is not HTTP: no use to wait for it.
    Malformed(CodecError),
}

/// The limits, and the one timer that is set to the first of them.
pub(super) struct Timers {
    sleeps: Rc<Sleeps>,
    progress: Rc<Progress>,
    started: Instant,
    route: Option<Duration>,
    idle: Option<Duration>,
    request: Option<Duration>,
    per_try_idle: Option<Duration>,
    duration: Option<Duration>,
    attempt: Option<Instant>,
    sleep: Option<Lent>,
}

impl Timers {
    pub(super) fn new(
        sleeps: &Rc<Sleeps>,
        progress: Rc<Progress>,
        started: Instant,
        route: Option<Duration>,
        idle: Option<Duration>,
        request: Option<Duration>,
    ) -> Timers {
        Timers {
            sleeps: Rc::clone(sleeps),
            progress,
            started,
            route,
            idle,
            request,
            per_try_idle: None,
            duration: None,
            attempt: None,
            sleep: None,
        }
    }

    /// The upstream may pause for so long from now on, while its answer lasts.
    pub(super) fn limit_pauses(&mut self, per_try_idle: Option<Duration>) {
        self.per_try_idle = per_try_idle;
        let now = clock::now();
        self.progress.last_response.set(now);
        self.progress.answered.set(Some(now));
    }

    /// However long the rest of the request takes.
    pub(super) fn request_answered(&mut self) {
        self.request = None;
    }

    /// The stream may last so long, from its beginning.
    pub(super) fn limit_duration(&mut self, duration: Option<Duration>) {
        self.duration = duration;
    }

    /// The attempt that has its answer may last until then.
    pub(super) fn limit_attempt(&mut self, until: Option<Instant>) {
        self.attempt = until;
    }

    /// The limit that passes next.
    fn next(&self) -> Option<(Instant, Expired)> {
        let complete = self.progress.request_complete.get();
        let route = self.progress.awaited_since().zip(self.route).map(|(since, limit)| (since + limit, Expired::Route));
        let request = self.request.filter(|_| complete.is_none());
        let request = request.map(|limit| (self.started + limit, Expired::Request));
        let idle = self.idle.map(|limit| (self.progress.last_activity.get() + limit, Expired::Idle));
        let upstream = self.per_try_idle;
        let upstream = upstream.map(|limit| (self.progress.last_response.get() + limit, Expired::PerTryIdle));
        let stream = self.duration.map(|limit| (self.started + limit, Expired::Duration));
        let attempt = self.attempt.map(|until| (until, Expired::Attempt));
        [stream, attempt, route, request, idle, upstream].into_iter().flatten().min_by_key(|(at, _)| *at)
    }

    /// Ready when a limit has passed.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Expired> {
        let held = self.progress.held.get();
        if held && self.progress.is_answered() {
            return Poll::Ready(Expired::Answered);
        }
        if held || self.progress.request_complete.get().is_none() {
            if let Some(error) = self.progress.malformed.get() {
                return Poll::Ready(Expired::Malformed(error));
            }
            self.progress.waker.replace(Some(cx.waker().clone()));
        }
        loop {
            let Some((at, kind)) = self.next() else { return Poll::Pending };
            let sleep = self.sleep.get_or_insert_with(|| self.sleeps.until(at));
            // A timer that is early is left alone: moving it with every byte would cost more than one wake-up.
            if sleep.deadline() > at {
                sleep.reset(at);
            }
            match Pin::new(&mut *sleep).poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) if sleep.deadline() >= at => return Poll::Ready(kind),
                Poll::Ready(()) => sleep.reset(at),
            }
        }
    }

    /// Ends when a limit has passed.
    pub(super) async fn expired(&mut self) -> Expired {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }
}
