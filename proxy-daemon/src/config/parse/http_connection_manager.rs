use std::{sync::Arc, time::Duration};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            ExtensionConfigSource, TypedExtensionConfig,
            http_protocol_options::HeadersWithUnderscoresAction as UnderscoresAction,
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager, HttpFilter,
            http_connection_manager::{
                CodecType as ProtoCodec, HcmAccessLogOptions, PathWithEscapedSlashesAction as SlashesAction,
                RouteSpecifier, ServerHeaderTransformation as ProtoServerHeader, StripPortMode,
            },
            http_filter::ConfigType,
        },
    },
    google::protobuf::Any,
};
use http::HeaderValue;

use super::{
    access_log::access_logs,
    common::{Result, cidrs, duration, header_value, http2, limit, number, required, type_name},
    config_source::config_source,
    forwarded_cert, hcm_extensions,
    http1::http1,
    local_reply,
    route::{routes, without_vhds},
    scoped_routes::scoped_routes,
    support::join,
    upgrade,
};
use crate::{
    config::{
        FieldError,
        model::{
            CodecType, EscapedSlashes, HttpConnectionManagerConfig, HttpFilterEntry, RequestRules, ResourceRef,
            RouteSource, ServerHeaderTransformation, StripPort, Underscores,
        },
    },
    http::filters::{self, DiscoveredFilter, FilterCx, FilterSource},
};

