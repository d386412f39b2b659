use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderValue};

use super::*;
use crate::access_log::{ResponseFlags, Times};

fn line(format: &str, record: &Record<'_>) -> String {
    let mut out = Vec::new();
    Format::parse(format).unwrap().write(&mut out, record);
    String::from_utf8(out).unwrap()
}

fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
    fields.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(1_795_237_485_380)
}

#[test]
fn the_default_line_of_a_request_is_envoys() {
    let request = headers(&[("user-agent", "curl/7.88.1"), ("x-request-id", "cffa9756-4e35-45bd-874f-c6d10a741fcf")]);
    let response = headers(&[("x-envoy-upstream-service-time", "1")]);
    let record = Record {
        local_reply_body: b"a body",
        metadata: None,
        health_check: false,
        grpc_messages: None,
        missing: "-",
        start: start(),
        duration: Duration::from_micros(2999),
        protocol: Some("HTTP/1.1"),
        method: Some("GET"),
        path: Some("/"),
        authority: Some("127.0.0.1:19080"),
        request_headers: Some(Headers::All(&request)),
        response_headers: Some(Headers::All(&response)),
        response_code: 200,
        bytes_sent: 392,
        upstream_host: Some("127.0.0.1:19090"),
        ..Record::default()
    };
    // A line of the real Envoy.
    assert_eq!(
        line(ENVOY_DEFAULT, &record),
        "[2026-11-21T05:04:45.380Z] \"GET / HTTP/1.1\" 200 - 0 392 2 1 \"-\" \"curl/7.88.1\" \
         \"cffa9756-4e35-45bd-874f-c6d10a741fcf\" \"127.0.0.1:19080\" \"127.0.0.1:19090\"\n"
    );
}

#[test]
fn the_default_line_of_a_connection_is_envoys() {
    let record = Record {
        missing: "-",
        start: start(),
        duration: Duration::from_millis(2),
        bytes_received: 79,
        bytes_sent: 3656,
        upstream_host: Some("127.0.0.1:19090"),
        ..Record::default()
    };
    // A line of the real Envoy's TCP proxy.
    assert_eq!(
        line(ENVOY_DEFAULT, &record),
        "[2026-11-21T05:04:45.380Z] \"- - -\" 0 - 79 3656 2 - \"-\" \"-\" \"-\" \"-\" \"127.0.0.1:19090\"\n"
    );
}

