//! Descriptors of requests, and the filters that limit by them: ratelimit, local_ratelimit.

use super::harness::{By, Case, case};

const RATELIMIT: &str = "ratelimit.v3.RateLimit";
const PER_ROUTE: &str = "ratelimit.v3.RateLimitPerRoute";
const LOCAL: &str = "local_ratelimit.v3.LocalRateLimit";

/// Long enough for a busy machine.
const SERVICE: &str = "domain: d, stat_prefix: $case, timeout: 10s, rate_limit_service: {transport_api_version: V3, grpc_service: \
                       {envoy_grpc: {cluster_name: grpc}}}";

/// The actions by which the service knows the request, and what it is to answer.
const KNOWN: &str = "{request_headers: {header_name: x-id, descriptor_key: id}}, {request_headers: {header_name: x-answer, \
                     descriptor_key: answer, skip_if_absent: true}}";

fn limits(actions: &str) -> String {
    format!("rate_limits: [{{actions: [{KNOWN}{actions}]}}]")
}

fn limit(name: &'static str, more: &str, requests: &[&str]) -> Case {
    case(name, RATELIMIT, &format!("{SERVICE}{more}"), requests).of_routes("", &limits(""))
}

pub fn cases() -> Vec<Case> {
    [answers(), failures(), settings(), actions(), levels(), done(), told(), local()].concat()
}

const OVER: &str = "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\"}";

fn answers() -> Vec<Case> {
    let all = [
        "GET /",
        "GET /\nx-answer: {\"overall_code\": \"OK\"}",
        OVER,
        "HEAD /\nx-answer: {\"overall_code\": \"OVER_LIMIT\"}",
        "POST /\ncontent-type: application/grpc\nx-answer: {\"overall_code\": \"OVER_LIMIT\"}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"raw_body\": \"bm8=\", \"response_headers_to_add\": [{\"key\": \"x-l\", \"value\": \"a\"}, {\"key\": \"x-l\", \"value\": \"b\"}, {\"key\": \"x-m\", \"raw_value\": \"Yw==\"}]}",
        "GET /\nx-l: old\nx-do: 200+x-r=old\nx-answer: {\"overall_code\": \"OK\", \"request_headers_to_add\": [{\"key\": \"x-l\", \"value\": \"a\"}], \"response_headers_to_add\": [{\"key\": \"x-r\", \"value\": \"a\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OK\", \"dynamic_metadata\": {\"k\": \"v\"}}",
        "GET /\nx-answer: {\"overall_code\": \"OK\", \"statuses\": [{\"code\": \"OK\", \"current_limit\": {\"requests_per_unit\": 5, \"unit\": \"MINUTE\"}, \"limit_remaining\": 3, \"duration_until_reset\": \"17s\"}, {\"current_limit\": {\"requests_per_unit\": 9, \"unit\": \"DAY\", \"name\": \"n\"}, \"limit_remaining\": 2}, {}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"current_limit\": {\"requests_per_unit\": 5, \"unit\": \"YEAR\"}, \"duration_until_reset\": \"17.9s\"}]}",
        "GET /direct",
    ];
    vec![
        limit("answers", "", &all),
        limit("answers, with state", ", enable_x_ratelimit_headers: DRAFT_VERSION_03", &all),
    ]
}

fn failures() -> Vec<Case> {
    let hangs = |name, more: &str| {
        let service = SERVICE.replace("timeout: 10s", "timeout: 2s");
        case(name, RATELIMIT, &format!("{service}{more}"), &["GET /\nx-answer: hang"]).of_routes("", &limits(""))
    };
    let all = ["GET /\nx-answer: status 14", "GET /\nx-answer: http 503", "GET /\nx-answer: garbage"];
    vec![
        limit("failures", "", &all),
        limit("failures denied", ", failure_mode_deny: true", &all),
        hangs("a timeout", ""),
        hangs("a timeout denied", ", failure_mode_deny: true"),
        limit("failures denied with a status", ", failure_mode_deny: true, status_on_error: {code: 503}", &all[..1]),
        limit("failures denied, a share", ", failure_mode_deny_percent: {default_value: {numerator: 100}}", &all[..1]),
        case(
            "no service",
            RATELIMIT,
            &format!("{SERVICE}, failure_mode_deny: true").replace("cluster_name: grpc", "cluster_name: none"),
            &["GET /"],
        )
        .of_routes("", &limits("")),
    ]
}

