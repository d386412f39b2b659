//! Checks messages against the rules of their protos, by descriptor, into `Any`s as well.

use std::collections::HashSet;

use prost::{Message, Name};
use prost_reflect::{DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, ReflectMessage as _, Value};

use super::any::{MAX_ANYS, message_name, too_deep};
use super::path::Path;
use super::rules::{self, Bounds, Check, Num, Rule, TextRule};
use super::scalar::format_duration;
use super::{ConfigError, UnknownFields, dynamic, pool};
use crate::Any;

type Result = std::result::Result<(), ConfigError>;

/// Checks a message against the `validate.rules` and `validate.required` options of its proto and of those of all
/// messages in it. The error is that of the first field, in the order of field numbers, that breaks one.
///
/// Field numbers that a message in an `Any` does not have are passed over, as in Envoy; [`validate_any`] can refuse them.
pub fn validate<T: Message + Name>(value: &T) -> Result {
    Validator { unknown: UnknownFields::Ignore, anys: 0, resource: &[] }.message(&dynamic(value)?, &Path::ROOT)
}

/// Checks the message in `any`, such as an xDS resource; `path` starts the paths of errors.
///
/// Besides the rules this can refuse what decoding into a struct would lose: fields that the message type does not have
/// (`--reject-unknown-dynamic-fields`). An `Any` of an unknown type passes: refusing it is up to whoever is to use it.
pub fn validate_any(any: &Any, path: &str, unknown: UnknownFields) -> Result {
    Validator { unknown, anys: 0, resource: &any.value }.any(&any.type_url, &any.value, &Path::below(path))
}

#[derive(Clone, Copy)]
struct Validator<'a> {
    unknown: UnknownFields,
    /// The whole resource, for its name.
    resource: &'a [u8],
    /// How many `Any`s what is looked at is in.
    anys: usize,
}

