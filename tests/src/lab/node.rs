//! Nodes and pods.

use std::ffi::CString;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::mount::{MsFlags, mount};

use super::cgroup::Cgroup;
use super::netns::NetNs;
use super::process::{Finished, Place, Process};
use super::{Shared, check_name};

/// How long [`Pod::run`] and [`Node::run`] let a command take.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// How many nodes a lab may have: each routes to all others from the start.
pub(super) const NODES_MAX: u8 = 8;

/// An interface name has at most 15 bytes, and `veth-` takes five.
const POD_NAME_MAX: usize = 10;

/// A node: a network namespace that routes between its pods and the underlay. Clones are handles to the same node.
#[derive(Clone)]
pub struct Node {
    inner: Arc<NodeInner>,
}

struct NodeInner {
    shared: Arc<Shared>,
    name: String,
    /// Counts from 1; part of every address.
    number: u8,
    netns: NetNs,
    cgroup: Cgroup,
    bpf_dir: PathBuf,
    pods: AtomicU8,
}

/// A pod: a network namespace with one interface and a cgroup below its node's. Clones are handles to the same pod.
#[derive(Clone)]
pub struct Pod {
    inner: Arc<PodInner>,
}

struct PodInner {
    shared: Arc<Shared>,
    name: String,
    node: String,
    netns: NetNs,
    cgroup: Cgroup,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
}

