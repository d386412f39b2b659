use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc,
    },
    time::Instant,
};

use http::{HeaderMap, HeaderName};
use once_cell::race::OnceBox;

use super::{
    by_address::ByAddress,
    drop_overload::Drops,
    lb::{Balancer, Level},
    vitals::{self, Moment, Standing, Vitals},
};
use crate::config::model::{
    AssignmentPolicy, Endpoint, EndpointAddress, EndpointDetails, HealthStatus, LbMetadata, Locality, SocketIndex,
};

/// By which a host says that it is a canary.
static CANARY: HeaderName = HeaderName::from_static("x-envoy-upstream-canary");

/// One endpoint of a cluster.
#[derive(Debug, Clone)]
pub struct Host {
    /// Where it listens. Never a name: those are looked up first.
    pub address: EndpointAddress,
    /// The address as logs and `/clusters` print it.
    pub text: Box<str>,
    /// Its share of the load; at least 1.
    pub weight: u32,
    /// What discovery says of that.
    pub(super) said_weight: u32,
    /// What discovery says of it.
    pub health: HealthStatus,
    /// What discovery says of few hosts: a hundred thousand others have no room for it.
    pub(super) extras: Option<Box<Extras>>,
    /// How connections to it are encrypted.
    pub(super) socket: SocketIndex,
    /// Where it is.
    pub locality: Arc<Locality>,
    /// 0 is used first.
    pub priority: u32,
    /// Since when it has been healthy, the first time: what slow start goes by.
    pub(super) healthy_since: Option<Moment>,
    /// Where workers keep what is theirs of it: the same for its earlier and later versions, and no other host's of the cluster.
    pub(super) slot: u32,
    /// What is found out about its health; `None` where nothing looks. Shared with its earlier and later versions, as long as the cluster
    /// is not replaced.
    pub vitals: Option<Arc<Vitals>>,
    /// Shared with the same host's earlier and later versions.
    pub counters: Arc<HostCounters>,
}

/// What discovery says of a host besides its address.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extras {
    hostname: Box<str>,
    additional_addresses: Box<[SocketAddr]>,
    details: Option<Arc<EndpointDetails>>,
}

impl Extras {
    /// `None` where there is nothing of all that.
    pub(super) fn new(
        hostname: Box<str>,
        additional_addresses: Box<[SocketAddr]>,
        details: Option<Arc<EndpointDetails>>,
    ) -> Option<Box<Extras>> {
        let extras = Extras { hostname, additional_addresses, details };
        (extras != Extras::default()).then(|| Box::new(extras))
    }

    /// What an endpoint has.
    pub(super) fn of(endpoint: &Endpoint) -> Option<Box<Extras>> {
        let Endpoint { hostname, additional_addresses, details, .. } = endpoint;
        Extras::new(hostname.clone(), additional_addresses.clone(), details.clone())
    }

    /// Whether an endpoint has just these.
    pub(super) fn are_of(extras: Option<&Extras>, endpoint: &Endpoint) -> bool {
        match extras {
            Some(Extras { hostname, additional_addresses, details }) => {
                *hostname == endpoint.hostname
                    && *additional_addresses == endpoint.additional_addresses
                    && *details == endpoint.details
            }
            None => {
                endpoint.hostname.is_empty() && endpoint.additional_addresses.is_empty() && endpoint.details.is_none()
            }
        }
    }
}

impl Host {
    /// For `auto_host_rewrite`; may be empty.
    pub fn hostname(&self) -> &str {
        self.extras.as_ref().map_or("", |extras| &extras.hostname)
    }

    /// Where else it listens: tried in turn where `address` does not answer.
    pub fn additional_addresses(&self) -> &[SocketAddr] {
        self.extras.as_ref().map_or(&[], |extras| &extras.additional_addresses)
    }

    /// What else discovery says of it, where it says anything.
    pub fn details(&self) -> Option<&Arc<EndpointDetails>> {
        self.extras.as_ref()?.details.as_ref()
    }

    /// The address as logs and `/clusters` print it.
    pub fn display(&self) -> &str {
        &self.text
    }

    /// Its name, or its address where it has none.
    pub fn name(&self) -> &str {
        if self.hostname().is_empty() { &self.text } else { self.hostname() }
    }

    /// Since when it has been healthy: what slow start goes by.
    pub(super) fn healthy_since(&self) -> Option<Instant> {
        let since = self.vitals.as_ref().and_then(|vitals| vitals.well_since()).or(self.healthy_since);
        since.and_then(Moment::instant)
    }

    /// What its health makes of it now.
    pub fn standing(&self) -> Standing {
        Standing::new(self.health, self.vitals.as_deref())
    }

    /// Which metrics it has reported since the last call, by name: in how many responses, and the sum of their values. For load
    /// reports: there is one reporter.
    pub(crate) fn reported_metrics(&self) -> BTreeMap<String, (u64, f64)> {
        let reports = self.vitals.as_ref().and_then(|vitals| vitals.reports());
        reports.map(|reports| reports.latch()).unwrap_or_default()
    }

