//! What the protos mark as sensitive (`udpa.annotations.sensitive`) is not shown: private keys, passwords, session tickets.

use std::collections::HashSet;
use std::sync::LazyLock;

use prost_reflect::{DynamicMessage, FieldDescriptor, ReflectMessage as _, Value};

use super::any::MAX_ANYS;
use super::pool;

/// What stands in the place of a string.
const REDACTED: &str = "[redacted]";

/// The full names of all fields that are marked. There are few; asking a field for its options takes longer.
static SENSITIVE: LazyLock<HashSet<String>> = LazyLock::new(|| {
    let Some(marked) = pool().get_extension_by_name("udpa.annotations.sensitive") else { return HashSet::new() };
    let fields = pool().all_messages().flat_map(|message| message.fields().collect::<Vec<_>>());
    let sensitive = fields.filter(|field| {
        let options = field.options();
        options.has_extension(&marked) && options.get_extension(&marked).as_bool() == Some(true)
    });
    sensitive.map(|field| field.full_name().to_owned()).collect()
});

/// Whether the field is marked.
pub(super) fn is_sensitive(field: &FieldDescriptor) -> bool {
    SENSITIVE.contains(field.full_name())
}

/// What is shown of a sensitive value, as in Envoy: every string and every `bytes` in it says that it is redacted, numbers
/// are left out. `anys`: how many `Any`s the value is in.
pub(super) fn value(value: &Value, anys: usize) -> Option<Value> {
    Some(match value {
        Value::String(_) => Value::String(REDACTED.to_owned()),
        Value::Bytes(_) => Value::Bytes(REDACTED.as_bytes().into()),
        Value::Message(message) if message.descriptor().full_name() == "google.protobuf.Any" => {
            Value::Message(any(message, anys))
        }
        Value::Message(message) => Value::Message(self::message(message, anys)),
        Value::List(items) => Value::List(items.iter().filter_map(|item| self::value(item, anys)).collect()),
        Value::Map(entries) => {
            Value::Map(entries.iter().filter_map(|(key, item)| Some((key.clone(), self::value(item, anys)?))).collect())
        }
        _ => return None,
    })
}

fn message(message: &DynamicMessage, anys: usize) -> DynamicMessage {
    let mut shown = DynamicMessage::new(message.descriptor());
    for (field, inner) in message.fields() {
        if let Some(inner) = value(inner, anys) {
            shown.set_field(&field, inner);
        }
    }
    shown
}

/// The message in an `Any` redacted; without its bytes where its type is not known.
fn any(any: &DynamicMessage, anys: usize) -> DynamicMessage {
    use prost::Message as _;

    let mut shown = DynamicMessage::new(any.descriptor());
    let type_url =
        any.get_field_by_name("type_url").and_then(|url| url.as_str().map(str::to_owned)).unwrap_or_default();
    let bytes = any.get_field_by_name("value").and_then(|bytes| bytes.as_bytes().cloned()).unwrap_or_default();
    let name = Some(super::any::message_name(&type_url)).filter(|_| anys < MAX_ANYS);
    let inner = name.and_then(|name| pool().get_message_by_name(name));
    if let Some(inner) = inner.and_then(|desc| DynamicMessage::decode(desc, bytes).ok()) {
        shown.set_field_by_name("value", Value::Bytes(message(&inner, anys + 1).encode_to_vec().into()));
    }
    shown.set_field_by_name("type_url", Value::String(type_url));
    shown
}