impl Validator<'_> {
    fn any(self, type_url: &str, bytes: &[u8], path: &Path<'_>) -> Result {
        if self.anys == MAX_ANYS {
            return Err(too_deep(path));
        }
        let inside = Validator { anys: self.anys + 1, ..self };
        match pool().get_message_by_name(message_name(type_url)) {
            Some(desc) => match DynamicMessage::decode(desc, bytes) {
                Ok(inner) => inside.message(&inner, path),
                Err(error) => Err(path.error(format!("cannot decode {type_url}: {error}"))),
            },
            None => Ok(()),
        }
    }

    fn message(self, message: &DynamicMessage, path: &Path<'_>) -> Result {
        let desc = message.descriptor();
        match desc.full_name() {
            "google.protobuf.Any" => {
                let (type_url, bytes) = (message.get_field_by_name("type_url"), message.get_field_by_name("value"));
                let type_url = type_url.as_deref().and_then(Value::as_str).unwrap_or_default();
                let bytes = bytes.as_deref().and_then(Value::as_bytes).map(|bytes| &bytes[..]).unwrap_or_default();
                return self.any(type_url, bytes, path);
            }
            "google.protobuf.Struct" => return Ok(()),
            _ => {}
        }
        if !matches!(self.unknown, UnknownFields::Ignore)
            && let Some(unknown) = message.unknown_fields().next()
        {
            let unknown = || path.error(format!("{} has no field number {}", desc.full_name(), unknown.number()));
            match self.unknown {
                UnknownFields::Reject => return Err(unknown()),
                UnknownFields::Warn(log) => {
                    drop(log.tell(unknown, || crate::ads::name_in(self.resource).unwrap_or_default()));
                }
                UnknownFields::Ignore => {}
            }
        }
        let rules = rules::of(&desc).map_err(|error| path.error(error))?;
        for oneof in &rules.required_oneofs {
            if !oneof.fields().any(|field| message.has_field(&field)) {
                let names: Vec<_> = oneof.fields().map(|field| field.name().to_owned()).collect();
                return Err(path.error(format!("one of {} must be set", names.join(", "))));
            }
        }
        for (desc, rule) in &rules.fields {
            self.field(message, desc, rule.as_ref(), &path.field(desc.name()))?;
        }
        Ok(())
    }

    fn field(self, message: &DynamicMessage, desc: &FieldDescriptor, rule: Option<&Rule>, path: &Path<'_>) -> Result {
        let set = message.has_field(desc);
        if let Some(rule) = rule {
            // Members of a oneof are required to be set only where they are the member that is set.
            if rule.required && !set && desc.containing_oneof().is_none() {
                return Err(path.error("a value is required"));
            }
            // Fields that know whether they are set are checked when they are; the others always, with their default.
            if set || !desc.supports_presence() {
                check(rule, &message.get_field(desc), &desc.kind(), path)?;
            }
        }
        // Messages in metadata are for whoever reads them.
        let opaque = desc.full_name() == "envoy.config.core.v3.Metadata.typed_filter_metadata";
        if set && !opaque && !rule.is_some_and(|rule| rule.skip) {
            self.descend(&message.get_field(desc), path)?;
        }
        Ok(())
    }

    /// Validates the messages in a field.
    fn descend(self, value: &Value, path: &Path<'_>) -> Result {
        match value {
            Value::Message(inner) => self.message(inner, path),
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    let Value::Message(inner) = item else { break };
                    self.message(inner, &path.index(index))?;
                }
                Ok(())
            }
            Value::Map(map) => {
                for (key, value) in sorted(map) {
                    let Value::Message(inner) = value else { break };
                    self.message(inner, &path.key(&key_text(key)))?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// Checks one value (or a whole list or map) against its rule.
fn check(rule: &Rule, value: &Value, kind: &Kind, path: &Path<'_>) -> Result {
    // Rules on a wrapper are meant for the value inside.
    if let Value::Message(wrapper) = value
        && !matches!(rule.check, Check::Nothing | Check::Any { .. })
        && let Some(inner) = wrapper.descriptor().get_field_by_name("value")
        && wrapper.descriptor().full_name().starts_with("google.protobuf.")
    {
        return check(rule, &wrapper.get_field(&inner), &inner.kind(), path);
    }
    let failed = |message: String| Err(path.error(message));
    match &rule.check {
        Check::Nothing => Ok(()),
        Check::Number(bounds) => match Num::of(value).and_then(|number| broken_bound(bounds, number)) {
            Some(message) => failed(message),
            None => Ok(()),
        },
        Check::Bool(wanted) => match (wanted, value.as_bool()) {
            (Some(wanted), Some(found)) if *wanted != found => failed(format!("the value must be {wanted}")),
            _ => Ok(()),
        },
        Check::Text(rule) => {
            let broken = match value {
                Value::String(text) => broken_text(rule, text.as_bytes(), Some(text)),
                Value::Bytes(bytes) => broken_text(rule, bytes, None),
                _ => None,
            };
            broken.map_or(Ok(()), failed)
        }
        Check::Enum { defined_only, bounds } => {
            let Some(number) = value.as_enum_number() else { return Ok(()) };
            if let (true, Some(desc)) = (*defined_only, kind.as_enum())
                && desc.get_value(number).is_none()
            {
                return failed(format!("{number} is not a value of {}", desc.full_name()));
            }
            match (broken_bound(bounds, Num::Integer(number.into())), kind.as_enum()) {
                (Some(_), Some(desc)) => failed(format!("the value must not be {}", enum_name(desc, number))),
                _ => Ok(()),
            }
        }
        Check::List { min, max, unique, ignore_empty, items } => {
            let list = value.as_list().unwrap_or_default();
            if *ignore_empty && list.is_empty() {
                return Ok(());
            }
            count(list.len(), *min, *max, "item", path)?;
            if *unique {
                // Unique lists in Envoy's API are of scalars, whose debug form is faithful.
                let mut seen = HashSet::new();
                if let Some(index) = list.iter().position(|item| !seen.insert(format!("{item:?}"))) {
                    return Err(path.index(index).error("the value occurs twice in a list of unique ones"));
                }
            }
            for (index, item) in list.iter().enumerate() {
                if let Some(rule) = items {
                    check(rule, item, kind, &path.index(index))?;
                }
            }
            Ok(())
        }
        Check::Map { min, max, ignore_empty, keys, values } => {
            let (Some(map), Some(entry)) = (value.as_map(), kind.as_message()) else { return Ok(()) };
            if *ignore_empty && map.is_empty() {
                return Ok(());
            }
            count(map.len(), *min, *max, "entry", path)?;
            for (key, value) in sorted(map) {
                let text = key_text(key);
                let path = path.key(&text);
                if let Some(rule) = keys {
                    check(rule, &key.clone().into(), &entry.map_entry_key_field().kind(), &path)?;
                }
                if let Some(rule) = values {
                    check(rule, value, &entry.map_entry_value_field().kind(), &path)?;
                }
            }
            Ok(())
        }
        Check::Any { one_of, none_of } => {
            let Some(any) = value.as_message() else { return Ok(()) };
            let type_url = any.get_field_by_name("type_url");
            let type_url = type_url.as_deref().and_then(Value::as_str).unwrap_or_default().to_owned();
            if !one_of.is_empty() && !one_of.contains(&type_url) {
                return failed(format!("the type must be one of {}, not {type_url:?}", one_of.join(", ")));
            }
            if none_of.contains(&type_url) {
                return failed(format!("the type must not be {type_url:?}"));
            }
            Ok(())
        }
    }
}

fn count(found: usize, min: Option<u64>, max: Option<u64>, what: &str, path: &Path<'_>) -> Result {
    let found = found as u64;
    let what = |n: u64| match (n, what) {
        (1, what) => what.to_owned(),
        (_, "entry") => "entries".to_owned(),
        (_, what) => format!("{what}s"),
    };
    match (min, max) {
        (Some(min), _) if found < min => Err(path.error(format!("must have at least {min} {}", what(min)))),
        (_, Some(max)) if found > max => Err(path.error(format!("must have at most {max} {}", what(max)))),
        _ => Ok(()),
    }
}

/// What the value must be and is not.
fn broken_bound(bounds: &Bounds, value: Num) -> Option<String> {
    if bounds.ignore_empty && matches!(value, Num::Integer(0) | Num::Float(0.0)) {
        return None;
    }
    let show = |number: Num| match number {
        Num::Integer(nanos) if bounds.time => {
            format_duration((nanos / 1_000_000_000) as i64, (nanos % 1_000_000_000) as i32)
        }
        Num::Integer(number) => number.to_string(),
        Num::Float(number) => number.to_string(),
    };
    if let Some(wanted) = bounds.equal.filter(|wanted| *wanted != value) {
        return Some(format!("the value must be {}", show(wanted)));
    }
    if !bounds.one_of.is_empty() && !bounds.one_of.contains(&value) {
        let allowed: Vec<_> = bounds.one_of.iter().copied().map(show).collect();
        return Some(format!("the value must be one of {}", allowed.join(", ")));
    }
    if bounds.none_of.contains(&value) {
        return Some(format!("the value must not be {}", show(value)));
    }
    let low = bounds.gte.map(|bound| (bound, value >= bound, "at least"));
    let low = low.or(bounds.gt.map(|bound| (bound, value > bound, "greater than")));
    let high = bounds.lte.map(|bound| (bound, value <= bound, "at most"));
    let high = high.or(bounds.lt.map(|bound| (bound, value < bound, "less than")));
    match (low, high) {
        // Bounds the wrong way round leave out what is between them.
        (Some((low, above, more)), Some((high, below, less))) if high < low => {
            (!above && !below).then(|| format!("the value must be {less} {} or {more} {}", show(high), show(low)))
        }
        (Some((low, false, more)), _) => Some(format!("the value must be {more} {}", show(low))),
        (_, Some((high, false, less))) => Some(format!("the value must be {less} {}", show(high))),
        _ => None,
    }
}

/// What the text or bytes must be and are not.
fn broken_text(rule: &TextRule, bytes: &[u8], text: Option<&str>) -> Option<String> {
    if rule.ignore_empty && bytes.is_empty() {
        return None;
    }
    let shown = |bytes: &[u8]| format!("{:?}", String::from_utf8_lossy(bytes));
    let lengths = [
        (text.map_or(bytes.len(), |text| text.chars().count()), "character", rule.len, rule.min_len, rule.max_len),
        (bytes.len(), "byte", rule.len_bytes, rule.min_bytes, rule.max_bytes),
    ];
    for (length, unit, exact, min, max) in lengths {
        let length = length as u64;
        let bound = |word: &str, n: u64| {
            let plural = if n == 1 { "" } else { "s" };
            Some(format!("must be {word} {n} {unit}{plural} long"))
        };
        match (exact, min, max) {
            (_, Some(1), _) if length == 0 => return Some("must not be empty".to_owned()),
            (Some(n), _, _) if length != n => return bound("exactly", n),
            (_, Some(n), _) if length < n => return bound("at least", n),
            (_, _, Some(n)) if length > n => return bound("at most", n),
            _ => {}
        }
    }
    if let Some(wanted) = rule.equal.as_ref().filter(|wanted| *wanted != bytes) {
        return Some(format!("must be {}", shown(wanted)));
    }
    if !bytes.starts_with(&rule.prefix) {
        return Some(format!("must start with {}", shown(&rule.prefix)));
    }
    if !bytes.ends_with(&rule.suffix) {
        return Some(format!("must end with {}", shown(&rule.suffix)));
    }
    let contains = |needle: &[u8]| needle.is_empty() || bytes.windows(needle.len()).any(|window| window == needle);
    if !contains(&rule.contains) {
        return Some(format!("must contain {}", shown(&rule.contains)));
    }
    if let Some(needle) = rule.not_contains.as_ref().filter(|needle| contains(needle.as_bytes())) {
        return Some(format!("must not contain {needle:?}"));
    }
    if !rule.one_of.is_empty() && !rule.one_of.iter().any(|allowed| allowed == bytes) {
        let allowed: Vec<_> = rule.one_of.iter().map(|allowed| shown(allowed)).collect();
        return Some(format!("must be one of {}", allowed.join(", ")));
    }
    if rule.none_of.iter().any(|refused| refused == bytes) {
        return Some(format!("must not be {}", shown(bytes)));
    }
    match (&rule.pattern, text, rule.pattern_name) {
        (Some(pattern), Some(text), name) if !pattern.is_match(text) => Some(match name {
            Some(name) => format!("{text:?} is not {name}"),
            None => format!("{text:?} does not match {}", pattern.as_str()),
        }),
        _ => None,
    }
}

/// Map entries in the order of their keys, so that which error is reported does not depend on hashing.
fn sorted(map: &std::collections::HashMap<MapKey, Value>) -> Vec<(&MapKey, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    entries
}

pub(super) fn key_text(key: &MapKey) -> String {
    match key {
        MapKey::String(key) => key.clone(),
        MapKey::Bool(key) => key.to_string(),
        MapKey::I32(key) => key.to_string(),
        MapKey::I64(key) => key.to_string(),
        MapKey::U32(key) => key.to_string(),
        MapKey::U64(key) => key.to_string(),
    }
}

fn enum_name(desc: &EnumDescriptor, number: i32) -> String {
    desc.get_value(number).map_or_else(|| number.to_string(), |value| value.name().to_owned())
}
