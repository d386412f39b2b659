//! What the proxy does to headers.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use culvert_xds_client::overrides::{
    BAGGAGE, BAGGAGE_ITEM, ContextError, OT_SPAN_CONTEXT, Overrides, SpanContext, decode_ot_span_context,
    encode_ot_span_context, format_baggage, strip as strip_overrides,
};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};

use crate::overrides::header::{SIGNED_FOR, now};

/// Headers that are about one connection.
const HOP_BY_HOP: [&str; 6] = ["connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer"];
/// What the mesh says of where a request went begins so.
const SAID: &str = "x-culvert-override";

/// After so many seconds what is signed is signed anew: a request that is under way for long, or a clock that is not quite right, has the
/// other half.
const SIGNED_ANEW: u64 = SIGNED_FOR / 2;

/// The headers that are added.
pub(super) struct Added {
    overrides: Overrides,
    texts: RefCell<Texts>,
    /// Whether each hop is asked what it did.
    debug: bool,
    signing: Option<Signing>,
}

/// What is added, as text.
struct Texts {
    item: String,
    baggage: HeaderValue,
}

impl Texts {
    fn of(overrides: &Overrides) -> Self {
        let item = overrides.to_baggage_item();
        let baggage = HeaderValue::from_str(&format_baggage([(BAGGAGE_ITEM, &*item)]));
        // Percent-encoded, and so a header's value.
        let baggage = baggage.unwrap_or_else(|_| HeaderValue::from_static(""));
        Self { item, baggage }
    }
}

/// By which key it is signed.
struct Signing {
    id: String,
    key: Vec<u8>,
    /// When it was signed the last time, in seconds since 1970.
    at: Cell<u64>,
}

impl Signing {
    fn texts(&self, overrides: &Overrides, now: u64) -> Result<Texts, ContextError> {
        let ending = Overrides { expires: now.saturating_add(SIGNED_FOR), ..overrides.clone() };
        let signed = ending.sign(&self.id, &self.key)?;
        self.at.set(now);
        Ok(Texts::of(&signed))
    }

    /// Also where the clock was set back: what ends too late is refused.
    fn is_due(&self, now: u64) -> bool {
        now < self.at.get() || now - self.at.get() >= SIGNED_ANEW
    }
}

/// Asks each hop what it did with overrides.
const DEBUG: &str = "x-culvert-override-debug";

impl Added {
    pub(super) fn of(overrides: Overrides) -> Self {
        let texts = RefCell::new(Texts::of(&overrides));
        Self { overrides, texts, debug: false, signing: None }
    }

    /// Signed with the key of this id.
    ///
    /// # Errors
    /// The id or the key is none.
    pub(super) fn signed_with(self, id: &str, key: Vec<u8>) -> Result<Self, ContextError> {
        let signing = Signing { id: id.to_owned(), key, at: Cell::new(0) };
        let texts = RefCell::new(signing.texts(&self.overrides, now())?);
        Ok(Self { texts, signing: Some(signing), ..self })
    }

    /// With the question what each hop did, if that is wanted.
    pub(super) fn asking(self, debug: bool) -> Self {
        Self { debug, ..self }
    }

    /// Adds the overrides in both forms: a service may pass on only one of them. Other baggage, and the trace, stay.
    pub(super) fn add(&self, headers: &mut HeaderMap) {
        self.add_at(headers, now());
    }

    fn add_at(&self, headers: &mut HeaderMap, now: u64) {
        // What could be signed once can be again.
        let due = self.signing.as_ref().filter(|signing| signing.is_due(now));
        if let Some(texts) = due.and_then(|signing| signing.texts(&self.overrides, now).ok()) {
            *self.texts.borrow_mut() = texts;
        }
        let texts = self.texts.borrow();
        // Two that do not say the same would be obeyed by nobody.
        strip_overrides(headers);
        let known = headers.get(OT_SPAN_CONTEXT).and_then(|value| decode_ot_span_context(value.as_bytes()).ok());
        let mut context = known.unwrap_or_else(|| SpanContext {
            trace_id: fastrand::u64(1..),
            span_id: fastrand::u64(1..),
            sampled: false,
            baggage: BTreeMap::new(),
        });
        context.baggage.insert(BAGGAGE_ITEM.to_owned(), texts.item.clone());
        if let Ok(value) = HeaderValue::from_str(&encode_ot_span_context(&context)) {
            headers.insert(OT_SPAN_CONTEXT, value);
        }
        let before: Vec<HeaderValue> = headers.get_all(BAGGAGE).iter().cloned().collect();
        headers.insert(BAGGAGE, texts.baggage.clone());
        for value in before {
            headers.append(BAGGAGE, value);
        }
        if self.debug {
            headers.insert(DEBUG, HeaderValue::from_static("1"));
        }
    }
}

/// Takes away what is about the client's connection. Gives whether another protocol is asked for, which is kept.
pub(super) fn prepare(headers: &mut HeaderMap) -> bool {
    let upgrade = headers.get(header::UPGRADE).cloned();
    strip(headers);
    match upgrade {
        Some(protocol) => {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol);
            true
        }
        None => false,
    }
}

