//! A directory of manifests, read again whenever it changes.
//!
//! Files named `*.yaml`, `*.yml` and `*.json` directly in the directory count; hidden files and editors' temporary
//! files do not. An edit, a rename and a deletion are events; the whole directory is read again after each burst of
//! them, and only files whose bytes changed are parsed. A file that cannot be used keeps its last good version in force,
//! and a directory that cannot be read keeps all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use notify::event::{AccessKind, AccessMode, ModifyKind};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

/// The largest file that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 32 * 1024 * 1024;

/// How long a burst of events must be over before the directory is read.
const DEBOUNCE: Duration = Duration::from_millis(20);
/// How long to wait for a writer that has not closed its file: half a file must not count as an edit.
const WRITER_PATIENCE: Duration = Duration::from_secs(1);
/// How often a directory that cannot be read or watched is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Events that may wait while the directory is read. More than that need not be known: it is read as a whole.
const EVENT_QUEUE: usize = 1024;

/// How the text of a file becomes what is made of it, or why it does not.
type Parse<T> = Box<dyn FnMut(&str) -> Result<T, String> + Send>;

/// A directory of manifests, and what was made of its files.
pub struct Directory<T> {
    path: PathBuf,
    rescan: Duration,
    parse: Parse<T>,
    files: BTreeMap<PathBuf, File<T>>,
    /// Why it cannot be read.
    fault: Option<String>,
    /// Whether it was read once, or at least tried.
    was_read: bool,
    watcher: RecommendedWatcher,
    inbox: mpsc::Receiver<notify::Result<notify::Event>>,
    /// Which directory is watched, by its device and number: another one may have its path by now.
    watched: Option<(u64, u64)>,
    /// Why it cannot be watched.
    unwatchable: Option<String>,
}

/// What is known of one file.
#[derive(Debug)]
pub struct File<T> {
    /// The bytes that were read last, to see whether they changed. `None` if they could not be read.
    text: Option<Vec<u8>>,
    /// What was made of the last good version, which stays in force.
    pub good: Option<T>,
    /// Why the newest version is not in force.
    pub error: Option<String>,
}

/// No watcher of file systems could be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch directories: {0}; see fs.inotify.max_user_instances and max_user_watches in sysctl")]
pub struct WatchError(#[source] notify::Error);

impl<T> fmt::Debug for Directory<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Directory").field("path", &self.path).finish_non_exhaustive()
    }
}