fn settings() -> Vec<Case> {
    let grpc = "POST /\ncontent-type: application/grpc\nx-answer: {\"overall_code\": \"OVER_LIMIT\"}";
    vec![
        limit("a status", ", rate_limited_status: {code: 503}", &[OVER]),
        limit("a status that is no error", ", rate_limited_status: {code: 200}", &[OVER]),
        limit("resource exhausted", ", rate_limited_as_resource_exhausted: true", &[OVER, grpc]),
        limit("nothing said", ", disable_x_envoy_ratelimited_header: true", &[OVER]),
        limit(
            "headers of the answer",
            ", response_headers_to_add: [{header: {key: x-a, value: \"%REQ(x-b)%\"}}]",
            &["GET /\nx-b: 1", "GET /\nx-b: 1\nx-answer: {\"overall_code\": \"OVER_LIMIT\"}"],
        ),
        limit("a time to try again", ", enable_retry_after_header: true", &again()),
        limit(
            "a time to try again, of another status",
            ", enable_retry_after_header: true, rate_limited_status: {code: 503}",
            &again()[..1],
        ),
        limit(
            "a time to try again, not enforced",
            ", enable_retry_after_header: true, filter_enforced: {default_value: {numerator: 0}}",
            &again()[..1],
        ),
        limit(
            "a time to try again, and one of the filter's",
            ", enable_retry_after_header: true, response_headers_to_add: [{header: {key: retry-after, value: '5'}}]",
            &again()[..1],
        ),
        limit(
            "metadata elsewhere",
            ", metadata_namespace: ns",
            &["GET /\nx-answer: {\"overall_code\": \"OK\", \"dynamic_metadata\": {\"k\": \"v\"}}"],
        ),
        limit("external requests", ", request_type: external", &[OVER]),
        limit("internal requests", ", request_type: internal", &[OVER]),
        limit("another stage", ", stage: 2", &[OVER])
            .of_routes("", &limits("").replace("{actions", "{stage: 2, actions")),
        limit("a stage without limits", ", stage: 2", &[OVER]),
        limit("not enabled", ", filter_enabled: {default_value: {numerator: 0}}", &[OVER]),
        limit("not enforced", ", filter_enforced: {default_value: {numerator: 0}}", &[OVER]),
        case(
            "limits of the filter",
            RATELIMIT,
            &format!("{SERVICE}, {}", limits(", {generic_key: {descriptor_value: own}}")),
            &["GET /", "GET /plain"],
        )
        .of_routes("", &limits("")),
    ]
}

/// Limits that are exceeded, and those that are not.
fn again() -> [&'static str; 7] {
    [
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"17s\"}, {\"code\": \"OK\", \"duration_until_reset\": \"40s\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"17.9s\"}, {\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"3s\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"0.3s\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"code\": \"OVER_LIMIT\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"statuses\": [{\"code\": \"OK\", \"duration_until_reset\": \"9s\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OK\", \"statuses\": [{\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"9s\"}]}",
        "GET /\nx-answer: {\"overall_code\": \"OVER_LIMIT\", \"response_headers_to_add\": [{\"key\": \"retry-after\", \"value\": \"77\"}], \"statuses\": [{\"code\": \"OVER_LIMIT\", \"duration_until_reset\": \"9s\"}]}",
    ]
}

/// What the route's metadata says.
const OF_ROUTE: &str = ", {metadata: {descriptor_key: a, source: ROUTE_ENTRY, metadata_key: {key: ns, path: [{key: k}]}, skip_if_absent: true}}";

