//! Envoy's messages as JSON and YAML, the way Envoy itself reads and prints them.
//!
//! A message goes through three steps, each of which names the field it stumbles over:
//! text -> tree of values with positions -> [`DynamicMessage`] by descriptor, strictly -> the typed prost struct.
//! [`validate()`] then checks the rules that the protos carry as `validate.rules` options.
//!
//! Reading is as strict as Envoy's, and no stricter: unknown fields, unknown enum values, unknown `@type`s and wrong types
//! are errors; booleans and numbers given as strings and enum values in any case are not.

mod any;
mod decode;
mod encode;
mod lexer;
pub mod newer;
mod path;
mod redact;
mod rules;
mod scalar;
mod tree;
mod unknown;
mod validate;
mod yaml;

use std::fmt;
use std::sync::LazyLock;

use prost::{Message, Name};
use prost_reflect::{DescriptorPool, DynamicMessage, MessageDescriptor, ReflectMessage as _};

pub use self::any::{MAX_ANYS, any_to_json, may_hold_typed_structs, pack, resolve_typed_structs, type_name, unpack};
use self::decode::Decoder;
use self::path::Path;
pub use self::redact::redacted;
use self::tree::Node;
pub use self::unknown::{DYNAMIC_FIELDS, STATIC_FIELDS, Unknown, UnknownFields};
pub use self::validate::{validate, validate_any};

/// A configuration that cannot be used: which field, where in the text, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct ConfigError {
    /// The field, as `static_resources.listeners[0].name`; map entries as `typed_per_filter_config["name"]`. Empty
    /// when the text as a whole is meant.
    pub path: String,
    /// Line and column in the text, both from 1; `None` where the message did not come from text.
    pub position: Option<(u64, u64)>,
    /// What is wrong, without the path.
    pub message: String,
}

impl ConfigError {
    /// An error of the field at `path`, without a position.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> Self {
        ConfigError { path: path.into(), position: None, message: message.into() }
    }

    /// Fills in the position of the error's path in the YAML `text` that the message was read from. The nearest
    /// enclosing field counts where the field itself is not in the text (a missing one, for example).
    pub fn locate(mut self, text: &str) -> Self {
        if self.position.is_none()
            && let Ok(root) = yaml::parse(text).or_else(|_| lexer::parse(text))
        {
            self.position = root.locate(&self.path);
        }
        self
    }
}

/// The text of a file.
///
/// # Errors
/// Where the first bytes stand that are no UTF-8.
pub fn text(bytes: &[u8]) -> Result<&str, ConfigError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let (before, _) = bytes.split_at(error.valid_up_to());
        let before = String::from_utf8_lossy(before);
        let line = before.matches('\n').count() as u64 + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() as u64 + 1;
        ConfigError { path: String::new(), position: Some((line, column)), message: "not UTF-8".to_owned() }
    })
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        match self.position {
            Some((line, column)) => write!(f, " (line {line}, column {column})"),
            None => Ok(()),
        }
    }
}

static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    const ENVOY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/envoy.fds"));
    const CULVERT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/culvert.fds"));
    let mut pool = DescriptorPool::decode(ENVOY).expect("the build script copied a valid descriptor set");
    pool.decode_file_descriptor_set(CULVERT).expect("the build script compiled these descriptors");
    pool
});

/// The descriptors of every message that may occur in a configuration: Envoy's API and Culvert's own.
///
/// Decoded on first use, which takes some tens of milliseconds.
pub fn pool() -> &'static DescriptorPool {
    &POOL
}

/// In which notation a text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// YAML, of which JSON is a part.
    Yaml,
    /// JSON, as protobuf's parser takes it.
    Json,
}

impl Format {
    /// The format of a file by Envoy's rule: YAML where the name says so, and JSON otherwise.
    pub fn of_file(path: &std::path::Path) -> Format {
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let yaml = extension.eq_ignore_ascii_case("yaml") || extension.eq_ignore_ascii_case("yml");
        if yaml { Format::Yaml } else { Format::Json }
    }
}

