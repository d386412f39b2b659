//! The little rtnetlink that interception needs: list and watch interfaces and addresses, add and remove one rule and
//! one route.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use culvert_proxy_ebpf::LinkAddress;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, InfoPortKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// Multicast groups of rtnetlink (linux/rtnetlink.h).
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV6_IFADDR: u32 = 9;

/// Where the rule stands: after the kernel's own `local` (0) and before what network plugins usually add.
const RULE_PRIORITY: u32 = 100;

/// So often a listing is asked for that changes while it is made.
const LISTINGS: u32 = 10;

/// Space for events while the reader is busy; an overflow costs a full listing.
const EVENT_BUFFER: usize = 1 << 20;

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Its index, unique in the network namespace while it exists.
    pub(super) index: u32,
    /// Its name, which may change.
    pub(super) name: String,
    /// Its link-layer address, if that is an Ethernet one.
    pub(super) address: Option<LinkAddress>,
    /// It is a bridge itself.
    pub(super) is_bridge: bool,
    /// The index of the bridge that it is a port of.
    pub(super) bridge: Option<u32>,
}

/// What happened to interfaces or addresses.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// An interface appeared or changed.
    Link(Link),
    /// The interface of this index disappeared, or moved to another network namespace.
    LinkGone(u32),
    /// The host got an address.
    Address(IpAddr),
    /// The host lost an address.
    AddressGone(IpAddr),
    /// Events were lost: list everything anew.
    Lost,
}

