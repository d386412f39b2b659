//! ext_authz: requests that other services decide about. What the services are asked is compared too.

use super::harness::{By, Case, case};

const EXT_AUTHZ: &str = "ext_authz.v3.ExtAuthz";
const PER_ROUTE: &str = "ext_authz.v3.ExtAuthzPerRoute";

/// Long enough for a busy machine.
const GRPC: &str =
    "transport_api_version: V3, stat_prefix: $case, grpc_service: {envoy_grpc: {cluster_name: grpc}, timeout: 10s}";

/// A request with what the service answers to it.
fn asked(request: &str, answer: &str) -> String {
    let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
    let body = if body.is_empty() { String::new() } else { format!("\n\n{body}") };
    format!("{head}\nx-answer: {answer}{body}")
}

fn grpc(name: &'static str, more: &str, requests: &[String]) -> Case {
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    case(name, EXT_AUTHZ, &format!("{GRPC}{more}"), &requests)
}

pub fn cases() -> Vec<Case> {
    [verdicts(), failures(), settings(), bodies(), routes(), http(), again(), untrusted(), overridden()].concat()
}

/// Services that are asked again.
fn again() -> Vec<Case> {
    let requests =
        [asked("GET /", "status 14"), asked("GET /", "status 7"), asked("GET /", "http 503"), asked("GET /", "{}")];
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let by = |name, policy: &str| {
        let policy = format!(
            "timeout: 10s, retry_policy: {{{policy}, retry_back_off: {{base_interval: 0.001s, max_interval: 10s}}}}"
        );
        case(name, EXT_AUTHZ, &GRPC.replace("timeout: 10s", &policy), &requests)
    };
    vec![
        by("by gRPC, tried again", "retry_on: \"unavailable,5xx\", num_retries: 2"),
        by("by gRPC, tried again on no grounds", "num_retries: 2"),
    ]
}

fn header(name: &str, value: &str, action: &str) -> String {
    format!("{{\"header\": {{\"key\": \"{name}\", \"value\": \"{value}\"}}{action}}}")
}