pub(super) fn http_connection_manager(
    manager: &HttpConnectionManager,
    path: &str,
) -> Result<HttpConnectionManagerConfig> {
    let codec_type = match ProtoCodec::try_from(manager.codec_type) {
        Ok(ProtoCodec::Auto) => CodecType::Auto,
        Ok(ProtoCodec::Http1) => CodecType::Http1,
        Ok(ProtoCodec::Http2) => CodecType::Http2,
        codec => {
            let name = codec.map_or("a codec that is not known", |codec| codec.as_str_name());
            return Err(FieldError::unsupported_value(join(path, "codec_type"), name, "AUTO, HTTP1 and HTTP2"));
        }
    };
    let server_header = match ProtoServerHeader::try_from(manager.server_header_transformation) {
        Ok(ProtoServerHeader::AppendIfAbsent) => ServerHeaderTransformation::AppendIfAbsent,
        Ok(ProtoServerHeader::PassThrough) => ServerHeaderTransformation::PassThrough,
        _ => ServerHeaderTransformation::Overwrite,
    };
    let common = manager.common_http_protocol_options.unwrap_or_default();
    let common_path = join(path, "common_http_protocol_options");
    // Of clusters, which have the same message.
    if common.max_response_headers_kb.is_some() {
        return Err(FieldError::unsupported(join(&common_path, "max_response_headers_kb")));
    }
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let set = |value: &str, field: &str| -> Result<Option<HeaderValue>> {
        if value.is_empty() { Ok(None) } else { header_value(value, &join(path, field)).map(Some) }
    };
    let internal = manager.internal_address_config.as_ref();
    let internal = internal.map(|config| config.cidr_ranges.as_slice()).unwrap_or_default();
    let is_set = |value: Option<envoy_types::pb::google::protobuf::BoolValue>| value.is_some_and(|value| value.value);
    let old = common.max_connection_duration;
    let logs = log_options(manager, path)?;
    let http1_options = manager.http_protocol_options.clone().unwrap_or_default();
    // HTTP/2 connections stay open in any case.
    let stays_open =
        http1_options.override_stream_error_on_invalid_http_message.or(manager.stream_error_on_invalid_http_message);
    let mut filters = filter_chain(&manager.http_filters, &manager.stat_prefix, &join(path, "http_filters"))?;
    if filters.is_empty() {
        let text = "a list without filters is not supported by culvert yet: add envoy.filters.http.router";
        return Err(FieldError::new(join(path, "http_filters"), text));
    }
    let chain = 0..filters.len();
    let upgrades = upgrade::of_manager(&manager.upgrade_configs, path, |list, path| {
        let own = filter_chain(list, &manager.stat_prefix, path)?;
        let begin = filters.len();
        filters.extend(own);
        Ok(begin..filters.len())
    })?;
    Ok(HttpConnectionManagerConfig {
        upgrades,
        chain,
        stat_prefix: manager.stat_prefix.clone(),
        codec_type,
        routes: route_source(manager, path)?,
        http_filters: filters,
        server_name: set(&manager.server_name, "server_name")?.unwrap_or(HeaderValue::from_static("envoy")),
        server_header,
        use_remote_address: is_set(manager.use_remote_address),
        xff_num_trusted_hops: manager.xff_num_trusted_hops,
        skip_xff_append: manager.skip_xff_append,
        internal_ranges: cidrs(internal, path, "internal_address_config.cidr_ranges")?,
        ip_detection: hcm_extensions::ip_detection(manager, path)?,
        add_user_agent: is_set(manager.add_user_agent),
        scheme: hcm_extensions::scheme(manager),
        scheme_matches_upstream: manager.scheme_header_transformation.as_ref().is_some_and(|it| it.match_upstream),
        pack_trace_reason: hcm_extensions::packs_trace_reason(manager, path)?,
        early_mutations: hcm_extensions::early_mutations(manager, path)?,
        generate_request_id: manager.generate_request_id.is_none_or(|value| value.value),
        preserve_external_request_id: manager.preserve_external_request_id,
        always_set_request_id_in_response: manager.always_set_request_id_in_response,
        via: set(&manager.via, "via")?,
        idle_timeout: limit(common.idle_timeout, seconds(3600), &common_path, "idle_timeout")?,
        stream_idle_timeout: limit(manager.stream_idle_timeout, seconds(300), path, "stream_idle_timeout")?,
        request_timeout: limit(manager.request_timeout, None, path, "request_timeout")?,
        request_headers_timeout: limit(manager.request_headers_timeout, None, path, "request_headers_timeout")?,
        max_connection_duration: limit(old, None, &common_path, "max_connection_duration")?,
        duration_jitter: common.max_connection_duration_jitter.map_or(0.0, |jitter| jitter.value / 100.0),
        max_requests_per_connection: number(common.max_requests_per_connection, 0),
        max_request_headers_kb: number(manager.max_request_headers_kb, 60),
        max_headers_count: number(common.max_headers_count, 100),
        normalize_path: is_set(manager.normalize_path),
        merge_slashes: manager.merge_slashes,
        rules: request_rules(manager, path)?,
        max_stream_duration: limit(common.max_stream_duration, None, &common_path, "max_stream_duration")?,
        delayed_close_timeout: limit(manager.delayed_close_timeout, seconds(1), path, "delayed_close_timeout")?,
        drain_timeout: duration(manager.drain_timeout, path, "drain_timeout")?.unwrap_or(Duration::from_secs(5)),
        drain_jitter: manager.drain_timeout_jitter.map_or(0.0, |jitter| jitter.value / 100.0),
        http1_safe_max_connection_duration: manager.http1_safe_max_connection_duration,
        http1_stays_open: is_set(stays_open),
        proxy_100_continue: manager.proxy_100_continue,
        log_new_requests: logs.flush_access_log_on_new_request,
        log_interval: duration(logs.access_log_flush_interval, path, "access_log_options.access_log_flush_interval")?,
        stream_flush_timeout: limit(
            manager.stream_flush_timeout.or(manager.stream_idle_timeout),
            seconds(300),
            path,
            "stream_flush_timeout",
        )?,
        log_tunnels: logs.flush_log_on_tunnel_successfully_established,
        proxy_status: manager.proxy_status_config.as_ref().map(|told| Box::new(hcm_extensions::proxy_status(told))),
        local_replies: local_reply::local_replies(manager.local_reply_config.as_ref(), path)?,
        http1: http1(manager.http_protocol_options.as_ref(), &join(path, "http_protocol_options"))?,
        http2: http2(manager.http2_protocol_options.as_ref()),
        access_logs: access_logs(&manager.access_log, &join(path, "access_log"))?,
        forward_client_cert: forwarded_cert::forwarded_cert(&forwarded_cert::of_manager(manager), path)?,
        forward_client_cert_matcher: forwarded_cert::matcher(manager, path)?,
    })
}

