//! Interception: the kernel programs that steer pods' connections into the daemon's listeners, and the short cut for
//! hops that stay on the node. docs/kernel.md explains the whole; the programs are in proxy-ebpf.
//!
//! ```text
//! config   what the operator asked for, checked; connect_config: of what happens when processes connect
//! btf      where the running kernel keeps the fields of its structures
//! probe    what the kernel and the node's set-up can do
//! kernel   loads the programs, fills the maps, reads the counters
//! attach   puts programs on interfaces, pinned, so that they outlive the daemon
//! netlink  interfaces, addresses, the rule and the route
//! watch    the thread that follows interfaces and addresses
//! cgroups  puts programs on cgroups, pinned, and follows cgroups that appear
//! flows    where redirected connections of host processes were going
//! services the kernel's tables of the services that it balances; sessions: UDP sockets whose backend is gone
//! ```

mod attach;
mod btf;
mod cgroups;
mod config;
mod connect_config;
mod error;
mod flows;
mod kernel;
mod netlink;
mod probe;
mod services;
mod sessions;
mod watch;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fs, io};

use aya::Ebpf;
use culvert_proxy_ebpf::{Endpoint, SockLayout};

pub use config::{
    DEFAULT_MARK, DEFAULT_OUTBOUND_LISTENER, DEFAULT_PIN_PATH, DEFAULT_ROUTE_TABLE, FailurePolicy, InterceptionConfig,
    Pod, Range,
};
pub use connect_config::{BalancedService, ConnectBalancing, HostMode};
pub use error::InterceptError;
pub use flows::HostFlows;

use attach::{Attachment, Direction, Method};
use cgroups::{CgroupWatcher, Hooks, Role};
use config::glob_matches;
use netlink::{Link, Monitor, Netlink};
use services::Services;
use watch::Watcher;

/// Loads every kernel program, attaches none, and returns those that the running kernel refuses, with the reasons.
pub fn refused_programs() -> Result<Vec<(String, String)>, InterceptError> {
    kernel::refused_programs()
}

/// Interception in force. Dropped without [`Interception::shutdown`], as in a crash, it leaves the packet programs, the
/// rule and the route in place, so that pods get what their failure policy says.
pub struct Interception {
    // Stopped first: it works on the state.
    watcher: Watcher,
    cgroups: Option<CgroupWatcher>,
    state: Arc<Mutex<State>>,
}

impl Interception {
    /// Loads the kernel programs, makes the routing rule and route, and attaches to every matching interface; later
    /// ones are attached when they appear. Works in the calling thread's network namespace, which is the node's.
    ///
    /// New connections are not redirected before [`Self::set_listener`].
    pub fn start(config: InterceptionConfig, workers: usize) -> Result<Self, InterceptError> {
        let workers = u32::try_from(workers).ok().filter(|workers| *workers <= culvert_proxy_ebpf::MAX_WORKERS);
        let workers = workers.ok_or_else(|| InterceptError::Load {
            name: "LISTENERS".to_owned(),
            reason: format!("it has room for {} workers; lower --concurrency", culvert_proxy_ebpf::MAX_WORKERS),
        })?;
        // Before the first listing, so that nothing is missed in between.
        let monitor = Monitor::open().map_err(|source| InterceptError::netlink("watch interfaces", source))?;
        let mut state = State::load(config, workers)?;
        if let Err(error) = state.install() {
            if let Err(error) = state.remove() {
                tracing::error!(%error, "cannot undo a failed start of interception");
            }
            return Err(error);
        }
        let state = Arc::new(Mutex::new(state));
        let watcher = Watcher::start(monitor, Arc::clone(&state))?;
        let hooked = state.lock().unwrap_or_else(PoisonError::into_inner).config.has_hooks();
        let cgroups = hooked.then(|| CgroupWatcher::start(Arc::clone(&state))).transpose()?;
        Ok(Self { watcher, cgroups, state })
    }

