//! The way of a request's body to a copy of the request. The request never waits for a copy: one that falls too far behind has no end.

use std::{
    cell::RefCell,
    collections::VecDeque,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::http::{
    body::{BodyError, WrappedBody},
    replay::kept_piece,
};

/// What a piece costs besides its bytes.
const PIECE: u64 = 64;

/// How far the original has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Original {
    Passes,
    Whole,
    BrokenOff,
}

struct State {
    waiting: VecDeque<Frame<Bytes>>,
    /// What waits, in bytes.
    size: u64,
    limit: u64,
    original: Original,
    /// Nobody sends the copy any more.
    left: bool,
    length: SizeHint,
    reader: Option<Waker>,
    /// Who waits for the original's end.
    watcher: Option<Waker>,
}

/// The side of the original. Dropped before its end it breaks the copy off.
pub(super) struct Writer(Rc<RefCell<State>>);

/// The copy's body.
pub(super) struct Reader(Rc<RefCell<State>>);

/// A pipe for a body of this length; about `limit` bytes may wait in it.
pub(super) fn pipe(limit: u64, length: SizeHint) -> (Writer, Reader) {
    let state = Rc::new(RefCell::new(State {
        waiting: VecDeque::new(),
        size: 0,
        limit,
        original: Original::Passes,
        left: false,
        length,
        reader: None,
        watcher: None,
    }));
    (Writer(Rc::clone(&state)), Reader(state))
}

impl Writer {
    /// Adds a piece, or the trailers; false: the copy is so far behind that it gets nothing more.
    pub(super) fn push(&self, frame: &Frame<Bytes>) -> bool {
        let mut state = self.0.borrow_mut();
        if state.size >= state.limit && !state.left {
            return false;
        }
        if let Some(data) = frame.data_ref() {
            state.size += data.len() as u64 + PIECE;
            state.waiting.push_back(Frame::data(kept_piece(data)));
        } else if let Some(trailers) = frame.trailers_ref() {
            state.waiting.push_back(Frame::trailers(trailers.clone()));
        }
        state.wake();
        true
    }

    /// There is nothing more to come.
    pub(super) fn end(&self) {
        let mut state = self.0.borrow_mut();
        if state.original == Original::Passes {
            state.ends(Original::Whole);
        }
    }

    /// The copy needs its turn, lest it fall behind.
    pub(super) fn is_pressed(&self) -> bool {
        let state = self.0.borrow();
        !state.left && state.size > state.limit / 2
    }

    /// Nobody sends the copy any more.
    pub(super) fn is_left(&self) -> bool {
        self.0.borrow().left
    }
}

impl State {
    fn wake(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    fn ends(&mut self, how: Original) {
        self.original = how;
        self.wake();
        if let Some(watcher) = self.watcher.take() {
            watcher.wake();
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        if state.original == Original::Passes {
            state.ends(Original::BrokenOff);
        }
    }
}

impl Reader {
    /// Ready when the original has ended.
    pub(super) fn original_ended(&self) -> impl Future<Output = ()> + use<> {
        let state = Rc::clone(&self.0);
        std::future::poll_fn(move |cx| {
            let mut state = state.borrow_mut();
            if state.original != Original::Passes {
                return Poll::Ready(());
            }
            state.watcher = Some(cx.waker().clone());
            Poll::Pending
        })
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.0.borrow_mut();
        (state.left, state.size) = (true, 0);
        state.waiting = VecDeque::new();
    }
}

impl WrappedBody for Reader {}

impl http_body::Body for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut state = self.0.borrow_mut();
        if let Some(frame) = state.waiting.pop_front() {
            state.size -= frame.data_ref().map_or(0, |data| data.len() as u64 + PIECE);
            return Poll::Ready(Some(Ok(frame)));
        }
        match state.original {
            Original::Whole => Poll::Ready(None),
            Original::BrokenOff => Poll::Ready(Some(Err("the request broke off".into()))),
            Original::Passes => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = self.0.borrow();
        state.waiting.is_empty() && state.original == Original::Whole
    }

    fn size_hint(&self) -> SizeHint {
        // The length is asked for before anything is sent.
        self.0.borrow().length
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use http_body_util::BodyExt as _;

    use super::*;

    fn data(text: &'static str) -> Frame<Bytes> {
        Frame::data(Bytes::from_static(text.as_bytes()))
    }

    #[tokio::test]
    async fn a_copy_has_what_passes() {
        let (writer, mut reader) = pipe(1000, SizeHint::with_exact(4));
        assert_eq!(reader.size_hint().exact(), Some(4));
        assert!(writer.push(&data("ab")));
        assert_eq!(
            reader.frame().await.and_then(Result::ok).and_then(|frame| frame.into_data().ok()).as_deref(),
            Some(&b"ab"[..])
        );
        let ended = reader.original_ended();
        assert!(writer.push(&data("cd")));
        writer.end();
        drop(writer);
        ended.await;
        assert!(!reader.is_end_stream());
        assert_eq!(reader.collect().await.map(|body| body.to_bytes()).unwrap_or_default(), "cd");
    }

    #[tokio::test]
    async fn a_copy_that_falls_behind_has_no_end() {
        let (writer, reader) = pipe(10, SizeHint::default());
        assert!(!writer.is_pressed());
        // One piece there may always be.
        assert!(writer.push(&data("more than ten bytes")));
        assert!(writer.is_pressed());
        assert!(!writer.push(&data("more")));
        drop(writer);
        assert!(reader.collect().await.is_err());
    }

    #[test]
    fn what_nobody_sends_costs_nothing() {
        let (writer, reader) = pipe(10, SizeHint::default());
        drop(reader);
        assert!(writer.is_left() && !writer.is_pressed());
    }
}
