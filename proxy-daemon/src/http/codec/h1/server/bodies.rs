//! The two bodies of a client's connection: the response's on its way out, and the request's, which is read when it is asked for.

use std::{
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use super::{
    super::{
        decode::{Decoder, Item},
        encode::Writer,
        error::CodecError,
        head::Framing,
    },
    ServerConnection,
};
use crate::{
    access_log::ResponseFlags,
    http::{
        body::{Body, BodyError},
        stream::{LocalReply, Progress},
    },
};

/// A response's body on its way to the client.
pub(super) struct Outgoing<'a> {
    pub(super) body: &'a mut Body,
    pub(super) framing: Framing,
    pub(super) enable_trailers: bool,
    pub(super) ended: bool,
    /// The body broke off: so does the connection, once what came before is written.
    pub(super) broken: bool,
}

impl Outgoing<'_> {
    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        connection: &ServerConnection,
        writer: &mut Writer,
    ) -> Poll<Result<(), ()>> {
        loop {
            let mut waiting = false;
            while !self.ended && !waiting && writer.has_room() {
                match Pin::new(&mut *self.body).poll_frame(cx) {
                    Poll::Ready(frame) => self.frame(frame, writer),
                    Poll::Pending => waiting = true,
                }
            }
            let written = writer.poll_write(&mut connection.inner.borrow_mut().stream, cx);
            match written {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(Err(())),
                Poll::Pending => {
                    if connection.is_upgraded() {
                        // A client that does not read may still have something to say.
                        self.body.send_on(cx);
                    }
                    if self.ended {
                        return Poll::Pending;
                    }
                    // A client that does not read must not keep the host's connection for longer than anybody else may.
                    return self.body.poll_limits(cx).map(|_| Err(()));
                }
            }
            if self.ended {
                return Poll::Ready(if self.broken { Err(()) } else { Ok(()) });
            }
            if waiting {
                return connection.poll_gone(cx).map(Err);
            }
        }
    }

    fn frame(&mut self, frame: Option<Result<Frame<Bytes>, BodyError>>, writer: &mut Writer) {
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => match &mut self.framing {
                    Framing::None => {}
                    Framing::Chunked => writer.data(data, true),
                    Framing::UntilClose => writer.data(data, false),
                    Framing::Length(left) => match left.checked_sub(data.len() as u64) {
                        Some(rest) => {
                            *left = rest;
                            writer.data(data, false);
                        }
                        None => (self.ended, self.broken) = (true, true),
                    },
                },
                Err(frame) => {
                    let trailers = frame.into_trailers().ok().filter(|_| self.enable_trailers);
                    self.end(trailers.as_ref(), writer);
                }
            },
            None => self.end(None, writer),
            Some(Err(_)) => (self.ended, self.broken) = (true, true),
        }
    }

    fn end(&mut self, trailers: Option<&HeaderMap>, writer: &mut Writer) {
        self.ended = true;
        match self.framing {
            Framing::Chunked => writer.last_chunk(trailers),
            Framing::Length(1..) => self.broken = true,
            _ => {}
        }
    }
}

/// A request's body, which is read when it is asked for. It never fails: when the client goes away or sends nonsense, the
/// connection ends the stream.
pub struct RequestBody {
    pub(super) connection: Rc<ServerConnection>,
    pub(super) serial: u64,
    pub(super) progress: Rc<Progress>,
}

impl RequestBody {
    pub(in crate::http) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut inner = self.connection.inner.borrow_mut();
        let inner = &mut *inner;
        if inner.serial != self.serial {
            return Poll::Ready(Some(Err("the connection has gone on".into())));
        }
        loop {
            if inner.malformed || inner.eof && inner.buffer.is_empty() && !inner.decoder.is_done() {
                if let Some(task) = inner.task.take() {
                    task.wake();
                }
                return Poll::Pending;
            }
            match inner.decoder.decode(&mut inner.buffer, inner.limits) {
                Ok(Some(Item::Data(data))) => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(Some(Item::End(trailers))) => {
                    let trailers = (inner.enable_trailers && !trailers.is_empty()).then_some(trailers);
                    return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
                }
                Ok(None) if inner.eof => inner.buffer.clear(),
                Ok(None) => ready!(inner.poll_fill(cx)),
                Err(error) => {
                    inner.malformed = true;
                    self.progress.refuse(error);
                }
            }
        }
    }

    pub(in crate::http) fn is_end_stream(&self) -> bool {
        let inner = self.connection.inner.borrow();
        inner.serial == self.serial && inner.decoder.is_done()
    }

    pub(in crate::http) fn size_hint(&self) -> SizeHint {
        let inner = self.connection.inner.borrow();
        match inner.decoder {
            Decoder::Done => SizeHint::with_exact(0),
            Decoder::Length(left) => SizeHint::with_exact(left),
            Decoder::Chunked(_) | Decoder::UntilClose => SizeHint::default(),
        }
    }
}

impl From<CodecError> for LocalReply {
    fn from(error: CodecError) -> LocalReply {
        let text = error.status.canonical_reason().unwrap_or_default();
        LocalReply::new(error.status, text, ResponseFlags::DPE, error.details)
    }
}