    /// Where redirected connections of host processes were going, for one worker; `None`: none are redirected.
    pub fn host_flows(&self) -> Result<Option<HostFlows>, InterceptError> {
        let state = self.lock();
        state.config.host.as_ref().map(|_| HostFlows::new(&state.ebpf)).transpose()
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
        self.lock().change_service(|services, ebpf| {
            services.set(ebpf, services::endpoint(service.address, service.udp), &shares)
        })
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
    /// services' hosts are known.
    pub fn balance(&self) {
        self.lock().balances = true;
        if let Some(cgroups) = &self.cgroups {
            cgroups.look();
        }
    }

    /// How many cgroups have the programs of host mode, and how many those that balance services.
    pub fn hooked_cgroups(&self) -> (usize, usize) {
        let state = self.lock();
        let of = |role: Role| state.hooks.iter().find(|hooks| hooks.role() == role).map_or(0, Hooks::len);
        (of(Role::Host), of(Role::Balance))
    }

    /// Makes a worker's listening socket receive redirected connections: IPv4, IPv6 or, if it is dual-stack, both. The
    /// kernel forgets the socket when it closes.
    pub fn set_listener(&self, worker: usize, socket: BorrowedFd<'_>) -> Result<(), InterceptError> {
        kernel::set_listener(&mut self.lock().ebpf, worker, socket)
    }

    /// Every counter of the kernel programs, since they were loaded, in the order of their numbers.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let state = self.lock();
        let mut counters = kernel::counters(&state.ebpf);
        counters.push(("interception.balanced.tables_refused", state.services.refused));
        counters
    }

