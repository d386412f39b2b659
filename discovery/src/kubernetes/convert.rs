//! From objects as they are written to checked ones.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use tracing::debug;

use super::manifest::ManifestError;
use super::raw::{
    Annotations, HasMetadata, RawConditions, RawContainer, RawEndpoint, RawEndpointSlice, RawNode, RawPod, RawPodIp,
    RawPodSpec, RawSecret, RawService, RawServiceManifest, RawServicePort, RawSlicePort, RawTargetPort,
};
use super::{
    EndpointSlice, LABEL_SERVICE_NAME, MAX_WEIGHT, Node, ObjectKey, Objects, Pod, PodId, Service, ServicePort,
    SliceEndpoint, SlicePort, TargetPort, Transport, VirtualIps,
};
use crate::policy::ServiceManifest;
use crate::secrets::{self, Secret};

/// A kind of object that discovery reads.
pub trait Kind: Sized + Send + Sync + PartialEq + 'static {
    /// The object as it is written.
    type Raw: DeserializeOwned + HasMetadata;
    /// The kind's name.
    const KIND: &'static str;
    /// What it is here, beside another one that reads the same objects.
    const NAME: &'static str = Self::KIND;
    /// The API's group and version.
    const API_VERSION: &'static str;
    /// Where an API server has the objects of all namespaces.
    const PATH: &'static str;
    /// Whether its objects are in namespaces.
    const NAMESPACED: bool;

    /// Whether an API server's object is kept.
    fn matters(&self) -> bool;

    /// The unique id of a Pod, whether it is kept or not.
    fn pod_id(&self) -> Option<PodId> {
        None
    }

    /// Checks one object. `None`: it is not for us.
    ///
    /// # Errors
    /// With the first field that is used and wrong.
    fn convert(raw: Self::Raw, object: &ObjectName) -> Result<Option<Self>, ManifestError>;

    /// The objects of this kind.
    fn among(objects: &mut Objects) -> &mut Arc<BTreeMap<ObjectKey, Arc<Self>>>;
}

macro_rules! kinds {
    ($($kind:ident, $raw:ident, $api:literal, $path:literal, $field:ident, $namespaced:literal, $convert:ident, $matters:expr, $pod_id:expr;)*) => {$(
        impl Kind for $kind {
            type Raw = $raw;
            const KIND: &'static str = stringify!($kind);
            const API_VERSION: &'static str = $api;
            const PATH: &'static str = $path;
            const NAMESPACED: bool = $namespaced;

            fn convert(raw: $raw, object: &ObjectName) -> Result<Option<Self>, ManifestError> {
                $convert(raw, object)
            }

            fn matters(&self) -> bool {
                let matters: fn(&Self) -> bool = $matters;
                matters(self)
            }

            fn pod_id(&self) -> Option<PodId> {
                let pod_id: fn(&Self) -> Option<PodId> = $pod_id;
                pod_id(self)
            }

            fn among(objects: &mut Objects) -> &mut Arc<BTreeMap<ObjectKey, Arc<Self>>> {
                &mut objects.$field
            }
        }
    )*};
}
kinds! {
    Service, RawService, "v1", "/api/v1/services", services, true, service, |_| true, |_| None;
    EndpointSlice, RawEndpointSlice, "discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/endpointslices", slices, true, slice, |_| true, |_| None;
    Pod, RawPod, "v1", "/api/v1/pods", pods, true, pod, Pod::matters, |pod| pod.uid.as_deref().map(PodId::of);
    Node, RawNode, "v1", "/api/v1/nodes", nodes, false, node, |_| true, |_| None;
    ServiceManifest, RawServiceManifest, "culvert.dev/v1alpha1", "/apis/culvert.dev/v1alpha1/servicemanifests", manifests, true, service_manifest, |_| true, |_| None;
    Secret, RawSecret, "v1", "/api/v1/secrets", secrets, true, secret, |_| true, |_| None;
}

impl Kind for VirtualIps {
    type Raw = RawService;
    const KIND: &'static str = Service::KIND;
    const NAME: &'static str = "VirtualIP";
    const API_VERSION: &'static str = Service::API_VERSION;
    const PATH: &'static str = Service::PATH;
    const NAMESPACED: bool = true;

    fn matters(&self) -> bool {
        !self.0.is_empty()
    }

