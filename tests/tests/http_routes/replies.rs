//! What `local_reply_config` makes of the answers that a proxy gives by itself.

use super::harness::{Case, case};

const ROUTES: &str = "- {match: {prefix: /own}, direct_response: {status: 201, body: {inline_string: \"own text\"}}, response_headers_to_add: [{header: {key: x-route, value: here}}]}
- {match: {prefix: /forbidden}, direct_response: {status: 403, body: {inline_string: \"no \\\"way\\\"\"}}}
- {match: {prefix: /typed}, direct_response: {status: 404, body: {inline_string: \"<p>\"}}, response_headers_to_add: [{header: {key: content-type, value: text/html}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]}
- {match: {prefix: /empty}, direct_response: {status: 503}}
- {match: {prefix: /redirect}, redirect: {path_redirect: /x}}
- {match: {prefix: /gone}, route: {cluster_header: x-cluster}}
- {match: {prefix: /slow}, route: {cluster: a, timeout: 0.2s}}
- {match: {prefix: /a}, $a}";

const REQUESTS: [&str; 17] = [
    "GET /own",
    "HEAD /own",
    "GET /own\ncontent-type: application/grpc",
    "GET /forbidden\nx-who: me",
    "GET /forbidden\nx-who: you",
    "POST /forbidden?q=1\nx-who: me\n\nbody",
    "GET /forbidden\ncontent-type: application/grpc",
    "HEAD /forbidden\ncontent-type: application/grpc",
    "GET /typed",
    "GET /empty",
    "GET /empty\ncontent-type: application/grpc",
    "GET /redirect",
    "GET /none\nuser-agent: test",
    "GET /gone\nx-cluster: nowhere",
    "GET /slow\nx-do: hang",
    "GET /a\nx-do: reset",
    "GET /a\nx-do: 503+server=origin",
];

/// Requests that are refused before anything is done with them.
const REFUSED: [&str; 3] = ["GET /own\nconnection: host", "GET none", "GET /own\nx_a: 1"];

/// `proxy-status`
fn causes() -> Vec<Case> {
    let requests = [
        "GET /own",
        "GET /forbidden",
        "GET /none",
        "GET /gone\nx-cluster: nowhere",
        "GET /gone\nx-cluster: dead",
        "GET /slow\nx-do: hang",
        "GET /retried\nx-do: 503",
        "GET /retried\nx-do: 503+proxy-status=origin",
        "GET /a\nx-do: reset",
        "GET /a\nx-do: 503+proxy-status=origin",
        "GET /a\nx-do: 200+proxy-status=origin",
        "GET none",
        "GET /own\nx_a: 1",
        "GET /none\ncontent-type: application/grpc",
    ];
    let routes = format!(
        "- {{match: {{prefix: /retried}}, route: {{cluster: a, retry_policy: {{retry_on: 5xx, num_retries: 1}}}}}}\n{ROUTES}"
    );
    let with = |name, fields: &str| {
        case(name, &routes, &requests).of_manager(&format!("proxy_status_config: {{{fields}}}")).of_manager("via: v")
    };
    vec![
        with("proxy_status_config", ""),
        with("proxy_status_config without details", "remove_details: true"),
        with("proxy_status_config without flags", "remove_response_flags: true, literal_proxy_name: \"a b\""),
        with("proxy_status_config that sets statuses", "set_recommended_response_code: true, use_node_id: true"),
        with("proxy_status_config, local_reply_config", "").of_manager(
            "local_reply_config: {body_format: {text_format_source: {inline_string: \"%RESP(proxy-status)%\"}}}",
        ),
    ]
}

pub fn cases() -> Vec<Case> {
    [bodies(), causes()].concat()
}

fn bodies() -> Vec<Case> {
    let with = |name, config: &str| {
        case(name, ROUTES, &[&REQUESTS[..], &REFUSED[..]].concat()).of_manager(&format!("local_reply_config: {config}"))
    };
    let status = |op: &str, value: u16| {
        format!(
            "status_code_filter: {{comparison: {{op: {op}, value: {{default_value: {value}, runtime_key: none}}}}}}"
        )
    };
    let mapper = |filter: &str, fields: &str| format!("{{mappers: [{{filter: {{{filter}}}, {fields}}}]}}");
    let errors = status("GE", 400);
    let text = |format: &str| format!("{{text_format_source: {{inline_string: \"{format}\"}}}}");
    let json = "{json_format: {status: \"%RESPONSE_CODE%\", body: \"%LOCAL_REPLY_BODY%\", path: \"%REQ(:path)%\", none: \"%REQ(x-none)%\", both: \"%PROTOCOL% %REQ(x-none)%\", nested: {flags: \"%RESPONSE_FLAGS%\", list: [1, true, \"%REQ(:method)%\"]}}}";
    let own = |header: &str| format!("header_filter: {{header: {header}}}");
    vec![
        with("local replies stay", "{}"),
        with(
            "a body_format of text",
            &format!(
                "{{body_format: {}}}",
                text(
                    "%RESPONSE_CODE% [%LOCAL_REPLY_BODY%] %REQ(:method)% %REQ(:path)% %REQ(x-who)% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%"
                )
            ),
        ),
        with(
            "a body_format with a type",
            "{body_format: {text_format_source: {inline_string: \"<b>%LOCAL_REPLY_BODY%</b>\"}, content_type: \"text/html; charset=UTF-8\"}}",
        ),
        with(
            "a body_format of the deprecated kind",
            "{body_format: {text_format: \"%RESP(:status)% %RESP(x-route)% %RESP(location)%\\n\"}}",
        ),
        with("a body_format that is always the same", &format!("{{body_format: {}}}", text("sorry"))),
        with("a body_format that is empty", "{body_format: {text_format: \"\"}}"),
        with(
            "a body_format without empty values",
            "{body_format: {text_format: \"%REQ(x-who)%|%RESPONSE_FLAGS%|%ROUTE_NAME%|\", omit_empty_values: true}}",
        ),
        with("a body_format of JSON", &format!("{{body_format: {json}}}")),
        with(
            "a body_format of JSON without empty values",
            &format!("{{body_format: {}, omit_empty_values: true}}}}", &json[..json.len() - 1]),
        ),
        with(
            "a body_format of JSON with a type",
            &format!("{{body_format: {}, content_type: application/problem+json}}}}", &json[..json.len() - 1]),
        ),
        with("a mapper's status", &mapper(&errors, "status_code: 422")),
        with("a mapper's status for all", &mapper(&status("GE", 0), "status_code: 200")),
        with("a mapper's body", &mapper(&errors, "body: {inline_string: \"not today\"}")),
        with("a mapper's empty body", &mapper(&errors, "body: {inline_string: \"\"}")),
        with(
            "a mapper's format",
            &mapper(
                &errors,
                &format!(
                    "body: {{inline_string: \"b\"}}, body_format_override: {}",
                    text("%LOCAL_REPLY_BODY% %RESPONSE_CODE%")
                ),
            ),
        ),
        with("a mapper's JSON", &mapper(&errors, &format!("status_code: 400, body_format_override: {json}"))),
        with(
            "a mapper's headers",
            &mapper(
                &errors,
                "headers_to_add: [{header: {key: x-mapped, value: \"%RESPONSE_CODE% %REQ(x-who)% %PROTOCOL%\"}}, {header: {key: content-type, value: text/css}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}]",
            ),
        ),
        with(
            "a mapper's headers and body",
            &mapper(
                &errors,
                "body: {inline_string: \"b\"}, headers_to_add: [{header: {key: content-type, value: text/css}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}, {header: {key: x-route, value: mapped}, append_action: ADD_IF_ABSENT}]",
            ),
        ),
        with("mappers by header", &mapper(&own("{name: x-who, string_match: {exact: me}}"), "status_code: 401")),
        with(
            "mappers by method",
            &mapper(&own("{name: \":method\", string_match: {exact: POST}}"), "status_code: 405"),
        ),
        with("mappers by path", &mapper(&own("{name: \":path\", string_match: {prefix: /for}}"), "status_code: 405")),
        with(
            "mappers by missing header",
            &mapper(&own("{name: x-who, present_match: true, invert_match: true}"), "status_code: 402"),
        ),
        with("mappers by flag", &mapper("response_flag_filter: {flags: [NR, UT]}", "status_code: 410")),
        with("mappers by any flag", &mapper("response_flag_filter: {}", "status_code: 410")),
        with(
            "mappers by both",
            &mapper(
                &format!(
                    "and_filter: {{filters: [{{{}}}, {{{}}}]}}",
                    status("EQ", 403),
                    own("{name: x-who, present_match: true}")
                ),
                "status_code: 406",
            ),
        ),
        with(
            "mappers by either",
            &mapper(
                &format!("or_filter: {{filters: [{{{}}}, {{{}}}]}}", status("EQ", 404), status("LE", 302)),
                "status_code: 406",
            ),
        ),
        with(
            "the first mapper counts",
            &format!(
                "{{mappers: [{{filter: {{{}}}, body: {{inline_string: one}}}}, {{filter: {{{errors}}}, body: {{inline_string: two}}}}], body_format: {}}}",
                status("EQ", 404),
                text("<%LOCAL_REPLY_BODY%>")
            ),
        ),
    ]
}
