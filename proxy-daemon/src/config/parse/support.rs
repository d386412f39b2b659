//! Refuses what is set and not honoured.

use culvert_xds_client::json;
use prost::{Message, Name};
use prost_reflect::{DynamicMessage, FieldDescriptor, ReflectMessage, Value};

use super::{
    deprecated::Deprecated,
    honoured::{ALL, honoured},
    load_balancing::first_known,
};
use crate::{config::FieldError, http::filters};

/// Refuses the first field that is set and not honoured.
///
/// # Errors
/// The field's full path, below `path`.
pub fn check<M: Message + Name>(message: &M, path: &str) -> Result<(), FieldError> {
    let (dynamic, deprecated) = checked(message, path)?;
    // A message inside another one has been looked at with that.
    if path.is_empty() {
        let text = |field| dynamic.get_field_by_name(field).and_then(|value| value.as_str().map(str::to_owned));
        let name = text("name").or_else(|| text("cluster_name")).unwrap_or_default();
        let descriptor = dynamic.descriptor();
        deprecated.warn(format!("{} {name}", descriptor.name()).trim_end());
    }
    Ok(())
}

/// As [`check`], of a bootstrap: returns what is deprecated in it, which has been logged.
///
/// # Errors
/// The field's full path.
pub(super) fn check_bootstrap<M: Message + Name>(message: &M) -> Result<Vec<FieldError>, FieldError> {
    Ok(checked(message, "")?.1.warn(""))
}

fn checked<M: Message + Name>(message: &M, path: &str) -> Result<(DynamicMessage, Deprecated), FieldError> {
    let dynamic = json::to_dynamic(message);
    if dynamic.descriptor().full_name() != M::full_name() {
        return Err(FieldError::new(path, format!("{} has no descriptor", M::full_name())));
    }
    let mut deprecated = Deprecated::default();
    walk(&dynamic, &mut path.to_owned(), &mut deprecated, 0)?;
    Ok((dynamic, deprecated))
}

/// `path` is where the message stands, and is left as it was unless there is an error; `anys` is how many `Any`s it is in.
fn walk(
    message: &DynamicMessage,
    path: &mut String,
    deprecated: &mut Deprecated,
    anys: usize,
) -> Result<(), FieldError> {
    let descriptor = message.descriptor();
    let name = descriptor.full_name();
    if name == "google.protobuf.Any" {
        return walk_any(message, path, deprecated, anys);
    }
    if name.starts_with("google.protobuf.") {
        return Ok(());
    }
    let Some(fields) = honoured(name) else { return Err(FieldError::unsupported(path.as_str())) };
    let here = path.len();
    for (field, value) in message.fields() {
        if here > 0 {
            path.push('.');
        }
        path.push_str(field.name());
        if fields != ALL && !fields.contains(&field.name()) {
            return Err(FieldError::unsupported(path.as_str()));
        }
        deprecated.field(&field, value, path)?;
        if is_skipped(message, field.name()) {
            path.truncate(here);
            continue;
        }
        let at = path.len();
        match value {
            Value::EnumNumber(number) if undefined(&field, *number) => {
                let text = format!("the value {number} is not supported by culvert yet");
                return Err(FieldError::new(path.as_str(), text));
            }
            Value::Message(inner) => walk(inner, path, deprecated, anys)?,
            Value::List(items) => {
                let only = (name == "envoy.config.cluster.v3.LoadBalancingPolicy").then(|| counting_policy(items));
                for (index, item) in items.iter().enumerate() {
                    let Value::Message(inner) = item else { break };
                    if only.is_some_and(|only| only != Some(index)) {
                        continue;
                    }
                    path.push_str(&format!("[{index}]"));
                    walk(inner, path, deprecated, anys)?;
                    path.truncate(at);
                }
            }
            Value::Map(entries) => {
                for (key, item) in entries {
                    let Value::Message(inner) = item else { break };
                    let key = key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned);
                    path.push_str(&format!("[\"{key}\"]"));
                    walk(inner, path, deprecated, anys)?;
                    path.truncate(at);
                }
            }
            _ => {}
        }
        path.truncate(here);
    }
    Ok(())
}

