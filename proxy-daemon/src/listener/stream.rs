//! A downstream connection's bytes, plain or decrypted.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, Interest, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::server::TlsStream;

use crate::intercept::lanes;

/// A downstream connection as filters see it.
#[derive(Debug)]
pub enum DownstreamStream {
    /// As it comes.
    Plain(TcpStream),
    /// Through TLS, after the handshake.
    Tls(Box<TlsStream<DownstreamStream>>),
}

impl DownstreamStream {
    /// Whether it goes as it comes.
    pub fn is_plain(&self) -> bool {
        matches!(self, DownstreamStream::Plain(_))
    }

    /// Has the client's connection end with a reset.
    pub(crate) fn reset_on_close(&self) {
        match self {
            DownstreamStream::Plain(stream) => reset_on_close(stream),
            DownstreamStream::Tls(stream) => stream.get_ref().0.reset_on_close(),
        }
    }

    /// Waits until the client has reset its connection, or cannot be reached. That it says no more is no end: it may still listen.
    pub(crate) async fn broke(&self) {
        let mut stream = self;
        let plain = loop {
            match stream {
                DownstreamStream::Plain(plain) => break plain,
                DownstreamStream::Tls(tls) => stream = tls.get_ref().0,
            }
        };
        // Whatever ends that wait, nobody can be spoken to.
        let _ = plain.ready(Interest::ERROR).await;
    }

    /// The protocol that the handshake chose.
    pub fn alpn(&self) -> Option<&[u8]> {
        match self {
            DownstreamStream::Plain(_) => None,
            DownstreamStream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }
}

impl AsyncRead for DownstreamStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            DownstreamStream::Plain(stream) => lanes::poll_read(stream, cx, buf),
            DownstreamStream::Tls(stream) => Pin::new(stream).poll_read(cx, buf).map(eof),
        }
    }
}

/// Has a connection end with a reset: its peer is told that what it has got may not be all.
pub(crate) fn reset_on_close(stream: &TcpStream) {
    if let Err(error) = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        // It is gone already.
        tracing::debug!(%error, "a connection cannot be reset");
    }
}

/// A peer that closes without saying so in TLS has closed all the same, as in Envoy.
pub(crate) fn eof(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
        result => result,
    }
}

write_to_held!(DownstreamStream { Plain, Tls });
