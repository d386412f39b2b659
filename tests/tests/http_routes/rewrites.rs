//! What is made of paths and hosts by formats, and the fields that have been replaced by others and still work.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [formats(), without_action(), internal_only(), older(), without_effect()].concat()
}

fn formats() -> Vec<Case> {
    let requests = [
        "GET /old?q=1\nmy: zz",
        "GET /old?q=1",
        "GET /old\nmy: /zz",
        "GET /old?q=1\nmy: /zz?a=b",
        "POST /old\nmy: /z\n\nbody",
        "HEAD /old\nmy: /z",
        "GET /old\nmy: a b",
    ];
    let to = |fields: &str| format!("- {{match: {{prefix: /}}, route: {{cluster: a, {fields}}}}}");
    vec![
        case("path_rewrite", &to("path_rewrite: \"/x%REQ(my)%\""), &requests[..6]),
        case("path_rewrite that makes no path", &to("path_rewrite: \"/x%REQ(my)%\""), &requests[6..])
            .differs("Envoy sends a request line that hosts read differently"),
        case("path_rewrite of text", &to("path_rewrite: /always"), &requests),
        case("path_rewrite that may be empty", &to("path_rewrite: \"%REQ(my)%\""), &requests[1..5]),
        case("path_rewrite of the path", &to("path_rewrite: \"/new%REQ(:path)%\""), &requests[..2]),
        case(
            "path_rewrite of the route's name",
            &to("path_rewrite: \"/%ROUTE_NAME%/x\"").replace("{match", "{name: named, match"),
            &requests[..2],
        ),
        case("host_rewrite", &to("host_rewrite: \"h-%REQ(my)%.test\""), &requests),
        case("host_rewrite of text", &to("host_rewrite: always.test"), &requests),
        case("host_rewrite of one header", &to("host_rewrite: \"%REQ(my)%\""), &requests[..3]),
        case(
            "host_rewrite, append_x_forwarded_host",
            &to("host_rewrite: \"%REQ(my)%.test\", append_x_forwarded_host: true"),
            &requests,
        ),
        case(
            "host_rewrite and path_rewrite",
            &to("host_rewrite: \"%REQ(my)%.test\", path_rewrite: \"/%REQ(:authority)%\""),
            &requests[..2],
        ),
        case(
            "path_rewrite of what the route adds",
            &to("path_rewrite: \"/%REQ(x-added)%\"")
                .replace("{match", "{request_headers_to_add: [{header: {key: x-added, value: added}}], match"),
            &requests[..2],
        ),
        case(
            "a redirect's path_rewrite",
            "- {match: {prefix: /}, redirect: {path_rewrite: \"/x%REQ(my)%\"}}",
            &requests,
        ),
        case(
            "a redirect's path_rewrite that may be empty",
            "- {match: {prefix: /}, redirect: {path_rewrite: \"%REQ(my)%\", host_redirect: other.test}}",
            &requests[..5],
        ),
        case(
            "a redirect's path_rewrite, strip_query",
            "- {match: {prefix: /}, redirect: {path_rewrite: \"/%REQ(:path)%\", strip_query: true}}",
            &requests[..3],
        ),
    ]
}

fn without_action() -> Vec<Case> {
    let requests = ["GET /", "POST /\n\nbody", "GET /\ncontent-type: application/grpc"];
    vec![
        case("non_forwarding_action", "- {match: {prefix: /}, non_forwarding_action: {}}", &requests),
        case("filter_action", "- {match: {prefix: /}, filter_action: {}}", &requests),
        case(
            "a direct response of many bytes",
            &format!(
                "- {{match: {{prefix: /}}, direct_response: {{status: 200, body: {{inline_string: \"{}\"}}}}}}",
                "x".repeat(5000)
            ),
            &requests,
        )
        .of_config("max_direct_response_body_size_bytes: 5000"),
    ]
}

fn internal_only() -> Vec<Case> {
    let requests = [
        "GET /\nx-own: 1\nX-Other: 2\nx-third: 3",
        "GET /\nx-own: 1\nx-own: 2",
        "GET /\nx-own: 1\nx-forwarded-for: 10.0.0.1",
    ];
    let routes = "- {match: {prefix: /, headers: [{name: x-own}]}, $b}\n- {match: {prefix: /}, $a}";
    let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}, {address_prefix: \
                    10.0.0.0, prefix_len: 8}]}";
    let headers = "internal_only_headers: [x-own, X-Other]";
    vec![
        case("internal_only_headers", routes, &requests).of_config(headers),
        case("internal_only_headers at the edge", routes, &requests)
            .of_config(headers)
            .of_manager("use_remote_address: true"),
        case("internal_only_headers of internal requests", routes, &requests)
            .of_config(headers)
            .of_manager("use_remote_address: true")
            .of_manager(internal),
        case("internal_only_headers of those who are believed", routes, &requests)
            .of_config(headers)
            .of_manager(internal),
    ]
}