fn verdicts() -> Vec<Case> {
    let ok = |fields: &str| format!("{{\"ok_response\": {{{fields}}}}}");
    let denied = |fields: &str| format!("{{\"status\": {{\"code\": 7}}, \"denied_response\": {{{fields}}}}}");
    let actions = [
        "",
        ", \"append\": true",
        ", \"append\": false",
        ", \"append_action\": \"ADD_IF_ABSENT\"",
        ", \"append_action\": \"OVERWRITE_IF_EXISTS_OR_ADD\"",
        ", \"append_action\": \"OVERWRITE_IF_EXISTS\"",
    ];
    let each = |name: &str| actions.map(|action| header(name, "new", action));
    let mut requests = vec![
        asked("GET /a?b=c", "{}"),
        asked("POST /\ncontent-type: text/plain\n\nbody", "{}"),
        asked("HEAD /", &denied("")),
        asked("GET /direct", "{\"status\": {\"code\": 7}}"),
        asked("GET /direct", "{\"status\": {\"code\": 16}, \"ok_response\": {}}"),
        asked(
            "GET /",
            &denied(
                "\"status\": {\"code\": 401}, \"body\": \"no\", \"headers\": [{\"header\": {\"key\": \"www-authenticate\", \"value\": \"Basic\"}}]",
            ),
        ),
        asked(
            "GET /",
            &denied(
                "\"body\": \"<p>\", \"headers\": [{\"header\": {\"key\": \"content-type\", \"value\": \"text/html\"}}]",
            ),
        ),
        asked(
            "GET /",
            &denied(
                "\"headers\": [{\"header\": {\"key\": \"set-cookie\", \"value\": \"a\"}}, {\"header\": {\"key\": \"set-cookie\", \"value\": \"b\"}}]",
            ),
        ),
        asked(
            "GET /",
            &denied(
                "\"status\": {\"code\": 302}, \"headers\": [{\"header\": {\"key\": \"location\", \"value\": \"/x\"}}]",
            ),
        ),
        asked("POST /\ncontent-type: application/grpc", &denied("\"body\": \"no\"")),
        asked(
            "GET /",
            "{\"status\": {\"code\": 7}, \"error_response\": {\"status\": {\"code\": 503}, \"body\": \"e\"}}",
        ),
        asked("GET /", "{\"dynamic_metadata\": {\"k\": \"text\"}}"),
        asked("GET /", "{\"status\": {\"code\": 7}, \"dynamic_metadata\": {\"k\": [1, true]}}"),
        asked("GET /\nx-a: 1\nx-b: 2", &ok("\"headers_to_remove\": [\"x-a\", \"host\", \":path\", \"X-B\"]")),
        asked(
            "GET /a?z=1&b=2&b=3&c",
            &ok(
                "\"query_parameters_to_set\": [{\"key\": \"n\", \"value\": \"x\"}, {\"key\": \"b\", \"value\": \"9\"}]",
            ),
        ),
        asked("GET /a?z=1&b=2", &ok("\"query_parameters_to_remove\": [\"z\", \"b\"]")),
        asked(
            "GET /a",
            &ok(
                "\"headers\": [{\"header\": {\"key\": \":path\", \"value\": \"/other\"}, \"append_action\": \"OVERWRITE_IF_EXISTS_OR_ADD\"}]",
            ),
        ),
        asked(
            "GET /a",
            &ok(
                "\"headers\": [{\"header\": {\"key\": \"host\", \"value\": \"other.test\"}, \"append_action\": \"OVERWRITE_IF_EXISTS_OR_ADD\"}]",
            ),
        ),
    ];
    for action in each("x-h") {
        requests.push(asked("GET /", &ok(&format!("\"headers\": [{action}]"))));
        requests.push(asked("GET /\nx-h: old", &ok(&format!("\"headers\": [{action}]"))));
        requests.push(asked("GET /", &denied(&format!("\"headers\": [{action}, {action}]"))));
        requests.push(asked("GET /", &denied(&format!("\"headers\": [{}]", action.replace("x-h", "content-type")))));
    }
    for action in each("x-r") {
        requests.push(asked("GET /", &ok(&format!("\"response_headers_to_add\": [{action}]"))));
        let do_ = "GET /\nx-do: 200+x-r=old";
        requests.push(asked(do_, &ok(&format!("\"response_headers_to_add\": [{action}]"))));
    }
    vec![grpc("verdicts", "", &requests)]
}

fn failures() -> Vec<Case> {
    let all = ["status 7", "status 14", "http 503", "http 403", "garbage"].map(|answer| asked("GET /", answer));
    let gone = |cluster: &str, more: &str| {
        format!(
            "transport_api_version: V3, stat_prefix: $case, grpc_service: {{envoy_grpc: {{cluster_name: {cluster}}}, timeout: 10s}}{more}"
        )
    };
    vec![
        grpc("failures", "", &all),
        case("a timeout", EXT_AUTHZ, &GRPC.replace("timeout: 10s", "timeout: 2s"), &[&asked("GET /", "hang")]),
        grpc("failures allowed", ", failure_mode_allow: true", &all[..3]),
        grpc(
            "failures allowed, and told",
            ", failure_mode_allow: true, failure_mode_allow_header_add: true",
            &all[..3],
        ),
        grpc("failures with a status", ", status_on_error: {code: ServiceUnavailable}", &all[..3]),
        case("no such cluster", EXT_AUTHZ, &gone("none", ""), &["GET /"]),
        case("nobody there", EXT_AUTHZ, &gone("dead", ""), &["GET /"]),
        case("nobody there, allowed", EXT_AUTHZ, &gone("dead", ", failure_mode_allow: true"), &["GET /"]),
    ]
}

