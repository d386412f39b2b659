//! Where resources come from: Envoy's `ConfigSource`, checked.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use crate::ads::Variant;

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

/// A control plane that is spoken to over gRPC (`ApiConfigSource` with `api_type` GRPC, DELTA_GRPC and their aggregated
/// forms).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrpcSource {
    /// The servers, the first of which is preferred.
    pub service: GrpcService,
    /// The protocol variant.
    pub variant: Variant,
    /// Only the first request of a stream carries the node.
    pub set_node_on_first_message_only: bool,
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
}

/// A server's address.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A cluster of the bootstrap: a key of [`crate::sources::Config::servers`].
    Cluster(String),
    /// `host:port`.
    Address(String),
}

impl Target {
    /// How it is reached; `None` where `servers` does not have its cluster.
    pub fn server(&self, servers: &BTreeMap<String, Server>) -> Option<Server> {
        match self {
            Target::Cluster(name) => servers.get(name).cloned(),
            Target::Address(address) => {
                Some(Server { endpoints: vec![address.clone()], connect_timeout: crate::grpc::CONNECT_TIMEOUT })
            }
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
    /// The file: a `DiscoveryResponse` in YAML, JSON, or binary protobuf by its extension.
    pub path: PathBuf,
    /// Where moves are watched for instead of at the file itself.
    pub watched_directory: Option<PathBuf>,
}

/// How a server of the bootstrap is reached.
#[derive(Debug, Clone)]
pub struct Server {
    /// Its addresses as host:port, tried in this order. A host name is looked up on each attempt.
    pub endpoints: Vec<String>,
    /// The longest that one attempt to connect may take.
    pub connect_timeout: Duration,
}
