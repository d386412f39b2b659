//! What manifests change of the mesh.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::ServiceManifest;
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, Protocol, mesh_key};
use crate::registry::Registry;

/// Gives the services of a mesh their manifests. Of the manifests that clusters have for a service, the first one counts.
pub fn apply(mesh: &mut Mesh, registry: &Registry) {
    let mut manifests: BTreeMap<ObjectKey, (&Arc<ServiceManifest>, &str)> = BTreeMap::new();
    for (cluster, objects) in registry.clusters.iter().filter_map(|c| Some((c, c.objects.as_ref()?))) {
        for (key, manifest) in &objects.manifests {
            // Of a service that is kept apart only its own cluster can say something.
            let service = objects.services.get(key);
            let key = service.map_or_else(|| key.clone(), |service| mesh_key(key, service, &cluster.info));
            let warning =
                format!("ServiceManifest {key} is another one in cluster {} than in cluster", cluster.info.name);
            let (first, owner) = *manifests.entry(key).or_insert((manifest, &cluster.info.name));
            if first != manifest {
                mesh.warnings.push(format!("{warning} {owner}, which counts"));
            }
        }
    }
    for (key, (manifest, _)) in manifests {
        let Some(service) = mesh.services.get_mut(&key) else {
            mesh.warnings.push(format!("ServiceManifest {key} is of no service: there is none of this name"));
            continue;
        };
        for (number, port) in &mut service.ports {
            port.protocol = manifest.protocol.unwrap_or(port.protocol);
            let idle = for_http_only(manifest);
            if port.protocol == Protocol::Tcp && !idle.is_empty() {
                mesh.warnings.push(format!(
                    "ServiceManifest {key}: {} cannot hold for port {number}, which speaks tcp",
                    idle.join(" and ")
                ));
            }
        }
        service.manifest = Some(Arc::clone(manifest));
    }
}

/// What a manifest states that means nothing for connections of which no requests are known.
fn for_http_only(manifest: &ServiceManifest) -> Vec<&'static str> {
    let path = manifest.health_check.as_ref().and_then(|check| check.path.as_ref());
    let stated = [
        ("spec.timeouts.request", manifest.timeouts.request.is_some()),
        ("spec.retries", manifest.retries.is_some()),
        ("spec.rateLimit", manifest.rate_limit.is_some()),
        ("spec.healthCheck.path", path.is_some()),
    ];
    stated.into_iter().filter(|(_, stated)| *stated).map(|(field, _)| field).collect()
}

/// The services that may be called by pods of these services, themselves among them. `None`: all, since one of them states
/// nothing, or is not known.
#[must_use]
pub fn egress_of(mesh: &Mesh, callers: &BTreeSet<ObjectKey>) -> Option<BTreeSet<ObjectKey>> {
    if callers.is_empty() {
        return None;
    }
    let mut allowed = callers.clone();
    for caller in callers {
        let egress = mesh.services.get(caller)?.manifest.as_ref()?.egress.as_ref()?;
        allowed.extend(egress.0.iter().map(|name| name.seen_from(&caller.namespace)));
    }
    Some(allowed)
}
