//! Operators of formats that take arguments of their own kinds.

use std::{
    sync::LazyLock,
    time::{Instant, SystemTime},
};

use http::HeaderName;

use crate::http::{path::decode, request_id::random_uuid};

use super::{
    Record, Times,
    fields::{missing, number},
    format::{FormatError, MetadataPath, Op, Operator, Part},
    grpc,
    json::NOTHING,
    json_text,
    time::{self, TimeFormat},
};

static X_ENVOY_ORIGINAL_PATH: HeaderName = HeaderName::from_static("x-envoy-original-path");

/// The machine's name; `None` where it has none.
static HOSTNAME: LazyLock<Option<Box<str>>> = LazyLock::new(|| {
    let name = nix::sys::utsname::uname().ok()?.nodename().to_string_lossy().into_owned();
    Some(name).filter(|name| !name.is_empty()).map(Into::into)
});

/// What such an operator writes.
#[derive(Debug)]
pub(super) enum Special {
    /// What is known when the format is compiled: `HOSTNAME`, `ENVIRONMENT`.
    Known(Option<Box<str>>),
    /// `PATH`
    Path { with_query: bool, which: WhichPath, max_len: usize },
    /// `QUERY_PARAM`: the first value, decoded.
    QueryParam { name: Box<str>, max_len: usize },
    /// `QUERY_PARAMS`: all of the query as it is.
    QueryParams { max_len: usize },
    /// `METADATA(ROUTE:...)`
    RouteMetadata(MetadataPath),
    /// `UNIQUE_ID`
    UniqueId,
    /// `EMIT_TIME`
    EmitTime(Option<TimeFormat>),
    /// `GRPC_STATUS`, `GRPC_STATUS_NUMBER`
    GrpcStatus(grpc::StatusForm),
    /// `COMMON_DURATION`
    CommonDuration { from: TimePoint, to: TimePoint, per_second: u128 },
    /// `FILTER_STATE(envoy.filters.http.grpc_stats:PLAIN)`
    GrpcMessages { max_len: usize },
    /// `FILTER_STATE` of another key
    FilterState { key: Box<str>, form: StateForm, max_len: usize },
    /// `COALESCE`: the first that has something to say.
    Coalesce(Box<[Op]>),
}

/// How an object of the filter state is shown. All of them are texts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StateForm {
    /// As it is.
    Plain,
    /// As JSON.
    Typed,
    /// A part of it: texts have none.
    Field,
}

/// Which path.
#[derive(Debug, Clone, Copy)]
pub(super) enum WhichPath {
    Original,
    Current,
    OriginalOrCurrent,
}