    /// What is wrong with a Service is said of those that are selected.
    fn convert(raw: RawService, object: &ObjectName) -> Result<Option<Self>, ManifestError> {
        let Ok(Some(service)) = service(raw, object) else { return Ok(None) };
        Ok(Some(Self(service.addresses().collect())))
    }

    fn among(objects: &mut Objects) -> &mut Arc<BTreeMap<ObjectKey, Arc<Self>>> {
        &mut objects.virtual_ips
    }
}

/// Everything is checked where it is read.
fn service_manifest(raw: RawServiceManifest, _: &ObjectName) -> Result<Option<ServiceManifest>, ManifestError> {
    let created = seconds(raw.metadata.creation_timestamp);
    Ok(Some(ServiceManifest { created, ..raw.spec }))
}

/// A time as Kubernetes writes it, in seconds since the epoch.
fn seconds(timestamp: Option<String>) -> Option<i64> {
    timestamp.and_then(|text| text.parse::<jiff::Timestamp>().ok()).map(jiff::Timestamp::as_second)
}

/// Only of those that are marked. No part is quoted in errors.
fn secret(raw: RawSecret, object: &ObjectName) -> Result<Option<Secret>, ManifestError> {
    let RawSecret { metadata, data, string_data } = raw;
    let labels = metadata.labels.unwrap_or_default();
    if labels.get(secrets::LABEL).is_none_or(|value| value != "true") {
        return Ok(None);
    }
    let mut parts = BTreeMap::new();
    for (name, text) in data.unwrap_or_default() {
        let bytes = BASE64_STANDARD.decode(text).map_err(|_| object.error(format!("data.{name}"), "is not base64"))?;
        parts.insert(name, bytes);
    }
    parts.extend(string_data.unwrap_or_default().into_iter().map(|(name, text)| (name, text.into_bytes())));
    Secret::new(parts).map(Some).map_err(|error| object.error("data", error))
}

/// Reads one object. `None` in the place of the object: it is not for us.
///
/// # Errors
/// [`ManifestError::Field`] with the object and the first field that is used and wrong.
pub fn read<'de, K: Kind, D: Deserializer<'de>>(
    document: D,
    name: impl FnOnce() -> ObjectName,
) -> Result<(ObjectKey, Option<K>), ManifestError> {
    let raw: K::Raw = serde_path_to_error::deserialize(document)
        .map_err(|error| name().error(error.path().to_string(), in_words(&error.inner().to_string())))?;
    let metadata = raw.metadata();
    let namespace = match metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        _ if !K::NAMESPACED => "",
        Some(namespace) => namespace,
        None => "default",
    };
    let key = ObjectKey::new(namespace, metadata.name.clone());
    let object = ObjectName::new(K::KIND, &key.namespace, &key.name);
    for (field, label) in [("metadata.name", &key.name), ("metadata.namespace", &key.namespace)] {
        if !K::NAMESPACED && field == "metadata.namespace" {
            continue;
        }
        // Pods may have dots in their names, services may not: what becomes part of a host name is checked there.
        if label.is_empty() || label.len() > 253 || !label.bytes().all(is_name_byte) {
            return Err(object.error(field, format!("`{label}` is not a Kubernetes name (a-z, 0-9, `-` and `.`)")));
        }
    }
    Ok((key, K::convert(raw, &object)?))
}

/// Reads one object from JSON.
///
/// # Errors
/// As [`read`].
pub fn read_json<K: Kind>(text: &str) -> Result<(ObjectKey, Option<K>), ManifestError> {
    read(&mut serde_json::Deserializer::from_str(text), || match key_of(text) {
        Some(key) => ObjectName::new(K::KIND, &key.namespace, &key.name),
        None => ObjectName::new(K::KIND, "default", ""),
    })
}

/// The namespace and name of an object that may be wrong in every other respect.
pub fn key_of(text: &str) -> Option<ObjectKey> {
    #[derive(Deserialize)]
    struct Named {
        metadata: Metadata,
    }
    #[derive(Deserialize)]
    struct Metadata {
        name: String,
        #[serde(default)]
        namespace: String,
    }
    let Named { metadata } = serde_json::from_str(text).ok()?;
    Some(ObjectKey::new(metadata.namespace, metadata.name))
}

/// An object that an API server tells of as deleted.
#[derive(Debug)]
pub struct Deleted {
    /// Its unique id.
    pub uid: String,
    /// Whether it says itself that it was to be deleted.
    pub was_leaving: bool,
}

