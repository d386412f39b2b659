//! Steers packets into the daemon's sockets.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock, bpf_sock_tuple,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Ipv4Tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Ipv6Tuple,
    sk_action::SK_PASS,
};
use aya_ebpf::helpers::{bpf_get_hash_recalc, bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release, bpf_skc_lookup_tcp};
use aya_ebpf::programs::{SkLookupContext, TcContext};
use culvert_proxy_ebpf::{Address, MAX_WORKERS, Reason, from_words, listener_slot, v4_mapped};

use crate::maps::{LISTENERS, PODS, count, exclusion, is_enrolled, mark, workers};
use crate::packet::{NotOurs, Segment, parse};

const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;

/// Lets programs attached after this one, and then the stack, see the packet.
const UNTOUCHED: i32 = TC_ACT_UNSPEC;

/// A packet that a pod sends.
#[inline(always)]
pub fn outbound(ctx: &TcContext) -> i32 {
    let segment = match parse(ctx) {
        Ok(segment) => segment,
        Err(why) => return not_ours(why),
    };
    let policy = PODS.get_ptr(segment.source);
    // The daemon's sockets have a pod's address at one end: the source's if it accepted the connection from this pod,
    // the destination's if it opened it to this pod in another pod's name.
    if (policy.is_some() || is_enrolled(&segment.destination)) && steer(ctx, &segment) {
        return TC_ACT_OK;
    }
    // Only new connections are subject to policy. What is left besides belongs to connections that others opened to
    // this pod, or that are older than the daemon.
    if !segment.opens {
        return UNTOUCHED;
    }
    let Some(policy) = policy else {
        count(Reason::PassedNotEnrolled);
        return UNTOUCHED;
    };
    if let Some(reason) = exclusion(&segment.destination, u16::from_be(segment.destination_port)) {
        count(reason);
        return UNTOUCHED;
    }
    if offer_to_worker(ctx, segment.is_ipv6) {
        count(Reason::Redirected);
        return TC_ACT_OK;
    }
    // SAFETY: a value of the map PODS, which lives until the end of the program run.
    if unsafe { (*policy).fail_closed } != 0 {
        count(Reason::FailedClosed);
        TC_ACT_SHOT
    } else {
        count(Reason::FailedOpen);
        UNTOUCHED
    }
}

/// A packet that comes from outside the node: replies to connections that the daemon opened in a pod's name.
#[inline(always)]
pub fn inbound(ctx: &TcContext) -> i32 {
    match parse(ctx) {
        Ok(segment) if is_enrolled(&segment.destination) && steer(ctx, &segment) => TC_ACT_OK,
        Ok(_) => UNTOUCHED,
        Err(why) => not_ours(why),
    }
}

/// The stack looks for a listener itself. It does so for a packet that opens a connection whose predecessor, with the
/// same addresses and ports, the daemon closed a short time ago: the kernel forgets the predecessor when, and only when,
/// it finds a listener for the successor. No listener has the destination's address and port: a worker's stands in.
#[inline(always)]
pub fn reopen(ctx: &SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: fields of the context that the kernel passed in. Volatile, and all read, so that no offset into it is
    // computed, which the verifier refuses.
    let (family, protocol, remote_v4, local_v4, remote_v6, local_v6, remote_port, local_port) = unsafe {
        (
            read_volatile(&raw const (*lookup).family),
            read_volatile(&raw const (*lookup).protocol),
            read_volatile(&raw const (*lookup).remote_ip4),
            read_volatile(&raw const (*lookup).local_ip4),
            [0, 1, 2, 3].map(|word| read_volatile(&raw const (*lookup).remote_ip6[word])),
            [0, 1, 2, 3].map(|word| read_volatile(&raw const (*lookup).local_ip6[word])),
            read_volatile(&raw const (*lookup).remote_port),
            read_volatile(&raw const (*lookup).local_port),
        )
    };
    let is_ipv6 = family == AF_INET6;
    let (source, destination) = if is_ipv6 {
        (from_words(remote_v6), from_words(local_v6))
    } else {
        (v4_mapped(remote_v4.to_ne_bytes()), v4_mapped(local_v4.to_ne_bytes()))
    };
    let workers = workers();
    if protocol != IPPROTO_TCP
        || workers == 0
        || !is_enrolled(&source)
        || exclusion(&destination, local_port as u16).is_some()
    {
        return SK_PASS;
    }
    let first = u32::from(remote_port) % workers;
    for step in 0..MAX_WORKERS {
        if step >= workers {
            break;
        }
        let slot = listener_slot((first + step) % workers, is_ipv6);
        if LISTENERS.redirect_sk_lookup(ctx, slot, 0).is_ok() {
            break;
        }
    }
    SK_PASS
}

