//! The workloads, and what the load generators say of them.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::proxies::{OTHERS_CORE, Ports, on_core};

/// How long each workload runs before it is measured.
const WARM_UP: Duration = Duration::from_secs(1);

/// A kind of load.
pub(super) struct Workload {
    pub(super) name: &'static str,
    kind: Kind,
}

enum Kind {
    /// wrk over 32 connections.
    Wrk { path: &'static str, to: fn(&Ports) -> u16, arguments: &'static [&'static str] },
    /// h2load over 4 connections with 8 streams each.
    H2load { path: &'static str },
}

pub(super) const WORKLOADS: [Workload; 5] = [
    Workload { name: "http1-small", kind: Kind::Wrk { path: "/small", to: |ports| ports.http1, arguments: &[] } },
    Workload { name: "http1-64k", kind: Kind::Wrk { path: "/64k", to: |ports| ports.http1, arguments: &[] } },
    Workload {
        name: "http1-new-connection",
        kind: Kind::Wrk { path: "/small", to: |ports| ports.http1, arguments: &["-H", "Connection: close"] },
    },
    Workload { name: "h2-small", kind: Kind::H2load { path: "/small" } },
    Workload { name: "tcp-small", kind: Kind::Wrk { path: "/small", to: |ports| ports.tcp, arguments: &[] } },
];

/// The names of all workloads.
pub(super) fn names() -> String {
    WORKLOADS.map(|workload| workload.name).join(", ")
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
    /// Opens connections, fills caches.
    pub(super) fn warm_up(&self, ports: &Ports) -> Result<()> {
        self.run(ports, WARM_UP, &std::env::temp_dir()).map(drop)
    }

    /// Runs it; fails if anything but a 2xx response came back.
    pub(super) fn run(&self, ports: &Ports, duration: Duration, dir: &Path) -> Result<Load> {
        let seconds = duration.as_secs().to_string();
        match &self.kind {
            Kind::Wrk { path, to, arguments } => {
                let mut wrk = on_core(OTHERS_CORE, Path::new("wrk"));
                wrk.args(["-t1", "-c32", "--latency", "-d", &seconds]).args(*arguments);
                let output =
                    wrk.arg(format!("http://127.0.0.1:{}{path}", to(ports))).output().context("running wrk")?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                parse_wrk(&text).with_context(|| format!("{}: wrk said:\n{text}", self.name))
            }
            Kind::H2load { path } => {
                let log = dir.join("h2load.log");
                // h2load appends.
                let _ = std::fs::remove_file(&log);
                let mut h2load = on_core(OTHERS_CORE, Path::new("h2load"));
                h2load.args(["-t1", "-c4", "-m8", "-D", &seconds, "--log-file"]).arg(&log);
                let output =
                    h2load.arg(format!("http://127.0.0.1:{}{path}", ports.http2)).output().context("running h2load")?;
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let lines = std::fs::read_to_string(&log).with_context(|| format!("h2load wrote no log:\n{text}"))?;
                parse_h2load(&lines, duration).with_context(|| format!("{}: h2load said:\n{text}", self.name))
            }
        }
    }
}

/// Reads wrk's report.
fn parse_wrk(text: &str) -> Result<Load> {
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
