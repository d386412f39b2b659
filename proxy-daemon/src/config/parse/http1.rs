//! `Http1ProtocolOptions`, of connection managers and of clusters.

use culvert_xds_client::json::unpack;
use envoy_types::pb::envoy::{
    config::core::v3::{
        Http1ProtocolOptions,
        http1_protocol_options::{HeaderKeyFormat as Format, header_key_format::HeaderFormat},
    },
    extensions::{
        http::header_formatters::preserve_case::v3::{
            PreserveCaseFormatterConfig, preserve_case_formatter_config::FormatterTypeOnEnvoyHeaders,
        },
        upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{UpstreamProtocolOptions, explicit_http_config::ProtocolConfig},
        },
    },
};

use super::{
    common::{Result, header_value, required},
    support::join,
};
use crate::config::{
    FieldError,
    model::{HeaderKeyFormat, Http1ClientOptions, Http1Options, PreserveCase},
};

/// Those of a connection manager.
pub(super) fn http1(options: Option<&Http1ProtocolOptions>, path: &str) -> Result<Http1Options> {
    let Some(options) = options else { return Ok(Http1Options::default()) };
    let host = options.default_host_for_http_10.as_str();
    let default_host = match host {
        "" => None,
        host => Some(header_value(host, &join(path, "default_host_for_http_10"))?),
    };
    Ok(Http1Options {
        accept_http_10: options.accept_http_10,
        default_host_for_http_10: default_host,
        enable_trailers: options.enable_trailers,
        refuses_absolute_url: options.allow_absolute_url.is_some_and(|allowed| !allowed.value),
        allow_custom_methods: options.allow_custom_methods,
        header_key_format: header_key_format(options.header_key_format.as_ref(), path)?,
    })
}

/// Those of a cluster, whose `HttpProtocolOptions` stand at `path`. The others of them have no meaning for a cluster.
pub(super) fn http1_client(http: Option<&HttpProtocolOptions>, path: &str) -> Result<Http1ClientOptions> {
    let (options, place) = match http.and_then(|options| options.upstream_protocol_options.as_ref()) {
        Some(UpstreamProtocolOptions::ExplicitHttpConfig(explicit)) => match &explicit.protocol_config {
            Some(ProtocolConfig::HttpProtocolOptions(options)) => (Some(options), "explicit_http_config"),
            _ => (None, ""),
        },
        Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(options)) => {
            (options.http_protocol_options.as_ref(), "use_downstream_protocol_config")
        }
        Some(UpstreamProtocolOptions::AutoConfig(options)) => (options.http_protocol_options.as_ref(), "auto_config"),
        None => (None, ""),
    };
    let Some(options) = options else { return Ok(Http1ClientOptions::default()) };
    // The field of a cluster itself stands for the one that it was replaced by.
    let path = if path.ends_with(']') { join(path, place) } else { path.to_owned() };
    let path = join(&path, "http_protocol_options");
    Ok(Http1ClientOptions {
        enable_trailers: options.enable_trailers,
        header_key_format: header_key_format(options.header_key_format.as_ref(), &path)?,
    })
}

fn header_key_format(format: Option<&Format>, path: &str) -> Result<HeaderKeyFormat> {
    let Some(format) = format else { return Ok(HeaderKeyFormat::Lower) };
    let path = join(path, "header_key_format");
    match &format.header_format {
        None => Err(required(&path, "header_format")),
        Some(HeaderFormat::ProperCaseWords(_)) => Ok(HeaderKeyFormat::ProperCaseWords),
        Some(HeaderFormat::StatefulFormatter(extension)) => {
            let path = join(&path, "stateful_formatter");
            let config = extension.typed_config.as_ref().ok_or_else(|| required(&path, "typed_config"))?;
            preserve_case(&unpack(config, &join(&path, "typed_config"))?, &path).map(HeaderKeyFormat::PreserveCase)
        }
    }
}

fn preserve_case(config: &PreserveCaseFormatterConfig, path: &str) -> Result<PreserveCase> {
    let proper_case_others = match FormatterTypeOnEnvoyHeaders::try_from(config.formatter_type_on_envoy_headers) {
        Ok(FormatterTypeOnEnvoyHeaders::Default) => false,
        Ok(FormatterTypeOnEnvoyHeaders::ProperCase) => true,
        Err(_) => {
            return Err(FieldError::unsupported(join(path, "typed_config.formatter_type_on_envoy_headers")));
        }
    };
    Ok(PreserveCase { forward_reason_phrase: config.forward_reason_phrase, proper_case_others })
}
