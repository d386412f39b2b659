//! [`Node`] to message, by descriptor: protobuf's JSON mapping as Envoy's parser has it, which takes some forms besides:
//! one item for a list of one, lists in lists as one list, messages such as `Duration` and the wrappers as objects of
//! their fields, and a field that is set twice (the last value counts, lists append).

use std::collections::{HashMap, HashSet};

use prost::Message as _;
use prost_reflect::{
    DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage as _, Value,
};

use super::path::Path;
use super::scalar;
use super::tree::{Content, Entry, Node};
use super::{ConfigError, UnknownFields};

type Result<T> = std::result::Result<T, ConfigError>;

/// How messages are read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Decoder {
    pub(super) unknown: UnknownFields,
}

impl Decoder {
    /// Reads a message of type `desc`.
    pub(super) fn message(self, node: &Node, desc: &MessageDescriptor, path: &Path<'_>) -> Result<DynamicMessage> {
        let object = matches!(node.content, Content::Map(_));
        match desc.full_name().strip_prefix("google.protobuf.") {
            Some("Any") => self.any(node, desc, path),
            Some("Struct") => {
                let field = desc.get_field_by_name("fields").ok_or_else(|| path.error("a Struct without fields"))?;
                Ok(with(desc, [("fields", self.map(node, &field, path)?)]))
            }
            Some("Value") => self.value(node, desc, path),
            Some("ListValue") if !object => {
                let field = desc.get_field_by_name("values").ok_or_else(|| path.error("a ListValue without values"))?;
                let mut items = Vec::new();
                self.items(node, &field.kind(), path, &mut items)?;
                Ok(with(desc, [("values", Value::List(items))]))
            }
            Some("Duration") if !object => {
                let (seconds, nanos) =
                    scalar::duration(text(node, path)?).map_err(|error| path.error_at(node, error))?;
                Ok(with(desc, [("seconds", Value::I64(seconds)), ("nanos", Value::I32(nanos))]))
            }
            Some("Timestamp") if !object => {
                let text = text(node, path)?;
                let time: prost_types::Timestamp = text.parse().map_err(|_| {
                    path.error_at(node, format!("{text:?} is not a time, such as \"2026-01-02T03:04:05Z\""))
                })?;
                Ok(with(desc, [("seconds", Value::I64(time.seconds)), ("nanos", Value::I32(time.nanos))]))
            }
            Some("FieldMask") if !object => {
                let paths = text(node, path)?.split(',').filter(|path| !path.is_empty());
                Ok(with(desc, [("paths", Value::List(paths.map(|path| Value::String(path.to_owned())).collect()))]))
            }
            Some(
                "DoubleValue" | "FloatValue" | "Int64Value" | "UInt64Value" | "Int32Value" | "UInt32Value"
                | "BoolValue" | "StringValue" | "BytesValue",
            ) if !object => {
                let field = desc.get_field_by_name("value").ok_or_else(|| path.error("a wrapper without a value"))?;
                Ok(with(desc, [("value", self.single(node, &field.kind(), path)?)]))
            }
            _ => {
                let mut message = DynamicMessage::new(desc.clone());
                self.fields(entries(node, path)?, &mut message, path)?;
                Ok(message)
            }
        }
    }

