//! Deprecated fields and enum values: they work, with a warning that names them; those that Envoy refuses by default are
//! refused.

use std::sync::LazyLock;

use culvert_xds_client::json;
use prost_reflect::{DynamicMessage, EnumValueDescriptor, ExtensionDescriptor, FieldDescriptor, Value};

use super::honoured::{ALL, honoured};
use crate::{config::FieldError, stats};

/// What Envoy's API has instead of something.
pub(super) struct Replacement {
    /// A deprecated field, or a value of an enum, by its full name.
    pub(super) of: &'static str,
    /// What to write, in words.
    pub(super) text: &'static str,
    /// The field or the message that must be honoured for that to be of use, by its full name; empty: nothing need be written.
    pub(super) by: &'static str,
}

const fn replaced(of: &'static str, text: &'static str, by: &'static str) -> Replacement {
    Replacement { of, text, by }
}

const OPTIONS: &str = "typed_extension_protocol_options";
const BY_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
const DNS_CLUSTER: &str = "cluster_type of envoy.extensions.clusters.dns.v3.DnsCluster";
const BY_DNS_CLUSTER: &str = "envoy.extensions.clusters.dns.v3.DnsCluster";
const BY_RESOLVER: &str = "envoy.config.cluster.v3.Cluster.typed_dns_resolver_config";
const CORS: &str = "typed_per_filter_config of envoy.filters.http.cors";
const BY_CORS: &str = "envoy.extensions.filters.http.cors.v3.CorsPolicy";
const BY_STRING_MATCH: &str = "envoy.config.route.v3.HeaderMatcher.string_match";