#[inline(always)]
fn not_ours(why: NotOurs) -> i32 {
    if let NotOurs::Counted(reason) = why {
        count(reason);
    }
    UNTOUCHED
}

/// Gives the packet to the socket of this host that has its addresses and ports, if there is one.
#[inline(always)]
fn steer(ctx: &TcContext, segment: &Segment) -> bool {
    // SAFETY: plain integers, for which zero is a value.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let (sport, dport) = (segment.source_port, segment.destination_port);
    let length = if segment.is_ipv6 {
        tuple.__bindgen_anon_1.ipv6 =
            Ipv6Tuple { saddr: words(&segment.source), daddr: words(&segment.destination), sport, dport };
        size_of::<Ipv6Tuple>()
    } else {
        tuple.__bindgen_anon_1.ipv4 =
            Ipv4Tuple { saddr: words(&segment.source)[3], daddr: words(&segment.destination)[3], sport, dport };
        size_of::<Ipv4Tuple>()
    };
    // SAFETY: `tuple` is initialised for `length` bytes.
    let sock =
        unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, length as u32, BPF_F_CURRENT_NETNS as u64, 0) };
    if sock.is_null() {
        return false;
    }
    // SAFETY: not null, and held until it is released.
    let state = unsafe { (*sock).state };
    if segment.opens && state == TCP_TIME_WAIT {
        // Goes to its predecessor all the same: see `reopen`.
        count(Reason::Reopened);
    }
    // A listener is found by its port alone: policy decides about new connections.
    if state == TCP_LISTEN {
        // SAFETY: found above, released once.
        unsafe { bpf_sk_release(sock.cast()) };
        return false;
    }
    let assigned = assign_and_release(ctx, sock);
    if assigned {
        count(Reason::Steered);
    }
    assigned
}

/// Gives the packet, which opens a connection, to the listener of a worker chosen by the packet's hash, or of the next
/// one that listens.
#[inline(always)]
fn offer_to_worker(ctx: &TcContext, is_ipv6: bool) -> bool {
    let workers = workers();
    if workers == 0 {
        return false;
    }
    // SAFETY: the context that the kernel passed in.
    let first = unsafe { bpf_get_hash_recalc(ctx.skb.skb) } % workers;
    for step in 0..MAX_WORKERS {
        if step >= workers {
            break;
        }
        let slot = listener_slot((first + step) % workers, is_ipv6);
        // SAFETY: a map and a key on the stack; the result is a socket that is released below, or null.
        let sock = unsafe { bpf_map_lookup_elem((&raw const LISTENERS).cast_mut().cast(), (&raw const slot).cast()) };
        if !sock.is_null() && assign_and_release(ctx, sock.cast()) {
            return true;
        }
        if step == 0 {
            count(Reason::ListenerMissing);
        }
    }
    false
}

/// Gives the packet to a socket, and marks it so that routing delivers it to this host.
#[inline(always)]
fn assign_and_release(ctx: &TcContext, sock: *mut bpf_sock) -> bool {
    // SAFETY: the caller looked the socket up and holds it; it is released once, here.
    let result = unsafe {
        let result = bpf_sk_assign(ctx.as_ptr(), sock.cast(), 0);
        bpf_sk_release(sock.cast());
        result
    };
    if result != 0 {
        count(Reason::AssignFailed);
        return false;
    }
    ctx.set_mark(mark());
    true
}

/// An address as the kernel's structures hold it: four words in network byte order.
#[inline(always)]
fn words(address: &Address) -> [u32; 4] {
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *address;
    [
        u32::from_ne_bytes([a, b, c, d]),
        u32::from_ne_bytes([e, f, g, h]),
        u32::from_ne_bytes([i, j, k, l]),
        u32::from_ne_bytes([m, n, o, p]),
    ]
}
