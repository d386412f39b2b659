//! Clusters and endpoints: each field to its place in the model.

use std::time::Duration;

use super::*;
use crate::{
    config::model::{
        Check, ConfigSource, DnsLookupFamily, DnsOptions, EndpointAddress, HeadLimits, HeaderKeyFormat, HealthStatus,
        Http1ClientOptions, PreserveCase, ResourceRef, TcpKeepalive, Thresholds,
    },
    layered_runtime::{DiskLayer, LayerSource},
};

const HTTP: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn with_http(options: &str) -> String {
    format!(
        "{{ name: a, typed_extension_protocol_options: {{ {HTTP}: {{ '@type': type.googleapis.com/{HTTP}, {options} }} }} }}"
    )
}

#[test]
fn defaults_are_envoys() {
    let config = one_cluster("{ name: a }").unwrap();
    assert!(matches!(config.discovery, Discovery::Static));
    assert_eq!((config.lb_policy, config.connect_timeout), (LbPolicy::RoundRobin, Duration::from_secs(5)));
    assert_eq!((config.protocol, config.max_requests_per_connection), (UpstreamProtocol::Http1, 0));
    assert_eq!(config.idle_timeout, Some(Duration::from_secs(3600)));
    assert_eq!(config.circuit_breakers, [Thresholds::default(), Thresholds::default()]);
    assert_eq!((config.per_connection_buffer_limit_bytes, config.tcp_keepalive), (1 << 20, None));
    assert!(config.endpoints.is_empty());
}

#[test]
fn limits_and_timeouts() {
    let config = one_cluster(
        "{ name: a, alt_stat_name: 's:1', connect_timeout: 0.25s, per_connection_buffer_limit_bytes: 5, circuit_breakers: { \
         thresholds: [{ max_connections: 1, max_pending_requests: 2 }, { priority: HIGH, max_requests: 3, max_retries: 4 }, { max_connections: 9 }], \
         per_host_thresholds: [{ priority: HIGH, max_connections: 5 }, { priority: HIGH, max_connections: 6 }] \
         }, upstream_connection_options: { tcp_keepalive: { keepalive_probes: 2, keepalive_time: 30 } } }",
    )
    .unwrap();
    assert_eq!((config.stat_name.as_str(), config.connect_timeout), ("s_1", Duration::from_millis(250)));
    assert_eq!(config.per_connection_buffer_limit_bytes, 5);
    let default = Thresholds { max_connections: 1, max_pending_requests: 2, ..Thresholds::default() };
    let high =
        Thresholds { max_requests: 3, max_retries: 4, max_connections_per_host: Some(5), ..Thresholds::default() };
    assert_eq!(config.circuit_breakers, [default, high]);
    let keepalive = TcpKeepalive { probes: Some(2), time: Some(Duration::from_secs(30)), interval: None };
    assert_eq!(config.tcp_keepalive, Some(keepalive));
}

#[test]
fn event_logs_of_health_checks_can_be_opened() {
    let check = "timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}";
    let sink =
        "'@type': type.googleapis.com/envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink";
    for (field, path) in [
        ("event_log_path: /nonexistent/log", "event_log_path"),
        (
            &*format!("event_logger: [{{ name: a, typed_config: {{ {sink}, event_log_path: /nonexistent/log }} }}]"),
            "event_logger[0].typed_config.event_log_path",
        ),
    ] {
        let error = one_cluster(&format!("{{ name: a, health_checks: [{{ {check}, {field} }}] }}")).unwrap_err();
        let wanted =
            format!("health_checks[0].{path}: unable to open file '/nonexistent/log': No such file or directory");
        assert!(error.contains(&wanted), "{error}");
    }
}

