//! The registry: what every source said last, joined in one place.
//!
//! One task owns the state. Sources talk to it through a [`RegistryHandle`]; whoever wants to know watches
//! [`Registry`] snapshots through a `tokio::sync::watch` channel, which keeps only the newest one.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;
use tokio::sync::{mpsc, watch};

use crate::kubernetes::Objects;

/// How many updates of sources may wait for the owner task.
const UPDATE_QUEUE: usize = 64;

/// A cluster that a source describes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Its name, unique among all clusters.
    pub name: String,
    /// The region of its endpoints. Empty if not known.
    pub region: String,
    /// The zone of its endpoints that state none themselves. Empty if not known.
    pub zone: String,
    /// Whether its services are services of their own, rather than one with those of their names in other clusters.
    pub apart: bool,
}

/// What is wrong with one file of a source, or with one object of an API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileError {
    /// The file, or the API server.
    pub file: String,
    /// One line with object and field.
    pub error: String,
    /// Whether an earlier version of the file is still in force.
    pub last_good_in_force: bool,
}

/// How a source is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SourceHealth {
    /// Where the source reads from.
    pub location: String,
    /// Whether the source cannot be read at present, so that its last objects stay in force.
    pub stale: bool,
    /// Why it cannot be read.
    pub error: Option<String>,
    /// Since when it cannot be read, in RFC 3339.
    pub stale_since: Option<String>,
    /// Files that are not in force as they are.
    pub file_errors: Vec<FileError>,
    /// Things to know that change nothing, such as an object that two files define.
    pub warnings: Vec<String>,
}

/// What a source says about its cluster: always the whole picture.
#[derive(Debug, Clone)]
pub struct SourceUpdate {
    /// The cluster's objects.
    pub objects: Arc<Objects>,
    /// How the source is doing.
    pub health: SourceHealth,
}

/// One cluster in the registry.
#[derive(Debug, Clone)]
pub struct Cluster {
    /// What is configured about it.
    pub info: ClusterInfo,
    /// Its objects; `None` until its source reported for the first time.
    pub objects: Option<Arc<Objects>>,
    /// How its source is doing.
    pub health: SourceHealth,
    /// Whether an operator has taken it out: its endpoints drain.
    pub drained: bool,
}

/// A consistent view of all clusters.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    /// Counts up with each change, from 0 for the empty registry.
    pub version: u64,
    /// The clusters in the order of the configuration, which decides whose word counts in a conflict.
    pub clusters: Vec<Cluster>,
    /// Whether the wait for clusters that have not been read yet is over.
    pub waited: bool,
}

impl Registry {
    /// Whether the mesh can be served: every cluster has been read, or at least one when the wait is over. Never
    /// before one has been read, since an empty mesh would have proxies forget everything.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        let mut read = self.clusters.iter().map(|cluster| cluster.objects.is_some());
        if self.waited { read.any(|read| read) } else { read.all(|read| read) }
    }
}

/// The registry cannot be reached any more: the process is shutting down.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the registry has ended")]
pub struct RegistryClosed;

/// A source's way to report on one cluster.
#[derive(Debug, Clone)]
pub struct RegistryHandle {
    cluster: String,
    updates: mpsc::Sender<Message>,
}

/// What the owner task is told.
#[derive(Debug)]
enum Message {
    /// A source's whole picture of a cluster.
    Update(String, SourceUpdate),
    /// A source's state, when nothing else changed.
    Health(String, SourceHealth),
    /// An operator takes a cluster out, or back in.
    Drained(String, bool),
    /// The wait for clusters that have not been read yet is over.
    Waited,
}

impl RegistryHandle {
    /// Replaces what the registry holds of this cluster.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn replace(&self, update: SourceUpdate) -> Result<(), RegistryClosed> {
        self.updates.send(Message::Update(self.cluster.clone(), update)).await.map_err(|_| RegistryClosed)
    }

    /// Says how the source is doing; what it has read before stays in force, if it has.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn health(&self, health: SourceHealth) -> Result<(), RegistryClosed> {
        self.updates.send(Message::Health(self.cluster.clone(), health)).await.map_err(|_| RegistryClosed)
    }

    /// A way to say what concerns no source.
    #[must_use]
    pub fn control(&self) -> RegistryControl {
        RegistryControl { updates: self.updates.downgrade() }
    }
}

/// What operators and start-up tell the registry. It does not keep the registry alive.
#[derive(Debug, Clone)]
pub struct RegistryControl {
    updates: mpsc::WeakSender<Message>,
}

impl RegistryControl {
    /// Takes a cluster out, or back in.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn set_drained(&self, cluster: &str, drained: bool) -> Result<(), RegistryClosed> {
        self.send(Message::Drained(cluster.to_owned(), drained)).await
    }

    /// Ends the wait for clusters that have not been read yet.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn stop_waiting(&self) -> Result<(), RegistryClosed> {
        self.send(Message::Waited).await
    }

    async fn send(&self, message: Message) -> Result<(), RegistryClosed> {
        let updates = self.updates.upgrade().ok_or(RegistryClosed)?;
        updates.send(message).await.map_err(|_| RegistryClosed)
    }
}

/// Starts the owner task for these clusters. Gives a handle per cluster, in order, and the view.
/// The task ends when all handles are dropped.
#[must_use]
pub fn start(clusters: Vec<ClusterInfo>) -> (Vec<RegistryHandle>, watch::Receiver<Arc<Registry>>) {
    let (updates, mut inbox) = mpsc::channel(UPDATE_QUEUE);
    let handles =
        clusters.iter().map(|info| RegistryHandle { cluster: info.name.clone(), updates: updates.clone() }).collect();
    let index: BTreeMap<String, usize> = clusters.iter().enumerate().map(|(i, c)| (c.name.clone(), i)).collect();
    let clusters = clusters
        .into_iter()
        .map(|info| Cluster { info, objects: None, health: SourceHealth::default(), drained: false })
        .collect();
    let mut registry = Registry { version: 0, clusters, waited: false };
    let (publish, view) = watch::channel(Arc::new(registry.clone()));
    tokio::spawn(async move {
        while let Some(message) = inbox.recv().await {
            apply(&mut registry, &index, message);
            // What waits already goes into the same view: each one may be made into a whole mesh.
            while let Ok(message) = inbox.try_recv() {
                apply(&mut registry, &index, message);
            }
            registry.version += 1;
            publish.send_replace(Arc::new(registry.clone()));
        }
    });
    (handles, view)
}

fn apply(registry: &mut Registry, index: &BTreeMap<String, usize>, message: Message) {
    let name = match &message {
        Message::Waited => {
            registry.waited = true;
            return;
        }
        Message::Update(name, _) | Message::Health(name, _) | Message::Drained(name, _) => name,
    };
    let Some(cluster) = index.get(name).and_then(|i| registry.clusters.get_mut(*i)) else { return };
    match message {
        Message::Update(_, SourceUpdate { objects, health }) => {
            cluster.objects = Some(objects);
            cluster.health = health;
        }
        Message::Health(_, health) => cluster.health = health,
        Message::Drained(_, drained) => cluster.drained = drained,
        Message::Waited => {}
    }
}
