//! Loads the kernel programs, fills their maps, and reads their counters.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{
    Array, HashMap, MapData, MapError, MapInfo, PerCpuArray, PerCpuHashMap, PerCpuValues, SockHash, SockMap,
};
use aya::programs::links::CgroupAttachMode;
use aya::programs::{
    Program, ProgramError, RawTracePoint, RawTracePointRunOptions, SkLookup, SkMsg, SockOps, TestRun as _,
};
use aya::{Ebpf, EbpfLoader};
use culvert_proxy_ebpf::{
    Acceleration, Address, ENDING, LinkAddress, MAX_WORKERS, NOTICED, PodCounters, PodPolicy, Reason, SockLayout,
    SocketKey, listener_slot, v4_mapped,
};

use super::acceleration::Withheld;
use super::attach::{Direction, classifier};
use super::btf::Btf;
use super::config::{FailurePolicy, InterceptionConfig, Range};
use super::error::{InterceptError, chain};
use super::{inherit, probe};

const POD_COUNTERS: &str = "POD_COUNTERS";

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert.bpf.o"));

/// The form in which the kernel programs hold an address.
pub(super) const fn address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => v4_mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// The loaded packet programs.
pub(super) struct Loaded {
    pub(super) ebpf: Ebpf,
    /// What was counted goes on in a map of another layout.
    pub(super) carried: Option<inherit::Carried>,
    /// What is known of UDP sockets that are connected to backends is an earlier daemon's.
    pub(super) inherits_sockets: bool,
}

/// Loads the packet programs, with their constants set and their policy maps filled; what an earlier daemon left of the
/// maps that outlive daemons takes the place of these. Nothing is attached.
pub(super) fn load(
    config: &InterceptionConfig,
    workers: u32,
    netns_cookie: u64,
    sock_layout: &SockLayout,
) -> Result<Loaded, InterceptError> {
    let mut ebpf = load_object(config, workers, netns_cookie, sock_layout, &[])?;
    let mut inherited = inherit::usable(&ebpf, &config.pin_path);
    if !inherited.is_empty() {
        match load_object(config, workers, netns_cookie, sock_layout, &inherited) {
            Ok(with) => ebpf = with,
            // They went in between, with a daemon that ended.
            Err(error) => {
                tracing::warn!(%error, "an earlier daemon's maps cannot be used: counters begin anew");
                inherited.clear();
            }
        }
    }
    let inherits = |map: &str| inherited.iter().any(|(name, _)| *name == map);
    let carried =
        if inherits(inherit::COUNTERS) { None } else { inherit::carry_counters_on(&mut ebpf, &config.pin_path) };
    fill_policy(&mut ebpf, config)?;
    for direction in [Direction::Outbound, Direction::Inbound] {
        classifier(&mut ebpf, direction)?.load().map_err(|error| InterceptError::load(direction.program(), &error))?;
    }
    Ok(Loaded { ebpf, carried, inherits_sockets: inherits(inherit::CONNECTED) })
}

/// Makes the maps, but for those that are pinned elsewhere already, and sets the constants.
fn load_object(
    config: &InterceptionConfig,
    workers: u32,
    netns_cookie: u64,
    sock_layout: &SockLayout,
    pinned: &[(&str, PathBuf)],
) -> Result<Ebpf, InterceptError> {
    raise_memlock_limit();
    let host_fails_closed = config.host.as_ref().is_some_and(|host| host.failure_policy == FailurePolicy::Closed);
    let max_addresses = u32::try_from(config.max_addresses).unwrap_or(u32::MAX);
    let mut loader = EbpfLoader::new();
    for (name, path) in pinned {
        loader.map_pin_path(name, path.as_path());
    }
    loader
        .map_max_entries("PODS", max_addresses)
        .map_max_entries("POD_COUNTERS", max_addresses)
        .override_global("MARK", &config.mark, true)
        .override_global("WORKERS", &workers, true)
        .override_global("NODE_NETNS", &netns_cookie, true)
        .override_global("SOCK_LAYOUT", sock_layout, true)
        .override_global("CHOOSES_ERRORS", &u32::from(probe::hooks_choose_errors()), true)
        .override_global("HOST_FAIL_CLOSED", &u32::from(host_fails_closed), true)
        .load(OBJECT)
        .map_err(|error| InterceptError::load("maps", &error))
}

