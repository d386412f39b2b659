//! JSON-like values with the position each had in the text.

use serde_json::Number;

/// A value, and where its text starts (line and column, from 1).
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) position: Option<(u64, u64)>,
    pub(super) content: Content,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Null,
    Bool(bool),
    Number(Number),
    String(String),
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// One entry of a map, in the order of the text. Keys may occur twice in JSON.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    pub(super) position: Option<(u64, u64)>,
    pub(super) key: String,
    pub(super) value: Node,
}

impl Content {
    /// What the value is, for messages that say what was expected instead.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Content::Null => "null",
            Content::Bool(_) => "a boolean",
            Content::Number(_) => "a number",
            Content::String(_) => "a string",
            Content::List(_) => "a list",
            Content::Map(_) => "an object",
        }
    }
}

impl Node {
    /// The position of the value at `path`, or of the nearest value around it that is in the text.
    pub(super) fn locate(&self, path: &str) -> Option<(u64, u64)> {
        let mut node = self;
        let mut position = self.position;
        for step in steps(path) {
            let next = match &node.content {
                Content::List(items) => {
                    step.parse().ok().and_then(|index: usize| items.get(index)).map(|n| (n, n.position))
                }
                Content::Map(entries) => entry(entries, &step).or_else(|| {
                    // A TypedStruct stands for the message whose fields are in its value.
                    let typed = entries.iter().find(|entry| entry.key == "@type")?;
                    let Content::String(type_url) = &typed.value.content else { return None };
                    match &entry(entries, "value").filter(|_| type_url.ends_with(".TypedStruct"))?.0.content {
                        Content::Map(inner) => entry(inner, &step),
                        _ => None,
                    }
                }),
                _ => None,
            };
            let Some((found, at)) = next else { break };
            node = found;
            position = at;
        }
        position
    }
}

/// The value of `name`, in either spelling, and where its key stands. The last one counts where there are several.
fn entry<'a>(entries: &'a [Entry], name: &str) -> Option<(&'a Node, Option<(u64, u64)>)> {
    let found = entries.iter().rfind(|entry| entry.key == name || snake_case(&entry.key) == name);
    found.map(|entry| (&entry.value, entry.position))
}

/// The steps of a path as [`super::path::Path`] writes it: names, indices and keys, without their punctuation.
fn steps(mut path: &str) -> Vec<String> {
    let mut steps = Vec::new();
    while !path.is_empty() {
        if let Some(rest) = path.strip_prefix("[\"") {
            let Some(end) = rest.find("\"]") else { break };
            steps.push(rest[..end].replace("\\\"", "\""));
            path = &rest[end + 2..];
        } else if let Some(rest) = path.strip_prefix('[') {
            let Some(end) = rest.find(']') else { break };
            steps.push(rest[..end].to_owned());
            path = &rest[end + 1..];
        } else {
            let name = path.strip_prefix('.').unwrap_or(path);
            let end = name.find(['.', '[']).unwrap_or(name.len());
            steps.push(name[..end].to_owned());
            path = &name[end..];
        }
    }
    steps
}

/// `portValue` as `port_value`: fields may be written in either form.
fn snake_case(name: &str) -> String {
    let mut snake = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            snake.push('_');
        }
        snake.push(c.to_ascii_lowercase());
    }
    snake
}

impl From<serde_json::Value> for Node {
    fn from(value: serde_json::Value) -> Self {
        let content = match value {
            serde_json::Value::Null => Content::Null,
            serde_json::Value::Bool(value) => Content::Bool(value),
            serde_json::Value::Number(value) => Content::Number(value),
            serde_json::Value::String(value) => Content::String(value),
            serde_json::Value::Array(items) => Content::List(items.into_iter().map(Node::from).collect()),
            serde_json::Value::Object(entries) => Content::Map(
                entries.into_iter().map(|(key, value)| Entry { position: None, key, value: value.into() }).collect(),
            ),
        };
        Node { position: None, content }
    }
}
