//! Keeps the mesh up to date: of each new state of the registry only the services that it touches are joined anew.
//!
//! Objects are shared between states of the registry, so that what has changed is found by comparing pointers. What a
//! changed object can have to do with is marked, rather too much than too little: a service that turns out as it was
//! is no change.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, btree_map};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::endpoints::EndpointsOf;
use super::pods::Pods;
use super::{
    External, MOST_NAMED, Mesh, MeshPort, MeshService, ORDINARY_WEIGHT, Protocol, cluster_name, drain,
    leave_out_excess_draining, mesh_key,
};
use crate::health::Failed;
use crate::kubernetes::{EndpointSlice, ObjectKey, Objects, Pod, Service, ServicePort};
use crate::overrides::shares::Share;
use crate::overrides::tunnels::Offered;
use crate::policy::apply::{Manifests, contested_at_the_edge};
use crate::registration::join::{CLUSTER as REGISTERED, Registered};
use crate::registry::{Cluster, ClusterInfo, Registry};
use crate::secrets::{self, Secrets};

/// Joins states of the registry into meshes.
#[derive(Debug, Default)]
pub struct Joiner {
    clusters: Vec<Known>,
    registered: Registered,
    offered: Offered,
    failed: Failed,
    /// Of files.
    secrets: Arc<Secrets>,
    /// Which service of which cluster a virtual address and port leads to.
    vips: Vips,
    vip_warnings: Vec<String>,
    /// Who may call what is not there.
    egress_warnings: Vec<String>,
    /// Who is called the same from outside.
    edge_warnings: Vec<String>,
    /// Services that have to be joined anew.
    marked: BTreeSet<ObjectKey>,
    mesh: Arc<Mesh>,
    /// Of services of which there is anything to say.
    remarks: BTreeMap<ObjectKey, Remarks>,
}

/// What is said of a name that means nothing here.
pub(crate) const NO_SERVICE: &str = "which is no service of the mesh";

type Vips = HashMap<(IpAddr, u16), (ObjectKey, String)>;
type Keys = BTreeSet<ObjectKey>;

/// What was known of a cluster the last time.
#[derive(Debug, Default)]
struct Known {
    objects: Arc<Objects>,
    drained: bool,
    /// The slices of each service, by the service's name in the cluster.
    slices: HashMap<ObjectKey, BTreeMap<ObjectKey, Arc<EndpointSlice>>>,
}

/// What there is to say of one service.
#[derive(Debug, Default, PartialEq)]
struct Remarks {
    warnings: Vec<String>,
    /// Drained clusters whose endpoints a port cannot do without.
    only_there: Vec<(String, String)>,
}

impl Joiner {
    /// Takes in the hosts that have registered themselves.
    pub fn register(&mut self, registered: Registered) {
        let before = std::mem::replace(&mut self.registered, registered);
        self.marked.extend(before.differing(&self.registered));
    }

    /// Takes in what tunnels offer.
    pub fn offer(&mut self, offered: Offered) {
        let before = std::mem::replace(&mut self.offered, offered);
        self.marked.extend(before.differing(&self.offered));
    }

    /// Takes in which endpoints do not work.
    pub fn mark_failed(&mut self, failed: Failed) {
        let before = std::mem::replace(&mut self.failed, failed);
        self.marked.extend(before.differing(&self.failed));
    }

    /// Takes in the secrets of files.
    pub fn keep(&mut self, secrets: Arc<Secrets>) {
        self.secrets = secrets;
    }

    /// Takes in the stored sets of overrides.
    pub fn share(&mut self, shares: Vec<Arc<Share>>) {
        if self.mesh.shares != shares {
            Arc::make_mut(&mut self.mesh).shares = shares;
        }
    }

    /// Takes in a state of the registry. Gives the mesh, and which of its services are new, different or gone.
    pub fn update(&mut self, registry: &Registry) -> (Arc<Mesh>, Keys) {
        let mut services_changed = self.clusters.len() != registry.clusters.len();
        self.clusters.resize_with(registry.clusters.len(), Known::default);
        for (known, cluster) in self.clusters.iter_mut().zip(&registry.clusters) {
            services_changed |= known.take_in(cluster, &mut self.marked);
        }
        if services_changed {
            self.claim_vips(registry);
        }
        let callers = self.mesh.callers.clone();
        let changed = self.join_marked(registry);
        if !changed.is_empty() || callers != self.mesh.callers {
            self.egress_warnings = unknown_egress(&self.mesh);
            self.edge_warnings = contested_at_the_edge(&self.mesh);
        }
        let mut warnings = self.warnings(registry);
        let secrets = secrets::joined(&self.secrets, registry, &mut warnings);
        if secrets != self.mesh.secrets {
            Arc::make_mut(&mut self.mesh).secrets = secrets;
        }
        if !changed.is_empty() || warnings != self.mesh.warnings {
            // The map of services was replaced where it had to be.
            Arc::make_mut(&mut self.mesh).warnings = warnings;
        }
        (Arc::clone(&self.mesh), changed)
    }

