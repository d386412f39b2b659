//! A worker's own view of the clusters: balancers, pools, and hosts that it alone touches.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    fmt,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
    time::Duration,
};

use super::{
    Cluster, ClusterMap, Clusters, Host, HostCounter, Overload, Seen,
    aggregate::WorkerMembers,
    ahead::Ahead,
    dynamic_forward_proxy::DynamicHosts,
    lb::{Pick, Target, TriedPriorities, Turns},
    mine::Mine,
    named::Named,
    original_dst::{NewHosts, destination_of},
    pool::Pool,
};
use crate::{
    config::model::{Discovery, EndpointAddress, MetadataMatch, PoolOptions},
    tls::{PeerName, Secrets},
};

/// All clusters as one worker sees them.
pub struct WorkerClusters {
    shared: Arc<Clusters>,
    worker: usize,
    version: Cell<u64>,
    /// All there are, of that version.
    map: RefCell<Arc<ClusterMap>>,
    /// Those that this worker has used: most workers use few of thousands.
    used: RefCell<HashMap<Arc<str>, Rc<WorkerCluster>>>,
    /// Aggregates find their members here.
    this: Weak<WorkerClusters>,
}

impl WorkerClusters {
    /// For the worker with this index.
    pub fn new(shared: Arc<Clusters>, worker: usize) -> Rc<WorkerClusters> {
        Rc::new_cyclic(|this| WorkerClusters {
            shared,
            worker,
            version: Cell::new(0),
            map: RefCell::default(),
            used: RefCell::default(),
            this: Weak::clone(this),
        })
    }

    /// The secrets of the process.
    pub fn secrets(&self) -> &Arc<Secrets> {
        self.shared.secrets()
    }

    /// Grows with every cluster that is added, replaced or removed.
    pub(super) fn version(&self) -> u64 {
        self.shared.version()
    }

    /// Adopts what changed, so that connections to hosts that are gone do not wait for the next request to be closed.
    pub fn tick(&self) {
        let version = self.shared.version();
        if version != self.version.get() {
            self.refresh(version);
        }
        for cluster in self.used.borrow().values() {
            if let Discovery::DynamicForwardProxy { cache, .. } = &cluster.cluster.config.discovery {
                cluster.dynamic.forget(cache);
            }
            let version = cluster.cluster.hosts_version();
            // A cluster that was never used has nothing to close.
            if cluster.hosts_version.get() != 0 && version != cluster.hosts_version.get() {
                cluster.refresh(version);
            }
            if let Discovery::OriginalDst { cleanup_interval, .. } = cluster.cluster.config.discovery {
                cluster.settle_new(cleanup_interval);
            }
        }
    }

    /// The cluster of this name now.
    pub fn get(&self, name: &str) -> Option<Rc<WorkerCluster>> {
        let version = self.shared.version();
        if version != self.version.get() {
            self.refresh(version);
        }
        if let Some(known) = self.used.borrow().get(name) {
            return Some(Rc::clone(known));
        }
        self.first_use(name)
    }

    #[cold]
    fn first_use(&self, name: &str) -> Option<Rc<WorkerCluster>> {
        let map = self.map.borrow();
        let (name, shared) = map.get_key_value(name)?;
        let cluster = Rc::new(WorkerCluster::new(Arc::clone(shared), self.worker, &self.this));
        self.used.borrow_mut().insert(Arc::clone(name), Rc::clone(&cluster));
        Some(cluster)
    }

    /// Adopts the registry's clusters; those that did not change keep their state.
    fn refresh(&self, version: u64) {
        self.version.set(version);
        let map = self.shared.load();
        self.used.borrow_mut().retain(|name, cluster| match map.get(name) {
            Some(shared) => {
                if !Arc::ptr_eq(&cluster.cluster, shared) {
                    *cluster = Rc::new(WorkerCluster::replacing(cluster, Arc::clone(shared), &self.this));
                }
                true
            }
            None => {
                cluster.retire();
                false
            }
        });
        self.map.replace(map);
    }
}

/// The priority of a member that an aggregate has chosen, and whether its degraded hosts are meant.
#[derive(Debug, Clone, Copy)]
pub struct Placed(pub(super) Target);

