//! What the other side sends, with header blocks that the crate `h2` can decode: a field that is malformed costs its stream, and not the
//! connection with all others (RFC 9113, section 8.1.1).

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{hpack::Table, watch::PREFACE};

const HEAD: usize = 9;
/// The longest payload that the crate takes, as nothing else is settled.
const LONGEST: usize = 16 * 1024;
/// So many streams are known to be open. Where there are more, which were ended from this side and not from the other, all are forgotten,
/// and their trailers are not known for trailers.
const MOST_OPEN: usize = 4096;
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const WITH_PRIORITY: u8 = 0x20;

/// A connection whose header blocks are checked as they are read.
pub(super) struct Scrubbed<T> {
    io: T,
    scrub: Scrub,
}

impl<T> Scrubbed<T> {
    /// For a client's connection of which nothing has been read, not even the preface. `limit`: the largest list of headers, in bytes.
    pub(super) fn client(io: T, limit: u32) -> Scrubbed<T> {
        Scrubbed { io, scrub: Scrub { skip: PREFACE, ..Scrub::new(limit, Whose::Client) } }
    }

    /// The same for a host's connection.
    pub(super) fn host(io: T, limit: u32) -> Scrubbed<T> {
        Scrubbed { io, scrub: Scrub::new(limit, Whose::Host) }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Scrubbed<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            this.scrub.hand_out(buf);
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            ready!(Pin::new(&mut this.io).poll_read(cx, buf))?;
            let new = &buf.filled()[before..];
            if new.is_empty() {
                // What has come of a block is all that comes.
                this.scrub.give_up();
                this.scrub.hand_out(buf);
                return Poll::Ready(Ok(()));
            }
            let passed = this.scrub.take(new);
            buf.set_filled(before + passed);
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Scrubbed<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Finds header blocks in a stream of bytes. Bytes pass as they come, but for blocks that are not complete, or have to be written anew.
#[derive(Default)]
struct Scrub {
    /// So many bytes pass unseen.
    skip: usize,
    table: Table,
    /// The beginning of a frame or a block whose end has not come.
    held: Vec<u8>,
    /// So much of the block that is held has been walked through: whole frames.
    walked: usize,
    /// What is read next, from `handed_out` on.
    ready: Vec<u8>,
    handed_out: usize,
    /// The most that is held.
    limit: usize,
    whose: Whose,
    open: Open,
    /// Something was no HTTP/2, or too much: all passes, and the crate ends the connection or bears it.
    given_up: bool,
}

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Whose {
    #[default]
    Client,
    Host,
}

/// The streams whose head the other side has sent, and not their end: a further block on one of them are trailers. Few, and mostly in
/// the order of their numbers.
#[derive(Default)]
struct Open(Vec<u32>);

impl Open {
    fn has(&self, stream: u32) -> bool {
        self.0.binary_search(&stream).is_ok()
    }

    fn insert(&mut self, stream: u32) {
        if self.0.len() == MOST_OPEN {
            self.0.clear();
        }
        if let Err(at) = self.0.binary_search(&stream) {
            self.0.insert(at, stream);
        }
    }

    fn remove(&mut self, stream: u32) {
        if let Ok(at) = self.0.binary_search(&stream) {
            self.0.remove(at);
        }
    }
}

/// What becomes of the bytes that come next.
enum Next {
    /// So many pass.
    Pass(usize),
    /// The block that is so long is written anew.
    Replace(usize, Vec<u8>),
    /// More must come.
    Hold,
}

impl Scrub {
    fn new(limit: u32, whose: Whose) -> Scrub {
        // Compressed it is smaller; the rest is for what frames add.
        Scrub { limit: 2 * limit as usize + LONGEST, whose, ..Scrub::default() }
    }

    fn hand_out(&mut self, buf: &mut ReadBuf<'_>) {
        let rest = &self.ready[self.handed_out..];
        let length = rest.len().min(buf.remaining());
        buf.put_slice(&rest[..length]);
        self.handed_out += length;
        if self.handed_out == self.ready.len() && self.handed_out > 0 {
            (self.ready, self.handed_out) = (Vec::new(), 0);
        }
    }

    fn give_up(&mut self) {
        self.given_up = true;
        self.ready.append(&mut self.held);
    }

    /// Takes bytes that have come: so many of them may be read as they are, before what is ready.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let mut held = std::mem::take(&mut self.held);
        let mut direct = held.is_empty();
        let all = match direct {
            true => bytes,
            false => {
                held.extend_from_slice(bytes);
                &held
            }
        };
        let (mut done, mut passed) = (0, 0);
        while done < all.len() {
            match self.next(&all[done..]) {
                Next::Pass(length) => {
                    match direct {
                        true => passed += length,
                        false => self.ready.extend_from_slice(&all[done..done + length]),
                    }
                    done += length;
                }
                Next::Replace(length, other) => {
                    direct = false;
                    self.ready.extend(other);
                    done += length;
                }
                Next::Hold if all.len() - done > self.limit => self.given_up = true,
                Next::Hold => break,
            }
        }
        if held.is_empty() {
            held.extend_from_slice(&bytes[done..]);
        } else {
            held.drain(..done);
        }
        self.held = held;
        passed
    }

    fn next(&mut self, bytes: &[u8]) -> Next {
        if self.given_up {
            return Next::Pass(bytes.len());
        }
        if self.skip > 0 {
            let length = self.skip.min(bytes.len());
            self.skip -= length;
            return Next::Pass(length);
        }
        let Some(head) = bytes.first_chunk::<HEAD>() else { return Next::Hold };
        if head[3] != HEADERS {
            if head[3] == RST_STREAM || head[3] == DATA && head[4] & END_STREAM != 0 {
                self.open.remove(stream_of(head));
            }
            self.skip = HEAD + length_of(head);
            return self.next(bytes);
        }
        self.block(bytes, head).unwrap_or_else(|| {
            self.given_up = true;
            Next::Pass(bytes.len())
        })
    }

    /// A block of headers at the beginning of `bytes`, whose head is this. `None`: there is nothing that could be done.
    fn block(&mut self, bytes: &[u8], first: &[u8; HEAD]) -> Option<Next> {
        let end = loop {
            let rest = &bytes[self.walked..];
            let Some(head) = rest.first_chunk::<HEAD>() else { return Some(Next::Hold) };
            let length = length_of(head);
            let continues = head[3] == CONTINUATION && head[5..] == first[5..];
            if length > LONGEST || self.walked > 0 && !continues {
                return None;
            }
            if rest.len() < HEAD + length {
                return Some(Next::Hold);
            }
            self.walked += HEAD + length;
            if head[4] & END_HEADERS != 0 {
                break std::mem::take(&mut self.walked);
            }
        };
        let (opening, mut continued) = bytes[HEAD..end].split_at(length_of(first));
        let opening = fragment(opening, first[4])?;
        let joined = (!continued.is_empty()).then(|| {
            let mut joined = opening.to_vec();
            while let Some((head, rest)) = continued.split_first_chunk::<HEAD>() {
                let (payload, rest) = rest.split_at(length_of(head));
                joined.extend_from_slice(payload);
                continued = rest;
            }
            joined
        });
        let (stream, ends) = (stream_of(first), first[4] & END_STREAM != 0);
        let trailers = self.open.has(stream);
        let checked = self.table.check(joined.as_deref().unwrap_or(opening), trailers).ok()?;
        if ends {
            self.open.remove(stream);
        } else if !(trailers || self.whose == Whose::Host && self.table.is_interim()) {
            self.open.insert(stream);
        }
        Some(match checked {
            None => Next::Pass(end),
            Some(other) => Next::Replace(end, frames(first, &other)),
        })
    }
}

fn stream_of(head: &[u8; HEAD]) -> u32 {
    // The reserved bit says nothing (RFC 9113, section 4.1).
    u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff
}

fn length_of(head: &[u8; HEAD]) -> usize {
    u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize
}

/// The part of a HEADERS frame's payload that is HPACK.
fn fragment(mut payload: &[u8], flags: u8) -> Option<&[u8]> {
    if flags & PADDED != 0 {
        let (padding, rest) = payload.split_first()?;
        payload = rest.get(..rest.len().checked_sub(usize::from(*padding))?)?;
    }
    if flags & WITH_PRIORITY != 0 { payload.get(5..) } else { Some(payload) }
}

/// A block as frames of the stream that `head` is of.
fn frames(head: &[u8; HEAD], block: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(block.len() + HEAD);
    let mut pieces = block.chunks(LONGEST).peekable();
    let (mut kind, mut flags) = (HEADERS, head[4] & END_STREAM);
    while let Some(piece) = pieces.next() {
        flags |= if pieces.peek().is_none() { END_HEADERS } else { 0 };
        let length = (piece.len() as u32).to_be_bytes();
        bytes.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
        bytes.extend_from_slice(&head[5..]);
        bytes.extend_from_slice(piece);
        (kind, flags) = (CONTINUATION, 0);
    }
    bytes
}

/// What is read of these bytes when they come in pieces of this size.
pub(in crate::http::codec) fn scrubbed(bytes: &[u8], size: usize) -> Vec<u8> {
    let mut scrub = Scrub { limit: 128 * 1024, ..Scrub::default() };
    let mut read = Vec::new();
    for piece in bytes.chunks(size) {
        let passed = scrub.take(piece);
        read.extend_from_slice(&piece[..passed]);
        read.append(&mut scrub.ready);
    }
    scrub.give_up();
    read.append(&mut scrub.ready);
    read
}

#[cfg(test)]
#[path = "scrub_tests.rs"]
mod tests;
