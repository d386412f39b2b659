//! Interception: the kernel programs that steer pods' connections into the daemon's listeners, and the short cut for
//! hops that stay on the node. docs/kernel.md explains the whole; the programs are in proxy-ebpf.
//!
//! ```text
//! config     what the operator asked for, checked; connect_config: of what happens when processes connect
//! selectors  which pods are enrolled by what Kubernetes says of them
//! btf        where the running kernel keeps the fields of its structures
//! probe      what the kernel and the node's set-up can do
//! kernel     loads the programs, fills the maps, reads the counters; inherit: what it takes over of an earlier daemon's maps
//! attach     puts programs on interfaces, pinned, so that they outlive the daemon; pinned: other programs for pinned links,
//!            and their end
//! state      what is in force: the programs, the rule, the route, the pods
//! lease      who works with a pin path
//! netlink    interfaces, addresses, the rule and the route
//! watch      the thread that follows interfaces and addresses
//! pods       which pods there are, and which are enrolled
//! follower   the thread that follows the pods of the node: manifests: those of a directory; api_server: those of an API
//!            server
//! departed   ends connections of pods that are gone; sock_diag: the node's sockets, and their end
//! commanded  pods that were enrolled by command
//! clean      removes all that a daemon left
//! cgroups    puts programs on cgroups, pinned, and follows cgroups that appear
//! acceleration  how far payload may go past TCP, and why not; joins: connections whose payload goes past the daemon;
//!            lanes: reads of sockets into which the short cut puts payload
//! mark       which mark the daemon's own connections must not have
//! flows      where redirected connections of host processes were going
//! services   the kernel's tables of the services that it balances; sessions: UDP sockets whose backend is gone
//! ```

mod acceleration;
mod api_server;
mod attach;
mod btf;
mod cgroups;
mod clean;
mod commanded;
mod config;
mod connect_config;
mod departed;
mod error;
mod flows;
mod follower;
mod inherit;
mod joins;
mod kernel;
pub(crate) mod lanes;
mod lease;
mod manifests;
pub(crate) mod mark;
mod netlink;
pub(crate) mod node_addresses;
mod pinned;
pub(crate) mod pod_families;
mod pods;
mod probe;
mod selectors;
mod services;
mod sessions;
mod sock_diag;
mod state;
mod watch;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
pub use culvert_proxy_ebpf::Acceleration;
use culvert_proxy_ebpf::{INBOUND, OUTBOUND};
use serde::Serialize;

pub use acceleration::{AccelerationStatus, ListenerAcceleration};
pub use clean::clean;
pub use config::{
    DEFAULT_INBOUND_LISTENER, DEFAULT_MARK, DEFAULT_OUTBOUND_LISTENER, DEFAULT_PIN_PATH, DEFAULT_ROUTE_TABLE,
    DEFAULT_STATE_PATH, FailurePolicy, InterceptionConfig, Pod, Policy, Range, Traffic,
};
pub use connect_config::{BalancedService, ConnectBalancing, HostMode};
pub use error::InterceptError;
pub use flows::HostFlows;
pub use joins::{Joined, Joins, Past};
pub use pods::{PodNames, PodStatus};
pub use selectors::{Enrolment, Selector};

use cgroups::{CgroupWatcher, Hooks, Role};
use follower::Follower;
use netlink::Monitor;
use state::State;
use watch::Watcher;

/// Loads every kernel program, attaches none, and returns those that the running kernel refuses, with the reasons.
pub fn refused_programs() -> Result<Vec<(String, String)>, InterceptError> {
    kernel::refused_programs()
}

/// Interception in force. Dropped without [`Interception::shutdown`], as in a crash, it leaves the packet programs, the
/// rule and the route in place, so that pods get what their failure policy says.
pub struct Interception {
    // Stopped first: they work on the state.
    threads: Threads,
    state: Arc<Mutex<State>>,
    /// The listeners' names with the directions that they serve.
    listeners: [(String, u32); 2],
}