fn fill_policy(ebpf: &mut Ebpf, config: &InterceptionConfig) -> Result<(), InterceptError> {
    for (name, excluded) in
        [("EXCLUDED_PORTS", &config.excluded_ports), ("INBOUND_EXCLUDED_PORTS", &config.inbound_excluded_ports)]
    {
        let mut ports: HashMap<_, u16, u8> = map(ebpf, name)?;
        for port in excluded {
            ports.insert(port, 1, 0).map_err(|error| InterceptError::load(name, &error))?;
        }
    }
    exclude_ranges(ebpf, "EXCLUDED_RANGES", &config.excluded_ranges)?;
    exclude_ranges(ebpf, "INBOUND_EXCLUDED_RANGES", &config.inbound_excluded_ranges)?;
    let mut users: HashMap<_, u32, u8> = map(ebpf, "EXCLUDED_UIDS")?;
    for uid in &config.excluded_uids {
        users.insert(uid, 1, 0).map_err(|error| InterceptError::load("EXCLUDED_UIDS", &error))?;
    }
    Ok(())
}

fn exclude_ranges(ebpf: &mut Ebpf, name: &str, excluded: &[Range]) -> Result<(), InterceptError> {
    let mut ranges: LpmTrie<_, Address, u8> = map(ebpf, name)?;
    for range in excluded {
        let mapped_bits = if range.address.is_ipv4() { 96 } else { 0 };
        let key = Key::new(u32::from(range.length) + mapped_bits, address(range.address));
        ranges.insert(&key, 1, 0).map_err(|error| InterceptError::load(name, &error))?;
    }
    Ok(())
}

/// Puts a pod's policy in force, and returns since when it is enrolled: since now, with counters that begin at 0; or since
/// this daemon or an earlier one enrolled it.
pub(super) fn set_pod(
    ebpf: &mut Ebpf,
    pod: IpAddr,
    identity: u64,
    policy: PodPolicy,
) -> Result<SystemTime, InterceptError> {
    let key = address(pod);
    let mut counters: PerCpuHashMap<_, Address, PodCounters> = map(ebpf, POD_COUNTERS)?;
    let known = counters.get(&key, 0).ok().and_then(|per_cpu| per_cpu.first().copied());
    let since = match known.filter(|known| known.identity == identity) {
        Some(known) => known.since,
        None => {
            let failed = |reason: String| InterceptError::Load { name: POD_COUNTERS.to_owned(), reason };
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // Until the year 2554.
            let since = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
            let cpus = aya::util::nr_cpus().map_err(|(_, source)| failed(source.to_string()))?;
            let begins = vec![PodCounters { identity, since, ..PodCounters::default() }; cpus];
            let begins = PerCpuValues::try_from(begins).map_err(|source| failed(source.to_string()))?;
            counters.insert(key, begins, 0).map_err(|error| InterceptError::load(POD_COUNTERS, &error))?;
            since
        }
    };
    let mut pods: HashMap<_, Address, PodPolicy> = map(ebpf, "PODS")?;
    pods.insert(key, policy, 0).map_err(|error| InterceptError::load("PODS", &error))?;
    Ok(UNIX_EPOCH + Duration::from_nanos(since))
}

/// Forgets the counters of all pods that are not to be kept, by their addresses and identities.
pub(super) fn forget_pods(ebpf: &mut Ebpf, keep: impl Fn(&Address, u64) -> bool) -> Result<(), InterceptError> {
    let mut counters: PerCpuHashMap<_, Address, PodCounters> = map(ebpf, POD_COUNTERS)?;
    let is_kept = |key: &Address| {
        let identity = counters.get(key, 0).ok().and_then(|per_cpu| per_cpu.first().map(|it| it.identity));
        identity.is_none_or(|identity| keep(key, identity))
    };
    let gone: Vec<Address> = counters.keys().filter_map(Result::ok).filter(|key| !is_kept(key)).collect();
    for key in gone {
        counters.remove(&key).map_err(|error| InterceptError::load(POD_COUNTERS, &error))?;
    }
    Ok(())
}

