//! Configuration in, model or one exact error out.

mod clusters;
mod listeners;
mod routes;
mod sources;

use culvert_xds_client::json;
use envoy_types::pb::envoy::config::{bootstrap::v3::Bootstrap as Message, cluster::v3::Cluster};

use super::*;
use crate::config::model::{Discovery, LbPolicy, LeastRequest, NetworkFilterConfig, RouteSource, UpstreamProtocol};

fn load(yaml: &str) -> Result<Bootstrap, String> {
    let message: Message = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    json::validate(&message).map_err(|error| error.to_string())?;
    bootstrap(&message).map_err(|error| error.to_string())
}

fn one_cluster(yaml: &str) -> Result<crate::config::model::ClusterConfig, String> {
    let message: Cluster = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    json::validate(&message).map_err(|error| error.to_string())?;
    cluster(&message, "").map_err(|error| error.to_string())
}

/// A listener with one HTTP connection manager; `manager` is added to it, and `routes` are its virtual host's.
fn http(manager: &str, routes: &str) -> String {
    format!(
        r#"
static_resources:
  clusters: [{{ name: up, type: STATIC }}]
  listeners:
  - name: l
    address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }}
    filter_chains:
    - filters:
      - name: hcm
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: s
          route_config: {{ virtual_hosts: [{{ name: v, domains: ["*"], routes: [{routes}] }}] }}
          http_filters:
          - name: router
            typed_config: {{ "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }}
{manager}
"#
    )
}

const HCM: &str = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";
const ROUTE: &str =
    "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.route_config.virtual_hosts[0].routes[0]";
const TO_UP: &str = "{ match: { prefix: / }, route: { cluster: up } }";

#[test]
fn a_whole_bootstrap_is_read() {
    let yaml = http("          use_remote_address: true\n          server_name: culvert", TO_UP);
    let bootstrap = load(&yaml).unwrap();
    assert_eq!(bootstrap.clusters.len(), 1);
    let listener = &bootstrap.listeners[0];
    let NetworkFilterConfig::HttpConnectionManager(manager) = &listener.filter_chains[0].filters[0] else { panic!() };
    assert!(manager.use_remote_address && manager.generate_request_id);
    assert_eq!(manager.server_name, "culvert");
    assert_eq!(manager.idle_timeout, Some(std::time::Duration::from_secs(3600)));
    assert!(matches!(&manager.routes, RouteSource::Static(routes) if routes.virtual_hosts[0].domains == ["*"]));
}

#[test]
fn routes_that_cannot_be_honoured_are_named() {
    let cases = [
        ("{ match: { prefix: / }, route: { cluster: nobody } }", "@route: unknown cluster 'nobody'"),
        (
            "{ match: { prefix: /, filter_state: [{ key: k, address_match: {} }] }, route: { cluster: up } }",
            "@match.filter_state[0].address_match: not supported by culvert yet",
        ),
        (
            "{ match: { safe_regex: { regex: 'a(' } }, route: { cluster: up } }",
            "@match.safe_regex.regex: \"a(\": unclosed group",
        ),
        (
            "{ match: { prefix: / }, direct_response: { status: 99999 } }",
            "@direct_response.status: the value must be less than 600",
        ),
        (
            "{ match: { prefix: / }, route: { cluster: up }, request_headers_to_add: [{ header: { key: a, value: '%NOBODY%' } }] }",
            "@request_headers_to_add[0].header.value: %NOBODY% is not an operator that culvert knows; docs/stats.md lists them",
        ),
        (
            "{ match: { prefix: / }, route: { cluster: up, retry_policy: { rate_limited_retry_back_off: {} } } }",
            "@route.retry_policy.rate_limited_retry_back_off.reset_headers: must have at least 1 item",
        ),
        (
            "{ match: { prefix: / }, route: { weighted_clusters: { clusters: [{ name: up, weight: 0 }] } } }",
            "@route.weighted_clusters: the sum of weights must be greater than 0",
        ),
        ("{ match: { prefix: / }, route: { cluster: up, timeout: -1s } }", "@route.timeout: must not be negative"),
        (
            "{ match: { prefix: / }, redirect: { regex_rewrite: { pattern: { regex: a }, substitution: 'a\\x' } } }",
            "@redirect.regex_rewrite.substitution: \"a\\\\x\": a backslash must be followed by a digit or a backslash",
        ),
    ];
    for (route, expected) in cases {
        let expected = expected.replace('@', &format!("{ROUTE}."));
        let error = load(&http("", route)).unwrap_err();
        assert!(error.starts_with(&expected), "{route}\n got: {error}\nwant: {expected}");
    }
}

