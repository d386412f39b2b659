//! The gRPC side: ADS, state of the world and delta, one task a stream.
//!
//! What a stream says next is decided by a state machine without I/O ([`sotw`], [`delta`]); the loop here feeds it
//! requests and asks it for one response at a time, always against the newest snapshot. A client that does not read
//! or does not acknowledge therefore costs no queue and delays nobody: when it comes back it gets what is newest.

pub mod clients;
pub mod delta;
pub mod sotw;
#[cfg(test)]
mod test_support;

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use envoy_types::pb::google::protobuf::value::Kind;
use futures_util::Stream;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info};

use self::clients::{ClientStatus, Clients};
use crate::kubernetes::ObjectKey;
use crate::resources::{PUSH_ORDER, ProxyKind, Snapshot, Viewer};

/// The largest request that is read, in bytes. A reconnecting delta client lists every resource that it has.
const MAX_REQUEST_BYTES: usize = 8 * 1024 * 1024;
/// The largest response that is sent, in bytes.
const MAX_RESPONSE_BYTES: usize = 256 * 1024 * 1024;
/// A client that answers no ping for this long is gone.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const MAX_STREAMS_PER_CONNECTION: u32 = 64;
/// The most types that one stream may subscribe to.
const MAX_TYPES: usize = 32;
/// The most names of one type that one stream may subscribe to.
const MAX_NAMES: usize = 200_000;
/// The name that stands for all resources of a type.
const WILDCARD: &str = "*";

/// The protocol of one stream, without I/O.
pub trait Session: Send + 'static {
    /// What the client sends.
    type Request: Send;
    /// What it is sent.
    type Response: Send + 'static;

    /// Takes in a request.
    ///
    /// # Errors
    /// The status that ends the stream, for a client that breaks the protocol or asks for too much.
    fn handle(&mut self, request: Self::Request) -> Result<(), Status>;

    /// The next response, if anything is to be said now. To be asked again until it gives `None`.
    fn poll(&mut self, snapshot: &Snapshot) -> Option<Self::Response>;

    /// What is known of the client.
    fn status(&self) -> &ClientStatus;
}

/// The ADS service.
#[derive(Debug, Clone)]
pub struct Ads {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    shutdown: watch::Receiver<bool>,
    clients: Clients,
}

impl Ads {
    /// A service that serves the newest of `snapshots` until `shutdown` turns true.
    #[must_use]
    pub fn new(snapshots: watch::Receiver<Arc<Snapshot>>, shutdown: watch::Receiver<bool>, clients: Clients) -> Self {
        Self { snapshots, shutdown, clients }
    }

    /// Serves on `listener` until shutdown.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(self, listener: TcpListener) -> Result<(), tonic::transport::Error> {
        let mut shutdown = self.shutdown.clone();
        let service = AggregatedDiscoveryServiceServer::new(self)
            .max_decoding_message_size(MAX_REQUEST_BYTES)
            .max_encoding_message_size(MAX_RESPONSE_BYTES);
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(MAX_STREAMS_PER_CONNECTION)
            .add_service(service)
            .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async move {
                asked(&mut shutdown).await;
            })
            .await
    }

    fn start<S: Session>(
        &self,
        request: Request<Streaming<S::Request>>,
        session: S,
    ) -> ReceiverStream<Result<S::Response, Status>> {
        // One response may wait for the client to read; the next is only made when it has.
        let (responses, stream) = mpsc::channel(1);
        let peer = request.remote_addr().map_or_else(|| "unknown".to_owned(), |peer| peer.to_string());
        let handle = self.clients.connect(peer);
        tokio::spawn(run(
            session,
            request.into_inner(),
            responses,
            self.snapshots.clone(),
            self.shutdown.clone(),
            handle,
        ));
        ReceiverStream::new(stream)
    }
}

