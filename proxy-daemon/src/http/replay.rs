//! Request bodies that are kept while they pass, so that another attempt can send them from their beginning.

use std::{
    cell::RefCell,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as _, Frame, SizeHint};

use super::body::{Body, BodyError, WrappedBody};
use crate::stats::Counter;

/// A body, and what has been taken of it so far.
#[derive(Clone)]
pub(super) struct Replay(Rc<RefCell<Kept>>);

struct Kept {
    source: Body,
    chunks: Vec<Bytes>,
    trailers: Option<HeaderMap>,
    bytes: u64,
    limit: u64,
    ended: bool,
    abandoned: bool,
    /// `retry_or_shadow_abandoned`
    counter: Counter,
    /// The number of readers so far: only the last one may take from the source.
    readers: u64,
    /// All readers may take from it, and each gets all of it, for as long as it is kept.
    shared: bool,
    /// The only reader that goes on where it is kept no more.
    owner: u64,
    /// Readers that wait for more.
    waiting: Vec<Waker>,
}

impl Replay {
    /// Keeps at most `limit` bytes; `counter` is told when there are more.
    pub(super) fn new(source: Body, limit: u64, counter: Counter) -> Replay {
        let ended = source.is_end_stream();
        let (chunks, trailers) = (Vec::new(), None);
        let kept = Kept {
            source,
            chunks,
            trailers,
            bytes: 0,
            limit,
            ended,
            abandoned: false,
            counter,
            readers: 0,
            shared: false,
            owner: 0,
            waiting: Vec::new(),
        };
        Replay(Rc::new(RefCell::new(kept)))
    }

    /// There may be several readers at a time, none of which takes anything from the others.
    pub(super) fn share(&self) {
        self.0.borrow_mut().shared = true;
    }

    /// The body from its beginning. A reader before this one gets nothing more from the source.
    pub(super) fn reader(&self) -> Body {
        let mut kept = self.0.borrow_mut();
        kept.readers += 1;
        Body::Wrapped(Box::new(Reader { kept: Rc::clone(&self.0), number: kept.readers, next: 0, trailers: false }))
    }

    /// All of it is here, and can be sent again.
    pub(super) fn is_whole(&self) -> bool {
        let kept = self.0.borrow();
        kept.ended && !kept.abandoned
    }

    /// There was more than may be kept: it cannot be sent again.
    pub(super) fn is_abandoned(&self) -> bool {
        self.0.borrow().abandoned
    }
}

impl Kept {
    /// Takes a piece from the source, and keeps it where `keep`.
    fn poll_source(&mut self, cx: &mut Context<'_>, keep: bool) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = Pin::new(&mut self.source).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                match (frame.data_ref(), frame.trailers_ref()) {
                    (Some(data), _) if keep && !self.abandoned => {
                        self.bytes = self.bytes.saturating_add(data.len() as u64);
                        if self.bytes > self.limit {
                            self.abandoned = true;
                            self.chunks = Vec::new();
                            self.counter.inc();
                        } else {
                            self.chunks.push(kept_piece(data));
                        }
                    }
                    (_, Some(trailers)) if !self.abandoned => self.trailers = Some(trailers.clone()),
                    _ => {}
                }
                self.ended = self.source.is_end_stream() || frame.is_trailers();
            }
            Poll::Ready(None) => self.ended = true,
            Poll::Ready(Some(Err(_))) => self.abandoned = true,
            Poll::Pending => {}
        }
        polled
    }
}

/// A piece as it is kept. A small one is copied: as it came, it would hold on to the whole buffer that it was read into.
pub(super) fn kept_piece(data: &Bytes) -> Bytes {
    const SMALL: usize = 16 * 1024;
    if data.len() < SMALL { Bytes::copy_from_slice(data) } else { data.clone() }
}

struct Reader {
    kept: Rc<RefCell<Kept>>,
    number: u64,
    /// How many of the chunks it has given.
    next: usize,
    trailers: bool,
}

impl WrappedBody for Reader {}