fn settings() -> Vec<Case> {
    let plain = |name, more: &str| grpc(name, more, &["GET /\nx-a: 1\nx-b: 2\nx-b: 3".to_owned()]);
    let moved = "{\"ok_response\": {\"headers\": [{\"header\": {\"key\": \":path\", \"value\": \"/direct\"}, \"append_action\": \"OVERWRITE_IF_EXISTS_OR_ADD\"}]}}";
    vec![
        plain("everything", ", include_peer_certificate: true, include_tls_session: true"),
        plain("allowed headers", ", allowed_headers: {patterns: [{exact: x-a}, {exact: x-id}]}"),
        plain("disallowed headers", ", disallowed_headers: {patterns: [{prefix: x-b}]}"),
        plain("not enabled", ", filter_enabled: {default_value: {numerator: 0}}"),
        plain(
            "denied where not enabled",
            ", filter_enabled: {default_value: {numerator: 0}}, deny_at_disable: {default_value: true, runtime_key: no.such}, status_on_error: {code: 401}",
        ),
        grpc("routes", "", &[asked("GET /", moved)]),
        grpc("routes chosen anew", ", clear_route_cache: true", &[asked("GET /", moved), asked("GET /", "{}")]),
        grpc(
            "no metadata",
            ", enable_dynamic_metadata_ingestion: false",
            &[asked("GET /", "{\"dynamic_metadata\": {\"k\": 1}}")],
        ),
        grpc(
            "nothing charged",
            ", charge_cluster_response_stats: false",
            &[asked("GET /", "{\"status\": {\"code\": 7}}")],
        ),
        plain("metadata of the call", "").then("header_mutation.v3.HeaderMutation", ""),
        case(
            "metadata told",
            "set_metadata.v3.Config",
            "metadata: [{metadata_namespace: ns, value: {k: 1}}]",
            &["GET /"],
        )
        .then(EXT_AUTHZ, &format!("{GRPC}, metadata_context_namespaces: [ns, other]")),
        case(
            "initial metadata",
            EXT_AUTHZ,
            "stat_prefix: $case, transport_api_version: V3, grpc_service: {envoy_grpc: {cluster_name: grpc, authority: auth.test, skip_envoy_headers: true}, timeout: 10s, initial_metadata: [{key: x-m, value: \"50%%\"}]}",
            &["GET /"],
        ),
    ]
}

fn bodies() -> Vec<Case> {
    let requests = [
        "GET /",
        "POST /\n\nlong body",
        "POST /\n\nshort",
        "POST /\ntransfer-encoding: chunked\n\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n",
    ]
    .map(str::to_owned);
    vec![
        grpc("bodies", ", with_request_body: {max_request_bytes: 8}", &requests),
        grpc(
            "parts of bodies",
            ", with_request_body: {max_request_bytes: 6, allow_partial_message: true}",
            &requests[..3],
        ),
        grpc(
            "bodies that are too long, on a connection that could go on",
            ", with_request_body: {max_request_bytes: 6}",
            &["POST /\nconnection: keep-alive\n\nsome body"].map(str::to_owned),
        ),
        grpc("bodies as bytes", ", with_request_body: {max_request_bytes: 80, pack_as_bytes: true}", &requests),
    ]
}

fn routes() -> Vec<Case> {
    let three = ["GET /".to_owned(), "GET /plain".to_owned(), "POST /\n\nbody".to_owned()];
    vec![
        grpc("off by route", "", &three).told(By::Route, PER_ROUTE, "disabled: true"),
        grpc("extensions", "", &three)
            .told(By::Config, PER_ROUTE, "check_settings: {context_extensions: {a: config, b: config, c: config}}")
            .told(By::Host, PER_ROUTE, "check_settings: {context_extensions: {b: host, c: host}}")
            .told(By::Route, PER_ROUTE, "check_settings: {context_extensions: {c: route}}"),
        grpc("bodies by route", "", &three).told(
            By::Route,
            PER_ROUTE,
            "check_settings: {with_request_body: {max_request_bytes: 10}}",
        ),
        grpc("bytes by route", ", with_request_body: {max_request_bytes: 10}", &three).told(
            By::Route,
            PER_ROUTE,
            "check_settings: {with_request_body: {max_request_bytes: 80, pack_as_bytes: true}}",
        ),
        grpc("no bytes by route", ", with_request_body: {max_request_bytes: 10, pack_as_bytes: true}", &three).told(
            By::Route,
            PER_ROUTE,
            "check_settings: {with_request_body: {max_request_bytes: 80}}",
        ),
        grpc("no bodies by route", ", with_request_body: {max_request_bytes: 10}", &three).told(
            By::Route,
            PER_ROUTE,
            "check_settings: {disable_request_body_buffering: true}",
        ),
    ]
}

