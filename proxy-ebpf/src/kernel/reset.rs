//! Answers a packet that opens a connection with a reset, as a host does on which nobody listens: the packet itself is
//! turned round and goes back over the interface that it came from.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::{
    bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect, bpf_skb_load_bytes, bpf_skb_load_bytes_relative,
    bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use culvert_proxy_ebpf::Address;

use crate::packet::{Segment, TcpHeader};

const ETHERNET: u32 = 14;
const TCP_RST_ACK: u8 = 0x14;
/// Where the checksum is in a TCP header.
const TCP_CHECKSUM: u32 = 16;
/// Where the checksum is in an IPv4 header.
const IPV4_CHECKSUM: u32 = 10;
/// How far the answer may travel.
const HOPS: u8 = 64;

/// Turns the packet into a reset for its sender; the action that sends it. `None`: it cannot be, and is as it was or
/// useless.
#[inline(always)]
pub fn answer(ctx: &TcContext, segment: &Segment) -> Option<i32> {
    let ip = link_header(ctx)?;
    if ip == ETHERNET {
        let [d0, d1, d2, d3, d4, d5, s0, s1, s2, s3, s4, s5]: [u8; 12] = load(ctx, 0)?;
        store(ctx, 0, &[s0, s1, s2, s3, s4, s5, d0, d1, d2, d3, d4, d5])?;
    }
    // Addresses and ports change places, which no checksum sees.
    if segment.is_ipv6 {
        store(ctx, ip + 7, &HOPS)?;
        store::<[Address; 2]>(ctx, ip + 8, &[segment.destination, segment.source])?;
    } else {
        let [.., a, b, c, d] = segment.destination;
        let [.., e, f, g, h] = segment.source;
        let before: [u8; 2] = load(ctx, ip + 8)?;
        let after = [HOPS, before[1]];
        let (from, to) = (u64::from(u16::from_ne_bytes(before)), u64::from(u16::from_ne_bytes(after)));
        // SAFETY: the context that the kernel passed in.
        done(unsafe { bpf_l3_csum_replace(ctx.skb.skb, ip + IPV4_CHECKSUM, from, to, 2) })?;
        store(ctx, ip + 8, &after)?;
        store(ctx, ip + 12, &[a, b, c, d, e, f, g, h])?;
    }
    let old = segment.header;
    let new = TcpHeader {
        source_port: old.destination_port,
        destination_port: old.source_port,
        sequence: 0,
        // What opens a connection counts as one byte.
        acknowledgement: u32::from_be(old.sequence).wrapping_add(1).to_be(),
        offset: old.offset & 0xf0,
        flags: TCP_RST_ACK,
        window: 0,
    };
    let tcp = ip + segment.tcp;
    let at = tcp + TCP_CHECKSUM;
    let half = |high: u8, low: u8| u64::from(u16::from_ne_bytes([high, low]));
    // SAFETY: the context that the kernel passed in.
    unsafe {
        let skb = ctx.skb.skb;
        done(bpf_l4_csum_replace(skb, at, u64::from(old.sequence), 0, 4))?;
        done(bpf_l4_csum_replace(skb, at, u64::from(old.acknowledgement), u64::from(new.acknowledgement), 4))?;
        done(bpf_l4_csum_replace(skb, at, half(old.offset, old.flags), half(new.offset, new.flags), 2))?;
        done(bpf_l4_csum_replace(skb, at, u64::from(old.window), 0, 2))?;
    }
    store(ctx, tcp, &new)?;
    // SAFETY: a field of the context that the kernel passed in; the helper notes where the packet goes.
    Some(unsafe { bpf_redirect((*ctx.skb.skb).ifindex, 0) } as i32)
}

/// How many bytes precede the IP header: those of Ethernet, or none.
#[inline(always)]
fn link_header(ctx: &TcContext) -> Option<u32> {
    let mut ip = [0_u32; 4];
    // SAFETY: the helper writes as many bytes as it is told that there is room for, or fails.
    done(unsafe {
        bpf_skb_load_bytes_relative(ctx.as_ptr(), 0, ip.as_mut_ptr().cast(), size_of_val(&ip) as u32, BPF_HDR_START_NET)
    })?;
    if load::<[u32; 4]>(ctx, ETHERNET)? == ip {
        return Some(ETHERNET);
    }
    (load::<[u32; 4]>(ctx, 0)? == ip).then_some(0)
}

/// Reads a `T` at an offset from the start of the packet.
#[inline(always)]
fn load<T>(ctx: &TcContext, offset: u32) -> Option<T> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes size_of::<T>() bytes to `value`, or fails.
    done(unsafe { bpf_skb_load_bytes(ctx.as_ptr(), offset, value.as_mut_ptr().cast(), size_of::<T>() as u32) })?;
    // SAFETY: written in full above; callers ask for arrays of integers.
    Some(unsafe { value.assume_init() })
}

/// Writes a value without padding at an offset from the start of the packet.
#[inline(always)]
fn store<T>(ctx: &TcContext, offset: u32, value: &T) -> Option<()> {
    // SAFETY: the helper reads size_of::<T>() bytes of `value`.
    done(unsafe {
        bpf_skb_store_bytes(ctx.skb.skb, offset, core::ptr::from_ref(value).cast(), size_of::<T>() as u32, 0)
    })
}

#[inline(always)]
fn done(result: i64) -> Option<()> {
    (result == 0).then_some(())
}
