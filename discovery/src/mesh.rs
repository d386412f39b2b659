//! Joins the clusters of the registry into one mesh: services with their endpoints, wherever they run.
//!
//! Services of the same name and namespace are one service. Where clusters disagree, the one configured first counts.

use std::collections::{BTreeMap, BTreeSet, btree_map};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;

use crate::kubernetes::{EndpointSlice, ObjectKey, Objects, Pod, Service, ServicePort, SliceEndpoint, TargetPort};
use crate::registry::{ClusterInfo, Registry};

/// What a port speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Anything over TCP.
    Tcp,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 without TLS.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
}

impl Protocol {
    /// The protocol of a service's port: its `appProtocol`, else the part of its name before the first `-`.
    #[must_use]
    pub fn of(port: &ServicePort) -> Self {
        let by_name = || port.name.split('-').next().and_then(Self::parse);
        // An appProtocol that we do not know is opaque to us, whatever the port is called.
        match port.app_protocol.as_deref().map(|stated| Self::parse(stated.trim_start_matches("kubernetes.io/"))) {
            Some(stated) => stated.unwrap_or(Self::Tcp),
            None => by_name().unwrap_or(Self::Tcp),
        }
    }

    /// The protocol that goes by this name.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "http" | "ws" => Self::Http1,
            "http2" | "h2c" => Self::Http2,
            "grpc" => Self::Grpc,
            _ => return None,
        })
    }

    /// Whether requests are routed, rather than connections.
    #[must_use]
    pub fn is_http(self) -> bool {
        self != Self::Tcp
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Http1 => "http",
            Self::Http2 => "http2",
            Self::Grpc => "grpc",
        })
    }
}

/// Whether an endpoint takes new requests. The better one sorts first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// It does.
    Healthy,
    /// It finishes what it has and takes no more.
    Draining,
}

/// The place of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Locality {
    /// The region. Empty if not known.
    pub region: String,
    /// The zone. Empty if not known.
    pub zone: String,
}

/// A load-balanced endpoint of a service's port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Where it is.
    pub locality: Locality,
    /// Whether it takes requests.
    pub health: Health,
    /// The cluster it was found in.
    pub cluster: String,
    /// Its share of the requests among endpoints of one locality; `None` is as much as 1.
    pub weight: Option<NonZeroU32>,
    /// Whether it is marked as a canary.
    pub canary: bool,
}

/// An endpoint that only overrides reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OffloadedEndpoint {
    /// The revision it runs.
    pub revision: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// The pod.
    pub pod: ObjectKey,
    /// The cluster it was found in.
    pub cluster: String,
}

/// A port of a mesh service: one Envoy cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MeshPort {
    /// What it speaks.
    pub protocol: Protocol,
    /// The virtual addresses that lead to it.
    pub vips: Vec<IpAddr>,
    /// Its load-balanced endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its endpoints that only overrides reach.
    pub offloaded: Vec<OffloadedEndpoint>,
}

/// A service, joined from all clusters that have it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeshService {
    /// The clusters that have it, in the order of the configuration.
    pub clusters: Vec<String>,
    /// Its TCP ports.
    pub ports: BTreeMap<u16, MeshPort>,
}

/// All services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// The services by namespace and name.
    pub services: BTreeMap<ObjectKey, MeshService>,
    /// What was found to be inconsistent, for people.
    pub warnings: Vec<String>,
}

/// The name of the Envoy cluster of a service's port, for example `users.default:80`.
#[must_use]
pub fn cluster_name(service: &ObjectKey, port: u16) -> String {
    format!("{}.{}:{port}", service.name, service.namespace)
}

/// Joins what all sources said.
#[must_use]
pub fn join(registry: &Registry) -> Mesh {
    let mut joiner = Joiner::default();
    for cluster in &registry.clusters {
        if let Some(objects) = &cluster.objects {
            joiner.add_cluster(&cluster.info, objects);
        }
    }
    joiner.mesh
}

#[derive(Default)]
struct Joiner {
    mesh: Mesh,
    /// Which service of which cluster a virtual address and port leads to.
    vips: BTreeMap<(IpAddr, u16), (ObjectKey, String)>,
}

