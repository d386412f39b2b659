//! The checked configuration of interception.

use std::collections::HashSet;
use std::net::IpAddr;
use std::path::{Component, Path, PathBuf};

use culvert_proxy_ebpf::{Acceleration, INBOUND, MAX_EXCLUDED_RANGES, MAX_EXCLUDED_UIDS, MAX_PODS, OUTBOUND};
use culvert_xds_client::api::culvert::extensions::bootstrap::interception::v1::{
    Interception as Message, interception as message,
};

use super::connect_config::{ConnectBalancing, HostMode};
use super::selectors::Enrolment;

/// What happens to an enrolled pod's new connections while no daemon serves them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailurePolicy {
    /// They leave the node untouched.
    #[default]
    Open,
    /// They are reset.
    Closed,
}

/// Which of an enrolled pod's connections are redirected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Traffic {
    /// Those that it opens.
    #[default]
    Outbound,
    /// Those that others open to it.
    Inbound,
    /// All.
    Both,
}

impl Traffic {
    /// As the kernel programs know it.
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::Outbound => OUTBOUND,
            Self::Inbound => INBOUND,
            Self::Both => OUTBOUND | INBOUND,
        }
    }
}

/// What is done with a pod's connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What happens to its connections while no daemon serves them.
    pub failure_policy: FailurePolicy,
    /// Which connections are redirected.
    pub traffic: Traffic,
    /// How far their payload may go past TCP.
    pub acceleration: Acceleration,
}

/// An enrolled pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its address.
    pub address: IpAddr,
    /// What is done with its connections.
    pub policy: Policy,
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
    /// Names of the interfaces over which packets come from other nodes, as shell globs.
    pub uplinks: Vec<String>,
    /// The pods that are enrolled by their addresses.
    pub pods: Vec<Pod>,
    /// What is done with connections of pods of which nothing else is said.
    pub policy: Policy,
    /// Which pods are enrolled by what Kubernetes says of them.
    pub enrolment: Option<Enrolment>,
    /// The file in which what was enrolled by command outlives a restart.
    pub state_path: PathBuf,
    /// Destination ports that are never redirected.
    pub excluded_ports: Vec<u16>,
    /// Destination ranges that are never redirected.
    pub excluded_ranges: Vec<Range>,
    /// Ports of pods to which connections are never redirected.
    pub inbound_excluded_ports: Vec<u16>,
    /// Source ranges whose connections to pods are never redirected.
    pub inbound_excluded_ranges: Vec<Range>,
    /// Destination ranges to which connections are made in the node's name.
    pub node_source_ranges: Vec<Range>,
    /// Users whose connections are never redirected.
    pub excluded_uids: Vec<u32>,
    /// The listener that receives redirected connections of pods.
    pub outbound_listener: String,
    /// The listener that receives redirected connections to pods.
    pub inbound_listener: String,
    /// The cgroup v2 directory whose sockets may take the short cut; none: no short cut.
    pub shortcut_cgroup: Option<PathBuf>,
    /// How far payload of the connections of the outbound and of the inbound listener may go past TCP.
    pub listener_acceleration: [Acceleration; 2],
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
    /// How many addresses can be enrolled. For tests; not in the API.
    pub max_addresses: usize,
    /// The kernel's release, if it is to be taken for another. For tests; not in the API.
    pub kernel_release: Option<String>,
}

/// The mark, when none is configured.
pub const DEFAULT_MARK: u32 = 0xC17;
/// The routing table, when none is configured.
pub const DEFAULT_ROUTE_TABLE: u32 = 3095;
/// The pin path, when none is configured.
pub const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/culvert";
/// The listener, when none is configured.
pub const DEFAULT_OUTBOUND_LISTENER: &str = "outbound";
/// The listener of connections to pods, when none is configured.
pub const DEFAULT_INBOUND_LISTENER: &str = "inbound";
/// The file of what was enrolled by command, when none is configured.
pub const DEFAULT_STATE_PATH: &str = "/run/culvert/enrolled.json";

