//! The path to a field, kept on the stack while walking a message and written out only for an error.

use std::borrow::Cow;

use super::ConfigError;
use super::tree::Node;

/// One step of a path, with the steps before it.
#[derive(Clone, Copy)]
pub(super) struct Path<'a> {
    parent: Option<&'a Path<'a>>,
    step: Step<'a>,
}

#[derive(Clone, Copy)]
enum Step<'a> {
    Prefix(&'a str),
    Field(&'a str),
    Index(usize),
    Key(&'a str),
}

impl<'a> Path<'a> {
    pub(super) const ROOT: Path<'static> = Path { parent: None, step: Step::Prefix("") };

    /// Starts below a path that is already text.
    pub(super) fn below(prefix: &'a str) -> Self {
        Path { parent: None, step: Step::Prefix(prefix) }
    }

    pub(super) fn field(&'a self, name: &'a str) -> Self {
        Path { parent: Some(self), step: Step::Field(name) }
    }

    pub(super) fn index(&'a self, index: usize) -> Self {
        Path { parent: Some(self), step: Step::Index(index) }
    }

    pub(super) fn key(&'a self, key: &'a str) -> Self {
        Path { parent: Some(self), step: Step::Key(key) }
    }

    /// An error here, without a position.
    pub(super) fn error(&self, message: impl Into<String>) -> ConfigError {
        ConfigError::new(self.text(), message)
    }

    /// An error here, at the position of `node`.
    pub(super) fn error_at(&self, node: &Node, message: impl Into<String>) -> ConfigError {
        ConfigError { path: self.text(), position: node.position, message: message.into() }
    }

    fn text(&self) -> String {
        let mut text = self.parent.map_or_else(String::new, Path::text);
        match self.step {
            Step::Prefix(prefix) => text.push_str(prefix),
            Step::Field(name) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(&shown(name));
            }
            Step::Index(index) => text.push_str(&format!("[{index}]")),
            Step::Key(key) => text.push_str(&format!("[{:?}]", shown(key))),
        }
        text
    }
}

/// A name or key as far as it is shown: a text may give a long one to thousands of fields.
fn shown(name: &str) -> Cow<'_, str> {
    const LONGEST: usize = 200;
    match name.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &name[..end]).into(),
        None => name.into(),
    }
}
