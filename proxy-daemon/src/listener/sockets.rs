//! Listening sockets: one a worker and address.

use std::{
    io,
    net::{SocketAddr, TcpListener},
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    config::model::{ListenAddress, Listener},
    upstream::set_int,
};

/// A listener's sockets.
#[derive(Debug)]
pub struct BoundListener {
    /// By worker; each worker has one socket an address.
    pub per_worker: Vec<Vec<TcpListener>>,
    /// What they are bound to, with the ports that the kernel chose.
    pub addresses: Vec<SocketAddr>,
}

/// Binds the listener's addresses for `workers` workers.
///
/// Connections are spread over the workers by SO_REUSEPORT. An `intercepted` listener gets its connections from the
/// kernel programs, which choose the socket: there the first worker has the configured port and the others any port,
/// since `bpf_sk_assign` refuses SO_REUSEPORT sockets before Linux 6.6.
///
/// # Errors
/// One line that names the address and the reason.
pub fn bind(listener: &Listener, workers: usize, intercepted: bool) -> Result<BoundListener, String> {
    let mut bound = BoundListener { per_worker: (0..workers).map(|_| Vec::new()).collect(), addresses: Vec::new() };
    for wanted in &listener.addresses {
        let named = |error: io::Error| format!("cannot bind {}: {}", wanted.address, explain(&error));
        if wanted.address.port() != 0 {
            // With SO_REUSEPORT a second daemon would take half of the connections unnoticed.
            drop(open(listener, wanted, wanted.address, false).map_err(named)?);
        }
        let mut address = wanted.address;
        for (worker, sockets) in bound.per_worker.iter_mut().enumerate() {
            if intercepted && worker > 0 {
                address.set_port(0);
            }
            let socket = open(listener, wanted, address, !intercepted).map_err(named)?;
            if worker == 0 {
                address = socket.local_addr().map_err(named)?;
                bound.addresses.push(address);
            }
            sockets.push(socket);
        }
    }
    Ok(bound)
}

fn open(listener: &Listener, wanted: &ListenAddress, address: SocketAddr, reuse_port: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    if address.is_ipv6() {
        socket.set_only_v6(!wanted.ipv4_compat)?;
    }
    if listener.transparent {
        if address.is_ipv4() || wanted.ipv4_compat {
            socket.set_ip_transparent_v4(true)?;
        }
        if address.is_ipv6() {
            set_int(&socket, libc::SOL_IPV6, libc::IPV6_TRANSPARENT, 1)?;
        }
    }
    if listener.freebind {
        socket.set_freebind_v4(true)?;
    }
    socket.bind(&SockAddr::from(address))?;
    socket.listen(i32::try_from(listener.backlog).unwrap_or(i32::MAX))?;
    Ok(socket.into())
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "the address is in use by another process".to_owned(),
        io::ErrorKind::PermissionDenied => {
            "permission denied: ports below 1024 and transparent listeners need root or CAP_NET_BIND_SERVICE and \
             CAP_NET_ADMIN"
                .to_owned()
        }
        io::ErrorKind::AddrNotAvailable => "no interface of this host has that address".to_owned(),
        _ => error.to_string(),
    }
}
