//! Trace contexts: whether a request has one, and whether its trace is recorded.

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{OT_SPAN_CONTEXT, decode_ot_span_context, encode_ot_span_context};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const B3: HeaderName = HeaderName::from_static("b3");
const B3_TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
const B3_SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
const B3_FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");
const UBER_TRACE_ID: HeaderName = HeaderName::from_static("uber-trace-id");
const OT_TRACE_ID: HeaderName = HeaderName::from_static("ot-tracer-traceid");
const OT_SAMPLED: HeaderName = HeaderName::from_static("ot-tracer-sampled");
const DATADOG_TRACE_ID: HeaderName = HeaderName::from_static("x-datadog-trace-id");
const DATADOG_PRIORITY: HeaderName = HeaderName::from_static("x-datadog-sampling-priority");

/// Whether a request has a trace context, in one of the formats that are known.
#[must_use]
pub fn has_trace_context(headers: &HeaderMap) -> bool {
    [TRACEPARENT, B3, B3_TRACE_ID, OT_SPAN_CONTEXT, UBER_TRACE_ID, OT_TRACE_ID, DATADOG_TRACE_ID]
        .iter()
        .any(|name| headers.contains_key(name))
}

/// Says in all trace contexts that a request has whether its trace is recorded. Where it has none that can be read, and its trace is to
/// be recorded, it gets a `traceparent` with the ids of a new trace. Whether anything says so now.
pub fn set_sampled(headers: &mut HeaderMap, sampled: bool) -> bool {
    let digit = if sampled { "1" } else { "0" };
    let mut told = false;
    let mut change = |name: &HeaderName, make: &dyn Fn(&str) -> Option<String>| {
        let made = headers.get(name).and_then(|value| make(value.to_str().ok()?));
        if let Some(value) = made.and_then(|made| HeaderValue::try_from(made).ok()) {
            headers.insert(name, value);
            told = true;
        }
    };
    change(&TRACEPARENT, &|text| traceparent(text, sampled));
    change(&B3, &|text| b3(text, digit));
    change(&UBER_TRACE_ID, &|text| uber(text, sampled));
    change(&OT_SPAN_CONTEXT, &|text| {
        let mut context = decode_ot_span_context(text.as_bytes()).ok()?;
        context.sampled = sampled;
        Some(encode_ot_span_context(&context))
    });
    let beside = [
        (B3_TRACE_ID, B3_SAMPLED, digit),
        (OT_TRACE_ID, OT_SAMPLED, if sampled { "true" } else { "false" }),
        (DATADOG_TRACE_ID, DATADOG_PRIORITY, if sampled { "2" } else { "-1" }),
    ];
    for (id, flag, value) in beside {
        if headers.contains_key(&id) {
            headers.insert(flag, HeaderValue::from_static(value));
            told = true;
        }
    }
    if headers.contains_key(&B3_TRACE_ID) {
        // The debug flag would say that it is.
        headers.remove(&B3_FLAGS);
    }
    if !told && sampled {
        // An id of zeros is none.
        let text = format!("00-{:032x}-{:016x}-01", fastrand::u128(1..), fastrand::u64(1..));
        // Hexadecimal digits and dashes are always valid.
        headers.insert(TRACEPARENT, HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("")));
        told = true;
    }
    told
}

/// `00-TRACE-SPAN-FLAGS`, and what later versions add.
fn traceparent(text: &str, sampled: bool) -> Option<String> {
    let is_hex = |text: &str| text.bytes().all(|b| b.is_ascii_hexdigit());
    let (ids, flags) = text.split_at_checked(53)?;
    let (flags, rest) = flags.split_at_checked(2)?;
    let mut parts = ids.split('-');
    let lengths_fit =
        [2, 32, 16, 0].iter().all(|length| parts.next().is_some_and(|part| part.len() == *length && is_hex(part)));
    if !lengths_fit || !(rest.is_empty() || rest.starts_with('-')) {
        return None;
    }
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let flags = if sampled { flags | 1 } else { flags & !1 };
    Some(format!("{ids}{flags:02x}{rest}"))
}

/// `TRACE-SPAN`, `TRACE-SPAN-STATE`, `TRACE-SPAN-STATE-PARENT`, or `STATE`.
fn b3(text: &str, digit: &str) -> Option<String> {
    let parts: Vec<&str> = text.split('-').collect();
    match parts[..] {
        [_] => Some(digit.to_owned()),
        [trace, span] | [trace, span, _] => Some(format!("{trace}-{span}-{digit}")),
        [trace, span, _, parent] => Some(format!("{trace}-{span}-{digit}-{parent}")),
        _ => None,
    }
}

/// `TRACE:SPAN:PARENT:FLAGS`, percent-encoded or not.
fn uber(text: &str, sampled: bool) -> Option<String> {
    let (ids, flags) = text.rsplit_once(':').or_else(|| {
        let at = text.rfind("%3A").or_else(|| text.rfind("%3a"))?;
        Some((&text[..at], &text[at + 3..]))
    })?;
    let between = &text[ids.len()..text.len() - flags.len()];
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let flags = if sampled { flags | 1 } else { flags & !3 };
    Some(format!("{ids}{between}{flags:x}"))
}
