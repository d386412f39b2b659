use std::{collections::HashMap, sync::Arc};

use culvert_xds_client::source::Source;
use tokio::sync::mpsc;

use super::addresses::Addresses;
use crate::{
    config::model::{ClusterConfig, Listener, LocalityEndpoints, RouteConfig, Scope, Secret, SecretName},
    http::filters::{DiscoveredFilter, Factory, OffloadedTable},
    layered_runtime::{Entry, Runtime},
    listener::Prints,
    runtime::{DataPlane, PreparedListener},
    upstream::{ClusterChange, health_check::ClusterChecks},
};

/// Is told what became of something that happens later. Never called before the method that it was given to has returned.
pub type Told = Box<dyn FnOnce(Result<(), String>) + Send>;

/// Is told what the names of a cluster were found to be; nothing, where a look-up failed. Never called before the method that it was
/// given to has returned.
pub type Resolved = Box<dyn FnOnce(Option<Arc<[LocalityEndpoints]>>) + Send>;

/// What the store does to the data plane. [`Applier`] does it; tests record instead.
pub trait Apply: Send + Sync + 'static {
    /// See [`DataPlane::change_clusters`].
    fn change_clusters(&self, changes: Vec<ClusterChange>);
    /// See [`DataPlane::resolve`]. Happens later.
    fn resolve(&self, config: &ClusterConfig, told: Resolved);
    /// See [`DataPlane::check_first`]. Happens later.
    fn check_first(
        &self,
        config: &ClusterConfig,
        endpoints: &Arc<[LocalityEndpoints]>,
        warm: Box<dyn FnOnce() + Send>,
    ) -> Option<Arc<ClusterChecks>>;
    /// See [`DataPlane::set_endpoints`].
    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]);
    /// See [`DataPlane::set_routes`].
    fn set_routes(&self, source: &Arc<Source>, name: &Arc<str>, routes: Arc<RouteConfig>);
    /// See [`DataPlane::remove_routes`].
    fn remove_routes(&self, source: &Arc<Source>, name: &Arc<str>);
    /// See [`DataPlane::set_scopes`].
    fn set_scopes(&self, source: &Arc<Source>, scopes: Arc<[Arc<Scope>]>);
    /// See [`DataPlane::remove_scopes`].
    fn remove_scopes(&self, source: &Arc<Source>);
    /// See [`Runtime::set_rtds`].
    fn set_runtime(&self, source: &Source, name: &str, values: HashMap<String, Entry>);
    /// See [`DiscoveredFilter::set`].
    fn set_filter(&self, place: &DiscoveredFilter, delivered: Option<Factory>);
    /// See [`Secrets::put`](crate::tls::Secrets::put).
    fn set_secret(&self, name: SecretName, secret: Secret);
    /// See [`Secrets::tell`](crate::tls::Secrets::tell). Called when a change has been made, and nothing is locked.
    fn tell_secret_users(&self);
    /// See [`Secrets::remove`](crate::tls::Secrets::remove).
    fn remove_secret(&self, name: &SecretName);
    /// See [`DataPlane::set_offloaded`].
    fn set_offloaded(&self, table: OffloadedTable);
    /// Makes a listener ready to be started; one of the same name that was prepared before and not started is given up.
    /// See [`DataPlane::prepare_listener`]. Happens later, in order.
    fn prepare_listener(&self, listener: Arc<Listener>, prints: Option<Prints>, told: Told);
    /// Starts what was prepared last by this name. See [`DataPlane::start_listener`]. Happens later, in order.
    fn start_listener(&self, name: &str, told: Told);
    /// Gives up what was prepared, and see [`DataPlane::remove_listener`]. Happens later, in order.
    fn remove_listener(&self, name: &str);
}

/// Applies to the data plane; listener changes, which have to wait for the workers, are carried out one after another.
pub struct Applier {
    plane: DataPlane,
    runtime: Runtime,
    listeners: mpsc::UnboundedSender<ListenerChange>,
}

enum ListenerChange {
    Prepare(Arc<Listener>, Option<Prints>, Told),
    Start(String, Told),
    Remove(String),
}

impl Applier {
    /// The applier, and what carries out its changes of listeners, which is to run on the control runtime as long as the applier is
    /// used.
    pub fn new(plane: DataPlane, runtime: Runtime) -> (Applier, impl Future<Output = ()> + Send + use<>) {
        let (listeners, changes) = mpsc::unbounded_channel();
        let carry_out = carry_out(plane.clone(), changes);
        (Applier { plane, runtime, listeners }, carry_out)
    }

