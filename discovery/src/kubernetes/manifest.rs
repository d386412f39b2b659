//! Reads Kubernetes manifests: YAML or JSON text -> checked [`Objects`].
//!
//! Fields that discovery does not need are passed over, as are objects of other kinds. A field that it does need and
//! that is wrong is an error with the object's and the field's name, and fails the whole file.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tracing::debug;

use super::{
    EndpointSlice, LABEL_SERVICE_NAME, ObjectKey, Objects, Pod, Service, ServicePort, SliceEndpoint, SlicePort,
    TargetPort, Transport,
};

/// The largest manifest file that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 32 * 1024 * 1024;

/// Why a manifest cannot be used. Its text is one line; the file is named by whoever reads files.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The text is not YAML.
    #[error("not valid YAML: {0}")]
    Yaml(String),
    /// A document is not a Kubernetes object.
    #[error("document {document}: {reason}")]
    NotAnObject {
        /// Position in the file, from 1.
        document: usize,
        /// What is missing.
        reason: &'static str,
    },
    /// A field of an object is wrong.
    #[error("{object}: {field}: {reason}")]
    Field {
        /// Kind, namespace and name.
        object: String,
        /// Path of the field in the object.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The same object is in the file twice.
    #[error("{0} is defined twice in this file; remove one of them")]
    Duplicate(String),
}

/// Reads all documents of one file.
///
/// # Errors
/// [`ManifestError`] for the first thing that is wrong.
pub fn parse(text: &str) -> Result<Objects, ManifestError> {
    let options = serde_saphyr::options! {
        with_snippet: false,
        // A pod may be called `y` or `no`: only `true` and `false` are booleans.
        strict_booleans: true,
        // The defaults are for configuration files; `kubectl get -o yaml` of a big cluster is larger, but has no
        // aliases: what they expand to is kept small.
        budget: serde_saphyr::budget! { max_documents: 100_000, max_nodes: 8_000_000, max_events: 20_000_000 },
        alias_limits: serde_saphyr::alias_limits! { max_total_replayed_events: 100_000 },
    };
    let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options)
        // The library also tells programmers which of its options to set.
        .map_err(|error| {
            ManifestError::Yaml(
                one_line(&error.to_string()).replace(", set DuplicateKeyPolicy in Options if acceptable", ""),
            )
        })?;
    let mut objects = Objects::default();
    for (index, document) in documents.into_iter().enumerate() {
        if !document.is_null() {
            add_document(document, index + 1, &mut objects)?;
        }
    }
    Ok(objects)
}

fn add_document(document: Value, position: usize, objects: &mut Objects) -> Result<(), ManifestError> {
    let not_an_object = |reason| ManifestError::NotAnObject { document: position, reason };
    let text = |key: &str| document.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion").to_owned(), text("kind").to_owned());
    if !document.is_object() {
        return Err(not_an_object("not a Kubernetes object: a mapping with apiVersion and kind is needed"));
    }
    if api_version.is_empty() {
        return Err(not_an_object("apiVersion is missing"));
    }
    if kind.is_empty() {
        return Err(not_an_object("kind is missing"));
    }
    // `kubectl get -o yaml` wraps what it prints in a list.
    if let Some(Value::Array(items)) = document.get("items").filter(|_| kind.ends_with("List")) {
        for item in items.clone() {
            add_document(item, position, objects)?;
        }
        return Ok(());
    }
    match (api_version.as_str(), kind.as_str()) {
        ("v1", "Service") => add(document, &kind, raw_service, &mut objects.services),
        ("discovery.k8s.io/v1", "EndpointSlice") => add(document, &kind, raw_slice, &mut objects.slices),
        ("v1", "Pod") => add(document, &kind, raw_pod, &mut objects.pods),
        _ => {
            debug!(%api_version, %kind, "passed over an object of a kind that is not needed");
            Ok(())
        }
    }
}

