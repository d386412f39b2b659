//! The gRPC side: ADS, state of the world and delta, one task a stream.
//!
//! What a stream says next is decided by a state machine without I/O ([`sotw`], [`delta`]); the loop here feeds it
//! requests and asks it for one response at a time, always against the newest snapshot. A client that does not read
//! or does not acknowledge therefore costs no queue and delays nobody: when it comes back it gets what is newest.

pub mod authorization;
pub mod clients;
pub mod csds;
pub mod delta;
mod hds;
mod listen;
pub mod loads;
mod polled;
mod response;
mod rest;
pub mod sotw;
#[cfg(test)]
mod test_support;
pub mod tls;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::health::v3::health_discovery_service_server::HealthDiscoveryServiceServer;
use envoy_types::pb::envoy::service::load_stats::v3::load_reporting_service_server::LoadReportingServiceServer;
use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_server::ClientStatusDiscoveryServiceServer;
use envoy_types::pb::google::protobuf::Value;
use envoy_types::pb::google::protobuf::value::Kind;
use http::HeaderValue;
use hyper::body::Incoming;
use prost::Message;
use tokio::sync::{mpsc, watch};
use tonic::body::Body;
use tonic::codec::Codec as _;
use tonic::codegen::Service;
use tonic::{Status, Streaming};
use tonic_prost::ProstCodec;
use tracing::{debug, info};

use self::authorization::{Authorization, Refused, Rule};
use self::clients::{ClientStatus, Clients, Question};
use self::csds::{Csds, Held};
use self::hds::Hds;
use self::loads::{Loads, Lrs};
use self::response::{Response, ResponseBody};
use self::tls::{Identity, TlsFiles};
use crate::health::{self, Checks};
use crate::kubernetes::ObjectKey;
use crate::overrides::contexts::Contexts;
use crate::resources::role::METADATA;
use crate::resources::{PUSH_ORDER, ProxyKind, Role, Snapshot, TypeResources, Viewer};
use crate::secrets::Access;

const STREAM_ADS: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources";
const DELTA_ADS: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
const STREAM_SDS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets";
const DELTA_SDS: &str = "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets";
const CSDS: &str = "/envoy.service.status.v3.ClientStatusDiscoveryService/";
const LRS: &str = "/envoy.service.load_stats.v3.LoadReportingService/";
const HDS: &str = "/envoy.service.health.v3.HealthDiscoveryService/";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// The largest request that is read, in bytes. A reconnecting delta client lists every resource that it has.
const MAX_REQUEST_BYTES: usize = 8 * 1024 * 1024;
/// The most types that one stream may subscribe to.
const MAX_TYPES: usize = 32;
/// The most names of one type that one stream may subscribe to.
const MAX_NAMES: usize = 200_000;
/// The name that stands for all resources of a type.
const WILDCARD: &str = "*";

/// What there is of a type that is not served.
static NOTHING: LazyLock<Arc<TypeResources>> = LazyLock::new(Arc::default);

/// The protocol of one stream, without I/O.
pub trait Session: Default + Send + 'static {
    /// What the client sends.
    type Request: Message + Default + 'static;

    /// Takes in a request.
    ///
    /// # Errors
    /// The status that ends the stream, for a client that breaks the protocol or asks for too much.
    fn handle(&mut self, request: Self::Request) -> Result<(), Status>;

    /// Which secrets the client may have.
    fn allow(&mut self, secrets: Access);

    /// The next response, if anything is to be said now. To be asked again until it gives `None`.
    fn poll(&mut self, snapshot: &Snapshot) -> Option<Response>;

    /// What is known of the client.
    fn status(&self) -> &ClientStatus;

    /// The resources that the client has, or wants.
    fn held(&self) -> Vec<Held>;

    /// The node that a request states.
    fn node(request: &Self::Request) -> Option<&Node>;
}

/// How xDS is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// With TLS, if files for it are named.
    pub tls: Option<TlsFiles>,
    /// Who may have what; all may have everything, if there is no rule.
    pub rules: Vec<Rule>,
    /// How often proxies are asked to report loads.
    pub load_report_interval: Duration,
    /// How endpoints are checked by proxies.
    pub health: health::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        let health = health::Settings::default();
        Self { tls: None, rules: Vec::new(), load_report_interval: loads::INTERVAL, health }
    }
}

