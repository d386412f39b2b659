//! ext_proc: requests and responses that a service is shown. What it is shown is compared too.

use super::harness::{By, Case, case};

const EXT_PROC: &str = "ext_proc.v3.ExternalProcessor";
const PER_ROUTE: &str = "ext_proc.v3.ExtProcPerRoute";

/// The service's answers to what it is shown, one after the other.
const NOTHING: &str = r#"[{"request_headers": {}}, {"response_headers": {}}]"#;

pub fn cases() -> Vec<Case> {
    [headers(), answers(), failures(), broken(), bodies(), trailers(), modes(), settings(), routes(), attributes()]
        .concat()
}

/// A request, with the service's answers.
pub fn shown(request: &str, answers: &str) -> String {
    let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
    let body = if body.is_empty() { String::new() } else { format!("\n\n{body}") };
    format!("{head}\nx-answer: {answers}{body}")
}

pub fn of(name: &'static str, more: &str, requests: &[String]) -> Case {
    let requests: Vec<_> = requests.iter().map(String::as_str).collect();
    let fields =
        format!("stat_prefix: $case, grpc_service: {{envoy_grpc: {{cluster_name: grpc}}}}, message_timeout: 1s{more}");
    case(name, EXT_PROC, &fields, &requests)
}

pub fn mode(fields: &str) -> String {
    format!(", processing_mode: {{{fields}}}")
}

