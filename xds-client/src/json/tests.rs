use envoy_types::pb::envoy::config::bootstrap::v3::Bootstrap;
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, cluster::LbPolicy};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::listener::v3::{Listener, filter::ConfigType};
use envoy_types::pb::envoy::config::route::v3::{RouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager;
use prost_reflect::ReflectMessage as _;
use serde_json::json;

use super::*;
use crate::Any;
use crate::api::culvert::extensions::filters::http::overrides::v1::Override;

const BOOTSTRAP: &str = r#"
admin:
  address: { socket_address: { address: 127.0.0.1, port_value: 9901 } }
node: { id: one, cluster: c, metadata: { weight: 3, tags: [x, true, null], deep: { big: 12345678901 } } }
static_resources:
  listeners:
  - name: ingress
    address: { socketAddress: { address: "::", portValue: 0x2710 } }
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          codec_type: http2
          stream_idle_timeout: 1.5s
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: { prefix: "/", case_sensitive: "false" }
                route: { cluster: up, timeout: 0.250s }
          http_filters:
          - name: envoy.filters.http.router
            typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }
  clusters:
  - name: up
    connect_timeout: 1s
    type: STATIC
    lb_policy: RING_HASH
    ring_hash_lb_config: { minimum_ring_size: "1024" }
"#;

/// The bootstrap above with one piece of its text replaced.
fn bootstrap_with(from: &str, to: &str) -> String {
    assert_eq!(BOOTSTRAP.matches(from).count(), 1, "{from:?} must occur once");
    BOOTSTRAP.replace(from, to)
}

/// The error of reading and validating the bootstrap with one piece replaced, as a user sees it.
fn error_with(from: &str, to: &str) -> String {
    let text = bootstrap_with(from, to);
    let read = from_yaml::<Bootstrap>(&text).and_then(|bootstrap| validate(&bootstrap));
    read.map_err(|error| error.locate(&text)).expect_err("this must not be accepted").to_string()
}

const MANAGER: &str = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config";

#[test]
fn reads_a_bootstrap() {
    let bootstrap: Bootstrap = from_yaml(BOOTSTRAP).unwrap();
    validate(&bootstrap).unwrap();
    let resources = bootstrap.static_resources.unwrap();
    let Some(ConfigType::TypedConfig(any)) = &resources.listeners[0].filter_chains[0].filters[0].config_type else {
        panic!("no typed_config");
    };
    let manager: HttpConnectionManager = unpack(any, MANAGER).unwrap();
    assert_eq!(manager.stat_prefix, "ingress");
    assert_eq!(manager.stream_idle_timeout.unwrap().nanos, 500_000_000);
    assert_eq!(resources.clusters[0].lb_policy(), LbPolicy::RingHash);
}

#[test]
fn what_is_printed_reads_back_the_same() {
    let bootstrap: Bootstrap = from_yaml(BOOTSTRAP).unwrap();
    let json = to_json(&bootstrap);
    assert_eq!(from_json::<Bootstrap>(json.clone()).unwrap(), bootstrap);
    assert_eq!(from_yaml::<Bootstrap>(&json.to_string()).unwrap(), bootstrap, "JSON is YAML");
}

#[test]
fn prints_like_config_dump() {
    let bootstrap: Bootstrap = from_yaml(BOOTSTRAP).unwrap();
    let json = to_json(&bootstrap);
    let listener = &json["static_resources"]["listeners"][0];
    assert_eq!(listener["address"]["socket_address"]["port_value"], json!(10000));
    let manager = &listener["filter_chains"][0]["filters"][0]["typed_config"];
    assert_eq!(manager["stat_prefix"], "ingress");
    assert_eq!(manager["codec_type"], "HTTP2");
    assert_eq!(manager["stream_idle_timeout"], "1.500s");
    let route = &manager["route_config"]["virtual_hosts"][0]["routes"][0];
    assert_eq!(
        route,
        &json!({"match": {"prefix": "/", "case_sensitive": false}, "route": {"cluster": "up", "timeout": "0.250s"}})
    );
    assert_eq!(json["static_resources"]["clusters"][0]["ring_hash_lb_config"], json!({"minimum_ring_size": "1024"}));
    assert_eq!(
        json["node"]["metadata"],
        json!({"weight": 3, "tags": ["x", true, null], "deep": {"big": "12345678901"}}),
        "integers beyond 32 bits are strings in YAML, as in Envoy"
    );
}

