//! When access logs have a line.

use super::grpc::{ANSWER, called};
use super::harness::{Case, case};

/// With a deprecated field of the connection manager's own.
fn old(name: &'static str, field: &str, requests: &[&str]) -> Case {
    case(name, "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", requests)
        .of_manager(field)
}

fn of(name: &'static str, fields: &str, requests: &[&str]) -> Case {
    case(name, "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", requests)
        .of_manager("upgrade_configs: [{upgrade_type: websocket}]")
        .of_manager(&format!("access_log_options: {{{fields}}}"))
}

/// Operators of formats whose values are the same in both proxies, each with a name.
const OPERATORS: &[&str] = &[
    "%HOSTNAME%",
    "%ENVIRONMENT(HOME)% %ENVIRONMENT(HOME):2% %ENVIRONMENT(NONE_SUCH)%",
    "%PATH% %PATH(NQ)% %PATH(WQ):4%",
    "%PATH(WQ:ORIG)% %PATH(NQ:ORIG)% %PATH(WQ:PATH)% %PATH(NQ:ORIG_OR_PATH)%",
    "%QUERY_PARAM(a)% %QUERY_PARAM(b)% %QUERY_PARAM(c)% %QUERY_PARAM(none)% %QUERY_PARAM(b):3%",
    "%QUERY_PARAMS(ORIG)% %QUERY_PARAMS(ORIG):4%",
    "%REQUEST_HEADER(x-a)% %REQUEST_HEADER(x-none?:path):3% %RESPONSE_HEADER(content-type)%",
    "%RESPONSE_FLAGS_LONG%",
    "%UPSTREAM_HOST_NAME% %UPSTREAM_HOST_NAME_WITHOUT_PORT%",
    "%UPSTREAM_CLUSTER_RAW% %UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%",
    "%CONNECTION_TERMINATION_DETAILS% %BYTES_RETRANSMITTED% %TRACE_ID% %SPAN_ID% %TLS_JA3_FINGERPRINT% %TLS_JA4_FINGERPRINT% %CUSTOM_FLAGS%",
    "%METADATA(ROUTE:ns:k)% %METADATA(DYNAMIC:ns:k)%",
    "%COALESCE({\"operators\": [\"ROUTE_NAME\", {\"command\": \"REQ\", \"param\": \"x-a\", \"max_length\": 2}]})%",
    "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS% %DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_LOCAL_PORT%",
    "%GRPC_STATUS% %GRPC_STATUS(CAMEL_STRING)% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER%",
    "%TRAILER(x-t)% %TRAILER(x-none?x-t):1% %RESPONSE_TRAILER(grpc-status)% %TRAILER(x-none)%",
    "%UPSTREAM_REQUEST_ATTEMPT_COUNT% %UPSTREAM_PROTOCOL% %VIRTUAL_CLUSTER_NAME%",
    "%UPSTREAM_HOSTS_ATTEMPTED% %UPSTREAM_HOSTS_ATTEMPTED_WITHOUT_PORT%",
    "%UPSTREAM_HOST_NAMES_ATTEMPTED% %UPSTREAM_HOST_NAMES_ATTEMPTED_WITHOUT_PORT%",
    "%REQUEST_HEADERS_BYTES% %RESPONSE_TRAILERS_BYTES% %FILTER_CHAIN_NAME%",
];

