//! Where redirected connections of host processes were going.

use std::cell::RefCell;
use std::net::{IpAddr, SocketAddr};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use culvert_proxy_ebpf::{Address, Endpoint, FlowKey, TCP};

use super::error::{InterceptError, chain};
use super::{joins, kernel};

/// One worker's view of the connections that host processes were redirected with.
///
/// The kernel notes a connection before its first packet is sent, so that it is known when it is accepted. This is a map
/// and not SO_ORIGINAL_DST by a getsockopt program, which would have to be attached to the daemon's own cgroup: that may be
/// the root's, and every getsockopt() of its processes would pay for it.
pub struct HostFlows(RefCell<HashMap<MapData, FlowKey, Endpoint>>);

impl HostFlows {
    /// Of the loaded programs.
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, InterceptError> {
        const NAME: &str = "FLOWS";
        let own = HashMap::try_from(joins::own(ebpf, NAME)?).map_err(|source| InterceptError::load(NAME, &source))?;
        Ok(Self(RefCell::new(own)))
    }

    /// Where a connection was going that was accepted on this port; `None`: it was not redirected. The kernel forgets it.
    pub fn take(&self, client: SocketAddr, listener_port: u16) -> Option<SocketAddr> {
        let client = Endpoint::new(kernel::address(client.ip()), client.port(), TCP);
        let key = FlowKey { client, listener_port: listener_port.into() };
        let mut flows = self.0.borrow_mut();
        let found = match flows.get(&key, 0) {
            Ok(found) => found,
            Err(MapError::KeyNotFound) => return None,
            Err(error) => {
                tracing::warn!(error = chain(&error), "cannot read where host processes connect to");
                return None;
            }
        };
        // Gone already if the client could not finish connecting.
        let _ = flows.remove(&key);
        Some(socket_address(&found))
    }

    /// How many connections wait to be taken.
    pub fn len(&self) -> usize {
        self.0.borrow().keys().filter(Result::is_ok).count()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// An endpoint as the rest of the daemon knows it.
pub(super) fn socket_address(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(ip(endpoint.address), endpoint.port)
}

fn ip(address: Address) -> IpAddr {
    IpAddr::from(address).to_canonical()
}
