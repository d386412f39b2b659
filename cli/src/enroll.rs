//! `culvert enroll` and `culvert unenroll`: which pods a node's daemon intercepts, by command.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, ensure};
use clap::{Args, ValueEnum};
use nix::sched::{CloneFlags, setns};

use crate::acceleration::Level;
use crate::http;

/// Shown after the flags' help of `culvert enroll`.
pub const HELP: &str = "\
The pod's address, or those of its network namespace, are enrolled at once, without a restart; a restart of the daemon keeps
it (state_path of the extension). It ends when the pod's interface goes: who gets the address later is another pod. A name that
is enrolled already gets the address besides. A cgroup stays enrolled by its path until it is unenrolled.

Examples:
  culvert enroll 10.244.1.7 fd00:10:244:1::7       both addresses of a pod
  culvert enroll --netns /run/netns/web --direction both
  culvert enroll --pid 4711 --name web             the network namespace of a process
  culvert enroll --cgroup /sys/fs/cgroup/system.slice/shop.service      programs of the node itself
  culvert unenroll web
  culvert status --node                            what is enrolled, and what is not, and why";

/// Flags of `culvert enroll`.
#[derive(Debug, Args)]
pub struct Flags {
    /// Addresses of the pod
    #[arg(value_name = "ADDRESS", required_unless_present_any = ["netns", "pid", "cgroup"])]
    addresses: Vec<IpAddr>,

    /// Its network namespace: a name of `ip netns`, or a path
    #[arg(long, value_name = "NAME", conflicts_with_all = ["addresses", "pid"])]
    netns: Option<PathBuf>,

    /// A process in its network namespace
    #[arg(long, value_name = "PID", conflicts_with = "addresses")]
    pid: Option<u32>,

    /// A cgroup, whose processes are redirected when they connect; the extension needs `host`
    #[arg(
        long,
        value_name = "PATH",
        conflicts_with_all = ["addresses", "netns", "pid", "name", "direction", "failure_policy", "acceleration"]
    )]
    cgroup: Option<PathBuf>,

    /// What to call it; the default is its first address
    #[arg(long)]
    name: Option<String>,

    /// Which connections are redirected; the default is as configured
    #[arg(long, value_enum)]
    direction: Option<Direction>,

    /// What happens to new connections while no daemon runs; the default is as configured
    #[arg(long, value_enum)]
    failure_policy: Option<FailurePolicy>,

    /// How far its payload may go past TCP; the default is as configured
    #[arg(long, value_enum)]
    acceleration: Option<Level>,

    #[command(flatten)]
    admin: Admin,
}

/// Where the daemon is asked.
#[derive(Debug, Args)]
pub struct Admin {
    /// The admin address of culvertd
    #[arg(long, value_name = "URL", env = "CULVERT_ADMIN", default_value = "http://127.0.0.1:9901")]
    admin: String,
}

impl Admin {
    /// Its URL.
    pub fn url(&self) -> &str {
        &self.admin
    }
}

/// Flags of `culvert unenroll`.
#[derive(Debug, Args)]
pub struct UnenrollFlags {
    /// The name, or an address, of a pod that was enrolled by command; or the path of a cgroup
    #[arg(value_name = "POD|CGROUP")]
    pod: String,

    #[command(flatten)]
    admin: Admin,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Direction {
    /// Those that the pod opens
    Outbound,
    /// Those that others open to it
    Inbound,
    /// All
    Both,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FailurePolicy {
    /// They pass
    Open,
    /// They are reset
    Closed,
}

/// Enrols a pod.
///
/// # Errors
/// When the daemon cannot be asked, or refuses.
pub fn enroll(flags: &Flags) -> anyhow::Result<String> {
    if let Some(cgroup) = &flags.cgroup {
        let cgroup = cgroup.to_str().context("the cgroup's path is not UTF-8")?;
        http::post(&flags.admin.admin, &format!("/interception/enroll?cgroup={}", encoded(cgroup)))?;
        return Ok(format!("enrolled {cgroup}\n"));
    }
    let namespace = match (&flags.netns, flags.pid) {
        (Some(name), _) if name.components().count() == 1 => Some(Path::new("/run/netns").join(name)),
        (Some(path), _) => Some(path.clone()),
        (None, Some(pid)) => Some(PathBuf::from(format!("/proc/{pid}/ns/net"))),
        (None, None) => None,
    };
    let addresses = match namespace {
        Some(path) => addresses_in(&path)?,
        None => flags.addresses.clone(),
    };
    let mut query: Vec<String> = addresses.iter().map(|address| format!("address={address}")).collect();
    query.extend(flags.name.as_ref().map(|name| format!("name={}", encoded(name))));
    let value = |value: Option<clap::builder::PossibleValue>| value.map(|value| value.get_name().to_owned());
    let direction = value(flags.direction.and_then(|it| it.to_possible_value()));
    query.extend(direction.map(|it| format!("direction={it}")));
    let policy = value(flags.failure_policy.and_then(|it| it.to_possible_value()));
    query.extend(policy.map(|it| format!("failure_policy={it}")));
    query.extend(flags.acceleration.map(|level| format!("acceleration={}", level.name())));
    http::post(&flags.admin.admin, &format!("/interception/enroll?{}", query.join("&")))?;
    let shown: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    Ok(format!("enrolled {}\n", shown.join(" ")))
}

/// Takes a pod out that was enrolled by command.
///
/// # Errors
/// When the daemon cannot be asked, or refuses.
pub fn unenroll(flags: &UnenrollFlags) -> anyhow::Result<String> {
    http::post(&flags.admin.admin, &format!("/interception/unenroll?pod={}", encoded(&flags.pod)))?;
    Ok(format!("{} is not enrolled by command any more\n", flags.pod))
}

/// The addresses in a network namespace by which others reach it.
fn addresses_in(path: &Path) -> anyhow::Result<Vec<IpAddr>> {
    let shown = path.display();
    let file = File::open(path).with_context(|| format!("network namespace {shown}"))?;
    // On a thread of its own: this one stays where it is.
    let listed = std::thread::spawn(move || -> anyhow::Result<Vec<IpAddr>> {
        setns(file.as_fd(), CloneFlags::CLONE_NEWNET).context("entering it (root is needed)")?;
        let interfaces = nix::ifaddrs::getifaddrs().context("listing its addresses")?;
        Ok(interfaces.filter_map(|interface| ip_of(&interface.address?)).filter(is_reachable).collect())
    });
    let addresses = listed.join().map_err(|_| anyhow!("listing its addresses panicked"))?;
    let addresses = addresses.with_context(|| format!("network namespace {shown}"))?;
    ensure!(!addresses.is_empty(), "network namespace {shown} has no address by which others could reach it");
    Ok(addresses)
}

fn ip_of(address: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|it| IpAddr::from(it.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|it| IpAddr::from(it.ip())))
}

fn is_reachable(address: &IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !link_local && !address.is_loopback() && !address.is_unspecified()
}

/// A value for the query of a URL.
pub fn encoded(value: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b':' | b'/' => char::from(byte).to_string(),
        other => format!("%{other:02X}"),
    };
    value.bytes().map(byte).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_others_reach_are_enrolled() {
        for (address, expected) in
            [("10.0.0.1", true), ("fd00::1", true), ("127.0.0.1", false), ("fe80::1", false), ("169.254.1.1", false)]
        {
            assert_eq!(is_reachable(&address.parse().unwrap()), expected, "{address}");
        }
    }

    #[test]
    fn names_are_encoded() {
        assert_eq!(encoded("shop/web 1&x=ä"), "shop/web%201%26x%3D%C3%A4");
    }
}
