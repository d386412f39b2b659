//! The document at `/status`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use serde::Serialize;

use super::StatusPages;
use crate::health::CheckerStatus;
use crate::mesh::{Health, MeshPort};
use crate::overrides::contexts::ContextsStatus;
use crate::overrides::shares;
use crate::overrides::tunnels::TunnelStatus;
use crate::registration;
use crate::registry::SourceHealth;
use crate::resources::ProxyKind;
use crate::secrets::Secret;
use crate::server::clients::{ClientProblem, ClientStatus};
use crate::server::loads::Load;

/// The document at `/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// The program's version.
    pub version: &'static str,
    /// When it was started, in seconds since the epoch.
    pub started: u64,
    /// Whether every source has been read, so that clients are served.
    pub ready: bool,
    /// Counts up with each change of a source.
    pub registry_version: u64,
    /// The clusters in the order of the configuration.
    pub clusters: Vec<ClusterStatus>,
    /// How the registrations are doing, if there are any to be had.
    pub registrations: Option<registration::Health>,
    /// How the storage of shares is doing.
    pub share_storage: shares::Health,
    /// Stored sets of overrides. Without their tokens: who may see those may use them.
    pub shares: Vec<ShareStatus>,
    /// Tunnels to developers' machines, of this replica.
    pub tunnels: Vec<TunnelStatus>,
    /// The services of the mesh.
    pub services: Vec<ServiceStatus>,
    /// What is served now: by kind of proxy and type URL.
    pub served: BTreeMap<&'static str, BTreeMap<&'static str, ServedStatus>>,
    /// Inconsistencies between objects or clusters.
    pub warnings: Vec<String>,
    /// The connected xDS streams.
    pub clients: Vec<ConnectedClient>,
    /// What keeps nodes from being given what they ask for.
    pub client_problems: Vec<ClientProblem>,
    /// What proxies have reported of the requests to each Envoy cluster, since the start.
    pub loads: BTreeMap<String, Load>,
    /// Which services pass contexts of overrides on.
    pub contexts: ContextsStatus,
    /// The nodes that check endpoints.
    pub checkers: Vec<CheckerStatus>,
    /// What proxies may be given of secrets. Nothing of what is secret about them.
    pub secrets: Vec<SecretStatus>,
    /// What cannot be used of the directory of secrets, by name.
    pub secret_errors: BTreeMap<String, String>,
}

/// A secret at `/status`.
#[derive(Debug, Serialize)]
pub struct SecretStatus {
    /// Its name.
    pub name: String,
    /// What it has: a certificate, authorities, values.
    pub has: Vec<&'static str>,
    /// Until when its certificate is valid, in seconds since the epoch.
    pub expires: Option<i64>,
}

/// A connected xDS stream at `/status`.
#[derive(Debug, Serialize)]
pub struct ConnectedClient {
    /// `rejected`, `waiting` or `in sync`.
    pub state: &'static str,
    /// What is known of it.
    #[serde(flatten)]
    pub status: ClientStatus,
}

/// A stored set of overrides at `/status`.
#[derive(Debug, Serialize)]
pub struct ShareStatus {
    /// Its name.
    pub name: String,
    /// Which services are of which revision.
    pub overrides: Vec<serde_json::Value>,
    /// When it was made, in seconds since the epoch.
    pub created: i64,
    /// When it ends, in seconds since the epoch.
    pub expires: i64,
    /// Whether its time is over.
    pub expired: bool,
}

/// A cluster at `/status`.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    /// Its name.
    pub name: String,
    /// Whether it has been read.
    pub read: bool,
    /// Whether an operator has taken it out.
    pub drained: bool,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// How many Services it has.
    pub services: usize,
    /// How many EndpointSlices it has.
    pub endpoint_slices: usize,
    /// How many Pods it has.
    pub pods: usize,
    /// How its source is doing.
    pub source: SourceHealth,
}

/// A service's port at `/status`.
#[derive(Debug, Serialize)]
pub struct ServiceStatus {
    /// `name.namespace`.
    pub service: String,
    /// Its Envoy cluster.
    pub envoy_cluster: String,
    /// What it speaks.
    pub protocol: String,
    /// The clusters that have it.
    pub clusters: Vec<String>,
    /// Whether a ServiceManifest says something about it.
    pub manifest: bool,
    /// Its virtual addresses.
    pub vips: Vec<String>,
    /// The host outside of all clusters that it stands for, with its port, in the place of endpoints.
    pub external: Option<String>,
    /// Its load-balanced endpoints.
    pub endpoints: Vec<EndpointStatus>,
    /// Its endpoints that only overrides reach.
    pub offloaded: Vec<OffloadedStatus>,
}

/// The resources of one type at `/status`.
#[derive(Debug, Serialize)]
pub struct ServedStatus {
    /// The version of the type.
    pub version: String,
    /// How many resources there are.
    pub resources: usize,
}

/// A load-balanced endpoint at `/status`.
#[derive(Debug, Serialize)]
pub struct EndpointStatus {
    /// Address and port.
    pub address: String,
    /// `healthy`, `draining` or `unhealthy`.
    pub health: &'static str,
    /// The cluster it was found in.
    pub cluster: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
    /// Its share of the requests, 1 if none is stated.
    pub weight: u32,
    /// Whether it is marked as a canary.
    pub canary: bool,
}

