//! Messages inside `Any`: typed extension configs and xDS resources.

use std::borrow::Cow;

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, ReflectMessage as _, Value};

use super::decode::Decoder;
use super::path::Path;
use super::tree::Node;
use super::{ConfigError, UnknownFields, dynamic, encode, from_node, newer, pool};
use crate::Any;

/// Both names of the message that carries a config as a JSON-like struct; the second is its older one.
const TYPED_STRUCTS: [&str; 2] = ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"];

/// How many messages may be in each other by way of `Any`: no reader of bytes from outside follows them deeper. The decoder's own
/// limit begins anew with each.
pub const MAX_ANYS: usize = 32;

/// What is wrong with an `Any` below [`MAX_ANYS`] others.
pub(super) fn too_deep(path: &Path<'_>) -> ConfigError {
    path.error(format!("more than {MAX_ANYS} messages are in each other as Any"))
}

/// The message in `any`, which sits in the field `path`. A `TypedStruct` that names `T` is read as JSON is.
///
/// Fails, naming both types, where `any` holds another message.
pub fn unpack<T: Message + Name + Default>(any: &Any, path: &str) -> Result<T, ConfigError> {
    let path = Path::below(path);
    let found = message_name(&any.type_url);
    if found == T::full_name() {
        return newer::decode(any.value.as_slice())
            .map_err(|error| path.error(format!("cannot decode {found}: {error}")));
    }
    let (type_url, value) = match typed_struct(any) {
        Some(Ok(inner)) => inner,
        Some(Err(message)) => return Err(path.error(message)),
        None => return Err(wrong_type::<T>(&any.type_url, &path)),
    };
    if message_name(&type_url) != T::full_name() {
        return Err(wrong_type::<T>(&type_url, &path));
    }
    from_node(&Node::from(value), &path.field("value"), UnknownFields::Reject)
}

/// The message with every `TypedStruct` in it replaced by the message that it stands for, so that whoever reads it need
/// not know of them. One that names an unknown type stays as it is.
///
/// # Errors
/// The field of the value that does not fit the type.
pub fn resolve_typed_structs<T: Message + Name + Default + Clone>(
    message: &T,
    unknown: UnknownFields,
) -> Result<Cow<'_, T>, ConfigError> {
    if !may_hold_typed_structs(&message.encode_to_vec()) {
        return Ok(Cow::Borrowed(message));
    }
    let mut dynamic = dynamic(message)?;
    resolve(&mut dynamic, &Path::ROOT, unknown, 0)?;
    newer::hide(&mut dynamic);
    let resolved = dynamic.transcode_to().map_err(|error| ConfigError::new("", error.to_string()))?;
    Ok(Cow::Owned(resolved))
}

/// Whether there may be a `TypedStruct` in a message, which is given as it is encoded. Without one,
/// [`resolve_typed_structs`] has nothing to do.
pub fn may_hold_typed_structs(encoded: &[u8]) -> bool {
    memchr::memmem::find(encoded, b".TypedStruct").is_some()
}

/// `anys`: how many `Any`s the message is in.
fn resolve(
    message: &mut DynamicMessage,
    path: &Path<'_>,
    unknown: UnknownFields,
    anys: usize,
) -> Result<(), ConfigError> {
    match message.descriptor().full_name() {
        "google.protobuf.Any" => return resolve_any(message, path, unknown, anys),
        name if name.starts_with("google.protobuf.") => return Ok(()),
        _ => {}
    }
    for (field, value) in message.fields_mut() {
        let path = path.field(field.name());
        match value {
            Value::Message(inner) => resolve(inner, &path, unknown, anys)?,
            Value::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    let Value::Message(inner) = item else { break };
                    resolve(inner, &path.index(index), unknown, anys)?;
                }
            }
            Value::Map(entries) => {
                for (key, value) in entries {
                    let Value::Message(inner) = value else { break };
                    resolve(inner, &path.key(&super::validate::key_text(key)), unknown, anys)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn resolve_any(
    any: &mut DynamicMessage,
    path: &Path<'_>,
    unknown: UnknownFields,
    anys: usize,
) -> Result<(), ConfigError> {
    if anys == MAX_ANYS {
        return Err(too_deep(path));
    }
    let packed: Any = any.transcode_to().map_err(|error| path.error(error.to_string()))?;
    let (name, mut inner) = match typed_struct(&packed) {
        Some(Ok((type_url, value))) => {
            let Some(desc) = pool().get_message_by_name(message_name(&type_url)) else { return Ok(()) };
            let inner = Decoder { unknown }.message(&Node::from(value), &desc, path)?;
            (desc.full_name().to_owned(), inner)
        }
        Some(Err(message)) => return Err(path.error(message)),
        None => {
            let name = message_name(&packed.type_url);
            let Some(desc) = pool().get_message_by_name(name) else { return Ok(()) };
            // One that cannot be decoded is for its reader to refuse.
            let Ok(inner) = DynamicMessage::decode(desc, packed.value.as_slice()) else { return Ok(()) };
            (name.to_owned(), inner)
        }
    };
    resolve(&mut inner, path, unknown, anys + 1)?;
    any.set_field_by_name("type_url", Value::String(format!("type.googleapis.com/{name}")));
    any.set_field_by_name("value", Value::Bytes(inner.encode_to_vec().into()));
    Ok(())
}

/// Puts a message into an `Any`, under its `type.googleapis.com/` URL.
pub fn pack<T: Message + Name>(message: &T) -> Any {
    Any { type_url: format!("type.googleapis.com/{}", T::full_name()), value: newer::encode(message) }
}

/// An `Any` as [`to_json`](super::to_json) shows one.
pub fn any_to_json(any: &Any) -> serde_json::Value {
    super::to_json(any)
}

/// What follows the last slash of a type URL.
pub(super) fn message_name(type_url: &str) -> &str {
    type_url.rsplit('/').next().unwrap_or(type_url)
}

/// The name of the message that `any` holds; of a `TypedStruct` the one that it stands for.
pub fn type_name(any: &Any) -> String {
    match typed_struct(any) {
        Some(Ok((type_url, _))) => message_name(&type_url).to_owned(),
        Some(Err(_)) | None => message_name(&any.type_url).to_owned(),
    }
}

/// The type URL and the value of a `TypedStruct`; `None` where `any` holds something else.
fn typed_struct(any: &Any) -> Option<Result<(String, serde_json::Value), String>> {
    let name = message_name(&any.type_url);
    let desc = TYPED_STRUCTS.contains(&name).then(|| pool().get_message_by_name(name))??;
    let message = match DynamicMessage::decode(desc, any.value.as_slice()) {
        Ok(message) => message,
        Err(error) => return Some(Err(format!("cannot decode {name}: {error}"))),
    };
    let type_url = message.get_field_by_name("type_url")?.as_str()?.to_owned();
    let value = message.get_field_by_name("value")?.as_message().map(encode::message)?;
    Some(Ok((type_url, value)))
}

fn wrong_type<T: Name>(found: &str, path: &Path<'_>) -> ConfigError {
    if found.is_empty() {
        return path.error(format!("a {} is expected, and nothing is set", T::full_name()));
    }
    path.error(format!("expected type.googleapis.com/{}, found {found}", T::full_name()))
}
