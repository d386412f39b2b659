use std::path::PathBuf;

/// One `access_log` entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogConfig {
    /// Where the lines go.
    pub sink: AccessLogSink,
    /// Envoy's format string (`%REQ(:METHOD)% ...`); `None` is Envoy's default format.
    pub format: Option<String>,
}

/// Where an access log's lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccessLogSink {
    /// Appended to a file.
    File(PathBuf),
    /// The daemon's standard output.
    Stdout,
    /// The daemon's standard error.
    Stderr,
}