    /// How it stands for requests that name it.
    pub fn status(&self) -> HealthStatus {
        vitals::status(self.health, self.vitals.as_deref())
    }

    /// What its metadata says under `envoy.lb`.
    pub fn metadata(&self) -> Option<&LbMetadata> {
        self.details()?.metadata.as_ref()
    }

    /// Whether its metadata says `canary` under `envoy.lb`.
    pub fn is_canary(&self) -> bool {
        self.metadata().and_then(|metadata| metadata.get("canary")?.as_bool()).unwrap_or(false)
    }

    /// Whether a response of its is counted as a canary's: one that says `x-envoy-upstream-canary`, or any of a host that is one.
    pub(crate) fn answers_as_canary(&self, headers: &HeaderMap) -> bool {
        headers.get(&CANARY).is_some_and(|said| said == "true") || self.is_canary()
    }

    /// What it is hashed by: what its metadata says, or its name, or its address.
    pub(super) fn hash_key(&self, by_hostname: bool) -> &str {
        let said = self.metadata().and_then(|metadata| metadata.get("hash_key")?.as_str());
        said.unwrap_or(if by_hostname { self.hostname() } else { &self.text })
    }

    /// What [`display`](Self::display) shows of an address.
    pub(super) fn text_of(address: &EndpointAddress) -> Box<str> {
        match address {
            EndpointAddress::Ip(address) => address.to_string().into(),
            EndpointAddress::Dns { host, port } => format!("{host}:{port}").into(),
            EndpointAddress::Pipe(path) => path.display().to_string().into(),
        }
    }
}

/// The counters of a host, as `/clusters` shows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum HostCounter {
    /// Open connections.
    CxActive,
    /// Connections that failed to open.
    CxConnectFail,
    /// Connections opened.
    CxTotal,
    /// Requests in flight.
    RqActive,
    /// Requests that ended in a 5xx or a gRPC status like it, that timed out, or that the host left unanswered.
    RqError,
    /// Requests with any other response. Those that the client gave up count as neither.
    RqSuccess,
    /// Requests that timed out.
    RqTimeout,
    /// Requests that got a connection.
    RqTotal,
}

impl HostCounter {
    /// In the order in which Envoy prints them.
    pub const ALL: [(HostCounter, &'static str); 8] = [
        (HostCounter::CxActive, "cx_active"),
        (HostCounter::CxConnectFail, "cx_connect_fail"),
        (HostCounter::CxTotal, "cx_total"),
        (HostCounter::RqActive, "rq_active"),
        (HostCounter::RqError, "rq_error"),
        (HostCounter::RqSuccess, "rq_success"),
        (HostCounter::RqTimeout, "rq_timeout"),
        (HostCounter::RqTotal, "rq_total"),
    ];
}

/// A host's counters: one cache line a worker, which no other worker writes. They take memory from the first count on: most
/// hosts of thousands of clusters never see a request.
#[derive(Debug)]
pub struct HostCounters {
    used: OnceBox<Used>,
    workers: u32,
}

#[derive(Debug)]
struct Used {
    lines: Box<[Line]>,
    /// What [`HostCounters::latch`] has told already, by counter. Workers never touch it.
    latched: [AtomicU64; 8],
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([AtomicU64; 8]);

impl HostCounters {
    /// All zero.
    pub fn new(workers: usize) -> HostCounters {
        // There are never more workers than fit.
        HostCounters { used: OnceBox::new(), workers: workers as u32 }
    }

    /// Others, of a host of the same cluster: all zero.
    pub(super) fn of_another(&self) -> HostCounters {
        HostCounters { used: OnceBox::new(), workers: self.workers }
    }

    fn used(&self) -> &Used {
        self.used.get_or_init(|| {
            let lines = (0..self.workers).map(|_| Line::default()).collect();
            Box::new(Used { lines, latched: Default::default() })
        })
    }

    /// Adds to a counter of `worker`, which must be the calling worker.
    pub fn add(&self, worker: usize, counter: HostCounter, delta: i64) {
        let slot = &self.used().lines[worker].0[counter as usize];
        slot.store(slot.load(Relaxed).wrapping_add_signed(delta), Relaxed);
    }

    /// The sum over all workers.
    pub fn sum(&self, counter: HostCounter) -> u64 {
        let lines = self.used.get().map(|used| &*used.lines).unwrap_or_default();
        lines.iter().fold(0, |sum, line| sum.wrapping_add(line.0[counter as usize].load(Relaxed)))
    }

    /// The sum over all workers but this one: a look at a cache line of each.
    pub fn of_others(&self, worker: usize, counter: HostCounter) -> u64 {
        let lines = self.used.get().map(|used| &*used.lines).unwrap_or_default();
        let others = lines.iter().enumerate().filter(|(other, _)| *other != worker);
        others.fold(0, |sum, (_, line)| sum.wrapping_add(line.0[counter as usize].load(Relaxed)))
    }

