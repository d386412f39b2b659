//! Reads from TCP sockets into which the short cut may put payload.
//!
//! Such a socket has two queues, that of the short cut and TCP's, and a read takes from one of them. The runtime takes a read
//! that does not fill its buffer for a sign that the socket is empty, and waits for an event; the one of what waits in the
//! other queue may be over already. So these reads go on until the kernel says that nothing is left.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead as _, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Whether there is a short cut: written once, before there are connections.
static TWO_QUEUES: AtomicBool = AtomicBool::new(false);

/// Has all reads look at both queues from now on.
pub(super) fn look_at_both() {
    TWO_QUEUES.store(true, Ordering::Relaxed);
}

/// `AsyncRead::poll_read` of a TCP socket that may be an end of a hop on this node.
pub fn poll_read(stream: &mut TcpStream, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
    if !TWO_QUEUES.load(Ordering::Relaxed) {
        return Pin::new(stream).poll_read(cx, buf);
    }
    loop {
        ready!(stream.poll_read_ready(cx))?;
        // SAFETY: what is written there is payload, which leaves no byte uninitialized that was not so before.
        let space = unsafe { buf.unfilled_mut() };
        match stream.try_io(Interest::READABLE, || socket2::SockRef::from(&*stream).recv(space)) {
            Ok(read) => {
                // SAFETY: the kernel has written so many bytes.
                unsafe { buf.assume_init(read) };
                buf.advance(read);
                return Poll::Ready(Ok(()));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Poll::Ready(Err(error)),
        }
    }
}
