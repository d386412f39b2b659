//! One ADS stream: a connection, the call on it, and messages in both directions.

use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Streaming;
use tonic::codegen::http::Uri;
use tonic::transport::{Channel, Endpoint};

use crate::ads::{Request, Response, Variant};

/// The largest response taken, in bytes.
pub const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;
/// TCP keepalive finds out that the server's host or the way to it is gone: after 10 s idle, 5 probes 2 s apart.
const TCP_KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(2), 5);
/// HTTP/2 pings find out that the server's process is stuck. gRPC servers hang up on clients that ping more often than
/// every five minutes, unless they are configured to take it.
const PING_INTERVAL: Duration = Duration::from_secs(305);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// The share of a response that may be under way unread.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// Why there is no stream, or no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("the address {0:?} of the control plane is not host:port")]
    Address(String),
    #[error("cannot connect to the control plane: {}", chain(.0))]
    Connect(tonic::transport::Error),
    #[error("the control plane ended the stream: {:?}: {}", .0.code(), .0.message())]
    Status(Box<tonic::Status>),
    #[error("the control plane closed the stream")]
    Closed,
}

impl From<tonic::Status> for Lost {
    fn from(status: tonic::Status) -> Self {
        Lost::Status(Box::new(status))
    }
}

/// Connects to `address` (host:port).
pub(super) async fn connect(address: &str, authority: &str, timeout: Duration) -> Result<Channel, Lost> {
    let uri = |authority: &str| Uri::builder().scheme("http").authority(authority).path_and_query("/").build();
    let server = uri(address).map_err(|_| Lost::Address(address.to_owned()))?;
    let (idle, interval, retries) = TCP_KEEPALIVE;
    let mut endpoint = Endpoint::from(server)
        .connect_timeout(timeout)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(idle))
        .tcp_keepalive_interval(Some(interval))
        .tcp_keepalive_retries(Some(retries))
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    // Names that are no authority (a gRPC target such as "dns:///...") leave the server's address in place.
    if let Ok(origin) = uri(authority) {
        endpoint = endpoint.origin(origin);
    }
    endpoint.connect().await.map_err(Lost::Connect)
}

/// The sending half.
pub(super) enum Requests {
    Sotw(UnboundedSender<DiscoveryRequest>),
    Delta(UnboundedSender<DeltaDiscoveryRequest>),
}

impl Requests {
    /// Queues a request. The queue is as long as the core makes it: about one request for each response.
    pub(super) fn send(&self, request: Request) {
        // A stream that is gone is noticed by the receiving half.
        match (self, request) {
            (Requests::Sotw(sender), Request::Sotw(request)) => drop(sender.send(request)),
            (Requests::Delta(sender), Request::Delta(request)) => drop(sender.send(request)),
            _ => debug_assert!(false, "the core speaks one variant"),
        }
    }
}

/// The receiving half.
pub(super) enum Responses {
    Sotw(Streaming<DiscoveryResponse>),
    Delta(Streaming<DeltaDiscoveryResponse>),
}

impl Responses {
    /// The next response. Cancelling this loses nothing.
    pub(super) async fn next(&mut self) -> Result<Response, Lost> {
        let response = match self {
            Responses::Sotw(stream) => stream.message().await?.map(Response::Sotw),
            Responses::Delta(stream) => stream.message().await?.map(Response::Delta),
        };
        response.ok_or(Lost::Closed)
    }
}

/// Starts the call. The sending half works at once; servers may wait for its first request before they answer.
pub(super) fn call(
    channel: Channel,
    variant: Variant,
) -> (Requests, impl Future<Output = Result<Responses, Lost>> + Send) {
    let mut client = AggregatedDiscoveryServiceClient::new(channel).max_decoding_message_size(MAX_RESPONSE_BYTES);
    let (sotw_sender, sotw) = unbounded_channel();
    let (delta_sender, delta) = unbounded_channel();
    let requests = match variant {
        Variant::Sotw => Requests::Sotw(sotw_sender),
        Variant::Delta => Requests::Delta(delta_sender),
    };
    let responses = async move {
        Ok(match variant {
            Variant::Sotw => {
                let stream = client.stream_aggregated_resources(UnboundedReceiverStream::new(sotw)).await?;
                Responses::Sotw(stream.into_inner())
            }
            Variant::Delta => {
                let stream = client.delta_aggregated_resources(UnboundedReceiverStream::new(delta)).await?;
                Responses::Delta(stream.into_inner())
            }
        })
    };
    (requests, responses)
}

/// An error with its causes: tonic's own says only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}
