//! `cargo xtask bench node`: what it costs two pods of one node to talk to each other: directly, balanced by the kernel when they
//! connect, and through proxies that intercept them.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::lab::{Lab, Node, Pod, Process};
use culvert_tests::stats::Stats;
use culvert_tests::wait_until;
use serde_json::json;

use super::workloads::{Load, parse_wrk};
use super::{Output, build_ebpf, envoy, workspace_root};
use crate::progress;
use crate::setup::{self, Needs};

/// Flags of `cargo xtask bench node`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// One short round: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// How many rounds; each measures everything once.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How many seconds each measurement takes.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Only ways whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// The directory with culvertd and examples/intercept_for, instead of building them in release mode.
    #[arg(long)]
    built: Option<PathBuf>,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
}

/// Who carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Connect,
    /// `past`: how far payload may go past TCP, if it may.
    Culvert {
        http: bool,
        past: Option<Past>,
    },
    Envoy {
        http: bool,
    },
}

/// How far payload goes past TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Past {
    ShortCut,
    Joined,
}

impl Past {
    /// The level of `acceleration`.
    const fn level(self) -> &'static str {
        match self {
            Self::ShortCut => "BOTH_WAYS",
            Self::Joined => "JOINED",
        }
    }

    /// What counts the bytes that went that way.
    const fn counter(self) -> &'static str {
        match self {
            Self::ShortCut => "interception.shortcut.bytes",
            Self::Joined => "interception.joined.bytes",
        }
    }
}

const WAYS: [(&str, Way); 9] = [
    ("direct", Way::Direct),
    ("connect-time balancing", Way::Connect),
    ("Culvert L4", Way::Culvert { http: false, past: None }),
    ("Culvert L4, short cut", Way::Culvert { http: false, past: Some(Past::ShortCut) }),
    ("Culvert L4, joined", Way::Culvert { http: false, past: Some(Past::Joined) }),
    ("Culvert L7", Way::Culvert { http: true, past: None }),
    ("Culvert L7, short cut", Way::Culvert { http: true, past: Some(Past::ShortCut) }),
    ("Envoy L4", Way::Envoy { http: false }),
    ("Envoy L7", Way::Envoy { http: true }),
];

/// What is asked for: a service that TCP proxies serve, one that HTTP proxies serve, and one that the kernel balances.
const TCP: &str = "10.96.0.10";
const HTTP: &str = "10.96.0.20";
const BALANCED: &str = "10.96.0.30";
const ADMIN: &str = "127.0.0.1:9901";
const DEADLINE: Duration = Duration::from_secs(20);
/// The file that streams fetch: 64 MiB.
const BIG: usize = 64 << 20;

/// One way in one round.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    requests_per_second: f64,
    p50_us: f64,
    p99_us: f64,
    /// Of all processors of the machine.
    cpu_us_per_request: f64,
    /// Over 1 and over 16 connections.
    gbit_per_second: [f64; 2],
}

/// What is run.
struct Programs {
    culvertd: PathBuf,
    intercept_for: PathBuf,
    envoy: PathBuf,
}

/// Runs the task.
pub(super) fn run(args: &Args) -> Result<()> {
    setup::ensure(args.yes, Needs::BENCH)?;
    let root = workspace_root();
    let programs = programs(args, &root)?;
    let (rounds, seconds) = if args.quick { (1, 1) } else { (args.rounds, args.seconds) };
    let ways = WAYS.iter().filter(|(name, _)| args.only.as_ref().is_none_or(|only| name.contains(only.as_str())));
    let ways: Vec<_> = ways.collect();
    ensure!(!ways.is_empty(), "no way's name contains that");
    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); ways.len()];
    let steps = rounds as usize * ways.len();
    let mut step = 0;
    for round in 1..=rounds {
        for ((name, way), samples) in ways.iter().zip(&mut samples) {
            step += 1;
            eprint!("{step:3} of {steps}, round {round}: {name} ... ");
            let sample = measure(*way, &programs, seconds).with_context(|| (*name).to_owned())?;
            eprintln!("{:.0} requests/s", sample.requests_per_second);
            samples.push(sample);
        }
    }
    let rows: Vec<_> = ways.iter().zip(&samples).map(|((name, _), samples)| (*name, median(samples))).collect();
    match args.output {
        Output::Table => print!("{}", table(&rows)),
        Output::Json => println!("{}", serde_json::to_string_pretty(&as_json(&rows))?),
    }
    Ok(())
}

