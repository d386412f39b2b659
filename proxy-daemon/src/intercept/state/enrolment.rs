//! Which pods are enrolled: by the bootstrap, by manifests and API servers, and by command.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use super::State;
use super::links::direction_of;
use crate::intercept::attach::Direction;
use crate::intercept::commanded::{self, Commanded};
use crate::intercept::config::{FailurePolicy, Policy, Traffic};
use crate::intercept::error::InterceptError;
use crate::intercept::netlink::Link;
use crate::intercept::pod_families;
use crate::intercept::pods::{Known, Origin, Place, PodStatus, acceleration_of_name};

impl State {
    pub(in crate::intercept) fn pods(&self) -> Vec<PodStatus> {
        self.pods.status(&self.ebpf)
    }

    /// Replaces the pods of one origin, and enrols them.
    pub(in crate::intercept) fn set_pods(&mut self, origin: Origin, pods: Vec<Known>) {
        self.pods.set(origin, pods);
        self.reconcile_pods();
        self.forget_others();
        if !self.is_settled() {
            self.try_again_soon();
        }
    }

    /// Puts in force what is wanted of pods, as the node's interfaces and routes are now.
    pub(in crate::intercept) fn reconcile_pods(&mut self) {
        if self.is_followed() {
            return;
        }
        let Self { pods, ebpf, netlink, unattached, config, .. } = self;
        let mut links = None;
        let mut unnamed = BTreeSet::new();
        let gone = pods.reconcile(ebpf, |address| {
            let links = links.get_or_insert_with(|| netlink.links());
            let links = match links {
                Ok(links) => links,
                Err(error) => return Place::Missing(format!("interfaces cannot be listed: {error}")),
            };
            let index = match netlink.route_to(address) {
                Ok(Some(index)) => index,
                Ok(None) => return Place::Missing("no interface: the node has no route to it".to_owned()),
                Err(error) => return Place::Missing(format!("its interface cannot be found: {error}")),
            };
            if let Some(reason) = unattached.get(&index) {
                return Place::Missing(reason.clone());
            }
            let is_pods = |link: &Link| direction_of(config, &link.name) == Some(Direction::Outbound);
            match links.iter().find(|link| link.index == index) {
                // One that is named stands for its ports.
                Some(bridge) if bridge.is_bridge && is_pods(bridge) => Place::Bridge(bridge.name.clone()),
                Some(link) if is_pods(link) => Place::Interface(index, link.name.clone()),
                Some(bridge) if links.iter().any(|link| link.bridge == Some(index) && is_pods(link)) => {
                    let ports = links.iter().filter(|link| link.bridge == Some(index));
                    let others = ports.filter(|link| direction_of(config, &link.name).is_none());
                    unnamed.extend(others.map(|link| format!("{} of {}", link.name, bridge.name)));
                    Place::Bridge(bridge.name.clone())
                }
                Some(link) => Place::Missing(format!(
                    "no interface: the node reaches it over {}, which `interfaces` does not name",
                    link.name
                )),
                None => Place::Missing("no interface: it has just gone".to_owned()),
            }
        });
        self.note_unnamed_ports(&unnamed);
        pod_families::note(self.pods.enrolled().map(|(_, addresses)| addresses));
        if !gone.is_empty() {
            self.departed.extend(gone);
            self.try_again_soon();
        }
        let names = self.pods.names();
        if **self.pod_names.load() != names {
            self.pod_names.store(Arc::new(names));
        }
    }

    /// Notes ports of pods' bridges that neither `interfaces` nor `uplinks` names: over which port a pod is reached is not known, and what
    /// comes over these is not looked at.
    fn note_unnamed_ports(&mut self, unnamed: &BTreeSet<String>) {
        let fault = (!unnamed.is_empty()).then(|| {
            let ports: Vec<&str> = unnamed.iter().map(String::as_str).collect();
            format!(
                "interfaces: pods behind the bridge's ports {} pass the daemon by: name these ports, or the bridge, or among the \
                 uplinks those that lead elsewhere",
                ports.join(", ")
            )
        });
        if fault != self.bridge_fault {
            if let Some(fault) = &fault {
                tracing::warn!("{fault}");
            }
            self.bridge_fault = fault;
        }
    }

