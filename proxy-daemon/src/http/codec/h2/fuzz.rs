//! What the fuzzer `http2_blocks` feeds: header blocks that the crate `h2` has to decode.

use std::{
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use tokio::io::AsyncWrite as _;

use super::hpack::{LARGEST, Table, integer};

/// So many streams one input has: the crate bears with as many that are reset.
const MOST: u32 = 50;
/// Room for all that is sent, either way.
const ROOM: usize = 1 << 20;

/// Header blocks, each behind a byte with its length, as requests of one connection. What is good, or has been made good, costs the connection
/// nothing.
pub(in crate::http::codec) fn blocks(mut bytes: &[u8]) {
    let mut sent = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0".to_vec();
    let mut table = Table::default();
    for stream in (1..2 * MOST).step_by(2) {
        let Some((length, rest)) = bytes.split_first() else { break };
        let (block, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        bytes = rest;
        // What is no HPACK ends the connection.
        if wants_too_much(block) {
            break;
        }
        let Ok(other) = table.check(block, false) else { break };
        let block = other.as_deref().unwrap_or(block);
        let length = (block.len() as u32).to_be_bytes();
        // HEADERS, with END_HEADERS and END_STREAM.
        sent.extend_from_slice(&[length[1], length[2], length[3], 1, 5]);
        sent.extend_from_slice(&stream.to_be_bytes());
        sent.extend_from_slice(block);
    }
    let (mut client, server) = tokio::io::duplex(ROOM);
    let mut cx = Context::from_waker(Waker::noop());
    let written = Pin::new(&mut client).poll_write(&mut cx, &sent);
    assert!(matches!(written, Poll::Ready(Ok(length)) if length == sent.len()));
    let mut handshake = pin!(h2::server::Builder::new().handshake::<_, Bytes>(server));
    let Poll::Ready(connection) = handshake.as_mut().poll(&mut cx) else { return };
    let mut connection = connection.expect("the preface is right");
    // Whatever has come is read before nothing is ready.
    while let Poll::Ready(accepted) = connection.poll_accept(&mut cx) {
        match accepted {
            Some(Ok(_)) => {}
            Some(Err(error)) => panic!("{error} of {sent:02x?}"),
            None => panic!("the end of {sent:02x?}"),
        }
    }
}

/// Whether a block wants a table that is larger than was settled, which ends the connection.
fn wants_too_much(mut block: &[u8]) -> bool {
    while let Some(0x20..0x40) = block.first() {
        if !integer(&mut block, 5).is_ok_and(|size| size <= LARGEST) {
            return true;
        }
    }
    false
}
