//! Where services and endpoints come from.

pub mod api_server;
pub mod directory;

use std::future::Future;

use culvert_kube_api::directory::WatchError;

use crate::registry::RegistryHandle;

/// Describes one cluster to the registry, for as long as it runs.
pub trait Source: Send + 'static {
    /// Reports the first picture and then every change, until the registry is gone.
    ///
    /// A source that loses what it reads from keeps running: it reports itself stale, with its last objects, and
    /// tries again.
    ///
    /// # Errors
    /// Only what no retry can mend.
    fn run(self, registry: RegistryHandle) -> impl Future<Output = Result<(), SourceError>> + Send;
}

/// Why a source ended.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No file system watcher could be made.
    #[error(transparent)]
    Watcher(#[from] WatchError),
}