impl Joiner {
    fn add_cluster(&mut self, info: &ClusterInfo, objects: &Objects) {
        let mut slices: BTreeMap<(&str, &str), Vec<&EndpointSlice>> = BTreeMap::new();
        for (key, slice) in &objects.slices {
            if let Some(service) = &slice.service {
                slices.entry((&key.namespace, service)).or_default().push(slice);
            }
        }
        let offloaded = OffloadedPods::find(info, objects, &mut self.mesh.warnings);
        for (key, service) in &objects.services {
            let slices = slices.get(&(&*key.namespace, &*key.name)).map_or(&[][..], Vec::as_slice);
            self.mesh.services.entry(key.clone()).or_default().clusters.push(info.name.clone());
            for port in &service.ports {
                let vips = self.claim_vips(key, service, port.port, info);
                let endpoints = join_endpoints(info, service, port, slices, &offloaded);
                let pods = offloaded.of_service(info, key, service, port, &mut self.mesh.warnings);
                self.add_port(key, port, info, vips, endpoints, pods);
            }
        }
    }

    /// The virtual addresses that lead to this service's port and to no other's.
    fn claim_vips(&mut self, key: &ObjectKey, service: &Service, port: u16, info: &ClusterInfo) -> Vec<IpAddr> {
        let mut claimed = Vec::new();
        for vip in &service.cluster_ips {
            match self.vips.entry((*vip, port)) {
                btree_map::Entry::Vacant(entry) => {
                    entry.insert((key.clone(), info.name.clone()));
                    claimed.push(*vip);
                }
                btree_map::Entry::Occupied(entry) => {
                    let (owner, cluster) = entry.get();
                    if owner != key {
                        self.mesh.warnings.push(format!(
                            "{} is the address of {owner} in cluster {cluster} and of {key} in cluster {}; it leads to \
                             {owner}",
                            SocketAddr::new(*vip, port),
                            info.name,
                        ));
                    }
                }
            }
        }
        claimed
    }

    fn add_port(
        &mut self,
        key: &ObjectKey,
        port: &ServicePort,
        info: &ClusterInfo,
        vips: Vec<IpAddr>,
        endpoints: Vec<Endpoint>,
        offloaded: Vec<OffloadedEndpoint>,
    ) {
        let protocol = Protocol::of(port);
        let service = self.mesh.services.entry(key.clone()).or_default();
        match service.ports.entry(port.port) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(MeshPort { protocol, vips, endpoints, offloaded });
            }
            btree_map::Entry::Occupied(entry) => {
                let joined = entry.into_mut();
                if joined.protocol != protocol {
                    self.mesh.warnings.push(format!(
                        "port {} of Service {key} is {protocol} in cluster {}, and {} in a cluster before it, which counts",
                        port.port, info.name, joined.protocol,
                    ));
                }
                joined.vips.extend(vips);
                for endpoint in endpoints {
                    if !joined.endpoints.iter().any(|known| known.address == endpoint.address) {
                        joined.endpoints.push(endpoint);
                    }
                }
                joined.offloaded.extend(offloaded);
            }
        }
    }
}

