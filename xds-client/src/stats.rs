//! What the clients count, under the names of Envoy's statistics.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use crate::source::Source;

/// The statistics of all clients that run. Shared: anyone may read.
#[derive(Debug, Default)]
pub struct SourceStats(RwLock<BTreeMap<ClientKey, Arc<ClientStats>>>);

/// The source, and the type where the client is for one only.
type ClientKey = (Source, Option<String>);

impl SourceStats {
    /// One entry for each client: its source, and the type that it is for (`None`: the aggregated stream, which is for
    /// all).
    pub fn clients(&self) -> Vec<(Source, Option<String>, Arc<ClientStats>)> {
        let clients = self.0.read().unwrap_or_else(PoisonError::into_inner);
        clients.iter().map(|((source, only), stats)| (source.clone(), only.clone(), Arc::clone(stats))).collect()
    }

    /// The counters of a type from a source; `None` where nothing is wanted of it.
    pub fn of(&self, source: &Source, type_url: &str) -> Option<Arc<TypeStats>> {
        let clients = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let key = |only: Option<&str>| (source.clone(), only.map(str::to_owned));
        let client = clients.get(&key(Some(type_url))).or_else(|| clients.get(&key(None)))?;
        client.existing(type_url)
    }

    pub(crate) fn insert(&self, source: &Source, only: Option<&str>, stats: Arc<ClientStats>) {
        let mut clients = self.0.write().unwrap_or_else(PoisonError::into_inner);
        clients.insert((source.clone(), only.map(str::to_owned)), stats);
    }

    pub(crate) fn remove(&self, source: &Source, only: Option<&str>) {
        let mut clients = self.0.write().unwrap_or_else(PoisonError::into_inner);
        clients.remove(&(source.clone(), only.map(str::to_owned)));
    }
}

/// Counters of one client: `control_plane.*`, and those of its types. The client writes them, anyone may read.
#[derive(Debug, Default)]
pub struct ClientStats {
    connection: RwLock<Connection>,
    /// Requests that wait for the rate limit.
    pub pending_requests: AtomicU64,
    /// Requests that had to wait for the rate limit.
    pub rate_limit_enforced: AtomicU64,
    identifier: RwLock<String>,
    types: RwLock<BTreeMap<String, Arc<TypeStats>>>,
}

/// How a client stands with its server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connection {
    /// `ApiConfigSource.ApiType`: `GRPC`, `DELTA_GRPC` or `REST`; empty where there is no server, but a file.
    pub transport: &'static str,
    /// The server: `cluster` with its name, or an address.
    pub server: String,
    /// There is a stream, or the last poll was answered.
    pub connected: bool,
    /// Since when it is well, or is not; before the first connection, since the client began.
    pub since: SystemTime,
    /// Why there is no connection, as far as that is known; with one, why the last was lost too soon to trust this one.
    pub error: Option<String>,
}

impl Connection {
    /// There is a stream, as far as is known a good one; or the last poll was answered.
    pub fn is_well(&self) -> bool {
        self.connected && self.error.is_none()
    }
}

impl Default for Connection {
    fn default() -> Connection {
        Connection { transport: "", server: String::new(), connected: false, since: SystemTime::now(), error: None }
    }
}

/// Counters of one resource type.
#[derive(Debug, Default)]
pub struct TypeStats {
    /// Responses that came, and attempts that failed.
    pub update_attempt: AtomicU64,
    /// Responses that were accepted.
    pub update_success: AtomicU64,
    /// Streams that were lost or did not come about, polls that failed, files that could not be read.
    pub update_failure: AtomicU64,
    /// Responses of which a resource was rejected.
    pub update_rejected: AtomicU64,
    /// When a response was last accepted, in milliseconds since 1970; 0: never.
    pub update_time: AtomicU64,
    /// Initial fetches that took longer than `initial_fetch_timeout`. Counted by whoever waits.
    pub init_fetch_timeout: AtomicU64,
    version: RwLock<String>,
    fault: RwLock<Option<Fault>>,
    nack: RwLock<Option<Nack>>,
}

/// What is wrong with a response: not with a resource that was taken from it and then refused, but with what was never told
/// apart or handed out, so that there is no resource to be shown with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nack {
    /// The response's version.
    pub version: String,
    /// The whole text of the NACK.
    pub fault: Fault,
}

/// Why nothing could be taken of a source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// In words.
    pub details: String,
    /// Since when.
    pub since: SystemTime,
}

