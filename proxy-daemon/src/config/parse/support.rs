//! Which fields of Envoy's API are honoured. docs/support.md holds this table, and a test holds it to that.

use std::{collections::HashMap, sync::LazyLock};

use culvert_xds_client::json;
use prost::{Message, Name};
use prost_reflect::{DynamicMessage, FieldDescriptor, ReflectMessage, Value};

use super::deprecated::Deprecated;
use crate::{config::FieldError, http::filters};

/// All fields of the message are honoured.
pub(super) const ALL: &[&str] = &["*"];

/// Messages and their honoured fields. A message that is not here is refused wherever it is set.
///
/// Some listed fields have no effect of their own, here as in Envoy: names, metadata, `traffic_direction`.
pub const HONOURED: &[(&str, &[&str])] = &[
    // Bootstrap
    (
        "envoy.config.bootstrap.v3.Bootstrap",
        &[
            "node",
            "static_resources",
            "dynamic_resources",
            "cluster_manager",
            "hds_config",
            "admin",
            "bootstrap_extensions",
            "layered_runtime",
        ],
    ),
    ("envoy.config.bootstrap.v3.Bootstrap.StaticResources", &["listeners", "clusters", "secrets"]),
    ("envoy.config.bootstrap.v3.Bootstrap.DynamicResources", &["lds_config", "cds_config", "ads_config"]),
    ("envoy.config.bootstrap.v3.ClusterManager", &["load_stats_config"]),
    ("envoy.config.bootstrap.v3.Admin", &["address", "access_log_path"]),
    ("envoy.config.bootstrap.v3.LayeredRuntime", ALL),
    ("envoy.config.bootstrap.v3.RuntimeLayer", ALL),
    ("envoy.config.bootstrap.v3.RuntimeLayer.DiskLayer", ALL),
    ("envoy.config.bootstrap.v3.RuntimeLayer.RtdsLayer", ALL),
    ("envoy.service.runtime.v3.Runtime", ALL),
    ("envoy.config.bootstrap.v3.RuntimeLayer.AdminLayer", ALL),
    ("envoy.config.core.v3.Node", &["id", "cluster", "metadata", "locality", "user_agent_name", "user_agent_version"]),
    ("envoy.config.core.v3.TypedExtensionConfig", ALL),
    ("culvert.extensions.bootstrap.interception.v1.Interception", ALL),
    ("culvert.extensions.bootstrap.interception.v1.Interception.Pod", ALL),
    // xDS
    (
        "envoy.config.core.v3.ConfigSource",
        &[
            "ads",
            "api_config_source",
            "path",
            "path_config_source",
            "self",
            "resource_api_version",
            "initial_fetch_timeout",
        ],
    ),
    ("envoy.config.core.v3.PathConfigSource", ALL),
    ("envoy.config.core.v3.WatchedDirectory", ALL),
    ("envoy.config.core.v3.SelfConfigSource", ALL),
    ("envoy.config.core.v3.AggregatedConfigSource", ALL),
    (
        "envoy.config.core.v3.ApiConfigSource",
        &[
            "api_type",
            "transport_api_version",
            "cluster_names",
            "grpc_services",
            "refresh_delay",
            "request_timeout",
            "set_node_on_first_message_only",
            "rate_limit_settings",
        ],
    ),
    ("envoy.config.core.v3.RateLimitSettings", ALL),
    ("envoy.config.core.v3.GrpcService", &["envoy_grpc", "google_grpc", "timeout", "initial_metadata"]),
    (
        "envoy.config.core.v3.GrpcService.EnvoyGrpc",
        &["cluster_name", "authority", "max_receive_message_length", "retry_policy", "skip_envoy_headers"],
    ),
    ("envoy.config.core.v3.RetryPolicy", &["retry_back_off"]),
    ("envoy.config.core.v3.BackoffStrategy", ALL),
    ("envoy.config.core.v3.GrpcService.GoogleGrpc", &["target_uri", "stat_prefix"]),
    // Health discovery
    ("envoy.service.health.v3.HealthCheckSpecifier", ALL),
    ("envoy.service.health.v3.ClusterHealthCheck", &["cluster_name", "health_checks", "locality_endpoints"]),
    ("envoy.service.health.v3.LocalityEndpoints", ALL),
    (
        "envoy.config.core.v3.HealthCheck",
        &[
            "timeout",
            "interval",
            "initial_jitter",
            "interval_jitter",
            "interval_jitter_percent",
            "unhealthy_threshold",
            "healthy_threshold",
            "reuse_connection",
            "http_health_check",
            "tcp_health_check",
            "grpc_health_check",
            "no_traffic_interval",
            "no_traffic_healthy_interval",
            "unhealthy_interval",
            "unhealthy_edge_interval",
            "healthy_edge_interval",
        ],
    ),
    ("envoy.config.core.v3.HealthCheck.Payload", ALL),
    (
        "envoy.config.core.v3.HealthCheck.HttpHealthCheck",
        &[
            "host",
            "path",
            "send",
            "receive",
            "response_buffer_size",
            "request_headers_to_add",
            "request_headers_to_remove",
            "expected_statuses",
            "retriable_statuses",
            "codec_client_type",
            "service_name_matcher",
            "method",
        ],
    ),
    ("envoy.config.core.v3.HealthCheck.TcpHealthCheck", &["send", "receive"]),
    ("envoy.config.core.v3.HealthCheck.GrpcHealthCheck", ALL),
    // Listeners
    (
        "envoy.config.listener.v3.Listener",
        &[
            "name",
            "address",
            "additional_addresses",
            "stat_prefix",
            "filter_chains",
            "default_filter_chain",
            "per_connection_buffer_limit_bytes",
            "metadata",
            "listener_filters",
            "transparent",
            "freebind",
            "traffic_direction",
            "enable_reuse_port",
            "bind_to_port",
            "access_log",
            "tcp_backlog_size",
            "listener_filters_timeout",
            "continue_on_listener_filters_timeout",
        ],
    ),
    ("envoy.config.listener.v3.AdditionalAddress", &["address"]),
    ("envoy.config.listener.v3.ListenerFilter", &["name", "typed_config"]),
    ("envoy.extensions.filters.listener.original_dst.v3.OriginalDst", ALL),
    ("envoy.extensions.filters.listener.original_src.v3.OriginalSrc", &["mark"]),
    (
        "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
        &["initial_read_buffer_size", "max_client_hello_size"],
    ),
    (
        "envoy.config.listener.v3.FilterChain",
        &["name", "filter_chain_match", "filters", "metadata", "transport_socket", "transport_socket_connect_timeout"],
    ),
    (
        "envoy.config.listener.v3.FilterChainMatch",
        &[
            "destination_port",
            "prefix_ranges",
            "direct_source_prefix_ranges",
            "source_type",
            "source_prefix_ranges",
            "source_ports",
            "server_names",
            "transport_protocol",
            "application_protocols",
        ],
    ),
    ("envoy.config.listener.v3.Filter", &["name", "typed_config"]),
    ("envoy.config.core.v3.TransportSocket", &["name", "typed_config"]),
    ("envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer", ALL),
    (
        "envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        &[
            "common_tls_context",
            "require_client_certificate",
            "require_sni",
            "session_ticket_keys",
            "session_ticket_keys_sds_secret_config",
            "disable_stateless_session_resumption",
            "session_timeout",
            "disable_stateful_session_resumption",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        &["common_tls_context", "sni", "auto_host_sni", "auto_sni_san_validation", "max_session_keys"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext",
        &[
            "tls_params",
            "tls_certificates",
            "tls_certificate_sds_secret_configs",
            "validation_context",
            "validation_context_sds_secret_config",
            "combined_validation_context",
            "alpn_protocols",
        ],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext",
        &["default_validation_context", "validation_context_sds_secret_config"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsParameters",
        &["tls_minimum_protocol_version", "tls_maximum_protocol_version", "cipher_suites", "ecdh_curves"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
        &["certificate_chain", "private_key", "watched_directory"],
    ),
    (
        "envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext",
        &[
            "trusted_ca",
            "match_typed_subject_alt_names",
            "match_subject_alt_names",
            "verify_certificate_hash",
            "verify_certificate_spki",
            "trust_chain_verification",
            "suppress_client_ca_list",
            "watched_directory",
        ],
    ),
    ("envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher", &["san_type", "matcher"]),
    ("envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig", ALL),
    (
        "envoy.extensions.transport_sockets.tls.v3.Secret",
        &["name", "tls_certificate", "validation_context", "session_ticket_keys"],
    ),
    ("envoy.extensions.transport_sockets.tls.v3.TlsSessionTicketKeys", ALL),
    ("envoy.config.core.v3.Address", &["socket_address", "pipe"]),
    ("envoy.config.core.v3.SocketAddress", &["protocol", "address", "port_value", "ipv4_compat"]),
    ("envoy.config.core.v3.Pipe", &["path"]),
    ("envoy.config.core.v3.CidrRange", ALL),
    ("envoy.config.core.v3.Metadata", ALL),
    ("envoy.config.core.v3.Locality", ALL),
    // Network filters
    (
        "envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        &[
            "stat_prefix",
            "cluster",
            "weighted_clusters",
            "idle_timeout",
            "access_log",
            "max_connect_attempts",
            "max_downstream_connection_duration",
        ],
    ),
    ("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster", ALL),
    ("envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight", &["name", "weight"]),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.SetCurrentClientCertDetails",
        ALL,
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        &[
            "forward_client_cert_details",
            "set_current_client_cert_details",
            "codec_type",
            "stat_prefix",
            "rds",
            "route_config",
            "scoped_routes",
            "http_filters",
            "upgrade_configs",
            "common_http_protocol_options",
            "http_protocol_options",
            "http2_protocol_options",
            "server_name",
            "server_header_transformation",
            "max_request_headers_kb",
            "stream_idle_timeout",
            "request_timeout",
            "request_headers_timeout",
            "access_log",
            "use_remote_address",
            "xff_num_trusted_hops",
            "internal_address_config",
            "skip_xff_append",
            "via",
            "generate_request_id",
            "preserve_external_request_id",
            "always_set_request_id_in_response",
            "normalize_path",
            "merge_slashes",
        ],
    ),
    ("envoy.extensions.filters.network.http_connection_manager.v3.Rds", ALL),
    ("envoy.extensions.filters.network.http_connection_manager.v3.ScopedRoutes", ALL),
    ("envoy.extensions.filters.network.http_connection_manager.v3.ScopedRoutes.ScopeKeyBuilder", ALL),
    ("envoy.extensions.filters.network.http_connection_manager.v3.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder", ALL),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder.\
         HeaderValueExtractor",
        ALL,
    ),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.ScopedRoutes.ScopeKeyBuilder.FragmentBuilder.\
         HeaderValueExtractor.KvElement",
        ALL,
    ),
    ("envoy.extensions.filters.network.http_connection_manager.v3.ScopedRouteConfigurationsList", ALL),
    ("envoy.extensions.filters.network.http_connection_manager.v3.ScopedRds", &["scoped_rds_config_source"]),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter",
        &["name", "typed_config", "config_discovery", "disabled"],
    ),
    ("envoy.config.core.v3.ExtensionConfigSource", ALL),
    ("envoy.extensions.filters.http.on_demand.v3.OnDemand", ALL),
    ("envoy.extensions.filters.http.on_demand.v3.OnDemandCds", &["source", "timeout"]),
    ("envoy.extensions.filters.http.header_mutation.v3.HeaderMutation", ALL),
    ("envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute", ALL),
    ("envoy.extensions.filters.http.header_mutation.v3.Mutations", &["request_mutations", "response_mutations"]),
    ("envoy.config.common.mutation_rules.v3.HeaderMutation", ALL),
    ("envoy.config.common.mutation_rules.v3.HeaderMutation.RemoveOnMatch", ALL),
    ("envoy.extensions.filters.http.cors.v3.Cors", ALL),
    ("envoy.extensions.filters.http.cors.v3.CorsPolicy", ALL),
    ("envoy.extensions.filters.http.csrf.v3.CsrfPolicy", ALL),
    ("envoy.extensions.filters.http.buffer.v3.Buffer", ALL),
    ("envoy.extensions.filters.http.health_check.v3.HealthCheck", ALL),
    ("envoy.extensions.filters.http.header_to_metadata.v3.Config", &["request_rules", "response_rules"]),
    ("envoy.extensions.filters.http.header_to_metadata.v3.Config.Rule", ALL),
    ("envoy.extensions.filters.http.header_to_metadata.v3.Config.KeyValuePair", ALL),
    ("envoy.extensions.filters.http.set_metadata.v3.Config", ALL),
    ("envoy.extensions.filters.http.set_metadata.v3.Metadata", &["metadata_namespace", "allow_overwrite", "value"]),
    ("envoy.extensions.filters.http.buffer.v3.BufferPerRoute", ALL),
    (
        "envoy.extensions.filters.http.fault.v3.HTTPFault",
        &[
            "delay",
            "abort",
            "upstream_cluster",
            "headers",
            "downstream_nodes",
            "max_active_faults",
            "response_rate_limit",
            "delay_percent_runtime",
            "abort_percent_runtime",
            "delay_duration_runtime",
            "abort_http_status_runtime",
            "max_active_faults_runtime",
            "response_rate_limit_percent_runtime",
            "abort_grpc_status_runtime",
            "disable_downstream_cluster_stats",
        ],
    ),
    ("envoy.extensions.filters.http.fault.v3.FaultAbort", ALL),
    ("envoy.extensions.filters.http.fault.v3.FaultAbort.HeaderAbort", ALL),
    ("envoy.extensions.filters.common.fault.v3.FaultDelay", ALL),
    ("envoy.extensions.filters.common.fault.v3.FaultDelay.HeaderDelay", ALL),
    ("envoy.extensions.filters.common.fault.v3.FaultRateLimit", ALL),
    ("envoy.extensions.filters.common.fault.v3.FaultRateLimit.FixedLimit", ALL),
    ("envoy.extensions.filters.common.fault.v3.FaultRateLimit.HeaderLimit", ALL),
    (
        "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        &[
            "stat_prefix",
            "status",
            "token_bucket",
            "filter_enabled",
            "filter_enforced",
            "request_headers_to_add_when_not_enforced",
            "response_headers_to_add",
            "enable_x_ratelimit_headers",
            "rate_limited_as_resource_exhausted",
            "enable_retry_after_header",
        ],
    ),
    ("envoy.type.v3.HttpStatus", ALL),
    ("envoy.type.v3.TokenBucket", ALL),
    (
        "envoy.extensions.filters.http.rbac.v3.RBAC",
        &["rules", "rules_stat_prefix", "shadow_rules", "shadow_rules_stat_prefix", "track_per_rule_stats"],
    ),
    ("envoy.config.rbac.v3.RBAC", &["action", "policies"]),
    ("envoy.config.rbac.v3.Policy", &["permissions", "principals"]),
    (
        "envoy.config.rbac.v3.Permission",
        &[
            "and_rules",
            "or_rules",
            "any",
            "header",
            "url_path",
            "destination_ip",
            "destination_port",
            "destination_port_range",
            "not_rule",
            "requested_server_name",
            "uri_template",
        ],
    ),
    ("envoy.config.rbac.v3.Permission.Set", ALL),
    (
        "envoy.config.rbac.v3.Principal",
        &[
            "and_ids",
            "or_ids",
            "any",
            "authenticated",
            "source_ip",
            "direct_remote_ip",
            "remote_ip",
            "header",
            "url_path",
            "not_id",
        ],
    ),
    ("envoy.config.rbac.v3.Principal.Set", ALL),
    ("envoy.config.rbac.v3.Principal.Authenticated", ALL),
    ("envoy.type.matcher.v3.PathMatcher", ALL),
    ("envoy.type.v3.Int32Range", ALL),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.InternalAddressConfig",
        &["cidr_ranges"],
    ),
    (
        "envoy.config.core.v3.HttpProtocolOptions",
        &["idle_timeout", "max_connection_duration", "max_headers_count", "max_requests_per_connection"],
    ),
    ("envoy.config.core.v3.Http1ProtocolOptions", &["accept_http_10", "default_host_for_http_10", "enable_trailers"]),
    (
        "envoy.config.core.v3.Http2ProtocolOptions",
        &["max_concurrent_streams", "initial_stream_window_size", "initial_connection_window_size"],
    ),
    // Access logs
    ("envoy.config.accesslog.v3.AccessLog", &["name", "filter", "typed_config"]),
    (
        "envoy.config.accesslog.v3.AccessLogFilter",
        &[
            "status_code_filter",
            "duration_filter",
            "not_health_check_filter",
            "runtime_filter",
            "and_filter",
            "or_filter",
            "response_flag_filter",
        ],
    ),
    ("envoy.config.accesslog.v3.StatusCodeFilter", ALL),
    ("envoy.config.accesslog.v3.DurationFilter", ALL),
    ("envoy.config.accesslog.v3.ComparisonFilter", ALL),
    ("envoy.config.core.v3.RuntimeUInt32", ALL),
    ("envoy.config.accesslog.v3.NotHealthCheckFilter", ALL),
    ("envoy.config.accesslog.v3.RuntimeFilter", ALL),
    ("envoy.config.accesslog.v3.AndFilter", ALL),
    ("envoy.config.accesslog.v3.OrFilter", ALL),
    ("envoy.config.accesslog.v3.ResponseFlagFilter", ALL),
    ("envoy.extensions.access_loggers.file.v3.FileAccessLog", &["path", "format", "log_format"]),
    ("envoy.extensions.access_loggers.stream.v3.StdoutAccessLog", &["log_format"]),
    ("envoy.extensions.access_loggers.stream.v3.StderrAccessLog", &["log_format"]),
    ("envoy.config.core.v3.SubstitutionFormatString", &["text_format", "text_format_source"]),
    ("envoy.config.core.v3.DataSource", &["filename", "inline_bytes", "inline_string", "environment_variable"]),
    // Routes
    (
        "envoy.config.route.v3.RouteConfiguration",
        &[
            "name",
            "virtual_hosts",
            "vhds",
            "response_headers_to_add",
            "response_headers_to_remove",
            "request_headers_to_add",
            "request_headers_to_remove",
            "validate_clusters",
            "ignore_port_in_host_matching",
            "ignore_path_parameters_in_path_matching",
            "vhost_header",
            "most_specific_header_mutations_wins",
            "typed_per_filter_config",
            "metadata",
        ],
    ),
    ("envoy.config.route.v3.Vhds", ALL),
    ("envoy.config.route.v3.ScopedRouteConfiguration", ALL),
    ("envoy.config.route.v3.ScopedRouteConfiguration.Key", ALL),
    ("envoy.config.route.v3.ScopedRouteConfiguration.Key.Fragment", ALL),
    (
        "envoy.config.route.v3.VirtualHost",
        &[
            "name",
            "domains",
            "routes",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
            "include_request_attempt_count",
            "include_attempt_count_in_response",
            "include_is_timeout_retry_header",
            "per_request_buffer_limit_bytes",
            "request_body_buffer_limit",
            "retry_policy",
            "require_tls",
            "typed_per_filter_config",
            "metadata",
        ],
    ),
    (
        "envoy.config.route.v3.Route",
        &[
            "name",
            "match",
            "route",
            "redirect",
            "direct_response",
            "metadata",
            "typed_per_filter_config",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
            "per_request_buffer_limit_bytes",
            "request_body_buffer_limit",
        ],
    ),
    (
        "envoy.config.route.v3.RouteMatch",
        &[
            "prefix",
            "path",
            "safe_regex",
            "path_separated_prefix",
            "case_sensitive",
            "headers",
            "query_parameters",
            "grpc",
            "runtime_fraction",
            "path_match_policy",
            "cookies",
            "tls_context",
        ],
    ),
    ("envoy.config.core.v3.RuntimeFractionalPercent", ALL),
    ("envoy.type.v3.FractionalPercent", ALL),
    ("envoy.config.route.v3.RouteMatch.GrpcRouteMatchOptions", ALL),
    ("envoy.config.route.v3.RouteMatch.TlsContextMatchOptions", &["presented"]),
    ("envoy.config.route.v3.CookieMatcher", ALL),
    ("envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig", ALL),
    ("envoy.config.route.v3.HeaderMatcher", ALL),
    ("envoy.config.route.v3.QueryParameterMatcher", ALL),
    ("envoy.type.matcher.v3.StringMatcher", &["exact", "prefix", "suffix", "contains", "safe_regex", "ignore_case"]),
    ("envoy.type.matcher.v3.RegexMatcher", &["regex", "google_re2"]),
    ("envoy.type.matcher.v3.RegexMatcher.GoogleRE2", &[]),
    ("envoy.type.matcher.v3.RegexMatchAndSubstitute", ALL),
    ("envoy.extensions.path.rewrite.uri_template.v3.UriTemplateRewriteConfig", ALL),
    ("envoy.type.v3.Int64Range", ALL),
    (
        "envoy.config.route.v3.RouteAction",
        &[
            "cluster",
            "cluster_header",
            "weighted_clusters",
            "cluster_not_found_response_code",
            "prefix_rewrite",
            "regex_rewrite",
            "path_rewrite_policy",
            "host_rewrite_literal",
            "auto_host_rewrite",
            "host_rewrite_header",
            "host_rewrite_path_regex",
            "append_x_forwarded_host",
            "timeout",
            "idle_timeout",
            "max_stream_duration",
            "retry_policy",
            "priority",
            "upgrade_configs",
        ],
    ),
    ("envoy.config.route.v3.RouteAction.MaxStreamDuration", ALL),
    ("envoy.config.route.v3.RouteAction.UpgradeConfig", &["upgrade_type", "enabled"]),
    (
        "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.UpgradeConfig",
        &["upgrade_type", "enabled"],
    ),
    ("envoy.config.route.v3.WeightedCluster", &["clusters", "total_weight", "runtime_key_prefix"]),
    (
        "envoy.config.route.v3.WeightedCluster.ClusterWeight",
        &[
            "name",
            "weight",
            "request_headers_to_add",
            "request_headers_to_remove",
            "response_headers_to_add",
            "response_headers_to_remove",
            "host_rewrite_literal",
        ],
    ),
    ("envoy.config.route.v3.FilterConfig", &["config", "disabled"]),
    (
        "envoy.config.route.v3.RedirectAction",
        &[
            "https_redirect",
            "scheme_redirect",
            "host_redirect",
            "port_redirect",
            "path_redirect",
            "prefix_rewrite",
            "regex_rewrite",
            "response_code",
            "strip_query",
        ],
    ),
    ("envoy.config.route.v3.DirectResponseAction", &["status", "body"]),
    (
        "envoy.config.route.v3.RetryPolicy",
        &[
            "retry_on",
            "num_retries",
            "per_try_timeout",
            "per_try_idle_timeout",
            "retry_host_predicate",
            "host_selection_retry_max_attempts",
            "retriable_status_codes",
            "retry_back_off",
            "rate_limited_retry_back_off",
            "retriable_headers",
            "retriable_request_headers",
        ],
    ),
    ("envoy.config.route.v3.RetryPolicy.RetryHostPredicate", ALL),
    ("envoy.config.route.v3.RetryPolicy.ResetHeader", ALL),
    ("envoy.config.route.v3.RetryPolicy.RateLimitedRetryBackOff", ALL),
    ("envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate", ALL),
    ("envoy.config.route.v3.RetryPolicy.RetryBackOff", ALL),
    ("envoy.config.core.v3.HeaderValueOption", ALL),
    ("envoy.config.core.v3.HeaderValue", &["key", "value"]),
    // Clusters
    (
        "envoy.config.cluster.v3.Cluster",
        &[
            "name",
            "alt_stat_name",
            "type",
            "eds_cluster_config",
            "connect_timeout",
            "per_connection_buffer_limit_bytes",
            "lb_policy",
            "load_assignment",
            "max_requests_per_connection",
            "circuit_breakers",
            "http2_protocol_options",
            "typed_extension_protocol_options",
            "dns_refresh_rate",
            "dns_lookup_family",
            "cleanup_interval",
            "transport_socket",
            "metadata",
            "upstream_connection_options",
            "least_request_lb_config",
            "original_dst_lb_config",
        ],
    ),
    ("envoy.config.cluster.v3.Cluster.EdsClusterConfig", ALL),
    ("envoy.config.cluster.v3.Cluster.LeastRequestLbConfig", &["choice_count"]),
    (
        "envoy.config.cluster.v3.Cluster.OriginalDstLbConfig",
        &["use_http_header", "http_header_name", "upstream_port_override"],
    ),
    ("envoy.config.cluster.v3.CircuitBreakers", &["thresholds"]),
    (
        "envoy.config.cluster.v3.CircuitBreakers.Thresholds",
        &["priority", "max_connections", "max_pending_requests", "max_requests", "max_retries", "retry_budget"],
    ),
    ("envoy.config.cluster.v3.CircuitBreakers.Thresholds.RetryBudget", &["budget_percent", "min_retry_concurrency"]),
    ("envoy.type.v3.Percent", ALL),
    ("envoy.config.cluster.v3.UpstreamConnectionOptions", &["tcp_keepalive"]),
    ("envoy.config.core.v3.TcpKeepalive", ALL),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
        &["common_http_protocol_options", "explicit_http_config", "use_downstream_protocol_config", "auto_config"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.AutoHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    (
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions.UseDownstreamHttpConfig",
        &["http_protocol_options", "http2_protocol_options"],
    ),
    // Endpoints
    ("envoy.config.endpoint.v3.ClusterLoadAssignment", &["cluster_name", "endpoints"]),
    (
        "envoy.config.endpoint.v3.LocalityLbEndpoints",
        &["locality", "metadata", "lb_endpoints", "load_balancing_weight", "priority"],
    ),
    ("envoy.config.endpoint.v3.LbEndpoint", &["endpoint", "health_status", "metadata", "load_balancing_weight"]),
    ("envoy.config.endpoint.v3.Endpoint", &["address", "hostname"]),
];

