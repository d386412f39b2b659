//! Cgroups (v2): one a lab, below it one a node, below that one a pod.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::wait_until;

/// How long killed processes may take to leave their cgroup.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A cgroup directory.
#[derive(Clone)]
pub(super) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Creates the cgroup of the lab `lab`.
    pub(super) fn create_root(lab: &str) -> Result<Self> {
        let path = root_path(lab)?;
        fs::create_dir_all(&path).with_context(|| format!("creating the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// Creates the child cgroup `name`.
    pub(super) fn child(&self, name: &str) -> Result<Self> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("creating the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file into which a process writes `0` to join.
    pub(super) fn procs(&self) -> Result<File> {
        let path = self.path.join("cgroup.procs");
        OpenOptions::new().write(true).open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// Kills every process of the lab `lab` and removes its cgroups.
    pub(super) fn remove_root(lab: &str) -> Result<()> {
        let path = root_path(lab)?;
        if !path.exists() {
            return Ok(());
        }
        let kill = path.join("cgroup.kill");
        fs::write(&kill, "1").with_context(|| format!("writing {} (Linux 5.14 and later)", kill.display()))?;
        wait_until(KILL_DEADLINE, "the lab's processes to end", || {
            let events = fs::read_to_string(path.join("cgroup.events"))?;
            ensure!(events.contains("populated 0"), "{} still has processes", path.display());
            Ok(())
        })?;
        remove_tree(&path)
    }
}

/// `<the cgroup v2 mount>/culvert-lab.<lab>`.
fn root_path(lab: &str) -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let mount = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2) == Some(&"cgroup2"))
        .and_then(|fields| fields.get(1).map(PathBuf::from))
        .context("no cgroup v2 file system in /proc/mounts: mount one (mount -t cgroup2 none /sys/fs/cgroup)")?;
    Ok(mount.join(format!("culvert-lab.{lab}")))
}

/// Removes a cgroup and its children. The control files in it need no removal and cannot be removed.
fn remove_tree(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path).with_context(|| format!("listing {}", path.display()))? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    // The kernel takes a moment to let go of a cgroup whose last process has just been reaped.
    wait_until(KILL_DEADLINE, "the lab's cgroups to go", || match fs::remove_dir(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing the cgroup {}", path.display()))
        }
        _ => Ok(()),
    })
}
