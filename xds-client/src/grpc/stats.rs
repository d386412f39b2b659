//! What the client counts, under the names of Envoy's statistics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

/// Counters of one client. Shared: the client writes them, anyone may read.
#[derive(Debug, Default)]
pub struct AdsStats {
    connected: AtomicBool,
    types: RwLock<BTreeMap<String, Arc<TypeStats>>>,
}

/// Counters of one resource type.
#[derive(Debug, Default)]
pub struct TypeStats {
    /// Responses that came, and streams that were lost.
    pub update_attempt: AtomicU64,
    /// Responses that were accepted.
    pub update_success: AtomicU64,
    /// Streams that were lost or did not come about.
    pub update_failure: AtomicU64,
    /// Responses of which a resource was rejected.
    pub update_rejected: AtomicU64,
}

impl AdsStats {
    /// `control_plane.connected_state`: whether there is a stream to the server.
    pub fn connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// The counters of every type that was ever asked for, by type URL.
    pub fn types(&self) -> Vec<(String, Arc<TypeStats>)> {
        let types = self.types.read().unwrap_or_else(PoisonError::into_inner);
        types.iter().map(|(type_url, stats)| (type_url.clone(), Arc::clone(stats))).collect()
    }

    /// The counters of one type, which is listed from now on.
    pub fn of(&self, type_url: &str) -> Arc<TypeStats> {
        if let Some(stats) = self.types.read().unwrap_or_else(PoisonError::into_inner).get(type_url) {
            return Arc::clone(stats);
        }
        let mut types = self.types.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(types.entry(type_url.to_owned()).or_default())
    }

    pub(super) fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Relaxed);
    }

    pub(super) fn answered(&self, type_url: &str, accepted: bool) {
        let stats = self.of(type_url);
        stats.update_attempt.fetch_add(1, Relaxed);
        let outcome = if accepted { &stats.update_success } else { &stats.update_rejected };
        outcome.fetch_add(1, Relaxed);
    }

    /// A stream was lost: each type has failed to update.
    pub(super) fn failed(&self) {
        for (_, stats) in self.types() {
            stats.update_attempt.fetch_add(1, Relaxed);
            stats.update_failure.fetch_add(1, Relaxed);
        }
    }
}