/// Those whose values are a proxy's own: whether there is one is compared.
const OWN_VALUES: &[&str] = &[
    "~%REQUEST_DURATION%~ ~%REQUEST_TX_DURATION%~ ~%RESPONSE_DURATION%~ ~%RESPONSE_TX_DURATION%~",
    "~%COMMON_DURATION(DS_RX_BEG:DS_RX_END:ms)%~ ~%COMMON_DURATION(DS_RX_BEG:DS_TX_BEG:us)%~",
    "~%COMMON_DURATION(DS_RX_BEG:DS_TX_END:ns)%~ ~%COMMON_DURATION(DS_RX_BEG:US_TX_BEG:us)%~",
    "~%COMMON_DURATION(US_TX_BEG:US_TX_END:us)%~ ~%COMMON_DURATION(US_TX_BEG:US_RX_BEG:us)%~",
    "~%COMMON_DURATION(US_RX_BEG:US_RX_END:us)%~ ~%COMMON_DURATION(US_CX_BEG:US_CX_END:us)%~",
    "~%COMMON_DURATION(US_CX_END:US_HS_END:us)%~ ~%COMMON_DURATION(DS_TX_END:DS_RX_BEG:ns)%~",
    "~%UPSTREAM_CONNECTION_ID%~ ~%UPSTREAM_CONNECTION_IDS_ATTEMPTED%~ ~%STREAM_ID%~",
    "~%LISTENER_NAME%~ ~%RESPONSE_HEADERS_BYTES%~",
];

/// Hosts that are asked by their own names.
fn rewritten() -> Vec<Case> {
    let requests = [
        "GET /",
        "GET /\nhost: a.service",
        "GET /\nx-forwarded-host: before.test",
        "GET /\nx-envoy-original-host: forged.test",
        "GET /\nx-do: 503",
    ];
    let of = |name, action: &str| {
        case(name, "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", &requests)
            .of_routes("", action)
            .of_log("%REQ(:AUTHORITY)% %REQ(HOST)% %REQ(X-ENVOY-ORIGINAL-HOST)% %REQ(X-FORWARDED-HOST)%")
    };
    vec![
        of("auto_host_rewrite", "auto_host_rewrite: true"),
        of("auto_host_rewrite, and the host before", "auto_host_rewrite: true, append_x_forwarded_host: true"),
        of("host_rewrite_literal", "host_rewrite_literal: other.test, append_x_forwarded_host: true"),
    ]
}

/// Those of the tables, with a name each.
fn named(operators: &[&str]) -> String {
    let named = operators.iter().enumerate().map(|(index, operator)| format!("op{index}={operator}"));
    named.collect::<Vec<_>>().join(" ").replace('"', "\\\"")
}

/// All of them, of requests to which there is something to say.
fn operators() -> Case {
    let grpc = "content-type: application/grpc";
    case("operators", "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", &[])
        .of_routes(
            "virtual_clusters: [{name: posts, headers: [{name: \":method\", string_match: {exact: POST}}]}]",
            "retry_policy: {retry_on: 5xx, num_retries: 2}",
        )
        .with_requests(&[
            "GET /p/q?a=1&b=%20xyz&a=2&c\nx-a: hello?there",
            "GET /p?\nx-envoy-original-path: /o/p?c=%41&%61=5",
            "GET /direct",
            "GET /direct?a=1",
            "POST /\n\nbody",
            "GET /\nx-do: 503",
            "GET /\nx-do: reset",
            "GET /\nhost: a,b",
            "GET /many",
            "GET /weighted?a=%zz",
            &format!("POST /\n{grpc}\nx-do: 200+grpc-status=5\n\nbody"),
            &format!("POST /\n{grpc}+proto\nx-do: 200+grpc-status=77\n\nbody"),
            &format!("POST /\n{grpc}\nx-do: 200+grpc-status=x\n\nbody"),
            &format!("POST /\n{grpc}\nx-do: 404\n\nbody"),
            &format!("POST /\n{grpc}x\nx-do: 404\n\nbody"),
            &format!("POST /direct\n{grpc}\n\nbody"),
            &called("application/grpc", "", ANSWER),
            &called("application/grpc", "", "status 5"),
            &called("application/grpc", "", "http 404"),
        ])
        .of_log(&named(&[OPERATORS, OWN_VALUES].concat()))
}