    /// Forgets, once, what earlier daemons counted for pods that have gone since: as soon as it is known which those are, and
    /// as no other daemon serves them.
    pub(super) fn forget_others(&mut self) {
        if self.forgot_others || self.waits.is_some() || !self.source_faults.is_empty() || self.is_followed() {
            return;
        }
        match self.pods.forget_others(&mut self.ebpf) {
            Ok(()) => self.forgot_others = true,
            Err(error) => tracing::warn!(%error, "counters of pods that are gone are left until pods change"),
        }
    }

    /// Reads what was enrolled by command, and forgets what is on another interface by now. What only has no route at present is one of
    /// the faults, and tried again.
    pub(super) fn recall(&mut self) -> Result<(), InterceptError> {
        let path = self.config.state_path.clone();
        self.commanded =
            commanded::read(&path).map_err(|reason| InterceptError::StateFile { path: path.clone(), reason })?;
        let written = self.commanded.len();
        let links = self.links()?;
        let netlink = &mut self.netlink;
        self.commanded.retain(|pod| {
            let is_there = links.iter().any(|link| link.index == pod.interface);
            let stays = stays(pod, is_there, |address| netlink.route_to(address));
            if !stays {
                tracing::warn!(pod = pod.name, "was enrolled by command, and is not any more: its interface is gone");
            }
            stays
        });
        self.forgets |= self.commanded.len() < written;
        self.pods.set(Origin::Command, self.commanded.iter().map(Commanded::known).collect());
        self.recall_cgroups()
    }

    pub(in crate::intercept) fn enrol(
        &mut self,
        name: Option<String>,
        mut addresses: Vec<IpAddr>,
        direction: Option<&str>,
        failure_policy: Option<&str>,
        acceleration: Option<&str>,
    ) -> Result<(), InterceptError> {
        let refuse = |reason: String| Err(InterceptError::Command(reason));
        addresses.sort_unstable();
        addresses.dedup();
        let Some(first) = addresses.first().copied() else { return refuse("an address is needed".to_owned()) };
        let name = name.unwrap_or_else(|| first.to_string());
        // What is not said stays as the pod has it.
        let enrolled = self.commanded.iter().find(|pod| pod.name == name);
        let default = enrolled.and_then(Commanded::policy).unwrap_or(self.config.policy);
        let Some(traffic) = direction.map_or(Some(default.traffic), Traffic::of_name) else {
            return refuse("direction is outbound, inbound or both".to_owned());
        };
        let failure = failure_policy.map_or(Some(default.failure_policy), FailurePolicy::of_name);
        let Some(failure_policy) = failure else { return refuse("failure_policy is open or closed".to_owned()) };
        let level = acceleration.map_or(Some(default.acceleration), acceleration_of_name);
        let Some(acceleration) = level else {
            return refuse("acceleration is off, automatic, shortcut, both-ways or joined".to_owned());
        };
        let mut interface = None;
        for address in &addresses {
            let to = self.netlink.route_to(*address);
            let to =
                to.map_err(|source| InterceptError::netlink(format!("find the interface of {address}"), source))?;
            match (to, interface) {
                (None, _) => return refuse(format!("the node has no route to {address}")),
                (Some(to), Some(other)) if to != other => {
                    return refuse(format!("{address} is on another interface than {first}: enrol it for itself"));
                }
                (to, _) => interface = to,
            }
        }
        // At least one address: the loop ran.
        let Some(interface) = interface else { return refuse("an address is needed".to_owned()) };
        let policy = Policy { failure_policy, traffic, acceleration };
        let before = self.commanded.clone();
        let mut wanted = before.clone();
        let is_taken = |pod: &&Commanded| pod.name != name && pod.addresses.iter().any(|it| addresses.contains(it));
        if let Some(other) = wanted.iter().find(is_taken) {
            let (other, all) = (&other.name, listed(&other.addresses));
            return refuse(format!("{other} is enrolled by command with {all}: name it, or unenroll it first"));
        }
        match wanted.iter().position(|pod| pod.name == name) {
            Some(at) if wanted[at].interface != interface => {
                let all = listed(&wanted[at].addresses);
                return refuse(format!(
                    "{name} is enrolled by command with {all}, on another interface than {first}: use another name, or \
                     unenroll it first"
                ));
            }
            // One more address of the same pod; what is said now holds for all of it.
            Some(at) => addresses.extend(wanted.remove(at).addresses),
            None => {}
        }
        addresses.sort_unstable();
        addresses.dedup();
        wanted.push(Commanded::new(name.clone(), addresses, policy, interface));
        self.command(wanted)?;
        let failed = self.pods().into_iter().find(|pod| pod.name == name && pod.is_commanded() && !pod.enrolled);
        if let Some(pod) = failed {
            self.set_commanded(before);
            self.write_commanded(&self.commanded)?;
            return refuse(pod.reason.unwrap_or_default());
        }
        Ok(())
    }

