//! `http_protocol_options` of a connection manager, beside the real Envoy: what is on the wire is compared, names in their case.

use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::http1::Request;
use culvert_tests::server;

const ROUTES: &str = r#"
- name: all
  domains: ["*"]
  response_headers_to_add: [{header: {key: x-b2b_name.c1d, value: "a-b: c"}}]
  routes:
  - {match: {prefix: /direct}, direct_response: {status: 201, body: {inline_string: here}}}
  - {match: {prefix: /}, route: {cluster: app}}
"#;

const REQUESTS: [&str; 12] = [
    "GET /direct HTTP/1.1\nhost: a\nconnection: close\n\n",
    "GET /app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "HEAD /app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "POST /app HTTP/1.1\nhost: a\nexpect: 100-continue\ncontent-length: 2\nconnection: close\n\nok",
    "GET http://b/app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "GET https://b/app?x=y HTTP/1.1\nhost: a\nconnection: close\n\n",
    "BREW /app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "get /app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "x-tea /app HTTP/1.1\nhost: a\ncontent-length: 2\nconnection: close\n\nok",
    "B(EW /app HTTP/1.1\nhost: a\nconnection: close\n\n",
    "BREW /app HTTP/1.1\nhost: a\ncontent-length: 2\ntransfer-encoding: chunked\nconnection: close\n\n0\n\n",
    "nonsense\n\n",
];

/// What a client reads of the answer, its lines in order of their names, and what the host was asked.
fn answer(port: u16, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(request.replace('\n', "\r\n").as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    for line in &mut lines {
        for told in ["date:", "x-envoy-upstream-service-time:"] {
            if line.to_ascii_lowercase().starts_with(told) {
                line.truncate(told.len());
            }
        }
    }
    ensure!(!lines.is_empty(), "no answer");
    lines[1..].sort();
    Ok(lines.join("\n"))
}

fn seen(kind: Kind, options: &str) -> Result<Vec<String>> {
    let host = server::start(|stream| {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            let text = format!("{} {} of {:?}", request.method, request.target, request.headers.get("host"));
            let length = text.len();
            let text = if request.method == "HEAD" { String::new() } else { text };
            let answer = format!("HTTP/1.1 200 OK\r\nx-own: 1\r\nETag: x\r\ncontent-length: {length}\r\n\r\n{text}");
            stream.get_mut().write_all(answer.as_bytes())?;
        }
        Ok(())
    })?;
    let port = free_port()?;
    let options = format!("http_protocol_options: {options}");
    let yaml = Bootstrap::new()
        .http(port, ROUTES, &[&options, "delayed_close_timeout: 0.1s"])
        .cluster("app", &[host], &[])
        .yaml();
    let daemon = Daemon::start(kind, &yaml)?;
    let mut answers = Vec::new();
    for request in REQUESTS {
        let answer = answer(port, request).unwrap_or_else(|error| format!("no answer: {error}"));
        answers.push(format!("{request}-> {answer}"));
    }
    let stats = daemon.stats()?;
    for name in ["downstream_rq_non_relative_path", "downstream_cx_protocol_error"] {
        answers.push(format!("{name} {}", stats.get(&format!("http.ingress.{name}"))));
    }
    Ok(answers)
}

fn beside_envoy(options: &str) -> Result<Vec<String>> {
    let (envoy, culvert) = (seen(Kind::Envoy, options)?, seen(Kind::Culvert, options)?);
    for (culvert, envoy) in culvert.iter().zip(&envoy) {
        assert_eq!(culvert, envoy, "with {options}");
    }
    Ok(culvert)
}

#[test]
fn names_of_headers_in_proper_case() -> Result<()> {
    let answers = beside_envoy("{header_key_format: {proper_case_words: {}}}")?;
    ensure!(answers[1].contains("\nX-B2b_Name.C1d: a-b: c"), "{}", answers[1]);
    Ok(())
}

#[test]
fn custom_methods() -> Result<()> {
    let answers = beside_envoy("{allow_custom_methods: true}")?;
    ensure!(answers[6].contains("BREW /app of"), "{}", answers[6]);
    Ok(())
}

#[test]
fn urls_as_targets() -> Result<()> {
    let answers = beside_envoy("{allow_absolute_url: false}")?;
    ensure!(answers[4].contains(" 404 "), "{}", answers[4]);
    beside_envoy("{allow_absolute_url: true}").map(|_| ())
}
