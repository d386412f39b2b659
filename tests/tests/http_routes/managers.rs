//! What the connection manager does to requests before their routes are chosen, and how long it gives them.

use super::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    [hosts(), paths(), ports(), underscores(), durations(), attempts(), certificates()].concat()
}

fn of_manager(name: &'static str, lines: &[&str], requests: &[&str]) -> Case {
    let case = case(name, "- {match: {prefix: /a/b}, route: {cluster: b}}\n- {match: {prefix: /}, $a}", requests);
    lines.iter().fold(case, |case, line| case.of_manager(line))
}

fn hosts() -> Vec<Case> {
    let host = "- {name: plain, domains: [h.test, \"[::1]\"], routes: [{match: {prefix: /}, $a}]}\n\
                - {name: others, domains: [\"*\"], routes: [{match: {prefix: /}, $b}]}";
    let requests = [
        "GET /\nhost: h.test",
        "GET /\nhost: H.test:80",
        "GET /\nhost: h.test:443",
        "GET /\nhost: h.test:x",
        "GET /\nhost: h.test:99999",
        "GET /\nhost: h.test.",
        "GET /\nhost: h.test.:80",
        "GET /\nhost: h.test..",
        "GET /\nhost: [::1]:80",
        "GET /\nhost: [::1]",
        "GET /\nhost: .",
        "GET http://h.test:80/x\nhost: other",
        "GET http://h.test./x\nhost: other",
    ];
    let with = |name, line: &str| case(name, host, &requests).hosts().of_manager(line);
    vec![
        with("strip_any_host_port", "strip_any_host_port: true"),
        with("strip_any_host_port false", "strip_any_host_port: false"),
        with("strip_matching_host_port", "strip_matching_host_port: true"),
        with("strip_trailing_host_dot", "strip_trailing_host_dot: true"),
        with("a host's dot and port", "strip_trailing_host_dot: true").of_manager("strip_any_host_port: true"),
    ]
}

fn paths() -> Vec<Case> {
    let requests = [
        "GET /a%2Fb",
        "GET /a%2fb?c=%2F",
        "GET /a%5Cb",
        "GET /a%5cb",
        "GET /a/b",
        "GET /a%252Fb",
        "GET /x/..%2Fa%2F%2Fb",
        "GET /%",
        "HEAD /a%2Fb",
        "POST /a%2Fb\n\nbody",
        "GET /a%2Fb\ncontent-type: application/grpc",
    ];
    let action = |action: &str| format!("path_with_escaped_slashes_action: {action}");
    let with = |name, actions: &str| of_manager(name, &[&action(actions)], &requests);
    let normal = |name, actions: &str| {
        // Without backslashes: those are another matter.
        let requests = [0, 1, 4, 5, 6, 8, 9, 10].map(|index| requests[index]);
        of_manager(name, &[&action(actions), "normalize_path: true", "merge_slashes: true"], &requests)
    };
    let characters = ["GET /a\"^{|}b'[]", "GET /a?q={\"a\"}^`|<>"];
    let odd = ["GET /<a>`b"];
    vec![
        of_manager("odd characters", &[], &characters[..1]),
        of_manager("odd characters, normal paths", &["normalize_path: true"], &[characters[0], odd[0]]),
        of_manager("characters that may not stand there", &[], &[odd[0], characters[1]])
            .differs("they are percent-encoded (RFC 3986, section 2.1): hosts get what all of them read"),
        with("escaped slashes, as it likes", "IMPLEMENTATION_SPECIFIC_DEFAULT"),
        with("escaped slashes that stay", "KEEP_UNCHANGED"),
        with("escaped slashes that are refused", "REJECT_REQUEST"),
        with("escaped slashes that are redirected", "UNESCAPE_AND_REDIRECT"),
        with("escaped slashes that become slashes", "UNESCAPE_AND_FORWARD"),
        normal("escaped slashes that are redirected, normal paths", "UNESCAPE_AND_REDIRECT"),
        normal("escaped slashes that become slashes, normal paths", "UNESCAPE_AND_FORWARD"),
    ]
}

fn ports() -> Vec<Case> {
    let requests = ["GET /", "GET /\nx-forwarded-port: 7", "GET /\nconnection: close, x-forwarded-port"];
    let with =
        |name, lines: &[&str]| of_manager(name, &[&["append_x_forwarded_port: true"], lines].concat(), &requests);
    vec![
        with("append_x_forwarded_port", &["use_remote_address: true", "skip_xff_append: true"]),
        with("append_x_forwarded_port, a proxy before", &["use_remote_address: true", "xff_num_trusted_hops: 1"]),
        with("append_x_forwarded_port without use_remote_address", &[]),
    ]
}

