use std::{path::PathBuf, sync::Arc};

use super::{HeaderMatcher, MetadataMatcher};

use crate::{
    access_log::{EntryParts, LogService, ResponseFlags, Substitution},
    layered_runtime::{Denominator, RuntimeInteger},
};

/// One `access_log` entry.
#[derive(Debug, Clone)]
pub struct AccessLogConfig {
    /// What is written, and where to.
    pub output: AccessLogOutput,
    /// Which requests and connections get a line.
    pub filter: AccessLogFilter,
}

/// What an access log writes.
#[derive(Debug, Clone)]
pub enum AccessLogOutput {
    /// Lines of text.
    Lines {
        /// Where they go.
        sink: AccessLogSink,
        /// How they are made; `None` is Envoy's default format.
        format: Option<Arc<Substitution>>,
    },
    /// Entries for a service.
    Entries {
        /// Where they go.
        service: Arc<LogService>,
        /// What they tell.
        parts: Arc<EntryParts>,
    },
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

/// `AccessLogFilter`
#[derive(Debug, Clone, Default)]
pub enum AccessLogFilter {
    /// No filter.
    #[default]
    Always,
    /// `not_health_check_filter`
    NotHealthCheck,
    /// `status_code_filter`; 0 where there was no response.
    StatusCode(Comparison),
    /// `duration_filter`, in milliseconds.
    Duration(Comparison),
    /// `runtime_filter`: a share of all.
    Runtime {
        /// Of `denominator`.
        numerator: RuntimeInteger,
        /// `percent_sampled.denominator`
        denominator: Denominator,
        /// By a number of its own, and not by the request's id.
        independent: bool,
    },
    /// `response_flag_filter`: one of these, or any at all.
    ResponseFlags(Option<ResponseFlags>),
    /// `header_filter`: a header of the request.
    Header(Arc<HeaderMatcher>),
    /// `grpc_status_filter`
    GrpcStatus {
        /// A bit for each.
        statuses: u32,
        /// All others.
        exclude: bool,
    },
    /// `metadata_filter`: something that filters have told.
    Metadata {
        /// What it has to be.
        matcher: Option<Arc<MetadataMatcher>>,
        /// Where nothing is told.
        by_default: bool,
    },
    /// `log_type_filter`
    LogType {
        /// As `%ACCESS_LOG_TYPE%` has them.
        types: Arc<[&'static str]>,
        /// All others.
        exclude: bool,
    },
    /// `and_filter`
    And(Vec<AccessLogFilter>),
    /// `or_filter`
    Or(Vec<AccessLogFilter>),
}

/// `ComparisonFilter`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// How the number is compared.
    pub op: ComparisonOp,
    /// With what.
    pub value: RuntimeInteger,
}

/// `ComparisonFilter.Op`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComparisonOp {
    /// `EQ`
    Equal,
    /// `GE`
    GreaterOrEqual,
    /// `LE`
    LessOrEqual,
    /// `NE`
    NotEqual,
}
