//! What the programs that work at connect() share with the daemon: redirected host processes, and services that the
//! kernel balances.

use crate::Address;

/// The protocol number of TCP.
pub const TCP: u8 = 6;
/// The protocol number of UDP.
pub const UDP: u8 = 17;

/// How many redirected connections can wait for the daemon to accept them.
pub const MAX_FLOWS: usize = 65_536;
/// How many services the kernel can balance.
pub const MAX_SERVICES: usize = 16_384;
/// How many backends all services can have together.
pub const MAX_BACKENDS: usize = 262_144;
/// How many answers to datagrams can be known by the service that they were sent to; the oldest are forgotten first.
pub const MAX_REPLIES: usize = 131_072;
/// How many UDP sockets that are connected to a service can be told when their backend is gone.
pub const MAX_CONNECTED: usize = 65_536;

/// One end of a connection, or where a service is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// IPv4 in its mapped form.
    pub address: Address,
    /// In host byte order.
    pub port: u16,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Always 0.
    pub unused: u8,
}

impl Endpoint {
    /// An endpoint of this protocol.
    #[inline(always)]
    pub const fn new(address: Address, port: u16, protocol: u8) -> Self {
        Self { address, port, protocol, unused: 0 }
    }
}

/// What an application asked for at connect() or sendto(), and what it got instead: kept with its socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Detour {
    /// What the application named.
    pub original: Endpoint,
    /// Where the kernel went: a worker's listener, or a backend.
    pub actual: Endpoint,
    /// 1: to a worker's listener.
    pub to_worker: u32,
}

/// A redirected connection as the daemon sees it when it accepts it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The client's address and port.
    pub client: Endpoint,
    /// The port of the listener.
    pub listener_port: u32,
}

/// A balanced service now.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its slots are those with this number: a change of the backends makes new ones.
    pub generation: u32,
    /// How many slots there are; 0: it has no backend that may be used.
    pub slots: u32,
}

/// The key of a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotKey {
    /// See [`Service::generation`].
    pub generation: u32,
    /// From 0 to [`Service::slots`].
    pub slot: u32,
}

/// One slot of a service's table (an alias table: each slot is as likely as any other, and holds up to two backends).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Chosen by random numbers below `threshold`, and all if that is the greatest one.
    pub first: Endpoint,
    /// Chosen by the others.
    pub second: Endpoint,
    /// Of 2^32.
    pub threshold: u32,
}

impl Slot {
    /// The backend of a random number.
    #[inline(always)]
    pub const fn pick(&self, number: u32) -> Endpoint {
        if number < self.threshold || self.threshold == u32::MAX { self.first } else { self.second }
    }
}

/// Who gets answers from a backend in a service's name.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyKey {
    /// The socket's cookie.
    pub cookie: u64,
    /// The backend.
    pub from: Endpoint,
    /// Always 0.
    pub unused: u32,
}

/// A UDP socket that is connected to a service.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// The backend that it got.
    pub backend: Endpoint,
    /// The process that connected it, as the first PID namespace numbers it.
    pub process: u32,
    /// The thread of it that did: threads may be in network namespaces of their own.
    pub thread: u32,
}

const _: () = assert!(size_of::<Endpoint>() == 20);
const _: () = assert!(size_of::<Detour>() == 44);
const _: () = assert!(size_of::<FlowKey>() == 24);
const _: () = assert!(size_of::<Service>() == 8);
const _: () = assert!(size_of::<SlotKey>() == 8);
const _: () = assert!(size_of::<Slot>() == 44);
const _: () = assert!(size_of::<ReplyKey>() == 32);
const _: () = assert!(size_of::<Connected>() == 28);

/// Lets aya read and write these types.
#[cfg(feature = "user")]
macro_rules! pod {
    ($($type:ty),+) => {
        $(
            // SAFETY: `repr(C)`, only integers, and no padding, as the sizes above show.
            unsafe impl aya::Pod for $type {}
        )+
    };
}

#[cfg(feature = "user")]
pod!(Endpoint, FlowKey, Service, SlotKey, Slot, ReplyKey, Connected);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_divided_at_their_threshold() {
        let backend = |port| Endpoint::new([0; 16], port, TCP);
        let slot = |threshold| Slot { first: backend(1), second: backend(2), threshold };
        assert_eq!([0, 9, 10, u32::MAX].map(|number| slot(10).pick(number).port), [1, 1, 2, 2]);
        assert_eq!([0, u32::MAX].map(|number| slot(u32::MAX).pick(number).port), [1, 1]);
        assert_eq!([0, u32::MAX].map(|number| slot(0).pick(number).port), [2, 2]);
    }
}