async fn run<S: Session>(
    mut session: S,
    mut requests: Streaming<S::Request>,
    responses: mpsc::Sender<Result<S::Response, Status>>,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    mut shutdown: watch::Receiver<bool>,
    client: clients::ClientHandle,
) {
    info!("{client}: stream opened");
    loop {
        loop {
            let snapshot = snapshots.borrow_and_update().clone();
            let Some(response) = session.poll(&snapshot) else { break };
            client.update(session.status());
            tokio::select! {
                sent = responses.send(Ok(response)) => if sent.is_err() { return },
                () = asked(&mut shutdown) => return,
            }
        }
        tokio::select! {
            request = requests.message() => match request {
                Ok(Some(request)) => {
                    let outcome = session.handle(request);
                    client.update(session.status());
                    if let Err(status) = outcome {
                        info!("{client}: stream ended: {}", status.message());
                        let _ = responses.send(Err(status)).await;
                        return;
                    }
                }
                Ok(None) => break,
                Err(status) => {
                    debug!("{client}: {status}");
                    break;
                }
            },
            changed = snapshots.changed() => if changed.is_err() { break },
            () = responses.closed() => break,
            () = asked(&mut shutdown) => break,
        }
    }
    info!("{client}: stream closed");
}

/// Waits until shutdown is asked for. That whoever could ask is gone is shutdown too.
async fn asked(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|asked| *asked).await;
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = ResponseStream<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = ResponseStream<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Ok(Response::new(Box::pin(self.start(request, sotw::SotwSession::default()))))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Ok(Response::new(Box::pin(self.start(request, delta::DeltaSession::default()))))
    }
}

/// Who the client is, by what its node says.
fn proxy_kind(user_agent_name: &str) -> ProxyKind {
    match user_agent_name {
        "culvert" => ProxyKind::Culvert,
        // "gRPC C-core linux", "gRPC Go", "gRPC Java".
        name if name.starts_with("gRPC ") => ProxyKind::Grpc,
        _ => ProxyKind::Foreign,
    }
}

/// The metadata of a node that names the services whose pods call through it: a list of `name.namespace`, or of `name` for
/// those in namespace `default`.
const SERVICES_METADATA: &str = "services";
/// The most services of which a node can be.
const MAX_SERVICES: usize = 1000;

/// What a node is given: by its kind, and by the services that its metadata or its cluster names.
fn viewer(node: &Node) -> Viewer {
    let stated = node.metadata.as_ref().and_then(|metadata| metadata.fields.get(SERVICES_METADATA));
    let names: Vec<&str> = match stated.and_then(|value| value.kind.as_ref()) {
        Some(Kind::ListValue(list)) => list
            .values
            .iter()
            .filter_map(|value| match &value.kind {
                Some(Kind::StringValue(name)) => Some(name.as_str()),
                _ => None,
            })
            .take(MAX_SERVICES)
            .collect(),
        _ => vec![node.cluster.as_str()],
    };
    let services = names.into_iter().filter(|name| !name.is_empty()).map(|name| {
        let (name, namespace) = name.split_once('.').unwrap_or((name, "default"));
        ObjectKey::new(namespace, name)
    });
    Viewer { kind: proxy_kind(&node.user_agent_name), services: services.collect() }
}

/// The state of `type_url`, made if it is new.
fn subscription<'a, T: Default>(types: &'a mut BTreeMap<String, T>, type_url: &str) -> Result<&'a mut T, Status> {
    if type_url.is_empty() {
        return Err(Status::invalid_argument("type_url is missing; on an ADS stream every request needs it"));
    }
    if !types.contains_key(type_url) && types.len() == MAX_TYPES {
        return Err(Status::resource_exhausted(format!("more than {MAX_TYPES} resource types on one stream")));
    }
    Ok(types.entry(type_url.to_owned()).or_default())
}

fn check_name_count(type_url: &str, count: usize) -> Result<(), Status> {
    if count > MAX_NAMES {
        return Err(Status::resource_exhausted(format!("more than {MAX_NAMES} names of {type_url} on one stream")));
    }
    Ok(())
}

/// The subscribed types in the order in which they are pushed.
fn in_push_order<T>(types: &BTreeMap<String, T>) -> Vec<String> {
    let known = PUSH_ORDER.iter().copied().filter(|type_url| types.contains_key(*type_url)).map(str::to_owned);
    let others = types.keys().filter(|type_url| !PUSH_ORDER.contains(&type_url.as_str())).cloned();
    known.chain(others).collect()
}