fn actions() -> Vec<Case> {
    let requests = [
        "GET /a%20b?q=1%202&r&q=3\nx-a: one\nx-a: two\nx-b: yes",
        "GET /\nx-a:",
        "POST /x?p=3",
        "GET /\nx-forwarded-for: 10.1.2.3, 10.9.8.7",
    ];
    let action = |name, action: &str| {
        case(name, RATELIMIT, SERVICE, &requests)
            .of_routes("", &limits(&format!(", {action}, {{generic_key: {{descriptor_value: last}}}}")))
    };
    vec![
        action("source and destination", "{source_cluster: {}}, {destination_cluster: {}}"),
        action("a header", "{request_headers: {header_name: x-a, descriptor_key: k}}"),
        action("a header, or none", "{request_headers: {header_name: x-a, descriptor_key: k, skip_if_absent: true}}"),
        action("the path", "{request_headers: {header_name: \":path\", descriptor_key: k}}, {request_headers: {header_name: \":method\", descriptor_key: m}}"),
        action("a parameter", "{query_parameters: {query_parameter_name: q, descriptor_key: k}}"),
        action("a parameter, or none", "{query_parameters: {query_parameter_name: q, descriptor_key: k, skip_if_absent: true}}"),
        action("addresses", "{remote_address: {}}, {masked_remote_address: {}}, {masked_remote_address: {v4_prefix_mask_len: 9}}"),
        action("keys", "{generic_key: {descriptor_key: k, descriptor_value: v}}"),
        action("keys are no formats", "{generic_key: {descriptor_value: \"%REQ(x-b)%\", default_value: d}}, \
               {header_value_match: {descriptor_value: \"%%\", default_value: d, headers: [{name: x-b, present_match: true, invert_match: true}], expect_match: false}}"),
        action("an address matched", "{remote_address_match: {descriptor_value: v, address_matcher: {ranges: [{address_prefix: \"::1\", prefix_len: 128}, {address_prefix: 10.9.0.0, prefix_len: 16}]}}}")
            .of_manager("use_remote_address: false"),
        action("an address not matched", "{remote_address_match: {descriptor_key: k, descriptor_value: v, address_matcher: {ranges: [{address_prefix: 127.0.0.0, prefix_len: 8}], invert_match: true}}}"),
        case("metadata of routes", RATELIMIT, SERVICE, &["GET /told", "GET /told-none"])
            .first(&format!("{{match: {{prefix: /told-none}}, route: {{cluster: a, {}}}}}", limits(OF_ROUTE)))
            .first(&format!("{{match: {{prefix: /told}}, metadata: {{filter_metadata: {{ns: {{k: text}}}}}}, route: {{cluster: a, {}}}}}", limits(OF_ROUTE))),
        case(
            "a limit of metadata's",
            "set_metadata.v3.Config",
            "metadata: [{metadata_namespace: ns, value: {good: {requests_per_unit: 5, unit: HOUR}, bad: {requests_per_unit: x, unit: HOUR}, odd: {requests_per_unit: 5.7, unit: EON}}}]",
            &["GET /"],
        )
        .then(RATELIMIT, SERVICE)
        .of_routes("", &format!("rate_limits: [{}]", ["good", "bad", "odd", "none"].map(|name| format!(
            "{{limit: {{dynamic_metadata: {{metadata_key: {{key: ns, path: [{{key: {name}}}]}}}}}}, actions: [{KNOWN}, {{generic_key: {{descriptor_value: {name}}}}}]}}"
        )).join(", "))),
        action("headers matched", "{header_value_match: {descriptor_value: v, headers: [{name: x-b, string_match: {exact: \"yes\"}}]}}"),
        action("headers not matched", "{header_value_match: {descriptor_key: k, descriptor_value: v, expect_match: false, headers: [{name: x-b, string_match: {exact: \"yes\"}}]}}"),
        action("parameters matched", "{query_parameter_value_match: {descriptor_value: v, query_parameters: [{name: p, string_match: {prefix: \"3\"}}]}}"),
        action("parameters not matched", "{query_parameter_value_match: {descriptor_key: k, descriptor_value: v, expect_match: false, query_parameters: [{name: p}]}}"),
        case(
            "metadata",
            "set_metadata.v3.Config",
            "metadata: [{metadata_namespace: ns, value: {k: text, num: 1, s: {k: deep}}}]",
            &["GET /"],
        )
        .then(RATELIMIT, SERVICE)
        .of_routes("", &limits(", {metadata: {descriptor_key: a, metadata_key: {key: ns, path: [{key: k}]}}}, \
             {metadata: {descriptor_key: b, metadata_key: {key: ns, path: [{key: num}]}, default_value: none}}, \
             {metadata: {descriptor_key: c, metadata_key: {key: ns, path: [{key: s}, {key: k}]}}}, \
             {metadata: {descriptor_key: d, metadata_key: {key: other, path: [{key: k}]}, skip_if_absent: true}}")),
        case("a limit of its own", RATELIMIT, SERVICE, &["GET /"])
            .of_routes("", &limits("").replace("{actions", "{limit: {rate_limit: {requests_per_unit: 5, unit: HOUR}}, actions")),
        case("hits", RATELIMIT, &format!("{SERVICE}, {}", limits("").replace("{actions", "{hits_addend: {number: 3}, actions")), &["GET /"]),
        case(
            "hits of a format",
            RATELIMIT,
            &format!("{SERVICE}, {}", limits("").replace("{actions", "{hits_addend: {format: '%REQ(x-hits)%'}, actions")),
            &["GET /", "GET /\nx-hits: 17", "GET /\nx-hits: 1000000001", "GET /\nx-hits: none", "GET /\nx-hits: 2.5"],
        ),
        case("hits given back", RATELIMIT, &format!("{SERVICE}, {}", limits("").replace("{actions", "{hits_addend: {number: 3, is_negative_hits: true}, actions")), &["GET /"]),
        case("several", RATELIMIT, SERVICE, &requests)
            .of_routes("", &format!("rate_limits: [{{actions: [{KNOWN}]}}, {{actions: [{{request_headers: {{header_name: x-b, descriptor_key: b}}}}]}}, {{disable_key: x, actions: [{{generic_key: {{descriptor_value: g}}}}]}}]")),
    ]
}

