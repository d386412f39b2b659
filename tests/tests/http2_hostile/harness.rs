//! Sends the same frames to culvertd and to the real Envoy, and compares.

use std::collections::BTreeMap;
use std::io::BufReader;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::server;
use culvert_tests::wait_until;

use super::wire::{self, Connection, DATA, END_STREAM, GOAWAY, HEADERS, Nothing, RST_STREAM};

/// A stream that nothing is wrong with, after those of the case.
pub const PROBE: u32 = 1001;

/// What is expected of culvertd.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// What Envoy does; or, where Envoy refuses, an error with this code, for the stream or for the connection, and that it is
    /// counted. Envoy closes the whole connection for most, and often without a word.
    AsEnvoy(&'static str),
    /// Something else: what, and why.
    Own(&'static str, &'static str),
}

/// Frames to send.
pub struct Case {
    pub name: &'static str,
    pub bytes: Vec<u8>,
    pub expect: Expect,
    /// The stream whose end is waited for; 0: none.
    pub stream: u32,
    /// Its frames begin with a request that nothing is wrong with.
    pub begins_well: bool,
    /// What is wrong is wrong with stream 1 alone (RFC 9113, section 8.1.1): the connection goes on.
    pub alone: bool,
}

/// Frames after which stream 1 ends.
pub fn case(name: &'static str, frames: &[Vec<u8>]) -> Case {
    let expect = Expect::AsEnvoy("PROTOCOL_ERROR");
    Case { name, bytes: frames.concat(), expect, stream: 1, begins_well: false, alone: false }
}

/// The headers of a GET.
pub fn get<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut fields = vec![(":method", "GET"), (":scheme", "http"), (":path", "/app"), (":authority", "a")];
    fields.extend_from_slice(more);
    fields
}

/// The headers of a POST.
pub fn post<'a>(more: &[(&'a str, &'a str)]) -> Vec<(&'a str, &'a str)> {
    let mut fields = get(more);
    fields[0].1 = "POST";
    fields
}

/// A GET on stream 1 with these headers, and no others.
pub fn request(name: &'static str, fields: &[(&str, &str)]) -> Case {
    case(name, &[wire::headers(1, true, fields)]).alone()
}

impl Case {
    pub fn own(mut self, what: &'static str, why: &'static str) -> Case {
        self.expect = Expect::Own(what, why);
        self
    }

    /// Stream 1 does not end because of it.
    pub fn open(mut self) -> Case {
        self.stream = 0;
        self
    }

    /// What is refused is refused with this code.
    pub fn code(mut self, code: &'static str) -> Case {
        self.expect = Expect::AsEnvoy(code);
        self
    }

    /// Only stream 1 may suffer from it.
    pub fn alone(mut self) -> Case {
        self.alone = true;
        self
    }

    /// Its frames begin with a request that nothing is wrong with.
    pub fn begins_well(mut self) -> Case {
        self.begins_well = true;
        self
    }
}

/// A host that writes down the requests that reach it whole.
#[derive(Clone, Default)]
pub struct Host(Arc<Mutex<Vec<String>>>);

impl Host {
    fn start(&self) -> Result<u16> {
        let host = self.clone();
        server::start(move |stream| host.serve(stream))
    }

