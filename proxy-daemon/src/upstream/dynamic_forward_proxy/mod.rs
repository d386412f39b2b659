//! `envoy.clusters.dynamic_forward_proxy`: hosts are what requests call them, found by names that are looked up when somebody asks.

mod authority;
mod cache;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
};

pub use self::cache::DnsCache;
use self::cache::Entry;
pub(crate) use self::{
    authority::split,
    cache::{Asked, Found, Pending},
};
use super::{
    host::{Extras, Host, HostCounters},
    worker::WorkerHost,
};
use crate::config::model::{EndpointAddress, HealthStatus, Locality, PoolOptions, SocketIndex};

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
    /// The host that a request asks for by `host`; `None`: it is not known. What is counted for it goes to `counters`, which all hosts of the
    /// cluster share; connections to it are encrypted as `socket` says.
    pub(super) fn host(
        &self,
        cache: &DnsCache,
        (host, default_port): (&str, u16),
        (worker, options): (usize, PoolOptions),
        (counters, socket): (&Arc<HostCounters>, SocketIndex),
    ) -> Option<Rc<WorkerHost>> {
        let authority = authority::with_port(host, default_port);
        let entries = cache.entries();
        let entry = cache.used(&entries, &authority)?;
        let found = entry.found.load();
        let found = found.as_ref()?;
        let mut hosts = self.hosts.borrow_mut();
        if let Some(used) = hosts.get_mut(&*authority).filter(|used| Arc::ptr_eq(&used.entry, entry)) {
            if !Arc::ptr_eq(&used.found, found) {
                // Connections stay: new ones go to the new addresses.
                used.host = Rc::clone(&used.host).now(&made(entry, found, (counters, socket))?, options);
                used.found = Arc::clone(found);
            }
            return Some(Rc::clone(&used.host));
        }
        let host = WorkerHost::new(made(entry, found, (counters, socket))?, worker);
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