/// `access_log_options`, or the fields before it.
#[expect(deprecated, reason = "Envoy still takes the fields that access_log_options replaced")]
fn log_options(manager: &HttpConnectionManager, path: &str) -> Result<HcmAccessLogOptions> {
    let (interval, at_start) = (manager.access_log_flush_interval, manager.flush_access_log_on_new_request);
    let Some(options) = manager.access_log_options else {
        return Ok(HcmAccessLogOptions {
            access_log_flush_interval: interval,
            flush_access_log_on_new_request: at_start,
            ..HcmAccessLogOptions::default()
        });
    };
    for (set, field) in
        [(at_start, "flush_access_log_on_new_request"), (interval.is_some(), "access_log_flush_interval")]
    {
        if set {
            // Envoy's words.
            let text = format!("Only one of {field} or access_log_options can be specified.");
            return Err(FieldError::new(join(path, field), text));
        }
    }
    Ok(options)
}

fn request_rules(manager: &HttpConnectionManager, path: &str) -> Result<RequestRules> {
    let any = matches!(manager.strip_port_mode, Some(StripPortMode::StripAnyHostPort(true)));
    let strip_port = match (manager.strip_matching_host_port, any) {
        (true, true) => {
            // Envoy's words.
            let text = "Error: Only one of `strip_matching_host_port` or `strip_any_host_port` can be set.";
            return Err(FieldError::new(path, text));
        }
        (true, false) => StripPort::Matching,
        (false, true) => StripPort::Any,
        (false, false) => StripPort::None,
    };
    let escaped_slashes = match SlashesAction::try_from(manager.path_with_escaped_slashes_action) {
        Ok(SlashesAction::ImplementationSpecificDefault | SlashesAction::KeepUnchanged) => EscapedSlashes::Keep,
        Ok(SlashesAction::RejectRequest) => EscapedSlashes::Reject,
        Ok(SlashesAction::UnescapeAndRedirect) => EscapedSlashes::Redirect,
        Ok(SlashesAction::UnescapeAndForward) => EscapedSlashes::Unescape,
        Err(_) => return Err(FieldError::unsupported(join(path, "path_with_escaped_slashes_action"))),
    };
    let action = manager.common_http_protocol_options.unwrap_or_default().headers_with_underscores_action;
    let underscores = match UnderscoresAction::try_from(action) {
        Ok(UnderscoresAction::Allow) => Underscores::Allow,
        Ok(UnderscoresAction::RejectRequest) => Underscores::Reject,
        Ok(UnderscoresAction::DropHeader) => Underscores::Drop,
        Err(_) => {
            let path = join(path, "common_http_protocol_options.headers_with_underscores_action");
            return Err(FieldError::unsupported(path));
        }
    };
    Ok(RequestRules {
        strip_port,
        strip_trailing_host_dot: manager.strip_trailing_host_dot,
        escaped_slashes,
        underscores,
        append_x_forwarded_port: manager.append_x_forwarded_port,
    })
}

fn route_source(manager: &HttpConnectionManager, path: &str) -> Result<RouteSource> {
    match &manager.route_specifier {
        Some(RouteSpecifier::RouteConfig(config)) => {
            let path = join(path, "route_config");
            Ok(RouteSource::Static(Arc::new(without_vhds(routes(config, &path)?, &path)?)))
        }
        Some(RouteSpecifier::Rds(rds)) => {
            let from = config_source(rds.config_source.as_ref(), &join(path, "rds.config_source"))?;
            if rds.route_config_name.is_empty() {
                return Err(required(path, "rds.route_config_name"));
            }
            Ok(RouteSource::Rds(ResourceRef::new(&rds.route_config_name, from)))
        }
        Some(RouteSpecifier::ScopedRoutes(scoped)) => {
            Ok(RouteSource::Scoped(Arc::new(scoped_routes(scoped, &join(path, "scoped_routes"))?)))
        }
        None => Err(required(path, "route_config")),
    }
}

