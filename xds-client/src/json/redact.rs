//! What the protos mark as sensitive (`udpa.annotations.sensitive`) is not shown: private keys, passwords, session tickets.

use std::collections::HashSet;
use std::sync::LazyLock;

use prost::Message as _;
use prost_reflect::{DynamicMessage, FieldDescriptor, ReflectMessage as _, Value};

use super::any::{MAX_ANYS, message_name};
use super::pool;
use crate::Any;

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
    let mut shown = DynamicMessage::new(any.descriptor());
    let type_url =
        any.get_field_by_name("type_url").and_then(|url| url.as_str().map(str::to_owned)).unwrap_or_default();
    let bytes = any.get_field_by_name("value").and_then(|bytes| bytes.as_bytes().cloned()).unwrap_or_default();
    let name = Some(message_name(&type_url)).filter(|_| anys < MAX_ANYS);
    let inner = name.and_then(|name| pool().get_message_by_name(name));
    if let Some(inner) = inner.and_then(|desc| DynamicMessage::decode(desc, bytes).ok()) {
        shown.set_field_by_name("value", Value::Bytes(message(&inner, anys + 1).encode_to_vec().into()));
    }
    shown.set_field_by_name("type_url", Value::String(type_url));
    shown
}

/// The message without what is marked, for those who get it as a message and not as JSON: private keys read `[redacted]` there too,
/// at whatever depth. An `Any` of a type that is not known stays as it is; one that cannot be decoded, or is below [`MAX_ANYS`] others,
/// loses its bytes.
#[must_use]
pub fn redacted(message: &Any) -> Any {
    Any { type_url: message.type_url.clone(), value: without_sensitive(&message.type_url, &message.value, 0) }
}

fn without_sensitive(type_url: &str, bytes: &[u8], anys: usize) -> Vec<u8> {
    if anys >= MAX_ANYS {
        return Vec::new();
    }
    let Some(descriptor) = pool().get_message_by_name(message_name(type_url)) else { return bytes.to_vec() };
    // What cannot be decoded may hold anything.
    let Ok(mut message) = DynamicMessage::decode(descriptor, bytes) else { return Vec::new() };
    // Encoded anew only where something was found: a message of another encoder may have its fields in another order.
    if hide(&mut message, anys) { message.encode_to_vec() } else { bytes.to_vec() }
}

/// Takes out what is marked. Returns whether there was anything.
fn hide(message: &mut DynamicMessage, anys: usize) -> bool {
    if message.descriptor().full_name() == "google.protobuf.Any" {
        let type_url = message.get_field_by_name("type_url");
        let bytes = message.get_field_by_name("value");
        let (Some(type_url), Some(bytes)) = (type_url, bytes) else { return false };
        let (Some(type_url), Some(bytes)) = (type_url.as_str(), bytes.as_bytes()) else { return false };
        let shown = without_sensitive(type_url, bytes, anys + 1);
        if shown == **bytes {
            return false;
        }
        message.set_field_by_name("value", Value::Bytes(shown.into()));
        return true;
    }
    let (mut found, mut cleared) = (false, Vec::new());
    for (field, inner) in message.fields_mut() {
        if !is_sensitive(&field) {
            found |= hide_in(inner, anys);
            continue;
        }
        found = true;
        match value(inner, anys) {
            Some(shown) => *inner = shown,
            None => cleared.push(field),
        }
    }
    cleared.iter().for_each(|field| message.clear_field(field));
    found
}

fn hide_in(value: &mut Value, anys: usize) -> bool {
    match value {
        Value::Message(message) => hide(message, anys),
        Value::List(items) => items.iter_mut().fold(false, |found, item| hide_in(item, anys) | found),
        Value::Map(entries) => entries.values_mut().fold(false, |found, item| hide_in(item, anys) | found),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::listener::v3::Listener;
    use serde_json::json;

    use super::*;
    use crate::json::{any_to_json, from_yaml, pack};

    #[test]
    fn a_message_loses_its_keys_and_nothing_else() {
        let yaml = |key: &str| {
            format!(
                "name: in\nfilter_chains: [{{ transport_socket: {{ name: tls, typed_config: {{ '@type': \
                 type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
                 common_tls_context: {{ tls_certificates: [{{ certificate_chain: {{ inline_string: chain }}{key} }}] }} \
                 }} }} }}]"
            )
        };
        let listener = |key: &str| pack(&from_yaml::<Listener>(&yaml(key)).unwrap());
        let open = listener("");
        assert_eq!(redacted(&open), open, "byte for byte");
        let shown =
            redacted(&listener(", private_key: { inline_bytes: c2VjcmV0 }, password: { inline_string: secret }"));
        assert!(!shown.value.windows(6).any(|it| it == b"secret"), "{shown:?}");
        let json = any_to_json(&shown);
        let context = &json["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"];
        let certificate = json!({
            "certificate_chain": { "inline_string": "chain" },
            "private_key": { "inline_bytes": "W3JlZGFjdGVkXQ==" },
            "password": { "inline_string": "[redacted]" },
        });
        assert_eq!(context["tls_certificates"][0], certificate);
    }

    #[test]
    fn what_cannot_be_read_is_not_shown() {
        let broken = Any { type_url: pack(&Listener::default()).type_url, value: vec![0xff] };
        assert!(redacted(&broken).value.is_empty());
        let unknown = Any { type_url: "type.googleapis.com/none.such".to_owned(), value: vec![0xff] };
        assert_eq!(redacted(&unknown), unknown);
    }
}