/// Takes a pod's policy out of force, and forgets its counters.
pub(super) fn remove_pod(ebpf: &mut Ebpf, pod: IpAddr) -> Result<(), InterceptError> {
    let key = address(pod);
    let mut pods: HashMap<_, Address, PodPolicy> = map(ebpf, "PODS")?;
    gone("PODS", pods.remove(&key))?;
    let mut counters: PerCpuHashMap<_, Address, PodCounters> = map(ebpf, POD_COUNTERS)?;
    gone(POD_COUNTERS, counters.remove(&key))
}

/// That what is to be removed from a map is not there is no error.
fn gone(name: &str, result: Result<(), MapError>) -> Result<(), InterceptError> {
    match result {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(error)) if error.io_error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(InterceptError::load(name, &error)),
    }
}

/// What a pod had to do with the daemon, summed over CPUs.
pub(super) fn pod_counters(ebpf: &Ebpf, pod: IpAddr) -> PodCounters {
    let counters = ebpf.map(POD_COUNTERS).and_then(|map| PerCpuHashMap::<_, Address, PodCounters>::try_from(map).ok());
    let per_cpu = counters.and_then(|counters| counters.get(&address(pod), 0).ok());
    per_cpu.iter().flat_map(|per_cpu| per_cpu.iter()).fold(PodCounters::default(), |sum, one| PodCounters {
        outbound_connections: sum.outbound_connections + one.outbound_connections,
        inbound_connections: sum.inbound_connections + one.inbound_connections,
        bytes_sent: sum.bytes_sent + one.bytes_sent,
        bytes_received: sum.bytes_received + one.bytes_received,
        ..*one
    })
}

/// Replaces what the kernel programs hold for the node's own addresses.
pub(super) fn set_local_addresses(ebpf: &mut Ebpf, addresses: &[IpAddr]) -> Result<(), InterceptError> {
    const NAME: &str = "LOCAL_ADDRESSES";
    let mut local: HashMap<_, Address, u8> = map(ebpf, NAME)?;
    let wanted: std::collections::HashSet<Address> = addresses.iter().copied().map(address).collect();
    // Added first: an address that stays is never missing.
    for address in &wanted {
        local.insert(address, 1, 0).map_err(|error| InterceptError::load(NAME, &error))?;
    }
    let gone: Vec<Address> = local.keys().filter_map(Result::ok).filter(|address| !wanted.contains(address)).collect();
    for address in gone {
        local.remove(&address).map_err(|error| InterceptError::load(NAME, &error))?;
    }
    Ok(())
}

/// Notes the link-layer address of a port of a bridge, or forgets the port.
pub(super) fn set_bridge_port(ebpf: &mut Ebpf, index: u32, address: Option<LinkAddress>) -> Result<(), InterceptError> {
    const NAME: &str = "BRIDGE_PORTS";
    let mut ports: HashMap<_, u32, LinkAddress> = map(ebpf, NAME)?;
    match address {
        Some(address) => ports.insert(index, address, 0).map_err(|error| InterceptError::load(NAME, &error)),
        None => gone(NAME, ports.remove(&index)),
    }
}

/// Attaches the program that lets connections be reopened to the calling thread's network namespace, or says why the
/// kernel does not take it. It lives as long as the daemon: without listeners there is nothing to choose.
pub(super) fn attach_reopen(ebpf: &mut Ebpf) -> Result<(), String> {
    let program: &mut SkLookup = ebpf
        .program_mut("reopen")
        .ok_or("reopen is not in the kernel object")?
        .try_into()
        .map_err(|error: ProgramError| chain(&error))?;
    let namespace = fs::File::open("/proc/thread-self/ns/net").map_err(|error| error.to_string())?;
    program
        .load()
        .and_then(|()| program.attach(namespace))
        .map(drop)
        .map_err(|error| format!("reopen: {}", chain(&error)))
}

