//! Bodies that are read as a whole before they go on.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

use super::{
    body::{Body, BodyError, WrappedBody},
    stream::LocalReply,
};
use crate::access_log::ResponseFlags;

/// A body in memory, with its trailers.
pub(super) struct Buffered {
    data: Bytes,
    trailers: Option<HeaderMap>,
}

impl Buffered {
    /// Of these.
    pub(super) fn new(data: Bytes, trailers: Option<HeaderMap>) -> Buffered {
        Buffered { data, trailers }
    }
}

impl WrappedBody for Buffered {}

impl http_body::Body for Buffered {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.data.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.data)))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_empty() && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.data.len() as u64)
    }
}

/// Why a body could not be read as a whole.
pub(super) enum Unread {
    /// It is longer than it may be.
    TooLong,
    /// It broke off.
    Broken(BodyError),
}

/// Reads a body to its end.
pub(super) async fn read(body: &mut Body, limit: usize) -> Result<(Bytes, Option<HeaderMap>), Unread> {
    let (mut first, mut more, mut trailers) = (Bytes::new(), BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.map_err(Unread::Broken)?.into_data() {
            Ok(data) => {
                if first.len() + more.len() + data.len() > limit {
                    return Err(Unread::TooLong);
                }
                // Most bodies come in one piece.
                if first.is_empty() && more.is_empty() {
                    first = data;
                } else {
                    more.extend_from_slice(&std::mem::take(&mut first));
                    more.extend_from_slice(&data);
                }
            }
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok((if first.is_empty() { more.freeze() } else { first }, trailers))
}

/// A body of which the beginning has been read.
struct Ahead {
    first: Bytes,
    rest: Body,
}

impl WrappedBody for Ahead {}

impl http_body::Body for Ahead {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.first.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.first)))));
        }
        Pin::new(&mut self.rest).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_empty() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (first, rest) = (self.first.len() as u64, self.rest.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(first + rest.lower());
        if let Some(upper) = rest.upper() {
            hint.set_upper(first + upper);
        }
        hint
    }
}

/// Reads a request's body up to `enough` bytes, or a piece more, and puts what was read back in front of it; returns that, and
/// whether it is all of the body.
pub(super) async fn peek(body: &mut Body, enough: usize) -> Result<(Bytes, bool), LocalReply> {
    let mut read = BytesMut::new();
    while read.len() < enough {
        let Some(frame) = body.frame().await else {
            let data = read.freeze();
            *body = Body::Full(data.clone());
            return Ok((data, true));
        };
        match frame.map_err(|error| Unread::Broken(error).into_reply())?.into_data() {
            Ok(data) => read.extend_from_slice(&data),
            Err(frame) => {
                let data = read.freeze();
                let trailers = frame.into_trailers().ok();
                *body = Body::Wrapped(Box::new(Buffered::new(data.clone(), trailers)));
                return Ok((data, true));
            }
        }
    }
    let data = read.freeze();
    let whole = http_body::Body::is_end_stream(body);
    let first = data.clone();
    body.wrap(|rest| Ahead { first, rest });
    Ok((data, whole))
}

/// Puts a request's whole body, of at most `limit` bytes, in the place of the one that comes; returns its length.
pub(super) async fn gather(body: &mut Body, limit: usize) -> Result<usize, LocalReply> {
    let (data, trailers) = read(body, limit).await.map_err(Unread::into_reply)?;
    let length = data.len();
    *body = match trailers {
        None => Body::Full(data),
        trailers => Body::Wrapped(Box::new(Buffered::new(data, trailers))),
    };
    Ok(length)
}

impl Unread {
    /// The answer to a request whose body it was.
    pub(super) fn into_reply(self) -> LocalReply {
        match self {
            Unread::TooLong => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                LocalReply::new(status, "Payload Too Large", ResponseFlags::default(), "request_payload_too_large")
            }
            // Nobody is there to read it.
            Unread::Broken(_) => LocalReply::new(StatusCode::BAD_REQUEST, "", ResponseFlags::DPE, "request_broken_off"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl<S> WrappedBody for http_body_util::StreamBody<S> where
        S: futures_util::Stream<Item = Result<Frame<Bytes>, BodyError>> + Unpin
    {
    }

    #[tokio::test]
    async fn what_is_read_ahead_stays_in_the_body() {
        let chunks = || {
            let pieces = ["ab", "cd", "ef"].map(|text| Ok::<_, BodyError>(Frame::data(Bytes::from(text))));
            Body::Wrapped(Box::new(http_body_util::StreamBody::new(futures_util::stream::iter(pieces))))
        };
        for (enough, expected, all) in [(0, "", false), (1, "ab", false), (3, "abcd", false), (7, "abcdef", true)] {
            let mut body = chunks();
            let Ok((data, whole)) = peek(&mut body, enough).await else { panic!("it does not break off") };
            assert_eq!((data.as_ref(), whole), (expected.as_bytes(), all), "{enough}");
            let Ok((data, _)) = read(&mut body, 100).await else { panic!("it does not break off") };
            assert_eq!(data, "abcdef");
        }
    }
}
