//! A response's body, whose end is told of and which may not be silent for ever.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};

/// Why a body ended early.
pub(super) type Error = Box<dyn std::error::Error + Send + Sync>;

/// Any body.
pub(super) type Any = Pin<Box<dyn Body<Data = Bytes, Error = Error>>>;

/// A body that tells of its end: how many bytes there were, and what went wrong.
pub(super) struct Watched<F: FnOnce(u64, Option<&str>)> {
    inner: Incoming,
    idle: Duration,
    silence: Pin<Box<Sleep>>,
    passed: u64,
    ended: Option<F>,
}

impl<F: FnOnce(u64, Option<&str>)> Watched<F> {
    pub(super) fn new(inner: Incoming, idle: Duration, ended: F) -> Self {
        Self { inner, idle, silence: Box::pin(sleep(idle)), passed: 0, ended: Some(ended) }
    }

    fn end(&mut self, failure: Option<&str>) {
        if let Some(ended) = self.ended.take() {
            ended(self.passed, failure);
        }
    }
}

impl<F: FnOnce(u64, Option<&str>) + Unpin> Body for Watched<F> {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        match Pin::new(&mut this.inner).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.passed += frame.data_ref().map_or(0, |data| data.len() as u64);
                this.silence.as_mut().reset(Instant::now() + this.idle);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                this.end(Some("its end is missing"));
                Poll::Ready(Some(Err(error.into())))
            }
            Poll::Ready(None) => {
                this.end(None);
                Poll::Ready(None)
            }
            Poll::Pending => match this.silence.as_mut().poll(cx) {
                Poll::Ready(()) => {
                    this.end(Some("silent for too long"));
                    Poll::Ready(Some(Err("the body was silent for too long".into())))
                }
                Poll::Pending => Poll::Pending,
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<F: FnOnce(u64, Option<&str>)> Drop for Watched<F> {
    fn drop(&mut self) {
        // A body of a known length is not asked for its end.
        let failure = if self.inner.is_end_stream() { None } else { Some("given up by the client") };
        self.end(failure);
    }
}

/// No body.
pub(super) fn empty() -> Any {
    Box::pin(Empty::new().map_err(|never| -> Error { match never {} }))
}