impl Deleted {
    /// The object, however wrong it may be in other respects; `None` where it has no id.
    pub fn read(text: &str) -> Option<Self> {
        #[derive(Deserialize)]
        struct Object {
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Metadata {
            uid: String,
            deletion_timestamp: Option<serde::de::IgnoredAny>,
        }
        let Object { metadata } = serde_json::from_str(text).ok()?;
        let was_leaving = metadata.deletion_timestamp.is_some();
        Some(Self { uid: metadata.uid, was_leaving }).filter(|deleted| !deleted.uid.is_empty())
    }
}

/// What the library says of numbers of Rust, for people.
fn in_words(reason: &str) -> String {
    match reason.split_once(", expected a nonzero ") {
        Some((found, "u16")) => format!("{found}, expected a number above 0 and at most {}", u16::MAX),
        Some((found, "u32")) => format!("{found}, expected a number above 0 and at most {}", u32::MAX),
        Some((found, _)) => format!("{found}, expected a number above 0"),
        None => reason.to_owned(),
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
}

/// Kind, namespace and name of the object at hand, for errors.
pub struct ObjectName(pub(super) String);

impl ObjectName {
    /// The name of an object as people write it.
    pub fn new(kind: &str, namespace: &str, name: &str) -> Self {
        let name = if name.is_empty() { "(no name)" } else { name };
        Self(if namespace.is_empty() { format!("{kind} {name}") } else { format!("{kind} {namespace}/{name}") })
    }

    fn error(&self, field: impl Into<String>, reason: impl Into<String>) -> ManifestError {
        ManifestError::Field { object: self.0.clone(), field: field.into(), reason: one_line(&reason.into()) }
    }

    fn address(&self, field: impl Into<String>, text: &str) -> Result<IpAddr, ManifestError> {
        text.parse().map_err(|_| self.error(field, format!("`{text}` is not an IPv4 or IPv6 address")))
    }

    fn port(&self, field: impl Into<String>, number: i64) -> Result<u16, ManifestError> {
        match u16::try_from(number) {
            Ok(port) if port > 0 => Ok(port),
            _ => Err(self.error(field, format!("port {number} is out of range, 1 to 65535 are valid"))),
        }
    }

    fn transport(&self, field: impl Into<String>, protocol: Option<&str>) -> Result<Transport, ManifestError> {
        match protocol.unwrap_or("TCP") {
            "TCP" => Ok(Transport::Tcp),
            "UDP" | "SCTP" => Ok(Transport::Other),
            other => Err(self.error(field, format!("`{other}` is not TCP, UDP or SCTP"))),
        }
    }

    /// `culvert.dev/weight`, in hundredths.
    fn weight(&self, annotations: Option<&Annotations>) -> Result<Option<u16>, ManifestError> {
        let Some(text) = annotations.and_then(|annotations| annotations.weight.as_deref()) else { return Ok(None) };
        match text.parse() {
            Ok(weight) if weight <= MAX_WEIGHT => Ok(Some(weight)),
            _ => Err(self.error(
                "metadata.annotations.culvert.dev/weight",
                format!("`{text}` is not a whole number from 0 to {MAX_WEIGHT}; 100 is an ordinary endpoint"),
            )),
        }
    }

    /// `culvert.dev/merge`.
    fn merge(&self, annotations: Option<&Annotations>) -> Result<Option<bool>, ManifestError> {
        match annotations.and_then(|annotations| annotations.merge.as_deref()) {
            None => Ok(None),
            Some("true") => Ok(Some(true)),
            Some("false") => Ok(Some(false)),
            Some(other) => Err(self.error(
                "metadata.annotations.culvert.dev/merge",
                format!("`{other}` is neither \"true\" nor \"false\""),
            )),
        }
    }

    /// `spec.externalName`, which becomes the address of a cluster.
    fn external_name(&self, name: Option<String>) -> Result<String, ManifestError> {
        let name = name.unwrap_or_default();
        let host = name.trim_end_matches('.');
        let byte = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b':');
        if host.is_empty() || host.len() > 253 || !host.bytes().all(byte) {
            return Err(self.error("spec.externalName", format!("`{name}` is not the name of a host")));
        }
        Ok(host.to_owned())
    }
}

fn service(raw: RawService, object: &ObjectName) -> Result<Option<Service>, ManifestError> {
    let RawService { metadata, spec } = raw;
    if metadata.name.contains('.') || metadata.namespace.as_deref().is_some_and(|namespace| namespace.contains('.')) {
        return Err(object.error("metadata.name", "the name and namespace of a Service cannot contain `.`"));
    }
    // Of each cluster it is another: clients have credentials for their own API server.
    let is_api_server =
        metadata.name == "kubernetes" && matches!(metadata.namespace.as_deref(), None | Some("" | "default"));
    let merge = object.merge(metadata.annotations.as_ref())?;
    // Agents of nodes, which answer for their own.
    let is_of_node = spec.internal_traffic_policy.as_deref() == Some("Local") && merge != Some(true);
    let external_name = match spec.kind.as_deref() {
        Some("ExternalName") => Some(object.external_name(spec.external_name)?),
        _ => None,
    };
    // clusterIP is the older form of clusterIPs[0].
    let addresses: Vec<(String, &str)> = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(list), _) => list.iter().enumerate().map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), &**ip)).collect(),
        (None, Some(ip)) => vec![("spec.clusterIP".to_owned(), &**ip)],
        (None, None) => Vec::new(),
    };
    let cluster_ips: Vec<IpAddr> = addresses
        .into_iter()
        .filter(|(_, text)| !text.is_empty() && *text != "None")
        .map(|(field, text)| object.address(field, text))
        .collect::<Result<_, _>>()?;
    // A headless service has families, but no address that would tell them.
    let prefers_ipv6 = match (cluster_ips.first(), spec.ip_families.as_deref()) {
        (Some(first), _) => first.is_ipv6(),
        (None, Some([first, ..])) => first == "IPv6",
        (None, _) => false,
    };
    let mut ports = Vec::new();
    for (i, RawServicePort { name, port, target_port, protocol, app_protocol }) in
        spec.ports.unwrap_or_default().into_iter().enumerate()
    {
        let number = object.port(format!("spec.ports[{i}].port"), port)?;
        let transport = object.transport(format!("spec.ports[{i}].protocol"), protocol.as_deref())?;
        let target_port = match target_port {
            None => TargetPort::Number(number),
            Some(RawTargetPort::Number(target)) => {
                TargetPort::Number(object.port(format!("spec.ports[{i}].targetPort"), target)?)
            }
            Some(RawTargetPort::Name(name)) => TargetPort::Name(name),
        };
        if transport == Transport::Tcp {
            ports.push(ServicePort { name: name.unwrap_or_default(), port: number, target_port, app_protocol });
        }
    }
    Ok(Some(Service {
        cluster_ips,
        prefers_ipv6,
        ports,
        selector: spec.selector.unwrap_or_default(),
        external_name,
        publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
        weight: object.weight(metadata.annotations.as_ref())?,
        merge,
        stays_out: is_api_server || is_of_node,
    }))
}

