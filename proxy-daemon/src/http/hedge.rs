//! `hedge_on_per_try_timeout`: an attempt that is late is not given up, there is one more beside it. The first answer that would not be
//! tried again is the client's; the other attempts end with it, and none of them has a part in what the client gets.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    ops::Deref,
    pin::Pin,
    rc::Rc,
    task::Poll,
    time::{Duration, Instant},
};

use http::Response;
use tokio::time::Sleep;

use super::{
    attempts::{Attempts, Failed, set_aside},
    body::Body,
    codec::Incoming,
    replay::Replay,
    retry::{Failure, Verdict},
    sizes::Sizes,
    stream::{LocalReply, RequestHead},
    stream_end::{Notes, StreamEnd},
};
use crate::upstream::{Chosen, Connection, HostCounter, Seen};

type Answered = Result<(Response<Incoming>, Connection), Failed>;

/// One attempt that is under way.
struct Try<'a> {
    number: u32,
    /// There is another one because this one is late.
    hedged: bool,
    answer: Pin<Box<dyn Future<Output = Answered> + 'a>>,
    /// How long it may last.
    until: Rc<Cell<Option<Instant>>>,
    /// How large its messages are, where the cluster tells.
    sizes: Option<Rc<Sizes>>,
    held: Held,
}

/// A host that an attempt has, and its place at the circuit breaker.
struct Held {
    chosen: Rc<Chosen>,
    /// The priority.
    high: bool,
}

impl Deref for Held {
    type Target = Chosen;

    fn deref(&self) -> &Chosen {
        &self.chosen
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.cluster.cluster.end_request(self.high);
        self.host.end_request();
    }
}

/// What happens next.
enum Event {
    /// The attempt at this place has an answer, or has none.
    Answered(usize, Box<Answered>),
    /// The attempt of this number is late.
    Late(u32),
    /// One more attempt has its turn.
    Due,
}

