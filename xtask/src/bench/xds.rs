//! `cargo xtask bench xds`: builds the program that measures (`lab-xds` in tests/), and runs it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::build_ebpf::workspace_root;
use crate::setup::{self, Needs};
use crate::{envoy, progress};

/// Flags of `cargo xtask bench xds`.
#[derive(clap::Args)]
pub struct Args {
    /// One short round with 1,000 clusters: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Numbers of clusters, each with 10 endpoints.
    #[arg(long, value_delimiter = ',', default_value = "5000,10000")]
    clusters: Vec<usize>,
    /// How many changes of one endpoint follow the push.
    #[arg(long, default_value_t = 300)]
    changes: usize,
    /// How many rounds; each runs both proxies with both variants of the protocol and each number of clusters.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Leave Envoy out.
    #[arg(long)]
    only_culvertd: bool,
    /// Print all samples as JSON.
    #[arg(long)]
    json: bool,
    /// Measure this culvertd instead of building one in release mode.
    #[arg(long)]
    culvertd: Option<PathBuf>,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
}

pub(super) fn run(args: Args) -> Result<()> {
    setup::ensure(args.yes, Needs::BENCH)?;
    let root = workspace_root();
    let envoy = envoy::ensure(&root)?;
    let culvertd = super::culvertd(args.culvertd)?;
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "-p", "culvert-tests", "--bin", "lab-xds"]).current_dir(&root);
    progress::run("building the control plane in release mode", &mut cargo)?;

    let (clusters, changes, rounds) =
        if args.quick { (vec![1000], 100, 1) } else { (args.clusters, args.changes, args.rounds) };
    let clusters: Vec<String> = clusters.iter().map(usize::to_string).collect();
    let mut lab = Command::new(root.join("target/release/lab-xds"));
    lab.arg("--culvertd").arg(culvertd).arg("--envoy").arg(envoy).arg("--dir").arg(root.join("target/bench"));
    lab.args(["--clusters", &clusters.join(","), "--changes", &changes.to_string(), "--rounds", &rounds.to_string()]);
    lab.args(args.only_culvertd.then_some("--only-culvertd")).args(args.json.then_some("--json"));
    let status = lab.status().context("running lab-xds")?;
    ensure!(status.success(), "lab-xds failed ({status})");
    Ok(())
}
