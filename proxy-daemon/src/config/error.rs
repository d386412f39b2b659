use std::fmt;

/// Why one resource or file is refused: which field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// The field's full path, for example `static_resources.listeners[0].filter_chains[1].filters`.
    pub path: String,
    /// What is wrong, and where it helps, what to do about it.
    pub message: String,
}

impl FieldError {
    /// An error at `path`.
    pub fn new(path: impl Into<String>, message: impl Into<String>) -> FieldError {
        FieldError { path: path.into(), message: message.into() }
    }

    /// A field of Envoy's API that is set and that Culvert does not implement.
    pub fn unsupported(path: impl Into<String>) -> FieldError {
        FieldError::new(path, "not supported by culvert yet")
    }

    /// A value that Culvert does not implement, of a field that it does with the values `has`.
    pub fn unsupported_value(path: impl Into<String>, value: impl fmt::Display, has: &str) -> FieldError {
        FieldError::new(path, format!("{value} is not supported by culvert yet; it has {has}"))
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() { f.write_str(&self.message) } else { write!(f, "{}: {}", self.path, self.message) }
    }
}

impl std::error::Error for FieldError {}

impl From<culvert_xds_client::json::ConfigError> for FieldError {
    fn from(error: culvert_xds_client::json::ConfigError) -> FieldError {
        FieldError { path: error.path, message: error.message }
    }
}
