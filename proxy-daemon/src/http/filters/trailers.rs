//! Bodies whose trailers a filter looks at.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use crate::http::body::{Body, BodyError, WrappedBody};

/// Gives `look` the body's trailers when they pass. Without trailers it is not called.
pub(super) fn with_trailers(body: &mut Body, look: impl FnOnce(&HeaderMap) + Unpin + 'static) {
    if !body.is_end_stream() {
        body.wrap(|body| Watched { body, look: Some(look) });
    }
}

struct Watched<L> {
    body: Body,
    look: Option<L>,
}

impl<L: FnOnce(&HeaderMap) + Unpin> WrappedBody for Watched<L> {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.body)
    }
}

impl<L: FnOnce(&HeaderMap) + Unpin> http_body::Body for Watched<L> {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
            && let Some(look) = self.look.take()
        {
            look(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
