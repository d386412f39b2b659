//! HTTP/2 frames as bytes, right or wrong: written without the library that culvertd uses, which would not write wrong ones.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const PRIORITY: u8 = 2;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PUSH_PROMISE: u8 = 5;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
pub const CONTINUATION: u8 = 9;

pub const END_STREAM: u8 = 1;
pub const ACK: u8 = 1;
pub const END_HEADERS: u8 = 4;
pub const PADDED: u8 = 8;
pub const WITH_PRIORITY: u8 = 0x20;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A frame.
pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend_from_slice(&stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A header block of literals that are neither indexed nor compressed (RFC 7541, section 6.2.2).
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, value) in fields {
        bytes.push(0);
        for text in [name, value] {
            integer(&mut bytes, text.chars().count());
            // Bytes above ASCII are written as in Latin-1.
            bytes.extend(text.chars().map(|character| u8::try_from(u32::from(character)).unwrap_or(b'?')));
        }
    }
    bytes
}

/// A number with a prefix of seven bits.
fn integer(bytes: &mut Vec<u8>, value: usize) {
    let Some(mut rest) = value.checked_sub(127) else { return bytes.push(value as u8) };
    bytes.push(127);
    while rest >= 128 {
        bytes.push((rest % 128) as u8 | 128);
        rest /= 128;
    }
    bytes.push(rest as u8);
}

/// HEADERS that are complete.
pub fn headers(stream: u32, end: bool, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | u8::from(end), stream, &block(fields))
}

/// A header block cut into HEADERS and CONTINUATIONs.
pub fn continued(stream: u32, block: &[u8], size: usize) -> Vec<u8> {
    let mut pieces = block.chunks(size).peekable();
    let mut bytes = frame(HEADERS, END_STREAM, stream, pieces.next().unwrap_or_default());
    while let Some(piece) = pieces.next() {
        let end = if pieces.peek().is_none() { END_HEADERS } else { 0 };
        bytes.extend(frame(CONTINUATION, end, stream, piece));
    }
    bytes
}

pub fn data(stream: u32, end: bool, payload: &[u8]) -> Vec<u8> {
    frame(DATA, u8::from(end), stream, payload)
}

pub fn settings(values: &[(u16, u32)]) -> Vec<u8> {
    let payload: Vec<u8> =
        values.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
    frame(SETTINGS, 0, 0, &payload)
}

pub fn window_update(stream: u32, by: u32) -> Vec<u8> {
    frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes())
}

pub fn reset(stream: u32, code: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &code.to_be_bytes())
}

/// A frame that has come.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// The 32 bits at `at`.
    pub fn number(&self, at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(self.payload.get(at..at + 4)?.try_into().ok()?))
    }

    /// The status of a response's first headers: both proxies write it first (RFC 7541, appendix A).
    pub fn status(&self) -> Option<u16> {
        let padding = usize::from(self.flags & PADDED != 0) + 5 * usize::from(self.flags & WITH_PRIORITY != 0);
        let block = self.payload.get(padding..)?;
        // A change of the table's size may come first.
        let start = block.iter().position(|byte| byte & 0xe0 != 0x20)?;
        let block = &block[start..];
        let known = [200, 204, 206, 304, 400, 404, 500];
        match *block.first()? {
            index @ 0x88..=0x8e => known.get(usize::from(index - 0x88)).copied(),
            0x48 | 0x08 | 0x18 => {
                let (length, coded) = (usize::from(block.get(1)? & 0x7f), block.get(1)? & 0x80 != 0);
                let value = block.get(2..2 + length)?;
                if coded { digits(value)?.parse().ok() } else { std::str::from_utf8(value).ok()?.parse().ok() }
            }
            _ => None,
        }
    }
}

/// Digits in Huffman's code (RFC 7541, appendix B).
fn digits(coded: &[u8]) -> Option<String> {
    let mut bits = coded.iter().flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1)));
    let mut text = String::new();
    for _ in 0..3 {
        let mut take = |count: u32, start: u32| (0..count).try_fold(start, |value, _| Some(value << 1 | bits.next()?));
        let short = take(5, 0)?;
        let digit = if short < 3 { short } else { take(1, short)? - 0x19 + 3 };
        text += &digit.to_string();
    }
    Some(text)
}

