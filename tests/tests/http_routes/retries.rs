//! What is tried again.

use super::harness::{Case, case};

/// The connection manager trusts its clients, all of whom are on this machine.
const TRUSTING: [&str; 2] = [
    "use_remote_address: true",
    "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}]}",
];

pub fn cases() -> Vec<Case> {
    [policies(), clients(), bodies(), back_offs(), durations()].concat()
}

/// Retry budgets: clusters that let none pass, and all. What is between them hangs on what else is under way in that moment.
pub fn budgets() -> Vec<Case> {
    let requests =
        ["GET /\nx-do: 503,200", "GET /\nx-do: 503,503,200", "GET /\nx-do: reset,200", "POST /\nx-do: 503,200\n\nbody"];
    ["no-retries", "all-retries"]
        .map(|cluster| {
            let policy = "retry_policy: {retry_on: 5xx, num_retries: 2, retry_back_off: {base_interval: 0.01s}}";
            let route = format!("- {{match: {{prefix: /}}, route: {{cluster: {cluster}, {policy}}}}}");
            case(cluster, &route, &requests).of_host("include_attempt_count_in_response: true")
        })
        .into_iter()
        .chain([recent()])
        .collect()
}

/// A quarter of the requests that have begun within a second: one after the other, on a connection of their own.
fn recent() -> Case {
    let (good, bad) =
        ("GET / HTTP/1.1\nhost: $host\n\n", "GET / HTTP/1.1\nhost: $host\nx-do: 503,200\nx-id: recent-$n\n\n");
    let bad = |number: &str| bad.replace("$n", number);
    let four = [good; 4].join("|wait 20|");
    let script =
        [&bad("0"), "wait 100", &four, "wait 20", &bad("1"), "wait 1500", &bad("2"), "wait 100", &four, "wait 2000"];
    let policy = "retry_policy: {retry_on: 5xx, num_retries: 2, retry_back_off: {base_interval: 0.01s}}";
    case(
        "recent",
        &format!("- {{match: {{prefix: /}}, route: {{cluster: recent, {policy}}}}}"),
        &[&format!("CONNECTION\n{}", script.join("|"))],
    )
    .of_host("include_attempt_count_in_response: true")
    .of_manager("common_http_protocol_options: {idle_timeout: 3.5s}")
}

fn to(name: &'static str, policy: &str, requests: &[&str]) -> Case {
    let route = format!(
        "- {{match: {{prefix: /dead}}, route: {{cluster: dead, retry_policy: {{{policy}}}}}}}\n\
         - {{match: {{prefix: /}}, route: {{cluster: a, retry_policy: {{{policy}}}}}}}"
    );
    case(name, &route, requests)
        .of_host("include_request_attempt_count: true")
        .of_host("include_attempt_count_in_response: true")
        .of_host("include_is_timeout_retry_header: true")
}

/// Every way in which an attempt can fail.
const FAILURES: [&str; 19] = [
    "GET /\nx-do: 500,200",
    "GET /\nx-do: 502,200",
    "GET /\nx-do: 503,503,200",
    "GET /\nx-do: 504,200",
    "GET /\nx-do: 505,200",
    "GET /\nx-do: 409,200",
    "GET /\nx-do: 404,200",
    "GET /\nx-do: 417,200",
    "GET /\nx-do: 204,200",
    "GET /\nx-do: reset,200",
    "GET /\nx-do: reset,reset,200",
    "GET /dead",
    "GET /\nx-do: 429+x-envoy-ratelimited=true,200",
    "GET /\nx-do: 503+x-envoy-ratelimited=true,200",
    "GET /\nx-do: 200+x-again=yes,200",
    "GET /\nx-do: 200+grpc-status=1,200",
    "GET /\nx-do: 200+grpc-status=14,200",
    "GET /\nx-do: 200+grpc-status=13,200+grpc-status=8,200",
    "HEAD /\nx-do: 503,200",
];

