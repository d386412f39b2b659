//! Filters that let requests pass or refuse them: rbac, local_ratelimit.

use super::harness::{By, Case, case};

const RBAC: &str = "rbac.v3.RBAC";
const LOCAL_RATELIMIT: &str = "local_ratelimit.v3.LocalRateLimit";

const ANY: &str = "[{any: true}]";

/// Rules of one policy.
fn rules(action: &str, permissions: &str, principals: &str) -> String {
    format!("rules: {{action: {action}, policies: {{p: {{permissions: {permissions}, principals: {principals}}}}}}}")
}

pub fn cases() -> Vec<Case> {
    [permissions(), principals(), engines(), metadata(), matchers(), local_ratelimit()].concat()
}

/// Requests to a rule that allows what it matches.
fn permission(name: &'static str, permission: &str, requests: &[&str]) -> Case {
    case(name, RBAC, &rules("ALLOW", &format!("[{permission}]"), ANY), requests)
}

fn principal(name: &'static str, principal: &str, requests: &[&str]) -> Case {
    case(name, RBAC, &rules("ALLOW", ANY, &format!("[{principal}]")), requests)
}

fn permissions() -> Vec<Case> {
    let template = "{uri_template: {name: t, typed_config: {\"@type\": \
                    type.googleapis.com/envoy.extensions.path.match.uri_template.v3.UriTemplateMatchConfig, path_template: \
                    \"/api/{id}/x\"}}}";
    vec![
        permission("any", "{any: true}", &["GET /", "POST /\n\nbody", "HEAD /", "GET /direct"]),
        permission(
            "header",
            "{header: {name: x-a, string_match: {exact: one}}}",
            &["GET /\nx-a: one", "GET /\nx-a: two", "GET /", "GET /\nx-a: two\nx-a: one"],
        ),
        permission(
            "header, inverted",
            "{header: {name: x-a, string_match: {prefix: one}, invert_match: true}}",
            &["GET /\nx-a: one", "GET /\nx-a: two", "GET /"],
        ),
        permission(
            "pseudo headers",
            "{or_rules: {rules: [{header: {name: \":method\", string_match: {exact: DELETE}}}, {header: {name: \":path\", \
             string_match: {exact: \"/a?b\"}}}, {header: {name: \":authority\", string_match: {exact: x.test}}}]}}",
            &["DELETE /", "GET /", "GET /a?b", "GET /a", "GET /\nhost: x.test"],
        ),
        permission(
            "url_path",
            "{url_path: {path: {prefix: /api}}}",
            &["GET /api", "GET /api?x", "GET /x?/api", "GET /API", "GET /apis"],
        ),
        permission(
            "url_path, exact, any case",
            "{url_path: {path: {exact: /Api, ignore_case: true}}}",
            &["GET /api?x=y", "GET /aPI", "GET /api/"],
        ),
        permission(
            "url_path, regex",
            "{url_path: {path: {safe_regex: {regex: \"/v[0-9]\"}}}}",
            &["GET /v1", "GET /v1?x", "GET /v12"],
        ),
        permission("uri_template", template, &["GET /api/7/x", "GET /api/7/x?q", "GET /api/7", "GET /api/7/8/x"]),
        permission("destination_ip", "{destination_ip: {address_prefix: 127.0.0.0, prefix_len: 8}}", &["GET /"]),
        permission("another destination_ip", "{destination_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}", &["GET /"]),
        permission("destination_port", "{destination_port: 80}", &["GET /"]),
        permission("destination_port_range", "{destination_port_range: {start: 1024, end: 65536}}", &["GET /"]),
        permission("another port range", "{destination_port_range: {start: 1, end: 1024}}", &["GET /"]),
        permission("not_rule", "{not_rule: {url_path: {path: {exact: /no}}}}", &["GET /", "GET /no"]),
        permission(
            "and_rules",
            "{and_rules: {rules: [{url_path: {path: {prefix: /a}}}, {not_rule: {header: {name: x-a, present_match: true}}}]}}",
            &["GET /a", "GET /a\nx-a: 1", "GET /b"],
        ),
        permission("requested_server_name", "{requested_server_name: {exact: a.test}}", &["GET /"]),
        permission("no requested_server_name", "{requested_server_name: {exact: \"\"}}", &["GET /"]),
    ]
}