/// A host's side of a connection.
pub struct Served(pub TcpStream);

impl Served {
    /// Takes the preface, and says what settings the host has.
    pub fn begin(mut socket: TcpStream, own: &[(u16, u32)]) -> Result<Served> {
        socket.read_exact(&mut [0; PREFACE.len()])?;
        socket.write_all(&settings(own))?;
        Ok(Served(socket))
    }

    /// The next frame, but for SETTINGS and PING, which are answered; `None`: the proxy has gone.
    pub fn next(&mut self) -> Result<Option<Frame>> {
        loop {
            let mut head = [0; 9];
            if self.0.read_exact(&mut head).is_err() {
                return Ok(None);
            }
            let [a, b, c, kind, flags, stream @ ..] = head;
            let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
            self.0.read_exact(&mut payload)?;
            match kind {
                SETTINGS if flags & ACK == 0 => self.send(&frame(SETTINGS, ACK, 0, &[]))?,
                PING if flags & ACK == 0 => self.send(&frame(PING, ACK, 0, &payload))?,
                _ => return Ok(Some(Frame { kind, flags, stream: u32::from_be_bytes(stream), payload })),
            }
        }
    }

    /// Sends.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write_all(bytes)?)
    }
}

/// A client's connection.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// What came instead of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nothing {
    Closed,
    Late,
}

impl Connection {
    /// Connects, and says what settings the client has.
    pub fn open(port: u16, own: &[(u16, u32)]) -> Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", port)).context("connecting")?;
        stream.set_nodelay(true)?;
        let mut connection = Connection { stream, buffer: Vec::new() };
        connection.send(&[PREFACE, &settings(own)].concat())?;
        Ok(connection)
    }

    /// Sends; the other side may have closed by now.
    ///
    /// # Errors
    /// It takes nothing for ten seconds.
    pub fn send(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.set_write_timeout(Some(Duration::from_secs(10)))?;
        match self.stream.write_all(bytes) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(error).context("it does not read")
            }
            _ => Ok(()),
        }
    }

    /// Sends what fits at once: whether all of it did.
    pub fn offer(&mut self, bytes: &[u8]) -> Result<bool> {
        self.stream.set_write_timeout(Some(Duration::from_millis(500)))?;
        match self.stream.write_all(bytes) {
            Ok(()) => Ok(true),
            Err(_) => Ok(false),
        }
    }

    /// The next frame; those that only concern the connection's settings are answered.
    ///
    /// # Errors
    /// What came is no frame.
    pub fn receive(&mut self, until: Instant) -> Result<std::result::Result<Frame, Nothing>> {
        loop {
            if let Some(frame) = self.take()? {
                if frame.kind == SETTINGS && frame.flags & ACK == 0 {
                    let ack = self::frame(SETTINGS, ACK, 0, &[]);
                    self.send(&ack)?;
                }
                return Ok(Ok(frame));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Err(Nothing::Late));
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut piece = [0; 16 * 1024];
            match self.stream.read(&mut piece) {
                Ok(0) => return Ok(Err(Nothing::Closed)),
                Ok(length) => self.buffer.extend_from_slice(&piece[..length]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(Err(Nothing::Late));
                }
                Err(_) => return Ok(Err(Nothing::Closed)),
            }
        }
    }

    fn take(&mut self) -> Result<Option<Frame>> {
        let Some((head, rest)) = self.buffer.split_first_chunk::<9>() else { return Ok(None) };
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        ensure!(length <= 1 << 14, "a frame of {length} bytes");
        let Some(payload) = rest.get(..length) else { return Ok(None) };
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & 0x7fff_ffff;
        let frame = Frame { kind: head[3], flags: head[4], stream, payload: payload.to_vec() };
        self.buffer.drain(..9 + length);
        Ok(Some(frame))
    }
}
