//! Filters that tell dynamic metadata, which access logs and headers show: set_metadata, header_to_metadata.

use super::harness::{By, Case, case};

const SET: &str = "set_metadata.v3.Config";
const FROM_HEADERS: &str = "header_to_metadata.v3.Config";
const MUTATION: &str = "header_mutation.v3.HeaderMutation";

/// A filter behind that shows what there is.
const SHOWN: &str = "mutations: {request_mutations: [{append: {header: {key: x-k, value: \"%DYNAMIC_METADATA(ns:k)%\"}}}], \
                     response_mutations: [{append: {header: {key: x-n, value: \"%DYNAMIC_METADATA(ns)%\"}}}]}";

pub fn cases() -> Vec<Case> {
    [set(), from_headers()].concat()
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
