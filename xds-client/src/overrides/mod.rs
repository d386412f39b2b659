//! What a request says about overrides: the codec of the [`Overrides`] message and of the headers that carry it.
//!
//! The message travels in the baggage item [`BAGGAGE_ITEM`], as standard padded base64 of its bytes. Baggage rides in
//! one of these headers, in this order of precedence:
//!
//! 1. `x-ot-span-context` (see [`SpanContext`]),
//! 2. `ot-baggage-overrides`, the item's own header of the text form of the same propagation format,
//! 3. `baggage` (see [`Baggage`]),
//! 4. `uberctx-overrides`, the item's own header of Jaeger's format, percent-encoded,
//! 5. `jaeger-baggage`, which Jaeger's clients take from people and write like W3C's,
//! 6. `baggage-overrides`, the item's own header beside B3.
//!
//! All of it comes from outside: every function here bounds what it reads and none panics on any input.

mod carriers;
pub mod contexts;
mod fuzz;
mod message;
mod ot_span_context;
mod signature;
mod trace;
mod w3c_baggage;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderName;

pub use self::carriers::{Found, carries_overrides, find, overrides_from_headers, strip};
#[doc(hidden)]
pub use self::fuzz::fuzz;
pub use self::ot_span_context::{SpanContext, decode_ot_span_context, encode_ot_span_context};
pub use self::signature::{MIN_KEY_BYTES, key_of_file};
pub use self::trace::{has_trace_context, set_sampled};
pub use self::w3c_baggage::{Baggage, MAX_BAGGAGE_BYTES, MAX_BAGGAGE_MEMBERS, format_baggage, parse_baggage};
pub use crate::api::culvert::overrides::v1::{Action, ConfigValue, Fault, Override, OverrideShare, Overrides, Signed};

/// The header that carries a whole span context, baggage included.
pub const OT_SPAN_CONTEXT: HeaderName = HeaderName::from_static("x-ot-span-context");
/// The header that carries only the baggage item [`BAGGAGE_ITEM`].
pub const OT_BAGGAGE_OVERRIDES: HeaderName = HeaderName::from_static("ot-baggage-overrides");
/// The W3C baggage header.
pub const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
/// The header of Jaeger's format that carries only the baggage item [`BAGGAGE_ITEM`].
pub const UBERCTX_OVERRIDES: HeaderName = HeaderName::from_static("uberctx-overrides");
/// The header in which Jaeger's clients take baggage from people.
pub const JAEGER_BAGGAGE: HeaderName = HeaderName::from_static("jaeger-baggage");
/// The header beside B3 that carries only the baggage item [`BAGGAGE_ITEM`].
pub const BAGGAGE_OVERRIDES: HeaderName = HeaderName::from_static("baggage-overrides");
/// All headers that may carry overrides, in the order of their precedence.
pub const CARRIERS: [HeaderName; 6] =
    [OT_SPAN_CONTEXT, OT_BAGGAGE_OVERRIDES, BAGGAGE, UBERCTX_OVERRIDES, JAEGER_BAGGAGE, BAGGAGE_OVERRIDES];
/// What a service is told for one request: members as in W3C baggage.
pub const CONFIG: HeaderName = HeaderName::from_static("x-culvert-config");
/// The request header by which a client asks what was done about its overrides.
pub const DEBUG: HeaderName = HeaderName::from_static("x-culvert-override-debug");
/// The response header that says so.
pub const OUTCOME: HeaderName = HeaderName::from_static("x-culvert-override");

/// The shortest and the longest token of a share, in bytes.
pub const SHARE_TOKEN_BYTES: std::ops::RangeInclusive<usize> = 8..=64;

/// The key of the baggage item that holds an [`Overrides`] message.
pub const BAGGAGE_ITEM: &str = "overrides";
const BAGGAGE_ITEM_NAME: &str = "baggage item `overrides`";
/// The one version of [`Overrides`] that is defined.
pub const VERSION: u32 = 1;
/// The most entries an [`Overrides`] message may have.
pub const MAX_OVERRIDES: usize = 64;
/// The longest service name, in bytes: that of a DNS name.
pub const MAX_SERVICE_BYTES: usize = 253;
/// The longest revision, in bytes: that of a Kubernetes label value.
pub const MAX_REVISION_BYTES: usize = 63;
/// The most settings that one override may pass on.
pub const MAX_CONFIG_VALUES: usize = 16;
/// The longest name of a setting, in bytes.
pub const MAX_CONFIG_NAME_BYTES: usize = 64;
/// The longest value of a setting, in bytes.
pub const MAX_CONFIG_VALUE_BYTES: usize = 256;
/// The longest header value that is looked at, in bytes. An `Overrides` message at its limits fits.
pub const MAX_HEADER_BYTES: usize = 64 * 1024;

/// The namespace of a service that is named without one.
pub const DEFAULT_NAMESPACE: &str = "default";

/// Why a header or an `Overrides` message cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ContextError {
    /// A token that is none.
    #[error("share `{0}` is not a token (8 to 64 of a-z0-9)")]
    BadShare(String),
    /// A share that stands for a share.
    #[error("a share cannot stand for another share")]
    NestedShare,
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
    /// An override that says a service, and not what is to be different about it.
    #[error("overrides[{index}] asks for nothing")]
    NothingAsked {
        /// Position of the entry.
        index: usize,
    },
    /// A part of an override that is not what it has to be.
    #[error("overrides[{index}].{field} {reason}")]
    BadField {
        /// Position of the entry.
        index: usize,
        /// Which part.
        field: &'static str,
        /// What it has to be.
        reason: &'static str,
    },
    /// A header, or a member of one, is there twice and does not say the same.
    #[error("{what} is there twice, and says different things")]
    Contradicts {
        /// Which header.
        what: &'static str,
    },
    /// A message with a signature that is not formed as it has to be.
    #[error("the signed message {0}")]
    BadSigned(&'static str),
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

/// Whether `token` can be that of a share.
#[must_use]
pub fn is_share_token(token: &str) -> bool {
    SHARE_TOKEN_BYTES.contains(&token.len()) && token.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
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
