//! Frames that are wrong in themselves, or where they are (RFC 9113, sections 4 to 6).

use super::harness::{Case, case, get, post};
use super::wire::{
    ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PRIORITY, PUSH_PROMISE,
    RST_STREAM, SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, block, continued, data, frame, headers, reset, settings,
    window_update,
};

/// A frame on a connection without streams.
fn alone(name: &'static str, bytes: Vec<u8>) -> Case {
    case(name, &[bytes]).open()
}

/// A frame after a request that is whole.
fn after(name: &'static str, bytes: Vec<u8>) -> Case {
    case(name, &[headers(1, true, &get(&[])), bytes]).begins_well()
}

/// A frame after a request's headers, and the rest of the request.
fn within(name: &'static str, bytes: Vec<u8>) -> Case {
    case(name, &[headers(1, false, &post(&[])), bytes, data(1, true, b"abc")])
}

pub fn sizes() -> Vec<Case> {
    vec![
        alone("SETTINGS of 5 bytes", frame(SETTINGS, 0, 0, &[0; 5])),
        alone("an ACK with settings", frame(SETTINGS, ACK, 0, &[0; 6])),
        alone("SETTINGS on a stream", frame(SETTINGS, 0, 1, &[])),
        alone("ENABLE_PUSH of 2", settings(&[(2, 2)])),
        alone("a window beyond its limit", settings(&[(4, 1 << 31)])),
        alone("MAX_FRAME_SIZE of 1", settings(&[(5, 1)])),
        alone("MAX_FRAME_SIZE beyond its limit", settings(&[(5, 1 << 24)])),
        alone("an unknown setting", settings(&[(0xff, 1)])),
        alone("PING of 7 bytes", frame(PING, 0, 0, &[0; 7])),
        alone("PING on a stream", frame(PING, 0, 1, &[0; 8])),
        alone("a PING", frame(PING, 0, 0, &[0; 8])),
        alone("an ACK of no PING", frame(PING, ACK, 0, &[0; 8])),
        alone("GOAWAY on a stream", frame(GOAWAY, 0, 1, &[0; 8])),
        alone("GOAWAY of 7 bytes", frame(GOAWAY, 0, 0, &[0; 7])),
        alone("PRIORITY of 4 bytes", frame(PRIORITY, 0, 1, &[0; 4])),
        alone("PRIORITY of no stream", frame(PRIORITY, 0, 0, &[0; 5]))
            .own("goaway PROTOCOL_ERROR", "RFC 9113, section 6.3"),
        alone("a stream that depends on itself", frame(PRIORITY, 0, 1, &[0, 0, 0, 1, 0]))
            .own("stream 1: reset PROTOCOL_ERROR; the connection serves", "RFC 7540, section 5.3.1"),
        alone("a PRIORITY", frame(PRIORITY, 0, 3, &[0, 0, 0, 1, 0])),
        alone("WINDOW_UPDATE of 3 bytes", frame(WINDOW_UPDATE, 0, 0, &[0; 3])),
        alone("WINDOW_UPDATE by 0", window_update(0, 0)),
        alone("a window that overflows", window_update(0, 0x7fff_ffff)).code("FLOW_CONTROL_ERROR"),
        within("WINDOW_UPDATE of a stream by 0", window_update(1, 0)),
        within("a stream's window that overflows", window_update(1, 0x7fff_ffff)).code("FLOW_CONTROL_ERROR"),
        alone("RST_STREAM of no stream", reset(0, 8)),
        within("RST_STREAM of 3 bytes", frame(RST_STREAM, 0, 1, &[0; 3])),
        within("a frame that is too large", frame(DATA, 0, 1, &[0; 16_385])).code("FRAME_SIZE_ERROR"),
        alone("HEADERS that are too large", frame(HEADERS, END_STREAM | END_HEADERS, 1, &[0; 16_385]))
            .code("FRAME_SIZE_ERROR"),
        within("padding beyond the frame", frame(DATA, PADDED, 1, &[9, 0, 0])),
        within("padding without its length", frame(DATA, PADDED, 1, &[])),
        within("padded data", frame(DATA, PADDED, 1, &[2, b'x', 0, 0])),
        alone(
            "padding beyond the headers",
            frame(HEADERS, PADDED | END_HEADERS | END_STREAM, 1, &[&[200], &block(&get(&[]))[..]].concat()),
        ),
        alone("HEADERS without their priority", frame(HEADERS, WITH_PRIORITY | END_HEADERS | END_STREAM, 1, &[0; 3])),
        case(
            "HEADERS that depend on themselves",
            &[frame(
                HEADERS,
                WITH_PRIORITY | END_HEADERS | END_STREAM,
                1,
                &[&[0, 0, 0, 1, 0], &block(&get(&[]))[..]].concat(),
            )],
        ),
        alone("an unknown frame", frame(0x77, 0xff, 0, b"anything")),
        within("an unknown frame on a stream", frame(0x77, 0xff, 1, b"anything")),
    ]
}