#[test]
fn what_is_spoken() {
    let config = one_cluster(&with_http(
        "explicit_http_config: { http_protocol_options: {} }, common_http_protocol_options: { idle_timeout: 0s, \
         max_requests_per_connection: 9 }",
    ))
    .unwrap();
    assert_eq!(
        (config.protocol, config.idle_timeout, config.max_requests_per_connection),
        (UpstreamProtocol::Http1, None, 9)
    );
    let config = one_cluster(&with_http(
        "use_downstream_protocol_config: { http2_protocol_options: { max_concurrent_streams: 3 } }",
    ));
    assert!(
        matches!(config.unwrap().protocol, UpstreamProtocol::Downstream(options) if options.max_concurrent_streams == 3)
    );
    let config = one_cluster("{ name: a, http2_protocol_options: {} }").unwrap();
    assert!(matches!(config.protocol, UpstreamProtocol::Http2(options) if options.max_concurrent_streams == 1024));
}

#[test]
fn discovery_and_balancing() {
    let config = one_cluster(
        "{ name: a, type: STRICT_DNS, dns_refresh_rate: 9s, dns_lookup_family: V4_ONLY, lb_policy: RANDOM }",
    );
    let config = config.unwrap();
    let expected = Discovery::StrictDns(DnsOptions {
        refresh_rate: Duration::from_secs(9),
        family: DnsLookupFamily::V4Only,
        ..DnsOptions::default()
    });
    assert_eq!((config.discovery, config.lb_policy), (expected, LbPolicy::Random));
    let config =
        one_cluster("{ name: a, lb_policy: LEAST_REQUEST, least_request_lb_config: { choice_count: 5 } }").unwrap();
    assert_eq!(config.lb_policy, LbPolicy::LeastRequest(LeastRequest { choice_count: 5, ..LeastRequest::default() }));
    let config =
        one_cluster("{ name: a, type: EDS, eds_cluster_config: { service_name: s, eds_config: { ads: {} } } }");
    assert_eq!(
        config.unwrap().discovery,
        Discovery::Eds { endpoints: ResourceRef { name: "s".into(), from: ConfigSource::default() } }
    );
    let config = one_cluster(
        "{ name: a, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, cleanup_interval: 1s, original_dst_lb_config: { \
         use_http_header: true, http_header_name: X-To, upstream_port_override: 8080 } }",
    );
    let Discovery::OriginalDst { http_header, port_override, cleanup_interval } = config.unwrap().discovery else {
        panic!()
    };
    assert_eq!(http_header.unwrap(), "x-to");
    assert_eq!((port_override, cleanup_interval), (Some(8080), Duration::from_secs(1)));
}

#[test]
fn endpoints_are_read() {
    let host =
        |address: &str, fields: &str| format!("{{ endpoint: {{ address: {{ {address} }}, hostname: h }}, {fields} }}");
    let first = host(
        "socket_address: { address: 10.0.0.1, port_value: 80 }",
        "load_balancing_weight: 7, health_status: DRAINING",
    );
    let second = host("socket_address: { address: 'fd00::1', port_value: 81 }", "health_status: DEGRADED");
    let third = host("pipe: { path: /run/x.sock }", "");
    let yaml = format!(
        "{{ name: a, load_assignment: {{ cluster_name: a, endpoints: [{{ locality: {{ region: r, zone: z }}, priority: 1, \
         lb_endpoints: [{first}, {second}, {third}] }}] }} }}"
    );
    let groups = one_cluster(&yaml).unwrap().endpoints;
    let [group] = groups.as_slice() else { panic!() };
    assert_eq!((group.locality.region.as_str(), group.locality.zone.as_str(), group.priority), ("r", "z", 1));
    let [a, b, c] = group.endpoints.as_slice() else { panic!() };
    assert_eq!(a.address, EndpointAddress::Ip("10.0.0.1:80".parse().unwrap()));
    assert_eq!((a.weight, a.health, &*a.hostname), (7, HealthStatus::Draining, "h"));
    assert_eq!(b.address, EndpointAddress::Ip("[fd00::1]:81".parse().unwrap()));
    assert_eq!((b.weight, b.health), (1, HealthStatus::Degraded));
    assert_eq!((&c.address, c.health), (&EndpointAddress::Pipe("/run/x.sock".into()), HealthStatus::Unknown));
}

