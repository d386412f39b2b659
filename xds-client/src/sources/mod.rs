//! All sources of resources, each with clients of its own, started when something is wanted of it.
//!
//! The aggregated stream has one client for all types. Any other source has one for each type that is wanted of it,
//! shared by all who want that type of that source (Envoy opens one for each cluster or listener). It ends when nothing
//! is wanted any more. One that panics is started again.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, JoinSet},
};

use crate::{
    ads::{Interest, Sink},
    driver::Interests,
    file::FileClient,
    grpc::{Client, ClientConfig},
    json::UnknownFields,
    resource_type::ResourceType,
    rest::RestClient,
    source::{GrpcSource, Server, Source},
    stats::SourceStats,
    watches::Watches,
};

/// What all clients share.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Who is asking.
    pub node: Node,
    /// The servers that a source may name, by the name of their cluster.
    pub servers: BTreeMap<String, Server>,
    /// Clusters that a source may name by Envoy's rules, and that control planes are not reached by yet.
    pub unsupported: BTreeSet<String>,
    /// Where the aggregated stream comes from.
    pub ads: Option<GrpcSource>,
    /// Notices files that are replaced.
    pub watches: Arc<Watches>,
    /// What becomes of unknown fields in what comes as text: files, and answers to polls.
    pub unknown_fields: UnknownFields,
}

/// Why nothing can be had of the aggregated stream where there is none, in Envoy's words.
const NO_ADS: &str = "ADS must be configured to support an ADS config source";

/// Why a cluster cannot be a control plane's.
pub fn unsupported(cluster: &str) -> String {
    format!("control planes behind '{cluster}', an ORIGINAL_DST or EDS cluster, are not supported by culvert yet")
}

impl Config {
    /// Like [`check`](Self::check), for what the bootstrap itself names: without `ads_config` a source may be ADS all the
    /// same, as in Envoy. Nothing ever comes of it, which the log says.
    ///
    /// # Errors
    /// Why resources cannot be had, for whoever wrote the configuration.
    pub fn check_static(&self, source: &Source, type_url: &str) -> Result<(), String> {
        match (source, &self.ads) {
            (Source::Ads, None) => {
                tracing::warn!(%type_url, "{NO_ADS}: nothing will come of it");
                Ok(())
            }
            _ => self.check(source, type_url),
        }
    }

    /// Whether resources of this type can be had from the source.
    ///
    /// # Errors
    /// Why not, for whoever wrote the configuration.
    pub fn check(&self, source: &Source, type_url: &str) -> Result<(), String> {
        if let Some(name) = source.cluster()
            && !self.servers.contains_key(name)
        {
            if self.unsupported.contains(name) {
                return Err(unsupported(name));
            }
            return Err(format!(
                "must have a statically defined non-EDS cluster: '{name}' does not exist, was added via api, or is an EDS \
                 cluster"
            ));
        }
        match source {
            Source::Ads => match self.ads {
                Some(_) => Ok(()),
                None => Err(NO_ADS.to_owned()),
            },
            Source::Grpc(grpc) => {
                let only = ResourceType::of(type_url);
                let known = only.is_some_and(|only| grpc.variant == crate::ads::Variant::Delta || only.sotw.is_some());
                if known { Ok(()) } else { Err(format!("there is no gRPC service for {type_url}")) }
            }
            Source::Rest(_) => match ResourceType::of(type_url).and_then(|only| only.rest) {
                Some(_) => Ok(()),
                None => Err(format!("there is no REST service for {type_url}")),
            },
            Source::File(_) => Ok(()),
        }
    }
}

/// How what is wanted of a type changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This is wanted, and nothing else.
    To(Interest),
    /// These names are wanted from now on, or not any more, where something else was wanted and still is: costs less than
    /// [`Change::To`] with all names.
    Names(Vec<(String, bool)>),
}

impl Change {
    /// Changes what is wanted.
    fn apply(&self, wanted: &mut Interest) {
        let names = match self {
            Change::To(interest) => return wanted.clone_from(interest),
            Change::Names(names) => names,
        };
        let (all, mut known) = match std::mem::take(wanted) {
            Interest::None => (false, BTreeSet::new()),
            Interest::Wildcard => (true, BTreeSet::new()),
            Interest::Names(known) => (false, known),
            Interest::WildcardAnd(known) => (true, known),
        };
        for (name, is_wanted) in names {
            match is_wanted {
                true => drop(known.insert(name.clone())),
                false => drop(known.remove(name)),
            }
        }
        *wanted = Interest::of(all, known);
    }
}

/// What is wanted of a type from a source, from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The source.
    pub source: Source,
    /// The type.
    pub type_url: String,
    /// What is wanted of it.
    pub change: Change,
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
        self.send(source, type_url.into(), Change::To(interest));
    }

    /// Wants some names more, or less: see [`Change::Names`].
    pub fn set_names(&self, source: Source, type_url: impl Into<String>, names: Vec<(String, bool)>) {
        self.send(source, type_url.into(), Change::Names(names));
    }

    fn send(&self, source: Source, type_url: String, change: Change) {
        // Without a receiver there is no client that could be told.
        let _ = self.0.send(Subscription { source, type_url, change });
    }
}

