use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::{
            accesslog::v3::{
                AccessLog, AccessLogFilter as ProtoFilter, ComparisonFilter, access_log::ConfigType,
                access_log_filter::FilterSpecifier, comparison_filter::Op,
            },
            core::v3::{ApiVersion, SubstitutionFormatString, substitution_format_string::Format},
        },
        data::accesslog::v3::AccessLogType,
        extensions::access_loggers::{
            file::v3::{FileAccessLog, file_access_log::AccessLogFormat as FileFormat},
            grpc::v3::{CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig},
            stream::v3::{
                StderrAccessLog, StdoutAccessLog, stderr_access_log::AccessLogFormat as StderrFormat,
                stdout_access_log::AccessLogFormat as StdoutFormat,
            },
        },
        extensions::formatter::{metadata::v3::Metadata as MetadataFormatter, req_without_query::v3::ReqWithoutQuery},
    },
    google::protobuf::Struct,
};
use prost::Name as _;

use super::{
    common::{Result, duration, fraction, inline_text, required, type_name},
    matcher, metadata_match,
    support::join,
};
use crate::{
    access_log::{EntryKind, EntryParts, LogService, Substitution, response_flags},
    config::{
        FieldError,
        model::{AccessLogConfig, AccessLogFilter, AccessLogOutput, AccessLogSink, Comparison, ComparisonOp},
    },
    http::{call::grpc::Service, metadata},
    layered_runtime::{Key, RuntimeInteger},
};

pub(super) fn access_logs(logs: &[AccessLog], path: &str) -> Result<Vec<AccessLogConfig>> {
    let parse = |(index, log): (usize, &AccessLog)| access_log(log, &format!("{path}[{index}]"));
    logs.iter().enumerate().map(parse).collect()
}

fn access_log(log: &AccessLog, path: &str) -> Result<AccessLogConfig> {
    let Some(ConfigType::TypedConfig(config)) = &log.config_type else { return Err(required(path, "typed_config")) };
    let (path, filter_path) = (join(path, "typed_config"), join(path, "filter"));
    let log_format = |format: &SubstitutionFormatString| substitution(format, &join(&path, "log_format"));
    let lines = |sink, format: Option<Substitution>| AccessLogOutput::Lines { sink, format: format.map(Arc::new) };
    let output = match config.type_url.rsplit('.').next().unwrap_or_default() {
        "FileAccessLog" => {
            let file: FileAccessLog = unpack(config, &path)?;
            #[expect(deprecated, reason = "the field that log_format replaced, which Envoy still takes")]
            let format = match &file.access_log_format {
                Some(FileFormat::LogFormat(format)) => log_format(format)?,
                Some(FileFormat::Format(text)) if !text.is_empty() => {
                    let compiled = Substitution::text(text, false);
                    Some(compiled.map_err(|error| FieldError::new(join(&path, "format"), error))?)
                }
                Some(FileFormat::JsonFormat(template)) => Some(of_json(template, false, &join(&path, "json_format"))?),
                Some(FileFormat::TypedJsonFormat(template)) => {
                    Some(of_json(template, false, &join(&path, "typed_json_format"))?)
                }
                Some(FileFormat::Format(_)) | None => None,
            };
            let sink = match file.path.as_str() {
                "/dev/stdout" => AccessLogSink::Stdout,
                "/dev/stderr" => AccessLogSink::Stderr,
                file => AccessLogSink::File(file.into()),
            };
            lines(sink, format)
        }
        "StdoutAccessLog" => {
            let log: StdoutAccessLog = unpack(config, &path)?;
            let format = log.access_log_format.map(|StdoutFormat::LogFormat(format)| log_format(&format));
            lines(AccessLogSink::Stdout, format.transpose()?.flatten())
        }
        "StderrAccessLog" => {
            let log: StderrAccessLog = unpack(config, &path)?;
            let format = log.access_log_format.map(|StderrFormat::LogFormat(format)| log_format(&format));
            lines(AccessLogSink::Stderr, format.transpose()?.flatten())
        }
        "HttpGrpcAccessLogConfig" => {
            let log: HttpGrpcAccessLogConfig = unpack(config, &path)?;
            let headers = [
                log.additional_request_headers_to_log.as_slice(),
                &log.additional_response_headers_to_log,
                &log.additional_response_trailers_to_log,
            ];
            entries(EntryKind::Http, log.common_config.as_ref(), headers, &path)?
        }
        "TcpGrpcAccessLogConfig" => {
            let log: TcpGrpcAccessLogConfig = unpack(config, &path)?;
            entries(EntryKind::Tcp, log.common_config.as_ref(), Default::default(), &path)?
        }
        _ => return Err(FieldError::unsupported(path.clone())),
    };
    let filter = log.filter.as_ref().map(|item| filter(item, &filter_path)).transpose()?.unwrap_or_default();
    Ok(AccessLogConfig { output, filter })
}

