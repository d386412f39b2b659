//! Hosts that say GOAWAY while requests to them are tried again and hedged: what clients get and what hosts see, beside the real Envoy.

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port};
use culvert_tests::{server, wait_until};

use super::wire::{END_HEADERS, END_STREAM, Frame, GOAWAY, HEADERS, Served, frame, headers, reset};

/// What a host does with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Answers it.
    Answer(u16),
    /// Never answers.
    Silent,
    /// Answers it after so many milliseconds.
    Late(u64, u16),
    /// Says that it is the last one, and answers it.
    LastAnswer(u16),
    /// The same; the answer comes so many milliseconds later.
    LastLate(u64, u16),
    /// Says that it was not looked at, and nothing more.
    Unseen,
    /// The same, and the stream is refused as well.
    UnseenRefused,
    /// The same, with an error, and closes.
    UnseenError,
    /// Says that it is the last one, with an error, and closes.
    LastError,
    /// Answers with a head, says that it is the last one, with an error, and closes.
    HeadError,
}

/// The steps that are left, and what came: each request's connection and what was done.
#[derive(Debug, Default)]
struct Script {
    steps: VecDeque<Step>,
    connections: usize,
    seen: Vec<String>,
}

fn lock(script: &Mutex<Script>) -> std::sync::MutexGuard<'_, Script> {
    script.lock().unwrap_or_else(PoisonError::into_inner)
}

fn goaway(last: u32, error: u32) -> Vec<u8> {
    frame(GOAWAY, 0, 0, &[last.to_be_bytes(), error.to_be_bytes()].concat())
}

fn answer(stream: u32, status: u16) -> Vec<u8> {
    headers(stream, true, &[(":status", &status.to_string())])
}

fn serve(socket: TcpStream, script: &Mutex<Script>) -> Result<()> {
    let connection = {
        let mut script = lock(script);
        script.connections += 1;
        script.connections
    };
    let mut host = Served::begin(socket, &[])?;
    while let Some(Frame { kind, flags, stream, .. }) = host.next()? {
        if kind != HEADERS {
            continue;
        }
        ensure!(flags & (END_HEADERS | END_STREAM) == END_HEADERS | END_STREAM, "more than a head");
        let step = {
            let mut script = lock(script);
            let step = script.steps.pop_front().unwrap_or(Step::Answer(200));
            script.seen.push(format!("connection {connection}: {step:?}"));
            step
        };
        let before = stream.saturating_sub(2);
        match step {
            Step::Answer(status) => host.send(&answer(stream, status))?,
            Step::Silent => {}
            Step::LastAnswer(status) => {
                host.send(&[goaway(stream, 0), answer(stream, status)].concat())?;
            }
            Step::Late(delay, status) | Step::LastLate(delay, status) => {
                if let Step::LastLate(..) = step {
                    host.send(&goaway(stream, 0))?;
                }
                let mut socket = host.0.try_clone()?;
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(delay));
                    // Nobody may wait for it any more.
                    let _ = socket.write_all(&answer(stream, status));
                });
            }
            Step::Unseen => host.send(&goaway(before, 0))?,
            Step::UnseenRefused => host.send(&[goaway(before, 0), reset(stream, 7)].concat())?,
            Step::UnseenError => {
                host.send(&goaway(before, 2))?;
                return Ok(());
            }
            Step::LastError => {
                host.send(&goaway(stream, 2))?;
                return Ok(());
            }
            Step::HeadError => {
                let head = headers(stream, false, &[(":status", "200")]);
                host.send(&[head, goaway(stream, 2)].concat())?;
                return Ok(());
            }
        }
    }
    Ok(())
}

const HEDGED: &str = "timeout: 3s, hedge_policy: {hedge_on_per_try_timeout: true}, \
                      retry_policy: {retry_on: 5xx, num_retries: 2, per_try_timeout: 0.4s, retry_back_off: {base_interval: 0.01s}}";

fn actions() -> Vec<(&'static str, String)> {
    let retries = |on: &str| {
        format!(
            "timeout: 3s, retry_policy: {{retry_on: \"{on}\", num_retries: 2, retry_back_off: {{base_interval: 0.01s}}}}"
        )
    };
    vec![
        ("none", "timeout: 3s".to_owned()),
        ("5xx", retries("5xx")),
        ("refused", retries("refused-stream")),
        ("connect", retries("connect-failure")),
        ("reset", retries("reset")),
        ("before", retries("reset-before-request")),
        ("hedged", HEDGED.to_owned()),
    ]
}

fn scripts() -> Vec<(&'static str, Vec<Step>)> {
    use Step::*;
    let all: [&[Step]; 13] = [
        &[Answer(200), Answer(200)],
        &[LastAnswer(200), Answer(201)],
        &[LastAnswer(503), Answer(200)],
        &[LastLate(200, 200), Answer(201)],
        &[LastLate(200, 503), Answer(200)],
        &[UnseenRefused, Answer(200)],
        &[UnseenRefused, UnseenRefused, Answer(200)],
        &[UnseenError, Answer(200)],
        &[LastError, Answer(200)],
        &[LastError, LastError, Answer(200)],
        &[HeadError, Answer(200)],
        &[Unseen, Answer(200)],
        &[LastError, UnseenError, UnseenRefused],
    ];
    let hedges: [&[Step]; 7] = [
        &[Silent, Answer(200)],
        &[Silent, LastAnswer(200)],
        &[Silent, LastError, Answer(200)],
        &[LastLate(700, 200), Answer(503), Answer(503)],
        &[LastLate(700, 201), Late(600, 200)],
        &[Silent, UnseenRefused, Answer(200)],
        &[Late(700, 201), LastLate(100, 503), LastError],
    ];
    let of_all = all.iter().flat_map(|steps| {
        ["none", "5xx", "refused", "connect", "reset", "before"].map(|action| (action, steps.to_vec()))
    });
    of_all.chain(hedges.iter().chain(&all).map(|steps| ("hedged", steps.to_vec()))).collect()
}