/// [`HONOURED`] as a Markdown table: the message, and its fields.
pub fn table() -> String {
    let mut table = "| Message | Fields |\n|---|---|\n".to_owned();
    for (message, fields) in HONOURED {
        let fields = match *fields {
            ALL => "all".to_owned(),
            [] => "none: it may stand there empty".to_owned(),
            fields => fields.iter().map(|field| format!("`{field}`")).collect::<Vec<_>>().join(", "),
        };
        table.push_str(&format!("| `{message}` | {fields} |\n"));
    }
    table
}

/// The honoured fields of a message, by its full name; `None` where it is not honoured at all.
pub(super) fn honoured(message: &str) -> Option<&'static [&'static str]> {
    // Every message of every resource is looked up.
    static BY_NAME: LazyLock<HashMap<&str, &[&str]>> = LazyLock::new(|| HONOURED.iter().copied().collect());
    BY_NAME.get(message).copied()
}

/// Refuses the first field that is set and not honoured.
///
/// # Errors
/// The field's full path, below `path`.
pub fn check<M: Message + Name>(message: &M, path: &str) -> Result<(), FieldError> {
    let descriptor = json::pool()
        .get_message_by_name(&M::full_name())
        .ok_or_else(|| FieldError::new(path, format!("{} has no descriptor", M::full_name())))?;
    let mut dynamic = DynamicMessage::new(descriptor);
    dynamic.transcode_from(message).map_err(|error| FieldError::new(path, error.to_string()))?;
    let mut deprecated = Deprecated::default();
    walk(&dynamic, &mut path.to_owned(), &mut deprecated, 0)?;
    // A message inside another one has been looked at with that.
    if path.is_empty() {
        deprecated.warn();
    }
    Ok(())
}

