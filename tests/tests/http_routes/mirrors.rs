//! Requests that further clusters get a copy of.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    let requests = [
        "GET /x?y=z",
        "GET /\nx-a: b",
        "POST /\n\nsome body",
        "POST /\nx-do: 503\n\nsome body",
        "HEAD /",
        "GET /\nx-to: b",
    ];
    let to = |policies: &str| {
        format!("- {{match: {{prefix: /}}, route: {{cluster: a, request_mirror_policies: [{policies}]}}}}")
    };
    let mirrored = |name, policies: &str, seen| case(name, &to(policies), &requests).settle(seen);
    vec![
        mirrored("request_mirror_policies", "{cluster: b}", 2),
        mirrored("two mirrors", "{cluster: b}, {cluster: c, disable_shadow_host_suffix_append: true}", 3),
        mirrored("a mirror of all", "{cluster: b, runtime_fraction: {default_value: {numerator: 100}}}", 2),
        mirrored("a mirror of none", "{cluster: b, runtime_fraction: {default_value: {numerator: 0}}}", 1),
        case("a mirror that a header names", &to("{cluster_header: x-to}"), &requests[5..]).settle(2),
        case("a mirror that no header names", &to("{cluster_header: x-to}"), &requests[..2]).settle(1),
        mirrored("host_rewrite_literal", "{cluster: b, host_rewrite_literal: other.test}", 2),
        mirrored("trace_sampled", "{cluster: b, trace_sampled: false}", 2),
        mirrored(
            "request_headers_mutations",
            "{cluster: b, request_headers_mutations: [{append: {header: {key: x-m, value: \"%REQ(x-a)% %REQ(:path)%\"}}}, \
             {remove: x-id-none}, {append: {header: {key: x-a, value: c}, append_action: OVERWRITE_IF_EXISTS}}]}",
            2,
        ),
        mirrored("a mirror that is dead", "{cluster: dead}", 1),
        case(
            "a mirror whose route is rewritten",
            "- {match: {prefix: /}, route: {cluster: a, request_mirror_policies: [{cluster: b}], prefix_rewrite: /new/, host_rewrite_literal: h.test}}",
            &requests,
        )
        .settle(2),
        case("mirrors of the virtual host", "- {match: {prefix: /}, $a}", &requests)
            .of_host("request_mirror_policies: [{cluster: b}]")
            .settle(2),
        mirrored("mirrors of the route instead", "{cluster: c}", 2).of_host("request_mirror_policies: [{cluster: b}]"),
        mirrored("the attempt that mirrors are told", "{cluster: b}", 2).of_host("include_request_attempt_count: true"),
        // The answers of mirrors, and their failures, are nobody's.
        case(
            "mirrors that fail",
            &to("{cluster: b}"),
            &[
                "GET /\nx-do-b: hang",
                "GET /\nx-do-b: reset",
                "GET /\nx-do-b: 503",
                "GET /\nx-do-b: 200+bytes=300000",
                "GET /\nx-do-b: 200+delay=500",
                "POST /\nx-do-b: hang\n\nsome body",
                "POST /\nx-do-b: reset\n\nsome body",
                "POST /\nx-do: 200+delay=300\nx-do-b: 500\n\nsome body",
                "HEAD /\nx-do-b: reset",
            ],
        )
        .settle(2),
        case(
            "mirrors beside retries",
            "- {match: {prefix: /}, route: {cluster: a, request_mirror_policies: [{cluster: b}], retry_policy: {retry_on: 5xx}}}",
            &["GET /\nx-do-a: 503,200\nx-do-b: 503", "POST /\nx-do-a: reset,200\nx-do-b: reset\n\nsome body"],
        )
        .settle(3),
        case("a mirror that hangs", &to("{cluster: b}"), &["GET /\nx-do: 200"]).settle(2),
        case("a mirrored body over the limit", &to("{cluster: b}").replace("- {match", "- {request_body_buffer_limit: 4, match"), &requests[2..3])
            .settle(2),
    ]
}
