//! Reads addresses, ports and flags out of a TCP packet.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_hdr_start_off::BPF_HDR_START_NET;
use aya_ebpf::helpers::bpf_skb_load_bytes_relative;
use aya_ebpf::programs::TcContext;
use culvert_proxy_ebpf::{Address, FragmentKey, Reason, v4_mapped};

const ETH_P_IP: u32 = 0x0800;
const ETH_P_IPV6: u32 = 0x86DD;
const IPPROTO_ICMP: u8 = 1;
const IPPROTO_TCP: u8 = 6;
const IPPROTO_ICMPV6: u8 = 58;
/// Bytes of an ICMP error before the packet that it is about.
const ICMP_HEADER: u32 = 8;
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
    /// Where the TCP header is, in bytes from the IP header.
    pub tcp: u32,
    /// As the packet has it.
    pub header: TcpHeader,
}

/// Why a packet is none of our business.
pub enum NotOurs {
    /// Not TCP.
    Other,
    /// TCP, or what may be, that cannot be decided by: counted.
    Counted(Reason),
    /// A piece of a TCP packet: see [`piece`].
    Fragment,
    /// An ICMP error about a TCP packet that went the other way. The segment has the addresses and ports that an answer
    /// to that packet would have.
    Icmp(Segment),
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

/// The first 16 bytes of a TCP header, in network byte order.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TcpHeader {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledgement: u32,
    pub offset: u8,
    pub flags: u8,
    pub window: u16,
}

/// What is sure to be in an ICMP error: the beginning of the packet that it is about.
#[repr(C)]
struct Ports {
    source: u16,
    destination: u16,
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
    // SAFETY: written in full above; `T` is one of the headers above or a byte, valid for any bytes.
    Ok(unsafe { value.assume_init() })
}

/// Reads a TCP packet.
#[inline(always)]
pub fn parse(ctx: &TcContext) -> Result<Segment, NotOurs> {
    // SAFETY: a field of the context that the kernel passed in.
    if unsafe { (*ctx.skb.skb).vlan_present } != 0 {
        return Err(NotOurs::Counted(Reason::PassedVlan));
    }
    match u32::from(u16::from_be(ctx.skb.protocol() as u16)) {
        ETH_P_IP => parse_ipv4(ctx),
        ETH_P_IPV6 => parse_ipv6(ctx),
        _ => Err(NotOurs::Other),
    }
}

#[inline(always)]
fn parse_ipv4(ctx: &TcContext) -> Result<Segment, NotOurs> {
    let ip: Ipv4Header = load(ctx, 0)?;
    if ip.protocol == IPPROTO_ICMP {
        return Err(icmp_error(ctx, &ip));
    }
    if ip.protocol != IPPROTO_TCP {
        return Err(NotOurs::Other);
    }
    // More-fragments, or an offset: ports are in the first fragment only. Don't-fragment (0x4000) is no matter.
    if u16::from_be(ip.fragment) & 0x3fff != 0 {
        return Err(NotOurs::Fragment);
    }
    behind_ipv4(ctx, &ip)
}

#[inline(always)]
fn behind_ipv4(ctx: &TcContext, ip: &Ipv4Header) -> Result<Segment, NotOurs> {
    let header_length = u32::from(ip.version_and_length & 0x0f) * 4;
    if header_length < size_of::<Ipv4Header>() as u32 {
        return Err(NotOurs::Counted(Reason::PassedTruncated));
    }
    let tcp: TcpHeader = load(ctx, header_length)?;
    Ok(segment(tcp, header_length, v4_mapped(ip.source), v4_mapped(ip.destination), false))
}

/// Of which packet a piece is, and whether it is the first, which has the ports: [`first_piece`] reads them.
#[inline(always)]
pub fn piece(ctx: &TcContext) -> Option<(FragmentKey, bool)> {
    let ip: Ipv4Header = load(ctx, 0).ok()?;
    let key = FragmentKey { source: ip.source, destination: ip.destination, id: ip.id, unused: 0 };
    Some((key, u16::from_be(ip.fragment) & 0x1fff == 0))
}

/// Reads the first piece of a TCP packet.
#[inline(always)]
pub fn first_piece(ctx: &TcContext) -> Option<Segment> {
    let ip: Ipv4Header = load(ctx, 0).ok()?;
    behind_ipv4(ctx, &ip).ok()
}

