//! A service that speaks HTTP/2, and fails in the ways that HTTP/1.1 does not have; and what is tried again of that.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use bytes::Bytes;
use culvert_tests::{
    http1::{Headers, Request},
    server,
};
use h2::Reason;

use super::harness::{Case, case};
use super::upstream::Seen;

/// Starts the service; returns its port.
///
/// `x-do` is as with the others, and a step may be `refused`, `cancel`, `internal` (the stream is reset so), or `late` (it is reset after the
/// head of an answer). `+delay=` comes before the answer.
pub fn start(name: &'static str, seen: Arc<Seen>) -> Result<u16> {
    server::start_async(move |stream| serve(name, stream, Arc::clone(&seen)))
}

async fn serve(name: &'static str, stream: tokio::net::TcpStream, seen: Arc<Seen>) -> Result<()> {
    let mut connection = h2::server::handshake(stream).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        let (parts, mut body) = request.into_parts();
        let mut headers = Headers::default();
        for (name, value) in &parts.headers {
            headers.push(name.as_str(), value.to_str().unwrap_or_default());
        }
        let path = parts.uri.path_and_query().map_or("", |path| path.as_str()).to_owned();
        let wanted = headers.get("x-do").unwrap_or("200").to_owned();
        let mut noted = Request { method: parts.method.to_string(), target: path, headers, body: Vec::new() };
        if !body.is_end_stream() {
            // What a connection says goes on only while it is asked.
            let read = async {
                let mut all = Vec::new();
                while let Some(data) = body.data().await {
                    let data = data?;
                    body.flow_control().release_capacity(data.len())?;
                    all.extend_from_slice(&data);
                }
                Ok::<_, anyhow::Error>(all)
            };
            tokio::pin!(read);
            noted.body = tokio::select! {
                all = &mut read => all?,
                closed = std::future::poll_fn(|cx| connection.poll_closed(cx)) => return Ok(closed?),
            };
        }
        let before = seen.note(name, &noted);
        let steps: Vec<&str> = wanted.split(',').map(str::trim).collect();
        let mut words = steps[before.min(steps.len() - 1)].split('+');
        let what = words.next().unwrap_or_default().to_owned();
        let fields: Vec<(String, String)> = words
            .filter_map(|word| word.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect();
        match what.as_str() {
            "refused" => respond.send_reset(Reason::REFUSED_STREAM),
            "cancel" => respond.send_reset(Reason::CANCEL),
            "internal" => respond.send_reset(Reason::INTERNAL_ERROR),
            "late" => {
                let response = http::Response::builder().status(200).body(()).context("a response")?;
                let mut stream = respond.send_response(response, false)?;
                stream.send_reset(Reason::INTERNAL_ERROR);
            }
            status => {
                let mut response = http::Response::builder().status(status);
                let mut delay = 0;
                for (name, value) in &fields {
                    match name.as_str() {
                        "delay" => delay = value.parse()?,
                        name => response = response.header(name, value),
                    }
                }
                let response = response.body(())?;
                let head = noted.method == "HEAD";
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(delay)).await;
                    let mut stream = respond.send_response(response, head)?;
                    if !head {
                        stream.send_data(Bytes::from(format!("from {name}\n")), true)?;
                    }
                    anyhow::Ok(())
                });
            }
        }
    }
    Ok(())
}

const FAILURES: [&str; 17] = [
    "GET /\nx-do: 200",
    "GET /\nx-do: refused,200",
    "GET /\nx-do: refused,refused,200",
    "GET /\nx-do: cancel,200",
    "GET /\nx-do: internal,200",
    "GET /\nx-do: late,200",
    "GET /\nx-do: 503,200",
    "GET /\nx-do: 503,refused,200",
    "GET /\nx-do: 200+grpc-status=14,200\ncontent-type: application/grpc",
    "GET /\nx-do: refused,200\ncontent-type: application/grpc",
    "GET /\nx-do: internal\ncontent-type: application/grpc",
    "POST /\nx-do: refused,200\n\nthe body",
    "POST /\nx-do: 503,200\n\nthe body",
    "POST /\nx-do: internal,200\n\nthe body",
    "HEAD /\nx-do: refused,200",
    "HEAD /\nx-do: 503,200",
    "GET /\nx-do: 409,200",
];

pub fn cases() -> Vec<Case> {
    let to = |name: &'static str, policy: &str, requests: &[&str]| {
        let route =
            format!("- {{match: {{prefix: /}}, route: {{cluster: h2, timeout: 3s, retry_policy: {{{policy}}}}}}}");
        case(name, &route, requests)
            .of_host("include_request_attempt_count: true")
            .of_host("include_attempt_count_in_response: true")
    };
    let mut cases: Vec<Case> = [
        ("over HTTP/2: 5xx", "retry_on: 5xx"),
        ("over HTTP/2: gateway-error", "retry_on: gateway-error"),
        ("over HTTP/2: reset", "retry_on: reset"),
        ("over HTTP/2: reset-before-request", "retry_on: reset-before-request"),
        ("over HTTP/2: refused-stream", "retry_on: refused-stream"),
        ("over HTTP/2: connect-failure", "retry_on: connect-failure"),
        ("over HTTP/2: retriable-4xx", "retry_on: retriable-4xx"),
        ("over HTTP/2: unavailable", "retry_on: unavailable"),
        ("over HTTP/2: two retries", "retry_on: \"refused-stream,5xx\", num_retries: 2"),
        ("over HTTP/2: nothing", "num_retries: 2"),
    ]
    .iter()
    .map(|(name, policy)| to(name, policy, &FAILURES))
    .collect();
    let late =
        ["GET /\nx-do: 200+delay=900,200", "POST /\nx-do: 200+delay=900,200\n\nbody", "GET /\nx-do: 200+delay=900"];
    cases.push(to("over HTTP/2: per_try_timeout", "retry_on: 5xx, per_try_timeout: 0.3s", &late).settle(1));
    cases.push(to("over HTTP/2: per_try_idle_timeout", "retry_on: 5xx, per_try_idle_timeout: 0.3s", &late).settle(1));
    let long = format!("POST /\nx-do: refused,200\n\n{}", "x".repeat(1500));
    cases.push(
        to(
            "over HTTP/2: a body over the limit",
            "retry_on: \"refused-stream,5xx\"",
            &[&long, "POST /\nx-do: refused,200\n\nbody"],
        )
        .of_host("request_body_buffer_limit: 1000"),
    );
    cases
}