impl Special {
    /// The operator of this name; `None`: it is none of these.
    pub(super) fn parse(operator: &Operator<'_>) -> Result<Option<Special>, FormatError> {
        let refuse = |text: &str| FormatError::Arguments { name: operator.name.to_owned(), text: text.to_owned() };
        let max_len = operator.length.unwrap_or(usize::MAX);
        let arguments = operator.arguments.unwrap_or_default();
        let without_length = || match operator.length {
            None => Ok(()),
            Some(_) => Err(refuse("takes no length")),
        };
        Ok(Some(match operator.name {
            "HOSTNAME" if operator.arguments.is_none() && operator.length.is_none() => Special::Known(HOSTNAME.clone()),
            "ENVIRONMENT" if arguments.is_empty() => return Err(refuse("needs a variable's name in brackets")),
            "ENVIRONMENT" => {
                // Not what stands for other things that are not there.
                let value = std::env::var_os(arguments).unwrap_or_else(|| "-".into());
                Special::Known(Some(value.to_string_lossy().chars().take(max_len).collect::<String>().into()))
            }
            "PATH" => {
                let (query, which) = arguments.split_once(':').unwrap_or((arguments, ""));
                let with_query = match query {
                    "" | "WQ" => true,
                    "NQ" => false,
                    _ => return Err(refuse("the first argument must be WQ or NQ")),
                };
                let which = match which {
                    "ORIG" => WhichPath::Original,
                    "PATH" => WhichPath::Current,
                    "" | "ORIG_OR_PATH" => WhichPath::OriginalOrCurrent,
                    _ => return Err(refuse("the second argument must be ORIG, PATH or ORIG_OR_PATH")),
                };
                Special::Path { with_query, which, max_len }
            }
            "QUERY_PARAM" if arguments.is_empty() => return Err(refuse("needs a parameter's name in brackets")),
            "QUERY_PARAM" => Special::QueryParam { name: arguments.into(), max_len },
            "QUERY_PARAMS" if matches!(arguments, "" | "ORIG") => Special::QueryParams { max_len },
            "QUERY_PARAMS" => return Err(refuse("only ORIG is supported by culvert yet")),
            "METADATA" => match arguments.split_once(':') {
                Some(("ROUTE", path)) => Special::RouteMetadata(MetadataPath::parse(path, max_len)),
                Some(("DYNAMIC", _)) => return Ok(None),
                _ => return Err(refuse("only DYNAMIC and ROUTE are supported by culvert yet")),
            },
            "FILTER_STATE" if arguments == "envoy.filters.http.grpc_stats:PLAIN" => Special::GrpcMessages { max_len },
            "FILTER_STATE" if arguments.split(':').next() == Some("envoy.filters.http.grpc_stats") => {
                return Err(refuse("only PLAIN is supported by culvert of envoy.filters.http.grpc_stats yet"));
            }
            "FILTER_STATE" => {
                let mut parts = arguments.split(':');
                let key = parts.next().filter(|key| !key.is_empty());
                let key = key.ok_or_else(|| refuse("Invalid filter state configuration, key cannot be empty."))?;
                let form = match (parts.next(), parts.next()) {
                    (None | Some("TYPED"), None) => StateForm::Typed,
                    (Some("PLAIN"), None) => StateForm::Plain,
                    (Some("FIELD"), Some(field)) if !field.is_empty() => StateForm::Field,
                    _ => return Err(refuse("the second argument must be PLAIN, TYPED or FIELD with a field's name")),
                };
                Special::FilterState { key: key.into(), form, max_len }
            }
            "UNIQUE_ID" if operator.arguments.is_none() && operator.length.is_none() => Special::UniqueId,
            "EMIT_TIME" => {
                without_length()?;
                let format = (!arguments.is_empty()).then(|| TimeFormat::parse(arguments));
                Special::EmitTime(format.transpose().map_err(|text| refuse(&text))?)
            }
            "GRPC_STATUS" => {
                without_length()?;
                let form = grpc::StatusForm::parse(arguments);
                Special::GrpcStatus(form.ok_or_else(|| refuse("takes CAMEL_STRING, SNAKE_STRING or NUMBER"))?)
            }
            "GRPC_STATUS_NUMBER" if operator.arguments.is_none() && operator.length.is_none() => {
                Special::GrpcStatus(grpc::StatusForm::Number)
            }
            "COMMON_DURATION" => {
                without_length()?;
                common_duration(arguments).ok_or_else(|| {
                    refuse("needs two points in time and a precision (ms, us or ns), as in DS_RX_BEG:DS_TX_END:ms")
                })?
            }
            "COALESCE" => Special::Coalesce(coalesce(arguments).map_err(|text| refuse(&text))?),
            _ => return Ok(None),
        }))
    }

    /// The header of such a part that it looks at.
    pub(super) fn headers(&self, part: Part) -> Option<&'static HeaderName> {
        match (self, part) {
            (Special::Path { .. }, Part::Request) => Some(&X_ENVOY_ORIGINAL_PATH),
            (Special::GrpcStatus(_), part) => Some(grpc::header(part)),
            _ => None,
        }
    }

    /// Whether it is a number.
    pub(super) fn is_number(&self) -> bool {
        matches!(self, Special::GrpcStatus(grpc::StatusForm::Number) | Special::CommonDuration { .. })
    }

    /// Appends what `record` says.
    pub(super) fn write(&self, out: &mut Vec<u8>, record: &Record<'_>) {
        match self {
            Special::Known(Some(text)) => out.extend_from_slice(text.as_bytes()),
            Special::Known(None) => missing(out, record),
            Special::Path { with_query, which, max_len } => {
                let path = path(*which, record);
                let path = path.map(|path| if *with_query { path } else { path.split('?').next().unwrap_or_default() });
                cut(out, record, path, *max_len);
            }
            Special::QueryParam { name, max_len } => {
                let query = record.path.and_then(|path| Some(path.split_once('?')?.1));
                let found = query.and_then(|query| {
                    let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
                    let mut decoded = pairs.map(|(name, value)| (decode(name), value));
                    decoded.find(|(known, _)| **known == *name.as_bytes()).map(|(_, value)| decode(value))
                });
                match found {
                    Some(value) => out.extend_from_slice(&value[..value.len().min(*max_len)]),
                    None => missing(out, record),
                }
            }
            Special::QueryParams { max_len } => {
                let query = record.path.and_then(|path| Some(path.split_once('?')?.1));
                cut(out, record, query, *max_len);
            }
            Special::RouteMetadata(path) => path.write(out, record, record.route_metadata),
            Special::UniqueId => out.extend_from_slice(&random_uuid()),
            Special::GrpcStatus(form) => form.write(out, record),
            Special::CommonDuration { from, to, per_second } => {
                match Times::between(from(&record.times), to(&record.times)) {
                    Some(time) => {
                        let units = time.as_nanos() * per_second / 1_000_000_000;
                        number(out, u64::try_from(units).unwrap_or(u64::MAX));
                    }
                    None => missing(out, record),
                }
            }
            Special::GrpcMessages { max_len } => {
                let text = record.grpc_messages.map(|(requests, responses)| format!("{requests},{responses}"));
                cut(out, record, text.as_deref(), *max_len);
            }
            Special::FilterState { key, form, max_len } => {
                let state = record.metadata.and_then(|metadata| metadata.state(key));
                match (form, state) {
                    (StateForm::Plain, Some(state)) => {
                        out.extend_from_slice(&state.text[..state.text.len().min(*max_len)]);
                    }
                    (StateForm::Typed, Some(state)) => {
                        let start = out.len();
                        json_text::string(out, &state.text);
                        out.truncate(start.saturating_add(*max_len));
                    }
                    (StateForm::Field, _) | (_, None) => missing(out, record),
                }
            }
            Special::EmitTime(None) => time::write_default(out, SystemTime::now()),
            Special::EmitTime(Some(format)) => format.write(out, SystemTime::now()),
            Special::Coalesce(ops) => {
                let before = out.len();
                let asked = Record { missing: NOTHING, ..*record };
                for op in ops {
                    op.write(out, &asked);
                    if !matches!(&out[before..], [] | b"\0") {
                        return;
                    }
                    out.truncate(before);
                }
                missing(out, record);
            }
        }
    }
}

