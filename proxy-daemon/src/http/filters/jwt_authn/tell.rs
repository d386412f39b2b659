//! What a good token changes: headers, metadata, and where it was found.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use envoy_types::pb::google::protobuf::{ListValue, Struct, Value as ProtoValue, value::Kind};
use http::HeaderValue;
use serde_json::{Map, Value};

use super::{
    Stats,
    config::Provider,
    extract::{self, Found},
    tell,
    token::Token,
};
use crate::http::{
    illegal, metadata,
    stream::{RequestHead, StreamCx},
};

impl Provider {
    /// Whether the token's signature is known to be good, by the keys that there are now.
    pub(super) fn knows(&self, token: &str, cx: &StreamCx, stats: &Stats) -> bool {
        let Some(cache) = &self.cache else { return false };
        let Some(keys) = cache.get(token) else { return false };
        let is_good = self.keys.has_still(keys, cx, stats);
        if !is_good {
            cache.forget(token);
        }
        is_good
    }

    /// Takes away the headers that its tokens become.
    pub(super) fn clear(&self, head: &mut RequestHead) {
        for name in self.payload_header.iter().chain(self.claims.iter().map(|(name, _)| name)) {
            head.headers.remove(name);
        }
    }

    /// What a good token changes.
    pub(super) fn tell(&self, token: &Token, found: &Found, head: &mut RequestHead, cx: &mut StreamCx) {
        if let Some(name) = &self.payload_header {
            let text = token.payload_text().trim_end_matches('=');
            let padding = if self.pad_payload { (4 - text.len() % 4) % 4 } else { 0 };
            let text = format!("{text}{}", "=".repeat(padding));
            if let Ok(value) = HeaderValue::from_str(&text) {
                // A request may have several tokens.
                let _ = head.headers.try_append(name, value);
            }
        }
        for (name, way) in &self.claims {
            let text = claim(&token.payload, way).filter(|text| !text.is_empty());
            if let Some(text) = text {
                let value = HeaderValue::from_bytes(text.as_bytes()).unwrap_or_else(|_| illegal::value());
                let _ = head.headers.try_append(name, value);
                cx.reroute |= self.clear_route_cache;
            }
        }
        cx.reroute |= self.clear_route_cache && self.payload_header.is_some();
        if !self.forward {
            extract::remove(&found.place, head);
        }
        if !self.header_in_metadata.is_empty() {
            tell(&self.header_in_metadata, metadata::from_json(&token.header), cx);
        }
        if !self.payload_in_metadata.is_empty() {
            tell(&self.payload_in_metadata, self.payload_as_told(token), cx);
        }
    }

    /// The payload as metadata: of claims that are lists in one text (`space_delimited_claims`) the lists.
    fn payload_as_told(&self, token: &Token) -> Struct {
        let mut payload = metadata::from_json(&token.payload);
        for name in &self.lists {
            let Some(ProtoValue { kind: Some(kind) }) = payload.fields.get_mut(name) else { continue };
            let Kind::StringValue(text) = &*kind else { continue };
            let item = |item: &str| ProtoValue { kind: Some(Kind::StringValue(item.to_owned())) };
            let values: Vec<_> = text.split(' ').filter(|item| !item.is_empty()).map(item).collect();
            if !values.is_empty() {
                *kind = Kind::ListValue(ListValue { values });
            }
        }
        payload
    }
}

/// A claim as a header has it: numbers and truth values as text, what has parts as JSON in base64.
fn claim(payload: &Map<String, Value>, way: &[Box<str>]) -> Option<String> {
    let (last, inner) = way.split_last()?;
    let mut fields = payload;
    for step in inner {
        fields = fields.get(&**step)?.as_object()?;
    }
    match fields.get(&**last)? {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(number) => Some(number.to_string()),
        parts @ (Value::Array(_) | Value::Object(_)) => Some(STANDARD.encode(parts.to_string())),
    }
}
