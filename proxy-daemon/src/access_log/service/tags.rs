//! Tags of entries: `CommonGrpcAccessLogConfig.custom_tags`.

use envoy_types::pb::envoy::r#type::{
    metadata::v3::{MetadataKey, metadata_kind::Kind},
    tracing::v3::{CustomTag, custom_tag::Type},
};
use http::HeaderName;

use super::entry::text;
use crate::{
    access_log::{
        Record,
        format::{Format, Header, Part},
    },
    config::{FieldError, parse},
};

/// A tag, and where its value is from. One that comes to no text is not there.
#[derive(Debug)]
pub(super) struct Tag {
    name: String,
    source: Source,
    /// In the place of a value that is not there.
    default: String,
}

#[derive(Debug)]
enum Source {
    /// Always the same.
    Known(String),
    /// The first value of a request's header.
    Header(Header),
    Metadata {
        /// What the route's configuration says, and not what filters have told.
        of_route: bool,
        namespace: Box<str>,
        path: Box<[Box<str>]>,
    },
    Format(Format),
}

impl Tag {
    /// # Errors
    /// What is wrong with it, below `path`.
    pub(super) fn parse(tag: &CustomTag, path: &str) -> Result<Tag, FieldError> {
        let field = |name: &str| format!("{path}.{name}");
        if tag.tag.is_empty() {
            return Err(FieldError::new(field("tag"), "value is required"));
        }
        let (source, default) = match &tag.r#type {
            Some(Type::Literal(literal)) if literal.value.is_empty() => {
                return Err(FieldError::new(field("literal.value"), "value is required"));
            }
            Some(Type::Literal(literal)) => (Source::Known(literal.value.clone()), ""),
            Some(Type::Environment(variable)) if variable.name.is_empty() => {
                return Err(FieldError::new(field("environment.name"), "value is required"));
            }
            Some(Type::Environment(variable)) => {
                let value = std::env::var_os(&variable.name).map(|value| value.to_string_lossy().into_owned());
                (Source::Known(value.unwrap_or_default()), &*variable.default_value)
            }
            Some(Type::RequestHeader(header)) => {
                let parsed = Header::parse("REQ", &header.name);
                let parsed =
                    parsed.map_err(|error| FieldError::new(field("request_header.name"), error.to_string()))?;
                (Source::Header(parsed), &*header.default_value)
            }
            Some(Type::Metadata(metadata)) => {
                let of_route = match metadata.kind.as_ref().and_then(|kind| kind.kind.as_ref()) {
                    Some(Kind::Request(_)) => false,
                    Some(Kind::Route(_)) => true,
                    Some(Kind::Cluster(_)) => return Err(FieldError::unsupported(field("metadata.kind.cluster"))),
                    Some(Kind::Host(_)) => return Err(FieldError::unsupported(field("metadata.kind.host"))),
                    None => return Err(FieldError::new(field("metadata.kind"), "value is required")),
                };
                let key = MetadataKey::default();
                let key = metadata.metadata_key.as_ref().unwrap_or(&key);
                let (namespace, path) = parse::metadata_place(Some(key), &field("metadata"))?;
                (Source::Metadata { of_route, namespace, path }, &*metadata.default_value)
            }
            Some(Type::Value(format)) => {
                let parsed = Format::parse(format);
                (Source::Format(parsed.map_err(|error| FieldError::new(field("value"), error.to_string()))?), "")
            }
            None => return Err(FieldError::new(field("type"), "value is required")),
        };
        Ok(Tag { name: tag.tag.clone(), source, default: default.to_owned() })
    }

    /// The request's headers that it looks at.
    pub(super) fn headers(&self, part: Part) -> Box<dyn Iterator<Item = &HeaderName> + '_> {
        match (&self.source, part) {
            (Source::Header(Header::Name(name)), Part::Request) => Box::new(std::iter::once(name)),
            (Source::Format(format), part) => Box::new(format.headers(part)),
            _ => Box::new(std::iter::empty()),
        }
    }

    /// Its name and its value.
    pub(super) fn of(&self, record: &Record<'_>) -> Option<(String, String)> {
        let value = match &self.source {
            Source::Known(value) => Some(value.clone()),
            Source::Header(header) => header.value(record, record.request_headers).map(text),
            Source::Metadata { of_route, namespace, path } => {
                let metadata = if *of_route { record.route_metadata } else { record.metadata };
                metadata.and_then(|metadata| metadata.show(namespace, path))
            }
            Source::Format(format) => {
                let mut value = Vec::new();
                format.write(&mut value, &Record { missing: "", ..*record });
                Some(text(&value))
            }
        };
        let value = value.filter(|value| !value.is_empty()).unwrap_or_else(|| self.default.clone());
        (!value.is_empty()).then(|| (self.name.clone(), value))
    }
}
