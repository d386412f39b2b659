//! The part of Kubernetes' objects that discovery needs, checked: Services, EndpointSlices and Pods.

pub mod manifest;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

/// The label of a pod that is kept out of load balancing and reached only by overrides, with the value `true`.
pub const LABEL_OFFLOADED: &str = "culvert.dev/offloaded";
/// The label of an offloaded pod that says which revision it runs.
pub const LABEL_REVISION: &str = "culvert.dev/revision";
/// The label of an EndpointSlice that says which service it belongs to.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";

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

/// The objects of one cluster.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// Services, without those of type ExternalName.
    pub services: BTreeMap<ObjectKey, Service>,
    /// EndpointSlices of IP addresses.
    pub slices: BTreeMap<ObjectKey, EndpointSlice>,
    /// Pods.
    pub pods: BTreeMap<ObjectKey, Pod>,
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
    /// The TCP ports.
    pub ports: Vec<ServicePort>,
    /// Labels of the pods that belong to it; a service without a selector selects nothing.
    pub selector: BTreeMap<String, String>,
}

impl Service {
    /// Whether the selector chooses a pod with these labels.
    #[must_use]
    pub fn selects(&self, labels: &BTreeMap<String, String>) -> bool {
        !self.selector.is_empty() && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

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
    /// The pod behind it, if it is a pod.
    pub pod: Option<ObjectKey>,
    /// The unique id of the object behind it.
    pub target_uid: Option<String>,
}

/// A Pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its addresses, one a family, the primary one first.
    pub addresses: Vec<IpAddr>,
    /// Names of its containers' TCP ports.
    pub ports: BTreeMap<String, u16>,
    /// Whether it can take requests: not marked unready, not ended and not being deleted.
    pub ready: bool,
}

impl Pod {
    /// Whether the pod is kept out of load balancing.
    #[must_use]
    pub fn is_offloaded(&self) -> bool {
        self.labels.get(LABEL_OFFLOADED).is_some_and(|value| value == "true")
    }

    /// The revision that an offloaded pod runs.
    #[must_use]
    pub fn revision(&self) -> Option<&str> {
        self.labels.get(LABEL_REVISION).map(String::as_str).filter(|revision| !revision.is_empty())
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