    /// Decides which virtual address leads to which service, and marks the services for which that is news.
    fn claim_vips(&mut self, registry: &Registry) {
        let mut vips: Vips = HashMap::with_capacity(self.vips.len());
        let mut contested = HashSet::new();
        self.vip_warnings.clear();
        for (info, objects) in clusters(registry) {
            for (key, service) in &*objects.services {
                let name = mesh_key(key, service, info);
                let addresses =
                    service.ports.iter().flat_map(|port| service.cluster_ips.iter().map(move |vip| (port, vip)));
                for (port, vip) in addresses {
                    let (owner, cluster) =
                        vips.entry((*vip, port.port)).or_insert_with(|| (name.clone(), info.name.clone()));
                    if *owner == name {
                        continue;
                    }
                    contested.insert((*vip, port.port));
                    // Of one that is kept apart it is as it should be: each client gets to the one of its own cluster.
                    let apart = ObjectKey::new(format!("{}.{cluster}", key.namespace), key.name.clone());
                    if *owner != apart {
                        self.vip_warnings.push(format!(
                            "{} is the address of {owner} in cluster {cluster} and of {name} in cluster {}; what goes there \
                             is passed through, to the one of its own cluster",
                            SocketAddr::new(*vip, port.port),
                            info.name,
                        ));
                    }
                }
            }
        }
        for (info, objects) in clusters(registry) {
            let mut taken = 0;
            let hidden = objects.virtual_ips.iter().filter(|(key, _)| !objects.services.contains_key(*key));
            for address in hidden.flat_map(|(_, addresses)| &addresses.0) {
                if vips.get(address).is_some_and(|(_, cluster)| *cluster != info.name) {
                    taken += usize::from(contested.insert(*address));
                }
            }
            if taken > 0 {
                self.vip_warnings.push(format!(
                    "{taken} addresses of services of other clusters are in cluster {} those of services that `service_selector` \
                     leaves out; what goes there is passed through, to the one of its own cluster",
                    info.name
                ));
            }
        }
        // Clusters often have the same range of addresses. Where a proxy is is not known here, what the address leads to
        // where it is, is.
        vips.retain(|address, _| !contested.contains(address));
        let before = std::mem::replace(&mut self.vips, vips);
        let (old, new) = (&before, &self.vips);
        for (address, owner) in old.iter().filter(|(address, owner)| new.get(address) != Some(owner)) {
            self.marked.insert(owner.0.clone());
            self.marked.extend(new.get(address).map(|(name, _)| name.clone()));
        }
        let gained = new.iter().filter(|(address, _)| !old.contains_key(address));
        self.marked.extend(gained.map(|(_, (name, _))| name.clone()));
    }

    /// Joins what is marked anew.
    fn join_marked(&mut self, registry: &Registry) -> Keys {
        let marked = std::mem::take(&mut self.marked);
        let mut changed = Keys::new();
        if marked.is_empty() {
            return changed;
        }
        let mut joined = Vec::new();
        {
            let known: Vec<_> = self.clusters.iter().zip(&registry.clusters).collect();
            let pods: Vec<Pods<'_>> = known
                .iter()
                .map(|(known, cluster)| Pods::find(&cluster.info, &known.objects, &mut Vec::new()))
                .collect();
            let manifests = Manifests::new(registry);
            for key in marked {
                let mut remarks = Remarks::default();
                let mut service = MeshService::default();
                for ((known, cluster), pods) in known.iter().zip(&pods) {
                    known.join(&key, &cluster.info, pods, &self.vips, &mut service, &mut remarks.warnings);
                }
                // Before it is decided which endpoints drain, and of those that have registered themselves.
                self.failed.mark(&key, &mut service);
                finish(&key, &mut service, registry, &mut remarks);
                self.registered.join(&key, &mut service, &mut remarks.warnings);
                weigh(&mut service);
                self.failed.mark(&key, &mut service);
                self.offered.join(&key, &mut service, &mut remarks.warnings);
                manifests.apply(&key, &mut service, &mut remarks.warnings);
                joined.push((key, service, remarks));
            }
        }
        for (key, service, remarks) in joined {
            if remarks == Remarks::default() {
                self.remarks.remove(&key);
            } else {
                self.remarks.insert(key.clone(), remarks);
            }
            let is_service = !service.clusters.is_empty();
            let caller = service.manifest.as_ref().filter(|manifest| !is_service && manifest.egress.is_some());
            if self.mesh.callers.get(&key) != caller {
                let callers = &mut Arc::make_mut(&mut self.mesh).callers;
                match caller {
                    Some(manifest) => callers.insert(key.clone(), Arc::clone(manifest)),
                    None => callers.remove(&key),
                };
            }
            let service = is_service.then_some(service);
            if self.mesh.services.get(&key).map(|known| &**known) == service.as_ref() {
                continue;
            }
            let services = &mut Arc::make_mut(&mut self.mesh).services;
            match service {
                Some(service) => services.insert(key.clone(), Arc::new(service)),
                None => services.remove(&key),
            };
            changed.insert(key);
        }
        changed
    }