fn levels() -> Vec<Case> {
    let (host, route) =
        (limits(", {generic_key: {descriptor_value: host}}"), limits(", {generic_key: {descriptor_value: route}}"));
    let both = ["GET /", "GET /plain", "GET /direct"];
    let level = |name| case(name, RATELIMIT, SERVICE, &both);
    vec![
        level("host and route").of_routes(&host, &route),
        level("of the host").of_routes(&host, ""),
        level("host included").of_routes(&host, &format!("{route}, include_vh_rate_limits: true")),
        level("host included by the filter's").of_routes(&host, &route).told(
            By::Route,
            PER_ROUTE,
            "vh_rate_limits: INCLUDE",
        ),
        level("host ignored").of_routes(&host, "").told(By::Host, PER_ROUTE, "vh_rate_limits: IGNORE"),
        level("limits by route").of_routes(&host, &route).told(
            By::Route,
            PER_ROUTE,
            &format!("domain: other, {}", limits(", {generic_key: {descriptor_value: told}}")),
        ),
    ]
}

/// Limits that count when the request is over.
fn done() -> Vec<Case> {
    let of = |more: &str, fields: &str| format!("{{actions: [{KNOWN}{more}], {fields}}}");
    let begin = of(", {generic_key: {descriptor_value: begin}}", "");
    let end = of(", {generic_key: {descriptor_value: end}}", "apply_on_stream_done: true");
    let both = format!("rate_limits: [{begin}, {end}]");
    let told = "{metadata: {descriptor_key: m, metadata_key: {key: envoy.filters.http.ratelimit, path: [{key: k}]}, skip_if_absent: true}}";
    let counted = |format: &str| {
        let hits = format!("apply_on_stream_done: true, hits_addend: {{format: '{format}'}}");
        format!("rate_limits: [{begin}, {}]", of(&format!(", {told}"), &hits))
    };
    let all =
        ["GET /", OVER, "POST /\nx-do: 503\n\nsome body", "GET /\nx-answer: status 14", "GET /direct", "GET /plain"];
    let answered =
        ["GET /\nx-do: 201\nx-answer: {\"overall_code\": \"OK\", \"dynamic_metadata\": {\"k\": \"v\"}}", "GET /"];
    let level = |name, requests: &[&str]| case(name, RATELIMIT, SERVICE, requests);
    vec![
        level("at the end", &all).of_routes("", &both).shown(&[2, 2, 2, 2, 0, 0]),
        level("only at the end", &all[..3]).of_routes("", &format!("rate_limits: [{end}]")).shown(&[1, 1, 1]),
        level("at the end, of the host", &all[..2])
            .of_routes(&both, &format!("rate_limits: [{end}], include_vh_rate_limits: true"))
            .shown(&[2, 2]),
        level("at the end, by the host alone", &all[..1])
            .of_routes(&both, &format!("rate_limits: [{end}]"))
            .shown(&[1]),
        level("at the end, by route", &answered)
            .told(By::Route, PER_ROUTE, &format!("domain: other, {}", counted("%RESPONSE_CODE%")))
            .shown(&[2, 2]),
        level("bytes at the end, by route", &["POST /\nx-do: 200+bytes=12\n\nsome body"])
            .told(By::Route, PER_ROUTE, &counted("%BYTES_SENT%"))
            .shown(&[2]),
        level("headers at the end, by route", &["GET /\nx-hits: 7", "GET /"])
            .told(By::Route, PER_ROUTE, &counted("%REQ(x-hits)%"))
            .shown(&[2, 1]),
        case("at the end, of internal requests", RATELIMIT, &format!("{SERVICE}, request_type: internal"), &all[..1])
            .of_routes("", &both),
        case(
            "at the end, not enabled",
            RATELIMIT,
            &format!("{SERVICE}, filter_enabled: {{default_value: {{numerator: 0}}}}"),
            &all[..1],
        )
        .of_routes("", &both),
        case("at the end, of another stage", RATELIMIT, &format!("{SERVICE}, stage: 1"), &all[..1])
            .of_routes("", &both),
        case("at the end, of the filter", RATELIMIT, &format!("{SERVICE}, {both}"), &all[..2]).shown(&[2, 2]),
    ]
}

