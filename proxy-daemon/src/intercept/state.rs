//! What is in force: the programs, the rule and the route, and the pods' policies.

mod enrolment;
mod hooks;
mod links;
mod removal;
mod succession;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, io};

use arc_swap::ArcSwap;
use aya::Ebpf;
use culvert_proxy_ebpf::{Acceleration, Endpoint, INBOUND, LinkAddress, OUTBOUND, SockLayout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::acceleration::{AccelerationStatus, Switches, Withheld};
use super::attach::{Attachment, Method};
use super::cgroups::Hooks;
use super::commanded::Commanded;
use super::config::InterceptionConfig;
use super::departed::Departed;
use super::error::InterceptError;
use super::lease::Lease;
use super::netlink::Netlink;
use super::pods::{Known, Origin, PodNames, Pods, acceleration_of_name};
use super::services::Services;
use super::{inherit, kernel, lanes, probe, services, sessions};
pub(super) use removal::{map_directories, remove_pins};

/// How long programs of an earlier daemon stay where our listeners do not come.
const PATIENCE: Duration = Duration::from_secs(15);
/// How many files are open at a time while all is removed.
const SPARE_FILES: usize = 4;
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
    /// Ends connections of pods that are gone.
    departed: Departed,
    /// Ports of bridges that the kernel's programs know, by index.
    bridge_ports: HashMap<u32, LinkAddress>,
    /// What is attached to cgroups.
    pub(super) hooks: Vec<Hooks>,
    /// The services' hosts are known.
    pub(super) balances: bool,
    pub(super) services: Services,
    /// What an earlier daemon's programs count of which maps have another layout, until the last of them has given way.
    carried: Option<inherit::Carried>,
    /// Some UDP sockets may have been connected to backends by an earlier daemon's programs, and were not looked at yet.
    inherits_sockets: bool,
    /// Interfaces that should have programs and have not, by index.
    unattached: BTreeMap<u32, String>,
    pods: Pods,
    /// What they are called, for those who serve them.
    pod_names: Arc<ArcSwap<PodNames>>,
    /// Why it is not known which pods there are.
    pub(super) source_faults: Vec<String>,
    commanded: Vec<Commanded>,
    /// The cgroups of host mode that were enrolled by command.
    commanded_cgroups: Vec<PathBuf>,
    /// The state file has more, whose interfaces are gone.
    forgets: bool,
    /// What earlier daemons counted for pods that have gone since is forgotten.
    forgot_others: bool,
    /// None before there is a pin path.
    lease: Option<Lease>,
    /// That this daemon is about to take over: others see that it lives.
    next: Option<Lease>,
    /// Until when programs of an earlier daemon stay attached, if they do.
    waits: Option<Instant>,
    /// The pins are ours, or were.
    took_over: bool,
    /// That this daemon's programs are to stay in force: see [`succession`].
    alive: Option<Lease>,
    /// Another daemon was seen to have taken over.
    was_followed: bool,
    /// This daemon was told to end.
    ends: bool,
    /// The rule and the route could not be looked at, or made again, the last time.
    routing_failed: bool,
    /// Why the rule or the route that others removed is not there again.
    routing_fault: Option<String>,
    /// Why this daemon has not taken over again, although its successor is gone.
    succession_fault: Option<String>,
    /// Why what comes back from elsewhere does not reach this daemon.
    uplink_fault: Option<String>,
    /// Which ports of pods' bridges are named by nothing, so that pods behind them are passed by.
    bridge_fault: Option<String>,
    /// The directions whose listeners are there.
    listening: u32,
    /// Has the thread that follows the node look at this.
    wake: Arc<EventFd>,
    /// Files that are closed when all is removed, which opens some: also after a start that failed because no more can be open.
    spare: Vec<fs::File>,
}