/// One of the points in time of a request.
type TimePoint = fn(&Times) -> Option<Instant>;

/// Those that `COMMON_DURATION` names.
const TIME_POINTS: &[(&str, TimePoint)] = &[
    ("DS_RX_BEG", |times| times.began),
    ("DS_RX_END", |times| times.request_end),
    ("US_CX_BEG", |times| times.connect[0]),
    ("US_CX_END", |times| times.connect[1]),
    ("US_HS_END", |times| times.connect[2]),
    ("US_TX_BEG", |times| times.upstream_sent_first),
    ("US_TX_END", |times| times.upstream_sent()),
    ("US_RX_BEG", |times| times.upstream_answered),
    ("US_RX_END", |times| times.upstream_end),
    ("DS_TX_BEG", |times| times.sent_first),
    ("DS_TX_END", |times| times.end),
];

fn common_duration(arguments: &str) -> Option<Special> {
    let mut parts = arguments.split(':');
    let point = |name: Option<&str>| {
        let found = TIME_POINTS.iter().find(|(known, _)| Some(*known) == name);
        found.map(|(_, point)| *point)
    };
    let (from, to) = (point(parts.next())?, point(parts.next())?);
    let per_second = match parts.next()? {
        "ms" => 1_000,
        "us" => 1_000_000,
        "ns" => 1_000_000_000,
        _ => return None,
    };
    parts.next().is_none().then_some(Special::CommonDuration { from, to, per_second })
}

fn path<'a>(which: WhichPath, record: &Record<'a>) -> Option<&'a str> {
    let original = || record.request_headers?.get(&X_ENVOY_ORIGINAL_PATH)?.to_str().ok();
    match which {
        WhichPath::Original => original(),
        WhichPath::Current => record.path,
        WhichPath::OriginalOrCurrent => original().or(record.path),
    }
}

fn cut(out: &mut Vec<u8>, record: &Record<'_>, text: Option<&str>, max_len: usize) {
    match text {
        Some(text) => out.extend_from_slice(&text.as_bytes()[..text.len().min(max_len)]),
        None => missing(out, record),
    }
}

/// `{"operators": ["NAME", {"command": "NAME", "param": "...", "max_length": 5}]}`
fn coalesce(config: &str) -> Result<Box<[Op]>, String> {
    let config: serde_json::Value = serde_json::from_str(config).map_err(|error| error.to_string())?;
    let operators = config.get("operators").and_then(|operators| operators.as_array());
    let operators = operators.filter(|operators| !operators.is_empty()).ok_or("needs a list of operators")?;
    let parse = |item: &serde_json::Value| {
        let field = |name: &str| item.get(name).and_then(|value| value.as_str());
        let name = item.as_str().or_else(|| field("command")).ok_or("an operator needs a command")?;
        if name == "COALESCE" {
            return Err("operators must not be nested".to_owned());
        }
        let length = item.get("max_length").and_then(|length| length.as_u64());
        let length = length.map(|length| usize::try_from(length).unwrap_or(usize::MAX));
        Operator { name, arguments: field("param"), length }.compile().map_err(|error| error.to_string())
    };
    operators.iter().map(parse).collect()
}