/// Tells the programs which process this is, as the kernel numbers it: the daemon's own connections go where it says.
pub(super) fn note_daemon(ebpf: &mut Ebpf) -> Result<(), InterceptError> {
    const NAME: &str = "note_daemon";
    let missing = || InterceptError::Load { name: NAME.to_owned(), reason: "not in the kernel object".to_owned() };
    let program = ebpf.program_mut(NAME).ok_or_else(missing)?;
    let program: &mut RawTracePoint =
        program.try_into().map_err(|error: ProgramError| InterceptError::load(NAME, &error))?;
    program.load().map_err(|error| InterceptError::load(NAME, &error))?;
    program.test_run(RawTracePointRunOptions::default()).map(drop).map_err(|error| InterceptError::load(NAME, &error))
}

/// The program by which workers count: a handle that lives as long as it is used.
pub(super) fn counting(ebpf: &mut Ebpf) -> Result<OwnedFd, InterceptError> {
    const NAME: &str = "count_for_daemon";
    let missing = || InterceptError::Load { name: NAME.to_owned(), reason: "not in the kernel object".to_owned() };
    let program = ebpf.program_mut(NAME).ok_or_else(missing)?;
    let program: &mut RawTracePoint =
        program.try_into().map_err(|error: ProgramError| InterceptError::load(NAME, &error))?;
    match program.load() {
        Ok(()) | Err(ProgramError::AlreadyLoaded) => {}
        Err(error) => return Err(InterceptError::load(NAME, &error)),
    }
    let handle = program.fd().map_err(|error| InterceptError::load(NAME, &error))?.as_fd().try_clone_to_owned();
    handle.map_err(|error| InterceptError::load(NAME, &error))
}

/// Where the running kernel keeps what the short cut reads of sockets; or why it takes no short cut.
pub(super) fn sock_layout(config: &InterceptionConfig) -> Result<SockLayout, Withheld> {
    let version = match &config.kernel_release {
        Some(release) => probe::KernelVersion::of_release(release),
        None => probe::KernelVersion::running(),
    };
    let version = version.map_err(|error| Withheld::KernelBugs(error.to_string()))?;
    version.has_sound_sockmap().map_err(Withheld::KernelBugs)?;
    read_sock_layout().map_err(Withheld::NoTypes)
}

fn read_sock_layout() -> Result<SockLayout, String> {
    let types = Btf::of_kernel()?;
    Ok(SockLayout {
        rmem_alloc: types.offset_of("sock", &["sk_backlog", "rmem_alloc"])?,
        copied_seq: types.offset_of("tcp_sock", &["copied_seq"])?,
        write_seq: types.offset_of("tcp_sock", &["write_seq"])?,
        socket: types.offset_of("sock", &["sk_socket"])?,
        file: types.offset_of("socket", &["file"])?,
        file_flags: types.offset_of("file", &["f_flags"])?,
        state: types.offset_of("sock", &["__sk_common", "skc_state"])?,
    })
}

/// Sets how far payload of a direction's connections may go past TCP.
pub(super) fn set_switch(ebpf: &mut Ebpf, direction: u32, level: Acceleration) -> Result<(), InterceptError> {
    let mut switches: Array<_, u32> = map(ebpf, "SWITCHES")?;
    switches.set(direction, level as u32, 0).map_err(|error| InterceptError::load("SWITCHES", &error))
}

/// Has new connections go their own way.
pub(super) fn set_ending(ebpf: &mut Ebpf) -> Result<(), InterceptError> {
    let mut switches: Array<_, u32> = map(ebpf, "SWITCHES")?;
    switches.set(ENDING, 1, 0).map_err(|error| InterceptError::load("SWITCHES", &error))
}