    /// Reads the fields of an ordinary message into `message`.
    fn fields<'a>(
        self,
        entries: impl IntoIterator<Item = &'a Entry>,
        message: &mut DynamicMessage,
        path: &Path<'_>,
    ) -> Result<()> {
        let desc = message.descriptor();
        let mut seen = HashSet::new();
        for entry in entries {
            let here = path.field(&entry.key);
            let error = |message: String| ConfigError { position: entry.position, ..here.error(message) };
            let field = desc.get_field_by_name(&entry.key).or_else(|| desc.get_field_by_json_name(&entry.key));
            let Some(field) = field else {
                let unknown = || error(unknown_field(&entry.key, &desc));
                match self.unknown {
                    UnknownFields::Reject => return Err(unknown()),
                    UnknownFields::Warn(log) => drop(log.tell(unknown, String::new)),
                    UnknownFields::Ignore => {}
                }
                continue;
            };
            let here = path.field(field.name());
            let null_is_a_value = matches!(field.kind(), Kind::Message(kind) if kind.full_name() == "google.protobuf.Value")
                && !field.is_list();
            if entry.value.content == Content::Null && !null_is_a_value {
                continue;
            }
            if let Some(oneof) = field.containing_oneof()
                && let Some(other) = oneof.fields().find(|other| seen.contains(&other.number()))
            {
                return Err(error(format!("{:?} is set already: only one of {} may be", other.name(), oneof.name())));
            }
            if !seen.insert(field.number()) {
                tracing::warn!("{}", error("the field is set twice: Envoy does not say which value counts".to_owned()));
            }
            self.field(&entry.value, &field, message, &here)?;
        }
        Ok(())
    }

    /// Reads one field into `message`, where it may be set already.
    fn field(self, node: &Node, field: &FieldDescriptor, message: &mut DynamicMessage, path: &Path<'_>) -> Result<()> {
        if field.is_map() {
            let Value::Map(entries) = self.map(node, field, path)? else { return Ok(()) };
            match message.get_field_mut(field) {
                Value::Map(map) => map.extend(entries),
                other => *other = Value::Map(entries),
            }
            return Ok(());
        }
        if field.is_list() {
            let mut items = Vec::new();
            self.items(node, &field.kind(), path, &mut items)?;
            match message.get_field_mut(field) {
                Value::List(list) => list.extend(items),
                other => *other = Value::List(items),
            }
            return Ok(());
        }
        let value = self.single(node, &field.kind(), path)?;
        message.set_field(field, value);
        Ok(())
    }

    /// Reads the items of a list: of lists in it as well, and one that stands without a list.
    fn items(self, node: &Node, kind: &Kind, path: &Path<'_>, found: &mut Vec<Value>) -> Result<()> {
        let Content::List(items) = &node.content else {
            found.push(self.single(node, kind, path)?);
            return Ok(());
        };
        let keeps_lists = matches!(kind, Kind::Message(desc)
            if matches!(desc.full_name(), "google.protobuf.Value" | "google.protobuf.ListValue"));
        for (index, item) in items.iter().enumerate() {
            let path = path.index(index);
            match &item.content {
                Content::List(_) if !keeps_lists => self.items(item, kind, &path, found)?,
                _ => found.push(self.or_default(item, kind, &path)?),
            }
        }
        Ok(())
    }

    fn map(self, node: &Node, field: &FieldDescriptor, path: &Path<'_>) -> Result<Value> {
        let Kind::Message(entry) = field.kind() else { return Err(path.error("a map field without entries")) };
        let (key_kind, value_kind) = (entry.map_entry_key_field().kind(), entry.map_entry_value_field().kind());
        let mut map = HashMap::new();
        for entry in entries(node, path)? {
            let here = path.key(&entry.key);
            let error = |message: &str| ConfigError { position: entry.position, ..here.error(message) };
            let key = map_key(&entry.key, &key_kind).ok_or_else(|| error("the key has the wrong type"))?;
            if map.insert(key, self.or_default(&entry.value, &value_kind, &here)?).is_some() {
                return Err(error("the key occurs twice"));
            }
        }
        Ok(Value::Map(map))
    }

    /// As [`Self::single`]; null is the type's default.
    fn or_default(self, node: &Node, kind: &Kind, path: &Path<'_>) -> Result<Value> {
        let null_is_a_value = matches!(kind, Kind::Message(desc) if desc.full_name() == "google.protobuf.Value");
        if node.content == Content::Null && !null_is_a_value {
            return Ok(Value::default_value(kind));
        }
        self.single(node, kind, path)
    }

    /// Reads one value that is neither a list nor a map field.
    fn single(self, node: &Node, kind: &Kind, path: &Path<'_>) -> Result<Value> {
        let integer = |name: &str| -> Result<i128> {
            scalar::integer(&node.content).ok_or_else(|| match &node.content {
                Content::Number(number) => path.error_at(node, format!("{number} is not {name}")),
                Content::String(text) => path.error_at(node, format!("{text:?} is not {name}")),
                _ => expected(node, name, path),
            })
        };
        let out_of_range = |name: &str| path.error_at(node, format!("the number does not fit {name}"));
        Ok(match kind {
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => {
                Value::I32(integer("an integer")?.try_into().map_err(|_| out_of_range("a signed 32-bit integer"))?)
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => {
                Value::I64(integer("an integer")?.try_into().map_err(|_| out_of_range("a signed 64-bit integer"))?)
            }
            Kind::Uint32 | Kind::Fixed32 => {
                Value::U32(integer("an integer")?.try_into().map_err(|_| out_of_range("an unsigned 32-bit integer"))?)
            }
            Kind::Uint64 | Kind::Fixed64 => {
                Value::U64(integer("an integer")?.try_into().map_err(|_| out_of_range("an unsigned 64-bit integer"))?)
            }
            Kind::Double => Value::F64(scalar::float(&node.content).ok_or_else(|| expected(node, "a number", path))?),
            Kind::Float => {
                let value = scalar::float(&node.content).ok_or_else(|| expected(node, "a number", path))?;
                if value.is_finite() && value.abs() > f64::from(f32::MAX) {
                    return Err(out_of_range("a 32-bit float"));
                }
                Value::F32(value as f32)
            }
            Kind::Bool => Value::Bool(scalar::boolean(&node.content).ok_or_else(|| expected(node, "a boolean", path))?),
            Kind::String => Value::String(text(node, path)?.to_owned()),
            Kind::Bytes => {
                let bytes = scalar::bytes(text(node, path)?).ok_or_else(|| path.error_at(node, "not valid base64"))?;
                Value::Bytes(bytes.into())
            }
            Kind::Enum(desc) => Value::EnumNumber(enum_number(node, desc, path)?),
            Kind::Message(desc) => Value::Message(self.message(node, desc, path)?),
        })
    }

    /// `{"@type": ..., fields...}`, or for well-known types `{"@type": ..., "value": ...}`.
    fn any(self, node: &Node, desc: &MessageDescriptor, path: &Path<'_>) -> Result<DynamicMessage> {
        let entries = entries(node, path)?;
        if entries.is_empty() {
            return Ok(DynamicMessage::new(desc.clone()));
        }
        let at_type = path.field("@type");
        let Some(type_entry) = entries.iter().find(|entry| entry.key == "@type") else {
            return Err(path.error_at(node, "\"@type\" is missing: it must name the message type of this object"));
        };
        let type_url = text(&type_entry.value, &at_type)?;
        let name = type_url.rsplit_once('/').filter(|(domain, _)| !domain.is_empty()).map(|(_, name)| name);
        let inner_desc = name.and_then(|name| desc.parent_pool().get_message_by_name(name));
        let Some(inner_desc) = inner_desc else {
            return Err(at_type.error_at(&type_entry.value, format!("unknown type {type_url:?}")));
        };
        let mut rest = entries.iter().filter(|entry| entry.key != "@type");
        let inner = if has_special_form(inner_desc.full_name()) {
            let Some(entry) = rest.next().filter(|entry| entry.key == "value") else {
                return Err(path.error_at(node, format!("{type_url} needs exactly the field \"value\"")));
            };
            if let Some(extra) = rest.next() {
                return Err(ConfigError {
                    position: extra.position,
                    ..path.field(&extra.key).error(unknown_field(&extra.key, &inner_desc))
                });
            }
            self.message(&entry.value, &inner_desc, &path.field("value"))?
        } else {
            let mut inner = DynamicMessage::new(inner_desc);
            self.fields(rest, &mut inner, path)?;
            inner
        };
        Ok(with(
            desc,
            [("type_url", Value::String(type_url.to_owned())), ("value", Value::Bytes(inner.encode_to_vec().into()))],
        ))
    }

    fn value(self, node: &Node, desc: &MessageDescriptor, path: &Path<'_>) -> Result<DynamicMessage> {
        let nested = |name: &str| -> Result<Value> {
            let field = desc.get_field_by_name(name).ok_or_else(|| path.error("a Value without its kinds"))?;
            self.single(node, &field.kind(), path)
        };
        let field = match &node.content {
            Content::Null => ("null_value", Value::EnumNumber(0)),
            Content::Bool(value) => ("bool_value", Value::Bool(*value)),
            Content::Number(number) => ("number_value", Value::F64(number.as_f64().unwrap_or(f64::NAN))),
            Content::String(text) => ("string_value", Value::String(text.clone())),
            Content::List(_) => ("list_value", nested("list_value")?),
            Content::Map(_) => ("struct_value", nested("struct_value")?),
        };
        Ok(with(desc, [field]))
    }
}