fn programs(args: &Args, root: &Path) -> Result<Programs> {
    let directory = match &args.built {
        Some(directory) => directory.canonicalize().with_context(|| format!("no directory {}", directory.display()))?,
        None => {
            build_ebpf::ensure()?;
            let mut cargo = Command::new("cargo");
            cargo.args(["build", "--release", "-p", "culvert-proxy-daemon", "--bin", "culvertd"]);
            cargo.args(["--example", "intercept_for"]).current_dir(root);
            progress::run("building culvertd in release mode", &mut cargo)?;
            root.join("target/release")
        }
    };
    let envoy = envoy::ensure(root)?;
    Ok(Programs {
        culvertd: directory.join("culvertd"),
        intercept_for: directory.join("examples/intercept_for"),
        envoy,
    })
}

/// A lab in which the client reaches the server in one way.
struct Stage {
    client: Pod,
    /// What the client asks.
    address: String,
    node: Node,
    _running: Vec<Process>,
    _lab: Lab,
}

fn measure(way: Way, programs: &Programs, seconds: u64) -> Result<Sample> {
    let stage = Stage::set_up(way, programs)?;
    stage.wrk(32, "/small", 1)?;
    let before = machine_cpu()?;
    let (load, _) = stage.wrk(32, "/small", seconds)?;
    let cpu = machine_cpu()?.saturating_sub(before);
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let mut sample = Sample {
        requests_per_second: load.requests as f64 / load.elapsed.as_secs_f64(),
        p50_us: micros(load.p50),
        p99_us: micros(load.p99),
        cpu_us_per_request: micros(cpu) / load.requests as f64,
        gbit_per_second: [0.0; 2],
    };
    for (connections, gbit) in [1, 16].into_iter().zip(&mut sample.gbit_per_second) {
        let (load, bytes) = stage.wrk(connections, "/big", seconds)?;
        *gbit = bytes * 8.0 / 1e9 / load.elapsed.as_secs_f64();
    }
    if let Way::Culvert { past: Some(past), .. } = way {
        let moved = stage.node.inside(|| Stats::read(ADMIN))?.get(past.counter());
        ensure!(moved > 0, "nothing went that way ({} is 0): `culvert status --node` says why", past.counter());
    }
    Ok(sample)
}

impl Stage {
    fn set_up(way: Way, programs: &Programs) -> Result<Self> {
        let lab = Lab::new("bench-node")?;
        let node = lab.node("node-a")?;
        let (client, server) = (node.pod("client")?, node.pod("server")?);
        let dir = lab.dir().to_owned();
        fs::write(dir.join("big"), vec![b'x'; BIG])?;
        let conf = dir.join("nginx.conf");
        fs::write(&conf, include_str!("node-nginx.conf").replace("@DIR@", &dir.display().to_string()))?;
        let mut running = vec![server.spawn("nginx", &["nginx", "-c", &text(&conf)])?];
        let own = format!("{}:8080", server.ipv4());
        let address = match way {
            Way::Direct => own,
            Way::Connect => format!("{BALANCED}:80"),
            Way::Culvert { http: true, .. } | Way::Envoy { http: true } => format!("{HTTP}:80"),
            Way::Culvert { .. } | Way::Envoy { .. } => format!("{TCP}:80"),
        };
        let config = dir.join("proxy.yaml");
        match way {
            Way::Direct => {}
            Way::Connect | Way::Culvert { .. } => {
                fs::write(&config, bootstrap(&server) + &extension(way, &node, [&client, &server]))?;
                let culvertd = text(&programs.culvertd);
                running.push(node.spawn("culvertd", &[&culvertd, "-c", &text(&config), "--concurrency", "1"])?);
            }
            Way::Envoy { .. } => {
                // One socket, which the kernel programs can choose.
                let one_socket = "    transparent: true\n    enable_reuse_port: false\n";
                fs::write(&config, bootstrap(&server).replace("    transparent: true\n", one_socket))?;
                let program = text(&programs.envoy);
                let envoy =
                    node.spawn("envoy", &[&program, "-c", &text(&config), "--concurrency", "1", "-l", "error"])?;
                wait_until(DEADLINE, "Envoy to be ready", || ready(&node))?;
                // The same programs as culvertd's, with Envoy's listener.
                let (pid, pins) = (envoy.id().to_string(), text(&node.bpf_dir().join("culvert")));
                let pods = [client.ipv4().to_string(), server.ipv4().to_string()];
                let program = text(&programs.intercept_for);
                running.push(node.spawn("intercept", &[&program, &pid, "15001", &pins, &pods[0], &pods[1]])?);
                running.push(envoy);
            }
        }
        if way != Way::Direct {
            let said = || running.iter().map(|process| process.stderr()).collect::<String>();
            wait_until(DEADLINE, "the proxy to be ready", || ready(&node)).with_context(said)?;
        }
        let stage = Self { client, address, node, _running: running, _lab: lab };
        wait_until(DEADLINE, "an answer", || {
            let url = format!("http://{}/small", stage.address);
            stage.client.run(&["curl", "-sS", "--fail", "-m", "1", &url])?.success()
        })?;
        Ok(stage)
    }

