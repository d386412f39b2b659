//! `cargo xtask bench discovery`: builds culvert-discovery and the program that measures it (discovery/benches/scale.rs), and runs it.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::build_ebpf::workspace_root;

/// Flags of `cargo xtask bench discovery`.
#[derive(clap::Args)]
pub struct Args {
    /// A small mesh for a few seconds: a look, not a measurement.
    #[arg(long)]
    quick: bool,
    /// Flags of the program that measures; `-- --help` shows them.
    #[arg(last = true)]
    flags: Vec<String>,
}

pub(super) fn run(args: &Args) -> Result<()> {
    let small = ["--services", "100", "--endpoints", "5000", "--clients", "50", "--rate", "50", "--seconds", "5"];
    let mut cargo = Command::new("cargo");
    cargo.args(["bench", "-p", "culvert-discovery", "--bench", "scale", "--"]).current_dir(workspace_root());
    cargo.args(args.quick.then_some(small).into_iter().flatten()).args(&args.flags);
    let status = cargo.status().context("running cargo bench")?;
    ensure!(status.success(), "the benchmark failed ({status})");
    Ok(())
}
