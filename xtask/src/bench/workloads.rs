//! The workloads, and what the load generators say of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::proxies::{Contender, OTHERS_CORE, Ports, on_core};

/// How long each workload runs before it is measured.
const WARM_UP: Duration = Duration::from_secs(1);

/// A kind of load.
pub(super) struct Workload {
    pub(super) name: &'static str,
    generator: Generator,
    path: &'static str,
    to: fn(&Ports) -> u16,
    arguments: &'static [&'static str],
    /// nginx has no way to speak HTTP/2 to an upstream, but for gRPC.
    by_nginx: bool,
}

#[derive(Clone, Copy)]
enum Generator {
    /// Over 32 connections.
    Wrk,
    /// Over 4 connections with 8 streams each.
    H2load,
}

const fn http1(name: &'static str, path: &'static str, to: fn(&Ports) -> u16) -> Workload {
    Workload { name, generator: Generator::Wrk, path, to, arguments: &[], by_nginx: true }
}

const fn http2(name: &'static str, path: &'static str, to: fn(&Ports) -> u16) -> Workload {
    Workload { generator: Generator::H2load, ..http1(name, path, to) }
}

pub(super) const WORKLOADS: [Workload; 8] = [
    http1("http1-small", "/small", |ports| ports.http1),
    http1("http1-64k", "/64k", |ports| ports.http1),
    Workload {
        arguments: &["-H", "Connection: close"],
        ..http1("http1-new-connection", "/small", |ports| ports.http1)
    },
    http1("http1-filters", "/small", |ports| ports.filters),
    http2("h2-small", "/small", |ports| ports.http2),
    Workload { by_nginx: false, ..http2("h2-to-h2", "/h2/small", |ports| ports.http2) },
    Workload {
        arguments: &["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", MESSAGE],
        ..http2("grpc-unary", "/bench.Echo/Say", |ports| ports.http2)
    },
    http1("tcp-small", "/small", |ports| ports.tcp),
];

/// A file of the benchmark's directory: a gRPC message, which is what `grpc-unary` sends and gets.
pub(super) const MESSAGE: &str = "message";

/// The names of all workloads.
pub(super) fn names() -> String {
    WORKLOADS.each_ref().map(|workload| workload.name).join(", ")
}

/// What a load generator saw.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Load {
    pub(super) requests: u64,
    pub(super) elapsed: Duration,
    pub(super) p50: Duration,
    pub(super) p99: Duration,
}

impl Workload {
    /// Whether a proxy can do this.
    pub(super) fn is_for(&self, proxy: Contender) -> bool {
        self.by_nginx || proxy != Contender::Nginx
    }

    /// Opens connections, fills caches.
    pub(super) fn warm_up(&self, ports: &Ports, dir: &Path) -> Result<()> {
        self.run(ports, WARM_UP, dir).map(drop)
    }

    /// Runs it; fails if anything but a 2xx response came back. `dir` is the benchmark's.
    pub(super) fn run(&self, ports: &Ports, duration: Duration, dir: &Path) -> Result<Load> {
        let seconds = duration.as_secs().to_string();
        let url = format!("http://127.0.0.1:{}{}", (self.to)(ports), self.path);
        match self.generator {
            Generator::Wrk => {
                let mut wrk = on_core(OTHERS_CORE, Path::new("wrk"));
                wrk.args(["-t1", "-c32", "--latency", "-d", &seconds]).args(self.arguments);
                let output = wrk.arg(url).output().context("running wrk")?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                parse_wrk(&text).with_context(|| format!("{}: wrk said:\n{text}", self.name))
            }
            Generator::H2load => {
                let log = dir.join("h2load.log");
                // h2load appends.
                let _ = std::fs::remove_file(&log);
                let mut h2load = on_core(OTHERS_CORE, Path::new("h2load"));
                h2load.current_dir(dir).args(["-t1", "-c4", "-m8", "-D", &seconds, "--log-file"]).arg(&log);
                let output = h2load.args(self.arguments).arg(url).output().context("running h2load")?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let lines = std::fs::read_to_string(&log).with_context(|| format!("h2load wrote no log:\n{text}"))?;
                parse_h2load(&lines, duration).with_context(|| format!("{}: h2load said:\n{text}", self.name))
            }
        }
    }
}

