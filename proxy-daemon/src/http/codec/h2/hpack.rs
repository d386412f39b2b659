//! Header blocks, as far as one has to understand them to see which fields the crate `h2` cannot decode (RFC 7541).
//!
//! The crate makes typed names and values of a block's fields while it keeps the table that all streams share, and gives up the
//! connection where that fails. RFC 9113, section 8.1.1, asks for the stream alone. So a field that is none is replaced by another one that takes
//! as much room in the table, and the block gets a field at its end that the crate refuses a stream for.

use std::collections::VecDeque;

use http::{Method, StatusCode};

use super::huffman;

/// `te: x`: whatever else a block holds, with this it is malformed (RFC 9113, section 8.2.2).
const REFUSED: &[u8] = b"\0\x02te\x01x";

/// The names of the static table from 15 on (RFC 7541, appendix A); before that come pseudo-headers.
#[rustfmt::skip]
const STATIC: [&str; 47] = [
    "accept-charset", "accept-encoding", "accept-language", "accept-ranges", "accept", "access-control-allow-origin", "age", "allow",
    "authorization", "cache-control", "content-disposition", "content-encoding", "content-language", "content-length",
    "content-location", "content-range", "content-type", "cookie", "date", "etag", "expect", "expires", "from", "host", "if-match",
    "if-modified-since", "if-none-match", "if-range", "if-unmodified-since", "last-modified", "link", "location", "max-forwards",
    "proxy-authenticate", "proxy-authorization", "range", "referer", "refresh", "retry-after", "server", "set-cookie",
    "strict-transport-security", "transfer-encoding", "user-agent", "vary", "via", "www-authenticate",
];
const FIRST_DYNAMIC: usize = 62;
/// The size of the table where nothing is settled (RFC 9113, section 6.5.2).
pub(super) const LARGEST: usize = 4096;

/// What a name allows for its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Method,
    Status,
    Path,
    /// Another pseudo-header.
    Text,
    Field,
    /// It is no name, or had to be replaced.
    Bad,
}

/// An entry of the table: what there is to know of it.
#[derive(Debug, Clone, Copy)]
struct Entry {
    kind: Kind,
    name: usize,
    size: usize,
    /// It was replaced: no block that refers to it counts.
    bad: bool,
    /// It is the status of an interim response.
    interim: bool,
}

/// A block that is no HPACK: the connection cannot be gone on with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Hopeless;

/// A connection's table, and what its blocks are checked with.
pub(super) struct Table {
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
    name: Vec<u8>,
    value: Vec<u8>,
    interim: bool,
}

impl Default for Table {
    fn default() -> Table {
        // Another size is told within a block.
        Table { entries: VecDeque::new(), size: 0, max: LARGEST, name: Vec::new(), value: Vec::new(), interim: false }
    }
}

impl Table {
    /// Goes through a block, perhaps of `trailers`. `None`: all of it can be decoded; else what is to be decoded in its place.
    ///
    /// # Errors
    /// It is not what RFC 7541 describes.
    pub(super) fn check(&mut self, block: &[u8], trailers: bool) -> Result<Option<Vec<u8>>, Hopeless> {
        let mut rest = block;
        let mut replaced: Option<Vec<u8>> = None;
        self.interim = false;
        let mut begun = false;
        while let Some(first) = rest.first() {
            // The crate drops pseudo-headers there without a word.
            let refuses = |kind| trailers && !matches!(kind, Kind::Field | Kind::Bad);
            let (field, passed) = (rest, &block[..block.len() - rest.len()]);
            let has_fields = std::mem::replace(&mut begun, !matches!(first, 0x20..0x40));
            match first {
                0x80.. => {
                    let entry = self.look_up(integer(&mut rest, 7)?)?;
                    self.interim |= entry.interim;
                    if (entry.bad || refuses(entry.kind)) && replaced.is_none() {
                        replaced = Some(passed.to_vec());
                    }
                }
                // The size of the table is told before all fields (section 4.2).
                0x20..0x40 if has_fields => return Err(Hopeless),
                0x20..0x40 => {
                    self.max = integer(&mut rest, 5)?;
                    self.evict();
                }
                _ => {
                    let (kind, other) = self.literal(&mut rest, if *first < 0x20 { None } else { Some(6) })?;
                    if let Some(other) = other {
                        replaced.get_or_insert_with(|| passed.to_vec()).extend(other);
                        continue;
                    }
                    if refuses(kind) && replaced.is_none() {
                        replaced = Some(passed.to_vec());
                    }
                }
            }
            if let Some(replaced) = &mut replaced {
                replaced.extend_from_slice(&field[..field.len() - rest.len()]);
            }
        }
        Ok(replaced.map(|mut replaced| {
            replaced.extend_from_slice(REFUSED);
            replaced
        }))
    }