fn policies() -> Vec<Case> {
    let kinds = [
        ("5xx", "retry_on: 5xx"),
        ("gateway-error", "retry_on: gateway-error"),
        ("reset", "retry_on: reset"),
        ("reset-before-request", "retry_on: reset-before-request"),
        ("connect-failure", "retry_on: connect-failure"),
        ("retriable-4xx", "retry_on: retriable-4xx"),
        ("refused-stream", "retry_on: refused-stream"),
        ("retriable-status-codes", "retry_on: retriable-status-codes, retriable_status_codes: [417, 204]"),
        ("retriable-status-codes without any", "retry_on: retriable-status-codes"),
        ("retriable-headers", "retry_on: retriable-headers, retriable_headers: [{name: x-again}]"),
        (
            "retriable-headers by value",
            "retry_on: retriable-headers, retriable_headers: [{name: x-again, string_match: {exact: maybe}}, \
             {name: grpc-status, string_match: {exact: \"14\"}}]",
        ),
        ("envoy-ratelimited", "retry_on: envoy-ratelimited"),
        ("5xx and envoy-ratelimited", "retry_on: \"5xx,envoy-ratelimited\""),
        ("cancelled", "retry_on: cancelled"),
        ("unavailable", "retry_on: unavailable"),
        ("internal and resource-exhausted", "retry_on: \"internal,resource-exhausted\", num_retries: 2"),
        ("deadline-exceeded", "retry_on: deadline-exceeded"),
        ("http3-post-connect-failure", "retry_on: http3-post-connect-failure"),
        ("unknown kinds", "retry_on: \"5xx,never-heard-of\""),
        ("none", "num_retries: 3"),
        ("blanks", "retry_on: \" 5xx , retriable-4xx \""),
        ("two retries", "retry_on: 5xx, num_retries: 2"),
        ("no retries", "retry_on: 5xx, num_retries: 0"),
        (
            "previous hosts",
            "retry_on: 5xx, host_selection_retry_max_attempts: 3, retry_host_predicate: [{name: \
         envoy.retry_host_predicates.previous_hosts, typed_config: {\"@type\": \
         type.googleapis.com/envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate}}]",
        ),
    ];
    let mut cases: Vec<Case> = kinds.iter().map(|(name, policy)| to(name, policy, &FAILURES)).collect();
    let by_request = [
        "GET /\nx-do: 503,200",
        "GET /\nx-do: 503,200\nx-please: yes",
        "GET /\nx-do: 503,200\nx-please: no",
        "GET /p/a\nx-do: 503,200",
    ];
    cases.push(to(
        "retriable_request_headers",
        "retry_on: 5xx, retriable_request_headers: [{name: x-please, string_match: {exact: \"yes\"}}, {name: \":path\", \
         string_match: {prefix: /p/}}]",
        &by_request,
    ));
    cases.push(
        case("the virtual host's", "- {match: {prefix: /}, $a}", &["GET /\nx-do: 503,503,200"])
            .of_host("retry_policy: {retry_on: 5xx, num_retries: 2}"),
    );
    cases.push(
        case(
            "the route's, not the virtual host's",
            "- {match: {prefix: /}, route: {cluster: a, retry_policy: {retry_on: connect-failure}}}",
            &["GET /\nx-do: 503,503,200"],
        )
        .of_host("retry_policy: {retry_on: 5xx, num_retries: 2}"),
    );
    let late =
        ["GET /\nx-do: 200+delay=900,200", "GET /\nx-do: 200+delay=900", "POST /\nx-do: 200+delay=900,200\n\nbody"];
    for (name, policy) in [
        ("per_try_timeout", "retry_on: 5xx, per_try_timeout: 0.3s"),
        ("per_try_timeout, gateway-error", "retry_on: gateway-error, per_try_timeout: 0.3s"),
        ("per_try_timeout, not wanted", "retry_on: connect-failure, per_try_timeout: 0.3s"),
        ("per_try_timeout, reset-before-request", "retry_on: reset-before-request, per_try_timeout: 0.3s"),
        ("per_try_timeout over the route's", "retry_on: 5xx, per_try_timeout: 20s"),
        ("per_try_idle_timeout", "retry_on: 5xx, per_try_idle_timeout: 0.3s"),
        ("per_try_idle_timeout, not wanted", "retry_on: connect-failure, per_try_idle_timeout: 0.3s"),
    ] {
        cases.push(to(name, policy, &late).settle(1));
    }
    cases
}

fn clients() -> Vec<Case> {
    let requests = [
        "GET /\nx-do: 503,200\nx-envoy-retry-on: 5xx",
        "GET /\nx-do: 503,503,200\nx-envoy-retry-on: 5xx\nx-envoy-max-retries: 2",
        "GET /\nx-do: 503,503,200\nx-envoy-retry-on: 5xx\nx-envoy-max-retries: 0",
        "GET /\nx-do: 503,503,200\nx-envoy-retry-on: 5xx\nx-envoy-max-retries: many",
        "GET /\nx-do: 503,503,200\nx-envoy-max-retries: 2",
        "GET /\nx-do: 409,200\nx-envoy-retry-on: connect-failure, retriable-4xx",
        "GET /\nx-do: 200+grpc-status=14,200\nx-envoy-retry-grpc-on: unavailable",
        "GET /\nx-do: 200+grpc-status=14,200\nx-envoy-retry-on: unavailable",
        "GET /\nx-do: 503,200\nx-envoy-retry-grpc-on: 5xx",
        "GET /\nx-do: 417,200\nx-envoy-retry-on: retriable-status-codes\nx-envoy-retriable-status-codes: 416,417",
        "GET /\nx-do: 417,200\nx-envoy-retriable-status-codes: 417",
        "GET /\nx-do: 200+x-again=,200\nx-envoy-retry-on: retriable-headers\nx-envoy-retriable-header-names: X-Other, X-Again",
        "GET /\nx-do: 503,200\nx-envoy-hedge-on-per-try-timeout: true",
        "GET /\nx-do: 200+delay=700,200\nx-envoy-upstream-rq-timeout-ms: 300",
        "GET /\nx-do: 200+delay=700,200\nx-envoy-upstream-rq-timeout-ms: 300\nx-envoy-upstream-rq-timeout-alt-response: 1",
        "GET /\nx-do: 200+delay=700,200\nx-envoy-retry-on: 5xx\nx-envoy-upstream-rq-per-try-timeout-ms: 300",
        "GET /\nx-do: 200+delay=700\nx-envoy-upstream-rq-per-try-timeout-ms: 300",
        "GET /\nx-do: 200+delay=500\nx-envoy-upstream-rq-per-try-timeout-ms: 300\nx-envoy-upstream-rq-timeout-ms: 200",
        "GET /\nx-do: 503,200",
    ];
    let plain = "- {match: {prefix: /}, route: {cluster: a}}";
    let of_host = |case: Case| case.of_host("include_request_attempt_count: true");
    let trusting = |case: Case| TRUSTING.iter().fold(case, |case, line| case.of_manager(line));
    let own = "- {match: {prefix: /}, route: {cluster: a, retry_policy: {retry_on: 5xx, num_retries: 2}}}";
    vec![
        of_host(trusting(case("of clients that are trusted", plain, &requests))).settle(1),
        of_host(case("of clients behind others", plain, &requests)).settle(1),
        of_host(case("of clients at the edge", plain, &requests).of_manager("use_remote_address: true")).settle(1),
        of_host(trusting(case("beside a policy", own, &requests))).settle(1),
        of_host(case(
            "added by the route",
            "- {match: {prefix: /}, route: {cluster: a}, request_headers_to_add: [{header: {key: x-envoy-retry-on, value: \
             5xx}}]}",
            &["GET /\nx-do: 503,200"],
        )),
    ]
}

