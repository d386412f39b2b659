//! What access log services are told.

use serde_json::{Map, Value};

use super::grpc::{ANSWER, called};
use super::harness::{Case, case};
use super::services::hide_port;

/// What only Envoy counts: bytes of connections.
const NOT_HERE: [&str; 8] = [
    "downstreamWireBytesSent",
    "downstreamWireBytesReceived",
    "upstreamWireBytesSent",
    "upstreamWireBytesReceived",
    "downstreamHeaderBytesReceived",
    "downstreamHeaderBytesSent",
    "upstreamHeaderBytesReceived",
    "upstreamHeaderBytesSent",
];

/// Hides in an entry, or a part of it, what is different every time.
pub fn hide(fields: &mut Map<String, Value>) {
    if let Some(Value::Object(identifier)) = fields.get_mut("identifier") {
        identifier["node"] = identifier["node"]["id"].clone();
    }
    if fields.contains_key("accessLogType") {
        NOT_HERE.iter().for_each(|name| drop(fields.remove(*name)));
        for (name, value) in fields.iter_mut() {
            match (name.as_str(), value) {
                // A host's port tells which one it is.
                ("downstreamRemoteAddress" | "downstreamDirectRemoteAddress" | "upstreamLocalAddress", value) => {
                    value.as_object_mut().into_iter().for_each(hide_port);
                }
                (name, value) if name.starts_with("timeTo") => *value = "".into(),
                ("startTime" | "duration" | "streamId", value) => *value = "".into(),
                _ => {}
            }
        }
    }
    if fields.contains_key("requestHeadersBytes") || fields.contains_key("responseHeadersBytes") {
        NOT_HERE.iter().for_each(|name| drop(fields.remove(*name)));
        if let Some(id) = fields.get_mut("requestId") {
            *id = "".into();
        }
        // How many digits it has is different every time.
        let time = fields.get("responseHeaders").and_then(|headers| headers.get("x-envoy-upstream-service-time"));
        let digits = time.and_then(Value::as_str).map_or(0, str::len) as u64;
        let bytes =
            fields.get("responseHeadersBytes").and_then(Value::as_str).and_then(|bytes| bytes.parse::<u64>().ok());
        if let Some(bytes) = bytes {
            fields.insert("responseHeadersBytes".to_owned(), (bytes - digits).into());
        }
    }
}

/// With the headers by which entries are found, and others of all kinds.
const HEADERS: &str = "additional_request_headers_to_log: [x-id, X-A, \":path\", \":authority\", host, x-envoy-attempt-count, x-none], \
     additional_response_headers_to_log: [x-envoy-upstream-service-time, content-type, \":status\", x-twice, date], \
     additional_response_trailers_to_log: [grpc-status, x-t]";

const SET: &str = "metadata: [{metadata_namespace: ns, value: {k: set}}]";
const VALUES: [&str; 4] = ["GET /\nx-a: one", "GET /\nx-a: one\nx-a: two", "GET /\nx-a: two", "GET /"];

/// Tags of all kinds.
const TAGS: &str = "{tag: literal, literal: {value: always}}, {tag: none, environment: {name: NO_SUCH_VARIABLE}}, {tag: variable, environment: {name: \
     NO_SUCH_VARIABLE, default_value: d}}, {tag: header, request_header: {name: x-a, default_value: none}}, {tag: path, request_header: {name: \
     ':path'}}, {tag: no-header, request_header: {name: x-none}}, {tag: text, metadata: {kind: {request: {}}, metadata_key: {key: ns, path: [{key: \
     k}]}}}, {tag: number, metadata: {kind: {request: {}}, metadata_key: {key: ns, path: [{key: 'n'}]}}}, {tag: list, metadata: {kind: {request: \
     {}}, metadata_key: {key: ns, path: [{key: l}]}}}, {tag: no-metadata, metadata: {kind: {request: {}}, metadata_key: {key: ns, path: [{key: \
     x}]}, default_value: d}}, {tag: route, metadata: {kind: {route: {}}, metadata_key: {key: r, path: [{key: k}]}}}, {tag: route-number, \
     metadata: {kind: {route: {}}, metadata_key: {key: r, path: [{key: 'n'}]}, default_value: d}}, {tag: format, value: \
     '%REQ(x-b)%/%RESPONSE_CODE%/%REQ(x-none)%'}, {tag: nothing, value: '%REQ(x-none)%'}";

fn of(name: &'static str, requests: &[&str]) -> Case {
    let metadata = "metadata: [{metadata_namespace: ns, value: {k: set, n: 1.5, l: [a, {b: true}]}}]";
    case(name, "set_metadata.v3.Config", metadata, requests).of_log_service(HEADERS).shown(&vec![1; requests.len()])
}

pub fn cases() -> Vec<Case> {
    let grpc = "content-type: application/grpc";
    let requests = [
        "GET /p?q=1\nuser-agent: tester\nreferer: http://before.test/\nx-a: one\nx-a: two",
        "GET /p\nx-envoy-original-path: /forged\nx-forwarded-for: 10.1.2.3\nx-request-id: forged",
        "POST /\n\nbody",
        "PURGE /direct",
        "GET /direct",
        "GET /\nx-do: 503",
        "GET /\nx-do: reset",
        "GET /\nx-do: 200+x-twice=a",
        "GET /dead",
        "GET /nowhere",
        "GET /weighted",
        "GET /rewritten/x",
        "GET /named\nx-cluster: none",
        &format!("POST /\n{grpc}\nx-do: 200+grpc-status=5\n\nbody"),
    ];
    let calls = [
        called("application/grpc", "", ANSWER),
        called("application/grpc", "", "status 5"),
        called("application/grpc", "", "http 404"),
    ];
    let calls: Vec<_> = calls.iter().map(|call| call.replacen('\n', "\nx-service: 1\n", 1)).collect();
    let calls: Vec<_> = calls.iter().map(String::as_str).collect();
    vec![
        of("entries", &requests)
            .of_routes("include_request_attempt_count: true", "retry_policy: {retry_on: 5xx, num_retries: 1}")
            .first("{match: {prefix: /dead}, name: of dead, route: {cluster: dead}}")
            .first("{match: {prefix: /named}, route: {cluster_header: x-cluster}}")
            .first("{match: {prefix: /rewritten}, name: rewritten, route: {cluster: a, prefix_rewrite: /, auto_host_rewrite: true, append_x_forwarded_host: true}}")
            .first("{match: {prefix: /nowhere}, route: {cluster_header: x-none}}"),
        of("entries of gRPC", &calls).shown(&[2, 2, 2]),
        of("tags", &["GET /told\nx-a: one\nx-a: two", "GET /", "GET /direct\nx-a: \u{e9}"])
            .of_tags(TAGS)
            .first("{match: {path: /told}, metadata: {filter_metadata: {r: {k: {a: [1, 2]}, n: 7}}}, route: {cluster: a}}"),
        case("several values of a header", "set_metadata.v3.Config", SET, &VALUES)
            .of_filtered_log("{header_filter: {header: {name: x-a, string_match: {exact: two}}}}")
            .shown(&[0, 1, 1, 0]),
        of("entries of the beginning", &["GET /", "GET /direct"])
            .of_manager("access_log_options: {flush_access_log_on_new_request: true}")
            .shown(&[2, 2]),
    ]
}