#[test]
fn http1_of_a_cluster() {
    let formatter = "stateful_formatter: { name: x, typed_config: { '@type': \
                     type.googleapis.com/envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig, \
                     forward_reason_phrase: true } }";
    let kept = PreserveCase { forward_reason_phrase: true, proper_case_others: false };
    for (format, expected) in
        [("proper_case_words: {}", HeaderKeyFormat::ProperCaseWords), (formatter, HeaderKeyFormat::PreserveCase(kept))]
    {
        let options = format!("{{ enable_trailers: true, header_key_format: {{ {format} }} }}");
        for protocol in [
            format!("explicit_http_config: {{ http_protocol_options: {options} }}"),
            format!("use_downstream_protocol_config: {{ http_protocol_options: {options} }}"),
        ] {
            let cluster = one_cluster(&with_http(&protocol)).unwrap();
            assert_eq!(cluster.http1, Http1ClientOptions { enable_trailers: true, header_key_format: expected });
        }
    }
    let options =
        "explicit_http_config: { http_protocol_options: { header_key_format: { stateful_formatter: { name: x } } } }";
    let at = format!("typed_extension_protocol_options[\"{HTTP}\"].explicit_http_config.http_protocol_options");
    let expected = format!("{at}.header_key_format.stateful_formatter.typed_config: a value is required");
    assert_eq!(one_cluster(&with_http(options)).unwrap_err(), expected);
}

#[test]
fn what_is_honoured_elsewhere_only_is_refused_here() {
    let error = one_cluster("{ name: a, eds_cluster_config: { eds_config: { ads: {} } } }").unwrap_err();
    assert_eq!(error, "eds_cluster_config: eds_cluster_config set in a non-EDS cluster");
    let error = one_cluster(
        "{ name: a, health_checks: [{ timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, custom_health_check: { name: x } }] }",
    );
    assert_eq!(error.unwrap_err(), "health_checks[0].custom_health_check.typed_config: value is required");
    let error = one_cluster(
        "{ name: a, cluster_type: { name: x, typed_config: { '@type': \
         type.googleapis.com/envoy.extensions.clusters.composite.v3.ClusterConfig, clusters: [{ name: b }] } } }",
    );
    let expected = "cluster_type.typed_config: type envoy.extensions.clusters.composite.v3.ClusterConfig is not supported \
                    by culvert yet";
    assert_eq!(error.unwrap_err(), expected);
    let error = one_cluster("{ name: a, cluster_type: { name: x } }").unwrap_err();
    assert_eq!(error, "cluster_type.typed_config: value is required");
}

#[test]
fn aggregates_name_their_members_and_nothing_else() {
    let aggregate = |more: &str| {
        one_cluster(&format!(
            "{{ name: a, cluster_type: {{ name: envoy.clusters.aggregate, typed_config: {{ '@type': \
             type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig, clusters: [b, c] }} }}, {more} }}"
        ))
    };
    let config = aggregate("lb_policy: CLUSTER_PROVIDED").unwrap();
    assert_eq!(config.discovery, Discovery::Aggregate { clusters: ["b".into(), "c".into()].into() });
    let error = aggregate("lb_policy: ROUND_ROBIN").unwrap_err();
    assert!(error.starts_with("lb_policy: CLUSTER_PROVIDED goes with"), "{error}");
    let error = aggregate("lb_policy: CLUSTER_PROVIDED, load_assignment: { cluster_name: a }").unwrap_err();
    assert_eq!(error, "load_assignment: an aggregate has no hosts of its own");
}

