//! Whom the connection manager believes: addresses, request ids; and what it says of itself.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [addresses(), detection(), ids(), server(), early()].concat()
}

/// A route to a service, an answer made here, a redirect, and nothing.
const ROUTES: &str = "- {match: {prefix: /own}, $1}\n- {match: {prefix: /redirect}, redirect: {path_redirect: /x}}\n\
                      - {match: {prefix: /a}, $a}";

fn with(name: &'static str, lines: &[&str], requests: &[&str]) -> Case {
    lines.iter().fold(case(name, ROUTES, requests), |case, line| case.of_manager(line))
}

/// `127.0.0.0/8` and `10.0.0.0/8` are inside.
const INTERNAL: &str = "internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}, {address_prefix: 127.0.0.0, prefix_len: 8}]}";

const FORWARDED: [&str; 13] = [
    "GET /a",
    "GET /a\nx-forwarded-for: 10.0.0.1\nx-envoy-retry-on: 5xx\nx-do: 503",
    "GET /a\nx-forwarded-for: 192.0.2.1\nx-envoy-retry-on: 5xx\nx-do: 503",
    "GET /a\nx-forwarded-for: 192.0.2.1, 10.0.0.1",
    "GET /a\nx-forwarded-for: 192.0.2.1\nx-forwarded-for: 10.0.0.1",
    "GET /a\nx-forwarded-for: 192.0.2.1,10.0.0.1,10.0.0.2",
    "GET /a\nx-forwarded-for: nonsense",
    "GET /a\nx-forwarded-for: 192.0.2.1:80, 10.0.0.1:80",
    "GET /a\nx-forwarded-for: 2001:db8::1",
    "GET /a\nx-forwarded-for: [2001:db8::1]:80",
    "GET /a\nx-forwarded-proto: https\nx-envoy-external-address: 1.2.3.4\nx-envoy-internal: true",
    "GET /own\nx-forwarded-for: 10.0.0.1\nx-forwarded-proto: ftp",
    "GET /a\nx-envoy-original-path: /forged\nx-envoy-original-host: forged.test",
];

fn addresses() -> Vec<Case> {
    let with = |name, lines: &[&str]| with(name, lines, &FORWARDED);
    vec![
        with("use_remote_address", &["use_remote_address: true"]),
        with("use_remote_address of an internal client", &["use_remote_address: true", INTERNAL]),
        with("use_remote_address, one trusted hop", &["use_remote_address: true", "xff_num_trusted_hops: 1", INTERNAL]),
        with(
            "use_remote_address, two trusted hops",
            &["use_remote_address: true", "xff_num_trusted_hops: 2", INTERNAL],
        ),
        with("skip_xff_append", &["use_remote_address: true", "skip_xff_append: true"]),
        with("x-forwarded-for is believed", &[INTERNAL]),
        with("x-forwarded-for is believed, one trusted hop", &[INTERNAL, "xff_num_trusted_hops: 1"]),
        with("add_user_agent", &["add_user_agent: true"]),
        with("scheme_header_transformation", &["scheme_header_transformation: {scheme_to_overwrite: https}"]),
        with(
            "scheme_header_transformation of an edge",
            &["use_remote_address: true", "scheme_header_transformation: {scheme_to_overwrite: http}"],
        ),
    ]
}

