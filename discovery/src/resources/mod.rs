//! Envoy's view of the mesh: the xDS resources that discovery serves, as immutable snapshots.

mod clusters;
pub mod edge;
mod grpc;
mod listeners;
mod overrides;
mod policy;
mod resource;
pub mod role;
mod routes;
mod sidecar;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, LazyLock, OnceLock};

use culvert_xds_client::api::culvert::extensions::filters::http::overrides::v1::Override;
use envoy_types::pb::google::protobuf::Any;
use prost::Message;

pub(crate) use self::clusters::socket_address;
pub(crate) use self::policy::{duration, health_check};
pub use self::resource::{ByName, Position, Resource, TypeResources};
use self::resource::{Changes, History};
pub use self::role::Role;
use self::view::Views;
pub use self::view::{View, Viewer};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, MeshPort, MeshService};

/// The name of the cluster that connects to whatever address the client, or an override, chose.
pub const ORIGINAL_DST_CLUSTER: &str = "original_dst";
/// The name of the listener that serves redirected outbound connections.
pub const OUTBOUND_LISTENER: &str = "outbound";
/// The name of a sidecar's listener for what calls its pod.
pub const INBOUND_LISTENER: &str = "inbound";
/// The name of the routes of edge proxies.
pub const EDGE_ROUTES: &str = "edge";

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
    /// Certificates, authorities and other secrets.
    pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
    /// Stored sets of overrides.
    pub const OVERRIDE_SHARE: &str = "type.googleapis.com/culvert.overrides.v1.OverrideShare";
}

/// The order in which changes are pushed, so that nothing refers to what is not there yet. Other types come after.
pub const PUSH_ORDER: [&str; 6] = [
    type_url::CLUSTER,
    type_url::ENDPOINT,
    type_url::LISTENER,
    type_url::ROUTE,
    type_url::OFFLOADED_SERVICE,
    type_url::OVERRIDE_SHARE,
];

/// What is the same for all services and comes from the command line.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the outbound listener listens. The unspecified IPv6 address takes IPv4 connections too.
    pub outbound_address: IpAddr,
    /// The port of the outbound listener.
    pub outbound_port: u16,
    /// The port of sidecars' inbound listener.
    pub inbound_port: u16,
    /// How edge proxies are configured, if there are any.
    pub edge: Option<edge::EdgeOptions>,
    /// The file into which proxies write their HTTP access log, if any.
    pub access_log: Option<String>,
    /// How the proxies' override filters are configured, but for `original_dst_cluster`.
    pub overrides: Override,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            outbound_address: std::net::Ipv6Addr::UNSPECIFIED.into(),
            outbound_port: 15001,
            inbound_port: 15006,
            edge: None,
            access_log: None,
            overrides: Override::default(),
        }
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

/// Everything that one kind of proxy can subscribe to, by type URL.
#[derive(Debug, Clone)]
pub struct ResourceSet {
    types: BTreeMap<&'static str, Arc<TypeResources>>,
    /// Of a sidecar that is given everything: which state of everybody's clusters its own ones were made from, and the names of those that it
    /// has beside them.
    beside: Option<(Position, Vec<Arc<str>>)>,
}

impl Default for ResourceSet {
    fn default() -> Self {
        Self { types: PUSH_ORDER.into_iter().map(|type_url| (type_url, Arc::default())).collect(), beside: None }
    }
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
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The mesh that the resources describe.
    pub mesh: Arc<Mesh>,
    culvert: Arc<ResourceSet>,
    grpc: Arc<ResourceSet>,
    foreign: Arc<ResourceSet>,
    /// All that anybody may have, who may have it.
    secrets: Arc<TypeResources>,
    options: Options,
    /// What became of each service.
    made: BTreeMap<Arc<ObjectKey>, Arc<Made>>,
    history: History<Change>,
    /// Counts up when what may be called by whom changes.
    policies: u64,
    views: Views,
    /// The listener for what their pods call, of sidecars that are given everything: for culvertd, and for others.
    sidecars_outbound: Arc<[OnceLock<Arc<Resource>>; 2]>,
}

/// A service that is new, different or gone; without a name, something that every view has.
#[derive(Debug)]
struct Change {
    service: Option<ObjectKey>,
    /// Whether more than its endpoints changed.
    reshaped: bool,
}

/// What becomes of one service alone.
#[derive(Debug, Default)]
struct Made {
    clusters: Vec<Arc<Resource>>,
    assignments: Vec<Arc<Resource>>,
    offloaded: Vec<Arc<Resource>>,
    grpc_listeners: Vec<Arc<Resource>>,
}

impl Made {
    /// The resources of a service. Those that endpoints do not change are taken from `before`.
    fn new(key: &ObjectKey, service: &Arc<MeshService>, before: Option<&Self>) -> Self {
        let services = BTreeMap::from([(key.clone(), Arc::clone(service))]);
        let mesh = Mesh { services, ..Mesh::default() };
        let assignments = encode(type_url::ENDPOINT, clusters::load_assignments(&mesh));
        let offloaded = encode(type_url::OFFLOADED_SERVICE, overrides::offloaded_services(&mesh));
        let (clusters, grpc_listeners) = match before {
            Some(before) => (before.clusters.clone(), before.grpc_listeners.clone()),
            None => (
                encode(type_url::CLUSTER, clusters::clusters(&mesh)),
                encode(type_url::LISTENER, grpc::listeners(&mesh)),
            ),
        };
        Self { clusters, assignments, offloaded, grpc_listeners }
    }

