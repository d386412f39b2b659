//! Services outside Kubernetes: hosts register themselves over the v1 REST API, and join the mesh.
//!
//! ```text
//! HTTP request -> api::parse -> Call -> Registrations::carry_out -> store (memory, redb or Redis)
//!                                            |
//!                                            +-> local copy -> join -> mesh
//! ```
//! The local copy is what the mesh is made of: it stays in force while the store cannot be reached. A heartbeat that
//! changes nothing but its time does not make anybody build a mesh anew.

pub mod api;
pub mod host;
pub mod join;
pub mod store;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};

use self::api::{Call, Refusal, Reply};
use self::host::{Host, HostKey};
use self::store::{Change, Changer, Outcome, Storage, Store, StoreError, Version};
use crate::mesh::Protocol;

/// The tag that holds a host's share of the requests.
pub const WEIGHT_TAG: &str = "load_balancing_weight";
/// How often a store that others write to is asked whether it changed, and an unreachable one whether it is back.
const REFRESH: Duration = Duration::from_millis(500);
/// How often hosts that have not checked in are looked for, at most.
const SWEEP: Duration = Duration::from_secs(5);

/// What is configured about registrations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Where they are kept.
    pub storage: Storage,
    /// How long a host counts after it checked in last.
    pub ttl: Duration,
    /// What answers state as `env`.
    pub env: String,
    /// The namespace that registered services join the mesh in.
    pub namespace: String,
    /// The port by which they are called.
    pub port: u16,
    /// What they speak.
    pub protocol: Protocol,
    /// The most hosts that may be registered.
    pub max_hosts: usize,
}

impl Settings {
    /// The defaults, with this storage.
    #[must_use]
    pub fn new(storage: Storage) -> Self {
        Self {
            storage,
            ttl: Duration::from_secs(600),
            env: "development".to_owned(),
            namespace: "default".to_owned(),
            port: 80,
            protocol: Protocol::Http1,
            max_hosts: 100_000,
        }
    }
}

/// How registrations are doing, for `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Where they are kept.
    pub storage: String,
    /// How many hosts are registered.
    pub hosts: usize,
    /// Whether the storage cannot be used at present, so that its last content stays in force.
    pub stale: bool,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// What has happened since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Registrations and heartbeats that were taken in.
    pub check_ins: AtomicU64,
    /// Requests that were refused.
    pub refused: AtomicU64,
    /// Hosts that were removed because they did not check in any more.
    pub expired: AtomicU64,
    /// Calls of the storage that failed.
    pub storage_errors: AtomicU64,
}

/// The registered hosts and their storage.
#[derive(Debug, Clone)]
pub struct Registrations {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: Settings,
    store: Box<dyn Store>,
    copy: Mutex<LocalCopy>,
    /// Counts up with each change that the mesh is to see.
    changes: watch::Sender<u64>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct LocalCopy {
    hosts: BTreeMap<HostKey, Arc<Host>>,
    /// Whether the store was read at least once.
    loaded: bool,
    /// The store's version that the copy is known to hold.
    version: Option<Version>,
    /// The hosts that changed here, by more than a heartbeat, since the store was last begun to be read.
    touched: BTreeSet<HostKey>,
    /// Why the store cannot be used.
    error: Option<String>,
    /// Since when hosts have been able to check in, in microseconds since the epoch: silence before it is not theirs.
    available_since: i64,
}

impl Registrations {
    /// Opens the storage. A Redis server need not be there yet: see [`Self::loaded`].
    ///
    /// # Errors
    /// When the storage cannot ever work: a file that is no database, or a wrong address.
    pub fn open(settings: Settings) -> Result<Self, StoreError> {
        let store = settings.storage.open()?;
        Ok(Self::with(settings, store))
    }

    fn with(settings: Settings, store: Box<dyn Store>) -> Self {
        let copy = Mutex::new(LocalCopy { available_since: now(), ..LocalCopy::default() });
        let (changes, _) = watch::channel(0);
        let inner = Inner { settings, store, copy, changes, counters: Counters::default() };
        Self { inner: Arc::new(inner) }
    }

    fn copy(&self) -> MutexGuard<'_, LocalCopy> {
        // The copy is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.inner.copy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is configured.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// What has happened.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.inner.counters
    }

    /// How the storage is doing.
    #[must_use]
    pub fn health(&self) -> Health {
        let copy = self.copy();
        Health {
            storage: self.inner.settings.storage.to_string(),
            hosts: copy.hosts.len(),
            stale: copy.error.is_some(),
            error: copy.error.clone(),
        }
    }

    /// All hosts, for the mesh.
    #[must_use]
    pub fn hosts(&self) -> Vec<Arc<Host>> {
        self.copy().hosts.values().cloned().collect()
    }

