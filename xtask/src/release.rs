//! `cargo xtask release`: the programs as they are shipped, with culvertd laid out by a profile of its own work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::build_ebpf::{self, workspace_root};
use crate::setup::{self, Needs};
use crate::{bench, progress, toolchain};

/// Flags of `cargo xtask release`.
#[derive(clap::Args)]
pub struct Args {
    /// Without the profile: half the time to build, and no load generators.
    #[arg(long)]
    plain: bool,
    /// Install what is missing without asking; assumed when CI=true.
    #[arg(long, short)]
    yes: bool,
}

/// What is shipped: a program, and its package.
const PROGRAMS: [(&str, &str); 3] =
    [("culvertd", "culvert-proxy-daemon"), ("culvert-discovery", "culvert-discovery"), ("culvert", "culvert-cli")];

/// Runs the task.
pub fn run(args: &Args) -> Result<()> {
    setup::ensure(args.yes, if args.plain { Needs::BUILD } else { Needs::RELEASE })?;
    build_ebpf::ensure()?;
    let root = workspace_root();
    let dist = root.join("target/dist");
    fs::create_dir_all(&dist).with_context(|| format!("creating {}", dist.display()))?;
    let host = toolchain::host()?;
    let profile = if args.plain { None } else { Some(profile(&root, &host)?) };
    for (program, package) in PROGRAMS {
        let guided = profile.as_deref().filter(|_| program == "culvertd");
        let flag = guided.map(|profile| format!("-Cprofile-use={}", profile.display()));
        let built = build(&root, &host, package, program, flag)?;
        let to = dist.join(program);
        // One that runs cannot be written to, and can be replaced.
        let _ = fs::remove_file(&to);
        fs::copy(&built, &to).with_context(|| format!("copying {} to {}", built.display(), to.display()))?;
        println!("{}", to.display());
    }
    Ok(())
}

/// Has a culvertd that counts what it does pass the benchmark's workloads, and merges its counts.
fn profile(root: &Path, host: &str) -> Result<PathBuf> {
    let directory = root.join("target/profile");
    let counts = directory.join("counts");
    // Those of another version say nothing of this one.
    let _ = fs::remove_dir_all(&counts);
    fs::create_dir_all(&counts).with_context(|| format!("creating {}", counts.display()))?;
    let (program, package) = PROGRAMS[0];
    let culvertd = build(root, host, package, program, Some(format!("-Cprofile-generate={}", counts.display())))?;
    bench::pass_workloads(&culvertd)?;
    let counted = fs::read_dir(&counts)?.collect::<Result<Vec<_>, _>>()?;
    ensure!(!counted.is_empty(), "culvertd left no counts in {}", counts.display());
    let merged = directory.join("culvertd.profdata");
    let mut merge = Command::new(toolchain::profdata(host).context("llvm-profdata is gone")?);
    merge.arg("merge").arg("-o").arg(&merged).arg(&counts);
    progress::run("merging the counts", &mut merge)?;
    Ok(merged)
}

/// Builds a program in release mode, with a flag for all that is compiled for it.
fn build(root: &Path, host: &str, package: &str, program: &str, flag: Option<String>) -> Result<PathBuf> {
    // With a target, build scripts and macros are built without the flag.
    let target_dir = root.join(match &flag {
        Some(flag) if flag.starts_with("-Cprofile-generate") => "target/profile/counting",
        Some(_) | None => "target/profile/shipped",
    });
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--release", "--target", host, "--package", package, "--bin", program]);
    cargo.arg("--target-dir").arg(&target_dir).current_dir(root);
    let what = match &flag {
        Some(flag) if flag.starts_with("-Cprofile-generate") => {
            format!("building a {program} that counts what it does")
        }
        Some(_) => format!("building {program} by its profile"),
        None => format!("building {program}"),
    };
    if let Some(flag) = flag {
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flag);
    }
    progress::run(&what, &mut cargo)?;
    Ok(target_dir.join(host).join("release").join(program))
}
