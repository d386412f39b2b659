//! Streams of gRPC: messages in both directions, for as long as both sides like.

use std::{
    cell::RefCell,
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Frame;
use prost::Message as ProtoMessage;
use tokio::task::JoinHandle;

use super::{
    grpc::{Failed, INTERNAL, UNAVAILABLE, UNKNOWN, check_head, frame, status_of, take_frame},
    send,
};
use crate::{
    http::{
        body::{Body, BodyError, WrappedBody},
        headers::names::*,
        stream::RequestHead,
    },
    upstream::WorkerCluster,
};

/// How a stream ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// gRPC's status.
    pub(crate) status: u32,
    /// What was said of it.
    pub(crate) message: String,
}

impl From<Failed> for Ended {
    fn from(Failed(status): Failed) -> Ended {
        Ended { status, message: "via_upstream".to_owned() }
    }
}

/// A stream that has not begun.
pub(crate) struct Prepared {
    pub(super) cluster: Option<Rc<WorkerCluster>>,
    pub(super) head: RequestHead,
    pub(super) max_message: usize,
}

impl Prepared {
    /// Whether there is a cluster that it could go to.
    pub(crate) fn has_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// The headers that it begins with.
    pub(crate) fn headers(&mut self) -> &mut HeaderMap {
        &mut self.head.headers
    }

    /// Begins. `told` gets each message that comes, and last how the stream has ended; not before this returns.
    pub(crate) fn open<A: ProtoMessage + Default + 'static>(self, told: impl Fn(Result<A, Ended>) + 'static) -> Stream {
        let outbox = Rc::new(Outbox::default());
        let sending = Rc::clone(&outbox);
        let task = tokio::task::spawn_local(async move {
            let Prepared { cluster, head, max_message } = self;
            let body = Body::Wrapped(Box::new(Outgoing(Rc::clone(&sending))));
            let mut expired = std::pin::pin!(sending.expired());
            tokio::select! {
                ended = converse(cluster, head, body, max_message, (&sending, &told)) => {
                    told(Err(ended));
                    if sending.0.borrow().lingers {
                        expired.await;
                    }
                }
                () = expired.as_mut() => {}
            }
        });
        Stream { outbox, task: Some(task) }
    }
}

/// Reads what comes, to the end.
async fn converse<A: ProtoMessage + Default>(
    cluster: Option<Rc<WorkerCluster>>,
    head: RequestHead,
    body: Body,
    max_message: usize,
    (outbox, told): (&Outbox, &impl Fn(Result<A, Ended>)),
) -> Ended {
    let Some(cluster) = cluster else { return UNAVAILABLE.into() };
    let mut answer = match send(&cluster, None, head, body).await {
        Ok(answer) => answer,
        Err(failure) => {
            let message = "upstream connect error or disconnect/reset before headers".to_owned();
            return Ended { message, ..Failed::from(failure).into() };
        }
    };
    if let Err(failed) = check_head(&answer) {
        return failed.into();
    }
    let (mut read, mut trailers) = (BytesMut::new(), None);
    loop {
        outbox.unheld().await;
        match answer.frame().await {
            Err(failure) => return Failed::from(failure).into(),
            Ok(None) => break,
            Ok(Some(frame)) => match frame.into_data() {
                Ok(data) => read.extend_from_slice(&data),
                Err(frame) => trailers = frame.into_trailers().ok(),
            },
        }
        loop {
            match take_frame(&mut read, max_message).map(|frame| frame.map(A::decode)) {
                Ok(None) => break,
                Ok(Some(Ok(message))) => told(Ok(message)),
                Ok(Some(Err(_))) => return INTERNAL.into(),
                Err(failed) => return failed.into(),
            }
        }
    }
    let ends = trailers.as_ref().unwrap_or(&answer.head.headers);
    // As Envoy has it where the service says nothing.
    let message = ends.get(GRPC_MESSAGE).and_then(|text| text.to_str().ok()).unwrap_or("via_upstream").to_owned();
    let ended = Ended { status: status_of(ends).unwrap_or(UNKNOWN.0), message };
    answer.release();
    ended
}