fn older() -> Vec<Case> {
    let requests = [
        "GET /\nx-do: 200+delay=900\ncontent-type: application/grpc",
        "GET /\nx-do: 200+delay=900\ncontent-type: application/grpc\ngrpc-timeout: 300m",
        "GET /\nx-do: 200+delay=900\ncontent-type: application/grpc\ngrpc-timeout: 5S",
        "GET /\nx-do: 200+delay=900\ncontent-type: application/grpc\ngrpc-timeout: soon",
        "GET /\nx-do: 200+delay=900\ngrpc-timeout: 300m",
        "GET /\ncontent-type: application/grpc\ngrpc-timeout: 1500m",
        "GET /\ncontent-type: application/grpc\ngrpc-timeout: 100m",
        "GET /\ncontent-type: application/grpc",
    ];
    let to = |limits: &str| format!("- {{match: {{prefix: /}}, route: {{cluster: a, timeout: 3s, {limits}}}}}");
    vec![
        case("max_grpc_timeout", &to("max_grpc_timeout: 0.6s"), &requests).settle(1),
        case("max_grpc_timeout of nothing", &to("max_grpc_timeout: 0s"), &requests).settle(1),
        case("grpc_timeout_offset", &to("max_grpc_timeout: 2s, grpc_timeout_offset: 0.15s"), &requests).settle(1),
        case("grpc_timeout_offset alone", &to("grpc_timeout_offset: 0.15s"), &requests[4..]).settle(1),
        case(
            "max_grpc_timeout, per_try_timeout",
            &to("max_grpc_timeout: 2s, retry_policy: {retry_on: 5xx, per_try_timeout: 0.4s}"),
            &requests[5..],
        )
        .settle(1),
        case(
            "max_grpc_timeout beside max_stream_duration",
            &to("max_grpc_timeout: 0.6s, max_stream_duration: {}"),
            &requests[4..],
        )
        .settle(1),
    ]
}

fn without_effect() -> Vec<Case> {
    let requests = [
        "GET /\nx-do: 503,200",
        "GET /\nx-do: 200+delay=300",
        "GET /\nx-envoy-decorator-operation: theirs",
        "GET /\nx-do: 200+x-envoy-decorator-operation=theirs",
    ];
    let of = |fields: &str| format!("- {{match: {{prefix: /}}, {fields}}}");
    let typed = "\"@type\": type.googleapis.com/envoy";
    vec![
        case("decorator", &of("route: {cluster: a}, decorator: {operation: ours}"), &requests),
        case(
            "decorator at the edge",
            &of("route: {cluster: a}, decorator: {operation: ours, propagate: false}"),
            &requests,
        )
        .of_manager("use_remote_address: true"),
        case("tracing of a route", &of("route: {cluster: a}, tracing: {client_sampling: {numerator: 5}}"), &requests),
        case(
            "retry_policy_typed_config",
            &of(&format!(
                "route: {{cluster: a, retry_policy_typed_config: {{{typed}.config.route.v3.RetryPolicy, retry_on: 5xx}}}}"
            )),
            &requests,
        ),
        case("retry_policy_typed_config of the virtual host", &of("$a"), &requests)
            .of_host(&format!("retry_policy_typed_config: {{{typed}.config.route.v3.RetryPolicy, retry_on: 5xx}}")),
        case("initial_requests", &of("route: {cluster: a, hedge_policy: {initial_requests: 3}}"), &requests).settle(1),
        case(
            "additional_request_chance",
            &of("route: {cluster: a, hedge_policy: {additional_request_chance: {numerator: 100}}}"),
            &requests,
        )
        .settle(1),
        case(
            "refresh_cluster_on_retry",
            &of("route: {cluster: a, retry_policy: {retry_on: 5xx, refresh_cluster_on_retry: true}}"),
            &requests,
        ),
        case(
            "early_data_policy",
            &of(&format!(
                "route: {{cluster: a, early_data_policy: {{name: e, typed_config: {{{typed}.extensions.early_data.v3.\
                 DefaultEarlyDataPolicy}}}}}}"
            )),
            &requests,
        ),
        case(
            "a hash of what no filter says",
            &of("route: {cluster: alone, hash_policy: [{filter_state: {key: k}}]}"),
            &requests,
        ),
    ]
}