/// Reads one object and adds it, unless `convert` finds that it is not for us.
fn add<Raw: DeserializeOwned + HasMetadata, T>(
    document: Value,
    kind: &str,
    convert: impl Fn(Raw, &ObjectName) -> Result<Option<T>, ManifestError>,
    into: &mut BTreeMap<ObjectKey, T>,
) -> Result<(), ManifestError> {
    let metadata = |key: &str| {
        document.pointer(&format!("/metadata/{key}")).and_then(Value::as_str).filter(|text| !text.is_empty())
    };
    let namespace = metadata("namespace").unwrap_or("default");
    let object = ObjectName(format!("{kind} {namespace}/{}", metadata("name").unwrap_or("(no name)")));
    let raw: Raw = serde_path_to_error::deserialize(document.clone())
        .map_err(|error| object.error(error.path().to_string(), error.inner().to_string()))?;
    let key = ObjectKey::new(namespace, raw.metadata().name.clone());
    for (field, label) in [("metadata.name", &key.name), ("metadata.namespace", &key.namespace)] {
        // Pods may have dots in their names, services may not: what becomes part of a host name is checked there.
        if label.is_empty() || label.len() > 253 || !label.bytes().all(is_name_byte) {
            return Err(object.error(field, format!("`{label}` is not a Kubernetes name (a-z, 0-9, `-` and `.`)")));
        }
    }
    if let Some(converted) = convert(raw, &object)?
        && into.insert(key, converted).is_some()
    {
        return Err(ManifestError::Duplicate(object.0));
    }
    Ok(())
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.')
}

/// Kind, namespace and name of the object at hand, for errors.
struct ObjectName(String);

impl ObjectName {
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
}

fn raw_service(raw: RawService, object: &ObjectName) -> Result<Option<Service>, ManifestError> {
    let RawService { metadata, spec } = raw;
    if metadata.name.contains('.') || metadata.namespace.as_deref().is_some_and(|namespace| namespace.contains('.')) {
        return Err(object.error("metadata.name", "the name and namespace of a Service cannot contain `.`"));
    }
    if spec.kind.as_deref() == Some("ExternalName") {
        debug!(object = object.0, "passed over a Service of type ExternalName");
        return Ok(None);
    }
    // clusterIP is the older form of clusterIPs[0].
    let addresses: Vec<(String, &str)> = match (&spec.cluster_ips, &spec.cluster_ip) {
        (Some(list), _) => list.iter().enumerate().map(|(i, ip)| (format!("spec.clusterIPs[{i}]"), &**ip)).collect(),
        (None, Some(ip)) => vec![("spec.clusterIP".to_owned(), &**ip)],
        (None, None) => Vec::new(),
    };
    let cluster_ips = addresses
        .into_iter()
        .filter(|(_, text)| !text.is_empty() && *text != "None")
        .map(|(field, text)| object.address(field, text))
        .collect::<Result<_, _>>()?;
    let mut ports = Vec::new();
    for (i, RawServicePort { name, port, target_port, protocol, app_protocol }) in spec.ports.into_iter().enumerate() {
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
    Ok(Some(Service { cluster_ips, ports, selector: spec.selector.unwrap_or_default() }))
}

fn raw_slice(raw: RawEndpointSlice, object: &ObjectName) -> Result<Option<EndpointSlice>, ManifestError> {
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
    for (i, RawEndpoint { addresses, conditions, zone, target_ref }) in
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
            pod,
            target_uid: target.uid.filter(|uid| !uid.is_empty()),
        });
    }
    let service = metadata.labels.and_then(|mut labels| labels.remove(LABEL_SERVICE_NAME));
    Ok(Some(EndpointSlice { service, ports: slice_ports, endpoints: slice_endpoints }))
}