/// What to write instead, for every deprecated field and value that is honoured.
pub(super) const REPLACEMENTS: &[Replacement] = &[
    replaced(
        "envoy.config.bootstrap.v3.Admin.access_log_path",
        "access_log",
        "envoy.config.bootstrap.v3.Admin.access_log",
    ),
    replaced(
        "envoy.config.bootstrap.v3.Bootstrap.dns_resolution_config",
        "typed_dns_resolver_config",
        "envoy.config.bootstrap.v3.Bootstrap.typed_dns_resolver_config",
    ),
    replaced(
        "envoy.config.bootstrap.v3.Bootstrap.use_tcp_for_dns_lookups",
        "typed_dns_resolver_config",
        "envoy.config.bootstrap.v3.Bootstrap.typed_dns_resolver_config",
    ),
    replaced("envoy.config.cluster.v3.Cluster.common_http_protocol_options", OPTIONS, BY_OPTIONS),
    replaced("envoy.config.cluster.v3.Cluster.dns_failure_refresh_rate", DNS_CLUSTER, BY_DNS_CLUSTER),
    replaced("envoy.config.cluster.v3.Cluster.dns_jitter", DNS_CLUSTER, BY_DNS_CLUSTER),
    replaced("envoy.config.cluster.v3.Cluster.dns_refresh_rate", DNS_CLUSTER, BY_DNS_CLUSTER),
    replaced("envoy.config.cluster.v3.Cluster.dns_resolution_config", "typed_dns_resolver_config", BY_RESOLVER),
    replaced("envoy.config.cluster.v3.Cluster.dns_resolvers", "typed_dns_resolver_config", BY_RESOLVER),
    replaced("envoy.config.cluster.v3.Cluster.http2_protocol_options", OPTIONS, BY_OPTIONS),
    replaced("envoy.config.cluster.v3.Cluster.http_protocol_options", OPTIONS, BY_OPTIONS),
    replaced("envoy.config.cluster.v3.Cluster.max_requests_per_connection", OPTIONS, BY_OPTIONS),
    replaced(
        "envoy.config.cluster.v3.Cluster.track_timeout_budgets",
        "track_cluster_stats",
        "envoy.config.cluster.v3.TrackClusterStats.timeout_budgets",
    ),
    replaced("envoy.config.cluster.v3.Cluster.protocol_selection", OPTIONS, BY_OPTIONS),
    replaced("envoy.config.cluster.v3.Cluster.respect_dns_ttl", DNS_CLUSTER, BY_DNS_CLUSTER),
    replaced("envoy.config.cluster.v3.Cluster.upstream_http_protocol_options", OPTIONS, BY_OPTIONS),
    replaced("envoy.config.cluster.v3.Cluster.use_tcp_for_dns_lookups", "typed_dns_resolver_config", BY_RESOLVER),
    replaced("envoy.config.core.v3.ApiVersion.V2", "V3", ""),
    replaced(
        "envoy.config.core.v3.ConfigSource.path",
        "path_config_source",
        "envoy.config.core.v3.ConfigSource.path_config_source",
    ),
    replaced(
        "envoy.config.core.v3.HeaderValueOption.append",
        "append_action",
        "envoy.config.core.v3.HeaderValueOption.append_action",
    ),
    replaced(
        "envoy.config.core.v3.HealthCheck.event_log_path",
        "event_logger",
        "envoy.config.core.v3.HealthCheck.event_logger",
    ),
    replaced(
        "envoy.config.core.v3.SubstitutionFormatString.text_format",
        "text_format_source",
        "envoy.config.core.v3.SubstitutionFormatString.text_format_source",
    ),
    replaced(
        "envoy.config.rbac.v3.Permission.metadata",
        "sourced_metadata",
        "envoy.config.rbac.v3.Permission.sourced_metadata",
    ),
    replaced(
        "envoy.config.rbac.v3.Principal.metadata",
        "sourced_metadata",
        "envoy.config.rbac.v3.Principal.sourced_metadata",
    ),
    replaced(
        "envoy.config.rbac.v3.Principal.source_ip",
        "direct_remote_ip or remote_ip",
        "envoy.config.rbac.v3.Principal.direct_remote_ip",
    ),
    replaced("envoy.config.route.v3.HeaderMatcher.contains_match", "string_match", BY_STRING_MATCH),
    replaced("envoy.config.route.v3.HeaderMatcher.exact_match", "string_match", BY_STRING_MATCH),
    replaced("envoy.config.route.v3.HeaderMatcher.prefix_match", "string_match", BY_STRING_MATCH),
    replaced("envoy.config.route.v3.HeaderMatcher.safe_regex_match", "string_match", BY_STRING_MATCH),
    replaced("envoy.config.route.v3.HeaderMatcher.suffix_match", "string_match", BY_STRING_MATCH),
    replaced(
        "envoy.config.route.v3.Route.per_request_buffer_limit_bytes",
        "request_body_buffer_limit",
        "envoy.config.route.v3.Route.request_body_buffer_limit",
    ),
    replaced("envoy.config.route.v3.RouteAction.cors", CORS, BY_CORS),
    replaced(
        "envoy.config.route.v3.RouteAction.grpc_timeout_offset",
        "max_stream_duration.grpc_timeout_header_offset",
        "envoy.config.route.v3.RouteAction.MaxStreamDuration.grpc_timeout_header_offset",
    ),
    replaced(
        "envoy.config.route.v3.RouteAction.include_vh_rate_limits",
        "vh_rate_limits in the filter's typed_per_filter_config",
        "envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute.vh_rate_limits",
    ),
    replaced(
        "envoy.config.route.v3.RouteAction.internal_redirect_action",
        "internal_redirect_policy",
        "envoy.config.route.v3.RouteAction.internal_redirect_policy",
    ),
    replaced(
        "envoy.config.route.v3.RouteAction.max_grpc_timeout",
        "max_stream_duration.grpc_timeout_header_max",
        "envoy.config.route.v3.RouteAction.MaxStreamDuration.grpc_timeout_header_max",
    ),
    replaced(
        "envoy.config.route.v3.RouteAction.max_internal_redirects",
        "internal_redirect_policy",
        "envoy.config.route.v3.RouteAction.internal_redirect_policy",
    ),
    replaced("envoy.config.route.v3.VirtualHost.cors", CORS, BY_CORS),
    replaced(
        "envoy.config.route.v3.VirtualHost.per_request_buffer_limit_bytes",
        "request_body_buffer_limit",
        "envoy.config.route.v3.VirtualHost.request_body_buffer_limit",
    ),
    replaced("envoy.config.tap.v3.TapConfig.match_config", "match", "envoy.config.tap.v3.TapConfig.match"),
    replaced("envoy.config.core.v3.JsonFormatOptions.sort_properties", "nothing: keys are always in order", ""),
    replaced("envoy.config.route.v3.WeightedCluster.total_weight", "nothing: the sum of the weights always counts", ""),
    replaced(
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.format",
        "log_format",
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.log_format",
    ),
    replaced(
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.json_format",
        "log_format",
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.log_format",
    ),
    replaced(
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.typed_json_format",
        "log_format",
        "envoy.extensions.access_loggers.file.v3.FileAccessLog.log_format",
    ),
    replaced(
        "envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig.dns_resolution_config",
        "typed_dns_resolver_config",
        "envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig.typed_dns_resolver_config",
    ),
    replaced(
        "envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig.use_tcp_for_dns_lookups",
        "typed_dns_resolver_config",
        "envoy.extensions.common.dynamic_forward_proxy.v3.DnsCacheConfig.typed_dns_resolver_config",
    ),
    replaced(
        "envoy.extensions.filters.http.compressor.v3.Compressor.CommonDirectionConfig.content_type",
        "content_type_matcher",
        "envoy.extensions.filters.http.compressor.v3.Compressor.CommonDirectionConfig.content_type_matcher",
    ),
    replaced(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.access_log_flush_interval",
        "access_log_options",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.access_log_options",
    ),
    replaced(
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.flush_access_log_on_new_request",
        "access_log_options",
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.access_log_options",
    ),
    replaced(
        "envoy.extensions.filters.http.ext_authz.v3.AuthorizationRequest.allowed_headers",
        "allowed_headers of ExtAuthz",
        "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz.allowed_headers",
    ),
    replaced(
        "envoy.extensions.filters.http.set_metadata.v3.Config.metadata_namespace",
        "metadata",
        "envoy.extensions.filters.http.set_metadata.v3.Metadata",
    ),
    replaced(
        "envoy.extensions.filters.http.set_metadata.v3.Config.value",
        "metadata",
        "envoy.extensions.filters.http.set_metadata.v3.Metadata",
    ),
    replaced(
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext.match_subject_alt_names",
        "match_typed_subject_alt_names",
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext.match_typed_subject_alt_names",
    ),
    replaced(
        "envoy.extensions.filters.common.set_filter_state.v3.FilterStateValue.read_only",
        "nothing: objects may always be replaced",
        "",
    ),
    replaced("envoy.type.matcher.v3.RegexMatcher.google_re2", "nothing: it is the default", ""),
    replaced(
        "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.ZoneAwareLbConfig.force_locality_direct_routing",
        "force_local_zone",
        "envoy.extensions.load_balancing_policies.common.v3.LocalityLbConfig.ZoneAwareLbConfig.force_local_zone",
    ),
    replaced(
        "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest.enable_full_scan",
        "selection_method",
        "envoy.extensions.load_balancing_policies.least_request.v3.LeastRequest.selection_method",
    ),
    replaced(
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash.hash_balance_factor",
        "consistent_hashing_lb_config",
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash.consistent_hashing_lb_config",
    ),
    replaced(
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash.use_hostname_for_hashing",
        "consistent_hashing_lb_config",
        "envoy.extensions.load_balancing_policies.ring_hash.v3.RingHash.consistent_hashing_lb_config",
    ),
];

