//! Paths and queries of whatever characters, as a URI takes them.

use std::fmt::Write as _;

use http::{
    Uri,
    uri::{InvalidUri, PathAndQuery},
};

use super::stream::RequestHead;

/// A path and its query. What it has to begin with is put before it, and what cannot stand in it is percent-encoded: clients send
/// quotes and angle brackets (RFC 3986 allows neither), and rewrites may make anything.
///
/// # Errors
/// It is longer than 65,534 bytes.
pub(super) fn path_and_query(text: &str) -> Result<PathAndQuery, InvalidUri> {
    match PathAndQuery::try_from(text) {
        // What follows a number sign would be dropped, and the type takes anything for a beginning.
        Ok(path) if path.as_str().len() == text.len() && (text.starts_with('/') || text == "*") => Ok(path),
        _ => PathAndQuery::try_from(encoded(text)),
    }
}

fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len() + 16);
    if !text.starts_with('/') {
        encoded.push('/');
    }
    let mut in_query = false;
    for next in text.chars() {
        let stands = match next {
            '<' | '>' | '#' => false,
            '`' => in_query,
            '"' => !in_query,
            _ => !next.is_ascii() || next.is_ascii_graphic(),
        };
        in_query |= next == '?';
        if stands {
            encoded.push(next);
        } else {
            percent_encode(next, &mut encoded);
        }
    }
    encoded
}

/// `next` must be ASCII.
pub(super) fn percent_encode(next: char, to: &mut String) {
    // Writing to a string cannot fail.
    let _ = write!(to, "%{:02X}", u32::from(next));
}

/// Replaces the path and the query.
///
/// # Errors
/// They are too long; what was there stays.
pub(super) fn set_path(head: &mut RequestHead, text: &str) -> Result<(), InvalidUri> {
    let path = path_and_query(text)?;
    let mut parts = std::mem::take(&mut head.uri).into_parts();
    parts.path_and_query = Some(path);
    if parts.scheme.is_none() {
        parts.authority = None;
    }
    // A path with the scheme and authority of a valid URI is a valid URI.
    head.uri = Uri::from_parts(parts).unwrap_or_default();
    Ok(())
}

/// Without the escapes of URLs.
pub(crate) fn decode(text: &str) -> Vec<u8> {
    let mut rest = text.as_bytes();
    let mut decoded = Vec::with_capacity(rest.len());
    while let Some((&first, after)) = rest.split_first() {
        let digit = |at: usize| after.get(at).and_then(|byte| char::from(*byte).to_digit(16));
        match (first, digit(0), digit(1)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                rest = &after[2..];
            }
            _ => {
                decoded.push(first);
                rest = after;
            }
        }
    }
    decoded
}

/// Whether RFC 3986 lets nobody give it another meaning.
pub(crate) fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte)
}

/// A name or value of a query, with escapes in the place of all that is not to stand there as it is.
pub(crate) fn encode(text: &[u8], as_is: impl Fn(u8) -> bool) -> String {
    let mut encoded = String::with_capacity(text.len());
    for &byte in text {
        if byte.is_ascii() && as_is(byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_decoded_is_encoded_where_it_must_be() {
        for (text, decoded, encoded) in [
            ("a%20b", &b"a b"[..], "a%20b"),
            ("%41%7e-", b"A~-", "A~-"),
            ("%26%3d%25", b"&=%", "%26%3D%25"),
            ("%", b"%", "%25"),
            ("%4", b"%4", "%254"),
            ("%zz+", b"%zz+", "%25zz%2B"),
            ("%ff", b"\xff", "%FF"),
        ] {
            assert_eq!(decode(text), decoded, "{text}");
            assert_eq!(encode(decoded, is_unreserved), encoded, "{text}");
        }
    }

    #[test]
    fn what_cannot_stand_in_a_path_is_encoded() {
        let cases = [
            ("/a?q=1", "/a?q=1"),
            ("v2/x", "/v2/x"),
            ("", "/"),
            ("?a=b", "/?a=b"),
            ("*", "*"),
            ("*a", "/*a"),
            ("/<x>\"`{|}^", "/%3Cx%3E\"%60{|}^"),
            ("/a?q={\"a\":1}`<?>", "/a?q={%22a%22:1}`%3C?%3E"),
            ("/a b#c\u{7f}", "/a%20b%23c%7F"),
            ("/\u{e9}", "/\u{e9}"),
        ];
        for (text, path) in cases {
            // As it is sent: `to_string()` would add a slash.
            assert_eq!(path_and_query(text).as_ref().map(|path| path.as_str()).ok(), Some(path), "{text}");
        }
        assert!(path_and_query(&format!("/{}", "x".repeat(70_000))).is_err());
    }
}
