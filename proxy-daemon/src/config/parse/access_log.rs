use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::{
        accesslog::v3::{AccessLog, access_log::ConfigType},
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
    common::{Result, inline_text, required},
    support::join,
};
use crate::config::{
    FieldError,
    model::{AccessLogConfig, AccessLogSink},
};

pub(super) fn access_logs(logs: &[AccessLog], path: &str) -> Result<Vec<AccessLogConfig>> {
    let parse = |(index, log): (usize, &AccessLog)| access_log(log, &format!("{path}[{index}]"));
    logs.iter().enumerate().map(parse).collect()
}

fn access_log(log: &AccessLog, path: &str) -> Result<AccessLogConfig> {
    let Some(ConfigType::TypedConfig(config)) = &log.config_type else { return Err(required(path, "typed_config")) };
    let path = join(path, "typed_config");
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
    Ok(AccessLogConfig { sink, format })
}

fn text_format(format: &SubstitutionFormatString, path: &str) -> Result<Option<String>> {
    #[expect(deprecated, reason = "the field that text_format_source replaced, which Envoy still takes")]
    match &format.format {
        Some(Format::TextFormat(text)) => Ok(Some(text.clone())),
        Some(Format::TextFormatSource(source)) => {
            let path = join(path, "log_format.text_format_source");
            let text = String::from_utf8(inline_text(source, &path)?);
            text.map(Some).map_err(|_| FieldError::new(path, "is not UTF-8"))
        }
        _ => Ok(None),
    }
}
