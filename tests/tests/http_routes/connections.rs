//! How connections end: their time limits, and what becomes of them after a request that is none.

use super::harness::{Case, case};

const GET: &str = "GET / HTTP/1.1\nhost: $host\n\n";

pub fn cases() -> Vec<Case> {
    [ends(), late(), invalid(), interim()].concat()
}

/// Seconds are compared, so that what is expected to happen does so about the middle of one.
///
/// Requests are answered here: `$1` with 200, and those of `/bad` with 400.
fn of(name: &'static str, lines: &[&str], pieces: &[&str]) -> Case {
    let routes = "- {match: {prefix: /bad}, direct_response: {status: 400}}\n- {match: {prefix: /}, $1}";
    let case = case(name, routes, &[&format!("CONNECTION\n{}", pieces.join("|"))]);
    lines.iter().fold(case, |case, line| case.of_manager(line))
}

fn ends() -> Vec<Case> {
    let at_once = "delayed_close_timeout: 0s";
    let last =
        "the answer that says so is the end of culvertd's connection; Envoy waits for drain_timeout all the same";
    let idle = "common_http_protocol_options: {idle_timeout: 0.5s}";
    let old = "common_http_protocol_options: {max_connection_duration: 0.5s}";
    vec![
        of("an idle connection ends after drain_timeout", &[idle, "drain_timeout: 1s", at_once], &[GET]),
        of("an idle connection ends at once", &[idle, "drain_timeout: 0s", at_once], &[GET]),
        of("an idle connection, by default", &[idle, at_once], &[GET]),
        of("a request in time", &[idle, "drain_timeout: 3s", at_once], &[GET, "wait 1500", GET]).differs(last),
        of("an old connection ends after drain_timeout", &[old, "drain_timeout: 1s", at_once], &[GET]),
        of("drain_timeout_jitter", &[old, "drain_timeout: 1s", "drain_timeout_jitter: {value: 30}", at_once], &[GET]),
        of("an old connection's last request", &[old, "drain_timeout: 3s", at_once], &[GET, "wait 1500", GET])
            .differs(last),
        of(
            "an old connection ends with a response",
            &[old, "drain_timeout: 0.5s", "http1_safe_max_connection_duration: true", at_once],
            &[GET, "wait 2500", GET],
        ),
    ]
}

/// Whose business `expect: 100-continue` is.
fn interim() -> Vec<Case> {
    let with =
        |name, line: &str, requests: &[&str]| case(name, "- {match: {prefix: /}, $a}", requests).of_manager(line);
    let (through, here) = ("proxy_100_continue: true", "proxy_100_continue: false");
    let post = |path: &str, more: &str| {
        format!(
            "CONNECTION\nPOST {path} HTTP/1.1\nhost: $host\nconnection: close\ncontent-length: 4\nexpect: \
             100-continue\n{more}\n|wait 200|body"
        )
    };
    let one = post("/", "x-do: 200+interim=100+delay=100\n");
    let none = post("/", "x-do: 200\n");
    let unknown = post("/", "x-do: 200+interim=110+delay=100\n");
    let asked = "CONNECTION\nGET / HTTP/1.1\nhost: $host\nconnection: close\nx-do: 200+interim=100+delay=100\n\n";
    let scripts = [&*one, &none, &unknown, asked];
    let seen = ["POST /\nexpect: 100-continue\n\nbody", "POST /\nexpect: 100-Continue\n\nbody"];
    vec![
        with("proxy_100_continue", through, &scripts),
        with("no proxy_100_continue", here, &scripts),
        with("what hosts see of proxy_100_continue", through, &seen),
    ]
}

fn late() -> Vec<Case> {
    let (late, at_once) = ("request_headers_timeout: 0.5s", "delayed_close_timeout: 0s");
    let why = "culvertd says at once that nothing more comes, and reads on for as long";
    let half = "POST / HTTP/1.1\nhost: $host\ncontent-length: 9\n\nbody";
    vec![
        of("a late head", &[late, at_once], &["GET / HTTP/1.1\nhost: "]),
        of("a head in time", &[late, at_once], &["GET / HTTP/1.1\nhost: ", "wait 200", "$host\nconnection: close\n\n"]),
        of("a late second head", &[late, at_once], &[GET, "GET / HTTP/1.1\nhost: "]),
        of("delayed_close_timeout", &["delayed_close_timeout: 1.5s"], &[half]).differs(why),
        of("delayed_close_timeout 0", &[at_once], &[half]),
    ]
}

fn invalid() -> Vec<Case> {
    let last = "GET / HTTP/1.1\nhost: $host\nconnection: close\n\n";
    let no_host = "GET / HTTP/1.1\n\n";
    let bad = "GET /bad HTTP/1.1\nhost: $host\n\n";
    let open = "stream_error_on_invalid_http_message: true";
    let at_once = "delayed_close_timeout: 0s";
    let of_protocol =
        |stays| format!("http_protocol_options: {{override_stream_error_on_invalid_http_message: {stays}}}");
    let pieces = |first| [first, "wait 300", last];
    vec![
        of("a request without a host", &[at_once], &pieces(no_host)),
        of("a request without a host, stream_error_on_invalid_http_message", &[open, at_once], &pieces(no_host)),
        of("a request without a host, overridden", &[open, &of_protocol("false"), at_once], &pieces(no_host)),
        of("a request without a host, of HTTP/1 only", &[&of_protocol("true"), at_once], &pieces(no_host)),
        of("an answer of 400", &[at_once], &pieces(bad)),
        of("an answer of 400, stream_error_on_invalid_http_message", &[open, at_once], &pieces(bad)),
        of("what is no HTTP", &[open, at_once], &pieces("GET\n\n")),
        of(
            "the same of HTTP/2",
            &["http2_protocol_options: {override_stream_error_on_invalid_http_message: true}", at_once],
            &pieces(no_host),
        ),
    ]
}
