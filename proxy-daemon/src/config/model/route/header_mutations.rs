use std::sync::Arc;

use http::{HeaderName, HeaderValue};

use crate::access_log::HeaderFormat;

/// `request_headers_to_add` and its kin, in the order in which they are applied: removals first.
#[derive(Debug, Default, Clone)]
pub struct HeaderMutations {
    /// `request_headers_to_remove`
    pub request_remove: Vec<HeaderName>,
    /// `request_headers_to_add`
    pub request_add: Vec<HeaderAdd>,
    /// `response_headers_to_remove`
    pub response_remove: Vec<HeaderName>,
    /// `response_headers_to_add`
    pub response_add: Vec<HeaderAdd>,
}

impl HeaderMutations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.request_remove.is_empty()
            && self.request_add.is_empty()
            && self.response_remove.is_empty()
            && self.response_add.is_empty()
    }
}

/// One `HeaderValueOption`.
#[derive(Debug, Clone)]
pub struct HeaderAdd {
    /// The header.
    pub name: HeaderName,
    /// Its value.
    pub value: AddedValue,
    /// It is added even where it is empty.
    pub keep_empty_value: bool,
    /// What happens where the header is there already.
    pub action: HeaderAppendAction,
}

/// The value of a header that is added.
#[derive(Debug, Clone)]
pub enum AddedValue {
    /// Always the same.
    Literal(HeaderValue),
    /// Made anew for each message; what is missing is empty.
    Format(Arc<HeaderFormat>),
}

/// `HeaderValueOption.HeaderAppendAction`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderAppendAction {
    /// A further value.
    AppendIfExistsOrAdd,
    /// Only where there is none.
    AddIfAbsent,
    /// In place of what is there.
    OverwriteIfExistsOrAdd,
    /// In place of what is there, and nothing where there is none.
    OverwriteIfExists,
}
