//! What a request says about overrides: the codec of the [`Overrides`] message and of the headers that carry it.
//!
//! The message travels in the baggage item [`BAGGAGE_ITEM`], as standard padded base64 of its bytes. Baggage rides in
//! one of three headers, in this order of precedence:
//!
//! 1. `x-ot-span-context` (see [`SpanContext`]),
//! 2. `ot-baggage-overrides`, the item's own header of the text form of the same propagation format,
//! 3. `baggage` (see [`Baggage`]).
//!
//! All of it comes from outside: every function here bounds what it reads and none panics on any input.

mod ot_span_context;
mod w3c_baggage;

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, HeaderName};
use prost::Message as _;

pub use self::ot_span_context::{SpanContext, decode_ot_span_context, encode_ot_span_context};
pub use self::w3c_baggage::{Baggage, MAX_BAGGAGE_BYTES, MAX_BAGGAGE_MEMBERS, format_baggage, parse_baggage};
pub use crate::api::culvert::overrides::v1::{Override, Overrides};

/// The header that carries a whole span context, baggage included.
pub const OT_SPAN_CONTEXT: HeaderName = HeaderName::from_static("x-ot-span-context");
/// The header that carries only the baggage item [`BAGGAGE_ITEM`].
pub const OT_BAGGAGE_OVERRIDES: HeaderName = HeaderName::from_static("ot-baggage-overrides");
/// The W3C baggage header.
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// The key of the baggage item that holds an [`Overrides`] message.
pub const BAGGAGE_ITEM: &str = "overrides";
/// The one version of [`Overrides`] that is defined.
pub const VERSION: u32 = 1;
/// The most entries an [`Overrides`] message may have.
pub const MAX_OVERRIDES: usize = 64;
/// The longest service name, in bytes: that of a DNS name.
pub const MAX_SERVICE_BYTES: usize = 253;
/// The longest revision, in bytes: that of a Kubernetes label value.
pub const MAX_REVISION_BYTES: usize = 63;
/// The longest header value that is looked at, in bytes. An `Overrides` message at its limits fits.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// The namespace of a service that is named without one.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Why a header or an `Overrides` message cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// The header value is longer than is looked at.
    #[error("{what} is {bytes} bytes long, at most {limit} are read")]
    TooLong {
        /// Which header or item.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The longest that is read.
        limit: usize,
    },
    /// The value is not standard padded base64.
    #[error("{what} is corrupted: not standard padded base64 ({reason})")]
    Base64 {
        /// Which header or item.
        what: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// The bytes are not the protobuf message that belongs there.
    #[error("{what} is corrupted: not a {message} message ({reason})")]
    Protobuf {
        /// Which header or item.
        what: &'static str,
        /// The message that was expected.
        message: &'static str,
        /// What the decoder said.
        reason: String,
    },
    /// `x-ot-span-context` holds only the form that was deprecated before this format was published.
    #[error("x-ot-span-context has no basic_ctx (the deprecated text form is not read)")]
    NoBasicContext,
    /// A `baggage` header with more members than are read.
    #[error("baggage has more than {MAX_BAGGAGE_MEMBERS} members")]
    TooManyMembers,
    /// The value of the baggage item is not UTF-8 after percent-decoding, or has a broken `%` sequence.
    #[error("baggage item `overrides` is corrupted: not percent-encoded UTF-8")]
    Percent,
    /// An `Overrides` message of a version that is not understood.
    #[error("the overrides have version {0}, only version {VERSION} is understood")]
    UnknownVersion(u32),
    /// More overrides than a message may have.
    #[error("{0} overrides, at most {MAX_OVERRIDES} are allowed")]
    TooManyOverrides(usize),
    /// A service name that is empty, too long or not `name` or `name.namespace`.
    #[error("overrides[{index}].service `{service}` is not `name` or `name.namespace`")]
    BadService {
        /// Position of the entry.
        index: usize,
        /// The name, shortened.
        service: String,
    },
    /// A revision that is empty, too long or has characters that a label value cannot have.
    #[error(
        "overrides[{index}].revision `{revision}` is not a label value (1 to {MAX_REVISION_BYTES} of A-Za-z0-9-_.)"
    )]
    BadRevision {
        /// Position of the entry.
        index: usize,
        /// The revision, shortened.
        revision: String,
    },
    /// Two entries for one service.
    #[error("service `{0}` is overridden twice")]
    DuplicateService(String),
}

impl Overrides {
    /// A checked message of the current version from pairs of service and revision.
    ///
    /// # Errors
    /// Whatever [`Overrides::from_baggage_item`] would refuse on the receiving side.
    pub fn new<S: Into<String>, R: Into<String>>(
        entries: impl IntoIterator<Item = (S, R)>,
    ) -> Result<Self, ContextError> {
        let overrides = entries
            .into_iter()
            .map(|(service, revision)| Override { service: service.into(), revision: revision.into() })
            .collect();
        let message = Self { version: VERSION, overrides };
        message.check()?;
        Ok(message)
    }