#[test]
fn every_operator_is_written() {
    let request = headers(&[("user-agent", "curl"), ("x-m", "a"), ("x-m", "b"), ("x-envoy-original-path", "/old")]);
    let response = headers(&[("server", "envoy")]);
    let record = Record {
        log_type: "DownstreamEnd",
        local_reply_body: b"a body",
        metadata: None,
        health_check: false,
        grpc_messages: None,
        missing: "-",
        start: start(),
        duration: Duration::from_millis(1500),
        protocol: Some("HTTP/2"),
        method: Some("POST"),
        path: Some("/new"),
        authority: Some("users"),
        scheme: Some("http"),
        request_headers: Some(Headers::All(&request)),
        response_headers: Some(Headers::All(&response)),
        response_code: 503,
        response_flags: ResponseFlags::URX | ResponseFlags::UF,
        response_code_details: Some("upstream_reset{remote connection failure}"),
        bytes_received: u64::MAX,
        bytes_sent: 10,
        upstream_host: Some("10.0.0.1:80"),
        upstream_cluster: Some("users"),
        route_name: Some("main"),
        downstream_remote_address: Some("[::ffff:10.1.2.3]:1234".parse().unwrap()),
        downstream_direct_remote_address: Some("10.9.9.9:55".parse().unwrap()),
        downstream_local_address: Some("[fd00::1]:80".parse().unwrap()),
        upstream_local_address: Some("10.0.0.9:40000".parse().unwrap()),
        connection_id: 7,
        requested_server_name: Some("users.test"),
        tls: None,
        upstream_tls: None,
        upstream_transport_failure_reason: Some("delayed connect error: Connection refused"),
        downstream_transport_failure_reason: Some("TLS_error:bad certificate:TLS_error_end"),
        ..Record::default()
    };
    for (format, expected) in [
        ("%START_TIME%", "2026-11-21T05:04:45.380Z"),
        ("%START_TIME(%H:%M:%S (%3f))%", "05:04:45 (380)"),
        ("%START_TIME(%s)%.", "1795237485."),
        ("%REQ(:METHOD)% %REQ(:PATH)% %REQ(:AUTHORITY)% %REQ(:scheme)% %REQ(host)%", "POST /new users http users"),
        ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/old"),
        ("%REQ(X-NOT-THERE?:PATH)%", "/new"),
        ("%REQ(X-NOT-THERE?X-NEITHER)%", "-"),
        ("%REQ(User-Agent):3%|%REQ(x-m)%|%REQ(user-agent):99%|%REQ(user-agent):0%", "cur|a|curl|"),
        ("%RESP(SERVER)% %RESP(:STATUS)% %RESP(X)%", "envoy 503 -"),
        ("%PROTOCOL% %RESPONSE_CODE% %RESPONSE_FLAGS%", "HTTP/2 503 URX,UF"),
        ("%ACCESS_LOG_TYPE%", "DownstreamEnd"),
        ("%RESPONSE_CODE_DETAILS%", "upstream_reset{remote_connection_failure}"),
        ("%BYTES_RECEIVED% %BYTES_SENT% %DURATION%", "18446744073709551615 10 1500"),
        ("%UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS% %UPSTREAM_CLUSTER%", "10.0.0.1:80 10.0.0.1:80 users"),
        ("%UPSTREAM_LOCAL_ADDRESS% %ROUTE_NAME% %CONNECTION_ID%", "10.0.0.9:40000 main 7"),
        ("%UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %UPSTREAM_LOCAL_PORT%", "10.0.0.9 40000"),
        ("%UPSTREAM_TRANSPORT_FAILURE_REASON%", "delayed_connect_error:_Connection_refused"),
        ("%REQUESTED_SERVER_NAME% %DOWNSTREAM_TLS_VERSION%", "users.test -"),
        (
            "%DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%",
            "10.1.2.3:1234 10.1.2.3 1234",
        ),
        ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS% %DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%", "10.9.9.9:55 10.9.9.9"),
        (
            "%DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%",
            "[fd00::1]:80 fd00::1 80",
        ),
        ("%DOWNSTREAM_TRANSPORT_FAILURE_REASON%", "TLS_error:bad_certificate:TLS_error_end"),
        ("100%% of it%%", "100% of it%"),
        ("", ""),
    ] {
        assert_eq!(line(format, &record), expected, "{format}");
    }
    let all: String = FIELDS.iter().map(|(name, _)| format!("%{name}%|")).collect();
    // Numbers have no sign for what is not there, and a body is no word.
    let missing = line(&all, &Record { log_type: "-", ..Record::default() }).replace('0', "-").replace("||", "|-|");
    assert_eq!(missing, "-|".repeat(FIELDS.len()), "what is missing");
}

