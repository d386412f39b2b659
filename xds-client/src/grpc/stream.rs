//! One stream: a connection, the call on it, and messages in both directions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::sync::mpsc::{self, Receiver, Sender};
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codegen::http::Uri;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{MetadataKey, MetadataMap, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;

use crate::ads::{Request, Response, Variant};
use crate::connect::{self, ConnectError, First, Heard};
use crate::source::{GrpcService, Server};

/// The largest response taken, in bytes.
pub const MAX_RESPONSE_BYTES: usize = 64 * 1024 * 1024;
/// HTTP/2 pings find out that the server's process is stuck. gRPC servers hang up on clients that ping more often than
/// every five minutes, unless they are configured to take it.
const PING_INTERVAL: Duration = Duration::from_secs(305);
const PING_TIMEOUT: Duration = Duration::from_secs(20);
/// The share of a response that may be under way unread.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// Why there is no stream, or no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lost {
    #[error("cannot connect to the control plane: {}", chain(.0))]
    Connect(tonic::transport::Error),
    #[error("the control plane ended the stream: {:?}: {}", .0.code(), .0.message())]
    Status(Box<Status>),
    #[error("the stream to the control plane broke: {}", causes(.0))]
    Broken(Box<Status>),
    #[error("the server does not speak HTTP/2, as a control plane must over gRPC: it answered in HTTP/1")]
    Http1,
    #[error(
        "the server wants TLS: it answered with an alert of TLS to a connection without (its cluster has no transport_socket)"
    )]
    WantsTls,
    #[error("the server hung up without a word of HTTP/2, as servers do that want TLS: {}", causes(.0))]
    Wordless(Box<Status>),
    #[error("a response of the control plane has {found} bytes, more than the limit of {limit}{}", of_types(.types))]
    TooLarge { found: String, limit: String, types: Unanswered },
    #[error("the control plane closed the stream")]
    Closed,
}

/// Of which types a response may have been that was not read.
#[derive(Debug, Default)]
pub(super) struct Unanswered {
    /// Those that were asked for, by name.
    pub(super) types: Vec<String>,
    /// They have not been answered on this stream. Otherwise all have.
    pub(super) none_yet: bool,
}

/// The end of a sentence.
fn of_types(Unanswered { types, none_yet }: &Unanswered) -> String {
    match (&**types, none_yet) {
        ([], _) => String::new(),
        ([one], _) => format!(": it is of {one}"),
        (several, true) => format!(": it is of one of {}, which have not been answered yet", several.join(", ")),
        (several, false) => format!(": it is of one of {}", several.join(", ")),
    }
}

/// What tonic says of a message that it does not take.
const TOO_LARGE: &str = "Error, decoded message length too large: found ";

impl From<Status> for Lost {
    fn from(status: Status) -> Self {
        if let Some((found, limit)) = status.message().strip_prefix(TOO_LARGE).and_then(|it| it.split_once(" bytes, "))
        {
            let limit = limit.trim_start_matches(|c: char| !c.is_ascii_digit()).to_owned();
            return Lost::TooLarge { found: found.to_owned(), limit, types: Unanswered::default() };
        }
        // What the server says has no cause on this side.
        match std::error::Error::source(&status) {
            Some(_) => Lost::Broken(Box::new(status)),
            None => Lost::Status(Box::new(status)),
        }
    }
}

impl Lost {
    /// In the words that fit, with what is known besides: what the server said first, and which types are not answered.
    pub(super) fn explained(self, heard: &Heard, has_tls: bool, unanswered: Unanswered) -> Lost {
        match (self, heard.first()) {
            (Lost::TooLarge { found, limit, .. }, _) => Lost::TooLarge { found, limit, types: unanswered },
            (Lost::Connect(_) | Lost::Broken(_), First::Http1) => Lost::Http1,
            (Lost::Connect(_) | Lost::Broken(_), First::TlsAlert) if !has_tls => Lost::WantsTls,
            (Lost::Broken(status), First::Nothing) if !has_tls => Lost::Wordless(status),
            (lost, _) => lost,
        }
    }

    /// It is this client that did not take what came: it will come again.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Lost::TooLarge { .. })
    }
}

