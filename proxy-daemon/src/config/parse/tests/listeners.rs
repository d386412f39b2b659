//! Listeners, their chains, TCP proxies and connection managers: each field to its place in the model.

use std::time::Duration;

use envoy_types::pb::envoy::config::listener::v3::Listener as Proto;

use super::*;
use crate::{
    access_log::{Record, ResponseFlags},
    config::model::{
        AccessLogFilter, AccessLogOutput, AccessLogSink, ClusterChoice, CodecType, Comparison, ComparisonOp,
        HashPolicy, HashSource, Listener, OriginalSrc, ServerHeaderTransformation, SourceType, TcpProxyConfig,
    },
    layered_runtime::{Denominator, Key, RuntimeInteger},
};

fn read(yaml: &str) -> Result<Listener, String> {
    let message: Proto = json::from_yaml(yaml).map_err(|error| error.to_string())?;
    json::validate(&message).map_err(|error| error.to_string())?;
    listener(&message, "").map_err(|error| error.to_string())
}

const ADDRESS: &str = "address: { socket_address: { address: '::', port_value: 80, ipv4_compat: true } }";

fn tcp(fields: &str) -> String {
    format!(
        "filters: [{{ name: t, typed_config: {{ '@type': \
         type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: t, {fields} }} }}]"
    )
}

/// A listener with one chain to the cluster `up`; `fields` are its own, `chain` the chain's.
fn with(fields: &str, chain: &str) -> Result<Listener, String> {
    read(&format!("{{ name: l, {ADDRESS}, {fields} filter_chains: [{{ {chain} {} }}] }}", tcp("cluster: up")))
}

#[test]
fn a_listener_and_its_sockets() {
    let plain = with("", "").unwrap();
    assert_eq!(plain.addresses[0].address, "[::]:80".parse().unwrap());
    assert!(plain.addresses[0].ipv4_compat && !plain.transparent && !plain.freebind && !plain.use_original_dst);
    assert_eq!((plain.per_connection_buffer_limit_bytes, plain.original_src), (1 << 20, None));

    let full = with(
        "additional_addresses: [{ address: { socket_address: { address: 127.0.0.1, port_value: 81 } } }], stat_prefix: s, \
         transparent: true, freebind: true, tcp_backlog_size: 7, enable_reuse_port: true, bind_to_port: true, \
         traffic_direction: OUTBOUND, per_connection_buffer_limit_bytes: 9, listener_filters: [{ name: d, typed_config: { \
         '@type': type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst } }, { name: s, \
         typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc, mark: \
         5 } }],",
        "",
    )
    .unwrap();
    assert_eq!(full.addresses[1].address, "127.0.0.1:81".parse().unwrap());
    assert!(full.transparent && full.freebind && full.use_original_dst);
    assert_eq!((full.backlog, full.per_connection_buffer_limit_bytes, full.stat_prefix.as_str()), (7, 9, "s"));
    assert_eq!(full.original_src, Some(OriginalSrc { mark: 5 }));
}

#[test]
fn ports_that_are_not_inspected() {
    let filter = |kind: &str, rule: &str| {
        let config = format!("'@type': type.googleapis.com/envoy.extensions.filters.listener.{kind}");
        with(&format!("listener_filters: [{{ name: f, filter_disabled: {rule}, typed_config: {{ {config} }} }}],"), "")
    };
    let inspector = "tls_inspector.v3.TlsInspector";
    let holds = |rule: &str| {
        let rule = filter(inspector, rule).unwrap().not_inspected.unwrap();
        [24, 25, 26, 3306].map(|port| rule.holds(port))
    };
    const MAIL: &str = "{ destination_port_range: { start: 25, end: 26 } }";
    const DATABASE: &str = "{ destination_port_range: { start: 3306, end: 3307 } }";
    assert_eq!(holds(MAIL), [false, true, false, false]);
    assert_eq!(holds(&format!("{{ or_match: {{ rules: [{MAIL}, {DATABASE}] }} }}")), [false, true, false, true]);
    assert_eq!(holds(&format!("{{ and_match: {{ rules: [{MAIL}, {DATABASE}] }} }}")), [false; 4]);
    assert_eq!(holds(&format!("{{ not_match: {MAIL} }}")), [true, false, true, true]);
    assert_eq!(holds("{ any_match: true }"), [true; 4]);
    assert_eq!(with("", "").unwrap().not_inspected, None);
    let refused = filter("original_dst.v3.OriginalDst", MAIL).unwrap_err();
    assert!(refused.contains("listener_filters[0].filter_disabled"), "{refused}");
}

