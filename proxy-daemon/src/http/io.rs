//! The downstream connection as HTTP/2 sees it: what was read to tell the protocol is given back first.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::codec::h2::Watch;
use crate::{listener::DownstreamStream, stats::Metered};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) struct DownstreamIo {
    stream: Metered<DownstreamStream>,
    read_ahead: BytesMut,
    /// Looks at all that passes.
    watch: Option<Box<Watch>>,
}

impl DownstreamIo {
    pub(super) fn new(stream: Metered<DownstreamStream>) -> DownstreamIo {
        DownstreamIo { stream, read_ahead: BytesMut::new(), watch: None }
    }

    /// The connection, and what has been read of it.
    pub(super) fn into_parts(self) -> (Metered<DownstreamStream>, BytesMut) {
        (self.stream, self.read_ahead)
    }

    /// Has all that passes from now on looked at.
    pub(super) fn watch(&mut self, watch: Watch) {
        self.watch = Some(Box::new(watch));
    }

    /// Reads until it is clear whether the client begins with HTTP/2's preface (RFC 9113, section 3.4).
    pub(super) async fn sniff_http2(&mut self) -> io::Result<bool> {
        let mut seen = BytesMut::with_capacity(4096);
        loop {
            if self.stream.read_buf(&mut seen).await? == 0 {
                break;
            }
            let compared = seen.len().min(PREFACE.len());
            if seen[..compared] != PREFACE[..compared] || compared == PREFACE.len() {
                break;
            }
        }
        let http2 = seen.starts_with(PREFACE);
        self.read_ahead = seen;
        Ok(http2)
    }

    /// So much of these has been sent.
    fn sent<'a>(&mut self, mut bytes: usize, pieces: impl IntoIterator<Item = &'a [u8]>) {
        let Some(watch) = &mut self.watch else { return };
        for piece in pieces {
            let piece = &piece[..bytes.min(piece.len())];
            watch.sent(piece);
            bytes -= piece.len();
        }
    }
}

impl AsyncRead for DownstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let io = self.get_mut();
        let before = buf.filled().len();
        if io.read_ahead.is_empty() {
            let read = ready!(Pin::new(&mut io.stream).poll_read(cx, buf));
            if let Some(watch) = &mut io.watch
                && (read.is_err() || buf.filled().len() == before)
            {
                watch.ended();
            }
            read?;
        } else {
            let length = buf.remaining().min(io.read_ahead.len());
            buf.put_slice(&io.read_ahead[..length]);
            io.read_ahead.advance(length);
            if io.read_ahead.is_empty() {
                io.read_ahead = BytesMut::new(); // gives the memory back
            }
        }
        Poll::Ready(match &mut io.watch {
            Some(watch) => watch.received(&buf.filled()[before..]),
            None => Ok(()),
        })
    }
}

impl AsyncWrite for DownstreamIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let io = self.get_mut();
        let written = ready!(Pin::new(&mut io.stream).poll_write(cx, buf))?;
        io.sent(written, [buf]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let io = self.get_mut();
        let written = ready!(Pin::new(&mut io.stream).poll_write_vectored(cx, bufs))?;
        io.sent(written, bufs.iter().map(|buf| &**buf));
        Poll::Ready(Ok(written))
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
