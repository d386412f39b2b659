//! Envoy's view of the mesh: the xDS resources that discovery serves, as immutable snapshots.

mod clusters;
mod grpc;
mod listeners;
mod overrides;
mod policy;
mod routes;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use envoy_types::pb::google::protobuf::Any;
use prost::Message;

use crate::kubernetes::ObjectKey;
use crate::mesh::Mesh;
use crate::policy::egress_of;

/// The name of the cluster that connects to whatever address the client, or an override, chose.
pub const ORIGINAL_DST_CLUSTER: &str = "original_dst";
/// The name of the listener that serves redirected outbound connections.
pub const OUTBOUND_LISTENER: &str = "outbound";

/// Type URLs of the resources that are served.
pub mod type_url {
    /// Clusters.
    pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
    /// Endpoints.
    pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
    /// Listeners.
    pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
    /// Routes.
    pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
    /// Endpoints that only overrides reach.
    pub const OFFLOADED_SERVICE: &str = "type.googleapis.com/culvert.overrides.v1.OffloadedService";
}

/// The order in which changes are pushed, so that nothing refers to what is not there yet. Other types come after.
pub const PUSH_ORDER: [&str; 5] =
    [type_url::CLUSTER, type_url::ENDPOINT, type_url::LISTENER, type_url::ROUTE, type_url::OFFLOADED_SERVICE];

/// What is the same for all services and comes from the command line.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the outbound listener listens. The unspecified IPv6 address takes IPv4 connections too.
    pub outbound_address: IpAddr,
    /// The port of the outbound listener.
    pub outbound_port: u16,
    /// The file into which proxies write their HTTP access log, if any.
    pub access_log: Option<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { outbound_address: std::net::Ipv6Addr::UNSPECIFIED.into(), outbound_port: 15001, access_log: None }
    }
}

/// Who a resource is for. Envoy itself does not know Culvert's filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProxyKind {
    /// A node whose `user_agent_name` is `culvert`.
    Culvert,
    /// A service that calls others by gRPC's own xDS client (`xds:///users.default:80`).
    Grpc,
    /// Any other.
    Foreign,
}

impl ProxyKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Culvert, Self::Grpc, Self::Foreign];

    /// Its name for people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Culvert => "culvert",
            Self::Grpc => "grpc",
            Self::Foreign => "foreign",
        }
    }
}

/// Who asks: what a view of the resources depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Viewer {
    /// What it is.
    pub kind: ProxyKind,
    /// The services whose pods call through it, as far as it says.
    pub services: BTreeSet<ObjectKey>,
}

impl Default for Viewer {
    fn default() -> Self {
        Self { kind: ProxyKind::Foreign, services: BTreeSet::new() }
    }
}

/// One resource, encoded once for all clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resource {
    /// Its name.
    pub name: String,
    /// A hash of its content, the same in every replica.
    pub version: String,
    /// The message.
    pub body: Any,
}

/// All resources of one type.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TypeResources {
    /// A hash over the names and versions of all of them.
    pub version: String,
    /// The resources by name.
    pub resources: BTreeMap<String, Arc<Resource>>,
}

impl TypeResources {
    fn new<M: Message>(type_url: &str, messages: impl IntoIterator<Item = (String, M)>) -> Self {
        let mut resources = BTreeMap::new();
        for (name, message) in messages {
            let value = message.encode_to_vec();
            let version = hex_version(&[&value]);
            let body = Any { type_url: type_url.to_owned(), value };
            resources.insert(name.clone(), Arc::new(Resource { name, version, body }));
        }
        let parts: Vec<&[u8]> = resources.values().flat_map(|r| [r.name.as_bytes(), r.version.as_bytes()]).collect();
        let version = hex_version(&parts);
        Self { version, resources }
    }
}

/// Everything that one kind of proxy can subscribe to, by type URL.
#[derive(Debug, Clone, Default)]
pub struct ResourceSet {
    types: BTreeMap<&'static str, Arc<TypeResources>>,
}

impl ResourceSet {
    /// The resources of a type, `None` for a type that is not served.
    #[must_use]
    pub fn of_type(&self, type_url: &str) -> Option<&Arc<TypeResources>> {
        self.types.get(type_url)
    }

    /// All types that are served, by type URL.
    pub fn types(&self) -> impl Iterator<Item = (&'static str, &TypeResources)> {
        self.types.iter().map(|(type_url, resources)| (*type_url, &**resources))
    }
}

