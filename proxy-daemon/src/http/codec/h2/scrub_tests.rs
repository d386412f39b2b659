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
    let (sent, read) = (frame(HEADERS, END_HEADERS, BAD).repeat(3), frame(HEADERS, END_HEADERS, MADE_GOOD).repeat(3));
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
