//! What docs/support.md says of every type URL that Envoy 1.40 knows and of every field of the core messages. It is worked out
//! from [`all`](super::honoured::all) and the descriptors, so nothing can be missing: what is not honoured is
//! refused, and the tables here say only why.

use culvert_xds_client::json;

use super::{
    deprecated::is_deprecated,
    honoured::{ALL, honoured},
};
use crate::http::filters;

/// The type URLs of Envoy 1.40's extensions, one a line.
const TYPE_URLS: &str = include_str!("envoy_type_urls.txt");

/// Not honoured, and what to expect.
#[derive(Clone, Copy)]
enum Why {
    /// It may come.
    NotYet(&'static str),
    /// It has no place in a node proxy, or in this one.
    NotForUs(&'static str),
}
use Why::{NotForUs, NotYet};

const PLATFORM: &str = "bound to a library or product that Culvert does not contain";
const PROTOCOL: &str = "a protocol that Culvert does not speak";
const CODE: &str = "runs code inside the proxy: Culvert's extensions are its own source";
const PROCESS: &str = "about Envoy's own process or threads, which culvertd builds otherwise";

/// Why types are not honoured, by the beginning of their names: the longest that fits counts.
const TYPES: &[(&str, Why)] = &[
    ("envoy.config.bootstrap.v3.", NotForUs(PROCESS)),
    ("envoy.config.core.v3.HealthCheck.", NotYet("active health checks are part of a cluster")),
    ("envoy.config.core.v3.SubstitutionFormatString", NotYet("as an extension of its own")),
    ("envoy.config.metrics.v3.", NotYet("stats sinks; /stats/prometheus is there")),
    ("envoy.config.metrics.v3.HystrixSink", NotForUs("Hystrix is no longer developed")),
    ("envoy.config.trace.v3.", NotYet("tracing")),
    ("envoy.config.upstream.local_address_selector.", NotYet("upstream bind addresses")),
    ("envoy.extensions.access_loggers.", NotYet("access logs other than files, standard streams and gRPC services")),
    ("envoy.extensions.access_loggers.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.access_loggers.wasm.", NotForUs(CODE)),
    ("envoy.extensions.bootstrap.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.bootstrap.internal_listener.", NotYet("internal listeners")),
    ("envoy.extensions.bootstrap.reverse_tunnel.", NotForUs("reverse tunnels go past the node's own network")),
    ("envoy.extensions.clusters.", NotYet("cluster types other than those of `Cluster.type`")),
    ("envoy.extensions.clusters.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.clusters.mcp_multicluster.", NotForUs(PLATFORM)),
    ("envoy.extensions.clusters.reverse_connection.", NotForUs("reverse tunnels go past the node's own network")),
    ("envoy.extensions.common.", NotYet("matchers around filters")),
    ("envoy.extensions.compression.", NotYet("compression")),
    ("envoy.extensions.config.validators.", NotYet("validators of xDS updates")),
    ("envoy.extensions.content_parsers.", NotYet("parsers of bodies")),
    ("envoy.extensions.early_data.", NotYet("TLS early data")),
    ("envoy.extensions.filters.http.", NotYet("one filter after the other")),
    ("envoy.extensions.filters.http.alternate_protocols_cache.", NotForUs(PROTOCOL)),
    ("envoy.extensions.filters.http.aws_", NotForUs(PLATFORM)),
    ("envoy.extensions.filters.http.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.filters.http.gcp_authn.", NotForUs(PLATFORM)),
    ("envoy.extensions.filters.http.lua.", NotForUs(CODE)),
    ("envoy.extensions.filters.http.mcp", NotForUs("model context protocol is an application's matter")),
    ("envoy.extensions.filters.http.wasm.", NotForUs(CODE)),
    ("envoy.extensions.filters.listener.", NotYet("one listener filter after the other")),
    ("envoy.extensions.filters.listener.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.filters.network.", NotYet("one filter after the other")),
    ("envoy.extensions.filters.network.dubbo_proxy.", NotForUs(PROTOCOL)),
    ("envoy.extensions.filters.network.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.filters.network.generic_proxy.", NotForUs(PROTOCOL)),
    ("envoy.extensions.filters.network.reverse_tunnel.", NotForUs("reverse tunnels go past the node's own network")),
    ("envoy.extensions.filters.network.thrift_proxy.", NotForUs(PROTOCOL)),
    ("envoy.extensions.filters.network.wasm.", NotForUs(CODE)),
    ("envoy.extensions.filters.network.zookeeper_proxy.", NotForUs(PROTOCOL)),
    ("envoy.extensions.filters.udp.", NotYet("UDP listeners")),
    ("envoy.extensions.formatter.", NotYet("further operators in formats")),
    ("envoy.extensions.formatter.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.geoip_providers.", NotForUs(PLATFORM)),
    ("envoy.extensions.health_check.", NotYet("logs of health checks")),
    ("envoy.extensions.health_checkers.", NotYet("health checkers other than HTTP, gRPC, TCP and Redis")),
    ("envoy.extensions.health_checkers.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.health_checkers.thrift.", NotForUs(PROTOCOL)),
    ("envoy.extensions.http.", NotYet("extensions of HTTP filters")),
    ("envoy.extensions.http.ai_filters.", NotForUs("understanding model traffic is an application's matter")),
    ("envoy.extensions.internal_redirect.", NotYet("predicates that look at filter state")),
    ("envoy.extensions.key_value.", NotForUs("nothing here keeps such a store")),
    ("envoy.extensions.load_balancing_policies.", NotYet("`Cluster.load_balancing_policy`; see `lb_policy`")),
    ("envoy.extensions.load_balancing_policies.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.local_address_selectors.", NotYet("upstream bind addresses")),
    ("envoy.extensions.matching.", NotYet("matcher trees")),
    ("envoy.extensions.matching.input_matchers.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.network.dns_resolver.", NotForUs("CaresDnsResolverConfig does the same")),
    ("envoy.extensions.network.socket_interface.", NotForUs(PROCESS)),
    ("envoy.extensions.path.", NotYet("path templates")),
    ("envoy.extensions.queue_policy.", NotForUs(PROCESS)),
    ("envoy.extensions.quic.", NotYet("HTTP/3")),
    ("envoy.extensions.rate_limit_descriptors.", NotYet("rate limits")),
    ("envoy.extensions.rbac.", NotYet("RBAC")),
    ("envoy.extensions.regex_engines.", NotForUs("one engine, whose time is linear in the text")),
    ("envoy.extensions.request_id.", NotYet("settings of request ids; the defaults of the UUID extension hold")),
    ("envoy.extensions.resource_monitors.", NotYet("the overload manager")),
    ("envoy.extensions.retry.", NotYet("retry plugins")),
    ("envoy.extensions.router.", NotYet("route plugins")),
    ("envoy.extensions.router.cluster_specifiers.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.router.cluster_specifiers.lua.", NotForUs(CODE)),
    ("envoy.extensions.stat_sinks.", NotYet("stats sinks; /stats/prometheus is there")),
    ("envoy.extensions.stat_sinks.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.stat_sinks.wasm.", NotForUs(CODE)),
    ("envoy.extensions.string_matcher.lua.", NotForUs(CODE)),
    ("envoy.extensions.tracers.", NotYet("tracing")),
    ("envoy.extensions.tracers.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.transport_sockets.", NotYet("one transport socket after the other")),
    ("envoy.extensions.transport_sockets.alts.", NotForUs(PLATFORM)),
    ("envoy.extensions.transport_sockets.dynamic_modules.", NotForUs(CODE)),
    ("envoy.extensions.transport_sockets.quic.", NotYet("HTTP/3")),
    ("envoy.extensions.udp_packet_writer.", NotYet("UDP listeners")),
    ("envoy.extensions.upstreams.", NotYet("upstream protocols other than those of `HttpProtocolOptions`")),
    ("envoy.extensions.wasm.", NotForUs(CODE)),
    ("envoy.extensions.watchdog.", NotForUs(PROCESS)),
    ("envoy.type.matcher.", NotYet("matcher trees")),
    ("envoy.watchdog.", NotForUs(PROCESS)),
    ("google.protobuf.Empty", NotYet("extensions without settings")),
    ("xds.type.matcher.", NotYet("matcher trees")),
];

/// The messages of which docs/support.md has a row for each field.
const CORE: [&str; 10] = [
    "envoy.config.bootstrap.v3.Bootstrap",
    "envoy.config.listener.v3.Listener",
    "envoy.config.listener.v3.FilterChain",
    "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
    "envoy.config.route.v3.RouteConfiguration",
    "envoy.config.route.v3.VirtualHost",
    "envoy.config.route.v3.Route",
    "envoy.config.route.v3.RouteAction",
    "envoy.config.cluster.v3.Cluster",
    "envoy.config.endpoint.v3.Endpoint",
];

const SINKS: &str = "stats are scraped from /stats/prometheus, not pushed";

const NOWHERE: &str = "without effect in Envoy: nothing there reads it";

/// Fields of those that are not meant for Culvert. Any other field that is not honoured has just not been done.
const NOT_FOR_US: &[(&str, &str, &str)] = &[
    ("Bootstrap", "enable_dispatcher_stats", PROCESS),
    ("Bootstrap", "default_socket_interface", PROCESS),
    ("Bootstrap", "listener_manager", PROCESS),
    ("Bootstrap", "application_log_config", "the log is for people; set it with --log-level"),
    ("Bootstrap", "default_regex_engine", "one engine, whose time is linear in the text"),
    ("Bootstrap", "fatal_actions", PROCESS),
    ("Bootstrap", "grpc_async_client_manager_config", PROCESS),
    ("Bootstrap", "memory_allocator_manager", PROCESS),
    ("Bootstrap", "perf_tracing_file_path", PROCESS),
    ("Bootstrap", "stats_flush_on_admin", SINKS),
    ("Bootstrap", "stats_server_version_override", "the version in stats is Culvert's"),
    ("Bootstrap", "watchdog", PROCESS),
    ("Bootstrap", "watchdogs", PROCESS),
    ("HttpConnectionManager", "path_normalization_options", NOWHERE),
    ("HttpConnectionManager", "represent_ipv4_remote_address_as_ipv4_mapped_ipv6", NOWHERE),
    ("HttpConnectionManager", "typed_header_validation_config", "headers are always validated"),
    ("Listener", "connection_balance_config", "each worker has sockets of its own, which the kernel balances"),
    ("Listener", "deprecated_v1", "gone with Envoy's API v1"),
    ("Listener", "use_original_dst", "write the listener filter envoy.filters.listener.original_dst"),
];

/// Both tables, as Markdown.
pub(super) fn text() -> String {
    format!("{}\n{}", fields(), types())
}

fn fields() -> String {
    let mut text = "## Field by field\n\n| Message | Field | |\n|---|---|---|\n".to_owned();
    for message in CORE {
        let descriptor = json::pool().get_message_by_name(message).expect("the messages listed are Envoy's");
        let taken = honoured(message).unwrap_or_default();
        for field in descriptor.fields() {
            let (short, name) = (descriptor.name(), field.name());
            let not_for_us = NOT_FOR_US.iter().find(|(message, field, _)| (*message, *field) == (short, name));
            let deprecated = if is_deprecated(&field) { " (deprecated)" } else { "" };
            let verdict = match not_for_us {
                _ if taken == ALL || taken.contains(&name) => "honoured".to_owned(),
                Some((_, _, why)) => format!("not meant for us: {why}"),
                None => "refused: not done yet".to_owned(),
            };
            text.push_str(&format!("| `{short}` | `{name}` | {verdict}{deprecated} |\n"));
        }
    }
    text
}

fn types() -> String {
    let mut text = "## Type by type\n\nEvery extension of Envoy 1.40, by the type of its configuration.\n\n| Type | |\n|---|---|\n".to_owned();
    for name in TYPE_URLS.lines() {
        let filter = filters::REGISTRY.iter().any(|filter| filter.type_name == name);
        let verdict = match why(name) {
            _ if filter || honoured(name).is_some() => "honoured".to_owned(),
            Some(NotYet(what)) => format!("refused: not done yet ({what})"),
            Some(NotForUs(why)) => format!("not meant for us: {why}"),
            None => panic!("{name} is in no group of TYPES"),
        };
        text.push_str(&format!("| `{name}` | {verdict} |\n"));
    }
    text
}

fn why(name: &str) -> Option<Why> {
    let fitting = TYPES.iter().filter(|(prefix, _)| name.starts_with(prefix));
    fitting.max_by_key(|(prefix, _)| prefix.len()).map(|(_, why)| *why)
}

#[test]
fn every_group_and_every_exception_is_of_use() {
    for (prefix, _) in TYPES {
        assert!(TYPE_URLS.lines().any(|name| name.starts_with(prefix)), "no type begins with {prefix}");
    }
    for (message, field, _) in NOT_FOR_US {
        let name = CORE.iter().find(|name| name.ends_with(&format!(".{message}"))).expect("a core message");
        let descriptor = json::pool().get_message_by_name(name).expect("a message of Envoy's");
        assert!(descriptor.get_field_by_name(field).is_some(), "{message} has no field {field}");
        assert!(
            !honoured(name).unwrap_or_default().contains(field),
            "{message}.{field} is honoured: take it off the list"
        );
    }
}
