//! Names of the form `xdstp://authority/type/id?parameters`.
//!
//! An id that is `*` or ends in `/*` is a collection: it stands for all resources whose id differs from it only after the
//! last slash. Parameters take part in the comparison, whatever their order.

use std::{borrow::Cow, collections::BTreeMap, fmt};

use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};

const SCHEME: &str = "xdstp:";

/// What Envoy escapes besides everything that is not ASCII.
const AUTHORITY: &AsciiSet = &CONTROLS.add(b'~').add(b'%').add(b'/').add(b'?').add(b'#');
const ID: &AsciiSet = &CONTROLS.add(b'~').add(b'%').add(b':').add(b'?').add(b'#').add(b'[').add(b']');
const PARAMETER: &AsciiSet = &CONTROLS.add(b'~').add(b'%').add(b'#').add(b'[').add(b']').add(b'&').add(b'=');

/// A name, taken apart and decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name {
    /// Who has it; may be empty.
    pub authority: String,
    /// The type's full name, without a slash.
    pub resource_type: String,
    /// What it is called there, with slashes; may be empty.
    pub id: String,
    /// Parameters.
    pub context: BTreeMap<String, String>,
}

/// Why a name is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Of another scheme.
    #[error("does not have an xdstp: scheme")]
    Scheme,
    /// Nothing between the authority and the id.
    #[error("the resource type is missing")]
    ResourceType,
    /// Escapes that are no UTF-8.
    #[error("is not UTF-8 once it is decoded")]
    Encoding,
}

/// Whether a name is of this form at all.
pub fn has_scheme(name: &str) -> bool {
    name.starts_with(SCHEME)
}

/// The one way to write a name, with its parameters in order. Names of another form, or that are broken, are left alone.
pub fn normalise(name: &str) -> Cow<'_, str> {
    match has_scheme(name).then(|| Name::parse(name)) {
        Some(Ok(parsed)) => Cow::Owned(parsed.to_string()),
        _ => Cow::Borrowed(name),
    }
}

/// The collection that a resource of this name is in; `None` for a name of another form.
pub fn collection_of(name: &str) -> Option<String> {
    let mut name = has_scheme(name).then(|| Name::parse(name))?.ok()?;
    match name.id.rfind('/') {
        Some(slash) => name.id.replace_range(slash + 1.., "*"),
        None => "*".clone_into(&mut name.id),
    }
    Some(name.to_string())
}

impl Name {
    /// Takes a name apart.
    pub fn parse(name: &str) -> Result<Name, Error> {
        let rest = name.strip_prefix(SCHEME).ok_or(Error::Scheme)?;
        let rest = rest.strip_prefix("//").ok_or(Error::ResourceType)?;
        let (authority, path) = rest.split_once('/').ok_or(Error::ResourceType)?;
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let (resource_type, id) = path.split_once('/').unwrap_or((path, ""));
        if resource_type.is_empty() {
            return Err(Error::ResourceType);
        }
        let mut context = BTreeMap::new();
        for parameter in query.split('&').filter(|it| !it.is_empty()) {
            let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            // Of a parameter that occurs twice the first counts.
            context.entry(decode(key)?).or_insert(decode(value)?);
        }
        Ok(Name { authority: decode(authority)?, resource_type: resource_type.to_owned(), id: decode(id)?, context })
    }

    /// It stands for all resources whose id differs only after the last slash.
    pub fn is_collection(&self) -> bool {
        self.id == "*" || self.id.ends_with("/*")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Name { authority, resource_type, id, context } = self;
        write!(f, "xdstp://{}/{resource_type}", utf8_percent_encode(authority, AUTHORITY))?;
        if !id.is_empty() {
            write!(f, "/{}", utf8_percent_encode(id, ID))?;
        }
        for (index, (key, value)) in context.iter().enumerate() {
            let separator = if index == 0 { '?' } else { '&' };
            let (key, value) = (utf8_percent_encode(key, PARAMETER), utf8_percent_encode(value, PARAMETER));
            write!(f, "{separator}{key}={value}")?;
        }
        Ok(())
    }
}

fn decode(text: &str) -> Result<String, Error> {
    percent_decode_str(text).decode_utf8().map(Cow::into_owned).map_err(|_| Error::Encoding)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_apart_and_written_one_way() {
        let name = Name::parse("xdstp://a%2Fb/envoy.config.listener.v3.Listener/x/y%3F?b=2&a=1%26&b=3").unwrap();
        assert_eq!((&*name.authority, &*name.id), ("a/b", "x/y?"));
        assert_eq!(name.resource_type, "envoy.config.listener.v3.Listener");
        assert_eq!(name.to_string(), "xdstp://a%2Fb/envoy.config.listener.v3.Listener/x/y%3F?a=1%26&b=2");
        assert_eq!(normalise("xdstp://a/t/x?c&b=2&a="), "xdstp://a/t/x?a=&b=2&c=");
        assert_eq!(normalise("xdstp:///t"), "xdstp:///t");
    }

    #[test]
    fn what_is_no_such_name_is_left_alone() {
        assert_eq!(Name::parse("a/b"), Err(Error::Scheme));
        assert_eq!(Name::parse("xdstp:a/b"), Err(Error::ResourceType));
        assert_eq!(Name::parse("xdstp://a"), Err(Error::ResourceType));
        assert_eq!(Name::parse("xdstp://a//x"), Err(Error::ResourceType));
        assert_eq!(Name::parse("xdstp://a/t/%ff"), Err(Error::Encoding));
        for name in ["", "plain?b=1&a=2", "xdstp://", "xdstp:?b&a", "xdstp://a/t/%ff?b&a"] {
            assert_eq!(normalise(name), name);
        }
    }

    #[test]
    fn a_resource_is_in_the_collection_of_its_folder_and_parameters() {
        assert_eq!(collection_of("xdstp://a/t/x/y?b=1&a=2").unwrap(), "xdstp://a/t/x/*?a=2&b=1");
        assert_eq!(collection_of("xdstp://a/t/y").unwrap(), "xdstp://a/t/*");
        assert_eq!(collection_of("x/y"), None);
        assert!(Name::parse("xdstp://a/t/x/*?c=1").unwrap().is_collection());
        assert!(Name::parse("xdstp://a/t/*").unwrap().is_collection());
        assert!(!Name::parse("xdstp://a/t/x*").unwrap().is_collection());
    }
}
