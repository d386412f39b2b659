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
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Its name, unique among all clusters.
    pub name: String,
    /// The region of its endpoints. Empty if not known.
    pub region: String,
    /// The zone of its endpoints that state none themselves. Empty if not known.
    pub zone: String,
}

/// What is wrong with one file of a source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileError {
    /// The file.
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
}

/// A consistent view of all clusters.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    /// Counts up with each change, from 0 for the empty registry.
    pub version: u64,
    /// The clusters in the order of the configuration, which decides whose word counts in a conflict.
    pub clusters: Vec<Cluster>,
}

impl Registry {
    /// Whether every source has reported.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.clusters.iter().all(|cluster| cluster.objects.is_some())
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
    updates: mpsc::Sender<(String, SourceUpdate)>,
}

impl RegistryHandle {
    /// Replaces what the registry holds of this cluster.
    ///
    /// # Errors
    /// When the registry is gone.
    pub async fn replace(&self, update: SourceUpdate) -> Result<(), RegistryClosed> {
        self.updates.send((self.cluster.clone(), update)).await.map_err(|_| RegistryClosed)
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
    let clusters =
        clusters.into_iter().map(|info| Cluster { info, objects: None, health: SourceHealth::default() }).collect();
    let mut registry = Registry { version: 0, clusters };
    let (publish, view) = watch::channel(Arc::new(registry.clone()));
    tokio::spawn(async move {
        while let Some((name, SourceUpdate { objects, health })) = inbox.recv().await {
            let Some(cluster) = index.get(&name).and_then(|i| registry.clusters.get_mut(*i)) else { continue };
            cluster.objects = Some(objects);
            cluster.health = health;
            registry.version += 1;
            publish.send_replace(Arc::new(registry.clone()));
        }
    });
    (handles, view)
}
