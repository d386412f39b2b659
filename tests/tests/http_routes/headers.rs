//! What routes add to the headers of requests and responses, and take from them.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [actions(), levels(), formats(), weighted()].concat()
}

fn actions() -> Vec<Case> {
    let add = |name, option: &str| {
        let routes = format!(
            "- {{match: {{prefix: /}}, $a, request_headers_to_add: [{{{option}}}], response_headers_to_add: [{{{option}}}]}}"
        );
        let requests =
            &["GET /", "GET /\nx-h: old", "GET /\nx-h: old\nx-h: older", "GET /\nx-do: 200+x-h=old", "GET /\nx-h:"];
        case(name, &routes, requests)
    };
    let header = "header: {key: x-h, value: new}";
    vec![
        add("add", header),
        add("add, append", &format!("{header}, append: true")),
        add("add, no append", &format!("{header}, append: false")),
        add("APPEND_IF_EXISTS_OR_ADD", &format!("{header}, append_action: APPEND_IF_EXISTS_OR_ADD")),
        add("ADD_IF_ABSENT", &format!("{header}, append_action: ADD_IF_ABSENT")),
        add("OVERWRITE_IF_EXISTS_OR_ADD", &format!("{header}, append_action: OVERWRITE_IF_EXISTS_OR_ADD")),
        add("OVERWRITE_IF_EXISTS", &format!("{header}, append_action: OVERWRITE_IF_EXISTS")),
        add("empty", "header: {key: x-h, value: ''}"),
        add("empty, kept", "header: {key: x-h, value: ''}, keep_empty_value: true"),
        add("empty, overwriting", "header: {key: x-h, value: ''}, append_action: OVERWRITE_IF_EXISTS_OR_ADD"),
        add(
            "empty, overwriting, kept",
            "header: {key: x-h, value: ''}, keep_empty_value: true, append_action: OVERWRITE_IF_EXISTS_OR_ADD",
        ),
        add("percent", "header: {key: x-h, value: '100%%'}"),
        add("capitals", "header: {key: X-H, value: New}"),
        case(
            "remove",
            "- {match: {prefix: /}, $a, request_headers_to_remove: [x-h, user-agent], response_headers_to_remove: [x-h]}",
            &["GET /\nx-h: a\nx-h: b\nuser-agent: c", "GET /\nx-do: 200+x-h=a+x-h=b+x-i=c"],
        ),
        case(
            "remove and add",
            "- {match: {prefix: /}, $a, request_headers_to_remove: [x-h], request_headers_to_add: [{header: {key: x-h, \
             value: new}}]}",
            &["GET /\nx-h: a", "GET /"],
        ),
        case(
            "of redirects and direct responses",
            "- {match: {path: /1}, $1, response_headers_to_add: [{header: {key: x-h, value: new}}]}\n\
             - {match: {path: /r}, redirect: {path_redirect: /n}, response_headers_to_add: [{header: {key: x-h, value: \
             new}}], response_headers_to_remove: [location]}\n\
             - {match: {path: /d}, route: {cluster: dead}, response_headers_to_add: [{header: {key: x-h, value: new}}]}",
            &["GET /1", "GET /r", "GET /d"],
        ),
    ]
}

fn levels() -> Vec<Case> {
    let at = |level: &str, action: &str| {
        format!(
            "request_headers_to_add: [{{header: {{key: x-h, value: {level}}}, append_action: {action}}}]\n\
             response_headers_to_add: [{{header: {{key: x-h, value: {level}}}, append_action: {action}}}]\n"
        )
    };
    let all = |name, action: &str| {
        let fields = at("route", action).replace('\n', "\n  ");
        let routes = format!("- match: {{prefix: /a}}\n  $a\n  {fields}\n- {{match: {{prefix: /}}, $a}}");
        case(name, &routes, &["GET /a", "GET /a\nx-h: client", "GET /b", "GET /a\nx-do: 200+x-h=service"])
            .of_host(&at("host", action))
            .of_config(&at("config", action))
    };
    vec![
        all("levels, append", "APPEND_IF_EXISTS_OR_ADD"),
        all("levels, overwrite", "OVERWRITE_IF_EXISTS_OR_ADD"),
        all("levels, if absent", "ADD_IF_ABSENT"),
        all("levels, overwrite, most specific wins", "OVERWRITE_IF_EXISTS_OR_ADD")
            .of_config("most_specific_header_mutations_wins: true"),
        all("levels, append, most specific wins", "APPEND_IF_EXISTS_OR_ADD")
            .of_config("most_specific_header_mutations_wins: true"),
    ]
}

