//! What becomes of a request.

use super::harness::{Case, case};

/// Why some rewrites differ.
const NO_PATH: &str = "what does not begin with a slash is no path: one is put before it";

pub fn cases() -> Vec<Case> {
    [redirects(), answers(), rewrites()].concat()
}

fn redirects() -> Vec<Case> {
    let to = |name, matched: &str, action: &str, requests: &[&str]| {
        case(name, &format!("- {{match: {{{matched}}}, redirect: {{{action}}}}}"), requests)
    };
    let paths = &["GET /a/b?c=d", "GET /a", "GET /a/?x", "POST /a/b\n\nbody", "GET /a/b\nx-forwarded-proto: https"];
    // What could become part of the host.
    let beside_hosts = &["GET /a/.evil.test/x", "GET /a/@evil.test", "GET /a/:99/x?y"];
    vec![
        to("https_redirect", "prefix: /", "https_redirect: true", paths),
        to("https_redirect false", "prefix: /", "https_redirect: false", paths),
        to("scheme_redirect", "prefix: /", "scheme_redirect: ftp", paths),
        to("host_redirect", "prefix: /", "host_redirect: h.example", paths),
        to("host_redirect with a port", "prefix: /", "host_redirect: \"h.example:81\"", paths),
        to("port_redirect", "prefix: /", "port_redirect: 8443", paths),
        to("port_redirect with a host", "prefix: /", "port_redirect: 8443, host_redirect: h.example", paths),
        to("port_redirect with https", "prefix: /", "port_redirect: 443, https_redirect: true", paths),
        to("path_redirect", "prefix: /", "path_redirect: /new", paths),
        to("path_redirect with a query", "prefix: /", "path_redirect: \"/new?q=r\"", paths),
        to("path_redirect, strip_query", "prefix: /", "path_redirect: /new, strip_query: true", paths),
        to(
            "path_redirect with a query, strip_query",
            "prefix: /",
            "path_redirect: \"/new?q=r\", strip_query: true",
            paths,
        ),
        to("prefix_rewrite", "prefix: /a", "prefix_rewrite: /new", paths),
        to("prefix_rewrite with a slash", "prefix: /a", "prefix_rewrite: /new/", paths),
        to("prefix_rewrite of a path", "path: /a", "prefix_rewrite: /new", paths),
        to("prefix_rewrite by a regex", "safe_regex: {regex: \"/a.*\"}", "prefix_rewrite: /new", paths),
        to("prefix_rewrite, separated", "path_separated_prefix: /a", "prefix_rewrite: /new", paths),
        to("prefix_rewrite, any case", "prefix: /A, case_sensitive: false", "prefix_rewrite: /new", paths),
        to("prefix_rewrite, strip_query", "prefix: /a", "prefix_rewrite: /new, strip_query: true", paths),
        to(
            "regex_rewrite",
            "prefix: /a",
            "regex_rewrite: {pattern: {regex: \"^/(a)(/b)?\"}, substitution: \"/x\\\\2/\\\\1\"}",
            paths,
        ),
        to("path_redirect without a slash", "prefix: /", "path_redirect: new", paths),
        to("path_redirect of nothing", "prefix: /", "path_redirect: \"\"", paths),
        to("prefix_rewrite without a slash", "prefix: /a/", "prefix_rewrite: \"new/\"", beside_hosts),
        to("prefix_rewrite of nothing", "prefix: /a/", "prefix_rewrite: \"\"", beside_hosts),
        to(
            "regex_rewrite to the rest",
            "prefix: /a/",
            "regex_rewrite: {pattern: {regex: \"^/a/\"}, substitution: \"\"}",
            beside_hosts,
        ),
        to("strip_query", "prefix: /", "https_redirect: true, strip_query: true", paths),
        to("301", "prefix: /", "path_redirect: /n, response_code: MOVED_PERMANENTLY", paths),
        to("302", "prefix: /", "path_redirect: /n, response_code: FOUND", paths),
        to("303", "prefix: /", "path_redirect: /n, response_code: SEE_OTHER", paths),
        to("307", "prefix: /", "path_redirect: /n, response_code: TEMPORARY_REDIRECT", paths),
        to("308", "prefix: /", "path_redirect: /n, response_code: PERMANENT_REDIRECT", paths),
        redirect_hosts("https from ports", "https_redirect: true"),
        redirect_hosts("http from ports", "scheme_redirect: http"),
        redirect_hosts("path from ports", "path_redirect: /n"),
        redirect_hosts("port from ports", "port_redirect: 99"),
        redirect_hosts("host from ports", "host_redirect: h.example"),
    ]
}

