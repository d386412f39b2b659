//! Resources in files (`path_config_source`): read at the start, and again when something is moved to their place.

use std::{convert::Infallible, path::Path, sync::Arc};

use envoy_types::pb::envoy::{config::core::v3::Node, service::discovery::v3::DiscoveryResponse};
use prost::Message;

use crate::{
    ads::{Response, Sink, Variant},
    driver::{Came, Driver, Interests},
    json, regular_file,
    source::{FileSource, Source},
    stats::ClientStats,
    watches::{Watch, Watches},
};

/// The largest file taken, in bytes.
const MAX_FILE_BYTES: u64 = crate::grpc::MAX_RESPONSE_BYTES as u64;

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("cannot read it: {0}")]
    Read(#[from] std::io::Error),
    #[error("it is not UTF-8: {0}")]
    Text(#[from] std::string::FromUtf8Error),
    #[error("{0}")]
    Parse(#[from] json::ConfigError),
    #[error("it is not a DiscoveryResponse: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Reads one type of resources from one file.
pub(crate) struct FileClient<S> {
    file: FileSource,
    type_url: String,
    driver: Driver<S>,
    watches: Arc<Watches>,
}

impl<S: Sink> FileClient<S> {
    pub(crate) fn new(file: FileSource, type_url: &str, node: Node, sink: Arc<S>, watches: Arc<Watches>) -> Self {
        let driver = Driver::new(Source::File(file.clone()), node, Variant::Sotw, sink);
        FileClient { file, type_url: type_url.to_owned(), driver, watches }
    }

    pub(crate) fn stats(&self) -> Arc<ClientStats> {
        Arc::clone(&self.driver.stats)
    }

    pub(crate) fn interests(&self) -> Interests {
        self.driver.interests()
    }

    /// Reads the file whenever it was replaced, or something else is wanted of it; for ever.
    pub(crate) async fn run(mut self) -> Infallible {
        let FileSource { path, watched_directory } = self.file.clone();
        let watch = match &watched_directory {
            Some(directory) => {
                let watch = Watch::new(Arc::default());
                self.watches.directory(directory, &watch).map(|()| watch)
            }
            None => self.watches.file(&path),
        };
        let changed = match watch {
            Ok(changed) => Some(changed),
            Err(error) => {
                tracing::error!(path = %path.display(), "cannot watch it, changes will not be seen: {error}");
                None
            }
        };
        self.driver.core.connected();
        loop {
            let moved = async {
                match &changed {
                    Some(changed) => changed.moved().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = self.driver.next() => {
                    if self.driver.event(event) == Came::Wanted {
                        self.load(&path).await;
                    }
                }
                () = moved => self.load(&path).await,
            }
        }
    }

    async fn load(&mut self, path: &Path) {
        // Nobody is there to be asked or answered.
        self.driver.core.outgoing();
        match read(path).await {
            Ok(response) => {
                let response = DiscoveryResponse { type_url: self.type_url.clone(), nonce: String::new(), ..response };
                self.driver.take(Response::Sotw(response));
            }
            Err(error) => {
                tracing::warn!(path = %path.display(), "file not used, configuration in force stays: {error}");
                self.driver.stats.of(&self.type_url).failed();
            }
        }
    }
}

/// A `DiscoveryResponse` in the form that the extension says, as in Envoy: `.pb` is binary, anything else YAML or JSON.
async fn read(path: &Path) -> Result<DiscoveryResponse, Unusable> {
    // Opening does not wait: see there.
    let bytes = regular_file::read(path, MAX_FILE_BYTES)?;
    match path.extension().and_then(|it| it.to_str()) {
        Some("pb") => Ok(DiscoveryResponse::decode(bytes.as_slice())?),
        _ => Ok(json::from_yaml(&String::from_utf8(bytes)?)?),
    }
}

#[cfg(test)]
mod tests;
