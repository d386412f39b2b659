//! The protos' `validate.rules` options in a form that is quick to check, compiled once for each message type.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, RwLock};

use envoy_types::pb::validate::{self, KnownRegex, string_rules::WellKnown};
use prost::Message;
use prost_reflect::{DynamicMessage, ExtensionDescriptor, FieldDescriptor, MessageDescriptor, OneofDescriptor, Value};
use regex::Regex;

use super::pool;

/// What is to be checked in messages of one type.
pub(super) struct MessageRules {
    pub(super) required_oneofs: Vec<OneofDescriptor>,
    /// All fields: those without a rule may hold messages that have some.
    pub(super) fields: Vec<(FieldDescriptor, Option<Rule>)>,
}

/// The rules of one field, list item, map key or map value.
#[derive(Debug, Default)]
pub(super) struct Rule {
    /// The field must be set.
    pub(super) required: bool,
    /// The message in the field is not looked into.
    pub(super) skip: bool,
    pub(super) check: Check,
}

#[derive(Debug, Default)]
pub(super) enum Check {
    #[default]
    Nothing,
    Number(Bounds),
    Bool(Option<bool>),
    /// Text and bytes.
    Text(Box<TextRule>),
    Enum {
        defined_only: bool,
        bounds: Bounds,
    },
    List {
        min: Option<u64>,
        max: Option<u64>,
        unique: bool,
        ignore_empty: bool,
        items: Option<Box<Rule>>,
    },
    Map {
        min: Option<u64>,
        max: Option<u64>,
        ignore_empty: bool,
        keys: Option<Box<Rule>>,
        values: Option<Box<Rule>>,
    },
    /// The type URLs that an `Any` may and may not have.
    Any {
        one_of: Vec<String>,
        none_of: Vec<String>,
    },
}

/// A number as the rules compare it. Durations and timestamps count as nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Num {
    Integer(i128),
    Float(f64),
}

#[derive(Debug, Default)]
pub(super) struct Bounds {
    pub(super) equal: Option<Num>,
    pub(super) lt: Option<Num>,
    pub(super) lte: Option<Num>,
    pub(super) gt: Option<Num>,
    pub(super) gte: Option<Num>,
    pub(super) one_of: Vec<Num>,
    pub(super) none_of: Vec<Num>,
    pub(super) ignore_empty: bool,
    /// The numbers are nanoseconds.
    pub(super) time: bool,
}

#[derive(Debug, Default)]
pub(super) struct TextRule {
    pub(super) equal: Option<Vec<u8>>,
    /// Lengths in characters (bytes for `bytes` fields).
    pub(super) len: Option<u64>,
    pub(super) min_len: Option<u64>,
    pub(super) max_len: Option<u64>,
    pub(super) len_bytes: Option<u64>,
    pub(super) min_bytes: Option<u64>,
    pub(super) max_bytes: Option<u64>,
    pub(super) prefix: Vec<u8>,
    pub(super) suffix: Vec<u8>,
    pub(super) contains: Vec<u8>,
    pub(super) not_contains: Option<String>,
    pub(super) one_of: Vec<Vec<u8>>,
    pub(super) none_of: Vec<Vec<u8>>,
    pub(super) pattern: Option<Regex>,
    /// What the pattern stands for, if it has a name.
    pub(super) pattern_name: Option<&'static str>,
    pub(super) ignore_empty: bool,
}

static CACHE: LazyLock<RwLock<HashMap<String, Arc<MessageRules>>>> = LazyLock::new(RwLock::default);
static FIELD_RULES: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| pool().get_extension_by_name("validate.rules"));
static ONEOF_REQUIRED: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| pool().get_extension_by_name("validate.required"));

/// The rules of `desc`, compiled on first use. Fails where a rule is of a kind that is not implemented; a test
/// makes sure that none in the pool is.
pub(super) fn of(desc: &MessageDescriptor) -> Result<Arc<MessageRules>, String> {
    let name = desc.full_name();
    if let Some(rules) = CACHE.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(name) {
        return Ok(Arc::clone(rules));
    }
    let rules = Arc::new(compile(desc)?);
    CACHE.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(name.to_owned(), Arc::clone(&rules));
    Ok(rules)
}

