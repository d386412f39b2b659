//! The configuration of `envoy.filters.http.compressor`.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::compressor::v3::{
        Compressor, CompressorPerRoute,
        compressor::{CommonDirectionConfig, ResponseDirectionConfig},
        compressor_per_route::Override,
    },
    google::protobuf::Any,
};

use super::{AcceptStats, CompressorFactory, Configured, Direction, Stats, Told, Types};
use crate::{
    config::{FieldError, parse},
    http::filters::{FilterCx, HttpFilterFactory, PerRouteConfig, compression, shared::Shared},
    stats::Scope,
};

/// The shortest `content-length` that is compressed.
const DEFAULT_MIN_LENGTH: u64 = 30;

const DEFAULT_TYPES: [&str; 20] = [
    "text/html",
    "text/plain",
    "text/css",
    "application/javascript",
    "application/x-javascript",
    "text/javascript",
    "text/x-javascript",
    "text/ecmascript",
    "text/js",
    "text/jscript",
    "text/x-js",
    "application/ecmascript",
    "application/x-json",
    "application/xml",
    "application/json",
    "image/svg+xml",
    "text/xml",
    "application/xhtml+xml",
    "application/grpc-web",
    "application/grpc-web+proto",
];

pub(in crate::http::filters) fn parse(
    typed_config: &Any,
    cx: &FilterCx<'_>,
) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    // The deprecated fields of the message itself are refused by the table of honoured fields.
    let Compressor { compressor_library, request_direction_config, response_direction_config, choose_first, .. } =
        unpack(typed_config, cx.path)?;
    let library = compression::compressors(compressor_library.as_ref(), &format!("{}.compressor_library", cx.path))?;
    let scope = Scope::http(cx.stat_prefix).child("compressor").child(&library.name).child(library.kind);
    let response_scope =
        if response_direction_config.is_some() { scope.clone().child("response") } else { scope.clone() };
    let path = |field: &str| format!("{}.{field}.common_config", cx.path);
    let request = request_direction_config.map(|request| {
        let common = request.common_config.unwrap_or_default();
        direction(common, &path("request_direction_config"))
    });
    let ResponseDirectionConfig {
        common_config,
        disable_on_etag_header,
        weaken_etag_on_compress,
        remove_accept_encoding_header,
        uncompressible_response_codes,
        status_header_enabled: _,
    } = response_direction_config.unwrap_or_default();
    Ok(Arc::new(CompressorFactory(Shared::new(Configured {
        library,
        request: request.transpose()?,
        request_stats: Stats::new(&scope.clone().child("request")),
        response: direction(common_config.unwrap_or_default(), &path("response_direction_config"))?,
        response_stats: Stats::new(&response_scope),
        accept: AcceptStats {
            no_accept_header: scope.counter("no_accept_header"),
            header_identity: scope.counter("header_identity"),
            header_compressor_used: scope.counter("header_compressor_used"),
            header_compressor_overshadowed: scope.counter("header_compressor_overshadowed"),
            header_wildcard: scope.counter("header_wildcard"),
            header_not_valid: scope.counter("header_not_valid"),
            not_compressed_etag: scope.counter("not_compressed_etag"),
        },
        disable_on_etag: disable_on_etag_header,
        weaken_etag: weaken_etag_on_compress,
        remove_accept_encoding: remove_accept_encoding_header,
        uncompressible: uncompressible_response_codes,
        choose_first,
        _lease: scope.lease(),
    }))))
}

#[expect(deprecated, reason = "Envoy takes content_type still, and most configurations have it")]
fn direction(config: CommonDirectionConfig, path: &str) -> Result<Direction, FieldError> {
    let CommonDirectionConfig { enabled, min_content_length, content_type, content_type_matcher } = config;
    let matcher = |(index, matcher)| parse::matcher::string(matcher, &format!("{path}.content_type_matcher[{index}]"));
    let types = if !content_type_matcher.is_empty() {
        Types::Matching(content_type_matcher.iter().enumerate().map(matcher).collect::<Result<_, FieldError>>()?)
    } else if content_type.is_empty() {
        Types::Named(DEFAULT_TYPES.map(str::to_owned).to_vec())
    } else {
        Types::Named(content_type)
    };
    let min_length = min_content_length.map_or(0, |length| u64::from(length.value));
    Ok(Direction {
        enabled: parse::runtime_switch(enabled.as_ref()),
        min_length: if min_length == 0 { DEFAULT_MIN_LENGTH } else { min_length },
        types,
    })
}

pub(in crate::http::filters) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let CompressorPerRoute { r#override } = unpack(config, path)?;
    let told = match r#override {
        Some(Override::Disabled(_)) => Told { enabled: Some(false), remove_accept_encoding: None },
        Some(Override::Overrides(overrides)) => match overrides.response_direction_config {
            Some(response) => Told {
                enabled: Some(true),
                remove_accept_encoding: response.remove_accept_encoding_header.map(|value| value.value),
            },
            None => Told::default(),
        },
        None => return Err(FieldError::new(format!("{path}.override"), "value is required")),
    };
    Ok(Arc::new(told))
}