/// Which limits responses tell of.
fn told() -> Vec<Case> {
    let of = |value: &str, option: &str| {
        format!("{{actions: [{KNOWN}, {{generic_key: {{descriptor_value: {value}}}}}], x_ratelimit_option: {option}}}")
    };
    let limits = |options: [&str; 2]| format!("rate_limits: [{}, {}]", of("a", options[0]), of("b", options[1]));
    let status = |requests: u32, left: u32| {
        format!(
            r#"{{"code": "OK", "current_limit": {{"requests_per_unit": {requests}, "unit": "HOUR"}}, "limit_remaining": {left}}}"#
        )
    };
    let answer = |statuses: &[String]| {
        format!("GET /\nx-answer: {{\"overall_code\": \"OK\", \"statuses\": [{}]}}", statuses.join(", "))
    };
    let requests = [
        answer(&[status(5, 1), status(9, 2)]),
        answer(&[status(5, 3), status(9, 2)]),
        answer(&[status(5, 3)]),
        answer(&[status(5, 3), status(9, 2), status(1, 1)]),
    ];
    let requests = requests.each_ref().map(String::as_str);
    let on = ", enable_x_ratelimit_headers: DRAFT_VERSION_03";
    let case = |name, more: &str, options| {
        case(name, RATELIMIT, &format!("{SERVICE}{more}"), &requests).of_routes("", &limits(options))
    };
    vec![
        case("one is told", "", ["DRAFT_VERSION_03", "\"OFF\""]),
        case("one is told, the other as usual", "", ["UNSPECIFIED", "DRAFT_VERSION_03"]),
        case("one is not told", on, ["\"OFF\"", "UNSPECIFIED"]),
        case("none is told", on, ["\"OFF\"", "\"OFF\""]),
    ]
}

