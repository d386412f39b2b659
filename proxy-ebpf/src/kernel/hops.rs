//! The short cut: payload of hops that stay on the node moves from socket to socket, past TCP and IP.
//!
//! Two things the kernel does not do, and these programs therefore must: keep the order of bytes that take different
//! lanes (see `Lane`), and bound what waits in a receive queue (see `SHORTCUT_WINDOW`). Both follow from what the sender's
//! program reads of the receiver's socket.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_RTT_CB, BPF_SOCK_OPS_RTT_CB_FLAG, BPF_SOCK_OPS_STATE_CB,
    BPF_SOCK_OPS_STATE_CB_FLAG, bpf_sock, sk_action::SK_PASS,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_probe_read_kernel, bpf_sk_storage_delete, bpf_sk_storage_get};
use aya_ebpf::programs::{SkMsgContext, SockOpsContext};
use culvert_proxy_ebpf::{
    Acceleration, Address, Endpoint, Hop, INBOUND, Lane, NOTICED, OUTBOUND, Reason, SHORTCUT_WINDOW, Side, SocketKey,
    TCP, Watched, from_words, v4_mapped,
};

use crate::joins;
use crate::maps::{
    HOPS, RECEIVERS, SERVERS, SOCK_ADDRESSES, SOCKETS, count, count_by, exclusion, is_enrolled, level_of_pods,
    node_netns, pod_counters, sends_to_daemon, sock_layout, switch,
};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;
const TCP_CLOSE: u32 = 7;
const O_NONBLOCK: u32 = 0o4000;

/// Something happened to a socket of the node's cgroup.
#[inline(always)]
pub fn socket_event(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => register(ctx, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => register(ctx, false),
        BPF_SOCK_OPS_STATE_CB => state_changed(ctx),
        BPF_SOCK_OPS_RTT_CB => acknowledged(ctx),
        _ => {}
    }
}

/// Enters a socket that is an end of a same-node hop.
#[inline(always)]
fn register(ctx: &SockOpsContext, active: bool) {
    let Some((local, remote)) = addresses(ctx) else { return };
    if local == remote {
        return;
    }
    // SAFETY: the context that the kernel passed in; a context of this program type is accepted.
    let side = if unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } == node_netns() { Side::Node } else { Side::Pod };
    let local_port = ctx.local_port() as u16;
    let remote_port = u32::from_be(ctx.remote_port()) as u16;
    let on_a_hop = match (side, active) {
        // A pod's connection that was redirected into the daemon: seen from the pod, and from the daemon.
        (Side::Pod, true) => sends_to_daemon(&local) && exclusion(&remote, remote_port).is_none(),
        (Side::Node, false) => sends_to_daemon(&remote) && exclusion(&local, local_port).is_none(),
        // The daemon's connection to a pod of this node in the name of another: seen from the daemon, and from the pod.
        (Side::Node, true) | (Side::Pod, false) => is_enrolled(&local) && is_enrolled(&remote),
    };
    if !on_a_hop {
        return;
    }
    // A connection between two pods is the outbound listener's if the sender's policy is for it: see `redirect`.
    let client = if active { &local } else { &remote };
    let direction = if sends_to_daemon(client) { OUTBOUND } else { INBOUND };
    let level = switch(direction).min(level_of_pods(&local, &remote));
    if level == Acceleration::Off as u32 || (level == Acceleration::Automatic as u32 && switch(NOTICED) != 0) {
        count(Reason::ShortcutSocketsOff);
        return;
    }
    // What a pod gets comes by TCP unless it is said to read both: splice(2), FIONREAD and others look at TCP's queue only.
    let only_receives = matches!(side, Side::Node) && level < Acceleration::BothWays as u32;
    // SAFETY: fields of the context that the kernel passed in.
    let (first_sent, first_received, acknowledged, sock) = unsafe {
        let ops = &*ctx.ops;
        (ops.snd_nxt, ops.rcv_nxt, ops.bytes_acked, ops.__bindgen_anon_2.sk)
    };
    if sock.is_null() {
        return;
    }
    let own = SocketKey { local, remote, local_port, remote_port, side: side as u32, first_sent, first_received };
    let mut hop = Hop {
        own,
        peer: own.peer(),
        own_sock: sock as u64,
        peer_sock: 0,
        tcp_counted: 0,
        shortcut_sent: 0,
        target_sock: 0,
        target_peer_sock: 0,
        direction,
        // The SYN counts as a byte; one with payload (TCP Fast Open) hides where the stream begins.
        countable: (acknowledged <= 1) as u32,
        lane: if only_receives { Lane::TcpForGood } else { Lane::Unsettled } as u32,
        watched: Watched::No as u32,
    };
    // The end that opened a connection was registered before the end that accepted it.
    if matches!((side, active), (Side::Node, false)) && SOCK_ADDRESSES.get_ptr(&hop.peer).is_none() {
        hop.watched = Watched::ForBoth as u32;
    }
    // A connection that is not accepted yet has no program; its server's other ones tell.
    if matches!((side, active), (Side::Pod, false))
        && level < Acceleration::BothWays as u32
        && SERVERS.get_ptr(Endpoint::new(local, local_port, TCP)).is_none()
    {
        hop.watched = Watched::ForWaiting as u32;
    }
    let stored = hop_of(sock, Some(&mut hop));
    if stored.is_null() {
        count(Reason::SocketNotRegistered);
        return;
    }
    // SAFETY: not null: the socket's own storage. Read back from there because the verifier lets nobody compute with
    // the pointer to a socket, but with a number that a map holds.
    let address = unsafe { read_volatile(&raw const (*stored).own_sock) };
    if matches!((side, active), (Side::Pod, true)) && waits(address) != Ok(false) {
        count(Reason::ShortcutBlocking);
        forget_hop_of(sock);
        return;
    }
    let learns = if hop.watched == Watched::ForWaiting as u32 { BPF_SOCK_OPS_RTT_CB_FLAG } else { 0 };
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_STATE_CB_FLAG | learns) as i32);
    if hop.watched != Watched::No as u32 {
        return;
    }
    let entered = SOCK_ADDRESSES.insert(&hop.own, &hop.own_sock, 0).and_then(|()| {
        // SAFETY: the context that the kernel passed in, borrowed by nobody else during the call.
        let ops = unsafe { &mut *ctx.ops };
        let key = &mut hop.own;
        if only_receives { RECEIVERS.update(key, ops, 0) } else { SOCKETS.update(key, ops, 0) }
    });
    if entered.is_err() {
        count(Reason::SocketNotRegistered);
        let _ = SOCK_ADDRESSES.remove(&hop.own);
        return;
    }
    count(Reason::SocketRegistered);
}

