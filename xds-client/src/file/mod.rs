//! Resources in files (`path_config_source`): read at the start, and again when something is moved to their place.

use std::{convert::Infallible, sync::Arc};

use envoy_types::pb::envoy::config::core::v3::Node;

use crate::{
    ads::{Counted, Sink, Variant},
    document::{Documents, Encoding, Judged},
    driver::{Came, Driver, Interests},
    json::UnknownFields,
    regular_file,
    source::{FileSource, Source},
    stats::ClientStats,
    watches::{Watch, Watches},
};

/// The largest file taken, in bytes.
const MAX_FILE_BYTES: u64 = crate::grpc::MAX_RESPONSE_BYTES as u64;

/// Reads one type of resources from one file.
pub(crate) struct FileClient<S> {
    file: FileSource,
    documents: Documents,
    driver: Driver<S>,
    watches: Arc<Watches>,
}

impl<S: Sink> FileClient<S> {
    pub(crate) fn new(
        file: FileSource,
        type_url: &str,
        (node, unknown): (Node, UnknownFields),
        sink: Arc<S>,
        watches: Arc<Watches>,
    ) -> Self {
        let documents = Documents::new(type_url, file.path.display().to_string(), unknown);
        let driver = Driver::new(Source::File(file.clone()), node, Variant::Sotw, sink);
        FileClient { file, documents, driver, watches }
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
                event = self.driver.next() => match self.driver.event(event) {
                    Came::Wanted => {
                        self.documents.wanted();
                        self.load().await;
                    }
                    Came::Finished(token, accepted) => self.documents.finished(&token, accepted),
                    Came::Expired => self.documents.wanted(),
                },
                () = moved => self.load().await,
            }
        }
    }

    async fn load(&mut self) {
        // Nobody is there to be asked or answered.
        self.driver.core.outgoing();
        let path = self.file.path.clone();
        // As in Envoy, the extension says how it is written.
        let binary = path.extension().is_some_and(|extension| extension == "pb");
        let encoding = if binary { Encoding::Binary } else { Encoding::Text };
        let read = tokio::task::spawn_blocking(move || regular_file::read(&path, MAX_FILE_BYTES)).await;
        match read.unwrap_or_else(|error| Err(std::io::Error::other(error))) {
            Ok(bytes) => match self.documents.came(&bytes, encoding, &self.driver.stats) {
                Judged::New(response) => self.documents.handed_out(self.driver.take(response)),
                Judged::Same { accepted } => self.counted(Counted::Same { accepted }),
                Judged::Unusable { rejected: true } => self.counted(Counted::Rejected),
                Judged::Unusable { rejected: false } => self.failed(),
            },
            Err(error) => {
                self.documents.failed(format!("cannot read it: {error}"), &self.driver.stats);
                self.failed();
            }
        }
    }

    fn counted(&self, answer: Counted) {
        self.driver.sink.counted(&self.driver.source, self.documents.type_url(), answer);
    }

    fn failed(&self) {
        self.driver.sink.failed(&self.driver.source, Some(self.documents.type_url()));
    }
}

#[cfg(test)]
mod tests;