/// Connects to `address`, one of the server's. What it says first is noted in `heard`.
pub(super) async fn connect(
    server: &Server,
    address: &str,
    authority: &str,
    heard: Arc<Heard>,
) -> Result<Channel, Lost> {
    let scheme = if server.tls.is_some() { "https" } else { "http" };
    let uri = |authority: &str| Uri::builder().scheme(scheme).authority(authority).path_and_query("/").build();
    // A Unix domain socket has no name that could be an authority.
    let address_uri = uri(address).or_else(|_| uri("localhost"));
    let mut endpoint = Endpoint::from(address_uri.unwrap_or_default())
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    // Names that are no authority (a gRPC target such as "unix:/a/path") leave the server's address in place.
    if let Ok(origin) = uri(authority) {
        endpoint = endpoint.origin(origin);
    }
    let (server, address, authority) = (server.clone(), address.to_owned(), authority.to_owned());
    // Tonic would connect again by itself, without waiting.
    let used = AtomicBool::new(false);
    let connector = tower::service_fn(move |_| {
        let (server, address, authority) = (server.clone(), address.clone(), authority.clone());
        let again = used.swap(true, Relaxed);
        let heard = Arc::clone(&heard);
        async move {
            if again {
                return Err(ConnectError::Lost);
            }
            connect::connect(&server, &address, &authority, "h2").await.map(|it| TokioIo::new(it.heard_by(heard)))
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(Lost::Connect)
}

/// The service's own headers for a call.
pub(super) fn metadata(service: &GrpcService) -> MetadataMap {
    let mut metadata = MetadataMap::new();
    for (name, value) in &service.initial_metadata {
        // Checked when the configuration was read.
        if let (Ok(name), Ok(value)) = (MetadataKey::from_bytes(name.as_bytes()), MetadataValue::try_from(value)) {
            metadata.append(name, value);
        }
    }
    metadata
}

/// The sending half.
pub(super) enum Requests {
    Sotw(Sender<DiscoveryRequest>),
    Delta(Sender<DeltaDiscoveryRequest>),
}

impl Requests {
    /// Sends a request, for which there must be [room](Self::has_room).
    pub(super) fn send(&self, request: Request) {
        // A stream that is gone is noticed by the receiving half.
        match (self, request) {
            (Requests::Sotw(sender), Request::Sotw(request)) => drop(sender.try_send(request)),
            (Requests::Delta(sender), Request::Delta(request)) => drop(sender.try_send(request)),
            _ => debug_assert!(false, "the core speaks one variant"),
        }
    }

    /// Whether the next request can be sent: the server reads, or the stream is gone.
    pub(super) fn has_room(&self) -> bool {
        let free = match self {
            Requests::Sotw(sender) => sender.capacity(),
            Requests::Delta(sender) => sender.capacity(),
        };
        free > 0 || self.is_closed()
    }

    /// Waits until [there is room](Self::has_room). Cancelling this loses nothing.
    pub(super) async fn room(&self) {
        match self {
            Requests::Sotw(sender) => drop(sender.reserve().await),
            Requests::Delta(sender) => drop(sender.reserve().await),
        }
    }

    /// Whether the stream is gone.
    pub(super) fn is_closed(&self) -> bool {
        match self {
            Requests::Sotw(sender) => sender.is_closed(),
            Requests::Delta(sender) => sender.is_closed(),
        }
    }

    /// Waits until the stream is gone. Cancelling this loses nothing.
    pub(super) async fn closed(&self) {
        match self {
            Requests::Sotw(sender) => sender.closed().await,
            Requests::Delta(sender) => sender.closed().await,
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

/// Starts the call `method`. The sending half works at once; servers may wait for its first request before they answer.
pub(super) fn call(
    channel: Channel,
    service: &GrpcService,
    variant: Variant,
    method: &'static str,
) -> (Requests, impl Future<Output = Result<Responses, Lost>> + Send + use<>) {
    let limit = service.max_receive_message_length.unwrap_or(MAX_RESPONSE_BYTES);
    let client = Grpc::new(channel).max_decoding_message_size(limit);
    // More are made when the server has read these: they may be large.
    let (sotw_sender, sotw) = mpsc::channel(1);
    let (delta_sender, delta) = mpsc::channel(1);
    let requests = match variant {
        Variant::Sotw => Requests::Sotw(sotw_sender),
        Variant::Delta => Requests::Delta(delta_sender),
    };
    let metadata = metadata(service);
    let responses = async move {
        Ok(match variant {
            Variant::Sotw => Responses::Sotw(streaming(client, metadata, method, sotw).await?),
            Variant::Delta => Responses::Delta(streaming(client, metadata, method, delta).await?),
        })
    };
    (requests, responses)
}

async fn streaming<Q, A>(
    mut client: Grpc<Channel>,
    metadata: MetadataMap,
    method: &'static str,
    requests: Receiver<Q>,
) -> Result<Streaming<A>, Status>
where
    Q: Message + Send + Sync + 'static,
    A: Message + Default + Send + Sync + 'static,
{
    client.ready().await.map_err(|error| {
        let mut status = Status::unavailable("");
        status.set_source(Arc::new(error));
        status
    })?;
    let mut request = tonic::Request::new(ReceiverStream::new(requests));
    *request.metadata_mut() = metadata;
    let codec = ProstCodec::<Q, A>::default();
    Ok(client.streaming(request, PathAndQuery::from_static(method), codec).await?.into_inner())
}

/// Why a call broke: what a status has for a cause.
fn causes(status: &Status) -> String {
    std::error::Error::source(status).map_or_else(|| status.message().to_owned(), chain)
}

/// An error with its causes: tonic's own says only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}
