//! HPACK's Huffman code (RFC 7541, appendix B), for reading only.

use std::sync::LazyLock;

/// How many bits each byte's code has. The codes follow from that: shorter ones come first, and those of one length in the order of
/// their bytes.
#[rustfmt::skip]
const LENGTHS: [u8; 256] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28,
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10,
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6,
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28,
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27,
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26,
];
const LONGEST: usize = 30;

/// The codes, found by what a text begins with.
struct Codes {
    /// By eight bits: the byte and its length, for codes that are not longer.
    short: [(u8, u8); 256],
    /// By length: its first code, the code after its last one, both at the upper end of 32 bits, and where its bytes begin.
    long: [(u32, u32, usize); LONGEST + 1],
    bytes: Vec<u8>,
}

static CODES: LazyLock<Codes> = LazyLock::new(|| {
    let mut codes = Codes { short: [(0, 0); 256], long: [(0, 0, 0); LONGEST + 1], bytes: Vec::with_capacity(256) };
    let mut next = 0_u32;
    for length in 1..=LONGEST {
        let (first, start) = (next, codes.bytes.len());
        let step = 1_u32 << (32 - length);
        for byte in (0..=u8::MAX).filter(|byte| usize::from(LENGTHS[usize::from(*byte)]) == length) {
            if length <= 8 {
                let (from, to) = (next >> 24, (next + (step - 1)) >> 24);
                (from..=to).for_each(|prefix| codes.short[prefix as usize] = (byte, length as u8));
            }
            codes.bytes.push(byte);
            next += step;
        }
        codes.long[length] = (first, next, start);
    }
    codes
});

/// Puts what is coded into `text`, in the place of what was there; `None`: it is no such code.
pub(super) fn decode(coded: &[u8], text: &mut Vec<u8>) -> Option<()> {
    let codes = &*CODES;
    text.clear();
    let (mut bits, mut have, mut rest) = (0_u64, 0, coded.iter());
    loop {
        while have <= 32
            && let Some(byte) = rest.next()
        {
            bits |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let head = (bits >> 32) as u32;
        let (byte, length) = match codes.short[(head >> 24) as usize] {
            (_, 0) => {
                let Some(length) = (9..=LONGEST).find(|length| head < codes.long[*length].1) else {
                    // Only ones: the code's end, or what fills the last byte.
                    return ends(bits, have);
                };
                let (first, _, start) = codes.long[length];
                (codes.bytes[start + ((head - first) >> (32 - length)) as usize], length)
            }
            (byte, length) => (byte, usize::from(length)),
        };
        if length > have {
            return ends(bits, have);
        }
        text.push(byte);
        bits <<= length;
        have -= length;
    }
}

/// What is left is less than a byte of ones.
fn ends(bits: u64, have: usize) -> Option<()> {
    (have < 8 && bits.leading_ones() as usize >= have).then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(coded: &[u8]) -> Option<String> {
        let mut text = b"old".to_vec();
        decode(coded, &mut text).map(|()| String::from_utf8_lossy(&text).into_owned())
    }

    #[test]
    fn the_examples_of_the_rfc() {
        // RFC 7541, appendix C.4 and C.6.
        let host = [0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff];
        assert_eq!(text(&host).unwrap(), "www.example.com");
        assert_eq!(text(&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf]).unwrap(), "no-cache");
        assert_eq!(text(&[0x64, 0x02]).unwrap(), "302");
        assert_eq!(text(&[]).unwrap(), "");
    }

    #[test]
    fn long_codes_and_wrong_ones() {
        // A line feed is thirty bits, and then two that fill the byte.
        assert_eq!(text(&[0xff, 0xff, 0xff, 0xf3]).unwrap(), "\n");
        assert_eq!(text(&[0xff, 0xff, 0xff, 0xff]), None, "the code's end");
        assert_eq!(text(&[0x07, 0xff]), None, "more than a byte is filled");
        assert_eq!(text(&[0x00]), None, "filled with zeros");
        assert_eq!(text(&[0xff]), None, "nothing but what fills");
    }
}
