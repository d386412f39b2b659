//! What would be a request's header and is none: what a token or a service has said with a line break in it, for example. A client's own
//! header of that name must not pass in its place.

use super::harness::{By, Case, case};

const MUTATION: &str = "header_mutation.v3.HeaderMutation";
const SET: &str = "set_metadata.v3.Config";
const FORGED: &str = "GET /a\nx-user: admin";
const REASON: &str = "%RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%";

/// What headers are made of.
const VALUES: &str = "metadata: [{metadata_namespace: ns, value: {bad: \"a\\r\\nx-more: 1\", good: fine}}]";

fn added(value: &str) -> String {
    format!("{{header: {{key: x-user, value: \"{value}\"}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}")
}

pub fn cases() -> Vec<Case> {
    let bad = added("%DYNAMIC_METADATA(ns:bad)%");
    let good = added("%DYNAMIC_METADATA(ns:good)%");
    let requests = [FORGED, "GET /direct\nx-user: admin"];
    let of = |name, mutations: &str| {
        let config = format!("mutations: {{request_mutations: [{mutations}]}}");
        case(name, SET, VALUES, &requests).then(MUTATION, &config).of_log(REASON)
    };
    let route =
        |name, host: &str, action: &str| case(name, SET, VALUES, &requests).of_routes(host, action).of_log(REASON);
    vec![
        of("a value of a filter's", &format!("{{append: {bad}}}")),
        of("another value comes in its place", &format!("{{append: {bad}}}, {{append: {good}}}")),
        of("it is removed again", &format!("{{append: {bad}}}, {{remove: x-user}}")),
        route("a value of a route's", &format!("request_headers_to_add: [{bad}]"), ""),
        route("a host", "", "host_rewrite: \"%DYNAMIC_METADATA(ns:bad)%\""),
        route("a path", "", "path_rewrite: \"/%DYNAMIC_METADATA(ns:bad)%\""),
        route(
            "retries and copies",
            &format!("request_headers_to_add: [{bad}]"),
            "retry_policy: {retry_on: 5xx, num_retries: 2}, request_mirror_policies: [{cluster: many}]",
        ),
        authorized(),
        too_many(),
    ]
}

/// More headers, or longer ones, than a client may send.
fn too_many() -> Case {
    let options = |count: usize| {
        let each = |number| format!("{{\"header\": {{\"key\": \"x-{number}\", \"value\": \"v\"}}}}");
        (0..count).map(each).collect::<Vec<_>>().join(", ")
    };
    let answer = |options: String| format!("GET /a\nx-answer: {{\"ok_response\": {{\"headers\": [{options}]}}}}");
    let long = |name: &str| format!("{{\"header\": {{\"key\": \"{name}\", \"value\": \"{}\"}}}}", "x".repeat(2048));
    let requests = [
        answer(options(1)),
        answer(options(20)),
        answer(options(21)),
        answer(options(22)),
        answer(options(23)),
        answer(options(24)),
        answer(options(25)),
        answer(options(40)),
        answer(long("x-long")),
        answer(long(":path")),
    ];
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let config = "transport_api_version: V3, stat_prefix: $case, failure_mode_allow: true, \
                  grpc_service: {envoy_grpc: {cluster_name: grpc}, timeout: 10s}";
    case("more headers than may be", "ext_authz.v3.ExtAuthz", config, &requests)
        .of_log(REASON)
        .of_manager("common_http_protocol_options: {max_headers_count: 30}")
        .of_manager("max_request_headers_kb: 4")
}

/// What an authorisation service says.
fn authorized() -> Case {
    let answer = |field: &str, key: &str, value: &str| {
        let option = format!("{{\"header\": {{\"key\": \"{key}\", \"value\": \"{value}\"}}}}");
        format!("{FORGED}\nx-answer: {{\"ok_response\": {{\"{field}\": [{option}]}}}}")
    };
    let requests = [
        answer("headers", "x-user", "a\\r\\nb"),
        answer("headers", "x-user", "a\\u0000b"),
        answer("headers", "x-other", "\\u007f"),
        answer("headers", "x B", "fine"),
        answer("headers", "host", "a\\nb"),
        answer("headers", ":path", "/a\\nb"),
        answer("headers", "x-user", "f\u{fc}r"),
    ];
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let config =
        "transport_api_version: V3, stat_prefix: $case, grpc_service: {envoy_grpc: {cluster_name: grpc}, timeout: 10s}";
    case("an authorisation service's", "ext_authz.v3.ExtAuthz", config, &requests).of_log(REASON)
}

/// Filters that are switched off and on again.
pub fn switched() -> Vec<Case> {
    const CONFIG: &str = "envoy.config.route.v3.FilterConfig";
    let mark = "mutations: {request_mutations: [{append: {header: {key: x-mark, value: \"1\"}}}]}";
    let one = |name, host: &str, route: &str| {
        let case = case(name, MUTATION, mark, &["GET /", "GET /plain"]).told(By::Host, CONFIG, host);
        case.told(By::Route, CONFIG, route)
    };
    let message = "config: {\"@type\": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute}";
    vec![
        one("off, and on again by nothing", "disabled: true", "config: {}"),
        one("off, and on again by a message", "disabled: true", message),
        one("on, and off", "config: {}", "disabled: true"),
        one("on, optional", "disabled: true", &format!("{message}, is_optional: true")),
        one(
            "optional, and told what no filter takes",
            "disabled: true",
            "is_optional: true, config: {\"@type\": type.googleapis.com/google.protobuf.Empty}",
        ),
    ]
}