/// Every operator of the tables alone, which keeps its type, and templates of every kind.
fn json(name: &'static str, omit: bool) -> Case {
    let alone = OPERATORS.iter().flat_map(|operators| operators.split("% %"));
    let alone = alone.map(|operator| format!("%{}%", operator.trim_matches('%')));
    let quoted = |text: &str| text.replace('"', "\\\"");
    let alone: Vec<_> =
        alone.enumerate().map(|(index, operator)| format!("op{index}: \"{}\"", quoted(&operator))).collect();
    let own = "own: [\"~%REQUEST_DURATION%~\", \"~%UPSTREAM_CONNECTION_ID%~\", \"~%CONNECTION_ID%~\"]";
    let numbers = "numbers: [1, 0, -3, 100000, 1000000, 1200000, 12000000, -100000, true, false, null, \"\"]";
    let texts = "texts: [\"x %RESPONSE_CODE% y %REQ(x-none)%\", \"%RESPONSE_CODE%%BYTES_SENT%\", \"100%%\", \"lit \\\" \\\\ / <>& é \\t\"]";
    let kinds = "kinds: [\"%RESPONSE_CODE%\", \"%BYTES_SENT%\", \"%BYTES_RECEIVED%\", \"%RESPONSE_FLAGS%\", \"%RESPONSE_CODE_DETAILS%\", \"%RESP(:status)%\", \"%ROUTE_NAME%\", \"%UPSTREAM_HOST%\", \"%DOWNSTREAM_LOCAL_PORT%\", \"%LOCAL_REPLY_BODY%\", \"%CUSTOM_FLAGS%\"]";
    let metadata = "metadata: {all: \"%DYNAMIC_METADATA(ns)%\", k: \"%DYNAMIC_METADATA(ns:k):2%\", n: \"%DYNAMIC_METADATA(ns:n)%\", text: \"x%DYNAMIC_METADATA(ns:n)%\", s: \"%DYNAMIC_METADATA(ns:s)%\", l: \"%METADATA(DYNAMIC:ns:l)%\", in_text: \"of %DYNAMIC_METADATA(ns)%\", none: \"%DYNAMIC_METADATA(none)%\", null: \"%DYNAMIC_METADATA(ns:z)%\"}";
    let headers = "headers: {\"a \\\"key\\\"\": \"%REQ(x-a)%\", text: \"of %REQ(x-a)% and\", list: [\"%REQ(x-none)%\", {k: \"%REQ(x-none)%\"}, []], empty: {}}";
    let template =
        [alone.join(", "), own.into(), numbers.into(), texts.into(), kinds.into(), metadata.into(), headers.into()];
    let values = "k: set, n: 100000, m: 3, b: true, s: {t: \"a \\\" \\n\", f: [1, x]}, l: [1, [2]], z: null";
    let metadata = format!("metadata: [{{metadata_namespace: ns, value: {{{values}}}}}]");
    case(name, "set_metadata.v3.Config", &metadata, &[])
        .of_routes("", "retry_policy: {retry_on: 5xx, num_retries: 2}")
        .with_requests(&[
            "GET /p/q?a=1&b=%20xyz&a=2&c%22=\nx-a: a \"quoted\" \\ text\tand é",
            "GET /direct\nx-a: plain",
            "POST /\n\nbody",
            "GET /\nx-do: 503",
            "GET /\nhost: a,b",
            &called("application/grpc", "", "status 5"),
        ])
        .of_log_format(&format!("log_format: {{json_format: {{{}}}, omit_empty_values: {omit}}}", template.join(", ")))
}

/// What lines show of requests and responses: what was sent, by whomever.
const SENT: &[&str] = &[
    "%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)% %REQ(:SCHEME)%",
    "%REQ(x-envoy-original-path)% %REQ(x-envoy-original-host)% %REQ(x-envoy-original-url)%",
    "%REQ(x-added)% %REQ(x-rm)% %REQ(x-vc)% %REQ(x-envoy-attempt-count)% %REQ(x-forwarded-proto)%",
    "%REQ(x-envoy-upstream-rq-timeout-ms)% %REQ(content-length)% %REQ(transfer-encoding)% %REQ(connection)%",
    "%RESP(content-length)% %RESP(transfer-encoding)% %RESP(connection)% %RESP(server)% %RESP(location)%",
    "%ROUTE_NAME% %UPSTREAM_CLUSTER% %UPSTREAM_HOST% %UPSTREAM_REQUEST_ATTEMPT_COUNT%",
];

