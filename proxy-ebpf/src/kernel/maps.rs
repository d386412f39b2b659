//! The maps, the constants that the daemon sets at load time, and the counters.

use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{
    Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, SkStorage, SockHash, SockMap,
};
use aya_ebpf::macros::btf_map;
use culvert_proxy_ebpf::{
    Acceleration, Address, ENDING, Endpoint, FragmentKey, Hop, Join, JoinedCounters, LISTENER_SLOTS, LinkAddress,
    MAX_BRIDGE_PORTS, MAX_EXCLUDED_PORTS, MAX_EXCLUDED_RANGES, MAX_EXCLUDED_UIDS, MAX_FRAGMENTED, MAX_LOCAL_ADDRESSES,
    MAX_PODS, MAX_SERVERS, MAX_SHORTCUT_SOCKETS, OUTBOUND, PodCounters, PodPolicy, Reason, SWITCHES as SWITCH_SLOTS,
    SockLayout, SocketKey,
};

/// Enrolled pods.
#[btf_map]
pub static PODS: HashMap<Address, PodPolicy, MAX_PODS> = HashMap::new();

/// What each enrolled pod had to do with the daemon; the daemon makes the entries.
#[btf_map]
static POD_COUNTERS: PerCpuHashMap<Address, PodCounters, MAX_PODS, NO_PREALLOC> = PerCpuHashMap::new();

/// Destination ports (host byte order) that are never redirected.
#[btf_map]
static EXCLUDED_PORTS: HashMap<u16, u8, MAX_EXCLUDED_PORTS, NO_PREALLOC> = HashMap::new();

/// Destination ranges that are never redirected.
#[btf_map]
static EXCLUDED_RANGES: LpmTrie<Address, u8, MAX_EXCLUDED_RANGES> = LpmTrie::new();

/// Ports of pods (host byte order) to which connections are never redirected.
#[btf_map]
static INBOUND_EXCLUDED_PORTS: HashMap<u16, u8, MAX_EXCLUDED_PORTS, NO_PREALLOC> = HashMap::new();

/// Source ranges whose connections to pods are never redirected.
#[btf_map]
static INBOUND_EXCLUDED_RANGES: LpmTrie<Address, u8, MAX_EXCLUDED_RANGES> = LpmTrie::new();

/// Users, as the node numbers them, whose connections are never redirected.
#[btf_map]
static EXCLUDED_UIDS: HashMap<u32, u8, MAX_EXCLUDED_UIDS, NO_PREALLOC> = HashMap::new();

/// Ports of bridges that have the programs: their own link-layer addresses, by their indexes.
#[btf_map]
static BRIDGE_PORTS: HashMap<u32, LinkAddress, MAX_BRIDGE_PORTS, NO_PREALLOC> = HashMap::new();

/// The node's own addresses.
#[btf_map]
static LOCAL_ADDRESSES: HashMap<Address, u8, MAX_LOCAL_ADDRESSES> = HashMap::new();

/// Workers' listening sockets by `listener_slot`. The kernel empties a slot when its socket closes, so that a dead
/// daemon leaves no slot filled.
#[btf_map]
pub static LISTENERS: SockMap<LISTENER_SLOTS> = SockMap::new();

/// Packets whose first piece was of one of the daemon's connections: the others are too. The least used go when it is full.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, u8, MAX_FRAGMENTED> = LruHashMap::new();

/// Sockets whose messages may take the short cut: `shortcut` is asked for each.
#[btf_map]
pub static SOCKETS: SockHash<SocketKey, MAX_SHORTCUT_SOCKETS> = SockHash::new();

/// Sockets of the daemon that only receive by the short cut: no program is asked when they send.
#[btf_map]
pub static RECEIVERS: SockHash<SocketKey, MAX_SHORTCUT_SOCKETS> = SockHash::new();

/// What is remembered of each socket in `SOCKETS`.
#[btf_map]
pub static HOPS: SkStorage<Hop> = SkStorage::new();

/// Where each registered socket is in the kernel's memory, by its key.
#[btf_map]
pub static SOCK_ADDRESSES: HashMap<SocketKey, u64, MAX_SHORTCUT_SOCKETS, NO_PREALLOC> = HashMap::new();

/// Servers in pods whose programs do not let the kernel wait, as their accepted connections show.
#[btf_map]
pub static SERVERS: LruHashMap<Endpoint, u8, MAX_SERVERS> = LruHashMap::new();

/// How far payload of connections may go past TCP, by the direction of their listener; changed at run time.
#[btf_map]
static SWITCHES: Array<u32, SWITCH_SLOTS> = Array::new();

/// Directions of joined connections, by their sender.
#[btf_map]
pub static JOINS: HashMap<SocketKey, Join, MAX_SHORTCUT_SOCKETS, NO_PREALLOC> = HashMap::new();

/// What went past the daemon, by the sender; the daemon makes and removes the entries.
#[btf_map]
pub static JOINED: HashMap<SocketKey, JoinedCounters, MAX_SHORTCUT_SOCKETS, NO_PREALLOC> = HashMap::new();

/// One slot a [`Reason`].
#[btf_map]
static COUNTERS: PerCpuArray<u64, { Reason::SLOTS }> = PerCpuArray::new();

/// Memory for an entry is taken when it is made, not for the whole map at once.
const NO_PREALLOC: usize = aya_ebpf::bindings::BPF_F_NO_PREALLOC as usize;

