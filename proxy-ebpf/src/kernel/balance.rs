//! Services that the kernel balances: a process that connects to one, or sends to one, gets a backend at once, and its bytes
//! pass no proxy.

use core::ptr::read_volatile;

use aya_ebpf::btf_maps::{HashMap, LruHashMap, SkStorage};
use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_get_socket_cookie};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use culvert_proxy_ebpf::{
    Address, Connected, Detour, Endpoint, MAX_BACKENDS, MAX_CONNECTED, MAX_REPLIES, MAX_SERVICES, Reason, ReplyKey,
    Service, Slot, SlotKey, TCP, UDP,
};

use crate::connect::{
    ALLOW, forget_detour, is_daemon, keep, keep_detour, kept, named, process, raw, refuse, rename, socket, storage,
    thread,
};
use crate::maps::count;

/// Memory for an entry is taken when it is made, not for the whole map at once.
const NO_PREALLOC: usize = aya_ebpf::bindings::BPF_F_NO_PREALLOC as usize;

/// Balanced services.
#[btf_map]
static SERVICES: HashMap<Endpoint, Service, MAX_SERVICES, NO_PREALLOC> = HashMap::new();

/// The services' tables.
#[btf_map]
static SLOTS: HashMap<SlotKey, Slot, MAX_BACKENDS, NO_PREALLOC> = HashMap::new();

/// Every backend, with the number of the services that have it.
#[btf_map]
static BACKENDS: HashMap<Endpoint, u32, MAX_BACKENDS, NO_PREALLOC> = HashMap::new();

/// What sockets that are not connected were given last.
#[btf_map]
static CHOICES: SkStorage<Detour> = SkStorage::new();

/// Which service a socket sent to when this backend answers.
#[btf_map]
static REPLIES: LruHashMap<ReplyKey, Endpoint, MAX_REPLIES> = LruHashMap::new();

/// UDP sockets that are connected to a service, by their cookies.
#[btf_map]
static CONNECTED: HashMap<u64, Connected, MAX_CONNECTED, NO_PREALLOC> = HashMap::new();

/// What a destination comes to.
enum Choice {
    NoService,
    NoBackend,
    Backend(Endpoint),
}

/// Whether the address and TCP port are a backend's: connections there need no filter.
#[inline(always)]
pub fn is_backend(address: &Address, port: u16) -> bool {
    BACKENDS.get_ptr(Endpoint::new(*address, port, TCP)).is_some()
}

/// A process connects.
#[inline(always)]
pub fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(original) = named::<V6>(ctx) else { return ALLOW };
    if is_daemon() {
        return ALLOW;
    }
    let sock = socket(ctx);
    let actual = match choose(&original) {
        Choice::Backend(backend) => backend,
        Choice::NoBackend => return no_backend(),
        Choice::NoService => {
            forget_detour(sock, &original);
            return ALLOW;
        }
    };
    if !keep_detour(sock, &mut Detour { original, actual, to_worker: 0 }) {
        count(Reason::BalancedNoMemory);
        return refuse();
    }
    if original.protocol == UDP {
        // SAFETY: the context that the kernel passed in; a context of this program type is accepted.
        let cookie = unsafe { bpf_get_socket_cookie(raw(ctx)) };
        let connected = Connected { backend: actual, process: process(), thread: thread() };
        if CONNECTED.insert(cookie, connected, 0).is_err() {
            count(Reason::BalancedNotKept);
        }
        expect_replies(cookie, &actual, &original);
        count(Reason::BalancedSockets);
    } else {
        count(Reason::BalancedConnections);
    }
    rename::<V6>(ctx, &actual);
    ALLOW
}

