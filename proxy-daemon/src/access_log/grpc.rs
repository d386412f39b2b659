//! `GRPC_STATUS` and `GRPC_STATUS_NUMBER`.

use http::{HeaderName, header::CONTENT_TYPE};

use super::{
    Headers, Record,
    fields::{missing, number},
    format::Part,
};
use crate::grpc_status;

static GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

/// By their numbers: as Envoy and as `absl` call them.
const NAMES: [(&str, &str); 17] = [
    ("OK", "OK"),
    ("Canceled", "CANCELLED"),
    ("Unknown", "UNKNOWN"),
    ("InvalidArgument", "INVALID_ARGUMENT"),
    ("DeadlineExceeded", "DEADLINE_EXCEEDED"),
    ("NotFound", "NOT_FOUND"),
    ("AlreadyExists", "ALREADY_EXISTS"),
    ("PermissionDenied", "PERMISSION_DENIED"),
    ("ResourceExhausted", "RESOURCE_EXHAUSTED"),
    ("FailedPrecondition", "FAILED_PRECONDITION"),
    ("Aborted", "ABORTED"),
    ("OutOfRange", "OUT_OF_RANGE"),
    ("Unimplemented", "UNIMPLEMENTED"),
    ("Internal", "INTERNAL"),
    ("Unavailable", "UNAVAILABLE"),
    ("DataLoss", "DATA_LOSS"),
    ("Unauthenticated", "UNAUTHENTICATED"),
];

/// How a status is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StatusForm {
    /// `NotFound`
    Camel,
    /// `NOT_FOUND`
    Snake,
    /// `5`
    Number,
}

impl StatusForm {
    /// Of this name; none is the first.
    pub(super) fn parse(name: &str) -> Option<StatusForm> {
        Some(match name {
            "" | "CAMEL_STRING" => StatusForm::Camel,
            "SNAKE_STRING" => StatusForm::Snake,
            "NUMBER" => StatusForm::Number,
            _ => return None,
        })
    }

    /// Appends the status of a gRPC request; there is none of others.
    pub(super) fn write(self, out: &mut Vec<u8>, record: &Record<'_>) {
        let content_type = record.request_headers.and_then(|headers| headers.get(&CONTENT_TYPE));
        let rest = content_type.and_then(|content_type| content_type.as_bytes().strip_prefix(b"application/grpc"));
        if !matches!(rest, Some([] | [b'+', ..])) {
            return missing(out, record);
        }
        let said = told(record.response_trailers).or_else(|| told(record.response_headers));
        let status = match (said, record.response_code) {
            (Some(status), _) => status,
            (None, 0) => return missing(out, record),
            (None, code) => Some(grpc_status::of_http(code).into()),
        };
        // What is no number.
        let Some(status) = status else { return out.extend_from_slice(b"-1") };
        let name = usize::try_from(status).ok().and_then(|status| NAMES.get(status));
        match (self, name) {
            (StatusForm::Camel, Some((camel, _))) => out.extend_from_slice(camel.as_bytes()),
            (StatusForm::Snake, Some((_, snake))) => out.extend_from_slice(snake.as_bytes()),
            _ => number(out, status),
        }
    }
}

/// The header of such a part that a status is made of.
pub(super) fn header(part: Part) -> &'static HeaderName {
    match part {
        Part::Request => &CONTENT_TYPE,
        Part::Response | Part::Trailers => &GRPC_STATUS,
    }
}

/// The status of any request: that of its HTTP status where the answer tells none, UNKNOWN (2) where there is neither; `None`:
/// something that is none.
pub(super) fn status_or_unknown(record: &Record<'_>) -> Option<u64> {
    let said = told(record.response_trailers).or_else(|| told(record.response_headers));
    said.unwrap_or(Some(match record.response_code {
        0 => 2,
        code => grpc_status::of_http(code).into(),
    }))
}

/// The status that is told there; `Some(None)`: something that is none.
fn told(headers: Option<Headers<'_>>) -> Option<Option<u64>> {
    let value = headers?.get(&GRPC_STATUS).filter(|value| !value.is_empty())?;
    Some(value.to_str().ok().and_then(|value| value.parse().ok()))
}
