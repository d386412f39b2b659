use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        accesslog::v3::{
            AccessLog, AccessLogFilter as ProtoFilter, ComparisonFilter, access_log::ConfigType,
            access_log_filter::FilterSpecifier, comparison_filter::Op,
        },
        core::v3::{SubstitutionFormatString, substitution_format_string::Format},
    },
    extensions::access_loggers::{
        file::v3::{FileAccessLog, file_access_log::AccessLogFormat as FileFormat},
        stream::v3::{
            StderrAccessLog, StdoutAccessLog, stderr_access_log::AccessLogFormat as StderrFormat,
            stdout_access_log::AccessLogFormat as StdoutFormat,
        },
    },
};

use super::{
    common::{Result, fraction, inline_text, required},
    matcher,
    support::join,
};
use crate::{
    access_log::response_flags,
    config::{
        FieldError,
        model::{AccessLogConfig, AccessLogFilter, AccessLogSink, Comparison, ComparisonOp},
    },
    layered_runtime::{Key, RuntimeInteger},
};

pub(super) fn access_logs(logs: &[AccessLog], path: &str) -> Result<Vec<AccessLogConfig>> {
    let parse = |(index, log): (usize, &AccessLog)| access_log(log, &format!("{path}[{index}]"));
    logs.iter().enumerate().map(parse).collect()
}

fn access_log(log: &AccessLog, path: &str) -> Result<AccessLogConfig> {
    let Some(ConfigType::TypedConfig(config)) = &log.config_type else { return Err(required(path, "typed_config")) };
    let (path, filter_path) = (join(path, "typed_config"), join(path, "filter"));
    let (sink, format) = match config.type_url.rsplit('.').next().unwrap_or_default() {
        "FileAccessLog" => {
            let file: FileAccessLog = unpack(config, &path)?;
            #[expect(deprecated, reason = "the field that log_format replaced, which Envoy still takes")]
            let format = match &file.access_log_format {
                Some(FileFormat::LogFormat(format)) => text_format(format, &path)?,
                Some(FileFormat::Format(text)) => Some(text.clone()).filter(|text| !text.is_empty()),
                Some(_) => return Err(FieldError::unsupported(join(&path, "json_format"))),
                None => None,
            };
            let sink = match file.path.as_str() {
                "/dev/stdout" => AccessLogSink::Stdout,
                "/dev/stderr" => AccessLogSink::Stderr,
                file => AccessLogSink::File(file.into()),
            };
            (sink, format)
        }
        "StdoutAccessLog" => {
            let log: StdoutAccessLog = unpack(config, &path)?;
            let format = log.access_log_format.map(|StdoutFormat::LogFormat(format)| text_format(&format, &path));
            (AccessLogSink::Stdout, format.transpose()?.flatten())
        }
        "StderrAccessLog" => {
            let log: StderrAccessLog = unpack(config, &path)?;
            let format = log.access_log_format.map(|StderrFormat::LogFormat(format)| text_format(&format, &path));
            (AccessLogSink::Stderr, format.transpose()?.flatten())
        }
        _ => return Err(FieldError::unsupported(path)),
    };
    if let Some(format) = &format {
        crate::access_log::check_format(format).map_err(|error| FieldError::new(path, error.to_string()))?;
    }
    let filter = log.filter.as_ref().map(|item| filter(item, &filter_path)).transpose()?.unwrap_or_default();
    Ok(AccessLogConfig { sink, format, filter })
}