fn formats() -> Vec<Case> {
    let requests = &["GET /a?b=c\nuser-agent: me", "POST /a\nx-a: 1\nx-a: 2\n\nbody", "GET /\nx-do: 503+x-r=s\nx-b: y"];
    let format = |value: &str| {
        let routes = format!(
            "- {{name: here, match: {{prefix: /}}, route: {{cluster: a, prefix_rewrite: /n/}}, \
             request_headers_to_add: [{{header: {{key: x-h, value: '{value}'}}}}], \
             response_headers_to_add: [{{header: {{key: x-h, value: '{value}'}}}}]}}"
        );
        case("format", &routes, requests)
    };
    [
        "%REQ(:METHOD)% %REQ(:PATH)%",
        "%REQ(:AUTHORITY)%",
        "%REQ(:SCHEME)%",
        "%REQ(X-A)%",
        "%REQ(X-NONE?X-B)%",
        "a%REQ(X-NONE)%b",
        "%REQ(X-NONE)%",
        "%REQ(USER-AGENT):1%",
        "%RESP(X-R)%",
        "[%RESP(X-R)%]",
        "%PROTOCOL%",
        "%ROUTE_NAME%",
        "%UPSTREAM_CLUSTER%",
        "%RESPONSE_CODE%",
        "%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%",
        "%DOWNSTREAM_LOCAL_ADDRESS%",
        "%DOWNSTREAM_LOCAL_PORT%",
        "%DOWNSTREAM_PEER_SUBJECT%",
        "%DOWNSTREAM_TLS_VERSION%",
        "%REQUESTED_SERVER_NAME%",
        "50%% of %REQ(:PATH)%",
    ]
    .iter()
    .map(|value| format(value))
    .collect()
}

fn weighted() -> Vec<Case> {
    let one = |options: &str, more: &str| {
        format!(
            "- {{match: {{prefix: /}}, route: {{weighted_clusters: {{clusters: [{{name: b, weight: 0}}, {{name: a, weight: \
             100, {options}}}]}}{more}}}, request_headers_to_add: [{{header: {{key: x-h, value: route}}}}], \
             response_headers_to_add: [{{header: {{key: x-h, value: route}}}}]}}"
        )
    };
    let requests = &["GET /", "GET /\nx-h: old\nx-i: old", "GET /\nx-do: 200+x-h=old"];
    let headers = "request_headers_to_add: [{header: {key: x-h, value: cluster}}], response_headers_to_add: [{header: {key: \
                   x-h, value: cluster}}], request_headers_to_remove: [x-i]";
    vec![
        case("weighted, headers", &one(headers, ""), requests),
        case("weighted, host_rewrite_literal", &one("host_rewrite_literal: h.example", ""), requests),
        case(
            "weighted, host_rewrite_literal over the route's",
            &one("host_rewrite_literal: h.example", ", host_rewrite_literal: route.example"),
            requests,
        ),
        case(
            "weighted by header, by the request's number, by hash",
            "- {match: {prefix: /header}, route: {weighted_clusters: {clusters: [{cluster_header: x-to, weight: 1}]}}}\n\
             - {match: {prefix: /number}, route: {weighted_clusters: {header_name: x-n, clusters: [{name: a, weight: 2}, \
             {name: b, weight: 3}]}}}\n\
             - {match: {prefix: /only}, route: {weighted_clusters: {header_name: x-n, clusters: [{name: a, weight: 2}]}}}\n\
             - {match: {prefix: /hash}, route: {hash_policy: [{header: {header_name: x-n}}], weighted_clusters: \
             {use_hash_policy: true, clusters: [{name: a, weight: 2}, {name: b, weight: 3}, {name: c, weight: 2}]}}}",
            &[
                "GET /header\nx-to: a",
                "GET /header\nx-to: b",
                "GET /header\nx-to: none",
                "GET /header",
                "GET /number\nx-n: 0",
                "GET /number\nx-n: 1",
                "GET /number\nx-n: 2",
                "GET /number\nx-n: 4",
                "GET /number\nx-n: 5",
                "GET /number\nx-n: 18446744073709551615",
                "GET /only\nx-n: -1",
                "GET /only",
                "GET /hash\nx-n: one",
                "GET /hash\nx-n: two",
                "GET /hash\nx-n: three",
                "GET /hash\nx-n: four",
            ],
        ),
        case(
            "weighted, cluster_header",
            "- {match: {prefix: /}, route: {cluster_header: x-to}}",
            &[
                "GET /\nx-to: a",
                "GET /\nx-to: b",
                "GET /\nx-to: none",
                "GET /",
                "GET /\nx-to: a\nx-to: b",
                "GET /\nx-to:",
            ],
        ),
        case(
            "cluster_not_found_response_code",
            "- {match: {prefix: /404}, route: {cluster_header: x, cluster_not_found_response_code: NOT_FOUND}}\n\
             - {match: {prefix: /500}, route: {cluster_header: x, cluster_not_found_response_code: INTERNAL_SERVER_ERROR}}\n\
             - {match: {prefix: /}, route: {cluster_header: x}}",
            &["GET /404", "GET /500\nx: none", "GET /"],
        ),
    ]
}
