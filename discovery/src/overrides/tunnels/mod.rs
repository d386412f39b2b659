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

pub mod relay;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, header};
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use serde::Serialize;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::{debug, info};

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
pub(crate) const CLUSTER_OF_TUNNELS: &str = "tunnel";
/// How long the other side may take to begin, and to connect to what it leads to.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest header that is looked at, in bytes.
const MAX_HEADER: usize = 320;

/// What is configured about tunnels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// An address of this host that proxies can reach.
    pub address: IpAddr,
    /// The ports for tunnels: one each.
    pub ports: RangeInclusive<u16>,
    /// The most connections of one tunnel at a time.
    pub max_connections: usize,
}

/// The most connections of one tunnel, if nothing is said.
pub const MAX_CONNECTIONS: usize = 128;

/// `ADDRESS:FIRST-LAST`.
impl FromStr for Settings {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (address, ports) = text.rsplit_once(':').unwrap_or_default();
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let address = address.trim_start_matches('[').trim_end_matches(']').parse();
        match (address, first.parse(), last.parse()) {
            (Ok(address), Ok(first), Ok(last)) => {
                Settings { address, ports: first..=last, max_connections: MAX_CONNECTIONS }.checked()
            }
            _ => Err(format!("`{text}` is not ADDRESS:FIRST-LAST, such as 10.0.0.5:19000-19099")),
        }
    }
}

impl Settings {
    /// These settings if they make sense.
    ///
    /// # Errors
    /// What does not.
    pub fn checked(self) -> Result<Self, String> {
        let Settings { address, ports, max_connections } = &self;
        if address.is_unspecified() || address.is_multicast() {
            return Err(format!("{address} is not an address that proxies could connect to"));
        }
        if ports.is_empty() || *ports.start() == 0 {
            return Err(format!("{}-{} has no port", ports.start(), ports.end()));
        }
        if *max_connections == 0 {
            return Err("0 connections would let nothing through".to_owned());
        }
        Ok(self)
    }
}

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
    changes: watch::Sender<u64>,
    shutdown: watch::Receiver<bool>,
}

/// A tunnel's place among the tunnels, given back when it is dropped.
struct Place {
    tunnels: Tunnels,
    key: Key,
    traffic: Arc<Traffic>,
    replaced: watch::Receiver<bool>,
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
        Self(Arc::new(Inner { settings, open: Mutex::default(), changes, shutdown }))
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
        let (service, revision, session) = asked(request.headers())?;
        let key = find(mesh, service, revision)?;
        let (place, listener) = self.reserve(settings, key, session, peer, mesh).await?;
        let name = cluster_name(&place.key.service, place.key.port);
        let response = Response::builder()
            .status(StatusCode::SWITCHING_PROTOCOLS)
            .header(header::CONNECTION, "upgrade")
            .header(header::UPGRADE, PROTOCOL)
            .header(CLUSTER, &name)
            .body(())
            .map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        let upgrade = hyper::upgrade::on(request);
        let most = settings.max_connections;
        tokio::spawn(async move {
            info!("tunnel for revision {} of {name} from {peer}: open", place.key.revision);
            let ended = place.serve(upgrade, listener, most).await;
            info!("tunnel for revision {} of {name} from {peer}: {ended}", place.key.revision);
        });
        Ok(response)
    }

    /// Takes a port and a place among the tunnels.
    async fn reserve(
        &self,
        settings: &Settings,
        key: Key,
        session: &str,
        peer: SocketAddr,
        mesh: &Mesh,
    ) -> Result<(Place, TcpListener), Denied> {
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
        let taken = |open: &BTreeMap<Key, Tunnel>| match open.get(&key).filter(|other| other.session != session) {
            Some(other) => {
                let reason = format!(
                    "revision {} of {name} is a tunnel from {} already; choose another with --revision",
                    key.revision, other.peer
                );
                Err((StatusCode::CONFLICT, reason))
            }
            None => Ok(()),
        };
        taken(&self.open())?;
        let listener = listen(settings, &key).await?;
        let address = listener.local_addr();
        let address = address.map_err(|error| (StatusCode::SERVICE_UNAVAILABLE, error.to_string()))?;
        let traffic = Arc::<Traffic>::default();
        let (replaced, place_replaced) = watch::channel(false);
        let tunnel = Tunnel {
            address,
            session: session.to_owned(),
            peer,
            since: now(),
            listed: false,
            traffic: Arc::clone(&traffic),
            replaced,
        };
        let mut open = self.open();
        // Another one may have come meanwhile.
        taken(&open)?;
        // The same client, whose last connection is lost without our having seen it.
        if let Some(before) = open.insert(key.clone(), tunnel) {
            before.replaced.send_replace(true);
        }
        drop(open);
        Ok((Place { tunnels: self.clone(), key, traffic, replaced: place_replaced }, listener))
    }
}

