//! `cargo xtask test`.

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::build_ebpf::{self, workspace_root};
use crate::setup::{self, Needs};
use crate::{envoy, peers};

/// Flags of `cargo xtask test`.
#[derive(clap::Args)]
pub struct Args {
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
    /// Skip formatting, clippy and cargo-deny.
    #[arg(long)]
    no_lint: bool,
    /// Handed to `cargo nextest run`: names of tests, or flags such as `--no-capture`.
    #[arg(last = true)]
    nextest: Vec<String>,
}

/// Runs the task.
pub fn run(args: Args) -> Result<()> {
    setup::ensure(args.yes, Needs::TEST)?;
    build_ebpf::ensure()?;
    let envoy = envoy::ensure(&workspace_root())?;
    let peers = peers::ensure(&workspace_root())?;
    if !args.no_lint {
        step("formatting", cargo(&["fmt", "--all", "--check"]))?;
        step("clippy", cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
        deny()?;
    }
    // The end-to-end tests run the programs, which nextest alone does not build.
    step("build", cargo(&["build", "--workspace"]))?;
    let mut nextest = cargo(&["nextest", "run", "--workspace"]);
    nextest.args(&args.nextest).env("ENVOY", envoy).env("CULVERT_PEERS", peers);
    step("tests", nextest)
}

/// Checks the dependencies' licenses and advisories where cargo-deny is installed; it is no part of `setup` because it
/// takes long to build.
fn deny() -> Result<()> {
    let probe = Command::new("cargo").args(["deny", "--version"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    if probe.is_ok_and(|status| status.success()) {
        return step("cargo-deny", cargo(&["deny", "--log-level", "error", "check", "bans", "licenses", "sources"]));
    }
    println!("== cargo-deny: not installed, so licenses were not checked (cargo install cargo-deny)");
    Ok(())
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new("cargo");
    command.args(arguments).current_dir(workspace_root());
    command
}

fn step(what: &str, mut command: Command) -> Result<()> {
    println!("== {what}");
    let status = command.status().with_context(|| format!("{what}: running cargo"))?;
    if !status.success() {
        bail!("{what}: {status}");
    }
    Ok(())
}
