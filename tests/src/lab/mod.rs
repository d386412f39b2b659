//! A lab: nodes and pods as a Kubernetes node would have them, built out of network namespaces, veth pairs, routes and
//! cgroups. docs/lab.md draws it.
//!
//! ```no_run
//! use culvert_tests::lab::Lab;
//!
//! let lab = Lab::new("hello")?;
//! let node = lab.node("node-a")?;
//! let client = node.pod("client")?;
//! let server = node.pod("server")?;
//! let _listening = server.spawn("socat", &["socat", "TCP-LISTEN:80,fork", "EXEC:cat"])?;
//! client.run(&["ping", "-c1", &server.ipv4().to_string()])?.success()?;
//! # anyhow::Ok(())
//! ```

mod cgroup;
mod netns;
mod node;
mod process;
mod signals;

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};

use cgroup::Cgroup;
use netns::NetNs;
pub use node::{Node, Pod};
pub use process::{Finished, Process};

/// Where labs keep their files, one directory a lab.
const RUN_DIR: &str = "/run/culvert-lab";

/// A set of nodes on one underlay network. Dropping it removes everything it made, unless [`Lab::keep`] was called.
pub struct Lab {
    shared: Arc<Shared>,
}

/// What nodes and pods need from their lab.
struct Shared {
    name: String,
    run_dir: PathBuf,
    cgroup: Cgroup,
    underlay: NetNs,
    nodes: AtomicU8,
    keep: Arc<AtomicBool>,
    /// Held while a program works with the lab, so that no other takes it for a leftover.
    _lock: File,
    /// The lines `address name...` that every pod sees as /etc/hosts.
    hosts: Mutex<String>,
}

impl Lab {
    /// Removes what an earlier lab of this name left, and builds an empty one. Needs root. `name` is lower-case letters,
    /// digits and dashes; labs of different names run side by side.
    pub fn new(name: &str) -> Result<Self> {
        ensure!(nix::unistd::geteuid().is_root(), "a lab creates network namespaces and cgroups: run this as root");
        check_name(name)?;
        let lock = lock(name)?;
        remove(name)?;
        let run_dir = Path::new(RUN_DIR).join(name);
        fs::create_dir_all(&run_dir).with_context(|| format!("creating {}", run_dir.display()))?;
        let cgroup = Cgroup::create_root(name)?;
        let underlay = NetNs::create(&netns_name(name, "underlay"))?;
        underlay.ip(&["link set lo up", "link add br0 type bridge", "link set br0 up"])?;
        let shared = Shared {
            name: name.to_owned(),
            run_dir,
            cgroup,
            underlay,
            nodes: AtomicU8::new(0),
            keep: Arc::new(AtomicBool::new(false)),
            _lock: lock,
            hosts: Mutex::new("127.0.0.1 localhost\n::1 localhost\n".to_owned()),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Adds a node: a router with an uplink to the underlay and a range of pod addresses that the other nodes route to it.
    pub fn node(&self, name: &str) -> Result<Node> {
        check_name(name)?;
        let number = self.shared.nodes.fetch_add(1, Ordering::Relaxed) + 1;
        ensure!(number <= node::NODES_MAX, "a lab has at most {} nodes", node::NODES_MAX);
        Node::create(Arc::clone(&self.shared), name, number)
    }

    /// Makes `names` resolve to `address` in every pod (an entry of /etc/hosts); processes started later see it.
    pub fn add_host(&self, address: &str, names: &[&str]) -> Result<()> {
        let mut hosts = self.shared.hosts.lock().expect("no holder of this lock panics");
        *hosts += &format!("{address} {}\n", names.join(" "));
        let path = self.shared.hosts_path();
        fs::write(&path, hosts.as_bytes()).with_context(|| format!("writing {}", path.display()))
    }

    /// The directory of this lab's files: what its processes print, and whatever the caller puts there.
    pub fn dir(&self) -> &Path {
        &self.shared.run_dir
    }

    /// Leaves the lab and its processes in place when this value is dropped.
    pub fn keep(&self) {
        self.shared.keep.store(true, Ordering::Relaxed);
    }

    /// From now on SIGINT, SIGTERM and SIGHUP remove the lab `name`, which this program has built or is about to build, and
    /// end the program with status 130. Call it before other threads are started.
    pub fn remove_on_signal(name: &str) -> Result<()> {
        check_name(name)?;
        signals::remove_on_signal(name.to_owned())
    }

    /// Removes what a lab of this name left: processes, mounts, network namespaces, cgroups and files. Fails if a running
    /// program still works with it.
    pub fn cleanup(name: &str) -> Result<()> {
        check_name(name)?;
        let _lock = lock(name)?;
        remove(name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.shared.keep.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = remove(&self.shared.name) {
            eprintln!("lab {}: {error:#}; the next lab of this name tries again", self.shared.name);
        }
    }
}

impl Shared {
    fn netns_name(&self, of: &str) -> String {
        netns_name(&self.name, of)
    }

    fn hosts_path(&self) -> PathBuf {
        self.run_dir.join("hosts")
    }
}

/// The name, as `ip netns` lists it, of a lab's namespace. The dots cannot occur in a lab's name, so no lab's prefix is
/// another's.
fn netns_name(lab: &str, of: &str) -> String {
    format!("culvert.{lab}.{of}")
}

fn check_name(name: &str) -> Result<()> {
    let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    ensure!(
        !name.is_empty() && name.bytes().all(allowed),
        "`{name}` cannot name a lab, node or pod: use lower-case letters, digits and dashes"
    );
    Ok(())
}

/// Takes the lab's lock; it goes with the file or with the process.
fn lock(name: &str) -> Result<File> {
    fs::create_dir_all(RUN_DIR).with_context(|| format!("creating {RUN_DIR}"))?;
    let path = Path::new(RUN_DIR).join(format!("{name}.lock"));
    let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!("the lab `{name}` is in use by another program: wait for it, or end it"),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", path.display())),
    }
}

/// See [`Lab::cleanup`]; the caller holds the lock.
fn remove(name: &str) -> Result<()> {
    Cgroup::remove_root(name)?;
    let run_dir = Path::new(RUN_DIR).join(name);
    unmount_below(&run_dir)?;
    netns::delete_all(&netns_name(name, ""))?;
    if run_dir.exists() {
        fs::remove_dir_all(&run_dir).with_context(|| format!("removing {}", run_dir.display()))?;
    }
    Ok(())
}

fn unmount_below(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    for target in mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(Path::new) {
        if target.starts_with(dir) {
            umount2(target, MntFlags::MNT_DETACH).with_context(|| format!("unmounting {}", target.display()))?;
        }
    }
    Ok(())
}
