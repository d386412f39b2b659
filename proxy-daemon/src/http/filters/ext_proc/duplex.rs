//! Bodies that a processor is shown while they pass, and that it sends back in pieces of its own, whenever it likes (`FULL_DUPLEX_STREAMED`).

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use super::{
    messages,
    mode::Side,
    process::trailers_changed,
    session::{Await, Session, Streamed},
};
use crate::http::{
    body::{Body, BodyError, WrappedBody},
    stream::LocalReply,
};

/// A body that goes to the processor, and what comes back from there. No more is read of it than the processor takes, but for the buffer's limit, and
/// nothing while somebody has not taken what has come back.
pub(super) struct Duplex {
    session: Rc<Session>,
    side: Side,
    source: Body,
    /// On HTTP/1 the end comes for itself, as in Envoy.
    separate_end: bool,
    /// The processor has been shown some of it.
    shown: bool,
    /// It has been shown all of it.
    all_shown: bool,
    trailers: Option<HeaderMap>,
    broken: Option<BodyError>,
    /// What has come back already.
    next: Option<Streamed>,
    ended: bool,
}

impl Duplex {
    pub(super) fn new(session: &Rc<Session>, side: Side, source: Body, separate_end: bool) -> Duplex {
        Duplex {
            session: Rc::clone(session),
            side,
            source,
            separate_end,
            shown: false,
            all_shown: false,
            trailers: None,
            broken: None,
            next: None,
            ended: false,
        }
    }

    /// Shows the processor what there is of the body.
    pub(super) fn poll_show(&mut self, cx: &mut Context<'_>) {
        while !self.all_shown && self.broken.is_none() && !self.session.is_over() {
            if self.session.is_behind() {
                self.session.wake_when_taken(cx);
                return;
            }
            match Pin::new(&mut self.source).poll_frame(cx) {
                Poll::Pending => return,
                Poll::Ready(None) => self.show(&[], true),
                Poll::Ready(Some(Err(error))) => self.broken = Some(error),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        let ended = !self.separate_end && self.source.is_end_stream();
                        if ended || !data.is_empty() {
                            self.show(&data, ended);
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let request = messages::trailers(self.side, &trailers, &self.session.settings.forward);
                        self.session.send(self.side, Some(Await::Trailers), request);
                        self.trailers = Some(trailers);
                        (self.shown, self.all_shown) = (true, true);
                    }
                },
            }
        }
    }

    fn show(&mut self, piece: &[u8], ended: bool) {
        self.session.send(self.side, Some(Await::Body), messages::body(self.side, piece, ended));
        (self.shown, self.all_shown) = (true, ended);
    }

    /// Whether the processor has been shown some of it.
    pub(super) fn is_shown(&self) -> bool {
        self.shown
    }

    /// Whether it has been shown all of it.
    pub(super) fn is_all_shown(&self) -> bool {
        self.all_shown
    }

    /// What has broken it off.
    pub(super) fn broken(&self) -> Option<&BodyError> {
        self.broken.as_ref()
    }

    /// What has come back already, before anybody has asked for it.
    pub(super) fn begin_with(&mut self, first: Streamed) {
        self.next = Some(first);
    }

    /// What has not been shown.
    pub(super) fn into_source(mut self) -> Body {
        std::mem::take(&mut self.source)
    }

    fn refused(&self, reply: LocalReply) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        match self.side {
            Side::Request => {
                // Whoever sends the request ends it.
                self.session.progress.answer(reply);
                Poll::Pending
            }
            // The client has its head already.
            Side::Response => Poll::Ready(Some(Err(reply.details.into()))),
        }
    }

    /// The rest of a body of which the processor has seen nothing.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = std::task::ready!(Pin::new(&mut self.source).poll_frame(cx));
        self.ended = polled.as_ref().is_none_or(|frame| frame.as_ref().is_ok_and(Frame::is_trailers));
        Poll::Ready(polled)
    }
}

impl Drop for Duplex {
    fn drop(&mut self) {
        // What still comes would hold up what is said to the other side.
        self.session.abandon(self.side);
    }
}

impl WrappedBody for Duplex {}

impl http_body::Body for Duplex {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let streamed = match self.next.take() {
            Some(first) => Poll::Ready(first),
            None => self.session.poll_streamed(self.side, cx),
        };
        match streamed {
            Poll::Pending => {
                self.poll_show(cx);
                if let Some(error) = self.broken.take() {
                    self.ended = true;
                    return Poll::Ready(Some(Err(error)));
                }
                // It may have failed at once.
                if self.session.is_over() { self.poll_frame(cx) } else { Poll::Pending }
            }
            Poll::Ready(Streamed::Piece(piece)) => Poll::Ready(Some(Ok(Frame::data(piece)))),
            Poll::Ready(Streamed::End) => {
                self.ended = true;
                Poll::Ready(None)
            }
            Poll::Ready(Streamed::Trailers(mutation)) => {
                let mut trailers = self.trailers.take().unwrap_or_default();
                match trailers_changed(&self.session, mutation, &mut trailers) {
                    Ok(()) => {
                        self.ended = true;
                        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
                    }
                    Err(reply) => self.refused(reply),
                }
            }
            Poll::Ready(Streamed::Answer(reply)) => self.refused(reply),
            Poll::Ready(Streamed::Over) if !self.shown => self.poll_rest(cx),
            Poll::Ready(Streamed::Over) => match self.side {
                // What the client gets is the response's business.
                Side::Request => Poll::Pending,
                Side::Response => {
                    self.ended = true;
                    Poll::Ready(Some(Err("ext_proc_ended_within_a_body".into())))
                }
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
