//! The kernel programs. Built by `cargo xtask build-ebpf` for the target `bpfel-unknown-none`; docs/kernel.md explains
//! what is attached where.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros drop the doc comments of what they are put on")]

mod balance;
mod connect;
mod hops;
mod host;
mod joins;
mod maps;
mod packet;
mod redirect;
mod reset;

use aya_ebpf::macros::{cgroup_sock, cgroup_sock_addr, classifier, raw_tracepoint, sk_lookup, sk_msg, sock_ops};
use aya_ebpf::programs::{
    RawTracePointContext, SkLookupContext, SkMsgContext, SockAddrContext, SockContext, SockOpsContext, TcContext,
};

/// TC ingress of a pod's host-side interface.
#[classifier]
pub fn redirect_outbound(ctx: TcContext) -> i32 {
    redirect::outbound(&ctx)
}

/// TC ingress of the node's uplinks.
#[classifier]
pub fn redirect_inbound(ctx: TcContext) -> i32 {
    redirect::inbound(&ctx)
}

/// Lookups of listeners in the node's network namespace.
#[sk_lookup]
pub fn reopen(ctx: SkLookupContext) -> u32 {
    redirect::reopen(&ctx)
}

/// Socket events of the node's cgroup: enters both ends of same-node hops into `SOCKETS`.
#[sock_ops]
pub fn register_socket(ctx: SockOpsContext) -> u32 {
    hops::socket_event(&ctx);
    0
}

/// Messages of registered sockets: hands them to the peer's receive queue.
#[sk_msg]
pub fn shortcut(ctx: SkMsgContext) -> u32 {
    hops::message(&ctx)
}

/// Run once by the daemon, and attached to nothing: tells the other programs which process the daemon is.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn note_daemon(_ctx: RawTracePointContext) -> i32 {
    connect::note_daemon();
    0
}

/// Run by the daemon, and attached to nothing: counts what the daemon's workers found, under the number that they give.
#[raw_tracepoint(tracepoint = "sched_process_exit")]
pub fn count_for_daemon(ctx: RawTracePointContext) -> i32 {
    maps::count_number(ctx.arg(0));
    0
}

/// connect() of processes in host mode.
#[cgroup_sock_addr(connect4)]
pub fn host_connect4(ctx: SockAddrContext) -> i32 {
    host::connect::<false>(&ctx)
}

/// connect() of processes in host mode, IPv6.
#[cgroup_sock_addr(connect6)]
pub fn host_connect6(ctx: SockAddrContext) -> i32 {
    host::connect::<true>(&ctx)
}

/// Socket events of processes in host mode.
#[sock_ops]
pub fn host_flow(ctx: SockOpsContext) -> u32 {
    host::socket_event(&ctx);
    0
}

/// getpeername(), in host mode and of balanced services.
#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    connect::getpeername::<false>(&ctx)
}

/// getpeername(), IPv6.
#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    connect::getpeername::<true>(&ctx)
}

/// connect() to balanced services.
#[cgroup_sock_addr(connect4)]
pub fn balance_connect4(ctx: SockAddrContext) -> i32 {
    balance::connect::<false>(&ctx)
}

/// connect() to balanced services, IPv6.
#[cgroup_sock_addr(connect6)]
pub fn balance_connect6(ctx: SockAddrContext) -> i32 {
    balance::connect::<true>(&ctx)
}

/// sendto() to balanced services.
#[cgroup_sock_addr(sendmsg4)]
pub fn balance_sendmsg4(ctx: SockAddrContext) -> i32 {
    balance::sendmsg::<false>(&ctx)
}

/// sendto() to balanced services, IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub fn balance_sendmsg6(ctx: SockAddrContext) -> i32 {
    balance::sendmsg::<true>(&ctx)
}

/// recvfrom() from balanced services.
#[cgroup_sock_addr(recvmsg4)]
pub fn balance_recvmsg4(ctx: SockAddrContext) -> i32 {
    balance::recvmsg::<false>(&ctx)
}

/// recvfrom() from balanced services, IPv6.
#[cgroup_sock_addr(recvmsg6)]
pub fn balance_recvmsg6(ctx: SockAddrContext) -> i32 {
    balance::recvmsg::<true>(&ctx)
}

/// Sockets that are closed.
#[cgroup_sock(sock_release)]
pub fn balance_released(ctx: SockContext) -> i32 {
    balance::released(&ctx);
    1
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses any program from which this could be reached.
    loop {}
}

/// Helpers such as `bpf_sk_assign` are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
