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
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let length = (payload.len() as u32).to_be_bytes();
        [&[length[1], length[2], length[3], kind, flags, 0, 0, 0, 3], payload].concat()
    }

    /// Each part on a stream of its own.
    fn on_streams(parts: &[Vec<u8>]) -> Vec<u8> {
        let numbered = |(index, part): (usize, &Vec<u8>)| {
            let (mut part, mut at) = (part.clone(), 0);
            while let Some(head) = part[at..].first_chunk::<HEAD>() {
                let next = at + HEAD + length_of(head);
                part[at + 8] = 2 * index as u8 + 1;
                at = next;
            }
            part
        };
        parts.iter().enumerate().flat_map(numbered).collect()
    }

    const GOOD: &[u8] = b"\x82\x84\0\x03x-a\x01b";
    const BAD: &[u8] = b"\x82\x84\0\x03X-A\x01b\x86";
    const MADE_GOOD: &[u8] = b"\x82\x84\0\x03xxx\x01x\x86\0\x02te\x01x";
    const SIZES: [usize; 7] = [1, 2, 5, 8, 9, 10, 100_000];

    #[test]
    fn only_bad_blocks_are_written_anew() {
        let (one, rest) = BAD.split_at(5);
        let padded = [&[3, 0, 0, 0, 0, 7][..], BAD, &[0; 3]].concat();
        let settings = frame(4, 0, &[]);
        // What looks like a bad block is data.
        let data = frame(0, 0, &frame(HEADERS, END_HEADERS, BAD));
        let good = frame(HEADERS, END_HEADERS, GOOD);
        let sent = [
            settings.clone(),
            good.clone(),
            frame(HEADERS, END_HEADERS | END_STREAM, BAD),
            data.clone(),
            [frame(HEADERS, 0, one), frame(CONTINUATION, 0, &[]), frame(CONTINUATION, END_HEADERS, rest)].concat(),
            frame(HEADERS, END_HEADERS | PADDED | WITH_PRIORITY, &padded),
            [frame(HEADERS, 0, GOOD), frame(CONTINUATION, END_HEADERS, GOOD)].concat(),
            good.clone(),
        ];
        let read = [
            settings,
            good.clone(),
            frame(HEADERS, END_HEADERS | END_STREAM, MADE_GOOD),
            data,
            frame(HEADERS, END_HEADERS, MADE_GOOD),
            frame(HEADERS, END_HEADERS, MADE_GOOD),
            [frame(HEADERS, 0, GOOD), frame(CONTINUATION, END_HEADERS, GOOD)].concat(),
            good,
        ];
        for size in SIZES {
            assert_eq!(scrubbed(&on_streams(&sent), size), on_streams(&read), "in pieces of {size}");
        }
    }

    #[test]
    fn trailers_are_known_on_both_sides() {
        let head = |flags, block: &[u8]| frame(HEADERS, END_HEADERS | flags, block);
        let refused = |block: &[u8]| [block, b"\0\x02te\x01x"].concat();
        let (status, interim) = (&b"\x88"[..], &b"\x08\x03103"[..]);
        let reserved = |mut frame: Vec<u8>| {
            frame[5] |= 0x80;
            frame
        };
        let cases = [
            // A client's head ends its request, or trailers do.
            (Whose::Client, vec![head(END_STREAM, GOOD), head(END_STREAM, GOOD)], None),
            (Whose::Client, vec![head(0, GOOD), head(END_STREAM, GOOD)], Some(head(END_STREAM, &refused(GOOD)))),
            (Whose::Client, vec![head(0, GOOD), frame(DATA, END_STREAM, b"x"), head(0, GOOD)], None),
            // A host's interim responses are no heads that trailers follow.
            (Whose::Host, vec![head(0, interim), head(0, interim), head(END_STREAM, status)], None),
            (Whose::Host, vec![head(0, interim), head(0, status), head(END_STREAM, b"\0\x01a\x01b")], None),
            (Whose::Host, vec![head(0, status), head(END_STREAM, status)], Some(head(END_STREAM, &refused(status)))),
            (Whose::Host, vec![head(0, status), head(0, status)], Some(head(0, &refused(status)))),
            (
                Whose::Client,
                vec![head(0, GOOD), reserved(head(END_STREAM, GOOD))],
                Some(reserved(head(END_STREAM, &refused(GOOD)))),
            ),
        ];
        for (whose, sent, last) in cases {
            let mut scrub = Scrub::new(1024, whose);
            let mut read = Vec::new();
            for bytes in &sent {
                let passed = scrub.take(bytes);
                read.push([&bytes[..passed], &std::mem::take(&mut scrub.ready)].concat());
            }
            let expected = sent.split_last().map(|(own, before)| [before, &[last.unwrap_or(own.clone())]].concat());
            assert_eq!(Some(read), expected, "{whose:?}");
        }
    }

    #[test]
    fn long_blocks_are_cut_again() {
        // In Huffman's code an `a` is five bits: what is written is longer than what came. (A delete is 28 bits.)
        let coded = [&[0x18, 0xc6, 0x31, 0x8c, 0x63].repeat(3000)[..], &[0xff, 0xff, 0xff, 0xcf]].concat();
        let mut value = Vec::new();
        assert!(super::super::huffman::decode(&coded, &mut value).is_some(), "what is sent is right");
        assert_eq!(value.len(), 1 + 8 * 3000);
        let mut block = b"\x82\0\x01a\xff".to_vec();
        let mut rest = coded.len() - 0x7f;
        while rest >= 0x80 {
            block.push((rest & 0x7f) as u8 | 0x80);
            rest >>= 7;
        }
        block.push(rest as u8);
        block.extend(&coded);
        let read = scrubbed(&frame(HEADERS, END_HEADERS, &block), 1000);
        let lengths: Vec<_> = {
            let (mut rest, mut found) = (&read[..], Vec::new());
            while let Some((head, more)) = rest.split_first_chunk::<HEAD>() {
                found.push((head[3], head[4], length_of(head)));
                rest = &more[length_of(head)..];
            }
            found
        };
        assert_eq!(lengths.len(), 2);
        assert_eq!(lengths[0], (HEADERS, 0, LONGEST));
        assert_eq!((lengths[1].0, lengths[1].1), (CONTINUATION, END_HEADERS));
    }

    #[test]
    fn what_is_no_http2_passes() {
        let bad = frame(HEADERS, END_HEADERS, BAD);
        let cases = [
            // An index of nothing, another frame within a block, padding that is longer than its frame, a frame that is too long.
            [frame(HEADERS, END_HEADERS, &[0xff, 0x70]), bad.clone()].concat(),
            [frame(HEADERS, 0, BAD), frame(0, 0, b"x"), bad.clone()].concat(),
            [frame(HEADERS, END_HEADERS | PADDED, &[9, 0x82]), bad.clone()].concat(),
            [frame(HEADERS, 0, &[0x82; LONGEST + 1]), bad.clone()].concat(),
            // More than is held.
            [frame(HEADERS, 0, BAD), frame(CONTINUATION, 0, &[0x82; LONGEST]).repeat(10), bad.clone()].concat(),
            // The end comes too early.
            bad[..bad.len() - 1].to_vec(),
        ];
        for (case, bytes) in cases.iter().enumerate() {
            for size in SIZES {
                assert_eq!(scrubbed(bytes, size), *bytes, "{case}, in pieces of {size}");
            }
        }
    }

    #[test]
    fn trailers_are_known_by_their_streams() {
        let (head, end) = (b"\x82\x84", END_HEADERS | END_STREAM);
        let refused = frame(HEADERS, end, b"\x82\x84\0\x02te\x01x");
        let (ended, reset) = (frame(DATA, END_STREAM, b"a"), frame(RST_STREAM, 0, &[0; 4]));
        for (between, refuses) in [(vec![], true), (frame(DATA, 0, b"a"), true), (ended, false), (reset, false)] {
            let sent = [frame(HEADERS, END_HEADERS, head), between.clone(), frame(HEADERS, end, head)].concat();
            let last = if refuses { refused.clone() } else { frame(HEADERS, end, head) };
            let read = [frame(HEADERS, END_HEADERS, head), between, last].concat();
            let mut scrub = Scrub::new(1000, Whose::Client);
            let passed = scrub.take(&sent);
            assert_eq!([&sent[..passed], &scrub.ready].concat(), read);
        }
    }

    #[tokio::test]
    async fn readers_with_little_room_get_all() {
        let (sent, read) =
            (frame(HEADERS, END_HEADERS, BAD).repeat(3), frame(HEADERS, END_HEADERS, MADE_GOOD).repeat(3));
        for size in [1, 7, 64] {
            let mut stream = Scrubbed::host(io::Cursor::new(sent.clone()), 1000);
            let (mut got, mut piece) = (Vec::new(), vec![0; size]);
            loop {
                match stream.read(&mut piece).await.unwrap() {
                    0 => break,
                    length => got.extend_from_slice(&piece[..length]),
                }
            }
            assert_eq!(got, read, "with room for {size}");
        }
    }
}