#[test]
fn a_chain_and_what_it_matches() {
    let chain = with(
        "",
        "name: c, transport_socket: { name: envoy.transport_sockets.raw_buffer, typed_config: { '@type': \
         type.googleapis.com/envoy.extensions.transport_sockets.raw_buffer.v3.RawBuffer } }, filter_chain_match: { \
         destination_port: 443, prefix_ranges: [{ address_prefix: 10.1.2.3, prefix_len: 16 }, { address_prefix: '::1' }], \
         source_type: EXTERNAL, source_prefix_ranges: [{ address_prefix: 'fd00::', prefix_len: 8 }], source_ports: [1, \
         65535], transport_protocol: raw_buffer },",
    );
    let listener = chain.unwrap();
    let chain = &listener.filter_chains[0];
    assert_eq!(&*chain.name, "c");
    let rule = &chain.chain_match;
    assert_eq!((rule.destination_port, rule.source_type), (Some(443), SourceType::External));
    assert_eq!(rule.prefix_ranges, ["10.1.0.0/16".parse().unwrap(), "::/0".parse().unwrap()], "no length means 0");
    assert_eq!(rule.source_prefix_ranges, ["fd00::/8".parse().unwrap()]);
    assert_eq!(rule.source_ports, [1, 65535]);
}

#[test]
fn a_tcp_proxy() {
    let proxy = |fields: &str| -> TcpProxyConfig {
        let listener = read(&format!("{{ name: l, {ADDRESS}, default_filter_chain: {{ {} }} }}", tcp(fields))).unwrap();
        let chain = std::sync::Arc::into_inner(listener.default_filter_chain.unwrap()).unwrap();
        match chain.filters.into_iter().next() {
            Some(NetworkFilterConfig::TcpProxy(proxy)) => std::sync::Arc::into_inner(proxy).unwrap(),
            other => panic!("{other:?}"),
        }
    };
    let plain = proxy("cluster: up");
    assert!(matches!(&plain.cluster, ClusterChoice::Cluster(name) if &**name == "up"));
    assert_eq!((plain.idle_timeout, plain.max_connect_attempts), (Some(Duration::from_secs(3600)), 1));
    assert_eq!(plain.max_downstream_connection_duration, None);
    assert!(plain.hash_policy.is_empty() && plain.backoff.is_none() && plain.duration_jitter == 0.0);
    let further = proxy(
        "cluster: up, max_downstream_connection_duration: 60s, max_downstream_connection_duration_jitter_percentage: { value: 50 }, \
         hash_policy: [{ source_ip: {} }], backoff_options: { base_interval: 2s }",
    );
    let seconds = Duration::from_secs;
    assert_eq!((further.duration_jitter, further.backoff), (0.5, Some((seconds(2), seconds(20)))));
    assert_eq!(*further.hash_policy, [HashPolicy { source: HashSource::SourceIp, terminal: false }]);
    let backoff = |text: &str| proxy(&format!("cluster: up, backoff_options: {{ {text} }}")).backoff;
    assert_eq!(backoff("base_interval: 600s"), Some((seconds(600), seconds(3600))));
    for (intervals, wrong) in [
        ("base_interval: 2s, max_interval: 1s", "max_interval: max_interval must be"),
        ("base_interval: 2s, max_interval: 3601s", "max_interval: no client"),
        ("base_interval: 3601s", "base_interval: no client"),
    ] {
        let proxy = tcp(&format!("cluster: up, backoff_options: {{ {intervals} }}"));
        let refused = read(&format!("{{ name: l, {ADDRESS}, default_filter_chain: {{ {proxy} }} }}"));
        assert!(refused.unwrap_err().to_string().contains(&format!("backoff_options.{wrong}")), "{intervals}");
    }
    let full = proxy(
        "weighted_clusters: { clusters: [{ name: a, weight: 1 }, { name: b, weight: 2 }] }, idle_timeout: 0s, \
         max_connect_attempts: 3, max_downstream_connection_duration: 60s, access_log: [{ name: f, typed_config: { '@type': \
         type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: /dev/stdout, log_format: { \
         text_format_source: { inline_string: \"%START_TIME%\\n\" } } } }]",
    );
    assert!(matches!(&full.cluster, ClusterChoice::Weighted(clusters) if clusters.total() == 3));
    assert_eq!((full.idle_timeout, full.max_connect_attempts), (None, 3));
    assert_eq!(full.max_downstream_connection_duration, Some(Duration::from_secs(60)));
    let AccessLogOutput::Lines { sink, format } = &full.access_logs[0].output else { panic!() };
    assert_eq!(*sink, AccessLogSink::Stdout);
    let line = format.as_ref().unwrap().write(&Record::default());
    assert_eq!(line, b"1970-01-01T00:00:00.000Z\n");
    let tunnel = proxy("cluster: up, tunneling_config: { hostname: 'a:80', use_post: true }").tunneling.unwrap();
    assert!(matches!(&tunnel.hostname, crate::config::model::AddedValue::Literal(host) if host == "a:80"));
    assert_eq!(tunnel.post_path.unwrap(), "/");
    let tunnel = proxy("cluster: up, tunneling_config: { hostname: '%REQUESTED_SERVER_NAME%:80' }").tunneling.unwrap();
    assert!(matches!(&tunnel.hostname, crate::config::model::AddedValue::Format(_)));
    assert!(tunnel.post_path.is_none());
}

