//! The control thread's handle on the workers.

mod listeners;

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, OnceLock, atomic::AtomicU64},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use culvert_xds_client::source::Source;
use tokio::sync::{mpsc, oneshot, watch};

use self::listeners::Running;
pub use self::listeners::{ListenerStatus, PreparedListener};
use super::{
    balancing,
    routes::RouteSlots,
    worker::{self, Command},
};
use crate::{
    access_log::{self, EventLog},
    config::model::{ClusterConfig, Discovery, DnsResolver, LocalNode, LocalityEndpoints, RouteConfig, Scope},
    http::filters::OffloadedTable,
    intercept::Interception,
    listener::ActiveListener,
    on_demand, stats,
    tls::{Secrets, SocketCertificates},
    upstream::{
        ClusterChange, ClusterMap, Clusters, dns::Names, health_check::ClusterChecks, orca, original_dst, outlier,
    },
};

/// How long a daemon that was replaced is waited for to take over again: it looks four times a second.
const TAKEN_WITHIN: Duration = Duration::from_secs(3);
/// How long a handshake may take that has begun when the listeners are about to close.
const UNDER_WAY: Duration = Duration::from_millis(250);

/// How the data plane is started.
pub struct Options {
    /// Number of worker threads; at least 1.
    pub workers: usize,
    /// How long connections of a listener that is gone may go on.
    pub drain_time: Duration,
    /// The kernel's part.
    pub interception: Option<Interception>,
}

/// Gives the workers their configuration. Cheap to clone; every change is made aside and swapped in at once.
#[derive(Clone)]
pub struct DataPlane(Arc<Inner>);

struct Inner {
    clusters: Arc<Clusters>,
    names: Arc<Names>,
    routes: RouteSlots,
    offloaded: Arc<ArcSwap<OffloadedTable>>,
    /// What requests need, until somebody takes it.
    on_demand: Mutex<Option<on_demand::Messages>>,
    workers: Mutex<Vec<mpsc::UnboundedSender<Command>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Those of the workers that have begun.
    runtimes: Vec<Arc<OnceLock<tokio::runtime::Handle>>>,
    listeners: Mutex<BTreeMap<Arc<str>, Running>>,
    interception: Mutex<Option<Interception>>,
    total_connections: stats::Gauge,
    worker_count: usize,
    next_socket: AtomicU64,
    /// Set for good when the daemon drains: no listener is added any more.
    draining: watch::Sender<bool>,
    /// Where ejections of hosts are told.
    outlier_log: OnceLock<EventLog>,
    control: tokio::runtime::Handle,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single insertion or removal: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// How long the end waits for access logs, and for taps, to be written.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);

impl DataPlane {
    /// Starts the workers. Must be called within the control runtime, which looks up names for them.
    ///
    /// # Errors
    /// A thread could not be started, or a map of the kernel's not be used; interception is over then.
    pub fn start(options: Options) -> std::io::Result<DataPlane> {
        let clusters = Arc::new(Clusters::new(options.workers));
        clusters.follow_runtime();
        let offloaded = Arc::new(ArcSwap::from_pointee(OffloadedTable::default()));
        let pods = options.interception.as_ref().map(Interception::pod_names).unwrap_or_default();
        let (asking, messages) = on_demand::channel();
        let cpus = processors();
        let node_ip = node_ip();
        let draining = watch::Sender::new(false);
        let spawn = |index: usize| {
            let (sender, commands) = mpsc::unbounded_channel();
            let runtime = Arc::default();
            let thread = worker::spawn(worker::Start {
                index,
                runtime: Arc::clone(&runtime),
                clusters: Arc::clone(&clusters),
                offloaded: Arc::clone(&offloaded),
                pods: Arc::clone(&pods),
                on_demand: asking.clone(),
                node_ip,
                host_flows: match &options.interception {
                    Some(interception) => interception.host_flows().map_err(std::io::Error::other)?,
                    None => None,
                },
                joins: match &options.interception {
                    Some(interception) => interception.joins().map_err(std::io::Error::other)?,
                    None => None,
                },
                drain_time: options.drain_time,
                draining: draining.subscribe(),
                // With fewer workers than processors the scheduler finds them better places than we do.
                cpu: (options.workers >= cpus.len()).then(|| cpus.get(index % cpus.len().max(1)).copied()).flatten(),
                commands,
            })?;
            Ok((sender, (thread, runtime)))
        };
        let spawned: std::io::Result<Vec<_>> = (0..options.workers).map(spawn).collect();
        let (senders, (threads, runtimes)): (Vec<_>, (Vec<_>, Vec<_>)) = match spawned {
            Ok(workers) => workers.into_iter().unzip(),
            Err(error) => {
                end_interception(options.interception);
                return Err(error);
            }
        };
        let balancing = options.interception.as_ref().and_then(Interception::balancing);
        let plane = DataPlane(Arc::new(Inner {
            names: Arc::new(Names::new(Arc::clone(&clusters))),
            clusters,
            routes: RouteSlots::default(),
            offloaded,
            on_demand: Mutex::new(Some(messages)),
            workers: Mutex::new(senders),
            threads: Mutex::new(threads),
            runtimes,
            listeners: Mutex::default(),
            interception: Mutex::new(options.interception),
            total_connections: stats::gauge("server.total_connections"),
            worker_count: options.workers,
            next_socket: AtomicU64::new(0),
            draining,
            outlier_log: OnceLock::new(),
            control: tokio::runtime::Handle::current(),
        }));
        if let Some(config) = balancing {
            plane.0.control.spawn(balancing::follow(Arc::downgrade(&plane.0), config));
        }
        Ok(plane)
    }