    fn later(&self, change: ListenerChange) {
        // The task ends with the process: nobody is left to be told.
        let _ = self.listeners.send(change);
    }
}

/// Listeners that are ready to be started.
#[derive(Default)]
struct Prepared {
    by_name: HashMap<String, PreparedListener>,
    addresses: Addresses,
}

impl Prepared {
    fn put(&mut self, ready: PreparedListener) {
        self.addresses.add(ready.config());
        self.by_name.insert(ready.config().name.to_string(), ready);
    }

    fn take(&mut self, name: &str) -> Option<PreparedListener> {
        let ready = self.by_name.remove(name)?;
        self.addresses.remove(ready.config());
        Some(ready)
    }

    /// Why a listener cannot be prepared: the kernel lets several have an address that nobody listens on yet.
    fn taken(&self, listener: &Listener) -> Option<String> {
        self.addresses.others(listener).find_map(|(name, _)| {
            let address = self.by_name.get(&**name)?.shared_address(listener)?;
            Some(format!("cannot bind {address}: listener '{name}' has the same address"))
        })
    }
}

/// Carries changes out in their order.
async fn carry_out(plane: DataPlane, mut changes: mpsc::UnboundedReceiver<ListenerChange>) {
    let mut prepared = Prepared::default();
    while let Some(change) = changes.recv().await {
        match change {
            ListenerChange::Prepare(listener, prints, told) => {
                // First, for it may have the addresses that are wanted now.
                drop(prepared.take(&listener.name));
                let taken = prepared.taken(&listener);
                let result = taken.map_or_else(|| plane.prepare_listener(listener, prints), Err);
                told(result.map(|ready| prepared.put(ready)));
            }
            ListenerChange::Start(name, told) => {
                // Absent where it was removed, or prepared anew, in between: nobody waits for it then.
                if let Some(ready) = prepared.take(&name) {
                    told(plane.start_listener(ready).await);
                }
            }
            ListenerChange::Remove(name) => {
                drop(prepared.take(&name));
                plane.remove_listener(&name).await;
            }
        }
    }
}

impl Apply for Applier {
    fn change_clusters(&self, changes: Vec<ClusterChange>) {
        self.plane.change_clusters(changes);
    }

    fn resolve(&self, config: &ClusterConfig, told: Resolved) {
        self.plane.resolve(config.clone(), told);
    }

    fn check_first(
        &self,
        config: &ClusterConfig,
        endpoints: &Arc<[LocalityEndpoints]>,
        warm: Box<dyn FnOnce() + Send>,
    ) -> Option<Arc<ClusterChecks>> {
        self.plane.check_first(config, endpoints, warm)
    }

    fn set_endpoints(&self, cluster: &str, endpoints: &[LocalityEndpoints]) {
        self.plane.set_endpoints(cluster, endpoints);
    }

    fn set_routes(&self, source: &Arc<Source>, name: &Arc<str>, routes: Arc<RouteConfig>) {
        self.plane.set_routes(source, name, routes);
    }

    fn remove_routes(&self, source: &Arc<Source>, name: &Arc<str>) {
        self.plane.remove_routes(source, name);
    }

    fn set_scopes(&self, source: &Arc<Source>, scopes: Arc<[Arc<Scope>]>) {
        self.plane.set_scopes(source, scopes);
    }

    fn remove_scopes(&self, source: &Arc<Source>) {
        self.plane.remove_scopes(source);
    }

    fn set_runtime(&self, source: &Source, name: &str, values: HashMap<String, Entry>) {
        self.runtime.set_rtds(source, name, values);
    }

    fn set_filter(&self, place: &DiscoveredFilter, delivered: Option<Factory>) {
        place.set(delivered);
    }

    fn set_secret(&self, name: SecretName, secret: Secret) {
        self.plane.secrets().put(name, secret);
    }

    fn tell_secret_users(&self) {
        self.plane.secrets().tell();
    }

    fn remove_secret(&self, name: &SecretName) {
        self.plane.secrets().remove(name);
    }

    fn set_offloaded(&self, table: OffloadedTable) {
        self.plane.set_offloaded(table);
    }

    fn prepare_listener(&self, listener: Arc<Listener>, prints: Option<Prints>, told: Told) {
        self.later(ListenerChange::Prepare(listener, prints, told));
    }

    fn start_listener(&self, name: &str, told: Told) {
        self.later(ListenerChange::Start(name.to_owned(), told));
    }

    fn remove_listener(&self, name: &str) {
        self.later(ListenerChange::Remove(name.to_owned()));
    }
}