impl http_body::Body for Reader {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let reader = self.get_mut();
        // Nobody else will want what comes now.
        let keep = Rc::strong_count(&reader.kept) > 1;
        let kept = &mut *reader.kept.borrow_mut();
        if !kept.abandoned {
            if let Some(chunk) = kept.chunks.get(reader.next) {
                reader.next += 1;
                return Poll::Ready(Some(Ok(Frame::data(chunk.clone()))));
            }
            if kept.ended {
                let trailers = kept.trailers.clone().filter(|_| !std::mem::replace(&mut reader.trailers, true));
                return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
            }
        }
        let superseded =
            if kept.shared { kept.abandoned && kept.owner != reader.number } else { kept.readers != reader.number };
        if superseded {
            return Poll::Ready(Some(Err("the request is sent again".into())));
        }
        if !kept.abandoned {
            kept.owner = reader.number;
        }
        let polled = kept.poll_source(cx, keep);
        if kept.shared {
            match &polled {
                Poll::Ready(_) => kept.waiting.drain(..).for_each(Waker::wake),
                Poll::Pending if kept.waiting.iter().any(|known| known.will_wake(cx.waker())) => {}
                Poll::Pending => kept.waiting.push(cx.waker().clone()),
            }
        }
        match &polled {
            Poll::Ready(Some(Ok(frame))) if frame.is_trailers() => reader.trailers = true,
            Poll::Ready(Some(Ok(_))) if !kept.abandoned => reader.next = kept.chunks.len(),
            _ => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        let kept = self.kept.borrow();
        let given = kept.abandoned || self.next == kept.chunks.len();
        kept.ended && given && (kept.trailers.is_none() || self.trailers)
    }

    fn size_hint(&self) -> SizeHint {
        let kept = self.kept.borrow();
        if self.next == 0 && kept.chunks.is_empty() && !kept.abandoned {
            kept.source.size_hint()
        } else {
            SizeHint::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;
    use crate::stats::Scope;

    fn counter() -> Counter {
        Scope::cluster("replay_test").counter("retry_or_shadow_abandoned")
    }

    fn chunks(texts: &'static [&'static str]) -> Body {
        struct Chunks(std::slice::Iter<'static, &'static str>);
        impl WrappedBody for Chunks {}

        impl http_body::Body for Chunks {
            type Data = Bytes;
            type Error = BodyError;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                _cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
                Poll::Ready(self.0.next().map(|text| Ok(Frame::data(Bytes::from_static(text.as_bytes())))))
            }
        }
        Body::Wrapped(Box::new(Chunks(texts.iter())))
    }

    async fn text(body: Body) -> String {
        let bytes = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[tokio::test]
    async fn a_body_is_sent_again_from_its_beginning() {
        let replay = Replay::new(chunks(&["one ", "two ", "three"]), 13, counter());
        let mut first = replay.reader();
        let frame = first.frame().await.and_then(Result::ok).and_then(|frame| frame.into_data().ok());
        assert_eq!(frame.as_deref(), Some(&b"one "[..]));
        assert_eq!(text(replay.reader()).await, "one two three");
        assert_eq!(text(replay.reader()).await, "one two three");
        // What is left of the first attempt can have what is there, and takes nothing from those after it.
        assert_eq!(text(first).await, "two three");
        assert!(!replay.is_abandoned());
    }

    #[tokio::test]
    async fn what_is_superseded_takes_nothing_from_the_source() {
        let replay = Replay::new(chunks(&["one ", "two"]), 100, counter());
        let first = replay.reader();
        let second = replay.reader();
        assert!(first.collect().await.is_err());
        assert_eq!(text(second).await, "one two");
    }

    #[tokio::test]
    async fn readers_that_share_a_body_have_all_of_it() {
        let replay = Replay::new(chunks(&["one ", "two ", "three"]), 100, counter());
        replay.share();
        let (mut first, mut second) = (replay.reader(), replay.reader());
        let mut texts = [String::new(), String::new()];
        for _ in 0..2 {
            for (reader, text) in [&mut first, &mut second].into_iter().zip(&mut texts) {
                let frame = reader.frame().await.and_then(Result::ok).and_then(|frame| frame.into_data().ok());
                text.push_str(&String::from_utf8_lossy(&frame.unwrap()));
            }
        }
        assert_eq!(texts, ["one two ", "one two "]);
        drop(second);
        assert_eq!(text(first).await, "three");
    }

    #[tokio::test]
    async fn of_a_shared_body_over_the_limit_one_reader_goes_on() {
        let replay = Replay::new(chunks(&["one ", "two ", "three"]), 5, counter());
        replay.share();
        let (mut first, second) = (replay.reader(), replay.reader());
        assert!(first.frame().await.is_some() && first.frame().await.is_some());
        assert!(replay.is_abandoned());
        assert!(second.collect().await.is_err());
        assert_eq!(text(first).await, "three");
    }

    #[tokio::test]
    async fn a_body_over_the_limit_passes_once() {
        let replay = Replay::new(chunks(&["one ", "two ", "three"]), 12, counter());
        let before = counter().value();
        assert_eq!(text(replay.reader()).await, "one two three");
        assert!(replay.is_abandoned());
        assert_eq!(counter().value() - before, 1);
    }
}