/// `path` is where the message stands, and is left as it was unless there is an error; `anys` is how many `Any`s it is in.
fn walk(
    message: &DynamicMessage,
    path: &mut String,
    deprecated: &mut Deprecated,
    anys: usize,
) -> Result<(), FieldError> {
    let descriptor = message.descriptor();
    let name = descriptor.full_name();
    if name == "google.protobuf.Any" {
        return walk_any(message, path, deprecated, anys);
    }
    if name.starts_with("google.protobuf.") {
        return Ok(());
    }
    let Some(fields) = honoured(name) else { return Err(FieldError::unsupported(path.as_str())) };
    let here = path.len();
    for (field, value) in message.fields() {
        if here > 0 {
            path.push('.');
        }
        path.push_str(field.name());
        if fields != ALL && !fields.contains(&field.name()) {
            return Err(FieldError::unsupported(path.as_str()));
        }
        deprecated.field(&field, value, path)?;
        let at = path.len();
        match value {
            Value::EnumNumber(number) if undefined(&field, *number) => {
                let text = format!("the value {number} is not supported by culvert yet");
                return Err(FieldError::new(path.as_str(), text));
            }
            Value::Message(inner) => walk(inner, path, deprecated, anys)?,
            Value::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    let Value::Message(inner) = item else { break };
                    path.push_str(&format!("[{index}]"));
                    walk(inner, path, deprecated, anys)?;
                    path.truncate(at);
                }
            }
            Value::Map(entries) => {
                for (key, item) in entries {
                    let Value::Message(inner) = item else { break };
                    let key = key.as_str().map_or_else(|| format!("{key:?}"), str::to_owned);
                    path.push_str(&format!("[\"{key}\"]"));
                    walk(inner, path, deprecated, anys)?;
                    path.truncate(at);
                }
            }
            _ => {}
        }
        path.truncate(here);
    }
    Ok(())
}

