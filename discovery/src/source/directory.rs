//! A directory of Kubernetes manifests as a cluster.
//!
//! Files named `*.yaml`, `*.yml` and `*.json` directly in the directory count; hidden files and editors' temporary
//! files do not. An edit, a rename and a deletion are events; the whole directory is read again after each burst of
//! them, and only files whose bytes changed are parsed. A file that cannot be used keeps its last good version in force.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tokio::task::block_in_place;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::{Source, SourceError};
use crate::kubernetes::manifest::{self, MAX_MANIFEST_BYTES};
use crate::kubernetes::{ObjectKey, Objects};
use crate::registry::{FileError, RegistryHandle, SourceHealth, SourceUpdate};

/// How long a burst of events must be over before the directory is read.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How long to wait for a writer that has not closed its file: half a file must not count as an edit.
const WRITER_PATIENCE: Duration = Duration::from_secs(1);
/// How often a directory that cannot be read is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a directory is read without an event, for file systems that do not report each change.
const RESCAN: Duration = Duration::from_secs(30);
/// Events that may wait while the directory is read. More than that need not be known: it is read as a whole.
const EVENT_QUEUE: usize = 1024;

/// A directory of manifests.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
    stale_since: Option<jiff::Timestamp>,
}

/// What is known of one manifest file.
#[derive(Debug, Default)]
struct FileState {
    /// The bytes that were read last, to see whether they changed. `None` if they could not be read.
    text: Option<Vec<u8>>,
    /// The last good version.
    objects: Option<Objects>,
    /// Why the newest version is not in force.
    error: Option<String>,
}

impl Directory {
    /// A source that reads `path`, which need not be there yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), files: BTreeMap::new(), stale_since: None }
    }

    /// Reads the directory; gives whether anything changed.
    fn scan(&mut self) -> Result<bool, String> {
        let mut seen = BTreeSet::new();
        let entries = std::fs::read_dir(&self.path).map_err(|error| format!("cannot read the directory: {error}"))?;
        let mut changed = false;
        for entry in entries {
            let path = entry.map_err(|error| format!("cannot read the directory: {error}"))?.path();
            if !is_manifest(&path) {
                continue;
            }
            match read_bounded(&path) {
                Ok(text) => changed |= self.files.entry(path.clone()).or_default().update(text, &path),
                // Deleted since it was listed.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(error) => changed |= self.files.entry(path.clone()).or_default().unreadable(&error, &path),
            }
            seen.insert(path);
        }
        let before = self.files.len();
        self.files.retain(|path, _| seen.contains(path));
        Ok(changed || self.files.len() != before)
    }

    /// The whole picture. Of an object in two files, the file whose name sorts last counts, as with `kubectl apply`.
    fn report(&mut self, stale: Option<String>) -> SourceUpdate {
        self.stale_since = stale.as_ref().map(|_| self.stale_since.unwrap_or_else(jiff::Timestamp::now));
        let stale_since = self.stale_since.map(|since| format!("{since:.0}"));
        let mut objects = Objects::default();
        let mut warnings = Vec::new();
        let mut file_errors = Vec::new();
        for (path, file) in &self.files {
            if let Some(found) = &file.objects {
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
                    last_good_in_force: file.objects.is_some(),
                });
            }
        }
        let location = self.path.display().to_string();
        let health =
            SourceHealth { location, stale: stale.is_some(), error: stale, stale_since, file_errors, warnings };
        SourceUpdate { objects: Arc::new(objects), health }
    }
}

impl FileState {
    /// Takes in the file's present bytes; gives whether anything changed.
    fn update(&mut self, text: Vec<u8>, path: &Path) -> bool {
        if self.text.as_ref() == Some(&text) {
            return false;
        }
        let parsed = match std::str::from_utf8(&text) {
            Ok(text) => manifest::parse(text).map_err(|error| error.to_string()),
            Err(error) => Err(format!("not UTF-8: {error}")),
        };
        self.text = Some(text);
        match parsed {
            Ok(objects) => {
                self.objects = Some(objects);
                self.error = None;
                true
            }
            Err(error) => self.fail(&error, path),
        }
    }

    /// Notes that the file cannot be read; its next reading is news whatever it says.
    fn unreadable(&mut self, error: &std::io::Error, path: &Path) -> bool {
        self.text = None;
        self.fail(error, path)
    }

    /// Notes why the newest version is not in force; gives whether that is news.
    fn fail(&mut self, error: &impl Display, path: &Path) -> bool {
        let error = error.to_string();
        if self.error.as_ref() == Some(&error) {
            return false;
        }
        let consequence = match self.objects {
            Some(_) => "its last good version stays in force",
            None => "none of its objects are in force",
        };
        warn!("{}: {error}; {consequence}", path.display());
        self.error = Some(error);
        true
    }
}