/// Attaches the short cut to a cgroup, or says why the kernel does not take it. It lives as long as the daemon: its maps
/// are empty then anyway.
pub(super) fn attach_shortcut(ebpf: &mut Ebpf, cgroup: OwnedFd) -> Result<(), String> {
    let sockets: SockHash<_, [u8; size_of::<SocketKey>()]> = map(ebpf, "SOCKETS").map_err(|error| error.to_string())?;
    let sockets = sockets.fd().try_clone().map_err(|error| error.to_string())?;
    let find = |name: &str| format!("{name} is not in the kernel object");
    let program: &mut SkMsg = ebpf
        .program_mut("shortcut")
        .ok_or_else(|| find("shortcut"))?
        .try_into()
        .map_err(|error: ProgramError| chain(&error))?;
    // Before sockets enter the map: a socket takes over the map's program when it enters.
    program.load().and_then(|()| program.attach(&sockets)).map_err(|error| format!("shortcut: {}", chain(&error)))?;
    let program: &mut SockOps = ebpf
        .program_mut("register_socket")
        .ok_or_else(|| find("register_socket"))?
        .try_into()
        .map_err(|error: ProgramError| chain(&error))?;
    program
        .load()
        .and_then(|()| program.attach(cgroup, CgroupAttachMode::Single))
        .map_err(|error| format!("register_socket: {}", chain(&error)))?;
    Ok(())
}

/// Notes whether a program can notice that its socket is registered, although it reads from TCP only: newer kernels count for
/// FIONREAD what came past TCP and nothing else, and nginx takes its answer for an empty socket. Tried out with a socket.
pub(super) fn note_noticed(ebpf: &mut Ebpf) -> Result<bool, InterceptError> {
    let mut sockets: SockHash<_, [u8; size_of::<SocketKey>()]> = map(ebpf, "SOCKETS")?;
    let noticed = !tells_what_tcp_has(&mut sockets).unwrap_or_else(|error| {
        tracing::debug!(error, "whether FIONREAD is right cannot be tried out");
        false
    });
    let mut switches: Array<_, u32> = map(ebpf, "SWITCHES")?;
    switches.set(NOTICED, u32::from(noticed), 0).map_err(|error| InterceptError::load("SWITCHES", &error))?;
    Ok(noticed)
}

/// Whether FIONREAD of a registered socket counts what came by TCP.
fn tells_what_tcp_has(sockets: &mut SockHash<&mut MapData, [u8; size_of::<SocketKey>()]>) -> Result<bool, String> {
    const BYTES: [u8; 3] = [0; 3];
    let io = |error: std::io::Error| error.to_string();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(io)?;
    let mut from = TcpStream::connect(listener.local_addr().map_err(io)?).map_err(io)?;
    let (to, _) = listener.accept().map_err(io)?;
    // No socket's own key: its two ends are one.
    let key = [0; size_of::<SocketKey>()];
    sockets.insert(key, to.as_raw_fd(), 0).map_err(|error| chain(&error))?;
    let told = from.write_all(&BYTES).and_then(|()| {
        // They are there when this returns.
        to.set_read_timeout(Some(Duration::from_secs(1)))?;
        to.peek(&mut [0; BYTES.len()])?;
        let mut told: nix::libc::c_int = 0;
        // SAFETY: the request writes an int.
        let result = unsafe { nix::libc::ioctl(to.as_raw_fd(), nix::libc::FIONREAD, &raw mut told) };
        if result == 0 { Ok(told) } else { Err(std::io::Error::last_os_error()) }
    });
    // Fails only if it is gone.
    let _ = sockets.remove(&key);
    Ok(told.map_err(io)? as usize == BYTES.len())
}

