//! Filters that change messages: header_mutation, buffer.

use super::harness::{By, Case, case};

const MUTATION: &str = "header_mutation.v3.HeaderMutation";
const MUTATION_PER_ROUTE: &str = "header_mutation.v3.HeaderMutationPerRoute";
const BUFFER: &str = "buffer.v3.Buffer";
const BUFFER_PER_ROUTE: &str = "buffer.v3.BufferPerRoute";

/// Operators of formats whose values are the same in both proxies.
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
    "%UPSTREAM_CLUSTER_RAW%",
    "%TRACE_ID% %SPAN_ID% %TLS_JA3_FINGERPRINT% %TLS_JA4_FINGERPRINT%",
    "%METADATA(ROUTE:ns:k)% %METADATA(DYNAMIC:ns:k)%",
    "%COALESCE({\\\"operators\\\": [\\\"ROUTE_NAME\\\", {\\\"command\\\": \\\"REQ\\\", \\\"param\\\": \\\"x-a\\\", \\\"max_length\\\": 2}]})%",
    "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS% %DOWNSTREAM_DIRECT_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_DIRECT_LOCAL_PORT%",
];

pub fn cases() -> Vec<Case> {
    [mutations(), buffer(), grpc_http1_bridge()].concat()
}

fn append(name: &str, value: &str, action: &str) -> String {
    format!("{{append: {{header: {{key: {name}, value: \"{value}\"}}, append_action: {action}}}}}")
}

fn mutations() -> Vec<Case> {
    let of_request = |mutations: &str| format!("mutations: {{request_mutations: [{mutations}]}}");
    let of_response = |mutations: &str| format!("mutations: {{response_mutations: [{mutations}]}}");
    let actions = ["APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"];
    let all = actions.map(|action| append("x-a", action, action)).join(", ");
    let mark = |by: &str| append("x-by", by, "APPEND_IF_EXISTS_OR_ADD");
    let (one, two) = ("GET /\nx-a: one", "GET /\nx-a: one\nx-a: two\nx-b: three");
    let mut cases = vec![
        case("request, remove", MUTATION, &of_request("{remove: x-a}"), &["GET /", one, two]),
        case("response, remove", MUTATION, &of_response("{remove: x-a}"), &["GET /\nx-do: 200+x-a=1+x-b=2", "GET /"]),
        case("request, all actions", MUTATION, &of_request(&all), &["GET /", one, two]),
        case(
            "response, all actions",
            MUTATION,
            &of_response(&all),
            &["GET /", "GET /\nx-do: 200+x-a=1", "GET /direct"],
        ),
        case(
            "remove_on_match",
            MUTATION,
            "mutations: {request_mutations: [{remove_on_match: {key_matcher: {prefix: X-, ignore_case: true}}}], \
             response_mutations: [{remove_on_match: {key_matcher: {safe_regex: {regex: \"x-[ab]\"}}}}]}",
            &[one, "GET /\nx-do: 200+x-a=1+x-b=2+x-c=3"],
        ),
        case("order", MUTATION, &of_request(&format!("{}, {{remove: x-a}}, {}", mark("one"), mark("two"))), &[one]),
        case(
            "formats",
            MUTATION,
            &format!(
                "mutations: {{request_mutations: [{}, {}], response_mutations: [{}, {}]}}",
                append("x-b", "%REQ(x-a)% %REQ(:method)%", "OVERWRITE_IF_EXISTS_OR_ADD"),
                append("x-c", "%REQ(x-b)%", "OVERWRITE_IF_EXISTS_OR_ADD"),
                append("x-d", "%REQ(x-a)% %RESP(x-r)%", "OVERWRITE_IF_EXISTS_OR_ADD"),
                append("x-e", "%REQ(x-none)%", "OVERWRITE_IF_EXISTS_OR_ADD"),
            ),
            &[one, "GET /\nx-do: 200+x-r=5", "GET /direct\nx-a: one"],
        ),
        case(
            "operators",
            MUTATION,
            &of_response(
                &OPERATORS
                    .iter()
                    .enumerate()
                    .map(|(index, operator)| append(&format!("x-{index}"), operator, "APPEND_IF_EXISTS_OR_ADD"))
                    .collect::<Vec<_>>()
                    .join(", "),
            ),
            &[
                "GET /p/q?a=1&b=%20xyz&a=2&c\nx-a: hello",
                "GET /p?\nx-envoy-original-path: /o/p?c=%41&%61=5",
                "GET /direct",
            ],
        ),
        case("nothing", MUTATION, "", &["GET /"]),
        case("all levels and a weighted cluster", MUTATION, &of_request(&mark("filter")), &["GET /weighted", "GET /"])
            .told(By::Host, MUTATION_PER_ROUTE, &of_request(&mark("host")))
            .told(By::Route, MUTATION_PER_ROUTE, &of_request(&mark("route")))
            .told(By::Cluster, MUTATION_PER_ROUTE, &of_request(&mark("cluster"))),
    ];
    cases.extend(queries());
    let levels = |name, wins| {
        let both = |by: &str| {
            let mark = mark(by);
            format!("mutations: {{request_mutations: [{mark}], response_mutations: [{mark}]}}")
        };
        case(name, MUTATION, &(both("own") + wins), &["GET /", "GET /plain", "GET /direct", "GET /created"])
            .told(By::Config, MUTATION_PER_ROUTE, &both("config"))
            .told(By::Host, MUTATION_PER_ROUTE, &both("host"))
            .told(By::Route, MUTATION_PER_ROUTE, &both("route"))
    };
    cases.push(levels("levels of mutations", ""));
    cases.push(levels("levels of mutations, most specific last", ", most_specific_header_mutations_wins: true"));
    cases
}

