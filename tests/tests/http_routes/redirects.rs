//! Redirects of upstreams that are followed: `internal_redirect_policy`.

use super::harness::{Case, case};

/// Routes below one host, and requests to it.
fn to(name: &'static str, routes: &str, requests: &[&str]) -> Case {
    let indented: String = routes.lines().map(|line| format!("  {line}\n")).collect();
    let hosts = format!(
        "- name: redirecting\n  domains: [\"r.test\", \"s.test:81\"]\n  include_request_attempt_count: true\n  routes:\n{indented}"
    );
    case(name, &hosts, requests).hosts()
}

/// One route that follows redirects as the policy says, and one that follows none.
fn policy(name: &'static str, policy: &str, requests: &[&str]) -> Case {
    let routes = format!(
        "- {{match: {{prefix: /b}}, name: b, route: {{cluster: b}}}}\n\
         - {{match: {{prefix: /direct}}, name: direct, direct_response: {{status: 200, body: {{inline_string: here}}}}}}\n\
         - {{match: {{prefix: /away}}, name: away, redirect: {{host_redirect: away.test}}}}\n\
         - {{match: {{prefix: /a}}, name: a, route: {{cluster: a, internal_redirect_policy: {{{policy}}}}}}}"
    );
    to(name, &routes, requests)
}

/// Every place a redirect may lead to.
const PLACES: [&str; 26] = [
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,200",
    "GET /a?x=y\nhost: r.test\nx-do: 302+location=http://r.test/a/2?z,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/b,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://s.test:81/a/2,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/a#part,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/a?x#part,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/direct",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/away",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/nowhere,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://other.test/a,200",
    "GET /a\nhost: r.test\nx-do: 302+location=/a/2,200",
    "GET /a\nhost: r.test\nx-do: 302+location=r.test/a/2,200",
    "GET /a\nhost: r.test\nx-do: 302+location=,200",
    "GET /a\nhost: r.test\nx-do: 302,200",
    "GET /a\nhost: r.test\nx-do: 302+location=https://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-forwarded-proto: https\nx-do: 302+location=https://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-forwarded-proto: https\nx-do: 302+location=http://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,302+location=http://r.test/a/3,200",
    "GET /a\nhost: r.test\nx-do: 301+location=http://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-do: 303+location=http://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-do: 307+location=http://r.test/a/2,200",
    "GET /a\nhost: r.test\nx-do: 200+location=http://r.test/a/2,200",
    "HEAD /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,200",
    "POST /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,200\n\nthe body",
    "POST /a\nhost: r.test\nx-do: 303+location=http://r.test/a/2,200\n\nthe body",
];

pub fn cases() -> Vec<Case> {
    let previous = "{name: previous, typed_config: {\"@type\": \
                    type.googleapis.com/envoy.extensions.internal_redirect.previous_routes.v3.PreviousRoutesConfig}}";
    let listed = "{name: listed, typed_config: {\"@type\": \
                  type.googleapis.com/envoy.extensions.internal_redirect.allow_listed_routes.v3.AllowListedRoutesConfig, \
                  allowed_route_names: [b, direct]}}";
    let safe = "{name: safe, typed_config: {\"@type\": \
                type.googleapis.com/envoy.extensions.internal_redirect.safe_cross_scheme.v3.SafeCrossSchemeConfig}}";
    let three = [
        "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,302+location=http://r.test/a/3,200",
        "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/b/2,200",
        "GET /a\nhost: r.test\nx-do: 302+location=http://r.test/direct/2,200",
    ];
    let copied = [
        "GET /a\nhost: r.test\nx-one: 1\nx-two: 2\nx-do: 302+location=http://r.test/a/2+x-one=new+x-one=newer,200",
        "GET /a\nhost: r.test\nx-one: 1\nx-do: 302+location=http://r.test/a/2+x-two=new+x-three=3,200",
    ];
    let to_see = "GET /from/x?y\nhost: r.test\nx-do: 302+location=http://r.test/to/z,200";
    let retried = "GET /a\nhost: r.test\nx-do: 503,302+location=http://r.test/a/2,503,200";
    let posted = "POST /a\nhost: r.test\nx-do: 503,307+location=http://r.test/a/2,503,200\n\nthe body";
    let large = format!("POST /a\nhost: r.test\nx-do: 302+location=http://r.test/a/2,200\n\n{}", "x".repeat(100));
    vec![
        policy("the defaults", "", &PLACES),
        policy(
            "all codes, twice",
            "redirect_response_codes: [301, 302, 303, 307, 308], max_internal_redirects: 2",
            &PLACES,
        ),
        policy("codes that are none", "redirect_response_codes: [200, 404, 303]", &PLACES),
        policy("no redirects", "max_internal_redirects: 0", &PLACES),
        policy("from http to https", "allow_cross_scheme_redirect: true", &PLACES),
        policy(
            "safely from http to https",
            &format!("allow_cross_scheme_redirect: true, predicates: [{safe}]"),
            &PLACES,
        ),
        policy("previous routes", &format!("max_internal_redirects: 3, predicates: [{previous}]"), &three),
        policy("listed routes", &format!("max_internal_redirects: 3, predicates: [{listed}]"), &three),
        policy("both", &format!("max_internal_redirects: 3, predicates: [{previous}, {listed}]"), &three),
        policy("copied headers", "response_headers_to_copy: [x-one, X-Two, x-three]", &copied),
        to(
            "what the first pass did",
            "- {match: {prefix: /from/}, route: {cluster: a, prefix_rewrite: /rewritten/, host_rewrite_literal: \
             rewritten.test, internal_redirect_policy: {}}, request_headers_to_add: [{header: {key: x-a, value: a}}], \
             response_headers_to_add: [{header: {key: x-from, value: a}}]}\n\
             - {match: {prefix: /to}, route: {cluster: a, prefix_rewrite: /again, timeout: 5s}, request_headers_to_add: \
             [{header: {key: x-a, value: b}}], response_headers_to_add: [{header: {key: x-from, value: b}}]}",
            &[to_see],
        ),
        to(
            "retries before and after",
            "- {match: {prefix: /a}, route: {cluster: a, internal_redirect_policy: {redirect_response_codes: [302, 307]}, \
             retry_policy: {retry_on: 5xx}}}",
            &[retried, posted],
        ),
        to(
            "a body over the limit",
            "- {match: {prefix: /a}, request_body_buffer_limit: 10, route: {cluster: a, internal_redirect_policy: {}}}",
            &[&large],
        ),
        to(
            "the deprecated fields",
            "- {match: {prefix: /a}, route: {cluster: a, internal_redirect_action: HANDLE_INTERNAL_REDIRECT, \
             max_internal_redirects: 2}}",
            &three,
        ),
        to("without the action", "- {match: {prefix: /a}, route: {cluster: a, max_internal_redirects: 2}}", &three),
    ]
}
