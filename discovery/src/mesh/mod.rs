//! Joins the clusters of the registry into one mesh: services with their endpoints, wherever they run.
//!
//! Services of the same name and namespace are one service. Where clusters disagree, the one configured first counts.

mod endpoints;
mod joiner;
mod known;
mod pods;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU32;
use std::sync::Arc;

pub use self::joiner::Joiner;
pub(crate) use self::joiner::NO_SERVICE;
use crate::kubernetes::{ObjectKey, Service, ServicePort};
use crate::overrides::shares::Share;
use crate::policy::ServiceManifest;
use crate::registry::{ClusterInfo, Registry};
use crate::secrets::Secrets;

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
    /// Proxies that check it have found that it does not work.
    Unhealthy,
}

/// The place of an endpoint.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
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
    /// Since when the pod, or the tunnel, is there, in seconds since the epoch, as far as it is known.
    pub since: Option<i64>,
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
    /// The ports at which its pods take its connections: what a sidecar of such a pod goes by.
    pub targets: BTreeSet<u16>,
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

impl MeshService {
    /// Whether its pods take nothing but TLS from callers with certificates.
    #[must_use]
    pub fn has_mtls(&self) -> bool {
        self.manifest.as_ref().is_some_and(|manifest| manifest.mtls.is_some())
    }
}

/// All services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mesh {
    /// The services by namespace and name.
    pub services: BTreeMap<ObjectKey, Arc<MeshService>>,
    /// What is stated of whoever calls services and is none itself: an edge, a worker, a cron job. With `egress` each.
    pub callers: BTreeMap<ObjectKey, Arc<ServiceManifest>>,
    /// Stored sets of overrides, by name.
    pub shares: Vec<Arc<Share>>,
    /// What proxies may be given of secrets, by name.
    pub secrets: Secrets,
    /// What was found to be inconsistent, for people.
    pub warnings: Vec<String>,
}

impl Mesh {
    /// What is stated of the pods that are called so, of a service or of none.
    #[must_use]
    pub fn manifest(&self, key: &ObjectKey) -> Option<&Arc<ServiceManifest>> {
        match self.services.get(key) {
            Some(service) => service.manifest.as_ref(),
            None => self.callers.get(key),
        }
    }
}

/// The name of the Envoy cluster of a service's port, for example `users.default:80`.
#[must_use]
pub fn cluster_name(service: &ObjectKey, port: u16) -> String {
    format!("{}.{}:{port}", service.name, service.namespace)
}

/// Joins what all sources said.
#[must_use]
pub fn join(registry: &Registry) -> Mesh {
    Arc::unwrap_or_clone(Joiner::default().update(registry).0)
}

/// How many services a warning names.
const MOST_NAMED: usize = 5;

/// The name of a cluster's service in the mesh. One that is kept apart has the cluster's name behind its namespace: no
/// namespace of Kubernetes has a dot, so that it cannot be taken for another. Namespaces that begin with `kube-` are
/// Kubernetes' own: what is in them serves one cluster.
pub(crate) fn mesh_key(key: &ObjectKey, service: &Service, info: &ClusterInfo) -> ObjectKey {
    let apart = info.apart || key.namespace.starts_with("kube-");
    if service.merge.unwrap_or(!apart) {
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
    let healthy = endpoints.iter().filter(|endpoint| endpoint.health == Health::Healthy).count();
    if healthy > 0 && draining > 0 && endpoints.len() > 2 * healthy {
        endpoints.retain(|endpoint| endpoint.health != Health::Draining);
    }
}

#[cfg(test)]
mod tests;