impl Default for InterceptionConfig {
    fn default() -> Self {
        Self {
            interfaces: Vec::new(),
            uplinks: Vec::new(),
            pods: Vec::new(),
            policy: Policy::default(),
            enrolment: None,
            state_path: PathBuf::from(DEFAULT_STATE_PATH),
            excluded_ports: Vec::new(),
            excluded_ranges: Vec::new(),
            inbound_excluded_ports: Vec::new(),
            inbound_excluded_ranges: Vec::new(),
            node_source_ranges: Vec::new(),
            excluded_uids: Vec::new(),
            inbound_listener: DEFAULT_INBOUND_LISTENER.to_owned(),
            outbound_listener: DEFAULT_OUTBOUND_LISTENER.to_owned(),
            shortcut_cgroup: None,
            listener_acceleration: [Acceleration::Joined; 2],
            mark: DEFAULT_MARK,
            route_table: DEFAULT_ROUTE_TABLE,
            pin_path: PathBuf::from(DEFAULT_PIN_PATH),
            host: None,
            balancing: None,
            force_clsact: false,
            max_addresses: MAX_PODS,
            kernel_release: None,
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
            direction,
            inbound_listener,
            inbound_excluded_ports,
            inbound_excluded_ranges,
            node_source_ranges,
            excluded_uids,
            enrolment,
            state_path,
            acceleration,
            outbound_acceleration,
            inbound_acceleration,
        } = proto;
        let default = Self::default();
        if interfaces.is_empty() && host.is_none() && balancing.is_none() {
            return Err(("interfaces".to_owned(), "at least one name or glob is needed, such as `veth*`".to_owned()));
        }
        // The program of host mode would take the connection first, and the daemon lead it nowhere.
        let hosts = host.as_ref().map(|host| host.cgroups.as_slice()).unwrap_or_default();
        let balanced = balancing.as_ref().map(|balancing| balancing.cgroups.as_slice()).unwrap_or_default();
        for (index, cgroup) in balanced.iter().enumerate() {
            if let Some(host) = hosts.iter().find(|host| nests(host, cgroup)) {
                let reason = if host == cgroup {
                    format!("{cgroup} is in host.cgroups already: a cgroup has one of the two")
                } else {
                    format!("{cgroup} and {host} of host.cgroups are one below the other: a process has one of the two")
                };
                return Err(at("balancing.cgroups", index, reason));
            }
        }
        let policy = Policy {
            failure_policy: failure(*failure_policy, "failure_policy")?,
            traffic: traffic(*direction, "direction")?,
            acceleration: level(*acceleration, "acceleration")?,
        };
        let of_listener = |value: &Option<i32>, path: &str| {
            value.map_or(Ok(Acceleration::Joined), |value| {
                if shortcut_cgroup.is_empty() {
                    return Err(needs_cgroup(path));
                }
                level(value, path)
            })
        };
        let listener_acceleration = [
            of_listener(outbound_acceleration, "outbound_acceleration")?,
            of_listener(inbound_acceleration, "inbound_acceleration")?,
        ];
        if policy.acceleration != Acceleration::default() && shortcut_cgroup.is_empty() {
            return Err(needs_cgroup("acceleration"));
        }
        Ok(Self {
            interfaces: patterns(interfaces, "interfaces")?,
            uplinks: patterns(uplinks, "uplinks")?,
            pods: enrolled(pods, policy)?,
            policy,
            enrolment: enrolment.as_ref().map(|message| Enrolment::from_proto(message, policy)).transpose()?,
            state_path: match non_empty(state_path) {
                Some(path) => absolute(&path).map_err(|reason| ("state_path".to_owned(), reason))?,
                None => default.state_path,
            },
            excluded_ports: ports(excluded_ports, "excluded_ports")?,
            excluded_ranges: ranges(excluded_ranges, "excluded_ranges")?,
            inbound_excluded_ports: ports(inbound_excluded_ports, "inbound_excluded_ports")?,
            inbound_excluded_ranges: ranges(inbound_excluded_ranges, "inbound_excluded_ranges")?,
            node_source_ranges: ranges(node_source_ranges, "node_source_ranges")?,
            excluded_uids: users(excluded_uids)?,
            outbound_listener: non_empty(outbound_listener).unwrap_or(default.outbound_listener),
            inbound_listener: non_empty(inbound_listener).unwrap_or(default.inbound_listener),
            shortcut_cgroup: non_empty(shortcut_cgroup)
                .map(|path| absolute(&path).map_err(|reason| ("shortcut_cgroup".to_owned(), reason)))
                .transpose()?,
            listener_acceleration,
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
            host: host.as_ref().map(|host| HostMode::from_proto(host, policy.failure_policy)).transpose()?,
            balancing: balancing.as_ref().map(ConnectBalancing::from_proto).transpose()?,
            force_clsact: false,
            max_addresses: default.max_addresses,
            kernel_release: None,
        })
    }