fn bodies() -> Vec<Case> {
    let small = "POST /\nx-do: 503,200\n\n0123456789";
    let reset = "POST /\nx-do: reset,503,200\n\n0123456789";
    let large = format!("POST /\nx-do: 503,200\n\n{}", "x".repeat(1500));
    let requests = [small, reset, large.as_str()];
    let policy = "retry_policy: {retry_on: 5xx, num_retries: 2}";
    let route = |limit: &str| format!("- {{match: {{prefix: /}}, route: {{cluster: a, {policy}}}{limit}}}");
    vec![
        case("bodies are sent again", &route(""), &requests),
        case("per_request_buffer_limit_bytes", &route(", per_request_buffer_limit_bytes: 1000"), &requests),
        case("request_body_buffer_limit", &route(", request_body_buffer_limit: 1000"), &requests),
        case("a limit of nothing", &route(", per_request_buffer_limit_bytes: 0"), &requests),
        case("the virtual host's limit", &route(""), &requests).of_host("per_request_buffer_limit_bytes: 1000"),
        case("the route's limit before the virtual host's", &route(", request_body_buffer_limit: 2000"), &requests)
            .of_host("request_body_buffer_limit: 1000"),
    ]
}

fn back_offs() -> Vec<Case> {
    let limited = "retry_on: \"5xx,retriable-4xx\", rate_limited_retry_back_off: {max_interval: 2s, reset_headers: [{name: \
                   retry-after}, {name: x-reset, format: UNIX_TIMESTAMP}]}";
    vec![
        to(
            "retry_back_off",
            "retry_on: 5xx, num_retries: 3, retry_back_off: {base_interval: 0.01s, max_interval: 0.02s}",
            &["GET /\nx-do: 503,503,503,200"],
        ),
        to(
            "rate_limited_retry_back_off",
            limited,
            &[
                "GET /\nx-do: 503+retry-after=1,200",
                "GET /\nx-do: 503+retry-after=100,200",
                "GET /\nx-do: 503+x-reset=100,200",
                "GET /\nx-do: 503,200",
            ],
        ),
    ]
}

fn durations() -> Vec<Case> {
    let requests = [
        "GET /\nx-do: 200+delay=100",
        "GET /\nx-do: 200+delay=900",
        "POST /\nx-do: 200+delay=900\n\nbody",
        "GET /\nx-do: 200+delay=900\ngrpc-timeout: 200m",
        "GET /\nx-do: 200+delay=900\ngrpc-timeout: 2S",
        "GET /\nx-do: 200+delay=900\ngrpc-timeout: 2S\ncontent-type: application/grpc",
        "GET /\nx-do: 200\ngrpc-timeout: 1500000u",
        "GET /\nx-do: 200\ngrpc-timeout: soon",
    ];
    let route = |limits: &str| {
        format!("- {{match: {{prefix: /}}, route: {{cluster: a, timeout: 0.5s, max_stream_duration: {{{limits}}}}}}}")
    };
    [
        ("max_stream_duration", "max_stream_duration: 0.4s"),
        ("max_stream_duration of nothing", "max_stream_duration: 0s"),
        ("max_stream_duration that says nothing", ""),
        ("grpc_timeout_header_max", "max_stream_duration: 5s, grpc_timeout_header_max: 0.4s"),
        ("grpc_timeout_header_max of nothing", "grpc_timeout_header_max: 0s"),
        ("grpc_timeout_header_offset", "grpc_timeout_header_max: 0.4s, grpc_timeout_header_offset: 0.1s"),
    ]
    .map(|(name, limits)| case(name, &route(limits), &requests).settle(1))
    .to_vec()
}
