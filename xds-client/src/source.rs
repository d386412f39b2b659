//! Where resources come from: Envoy's `ConfigSource`, checked.

use std::{collections::BTreeMap, fmt, io, net::IpAddr, path::PathBuf, sync::Arc, time::Duration};

use rustls::{ClientConfig, ClientConnection, pki_types::ServerName};

use crate::ads::Variant;

/// The longest that one attempt to connect may take where nothing else says so.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Where resources come from. Equal sources share their subscriptions.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// The aggregated stream of `dynamic_resources.ads_config`.
    #[default]
    Ads,
    /// A gRPC stream for each resource type.
    Grpc(GrpcSource),
    /// Polled over HTTP, for each resource type.
    Rest(RestSource),
    /// A file, read again when it changes.
    File(FileSource),
}

impl Source {
    /// The cluster of the bootstrap that has to be there for this source.
    pub fn cluster(&self) -> Option<&str> {
        match self {
            Source::Grpc(grpc) => grpc.service.target.cluster(),
            Source::Rest(rest) => Some(&rest.cluster),
            Source::Ads | Source::File(_) => None,
        }
    }
}

/// A control plane that is spoken to over gRPC (`ApiConfigSource` with `api_type` GRPC, DELTA_GRPC and their aggregated
/// forms).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrpcSource {
    /// The server.
    pub service: GrpcService,
    /// The protocol variant.
    pub variant: Variant,
    /// Only the first request of a stream carries the node.
    pub set_node_on_first_message_only: bool,
    /// How often requests may be sent; `None`: as often as there is something to say.
    pub rate_limit: Option<RateLimit>,
}

/// A token bucket for requests (`RateLimitSettings`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RateLimit {
    /// Requests that may be sent at once.
    pub max_tokens: u32,
    /// The time in which one more may be sent.
    pub fill_interval: Duration,
}

/// A gRPC service (`GrpcService`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrpcService {
    /// Where it is.
    pub target: Target,
    /// `:authority` of the calls.
    pub authority: String,
    /// Headers of the calls.
    pub initial_metadata: Vec<(String, String)>,
    /// The longest message that is taken, in bytes; `None`: the client's own limit.
    pub max_receive_message_length: Option<usize>,
    /// The waits between attempts; `None`: Envoy's for xDS, from 500 ms to 30 s.
    pub backoff: Option<BackoffLimits>,
}

/// Jittered exponential waits (`BackoffStrategy`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackoffLimits {
    /// The upper end of the first wait.
    pub base: Duration,
    /// The upper end of all waits.
    pub max: Duration,
}

/// A server's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A cluster of the bootstrap: a key of [`crate::sources::Config::servers`].
    Cluster(String),
    /// `host:port`, or `unix:` and a path.
    Address(String),
}

impl Target {
    /// What people are shown of it.
    pub(crate) fn shown(&self) -> String {
        match self {
            Target::Cluster(name) => format!("cluster {name}"),
            Target::Address(address) => address.clone(),
        }
    }

    /// The cluster of the bootstrap that it is.
    pub fn cluster(&self) -> Option<&str> {
        match self {
            Target::Cluster(name) => Some(name),
            Target::Address(_) => None,
        }
    }

    /// How it is reached; `None` where `servers` does not have its cluster.
    pub fn server(&self, servers: &BTreeMap<String, Server>) -> Option<Server> {
        match self {
            Target::Cluster(name) => servers.get(name).cloned(),
            Target::Address(address) => Some(Server::plain(vec![address.clone()])),
        }
    }
}

/// A control plane that is polled over HTTP (`ApiConfigSource` with `api_type` REST).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RestSource {
    /// A cluster of the bootstrap.
    pub cluster: String,
    /// Between two polls; a random part of it is added (Envoy's jitter).
    pub refresh_delay: Duration,
    /// The longest that one poll may take.
    pub request_timeout: Duration,
}

/// Resources in a file (`PathConfigSource`).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileSource {
    /// The file: a `DiscoveryResponse`, in binary where the extension is `pb`, else in YAML or JSON.
    pub path: PathBuf,
    /// Where moves are watched for instead of at the file itself.
    pub watched_directory: Option<PathBuf>,
}

/// How a server of the bootstrap is reached.
#[derive(Debug, Clone)]
pub struct Server {
    /// Its addresses, tried in this order: host:port, or `unix:` and a path. A host name is looked up on each attempt.
    pub endpoints: Vec<String>,
    /// The longest that one attempt to connect may take.
    pub connect_timeout: Duration,
    /// How connections are encrypted; `None`: not.
    pub tls: Option<Arc<dyn Tls>>,
    /// It is polled over HTTP/2 instead of HTTP/1.1. gRPC is always over HTTP/2.
    pub http2: bool,
    /// Who counts connections to it and what is asked of it; `None`: nobody.
    pub usage: Option<Arc<dyn Usage>>,
}

impl Server {
    /// A server that is spoken to in plain text.
    pub fn plain(endpoints: Vec<String>) -> Server {
        Server { endpoints, connect_timeout: CONNECT_TIMEOUT, tls: None, http2: false, usage: None }
    }
}

/// Counts what is done with a server. Each call is told once, in this order: an attempt to connect that fails has no
/// [`connected`](Usage::connected), but ends as well.
pub trait Usage: fmt::Debug + Send + Sync {
    /// An attempt to connect begins; `http2` is what is going to be spoken.
    fn connecting(&self, http2: bool);

    /// The connection is there, and took so long.
    fn connected(&self, took: Duration);

    /// There is no connection; `timed_out`: it took too long.
    fn failed(&self, timed_out: bool);

    /// The attempt or the connection has ended, so long after it began.
    fn closed(&self, after: Duration);

    /// A request or a stream of requests begins.
    fn request(&self);

    /// It has ended.
    fn request_ended(&self);
}

/// A request that is under way, until this is dropped.
pub(crate) struct UnderWay(Option<Arc<dyn Usage>>);

impl Server {
    /// A request begins.
    pub(crate) fn request(&self) -> UnderWay {
        self.usage.iter().for_each(|usage| usage.request());
        UnderWay(self.usage.clone())
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.iter().for_each(|usage| usage.request_ended());
    }
}

/// How connections to a server are encrypted.
pub trait Tls: fmt::Debug + Send + Sync {
    /// Asked for each connection, so that certificates may change. `None`: they have not arrived yet, and no connection is
    /// possible. The protocols to offer (ALPN) are set by the transport where the configuration has none.
    ///
    /// With it comes the name that the server is asked for: `authority` is what calls it, `endpoint` its address as in
    /// [`Server::endpoints`], `peer` where it was found. An IP address is not sent.
    fn handshake(
        &self,
        authority: &str,
        endpoint: &str,
        peer: IpAddr,
    ) -> Option<(Arc<ClientConfig>, ServerName<'static>)>;

    /// Told of each handshake.
    fn done(&self, handshake: Result<&ClientConnection, &io::Error>);
}