    /// Says where this node is, and which cluster it is of. Before there are any clusters.
    pub fn set_local_node(&self, node: LocalNode) {
        self.0.clusters.set_local_node(node);
    }

    /// Says where ejections of hosts are told. Before there are any clusters.
    pub fn set_outlier_log(&self, log: EventLog) {
        // A later word changes nothing.
        let _ = self.0.outlier_log.set(log);
    }

    /// Says who is asked for the addresses of names where a cluster names nobody.
    pub fn set_resolver(&self, resolver: DnsResolver) {
        self.0.names.set_default(resolver);
    }

    /// Adds a cluster, or replaces the one of the same name.
    pub fn upsert_cluster(&self, config: ClusterConfig) {
        self.change_clusters(vec![ClusterChange::Upsert(Box::new(config), None, None)]);
    }

    /// Carries out all of these at once: workers see none of them or all.
    pub fn change_clusters(&self, changes: Vec<ClusterChange>) {
        let mut new = Vec::new();
        for change in &changes {
            match change {
                ClusterChange::Upsert(config, ..) => {
                    self.0.names.forget(&config.name);
                    new.push(Arc::clone(&config.name));
                }
                ClusterChange::Remove(name) => self.0.names.forget(name),
            }
        }
        // It may begin to check hosts.
        let guard = self.0.control.enter();
        self.0.clusters.change(changes);
        drop(guard);
        let map = self.0.clusters.load();
        for cluster in new.iter().filter_map(|name| map.get(name)) {
            if cluster.config.discovery.dns().is_some() {
                self.0.names.follow(cluster, &self.0.control);
            }
            if cluster.config.lb.weights.is_some() {
                self.0.control.spawn(orca::watch(Arc::downgrade(&self.0.clusters), Arc::downgrade(cluster)));
                self.0.control.spawn(orca::outside::watch(Arc::downgrade(cluster)));
            }
            if let Discovery::OriginalDst { .. } = cluster.config.discovery {
                let (clusters, cluster) = (Arc::downgrade(&self.0.clusters), Arc::downgrade(cluster));
                self.0.control.spawn(original_dst::watch(clusters, cluster));
            }
            if let Discovery::DynamicForwardProxy { cache, .. } = &cluster.config.discovery {
                cache.serve(cluster, &self.0.names, &self.0.control);
            }
            if cluster.config.health.outlier_detection.is_some() {
                let (clusters, cluster) = (Arc::downgrade(&self.0.clusters), Arc::downgrade(cluster));
                self.0.control.spawn(outlier::watch(clusters, cluster, self.0.outlier_log.get().cloned()));
            }
        }
    }

