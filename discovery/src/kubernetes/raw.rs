//! The objects as they are written, reduced to what is needed.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::policy::ServiceManifest;

pub trait HasMetadata {
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
has_metadata!(RawService, RawEndpointSlice, RawPod, RawNode, RawServiceManifest, RawSecret);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawMetadata {
    pub name: String,
    pub namespace: Option<String>,
    pub uid: Option<String>,
    pub labels: Option<BTreeMap<String, String>>,
    pub annotations: Option<Annotations>,
    pub deletion_timestamp: Option<String>,
    pub creation_timestamp: Option<String>,
}

#[derive(Deserialize)]
pub struct RawServiceManifest {
    pub metadata: RawMetadata,
    pub spec: ServiceManifest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawSecret {
    pub metadata: RawMetadata,
    /// Base64.
    pub data: Option<BTreeMap<String, String>>,
    /// As it is: in manifests that people write.
    pub string_data: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
pub struct RawService {
    pub metadata: RawMetadata,
    pub spec: RawServiceSpec,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawServiceSpec {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    pub ip_families: Option<Vec<String>>,
    pub external_name: Option<String>,
    pub publish_not_ready_addresses: Option<bool>,
    pub internal_traffic_policy: Option<String>,
    pub ports: Option<Vec<RawServicePort>>,
    pub selector: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawServicePort {
    pub name: Option<String>,
    pub port: i64,
    pub target_port: Option<RawTargetPort>,
    pub protocol: Option<String>,
    pub app_protocol: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a port number or the name of a container's port is needed")]
pub enum RawTargetPort {
    Number(i64),
    Name(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawEndpointSlice {
    pub metadata: RawMetadata,
    pub address_type: String,
    pub endpoints: Option<Vec<RawEndpoint>>,
    pub ports: Option<Vec<RawSlicePort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawEndpoint {
    pub addresses: Vec<String>,
    pub conditions: Option<RawConditions>,
    pub zone: Option<String>,
    pub node_name: Option<String>,
    pub target_ref: Option<RawTargetRef>,
}

#[derive(Deserialize, Default)]
pub struct RawConditions {
    pub ready: Option<bool>,
    pub serving: Option<bool>,
    pub terminating: Option<bool>,
}

#[derive(Deserialize, Default)]
pub struct RawTargetRef {
    pub kind: Option<String>,
    pub namespace: Option<String>,
    pub name: Option<String>,
    pub uid: Option<String>,
}

#[derive(Deserialize)]
pub struct RawSlicePort {
    pub name: Option<String>,
    pub port: Option<i64>,
    pub protocol: Option<String>,
}

#[derive(Deserialize)]
pub struct RawPod {
    pub metadata: RawMetadata,
    pub spec: Option<RawPodSpec>,
    pub status: Option<RawPodStatus>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct RawPodSpec {
    pub containers: Option<Vec<RawContainer>>,
    pub init_containers: Option<Vec<RawContainer>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawContainer {
    pub restart_policy: Option<String>,
    pub ports: Option<Vec<RawContainerPort>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RawContainerPort {
    pub name: Option<String>,
    pub container_port: i64,
    pub protocol: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct RawPodStatus {
    pub phase: Option<String>,
    #[serde(rename = "podIP")]
    pub pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<RawPodIp>>,
    pub conditions: Option<Vec<RawPodCondition>>,
}

#[derive(Deserialize)]
pub struct RawPodIp {
    pub ip: String,
}

#[derive(Deserialize)]
pub struct RawPodCondition {
    #[serde(rename = "type")]
    pub kind: String,
    pub status: String,
}

#[derive(Deserialize)]
pub struct RawNode {
    pub metadata: RawMetadata,
}

/// The annotations that are read; the others can be large, and are not kept even for a moment.
#[derive(Deserialize)]
pub struct Annotations {
    #[serde(rename = "culvert.dev/weight")]
    pub weight: Option<String>,
    #[serde(rename = "culvert.dev/merge")]
    pub merge: Option<String>,
    #[serde(rename = "culvert.dev/revision")]
    pub revision: Option<String>,
}
