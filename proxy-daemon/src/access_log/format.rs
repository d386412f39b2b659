//! Envoy's format strings: compiled once, then written without looking at the text again.

use std::str::FromStr as _;

use envoy_types::pb::google::protobuf::value::Kind;
use http::HeaderName;

use crate::http::metadata::{Metadata, Told, read_from};

use super::{
    Headers, Record,
    fields::{FIELDS, Field, missing},
    json_text,
    operators::Special,
    time::{self, TimeFormat},
};

/// What a log without a format of its own writes.
const ENVOY_DEFAULT: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
    %RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
    %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
    \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// The operators of Envoy 1.40, one a line: some are not to be had here.
const ENVOY_OPERATORS: &str = include_str!("envoy_operators.txt");

/// A compiled format.
#[derive(Debug)]
pub(super) struct Format(Vec<Op>);

/// Why a format string is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("{text:?}: no valid operator begins at position {position}; a percent sign is written %%")]
    Syntax { text: String, position: usize },
    #[error("%{name}% is not an operator that culvert knows; docs/stats.md lists them")]
    UnknownOperator { name: String },
    #[error("%{name}% is not supported by culvert yet; docs/stats.md lists the operators that are")]
    NotSupported { name: String },
    #[error("%{name}% needs a header's name in brackets, as in %{name}(USER-AGENT)%")]
    NeedsHeader { name: &'static str },
    #[error("%{name}%: {header:?} is not a header's name")]
    BadHeader { name: &'static str, header: String },
    #[error("%{name}% takes at most one alternative: %{name}(FIRST?SECOND)%")]
    Alternatives { name: &'static str },
    #[error("%{name}% takes neither brackets nor a length")]
    TakesNothing { name: String },
    #[error("%{name}%: {text}")]
    Arguments { name: String, text: String },
    #[error("%START_TIME%: {0}")]
    Time(String),
    #[error("is nested too deeply")]
    TooDeep,
}

#[derive(Debug)]
pub(super) enum Op {
    Text(Box<str>),
    StartTime,
    StartTimeAs(TimeFormat),
    Request(HeaderChoice),
    /// `REQ_WITHOUT_QUERY`
    RequestWithoutQuery(HeaderChoice),
    Response(HeaderChoice),
    Trailer(HeaderChoice),
    Field(Field),
    Metadata(MetadataPath),
    Special(Special),
}

/// `NAMESPACE:key:key`
#[derive(Debug)]
pub(super) struct MetadataPath {
    namespace: Box<str>,
    path: Box<[Box<str>]>,
    max_len: usize,
}

impl MetadataPath {
    /// Reads what is in the brackets.
    pub(super) fn parse(text: &str, max_len: usize) -> MetadataPath {
        let mut parts = text.split(':').map(Box::from);
        MetadataPath { namespace: read_from(&parts.next().unwrap_or_default()), path: parts.collect(), max_len }
    }

    /// Appends the value.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>, metadata: Option<&Metadata>) {
        let before = out.len();
        match metadata.and_then(|metadata| metadata.find(&self.namespace, &self.path)) {
            Some(told) => told.write(out),
            None => return missing(out, record),
        }
        out.truncate(before.saturating_add(self.max_len));
    }

    /// Appends the value as JSON; false where there is none.
    pub(super) fn write_json(&self, out: &mut Vec<u8>, metadata: Option<&Metadata>) -> bool {
        let told = metadata.and_then(|metadata| metadata.find(&self.namespace, &self.path));
        match told {
            Some(Told::Value(Kind::StringValue(text))) => {
                json_text::string(out, &text.as_bytes()[..text.len().min(self.max_len)]);
            }
            Some(Told::Value(kind)) => json_text::value(out, kind),
            Some(Told::Fields(fields)) => json_text::object(out, fields),
            None => {}
        }
        told.is_some()
    }
}

/// `X?Y` and `:N`.
#[derive(Debug)]
pub(super) struct HeaderChoice {
    first: Header,
    second: Option<Header>,
    max_len: usize,
}

/// A part of the two messages that has headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Request,
    Response,
    Trailers,
}

#[derive(Debug)]
pub(super) enum Header {
    Name(HeaderName),
    Method,
    Path,
    Authority,
    Scheme,
    Status,
}

impl Format {
    /// Envoy's default format.
    pub(super) fn envoy_default() -> Format {
        // Its own test parses it: only then could it be refused.
        Format::parse(ENVOY_DEFAULT).unwrap_or(Format(Vec::new()))
    }

