//! A downstream connection's bytes, plain or decrypted.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

/// A downstream connection as filters see it.
#[derive(Debug)]
pub enum DownstreamStream {
    /// As it comes.
    Plain(TcpStream),
    /// Through TLS, after the handshake.
    Tls(Box<TlsStream<TcpStream>>),
}

impl DownstreamStream {
    /// The protocol that the handshake chose.
    pub fn alpn(&self) -> Option<&[u8]> {
        match self {
            DownstreamStream::Plain(_) => None,
            DownstreamStream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }
}

macro_rules! forward {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            DownstreamStream::Plain($stream) => $call,
            DownstreamStream::Tls($stream) => $call,
        }
    };
}

impl AsyncRead for DownstreamStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            DownstreamStream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            DownstreamStream::Tls(stream) => Pin::new(stream).poll_read(cx, buf).map(eof),
        }
    }
}

/// A peer that closes without saying so in TLS has closed all the same, as in Envoy.
pub(crate) fn eof(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        result => result,
    }
}

impl AsyncWrite for DownstreamStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, stream => Pin::new(stream).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        forward!(self, stream => Pin::new(stream).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, stream => Pin::new(stream).poll_shutdown(cx))
    }
}