fn slice(raw: RawEndpointSlice, object: &ObjectName) -> Result<Option<EndpointSlice>, ManifestError> {
    let RawEndpointSlice { metadata, address_type, endpoints, ports } = raw;
    match address_type.as_str() {
        "IPv4" | "IPv6" => {}
        "FQDN" => {
            debug!(object = object.0, "passed over an EndpointSlice of names");
            return Ok(None);
        }
        other => return Err(object.error("addressType", format!("`{other}` is not IPv4, IPv6 or FQDN"))),
    }
    let mut slice_ports = Vec::new();
    for (i, RawSlicePort { name, port, protocol }) in ports.unwrap_or_default().into_iter().enumerate() {
        let port = port.map(|port| object.port(format!("ports[{i}].port"), port)).transpose()?;
        if object.transport(format!("ports[{i}].protocol"), protocol.as_deref())? == Transport::Tcp {
            slice_ports.push(SlicePort { name: name.unwrap_or_default(), port });
        }
    }
    let mut slice_endpoints = Vec::new();
    for (i, RawEndpoint { addresses, conditions, zone, node_name, target_ref }) in
        endpoints.unwrap_or_default().into_iter().enumerate()
    {
        let first = addresses.first().ok_or_else(|| object.error(format!("endpoints[{i}].addresses"), "is empty"))?;
        let address = object.address(format!("endpoints[{i}].addresses[0]"), first)?;
        if address.is_ipv4() != (address_type == "IPv4") {
            let reason = format!("`{address}` is not of the slice's addressType {address_type}");
            return Err(object.error(format!("endpoints[{i}].addresses[0]"), reason));
        }
        let RawConditions { ready, serving, terminating } = conditions.unwrap_or_default();
        let ready = ready.unwrap_or(true);
        let target = target_ref.unwrap_or_default();
        let pod = target.name.filter(|_| target.kind.as_deref() == Some("Pod")).map(|name| ObjectKey {
            namespace: target.namespace.or_else(|| metadata.namespace.clone()).unwrap_or_else(|| "default".to_owned()),
            name,
        });
        slice_endpoints.push(SliceEndpoint {
            address,
            ready,
            serving: serving.unwrap_or(ready),
            terminating: terminating.unwrap_or(false),
            zone: zone.filter(|zone| !zone.is_empty()),
            node: node_name.filter(|node| !node.is_empty()),
            pod,
            target_uid: target.uid.filter(|uid| !uid.is_empty()),
        });
    }
    let service = metadata.labels.and_then(|mut labels| labels.remove(LABEL_SERVICE_NAME));
    Ok(Some(EndpointSlice { service, ports: slice_ports, endpoints: slice_endpoints }))
}

