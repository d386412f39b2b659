//! Culvert's own resource type: the endpoints that only overrides reach, and what their services allow.

use culvert_xds_client::api::culvert::overrides::v1::{OffloadedEndpoint, OffloadedService};

use crate::mesh::{Mesh, cluster_name};
use crate::policy::OverridePolicy;

pub(super) fn offloaded_services(mesh: &Mesh) -> Vec<(String, OffloadedService)> {
    let mut resources = Vec::new();
    for (key, service) in &mesh.services {
        let policy = service.manifest.as_ref().and_then(|manifest| manifest.overrides.as_ref());
        for (port, described) in &service.ports {
            // What a policy says holds without offloaded endpoints too: of faults, for one.
            if described.offloaded.is_empty() && (policy.is_none() || !described.protocol.is_http()) {
                continue;
            }
            let name = cluster_name(key, *port);
            let endpoints = described.offloaded.iter().map(|endpoint| OffloadedEndpoint {
                revision: endpoint.revision.clone(),
                address: endpoint.address.ip().to_string(),
                port: endpoint.address.port().into(),
                pod: endpoint.pod.to_string(),
            });
            let resource = OffloadedService {
                cluster_name: name.clone(),
                service: format!("{}.{}", key.name, key.namespace),
                endpoints: endpoints.collect(),
                policy: policy.map(OverridePolicy::message),
            };
            resources.push((name, resource));
        }
    }
    resources
}