/// What all clients have besides.
struct Shared {
    stats: Arc<SourceStats>,
    watches: Arc<Watches>,
}

/// A client that runs.
struct Running {
    interests: Interests,
    /// What it was told is wanted, for one that takes its place.
    wanted: BTreeMap<String, Interest>,
    task: AbortHandle,
}

/// The time before a client that panicked is started again: what it panicked of may come again.
const RESTART_WAIT: Duration = Duration::from_secs(1);

/// Runs the clients of all sources. Never returns; drop the future to stop them. What they count is in `stats`.
pub async fn run<S: Sink>(
    config: Config,
    sink: Arc<S>,
    mut wanted: mpsc::UnboundedReceiver<Subscription>,
    stats: Arc<SourceStats>,
) -> Infallible {
    let shared = Shared { stats, watches: Arc::clone(&config.watches) };
    let mut clients: HashMap<(Source, Option<String>), Running> = HashMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let Subscription { source, type_url, change } = tokio::select! {
            Some(subscription) = wanted.recv() => subscription,
            // Others were stopped.
            Some(Err(ended)) = tasks.join_next(), if !tasks.is_empty() => {
                let failed = clients.iter_mut().find(|(_, running)| running.task.id() == ended.id());
                if ended.is_panic() && let Some(((source, only), running)) = failed {
                    tracing::error!(?source, "its client has failed and is started again: {ended}");
                    sink.failed(source, only.as_deref());
                    sink.state(source, false);
                    let place = Place { config: &config, source, only: only.as_deref(), after: RESTART_WAIT };
                    let Some(next) = start(place, &sink, &shared, &mut tasks) else { continue };
                    for (type_url, interest) in &running.wanted {
                        next.interests.set(type_url, interest.clone());
                    }
                    (running.interests, running.task) = (next.interests, next.task);
                }
                continue;
            }
            // Nobody is left who could want anything.
            else => return std::future::pending().await,
        };
        let only = (source != Source::Ads).then(|| type_url.clone());
        let key = (source, only);
        let ends = change == Change::To(Interest::None);
        if ends && key.1.is_some() {
            if let Some(running) = clients.remove(&key) {
                running.task.abort();
                shared.stats.remove(&key.0, key.1.as_deref());
            }
            continue;
        }
        if !clients.contains_key(&key) {
            // Of single names: from a source that could not be had when the first was wanted.
            if ends || matches!(change, Change::Names(_)) {
                continue;
            }
            if let Err(error) = config.check(&key.0, &type_url) {
                tracing::error!(source = ?key.0, %type_url, "nothing can be had from this source: {error}");
                continue;
            }
            let place = Place { config: &config, source: &key.0, only: key.1.as_deref(), after: Duration::ZERO };
            let Some(running) = start(place, &sink, &shared, &mut tasks) else { continue };
            clients.insert(key.clone(), running);
        }
        if let Some(running) = clients.get_mut(&key) {
            change.apply(running.wanted.entry(type_url.clone()).or_default());
            match change {
                Change::To(interest) => running.interests.set(type_url, interest),
                Change::Names(names) => running.interests.set_names(type_url, names),
            }
        }
    }
}

/// A client that is to be started.
struct Place<'a> {
    config: &'a Config,
    source: &'a Source,
    only: Option<&'a str>,
    /// How long it waits.
    after: Duration,
}

/// Starts a client; `None` where the source cannot be reached, which [`Config::check`] has said before.
fn start<S: Sink>(
    Place { config, source, only, after }: Place<'_>,
    sink: &Arc<S>,
    shared: &Shared,
    tasks: &mut JoinSet<Infallible>,
) -> Option<Running> {
    let (sink, node) = (Arc::clone(sink), config.node.clone());
    let unknown = config.unknown_fields;
    let mut spawn = |interests, client: Pin<Box<dyn Future<Output = Infallible> + Send>>| {
        let task = tasks.spawn(async move {
            tokio::time::sleep(after).await;
            client.await
        });
        Some(Running { interests, wanted: BTreeMap::new(), task })
    };
    let grpc = match source {
        Source::Ads => config.ads.as_ref()?,
        Source::Grpc(grpc) => grpc,
        Source::Rest(rest) => {
            let server = config.servers.get(&rest.cluster)?.clone();
            let client = RestClient::new(rest.clone(), server, ResourceType::of(only?)?, (node, unknown), sink)?;
            shared.stats.insert(source, only, client.stats());
            return spawn(client.interests(), Box::pin(client.run()));
        }
        Source::File(file) => {
            let client = FileClient::new(file.clone(), only?, (node, unknown), sink, Arc::clone(&shared.watches));
            shared.stats.insert(source, only, client.stats());
            return spawn(client.interests(), Box::pin(client.run()));
        }
    };
    let server = grpc.service.target.server(&config.servers)?;
    let only_type = only.and_then(ResourceType::of);
    let client_config = ClientConfig { source: source.clone(), server, grpc: grpc.clone(), node, only: only_type };
    let client = Client::new(client_config, sink);
    shared.stats.insert(source, only, client.stats());
    spawn(client.interests(), Box::pin(client.run()))
}

#[cfg(test)]
mod tests;
