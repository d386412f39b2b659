//! `envoy.filters.network.sni_dynamic_forward_proxy`: has the host that a TLS client asks for looked up before the TCP proxy behind it goes
//! on to a `envoy.clusters.dynamic_forward_proxy` cluster.

use crate::{config::model::SniForwardProxyConfig, listener::ConnectionInfo, upstream::Asked};

/// Waits until what is known of the host that a connection asks for is known; `false`: too many hosts or connections are looked up
/// already, and this one ends. Without a name there is nothing to wait for, and no host later.
pub(super) async fn look_up(config: &SniForwardProxyConfig, info: &ConnectionInfo) -> bool {
    let Some(name) = info.requested_server_name().filter(|name| !name.is_empty()) else { return true };
    match config.cache.ask(name, config.port) {
        Asked::Known(_) => true,
        Asked::HostOverflow | Asked::PendingOverflow => false,
        Asked::Pending(mut pending) => {
            // Where nothing is found, the cluster has no host for it.
            pending.over().await;
            true
        }
    }
}
