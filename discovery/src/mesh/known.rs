//! What was known of one cluster: what a newer state of it changes, and what it has of a service.

use std::collections::{BTreeMap, HashMap, HashSet, btree_map};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::endpoints::{EndpointsOf, held_back};
use super::joiner::{Keys, Vips};
use super::pods::Pods;
use super::{External, MeshPort, MeshService, Protocol, mesh_key};
use crate::kubernetes::{EndpointSlice, ObjectKey, Objects, Pod, Service, ServicePort};
use crate::registry::{Cluster, ClusterInfo};

/// What was known of a cluster the last time.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) objects: Arc<Objects>,
    drained: bool,
    /// The slices of each service, by the service's name in the cluster.
    slices: HashMap<ObjectKey, BTreeMap<ObjectKey, Arc<EndpointSlice>>>,
}

/// What there is to say of one service.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Remarks {
    pub(super) warnings: Vec<String>,
    /// Drained clusters whose endpoints a port cannot do without.
    pub(super) only_there: Vec<(String, String)>,
    /// How many endpoints of a cluster are held back.
    pub(super) held_back: Vec<(String, usize)>,
}

/// The names that a cluster's service may have in the mesh: its own, and the one with which it is kept apart.
fn names(key: &ObjectKey, info: &ClusterInfo) -> [ObjectKey; 2] {
    [key.clone(), ObjectKey::new(format!("{}.{}", key.namespace, info.name), key.name.clone())]
}

impl Known {
    /// Takes in a cluster's newest state, and marks what it can have to do with. Gives whether any Service has changed.
    pub(super) fn take_in(&mut self, cluster: &Cluster, marked: &mut Keys) -> bool {
        let info = &cluster.info;
        let before = Arc::clone(&self.objects);
        let after = cluster.objects.clone().unwrap_or_default();
        let mut mark = |key: &ObjectKey| marked.extend(names(key, info));
        if std::mem::replace(&mut self.drained, cluster.drained) != cluster.drained {
            before.services.keys().chain(after.services.keys()).for_each(&mut mark);
        }
        if Arc::ptr_eq(&before, &after) {
            return false;
        }
        let mut services_changed = false;
        differing(&before.services, &after.services, |key, _, _| {
            services_changed = true;
            mark(key);
        });
        differing(&before.virtual_ips, &after.virtual_ips, |_, _, _| services_changed = true);
        differing(&before.manifests, &after.manifests, |key, _, _| mark(key));
        differing(&before.slices, &after.slices, |key, old, new| {
            let service = |slice: &Arc<EndpointSlice>| {
                slice.service.as_ref().map(|name| ObjectKey::new(key.namespace.clone(), name.clone()))
            };
            if let Some(service) = old.and_then(service) {
                mark(&service);
                if let Some(slices) = self.slices.get_mut(&service) {
                    slices.remove(key);
                    if slices.is_empty() {
                        self.slices.remove(&service);
                    }
                }
            }
            if let Some((slice, service)) = new.and_then(|slice| Some((slice, service(slice)?))) {
                mark(&service);
                self.slices.entry(service).or_default().insert(key.clone(), Arc::clone(slice));
            }
        });
        let mut pods = ChangedPods::default();
        differing(&before.pods, &after.pods, |key, old, new| {
            for pod in [old, new].into_iter().flatten() {
                pods.add(key, pod);
            }
        });
        let newly_gone = after.gone.iter().filter(|(uid, _)| !before.gone.contains_key(*uid));
        pods.keys.extend(newly_gone.map(|(_, key)| key));
        pods.concern(&after, &mut mark);
        let mut nodes_changed = false;
        differing(&before.nodes, &after.nodes, |_, _, _| nodes_changed = true);
        // What was held back may come in.
        let known_pods = |objects: &Objects| objects.known_pods.as_ref().map(Arc::as_ptr);
        let pods_known = before.known_pods.is_some() && known_pods(&before) != known_pods(&after);
        if nodes_changed || pods_known {
            after.services.keys().for_each(&mut mark);
        }
        self.objects = after;
        services_changed
    }