/// All resources at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The mesh that the resources describe.
    pub mesh: Arc<Mesh>,
    culvert: Arc<ResourceSet>,
    grpc: Arc<ResourceSet>,
    foreign: Arc<ResourceSet>,
    options: Options,
    /// Views of those that may not call every service: made when the first one asks, shared by all that may call the same.
    scoped: Arc<Mutex<HashMap<Scope, Arc<ResourceSet>>>>,
}

/// The most views that are kept: nodes choose of which services they say they are.
const MAX_VIEWS: usize = 10_000;

/// What a view shows: to which kind of proxy, and which services.
type Scope = (ProxyKind, BTreeSet<ObjectKey>);

impl Snapshot {
    /// Builds all resources of a mesh.
    #[must_use]
    pub fn build(mesh: Arc<Mesh>, options: &Options) -> Self {
        let shared = shared(&mesh);
        let [culvert, grpc, foreign] =
            ProxyKind::ALL.map(|kind| Arc::new(with_listeners(&shared, &mesh, options, kind)));
        Self { mesh, culvert, grpc, foreign, options: options.clone(), scoped: Arc::default() }
    }

    /// The resources for one kind of proxy, of all services.
    #[must_use]
    pub fn resources(&self, kind: ProxyKind) -> &Arc<ResourceSet> {
        match kind {
            ProxyKind::Culvert => &self.culvert,
            ProxyKind::Grpc => &self.grpc,
            ProxyKind::Foreign => &self.foreign,
        }
    }

    /// What a client is given: the services that the pods behind it may call.
    #[must_use]
    pub fn view(&self, viewer: &Viewer) -> Arc<ResourceSet> {
        let Some(allowed) = egress_of(&self.mesh, &viewer.services) else {
            return Arc::clone(self.resources(viewer.kind));
        };
        // Held while a view is made, so that a thousand clients that come back at once do not make the same one each.
        let mut scoped = self.scoped.lock().unwrap_or_else(PoisonError::into_inner);
        let scope = (viewer.kind, allowed);
        if let Some(view) = scoped.get(&scope) {
            return Arc::clone(view);
        }
        let known = scope.1.iter().filter_map(|key| self.mesh.services.get_key_value(key));
        let services = known.map(|(key, service)| (key.clone(), service.clone())).collect();
        let mesh = Mesh { services, ..Mesh::default() };
        let view = Arc::new(with_listeners(&shared(&mesh), &mesh, &self.options, viewer.kind));
        if scoped.len() < MAX_VIEWS {
            scoped.insert(scope, Arc::clone(&view));
        }
        view
    }
}

type Typed = (&'static str, Arc<TypeResources>);

fn of_type<M: Message>(type_url: &'static str, messages: Vec<(String, M)>) -> Typed {
    (type_url, Arc::new(TypeResources::new(type_url, messages)))
}

/// What is the same for all kinds of proxies.
fn shared(mesh: &Mesh) -> [Typed; 4] {
    [
        of_type(type_url::CLUSTER, clusters::clusters(mesh)),
        of_type(type_url::ENDPOINT, clusters::load_assignments(mesh)),
        of_type(type_url::ROUTE, routes::route_configurations(mesh)),
        of_type(type_url::OFFLOADED_SERVICE, overrides::offloaded_services(mesh)),
    ]
}

fn with_listeners(shared: &[Typed], mesh: &Mesh, options: &Options, kind: ProxyKind) -> ResourceSet {
    let listeners = match kind {
        ProxyKind::Grpc => grpc::listeners(mesh),
        ProxyKind::Culvert | ProxyKind::Foreign => listeners::listeners(mesh, options, kind),
    };
    let listeners = of_type(type_url::LISTENER, listeners);
    ResourceSet { types: shared.iter().cloned().chain([listeners]).collect() }
}

/// FNV-1a over the parts and their lengths: not secret, but the same in every build and replica.
fn hex_version(parts: &[&[u8]]) -> String {
    const OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let mut hash = OFFSET;
    for part in parts {
        for byte in part.len().to_le_bytes().iter().chain(*part) {
            hash = (hash ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
    }
    format!("{hash:016x}")
}

/// An extension's configuration, packed.
fn pack<M: Message + prost::Name>(message: &M) -> Any {
    Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

#[cfg(test)]
mod tests;