    /// Runs wrk in the client; returns also how many bytes came.
    fn wrk(&self, connections: u32, path: &str, seconds: u64) -> Result<(Load, f64)> {
        let (connections, seconds) = (format!("-c{connections}"), format!("-d{seconds}"));
        let url = format!("http://{}{path}", self.address);
        let command = ["wrk", "-t1", &connections, &seconds, "--timeout", "20s", "--latency", &url];
        let text = self.client.run(&command)?.success()?;
        let load = parse_wrk(&text).with_context(|| format!("wrk said:\n{text}"))?;
        let read = text.lines().find_map(|line| line.trim().strip_suffix(" read")?.rsplit(' ').next());
        let bytes = read.and_then(parse_bytes).with_context(|| format!("wrk tells no bytes:\n{text}"))?;
        Ok((load, bytes))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn ready(node: &Node) -> Result<String> {
    node.run(&["curl", "-sf", "-m", "1", &format!("http://{ADMIN}/ready")])?.success()
}

/// What Envoy and culvertd have in common.
fn bootstrap(server: &Pod) -> String {
    let chain = |address: &str, filter: &str| {
        format!(
            "    - filter_chain_match: {{destination_port: 80, prefix_ranges: [{{address_prefix: {address}, prefix_len: 32}}]}}\n      \
             filters: [{filter}]\n"
        )
    };
    let tcp = "{name: envoy.filters.network.tcp_proxy, typed_config: {\"@type\": \
               type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: server}}";
    let http = "{name: envoy.filters.network.http_connection_manager, typed_config: {\"@type\": \
                type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager, \
                stat_prefix: http, http_filters: [{name: envoy.filters.http.router, typed_config: {\"@type\": \
                type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}], route_config: {virtual_hosts: [{name: \
                any, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: server}}]}]}}}";
    let filters = "com/envoy.extensions.filters.listener";
    format!(
        r#"admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 9901}}}}}}
static_resources:
  clusters:
  - name: server
    type: STATIC
    load_assignment:
      cluster_name: server
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {server}, port_value: 8080}}}}}}}}]}}]
  listeners:
  - name: outbound
    transparent: true
    address: {{socket_address: {{address: 0.0.0.0, port_value: 15001}}}}
    listener_filters:
    - {{name: envoy.filters.listener.original_dst, typed_config: {{"@type": type.googleapis.{filters}.original_dst.v3.OriginalDst}}}}
    - {{name: envoy.filters.listener.original_src, typed_config: {{"@type": type.googleapis.{filters}.original_src.v3.OriginalSrc}}}}
    filter_chains:
{}{}"#,
        chain(TCP, tcp),
        chain(HTTP, http),
        server = server.ipv4(),
    )
}

/// What only culvertd has.
fn extension(way: Way, node: &Node, pods: [&Pod; 2]) -> String {
    let (cgroup, pins) = (text(node.cgroup()), text(&node.bpf_dir().join("culvert")));
    let more = match way {
        Way::Connect => format!(
            "balancing: {{cgroups: [\"{cgroup}\"], services: [{{address: {BALANCED}, port: 80, cluster: server}}]}}"
        ),
        Way::Culvert { past: Some(past), .. } => {
            format!("shortcut_cgroup: \"{cgroup}\"\n    acceleration: {}", past.level())
        }
        _ => String::new(),
    };
    let pods: String = pods.map(|pod| format!("{{address: {}}}, ", pod.ipv4())).concat();
    format!(
        r#"bootstrap_extensions:
- name: culvert.bootstrap.interception
  typed_config:
    "@type": type.googleapis.com/culvert.extensions.bootstrap.interception.v1.Interception
    interfaces: ["veth-*"]
    pods: [{pods}]
    pin_path: "{pins}"
    {more}
"#
    )
}

/// The time that all processors of this machine have worked.
fn machine_cpu() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let line = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> = line.split_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
    // user, nice, system, idle, iowait, irq, softirq, steal
    let busy: u64 = [0, 1, 2, 5, 6].iter().filter_map(|at| ticks.get(*at)).sum();
    // SAFETY: reads a number of the system's.
    let rate = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64(busy as f64 / rate.max(1) as f64))
}