/// What a request says: service, revision and session.
fn asked(headers: &HeaderMap) -> Result<(&str, &str, &str), Denied> {
    let get = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        match value.is_empty() || value.len() > MAX_HEADER {
            true => Err((StatusCode::BAD_REQUEST, format!("the header {name} is missing or too long"))),
            false => Ok(value),
        }
    };
    Ok((get(SERVICE)?, get(REVISION)?, get(SESSION)?))
}

/// The service's port that is meant.
fn find(mesh: &Mesh, wanted: &str, revision: &str) -> Result<Key, Denied> {
    let bad = |reason: String| Err((StatusCode::BAD_REQUEST, reason));
    let (name, port) = match wanted.split_once(':') {
        None => (wanted, None),
        Some((name, port)) => match port.parse::<u16>() {
            Ok(port) => (name, Some(port)),
            Err(_) => return bad(format!("`{port}` of `{wanted}` is not a port")),
        },
    };
    // What a header could not say would be of no use.
    if let Err(error) = culvert_xds_client::overrides::Overrides::new([(name, revision)]) {
        return bad(error.to_string());
    }
    let (name, namespace) = culvert_xds_client::overrides::split_service(name);
    let service = ObjectKey::new(namespace, name);
    let Some(known) = mesh.services.get(&service) else {
        let mut names =
            mesh.services.keys().filter(|key| key.name == name).map(|key| format!("{}.{}", key.name, key.namespace));
        let hint = match names.next() {
            Some(other) => format!("; there is {other}"),
            None => "; `culvert services` lists those that there are".to_owned(),
        };
        return Err((StatusCode::NOT_FOUND, format!("there is no service {name}.{namespace}{hint}")));
    };
    let http: Vec<u16> =
        known.ports.iter().filter(|(_, port)| port.protocol.is_http()).map(|(port, _)| *port).collect();
    match (port, http.as_slice()) {
        (Some(port), _) if http.contains(&port) => Ok(Key { service, port, revision: revision.to_owned() }),
        (Some(port), _) => {
            bad(format!("{name}.{namespace} has no port {port} that speaks HTTP: overrides are for HTTP"))
        }
        (None, [port]) => Ok(Key { service, port: *port, revision: revision.to_owned() }),
        (None, []) => bad(format!("{name}.{namespace} has no port that speaks HTTP: overrides are for HTTP")),
        (None, several) => {
            let several: Vec<_> = several.iter().map(|port| format!("{wanted}:{port}")).collect();
            bad(format!("{name}.{namespace} has several ports; say {}", several.join(" or ")))
        }
    }
}

