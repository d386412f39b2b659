//! The endpoints of one service in one cluster.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use super::pods::Pods;
use super::{Endpoint, Health, Locality, ORDINARY_WEIGHT};
use crate::kubernetes::{EndpointSlice, Node, ObjectKey, Pod, Service, ServicePort, SliceEndpoint, TargetPort};
use crate::registry::ClusterInfo;

/// What the endpoints of a service are found by.
pub(super) struct EndpointsOf<'a> {
    pub(super) info: &'a ClusterInfo,
    pub(super) service: &'a Service,
    /// All slices of the service.
    pub(super) slices: &'a [&'a EndpointSlice],
    pub(super) pods: &'a Pods<'a>,
    pub(super) nodes: &'a BTreeMap<ObjectKey, Arc<Node>>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity<'a> {
    Uid(&'a str),
    Address(IpAddr),
}

impl EndpointsOf<'_> {
    /// The endpoints of one port, each once, however many slices list it.
    pub(super) fn of_port(&self, port: &ServicePort) -> Vec<Endpoint> {
        if self.service.external_name.is_some() {
            return Vec::new();
        }
        let mut found: BTreeMap<Identity<'_>, Endpoint> = BTreeMap::new();
        for slice in self.slices {
            let Some(number) = slice.ports.iter().find(|p| p.name == port.name).and_then(|slice_port| {
                slice_port.port.or(match port.target_port {
                    TargetPort::Number(number) => Some(number),
                    TargetPort::Name(_) => None,
                })
            }) else {
                continue;
            };
            for listed in &slice.endpoints {
                let Some(endpoint) = self.endpoint(listed, number) else { continue };
                let identity = match &listed.target_uid {
                    Some(uid) => Identity::Uid(uid),
                    None => Identity::Address(listed.address),
                };
                match found.entry(identity) {
                    btree_map::Entry::Vacant(entry) => {
                        entry.insert(endpoint);
                    }
                    btree_map::Entry::Occupied(mut entry) => self.join(entry.get_mut(), endpoint),
                }
            }
        }
        // The same address under two identities is still one endpoint.
        let mut endpoints: Vec<Endpoint> = found.into_values().collect();
        endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.health));
        endpoints.dedup_by_key(|endpoint| endpoint.address);
        endpoints
    }

    /// The ports at which its pods take connections to one port: the number that it states, and what slices say of one that has a name.
    pub(super) fn targets(&self, port: &ServicePort) -> BTreeSet<u16> {
        if self.service.external_name.is_some() {
            return BTreeSet::new();
        }
        let stated = match port.target_port {
            TargetPort::Number(number) => Some(number),
            TargetPort::Name(_) => None,
        };
        let of_slices = self.slices.iter().filter_map(|slice| slice.ports.iter().find(|p| p.name == port.name)?.port);
        of_slices.chain(stated).collect()
    }

    /// Joins what two slices say of one endpoint: the better state counts. A dual-stack pod is in one slice a family under
    /// the same uid: its address in the service's first family is the one it is known by.
    fn join(&self, known: &mut Endpoint, other: Endpoint) {
        let wrong_family = |endpoint: &Endpoint| endpoint.address.is_ipv6() != self.service.prefers_ipv6;
        let rank = |endpoint: &Endpoint| (endpoint.health, wrong_family(endpoint), endpoint.address);
        let worse = if rank(&other) < rank(known) { std::mem::replace(known, other) } else { other };
        if known.health == worse.health && known.address.is_ipv6() != worse.address.is_ipv6() {
            known.other_family = Some(worse.address);
        } else {
            known.other_family = known
                .other_family
                .or(worse.other_family)
                .filter(|address| known.health == worse.health && address.is_ipv6() != known.address.is_ipv6());
        }
    }

    /// An endpoint as it is served, `None` if it is left out.
    fn endpoint(&self, listed: &SliceEndpoint, port: u16) -> Option<Endpoint> {
        if self.pods.is_offloaded(listed) || self.pods.is_gone(listed) {
            return None;
        }
        let pod = self.pods.behind(listed);
        let mut health = health_of(listed, self.service, pod)?;
        let weight = weight(self.service.weight, pod.and_then(|pod| pod.weight));
        if weight == Some(0) {
            health = Health::Draining;
        }
        let node = listed.node.as_ref().and_then(|node| self.nodes.get(&ObjectKey::new("", node.clone())));
        let first = |texts: [Option<&String>; 3]| {
            texts.into_iter().flatten().find(|text| !text.is_empty()).cloned().unwrap_or_default()
        };
        Some(Endpoint {
            address: SocketAddr::new(listed.address, port),
            other_family: None,
            locality: Locality {
                region: first([node.map(|node| &node.region), Some(&self.info.region), None]),
                zone: first([listed.zone.as_ref(), node.map(|node| &node.zone), Some(&self.info.zone)]),
            },
            health,
            cluster: self.info.name.clone(),
            weight: weight.and_then(NonZeroU32::new),
            canary: false,
        })
    }
}

/// The weight of an endpoint by those of its service and its pod, `None` if neither has any. Little is not nothing.
fn weight(service: Option<u16>, pod: Option<u16>) -> Option<u32> {
    let whole = ORDINARY_WEIGHT.get();
    let share = |weight: Option<u16>| weight.map_or(whole, u32::from);
    service.or(pod)?;
    match share(service) * share(pod) {
        0 => Some(0),
        product => Some((product / whole).max(1)),
    }
}

fn health_of(listed: &SliceEndpoint, service: &Service, pod: Option<&Pod>) -> Option<Health> {
    // A pod that has ended answers nobody, whatever its service wants.
    if pod.is_some_and(|pod| pod.ended) {
        return None;
    }
    if service.publish_not_ready {
        return Some(Health::Healthy);
    }
    let leaving = listed.terminating || pod.is_some_and(|pod| pod.leaving);
    match (listed.ready, leaving) {
        (true, false) => Some(Health::Healthy),
        (true, true) => Some(Health::Draining),
        (false, true) if listed.serving => Some(Health::Draining),
        (false, _) => None,
    }
}