/// A stream under way. Dropped, it is broken off.
pub(crate) struct Stream {
    outbox: Rc<Outbox>,
    task: Option<JoinHandle<()>>,
}

impl Stream {
    /// Sends a message, as soon as the service takes it.
    pub(crate) fn send(&self, message: &impl ProtoMessage) {
        let frame = frame(message);
        let mut state = self.outbox.0.borrow_mut();
        state.bytes += frame.len();
        state.queue.push_back(frame);
        wake(&mut state.reader);
    }

    /// How many bytes the service has not taken.
    pub(crate) fn queued(&self) -> usize {
        self.outbox.0.borrow().bytes
    }

    /// Wakes a task when the service takes something.
    pub(crate) fn wake_when_taken(&self, waker: &Waker) {
        let writers = &mut self.outbox.0.borrow_mut().writers;
        if !writers.iter().any(|known| known.will_wake(waker)) {
            writers.push(waker.clone());
        }
    }

    /// Whether what the service sends stays where it is for now: it is held up by its window then.
    pub(crate) fn hold(&self, held: bool) {
        let mut state = self.outbox.0.borrow_mut();
        state.held = held;
        if !held {
            wake(&mut state.listener);
        }
    }

    /// Ends our side; the service may go on for so long.
    pub(crate) fn finish(mut self, limit: Duration) {
        self.outbox.0.borrow_mut().ended = true;
        self.expire(limit, None);
    }

    /// The stream goes on for so long, and is broken off then; `then` is called at that time.
    pub(crate) fn linger(mut self, limit: Duration, then: impl FnOnce() + 'static) {
        self.outbox.0.borrow_mut().lingers = true;
        self.expire(limit, Some(Box::new(then)));
    }

    fn expire(&mut self, limit: Duration, then: Option<Then>) {
        let mut state = self.outbox.0.borrow_mut();
        state.expires = Some((limit, then));
        // Its end is to be seen.
        state.held = false;
        let state = &mut *state;
        wake(&mut state.listener);
        wake(&mut state.reader);
        wake(&mut state.expirer);
        // It goes on by itself.
        self.task = None;
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// What is done when a stream has lasted for long enough.
type Then = Box<dyn FnOnce()>;

/// What is to be sent, and whether anything is read.
#[derive(Default)]
struct Outbox(RefCell<Queue>);

#[derive(Default)]
struct Queue {
    queue: VecDeque<Bytes>,
    bytes: usize,
    ended: bool,
    lingers: bool,
    /// Nothing is read.
    held: bool,
    expires: Option<(Duration, Option<Then>)>,
    /// Who sends it.
    reader: Option<Waker>,
    /// Who reads what comes.
    listener: Option<Waker>,
    /// Who waits for room: one for each direction at most.
    writers: Vec<Waker>,
    /// Who waits for the end.
    expirer: Option<Waker>,
}

impl Outbox {
    /// Waits until something may be read.
    async fn unheld(&self) {
        std::future::poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            if !state.held {
                return Poll::Ready(());
            }
            state.listener = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Ends when the stream has lasted for as long as it may once its end is known.
    async fn expired(&self) {
        let (limit, then) = std::future::poll_fn(|cx| {
            let mut state = self.0.borrow_mut();
            match state.expires.take() {
                Some(expires) => Poll::Ready(expires),
                None => {
                    state.expirer = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await;
        tokio::time::sleep(limit).await;
        if let Some(then) = then {
            then();
        }
    }
}

/// The request's body.
struct Outgoing(Rc<Outbox>);

impl WrappedBody for Outgoing {}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = self.0.0.borrow_mut();
        if let Some(frame) = state.queue.pop_front() {
            state.bytes -= frame.len();
            state.writers.drain(..).for_each(Waker::wake);
            return Poll::Ready(Some(Ok(Frame::data(frame))));
        }
        if state.ended {
            return Poll::Ready(None);
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}
