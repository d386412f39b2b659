//! A message that waits for its processor.

use std::{
    collections::VecDeque,
    future::poll_fn,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use envoy_types::pb::envoy::service::ext_proc::v3::{
    BodyMutation, CommonResponse, HeaderMutation, body_mutation::Mutation, common_response::ResponseStatus,
};
use http::{HeaderMap, StatusCode, header::CONTENT_LENGTH};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::Sleep;

use super::{
    body::Processed,
    duplex::Duplex,
    messages,
    mode::{BodyMode, Side},
    rules::Target,
    session::{Await, Outcome, Reply, Session, Streamed},
};
use crate::{
    access_log::ResponseFlags,
    http::{
        body::{Body, BodyError, WrappedBody},
        buffered::Unread,
        stream::LocalReply,
        stream_end::broken_response,
    },
};

/// What has been read of a body while the processor was asked.
#[derive(Default)]
struct Collected {
    pieces: VecDeque<Bytes>,
    bytes: usize,
    trailers: Option<HeaderMap>,
    ended: bool,
    broken: Option<BodyError>,
}

impl Collected {
    /// Reads on, up to the limit.
    fn poll(&mut self, body: &mut Body, limit: usize, cx: &mut Context<'_>) {
        while !self.ended && self.broken.is_none() && self.bytes <= limit {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => return,
                Poll::Ready(None) => self.ended = true,
                Poll::Ready(Some(Err(error))) => self.broken = Some(error),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        self.bytes += data.len();
                        self.pieces.push_back(data);
                        self.ended = body.is_end_stream();
                    }
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        self.ended = true;
                    }
                },
            }
        }
    }

    fn take(&mut self) -> Bytes {
        if self.pieces.len() == 1 {
            return self.pieces.pop_front().unwrap_or_default();
        }
        let mut all = BytesMut::with_capacity(self.bytes);
        self.pieces.drain(..).for_each(|piece| all.extend_from_slice(&piece));
        all.freeze()
    }
}

/// One side's message on its way past the processor.
pub(super) struct Passage<'a> {
    pub(super) session: &'a Rc<Session>,
    pub(super) side: Side,
    /// On HTTP/1 the end of a body comes for itself, as in Envoy.
    pub(super) separate_end: bool,
}

/// What becomes of the message.
pub(super) struct Passed {
    /// The processor asks for another route.
    pub(super) clear_route_cache: bool,
}

