//! Registrations that live as long as the process.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Changer, Outcome, Store, StoreError, Version};
use crate::registration::host::{Host, HostKey};

/// A map.
#[derive(Debug, Default)]
pub(super) struct Memory {
    hosts: Mutex<BTreeMap<HostKey, Host>>,
}

impl Memory {
    fn hosts(&self) -> MutexGuard<'_, BTreeMap<HostKey, Host>> {
        // The map is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl Store for Memory {
    async fn all(&self) -> Result<Vec<Host>, StoreError> {
        Ok(self.hosts().values().cloned().collect())
    }

    async fn of_service(&self, service: &str) -> Result<Vec<Host>, StoreError> {
        let hosts = self.hosts();
        let from = hosts.range(HostKey::first_of(service)..);
        Ok(from.take_while(|(key, _)| key.service == service).map(|(_, host)| host.clone()).collect())
    }

    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError> {
        let mut hosts = self.hosts();
        let before = hosts.get(key).cloned();
        let change = change(before.as_ref());
        let outcome = Outcome::new(before, change);
        match &outcome.after {
            Some(host) => hosts.insert(key.clone(), host.clone()),
            None => hosts.remove(key),
        };
        Ok(outcome)
    }

    async fn version(&self) -> Result<Version, StoreError> {
        Ok(Version { incarnation: 0, count: 0 })
    }
}