/// Entries for a service.
fn entries(
    kind: EntryKind,
    config: Option<&CommonGrpcAccessLogConfig>,
    headers: [&[String]; 3],
    path: &str,
) -> Result<AccessLogOutput> {
    let config = config.ok_or_else(|| required(path, "common_config"))?;
    let parts = EntryParts::parse(headers, &config.filter_state_objects_to_log, path)?;
    let path = join(path, "common_config");
    let parts = parts.with_tags(&config.custom_tags, &join(&path, "custom_tags"))?;
    #[expect(deprecated, reason = "this is where it is refused")]
    const V2: i32 = ApiVersion::V2 as i32;
    if config.transport_api_version == V2 {
        return Err(FieldError::unsupported_value(join(&path, "transport_api_version"), "V2", "V3"));
    }
    let service = config.grpc_service.as_ref().ok_or_else(|| required(&path, "grpc_service"))?;
    let flush_interval = duration(config.buffer_flush_interval, &path, "buffer_flush_interval")?;
    // All that filters tell is in the entries.
    metadata::read_all();
    let service = LogService {
        kind,
        log_name: config.log_name.as_str().into(),
        service: Service::parse(service, None, &join(&path, "grpc_service"))?,
        flush_interval: flush_interval.unwrap_or(Duration::from_secs(1)),
        buffer_bytes: config.buffer_size_bytes.map_or(16384, |bytes| bytes.value as usize),
    };
    Ok(AccessLogOutput::Entries { service: Arc::new(service), parts: Arc::new(parts) })
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
        Some(FilterSpecifier::GrpcStatusFilter(filter)) => {
            // What is no status is refused by the message's rules.
            let bits = filter.statuses.iter().filter_map(|status| u32::try_from(*status).ok());
            let statuses = bits.filter(|status| *status < 32).fold(0, |statuses, status| statuses | 1 << status);
            AccessLogFilter::GrpcStatus { statuses, exclude: filter.exclude }
        }
        Some(FilterSpecifier::MetadataFilter(filter)) => {
            let path = join(path, "metadata_filter.matcher");
            let matcher = filter.matcher.as_ref().map(|matcher| metadata_match::metadata(matcher, &path));
            AccessLogFilter::Metadata {
                matcher: matcher.transpose()?.map(Arc::new),
                by_default: filter.match_if_key_not_found.is_none_or(|value| value.value),
            }
        }
        Some(FilterSpecifier::LogTypeFilter(filter)) => {
            let types = filter.types.iter().filter_map(|log_type| AccessLogType::try_from(*log_type).ok());
            AccessLogFilter::LogType { types: types.map(|it| it.as_str_name()).collect(), exclude: filter.exclude }
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

/// How a line or a body is made; `None`: nothing is said of it.
pub(crate) fn substitution(format: &SubstitutionFormatString, path: &str) -> Result<Option<Substitution>> {
    let omit = format.omit_empty_values;
    for (index, formatter) in format.formatters.iter().enumerate() {
        let config = formatter.typed_config.as_ref();
        // Their operators are there in any case.
        let known = [ReqWithoutQuery::full_name(), MetadataFormatter::full_name()];
        if !config.is_some_and(|config| known.iter().any(|known| known == type_name(config))) {
            return Err(FieldError::unsupported(format!("{}[{index}].typed_config", join(path, "formatters"))));
        }
    }
    let of_text = |text: &str, path: String| {
        let compiled = Substitution::text(text, omit);
        compiled.map(Some).map_err(|error| FieldError::new(path, error))
    };
    #[expect(deprecated, reason = "the field that text_format_source replaced, which Envoy still takes")]
    match &format.format {
        Some(Format::TextFormat(text)) => of_text(text, join(path, "text_format")),
        Some(Format::TextFormatSource(source)) => {
            let path = join(path, "text_format_source");
            let text = String::from_utf8(inline_text(source, &path)?);
            of_text(&text.map_err(|_| FieldError::new(&path, "is not UTF-8"))?, path)
        }
        Some(Format::JsonFormat(template)) => of_json(template, omit, &join(path, "json_format")).map(Some),
        None => Ok(None),
    }
}

fn of_json(template: &Struct, omit_empty_values: bool, path: &str) -> Result<Substitution> {
    Substitution::json(template, omit_empty_values).map_err(|error| FieldError::new(path, error))
}
