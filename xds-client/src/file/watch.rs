//! Notices files that are moved into a directory. One watcher for all files; nothing is polled.

use std::{
    collections::HashMap,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{ModifyKind, RenameMode},
};
use tokio::sync::Notify;

/// Who is told, and of which file; `None`: of any.
type Listeners = Vec<(Option<OsString>, Weak<Notify>)>;

/// All watched directories.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    watcher: Mutex<Option<RecommendedWatcher>>,
    directories: Arc<Mutex<HashMap<PathBuf, Listeners>>>,
}

impl Watches {
    /// Is notified of each move to `path`, for as long as it is held.
    pub(crate) fn file(&self, path: &Path) -> io::Result<Arc<Notify>> {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        self.watch(parent, path.file_name().map(ToOwned::to_owned))
    }

    /// Is notified of each move into `directory`, for as long as it is held.
    pub(crate) fn directory(&self, directory: &Path) -> io::Result<Arc<Notify>> {
        self.watch(directory, None)
    }

    fn watch(&self, directory: &Path, file: Option<OsString>) -> io::Result<Arc<Notify>> {
        let directory = std::path::absolute(directory)?;
        let notify = Arc::new(Notify::new());
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
        let known = lock(&self.directories).contains_key(&directory);
        lock(&self.directories).entry(directory.clone()).or_default().push((file, Arc::downgrade(&notify)));
        if !known && let Err(error) = watcher.watch(&directory, RecursiveMode::NonRecursive) {
            lock(&self.directories).remove(&directory);
            return Err(io::Error::other(error));
        }
        Ok(notify)
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
        return all.filter_map(|(_, listener)| listener.upgrade()).for_each(|listener| listener.notify_one());
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
                listener.notify_one();
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done with a lock held leaves things half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
