//! Counts what hosts say of the ends of their connections, as it passes.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::watch::{Frames, GOAWAY};
use crate::stats::Counter;

/// A connection to a host, whose GOAWAY frames are counted.
pub struct Goaways<S> {
    stream: S,
    frames: Frames,
    count: Counter,
}

impl<S> Goaways<S> {
    /// For a connection of which nothing has been read.
    pub fn new(stream: S, count: Counter) -> Goaways<S> {
        Goaways { stream, frames: Frames::default(), count }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Goaways<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = Pin::new(&mut this.stream).poll_read(cx, buf);
        let mut bytes = buf.filled().get(before..).unwrap_or_default();
        while let Some(frame) = this.frames.next(&mut bytes) {
            if frame.kind == GOAWAY {
                this.count.inc();
            }
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Goaways<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;
    use crate::stats::Scope;

    #[tokio::test]
    async fn goaways_are_counted_in_pieces_of_any_size() {
        let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        // Data that looks like one.
        let data = [&[0, 0, 9, 0, 0, 0, 0, 0, 1][..], &[0, 0, 8, 7, 0, 0, 0, 0, 0]].concat();
        let goaway = [&[0, 0, 10, 7, 0, 0, 0, 0, 0][..], &[0, 0, 0, 1, 0, 0, 0, 0, b'o', b'k']].concat();
        let bytes = [&settings[..], &data, &goaway, &data, &goaway].concat();
        let count = Scope::cluster("goaways").counter("upstream_cx_close_notify");
        for size in [1, 7, 10, bytes.len()] {
            let before = count.value();
            let (mut read, mut stream) = (Vec::new(), Goaways::new(&bytes[..], count));
            let mut piece = vec![0; size];
            loop {
                let length = stream.read(&mut piece).await.unwrap();
                if length == 0 {
                    break;
                }
                read.extend_from_slice(&piece[..length]);
            }
            assert_eq!(read, bytes);
            assert_eq!(count.value() - before, 2, "in pieces of {size}");
        }
    }
}