/// `; write x instead`, or that there is no use in it yet.
fn instead(of: &str) -> String {
    let Some(found) = REPLACEMENTS.iter().find(|it| it.of == of) else { return String::new() };
    if found.by.is_empty() || is_honoured(found.by) {
        return format!("; write {} instead", found.text);
    }
    format!("; keep it for now: {}, which replaces it in Envoy's API, is not supported by culvert yet", found.text)
}

/// Of a field or of a message, by its full name.
fn is_honoured(name: &str) -> bool {
    let of_message = |(message, field): (&str, &str)| {
        honoured(message).is_some_and(|fields| fields == ALL || fields.contains(&field))
    };
    honoured(name).is_some() || name.rsplit_once('.').is_some_and(of_message)
}

static DISALLOWED_FIELD: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| json::pool().get_extension_by_name("envoy.annotations.disallowed_by_default"));
static DISALLOWED_VALUE: LazyLock<Option<ExtensionDescriptor>> =
    LazyLock::new(|| json::pool().get_extension_by_name("envoy.annotations.disallowed_by_default_enum"));

/// Whether a field is deprecated.
pub(super) fn is_deprecated(field: &FieldDescriptor) -> bool {
    field.field_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated())
}

/// The deprecated fields of one message, while it is walked over.
#[derive(Debug, Default)]
pub(super) struct Deprecated {
    found: Vec<FieldError>,
}

