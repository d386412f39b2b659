//! Bodies, from bytes.

use bytes::{Buf as _, Bytes, BytesMut};
use http::HeaderMap;
use memchr::memchr;

use super::{
    error::CodecError,
    head::{self, Framing, Limits, is_text},
};

/// Bytes of chunk extensions that a body may have in all: there is no use for any.
const EXTENSIONS: u32 = 16 * 1024;

/// How far the body of a message has come.
#[derive(Debug)]
pub enum Decoder {
    /// It has ended.
    Done,
    /// So many bytes are still to come.
    Length(u64),
    /// In chunks.
    Chunked(Chunks),
    /// Until the connection ends.
    UntilClose,
}

/// Where in a chunked body the decoder is.
#[derive(Debug)]
pub struct Chunks {
    state: State,
    extensions: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// In the size, with what is known of it and whether there was a digit.
    Size(u64, bool),
    /// After the size, up to the line's end.
    Extension(u64),
    /// The line feed of the size's line.
    SizeEnd(u64),
    Data(u64),
    DataCr,
    DataLf,
    /// So much of the trailer section has no end in it.
    Trailers(usize),
}

/// What has been decoded.
#[derive(Debug)]
pub enum Item {
    /// Some of the body.
    Data(Bytes),
    /// Its end.
    End(HeaderMap),
}

impl Decoder {
    /// For a body that is framed so.
    pub fn new(framing: Framing) -> Decoder {
        match framing {
            Framing::None | Framing::Length(0) => Decoder::Done,
            Framing::Length(length) => Decoder::Length(length),
            Framing::Chunked => Decoder::Chunked(Chunks { state: State::Size(0, false), extensions: 0 }),
            Framing::UntilClose => Decoder::UntilClose,
        }
    }

    /// Whether the message is complete.
    pub fn is_done(&self) -> bool {
        matches!(self, Decoder::Done)
    }

    /// The next piece; none where more must be read first.
    ///
    /// # Errors
    /// The body is malformed.
    pub fn decode(&mut self, buffer: &mut BytesMut, limits: Limits) -> Result<Option<Item>, CodecError> {
        match self {
            Decoder::Done => Ok(Some(Item::End(HeaderMap::new()))),
            Decoder::UntilClose => Ok((!buffer.is_empty()).then(|| Item::Data(buffer.split().freeze()))),
            Decoder::Length(left) => {
                if buffer.is_empty() {
                    return Ok(None);
                }
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                *left -= taken as u64;
                if *left == 0 {
                    *self = Decoder::Done;
                }
                Ok(Some(Item::Data(buffer.split_to(taken).freeze())))
            }
            Decoder::Chunked(chunks) => {
                let item = chunks.decode(buffer, limits)?;
                if let Some(Item::End(_)) = item {
                    *self = Decoder::Done;
                }
                Ok(item)
            }
        }
    }
}

impl Chunks {
    fn decode(&mut self, buffer: &mut BytesMut, limits: Limits) -> Result<Option<Item>, CodecError> {
        loop {
            match self.state {
                State::Data(left) => {
                    if buffer.is_empty() {
                        return Ok(None);
                    }
                    let taken = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
                    let left = left - taken as u64;
                    self.state = if left == 0 { State::DataCr } else { State::Data(left) };
                    return Ok(Some(Item::Data(buffer.split_to(taken).freeze())));
                }
                State::Trailers(scanned) => return self.trailers(buffer, scanned, limits),
                state => {
                    let Some(&byte) = buffer.first() else { return Ok(None) };
                    buffer.advance(1);
                    self.state = self.step(state, byte)?;
                }
            }
        }
    }

    fn step(&mut self, state: State, byte: u8) -> Result<State, CodecError> {
        match (state, byte) {
            (State::Size(size, _), b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') => {
                // What does not fit into 63 bits is no size.
                let digit = (byte as char).to_digit(16).unwrap_or_default();
                if size >> 59 != 0 {
                    return Err(CodecError::CODEC);
                }
                // Zeros in front are no more of use than an extension; a size has one that matters after them, or is the last one's.
                if size == 0 && digit == 0 {
                    self.count_extension()?;
                }
                Ok(State::Size(size << 4 | u64::from(digit), true))
            }
            (State::Size(size, true) | State::Extension(size), b'\r') => Ok(State::SizeEnd(size)),
            (State::Size(size, true), b';' | b' ' | b'\t') => Ok(State::Extension(size)),
            (State::Extension(size), byte) if is_text(byte) => {
                self.count_extension()?;
                Ok(State::Extension(size))
            }
            (State::SizeEnd(0), b'\n') => Ok(State::Trailers(0)),
            (State::SizeEnd(size), b'\n') => Ok(State::Data(size)),
            (State::DataCr, b'\r') => Ok(State::DataLf),
            (State::DataLf, b'\n') => Ok(State::Size(0, false)),
            _ => Err(CodecError::CODEC),
        }
    }

    fn count_extension(&mut self) -> Result<(), CodecError> {
        self.extensions += 1;
        if self.extensions > EXTENSIONS { Err(CodecError::CODEC) } else { Ok(()) }
    }

    fn trailers(
        &mut self,
        buffer: &mut BytesMut,
        mut scanned: usize,
        limits: Limits,
    ) -> Result<Option<Item>, CodecError> {
        // Line by line, as far as there are whole ones.
        while let Some(end) = memchr(b'\n', &buffer[scanned..]).map(|end| scanned + end) {
            if end == 0 || buffer[end - 1] != b'\r' {
                return Err(CodecError::CODEC);
            }
            if end >= limits.bytes {
                return Err(CodecError::HEADERS_TOO_LARGE);
            }
            if end == scanned + 1 {
                let section = buffer.split_to(end + 1).freeze();
                return head::trailers(&section, limits).map(|trailers| Some(Item::End(trailers)));
            }
            scanned = end + 1;
            self.state = State::Trailers(scanned);
        }
        if buffer.len() > limits.bytes { Err(CodecError::HEADERS_TOO_LARGE) } else { Ok(None) }
    }
}

#[cfg(test)]
#[path = "decode_tests.rs"]
mod tests;