fn underscores() -> Vec<Case> {
    let requests = ["GET /\nx_a: 1", "GET /\nx-a: 1", "GET /\n_: 1\nX_B: 2\nx-c: x_c", "POST /\nx_a: 1\n\nbody"];
    let with = |name, action: &str| {
        let line = format!("common_http_protocol_options: {{headers_with_underscores_action: {action}}}");
        of_manager(name, &[&line], &requests)
    };
    vec![
        with("headers with underscores", "ALLOW"),
        with("headers with underscores are refused", "REJECT_REQUEST"),
        with("headers with underscores go", "DROP_HEADER"),
    ]
}

fn durations() -> Vec<Case> {
    let line = "common_http_protocol_options: {max_stream_duration: 0.6s}";
    let requests =
        ["GET /\nx-do: 200", "GET /\nx-do: hang", "POST /\nx-do: hang\n\nbody", "GET /\nx-do: hang\ngrpc-timeout: 9S"];
    let route = |name, limits: &str| {
        let route = format!("- {{match: {{prefix: /}}, route: {{cluster: a, max_stream_duration: {{{limits}}}}}}}");
        case(name, &route, &requests).of_manager(line)
    };
    vec![
        of_manager("the connection manager's max_stream_duration", &[line], &requests),
        route("a route's max_stream_duration", "max_stream_duration: 0.3s"),
        route("a route without max_stream_duration", "grpc_timeout_header_max: 0.3s"),
        case("a route with max_stream_duration 0", "- {match: {prefix: /}, route: {cluster: a, max_stream_duration: {max_stream_duration: 0s}, idle_timeout: 1.2s}}", &requests).of_manager(line),
    ]
}

/// `x-envoy-upstream-stream-duration-ms`
fn attempts() -> Vec<Case> {
    let requests = [
        "GET /\nx-do: hang\nx-envoy-upstream-stream-duration-ms: 300",
        "GET /\nx-do: 200\nx-envoy-upstream-stream-duration-ms: 3000",
        "GET /\nx-do: 200+delay=400\nx-envoy-upstream-stream-duration-ms: 0",
        "GET /\nx-do: 200+delay=400\nx-envoy-upstream-stream-duration-ms: soon",
        "POST /\nx-do: hang\nx-envoy-upstream-stream-duration-ms: 300\n\nbody",
        "GET /\nx-do: hang\nx-envoy-upstream-stream-duration-ms: 300\ncontent-type: application/grpc",
        "GET /\nx-do: hang, 200\nx-envoy-upstream-stream-duration-ms: 300",
        "GET /\nx-do: hang\nx-envoy-upstream-stream-duration-ms: 5000",
    ];
    let of = |name, fields: &str, requests: &[&str]| {
        let internal = "internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}";
        let route = format!("- {{match: {{prefix: /}}, route: {{cluster: a, {fields}}}}}");
        case(name, &route, requests).of_manager(internal)
    };
    let trusted = requests.map(|request| request.replacen("x-do", "x-forwarded-for: 10.0.0.1\nx-do", 1));
    let trusted: Vec<_> = trusted.iter().map(String::as_str).collect();
    let with = |name, fields: &str| of(name, fields, &trusted);
    let brief = [
        "GET /\nx-do: hang",
        "GET /\nx-do: 200",
        "POST /\nx-do: hang\n\nbody",
        "GET /\nx-do: hang\ncontent-type: application/grpc",
        "GET /\nx-do: hang\nx-forwarded-for: 10.0.0.1\nx-envoy-upstream-stream-duration-ms: 300",
        "GET /\nx-do: 200+delay=1500\nx-forwarded-for: 10.0.0.1\nx-envoy-upstream-stream-duration-ms: 0",
        "GET /\nx-do: hang\nx-forwarded-for: 10.0.0.1\nx-envoy-upstream-stream-duration-ms: soon",
    ];
    vec![
        case("a cluster's max_stream_duration", "- {match: {prefix: /}, route: {cluster: brief, timeout: 3s}}", &brief)
            .of_manager("internal_address_config: {cidr_ranges: [{address_prefix: 10.0.0.0, prefix_len: 8}]}"),
        of("x-envoy-upstream-stream-duration-ms of strangers", "timeout: 0.6s", &requests),
        with("x-envoy-upstream-stream-duration-ms", "timeout: 1.5s"),
        with(
            "x-envoy-upstream-stream-duration-ms, tried again",
            "timeout: 1.5s, retry_policy: {retry_on: reset, num_retries: 1}",
        ),
        with(
            "x-envoy-upstream-stream-duration-ms after 5xx",
            "timeout: 1.5s, retry_policy: {retry_on: 5xx, num_retries: 1}",
        ),
        with(
            "x-envoy-upstream-stream-duration-ms, not tried again",
            "timeout: 1.5s, retry_policy: {retry_on: connect-failure, num_retries: 1}",
        ),
    ]
}

