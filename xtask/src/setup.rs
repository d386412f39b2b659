//! `cargo xtask setup`.

/// Flags of `cargo xtask setup`.
#[derive(clap::Args)]
pub struct Args {}

/// Runs the task.
pub fn run(_args: Args) -> anyhow::Result<()> {
    Ok(())
}
