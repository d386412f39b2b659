//! Secrets by name, and who uses them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, Weak},
};

use crate::config::model::{
    CertificateValidationContext, Certificates, CommonTlsContext, Secret, SecretName, SecretRef, SecretType,
    SessionTicketKeys, TlsCertificate, Validation,
};

/// Uses secrets, and wants to be told when one changes.
pub trait SecretUser: Send + Sync {
    /// A secret that it subscribed to was set. Called on the control thread.
    fn secret_changed(&self);
}

/// The secrets of the process: those of the bootstrap, and those that have been discovered. Changed by the control
/// thread alone; what workers read are the contexts that are built of them.
#[derive(Default)]
pub struct Secrets(Mutex<HashMap<SecretName, Entry>>);

#[derive(Default)]
struct Entry {
    secret: Option<Secret>,
    users: Vec<Weak<dyn SecretUser>>,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.lock().keys()).finish()
    }
}

/// What a context needs of the secrets, where all of it is there.
pub(super) struct Needed {
    pub(super) certificates: Vec<Arc<TlsCertificate>>,
    pub(super) validation: Option<Arc<CertificateValidationContext>>,
}

impl Secrets {
    fn lock(&self) -> MutexGuard<'_, HashMap<SecretName, Entry>> {
        // Every change is a single insertion: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Sets a secret: handshakes that begin from now on use it.
    pub fn set(&self, name: SecretName, secret: Secret) {
        let users = {
            let mut entries = self.lock();
            let entry = entries.entry(name).or_default();
            entry.secret = Some(secret);
            entry.users.retain(|user| user.strong_count() > 0);
            entry.users.clone()
        };
        users.iter().filter_map(Weak::upgrade).for_each(|user| user.secret_changed());
    }

    /// Forgets a secret. Contexts that were built of it stay as they are.
    pub fn remove(&self, name: &SecretName) {
        let mut entries = self.lock();
        if let Some(entry) = entries.get_mut(name) {
            entry.secret = None;
            entry.users.retain(|user| user.strong_count() > 0);
            if entry.users.is_empty() {
                entries.remove(name);
            }
        }
    }

    /// The secret of this name, where it has arrived.
    pub fn get(&self, name: &SecretName) -> Option<Secret> {
        self.lock().get(name).and_then(|entry| entry.secret.clone())
    }

    /// Has `user` told of changes of these secrets for as long as it lives.
    pub(super) fn subscribe<'a>(
        &self,
        secrets: impl Iterator<Item = (SecretType, &'a SecretRef)>,
        user: &Weak<dyn SecretUser>,
    ) {
        let mut entries = self.lock();
        for (_, secret) in secrets {
            let entry = entries.entry(secret.name()).or_default();
            entry.users.retain(|user| user.strong_count() > 0);
            entry.users.push(Weak::clone(user));
        }
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
