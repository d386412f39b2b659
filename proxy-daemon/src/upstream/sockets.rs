//! How connections to the hosts of a cluster are encrypted: `transport_socket` and `transport_socket_matches`.

use std::sync::Arc;

use crate::{
    config::model::{ClusterConfig, SocketIndex, UpstreamTlsContext},
    stats::Scope,
    tls::{ClientTls, Secrets},
};

/// The transport sockets of a cluster, by [`SocketIndex`]; `None`: plain.
#[derive(Debug)]
pub struct Sockets(Box<[Option<Arc<ClientTls>>]>);

impl Sockets {
    /// Those of a cluster with statistics in `scope`, each as `change` makes it.
    pub(super) fn new(
        config: &ClusterConfig,
        scope: &Scope,
        secrets: &Arc<Secrets>,
        change: impl Fn(&Arc<UpstreamTlsContext>) -> Arc<UpstreamTlsContext>,
    ) -> Sockets {
        let made = |tls: Option<&Arc<UpstreamTlsContext>>| tls.map(|tls| ClientTls::new(change(tls), scope, secrets));
        Sockets(config.sockets().map(made).collect())
    }

    /// The cluster's own.
    pub fn own(&self) -> Option<&Arc<ClientTls>> {
        self.get(SocketIndex::default())
    }

    /// The one in this place.
    pub fn get(&self, index: SocketIndex) -> Option<&Arc<ClientTls>> {
        self.0.get(usize::from(index.0))?.as_ref()
    }

    /// All that encrypt.
    pub fn encrypted(&self) -> impl Iterator<Item = &Arc<ClientTls>> {
        self.0.iter().flatten()
    }
}