fn sent() -> Case {
    let rewrites = "prefix_rewrite: /new, host_rewrite_literal: new.host";
    let changes = "request_headers_to_add: [{header: {key: x-added, value: \"%REQ(x-rm)%\"}}, {header: {key: x-vc, value: \"%VIRTUAL_CLUSTER_NAME%\"}}], request_headers_to_remove: [x-rm]";
    let route = |prefix: &str, cluster: &str, action: &str| {
        format!(
            "{{match: {{prefix: {prefix}}}, name: \"of {prefix}\", route: {{cluster: {cluster}, {rewrites}{action}}}, {changes}}}"
        )
    };
    let own = "exp=~%REQ(x-envoy-expected-rq-timeout-ms)%~";
    case("what was sent", "set_metadata.v3.Config", "metadata: [{metadata_namespace: ns, value: {k: set}}]", &[])
        .of_routes(
            "include_request_attempt_count: true, virtual_clusters: [{name: gets, headers: [{name: \":method\", string_match: {exact: GET}}]}]",
            "retry_policy: {retry_on: 5xx, num_retries: 2}",
        )
        .first(&route("/changed", "a", ""))
        .first(&route("/dead", "dead", ", retry_policy: {retry_on: connect-failure, num_retries: 1}"))
        .first(&route("/redirected", "a", ", internal_redirect_policy: {max_internal_redirects: 2}"))
        .first("{match: {prefix: /nowhere}, route: {cluster_header: x-none}}")
        .with_requests(&[
            "GET /changed/x?q=1\nx-rm: 1",
            "GET /changed/x\nx-rm: 1\nconnection: keep-alive, close",
            "POST /changed\nx-envoy-upstream-rq-timeout-ms: 5000\n\nbody",
            "GET /dead\nx-rm: 1",
            "GET /nowhere",
            "GET /direct",
            "HEAD /direct",
            "GET /created",
            "GET /\nx-do: 503",
            "GET /plain?a",
            "GET /many",
            "GET /redirected?x=1\nx-do: 302+location=http://other.test/plain?z=1,200",
            "GET /redirected\nx-do: 302+location=/plain",
        ])
        .of_log(&format!("{} {own} ~%RESP(x-envoy-upstream-service-time)%~ date=%RESP(date):0%.", named(SENT)))
}

/// Which requests have lines.
fn filtered() -> Vec<Case> {
    let grpc = "content-type: application/grpc";
    let status = |status: &str| format!("POST /\n{grpc}\nx-do: 200+grpc-status={status}\n\nbody");
    let requests = [
        "GET /".to_owned(),
        "GET /\nx-a: one".to_owned(),
        "GET /\nx-a: two".to_owned(),
        "GET /\nx-do: 404".to_owned(),
        "GET /direct".to_owned(),
        "GET /\nx-do: reset".to_owned(),
        status("0"),
        status("5"),
        status("77"),
        status("x"),
        format!("POST /\n{grpc}\nx-do: 404\n\nbody"),
        called("application/grpc", "", ANSWER),
        called("application/grpc", "", "status 5"),
    ];
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let of = |name, filter: &str| {
        let rule = "header: x-a, on_header_present: {metadata_namespace: ns, key: a}";
        case(name, "header_to_metadata.v3.Config", &format!("request_rules: [{{{rule}}}]"), &requests)
            .of_log_filter(filter)
            .of_manager("access_log_options: {flush_access_log_on_new_request: true}")
    };
    let told = |more: &str| {
        format!(
            "{{metadata_filter: {{matcher: {{filter: ns, path: [{{key: a}}], value: {{string_match: {{exact: one}}}}{more}"
        )
    };
    vec![
        of("grpc_status_filter", "{grpc_status_filter: {statuses: [NOT_FOUND, UNKNOWN]}}"),
        of("grpc_status_filter, the others", "{grpc_status_filter: {statuses: [OK, NOT_FOUND], exclude: true}}"),
        of("metadata_filter", &format!("{}}}}}", told("}"))),
        of("metadata_filter, inverted", &format!("{}}}}}", told(", invert: true}"))),
        of("metadata_filter, and nothing else", &format!("{}, match_if_key_not_found: false}}}}", told("}"))),
        of("metadata_filter of nothing", "{metadata_filter: {}}"),
        of("log_type_filter", "{log_type_filter: {types: [DownstreamStart]}}"),
        of(
            "log_type_filter, the others",
            "{log_type_filter: {types: [DownstreamStart, TcpConnectionEnd], exclude: true}}",
        ),
        of(
            "filters in others",
            "{and_filter: {filters: [{grpc_status_filter: {statuses: [NOT_FOUND]}}, {not_health_check_filter: {}}]}}",
        ),
    ]
}

