//! Hosts that say something and close at once, as those do that do not speak HTTP/2: what they have said is read, though nothing can be
//! written any more, which the crate would end the connection with.

use std::{
    cell::Cell,
    io::{self, ErrorKind, IoSlice},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Sleep,
};

/// What was said is there by then: who can't be written to says nothing new.
const PATIENCE: Duration = Duration::from_secs(1);

/// A connection that ends when all that has come on it has been read, whatever writing comes to.
pub(super) struct LastWords<T> {
    io: T,
    broken: Option<Broken>,
    /// Something has come.
    heard: bool,
    /// Set where nothing can be written any more to a host that has said something: requests that come then need another connection. One
    /// that has said nothing yet may still say that it does not speak HTTP/2, which is for them to hear.
    deaf: Rc<Cell<bool>>,
}

/// Nothing can be written any more.
struct Broken {
    why: ErrorKind,
    /// Until then something may be read.
    until: Pin<Box<Sleep>>,
}

impl<T> LastWords<T> {
    pub(super) fn new(io: T, deaf: &Rc<Cell<bool>>) -> LastWords<T> {
        LastWords { io, broken: None, heard: false, deaf: Rc::clone(deaf) }
    }

    /// What writing came to; where it failed it passes for done, and reading is what tells of it.
    fn written<V>(&mut self, cx: &Context<'_>, done: V, written: Poll<io::Result<V>>) -> Poll<io::Result<V>> {
        match written {
            Poll::Ready(Err(error)) => {
                self.broken = Some(Broken { why: error.kind(), until: Box::pin(tokio::time::sleep(PATIENCE)) });
                self.deaf.set(self.heard);
                cx.waker().wake_by_ref();
                Poll::Ready(Ok(done))
            }
            written => written,
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for LastWords<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        this.heard |= buf.filled().len() > before;
        match &mut this.broken {
            Some(broken) if read.is_pending() => broken.until.as_mut().poll(cx).map(|()| Err(broken.why.into())),
            _ => read,
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for LastWords<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.broken.is_some() {
            return Poll::Ready(Ok(buf.len()));
        }
        let written = Pin::new(&mut this.io).poll_write(cx, buf);
        this.written(cx, buf.len(), written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let all = || bufs.iter().map(|buf| buf.len()).sum();
        if this.broken.is_some() {
            return Poll::Ready(Ok(all()));
        }
        match Pin::new(&mut this.io).poll_write_vectored(cx, bufs) {
            failed @ Poll::Ready(Err(_)) => this.written(cx, all(), failed),
            written => written,
        }
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.broken.is_some() {
            return Poll::Ready(Ok(()));
        }
        let flushed = Pin::new(&mut this.io).poll_flush(cx);
        this.written(cx, (), flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.broken.is_some() {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

    use super::*;

    /// Nothing can be written to it.
    struct Deaf(DuplexStream);

    impl AsyncRead for Deaf {
        fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Deaf {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(ErrorKind::ConnectionReset.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(ErrorKind::ConnectionReset.into()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Err(ErrorKind::ConnectionReset.into()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_said_is_read_when_nothing_can_be_written() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(b"HTTP/1.1 400").await.unwrap();
        let deaf = Rc::default();
        let mut host = LastWords::new(Deaf(near), &deaf);
        host.write_all(b"PRI").await.unwrap();
        host.write_all(b" * HTTP/2.0").await.unwrap();
        host.flush().await.unwrap();
        let mut said = [0; 12];
        host.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"HTTP/1.1 400");
        assert!(!deaf.get(), "whoever waits hears that it does not speak HTTP/2");
        assert_eq!(
            host.read_u8().await.unwrap_err().kind(),
            ErrorKind::ConnectionReset,
            "nobody waits for more for long"
        );
        host.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn the_end_comes_after_what_was_said() {
        let (near, mut far) = tokio::io::duplex(64);
        let mut host = LastWords::new(near, &Rc::default());
        far.write_all(b"no").await.unwrap();
        drop(far);
        host.write_all(b"PRI").await.unwrap();
        let mut said = Vec::new();
        host.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"no");
    }
}