/// Numbers that the enum does not have are taken where no rule says otherwise, as in Envoy: enums are open.
fn enum_number(node: &Node, desc: &EnumDescriptor, path: &Path<'_>) -> Result<i32> {
    if desc.full_name() == "google.protobuf.NullValue" && node.content == Content::Null {
        return Ok(0);
    }
    let (shown, found) = match &node.content {
        Content::String(name) => {
            let named = desc
                .get_value_by_name(name)
                .or_else(|| desc.values().find(|value| value.name().eq_ignore_ascii_case(name)))
                .map(|value| value.number());
            (format!("{name:?}"), named.or_else(|| name.parse().ok()))
        }
        Content::Number(number) => {
            let value = scalar::integer(&node.content).and_then(|number| i32::try_from(number).ok());
            (number.to_string(), value)
        }
        _ => return Err(expected(node, "an enum value", path)),
    };
    found.ok_or_else(|| {
        let names: Vec<_> = desc.values().map(|value| value.name().to_owned()).collect();
        path.error_at(node, format!("{shown} is not one of {}", names.join(", ")))
    })
}

fn map_key(key: &str, kind: &Kind) -> Option<MapKey> {
    Some(match kind {
        Kind::String => MapKey::String(key.to_owned()),
        Kind::Bool => MapKey::Bool(key.parse().ok()?),
        Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => MapKey::I32(key.parse().ok()?),
        Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => MapKey::I64(key.parse().ok()?),
        Kind::Uint32 | Kind::Fixed32 => MapKey::U32(key.parse().ok()?),
        Kind::Uint64 | Kind::Fixed64 => MapKey::U64(key.parse().ok()?),
        _ => return None,
    })
}