impl Deprecated {
    /// Looks at a field that is set.
    ///
    /// # Errors
    /// Envoy refuses the field, or its value, unless a runtime key allows it.
    pub(super) fn field(&mut self, field: &FieldDescriptor, value: &Value, path: &str) -> Result<(), FieldError> {
        if is_deprecated(field) {
            if is_set(&field.options(), DISALLOWED_FIELD.as_ref()) {
                return Err(FieldError::new(path, "is deprecated and disallowed, as in Envoy"));
            }
            let text = format!("the field is deprecated{}", instead(field.full_name()));
            self.found.push(FieldError::new(path, text));
        }
        let Value::EnumNumber(number) = value else { return Ok(()) };
        let kind = field.kind();
        let Some(value) = kind.as_enum().and_then(|desc| desc.get_value(*number)) else { return Ok(()) };
        let deprecated = is_deprecated_value(&value);
        if field.name() == "transport_api_version" && value.name() == "V2" {
            return Err(FieldError::new(path, "version 2 of xDS has been removed, as in Envoy"));
        }
        if deprecated && is_set(&value.options(), DISALLOWED_VALUE.as_ref()) {
            let text = format!("the value {} is deprecated and disallowed, as in Envoy", value.name());
            return Err(FieldError::new(path, text));
        }
        if deprecated {
            let text = format!("the value {} is deprecated{}", value.name(), instead(&full_name(&value)));
            self.found.push(FieldError::new(path, text));
        }
        Ok(())
    }

    /// A line in the log for each, and Envoy's statistics. `of` is the resource; empty: the bootstrap.
    pub(super) fn warn(self, of: &str) -> Vec<FieldError> {
        if !self.found.is_empty() {
            let count = self.found.len() as u64;
            stats::counter("runtime.deprecated_feature_use").add(count);
            stats::gauge("runtime.deprecated_feature_seen_since_process_start").add(count);
        }
        for warning in &self.found {
            match of {
                "" => tracing::warn!("{warning}"),
                of => tracing::warn!("{of}: {warning}"),
            }
        }
        self.found
    }
}

/// Whether a value of an enum is deprecated.
pub(super) fn is_deprecated_value(value: &EnumValueDescriptor) -> bool {
    value.enum_value_descriptor_proto().options.as_ref().is_some_and(|options| options.deprecated())
}

/// Whether Envoy refuses it.
#[cfg(test)]
pub(super) fn is_disallowed(options: &DynamicMessage) -> bool {
    is_set(options, DISALLOWED_FIELD.as_ref()) || is_set(options, DISALLOWED_VALUE.as_ref())
}

/// The enum's name and the value's: by protobuf's own rules a value stands beside its enum.
pub(super) fn full_name(value: &EnumValueDescriptor) -> String {
    format!("{}.{}", value.parent_enum().full_name(), value.name())
}

fn is_set(options: &DynamicMessage, extension: Option<&ExtensionDescriptor>) -> bool {
    extension.is_some_and(|extension| {
        options.has_extension(extension) && options.get_extension(extension).as_bool() == Some(true)
    })
}

#[cfg(test)]
#[path = "deprecated_tests.rs"]
mod tests;