/// Reads wrk's report.
pub(super) fn parse_wrk(text: &str) -> Result<Load> {
    ensure!(!text.contains("Non-2xx"), "not all responses are 2xx");
    ensure!(!text.contains("Socket errors"), "connections failed");
    let value = |prefix: &str| {
        let line = text.lines().map(str::trim).find_map(|line| line.strip_prefix(prefix));
        line.map(str::trim).with_context(|| format!("no line starts with `{prefix}`"))
    };
    let line = text.lines().find(|line| line.contains(" requests in ")).context("no number of requests")?;
    let mut words = line.split_whitespace();
    let requests = words.next().and_then(|word| word.parse().ok()).context("no number of requests")?;
    let elapsed = words.nth(2).map(|word| word.trim_end_matches(',')).context("no time")?;
    Ok(Load {
        requests,
        elapsed: parse_time(elapsed)?,
        p50: parse_time(value("50%")?)?,
        p99: parse_time(value("99%")?)?,
    })
}

/// Reads h2load's log: a line a request of start (us of Unix time), status, duration (us).
fn parse_h2load(lines: &str, elapsed: Duration) -> Result<Load> {
    let mut durations = Vec::new();
    for line in lines.lines() {
        let mut fields = line.split('\t').skip(1);
        let (status, duration) = (fields.next(), fields.next());
        ensure!(status == Some("200"), "a request ended with status {status:?}");
        durations.push(duration.and_then(|text| text.parse::<u64>().ok()).context("a line has no duration")?);
    }
    ensure!(!durations.is_empty(), "no request was answered");
    durations.sort_unstable();
    let percentile = |percent: usize| Duration::from_micros(durations[(durations.len() - 1) * percent / 100]);
    Ok(Load { requests: durations.len() as u64, elapsed, p50: percentile(50), p99: percentile(99) })
}

/// Reads `1.50ms`.
fn parse_time(text: &str) -> Result<Duration> {
    let unit = text.find(|c: char| c.is_alphabetic()).with_context(|| format!("`{text}` has no unit"))?;
    let number: f64 = text[..unit].parse().with_context(|| format!("`{text}` is no time"))?;
    let seconds = match &text[unit..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => anyhow::bail!("`{text}` has an unknown unit"),
    };
    Ok(Duration::from_secs_f64(number * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "\
Running 2s test @ http://127.0.0.1:1/small
  1 threads and 32 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.03ms  240.00us   9.12ms   91.24%
    Req/Sec    31.05k     1.02k   33.00k    70.00%
  Latency Distribution
     50%    0.98ms
     75%    1.05ms
     90%    1.15ms
     99%    2.01ms
  61795 requests in 2.10s, 9.78MB read
Requests/sec:  29426.19
Transfer/sec:      4.66MB
";

    #[test]
    fn wrk_is_read() {
        let load = parse_wrk(WRK).unwrap();
        assert_eq!(load.requests, 61795);
        assert_eq!(load.elapsed, Duration::from_millis(2100));
        assert_eq!((load.p50, load.p99), (Duration::from_micros(980), Duration::from_micros(2010)));
    }

    #[test]
    fn a_run_with_failures_is_no_measurement() {
        assert!(parse_wrk(&format!("{WRK}  Non-2xx or 3xx responses: 3\n")).is_err());
        assert!(parse_wrk(&format!("{WRK}  Socket errors: connect 0, read 2, write 0, timeout 0\n")).is_err());
        assert!(parse_h2load("1\t200\t10\n2\t503\t10\n", Duration::from_secs(1)).is_err());
        assert!(parse_h2load("", Duration::from_secs(1)).is_err());
    }

    #[test]
    fn h2load_is_read() {
        let lines: String = (1..=100).map(|n| format!("{n}\t200\t{n}\n")).collect();
        let load = parse_h2load(&lines, Duration::from_secs(2)).unwrap();
        assert_eq!(load.requests, 100);
        assert_eq!((load.p50, load.p99), (Duration::from_micros(50), Duration::from_micros(99)));
    }
}