    /// Has pods of an API server be those of the node with this id, where nothing else is said: a watch of all pods of a
    /// cluster on each of its nodes would be too much for its API server. The error is as of [`Self::from_proto`].
    pub fn on_node(mut self, id: &str) -> Result<Self, FieldError> {
        if let Some(enrolment) = &mut self.enrolment
            && enrolment.kubernetes.is_some()
            && enrolment.node_name.is_empty()
        {
            if id.is_empty() {
                let reason = "it, or the node's id (--service-node), is needed beside `kubernetes`".to_owned();
                return Err(("enrolment.node_name".to_owned(), reason));
            }
            enrolment.node_name = id.to_owned();
        }
        Ok(self)
    }

    /// The listeners that connections are redirected to: the field that names each, and its name.
    pub(crate) fn listeners(&self) -> Vec<(&'static str, &str)> {
        let directions = self.redirected();
        let outbound = (directions & OUTBOUND != 0).then_some(("outbound_listener", &*self.outbound_listener));
        let inbound = (directions & INBOUND != 0).then_some(("inbound_listener", &*self.inbound_listener));
        outbound.into_iter().chain(inbound).collect()
    }

    /// The directions in which anybody's connections may be redirected.
    pub(super) fn redirected(&self) -> u32 {
        let of_pods = if self.interfaces.is_empty() { 0 } else { self.pods_directions() };
        let of_host = if self.host.is_some() { OUTBOUND } else { 0 };
        of_pods | of_host
    }

    /// Whether pods' connections may come back over interfaces that are named.
    pub(super) fn has_uplinks(&self) -> bool {
        !self.interfaces.is_empty() && !self.uplinks.is_empty()
    }

    /// The directions that any pod may be enrolled for.
    fn pods_directions(&self) -> u32 {
        let selectors = self.enrolment.iter().flat_map(|enrolment| &enrolment.selectors);
        let policies = self.pods.iter().map(|pod| pod.policy).chain(selectors.map(|selector| selector.policy));
        policies.chain([self.policy]).fold(0, |all, policy| all | policy.traffic.bits())
    }
}

/// Whether a cgroup that one pattern names may be a cgroup that the other names, or be above or below it.
pub(super) fn nests(one: &str, other: &str) -> bool {
    let names = |path| Path::new(path).components().map(|name| name.as_os_str().to_string_lossy());
    names(one).zip(names(other)).all(|(one, other)| glob_matches(&one, &other) || glob_matches(&other, &one))
}

pub(super) fn at(field: &str, index: usize, reason: impl Into<String>) -> FieldError {
    (format!("{field}[{index}]"), reason.into())
}

