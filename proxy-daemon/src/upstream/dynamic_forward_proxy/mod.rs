//! `envoy.clusters.dynamic_forward_proxy`: hosts are what requests call them, found by names that are looked up when somebody asks.

mod authority;
mod cache;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
};

use arc_swap::ArcSwap;
use rpds::HashTrieMapSync;

pub use self::cache::DnsCache;
use self::cache::Entry;
pub(crate) use self::{
    authority::split,
    cache::{Asked, Found, Pending},
};
use super::{
    Cluster,
    host::{Extras, Host, HostCounters},
    worker::WorkerHost,
};
use crate::config::model::{EndpointAddress, HealthStatus, Locality, PoolOptions, SocketIndex};

/// The hosts of a cluster, by what requests call them: written by the cache's task before workers find a name.
#[derive(Debug, Default)]
pub(crate) struct NamedHosts(ArcSwap<ByName<Named>>);

/// What belongs to names. A copy shares what it has with the original: one more name costs little, however many there are.
type ByName<T> = HashTrieMapSync<Arc<str>, T>;

#[derive(Debug, Clone)]
struct Named {
    entry: Arc<Entry>,
    found: Arc<Found>,
    host: Arc<Host>,
}

impl NamedHosts {
    /// These are among them from now on. A name that leads elsewhere stays the same host; one that was forgotten begins anew. Called by one
    /// thread at a time.
    pub(super) fn add(&self, cluster: &Cluster, known: impl Iterator<Item = (Arc<Entry>, Arc<Found>)>) {
        let Some(shared) = &cluster.unlisted else { return };
        let mut hosts = ByName::clone(&self.0.load());
        let socket = cluster.config.socket_matches.of(None);
        for (entry, found) in known {
            let same = hosts.get(&entry.authority).filter(|named| Arc::ptr_eq(&named.entry, &entry));
            let counters = same.map(|named| Arc::clone(&named.host.counters));
            let counters = counters.unwrap_or_else(|| Arc::new(shared.of_another()));
            if let Some(host) = made(&entry, &found, (&counters, socket)) {
                hosts.insert_mut(Arc::clone(&entry.authority), Named { entry, found, host });
            }
        }
        self.0.store(Arc::new(hosts));
    }

    /// This is none of them any more. Called by one thread at a time.
    pub(super) fn remove(&self, authority: &str) {
        self.0.store(Arc::new(self.0.load().remove(authority)));
    }

    /// All of them, by their names.
    pub(crate) fn all(&self) -> Vec<Arc<Host>> {
        let hosts = self.0.load();
        let mut all: Vec<_> = hosts.values().map(|named| Arc::clone(&named.host)).collect();
        all.sort_by(|a, b| a.hostname().cmp(b.hostname()));
        all
    }

    fn get(&self, entry: &Arc<Entry>, found: &Arc<Found>) -> Option<Arc<Host>> {
        let hosts = self.0.load();
        let named = hosts.get(&entry.authority)?;
        let same = Arc::ptr_eq(&named.entry, entry) && Arc::ptr_eq(&named.found, found);
        same.then(|| Arc::clone(&named.host))
    }
}

/// The hosts of a cluster that one worker has used.
#[derive(Default)]
pub(super) struct DynamicHosts {
    seen: Cell<u64>,
    hosts: RefCell<HashMap<Arc<str>, Used>>,
}

struct Used {
    entry: Arc<Entry>,
    found: Arc<Found>,
    host: Rc<WorkerHost>,
}

impl DynamicHosts {
    /// The host of `cluster` that a request asks for by `host`; `None`: it is not known.
    pub(super) fn host(
        &self,
        (cluster, cache): (&Cluster, &DnsCache),
        (host, default_port): (&str, u16),
        (worker, options): (usize, PoolOptions),
    ) -> Option<Rc<WorkerHost>> {
        let authority = authority::with_port(host, default_port);
        let entries = cache.entries();
        let entry = cache.used(&entries, &authority)?;
        let found = entry.found.load();
        let found = found.as_ref()?;
        // A cluster that is new may not have been told of what the cache knows: for a moment, all of its hosts are counted as one.
        let made = || {
            let socket = cluster.config.socket_matches.of(None);
            cluster.named.get(entry, found).or_else(|| made(entry, found, (cluster.unlisted.as_ref()?, socket)))
        };
        let mut hosts = self.hosts.borrow_mut();
        if let Some(used) = hosts.get_mut(&*authority).filter(|used| Arc::ptr_eq(&used.entry, entry)) {
            if !Arc::ptr_eq(&used.found, found) {
                // Connections stay: new ones go to the new addresses.
                used.host = Rc::clone(&used.host).now(&made()?, options);
                used.found = Arc::clone(found);
            }
            return Some(Rc::clone(&used.host));
        }
        let host = WorkerHost::new(made()?, worker);
        let used = Used { entry: Arc::clone(entry), found: Arc::clone(found), host: Rc::clone(&host) };
        // The name was forgotten in the meantime, and its connections with it.
        if let Some(forgotten) = hosts.insert(Arc::clone(&entry.authority), used) {
            forgotten.host.retire();
        }
        Some(host)
    }

    /// Lets go of hosts that the cache has forgotten.
    pub(super) fn forget(&self, cache: &DnsCache) {
        let version = cache.version();
        if self.seen.replace(version) == version {
            return;
        }
        self.hosts.borrow_mut().retain(|_, used| {
            let keep = cache.has(&used.entry);
            if !keep {
                used.host.retire();
            }
            keep
        });
    }

    /// The cluster is gone.
    pub(super) fn retire(&self) {
        self.hosts.borrow().values().for_each(|used| used.host.retire());
    }
}

fn made(entry: &Entry, found: &Found, (counters, socket): (&Arc<HostCounters>, SocketIndex)) -> Option<Arc<Host>> {
    let (first, others) = found.addresses.split_first()?;
    let address = EndpointAddress::Ip(*first);
    Some(Arc::new(Host {
        text: Host::text_of(&address),
        address,
        weight: 1,
        said_weight: 1,
        health: HealthStatus::Healthy,
        extras: Extras::new((&*entry.authority).into(), others.into(), None),
        socket,
        locality: Arc::new(Locality::default()),
        priority: 0,
        healthy_since: None,
        slot: 0,
        vitals: None,
        counters: Arc::clone(counters),
    }))
}