    /// Looks the names of a cluster up that is not in use yet, once. `told` is called later, on the control thread;
    /// with `None` where a look-up failed.
    pub fn resolve(&self, config: ClusterConfig, told: impl FnOnce(Option<Arc<[LocalityEndpoints]>>) + Send + 'static) {
        let names = Arc::clone(&self.0.names);
        self.0.control.spawn(async move { told(names.resolve_once(&config).await) });
    }

    /// Begins to check the hosts of a cluster that is not in use yet; `None` where it has no checks. `warm` is called later, on the
    /// control thread, when each of them has been checked once.
    pub fn check_first(
        &self,
        config: &ClusterConfig,
        endpoints: &Arc<[LocalityEndpoints]>,
        warm: Box<dyn FnOnce() + Send>,
    ) -> Option<Arc<ClusterChecks>> {
        let _guard = self.0.control.enter();
        ClusterChecks::start(config, endpoints, &self.0.clusters, self.secrets(), Some(warm))
    }

    /// Forgets a cluster; requests in flight finish.
    pub fn remove_cluster(&self, name: &str) {
        self.change_clusters(vec![ClusterChange::Remove(name.into())]);
    }

    /// Replaces a cluster's endpoints, as EDS says them.
    pub fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        let _guard = self.0.control.enter();
        self.0.clusters.set_endpoints(cluster, endpoints);
    }

    /// All clusters now.
    pub fn clusters(&self) -> Arc<ClusterMap> {
        self.0.clusters.load()
    }

    /// The secrets that listeners and clusters find theirs in.
    pub fn secrets(&self) -> &Arc<Secrets> {
        self.0.clusters.secrets()
    }

    /// Every transport socket's trusted issuers and certificates, those of listeners first.
    pub fn certificates(&self) -> Vec<SocketCertificates> {
        let listeners: Vec<_> =
            lock(&self.0.listeners).values().map(|running| running.shared.active.load_full()).collect();
        let downstream = listeners.iter().flat_map(|it| it.transport_sockets()).filter_map(|tls| tls.certificates());
        let clusters = self.clusters();
        let upstream =
            clusters.values().flat_map(|cluster| cluster.sockets.encrypted()).filter_map(|tls| tls.certificates());
        downstream.chain(upstream).collect()
    }

    /// Replaces the routes that RDS serves by this name from this source.
    pub fn set_routes(&self, source: &Arc<Source>, name: &Arc<str>, routes: Arc<RouteConfig>) {
        self.0.routes.set_routes(source, name, routes);
    }

    /// Forgets routes that no listener names any more; connections that use them keep them.
    pub fn remove_routes(&self, source: &Arc<Source>, name: &Arc<str>) {
        self.0.routes.remove_routes(source, name);
    }

    /// Replaces the scopes that SRDS serves from this source.
    pub fn set_scopes(&self, source: &Arc<Source>, scopes: Arc<[Arc<Scope>]>) {
        self.0.routes.set_scopes(source, scopes);
    }

    /// Forgets scopes that no listener uses any more; connections that use them keep them.
    pub fn remove_scopes(&self, source: &Arc<Source>) {
        self.0.routes.remove_scopes(source);
    }

    /// What requests need that is had on demand. There is one taker.
    pub fn on_demand(&self) -> Option<on_demand::Messages> {
        lock(&self.0.on_demand).take()
    }

    /// What discovery has told of overrides.
    pub fn offloaded(&self) -> Arc<OffloadedTable> {
        self.0.offloaded.load_full()
    }

    /// Replaces the offloaded endpoints.
    pub fn set_offloaded(&self, table: OffloadedTable) {
        self.0.offloaded.store(Arc::new(table));
    }

    async fn tell_workers(&self, mut command: impl FnMut(oneshot::Sender<()>) -> Command) {
        let mut answers = Vec::new();
        for worker in lock(&self.0.workers).iter() {
            let (done, answer) = oneshot::channel();
            // A worker that is gone has nothing left to be told.
            let _ = worker.send(command(done));
            answers.push(answer);
        }
        for answer in answers {
            let _ = answer.await;
        }
    }

