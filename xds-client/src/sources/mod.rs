//! All sources of resources, each with a client of its own, started when something is wanted of it.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    sync::Arc,
};

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::sync::mpsc;

use crate::{
    ads::{Interest, Sink},
    grpc::{AdsStats, Client, ClientConfig, Interests},
    source::{GrpcSource, Server, Source},
};

/// What all clients share.
#[derive(Debug, Clone)]
pub struct Config {
    /// Who is asking.
    pub node: Node,
    /// The servers that a source may name, by the name of their cluster.
    pub servers: BTreeMap<String, Server>,
    /// Where the aggregated stream comes from.
    pub ads: Option<GrpcSource>,
}

/// What is wanted of a type from a source, from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The source.
    pub source: Source,
    /// The type.
    pub type_url: String,
    /// What is wanted of it.
    pub interest: Interest,
}

/// Changes what is wanted. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Subscriptions(mpsc::UnboundedSender<Subscription>);

impl Subscriptions {
    /// A handle, and what it is told.
    pub fn channel() -> (Subscriptions, mpsc::UnboundedReceiver<Subscription>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Subscriptions(sender), receiver)
    }

    /// Sets what is wanted of a type from a source.
    pub fn set(&self, source: Source, type_url: impl Into<String>, interest: Interest) {
        // Without a receiver there is no client that could be told.
        let _ = self.0.send(Subscription { source, type_url: type_url.into(), interest });
    }
}

/// Runs the clients of all sources. Never returns; drop the future to stop them.
///
/// `stats` is called with the counters of each client that is started.
pub async fn run<S: Sink>(
    config: Config,
    sink: Arc<S>,
    mut wanted: mpsc::UnboundedReceiver<Subscription>,
    mut stats: impl FnMut(&Source, Arc<AdsStats>) + Send,
) -> Infallible {
    let mut clients: HashMap<Source, Interests> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    while let Some(Subscription { source, type_url, interest }) = wanted.recv().await {
        if !clients.contains_key(&source) {
            if interest == Interest::None {
                continue;
            }
            let Some(client) = client(&config, &source, Arc::clone(&sink)) else {
                tracing::error!(?source, "nothing can be had from this source");
                continue;
            };
            stats(&source, client.stats());
            clients.insert(source.clone(), client.interests());
            tasks.spawn(client.run());
        }
        if let Some(client) = clients.get(&source) {
            client.set(type_url, interest);
        }
    }
    // Nobody is left who could want anything: what is wanted already goes on.
    std::future::pending().await
}

fn client<S: Sink>(config: &Config, source: &Source, sink: Arc<S>) -> Option<Client<S>> {
    let grpc = match source {
        Source::Ads => config.ads.as_ref()?,
        _ => return None,
    };
    let server = grpc.service.target.server(&config.servers)?;
    let config = ClientConfig { source: source.clone(), server, grpc: grpc.clone(), node: config.node.clone() };
    Some(Client::new(config, sink))
}
