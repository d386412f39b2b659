//! The pods of one cluster, as far as they say more than the slices that list them.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::OffloadedEndpoint;
use crate::kubernetes::{
    LABEL_OFFLOADED, LABEL_REVISION, ObjectKey, Objects, Pod, PodId, Service, ServicePort, SliceEndpoint,
};
use crate::registry::ClusterInfo;

/// The pods of one cluster.
pub(super) struct Pods<'a> {
    cluster: &'a str,
    all: &'a BTreeMap<ObjectKey, std::sync::Arc<Pod>>,
    gone: &'a BTreeMap<String, ObjectKey>,
    /// `None`: all are known.
    known: Option<&'a HashSet<PodId>>,
    offloaded: BTreeMap<&'a ObjectKey, &'a Pod>,
    offloaded_addresses: BTreeSet<IpAddr>,
    /// Live pods that matter, for slices that name no pod.
    by_address: HashMap<IpAddr, &'a Pod>,
}

/// Whether a header can name it.
fn is_revision(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=63).contains(&text.len()) && text.bytes().all(known)
}

impl<'a> Pods<'a> {
    pub(super) fn find(info: &'a ClusterInfo, objects: &'a Objects, warnings: &mut Vec<String>) -> Self {
        let offloaded: BTreeMap<_, &Pod> =
            objects.pods.iter().filter(|(_, pod)| pod.is_offloaded()).map(|(key, pod)| (key, &**pod)).collect();
        for (key, pod) in &offloaded {
            let cluster = &info.name;
            match pod.revision() {
                None => warnings.push(format!(
                    "Pod {key} in cluster {cluster} is offloaded but has no label or annotation {LABEL_REVISION}: no request can reach it"
                )),
                // An annotation may be any text.
                Some(revision) if !is_revision(revision) => warnings.push(format!(
                    "Pod {key} in cluster {cluster} is offloaded as revision `{}`, which no request can name: 1 to 63 of A-Z a-z 0-9 - _ .",
                    revision.escape_debug()
                )),
                Some(_) => {}
            }
            let label = pod.labels.get(LABEL_OFFLOADED).filter(|label| *label != "true");
            if let Some(label) = label {
                warnings.push(format!(
                    "Pod {key} in cluster {cluster} has the label {LABEL_OFFLOADED}: `{label}`, which is taken for `true`"
                ));
            }
        }
        // Only a live pod owns its address: an ended one may have passed it on.
        let offloaded_addresses =
            offloaded.values().filter(|pod| pod.ready).flat_map(|pod| pod.addresses.iter().copied()).collect();
        let live = objects.pods.values().filter(|pod| pod.matters() && !pod.ended);
        let by_address = live.flat_map(|pod| pod.addresses.iter().map(|address| (*address, &**pod))).collect();
        Self {
            cluster: &info.name,
            all: &objects.pods,
            gone: &objects.gone,
            known: objects.known_pods.as_deref(),
            offloaded,
            offloaded_addresses,
            by_address,
        }
    }

    /// Whether there are offloaded pods.
    pub(super) fn some_are_offloaded(&self) -> bool {
        !self.offloaded.is_empty()
    }

    /// Whether slices may list pods that are not known.
    pub(super) fn some_are_unknown(&self) -> bool {
        self.known.is_some()
    }

    /// Whether an endpoint that a slice lists is a pod that is not known. Of what says no unique id nothing can be known.
    pub(super) fn is_unknown(&self, endpoint: &SliceEndpoint) -> bool {
        let (Some(known), Some(uid), Some(_)) = (self.known, &endpoint.target_uid, &endpoint.pod) else { return false };
        !known.contains(&PodId::of(uid))
    }

    /// Whether an endpoint that a slice lists gets nothing, whatever the slice says of it: as an offloaded pod, or one that is no more.
    pub(super) fn is_out(&self, endpoint: &SliceEndpoint) -> bool {
        self.is_offloaded(endpoint) || self.is_gone(endpoint)
    }

    /// Whether an endpoint that a slice lists is an offloaded pod.
    fn is_offloaded(&self, endpoint: &SliceEndpoint) -> bool {
        match &endpoint.pod {
            Some(pod) if self.offloaded.contains_key(pod) => true,
            _ => self.offloaded_addresses.contains(&endpoint.address),
        }
    }

    /// Whether an endpoint that a slice lists is a pod that has been deleted.
    fn is_gone(&self, endpoint: &SliceEndpoint) -> bool {
        endpoint.target_uid.as_ref().is_some_and(|uid| self.gone.contains_key(uid))
    }

    /// The pod behind an endpoint, if it is known. A later pod of the same name, as StatefulSets make them, is another.
    pub(super) fn behind(&self, endpoint: &SliceEndpoint) -> Option<&'a Pod> {
        match &endpoint.pod {
            Some(key) => self.all.get(key).map(|pod| &**pod).filter(|pod| match (&pod.uid, &endpoint.target_uid) {
                (Some(uid), Some(target)) => uid == target,
                _ => true,
            }),
            None => self.by_address.get(&endpoint.address).copied(),
        }
    }

    /// The offloaded endpoints of a service's port, sorted.
    pub(super) fn offloaded_of(
        &self,
        key: &ObjectKey,
        service: &Service,
        port: &ServicePort,
        warnings: &mut Vec<String>,
    ) -> Vec<OffloadedEndpoint> {
        let prefers_ipv6 = service.prefers_ipv6;
        let mut found = Vec::new();
        for (pod_key, pod) in &self.offloaded {
            if pod_key.namespace != key.namespace || !pod.ready || !service.selects(&pod.labels) {
                continue;
            }
            let preferred = pod.addresses.iter().find(|address| address.is_ipv6() == prefers_ipv6);
            let (Some(revision), Some(address)) =
                (pod.revision().filter(|it| is_revision(it)), preferred.or(pod.addresses.first()))
            else {
                continue;
            };
            let Some(number) = pod.resolve(&port.target_port) else {
                warnings.push(format!(
                    "Pod {pod_key} in cluster {} has no container port that port {} of Service {key} names",
                    self.cluster, port.port
                ));
                continue;
            };
            found.push(OffloadedEndpoint {
                revision: revision.to_owned(),
                address: SocketAddr::new(*address, number),
                pod: (*pod_key).clone(),
                cluster: self.cluster.to_owned(),
                since: pod.created,
            });
        }
        found
    }
}
