//! The downstream connection as hyper sees it: what was read to tell the protocol is given back first.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use hyper::rt::ReadBufCursor;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt;

use crate::listener::DownstreamStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) struct DownstreamIo {
    stream: TokioIo<DownstreamStream>,
    read_ahead: BytesMut,
}

impl DownstreamIo {
    pub(super) fn new(stream: DownstreamStream) -> DownstreamIo {
        DownstreamIo { stream: TokioIo::new(stream), read_ahead: BytesMut::new() }
    }

    /// The connection, and what has been read of it.
    pub(super) fn into_parts(self) -> (DownstreamStream, BytesMut) {
        (self.stream.into_inner(), self.read_ahead)
    }

    /// Reads until it is clear whether the client begins with HTTP/2's preface (RFC 9113, section 3.4).
    pub(super) async fn sniff_http2(&mut self) -> io::Result<bool> {
        let mut seen = BytesMut::with_capacity(4096);
        loop {
            if self.stream.inner_mut().read_buf(&mut seen).await? == 0 {
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
}

impl hyper::rt::Read for DownstreamIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let io = self.get_mut();
        if io.read_ahead.is_empty() {
            return Pin::new(&mut io.stream).poll_read(cx, buf);
        }
        let length = buf.remaining().min(io.read_ahead.len());
        buf.put_slice(&io.read_ahead[..length]);
        io.read_ahead.advance(length);
        if io.read_ahead.is_empty() {
            io.read_ahead = BytesMut::new(); // gives the memory back
        }
        Poll::Ready(Ok(()))
    }
}

impl hyper::rt::Write for DownstreamIo {
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
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}