/// Services that are not believed all.
fn untrusted() -> Vec<Case> {
    let ok = |fields: &str| asked("GET /a?z=1\nx-a: 1\nx-b: 2", &format!("{{\"ok_response\": {{{fields}}}}}"));
    let sets = |name: &str, value: &str| ok(&format!("\"headers\": [{}]", header(name, value, "")));
    let joins = |name: &str, value: &str| ok(&format!("\"headers\": [{}]", header(name, value, ", \"append\": true")));
    let query = |key: &str, value: &str| {
        ok(&format!("\"query_parameters_to_set\": [{{\"key\": \"{key}\", \"value\": \"{value}\"}}]"))
    };
    let denied =
        |fields: &str| asked("GET /", &format!("{{\"status\": {{\"code\": 7}}, \"denied_response\": {{{fields}}}}}"));
    let invalid = [
        sets("x-c", "fine"),
        sets("x c", "3"),
        sets("x-c", "a\\u0000b"),
        joins("x-b", "a\\nb"),
        sets(":path", "/other"),
        ok("\"headers_to_remove\": [\"x a\", \"x-b\"]"),
        ok(&format!("\"response_headers_to_add\": [{}]", header("x-r", "a\\nb", ""))),
        ok(&format!("\"response_headers_to_add\": [{}]", header("x r", "ab", ""))),
        query("k", "v"),
        query("a b", "v"),
        query("k", "a b"),
        query("k", "a&b=c"),
        query("k", "a%20b"),
        query("k", "a%2"),
        query("k=", "v"),
        query("k", "a*b"),
        query("k", "a+b"),
        query("k", "a-b_c.d~e"),
        query("k", "a/b?c#d"),
        query("k-._~!$'()*+,;:@", "v"),
        denied(&format!("\"headers\": [{}]", header("x-d", "fine", ""))),
        denied(&format!("\"headers\": [{}]", header("x d", "1", ""))),
        denied(&format!("\"headers\": [{}]", header("x-d", "a\\nb", ""))),
        asked(
            "GET /",
            &format!(
                "{{\"status\": {{\"code\": 7}}, \"error_response\": {{\"headers\": [{}], \"body\": \"a long text\"}}}}",
                header("x-d", "a\\nb", "")
            ),
        ),
    ];
    let changes = [
        sets("x-c", "3"),
        sets("x-envoy-c", "3"),
        sets("x-no", "3"),
        sets(":path", "/other"),
        sets("host", "other.test"),
        sets(":method", "PUT"),
        joins("x-b", "3"),
        joins("x-no", "3"),
        joins(":path", "/other"),
        ok("\"headers_to_remove\": [\"x-a\", \"x-no\", \"host\", \":path\", \"x-envoy-a\"]"),
        ok("\"headers_to_remove\": [\"x-b\"]"),
    ];
    let rules = |name, rules: &str| grpc(name, &format!(", decoder_header_mutation_rules: {{{rules}}}"), &changes);
    let long = [
        denied("\"body\": \"0123456789\""),
        denied("\"body\": \"0123\""),
        invalid[invalid.len() - 1].replace("a\\nb", "ab"),
    ];
    vec![
        grpc("what is no header, validated", ", validate_mutations: true", &invalid),
        rules("rules for changes", ""),
        rules("rules that forbid", "disallow_expression: {regex: x-no}"),
        rules("rules that refuse", "disallow_expression: {regex: x-no}, disallow_is_error: true"),
        rules(
            "rules that refuse much",
            "disallow_all: true, allow_expression: {regex: 'x-[bc]'}, disallow_is_error: true",
        ),
        rules("rules that allow much", "allow_all_routing: true, allow_envoy: true"),
        rules("rules against pseudo-headers", "disallow_system: true"),
        grpc("short answers", ", max_denied_response_body_bytes: 5", &long),
    ]
}