    /// Compiles `text`.
    pub(super) fn parse(text: &str) -> Result<Format, FormatError> {
        let mut ops = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('%') {
            plain.push_str(&rest[..at]);
            rest = &rest[at..];
            if let Some(after) = rest.strip_prefix("%%") {
                plain.push('%');
                rest = after;
                continue;
            }
            let position = text.len() - rest.len();
            let syntax = || FormatError::Syntax { text: text.to_owned(), position };
            let (operator, after) = Operator::split(rest).ok_or_else(syntax)?;
            if !plain.is_empty() {
                ops.push(Op::Text(std::mem::take(&mut plain).into()));
            }
            ops.push(operator.compile()?);
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            ops.push(Op::Text(plain.into()));
        }
        Ok(Format(ops))
    }

    /// Its operators and the texts between them.
    pub(super) fn ops(&self) -> &[Op] {
        &self.0
    }

    /// All operators, also those within others.
    fn all_ops(&self) -> impl Iterator<Item = &Op> + Clone {
        self.0.iter().flat_map(|op| match op {
            Op::Special(Special::Coalesce(ops)) => &ops[..],
            op => std::slice::from_ref(op),
        })
    }

    /// Whether it shows how long headers are.
    pub(super) fn shows_header_bytes(&self) -> bool {
        self.all_ops().any(|op| matches!(op, Op::Field(Field::HeaderBytes(_))))
    }

    /// The headers of a part of the messages that the format looks at.
    pub(super) fn headers(&self, part: Part) -> impl Iterator<Item = &HeaderName> {
        let ops = self.all_ops();
        let choices = ops.clone().filter_map(move |op| match (op, part) {
            (Op::Request(choice) | Op::RequestWithoutQuery(choice), Part::Request)
            | (Op::Response(choice), Part::Response)
            | (Op::Trailer(choice), Part::Trailers) => Some(choice),
            _ => None,
        });
        let headers = choices.flat_map(|choice| [Some(&choice.first), choice.second.as_ref()]).flatten();
        let named = headers.filter_map(|header| if let Header::Name(name) = header { Some(name) } else { None });
        let special = ops.filter_map(move |op| match op {
            Op::Special(special) => Some(special.headers(part)),
            _ => None,
        });
        named.chain(special.flatten())
    }

    /// Whether it is one operator, or one text.
    pub(super) fn is_single(&self) -> bool {
        self.0.len() == 1
    }

    /// The text, where it is always the same.
    pub(super) fn literal(&self) -> Option<&str> {
        match self.0.as_slice() {
            [] => Some(""),
            [Op::Text(text)] => Some(text),
            _ => None,
        }
    }

    /// Appends the line.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>) {
        self.0.iter().for_each(|op| op.write(out, record));
    }
}

impl Op {
    /// Appends what it stands for.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>) {
        match self {
            Op::Text(text) => out.extend_from_slice(text.as_bytes()),
            Op::StartTime => time::write_default(out, record.start),
            Op::StartTimeAs(format) => format.write(out, record.start),
            Op::Request(choice) => choice.write(out, record, record.request_headers, |value| value),
            Op::RequestWithoutQuery(choice) => choice.write(out, record, record.request_headers, without_query),
            Op::Response(choice) => choice.write(out, record, record.response_headers, |value| value),
            Op::Trailer(choice) => choice.write(out, record, record.response_trailers, |value| value),
            Op::Field(field) => field.write(out, record),
            Op::Metadata(path) => path.write(out, record, record.metadata),
            Op::Special(special) => special.write(out, record),
        }
    }
}

/// `%NAME(arguments):length%`, taken apart.
pub(super) struct Operator<'a> {
    pub(super) name: &'a str,
    pub(super) arguments: Option<&'a str>,
    pub(super) length: Option<usize>,
}

impl<'a> Operator<'a> {
    /// The operator that `text` begins with, and what follows it.
    fn split(text: &'a str) -> Option<(Operator<'a>, &'a str)> {
        let text = text.strip_prefix('%')?;
        let end = text.find(|c: char| !c.is_ascii_uppercase() && !c.is_ascii_digit() && c != '_')?;
        let (name, mut rest) = text.split_at(end);
        if name.is_empty() {
            return None;
        }
        let mut arguments = None;
        if let Some(inner) = rest.strip_prefix('(') {
            // Up to the first bracket that ends the operator: a time format may hold percent signs.
            let close = inner.match_indices(')').map(|(at, _)| at).find(|at| {
                let after = inner[at + 1..].trim_start_matches(|c: char| c == ':' || c.is_ascii_digit());
                after.starts_with('%')
            })?;
            arguments = Some(&inner[..close]);
            rest = &inner[close + 1..];
        }
        let mut length = None;
        if let Some(digits) = rest.strip_prefix(':') {
            let end = digits.find('%')?;
            length = Some(digits[..end].parse().ok()?);
            rest = &digits[end..];
        }
        Some((Operator { name, arguments, length }, rest.strip_prefix('%')?))
    }