#[test]
fn a_connection_manager() {
    let manager = |fields: &str| {
        let bootstrap = load(&http(fields, TO_UP)).unwrap();
        let NetworkFilterConfig::HttpConnectionManager(manager) = &bootstrap.listeners[0].filter_chains[0].filters[0]
        else {
            panic!()
        };
        std::sync::Arc::clone(manager)
    };
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    let plain = manager("");
    assert_eq!((plain.codec_type, plain.server_header), (CodecType::Auto, ServerHeaderTransformation::Overwrite));
    assert_eq!(
        (plain.idle_timeout, plain.stream_idle_timeout, plain.request_timeout),
        (seconds(3600), seconds(300), None)
    );
    assert_eq!(
        (plain.max_request_headers_kb, plain.max_headers_count, plain.http2.max_concurrent_streams),
        (60, 100, 1024)
    );
    assert_eq!(plain.server_name, "envoy");
    assert!(!plain.use_remote_address && plain.internal_ranges.is_empty() && !plain.normalize_path);

    let full = manager(
        "          codec_type: HTTP2
          server_header_transformation: PASS_THROUGH
          common_http_protocol_options: { idle_timeout: 0s, max_connection_duration: 9s, max_connection_duration_jitter: { value: 20 }, max_headers_count: 7, max_requests_per_connection: 8 }
          http2_protocol_options: { max_concurrent_streams: 5, initial_stream_window_size: 65535, initial_connection_window_size: 70000 }
          stream_idle_timeout: 0s
          request_timeout: 3s
          request_headers_timeout: 2s
          max_request_headers_kb: 96
          use_remote_address: true
          xff_num_trusted_hops: 2
          skip_xff_append: true
          via: here
          generate_request_id: false
          preserve_external_request_id: true
          always_set_request_id_in_response: true
          normalize_path: true
          merge_slashes: true
          internal_address_config: { cidr_ranges: [{ address_prefix: 10.0.0.0, prefix_len: 8 }] }",
    );
    assert_eq!((full.codec_type, full.server_header), (CodecType::Http2, ServerHeaderTransformation::PassThrough));
    assert_eq!((full.idle_timeout, full.max_connection_duration, full.duration_jitter), (None, seconds(9), 0.2));
    assert_eq!((full.max_headers_count, full.max_requests_per_connection, full.max_request_headers_kb), (7, 8, 96));
    let http2 = &full.http2;
    assert_eq!(http2.max_concurrent_streams, 5);
    assert_eq!((http2.initial_stream_window_size, http2.initial_connection_window_size), (65535, 70000));
    assert_eq!(
        (full.stream_idle_timeout, full.request_timeout, full.request_headers_timeout),
        (None, seconds(3), seconds(2))
    );
    assert_eq!(full.xff_num_trusted_hops, 2);
    assert!(full.use_remote_address && full.skip_xff_append && !full.generate_request_id);
    assert!(full.preserve_external_request_id && full.always_set_request_id_in_response);
    assert!(full.normalize_path && full.merge_slashes);
    assert_eq!(full.via.as_ref().unwrap(), "here");
    assert_eq!(full.internal_ranges, ["10.0.0.0/8".parse().unwrap()]);
}

