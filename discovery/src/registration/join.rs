//! Registered hosts as services of the mesh.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde_json::Value;

use super::host::Host;
use super::{Settings, WEIGHT_TAG};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Endpoint, Health, Locality, MeshPort, MeshService, Protocol};

/// What registered endpoints have as their cluster.
pub const CLUSTER: &str = "registered";
/// The longest name that can be a part of a host name.
const MAX_LABEL: usize = 63;

/// Registered hosts as endpoints, by service.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Registered {
    services: BTreeMap<ObjectKey, Vec<Endpoint>>,
    port: u16,
    protocol: Option<Protocol>,
    warnings: Vec<String>,
}

impl Registered {
    /// The endpoints that these hosts are.
    #[must_use]
    pub fn new(hosts: &[Arc<Host>], settings: &Settings) -> Self {
        let (port, protocol) = (settings.port, Some(settings.protocol));
        let mut registered = Self { port, protocol, ..Self::default() };
        let mut by_service: BTreeMap<&str, Vec<Endpoint>> = BTreeMap::new();
        for host in hosts {
            by_service.entry(&host.service).or_default().push(endpoint(host));
        }
        for (name, endpoints) in by_service {
            if is_host_label(name) {
                registered.services.insert(ObjectKey::new(&*settings.namespace, name), endpoints);
            } else {
                registered.warnings.push(format!(
                    "registered service {name:?} is not in the mesh: its name cannot be a part of a host name (a-z, 0-9, `-` \
                     and `_`, at most {MAX_LABEL})"
                ));
            }
        }
        registered
    }

    /// What cannot be in the mesh.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The services that are not the same in both.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = ObjectKey> + 'a {
        let all = self.services.keys().chain(other.services.keys());
        all.filter(|key| self.services.get(key) != other.services.get(key)).cloned()
    }

    /// Adds a service's hosts to what the clusters have of it. Where a cluster has the same port, they are further endpoints
    /// of it.
    pub fn join(&self, key: &ObjectKey, service: &mut MeshService, warnings: &mut Vec<String>) {
        let (Some(endpoints), Some(protocol)) = (self.services.get(key), self.protocol) else { return };
        service.clusters.push(CLUSTER.to_owned());
        match service.ports.entry(self.port) {
            Entry::Vacant(entry) => {
                let endpoints = endpoints.clone();
                let (offloaded, targets) = Default::default();
                entry.insert(MeshPort { protocol, vips: Vec::new(), external: None, endpoints, offloaded, targets });
            }
            Entry::Occupied(entry) => {
                let joined = entry.into_mut();
                if joined.protocol != protocol {
                    warnings.push(format!(
                        "port {} of Service {key} is {} in a cluster, which counts; registered hosts speak {protocol}",
                        self.port, joined.protocol,
                    ));
                }
                let mut known: HashSet<_> = joined.endpoints.iter().map(|endpoint| endpoint.address).collect();
                joined.endpoints.extend(endpoints.iter().filter(|endpoint| known.insert(endpoint.address)).cloned());
            }
        }
    }
}

fn endpoint(host: &Host) -> Endpoint {
    let weight = host.tags.get(WEIGHT_TAG).and_then(Value::as_u64).and_then(|weight| u32::try_from(weight).ok());
    Endpoint {
        address: SocketAddr::new(host.ip_address.into(), host.port),
        other_family: None,
        locality: Locality { region: host.tag("region").to_owned(), zone: host.tag("az").to_owned() },
        health: Health::Healthy,
        cluster: CLUSTER.to_owned(),
        weight: weight.and_then(NonZeroU32::new),
        canary: host.tags.get("canary") == Some(&Value::Bool(true)),
    }
}

/// Whether a name can be one part of a host name. `_` is none in DNS, but names in Host headers have it.
fn is_host_label(name: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_');
    !name.is_empty() && name.len() <= MAX_LABEL && name.bytes().all(known)
}