#[test]
fn what_a_connection_manager_cannot_do_is_named() {
    let cases = [
        (
            "          codec_type: HTTP3",
            "@codec_type: HTTP3 is not supported by culvert yet; it has AUTO, HTTP1 and HTTP2",
        ),
        ("          tracing: {}", "@tracing: not supported by culvert yet"),
        ("          stat_prefx: x", "@stat_prefx: "),
        (
            "          local_reply_config: { body_format: { json_format: { a: ['%NOPE%'] } } }",
            "@local_reply_config.body_format.json_format: %NOPE% is not an operator",
        ),
        (
            "          local_reply_config: { mappers: [{ filter: { traceable_filter: {} } }] }",
            "@local_reply_config.mappers[0].filter.traceable_filter: not supported by culvert yet",
        ),
        (
            "          use_remote_address: true\n          original_ip_detection_extensions: [{ name: x, typed_config: { '@type': type.googleapis.com/envoy.extensions.http.original_ip_detection.xff.v3.XffConfig } }]",
            "@original_ip_detection_extensions: Original IP detection extensions and use_remote_address may not be mixed",
        ),
        (
            "          original_ip_detection_extensions: [{ name: x, typed_config: { '@type': type.googleapis.com/envoy.extensions.http.original_ip_detection.xff.v3.XffConfig, xff_num_trusted_hops: 1, xff_trusted_cidrs: { cidrs: [{ address_prefix: 10.0.0.0, prefix_len: 8 }] } } }]",
            "@original_ip_detection_extensions[0].typed_config: Cannot set both xff_num_trusted_hops and xff_trusted_cidrs",
        ),
        (
            "          early_header_mutation_extensions: [{ name: x, typed_config: { '@type': type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation, mutations: [{ remove: host }] } }]",
            "@early_header_mutation_extensions[0].typed_config.mutations[0].remove: :-prefixed or host headers may not be removed",
        ),
        (
            "          strip_matching_host_port: true\n          strip_any_host_port: true",
            "HCM: Error: Only one of `strip_matching_host_port` or `strip_any_host_port` can be set.",
        ),
        (
            "          upgrade_configs: [{ upgrade_type: CONNECT-UDP }]",
            "@upgrade_configs[0].upgrade_type: CONNECT-UDP is not supported by culvert yet",
        ),
        (
            "          upgrade_configs: [{ upgrade_type: websocket, filters: [{ name: x }] }]",
            "@upgrade_configs[0].filters[0].typed_config: value is required",
        ),
        (
            "          upgrade_configs: [{ upgrade_type: websocket }, { upgrade_type: WebSocket }]",
            "@upgrade_configs[1].upgrade_type: Error: multiple upgrade configs with the same name: 'WebSocket'",
        ),
        (
            "          access_log: [{ name: x, typed_config: { '@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/null, log_format: { text_format: '%NOPE%' } } }]",
            "@access_log[0].typed_config.log_format.text_format: %NOPE% is not an operator",
        ),
    ];
    for (field, expected) in cases {
        let expected = expected.replace('@', &format!("{HCM}.")).replace("HCM:", &format!("{HCM}:"));
        let error = load(&http(field, TO_UP)).unwrap_err();
        assert!(error.starts_with(&expected), "{field}\n got: {error}\nwant: {expected}");
    }
}

#[test]
fn filter_chains_end_in_one_terminal_filter() {
    let yaml =
        http("", TO_UP).replace("extensions.filters.http.router.v3.Router", "extensions.filters.http.lua.v3.Lua");
    let error = load(&yaml).unwrap_err();
    assert!(error.contains("typed_config") && error.contains("Lua"), "{error}");
    let twice = http(
        "          - name: again\n            typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }",
        TO_UP,
    );
    let error = load(&twice).unwrap_err();
    assert_eq!(error, format!("{HCM}.http_filters[0]: router is terminal and must be the last HTTP filter"));
}