fn local() -> Vec<Case> {
    let on = "stat_prefix: $case, filter_enabled: {default_value: {numerator: 100}}, filter_enforced: {default_value: {numerator: 100}}, \
              enable_x_ratelimit_headers: DRAFT_VERSION_03, token_bucket: {max_tokens: 4, tokens_per_fill: 1, fill_interval: 1000s}";
    let bucket = |entry: &str, tokens: u32| {
        format!(
            "{{entries: [{entry}], token_bucket: {{max_tokens: {tokens}, tokens_per_fill: 1, fill_interval: 2000s}}}}"
        )
    };
    let descriptors = format!(
        "descriptors: [{}, {}]",
        bucket("{key: a, value: one}", 1),
        bucket("{key: a, value: two}, {key: generic_key, value: g}", 2)
    );
    let by_header = "{actions: [{request_headers: {header_name: x-a, descriptor_key: a}}]}, {actions: [{request_headers: {header_name: x-a, \
                     descriptor_key: a}}, {generic_key: {descriptor_value: g}}]}";
    let limits = format!("rate_limits: [{by_header}]");
    let hits = [
        "GET /\nx-a: 1\nx-hits: 4",
        "GET /\nx-a: 1\nx-hits: 7",
        "GET /\nx-a: 1\nx-hits: 6",
        "GET /\nx-a: 1\nx-hits: 1",
        "GET /\nx-a: 2\nx-hits: 0",
        "GET /\nx-a: 3\nx-hits: many",
        "GET /\nx-a: 3\nx-hits: -1",
        "GET /\nx-a: 3\nx-hits: 1.9",
        "GET /\nx-a: 3\nx-hits: 9",
        "GET /\nx-a: 4",
    ];
    let requests = [
        "GET /\nx-a: one",
        "GET /\nx-a: one",
        "GET /\nx-a: two",
        "GET /\nx-a: two",
        "GET /\nx-a: two",
        "GET /",
        "GET /\nx-a: three",
        "GET /plain",
    ];
    let of_connections = "local_rate_limit_per_downstream_connection: true";
    let more = on.replace("max_tokens: 4", "max_tokens: 100").replace("$case", "$case.second");
    let mixed = ["GET /", "GET /", "GET /plain", "GET /", "GET /", "GET /", "GET /plain"];
    vec![
        case("local descriptors", LOCAL, &format!("{on}, {descriptors}"), &requests).of_routes("", &limits),
        case("local descriptors of the host", LOCAL, &format!("{on}, {descriptors}"), &requests).of_routes(&limits, ""),
        case(
            "local descriptors, host ignored",
            LOCAL,
            &format!("{on}, {descriptors}, vh_rate_limits: IGNORE"),
            &requests,
        )
        .of_routes(&limits, ""),
        case("local descriptors of the filter", LOCAL, &format!("{on}, {descriptors}, {limits}"), &requests),
        case(
            "local descriptors alone",
            LOCAL,
            &format!("{on}, {descriptors}, always_consume_default_token_bucket: false"),
            &requests,
        )
        .of_routes("", &limits),
        case("local descriptors of another stage", LOCAL, &format!("{on}, {descriptors}, stage: 1"), &requests)
            .of_routes("", &limits),
        case(
            "local descriptors in the shadow",
            LOCAL,
            &format!(
                "{on}, request_headers_to_add_when_not_enforced: [{{header: {{key: x-over, value: \"yes\"}}}}], descriptors: [{}, {}, {}]",
                bucket("{key: a, value: one}", 1).replace("entries", "shadow_mode: true, entries"),
                bucket("{key: a, value: two}", 1),
                bucket("{key: b}", 1).replace("entries", "shadow_mode: true, entries"),
            ),
            &["GET /\nx-a: one", "GET /\nx-a: one", "GET /\nx-a: two\nx-b: 1", "GET /\nx-a: one\nx-b: 1", "GET /\nx-a: two\nx-b: 1", "GET /\nx-a: one", "GET /\nx-b: 2"],
        )
        .of_routes("", "rate_limits: [{actions: [{request_headers: {header_name: x-a, descriptor_key: a}}]}, {actions: [{request_headers: {header_name: x-b, descriptor_key: b}}]}]"),
        case("local limits of connections", LOCAL, &format!("{on}, {descriptors}, {of_connections}"), &requests)
            .of_routes("", &limits),
        case("local limits of one connection", LOCAL, &format!("{on}, {descriptors}, {of_connections}"), &requests)
            .of_routes("", &limits)
            .on_one_connection(),
        // The second one has tokens for all, and takes those of the first one.
        case(
            "local limits of one connection, twice",
            LOCAL,
            &format!("{}, {of_connections}", on.replace("$case", "$case.first")),
            &["GET /"; 4],
        )
        .then(LOCAL, &format!("{more}, {of_connections}"))
        .on_one_connection(),
        // The first one has a bucket of all connections.
        case("local limits of one connection and of all", LOCAL, &on.replace("$case", "$case.first"), &["GET /"; 6])
            .then(LOCAL, &format!("{}, {of_connections}", more.replace("max_tokens: 100", "max_tokens: 2")))
            .on_one_connection(),
        // The route's bucket is the connection's where it had the first request.
        case("local limits of one connection by route", LOCAL, &format!("{more}, {of_connections}"), &mixed)
            .told(By::Route, LOCAL, &format!("{}, {of_connections}", on.replace("$case", "$case.route")))
            .on_one_connection(),
        case(
            "local descriptors of the filter, and answers of the proxy",
            LOCAL,
            &format!("{on}, {descriptors}, {limits}"),
            &["GET /direct\nx-a: one", "GET /direct\nx-a: one", "GET /created\nx-a: one"],
        ),
        case(
            "local wildcards",
            LOCAL,
            &format!("{on}, descriptors: [{}, {}]", bucket("{key: a}", 1), bucket("{key: a, value: one}", 3)),
            &["one", "one", "one", "one", "two", "two", "three", "three", "two"].map(as_a).each_ref().map(|it| &**it),
        )
        .of_routes("", "rate_limits: [{actions: [{request_headers: {header_name: x-a, descriptor_key: a}}]}]"),
        case(
            "local wildcards in part",
            LOCAL,
            &format!("{on}, descriptors: [{}]", bucket("{key: a}, {key: generic_key, value: g}", 2)),
            &requests,
        )
        .of_routes("", &limits),
        case(
            "the last local wildcards",
            LOCAL,
            &format!(
                "{}, max_dynamic_descriptors: 2, descriptors: [{}]",
                on.replace("max_tokens: 4", "max_tokens: 40"),
                bucket("{key: a}", 1)
            ),
            &["1", "2", "1", "3", "1", "2", "2", "3"].map(as_a).each_ref().map(|it| &**it),
        )
        .of_routes("", "rate_limits: [{actions: [{request_headers: {header_name: x-a, descriptor_key: a}}]}]"),
        case(
            "local hits",
            LOCAL,
            &format!(
                "{on}, descriptors: [{}], rate_limits: [{{actions: [{{request_headers: {{header_name: x-a, descriptor_key: a}}}}], \
                 hits_addend: {{format: '%REQ(x-hits)%'}}}}]",
                bucket("{key: a}", 10)
            ),
            &hits,
        ),
        // Of which descriptors responses tell.
        case(
            "local descriptors that are told",
            LOCAL,
            &format!("{}, {descriptors}", on.replace("enable_x_ratelimit_headers: DRAFT_VERSION_03, ", "")),
            &requests,
        )
        .of_routes("", &limits.replacen("]}", "], x_ratelimit_option: DRAFT_VERSION_03}", 1)),
        case("local descriptors that are not told", LOCAL, &format!("{on}, {descriptors}"), &requests)
            .of_routes("", &limits.replacen("]}", "], x_ratelimit_option: \"OFF\"}", 1)),
        case("local descriptors of the filter that are not told", LOCAL, &format!("{on}, {descriptors}, {}", limits.replacen("]}", "], x_ratelimit_option: \"OFF\"}", 1)), &requests),
        case("local descriptors at the end", LOCAL, &format!("{on}, {descriptors}"), &requests)
            .of_routes("", &limits.replacen("]}", "], apply_on_stream_done: true}", 1)),
        case("local descriptors of the filter at the end", LOCAL, &format!("{on}, {descriptors}, {}", limits.replacen("]}", "], apply_on_stream_done: true}", 1)), &requests),
        case(
            "a number of local hits",
            LOCAL,
            &format!(
                "{on}, descriptors: [{}], rate_limits: [{{actions: [{{request_headers: {{header_name: x-a, descriptor_key: a}}}}], \
                 hits_addend: {{number: 3}}}}]",
                bucket("{key: a, value: one}", 7)
            ),
            &["GET /\nx-a: one"; 3],
        ),
    ]
}

fn as_a(value: &str) -> String {
    format!("GET /\nx-a: {value}")
}
