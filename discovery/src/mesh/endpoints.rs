//! The endpoints of one service in one cluster.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map};
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
    /// The unique ids of those that are [`held_back`].
    pub(super) held: HashSet<&'a str>,
}

/// The endpoints that get nothing, because their Pods came after Pods could not be read any more, and may be offloaded ones: their unique
/// ids. Not those that are made as others that are known. None where there are more of them than of others: that is a rollout, and no branch.
pub(super) fn held_back<'a>(service: &Service, slices: &[&'a EndpointSlice], pods: &Pods<'_>) -> HashSet<&'a str> {
    if !pods.some_are_unknown() {
        return HashSet::new();
    }
    let (mut unknown, mut others, mut known_sets) = (HashMap::new(), BTreeSet::new(), HashSet::new());
    for listed in slices.iter().flat_map(|slice| &slice.endpoints) {
        if pods.is_out(listed) || health_of(listed, service, pods.behind(listed)) != Some(Health::Healthy) {
            continue;
        }
        let set = listed.pod.as_ref().and_then(replica_set);
        match &listed.target_uid {
            Some(uid) if pods.is_unknown(listed) => {
                unknown.insert(&**uid, set);
                continue;
            }
            Some(uid) => others.insert(Identity::Uid(uid)),
            None => others.insert(Identity::Address(listed.address)),
        };
        known_sets.extend(set);
    }
    let of_known = |set: &Option<&str>| set.is_some_and(|set| known_sets.contains(set));
    let held: HashSet<_> = unknown.iter().filter(|(_, set)| !of_known(set)).map(|(uid, _)| *uid).collect();
    if held.len() > others.len() + unknown.len() - held.len() { HashSet::new() } else { held }
}

/// The ReplicaSet that a Pod is of, by its name: `users-5b5f5f5f4-24jmc` is of `users-5b5f5f5f4`, whose Pods are all made alike.
fn replica_set(pod: &ObjectKey) -> Option<&str> {
    // Kubernetes takes these, so that names spell nothing.
    let is_made_up = |text: &str| text.bytes().all(|byte| b"bcdfghjklmnpqrstvwxz2456789".contains(&byte));
    let (set, own) = pod.name.rsplit_once('-')?;
    let (_, hash) = set.rsplit_once('-')?;
    (own.len() == 5 && (6..=10).contains(&hash.len()) && is_made_up(own) && is_made_up(hash)).then_some(set)
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
        let is_held = listed.target_uid.as_deref().is_some_and(|uid| self.held.contains(uid));
        if is_held || self.pods.is_out(listed) {
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

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::Override;
    use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::r#override::Mode;

    use super::*;
    use crate::kubernetes::PodId;
    use crate::kubernetes::manifest::parse;
    use crate::mesh::Joiner;
    use crate::registry::{Cluster, Registry, SourceHealth};

    /// How many endpoints of `users` take requests, and how many warnings there are, where Pods cannot be read: so many are known, and so
    /// many have come since.
    fn taking(known: u8, new: u8, manifests: &str, overrides: &Override) -> (usize, usize) {
        taking_of(("users-5b5f5f5f4", known), ("users-feature-x-7c749d965b", new), manifests, overrides)
    }

    /// The same with ReplicaSets.
    fn taking_of(
        (known_set, known): (&str, u8),
        (new_set, new): (&str, u8),
        manifests: &str,
        overrides: &Override,
    ) -> (usize, usize) {
        let uid = |number: u8| format!("uid-{number}");
        let endpoint = |number: u8| {
            let set = if number < known { known_set } else { new_set };
            let own = char::from(b"bcdfghjklm"[usize::from(number)]);
            format!(
                "{{addresses: [10.1.0.{number}], targetRef: {{kind: Pod, name: {set}-4jmc{own}, uid: {}}}}}",
                uid(number)
            )
        };
        let endpoints: Vec<_> = (0..known + new).map(endpoint).collect();
        let text = format!(
            "{manifests}---\n{{apiVersion: v1, kind: Service, metadata: {{name: users}}, spec: {{ports: [{{name: http, port: 80}}]}}}}\n---\n\
             {{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {{name: s, labels: {{kubernetes.io/service-name: \
             users}}}}, addressType: IPv4, ports: [{{name: http, port: 80}}], endpoints: [{}]}}\n",
            endpoints.join(", ")
        );
        let mut objects = parse(&text).unwrap();
        let of_known: HashSet<_> = (0..known).map(|number| PodId::of(&uid(number))).collect();
        objects.known_pods = Some(Arc::new(of_known));
        let info = ClusterInfo { name: "east".into(), ..ClusterInfo::default() };
        let cluster = Cluster { info, objects: Some(objects.into()), health: SourceHealth::default(), drained: false };
        let registry = Registry { version: 1, clusters: vec![cluster], waited: false };
        let (mesh, _) = Joiner::new(overrides.clone()).update(&registry);
        (mesh.services[&ObjectKey::new("default", "users")].ports[&80].endpoints.len(), mesh.warnings.len())
    }

    #[test]
    fn pods_that_are_not_known_are_held_back_where_they_may_be_offloaded() {
        let stated = Override { debug_response: true, ..Override::default() };
        assert_eq!(taking(3, 1, "", &stated), (3, 1));
        assert_eq!(taking(3, 3, "", &stated), (3, 1));
        assert_eq!(taking(3, 4, "", &stated), (7, 0), "that is a rollout");
        assert_eq!(taking(0, 1, "", &stated), (1, 0));
        // Pods of one ReplicaSet are all offloaded or none is; what others are called says nothing.
        let set = "users-5b5f5f5f4";
        assert_eq!(taking_of((set, 2), (set, 2), "", &stated), (4, 0));
        assert_eq!(taking_of(("users", 2), ("users", 2), "", &stated), (2, 1));
        assert_eq!(taking_of(("users-branch", 2), ("users-branch", 1), "", &stated), (2, 1));
        assert_eq!(taking(3, 1, "", &Override::default()), (4, 0), "nobody uses overrides");
        let pod = "{apiVersion: v1, kind: Pod, metadata: {name: other, labels: {culvert.dev/offloaded: 'true', \
                   culvert.dev/revision: x}}, status: {podIP: 10.9.0.1}}\n";
        assert_eq!(taking(3, 1, pod, &Override::default()), (3, 1), "somebody does");
        let manifest = |allowed: bool| {
            format!(
                "{{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {{name: users}}, spec: {{overrides: \
                 {{allowed: {allowed}}}}}}}\n"
            )
        };
        assert_eq!(taking(3, 1, &manifest(true), &Override::default()), (3, 1));
        assert_eq!(taking(3, 1, &manifest(false), &stated), (4, 0));
        let opt_in = Override { require_opt_in: true, ..Override::default() };
        assert_eq!((taking(3, 1, "", &opt_in), taking(3, 1, &manifest(true), &opt_in)), ((4, 0), (3, 1)));
        let production = Override { mode: Mode::RefuseAll.into(), ..Override::default() };
        assert_eq!(taking(3, 1, &manifest(true), &production), (4, 0));
    }
}