/// A request socket.
pub(super) struct Netlink {
    socket: Socket,
    /// Of the last request, by which its answers are known: some of an earlier one that failed may still come.
    number: u32,
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, number: 0 })
    }

    /// Every interface.
    pub(super) fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match event_of(answer) {
                Some(Event::Link(link)) => Some(link),
                _ => None,
            })
            .collect())
    }

    /// Every address of the host.
    pub(super) fn addresses(&mut self) -> io::Result<Vec<IpAddr>> {
        let answers = self.dump(RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| match event_of(answer) {
                Some(Event::Address(address)) => Some(address),
                _ => None,
            })
            .collect())
    }

    /// Adds `fwmark <mark> lookup <table>`; whether there was none. An equal rule, left by a daemon that died, is adopted.
    pub(super) fn add_rule(&mut self, is_ipv6: bool, mark: u32, table: u32) -> io::Result<bool> {
        let message = RouteNetlinkMessage::NewRule(rule(is_ipv6, mark, table));
        accept_existing(self.request(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// The index of the interface over which the host sends to an address; none if it does not.
    pub(super) fn route_to(&mut self, address: IpAddr) -> io::Result<Option<u32>> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address.is_ipv6());
        message.header.destination_prefix_length = if address.is_ipv6() { 128 } else { 32 };
        message.attributes = vec![RouteAttribute::Destination(address.into())];
        self.send(RouteNetlinkMessage::GetRoute(message), NLM_F_REQUEST)?;
        loop {
            for answer in self.answers()? {
                match answer.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => {
                        return Ok(route.attributes.iter().find_map(|attribute| match attribute {
                            RouteAttribute::Oif(index) => Some(*index),
                            _ => None,
                        }));
                    }
                    NetlinkPayload::Error(error) => {
                        return match error.to_io() {
                            _ if error.code.is_none() => Ok(None),
                            error if is_unreachable(&error) => Ok(None),
                            error => Err(error),
                        };
                    }
                    _ => {}
                }
            }
        }
    }

    /// Removes what [`Self::add_rule`] added; whether there was any.
    pub(super) fn delete_rule(&mut self, is_ipv6: bool, mark: u32, table: u32) -> io::Result<bool> {
        accept_missing(self.request(RouteNetlinkMessage::DelRule(rule(is_ipv6, mark, table)), 0))
    }

    /// Adds `local default dev <loopback> table <table>`; whether there was none. An equal route, left by a daemon that died, is adopted.
    pub(super) fn add_local_route(&mut self, is_ipv6: bool, table: u32, loopback: u32) -> io::Result<bool> {
        let message = RouteNetlinkMessage::NewRoute(local_route(is_ipv6, table, loopback));
        accept_existing(self.request(message, NLM_F_CREATE | NLM_F_EXCL))
    }

    /// Removes what [`Self::add_local_route`] added; whether there was any.
    pub(super) fn delete_local_route(&mut self, is_ipv6: bool, table: u32, loopback: u32) -> io::Result<bool> {
        accept_missing(self.request(RouteNetlinkMessage::DelRoute(local_route(is_ipv6, table, loopback)), 0))
    }

    /// Removes a clsact queueing discipline that has no filter; whether there was such a one.
    pub(super) fn delete_empty_clsact(&mut self, interface: u32) -> io::Result<bool> {
        let mut message = TcMessage::with_index(interface.cast_signed());
        for parent in [TcHandle { major: 0xffff, minor: 0xfff2 }, TcHandle { major: 0xffff, minor: 0xfff3 }] {
            // Its ingress and its egress.
            message.header.parent = parent;
            match self.has_filters(message.clone()) {
                Ok(false) => {}
                Ok(true) => return Ok(false),
                Err(error) => return accept_missing(Err(error)),
            }
        }
        message.header.parent = TcHandle::CLSACT;
        message.header.handle = TcHandle { major: 0xffff, minor: 0 };
        message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        accept_missing(self.request(RouteNetlinkMessage::DelQueueDiscipline(message), 0))
    }

    /// Whether there are filters. They are only counted: this library does not understand all that others make.
    fn has_filters(&mut self, message: TcMessage) -> io::Result<bool> {
        const DONE: u16 = 3;
        const ERROR: u16 = 2;
        self.send(RouteNetlinkMessage::GetTrafficFilter(message), NLM_F_REQUEST | NLM_F_DUMP)?;
        let mut found = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while let Some((header, body)) = rest.split_at_checked(16) {
                let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
                let number = u32::from_ne_bytes([header[8], header[9], header[10], header[11]]);
                match u16::from_ne_bytes([header[4], header[5]]) {
                    _ if number != self.number => {}
                    DONE => return Ok(found),
                    ERROR => {
                        let code = body.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    _ => found = true,
                }
                rest = rest.get(length.max(16).next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// Sends a request and waits for its acknowledgement.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        loop {
            for answer in self.answers()? {
                if let NetlinkPayload::Error(error) = answer.payload {
                    return if error.code.is_none() { Ok(()) } else { Err(error.to_io()) };
                }
            }
        }
    }

    /// Sends a request for a listing and collects it. One during which something changed may lack what was there all the time: it is
    /// asked for again.
    fn dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..LISTINGS {
            if let Some(answers) = self.try_dump(message.clone())? {
                return Ok(answers);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "it changes too fast to be listed"))
    }

    /// Likewise; none if it changed meanwhile.
    fn try_dump(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_REQUEST | NLM_F_DUMP)?;
        let (mut answers, mut has_changed) = (Vec::new(), false);
        loop {
            for NetlinkMessage { header, payload, .. } in self.answers()? {
                has_changed |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Done(_) => return Ok((!has_changed).then_some(answers)),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => {}
                }
            }
        }
    }

    /// The answers to the last request in the next datagram.
    fn answers(&self) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
        let mut messages = receive(&self.socket)?;
        messages.retain(|message| message.header.sequence_number == self.number);
        Ok(messages)
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.number = self.number.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.number;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let mut buffer = vec![0; message.buffer_len()];
        message.serialize(&mut buffer);
        self.socket.send(&buffer, 0).map(drop)
    }
}

/// A socket that reports changes of interfaces and addresses.
pub(super) struct Monitor {
    socket: Socket,
}

