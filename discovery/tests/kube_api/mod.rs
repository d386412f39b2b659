//! An API server as clients see it: lists with pages, watches with bookmarks and streamed lists, versions that are
//! compacted away, bearer tokens, TLS; and all the ways in which one can fail.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::channel::{Channel, Sender};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{broadcast, watch};
use tokio_rustls::TlsAcceptor;

pub const SERVICES: &str = "/api/v1/services";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const PODS: &str = "/api/v1/pods";
pub const NODES: &str = "/api/v1/nodes";
pub const MANIFESTS: &str = "/apis/culvert.dev/v1alpha1/servicemanifests";

/// Namespace and name.
type Key = (String, String);
type Body = Channel<Bytes, std::io::Error>;

/// How the server behaves.
#[derive(Debug, Clone)]
pub struct Behaviour {
    /// Whether lists are streamed, or called invalid.
    pub watch_list: bool,
    /// Whether the parameter is passed over instead, as servers did that did not know it.
    pub ignores_watch_list: bool,
    /// The most objects of a page, whatever the client asks for.
    pub page: usize,
    /// Whether every continue token has expired.
    pub expired_pages: bool,
    /// Whether a watch from too far back is answered with 410, rather than with an event that says so.
    pub gone_as_status: bool,
    /// The tokens that are good; all, if there are none.
    pub tokens: BTreeSet<String>,
    /// What is waited before each answer and each line.
    pub delay: Duration,
    /// Whether requests are taken and not answered.
    pub hangs: bool,
    /// Requests for these are forbidden.
    pub refused: Option<&'static str>,
    /// There are no such objects here.
    pub undefined: Option<&'static str>,
}

impl Default for Behaviour {
    fn default() -> Self {
        Self {
            watch_list: true,
            ignores_watch_list: false,
            page: usize::MAX,
            expired_pages: false,
            gone_as_status: false,
            tokens: BTreeSet::new(),
            delay: Duration::ZERO,
            hangs: false,
            refused: None,
            undefined: None,
        }
    }
}

