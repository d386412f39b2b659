//! Buffers that the connections of a worker take turns with, so that an idle connection has none and a busy one allocates none.

use std::{
    cell::RefCell,
    pin::pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Bytes of a read buffer: a body of 64 KiB and its head come in one read.
pub(super) const READ_SIZE: usize = 68 * 1024;
/// How many of each kind a worker keeps.
const KEPT: usize = 32;
/// A map or vector that one message made larger is not kept.
const KEPT_HEADERS: usize = 128;
const KEPT_OUT: usize = 16 * 1024;

struct Buffers {
    read: Vec<BytesMut>,
    out: Vec<Vec<u8>>,
    headers: Vec<HeaderMap>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> =
        const { RefCell::new(Buffers { read: Vec::new(), out: Vec::new(), headers: Vec::new() }) };
}

fn with<R>(act: impl FnOnce(&mut Buffers) -> R) -> R {
    BUFFERS.with(|buffers| act(&mut buffers.borrow_mut()))
}

/// Reads once into a buffer, which it has only while there is something in it. `false`: the other side has ended the connection, or it broke.
pub(super) fn poll_fill(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut BytesMut,
    cx: &mut Context<'_>,
) -> Poll<bool> {
    prepare(buffer);
    let read = pin!(stream.read_buf(buffer)).poll(cx);
    if read.is_pending() {
        give_back(buffer);
    }
    read.map(|read| read.is_ok_and(|bytes| bytes > 0))
}

/// Makes room to read into.
fn prepare(buffer: &mut BytesMut) {
    if buffer.capacity() == 0 {
        *buffer = with(|buffers| buffers.read.pop()).unwrap_or_else(|| BytesMut::with_capacity(READ_SIZE));
    } else if buffer.capacity() - buffer.len() < 1024 && !buffer.try_reclaim(READ_SIZE - buffer.len().min(READ_SIZE)) {
        buffer.reserve(READ_SIZE);
    }
}

/// Gives an empty buffer back, where nothing refers to its memory any more.
pub(super) fn give_back(buffer: &mut BytesMut) {
    if buffer.is_empty() && buffer.capacity() != 0 {
        let mut buffer = std::mem::take(buffer);
        if buffer.try_reclaim(READ_SIZE) && buffer.capacity() < 2 * READ_SIZE {
            with(|buffers| {
                if buffers.read.len() < KEPT {
                    buffers.read.push(buffer);
                }
            });
        }
    }
}

/// A body's bytes have been passed on: their buffer may be free by now.
pub(super) fn recycle(bytes: Bytes) {
    if let Ok(mut buffer) = bytes.try_into_mut() {
        buffer.clear();
        give_back(&mut buffer);
    }
}

/// An empty vector to put a head into.
pub(super) fn out() -> Vec<u8> {
    with(|buffers| buffers.out.pop()).unwrap_or_else(|| Vec::with_capacity(1024))
}

/// Gives such a vector back.
pub(super) fn give_out(mut out: Vec<u8>) {
    if out.capacity() <= KEPT_OUT && out.capacity() > 0 {
        out.clear();
        with(|buffers| {
            if buffers.out.len() < KEPT {
                buffers.out.push(out);
            }
        });
    }
}

/// An empty map.
pub(super) fn headers() -> HeaderMap {
    with(|buffers| buffers.headers.pop()).unwrap_or_else(|| HeaderMap::with_capacity(24))
}

/// Gives a map back: the head that it was part of has been written.
pub(super) fn give_headers(mut headers: HeaderMap) {
    if (1..=KEPT_HEADERS).contains(&headers.capacity()) {
        headers.clear();
        with(|buffers| {
            if buffers.headers.len() < KEPT {
                buffers.headers.push(headers);
            }
        });
    }
}
