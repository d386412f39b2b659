//! Hosts whose answers are malformed: what becomes of them, and of the other answers on their connection, beside the real Envoy.

use std::net::TcpStream;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::server;

use super::harness::{compare_outcomes, get, watch};
use super::wire::{self, Connection, END_HEADERS, Frame, HEADERS, Served, data, headers};

const OK: (&str, &str) = (":status", "200");

/// A head with so many headers.
fn fields(count: usize) -> Vec<(&'static str, &'static str)> {
    std::iter::once(OK).chain(std::iter::repeat_n(("x-a", ""), count)).collect()
}

/// What a host answers on a stream, by the request's path.
fn answers(stream: u32) -> Vec<(&'static str, Vec<u8>)> {
    let head = |fields: &[(&str, &str)]| headers(stream, true, fields);
    let then = |frames: &[Vec<u8>]| [headers(stream, false, &[OK]), frames.concat()].concat();
    vec![
        ("/plain", head(&[OK])),
        ("/many", head(&fields(99))),
        ("/too-many", head(&fields(100))),
        ("/trailers", then(&[data(stream, false, b"ok"), headers(stream, true, &[("x-t", "1")])])),
        ("/capitals", head(&[OK, ("X-A", "b")])),
        ("/blank", head(&[OK, ("x a", "b")])),
        ("/line-feed", head(&[OK, ("x-a", "b\nc")])),
        ("/nul", head(&[OK, ("x-a", "b\0c")])),
        ("/pseudo", head(&[OK, (":evil", "b")])),
        ("/late-pseudo", head(&[("x-a", "b"), OK])),
        ("/connection", head(&[OK, ("connection", "close")])),
        ("/no-status", head(&[("x-a", "b")])),
        ("/letters", head(&[(":status", "abc")])),
        ("/two-digits", head(&[(":status", "20")])),
        ("/two", head(&[OK, (":status", "204")])),
        ("/switching", head(&[(":status", "101")])),
        ("/switching-open", headers(stream, false, &[(":status", "101")])),
        ("/switching-first", [headers(stream, false, &[(":status", "101")]), head(&[OK])].concat()),
        ("/early-hints", [headers(stream, false, &[(":status", "103")]), head(&[OK])].concat()),
        ("/only-hints", head(&[(":status", "103")])),
        ("/second", then(&[headers(stream, false, &[OK]), data(stream, true, b"ok")])),
        ("/middle", then(&[headers(stream, false, &[("x-t", "1")]), data(stream, true, b"ok")])),
        ("/status-in-trailers", then(&[data(stream, false, b"ok"), headers(stream, true, &[(":status", "200")])])),
        (
            "/path-in-trailers",
            then(&[data(stream, false, b"ok"), headers(stream, true, &[("x-t", "1"), (":path", "/")])]),
        ),
        (
            "/interim-then-empty",
            [
                headers(stream, false, &[(":status", "103"), ("x-early", "1")]),
                headers(stream, true, &[(":status", "204")]),
            ]
            .concat(),
        ),
        ("/capitals-in-trailers", then(&[data(stream, false, b"ok"), headers(stream, true, &[("X-T", "1")])])),
        ("/longer", [headers(stream, false, &[OK, ("content-length", "1")]), data(stream, true, b"ok")].concat()),
        ("/shorter", [headers(stream, false, &[OK, ("content-length", "3")]), data(stream, true, b"ok")].concat()),
    ]
}

fn serve(socket: TcpStream) -> Result<()> {
    // Requests' fields come without HPACK's table, but for Huffman's code: their paths are told by their order.
    let mut host = Served::begin(socket, &[(1, 0)])?;
    let (mut requests, mut slow, mut case) = (0, 0, 0);
    while let Some(Frame { kind, flags, stream, payload }) = host.next()? {
        match kind {
            HEADERS => {
                ensure!(flags & END_HEADERS != 0, "more than a frame");
                match requests % 3 {
                    0 => {
                        slow = stream;
                        // Which case it is, its body says.
                        case = 0;
                        host.send(&headers(stream, false, &[OK]))?;
                    }
                    1 => case = stream,
                    _ => host.send(&[data(slow, true, b"slow"), headers(stream, true, &[OK])].concat())?,
                }
                requests += 1;
            }
            wire::DATA if stream == case => {
                let which = String::from_utf8_lossy(&payload).into_owned();
                if let Some((_, answer)) = answers(stream).into_iter().find(|(path, _)| *path == which) {
                    host.send(&answer)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// What a client gets for a request that is answered wrongly, for one whose answer had begun before, and for one that comes later.
fn outcomes(kind: Kind) -> Result<Vec<String>> {
    let (upstream, port) = (server::start(serve)?, free_port()?);
    let hosts = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app, timeout: 1s}}]}";
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {override_stream_error_on_invalid_http_message: true}}}}";
    let yaml = Bootstrap::new().http(port, hosts, &[]).cluster("app", &[upstream], &[http2]).yaml();
    let mut outcomes = Vec::new();
    for (which, _) in answers(1) {
        // Whatever one does to its connection, the next finds another one.
        let proxy = Daemon::start(kind, &yaml)?;
        let mut client = Connection::open(port, &[])?;
        let mut fields = get(&[]);
        fields[0].1 = "POST";
        client.send(&wire::headers(1, true, &get(&[])))?;
        let mut seen = String::new();
        // The head of the first answer is there: it is the host's first.
        let frame = client.receive(std::time::Instant::now() + std::time::Duration::from_secs(10))?;
        let mut frame = frame.map_err(|nothing| anyhow::anyhow!("{which}: {nothing:?}"))?;
        while frame.kind != HEADERS {
            let next = client.receive(std::time::Instant::now() + std::time::Duration::from_secs(10))?;
            frame = next.map_err(|nothing| anyhow::anyhow!("{which}: {nothing:?}"))?;
        }
        client.send(&[wire::headers(3, false, &fields), data(3, true, which.as_bytes())].concat())?;
        let (answered, _) = watch(&mut client, &[3])?;
        seen += &format!("{:?}; ", answered.get(&3));
        client.send(&wire::headers(5, true, &get(&[])))?;
        let first: Vec<_> = answered.get(&1).cloned().into_iter().collect();
        let ended = first.iter().any(|seen| seen.ends_with("end") || seen.contains("reset"));
        let (later, _) = watch(&mut client, if ended { &[5] } else { &[1, 5] })?;
        seen += &format!("the one before: {:?}, ", later.get(&1).or(answered.get(&1)));
        seen += &format!("the next: {:?}, ", later.get(&5));
        let stats = proxy.stats()?;
        for name in ["upstream_cx_total", "upstream_cx_protocol_error", "upstream_rq_5xx", "upstream_rq_rx_reset"] {
            seen += &format!("{name} {}, ", stats.get(&format!("cluster.app.{name}")));
        }
        outcomes.push(format!("{which}: {seen}"));
    }
    Ok(outcomes)
}

pub fn side_by_side() -> Result<()> {
    compare_outcomes(outcomes)
}