/// What clients get and hosts see, by script.
fn outcomes(kind: Kind) -> Result<Vec<String>> {
    let script = Arc::new(Mutex::new(Script::default()));
    let shared = Arc::clone(&script);
    let (upstream, port) = (server::start(move |socket| serve(socket, &shared))?, free_port()?);
    let routes: Vec<String> = actions()
        .iter()
        .map(|(name, action)| format!("{{match: {{prefix: /{name}}}, route: {{cluster: app, {action}}}}}"))
        .collect();
    let hosts = format!(
        "- {{name: all, domains: [\"*\"], include_attempt_count_in_response: true, routes: [{}]}}",
        routes.join(", ")
    );
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    let proxy =
        Daemon::start(kind, &Bootstrap::new().http(port, &hosts, &[]).cluster("app", &[upstream], &[http2]).yaml())?;
    let mut outcomes = Vec::new();
    for (action, steps) in scripts() {
        {
            let mut script = lock(&script);
            *script = Script { steps: steps.clone().into(), connections: 0, seen: Vec::new() };
        }
        let request = format!("GET /{action} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answered = fetch_raw(port, request.as_bytes(), "GET").map_or_else(
            |_| "no whole answer".to_owned(),
            |response| {
                let attempts = response.headers.get("x-envoy-attempt-count").unwrap_or("-").to_owned();
                format!("{}, attempts {attempts}, {:?}", response.status, response.text())
            },
        );
        // Whether a connection is one more or one that was there hangs on the script before.
        let seen: Vec<String> = {
            let script = lock(&script);
            let what = script.seen.iter().filter_map(|line| Some(line.split_once(": ")?.1.to_owned()));
            what.collect()
        };
        outcomes.push(format!("{action} {steps:?}: {answered}; {}", seen.join(", ")));
        // The next script has the host to itself.
        lock(&script).steps.clear();
        fetch_raw(port, b"GET /none HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "GET")
            .context("it serves no more")?;
    }
    let stats = proxy.stats()?;
    for name in ["upstream_rq_active", "upstream_rq_pending_active"] {
        ensure!(stats.get(&format!("cluster.app.{name}")) == 0, "{kind:?}: {name} is not 0");
    }
    Ok(outcomes)
}

/// Whether Envoy loses the request, of which the host has said that it has not looked at it.
fn is_lost(action: &str, steps: &[Step]) -> bool {
    let unseen = matches!(steps, [Step::Unseen | Step::UnseenRefused | Step::UnseenError, ..]);
    unseen && ["none", "connect", "before"].contains(&action)
}

pub fn side_by_side() -> Result<()> {
    let envoy = thread::spawn(move || outcomes(Kind::Envoy));
    let culvert = outcomes(Kind::Culvert)?;
    let envoy = envoy.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    let (mut different, mut lost) = (Vec::new(), 0);
    for ((action, steps), (theirs, ours)) in scripts().iter().zip(envoy.iter().zip(&culvert)) {
        let mut wanted = theirs.clone();
        if is_lost(action, steps) {
            ensure!(theirs.contains(": 503, "), "Envoy does not lose it: {theirs}");
            lost += 1;
            // culvertd loses the first one of a host, and has seen then that this happens.
            if lost > 1 {
                let seen: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
                wanted = format!("{action} {steps:?}: 200, attempts 1, \"\"; {}", seen.join(", "));
            }
        }
        if wanted != *ours {
            different.push(format!("Envoy:    {theirs}\nculvertd: {ours}"));
        }
    }
    ensure!(different.is_empty(), "{} of {}:\n{}", different.len(), envoy.len(), different.join("\n"));
    Ok(())
}

/// Requests that are moved are not held against the host that goes away from them; those that fail are.
pub fn moved_requests_are_not_the_hosts_fault() -> Result<()> {
    let script = Arc::new(Mutex::new(Script::default()));
    let shared = Arc::clone(&script);
    let (upstream, port) = (server::start(move |socket| serve(socket, &shared))?, free_port()?);
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    // It is only looked for: a host that was ejected would be left alone.
    let outliers = "outlier_detection: {consecutive_5xx: 3, enforcing_consecutive_5xx: 0}";
    let hosts = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    let bootstrap = Bootstrap::new().http(port, hosts, &[]).cluster("app", &[upstream], &[http2, outliers]);
    let proxy = Daemon::start_with(Kind::Culvert, &bootstrap.yaml(), &["--concurrency", "1"])?;
    let ask = |steps: &[Step]| -> Result<u16> {
        lock(&script).steps = steps.iter().copied().collect();
        let answer = fetch_raw(port, b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n", "GET")?;
        Ok(answer.status)
    };
    let unseen = Step::UnseenRefused;
    // The first one is lost: nobody has kept it.
    ensure!(ask(&[unseen])? == 503 && ask(&[Step::Answer(200)])? == 200);
    for _ in 0..5 {
        ensure!(ask(&[unseen, unseen, unseen, Step::Answer(200)])? == 200, "it is not moved");
    }
    // As often as it may be moved, and once more.
    for _ in 0..3 {
        ensure!(ask(&[unseen; 4])? == 503, "it is moved too often");
    }
    let detected = "cluster.app.outlier_detection.ejections_detected_consecutive_5xx";
    let count = wait_until(Duration::from_secs(30), "what fails is counted", || {
        let count = proxy.stats()?.get(detected);
        ensure!(count > 0);
        Ok(count)
    })?;
    ensure!(count == 1, "{count} times in a row, and not once");
    Ok(())
}