/// What a pick may depend on.
#[derive(Debug, Clone, Copy, Default)]
pub struct PickCx<'a> {
    /// Set by a filter: wins over all others in an ORIGINAL_DST cluster.
    pub override_dst: Option<SocketAddr>,
    /// The request's headers, where there is a request.
    pub headers: Option<&'a http::HeaderMap>,
    /// What a request calls its host; on a connection without requests what its client does.
    pub host: Option<&'a str>,
    /// The port of that host, where its name says none; `None`: as the cluster has it.
    pub port: Option<u16>,
    /// The connection's own destination, where the listener restores it.
    pub original_dst: Option<SocketAddr>,
    /// What balancers go by that hash.
    pub hash: Option<u64>,
    /// How many hosts have been passed over.
    pub attempt: u32,
    /// What the host's metadata has to say, where the cluster has subsets.
    pub metadata_match: Option<&'a MetadataMatch>,
    /// The priorities of earlier attempts, where those are to be avoided.
    pub tried: Option<&'a TriedPriorities>,
    /// What an aggregate has chosen.
    pub target: Option<Placed>,
}

/// A cluster as one worker sees it.
pub struct WorkerCluster {
    /// What all workers share.
    pub cluster: Arc<Cluster>,
    worker: usize,
    hosts_version: Cell<u64>,
    mine: Rc<Mine>,
    turns: RefCell<Turns>,
    /// Of an ORIGINAL_DST cluster.
    new_hosts: NewHosts,
    dynamic: DynamicHosts,
    /// Where connections are opened before requests need them, whichever host they are for.
    pub(super) ahead: Option<(f64, Ahead)>,
    /// Of an aggregate.
    pub(super) members: Option<WorkerMembers>,
    /// What filters count below the cluster's name: those of clients' making are bounded over all of its versions.
    pub(super) named: Rc<Named>,
}

impl fmt::Debug for WorkerCluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkerCluster").field(&self.cluster.config.name).finish()
    }
}

impl WorkerCluster {
    fn new(cluster: Arc<Cluster>, worker: usize, clusters: &Weak<WorkerClusters>) -> WorkerCluster {
        let members = cluster.plan.is_some().then(|| WorkerMembers::new(clusters));
        let mine = Rc::new(Mine::new(cluster.config.pool));
        let ahead = Ahead::ratio(&cluster.config).map(|ratio| (ratio, Ahead::default()));
        WorkerCluster {
            members,
            cluster,
            worker,
            hosts_version: Cell::new(0),
            mine,
            turns: RefCell::default(),
            new_hosts: NewHosts::default(),
            dynamic: DynamicHosts::default(),
            ahead,
            named: Rc::default(),
        }
    }

    /// A cluster whose configuration changed: hosts keep their connections only where those would be made alike.
    fn replacing(before: &WorkerCluster, cluster: Arc<Cluster>, clusters: &Weak<WorkerClusters>) -> WorkerCluster {
        let mut next = WorkerCluster::new(cluster, before.worker, clusters);
        let (old, new) = (&before.cluster.config, &next.cluster.config);
        if old.stat_name == new.stat_name {
            next.named = Rc::clone(&before.named);
        }
        if old.connects_as(new) {
            // Streams that began with the one before may choose of its hosts again.
            next.mine = Rc::new(before.mine.of_next_version(new.pool));
            before.dynamic.retire();
            before.new_hosts.retire();
            // Without a request for it, nobody would close what leads to hosts that it has no more.
            next.refresh(next.cluster.hosts_version());
        } else {
            before.retire();
        }
        next
    }

    fn retire(&self) {
        self.mine.retire();
        self.new_hosts.retire();
        self.dynamic.retire();
    }

    /// The port of a host whose name says none.
    pub fn default_port(&self) -> u16 {
        if self.cluster.sockets.own().is_some() { 443 } else { 80 }
    }

    /// The worker's index.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// What a TCP proxy's connection calls its host, where that is found by the name that the client has asked for.
    pub(crate) fn peer_of_connection(&self, name: Option<&str>) -> Option<PeerName> {
        let Discovery::DynamicForwardProxy { .. } = &self.cluster.config.discovery else { return None };
        self.cluster.config.peer_name.as_ref()?.of(name?)
    }

    /// What becomes of a request by the share of them that is dropped.
    pub fn overload(&self) -> Overload {
        let version = self.cluster.hosts_version();
        if version != self.hosts_version.get() {
            self.refresh(version);
        }
        self.mine.set().drops.decide()
    }

    /// Chooses a host; `None` where no host may be used. An aggregate has none: [`choose`](Self::choose) does for all.
    pub fn pick(&self, cx: &PickCx<'_>) -> Option<Rc<WorkerHost>> {
        if let Discovery::OriginalDst { http_header, port_override, .. } = &self.cluster.config.discovery {
            let mut destination = self.destination(cx, http_header.as_ref())?;
            if let Some(port) = port_override {
                destination.set_port(*port);
            }
            return self.host_of(destination);
        }
        if let Discovery::DynamicForwardProxy { cache, .. } = &self.cluster.config.discovery {
            return self.dynamic.host(
                (&*self.cluster, &**cache),
                (cx.host?, cx.port.unwrap_or_else(|| self.default_port())),
                (self.worker, self.cluster.config.pool),
            );
        }
        let version = self.cluster.hosts_version();
        if version != self.hosts_version.get() {
            self.refresh(version);
        }
        if let Some(host) = self.ahead.as_ref().and_then(|(_, ahead)| ahead.take(cx)) {
            return Some(host);
        }
        self.balance(cx)
    }

