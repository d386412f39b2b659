//! `envoy.filters.listener.tls_inspector`: looks at a connection's first bytes without taking them.

use std::{io, os::fd::AsRawFd, time::Duration};

use nix::sys::socket::{MsgFlags, recv};
use rustls::server::Acceptor;
use tokio::{io::Interest, net::TcpStream};

use crate::tls::TlsInspectorStats;

/// What a client says before anything is encrypted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hello {
    /// It begins with TLS.
    pub tls: bool,
    /// The server that it asks for, in lower case.
    pub server_name: Option<String>,
    /// The protocols that it offers.
    pub alpn: Vec<Vec<u8>>,
}

/// Read at first: enough for almost every client.
const FIRST_READ: usize = 2048;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;

/// How far the bytes that have come go.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// More has to come.
    Part,
    /// A whole first message.
    Whole,
    /// Something else.
    NotTls,
}

/// Waits until it is clear what the client speaks. `max` bounds what is looked at.
///
/// # Errors
/// The client went away, sent too much, or `limit` passed.
pub(super) async fn inspect(
    stream: &TcpStream,
    max: usize,
    limit: Option<Duration>,
    stats: &TlsInspectorStats,
) -> io::Result<Hello> {
    let peeked = peek(stream, max, stats);
    let (bytes, seen) = match limit {
        Some(limit) => tokio::time::timeout(limit, peeked).await.map_err(|_| io::ErrorKind::TimedOut)??,
        None => peeked.await?,
    };
    // What rustls cannot read is for the handshake to refuse, where a chain without a name takes it.
    let hello = match seen {
        Seen::Whole => Some(read_hello(&bytes).unwrap_or(Hello { tls: true, ..Hello::default() })),
        Seen::Part | Seen::NotTls => None,
    };
    let Some(hello) = hello else {
        stats.tls_not_found.inc();
        return Ok(Hello::default());
    };
    stats.tls_found.inc();
    stats.bytes_processed.record(bytes.len() as u64);
    if hello.server_name.is_some() { stats.sni_found } else { stats.sni_not_found }.inc();
    if hello.alpn.is_empty() { stats.alpn_not_found } else { stats.alpn_found }.inc();
    Ok(hello)
}

/// The first bytes, when they tell enough.
async fn peek(stream: &TcpStream, max: usize, stats: &TlsInspectorStats) -> io::Result<(Vec<u8>, Seen)> {
    let mut buffer = vec![0; FIRST_READ.min(max)];
    let mut known = 0;
    loop {
        let ready = stream.ready(Interest::READABLE).await?;
        let peeked = stream.try_io(Interest::READABLE, || {
            match recv(stream.as_raw_fd(), &mut buffer, MsgFlags::MSG_PEEK)? {
                // Nothing new: wait for the next segment, not for the bytes that lie there already.
                length if length == known && length != 0 => Err(io::ErrorKind::WouldBlock.into()),
                length => Ok(length),
            }
        });
        let length = match peeked {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !ready.is_read_closed() => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) => return Err(error),
        };
        known = length;
        match look(&buffer[..length]) {
            Seen::Part if length < buffer.len() => {}
            Seen::Part if length < max => buffer.resize(max, 0),
            Seen::Part => {
                stats.client_hello_too_large.inc();
                return Err(io::Error::other("the client's first message is too large"));
            }
            seen => {
                buffer.truncate(length);
                return Ok((buffer, seen));
            }
        }
    }
}

/// Walks the records: their headers tell whether the whole of the first message is there.
fn look(mut bytes: &[u8]) -> Seen {
    let mut header = [0; 4];
    let mut received = 0;
    loop {
        if bytes.first().is_some_and(|kind| *kind != HANDSHAKE) || bytes.get(1).is_some_and(|major| *major != 3) {
            return Seen::NotTls;
        }
        let [_, _, _, high, low, rest @ ..] = bytes else { return Seen::Part };
        let length = usize::from(*high) << 8 | usize::from(*low);
        // RFC 8446, 5.1: no handshake record is empty, and none is longer than 2^14 bytes.
        if length == 0 || length > 1 << 14 {
            return Seen::NotTls;
        }
        let payload = &rest[..length.min(rest.len())];
        header.iter_mut().skip(received).zip(payload).for_each(|(to, from)| *to = *from);
        received += payload.len();
        if received > 0 && header[0] != CLIENT_HELLO {
            return Seen::NotTls;
        }
        if payload.len() < length {
            return Seen::Part;
        }
        let [_, a, b, c] = header;
        if received >= header.len() && received >= header.len() + u32::from_be_bytes([0, a, b, c]) as usize {
            return Seen::Whole;
        }
        bytes = &rest[length..];
    }
}

fn read_hello(bytes: &[u8]) -> Option<Hello> {
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).ok()? == 0 {
            break;
        }
    }
    let accepted = acceptor.accept().ok()??;
    let hello = accepted.client_hello();
    Some(Hello {
        tls: true,
        server_name: hello.server_name().map(str::to_ascii_lowercase),
        alpn: hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect(),
    })
}

/// What the fuzzer `client_hello` feeds: what a client may begin with. More bytes never change what was clear before.
pub fn fuzz(bytes: &[u8]) {
    let seen = look(bytes);
    for end in 0..bytes.len().min(64) {
        let before = look(&bytes[..end]);
        assert!(before == Seen::Part || before == seen, "{before:?} at {end}, then {seen:?}");
    }
    if seen == Seen::Whole
        && let Some(hello) = read_hello(bytes)
    {
        assert!(hello.tls);
    }
}

#[cfg(test)]
#[path = "tls_inspector_tests.rs"]
mod tests;