#[test]
fn an_any_of_an_unknown_type_is_printed_as_base64() {
    let any = Any { type_url: "type.googleapis.com/no.such.Type".to_owned(), value: vec![1, 2, 3] };
    assert_eq!(any_to_json(&any), json!({"@type": "type.googleapis.com/no.such.Type", "value": "AQID"}));
    let any = Any { type_url: "type.googleapis.com/google.protobuf.Duration".to_owned(), value: vec![8, 90] };
    assert_eq!(any_to_json(&any), json!({"@type": "type.googleapis.com/google.protobuf.Duration", "value": "90s"}));
    assert_eq!(any_to_json(&Any::default()), json!({}));
}

macro_rules! errors {
    ($($name:ident: $from:literal => $to:expr, $expected:expr;)*) => {$(
        #[test]
        fn $name() {
            assert_eq!(error_with($from, $to), $expected);
        }
    )*};
}

errors! {
    unknown_field: "stat_prefix:" => "stat_prefx:", format!(
        "{MANAGER}.stat_prefx: envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager \
         has no such field; did you mean \"stat_prefix\"? (line 14, column 11)");
    unknown_enum_value: "http2" => "AUTOO", format!(
        "{MANAGER}.codec_type: \"AUTOO\" is not one of AUTO, HTTP1, HTTP2, HTTP3 (line 15, column 23)");
    unknown_type: "router.v3.Router }" => "router.v3.Ruter }", format!(
        "{MANAGER}.http_filters[0].typed_config.@type: unknown type \
         \"type.googleapis.com/envoy.extensions.filters.http.router.v3.Ruter\" (line 26, column 38)");
    missing_type: "{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }" => "{ dynamic_stats: true }", format!(
        "{MANAGER}.http_filters[0].typed_config: \"@type\" is missing: it must name the message type of this object \
         (line 26, column 27)");
    two_of_a_oneof: "type: STATIC" => "type: STATIC\n    cluster_type: { name: x }",
        "static_resources.clusters[0].cluster_type: \"type\" is set already: \
         only one of cluster_discovery_type may be (line 31, column 5)";
    number_for_a_string: "stat_prefix: ingress" => "stat_prefix: 123", format!(
        "{MANAGER}.stat_prefix: expected a string, found a number (put it in quotes) (line 14, column 24)");
    boolean_for_a_string: "stat_prefix: ingress" => "stat_prefix: on", format!(
        "{MANAGER}.stat_prefix: expected a string, found a boolean (put it in quotes) (line 14, column 24)");
    string_for_a_number: "0x2710" => "http",
        "static_resources.listeners[0].address.socket_address.port_value: \"http\" is not an integer (line 8, column 59)";
    fraction_for_an_integer: "0x2710" => "1.5",
        "static_resources.listeners[0].address.socket_address.port_value: \"1.5\" is not an integer (line 8, column 59)";
    negative_for_unsigned: "0x2710" => "-1",
        "static_resources.listeners[0].address.socket_address.port_value: \
         the number does not fit an unsigned 32-bit integer (line 8, column 59)";
    list_for_an_object: "address: { socketAddress: { address: \"::\", portValue: 0x2710 } }" => "address: []",
        "static_resources.listeners[0].address: expected an object, found a list (line 8, column 14)";
    separators_in_a_number: "0x2710" => "1_0",
        "static_resources.listeners[0].address.socket_address.port_value: \"1_0\" is not an integer (line 8, column 59)";
    yaml_infinity: "0x2710" => ".inf",
        "static_resources.listeners[0].address.socket_address.port_value: \".inf\" is not an integer (line 8, column 59)";
    number_for_a_boolean: "\"false\"" => "1", format!(
        "{MANAGER}.route_config.virtual_hosts[0].routes[0].match.case_sensitive: expected a boolean, found a number \
         (line 22, column 55)");
    yaml_boolean_in_quotes: "\"false\"" => "\"off\"", format!(
        "{MANAGER}.route_config.virtual_hosts[0].routes[0].match.case_sensitive: expected a boolean, found a string \
         (line 22, column 55)");
    tagged_number: "id: one" => "id: !!str 5",
        "node.id: expected a string, found a number (put it in quotes) (line 4, column 19)";
    letter_that_is_a_boolean: "id: one" => "id: n",
        "node.id: expected a string, found a boolean (put it in quotes) (line 4, column 13)";
    type_without_a_slash: "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router" => "x.Router", format!(
        "{MANAGER}.http_filters[0].typed_config.@type: unknown type \"x.Router\" (line 26, column 38)");
    duration_without_unit: "0.250s" => "0.25", format!(
        "{MANAGER}.route_config.virtual_hosts[0].routes[0].route.timeout: \
         \"0.25\" is not a duration, such as \"1.5s\" (line 23, column 48)");
    duration_too_fine: "connect_timeout: 1s" => "connect_timeout: 1.0000000001s",
        "static_resources.clusters[0].connect_timeout: \"1.0000000001s\" has more than nine fractional digits (line 29, column 22)";
    merge_keys_are_not_merged: "connect_timeout: 1s" => "<<: { connect_timeout: 1s }",
        "static_resources.clusters[0].<<: envoy.config.cluster.v3.Cluster has no such field (line 29, column 5)";

    rule_enum_defined_only: "http2" => "77", format!(
        "{MANAGER}.codec_type: 77 is not a value of \
         envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.CodecType (line 15, column 11)");
    rule_number_too_large: "9901" => "99901",
        "admin.address.socket_address.port_value: the value must be at most 65535 (line 3, column 52)";
    rule_empty_string: "stat_prefix: ingress" => "stat_prefix: ''", format!(
        "{MANAGER}.stat_prefix: must not be empty (line 14, column 11)");
    rule_too_few_items: "domains: [\"*\"]" => "domains: []", format!(
        "{MANAGER}.route_config.virtual_hosts[0].domains: must have at least 1 item (line 20, column 15)");
    rule_oneof_required: "prefix: \"/\", " => "", format!(
        "{MANAGER}.route_config.virtual_hosts[0].routes[0].match: one of prefix, path, safe_regex, connect_matcher, \
         path_separated_prefix, path_match_policy must be set (line 22, column 17)");
    rule_wrapper: "\"1024\"" => "8388609",
        "static_resources.clusters[0].ring_hash_lb_config.minimum_ring_size: the value must be at most 8388608 \
         (line 32, column 28)";
    rule_duration: "connect_timeout: 1s" => "connect_timeout: 0s",
        "static_resources.clusters[0].connect_timeout: the value must be greater than 0s (line 29, column 5)";
}

