//! Circuit breakers as they are now: a cluster's thresholds, or the runtime values that replace them.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::{
    config::model::{ClusterConfig, Thresholds},
    layered_runtime::Values,
};

const BREAKERS: &str = "circuit_breakers.";
const MAINTENANCE: &str = "upstream.maintenance_mode.";

/// The limits of one priority. Read with every request, written when runtime values change.
#[derive(Debug, Default)]
pub struct Limits {
    max_connections: AtomicU32,
    max_connection_pools: AtomicU32,
    max_pending_requests: AtomicU32,
    max_requests: AtomicU32,
    max_retries: AtomicU32,
}

impl Limits {
    /// Connections to all hosts.
    pub fn max_connections(&self) -> u32 {
        self.max_connections.load(Ordering::Relaxed)
    }

    /// Connection pools of all hosts and workers.
    pub fn max_connection_pools(&self) -> u32 {
        self.max_connection_pools.load(Ordering::Relaxed)
    }

    /// Requests that wait for a connection.
    pub fn max_pending_requests(&self) -> u32 {
        self.max_pending_requests.load(Ordering::Relaxed)
    }

    /// Requests at a time.
    pub fn max_requests(&self) -> u32 {
        self.max_requests.load(Ordering::Relaxed)
    }

    /// Retries at a time.
    pub fn max_retries(&self) -> u32 {
        self.max_retries.load(Ordering::Relaxed)
    }

    fn set(&self, configured: &Thresholds, value: impl Fn(&str) -> Option<u32>) {
        let store = |limit: &AtomicU32, name: &str, configured: u32| {
            limit.store(value(name).unwrap_or(configured), Ordering::Relaxed);
        };
        store(&self.max_connections, "max_connections", configured.max_connections);
        store(&self.max_connection_pools, "max_connection_pools", configured.max_connection_pools);
        store(&self.max_pending_requests, "max_pending_requests", configured.max_pending_requests);
        store(&self.max_requests, "max_requests", configured.max_requests);
        store(&self.max_retries, "max_retries", configured.max_retries);
    }
}

/// What runtime values say about one cluster.
#[derive(Debug, Default)]
pub(super) struct RuntimeLimits {
    /// Of the default priority, and of the high one.
    pub(super) breakers: [Limits; 2],
    /// Of a hundred requests, so many are refused: `upstream.maintenance_mode.<cluster>`.
    maintenance: AtomicU32,
}

impl RuntimeLimits {
    pub(super) fn new(config: &ClusterConfig, values: &Values) -> RuntimeLimits {
        let limits = RuntimeLimits::default();
        limits.set(config, values);
        limits
    }

    /// Takes over what is configured and what the values say.
    pub(super) fn set(&self, config: &ClusterConfig, values: &Values) {
        // With no values, no names need be made up: the usual case, with thousands of clusters.
        let number = |key: &dyn Fn() -> String| {
            let integer = (!values.is_empty()).then(|| values.get(&key())?.integer).flatten()?;
            Some(u32::try_from(integer).unwrap_or(u32::MAX))
        };
        for ((limits, configured), priority) in
            self.breakers.iter().zip(&config.circuit_breakers).zip(["default", "high"])
        {
            limits.set(configured, |limit| number(&|| format!("{BREAKERS}{}.{priority}.{limit}", config.name)));
        }
        let share = number(&|| format!("{MAINTENANCE}{}", config.name)).unwrap_or(0);
        self.maintenance.store(share, Ordering::Relaxed);
    }

    /// Whether this request is refused.
    pub(super) fn refuses(&self) -> bool {
        match self.maintenance.load(Ordering::Relaxed) {
            0 => false,
            share => fastrand::u32(..100) < share,
        }
    }
}

/// The cluster that a runtime key is about.
pub(super) fn cluster_of(key: &str) -> Option<&str> {
    if let Some(name) = key.strip_prefix(MAINTENANCE) {
        return Some(name);
    }
    // A cluster's name may hold dots; priorities and limits do not.
    let (rest, _limit) = key.strip_prefix(BREAKERS)?.rsplit_once('.')?;
    Some(rest.rsplit_once('.')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_clusters() {
        assert_eq!(cluster_of("circuit_breakers.a.b.c.default.max_requests"), Some("a.b.c"));
        assert_eq!(cluster_of("upstream.maintenance_mode.a.b"), Some("a.b"));
        assert_eq!(cluster_of("upstream.use_retry"), None);
        assert_eq!(cluster_of("circuit_breakers.max_requests"), None);
    }
}