/// A cgroup, for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CgroupStatus {
    /// Its path.
    pub cgroup: PathBuf,
    /// What it has: `host` mode, or that services are balanced (`balance`).
    pub role: &'static str,
    /// It has the programs; else there is no such cgroup now, or one of the faults says why.
    pub attached: bool,
    /// It was enrolled by command.
    pub by_command: bool,
}

/// What follows the node, until it is dropped.
struct Threads {
    #[expect(dead_code, reason = "held for its thread")]
    watcher: Watcher,
    #[expect(dead_code, reason = "held for its thread")]
    follower: Option<Follower>,
    cgroups: Option<CgroupWatcher>,
}

impl Threads {
    fn start(monitor: Monitor, state: &Arc<Mutex<State>>) -> Result<Self, InterceptError> {
        let (wake, enrolment, hooked) = {
            let state = state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.wake(), state.config.enrolment.clone(), state.config.has_hooks())
        };
        let watcher = Watcher::start(monitor, Arc::clone(state), wake)?;
        let follow = |enrolment: Enrolment| {
            let path = enrolment.pod_manifests.clone();
            let started = match enrolment.kubernetes.clone() {
                Some(kubernetes) => api_server::follow(enrolment, kubernetes, Arc::clone(state)),
                None => manifests::follow(enrolment, Arc::clone(state)),
            };
            started.map_err(|error| InterceptError::Manifests { path, reason: error.to_string() })
        };
        let follower = enrolment.map(follow).transpose()?;
        let cgroups = hooked.then(|| CgroupWatcher::start(Arc::clone(state))).transpose()?;
        Ok(Self { watcher, follower, cgroups })
    }
}

impl Interception {
    /// Loads the kernel programs, makes the routing rule and route, and attaches to every matching interface; later
    /// ones are attached when they appear. Works in the calling thread's network namespace, which is the node's.
    ///
    /// New connections are not redirected before [`Self::set_listener`]. Where programs of an earlier daemon are attached
    /// they stay until then, so that its listeners, if it still runs, serve on.
    pub fn start(config: InterceptionConfig, workers: usize) -> Result<Self, InterceptError> {
        let workers = u32::try_from(workers).ok().filter(|workers| *workers <= culvert_proxy_ebpf::MAX_WORKERS);
        let workers = workers.ok_or_else(|| InterceptError::Load {
            name: "LISTENERS".to_owned(),
            reason: format!("it has room for {} workers; lower --concurrency", culvert_proxy_ebpf::MAX_WORKERS),
        })?;
        // Before the first listing, so that nothing is missed in between.
        let monitor = Monitor::open().map_err(|source| InterceptError::netlink("watch interfaces", source))?;
        let listeners = [(config.outbound_listener.clone(), OUTBOUND), (config.inbound_listener.clone(), INBOUND)];
        let state = Arc::new(Mutex::new(State::load(config, workers)?));
        let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
        // A statement of its own: the threads lock the state, too.
        let installed = lock().install();
        let started = installed.and_then(|()| Threads::start(monitor, &state));
        mark::note(lock().config.mark);
        node_addresses::note_translated(&lock().config.node_source_ranges);
        let threads = started.inspect_err(|_| {
            if let Err(error) = lock().remove() {
                tracing::error!(%error, "cannot undo a failed start of interception");
            }
        })?;
        Ok(Self { threads, state, listeners })
    }

    /// Where redirected connections of host processes were going, for one worker; `None`: none are redirected.
    pub fn host_flows(&self) -> Result<Option<HostFlows>, InterceptError> {
        let state = self.lock();
        state.config.host.as_ref().map(|_| HostFlows::new(&state.ebpf)).transpose()
    }

    /// By which one worker joins connections; `None`: nothing goes past TCP.
    pub fn joins(&self) -> Result<Option<Joins>, InterceptError> {
        let mut state = self.lock();
        state.accelerates().then(|| Joins::new(&mut state.ebpf)).transpose()
    }

    /// How far payload may go past TCP, and why not farther.
    pub fn acceleration(&self) -> AccelerationStatus {
        self.lock().acceleration()
    }

