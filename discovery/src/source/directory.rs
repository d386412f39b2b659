//! A directory of Kubernetes manifests as a cluster.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use culvert_kube_api::directory;
use tokio::task::block_in_place;

use super::{Source, SourceError};
use crate::kubernetes::manifest;
use crate::kubernetes::{ObjectKey, Objects};
use crate::registry::{FileError, RegistryHandle, SourceHealth, SourceUpdate};

/// How often a directory is read without an event, for file systems that do not report each change.
const RESCAN: Duration = Duration::from_secs(30);

/// A directory of manifests.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// A source that reads `path`, which need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Source for Directory {
    async fn run(self, registry: RegistryHandle) -> Result<(), SourceError> {
        let parse = |text: &str| manifest::parse(text).map_err(|error| error.to_string());
        let mut directory = directory::Directory::new(self.path, RESCAN, parse)?;
        let mut stale_since = None;
        loop {
            if block_in_place(|| directory.read())
                && registry.replace(report(&directory, &mut stale_since)).await.is_err()
            {
                return Ok(());
            }
            directory.changed().await;
        }
    }
}

/// The whole picture. Of an object in two files, the file whose name sorts last counts, as with `kubectl apply`.
fn report(directory: &directory::Directory<Objects>, stale_since: &mut Option<jiff::Timestamp>) -> SourceUpdate {
    let error = directory.fault().map(str::to_owned);
    *stale_since = error.as_ref().map(|_| stale_since.unwrap_or_else(jiff::Timestamp::now));
    let mut objects = Objects::default();
    let mut warnings = Vec::new();
    let mut file_errors = Vec::new();
    for (path, file) in directory.files() {
        if let Some(found) = &file.good {
            merge(Arc::make_mut(&mut objects.services), &found.services, "Service", path, &mut warnings);
            merge(Arc::make_mut(&mut objects.slices), &found.slices, "EndpointSlice", path, &mut warnings);
            merge(Arc::make_mut(&mut objects.pods), &found.pods, "Pod", path, &mut warnings);
            merge(Arc::make_mut(&mut objects.nodes), &found.nodes, "Node", path, &mut warnings);
            merge(Arc::make_mut(&mut objects.manifests), &found.manifests, "ServiceManifest", path, &mut warnings);
            merge(Arc::make_mut(&mut objects.secrets), &found.secrets, "Secret", path, &mut warnings);
        }
        if let Some(error) = &file.error {
            file_errors.push(FileError {
                file: path.display().to_string(),
                error: error.clone(),
                last_good_in_force: file.good.is_some(),
            });
        }
    }
    let health = SourceHealth {
        location: directory.path().display().to_string(),
        stale: error.is_some(),
        error,
        stale_since: stale_since.map(|since| format!("{since:.0}")),
        file_errors,
        warnings,
    };
    SourceUpdate { objects: Arc::new(objects), health }
}

fn merge<T: Clone>(
    all: &mut BTreeMap<ObjectKey, T>,
    of_file: &BTreeMap<ObjectKey, T>,
    kind: &str,
    path: &Path,
    warnings: &mut Vec<String>,
) {
    for (key, object) in of_file {
        if all.insert(key.clone(), object.clone()).is_some() {
            warnings.push(format!("{kind} {key} is in several files; the one in {} counts", path.display()));
        }
    }
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