fn principals() -> Vec<Case> {
    vec![
        principal("header of a principal", "{header: {name: x-a, present_match: true}}", &["GET /", "GET /\nx-a: one"]),
        principal("url_path of a principal", "{url_path: {path: {suffix: x}}}", &["GET /x", "GET /y"]),
        principal("authenticated", "{authenticated: {}}", &["GET /"]),
        principal("authenticated by name", "{authenticated: {principal_name: {exact: \"\"}}}", &["GET /"]),
        principal("direct_remote_ip", "{direct_remote_ip: {address_prefix: 127.0.0.1, prefix_len: 32}}", &["GET /"]),
        principal(
            "remote_ip",
            "{remote_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}",
            &["GET /", "GET /\nx-forwarded-for: 10.1.2.3", "GET /\nx-forwarded-for: 11.1.2.3"],
        ),
        principal(
            "source_ip is the connection's",
            "{source_ip: {address_prefix: 10.0.0.0, prefix_len: 8}}",
            &["GET /\nx-forwarded-for: 10.1.2.3"],
        ),
        principal(
            "remote_ip, own address used",
            "{remote_ip: {address_prefix: 127.0.0.0, prefix_len: 8}}",
            &["GET /", "GET /\nx-forwarded-for: 10.1.2.3"],
        )
        .of_manager("use_remote_address: true"),
        principal(
            "and_ids, or_ids, not_id",
            "{and_ids: {ids: [{or_ids: {ids: [{header: {name: a}}, {header: {name: b}}]}}, {not_id: {header: {name: c}}}]}}",
            &["GET /", "GET /\na: 1", "GET /\nb: 1", "GET /\nb: 1\nc: 1"],
        ),
    ]
}

fn engines() -> Vec<Case> {
    let by_path = "[{url_path: {path: {prefix: /x}}}]";
    let two = "rules: {action: DENY, policies: {b two: {permissions: [{url_path: {path: {prefix: /x}}}], principals: [{any: \
               true}]}, a one: {permissions: [{url_path: {path: {prefix: /x/y}}}], principals: [{any: true}]}}}";
    let cases = vec![
        case("deny", RBAC, &rules("DENY", by_path, ANY), &["GET /", "GET /x", "POST /x\n\nbody", "HEAD /x"]),
        case(
            "gRPC",
            RBAC,
            &rules("DENY", by_path, ANY),
            &["POST /x\ncontent-type: application/grpc\n\nbody", "POST /x\ncontent-type: application/grpc+proto"],
        ),
        case("the first policy by name", RBAC, two, &["GET /x", "GET /x/y", "GET /y"]),
        case("no rules", RBAC, "", &["GET /"]),
        case("no policies, allow", RBAC, "rules: {action: ALLOW}", &["GET /"]),
        case("no policies, deny", RBAC, "rules: {action: DENY}", &["GET /"]),
        case(
            "rules_stat_prefix",
            RBAC,
            &(rules("DENY", by_path, ANY) + ", rules_stat_prefix: pre"),
            &["GET /x", "GET /"],
        ),
        case(
            "shadow_rules",
            RBAC,
            &(rules("DENY", by_path, ANY).replacen("rules", "shadow_rules", 1) + ", shadow_rules_stat_prefix: pre."),
            &["GET /x", "GET /"],
        ),
        case(
            "both, per rule",
            RBAC,
            &format!(
                "{}, {}, track_per_rule_stats: true",
                rules("DENY", by_path, ANY),
                rules("ALLOW", by_path, ANY).replacen("rules", "shadow_rules", 1)
            ),
            &["GET /x", "GET /"],
        ),
        case("rules by route", RBAC, &rules("DENY", by_path, ANY), &["GET /x", "GET /", "GET /plain/x", "GET /direct"])
            .told(By::Route, "rbac.v3.RBACPerRoute", &format!("rbac: {{{}}}", rules("ALLOW", by_path, ANY))),
        case(
            "shadow rules by route",
            RBAC,
            &rules("DENY", ANY, ANY),
            &["GET /x", "GET /", "GET /plain", "GET /created"],
        )
        .told(
            By::Host,
            "rbac.v3.RBACPerRoute",
            &format!("rbac: {{{}}}", rules("DENY", by_path, ANY).replacen("rules", "shadow_rules", 1)),
        ),
        case(
            "rules by weighted cluster",
            RBAC,
            &rules("DENY", by_path, ANY),
            &["GET /weighted", "GET /", "GET /plain"],
        )
        .told(By::Cluster, "rbac.v3.RBACPerRoute", &format!("rbac: {{{}}}", rules("DENY", ANY, ANY))),
        case("rules by weighted cluster and route", RBAC, "", &["GET /weighted", "GET /", "GET /plain"])
            .told(By::Route, "rbac.v3.RBACPerRoute", &format!("rbac: {{{}}}", rules("DENY", ANY, ANY)))
            .told(By::Cluster, "rbac.v3.RBACPerRoute", ""),
        case("no rules by route", RBAC, &rules("DENY", ANY, ANY), &["GET /x", "GET /plain"]).told(
            By::Route,
            "rbac.v3.RBACPerRoute",
            "",
        ),
        case("two filters", RBAC, &rules("DENY", by_path, ANY), &["GET /x", "GET /y", "GET /"])
            .then(RBAC, &rules("DENY", "[{url_path: {path: {prefix: /y}}}]", ANY)),
    ];
    // What others are told of it.
    cases.into_iter().map(|case| case.of_log("%DYNAMIC_METADATA(envoy.filters.http.rbac)%")).collect()
}