impl Node {
    pub(super) fn create(shared: Arc<Shared>, name: &str, number: u8) -> Result<Self> {
        let netns = NetNs::create(&shared.netns_name(name))?;
        let cgroup = shared.cgroup.child(name)?;
        let bpf_dir = shared.run_dir.join(name).join("bpf");
        fs::create_dir_all(&bpf_dir).with_context(|| format!("creating {}", bpf_dir.display()))?;
        mount(Some("bpf"), &bpf_dir, Some("bpf"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mounting a BPF file system on {}", bpf_dir.display()))?;

        netns.sysctl(&["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"], "1")?;
        netns.sysctl(
            &[
                "net/ipv4/conf/all/rp_filter",
                "net/ipv4/conf/default/rp_filter",
                "net/ipv4/conf/all/send_redirects",
                "net/ipv4/conf/default/send_redirects",
                "net/ipv6/conf/default/accept_dad",
                "net/ipv6/conf/default/accept_ra",
            ],
            "0",
        )?;
        let underlay = shared.underlay.name();
        netns.ip(&[
            "link set lo up".to_owned(),
            format!("link add eth0 type veth peer name {name} netns {underlay}"),
            format!("address add {}/24 dev eth0", underlay_ipv4(number)),
            format!("address add {}/64 dev eth0 nodad", underlay_ipv6(number)),
            "link set eth0 up".to_owned(),
        ])?;
        shared.underlay.ip(&[format!("link set {name} master br0"), format!("link set {name} up")])?;
        // A route to a node that does not exist yet does no harm, and saves telling every node of every other.
        let routes: Vec<String> = (1..=NODES_MAX)
            .filter(|other| *other != number)
            .flat_map(|other| {
                [
                    format!("route add {}/24 via {}", pod_ipv4(other, 0), underlay_ipv4(other)),
                    format!("route add {}/64 via {}", pod_ipv6(other, 0), underlay_ipv6(other)),
                ]
            })
            .collect();
        netns.ip(&routes)?;
        let inner = NodeInner { shared, name: name.to_owned(), number, netns, cgroup, bpf_dir, pods: AtomicU8::new(0) };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Adds a pod. Its interface on the node is `veth-<name>`; `name` has at most ten characters and is unique in the lab.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        check_name(name)?;
        ensure!(name.len() <= POD_NAME_MAX, "the pod name `{name}` is longer than {POD_NAME_MAX} characters");
        let node = &*self.inner;
        let host = node.pods.fetch_add(1, Ordering::Relaxed) + 10;
        let (ipv4, ipv6) = (pod_ipv4(node.number, host), pod_ipv6(node.number, host));
        let netns = NetNs::create(&node.shared.netns_name(name))?;
        let cgroup = node.cgroup.child(name)?;
        netns.sysctl(&["net/ipv6/conf/default/accept_dad", "net/ipv6/conf/default/accept_ra"], "0")?;
        // Programs in pods bind low ports, as in containers.
        netns.sysctl(&["net/ipv4/ip_unprivileged_port_start"], "0")?;
        let veth = format!("veth-{name}");
        // The gateway's link-local addresses sit on every host-side interface, so pods resolve them by plain ARP and ND.
        node.netns.ip(&[
            format!("link add {veth} type veth peer name eth0 netns {}", netns.name()),
            format!("address add 169.254.1.1/32 dev {veth}"),
            format!("address add fe80::1/64 dev {veth} nodad"),
            format!("link set {veth} up"),
            format!("route add {ipv4}/32 dev {veth} src {}", self.ipv4()),
            format!("route add {ipv6}/128 dev {veth} src {}", self.ipv6()),
        ])?;
        netns.ip(&[
            "link set lo up".to_owned(),
            format!("address add {ipv4}/32 dev eth0"),
            format!("address add {ipv6}/128 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            "route add 169.254.1.1/32 dev eth0 scope link".to_owned(),
            "route add default via 169.254.1.1 dev eth0".to_owned(),
            "route add ::/0 via fe80::1 dev eth0".to_owned(),
        ])?;
        let shared = Arc::clone(&node.shared);
        let inner = PodInner { shared, name: name.to_owned(), node: node.name.clone(), netns, cgroup, ipv4, ipv6 };
        Ok(Pod { inner: Arc::new(inner) })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The address on the underlay.
    pub fn ipv4(&self) -> Ipv4Addr {
        underlay_ipv4(self.inner.number)
    }

    /// The IPv6 address on the underlay.
    pub fn ipv6(&self) -> Ipv6Addr {
        underlay_ipv6(self.inner.number)
    }

    /// The name of the network namespace, for `ip netns exec`.
    pub fn netns(&self) -> &str {
        self.inner.netns.name()
    }

    /// The cgroup directory; the node's pods have theirs below it.
    pub fn cgroup(&self) -> &Path {
        self.inner.cgroup.path()
    }

    /// A directory on a BPF file system of the node's own.
    pub fn bpf_dir(&self) -> &Path {
        &self.inner.bpf_dir
    }

    /// Starts a program in the node's network namespace and cgroup. What it prints goes to `<lab dir>/<node>/<label>.out`
    /// and `.err`.
    pub fn spawn(&self, label: &str, command: &[&str]) -> Result<Process> {
        let node = &*self.inner;
        let place = Place { netns: &node.netns, cgroup: &node.cgroup, hosts: None };
        let files = node.shared.run_dir.join(&node.name);
        Process::spawn(place, &files, label, command, Arc::clone(&node.shared.keep))
    }

    /// Runs a program to its end (at most 60 s) in the node.
    pub fn run(&self, command: &[&str]) -> Result<Finished> {
        self.spawn("run", command)?.wait(RUN_DEADLINE)
    }

    /// Calls `work` on a thread inside the node's network namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.inner.netns.run(work)
    }
}

impl Pod {
    /// The name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The IPv4 address.
    pub fn ipv4(&self) -> Ipv4Addr {
        self.inner.ipv4
    }

    /// The IPv6 address.
    pub fn ipv6(&self) -> Ipv6Addr {
        self.inner.ipv6
    }

    /// The name of the node it is on.
    pub fn node_name(&self) -> &str {
        &self.inner.node
    }

    /// The name of the network namespace, for `ip netns exec`.
    pub fn netns(&self) -> &str {
        self.inner.netns.name()
    }

    /// Starts a program in the pod: its network namespace, its cgroup, and the lab's names in /etc/hosts. What it prints
    /// goes to `<lab dir>/<pod>/<label>.out` and `.err`.
    pub fn spawn(&self, label: &str, command: &[&str]) -> Result<Process> {
        let pod = &*self.inner;
        let hosts = pod.shared.hosts_path();
        let hosts = match hosts.exists() {
            true => Some(CString::new(hosts.as_os_str().as_bytes())?),
            false => None,
        };
        let place = Place { netns: &pod.netns, cgroup: &pod.cgroup, hosts };
        let files = pod.shared.run_dir.join(&pod.name);
        Process::spawn(place, &files, label, command, Arc::clone(&pod.shared.keep))
    }

    /// Runs a program to its end (at most 60 s) in the pod.
    pub fn run(&self, command: &[&str]) -> Result<Finished> {
        self.spawn("run", command)?.wait(RUN_DEADLINE)
    }

    /// Calls `work` on a thread inside the pod's network namespace.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.inner.netns.run(work)
    }
}

fn underlay_ipv4(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 31, 0, node)
}

fn underlay_ipv6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd31, 0, 0, 0, 0, 0, 0, node.into())
}

fn pod_ipv4(node: u8, host: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, node, host)
}

fn pod_ipv6(node: u8, host: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host.into())
}
