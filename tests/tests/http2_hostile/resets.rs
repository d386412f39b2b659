//! Streams that end before their time: who is said to have reset them, beside the real Envoy.

use std::io::Write as _;
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port};
use culvert_tests::{server, wait_until};

use super::wire::{Frame, HEADERS, Served, data, frame, headers, reset};

const DEADLINE: Duration = Duration::from_secs(30);

/// What a host does with each request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    Answer,
    /// Resets with this code.
    Reset(u32),
    /// Answers with a head, and resets with this code.
    HeadReset(u32),
    /// Answers with a head and a part of the body, and resets with this code.
    PartReset(u32),
    /// Sends what is no frame of a stream that there is.
    Wrong,
    /// Answers with a head and no more, and the client goes.
    Head,
}

fn serve(socket: TcpStream, does: &Mutex<Does>) -> Result<()> {
    let mut host = Served::begin(socket, &[])?;
    while let Some(Frame { kind, stream, .. }) = host.next()? {
        if kind != HEADERS {
            continue;
        }
        let head = |end| headers(stream, end, &[(":status", "200")]);
        let does = *does.lock().unwrap_or_else(PoisonError::into_inner);
        host.send(&match does {
            Does::Answer => head(true),
            Does::Reset(code) => reset(stream, code),
            Does::HeadReset(code) => [head(false), reset(stream, code)].concat(),
            Does::PartReset(code) => [head(false), data(stream, false, b"part"), reset(stream, code)].concat(),
            Does::Wrong => frame(HEADERS, 5, stream, &[0x84]),
            Does::Head => head(false),
        })?;
    }
    Ok(())
}

fn outcomes(kind: Kind) -> Result<Vec<String>> {
    const NO_ERROR: u32 = 0;
    const REFUSED: u32 = 7;
    const CANCEL: u32 = 8;
    let does = Arc::new(Mutex::new(Does::Answer));
    let shared = Arc::clone(&does);
    let (upstream, port) = (server::start(move |socket| serve(socket, &shared))?, free_port()?);
    let hosts = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /retried}, route: {cluster: app, retry_policy: {retry_on: \
                 \"5xx\", num_retries: 2, retry_back_off: {base_interval: 0.01s}}}}, {match: {prefix: /}, route: {cluster: app}}]}";
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    let bootstrap = Bootstrap::new().http(port, hosts, &[]).cluster("app", &[upstream], &[http2]);
    let daemon = Daemon::start(kind, &bootstrap.yaml())?;
    let counted = || -> Result<[u64; 3]> {
        let stats = daemon.stats()?;
        Ok(["rx_reset", "tx_reset", "rx_reset_no_error"]
            .map(|name| stats.get(&format!("cluster.app.upstream_rq_{name}"))))
    };
    let mut outcomes = Vec::new();
    for (path, step) in [
        ("/", Does::Answer),
        ("/", Does::Reset(CANCEL)),
        ("/", Does::Reset(NO_ERROR)),
        ("/", Does::Reset(REFUSED)),
        ("/retried", Does::Reset(CANCEL)),
        ("/retried", Does::Reset(REFUSED)),
        ("/", Does::HeadReset(CANCEL)),
        ("/", Does::HeadReset(NO_ERROR)),
        ("/", Does::PartReset(CANCEL)),
        ("/", Does::Wrong),
        ("/retried", Does::Wrong),
        ("/", Does::Head),
    ] {
        *does.lock().unwrap_or_else(PoisonError::into_inner) = step;
        let before = counted()?;
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answered = if step == Does::Head {
            let mut client = TcpStream::connect(("127.0.0.1", port))?;
            client.write_all(request.as_bytes())?;
            // The head is there.
            ensure!(client.peek(&mut [0])? == 1);
            "gone".to_owned()
        } else {
            let answer = fetch_raw(port, request.as_bytes(), "GET");
            answer.map_or_else(|_| "no whole answer".to_owned(), |answer| answer.status.to_string())
        };
        wait_until(DEADLINE, "the request to end", || {
            let active = daemon.stats()?.get("cluster.app.upstream_rq_active");
            ensure!(active == 0, "{active} are under way");
            Ok(())
        })?;
        let now = counted()?;
        let new: Vec<u64> = now.iter().zip(before).map(|(now, before)| now - before).collect();
        outcomes.push(format!("{path} {step:?}: {answered}, received, sent, without an error: {new:?}"));
    }
    Ok(outcomes)
}

pub fn side_by_side() -> Result<()> {
    let (envoy, culvert) = (outcomes(Kind::Envoy)?, outcomes(Kind::Culvert)?);
    ensure!(envoy == culvert, "Envoy:\n{}\nculvertd:\n{}", envoy.join("\n"), culvert.join("\n"));
    Ok(())
}
