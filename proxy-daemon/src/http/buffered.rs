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
    body::{Body, BodyError},
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
    Broken,
}

/// Reads a body to its end.
pub(super) async fn read(body: &mut Body, limit: usize) -> Result<(Bytes, Option<HeaderMap>), Unread> {
    let (mut first, mut more, mut trailers) = (Bytes::new(), BytesMut::new(), None);
    while let Some(frame) = body.frame().await {
        match frame.map_err(|_| Unread::Broken)?.into_data() {
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
            Unread::Broken => LocalReply::new(StatusCode::BAD_REQUEST, "", ResponseFlags::DPE, "request_broken_off"),
        }
    }
}