fn compile(desc: &MessageDescriptor) -> Result<MessageRules, String> {
    let required = |oneof: &OneofDescriptor| {
        ONEOF_REQUIRED.as_ref().is_some_and(|required| {
            let options = oneof.options();
            options.has_extension(required) && options.get_extension(required).as_bool() == Some(true)
        })
    };
    let fields = desc.fields().map(|field| {
        let options = field.options();
        let Some(extension) = FIELD_RULES.as_ref().filter(|extension| options.has_extension(extension)) else {
            return Ok((field, None));
        };
        let rules = options.get_extension(extension);
        let rule = Rule::compile(rules.as_message().ok_or("not a message")?)
            .map_err(|error| format!("{}: {error}", field.full_name()))?;
        Ok((field, Some(rule)))
    });
    Ok(MessageRules {
        fields: fields.collect::<Result<_, String>>()?,
        required_oneofs: desc.oneofs().filter(required).collect(),
    })
}

impl Rule {
    /// Compiles a `validate.FieldRules`. Its kinds have the same fields under the same names, so they are read by name.
    fn compile(rules: &DynamicMessage) -> Result<Rule, String> {
        let mut rule = Rule::default();
        for (field, value) in rules.fields() {
            let rules = value.as_message().ok_or("not a message")?;
            rule.required |= flag(rules, "required");
            rule.check = match field.name() {
                "message" => {
                    rule.skip = flag(rules, "skip");
                    continue;
                }
                "bool" => Check::Bool(set(rules, "const").and_then(|value| value.as_bool())),
                "string" => Check::Text(Box::new(text(typed(rules)?)?)),
                "bytes" => Check::Text(Box::new(bytes(typed(rules)?)?)),
                "enum" => Check::Enum { defined_only: flag(rules, "defined_only"), bounds: Bounds::read(rules) },
                "repeated" => Check::List {
                    min: count(rules, "min_items"),
                    max: count(rules, "max_items"),
                    unique: flag(rules, "unique"),
                    ignore_empty: flag(rules, "ignore_empty"),
                    items: nested(rules, "items")?,
                },
                "map" => Check::Map {
                    min: count(rules, "min_pairs"),
                    max: count(rules, "max_pairs"),
                    ignore_empty: flag(rules, "ignore_empty"),
                    keys: nested(rules, "keys")?,
                    values: nested(rules, "values")?,
                },
                "any" => {
                    let rules: validate::AnyRules = typed(rules)?;
                    Check::Any { one_of: rules.r#in, none_of: rules.not_in }
                }
                "timestamp" if ["lt_now", "gt_now", "within"].iter().any(|name| rules.has_field_by_name(name)) => {
                    return Err("rules about the present time are not implemented".to_owned());
                }
                "duration" | "timestamp" => Check::Number(Bounds { time: true, ..Bounds::read(rules) }),
                _ => Check::Number(Bounds::read(rules)),
            };
        }
        Ok(rule)
    }
}

impl Bounds {
    /// The bounds of any kind of number, of enums and of times.
    fn read(rules: &DynamicMessage) -> Bounds {
        let one = |name: &str| set(rules, name).as_ref().and_then(Num::of);
        let list = |name: &str| match set(rules, name) {
            Some(Value::List(items)) => items.iter().filter_map(Num::of).collect(),
            _ => Vec::new(),
        };
        Bounds {
            equal: one("const"),
            lt: one("lt"),
            lte: one("lte"),
            gt: one("gt"),
            gte: one("gte"),
            one_of: list("in"),
            none_of: list("not_in"),
            ignore_empty: flag(rules, "ignore_empty"),
            time: false,
        }
    }
}

/// The value of a field that is set.
fn set(rules: &DynamicMessage, field: &str) -> Option<Value> {
    let set = rules.has_field_by_name(field);
    rules.get_field_by_name(field).filter(|_| set).map(|value| value.into_owned())
}

fn flag(rules: &DynamicMessage, field: &str) -> bool {
    set(rules, field).and_then(|value| value.as_bool()).unwrap_or(false)
}

fn count(rules: &DynamicMessage, field: &str) -> Option<u64> {
    set(rules, field).and_then(|value| value.as_u64())
}

fn typed<T: Message + Default>(rules: &DynamicMessage) -> Result<T, String> {
    rules.transcode_to().map_err(|error| error.to_string())
}

fn nested(rules: &DynamicMessage, field: &str) -> Result<Option<Box<Rule>>, String> {
    match set(rules, field) {
        Some(Value::Message(rules)) => Rule::compile(&rules).map(|rule| Some(Box::new(rule))),
        _ => Ok(None),
    }
}

fn text(rules: validate::StringRules) -> Result<TextRule, String> {
    let known = match rules.well_known {
        None => None,
        Some(WellKnown::WellKnownRegex(known)) => match (KnownRegex::try_from(known), rules.strict()) {
            (Ok(KnownRegex::HttpHeaderName), true) => {
                Some(("an HTTP header name", r"^:?[0-9a-zA-Z!#$%&'*+\-.^_|~`]+$"))
            }
            (Ok(KnownRegex::HttpHeaderName), false) => Some(("an HTTP header name", r"^[^\x00\x0A\x0D]*$")),
            (Ok(KnownRegex::HttpHeaderValue), true) => Some(("an HTTP header value", r"^[^\x00-\x08\x0A-\x1F\x7F]*$")),
            (Ok(KnownRegex::HttpHeaderValue), false) => Some(("an HTTP header value", r"^[^\x00\x0A\x0D]*$")),
            (_, _) => return Err(format!("well-known regex {known} is not implemented")),
        },
        Some(format) => return Err(format!("the string format {format:?} is not implemented")),
    };
    let pattern = match (&known, &rules.pattern) {
        (Some((_, pattern)), _) => Some(*pattern),
        (None, pattern) => pattern.as_deref(),
    };
    Ok(TextRule {
        ignore_empty: rules.ignore_empty(),
        pattern: pattern.map(Regex::new).transpose().map_err(|error| error.to_string())?,
        pattern_name: known.map(|(name, _)| name),
        equal: rules.r#const.map(String::into_bytes),
        len: rules.len,
        min_len: rules.min_len,
        max_len: rules.max_len,
        len_bytes: rules.len_bytes,
        min_bytes: rules.min_bytes,
        max_bytes: rules.max_bytes,
        prefix: rules.prefix.unwrap_or_default().into_bytes(),
        suffix: rules.suffix.unwrap_or_default().into_bytes(),
        contains: rules.contains.unwrap_or_default().into_bytes(),
        not_contains: rules.not_contains,
        one_of: rules.r#in.into_iter().map(String::into_bytes).collect(),
        none_of: rules.not_in.into_iter().map(String::into_bytes).collect(),
    })
}

fn bytes(rules: validate::BytesRules) -> Result<TextRule, String> {
    if rules.pattern.is_some() || rules.well_known.is_some() {
        return Err("patterns and formats of bytes are not implemented".to_owned());
    }
    Ok(TextRule {
        ignore_empty: rules.ignore_empty(),
        equal: rules.r#const,
        len_bytes: rules.len,
        min_bytes: rules.min_len,
        max_bytes: rules.max_len,
        prefix: rules.prefix.unwrap_or_default(),
        suffix: rules.suffix.unwrap_or_default(),
        contains: rules.contains.unwrap_or_default(),
        one_of: rules.r#in,
        none_of: rules.not_in,
        ..TextRule::default()
    })
}

impl Num {
    /// A number, an enum value, a duration or a timestamp; `None` for anything else.
    pub(super) fn of(value: &Value) -> Option<Self> {
        Some(match value {
            Value::I32(value) | Value::EnumNumber(value) => Num::Integer((*value).into()),
            Value::I64(value) => Num::Integer((*value).into()),
            Value::U32(value) => Num::Integer((*value).into()),
            Value::U64(value) => Num::Integer((*value).into()),
            Value::F32(value) => Num::Float((*value).into()),
            Value::F64(value) => Num::Float(*value),
            Value::Message(message) => {
                let seconds = message.get_field_by_name("seconds")?.as_i64()?;
                let nanos = message.get_field_by_name("nanos")?.as_i32()?;
                Num::Integer(i128::from(seconds) * 1_000_000_000 + i128::from(nanos))
            }
            _ => return None,
        })
    }
}