/// Loads every program of the object; says which ones the running kernel refuses, and why.
pub(super) fn refused_programs() -> Result<Vec<(String, String)>, InterceptError> {
    let mut ebpf = load_object(&InterceptionConfig::default(), 1, 0, &SockLayout::default(), &[])?;
    let load = |program: &mut Program| match program {
        Program::SchedClassifier(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SkMsg(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::RawTracePoint(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    };
    let results = ebpf.programs_mut().map(|(name, program)| (name.to_owned(), load(program)));
    Ok(results.filter_map(|(name, result)| Some((name, chain(&result.err()?)))).collect())
}

/// Puts a listening socket into a worker's slot of a direction and of each family that it accepts.
pub(super) fn set_listener(
    ebpf: &mut Ebpf,
    direction: u32,
    worker: usize,
    socket: BorrowedFd<'_>,
) -> Result<(), InterceptError> {
    let error = |reason: String| InterceptError::Listener { worker, reason };
    let slot_worker = u32::try_from(worker)
        .ok()
        .filter(|worker| *worker < MAX_WORKERS)
        .ok_or_else(|| error(format!("the kernel programs know {MAX_WORKERS} workers at most")))?;
    let io_error = |source: std::io::Error| error(source.to_string());
    let sock = socket2::SockRef::from(&socket);
    let local = sock.local_addr().map_err(io_error)?;
    if !sock.is_listener().map_err(io_error)? {
        return Err(error("the socket does not listen".to_owned()));
    }
    // One bit for both families; each option reads it.
    let transparent = if local.is_ipv4() { sock.ip_transparent_v4() } else { sock.ip_transparent_v6() };
    if !transparent.map_err(io_error)? {
        return Err(error("the listener must be `transparent: true`, to answer in the destination's name".to_owned()));
    }
    let (v4, v6) = match local.as_socket() {
        Some(address) if address.is_ipv4() => (true, false),
        Some(_) => (!sock.only_v6().map_err(io_error)?, true),
        None => return Err(error("the socket is neither IPv4 nor IPv6".to_owned())),
    };
    let mut listeners: SockMap<_> = map(ebpf, "LISTENERS")?;
    for (accepts, is_ipv6) in [(v4, false), (v6, true)] {
        if accepts {
            let slot = listener_slot(slot_worker, is_ipv6, direction);
            listeners.set(slot, &socket, 0).map_err(|source| error(chain(&source)))?;
        }
    }
    Ok(())
}

/// Every counter, summed over CPUs.
pub(super) fn counters(ebpf: &Ebpf) -> Vec<(&'static str, u64)> {
    let Some(Ok(counters)) = ebpf.map("COUNTERS").map(PerCpuArray::<_, u64>::try_from) else {
        return Vec::new();
    };
    Reason::ALL
        .iter()
        .map(|reason| {
            let value = counters.get(&(*reason as u32), 0).map(|per_cpu| per_cpu.iter().sum()).unwrap_or(0);
            (reason.name(), value)
        })
        .collect()
}

/// Pins every map in a directory, each in one step in place of that of an earlier daemon: for later daemons, and for people
/// with bpftool.
pub(super) fn pin_maps(ebpf: &Ebpf, directory: &Path) -> Result<(), InterceptError> {
    let error = |path: &Path, reason: String| InterceptError::PinPath { path: path.to_owned(), reason };
    for (name, map) in ebpf.maps() {
        // The object's read-only data is a map too, whose name (.rodata) the BPF file system does not take.
        let path = directory.join(name.trim_start_matches('.'));
        let fresh = directory.join(format!("{}-new", name.trim_start_matches('.')));
        // What a daemon left that died just here.
        let _ = fs::remove_file(&fresh);
        map.pin(&fresh).map_err(|source| error(&fresh, chain(&source)))?;
        fs::rename(&fresh, &path).map_err(|source| error(&path, source.to_string()))?;
    }
    Ok(())
}

/// A map that no two daemons share.
const OWN: &str = "PODS";

/// The number of these maps, by which daemons know each other.
pub(super) fn number(ebpf: &Ebpf) -> Option<u32> {
    inherit::info(ebpf, OWN).map(|info| info.id())
}

/// The number of the maps that are pinned in a directory; `None`: none are, or that cannot be read.
pub(super) fn pinned_number(directory: &Path) -> Option<u32> {
    MapInfo::from_pin(directory.join(OWN)).ok().map(|info| info.id())
}

/// A map by its name, in the type that the caller asks for.
pub(super) fn map<'a, T>(ebpf: &'a mut Ebpf, name: &str) -> Result<T, InterceptError>
where
    T: TryFrom<&'a mut aya::maps::Map, Error = aya::maps::MapError>,
{
    let missing = || InterceptError::Load { name: name.to_owned(), reason: "not in the kernel object".to_owned() };
    let map = ebpf.map_mut(name).ok_or_else(missing)?;
    T::try_from(map).map_err(|error| InterceptError::load(name, &error))
}

/// Kernels before 5.11 count maps against this limit. Best effort: a load that then fails says so.
fn raise_memlock_limit() {
    use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
    if let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
        tracing::debug!(%error, "cannot raise the limit of locked memory");
    }
}
