//! Ends UDP sockets' connections to backends that are gone.
//!
//! The kernel leads a UDP socket to a backend when it connects, and not again: its datagrams would go to that address for
//! good. So such sockets are told, as if the network had refused them (ECONNABORTED), and disconnected. Programs then connect
//! anew, and get another backend.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use culvert_proxy_ebpf::{Address, Connected, UDP};
use nix::sched::{CloneFlags, setns};

use super::kernel::address;
use super::sock_diag::SockDiag;

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
    let diag = SockDiag::open(UDP)?;
    let mut ended = 0;
    for socket in diag.list()? {
        // What connected elsewhere meanwhile is let be.
        if cookies.get(&socket.cookie()).is_some_and(|backend| *backend == address(socket.remote().0)) {
            diag.destroy(&socket)?;
            ended += 1;
        }
    }
    Ok(ended)
}

/// Which of these cookies are of UDP sockets in the calling thread's network namespace.
#[cfg(test)]
fn present(cookies: &std::collections::HashSet<u64>) -> io::Result<usize> {
    let sockets = SockDiag::open(UDP)?.list()?;
    Ok(sockets.iter().filter(|socket| cookies.contains(&socket.cookie())).count())
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
}