    fn serve(&self, stream: TcpStream) -> Result<()> {
        let mut stream = BufReader::new(stream);
        while let Some(request) = Request::read(&mut stream)? {
            if request.target != "/probe" {
                let mut fields: Vec<_> =
                    request.headers.0.iter().map(|(name, value)| format!("{name}: {value}")).collect();
                fields.retain(|field| !field.starts_with("x-request-id") && !field.starts_with("x-forwarded-proto"));
                fields.sort();
                let (method, target, body) = (&request.method, &request.target, String::from_utf8_lossy(&request.body));
                let seen = format!("{method} {target} {} {body:?}", fields.join("|"));
                self.0.lock().unwrap_or_else(PoisonError::into_inner).push(seen);
            }
            if request.target == "/hang" {
                // Until the other side has had enough.
                drop(Request::read(&mut stream));
                return Ok(());
            }
            let body = request.target.strip_prefix("/bytes/").and_then(|bytes| bytes.parse().ok()).unwrap_or(2);
            Response::new(200, "text/plain", vec![b'x'; body]).write(stream.get_mut(), false)?;
        }
        Ok(())
    }

    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

pub struct Stage {
    pub proxy: Daemon,
    pub port: u16,
    pub host: Host,
}

impl Stage {
    /// With further lines for the connection manager.
    pub fn start(kind: Kind, manager: &[&str]) -> Result<Stage> {
        let host = Host::default();
        let (upstream, port) = (host.start()?, free_port()?);
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /bytes/1000}, route: {cluster: app, flush_timeout: 0.5s}}, \
                      {match: {prefix: /}, route: {cluster: app}}]}";
        let yaml = Bootstrap::new().http(port, routes, manager).cluster("app", &[upstream], &[]).yaml();
        Ok(Stage { proxy: Daemon::start(kind, &yaml)?, port, host })
    }

    /// What a client sees, and what the host saw.
    pub fn outcome(&self, case: &Case) -> Result<String> {
        self.host.take();
        let mut connection = Connection::open(self.port, &[])?;
        let mut probe = get(&[]);
        probe[2].1 = "/probe";
        connection.send(&[case.bytes.clone(), wire::headers(PROBE, true, &probe)].concat())?;
        let (seen, connection) = watch(&mut connection, &[case.stream, PROBE])?;
        let mut text: String = seen
            .iter()
            .filter(|(stream, _)| **stream != PROBE)
            .map(|(stream, seen)| format!("stream {stream}: {seen}; "))
            .collect();
        let probe = seen.get(&PROBE).map_or("unanswered", |seen| seen.as_str());
        text += &match (connection.as_str(), probe) {
            ("open", "200 end") => "the connection serves".to_owned(),
            ("open", probe) => format!("the connection is open, the next stream: {probe}"),
            (state, _) => state.to_owned(),
        };
        let forwarded = self.host.take();
        if !forwarded.is_empty() {
            text += &format!("; forwarded: {}", forwarded.join(", "));
        }
        Ok(text)
    }
}

/// Reads until these streams have ended, or the connection has: what came for each stream, and what of the connection.
pub fn watch(connection: &mut Connection, streams: &[u32]) -> Result<(BTreeMap<u32, String>, String)> {
    let until = Instant::now() + Duration::from_secs(5);
    let mut seen: BTreeMap<u32, String> = BTreeMap::new();
    let ended = |seen: &BTreeMap<u32, String>, stream: &u32| {
        seen.get(stream).is_some_and(|seen| seen.ends_with("end") || seen.contains("reset"))
    };
    while !streams.iter().filter(|stream| **stream != 0).all(|stream| ended(&seen, stream)) {
        let frame = match connection.receive(until)? {
            Ok(frame) => frame,
            Err(Nothing::Closed) => return Ok((seen, "closed".to_owned())),
            Err(Nothing::Late) => break,
        };
        let mut add = |what: &str| {
            let seen = seen.entry(frame.stream).or_default();
            if !seen.is_empty() {
                *seen += " ";
            }
            *seen += what;
        };
        match frame.kind {
            HEADERS => add(&frame.status().map_or("trailers".to_owned(), |status| status.to_string())),
            RST_STREAM => add(&format!("reset {}", code(frame.number(0)))),
            GOAWAY => match code(frame.number(4)) {
                "NO_ERROR" => {}
                code => return Ok((seen, format!("goaway {code}"))),
            },
            _ => {}
        }
        if matches!(frame.kind, HEADERS | DATA) && frame.flags & END_STREAM != 0 {
            add("end");
        }
    }
    Ok((seen, "open".to_owned()))
}

fn code(code: Option<u32>) -> &'static str {
    const CODES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
    code.and_then(|code| CODES.get(code as usize)).copied().unwrap_or("?")
}

/// Counters that must come to the same where all outcomes do.
const COUNTERS: [&str; 4] = [
    "http.ingress.downstream_rq_2xx",
    "http.ingress.downstream_rq_4xx",
    "http.ingress.downstream_rq_total",
    "http2.requests_rejected_with_underscores_in_headers",
];

/// Whether the client got an error, and no answer.
fn refuses(outcome: &str) -> bool {
    ["closed", "goaway"].iter().any(|end| outcome.starts_with(end)) || outcome.contains("reset")
}

