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
