//! Counts frames as they pass, in both directions: what costs a client nothing and the proxy something is only borne up to Envoy's
//! limits, and what the crate refuses by itself is counted.

use std::{io, rc::Rc};

use crate::{config::model::Http2Options, http::conn_manager::ConnState, stats::Counter};

/// `PRI * HTTP/2.0...`
pub(super) const PREFACE: usize = 24;
const HEAD: usize = 9;
/// The longest that is looked into: GOAWAY's stream and code.
const LOOKED_INTO: usize = 8;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
pub(super) const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// Of DATA and HEADERS.
const END_STREAM: u8 = 1;

/// Codes of errors that the client has made (RFC 9113, section 7): PROTOCOL_ERROR, FLOW_CONTROL_ERROR, FRAME_SIZE_ERROR,
/// COMPRESSION_ERROR.
const MISTAKES: [u32; 4] = [1, 3, 6, 9];

/// A client's connection as its frames are seen.
pub(in crate::http) struct Watch {
    state: Rc<ConnState>,
    received: Frames,
    sent: Frames,
    /// Frames without anything in them, one after the other.
    empty: u32,
    streams: u64,
    priorities: u64,
    window_updates: u64,
    data_sent: u64,
}

impl Watch {
    /// For a connection of which nothing has been read, not even the preface.
    pub(super) fn new(state: &Rc<ConnState>) -> Watch {
        Watch {
            state: Rc::clone(state),
            received: Frames { skip: PREFACE, ..Frames::default() },
            sent: Frames::default(),
            empty: 0,
            streams: 0,
            priorities: 0,
            window_updates: 0,
            data_sent: 0,
        }
    }

    /// These bytes have come from the client.
    ///
    /// # Errors
    /// They are more than is borne with: the connection ends.
    pub(in crate::http) fn received(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while let Some(frame) = self.received.next(&mut bytes) {
            if let Some(flood) = self.judge(&frame) {
                flood.inc();
                return Err(io::Error::other("a flood of frames"));
            }
        }
        Ok(())
    }

    /// The client has closed its side, or has broken off.
    pub(in crate::http) fn ended(&self) {
        self.state.client_closed.set(true);
    }

    fn judge(&mut self, frame: &Frame) -> Option<Counter> {
        let limits: &Http2Options = &self.state.config().http2;
        let stats = &self.state.manager.codecs;
        match frame.kind {
            DATA | HEADERS | CONTINUATION => {
                self.streams += u64::from(frame.kind == HEADERS);
                let ends = frame.kind != CONTINUATION && frame.flags & END_STREAM != 0;
                if frame.length > 0 || ends {
                    self.empty = 0;
                    return None;
                }
                self.empty += 1;
                let limit = limits.max_consecutive_inbound_frames_with_empty_payload;
                (self.empty > limit).then_some(stats.inbound_empty_frames_flood)
            }
            PRIORITY => {
                self.priorities += 1;
                let limit = u64::from(limits.max_inbound_priority_frames_per_stream) * (1 + self.streams);
                (self.priorities > limit).then_some(stats.inbound_priority_frames_flood)
            }
            WINDOW_UPDATE => {
                self.window_updates += 1;
                let per_data = u64::from(limits.max_inbound_window_update_frames_per_data_frame_sent);
                let limit = 5 + 2 * (self.streams + per_data * self.data_sent);
                (self.window_updates > limit).then_some(stats.inbound_window_update_frames_flood)
            }
            RST_STREAM => {
                stats.rx_reset.inc();
                None
            }
            _ => None,
        }
    }

    /// These bytes have gone to the client.
    pub(in crate::http) fn sent(&mut self, mut bytes: &[u8]) {
        while let Some(frame) = self.sent.next(&mut bytes) {
            let stats = &self.state.manager.codecs;
            match frame.kind {
                DATA => self.data_sent += 1,
                RST_STREAM => {
                    stats.tx_reset.inc();
                    if MISTAKES.contains(&frame.number(0)) {
                        stats.rx_messaging_error.inc();
                        self.state.count_protocol_error();
                    }
                }
                GOAWAY => stats.goaway_sent.inc(),
                _ => {}
            }
        }
    }
}

/// A frame whose head, and what matters of its payload, has passed.
pub(super) struct Frame {
    length: usize,
    pub(super) kind: u8,
    flags: u8,
    payload: [u8; LOOKED_INTO],
}

impl Frame {
    /// The 32 bits at `at` of its payload.
    fn number(&self, at: usize) -> u32 {
        let bytes = self.payload.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default())
    }
}

/// Finds frames in a stream of bytes that comes in pieces of any size.
#[derive(Default)]
pub(super) struct Frames {
    /// Of the frame that passes: its head, and the beginning of its payload.
    seen: [u8; HEAD + LOOKED_INTO],
    have: usize,
    /// So much of it is of no interest.
    skip: usize,
}

impl Frames {
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            *bytes = &bytes[skipped..];
            let taken = (HEAD + self.looked_into() - self.have).min(bytes.len());
            self.seen[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            *bytes = &bytes[taken..];
            let looked_into = self.looked_into();
            if self.have >= HEAD && self.have == HEAD + looked_into {
                let mut payload = [0; LOOKED_INTO];
                payload[..looked_into].copy_from_slice(&self.seen[HEAD..HEAD + looked_into]);
                let frame = Frame { length: self.length(), kind: self.seen[3], flags: self.seen[4], payload };
                (self.have, self.skip) = (0, frame.length - looked_into);
                return Some(frame);
            }
            if bytes.is_empty() {
                return None;
            }
        }
    }

    fn length(&self) -> usize {
        usize::from(self.seen[0]) << 16 | usize::from(self.seen[1]) << 8 | usize::from(self.seen[2])
    }

    /// How much of the payload is kept; nothing is known of it before the head is there.
    fn looked_into(&self) -> usize {
        match self.seen[3] {
            RST_STREAM | GOAWAY if self.have >= HEAD => self.length().min(LOOKED_INTO),
            _ => 0,
        }
    }
}

/// The kinds, lengths and codes of the frames in these bytes, which come in pieces of this size.
pub(in crate::http::codec) fn frames(bytes: &[u8], size: usize) -> Vec<(u8, usize, u32)> {
    let (mut frames, mut found) = (Frames::default(), Vec::new());
    for mut piece in bytes.chunks(size) {
        while let Some(frame) = frames.next(&mut piece) {
            found.push((frame.kind, frame.length, frame.number(4)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, (payload.len() >> 8) as u8, payload.len() as u8, kind, 7, 0, 0, 0, 1];
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn frames_are_found_however_they_are_cut() {
        let whole = [
            frame(DATA, &[3; 700]),
            frame(RST_STREAM, &[0, 0, 0, 8]),
            frame(DATA, &[]),
            frame(GOAWAY, &[0, 0, 0, 1, 0, 0, 0, 11, 1, 2, 3]),
            frame(PRIORITY, &[0; 5]),
        ]
        .concat();
        for size in [1, 2, 3, 8, 9, 10, 13, 100, 5000] {
            let expected = [(DATA, 700, 0), (RST_STREAM, 4, 0), (DATA, 0, 0), (GOAWAY, 11, 11), (PRIORITY, 5, 0)];
            assert_eq!(super::frames(&whole, size), expected, "in pieces of {size}");
        }
    }
}