#[test]
fn filters_of_access_logs() {
    let filter = |filter: &str| -> Result<String, String> {
        let log = "'@type': type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog";
        let logs = format!("          access_log: [{{ name: a, filter: {filter}, typed_config: {{ {log} }} }}]");
        let bootstrap = load(&http(&logs, TO_UP))?;
        match &bootstrap.listeners[0].filter_chains[0].filters[0] {
            NetworkFilterConfig::HttpConnectionManager(manager) => Ok(format!("{:?}", manager.access_logs[0].filter)),
            NetworkFilterConfig::TcpProxy(_) | NetworkFilterConfig::SniForwardProxy(_) => panic!(),
        }
    };
    let shown = |filter: AccessLogFilter| format!("{filter:?}");
    let integer = |default, key: &str| RuntimeInteger { default, key: Key::optional(key) };
    let comparison = |op, default| Comparison { op, value: integer(default, "k") };
    let value = |default| format!("value: {{ default_value: {default}, runtime_key: k }}");
    assert_eq!(
        filter(&format!("{{ status_code_filter: {{ comparison: {{ op: NE, {} }} }} }}", value(200))).unwrap(),
        shown(AccessLogFilter::StatusCode(comparison(ComparisonOp::NotEqual, 200)))
    );
    assert_eq!(
        filter(&format!(
            "{{ and_filter: {{ filters: [{{ not_health_check_filter: {{}} }}, {{ duration_filter: {{ comparison: {{ op: GE, {} \
             }} }} }}] }} }}",
            value(5)
        ))
        .unwrap(),
        shown(AccessLogFilter::And(vec![
            AccessLogFilter::NotHealthCheck,
            AccessLogFilter::Duration(comparison(ComparisonOp::GreaterOrEqual, 5))
        ]))
    );
    assert_eq!(
        filter("{ runtime_filter: { runtime_key: s, percent_sampled: { numerator: 3, denominator: TEN_THOUSAND } } }")
            .unwrap(),
        shown(AccessLogFilter::Runtime {
            numerator: integer(3, "s"),
            denominator: Denominator::TenThousand,
            independent: false
        })
    );
    let flags = ResponseFlags::NR | ResponseFlags::UF;
    assert_eq!(
        filter("{ response_flag_filter: { flags: [NR, UF] } }").unwrap(),
        shown(AccessLogFilter::ResponseFlags(Some(flags)))
    );
    assert_eq!(filter("{ response_flag_filter: {} }").unwrap(), shown(AccessLogFilter::ResponseFlags(None)));
    let header = filter("{ header_filter: { header: { name: a, present_match: true } } }").unwrap();
    assert!(header.starts_with("Header(HeaderMatcher { name: Name(\"a\")"), "{header}");
    let path = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config.access_log[0].filter";
    assert_eq!(
        filter("{ traceable_filter: {} }").unwrap_err(),
        format!("{path}.traceable_filter: not supported by culvert yet")
    );
}