/// Envoy's own texts, seen on the real one.
#[test]
fn runtime_layers_are_checked() {
    let layers =
        |layers: &str| load(&format!("{{ node: {{ cluster: blue }}, layered_runtime: {{ layers: [{layers}] }} }}"));
    let error = |text: &str| layers(text).unwrap_err();
    let parsed = layers(
        "{ name: a, static_layer: { b.c: 1 } },
         { name: d, disk_layer: { symlink_root: /run/r, subdirectory: /s, append_service_cluster: true } },
         { name: z, admin_layer: {} }",
    );
    let parsed = parsed.unwrap().runtime;
    assert_eq!(parsed.iter().map(|layer| layer.name.as_str()).collect::<Vec<_>>(), ["a", "d", "z"]);
    let disk = DiskLayer { symlink_root: "/run/r".into(), subdirectory: "s/blue".into() };
    assert_eq!(parsed[1].source, LayerSource::Disk(disk));
    assert_eq!(
        error("{ name: a, static_layer: { b: { c: [1] } } }"),
        "layered_runtime.layers[0].static_layer.b.c: Invalid runtime entry value for b.c"
    );
    assert_eq!(
        error("{ name: a, static_layer: {} }, { name: a, admin_layer: {} }"),
        "layered_runtime.layers[1].name: Duplicate layer name: a"
    );
    assert_eq!(
        error("{ name: a, admin_layer: {} }, { name: b, admin_layer: {} }"),
        "layered_runtime.layers[1].admin_layer: Too many admin layers specified in LayeredRuntime, at most one may be \
         specified"
    );
    assert_eq!(
        error("{ name: a, rtds_layer: { rtds_config: { ads: {} } } }"),
        "layered_runtime.layers[0].rtds_layer.name: value is required"
    );
    let grpc = "{ api_type: GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: x } }] }";
    assert!(
        error(&format!("{{ name: a, rtds_layer: {{ name: r, rtds_config: {{ api_config_source: {grpc} }} }} }}"))
            .starts_with("layered_runtime.layers[0].rtds_layer.rtds_config: must have a statically defined"),
        "there is no such cluster"
    );
    assert_eq!(
        error("{ name: a, disk_layer: { symlink_root: r } }"),
        "layered_runtime.layers[0].disk_layer.symlink_root: invalid file path r"
    );
}

#[test]
fn static_resources_that_wait_need_a_control_plane() {
    let eds = |source: &str, more: &str| {
        let waits = format!("{{ name: a, type: EDS, eds_cluster_config: {{ eds_config: {{ {source} }} }} }}");
        load(&format!("static_resources: {{ clusters: [{waits}, {more}] }}"))
    };
    let plain = "{ name: x }";
    // As in Envoy, which never hears of them.
    assert!(eds("ads: {}", plain).is_ok());
    let grpc = "api_config_source: { api_type: GRPC, transport_api_version: V3, \
                grpc_services: [{ envoy_grpc: { cluster_name: x } }] }";
    assert!(eds(grpc, plain).is_ok());
    let error = |more: &str| eds(grpc, more).unwrap_err();
    let at = "static_resources.clusters[0].eds_cluster_config.eds_config: ";
    let unknown = format!(
        "{at}must have a statically defined non-EDS cluster: 'x' does not exist, was added via api, or is an EDS cluster"
    );
    assert_eq!(error("{ name: z }"), unknown);
    assert_eq!(error("{ name: x, type: EDS, eds_cluster_config: { eds_config: { ads: {} } } }"), unknown);
    let text = error("{ name: x, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED }");
    assert!(text.starts_with(at) && text.ends_with("not supported by culvert yet"), "{text}");
}

#[test]
fn redis_servers_are_checked_with_what_the_cluster_says() {
    let cluster = |check: &str, options: &str| {
        one_cluster(&format!(
            "{{ name: a, health_checks: [{{ timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, {check} }}], \
             typed_extension_protocol_options: {{ envoy.filters.network.redis_proxy: {{ '@type': \
             type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProtocolOptions, {options} }} }} }}"
        ))
    };
    let redis = "custom_health_check: { name: x, typed_config: { '@type': \
                 type.googleapis.com/envoy.extensions.health_checkers.redis.v3.Redis, key: away } }";
    let auth = |options: &str| {
        let config = cluster(redis, options).unwrap().health.checks.remove(0);
        let Check::Redis(redis) = &config.check else { panic!("{config:?}") };
        assert_eq!(redis.key, b"away");
        redis.auth.clone()
    };
    let (user, password) = ("auth_username: { inline_string: u }", "auth_password: { inline_string: p }");
    assert_eq!(auth(password), Some((vec![], b"p".to_vec())));
    assert_eq!(auth(&format!("{user}, {password}")), Some((b"u".to_vec(), b"p".to_vec())));
    assert_eq!(auth(user), None, "a user alone is told nothing");
    // Nobody else would go by them.
    let at = "typed_extension_protocol_options[\"envoy.filters.network.redis_proxy\"]";
    assert_eq!(cluster("tcp_health_check: {}", password).unwrap_err(), format!("{at}: not supported by culvert yet"));
    let other = redis.replace("health_checkers.redis.v3.Redis, key: away", "filters.http.router.v3.Router");
    let error = cluster(&other, password).unwrap_err();
    assert!(error.starts_with("health_checks[0].custom_health_check.typed_config: "), "{error}");
}

