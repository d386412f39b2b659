//! The status pages: `/healthcheck`, `/ready` and `/status`.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::{debug, warn};

use crate::mesh::{Health, MeshPort};
use crate::registry::{Registry, SourceHealth};
use crate::resources::Snapshot;
use crate::server::clients::{ClientStatus, Clients};

/// How long a client may take to send a request's head.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The most connections at a time.
const MAX_CONNECTIONS: usize = 256;

/// What the pages show.
#[derive(Debug, Clone)]
pub struct StatusPages {
    /// The clusters and their sources.
    pub registry: watch::Receiver<Arc<Registry>>,
    /// What is served.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Who is connected.
    pub clients: Clients,
}

/// The document at `/status`.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Counts up with each change of a source.
    pub registry_version: u64,
    /// The clusters in the order of the configuration.
    pub clusters: Vec<ClusterStatus>,
    /// The services of the mesh.
    pub services: Vec<ServiceStatus>,
    /// Inconsistencies between objects or clusters.
    pub warnings: Vec<String>,
    /// The connected xDS streams.
    pub clients: Vec<ClientStatus>,
}

/// A cluster at `/status`.
#[derive(Debug, Serialize)]
pub struct ClusterStatus {
    /// Its name.
    pub name: String,
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
    /// Its virtual addresses.
    pub vips: Vec<String>,
    /// Its load-balanced endpoints.
    pub endpoints: Vec<EndpointStatus>,
    /// Its endpoints that only overrides reach.
    pub offloaded: Vec<OffloadedStatus>,
}

/// A load-balanced endpoint at `/status`.
#[derive(Debug, Serialize)]
pub struct EndpointStatus {
    /// Address and port.
    pub address: String,
    /// `healthy` or `draining`.
    pub health: &'static str,
    /// The cluster it was found in.
    pub cluster: String,
    /// Its region.
    pub region: String,
    /// Its zone.
    pub zone: String,
}

/// An offloaded endpoint at `/status`.
#[derive(Debug, Serialize)]
pub struct OffloadedStatus {
    /// Its revision.
    pub revision: String,
    /// Address and port.
    pub address: String,
    /// `namespace/name` of the pod.
    pub pod: String,
    /// The cluster it was found in.
    pub cluster: String,
}

impl StatusPages {
    /// Serves the pages on `listener` until `shutdown` turns true.
    pub async fn serve(self, listener: TcpListener, mut shutdown: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = shutdown.wait_for(|asked| *asked) => return,
            };
            let (connection, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, for example: not to be retried in a busy loop.
                    warn!("cannot accept connections to the status pages: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Over the limit the connection is dropped: monitoring must not be able to use discovery up.
            let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else { continue };
            let pages = self.clone();
            tokio::spawn(async move {
                let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(pages.answer(&request))));
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .serve_connection(TokioIo::new(connection), service)
                    .await;
                if let Err(error) = served {
                    debug!("status pages: {peer}: {error}");
                }
                drop(slot);
            });
        }
    }

    fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered here\n");
        }
        match request.uri().path() {
            "/healthcheck" => plain(StatusCode::OK, "OK"),
            "/ready" if self.registry.borrow().is_ready() => plain(StatusCode::OK, "ready\n"),
            "/ready" => plain(StatusCode::SERVICE_UNAVAILABLE, "not all clusters have been read yet\n"),
            "/status" => match serde_json::to_vec_pretty(&self.status()) {
                Ok(body) => {
                    let mut response = Response::new(Full::new(body.into()));
                    let json = header::HeaderValue::from_static("application/json");
                    response.headers_mut().insert(header::CONTENT_TYPE, json);
                    response
                }
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &format!("cannot write the status: {error}\n")),
            },
            _ => plain(StatusCode::NOT_FOUND, "the pages are /healthcheck, /ready and /status\n"),
        }
    }

    /// The document at `/status`.
    #[must_use]
    pub fn status(&self) -> Status {
        let registry = self.registry.borrow().clone();
        let mesh = Arc::clone(&self.snapshots.borrow().mesh);
        let clusters = registry.clusters.iter().map(|cluster| ClusterStatus {
            name: cluster.info.name.clone(),
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
                vips: described.vips.iter().map(ToString::to_string).collect(),
                endpoints: endpoints(described),
                offloaded: offloaded(described),
            })
        });
        Status {
            registry_version: registry.version,
            clusters: clusters.collect(),
            services: services.collect(),
            warnings: mesh.warnings.clone(),
            clients: self.clients.list(),
        }
    }
}

fn endpoints(port: &MeshPort) -> Vec<EndpointStatus> {
    let status = port.endpoints.iter().map(|endpoint| EndpointStatus {
        address: endpoint.address.to_string(),
        health: match endpoint.health {
            Health::Healthy => "healthy",
            Health::Draining => "draining",
        },
        cluster: endpoint.cluster.clone(),
        region: endpoint.locality.region.clone(),
        zone: endpoint.locality.zone.clone(),
    });
    status.collect()
}

fn offloaded(port: &MeshPort) -> Vec<OffloadedStatus> {
    let status = port.offloaded.iter().map(|endpoint| OffloadedStatus {
        revision: endpoint.revision.clone(),
        address: endpoint.address.to_string(),
        pod: endpoint.pod.to_string(),
        cluster: endpoint.cluster.clone(),
    });
    status.collect()
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *response.status_mut() = status;
    let plain = header::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}