#[test]
fn what_a_listener_cannot_do_is_named() {
    let cases = [
        ("bind_to_port: false,", "", "bind_to_port: false is not supported by culvert yet"),
        ("enable_reuse_port: false,", "", "enable_reuse_port: false is not supported by culvert yet"),
        (
            "connection_balance_config: { exact_balance: {} },",
            "",
            "connection_balance_config: not supported by culvert yet",
        ),
        ("use_original_dst: true,", "", "use_original_dst: not supported by culvert yet"),
        (
            "listener_filters: [{ name: i, typed_config: { '@type': type.googleapis.com/envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol } }],",
            "",
            "listener_filters[0].typed_config: type envoy.extensions.filters.listener.proxy_protocol.v3.ProxyProtocol is not supported by culvert yet",
        ),
        (
            "",
            "filter_chain_match: { server_names: [a, '*a'] },",
            "filter_chains[0].filter_chain_match.server_names[1]: partial wildcards are not supported in \"server_names\"",
        ),
        (
            "",
            "filter_chain_match: { transport_protocol: quic },",
            "filter_chains[0].filter_chain_match.transport_protocol: \"quic\" is not supported by culvert yet; it has \"tls\" and \"raw_buffer\"",
        ),
        (
            "",
            "filter_chain_match: { prefix_ranges: [{ address_prefix: 10.0.0.300, prefix_len: 8 }] },",
            "filter_chains[0].filter_chain_match.prefix_ranges[0]: 10.0.0.300/8 is not an address range",
        ),
        (
            "",
            "transport_socket: { name: tls, typed_config: { '@type': type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext } },",
            "filter_chains[0].transport_socket.typed_config: this socket takes a DownstreamTlsContext or a RawBuffer",
        ),
    ];
    for (fields, chain, expected) in cases {
        assert_eq!(with(fields, chain).unwrap_err(), expected, "{fields}{chain}");
    }
    let twice = format!("filter_chain_match: {{ destination_port: 80 }}, {}", tcp("cluster: up"));
    let error = read(&format!("{{ name: l, {ADDRESS}, filter_chains: [{{ {twice} }}, {{ {twice} }}] }}")).unwrap_err();
    assert_eq!(error, "filter_chains[1].filter_chain_match: has a matching rule in common with filter_chains[0]");
    let error = read(&format!("{{ name: l, {ADDRESS} }}")).unwrap_err();
    assert_eq!(error, "filter_chains: no filter chains specified");
    let error = read(&format!(
        "{{ name: l, address: {{ pipe: {{ path: /x }} }}, filter_chains: [{{ {} }}] }}",
        tcp("cluster: up")
    ));
    assert_eq!(error.unwrap_err(), "address.pipe: not supported by culvert yet");
    let error = read(&format!(
        "{{ name: l, {ADDRESS}, filter_chains: [{{ {} }}] }}",
        tcp("cluster: up, tunneling_config: { hostname: x, propagate_response_headers: true }")
    ));
    assert_eq!(
        error.unwrap_err(),
        "filter_chains[0].filters[0].typed_config.tunneling_config.propagate_response_headers: not supported by culvert yet"
    );
    let error = read(&format!(
        "{{ name: l, {ADDRESS}, filter_chains: [{{ {} }}] }}",
        tcp("cluster: up, tunneling_config: { hostname: x, post_path: /p }")
    ));
    assert_eq!(
        error.unwrap_err(),
        "filter_chains[0].filters[0].typed_config.tunneling_config.post_path: Can't set a post path when POST method isn't used"
    );
}

#[test]
fn a_discovered_filter_is_checked_before_it_is_asked_for() {
    const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
    const OVERRIDE: &str = "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override";
    let load = |discovery: &str| {
        let fixed = format!("typed_config: {{ \"@type\": {ROUTER} }}");
        let source = "config_source: { path_config_source: { path: /proc/self/status } }";
        let yaml = http("", TO_UP).replace(&fixed, &format!("config_discovery: {{ {source}, {discovery} }}"));
        super::load(&yaml).map(|_| ())
    };
    let error = |discovery: &str| {
        let error = load(discovery).unwrap_err();
        let own = error.strip_prefix(&format!("{HCM}.http_filters[0].config_discovery."));
        own.unwrap_or_else(|| panic!("{error}")).to_owned()
    };
    // Which of its types may end a chain is known when the configuration comes, as in Envoy.
    assert_eq!(load(&format!("type_urls: [{OVERRIDE}]")), Ok(()));
    assert_eq!(load(&format!("type_urls: [{ROUTER}], default_config: {{ '@type': {ROUTER} }}")), Ok(()));
    assert_eq!(error("type_urls: [a/b.Nope]"), "type_urls[0]: Error: no factory found for a required type URL b.Nope.");
    assert_eq!(
        error(&format!("type_urls: [{ROUTER}], apply_default_config_without_warming: true")),
        "default_config: Error: filter config router applied without warming but has no default config."
    );
    assert_eq!(
        error(&format!("type_urls: [{OVERRIDE}], default_config: {{ '@type': {ROUTER} }}")),
        "default_config: Error: filter config has type URL envoy.extensions.filters.http.router.v3.Router but expect \
         culvert.extensions.filters.http.overrides.v1.Override."
    );
    assert_eq!(
        error(&format!("type_urls: [{OVERRIDE}], default_config: {{ '@type': {OVERRIDE}, original_dst_cluster: o }}")),
        "default_config: Error: non-terminal filter named router of type culvert.filters.http.override is the last \
         filter in a http filter chain."
    );
}
