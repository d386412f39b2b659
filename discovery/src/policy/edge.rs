//! What a service's manifest says of calls from outside the mesh, which edge proxies take.

use std::num::NonZeroU16;

use serde::Deserialize;

/// Where a service is found from outside.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edge {
    /// The hosts that requests name.
    pub domains: Domains,
    /// How the paths begin that are its own.
    #[serde(default)]
    pub prefix: Prefix,
    /// Which of its ports; its first one that speaks HTTP if it is not stated.
    pub port: Option<NonZeroU16>,
}

/// At least one host name, `*.` and the end of names, or `*`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<String>")]
pub struct Domains(Vec<String>);

/// A whole path, or some whole parts at its beginning.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Prefix(String);

impl Domains {
    /// The names.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl Prefix {
    /// The path.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self("/".to_owned())
    }
}

impl TryFrom<Vec<String>> for Domains {
    type Error = String;
    fn try_from(names: Vec<String>) -> Result<Self, String> {
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
        let is_label = |label: &str| !label.is_empty() && label.len() <= 63 && label.bytes().all(known);
        let is_name = |name: &str| name.len() <= 253 && name.split('.').all(is_label);
        if names.is_empty() {
            return Err("a service without a host name cannot be found".to_owned());
        }
        match names.iter().find(|name| *name != "*" && !is_name(name.strip_prefix("*.").unwrap_or(name))) {
            Some(wrong) => {
                let wrong = wrong.escape_debug();
                Err(format!(
                    "`{wrong}` is not a host name in lower case without a port, `*.` and the end of one, or `*`"
                ))
            }
            None => Ok(Self(names)),
        }
    }
}

impl TryFrom<String> for Prefix {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let known = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'?' | b'#' | b'%');
        let whole = text.starts_with('/') && text.len() <= 1024 && text.bytes().all(known);
        // A path that is merged and normalized has neither.
        if whole && (text == "/" || !text.ends_with('/')) && !text.contains("//") {
            Ok(Self(text))
        } else {
            Err("a path is needed that begins with `/` and does not end with it, such as /users".to_owned())
        }
    }
}