    /// Says until the daemon ends how far payload may go past TCP: `off`, `shortcut` or `joined`, of all connections or of
    /// those of a listener. Off holds at once; what was not registered before is not registered later.
    ///
    /// # Errors
    /// There is no such listener or word, or nothing can go past TCP.
    pub fn accelerate(&self, level: &str, listener: Option<&str>) -> Result<(), InterceptError> {
        self.lock().accelerate(level, listener)
    }

    /// The names of the pods that are enrolled, which follow them.
    pub fn pod_names(&self) -> Arc<ArcSwap<PodNames>> {
        self.lock().pod_names()
    }

    /// Which services the kernel is to balance; `None`: none.
    pub fn balancing(&self) -> Option<ConnectBalancing> {
        self.lock().config.balancing.clone()
    }

    /// Has the kernel balance a service, by the hosts' shares of the load; those of the other address family are left out,
    /// and what has a share of 0 gets nothing. Without a host its connections are refused. UDP sockets that are connected
    /// to a host that no service has any more are told.
    ///
    /// # Errors
    /// A map is full: the service keeps the hosts that it had.
    pub fn set_service(&self, service: &BalancedService, shares: &[(SocketAddr, f64)]) -> Result<(), InterceptError> {
        let is_v4 = |address: &SocketAddr| address.ip().to_canonical().is_ipv4();
        let usable = shares.iter().filter(|(address, _)| is_v4(address) == is_v4(&service.address));
        let shares: Vec<_> = usable.map(|(host, share)| (services::endpoint(*host, service.udp), *share)).collect();
        let service = services::endpoint(service.address, service.udp);
        let mut state = self.lock();
        state.change_service(|services, ebpf| services.set(ebpf, service, &shares))?;
        state.end_stranded(service);
        Ok(())
    }

    /// Has the kernel forget a service: connections to it go their own way.
    ///
    /// # Errors
    /// A map cannot be changed.
    pub fn remove_service(&self, service: &BalancedService) -> Result<(), InterceptError> {
        let service = services::endpoint(service.address, service.udp);
        self.lock().change_service(|services, ebpf| services.remove(ebpf, service))
    }

    /// Attaches the programs that balance services: what an earlier daemon left serves until then. To be called when the
    /// services' hosts are known. UDP sockets that an earlier daemon connected to hosts that are gone are told.
    pub fn balance(&self) {
        self.lock().balances = true;
        if let Some(cgroups) = &self.threads.cgroups {
            cgroups.look();
        }
    }

    /// How many cgroups have the programs of host mode, and how many those that balance services.
    pub fn hooked_cgroups(&self) -> (usize, usize) {
        let state = self.lock();
        let of = |role: Role| state.hooks.iter().find(|hooks| hooks.role() == role).map_or(0, Hooks::len);
        (of(Role::Host), of(Role::Balance))
    }

    /// Whether a listener receives redirected connections.
    pub fn feeds(&self, listener: &str) -> bool {
        self.listeners.iter().any(|(name, _)| name == listener)
    }

    /// Makes a worker's socket of a listener receive the connections that are redirected to that listener: IPv4, IPv6
    /// or, if it is dual-stack, both. The kernel forgets the socket when it closes.
    pub fn feed(&self, listener: &str, worker: usize, socket: BorrowedFd<'_>) -> Result<(), InterceptError> {
        let mut state = self.lock();
        for (_, direction) in self.listeners.iter().filter(|(name, _)| name == listener) {
            state.set_listener(*direction, worker, socket)?;
        }
        Ok(())
    }

    /// [`Self::feed`] for the outbound listener.
    pub fn set_listener(&self, worker: usize, socket: BorrowedFd<'_>) -> Result<(), InterceptError> {
        self.lock().set_listener(OUTBOUND, worker, socket)
    }

    /// [`Self::feed`] for the inbound listener.
    pub fn set_inbound_listener(&self, worker: usize, socket: BorrowedFd<'_>) -> Result<(), InterceptError> {
        self.lock().set_listener(INBOUND, worker, socket)
    }