fn detection() -> Vec<Case> {
    let with = |name, extension: &str, requests: &[&str]| {
        let line = format!("original_ip_detection_extensions: [{extension}]");
        with(name, &[&line, INTERNAL], requests)
    };
    let of = |name: &str, kind: &str, fields: &str| {
        let url = "type.googleapis.com/envoy.extensions.http.original_ip_detection";
        format!("{{name: {name}, typed_config: {{\"@type\": {url}.{name}.v3.{kind}, {fields}}}}}")
    };
    let xff = |fields: &str| of("xff", "XffConfig", fields);
    let header = |fields: &str| of("custom_header", "CustomHeaderConfig", fields);
    let custom = [
        "GET /a",
        "GET /a\nx-client: 192.0.2.7\nx-forwarded-for: 10.0.0.1",
        "GET /a\nx-client: 10.0.0.7",
        "GET /a\nx-client: 10.0.0.7\nx-forwarded-for: 192.0.2.1\nx-envoy-retry-on: 5xx\nx-do: 503",
        "GET /a\nx-client: 2001:db8::1",
        "GET /a\nx-client: nobody",
        "GET /a\nx-client: 192.0.2.7:80",
        "GET /a\nx-client: 192.0.2.7\nx-client: 192.0.2.8",
        "GET /own\nx-client:",
        "GET /a\ncontent-type: application/grpc",
    ];
    let trusted = "xff_trusted_cidrs: {cidrs: [{address_prefix: 127.0.0.0, prefix_len: 8}, {address_prefix: 10.0.0.0, prefix_len: 8}]}";
    let untrusted = "xff_trusted_cidrs: {cidrs: [{address_prefix: 10.0.0.0, prefix_len: 8}]}";
    vec![
        with("original_ip_detection xff", &xff("xff_num_trusted_hops: 1"), &FORWARDED),
        with("original_ip_detection xff, no hops", &xff("xff_num_trusted_hops: 0"), &FORWARDED),
        with("original_ip_detection xff, trusted addresses", &xff(trusted), &FORWARDED),
        with(
            "original_ip_detection xff, trusted addresses, append",
            &xff(&format!("{trusted}, skip_xff_append: false")),
            &FORWARDED,
        ),
        with("original_ip_detection xff, a peer that is not trusted", &xff(untrusted), &FORWARDED),
        with("original_ip_detection xff, append", &xff("xff_num_trusted_hops: 1, skip_xff_append: false"), &FORWARDED),
        with("original_ip_detection custom_header", &header("header_name: x-client"), &custom),
        with(
            "original_ip_detection custom_header, trusted",
            &header("header_name: x-client, allow_extension_to_set_address_as_trusted: true"),
            &custom,
        ),
        with(
            "original_ip_detection custom_header or 401",
            &header("header_name: x-client, reject_with_status: {code: 401}"),
            &custom,
        ),
        with(
            "original_ip_detection custom_header or 200",
            &header("header_name: x-client, reject_with_status: {code: 200}"),
            &custom,
        ),
        with(
            "original_ip_detection, two",
            &format!("{}, {}", header("header_name: x-client"), xff("xff_num_trusted_hops: 1")),
            &custom,
        ),
    ]
}

const ID: &str = "x-request-id: 12345678-1234-1234-8234-123456789012";

fn ids() -> Vec<Case> {
    let own = [
        "GET /a".to_owned(),
        format!("GET /a\n{ID}"),
        "GET /a\nx-request-id: 12345678-1234-a234-8234-123456789012".to_owned(),
        "GET /a\nx-request-id: 12345678-short".to_owned(),
        "GET /a\nx-request-id:".to_owned(),
        format!("GET /own\n{ID}"),
        format!("GET /none\n{ID}"),
        format!("GET /redirect\n{ID}"),
        format!("GET /a\n{ID}\nx-envoy-force-trace: 1"),
        format!("GET /a\n{ID}\nx-do: hang\nx-forwarded-for: 10.0.0.1\nx-envoy-upstream-rq-timeout-ms: 100"),
    ];
    let own: Vec<_> = own.iter().map(String::as_str).collect();
    let with = |name, lines: &[&str]| with(name, lines, &own);
    let uuid = |fields: &str| {
        format!(
            "request_id_extension: {{typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.request_id.uuid.v3.UuidRequestIdConfig{fields}}}}}"
        )
    };
    vec![
        with("request ids", &["generate_request_id: true", INTERNAL]),
        with("generate_request_id: false", &["generate_request_id: false"]),
        with("generate_request_id: false at the edge", &["generate_request_id: false", "use_remote_address: true"]),
        with("request ids at the edge", &["use_remote_address: true"]),
        with("preserve_external_request_id", &["use_remote_address: true", "preserve_external_request_id: true"]),
        with(
            "preserve_external_request_id without generation",
            &["use_remote_address: true", "preserve_external_request_id: true", "generate_request_id: false"],
        ),
        with("always_set_request_id_in_response", &["always_set_request_id_in_response: true"]),
        with(
            "always_set_request_id_in_response at the edge",
            &[
                "always_set_request_id_in_response: true",
                "use_remote_address: true",
                "preserve_external_request_id: true",
                INTERNAL,
            ],
        ),
        with("request_id_extension", &[&uuid(""), "use_remote_address: true", "preserve_external_request_id: true"]),
        with(
            "request_id_extension without trace reasons",
            &[&uuid(", pack_trace_reason: false"), "use_remote_address: true", "preserve_external_request_id: true"],
        ),
        with(
            "request_id_extension without sampling",
            &[&uuid(", use_request_id_for_trace_sampling: false"), "always_set_request_id_in_response: true"],
        ),
    ]
}

