//! What becomes of fields that a message type does not have.

use std::{
    collections::BTreeSet,
    fmt::Display,
    sync::{Mutex, PoisonError},
};

/// Descriptions that are remembered. What comes after so many is passed over in silence.
const MAX_DESCRIPTIONS: usize = 1_000;

/// Unknown fields of the bootstrap.
pub static STATIC_FIELDS: Unknown = Unknown::new();
/// Unknown fields of what xDS delivers.
pub static DYNAMIC_FIELDS: Unknown = Unknown::new();

/// What becomes of fields that a message does not have.
#[derive(Debug, Clone, Copy, Default)]
pub enum UnknownFields {
    /// They are errors: Envoy's default for configuration files.
    #[default]
    Reject,
    /// They are passed over, logged and counted: Envoy's default for what xDS delivers.
    Warn(&'static Unknown),
    /// They are passed over.
    Ignore,
}

/// Unknown fields that were passed over: each is logged and counted once, however often it comes, as in Envoy.
#[derive(Debug)]
pub struct Unknown(Mutex<BTreeSet<String>>);

impl Unknown {
    /// None yet.
    pub const fn new() -> Unknown {
        Unknown(Mutex::new(BTreeSet::new()))
    }

    /// How many there were.
    pub fn count(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64
    }

    /// `field` describes one; not called where no more are remembered. `resource`: the name of the one that it is in, where that
    /// has one; of several that have the field, the first is named. Returns what the log says.
    pub(super) fn tell<T: Display>(
        &self,
        field: impl FnOnce() -> T,
        resource: impl FnOnce() -> String,
    ) -> Option<String> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= MAX_DESCRIPTIONS {
            return None;
        }
        let field = field().to_string();
        if seen.contains(&field) {
            return None;
        }
        let name = resource();
        let text = if name.is_empty() { field.clone() } else { format!("{name}: {field}") };
        tracing::warn!("{text}; it is ignored");
        seen.insert(field);
        Some(text)
    }
}

impl Default for Unknown {
    fn default() -> Self {
        Unknown::new()
    }
}
