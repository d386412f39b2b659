//! What costs a client next to nothing, again and again.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::Kind;
use culvert_tests::wait_until;

use super::harness::{Stage, get, post, watch};
use super::wire::{
    ACK, CONTINUATION, Connection, END_HEADERS, END_STREAM, GOAWAY, HEADERS, Nothing, PING, PRIORITY, SETTINGS, block,
    data, frame, headers, reset, window_update,
};

/// What a flood may add to a proxy's memory, in bytes.
const MEMORY: u64 = 16 << 20;

/// How both bear a flood.
fn both(what: &str, flood: impl Fn(&mut Connection) -> Result<()>, counter: &str) -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[])?;
        let before = stage.proxy.memory()?;
        let mut connection = Connection::open(stage.port, &[])?;
        flood(&mut connection)?;
        ends(&mut connection).with_context(|| format!("{kind:?}: {what}"))?;
        let grown = stage.proxy.memory()?.saturating_sub(before);
        ensure!(grown < MEMORY, "{kind:?} has grown by {grown} bytes by {what}");
        if !counter.is_empty() {
            wait_until(Duration::from_secs(3), counter, || {
                let counted = stage.proxy.stats()?.get(counter);
                ensure!(counted == 1, "{kind:?}: {counter} is {counted}");
                Ok(())
            })?;
        }
        ensure!(stage.host.take().is_empty(), "{kind:?} has forwarded a request");
        serves(&stage)?;
    }
    Ok(())
}

/// A client that answers no pings, and one that does.
pub fn unanswered_pings() -> Result<()> {
    let counter = "http2.keepalive_timeout";
    let options = "http2_protocol_options: {hpack_table_size: 100, connection_keepalive: {interval: 0.1s, timeout: 1s, interval_jitter: {value: 0}}}";
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[options])?;
        let mut answering = Connection::open(stage.port, &[])?;
        let until = Instant::now() + Duration::from_millis(2500);
        let (mut answered, mut table) = (0, false);
        loop {
            match answering.receive(until)? {
                Ok(ping) if ping.kind == PING && ping.flags & ACK == 0 => {
                    answering.send(&frame(PING, ACK, 0, &ping.payload))?;
                    answered += 1;
                }
                Ok(settings) if settings.kind == SETTINGS => {
                    table |= settings.payload.chunks(6).any(|setting| setting == [0, 1, 0, 0, 0, 100]);
                }
                Ok(_) => {}
                Err(Nothing::Late) => break,
                Err(Nothing::Closed) => anyhow::bail!("{kind:?} has closed a connection that answers"),
            }
        }
        ensure!(table, "{kind:?} has not told of hpack_table_size");
        ensure!(answered > 5, "{kind:?} has sent {answered} pings");
        ensure!(stage.proxy.stats()?.get(counter) == 0, "{kind:?} has missed an answer");
        drop(answering);
        let mut silent = Connection::open(stage.port, &[])?;
        ends(&mut silent).with_context(|| format!("{kind:?}"))?;
        wait_until(Duration::from_secs(3), counter, || {
            ensure!(stage.proxy.stats()?.get(counter) >= 1, "{kind:?}: not counted");
            Ok(())
        })?;
    }
    Ok(())
}

/// Who is told that a connection is to end, and acknowledges nothing, is not waited for; nor who says nothing from the beginning.
pub fn silent_clients() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        for limit in ["idle_timeout", "max_connection_duration"] {
            let stage = Stage::start(
                kind,
                &[&format!("common_http_protocol_options: {{{limit}: 0.5s}}"), "drain_timeout: 0.2s"],
            )?;
            for asks in [false, true] {
                let mut connection = Connection::open(stage.port, &[])?;
                if asks {
                    connection.send(&headers(1, true, &get(&[])))?;
                }
                closes(&mut connection).with_context(|| format!("{kind:?}, {limit}, asks: {asks}"))?;
            }
            let mut mute = TcpStream::connect(("127.0.0.1", stage.port))?;
            mute.set_read_timeout(Some(Duration::from_secs(10)))?;
            let end = mute.read_to_end(&mut Vec::new()).err().map(|error| error.kind());
            ensure!(end != Some(ErrorKind::WouldBlock), "{kind:?}, {limit}: who says nothing is waited for");
        }
    }
    Ok(())
}

