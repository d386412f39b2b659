//! Reads addresses, ports and flags out of a TCP packet.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use culvert_proxy_ebpf::{Address, Reason, v4_mapped};

const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86DD;
const IPPROTO_TCP: u8 = 6;
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// What is decided by.
pub struct Segment {
    pub source: Address,
    pub destination: Address,
    /// In network byte order, as `bpf_sock_tuple` wants it.
    pub source_port: u16,
    /// In network byte order.
    pub destination_port: u16,
    pub is_ipv6: bool,
    /// Whether the packet opens a connection: SYN without ACK.
    pub opens: bool,
}

/// Why a packet is none of our business.
pub enum NotOurs {
    /// Not TCP.
    Other,
    /// TCP, or what may be, that cannot be decided by: counted.
    Counted(Reason),
}

#[repr(C)]
struct Ipv4Header {
    version_and_length: u8,
    tos: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: [u8; 4],
    destination: [u8; 4],
}

#[repr(C)]
struct Ipv6Header {
    version_and_flow: [u8; 4],
    payload_length: u16,
    next_header: u8,
    hop_limit: u8,
    source: Address,
    destination: Address,
}

#[repr(C)]
struct TcpHeader {
    source_port: u16,
    destination_port: u16,
    sequence: u32,
    acknowledgement: u32,
    offset: u8,
    flags: u8,
    window: u16,
}

/// Reads a `T` at an offset from the IP header. Relative to the IP header, so that interfaces with and without a
/// link-layer header are read alike.
#[inline(always)]
fn load<T>(ctx: &TcContext, offset: u32) -> Result<T, NotOurs> {
    let mut value = core::mem::MaybeUninit::<T>::uninit();
    // SAFETY: the helper writes size_of::<T>() bytes to `value`, or fails.
    let result = unsafe {
        bpf_skb_load_bytes_relative(
            ctx.as_ptr(),
            offset,
            value.as_mut_ptr().cast(),
            size_of::<T>() as u32,
            BPF_HDR_START_NET,
        )
    };
    if result != 0 {
        return Err(NotOurs::Counted(Reason::PassedTruncated));
    }
    // SAFETY: written in full above; `T` is one of the headers above, valid for any bytes.
    Ok(unsafe { value.assume_init() })
}

/// Reads a TCP packet.
#[inline(always)]
pub fn parse(ctx: &TcContext) -> Result<Segment, NotOurs> {
    match u32::from(u16::from_be(ctx.skb.protocol() as u16)) {
        ETH_P_IP => parse_ipv4(ctx),
        ETH_P_IPV6 => parse_ipv6(ctx),
        _ => Err(NotOurs::Other),
    }
}

#[inline(always)]
fn parse_ipv4(ctx: &TcContext) -> Result<Segment, NotOurs> {
    let ip: Ipv4Header = load(ctx, 0)?;
    if ip.protocol != IPPROTO_TCP {
        return Err(NotOurs::Other);
    }
    // More-fragments, or an offset: ports are in the first fragment only. Don't-fragment (0x4000) is no matter.
    if u16::from_be(ip.fragment) & 0x3fff != 0 {
        return Err(NotOurs::Counted(Reason::PassedFragment));
    }
    let header_length = u32::from(ip.version_and_length & 0x0f) * 4;
    if header_length < size_of::<Ipv4Header>() as u32 {
        return Err(NotOurs::Counted(Reason::PassedTruncated));
    }
    let tcp: TcpHeader = load(ctx, header_length)?;
    Ok(segment(&tcp, v4_mapped(ip.source), v4_mapped(ip.destination), false))
}

#[inline(always)]
fn parse_ipv6(ctx: &TcContext) -> Result<Segment, NotOurs> {
    let ip: Ipv6Header = load(ctx, 0)?;
    match ip.next_header {
        IPPROTO_TCP => {}
        // Hop-by-hop, routing, fragment, destination options.
        0 | 43 | 60 => return Err(NotOurs::Counted(Reason::PassedExtensionHeader)),
        44 => return Err(NotOurs::Counted(Reason::PassedFragment)),
        _ => return Err(NotOurs::Other),
    }
    let tcp: TcpHeader = load(ctx, size_of::<Ipv6Header>() as u32)?;
    Ok(segment(&tcp, ip.source, ip.destination, true))
}

#[inline(always)]
fn segment(tcp: &TcpHeader, source: Address, destination: Address, is_ipv6: bool) -> Segment {
    Segment {
        source,
        destination,
        source_port: tcp.source_port,
        destination_port: tcp.destination_port,
        is_ipv6,
        opens: tcp.flags & (TCP_SYN | TCP_ACK) == TCP_SYN,
    }
}
