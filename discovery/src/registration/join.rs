//! Registered hosts as services of the mesh.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde_json::Value;

use super::host::Host;
use super::{Settings, WEIGHT_TAG};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Endpoint, Health, Locality, Mesh, MeshPort};

/// What registered endpoints have as their cluster.
pub const CLUSTER: &str = "registered";
/// The longest name that can be a part of a host name.
const MAX_LABEL: usize = 63;

/// Adds registered hosts, ordered by service, to what the clusters have. Where a cluster has the same service and port,
/// the hosts are further endpoints of it.
pub fn add(mesh: &mut Mesh, hosts: &[Arc<Host>], settings: &Settings) {
    let mut by_service: BTreeMap<&str, Vec<Endpoint>> = BTreeMap::new();
    for host in hosts {
        by_service.entry(&host.service).or_default().push(endpoint(host));
    }
    for (name, endpoints) in by_service {
        if !is_host_label(name) {
            mesh.warnings.push(format!(
                "registered service {name:?} is not in the mesh: its name cannot be a part of a host name (a-z, 0-9, `-` and \
                 `_`, at most {MAX_LABEL})"
            ));
            continue;
        }
        let key = ObjectKey::new(&*settings.namespace, name);
        let service = mesh.services.entry(key.clone()).or_default();
        service.clusters.push(CLUSTER.to_owned());
        match service.ports.entry(settings.port) {
            Entry::Vacant(entry) => {
                let protocol = settings.protocol;
                entry.insert(MeshPort { protocol, vips: Vec::new(), external: None, endpoints, offloaded: Vec::new() });
            }
            Entry::Occupied(entry) => {
                let joined = entry.into_mut();
                if joined.protocol != settings.protocol {
                    mesh.warnings.push(format!(
                        "port {} of Service {key} is {} in a cluster, which counts; registered hosts speak {}",
                        settings.port, joined.protocol, settings.protocol,
                    ));
                }
                for endpoint in endpoints {
                    if !joined.endpoints.iter().any(|known| known.address == endpoint.address) {
                        joined.endpoints.push(endpoint);
                    }
                }
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