/// The connection is closed.
fn closes(connection: &mut Connection) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match connection.receive(until)? {
            Ok(_) => {}
            Err(Nothing::Closed) => return Ok(()),
            Err(Nothing::Late) => anyhow::bail!("the connection stays"),
        }
    }
}

/// The connection ends, with or without a word.
fn ends(connection: &mut Connection) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match connection.receive(until)? {
            Ok(frame) if frame.kind == GOAWAY && frame.number(4) != Some(0) => return Ok(()),
            Err(Nothing::Closed) => return Ok(()),
            Err(Nothing::Late) => anyhow::bail!("the connection goes on"),
            Ok(_) => {}
        }
    }
}

/// The proxy still serves others.
fn serves(stage: &Stage) -> Result<()> {
    let mut connection = Connection::open(stage.port, &[])?;
    connection.send(&headers(1, true, &get(&[])))?;
    let (seen, state) = watch(&mut connection, &[1])?;
    ensure!(seen.get(&1).is_some_and(|seen| seen == "200 end"), "after it: {seen:?}, {state}");
    Ok(())
}

#[test]
fn endless_continuations() -> Result<()> {
    let flood = |connection: &mut Connection| {
        connection.send(&frame(HEADERS, END_STREAM, 1, &block(&get(&[]))))?;
        let fields = block(&[("x", &"a".repeat(1000))]).repeat(16);
        (0..2000).try_for_each(|_| connection.send(&frame(CONTINUATION, 0, 1, &fields)))
    };
    both("endless CONTINUATIONs", flood, "")
}

#[test]
fn empty_continuations() -> Result<()> {
    let flood = |connection: &mut Connection| {
        connection.send(&frame(HEADERS, END_STREAM, 1, &block(&get(&[]))))?;
        connection.send(&frame(CONTINUATION, 0, 1, &[]).repeat(10_000))
    };
    both("empty CONTINUATIONs", flood, "")
}

/// One large field that is remembered, and a million times its number: a byte each.
#[test]
fn a_million_headers_cost_nothing() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[])?;
        let before = stage.proxy.memory()?;
        let mut connection = Connection::open(stage.port, &[])?;
        let mut first = block(&get(&[]));
        // A literal that is remembered: number 62 from now on.
        first.extend_from_slice(&[0x40, 1, b'x', 127, 0xa1, 0x1e]);
        first.extend_from_slice(&[b'a'; 4000]);
        connection.send(&frame(HEADERS, END_STREAM, 1, &first))?;
        for _ in 0..63 {
            connection.send(&frame(CONTINUATION, 0, 1, &[0xbe; 16_000]))?;
        }
        connection.send(&frame(CONTINUATION, END_HEADERS, 1, &[0xbe; 16_000]))?;
        let (seen, state) = watch(&mut connection, &[1])?;
        let refused = state != "open" || seen.get(&1).is_some_and(|seen| seen.contains("reset"));
        ensure!(refused, "{kind:?}: {seen:?}, {state}");
        let grown = stage.proxy.memory()?.saturating_sub(before);
        ensure!(grown < MEMORY, "{kind:?} has grown by {grown} bytes");
        serves(&stage)?;
    }
    Ok(())
}

#[test]
fn empty_data() -> Result<()> {
    let flood = |connection: &mut Connection| {
        connection.send(&headers(1, false, &post(&[])))?;
        connection.send(&data(1, false, &[]).repeat(10_000))
    };
    both("empty DATA", flood, "http2.inbound_empty_frames_flood")
}

#[test]
fn priorities() -> Result<()> {
    let flood = |connection: &mut Connection| connection.send(&frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1]).repeat(10_000));
    both("PRIORITY", flood, "http2.inbound_priority_frames_flood")
}

#[test]
fn window_updates() -> Result<()> {
    let flood = |connection: &mut Connection| connection.send(&window_update(0, 1).repeat(10_000));
    both("WINDOW_UPDATE", flood, "http2.inbound_window_update_frames_flood")
}

/// Streams that are reset as soon as the host has them (CVE-2023-44487).
#[test]
fn rapid_reset() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[])?;
        let mut connection = Connection::open(stage.port, &[])?;
        let mut fields = get(&[]);
        fields[2].1 = "/hang";
        let mut opened = 0;
        for stream in (1..2000).step_by(2) {
            connection.send(&[headers(stream, true, &fields), frame(PING, 0, 0, &[0; 8])].concat())?;
            if !answers_ping(&mut connection)? {
                break;
            }
            connection.send(&reset(stream, 8))?;
            opened += 1;
        }
        ensure!((200..=600).contains(&opened), "{kind:?} has borne {opened} resets");
        let counter = "http.ingress.downstream_rq_too_many_premature_resets";
        wait_until(Duration::from_secs(3), counter, || {
            ensure!(stage.proxy.stats()?.get(counter) == 1, "{kind:?} does not count it");
            Ok(())
        })?;
        serves(&stage)?;
    }
    Ok(())
}