/// Fails with all cases in which the two differ, or culvertd does otherwise than is said.
pub fn compare(cases: &[Case], manager: &[&str]) -> Result<()> {
    // For work on one case.
    let only = std::env::var("ONLY").unwrap_or_default();
    let cases: Vec<_> = cases.iter().filter(|case| case.name.contains(&only)).collect();
    let (envoy, culvert) = (Stage::start(Kind::Envoy, manager)?, Stage::start(Kind::Culvert, manager)?);
    let mut wrong = Vec::new();
    for case in &cases {
        let before = (envoy.proxy.stats()?, culvert.proxy.stats()?);
        let (expected, seen) = (envoy.outcome(case)?, culvert.outcome(case)?);
        let mut differ = |why: &str| {
            wrong.push(format!("--- {}: {why}\nEnvoy:    {expected}\nculvertd: {seen}", case.name));
        };
        match case.expect {
            Expect::AsEnvoy(_) if seen == expected && !refuses(&seen) => {
                let counted = wait_until(Duration::from_secs(3), "the same counters", || {
                    let after = (envoy.proxy.stats()?, culvert.proxy.stats()?);
                    for name in COUNTERS {
                        let envoys = after.0.get(name) - before.0.get(name);
                        let own = after.1.get(name) - before.1.get(name);
                        ensure!(own == envoys, "{name}: Envoy {envoys}, culvertd {own}");
                    }
                    Ok(())
                });
                counted.unwrap_or_else(|error| differ(&format!("{error:#}")));
            }
            Expect::AsEnvoy(code) if refuses(&expected) => {
                let reset = format!("stream 1: reset {code}; the connection serves");
                let goaway = format!("goaway {code}");
                let (seen, forwarded) =
                    seen.split_once("; forwarded").map_or((&*seen, false), |(seen, _)| (seen, true));
                let refused = seen == reset || !case.alone && seen == goaway;
                if !refused || forwarded && !case.begins_well {
                    differ("not refused as it should be");
                    continue;
                }
                let counted = wait_until(Duration::from_secs(3), "its counter", || {
                    let after = culvert.proxy.stats()?;
                    let names = [
                        "http.ingress.downstream_cx_protocol_error",
                        "http2.requests_rejected_with_underscores_in_headers",
                        "http2.tx_reset",
                    ];
                    let counted = names.iter().any(|name| after.get(name) > before.1.get(name));
                    ensure!(counted, "not counted");
                    Ok(())
                });
                counted.unwrap_or_else(|error| differ(&format!("{error:#}")));
            }
            Expect::AsEnvoy(_) => differ("not as Envoy"),
            Expect::Own(own, why) => {
                if seen != own || seen == expected {
                    differ(&format!("expected {own}: {why}"));
                }
            }
        }
    }
    ensure!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    Ok(())
}

/// Fails with all cases in which one of the two resets the stream alone, and the other does not.
pub fn compare_resets(cases: &[Case], manager: &[&str]) -> Result<()> {
    let (envoy, culvert) = (Stage::start(Kind::Envoy, manager)?, Stage::start(Kind::Culvert, manager)?);
    let mut wrong = Vec::new();
    for case in cases {
        let (expected, seen) = (envoy.outcome(case)?, culvert.outcome(case)?);
        let alone = |outcome: &str| outcome.contains("reset") && outcome.ends_with("the connection serves");
        if alone(&expected) != alone(&seen) {
            wrong.push(format!("--- {}\nEnvoy:    {expected}\nculvertd: {seen}", case.name));
        }
    }
    ensure!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    Ok(())
}

/// Holds what becomes of culvertd's streams against what becomes of Envoy's, line by line.
pub fn compare_outcomes(outcomes: fn(Kind) -> Result<Vec<String>>) -> Result<()> {
    let envoy = thread::spawn(move || outcomes(Kind::Envoy));
    let culvert = outcomes(Kind::Culvert)?;
    let envoy = envoy.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
    let different: Vec<String> = envoy
        .iter()
        .zip(&culvert)
        .filter(|(theirs, ours)| theirs != ours)
        .map(|(theirs, ours)| format!("Envoy:    {theirs}\nculvertd: {ours}"))
        .collect();
    ensure!(different.is_empty(), "{} of {}:\n{}", different.len(), envoy.len(), different.join("\n"));
    Ok(())
}
