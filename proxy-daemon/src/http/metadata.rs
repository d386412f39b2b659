//! Dynamic metadata: what filters tell about a stream, by namespace.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use envoy_types::pb::{
    envoy::config::core::v3::Metadata as ConfigMetadata,
    google::protobuf::{Any, ListValue, Struct, Value, value::Kind},
};

use crate::{access_log::json_text, config::model::value_at};

/// Where rbac tells its verdicts.
pub(crate) const RBAC: &str = "envoy.filters.http.rbac";

/// Something that was configured reads what rbac tells. It stays so when that is configured no more.
static RBAC_IS_READ: AtomicBool = AtomicBool::new(false);

/// The name of a namespace that configuration reads. Whoever tells something with each request need not where nobody does.
pub(crate) fn read_from(namespace: &str) -> Box<str> {
    if namespace == RBAC {
        RBAC_IS_READ.store(true, Ordering::Relaxed);
    }
    namespace.into()
}

/// All that is told will be read.
pub(crate) fn read_all() {
    RBAC_IS_READ.store(true, Ordering::Relaxed);
}

/// Whether anybody reads rbac's verdicts.
pub(super) fn rbac_is_read() -> bool {
    RBAC_IS_READ.load(Ordering::Relaxed)
}

/// What filters have told about one stream, or what a resource's configuration says.
#[derive(Debug, Default)]
pub struct Metadata {
    fields: BTreeMap<Box<str>, Struct>,
    /// Messages, which no filter tells.
    typed: BTreeMap<Box<str>, Any>,
    /// Filter state: it is told in the same way, and is no metadata otherwise.
    state: BTreeMap<Box<str>, State>,
}

/// A text in the filter state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// What it says; formats may make what is no UTF-8.
    pub text: Box<[u8]>,
    /// Hash policies take it.
    pub hashable: bool,
}

impl State {
    /// What it says, to be compared.
    pub fn as_text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.text)
    }
}

impl Metadata {
    /// What is there under `namespace`.
    pub fn namespace(&self, namespace: &str) -> Option<&Struct> {
        self.fields.get(namespace)
    }

    /// The fields of `namespace`, to be added to.
    pub fn namespace_mut(&mut self, namespace: &str) -> &mut Struct {
        self.fields.entry(namespace.into()).or_default()
    }

    /// What the filter state has under `key`.
    pub fn state(&self, key: &str) -> Option<&State> {
        self.state.get(key)
    }

    /// Puts a text into the filter state.
    pub fn set_state(&mut self, key: &str, text: Box<[u8]>, hashable: bool) {
        self.state.insert(key.into(), State { text, hashable });
    }

    /// All namespaces.
    pub fn namespaces(&self) -> impl Iterator<Item = (&str, &Struct)> {
        self.fields.iter().map(|(name, fields)| (&**name, fields))
    }

    /// What a resource's configuration says.
    pub fn of_config(config: &ConfigMetadata) -> Metadata {
        let fields = config.filter_metadata.iter().map(|(name, fields)| (name.as_str().into(), fields.clone()));
        let typed = config.typed_filter_metadata.iter().map(|(name, message)| (name.as_str().into(), message.clone()));
        Metadata { fields: fields.collect(), typed: typed.collect(), state: BTreeMap::new() }
    }

    /// The message that is there under `namespace`.
    pub fn typed(&self, namespace: &str) -> Option<&Any> {
        self.typed.get(namespace)
    }