/// What is served at the xDS port.
#[derive(Debug, Clone)]
pub struct Xds {
    /// The resources; the newest count.
    pub snapshots: watch::Receiver<Arc<Snapshot>>,
    /// Turns true when everything ends.
    pub shutdown: watch::Receiver<bool>,
    /// Who is connected.
    pub clients: Clients,
    /// Who may have what.
    pub authorization: Arc<Authorization>,
    /// What proxies report.
    pub loads: Loads,
    /// Who passes contexts of overrides on.
    pub contexts: Contexts,
    /// How often they are asked to.
    pub load_report_interval: Duration,
    /// What they check.
    pub checks: Checks,
}

/// Who sent a request.
#[derive(Debug, Clone)]
struct Peer {
    address: SocketAddr,
    identity: Arc<Identity>,
}

impl Xds {
    /// Answers a request.
    async fn answer(self, request: http::Request<Incoming>, peer: Peer) -> http::Response<Body> {
        match request.uri().path() {
            STREAM_ADS | STREAM_SDS => self.stream::<sotw::SotwSession>(request, peer),
            DELTA_ADS | DELTA_SDS => self.stream::<delta::DeltaSession>(request, peer),
            path if path.starts_with(rest::PREFIX) => self.poll(request, &peer.identity).await,
            path if path.starts_with(CSDS) => {
                if let Err(refusal) = self.authorization.check_status(&peer.identity) {
                    return Status::from(refusal).into_http();
                }
                served(ClientStatusDiscoveryServiceServer::new(Csds(self.clients)), request).await
            }
            path if path.starts_with(LRS) => {
                let Self {
                    loads, contexts, snapshots, load_report_interval: interval, authorization, shutdown, ..
                } = self;
                let identity = peer.identity;
                let lrs = Lrs { loads, contexts, snapshots, interval, authorization, identity, shutdown };
                served(LoadReportingServiceServer::new(lrs), request).await
            }
            path if path.starts_with(HDS) => {
                let Self { checks, authorization, shutdown, .. } = self;
                let hds = Hds { checks, authorization, identity: peer.identity, shutdown };
                let service = HealthDiscoveryServiceServer::new(hds).max_decoding_message_size(MAX_REQUEST_BYTES);
                served(service, request).await
            }
            path => Status::unimplemented(format!("{path} is not served here")).into_http(),
        }
    }

    /// Has `/status` say for a while that a node may not have what it asks for.
    fn refused(&self, node: Option<&Node>, refusal: &Refused) {
        self.clients.refused(node.map_or("", |node| node.id.as_str()), &refusal.why);
    }

    /// Looks whether there is something for what a node says it is for, and whether it says that in a way that means something; if not,
    /// `/status` says so for a while.
    ///
    /// # Errors
    /// What is wrong.
    fn check_role(&self, node: &Node) -> Result<(), String> {
        let checked = check_services(node).and_then(|()| match Role::of(node) {
            Ok(Role::Edge) if self.snapshots.borrow().edge().is_none() => {
                Err(format!("node.metadata `{METADATA}`: is edge, and discovery is configured without `edge`"))
            }
            role => role.map(drop),
        });
        checked.inspect_err(|problem| self.clients.refused(&node.id, problem))
    }

    /// A stream of xDS.
    fn stream<S: Session>(self, request: http::Request<Incoming>, peer: Peer) -> http::Response<Body> {
        let identity = |encoding: &http::HeaderValue| encoding == "identity";
        if !request.headers().get("grpc-encoding").is_none_or(identity) {
            return Status::unimplemented("requests are not compressed here").into_http();
        }
        let decoder = ProstCodec::<(), S::Request>::default().decoder();
        let requests = Streaming::new_request(decoder, request.into_body(), None, Some(MAX_REQUEST_BYTES));
        // One response may wait for the client to read; the next is only made when it has.
        let (responses, stream) = mpsc::channel(1);
        let (client, questions) = self.clients.connect(peer.address.to_string());
        let stream_of = StreamOf { xds: self, peer, client, questions, known: false };
        tokio::spawn(stream_of.run(S::default(), requests, responses));
        let mut response = http::Response::new(Body::new(ResponseBody::new(stream)));
        response.headers_mut().insert(http::header::CONTENT_TYPE, GRPC);
        response
    }
}