impl Attempts<'_> {
    /// As [`run`](Attempts::run), with an attempt beside each that is late.
    pub(super) async fn run_hedged(
        &mut self,
        end: &mut StreamEnd,
        mut head: RequestHead,
    ) -> Result<(Response<Incoming>, Connection), LocalReply> {
        let late: Rc<RefCell<VecDeque<u32>>> = Rc::default();
        let mut tries: Vec<Try<'_>> = Vec::new();
        // The pause before the next attempt.
        let mut pause: Option<Pin<Box<Sleep>>> = Some(Box::pin(tokio::time::sleep(Duration::ZERO)));
        let mut timed_out = false;
        loop {
            self.under_way.set(tries.len());
            match next(&mut tries, &late, &mut pause).await {
                Event::Due => {
                    pause = None;
                    self.count += 1;
                    if self.count > 1 {
                        self.tell_retry(&mut head, timed_out);
                        end.keep_sent(&head);
                    }
                    let chosen = match self.choose(end, &head) {
                        Ok(chosen) => Rc::new(chosen),
                        // Others may have an answer yet.
                        Err(_) if !tries.is_empty() => continue,
                        Err(reply) => return Err(reply),
                    };
                    if end.host.take().is_none() {
                        continue;
                    }
                    let held = Held { chosen: Rc::clone(&chosen), high: self.action.high_priority };
                    let replay = self.retry.as_ref().and_then(|retry| retry.body.as_ref());
                    let body = replay.map_or(Body::Empty, |replay| replay.reader());
                    let (request, number) = ((head.clone(), body), self.count);
                    let sizes = Sizes::of(self.cluster);
                    let notes = Notes { counted: end.notes.counted.clone(), sizes: sizes.clone(), ..Notes::default() };
                    let shared = self.shared;
                    let (late, until) = (Rc::clone(&late), Rc::new(Cell::new(None)));
                    let ends = Rc::clone(&until);
                    let answer = Box::pin(async move {
                        let soft = || late.borrow_mut().push_back(number);
                        shared.attempt((&notes, &ends), &chosen, request, number, Some(&soft)).await
                    });
                    tries.push(Try { number, hedged: false, answer, sizes, held, until });
                }
                Event::Late(number) => {
                    let Some(at) = tries.iter().position(|one| one.number == number) else { continue };
                    let verdict = self.judge(end, |retry, cluster, high| retry.judge_late(cluster, high));
                    if verdict == Verdict::Retry {
                        tries[at].hedged = true;
                        timed_out = true;
                        pause = Some(self.next_turn(&tries[at].held.chosen.clone()));
                    }
                }
                Event::Answered(at, answered) => match *answered {
                    Ok((response, connection)) => {
                        let one = tries.swap_remove(at);
                        let (response, incoming) = response.into_parts();
                        let others = !tries.is_empty() || pause.is_some();
                        if one.hedged {
                            // Its retry is under way already.
                            if others && self.retry.as_ref().is_some_and(|retry| retry.wants_response(&response)) {
                                one.held.host.count(HostCounter::RqError, 1);
                                set_aside(&incoming, connection);
                                continue;
                            }
                        } else {
                            let verdict =
                                self.judge(end, |retry, cluster, high| retry.judge_response(&response, cluster, high));
                            if verdict == Verdict::Retry {
                                self.cluster.cluster.stats.count_retried(response.status.as_u16());
                                one.held.host.count(HostCounter::RqError, 1);
                                set_aside(&incoming, connection);
                                timed_out = false;
                                pause = Some(self.next_turn(&one.held));
                                continue;
                            }
                            // It may not be tried again: another one may have a better answer yet.
                            if others && self.retry.as_ref().is_some_and(|retry| retry.wants_response(&response)) {
                                one.held.host.count(HostCounter::RqError, 1);
                                set_aside(&incoming, connection);
                                continue;
                            }
                        }
                        end.set_host(self.cluster, &one.held, one.held.high);
                        end.notes.upstream.set(Some(Rc::clone(connection.info())));
                        end.notes.sizes = one.sizes;
                        self.cx.progress.upstream_protocol.set(Some(connection.protocol()));
                        self.until.set(one.until.get());
                        end.judge_response(&response, http_body::Body::is_end_stream(&incoming));
                        return Ok((Response::from_parts(response, incoming), connection));
                    }
                    Err(failed) => {
                        let one = tries.swap_remove(at);
                        if failed.gone_away {
                            one.held.host.saw(Seen::ConnectFailed);
                        }
                        if let Some(reply) = self.cx.progress.instead.take() {
                            return Err(*reply);
                        }
                        if failed.stale {
                            // The next attempt is free.
                            self.count -= 1;
                            pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(Duration::ZERO)));
                            continue;
                        }
                        // Where another attempt has got further, there is somebody in the tunnel.
                        if tries.is_empty() && self.can_begin_anew() && self.leaves_tunnel(&failed, end)? {
                            one.held.host.count(HostCounter::RqError, 1);
                            pause.get_or_insert_with(|| Box::pin(tokio::time::sleep(Duration::ZERO)));
                            continue;
                        }
                        let failure = failed.failure;
                        let verdict = match one.hedged {
                            true => Verdict::No,
                            false => {
                                self.judge(end, |retry, cluster, high| retry.judge_failure(failure, cluster, high))
                            }
                        };
                        if verdict == Verdict::Retry {
                            one.held.host.count(HostCounter::RqError, 1);
                            timed_out = matches!(failure, Failure::PerTryIdleTimeout);
                            pause = Some(self.next_turn(&one.held));
                        } else if !tries.is_empty() || pause.is_some() {
                            one.held.host.count(HostCounter::RqError, 1);
                            end.charge(self.cluster, failed.status, Some(&one.held.host));
                        } else {
                            end.set_host(self.cluster, &one.held, one.held.high);
                            return Err(self.give_up(end, failed));
                        }
                    }
                },
            }
        }
    }

    /// Whether the request can be sent once more, as far as its body goes.
    fn can_begin_anew(&self) -> bool {
        let body = self.retry.as_ref().and_then(|retry| retry.body.as_ref());
        !body.is_some_and(Replay::is_abandoned)
    }

    /// The pause before the next attempt, which is not made with this host if that can be avoided.
    fn next_turn(&mut self, chosen: &Chosen) -> Pin<Box<Sleep>> {
        let pause = self.retry.as_mut().map(|retry| {
            retry.avoid(self.shared.cluster, chosen);
            retry.pause(self.shared.cluster)
        });
        Box::pin(tokio::time::sleep(pause.unwrap_or_default()))
    }
}

/// All attempts are looked at whenever anything happens: what they wait for does not always wake them alone, and they are few.
async fn next(tries: &mut [Try<'_>], late: &RefCell<VecDeque<u32>>, pause: &mut Option<Pin<Box<Sleep>>>) -> Event {
    std::future::poll_fn(|cx| {
        for (at, one) in tries.iter_mut().enumerate() {
            if let Poll::Ready(answered) = one.answer.as_mut().poll(cx) {
                return Poll::Ready(Event::Answered(at, Box::new(answered)));
            }
        }
        if let Some(number) = late.borrow_mut().pop_front() {
            return Poll::Ready(Event::Late(number));
        }
        match pause {
            Some(pause) => pause.as_mut().poll(cx).map(|()| Event::Due),
            None => Poll::Pending,
        }
    })
    .await
}
