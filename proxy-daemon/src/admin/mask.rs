//! Field masks as Envoy applies them to its dumps.

use std::collections::BTreeMap;

use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, ReflectMessage as _, Value};

use culvert_xds_client::json;

/// The fields that are to stay; those below a field without fields of its own all stay.
#[derive(Debug, Default)]
pub(super) struct Mask(BTreeMap<String, Mask>);

impl Mask {
    /// Of paths such as `node.id`; one that another path includes adds nothing.
    pub(super) fn new<'a>(paths: impl IntoIterator<Item = &'a str>) -> Mask {
        let mut root = Mask::default();
        for path in paths {
            let mut node = &mut root;
            let mut fragments = path.split('.').peekable();
            while let Some(fragment) = fragments.next() {
                let whole = node.0.get(fragment).is_some_and(|inner| inner.0.is_empty());
                if whole {
                    break;
                }
                node = node.0.entry(fragment.to_owned()).or_default();
                if fragments.peek().is_none() {
                    node.0.clear();
                }
            }
        }
        root
    }

    /// Whether a field of the outermost message stays.
    pub(super) fn keeps(&self, field: &str) -> bool {
        self.0.is_empty() || self.0.contains_key(field)
    }

    /// Takes the other fields away. An empty mask leaves the message as it is.
    pub(super) fn trim(&self, message: &mut DynamicMessage) {
        if self.0.is_empty() {
            return;
        }
        let set: Vec<_> = message.fields().map(|(field, _)| field).collect();
        for field in set {
            match self.0.get(field.name()) {
                None => message.clear_field(&field),
                Some(inner) => {
                    if let Value::Message(below) = message.get_field_mut(&field) {
                        inner.trim(below);
                    }
                }
            }
        }
    }
}

/// The paths of a mask, as they stand in a request.
pub(super) fn paths(text: &str) -> Vec<&str> {
    text.split(',').filter(|path| !path.is_empty()).collect()
}

/// Whether the path names a field of such a message. A list can only be named as a whole.
pub(super) fn is_valid(message: &MessageDescriptor, path: &str) -> bool {
    let mut current = Some(message.clone());
    path.split('.').all(|fragment| {
        let Some(field) = current.take().and_then(|message| message.get_field_by_name(fragment)) else { return false };
        if let Kind::Message(below) = field.kind()
            && !field.is_list()
            && !field.is_map()
        {
            current = Some(below);
        }
        true
    })
}

/// Trims an element of a dump, whose one `Any` is looked into as if the resource stood in its place. `false` where a path
/// names nothing.
pub(super) fn trim_element(message: &mut DynamicMessage, paths: &[&str]) -> bool {
    let descriptor = message.descriptor();
    let (mut outer, mut inner, mut any_field) = (Vec::new(), Vec::new(), None);
    for path in paths {
        let (first, rest) = path.split_once('.').unwrap_or((path, ""));
        let field = descriptor.get_field_by_name(first);
        let is_any = field.as_ref().is_some_and(|field| {
            !field.is_list()
                && matches!(field.kind(), Kind::Message(message) if message.full_name() == "google.protobuf.Any")
        });
        if is_any {
            any_field = field;
            outer.push(first);
            inner.push(rest);
        } else {
            outer.push(path);
        }
    }
    if let Some(field) = any_field.filter(|field| message.has_field(field))
        && let Value::Message(any) = message.get_field_mut(&field)
        && !trim_any(any, &inner)
    {
        return false;
    }
    if !outer.iter().all(|path| is_valid(&descriptor, path)) {
        return false;
    }
    Mask::new(outer).trim(message);
    true
}

fn trim_any(any: &mut DynamicMessage, paths: &[&str]) -> bool {
    let text = |name: &str| any.get_field_by_name(name).map(|value| value.into_owned());
    let (Some(Value::String(type_url)), bytes) = (text("type_url"), text("value")) else { return false };
    let bytes = bytes.and_then(|bytes| bytes.as_bytes().cloned()).unwrap_or_default();
    let descriptor = json::pool().get_message_by_name(type_url.rsplit('/').next().unwrap_or_default());
    let Some(mut message) = descriptor.and_then(|descriptor| DynamicMessage::decode(descriptor, bytes).ok()) else {
        return false;
    };
    if !paths.iter().all(|path| is_valid(&message.descriptor(), path)) {
        return false;
    }
    Mask::new(paths.iter().copied()).trim(&mut message);
    any.set_field_by_name("value", Value::Bytes(message.encode_to_vec().into()));
    true
}