impl Monitor {
    /// Opens a non-blocking socket in the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_rx_buf_sz(EVENT_BUFFER as nix::libc::c_int)?;
        for group in [RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR] {
            socket.add_membership(group)?;
        }
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// What happened since the last call.
    pub(super) fn events(&self) -> io::Result<Vec<Event>> {
        let mut events = Vec::new();
        loop {
            match receive(&self.socket) {
                Ok(messages) => events.extend(messages.into_iter().filter_map(|message| match message.payload {
                    NetlinkPayload::InnerMessage(message) => event_of(message),
                    NetlinkPayload::Overrun(_) => Some(Event::Lost),
                    _ => None,
                })),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(events),
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => events.push(Event::Lost),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket owns the descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }
}

/// Reads one datagram and splits it into messages. A message that this version of the library cannot read is left out.
fn receive(socket: &Socket) -> io::Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let (datagram, _) = socket.recv_from_full()?;
    let mut messages = Vec::new();
    let mut rest = datagram.as_slice();
    while let Some(length) = rest.first_chunk::<4>().map(|bytes| u32::from_ne_bytes(*bytes) as usize) {
        if length < 16 || length > rest.len() {
            break;
        }
        if let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&rest[..length]) {
            messages.push(message);
        }
        rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    }
    Ok(messages)
}

fn event_of(message: RouteNetlinkMessage) -> Option<Event> {
    match message {
        // A bridge tells of its ports by messages of its own family, which say less; of a port that leaves it by the one that says that
        // an interface is gone.
        RouteNetlinkMessage::NewLink(link) if link.header.interface_family == AddressFamily::Unspec => {
            let mut found =
                Link { index: link.header.index, name: String::new(), address: None, is_bridge: false, bridge: None };
            let (mut controller, mut is_port) = (None, false);
            for attribute in link.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => found.name = name,
                    LinkAttribute::Address(address) => found.address = address.try_into().ok(),
                    LinkAttribute::Controller(index) => controller = Some(index),
                    LinkAttribute::LinkInfo(info) => {
                        found.is_bridge = info.contains(&LinkInfo::Kind(InfoKind::Bridge));
                        is_port = info.contains(&LinkInfo::PortKind(InfoPortKind::Bridge));
                    }
                    _ => {}
                }
            }
            found.bridge = controller.filter(|_| is_port);
            (!found.name.is_empty()).then_some(Event::Link(found))
        }
        RouteNetlinkMessage::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
            Some(Event::LinkGone(link.header.index))
        }
        RouteNetlinkMessage::NewAddress(address) => own_address(&address).map(Event::Address),
        RouteNetlinkMessage::DelAddress(address) => own_address(&address).map(Event::AddressGone),
        _ => None,
    }
}

/// The host's own address: on point-to-point interfaces `Address` is the other end's.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let mut own = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => return Some(*address),
            AddressAttribute::Address(address) => own = Some(*address),
            _ => {}
        }
    }
    own
}

const fn family(is_ipv6: bool) -> AddressFamily {
    if is_ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet }
}

fn rule(is_ipv6: bool, mark: u32, table: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family(is_ipv6);
    message.header.action = RuleAction::ToTable;
    message.attributes =
        vec![RuleAttribute::Table(table), RuleAttribute::FwMark(mark), RuleAttribute::Priority(RULE_PRIORITY)];
    message
}

fn local_route(is_ipv6: bool, table: u32, loopback: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(is_ipv6);
    message.header.kind = RouteType::Local;
    message.header.scope = RouteScope::Host;
    message.header.protocol = RouteProtocol::Static;
    message.attributes = vec![RouteAttribute::Table(table), RouteAttribute::Oif(loopback)];
    message
}

fn accept_existing(result: io::Result<()>) -> io::Result<bool> {
    result.map(|()| true).or_else(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => Ok(false),
        _ => Err(error),
    })
}

/// No such rule (ENOENT), route (ESRCH) or interface (ENODEV): nothing is left to remove.
fn accept_missing(result: io::Result<()>) -> io::Result<bool> {
    result.map(|()| true).or_else(|error| match error.raw_os_error() {
        // EAFNOSUPPORT: a host without that family has none.
        Some(nix::libc::ENOENT | nix::libc::ESRCH | nix::libc::ENODEV | nix::libc::EAFNOSUPPORT) => Ok(false),
        _ => Err(error),
    })
}

/// A host that does not route to an address says so in one of these ways.
fn is_unreachable(error: &io::Error) -> bool {
    use nix::libc::{EACCES, EAFNOSUPPORT, EHOSTUNREACH, EINVAL, ENETUNREACH};
    matches!(error.raw_os_error(), Some(EACCES | EAFNOSUPPORT | EHOSTUNREACH | EINVAL | ENETUNREACH))
}
