use std::sync::Arc;

use tokio::sync::mpsc;

use crate::{
    config::model::{ClusterConfig, Listener, LocalityEndpoints, RouteConfig},
    http::filters::OffloadedTable,
    runtime::DataPlane,
    stats,
};

/// What the store does to the data plane. [`Applier`] does it; tests record instead.
pub trait Apply: Send + Sync + 'static {
    /// See [`DataPlane::upsert_cluster`].
    fn upsert_cluster(&self, config: ClusterConfig);
    /// See [`DataPlane::remove_cluster`].
    fn remove_cluster(&self, name: &str);
    /// See [`DataPlane::set_endpoints`].
    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]);
    /// See [`DataPlane::set_routes`].
    fn set_routes(&self, name: &str, routes: Arc<RouteConfig>);
    /// See [`DataPlane::set_offloaded`].
    fn set_offloaded(&self, table: OffloadedTable);
    /// See [`DataPlane::upsert_listener`]. Happens later, in order.
    fn upsert_listener(&self, listener: Arc<Listener>);
    /// See [`DataPlane::remove_listener`]. Happens later, in order.
    fn remove_listener(&self, name: &str);
}

/// Applies to the data plane; listener changes, which have to wait for the workers, are carried out one after another.
pub struct Applier {
    plane: DataPlane,
    listeners: mpsc::UnboundedSender<ListenerChange>,
}

enum ListenerChange {
    Upsert(Arc<Listener>),
    Remove(String),
}

impl Applier {
    /// Must be called within the control runtime.
    pub fn new(plane: DataPlane) -> Applier {
        let (listeners, mut changes) = mpsc::unbounded_channel();
        let worker = plane.clone();
        let failures = stats::counter("listener_manager.listener_create_failure");
        let successes = stats::counter("listener_manager.listener_create_success");
        tokio::spawn(async move {
            while let Some(change) = changes.recv().await {
                match change {
                    ListenerChange::Remove(name) => worker.remove_listener(&name).await,
                    ListenerChange::Upsert(listener) => {
                        let name = Arc::clone(&listener.name);
                        match worker.upsert_listener(listener).await {
                            Ok(()) => successes.inc(),
                            Err(error) => {
                                failures.inc();
                                tracing::error!(listener = %name, %error, "listener is not serving");
                            }
                        }
                    }
                }
            }
        });
        Applier { plane, listeners }
    }
}

impl Apply for Applier {
    fn upsert_cluster(&self, config: ClusterConfig) {
        self.plane.upsert_cluster(config);
    }

    fn remove_cluster(&self, name: &str) {
        self.plane.remove_cluster(name);
    }

    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        self.plane.set_endpoints(cluster, endpoints);
    }

    fn set_routes(&self, name: &str, routes: Arc<RouteConfig>) {
        self.plane.set_routes(name, routes);
    }

    fn set_offloaded(&self, table: OffloadedTable) {
        self.plane.set_offloaded(table);
    }

    fn upsert_listener(&self, listener: Arc<Listener>) {
        // The task ends with the process: nobody is left to be told.
        let _ = self.listeners.send(ListenerChange::Upsert(listener));
    }

    fn remove_listener(&self, name: &str) {
        let _ = self.listeners.send(ListenerChange::Remove(name.to_owned()));
    }
}
