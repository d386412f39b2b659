//! Requests that go to hosts by their hash.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [by_policies(), by_tables(), retried()].concat()
}

fn to(cluster: &str, policies: &str) -> String {
    format!("- {{match: {{prefix: /}}, route: {{cluster: {cluster}, hash_policy: [{policies}]}}}}")
}

fn by_policies() -> Vec<Case> {
    let header = "{header: {header_name: x-h}}";
    let headers = [
        "GET /\nx-h: one",
        "GET /\nx-h: two",
        "GET /\nx-h: three",
        "GET /\nx-h: one\nx-h: two",
        "GET /\nx-h: two\nx-h: one",
        "GET /\nx-h: ",
        "GET /\nx-h: user-7-of-9",
        "GET /\nx-h: user-8-of-9\nx-g: one",
        "GET /\nx-h: one\nx-g: one",
        "GET /\nx-h: two\nx-g: three",
        // What is no ASCII is hashed like anything else.
        "GET /\nx-h: k/1/é",
        "GET /\nx-h: k/1/é\nx-h: k/2/ü",
        "GET /\nx-h: user-7-of-é",
    ];
    let paths = [
        "GET /",
        "GET /a?p=1",
        "GET /b?p=2&p=3",
        "GET /?q=1&p=%20x",
        "GET /?p",
        "GET /?p=&q",
        "GET /very/long/path/that/is/hashed",
    ];
    let paths: Vec<String> = paths.iter().map(|path| format!("{path}\nx-h: fallback")).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let cookies = [
        "GET /\ncookie: c=one",
        "GET /\ncookie: c=two; d=1",
        "GET /\ncookie: d=1; c=\"three\"",
        "GET /\ncookie: d=1\ncookie: c=four",
        "GET /\ncookie: c=five\ncookie: c=six",
        "GET /\ncookie: c=k/1/é",
    ];
    let addresses = [
        "GET /\nx-forwarded-for: 192.0.2.1",
        "GET /\nx-forwarded-for: 192.0.2.2",
        "GET /\nx-forwarded-for: 2001:db8::1",
        "GET /",
    ];
    let made = ["GET /", "GET /\ncookie: c=", "GET /\ncookie: c=here", "GET /\nx-do: 503"];
    vec![
        case("a header", &to("ring", header), &headers),
        case(
            "a rewritten header",
            &to(
                "ring",
                "{header: {header_name: x-h, regex_rewrite: {pattern: {regex: \"user-([0-9]+).*\"}, substitution: \"\\\\1\"}}}",
            ),
            &headers,
        ),
        case("two headers", &to("ring", "{header: {header_name: x-h}}, {header: {header_name: x-g}}"), &headers),
        case(
            "the same header twice",
            &to("ring", "{header: {header_name: x-h}}, {header: {header_name: x-h}}"),
            &headers,
        ),
        case(
            "a header that ends it",
            &to("ring", "{header: {header_name: x-h}, terminal: true}, {header: {header_name: x-g}}"),
            &headers,
        ),
        case(
            "a missing header that would end it",
            &to("ring", "{header: {header_name: x-none}, terminal: true}, {header: {header_name: x-h}}"),
            &headers,
        ),
        case("the path", &to("ring", "{header: {header_name: \":path\"}}"), &paths),
        case(
            "the method and the host",
            &to("ring", "{header: {header_name: \":method\"}}, {header: {header_name: \":authority\"}}"),
            &["GET /\nhost: case-7.test", "POST /\n\nbody", "PUT /\n\nbody"],
        ),
        case("a parameter", &to("ring", "{query_parameter: {name: p}}, {header: {header_name: x-h}}"), &paths),
        case("a cookie", &to("ring", "{cookie: {name: c}}"), &cookies),
        case("the client's address", &to("ring", "{connection_properties: {source_ip: true}}"), &addresses)
            .of_manager("use_remote_address: false"),
        case("the client's own address", &to("ring", "{connection_properties: {source_ip: true}}"), &addresses)
            .of_manager("use_remote_address: true"),
        case(
            "nothing of the connection",
            &to("ring", "{connection_properties: {}}, {header: {header_name: x-h}}"),
            &headers,
        ),
        case(
            "a cookie that is made",
            &to(
                "alone",
                "{cookie: {name: c, ttl: 60s, path: /p, attributes: [{name: SameSite, value: Lax}, {name: Secure}]}}",
            ),
            &made,
        ),
        case("a cookie for a session", &to("alone", "{cookie: {name: c, ttl: 0s}}"), &made),
        case(
            "two cookies that are made",
            &to("alone", "{cookie: {name: c, ttl: 1.5s}}, {cookie: {name: d, ttl: 1s}}"),
            &made,
        ),
        case("no cookie without a table", &to("a", "{cookie: {name: c, ttl: 60s}}"), &made),
        case(
            "a header that the route rewrites",
            "- {match: {prefix: /}, request_headers_to_add: [{header: {key: x-h, value: one}, append_action: \
             OVERWRITE_IF_EXISTS_OR_ADD}], route: {cluster: ring, hash_policy: [{header: {header_name: x-h}}]}}",
            &headers,
        ),
    ]
}

/// Many requests for each kind of table.
fn by_tables() -> Vec<Case> {
    let many: Vec<String> = (0..60).map(|number| format!("GET /\nx-h: client-{number}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let header = "{header: {header_name: x-h}}";
    vec![
        case("a ring", &to("ring", header), &many),
        case("a small ring", &to("small-ring", header), &many),
        case("a ring by murmur hash and weights", &to("murmur", header), &many),
        case("a maglev table", &to("maglev", header), &many),
        case("a small maglev table, weights and names", &to("small-maglev", header), &many),
    ]
}

/// Other hosts than the one that the hash leads to.
fn retried() -> Vec<Case> {
    let predicate = |name: &str, rest: &str| {
        format!(
            "{{name: p, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.retry.host.{name}{rest}}}}}"
        )
    };
    let previous = predicate("previous_hosts.v3.PreviousHostsPredicate", "");
    let canaries = predicate("omit_canary_hosts.v3.OmitCanaryHostsPredicate", "");
    let metadata = |labels: &str| {
        predicate(
            "omit_host_metadata.v3.OmitHostMetadataConfig",
            &format!(", metadata_match: {{filter_metadata: {{envoy.lb: {{{labels}}}}}}}"),
        )
    };
    let route = |cluster: &str, predicates: &str| {
        format!(
            "- {{match: {{prefix: /}}, route: {{cluster: {cluster}, hash_policy: [{{header: {{header_name: x-h}}}}], \
             retry_policy: {{retry_on: 5xx, num_retries: 3, host_selection_retry_max_attempts: 20, \
             retry_host_predicate: [{predicates}]}}}}}}"
        )
    };
    let many: Vec<String> = (0..12).map(|number| format!("GET /\nx-h: client-{number}\nx-do: 503")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    vec![
        case("previous hosts of a ring", &route("ring", &previous), &many),
        case("previous hosts of a maglev table", &route("maglev", &previous), &many),
        case("no canaries", &route("ring", &canaries), &many),
        case("no hosts of a kind", &route("ring", &metadata("kind: slow")), &many),
        case("no hosts of a kind and number", &route("ring", &metadata("kind: slow, number: 2")), &many),
        case("no hosts that have it in a list", &route("ring", &metadata("zones: z2")), &many),
        case("metadata that says nothing", &route("ring", &metadata("")), &many),
        case("all of them", &route("maglev", &format!("{previous}, {canaries}, {}", metadata("kind: slow"))), &many),
    ]
}
