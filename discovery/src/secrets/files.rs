//! Secrets in a directory: a directory each, with files as a Kubernetes Secret that is mounted has them.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use super::{Secret, Secrets};

/// How often the files are read. They are few and small, and however they are replaced it is seen.
const LOOK: Duration = Duration::from_secs(1);
/// The most secrets, and the most files of one.
const MAX_SECRETS: usize = 1000;
const MAX_FILES: usize = 64;
/// The largest file, in bytes.
const MAX_BYTES: u64 = 1024 * 1024;

/// The secrets of a directory, which follow its files.
#[derive(Debug, Clone)]
pub struct SecretFiles {
    directory: Option<Arc<PathBuf>>,
    state: Arc<Mutex<State>>,
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    secrets: Arc<Secrets>,
    errors: BTreeMap<String, String>,
}

impl SecretFiles {
    /// Reads the directory for the first time.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn open(directory: Option<PathBuf>) -> Result<Self, String> {
        let directory = directory.map(Arc::new);
        let files = Self { directory, state: Arc::default(), changes: watch::channel(0).0 };
        if let Some(directory) = &files.directory {
            std::fs::read_dir(&**directory).map_err(|error| format!("{}: {error}", directory.display()))?;
        }
        files.look();
        Ok(files)
    }

    /// The newest secrets.
    #[must_use]
    pub fn secrets(&self) -> Arc<Secrets> {
        Arc::clone(&self.state().secrets)
    }

    /// What cannot be used, by secret.
    #[must_use]
    pub fn errors(&self) -> BTreeMap<String, String> {
        self.state().errors.clone()
    }

    /// Changes each time that a secret is another one.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the files.
    pub async fn run(self) {
        if self.directory.is_none() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK).await;
            tokio::task::block_in_place(|| self.look());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Both parts are replaced as a whole, so a panic elsewhere does not spoil them.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self) {
        let Some(directory) = &self.directory else { return };
        let (before, known_errors) = (self.secrets(), self.errors());
        let (mut secrets, mut errors) = (Secrets::new(), BTreeMap::new());
        let found = match directories(directory) {
            Ok(found) => found,
            Err(error) => {
                errors.insert(String::new(), error);
                secrets.clone_from(&before);
                Vec::new()
            }
        };
        for (name, path) in found {
            match read(&path).and_then(Secret::new) {
                Ok(secret) => {
                    // What is the same stays the very same.
                    let known = before.get(&*name).filter(|known| ***known == secret).cloned();
                    secrets.insert(name.into(), known.unwrap_or_else(|| Arc::new(secret)));
                }
                Err(error) => {
                    if let Some((name, last)) = before.get_key_value(&*name) {
                        secrets.insert(Arc::clone(name), Arc::clone(last));
                    }
                    errors.insert(name, error);
                }
            }
        }
        for (name, error) in errors.iter().filter(|(name, error)| known_errors.get(*name) != Some(error)) {
            // An error of all of them has no name.
            let stays = if name.is_empty() { !before.is_empty() } else { before.contains_key(&**name) };
            let stays = if stays { "; what was there before stays in force" } else { "; there is nothing of it" };
            warn!("secrets: {}: {error}{stays}", directory.join(name).display());
        }
        let changed = *before != secrets;
        if changed {
            info!("secrets: {} are served from {}", secrets.len(), directory.display());
        }
        *self.state() = State { secrets: Arc::new(secrets), errors };
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }
}

/// The directories in a directory, by name. Hidden ones are the business of whoever mounts files.
fn directories(of: &Path) -> Result<Vec<(String, PathBuf)>, String> {
    let cannot = |error: std::io::Error| format!("cannot be read: {error}");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(of).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') || !entry.path().is_dir() {
            continue;
        }
        if found.len() == MAX_SECRETS {
            return Err(format!("has more than {MAX_SECRETS} secrets"));
        }
        found.push((name, entry.path()));
    }
    found.sort();
    Ok(found)
}

fn read(directory: &Path) -> Result<BTreeMap<String, Vec<u8>>, String> {
    let mut parts = BTreeMap::new();
    for entry in std::fs::read_dir(directory).map_err(|error| error.to_string())? {
        let path = entry.map_err(|error| error.to_string())?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        // Looked at before it is opened: opening a pipe waits for a writer.
        if name.starts_with('.') || !path.is_file() {
            continue;
        }
        if parts.len() == MAX_FILES {
            return Err(format!("more than {MAX_FILES} files"));
        }
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&path).map_err(|error| format!("{name}: {error}"))?;
        file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|error| format!("{name}: {error}"))?;
        if bytes.len() as u64 > MAX_BYTES {
            return Err(format!("{name}: larger than {MAX_BYTES} bytes"));
        }
        parts.insert(name.to_owned(), bytes);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_follow_their_files_and_bad_ones_stay_as_they_were() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        std::fs::create_dir(path("keys")).unwrap();
        std::fs::write(path("keys/1"), "one").unwrap();
        std::fs::write(path("not-a-secret"), "x").unwrap();
        let files = SecretFiles::open(Some(directory.path().to_owned())).unwrap();
        let mut changes = files.watch();
        let first = files.secrets();
        assert_eq!(first.keys().map(|name| &**name).collect::<Vec<_>>(), ["keys"]);
        files.look();
        assert!(Arc::ptr_eq(&first["keys"], &files.secrets()["keys"]) && !changes.has_changed().unwrap());
        std::fs::write(path("keys/2"), "two").unwrap();
        files.look();
        assert!(files.secrets()["keys"] != first["keys"] && changes.has_changed().unwrap());
        changes.mark_unchanged();
        std::fs::write(path("keys/tls.crt"), "half of something").unwrap();
        files.look();
        assert_eq!(files.errors()["keys"], "tls.crt without tls.key");
        assert!(files.secrets().contains_key("keys") && !changes.has_changed().unwrap());
        std::fs::remove_dir_all(path("keys")).unwrap();
        files.look();
        assert!(files.secrets().is_empty() && files.errors().is_empty());
        assert!(SecretFiles::open(Some(path("nothing"))).is_err());
    }
}
