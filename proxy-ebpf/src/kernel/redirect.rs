//! Steers packets into the daemon's sockets.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, BPF_SK_LOOKUP_F_REPLACE, TC_ACT_OK, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock, bpf_sock_tuple,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Ipv4Tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Ipv6Tuple,
    sk_action::SK_PASS,
};
use aya_ebpf::helpers::{
    bpf_get_hash_recalc, bpf_get_socket_uid, bpf_map_lookup_elem, bpf_sk_assign, bpf_sk_release, bpf_skb_change_type,
    bpf_skb_store_bytes, bpf_skc_lookup_tcp,
};
use aya_ebpf::programs::{SkLookupContext, TcContext};
use culvert_proxy_ebpf::{
    Address, INBOUND, LinkAddress, MAX_WORKERS, OUTBOUND, PodPolicy, Reason, from_words, listener_slot, v4_mapped,
};

use crate::balance::is_backend;
use crate::connect::detour_of;
use crate::maps::{
    FRAGMENTS, LISTENERS, PODS, bridge_port, count, directions, exclusion, inbound_exclusion, is_ending, is_enrolled,
    is_excluded_user, mark, pod_counters, sends_to_daemon, workers,
};
use crate::packet::{NotOurs, Segment, first_piece, parse, piece};
use crate::reset;

const TCP_TIME_WAIT: u32 = 6;
const TCP_LISTEN: u32 = 10;
const AF_INET6: u32 = 10;
const IPPROTO_TCP: u32 = 6;

/// Kinds of packets (linux/if_packet.h): to this host, and to another one.
const PACKET_HOST: u32 = 0;
const PACKET_OTHERHOST: u32 = 3;

/// Lets programs attached after this one, and then the stack, see the packet.
const UNTOUCHED: i32 = TC_ACT_UNSPEC;

/// A packet that a pod sends.
#[inline(always)]
pub fn outbound(ctx: &TcContext) -> i32 {
    let segment = match parse(ctx) {
        Ok(segment) => segment,
        Err(why) => return not_ours(ctx, why),
    };
    let source = sender(ctx, &segment);
    let target = PODS.get_ptr(segment.destination);
    // The daemon's sockets have a pod's address at one end: the source's if it accepted the connection from this pod, or
    // opened it to this pod in another's name; the destination's if it accepted a connection to that pod, or opened one
    // in that pod's name.
    if (source.is_some() || target.is_some()) && steer(ctx, &segment) {
        count_bytes(ctx, &segment, source.is_some(), target.is_some());
        return TC_ACT_OK;
    }
    // Only new connections are subject to policy. What is left besides belongs to connections that others opened to
    // this pod, or that are older than the daemon.
    if !segment.opens {
        return UNTOUCHED;
    }
    let mut why = Reason::PassedNotEnrolled;
    if let Some(policy) = source
        && directions(policy) & OUTBOUND != 0
    {
        let excluded = exclusion(&segment.destination, u16::from_be(segment.destination_port));
        match excluded.or_else(|| balanced_exclusion(ctx, &segment)).or_else(|| user_exclusion(ctx)) {
            None => return redirect(ctx, &segment, policy, OUTBOUND),
            Some(reason) => why = reason,
        }
    }
    // What the sender's policy leaves alone is subject to the receiver's.
    if let Some(policy) = target
        && directions(policy) & INBOUND != 0
    {
        match inbound_exclusion(&segment.source, u16::from_be(segment.destination_port)) {
            None => return redirect(ctx, &segment, policy, INBOUND),
            Some(reason) => why = reason,
        }
    }
    count(why);
    UNTOUCHED
}

/// A packet that comes from outside the node: to a pod, or a reply to a connection that the daemon opened in a pod's name.
#[inline(always)]
pub fn inbound(ctx: &TcContext) -> i32 {
    let segment = match parse(ctx) {
        Ok(segment) => segment,
        Err(why) => return not_ours(ctx, why),
    };
    let Some(policy) = PODS.get_ptr(segment.destination) else { return UNTOUCHED };
    if steer(ctx, &segment) {
        count_bytes(ctx, &segment, false, true);
        return TC_ACT_OK;
    }
    if !segment.opens || directions(policy) & INBOUND == 0 {
        return UNTOUCHED;
    }
    match inbound_exclusion(&segment.source, u16::from_be(segment.destination_port)) {
        None => redirect(ctx, &segment, policy, INBOUND),
        Some(reason) => {
            count(reason);
            UNTOUCHED
        }
    }
}

/// The policy of the pod that sent the packet. A pod is known by its address and, if that is known, its interface.
#[inline(always)]
fn sender(ctx: &TcContext, segment: &Segment) -> Option<*const PodPolicy> {
    let policy = PODS.get_ptr(segment.source)?;
    // SAFETY: a value of the map PODS, which lives until the end of the program run; and a field of the context.
    let (bound, interface) = unsafe { ((*policy).interface, (*ctx.skb.skb).ifindex) };
    if bound != 0 && bound != interface {
        if segment.opens {
            count(Reason::OtherInterface);
        }
        return None;
    }
    Some(policy)
}