    fn warnings(&self, registry: &Registry) -> Vec<String> {
        let mut warnings = Vec::new();
        for (info, objects) in clusters(registry) {
            Pods::find(info, objects, &mut warnings);
        }
        warnings.extend_from_slice(&self.vip_warnings);
        warnings.extend_from_slice(&self.egress_warnings);
        warnings.extend_from_slice(&self.edge_warnings);
        warnings.extend_from_slice(self.registered.warnings());
        warnings.extend(self.remarks.values().flat_map(|remarks| remarks.warnings.iter().cloned()));
        let mut only_there: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (cluster, port) in self.remarks.values().flat_map(|remarks| &remarks.only_there) {
            only_there.entry(cluster).or_default().push(port);
        }
        for (cluster, names) in only_there {
            let shown = names[..names.len().min(MOST_NAMED)].join(", ");
            let more = if names.len() > MOST_NAMED { ", ..." } else { "" };
            warnings.push(format!(
                "cluster {cluster} is drained, but has the only healthy endpoints of {} service ports, which keep getting \
                 requests: {shown}{more}",
                names.len(),
            ));
        }
        warnings
    }
}

/// The clusters that have been read.
fn clusters(registry: &Registry) -> impl Iterator<Item = (&ClusterInfo, &Objects)> {
    registry.clusters.iter().filter_map(|cluster| Some((&cluster.info, &**cluster.objects.as_ref()?)))
}

/// What is said of services that may call others which there are not.
fn unknown_egress(mesh: &Mesh) -> Vec<String> {
    let of_services = mesh.services.iter().filter_map(|(key, service)| Some((key, service.manifest.as_ref()?)));
    let stated = of_services.chain(&mesh.callers);
    let stated = stated.filter_map(|(key, manifest)| Some((key, manifest.egress.as_ref()?)));
    let unknown = stated.flat_map(|(key, egress)| {
        let named = egress.0.iter().map(|name| name.seen_from(&key.namespace));
        let missing = named.filter(|name| !mesh.services.contains_key(name));
        missing.map(move |name| {
            format!("ServiceManifest {key}: spec.egress names {name}, {NO_SERVICE}: what goes there is passed through")
        })
    });
    unknown.collect()
}

/// The names that a cluster's service may have in the mesh: its own, and the one with which it is kept apart.
fn names(key: &ObjectKey, info: &ClusterInfo) -> [ObjectKey; 2] {
    [key.clone(), ObjectKey::new(format!("{}.{}", key.namespace, info.name), key.name.clone())]
}

impl Known {
    /// Takes in a cluster's newest state, and marks what it can have to do with. Gives whether any Service has changed.
    fn take_in(&mut self, cluster: &Cluster, marked: &mut Keys) -> bool {
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
        if nodes_changed {
            after.services.keys().for_each(&mut mark);
        }
        self.objects = after;
        services_changed
    }

    /// Adds what this cluster has of a service.
    fn join(
        &self,
        name: &ObjectKey,
        info: &ClusterInfo,
        pods: &Pods<'_>,
        vips: &Vips,
        joined: &mut MeshService,
        warnings: &mut Vec<String>,
    ) {
        let apart = name.namespace.strip_suffix(&*info.name).and_then(|rest| rest.strip_suffix('.'));
        let apart = apart.map(|namespace| ObjectKey::new(namespace, name.name.clone()));
        for key in std::iter::once(name).chain(&apart) {
            let Some(service) = self.objects.services.get(key) else { continue };
            if mesh_key(key, service, info) != *name {
                continue;
            }
            let slices: Vec<&EndpointSlice> =
                self.slices.get(key).into_iter().flat_map(BTreeMap::values).map(|slice| &**slice).collect();
            let endpoints = EndpointsOf { info, service, slices: &slices, pods, nodes: &self.objects.nodes };
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

/// What can be said of a service only when all clusters are known.
fn finish(key: &ObjectKey, service: &mut MeshService, registry: &Registry, remarks: &mut Remarks) {
    let drained: BTreeSet<&str> =
        registry.clusters.iter().filter(|cluster| cluster.drained).map(|cluster| &*cluster.info.name).collect();
    let joined = service.clusters.len() > 1;
    for (port, described) in &mut service.ports {
        if joined {
            let mut known = HashSet::new();
            described.endpoints.retain(|endpoint| known.insert(endpoint.address));
        }
        for cluster in drain(&mut described.endpoints, &drained) {
            remarks.only_there.push((cluster.to_owned(), cluster_name(key, *port)));
        }
        leave_out_excess_draining(&mut described.endpoints);
    }
}

/// Of endpoints some of which have a weight, registered or not, the others are ordinary ones. Where all have registered
/// themselves, one without a weight has 1, as for readers of their own API.
fn weigh(service: &mut MeshService) {
    for described in service.ports.values_mut() {
        let all_registered = described.endpoints.iter().all(|endpoint| endpoint.cluster == REGISTERED);
        if !all_registered && described.endpoints.iter().any(|endpoint| endpoint.weight.is_some()) {
            for endpoint in &mut described.endpoints {
                endpoint.weight = endpoint.weight.or(Some(ORDINARY_WEIGHT));
            }
        }
    }
}

#[cfg(test)]
#[path = "joiner_tests.rs"]
mod tests;