/// An offloaded endpoint at `/status`.
#[derive(Debug, Serialize)]
pub struct OffloadedStatus {
    /// Its revision.
    pub revision: String,
    /// Address and port.
    pub address: String,
    /// `namespace/name` of the pod; of a tunnel, `tunnel/REVISION`.
    pub pod: String,
    /// The cluster it was found in; of a tunnel, `tunnel`.
    pub cluster: String,
    /// Since when the pod or the tunnel is there, else since when this replica has seen it, in seconds since the epoch.
    pub since: i64,
}

impl StatusPages {
    /// The document at `/status`.
    #[must_use]
    pub fn status(&self) -> Status {
        let registry = self.registry.borrow().clone();
        let snapshot = Arc::clone(&self.snapshots.borrow());
        let mesh = Arc::clone(&snapshot.mesh);
        let served = ProxyKind::ALL.map(|kind| {
            let types = snapshot.resources(kind).types().map(|(type_url, resources)| {
                let status =
                    ServedStatus { version: resources.version.to_string(), resources: resources.resources.size() };
                (type_url, status)
            });
            (kind.name(), types.collect())
        });
        let clusters = registry.clusters.iter().map(|cluster| ClusterStatus {
            name: cluster.info.name.clone(),
            read: cluster.objects.is_some(),
            drained: cluster.drained,
            region: cluster.info.region.clone(),
            zone: cluster.info.zone.clone(),
            services: cluster.objects.as_ref().map_or(0, |objects| objects.services.len()),
            endpoint_slices: cluster.objects.as_ref().map_or(0, |objects| objects.slices.len()),
            pods: cluster.objects.as_ref().map_or(0, |objects| objects.pods.len()),
            source: cluster.health.clone(),
        });
        let services = mesh.services.iter().flat_map(|(key, service)| {
            service.ports.iter().map(|(port, described)| ServiceStatus {
                service: format!("{}.{}", key.name, key.namespace),
                envoy_cluster: crate::mesh::cluster_name(key, *port),
                protocol: described.protocol.to_string(),
                clusters: service.clusters.clone(),
                manifest: service.manifest.is_some(),
                vips: described.vips.iter().map(ToString::to_string).collect(),
                external: described.external.as_ref().map(|external| format!("{}:{}", external.host, external.port)),
                endpoints: endpoints(described),
                offloaded: self.offloaded(described),
            })
        });
        let clients = self.clients.list().into_iter();
        let shares = self.overrides.shares.list().into_iter().map(|share| ShareStatus {
            name: share.name.clone(),
            overrides: share.entries(),
            created: share.created,
            expires: share.expires,
            expired: share.is_expired(),
        });
        Status {
            version: env!("CARGO_PKG_VERSION"),
            started: self.activity.started,
            ready: self.is_ready(),
            registry_version: registry.version,
            clusters: clusters.collect(),
            registrations: self.registrations.as_ref().map(registration::Registrations::health),
            share_storage: self.overrides.shares.health(),
            shares: shares.collect(),
            tunnels: self.overrides.tunnels.status(),
            services: services.collect(),
            served: served.into(),
            warnings: mesh.warnings.clone(),
            client_problems: self.clients.problems(&mesh),
            clients: clients.map(|status| ConnectedClient { state: status.state(), status }).collect(),
            loads: self.loads.clusters(),
            contexts: self.overrides.contexts.status(&mesh),
            checkers: self.checks.status(),
            secrets: mesh.secrets.iter().map(|(name, secret)| secret_status(name, secret)).collect(),
            secret_errors: self.secrets.errors(),
        }
    }
}

impl StatusPages {
    fn offloaded(&self, port: &MeshPort) -> Vec<OffloadedStatus> {
        let status = port.offloaded.iter().map(|endpoint| OffloadedStatus {
            revision: endpoint.revision.clone(),
            address: endpoint.address.to_string(),
            pod: endpoint.pod.to_string(),
            cluster: endpoint.cluster.clone(),
            since: endpoint.since.unwrap_or_else(|| self.activity.offloaded_since(endpoint)),
        });
        status.collect()
    }
}

fn secret_status(name: &str, secret: &Secret) -> SecretStatus {
    SecretStatus { name: name.to_owned(), has: secret.kinds(), expires: secret.not_after() }
}

fn endpoints(port: &MeshPort) -> Vec<EndpointStatus> {
    let status = port.endpoints.iter().map(|endpoint| EndpointStatus {
        address: endpoint.address.to_string(),
        health: match endpoint.health {
            Health::Healthy => "healthy",
            Health::Draining => "draining",
            Health::Unhealthy => "unhealthy",
        },
        cluster: endpoint.cluster.clone(),
        region: endpoint.locality.region.clone(),
        zone: endpoint.locality.zone.clone(),
        weight: endpoint.weight.map_or(1, NonZeroU32::get),
        canary: endpoint.canary,
    });
    status.collect()
}