#[derive(Default)]
struct World {
    version: u64,
    objects: BTreeMap<&'static str, BTreeMap<Key, Value>>,
    /// Every change: version, resource, type, object.
    log: Vec<(u64, &'static str, &'static str, Value)>,
    /// Changes up to this version are forgotten.
    compacted: u64,
    /// What lists that are being paged through began with.
    lists: BTreeMap<(u64, &'static str), Vec<(Key, Value)>>,
    behaviour: Behaviour,
    requests: Vec<String>,
    /// Put once after the next page of its resource.
    after_page: Option<(&'static str, Value)>,
}

/// What all watches of a resource are told beside changes.
#[derive(Debug, Clone)]
enum Order {
    Raw(&'static str, String),
    Bookmark,
    End,
    Cut,
}

/// A running API server. It ends when dropped.
pub struct KubeApi {
    pub address: SocketAddr,
    world: Arc<Mutex<World>>,
    changed: watch::Sender<u64>,
    orders: broadcast::Sender<Order>,
    tls: Option<Arc<rustls::ServerConfig>>,
    alive: Option<watch::Sender<bool>>,
}

impl World {
    fn put(&mut self, resource: &'static str, mut object: Value) {
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        let objects = self.objects.entry(resource).or_default();
        let kind = match objects.insert(key_of(&object), object.clone()) {
            Some(_) => "MODIFIED",
            None => "ADDED",
        };
        self.log.push((self.version, resource, kind, object));
    }

    fn delete(&mut self, resource: &'static str, namespace: &str, name: &str) {
        let key = (namespace.to_owned(), name.to_owned());
        let mut object = self.objects.get_mut(resource).unwrap().remove(&key).unwrap();
        self.version += 1;
        object["metadata"]["resourceVersion"] = self.version.to_string().into();
        self.log.push((self.version, resource, "DELETED", object));
    }
}

fn key_of(object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (text("namespace"), text("name"))
}

impl KubeApi {
    pub async fn start() -> Self {
        Self::start_with(None).await
    }

    /// With TLS, if a configuration is given.
    pub async fn start_with(tls: Option<Arc<rustls::ServerConfig>>) -> Self {
        let address = ([127, 0, 0, 1], 0).into();
        let (changed, _) = watch::channel(0);
        let (orders, _) = broadcast::channel(1024);
        let mut api = Self { address, world: Arc::default(), changed, orders, tls, alive: None };
        // Versions begin somewhere.
        api.world.lock().unwrap().version = 100;
        api.up().await;
        api
    }

    /// Starts to listen, at the same address as before.
    pub async fn up(&mut self) {
        // The listener that was there before may not be gone yet.
        let started = std::time::Instant::now();
        let listener = loop {
            match TcpListener::bind(self.address).await {
                Ok(listener) => break listener,
                Err(error) => assert!(started.elapsed() < Duration::from_secs(20), "cannot listen: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        self.address = listener.local_addr().unwrap();
        let (alive, mut ended) = watch::channel(true);
        self.alive = Some(alive);
        let serving =
            Serving { world: Arc::clone(&self.world), changed: self.changed.subscribe(), orders: self.orders.clone() };
        let tls = self.tls.clone().map(TlsAcceptor::from);
        tokio::spawn(async move {
            loop {
                let connection = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap().0,
                    _ = ended.changed() => return,
                };
                let (serving, tls, ended) = (serving.clone(), tls.clone(), ended.clone());
                tokio::spawn(async move {
                    match tls {
                        None => serving.connection(connection, ended).await,
                        Some(tls) => {
                            if let Ok(connection) = tls.accept(connection).await {
                                serving.connection(connection, ended).await;
                            }
                        }
                    }
                });
            }
        });
    }

    /// Ends, with all connections.
    pub fn down(&mut self) {
        self.alive = None;
    }

    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    pub fn behave(&self, change: impl FnOnce(&mut Behaviour)) {
        change(&mut self.world.lock().unwrap().behaviour);
    }

    pub fn put(&self, resource: &'static str, object: Value) {
        self.world.lock().unwrap().put(resource, object);
        self.changed.send_modify(|count| *count += 1);
    }

    pub fn delete(&self, resource: &'static str, namespace: &str, name: &str) {
        self.world.lock().unwrap().delete(resource, namespace, name);
        self.changed.send_modify(|count| *count += 1);
    }

    /// Has this happen between the next page of a list and what the client asks for next.
    pub fn after_page(&self, resource: &'static str, object: Value) {
        self.world.lock().unwrap().after_page = Some((resource, object));
    }

    /// Forgets all changes up to now: whoever is behind must read all anew.
    pub fn compact(&self) {
        let mut world = self.world.lock().unwrap();
        world.compacted = world.version;
        world.log.clear();
    }

    /// Loses all changes since a version, as a server whose storage was restored from a copy; its objects are those that are left.
    pub fn restore(&self, version: u64) {
        let mut world = self.world.lock().unwrap();
        world.log.retain(|(of, ..)| *of <= version);
        let mut objects: BTreeMap<&'static str, BTreeMap<Key, Value>> = BTreeMap::new();
        for (_, resource, kind, object) in &world.log {
            let objects = objects.entry(resource).or_default();
            match *kind {
                "DELETED" => objects.remove(&key_of(object)),
                _ => objects.insert(key_of(object), object.clone()),
            };
        }
        (world.version, world.objects) = (version, objects);
        world.lists.clear();
    }

    /// The version now.
    pub fn version(&self) -> u64 {
        self.world.lock().unwrap().version
    }

    /// Counts the version up, as changes of other resources do.
    pub fn pass(&self) {
        self.world.lock().unwrap().version += 1;
    }

    /// Sends a bookmark to all watches.
    pub fn bookmark(&self) {
        let _ = self.orders.send(Order::Bookmark);
    }

    /// Ends all watches as an API server does.
    pub fn end_watches(&self) {
        let _ = self.orders.send(Order::End);
    }

    /// Cuts the connections of all watches in the middle of a line.
    pub fn cut_watches(&self) {
        let _ = self.orders.send(Order::Cut);
    }

    /// Sends a line to all watches of a resource.
    pub fn inject(&self, resource: &'static str, line: &str) {
        let _ = self.orders.send(Order::Raw(resource, line.to_owned()));
    }

    /// The requests so far: path and query.
    pub fn requests(&self) -> Vec<String> {
        self.world.lock().unwrap().requests.clone()
    }

    /// The requests for a resource that contain this.
    pub fn count(&self, resource: &str, containing: &str) -> usize {
        let begins = format!("{resource}?");
        self.requests().iter().filter(|path| path.starts_with(&begins) && path.contains(containing)).count()
    }

    /// Lists, rather than watches, of a resource; not what only asks whether the server is there.
    pub fn lists(&self, resource: &str) -> usize {
        self.count(resource, "limit=500") + self.count(resource, "sendInitialEvents=")
    }
}

#[derive(Clone)]
struct Serving {
    world: Arc<Mutex<World>>,
    changed: watch::Receiver<u64>,
    orders: broadcast::Sender<Order>,
}

impl Serving {
    async fn connection(
        self,
        connection: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        mut ended: watch::Receiver<bool>,
    ) {
        let service = service_fn(|request| {
            let serving = self.clone();
            async move { Ok::<_, Infallible>(serving.answer(request).await) }
        });
        let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(connection), service);
        tokio::select! {
            _ = serving => {}
            _ = ended.changed() => {}
        }
    }

    async fn answer(self, request: Request<Incoming>) -> Response<Body> {
        let path = request.uri().path().to_owned();
        let query: BTreeMap<String, String> =
            form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes()).into_owned().collect();
        let behaviour = {
            let mut world = self.world.lock().unwrap();
            world.requests.push(request.uri().to_string());
            world.behaviour.clone()
        };
        if behaviour.hangs {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(behaviour.delay).await;
        let token =
            request.headers().get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        if !behaviour.tokens.is_empty() && !token.is_some_and(|token| behaviour.tokens.contains(token)) {
            return refuse(401, "Unauthorized", "Unauthorized");
        }
        let mut defined =
            [SERVICES, SLICES, PODS, NODES, MANIFESTS].into_iter().filter(|it| behaviour.undefined != Some(*it));
        let Some(resource) = defined.find(|known| *known == path) else {
            return refuse(404, "NotFound", "the server could not find the requested resource");
        };
        if behaviour.refused == Some(resource) {
            return refuse(403, "Forbidden", "pods is forbidden: User \"x\" cannot list resource \"pods\"");
        }
        if query.get("watch").is_some_and(|value| value == "true") {
            self.watch(resource, &query, behaviour)
        } else {
            self.list(resource, &query, &behaviour)
        }
    }

    fn list(&self, resource: &'static str, query: &BTreeMap<String, String>, behaviour: &Behaviour) -> Response<Body> {
        let mut world = self.world.lock().unwrap();
        let world = &mut *world;
        let (version, from) = match query.get("continue") {
            None => {
                let objects = world.objects.get(resource).into_iter().flatten();
                let objects = objects.filter(|(_, object)| selected(object, query));
                let objects = objects.map(|(key, object)| (key.clone(), object.clone())).collect();
                world.lists.insert((world.version, resource), objects);
                (world.version, 0)
            }
            Some(_) if behaviour.expired_pages => {
                return refuse(
                    410,
                    "Expired",
                    "The provided continue parameter is too old to display a consistent list",
                );
            }
            Some(token) => {
                let (version, from) = token.split_once('/').unwrap();
                (version.parse().unwrap(), from.parse().unwrap())
            }
        };
        let asked = query.get("limit").map_or(usize::MAX, |limit| limit.parse().unwrap());
        let objects = &world.lists[&(version, resource)];
        let end = objects.len().min(from + asked.min(behaviour.page));
        // Objects in a list do not say their kind.
        let items: Vec<Value> = objects[from..end].iter().map(|(_, object)| without_kind(object)).collect();
        let mut metadata = json!({ "resourceVersion": version.to_string() });
        if end < objects.len() {
            metadata["continue"] = format!("{version}/{end}").into();
            metadata["remainingItemCount"] = (objects.len() - end).into();
        }
        if let Some((_, object)) = world.after_page.take_if(|(of, _)| *of == resource) {
            world.put(resource, object);
        }
        whole(200, &json!({ "kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items }))
    }

    fn watch(self, resource: &'static str, query: &BTreeMap<String, String>, behaviour: Behaviour) -> Response<Body> {
        let streams = query.contains_key("sendInitialEvents") && !behaviour.ignores_watch_list;
        if streams && !behaviour.watch_list {
            let message = "ListOptions.meta.k8s.io \"\" is invalid: sendInitialEvents: Forbidden: sendInitialEvents is \
                           forbidden for watch unless the WatchList feature gate is enabled";
            return refuse(422, "Invalid", message);
        }
        let (mut lines, from) = (Vec::new(), query.get("resourceVersion").and_then(|version| version.parse().ok()));
        let world = self.world.lock().unwrap();
        let mut at: u64 = match from {
            Some(version) if version < world.compacted => {
                let message = format!("too old resource version: {version} ({})", world.compacted);
                if behaviour.gone_as_status {
                    return refuse(410, "Expired", &message);
                }
                let event = json!({ "type": "ERROR", "object": status(410, "Expired", &message) });
                return whole(200, &event);
            }
            Some(version) => version,
            None => {
                let objects = world.objects.get(resource).into_iter().flat_map(BTreeMap::values);
                for object in objects.filter(|object| selected(object, query)) {
                    lines.push(json!({ "type": "ADDED", "object": object }).to_string());
                }
                world.version
            }
        };
        drop(world);
        if streams {
            lines.push(bookmark(resource, at, true).to_string());
        }
        let (mut sender, body) = Channel::new(16);
        let mut orders = self.orders.subscribe();
        let (mut changed, query) = (self.changed, query.clone());
        changed.mark_changed();
        let world = self.world;
        let seconds: u64 = query["timeoutSeconds"].parse().unwrap();
        let end = tokio::time::Instant::now() + Duration::from_secs(seconds);
        tokio::spawn(async move {
            for line in lines {
                tokio::time::sleep(behaviour.delay).await;
                send(&mut sender, &line).await;
            }
            loop {
                let order = tokio::select! {
                    _ = changed.changed() => None,
                    order = orders.recv() => Some(order.unwrap_or(Order::End)),
                    () = tokio::time::sleep_until(end) => Some(Order::End),
                };
                // What happened before an order is told before it.
                let news: Vec<_> = {
                    let world = world.lock().unwrap();
                    let news = world.log.iter().filter(|(version, of, _, _)| *of == resource && *version > at);
                    let news = news.map(|(_, _, kind, object)| (*kind, object.clone())).collect();
                    at = world.version;
                    news
                };
                for (kind, object) in news.into_iter().filter(|(_, object)| selected(object, &query)) {
                    tokio::time::sleep(behaviour.delay).await;
                    if !send(&mut sender, &json!({ "type": kind, "object": object }).to_string()).await {
                        return;
                    }
                }
                match order {
                    None => {}
                    Some(Order::Raw(of, line)) if of == resource => {
                        send(&mut sender, &line).await;
                    }
                    Some(Order::Raw(..)) => {}
                    Some(Order::Bookmark) => {
                        send(&mut sender, &bookmark(resource, at, false).to_string()).await;
                    }
                    Some(Order::End) => return,
                    Some(Order::Cut) => {
                        let _ = sender.send_data(Bytes::from_static(b"{\"type\": \"DELE")).await;
                        // It is on its way before the connection ends.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                        sender.abort(std::io::Error::other("cut"));
                        return;
                    }
                }
            }
        });
        respond(200, body)
    }
}

async fn send(sender: &mut Sender<Bytes, std::io::Error>, line: &str) -> bool {
    sender.send_data(Bytes::from(format!("{line}\n"))).await.is_ok()
}

fn bookmark(resource: &str, version: u64, end: bool) -> Value {
    let kind = match resource {
        SERVICES => "Service",
        SLICES => "EndpointSlice",
        PODS => "Pod",
        MANIFESTS => "ServiceManifest",
        _ => "Node",
    };
    let mut metadata = json!({ "resourceVersion": version.to_string(), "creationTimestamp": null });
    if end {
        metadata["annotations"] = json!({ "k8s.io/initial-events-end": "true" });
    }
    json!({ "type": "BOOKMARK", "object": { "kind": kind, "metadata": metadata } })
}

/// Whether all parts of an equality-based `labelSelector` hold.
fn selected(object: &Value, query: &BTreeMap<String, String>) -> bool {
    let selector = query.get("labelSelector").map_or("", String::as_str);
    selector.split(',').filter(|part| !part.is_empty()).all(|part| {
        let (name, value) = part.split_once('=').unwrap();
        object["metadata"]["labels"][name] == value
    })
}

fn without_kind(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(fields) = object.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    object
}

fn status(code: u16, reason: &str, message: &str) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": message,
            "reason": reason, "code": code })
}

fn refuse(code: u16, reason: &str, message: &str) -> Response<Body> {
    whole(code, &status(code, reason, message))
}

fn whole(code: u16, body: &Value) -> Response<Body> {
    let (mut sender, channel) = Channel::new(1);
    let text = Bytes::from(format!("{body}\n"));
    tokio::spawn(async move {
        let _ = sender.send_data(text).await;
    });
    respond(code, channel)
}

fn respond(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(code).unwrap();
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}

/// A Service with a port called `http`.
pub fn service(name: &str, port: u16) -> Value {
    json!({ "kind": "Service", "apiVersion": "v1", "metadata": { "namespace": "default", "name": name },
            "spec": { "clusterIP": "10.96.0.1", "ports": [{ "name": "http", "port": port, "protocol": "TCP" }] } })
}

/// An EndpointSlice of a Service, with a pod of the same name as each address has as its last part.
pub fn slice(service: &str, addresses: &[&str]) -> Value {
    let endpoints: Vec<Value> = addresses
        .iter()
        .map(|address| {
            let pod = format!("pod-{}", address.rsplit('.').next().unwrap());
            json!({ "addresses": [address], "conditions": { "ready": true, "serving": true, "terminating": false },
                    "targetRef": { "kind": "Pod", "namespace": "default", "name": pod, "uid": format!("{pod}-uid") } })
        })
        .collect();
    json!({ "kind": "EndpointSlice", "apiVersion": "discovery.k8s.io/v1", "addressType": "IPv4",
            "metadata": { "namespace": "default", "name": format!("{service}-1"),
                          "labels": { "kubernetes.io/service-name": service } },
            "ports": [{ "name": "http", "port": 8080, "protocol": "TCP" }], "endpoints": endpoints })
}

/// A Pod.
pub fn pod(name: &str, address: &str) -> Value {
    json!({ "kind": "Pod", "apiVersion": "v1",
            "metadata": { "namespace": "default", "name": name, "uid": format!("{name}-uid"), "labels": { "app": "x" } },
            "spec": { "containers": [{ "name": "c" }] },
            "status": { "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }] } })
}
