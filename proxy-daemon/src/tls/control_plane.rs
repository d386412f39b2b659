//! TLS to control planes: clusters of the bootstrap that a config source, load reports or health discovery name.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::IpAddr,
    sync::Arc,
};

use culvert_xds_client::source::{Server, Tls};
use rustls::{ClientConfig, ClientConnection, CommonState, pki_types::ServerName};

use super::{
    client::{AlpnFallback, ClientTls},
    secrets::Secrets,
};
use crate::{
    config::model::{ClusterConfig, EndpointAddress, PeerNameOptions},
    stats::Scope,
};

/// The context of a server whose secrets nobody has been asked for yet: there are no connections to it.
#[derive(Debug)]
struct NotReady;

/// What stands for a server's TLS until [`secure_servers`]: it lets nothing through.
pub fn not_ready() -> Arc<dyn Tls> {
    Arc::new(NotReady)
}

impl Tls for NotReady {
    fn handshake(&self, _: &str, _: &str, _: IpAddr) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        None
    }

    fn done(&self, _: Result<&ClientConnection, &io::Error>) {}
}

/// A cluster's context, for connections that are not its workers'. It counts where theirs does.
#[derive(Debug)]
struct ServerTls {
    tls: Arc<ClientTls>,
    /// Names of endpoints, by address.
    hostnames: HashMap<String, String>,
    /// What calls make of the handshake.
    peer_name: Option<PeerNameOptions>,
}

impl Tls for ServerTls {
    fn handshake(
        &self,
        authority: &str,
        endpoint: &str,
        peer: IpAddr,
    ) -> Option<(Arc<ClientConfig>, ServerName<'static>)> {
        let called = self.peer_name.as_ref().and_then(|options| options.of(authority));
        let hostname = self.hostnames.get(endpoint).map_or("", String::as_str);
        let name = self.tls.server_name(hostname, peer, called.as_ref());
        let config = self.tls.config(AlpnFallback::None, called.as_ref(), &name);
        if config.is_none() {
            self.tls.not_ready();
        }
        Some((config?, name))
    }

    fn done(&self, handshake: Result<&ClientConnection, &io::Error>) {
        self.tls.count(handshake.map(|connection| -> &CommonState { connection }));
    }
}

/// Gives each server the TLS context of its cluster, whose secrets come from `secrets`, now or later.
pub fn secure_servers(servers: &mut BTreeMap<String, Server>, clusters: &[ClusterConfig], secrets: &Arc<Secrets>) {
    for cluster in clusters {
        let (Some(server), Some(config)) = (servers.get_mut(&*cluster.name), &cluster.tls) else { continue };
        let endpoints = cluster.endpoints.iter().flat_map(|group| &group.endpoints);
        let hostnames = endpoints.filter_map(|endpoint| {
            let name = match &endpoint.address {
                _ if !endpoint.hostname.is_empty() => &endpoint.hostname,
                EndpointAddress::Dns { host, .. } => host,
                _ => return None,
            };
            Some((endpoint.address.dial(), name.to_string()))
        });
        let hostnames = hostnames.collect();
        let tls = ClientTls::new(Arc::clone(config), &Scope::cluster(&cluster.stat_name), secrets);
        server.tls = Some(Arc::new(ServerTls { tls, hostnames, peer_name: cluster.peer_name.clone() }));
    }
}