/// What becomes of `x-forwarded-client-cert` where that hangs on the request. What is passed on of a plain connection shows it.
fn certificates() -> Vec<Case> {
    let action = |details: &str| {
        format!(
            "{{action: {{name: a, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager.ForwardClientCertConfig, \
             forward_client_cert_details: {details}}}}}}}"
        )
    };
    let input = |message: &str, fields: &str| {
        format!("input: {{name: i, typed_config: {{\"@type\": type.googleapis.com/{message}, {fields}}}}}")
    };
    let header =
        |name: &str| input("envoy.type.matcher.v3.HttpRequestHeaderMatchInput", &format!("header_name: \"{name}\""));
    let matcher = |input: &str, value: &str, otherwise: &str| {
        format!(
            "forward_client_cert_matcher: {{matcher_list: {{matchers: [{{predicate: {{single_predicate: {{{input}, value_match: \
             {value}}}}}, on_match: {}}}]}}{otherwise}}}",
            action("ALWAYS_FORWARD_ONLY")
        )
    };
    let requests = [
        "GET /",
        "GET /?p=keep\nx-forwarded-client-cert: Hash=1",
        "GET /?p=ke%65p&p=no\nx-forwarded-client-cert: Hash=1\nx-forwarded-client-cert: Hash=2",
        "GET /\nx-forwarded-client-cert: keep",
        "GET /?p=keep\nx-forwarded-client-cert: Hash=1\nx-forwarded-client-cert:\nx-forwarded-client-cert: Hash=2",
        "GET /\nx-forwarded-client-cert: Hash=1\nx-a: keep",
        "GET /\nx-forwarded-client-cert: Hash=1\nx-a: other\nx-forwarded-for: 10.1.1.1",
        "GET /x/../keep\nx-forwarded-client-cert: Hash=1",
        "GET /\nx-forwarded-client-cert: Hash=1\nx-request-id: 12345678-1234-1234-8234-123456789012",
        "GET /\nx-forwarded-client-cert: Hash=1\nx-envoy-retry-on: 5xx\nconnection: close, x-a\nx-a: keep",
    ];
    let with = |name, line: &str, more: &[&str]| of_manager(name, &[&[line], more].concat(), &requests);
    let keep = "{exact: keep}";
    let anything = "{safe_regex: {google_re2: {}, regex: \".*\"}}";
    let always = "forward_client_cert_details: ALWAYS_FORWARD_ONLY";
    let mut cases = vec![
        with("certificates by a header", &matcher(&header("x-a"), keep, ""), &[]),
        with("certificates by themselves", &matcher(&header("x-forwarded-client-cert"), keep, ""), &[]),
        with("certificates, nothing found", &matcher(&header("x-a"), keep, ""), &[always]),
        with(
            "certificates, otherwise",
            &matcher(&header("x-a"), keep, &format!(", on_no_match: {}", action("SANITIZE"))),
            &[always],
        ),
        with(
            "certificates by a query parameter",
            &matcher(&input("envoy.type.matcher.v3.HttpRequestQueryParamMatchInput", "query_param: p"), keep, ""),
            &[],
        ),
        with(
            "certificates by the client",
            &matcher(
                &input("envoy.extensions.matching.common_inputs.network.v3.SourceIPInput", ""),
                "{exact: 127.0.0.1}",
                "",
            ),
            &[],
        ),
    ];
    // What a matcher sees of what the connection manager does itself.
    for (name, seen) in [
        ("certificates by path", ":path"),
        ("certificates by id", "x-request-id"),
        ("certificates by proto", "x-forwarded-proto"),
        ("certificates by forwarded", "x-forwarded-for"),
        ("certificates by via", "via"),
        ("certificates by internal", "x-envoy-internal"),
        ("certificates by external", "x-envoy-external-address"),
        ("certificates by wish", "x-envoy-retry-on"),
    ] {
        let value = if seen == ":path" { "{exact: /keep}" } else { anything };
        let lines = ["normalize_path: true", "via: proxy", "use_remote_address: true"];
        cases.push(with(name, &matcher(&header(seen), value, ""), &lines));
    }
    cases
}