/// Takes away what is about one connection.
pub(super) fn strip(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    headers.remove(header::UPGRADE);
}

/// What a response's headers say of the way that its request took.
pub(super) fn seen(headers: &HeaderMap) -> String {
    let mut text = String::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        match name.as_str() {
            name if name.starts_with(SAID) => text.push_str(&format!(", {name}: {value}")),
            "x-envoy-upstream-service-time" => text.push_str(&format!(", upstream {value} ms")),
            "server" => text.push_str(&format!(", by {value}")),
            _ => {}
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use culvert_xds_client::overrides::overrides_from_headers;

    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap())).collect()
    }

    #[test]
    fn the_overrides_count_whatever_the_request_has() {
        let overrides = Overrides::new([("users", "feature-x")]).unwrap();
        let other = Overrides::new([("users", "other")]).unwrap();
        let added = Added::of(overrides.clone());
        let mut asking = HeaderMap::new();
        Added::of(overrides.clone()).asking(true).add(&mut asking);
        assert_eq!(asking.get(DEBUG).map(HeaderValue::as_bytes), Some(b"1".as_slice()));
        let context = |baggage: &[(&str, &str)]| {
            let baggage = baggage.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect();
            encode_ot_span_context(&SpanContext { trace_id: 7, span_id: 8, sampled: true, baggage })
        };
        let cases = [
            headers(&[]),
            headers(&[("baggage", "user=1")]),
            headers(&[("baggage", &format_baggage([(BAGGAGE_ITEM, &*other.to_baggage_item())]))]),
            headers(&[("ot-baggage-overrides", &other.to_baggage_item())]),
            headers(&[("x-ot-span-context", &context(&[(BAGGAGE_ITEM, &other.to_baggage_item()), ("user", "1")]))]),
            headers(&[("x-ot-span-context", "nonsense")]),
        ];
        for mut headers in cases {
            let before = headers.clone();
            added.add(&mut headers);
            assert_eq!(overrides_from_headers(&headers), Some(Ok(overrides.clone())), "{before:?}");
            headers.remove(OT_SPAN_CONTEXT);
            assert_eq!(overrides_from_headers(&headers), Some(Ok(overrides.clone())), "{before:?}");
        }
        // What else there was stays.
        let mut with = headers(&[("baggage", "user=1"), ("x-ot-span-context", &context(&[("user", "1")]))]);
        added.add(&mut with);
        let context = decode_ot_span_context(with[OT_SPAN_CONTEXT].as_bytes()).unwrap();
        assert_eq!((context.trace_id, context.sampled, &*context.baggage["user"]), (7, true, "1"));
        assert_eq!(with.get_all(BAGGAGE).iter().next_back().unwrap(), "user=1");
    }

    #[test]
    fn what_is_signed_is_signed_anew_before_it_ends() {
        let overrides = Overrides::new([("users".to_owned(), "x".to_owned())]).unwrap();
        assert!(Added::of(overrides.clone()).signed_with("dev", b"short".to_vec()).is_err());
        let key = [7; 32];
        let added = Added::of(overrides).signed_with("dev", key.to_vec()).unwrap();
        let ends_at = |at: u64| {
            let mut headers = HeaderMap::new();
            added.add_at(&mut headers, at);
            let signed = overrides_from_headers(&headers).unwrap().unwrap().signed.unwrap();
            assert!(signed.is_of(&key) && signed.key_id == "dev");
            let message = signed.message().unwrap();
            assert_eq!(message.overrides[0].revision, "x");
            message.expires
        };
        let first = ends_at(now());
        let made = first - SIGNED_FOR;
        assert_eq!(ends_at(made + SIGNED_ANEW - 1), first, "not for each request");
        assert_eq!(ends_at(made + SIGNED_ANEW), made + SIGNED_ANEW + SIGNED_FOR);
        assert_eq!(ends_at(made), made + SIGNED_FOR, "the clock was set back");
    }

    #[test]
    fn what_is_about_a_connection_stays_here() {
        let mut with = headers(&[
            ("connection", "close, x-mine"),
            ("x-mine", "1"),
            ("proxy-connection", "keep-alive"),
            ("te", "trailers"),
            ("accept", "*/*"),
        ]);
        assert!(!prepare(&mut with));
        assert_eq!(with.keys().collect::<Vec<_>>(), ["accept"]);
        let mut with = headers(&[("connection", "Upgrade"), ("upgrade", "websocket")]);
        assert!(prepare(&mut with));
        assert_eq!(
            (&with["connection"], &with["upgrade"]),
            (&HeaderValue::from_static("upgrade"), &"websocket".parse().unwrap())
        );
    }

    #[test]
    fn responses_say_where_requests_went() {
        let said = seen(&headers(&[("server", "envoy"), ("x-culvert-override-via", "users=x"), ("x-other", "1")]));
        assert_eq!(said, ", by envoy, x-culvert-override-via: users=x");
    }
}
