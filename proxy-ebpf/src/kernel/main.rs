//! The kernel programs. Built by `cargo xtask build-ebpf` for the target `bpfel-unknown-none`; docs/kernel.md explains
//! what is attached where.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the program macros drop the doc comments of what they are put on")]

mod hops;
mod maps;
mod packet;
mod redirect;

use aya_ebpf::macros::{classifier, sk_lookup, sk_msg, sock_ops};
use aya_ebpf::programs::{SkLookupContext, SkMsgContext, SockOpsContext, TcContext};

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

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // The verifier refuses any program from which this could be reached.
    loop {}
}

/// Helpers such as `bpf_sk_assign` are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