#[test]
fn what_yaml_cpp_and_protobuf_take_is_taken() {
    for (from, to) in [
        ("0x2710", "010000"),
        ("0x2710", "\"8080\""),
        ("0x2710", "1e3"),
        ("0x2710", "8080.0"),
        ("0x2710", "08"),
        ("0x2710", "+80"),
        ("0x2710", "\"0x50\""),
        ("0x2710", "\"080\""),
        ("0x2710", "1.5e3"),
        ("\"false\"", "\"fAlse\""),
        ("\"false\"", "\"1\""),
        ("id: one", "id: 1.5"),
        ("id: one", "id: 99999999999"),
        ("id: one", "id: yEs"),
        ("http2", "\"1\""),
        ("\"false\"", "off"),
        ("\"false\"", "No"),
        ("http2", "2"),
        ("http2", "AUTO\n          via: null"),
        ("http2", "AUTO\n          server_name: ~"),
        ("stat_prefix: ingress", "stat_prefix: \"123\""),
        ("stat_prefix: ingress", "stat_prefix: |\n            text"),
        ("connect_timeout: 1s", "connect_timeout: &a 1s\n    cleanup_interval: *a"),
        ("connect_timeout: 1s", "connect_timeout: { seconds: 1 }"),
        ("connect_timeout: 1s", "connect_timeout: soon\n    connect_timeout: 1s"),
        ("connect_timeout: 1s", "connect_timeout: 1s\n    connectTimeout: 2s"),
        ("connect_timeout: 1s", "!ignore any: {}\n    connect_timeout: 1s"),
        ("domains: [\"*\"]", "domains: \"*\""),
        ("domains: [\"*\"]", "domains: [[a, [b]], c]"),
        ("\"false\"", "{ value: false }"),
        ("id: one", "id: ! 5"),
        ("type: STATIC", "type: STATIC\n---\n[broken"),
    ] {
        let read = from_yaml::<Bootstrap>(&bootstrap_with(from, to)).and_then(|bootstrap| validate(&bootstrap));
        assert_eq!(read, Ok(()), "{to}");
    }
    let octal: Bootstrap = from_yaml(&bootstrap_with("0x2710", "010000")).unwrap();
    let json = to_json(&octal);
    assert_eq!(json["static_resources"]["listeners"][0]["address"]["socket_address"]["port_value"], 4096);
}

