//! What metadata must say: `envoy.type.matcher.v3.MetadataMatcher`.

use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};

use super::StringMatcher;
use crate::http::metadata::Metadata;

/// `MetadataMatcher`.
#[derive(Debug)]
pub struct MetadataMatcher {
    /// The namespace.
    pub filter: Box<str>,
    /// The way to the value below it.
    pub path: Vec<Box<str>>,
    /// What the value must be.
    pub value: ValueMatch,
    /// It must not.
    pub invert: bool,
}

impl MetadataMatcher {
    /// Whether what the namespace holds is as wanted; `None`: there is no such namespace.
    pub fn matches(&self, namespace: Option<&Struct>) -> bool {
        self.value.matches(value_at(namespace, self.path.iter().map(|key| &**key))) != self.invert
    }
}

/// `envoy.type.matcher.v3.FilterStateMatcher`.
#[derive(Debug)]
pub struct FilterStateMatcher {
    /// Where the object is.
    pub key: Box<str>,
    /// What its text must be.
    pub value: StringMatcher,
}

impl FilterStateMatcher {
    /// Whether there is such an object, as wanted.
    pub fn matches(&self, told: Option<&Metadata>) -> bool {
        told.and_then(|told| told.state(&self.key)).is_some_and(|state| self.value.matches(&state.as_text()))
    }
}

/// The value at a path of keys; `None` where it leads nowhere.
pub fn value_at<'a, 'k>(fields: Option<&'a Struct>, path: impl Iterator<Item = &'k str>) -> Option<&'a Value> {
    let (mut fields, mut found) = (fields, None);
    for key in path {
        let value = fields?.fields.get(key)?;
        fields = match &value.kind {
            Some(Kind::StructValue(inner)) => Some(inner),
            _ => None,
        };
        found = Some(value);
    }
    found
}

/// `envoy.type.matcher.v3.ValueMatcher`.
#[derive(Debug)]
pub enum ValueMatch {
    /// `null_match`.
    Null,
    /// `double_match.range`: from the first on, below the second.
    Range(f64, f64),
    /// `double_match.exact`.
    Number(f64),
    /// `string_match`.
    String(StringMatcher),
    /// `bool_match`.
    Bool(bool),
    /// `present_match`: there is a value. Where it is false nothing matches, as in Envoy.
    Present(bool),
    /// `list_match.one_of`: an item of the list is so.
    OneOf(Box<ValueMatch>),
    /// `or_match`: one of these holds.
    Any(Vec<ValueMatch>),
}

impl ValueMatch {
    /// Whether a value is as wanted; `None`: there is none.
    pub fn matches(&self, value: Option<&Value>) -> bool {
        let kind = value.and_then(|value| value.kind.as_ref());
        match (self, kind) {
            (ValueMatch::Any(some), _) => some.iter().any(|wanted| wanted.matches(value)),
            (ValueMatch::Null, Some(Kind::NullValue(_))) => true,
            (ValueMatch::Range(start, end), Some(Kind::NumberValue(number))) => start <= number && number < end,
            (ValueMatch::Number(exact), Some(Kind::NumberValue(number))) => exact == number,
            (ValueMatch::String(wanted), Some(Kind::StringValue(text))) => wanted.matches(text),
            (ValueMatch::Bool(wanted), Some(Kind::BoolValue(value))) => wanted == value,
            (ValueMatch::Present(wanted), kind) => *wanted && kind.is_some(),
            (ValueMatch::OneOf(wanted), Some(Kind::ListValue(list))) => {
                list.values.iter().any(|item| wanted.matches(Some(item)))
            }
            _ => false,
        }
    }
}
