use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

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
    /// Why the last version of a listener is not serving; `None` where it is, or is still to be tried.
    fn listener_failure(&self, _name: &str) -> Option<String> {
        None
    }
}

/// How long until a listener that could not be bound is tried again: whoever has its port may go.
const RETRY: Duration = Duration::from_secs(1);

/// Applies to the data plane; listener changes, which have to wait for the workers, are carried out one after another.
pub struct Applier {
    plane: DataPlane,
    listeners: mpsc::UnboundedSender<ListenerChange>,
    failures: Failures,
}

/// Listeners that could not be bound, by name, with the reason.
#[derive(Clone, Default)]
struct Failures(Arc<Mutex<ByName>>);

type ByName = BTreeMap<Arc<str>, (Arc<Listener>, String)>;

impl Failures {
    fn lock(&self) -> MutexGuard<'_, ByName> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

enum ListenerChange {
    Upsert(Arc<Listener>),
    Remove(String),
}

impl Applier {
    /// Must be called within the control runtime.
    pub fn new(plane: DataPlane) -> Applier {
        let (listeners, changes) = mpsc::unbounded_channel();
        let failures = Failures::default();
        tokio::spawn(carry_out(plane.clone(), changes, failures.clone()));
        Applier { plane, listeners, failures }
    }
}

/// Carries changes out in their order, and tries again what could not be bound.
async fn carry_out(plane: DataPlane, mut changes: mpsc::UnboundedReceiver<ListenerChange>, failures: Failures) {
    loop {
        let waiting = !failures.lock().is_empty();
        tokio::select! {
            change = changes.recv() => match change {
                None => return,
                Some(ListenerChange::Remove(name)) => {
                    failures.lock().remove(name.as_str());
                    plane.remove_listener(&name).await;
                }
                Some(ListenerChange::Upsert(listener)) => {
                    failures.lock().remove(&listener.name);
                    bind(&plane, listener, &failures, false).await;
                }
            },
            () = tokio::time::sleep(RETRY), if waiting => {
                let again: Vec<_> = failures.lock().values().map(|(listener, _)| Arc::clone(listener)).collect();
                for listener in again {
                    bind(&plane, listener, &failures, true).await;
                }
            }
        }
    }
}

async fn bind(plane: &DataPlane, listener: Arc<Listener>, failures: &Failures, again: bool) {
    let name = Arc::clone(&listener.name);
    match plane.upsert_listener(Arc::clone(&listener)).await {
        Ok(()) => {
            stats::counter("listener_manager.listener_create_success").inc();
            if failures.lock().remove(&name).is_some() {
                tracing::info!(listener = %name, "listener is serving after all");
            }
        }
        Err(error) => {
            // Counted and logged once: the attempts that follow say nothing new.
            if !again {
                stats::counter("listener_manager.listener_create_failure").inc();
                tracing::error!(listener = %name, %error, "listener is not serving; trying again every second");
            }
            failures.lock().insert(name, (listener, error));
        }
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

    fn listener_failure(&self, name: &str) -> Option<String> {
        self.failures.lock().get(name).map(|(_, error)| error.clone())
    }
}