impl TypeStats {
    /// The version of the last response that was accepted.
    pub fn version(&self) -> String {
        self.version.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What is wrong with the newest file, or with the newest answer to a poll, as a whole.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_fault(&self, details: Option<String>) {
        let fault = details.map(|details| Fault { details, since: SystemTime::now() });
        *self.fault.write().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// The last response that was rejected for its own faults, until one is accepted as a whole.
    pub fn nack(&self) -> Option<Nack> {
        self.nack.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `nack`: the version of the response, and what is wrong with it.
    pub(crate) fn set_nack(&self, nack: Option<(String, String)>) {
        let since = SystemTime::now();
        let nack = nack.map(|(version, details)| Nack { version, fault: Fault { details, since } });
        *self.nack.write().unwrap_or_else(PoisonError::into_inner) = nack;
    }

    /// A response was accepted as a whole.
    pub(crate) fn accepted(&self, version: &str) {
        self.update_attempt.fetch_add(1, Relaxed);
        self.update_success.fetch_add(1, Relaxed);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.update_time.store(u64::try_from(now.as_millis()).unwrap_or(u64::MAX), Relaxed);
        version.clone_into(&mut self.version.write().unwrap_or_else(PoisonError::into_inner));
    }

    /// An answer said that nothing has changed, or it is not known yet what becomes of it.
    pub(crate) fn attempted(&self) {
        self.update_attempt.fetch_add(1, Relaxed);
    }

    /// A response was not accepted as a whole.
    pub(crate) fn rejected(&self) {
        self.update_attempt.fetch_add(1, Relaxed);
        self.update_rejected.fetch_add(1, Relaxed);
    }

    /// There was no response.
    pub(crate) fn failed(&self) {
        self.update_attempt.fetch_add(1, Relaxed);
        self.update_failure.fetch_add(1, Relaxed);
    }
}

impl ClientStats {
    /// `control_plane.connected_state`: whether there is a stream to the server.
    pub fn connected(&self) -> bool {
        self.connection.read().unwrap_or_else(PoisonError::into_inner).connected
    }

    /// How the client stands with its server.
    pub fn connection(&self) -> Connection {
        self.connection.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// `control_plane.identifier`: what the server calls itself, in its last response that said so.
    pub fn identifier(&self) -> String {
        self.identifier.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The counters of every type that was ever asked for, by type URL.
    pub fn types(&self) -> Vec<(String, Arc<TypeStats>)> {
        let types = self.types.read().unwrap_or_else(PoisonError::into_inner);
        types.iter().map(|(type_url, stats)| (type_url.clone(), Arc::clone(stats))).collect()
    }

    /// The counters of one type, which is listed from now on.
    pub fn of(&self, type_url: &str) -> Arc<TypeStats> {
        if let Some(stats) = self.existing(type_url) {
            return stats;
        }
        let mut types = self.types.write().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(types.entry(type_url.to_owned()).or_default())
    }

    fn existing(&self, type_url: &str) -> Option<Arc<TypeStats>> {
        self.types.read().unwrap_or_else(PoisonError::into_inner).get(type_url).map(Arc::clone)
    }

    pub(crate) fn set_server(&self, transport: &'static str, server: String) {
        let mut connection = self.connection.write().unwrap_or_else(PoisonError::into_inner);
        (connection.transport, connection.server) = (transport, server);
    }

    /// There is a connection, or why there is none.
    pub(crate) fn set_connected(&self, state: Result<(), String>) {
        let mut connection = self.connection.write().unwrap_or_else(PoisonError::into_inner);
        let was_well = connection.is_well();
        (connection.connected, connection.error) = (state.is_ok(), state.err());
        if connection.is_well() != was_well {
            connection.since = SystemTime::now();
        }
    }

    /// There is a stream, and whether it works is to be seen: why the last one did not is still told.
    pub(crate) fn set_open(&self) {
        self.connection.write().unwrap_or_else(PoisonError::into_inner).connected = true;
    }

    pub(crate) fn set_identifier(&self, identifier: &str) {
        if *self.identifier.read().unwrap_or_else(PoisonError::into_inner) != identifier {
            identifier.clone_into(&mut self.identifier.write().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// A stream was lost: each type has failed to update.
    pub(crate) fn failed(&self) {
        for (_, stats) in self.types() {
            stats.failed();
        }
    }
}