fn redirect_hosts(name: &'static str, action: &str) -> Case {
    let hosts =
        format!("- {{name: all, domains: [\"*\"], routes: [{{match: {{prefix: /}}, redirect: {{{action}}}}}]}}");
    let requests = &[
        "GET /\nhost: h.test",
        "GET /\nhost: h.test:80",
        "GET /\nhost: h.test:443",
        "GET /\nhost: h.test:8080",
        "GET /\nhost: h.test:80\nx-forwarded-proto: https",
        "GET /\nhost: h.test:443\nx-forwarded-proto: https",
        "GET /\nhost: [::1]:80",
        "GET /\nhost: [::1]",
        "GET /\nhost: 127.0.0.1:443",
    ];
    case(name, &hosts, requests).hosts()
}

fn answers() -> Vec<Case> {
    let requests = &["GET /", "HEAD /", "POST /\n\nbody", "GET /\ncontent-type: application/grpc"];
    let statuses = [200, 201, 204, 301, 304, 400, 401, 403, 404, 408, 413, 429, 431, 500, 501, 502, 503, 504];
    let mut cases: Vec<_> = statuses
        .iter()
        .flat_map(|status| {
            let bodiless = matches!(status, 204 | 304);
            let with = |body: &str| format!("- {{match: {{prefix: /}}, direct_response: {{status: {status}{body}}}}}");
            [
                case("direct response", &with(""), requests),
                match case("direct response with a body", &with(", body: {inline_string: text}"), requests) {
                    case if bodiless => case.differs("no length is told of a body that may not be sent"),
                    case => case,
                },
            ]
        })
        .collect();
    cases.push(case(
        "direct response of bytes",
        "- {match: {prefix: /}, direct_response: {status: 200, body: {inline_bytes: AAEC}}}",
        requests,
    ));
    let made = |name, fields: &str| {
        let routes = format!("- {{match: {{prefix: /}}, name: main, direct_response: {{status: 203, {fields}}}}}");
        case(name, &routes, &[requests as &[_], &["GET /x?y=z\nx-a: b", "GET /\naccept: */*"]].concat())
    };
    let text =
        "%REQ(x-a)% %REQ(:path)% %RESPONSE_CODE% %ROUTE_NAME% %LOCAL_REPLY_BODY% %PROTOCOL% %RESPONSE_CODE_DETAILS%";
    let text = format!("body_format: {{text_format_source: {{inline_string: \"{text}\"}}");
    let json =
        "body_format: {json_format: {code: \"%RESPONSE_CODE%\", said: \"%LOCAL_REPLY_BODY%\", none: \"%REQ(x-none)%\"}";
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    cases.extend([
        made("direct response, body_format", &format!("body: {{inline_string: inner}}, {text}}}")),
        made("direct response, body_format alone", &format!("{text}}}")),
        made("direct response, body_format, content_type", &format!("{text}, content_type: text/html}}")),
        made("direct response, body_format, omit_empty_values", &format!("{text}, omit_empty_values: true}}")),
        made("direct response, body_format of JSON", &format!("body: {{inline_string: inner}}, {json}}}")),
        case(
            "direct response, body_format and headers",
            &format!(
                "- {{match: {{prefix: /}}, direct_response: {{status: 200, {text}}}}}, response_headers_to_add: \
                 [{{header: {{key: content-type, value: text/css}}, append_action: OVERWRITE_IF_EXISTS_OR_ADD}}], \
                 request_headers_to_add: [{{header: {{key: x-a, value: added}}}}]}}"
            ),
            requests,
        ),
        made("direct response of a file", &format!("body: {{filename: {file}}}")),
        made("direct response of a variable", "body: {environment_variable: HOME}"),
    ]);
    cases
}