    /// The host that the next request will get, as it seems.
    pub(super) fn choose_ahead(&self) -> Option<Rc<WorkerHost>> {
        let (_, ahead) = self.ahead.as_ref()?;
        ahead.add(self.mine.set().hosts.len(), || self.balance(&PickCx::default()))
    }

    /// Has the balancer choose.
    fn balance(&self, cx: &PickCx<'_>) -> Option<Rc<WorkerHost>> {
        let set = self.mine.set();
        // What is this worker's counts from when a host is chosen, what is the others' when it has got a connection.
        let active = |number: u32| {
            let host = &set.hosts[number as usize];
            let others = host.counters.of_others(self.worker, HostCounter::RqActive);
            self.mine.active(host).saturating_add(u32::try_from(others).unwrap_or(u32::MAX))
        };
        let failed = |number: u32| self.mine.has_failed(&set.hosts[number as usize]);
        let chosen = set.balancer.as_ref()?.pick(&mut Pick {
            hosts: &set.hosts,
            turns: &mut self.turns.borrow_mut(),
            active: &active,
            failed: &failed,
            hash: cx.hash,
            attempt: cx.attempt,
            criteria: cx.metadata_match,
            tried: cx.tried,
            target: cx.target.map(|Placed(target)| target),
            slow_start: None,
            stats: &self.cluster.stats,
        });
        Some(self.mine.of(&set.hosts[chosen? as usize], self.worker))
    }

    /// Whether hosts have changed and not all that was before has been gone through.
    #[cfg(test)]
    pub(super) fn settles(&self) -> bool {
        self.mine.settles()
    }

    /// What this worker keeps for its hosts, without those that it has used.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.mine.bytes() + self.turns.borrow().bytes()
    }

    /// The host at this address, whatever its health; of ORIGINAL_DST clusters there is none.
    pub fn host_at(&self, address: &str) -> Option<Rc<WorkerHost>> {
        let version = self.cluster.hosts_version();
        if version != self.hosts_version.get() {
            self.refresh(version);
        }
        let address = match address.parse() {
            Ok(address) => EndpointAddress::Ip(address),
            Err(_) => EndpointAddress::Pipe(address.into()),
        };
        let set = self.mine.set();
        Some(self.mine.of(set.at(&address)?, self.worker))
    }

    /// The destination of an ORIGINAL_DST pick, by Envoy's precedence: filter, header, connection.
    fn destination(&self, cx: &PickCx<'_>, header: Option<&http::HeaderName>) -> Option<SocketAddr> {
        if cx.override_dst.is_some() {
            return cx.override_dst;
        }
        if let Some(value) = header.and_then(|name| cx.headers?.get(name)) {
            match value.to_str().ok().and_then(destination_of) {
                Some(destination) => return Some(destination),
                None => self.cluster.stats.original_dst_host_invalid.inc(),
            }
        }
        cx.original_dst
    }

    /// The host of an ORIGINAL_DST cluster at a destination.
    fn host_of(&self, destination: SocketAddr) -> Option<Rc<WorkerHost>> {
        let version = self.cluster.hosts_version();
        if version != self.hosts_version.get() {
            self.refresh(version);
        }
        let set = self.mine.set();
        match set.at(&EndpointAddress::Ip(destination)) {
            Some(host) => Some(self.mine.of_or(host, self.worker, || self.new_hosts.take(destination))),
            None => self.new_hosts.host(destination, &self.cluster, self.worker),
        }
    }

    /// Lets go of hosts that this worker has made, and that the cluster has by now or nobody uses.
    fn settle_new(&self, unused: Duration) {
        let set = self.mine.set();
        self.new_hosts.settle(&set, unused, |host, known| drop(self.mine.of_or(host, self.worker, || Some(known))));
    }

    /// Adopts the cluster's hosts: those that stay keep their connections.
    fn refresh(&self, version: u64) {
        self.hosts_version.set(version);
        self.ahead.as_ref().inspect(|(_, ahead)| ahead.forget());
        let set = self.cluster.hosts();
        self.turns.replace(Turns::new(set.balancer.as_ref().map_or(0, |balancer| balancer.ids)));
        self.mine.adopt(set);
    }
}

