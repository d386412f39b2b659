//! The one body type of requests and responses, in both directions.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};

use super::codec::Incoming;

/// Why a body broke off. Boxed: what breaks it may be a codec, a filter, a limit or the other side.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Looks at what passes: how much, that it ended, that it failed.
pub trait Observer: Unpin {
    /// A data frame of so many bytes passed.
    fn data(&mut self, bytes: usize);
    /// Polled while no frame is there; an error ends the body (a time limit).
    fn idle(&mut self, cx: &mut Context<'_>) -> Poll<BodyError>;
    /// What came last waits for the other side, and nothing more is read. It may be told so again before anything passes.
    fn held(&mut self);
    /// The last frame passed.
    fn end(&mut self, trailers: Option<&http::HeaderMap>);
    /// The body broke off.
    fn error(&mut self, error: &BodyError);
}

/// A request's or response's body.
#[derive(Default)]
pub enum Body {
    /// None, or all of it has been taken.
    #[default]
    Empty,
    /// In memory.
    Full(Bytes),
    /// Streaming, and watched.
    Observed(Incoming, Box<dyn Observer>),
    /// What a filter made of another body.
    Wrapped(Box<dyn WrappedBody>),
}

/// A body that a filter puts around the one that was there: to look at it, to change it, or to hold it up.
pub trait WrappedBody: http_body::Body<Data = Bytes, Error = BodyError> + Unpin {
    /// The body that was there, where all of that passes as it is read: what it is told while nobody polls is told to that one.
    fn passes(&mut self) -> Option<&mut Body> {
        None
    }
}

impl Body {
    /// A body that `observer` watches. An empty one is told of its end here, since nobody may poll it.
    pub fn observed(incoming: Incoming, mut observer: Box<dyn Observer>) -> Body {
        if incoming.is_end_stream() {
            observer.end(None);
            return Body::Empty;
        }
        Body::Observed(incoming, observer)
    }

    /// Sends on what there is of the request, where this is the response to one on HTTP/1 that nobody can take more of.
    pub(super) fn send_on(&mut self, cx: &mut Context<'_>) {
        match self {
            Body::Observed(incoming, _) => incoming.send_on(cx),
            Body::Wrapped(wrapped) => wrapped.passes().into_iter().for_each(|body| body.send_on(cx)),
            Body::Empty | Body::Full(_) => {}
        }
    }

    /// Ready when a limit of time has passed while what came last waits for the other side to take it, where nobody polls for more: the
    /// body is broken off then. What filters have made something else of knows no limits.
    pub(super) fn poll_limits(&mut self, cx: &mut Context<'_>) -> Poll<BodyError> {
        match self {
            Body::Observed(_, observer) => {
                observer.held();
                observer.idle(cx).map(|error| {
                    observer.error(&error);
                    error
                })
            }
            Body::Wrapped(wrapped) => wrapped.passes().map_or(Poll::Pending, |body| body.poll_limits(cx)),
            Body::Empty | Body::Full(_) => Poll::Pending,
        }
    }

    /// Nothing more is read of it for now: the other side takes no more. Nobody is told where filters have made something else of it, or
    /// where it is kept to be sent again.
    pub(super) fn hold(&mut self) {
        match self {
            Body::Observed(_, observer) => observer.held(),
            Body::Wrapped(wrapped) => wrapped.passes().into_iter().for_each(Body::hold),
            Body::Empty | Body::Full(_) => {}
        }
    }

    /// Puts `wrap` around what is here.
    pub fn wrap<W: WrappedBody + 'static>(&mut self, wrap: impl FnOnce(Body) -> W) {
        *self = Body::Wrapped(Box::new(wrap(std::mem::take(self))));
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let body = self.get_mut();
        match body {
            Body::Empty => Poll::Ready(None),
            Body::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *body = Body::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Body::Wrapped(wrapped) => Pin::new(wrapped).poll_frame(cx),
            Body::Observed(incoming, observer) => match Pin::new(&mut *incoming).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => {
                    if let Some(data) = frame.data_ref() {
                        observer.data(data.len());
                        // Nobody need poll again once the declared length has passed.
                        if incoming.is_end_stream() {
                            observer.end(None);
                        }
                    } else {
                        observer.end(frame.trailers_ref());
                    }
                    Poll::Ready(Some(Ok(frame)))
                }
                Poll::Ready(None) => {
                    observer.end(None);
                    Poll::Ready(None)
                }
                Poll::Ready(Some(Err(error))) => {
                    observer.error(&error);
                    Poll::Ready(Some(Err(error)))
                }
                Poll::Pending => observer.idle(cx).map(|error| {
                    observer.error(&error);
                    Some(Err(error))
                }),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Body::Empty => true,
            Body::Full(bytes) => bytes.is_empty(),
            Body::Observed(incoming, _) => incoming.is_end_stream(),
            Body::Wrapped(wrapped) => wrapped.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Body::Empty => SizeHint::with_exact(0),
            Body::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Body::Observed(incoming, _) => incoming.size_hint(),
            Body::Wrapped(wrapped) => wrapped.size_hint(),
        }
    }
}
