//! Culvert's own resource type: the endpoints that only overrides reach.

use culvert_xds_client::api::culvert::overrides::v1::{OffloadedEndpoint, OffloadedService};

use crate::mesh::{Mesh, cluster_name};

pub(super) fn offloaded_services(mesh: &Mesh) -> Vec<(String, OffloadedService)> {
    let mut resources = Vec::new();
    for (key, service) in &mesh.services {
        for (port, described) in service.ports.iter().filter(|(_, described)| !described.offloaded.is_empty()) {
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
            };
            resources.push((name, resource));
        }
    }
    resources
}
