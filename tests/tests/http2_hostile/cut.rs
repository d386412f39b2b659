//! Hosts that break off in the middle of a response: what had come of it is the client's.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::server;

use super::harness::get;
use super::wire::{Connection, DATA, HEADERS, RST_STREAM, headers};

/// What a host says before it closes.
const RESPONSES: [(&str, &str, &str); 4] = [
    ("less than the length", "content-length: 10\r\n\r\nabc", "200 \"abc\" reset 2"),
    ("a head alone", "content-length: 10\r\n\r\n", "200 \"\" reset 2"),
    ("a chunk that is not whole", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n5\r\nde", "200 \"abcde\" reset 2"),
    ("no last chunk", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", "200 \"abc\" reset 2"),
];

/// What the client gets of it.
fn outcome(kind: Kind, response: &'static str) -> Result<String> {
    let host = server::start(move |mut stream| {
        // A head fits.
        let _ = stream.read(&mut [0; 4096])?;
        Ok(stream.write_all(format!("HTTP/1.1 200 OK\r\n{response}").as_bytes())?)
    })?;
    let port = free_port()?;
    let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
    let yaml = Bootstrap::new().http(port, routes, &[]).cluster("app", &[host], &[]).yaml();
    let _proxy = Daemon::start(kind, &yaml)?;
    let mut connection = Connection::open(port, &[])?;
    connection.send(&headers(1, true, &get(&[])))?;
    let until = Instant::now() + Duration::from_secs(5);
    let (mut status, mut body) = (None, Vec::new());
    while let Ok(frame) = connection.receive(until)? {
        match frame.kind {
            HEADERS => status = frame.status(),
            DATA => body.extend_from_slice(&frame.payload),
            RST_STREAM => {
                let (status, code) = (status.unwrap_or_default(), frame.number(0).unwrap_or_default());
                return Ok(format!("{status} {:?} reset {code}", String::from_utf8_lossy(&body)));
            }
            _ => {}
        }
    }
    Ok(format!("{status:?} {body:?} and no reset"))
}

#[test]
fn what_came_before_a_host_broke_off_is_the_clients() -> Result<()> {
    for (what, response, expected) in RESPONSES {
        for kind in [Kind::Envoy, Kind::Culvert] {
            let seen = outcome(kind, response)?;
            ensure!(seen == expected, "{what}: {kind:?}: {seen}, expected {expected}");
        }
    }
    Ok(())
}