/// Whether an enum does not have this value. Envoy passes such numbers over where no rule is against them.
fn undefined(field: &FieldDescriptor, number: i32) -> bool {
    field.kind().as_enum().is_some_and(|desc| desc.get_value(number).is_none())
}

fn walk_any(
    any: &DynamicMessage,
    path: &mut String,
    deprecated: &mut Deprecated,
    anys: usize,
) -> Result<(), FieldError> {
    if anys == json::MAX_ANYS {
        let text = format!("more than {} messages are in each other as Any", json::MAX_ANYS);
        return Err(FieldError::new(path.as_str(), text));
    }
    let text = |field: &str| any.get_field_by_name(field).and_then(|value| value.as_str().map(str::to_owned));
    let type_url = text("type_url").unwrap_or_default();
    let name = type_url.rsplit('/').next().unwrap_or_default();
    // An HTTP filter that is not in the table: its own parser knows its fields.
    if honoured(name).is_none() && filters::REGISTRY.iter().any(|filter| filter.type_name == name) {
        return Ok(());
    }
    let Some(descriptor) = json::pool().get_message_by_name(name).filter(|_| honoured(name).is_some()) else {
        // A TypedStruct whose type is known has been resolved by now: it is the type that is not.
        let name = any.transcode_to().map_or_else(|_| name.to_owned(), |any| json::type_name(&any));
        let text = match json::pool().get_message_by_name(&name) {
            Some(_) => format!("type {name} is not supported by culvert yet"),
            // In the words that a file is refused with.
            None => format!("unknown type {name:?}"),
        };
        return Err(FieldError::new(path.as_str(), text));
    };
    let value = any.get_field_by_name("value");
    let bytes = value.as_ref().and_then(|value| value.as_bytes()).cloned().unwrap_or_default();
    let inner =
        DynamicMessage::decode(descriptor, bytes).map_err(|error| FieldError::new(path.as_str(), error.to_string()))?;
    walk(&inner, path, deprecated, anys + 1)
}

/// `path.field`, or `field` at the top.
pub(super) fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

#[cfg(test)]
#[path = "support_tests.rs"]
mod tests;
