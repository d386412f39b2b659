//! Listening sockets: one a worker and address.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::{
    config::model::{ListenAddress, Listener},
    upstream::set_int,
};

/// The sockets of one address of a listener, bound and not listening: the kernel refuses connections until
/// [`listen`](BoundAddress::listen).
#[derive(Debug)]
pub struct BoundAddress {
    /// As configured.
    pub wanted: ListenAddress,
    /// What they are bound to, with the port that the kernel chose.
    pub address: SocketAddr,
    /// One for each worker.
    sockets: Vec<Socket>,
    backlog: i32,
}

impl BoundAddress {
    /// Opens the address; the sockets are in the order of the workers.
    ///
    /// # Errors
    /// One line that names the address and the reason.
    pub fn listen(self) -> Result<Vec<TcpListener>, String> {
        let listen = |socket: Socket| socket.listen(self.backlog).map(|()| socket.into());
        let sockets: io::Result<_> = self.sockets.into_iter().map(listen).collect();
        sockets.map_err(|error| format!("cannot listen on {}: {}", self.address, explain(&error)))
    }
}

/// A listener that gets its connections from the kernel programs.
#[derive(Debug, Clone, Copy)]
pub struct Intercepted {
    /// An earlier daemon still runs and has the port. What is redirected finds its socket by other means: any port does.
    pub takes_over: bool,
}

/// Binds one address of the listener for `workers` workers.
///
/// Connections are spread over the workers by SO_REUSEPORT. An `intercepted` listener gets its connections from the
/// kernel programs, which choose the socket: there the first worker has the configured port and the others any port,
/// since `bpf_sk_assign` refuses SO_REUSEPORT sockets before Linux 6.6. `shared`: the version before has the address.
/// `holder`: which other listener of ours has an address.
///
/// # Errors
/// One line that names the address and the reason.
pub fn bind(
    listener: &Listener,
    wanted: &ListenAddress,
    workers: usize,
    intercepted: Option<Intercepted>,
    shared: bool,
    holder: impl Fn(SocketAddr) -> Option<Arc<str>>,
) -> Result<BoundAddress, String> {
    let named = |error: io::Error| match holder(wanted.address).filter(|_| error.kind() == io::ErrorKind::AddrInUse) {
        Some(holder) => format!("cannot bind {}: the address is in use by listener '{holder}'", wanted.address),
        None => format!("cannot bind {}: {}", wanted.address, explain(&error)),
    };
    let mut address = wanted.address;
    if wanted.address.port() != 0 && !shared {
        // With SO_REUSEPORT a second daemon would take half of the connections unnoticed.
        let probe = open(listener, wanted, wanted.address, false).and_then(|probe| probe.listen(1));
        match probe {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && intercepted.is_some_and(|it| it.takes_over) => {
                tracing::info!(listener = %listener.name, %address, "the daemon before has the port: another one is used");
                address.set_port(0);
            }
            probe => probe.map_err(named)?,
        }
    }
    let intercepted = intercepted.is_some();
    let mut sockets = Vec::with_capacity(workers);
    for worker in 0..workers {
        if intercepted && worker > 0 {
            address.set_port(0);
        }
        let socket = open(listener, wanted, address, !intercepted).map_err(named)?;
        if worker == 0 {
            let bound = socket.local_addr().map_err(named)?;
            address = bound.as_socket().unwrap_or(address);
        }
        sockets.push(socket);
    }
    let address = sockets.first().and_then(|first| first.local_addr().ok()?.as_socket()).unwrap_or(address);
    let backlog = i32::try_from(listener.backlog).unwrap_or(i32::MAX);
    Ok(BoundAddress { wanted: wanted.clone(), address, sockets, backlog })
}

fn open(listener: &Listener, wanted: &ListenAddress, address: SocketAddr, reuse_port: bool) -> io::Result<Socket> {
    let socket = unbound(address, reuse_port)?;
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
    Ok(socket)
}

fn unbound(address: SocketAddr, reuse_port: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    // What is accepted takes it over, which saves a system call a connection.
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
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

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn what_is_accepted_holds_nothing_back() {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let socket = unbound(address, true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket.listen(1).unwrap();
        let _client = TcpStream::connect(socket.local_addr().unwrap().as_socket().unwrap()).unwrap();
        let (accepted, _) = socket.accept().unwrap();
        assert!(accepted.tcp_nodelay().unwrap());
    }
}