    /// Changes each time that the mesh has to be made anew.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Whether the storage has been read once.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.copy().loaded
    }

    /// Waits until the storage has been read once, which [`Self::run`] does.
    pub async fn loaded(&self) {
        let mut changes = self.watch();
        while !self.is_loaded() {
            // The sender is a part of `self`.
            let _ = changes.changed().await;
        }
    }

    /// Follows the storage and removes hosts that do not check in any more, for ever.
    pub async fn run(self) {
        let sweep = SWEEP.min(self.inner.settings.ttl / 10).max(Duration::from_millis(10));
        let mut swept = tokio::time::Instant::now();
        loop {
            self.refresh().await;
            if swept.elapsed() >= sweep {
                self.sweep().await;
                swept = tokio::time::Instant::now();
            }
            sleep(REFRESH.min(sweep)).await;
        }
    }

    /// Reads the store if others have changed it.
    async fn refresh(&self) {
        let known = {
            let mut copy = self.copy();
            copy.touched.clear();
            copy.version
        };
        // The version first: what changes while all is read is read again the next time.
        let version = match self.inner.store.version().await {
            Ok(version) => version,
            Err(error) => return self.failed(&error),
        };
        if known == Some(version) {
            return self.works();
        }
        let hosts = match self.inner.store.all().await {
            Ok(hosts) => hosts,
            Err(error) => return self.failed(&error),
        };
        let lost = self.replace_copy(hosts, version);
        self.works();
        self.inner.changes.send_modify(|count| *count += 1);
        if !lost.is_empty() {
            warn!("{} lost its data; {} hosts are written back", self.inner.settings.storage, lost.len());
        }
        for host in lost {
            let restore = |found: Option<&Host>| match found {
                Some(_) => Change::Keep,
                None => Change::Put(Host::clone(&host)),
            };
            if self.update(&host.key(), &restore).await.is_err() {
                return;
            }
        }
    }

    /// Takes over what the store holds. Gives what it should hold and does not.
    fn replace_copy(&self, hosts: Vec<Host>, version: Version) -> Vec<Arc<Host>> {
        let mut found: BTreeMap<_, _> = hosts.into_iter().map(|host| (host.key(), Arc::new(host))).collect();
        let mut lost = Vec::new();
        let mut copy = self.copy();
        // A Redis server that lost its data is no reason to forget hosts that live.
        if copy.version.is_some_and(|known| known.incarnation != version.incarnation) {
            for (key, host) in &copy.hosts {
                if let Entry::Vacant(entry) = found.entry(key.clone()) {
                    entry.insert(Arc::clone(host));
                    lost.push(Arc::clone(host));
                }
            }
        }
        // Who has the last word on these nobody knows: what was done here, until the store is read again.
        let touched = std::mem::take(&mut copy.touched);
        if touched.is_empty() {
            copy.version = Some(version);
        }
        for key in touched {
            match copy.hosts.get(&key) {
                Some(host) => found.insert(key, Arc::clone(host)),
                None => found.remove(&key),
            };
        }
        copy.hosts = found;
        copy.loaded = true;
        lost
    }

    /// Removes hosts that have not checked in for the time that they are given.
    async fn sweep(&self) {
        let candidates: Vec<HostKey> = {
            let copy = self.copy();
            if copy.error.is_some() {
                return;
            }
            copy.hosts.iter().filter(|(_, host)| self.is_expired(host, &copy)).map(|(key, _)| key.clone()).collect()
        };
        for key in candidates {
            // Another replica may have heard from it: what the store says counts.
            let remove = |found: Option<&Host>| match found {
                Some(host) if !self.is_expired(host, &self.copy()) => Change::Keep,
                _ => Change::Remove,
            };
            match self.update(&key, &remove).await {
                Ok(Outcome { after: None, .. }) => {
                    info!("host {} of service {} has not checked in and is removed", key.ip_address, key.service);
                    self.inner.counters.expired.fetch_add(1, Ordering::Relaxed);
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    fn is_expired(&self, host: &Host, copy: &LocalCopy) -> bool {
        let heard = host.last_check_in.max(copy.available_since);
        i128::from(now()) - i128::from(heard) > i128::try_from(self.inner.settings.ttl.as_micros()).unwrap_or(i128::MAX)
    }

    /// Changes one host in the store and then in the local copy.
    async fn update(&self, key: &HostKey, change: &Changer<'_>) -> Result<Outcome, StoreError> {
        let outcome = match self.inner.store.update(key, change).await {
            Ok(outcome) => outcome,
            Err(error) => {
                self.failed(&error);
                return Err(error);
            }
        };
        let mut copy = self.copy();
        let changed = match &outcome.after {
            Some(host) => {
                let before = copy.hosts.insert(key.clone(), Arc::new(host.clone()));
                before.is_none_or(|before| before.differs_in_more_than_time(host))
            }
            None => copy.hosts.remove(key).is_some(),
        };
        if changed || outcome.is_news() {
            copy.touched.insert(key.clone());
        }
        drop(copy);
        if changed {
            self.inner.changes.send_modify(|count| *count += 1);
        }
        Ok(outcome)
    }

    fn works(&self) {
        let mut copy = self.copy();
        if let Some(error) = copy.error.take() {
            copy.available_since = now();
            info!("{} can be used again; it was: {error}", self.inner.settings.storage);
        }
    }

    fn failed(&self, error: &StoreError) {
        self.inner.counters.storage_errors.fetch_add(1, Ordering::Relaxed);
        let mut copy = self.copy();
        if copy.error.is_none() {
            warn!("{}: {error}; what it held last stays in force", self.inner.settings.storage);
        }
        copy.error = Some(error.to_string());
    }

    /// The hosts of a service that have not expired, as the store has them now, else as it had them last.
    async fn of_service(&self, service: &str) -> Vec<Host> {
        let found = match self.inner.store.of_service(service).await {
            Ok(hosts) => hosts,
            Err(error) => {
                self.failed(&error);
                let copy = self.copy();
                let all = copy.hosts.range(HostKey::first_of(service)..);
                all.take_while(|(key, _)| key.service == service).map(|(_, host)| Host::clone(host)).collect()
            }
        };
        let copy = self.copy();
        found.into_iter().filter(|host| !self.is_expired(host, &copy)).collect()
    }

    /// Does what a request asks for.
    pub async fn carry_out(&self, call: Call) -> Reply {
        match call {
            Call::OfService(service) => {
                let hosts = self.of_service(&service).await;
                Reply::ok(json!({ "service": service, "env": self.inner.settings.env, "hosts": listed(&hosts) }))
            }
            Call::OfRepository(name) => {
                let hosts: Vec<Host> = {
                    let copy = self.copy();
                    let live = copy.hosts.values().filter(|host| host.service_repo_name == name);
                    live.filter(|host| !self.is_expired(host, &copy)).map(|host| Host::clone(host)).collect()
                };
                Reply::ok(json!({ "service_repo_name": name, "env": self.inner.settings.env, "hosts": listed(&hosts) }))
            }
            Call::CheckIn(host) => self.check_in(host).await,
            Call::Remove(key) => match self.update(&key, &|_| Change::Remove).await {
                Ok(Outcome { before: Some(_), .. }) => Reply::ok(json!({})),
                Ok(_) => self.refuse(Refusal::bare("no host with this address is registered for this service")),
                Err(error) => self.unavailable(&error),
            },
            Call::SetWeight { service, ip_address, weight } => self.set_weight(service, ip_address, weight).await,
        }
    }

    async fn check_in(&self, mut host: Host) -> Reply {
        host.last_check_in = now();
        let key = host.key();
        let is_full = {
            let copy = self.copy();
            copy.hosts.len() >= self.inner.settings.max_hosts && !copy.hosts.contains_key(&key)
        };
        if is_full {
            let limit = self.inner.settings.max_hosts;
            return self.refuse(Refusal::new(507, format!("{limit} hosts are registered, more are not allowed")));
        }
        let merge = |found: Option<&Host>| match host.clone().merged_into(found) {
            Some(merged) => Change::Put(merged),
            None => Change::Keep,
        };
        match self.update(&key, &merge).await {
            Ok(Outcome { after: Some(stored), .. }) if stored.last_check_in == host.last_check_in => {
                self.inner.counters.check_ins.fetch_add(1, Ordering::Relaxed);
                Reply::ok(json!({}))
            }
            Ok(_) => self.refuse(Refusal::bare(format!("tags, with those of before, exceed {} bytes", host::MAX_TAGS))),
            Err(error) => self.unavailable(&error),
        }
    }

    async fn set_weight(&self, service: String, ip_address: Option<Ipv4Addr>, weight: u32) -> Reply {
        let set = |found: Option<&Host>| match found {
            Some(host) if host.tags.get(WEIGHT_TAG) == Some(&Value::from(weight)) => Change::Keep,
            Some(host) => {
                let mut host = host.clone();
                host.tags.insert(WEIGHT_TAG.to_owned(), weight.into());
                Change::Put(host)
            }
            None => Change::Keep,
        };
        let keys = match ip_address {
            Some(ip_address) => vec![HostKey { service, ip_address }],
            None => match self.inner.store.of_service(&service).await {
                Ok(hosts) => hosts.iter().map(Host::key).collect(),
                Err(error) => return self.unavailable(&error),
            },
        };
        for key in keys {
            match self.update(&key, &set).await {
                Ok(Outcome { before: None, .. }) if ip_address.is_some() => {
                    return self.refuse(Refusal::new(404, "Host not found"));
                }
                Ok(_) => {}
                Err(error) => return self.unavailable(&error),
            }
        }
        Reply::no_content()
    }

    /// Counts a refusal and makes its answer.
    pub fn refuse(&self, refusal: Refusal) -> Reply {
        self.inner.counters.refused.fetch_add(1, Ordering::Relaxed);
        refusal.into()
    }

    fn unavailable(&self, error: &StoreError) -> Reply {
        self.refuse(Refusal::new(503, format!("the registrations cannot be written at present: {error}")))
    }
}

fn listed(hosts: &[Host]) -> Value {
    hosts.iter().map(Host::as_answer).collect()
}

/// Microseconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests;
