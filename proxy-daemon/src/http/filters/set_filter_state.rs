//! `envoy.filters.http.set_filter_state`: puts texts into the filter state, where access logs, headers, matchers, routes and hashes
//! find them.
//!
//! **Limits.** Objects are texts: those of `envoy.string` and `envoy.hashable_string`. Objects that something of Envoy's obeys are
//! refused, and so is sharing with upstream connections.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::{
        common::set_filter_state::v3::{
            FilterStateValue,
            filter_state_value::{Key, SharedWithUpstream, Value},
        },
        http::set_filter_state::v3::Config,
    },
    google::protobuf::Any,
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::{Headers, Record, Substitution},
    config::{FieldError, parse},
    http::{
        body::Body,
        stream::{RequestHead, StreamCx},
    },
};

/// What is set, and what of.
#[derive(Debug)]
struct Entry {
    key: Box<str>,
    /// It is an object that can be hashed.
    hashable: bool,
    format: Substitution,
    skip_if_empty: bool,
}

/// What one level has set.
type Entries = Box<[Entry]>;

#[derive(Debug)]
struct SetFilterStateFactory {
    entries: Entries,
    clear_route_cache: bool,
}

impl Entry {
    fn set(&self, head: &mut RequestHead, cx: &StreamCx) {
        let mut text = Vec::new();
        cx.format_request(head, |headers, record| {
            let request_headers = Some(Headers::All(headers));
            text = self.format.write(&Record { missing: "-", request_headers, ..*record });
        });
        if !text.is_empty() || !self.skip_if_empty {
            cx.progress.with_metadata(|told| told.set_state(&self.key, text.into(), self.hashable));
        }
    }
}

impl HttpFilterFactory for SetFilterStateFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let of_levels = route.all::<Entries>().flatten();
        self.entries.iter().chain(of_levels).for_each(|entry| entry.set(head, cx));
        cx.reroute |= self.clear_route_cache;
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Config { on_request_headers, clear_route_cache } = unpack(typed_config, cx.path)?;
    Ok(Arc::new(SetFilterStateFactory { entries: entries(&on_request_headers, cx.path)?, clear_route_cache }))
}

/// `clear_route_cache` has no effect there, as in Envoy.
pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let Config { on_request_headers, .. } = unpack(config, path)?;
    Ok(Arc::new(entries(&on_request_headers, path)?))
}

fn entries(values: &[FilterStateValue], path: &str) -> Result<Entries, FieldError> {
    let parse = |(index, value)| entry(value, &format!("{path}.on_request_headers[{index}]"));
    values.iter().enumerate().map(parse).collect()
}

fn entry(value: &FilterStateValue, path: &str) -> Result<Entry, FieldError> {
    let at = |field: &str| format!("{path}.{field}");
    let key = match &value.key {
        Some(Key::ObjectKey(key)) if !key.is_empty() => key,
        _ => return Err(FieldError::new(at("object_key"), "value is required")),
    };
    let (field, factory) = match value.factory_key.as_str() {
        "" => ("object_key", key.as_str()),
        factory => ("factory_key", factory),
    };
    let hashable = match factory {
        "envoy.string" => false,
        "envoy.hashable_string" => true,
        _ => {
            let known = "envoy.string and envoy.hashable_string";
            return Err(FieldError::unsupported_value(at(field), factory, known));
        }
    };
    if value.shared_with_upstream != SharedWithUpstream::None as i32 {
        return Err(FieldError::unsupported(at("shared_with_upstream")));
    }
    let Some(Value::FormatString(format)) = &value.value else {
        return Err(FieldError::new(at("format_string"), "value is required"));
    };
    let format = parse::substitution(format, &at("format_string"))?;
    let format = format.ok_or_else(|| FieldError::new(at("format_string.format"), "value is required"))?;
    Ok(Entry { key: key.as_str().into(), hashable, format, skip_if_empty: value.skip_if_empty })
}
