//! Culvert's own resource types: the endpoints that only overrides reach, with what their services allow; and stored sets of
//! overrides.

use culvert_xds_client::api::culvert::overrides::v1::{OffloadedEndpoint, OffloadedService, OverrideShare};

use crate::mesh::{Mesh, cluster_name};
use crate::overrides::tunnels::CLUSTER_OF_TUNNELS;
use crate::policy::OverridePolicy;

pub(super) fn offloaded_services(mesh: &Mesh) -> Vec<(String, OffloadedService)> {
    let mut resources = Vec::new();
    for (key, service) in &mesh.services {
        let policy = service.manifest.as_ref().and_then(|manifest| manifest.overrides.as_ref());
        for (port, described) in &service.ports {
            // Overrides are of requests. What a policy says holds without offloaded endpoints too: of faults, for one.
            if !described.protocol.is_http() || (described.offloaded.is_empty() && policy.is_none()) {
                continue;
            }
            let name = cluster_name(key, *port);
            let endpoints = described.offloaded.iter().map(|endpoint| OffloadedEndpoint {
                revision: endpoint.revision.clone(),
                address: endpoint.address.ip().to_string(),
                port: endpoint.address.port().into(),
                pod: endpoint.pod.to_string(),
                tunnel: endpoint.cluster == CLUSTER_OF_TUNNELS,
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

/// Those that have ended too: so that their tokens are known to be such.
pub(super) fn shares(mesh: &Mesh) -> Vec<(String, OverrideShare)> {
    let resource = |share: &crate::overrides::shares::Share| {
        let resource = OverrideShare {
            token: share.token.clone(),
            name: share.name.clone(),
            expires: share.expires,
            overrides: Some(share.overrides()?),
        };
        Some((share.token.clone(), resource))
    };
    mesh.shares.iter().filter_map(|share| resource(share)).collect()
}
