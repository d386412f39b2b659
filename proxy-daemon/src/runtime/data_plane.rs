//! The control thread's handle on the workers.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot};

use super::worker::{self, Command};
use crate::{
    config::model::{ClusterConfig, Discovery, Listener, LocalityEndpoints, RouteConfig},
    http::{RouteSlot, filters::OffloadedTable},
    intercept::Interception,
    listener::{ActiveListener, SharedListener, bind},
    stats,
    upstream::{ClusterMap, Clusters, dns},
};

/// How the data plane is started.
pub struct Options {
    /// Number of worker threads; at least 1.
    pub workers: usize,
    /// How long connections of a listener that is gone may go on.
    pub drain_time: Duration,
    /// The kernel's part, with the name of the listener that it feeds.
    pub interception: Option<(Interception, String)>,
}

/// A listener, for people.
#[derive(Debug, Clone)]
pub struct ListenerStatus {
    /// Its name.
    pub name: Arc<str>,
    /// What it is bound to.
    pub addresses: Vec<SocketAddr>,
}

/// Gives the workers their configuration. Cheap to clone; every change is made aside and swapped in at once.
#[derive(Clone)]
pub struct DataPlane(Arc<Inner>);

struct Inner {
    clusters: Arc<Clusters>,
    routes: Mutex<HashMap<String, Arc<RouteSlot>>>,
    offloaded: Arc<ArcSwap<OffloadedTable>>,
    workers: Mutex<Vec<mpsc::UnboundedSender<Command>>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    listeners: Mutex<BTreeMap<Arc<str>, Running>>,
    interception: Mutex<Option<(Interception, String)>>,
    total_connections: stats::Gauge,
    worker_count: usize,
    /// No listener is added any more.
    draining: AtomicBool,
    control: tokio::runtime::Handle,
}

struct Running {
    shared: Arc<SharedListener>,
    addresses: Vec<SocketAddr>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is a single insertion or removal: a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl DataPlane {
    /// Starts the workers. Must be called within the control runtime, which looks up names for them.
    ///
    /// # Errors
    /// A thread could not be started.
    pub fn start(options: Options) -> std::io::Result<DataPlane> {
        let clusters = Arc::new(Clusters::new(options.workers));
        clusters.follow_runtime();
        let offloaded = Arc::new(ArcSwap::from_pointee(OffloadedTable::default()));
        let (mut senders, mut threads) = (Vec::new(), Vec::new());
        let cpus = processors();
        let node_ip = node_ip();
        for index in 0..options.workers {
            let (sender, commands) = mpsc::unbounded_channel();
            senders.push(sender);
            threads.push(worker::spawn(worker::Start {
                index,
                clusters: Arc::clone(&clusters),
                offloaded: Arc::clone(&offloaded),
                node_ip,
                drain_time: options.drain_time,
                // With fewer workers than processors the scheduler finds them better places than we do.
                cpu: (options.workers >= cpus.len()).then(|| cpus.get(index % cpus.len().max(1)).copied()).flatten(),
                commands,
            })?);
        }
        Ok(DataPlane(Arc::new(Inner {
            clusters,
            routes: Mutex::default(),
            offloaded,
            workers: Mutex::new(senders),
            threads: Mutex::new(threads),
            listeners: Mutex::default(),
            interception: Mutex::new(options.interception),
            total_connections: stats::gauge("server.total_connections"),
            worker_count: options.workers,
            draining: AtomicBool::new(false),
            control: tokio::runtime::Handle::current(),
        })))
    }

    /// Adds a cluster, or replaces the one of the same name.
    pub fn upsert_cluster(&self, config: ClusterConfig) {
        let resolve = matches!(config.discovery, Discovery::StrictDns { .. }).then(|| config.clone());
        self.0.clusters.upsert(config);
        if let Some(config) = resolve {
            self.0.control.spawn(dns::resolve_forever(Arc::clone(&self.0.clusters), config));
        }
    }

    /// Forgets a cluster; requests in flight finish.
    pub fn remove_cluster(&self, name: &str) {
        self.0.clusters.remove(name);
    }

    /// Replaces a cluster's endpoints, as EDS says them.
    pub fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        self.0.clusters.set_endpoints(cluster, endpoints);
    }

    /// All clusters now.
    pub fn clusters(&self) -> Arc<ClusterMap> {
        self.0.clusters.load()
    }

    /// Replaces the routes of a name that RDS serves.
    pub fn set_routes(&self, name: &str, routes: Arc<RouteConfig>) {
        self.route_slot(name).set(routes);
    }

    /// Whether routes of this name have arrived.
    pub fn has_routes(&self, name: &str) -> bool {
        self.route_slot(name).is_ready()
    }

    fn route_slot(&self, name: &str) -> Arc<RouteSlot> {
        Arc::clone(lock(&self.0.routes).entry(name.to_owned()).or_default())
    }

    /// Replaces the offloaded endpoints.
    pub fn set_offloaded(&self, table: OffloadedTable) {
        self.0.offloaded.store(Arc::new(table));
    }