    /// Those of these namespaces that are there, as another message has them.
    pub fn select<'a>(
        &self,
        namespaces: impl IntoIterator<Item = &'a str>,
        typed: impl IntoIterator<Item = &'a str>,
    ) -> ConfigMetadata {
        let fields = namespaces.into_iter().filter_map(|name| Some((name.to_owned(), self.namespace(name)?.clone())));
        let typed = typed.into_iter().filter_map(|name| Some((name.to_owned(), self.typed(name)?.clone())));
        ConfigMetadata { filter_metadata: fields.collect(), typed_filter_metadata: typed.collect() }
    }

    /// The value at a path below `namespace`; nulls are none.
    pub fn find(&self, namespace: &str, path: &[Box<str>]) -> Option<Told<'_>> {
        let fields = self.namespace(namespace)?;
        if path.is_empty() {
            return Some(Told::Fields(fields));
        }
        let kind = value_at(Some(fields), path.iter().map(|key| &**key))?.kind.as_ref();
        kind.filter(|kind| !matches!(kind, Kind::NullValue(_))).map(Told::Value)
    }

    /// The value at a path below `namespace`, as access logs show it.
    pub fn show(&self, namespace: &str, path: &[Box<str>]) -> Option<String> {
        let mut shown = Vec::new();
        self.find(namespace, path)?.write(&mut shown);
        String::from_utf8(shown).ok()
    }
}

/// Something that metadata tells.
#[derive(Debug, Clone, Copy)]
pub enum Told<'a> {
    /// All of a namespace.
    Fields(&'a Struct),
    /// No null.
    Value(&'a Kind),
}

impl Told<'_> {
    /// Appends it as access logs show it: text as it is, the rest as JSON.
    pub fn write(self, out: &mut Vec<u8>) {
        match self {
            Told::Value(Kind::StringValue(text)) => out.extend_from_slice(text.as_bytes()),
            Told::Value(kind) => json_text::value(out, kind),
            Told::Fields(fields) => json_text::object(out, fields),
        }
    }
}

/// As JSON has it.
pub(crate) fn object(fields: &Struct) -> serde_json::Map<String, serde_json::Value> {
    let null = Kind::NullValue(0);
    let fields = fields.fields.iter().map(|(name, value)| (name.clone(), json(value.kind.as_ref().unwrap_or(&null))));
    fields.collect()
}

fn json(kind: &Kind) -> serde_json::Value {
    /// Up to here all whole numbers have a double of their own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match kind {
        Kind::NullValue(_) => serde_json::Value::Null,
        Kind::NumberValue(number) if number.fract() == 0.0 && number.abs() < EXACT => (*number as i64).into(),
        Kind::NumberValue(number) => (*number).into(),
        Kind::StringValue(text) => text.as_str().into(),
        Kind::BoolValue(value) => (*value).into(),
        Kind::StructValue(fields) => serde_json::Value::Object(object(fields)),
        Kind::ListValue(list) => {
            let null = Kind::NullValue(0);
            list.values.iter().map(|value| json(value.kind.as_ref().unwrap_or(&null))).collect()
        }
    }
}

/// An object of JSON as metadata.
pub fn from_json(fields: &serde_json::Map<String, serde_json::Value>) -> Struct {
    Struct { fields: fields.iter().map(|(name, value)| (name.clone(), value_of_json(value))).collect() }
}

fn value_of_json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    let kind = match value {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(*value),
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        Json::String(text) => Kind::StringValue(text.clone()),
        Json::Array(items) => Kind::ListValue(ListValue { values: items.iter().map(value_of_json).collect() }),
        Json::Object(fields) => Kind::StructValue(from_json(fields)),
    };
    Value { kind: Some(kind) }
}

/// Merges `from` into `into` as Envoy does: what is there in both and can be joined is, the rest is replaced.
pub fn update(into: &mut Struct, from: &Struct) {
    for (name, value) in &from.fields {
        match into.fields.get_mut(name) {
            Some(there) => update_value(there, value),
            None => drop(into.fields.insert(name.clone(), value.clone())),
        }
    }
}

fn update_value(into: &mut Value, from: &Value) {
    match (&mut into.kind, &from.kind) {
        (Some(Kind::StructValue(into)), Some(Kind::StructValue(from))) => update(into, from),
        (Some(Kind::ListValue(into)), Some(Kind::ListValue(from))) => into.values.extend(from.values.iter().cloned()),
        (into, from) => into.clone_from(from),
    }
}