#[test]
fn times_are_written_in_their_precision() {
    let began = std::time::Instant::now();
    let at = |microseconds| Some(began + Duration::from_micros(microseconds));
    let times = Times {
        began: at(0),
        request_end: at(1_500),
        upstream_sent_first: at(700),
        upstream_answered: at(4_999),
        end: at(9_000),
        ..Times::default()
    };
    let record = Record { times, attempts: 2, ..Record::default() };
    for (format, expected) in [
        ("%REQUEST_DURATION% %REQUEST_TX_DURATION% %RESPONSE_DURATION% %RESPONSE_TX_DURATION%", "1 1 4 4"),
        ("%COMMON_DURATION(US_TX_BEG:US_RX_BEG:us)% %COMMON_DURATION(DS_RX_BEG:DS_RX_END:ns)%", "4299 1500000"),
        ("%COMMON_DURATION(DS_TX_END:DS_RX_BEG:ms)% %COMMON_DURATION(US_CX_BEG:US_CX_END:ms)%", "- -"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT%", "2"),
    ] {
        assert_eq!(line(format, &record), expected, "{format}");
    }
    assert_eq!(line("%REQUEST_DURATION%|%RESPONSE_TX_DURATION%", &Record::default()), "-|-");
    for bad in ["", "DS_RX_BEG", "DS_RX_BEG:DS_RX_END", "DS_RX_BEG:DS_RX_END:s", "A:B:ms", "DS_RX_BEG:DS_RX_END:ms:ms"]
    {
        assert!(Format::parse(&format!("%COMMON_DURATION({bad})%")).is_err(), "{bad}");
    }
}

#[test]
fn grpc_statuses_are_those_of_the_trailers_first() {
    let (request, head) = (headers(&[("content-type", "application/grpc+proto")]), headers(&[("grpc-status", "5")]));
    let trailers = headers(&[("grpc-status", "14"), ("x-t", "end")]);
    let all = Record { request_headers: Some(Headers::All(&request)), response_code: 200, ..Record::default() };
    let of_head = Record { response_headers: Some(Headers::All(&head)), ..all };
    let of_trailers = Record { response_trailers: Some(Headers::All(&trailers)), ..of_head };
    let format =
        "%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS(NUMBER)% %GRPC_STATUS_NUMBER% %TRAILER(x-t):2%";
    assert_eq!(line(format, &of_trailers), "Unavailable UNAVAILABLE 14 14 en");
    assert_eq!(line(format, &of_head), "NotFound NOT_FOUND 5 5 -");
    assert_eq!(line(format, &all), "Unknown UNKNOWN 2 2 -");
    assert_eq!(line(format, &Record { request_headers: None, ..of_trailers }), "- - - - en");
}

#[test]
fn a_bad_format_is_refused_with_what_is_wrong() {
    // Those that Envoy refuses too, and a time letter that it would print as it stands.
    for (format, expected) in [
        ("%BOGUS%", "%BOGUS% is not an operator"),
        (
            "%FILTER_STATE(envoy.filters.http.grpc_stats:TYPED)%",
            "%FILTER_STATE%: only PLAIN is supported by culvert of envoy.filters.http.grpc_stats yet",
        ),
        ("%FILTER_STATE(a:OTHER)%", "PLAIN, TYPED or FIELD"),
        ("%FILTER_STATE(a:FIELD)%", "PLAIN, TYPED or FIELD"),
        ("%FILTER_STATE(:PLAIN)%", "key cannot be empty"),
        ("%DOWNSTREAM_PEER_CHAIN_SERIALS%", "%DOWNSTREAM_PEER_CHAIN_SERIALS% is not supported by culvert yet"),
        ("%REQ(x%", "position 0"),
        ("%REQ%", "needs a header's name"),
        ("%REQ()%", "needs a header's name"),
        ("%RESP(a b)%", "\"a b\" is not a header's name"),
        ("%REQ(a?b?c)%", "at most one alternative"),
        ("%REQ(X):x%", "position 0"),
        ("%req(x)%", "position 0"),
        ("a % b", "position 2"),
        ("ends in %", "position 8"),
        ("%GRPC_STATUS(WORD)%", "takes CAMEL_STRING"),
        ("%GRPC_STATUS_NUMBER(WORD)%", "not supported"),
        ("%ENVIRONMENT%", "needs a variable's name"),
        ("%PATH(WQ:NEW)%", "the second argument"),
        ("%COALESCE({})%", "needs a list of operators"),
        ("%PROTOCOL(a)%", "%PROTOCOL% takes neither"),
        ("%PROTOCOL:3%", "%PROTOCOL% takes neither"),
        ("%START_TIME(%Q)%", "%START_TIME%: %Q is not"),
        ("ä%é%", "position 2"),
    ] {
        let error = Format::parse(format).unwrap_err().to_string();
        assert!(error.contains(expected), "{format}: {error}");
    }
}

#[test]
fn operators_of_envoy_are_compiled_or_not_supported_yet() {
    for name in ENVOY_OPERATORS.lines() {
        let unknown = |text: &str| matches!(Format::parse(text), Err(FormatError::UnknownOperator { .. }));
        assert!(!unknown(&format!("%{name}%")) && !unknown(&format!("%{name}(a)%")), "{name}");
    }
    // Those that there are here are Envoy's.
    for name in FIELDS.iter().map(|(name, _)| *name).chain(["REQ", "RESP", "DYNAMIC_METADATA", "START_TIME"]) {
        assert!(ENVOY_OPERATORS.lines().any(|known| known == name), "{name}");
    }
}

#[test]
fn flags_are_written_in_the_order_in_which_they_came() {
    let flags = ResponseFlags::DC | ResponseFlags::UO | ResponseFlags::NR;
    assert_eq!(flags.names().collect::<Vec<_>>(), ["DC", "UO", "NR"]);
    assert!(flags.contains(ResponseFlags::UO) && !flags.contains(ResponseFlags::UH | ResponseFlags::UO));
    assert!(ResponseFlags::default().is_empty());
}
