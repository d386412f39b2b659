//! The JSON forms of protobuf's scalars and of the well-known types that are written as one scalar.

use base64::Engine as _;
use base64::alphabet::STANDARD;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::tree::Content;

/// The longest duration protobuf's JSON form has: 10,000 years.
const MAX_DURATION_SECONDS: i64 = 315_576_000_000;

/// An integer: a JSON number or a string that holds one, in any notation as long as the value is whole.
pub(super) fn integer(content: &Content) -> Option<i128> {
    let float = match content {
        Content::Number(number) => match number.as_i128() {
            Some(value) => return Some(value),
            None => number.as_f64()?,
        },
        Content::String(text) if text.contains(|c: char| c.is_ascii_whitespace()) => return None,
        Content::String(text) => match text.parse::<i128>().ok().or_else(|| hexadecimal(text)) {
            Some(value) => return Some(value),
            None => number(text)?,
        },
        _ => return None,
    };
    // Above 2^63 neighbouring floats are thousands apart: such a value is not a whole number anyone wrote.
    (float.fract() == 0.0 && float.abs() < 9.3e18).then_some(float as i128)
}

/// A floating point number: a JSON number or a string that holds one, or `NaN`, `Infinity`, `-Infinity`.
pub(super) fn float(content: &Content) -> Option<f64> {
    match content {
        Content::Number(value) => value.as_f64(),
        Content::String(text) => match text.as_str() {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            text => number(text),
        },
        _ => None,
    }
}

/// JSON's number notation, which is narrower than Rust's (no `inf`, `.5` or `+1`).
fn number(text: &str) -> Option<f64> {
    serde_json::from_str::<serde_json::Number>(text).ok()?.as_f64().filter(|value| value.is_finite())
}

/// `0x50`, which protobuf takes in strings as a floating point number.
fn hexadecimal(text: &str) -> Option<i128> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let digits = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"))?;
    let value = i128::from(u64::from_str_radix(digits, 16).ok()?);
    Some(if negative { -value } else { value })
}

/// A boolean, or one given as a string: the spellings of Abseil's `SimpleAtob`, which Envoy's parser uses.
pub(super) fn boolean(content: &Content) -> Option<bool> {
    match content {
        Content::Bool(value) => Some(*value),
        Content::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "t" | "yes" | "y" | "1" => Some(true),
            "false" | "f" | "no" | "n" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// Base64 in either alphabet (or both at once), with or without padding.
pub(super) fn bytes(text: &str) -> Option<Vec<u8>> {
    let config = GeneralPurposeConfig::new()
        .with_decode_padding_mode(DecodePaddingMode::Indifferent)
        .with_decode_allow_trailing_bits(true);
    GeneralPurpose::new(&STANDARD, config).decode(text.replace('-', "+").replace('_', "/")).ok()
}

/// `1.5s` as (seconds, nanoseconds), both with the sign of the duration.
pub(super) fn duration(text: &str) -> Result<(i64, i32), String> {
    let malformed = || format!("{text:?} is not a duration, such as \"1.5s\"");
    let amount = text.strip_suffix('s').ok_or_else(malformed)?;
    let (negative, amount) = match amount.strip_prefix('-') {
        Some(amount) => (true, amount),
        None => (false, amount),
    };
    let (whole, fraction) = amount.split_once('.').unwrap_or((amount, ""));
    let digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty() || !digits(whole) || !digits(fraction) || (amount.contains('.') && fraction.is_empty()) {
        return Err(malformed());
    }
    if fraction.len() > 9 {
        return Err(format!("{text:?} has more than nine fractional digits"));
    }
    let seconds = whole.parse::<i64>().ok().filter(|seconds| *seconds <= MAX_DURATION_SECONDS);
    let seconds = seconds.ok_or_else(|| format!("{text:?} is longer than {MAX_DURATION_SECONDS} seconds"))?;
    let nanos = format!("{fraction:0<9}").parse::<i32>().map_err(|_| malformed())?;
    Ok(if negative { (-seconds, -nanos) } else { (seconds, nanos) })
}

/// Seconds and nanoseconds as protobuf prints a duration: with no, three, six or nine fractional digits.
pub(super) fn format_duration(seconds: i64, nanos: i32) -> String {
    let sign = if seconds < 0 || nanos < 0 { "-" } else { "" };
    let (seconds, nanos) = (seconds.unsigned_abs(), nanos.unsigned_abs());
    match nanos {
        0 => format!("{sign}{seconds}s"),
        nanos if nanos % 1_000_000 == 0 => format!("{sign}{seconds}.{:03}s", nanos / 1_000_000),
        nanos if nanos % 1_000 == 0 => format!("{sign}{seconds}.{:06}s", nanos / 1_000),
        nanos => format!("{sign}{seconds}.{nanos:09}s"),
    }
}
