//! Keeps the mesh up to date: of each new state of the registry only the services that it touches are joined anew.
//!
//! Objects are shared between states of the registry, so that what has changed is found by comparing pointers. What a
//! changed object can have to do with is marked, rather too much than too little: a service that turns out as it was
//! is no change.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::Override;
use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::r#override::Mode;

use super::known::{Known, Remarks};
use super::pods::Pods;
use super::{MOST_NAMED, Mesh, MeshService, ORDINARY_WEIGHT, cluster_name, drain, leave_out_excess_draining, mesh_key};
use crate::health::Failed;
use crate::kubernetes::{ObjectKey, Objects};
use crate::overrides::shares::Share;
use crate::overrides::tunnels::Offered;
use crate::policy::ServiceManifest;
use crate::policy::apply::{Manifests, contested_at_the_edge};
use crate::registration::join::{CLUSTER as REGISTERED, Registered};
use crate::registry::{ClusterInfo, Registry};
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
    /// What proxies do about overrides.
    overrides: Override,
    /// Whether there are, or were, offloaded pods or tunnels.
    has_offloaded: bool,
}

/// What is said of a name that means nothing here.
pub(crate) const NO_SERVICE: &str = "which is no service of the mesh";

pub(super) type Vips = HashMap<(IpAddr, u16), (ObjectKey, String)>;
pub(super) type Keys = BTreeSet<ObjectKey>;

impl Joiner {
    /// Nothing yet, for a mesh whose proxies do this about overrides.
    #[must_use]
    pub fn new(overrides: Override) -> Self {
        Self { overrides, ..Self::default() }
    }

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
            for (key, service) in objects.services.iter().filter(|(_, service)| !service.stays_out) {
                let name = mesh_key(key, service, info);
                for address in service.addresses() {
                    let (owner, cluster) = vips.entry(address).or_insert_with(|| (name.clone(), info.name.clone()));
                    if *owner == name {
                        continue;
                    }
                    contested.insert(address);
                    // Of one that is kept apart it is as it should be: each client gets to the one of its own cluster.
                    let apart = ObjectKey::new(format!("{}.{cluster}", key.namespace), key.name.clone());
                    if *owner != apart {
                        self.vip_warnings.push(format!(
                            "{} is the address of {owner} in cluster {cluster} and of {name} in cluster {}; what goes there \
                             is passed through, to the one of its own cluster",
                            SocketAddr::from(address),
                            info.name,
                        ));
                    }
                }
            }
        }
        for (info, objects) in clusters(registry) {
            let mut taken = 0;
            let own = objects.services.iter().filter(|(_, service)| service.stays_out);
            for (key, address) in own.flat_map(|(key, service)| service.addresses().map(move |it| (key, it))) {
                if let Some((owner, cluster)) = vips.get(&address).filter(|(_, cluster)| *cluster != info.name) {
                    contested.insert(address);
                    self.vip_warnings.push(format!(
                        "{} is the address of {owner} in cluster {cluster} and of {key}, which is none of the mesh's, in cluster {}; \
                         what goes there is passed through, to the one of its own cluster",
                        SocketAddr::from(address),
                        info.name,
                    ));
                }
            }
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
            self.has_offloaded |= pods.iter().any(Pods::some_are_offloaded) || !self.offered.is_empty();
            for key in marked {
                let mut remarks = Remarks::default();
                let mut service = MeshService::default();
                let holds_back = self.may_be_offloaded(manifests.of(&key, &mut Vec::new()).map(|manifest| &**manifest));
                for ((known, cluster), pods) in known.iter().zip(&pods) {
                    known.join(&key, &cluster.info, (pods, holds_back), &self.vips, &mut service, &mut remarks);
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

    /// Whether a pod of a service that is not known might be an offloaded one: where nobody may reach such a pod, there is none, and where there
    /// have never been any, more pods of a service are just that.
    fn may_be_offloaded(&self, manifest: Option<&ServiceManifest>) -> bool {
        let Override { mode, require_opt_in, .. } = &self.overrides;
        let stated = manifest.and_then(|manifest| manifest.overrides.as_ref());
        match stated {
            _ if *mode == i32::from(Mode::RefuseAll) => false,
            Some(policy) => policy.allowed,
            None => !require_opt_in && (self.has_offloaded || self.overrides != Override::default()),
        }
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
        let named = |names: &[&str]| {
            let more = if names.len() > MOST_NAMED { ", ..." } else { "" };
            format!("{}{more}", names[..names.len().min(MOST_NAMED)].join(", "))
        };
        for (cluster, names) in only_there {
            warnings.push(format!(
                "cluster {cluster} is drained, but has the only healthy endpoints of {} service ports, which keep getting \
                 requests: {}",
                names.len(),
                named(&names),
            ));
        }
        let mut held_back: BTreeMap<&str, (usize, Vec<&str>)> = BTreeMap::new();
        for (key, remarks) in &self.remarks {
            for (cluster, count) in &remarks.held_back {
                let (all, names) = held_back.entry(cluster).or_default();
                *all += count;
                names.push(&key.name);
            }
        }
        for (cluster, (count, names)) in held_back {
            warnings.push(format!(
                "{count} endpoints of cluster {cluster} are held back, as their Pods came after Pods could not be read any more, and may \
                 be offloaded ones: of {}",
                named(&names),
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
