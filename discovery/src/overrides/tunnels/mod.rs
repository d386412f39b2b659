//! Tunnels to developers' machines: an offloaded revision of a service whose one endpoint is discovery itself.
//!
//! ```text
//! culvert override connect --(1) GET, upgrade--> discovery        (1) authenticated; from then on discovery is an HTTP/2
//!        |     ^                                  |    ^               client on that connection, the developer's
//!        |     +---(3) one stream a connection----+    |               machine its server
//!        v                                            (2)         (2) a port of discovery, which proxies are told of as of
//! localhost:8080                                     proxies          an offloaded pod's
//! ```
//! (3) is CONNECT: HTTP/2 does the multiplexing, the flow control and the pings. When the connection is lost, which pings tell
//! within seconds, the port is closed and the revision is gone. Nothing is shared between replicas: the command line
//! connects to each.

mod asked;
mod carry;
mod ports;
pub mod relay;
mod settings;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use http::{Request, Response, StatusCode, header};
use hyper::body::Incoming;
use serde::Serialize;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::info;

use self::asked::{Asked, asked, find};
use self::ports::{Ports, Taken};
pub use self::settings::{MAX_CONNECTIONS, QUARANTINE, Settings};
use super::shares::now;
use crate::access::Denied;
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, MeshService, OffloadedEndpoint, cluster_name};

/// The path of the request that begins a tunnel.
pub const PATH: &str = "/overrides/tunnels";
/// The protocol that it asks to go over to.
pub const PROTOCOL: &str = "culvert-tunnel";
/// The header with the service: `name`, `name.namespace` or `name.namespace:port`.
pub const SERVICE: &str = "x-culvert-service";
/// The header with the revision.
pub const REVISION: &str = "x-culvert-revision";
/// The header with what tells a client that comes again from another: any text.
pub const SESSION: &str = "x-culvert-session";
/// The header of the answer that says which service's port it is: `name.namespace:port`.
pub const CLUSTER: &str = "x-culvert-cluster";
/// The header with a port of discovery: in the answer the tunnel's, in a request that of the client's last tunnel, which it is to have again
/// where it is free; 0: there was none.
pub const PORT: &str = "x-culvert-tunnel-port";
/// The header of the answer that says for how many more seconds no requests come, since proxies may know the port as another revision's.
pub const WAIT: &str = "x-culvert-tunnel-wait";
/// How often both sides ask whether the other one is there.
pub const PING: Duration = Duration::from_secs(2);
/// How long an answer to that may take.
pub const PING_TIMEOUT: Duration = Duration::from_secs(4);
/// How long a connection may be without a byte in either direction.
pub const IDLE: Duration = Duration::from_secs(3600);
/// The window of each connection in a tunnel, in bytes: what one side sends before the other takes it.
pub const STREAM_WINDOW: u32 = 256 * 1024;
/// The window of a whole tunnel.
pub const TUNNEL_WINDOW: u32 = 4 * 1024 * 1024;
/// What waits to be sent, of each connection.
pub const SEND_BUFFER: usize = 64 * 1024;

/// The cluster of endpoints that are tunnels.
pub const CLUSTER_OF_TUNNELS: &str = "tunnel";
/// How long the other side may take to begin, and to connect to what it leads to.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest header that is looked at, in bytes.
const MAX_HEADER: usize = 320;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Key {
    service: ObjectKey,
    port: u16,
    revision: String,
}

/// One tunnel.
#[derive(Debug)]
struct Tunnel {
    /// Where proxies connect to.
    address: SocketAddr,
    session: String,
    peer: SocketAddr,
    since: i64,
    /// Whether the other side is there, so that proxies are told.
    listed: bool,
    port: Arc<Port>,
    traffic: Arc<Traffic>,
    /// Turns true when another connection takes its place.
    replaced: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Traffic {
    open: AtomicUsize,
    total: AtomicU64,
    refused: AtomicU64,
}

/// A tunnel at `/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TunnelStatus {
    /// The service's Envoy cluster.
    pub envoy_cluster: String,
    /// The revision that it is.
    pub revision: String,
    /// Where proxies connect to.
    pub address: String,
    /// Where it comes from.
    pub peer: String,
    /// Since when it is open, in seconds since the epoch.
    pub since: i64,
    /// Its connections now.
    pub connections: usize,
    /// Its connections so far.
    pub connections_total: u64,
    /// Connections that were refused because there were too many, or because the other side did not take them.
    pub connections_refused: u64,
}

/// What tunnels offer: offloaded endpoints of ports of services.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Offered(BTreeMap<ObjectKey, Vec<(u16, OffloadedEndpoint)>>);