    /// Tasks of the workers and of the control thread that have not ended: connections, streams, look-ups, checks and so on.
    pub fn tasks(&self) -> usize {
        let runtimes = self.0.runtimes.iter().filter_map(|runtime| runtime.get()).chain([&self.0.control]);
        runtimes.map(|runtime| runtime.metrics().num_alive_tasks()).sum()
    }

    /// Open downstream connections.
    pub fn connections(&self) -> u64 {
        self.0.total_connections.value()
    }

    /// The kernel's counters; empty without interception.
    pub fn kernel_counters(&self) -> Vec<(&'static str, u64)> {
        lock(&self.0.interception).as_ref().map(Interception::counters).unwrap_or_default()
    }

    /// Calls a function with the kernel's part, if there is one.
    pub fn with_interception<T>(&self, function: impl FnOnce(&Interception) -> T) -> Option<T> {
        lock(&self.0.interception).as_ref().map(function)
    }

    /// Has new connections go elsewhere, while the listeners still accept those that are under way: to the daemon that this one replaced,
    /// if that serves, or their own way. Without interception there is nothing to do.
    pub async fn let_go(&self) {
        let Some(handed) = self.with_interception(Interception::hand_back) else { return };
        let until = Instant::now() + TAKEN_WITHIN;
        while handed && Instant::now() < until && self.with_interception(Interception::is_followed) == Some(false) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if let Some(Err(error)) = self.with_interception(Interception::let_pass) {
            tracing::error!(%error, "until this daemon has ended, new connections get what the failure policies say");
        }
        tokio::time::sleep(UNDER_WAY).await;
    }

    /// Why the node is not ready: what interception says, and listeners of its that there are not.
    pub fn interception_faults(&self) -> Vec<String> {
        let of = |interception: &Interception| (interception.faults(), interception.listeners());
        let Some((mut faults, listeners)) = self.with_interception(of) else { return Vec::new() };
        let running = lock(&self.0.listeners);
        let missing = listeners.into_iter().filter(|(_, name)| !running.contains_key(&**name));
        faults.extend(missing.map(|(field, name)| {
            format!(
                "{field}: there is no listener `{name}`: connections that it should get pass the daemon by, or are \
                 refused, as their pods' failure_policy says"
            )
        }));
        faults
    }

    /// Stops the workers, writes out their logs, and takes the kernel programs down.
    pub fn stop(&self) {
        lock(&self.0.workers).clear();
        for thread in lock(&self.0.threads).drain(..) {
            let _ = thread.join();
        }
        access_log::finish(WRITTEN_WITHIN);
        crate::http::filters::tap::finish(WRITTEN_WITHIN);
        end_interception(lock(&self.0.interception).take());
    }
}

/// Has pods' connections go their own way again.
fn end_interception(interception: Option<Interception>) {
    if let Some(interception) = interception
        && let Err(error) = interception.shutdown()
    {
        tracing::error!(%error, "interception is not wholly removed");
    }
}

impl balancing::Plane for Inner {
    fn with_interception(&self, work: &mut dyn FnMut(&Interception)) {
        if let Some(interception) = &*lock(&self.interception) {
            work(interception);
        }
    }

    fn clusters(&self) -> Arc<ClusterMap> {
        self.clusters.load()
    }

    fn outbound(&self) -> Option<Arc<ActiveListener>> {
        let interception = lock(&self.interception);
        let name = interception.as_ref()?.outbound_listener();
        Some(lock(&self.listeners).get(name)?.shared.active.load_full())
    }
}

/// The processors that this process may use.
fn processors() -> Vec<usize> {
    let Ok(set) = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)) else { return Vec::new() };
    (0..nix::sched::CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// The first address of this host that is not loopback, IPv4 first, as Envoy picks it.
fn node_ip() -> Option<IpAddr> {
    let addresses = nix::ifaddrs::getifaddrs().ok()?.filter_map(|interface| {
        let address = interface.address?;
        let v4 = address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|address| IpAddr::V6(address.ip())))
    });
    addresses.filter(|address| !address.is_loopback()).min_by_key(IpAddr::is_ipv6)
}