fn pod(raw: RawPod, object: &ObjectName) -> Result<Option<Pod>, ManifestError> {
    let RawPod { metadata, spec, status } = raw;
    let status = status.unwrap_or_default();
    let mut texts: Vec<(String, String)> = status
        .pod_ips
        .iter()
        .flatten()
        .enumerate()
        .map(|(i, RawPodIp { ip })| (format!("status.podIPs[{i}].ip"), ip.clone()))
        .collect();
    if texts.is_empty() {
        texts.extend(status.pod_ip.iter().map(|ip| ("status.podIP".to_owned(), ip.clone())));
    }
    let addresses = texts
        .into_iter()
        .filter(|(_, text)| !text.is_empty())
        .map(|(field, text)| object.address(field, &text))
        .collect::<Result<_, _>>()?;
    let mut ports = BTreeMap::new();
    let RawPodSpec { containers, init_containers } = spec.unwrap_or_default();
    // Sidecars are among those that come first, and go on. Kubernetes looks for a port's name among the others before.
    let goes_on = |(_, container): &(usize, RawContainer)| container.restart_policy.as_deref() == Some("Always");
    let sidecars = init_containers.into_iter().flatten().enumerate().filter(goes_on);
    let containers = containers.into_iter().flatten().enumerate().map(|it| ("containers", it));
    for (list, (c, container)) in containers.chain(sidecars.map(|it| ("initContainers", it))) {
        for (p, port) in container.ports.unwrap_or_default().into_iter().enumerate() {
            let field = |name| format!("spec.{list}[{c}].ports[{p}].{name}");
            let number = object.port(field("containerPort"), port.container_port)?;
            let transport = object.transport(field("protocol"), port.protocol.as_deref())?;
            if let (Some(name), Transport::Tcp) = (port.name, transport) {
                ports.entry(name).or_insert(number);
            }
        }
    }
    let condition = |kind: &str, wanted: &str| {
        status.conditions.iter().flatten().any(|condition| condition.kind == kind && condition.status == wanted)
    };
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let leaving = metadata.deletion_timestamp.is_some() || condition("DisruptionTarget", "True");
    let ready = !(condition("Ready", "False") || ended || metadata.deletion_timestamp.is_some());
    let weight = object.weight(metadata.annotations.as_ref())?;
    let annotated_revision = metadata.annotations.and_then(|annotations| annotations.revision);
    let labels = metadata.labels.unwrap_or_default();
    let uid = metadata.uid.filter(|uid| !uid.is_empty());
    // For people only: what is no time is left out.
    let created = seconds(metadata.creation_timestamp);
    let mut pod = Pod { uid, labels, annotated_revision, addresses, ports, ready, leaving, ended, weight, created };
    if !pod.is_offloaded() {
        // Only of offloaded pods it matters which service they belong to.
        pod.labels.clear();
        pod.annotated_revision = None;
        pod.ports.clear();
        pod.created = None;
    }
    Ok(Some(pod))
}

fn node(raw: RawNode, _: &ObjectName) -> Result<Option<Node>, ManifestError> {
    let mut labels = raw.metadata.labels.unwrap_or_default();
    let mut label = |name| labels.remove(name).unwrap_or_default();
    Ok(Some(Node { region: label("topology.kubernetes.io/region"), zone: label("topology.kubernetes.io/zone") }))
}

/// The first line of a message, so that one fault is one line of log.
pub fn one_line(message: &str) -> String {
    message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}