impl Passage<'_> {
    /// Waits until the headers, which have been shown, may go on.
    ///
    /// # Errors
    /// The answer in the message's place.
    pub(super) async fn pass(&self, mut target: Target<'_>, body: &mut Body) -> Result<Passed, LocalReply> {
        let (session, side) = (self.session, self.side);
        if session.mode.get().of(side).body == BodyMode::Duplex {
            return self.pass_duplex(target, body).await;
        }
        let no_body = body.is_end_stream();
        let mut read = Collected { ended: no_body, ..Collected::default() };
        let mut passed = Passed { clear_route_cache: false };
        let outcome = self.outcome(&mut read, body).await;
        let common = match outcome {
            Outcome::Answer(reply) => return Err(reply),
            Outcome::Reply(Reply::Common(common)) => common,
            Outcome::Reply(Reply::Trailers(_)) | Outcome::Over => {
                self.restore(&mut target, read, body);
                return Ok(passed);
            }
        };
        self.apply(&common, &mut target, &mut passed)?;
        if common.status == ResponseStatus::ContinueAndReplace as i32 {
            if common.body_mutation.is_some() {
                target.headers().remove(CONTENT_LENGTH);
                let piece = read.take();
                let trailers = read.trailers.take();
                *body = whole(&mut target, mutated(common.body_mutation, piece), trailers);
            } else {
                self.restore(&mut target, read, body);
            }
            // Nothing more of this message is shown.
            return Ok(passed);
        }
        let shown = session.mode.get().of(side);
        if no_body || session.is_over() {
            self.restore(&mut target, read, body);
            return Ok(passed);
        }
        if shown.body == BodyMode::Buffered && !read.ended {
            poll_fn(|cx| {
                read.poll(body, session.buffer_limit, cx);
                let done =
                    read.ended || read.broken.is_some() || read.bytes > session.buffer_limit || session.is_over();
                if done { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
            if read.bytes > session.buffer_limit {
                session.close();
                return Err(too_long(side));
            }
            if let Some(reply) = self.broken(&read) {
                return Err(reply);
            }
        }
        if read.ended && shown.body != BodyMode::None {
            self.pass_whole(read, &mut target, body, &mut passed).await?;
            return Ok(passed);
        }
        if shown.body == BodyMode::None && !shown.trailers {
            self.restore(&mut target, read, body);
            return Ok(passed);
        }
        // What has been read is one piece, as in Envoy.
        let held = if read.pieces.is_empty() { VecDeque::new() } else { VecDeque::from([read.take()]) };
        let trailers = read.trailers.take();
        if side == Side::Request {
            session.progress.held.set(true);
        }
        let source = if read.ended { Body::Empty } else { std::mem::take(body) };
        let processed = Processed::new(session, side, source, held, trailers, self.separate_end);
        *body = Body::Wrapped(Box::new(processed));
        Ok(passed)
    }

    /// The same where the body is shown meanwhile, and comes back whenever the processor likes.
    async fn pass_duplex(&self, mut target: Target<'_>, body: &mut Body) -> Result<Passed, LocalReply> {
        let (session, side) = (self.session, self.side);
        let no_body = body.is_end_stream();
        let mut passed = Passed { clear_route_cache: false };
        let mut duplex = Duplex::new(session, side, std::mem::take(body), self.separate_end);
        let outcome = poll_fn(|cx| {
            if !no_body {
                duplex.poll_show(cx);
            }
            match duplex.broken().filter(|_| side == Side::Response) {
                Some(error) => Poll::Ready(Outcome::Answer(broken_response(error))),
                None => session.poll_reply(side, &mut None, cx),
            }
        })
        .await;
        let common = match outcome {
            Outcome::Answer(reply) => return Err(reply),
            Outcome::Reply(Reply::Common(common)) => common,
            Outcome::Reply(Reply::Trailers(_)) | Outcome::Over => {
                *body = if duplex.is_shown() { Body::Wrapped(Box::new(duplex)) } else { duplex.into_source() };
                return Ok(passed);
            }
        };
        self.apply(&common, &mut target, &mut passed)?;
        if common.status == ResponseStatus::ContinueAndReplace as i32 {
            if common.body_mutation.is_some() {
                target.headers().remove(CONTENT_LENGTH);
                *body = whole(&mut target, mutated(common.body_mutation, Bytes::new()), None);
            } else if duplex.is_shown() {
                return Err(session.refuse("CONTINUE_AND_REPLACE without a body for one that is gone"));
            } else {
                *body = duplex.into_source();
            }
            return Ok(passed);
        }
        if no_body {
            *body = duplex.into_source();
            return Ok(passed);
        }
        if duplex.is_all_shown() {
            // As in Envoy, a message that is shown as a whole waits for what comes back first.
            match poll_fn(|cx| session.poll_streamed(side, cx)).await {
                Streamed::Answer(reply) => return Err(reply),
                first => duplex.begin_with(first),
            }
        }
        if side == Side::Request {
            session.progress.held.set(true);
        }
        *body = Body::Wrapped(Box::new(duplex));
        Ok(passed)
    }

    /// A body that is there as a whole goes on with the headers.
    async fn pass_whole(
        &self,
        mut read: Collected,
        target: &mut Target<'_>,
        body: &mut Body,
        passed: &mut Passed,
    ) -> Result<(), LocalReply> {
        let (session, side) = (self.session, self.side);
        let (mut piece, mut trailers) = (read.take(), read.trailers.take());
        session.send(side, Some(Await::Body), messages::body(side, &piece, trailers.is_none()));
        match self.outcome(&mut read, body).await {
            Outcome::Answer(reply) => return Err(reply),
            Outcome::Reply(Reply::Common(common)) => {
                self.apply(&common, target, passed)?;
                if common.body_mutation.is_some() {
                    self.check_length(common.body_mutation.as_ref(), target)?;
                    piece = mutated(common.body_mutation, piece);
                }
            }
            Outcome::Reply(Reply::Trailers(_)) | Outcome::Over => {}
        }
        if let Some(trailers) = trailers.as_mut().filter(|_| session.mode.get().of(side).trailers && !session.is_over())
        {
            let request = messages::trailers(side, trailers, &session.settings.forward);
            session.send(side, Some(Await::Trailers), request);
            match self.outcome(&mut read, body).await {
                Outcome::Answer(reply) => return Err(reply),
                Outcome::Reply(Reply::Trailers(mutation)) => trailers_changed(session, mutation, trailers)?,
                Outcome::Reply(Reply::Common(_)) | Outcome::Over => {}
            }
        }
        *body = whole(target, piece, trailers);
        Ok(())
    }

    /// A length that headers tell must be the body's. As in Envoy, one that is not replaced has none.
    fn check_length(&self, mutation: Option<&BodyMutation>, target: &mut Target<'_>) -> Result<(), LocalReply> {
        let Some(told) = target.headers().get(CONTENT_LENGTH) else { return Ok(()) };
        let length = match mutation.and_then(|mutation| mutation.mutation.as_ref()) {
            Some(Mutation::Body(body)) => body.len(),
            _ => 0,
        };
        if told.to_str().ok().and_then(|told| told.parse().ok()) == Some(length) {
            return Ok(());
        }
        Err(self.session.refuse("mismatch between content length and the length of the mutated body"))
    }

    /// Waits, and reads ahead meanwhile.
    async fn outcome(&self, read: &mut Collected, body: &mut Body) -> Outcome {
        let mut timer: Option<Pin<Box<Sleep>>> = None;
        poll_fn(|cx| {
            read.poll(body, self.session.buffer_limit, cx);
            match self.broken(read) {
                Some(reply) => Poll::Ready(Outcome::Answer(reply)),
                None => self.session.poll_reply(self.side, &mut timer, cx),
            }
        })
        .await
    }

    /// The answer in the place of a response that has broken off, of which nothing has been sent.
    fn broken(&self, read: &Collected) -> Option<LocalReply> {
        read.broken.as_ref().filter(|_| self.side == Side::Response).map(broken_response)
    }

    /// What a processor says to headers, or to a body that comes with them.
    fn apply(&self, common: &CommonResponse, target: &mut Target<'_>, passed: &mut Passed) -> Result<(), LocalReply> {
        let (session, settings) = (self.session, &self.session.settings);
        if let Some(mutation) = &common.header_mutation {
            let replaces = common.status == ResponseStatus::ContinueAndReplace as i32;
            let keeps_length = settings.allow_content_length || !session.mode.get().of(self.side).hides_length();
            let rejected = settings.stats.rejected_header_mutations;
            let applied = settings.rules.apply(mutation, target, replaces, keeps_length, session.limits, rejected);
            applied.map_err(|details| session.refuse(details))?;
        }
        if self.side == Side::Request {
            passed.clear_route_cache |= settings.clears_route_cache(common);
        }
        Ok(())
    }

    /// Puts back what has been read of the body.
    fn restore(&self, target: &mut Target<'_>, mut read: Collected, body: &mut Body) {
        if read.pieces.is_empty() && read.trailers.is_none() {
            return;
        }
        if read.ended {
            let trailers = read.trailers.take();
            *body = whole(target, read.take(), trailers);
            return;
        }
        let (source, held) = (std::mem::take(body), std::mem::take(&mut read.pieces));
        let passing = Processed::new(self.session, self.side, source, held, None, self.separate_end).passing();
        *body = Body::Wrapped(Box::new(passing));
    }
}

/// A body that is in memory. Its length is told where the headers do.
fn whole(target: &mut Target<'_>, data: Bytes, trailers: Option<HeaderMap>) -> Body {
    let told = target.headers().contains_key(CONTENT_LENGTH);
    Body::Wrapped(Box::new(Whole { data, trailers, told, ended: false }))
}

struct Whole {
    data: Bytes,
    trailers: Option<HeaderMap>,
    told: bool,
    ended: bool,
}

impl WrappedBody for Whole {}

impl http_body::Body for Whole {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.data.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.data)))));
        }
        self.ended = true;
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        if self.told { SizeHint::with_exact(self.data.len() as u64) } else { SizeHint::default() }
    }
}