fn rewrites() -> Vec<Case> {
    let to = |name, matched: &str, action: &str, requests: &[&str]| {
        case(name, &format!("- {{match: {{{matched}}}, route: {{cluster: a, {action}}}}}"), requests)
    };
    let paths = &["GET /a/b?c=d", "GET /a", "GET /a/", "GET /ab", "POST /a/b\n\nbody"];
    vec![
        to("route, prefix_rewrite", "prefix: /a", "prefix_rewrite: /new", paths),
        to("route, prefix_rewrite to the root", "prefix: /a/", "prefix_rewrite: /", paths),
        to("route, prefix_rewrite of a path", "path: /a", "prefix_rewrite: /new", paths),
        to("route, prefix_rewrite by a regex", "safe_regex: {regex: \"/a.*\"}", "prefix_rewrite: /new", paths),
        to("route, prefix_rewrite, separated", "path_separated_prefix: /a", "prefix_rewrite: /new", paths),
        to("route, prefix_rewrite, any case", "prefix: /A, case_sensitive: false", "prefix_rewrite: /new", paths),
        to("route, regex_rewrite", "prefix: /", "regex_rewrite: {pattern: {regex: b}, substitution: X}", paths),
        to(
            "route, regex_rewrite with groups",
            "prefix: /",
            r"regex_rewrite: {pattern: {regex: '^/(a)(/(\w+))?'}, substitution: '/\3\\x/\1\0'}",
            paths,
        ),
        to(
            "route, regex_rewrite of nothing",
            "prefix: /",
            "regex_rewrite: {pattern: {regex: 'x*'}, substitution: '-'}",
            paths,
        )
        .differs(NO_PATH),
        to(
            "route, regex_rewrite to nothing",
            "prefix: /",
            "regex_rewrite: {pattern: {regex: '^/a'}, substitution: ''}",
            paths,
        )
        .differs(NO_PATH),
        to("route, prefix_rewrite without a slash", "prefix: /a/", "prefix_rewrite: v2/", &paths[..1]).differs(NO_PATH),
        to("route, prefix_rewrite of nothing", "prefix: /a/", "prefix_rewrite: \"\"", paths),
        to("route, prefix_rewrite with a fragment", "prefix: /a", "prefix_rewrite: \"/new#x\"", &paths[..1])
            .differs("what cannot stand in a path is percent-encoded: hosts would read two parts"),
        templates("/a/{x}", "/new/{x}"),
        templates("/a/{x}", "/{x}/{x}y"),
        templates("/a/{x=**}", "/new"),
        templates("/{x}/{y=**}", "/{y}/{x}"),
        to("route, host_rewrite_literal", "prefix: /", "host_rewrite_literal: h.example", paths),
        to("route, host_rewrite_literal, the same", "prefix: /", "host_rewrite_literal: same.example", &["GET /"]),
        to("route, auto_host_rewrite", "prefix: /", "auto_host_rewrite: true", paths),
        to(
            "route, host_rewrite_header",
            "prefix: /",
            "host_rewrite_header: x-to",
            &["GET /", "GET /\nx-to: h.example", "GET /\nx-to:", "GET /\nx-to: one\nx-to: two"],
        ),
        to(
            "route, host_rewrite_path_regex",
            "prefix: /",
            r"host_rewrite_path_regex: {pattern: {regex: '^/([a-z]+)/?.*$'}, substitution: '\1.example'}",
            paths,
        ),
        to(
            "route, host_rewrite_path_regex and prefix_rewrite",
            "prefix: /a",
            r"prefix_rewrite: /n, host_rewrite_path_regex: {pattern: {regex: '^/([a-z]+)/?.*$'}, substitution: '\1.example'}",
            paths,
        ),
        to(
            "route, append_x_forwarded_host",
            "prefix: /",
            "host_rewrite_literal: h.example, append_x_forwarded_host: true",
            &["GET /", "GET /\nx-forwarded-host: before", "GET /\nx-envoy-original-host: before"],
        ),
        to("route, append_x_forwarded_host alone", "prefix: /", "append_x_forwarded_host: true", paths),
        to(
            "route, append_x_forwarded_host, auto",
            "prefix: /",
            "auto_host_rewrite: true, append_x_forwarded_host: true",
            &["GET /", "GET /\nx-forwarded-host: before"],
        ),
    ]
}

fn templates(matched: &str, rewritten: &str) -> Case {
    let url = "type.googleapis.com/envoy.extensions.path";
    let routes = format!(
        "- match: {{path_match_policy: {{name: m, typed_config: {{\"@type\": \
         {url}.match.uri_template.v3.UriTemplateMatchConfig, path_template: \"{matched}\"}}}}}}\n  route: {{cluster: a, \
         path_rewrite_policy: {{name: r, typed_config: {{\"@type\": \
         {url}.rewrite.uri_template.v3.UriTemplateRewriteConfig, path_template_rewrite: \"{rewritten}\"}}}}}}\n"
    );
    case("route, path_rewrite_policy", &routes, &["GET /a/b", "GET /a/b?c=d", "GET /a/b/c", "GET /a/%41"])
}