/// Constants of this load; the daemon writes them into the object's read-only data.
#[unsafe(no_mangle)]
static MARK: u32 = 0;
#[unsafe(no_mangle)]
static WORKERS: u32 = 0;
#[unsafe(no_mangle)]
static NODE_NETNS: u64 = 0;
#[unsafe(no_mangle)]
static SOCK_LAYOUT: SockLayout =
    SockLayout { rmem_alloc: 0, copied_seq: 0, write_seq: 0, socket: 0, file: 0, file_flags: 0, state: 0 };

/// The packet mark that the routing rule delivers to this host.
#[inline(always)]
pub fn mark() -> u32 {
    // SAFETY: a static of this object; volatile because the loader changes it after compilation.
    unsafe { core::ptr::read_volatile(&raw const MARK) }
}

/// How many workers the daemon has.
#[inline(always)]
pub fn workers() -> u32 {
    // SAFETY: as in `mark`.
    unsafe { core::ptr::read_volatile(&raw const WORKERS) }
}

/// The cookie of the node's network namespace.
#[inline(always)]
pub fn node_netns() -> u64 {
    // SAFETY: as in `mark`.
    unsafe { core::ptr::read_volatile(&raw const NODE_NETNS) }
}

/// Where fields are in the running kernel's sockets.
#[inline(always)]
pub fn sock_layout() -> SockLayout {
    // SAFETY: as in `mark`.
    unsafe { core::ptr::read_volatile(&raw const SOCK_LAYOUT) }
}

/// Adds to a counter of this CPU.
#[inline(always)]
pub fn count_by(reason: Reason, amount: u64) {
    add(reason as u32, amount);
}

/// Adds one to the counter of a [`Reason`]'s number.
#[inline(always)]
pub fn count_number(number: u32) {
    add(number, 1);
}

#[inline(always)]
fn add(number: u32, amount: u64) {
    if let Some(counter) = COUNTERS.get_ptr_mut(number) {
        // SAFETY: this CPU's slot of a map that outlives the program run. Not atomic: a program interrupted between the
        // read and the write may lose a count, which statistics can bear and packets should not pay for.
        unsafe { *counter += amount }
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(reason: Reason) {
    count_by(reason, 1);
}

/// Whether a pod has this address.
#[inline(always)]
pub fn is_enrolled(address: &Address) -> bool {
    PODS.get_ptr(address).is_some()
}

/// Whether the connections that a pod with this address opens are redirected.
#[inline(always)]
pub fn sends_to_daemon(address: &Address) -> bool {
    PODS.get_ptr(address).is_some_and(|policy| directions(policy) & OUTBOUND != 0)
}

/// How far payload of a listener's connections may go past TCP now.
#[inline(always)]
pub fn switch(direction: u32) -> u32 {
    // SAFETY: a value of the map SWITCHES, which lives until the end of the program run; volatile because the daemon may
    // write it meanwhile.
    SWITCHES.get_ptr(direction).map_or(Acceleration::Off as u32, |level| unsafe { core::ptr::read_volatile(level) })
}

/// Whether the daemon is about to end, so that new connections are not for it any more.
#[inline(always)]
pub fn is_ending() -> bool {
    switch(ENDING) != 0
}

/// How far payload of the pods with these addresses may go past TCP; an address that is not enrolled sets no limit.
#[inline(always)]
pub fn level_of_pods(one: &Address, other: &Address) -> u32 {
    let level = |address: &Address| {
        // SAFETY: a value of the map PODS, which lives until the end of the program run.
        PODS.get_ptr(address).map_or(Acceleration::Joined as u32, |policy| unsafe { (*policy).acceleration })
    };
    level(one).min(level(other))
}

/// Which of a pod's connections are redirected.
#[inline(always)]
pub fn directions(policy: *const PodPolicy) -> u32 {
    // SAFETY: a value of the map PODS, which lives until the end of the program run.
    unsafe { (*policy).directions }
}

/// The link-layer address of the port of a bridge; `None`: the interface is not one.
#[inline(always)]
pub fn bridge_port(interface: u32) -> Option<*const LinkAddress> {
    BRIDGE_PORTS.get_ptr(interface)
}

/// A pod's counters on this CPU.
#[inline(always)]
pub fn pod_counters(address: &Address) -> Option<&'static mut PodCounters> {
    // SAFETY: this CPU's value of a map that outlives the program run. Not atomic: see `count_by`.
    POD_COUNTERS.get_ptr_mut(address).map(|counters| unsafe { &mut *counters })
}

/// Whether a user's connections are left alone.
#[inline(always)]
pub fn is_excluded_user(uid: u32) -> bool {
    EXCLUDED_UIDS.get_ptr(uid).is_some()
}

/// Why a connection from this source to this port of an enrolled pod is not redirected, if it is not.
#[inline(always)]
pub fn inbound_exclusion(source: &Address, port: u16) -> Option<Reason> {
    if INBOUND_EXCLUDED_PORTS.get_ptr(port).is_some() {
        return Some(Reason::PassedExcludedPort);
    }
    if LOCAL_ADDRESSES.get_ptr(source).is_some() {
        return Some(Reason::PassedLocal);
    }
    if INBOUND_EXCLUDED_RANGES.get(&Key::new(128, *source)).is_some() {
        return Some(Reason::PassedExcludedRange);
    }
    None
}

/// Why an enrolled pod's connection to this destination is not redirected, if it is not.
#[inline(always)]
pub fn exclusion(destination: &Address, port: u16) -> Option<Reason> {
    if EXCLUDED_PORTS.get_ptr(port).is_some() {
        return Some(Reason::PassedExcludedPort);
    }
    if LOCAL_ADDRESSES.get_ptr(destination).is_some() {
        return Some(Reason::PassedLocal);
    }
    if EXCLUDED_RANGES.get(&Key::new(128, *destination)).is_some() {
        return Some(Reason::PassedExcludedRange);
    }
    None
}