    /// Whether the block that was checked last is the head of an interim response.
    pub(super) fn is_interim(&self) -> bool {
        self.interim
    }

    /// A literal at the beginning of `rest`, which goes into the table if `indexed` says how long its prefix is: what it is. `None`: it can
    /// be decoded; else what can in its place.
    fn literal(&mut self, rest: &mut &[u8], indexed: Option<u32>) -> Result<(Kind, Option<Vec<u8>>), Hopeless> {
        let field = *rest;
        let index = integer(rest, indexed.unwrap_or(4))?;
        let (kind, name) = if index == 0 {
            let name = string(rest, &mut self.name)?;
            (kind_of(name), name.len())
        } else {
            let entry = self.look_up(index)?;
            (entry.kind, entry.name)
        };
        let with_name = &field[..field.len() - rest.len()];
        let value = string(rest, &mut self.value)?;
        let (good, length) = (allows(kind, value), value.len());
        let interim = good && kind == Kind::Status && value.starts_with(b"1");
        self.interim |= interim;
        // The name stays where it allows another value: others may refer to it.
        let keeps = good || matches!(kind, Kind::Field | Kind::Text | Kind::Path) || kind == Kind::Method && length > 0;
        if indexed.is_some() {
            let kind = if keeps { kind } else { Kind::Bad };
            self.insert(Entry { kind, name, size: 32 + name + length, bad: !good, interim });
        }
        if good {
            return Ok((kind, None));
        }
        if keeps {
            let mut other = with_name.to_vec();
            put_string(&mut other, length);
            return Ok((kind, Some(other)));
        }
        // There is no name of no length.
        let (name, length) = if name == 0 { (1, length.checked_sub(1)) } else { (name, Some(length)) };
        let mut other = vec![if indexed.is_some() { 0x40 } else { 0 }];
        put_string(&mut other, name);
        put_string(&mut other, length.ok_or(Hopeless)?);
        Ok((kind, Some(other)))
    }

    /// What an index stands for.
    fn look_up(&self, index: usize) -> Result<Entry, Hopeless> {
        let (kind, name) = match index {
            0 => return Err(Hopeless),
            1 => (Kind::Text, ":authority"),
            2 | 3 => (Kind::Method, ":method"),
            4 | 5 => (Kind::Path, ":path"),
            6 | 7 => (Kind::Text, ":scheme"),
            8..15 => (Kind::Status, ":status"),
            15..FIRST_DYNAMIC => (Kind::Field, STATIC[index - 15]),
            _ => return self.entries.get(index - FIRST_DYNAMIC).copied().ok_or(Hopeless),
        };
        // Whatever its value: the static table never changes.
        Ok(Entry { kind, name: name.len(), size: 0, bad: false, interim: false })
    }

    fn insert(&mut self, entry: Entry) {
        self.entries.push_front(entry);
        self.size += entry.size;
        // What is larger than the table empties it (section 4.4).
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.max
            && let Some(entry) = self.entries.pop_back()
        {
            self.size -= entry.size;
        }
    }
}

fn kind_of(name: &[u8]) -> Kind {
    match name {
        b":method" => Kind::Method,
        b":status" => Kind::Status,
        b":path" => Kind::Path,
        b":authority" | b":scheme" | b":protocol" => Kind::Text,
        // RFC 9110's token, in lower case.
        [_, ..] if name.len() < 1 << 16 && name.iter().all(|byte| is_in_name(*byte)) => Kind::Field,
        _ => Kind::Bad,
    }
}

fn is_in_name(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'!' | b'#'..=b'\'' | b'*' | b'+' | b'^' | b'`' | b'|' | b'~')
}

