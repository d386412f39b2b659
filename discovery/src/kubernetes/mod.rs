//! The part of Kubernetes' objects that discovery needs, checked: Services, EndpointSlices, Pods and Nodes.

pub(crate) mod convert;
pub mod manifest;
mod raw;

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::IpAddr;
use std::sync::Arc;

use crate::policy::ServiceManifest;
use crate::secrets::Secret;

/// The label of a pod that is kept out of load balancing and reached only by overrides, with the value `true`.
pub const LABEL_OFFLOADED: &str = "culvert.dev/offloaded";
/// The label, or else the annotation, of an offloaded pod that says which revision it runs.
pub const LABEL_REVISION: &str = "culvert.dev/revision";
/// The label of an EndpointSlice that says which service it belongs to.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

/// The largest value of the annotation `culvert.dev/weight`, in hundredths of an ordinary endpoint's share.
pub const MAX_WEIGHT: u16 = 1000;

/// What identifies an object of one kind in one cluster. Ordered by namespace, then name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// The namespace, `default` if the manifest names none.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectKey {
    /// A key from its two parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// As Kubernetes' tools write it: `namespace/name`.
impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The objects of one cluster. A copy shares them, and the map of each kind until it is changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// Services.
    pub services: Arc<BTreeMap<ObjectKey, Arc<Service>>>,
    /// EndpointSlices of IP addresses.
    pub slices: Arc<BTreeMap<ObjectKey, Arc<EndpointSlice>>>,
    /// Pods. Of an API server's, only those that matter beyond their slices: [`Pod::matters`].
    pub pods: Arc<BTreeMap<ObjectKey, Arc<Pod>>>,
    /// Pods that have been deleted, by their unique ids: a slice may list them for a while yet, as if they were well.
    pub gone: Arc<BTreeMap<String, ObjectKey>>,
    /// The Pods that are known, while Pods cannot be read and what slices list may have come since. `None`: all are.
    pub known_pods: Option<Arc<HashSet<PodId>>>,
    /// Nodes, without a namespace.
    pub nodes: Arc<BTreeMap<ObjectKey, Arc<Node>>>,
    /// What is stated about services.
    pub manifests: Arc<BTreeMap<ObjectKey, Arc<ServiceManifest>>>,
    /// What proxies may be given of secrets.
    pub secrets: Arc<BTreeMap<ObjectKey, Arc<Secret>>>,
    /// The virtual addresses of all Services, where not all of them are selected.
    pub virtual_ips: Arc<BTreeMap<ObjectKey, Arc<VirtualIps>>>,
}

/// What stands for the unique id of a Pod, of which a cluster may have a hundred thousand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PodId(u64);

impl PodId {
    /// Of a unique id. That two of them are the same here is as good as impossible.
    #[must_use]
    pub fn of(uid: &str) -> Self {
        let mut hasher = DefaultHasher::new();
        uid.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// A transport protocol. Only TCP ports become Envoy clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP, the default.
    Tcp,
    /// UDP or SCTP.
    Other,
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// The virtual addresses; empty for a headless service.
    pub cluster_ips: Vec<IpAddr>,
    /// Whether IPv6 is the first of its families.
    pub prefers_ipv6: bool,
    /// The TCP ports.
    pub ports: Vec<ServicePort>,
    /// Labels of the pods that belong to it; a service without a selector selects nothing.
    pub selector: BTreeMap<String, String>,
    /// The host outside of the cluster that a service of type ExternalName stands for.
    pub external_name: Option<String>,
    /// Whether endpoints count whatever is said about their readiness.
    pub publish_not_ready: bool,
    /// The share of each of its endpoints in this cluster, in hundredths; `None` is 100.
    pub weight: Option<u16>,
    /// Whether it is one service with those of its name in other clusters, where it says so itself.
    pub merge: Option<bool>,
    /// Whether it is none of the mesh's, but of its own cluster alone, where its addresses are not free for other clusters' services: the
    /// API server, and what is answered on the client's own node (`internalTrafficPolicy: Local`), unless `merge` says otherwise.
    pub stays_out: bool,
}

impl Service {
    /// Its virtual addresses with its ports.
    pub fn addresses(&self) -> impl Iterator<Item = (IpAddr, u16)> + '_ {
        self.ports.iter().flat_map(|port| self.cluster_ips.iter().map(|ip| (*ip, port.port)))
    }

