//! Bodies that a processor is shown while they pass.

use std::{
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Sleep;

use super::{
    messages,
    mode::{BodyMode, Shown, Side},
    process::{mutated, trailers_changed},
    session::{Await, Outcome, Reply, Session},
};
use crate::http::{
    body::{Body, BodyError, WrappedBody},
    buffered::Unread,
};

/// A body, and how far the processor has come with it.
pub(super) struct Processed {
    session: Rc<Session>,
    side: Side,
    shown: Shown,
    source: Body,
    /// What has been read of it and not been shown, or need not be.
    held: VecDeque<Bytes>,
    held_bytes: usize,
    trailers: Option<HeaderMap>,
    source_ended: bool,
    /// The processor has been shown the end.
    end_shown: bool,
    /// On HTTP/1 the end comes for itself, as in Envoy.
    separate_end: bool,
    waits: Option<Waits>,
    timer: Option<Pin<Box<Sleep>>>,
    ended: bool,
}

/// What the processor is being shown.
enum Waits {
    Piece(Bytes),
    Trailers(HeaderMap),
}

impl Processed {
    /// `held`: what has been read already.
    pub(super) fn new(
        session: &Rc<Session>,
        side: Side,
        source: Body,
        held: VecDeque<Bytes>,
        trailers: Option<HeaderMap>,
        separate_end: bool,
    ) -> Processed {
        let source_ended = trailers.is_some() || matches!(source, Body::Empty);
        Processed {
            session: Rc::clone(session),
            side,
            shown: session.mode.get().of(side),
            source,
            held_bytes: held.iter().map(Bytes::len).sum(),
            held,
            trailers,
            source_ended,
            end_shown: false,
            separate_end,
            waits: None,
            timer: None,
            ended: false,
        }
    }

    /// The body without what the processor has no part in.
    pub(super) fn passing(mut self) -> Processed {
        self.shown.body = BodyMode::None;
        self
    }

    fn show(&mut self, piece: Bytes, ended: bool) {
        self.end_shown |= ended;
        let request = messages::body(self.side, &piece, ended);
        self.session.send(self.side, Some(Await::Body), request);
        self.waits = Some(Waits::Piece(piece));
    }

    /// All that has been read, as one piece.
    fn gathered(&mut self) -> Bytes {
        self.held_bytes = 0;
        if self.held.len() == 1 {
            return self.held.pop_front().unwrap_or_default();
        }
        let mut all = BytesMut::new();
        self.held.drain(..).for_each(|piece| all.extend_from_slice(&piece));
        all.freeze()
    }

    /// Reads a piece of the source into what is held.
    fn poll_source(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        match Pin::new(&mut self.source).poll_frame(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
            Poll::Ready(None) => self.source_ended = true,
            Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                Ok(data) => {
                    self.held_bytes += data.len();
                    self.held.push_back(data);
                    self.source_ended = !self.separate_end && self.source.is_end_stream();
                }
                Err(frame) => {
                    self.trailers = frame.into_trailers().ok();
                    self.source_ended = true;
                }
            },
        }
        Poll::Ready(Ok(()))
    }

    /// What the processor has said to what it was shown.
    fn poll_waits(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let outcome = std::task::ready!(self.session.poll_reply(self.side, &mut self.timer, cx));
        let waits = self.waits.take();
        let refused = match (waits, outcome) {
            (waits, Outcome::Answer(reply)) => {
                self.waits = waits;
                Err(reply)
            }
            (Some(Waits::Piece(piece)), Outcome::Reply(Reply::Common(reply))) => {
                if self.shown.body != BodyMode::Streamed {
                    self.shown.body = BodyMode::None;
                }
                Ok(Some(Frame::data(mutated(reply.body_mutation, piece))))
            }
            (Some(Waits::Trailers(mut trailers)), Outcome::Reply(Reply::Trailers(mutation))) => {
                trailers_changed(&self.session, mutation, &mut trailers).map(|()| Some(Frame::trailers(trailers)))
            }
            (Some(Waits::Piece(piece)), _) => Ok(Some(Frame::data(piece))),
            (Some(Waits::Trailers(trailers)), _) => Ok(Some(Frame::trailers(trailers))),
            (None, _) => Ok(None),
        };
        match refused {
            Ok(frame) => {
                self.ended |= frame.as_ref().is_some_and(Frame::is_trailers);
                Poll::Ready(frame.map(Ok))
            }
            Err(reply) if self.side == Side::Request => {
                // Whoever sends the request ends it.
                self.session.progress.answer(reply);
                Poll::Pending
            }
            // The client has its head already.
            Err(reply) => Poll::Ready(Some(Err(reply.details.into()))),
        }
    }

    /// Shows the processor what comes next, or lets it pass.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            let over = self.session.is_over();
            let body = if over || self.end_shown { BodyMode::None } else { self.shown.body };
            match body {
                // Those that come back by themselves have another body around them (`Duplex`).
                BodyMode::None | BodyMode::Duplex => {
                    if let Some(piece) = self.held.pop_front() {
                        return Poll::Ready(Some(Ok(Frame::data(piece))));
                    }
                    if self.source_ended {
                        break;
                    }
                }
                BodyMode::Streamed => {
                    if let Some(piece) = self.held.pop_front() {
                        let ended = self.source_ended && self.held.is_empty() && self.trailers.is_none();
                        self.show(piece, ended && !self.separate_end);
                        return self.poll_waits(cx);
                    }
                    if self.source_ended && self.trailers.is_none() {
                        self.show(Bytes::new(), true);
                        return self.poll_waits(cx);
                    }
                    if self.source_ended {
                        break;
                    }
                }
                BodyMode::Buffered | BodyMode::BufferedPartial => {
                    let full = self.held_bytes > self.session.buffer_limit;
                    if full && body == BodyMode::Buffered {
                        if self.side == Side::Request {
                            self.session.close();
                            self.session.progress.answer(Unread::TooLong.into_reply());
                            return Poll::Pending;
                        }
                        return Poll::Ready(Some(Err("response_payload_too_large".into())));
                    }
                    if full || self.source_ended {
                        let (all, ended) = (self.gathered(), self.source_ended && self.trailers.is_none());
                        self.show(all, ended);
                        return self.poll_waits(cx);
                    }
                }
            }
            if let Err(error) = std::task::ready!(self.poll_source(cx)) {
                return Poll::Ready(Some(Err(error)));
            }
        }
        let Some(trailers) = self.trailers.take() else {
            self.ended = true;
            return Poll::Ready(None);
        };
        if self.shown.trailers && !self.session.is_over() {
            let request = messages::trailers(self.side, &trailers, &self.session.settings.forward);
            self.session.send(self.side, Some(Await::Trailers), request);
            self.waits = Some(Waits::Trailers(trailers));
            return self.poll_waits(cx);
        }
        self.ended = true;
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