impl Offered {
    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The services that are not the same in both.
    pub fn differing<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = ObjectKey> + 'a {
        let all = self.0.keys().chain(other.0.keys());
        all.filter(|key| self.0.get(key) != other.0.get(key)).cloned()
    }

    /// Adds what is offered for a service to what else there is of it.
    pub fn join(&self, key: &ObjectKey, service: &mut MeshService, warnings: &mut Vec<String>) {
        for (port, endpoint) in self.0.get(key).into_iter().flatten() {
            match service.ports.get_mut(port) {
                Some(joined) => joined.offloaded.push(endpoint.clone()),
                None => {
                    let name = cluster_name(key, *port);
                    warnings
                        .push(format!("a tunnel is open for revision {} of {name}, which is gone", endpoint.revision));
                }
            }
        }
    }
}

/// All tunnels of this replica.
#[derive(Debug, Clone)]
pub struct Tunnels(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: Option<Settings>,
    open: Mutex<BTreeMap<Key, Tunnel>>,
    ports: Mutex<Ports>,
    changes: watch::Sender<u64>,
    shutdown: watch::Receiver<bool>,
}

/// A tunnel's place among the tunnels, given back when it is dropped.
struct Place {
    tunnels: Tunnels,
    key: Key,
    traffic: Arc<Traffic>,
    replaced: watch::Receiver<bool>,
    port: Arc<Port>,
}

/// A tunnel's port, given back when it is dropped. A client that comes again while its last tunnel is not known to be lost has the same one.
#[derive(Debug)]
struct Port {
    tunnels: Tunnels,
    number: u16,
    /// From when on connections can be taken there.
    from: Instant,
    /// At which nobody listens yet.
    socket: Mutex<Option<TcpSocket>>,
    listener: OnceLock<TcpListener>,
}

impl Port {
    /// Where connections come in, from now on at the latest.
    fn listen(&self) -> io::Result<&TcpListener> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(socket) = socket {
            // Nobody else has the socket.
            let _ = self.listener.set(socket.listen(carry::BACKLOG)?);
        }
        self.listener.get().ok_or_else(|| io::ErrorKind::AddrInUse.into())
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        self.tunnels.ports().give_back(self.number);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.tunnels.open();
        // Another one may have it by now.
        if open.get(&self.key).is_some_and(|found| Arc::ptr_eq(&found.traffic, &self.traffic)) {
            open.remove(&self.key);
            drop(open);
            self.tunnels.0.changes.send_modify(|count| *count += 1);
        }
    }
}

impl Tunnels {
    /// No tunnels yet. `changes` counts up with each change that proxies are to see.
    #[must_use]
    pub fn new(settings: Option<Settings>, changes: watch::Sender<u64>, shutdown: watch::Receiver<bool>) -> Self {
        let ports = Mutex::new(Ports::new());
        Self(Arc::new(Inner { settings, open: Mutex::default(), ports, changes, shutdown }))
    }

