//! Secrets that are made of files: read again when something is moved to where the files are.
//!
//! A secret that cannot be made of what is there by then stays as it was, is counted in `sds.<name>.key_rotation_failed`, and
//! is tried again at the next move.

use std::{collections::BTreeSet, io, path::PathBuf, sync::Arc, time::SystemTime};

use culvert_xds_client::{
    Any,
    ads::{Resource, type_url},
    json,
    source::Source,
    stats::Fault,
    watches::{Watch, Watches},
};
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret as ProtoSecret;
use tokio::sync::Notify;

use super::{
    Apply, ConfigStore, counts,
    kinds::{Kind, Value},
    read_ahead::aside,
    secrets,
    state::State,
};
use crate::config::{
    FieldError,
    model::SecretName,
    parse::{self, SecretWithFiles},
    status::{Failure, SourceFault, Version},
};

/// What notices moves.
#[derive(Debug, Default)]
pub(super) struct Follower {
    watches: Arc<Watches>,
    /// Something was moved somewhere.
    moved: Arc<Notify>,
}

impl Follower {
    pub(super) fn new(watches: Arc<Watches>) -> Follower {
        Follower { watches, moved: Arc::default() }
    }

    fn watch(&self, directories: &BTreeSet<PathBuf>) -> Result<Arc<Watch>, String> {
        let watch = Watch::new(Arc::clone(&self.moved));
        for directory in directories {
            let failed = |error: io::Error| format!("cannot watch {}: {error}", directory.display());
            self.watches.directory(directory, &watch).map_err(failed)?;
        }
        // What was moved between the reading of the files and now.
        watch.tell();
        Ok(watch)
    }
}

/// The files of a secret of SDS.
#[derive(Debug)]
pub(in crate::config) struct Files {
    /// The resource as it was received, with the files' names.
    received: Resource,
    watch: Arc<Watch>,
    failure: Option<Fault>,
}

impl Files {
    /// Whether the same was received before; its new version is kept.
    pub(super) fn is_unchanged(&mut self, resource: &Resource) -> bool {
        let same = self.received.body == resource.body;
        if same {
            self.received.version.clone_from(&resource.version);
        }
        same
    }

    fn follow(follower: &Follower, received: Resource, directories: &BTreeSet<PathBuf>) -> Result<Files, String> {
        Ok(Files { received, watch: follower.watch(directories)?, failure: None })
    }

    /// Why the newest files could not be used.
    pub(super) fn failure(&self) -> Option<Arc<Failure>> {
        let Fault { details, since } = self.failure.clone()?;
        let Resource { version, body, .. } = self.received.clone();
        Some(Arc::new(Failure { attempt: Arc::new(Version { version, body, updated: since }), details }))
    }
}

/// A secret of the bootstrap whose files are followed.
#[derive(Debug)]
pub(super) struct StaticFiles {
    name: SecretName,
    message: ProtoSecret,
    watch: Arc<Watch>,
    /// What is in force.
    resolved: Option<ProtoSecret>,
    failure: Option<Fault>,
}

impl StaticFiles {
    /// Why the newest files could not be used.
    pub(super) fn fault(&self) -> Option<SourceFault> {
        let (type_url, place) = (type_url::SECRET.to_owned(), self.name.name.to_string());
        Some(SourceFault { type_url, place, version: String::new(), fault: self.failure.clone()? })
    }
}

/// Secrets whose files have been moved: the bootstrap's, and those of SDS as they were received.
pub(super) struct Moved {
    fixed: Vec<(SecretName, ProtoSecret)>,
    discovered: Vec<Received>,
}

type Received = (Arc<Source>, Arc<str>, Resource);

/// What was read of [`Moved`].
pub(super) struct ReadAgain {
    fixed: Vec<(SecretName, Result<SecretWithFiles, FieldError>)>,
    discovered: Vec<(Received, Result<Value, FieldError>)>,
}

impl Moved {
    /// Reads the files.
    pub(super) fn read(self) -> ReadAgain {
        let fixed = self.fixed.into_iter().map(|(name, message)| (name, parse::discovered_secret(&message, "")));
        let discovered = self.discovered.into_iter().map(|received| {
            let parsed = Kind::Secrets.parse(&received.1, &received.2.body);
            (received, parsed)
        });
        ReadAgain { fixed: fixed.collect(), discovered: discovered.collect() }
    }
}

/// Secrets of the bootstrap are followed where they name a directory to be watched.
pub(super) fn static_files(follower: &Follower, secrets: &[(SecretName, ProtoSecret, PathBuf)]) -> Vec<StaticFiles> {
    let follow = |(name, message, directory): &(SecretName, ProtoSecret, PathBuf)| match follower
        .watch(&[directory.clone()].into())
    {
        Ok(watch) => {
            Some(StaticFiles { name: name.clone(), message: message.clone(), watch, resolved: None, failure: None })
        }
        Err(error) => {
            tracing::error!(secret = %name.name, "changes of its files will not be seen: {error}");
            None
        }
    };
    secrets.iter().filter_map(follow).collect()
}

impl<A: Apply> ConfigStore<A> {
    /// Reads secrets again whose files have been moved. Runs as long as the process.
    pub async fn follow_files(self) {
        loop {
            self.0.follower.moved.notified().await;
            self.rotate();
        }
    }