/// The filters of the list at `path`.
fn filter_chain(list: &[HttpFilter], stat_prefix: &str, path: &str) -> Result<Vec<HttpFilterEntry>> {
    let count = list.len();
    let parse = |(index, filter): (usize, &HttpFilter)| {
        let path = format!("{path}[{index}]");
        let last = index + 1 == count;
        let source = match &filter.config_type {
            Some(ConfigType::TypedConfig(config)) if filter.is_optional && filters::is_nobodys(type_name(config)) => {
                tracing::warn!("{path}: there is no filter for {}, and it is optional", type_name(config));
                return Ok(None);
            }
            Some(ConfigType::TypedConfig(config)) => {
                let cx = FilterCx { path: &join(&path, "typed_config"), stat_prefix };
                let factory = filters::parse(config, &cx)?;
                if factory.is_terminal() != last {
                    let name = &filter.name;
                    let text = if last {
                        format!("the last HTTP filter must be terminal: {name} is not; add envoy.filters.http.router")
                    } else {
                        format!("{name} is terminal and must be the last HTTP filter")
                    };
                    return Err(FieldError::new(path, text));
                }
                FilterSource::Fixed(factory)
            }
            Some(ConfigType::ConfigDiscovery(discovery)) => {
                let path = join(&path, "config_discovery");
                FilterSource::Discovered(discovered(&filter.name, discovery, stat_prefix, last, &path)?)
            }
            None => return Err(required(&path, "typed_config")),
        };
        if filter.disabled && last {
            // Envoy's words.
            return Err(FieldError::new(join(&path, "disabled"), "terminal filter cannot be disabled"));
        }
        Ok(Some(HttpFilterEntry { name: filter.name.as_str().into(), disabled: filter.disabled, source }))
    };
    list.iter().enumerate().filter_map(|entry| parse(entry).transpose()).collect()
}

/// A filter that ECDS configures. The texts of errors are Envoy's.
fn discovered(
    name: &str,
    discovery: &ExtensionConfigSource,
    stat_prefix: &str,
    last: bool,
    path: &str,
) -> Result<Arc<DiscoveredFilter>> {
    if discovery.apply_default_config_without_warming && discovery.default_config.is_none() {
        let text = format!("Error: filter config {name} applied without warming but has no default config.");
        return Err(FieldError::new(join(path, "default_config"), text));
    }
    let type_name = |(index, url): (usize, &String)| {
        let type_name = url.rsplit('/').next().unwrap_or_default();
        if filters::REGISTRY.iter().any(|known| known.type_name == type_name) {
            return Ok(type_name.to_owned());
        }
        let text = format!("Error: no factory found for a required type URL {type_name}.");
        Err(FieldError::new(format!("{}[{index}]", join(path, "type_urls")), text))
    };
    let type_names: Box<[String]> = discovery.type_urls.iter().enumerate().map(type_name).collect::<Result<_>>()?;
    if type_names.is_empty() {
        return Err(FieldError::new(join(path, "type_urls"), "value must contain at least 1 item(s)"));
    }
    let from = config_source(discovery.config_source.as_ref(), &join(path, "config_source"))?;
    let wanted = ResourceRef::new(name, from);
    let without_warming = discovery.apply_default_config_without_warming;
    let mut filter = DiscoveredFilter::new(wanted, without_warming, type_names, last, stat_prefix);
    if let Some(default) = &discovery.default_config {
        let default = filter.parse(default, &join(path, "default_config"))?;
        filter = filter.with_default(default);
    }
    Ok(Arc::new(filter))
}

/// A filter's configuration as ECDS delivers it. It is read by the places that want it: those know which filters they take.
///
/// # Errors
/// There is none.
pub fn extension_config(config: &TypedExtensionConfig, path: &str) -> Result<Any> {
    config.typed_config.clone().ok_or_else(|| required(path, "typed_config"))
}