/// A process sends a datagram by a socket that is not connected, or elsewhere than it is connected to.
#[inline(always)]
pub fn sendmsg<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(original) = named::<V6>(ctx) else { return ALLOW };
    if original.protocol != UDP || SERVICES.get_ptr(original).is_none() || is_daemon() {
        return ALLOW;
    }
    let sock = socket(ctx);
    // A socket stays with its backend, as long as the service has that.
    let last = kept(storage(&CHOICES), sock).filter(|choice| choice.original == original).map(|choice| choice.actual);
    let actual = match last {
        Some(backend) if BACKENDS.get_ptr(backend).is_some() => backend,
        _ => {
            let Choice::Backend(backend) = choose(&original) else { return no_backend() };
            if !keep(storage(&CHOICES), sock, &mut Detour { original, actual: backend, to_worker: 0 }) {
                count(Reason::BalancedNoMemory);
                return refuse();
            }
            if last.is_some() {
                count(Reason::BalancedMoved);
            }
            backend
        }
    };
    // SAFETY: as in `connect`.
    expect_replies(unsafe { bpf_get_socket_cookie(raw(ctx)) }, &actual, &original);
    rename::<V6>(ctx, &actual);
    count(Reason::BalancedDatagrams);
    ALLOW
}

/// A process receives a datagram, and asks from whom.
#[inline(always)]
pub fn recvmsg<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(from) = named::<V6>(ctx) else { return ALLOW };
    // SAFETY: as in `connect`.
    let cookie = unsafe { bpf_get_socket_cookie(raw(ctx)) };
    if let Some(service) = REPLIES.get_ptr(ReplyKey { cookie, from, unused: 0 }) {
        // SAFETY: a value of the map, copied at once.
        let service = unsafe { *service };
        rename::<V6>(ctx, &service);
        count(Reason::BalancedReplies);
    }
    ALLOW
}

/// A socket is closed.
#[inline(always)]
pub fn released(ctx: &SockContext) {
    // SAFETY: a field of the context that the kernel passed in.
    if unsafe { read_volatile(&raw const (*ctx.sock).protocol) } == u32::from(UDP) {
        // SAFETY: the context that the kernel passed in; a context of this program type is accepted.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
        let _ = CONNECTED.remove(cookie);
    }
}

#[inline(always)]
fn no_backend() -> i32 {
    count(Reason::BalancedNoBackend);
    refuse()
}

/// Answers of this backend are the service's.
#[inline(always)]
fn expect_replies(cookie: u64, backend: &Endpoint, service: &Endpoint) {
    let key = ReplyKey { cookie, from: *backend, unused: 0 };
    // A look is cheaper than a change, and keeps the entry from being forgotten as well.
    let known = REPLIES.get_ptr(key).is_some_and(|known| {
        // SAFETY: a value of the map, which lives until the end of the program run.
        unsafe { *known == *service }
    });
    if !known {
        // Never full: the oldest entry goes.
        let _ = REPLIES.insert(key, *service, 0);
    }
}

/// A backend of the service, by the shares of its backends.
#[inline(always)]
fn choose(service: &Endpoint) -> Choice {
    let Some(first) = SERVICES.get_ptr(service) else { return Choice::NoService };
    // SAFETY: a value of the map SERVICES, which lives until the end of the program run.
    if let Some(backend) = unsafe { pick(read_volatile(first)) } {
        return Choice::Backend(backend);
    }
    // Its table was replaced just now.
    let Some(second) = SERVICES.get_ptr(service) else { return Choice::NoService };
    // SAFETY: as above.
    match unsafe { pick(read_volatile(second)) } {
        Some(backend) => Choice::Backend(backend),
        None => Choice::NoBackend,
    }
}

#[inline(always)]
fn pick(service: Service) -> Option<Endpoint> {
    if service.slots == 0 {
        return None;
    }
    // SAFETY: takes nothing, both times.
    let (slot, number) = unsafe { (bpf_get_prandom_u32() % service.slots, bpf_get_prandom_u32()) };
    let slot = SLOTS.get_ptr(SlotKey { generation: service.generation, slot })?;
    // SAFETY: a value of the map SLOTS, which lives until the end of the program run.
    Some(unsafe { (*slot).pick(number) })
}
