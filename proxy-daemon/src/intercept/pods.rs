//! The pods of this node: which there are, which are to be enrolled, and which are.
//!
//! A pod is known from the bootstrap (by its address alone), from manifests, or by command. Its policy is in force for its
//! addresses; that of a pod from manifests or by command only for packets of the interface that it has now. So whoever
//! gets the address later, on an interface of its own, does not inherit it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use aya::Ebpf;
use culvert_proxy_ebpf::{Acceleration, Address, PodPolicy};
use serde::Serialize;
use twox_hash::XxHash64;

use super::config::{FailurePolicy, Policy, Traffic};
use super::error::InterceptError;
use super::kernel;
use crate::access_log::rfc3339;

/// From where a pod is known. Of two that have one address, the later in this order counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Origin {
    /// `pods` of the bootstrap.
    Bootstrap,
    /// A manifest.
    Manifest,
    /// An API server.
    Kubernetes,
    /// `POST /interception/enroll`.
    Command,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// What it is called, and what makes it another pod than an earlier one of that name.
    pub(super) name: String,
    pub(super) identity: String,
    pub(super) origin: Origin,
    pub(super) addresses: Vec<IpAddr>,
    /// What is to be done with its connections, or why nothing is.
    pub(super) wanted: Result<Policy, String>,
    /// It is being deleted: that it loses its interface is no fault.
    pub(super) leaving: bool,
    /// Changes whenever it is told of anew.
    pub(super) version: u64,
    /// The only interface that it may have, if that is known.
    pub(super) interface: Option<u32>,
}

/// Where the node sends packets to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Over this interface, which has the programs.
    Interface(u32, String),
    /// Over a bridge, one of whose ports has them.
    Bridge(String),
    /// Elsewhere, or nowhere: in words.
    Missing(String),
}

/// Which pod had an address over which interface.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    identity: String,
    version: u64,
    interface: u32,
}

/// What is in force for an address.
struct InForce {
    identity: String,
    origin: Origin,
    policy: PodPolicy,
    interface: String,
    since: SystemTime,
}

/// The names of enrolled pods (`namespace/name`; of those that are known by their addresses alone, that) by their addresses.
pub type PodNames = HashMap<IpAddr, Arc<str>>;

/// All pods, in the order in which they count.
#[derive(Default)]
pub(super) struct Pods {
    known: BTreeMap<(Origin, usize), Known>,
    in_force: HashMap<IpAddr, InForce>,
    bound: HashMap<IpAddr, Bound>,
    /// Over which interface pods had their addresses that were enrolled since that is there, also if they are not any more.
    homes: HashMap<IpAddr, u32>,
    /// Why addresses that are to be enrolled are not.
    faults: BTreeMap<IpAddr, String>,
    /// How often an address could not be enrolled.
    failures: u64,
}

/// A pod, for people.
#[derive(Clone, Debug, Serialize)]
pub struct PodStatus {
    /// What it is called: `namespace/name`, or its address.
    pub name: String,
    origin: Origin,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether all its addresses are enrolled.
    pub enrolled: bool,
    /// Since when, by RFC 3339.
    pub since: Option<String>,
    /// Why it is not enrolled.
    pub reason: Option<String>,
    direction: Option<&'static str>,
    failure_policy: Option<&'static str>,
    acceleration: Option<&'static str>,
    interface: Option<String>,
    /// Connections that it opened and that were redirected.
    pub outbound_connections: u64,
    /// Connections to it that were redirected.
    pub inbound_connections: u64,
    /// Bytes that it sent to the daemon.
    pub bytes_sent: u64,
    /// Bytes that came for it by the daemon.
    pub bytes_received: u64,
}

impl Pods {
    /// Replaces all pods of one origin; of two with one address, the later in the list counts.
    pub(super) fn set(&mut self, origin: Origin, pods: Vec<Known>) {
        self.known.retain(|(known, _), _| *known != origin);
        self.known.extend(pods.into_iter().enumerate().map(|(index, pod)| ((origin, index), pod)));
    }

