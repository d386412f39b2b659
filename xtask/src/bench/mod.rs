//! `cargo xtask bench`: CPU per request of culvertd, Envoy, HAProxy and nginx, in turn; `cargo xtask bench idle`: memory of
//! idle connections; `cargo xtask bench xds`: what xDS updates cost culvertd and Envoy; `cargo xtask bench lb`: load balancing; `cargo xtask
//! bench node`: two pods of one node.
//! docs/performance.md has the method.

mod discovery;
mod idle;
mod lb;
mod node;
mod proxies;
mod report;
mod workloads;
mod xds;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::build_ebpf::{self, workspace_root};
use crate::setup::{self, Needs};
use crate::{envoy, progress};
use proxies::{CONTENDERS, Contender, Ports, Programs, Server};
use report::{Sample, Table};
use workloads::{MESSAGE, WORKLOADS};

/// Flags of `cargo xtask bench`.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What is compared; without it, CPU per request.
    #[command(subcommand)]
    suite: Option<Suite>,
    #[command(flatten)]
    requests: Requests,
}

#[derive(clap::Subcommand)]
enum Suite {
    /// Memory per idle connection.
    Idle(idle::Args),
    /// CPU, memory and delay of xDS updates: culvertd and Envoy on the same pushes.
    Xds(xds::Args),
    /// Nanoseconds per pick of each load balancing policy, memory per host, pauses while hosts are replaced: culvertd alone.
    Lb(lb::Args),
    /// Two pods of one node: directly, balanced when they connect, and through culvertd and Envoy with and without short cuts.
    Node(node::Args),
    /// Discovery at scale: memory, CPU, and how long changes of endpoints take to its clients.
    Discovery(discovery::Args),
}

/// Flags of the comparison of CPU per request.
#[derive(clap::Args)]
struct Requests {
    /// One short round: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// How many rounds; each runs every proxy with every workload.
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// How many seconds each workload is measured for in each round.
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Only workloads whose name contains this.
    #[arg(long)]
    only: Option<String>,
    #[command(flatten)]
    common: Common,
}

/// Flags of all that compares the four proxies.
#[derive(clap::Args)]
struct Common {
    /// How the result is printed.
    #[arg(long, value_enum, default_value = "table")]
    output: Output,
    /// Measure this culvertd instead of building one in release mode.
    #[arg(long)]
    culvertd: Option<PathBuf>,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
}

/// What is measured, and the server behind it, which runs as long as this lives.
struct Stage {
    programs: Programs,
    _upstream: Server,
}

impl Stage {
    fn set_up(common: &Common) -> Result<Stage> {
        setup::ensure(common.yes, Needs::BENCH)?;
        let root = workspace_root();
        let envoy = envoy::ensure(&root)?;
        let culvertd = culvertd(common.culvertd.clone())?;
        let dir = root.join("target/bench");
        std::fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        std::fs::write(dir.join("64k"), vec![b'x'; 64 * 1024])?;
        // Uncompressed, 26 bytes long.
        std::fs::write(dir.join(MESSAGE), b"\0\0\0\0\x1aa message for the upstream")?;
        let programs = Programs { culvertd, envoy, dir, ports: Ports::free()? };
        let upstream = Server::upstream(&programs)?;
        Ok(Stage { programs, _upstream: upstream })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

/// Runs the task.
pub fn run(args: Args) -> Result<()> {
    match args.suite {
        Some(Suite::Idle(args)) => idle::run(&args),
        Some(Suite::Xds(args)) => xds::run(args),
        Some(Suite::Lb(args)) => lb::run(&args),
        Some(Suite::Node(args)) => node::run(&args),
        Some(Suite::Discovery(args)) => discovery::run(&args),
        None => requests(&args.requests),
    }
}

/// The culvertd that is named, or else one that is built now.
fn culvertd(named: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = named {
        return path.canonicalize().with_context(|| format!("no such program: {}", path.display()));
    }
    build_ebpf::ensure()?;
    let root = workspace_root();
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "-p", "culvert-proxy-daemon"]).current_dir(&root);
    progress::run("building culvertd in release mode", &mut cargo)?;
    Ok(root.join("target/release/culvertd"))
}

fn requests(args: &Requests) -> Result<()> {
    let (rounds, seconds) = if args.quick { (1, 2) } else { (args.rounds, args.seconds) };
    let duration = Duration::from_secs(seconds);
    let workloads: Vec<_> = WORKLOADS
        .iter()
        .filter(|workload| args.only.as_ref().is_none_or(|only| workload.name.contains(only)))
        .collect();
    ensure!(!workloads.is_empty(), "no workload's name contains that; there are: {}", workloads::names());
    let stage = Stage::set_up(&args.common)?;
    let Programs { ports, dir, .. } = &stage.programs;
    let mut samples = Vec::new();
    for round in 1..=rounds {
        for proxy in CONTENDERS {
            for workload in workloads.iter().filter(|workload| workload.is_for(proxy)) {
                eprintln!("round {round} of {rounds}: {} {} ...", proxy.name(), workload.name);
                let measure = || -> Result<Sample> {
                    let server = Server::start(proxy, &stage.programs)?;
                    workload.warm_up(ports, dir)?;
                    let before = server.cpu()?;
                    let load = workload.run(ports, duration, dir)?;
                    let cpu = server.cpu()?.saturating_sub(before);
                    Ok(Sample::new(round, proxy, workload.name, cpu, server.rss_bytes()?, &load))
                };
                let sample = match measure() {
                    // nginx now and then fails one gRPC call in fifty thousand: no reason to lose all rounds. Ours may not.
                    Err(error) if proxy != Contender::Culvert => {
                        eprintln!("{} {} again: {error:#}", proxy.name(), workload.name);
                        measure()?
                    }
                    measured => measured?,
                };
                samples.push(sample);
            }
        }
    }
    let table = Table::summarise(&samples);
    match args.common.output {
        Output::Table => println!("{table}"),
        Output::Json => println!("{}", serde_json::to_string_pretty(&table.json(&samples))?),
    }
    Ok(())
}