    /// The resources of a type; the listeners are gRPC's.
    fn of_type(&self, type_url: &str) -> impl Iterator<Item = Arc<Resource>> {
        let resources: &[_] = match type_url {
            type_url::CLUSTER => &self.clusters,
            type_url::ENDPOINT => &self.assignments,
            type_url::OFFLOADED_SERVICE => &self.offloaded,
            type_url::LISTENER => &self.grpc_listeners,
            _ => &[],
        };
        resources.iter().cloned()
    }
}

/// Types whose resources are each of one service.
const OF_SERVICES: [&str; 3] = [type_url::CLUSTER, type_url::ENDPOINT, type_url::OFFLOADED_SERVICE];

impl Default for Snapshot {
    fn default() -> Self {
        Self::empty(&Options::default())
    }
}

impl Snapshot {
    /// Builds all resources of a mesh.
    #[must_use]
    pub fn build(mesh: Arc<Mesh>, options: &Options) -> Self {
        let all = mesh.services.keys().cloned().collect();
        Self::empty(options).next(mesh, &all)
    }

    /// The resources of a mesh without services.
    fn empty(options: &Options) -> Self {
        let mut snapshot = Self {
            mesh: Arc::default(),
            culvert: Arc::default(),
            grpc: Arc::default(),
            foreign: Arc::default(),
            secrets: Arc::default(),
            options: options.clone(),
            made: BTreeMap::new(),
            history: History::new(),
            policies: 0,
            views: Views::default(),
            sidecars_outbound: Arc::default(),
        };
        let always = |type_url| always(type_url).map(|resource| (Arc::clone(&resource.name), Some(resource)));
        for type_url in OF_SERVICES {
            snapshot.change(&ProxyKind::ALL, type_url, always(type_url).collect());
        }
        snapshot.renew_listeners();
        snapshot
    }

    /// The resources of a mesh that differs from the one before in these services, which costs what they cost.
    #[must_use]
    pub fn next(&self, mesh: Arc<Mesh>, changed: &BTreeSet<ObjectKey>) -> Self {
        let mut next = Self { mesh, ..self.clone() };
        let mut changes: BTreeMap<&'static str, Changes> = BTreeMap::new();
        let mut history = Vec::new();
        let mut http_ports = BTreeSet::new();
        let mut reshaped_any = false;
        for key in changed {
            let services = [&self.mesh, &next.mesh].map(|mesh| mesh.services.get(key));
            let reshaped = !has_same_shape(services);
            reshaped_any |= reshaped;
            if reshaped {
                http_ports.extend(services.into_iter().flatten().flat_map(|service| service.ports.keys().copied()));
            }
            let egress = services.map(|service| {
                let manifest = service?.manifest.as_ref()?;
                Some((manifest.egress.as_ref(), manifest.on_demand))
            });
            let exposed = services.map(|service| edge::exposed(service?));
            if egress[0] != egress[1] || exposed[0] != exposed[1] || services[0].is_some() != services[1].is_some() {
                next.policies += 1;
            }
            let before = next.made.get(key).cloned();
            let reused = before.as_deref().filter(|_| !reshaped);
            let after = services[1].map(|service| Arc::new(Made::new(key, service, reused)));
            for type_url in OF_SERVICES.into_iter().chain([type_url::LISTENER]) {
                let changes = changes.entry(type_url).or_default();
                let of_type = |made: &Arc<Made>| made.of_type(type_url).collect::<Vec<_>>();
                let [before, after] = [&before, &after].map(|made| made.as_ref().map(of_type).unwrap_or_default());
                changes.extend(before.into_iter().map(|resource| (Arc::clone(&resource.name), None)));
                changes.extend(after.into_iter().map(|resource| (Arc::clone(&resource.name), Some(resource))));
            }
            match after {
                Some(after) => next.made.insert(Arc::new(key.clone()), after),
                None => next.made.remove(key),
            };
            history.push(Change { service: Some(key.clone()), reshaped });
        }
        for (type_url, changes) in changes {
            let kinds: &[_] = if type_url == type_url::LISTENER { &[ProxyKind::Grpc] } else { &ProxyKind::ALL };
            next.change(kinds, type_url, changes);
        }
        if reshaped_any {
            next.renew_routes(&http_ports);
            next.renew_listeners();
        }
        if self.mesh.callers != next.mesh.callers {
            next.policies += 1;
            history.push(Change { service: None, reshaped: false });
        }
        if self.mesh.shares != next.mesh.shares {
            let shares = |mesh: &Mesh| encode(type_url::OVERRIDE_SHARE, overrides::shares(mesh));
            let gone = shares(&self.mesh).into_iter().map(|resource| (Arc::clone(&resource.name), None));
            let mut changes: Changes = gone.collect();
            let there = shares(&next.mesh).into_iter();
            changes.extend(there.map(|resource| (Arc::clone(&resource.name), Some(resource))));
            next.change(&ProxyKind::ALL, type_url::OVERRIDE_SHARE, changes);
            history.push(Change { service: None, reshaped: false });
        }
        if self.mesh.secrets != next.mesh.secrets {
            let messages = next.mesh.secrets.iter().flat_map(|(name, secret)| secret.messages(name));
            next.secrets = next.secrets.replaced(by_name(encode(type_url::SECRET, messages.collect())));
        }
        next.history.push(history);
        next
    }