/// `query_parameter_mutations`, and those of trailers.
fn queries() -> Vec<Case> {
    let requests =
        ["GET /p", "GET /p?", "GET /p?b=1&a=2&a=3", "GET /p?c&=x&a=%41+&d=\u{7e}/:@!*'()", "GET /direct?a=1"];
    let of_query = |name, mutations: &str| {
        case(name, MUTATION, &format!("mutations: {{query_parameter_mutations: [{mutations}]}}"), &requests)
    };
    let append =
        |value: &str, action: &str| format!("{{append: {{record: {{key: a, value: \"{value}\"}}, action: {action}}}}}");
    let actions = ["APPEND_IF_EXISTS_OR_ADD", "ADD_IF_ABSENT", "OVERWRITE_IF_EXISTS_OR_ADD", "OVERWRITE_IF_EXISTS"];
    let mut cases: Vec<_> = actions.map(|action| of_query(action, &append("new &", action))).into();
    cases.extend([
        of_query("query, remove", "{remove: a}"),
        of_query("query, format", &append("%REQ(:method)% %REQ(x-none)%", actions[0])),
        of_query("query, nothing of it changes", "{remove: none}"),
        case(
            "query after headers",
            MUTATION,
            "mutations: {request_mutations: [{append: {header: {key: x-a, value: made}}}], \
             query_parameter_mutations: [{append: {record: {key: q, value: \"%REQ(x-a)%\"}}}, {remove: b}]}",
            &requests,
        ),
        case(
            "trailers",
            MUTATION,
            "mutations: {response_trailers_mutations: [{append: {header: {key: x-new, value: one}}}, {remove: grpc-message}], \
             request_trailers_mutations: [{append: {header: {key: x-t, value: two}}}]}",
            &[&super::grpc::called("application/grpc", "", super::grpc::ANSWER), "GET /"],
        )
        .of_log("%TRAILER(x-new)% %TRAILER(grpc-message)% %TRAILER(grpc-status)%"),
    ]);
    cases
}

/// The service speaks HTTP/1: what its trailers would say stands in the head.
fn grpc_http1_bridge() -> Vec<Case> {
    let grpc = "content-type: application/grpc";
    let requests = [
        format!("POST /\n{grpc}\n\nbody"),
        format!("POST /\n{grpc}+proto\nx-do: 200+grpc-status=5+grpc-message=gone\n\nbody"),
        format!("POST /\n{grpc}\nx-do: 200+bytes=0+grpc-status=5\n\nbody"),
        format!("POST /\n{grpc}\nx-do: 503\n\nbody"),
        format!("POST /\n{grpc}\nx-do: reset\n\nbody"),
        format!("POST /direct\n{grpc}\n\nbody"),
        "POST /\ncontent-type: application/grpcx\n\nbody".to_owned(),
        "GET /".to_owned(),
    ];
    let requests: Vec<&str> = requests.iter().map(String::as_str).collect();
    let ask = super::grpc::message(super::grpc::ANSWER);
    let protobuf = "content-type: application/x-protobuf";
    let call = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
    let upgraded = [
        format!("POST {call}\n{protobuf}\n\n{ask}"),
        format!("POST {call}?a=b\n{protobuf}\n\n{ask}"),
        format!("POST {call}\n{protobuf}\n\n{}", super::grpc::message("status 5")),
        format!("POST {call}\n{protobuf}\n\n{}", super::grpc::message("http 404")),
        super::grpc::called("application/grpc", "", super::grpc::ANSWER),
        format!("POST /?a=b\n{protobuf}\nx-do: 503+bytes=0\n\nbody"),
        format!("POST /\n{protobuf}\nx-do: 200+bytes=0\n"),
        format!("POST /direct?a\n{protobuf}\n\nbody"),
        format!("POST /?a=b\n{protobuf};a=b\n\nbody"),
        "POST /?a=b\ncontent-type: application/grpc\n\nbody".to_owned(),
        "GET /?a=b".to_owned(),
    ];
    let upgraded: Vec<&str> = upgraded.iter().map(String::as_str).collect();
    let bridge = |name, config: &str, requests: &[&str]| case(name, "grpc_http1_bridge.v3.Config", config, requests);
    vec![
        bridge("bridge", "", &requests),
        bridge("bridge of protobuf", "upgrade_protobuf_to_grpc: true", &upgraded),
        bridge(
            "bridge of protobuf without queries",
            "upgrade_protobuf_to_grpc: true, ignore_query_parameters: true",
            &upgraded,
        ),
        bridge("bridge without queries", "ignore_query_parameters: true", &upgraded),
    ]
}

fn buffer() -> Vec<Case> {
    let chunked = "POST /\ntransfer-encoding: chunked\n\n5\r\nabcde\r\n5\r\nfghij\r\n0\r\n\r\n";
    let trailers = "POST /\ntransfer-encoding: chunked\ntrailer: x-t\n\n5\r\nabcde\r\n0\r\nx-t: 1\r\n\r\n";
    let requests = ["GET /", "POST /\n\nbody", "POST /plain\n\nlonger body", chunked, trailers];
    vec![
        case("buffer", BUFFER, "max_request_bytes: 1000", &requests),
        case("buffer, too small", BUFFER, "max_request_bytes: 6", &requests),
        case(
            "buffer, too small, on a connection that could go on",
            BUFFER,
            "max_request_bytes: 6",
            &["POST /\nconnection: keep-alive\n\nsome body", "POST /\nconnection: keep-alive\n\nbody"],
        ),
        case("buffer, by route", BUFFER, "max_request_bytes: 6", &requests)
            .told(By::Route, BUFFER_PER_ROUTE, "buffer: {max_request_bytes: 5}")
            .told(By::Host, BUFFER_PER_ROUTE, "disabled: true"),
    ]
}
