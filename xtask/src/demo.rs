//! `cargo xtask demo`.

use std::process::Command;

use anyhow::{Result, bail};
use culvert_tests::lab::Lab;
use culvert_tests::scenario::{FailurePolicy, STEPS, Scenario, addresses};

use crate::setup::{self, Needs};
use crate::{build_ebpf, progress};

/// The lab's name; a second run removes what the first left.
const LAB: &str = "demo";

/// Flags of `cargo xtask demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Leave the lab running, and print commands to play with. The next run removes it.
    #[arg(long)]
    keep: bool,
    /// Also show the ends of the daemons' logs when a step fails.
    #[arg(long, short)]
    verbose: bool,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
    /// Only remove what an earlier run left.
    #[arg(long, conflicts_with_all = ["keep", "verbose"])]
    cleanup: bool,
}

/// Runs the task.
pub fn run(args: Args) -> Result<()> {
    if args.cleanup {
        return Lab::cleanup(LAB);
    }
    setup::ensure(args.yes, Needs::DEMO)?;
    build_ebpf::ensure()?;
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "-p", "culvert-proxy-daemon", "-p", "culvert-discovery", "-p", "culvert-cli", "-p"]);
    progress::run("building culvertd, culvert-discovery, culvert and the lab's programs", cargo.arg("culvert-tests"))?;

    Lab::remove_on_signal(LAB)?;
    let policy = FailurePolicy::Open;
    let mut scenario = Scenario::start(LAB, policy, |what| println!("{what} ..."))?;
    println!("{}\n", addresses());
    let mut failed = 0;
    for (number, step) in (1..).zip(STEPS) {
        println!("({number}) {}", step.title);
        let log = step.run(&mut scenario);
        for line in &log.lines {
            println!("    {line}");
        }
        for failure in &log.failures {
            println!("    ! {failure}");
        }
        println!("    {}\n", if log.failures.is_empty() { "PASS" } else { "FAIL" });
        failed += usize::from(!log.failures.is_empty());
    }
    if failed > 0 && args.verbose {
        for path in scenario.logs() {
            println!("--- {}\n{}", path.display(), last_lines(&std::fs::read_to_string(&path).unwrap_or_default(), 40));
        }
    }
    if args.keep {
        scenario.keep();
        println!("The lab stays until the next run, or until `cargo xtask demo --cleanup`. Try, as root:\n");
        for command in scenario.commands() {
            println!("  {command}");
        }
        println!();
    }
    if failed > 0 {
        bail!("{failed} of {} steps failed; --keep leaves the lab up to look at, --verbose shows logs", STEPS.len());
    }
    println!("all {} steps passed", STEPS.len());
    Ok(())
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
