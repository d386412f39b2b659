//! Bodies on their way out.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes};
use h2::{Reason, SendStream};
use http_body::Body as _;
use tokio::sync::oneshot;

use crate::http::body::Body;

/// How much of a connection's bodies has been handed to the crate and not yet to the socket. While it is more than the connection's
/// limit, no stream adds to it.
pub(super) struct Outbox {
    queued: Cell<usize>,
    limit: usize,
    /// Streams that wait for room.
    waiting: RefCell<Vec<Waker>>,
}

impl Outbox {
    /// At most `limit` bytes wait, and one piece more for each stream that finds it below that.
    pub(super) fn new(limit: u32) -> Rc<Outbox> {
        // Whatever the limit: a frame passes.
        let limit = (limit as usize).max(16 * 1024);
        Rc::new(Outbox { queued: Cell::new(0), limit, waiting: RefCell::default() })
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.queued.get() < self.limit {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        // Streams poll one after the other: the last one is the one that would come twice.
        if waiting.last().is_none_or(|last| !last.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    fn sent(&self, bytes: usize) {
        self.queued.set(self.queued.get() - bytes);
        // Half of it is free: those that wait need not come for each frame.
        if self.queued.get() <= self.limit / 2 && !self.waiting.borrow().is_empty() {
            self.waiting.take().into_iter().for_each(Waker::wake);
        }
    }
}

/// A piece of a body until the socket has it.
pub(super) struct Piece {
    bytes: Bytes,
    whose: Whose,
}

/// Who hears of a piece that has gone.
enum Whose {
    Nobody,
    Outbox(Rc<Outbox>),
    /// Dropped with the piece, which is how it tells.
    Waiting(#[expect(dead_code, reason = "dropped only")] oneshot::Sender<()>),
}

impl Piece {
    fn new(bytes: Bytes, outbox: &Rc<Outbox>) -> Piece {
        outbox.queued.set(outbox.queued.get() + bytes.len());
        Piece { bytes, whose: Whose::Outbox(Rc::clone(outbox)) }
    }

    /// Says that there is nothing more.
    pub(super) fn none() -> Piece {
        Piece { bytes: Bytes::new(), whose: Whose::Nobody }
    }

    /// Nothing, and what hears of it when the crate has done with it, and so with all that its stream was given before.
    fn last() -> (Piece, oneshot::Receiver<()>) {
        let (waiting, gone) = oneshot::channel();
        (Piece { bytes: Bytes::new(), whose: Whose::Waiting(waiting) }, gone)
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Whose::Outbox(outbox) = &self.whose {
            outbox.sent(count);
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Whose::Outbox(outbox) = &self.whose
            && !self.bytes.is_empty()
        {
            outbox.sent(self.bytes.len());
        }
    }
}

/// The stream did not end as it should have.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The other side has reset it, or the body broke off.
    Off,
    /// The other side does not take the rest.
    NotTaken,
    /// A limit of time has passed while the other side took nothing.
    Late,
}

/// Sends a body, and what comes after it. Ends early where the other side does not want more.
///
/// # Errors
/// The other side has reset the stream, or does not take what is left within `flush`, or the body broke off, of which the other
/// side is told.
pub(super) async fn send_body(
    body: &mut Body,
    to: &mut SendStream<Piece>,
    outbox: &Rc<Outbox>,
    flush: Option<Duration>,
) -> Result<(), Broken> {
    loop {
        let frame = poll_fn(|cx| match to.poll_reset(cx) {
            Poll::Ready(_) => Poll::Ready(Err(Broken::Off)),
            Poll::Pending => Pin::new(&mut *body).poll_frame(cx).map(Ok),
        });
        let frame = match frame.await? {
            Some(Ok(frame)) => frame,
            Some(Err(_)) => {
                // It has ended: it is logged now.
                drop(std::mem::take(body));
                break_off(to, flush).await;
                return Err(Broken::Off);
            }
            None => return to.send_data(Piece::none(), true).map_err(|_| Broken::Off),
        };
        match frame.into_data() {
            Ok(data) => {
                let end = body.is_end_stream();
                let sent = send_data(data, (end, flush), body, to, outbox).await;
                if sent == Err(Broken::Late) {
                    // It has ended: it is logged now.
                    drop(std::mem::take(body));
                    to.send_reset(Reason::INTERNAL_ERROR);
                }
                sent?;
                if end {
                    return Ok(());
                }
            }
            Err(frame) => {
                let Ok(trailers) = frame.into_trailers() else { continue };
                return to.send_trailers(trailers).map_err(|_| Broken::Off);
            }
        }
    }
}

/// Resets a stream once what it was given has gone, of which the crate would drop what it still has. Whoever does not take that
/// within `flush` does not get it.
async fn break_off(to: &mut SendStream<Piece>, flush: Option<Duration>) {
    let (piece, mut gone) = Piece::last();
    if to.send_data(piece, false).is_ok() {
        let gone = poll_fn(|cx| match to.poll_reset(cx) {
            Poll::Ready(_) => Poll::Ready(()),
            Poll::Pending => Pin::new(&mut gone).poll(cx).map(drop),
        });
        match flush {
            None => gone.await,
            // Late or not, it is reset.
            Some(limit) => drop(tokio::time::timeout(limit, gone).await),
        }
    }
    to.send_reset(Reason::INTERNAL_ERROR);
}

/// Sends one piece, as the other side's windows and the socket take it.
async fn send_data(
    mut data: Bytes,
    (end, flush): (bool, Option<Duration>),
    body: &mut Body,
    to: &mut SendStream<Piece>,
    outbox: &Rc<Outbox>,
) -> Result<(), Broken> {
    if data.is_empty() {
        return if end { to.send_data(Piece::none(), true).map_err(|_| Broken::Off) } else { Ok(()) };
    }
    while !data.is_empty() {
        // Only what is at hand is asked for: windows that are held in advance would be missed by other streams.
        to.reserve_capacity(data.len());
        // The host is through with it, once this is the end.
        let mut late = |cx: &mut Context<'_>| match end {
            true => Poll::Pending,
            false => body.poll_limits(cx).map(|_| Err(Broken::Late)),
        };
        let room = poll_fn(|cx| {
            if to.poll_reset(cx).is_ready() {
                return Poll::Ready(Err(Broken::Off));
            }
            while to.capacity() == 0 {
                match to.poll_capacity(cx) {
                    Poll::Ready(Some(Ok(_))) => {}
                    Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(Err(Broken::Off)),
                    Poll::Pending => return late(cx),
                }
            }
            match outbox.poll_room(cx) {
                Poll::Ready(()) => Poll::Ready(Ok(to.capacity())),
                Poll::Pending => late(cx),
            }
        });
        let room = match flush.filter(|_| end) {
            None => room.await?,
            Some(limit) => match tokio::time::timeout(limit, room).await {
                Ok(room) => room?,
                Err(_) => {
                    to.send_reset(Reason::INTERNAL_ERROR);
                    return Err(Broken::NotTaken);
                }
            },
        };
        let piece = data.split_to(room.min(data.len()));
        let last = end && data.is_empty();
        to.send_data(Piece::new(piece, outbox), last).map_err(|_| Broken::Off)?;
    }
    Ok(())
}

/// A body that is sent by a task of its own. Dropped, it breaks off.
pub(super) struct Sending(tokio::task::JoinHandle<()>);

impl Sending {
    /// Sends as much as can be sent at once; `Some`: the rest follows.
    pub(super) fn start(mut body: Body, mut to: SendStream<Piece>, outbox: &Rc<Outbox>) -> Option<Sending> {
        let outbox = Rc::clone(outbox);
        let mut sending = Box::pin(async move {
            // The other side has been told of what went wrong, or has said so itself.
            let _ = send_body(&mut body, &mut to, &outbox, None).await;
        });
        let mut cx = Context::from_waker(Waker::noop());
        if sending.as_mut().poll(&mut cx).is_ready() {
            return None;
        }
        // The task polls it again, with a waker of its own.
        Some(Sending(tokio::task::spawn_local(sending)))
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.abort();
    }
}