/// Answers a request by a service that tonic has made.
async fn served<T>(mut service: T, request: http::Request<Incoming>) -> http::Response<Body>
where
    T: Service<http::Request<Body>, Response = http::Response<Body>, Error = std::convert::Infallible>,
{
    match service.call(request.map(Body::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// What one stream of xDS is run with.
struct StreamOf {
    xds: Xds,
    peer: Peer,
    client: clients::ClientHandle,
    questions: mpsc::Receiver<Question>,
    /// Whether the client may have what it is given.
    known: bool,
}

impl StreamOf {
    async fn run<S: Session>(
        mut self,
        mut session: S,
        mut requests: Streaming<S::Request>,
        responses: mpsc::Sender<Result<Response, Status>>,
    ) {
        let mut snapshots = self.xds.snapshots.clone();
        let mut shutdown = self.xds.shutdown.clone();
        info!("{}: stream opened", self.client);
        loop {
            loop {
                let snapshot = snapshots.borrow_and_update().clone();
                let told = |status: &ClientStatus| (status.types.len(), status.missing_secrets.clone());
                let known = told(session.status());
                let Some(response) = session.poll(&snapshot) else {
                    // It may have come with what there is, or ask for what there is not.
                    if told(session.status()) != known {
                        self.client.update(session.status());
                    }
                    break;
                };
                self.client.update(session.status());
                let sending = responses.reserve();
                tokio::pin!(sending);
                let place = loop {
                    tokio::select! {
                        place = &mut sending => match place {
                            Ok(place) => break place,
                            Err(_) => return,
                        },
                        Some(question) = self.questions.recv() => answer(&session, question),
                        () = asked(&mut shutdown) => return,
                    }
                };
                place.send(Ok(response));
            }
            tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => {
                        let outcome = self.take_in(&mut session, request);
                        self.client.update(session.status());
                        if let Err(status) = outcome {
                            info!("{}: stream ended: {}", self.client, status.message());
                            let _ = responses.send(Err(status)).await;
                            return;
                        }
                    }
                    Ok(None) => break,
                    Err(status) => {
                        debug!("{}: {status}", self.client);
                        break;
                    }
                },
                changed = snapshots.changed() => if changed.is_err() { break },
                Some(question) = self.questions.recv() => answer(&session, question),
                () = responses.closed() => break,
                () = asked(&mut shutdown) => break,
            }
        }
        info!("{}: stream closed", self.client);
    }

    fn take_in<S: Session>(&mut self, session: &mut S, request: S::Request) -> Result<(), Status> {
        let node = S::node(&request);
        if node.is_some() || !self.known {
            let allowed = self.xds.authorization.check(&self.peer.identity, node);
            allowed.inspect_err(|refusal| self.xds.refused(node, refusal))?;
            self.known = true;
            if let Some(node) = node {
                self.xds.check_role(node).map_err(Status::invalid_argument)?;
                session.allow(self.xds.authorization.secrets(&self.peer.identity, node));
            }
        }
        session.handle(request)
    }
}

fn answer<S: Session>(session: &S, question: Question) {
    // Whoever asked may have gone.
    let _ = question.send(session.held());
}

/// Waits until shutdown is asked for. That whoever could ask is gone is shutdown too.
async fn asked(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|asked| *asked).await;
}

/// Who the client is, by what its node says.
fn proxy_kind(user_agent_name: &str) -> ProxyKind {
    match user_agent_name {
        "culvert" => ProxyKind::Culvert,
        // "gRPC C-core linux", "gRPC Go", "gRPC Java".
        name if name.starts_with("gRPC ") => ProxyKind::Grpc,
        _ => ProxyKind::Foreign,
    }
}

/// The metadata of a node that names the services whose pods call through it: a list of `name.namespace`, or of `name` for
/// those in namespace `default`.
const SERVICES_METADATA: &str = "services";
/// The most services of which a node can be.
const MAX_SERVICES: usize = 1000;

