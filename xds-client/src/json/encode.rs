//! Message to JSON, in the form of Envoy's `/config_dump`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost_reflect::{DynamicMessage, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value};
use serde_json::{Map, Number, Value as Json};

use super::any::MAX_ANYS;
use super::decode::has_special_form;
use super::redact;
use super::scalar::format_duration;

/// How a message is shown.
#[derive(Debug, Clone, Copy)]
struct How {
    /// How many `Any`s it is in.
    anys: usize,
    /// Whether secrets are shown as they are.
    secrets: bool,
}

/// A message as JSON. Of `Any`s that are too deep in each other the inner ones stay encoded.
pub(super) fn message(message: &DynamicMessage) -> Json {
    message_in(message, How { anys: 0, secrets: false })
}

/// The same, with its secrets.
pub(super) fn message_with_secrets(message: &DynamicMessage) -> Json {
    message_in(message, How { anys: 0, secrets: true })
}

fn message_in(message: &DynamicMessage, how: How) -> Json {
    let desc = message.descriptor();
    match desc.full_name().strip_prefix("google.protobuf.") {
        Some("Any") => return any(message, how),
        Some("Struct") => return first_field(message, how, Json::Object(Map::new())),
        Some("ListValue") => return first_field(message, how, Json::Array(Vec::new())),
        Some("Value") => return first_field(message, how, Json::Null),
        Some("Duration") => return Json::String(format_duration(integer(message, "seconds"), nanos(message))),
        Some("Timestamp") => {
            let time = prost_types::Timestamp { seconds: integer(message, "seconds"), nanos: nanos(message) };
            return Json::String(time.to_string());
        }
        Some("FieldMask") => {
            let paths = message.get_field_by_name("paths");
            let paths = paths.iter().flat_map(|paths| paths.as_list().unwrap_or_default()).filter_map(Value::as_str);
            return Json::String(paths.collect::<Vec<_>>().join(","));
        }
        Some(_) if has_special_form(desc.full_name()) => {
            // A wrapper: its default is printed too, the message's presence being the information.
            let Some(field) = desc.get_field_by_name("value") else { return Json::Null };
            return single(&message.get_field(&field), &field.kind(), how);
        }
        _ => {}
    }
    let shown = message.fields().filter_map(|(field, value)| {
        let json = if !how.secrets && redact::is_sensitive(&field) {
            field_value(&redact::value(value, how.anys)?, &field, how)
        } else {
            field_value(value, &field, how)
        };
        Some((field.name().to_owned(), json))
    });
    Json::Object(shown.collect())
}

/// An `Any` of type `type_url` with the message `value` decoded from its bytes; `None` where the type is unknown.
fn any(message: &DynamicMessage, how: How) -> Json {
    let type_url = message.get_field_by_name("type_url");
    let bytes = message.get_field_by_name("value");
    let type_url = type_url.as_deref().and_then(Value::as_str).unwrap_or_default();
    let bytes = bytes.as_deref().and_then(Value::as_bytes).cloned().unwrap_or_default();
    if type_url.is_empty() {
        return Json::Object(Map::new());
    }
    let name = type_url.rsplit('/').next().filter(|_| how.anys < MAX_ANYS);
    let inner = name
        .and_then(|name| message.descriptor().parent_pool().get_message_by_name(name))
        .and_then(|desc| DynamicMessage::decode(desc, bytes.clone()).ok());
    let inner_of = How { anys: how.anys + 1, ..how };
    let mut object = match inner {
        Some(inner) if !has_special_form(inner.descriptor().full_name()) => match message_in(&inner, inner_of) {
            Json::Object(object) => object,
            other => Map::from_iter([("value".to_owned(), other)]),
        },
        Some(inner) => Map::from_iter([("value".to_owned(), message_in(&inner, inner_of))]),
        None => Map::from_iter([("value".to_owned(), Json::String(STANDARD.encode(bytes)))]),
    };
    object.insert("@type".to_owned(), Json::String(type_url.to_owned()));
    Json::Object(object)
}

fn field_value(value: &Value, field: &FieldDescriptor, how: How) -> Json {
    match (value, field.kind()) {
        (Value::List(items), kind) => Json::Array(items.iter().map(|item| single(item, &kind, how)).collect()),
        (Value::Map(map), Kind::Message(entry)) => {
            let kind = entry.map_entry_value_field().kind();
            Json::Object(map.iter().map(|(key, value)| (map_key(key), single(value, &kind, how))).collect())
        }
        (value, kind) => single(value, &kind, how),
    }
}

fn single(value: &Value, kind: &Kind, how: How) -> Json {
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::I32(value) => Json::Number((*value).into()),
        Value::U32(value) => Json::Number((*value).into()),
        Value::I64(value) => Json::String(value.to_string()),
        Value::U64(value) => Json::String(value.to_string()),
        // By way of its shortest decimal form: 0.1 as f32 is not 0.10000000149 to anyone who wrote it.
        Value::F32(value) if value.is_finite() => float(value.to_string().parse().unwrap_or(f64::from(*value))),
        Value::F32(value) => float(f64::from(*value)),
        Value::F64(value) => float(*value),
        Value::String(value) => Json::String(value.clone()),
        Value::Bytes(value) => Json::String(STANDARD.encode(value)),
        Value::EnumNumber(number) => match kind.as_enum() {
            Some(desc) if desc.full_name() == "google.protobuf.NullValue" => Json::Null,
            desc => match desc.and_then(|desc| desc.get_value(*number)) {
                Some(value) => Json::String(value.name().to_owned()),
                None => Json::Number((*number).into()),
            },
        },
        Value::Message(value) => message_in(value, how),
        // Lists and maps occur only as fields.
        Value::List(_) | Value::Map(_) => Json::Null,
    }
}

/// A float as JSON: a whole number without `.0`, and as a string where JSON has no number for it.
fn float(value: f64) -> Json {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        return Json::Number((value as i64).into());
    }
    match Number::from_f64(value) {
        Some(number) => Json::Number(number),
        None if value.is_nan() => Json::String("NaN".to_owned()),
        None if value > 0.0 => Json::String("Infinity".to_owned()),
        None => Json::String("-Infinity".to_owned()),
    }
}

fn map_key(key: &MapKey) -> String {
    match key {
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
        MapKey::String(key) => key.clone(),
    }
}

/// The one field that is set of a message whose JSON form is that field.
fn first_field(message: &DynamicMessage, how: How, otherwise: Json) -> Json {
    message.fields().next().map_or(otherwise, |(field, value)| field_value(value, &field, how))
}

fn integer(message: &DynamicMessage, field: &str) -> i64 {
    message.get_field_by_name(field).and_then(|value| value.as_i64()).unwrap_or(0)
}

fn nanos(message: &DynamicMessage) -> i32 {
    message.get_field_by_name("nanos").and_then(|value| value.as_i32()).unwrap_or(0)
}