    /// Adds a listener, or replaces the one of the same name. Where the addresses stay, so do the sockets: no connection
    /// is refused, and those of the version before are told to finish.
    ///
    /// # Errors
    /// One line that says which address could not be bound, or which log could not be opened, and why. The version before,
    /// if there is one, serves on then.
    pub async fn upsert_listener(&self, config: Arc<Listener>) -> Result<(), String> {
        if self.0.draining.load(Ordering::Acquire) {
            return Err("the daemon is draining: no listener is added any more".to_owned());
        }
        let active = ActiveListener::new(Arc::clone(&config), |name| self.route_slot(name));
        let active = Arc::new(active.map_err(|error| error.to_string())?);
        let before = lock(&self.0.listeners).get(&config.name).map(|running| Arc::clone(&running.shared));
        if let Some(before) = before {
            let old = before.active.load_full();
            if same_sockets(&old.config, &config) {
                before.active.store(active);
                old.start_drain();
                return Ok(());
            }
            // Addresses that both have could not be bound twice: the old version makes room, and comes back where the new
            // one cannot be had.
            self.remove_listener(&config.name).await;
            let installed = self.install(config, active).await;
            if installed.is_err() {
                self.reinstall(Arc::clone(&old.config)).await;
            }
            return installed;
        }
        self.install(config, active).await
    }

    async fn reinstall(&self, config: Arc<Listener>) {
        let active = ActiveListener::new(Arc::clone(&config), |name| self.route_slot(name));
        let name = Arc::clone(&config.name);
        let result = match active {
            Ok(active) => self.install(config, Arc::new(active)).await,
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = result {
            tracing::error!(listener = %name, %error, "the version before cannot be restored");
        }
    }

    /// Binds a listener that is not running and has the workers accept on it.
    async fn install(&self, config: Arc<Listener>, active: Arc<ActiveListener>) -> Result<(), String> {
        let intercepted = lock(&self.0.interception).as_ref().is_some_and(|(_, listener)| **listener == *config.name);
        let bound = bind(&config, self.0.worker_count, intercepted)?;
        let shared = Arc::new(SharedListener { name: Arc::clone(&config.name), active: ArcSwap::new(active) });
        if let Some((interception, _)) = lock(&self.0.interception).as_ref().filter(|_| intercepted) {
            for (worker, sockets) in bound.per_worker.iter().enumerate() {
                for socket in sockets {
                    interception.set_listener(worker, socket.as_fd()).map_err(|error| error.to_string())?;
                }
            }
        }
        let running = Running { shared: Arc::clone(&shared), addresses: bound.addresses };
        lock(&self.0.listeners).insert(Arc::clone(&config.name), running);
        let mut sockets = bound.per_worker.into_iter();
        self.tell_workers(|done| Command::Listen {
            listener: Arc::clone(&shared),
            sockets: sockets.next().unwrap_or_default(),
            done,
        })
        .await;
        Ok(())
    }

    /// Closes a listener's sockets and tells its connections to finish.
    pub async fn remove_listener(&self, name: &str) {
        let Some(running) = lock(&self.0.listeners).remove(name) else { return };
        self.close(running).await;
    }

    async fn close(&self, running: Running) {
        self.tell_workers(|done| Command::Close { name: Arc::clone(&running.shared.name), done }).await;
        running.shared.active.load().start_drain();
    }

    /// Closes all listeners for good: none is added from now on, whatever the control plane still says.
    pub async fn shut(&self) {
        self.0.draining.store(true, Ordering::Release);
        self.drain_listeners().await;
    }

    /// Closes all listeners and tells all connections to finish.
    pub async fn drain_listeners(&self) {
        let all = std::mem::take(&mut *lock(&self.0.listeners));
        for running in all.into_values() {
            self.close(running).await;
        }
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

    /// All listeners now.
    pub fn listeners(&self) -> Vec<ListenerStatus> {
        let listeners = lock(&self.0.listeners);
        let status = |(name, running): (&Arc<str>, &Running)| ListenerStatus {
            name: Arc::clone(name),
            addresses: running.addresses.clone(),
        };
        listeners.iter().map(status).collect()
    }

    /// Open downstream connections.
    pub fn connections(&self) -> u64 {
        self.0.total_connections.value()
    }

    /// The kernel's counters; empty without interception.
    pub fn kernel_counters(&self) -> Vec<(&'static str, u64)> {
        lock(&self.0.interception).as_ref().map(|(interception, _)| interception.counters()).unwrap_or_default()
    }

    /// Stops the workers, writes out their logs, and takes the kernel programs down.
    pub fn stop(&self) {
        lock(&self.0.workers).clear();
        for thread in lock(&self.0.threads).drain(..) {
            let _ = thread.join();
        }
        if let Some((interception, _)) = lock(&self.0.interception).take()
            && let Err(error) = interception.shutdown()
        {
            tracing::error!(%error, "interception is not wholly removed");
        }
    }
}

fn same_sockets(old: &Listener, new: &Listener) -> bool {
    old.addresses == new.addresses
        && (old.transparent, old.freebind, old.backlog) == (new.transparent, new.freebind, new.backlog)
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
