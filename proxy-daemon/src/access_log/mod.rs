//! Access logs: one line a request or connection, in Envoy's format language.
//!
//! A format is compiled when configuration is applied. A worker formats straight into its own buffer of the log's sink
//! and hands whole lines over from time to time ([`flush_thread`]) to the thread that writes the file. What goes to a service is an
//! entry in the place of a line.

mod fields;
mod filter;
mod flags;
mod format;
mod grpc;
mod json;
pub(crate) mod json_text;
mod operators;
mod record;
mod service;
mod sink;
mod time;
mod writer;

use std::{path::Path, sync::Arc};

use envoy_types::pb::google::protobuf::Struct;

pub use filter::response_flags;
pub use flags::ResponseFlags;
pub use record::{HeaderBytes, Headers, Record, Times};
pub use service::{EntryKind, EntryParts, LogService, ServiceLogs, set_log_node};
pub use sink::{flush_thread, flushes, reopen_all};
pub(crate) use writer::finish;

use self::{
    format::{Format, Part},
    json::JsonFormat,
    sink::Sink,
};
use crate::config::{
    FieldError,
    model::{AccessLogConfig, AccessLogFilter, AccessLogOutput, AccessLogSink},
};

/// One configured log. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AccessLog {
    output: Output,
    filter: Arc<AccessLogFilter>,
}

#[derive(Debug, Clone)]
enum Output {
    Lines { format: Arc<Substitution>, sink: Arc<Sink> },
    Entries { service: Arc<LogService>, parts: Arc<EntryParts> },
}

impl AccessLog {
    /// Opens the file. The error's path is relative to the log's own configuration.
    pub fn new(config: &AccessLogConfig) -> Result<AccessLog, FieldError> {
        let output = match &config.output {
            AccessLogOutput::Lines { sink, format } => {
                let sink = Sink::open(sink).map_err(|e| FieldError::new("path", e))?;
                let format = format.clone().unwrap_or_else(|| Arc::new(Substitution::envoy_default()));
                Output::Lines { format, sink }
            }
            AccessLogOutput::Entries { service, parts } => {
                Output::Entries { service: service::share(service), parts: Arc::clone(parts) }
            }
        };
        Ok(AccessLog { output, filter: Arc::new(config.filter.clone()) })
    }

    /// Those that its lines show or its filter looks at.
    fn headers(&self, part: Part) -> impl Iterator<Item = &http::HeaderName> {
        let shown: Box<dyn Iterator<Item = &http::HeaderName>> = match &self.output {
            Output::Lines { format, .. } => Box::new(format.headers(part)),
            Output::Entries { parts, .. } => parts.headers(part),
        };
        shown.chain(self.filter.headers(part))
    }

    /// Whether it shows how long headers are.
    pub fn shows_header_bytes(&self) -> bool {
        match &self.output {
            Output::Lines { format, .. } => format.formats().any(Format::shows_header_bytes),
            Output::Entries { .. } => true,
        }
    }

    /// The request headers that its lines show or its filter looks at: the only ones that have to be kept for it.
    pub fn request_headers(&self) -> impl Iterator<Item = &http::HeaderName> {
        self.headers(Part::Request)
    }

    /// The response headers that its lines show or its filter looks at.
    pub fn response_headers(&self) -> impl Iterator<Item = &http::HeaderName> {
        self.headers(Part::Response)
    }

    /// The trailers of responses that its lines show or its filter looks at.
    pub fn response_trailers(&self) -> impl Iterator<Item = &http::HeaderName> {
        self.headers(Part::Trailers)
    }

    /// Adds a line to this thread's buffer, where the log's filter lets it; it is handed over when the buffer is full or [`flush_thread`] is called.
    pub fn write(&self, record: &Record<'_>) {
        if !self.filter.admits(record) {
            return;
        }
        match &self.output {
            Output::Lines { format, sink } => sink::append(sink, |line| format.append(line, record)),
            Output::Entries { service, parts } => service::append(service, parts, record),
        }
    }
}

/// A file for events that are few: each line is written at once.
#[derive(Debug, Clone)]
pub struct EventLog(Arc<Sink>);