impl Source for Directory {
    async fn run(mut self, registry: RegistryHandle) -> Result<(), SourceError> {
        let (events, mut inbox) = mpsc::channel(EVENT_QUEUE);
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // A full queue is fine: the directory is going to be read anyway.
            let _ = events.try_send(event);
        })
        .map_err(SourceError::Watcher)?;
        let mut watched = false;
        let mut reported_stale = None;
        let mut first = true;
        loop {
            // Watch before reading, so that nothing is missed in between.
            let outcome = self.watch(&mut watcher, &mut watched).and_then(|()| block_in_place(|| self.scan()));
            let stale = outcome.as_ref().err().cloned();
            let changed = outcome.unwrap_or(false);
            if changed || first || stale != reported_stale {
                match &stale {
                    Some(error) => warn!("{}: {error}; the last objects stay in force", self.path.display()),
                    None if reported_stale.is_some() => info!("{}: can be read again", self.path.display()),
                    None => {}
                }
                if registry.replace(self.report(stale.clone())).await.is_err() {
                    return Ok(());
                }
                first = false;
                reported_stale.clone_from(&stale);
            }
            if stale.is_some() {
                let _ = watcher.unwatch(&self.path);
                watched = false;
            }
            let wait = if stale.is_some() { RETRY } else { RESCAN };
            if wait_for_change(&mut inbox, wait).await == Wake::WatchLost {
                let _ = watcher.unwatch(&self.path);
                watched = false;
            }
        }
    }
}

impl Directory {
    fn watch(&self, watcher: &mut RecommendedWatcher, watched: &mut bool) -> Result<(), String> {
        if !*watched {
            watcher
                .watch(&self.path, RecursiveMode::NonRecursive)
                .map_err(|error| format!("cannot watch the directory: {error}"))?;
            *watched = true;
        }
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Wake {
    /// The directory may have changed.
    Read,
    /// The directory itself was removed or renamed.
    WatchLost,
}

/// Waits for the end of the next burst of events, or for `at_most`.
async fn wait_for_change(inbox: &mut mpsc::Receiver<notify::Result<notify::Event>>, at_most: Duration) -> Wake {
    let mut deadline = Instant::now() + at_most;
    let mut wake = Wake::Read;
    let mut being_written = BTreeSet::new();
    let mut burst_end = None;
    loop {
        let event = tokio::select! {
            event = inbox.recv() => event,
            () = sleep_until(deadline) => return wake,
        };
        // The watcher lives as long as its source, so its channel does not end; without it only time is left.
        let Some(event) = event else {
            sleep_until(deadline).await;
            return wake;
        };
        let now = Instant::now();
        match event {
            Ok(event) => {
                if !note_event(&event, &mut being_written, &mut wake) {
                    continue;
                }
            }
            Err(error) => warn!("the directory watcher reported: {error}; reading the directory"),
        }
        let patience = *burst_end.get_or_insert(now + WRITER_PATIENCE);
        deadline = if being_written.is_empty() { patience.min(now + DEBOUNCE) } else { patience };
    }
}

/// Takes in one event; gives whether it is a reason to read the directory.
fn note_event(event: &notify::Event, being_written: &mut BTreeSet<PathBuf>, wake: &mut Wake) -> bool {
    match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
            for path in &event.paths {
                being_written.remove(path);
            }
        }
        // Our own reading causes these.
        EventKind::Access(_) => return false,
        EventKind::Modify(ModifyKind::Data(_)) => {
            being_written.extend(event.paths.iter().filter(|path| is_manifest(path)).cloned());
        }
        EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(_)) => {
            // A directory that is removed or renamed away reports its own path, which is no manifest. Watching
            // anew costs nothing when it was something else.
            if event.paths.iter().any(|path| !is_manifest(path)) {
                *wake = Wake::WatchLost;
            }
            for path in &event.paths {
                being_written.remove(path);
            }
        }
        _ => {}
    }
    true
}

/// Whether a file's name makes it a manifest: `*.yaml`, `*.yml` or `*.json`, and not hidden.
fn is_manifest(path: &Path) -> bool {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return false };
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str());
    !name.starts_with('.') && matches!(extension, Some("yaml" | "yml" | "json"))
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    use std::io::Read as _;
    // Looked at before it is opened: opening a pipe waits for a writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    let mut text = Vec::new();
    std::fs::File::open(path)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(std::io::Error::other(format!("larger than {MAX_MANIFEST_BYTES} bytes; split it")));
    }
    Ok(text)
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
