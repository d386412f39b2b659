//! Filters that tell dynamic metadata, which access logs and headers show: set_metadata, header_to_metadata.

use super::harness::{By, Case, case};

const SET: &str = "set_metadata.v3.Config";
const FROM_HEADERS: &str = "header_to_metadata.v3.Config";
const MUTATION: &str = "header_mutation.v3.HeaderMutation";

/// A filter behind that shows what there is.
const SHOWN: &str = "mutations: {request_mutations: [{append: {header: {key: x-k, value: \"%DYNAMIC_METADATA(ns:k)%\"}}}], \
                     response_mutations: [{append: {header: {key: x-n, value: \"%DYNAMIC_METADATA(ns)%\"}}}]}";

pub fn cases() -> Vec<Case> {
    [set(), from_headers(), state()].concat()
}

const STATE: &str = "set_filter_state.v3.Config";

/// A value of the filter state.
fn value(key: &str, format: &str, more: &str) -> String {
    format!(
        "{{object_key: {key}, factory_key: envoy.string, format_string: {{text_format_source: {{inline_string: \"{format}\"}}}}{more}}}"
    )
}

/// Filter state, and whatever reads it.
fn state() -> Vec<Case> {
    let shown = "%FILTER_STATE(k:PLAIN)% %FILTER_STATE(k:PLAIN):2% %FILTER_STATE(k:TYPED)% %FILTER_STATE(k:TYPED):2% \
                 %FILTER_STATE(k)% %FILTER_STATE(k:FIELD:f)% %FILTER_STATE(l:PLAIN)% %FILTER_STATE(none:PLAIN)%";
    let json = "log_format: {json_format: {p: \"%FILTER_STATE(k:PLAIN)%\", q: \"%FILTER_STATE(k:PLAIN):2%\", t: \"%FILTER_STATE(k:TYPED)%\", \
                u: \"%FILTER_STATE(k:TYPED):2%\", f: \"%FILTER_STATE(k:FIELD:f)%\", n: \"%FILTER_STATE(none)%\", i: \"in %FILTER_STATE(k)% text\"}}";
    let added = "mutations: {request_mutations: [{append: {header: {key: x-k, value: \"%FILTER_STATE(k:PLAIN)%\"}}}], \
                 response_mutations: [{append: {header: {key: x-k, value: \"%FILTER_STATE(k:TYPED)%\"}}}]}";
    let requests = [
        "GET /",
        "GET /\nx-a: one",
        "GET /\nx-a: two \"quoted\" \\\\",
        "GET /direct\nx-a: one",
        "GET /many\nx-a: two",
        "GET /chosen/x\nx-a: one",
        "GET /chosen/x\nx-a: two",
        "GET /plain\nx-a: one",
    ];
    let of = |name, values: &[String], more: &str| {
        case(name, STATE, &format!("on_request_headers: [{}]{more}", values.join(", ")), &requests)
            .then(MUTATION, added)
            .of_log(shown)
    };
    let chosen = |value: &str| {
        format!(
            "{{match: {{prefix: /chosen, filter_state: [{{key: k, string_match: {{{value}}}}}]}}, route: {{cluster: a, prefix_rewrite: /{}}}}}",
            value.len()
        )
    };
    let header = "%REQ(x-a)%";
    let hashable = value("k", header, "").replace("envoy.string", "envoy.hashable_string");
    let matcher = |action: &str| {
        format!(
            "xds_matcher: {{matcher_list: {{matchers: [{{predicate: {{single_predicate: {{input: {{name: state, typed_config: \
             {{\"@type\": type.googleapis.com/envoy.extensions.matching.common_inputs.network.v3.FilterStateInput, key: k}}}}, \
             value_match: {{prefix: one}}}}}}, on_match: {{action: {{name: skip, typed_config: {action}}}}}}}]}}}}"
        )
    };
    let skip = "{\"@type\": type.googleapis.com/envoy.extensions.filters.common.matcher.action.v3.SkipFilter}";
    vec![
        of("filter state", &[value("k", header, "")], ""),
        of("filter state for a service", &[value("k", header, "")], "")
            .of_log_service("additional_request_headers_to_log: [x-id], additional_response_headers_to_log: [x-envoy-upstream-service-time]")
            .of_state("k, none")
            .with_requests(&["GET /\nx-a: one", "GET /direct"])
            .shown(&[1, 1]),
        of("filter state in JSON", &[value("k", header, "")], "").of_log_format(json),
        of("filter state, twice", &[value("k", "first", ""), value("l", "%FILTER_STATE(k:PLAIN)%+%PROTOCOL%", ""), value("k", header, "")], ""),
        of("filter state that is read only", &[value("k", "first", ", read_only: true"), value("k", header, "")], ""),
        of("filter state without what is empty", &[value("k", "first", ""), value("k", "%REQ(x-a):0%", ", skip_if_empty: true")], ""),
        of("filter state of what is missing", &[value("k", "first", ""), value("k", header, "").replace("}}}", "}, omit_empty_values: true}}"), value("l", "%REQ(x-none)%", "")], ""),
        of("filter state of objects that are hashed", std::slice::from_ref(&hashable), "")
            .of_routes("", "hash_policy: [{filter_state: {key: k}}]"),
        of("filter state, told by levels", &[value("k", "own", "")], "")
            .told(By::Host, STATE, &format!("on_request_headers: [{}]", value("l", "host+%FILTER_STATE(k:PLAIN)%", "")))
            .told(By::Route, STATE, &format!("on_request_headers: [{}]", value("k", "route+%FILTER_STATE(l:PLAIN)%", ""))),
        of("routes by filter state", &[value("k", header, "")], ", clear_route_cache: true")
            .first(&chosen("exact: one"))
            .first(&chosen("prefix: tw")),
        of("routes that are not chosen anew", &[value("k", header, "")], "").first(&chosen("exact: one")),
        of("principals by filter state", &[value("k", header, "")], "").then(
            "rbac.v3.RBAC",
            "rules: {policies: {p: {permissions: [{any: true}], principals: [{filter_state: {key: k, string_match: {exact: one}}}]}}}",
        ),
        of("matchers by filter state", &[value("k", header, "")], "").then(
            "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
            &format!(
                "{}, extension_config: {{name: fault, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault, \
                 abort: {{http_status: 418, percentage: {{numerator: 100}}}}}}}}",
                matcher(skip)
            ),
        ),
    ]
}