impl EventLog {
    /// Opens the file.
    ///
    /// # Errors
    /// One line that says why it cannot be opened.
    pub fn open(path: &Path) -> Result<EventLog, String> {
        Sink::open(&AccessLogSink::File(path.to_owned())).map(EventLog)
    }

    /// Writes a line.
    pub fn write(&self, line: &str) {
        sink::append(&self.0, |out| {
            out.extend_from_slice(line.as_bytes());
            out.push(b'\n');
        });
        flush_thread();
    }
}

/// A header's value, made for each message by a format string.
#[derive(Debug)]
pub struct HeaderFormat(Format);

impl HeaderFormat {
    /// Compiles a format string; `Ok(Err)` is the text that it always makes.
    ///
    /// # Errors
    /// Why it is no format.
    pub fn parse(text: &str) -> Result<Result<HeaderFormat, String>, String> {
        let format = Format::parse(text).map_err(|error| error.to_string())?;
        Ok(match format.literal() {
            Some(literal) => Err(literal.to_owned()),
            None => Ok(HeaderFormat(format)),
        })
    }

    /// Whether it is a single operator.
    pub fn is_single(&self) -> bool {
        self.0.is_single()
    }

    /// The value for `record`; `None` where it cannot stand in a header.
    pub fn value(&self, record: &Record<'_>) -> Option<http::HeaderValue> {
        http::HeaderValue::from_bytes(&self.bytes(record)).ok()
    }

    /// The text for `record`, whatever it is.
    pub fn bytes(&self, record: &Record<'_>) -> Vec<u8> {
        let mut value = Vec::new();
        self.0.write(&mut value, record);
        value
    }
}

/// A line or a body that is made of a record: `SubstitutionFormatString`.
#[derive(Debug)]
pub struct Substitution {
    template: Template,
    omit_empty_values: bool,
}

#[derive(Debug)]
enum Template {
    Text(Format),
    Json(JsonFormat),
}

impl Substitution {
    /// What a log without a format of its own writes.
    fn envoy_default() -> Substitution {
        Substitution { template: Template::Text(Format::envoy_default()), omit_empty_values: false }
    }

    /// Compiles a text.
    ///
    /// # Errors
    /// Why it is no format.
    pub fn text(text: &str, omit_empty_values: bool) -> Result<Substitution, String> {
        let template = Format::parse(text).map(Template::Text).map_err(|error| error.to_string())?;
        Ok(Substitution { template, omit_empty_values })
    }

    /// Compiles a JSON value whose texts are formats.
    ///
    /// # Errors
    /// Why one of them is none.
    pub fn json(template: &Struct, omit_empty_values: bool) -> Result<Substitution, String> {
        let template = JsonFormat::parse(template).map(Template::Json).map_err(|error| error.to_string())?;
        Ok(Substitution { template, omit_empty_values })
    }

    /// The headers of a part of the messages that it shows.
    fn headers(&self, part: Part) -> impl Iterator<Item = &http::HeaderName> {
        self.formats().flat_map(move |format| format.headers(part))
    }

    fn formats(&self) -> Box<dyn Iterator<Item = &Format> + '_> {
        match &self.template {
            Template::Text(format) => Box::new(std::iter::once(format)),
            Template::Json(format) => format.formats(),
        }
    }

    /// Appends what it makes of `record`.
    fn append(&self, out: &mut Vec<u8>, record: &Record<'_>) {
        match &self.template {
            Template::Text(format) if self.omit_empty_values => format.write(out, &Record { missing: "", ..*record }),
            Template::Text(format) => format.write(out, record),
            Template::Json(format) => format.write(out, record, self.omit_empty_values),
        }
    }

    /// What it makes of `record`.
    pub fn write(&self, record: &Record<'_>) -> Vec<u8> {
        let mut made = Vec::new();
        self.append(&mut made, record);
        made
    }
}

/// A moment as the default time format prints it: RFC 3339 in UTC, with milliseconds.
pub fn rfc3339(at: std::time::SystemTime) -> String {
    let mut text = Vec::new();
    time::write_default(&mut text, at);
    String::from_utf8(text).unwrap_or_default()
}