    pub(in crate::intercept) fn unenrol(&mut self, name_or_address: &str) -> Result<(), InterceptError> {
        if name_or_address.starts_with('/') {
            return self.unenrol_cgroup(Path::new(name_or_address));
        }
        let address: Option<IpAddr> = name_or_address.parse().ok();
        let mut wanted = self.commanded.clone();
        wanted.retain(|pod| {
            pod.name != name_or_address && address.is_none_or(|address| !pod.addresses.contains(&address))
        });
        if wanted.len() == self.commanded.len() {
            let reason =
                format!("{name_or_address} was not enrolled by command: `culvert status --node` lists what is");
            return Err(InterceptError::Command(reason));
        }
        self.command(wanted)
    }

    /// Writes down and puts in force what is to be enrolled by command. What cannot be written down is not put in force.
    fn command(&mut self, wanted: Vec<Commanded>) -> Result<(), InterceptError> {
        self.may_command()?;
        self.write_commanded(&wanted)?;
        self.set_commanded(wanted);
        Ok(())
    }

    /// Whether commands are for this daemon.
    pub(super) fn may_command(&self) -> Result<(), InterceptError> {
        if self.is_followed() {
            let reason = "another daemon has taken over: it answers here when this one is told to end".to_owned();
            return Err(InterceptError::Command(reason));
        }
        Ok(())
    }

    pub(super) fn write_commanded(&self, pods: &[Commanded]) -> Result<(), InterceptError> {
        let path = &self.config.state_path;
        commanded::write(path, pods)
            .map_err(|error| InterceptError::StateFile { path: path.clone(), reason: error.to_string() })
    }

    pub(super) fn set_commanded(&mut self, pods: Vec<Commanded>) {
        self.commanded = pods;
        self.set_pods(Origin::Command, self.commanded.iter().map(Commanded::known).collect());
    }
}

/// Whether what was enrolled by command is still the same pod: the node has one of its addresses on the interface that it had then; or has
/// none of them anywhere for now (at boot, one family comes later than the other), and the interface `is_there`.
fn stays(pod: &Commanded, is_there: bool, mut route_to: impl FnMut(IpAddr) -> io::Result<Option<u32>>) -> bool {
    let mut is_elsewhere = false;
    for address in &pod.addresses {
        match route_to(*address) {
            Ok(Some(to)) if to == pod.interface => return true,
            Ok(Some(_)) => is_elsewhere = true,
            Ok(None) | Err(_) => {}
        }
    }
    is_there && !is_elsewhere
}

/// Addresses, for people.
fn listed(addresses: &[IpAddr]) -> String {
    addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_a_route_is_not_another_one() {
        let policy = Policy::default();
        let addresses = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let pod = Commanded::new("a".to_owned(), addresses, policy, 7);
        let stays = |is_there: bool, v4: io::Result<Option<u32>>, v6: io::Result<Option<u32>>| {
            let mut routes = [Some(v4), Some(v6)];
            super::stays(&pod, is_there, |address| routes[usize::from(address.is_ipv6())].take().unwrap())
        };
        let failed = || Err(io::Error::other("no buffer space"));
        assert!(stays(true, Ok(Some(7)), Ok(Some(7))));
        for other in [Ok(None), Ok(Some(1)), failed()] {
            assert!(stays(true, Ok(Some(7)), other));
        }
        assert!(stays(true, Ok(None), Ok(Some(7))));
        assert!(stays(true, Ok(None), failed()), "its routes may come");
        assert!(!stays(false, Ok(None), failed()), "its interface is gone");
        assert!(!stays(false, Ok(Some(8)), Ok(Some(8))));
        assert!(!stays(true, Ok(Some(8)), Ok(None)), "its address is another's");
    }
}
