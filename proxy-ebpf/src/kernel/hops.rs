//! The short cut: payload of hops that stay on the node moves from socket to socket, past TCP and IP.
//!
//! Each registered socket settles, with its first byte, on one lane (see `Lane`): only so do bytes keep their order.

use core::ffi::c_void;
use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_SK_STORAGE_GET_F_CREATE, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, bpf_sock, sk_action::SK_PASS,
};
use aya_ebpf::helpers::{bpf_get_netns_cookie, bpf_sk_storage_get};
use aya_ebpf::programs::{SkMsgContext, SockOpsContext};
use culvert_proxy_ebpf::{Address, Hop, Lane, Reason, Side, SocketKey, v4_mapped};

use crate::maps::{HOPS, SOCKETS, count, count_by, exclusion, is_enrolled, node_netns};

const AF_INET: u32 = 2;
const AF_INET6: u32 = 10;

/// A socket of the node's cgroup was established, or is about to send a segment.
#[inline(always)]
pub fn socket_event(ctx: &SockOpsContext) {
    match ctx.op() {
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => register(ctx, true),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => register(ctx, false),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => before_segment(ctx),
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
        (Side::Pod, true) => is_enrolled(&local) && exclusion(&remote, remote_port).is_none(),
        (Side::Node, false) => is_enrolled(&remote) && exclusion(&local, local_port).is_none(),
        // The daemon's connection to a pod of this node in the name of another: seen from the daemon, and from the pod.
        (Side::Node, true) | (Side::Pod, false) => is_enrolled(&local) && is_enrolled(&remote),
    };
    if !on_a_hop {
        return;
    }
    // SAFETY: fields of the context that the kernel passed in.
    let (first_sent, first_received, sent, sock) = unsafe {
        let ops = &*ctx.ops;
        (ops.snd_nxt, ops.rcv_nxt, ops.data_segs_out, ops.__bindgen_anon_2.sk)
    };
    // Data went out with the SYN (TCP fast open): the order could not be kept.
    if sent != 0 || sock.is_null() {
        count(Reason::ShortcutSentEarly);
        return;
    }
    let key = SocketKey { local, remote, local_port, remote_port, side: side as u32, first_sent, first_received };
    let mut hop = Hop { peer: key.peer(), lane: Lane::Unsettled as u32 };
    if hop_of(sock, Some(&mut hop)).is_null() {
        count(Reason::SocketNotRegistered);
        return;
    }
    // SAFETY: the context that the kernel passed in, borrowed by nobody else during the call.
    if SOCKETS.update(key, unsafe { &mut *ctx.ops }, 0).is_err() {
        count(Reason::SocketNotRegistered);
        return;
    }
    count(Reason::SocketRegistered);
    // A thread that was already inside send(2) when the connection was established goes on by TCP, unseen by
    // `message`: watch the segments until the lane is settled.
    let _ = ctx.set_cb_flags((ctx.cb_flags() | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG) as i32);
}

/// A registered socket is about to send a segment: if it holds data before a lane was chosen, that lane is TCP.
#[inline(always)]
fn before_segment(ctx: &SockOpsContext) {
    // SAFETY: fields of the context that the kernel passed in.
    let (sock, length) = unsafe { ((*ctx.ops).__bindgen_anon_2.sk, (*ctx.ops).skb_len) };
    if sock.is_null() {
        return;
    }
    let hop = hop_of(sock, None);
    if hop.is_null() {
        return;
    }
    // SAFETY: not null: the socket's own storage, which lives as long as the socket. The socket is locked.
    unsafe {
        if (*hop).lane == Lane::Unsettled as u32 {
            if length == 0 {
                return;
            }
            (*hop).lane = Lane::Tcp as u32;
            count(Reason::ShortcutSentEarly);
        }
    }
    let _ = ctx.set_cb_flags((ctx.cb_flags() & !BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG) as i32);
}

/// A registered socket sends a message.
#[inline(always)]
pub fn message(ctx: &SkMsgContext) -> u32 {
    // SAFETY: a field of the context that the kernel passed in, never null in this program type.
    let hop = hop_of(unsafe { (*ctx.msg).__bindgen_anon_3.sk }, None);
    if hop.is_null() {
        return SK_PASS;
    }
    let size = u64::from(ctx.size());
    // SAFETY: not null: the socket's own storage, which lives as long as the socket. The socket is locked.
    unsafe {
        if (*hop).lane != Lane::Tcp as u32 {
            if SOCKETS.redirect_msg(ctx, (*hop).peer, u64::from(BPF_F_INGRESS)) as u32 == SK_PASS {
                (*hop).lane = Lane::Shortcut as u32;
                count(Reason::ShortcutMessages);
                count_by(Reason::ShortcutBytes, size);
                return SK_PASS;
            }
            let settled = (*hop).lane == Lane::Shortcut as u32;
            count(if settled { Reason::ShortcutPeerGone } else { Reason::ShortcutPeerMissing });
            (*hop).lane = Lane::Tcp as u32;
        }
    }
    count_by(Reason::ShortcutTcpBytes, size);
    SK_PASS
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
fn addresses(ctx: &SockOpsContext) -> Option<(Address, Address)> {
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
        AF_INET6 => Some((bytes(local_v6), bytes(remote_v6))),
        _ => None,
    }
}

#[inline(always)]
fn bytes(words: [u32; 4]) -> Address {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words.map(u32::to_ne_bytes);
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}