impl State {
    pub(super) fn load(config: InterceptionConfig, workers: u32) -> Result<Self, InterceptError> {
        let cookie = probe::netns_cookie().map_err(|source| match source.raw_os_error() {
            // The option is not known.
            Some(nix::libc::ENOPROTOOPT) => InterceptError::TooOld { release: probe::release() },
            _ => InterceptError::netlink("read the network namespace's cookie", source),
        })?;
        let sock_layout = match &config.shortcut_cgroup {
            Some(_) => kernel::sock_layout(&config),
            None => Err(Withheld::NotConfigured),
        };
        let unused = SockLayout::default();
        let kernel::Loaded { ebpf, carried, inherits_sockets } =
            kernel::load(&config, workers, cookie, sock_layout.as_ref().unwrap_or(&unused))?;
        let tcx =
            !config.force_clsact && probe::KernelVersion::running().is_ok_and(|running| running >= probe::TCX_FLOOR);
        let method = if tcx { Method::Tcx(config.pin_path.join("links")) } else { Method::Clsact };
        let netlink = Netlink::open().map_err(|source| InterceptError::netlink("open a netlink socket", source))?;
        let loopback = nix::net::if_::if_nametoindex("lo")
            .map_err(|errno| InterceptError::netlink("find the interface lo", errno.into()))?;
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| InterceptError::netlink("watch interfaces", errno.into()))?;
        let spare = (0..SPARE_FILES).map(|_| fs::File::open("/dev/null")).collect::<Result<_, _>>();
        let spare = spare.map_err(|source| InterceptError::netlink("open /dev/null", source))?;
        // Last, so that a failure leaves nothing behind.
        probe::prepare_pin_path(&config.pin_path)?;
        let lease = Lease::take(&config.pin_path).map_err(|source| {
            // Fails where there is something of an earlier daemon in it.
            let _ = fs::remove_dir(&config.pin_path);
            InterceptError::PinPath { path: config.pin_path.clone(), reason: format!("cannot be locked: {source}") }
        })?;
        let source_faults = config.enrolment.iter().map(|_| "pods have not been read yet".to_owned()).collect();
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
            departed: Departed::default(),
            bridge_ports: HashMap::new(),
            hooks: Vec::new(),
            balances: false,
            services: Services::default(),
            carried,
            inherits_sockets,
            unattached: BTreeMap::new(),
            pods: Pods::default(),
            pod_names: Arc::default(),
            source_faults,
            commanded: Vec::new(),
            commanded_cgroups: Vec::new(),
            forgets: false,
            forgot_others: false,
            lease: Some(lease),
            next: None,
            waits: None,
            took_over: false,
            alive: None,
            was_followed: false,
            ends: false,
            routing_failed: false,
            routing_fault: None,
            succession_fault: None,
            uplink_fault: None,
            bridge_fault: None,
            listening: 0,
            wake: Arc::new(wake),
            spare,
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
                    let automatic = self.acceleration().automatic;
                    tracing::info!(%cgroup, automatic, "hops that stay on the node may take the short cut");
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
        // Of one that lives, whatever its programs are attached by; of one that died, those that outlive it.
        let earlier = self.has_predecessor() || matches!(&self.method, Method::Tcx(links) if has_entries(links));
        let earlier = earlier && self.config.redirected() != 0;
        if earlier {
            tracing::info!("programs of an earlier daemon stay attached until the listeners are there");
            let next = self.config.pin_path.join(NEXT);
            self.make_directory(&next)?;
            self.next = Lease::take(&next).ok();
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
        let maps = inherit::maps_directory(&self.config.pin_path);
        for directory in [self.config.pin_path.join("links"), self.config.pin_path.join("cgroups"), maps.clone()] {
            self.make_directory(&directory)?;
        }
        self.announce();
        kernel::pin_maps(&self.ebpf, &maps)?;
        self.took_over = true;
        self.reconcile_all_links()?;
        for error in self.reconcile_cgroups().1 {
            // Tried again until it works.
            tracing::error!(%error, "a cgroup keeps the programs of an earlier daemon, or has none");
        }
        // Those of another layout also tell their daemon that it is followed.
        for other in map_directories(&self.config.pin_path).into_iter().filter(|other| *other != maps) {
            if let Err(error) = remove_pins(&other) {
                tracing::warn!(path = %other.display(), %error, "maps of an earlier layout are left");
            }
        }
        self.next = None;
        if let Err(error) = fs::remove_dir(self.config.pin_path.join(NEXT))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the mark of a take-over is left");
        }
        succession::remove_stale_marks(&self.config.pin_path);
        self.forget_others();
        if std::mem::take(&mut self.forgets)
            && let Err(error) = self.write_commanded(&self.commanded)
        {
            tracing::warn!(%error, "what was enrolled by command on interfaces that are gone stays written down");
        }
        if self.attachments.is_empty() && !self.config.interfaces.is_empty() {
            tracing::warn!(patterns = ?self.config.interfaces, "no interface matches yet");
        }
        Ok(())
    }

    /// Adds what an earlier daemon's programs counted in maps of another layout, and forgets them when all have given way.
    fn carry_on(&mut self, all_due: bool) {
        let Some(carried) = &mut self.carried else { return };
        carried.add_more(&mut self.ebpf);
        let have_faults = !self.unattached.is_empty() || self.hooks.iter().any(Hooks::has_faults);
        if all_due && !have_faults {
            self.carried = None;
        }
    }

    fn make_directory(&self, path: &Path) -> Result<(), InterceptError> {
        fs::create_dir_all(path).map_err(|source| InterceptError::PinPath {
            path: path.to_owned(),
            reason: format!("cannot be created: {source}"),
        })
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
        let all_listen = self.config.redirected() & !self.listening == 0;
        if self.waits.is_some() && all_listen && !self.ends {
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
            && (!self.was_followed || self.ends)
            && !self.has_predecessor()
            && !self.routing_failed
            && !self.pods.has_faults()
            && self.unattached.is_empty()
            && self.hooks.iter().all(|hooks| !hooks.has_faults())
    }

    /// Tries again what failed, and ends what lasted long enough.
    pub(super) fn retry(&mut self) -> Vec<InterceptError> {
        let mut errors = Vec::new();
        if let Some(lease) = &mut self.lease
            && let Err(error) = lease.retry()
        {
            tracing::debug!(%error, "the lease of the pin path cannot be had");
        }
        // Somebody may have looked whether it is free just when it was taken.
        if let Some(Err(error)) = self.alive.as_mut().map(Lease::retry) {
            tracing::debug!(%error, "this daemon's mark cannot be had");
        }
        self.departed.end();
        errors.extend(self.look_after_successor());
        errors.extend(self.keep_routing());
        self.look_at_uplinks();
        if self.waits.is_some_and(|until| Instant::now() >= until) && !self.ends {
            if self.has_predecessor() {
                // It serves, and is the better for pods than nobody.
                self.waits = Some(Instant::now() + PATIENCE);
                tracing::error!(
                    "the listeners for redirected connections do not come: the daemon before this one goes on"
                );
            } else {
                tracing::error!("the listeners for redirected connections do not come: failure policies are in force");
                errors.extend(self.take_over().err());
            }
        }
        if !self.unattached.is_empty() {
            errors.extend(self.reconcile_all_links().err());
        }
        if self.pods.has_faults() {
            self.reconcile_pods();
        }
        if self.carried.is_some() || self.hooks.iter().any(Hooks::has_faults) {
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
        counters.push(("interception.ended_connections", self.departed.ended()));
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

    pub(super) fn faults(&self) -> Vec<String> {
        let unattached = self.unattached.values().chain(self.hooks.iter().flat_map(Hooks::faults)).cloned();
        let of_node = [&self.routing_fault, &self.succession_fault, &self.uplink_fault, &self.bridge_fault];
        self.source_faults
            .iter()
            .chain(of_node.into_iter().flatten())
            .cloned()
            .chain(self.pods.faults())
            .chain(unattached)
            .chain(self.unhosted())
            .collect()
    }

    pub(super) fn change_service(
        &mut self,
        change: impl FnOnce(&mut Services, &mut Ebpf) -> Result<Vec<Endpoint>, InterceptError>,
    ) -> Result<(), InterceptError> {
        let gone = change(&mut self.services, &mut self.ebpf)?;
        // Sockets are a successor's as soon as it has taken over.
        if !gone.is_empty() && !self.is_followed() {
            sessions::end(services::connected_to(&mut self.ebpf, &gone));
        }
        Ok(())
    }

    /// Now that a service is known, tells UDP sockets that an earlier daemon's programs connected to a backend that it does not
    /// have any more.
    pub(super) fn end_stranded(&mut self, service: Endpoint) {
        let stranded = self.services.take_stranded(&mut self.ebpf, service);
        if !stranded.is_empty() && !self.is_followed() {
            sessions::end(stranded);
        }
    }
}

fn has_entries(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_some())
}
