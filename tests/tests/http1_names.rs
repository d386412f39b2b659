//! Names of headers in the case in which they came, and trailers, over HTTP/1.1 on both sides: beside the real Envoy, on the wire.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::server;

const ROUTES: &str = r#"
- name: all
  domains: ["*"]
  request_headers_to_add: [{header: {key: x-new-one, value: "a-b: c"}}]
  response_headers_to_add: [{header: {key: x-new-one, value: "a-b: c"}}]
  routes:
  - {match: {prefix: /direct}, direct_response: {status: 201, body: {inline_string: here}}}
  - {match: {prefix: /}, route: {cluster: app, prefix_rewrite: "/x"}}
"#;

const REQUESTS: [&str; 4] = [
    "GET /direct HTTP/1.1\nHOST: a\nX-Own: 1\nConnection: close\n\n",
    "GET /app HTTP/1.1\nHoSt: a\nX-oWn: 1\nx-own: 2\nUSER-agent: Me\nConnection: close\n\n",
    "POST /app HTTP/1.1\nHost: a\nContent-LENGTH: 2\nConnection: close\n\nok",
    "POST /app HTTP/1.1\nHost: a\nTransfer-ENCODING: chunked\nTrailer: X-Sum\nConnection: close\n\n2\nok\n0\nX-SUM: 1\n\n",
];

const ANSWER: &str = "HTTP/1.1 200 Very fine\r\nX-OWN: 1\r\nx-Own: 2\r\nTransfer-ENCODING: chunked\r\nTrailer: X-SUM\r\n\r\n2\r\nok\r\n0\r\nX-SUM: 2\r\n\r\n";

fn preserve(fields: &str) -> String {
    format!(
        "header_key_format: {{stateful_formatter: {{name: preserve_case, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.http.header_formatters.preserve_case.v3.PreserveCaseFormatterConfig{fields}}}}}}}"
    )
}

/// The lines of a message, those of its head in order, without what differs from run to run.
fn normal(message: &str) -> String {
    let (head, body) = message.split_once("\r\n\r\n").unwrap_or((message, ""));
    let mut lines: Vec<_> = head.lines().map(str::to_owned).collect();
    for line in &mut lines {
        for told in ["date:", "x-envoy-upstream-service-time:", "x-request-id:"] {
            if line.to_ascii_lowercase().starts_with(told) {
                line.truncate(told.len());
            }
        }
    }
    lines[1..].sort();
    format!("{}\n\n{body}", lines.join("\n"))
}

/// Reads one request, its body included, as it stands; empty at the end of the connection.
fn read_request(stream: &mut BufReader<TcpStream>) -> Result<String> {
    let mut text = String::new();
    while !text.ends_with("\r\n\r\n") {
        if stream.read_line(&mut text)? == 0 {
            return Ok(String::new());
        }
    }
    let lower = text.to_ascii_lowercase();
    if lower.contains("chunked") {
        while !text.ends_with("\r\n\r\n") || !text.contains("\r\n0\r\n") {
            ensure!(stream.read_line(&mut text)? > 0, "cut off: {text}");
        }
    } else if lower.contains("content-length: 2") {
        let mut body = [0; 2];
        stream.read_exact(&mut body)?;
        text.push_str(std::str::from_utf8(&body)?);
    }
    Ok(text)
}

/// What the host saw of each request, and the client of each answer.
fn seen(kind: Kind, manager: &str, cluster: &str) -> Result<Vec<String>> {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&requests);
    let host = server::start(move |stream| {
        let mut stream = BufReader::new(stream);
        loop {
            let request = read_request(&mut stream)?;
            if request.is_empty() {
                return Ok(());
            }
            heard.lock().unwrap().push(normal(&request));
            stream.get_mut().write_all(ANSWER.as_bytes())?;
        }
    })?;
    let port = free_port()?;
    let protocol = format!(
        "typed_extension_protocol_options: {{envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {{\"@type\": \
         type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
         {{http_protocol_options: {{{cluster}}}}}}}}}"
    );
    let yaml = Bootstrap::new()
        .http(port, ROUTES, &[&format!("http_protocol_options: {{{manager}}}"), "delayed_close_timeout: 0.1s"])
        .cluster("app", &[host], &[&protocol])
        .yaml();
    let _daemon = Daemon::start(kind, &yaml)?;
    let mut all = Vec::new();
    for request in REQUESTS {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(request.replace('\n', "\r\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(!answer.is_empty(), "no answer to {request}");
        all.extend(requests.lock().unwrap().drain(..));
        all.push(normal(&answer));
    }
    Ok(all)
}

fn beside_envoy(manager: &str, cluster: &str) -> Result<String> {
    let (envoy, culvert) = (seen(Kind::Envoy, manager, cluster)?, seen(Kind::Culvert, manager, cluster)?);
    for (culvert, envoy) in culvert.iter().zip(&envoy) {
        assert_eq!(culvert, envoy, "with {manager} and {cluster}");
    }
    assert_eq!(culvert.len(), envoy.len());
    Ok(culvert.join("\n"))
}

#[test]
fn names_are_kept_in_their_case() -> Result<()> {
    let all = beside_envoy(&preserve(""), &preserve(""))?;
    ensure!(all.contains("\nUSER-agent: Me\n") && all.contains("\nX-OWN: 2\n"), "{all}");
    ensure!(all.contains("\nx-new-one: a-b: c\n") && all.contains("HTTP/1.1 200 OK\n"), "{all}");
    Ok(())
}

#[test]
fn names_of_requests_alone_and_the_proxys_own_in_proper_case() -> Result<()> {
    let all = beside_envoy(&preserve(", formatter_type_on_envoy_headers: PROPER_CASE"), "")?;
    ensure!(all.contains("\nUSER-agent: Me\n") && all.contains("\nX-New-One: a-b: c\n"), "{all}");
    ensure!(all.contains("\nx-own: 2\n"), "{all}");
    Ok(())
}

#[test]
fn names_and_reasons_of_responses_alone() -> Result<()> {
    let all = beside_envoy("header_key_format: {proper_case_words: {}}", &preserve(", forward_reason_phrase: true"))?;
    ensure!(all.contains("HTTP/1.1 200 Very fine\n") && all.contains("\nX-OWN: 2\n"), "{all}");
    ensure!(all.contains("\nuser-agent: Me\n"), "{all}");
    Ok(())
}

#[test]
fn names_in_proper_case_for_the_host() -> Result<()> {
    let all = beside_envoy("", "header_key_format: {proper_case_words: {}}")?;
    ensure!(all.contains("\nUser-Agent: Me\n"), "{all}");
    Ok(())
}

#[test]
fn trailers_pass_where_both_sides_have_them() -> Result<()> {
    let all = beside_envoy("enable_trailers: true", "enable_trailers: true")?;
    ensure!(all.contains("\r\nx-sum: 1\r\n") && all.contains("\r\nx-sum: 2\r\n"), "{all}");
    let none = beside_envoy("enable_trailers: true", "")?;
    ensure!(!none.contains("x-sum: "), "{none}");
    let none = beside_envoy("", "enable_trailers: true")?;
    ensure!(!none.contains("x-sum: "), "{none}");
    Ok(())
}
