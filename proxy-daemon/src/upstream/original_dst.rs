//! Hosts of ORIGINAL_DST clusters: made when a destination is first asked for, forgotten when it is no longer used.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    host::{Host, HostCounters},
    worker::WorkerHost,
};
use crate::config::model::{EndpointAddress, HealthStatus, Locality};

/// How many destinations a worker keeps for one cluster; a scan of the address space must not fill the memory.
const MAX_HOSTS: usize = 65_536;

#[derive(Default)]
pub(super) struct OriginalDstHosts {
    hosts: RefCell<HashMap<SocketAddr, Entry>>,
    last_sweep: RefCell<Option<Instant>>,
}

struct Entry {
    host: Rc<WorkerHost>,
    last_used: Instant,
}

impl OriginalDstHosts {
    /// The host at `destination`. Hosts without use for `cleanup_interval` go at the same time.
    ///
    /// What is counted for it goes to `counters`, which all hosts of the cluster share.
    pub(super) fn host(
        &self,
        destination: SocketAddr,
        worker: usize,
        cleanup_interval: Duration,
        counters: &Arc<HostCounters>,
    ) -> Rc<WorkerHost> {
        let now = Instant::now();
        self.sweep(now, cleanup_interval);
        let mut hosts = self.hosts.borrow_mut();
        if let Some(entry) = hosts.get_mut(&destination) {
            entry.last_used = now;
            return Rc::clone(&entry.host);
        }
        let host = WorkerHost::new(
            Arc::new(Host {
                text: Host::text_of(&EndpointAddress::Ip(destination)),
                address: EndpointAddress::Ip(destination),
                additional_addresses: Box::default(),
                weight: 1,
                said_weight: 1,
                health: HealthStatus::Healthy,
                hostname: Box::default(),
                metadata: None,
                locality: Arc::new(Locality::default()),
                priority: 0,
                healthy_since: None,
                slot: 0,
                vitals: None,
                counters: Arc::clone(counters),
            }),
            worker,
        );
        if hosts.len() < MAX_HOSTS {
            hosts.insert(destination, Entry { host: Rc::clone(&host), last_used: now });
        } else {
            host.retire(); // serves this one request, and its connection is not kept
        }
        host
    }

    fn sweep(&self, now: Instant, cleanup_interval: Duration) {
        let mut last = self.last_sweep.borrow_mut();
        if last.is_some_and(|last| now.duration_since(last) < cleanup_interval) {
            return;
        }
        *last = Some(now);
        self.hosts.borrow_mut().retain(|_, entry| {
            let keep = entry.host.active() > 0 || now.duration_since(entry.last_used) < cleanup_interval;
            if !keep {
                entry.host.retire();
            }
            keep
        });
    }
}
