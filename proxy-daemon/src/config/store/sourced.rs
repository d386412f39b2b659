//! Whether what a resource needs can be had from where it says, and whether a listener's addresses are free.

use culvert_xds_client::{Any, json, source::Source};
use envoy_types::pb::envoy::config::core::v3::ConfigSource as Message;
use prost::{Message as _, Name};
use prost_reflect::{DynamicMessage, ReflectMessage, Value};

use super::{
    kinds::{Kind, Need, listener_needs},
    scopes::AllScopes,
    state::State,
};
use crate::{
    config::{
        FieldError,
        model::{Listener, ScopeSource},
        parse,
    },
    http::filters::HttpFilterFactory,
};

/// Messages inside messages that are looked through; Envoy's nest far less.
const MAX_DEPTH: usize = 100;

impl State {
    /// Refuses a resource that needs others from a source that cannot be had, as Envoy does.
    pub(super) fn check_needs(&self, needs: &[Need], body: &Any) -> Result<(), FieldError> {
        needs.iter().try_for_each(|need| self.check_source(&need.wanted.from.source, need.kind.type_url(), body))
    }

    /// The same for a listener. What routes its scopes are going to name is not known yet, but where they come from.
    pub(super) fn check_listener_needs(&self, listener: &Listener, body: &Any) -> Result<(), FieldError> {
        self.check_needs(&listener_needs(listener, &AllScopes::new()), body)?;
        let scoped = listener.connection_managers().filter_map(|manager| manager.scoped());
        scoped.into_iter().try_for_each(|scoped| match &scoped.scopes {
            ScopeSource::Srds { routes, .. } => self.check_source(&routes.source, Kind::Routes.type_url(), body),
            ScopeSource::Inline(_) => Ok(()),
        })?;
        let mut filters = listener.connection_managers().flat_map(|manager| &manager.http_filters);
        filters.try_for_each(|filter| {
            let check = |factory: &dyn HttpFilterFactory| self.check_filter(factory, body);
            filter.source.with(check).unwrap_or(Ok(()))
        })
    }

    /// Refuses an HTTP filter that asks for something on demand from a source that cannot be had.
    pub(super) fn check_filter(&self, filter: &dyn HttpFilterFactory, body: &Any) -> Result<(), FieldError> {
        let Some((from, type_url)) = filter.source() else { return Ok(()) };
        self.check_source(&from.source, type_url, body)
    }

    fn check_source(&self, source: &Source, type_url: &str, body: &Any) -> Result<(), FieldError> {
        let checked = self.sources.check(source, type_url);
        checked.map_err(|text| FieldError::new(path_of(body, source).unwrap_or_default(), text))
    }

    /// Refuses a listener one of whose addresses another one has, in Envoy's words. Port 0 is another port each time.
    pub(super) fn check_addresses(&self, listener: &Listener) -> Result<(), FieldError> {
        match self.listeners.addresses.others(listener).next() {
            Some((name, address)) => Err(FieldError::new(
                "address",
                format!(
                    "error adding listener: '{}' has duplicate address '{address}' as existing listener '{name}'",
                    listener.name
                ),
            )),
            None => Ok(()),
        }
    }
}

/// Where a message names a source. Looked for only to say so.
fn path_of(body: &Any, source: &Source) -> Option<String> {
    let mut path = String::new();
    find(&decode(&body.type_url, &body.value)?, source, &mut path, MAX_DEPTH).then_some(path)
}

fn decode(type_url: &str, value: &[u8]) -> Option<DynamicMessage> {
    let descriptor = json::pool().get_message_by_name(type_url.rsplit('/').next()?)?;
    DynamicMessage::decode(descriptor, value).ok()
}

/// Appends the rest of the path; as it was where it is not in here.
fn find(message: &DynamicMessage, source: &Source, path: &mut String, depth: usize) -> bool {
    let descriptor = message.descriptor();
    let name = descriptor.full_name();
    let Some(depth) = depth.checked_sub(1) else { return false };
    if name == Message::full_name() {
        let parsed = Message::decode(message.encode_to_vec().as_slice()).ok();
        let parsed = parsed.and_then(|message| parse::config_source(Some(&message), "").ok());
        return parsed.is_some_and(|parsed| *parsed.source == *source);
    }
    if name == "google.protobuf.Any" {
        let field = |name: &str| message.get_field_by_name(name).map(std::borrow::Cow::into_owned);
        let (Some(Value::String(type_url)), Some(Value::Bytes(value))) = (field("type_url"), field("value")) else {
            return false;
        };
        return decode(&type_url, &value).is_some_and(|inner| find(&inner, source, path, depth));
    }
    let here = path.len();
    for (field, value) in message.fields() {
        path.truncate(here);
        if here > 0 {
            path.push('.');
        }
        path.push_str(field.name());
        let at = path.len();
        let found = match value {
            Value::Message(inner) => find(inner, source, path, depth),
            Value::List(items) => items.iter().enumerate().any(|(index, item)| {
                path.truncate(at);
                path.push_str(&format!("[{index}]"));
                item.as_message().is_some_and(|inner| find(inner, source, path, depth))
            }),
            Value::Map(entries) => entries.iter().any(|(key, item)| {
                path.truncate(at);
                path.push_str(&format!("[\"{}\"]", key.as_str().unwrap_or_default()));
                item.as_message().is_some_and(|inner| find(inner, source, path, depth))
            }),
            _ => false,
        };
        if found {
            return true;
        }
    }
    path.truncate(here);
    false
}