    pub(super) fn compile(self) -> Result<Op, FormatError> {
        if let Some(special) = Special::parse(&self)? {
            return Ok(Op::Special(special));
        }
        let max_len = self.length.unwrap_or(usize::MAX);
        match self.name {
            "REQ_WITHOUT_QUERY" => HeaderChoice::parse("REQ", self).map(Op::RequestWithoutQuery),
            "REQ" | "REQUEST_HEADER" => HeaderChoice::parse("REQ", self).map(Op::Request),
            "RESP" | "RESPONSE_HEADER" => HeaderChoice::parse("RESP", self).map(Op::Response),
            "TRAILER" | "RESPONSE_TRAILER" => HeaderChoice::parse("TRAILER", self).map(Op::Trailer),
            "STREAM_ID" if self.arguments.is_none() && self.length.is_none() => {
                let first = Header::Name(HeaderName::from_static("x-request-id"));
                Ok(Op::Request(HeaderChoice { first, second: None, max_len }))
            }
            "DYNAMIC_METADATA" => Ok(Op::Metadata(MetadataPath::parse(self.arguments.unwrap_or_default(), max_len))),
            // The others have been looked at before.
            "METADATA" => {
                let path = self.arguments.and_then(|path| path.strip_prefix("DYNAMIC:")).unwrap_or_default();
                Ok(Op::Metadata(MetadataPath::parse(path, max_len)))
            }
            "START_TIME" => match (self.arguments, self.length) {
                (None | Some(""), None) => Ok(Op::StartTime),
                (Some(format), None) => TimeFormat::parse(format).map(Op::StartTimeAs).map_err(FormatError::Time),
                (_, Some(_)) => Err(FormatError::Time("takes no length".into())),
            },
            name => match FIELDS.iter().find(|(known, _)| *known == name) {
                Some((_, field)) if self.arguments.is_none() && self.length.is_none() => Ok(Op::Field(*field)),
                Some(_) => Err(FormatError::TakesNothing { name: name.to_owned() }),
                None if ENVOY_OPERATORS.lines().any(|known| known == name) => {
                    Err(FormatError::NotSupported { name: name.to_owned() })
                }
                None => Err(FormatError::UnknownOperator { name: name.to_owned() }),
            },
        }
    }
}

impl HeaderChoice {
    fn parse(name: &'static str, operator: Operator<'_>) -> Result<HeaderChoice, FormatError> {
        let mut names = operator.arguments.unwrap_or("").split('?');
        let first = match names.next() {
            None | Some("") => return Err(FormatError::NeedsHeader { name }),
            Some(first) => Header::parse(name, first)?,
        };
        let second = names.next().map(|second| Header::parse(name, second)).transpose()?;
        if names.next().is_some() {
            return Err(FormatError::Alternatives { name });
        }
        Ok(HeaderChoice { first, second, max_len: operator.length.unwrap_or(usize::MAX) })
    }

    fn write<'r>(
        &self,
        out: &mut Vec<u8>,
        record: &Record<'r>,
        headers: Option<Headers<'r>>,
        part: impl FnOnce(&'r [u8]) -> &'r [u8],
    ) {
        if let Header::Status = self.first {
            return Field::ResponseCode.write(out, record);
        }
        let value = self.first.value(record, headers);
        let value = value.or_else(|| self.second.as_ref().and_then(|second| second.value(record, headers)));
        match value.map(part) {
            Some(value) => out.extend_from_slice(&value[..value.len().min(self.max_len)]),
            None => missing(out, record),
        }
    }
}

/// A path without what follows its first `?`.
fn without_query(path: &[u8]) -> &[u8] {
    path.split(|byte| *byte == b'?').next().unwrap_or_default()
}

impl Header {
    /// `operator`: the one that it stands in; it knows pseudo-headers.
    pub(super) fn parse(operator: &'static str, name: &str) -> Result<Header, FormatError> {
        Ok(match (operator, name.to_ascii_lowercase().as_str()) {
            ("REQ", ":method") => Header::Method,
            ("REQ", ":path") => Header::Path,
            ("REQ", ":authority" | "host") => Header::Authority,
            ("REQ", ":scheme") => Header::Scheme,
            ("RESP", ":status") => Header::Status,
            (_, lower) => Header::Name(
                HeaderName::from_str(lower)
                    .map_err(|_| FormatError::BadHeader { name: operator, header: name.to_owned() })?,
            ),
        })
    }

    /// The first value; none of `:status`.
    pub(super) fn value<'a>(&self, record: &Record<'a>, headers: Option<Headers<'a>>) -> Option<&'a [u8]> {
        match self {
            // Of several values the first, as in Envoy.
            Header::Name(name) => headers?.get(name).map(|value| value.as_bytes()),
            Header::Method => record.method.map(str::as_bytes),
            Header::Path => record.path.map(str::as_bytes),
            Header::Authority => record.authority.map(str::as_bytes),
            Header::Scheme => record.scheme.map(str::as_bytes),
            Header::Status => None,
        }
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