/// What filters have told, and what routes say.
fn metadata() -> Vec<Case> {
    let told = "metadata: [{metadata_namespace: ns, value: {s: text, f: 1.5, i: 7, b: true, z: null, e: \"\", l: [1, a, [x]], o: \
                {k: inner, l: [a]}}}]";
    let of = |name, path: &str, value: &str, more: &str| {
        let keys: Vec<_> = path.split('.').map(|key| format!("{{key: \"{key}\"}}")).collect();
        let matcher = format!("{{metadata: {{filter: ns, path: [{}], value: {{{value}}}{more}}}}}", keys.join(", "));
        principal(name, &matcher, &["GET /"]).before("set_metadata.v3.Config", told)
    };
    let mut cases = Vec::new();
    for path in ["s", "i", "b", "z", "e", "l", "o", "o.k", "o.none", "none", "s.k", "l.k"] {
        cases.push(of("present", path, "present_match: true", ""));
        cases.push(of("not present", path, "present_match: false", ""));
        cases.push(of("null", path, "null_match: {}", ""));
        cases.push(of("not null", path, "null_match: {}", ", invert: true"));
    }
    cases.extend([
        of("text", "s", "string_match: {exact: text}", ""),
        of("the beginning of a text", "s", "string_match: {prefix: TE, ignore_case: true}", ""),
        of("another text", "s", "string_match: {exact: other}", ""),
        of("text of a number", "i", "string_match: {exact: \"7\"}", ""),
        of("no text", "none", "string_match: {safe_regex: {regex: \".*\"}}", ""),
        of("number", "f", "double_match: {exact: 1.5}", ""),
        of("another number", "f", "double_match: {exact: 1}", ""),
        of("range", "i", "double_match: {range: {start: 7, end: 8}}", ""),
        of("end of a range", "i", "double_match: {range: {start: 6, end: 7}}", ""),
        of("true", "b", "bool_match: true", ""),
        of("false", "b", "bool_match: false", ""),
        of("one of a list", "l", "list_match: {one_of: {string_match: {exact: a}}}", ""),
        of("none of a list", "l", "list_match: {one_of: {string_match: {exact: x}}}", ""),
        of("a list in a list", "l", "list_match: {one_of: {list_match: {one_of: {string_match: {exact: x}}}}}", ""),
        of("one of no list", "s", "list_match: {one_of: {string_match: {exact: text}}}", ""),
        of("either", "o.k", "or_match: {value_matchers: [{bool_match: true}, {string_match: {exact: inner}}]}", ""),
        of("neither", "o.k", "or_match: {value_matchers: [{bool_match: true}, {null_match: {}}]}", ""),
        of("inverted", "o.k", "string_match: {exact: inner}", ", invert: true"),
    ]);
    let claims = "{sourced_metadata: {metadata_matcher: {filter: ns, path: [{key: k}], value: {string_match: {exact: yes}}}, \
                  metadata_source: $from}}";
    let by_header = "request_rules: [{header: x-a, on_header_present: {metadata_namespace: ns, key: k}}]";
    let requests = &["GET /", "GET /\nx-a: yes", "GET /\nx-a: no"];
    for (name, from) in [("of filters", "DYNAMIC"), ("of the route", "ROUTE")] {
        let claims = claims.replace("$from", from).replace("exact: yes", "exact: \"yes\"");
        cases.push(principal(name, &claims, requests).before("header_to_metadata.v3.Config", by_header));
        cases.push(permission(name, &claims, requests).before("header_to_metadata.v3.Config", by_header));
    }
    cases
}