/// The endpoints of one service port in one cluster, each once, however many slices list it.
fn join_endpoints(
    info: &ClusterInfo,
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    offloaded: &OffloadedPods<'_>,
) -> Vec<Endpoint> {
    // A dual-stack pod is in one slice a family under the same uid: its address in the service's first family counts.
    let prefers_ipv6 = service.cluster_ips.first().is_some_and(IpAddr::is_ipv6);
    let rank = |endpoint: &Endpoint| (endpoint.health, endpoint.address.is_ipv6() != prefers_ipv6, endpoint.address);
    let mut found: BTreeMap<Identity<'_>, Endpoint> = BTreeMap::new();
    for slice in slices {
        let Some(number) = slice.ports.iter().find(|p| p.name == port.name).and_then(|slice_port| {
            slice_port.port.or(match port.target_port {
                TargetPort::Number(number) => Some(number),
                TargetPort::Name(_) => None,
            })
        }) else {
            continue;
        };
        for listed in &slice.endpoints {
            let Some(health) = health_of(listed).filter(|_| !offloaded.contains(listed)) else { continue };
            let zone = listed.zone.as_ref().unwrap_or(&info.zone).clone();
            let endpoint = Endpoint {
                address: SocketAddr::new(listed.address, number),
                locality: Locality { region: info.region.clone(), zone },
                health,
                cluster: info.name.clone(),
                weight: None,
                canary: false,
            };
            let identity = match &listed.target_uid {
                Some(uid) => Identity::Uid(uid),
                None => Identity::Address(listed.address),
            };
            match found.entry(identity) {
                btree_map::Entry::Vacant(entry) => {
                    entry.insert(endpoint);
                }
                btree_map::Entry::Occupied(mut entry) => {
                    if rank(&endpoint) < rank(entry.get()) {
                        entry.insert(endpoint);
                    }
                }
            }
        }
    }
    // The same address under two identities is still one endpoint.
    let mut endpoints: Vec<Endpoint> = found.into_values().collect();
    endpoints.sort_by_key(|endpoint| (endpoint.address, endpoint.health));
    endpoints.dedup_by_key(|endpoint| endpoint.address);
    endpoints
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Identity<'a> {
    Uid(&'a str),
    Address(IpAddr),
}

fn health_of(endpoint: &SliceEndpoint) -> Option<Health> {
    if endpoint.ready {
        Some(Health::Healthy)
    } else if endpoint.serving && endpoint.terminating {
        Some(Health::Draining)
    } else {
        None
    }
}

/// The offloaded pods of one cluster.
struct OffloadedPods<'a> {
    pods: BTreeMap<&'a ObjectKey, &'a Pod>,
    addresses: BTreeSet<IpAddr>,
}

impl<'a> OffloadedPods<'a> {
    fn find(info: &ClusterInfo, objects: &'a Objects, warnings: &mut Vec<String>) -> Self {
        let pods: BTreeMap<_, _> = objects.pods.iter().filter(|(_, pod)| pod.is_offloaded()).collect();
        for (key, pod) in &pods {
            if pod.revision().is_none() {
                warnings.push(format!(
                    "Pod {key} in cluster {} is offloaded but has no label culvert.dev/revision: no request can reach it",
                    info.name
                ));
            }
        }
        // Only a live pod owns its address: an ended one may have passed it on.
        let addresses = pods.values().filter(|pod| pod.ready).flat_map(|pod| pod.addresses.iter().copied()).collect();
        Self { pods, addresses }
    }

    /// Whether an endpoint that a slice lists is an offloaded pod.
    fn contains(&self, endpoint: &SliceEndpoint) -> bool {
        match &endpoint.pod {
            Some(pod) if self.pods.contains_key(pod) => true,
            _ => self.addresses.contains(&endpoint.address),
        }
    }

    /// The offloaded endpoints of a service's port, sorted.
    fn of_service(
        &self,
        info: &ClusterInfo,
        key: &ObjectKey,
        service: &Service,
        port: &ServicePort,
        warnings: &mut Vec<String>,
    ) -> Vec<OffloadedEndpoint> {
        let prefers_ipv6 = service.cluster_ips.first().is_some_and(IpAddr::is_ipv6);
        let mut found = Vec::new();
        for (pod_key, pod) in &self.pods {
            if pod_key.namespace != key.namespace || !pod.ready || !service.selects(&pod.labels) {
                continue;
            }
            let preferred = pod.addresses.iter().find(|address| address.is_ipv6() == prefers_ipv6);
            let (Some(revision), Some(address)) = (pod.revision(), preferred.or(pod.addresses.first())) else {
                continue;
            };
            let Some(number) = pod.resolve(&port.target_port) else {
                warnings.push(format!(
                    "Pod {pod_key} in cluster {} has no container port that port {} of Service {key} names",
                    info.name, port.port
                ));
                continue;
            };
            found.push(OffloadedEndpoint {
                revision: revision.to_owned(),
                address: SocketAddr::new(*address, number),
                pod: (*pod_key).clone(),
                cluster: info.name.clone(),
            });
        }
        found
    }
}

#[cfg(test)]
#[path = "mesh_tests.rs"]
mod tests;