    /// Adds what this cluster has of a service. `holds_back`: whether pods of it that are not known might be offloaded ones.
    pub(super) fn join(
        &self,
        name: &ObjectKey,
        info: &ClusterInfo,
        (pods, holds_back): (&Pods<'_>, bool),
        vips: &Vips,
        joined: &mut MeshService,
        remarks: &mut Remarks,
    ) {
        let warnings = &mut remarks.warnings;
        let apart = name.namespace.strip_suffix(&*info.name).and_then(|rest| rest.strip_suffix('.'));
        let apart = apart.map(|namespace| ObjectKey::new(namespace, name.name.clone()));
        for key in std::iter::once(name).chain(&apart) {
            let Some(service) = self.objects.services.get(key) else { continue };
            if service.stays_out || mesh_key(key, service, info) != *name {
                continue;
            }
            let slices: Vec<&EndpointSlice> =
                self.slices.get(key).into_iter().flat_map(BTreeMap::values).map(|slice| &**slice).collect();
            let held = if holds_back { held_back(service, &slices, pods) } else { HashSet::new() };
            if !held.is_empty() {
                remarks.held_back.push((info.name.clone(), held.len()));
            }
            let endpoints = EndpointsOf { info, service, slices: &slices, pods, nodes: &self.objects.nodes, held };
            joined.clusters.push(info.name.clone());
            for port in &service.ports {
                let leads_here = |vip: &&IpAddr| {
                    vips.get(&(**vip, port.port)).is_some_and(|(owner, of)| owner == name && *of == info.name)
                };
                let offloaded = pods.offloaded_of(key, service, port, warnings);
                let mut targets = endpoints.targets(port);
                targets.extend(offloaded.iter().map(|endpoint| endpoint.address.port()));
                let described = MeshPort {
                    protocol: Protocol::of(port),
                    vips: service.cluster_ips.iter().filter(leads_here).copied().collect(),
                    external: service.external_name.clone().map(|host| External { host, port: port.port }),
                    endpoints: endpoints.of_port(port),
                    offloaded,
                    targets,
                };
                add_port(name, joined, port, info, described, warnings);
            }
        }
    }
}

/// Pods that have changed, as slices name them.
#[derive(Default)]
struct ChangedPods<'a> {
    keys: HashSet<&'a ObjectKey>,
    addresses: HashSet<IpAddr>,
    /// Those that are, or were, reached by overrides only.
    offloaded: Vec<(&'a str, &'a Pod)>,
}

impl<'a> ChangedPods<'a> {
    fn add(&mut self, key: &'a ObjectKey, pod: &'a Pod) {
        self.keys.insert(key);
        self.addresses.extend(&pod.addresses);
        if pod.is_offloaded() {
            self.offloaded.push((&key.namespace, pod));
        }
    }

    /// Marks the services that list or select these pods.
    fn concern(&self, objects: &Objects, mark: &mut impl FnMut(&ObjectKey)) {
        if self.keys.is_empty() {
            return;
        }
        for (key, slice) in &*objects.slices {
            let listed = slice.endpoints.iter().any(|endpoint| {
                self.addresses.contains(&endpoint.address)
                    || endpoint.pod.as_ref().is_some_and(|pod| self.keys.contains(pod))
            });
            if let Some(service) = slice.service.as_ref().filter(|_| listed) {
                mark(&ObjectKey::new(key.namespace.clone(), service.clone()));
            }
        }
        if !self.offloaded.is_empty() {
            let selects = |key: &ObjectKey, service: &Service| {
                self.offloaded.iter().any(|(of, pod)| *of == key.namespace && service.selects(&pod.labels))
            };
            objects.services.iter().filter(|(key, service)| selects(key, service)).for_each(|(key, _)| mark(key));
        }
    }
}

/// Tells of each object that is in one of two states only, or different in them.
fn differing<'a, K: PartialEq>(
    before: &'a BTreeMap<ObjectKey, Arc<K>>,
    after: &'a BTreeMap<ObjectKey, Arc<K>>,
    mut tell: impl FnMut(&'a ObjectKey, Option<&'a Arc<K>>, Option<&'a Arc<K>>),
) {
    if std::ptr::eq(before, after) {
        return;
    }
    let (mut before, mut after) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (before.peek(), after.peek()) {
            (Some((old, _)), Some((new, _))) => old.cmp(new),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (None, None) => return,
        };
        let old = order.is_le().then(|| before.next()).flatten();
        let new = order.is_ge().then(|| after.next()).flatten();
        match (old, new) {
            (Some((_, old)), Some((_, new))) if Arc::ptr_eq(old, new) || old == new => {}
            (Some((key, _)), _) | (None, Some((key, _))) => tell(key, old.map(|(_, v)| v), new.map(|(_, v)| v)),
            (None, None) => return,
        }
    }
}

fn add_port(
    name: &ObjectKey,
    joined: &mut MeshService,
    port: &ServicePort,
    info: &ClusterInfo,
    described: MeshPort,
    warnings: &mut Vec<String>,
) {
    let joined = match joined.ports.entry(port.port) {
        btree_map::Entry::Vacant(entry) => {
            entry.insert(described);
            return;
        }
        btree_map::Entry::Occupied(entry) => entry.into_mut(),
    };
    let differs = |what: &dyn fmt::Display, before: &dyn fmt::Display| {
        format!(
            "port {} of Service {name} is {what} in cluster {}, and {before} in a cluster before it, which counts",
            port.port, info.name,
        )
    };
    if joined.external != described.external {
        let kind = |external: &Option<External>| match external {
            Some(External { host, .. }) => format!("the external name {host}"),
            None => "in the cluster".to_owned(),
        };
        warnings.push(differs(&kind(&described.external), &kind(&joined.external)));
        return;
    }
    if joined.protocol != described.protocol {
        warnings.push(differs(&described.protocol, &joined.protocol));
    }
    joined.vips.extend(described.vips);
    joined.endpoints.extend(described.endpoints);
    joined.offloaded.extend(described.offloaded);
    joined.targets.extend(described.targets);
}