impl<T> Directory<T> {
    /// A directory, which need not be there yet, and what makes something of a file's text. `rescan` is how often it is
    /// read without an event, for file systems that do not report each change. Nothing is read yet.
    ///
    /// # Errors
    /// The system lets us watch nothing.
    pub fn new(
        path: impl Into<PathBuf>,
        rescan: Duration,
        parse: impl FnMut(&str) -> Result<T, String> + Send + 'static,
    ) -> Result<Self, WatchError> {
        let (events, inbox) = mpsc::channel(EVENT_QUEUE);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // A full queue is fine: the directory is going to be read anyway.
            let _ = events.try_send(event);
        })
        .map_err(WatchError)?;
        Ok(Self {
            path: path.into(),
            rescan,
            parse: Box::new(parse),
            files: BTreeMap::new(),
            fault: None,
            was_read: false,
            watcher,
            inbox,
            watched: None,
            unwatchable: None,
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its files, by their paths and in the order of these.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &File<T>)> {
        self.files.iter().map(|(path, file)| (&**path, file))
    }

    /// Why it cannot be read at present, so that its last content stays in force.
    #[must_use]
    pub fn fault(&self) -> Option<&str> {
        self.fault.as_deref()
    }

    /// Reads the directory, which blocks; gives whether there is any news, as there is the first time. What goes wrong is
    /// said in the log, once.
    pub fn read(&mut self) -> bool {
        // Watched before it is read, so that nothing is missed in between.
        self.watch();
        let (changed, fault) = match self.scan() {
            Ok(changed) => (changed, None),
            Err(error) => (false, Some(format!("cannot read the directory: {error}"))),
        };
        let turned = fault != self.fault;
        match &fault {
            Some(error) if turned => warn!("{}: {error}; what it held last stays in force", self.path.display()),
            None if turned => info!("{}: can be read again", self.path.display()),
            _ => {}
        }
        self.fault = fault;
        let first = !std::mem::replace(&mut self.was_read, true);
        changed || turned || first
    }

    /// Waits until it may have changed, within a runtime of Tokio's with timers: for a burst of events and its end, or until
    /// it is time to look anyway. To be followed by [`Self::read`].
    pub async fn changed(&mut self) {
        let fails = self.fault.is_some() || self.watched.is_none();
        let at_most = if fails { RETRY.min(self.rescan) } else { self.rescan };
        if wait_for_change(&mut self.inbox, at_most).await == Wake::WatchLost {
            self.unwatch();
        }
    }

    /// Watches the directory that has the path now.
    fn watch(&mut self) {
        let identity = fs::metadata(&self.path).ok().map(|data| (data.dev(), data.ino()));
        if self.watched.is_some() && self.watched == identity {
            return;
        }
        self.unwatch();
        if identity.is_none() {
            // Reading it says why.
            return;
        }
        match self.watcher.watch(&self.path, RecursiveMode::NonRecursive) {
            Ok(()) => (self.watched, self.unwatchable) = (identity, None),
            Err(error) => {
                let error = error.to_string();
                if self.unwatchable.as_ref() != Some(&error) {
                    warn!("{}: cannot be watched: {error}; changes are found out late", self.path.display());
                }
                self.unwatchable = Some(error);
            }
        }
    }

    fn unwatch(&mut self) {
        if self.watched.take().is_some() {
            // Fails where the watch went with the directory.
            let _ = self.watcher.unwatch(&self.path);
        }
    }

    /// Reads all files; gives whether anything changed.
    fn scan(&mut self) -> io::Result<bool> {
        let mut seen = BTreeSet::new();
        let mut changed = false;
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            if !is_manifest(&path) {
                continue;
            }
            let text = read_bounded(&path);
            let is_missing = text.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            let text = match is_missing {
                // What it should name may hold what nobody knows of.
                true if path.is_symlink() => Err(io::Error::other("a symbolic link to nothing")),
                // Deleted since it was listed.
                true => continue,
                false => text,
            };
            let file = self.files.entry(path.clone()).or_insert(File { text: None, good: None, error: None });
            changed |= match text {
                Ok(text) => file.update(text, &path, &mut self.parse),
                Err(error) => file.unreadable(&error, &path),
            };
            seen.insert(path);
        }
        let before = self.files.len();
        self.files.retain(|path, _| seen.contains(path));
        Ok(changed || self.files.len() != before)
    }
}

impl<T> File<T> {
    /// Takes in the file's present bytes; gives whether anything changed.
    fn update(&mut self, text: Vec<u8>, path: &Path, parse: &mut Parse<T>) -> bool {
        if self.text.as_ref() == Some(&text) {
            return false;
        }
        let parsed = match std::str::from_utf8(&text) {
            Ok(text) => parse(text),
            Err(error) => Err(format!("not UTF-8: {error}")),
        };
        self.text = Some(text);
        match parsed {
            Ok(good) => {
                (self.good, self.error) = (Some(good), None);
                true
            }
            Err(error) => self.fail(error, path),
        }
    }

    /// Notes that the file cannot be read; its next reading is news whatever it says.
    fn unreadable(&mut self, error: &io::Error, path: &Path) -> bool {
        self.text = None;
        self.fail(error.to_string(), path)
    }

    /// Notes why the newest version is not in force; gives whether that is news.
    fn fail(&mut self, error: String, path: &Path) -> bool {
        if self.error.as_ref() == Some(&error) {
            return false;
        }
        let consequence = match self.good {
            Some(_) => "its last good version stays in force",
            None => "nothing of it is in force",
        };
        warn!("{}: {error}; {consequence}", path.display());
        self.error = Some(error);
        true
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
        // The watcher lives as long as its directory, so its channel does not end; without it only time is left.
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
pub fn is_manifest(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
    !hidden && path.extension().is_some_and(|it| it == "yaml" || it == "yml" || it == "json")
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // Looked at before it is opened: opening a pipe waits for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut text = Vec::new();
    fs::File::open(path)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_MANIFEST_BYTES} bytes; split it")));
    }
    Ok(text)
}

#[cfg(test)]
#[path = "directory_tests.rs"]
mod tests;
