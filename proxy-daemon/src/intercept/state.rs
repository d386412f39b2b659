//! What is in force: the programs, the rule and the route, and the pods' policies.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use arc_swap::ArcSwap;
use aya::Ebpf;
use culvert_proxy_ebpf::{Acceleration, Endpoint, INBOUND, LAYOUT, OUTBOUND, SockLayout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::acceleration::{AccelerationStatus, Switches, Withheld};
use super::attach::{self, Attachment, Direction, Method};
use super::cgroups::{Hooks, Role};
use super::commanded::{self, Commanded};
use super::config::{FailurePolicy, InterceptionConfig, Policy, Traffic, glob_matches};
use super::error::InterceptError;
use super::lease::Lease;
use super::netlink::{Link, Netlink};
use super::pods::{Known, Origin, Place, PodNames, PodStatus, Pods, acceleration_of_name};
use super::services::Services;
use super::{cgroups, kernel, lanes, probe, services, sessions};

/// How long programs of an earlier daemon stay where our listeners do not come.
const PATIENCE: Duration = Duration::from_secs(15);
/// A directory below the pin path, while a daemon is about to take over.
const NEXT: &str = "next";

/// What interception made.
pub(super) struct State {
    pub(super) config: InterceptionConfig,
    pub(super) ebpf: Ebpf,
    method: Method,
    /// Opened in the node's network namespace, and so working there whatever thread uses it.
    netlink: Netlink,
    /// Index of the loopback interface.
    loopback: u32,
    /// The address families that have our rule and route; true: IPv6.
    routed: Vec<bool>,
    /// What the short cut needs to know of the running kernel, or why there is none.
    sock_layout: Result<SockLayout, Withheld>,
    /// A program can notice that its socket is registered: see [`culvert_proxy_ebpf::NOTICED`].
    noticed: bool,
    /// How far payload may go past TCP, as said at run time.
    switches: Switches,
    /// By interface index.
    attachments: HashMap<u32, Attachment>,
    /// What is attached to cgroups.
    pub(super) hooks: Vec<Hooks>,
    /// The services' hosts are known.
    pub(super) balances: bool,
    services: Services,
    /// Interfaces that should have programs and have not, by index.
    unattached: BTreeMap<u32, String>,
    pods: Pods,
    /// What they are called, for those who serve them.
    pod_names: Arc<ArcSwap<PodNames>>,
    /// Why it is not known which pods there are.
    pub(super) source_fault: Option<String>,
    commanded: Vec<Commanded>,
    /// None before there is a pin path.
    lease: Option<Lease>,
    /// Until when programs of an earlier daemon stay attached, if they do.
    waits: Option<Instant>,
    /// The directions whose listeners are there.
    listening: u32,
    /// Has the thread that follows the node look at this.
    wake: Arc<EventFd>,
}

impl State {
    pub(super) fn load(config: InterceptionConfig, workers: u32) -> Result<Self, InterceptError> {
        let cookie = probe::netns_cookie().map_err(|source| {
            InterceptError::netlink("read the network namespace's cookie (needs Linux 5.14)", source)
        })?;
        let sock_layout = match &config.shortcut_cgroup {
            Some(_) => kernel::sock_layout(&config),
            None => Err(Withheld::NotConfigured),
        };
        let unused = SockLayout::default();
        let ebpf = kernel::load(&config, workers, cookie, sock_layout.as_ref().unwrap_or(&unused))?;
        let tcx =
            !config.force_clsact && probe::KernelVersion::running().is_ok_and(|running| running >= probe::TCX_FLOOR);
        let method = if tcx { Method::Tcx(config.pin_path.join("links")) } else { Method::Clsact };
        let netlink = Netlink::open().map_err(|source| InterceptError::netlink("open a netlink socket", source))?;
        let loopback = nix::net::if_::if_nametoindex("lo")
            .map_err(|errno| InterceptError::netlink("find the interface lo", errno.into()))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| InterceptError::netlink("watch interfaces", errno.into()))?;
        // Last, so that a failure leaves nothing behind.
        probe::prepare_pin_path(&config.pin_path)?;
        let lease = Lease::take(&config.pin_path).map_err(|source| {
            // Fails where there is something of an earlier daemon in it.
            let _ = fs::remove_dir(&config.pin_path);
            InterceptError::PinPath { path: config.pin_path.clone(), reason: format!("cannot be locked: {source}") }
        })?;
        Ok(Self {
            config,
            ebpf,
            method,
            netlink,
            loopback,
            sock_layout,
            noticed: false,
            switches: Switches::default(),
            routed: Vec::new(),
            attachments: HashMap::new(),
            hooks: Vec::new(),
            balances: false,
            services: Services::default(),
            unattached: BTreeMap::new(),
            pods: Pods::default(),
            pod_names: Arc::default(),
            source_fault: None,
            commanded: Vec::new(),
            lease: Some(lease),
            waits: None,
            listening: 0,
            wake: Arc::new(wake),
        })
    }

    pub(super) fn pod_names(&self) -> Arc<ArcSwap<PodNames>> {
        Arc::clone(&self.pod_names)
    }

    pub(super) fn wake(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }

    pub(super) fn install(&mut self) -> Result<(), InterceptError> {
        if !self.config.interfaces.is_empty() {
            self.add_routing()?;
        }
        if let Err(reason) = kernel::attach_reopen(&mut self.ebpf) {
            tracing::warn!(reason, "a pod that uses a port again soon after the daemon closed it waits a second");
        }
        if let Some(path) = &self.config.shortcut_cgroup {
            let cgroup = probe::open_cgroup(path)?;
            if self.sock_layout.is_ok()
                && let Err(reason) = kernel::attach_shortcut(&mut self.ebpf, cgroup)
            {
                self.sock_layout = Err(Withheld::Refused(reason));
            }
            match &self.sock_layout {
                Ok(_) => {
                    lanes::look_at_both();
                    self.noticed = kernel::note_noticed(&mut self.ebpf)?;
                    let cgroup = path.display();
                    tracing::info!(%cgroup, noticed = self.noticed, "hops that stay on the node may take the short cut");
                }
                Err(withheld) => tracing::warn!(
                    reason_number = withheld.number(),
                    reason = %withheld,
                    "no short cut for hops that stay on the node: they use TCP"
                ),
            }
        }
        self.set_switches()?;
        self.reconcile_addresses()?;
        let bootstrap = self.config.pods.iter().map(|pod| Known {
            name: pod.address.to_string(),
            identity: format!("bootstrap {}", pod.address),
            origin: Origin::Bootstrap,
            addresses: vec![pod.address],
            wanted: Ok(pod.policy),
            leaving: false,
            version: 0,
            interface: None,
        });
        self.pods.set(Origin::Bootstrap, bootstrap.collect());
        self.recall()?;
        self.reconcile_pods();
        let earlier = matches!(&self.method, Method::Tcx(links) if has_entries(links));
        if earlier {
            tracing::info!("programs of an earlier daemon stay attached until the listeners are there");
            self.make_directory(&self.config.pin_path.join(NEXT))?;
            self.waits = Some(Instant::now() + PATIENCE);
        }
        self.make_directory(&self.config.pin_path.join("cgroups"))?;
        self.load_hooks()?;
        if earlier { Ok(()) } else { self.take_over() }
    }

    /// Attaches everywhere, in the place of what an earlier daemon attached, and removes what else it left.
    fn take_over(&mut self) -> Result<(), InterceptError> {
        self.waits = None;
        // A predecessor that ended meanwhile may have removed them.
        if !self.config.interfaces.is_empty() {
            self.add_routing()?;
        }
        let maps = self.maps_directory();
        for directory in [self.config.pin_path.join("links"), self.config.pin_path.join("cgroups"), maps.clone()] {
            self.make_directory(&directory)?;
        }
        kernel::pin_maps(&self.ebpf, &maps)?;
        self.reconcile_all_links()?;
        for error in self.reconcile_cgroups().1 {
            // Tried again until it works.
            tracing::error!(%error, "a cgroup keeps the programs of an earlier daemon, or has none");
        }
        for other in map_directories(&self.config.pin_path).into_iter().filter(|other| *other != maps) {
            if let Err(error) = remove_pins(&other) {
                tracing::warn!(path = %other.display(), %error, "maps of an earlier layout are left");
            }
        }
        if let Err(error) = fs::remove_dir(self.config.pin_path.join(NEXT))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the mark of a take-over is left");
        }
        if self.attachments.is_empty() && !self.config.interfaces.is_empty() {
            tracing::warn!(patterns = ?self.config.interfaces, "no interface matches yet");
        }
        Ok(())
    }

    fn make_directory(&self, path: &Path) -> Result<(), InterceptError> {
        fs::create_dir_all(path).map_err(|source| InterceptError::PinPath {
            path: path.to_owned(),
            reason: format!("cannot be created: {source}"),
        })
    }

    /// Where this layout's maps are pinned.
    fn maps_directory(&self) -> PathBuf {
        self.config.pin_path.join(format!("maps-{LAYOUT}"))
    }

    /// Puts a worker's socket in place. With the first one of each direction that is needed, an earlier daemon's
    /// programs give way to ours.
    pub(super) fn set_listener(
        &mut self,
        direction: u32,
        worker: usize,
        socket: BorrowedFd<'_>,
    ) -> Result<(), InterceptError> {
        kernel::set_listener(&mut self.ebpf, direction, worker, socket)?;
        self.listening |= direction;
        let waits_for = [OUTBOUND, INBOUND].into_iter().any(|it| self.config.redirects(it) && self.listening & it == 0);
        if self.waits.is_some() && !waits_for {
            self.take_over()?;
        }
        Ok(())
    }

    /// Whether an earlier daemon still runs.
    pub(super) fn has_predecessor(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| !lease.is_held())
    }

    /// Whether there is nothing to try again.
    pub(super) fn is_settled(&self) -> bool {
        self.waits.is_none()
            && !self.has_predecessor()
            && !self.pods.has_faults()
            && self.unattached.is_empty()
            && self.hooks.iter().all(|hooks| hooks.faults().is_empty())
    }

    /// Tries again what failed, and ends what lasted long enough.
    pub(super) fn retry(&mut self) -> Vec<InterceptError> {
        let mut errors = Vec::new();
        if let Some(lease) = &mut self.lease
            && let Err(error) = lease.retry()
        {
            tracing::debug!(%error, "the lease of the pin path cannot be had");
        }
        if self.waits.is_some_and(|until| Instant::now() >= until) {
            tracing::error!("the listeners for redirected connections do not come: failure policies are in force");
            errors.extend(self.take_over().err());
        }
        if !self.unattached.is_empty() {
            errors.extend(self.reconcile_all_links().err());
        }
        if self.pods.has_faults() {
            self.reconcile_pods();
        }
        if self.hooks.iter().any(|hooks| !hooks.faults().is_empty()) {
            errors.extend(self.reconcile_cgroups().1);
        }
        errors
    }

    /// Has the thread that follows the node try again what failed.
    pub(super) fn try_again_soon(&self) {
        // Only a full counter would refuse it, and then it wakes up anyway.
        let _ = self.wake.write(1);
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut counters = kernel::counters(&self.ebpf);
        counters.push(("interception.balanced.tables_refused", self.services.refused));
        let withheld = self.sock_layout.as_ref().err().map_or(0, Withheld::number);
        counters.push(("interception.acceleration.withheld", withheld.into()));
        counters.extend(self.pods.counts());
        counters
    }

    /// Whether anything goes past TCP.
    pub(super) fn accelerates(&self) -> bool {
        self.sock_layout.is_ok()
    }

    pub(super) fn acceleration(&self) -> AccelerationStatus {
        AccelerationStatus::new(&self.config, &self.switches, self.sock_layout.as_ref().err(), self.noticed)
    }

    pub(super) fn accelerate(&mut self, level: &str, listener: Option<&str>) -> Result<(), InterceptError> {
        if let Err(withheld) = &self.sock_layout {
            return Err(InterceptError::Command(format!("nothing can go past TCP here: {withheld}")));
        }
        let Some(level) = acceleration_of_name(level) else {
            return Err(InterceptError::Command("level is off, automatic, shortcut, both-ways or joined".to_owned()));
        };
        let names = [&self.config.outbound_listener, &self.config.inbound_listener];
        let meant = names.map(|name| listener.is_none_or(|listener| listener == name));
        if meant == [false; 2] {
            let reason = format!("listener is {} or {}", names[0], names[1]);
            return Err(InterceptError::Command(reason));
        }
        for (switch, _) in self.switches.listeners.iter_mut().zip(meant).filter(|(_, meant)| *meant) {
            *switch = level;
        }
        self.set_switches()
    }

    fn set_switches(&mut self) -> Result<(), InterceptError> {
        let [outbound, inbound]: [Acceleration; 2] = self.switches.in_force(&self.config);
        kernel::set_switch(&mut self.ebpf, OUTBOUND, outbound)?;
        kernel::set_switch(&mut self.ebpf, INBOUND, inbound)
    }

    pub(super) fn pods(&self) -> Vec<PodStatus> {
        self.pods.status(&self.ebpf)
    }

    pub(super) fn faults(&self) -> Vec<String> {
        let unattached = self.unattached.values().chain(self.hooks.iter().flat_map(Hooks::faults)).cloned();
        self.source_fault.iter().cloned().chain(self.pods.faults()).chain(unattached).collect()
    }

    /// Replaces the pods of one origin, and enrols them.
    pub(super) fn set_pods(&mut self, origin: Origin, pods: Vec<Known>) {
        self.pods.set(origin, pods);
        self.reconcile_pods();
        if !self.is_settled() {
            self.try_again_soon();
        }
    }

    /// Puts in force what is wanted of pods, as the node's interfaces and routes are now.
    pub(super) fn reconcile_pods(&mut self) {
        let Self { pods, ebpf, netlink, unattached, config, .. } = self;
        let mut links = None;
        pods.reconcile(ebpf, |address| {
            let links = links.get_or_insert_with(|| netlink.links());
            let links = match links {
                Ok(links) => links,
                Err(error) => return Place::Missing(format!("interfaces cannot be listed: {error}")),
            };
            let index = match netlink.route_to(address) {
                Ok(Some(index)) => index,
                Ok(None) => return Place::Missing("no interface: the node has no route to it".to_owned()),
                Err(error) => return Place::Missing(format!("its interface cannot be found: {error}")),
            };
            if let Some(reason) = unattached.get(&index) {
                return Place::Missing(reason.clone());
            }
            let is_pods = |link: &Link| direction_of(config, &link.name) == Some(Direction::Outbound);
            match links.iter().find(|link| link.index == index) {
                Some(link) if is_pods(link) => Place::Interface(index, link.name.clone()),
                Some(bridge) if links.iter().any(|link| link.bridge == Some(index) && is_pods(link)) => {
                    Place::Bridge(bridge.name.clone())
                }
                Some(link) => Place::Missing(format!(
                    "no interface: the node reaches it over {}, which `interfaces` does not name",
                    link.name
                )),
                None => Place::Missing("no interface: it has just gone".to_owned()),
            }
        });
        let names = self.pods.names();
        if **self.pod_names.load() != names {
            self.pod_names.store(Arc::new(names));
        }
    }

    /// Reads what was enrolled by command, and forgets what is on another interface by now.
    fn recall(&mut self) -> Result<(), InterceptError> {
        let path = self.config.state_path.clone();
        self.commanded =
            commanded::read(&path).map_err(|reason| InterceptError::StateFile { path: path.clone(), reason })?;
        let netlink = &mut self.netlink;
        self.commanded.retain(|pod| {
            let stays =
                pod.addresses.iter().all(|it| matches!(netlink.route_to(*it), Ok(Some(to)) if to == pod.interface));
            if !stays {
                tracing::warn!(pod = pod.name, "was enrolled by command, and is not any more: its interface is gone");
            }
            stays
        });
        self.pods.set(Origin::Command, self.commanded.iter().map(Commanded::known).collect());
        Ok(())
    }

    pub(super) fn enrol(
        &mut self,
        name: Option<String>,
        mut addresses: Vec<IpAddr>,
        direction: Option<&str>,
        failure_policy: Option<&str>,
        acceleration: Option<&str>,
    ) -> Result<(), InterceptError> {
        let refuse = |reason: String| Err(InterceptError::Command(reason));
        let default = self.config.policy;
        let Some(traffic) = direction.map_or(Some(default.traffic), Traffic::of_name) else {
            return refuse("direction is outbound, inbound or both".to_owned());
        };
        let failure = failure_policy.map_or(Some(default.failure_policy), FailurePolicy::of_name);
        let Some(failure_policy) = failure else { return refuse("failure_policy is open or closed".to_owned()) };
        let level = acceleration.map_or(Some(default.acceleration), acceleration_of_name);
        let Some(acceleration) = level else {
            return refuse("acceleration is off, automatic, shortcut, both-ways or joined".to_owned());
        };
        addresses.sort_unstable();
        addresses.dedup();
        let Some(first) = addresses.first() else { return refuse("an address is needed".to_owned()) };
        let name = name.unwrap_or_else(|| first.to_string());
        let mut interface = None;
        for address in &addresses {
            let to = self.netlink.route_to(*address);
            let to =
                to.map_err(|source| InterceptError::netlink(format!("find the interface of {address}"), source))?;
            match (to, interface) {
                (None, _) => return refuse(format!("the node has no route to {address}")),
                (Some(to), Some(other)) if to != other => {
                    return refuse(format!("{address} is on another interface than {first}: enrol it for itself"));
                }
                (to, _) => interface = to,
            }
        }
        // At least one address: the loop ran.
        let Some(interface) = interface else { return refuse("an address is needed".to_owned()) };
        let policy = Policy { failure_policy, traffic, acceleration };
        let before = self.commanded.clone();
        let mut wanted = before.clone();
        wanted.retain(|pod| pod.name != name && pod.addresses.iter().all(|address| !addresses.contains(address)));
        wanted.push(Commanded::new(name.clone(), addresses, policy, interface));
        self.command(wanted)?;
        let failed = self.pods().into_iter().find(|pod| pod.name == name && pod.is_commanded() && !pod.enrolled);
        if let Some(pod) = failed {
            self.set_commanded(before);
            self.write_commanded(&self.commanded)?;
            return refuse(pod.reason.unwrap_or_default());
        }
        Ok(())
    }

    pub(super) fn unenrol(&mut self, name_or_address: &str) -> Result<(), InterceptError> {
        let address: Option<IpAddr> = name_or_address.parse().ok();
        let mut wanted = self.commanded.clone();
        wanted.retain(|pod| {
            pod.name != name_or_address && address.is_none_or(|address| !pod.addresses.contains(&address))
        });
        if wanted.len() == self.commanded.len() {
            let reason =
                format!("{name_or_address} was not enrolled by command: `culvert status --node` lists what is");
            return Err(InterceptError::Command(reason));
        }
        self.command(wanted)
    }

    /// Writes down and puts in force what is to be enrolled by command. What cannot be written down is not put in force.
    fn command(&mut self, wanted: Vec<Commanded>) -> Result<(), InterceptError> {
        self.write_commanded(&wanted)?;
        self.set_commanded(wanted);
        Ok(())
    }

    fn write_commanded(&self, pods: &[Commanded]) -> Result<(), InterceptError> {
        let path = &self.config.state_path;
        commanded::write(path, pods)
            .map_err(|error| InterceptError::StateFile { path: path.clone(), reason: error.to_string() })
    }

    fn set_commanded(&mut self, pods: Vec<Commanded>) {
        self.commanded = pods;
        self.set_pods(Origin::Command, self.commanded.iter().map(Commanded::known).collect());
    }

    /// Loads the programs for cgroups, and attaches those of host mode, unless an earlier daemon's stay for now.
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
        let missing = |hooks: &&Hooks| hooks.role() == Role::Host && hooks.len() == 0;
        for hooks in self.hooks.iter().filter(missing).filter(|_| self.waits.is_none()) {
            tracing::warn!(patterns = ?hooks.patterns(), "no cgroup of host mode is there yet");
        }
        Ok(())
    }

    /// Attaches to the cgroups that are there now, where an earlier daemon's programs are not to stay for now. Returns
    /// where others may appear, also where it is too early to attach, and what could not be done and was not said yet.
    pub(super) fn reconcile_cgroups(&mut self) -> (Vec<PathBuf>, Vec<InterceptError>) {
        let (mut parents, mut errors) = (Vec::new(), Vec::new());
        let (balances, redirects) = (self.balances, self.waits.is_none());
        let is_due = |role: Role| match role {
            Role::Host => redirects,
            Role::Balance => balances,
        };
        for hooks in &mut self.hooks {
            if !is_due(hooks.role()) {
                parents.extend(hooks.parents());
                continue;
            }
            let (more, failed) = hooks.reconcile(&mut self.ebpf);
            parents.extend(more);
            errors.extend(failed);
        }
        (parents, errors)
    }

    pub(super) fn change_service(
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
                Ok(()) if self.routed.contains(&is_ipv6) => {}
                Ok(()) => self.routed.push(is_ipv6),
                Err((_, error)) if is_ipv6 && is_unsupported(&error) => {
                    tracing::warn!(%error, "this host has no IPv6: only IPv4 is redirected");
                }
                Err((action, error)) => return Err(InterceptError::netlink(action, error)),
            }
        }
        Ok(())
    }

    /// Attaches to, leaves alone, or detaches from an interface, as its name asks for.
    pub(super) fn reconcile_link(&mut self, link: &Link) -> Result<(), InterceptError> {
        if self.waits.is_some() {
            return Ok(());
        }
        let wanted = direction_of(&self.config, &link.name);
        if let Some(attachment) = self.attachments.get_mut(&link.index) {
            if wanted == Some(attachment.direction) {
                if !attachment.is_on(&link.name) {
                    attachment.rename(&link.name);
                }
                return Ok(());
            }
            self.forget_link(link.index)?;
        }
        let Some(direction) = wanted else {
            self.unattached.remove(&link.index);
            return Ok(());
        };
        let attachment = match Attachment::new(&mut self.ebpf, link, direction, &self.method) {
            Ok(attachment) => attachment,
            // Interfaces come and go faster than events are read.
            Err(_) if nix::net::if_::if_nametoindex(link.name.as_str()).is_err() => return Ok(()),
            Err(error) => {
                // Tried again until it works; said once.
                let reason = error.to_string();
                let known = self.unattached.insert(link.index, reason.clone());
                return if known == Some(reason) { Ok(()) } else { Err(error) };
            }
        };
        self.unattached.remove(&link.index);
        tracing::info!(interface = link.name, program = direction.program(), "attached");
        probe::log_hostile_sysctls(&link.name);
        self.attachments.insert(link.index, attachment);
        Ok(())
    }

    /// An interface is gone: and with it the pod that it belonged to.
    pub(super) fn link_gone(&mut self, index: u32) -> Result<(), InterceptError> {
        self.unattached.remove(&index);
        // First of all what matters: it does not wait for a disk.
        let forgotten = self.forget_link(index);
        if self.commanded.iter().all(|pod| pod.interface != index) {
            return forgotten;
        }
        let stay = self.commanded.iter().filter(|pod| pod.interface != index).cloned().collect();
        self.set_commanded(stay);
        forgotten.and(self.write_commanded(&self.commanded))
    }

    /// Detaches from an interface. One that moved to another network namespace took the program along, which must not
    /// work there.
    pub(super) fn forget_link(&mut self, index: u32) -> Result<(), InterceptError> {
        match self.attachments.remove(&index) {
            Some(attachment) => attachment.detach().map_err(InterceptError::Remove),
            None => Ok(()),
        }
    }

    pub(super) fn reconcile_all_links(&mut self) -> Result<(), InterceptError> {
        if self.waits.is_some() {
            return Ok(());
        }
        let links = self.netlink.links().map_err(|source| InterceptError::netlink("list interfaces", source))?;
        let gone: Vec<u32> =
            self.attachments.keys().copied().filter(|index| links.iter().all(|link| link.index != *index)).collect();
        for index in gone {
            self.link_gone(index)?;
        }
        self.unattached.retain(|index, _| links.iter().any(|link| link.index == *index));
        for link in &links {
            self.reconcile_link(link)?;
        }
        if let Method::Tcx(directory) = &self.method {
            attach::remove_stale_pins(directory, |index| self.attachments.contains_key(&index))
                .map_err(|source| InterceptError::PinPath { path: directory.clone(), reason: source.to_string() })?;
        }
        Ok(())
    }

    pub(super) fn reconcile_addresses(&mut self) -> Result<(), InterceptError> {
        let addresses = self.netlink.addresses().map_err(|source| InterceptError::netlink("list addresses", source))?;
        kernel::set_local_addresses(&mut self.ebpf, &addresses)
    }

    /// Whether another daemon has taken over, or is about to.
    fn is_superseded(&self) -> bool {
        if self.waits.is_some() {
            return self.has_predecessor();
        }
        if self.config.pin_path.join(NEXT).exists() {
            return true;
        }
        let directories = map_directories(&self.config.pin_path);
        !directories.is_empty() && !directories.iter().any(|directory| kernel::has_pinned(&self.ebpf, directory))
    }

    /// Removes all that was made, as far as possible, unless it is another daemon's by now.
    pub(super) fn remove(&mut self) -> Result<(), InterceptError> {
        if self.is_superseded() {
            tracing::info!("another daemon has taken over: kernel programs and routing are left to it");
            self.attachments.drain().for_each(|(_, attachment)| attachment.leave());
            if self.waits.is_some() {
                let _ = fs::remove_dir(self.config.pin_path.join(NEXT));
            }
            return Ok(());
        }
        let mut failures: Vec<String> = Vec::new();
        // Programs first: without rule and route, what they redirect would go astray.
        for (_, attachment) in self.attachments.drain() {
            failures.extend(attachment.detach().err());
        }
        let mut directories = map_directories(&self.config.pin_path);
        directories.extend(["links", "cgroups"].map(|name| self.config.pin_path.join(name)));
        for directory in directories {
            failures.extend(remove_pins(&directory).err().map(|error| format!("{}: {error}", directory.display())));
        }
        let _ = fs::remove_dir(self.config.pin_path.join(NEXT));
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

/// Which program an interface of this name gets, if any.
fn direction_of(config: &InterceptionConfig, name: &str) -> Option<Direction> {
    let any = |patterns: &[String]| patterns.iter().any(|pattern| glob_matches(pattern, name));
    if any(&config.interfaces) {
        Some(Direction::Outbound)
    } else if any(&config.uplinks) {
        Some(Direction::Inbound)
    } else {
        None
    }
}

/// The directories of maps below a pin path, of whatever layout.
fn map_directories(pin_path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pin_path).into_iter().flatten().filter_map(Result::ok);
    // The first layout had no number.
    let is_ours = |name: &[u8]| name == b"maps" || name.starts_with(b"maps-");
    entries.filter(|entry| is_ours(entry.file_name().as_encoded_bytes())).map(|entry| entry.path()).collect()
}

fn has_entries(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}

/// Removes what is pinned in a directory.
fn remove_pinned_in(directory: &Path) -> Result<(), InterceptError> {
    let error = |source: io::Error| InterceptError::PinPath { path: directory.to_owned(), reason: source.to_string() };
    for entry in fs::read_dir(directory).map_err(error)? {
        entry.and_then(|entry| fs::remove_file(entry.path())).map_err(error)?;
    }
    Ok(())
}

/// Removes a directory of pins.
pub(super) fn remove_pins(directory: &Path) -> io::Result<()> {
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
