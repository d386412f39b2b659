//! Map keys, values and counter numbers shared by the kernel programs and the daemon.
//!
//! Everything here is read by both sides as plain memory, so layouts are `repr(C)`, free of padding, and asserted.
#![no_std]

#[cfg(test)]
extern crate std;

mod connect;
mod reason;

pub use connect::*;
pub use reason::Reason;

/// An IPv6 address, or an IPv4 address in its IPv4-mapped form (`::ffff:a.b.c.d`), in network byte order.
///
/// One form for both families keeps one map per purpose, and makes the addresses that dual-stack sockets report equal
/// to those that packets carry.
pub type Address = [u8; 16];

/// An Ethernet address.
pub type LinkAddress = [u8; 6];

/// The IPv4-mapped form of an IPv4 address in network byte order.
#[inline(always)]
pub const fn v4_mapped(address: [u8; 4]) -> Address {
    let [a, b, c, d] = address;
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d]
}

/// An address as the kernel's contexts hold it: four words in network byte order.
#[inline(always)]
pub const fn from_words(words: [u32; 4]) -> Address {
    let [first, second, third, fourth] = words;
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    let ([i, j, k, l], [m, n, o, p]) = (third.to_ne_bytes(), fourth.to_ne_bytes());
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// How many workers the listener map has room for.
pub const MAX_WORKERS: u32 = 128;
/// How many pods of one node can be enrolled.
pub const MAX_PODS: usize = 16_384;
/// How many of the node's own addresses are known to the kernel programs.
pub const MAX_LOCAL_ADDRESSES: usize = 4_096;
/// How many ports of bridges can have the programs.
pub const MAX_BRIDGE_PORTS: usize = 16_384;
/// How many destination ranges can be excluded.
pub const MAX_EXCLUDED_RANGES: usize = 4_096;
/// How many destination ports can be excluded.
pub const MAX_EXCLUDED_PORTS: usize = 65_536;
/// Of how many servers the kernel remembers whether their programs let it wait; it forgets the least used.
pub const MAX_SERVERS: usize = 16_384;
/// How many sockets can take the short cut at a time; later ones use TCP.
pub const MAX_SHORTCUT_SOCKETS: usize = 262_144;

/// How many users can be excluded.
pub const MAX_EXCLUDED_UIDS: usize = 1_024;

/// The layout of the pinned maps, part of their pins' path: raised with every change that an older program or reader
/// would misread.
pub const LAYOUT: u32 = 5;

/// A pod's outbound connections, as a bit of [`PodPolicy::directions`].
pub const OUTBOUND: u32 = 1;
/// A pod's inbound connections, as a bit of [`PodPolicy::directions`].
pub const INBOUND: u32 = 2;

/// How many slots the map `LISTENERS` has: one for each worker, family and direction.
pub const LISTENER_SLOTS: usize = MAX_WORKERS as usize * 4;

/// The slot of a worker's listening socket in the map `LISTENERS`. `direction`: [`OUTBOUND`] or [`INBOUND`].
#[inline(always)]
pub const fn listener_slot(worker: u32, is_ipv6: bool, direction: u32) -> u32 {
    (direction - OUTBOUND) * MAX_WORKERS * 2 + worker * 2 + is_ipv6 as u32
}

/// What is done with an enrolled pod's connections.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodPolicy {
    /// 1: new connections are reset while no worker listens. 0: they pass untouched.
    pub fail_closed: u32,
    /// Which of its connections are redirected: [`OUTBOUND`], [`INBOUND`], or both.
    pub directions: u32,
    /// The index of the interface that the pod's packets come over; 0: any. A later pod with this address has another
    /// interface, and is not this one.
    pub interface: u32,
    /// How far its payload may go past TCP, see [`Acceleration`].
    pub acceleration: u32,
}

/// How far payload of hops that stay on the node may go past TCP. Of a connection's two pods, its listener and what is said
/// at run time, the least counts.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Acceleration {
    /// All of it by TCP.
    Off = 0,
    /// As the next one where no program in a pod can notice: see [`NOTICED`]. Else all of it by TCP.
    #[default]
    Automatic = 1,
    /// From pods to the daemon: the short cut. Pods themselves read from TCP only.
    Shortcut = 2,
    /// From the daemon to pods too.
    BothWays = 3,
    /// From pod to pod, past the daemon, where it has nothing left to look at.
    Joined = 4,
}

/// The slot of the map `SWITCHES` that says whether a program notices that its socket is registered, even if all that it
/// reads comes by TCP: 1 where the kernel tells it that nothing is there to read (FIONREAD).
pub const NOTICED: u32 = 0;
/// The slot of the map `SWITCHES` that says whether the daemon is about to end: 1, and new connections go their own way.
pub const ENDING: u32 = INBOUND + 1;
/// How many slots the map `SWITCHES` has: [`NOTICED`], [`ENDING`], and how far payload of a listener's connections may go, by
/// direction.
pub const SWITCHES: usize = ENDING as usize + 1;