/// Which answers or lines are meant.
pub(super) fn filter(filter: &ProtoFilter, path: &str) -> Result<AccessLogFilter> {
    let all = |filters: &[ProtoFilter], field: &str| {
        let path = format!("{path}.{field}.filters");
        let parse = |(index, item): (usize, &ProtoFilter)| self::filter(item, &format!("{path}[{index}]"));
        filters.iter().enumerate().map(parse).collect::<Result<Vec<_>>>()
    };
    Ok(match &filter.filter_specifier {
        Some(FilterSpecifier::StatusCodeFilter(filter)) => {
            AccessLogFilter::StatusCode(comparison(filter.comparison.as_ref(), &join(path, "status_code_filter"))?)
        }
        Some(FilterSpecifier::DurationFilter(filter)) => {
            AccessLogFilter::Duration(comparison(filter.comparison.as_ref(), &join(path, "duration_filter"))?)
        }
        // Nothing here marks a request as a health check.
        Some(FilterSpecifier::NotHealthCheckFilter(_)) => AccessLogFilter::NotHealthCheck,
        Some(FilterSpecifier::RuntimeFilter(filter)) => {
            // An absent default is 0 %, as in Envoy.
            let share = fraction(filter.percent_sampled.unwrap_or_default());
            AccessLogFilter::Runtime {
                numerator: RuntimeInteger {
                    default: u64::from(share.numerator),
                    key: Key::optional(&filter.runtime_key),
                },
                denominator: share.denominator,
                independent: filter.use_independent_randomness,
            }
        }
        Some(FilterSpecifier::ResponseFlagFilter(filter)) => {
            let flags = response_flags(filter.flags.iter().map(String::as_str)).map_err(|flag| {
                FieldError::new(join(path, "response_flag_filter.flags"), format!("{flag} is not a response flag"))
            })?;
            AccessLogFilter::ResponseFlags(Some(flags).filter(|flags| !flags.is_empty()))
        }
        Some(FilterSpecifier::HeaderFilter(filter)) => {
            let path = join(path, "header_filter.header");
            let header = filter.header.as_ref().ok_or_else(|| required(&path, "name"))?;
            AccessLogFilter::Header(Arc::new(matcher::header(header, &path)?))
        }
        Some(FilterSpecifier::AndFilter(filter)) => AccessLogFilter::And(all(&filter.filters, "and_filter")?),
        Some(FilterSpecifier::OrFilter(filter)) => AccessLogFilter::Or(all(&filter.filters, "or_filter")?),
        Some(_) => return Err(FieldError::unsupported(path)),
        None => return Err(required(path, "filter_specifier")),
    })
}

fn comparison(filter: Option<&ComparisonFilter>, path: &str) -> Result<Comparison> {
    let filter = filter.ok_or_else(|| required(path, "comparison"))?;
    let path = join(path, "comparison");
    let value = filter.value.as_ref().ok_or_else(|| required(&path, "value"))?;
    let op = match Op::try_from(filter.op) {
        Ok(Op::Eq) => ComparisonOp::Equal,
        Ok(Op::Ge) => ComparisonOp::GreaterOrEqual,
        Ok(Op::Le) => ComparisonOp::LessOrEqual,
        Ok(Op::Ne) => ComparisonOp::NotEqual,
        Err(_) => return Err(FieldError::unsupported(join(&path, "op"))),
    };
    let key = Key::optional(&value.runtime_key);
    Ok(Comparison { op, value: RuntimeInteger { default: u64::from(value.default_value), key } })
}

fn text_format(format: &SubstitutionFormatString, path: &str) -> Result<Option<String>> {
    if format.omit_empty_values {
        return Err(FieldError::unsupported(join(path, "log_format.omit_empty_values")));
    }
    #[expect(deprecated, reason = "the field that text_format_source replaced, which Envoy still takes")]
    match &format.format {
        Some(Format::TextFormat(text)) => Ok(Some(text.clone())),
        Some(Format::TextFormatSource(source)) => {
            let path = join(path, "log_format.text_format_source");
            let text = String::from_utf8(inline_text(source, &path)?);
            text.map(Some).map_err(|_| FieldError::new(path, "is not UTF-8"))
        }
        Some(Format::JsonFormat(_)) => Err(FieldError::unsupported(join(path, "log_format.json_format"))),
        None => Ok(None),
    }
}
