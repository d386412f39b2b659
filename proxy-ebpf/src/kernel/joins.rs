//! Joined connections: payload of one pod goes straight into the receive queue of the other, past the daemon, which has
//! nothing left to look at.
//!
//! ```text
//! sender --- hop ---> daemon --- hop ---> receiver        its own way, by the short cut or by TCP
//!    `------------------------------------^               past the daemon
//! ```
//!
//! The daemon tells, in `JOINS`, how many of the sender's bytes it has forwarded. The sender's program knows how many it has
//! sent. Where these are equal, nothing of the sender's is under way to the daemon or inside it, and since the
//! sender's socket is locked, nothing can follow. If then the receiver has read all that the daemon sent it by TCP (what came
//! by the short cut is in the same queue), the message may go past the daemon. The way back is always open: what goes
//! through the daemon arrives later, and a receiver reads what came by TCP after what came by the short cut.

use core::ptr::read_volatile;

use aya_ebpf::bindings::{BPF_F_INGRESS, sk_action::SK_PASS};
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use aya_ebpf::programs::SkMsgContext;
use culvert_proxy_ebpf::{Hop, Join, Reason, SocketKey};

use crate::hops::{field, fits, sock_address, waits};
use crate::maps::{JOINED, JOINS, SOCKETS, count, count_by, pod_counters, sock_layout};

/// Sends a pod's message straight to the other pod, if its connection is joined and the order allows it.
#[inline(always)]
pub fn redirected(ctx: &SkMsgContext, hop: &mut Hop, size: u32) -> bool {
    let Some(join) = join_of(&hop.own) else { return false };
    match check(hop, &join, size) {
        Ok(()) if SOCKETS.redirect_msg(ctx, join.target, u64::from(BPF_F_INGRESS)) as u32 == SK_PASS => {}
        Ok(()) => {
            count(Reason::JoinedPeerMissing);
            return false;
        }
        Err(reason) => {
            count(reason);
            return false;
        }
    }
    if let Some(counters) = JOINED.get_ptr_mut(hop.own) {
        // SAFETY: a value of the map JOINED, which lives until the end of the program run. Written by the sender's program
        // alone, whose socket is locked; the time is read without a lock, which may be late by a message.
        unsafe {
            (*counters).bytes += u64::from(size);
            (*counters).last = bpf_ktime_get_coarse_ns();
        }
    }
    count(Reason::JoinedMessages);
    count_by(Reason::JoinedBytes, u64::from(size));
    if let Some(counters) = pod_counters(&hop.own.local) {
        counters.bytes_sent += u64::from(size);
    }
    if let Some(counters) = pod_counters(&join.target.local) {
        counters.bytes_received += u64::from(size);
    }
    true
}

/// What the daemon says of a sender's connection, copied: it replaces entries whenever it has forwarded something, and the memory of one that
/// was replaced may be another sender's entry at once.
#[inline(always)]
fn join_of(sender: &SocketKey) -> Option<Join> {
    let entry = JOINS.get_ptr(sender)?;
    // SAFETY: memory of the map JOINS, of which any bytes are a `Join`; volatile because it may be written meanwhile.
    let join = unsafe { read_volatile(entry) };
    // What is the sender's still was so while it was read.
    (JOINS.get_ptr(sender)? == entry).then_some(join)
}

/// Whether the next bytes keep their order, and the receiver its bounds, past the daemon; else why not.
#[inline(always)]
fn check(hop: &mut Hop, join: &Join, size: u32) -> Result<(), Reason> {
    let layout = sock_layout();
    if hop.countable == 0 {
        return Err(Reason::JoinedNotForwarded);
    }
    // Numbers of 32 bits that go round are enough: the daemon never holds that many bytes.
    let by_tcp = field(hop.own_sock, layout.write_seq)?.wrapping_sub(hop.own.first_sent);
    let sent = by_tcp.wrapping_add(hop.shortcut_sent as u32);
    if sent != join.forwarded as u32 {
        return Err(Reason::JoinedNotForwarded);
    }
    if hop.target_sock == 0 {
        hop.target_peer_sock = sock_address(&join.target.peer()).ok_or(Reason::JoinedPeerMissing)?;
        hop.target_sock = sock_address(&join.target).ok_or(Reason::JoinedPeerMissing)?;
    }
    if !may_send(hop.target_peer_sock)? {
        return Err(Reason::JoinedPeerMissing);
    }
    let written = field(hop.target_peer_sock, layout.write_seq)?;
    if field(hop.target_sock, layout.copied_seq)? != written {
        return Err(Reason::JoinedUnread);
    }
    // A program that waits inside TCP for a number of bytes, some of which came by TCP, would not see the rest come.
    if written != join.target.first_received && waits(hop.target_sock) != Ok(false) {
        return Err(Reason::JoinedReceiverWaits);
    }
    if fits(hop.target_sock, size)? { Ok(()) } else { Err(Reason::JoinedReceiverBehind) }
}

/// Whether the daemon may still send on its socket: bytes must not arrive behind its FIN, also when it died.
#[inline(always)]
fn may_send(sock: u64) -> Result<bool, Reason> {
    const ESTABLISHED: u32 = 1;
    const CLOSE_WAIT: u32 = 8;
    // The first of the four bytes that are read.
    let state = u32::from(field(sock, sock_layout().state)?.to_ne_bytes()[0]);
    Ok(state == ESTABLISHED || state == CLOSE_WAIT)
}