/// What a server has sent was acknowledged: by then its program has made of its socket what it wants, and shows whether it
/// lets the kernel wait. (A function of its own: the stack of the program has no room for it.)
#[inline(never)]
fn acknowledged(ctx: &SockOpsContext) {
    // SAFETY: a field of the context that the kernel passed in.
    let sock = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sock.is_null() {
        return;
    }
    let hop = hop_of(sock, None);
    if hop.is_null() {
        return;
    }
    // SAFETY: not null: the socket's own storage, which lives as long as the socket.
    let hop = unsafe { &mut *hop };
    if hop.watched != Watched::ForWaiting as u32 || hop.lane == Lane::TcpForGood as u32 {
        return;
    }
    let Ok(waits) = waits(hop.own_sock) else { return };
    if !waits {
        // One that does not fit is asked again.
        let _ = SERVERS.insert(Endpoint::new(hop.own.local, hop.own.local_port, TCP), 1, 0);
    }
    // Once is enough. (The flag stays: another program may have set it too.)
    hop.lane = Lane::TcpForGood as u32;
}

/// Whether a program lets the kernel wait when it reads a socket; an error as long as no program has it.
///
/// A read that waits on a socket in a sockmap is given up with `EAGAIN` when anything wakes it up, be it no more than
/// the acknowledgement of a half close: programs that let the kernel wait do not expect that.
#[inline(always)]
pub fn waits(sock: u64) -> Result<bool, Reason> {
    let layout = sock_layout();
    let flags = pointer(sock, layout.socket)
        .and_then(|socket| pointer(socket, layout.file))
        .and_then(|file| field(file, layout.file_flags))?;
    Ok(flags & O_NONBLOCK == 0)
}

