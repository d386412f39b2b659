//! `x-request-id`: a random UUID (RFC 9562, version 4).

use http::{HeaderMap, HeaderValue, header::Entry};

use super::headers::names::X_REQUEST_ID;
use crate::config::model::HttpConnectionManagerConfig;

const HEX: &[u8; 16] = b"0123456789abcdef";

/// Where a UUID has its version, and Envoy why it is traced.
const REASON: usize = 14;

/// Gives the request an id, where it has none or none that is to be kept.
pub(super) fn set(headers: &mut HeaderMap, edge: bool, config: &HttpConnectionManagerConfig) {
    let mut known = match headers.entry(X_REQUEST_ID) {
        Entry::Vacant(place) => {
            place.insert(generate());
            return;
        }
        Entry::Occupied(known) => known,
    };
    let id = known.get_mut();
    if !edge {
        return;
    }
    if !config.preserve_external_request_id {
        *id = generate();
    } else if config.pack_trace_reason && id.len() == 36 && id.as_bytes()[REASON] != b'4' {
        // It is not traced, whatever it says.
        let mut bytes = [b'-'; 36];
        bytes.copy_from_slice(id.as_bytes());
        bytes[REASON] = b'4';
        // A digit in a valid value leaves it valid.
        *id = HeaderValue::from_bytes(&bytes).unwrap_or_else(|_| generate());
    }
}

/// A fresh id.
fn generate() -> HeaderValue {
    // Only hexadecimal digits and dashes: always a valid value.
    HeaderValue::from_bytes(&random_uuid()).unwrap_or_else(|_| HeaderValue::from_static("-"))
}

/// The text of a random UUID.
pub(crate) fn random_uuid() -> [u8; 36] {
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
    text
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