/// A direction of two connections that the daemon has joined, in the map `JOINS` by its sender's key. Written by the daemon.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Join {
    /// The socket at the far end, to which the daemon forwards what the sender sends.
    pub target: SocketKey,
    /// How many of the sender's bytes the daemon has forwarded.
    pub forwarded: u64,
}

/// What went from socket to socket in one direction, in the map `JOINED` by its sender's key. Written by the kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JoinedCounters {
    /// Bytes.
    pub bytes: u64,
    /// When the last ones went, in nanoseconds of the monotonic clock.
    pub last: u64,
}

/// What a pod had to do with the daemon, and whose account this is. One per CPU. Later daemons go on with it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodCounters {
    /// Connections that it opened and that were redirected.
    pub outbound_connections: u64,
    /// Connections to it that were redirected.
    pub inbound_connections: u64,
    /// Bytes that it sent to the daemon: whole packets, and payload by the short cut.
    pub bytes_sent: u64,
    /// Bytes that came for it and were given to the daemon, and payload that it got by the short cut.
    pub bytes_received: u64,
    /// A hash of what makes the pod another one than an earlier pod with its address. Written by the daemon only.
    pub identity: u64,
    /// Since when it is enrolled, in nanoseconds since 1970. Written by the daemon only.
    pub since: u64,
}

/// The key of a socket in the map `SOCKETS`: which end of which connection it is.
///
/// The two initial sequence numbers make the key one connection's own: sockets in other network namespaces that happen
/// to use the same addresses and ports never match, nor does a later connection that reuses them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketKey {
    /// The socket's own address.
    pub local: Address,
    /// Its peer's address.
    pub remote: Address,
    /// The socket's own port, in host byte order.
    pub local_port: u16,
    /// Its peer's port, in host byte order.
    pub remote_port: u16,
    /// Which end it is, see [`Side`].
    pub side: u32,
    /// The sequence number of the first byte that it sends.
    pub first_sent: u32,
    /// The sequence number of the first byte that it receives.
    pub first_received: u32,
}

impl SocketKey {
    /// The key of the other end of the same connection.
    #[inline(always)]
    pub const fn peer(&self) -> Self {
        Self {
            local: self.remote,
            remote: self.local,
            local_port: self.remote_port,
            remote_port: self.local_port,
            side: 1 - self.side,
            first_sent: self.first_received,
            first_received: self.first_sent,
        }
    }
}

/// The end of a same-node hop that a socket is, as stored in [`SocketKey::side`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// In the node's network namespace: the daemon's end.
    Node = 0,
    /// In a pod's network namespace.
    Pod = 1,
}

/// How a socket's outgoing bytes travel now.
///
/// A receiver reads what came by the short cut before what came by TCP. So bytes may change from the short cut to TCP at
/// any time, but back only when the receiver has read all that was sent by TCP.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Nothing was sent by a lane that the programs chose.
    Unsettled = 0,
    /// Straight into the peer's receive queue.
    Shortcut = 1,
    /// By TCP, until the receiver has read everything. For the daemon as receiver.
    Tcp = 2,
    /// By TCP, for good. For pods as receivers, which read from TCP only unless they are said to read from both; and then too
    /// a program that waits inside the kernel for a number of bytes (`MSG_WAITALL`), some of which came by TCP, would not see
    /// the rest come by the short cut.
    TcpForGood = 3,
}

/// What the kernel remembers of a registered socket, in its socket storage `HOPS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// The socket's own key.
    pub own: SocketKey,
    /// The key of the socket at the other end.
    pub peer: SocketKey,
    /// Where the socket is in the kernel's memory.
    pub own_sock: u64,
    /// Where the socket at the other end is in the kernel's memory; 0 as long as that is not known.
    pub peer_sock: u64,
    /// How many of the bytes that it sent by TCP are counted.
    pub tcp_counted: u64,
    /// How many bytes it sent to its peer by the short cut.
    pub shortcut_sent: u64,
    /// Of a joined connection: where the socket is that gets what this one sends, and the daemon's end of that hop; 0 as
    /// long as that is not known.
    pub target_sock: u64,
    /// See `target_sock`.
    pub target_peer_sock: u64,
    /// Whose listener's connection it belongs to: [`OUTBOUND`] or [`INBOUND`].
    pub direction: u32,
    /// 1: `first_sent` in `own` is where its stream begins, so that what it sent can be counted.
    pub countable: u32,
    /// See [`Lane`].
    pub lane: u32,
    /// Whether it is only watched, and not registered: see [`Watched`].
    pub watched: u32,
}

/// Why a socket is only watched, as stored in [`Hop::watched`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watched {
    /// It is registered.
    No = 0,
    /// The other end is not registered: it counts the bytes of both when it closes.
    ForBoth = 1,
    /// It is a server's, of which it is not known yet whether its program lets the kernel wait.
    ForWaiting = 2,
}

