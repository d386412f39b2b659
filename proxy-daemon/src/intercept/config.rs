//! The checked configuration of interception.

use std::net::IpAddr;
use std::path::PathBuf;

/// What happens to an enrolled pod's new connections while no daemon serves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// They leave the node untouched.
    #[default]
    Open,
    /// They are dropped.
    Closed,
}

/// An enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its address.
    pub address: IpAddr,
    /// What happens to its connections while no daemon serves them.
    pub failure_policy: FailurePolicy,
}

/// A range of destination addresses: those that share the first `length` bits with `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Any address of the range.
    pub address: IpAddr,
    /// How many bits are fixed, at most 32 for IPv4 and 128 for IPv6.
    pub length: u8,
}

/// Which traffic is intercepted, and how: the bootstrap extension `culvert.bootstrap.interception`, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterceptionConfig {
    /// Names of pods' host-side interfaces, as shell globs.
    pub interfaces: Vec<String>,
    /// Names of the interfaces over which replies from other nodes come, as shell globs.
    pub uplinks: Vec<String>,
    /// The pods whose connections are redirected.
    pub pods: Vec<Pod>,
    /// Destination ports that are never redirected.
    pub excluded_ports: Vec<u16>,
    /// Destination ranges that are never redirected.
    pub excluded_ranges: Vec<Range>,
    /// The listener that receives redirected connections.
    pub outbound_listener: String,
    /// The cgroup v2 directory whose sockets may take the short cut; none: no short cut.
    pub shortcut_cgroup: Option<PathBuf>,
    /// The packet mark of redirected packets.
    pub mark: u32,
    /// The routing table that delivers marked packets to this host.
    pub route_table: u32,
    /// The directory on a BPF file system where links and maps outlive the daemon's death.
    pub pin_path: PathBuf,
    /// Attach by clsact filters, as kernels before 6.6 need, even where TCX exists. For tests; not in the API.
    pub force_clsact: bool,
}

/// The mark, when none is configured.
pub const DEFAULT_MARK: u32 = 0xC17;
/// The routing table, when none is configured.
pub const DEFAULT_ROUTE_TABLE: u32 = 3095;
/// The pin path, when none is configured.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/culvert";
/// The listener, when none is configured.
pub const DEFAULT_OUTBOUND_LISTENER: &str = "outbound";

impl Default for InterceptionConfig {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            uplinks: Vec::new(),
            pods: Vec::new(),
            excluded_ports: Vec::new(),
            excluded_ranges: Vec::new(),
            outbound_listener: DEFAULT_OUTBOUND_LISTENER.to_owned(),
            shortcut_cgroup: None,
            mark: DEFAULT_MARK,
            route_table: DEFAULT_ROUTE_TABLE,
            pin_path: PathBuf::from(DEFAULT_PIN_PATH),
            force_clsact: false,
        }
    }
}

/// Whether a name matches a shell glob of literal characters, `*` (any run) and `?` (any one character).
pub(super) fn glob_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where to resume when a mismatch shows that the last star should have taken one character more.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match retry {
                Some((after_star, taken)) => {
                    p = after_star;
                    n = taken + 1;
                    retry = Some((after_star, n));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

impl Range {
    /// Reads `<address>/<length>`, or one address.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr =
            address.parse().map_err(|_| format!("`{text}` is not an address range such as 10.0.0.0/8"))?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => longest,
            Some(digits) => digits
                .parse()
                .ok()
                .filter(|length| *length <= longest)
                .ok_or_else(|| format!("`{text}`: the prefix length must be a number from 0 to {longest}"))?,
        };
        Ok(Self { address, length })
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