fn too_long(side: Side) -> LocalReply {
    match side {
        Side::Request => Unread::TooLong.into_reply(),
        Side::Response => {
            let (status, text) = (StatusCode::INTERNAL_SERVER_ERROR, "Internal Server Error");
            LocalReply::new(status, text, ResponseFlags::default(), "response_payload_too_large")
        }
    }
}

/// A piece of a body as the processor wants it.
pub(super) fn mutated(mutation: Option<BodyMutation>, piece: Bytes) -> Bytes {
    match mutation.and_then(|mutation| mutation.mutation) {
        Some(Mutation::Body(body)) => body.into(),
        Some(Mutation::ClearBody(true)) => Bytes::new(),
        Some(Mutation::ClearBody(false) | Mutation::StreamedResponse(_)) | None => piece,
    }
}

/// Changes trailers.
///
/// # Errors
/// The answer where the change is refused.
pub(super) fn trailers_changed(
    session: &Session,
    mutation: Option<HeaderMutation>,
    trailers: &mut HeaderMap,
) -> Result<(), LocalReply> {
    let Some(mutation) = mutation else { return Ok(()) };
    let (settings, mut target) = (&session.settings, Target::Fields(trailers));
    let rejected = settings.stats.rejected_header_mutations;
    let applied = settings.rules.apply(&mutation, &mut target, false, true, session.limits, rejected);
    applied.map_err(|details| session.refuse(details))
}