/// A registered socket changed its state: one that closes is forgotten. (The kernel itself takes it out of `SOCKETS` and
/// `HOPS`.)
#[inline(always)]
fn state_changed(ctx: &SockOpsContext) {
    // SAFETY: a field of the context that the kernel passed in.
    let sock = unsafe { (*ctx.ops).__bindgen_anon_2.sk };
    if sock.is_null() || ctx.arg(1) != TCP_CLOSE {
        return;
    }
    let hop = hop_of(sock, None);
    if hop.is_null() {
        return;
    }
    // SAFETY: not null: the socket's own storage, which lives as long as the socket; and fields of the context.
    let (hop, received, acknowledged) = unsafe { (&*hop, (*ctx.ops).bytes_received, (*ctx.ops).bytes_acked) };
    if hop.watched == Watched::ForBoth as u32 {
        count_by(Reason::ShortcutTcpBytes, received + acknowledged);
        return;
    }
    // Messages that `message` did not see: the kernel lets the verdict on one that it could not send at once stand for
    // the next one. SYN and FIN count as a byte each.
    count_by(Reason::ShortcutTcpBytes, acknowledged.saturating_sub(hop.tcp_counted + 2));
    let _ = SOCK_ADDRESSES.remove(hop.own);
}

/// A registered socket sends a message.
#[inline(always)]
pub fn message(ctx: &SkMsgContext) -> u32 {
    // SAFETY: a field of the context that the kernel passed in, never null in this program type.
    let hop = hop_of(unsafe { (*ctx.msg).__bindgen_anon_3.sk }, None);
    if hop.is_null() {
        return SK_PASS;
    }
    // SAFETY: not null: the socket's own storage, which lives as long as the socket. The socket is locked.
    let hop = unsafe { &mut *hop };
    let size = ctx.size();
    let level = switch(hop.direction);
    if level == Acceleration::Joined as u32 && hop.own.side == Side::Pod as u32 && joins::redirected(ctx, hop, size) {
        return SK_PASS;
    }
    if hop.lane == Lane::Unsettled as u32 && hop.own.side == Side::Pod as u32 && waits(hop.own_sock) != Ok(false) {
        // Another program than the one that was seen there. Of one that opened the connection nothing is known there.
        let _ = SERVERS.remove(&Endpoint::new(hop.own.local, hop.own.local_port, TCP));
    }
    if hop.lane != Lane::TcpForGood as u32 {
        match check(hop, size, level) {
            Ok(()) if redirected_to_peer(ctx, hop) => {
                if hop.lane == Lane::Tcp as u32 {
                    count(Reason::ShortcutResumed);
                }
                hop.lane = Lane::Shortcut as u32;
                hop.shortcut_sent += u64::from(size);
                count(Reason::ShortcutMessages);
                count_by(Reason::ShortcutBytes, u64::from(size));
                count_for_pod(hop, size);
                return SK_PASS;
            }
            Ok(()) => count(Reason::ShortcutPeerMissing),
            Err(reason) => count(reason),
        }
        let to_daemon = hop.peer.side == Side::Node as u32;
        hop.lane = if to_daemon { Lane::Tcp } else { Lane::TcpForGood } as u32;
    }
    hop.tcp_counted += u64::from(size);
    count(Reason::ShortcutTcpMessages);
    count_by(Reason::ShortcutTcpBytes, u64::from(size));
    SK_PASS
}

/// Puts a message into the peer's receive queue, if the peer is registered.
#[inline(always)]
fn redirected_to_peer(ctx: &SkMsgContext, hop: &Hop) -> bool {
    let ingress = u64::from(BPF_F_INGRESS);
    if hop.peer.side == Side::Node as u32 && RECEIVERS.redirect_msg(ctx, hop.peer, ingress) as u32 == SK_PASS {
        return true;
    }
    SOCKETS.redirect_msg(ctx, hop.peer, ingress) as u32 == SK_PASS
}

/// Counts what takes the short cut for the pod at one end of the hop.
#[inline(always)]
fn count_for_pod(hop: &Hop, size: u32) {
    if hop.own.side == Side::Pod as u32 {
        if let Some(counters) = pod_counters(&hop.own.local) {
            counters.bytes_sent += u64::from(size);
        }
    } else if let Some(counters) = pod_counters(&hop.own.remote) {
        counters.bytes_received += u64::from(size);
    }
}