/// A host as one worker sees it.
pub struct WorkerHost {
    /// What all workers share.
    pub host: Arc<Host>,
    /// This worker's connections to it.
    pub pool: Rc<Pool>,
    worker: usize,
    active: Rc<Cell<u32>>,
    /// How often it had failed when its connections were last looked at.
    failures: Cell<u32>,
}

impl WorkerHost {
    pub(super) fn new(host: Arc<Host>, worker: usize) -> Rc<WorkerHost> {
        let (pool, active) = (Rc::default(), Rc::default());
        let failures = Cell::new(failures(&host));
        Rc::new(WorkerHost { host, pool, worker, active, failures })
    }

    /// Whether this is of the same host, in whatever version.
    pub(super) fn is(&self, host: &Host) -> bool {
        Arc::ptr_eq(&self.host.counters, &host.counters)
    }

    /// The same host as it is now. Where its attributes (weight, health) are others, connections and load are kept.
    pub(super) fn now(self: Rc<Self>, host: &Arc<Host>, options: PoolOptions) -> Rc<WorkerHost> {
        if Arc::ptr_eq(&self.host, host) {
            self.follow(options);
            return self;
        }
        let (pool, active) = (Rc::clone(&self.pool), Rc::clone(&self.active));
        let same = match (&self.host.vitals, &host.vitals) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            _ => false,
        };
        let failures = Cell::new(if same { self.failures.get() } else { failures(host) });
        let now = Rc::new(WorkerHost { host: Arc::clone(host), pool, worker: self.worker, active, failures });
        now.follow(options);
        now
    }

    /// The hosts have changed, or their health: what is kept of connections to a host that has been found to be ill is not used again.
    fn follow(&self, options: PoolOptions) {
        let failures = failures(&self.host);
        let failed = self.failures.replace(failures) != failures;
        if failed && options.closes_failed {
            self.pool.close();
        } else if failed || options.drains_on_change {
            self.pool.drain();
        }
    }

    /// Requests and connections of this worker that are using the host.
    pub fn active(&self) -> u32 {
        self.active.get()
    }

    /// The host is gone: what is in flight finishes, nothing idle is kept.
    pub(super) fn retire(&self) {
        self.pool.retire();
    }

    /// Adds to one of the host's counters.
    pub fn count(&self, counter: HostCounter, delta: i64) {
        self.host.counters.add(self.worker, counter, delta);
    }

    /// A connect has failed.
    pub(crate) fn connect_failed(&self) {
        self.count(HostCounter::CxConnectFail, 1);
        self.pool.set_failure(true);
    }

    /// A request or connection came to this: outlier detection goes by it.
    pub(crate) fn saw(&self, seen: Seen) {
        if let Some(vitals) = &self.host.vitals {
            vitals.saw(self.worker, seen);
        }
    }

    /// A response with this status has these headers. Returns whether the host's load is wanted and not among them: then trailers may report it.
    pub(crate) fn heard(&self, status: u16, headers: &http::HeaderMap) -> bool {
        let Some(vitals) = &self.host.vitals else { return false };
        vitals.heard(status, headers);
        self.reports(headers)
    }

    /// The same of what is reported alone: a response has these headers or trailers.
    pub(crate) fn reports(&self, headers: &http::HeaderMap) -> bool {
        let reports = self.host.vitals.as_ref().and_then(|vitals| vitals.reports());
        reports.is_some_and(|reports| !reports.heard(self.worker, headers))
    }

    /// One more request is on its way to the host; [`end_request`](Self::end_request) must follow.
    pub fn begin_request(&self) {
        self.active.set(self.active.get() + 1);
    }

    /// A request that began has ended.
    pub fn end_request(&self) {
        self.active.set(self.active.get() - 1);
    }
}

/// How often a host has been found to be ill.
fn failures(host: &Host) -> u32 {
    host.vitals.as_ref().map_or(0, |vitals| vitals.failures())
}

/// A request, or a TCP proxy's connection, that a host has: from when it got a connection until it ends.
pub(crate) struct Issued(pub(super) Rc<WorkerHost>);

impl Issued {
    /// Counts it as issued and, until this is dropped, as in progress.
    pub(crate) fn to(host: &Rc<WorkerHost>) -> Issued {
        host.count(HostCounter::RqTotal, 1);
        host.count(HostCounter::RqActive, 1);
        Issued(Rc::clone(host))
    }
}

impl Drop for Issued {
    fn drop(&mut self) {
        self.0.count(HostCounter::RqActive, -1);
    }
}
