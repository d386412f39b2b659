//! ext_proc with `FULL_DUPLEX_STREAMED`: a service that is shown bodies while they pass, and sends pieces of its own when it likes.

use super::harness::Case;
use super::processing::{mode, of, set, sets, shown};

const REQUEST: &str = "request_body_mode: FULL_DUPLEX_STREAMED, request_trailer_mode: SEND, response_header_mode: SKIP";
const RESPONSE: &str =
    "response_body_mode: FULL_DUPLEX_STREAMED, response_trailer_mode: SEND, request_header_mode: SKIP";

/// A piece of the service's own.
fn piece(side: &str, text: &str, ends: bool) -> String {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(text);
    let piece = format!(r#"{{"streamed_response": {{"body": "{text}", "end_of_stream": {ends}}}}}"#);
    format!(r#"{{"{side}_body": {{"response": {{"body_mutation": {piece}}}}}}}"#)
}

/// What the service says to each of the messages: to the headers, to a piece of the body, and to its end.
fn answers(side: &str) -> Vec<String> {
    let headers = format!(r#"{{"{side}_headers": {{}}}}"#);
    let changed = format!(r#"{{"{side}_headers": {{"response": {{{}}}}}}}"#, sets(&[set("x-h", "new", "")]));
    let replaced = format!(
        r#"{{"{side}_headers": {{"response": {{"status": "CONTINUE_AND_REPLACE", "body_mutation": {{"body": "bmV3"}}}}}}}}"#
    );
    let one = |text: &str, ends| piece(side, text, ends);
    let answer = r#"{"immediate_response": {"status": {"code": 401}, "details": "d"}}"#;
    let plain = format!(r#"{{"{side}_body": {{"response": {{"body_mutation": {{"body": "bmV3"}}}}}}}}"#);
    let none = format!(r#"{{"{side}_body": {{}}}}"#);
    vec![
        format!("[{headers}, {}, {}]", one("first ", false), one("last", true)),
        format!("[{headers}, null, {}]", one("all", true)),
        format!("[{headers}, null, [{}, {}, {}]]", one("a", false), one("b", false), one("c", true)),
        format!("[{headers}, {}, {}]", one("first", false), one("", true)),
        format!("[{headers}, null, {}]", one("", true)),
        format!("[{headers}, [{}, {}], [{}]]", one("a", false), one("b", false), one("c", true)),
        // Nothing is said before all is there.
        format!("[null, null, [{headers}, {}, {}]]", one("a", false), one("b", true)),
        format!("[null, {changed}, [{}, {}]]", one("a", false), one("b", true)),
        format!("[null, null, [{changed}, {}]]", one("", true)),
        format!("[{changed}, null, {}]", one("all", true)),
        format!("[{replaced}]"),
        // Answers in the message's place, when all has been shown: before, it depends on who is faster how much is.
        format!("[null, null, {answer}]"),
        format!("[{headers}, null, {answer}]"),
        // What nobody expects.
        format!("[{headers}, {plain}]"),
        format!("[{headers}, {none}]"),
        format!("[{}]", one("a", true)),
        format!("[null, {}]", one("a", true)),
    ]
}

fn of_each(name: &'static str, fields: &str, request: &str, side: &str) -> Case {
    let requests: Vec<_> = answers(side).iter().map(|answers| shown(request, answers)).collect();
    of(name, &mode(fields), &requests)
}

fn trailers() -> Vec<Case> {
    let chunked = "POST /\ntransfer-encoding: chunked\ntrailer: x-t\n\n4\r\nbody\r\n0\r\nx-t: 1\r\n\r\n";
    let headers = r#"{"request_headers": {}}"#;
    let overwrite = r#", "append_action": "OVERWRITE_IF_EXISTS_OR_ADD""#;
    let changed = format!(
        r#"{{"request_trailers": {{"header_mutation": {{"set_headers": [{}]}}}}}}"#,
        set("x-t", "new", overwrite)
    );
    let same = r#"{"request_trailers": {}}"#;
    let one = |text: &str| piece("request", text, false);
    let requests = [
        format!("[{headers}, {}, {changed}]", one("first")),
        format!("[{headers}, null, [{}, {}, {changed}]]", one("a"), one("b")),
        format!("[{headers}, null, {same}]"),
        format!("[null, null, [{headers}, {}, {same}]]", one("all")),
        format!("[null, null, [{headers}, {same}]]"),
        format!("[{headers}, {}, {}]", one("first"), changed.replace("x-t", "x t")),
    ]
    .map(|answers| shown(chunked, &answers));
    let line = "http_protocol_options: {enable_trailers: true}";
    let without = shown(&chunked.replace("body", "tail").replace("x-t: 1\r\n", ""), &requests_without_trailers());
    vec![
        of("trailers in both directions", &mode(REQUEST), &requests).of_manager(line),
        of("no trailers in both directions", &mode(REQUEST), &[without]).of_manager(line),
    ]
}

fn requests_without_trailers() -> String {
    format!(r#"[{{"request_headers": {{}}}}, null, {}]"#, piece("request", "all", true))
}

fn failures() -> Vec<Case> {
    let headers = r#"{"request_headers": {}}"#;
    let requests = ["status 7", "garbage", r#"[{"response_headers": {}}]"#];
    let early = requests.map(|answer| shown("GET /", answer));
    let late = [format!("[{headers}, {headers}]"), format!("[{headers}, null, {headers}]")];
    let late = late.map(|answers| shown("POST /\n\nsome body", &answers));
    let all = [&early[..], &late].concat();
    let allowed = format!(", failure_mode_allow: true{}", mode(REQUEST));
    vec![
        of("failures in both directions", &mode(REQUEST), &all),
        of("failures after bodies are not allowed", &allowed, &all),
    ]
}

pub fn cases() -> Vec<Case> {
    let post = "POST /\n\nsome body";
    let both = format!("{REQUEST}, {RESPONSE}")
        .replace(", request_header_mode: SKIP", "")
        .replace(", response_header_mode: SKIP", "");
    let echoed = format!(
        r#"[{{"request_headers": {{}}}}, {}, {}, {{"response_headers": {{}}}}, {}, {}]"#,
        piece("request", "to ", false),
        piece("request", "them", true),
        piece("response", "from ", false),
        piece("response", "them", true),
    );
    let override_mode = r#""mode_override": {"request_body_mode": "NONE", "response_header_mode": "SEND"}"#;
    let overridden = answers("request")[0].replacen(
        r#""request_headers": {}"#,
        &format!(r#""request_headers": {{}}, {override_mode}"#),
        1,
    );
    let no_body = shown("GET /", r#"[{"request_headers": {}}]"#);
    let no_length = shown("POST /\ncontent-length: 0", r#"[{"request_headers": {}}]"#);
    let slow = r#"[{"override_message_timeout": "0.5s"}, {"request_headers": {}}, LAST]"#;
    let slow = slow.replace("LAST", &piece("request", "all", true));
    let mut cases = vec![
        of_each("a request in both directions", REQUEST, post, "request"),
        of_each("a response in both directions", RESPONSE, "GET /", "response"),
        of_each("an answer of the proxy in both directions", RESPONSE, "GET /direct", "response"),
        of(
            "a request and its response in both directions",
            &mode(&both),
            &[shown(post, &echoed), shown(post, &echoed.replace(" \"", "\""))],
        ),
        of("no body in both directions", &mode(REQUEST), &[no_body, no_length]),
        of(
            "headers are not shown",
            &mode(&format!("{REQUEST}, request_header_mode: SKIP")),
            &[
                shown(post, &format!("[{}, {}]", piece("request", "a", false), piece("request", "b", true))),
                shown(post, &format!("[null, {}]", piece("request", "b", true))),
            ],
        ),
        of("the mode stays", &format!(", allow_mode_override: true{}", mode(REQUEST)), &[shown(post, &overridden)]),
        of("no time is asked for", &format!(", max_message_timeout: 1s{}", mode(REQUEST)), &[shown(post, &slow)]),
        of(
            "pieces that nobody expects",
            &mode("request_body_mode: STREAMED, response_header_mode: SKIP"),
            &[shown(post, &answers("request")[0])],
        ),
        of(
            "bodies in both directions are not watched",
            &format!(", observability_mode: true, deferred_close_timeout: 1s{}", mode(REQUEST)),
            &[shown(post, "[]")],
        )
        .shown(&[1]),
    ];
    cases.extend(trailers());
    cases.extend(failures());
    cases
}

/// What the processor still has is lost: Envoy sends on what is left. Last, it speaks of trailers that there are none.
pub fn cut_short() -> Vec<Case> {
    let headers = r#"{"request_headers": {}}"#;
    let requests = [
        format!(r#"[{headers}, "end"]"#),
        format!(r#"[{headers}, null, "end"]"#),
        format!(r#"[{headers}, {{"request_trailers": {{}}}}]"#),
    ];
    let requests = requests.map(|answers| shown("POST /\n\nsome body", &answers));
    requests.iter().map(|request| of("a service that leaves", &mode(REQUEST), std::slice::from_ref(request))).collect()
}