fn allows(kind: Kind, value: &[u8]) -> bool {
    match kind {
        Kind::Method => Method::from_bytes(value).is_ok(),
        // There is no 101 in HTTP/2 (RFC 9113, section 8.6); the crate would take it for an interim response.
        Kind::Status => value != b"101" && StatusCode::from_bytes(value).is_ok(),
        // The crate would cut off what follows a `#`, and say nothing.
        Kind::Path => !value.contains(&b'#') && std::str::from_utf8(value).is_ok(),
        Kind::Text => std::str::from_utf8(value).is_ok(),
        Kind::Field => value.iter().all(|byte| matches!(byte, b'\t' | b' '..=b'~' | 0x80..)),
        Kind::Bad => false,
    }
}

/// A number whose first byte has `prefix` bits of it (RFC 7541, section 5.1).
pub(super) fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, Hopeless> {
    let mask = (1_usize << prefix) - 1;
    let (first, mut following) = rest.split_first().ok_or(Hopeless)?;
    let mut value = usize::from(*first) & mask;
    if value == mask {
        for shift in (0..28).step_by(7).chain([usize::MAX]) {
            let (byte, more) = following.split_first().filter(|_| shift < 28).ok_or(Hopeless)?;
            following = more;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
    }
    *rest = following;
    Ok(value)
}

/// A text (RFC 7541, section 5.2), for which `decoded` may be needed.
fn string<'a, 'b: 'a>(rest: &mut &'b [u8], decoded: &'a mut Vec<u8>) -> Result<&'a [u8], Hopeless> {
    let coded = rest.first().is_some_and(|first| first & 0x80 != 0);
    let length = integer(rest, 7)?;
    let (text, following) = rest.split_at_checked(length).ok_or(Hopeless)?;
    *rest = following;
    if !coded {
        return Ok(text);
    }
    huffman::decode(text, decoded).ok_or(Hopeless)?;
    Ok(decoded)
}

/// A text of this length that is a name and a value.
fn put_string(block: &mut Vec<u8>, length: usize) {
    match length.checked_sub(0x7f) {
        None => block.push(length as u8),
        Some(mut rest) => {
            block.push(0x7f);
            while rest >= 0x80 {
                block.push((rest & 0x7f) as u8 | 0x80);
                rest >>= 7;
            }
            block.push(rest as u8);
        }
    }
    block.resize(block.len() + length, b'x');
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A literal with a name of its own.
    fn literal(first: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
        [&[first, name.len() as u8], name, &[value.len() as u8], value].concat()
    }

    fn with_refusal(block: &[&[u8]]) -> Option<Vec<u8>> {
        Some([block.concat(), REFUSED.to_vec()].concat())
    }

    #[test]
    fn what_can_be_decoded_passes() {
        let mut table = Table::default();
        let good = [
            &[0x82, 0x86, 0x84][..],
            // The authority in Huffman's code (RFC 7541, appendix C.4.1).
            &[0x41, 0x8c, 0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff],
            &literal(0x40, b"x-a", b"\t\x80b c"),
            &literal(0x10, b":method", b"BREW"),
            &[0xbe, 0xbf],
        ]
        .concat();
        assert_eq!(table.check(&good, false), Ok(None));
        assert_eq!(table.check(&[0xbe, 0x0f, 0x2f, 1, b'c'], false), Ok(None), "a value for the newest name");
        assert_eq!(table.check(&[0xc0], false), Err(Hopeless), "there are two entries");
        assert_eq!(table.check(&[0x20, 0x3f, 0xe1, 0x1f], false), Ok(None));
        assert_eq!(table.check(&[0x82, 0x20], false), Err(Hopeless), "the table's size is told first");
        assert_eq!(table.check(&[0xbe], false), Err(Hopeless), "the table has been emptied");
    }

    #[test]
    fn what_cannot_is_replaced() {
        // A name and a value, and what they become.
        let bad: [[&[u8]; 4]; 11] = [
            [b"X-A", b"b", b"xxx", b"x"],
            [b"x a", b"b", b"xxx", b"x"],
            [b":evil", b"b", b"xxxxx", b"x"],
            [b"x-a", b"a\nb", b"x-a", b"xxx"],
            [b"x-a", b"\x7f", b"x-a", b"x"],
            [b":method", b"G T", b":method", b"xxx"],
            [b":method", b"", b"xxxxxxx", b""],
            [b":status", b"20", b"xxxxxxx", b"xx"],
            [b":status", b"101", b"xxxxxxx", b"xxx"],
            [b":path", b"/\xff", b":path", b"xx"],
            [b":path", b"/#", b":path", b"xx"],
        ];
        for [name, value, other_name, other_value] in bad {
            let mut table = Table::default();
            for first in [0x40, 0x00] {
                let block = [&[0x82][..], &literal(first, name, value), &[0x84]].concat();
                let expected = with_refusal(&[&[0x82], &literal(first, other_name, other_value), &[0x84]]);
                assert_eq!(table.check(&block, false), Ok(expected), "{name:?}: {value:?}");
            }
            // What was put into the table is still there, and whoever refers to it is refused.
            assert_eq!(table.check(&[0x82, 0xbe, 0x84], false), Ok(with_refusal(&[&[0x82, 0xbe, 0x84]])));
            // Its name is good where it is one.
            let by_name = if name == other_name { None } else { with_refusal(&[&literal(0x40, other_name, b"xxx")]) };
            assert_eq!(table.check(&[0x7e, 3, b'G', b'E', b'T'], false), Ok(by_name), "a new value for {name:?}");
            assert_eq!(table.check(&literal(0x40, b"x-b", b"c"), false), Ok(None));
            assert_eq!(table.check(&[0xbe], false), Ok(None));
            assert_eq!(table.size, 2 * (32 + name.len()) + value.len() + 3 + 32 + 4);
        }
    }

    #[test]
    fn trailers_have_no_pseudo_headers() {
        let mut table = Table::default();
        assert_eq!(table.check(&literal(0x40, b":path", b"/a"), false), Ok(None));
        for block in [&[0xbe][..], &[0x82], &literal(0, b":path", b"/b"), &[0x44, 1, b'/']] {
            let block = [&literal(0, b"x-a", b"b"), block, &[0x8f]].concat();
            assert_eq!(table.check(&block, true), Ok(with_refusal(&[&block])));
            assert_eq!(table.check(&block, false), Ok(None));
        }
        assert_eq!(table.check(&literal(0, b"x-a", b"b"), true), Ok(None));
    }

    #[test]
    fn interim_responses_are_known() {
        let mut table = Table::default();
        for (block, interim) in [
            (&literal(0x40, b":status", b"103")[..], true),
            (&[0xbe], true),
            (&[0x88], false),
            (&[0x48, 3, b'1', b'0', b'0'], true),
            (&[0x48, 3, b'4', b'1', b'8'], false),
            (&[0xc0], true),
            (&[0xbe], false),
        ] {
            assert_eq!(table.check(block, false), Ok(None));
            assert_eq!(table.is_interim(), interim, "{block:?}");
        }
    }

    #[test]
    fn no_name_at_all() {
        let mut table = Table::default();
        let expected = with_refusal(&[&literal(0x40, b"x", b"x")]);
        assert_eq!(table.check(&literal(0x40, b"", b"ab"), false), Ok(expected));
        assert_eq!(table.check(&literal(0x40, b"", b""), false), Err(Hopeless));
    }

    #[test]
    fn entries_leave_as_the_table_fills() {
        let mut table = Table::default();
        let bad = literal(0x40, b"A", b"");
        assert!(table.check(&bad, false).unwrap().is_some());
        for _ in 0..(4096 - 33) / 36 {
            assert_eq!(table.check(&literal(0x40, b"a", b"bcd"), false), Ok(None));
        }
        let index = [0xff, (FIRST_DYNAMIC + table.entries.len() - 1 - 0x7f) as u8];
        assert!(table.check(&index, false).unwrap().is_some(), "the oldest is the bad one");
        assert_eq!(table.check(&literal(0x40, b"a", b"bcd"), false), Ok(None));
        assert_eq!(table.check(&index, false), Ok(None), "it has gone");
    }

    #[test]
    fn what_is_no_hpack_is_hopeless() {
        for block in
            [&[0x80][..], &[0xff], &[0x40], &[0x40, 5, b'a'], &[0xff, 0xff, 0xff, 0xff, 0xff, 0], &[0x40, 0x81, 0, 0]]
        {
            assert_eq!(Table::default().check(block, false), Err(Hopeless), "{block:?}");
        }
    }
}
