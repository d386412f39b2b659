//! Host mode: connections of the node's own processes, redirected when they connect.
//!
//! The process connects to a worker's listener on the loopback interface instead. What it named is kept twice: with its
//! socket, for getpeername(); and, as soon as the socket has a port and before anything is sent, under the addresses by
//! which the daemon knows the connection when it accepts it.

use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_TCP_CONNECT_CB, bpf_sock};
use aya_ebpf::btf_maps::LruHashMap;
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_map_lookup_elem, bpf_sk_release};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
use culvert_proxy_ebpf::{
    Address, Detour, Endpoint, FlowKey, MAX_FLOWS, MAX_WORKERS, OUTBOUND, Reason, TCP, from_words, listener_slot,
    v4_mapped,
};

use crate::connect::{
    ALLOW, detour_of, forget_detour, is_daemon, is_v4, keep_detour, named, raw, refuse, rename, socket,
};
use crate::hops::addresses;
use crate::maps::{LISTENERS, count, exclusion, is_ending, node_netns, workers};

const TCP_SYN_SENT: u32 = 2;
const TCP_CLOSE: u32 = 7;
const AF_INET: u32 = 2;

/// Where redirected connections were going, until the daemon has accepted them. An entry whose connection the daemon
/// never accepts is in nobody's way: the oldest are forgotten when the map is full.
#[btf_map]
static FLOWS: LruHashMap<FlowKey, Endpoint, MAX_FLOWS> = LruHashMap::new();

/// 1: connections are refused while no worker listens. 0: they pass untouched. The daemon sets it at load time.
#[unsafe(no_mangle)]
static HOST_FAIL_CLOSED: u32 = 0;

/// A process connects.
#[inline(always)]
pub fn connect<const V6: bool>(ctx: &SockAddrContext) -> i32 {
    let Some(original) = named::<V6>(ctx) else { return ALLOW };
    if original.protocol != TCP || is_daemon() {
        return ALLOW;
    }
    // SAFETY: the context that the kernel passed in; a context of this program type is accepted.
    if unsafe { bpf_get_netns_cookie(raw(ctx)) } != node_netns() {
        count(Reason::HostPassedNamespace);
        return ALLOW;
    }
    let sock = socket(ctx);
    forget_detour(sock, &original);
    // What the kernel balances is led to its backend already, if the other program ran first.
    if detour_of(sock).is_some() {
        return ALLOW;
    }
    if stays_on_host(&original.address) || exclusion(&original.address, original.port).is_some() {
        count(Reason::HostPassedExcluded);
        return ALLOW;
    }
    if is_ending() {
        count(Reason::PassedEnding);
        return ALLOW;
    }
    let Some(actual) = worker(is_v4(&original.address)) else {
        // SAFETY: a static of this object; volatile because the loader changes it after compilation.
        if unsafe { read_volatile(&raw const HOST_FAIL_CLOSED) } != 0 {
            count(Reason::HostFailedClosed);
            return refuse();
        }
        count(Reason::HostFailedOpen);
        return ALLOW;
    };
    if !keep_detour(sock, &mut Detour { original, actual, to_worker: 1 }) {
        count(Reason::HostNoMemory);
        return refuse();
    }
    rename::<V6>(ctx, &actual);
    count(Reason::HostRedirected);
    ALLOW
}

/// Loopback, multicast, and the unspecified address, by which programs mean their own host.
#[inline(always)]
fn stays_on_host(address: &Address) -> bool {
    if is_v4(address) {
        return matches!(address[12], 0 | 127 | 224..);
    }
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    let (high, low) = (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes([i, j, k, l, m, n, o, p]));
    a == 0xff || (high == 0 && low <= 1)
}

/// The listener of a worker that takes this family.
#[inline(always)]
fn worker(v4: bool) -> Option<Endpoint> {
    let workers = workers();
    if workers == 0 {
        return None;
    }
    // SAFETY: takes nothing.
    let first = unsafe { bpf_get_prandom_u32() } % workers;
    for step in 0..MAX_WORKERS {
        if step >= workers {
            break;
        }
        let slot = listener_slot((first + step) % workers, !v4, OUTBOUND);
        // SAFETY: a map and a key on the stack; the result is a socket that is released below, or null.
        let sock = unsafe { bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const slot).cast()) };
        let sock: *mut bpf_sock = sock.cast();
        if !sock.is_null() {
            let listener = reachable(sock, v4);
            // SAFETY: not null: looked up above, and released once.
            unsafe { bpf_sk_release(sock.cast()) };
            return Some(listener);
        }
    }
    None
}

/// Where this host reaches a listener: its own address, or the loopback address if it is bound to all.
#[inline(always)]
fn reachable(sock: *const bpf_sock, v4: bool) -> Endpoint {
    const LOOPBACK: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    // SAFETY: fields of a socket that the caller holds; all read, and volatile, so that no offset into it is computed.
    let (family, v4_address, v6_address, port) = unsafe {
        (
            read_volatile(&raw const (*sock).family),
            read_volatile(&raw const (*sock).src_ip4),
            [
                read_volatile(&raw const (*sock).src_ip6[0]),
                read_volatile(&raw const (*sock).src_ip6[1]),
                read_volatile(&raw const (*sock).src_ip6[2]),
                read_volatile(&raw const (*sock).src_ip6[3]),
            ],
            read_volatile(&raw const (*sock).src_port),
        )
    };
    let address = if v4 {
        let bound = if family == AF_INET { v4_address } else { 0 };
        if bound == 0 { v4_mapped([127, 0, 0, 1]) } else { v4_mapped(bound.to_ne_bytes()) }
    } else if v6_address == [0; 4] {
        LOOPBACK
    } else {
        from_words(v6_address)
    };
    Endpoint::new(address, port as u16, TCP)
}

/// Something happens to a socket of a configured cgroup.
#[inline(always)]
pub fn socket_event(ctx: &SockOpsContext) {
    match ctx.op() {
        // It has a port now, and nothing was sent yet.
        BPF_SOCK_OPS_TCP_CONNECT_CB => {
            let Some(original) = redirected(ctx) else { return };
            let Some(key) = flow(ctx) else { return };
            if FLOWS.insert(key, original, 0).is_err() {
                count(Reason::HostFlowNotKept);
                return;
            }
            let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG) as i32);
        }
        // It could not connect, so that nobody accepts it.
        BPF_SOCK_OPS_STATE_CB if (ctx.arg(0), ctx.arg(1)) == (TCP_SYN_SENT, TCP_CLOSE) => {
            if redirected(ctx).is_some()
                && let Some(key) = flow(ctx)
            {
                let _ = FLOWS.remove(key);
            }
        }
        _ => {}
    }
}

/// Where the socket was going, if it was redirected.
#[inline(always)]
fn redirected(ctx: &SockOpsContext) -> Option<Endpoint> {
    // SAFETY: a field of the context that the kernel passed in.
    let sock = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    detour_of(sock).filter(|detour| detour.to_worker != 0).map(|detour| detour.original)
}

/// What the daemon knows the connection by.
#[inline(always)]
fn flow(ctx: &SockOpsContext) -> Option<FlowKey> {
    let (client, _) = addresses(ctx)?;
    let client = Endpoint::new(client, ctx.local_port() as u16, TCP);
    Some(FlowKey { client, listener_port: u32::from_be(ctx.remote_port()) })
}
