//! Secrets by name, and who uses them.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use arc_swap::ArcSwap;

use crate::config::model::{
    CertificateValidationContext, Certificates, CommonTlsContext, GenericSecret, Secret, SecretName, SecretRef,
    SecretType, SessionTicketKeys, TlsCertificate, Validation,
};

/// Uses secrets, and wants to be told when one changes.
pub trait SecretUser: Send + Sync {
    /// Whether it has had all its secrets once. Until then it is told at once.
    fn is_built(&self) -> bool;
    /// Secrets that it subscribed to were set, so many times. Called on the control threads.
    fn secrets_changed(&self, times: u64);
}

/// The secrets of the process: those of the bootstrap, and those that have been discovered. Changed by the control
/// threads alone; what workers read are the contexts that are built of them.
#[derive(Default)]
pub struct Secrets {
    known: Mutex<Known>,
    /// Held while users are told.
    telling: Mutex<()>,
    /// The generic ones among them, for filters to read without a lock.
    generic: ArcSwap<HashMap<SecretName, Arc<GenericSecret>>>,
}

#[derive(Default)]
struct Known {
    entries: HashMap<SecretName, Entry>,
    /// Who is to be told, and how often something of theirs was set.
    changed: BTreeMap<UserId, (Weak<dyn SecretUser>, u64)>,
    next_user: UserId,
}

/// Never used twice.
type UserId = u64;

#[derive(Default)]
struct Entry {
    secret: Option<Secret>,
    users: BTreeMap<UserId, Weak<dyn SecretUser>>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().entries.keys()).finish()
    }
}

/// What a context needs of the secrets, where all of it is there.
pub(super) struct Needed {
    pub(super) certificates: Vec<Arc<TlsCertificate>>,
    pub(super) validation: Option<Arc<CertificateValidationContext>>,
}

/// Has a user told of its secrets until this is dropped.
pub(super) struct Subscribed {
    secrets: Arc<Secrets>,
    user: UserId,
    names: Vec<SecretName>,
}

impl Drop for Subscribed {
    // By a worker, where a connection outlives its listener or cluster, and not on a request's way.
    fn drop(&mut self) {
        let mut known = self.secrets.lock();
        known.changed.remove(&self.user);
        for name in &self.names {
            let Some(entry) = known.entries.get_mut(name) else { continue };
            entry.users.remove(&self.user);
            if entry.users.is_empty() && entry.secret.is_none() {
                known.entries.remove(name);
            }
        }
    }
}

impl Secrets {
    fn lock(&self) -> MutexGuard<'_, Known> {
        // Every change is a single insertion or removal: a panic leaves nothing half done.
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sets a secret and tells its users: handshakes that begin from now on use it.
    pub fn set(&self, name: SecretName, secret: Secret) {
        self.put(name, secret);
        self.tell();
    }

    /// Sets a secret. Users that wait for one are told at once, others by [`tell`](Self::tell): it takes long where there are
    /// many.
    pub fn put(&self, name: SecretName, secret: Secret) {
        let users: Vec<_> = {
            let mut known = self.lock();
            self.share(&name, Some(&secret));
            let entry = known.entries.entry(name).or_default();
            entry.secret = Some(secret);
            entry.users.iter().map(|(id, user)| (*id, Weak::clone(user))).collect()
        };
        for (id, weak) in users {
            // Not under the lock: this may be the last who has it, and its subscription ends with it.
            let Some(user) = weak.upgrade() else { continue };
            match user.is_built() {
                true => self.lock().changed.entry(id).or_insert((weak, 0)).1 += 1,
                false => user.secrets_changed(1),
            }
        }
    }

    /// Tells those whose secrets were [`put`](Self::put), each once. When this returns, all of them know.
    pub fn tell(&self) {
        let _telling = self.telling.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let changed = std::mem::take(&mut self.lock().changed);
        for (user, times) in changed.into_values() {
            if let Some(user) = user.upgrade() {
                user.secrets_changed(times);
            }
        }
    }

    /// Forgets a secret. Contexts that were built of it stay as they are.
    pub fn remove(&self, name: &SecretName) {
        let mut known = self.lock();
        self.share(name, None);
        if let Some(entry) = known.entries.get_mut(name) {
            entry.secret = None;
            if entry.users.is_empty() {
                known.entries.remove(name);
            }
        }
    }

    /// Has filters see a generic secret, or see it no more. Called under the lock.
    fn share(&self, name: &SecretName, secret: Option<&Secret>) {
        let before = self.generic.load();
        let generic = match secret {
            Some(Secret::Generic(generic)) => Some(generic),
            _ => None,
        };
        if generic.is_none() && !before.contains_key(name) {
            return;
        }
        let mut next = HashMap::clone(&before);
        match generic {
            Some(generic) => drop(next.insert(name.clone(), Arc::clone(generic))),
            None => drop(next.remove(name)),
        }
        self.generic.store(Arc::new(next));
    }

    /// The generic secret of this name, where it has arrived. Takes no lock.
    pub fn generic(&self, name: &SecretName) -> Option<Arc<GenericSecret>> {
        self.generic.load().get(name).map(Arc::clone)
    }

    /// The secret of this name, where it has arrived.
    pub fn get(&self, name: &SecretName) -> Option<Secret> {
        self.lock().entries.get(name).and_then(|entry| entry.secret.clone())
    }

    /// How many names are known: of secrets that are there, and of those that somebody waits for.
    pub fn len(&self) -> usize {
        self.lock().entries.len()
    }

    /// Whether no name is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Has `user` told of changes of these secrets.
    pub(super) fn subscribe<'a>(
        self: &Arc<Secrets>,
        secrets: impl Iterator<Item = (SecretType, &'a SecretRef)>,
        user: Weak<dyn SecretUser>,
    ) -> Subscribed {
        let names: Vec<_> = secrets.map(|(_, secret)| secret.name()).collect();
        let mut known = self.lock();
        let id = known.next_user;
        known.next_user += 1;
        for name in &names {
            known.entries.entry(name.clone()).or_default().users.insert(id, Weak::clone(&user));
        }
        Subscribed { secrets: Arc::clone(self), user: id, names }
    }

    /// The keys of session tickets; `None` where they are missing, or the secret is something else.
    pub(super) fn ticket_keys(&self, secret: &SecretRef) -> Option<Arc<SessionTicketKeys>> {
        match self.get(&secret.name())? {
            Secret::SessionTicketKeys(keys) => Some(keys),
            _ => None,
        }
    }

    /// What the context is to be built of; `None` where a secret is missing, or is not of the kind that is wanted.
    pub(super) fn resolve(&self, common: &CommonTlsContext) -> Option<Needed> {
        let certificate = |secret: &SecretRef| match self.get(&secret.name())? {
            Secret::TlsCertificate(certificate) => Some(certificate),
            _ => None,
        };
        let validation = |secret: &SecretRef| match self.get(&secret.name())? {
            Secret::ValidationContext(context) => Some(context),
            _ => None,
        };
        Some(Needed {
            certificates: match &common.certificates {
                Certificates::Inline(certificates) => certificates.clone(),
                Certificates::Secrets(secrets) => secrets.iter().map(certificate).collect::<Option<_>>()?,
            },
            validation: match &common.validation {
                Validation::None => None,
                Validation::Inline(context) => Some(Arc::clone(context)),
                Validation::Secret(secret) => Some(validation(secret)?),
                Validation::Combined(default, secret) => Some(Arc::new(default.merged(&*validation(secret)?))),
            },
        })
    }
}

#[cfg(test)]
#[path = "secrets_tests.rs"]
mod tests;