pub fn states() -> Vec<Case> {
    let half = |flags: u8| frame(HEADERS, flags, 1, &block(&get(&[])));
    vec![
        alone("DATA of no stream", data(0, false, b"abc")),
        alone("HEADERS of no stream", headers(0, true, &get(&[]))),
        alone("DATA on an idle stream", data(1, true, b"abc")),
        alone("RST_STREAM on an idle stream", reset(1, 8)),
        alone("WINDOW_UPDATE on an idle stream", window_update(1, 1)),
        alone("HEADERS on a server's stream", headers(2, true, &get(&[]))),
        alone("PUSH_PROMISE", frame(PUSH_PROMISE, END_HEADERS, 1, &[&[0, 0, 0, 2], &block(&get(&[]))[..]].concat())),
        alone("CONTINUATION of nothing", frame(CONTINUATION, END_HEADERS, 1, &block(&get(&[])))),
        after("CONTINUATION after the headers", frame(CONTINUATION, END_HEADERS, 1, &block(&[("x", "y")]))),
        case("headers in pieces", &[continued(1, &block(&get(&[("x", "y")])), 10)]),
        case(
            "another stream's headers within headers",
            &[half(END_STREAM), headers(3, true, &get(&[])), frame(CONTINUATION, END_HEADERS, 1, &[])],
        ),
        case("DATA within headers", &[half(0), data(1, true, b"abc"), frame(CONTINUATION, END_HEADERS, 1, &[])]),
        case("a PING within headers", &[half(0), frame(PING, 0, 0, &[0; 8]), frame(CONTINUATION, END_HEADERS, 1, &[])]),
        case(
            "an unknown frame within headers",
            &[half(END_STREAM), frame(0x77, 0, 1, &[]), frame(CONTINUATION, END_HEADERS, 1, &[])],
        ),
        case(
            "another stream's CONTINUATION",
            &[half(END_STREAM), frame(CONTINUATION, END_HEADERS, 3, &block(&[("x", "y")]))],
        ),
        case(
            "a stream before the last one",
            &[headers(3, true, &get(&[])), headers(1, true, &get(&[])), window_update(0, 1)],
        )
        .own("goaway PROTOCOL_ERROR", "RFC 9113, section 5.1.1: numbers only grow"),
        after("DATA after the end", data(1, true, b"abc")),
        after("HEADERS after the end", headers(1, true, &get(&[]))),
        case("DATA after a reset", &[headers(1, false, &post(&[])), reset(1, 8), data(1, true, b"abc")]).open().own(
            "stream 1: reset STREAM_CLOSED; the connection serves",
            "RFC 9113, section 5.1: an error, if of the stream",
        ),
        case("HEADERS after a reset", &[headers(1, false, &post(&[])), reset(1, 8), headers(1, true, &get(&[]))])
            .open()
            .own("goaway PROTOCOL_ERROR", "RFC 9113, section 5.1.1: a stream is opened once"),
        case("a reset", &[headers(1, false, &post(&[])), data(1, false, b"abc"), reset(1, 8)]).open(),
        case("WINDOW_UPDATE after a reset", &[headers(1, false, &post(&[])), reset(1, 8), window_update(1, 5)]).open(),
        case("two resets", &[headers(1, false, &post(&[])), reset(1, 8), reset(1, 8)]).open(),
    ]
}

/// Header blocks that are no HPACK (RFC 7541).
pub fn compression() -> Vec<Case> {
    let blocks = |name, bytes: &[u8]| {
        let mut whole = block(&get(&[]));
        whole.extend_from_slice(bytes);
        case(name, &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &whole)])
    };
    vec![
        blocks("index 0", &[0x80]),
        blocks("an index beyond the table", &[0xff, 0x7f]),
        blocks("an index without an end", &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        blocks("a literal that ends early", &[0, 5, b'x']),
        blocks("a name beyond the table", &[0x7f, 0x7f, 1, b'x']),
        blocks("a code that is none", &[0, 1, b'x', 0x84, 0xff, 0xff, 0xff, 0xff]),
        blocks("padding of zeros in a code", &[0, 1, b'x', 0x81, 0]),
        blocks("a new size of the table after fields", &[0x20]),
        blocks("a size of the table that was not settled", &[0x3f, 0xe2, 0x1f]),
        blocks("a size of the table without an end", &[0x3f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
        blocks("a value beyond the block", &[0, 1, b'x', 0x7f, 0xff, 0x7f]),
        case(
            "a table that is too large",
            &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[&[0x3f, 0xe2, 0x1f], &block(&get(&[]))[..]].concat())],
        ),
        case(
            "a table of no size",
            &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[&[0x20], &block(&get(&[]))[..]].concat())],
        ),
        case("no headers", &[frame(HEADERS, END_HEADERS | END_STREAM, 1, &[])]),
    ]
}
