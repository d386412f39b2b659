//! What manifests change of the mesh.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{CheckedBy, ServiceManifest};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, MeshService, Protocol, mesh_key};
use crate::registry::Registry;
use crate::resources::edge::{claims, exposed};

/// What is stated about services, in all clusters.
pub struct Manifests<'a>(&'a Registry);

impl<'a> Manifests<'a> {
    /// The manifests of these clusters.
    #[must_use]
    pub fn new(registry: &'a Registry) -> Self {
        Self(registry)
    }

    /// The manifest of a service. Of those that clusters have for it, the first one counts.
    pub(crate) fn of(&self, name: &ObjectKey, warnings: &mut Vec<String>) -> Option<&'a Arc<ServiceManifest>> {
        let mut first: Option<(&Arc<ServiceManifest>, &str)> = None;
        for (cluster, objects) in self.0.clusters.iter().filter_map(|c| Some((c, c.objects.as_ref()?))) {
            let apart = name.namespace.strip_suffix(&*cluster.info.name).and_then(|rest| rest.strip_suffix('.'));
            let apart = apart.map(|namespace| ObjectKey::new(namespace, name.name.clone()));
            for key in std::iter::once(name).chain(&apart) {
                let Some(manifest) = objects.manifests.get(key) else { continue };
                // Of a service that is kept apart only its own cluster can say something.
                let called = objects.services.get(key).map(|service| mesh_key(key, service, &cluster.info));
                if called.as_ref().unwrap_or(key) != name {
                    continue;
                }
                let (counts, owner) = *first.get_or_insert((manifest, &cluster.info.name));
                if !counts.says_as(manifest) {
                    let other = &cluster.info.name;
                    warnings.push(format!(
                        "ServiceManifest {name} is another one in cluster {other} than in cluster {owner}, which counts"
                    ));
                }
            }
        }
        first.map(|(manifest, _)| manifest)
    }

    /// Gives a service its manifest. Of what is no service, only what it may call means anything.
    pub fn apply(&self, key: &ObjectKey, service: &mut MeshService, warnings: &mut Vec<String>) {
        let Some(manifest) = self.of(key, warnings) else { return };
        service.manifest = Some(Arc::clone(manifest));
        if manifest.retries.as_ref().is_some_and(|retries| retries.on.is_some()) {
            warnings.push(format!(
                "ServiceManifest {key}: spec.retries.on is called retryOn now, and will not be read for ever"
            ));
        }
        if service.clusters.is_empty() {
            if manifest.egress.is_none() {
                warnings.push(format!("ServiceManifest {key} is of no service: there is none of this name"));
            } else if !manifest.is_of_callers_alone() {
                warnings.push(format!(
                    "ServiceManifest {key} is of no service: there is none of this name, so only spec.egress and spec.onDemand of \
                     it hold, for proxies of that name"
                ));
            }
            return;
        }
        for (number, port) in &mut service.ports {
            port.protocol = manifest.protocol.unwrap_or(port.protocol);
            let idle = for_http_only(manifest);
            if port.protocol == Protocol::Tcp && !idle.is_empty() {
                warnings.push(format!(
                    "ServiceManifest {key}: {} cannot hold for port {number}, which speaks tcp",
                    idle.join(" and ")
                ));
            }
        }
        let by = manifest.health_check.as_ref().map(|check| check.by);
        if manifest.mtls.is_some() && by == Some(CheckedBy::Checkers) {
            warnings.push(format!(
                "ServiceManifest {key}: spec.healthCheck.by: checkers cannot hold with spec.mtls; each caller checks for itself"
            ));
        }
        if let Some(stated) = &manifest.edge
            && !service.ports.iter().any(|(number, port)| {
                port.protocol.is_http() && stated.port.is_none_or(|stated| stated.get() == *number)
            })
        {
            let which = stated.port.map_or_else(|| "no port of it".to_owned(), |port| format!("no port {port} of it"));
            warnings.push(format!("ServiceManifest {key}: spec.edge cannot hold, as {which} speaks HTTP"));
        }
        if manifest.on_demand && manifest.egress.is_none() {
            warnings.push(format!("ServiceManifest {key}: spec.onDemand means nothing without spec.egress, as its pods are given everything"));
        }
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
        ("spec.overrides", manifest.overrides.is_some()),
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
        let egress = mesh.manifest(caller)?.egress.as_ref()?;
        allowed.extend(egress.0.iter().map(|name| name.seen_from(&caller.namespace)));
    }
    Some(allowed)
}

/// What is said of services that want the same calls from outside.
#[must_use]
pub fn contested_at_the_edge(mesh: &Mesh) -> Vec<String> {
    let mut warnings = Vec::new();
    claims(mesh, |owner, other, domain, prefix| {
        warnings.push(format!(
            "ServiceManifest {other}: spec.edge: {domain}{prefix} is what ServiceManifest {owner} has, which counts"
        ));
    });
    warnings
}

/// The services that are called from outside.
#[must_use]
pub fn exposed_services(mesh: &Mesh) -> BTreeSet<ObjectKey> {
    mesh.services.iter().filter(|(_, service)| exposed(service).is_some()).map(|(key, _)| key.clone()).collect()
}

/// Whether what pods of these services may not call ahead is given to their proxies when they ask for it: all of them state so.
#[must_use]
pub fn is_rest_on_demand(mesh: &Mesh, callers: &BTreeSet<ObjectKey>) -> bool {
    callers.iter().all(|caller| mesh.manifest(caller).is_some_and(|manifest| manifest.on_demand))
}
