//! Ends UDP sockets' connections to backends that are gone.
//!
//! The kernel leads a UDP socket to a backend when it connects, and not again: its datagrams would go to that address for
//! good. So such sockets are told, as if the network had refused them (ECONNABORTED), and disconnected. Programs then connect
//! anew, and get another backend.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use culvert_proxy_ebpf::{Address, Connected, UDP};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};
use nix::sched::{CloneFlags, setns};

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

/// Ends the connections of these sockets, given by their cookies, in a thread of its own. Returns at once.
pub(super) fn end(sockets: Vec<(u64, Connected)>) {
    let mut by_thread: HashMap<(u32, u32), HashMap<u64, Address>> = HashMap::new();
    for (cookie, connected) in sockets {
        let caller = (connected.process, connected.thread);
        by_thread.entry(caller).or_default().insert(cookie, connected.backend.address);
    }
    if by_thread.is_empty() {
        return;
    }
    // It changes its network namespace, so nothing else may run there.
    let thread = std::thread::Builder::new().name("intercept-udp".to_owned()).spawn(move || {
        for ((process, thread), cookies) in by_thread {
            match end_in_namespace_of(process, thread, &cookies) {
                Ok(ended) => tracing::debug!(process, ended, "UDP sockets of backends that are gone were told"),
                // It has ended, and its sockets with it.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    tracing::warn!(process, %error, "UDP sockets cannot be told that their backend is gone; \
                                   this needs the host's PID namespace and CONFIG_INET_DIAG_DESTROY");
                }
            }
        }
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "UDP sockets cannot be told that their backend is gone");
    }
}

/// Ends those of the sockets that are in the network namespace of a thread, or if that has ended of its process, and says
/// how many.
fn end_in_namespace_of(process: u32, thread: u32, cookies: &HashMap<u64, Address>) -> io::Result<usize> {
    let namespace = File::open(format!("/proc/{process}/task/{thread}/ns/net"))
        .or_else(|_| File::open(format!("/proc/{process}/ns/net")))?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    let mut ended = 0;
    for family in [nix::libc::AF_INET, nix::libc::AF_INET6] {
        for id in list(&socket, family as u8)? {
            let cookie = cookie_of(&id);
            // What connected elsewhere meanwhile is let be.
            if cookies.get(&cookie).is_some_and(|backend| *backend == remote_of(&id, family)) {
                destroy(&socket, family as u8, &id)?;
                ended += 1;
            }
        }
    }
    Ok(ended)
}

type SocketId = [u8; SOCKET_ID];

/// The socket's cookie: the last two words of its id.
fn cookie_of(id: &SocketId) -> u64 {
    let word = |at: usize| u64::from(u32::from_ne_bytes([id[at], id[at + 1], id[at + 2], id[at + 3]]));
    word(40) | word(44) << 32
}

/// Whom the socket is connected to.
fn remote_of(id: &SocketId, family: i32) -> Address {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&id[20..36]);
    match family {
        nix::libc::AF_INET => super::kernel::address(IpAddr::from([bytes[0], bytes[1], bytes[2], bytes[3]])),
        _ => bytes,
    }
}

/// The ids of all UDP sockets of a family.
fn list(socket: &Socket, family: u8) -> io::Result<Vec<SocketId>> {
    send(socket, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, family, &[0; SOCKET_ID])?;
    let mut ids = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for (kind, body) in messages(&datagram) {
            match kind {
                NLMSG_DONE => return Ok(ids),
                NLMSG_ERROR => return Err(error_of(body).unwrap_or_else(|| io::Error::other("no answer"))),
                SOCK_DIAG_BY_FAMILY => {
                    ids.extend(body.get(BEFORE_ID_IN_ANSWER..).and_then(|rest| rest.first_chunk::<SOCKET_ID>()));
                }
                _ => {}
            }
        }
    }
}

/// Ends a socket's connection. One that is gone already is no error.
fn destroy(socket: &Socket, family: u8, id: &SocketId) -> io::Result<()> {
    send(socket, SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, family, id)?;
    let (datagram, _) = socket.recv_from_full()?;
    match messages(&datagram).find(|(kind, _)| *kind == NLMSG_ERROR).and_then(|(_, body)| error_of(body)) {
        Some(error) if error.raw_os_error() != Some(nix::libc::ENOENT) => Err(error),
        _ => Ok(()),
    }
}

fn send(socket: &Socket, kind: u16, flags: u16, family: u8, id: &SocketId) -> io::Result<()> {
    let length = HEADER + BEFORE_ID_IN_REQUEST + SOCKET_ID;
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&(length as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    // Sequence number and port.
    message.extend_from_slice(&[0; 8]);
    // No extensions; sockets in any state.
    message.extend_from_slice(&[family, UDP, 0, 0]);
    message.extend_from_slice(&u32::MAX.to_ne_bytes());
    message.extend_from_slice(id);
    socket.send(&message, 0).map(drop)
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

/// Which of these cookies are of UDP sockets in the calling thread's network namespace.
#[cfg(test)]
fn present(cookies: &std::collections::HashSet<u64>) -> io::Result<usize> {
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    let ids = list(&socket, nix::libc::AF_INET as u8)?;
    Ok(ids.iter().filter(|id| cookies.contains(&cookie_of(id))).count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_found_by_their_cookies() {
        use std::os::fd::AsRawFd as _;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (mut cookie, mut length) = (0_u64, size_of::<u64>() as nix::libc::socklen_t);
        // SAFETY: the option's value is a u64, and `length` says so.
        let result = unsafe {
            nix::libc::getsockopt(
                socket.as_raw_fd(),
                nix::libc::SOL_SOCKET,
                nix::libc::SO_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        assert_eq!(result, 0);
        assert_eq!(present(&std::collections::HashSet::from([cookie])).unwrap(), 1);
        assert_eq!(present(&std::collections::HashSet::from([cookie + 1_000_000])).unwrap(), 0);
    }

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
}