    /// Whether an earlier daemon, which this one replaces, still runs.
    pub fn has_predecessor(&self) -> bool {
        self.lock().has_predecessor()
    }

    /// Every counter of the kernel programs, since they were loaded, in the order of their numbers; and what became of
    /// enrolment.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        self.lock().counters()
    }

    /// Every pod of the node that is known.
    pub fn pods(&self) -> Vec<PodStatus> {
        self.lock().pods()
    }

    /// Why the node is not ready: each pod that should be enrolled and is not, and each interface and cgroup that should
    /// have programs and has not.
    pub fn faults(&self) -> Vec<String> {
        self.lock().faults()
    }

    /// The listeners that connections are redirected to: the field of the configuration that names each, and its name.
    pub fn listeners(&self) -> Vec<(&'static str, String)> {
        let state = self.lock();
        state.config.listeners().into_iter().map(|(field, name)| (field, name.to_owned())).collect()
    }

    /// Enrols a pod by command; a restart keeps it, as long as its interface stays. Addresses of a pod of this name are added to those
    /// that it has; what is not said is as configured, for all of them.
    ///
    /// # Errors
    /// Another pod was enrolled by command with one of the addresses, or one of this name on another interface; the node does not reach
    /// an address over an interface that has the programs; or the state file cannot be written.
    pub fn enrol(
        &self,
        name: Option<String>,
        addresses: Vec<IpAddr>,
        direction: Option<&str>,
        failure_policy: Option<&str>,
        acceleration: Option<&str>,
    ) -> Result<(), InterceptError> {
        self.lock().enrol(name, addresses, direction, failure_policy, acceleration)
    }

    /// Takes out what was enrolled by command: a pod by its name, or by one of its addresses; a cgroup by its path.
    pub fn unenrol(&self, which: &str) -> Result<(), InterceptError> {
        self.lock().unenrol(which)
    }

    /// Adds a cgroup to those of host mode, by command; a restart keeps it, also if there is no such cgroup for a while.
    ///
    /// # Errors
    /// There is no host mode, or no such cgroup; it is one of those that are balanced; no program can be attached to it; or it cannot be
    /// written down.
    pub fn enrol_cgroup(&self, path: &str) -> Result<(), InterceptError> {
        self.lock().enrol_cgroup(path)?;
        // For where it appears again.
        if let Some(cgroups) = &self.threads.cgroups {
            cgroups.look();
        }
        Ok(())
    }

    /// The cgroups that have programs, and those that were enrolled by command and have not.
    pub fn cgroups(&self) -> Vec<CgroupStatus> {
        self.lock().cgroups()
    }

    /// To be called when this daemon is told to end, while its listeners still accept: has the daemon that it replaced, if there is one that
    /// may still serve, take over again; [`Self::is_followed`] tells when it has. Says whether there is one.
    pub fn hand_back(&self) -> bool {
        self.lock().hand_back()
    }

    /// Whether another daemon's programs have taken the places of this one's.
    pub fn is_followed(&self) -> bool {
        self.lock().is_followed()
    }

    /// Has new connections go their own way, whatever the pods' failure policies, while those that are open are steered as before; unless
    /// another daemon has taken over, or is about to.
    ///
    /// # Errors
    /// A map cannot be written.
    pub fn let_pass(&self) -> Result<(), InterceptError> {
        self.lock().let_pass()
    }

    /// Removes all that interception made: programs, pins, rule and route. Pods' connections go their own way again,
    /// whatever their failure policy, which is for daemons that die. What a successor has taken over is left to it.
    pub fn shutdown(self) -> Result<(), InterceptError> {
        let Self { threads, state, .. } = self;
        drop(threads);
        state.lock().unwrap_or_else(PoisonError::into_inner).remove()
    }

    /// The packet mark of redirected packets.
    pub fn mark(&self) -> u32 {
        self.lock().config.mark
    }

    /// The name of the listener that receives redirected connections of pods and of host processes.
    pub fn outbound_listener(&self) -> &str {
        &self.listeners[0].0
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
