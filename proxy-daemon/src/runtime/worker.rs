//! One thread that serves connections: its own runtime, sockets, pools and counters.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd,
    rc::Rc,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use arc_swap::{ArcSwap, Cache};
use tokio::{
    runtime::{Builder, Handle, LocalOptions},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::Sleeps;
use crate::{
    access_log,
    http::filters::{OffloadedTable, OverrideState},
    intercept::{HostFlows, Joined, Joins, PodNames},
    listener::{SharedListener, accept_forever},
    on_demand::OnDemand,
    stats::{self, Gauge},
    upstream::{Clusters, WorkerClusters},
};

/// What a worker's connections and streams share. Lives on the worker's thread.
pub struct Worker {
    /// 0 up to the number of workers.
    pub index: usize,
    /// Clusters, balancers and pools.
    pub clusters: Rc<WorkerClusters>,
    /// Asks the control thread for what requests need.
    pub on_demand: OnDemand,
    /// This node's own address, for `x-forwarded-for` of loopback clients.
    pub node_ip: Option<IpAddr>,
    /// How long connections of a listener that is gone may go on.
    pub drain_time: Duration,
    /// Set when the daemon drains, before it ends.
    pub draining: watch::Receiver<bool>,
    /// Where redirected connections of host processes were going; `None`: there are none.
    host_flows: Option<HostFlows>,
    /// By which connections are joined; `None`: none are.
    joins: Option<Rc<Joins>>,
    /// `server.total_connections`
    pub(crate) total_connections: Gauge,
    /// What filters for overrides keep.
    pub overrides: OverrideState,
    offloaded: RefCell<Cache<Arc<ArcSwap<OffloadedTable>>, Arc<OffloadedTable>>>,
    pods: RefCell<Cache<Arc<ArcSwap<PodNames>>, Arc<PodNames>>>,
    next_connection: Cell<u64>,
    /// Timers for its streams and connections.
    pub(crate) sleeps: Rc<Sleeps>,
}

impl Worker {
    /// An id that no other connection of the process has.
    pub fn next_connection_id(&self) -> u64 {
        let id = self.next_connection.get();
        self.next_connection.set(id + 1);
        // Workers count in ranges of their own, so that they need not share a counter.
        ((self.index as u64) << 48) | id
    }

    /// Where the client of an accepted connection was going, if it is a process of this host that was redirected when it
    /// connected. Asked once a connection: the answer is forgotten.
    pub fn host_destination(&self, client: SocketAddr, local: SocketAddr) -> Option<SocketAddr> {
        // Processes of this host come from the address that they go to, or from the loopback interface.
        let near = client.ip().is_loopback() || client.ip() == local.ip();
        self.host_flows.as_ref().filter(|_| near)?.take(client, local.port())
    }

    /// Has payload go from a client's pod to a server's and back past this process, which would only copy it. `None`: it comes
    /// here as before.
    pub fn join(&self, client: &impl AsRawFd, server: &impl AsRawFd) -> Option<Joined> {
        self.joins.as_ref()?.join(client, server)
    }

    /// Looks something up in the offloaded endpoints that discovery lists.
    pub fn with_offloaded<T>(&self, look_up: impl FnOnce(&OffloadedTable) -> T) -> T {
        look_up(self.offloaded.borrow_mut().load())
    }

    /// Looks at the name of the pod of this node that has the address and is enrolled; false where there is none.
    pub fn with_pod_name(&self, address: IpAddr, look: impl FnOnce(&str) -> bool) -> bool {
        self.pods.borrow_mut().load().get(&address).is_some_and(|name| look(name))
    }
}

/// What the control thread tells a worker.
pub(super) enum Command {
    /// Accept connections on these sockets.
    Listen {
        listener: Arc<SharedListener>,
        /// With what they are closed by.
        sockets: Vec<(u64, std::net::TcpListener)>,
        done: oneshot::Sender<()>,
    },
    /// Close the sockets of a listener: all, or these.
    Close { name: Arc<str>, only: Option<Vec<u64>>, done: oneshot::Sender<()> },
}

/// What a worker is started with.
pub(super) struct Start {
    pub(super) index: usize,
    pub(super) clusters: Arc<Clusters>,
    pub(super) offloaded: Arc<ArcSwap<OffloadedTable>>,
    pub(super) pods: Arc<ArcSwap<PodNames>>,
    pub(super) on_demand: OnDemand,
    pub(super) node_ip: Option<IpAddr>,
    pub(super) host_flows: Option<HostFlows>,
    pub(super) joins: Option<Joins>,
    pub(super) drain_time: Duration,
    pub(super) draining: watch::Receiver<bool>,
    /// Where the worker says what it runs on.
    pub(super) runtime: Arc<OnceLock<Handle>>,
    /// Pins the thread to this processor.
    pub(super) cpu: Option<usize>,
    pub(super) commands: mpsc::UnboundedReceiver<Command>,
}

/// Starts the thread. It ends when the sender of `commands` is dropped.
pub(super) fn spawn(start: Start) -> std::io::Result<thread::JoinHandle<()>> {
    let runtime = || Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
    thread::Builder::new().name(format!("wrk:worker_{}", start.index)).spawn(move || {
        if let Some(cpu) = start.cpu {
            pin(cpu);
        }
        stats::register_worker(start.index);
        match runtime() {
            Ok(runtime) => {
                // It is empty: there is one worker to it.
                let _ = start.runtime.set(runtime.handle().clone());
                runtime.block_on(run(start));
            }
            Err(error) => tracing::error!(worker = start.index, %error, "cannot start a worker"),
        }
        access_log::flush_thread();
    })
}

async fn run(mut start: Start) {
    let worker = Rc::new(Worker {
        index: start.index,
        clusters: WorkerClusters::new(start.clusters, start.index),
        on_demand: start.on_demand,
        node_ip: start.node_ip,
        host_flows: start.host_flows,
        joins: start.joins.map(Rc::new),
        drain_time: start.drain_time,
        draining: start.draining,
        total_connections: stats::gauge("server.total_connections"),
        overrides: OverrideState::default(),
        offloaded: RefCell::new(Cache::new(start.offloaded)),
        pods: RefCell::new(Cache::new(start.pods)),
        next_connection: Cell::new(1),
        sleeps: Rc::default(),
    });
    let _service_logs = access_log::ServiceLogs::new(Rc::clone(&worker.clusters), worker.node_ip);
    let ticking = Rc::clone(&worker);
    tokio::task::spawn_local(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let mut flushes = access_log::flushes();
        loop {
            tokio::select! {
                _ = tick.tick() => ticking.clusters.tick(),
                // Its sender is never dropped.
                _ = flushes.changed() => {}
            }
            access_log::flush_thread();
        }
    });
    let mut accepting: HashMap<Arc<str>, Vec<(u64, JoinHandle<()>)>> = HashMap::new();
    while let Some(command) = start.commands.recv().await {
        match command {
            Command::Listen { listener, sockets, done } => {
                for (id, socket) in sockets {
                    match tokio::net::TcpListener::from_std(socket) {
                        Ok(socket) => {
                            let task = accept_forever(socket, Arc::clone(&listener), Rc::clone(&worker));
                            let task = tokio::task::spawn_local(task);
                            accepting.entry(Arc::clone(&listener.name)).or_default().push((id, task));
                        }
                        Err(error) => tracing::error!(listener = %listener.name, %error, "cannot use a socket"),
                    }
                }
                let _ = done.send(());
            }
            Command::Close { name, only, done } => {
                let tasks = accepting.entry(Arc::clone(&name)).or_default();
                let gone = |id: &u64| only.as_ref().is_none_or(|only| only.contains(id));
                let closed: Vec<_> = tasks.extract_if(.., |(id, _)| gone(id)).collect();
                if tasks.is_empty() {
                    accepting.remove(&name);
                }
                for (_, task) in closed {
                    task.abort();
                    // The socket is closed when the task is gone, not before.
                    let _ = task.await;
                }
                let _ = done.send(());
            }
        }
    }
}

/// Keeps the thread on one processor: its caches and its sockets' softirqs stay there.
fn pin(cpu: usize) {
    let mut set = nix::sched::CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::debug!(cpu, %error, "worker is not pinned");
    }
}
