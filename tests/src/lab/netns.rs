//! Network namespaces, named as `ip netns` names them, so that `ip netns exec` works in a lab that was kept.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Where `ip netns` keeps the names.
const NETNS_DIR: &str = "/run/netns";

/// A named network namespace.
pub(super) struct NetNs {
    name: String,
    file: File,
}

impl NetNs {
    /// Creates a namespace.
    pub(super) fn create(name: &str) -> Result<Self> {
        ip_command(&["netns", "add", name], "")?;
        let path = Path::new(NETNS_DIR).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file })
    }

    /// The name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The namespace, for setns(2).
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Runs the `ip` commands (without the word `ip`) inside the namespace, in one process.
    pub(super) fn ip(&self, commands: &[impl AsRef<str>]) -> Result<()> {
        let batch: String = commands.iter().flat_map(|command| [command.as_ref(), "\n"]).collect();
        ip_command(&["-n", &self.name, "-batch", "-"], &batch)
    }

    /// Writes `value` to each of the sysctls (paths below /proc/sys).
    pub(super) fn sysctl(&self, keys: &[&str], value: &str) -> Result<()> {
        self.run(|| {
            for key in keys {
                let path = Path::new("/proc/sys").join(key);
                fs::write(&path, value).with_context(|| format!("writing {}", path.display()))?;
            }
            Ok(())
        })
    }

    /// Calls `work` on a thread that is inside the namespace; sockets it opens belong to the namespace.
    pub(super) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.fd(), CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering the network namespace {}", self.name))?;
                work()
            });
            inside.join().map_err(|_| anyhow!("a thread in the network namespace {} panicked", self.name))?
        })
    }
}

/// Deletes every namespace whose name starts with `prefix`.
pub(super) fn delete_all(prefix: &str) -> Result<()> {
    // The directory appears with the first namespace.
    let Ok(entries) = fs::read_dir(NETNS_DIR) else { return Ok(()) };
    for entry in entries {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().filter(|name| name.starts_with(prefix)) {
            ip_command(&["netns", "delete", name], "")?;
        }
    }
    Ok(())
}

fn ip_command(arguments: &[&str], input: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("running `ip`: is iproute2 installed?")?;
    let mut stdin = child.stdin.take().context("`ip` has no standard input")?;
    // `ip` may have failed and gone before it read all; its exit status tells that better than EPIPE.
    let _ = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("`ip {}` failed: {}\n{input}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
