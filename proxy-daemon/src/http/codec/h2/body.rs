//! Bodies as they come.

use std::{
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::RecvStream;
use http::{HeaderMap, StatusCode, header::CONTENT_LENGTH};
use http_body::{Frame, SizeHint};

use super::{head::is_trailer, send::Sending};
use crate::http::{body::BodyError, codec::h1::CodecError, look::Look as _, stream::Progress};

/// A request's or a response's body. The other side's window is opened again by what has been taken.
pub struct ReceivedBody {
    stream: RecvStream,
    /// So much is left, where the head has said so. The crate holds the other side to it.
    left: Option<u64>,
    whose: Whose,
}

enum Whose {
    /// A client's: of what is wrong with it, the stream is told.
    Request(Rc<Progress>),
    /// A host's, with the rest of the request that it answers, which ends with this.
    Response { _sending: Option<Sending> },
}

/// Trailers that say what trailers may not say.
const TRAILERS: CodecError =
    CodecError { status: StatusCode::BAD_REQUEST, details: "http2.violation.of.messaging.rule" };

impl ReceivedBody {
    pub(super) fn request(stream: RecvStream, headers: &HeaderMap, progress: &Rc<Progress>) -> ReceivedBody {
        ReceivedBody { stream, left: told_length(headers), whose: Whose::Request(Rc::clone(progress)) }
    }

    pub(super) fn response(stream: RecvStream, headers: &HeaderMap, sending: Option<Sending>) -> ReceivedBody {
        ReceivedBody { stream, left: told_length(headers), whose: Whose::Response { _sending: sending } }
    }

    pub(in crate::http) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        while let Some(data) = ready!(self.stream.poll_data(cx)) {
            let data = match data {
                Ok(data) => data,
                Err(error) => return self.broke_off(error),
            };
            if data.is_empty() && !self.stream.is_end_stream() {
                continue;
            }
            // Fails only where the stream is gone.
            let _ = self.stream.flow_control().release_capacity(data.len());
            self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        if let (Whose::Request(progress), Ok(Some(trailers))) = (&self.whose, &trailers)
            && !is_trailer(trailers)
        {
            // The stream ends the request: nobody gets an end of it.
            progress.refuse(TRAILERS);
            return Poll::Pending;
        }
        match trailers {
            Ok(trailers) => Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers)))),
            Err(error) => self.broke_off(error),
        }
    }

    /// What becomes of a body whose stream is no more.
    fn broke_off<T>(&self, error: h2::Error) -> Poll<Option<Result<T, BodyError>>> {
        match self.whose {
            // Its task learns of that too, and ends all that is done for it: no host is to blame, and nobody is answered.
            Whose::Request(_) => Poll::Pending,
            Whose::Response { .. } => Poll::Ready(Some(Err(error.into()))),
        }
    }

    pub(in crate::http) fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    pub(in crate::http) fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

fn told_length(headers: &HeaderMap) -> Option<u64> {
    headers.first(&CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
