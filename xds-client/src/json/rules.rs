//! The protos' `validate.rules` options in a form that is quick to check, compiled once for each message type.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, RwLock};

use envoy_types::pb::google::protobuf::{Duration, Timestamp};
use envoy_types::pb::validate::{self, KnownRegex, field_rules::Type, string_rules::WellKnown};
use prost_reflect::{ExtensionDescriptor, FieldDescriptor, MessageDescriptor, OneofDescriptor};
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
        let rules: validate::FieldRules =
            rules.as_message().ok_or("not a message")?.transcode_to().map_err(|error| error.to_string())?;
        let rule = Rule::compile(rules).map_err(|error| format!("{}: {error}", field.full_name()))?;
        Ok((field, Some(rule)))
    });
    Ok(MessageRules {
        fields: fields.collect::<Result<_, String>>()?,
        required_oneofs: desc.oneofs().filter(required).collect(),
    })
}

impl Rule {
    fn compile(rules: validate::FieldRules) -> Result<Rule, String> {
        let mut rule = Rule::default();
        if let Some(message) = rules.message {
            rule.required = message.required();
            rule.skip = message.skip();
        }
        macro_rules! numbers {
            ($rules:expr) => {{
                let rules = $rules;
                let ignore_empty = rules.ignore_empty();
                Check::Number(Bounds {
                    equal: rules.r#const.map(Num::from),
                    lt: rules.lt.map(Num::from),
                    lte: rules.lte.map(Num::from),
                    gt: rules.gt.map(Num::from),
                    gte: rules.gte.map(Num::from),
                    one_of: rules.r#in.into_iter().map(Num::from).collect(),
                    none_of: rules.not_in.into_iter().map(Num::from).collect(),
                    ignore_empty,
                    time: false,
                })
            }};
        }
        rule.check = match rules.r#type {
            None => Check::Nothing,
            Some(Type::Float(rules)) => numbers!(rules),
            Some(Type::Double(rules)) => numbers!(rules),
            Some(Type::Int32(rules)) => numbers!(rules),
            Some(Type::Int64(rules)) => numbers!(rules),
            Some(Type::Uint32(rules)) => numbers!(rules),
            Some(Type::Uint64(rules)) => numbers!(rules),
            Some(Type::Sint32(rules)) => numbers!(rules),
            Some(Type::Sint64(rules)) => numbers!(rules),
            Some(Type::Fixed32(rules)) => numbers!(rules),
            Some(Type::Fixed64(rules)) => numbers!(rules),
            Some(Type::Sfixed32(rules)) => numbers!(rules),
            Some(Type::Sfixed64(rules)) => numbers!(rules),
            Some(Type::Bool(rules)) => Check::Bool(rules.r#const),
            Some(Type::String(rules)) => Check::Text(Box::new(text(rules)?)),
            Some(Type::Bytes(rules)) => Check::Text(Box::new(bytes(rules)?)),
            Some(Type::Enum(rules)) => Check::Enum {
                defined_only: rules.defined_only(),
                bounds: Bounds {
                    equal: rules.r#const.map(Num::from),
                    one_of: rules.r#in.into_iter().map(Num::from).collect(),
                    none_of: rules.not_in.into_iter().map(Num::from).collect(),
                    ..Bounds::default()
                },
            },
            Some(Type::Repeated(rules)) => Check::List {
                min: rules.min_items,
                max: rules.max_items,
                unique: rules.unique(),
                ignore_empty: rules.ignore_empty(),
                items: nested(rules.items)?,
            },
            Some(Type::Map(rules)) => Check::Map {
                min: rules.min_pairs,
                max: rules.max_pairs,
                ignore_empty: rules.ignore_empty(),
                keys: nested(rules.keys)?,
                values: nested(rules.values)?,
            },
            Some(Type::Any(rules)) => {
                rule.required |= rules.required();
                Check::Any { one_of: rules.r#in, none_of: rules.not_in }
            }
            Some(Type::Duration(rules)) => {
                rule.required |= rules.required();
                Check::Number(Bounds {
                    equal: rules.r#const.map(Num::from),
                    lt: rules.lt.map(Num::from),
                    lte: rules.lte.map(Num::from),
                    gt: rules.gt.map(Num::from),
                    gte: rules.gte.map(Num::from),
                    one_of: rules.r#in.into_iter().map(Num::from).collect(),
                    none_of: rules.not_in.into_iter().map(Num::from).collect(),
                    ignore_empty: false,
                    time: true,
                })
            }
            Some(Type::Timestamp(rules)) => {
                if rules.lt_now.is_some() || rules.gt_now.is_some() || rules.within.is_some() {
                    return Err("rules about the present time are not implemented".to_owned());
                }
                rule.required |= rules.required();
                Check::Number(Bounds {
                    equal: rules.r#const.map(Num::from),
                    lt: rules.lt.map(Num::from),
                    lte: rules.lte.map(Num::from),
                    gt: rules.gt.map(Num::from),
                    gte: rules.gte.map(Num::from),
                    time: true,
                    ..Bounds::default()
                })
            }
        };
        Ok(rule)
    }
}

fn nested(rules: Option<Box<validate::FieldRules>>) -> Result<Option<Box<Rule>>, String> {
    rules.map(|rules| Rule::compile(*rules).map(Box::new)).transpose()
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

macro_rules! integers {
    ($($type:ty),*) => {$(
        impl From<$type> for Num {
            fn from(value: $type) -> Self {
                Num::Integer(value.into())
            }
        }
    )*};
}
integers!(i32, i64, u32, u64);

impl From<f32> for Num {
    fn from(value: f32) -> Self {
        Num::Float(value.into())
    }
}

impl From<f64> for Num {
    fn from(value: f64) -> Self {
        Num::Float(value)
    }
}

impl From<Duration> for Num {
    fn from(value: Duration) -> Self {
        Num::time(value.seconds, value.nanos)
    }
}

impl From<Timestamp> for Num {
    fn from(value: Timestamp) -> Self {
        Num::time(value.seconds, value.nanos)
    }
}

impl Num {
    /// Seconds and nanoseconds as one number.
    pub(super) fn time(seconds: i64, nanos: i32) -> Self {
        Num::Integer(i128::from(seconds) * 1_000_000_000 + i128::from(nanos))
    }
}