#[test]
fn what_hosts_may_have_of_their_own_is_connections() {
    let refused = |fields: &str| one_cluster(&format!("{{ name: a, {fields} }}")).unwrap_err().to_string();
    let said = refused("circuit_breakers: { per_host_thresholds: [{}, { max_requests: 1 }] }");
    assert!(said.contains("per_host_thresholds[1]: Unsupported field in per_host_thresholds"), "{said}");
    let said =
        refused("type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, circuit_breakers: { per_host_thresholds: [{}] }");
    assert!(said.contains("circuit_breakers.per_host_thresholds: not supported"), "{said}");
}

#[test]
fn requests_name_their_hosts() {
    let of = |options: &str| {
        let text = format!(
            "explicit_http_config: {{ http_protocol_options: {{}} }}, upstream_http_protocol_options: {{ {options} }}"
        );
        one_cluster(&with_http(&text)).unwrap().peer_name
    };
    assert_eq!(of("override_auto_sni_header: x"), None, "nothing goes by it");
    let options = of("auto_sni: true").unwrap();
    let named = |authority| options.of(authority).map(|peer| (peer.name.to_string(), peer.sent, peer.checked));
    assert_eq!(named("A.test:80"), Some(("a.test".to_owned(), true, false)));
    assert_eq!(named("10.0.0.1:80"), None);
    let options = of("auto_sni: true, auto_san_validation: true").unwrap();
    let named = |authority| options.of(authority).map(|peer| (peer.name.to_string(), peer.sent, peer.checked));
    assert_eq!(named("[::1]:80"), Some(("::1".to_owned(), false, true)));
}

#[test]
fn old_fields_of_http_say_what_their_successor_says() {
    let old = |fields: &str| one_cluster(&format!("{{ name: a, {fields} }}"));
    let new = |fields: &str| {
        one_cluster(&format!(
            "{{ name: a, typed_extension_protocol_options: {{ envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{ '@type': \
             type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, {fields} }} }} }}"
        ))
    };
    let common = "common_http_protocol_options: { idle_timeout: 5s, max_connection_duration: 60s, max_requests_per_connection: 7 }";
    let one = "http_protocol_options: { enable_trailers: true, header_key_format: { proper_case_words: {} } }";
    let two = "http2_protocol_options: { max_concurrent_streams: 9 }";
    let explicit = |options: &str| format!("explicit_http_config: {{ {options} }}");
    for (fields, successor) in [
        (common.to_owned(), format!("{common}, {}", explicit("http_protocol_options: {}"))),
        (one.to_owned(), explicit(one)),
        (two.to_owned(), explicit(two)),
        (format!("{common}, {two}"), format!("{common}, {}", explicit(two))),
        (
            format!("protocol_selection: USE_DOWNSTREAM_PROTOCOL, {one}, {two}"),
            format!("use_downstream_protocol_config: {{ {one}, {two} }}"),
        ),
    ] {
        let (old, new) = (old(&fields).unwrap(), new(&successor).unwrap());
        assert_eq!(format!("{old:?}"), format!("{new:?}"), "{fields}");
    }
    let error = old(&format!("{one}, {two}")).unwrap_err();
    assert!(error.starts_with("http_protocol_options: cluster: Both HTTP1 and HTTP2 options may only be "), "{error}");
    let limited = old("common_http_protocol_options: { max_headers_count: 9, max_response_headers_kb: 7 }").unwrap();
    assert_eq!(limited.pool.heads, HeadLimits { count: Some(9), kilobytes: Some(7) });
}
