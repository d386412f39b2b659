//! `cargo xtask build-ebpf`: the kernel programs, compiled to one object that culvertd carries.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail};

use crate::progress;
use crate::toolchain::Toolchain;

/// The kernel binary's name in proxy-ebpf/Cargo.toml.
const BINARY: &str = "culvert-kernel";
const TARGET: &str = "bpfel-unknown-none";

/// Flags of `cargo xtask build-ebpf`.
#[derive(clap::Args)]
pub struct Args {
    /// Build even if nothing changed.
    #[arg(long)]
    force: bool,
}

/// Runs the task.
pub fn run(args: Args) -> Result<()> {
    if args.force { build() } else { ensure() }
}

/// Builds the object, unless it is newer than all that it is made from.
pub fn ensure() -> Result<()> {
    let root = workspace_root();
    let object = object_path(&root);
    if let Ok(built) = modified(&object) {
        let sources = [root.join("proxy-ebpf"), root.join("xtask/src/build_ebpf.rs")];
        let newest = sources.iter().map(|source| newest(source)).collect::<Result<Vec<_>>>()?;
        if newest.into_iter().all(|source| source <= built) {
            eprintln!("{} is up to date", object.display());
            return Ok(());
        }
    }
    build()
}

fn build() -> Result<()> {
    let root = workspace_root();
    let Some(toolchain) = Toolchain::find() else {
        bail!("no toolchain for the kernel programs is installed: run `cargo xtask setup`");
    };
    let architecture = match std::env::consts::ARCH {
        known @ ("x86_64" | "aarch64" | "arm" | "riscv64" | "s390x" | "powerpc64") => known,
        other => bail!("kernel programs cannot be built for the CPU architecture {other}"),
    };
    let build_dir = root.join("target/bpf/build");
    let flags = [
        "-Clinker=bpf-linker".to_owned(),
        "-Clink-arg=--btf".to_owned(),
        format!("--cfg=bpf_target_arch=\"{architecture}\""),
        "-Cdebuginfo=2".to_owned(),
    ];
    let mut cargo = toolchain.cargo();
    cargo
        .current_dir(&root)
        .args(["--release", "--target", TARGET, "--package", "culvert-proxy-ebpf", "--bin", BINARY])
        .args(["--features", "kernel", "--target-dir"])
        .arg(&build_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // The workspace's release profile is the daemon's. bpf-linker does the optimising across crates itself, and
        // BTF comes from full debug information.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort");
    progress::run("building the kernel programs", &mut cargo)?;

    let built = build_dir.join(TARGET).join("release").join(BINARY);
    let object = object_path(&root);
    // In one step, so that a daemon build running beside never reads half of it.
    let partial = object.with_extension("partial");
    fs::copy(&built, &partial).with_context(|| format!("cannot copy {}", built.display()))?;
    fs::rename(&partial, &object).with_context(|| format!("cannot write {}", object.display()))?;
    eprintln!("{}", object.display());
    Ok(())
}

/// The object that proxy-daemon/build.rs takes.
fn object_path(root: &Path) -> PathBuf {
    root.join("target/bpf/culvert.bpf.o")
}

pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").components().collect::<PathBuf>().canonicalize().unwrap_or_else(
        |_| PathBuf::from("."), // not reached while the sources that this was built from exist
    )
}

fn modified(path: &Path) -> Result<SystemTime> {
    fs::metadata(path).and_then(|data| data.modified()).with_context(|| format!("cannot read {}", path.display()))
}

/// When a file, or any file under a directory, was last changed.
fn newest(path: &Path) -> Result<SystemTime> {
    let mut newest = modified(path)?;
    if path.is_dir() {
        for entry in fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))? {
            newest = newest.max(self::newest(&entry?.path())?);
        }
    }
    Ok(newest)
}
