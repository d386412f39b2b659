//! `x-request-id`: a random UUID (RFC 9562, version 4).

use http::HeaderValue;

const HEX: &[u8; 16] = b"0123456789abcdef";

/// A fresh id.
pub(super) fn generate() -> HeaderValue {
    let mut bits = fastrand::u128(..);
    bits = bits & !(0xf << 76) | 0x4 << 76; // version 4
    bits = bits & !(0x3 << 62) | 0x2 << 62; // variant of RFC 9562
    let bytes = bits.to_be_bytes();
    let mut text = [b'-'; 36];
    let mut at = 0;
    for (index, byte) in bytes.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            at += 1;
        }
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
        at += 2;
    }
    // Only hexadecimal digits and dashes: always a valid value.
    HeaderValue::from_bytes(&text).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn looks_like_a_uuid() {
        let id = super::generate();
        let text = id.to_str().unwrap();
        let lengths: Vec<_> = text.split('-').map(str::len).collect();
        assert_eq!(lengths, [8, 4, 4, 4, 12], "{text}");
        assert_eq!(&text[14..15], "4", "{text}");
        assert!("89ab".contains(&text[19..20]), "{text}");
        assert_ne!(id, super::generate());
    }
}