    /// Puts in force what is wanted, and out of force what is not any more. `place` says where an address is. Returns the addresses of
    /// pods that are gone: of those whose interface is not known. Of others [`Self::leave`] tells.
    pub(super) fn reconcile(&mut self, ebpf: &mut Ebpf, mut place: impl FnMut(IpAddr) -> Place) -> Vec<IpAddr> {
        // Whom an address belongs to, enrolled or not: a pod that is not to be enrolled keeps it from others.
        let owners: HashMap<IpAddr, &Known> =
            self.known.values().flat_map(|pod| pod.addresses.iter().map(move |address| (*address, pod))).collect();
        let gone: Vec<IpAddr> = self
            .in_force
            .iter()
            .filter(|(address, in_force)| {
                owners.get(address).is_none_or(|pod| pod.wanted.is_err() || pod.identity != in_force.identity)
            })
            .map(|(address, _)| *address)
            .collect();
        let mut left = Vec::new();
        for address in gone {
            let before = self.in_force.remove(&address);
            let is_told_of = |origin: Origin| matches!(origin, Origin::Manifest | Origin::Kubernetes);
            if before.is_some_and(|before| {
                let is_another = |pod: &&Known| is_told_of(pod.origin) && pod.identity != before.identity;
                before.policy.interface == 0 && is_told_of(before.origin) && owners.get(&address).is_none_or(is_another)
            }) {
                left.push(address);
            }
            if let Err(error) = kernel::remove_pod(ebpf, address) {
                tracing::error!(%error, %address, "cannot take a pod's policy out of force");
            }
        }
        self.bound.retain(|address, bound| owners.get(address).is_some_and(|pod| pod.identity == bound.identity));
        let mut faults = BTreeMap::new();
        for (address, pod) in owners {
            let Ok(wanted) = &pod.wanted else { continue };
            let found = match pod.origin {
                Origin::Bootstrap => Ok((0, String::new())),
                Origin::Manifest | Origin::Kubernetes | Origin::Command => {
                    place(address).bound().and_then(|found| bind(&mut self.bound, pod, address, found))
                }
            };
            let enrolled = found.and_then(|(interface, name)| {
                let policy = wanted.in_kernel(interface);
                let before = self.in_force.get(&address);
                if before.is_some_and(|before| before.policy == policy) {
                    return Ok(());
                }
                let since = kernel::set_pod(ebpf, address, number_of(&pod.identity), policy)
                    .map_err(|error| error.to_string())?;
                let identity = pod.identity.clone();
                self.in_force.insert(address, InForce { identity, origin: pod.origin, policy, interface: name, since });
                if interface != 0 {
                    self.homes.insert(address, interface);
                }
                tracing::info!(pod = pod.name, %address, "enrolled");
                Ok(())
            });
            let Err(reason) = enrolled else { continue };
            // A policy for an interface that is gone must not outlive it.
            if self.in_force.remove(&address).is_some()
                && let Err(error) = kernel::remove_pod(ebpf, address)
            {
                tracing::error!(%error, %address, "cannot take a pod's policy out of force");
            }
            if pod.leaving {
                continue;
            }
            if self.faults.get(&address) != Some(&reason) {
                self.failures += 1;
                tracing::error!(pod = pod.name, %address, reason, "a pod that should be enrolled is not");
            }
            faults.insert(address, reason);
        }
        self.faults = faults;
        left
    }

    /// The addresses of the pods that had interfaces that are gone: and they with them.
    pub(super) fn leave(&mut self, is_gone: impl Fn(u32) -> bool) -> Vec<IpAddr> {
        let gone = self.homes.extract_if(|_, home| is_gone(*home));
        gone.map(|(address, _)| address).collect()
    }