pub(super) fn non_empty(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn ports(numbers: &[u32], field: &str) -> Result<Vec<u16>, FieldError> {
    let check = |(index, port): (usize, &u32)| {
        let port = u16::try_from(*port).ok().filter(|port| *port != 0);
        port.ok_or_else(|| at(field, index, "a TCP port is a number from 1 to 65535"))
    };
    numbers.iter().enumerate().map(check).collect()
}

fn users(uids: &[u32]) -> Result<Vec<u32>, FieldError> {
    /// What the kernel says where it does not know the user.
    const OVERFLOW: u32 = 65_534;
    if uids.len() > MAX_EXCLUDED_UIDS {
        let reason = format!("{} users; there can be {MAX_EXCLUDED_UIDS} at most", uids.len());
        return Err(("excluded_uids".to_owned(), reason));
    }
    match uids.iter().position(|uid| *uid == OVERFLOW) {
        Some(index) => {
            let reason = format!("{OVERFLOW} stands for every user that the kernel does not know");
            Err(at("excluded_uids", index, reason))
        }
        None => Ok(uids.to_vec()),
    }
}

pub(super) fn traffic(value: i32, path: &str) -> Result<Traffic, FieldError> {
    match message::Direction::try_from(value) {
        Ok(message::Direction::Outbound) => Ok(Traffic::Outbound),
        Ok(message::Direction::Inbound) => Ok(Traffic::Inbound),
        Ok(message::Direction::Both) => Ok(Traffic::Both),
        Err(_) => Err((path.to_owned(), format!("{value} is neither OUTBOUND (0), INBOUND (1) nor BOTH (2)"))),
    }
}

pub(super) fn failure(value: i32, path: &str) -> Result<FailurePolicy, FieldError> {
    match message::FailurePolicy::try_from(value) {
        Ok(message::FailurePolicy::FailOpen) => Ok(FailurePolicy::Open),
        Ok(message::FailurePolicy::FailClosed) => Ok(FailurePolicy::Closed),
        Err(_) => Err((path.to_owned(), format!("{value} is neither FAIL_OPEN (0) nor FAIL_CLOSED (1)"))),
    }
}

pub(super) fn level(value: i32, path: &str) -> Result<Acceleration, FieldError> {
    match message::Acceleration::try_from(value) {
        Ok(message::Acceleration::Automatic) => Ok(Acceleration::Automatic),
        Ok(message::Acceleration::Shortcut) => Ok(Acceleration::Shortcut),
        Ok(message::Acceleration::Off) => Ok(Acceleration::Off),
        Ok(message::Acceleration::BothWays) => Ok(Acceleration::BothWays),
        Ok(message::Acceleration::Joined) => Ok(Acceleration::Joined),
        Err(_) => Err((path.to_owned(), format!("{value} is neither SHORTCUT (0), OFF (1) nor JOINED (2)"))),
    }
}

fn needs_cgroup(path: &str) -> FieldError {
    (path.to_owned(), "nothing goes past TCP without `shortcut_cgroup`".to_owned())
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

/// An address that a pod may have, in the form of its own family.
pub(super) fn pod_address(text: &str) -> Option<IpAddr> {
    let address: IpAddr = text.parse().ok()?;
    let address = address.to_canonical();
    (!address.is_unspecified() && !address.is_loopback() && !address.is_multicast()).then_some(address)
}

fn enrolled(pods: &[message::Pod], default: Policy) -> Result<Vec<Pod>, FieldError> {
    if pods.len() > MAX_PODS {
        return Err(("pods".to_owned(), format!("{} pods; a node can have {MAX_PODS} at most", pods.len())));
    }
    let mut seen = HashSet::new();
    let mut enrolled = Vec::with_capacity(pods.len());
    for (index, message::Pod { address, failure_policy, direction, acceleration }) in pods.iter().enumerate() {
        let path = format!("pods[{index}].address");
        let Some(address) = pod_address(address) else {
            return Err((path, format!("`{address}` is not the IPv4 or IPv6 address of a pod")));
        };
        if !seen.insert(address) {
            return Err((path, format!("{address} is listed twice")));
        }
        let policy = default.overridden(*failure_policy, *direction, *acceleration, &format!("pods[{index}]"))?;
        enrolled.push(Pod { address, policy });
    }
    Ok(enrolled)
}

impl Policy {
    /// With what is set in a message that is more particular; `path` is that message's.
    pub(super) fn overridden(
        self,
        failure_policy: Option<i32>,
        direction: Option<i32>,
        acceleration: Option<i32>,
        path: &str,
    ) -> Result<Self, FieldError> {
        let failure_policy = failure_policy.map(|value| failure(value, &format!("{path}.failure_policy")));
        let traffic = direction.map(|value| traffic(value, &format!("{path}.direction")));
        let acceleration = acceleration.map(|value| level(value, &format!("{path}.acceleration")));
        Ok(Self {
            failure_policy: failure_policy.transpose()?.unwrap_or(self.failure_policy),
            traffic: traffic.transpose()?.unwrap_or(self.traffic),
            acceleration: acceleration.transpose()?.unwrap_or(self.acceleration),
        })
    }
}

fn ranges(texts: &[String], field: &str) -> Result<Vec<Range>, FieldError> {
    if texts.len() > MAX_EXCLUDED_RANGES {
        let reason = format!("{} ranges; there can be {MAX_EXCLUDED_RANGES} at most", texts.len());
        return Err((field.to_owned(), reason));
    }
    let parse = |(index, text): (usize, &String)| Range::parse(text).map_err(|reason| at(field, index, reason));
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