/// `matcher`, `shadow_matcher` and `action: LOG`.
fn matchers() -> Vec<Case> {
    let action = |action: &str| {
        format!(
            "{{action: {{name: a, typed_config: {{\"@type\": type.googleapis.com/envoy.config.rbac.v3.Action, name: \"the {action}\", \
             action: {action}}}}}}}"
        )
    };
    let input =
        |message: &str| format!("{{name: i, typed_config: {{\"@type\": type.googleapis.com/envoy.{message}}}}}");
    let header = input("type.matcher.v3.HttpRequestHeaderMatchInput, header_name: x-a");
    let network = |name: &str| input(&format!("extensions.matching.common_inputs.network.v3.{name}"));
    let single = |input: &str, value: &str, on: &str| {
        format!(
            "{{matcher_list: {{matchers: [{{predicate: {{single_predicate: {{input: {input}, value_match: {{{value}}}}}}}, \
             on_match: {on}}}]}}}}"
        )
    };
    let map = format!(
        "{{matcher_tree: {{input: {header}, exact_match_map: {{map: {{one: {}, two: {}, three: {}}}}}}}, on_no_match: {}}}",
        action("ALLOW"),
        action("DENY"),
        action("LOG"),
        action("DENY")
    );
    let shown = "mutations: {request_mutations: [{append: {header: {key: x-k, value: \
                 \"%DYNAMIC_METADATA(envoy.common)% %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)% \
                 %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)%\"}}}]}";
    let requests = &["GET /", "GET /\nx-a: one", "GET /\nx-a: two", "GET /\nx-a: three", "GET /direct\nx-a: three"];
    let shown_case =
        |name, config: &str| case(name, RBAC, config, requests).then("header_mutation.v3.HeaderMutation", shown);
    let of_header = "[{header: {name: x-a}}]";
    let mut cases = vec![
        case("a map", RBAC, &format!("matcher: {map}"), requests),
        case("counted by rule", RBAC, &format!("matcher: {map}, track_per_rule_stats: true"), requests),
        case(
            "in the place of rules",
            RBAC,
            &format!("matcher: {}, {}", single(&header, "exact: one", &action("ALLOW")), rules("ALLOW", ANY, ANY)),
            requests,
        ),
        case("a matcher of a shadow", RBAC, &format!("shadow_matcher: {map}"), requests),
        case("a matcher by route", RBAC, &format!("matcher: {map}"), requests).told(
            By::Route,
            "rbac.v3.RBACPerRoute",
            &format!("rbac: {{matcher: {}}}", single(&header, "prefix: t", &action("ALLOW"))),
        ),
        shown_case("log", &rules("LOG", ANY, of_header)),
        shown_case("log of a shadow", &rules("LOG", ANY, of_header).replacen("rules", "shadow_rules", 1)),
    ];
    for (name, input, value) in [
        ("destination", "DestinationIPInput", "exact: 127.0.0.1"),
        ("destination port", "DestinationPortInput", "safe_regex: {google_re2: {}, regex: \"[0-9]{4,5}\"}"),
        ("source", "SourceIPInput", "exact: 10.1.2.3"),
        ("direct source", "DirectSourceIPInput", "exact: 127.0.0.1"),
        ("source port", "SourcePortInput", "safe_regex: {google_re2: {}, regex: \"[1-9][0-9]{3,4}\"}"),
        ("server name", "ServerNameInput", "safe_regex: {google_re2: {}, regex: \".*\"}"),
    ] {
        let config = format!("matcher: {}", single(&network(input), value, &action("ALLOW")));
        cases.push(case(name, RBAC, &config, &["GET /", "GET /\nx-forwarded-for: 10.1.2.3"]));
    }
    for (name, path, value) in [
        ("metadata", "{key: k}", "value: {string_match: {exact: text}}"),
        ("other metadata", "{key: k}", "value: {string_match: {exact: other}}"),
        ("any other metadata", "{key: k}", "value: {string_match: {exact: other}}, invert: true"),
        ("deep metadata", "{key: o}, {key: count}", "value: {double_match: {exact: 3}}"),
        ("a list of metadata", "{key: l}", "value: {list_match: {one_of: {string_match: {prefix: b}}}}"),
        ("metadata that is there", "{key: o}", "value: {present_match: true}"),
        ("no metadata", "{key: none}", "value: {string_match: {exact: text}}"),
        ("no metadata, inverted", "{key: none}", "value: {string_match: {exact: text}}, invert: true"),
        ("absent metadata", "{key: none}", "value: {present_match: false}"),
        ("null metadata", "{key: none}", "value: {null_match: {}}"),
    ] {
        let input = network(&format!("DynamicMetadataInput, filter: ns, path: [{path}]"));
        let value = format!(
            "custom_match: {{name: m, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.matching.input_matchers.metadata.v3.Metadata, {value}}}}}"
        );
        let single = single(&input, "", &action("ALLOW")).replace("value_match: {}", &value);
        let told = "metadata: [{metadata_namespace: ns, value: {k: text, o: {count: 3}, l: [a, bc]}}]";
        cases.push(case(name, RBAC, &format!("matcher: {single}"), &["GET /"]).before("set_metadata.v3.Config", told));
    }
    cases
}