    /// Forgets what earlier daemons counted for pods that are not to be enrolled any more. To be called when all pods are known.
    pub(super) fn forget_others(&self, ebpf: &mut Ebpf) -> Result<(), InterceptError> {
        let wanted = self.known.values().filter(|pod| pod.wanted.is_ok());
        let kept: HashSet<(Address, u64)> = wanted
            .flat_map(|pod| pod.addresses.iter().map(|it| (kernel::address(*it), number_of(&pod.identity))))
            .collect();
        kernel::forget_pods(ebpf, |address, identity| kept.contains(&(*address, identity)))
    }

    /// Whether trying again may help.
    pub(super) fn has_faults(&self) -> bool {
        !self.faults.is_empty()
    }

    /// Every address that should be enrolled and is not, with the pod's name and the reason.
    pub(super) fn faults(&self) -> Vec<String> {
        let name = |address: &IpAddr| {
            self.known.values().rev().find(|pod| pod.addresses.contains(address)).map_or("?", |pod| &pod.name)
        };
        self.faults.iter().map(|(address, reason)| format!("pod {} ({address}): {reason}", name(address))).collect()
    }

    /// What the stats say: how many addresses are enrolled, how many should be and are not, and how often that happened.
    pub(super) fn counts(&self) -> [(&'static str, u64); 3] {
        [
            ("interception.enrolled_addresses", self.in_force.len() as u64),
            ("interception.enrolment_missing", self.faults.len() as u64),
            ("interception.enrolment_failed", self.failures),
        ]
    }

    /// The names of the pods whose addresses are enrolled.
    pub(super) fn names(&self) -> PodNames {
        let of_pod = |pod: &Known| -> Arc<str> { Arc::from(&*pod.name) };
        self.enrolled().flat_map(|(pod, mine)| mine.into_iter().map(move |address| (*address, of_pod(pod)))).collect()
    }

    /// Each pod's addresses that are enrolled.
    pub(super) fn enrolled(&self) -> impl Iterator<Item = (&Known, Vec<&IpAddr>)> {
        self.known.values().map(|pod| {
            let is_mine = |address: &&IpAddr| {
                self.in_force.get(*address).is_some_and(|in_force| in_force.identity == pod.identity)
            };
            (pod, pod.addresses.iter().filter(is_mine).collect())
        })
    }

    /// Every pod, for people.
    pub(super) fn status(&self, ebpf: &Ebpf) -> Vec<PodStatus> {
        self.known.values().map(|pod| self.status_of(pod, ebpf)).collect()
    }

    /// Why a pod's address is not enrolled for it, although nothing is wrong.
    fn who_has(&self, pod: &Known) -> String {
        let has = |other: &&Known| {
            other.identity != pod.identity && other.addresses.iter().any(|address| pod.addresses.contains(address))
        };
        match self.known.values().rev().find(has) {
            Some(other) if other.origin == Origin::Command => {
                format!("{}, enrolled by command, has its address", other.name)
            }
            Some(other) => format!("a newer pod has its address: {}", other.name),
            None => "it is being deleted".to_owned(),
        }
    }

    fn status_of(&self, pod: &Known, ebpf: &Ebpf) -> PodStatus {
        let of = |address: &IpAddr| self.in_force.get(address).filter(|in_force| in_force.identity == pod.identity);
        let mut status = PodStatus {
            name: pod.name.clone(),
            origin: pod.origin,
            addresses: pod.addresses.clone(),
            enrolled: pod.wanted.is_ok()
                && !pod.addresses.is_empty()
                && pod.addresses.iter().all(|it| of(it).is_some()),
            since: pod.addresses.iter().filter_map(of).map(|in_force| in_force.since).max().map(rfc3339),
            reason: None,
            direction: pod.wanted.as_ref().ok().map(|policy| policy.traffic.name()),
            failure_policy: pod.wanted.as_ref().ok().map(|policy| policy.failure_policy.name()),
            acceleration: pod.wanted.as_ref().ok().map(|policy| acceleration_name(policy.acceleration)),
            interface: pod.addresses.iter().filter_map(of).map(|in_force| in_force.interface.clone()).next(),
            outbound_connections: 0,
            inbound_connections: 0,
            bytes_sent: 0,
            bytes_received: 0,
        };
        status.interface.take_if(|name| name.is_empty());
        for address in pod.addresses.iter().filter(|address| of(address).is_some()) {
            let counters = kernel::pod_counters(ebpf, *address);
            status.outbound_connections += counters.outbound_connections;
            status.inbound_connections += counters.inbound_connections;
            status.bytes_sent += counters.bytes_sent;
            status.bytes_received += counters.bytes_received;
        }
        if !status.enrolled {
            let fault = pod.addresses.iter().find_map(|address| self.faults.get(address));
            let reason = match (&pod.wanted, fault) {
                (Err(reason), _) => reason.clone(),
                (Ok(_), _) if pod.addresses.is_empty() => "it has no address yet".to_owned(),
                (Ok(_), Some(fault)) => fault.clone(),
                (Ok(_), None) => self.who_has(pod),
            };
            status.reason = Some(reason);
        }
        status
    }
}

/// What makes a pod another one, as the kernel keeps it.
fn number_of(identity: &str) -> u64 {
    XxHash64::oneshot(0, identity.as_bytes())
}

/// Binds a pod's address to the interface that it is on. It moves to another one only when the pod was told of since:
/// till then it may be another pod, of which nobody has heard.
fn bind(
    bound: &mut HashMap<IpAddr, Bound>,
    pod: &Known,
    address: IpAddr,
    (interface, name): (u32, String),
) -> Result<(u32, String), String> {
    // Of a bridge's port the number is not known (0).
    if pod.interface.is_some_and(|only| only != interface && interface != 0) {
        return Err(format!("its address is on {name} now, another interface than when it was enrolled"));
    }
    let now = Bound { identity: pod.identity.clone(), version: pod.version, interface };
    if let Some(before) = bound.get(&address)
        && before.interface != interface
        && (before.version == pod.version || pod.leaving)
    {
        return Err(format!(
            "its address is on another interface now ({name}), and nothing says that it is still its own"
        ));
    }
    bound.insert(address, now);
    Ok((interface, name))
}

impl PodStatus {
    /// Whether it is known by command.
    pub(super) fn is_commanded(&self) -> bool {
        self.origin == Origin::Command
    }
}

impl Place {
    /// The interface that a policy is bound to, with its name; 0 where the port of a bridge is not known.
    fn bound(self) -> Result<(u32, String), String> {
        match self {
            Self::Interface(index, name) => Ok((index, name)),
            Self::Bridge(name) => Ok((0, name)),
            Self::Missing(reason) => Err(reason),
        }
    }
}

impl Policy {
    fn in_kernel(self, interface: u32) -> PodPolicy {
        PodPolicy {
            fail_closed: u32::from(self.failure_policy == FailurePolicy::Closed),
            directions: self.traffic.bits(),
            interface,
            acceleration: self.acceleration as u32,
        }
    }
}

impl Traffic {
    /// For people and for the state file.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
            Self::Both => "both",
        }
    }

    /// The traffic of a name.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Self::Outbound, Self::Inbound, Self::Both].into_iter().find(|traffic| traffic.name() == name)
    }
}

impl FailurePolicy {
    /// For people and for the state file.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Closed => "closed",
        }
    }

    /// The policy of a name.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        [Self::Open, Self::Closed].into_iter().find(|policy| policy.name() == name)
    }
}

/// For people and for the state file.
pub(super) const fn acceleration_name(level: Acceleration) -> &'static str {
    match level {
        Acceleration::Off => "off",
        Acceleration::Automatic => "automatic",
        Acceleration::Shortcut => "shortcut",
        Acceleration::BothWays => "both-ways",
        Acceleration::Joined => "joined",
    }
}

/// How far payload may go, by its name.
pub(super) fn acceleration_of_name(name: &str) -> Option<Acceleration> {
    use Acceleration::{Automatic, BothWays, Joined, Off, Shortcut};
    [Off, Automatic, Shortcut, BothWays, Joined].into_iter().find(|level| acceleration_name(*level) == name)
}