#[test]
fn of_two_spellings_the_last_counts() {
    let text = "node: { id: a, id: b, userAgentName: one, user_agent_name: two, locality: { zone: z } }";
    let bootstrap: Bootstrap = from_yaml(text).unwrap();
    let node = bootstrap.node.unwrap();
    assert_eq!((node.id.as_str(), node.user_agent_name.as_str()), ("b", "two"));
    let text = r#"{"static_resources": {"clusters": {"name": "a"}}, "staticResources": {"clusters": [{"name": "b"}]}}"#;
    let bootstrap: Bootstrap = read(text, Format::Json, UnknownFields::Reject).unwrap();
    let names: Vec<_> = bootstrap.static_resources.unwrap().clusters.into_iter().map(|cluster| cluster.name).collect();
    assert_eq!(names, ["b"]);
}

#[test]
fn json_is_read_as_protobuf_reads_it() {
    let read = |text: &str| read::<Bootstrap>(text, Format::Json, UnknownFields::Reject);
    for text in ["{}", " {'node': {id: \"a\",},} ", r#"{"node": {"id": "\u0061\ud83d\ude00"}}"#, "{\"node\": null}"] {
        assert!(read(text).is_ok(), "{text}: {:?}", read(text));
    }
    for (text, expected) in [
        ("", "not valid JSON: expected a value, and the text ends (line 1, column 1)"),
        ("node: {}", "not valid JSON: expected a value, found 'n' (line 1, column 1)"),
        ("{} {}", "not valid JSON: '{' follows the end of the value (line 1, column 4)"),
        ("{\n  // no\n}", "not valid JSON: expected a key, found '/' (line 2, column 3)"),
        (r#"{"node": {"id": "a}}"#, "not valid JSON: the string has no end (line 1, column 17)"),
        (r#"{"node": {"id": "\ud83d"}}"#, "not valid JSON: there is no such escape in a string (line 1, column 19)"),
        (r#"{"node": {"metadata": {"a": 010}}}"#, "not valid JSON: expected a number, found '0' (line 1, column 29)"),
        (
            r#"{"node": {"metadata": {"a": 1, "a": 2}}}"#,
            "node.metadata[\"a\"]: the key occurs twice (line 1, column 32)",
        ),
        (r#"{"node": {"id": 5}}"#, "node.id: expected a string, found a number (put it in quotes) (line 1, column 17)"),
    ] {
        assert_eq!(read(text).unwrap_err().to_string(), expected, "{text}");
    }
    let deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    assert!(read(&deep).unwrap_err().message.contains("nested deeper"));
}

#[test]
fn unknown_fields_are_passed_over_where_that_is_asked_for() {
    let text = "node: { id: a, nobody: { x: 1 } }\nno_such_field: 1";
    let bootstrap: Bootstrap = read(text, Format::Yaml, UnknownFields::Ignore).unwrap();
    assert_eq!(bootstrap.node.unwrap().id, "a");
    assert!(read::<Bootstrap>("node: { id: [1] }", Format::Yaml, UnknownFields::Ignore).is_err());
}

#[test]
fn typed_structs_become_what_they_stand_for() {
    const ROUTER: &str = "{ \"@type\": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router }";
    let text = |value: &str| {
        bootstrap_with(
            ROUTER,
            &format!(
                "\n              \"@type\": type.googleapis.com/xds.type.v3.TypedStruct\n              \
             type_url: type.googleapis.com/envoy.extensions.filters.http.router.v3.Router\n              value: {value}"
            ),
        )
    };
    let plain: Bootstrap = from_yaml(&bootstrap_with(".Router }", ".Router, suppress_envoy_headers: true }")).unwrap();
    let typed: Bootstrap = from_yaml(&text("{ suppressEnvoyHeaders: true }")).unwrap();
    assert!(matches!(resolve_typed_structs(&plain, UnknownFields::Reject), Ok(std::borrow::Cow::Borrowed(_))));
    assert_eq!(*resolve_typed_structs(&typed, UnknownFields::Reject).unwrap(), plain);
    let text = text("{ supress_envoy_headers: true }");
    let error = resolve_typed_structs(&from_yaml::<Bootstrap>(&text).unwrap(), UnknownFields::Reject)
        .unwrap_err()
        .locate(&text)
        .to_string();
    assert_eq!(
        error,
        format!(
            "{MANAGER}.http_filters[0].typed_config.supress_envoy_headers: envoy.extensions.filters.http.router.v3.Router has \
         no such field; did you mean \"suppress_envoy_headers\"? (line 29, column 24)"
        )
    );
}

#[test]
fn broken_yaml_is_refused_with_its_position() {
    for (text, expected) in [
        ("", "the document is empty"),
        ("node: {", "(line"),
        ("node:\n  id: [a\n", "(line"),
        ("node:\n\tid: x", "(line 2"),
        ("node: *nothing", "(line 1"),
        ("a: &x [*x]", "the alias names a value that contains it (line 1, column 8)"),
        ("? [a]\n: b", "a key must be a plain value (line 1, column 3)"),
    ] {
        let error = from_yaml::<Bootstrap>(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text:?}: {error}");
        assert!(!error.contains('\n'), "one line: {error}");
    }
}

#[test]
fn nesting_is_bounded() {
    for (open, close) in [("[", "]"), ("{a: ", "}")] {
        let text = format!("node: {{ metadata: {{ x: {}1{} }} }}", open.repeat(5000), close.repeat(5000));
        let error = from_yaml::<Bootstrap>(&text).unwrap_err();
        assert!(error.message.contains("nested") || error.message.contains("YAML"), "{error}");
    }
}

#[test]
fn alias_bombs_are_refused() {
    let mut text = "node:\n  metadata:\n    a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("    a{level}: &a{level} [{aliases}]\n"));
    }
    let started = std::time::Instant::now();
    let error = from_yaml::<Bootstrap>(&text).unwrap_err();
    assert!(error.message.contains("aliases expand to more than 1000000 values"), "{error}");
    assert!(started.elapsed().as_secs() < 20);
}

#[test]
fn merges_over_a_base() {
    let base: Bootstrap =
        from_yaml("node: { id: a, cluster: b }\nstatic_resources: { clusters: [{ name: one }] }").unwrap();
    let merged =
        merge_yaml(base, "node: { id: c }\nstatic_resources: { clusters: [{ name: two }] }", UnknownFields::Reject)
            .unwrap();
    assert_eq!(
        to_json(&merged),
        json!({"node": {"id": "c", "cluster": "b"}, "static_resources": {"clusters": [{"name": "one"}, {"name": "two"}]}})
    );
}

#[test]
fn unpacks_what_is_asked_for_and_names_what_is_there_instead() {
    let router = Router { suppress_envoy_headers: true, ..Default::default() };
    let any = pack(&router);
    assert_eq!(unpack::<Router>(&any, "x").unwrap(), router);
    assert_eq!(
        unpack::<HttpConnectionManager>(&any, "filters[0].typed_config").unwrap_err().to_string(),
        "filters[0].typed_config: expected type.googleapis.com/envoy.extensions.filters.network.\
         http_connection_manager.v3.HttpConnectionManager, found type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    );
    let error = unpack::<Router>(&Any::default(), "x").unwrap_err().to_string();
    assert_eq!(error, "x: a envoy.extensions.filters.http.router.v3.Router is expected, and nothing is set");
    let broken = Any { value: vec![0xff], ..any };
    assert!(unpack::<Router>(&broken, "x").unwrap_err().to_string().starts_with("x: cannot decode envoy.ext"));
}

#[test]
fn unpacks_typed_structs() {
    for wrapper in ["xds.type.v3.TypedStruct", "udpa.type.v1.TypedStruct"] {
        let listener = |value: serde_json::Value| -> Any {
            let filter = json!({ "name": "f", "typed_config": {
                "@type": format!("type.googleapis.com/{wrapper}"),
                "type_url": "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override",
                "value": value,
            }});
            let listener: Listener = from_json(json!({ "filter_chains": [{ "filters": [filter] }] })).unwrap();
            let Some(ConfigType::TypedConfig(any)) = &listener.filter_chains[0].filters[0].config_type else {
                panic!("no typed_config");
            };
            any.clone()
        };
        let config: Override = unpack(&listener(json!({"original_dst_cluster": "odc"})), "p").unwrap();
        assert_eq!(config.original_dst_cluster, "odc");
        let error = unpack::<Override>(&listener(json!({"cluster": "odc"})), "p").unwrap_err().to_string();
        assert_eq!(error, "p.value.cluster: culvert.extensions.filters.http.overrides.v1.Override has no such field");
        let error = unpack::<Router>(&listener(json!({})), "p").unwrap_err().to_string();
        assert!(error.contains("v3.Router, found type.googleapis.com/culvert"), "{error}");
    }
}

#[test]
fn scalars_and_well_known_types_of_json() {
    let cluster: Cluster = from_json(json!({
        "name": "c", "connectTimeout": "-0.000000001s", "perConnectionBufferLimitBytes": 4294967295_u32,
        "commonLbConfig": { "healthyPanicThreshold": { "value": 12.5 } },
        "metadata": { "filterMetadata": { "a.b": { "x": [1.5, {"y": null}] } } },
        "typedExtensionProtocolOptions": { "d": { "@type": "type.googleapis.com/google.protobuf.Duration", "value": "3s" } },
    }))
    .unwrap();
    assert_eq!(cluster.connect_timeout.unwrap().nanos, -1);
    let json = to_json(&cluster);
    assert_eq!(json["connect_timeout"], "-0.000000001s");
    assert_eq!(json["common_lb_config"]["healthy_panic_threshold"]["value"], json!(12.5));
    assert_eq!(json["metadata"]["filter_metadata"]["a.b"]["x"], json!([1.5, {"y": null}]));
    assert_eq!(json["typed_extension_protocol_options"]["d"]["value"], "3s");
    let error = from_json::<Cluster>(json!({"perConnectionBufferLimitBytes": 4294967296_u64})).unwrap_err();
    assert_eq!(
        error.to_string(),
        "per_connection_buffer_limit_bytes: the number does not fit an unsigned 32-bit integer"
    );
    let error = from_json::<Node>(json!({"metadata": {"k": 1}, "id": {}})).unwrap_err();
    assert_eq!(error.to_string(), "id: expected a string, found an object");
}

#[test]
fn rules_of_header_names_maps_and_lists() {
    let check = |host: serde_json::Value| {
        let mut host = host;
        host["name"] = json!("h");
        host["domains"] = json!(["*"]);
        validate(&from_json::<VirtualHost>(host).unwrap()).map_err(|error| error.to_string())
    };
    assert_eq!(check(json!({"request_headers_to_remove": ["x-ok"]})), Ok(()));
    assert_eq!(
        check(json!({"request_headers_to_remove": ["x-ok", "a\nb"]})),
        Err("request_headers_to_remove[1]: \"a\\nb\" is not an HTTP header name".to_owned())
    );
    assert_eq!(
        check(json!({"typed_per_filter_config": {"f": {
            "@type": "type.googleapis.com/envoy.config.route.v3.VirtualHost", "name": "x"}}})),
        Err("typed_per_filter_config[\"f\"].domains: must have at least 1 item".to_owned())
    );
}

#[test]
fn resources_with_fields_unknown_here_are_refused() {
    let mut any = pack(&RouteConfiguration { name: "r".to_owned(), ..Default::default() });
    assert_eq!(validate_any(&any, "r", UnknownFields::Reject), Ok(()));
    // Field 9999, varint 1.
    any.value.extend([0xf8, 0xf0, 0x04, 0x01]);
    let error = validate_any(&any, "resource", UnknownFields::Reject).unwrap_err().to_string();
    assert_eq!(error, "resource: envoy.config.route.v3.RouteConfiguration has no field number 9999");
}

#[test]
fn a_field_unknown_here_is_told_of_once_with_the_resource() {
    let log = super::Unknown::new();
    let told = |resource: &str| log.tell(|| "a.B has no field number 9", || resource.to_owned());
    assert_eq!(told("users").as_deref(), Some("users: a.B has no field number 9"));
    assert_eq!((told("users"), told("others"), log.count()), (None, None, 1));
    let cluster = pack(&RouteConfiguration { name: "r".to_owned(), ..Default::default() });
    assert_eq!(crate::ads::name_in(&cluster.value).as_deref(), Ok("r"));
}

#[test]
fn every_rule_of_every_message_is_implemented() {
    let mut with_rules = 0;
    for message in pool().all_messages() {
        let rules = rules::of(&message).unwrap();
        with_rules += rules.fields.iter().filter(|(_, rule)| rule.is_some()).count();
    }
    assert!(with_rules > 1000, "only {with_rules} fields have rules: are the options still in the descriptors?");
}

#[test]
fn our_own_messages_are_in_the_pool_with_their_names() {
    use crate::api::culvert::extensions::bootstrap::interception::v1::{Interception, interception};
    use crate::api::culvert::overrides::v1::{OffloadedEndpoint, OffloadedService};
    assert_eq!(OffloadedService::type_url(), "type.googleapis.com/culvert.overrides.v1.OffloadedService");
    for name in [Interception::full_name(), interception::Pod::full_name(), OffloadedEndpoint::full_name()] {
        assert_eq!(pool().get_message_by_name(&name).map(|desc| desc.full_name().to_owned()), Some(name));
    }
    let read: Interception = from_yaml("{ failure_policy: FAIL_CLOSED, pods: [{ address: 10.0.0.1 }] }").unwrap();
    assert_eq!(read.failure_policy(), interception::FailurePolicy::FailClosed);
    let desc = dynamic(&read).unwrap().descriptor();
    assert_eq!(desc.full_name(), "culvert.extensions.bootstrap.interception.v1.Interception");
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "[\\[\\]{}:,&*a-c0-9 \\n\"'|>@!?#~-]{0,60}") {
        let _ = from_yaml::<Bootstrap>(&text);
    }

    #[test]
    fn no_bytes_make_the_printer_panic(value: Vec<u8>) {
        let any = Any { type_url: Listener::type_url(), value };
        let _ = any_to_json(&any);
        let _ = validate_any(&any, "", UnknownFields::Reject);
    }
}

/// Where Envoy's parser says that they stand, but for the one within a mapping, of which it says where its value begins.
#[test]
fn tabs_are_found_where_they_stand() {
    for (text, at) in [
        ("node:\n  id: a\n\tcluster: b\n", (3, 1)),
        ("node:\n  id: a\n\n\t\n  \tcluster: b\n", (5, 3)),
        ("node: { id: a }\nadmin:\n\taddress: {}\n", (3, 1)),
        ("node:\n  id: |\n\ttwo\n", (3, 1)),
    ] {
        let error = from_yaml::<Bootstrap>(text).unwrap_err();
        assert_eq!(error.position, Some(at), "{text:?}: {error}");
        assert!(error.message.contains("tab"), "{error}");
    }
}

#[test]
fn bytes_that_are_no_text_are_found_where_they_stand() {
    assert_eq!(text("é\n".as_bytes()), Ok("é\n"));
    assert_eq!(text(b"a\n\xc3\xa9b\xff\n").unwrap_err().position, Some((2, 3)));
    assert_eq!(text(b"\xc3").unwrap_err().to_string(), "not UTF-8 (line 1, column 1)");
}
