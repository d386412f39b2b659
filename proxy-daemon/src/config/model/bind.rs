use std::net::SocketAddr;

/// `upstream_bind_config`: where connections to hosts come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamBind {
    /// At most one of each family; none: the system chooses.
    pub addresses: Vec<BindAddress>,
    /// Addresses may be used that this node does not have; `None`: nothing is said of it.
    pub freebind: Option<bool>,
    /// What is set on the sockets.
    pub options: Vec<SocketOption>,
}

/// One of the addresses of [`UpstreamBind`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BindAddress {
    /// Port 0: any.
    pub address: SocketAddr,
    /// In the place of the others.
    pub options: Option<Vec<SocketOption>>,
}

/// `envoy.config.core.v3.SocketOption`, for setsockopt(2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SocketOption {
    /// For example `SOL_SOCKET`.
    pub level: i32,
    /// For example `SO_MARK`.
    pub name: i32,
    /// As the kernel wants it: numbers are C's `int`.
    pub value: Box<[u8]>,
    /// It is set before the socket is bound, otherwise after that.
    pub before_bind: bool,
}

impl UpstreamBind {
    /// A cluster's own, where this holds for all that say nothing: `cluster_manager.upstream_bind_config`. Of that no addresses are taken.
    #[must_use]
    pub fn over(self, all: &UpstreamBind) -> UpstreamBind {
        UpstreamBind {
            addresses: self.addresses,
            freebind: self.freebind.or(all.freebind),
            options: if self.options.is_empty() { all.options.clone() } else { self.options },
        }
    }

    /// Where a connection to a host comes from, and what is set on its socket.
    pub fn choose(&self, host: SocketAddr) -> (Option<SocketAddr>, &[SocketOption]) {
        let same = self.addresses.iter().find(|source| source.address.is_ipv6() == host.is_ipv6());
        // As in Envoy: the first even where it is of the other family, which the system then refuses.
        let source = same.or(self.addresses.first());
        let options = source.and_then(|source| source.options.as_deref()).unwrap_or(&self.options);
        (source.map(|source| source.address), options)
    }
}
