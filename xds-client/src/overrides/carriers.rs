//! The headers that carry overrides: finding them, and taking them out.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    BAGGAGE, BAGGAGE_ITEM, BAGGAGE_OVERRIDES, CARRIERS, ContextError, JAEGER_BAGGAGE, OT_BAGGAGE_OVERRIDES,
    OT_SPAN_CONTEXT, Overrides, UBERCTX_OVERRIDES, decode_ot_span_context, encode_ot_span_context, w3c_baggage,
};

/// The names of [`CARRIERS`].
const NAMES: [&str; 6] = [
    "x-ot-span-context",
    "ot-baggage-overrides",
    "baggage",
    "uberctx-overrides",
    "jaeger-baggage",
    "baggage-overrides",
];

/// The baggage item `overrides` of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The header that has it.
    pub carrier: HeaderName,
    /// What it says.
    pub value: String,
}

/// The overrides that a request's headers name. `None`, at the cost of a look-up for each of [`CARRIERS`], when no header carries any.
///
/// The first header that has the item wins. An unreadable header of a higher precedence is an error, not a
/// reason to look further: what a request means must not depend on which of its headers was damaged.
#[must_use]
pub fn overrides_from_headers(headers: &HeaderMap) -> Option<Result<Overrides, ContextError>> {
    find(headers, super::MAX_HEADER_BYTES)
        .map(|found| found.and_then(|found| Overrides::from_baggage_item(&found.value)))
}

/// The baggage item `overrides`, as it was sent. No header of more than `limit` bytes is looked at.
#[must_use]
pub fn find(headers: &HeaderMap, limit: usize) -> Option<Result<Found, ContextError>> {
    CARRIERS.iter().find_map(|carrier| {
        // Most requests have none of them.
        headers.get(carrier)?;
        let value = item(headers, carrier, limit)?;
        Some(value.map(|value| Found { carrier: carrier.clone(), value }))
    })
}

/// What one of [`CARRIERS`] says.
fn item(headers: &HeaderMap, carrier: &HeaderName, limit: usize) -> Option<Result<String, ContextError>> {
    let what = CARRIERS.iter().position(|name| name == carrier).map_or("", |at| NAMES[at]);
    if *carrier == BAGGAGE || *carrier == JAEGER_BAGGAGE {
        let values = headers.get_all(carrier).iter().map(HeaderValue::as_bytes);
        let item = w3c_baggage::find_item((what, limit), values, BAGGAGE_ITEM)?;
        return Some(item.map(Cow::into_owned));
    }
    let value = match only(headers, carrier, what, limit) {
        Ok(value) => value,
        Err(error) => return Some(Err(error)),
    };
    if *carrier == OT_SPAN_CONTEXT {
        return match decode_ot_span_context(value) {
            Ok(mut context) => context.baggage.remove(BAGGAGE_ITEM).map(Ok),
            Err(error) => Some(Err(error)),
        };
    }
    if *carrier == UBERCTX_OVERRIDES {
        let value = w3c_baggage::decode_percent(value).ok_or(ContextError::Percent);
        return Some(value.map(Cow::into_owned));
    }
    // Anything that is not text is not base64 either, so the lossy form keeps the error.
    Some(Ok(String::from_utf8_lossy(value).into_owned()))
}

/// The one value that a header has.
fn only<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
    what: &'static str,
    limit: usize,
) -> Result<&'a [u8], ContextError> {
    let mut values = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let value = values.next().unwrap_or_default();
    if values.any(|other| other != value) {
        Err(ContextError::Contradicts { what })
    } else if value.len() > limit {
        Err(ContextError::TooLong { what, bytes: value.len(), limit })
    } else {
        Ok(value)
    }
}

/// Whether one of the headers is there that may carry overrides.
#[must_use]
pub fn carries_overrides(headers: &HeaderMap) -> bool {
    CARRIERS.iter().any(|name| headers.contains_key(name))
}

/// Takes overrides out of all headers that may carry them, whatever they say. Other baggage stays, except where a header cannot be
/// read: that goes. Whether there was anything.
pub fn strip(headers: &mut HeaderMap) -> bool {
    let mut found = false;
    for name in [OT_BAGGAGE_OVERRIDES, UBERCTX_OVERRIDES, BAGGAGE_OVERRIDES] {
        found |= headers.remove(name).is_some();
    }
    for name in [BAGGAGE, JAEGER_BAGGAGE] {
        found |= rewrite(headers, &name, |value| w3c_baggage::without(value, BAGGAGE_ITEM));
        // Lines that can be read alone may together be more than is read.
        if item(headers, &name, usize::MAX).is_some() {
            found |= headers.remove(&name).is_some();
        }
    }
    found
        | rewrite(headers, &OT_SPAN_CONTEXT, |value| {
            let Ok(mut context) = decode_ot_span_context(value) else { return Some(None) };
            context.baggage.remove(BAGGAGE_ITEM)?;
            Some(Some(encode_ot_span_context(&context)))
        })
}

/// Changes the values of a header; `change` says `None` where one stays, and `Some(None)` where it goes.
fn rewrite(headers: &mut HeaderMap, name: &HeaderName, change: impl Fn(&[u8]) -> Option<Option<String>>) -> bool {
    if !headers.contains_key(name) {
        return false;
    }
    let changes: Vec<_> = headers.get_all(name).iter().map(|value| change(value.as_bytes())).collect();
    if changes.iter().all(Option::is_none) {
        return false;
    }
    let before: Vec<HeaderValue> = headers.get_all(name).iter().cloned().collect();
    headers.remove(name);
    for (value, change) in before.into_iter().zip(changes) {
        let value = match change {
            None => Some(value),
            Some(new) => new.and_then(|new| HeaderValue::try_from(new).ok()),
        };
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            headers.append(name, value);
        }
    }
    true
}