/// Whether the kernel led the connection to a backend: it needs no filter. A program that names the backend itself goes by the pod's
/// policy. The packet still has its socket here; of one without it is not known, and what goes to a backend passes.
#[inline(always)]
fn balanced_exclusion(ctx: &TcContext, segment: &Segment) -> Option<Reason> {
    if !is_backend(&segment.destination, u16::from_be(segment.destination_port)) {
        return None;
    }
    // SAFETY: a field of the context that the kernel passed in.
    let sock = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    (sock.is_null() || detour_of(sock).is_some()).then_some(Reason::PassedBalanced)
}

/// Whether the program that opens the connection belongs to an excluded user: the packet still has its socket here.
#[inline(always)]
fn user_exclusion(ctx: &TcContext) -> Option<Reason> {
    // SAFETY: the context that the kernel passed in.
    let uid = unsafe { bpf_get_socket_uid(ctx.skb.skb) };
    is_excluded_user(uid).then_some(Reason::PassedExcludedUid)
}

/// Gives a packet that opens a connection to a worker; without any, does what the pod's policy says.
#[inline(always)]
fn redirect(ctx: &TcContext, segment: &Segment, policy: *const PodPolicy, direction: u32) -> i32 {
    if is_ending() {
        count(Reason::PassedEnding);
        return UNTOUCHED;
    }
    let outbound = direction == OUTBOUND;
    if offer_to_worker(ctx, segment.is_ipv6, direction) {
        count(if outbound { Reason::Redirected } else { Reason::RedirectedInbound });
        count_connection(segment, outbound);
        return TC_ACT_OK;
    }
    // SAFETY: a value of the map PODS, which lives until the end of the program run.
    if unsafe { (*policy).fail_closed } == 0 {
        count(Reason::FailedOpen);
        return UNTOUCHED;
    }
    count(Reason::FailedClosed);
    if let Some(action) = reset::answer(ctx, segment) {
        return action;
    }
    count(Reason::ResetFailed);
    TC_ACT_SHOT
}

#[inline(always)]
fn count_connection(segment: &Segment, outbound: bool) {
    if let Some(counters) = pod_counters(if outbound { &segment.source } else { &segment.destination }) {
        if outbound {
            counters.outbound_connections += 1;
        } else {
            counters.inbound_connections += 1;
        }
    }
}

#[inline(always)]
fn count_bytes(ctx: &TcContext, segment: &Segment, sent: bool, received: bool) {
    count_bytes_between(ctx, sent.then_some(&segment.source), received.then_some(&segment.destination));
}