/// A free port for a tunnel. The search begins where the revision's name says: proxies that have not heard yet that discovery was
/// restarted, or a tunnel closed, must not find another revision at the port that they know.
async fn listen(settings: &Settings, key: &Key) -> Result<TcpListener, Denied> {
    let ports = settings.ports.clone();
    let count = ports.len();
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    // Less than there are ports, so that nothing is lost.
    let start = (hasher.finish() % count as u64) as usize;
    let mut last = None;
    for port in ports.clone().cycle().skip(start).take(count) {
        match TcpListener::bind((settings.address, port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    let why = last.map(|error| format!(" (the last one: {error})")).unwrap_or_default();
    let reason = format!("no port of {}-{} is free for another tunnel{why}", ports.start(), ports.end());
    Err((StatusCode::SERVICE_UNAVAILABLE, reason))
}

impl Place {
    /// Runs the tunnel to its end; says why it ended.
    async fn serve(&self, upgrade: OnUpgrade, listener: TcpListener, most: usize) -> &'static str {
        let Ok(Ok(upgraded)) = timeout(PATIENCE, upgrade).await else { return "the connection was not handed over" };
        let handshake = Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(TUNNEL_WINDOW)
            .max_send_buf_size(SEND_BUFFER)
            .handshake::<_, Empty<Bytes>>(upgraded);
        let Ok(Ok((requests, connection))) = timeout(PATIENCE, handshake).await else {
            return "it does not speak HTTP/2";
        };
        tokio::pin!(connection);
        if let Some(tunnel) = self.tunnels.open().get_mut(&self.key)
            && Arc::ptr_eq(&tunnel.traffic, &self.traffic)
        {
            tunnel.listed = true;
        }
        self.tunnels.0.changes.send_modify(|count| *count += 1);
        let (mut replaced, mut shutdown) = (self.replaced.clone(), self.tunnels.0.shutdown.clone());
        // Ended with the tunnel: dropped.
        let mut carried = JoinSet::new();
        loop {
            tokio::select! {
                _ = &mut connection => return "closed",
                () = turned(&mut replaced) => return "the same client has opened it anew",
                () = turned(&mut shutdown) => return "discovery ends",
                Some(_) = carried.join_next() => {}
                accepted = listener.accept() => {
                    let Ok((stream, peer)) = accepted else {
                        // Out of file descriptors, for example: not to be retried in a busy loop.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    };
                    if carried.len() >= most {
                        self.traffic.refused.fetch_add(1, Ordering::Relaxed);
                        debug!("tunnel for revision {}: {most} connections are open, {peer} is refused", self.key.revision);
                        continue;
                    }
                    let traffic = Arc::clone(&self.traffic);
                    carried.spawn(carry(requests.clone(), stream, peer, traffic));
                }
            }
        }
    }
}

/// Waits until something turns true. That whoever could turn it is gone is as good.
async fn turned(is: &mut watch::Receiver<bool>) {
    let _ = is.wait_for(|is| *is).await;
}

/// Counts a connection while it is open.
struct Open(Arc<Traffic>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Carries one connection of a proxy through the tunnel.
async fn carry(mut requests: SendRequest<Empty<Bytes>>, stream: TcpStream, peer: SocketAddr, traffic: Arc<Traffic>) {
    traffic.open.fetch_add(1, Ordering::Relaxed);
    traffic.total.fetch_add(1, Ordering::Relaxed);
    let _open = Open(Arc::clone(&traffic));
    // A proxy's node that is gone says nothing any more. That a socket cannot be set up so is no reason not to use it.
    let keepalive = TcpKeepalive::new().with_time(Duration::from_secs(60)).with_interval(Duration::from_secs(10));
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
    let _ = stream.set_nodelay(true);
    let begin = async {
        let request = Request::connect("localhost:80").header("x-forwarded-for", peer.to_string()).body(Empty::new());
        let response = requests.send_request(request.ok()?).await.ok()?;
        if response.status() != StatusCode::OK {
            return None;
        }
        hyper::upgrade::on(response).await.ok()
    };
    match timeout(PATIENCE, begin).await {
        Ok(Some(upgraded)) => {
            relay::relay(TokioIo::new(upgraded), stream, IDLE).await;
        }
        _ => {
            traffic.refused.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kubernetes::manifest::parse;
    use crate::registry::{Cluster, ClusterInfo, Registry, SourceHealth};

    const MANIFESTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.1, selector: {app: users}, ports: [{name: http, port: 80}, {name: tcp-x, port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: orders, namespace: shop}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}, {name: grpc, port: 90}]}
---
apiVersion: v1
kind: Pod
metadata: {name: users-x, labels: {app: users, culvert.dev/offloaded: 'true', culvert.dev/revision: taken}}
status: {podIP: 10.1.0.9}
";

    fn mesh() -> Mesh {
        let info = ClusterInfo { name: "east".into(), ..ClusterInfo::default() };
        let objects = Some(parse(MANIFESTS).unwrap().into());
        let cluster = Cluster { info, objects, health: SourceHealth::default(), drained: false };
        crate::mesh::join(&Registry { version: 1, clusters: vec![cluster], waited: false })
    }

    fn settings() -> Settings {
        // Any ports that are free, as far as that can be: a test that shares the host.
        "127.0.0.1:20000-32000".parse().unwrap()
    }

    #[test]
    fn services_are_found_by_their_names_and_ports() {
        let mesh = mesh();
        for (wanted, port) in [("users", 80), ("users.default", 80), ("users:80", 80), ("orders.shop:90", 90)] {
            assert_eq!(find(&mesh, wanted, "me").unwrap().port, port, "{wanted}");
        }
        for (wanted, revision, status, expected) in [
            ("user", "me", 404, "no service user.default; `culvert services`"),
            ("orders", "me", 404, "there is orders.shop"),
            ("orders.shop", "me", 400, "say orders.shop:80 or orders.shop:90"),
            ("users:81", "me", 400, "no port 81 that speaks HTTP"),
            ("users:x", "me", 400, "`x` of `users:x` is not a port"),
            ("users", "m e", 400, "revision `m e`"),
            ("../x", "me", 400, "service `../x`"),
        ] {
            let (found, reason) = find(&mesh, wanted, revision).unwrap_err();
            assert!(found == status && reason.contains(expected), "{wanted}: {found} {reason}");
        }
    }

    #[test]
    fn settings_say_where() {
        let settings: Settings = "[fd00::1]:19000-19001".parse().unwrap();
        assert_eq!((settings.address, settings.ports), ("fd00::1".parse().unwrap(), 19000..=19001));
        assert_eq!("10.0.0.1:7".parse::<Settings>().unwrap().ports, 7..=7);
        for text in ["", "10.0.0.1", "10.0.0.1:x", "10.0.0.1:9-8", "0.0.0.0:1-2", "host:1-2", "10.0.0.1:0-2"] {
            assert!(text.parse::<Settings>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_revision_has_one_tunnel_and_the_same_client_may_come_again() {
        let (mesh, settings) = (mesh(), settings());
        let (_shutdown, asked) = watch::channel(false);
        let tunnels = Tunnels::new(Some(settings.clone()), watch::channel(0).0, asked);
        let peer = SocketAddr::from(([10, 0, 0, 1], 1));
        let reserve = async |revision: &str, session: &str| {
            let key = find(&mesh, "users", revision).unwrap();
            tunnels.reserve(&settings, key, session, peer, &mesh).await
        };
        let refused = |result: Result<(Place, TcpListener), Denied>| result.err().unwrap();
        let (status, reason) = refused(reserve("taken", "a").await);
        assert!(status == 409 && reason.contains("is pod default/users-x; choose another with --revision"), "{reason}");
        let (first, _listener) = reserve("me", "a").await.unwrap();
        let (status, reason) = refused(reserve("me", "b").await);
        assert!(status == 409 && reason.contains("is a tunnel from 10.0.0.1:1 already"), "{reason}");
        let (second, _listener) = reserve("me", "a").await.unwrap();
        assert!(*first.replaced.borrow() && !*second.replaced.borrow());
        // The first one's end is not the second one's.
        drop(first);
        assert!(refused(reserve("me", "b").await).0 == 409);
        // Nobody is told of it before the other side is there.
        assert_eq!(tunnels.status(), []);
        tunnels.open().values_mut().for_each(|tunnel| tunnel.listed = true);
        let key = ObjectKey::new("default", "users");
        let offered = tunnels.offered();
        let (mut service, mut warnings) = (MeshService::clone(&mesh.services[&key]), Vec::new());
        offered.join(&key, &mut service, &mut warnings);
        let offloaded = &service.ports[&80].offloaded;
        assert_eq!((offloaded.len(), &*offloaded[1].revision, &*offloaded[1].cluster), (2, "me", "tunnel"));
        offered.join(&key, &mut MeshService::default(), &mut warnings);
        assert!(warnings.len() == 1 && warnings[0].contains("users.default:80, which is gone"), "{warnings:?}");
        assert_eq!(offered.differing(&Offered::default()).collect::<Vec<_>>(), [key]);
        assert_eq!(offered.differing(&tunnels.offered()).next(), None);
        drop(second);
        assert_eq!(tunnels.status(), []);
        reserve("me", "b").await.unwrap();
    }

    #[tokio::test]
    async fn ports_run_out() {
        let holder = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = holder.local_addr().unwrap().port();
        let settings = Settings { ports: port..=port, ..settings() };
        let key = Key { service: ObjectKey::new("default", "users"), port: 80, revision: "me".to_owned() };
        let (status, reason) = listen(&settings, &key).await.unwrap_err();
        assert!(status == 503 && reason.contains("is free for another tunnel (the last one: Address"), "{reason}");
    }
}
