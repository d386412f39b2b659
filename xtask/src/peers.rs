//! Control planes and xDS clients that are not ours, which tests run: gRPC's own (grpcio, xds-protos), and sovereign.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::progress;

/// The PyPI packages, pinned.
const PACKAGES: [&str; 3] = ["grpcio==1.85.1", "xds-protos==1.85.0", "sovereign==0.32.12"];

/// Makes sure that they are in target/peers, and returns that directory, which is to be Python's path.
pub fn ensure(root: &Path) -> Result<PathBuf> {
    let directory = root.join("target/peers");
    // Written last: an installation that was interrupted is begun again.
    let complete = directory.join(".complete");
    if std::fs::read_to_string(&complete).is_ok_and(|packages| packages == PACKAGES.join(" ")) {
        return Ok(directory);
    }
    if directory.exists() {
        std::fs::remove_dir_all(&directory)?;
    }
    let mut pip = Command::new("pip3");
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--root-user-action", "ignore", "--target"]);
    pip.arg(&directory).args(PACKAGES);
    progress::run("installing xDS peers (grpcio, xds-protos, sovereign) into target/peers", &mut pip)?;
    std::fs::write(&complete, PACKAGES.join(" "))?;
    Ok(directory)
}