    /// What was counted since the last call for this counter. For load reports: there is one reporter.
    pub fn latch(&self, counter: HostCounter) -> u64 {
        let Some(used) = self.used.get() else { return 0 };
        let sum = self.sum(counter);
        sum.wrapping_sub(used.latched[counter as usize].swap(sum, Relaxed))
    }
}

/// A cluster's hosts at one moment.
#[derive(Debug, Default)]
pub struct HostSet {
    /// In the order of the configuration.
    pub hosts: Vec<Arc<Host>>,
    /// The same by their addresses.
    pub(super) by_address: ByAddress,
    /// The numbers of the hosts, by their slots; `u32::MAX`: a slot that no host has.
    pub(super) by_slot: Vec<u32>,
    /// The hosts by priority and locality.
    pub(super) levels: Vec<Level>,
    /// How one of them is chosen; `None` in ORIGINAL_DST clusters.
    pub(super) balancer: Option<Balancer>,
    /// The share of requests that is dropped before a host is chosen.
    pub(super) drops: Drops,
}

impl HostSet {
    /// Lets go of a set. Whoever does so last would have to take it apart, which takes a while for thousands of hosts: that is done
    /// aside, where no request waits for it.
    pub(super) fn leave(self: Arc<HostSet>) {
        const FEW: usize = 1000;
        static ASIDE: LazyLock<Option<mpsc::Sender<HostSet>>> = LazyLock::new(|| {
            let (sender, sets) = mpsc::channel();
            // It ends with the process.
            let thread = std::thread::Builder::new().name("old_hosts".to_owned());
            thread.spawn(move || sets.into_iter().for_each(drop)).ok().map(|_| sender)
        });
        if self.hosts.len() > FEW
            && let Some(set) = Arc::into_inner(self)
            && let Some(aside) = &*ASIDE
        {
            // Without the thread, it is dropped here.
            let _ = aside.send(set);
        }
    }

    /// What the assignment says of overprovisioning, in percent.
    pub fn overprovisioning_factor(&self) -> u32 {
        let policy = self.levels.first().map(Level::policy);
        policy.map_or(AssignmentPolicy::default().overprovisioning_factor, |policy| policy.overprovisioning_factor)
    }

    /// What each host gets of the load, as long as nothing changes: those that get nothing are left out. `None`: hosts are
    /// chosen by what only a request tells, or by the cluster itself.
    pub fn shares(&self) -> Option<Vec<(&Arc<Host>, f64)>> {
        let shares = self.balancer.as_ref()?.shares(&self.hosts, &self.levels)?;
        Some(shares.into_iter().map(|(number, share)| (&self.hosts[number as usize], share)).collect())
    }

    /// What load reports call the requests that are dropped.
    pub(crate) fn drop_category(&self) -> &str {
        self.drops.category()
    }

    /// The weight of a locality at a priority; 0 where none is said.
    pub fn locality_weight(&self, priority: u32, locality: &Locality) -> u32 {
        self.levels.get(priority as usize).map_or(0, |level| level.weight(locality))
    }

    /// The host at this address.
    pub(super) fn at(&self, address: &EndpointAddress) -> Option<&Arc<Host>> {
        self.hosts.get(self.by_address.get(&self.hosts, address)? as usize)
    }

    /// How many priorities have other hosts than they had before, which is what Envoy calls a change of the membership.
    pub(super) fn priorities_other_than(&self, before: &HostSet) -> u64 {
        let mut changed = BTreeSet::new();
        for slot in 0..self.by_slot.len().max(before.by_slot.len()) {
            match (before.in_slot(slot), self.in_slot(slot)) {
                (Some(old), Some(new)) if old.priority == new.priority && Arc::ptr_eq(&old.counters, &new.counters) => {
                }
                (old, new) => changed.extend(old.into_iter().chain(new).map(|host| host.priority)),
            }
        }
        changed.len() as u64
    }

    /// The host with this slot.
    pub(super) fn in_slot(&self, slot: usize) -> Option<&Arc<Host>> {
        let number = *self.by_slot.get(slot)?;
        self.hosts.get(number as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_sees_what_the_others_have() {
        let counters = HostCounters::new(3);
        assert_eq!(counters.of_others(0, HostCounter::RqActive), 0);
        counters.add(0, HostCounter::RqActive, 5);
        counters.add(1, HostCounter::RqActive, 2);
        counters.add(2, HostCounter::RqActive, 1);
        counters.add(2, HostCounter::RqTotal, 9);
        let seen = [0, 1, 2].map(|worker| counters.of_others(worker, HostCounter::RqActive));
        assert_eq!(seen, [3, 6, 7]);
    }

    /// With their counts of references; there may be a hundred thousand of them.
    #[test]
    fn hosts_are_small() {
        assert_eq!(size_of::<Host>() + 16, 128);
        assert_eq!(size_of::<HostCounters>() + 16, 32);
    }
}