/// What is told of metadata, and asked by it; other services for routes.
fn overridden() -> Vec<Case> {
    let plain = |name, more: &str| grpc(name, more, &["GET /\nx-a: 1\nx-b: 2\nx-b: 3".to_owned()]);
    let by = |value: &str| {
        format!(
            "filter_enabled_metadata: {{filter: ns, path: [{{key: k}}], value: {{string_match: {{exact: {value}}}}}}}"
        )
    };
    let told = |name, more: &str| {
        let set = "metadata: [{metadata_namespace: ns, value: {k: v}}]";
        case(name, "set_metadata.v3.Config", set, &["GET /", "GET /plain"]).then(EXT_AUTHZ, &format!("{GRPC}, {more}"))
    };
    let of_route = "{match: {path: /told}, metadata: {filter_metadata: {ns: {k: [1, {a: b}]}, other: {x: 1}}, typed_filter_metadata: {ty: {\"@type\": \
                    type.googleapis.com/envoy.type.v3.HttpStatus, code: 404}}}, route: {cluster: a}}";
    let http = "{server_uri: {uri: \"http://authz.test\", cluster: authz, timeout: 10s}}";
    let requests = ["GET /\nx-a: 1", "GET /plain", "GET /\nx-do: 403"].map(str::to_owned);
    let raw = "encode_raw_headers: true, allowed_headers: {patterns: [{exact: x-b}, {exact: x-do}]}";
    vec![
        plain("raw headers", ", encode_raw_headers: true, allowed_headers: {patterns: [{exact: x-b}]}"),
        grpc(
            "raw headers and a body",
            ", encode_raw_headers: true, allowed_headers: {patterns: [{exact: x-b}]}, with_request_body: {max_request_bytes: 3, allow_partial_message: true}",
            &["POST /\nx-b: 1\nx-b: 2\n\nbody".to_owned()],
        ),
        case(
            "raw headers by HTTP",
            EXT_AUTHZ,
            &format!("transport_api_version: V3, stat_prefix: $case, {raw}, http_service: {http}"),
            &["GET /\nx-b: 1\nx-b: 2\nx-a: 3"],
        ),
        case(
            "allowed headers of the service",
            EXT_AUTHZ,
            &format!(
                "transport_api_version: V3, stat_prefix: $case, http_service: {}",
                http.replace("}}", "}, authorization_request: {allowed_headers: {patterns: [{prefix: x-}]}}}")
            ),
            &["GET /\nx-b: 1\nx-b: 2\nc: 3"],
        ),
        told("enabled by metadata", &by("v")),
        told("not enabled by metadata", &by("w")),
        told("denied by metadata", &format!("{}, deny_at_disable: {{default_value: true, runtime_key: no.such}}", by("w"))),
        told("enabled where metadata is none", &by("v").replace("filter: ns", "invert: true, filter: none")),
        grpc(
            "metadata of the route",
            ", route_metadata_context_namespaces: [ns, none], route_typed_metadata_context_namespaces: [ty, ns], typed_metadata_context_namespaces: [ty]",
            &["GET /told".to_owned(), "GET /".to_owned()],
        )
        .first(of_route),
        grpc("another service by route", "", &requests).told(
            By::Route,
            PER_ROUTE,
            &format!("check_settings: {{http_service: {http}}}"),
        ),
        grpc("another service by host", "", &requests)
            .told(By::Host, PER_ROUTE, "check_settings: {grpc_service: {envoy_grpc: {cluster_name: dead}}}")
            .told(By::Route, PER_ROUTE, "check_settings: {context_extensions: {a: b}}"),
        case(
            "a gRPC service by route",
            EXT_AUTHZ,
            &format!("transport_api_version: V3, stat_prefix: $case, http_service: {http}"),
            &requests.each_ref().map(|request| &**request),
        )
        .told(
            By::Route,
            PER_ROUTE,
            "check_settings: {grpc_service: {envoy_grpc: {cluster_name: grpc}, timeout: 10s}, context_extensions: {a: b}}",
        ),
    ]
}

/// Services whose answers are longer than culvertd takes them.
pub fn too_much() -> Vec<Case> {
    let http = "transport_api_version: V3, allowed_headers: {patterns: [{exact: x-do}]}, http_service: {server_uri: {uri: \
                \"http://authz.test\", cluster: authz, timeout: 10s}}";
    let grpc = GRPC.replace("cluster_name: grpc", "cluster_name: grpc, max_receive_message_length: 10");
    let answer = asked("GET /", "{\"ok_response\": {\"headers_to_remove\": [\"x-some-header\"]}}");
    vec![
        case("a long body", EXT_AUTHZ, http, &["GET /\nx-do: 401+bytes=1048577"]),
        case("a long message", EXT_AUTHZ, &grpc, &[answer.as_str()]),
    ]
}