    fn ports(&self) -> MutexGuard<'_, Ports> {
        // As below.
        self.0.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, BTreeMap<Key, Tunnel>> {
        // The map is whole after every operation on it, so a panic elsewhere does not spoil it.
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tunnels, for people and programs.
    #[must_use]
    pub fn status(&self) -> Vec<TunnelStatus> {
        let open = self.open();
        let listed = open.iter().filter(|(_, tunnel)| tunnel.listed);
        let status = listed.map(|(key, tunnel)| TunnelStatus {
            envoy_cluster: cluster_name(&key.service, key.port),
            revision: key.revision.clone(),
            address: tunnel.address.to_string(),
            peer: tunnel.peer.to_string(),
            since: tunnel.since,
            connections: tunnel.traffic.open.load(Ordering::Relaxed),
            connections_total: tunnel.traffic.total.load(Ordering::Relaxed),
            connections_refused: tunnel.traffic.refused.load(Ordering::Relaxed),
        });
        status.collect()
    }

    /// Has proxies be told that there are no tunnels, before they end. Gives whether there are any.
    pub fn withdraw(&self) -> bool {
        let mut withdrawn = false;
        for tunnel in self.open().values_mut() {
            withdrawn |= std::mem::take(&mut tunnel.listed);
        }
        if withdrawn {
            self.0.changes.send_modify(|count| *count += 1);
        }
        withdrawn
    }

    /// What the tunnels offer.
    #[must_use]
    pub fn offered(&self) -> Offered {
        let mut offered = Offered::default();
        for (key, tunnel) in self.open().iter().filter(|(_, tunnel)| tunnel.listed) {
            let endpoint = OffloadedEndpoint {
                revision: key.revision.clone(),
                address: tunnel.address,
                pod: ObjectKey::new(CLUSTER_OF_TUNNELS, &*key.revision),
                cluster: CLUSTER_OF_TUNNELS.to_owned(),
                since: Some(tunnel.since),
            };
            offered.0.entry(key.service.clone()).or_default().push((key.port, endpoint));
        }
        offered
    }

    /// Begins a tunnel, for somebody who may: answers the request, and goes on by itself when the connection is handed over.
    ///
    /// # Errors
    /// Why there is no tunnel.
    pub async fn begin(
        &self,
        request: &mut Request<Incoming>,
        peer: SocketAddr,
        mesh: &Mesh,
    ) -> Result<Response<()>, Denied> {
        let Some(settings) = &self.0.settings else {
            let reason = "tunnels are off; `--tunnels ADDRESS:FIRST-LAST` (or `overrides.tunnels` in the configuration) \
                          turns them on";
            return Err((StatusCode::FORBIDDEN, reason.to_owned()));
        };
        let asks = |name: header::HeaderName, what: &str| {
            let value = request.headers().get(name).and_then(|value| value.to_str().ok());
            value.is_some_and(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(what)))
        };
        if !asks(header::UPGRADE, PROTOCOL) || !asks(header::CONNECTION, "upgrade") {
            let reason = format!("this is asked for with `Connection: upgrade` and `Upgrade: {PROTOCOL}`");
            return Err((StatusCode::UPGRADE_REQUIRED, reason));
        }
        let Asked { service, revision, session, port } = asked(request.headers())?;
        let key = find(mesh, service, revision)?;
        let place = self.reserve(settings, key, (session, port), peer, mesh)?;
        let name = cluster_name(&place.key.service, place.key.port);
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, PROTOCOL)
            .header(CLUSTER, &name)
            .header(PORT, place.port.number)
            .header(WAIT, place.port.from.saturating_duration_since(Instant::now()).as_secs_f64().ceil() as u64)
            .body(())
            .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let upgrade = hyper::upgrade::on(request);
        let most = settings.max_connections;
        tokio::spawn(async move {
            info!("tunnel for revision {} of {name} from {peer}: open", place.key.revision);
            let ended = place.serve(upgrade, most).await;
            info!("tunnel for revision {} of {name} from {peer}: {ended}", place.key.revision);
        });
        Ok(response)
    }

    /// Takes a port and a place among the tunnels.
    fn reserve(
        &self,
        settings: &Settings,
        key: Key,
        (session, port): (&str, Option<u16>),
        peer: SocketAddr,
        mesh: &Mesh,
    ) -> Result<Place, Denied> {
        let offloaded = mesh.services[&key.service].ports.get(&key.port).map(|port| &port.offloaded);
        let pod = offloaded
            .into_iter()
            .flatten()
            .find(|endpoint| endpoint.revision == key.revision && endpoint.cluster != CLUSTER_OF_TUNNELS);
        let name = cluster_name(&key.service, key.port);
        if let Some(pod) = pod {
            let reason =
                format!("revision {} of {name} is pod {}; choose another with --revision", key.revision, pod.pod);
            return Err((StatusCode::CONFLICT, reason));
        }
        let mut open = self.open();
        let before = open.get(&key);
        if let Some(other) = before.filter(|other| other.session != session) {
            let reason = format!(
                "revision {} of {name} is a tunnel from {} already; choose another with --revision",
                key.revision, other.peer
            );
            return Err((StatusCode::CONFLICT, reason));
        }
        // The same client, whose last connection is lost without our having seen it: what proxies know stays true.
        let (port, address, listed) = match before {
            Some(before) => (Arc::clone(&before.port), before.address, before.listed),
            None => {
                let Taken { socket, address, from } = self.ports().take(settings, &key, port)?;
                let (number, socket) = (address.port(), Mutex::new(Some(socket)));
                (
                    Arc::new(Port { tunnels: self.clone(), number, from, socket, listener: OnceLock::new() }),
                    address,
                    false,
                )
            }
        };
        let traffic = Arc::<Traffic>::default();
        let (replaced, place_replaced) = watch::channel(false);
        let tunnel = Tunnel {
            address,
            session: session.to_owned(),
            peer,
            since: now(),
            listed,
            port: Arc::clone(&port),
            traffic: Arc::clone(&traffic),
            replaced,
        };
        if let Some(before) = open.insert(key.clone(), tunnel) {
            before.replaced.send_replace(true);
        }
        drop(open);
        Ok(Place { tunnels: self.clone(), key, traffic, replaced: place_replaced, port })
    }
}

#[cfg(test)]
mod tests;