/// Whether the type's JSON form is something else than an object of its fields.
pub(super) fn has_special_form(full_name: &str) -> bool {
    full_name.strip_prefix("google.protobuf.").is_some_and(|name| {
        matches!(name, "Any" | "Struct" | "ListValue" | "Value" | "Duration" | "Timestamp" | "FieldMask")
            || (name.ends_with("Value") && !name.contains('.') && name != "EnumValue")
    })
}

fn with<const N: usize>(desc: &MessageDescriptor, fields: [(&str, Value); N]) -> DynamicMessage {
    let mut message = DynamicMessage::new(desc.clone());
    for (name, value) in fields {
        message.set_field_by_name(name, value);
    }
    message
}

fn entries<'a>(node: &'a Node, path: &Path<'_>) -> Result<&'a [Entry]> {
    match &node.content {
        Content::Map(entries) => Ok(entries),
        _ => Err(expected(node, "an object", path)),
    }
}

fn text<'a>(node: &'a Node, path: &Path<'_>) -> Result<&'a str> {
    match &node.content {
        Content::String(text) => Ok(text),
        _ => Err(expected(node, "a string", path)),
    }
}

fn expected(node: &Node, what: &str, path: &Path<'_>) -> ConfigError {
    let hint = match (&node.content, what) {
        (Content::Bool(_) | Content::Number(_), "a string") => " (put it in quotes)",
        _ => "",
    };
    path.error_at(node, format!("expected {what}, found {}{hint}", node.content.kind()))
}

/// The longest name that is compared with those of fields.
const MAX_NAME: usize = 100;

fn unknown_field(name: &str, desc: &MessageDescriptor) -> String {
    // A name that is much longer than all of them is like none.
    let near = (if name.len() <= MAX_NAME { Some(desc.fields()) } else { None })
        .into_iter()
        .flatten()
        .map(|field| (edit_distance(name, field.name()), field))
        .filter(|(distance, field)| *distance <= 1 + field.name().len() / 5)
        .min_by_key(|(distance, _)| *distance);
    match near {
        Some((_, field)) => format!("{} has no such field; did you mean {:?}?", desc.full_name(), field.name()),
        None => format!("{} has no such field", desc.full_name()),
    }
}

/// Levenshtein's distance of two names, in bytes.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
