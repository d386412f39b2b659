//! Where the programs under test are.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// The path of a program that this workspace builds: in the directory that the environment variable `CULVERT_BIN_DIR`
/// names, else where cargo put the running test or task.
pub fn binary(name: &str) -> Result<PathBuf> {
    let dir = match env::var_os("CULVERT_BIN_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => {
            let own = env::current_exe().context("finding the running program")?;
            // target/debug/xtask, or target/debug/deps/test-hash for a test.
            let dir = own.parent().context("the running program has no directory")?;
            if dir.ends_with("deps") { dir.parent().unwrap_or(dir).to_owned() } else { dir.to_owned() }
        }
    };
    let path = dir.join(name);
    if !path.exists() {
        bail!("{} does not exist: build it with `cargo build --workspace`, or set CULVERT_BIN_DIR", path.display());
    }
    Ok(path)
}

/// Like [`binary`], as text for a command line.
pub fn binary_arg(name: &str) -> Result<String> {
    binary(name)?.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{} is not UTF-8", path.display()))
}

/// The real Envoy: `$ENVOY`, else what `cargo xtask test` installed beside the directory of [`binary`].
pub fn envoy() -> Result<PathBuf> {
    if let Some(path) = env::var_os("ENVOY") {
        return Ok(PathBuf::from(path));
    }
    let culvertd = binary("culvertd")?;
    let target = culvert_target(&culvertd)?;
    let path = target.join("envoy/envoy/_bin/envoy");
    if !path.exists() {
        bail!(
            "{} does not exist: run `cargo xtask test`, which installs Envoy, or set ENVOY to a binary",
            path.display()
        );
    }
    Ok(path)
}

/// The directory with the Python packages of peers: `$CULVERT_PEERS`, else what `cargo xtask test` installed.
pub fn peers() -> Result<PathBuf> {
    if let Some(path) = env::var_os("CULVERT_PEERS") {
        return Ok(PathBuf::from(path));
    }
    let culvertd = binary("culvertd")?;
    let path = culvert_target(&culvertd)?.join("peers");
    if !path.join(".complete").exists() {
        bail!(
            "{} is not there or not complete: run `cargo xtask test`, which installs the peers, or set CULVERT_PEERS",
            path.display()
        );
    }
    Ok(path)
}

/// `target` of `target/debug/culvertd`.
fn culvert_target(culvertd: &std::path::Path) -> Result<&std::path::Path> {
    culvertd.ancestors().nth(2).with_context(|| format!("{} is not in a target directory", culvertd.display()))
}