    /// Removes all that interception made: programs, pins, rule and route. Pods' connections go their own way again,
    /// whatever their failure policy, which is for daemons that die.
    pub fn shutdown(self) -> Result<(), InterceptError> {
        let Self { watcher, cgroups, state } = self;
        drop((watcher, cgroups));
        state.lock().unwrap_or_else(PoisonError::into_inner).remove()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What interception made.
struct State {
    config: InterceptionConfig,
    ebpf: Ebpf,
    method: Method,
    /// Opened in the node's network namespace, and so working there whatever thread uses it.
    netlink: Netlink,
    /// Index of the loopback interface.
    loopback: u32,
    /// The address families that have our rule and route; true: IPv6.
    routed: Vec<bool>,
    /// What the short cut needs to know of the running kernel, or why there is none.
    sock_layout: Result<SockLayout, String>,
    /// By interface index.
    attachments: HashMap<u32, Attachment>,
    /// What is attached to cgroups.
    hooks: Vec<Hooks>,
    /// The services' hosts are known.
    balances: bool,
    services: Services,
}

impl State {
    fn load(config: InterceptionConfig, workers: u32) -> Result<Self, InterceptError> {
        let cookie = probe::netns_cookie().map_err(|source| {
            InterceptError::netlink("read the network namespace's cookie (needs Linux 5.14)", source)
        })?;
        let sock_layout = match &config.shortcut_cgroup {
            Some(_) => kernel::sock_layout(),
            None => Err("not configured".to_owned()),
        };
        let unused = SockLayout::default();
        let ebpf = kernel::load(&config, workers, cookie, sock_layout.as_ref().unwrap_or(&unused))?;
        probe::prepare_pin_path(&config.pin_path)?;
        let tcx =
            !config.force_clsact && probe::KernelVersion::running().is_ok_and(|running| running >= probe::TCX_FLOOR);
        let method = if tcx { Method::Tcx(config.pin_path.join("links")) } else { Method::Clsact };
        let netlink = Netlink::open().map_err(|source| InterceptError::netlink("open a netlink socket", source))?;
        let loopback = nix::net::if_::if_nametoindex("lo")
            .map_err(|errno| InterceptError::netlink("find the interface lo", errno.into()))?;
        Ok(Self {
            config,
            ebpf,
            method,
            netlink,
            loopback,
            sock_layout,
            routed: Vec::new(),
            attachments: HashMap::new(),
            hooks: Vec::new(),
            balances: false,
            services: Services::default(),
        })
    }

    fn install(&mut self) -> Result<(), InterceptError> {
        if !self.config.interfaces.is_empty() {
            self.add_routing()?;
        }
        for directory in self.pin_directories() {
            fs::create_dir_all(&directory).map_err(|source| InterceptError::PinPath {
                path: directory.clone(),
                reason: format!("cannot be created: {source}"),
            })?;
        }
        kernel::pin_maps(&self.ebpf, &self.config.pin_path.join("maps"))?;
        if let Err(reason) = kernel::attach_reopen(&mut self.ebpf) {
            tracing::warn!(reason, "a pod that uses a port again soon after the daemon closed it waits a second");
        }
        if let Some(path) = &self.config.shortcut_cgroup {
            let cgroup = probe::open_cgroup(path)?;
            let attached = self.sock_layout.clone().and_then(|_| kernel::attach_shortcut(&mut self.ebpf, cgroup));
            match attached {
                Ok(()) => tracing::info!(cgroup = %path.display(), "hops that stay on the node take the short cut"),
                Err(reason) => tracing::warn!(reason, "no short cut for hops that stay on the node: they use TCP"),
            }
        }
        self.reconcile_addresses()?;
        self.reconcile_all_links()?;
        self.load_hooks()?;
        if self.attachments.is_empty() && !self.config.interfaces.is_empty() {
            tracing::warn!(patterns = ?self.config.interfaces, "no interface matches yet");
        }
        Ok(())
    }

    fn pin_directories(&self) -> [PathBuf; 3] {
        ["links", "cgroups", "maps"].map(|name| self.config.pin_path.join(name))
    }

    /// Loads the programs for cgroups, and attaches those of host mode.
    fn load_hooks(&mut self) -> Result<(), InterceptError> {
        if !self.config.has_hooks() {
            // What an earlier daemon with another configuration left.
            return remove_pinned_in(&self.config.pin_path.join("cgroups"));
        }
        kernel::note_daemon(&mut self.ebpf)?;
        let host = self.config.host.as_ref().map(|host| (Role::Host, host.cgroups.clone()));
        let balance = self.config.balancing.as_ref().map(|it| (Role::Balance, it.cgroups.clone()));
        let pins = self.config.pin_path.join("cgroups");
        for (role, cgroups) in host.into_iter().chain(balance) {
            self.hooks.push(Hooks::load(&mut self.ebpf, role, &cgroups, pins.clone())?);
        }
        for role in [Role::Host, Role::Balance] {
            if self.hooks.iter().all(|hooks| hooks.role() != role) {
                // What an earlier daemon with another configuration left.
                cgroups::remove_pins_of(role, &pins)?;
            }
        }
        let (_, mut errors) = self.reconcile_cgroups();
        if let Some(error) = errors.pop() {
            return Err(error);
        }
        for hooks in self.hooks.iter().filter(|hooks| hooks.role() == Role::Host && hooks.len() == 0) {
            tracing::warn!(patterns = ?hooks.patterns(), "no cgroup of host mode is there yet");
        }
        Ok(())
    }

    /// Attaches to the cgroups that are there now. Returns where others may appear, and what could not be done.
    fn reconcile_cgroups(&mut self) -> (Vec<PathBuf>, Vec<InterceptError>) {
        let (mut parents, mut errors) = (Vec::new(), Vec::new());
        let balances = self.balances;
        for hooks in self.hooks.iter_mut().filter(|hooks| balances || hooks.role() != Role::Balance) {
            let (more, failed) = hooks.reconcile(&mut self.ebpf);
            parents.extend(more);
            errors.extend(failed);
        }
        (parents, errors)
    }

    fn change_service(
        &mut self,
        change: impl FnOnce(&mut Services, &mut Ebpf) -> Result<Vec<Endpoint>, InterceptError>,
    ) -> Result<(), InterceptError> {
        let gone = change(&mut self.services, &mut self.ebpf)?;
        sessions::end(services::connected_to(&mut self.ebpf, &gone));
        Ok(())
    }

    /// Makes marked packets be delivered to this host. A host without IPv6 goes without it.
    fn add_routing(&mut self) -> Result<(), InterceptError> {
        let (mark, table) = (self.config.mark, self.config.route_table);
        for is_ipv6 in [false, true] {
            let family = if is_ipv6 { "IPv6" } else { "IPv4" };
            let added = self
                .netlink
                .add_local_route(is_ipv6, table, self.loopback)
                .map_err(|error| {
                    (format!("add the {family} route `local default dev lo table {table}` (is lo up?)"), error)
                })
                .and_then(|()| {
                    self.netlink.add_rule(is_ipv6, mark, table).map_err(|error| {
                        (format!("add the {family} routing rule `fwmark {mark:#x} lookup {table}`"), error)
                    })
                });
            match added {
                Ok(()) => self.routed.push(is_ipv6),
                Err((_, error)) if is_ipv6 && is_unsupported(&error) => {
                    tracing::warn!(%error, "this host has no IPv6: only IPv4 is redirected");
                }
                Err((action, error)) => return Err(InterceptError::netlink(action, error)),
            }
        }
        Ok(())
    }

    /// Which program an interface of this name gets, if any.
    fn direction_of(&self, name: &str) -> Option<Direction> {
        let any = |patterns: &[String]| patterns.iter().any(|pattern| glob_matches(pattern, name));
        if any(&self.config.interfaces) {
            Some(Direction::Outbound)
        } else if any(&self.config.uplinks) {
            Some(Direction::Inbound)
        } else {
            None
        }
    }

    /// Attaches to, leaves alone, or detaches from an interface, as its name asks for.
    fn reconcile_link(&mut self, link: &Link) -> Result<(), InterceptError> {
        let wanted = self.direction_of(&link.name);
        if let Some(attachment) = self.attachments.get_mut(&link.index) {
            if wanted == Some(attachment.direction) {
                if !attachment.is_on(&link.name) {
                    attachment.rename(&link.name);
                }
                return Ok(());
            }
            self.forget_link(link.index)?;
        }
        let Some(direction) = wanted else { return Ok(()) };
        let attachment = match Attachment::new(&mut self.ebpf, link, direction, &self.method) {
            Ok(attachment) => attachment,
            // Interfaces come and go faster than events are read.
            Err(_) if nix::net::if_::if_nametoindex(link.name.as_str()).is_err() => return Ok(()),
            Err(error) => return Err(error),
        };
        tracing::info!(interface = link.name, program = direction.program(), "attached");
        probe::log_hostile_sysctls(&link.name);
        self.attachments.insert(link.index, attachment);
        Ok(())
    }

    /// Detaches from an interface. One that moved to another network namespace took the program along, which must not
    /// work there.
    fn forget_link(&mut self, index: u32) -> Result<(), InterceptError> {
        match self.attachments.remove(&index) {
            Some(attachment) => attachment.detach().map_err(InterceptError::Remove),
            None => Ok(()),
        }
    }

    fn reconcile_all_links(&mut self) -> Result<(), InterceptError> {
        let links = self.netlink.links().map_err(|source| InterceptError::netlink("list interfaces", source))?;
        let gone: Vec<u32> =
            self.attachments.keys().copied().filter(|index| links.iter().all(|link| link.index != *index)).collect();
        for index in gone {
            self.forget_link(index)?;
        }
        for link in &links {
            self.reconcile_link(link)?;
        }
        if let Method::Tcx(directory) = &self.method {
            attach::remove_stale_pins(directory, |index| self.attachments.contains_key(&index))
                .map_err(|source| InterceptError::PinPath { path: directory.clone(), reason: source.to_string() })?;
        }
        Ok(())
    }

    fn reconcile_addresses(&mut self) -> Result<(), InterceptError> {
        let addresses = self.netlink.addresses().map_err(|source| InterceptError::netlink("list addresses", source))?;
        kernel::set_local_addresses(&mut self.ebpf, &addresses)
    }

    /// Removes all that was made, as far as possible.
    fn remove(&mut self) -> Result<(), InterceptError> {
        let mut failures: Vec<String> = Vec::new();
        // Programs first: without rule and route, what they redirect would go astray.
        for (_, attachment) in self.attachments.drain() {
            failures.extend(attachment.detach().err());
        }
        for directory in self.pin_directories() {
            failures.extend(remove_pins(&directory).err().map(|error| format!("{}: {error}", directory.display())));
        }
        if let Err(error) = fs::remove_dir(&self.config.pin_path)
            && error.kind() != io::ErrorKind::NotFound
        {
            failures.push(format!("{}: {error}", self.config.pin_path.display()));
        }
        for is_ipv6 in std::mem::take(&mut self.routed) {
            let (mark, table) = (self.config.mark, self.config.route_table);
            let rule = self.netlink.delete_rule(is_ipv6, mark, table);
            failures.extend(rule.err().map(|error| format!("rule of mark {mark:#x}: {error}")));
            let route = self.netlink.delete_local_route(is_ipv6, table, self.loopback);
            failures.extend(route.err().map(|error| format!("route of table {table}: {error}")));
        }
        if failures.is_empty() { Ok(()) } else { Err(InterceptError::Remove(failures.join("; "))) }
    }
}

/// Removes what is pinned in a directory.
fn remove_pinned_in(directory: &std::path::Path) -> Result<(), InterceptError> {
    let error = |source: io::Error| InterceptError::PinPath { path: directory.to_owned(), reason: source.to_string() };
    for entry in fs::read_dir(directory).map_err(error)? {
        entry.and_then(|entry| fs::remove_file(entry.path())).map_err(error)?;
    }
    Ok(())
}

/// Removes a directory of pins.
fn remove_pins(directory: &std::path::Path) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        fs::remove_file(entry?.path())?;
    }
    fs::remove_dir(directory)
}

/// Errors by which a kernel without an address family answers.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(nix::libc::EAFNOSUPPORT | nix::libc::EOPNOTSUPP | nix::libc::EPROTONOSUPPORT | nix::libc::EACCES)
    )
}