    /// Which snapshot it is.
    #[must_use]
    pub fn position(&self) -> Position {
        self.history.position()
    }

    /// All secrets.
    #[must_use]
    pub fn secrets(&self) -> &Arc<TypeResources> {
        &self.secrets
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

    fn resources_mut(&mut self, kind: ProxyKind) -> &mut ResourceSet {
        Arc::make_mut(match kind {
            ProxyKind::Culvert => &mut self.culvert,
            ProxyKind::Grpc => &mut self.grpc,
            ProxyKind::Foreign => &mut self.foreign,
        })
    }

    /// Changes a type, which these kinds of proxies have in common.
    fn change(&mut self, kinds: &[ProxyKind], type_url: &'static str, changes: Changes) {
        let Some(known) = kinds.first().and_then(|kind| self.resources(*kind).of_type(type_url)) else { return };
        let changed = known.with(changes);
        for kind in kinds {
            self.resources_mut(*kind).types.insert(type_url, Arc::clone(&changed));
        }
    }

    /// Makes the routes of these ports anew.
    fn renew_routes(&mut self, ports: &BTreeSet<u16>) {
        let gone = ports.iter().map(|port| (routes::route_configuration_name(*port).into(), None));
        let mut changes: Changes = gone.collect();
        changes.extend(routes(&self.mesh, ports).into_iter().map(|(name, resource)| (name, Some(resource))));
        self.change(&ProxyKind::ALL, type_url::ROUTE, changes);
    }

    /// Makes the proxies' listeners anew.
    fn renew_listeners(&mut self) {
        self.sidecars_outbound = Arc::default();
        for kind in [ProxyKind::Culvert, ProxyKind::Foreign] {
            let outbound = listeners::outbound(&self.mesh, None, &self.options, (kind, Role::Node));
            let listeners = by_name(encode(type_url::LISTENER, vec![(OUTBOUND_LISTENER.to_owned(), outbound)]));
            let changes = listeners.into_iter().map(|(name, resource)| (name, Some(resource))).collect();
            self.change(&[kind], type_url::LISTENER, changes);
        }
    }

    /// How edge proxies are configured.
    #[must_use]
    pub fn edge(&self) -> Option<&edge::EdgeOptions> {
        self.options.edge.as_ref()
    }
}

/// Resources that there are whatever services there are.
fn always(type_url: &str) -> impl Iterator<Item = Arc<Resource>> {
    static PASSTHROUGH: LazyLock<Arc<Resource>> =
        LazyLock::new(|| Arc::new(Resource::new(type_url::CLUSTER, ORIGINAL_DST_CLUSTER, &clusters::original_dst())));
    (type_url == type_url::CLUSTER).then(|| Arc::clone(&PASSTHROUGH)).into_iter()
}

fn routes(mesh: &Mesh, ports: &BTreeSet<u16>) -> BTreeMap<Arc<str>, Arc<Resource>> {
    by_name(encode(type_url::ROUTE, routes::route_configurations(mesh, ports)))
}

fn encode<M: Message>(type_url: &'static str, messages: Vec<(String, M)>) -> Vec<Arc<Resource>> {
    messages.iter().map(|(name, message)| Arc::new(Resource::new(type_url, name, message))).collect()
}

fn by_name(resources: Vec<Arc<Resource>>) -> BTreeMap<Arc<str>, Arc<Resource>> {
    resources.into_iter().map(|resource| (Arc::clone(&resource.name), resource)).collect()
}

/// Whether two states of a service differ at most in its endpoints.
fn has_same_shape(services: [Option<&Arc<MeshService>>; 2]) -> bool {
    let [Some(one), Some(other)] = services else { return false };
    let same_port = |(one, other): (&MeshPort, &MeshPort)| {
        // Endpoints, offloaded ones too, are in resources of their own.
        let MeshPort { protocol, vips, external, endpoints: _, offloaded: _, targets } = one;
        (protocol, vips, external, targets) == (&other.protocol, &other.vips, &other.external, &other.targets)
    };
    let MeshService { clusters: _, ports, manifest } = &**one;
    *manifest == other.manifest
        && ports.keys().eq(other.ports.keys())
        && ports.values().zip(other.ports.values()).all(same_port)
}

/// An extension's configuration, packed.
fn pack<M: Message + prost::Name>(message: &M) -> Any {
    Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

#[cfg(test)]
mod role_tests;
#[cfg(test)]
mod tests;