/// A client that opens streams and cancels them in one write: as long as they are few its other streams are served.
#[test]
fn a_burst_of_cancelled_streams() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[])?;
        let mut connection = Connection::open(stage.port, &[])?;
        let mut fields = get(&[]);
        fields[2].1 = "/hang";
        let burst: Vec<_> =
            (1..121).step_by(2).flat_map(|stream| [headers(stream, true, &fields), reset(stream, 8)]).collect();
        connection.send(&[burst.concat(), frame(PING, 0, 0, &[0; 8])].concat())?;
        ensure!(answers_ping(&mut connection)?, "{kind:?} has closed the connection");
        serves(&stage)?;
    }
    Ok(())
}

/// `stream_flush_timeout`, or what stands in its place: an answer that is here whole, and a client whose window has no room for it.
pub fn not_taken() -> Result<()> {
    for (path, line) in [("/bytes/3000", "stream_flush_timeout: 0.5s"), ("/bytes/1000", "stream_flush_timeout: 60s")] {
        not_taken_of(path, line).with_context(|| format!("{path}, {line}"))?;
    }
    Ok(())
}

fn not_taken_of(path: &'static str, line: &str) -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[line])?;
        // A window of one byte.
        let mut connection = Connection::open(stage.port, &[(4, 1)])?;
        let mut fields = get(&[]);
        fields[2].1 = path;
        connection.send(&headers(1, true, &fields))?;
        let (seen, state) = watch(&mut connection, &[1])?;
        ensure!(state == "open", "{kind:?}: the connection is {state}");
        ensure!(seen.get(&1).is_some_and(|seen| seen.contains("reset INTERNAL_ERROR")), "{kind:?}: {seen:?}");
        wait_until(Duration::from_secs(3), "tx_flush_timeout", || {
            ensure!(stage.proxy.stats()?.get("http2.tx_flush_timeout") == 1, "{kind:?} does not count it");
            Ok(())
        })?;
        serves(&stage)?;
    }
    Ok(())
}

fn answers_ping(connection: &mut Connection) -> Result<bool> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match connection.receive(until)? {
            Ok(frame) if frame.kind == PING && frame.flags & ACK != 0 => return Ok(true),
            Ok(frame) if frame.kind == GOAWAY => return Ok(false),
            Err(Nothing::Closed) => return Ok(false),
            Err(Nothing::Late) => anyhow::bail!("no answer to a PING"),
            Ok(_) => {}
        }
    }
}

/// All at once, before any of them can have reached a host.
#[test]
fn resets_in_one_piece() -> Result<()> {
    let flood = |connection: &mut Connection| {
        let mut fields = get(&[]);
        fields[2].1 = "/hang";
        let frames: Vec<_> = (1..20_000)
            .step_by(2)
            .flat_map(|stream| [headers(stream, true, &fields), reset(stream, 8)].concat())
            .collect();
        connection.send(&frames)
    };
    both("resets", flood, "")
}

/// A client that has answers made and does not read them gets no more than its windows and the socket take.
fn unread(bytes: &[u8]) -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let stage = Stage::start(kind, &[])?;
        let before = stage.proxy.memory()?;
        let mut connection = Connection::open(stage.port, &[])?;
        let piece = bytes.repeat((1 << 20) / bytes.len());
        // The proxy closes, or it reads no more.
        for _ in 0..64 {
            if !connection.offer(&piece)? {
                break;
            }
        }
        let grown = stage.proxy.memory()?.saturating_sub(before);
        ensure!(grown < MEMORY, "{kind:?} has grown by {grown} bytes");
        serves(&stage)?;
    }
    Ok(())
}

#[test]
fn pings_whose_answers_nobody_reads() -> Result<()> {
    unread(&frame(PING, 0, 0, &[0; 8]))
}

#[test]
fn settings_whose_answers_nobody_reads() -> Result<()> {
    unread(&frame(SETTINGS, 0, 0, &[]))
}