/// Reads a message.
pub fn read<T: Message + Name + Default>(text: &str, format: Format, unknown: UnknownFields) -> Result<T, ConfigError> {
    let root = match format {
        Format::Yaml => yaml::parse(text)?,
        Format::Json => lexer::parse(text)?,
    };
    from_node(&root, &Path::ROOT, unknown)
}

/// Reads a message from YAML, strictly. YAML is a superset of JSON, so this reads JSON too.
pub fn from_yaml<T: Message + Name + Default>(text: &str) -> Result<T, ConfigError> {
    read(text, Format::Yaml, UnknownFields::Reject)
}

/// Reads a message from a JSON value; errors have no position.
pub fn from_json<T: Message + Name + Default>(value: serde_json::Value) -> Result<T, ConfigError> {
    from_node(&Node::from(value), &Path::ROOT, UnknownFields::Reject)
}

/// Merges the message in `overlay` (YAML or JSON) over `base`, as Envoy's `--config-yaml` over `--config-path`:
/// messages merge field by field, lists append, maps merge by key, anything else is replaced.
pub fn merge_yaml<T: Message + Name + Default>(
    mut base: T,
    overlay: &str,
    unknown: UnknownFields,
) -> Result<T, ConfigError> {
    let overlay: T = read(overlay, Format::Yaml, unknown)?;
    // Protobuf defines decoding into an existing message as just this merge.
    base.merge(overlay.encode_to_vec().as_slice()).map_err(|error| ConfigError::new("", error.to_string()))?;
    Ok(base)
}

/// A message as Envoy's `/config_dump` shows it: proto field names, fields with their default value left out, `Any`
/// expanded beside its `@type`, 64-bit integers as strings. An `Any` of an unknown type keeps its `@type` and has its
/// bytes as base64 under `value`. What the protos mark as sensitive (private keys, passwords) reads `[redacted]`.
pub fn to_json<T: Message + Name>(message: &T) -> serde_json::Value {
    match dynamic(message) {
        Ok(message) => encode::message(&message),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    }
}

/// As [`to_json`], with what is sensitive: for who is to use it, not for people.
pub fn to_json_with_secrets<T: Message + Name>(message: &T) -> serde_json::Value {
    match dynamic(message) {
        Ok(message) => encode::message_with_secrets(&message),
        Err(error) => serde_json::json!({ "error": error.to_string() }),
    }
}

/// A message behind its descriptor, for those who pick fields by name.
///
/// Empty where the type is not in the [`pool()`], which those of Envoy's API and of Culvert's are.
pub fn to_dynamic<T: Message + Name>(message: &T) -> DynamicMessage {
    dynamic(message).unwrap_or_else(|_| DynamicMessage::new(prost_types::Any::default().descriptor()))
}

/// As [`to_json`], of a message that is behind its descriptor already.
pub fn dynamic_to_json(message: &DynamicMessage) -> serde_json::Value {
    encode::message(message)
}

fn from_node<T: Message + Name + Default>(
    node: &Node,
    path: &Path<'_>,
    unknown: UnknownFields,
) -> Result<T, ConfigError> {
    let mut message = Decoder { unknown }.message(node, &descriptor::<T>(path)?, path)?;
    newer::hide(&mut message);
    message.transcode_to::<T>().map_err(|error| {
        let text = error.to_string();
        // The error has a step for each of the levels.
        let deep = text.contains("recursion limit");
        path.error(if deep { "messages are nested deeper than 100 levels".to_owned() } else { text })
    })
}

fn descriptor<T: Name>(path: &Path<'_>) -> Result<MessageDescriptor, ConfigError> {
    let name = T::full_name();
    pool().get_message_by_name(&name).ok_or_else(|| path.error(format!("the message type {name} is not known")))
}

/// The message behind its descriptor, for walking over its fields.
fn dynamic<T: Message + Name>(message: &T) -> Result<DynamicMessage, ConfigError> {
    let mut dynamic = DynamicMessage::new(descriptor::<T>(&Path::ROOT)?);
    dynamic.transcode_from(message).map_err(|error| ConfigError::new("", error.to_string()))?;
    newer::show(&mut dynamic);
    Ok(dynamic)
}

#[cfg(test)]
mod tests;