/// Where the fields that the short cut reads are in the kernel's `struct sock` and `struct tcp_sock`, in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SockLayout {
    /// `sk_backlog.rmem_alloc`: bytes in the receive queue.
    pub rmem_alloc: u32,
    /// `copied_seq`: the sequence number of the first byte that the program has not read.
    pub copied_seq: u32,
    /// `write_seq`: the sequence number of the next byte to send.
    pub write_seq: u32,
    /// `sk_socket`: the `struct socket` of a socket that a program holds.
    pub socket: u32,
    /// `file`, in `struct socket`: its `struct file`.
    pub file: u32,
    /// `f_flags`, in `struct file`: `O_NONBLOCK` and others.
    pub file_flags: u32,
    /// `__sk_common.skc_state`: the state of the connection, a byte.
    pub state: u32,
}

/// How many packets of which pieces are under way are remembered.
pub const MAX_FRAGMENTED: usize = 4_096;

/// A packet of one of the daemon's connections that comes in pieces.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FragmentKey {
    /// IPv4 addresses: pieces of IPv6 packets are counted and pass.
    pub source: [u8; 4],
    /// Likewise.
    pub destination: [u8; 4],
    /// The packet's number, as the packet has it.
    pub id: u16,
    /// 0.
    pub unused: u16,
}

/// How many unread bytes the short cut puts into one socket's receive queue. The kernel itself sets no bound there: a
/// receiver that is this far behind gets the rest by TCP, which makes its sender wait.
pub const SHORTCUT_WINDOW: u32 = 512 * 1024;

const _: () = assert!(size_of::<PodPolicy>() == 16);
const _: () = assert!(size_of::<FragmentKey>() == 12);
const _: () = assert!(size_of::<PodCounters>() == 48);
const _: () = assert!(size_of::<SocketKey>() == 48);
const _: () = assert!(size_of::<Join>() == 56);
const _: () = assert!(size_of::<JoinedCounters>() == 16);
const _: () = assert!(size_of::<Hop>() == 160);
const _: () = assert!(size_of::<SockLayout>() == 28);

#[cfg(feature = "user")]
// SAFETY: `repr(C)` and four u32, so every byte pattern is a valid value and there is no padding.
unsafe impl aya::Pod for PodPolicy {}
#[cfg(feature = "user")]
// SAFETY: `repr(C)` and six u64, so every byte pattern is a valid value and there is no padding.
unsafe impl aya::Pod for PodCounters {}
#[cfg(feature = "user")]
// SAFETY: `repr(C)`, numbers and arrays of bytes whose sizes add up, so every byte pattern is a valid value and there is no
// padding.
unsafe impl aya::Pod for SocketKey {}
#[cfg(feature = "user")]
// SAFETY: as of `SocketKey`.
unsafe impl aya::Pod for Hop {}
#[cfg(feature = "user")]
// SAFETY: as of `SocketKey`.
unsafe impl aya::Pod for Join {}
#[cfg(feature = "user")]
// SAFETY: `repr(C)` and two u64, so every byte pattern is a valid value and there is no padding.
unsafe impl aya::Pod for JoinedCounters {}
#[cfg(feature = "user")]
// SAFETY: `repr(C)` and seven u32, so every byte pattern is a valid value and there is no padding.
unsafe impl aya::Pod for SockLayout {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peer_of_the_peer_is_the_socket_itself() {
        let key = SocketKey {
            local: v4_mapped([10, 0, 0, 1]),
            remote: v4_mapped([10, 0, 0, 2]),
            local_port: 40_000,
            remote_port: 80,
            side: Side::Pod as u32,
            first_sent: 7,
            first_received: 9,
        };
        let peer = key.peer();
        assert_eq!(peer.side, Side::Node as u32);
        assert_eq!((peer.local, peer.local_port, peer.first_sent), (key.remote, 80, 9));
        assert_eq!(peer.peer(), key);
    }

    #[test]
    fn reasons_are_in_the_order_of_their_numbers() {
        for pair in Reason::ALL.windows(2) {
            assert!((pair[0] as usize) < pair[1] as usize, "{}", pair[1].name());
        }
        assert!(Reason::ALL.iter().all(|reason| (*reason as usize) < Reason::COUNT));
        for (at, reason) in Reason::ALL.iter().enumerate() {
            let same = Reason::ALL[at + 1..].iter().any(|other| other.name() == reason.name());
            assert!(!same, "two reasons have the name {}", reason.name());
        }
    }

    #[test]
    fn listeners_have_slots_of_their_own() {
        let mut slots = std::collections::HashSet::new();
        for worker in 0..MAX_WORKERS {
            for (is_ipv6, direction) in [(false, OUTBOUND), (true, OUTBOUND), (false, INBOUND), (true, INBOUND)] {
                let slot = listener_slot(worker, is_ipv6, direction);
                assert!((slot as usize) < LISTENER_SLOTS && slots.insert(slot));
            }
        }
    }
}
