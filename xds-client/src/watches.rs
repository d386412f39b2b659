//! Notices files that are moved into a directory. One watcher for all files; nothing is polled.

use std::{
    collections::HashMap,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{ModifyKind, RenameMode},
};
use tokio::sync::Notify;

/// Somebody who wants to know of moves.
#[derive(Debug)]
pub struct Watch {
    moved: AtomicBool,
    notify: Arc<Notify>,
}

impl Watch {
    /// With `notify` told of each move: one that several watches share says that any of them has [`moved`](Self::take).
    pub fn new(notify: Arc<Notify>) -> Arc<Watch> {
        Arc::new(Watch { moved: AtomicBool::new(false), notify })
    }

    /// As if something had been moved.
    pub fn tell(&self) {
        self.moved.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    /// Whether something was moved since the last call.
    pub fn take(&self) -> bool {
        self.moved.swap(false, Ordering::AcqRel)
    }

    /// Waits for a move.
    pub(crate) async fn moved(&self) {
        self.notify.notified().await;
    }
}

/// Who is told, and of which file; `None`: of any.
type Listeners = Vec<(Option<OsString>, Weak<Watch>)>;

/// All watched directories.
#[derive(Debug, Default)]
pub struct Watches {
    watcher: Mutex<Option<RecommendedWatcher>>,
    directories: Arc<Mutex<HashMap<PathBuf, Listeners>>>,
}

/// The directory that a file is in.
pub fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

impl Watches {
    /// Is told of each move to `path`, for as long as it is held.
    pub(crate) fn file(&self, path: &Path) -> io::Result<Arc<Watch>> {
        let watch = Watch::new(Arc::default());
        self.watch(directory_of(path), path.file_name().map(ToOwned::to_owned), &watch)?;
        Ok(watch)
    }

    /// Has `watch` told of each move into `directory`, for as long as it is held.
    ///
    /// # Errors
    /// The directory cannot be watched: it does not exist, for example.
    pub fn directory(&self, directory: &Path, watch: &Arc<Watch>) -> io::Result<()> {
        self.watch(directory, None, watch)
    }

    fn watch(&self, directory: &Path, file: Option<OsString>, watch: &Arc<Watch>) -> io::Result<()> {
        let directory = std::path::absolute(directory)?;
        let mut watcher = lock(&self.watcher);
        let watcher = match &mut *watcher {
            Some(watcher) => watcher,
            none => {
                let directories = Arc::clone(&self.directories);
                let handler = move |event: notify::Result<Event>| tell(&directories, event);
                none.insert(notify::recommended_watcher(handler).map_err(io::Error::other)?)
            }
        };
        // Those of whom nobody listens any more.
        let mut unused = Vec::new();
        lock(&self.directories).retain(|path, listeners| {
            listeners.retain(|(_, listener)| listener.strong_count() > 0);
            let used = !listeners.is_empty() || *path == directory;
            if !used {
                unused.push(path.clone());
            }
            used
        });
        for path in unused {
            // Gone already, if the directory is.
            let _ = watcher.unwatch(&path);
        }
        // Again where it is watched already: it may be another directory by now.
        if let Err(error) = watcher.watch(&directory, RecursiveMode::NonRecursive) {
            return Err(io::Error::other(error));
        }
        lock(&self.directories).entry(directory).or_default().push((file, Arc::downgrade(watch)));
        Ok(())
    }
}

fn tell(directories: &Mutex<HashMap<PathBuf, Listeners>>, event: notify::Result<Event>) {
    let directories = lock(directories);
    let event = match event {
        Ok(event) => event,
        Err(error) => return tracing::warn!("watching files: {error}"),
    };
    // Events were lost: anything may have happened.
    if event.need_rescan() {
        let all = directories.values().flatten();
        return all.filter_map(|(_, listener)| listener.upgrade()).for_each(|listener| listener.tell());
    }
    if event.kind != EventKind::Modify(ModifyKind::Name(RenameMode::To)) {
        return;
    }
    for path in &event.paths {
        let listeners = path.parent().and_then(|parent| directories.get(parent));
        for (file, listener) in listeners.into_iter().flatten() {
            if (file.is_none() || file.as_deref() == path.file_name())
                && let Some(listener) = listener.upgrade()
            {
                listener.tell();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done with a lock held leaves things half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
