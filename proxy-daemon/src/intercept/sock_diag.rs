//! The sockets of a network namespace, and their end (inet_diag; linux/inet_diag.h).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use nix::libc::{AF_INET, AF_INET6};

/// States of TCP, as the kernel numbers them.
pub(super) const TIME_WAIT: u8 = 6;
const LISTEN: u8 = 10;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Of `struct nlmsghdr`, `struct inet_diag_sockid` and what comes before that in requests and in answers.
const HEADER: usize = 16;
const SOCKET_ID: usize = 48;
const BEFORE_ID_IN_REQUEST: usize = 8;
const BEFORE_ID_IN_ANSWER: usize = 4;
/// Where an answer has the number of the socket's file.
const INODE: usize = 68;

/// Asks about the sockets of one protocol.
pub(super) struct SockDiag {
    socket: Socket,
    protocol: u8,
}

/// A socket, as it was when it was listed.
pub(super) struct Found {
    family: i32,
    /// As the kernel numbers it.
    pub(super) state: u8,
    id: [u8; SOCKET_ID],
    /// The number of the file that a program has of it; 0: none has.
    pub(super) inode: u32,
}

impl Found {
    fn read(body: &[u8]) -> Option<Self> {
        let (family, state) = (i32::from(*body.first()?), *body.get(1)?);
        let id = *body.get(BEFORE_ID_IN_ANSWER..)?.first_chunk()?;
        let inode = u32::from_ne_bytes(*body.get(INODE..)?.first_chunk()?);
        Some(Self { family, state, id, inode })
    }

    /// The socket's cookie: the last two words of its id.
    pub(super) fn cookie(&self) -> u64 {
        let word = |at: usize| self.id[at..].first_chunk().map_or(0, |bytes| u64::from(u32::from_ne_bytes(*bytes)));
        word(40) | word(44) << 32
    }

    /// Its own address and port; IPv4 as such, also where the socket is of IPv6.
    pub(super) fn local(&self) -> (IpAddr, u16) {
        self.end(4, 0)
    }

    /// Whom it is connected to.
    pub(super) fn remote(&self) -> (IpAddr, u16) {
        self.end(20, 2)
    }

    fn end(&self, address: usize, port: usize) -> (IpAddr, u16) {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&self.id[address..address + 16]);
        let [a, b, c, d, ..] = bytes;
        let address = match self.family {
            AF_INET => IpAddr::V4(Ipv4Addr::new(a, b, c, d)),
            _ => IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical(),
        };
        (address, u16::from_be_bytes([self.id[port], self.id[port + 1]]))
    }
}

impl SockDiag {
    /// About the calling thread's network namespace.
    pub(super) fn open(protocol: u8) -> io::Result<Self> {
        Ok(Self { socket: Socket::new(NETLINK_SOCK_DIAG)?, protocol })
    }

    /// All sockets of the protocol, but for those that only listen.
    pub(super) fn list(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for family in [AF_INET, AF_INET6] {
            self.list_family(family, &mut found)?;
        }
        Ok(found)
    }

    fn list_family(&self, family: i32, found: &mut Vec<Found>) -> io::Result<()> {
        self.send(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, &[0; SOCKET_ID])?;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for (kind, body) in messages(&datagram) {
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => return Err(error_of(body).unwrap_or_else(|| io::Error::other("no answer"))),
                    SOCK_DIAG_BY_FAMILY => found.extend(Found::read(body)),
                    _ => {}
                }
            }
        }
    }

    /// Ends a socket's connection, with a reset where there is one to reset. One that is gone already is no error.
    pub(super) fn destroy(&self, found: &Found) -> io::Result<()> {
        self.send(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, found.family, &found.id)?;
        let (datagram, _) = self.socket.recv_from_full()?;
        match messages(&datagram).find(|(kind, _)| *kind == NLMSG_ERROR).and_then(|(_, body)| error_of(body)) {
            Some(error) if error.raw_os_error() != Some(nix::libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }

    fn send(&self, kind: u16, flags: u16, family: i32, id: &[u8; SOCKET_ID]) -> io::Result<()> {
        let length = HEADER + BEFORE_ID_IN_REQUEST + SOCKET_ID;
        let mut message = Vec::with_capacity(length);
        message.extend_from_slice(&(length as u32).to_ne_bytes());
        message.extend_from_slice(&kind.to_ne_bytes());
        message.extend_from_slice(&flags.to_ne_bytes());
        // Sequence number and port.
        message.extend_from_slice(&[0; 8]);
        // No extensions; sockets in any state but that of listeners.
        message.extend_from_slice(&[family as u8, self.protocol, 0, 0]);
        message.extend_from_slice(&(!(1_u32 << LISTEN)).to_ne_bytes());
        message.extend_from_slice(id);
        self.socket.send(&message, 0).map(drop)
    }
}

/// The messages of a datagram: kind and body.
fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (header, _) = datagram.split_first_chunk::<HEADER>()?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// What went wrong; `None`: nothing.
fn error_of(body: &[u8]) -> Option<io::Error> {
    let code = i32::from_ne_bytes(*body.first_chunk::<4>()?);
    (code != 0).then(|| io::Error::from_raw_os_error(-code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_that_end_early_are_read_as_far_as_they_go() {
        assert_eq!(messages(&[0; 15]).count(), 0);
        let mut two = Vec::new();
        for kind in [7_u16, 8] {
            two.extend_from_slice(&20_u32.to_ne_bytes());
            two.extend_from_slice(&kind.to_ne_bytes());
            two.extend_from_slice(&[0; 10]);
            two.extend_from_slice(&1_u32.to_ne_bytes());
        }
        let kinds: Vec<_> = messages(&two).map(|(kind, body)| (kind, body.len())).collect();
        assert_eq!(kinds, [(7, 4), (8, 4)]);
        assert_eq!(messages(&two[..30]).count(), 1);
    }

    #[test]
    fn connections_are_listed_with_both_ends() {
        use std::os::unix::fs::MetadataExt as _;
        let listener = std::net::TcpListener::bind("[::]:0").unwrap();
        let client = std::net::TcpStream::connect(("127.0.0.1", listener.local_addr().unwrap().port())).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let sockets = SockDiag::open(nix::libc::IPPROTO_TCP as u8).unwrap().list().unwrap();
        let ends = |stream: &std::net::TcpStream| {
            let (local, remote) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
            ((local.ip().to_canonical(), local.port()), (remote.ip().to_canonical(), remote.port()))
        };
        for stream in [&client, &accepted] {
            let found: Vec<&Found> =
                sockets.iter().filter(|found| (found.local(), found.remote()) == ends(stream)).collect();
            let file = std::fs::File::from(std::os::fd::OwnedFd::from(stream.try_clone().unwrap()));
            let inode = file.metadata().unwrap().ino();
            assert_eq!(found.iter().map(|found| u64::from(found.inode)).collect::<Vec<_>>(), [inode]);
        }
        let port = listener.local_addr().unwrap().port();
        assert!(sockets.iter().all(|found| found.local().1 != port || found.remote().1 != 0), "a listener is listed");
    }
}