/// Whether the next bytes keep their order, and the receiver its bounds, on the short cut; else why not.
#[inline(always)]
fn check(hop: &mut Hop, size: u32, level: u32) -> Result<(), Reason> {
    let least = if hop.own.side == Side::Pod as u32 { Acceleration::Automatic } else { Acceleration::BothWays };
    if level < least as u32 {
        return Err(Reason::ShortcutOff);
    }
    if hop.peer_sock == 0 {
        hop.peer_sock = sock_address(&hop.peer).ok_or(Reason::ShortcutPeerMissing)?;
    }
    let layout = sock_layout();
    // What is read of a peer that closed meanwhile may be anything: the redirect then finds no peer, and fails.
    if hop.lane == Lane::Shortcut as u32 {
        return if fits(hop.peer_sock, size)? { Ok(()) } else { Err(Reason::ShortcutReceiverBehind) };
    }
    let all_read = field(hop.peer_sock, layout.copied_seq)? == field(hop.own_sock, layout.write_seq)?;
    if all_read { Ok(()) } else { Err(Reason::ShortcutTcpUnread) }
}

/// Whether a receiver has room for a message. One larger than the window passes when nothing waits.
#[inline(always)]
pub fn fits(receiver: u64, size: u32) -> Result<bool, Reason> {
    let unread = field(receiver, sock_layout().rmem_alloc)?;
    Ok(unread == 0 || unread.saturating_add(size) <= SHORTCUT_WINDOW)
}

/// Where a registered socket is in the kernel's memory.
#[inline(always)]
pub fn sock_address(key: &SocketKey) -> Option<u64> {
    // SAFETY: a value of the map SOCK_ADDRESSES, which lives until the end of the program run.
    SOCK_ADDRESSES.get_ptr(key).map(|address| unsafe { *address })
}

/// Drops what is remembered of a socket.
#[inline(always)]
fn forget_hop_of(sock: *mut bpf_sock) {
    // SAFETY: a socket storage map and a socket from the context.
    let _ = unsafe { bpf_sk_storage_delete((&raw const HOPS).cast_mut().cast(), sock.cast()) };
}

/// A 32-bit field of a structure in the kernel's memory.
#[inline(always)]
pub fn field(structure: u64, offset: u32) -> Result<u32, Reason> {
    // SAFETY: the helper reads any address, or fails.
    unsafe { bpf_probe_read_kernel((structure + u64::from(offset)) as *const u32) }
        .map_err(|_| Reason::ShortcutPeerMissing)
}

/// A field of a structure in the kernel's memory that points to another structure.
#[inline(always)]
fn pointer(structure: u64, offset: u32) -> Result<u64, Reason> {
    // SAFETY: the helper reads any address, or fails.
    unsafe { bpf_probe_read_kernel((structure + u64::from(offset)) as *const u64) }
        .map_err(|_| Reason::ShortcutPeerMissing)
}

/// What is remembered of a socket; made from `initial` if that is given. Null if there is nothing, or no memory.
#[inline(always)]
fn hop_of(sock: *mut bpf_sock, initial: Option<&mut Hop>) -> *mut Hop {
    let (value, flags) = match initial {
        Some(hop) => (core::ptr::from_mut(hop), u64::from(BPF_SK_STORAGE_GET_F_CREATE)),
        None => (core::ptr::null_mut(), 0),
    };
    let map: *mut c_void = (&raw const HOPS).cast_mut().cast();
    // SAFETY: a socket storage map, a socket from the context, and a value of the map's type or null.
    unsafe { bpf_sk_storage_get(map, sock.cast(), value.cast(), flags).cast() }
}

/// The socket's own and its peer's address.
///
/// Every field is read, and read volatile, whatever the family: else the compiler computes the field's address first,
/// by family, and the verifier allows no computed offsets into a context.
#[inline(always)]
pub fn addresses(ctx: &SockOpsContext) -> Option<(Address, Address)> {
    let ops = ctx.ops;
    // SAFETY: fields of the context that the kernel passed in.
    let (local_v4, remote_v4, local_v6, remote_v6) = unsafe {
        (
            read_volatile(&raw const (*ops).local_ip4),
            read_volatile(&raw const (*ops).remote_ip4),
            [0, 1, 2, 3].map(|word| read_volatile(&raw const (*ops).local_ip6[word])),
            [0, 1, 2, 3].map(|word| read_volatile(&raw const (*ops).remote_ip6[word])),
        )
    };
    match ctx.family() {
        AF_INET => Some((v4_mapped(local_v4.to_ne_bytes()), v4_mapped(remote_v4.to_ne_bytes()))),
        AF_INET6 => Some((from_words(local_v6), from_words(remote_v6))),
        _ => None,
    }
}
