//! Connections that are plain or encrypted are enums, so that a write costs a match and no call through a pointer.

/// `AsyncWrite` for an enum of streams: what is written goes to the stream that it holds.
macro_rules! write_to_held {
    ($stream_of:ident { $($held:ident),+ }) => {
        const _: () = {
            use std::{io, pin::Pin, task::{Context, Poll}};

            impl tokio::io::AsyncWrite for $stream_of {
                fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
                    match self.get_mut() {
                        $($stream_of::$held(stream) => Pin::new(stream).poll_write(cx, buf),)+
                    }
                }

                fn poll_write_vectored(
                    self: Pin<&mut Self>,
                    cx: &mut Context<'_>,
                    bufs: &[io::IoSlice<'_>],
                ) -> Poll<io::Result<usize>> {
                    match self.get_mut() {
                        $($stream_of::$held(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),)+
                    }
                }

                fn is_write_vectored(&self) -> bool {
                    true
                }

                fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                    match self.get_mut() {
                        $($stream_of::$held(stream) => Pin::new(stream).poll_flush(cx),)+
                    }
                }

                fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
                    match self.get_mut() {
                        $($stream_of::$held(stream) => Pin::new(stream).poll_shutdown(cx),)+
                    }
                }
            }
        };
    };
}