    /// Reads secrets again whose files have been moved.
    pub(super) fn rotate(&self) {
        let moved = self.moved();
        let read = aside(|| moved.read());
        self.take_read(read);
    }

    /// Secrets whose files have been moved.
    pub(super) fn moved(&self) -> Moved {
        let mut state = self.lock();
        let fixed = state.static_files.iter().filter(|files| files.watch.take());
        let fixed = fixed.map(|files| (files.name.clone(), files.message.clone())).collect();
        let entries = state.watched[Kind::Secrets as usize].entries_mut();
        let discovered = entries.filter_map(|(source, name, entry)| {
            let files = entry.files.as_ref().filter(|files| files.watch.take())?;
            Some((Arc::clone(source), Arc::clone(name), files.received.clone()))
        });
        let discovered = discovered.collect();
        Moved { fixed, discovered }
    }

    /// Takes what was read of them.
    pub(super) fn take_read(&self, read: ReadAgain) {
        self.changed(|state| {
            for (name, parsed) in read.fixed {
                if let Some(files) = state.static_files.iter_mut().find(|files| files.name == name) {
                    self.rotate_static(files, parsed);
                }
            }
            for ((source, name, received), parsed) in read.discovered {
                self.rotate_one(state, (&source, &name), received, parsed);
            }
        });
    }

    fn rotate_static(&self, files: &mut StaticFiles, parsed: Result<SecretWithFiles, FieldError>) {
        match parsed {
            Ok(SecretWithFiles { resolved, .. }) if resolved == files.resolved => files.failure = None,
            Ok(SecretWithFiles { secret, resolved, .. }) => {
                let first = files.resolved.is_none();
                (files.resolved, files.failure) = (resolved, None);
                if !first {
                    tracing::info!(secret = %files.name.name, "its files were replaced");
                }
                self.0.apply.set_secret(files.name.clone(), parse::with_origins(secret, &files.message));
            }
            Err(error) => failed(&files.name.name, &mut files.failure, &error),
        }
    }

    fn rotate_one(
        &self,
        state: &mut State,
        (source, name): (&Source, &str),
        received: Resource,
        parsed: Result<Value, FieldError>,
    ) {
        let Some(entry) = state.watched(Kind::Secrets).get(source, name) else { return };
        // Another has come since then: it has been read when it came.
        if entry.files.as_ref().is_none_or(|files| files.received.body != received.body) {
            return;
        }
        let users = entry.users.clone();
        let parsed = parsed.and_then(|value| state.check(&value, (source, name), &users).map(|()| value));
        let Some(entry) = state.watched[Kind::Secrets as usize].get_mut(source, name) else { return };
        let Some(files) = &mut entry.files else { return };
        match parsed {
            Ok(Value::Secret(read)) => {
                files.failure = None;
                let body = shown(&read, &received);
                if entry.stored.as_ref().is_some_and(|stored| stored.body == body) {
                    return;
                }
                if entry.stored.is_none() {
                    // It was refused because of its files.
                    entry.refused = None;
                }
                entry.stored = Some(Arc::new(Version { version: received.version, body, updated: SystemTime::now() }));
                tracing::info!(secret = %name, "its files were replaced");
                self.0.apply.set_secret(secrets::name(source, name), read.secret);
            }
            Ok(_) => {}
            Err(error) => failed(name, &mut files.failure, &error),
        }
    }

    /// Follows the files of a secret that was taken: what is to be shown of it.
    ///
    /// # Errors
    /// They cannot be followed.
    pub(super) fn follow_secret(
        &self,
        resource: &Resource,
        read: &SecretWithFiles,
    ) -> Result<(Arc<Version>, Option<Box<Files>>), FieldError> {
        let Resource { version, .. } = resource;
        let stored = Version { version: version.clone(), body: shown(read, resource), updated: SystemTime::now() };
        let files = match read.directories.is_empty() {
            true => None,
            false => {
                let files = Files::follow(&self.0.follower, resource.clone(), &read.directories);
                let path = format!("{}.watched_directory", read.secret.secret_type().field());
                Some(Box::new(files.map_err(|text| FieldError::new(path, text))?))
            }
        };
        Ok((Arc::new(stored), files))
    }

    /// Follows the files of a secret that was refused, where none is in force: they may be what was wrong with it.
    pub(super) fn follow_refused(&self, resource: &Resource) -> Option<Box<Files>> {
        let message: ProtoSecret = json::unpack(&resource.body, "").ok()?;
        let directories = parse::watched_directories(&message);
        if directories.is_empty() {
            return None;
        }
        let files = Files::follow(&self.0.follower, resource.clone(), &directories).ok()?;
        // It has just been read.
        files.watch.take();
        Some(Box::new(files))
    }
}

fn failed(name: &str, failure: &mut Option<Fault>, error: &FieldError) {
    counts::rotation_failed(name);
    let details = error.to_string();
    if failure.as_ref().is_none_or(|before| before.details != details) {
        tracing::warn!(secret = %name, "failed to reload certificates, those in force stay: {error}");
        *failure = Some(Fault { details, since: SystemTime::now() });
    }
}

/// What `/config_dump` shows of a secret: its files' content in place of their names, as in Envoy.
fn shown(read: &SecretWithFiles, received: &Resource) -> Any {
    read.resolved.as_ref().map_or_else(|| received.body.clone(), json::pack)
}