/// An answer to headers.
fn to_request(common: &str) -> String {
    format!(r#"[{{"request_headers": {{"response": {{{common}}}}}}}, {{"response_headers": {{}}}}]"#)
}

fn to_response(common: &str) -> String {
    format!(r#"[{{"request_headers": {{}}}}, {{"response_headers": {{"response": {{{common}}}}}}}]"#)
}

pub fn set(name: &str, value: &str, action: &str) -> String {
    use base64::Engine as _;
    let value = base64::engine::general_purpose::STANDARD.encode(value);
    format!(r#"{{"header": {{"key": "{name}", "raw_value": "{value}"}}{action}}}"#)
}

pub fn sets(options: &[String]) -> String {
    format!(r#""header_mutation": {{"set_headers": [{}]}}"#, options.join(", "))
}

fn removes(names: &str) -> String {
    format!(r#""header_mutation": {{"remove_headers": [{names}]}}"#)
}

/// All that can be asked for of headers.
fn changes() -> Vec<String> {
    let actions = [
        "",
        r#", "append": true"#,
        r#", "append": false"#,
        r#", "append_action": "APPEND_IF_EXISTS_OR_ADD""#,
        r#", "append_action": "ADD_IF_ABSENT""#,
        r#", "append_action": "OVERWRITE_IF_EXISTS_OR_ADD""#,
        r#", "append_action": "OVERWRITE_IF_EXISTS""#,
    ];
    let mut all: Vec<_> = actions.iter().map(|action| sets(&[set("x-h", "new", action)])).collect();
    let overwrite = r#", "append_action": "OVERWRITE_IF_EXISTS_OR_ADD""#;
    for (name, value) in [
        (":path", "/other?q"),
        (":method", "PUT"),
        (":authority", "other.test"),
        ("host", "other.test"),
        (":scheme", "https"),
        (":status", "404"),
        (":status", "100"),
        ("x-envoy-x", "1"),
        ("X-Upper", "1"),
        ("x y", "1"),
        ("x-empty", ""),
        ("x-line", "a\nb"),
    ] {
        all.push(sets(&[set(name, value, overwrite)]));
    }
    all.push(r#""header_mutation": {"set_headers": [{"header": {"key": "x-h", "value": "text"}}]}"#.to_owned());
    all.push(
        r#""header_mutation": {"set_headers": [{"header": {"key": "x-h", "value": "text", "raw_value": "bmV3"}}]}"#
            .to_owned(),
    );
    let many: Vec<_> = (0..101).map(|number| set(&format!("x-{number}"), "1", "")).collect();
    all.push(sets(&many));
    all.push(sets(&many[..98]));
    all.push(sets(&[set("x-a", "1", overwrite), set("x-a", "2", actions[3])]));
    all.push(removes(r#""x-h", "host", ":path", "X-ID", "x-none", "x-envoy-upstream-service-time""#));
    all.push(removes(r#""x h""#));
    all
}

fn headers() -> Vec<Case> {
    let mut plain: Vec<_> = [
        "GET /a?b=c",
        "POST /\ncontent-type: text/plain\n\nbody",
        "HEAD /",
        "GET /direct",
        "GET /created",
        "POST /direct\ncontent-type: application/grpc",
        "GET /\nx-do: 503+x-r=1",
        "GET /\nx-do: 204",
        "GET /\nx-do: reset",
        "GET /\nx-two: 1\nx-two: 2",
    ]
    .iter()
    .map(|request| shown(request, NOTHING))
    .collect();
    plain.push("GET /plain\nx-answer: {}".to_owned());
    let on_request: Vec<_> = changes()
        .iter()
        .flat_map(|change| ["GET /", "GET /\nx-h: old"].map(|it| shown(it, &to_request(change))))
        .collect();
    let on_response: Vec<_> = changes()
        .iter()
        .flat_map(|change| {
            // What is answered here has as many headers as it likes in Envoy.
            let few = change.matches("raw_value").count() < 90;
            let requests = ["GET /", "GET /\nx-do: 200+x-h=old", "GET /direct"];
            requests.map(|it| shown(it, &to_response(change))).into_iter().take(if few { 3 } else { 2 })
        })
        .collect();
    let rules = |rules: &str| format!(", mutation_rules: {{{rules}}}");
    let ruled: Vec<_> = changes().iter().map(|change| shown("GET /\nx-h: old", &to_request(change))).collect();
    vec![
        of("headers that stay", "", &plain),
        of("a request's headers", "", &on_request),
        of("a response's headers", "", &on_response),
        of("allow_all_routing", &rules("allow_all_routing: true, allow_envoy: true"), &ruled),
        of("disallow_system", &rules("allow_all_routing: true, disallow_system: true"), &ruled),
        of("disallow_all", &rules("disallow_all: true"), &ruled),
        of("disallow_all but", &rules("disallow_all: true, allow_expression: {regex: \"x-.*\"}"), &ruled),
        of(
            "disallow_expression",
            &rules("disallow_expression: {regex: \"x-h\"}, allow_expression: {regex: \"x-.*|host\"}"),
            &ruled,
        ),
        of("disallow_is_error", &rules("disallow_is_error: true"), &ruled),
    ]
}

/// Hosts that break off in the middle of a response, of which nothing has been sent yet.
fn broken() -> Vec<Case> {
    let cut = ["200+cut=length", "200+cut=chunk", "503+cut=length"];
    let of_each = |answers: &str| cut.map(|how| shown(&format!("GET /\nx-do: {how}"), answers));
    // How the host frames its response is not shown to the processor here.
    let unframed = ", forward_rules: {disallowed_headers: {patterns: [{exact: transfer-encoding}]}}";
    let buffered = mode("response_body_mode: BUFFERED") + unframed;
    let waits = of_each(r#"[{"request_headers": {}}, null]"#);
    vec![
        of("responses that break off before they are whole", &buffered, &of_each(NOTHING)).shown(&[2; 3]),
        of("responses that break off while their headers wait", unframed, &waits).shown(&[2; 3]),
    ]
}

fn answers() -> Vec<Case> {
    let answer = |fields: &str| format!(r#"[{{"immediate_response": {{{fields}}}}}]"#);
    let late = |fields: &str| format!(r#"[{{"request_headers": {{}}}}, {{"immediate_response": {{{fields}}}}}]"#);
    let overwrite = r#", "append_action": "OVERWRITE_IF_EXISTS_OR_ADD""#;
    let header =
        |name: &str, value: &str| format!(r#""headers": {{"set_headers": [{}]}}"#, set(name, value, overwrite));
    let all = [
        r#""status": {"code": 401}, "details": "d""#.to_owned(),
        r#""status": {"code": 403}, "body": "bm8=", "details": "not this one""#.to_owned(),
        r#""status": {"code": 100}, "details": "d""#.to_owned(),
        r#""status": {"code": 400}, "grpc_status": {"status": 5}, "details": "d""#.to_owned(),
        format!(r#""status": {{"code": 302}}, "details": "d", {}"#, header("location", "/x")),
        format!(
            r#""status": {{"code": 200}}, "body": "bm8=", "details": "d", {}"#,
            header("content-type", "text/html")
        ),
        format!(r#""status": {{"code": 200}}, "details": "d", {}"#, header("x-envoy-x", "1")),
    ];
    let mut requests = Vec::new();
    for fields in &all {
        requests.push(shown("GET /", &answer(fields)));
        requests.push(shown("POST /\ncontent-type: application/grpc", &answer(fields)));
        requests.push(shown("GET /", &late(fields)));
        requests.push(shown("GET /direct", &late(fields)));
    }
    vec![
        of("immediate_response", "", &requests),
        of("disable_immediate_response", ", disable_immediate_response: true", &requests[..4]),
        of(
            "disable_immediate_response, failure_mode_allow",
            ", disable_immediate_response: true, failure_mode_allow: true",
            &requests[..4],
        ),
    ]
}

fn failures() -> Vec<Case> {
    let each = [
        ("a failure, status 7", "status 7"),
        ("a failure, status 14", "status 14"),
        ("a failure, HTTP's 503", "http 503"),
        ("a failure, HTTP's 403", "http 403"),
        ("a failure, garbage", "garbage"),
        ("a failure that is late", "hang"),
        ("a failure, no answer", "[]"),
        ("a failure, an answer to nothing", "{}"),
        ("a failure, an answer to the response", r#"[{"response_headers": {}}]"#),
        ("a failure, an answer to a body", r#"[{"request_body": {}}]"#),
        ("a failure, an answer twice", r#"[{"request_headers": {}}, {"request_headers": {}}]"#),
        ("a failure of the second answer", r#"[{"request_headers": {}}, null]"#),
    ];
    let of_each = |more: &str| {
        each.map(|(name, answer)| {
            let requests = ["GET /", "POST /direct\n\nbody"].map(|it| shown(it, answer));
            // Envoy shows what it answers itself to a stream of its own then.
            let alone = !more.is_empty() && name.contains("an answer to");
            of(name, more, &requests[..if alone { 1 } else { 2 }])
        })
    };
    let all = each.map(|(_, answer)| shown("GET /", answer));
    [
        &of_each("")[..],
        &of_each(", failure_mode_allow: true"),
        &[of("status_on_error", ", status_on_error: {code: 503}", &all)],
    ]
    .concat()
}

const NO_HEADERS: &str = "request_header_mode: SKIP, response_header_mode: SKIP";

fn bodies() -> Vec<Case> {
    let body = |common: &str| format!(r#"{{"request_body": {{"response": {{{common}}}}}}}"#);
    let common = [
        "".to_owned(),
        r#""body_mutation": {"body": "bmV3IGJvZHk="}"#.to_owned(),
        r#""body_mutation": {"clear_body": true}"#.to_owned(),
        r#""body_mutation": {"clear_body": false}"#.to_owned(),
        sets(&[set("x-h", "new", "")]),
        format!(r#"{}, "body_mutation": {{"body": "bmV3"}}"#, sets(&[set("content-length", "3", "")])),
    ];
    let replaced = [
        r#""status": "CONTINUE_AND_REPLACE", "body_mutation": {"body": "bmV3IGJvZHk="}"#,
        r#""status": "CONTINUE_AND_REPLACE", "body_mutation": {"clear_body": true}"#,
        r#""status": "CONTINUE_AND_REPLACE""#,
    ];
    let mut requests = Vec::new();
    for common in &common {
        let list = format!(r#"[{{"request_headers": {{}}}}, {}]"#, body(common));
        requests.push(shown("POST /\n\nsome body", &list));
        let list = format!(r#"[{{"request_headers": {{}}}}, {}]"#, body(common).replace("request", "response"));
        requests.push(shown("GET /", &list.replace("request_headers", "response_headers")));
    }
    let of_request: Vec<_> = requests.iter().step_by(2).cloned().collect();
    let of_response: Vec<_> = requests.iter().skip(1).step_by(2).cloned().collect();
    let of_local: Vec<_> = of_response.iter().map(|request| request.replace("GET /", "GET /direct")).collect();
    let no_body = [shown("GET /", NOTHING), shown("HEAD /", NOTHING), shown("GET /\nx-do: 204", NOTHING)];
    let of_request = [&of_request[..], &no_body[..1]].concat();
    let replaces: Vec<_> = replaced
        .iter()
        .flat_map(|common| [shown("POST /\n\nsome body", &to_request(common)), shown("GET /", &to_request(common))])
        .chain(
            replaced
                .iter()
                .flat_map(|common| [shown("GET /", &to_response(common)), shown("GET /direct", &to_response(common))]),
        )
        .collect();
    let request = |body: &str| mode(&format!("response_header_mode: SKIP, request_body_mode: {body}"));
    let response = |body: &str| mode(&format!("request_header_mode: SKIP, response_body_mode: {body}"));
    let alone: Vec<_> =
        common.iter().map(|common| shown("POST /\n\nsome body", &format!("[{}]", body(common)))).collect();
    vec![
        of("a request's body at once", &request("BUFFERED"), &of_request),
        of("a request's body piece by piece", &request("STREAMED"), &of_request),
        of("a request's body in part", &request("BUFFERED_PARTIAL"), &of_request),
        of("a response's body at once", &response("BUFFERED"), &of_response),
        of("a response's body piece by piece", &response("STREAMED"), &of_response),
        of("a response's body in part", &response("BUFFERED_PARTIAL"), &of_response),
        of("an answer's body at once", &response("BUFFERED"), &of_local),
        of("an answer's body piece by piece", &response("STREAMED"), &of_local),
        of(
            "messages without bodies",
            &mode("request_body_mode: BUFFERED, response_body_mode: STREAMED"),
            &no_body[1..],
        ),
        of("messages that are replaced", "", &replaces),
        of("bodies without headers, at once", &mode(&format!("{NO_HEADERS}, request_body_mode: BUFFERED")), &alone),
    ]
}

fn trailers() -> Vec<Case> {
    let chunked = "POST /\ntransfer-encoding: chunked\ntrailer: x-t\n\n4\r\nbody\r\n0\r\nx-t: 1\r\nx-u: 2\r\n\r\n";
    let change = format!(
        r#"[{{"request_headers": {{}}}}, {{"request_trailers": {{"header_mutation": {{"set_headers": [{}], "remove_headers": ["x-u"]}}}}}}]"#,
        set("x-t", "new", r#", "append_action": "OVERWRITE_IF_EXISTS_OR_ADD""#)
    );
    let with_body = r#"[{"request_headers": {}}, {"request_body": {}}, {"request_trailers": {}}]"#;
    let line = "http_protocol_options: {enable_trailers: true}";
    let of = |name, fields: &str, list: &str| {
        of(
            name,
            &mode(&format!("response_header_mode: SKIP, request_trailer_mode: SEND, {fields}")),
            &[shown(chunked, list)],
        )
        .of_manager(line)
    };
    vec![
        of("trailers", "request_body_mode: NONE", &change),
        of("trailers after a body at once", "request_body_mode: BUFFERED", with_body),
        of("trailers that are refused", "request_body_mode: NONE", &change.replace("x-t", "x t")),
    ]
}

fn modes() -> Vec<Case> {
    let with = |mode: &str| {
        format!(
            r#"[{{"request_headers": {{}}, "mode_override": {{{mode}}}}}, {{"request_body": {{}}}}, {{"response_headers": {{}}}}]"#
        )
    };
    let requests = [
        r#""request_body_mode": "BUFFERED""#,
        r#""response_header_mode": "SKIP""#,
        r#""request_body_mode": "BUFFERED", "response_header_mode": "SKIP""#,
        r#""request_body_mode": "NONE", "response_header_mode": "SEND""#,
        "",
    ]
    .map(|mode| shown("POST /\n\nsome body", &with(mode)));
    let late = shown(
        "GET /",
        r#"[{"request_headers": {}}, {"response_headers": {}, "mode_override": {"response_body_mode": "BUFFERED"}}, {"response_body": {"response": {"body_mutation": {"body": "bmV3"}}}}]"#,
    );
    let all = [&requests[..], &[late]].concat();
    let allowed = ", allow_mode_override: true";
    vec![
        of("mode_override is passed over", "", &all),
        of("mode_override", allowed, &all),
        of(
            "allowed_override_modes",
            &format!(
                "{allowed}, allowed_override_modes: [{{request_header_mode: SKIP, request_body_mode: BUFFERED, response_header_mode: SEND}}, {{response_header_mode: SKIP}}]"
            ),
            &all,
        ),
    ]
}

fn settings() -> Vec<Case> {
    let longer = |time: &str| format!(r#"[{{"override_message_timeout": "{time}"}}, {{"response_headers": {{}}}}]"#);
    let times = ["0.5s", "0.0001s", "3s"].map(|time| shown("GET /", &longer(time)));
    let route = format!(r#"{}, "clear_route_cache": true"#, sets(&[set(":path", "/direct", "")]));
    let stays = r#""clear_route_cache": true"#;
    let routes = [
        shown("GET /", &to_request(&route)),
        shown("GET /", &to_request(stays)),
        shown("GET /", &to_request(&sets(&[set(":path", "/direct", "")]))),
        shown("GET /", &to_response(&route)),
    ];
    let told = r#"[{"request_headers": {}, "dynamic_metadata": {"ns": {"k": "new", "n": 1}, "other": {"k": 1}}}, {"response_headers": {}, "dynamic_metadata": {"ns": "text"}}]"#;
    let metadata =
        ", metadata_options: {forwarding_namespaces: {untyped: [ns, none]}, receiving_namespaces: {untyped: [ns]}}";
    let some = [shown("GET /\nx-a: 1\nx-b: 2", NOTHING)];
    let forward = |rules: &str| format!(", forward_rules: {{{rules}}}");
    let always = "{prefix: x-answer}, {prefix: x-id}";
    let observed = ["POST /\n\nsome body", "GET /\nx-do: 503"].map(|it| shown(it, "[]"));
    vec![
        of("max_message_timeout", ", max_message_timeout: 1s", &times),
        of("override_message_timeout is not allowed", "", &times),
        of("clear_route_cache", "", &routes),
        of("route_cache_action CLEAR", ", route_cache_action: CLEAR", &routes),
        of("route_cache_action RETAIN", ", route_cache_action: RETAIN", &routes),
        of("disable_clear_route_cache", ", disable_clear_route_cache: true", &routes),
        of("metadata that is not taken", "", &[shown("GET /", told)]),
        of("metadata_options", metadata, &[shown("GET /", told), shown("GET /direct", told)]),
        of(
            "forward_rules",
            &forward(&format!("allowed_headers: {{patterns: [{{exact: x-a}}, {{prefix: \":\"}}, {always}]}}")),
            &some,
        ),
        of(
            "forward_rules that forbid",
            &forward("disallowed_headers: {patterns: [{exact: x-a}, {exact: \":path\"}]}"),
            &some,
        ),
        of(
            "forward_rules of both kinds",
            &forward(&format!(
                "allowed_headers: {{patterns: [{{prefix: x-}}, {always}]}}, disallowed_headers: {{patterns: [{{exact: x-a}}]}}"
            )),
            &some,
        ),
        of(
            "observability_mode",
            &format!(
                ", observability_mode: true, deferred_close_timeout: 3s{}",
                mode("request_body_mode: STREAMED, response_body_mode: STREAMED")
            ),
            &observed,
        )
        .shown(&[6, 4]),
        of(
            "allow_content_length_header",
            &format!(
                ", allow_content_length_header: true{}",
                mode("request_body_mode: STREAMED, response_header_mode: SKIP")
            ),
            &[shown("POST /\n\nsome body", r#"[{"request_headers": {}}, {"request_body": {}}, {"request_body": {}}]"#)],
        ),
        of("initial metadata", "", &some).told(
            By::Route,
            PER_ROUTE,
            "overrides: {grpc_initial_metadata: [{key: x-m, value: v}]}",
        ),
    ]
}

fn routes() -> Vec<Case> {
    let requests = ["GET /", "GET /plain", "GET /direct", "POST /\n\nbody"].map(|request| shown(request, NOTHING));
    let fails = ["GET /", "GET /plain"].map(|request| shown(request, "status 7"));
    let told = |name, by, fields: &str| of(name, "", &requests).told(by, PER_ROUTE, fields);
    vec![
        told("a host that is not shown", By::Host, "disabled: true"),
        told("a route that is not shown", By::Route, "disabled: true"),
        told("a host that is not shown, with routes that are", By::Host, "disabled: true").told(
            By::Route,
            PER_ROUTE,
            "overrides: {processing_mode: {response_header_mode: SKIP}}",
        ),
        told(
            "another mode",
            By::Config,
            "overrides: {processing_mode: {request_header_mode: SKIP, response_header_mode: SKIP}}",
        ),
        told(
            "another service",
            By::Route,
            "overrides: {grpc_service: {envoy_grpc: {cluster_name: dead}}, failure_mode_allow: true}",
        ),
        of("failure_mode_allow of a route", "", &fails).told(
            By::Route,
            PER_ROUTE,
            "overrides: {failure_mode_allow: true}",
        ),
    ]
}

fn attributes() -> Vec<Case> {
    let all = "[request.path, request.url_path, request.query, request.host, request.scheme, request.method, \
               request.referer, request.useragent, request.id, request.protocol, source.address, source.port, \
               destination.address, destination.port, connection.requested_server_name, connection.mtls, \
               connection.tls_version, xds.route_name, xds.cluster_name, response.code]";
    let requests = ["GET /a?b=c", "GET /direct\nreferer: r\nuser-agent: u", "POST /\nx-do: 503\n\nbody"];
    let requests = requests.map(|request| shown(request, NOTHING));
    vec![
        of("request_attributes", &format!(", request_attributes: {all}"), &requests),
        of("response_attributes", &format!(", response_attributes: {all}"), &requests),
    ]
}