fn local_ratelimit() -> Vec<Case> {
    let bucket = "token_bucket: {max_tokens: 2, tokens_per_fill: 1, fill_interval: 1000s}";
    let on = "filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}";
    let limit = |more: &str| format!("stat_prefix: $case, {bucket}, {on}{more}");
    let four = ["GET /", "GET /direct", "GET /", "POST /\n\nbody"];
    let grpc = "POST /\ncontent-type: application/grpc\n\nbody";
    vec![
        case("limit", LOCAL_RATELIMIT, &limit(""), &four),
        case("limit of gRPC", LOCAL_RATELIMIT, &limit(""), &[grpc, grpc, grpc]),
        case(
            "limit of gRPC, resource exhausted",
            LOCAL_RATELIMIT,
            &limit(", rate_limited_as_resource_exhausted: true"),
            &[grpc, grpc, grpc],
        ),
        case(
            "another status",
            LOCAL_RATELIMIT,
            &limit(", status: {code: 503}, enable_retry_after_header: true"),
            &four,
        ),
        case("a status that is no error", LOCAL_RATELIMIT, &limit(", status: {code: 204}"), &four),
        case(
            "headers of the answer",
            LOCAL_RATELIMIT,
            &limit(
                ", response_headers_to_add: [{header: {key: x-l, value: one}}, {header: {key: x-l, value: two}}, {header: \
                 {key: x-m, value: one}, append_action: OVERWRITE_IF_EXISTS}]",
            ),
            &four,
        ),
        case(
            "the bucket's state",
            LOCAL_RATELIMIT,
            &limit(", enable_x_ratelimit_headers: DRAFT_VERSION_03, enable_retry_after_header: true"),
            &four,
        ),
        case(
            "not enforced",
            LOCAL_RATELIMIT,
            &format!(
                "stat_prefix: $case, {bucket}, filter_enabled: {{default_value: {{numerator: 100}}}}, \
                 request_headers_to_add_when_not_enforced: [{{header: {{key: x-over, value: \"yes\"}}}}]"
            ),
            &four,
        ),
        case("not enabled", LOCAL_RATELIMIT, &format!("stat_prefix: $case, {bucket}"), &four),
        case(
            "no bucket",
            LOCAL_RATELIMIT,
            &format!("stat_prefix: $case, {on}, enable_x_ratelimit_headers: DRAFT_VERSION_03"),
            &four,
        ),
        case(
            "limit by route",
            LOCAL_RATELIMIT,
            &limit(""),
            &["GET /", "GET /", "GET /plain", "GET /plain", "GET /plain"],
        )
        .told(
            By::Route,
            LOCAL_RATELIMIT,
            &limit(", enable_x_ratelimit_headers: DRAFT_VERSION_03").replace("max_tokens: 2", "max_tokens: 1"),
        ),
        case("limit by host", LOCAL_RATELIMIT, "stat_prefix: $case", &["GET /", "GET /direct", "GET /plain"]).told(
            By::Host,
            LOCAL_RATELIMIT,
            &limit(""),
        ),
        case(
            "behind rbac",
            RBAC,
            &rules("DENY", "[{url_path: {path: {prefix: /x}}}]", ANY),
            &["GET /x", "GET /", "GET /"],
        )
        .then(LOCAL_RATELIMIT, &limit(", enable_x_ratelimit_headers: DRAFT_VERSION_03")),
    ]
}