/// Reads what an ICMP packet is about, if it is an error about a TCP packet. What else it may be passes.
#[inline(always)]
fn icmp_error(ctx: &TcContext, ip: &Ipv4Header) -> NotOurs {
    let length = u32::from(ip.version_and_length & 0x0f) * 4;
    let Ok(kind) = load::<u8>(ctx, length) else { return NotOurs::Other };
    // Unreachable (of which: fragmentation needed), time exceeded, parameter problem.
    if !matches!(kind, 3 | 11 | 12) || u16::from_be(ip.fragment) & 0x3fff != 0 {
        return NotOurs::Other;
    }
    let inner_at = length + ICMP_HEADER;
    let Ok(inner) = load::<Ipv4Header>(ctx, inner_at) else { return NotOurs::Other };
    if inner.protocol != IPPROTO_TCP || u16::from_be(inner.fragment) & 0x1fff != 0 {
        return NotOurs::Other;
    }
    let ports_at = inner_at + u32::from(inner.version_and_length & 0x0f) * 4;
    let Ok(ports) = load::<Ports>(ctx, ports_at) else { return NotOurs::Other };
    NotOurs::Icmp(answer(&ports, v4_mapped(inner.source), v4_mapped(inner.destination), false))
}

/// As [`icmp_error`], for IPv6.
#[inline(always)]
fn icmpv6_error(ctx: &TcContext) -> NotOurs {
    const LENGTH: u32 = size_of::<Ipv6Header>() as u32;
    let Ok(kind) = load::<u8>(ctx, LENGTH) else { return NotOurs::Other };
    // Unreachable, packet too big, time exceeded, parameter problem.
    if !matches!(kind, 1..=4) {
        return NotOurs::Other;
    }
    let Ok(inner) = load::<Ipv6Header>(ctx, LENGTH + ICMP_HEADER) else { return NotOurs::Other };
    if inner.next_header != IPPROTO_TCP {
        return NotOurs::Other;
    }
    let Ok(ports) = load::<Ports>(ctx, LENGTH + ICMP_HEADER + LENGTH) else { return NotOurs::Other };
    NotOurs::Icmp(answer(&ports, inner.source, inner.destination, true))
}

/// The addresses and ports of an answer to a packet with these.
#[inline(always)]
fn answer(ports: &Ports, source: Address, destination: Address, is_ipv6: bool) -> Segment {
    let header = TcpHeader {
        source_port: ports.destination,
        destination_port: ports.source,
        sequence: 0,
        acknowledgement: 0,
        offset: 0,
        flags: TCP_ACK,
        window: 0,
    };
    segment(header, 0, destination, source, is_ipv6)
}

/// What is behind an extension header is no matter where that is not TCP, as far as its first byte tells: most are of other protocols.
#[inline(always)]
fn behind_extension(ctx: &TcContext, reason: Reason) -> NotOurs {
    match load::<u8>(ctx, size_of::<Ipv6Header>() as u32) {
        Ok(IPPROTO_TCP | 0 | 43 | 44 | 60) => NotOurs::Counted(reason),
        Ok(_) => NotOurs::Other,
        Err(truncated) => truncated,
    }
}

#[inline(always)]
fn parse_ipv6(ctx: &TcContext) -> Result<Segment, NotOurs> {
    let ip: Ipv6Header = load(ctx, 0)?;
    match ip.next_header {
        IPPROTO_TCP => {}
        IPPROTO_ICMPV6 => return Err(icmpv6_error(ctx)),
        // Hop-by-hop, routing, destination options.
        0 | 43 | 60 => return Err(behind_extension(ctx, Reason::PassedExtensionHeader)),
        // Fragment.
        44 => return Err(behind_extension(ctx, Reason::PassedFragment)),
        _ => return Err(NotOurs::Other),
    }
    let at = size_of::<Ipv6Header>() as u32;
    let tcp: TcpHeader = load(ctx, at)?;
    Ok(segment(tcp, at, ip.source, ip.destination, true))
}

#[inline(always)]
fn segment(tcp: TcpHeader, at: u32, source: Address, destination: Address, is_ipv6: bool) -> Segment {
    Segment {
        source,
        destination,
        source_port: tcp.source_port,
        destination_port: tcp.destination_port,
        is_ipv6,
        opens: tcp.flags & (TCP_SYN | TCP_ACK) == TCP_SYN,
        tcp: at,
        header: tcp,
    }
}