    /// Whether the selector chooses a pod with these labels.
    #[must_use]
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

/// The virtual addresses of a Service with its TCP ports: all that has to be known of one that is not selected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VirtualIps(pub Vec<(IpAddr, u16)>);

/// A TCP port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// The name, empty when the service has one port without a name.
    pub name: String,
    /// The port that clients connect to.
    pub port: u16,
    /// Where it leads on a pod.
    pub target_port: TargetPort,
    /// The application protocol, if stated.
    pub app_protocol: Option<String>,
}

/// A port of a pod, by number or by the name that a container gives it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetPort {
    /// By number.
    Number(u16),
    /// By the name of a container's port.
    Name(String),
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// The name of the service, in the slice's own namespace. `None` for a slice that belongs to none.
    pub service: Option<String>,
    /// The ports of all its endpoints.
    pub ports: Vec<SlicePort>,
    /// The endpoints.
    pub endpoints: Vec<SliceEndpoint>,
}

/// A TCP port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the service's port that it implements.
    pub name: String,
    /// The port on the endpoint; `None` stands for every port.
    pub port: Option<u16>,
}

/// One endpoint of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceEndpoint {
    /// Its address: the first of the list, the others have no meaning.
    pub address: IpAddr,
    /// Whether it takes new connections; absent means yes.
    pub ready: bool,
    /// Whether it still answers; absent means `ready`.
    pub serving: bool,
    /// Whether it is about to end; absent means no.
    pub terminating: bool,
    /// The availability zone, if stated.
    pub zone: Option<String>,
    /// The node that it runs on, if stated.
    pub node: Option<String>,
    /// The pod behind it, if it is a pod.
    pub pod: Option<ObjectKey>,
    /// The unique id of the object behind it.
    pub target_uid: Option<String>,
}

/// A Pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its unique id, empty in manifests that were written by hand.
    pub uid: Option<String>,
    /// Its labels; kept of offloaded pods only.
    pub labels: BTreeMap<String, String>,
    /// The revision that it runs, as its annotation says; kept of offloaded pods only.
    pub annotated_revision: Option<String>,
    /// Its addresses, one a family, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// Names of its containers' TCP ports; kept of offloaded pods only.
    pub ports: BTreeMap<String, u16>,
    /// Whether it can take requests: not marked unready, not ended and not being deleted.
    pub ready: bool,
    /// Whether it is being deleted, or will be: it has a deletionTimestamp or the condition DisruptionTarget.
    pub leaving: bool,
    /// Whether all its containers have ended for good.
    pub ended: bool,
    /// Its share, in hundredths; `None` is 100, 0 takes it out.
    pub weight: Option<u16>,
    /// When it was made, in seconds since the epoch; kept of offloaded pods only.
    pub created: Option<i64>,
}

impl Pod {
    /// Whether anything about the pod is not in its EndpointSlice too.
    #[must_use]
    pub fn matters(&self) -> bool {
        self.is_offloaded() || self.leaving || self.ended || self.weight.is_some()
    }

    /// Whether the pod is kept out of load balancing: it has the label, and that does not say the opposite. A branch that gets everybody's
    /// requests because of `True` or `yes` would be worse than a pod that gets none.
    #[must_use]
    pub fn is_offloaded(&self) -> bool {
        self.labels.get(LABEL_OFFLOADED).is_some_and(|value| !value.eq_ignore_ascii_case("false"))
    }

    /// The revision that an offloaded pod runs.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        let stated = self.labels.get(LABEL_REVISION).or(self.annotated_revision.as_ref());
        stated.map(String::as_str).filter(|revision| !revision.is_empty())
    }

    /// The number behind a service's target port on this pod, `None` when no container names it so.
    #[must_use]
    pub fn resolve(&self, target: &TargetPort) -> Option<u16> {
        match target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => self.ports.get(name).copied(),
        }
    }
}

/// A Node: where it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// The label `topology.kubernetes.io/region`, empty if there is none.
    pub region: String,
    /// The label `topology.kubernetes.io/zone`, empty if there is none.
    pub zone: String,
}
