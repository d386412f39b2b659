//! `cargo xtask bench idle`: resident memory of connections that have served a request and wait for the next one.

use std::fmt;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use super::proxies::{CONTENDERS, Contender, Server};
use super::{Common, Output, Stage};

/// Opened before anything is measured: a proxy's first connections fill its pools.
const WARM_UP: u32 = 100;
/// How long a proxy may take to have put away what the last requests needed.
const SETTLE: Duration = Duration::from_secs(1);

/// Flags of `cargo xtask bench idle`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// How many connections; with few of them, what a proxy had put by from its start hides them.
    #[arg(long, default_value_t = 6000)]
    connections: u32,
    #[command(flatten)]
    common: Common,
}

struct Row {
    proxy: Contender,
    bytes: f64,
    of_envoys: f64,
}

struct Table(Vec<Row>);

/// Runs the task.
pub(super) fn run(args: &Args) -> Result<()> {
    ensure!(args.connections > 0, "--connections must be at least 1");
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // Proxies take it over; each connection is a file on both sides.
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let stage = Stage::set_up(&args.common)?;
    let mut measured = Vec::new();
    for proxy in CONTENDERS {
        eprintln!("{}: {} connections ...", proxy.name(), args.connections);
        let server = Server::start(proxy, &stage.programs)?;
        let open = |count| (0..count).map(|_| connection(stage.programs.ports.http1)).collect::<Result<Vec<_>>>();
        let _first = open(WARM_UP)?;
        std::thread::sleep(SETTLE);
        let before = server.rss_bytes()?;
        let _all = open(args.connections)?;
        std::thread::sleep(SETTLE);
        let grown = server.rss_bytes()?.saturating_sub(before);
        #[expect(clippy::cast_precision_loss, reason = "bytes of memory are far below 2^52")]
        measured.push((proxy, grown as f64 / f64::from(args.connections)));
    }
    let envoy = measured.iter().find(|(proxy, _)| *proxy == Contender::Envoy).map_or(f64::NAN, |(_, bytes)| *bytes);
    let rows = measured.into_iter().map(|(proxy, bytes)| Row { proxy, bytes, of_envoys: bytes / envoy });
    let table = Table(rows.collect());
    match args.common.output {
        Output::Table => println!("{table}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&table.json())?),
    }
    Ok(())
}

/// A connection that has served a request.
fn connection(port: u16) -> Result<TcpStream> {
    let mut stream =
        TcpStream::connect(("127.0.0.1", port)).context("connecting; `ulimit -n` bounds how many there can be")?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /small HTTP/1.1\r\nhost: bench.test\r\n\r\n")?;
    let (mut response, mut piece) = (Vec::new(), [0; 4096]);
    while !response.ends_with(b"hello from the upstream\n") {
        let read = stream.read(&mut piece).context("reading a response")?;
        ensure!(read > 0, "a connection was closed: {}", String::from_utf8_lossy(&response));
        response.extend_from_slice(&piece[..read]);
    }
    ensure!(response.starts_with(b"HTTP/1.1 200 "), "not a 200: {}", String::from_utf8_lossy(&response));
    Ok(stream)
}

impl Table {
    fn json(&self) -> Value {
        let row = |row: &Row| json!({"proxy": row.proxy.name(), "bytes_per_connection": row.bytes, "ratio_to_envoy": row.of_envoys});
        self.0.iter().map(row).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| proxy | KiB per idle connection | of Envoy's |")?;
        writeln!(f, "|---|---:|---:|")?;
        for row in &self.0 {
            writeln!(f, "| {} | {:.1} | {:.2} |", row.proxy.name(), row.bytes / 1024.0, row.of_envoys)?;
        }
        Ok(())
    }
}