impl WrappedBody for Processed {}

impl http_body::Body for Processed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let polled = if self.waits.is_some() { self.poll_waits(cx) } else { self.poll_next(cx) };
            // A piece of which nothing is left is none.
            match polled {
                Poll::Ready(Some(Ok(frame))) if frame.data_ref().is_some_and(Bytes::is_empty) => {}
                polled => return polled,
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

/// A body that a processor only watches.
pub(super) struct Watched {
    session: Rc<Session>,
    side: Side,
    source: Body,
    separate_end: bool,
    ended: bool,
}

impl Watched {
    pub(super) fn new(session: &Rc<Session>, side: Side, source: Body, separate_end: bool) -> Watched {
        Watched { session: Rc::clone(session), side, source, separate_end, ended: false }
    }

    fn end(&mut self, piece: &[u8]) {
        if !std::mem::replace(&mut self.ended, true) {
            self.session.send(self.side, None, messages::body(self.side, piece, true));
        }
    }
}

impl WrappedBody for Watched {
    fn passes(&mut self) -> Option<&mut Body> {
        Some(&mut self.source)
    }
}

impl http_body::Body for Watched {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.session.is_behind() {
            self.session.wake_when_taken(cx);
            return Poll::Pending;
        }
        let polled = std::task::ready!(Pin::new(&mut self.source).poll_frame(cx));
        let shown = self.session.mode.get().of(self.side);
        let body = shown.body == BodyMode::Streamed;
        match &polled {
            Some(Ok(frame)) => match (frame.data_ref(), frame.trailers_ref()) {
                (Some(data), _) if body => {
                    if !self.separate_end && self.source.is_end_stream() {
                        self.end(data);
                    } else {
                        self.session.send(self.side, None, messages::body(self.side, data, false));
                    }
                }
                (_, Some(trailers)) => {
                    self.ended = true;
                    if shown.trailers {
                        let request = messages::trailers(self.side, trailers, &self.session.settings.forward);
                        self.session.send(self.side, None, request);
                    }
                }
                _ => {}
            },
            None if body => self.end(&[]),
            _ => {}
        }
        Poll::Ready(polled)
    }

    fn is_end_stream(&self) -> bool {
        // Its end is to be shown.
        self.ended && self.source.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.source.size_hint()
    }
}
