//! Ports for many listeners of proxies under test.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

/// Ports of 127.0.0.1 that nobody else is given as long as this lives: they are bound, but in a way that lets proxies bind them too. A
/// port that was only free a moment ago may be another test's by the time at which it is used, and as proxies listen with
/// `SO_REUSEPORT`, both would get some of the connections.
#[derive(Debug, Default)]
pub struct HeldPorts(Vec<Socket>);

impl HeldPorts {
    /// One more.
    pub fn hold(&mut self) -> Result<u16> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
        let port = socket.local_addr()?.as_socket().context("an address of IP")?.port();
        self.0.push(socket);
        Ok(port)
    }
}
