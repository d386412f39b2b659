//! JSON as Envoy writes it.

use std::io::Write as _;

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

/// Appends a text, in quotes.
pub(crate) fn string(out: &mut Vec<u8>, text: &[u8]) {
    out.push(b'"');
    let start = out.len();
    out.extend_from_slice(text);
    escape(out, start);
    out.push(b'"');
}

/// Escapes what stands in `out` from `start` on.
pub(crate) fn escape(out: &mut Vec<u8>, start: usize) {
    let special = |byte: &u8| !(0x20..0x7f).contains(byte) || matches!(byte, b'"' | b'\\');
    let Some(first) = out[start..].iter().position(special) else { return };
    let text = out.split_off(start + first);
    // The start is plain text: what follows is UTF-8 where all of it is.
    let is_utf8 = std::str::from_utf8(&text).is_ok();
    for byte in text {
        // Writing to a Vec cannot fail.
        let _ = match byte {
            // What is no UTF-8 is written in one form, as in Envoy.
            _ if !is_utf8 && special(&byte) => write!(out, "\\u{byte:04x}"),
            b'"' => out.write_all(b"\\\""),
            b'\\' => out.write_all(b"\\\\"),
            b'\n' => out.write_all(b"\\n"),
            b'\r' => out.write_all(b"\\r"),
            b'\t' => out.write_all(b"\\t"),
            0x08 => out.write_all(b"\\b"),
            0x0c => out.write_all(b"\\f"),
            0..0x20 => write!(out, "\\u{byte:04x}"),
            _ => out.write_all(&[byte]),
        };
    }
}

/// A number as C++'s `to_chars` writes it: in the shorter one of the two forms, without an exponent where both are as long.
pub(crate) fn number(out: &mut Vec<u8>, number: f64) {
    if !number.is_finite() {
        return out.extend_from_slice(b"null");
    }
    let start = out.len();
    // Writing to a Vec cannot fail. `{:e}` has the fewest digits that make the number, as has `{}`.
    let _ = write!(out, "{number}");
    let text = format!("{number:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let sign = if exponent < 0 { '-' } else { '+' };
    let text = format!("{digits}e{sign}{:02}", exponent.abs());
    if text.len() < out.len() - start {
        out.truncate(start);
        out.extend_from_slice(text.as_bytes());
    }
}

/// Writes the whole number that stands in `out` from `start` on as [`number`] does.
pub(super) fn shorten_number(out: &mut Vec<u8>, start: usize) {
    // With fewer zeros at its end it is not shorter with an exponent.
    if !out[start..].ends_with(b"00000") {
        return;
    }
    let whole = std::str::from_utf8(&out[start..]).ok().and_then(|text| text.parse::<f64>().ok());
    if let Some(whole) = whole {
        out.truncate(start);
        number(out, whole);
    }
}

/// Appends a value.
pub(crate) fn value(out: &mut Vec<u8>, kind: &Kind) {
    match kind {
        Kind::NullValue(_) => out.extend_from_slice(b"null"),
        Kind::NumberValue(value) => number(out, *value),
        Kind::StringValue(text) => string(out, text.as_bytes()),
        Kind::BoolValue(value) => out.extend_from_slice(if *value { b"true" } else { b"false" }),
        Kind::StructValue(fields) => object(out, fields),
        Kind::ListValue(list) => {
            out.push(b'[');
            for (index, item) in list.values.iter().enumerate() {
                if index > 0 {
                    out.push(b',');
                }
                value_or_null(out, item);
            }
            out.push(b']');
        }
    }
}

/// Appends an object: its keys sorted, as they are kept.
pub(crate) fn object(out: &mut Vec<u8>, fields: &Struct) {
    out.push(b'{');
    let mut keys: Vec<_> = fields.fields.iter().collect();
    keys.sort_by_key(|(key, _)| *key);
    for (index, (key, item)) in keys.into_iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        string(out, key.as_bytes());
        out.push(b':');
        value_or_null(out, item);
    }
    out.push(b'}');
}

fn value_or_null(out: &mut Vec<u8>, item: &Value) {
    value(out, item.kind.as_ref().unwrap_or(&Kind::NullValue(0)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn escaped(text: &[u8]) -> String {
        let mut out = Vec::new();
        string(&mut out, text);
        String::from_utf8(out).unwrap()
    }

    /// As the real Envoy wrote them.
    #[test]
    fn texts_are_escaped() {
        assert_eq!(escaped(b"plain / <>&"), "\"plain / <>&\"");
        assert_eq!(escaped("q\"uo\\te\ttab é".as_bytes()), "\"q\\\"uo\\\\te\\ttab é\"");
        assert_eq!(escaped(b"a\"\\\t\xe9"), "\"a\\u0022\\u005c\\u0009\\u00e9\"");
        assert_eq!(escaped(b"\x01\x7f\n"), "\"\\u0001\x7f\\n\"");
        assert_eq!(escaped(b""), "\"\"");
    }

    #[test]
    fn numbers_are_as_short_as_they_can_be() {
        for (value, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (-3.0, "-3"),
            (10_000.0, "10000"),
            (100_000.0, "1e+05"),
            (-100_000.0, "-1e+05"),
            (1_000_000.0, "1e+06"),
            (1_200_000.0, "1200000"),
            (12_000_000.0, "1.2e+07"),
            (6_072_998.0, "6072998"),
            (1.5, "1.5"),
            (0.0001, "1e-04"),
            (0.001, "0.001"),
            (1e300, "1e+300"),
        ] {
            let mut out = Vec::new();
            number(&mut out, value);
            assert_eq!(String::from_utf8(out).unwrap(), text);
        }
        for (written, text) in [("100000", "1e+05"), ("1200000", "1200000"), ("0", "0"), ("123456", "123456")] {
            let mut out = format!("x{written}").into_bytes();
            shorten_number(&mut out, 1);
            assert_eq!(String::from_utf8(out).unwrap(), format!("x{text}"));
        }
    }
}
