//! Both directions of a connection between a client and a host, byte for byte.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::{intercept::Joined, listener::DownstreamStream, stats::Counter, upstream::UpstreamStream};

/// Bytes read at a time in each direction.
const BUFFER: usize = 32 * 1024;

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// Both sides closed after all had been delivered.
    Whole,
    /// No byte passed for `idle_timeout`.
    Idle,
    /// `max_downstream_connection_duration` passed.
    TooOld,
    /// The listener is gone, and the drain time is over.
    Drained,
    /// The client's side broke.
    Downstream,
    /// The host's side broke.
    Upstream,
    /// The host was found to be ill, and the cluster has `close_connections_on_host_health_failure`.
    HostFailed,
}

/// A connection that may be joined: then its end is read from the kernel's queue of the short cut, which does not tell a reset from an end.
pub(super) trait Joinable {
    /// What has gone wrong with the connection since this was asked last.
    fn take_error(&self) -> Option<io::Error>;
}

impl Joinable for DownstreamStream {
    fn take_error(&self) -> Option<io::Error> {
        match self {
            DownstreamStream::Plain(stream) => stream.take_error().ok()?,
            DownstreamStream::Tls(_) => None,
        }
    }
}

impl Joinable for UpstreamStream {
    fn take_error(&self) -> Option<io::Error> {
        match self {
            UpstreamStream::Tcp(stream) => stream.take_error().ok()?,
            UpstreamStream::Unix(_) | UpstreamStream::Tls(_) => None,
        }
    }
}

/// Both directions of a connection, each with its half-close.
pub(super) struct Relay {
    up: Pipe,
    down: Pipe,
    /// Payload may go past this process.
    joined: Option<Joined>,
    idle: Option<Duration>,
    last_activity: Cell<Instant>,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
    /// The client had closed its side before the host did.
    pub(super) host_was_last: bool,
    /// The side that broke has reset its connection.
    pub(super) was_reset: bool,
}

impl Relay {
    /// `flow`: what counts when nothing is read of the client, and of the host, since the other one takes no more.
    pub(super) fn new(idle: Option<Duration>, joined: Option<Joined>, [up, down]: [Flow; 2]) -> Relay {
        Relay {
            up: Pipe::new(up),
            down: Pipe::new(down),
            joined,
            idle,
            last_activity: Cell::new(Instant::now()),
            sleep: None,
            host_was_last: false,
            was_reset: false,
        }
    }

    pub(super) fn poll<D, U>(&mut self, cx: &mut Context<'_>, downstream: &mut D, upstream: &mut U) -> Poll<Ended>
    where
        D: AsyncRead + AsyncWrite + Joinable + Unpin,
        U: AsyncRead + AsyncWrite + Joinable + Unpin,
    {
        let joined = self.joined.is_some();
        let before = self.up.bytes + self.down.bytes;
        self.host_was_last |= self.up.eof && !self.down.eof;
        let up = self.up.poll(cx, downstream, upstream, joined);
        let down = self.down.poll(cx, upstream, downstream, joined);
        if before != self.up.bytes + self.down.bytes {
            self.last_activity.set(Instant::now());
        }
        let broken = match (up, down) {
            (Poll::Ready(Err(Broken { side: Side::Read, reset })), _)
            | (_, Poll::Ready(Err(Broken { side: Side::Written, reset }))) => Some((Ended::Downstream, reset)),
            (Poll::Ready(Err(Broken { side: Side::Written, reset })), _)
            | (_, Poll::Ready(Err(Broken { side: Side::Read, reset }))) => Some((Ended::Upstream, reset)),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => return Poll::Ready(Ended::Whole),
            _ => None,
        };
        if let Some((ended, reset)) = broken {
            self.was_reset = reset;
            return Poll::Ready(ended);
        }
        if let Some(joined) = &mut self.joined {
            if self.up.is_empty() {
                joined.forwarded_up(self.up.bytes);
            }
            if self.down.is_empty() {
                joined.forwarded_down(self.down.bytes);
            }
        }
        self.poll_idle(cx)
    }

    /// Lets no more bytes pass, and says how many did: the client's, and the host's.
    pub(super) fn end(&mut self) -> (u64, u64) {
        let past = self.joined.take().map(Joined::end).unwrap_or_default();
        (self.up.bytes + past.up, self.down.bytes + past.down)
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        let Some(limit) = self.idle else { return Poll::Pending };
        loop {
            let at: tokio::time::Instant = (self.last_activity.get() + limit).into();
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            match sleep.as_mut().poll(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(()) if sleep.deadline() < at => sleep.as_mut().reset(at),
                Poll::Ready(()) => match self.joined.as_ref().and_then(Joined::last_activity) {
                    // The kernel's clock is coarse.
                    Some(last) if last > self.last_activity.get() + Duration::from_millis(1) => {
                        self.last_activity.set(last)
                    }
                    _ => return Poll::Ready(Ended::Idle),
                },
            }
        }
    }
}

/// A side of a pipe: the one that is read, or the one that is written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Read,
    Written,
}