#[inline(always)]
fn count_bytes_between(ctx: &TcContext, sender: Option<&Address>, receiver: Option<&Address>) {
    let bytes = u64::from(ctx.len());
    if let Some(counters) = sender.and_then(pod_counters) {
        counters.bytes_sent += bytes;
    }
    if let Some(counters) = receiver.and_then(pod_counters) {
        counters.bytes_received += bytes;
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
    if protocol != IPPROTO_TCP || workers == 0 {
        return SK_PASS;
    }
    let port = local_port as u16;
    let direction = if sends_to_daemon(&source) && exclusion(&destination, port).is_none() {
        OUTBOUND
    } else if PODS.get_ptr(destination).is_some_and(|policy| directions(policy) & INBOUND != 0)
        && inbound_exclusion(&source, port).is_none()
    {
        INBOUND
    } else {
        return SK_PASS;
    };
    let first = u32::from(remote_port) % workers;
    for step in 0..MAX_WORKERS {
        if step >= workers {
            break;
        }
        let slot = listener_slot((first + step) % workers, is_ipv6, direction);
        // In the place of what an earlier daemon's program has chosen, which runs before this one.
        if LISTENERS.redirect_sk_lookup(ctx, slot, BPF_SK_LOOKUP_F_REPLACE.into()).is_ok() {
            break;
        }
    }
    SK_PASS
}

#[inline(always)]
fn not_ours(ctx: &TcContext, why: NotOurs) -> i32 {
    match why {
        NotOurs::Other => UNTOUCHED,
        NotOurs::Counted(reason) => {
            count(reason);
            UNTOUCHED
        }
        NotOurs::Fragment => fragment(ctx),
        NotOurs::Icmp(answer) => icmp(ctx, &answer),
    }
}

/// A piece of a packet. This host puts together what belongs to one of the daemon's connections: the first piece tells, which has
/// the ports, and the others are known by it. (One that comes before the first passes, and the packet is sent again.)
#[inline(always)]
fn fragment(ctx: &TcContext) -> i32 {
    let Some((source, destination)) = ends_of_our_piece(ctx).filter(|_| lead_up(ctx)) else {
        count(Reason::PassedFragment);
        return UNTOUCHED;
    };
    count(Reason::Steered);
    count_bytes_between(ctx, Some(&source), Some(&destination));
    ctx.set_mark(mark());
    TC_ACT_OK
}

/// The addresses of a piece that belongs to one of the daemon's connections.
#[inline(always)]
fn ends_of_our_piece(ctx: &TcContext) -> Option<(Address, Address)> {
    let (key, is_first) = piece(ctx)?;
    let ends = (v4_mapped(key.source), v4_mapped(key.destination));
    if !is_enrolled(&ends.0) && !is_enrolled(&ends.1) {
        return None;
    }
    if !is_first {
        return FRAGMENTS.get_ptr(key).map(|_| ends);
    }
    if first_piece(ctx).is_some_and(|segment| is_open(ctx, &segment)) {
        let _ = FRAGMENTS.insert(key, 1, 0);
        Some(ends)
    } else {
        // The number is used again.
        let _ = FRAGMENTS.remove(key);
        None
    }
}

/// Whether this host has a socket, which does not listen, with the packet's addresses and ports.
#[inline(always)]
fn is_open(ctx: &TcContext, segment: &Segment) -> bool {
    let sock = find(ctx, segment);
    if sock.is_null() {
        return false;
    }
    // SAFETY: not null, held until it is released, and released once.
    let state = unsafe {
        let state = (*sock).state;
        bpf_sk_release(sock.cast());
        state
    };
    state != TCP_LISTEN
}

/// An ICMP error, such as that a packet was too big, goes to the address that sent the packet: a pod's, if it is about
/// one of the daemon's connections. The pod knows nothing of that, and the daemon would never hear of it.
#[inline(always)]
fn icmp(ctx: &TcContext, answer: &Segment) -> i32 {
    if !is_enrolled(&answer.source) && !is_enrolled(&answer.destination) {
        return UNTOUCHED;
    }
    if !is_open(ctx, answer) || !lead_up(ctx) {
        return UNTOUCHED;
    }
    count(Reason::IcmpSteered);
    ctx.set_mark(mark());
    TC_ACT_OK
}

/// Has the bridge, if the packet came over a port of one, give it to this host: it would switch what is for a neighbour's link-layer
/// address to the neighbour's port, and the mark and the socket would be for nothing. Whether that is done, or need not be.
#[inline(always)]
fn lead_up(ctx: &TcContext) -> bool {
    // SAFETY: fields of the context that the kernel passed in.
    let (kind, interface) = unsafe { ((*ctx.skb.skb).pkt_type, (*ctx.skb.skb).ifindex) };
    if kind != PACKET_OTHERHOST {
        return true;
    }
    let Some(own) = bridge_port(interface) else { return true };
    // SAFETY: the context that the kernel passed in, and a value of the map, of that size, which lives until the end of the program
    // run. Only ports of bridges are in the map: their packets begin with the Ethernet address that they are sent to.
    unsafe {
        bpf_skb_store_bytes(ctx.skb.skb, 0, own.cast(), size_of::<LinkAddress>() as u32, 0) == 0
            && bpf_skb_change_type(ctx.skb.skb, PACKET_HOST) == 0
    }
}

/// The socket of this host that has the packet's addresses and ports; if there is none, a listener that would take it.
/// What is not null must be released.
#[inline(always)]
fn find(ctx: &TcContext, segment: &Segment) -> *mut bpf_sock {
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
    unsafe { bpf_skc_lookup_tcp(ctx.as_ptr(), &raw mut tuple, length as u32, BPF_F_CURRENT_NETNS as u64, 0) }
}

/// Gives the packet to the socket of this host that has its addresses and ports, if there is one.
#[inline(always)]
fn steer(ctx: &TcContext, segment: &Segment) -> bool {
    let sock = find(ctx, segment);
    if sock.is_null() {
        return false;
    }
    // SAFETY: not null, and held until it is released.
    let state = unsafe { (*sock).state };
    if segment.opens && state == TCP_TIME_WAIT {
        // Goes to its predecessor all the same: see `reopen`. Without listeners that one's answer has the client reset it, and
        // try again a second later; if the packet passed, the node would find the predecessor and forward nothing to anybody.
        count(Reason::Reopened);
        count_connection(segment, sends_to_daemon(&segment.source));
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
fn offer_to_worker(ctx: &TcContext, is_ipv6: bool, direction: u32) -> bool {
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
        let slot = listener_slot((first + step) % workers, is_ipv6, direction);
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
    // First: a packet that has its socket, and passes all the same, would be forwarded to nobody.
    let led = lead_up(ctx);
    // SAFETY: the caller looked the socket up and holds it; it is released once, here.
    let result = unsafe {
        let result = if led { bpf_sk_assign(ctx.as_ptr(), sock.cast(), 0) } else { -1 };
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