    /// Decodes and checks the value of the baggage item `overrides`.
    ///
    /// # Errors
    /// [`ContextError`] with the part that is wrong; nothing of a message with an error in it is used.
    pub fn from_baggage_item(value: &str) -> Result<Self, ContextError> {
        const WHAT: &str = "baggage item `overrides`";
        let bytes = decode_base64(WHAT, value.as_bytes())?;
        let message = Self::decode(bytes.as_slice()).map_err(|error| ContextError::Protobuf {
            what: WHAT,
            message: "culvert.overrides.v1.Overrides",
            reason: error.to_string(),
        })?;
        message.check()?;
        Ok(message)
    }

    /// The value of the baggage item `overrides` that says this message.
    #[must_use]
    pub fn to_baggage_item(&self) -> String {
        STANDARD.encode(self.encode_to_vec())
    }

    /// The revision that is wanted of `service`, which is given as `name.namespace`.
    #[must_use]
    pub fn revision_of(&self, service: &str) -> Option<&str> {
        let (name, namespace) = service.split_once('.')?;
        self.overrides.iter().find(|entry| split_service(&entry.service) == (name, namespace)).map(|e| &*e.revision)
    }

    fn check(&self) -> Result<(), ContextError> {
        if self.version != VERSION {
            return Err(ContextError::UnknownVersion(self.version));
        }
        if self.overrides.len() > MAX_OVERRIDES {
            return Err(ContextError::TooManyOverrides(self.overrides.len()));
        }
        let mut seen = BTreeSet::new();
        for (index, Override { service, revision }) in self.overrides.iter().enumerate() {
            if !is_service(service) {
                return Err(ContextError::BadService { index, service: shorten(service) });
            }
            if !is_revision(revision) {
                return Err(ContextError::BadRevision { index, revision: shorten(revision) });
            }
            if !seen.insert(split_service(service)) {
                return Err(ContextError::DuplicateService(service.clone()));
            }
        }
        Ok(())
    }
}

/// The overrides that a request's headers name. `None`, at the cost of three lookups, when no header carries any.
///
/// The first header that has the item wins. An unreadable header of a higher precedence is an error, not a
/// reason to look further: what a request means must not depend on which of its headers was damaged.
#[must_use]
pub fn overrides_from_headers(headers: &HeaderMap) -> Option<Result<Overrides, ContextError>> {
    if let Some(value) = headers.get(OT_SPAN_CONTEXT) {
        match decode_ot_span_context(value.as_bytes()) {
            Err(error) => return Some(Err(error)),
            Ok(context) => {
                if let Some(item) = context.baggage.get(BAGGAGE_ITEM) {
                    return Some(Overrides::from_baggage_item(item));
                }
            }
        }
    }
    if let Some(value) = headers.get(OT_BAGGAGE_OVERRIDES) {
        // Anything that is not text is not base64 either, so the lossy form keeps the error.
        return Some(Overrides::from_baggage_item(&String::from_utf8_lossy(value.as_bytes())));
    }
    if headers.contains_key(BAGGAGE) {
        return w3c_baggage::find_item(headers.get_all(BAGGAGE).iter().map(|value| value.as_bytes()), BAGGAGE_ITEM)
            .map(|item| item.and_then(|item| Overrides::from_baggage_item(&item)));
    }
    None
}

/// `name` and `name.namespace` split, with the default namespace filled in.
#[must_use]
pub fn split_service(service: &str) -> (&str, &str) {
    service.split_once('.').unwrap_or((service, DEFAULT_NAMESPACE))
}

fn decode_base64(what: &'static str, value: &[u8]) -> Result<Vec<u8>, ContextError> {
    if value.len() > MAX_HEADER_BYTES {
        return Err(ContextError::TooLong { what, bytes: value.len(), limit: MAX_HEADER_BYTES });
    }
    STANDARD.decode(value).map_err(|error| ContextError::Base64 { what, reason: error.to_string() })
}

fn is_service(service: &str) -> bool {
    let (name, namespace) = split_service(service);
    service.len() <= MAX_SERVICE_BYTES && is_dns_label(name) && is_dns_label(namespace)
}

/// Whether `label` could be the name of a Kubernetes service or namespace (RFC 1123: a-z, 0-9 and inner `-`).
fn is_dns_label(label: &str) -> bool {
    let bytes = label.as_bytes();
    (1..=63).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-')
        && bytes.first() != Some(&b'-')
        && bytes.last() != Some(&b'-')
}

fn is_revision(revision: &str) -> bool {
    let bytes = revision.as_bytes();
    (1..=MAX_REVISION_BYTES).contains(&bytes.len())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// The first characters of a value from outside, for an error message.
fn shorten(value: &str) -> String {
    const SHOWN: usize = 64;
    match value.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &value[..end]),
        None => value.to_owned(),
    }
}

#[cfg(test)]
mod tests;