/// A side of a pipe broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Broken {
    side: Side,
    /// By a reset.
    reset: bool,
}

impl Broken {
    fn new(side: Side, error: &io::Error) -> Broken {
        // Aborted: the daemon itself has ended connections of a pod that is gone.
        let reset = matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted);
        Broken { side, reset }
    }
}

/// Counts how often nothing is read of a side, and how often it goes on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flow {
    pub(super) paused: Counter,
    pub(super) resumed: Counter,
}

/// One direction: a buffer that is filled from one side and emptied into the other.
struct Pipe {
    /// Allocated with the first byte, so that idle directions cost nothing.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    eof: bool,
    shut: bool,
    /// The writing side may hold bytes back.
    unflushed: bool,
    bytes: u64,
    flow: Flow,
    /// Nothing is read.
    paused: bool,
}

impl Pipe {
    fn new(flow: Flow) -> Pipe {
        let (buffer, start, end) = (Vec::new(), 0, 0);
        Pipe { buffer, start, end, eof: false, shut: false, unflushed: false, bytes: 0, flow, paused: false }
    }

    /// The writing side takes no more for now.
    fn pause<T>(&mut self) -> Poll<T> {
        // At the end there is nothing more to be read.
        if !self.eof && !std::mem::replace(&mut self.paused, true) {
            self.flow.paused.inc();
        }
        Poll::Pending
    }

    /// Whether all that was read has been written, and more may come.
    fn is_empty(&self) -> bool {
        self.start == self.end && !self.unflushed && !self.eof
    }

    /// Ready when the reading side has ended, all has been written, and the writing side has been shut down.
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, from: &mut R, to: &mut W, joined: bool) -> Poll<Result<(), Broken>>
    where
        R: AsyncRead + Joinable + Unpin,
        W: AsyncWrite + Unpin,
    {
        loop {
            while self.start < self.end {
                let chunk = &self.buffer[self.start..self.end];
                match Pin::new(&mut *to).poll_write(cx, chunk) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(Broken { side: Side::Written, reset: false })),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::new(Side::Written, &error))),
                    Poll::Ready(Ok(written)) => {
                        self.start += written;
                        self.bytes += written as u64;
                        self.unflushed = true;
                    }
                    Poll::Pending => return self.pause(),
                }
            }
            // TLS takes bytes before it can send them. What comes next is read meanwhile only into an empty buffer.
            if self.unflushed {
                match Pin::new(&mut *to).poll_flush(cx) {
                    Poll::Ready(Ok(())) => self.unflushed = false,
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::new(Side::Written, &error))),
                    Poll::Pending => return self.pause(),
                }
            }
            if std::mem::take(&mut self.paused) {
                self.flow.resumed.inc();
            }
            if self.eof {
                if !self.shut {
                    match Pin::new(&mut *to).poll_shutdown(cx) {
                        Poll::Pending => return Poll::Pending,
                        // A peer that is gone already needs no half-close.
                        Poll::Ready(_) => self.shut = true,
                    }
                }
                return Poll::Ready(Ok(()));
            }
            if self.buffer.is_empty() {
                self.buffer.resize(BUFFER, 0);
            }
            let mut space = ReadBuf::new(&mut self.buffer);
            match Pin::new(&mut *from).poll_read(cx, &mut space) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(Broken::new(Side::Read, &error))),
                Poll::Ready(Ok(())) => {
                    (self.start, self.end) = (0, space.filled().len());
                    self.eof = self.end == 0;
                    if let Some(error) = (self.eof && joined).then(|| from.take_error()).flatten() {
                        return Poll::Ready(Err(Broken::new(Side::Read, &error)));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "relay_tests.rs"]
mod tests;