fn server() -> Vec<Case> {
    let requests = [
        "GET /a",
        "GET /a\nx-do: 200+server=origin+via=1.0 origin",
        "GET /a\nvia: 1.0 fred\nx-do: 503+server=origin",
        "GET /own\nvia: 1.0 fred",
        "GET /none",
        "GET /redirect",
        "GET /a\nx-do: reset",
        "GET /own\ncontent-type: application/grpc",
    ];
    let with = |name, lines: &[&str]| with(name, lines, &requests);
    vec![
        with("via", &["via: \"1.1 culvert\""]),
        self::with("via after two", &["via: \"1.1 culvert\""], &["GET /a\nvia: 1.0 a\nvia: 1.1 b"]),
        with("server_name", &["server_name: front"]),
        with("server OVERWRITE", &["server_header_transformation: OVERWRITE", "server_name: front"]),
        with("server APPEND_IF_ABSENT", &["server_header_transformation: APPEND_IF_ABSENT", "server_name: front"]),
        with("server PASS_THROUGH", &["server_header_transformation: PASS_THROUGH", "server_name: front"]),
    ]
}

fn early() -> Vec<Case> {
    let requests = [
        "GET /a",
        "GET /a\nx-old: 1\nx-new: 0",
        "GET /a\nx-forwarded-for: 10.0.0.1\nx-do: 503\nx-drop-1: 1\nx-drop-2: 2",
        "GET /own\nx-to: a",
        "GET /a\nx-request-id: 12345678-1234-1234-8234-123456789012",
        "GET /a\nx-envoy-retry-on: 5xx\nx-do: 503",
    ];
    let of = |mutations: &str| {
        let url = "type.googleapis.com/envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation";
        format!("{{name: header_mutation, typed_config: {{\"@type\": {url}, mutations: [{mutations}]}}}}")
    };
    let append = |name: &str, value: &str, action: &str| {
        format!("{{append: {{header: {{key: {name}, value: \"{value}\"}}, append_action: {action}}}}}")
    };
    let with = |name, extensions: &[String], lines: &[&str]| {
        let line = format!("early_header_mutation_extensions: [{}]", extensions.join(", "));
        with(name, &[&[line.as_str()], lines].concat(), &requests)
    };
    let (add, over) = ("APPEND_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS_OR_ADD");
    vec![
        with("early_header_mutation", &[of(&append("x-new", "1", add)), of("{remove: x-old}")], &[]),
        with(
            "early_header_mutation, two words",
            &[of(&append("x-new", "1", over)), of(&append("x-new", "2", over))],
            &[],
        ),
        with("early_header_mutation remove_on_match", &[of("{remove_on_match: {key_matcher: {prefix: x-drop}}}")], &[]),
        with(
            "early_header_mutation of formats",
            &[of(&append("x-new", "%REQ(x-old)% %REQ(:path)% %REQ(x-forwarded-for)% %PROTOCOL%", over))],
            &["use_remote_address: true"],
        ),
        with("early_header_mutation of a retry header", &[of(&append("x-envoy-retry-on", "5xx", over))], &[]),
        with(
            "early_header_mutation of x-forwarded-for",
            &[of(&append("x-forwarded-for", "10.0.0.9", over))],
            &[INTERNAL, "use_remote_address: true"],
        ),
        with(
            "early_header_mutation of x-forwarded-for, believed",
            &[of(&append("x-forwarded-for", "10.0.0.9", over))],
            &[INTERNAL],
        ),
        with(
            "early_header_mutation of the id",
            &[of("{remove: x-request-id}")],
            &["always_set_request_id_in_response: true"],
        ),
    ]
}
