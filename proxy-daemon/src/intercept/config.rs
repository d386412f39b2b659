//! The checked configuration of interception.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use culvert_proxy_ebpf::{MAX_EXCLUDED_RANGES, MAX_PODS};
use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::{
    Interception as Message, interception as message,
};

use super::connect_config::{ConnectBalancing, HostMode};

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
    /// Host processes whose connections are redirected when they connect.
    pub host: Option<HostMode>,
    /// Services that the kernel balances.
    pub balancing: Option<ConnectBalancing>,
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
            host: None,
            balancing: None,
            force_clsact: false,
        }
    }
}

/// A field's path within the message, and what is wrong with it.
pub(super) type FieldError = (String, String);

impl InterceptionConfig {
    /// Whether anything is done when processes connect.
    pub(super) fn has_hooks(&self) -> bool {
        self.host.is_some() || self.balancing.is_some()
    }

    /// Checks the bootstrap extension's message. The error is a field's path within the message and what is wrong with it.
    pub fn from_proto(proto: &Message) -> Result<Self, FieldError> {
        // Every field is named, so that a new one cannot be forgotten here.
        let Message {
            interfaces,
            uplinks,
            pods,
            excluded_ports,
            excluded_ranges,
            failure_policy,
            outbound_listener,
            shortcut_cgroup,
            mark,
            route_table,
            pin_path,
            host,
            balancing,
        } = proto;
        let default = Self::default();
        if interfaces.is_empty() && host.is_none() && balancing.is_none() {
            return Err(("interfaces".to_owned(), "at least one name or glob is needed, such as `veth*`".to_owned()));
        }
        let failure_policy = policy(*failure_policy, "failure_policy")?;
        Ok(Self {
            interfaces: patterns(interfaces, "interfaces")?,
            uplinks: patterns(uplinks, "uplinks")?,
            pods: enrolled(pods, failure_policy)?,
            excluded_ports: excluded_ports
                .iter()
                .enumerate()
                .map(|(index, port)| {
                    let port = u16::try_from(*port).ok().filter(|port| *port != 0);
                    port.ok_or_else(|| at("excluded_ports", index, "a TCP port is a number from 1 to 65535"))
                })
                .collect::<Result<_, _>>()?,
            excluded_ranges: ranges(excluded_ranges)?,
            outbound_listener: non_empty(outbound_listener).unwrap_or(default.outbound_listener),
            shortcut_cgroup: non_empty(shortcut_cgroup)
                .map(|path| absolute(&path).map_err(|reason| ("shortcut_cgroup".to_owned(), reason)))
                .transpose()?,
            mark: if *mark == 0 { default.mark } else { *mark },
            route_table: match *route_table {
                0 => default.route_table,
                // default, main, local
                253..=255 => {
                    let reason = format!("{route_table} is one of the kernel's own tables; choose another");
                    return Err(("route_table".to_owned(), reason));
                }
                table => table,
            },
            pin_path: match non_empty(pin_path) {
                Some(path) => pinnable(&path).map_err(|reason| ("pin_path".to_owned(), reason))?,
                None => default.pin_path,
            },
            host: host.as_ref().map(|host| HostMode::from_proto(host, failure_policy)).transpose()?,
            balancing: balancing.as_ref().map(ConnectBalancing::from_proto).transpose()?,
            force_clsact: false,
        })
    }
}

pub(super) fn at(field: &str, index: usize, reason: impl Into<String>) -> FieldError {
    (format!("{field}[{index}]"), reason.into())
}

fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

pub(super) fn policy(value: i32, path: &str) -> Result<FailurePolicy, FieldError> {
    match message::FailurePolicy::try_from(value) {
        Ok(message::FailurePolicy::FailOpen) => Ok(FailurePolicy::Open),
        Ok(message::FailurePolicy::FailClosed) => Ok(FailurePolicy::Closed),
        Err(_) => Err((path.to_owned(), format!("{value} is neither FAIL_OPEN (0) nor FAIL_CLOSED (1)"))),
    }
}

fn patterns(globs: &[String], field: &str) -> Result<Vec<String>, FieldError> {
    /// `IFNAMSIZ`, without the byte that ends the name.
    const LONGEST_NAME: usize = 15;
    for (index, glob) in globs.iter().enumerate() {
        let literal = glob.bytes().filter(|byte| *byte != b'*').count();
        if glob.is_empty() || literal > LONGEST_NAME || glob.contains(['/', ' ']) {
            let reason =
                format!("`{glob}` cannot match: an interface's name has 1 to {LONGEST_NAME} characters, no `/`");
            return Err(at(field, index, reason));
        }
    }
    Ok(globs.to_vec())
}

fn enrolled(pods: &[message::Pod], default_policy: FailurePolicy) -> Result<Vec<Pod>, FieldError> {
    if pods.len() > MAX_PODS {
        return Err(("pods".to_owned(), format!("{} pods; a node can have {MAX_PODS} at most", pods.len())));
    }
    let mut seen = HashSet::new();
    let mut enrolled = Vec::with_capacity(pods.len());
    for (index, message::Pod { address, failure_policy }) in pods.iter().enumerate() {
        let path = format!("pods[{index}].address");
        let parsed: Option<IpAddr> = address.parse().ok().map(|address: IpAddr| address.to_canonical());
        let usable = parsed.filter(|address| !address.is_unspecified() && !address.is_loopback());
        let Some(address) = usable.filter(|address| !address.is_multicast()) else {
            return Err((path, format!("`{address}` is not the IPv4 or IPv6 address of a pod")));
        };
        if !seen.insert(address) {
            return Err((path, format!("{address} is listed twice")));
        }
        let failure_policy = match failure_policy {
            Some(value) => policy(*value, &format!("pods[{index}].failure_policy"))?,
            None => default_policy,
        };
        enrolled.push(Pod { address, failure_policy });
    }
    Ok(enrolled)
}

fn ranges(texts: &[String]) -> Result<Vec<Range>, FieldError> {
    if texts.len() > MAX_EXCLUDED_RANGES {
        let reason = format!("{} ranges; there can be {MAX_EXCLUDED_RANGES} at most", texts.len());
        return Err(("excluded_ranges".to_owned(), reason));
    }
    let parse =
        |(index, text): (usize, &String)| Range::parse(text).map_err(|reason| at("excluded_ranges", index, reason));
    texts.iter().enumerate().map(parse).collect()
}

pub(super) fn absolute(path: &str) -> Result<PathBuf, String> {
    if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(format!("`{path}` is not an absolute path")) }
}

/// A path for pins: below some directory, and free of dots, which names on a BPF file system cannot have.
fn pinnable(path: &str) -> Result<PathBuf, String> {
    let path = absolute(path)?;
    let names = |component: Component<'_>| matches!(component, Component::Normal(_));
    if !path.components().any(names) || path.components().any(|component| component == Component::ParentDir) {
        return Err(format!("`{}` is not a directory of its own", path.display()));
    }
    let last = path.file_name().map(Path::new).unwrap_or(&path);
    if last.to_string_lossy().contains('.') {
        return Err(format!("`{}`: names on a BPF file system have no dots", path.display()));
    }
    Ok(path)
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