pub fn cases() -> Vec<Case> {
    let requests = ["GET /", "POST /\nx-do: 503\n\nbody", "GET /direct", "GET /\nx-do: reset", "GET /\nhost: a,b"];
    let told = "{z: \"%RESPONSE_CODE%\", a: \"%REQ(x-none)%\", b: \"x%REQ(x-none)%\", n: {l: [1, \"%PROTOCOL%\"]}}";
    let mut cases = [rewritten(), filtered()].concat();
    cases.extend([
        operators(),
        sent(),
        json("json_format", false),
        json("json_format with omit_empty_values", true),
        of("json_format of old", "", &requests).of_log_format(&format!("json_format: {told}")),
        of("typed_json_format of old", "", &requests).of_log_format(&format!("typed_json_format: {told}")),
        of("text and omit_empty_values", "", &requests).of_log_format(
            "log_format: {text_format_source: {inline_string: \"%REQ(x-none)%|%RESPONSE_FLAGS%|%RESPONSE_CODE%|%ROUTE_NAME%\\n\"}, omit_empty_values: true}",
        ),
        of("formatters", "", &["GET /p?q=1", "GET /direct", "GET /?\nx-a: a?b"]).of_log_format(
            "log_format: {text_format_source: {inline_string: \"%REQ_WITHOUT_QUERY(:path)% %REQ_WITHOUT_QUERY(x-none?:path):3% %REQ_WITHOUT_QUERY(x-a)% %REQ_WITHOUT_QUERY(x-none)% %METADATA(DYNAMIC:ns:k)%\\n\"}, formatters: [\
             {name: q, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery}}, \
             {name: m, typed_config: {\"@type\": type.googleapis.com/envoy.extensions.formatter.metadata.v3.Metadata}}]}",
        ),
        of("json_format_options", "", &["GET /"]).of_log_format(
            "log_format: {json_format: {z: 1, a: \"%RESPONSE_CODE%\"}, json_format_options: {sort_properties: false}}",
        ),
        of("a line at the end", "", &requests),
        of("flush_access_log_on_new_request", "flush_access_log_on_new_request: true", &requests),
        of("access_log_flush_interval", "access_log_flush_interval: 0.5s", &["GET /\nx-do: 200+delay=750", "GET /"]),
        old("flush_access_log_on_new_request of old", "flush_access_log_on_new_request: true", &requests),
        old("access_log_flush_interval of old", "access_log_flush_interval: 0.5s", &["GET /\nx-do: 200+delay=750"]),
        of("no tunnel", "flush_log_on_tunnel_successfully_established: true", &requests),
    ]);
    cases
}

/// Of culvertd alone: the lines at the ends of tunnels are another matter.
pub fn tunnels() -> Vec<Case> {
    let request = ["GET /\nconnection: upgrade\nupgrade: websocket\nx-do: 101"];
    vec![of("a tunnel", "flush_log_on_tunnel_successfully_established: true", &request), of("no line", "", &request)]
}