/// Reads `1.23GB`, in units of 1024 as wrk means them.
fn parse_bytes(text: &str) -> Option<f64> {
    let at = text.find(|c: char| c.is_alphabetic())?;
    let unit = match &text[at..] {
        "B" => 1.0,
        "KB" => f64::from(1 << 10),
        "MB" => f64::from(1 << 20),
        "GB" => f64::from(1 << 30),
        _ => return None,
    };
    text[..at].parse::<f64>().ok().map(|number| number * unit)
}

/// Of each figure alone.
fn median(samples: &[Sample]) -> Sample {
    let of = |figure: &dyn Fn(&Sample) -> f64| {
        let mut figures: Vec<f64> = samples.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures.get(figures.len() / 2).copied().unwrap_or(0.0)
    };
    Sample {
        requests_per_second: of(&|sample| sample.requests_per_second),
        p50_us: of(&|sample| sample.p50_us),
        p99_us: of(&|sample| sample.p99_us),
        cpu_us_per_request: of(&|sample| sample.cpu_us_per_request),
        gbit_per_second: [of(&|sample| sample.gbit_per_second[0]), of(&|sample| sample.gbit_per_second[1])],
    }
}

fn table(rows: &[(&str, Sample)]) -> String {
    let direct = rows.iter().find(|(name, _)| *name == WAYS[0].0).map(|(_, sample)| *sample);
    let cells = |cells: [String; 9]| -> String {
        cells.iter().zip([7, 5, 6, 6, 6, 5, 5, 4, 5]).map(|(cell, width)| format!(" {cell:>width$}")).collect()
    };
    let titles = ["req/s", "ratio", "p50", "p99", "CPU", "ratio", "1 str", "16", "ratio"].map(str::to_owned);
    let mut text = format!("{:<22}{}\n", "way", cells(titles));
    for (name, row) in rows {
        let ratio = |of: fn(&Sample) -> f64| direct.map_or("-".to_owned(), |it| format!("{:.2}", of(row) / of(&it)));
        let row = cells([
            format!("{:.0}", row.requests_per_second),
            ratio(|it| it.requests_per_second),
            format!("{:.0}", row.p50_us),
            format!("{:.0}", row.p99_us),
            format!("{:.1}", row.cpu_us_per_request),
            ratio(|it| it.cpu_us_per_request),
            format!("{:.1}", row.gbit_per_second[0]),
            format!("{:.1}", row.gbit_per_second[1]),
            ratio(|it| it.gbit_per_second[1]),
        ]);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<22}{row}");
    }
    text.push_str(
        "\nratio: to the direct way. p50, p99: us, of 32 connections that fetch 24 bytes.\n\
         CPU: us of the whole machine per request. 1 str, 16: Gbit/s of so many streams.\n",
    );
    text
}

fn as_json(rows: &[(&str, Sample)]) -> serde_json::Value {
    let row = |(name, row): &(&str, Sample)| {
        json!({
            "way": name,
            "requests_per_second": row.requests_per_second,
            "p50_us": row.p50_us,
            "p99_us": row.p99_us,
            "machine_cpu_us_per_request": row.cpu_us_per_request,
            "gbit_per_second": { "1": row.gbit_per_second[0], "16": row.gbit_per_second[1] },
        })
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_wrk_writes_them() {
        assert_eq!(parse_bytes("9.50KB"), Some(9728.0));
        assert_eq!(parse_bytes("2.00GB"), Some(2_147_483_648.0));
        assert_eq!(parse_bytes("GB"), None);
        assert_eq!(parse_bytes("1.00XB"), None);
    }

    #[test]
    fn each_figure_has_its_own_median() {
        let sample = |requests_per_second, p50_us| Sample { requests_per_second, p50_us, ..Sample::default() };
        let median = median(&[sample(1.0, 9.0), sample(3.0, 7.0), sample(2.0, 8.0)]);
        assert_eq!((median.requests_per_second, median.p50_us), (2.0, 8.0));
    }

    #[test]
    fn the_table_has_ratios_and_fits_a_terminal() {
        let sample = |requests_per_second, gbit| Sample {
            requests_per_second,
            p50_us: 12_345.0,
            p99_us: 123_456.0,
            cpu_us_per_request: 1234.5,
            gbit_per_second: [gbit; 2],
        };
        let rows =
            WAYS.map(|(name, way)| (name, if way == Way::Direct { sample(200_000.0, 99.9) } else { sample(1e5, 9.9) }));
        let table = table(&rows);
        assert!(table.lines().all(|line| line.len() <= 80), "{table}");
        let joined = table.lines().find(|line| line.starts_with("Culvert L4, joined")).unwrap();
        let cells: Vec<_> = joined.split_whitespace().skip(3).collect();
        assert_eq!(cells, ["100000", "0.50", "12345", "123456", "1234.5", "1.00", "9.9", "9.9", "0.10"]);
    }
}