/// Whether it is the configuration of an HTTP filter that is optional, and of which there is none here.
fn is_skipped(message: &DynamicMessage, field: &str) -> bool {
    let of_filter = match message.descriptor().name() {
        "HttpFilter" => field == "typed_config",
        "FilterConfig" => field == "config",
        _ => false,
    };
    if !of_filter || message.get_field_by_name("is_optional").and_then(|value| value.as_bool()) != Some(true) {
        return false;
    }
    let config = message.get_field_by_name(field);
    let url = config.as_ref().and_then(|value| value.as_message()?.get_field_by_name("type_url"));
    let url = url.as_ref().and_then(|url| url.as_str()).unwrap_or_default();
    let name = url.rsplit('/').next().unwrap_or_default();
    filters::is_nobodys(name)
}

/// Which of a list of load balancing policies counts: what is before it is not known, and what comes after it is never looked at.
fn counting_policy(policies: &[Value]) -> Option<usize> {
    let type_of = |policy: &Value| {
        let config = policy.as_message()?.get_field_by_name("typed_extension_config")?;
        let config = config.as_message()?.get_field_by_name("typed_config")?;
        let url = config.as_message()?.get_field_by_name("type_url")?;
        url.as_str()?.rsplit('/').next().map(str::to_owned)
    };
    let types: Vec<_> = policies.iter().map(|policy| type_of(policy).unwrap_or_default()).collect();
    first_known(types.iter().map(String::as_str))
}

/// Whether an enum does not have this value. Envoy passes such numbers over where no rule is against them.
fn undefined(field: &FieldDescriptor, number: i32) -> bool {
    field.kind().as_enum().is_some_and(|desc| desc.get_value(number).is_none())
}

fn walk_any(
    any: &DynamicMessage,
    path: &mut String,
    deprecated: &mut Deprecated,
    anys: usize,
) -> Result<(), FieldError> {
    if anys == json::MAX_ANYS {
        let text = format!("more than {} messages are in each other as Any", json::MAX_ANYS);
        return Err(FieldError::new(path.as_str(), text));
    }
    let text = |field: &str| any.get_field_by_name(field).and_then(|value| value.as_str().map(str::to_owned));
    let type_url = text("type_url").unwrap_or_default();
    // Nothing: whether there must be something is another question.
    if type_url.is_empty() {
        return Ok(());
    }
    let name = type_url.rsplit('/').next().unwrap_or_default();
    // An HTTP filter that is not in the table: its own parser knows its fields.
    if honoured(name).is_none() && filters::REGISTRY.iter().any(|filter| filter.type_name == name) {
        return Ok(());
    }
    let Some(descriptor) = json::pool().get_message_by_name(name).filter(|_| honoured(name).is_some()) else {
        // A TypedStruct whose type is known has been resolved by now: it is the type that is not.
        let name = any.transcode_to().map_or_else(|_| name.to_owned(), |any| json::type_name(&any));
        let text = match json::pool().get_message_by_name(&name) {
            Some(_) => format!("type {name} is not supported by culvert yet"),
            // In the words that a file is refused with.
            None => format!("unknown type {name:?}"),
        };
        return Err(FieldError::new(path.as_str(), text));
    };
    let value = any.get_field_by_name("value");
    let bytes = value.as_ref().and_then(|value| value.as_bytes()).cloned().unwrap_or_default();
    let inner =
        DynamicMessage::decode(descriptor, bytes).map_err(|error| FieldError::new(path.as_str(), error.to_string()))?;
    walk(&inner, path, deprecated, anys + 1)
}

/// `path.field`, or `field` at the top.
pub(super) fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

#[cfg(test)]
#[path = "support_tests.rs"]
mod tests;
