//! The W3C `baggage` header: `key=value;property,key2=value2`, values percent-encoded UTF-8.

use std::borrow::Cow;
use std::fmt::Write as _;

use super::ContextError;

/// The most members of a request's `baggage` headers together: what the specification obliges everyone to carry.
pub const MAX_BAGGAGE_MEMBERS: usize = 64;
/// The most bytes of a request's `baggage` headers together, likewise.
pub const MAX_BAGGAGE_BYTES: usize = 8192;

/// The members of a `baggage` header, in order, and how many of them made no sense.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Baggage {
    /// Key and decoded value. Properties are left out.
    pub members: Vec<(String, String)>,
    /// Members that were passed over: no `=`, a bad key, or a value that is not percent-encoded UTF-8.
    pub malformed: usize,
}

/// Parses one `baggage` header. A malformed member is counted and passed over: it may be somebody else's.
///
/// # Errors
/// When the header has more than [`MAX_BAGGAGE_BYTES`] bytes or [`MAX_BAGGAGE_MEMBERS`] members.
pub fn parse_baggage(value: &[u8]) -> Result<Baggage, ContextError> {
    let mut baggage = Baggage::default();
    for member in members(LIMITS, std::iter::once(value)) {
        match member? {
            Some((key, value)) => match decode_percent(value) {
                Some(value) => baggage.members.push((key.to_owned(), value.into_owned())),
                None => baggage.malformed += 1,
            },
            None => baggage.malformed += 1,
        }
    }
    Ok(baggage)
}

/// The value of a `baggage` header with these members. Keys must be HTTP tokens; everything in a value that is not an
/// unreserved URI character is percent-encoded, because not every reader keeps `+`, `/` and `=`.
#[must_use]
pub fn format_baggage<'a>(members: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut header = String::new();
    for (key, value) in members {
        if !header.is_empty() {
            header.push(',');
        }
        header.push_str(key);
        header.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
                header.push(char::from(byte));
            } else {
                // Writing to a String cannot fail.
                let _ = write!(header, "%{byte:02X}");
            }
        }
    }
    header
}

/// What a header is called, and how many bytes of it are looked at.
type Limits = (&'static str, usize);

const LIMITS: Limits = ("baggage", MAX_BAGGAGE_BYTES);

/// The decoded value of the member named `item` in a request's headers of one name. Where it is there twice, it has to say the same.
pub(super) fn find_item<'a>(
    (what, limit): Limits,
    headers: impl Iterator<Item = &'a [u8]>,
    item: &str,
) -> Option<Result<Cow<'a, str>, ContextError>> {
    let mut found = None;
    for member in members((what, limit.min(MAX_BAGGAGE_BYTES)), headers) {
        match member {
            Err(error) => return Some(Err(error)),
            Ok(Some((key, value))) if key == item => {
                let Some(value) = decode_percent(value) else { return Some(Err(ContextError::Percent)) };
                if found.as_ref().is_some_and(|found| *found != value) {
                    return Some(Err(ContextError::Contradicts { what }));
                }
                found = Some(value);
            }
            Ok(_) => {}
        }
    }
    found.map(Ok)
}

/// A header's value without the members named `item`, and those that somebody might read as that; `None`: there are none.
/// `Some(None)`: nothing is left, or it has more than is looked at.
pub(super) fn without(value: &[u8], item: &str) -> Option<Option<String>> {
    if value.len() > MAX_BAGGAGE_BYTES {
        return Some(None);
    }
    let is_item = |member: &[u8]| {
        let key = member.split(|b| matches!(b, b'=' | b';')).next().unwrap_or_default().trim_ascii();
        decode_percent(key).is_none_or(|key| key.trim().eq_ignore_ascii_case(item))
    };
    let members = || value.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty());
    if members().count() > MAX_BAGGAGE_MEMBERS {
        return Some(None);
    }
    if !members().any(is_item) {
        return None;
    }
    let left: Vec<_> = members().filter(|member| !is_item(member)).map(String::from_utf8_lossy).collect();
    Some(Some(left.join(",")).filter(|left| !left.is_empty()))
}

/// The members of all headers: key and still encoded value, `None` for a malformed one. Ends after the first error.
fn members<'a>(
    (what, limit): Limits,
    headers: impl Iterator<Item = &'a [u8]>,
) -> impl Iterator<Item = Result<Option<(&'a str, &'a [u8])>, ContextError>> {
    let mut bytes = 0;
    let mut count = 0;
    let mut failed = false;
    headers
        .flat_map(move |header| {
            bytes += header.len();
            let too_long = (bytes > limit).then_some(ContextError::TooLong { what, bytes, limit });
            let readable: &[u8] = if too_long.is_some() { &[] } else { header };
            let members = readable.split(|b| *b == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty());
            too_long.into_iter().map(Err).chain(members.map(Ok))
        })
        .map(move |member| {
            count += 1;
            let member = member?;
            if count > MAX_BAGGAGE_MEMBERS { Err(ContextError::TooManyMembers) } else { Ok(split_member(member)) }
        })
        .take_while(move |member| !std::mem::replace(&mut failed, member.is_err()))
}

fn split_member(member: &[u8]) -> Option<(&str, &[u8])> {
    let pair = member.split(|b| *b == b';').next()?;
    let equals = pair.iter().position(|b| *b == b'=')?;
    let (key, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
    let key = std::str::from_utf8(key).ok().filter(|key| !key.is_empty() && key.bytes().all(is_token))?;
    Some((key, value))
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Undoes percent-encoding; `None` for a broken sequence or for bytes that are not UTF-8.
pub(super) fn decode_percent(value: &[u8]) -> Option<Cow<'_, str>> {
    if !value.contains(&b'%') {
        return std::str::from_utf8(value).ok().map(Cow::Borrowed);
    }
    let mut decoded = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((&byte, tail)) = rest.split_first() {
        rest = tail;
        if byte == b'%' {
            let (digits, tail) = rest.split_at_checked(2)?;
            decoded.push(hex(digits[0])? << 4 | hex(digits[1])?);
            rest = tail;
        } else {
            decoded.push(byte);
        }
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

fn hex(digit: u8) -> Option<u8> {
    // A hexadecimal digit is below 16.
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}