fn raw_pod(raw: RawPod, object: &ObjectName) -> Result<Option<Pod>, ManifestError> {
    let RawPod { metadata, spec, status } = raw;
    let status = status.unwrap_or_default();
    let mut texts: Vec<(String, String)> = status
        .pod_ips
        .unwrap_or_default()
        .into_iter()
        .enumerate()
        .map(|(i, RawPodIp { ip })| (format!("status.podIPs[{i}].ip"), ip))
        .collect();
    if texts.is_empty() {
        texts.extend(status.pod_ip.map(|ip| ("status.podIP".to_owned(), ip)));
    }
    let addresses = texts
        .into_iter()
        .filter(|(_, text)| !text.is_empty())
        .map(|(field, text)| object.address(field, &text))
        .collect::<Result<_, _>>()?;
    let mut ports = BTreeMap::new();
    for (c, container) in spec.unwrap_or_default().containers.into_iter().enumerate() {
        for (p, port) in container.ports.unwrap_or_default().into_iter().enumerate() {
            let field = |name| format!("spec.containers[{c}].ports[{p}].{name}");
            let number = object.port(field("containerPort"), port.container_port)?;
            let transport = object.transport(field("protocol"), port.protocol.as_deref())?;
            if let (Some(name), Transport::Tcp) = (port.name, transport) {
                ports.insert(name, number);
            }
        }
    }
    let unready = status
        .conditions
        .unwrap_or_default()
        .iter()
        .any(|condition| condition.kind == "Ready" && condition.status == "False");
    let ended = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let deleting = metadata.deletion_timestamp.is_some();
    let labels = metadata.labels.unwrap_or_default();
    Ok(Some(Pod { labels, addresses, ports, ready: !(unready || ended || deleting) }))
}

/// The first line of a message, so that one fault is one line of log.
fn one_line(message: &str) -> String {
    message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned()
}

// The objects as they are written, reduced to what is needed.

trait HasMetadata {
    fn metadata(&self) -> &RawMetadata;
}

macro_rules! has_metadata {
    ($($raw:ty),*) => {$(
        impl HasMetadata for $raw {
            fn metadata(&self) -> &RawMetadata {
                &self.metadata
            }
        }
    )*};
}
has_metadata!(RawService, RawEndpointSlice, RawPod);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMetadata {
    name: String,
    namespace: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    deletion_timestamp: Option<String>,
}

#[derive(Deserialize)]
struct RawService {
    metadata: RawMetadata,
    spec: RawServiceSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServiceSpec {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(rename = "clusterIP")]
    cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    cluster_ips: Option<Vec<String>>,
    #[serde(default)]
    ports: Vec<RawServicePort>,
    selector: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServicePort {
    name: Option<String>,
    port: i64,
    target_port: Option<RawTargetPort>,
    protocol: Option<String>,
    app_protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a port number or the name of a container's port is needed")]
enum RawTargetPort {
    Number(i64),
    Name(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpointSlice {
    metadata: RawMetadata,
    address_type: String,
    endpoints: Option<Vec<RawEndpoint>>,
    ports: Option<Vec<RawSlicePort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawEndpoint {
    addresses: Vec<String>,
    conditions: Option<RawConditions>,
    zone: Option<String>,
    target_ref: Option<RawTargetRef>,
}

#[derive(Deserialize, Default)]
struct RawConditions {
    ready: Option<bool>,
    serving: Option<bool>,
    terminating: Option<bool>,
}

#[derive(Deserialize, Default)]
struct RawTargetRef {
    kind: Option<String>,
    namespace: Option<String>,
    name: Option<String>,
    uid: Option<String>,
}

#[derive(Deserialize)]
struct RawSlicePort {
    name: Option<String>,
    port: Option<i64>,
    protocol: Option<String>,
}

#[derive(Deserialize)]
struct RawPod {
    metadata: RawMetadata,
    spec: Option<RawPodSpec>,
    status: Option<RawPodStatus>,
}

#[derive(Deserialize, Default)]
struct RawPodSpec {
    #[serde(default)]
    containers: Vec<RawContainer>,
}

#[derive(Deserialize)]
struct RawContainer {
    ports: Option<Vec<RawContainerPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawContainerPort {
    name: Option<String>,
    container_port: i64,
    protocol: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct RawPodStatus {
    phase: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<RawPodIp>>,
    conditions: Option<Vec<RawPodCondition>>,
}

#[derive(Deserialize)]
struct RawPodIp {
    ip: String,
}

#[derive(Deserialize)]
struct RawPodCondition {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
