//! The codecs: HTTP/1 is our own, HTTP/2 is that of the crate `h2`. What is outside of this module sees heads of the crate `http` and
//! bodies that are [`Incoming`].

pub mod fuzz;
pub mod h1;
pub mod h2;

use std::{
    cell::RefCell,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;
use http::HeaderValue;
use http_body::{Body, Frame, SizeHint};

use super::body::BodyError;
use crate::runtime::clock;

/// A body as it comes from a connection.
#[derive(Default)]
pub enum Incoming {
    /// None.
    #[default]
    Empty,
    /// On HTTP/2.
    Http2(h2::ReceivedBody),
    /// A client's, on HTTP/1.
    Downstream(h1::RequestBody),
    /// A host's, on HTTP/1.
    Upstream(h1::ResponseBody),
}

impl Incoming {
    /// Sends on what there is of the request, where this is the response to one on HTTP/1 that nobody can take more of.
    pub(super) fn send_on(&mut self, cx: &mut Context<'_>) {
        if let Incoming::Upstream(body) = self {
            body.send_on(cx);
        }
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.get_mut() {
            Incoming::Empty => Poll::Ready(None),
            Incoming::Http2(body) => body.poll_frame(cx),
            Incoming::Downstream(body) => body.poll_frame(cx),
            Incoming::Upstream(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Incoming::Empty => true,
            Incoming::Http2(body) => body.is_end_stream(),
            Incoming::Downstream(body) => body.is_end_stream(),
            Incoming::Upstream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Incoming::Empty => SizeHint::with_exact(0),
            Incoming::Http2(body) => body.size_hint(),
            Incoming::Downstream(body) => body.size_hint(),
            Incoming::Upstream(body) => body.size_hint(),
        }
    }
}

/// What is wrong with the HTTP/2 stream or connection that an error came of.
pub(crate) fn h2_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a ::h2::Error> {
    let mut source = Some(error);
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<::h2::Error>() {
            return Some(error);
        }
        source = error.source();
    }
    None
}

/// Whether the other side broke the protocol: either side may have noticed.
pub(crate) fn is_protocol_error(error: &::h2::Error) -> bool {
    error.is_library() && error.reason().is_some() || error.reason() == Some(::h2::Reason::PROTOCOL_ERROR)
}

/// The `date` of a response.
pub(super) fn date() -> HeaderValue {
    with_date(HeaderValue::clone)
}

/// Shows the `date` of a response, which is made once a second.
fn with_date<T>(see: impl FnOnce(&HeaderValue) -> T) -> T {
    thread_local! {
        static MADE: RefCell<(u64, HeaderValue)> = const { RefCell::new((u64::MAX, HeaderValue::from_static(""))) };
    }
    let second = clock::wall(clock::now()).duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    MADE.with(|made| {
        let mut made = made.borrow_mut();
        if made.0 != second {
            let text = httpdate::HttpDate::from(UNIX_EPOCH + Duration::from_secs(second)).to_string();
            *made = (second, HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("")));
        }
        see(&made.1)
    })
}
