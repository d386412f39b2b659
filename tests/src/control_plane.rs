//! A control plane whose every message the test decides: ADS over gRPC, both variants, on a port of its own.
//!
//! It shares no code with the client under test beyond the generated messages.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource as Wrapper,
};
use envoy_types::pb::google::protobuf::Any;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::transport::server::TcpIncoming;
use tonic::{Status, Streaming};

/// The server; dropping it closes its port and its streams.
pub struct ControlPlane {
    /// Where it listens.
    pub address: SocketAddr,
    streams: Receiver<Stream>,
    _runtime: tokio::runtime::Runtime,
}

/// One ADS stream.
pub struct Stream {
    /// Whether it is incremental.
    pub delta: bool,
    requests: Receiver<Request>,
    responses: Responses,
}

enum Responses {
    Sotw(UnboundedSender<Result<DiscoveryResponse, Status>>),
    Delta(UnboundedSender<Result<DeltaDiscoveryResponse, Status>>),
}

/// A request, of either variant.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Request {
    /// The type.
    pub type_url: String,
    /// State of the world: the version in force.
    pub version: String,
    /// What is answered; empty where nothing is.
    pub nonce: String,
    /// The reason of a NACK.
    pub error: Option<String>,
    /// State of the world: all names wanted. Incremental: names newly wanted.
    pub names: Vec<String>,
    /// Incremental: names not wanted any more.
    pub unsubscribed: Vec<String>,
    /// Incremental: what the client has of an earlier stream.
    pub initial_versions: Vec<(String, String)>,
    /// Who is asking, where it says so.
    pub node: Option<Node>,
}

/// A resource to be sent.
#[derive(Debug, Clone)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// Its version, in the incremental variant.
    pub version: String,
    /// Itself.
    pub body: Any,
}

/// A response to be sent, in whatever variant the stream has.
#[derive(Debug, Clone, Default)]
pub struct Push {
    /// The type.
    pub type_url: String,
    /// The version of the whole.
    pub version: String,
    /// What the answer refers to.
    pub nonce: String,
    /// The resources.
    pub resources: Vec<Resource>,
    /// Names that are gone; the state of the world has no word for them.
    pub removed: Vec<String>,
}

impl ControlPlane {
    /// Listens on a free port of 127.0.0.1.
    pub fn start() -> Result<ControlPlane> {
        Self::on("127.0.0.1:0".parse().context("a fixed address")?)
    }

    /// Listens on `address`.
    pub fn on(address: SocketAddr) -> Result<ControlPlane> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (sender, streams) = channel();
        let _guard = runtime.enter();
        // Else a response may wait for the acknowledgement of what was sent before: up to 40 ms.
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let limit = usize::MAX;
        let service = AggregatedDiscoveryServiceServer::new(Service { streams: sender })
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limit);
        runtime.spawn(
            tonic::transport::Server::builder()
                .initial_stream_window_size(16 << 20)
                .initial_connection_window_size(16 << 20)
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        Ok(ControlPlane { address, streams, _runtime: runtime })
    }

    /// The next stream that a client opens.
    pub fn stream(&self, patience: Duration) -> Result<Stream> {
        self.streams.recv_timeout(patience).with_context(|| format!("no stream was opened within {patience:?}"))
    }
}

impl Stream {
    /// The next request; `None` where none comes in time.
    pub fn next(&self, patience: Duration) -> Result<Option<Request>> {
        match self.requests.recv_timeout(patience) {
            Ok(request) => Ok(Some(request)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the client closed the stream"),
        }
    }

    /// Sends an incremental response whose resources have whatever is around them: aliases, no body.
    pub fn push_delta(&self, response: DeltaDiscoveryResponse) {
        if let Responses::Delta(sender) = &self.responses {
            let _ = sender.send(Ok(response));
        }
    }

    /// Sends a response. Nothing tells whether it arrives.
    pub fn push(&self, push: Push) {
        let Push { type_url, version, nonce, resources, removed } = push;
        match &self.responses {
            Responses::Sotw(sender) => {
                let resources = resources.into_iter().map(|resource| resource.body).collect();
                let response =
                    DiscoveryResponse { version_info: version, type_url, nonce, resources, ..Default::default() };
                let _ = sender.send(Ok(response));
            }
            Responses::Delta(sender) => {
                let resources = resources.into_iter().map(|Resource { name, version, body }| Wrapper {
                    name,
                    version,
                    resource: Some(body),
                    ..Default::default()
                });
                let response = DeltaDiscoveryResponse {
                    system_version_info: version,
                    type_url,
                    nonce,
                    resources: resources.collect(),
                    removed_resources: removed,
                    ..Default::default()
                };
                let _ = sender.send(Ok(response));
            }
        }
    }
}

struct Service {
    streams: Sender<Stream>,
}

type Answers<T> = Pin<Box<dyn tokio_stream::Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// Passes requests on until the client or the test has gone.
    fn open<T: Send + 'static>(
        &self,
        mut requests: Streaming<T>,
        convert: fn(T) -> Request,
        delta: bool,
        responses: Responses,
    ) {
        let (sender, receiver) = channel();
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                if sender.send(convert(request)).is_err() {
                    return;
                }
            }
        });
        // A test that has ended wants no streams.
        let _ = self.streams.send(Stream { delta, requests: receiver, responses });
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: tonic::Request<Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Answers<DiscoveryResponse>>, Status> {
        let (sender, answers) = unbounded_channel();
        let convert = |request: DiscoveryRequest| Request {
            type_url: request.type_url,
            version: request.version_info,
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
            names: request.resource_names,
            node: request.node,
            ..Default::default()
        };
        self.open(request.into_inner(), convert, false, Responses::Sotw(sender));
        Ok(tonic::Response::new(Box::pin(UnboundedReceiverStream::new(answers))))
    }

    async fn delta_aggregated_resources(
        &self,
        request: tonic::Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Answers<DeltaDiscoveryResponse>>, Status> {
        let (sender, answers) = unbounded_channel();
        let convert = |request: DeltaDiscoveryRequest| Request {
            type_url: request.type_url,
            nonce: request.response_nonce,
            error: request.error_detail.map(|status| status.message),
            names: request.resource_names_subscribe,
            unsubscribed: request.resource_names_unsubscribe,
            initial_versions: request.initial_resource_versions.into_iter().collect(),
            node: request.node,
            ..Default::default()
        };
        self.open(request.into_inner(), convert, true, Responses::Delta(sender));
        Ok(tonic::Response::new(Box::pin(UnboundedReceiverStream::new(answers))))
    }
}
