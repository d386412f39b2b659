//! `cargo xtask build-ebpf`.

/// Flags of `cargo xtask build-ebpf`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the task.
pub fn run(_args: Args) -> anyhow::Result<()> {
    Ok(())
}
