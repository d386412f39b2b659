//! Joins the clusters of the registry into one mesh: services with their endpoints, wherever they run.
//!
//! Services of the same name and namespace are one service. Where clusters disagree, the one configured first counts.

mod endpoints;
mod pods;

use std::collections::{BTreeMap, BTreeSet, HashSet, btree_map};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

use self::endpoints::EndpointsOf;
use self::pods::Pods;
use crate::kubernetes::{EndpointSlice, ObjectKey, Objects, Service, ServicePort};
use crate::policy::ServiceManifest;
use crate::registry::{ClusterInfo, Registry};

/// The weight of an endpoint of which nothing was said, beside others of which it was.
const ORDINARY_WEIGHT: NonZeroU32 = NonZeroU32::new(100).unwrap();

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
    /// The same in the other family, of a dual-stack pod of a dual-stack service.
    pub other_family: Option<SocketAddr>,
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

/// A host outside of all clusters that a service stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct External {
    /// Its name, which proxies resolve.
    pub host: String,
    /// Its port.
    pub port: u16,
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
    /// The host that it stands for; it has no endpoints then.
    pub external: Option<External>,
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
    /// What is stated about it.
    pub manifest: Option<Arc<ServiceManifest>>,
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
    let drained: BTreeSet<&str> =
        registry.clusters.iter().filter(|cluster| cluster.drained).map(|cluster| &*cluster.info.name).collect();
    joiner.finish(&drained)
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
        let pods = Pods::find(info, objects, &mut self.mesh.warnings);
        for (key, service) in &objects.services {
            let slices = slices.get(&(&*key.namespace, &*key.name)).map_or(&[][..], Vec::as_slice);
            let endpoints = EndpointsOf { info, service, slices, pods: &pods, nodes: &objects.nodes };
            let name = mesh_key(key, service, info);
            self.mesh.services.entry(name.clone()).or_default().clusters.push(info.name.clone());
            for port in &service.ports {
                let described = MeshPort {
                    protocol: Protocol::of(port),
                    vips: self.claim_vips(&name, service, port.port, info),
                    external: service.external_name.clone().map(|host| External { host, port: port.port }),
                    endpoints: endpoints.of_port(port),
                    offloaded: pods.offloaded_of(key, service, port, &mut self.mesh.warnings),
                };
                self.add_port(&name, port, info, described);
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

    fn add_port(&mut self, key: &ObjectKey, port: &ServicePort, info: &ClusterInfo, described: MeshPort) {
        let service = self.mesh.services.entry(key.clone()).or_default();
        let joined = match service.ports.entry(port.port) {
            btree_map::Entry::Vacant(entry) => {
                entry.insert(described);
                return;
            }
            btree_map::Entry::Occupied(entry) => entry.into_mut(),
        };
        let differs = |what: &dyn fmt::Display, before: &dyn fmt::Display| {
            format!(
                "port {} of Service {key} is {what} in cluster {}, and {before} in a cluster before it, which counts",
                port.port, info.name,
            )
        };
        if joined.external != described.external {
            let kind = |external: &Option<External>| match external {
                Some(External { host, .. }) => format!("the external name {host}"),
                None => "in the cluster".to_owned(),
            };
            self.mesh.warnings.push(differs(&kind(&described.external), &kind(&joined.external)));
            return;
        }
        if joined.protocol != described.protocol {
            self.mesh.warnings.push(differs(&described.protocol, &joined.protocol));
        }
        joined.vips.extend(described.vips);
        joined.endpoints.extend(described.endpoints);
        joined.offloaded.extend(described.offloaded);
    }

    /// What can be said only when all clusters are known.
    fn finish(mut self, drained: &BTreeSet<&str>) -> Mesh {
        let mut only_there: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for (key, service) in &mut self.mesh.services {
            let joined = service.clusters.len() > 1;
            for (port, described) in &mut service.ports {
                if joined {
                    let mut known = HashSet::new();
                    described.endpoints.retain(|endpoint| known.insert(endpoint.address));
                }
                for cluster in drain(&mut described.endpoints, drained) {
                    only_there.entry(cluster).or_default().push(cluster_name(key, *port));
                }
                leave_out_excess_draining(&mut described.endpoints);
                if described.endpoints.iter().any(|endpoint| endpoint.weight.is_some()) {
                    for endpoint in &mut described.endpoints {
                        endpoint.weight = endpoint.weight.or(Some(ORDINARY_WEIGHT));
                    }
                }
            }
        }
        for (cluster, names) in only_there {
            let shown = names[..names.len().min(MOST_NAMED)].join(", ");
            let more = if names.len() > MOST_NAMED { ", ..." } else { "" };
            self.mesh.warnings.push(format!(
                "cluster {cluster} is drained, but has the only healthy endpoints of {} service ports, which keep getting \
                 requests: {shown}{more}",
                names.len(),
            ));
        }
        self.mesh
    }
}

/// How many services a warning names.
const MOST_NAMED: usize = 5;

/// The name of a cluster's service in the mesh. One that is kept apart has the cluster's name behind its namespace: no
/// namespace of Kubernetes has a dot, so that it cannot be taken for another.
pub(crate) fn mesh_key(key: &ObjectKey, service: &Service, info: &ClusterInfo) -> ObjectKey {
    if service.merge.unwrap_or(!info.apart) {
        key.clone()
    } else {
        ObjectKey::new(format!("{}.{}", key.namespace, info.name), key.name.clone())
    }
}

/// Has the endpoints of drained clusters drain where others can take over. Gives the clusters whose endpoints cannot be
/// done without: an outage is not what whoever drains a cluster asks for.
fn drain<'a>(endpoints: &mut [Endpoint], drained: &BTreeSet<&'a str>) -> Vec<&'a str> {
    let is_drained = |endpoint: &Endpoint| drained.contains(&*endpoint.cluster);
    let healthy = |endpoint: &&Endpoint| endpoint.health == Health::Healthy;
    if endpoints.iter().filter(healthy).any(|endpoint| !is_drained(endpoint)) {
        for endpoint in endpoints.iter_mut().filter(|endpoint| is_drained(endpoint)) {
            endpoint.health = Health::Draining;
        }
        return Vec::new();
    }
    let needed = |name: &&&str| endpoints.iter().filter(healthy).any(|endpoint| endpoint.cluster == **name);
    drained.iter().filter(needed).copied().collect()
}

/// Leaves the draining endpoints out when there are more of them than healthy ones. A proxy that sees fewer than half of
/// its hosts healthy takes its view to be wrong and picks among all of them (Envoy's panic threshold), so that
/// the draining ones would get new requests after all. What they have already is finished either way.
fn leave_out_excess_draining(endpoints: &mut Vec<Endpoint>) {
    let draining = endpoints.iter().filter(|endpoint| endpoint.health == Health::Draining).count();
    let healthy = endpoints.len() - draining;
    if healthy > 0 && draining > healthy {
        endpoints.retain(|endpoint| endpoint.health == Health::Healthy);
    }
}

#[cfg(test)]
mod tests;