#[test]
fn duplicate_domains_are_refused_as_by_envoy() {
    let yaml = http("", TO_UP).replace(r#"domains: ["*"]"#, r#"domains: ["a", "A"]"#);
    let error = load(&yaml).unwrap_err();
    assert!(error.ends_with("Only unique values for domains are permitted. Duplicate entry of domain a"), "{error}");
}

#[test]
fn clusters_are_read() {
    let config = one_cluster("{ name: 'a.b:80', type: STRICT_DNS, lb_policy: LEAST_REQUEST, load_assignment: { cluster_name: a, endpoints: [{ lb_endpoints: [{ endpoint: { address: { socket_address: { address: example, port_value: 80 } } } }] }] } }").unwrap();
    assert_eq!((&*config.name, config.stat_name.as_str()), ("a.b:80", "a.b_80"));
    assert!(matches!(config.discovery, Discovery::StrictDns { .. }));
    assert_eq!(config.lb_policy, LbPolicy::LeastRequest(LeastRequest { choice_count: 2, ..LeastRequest::default() }));
    let config = one_cluster("{ name: a, type: EDS, eds_cluster_config: { eds_config: { ads: {} } } }").unwrap();
    assert!(matches!(config.discovery, Discovery::Eds { endpoints } if &*endpoints.name == "a"));
    let config = one_cluster("{ name: a, typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { '@type': type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: { http2_protocol_options: { max_concurrent_streams: 7 } } } } }").unwrap();
    assert!(matches!(config.protocol, UpstreamProtocol::Http2(options) if options.max_concurrent_streams == 7));
    let config = one_cluster("{ name: a, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, original_dst_lb_config: { use_http_header: true } }").unwrap();
    let Discovery::OriginalDst { http_header, .. } = config.discovery else { panic!() };
    assert_eq!(http_header.unwrap(), "x-envoy-original-dst-host");
}

/// A health check that connects.
const CONNECT: &str = "timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {}";

#[test]
fn health_checks_have_names() {
    let names = |checks: &str| {
        let config = one_cluster(&format!("{{ name: a, health_checks: [{checks}] }}")).unwrap();
        config.health.checks.iter().map(|check| check.name.clone()).collect::<Vec<_>>()
    };
    assert_eq!(names(&format!("{{ {CONNECT} }}")), [""]);
    assert_eq!(names(&format!("{{ name: a, {CONNECT} }}, {{ {CONNECT}, name: 'b:c' }}")), ["a", "b:c"]);
}

#[test]
fn clusters_that_cannot_be_honoured_are_named() {
    let at = |address: &str| {
        format!(
            "load_assignment: {{ cluster_name: a, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {address} }} }} }}] }}] }}"
        )
    };
    let cases = [
        (
            "lb_policy: LOAD_BALANCING_POLICY_CONFIG".to_owned(),
            "load_balancing_policy: field load_balancing_policy need to be set",
        ),
        (
            "type: LOGICAL_DNS".to_owned(),
            "load_assignment: LOGICAL_DNS clusters must have a single host",
        ),
        (
            format!("health_checks: [{{ name: a, {CONNECT} }}, {{ {CONNECT} }}]"),
            "health_checks[1].name: health check at index 1 is missing a name; all health checks must have a name when multiple \
             health checks are configured",
        ),
        (
            format!("health_checks: [{{ name: a, {CONNECT} }}, {{ name: b, {CONNECT} }}, {{ name: a, {CONNECT} }}]"),
            "health_checks[2].name: duplicate health check name 'a' at index 2; all health check names must be unique within a \
             cluster",
        ),
        (
            format!("health_checks: [{}]", vec![format!("{{ {CONNECT} }}"); 9].join(", ")),
            "health_checks: value must contain no more than 8 item(s)",
        ),
        (
            "health_checks: [{ timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: { \
             send: { text: abc } } }]"
                .to_owned(),
            "health_checks[0].tcp_health_check.send.text: invalid hex string 'abc': pairs of hexadecimal digits",
        ),
        (
            "outlier_detection: { monitors: [{ name: a, typed_config: { '@type': type.googleapis.com/google.protobuf.Empty } }] }".to_owned(),
            "outlier_detection.monitors: not supported by culvert yet",
        ),
        (
            "outlier_detection: { base_ejection_time: 2s, max_ejection_time: 1s }".to_owned(),
            "outlier_detection.max_ejection_time: outlier detector's max_ejection_time cannot be smaller than base_ejection_time",
        ),
        (
            at("{ address: example, port_value: 80 }"),
            "load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.address: malformed IP address: example. Consider setting resolver_name or setting cluster type to 'STRICT_DNS' or 'LOGICAL_DNS'",
        ),
        (
            at("{ address: 10.0.0.1, port_value: 80, protocol: UDP }"),
            "load_assignment.endpoints[0].lb_endpoints[0].endpoint.address.socket_address.protocol: UDP is not supported by culvert yet; it has TCP",
        ),
        ("type: EDS".to_owned(), "eds_cluster_config: value is required"),
        (
            "lb_policy: CLUSTER_PROVIDED".to_owned(),
            "lb_policy: CLUSTER_PROVIDED goes with clusters that choose hosts themselves, and only with them: set both or neither",
        ),
        (
            "type: ORIGINAL_DST".to_owned(),
            "lb_policy: CLUSTER_PROVIDED goes with clusters that choose hosts themselves, and only with them: set both or neither",
        ),
        (
            "type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, original_dst_lb_config: { http_header_name: x }"
                .to_owned(),
            "original_dst_lb_config.http_header_name: has no effect without use_http_header",
        ),
        (
            format!("type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, {}", at("{ address: 10.0.0.1, port_value: 80 }")),
            "load_assignment: an ORIGINAL_DST cluster finds its hosts by itself: load_assignment must not be set",
        ),
    ];
    for (fields, expected) in cases {
        let error = one_cluster(&format!("{{ name: a, {fields} }}")).unwrap_err();
        assert_eq!(error, expected, "{fields}");
    }
}

#[test]
fn control_planes_are_found_through_static_clusters() {
    let yaml = |cluster: &str| {
        format!(
            "{{ node: {{ id: node-a }}, dynamic_resources: {{ cds_config: {{ ads: {{}} }}, ads_config: {{ api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{{ envoy_grpc: {{ cluster_name: {cluster} }} }}] }} }}, static_resources: {{ clusters: [{{ name: xds, type: STATIC, load_assignment: {{ cluster_name: xds, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ address: {{ socket_address: {{ address: 10.0.0.1, port_value: 18000 }} }} }} }}] }}] }} }}] }} }}"
        )
    };
    let bootstrap = load(&yaml("xds")).unwrap();
    let server = bootstrap.sources.ads.unwrap();
    assert_eq!(server.variant, culvert_xds_client::ads::Variant::Delta);
    assert_eq!(bootstrap.sources.servers["xds"].endpoints, ["10.0.0.1:18000"]);
    assert!(bootstrap.cds.is_some() && bootstrap.lds.is_none());
    let error = load(&yaml("nobody")).unwrap_err();
    assert_eq!(
        error,
        "dynamic_resources.ads_config.grpc_services[0].envoy_grpc.cluster_name: Unknown gRPC client cluster 'nobody'"
    );
}

#[test]
fn bootstraps_that_cannot_be_honoured_are_named() {
    let cases = [
        ("stats_sinks: [{ name: x }]", "stats_sinks: not supported by culvert yet"),
        (
            "dynamic_resources: { cds_config: { path: /x } }",
            "dynamic_resources.cds_config.path: paths must refer to an existing path in the system: '/x' does not exist",
        ),
        (
            "bootstrap_extensions: [{ name: x, typed_config: { '@type': type.googleapis.com/envoy.config.core.v3.Node } }]",
            "bootstrap_extensions[0].typed_config: not supported by culvert yet",
        ),
        (
            "static_resources: { clusters: [{ name: a }, { name: a }] }",
            "static_resources.clusters[1].name: duplicate name 'a'",
        ),
    ];
    for (yaml, expected) in cases {
        let error = load(yaml).unwrap_err();
        assert_eq!(error, expected, "{yaml}");
    }
}

#[test]
fn interception_is_checked() {
    let yaml = |fields: &str| {
        format!(
            "dynamic_resources: {{ lds_config: {{ path_config_source: {{ path: /dev/null }} }} }}\nbootstrap_extensions: [{{ name: culvert.bootstrap.interception, typed_config: {{ '@type': type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception, {fields} }} }}]"
        )
    };
    let config =
        load(&yaml("interfaces: ['veth*'], pods: [{ address: 10.1.0.2, failure_policy: FAIL_CLOSED }]")).unwrap();
    let config = config.interception.unwrap();
    assert_eq!(config.outbound_listener, "outbound");
    assert_eq!(config.pods[0].policy.failure_policy, crate::intercept::FailurePolicy::Closed);
    let at = "bootstrap_extensions[0].typed_config";
    for (fields, expected) in [
        ("pods: []", "interfaces: "),
        ("interfaces: [a], pods: [{ address: x }]", "pods[0].address: "),
        ("interfaces: [a], excluded_ports: [70000]", "excluded_ports[0]: "),
        ("interfaces: [a], excluded_ranges: ['10.0.0.0/99']", "excluded_ranges[0]: "),
        ("interfaces: [a], inbound_excluded_ports: [0]", "inbound_excluded_ports[0]: "),
        ("interfaces: [a], inbound_excluded_ranges: [x]", "inbound_excluded_ranges[0]: "),
        ("interfaces: [a], node_source_ranges: [10.96.0.0/12, '::/129']", "node_source_ranges[1]: "),
        ("interfaces: [a], excluded_uids: [7, 65534]", "excluded_uids[1]: "),
        ("interfaces: [a], state_path: x", "state_path: "),
        ("interfaces: [a], enrolment: { pod_manifests: /pods }", "enrolment.selectors: "),
    ] {
        let error = load(&yaml(fields)).unwrap_err();
        assert!(error.starts_with(&format!("{at}.{expected}")), "{error}");
    }
    // Without a source of listeners those that there are have to do.
    let static_ones = |fields: &str| {
        let listener = |name: &str, port: u16| {
            format!(
                "{{name: {name}, address: {{socket_address: {{address: '::', port_value: {port}}}}}, filter_chains: [{{filters: [{{name: t, \
                 typed_config: {{'@type': type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, \
                 stat_prefix: t, cluster: c}}}}]}}]}}"
            )
        };
        let listeners = [listener("outbound", 1), listener("in", 2)].join(", ");
        let listeners = format!("static_resources: {{listeners: [{listeners}]}}\n");
        listeners + yaml(&format!("interfaces: [a], {fields}")).split_once('\n').unwrap().1
    };
    load(&static_ones("direction: BOTH, inbound_listener: in")).unwrap();
    for (fields, expected) in [
        ("direction: BOTH", "inbound_listener: there is no listener `inbound`, and no "),
        ("outbound_listener: out", "outbound_listener: there is no listener `out`, and no "),
    ] {
        let error = load(&static_ones(fields)).unwrap_err();
        assert!(error.starts_with(&format!("{at}.{expected}")), "{error}");
    }
}

#[test]
fn load_reports_need_a_server() {
    let yaml = |service: &str| {
        format!(
            "static_resources: {{ clusters: [{{ name: lrs, type: STATIC, load_assignment: {{ cluster_name: lrs, endpoints: [{{ lb_endpoints: \
             [{{ endpoint: {{ address: {{ socket_address: {{ address: 10.0.0.1, port_value: 1 }} }} }} }}] }}] }} }}] }}\n\
             cluster_manager: {{ load_stats_config: {{ api_type: GRPC, grpc_services: [{service}] }} }}"
        )
    };
    let service = load(&yaml("{ envoy_grpc: { cluster_name: lrs } }")).unwrap().load_stats.unwrap();
    assert_eq!(service.target, culvert_xds_client::source::Target::Cluster("lrs".to_owned()));
    assert_eq!(
        load(&yaml("{ envoy_grpc: { cluster_name: nobody } }")).unwrap_err(),
        "cluster_manager.load_stats_config.grpc_services[0].envoy_grpc.cluster_name: Unknown gRPC client cluster 'nobody'"
    );
    let error = load("cluster_manager: { local_cluster_name: x }").unwrap_err();
    assert_eq!(error, "cluster_manager.local_cluster_name: local cluster 'x' must be defined");
    assert_eq!(load("{}").unwrap().load_stats, None);
}

#[test]
fn health_check_specifiers_are_checked() {
    use crate::config::model::Check;
    let specifier = |check: &str| {
        let yaml = format!(
            "cluster_health_checks: [{{ cluster_name: a.example, health_checks: [{{ timeout: 1s, interval: 2s, unhealthy_threshold: 1, \
             healthy_threshold: 1, {check} }}], locality_endpoints: [{{ endpoints: [{{ address: {{ socket_address: {{ address: \
             10.0.0.1, port_value: 1 }} }} }}] }}] }}]"
        );
        let message = json::from_yaml(&yaml).map_err(|error| error.to_string())?;
        health_check_specifier(&message).map_err(|error| error.to_string())
    };
    let (interval, clusters) = specifier("http_health_check: { path: /x }, interval_jitter: 1s").unwrap();
    assert_eq!(interval.as_secs(), 1);
    let config = &clusters[0].checks[0].1;
    assert_eq!((config.unhealthy_edge_interval.as_secs(), config.no_traffic_healthy_interval.as_secs()), (2, 60));
    let Check::Http(http) = &config.check else { panic!("{config:?}") };
    assert_eq!(
        (&http.host, http.path.as_str(), http.response_buffer_size),
        (&"a.example".parse().unwrap(), "/x", 1024)
    );
    assert_eq!(http.expected_statuses, [(200, 201)]);
    let (_, clusters) = specifier("tcp_health_check: { send: { text: '01fF' }, receive: [{ binary: AQI= }] }").unwrap();
    let Check::Tcp(tcp) = &clusters[0].checks[0].1.check else { panic!("{clusters:?}") };
    assert_eq!((&tcp.send, &tcp.receive), (&vec![1, 255], &vec![vec![1, 2]]));

    let at = "cluster_health_checks[0].health_checks[0]";
    for (check, expected) in [
        ("http_health_check: { path: /, send: { text: '01' } }", "http_health_check.send: a GET request has no body"),
        ("http_health_check: { path: 'a b' }", "http_health_check.path: "),
        ("http_health_check: { path: /, host: 'a b', codec_client_type: HTTP2 }", "http_health_check.host: "),
        (
            "http_health_check: { path: /, codec_client_type: HTTP3 }",
            "http_health_check.codec_client_type: HTTP3 is not supported",
        ),
        (
            "http_health_check: { path: /, expected_statuses: [{ start: 99, end: 200 }] }",
            "http_health_check.expected_statuses[0]: ",
        ),
        (
            "http_health_check: { path: /, retriable_statuses: [{ start: 9, end: 9 }] }",
            "http_health_check.retriable_statuses[0]: ",
        ),
        ("tcp_health_check: { send: { text: '0' } }", "tcp_health_check.send.text: invalid hex string '0'"),
        ("tcp_health_check: { receive: [{ text: '0g' }] }", "tcp_health_check.receive[0].text: "),
        ("tcp_health_check: { proxy_protocol_config: {} }", "tcp_health_check.proxy_protocol_config: not supported"),
        ("grpc_health_check: { authority: 'a/b' }", "grpc_health_check.authority: "),
        ("custom_health_check: { name: redis }", "custom_health_check.typed_config: value is required"),
        ("tcp_health_check: {}, event_log_path: /x", "event_log_path: not supported"),
        ("tcp_health_check: {}, tls_options: {}", "tls_options: not supported"),
        ("tcp_health_check: {}, no_traffic_interval: 0s", "no_traffic_interval: "),
    ] {
        let error = specifier(check).unwrap_err();
        assert!(error.starts_with(&format!("{at}.{expected}")), "{check}: {error}");
    }
}