/// What a node's metadata says of the services that it is of.
fn stated_services(node: &Node) -> Option<&Kind> {
    node.metadata.as_ref().and_then(|metadata| metadata.fields.get(SERVICES_METADATA)?.kind.as_ref())
}

/// Looks whether that can be read. What is passed over could be what keeps things from a node.
fn check_services(node: &Node) -> Result<(), String> {
    let name = |value: &Value| matches!(&value.kind, Some(Kind::StringValue(name)) if !name.is_empty());
    match stated_services(node) {
        None => Ok(()),
        Some(Kind::ListValue(list)) if list.values.len() > MAX_SERVICES => {
            Err(format!("node.metadata `{SERVICES_METADATA}`: more than {MAX_SERVICES} services"))
        }
        Some(Kind::ListValue(list)) if list.values.iter().all(name) => Ok(()),
        Some(_) => {
            Err(format!("node.metadata `{SERVICES_METADATA}`: is no list of names, such as [users, payments.shop]"))
        }
    }
}

/// The services that a node's metadata names.
pub(crate) fn named_services(node: &Node) -> BTreeSet<ObjectKey> {
    if stated_services(node).is_some() { viewer(node).services } else { BTreeSet::new() }
}

/// What a node is given: by its kind, and by the services that its metadata or its cluster names.
pub(crate) fn viewer(node: &Node) -> Viewer {
    let names: Vec<&str> = match stated_services(node) {
        Some(Kind::ListValue(list)) => list
            .values
            .iter()
            .filter_map(|value| match &value.kind {
                Some(Kind::StringValue(name)) => Some(name.as_str()),
                _ => None,
            })
            .take(MAX_SERVICES)
            .collect(),
        _ => vec![node.cluster.as_str()],
    };
    let services = names.into_iter().filter(|name| !name.is_empty()).map(|name| {
        let (name, namespace) = name.split_once('.').unwrap_or((name, "default"));
        ObjectKey::new(namespace, name)
    });
    Viewer {
        kind: proxy_kind(&node.user_agent_name),
        // One that is none is not served.
        role: Role::of(node).unwrap_or_default(),
        services: services.collect(),
        ..Viewer::default()
    }
}

/// The subscribed types of a stream, in the order in which they are pushed.
#[derive(Debug)]
struct Types<T>(Vec<(String, T)>);

impl<T> Default for Types<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Default> Types<T> {
    fn get(&self, type_url: &str) -> Option<&T> {
        self.0.iter().find(|(known, _)| known == type_url).map(|(_, state)| state)
    }

    /// The state of `type_url`, made if it is new.
    fn open(&mut self, type_url: &str) -> Result<&mut T, Status> {
        if type_url.is_empty() {
            return Err(Status::invalid_argument("type_url is missing; on an ADS stream every request needs it"));
        }
        let index = match self.0.iter().position(|(known, _)| known == type_url) {
            Some(index) => index,
            None if self.0.len() == MAX_TYPES => {
                return Err(Status::resource_exhausted(format!("more than {MAX_TYPES} resource types on one stream")));
            }
            None => {
                let rank = |type_url: &str| PUSH_ORDER.iter().position(|known| *known == type_url);
                let place = |type_url: &str| (rank(type_url).unwrap_or(PUSH_ORDER.len()), type_url.to_owned());
                let index = self.0.partition_point(|(known, _)| place(known) < place(type_url));
                self.0.insert(index, (type_url.to_owned(), T::default()));
                index
            }
        };
        // The index is that of an entry that was found or made.
        Ok(&mut self.0[index].1)
    }
}

#[cfg(test)]
impl<T: Default> std::ops::Index<&str> for Types<T> {
    type Output = T;

    fn index(&self, type_url: &str) -> &T {
        self.get(type_url).unwrap()
    }
}

fn check_name_count(type_url: &str, count: usize) -> Result<(), Status> {
    if count > MAX_NAMES {
        return Err(Status::resource_exhausted(format!("more than {MAX_NAMES} names of {type_url} on one stream")));
    }
    Ok(())
}