fn http() -> Vec<Case> {
    let within = |timeout: &str, more: &str| {
        format!(
            "transport_api_version: V3, stat_prefix: $case, allowed_headers: {{patterns: [{{exact: x-id}}, {{prefix: x-do}}, {{exact: x-a}}]}}, \
             http_service: {{server_uri: {{uri: \"http://authz.test\", cluster: authz, timeout: {timeout}}}{more}}}"
        )
    };
    let service = |name, more: &str, requests: &[&str]| case(name, EXT_AUTHZ, &within("10s", more), requests);
    let up = "authorization_response: {allowed_upstream_headers: {patterns: [{exact: x-up}]}, allowed_upstream_headers_to_append: {patterns: [{exact: x-ap}]}, \
              allowed_client_headers_on_success: {patterns: [{prefix: x-cl}]}, allowed_client_headers: {patterns: [{exact: x-no}]}, dynamic_metadata_from_headers: {patterns: [{exact: k}]}}";
    let requests = [
        "GET /a?b",
        "GET /\nx-do: 200+x-up=1+x-ap=2+x-cl=3+k=4+x-envoy-auth-headers-to-remove=x-a",
        "GET /\nx-do: 200+x-ap=2+x-up=4\nx-ap: one\nx-up: 3\nx-a: 1",
        "GET /\nx-do: 401+x-no=1+www-authenticate=Basic+x-other=1",
        "POST /\nx-do: 302+location=/b",
        "GET /\nx-do: 503",
        "GET /\nx-do: reset",
        "GET /\nx-do: 403+bytes=0\nauthorization: secret\nx-hidden: 1",
    ];
    vec![
        service("by HTTP", "", &requests),
        case("by HTTP, a timeout", EXT_AUTHZ, &within("2s", ""), &["GET /\nx-do: hang"]),
        service("by HTTP, with headers", &format!(", {up}"), &requests[..5]),
        service(
            "by HTTP, tried again",
            ", retry_policy: {retry_on: \"5xx,reset\", num_retries: 2, retry_back_off: {base_interval: 0.001s, max_interval: 10s}}",
            &[
                "POST /\nx-do-authz: 503,503,200\n\nbody",
                "GET /\nx-do-authz: 503,reset,503,200",
                "GET /\nx-do-authz: reset,200",
                "GET /\nx-do-authz: 409,200",
                "GET /\nx-do-authz: 429,200",
            ],
        ),
        service(
            "by HTTP, tried again on no grounds",
            ", retry_policy: {num_retries: 2, retry_back_off: {base_interval: 0.001s, max_interval: 10s}}",
            &["GET /\nx-do-authz: 503,200", "GET /\nx-do-authz: reset,200"],
        ),
        service(
            "by HTTP, tried again on other grounds",
            ", retry_policy: {retry_on: \"retriable-4xx,reset\", num_retries: 1, retry_back_off: {base_interval: 0.001s, max_interval: 10s}}",
            &["GET /\nx-do-authz: 409,200", "GET /\nx-do-authz: 503,200", "GET /\nx-do-authz: reset,200"],
        ),
        service("by HTTP, prefix", ", path_prefix: /check", &requests[..1]),
        service(
            "by HTTP, override",
            ", path_override: /check, authorization_request: {headers_to_add: [{key: x-added, value: \"%REQ(x-a)%!\"}, {key: x-a, value: mine}]}",
            &["GET /a?b\nx-a: theirs"],
        ),
        case(
            "by HTTP, bodies",
            EXT_AUTHZ,
            "transport_api_version: V3, stat_prefix: $case, with_request_body: {max_request_bytes: 20}, allowed_headers: {patterns: [{exact: x-id}]}, http_service: {server_uri: {uri: \"http://authz.test\", cluster: authz, timeout: 10s}}",
            &["POST /\n\nbody", "GET /"],
        ),
    ]
}