fn set() -> Vec<Case> {
    let entry = |value: &str, more: &str| format!("{{metadata_namespace: ns, value: {{{value}}}{more}}}");
    let set = |name, entries: &[String]| {
        case(name, SET, &format!("metadata: [{}]", entries.join(", ")), &["GET /", "GET /direct"]).then(MUTATION, SHOWN)
    };
    let overwrite = ", allow_overwrite: true";
    vec![
        set("set", &[entry("k: text, i: 1, f: 1.5, b: true, z: null, l: [1, a], s: {k: inner, \"q\\\"\": 2}", "")]),
        set("a number", &[entry("k: 12345", "")]),
        set("a struct", &[entry("k: {b: 1, a: [true, {}]}", "")]),
        set("overwrite denied", &[entry("k: one", ""), entry("k: two, j: 3", "")]),
        set(
            "overwrite",
            &[
                entry("k: one, l: [1], s: {k: a, j: b}, t: 1", ""),
                entry("k: two, l: [2], s: {k: c}, t: {u: 1}", overwrite),
            ],
        ),
        set("no metadata", &[]),
        case("old fields", SET, "metadata_namespace: ns, value: {k: old}, metadata: []", &["GET /"])
            .then(MUTATION, SHOWN),
    ]
}

fn from_headers() -> Vec<Case> {
    let present = |more: &str| format!("on_header_present: {{metadata_namespace: ns, key: k{more}}}");
    let missing = "on_header_missing: {metadata_namespace: ns, key: k, value: none}";
    let rules = |rules: &str| format!("stat_prefix: $case, request_rules: [{rules}]");
    let requests = [
        "GET /",
        "GET /\nx-a: one",
        "GET /\nx-a: one\nx-a: two",
        "GET /\nx-a: 12.5",
        "GET /\nx-a: b25l",
        "GET /\nx-a: b25lMg==",
        "GET /\nx-a:",
        "GET /direct\nx-a: one",
        "GET /plain\nx-a: one",
        "GET /\ncookie: x=1; c=biscuit; d=2",
    ];
    let long = format!("GET /\nx-a: {}", "x".repeat(8192));
    let header = |name, config: &str| case(name, FROM_HEADERS, config, &requests).then(MUTATION, SHOWN);
    vec![
        header("present", &rules(&format!("{{header: x-a, {}}}", present("")))),
        header(
            "present, missing, removed",
            &rules(&format!("{{header: x-a, {}, {missing}, remove: true}}", present(""))),
        ),
        header("the path", &rules(&format!("{{header: \":path\", {}}}", present("")))),
        header("the method", &rules(&format!("{{header: \":method\", {}}}", present("")))),
        header("the host", &rules(&format!("{{header: \":authority\", {}}}", present("")))),
        header("the host by its other name", &rules(&format!("{{header: host, {}}}", present("")))),
        header("the scheme", &rules(&format!("{{header: \":scheme\", {}}}", present("")))),
        header("the status, of a request", &rules(&format!("{{header: \":status\", {}, {missing}}}", present("")))),
        header(
            "the status",
            &format!("stat_prefix: $case, response_rules: [{{header: \":status\", {}, {missing}}}]", present("")),
        ),
        header("another value", &rules(&format!("{{header: x-a, {}}}", present(", value: other")))),
        header("a number of a header", &rules(&format!("{{header: x-a, {}}}", present(", type: NUMBER")))),
        header("base64", &rules(&format!("{{header: x-a, {}}}", present(", encode: BASE64")))),
        header(
            "rewritten",
            &rules(&format!(
                "{{header: x-a, {}}}",
                present(", regex_value_rewrite: {pattern: {regex: \"([a-z])n\"}, substitution: \"<\\\\1>\"}")
            )),
        ),
        header(
            "rewritten to nothing",
            &rules(&format!(
                "{{header: x-a, {}}}",
                present(", regex_value_rewrite: {pattern: {regex: \".*\"}, substitution: \"\"}")
            )),
        ),
        case("too long", FROM_HEADERS, &rules(&format!("{{header: x-a, {}}}", present(""))), &[&long]),
        header("cookie", &rules(&format!("{{cookie: c, {}, {missing}}}", present("")))),
        header("default namespace", &rules("{header: x-a, on_header_present: {key: k}}")),
        case(
            "of the response",
            FROM_HEADERS,
            &format!("stat_prefix: $case, response_rules: [{{header: x-r, {}, {missing}, remove: true}}]", present("")),
            &["GET /", "GET /\nx-do: 200+x-r=5", "GET /direct"],
        ),
        header("no rules", ""),
        header("rules by route", &rules(&format!("{{header: x-a, {}}}", present("")))).told(
            By::Route,
            FROM_HEADERS,
            &rules(&format!("{{header: x-a, {}}}", present(", value: by-route"))),
        ),
    ]
}
