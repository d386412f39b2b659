//! `cargo xtask bench lb`: builds and runs `proxy-daemon/benches/lb.rs`, which has the work and its flags.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::build_ebpf::{self, workspace_root};
use crate::setup::{self, Needs};

/// Flags of `cargo xtask bench lb`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// How many hosts there are, one measurement for each.
    #[arg(long, default_value = "10,1000,100000")]
    hosts: String,
    /// Only policies whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// Print a JSON document instead of a table.
    #[arg(long)]
    json: bool,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
}

/// Runs the task.
pub(super) fn run(args: &Args) -> Result<()> {
    setup::ensure(args.yes, Needs::BUILD)?;
    build_ebpf::ensure()?;
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "-p", "culvert-proxy-daemon", "--bench", "lb", "--", "--hosts", &args.hosts]);
    cargo.args(args.only.iter().flat_map(|only| ["--only", only]));
    cargo.args(args.json.then_some("--json"));
    ensure!(cargo.current_dir(workspace_root()).status()?.success(), "the benchmark failed");
    Ok(())
}
