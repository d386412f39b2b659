//! Views: what a client is given that may not call every service.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use envoy_types::pb::envoy::config::listener::v3::Listener;

use super::resource::{Changes, Position};
use super::{
    Change, INBOUND_LISTENER, OUTBOUND_LISTENER, ProxyKind, Resource, ResourceSet, Role, Snapshot, TypeResources,
    by_name, edge, encode, listeners, sidecar, type_url,
};
use crate::kubernetes::ObjectKey;
use crate::mesh::{Mesh, cluster_name};
use crate::policy::{egress_of, exposed_services, is_rest_on_demand};
use crate::secrets::{self, Access};

/// Above this many views that are in use, further ones are made for each client: nodes choose which services they say they
/// are of.
const MOST_SHARED: usize = 10_000;

/// Who asks: what a view of the resources depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Viewer {
    /// What it is.
    pub kind: ProxyKind,
    /// What it is for. Of gRPC's own client that does not count.
    pub role: Role,
    /// The services whose pods call through it, as far as it says.
    pub services: BTreeSet<ObjectKey>,
    /// The secrets that it may have, by who it is.
    pub secrets: Arc<Access>,
    /// The services that it has asked for by name; `None`: it cannot ask on demand.
    pub on_demand: Option<BTreeSet<ObjectKey>>,
}

impl Default for Viewer {
    fn default() -> Self {
        let (kind, role) = (ProxyKind::Foreign, Role::Node);
        Self { kind, role, services: BTreeSet::new(), secrets: Arc::default(), on_demand: None }
    }
}

/// What a client is given: the services that the pods behind it may call.
#[derive(Debug, Clone)]
pub struct View {
    /// The resources but for secrets.
    pub set: Arc<ResourceSet>,
    /// The secrets that it may have, and of which state of all of them they are.
    secrets: (Arc<TypeResources>, Position),
    position: Position,
    /// Of which state of the policies `allowed` is.
    policies: u64,
    /// What it is of; `None` is everything, for a node.
    allowed: Option<Scope>,
}

/// What a view is of.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Scope {
    /// The services; `None` is all.
    services: Option<Arc<BTreeSet<ObjectKey>>>,
    /// Whether there are routes to the rest, whose clusters are asked for when a request needs them.
    rest_on_demand: bool,
    role: Role,
    /// Of a sidecar: the services of its pod.
    own: Arc<BTreeSet<ObjectKey>>,
}

impl Scope {
    /// What somebody may have; `None` is everything, for a node.
    fn of(mesh: &Mesh, viewer: &Viewer) -> Option<Scope> {
        let role = if viewer.kind == ProxyKind::Grpc { Role::Node } else { viewer.role };
        let mut services = egress_of(mesh, &viewer.services);
        if role == Role::Edge {
            let exposed = exposed_services(mesh);
            let services = match services {
                Some(allowed) => exposed.intersection(&allowed).cloned().collect(),
                None => exposed,
            };
            return Some(Scope {
                services: Some(Arc::new(services)),
                rest_on_demand: false,
                role,
                own: Arc::default(),
            });
        }
        // gRPC's own client asks for each service by its name, which its listeners are.
        let asked_for = viewer.on_demand.as_ref().filter(|_| viewer.kind != ProxyKind::Grpc && services.is_some());
        let asked_for = asked_for.filter(|_| is_rest_on_demand(mesh, &viewer.services));
        if let Some(services) = &mut services {
            services.extend(asked_for.into_iter().flatten().cloned());
        }
        if services.is_none() && role == Role::Node {
            return None;
        }
        let own = if role == Role::Sidecar { viewer.services.clone() } else { BTreeSet::new() };
        let rest_on_demand = asked_for.is_some();
        Some(Scope { services: services.map(Arc::new), rest_on_demand, role, own: Arc::new(own) })
    }

    /// Whether a change is one of the view.
    fn has(&self, change: &Change) -> bool {
        let of_scope = match (&change.service, &self.services) {
            (Some(service), Some(services)) => services.contains(service),
            (None, _) | (_, None) => true,
        };
        of_scope || (self.rest_on_demand && change.reshaped)
    }
}

impl View {
    /// The resources of a type, `None` for a type that is not served.
    #[must_use]
    pub fn of_type(&self, type_url: &str) -> Option<&Arc<TypeResources>> {
        if type_url == type_url::SECRET { Some(&self.secrets.0) } else { self.set.of_type(type_url) }
    }
}

type Shared = HashMap<(ProxyKind, Scope), (Position, Weak<ResourceSet>)>;

/// The views that are in use, shared by all that may call the same, and by all snapshots of a series.
#[derive(Debug, Clone, Default)]
pub(super) struct Views(Arc<Mutex<Shared>>);

impl Snapshot {
    /// What a client is given now. `before` is what it was given last: a view that no change touches is found without
    /// looking further.
    #[must_use]
    pub fn view(&self, viewer: &Viewer, before: Option<&View>) -> View {
        let before = before.filter(|before| self.position().includes(before.position));
        let (position, policies) = (self.position(), self.policies);
        if let Some(before) = before.filter(|before| before.position == position) {
            return before.clone();
        }
        let allowed = match before {
            Some(before) if before.policies == policies => before.allowed.clone(),
            _ => Scope::of(&self.mesh, viewer),
        };
        let secrets = self.secrets_of(&viewer.secrets, before);
        let Some(scope) = allowed else {
            return View { set: Arc::clone(self.resources(viewer.kind)), secrets, position, policies, allowed: None };
        };
        let same_scope = before.filter(|before| before.allowed.as_ref() == Some(&scope));
        let set = match same_scope {
            Some(before) if !self.touches(&scope, before.position) => Arc::clone(&before.set),
            _ => self.shared(viewer.kind, &scope),
        };
        View { set, secrets, position, policies, allowed: Some(scope) }
    }

    /// The secrets that somebody may have, and of which state of all of them they are.
    fn secrets_of(&self, access: &Access, before: Option<&View>) -> (Arc<TypeResources>, Position) {
        let position = self.secrets.position();
        if let Some(before) = before.filter(|before| before.secrets.1 == position) {
            return before.secrets.clone();
        }
        let all = self.secrets.resources.iter();
        let allowed = all.filter(|(name, _)| access.allows(name));
        let mut resources: BTreeMap<_, _> =
            allowed.map(|(name, resource)| (Arc::clone(name), Arc::clone(resource))).collect();
        let own = access.own.as_ref().and_then(|name| self.mesh.secrets.get(&**name));
        let own = own.into_iter().flat_map(|secret| secret.messages(secrets::OWN));
        resources.extend(by_name(encode(type_url::SECRET, own.collect())));
        let known = before.map(|before| Arc::clone(&before.secrets.0)).unwrap_or_default();
        (known.replaced(resources), position)
    }

    /// Whether any of these services has changed since.
    fn touches(&self, scope: &Scope, since: Position) -> bool {
        self.history.since(since).is_none_or(|mut changes| changes.any(|change| scope.has(change)))
    }

    /// The view of this scope that all share.
    fn shared(&self, kind: ProxyKind, scope: &Scope) -> Arc<ResourceSet> {
        // Held while a view is made, so that a thousand clients that come back at once do not make the same one each.
        let mut shared = self.views.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (kind, scope.clone());
        let known = shared.get(&key).and_then(|(position, set)| Some((*position, set.upgrade()?)));
        // One that another client has made of a newer snapshot stays; this client gets there in a moment.
        let is_newest = known.as_ref().is_none_or(|(position, _)| self.position().includes(*position));
        let before = known.filter(|_| is_newest);
        let set = match before {
            Some((position, set)) if !self.touches(scope, position) => set,
            before => Arc::new(self.scoped(kind, scope, before.as_ref().map(|(position, set)| (*position, &**set)))),
        };
        if shared.len() >= shared.capacity() {
            shared.retain(|_, (_, set)| set.strong_count() > 0);
        }
        if is_newest && (shared.len() < MOST_SHARED || shared.contains_key(&key)) {
            shared.insert(key, (self.position(), Arc::downgrade(&set)));
        }
        set
    }

    /// Makes a view, from what it was before if that is known.
    fn scoped(&self, kind: ProxyKind, scope: &Scope, before: Option<(Position, &ResourceSet)>) -> ResourceSet {
        let mesh = match &scope.services {
            None => Arc::clone(&self.mesh),
            Some(services) => {
                let known = services.iter().filter_map(|key| self.mesh.services.get_key_value(key));
                let services = known.map(|(key, service)| (key.clone(), Arc::clone(service))).collect();
                Arc::new(Mesh { services, ..Mesh::default() })
            }
        };
        let reshaped = before.is_none_or(|(position, _)| {
            let changes = self.history.since(position);
            let reshaped = |change: &Change| change.reshaped && change.service.is_some() && scope.has(change);
            changes.is_none_or(|mut all| all.any(reshaped))
        });
        let before = before.map(|(_, set)| set.clone()).unwrap_or_default();
        let of_all = self.resources(kind);
        let at_edge: Option<BTreeSet<String>> = (scope.role == Role::Edge).then(|| {
            let ports = mesh.services.iter().filter_map(|(key, service)| Some((key, edge::exposed(service)?.1)));
            ports.map(|(key, port)| cluster_name(key, port)).collect()
        });
        let mut set = ResourceSet { beside: before.beside.clone(), ..ResourceSet::default() };
        for (type_url, known) in &before.types {
            let the_same_for_all = || Arc::clone(of_all.of_type(type_url).unwrap_or(known));
            let replaced = match *type_url {
                type_url::OVERRIDE_SHARE => the_same_for_all(),
                type_url::LISTENER if kind != ProxyKind::Grpc && !reshaped => Arc::clone(known),
                type_url::LISTENER if kind != ProxyKind::Grpc => known.replaced(self.listeners(&mesh, kind, scope)),
                type_url::ROUTE if scope.role == Role::Edge && !reshaped => Arc::clone(known),
                type_url::ROUTE if scope.role == Role::Edge => {
                    let routes = edge::route_configuration(&mesh, &self.options, kind);
                    known.replaced(by_name(encode(type_url::ROUTE, vec![routes])))
                }
                type_url::ROUTE if scope.rest_on_demand || scope.services.is_none() => the_same_for_all(),
                type_url::ROUTE if !reshaped => Arc::clone(known),
                type_url::ROUTE => {
                    let ports = mesh.services.values().flat_map(|service| service.ports.keys().copied()).collect();
                    known.replaced(super::routes(&mesh, &ports))
                }
                type_url::CLUSTER if scope.role == Role::Sidecar && !reshaped => Arc::clone(known),
                type_url::CLUSTER if scope.services.is_none() => {
                    let (clusters, beside) = self.beside_all(known, &the_same_for_all(), before.beside.as_ref(), scope);
                    set.beside = Some(beside);
                    clusters
                }
                _ if scope.services.is_none() => the_same_for_all(),
                type_url => {
                    let made = mesh.services.keys().filter_map(|key| self.made.get(key));
                    let of_services = made.flat_map(|made| made.of_type(type_url));
                    // At the edge nothing leads to other ports than those that are called from outside.
                    let wanted =
                        |resource: &Arc<Resource>| at_edge.as_ref().is_none_or(|it| it.contains(&*resource.name));
                    let of_services = of_services.filter(wanted).chain(super::always(type_url));
                    let is_sidecars = type_url == type_url::CLUSTER && scope.role == Role::Sidecar;
                    let own = is_sidecars.then(|| self.own_clusters(scope));
                    let resources = of_services.chain(own.into_iter().flatten());
                    known.replaced(resources.map(|resource| (Arc::clone(&resource.name), resource)).collect())
                }
            };
            set.types.insert(type_url, replaced);
        }
        set
    }

    /// The clusters that only a sidecar of these services has.
    fn own_clusters(&self, scope: &Scope) -> Vec<Arc<Resource>> {
        encode(type_url::CLUSTER, sidecar::clusters(&self.mesh, &scope.own, &self.options))
    }

    /// The clusters of a sidecar that is given everything: those of `all`, and its own ones. What it has in common with all others is shared with
    /// them, and only what has changed is looked at.
    fn beside_all(
        &self,
        known: &Arc<TypeResources>,
        all: &Arc<TypeResources>,
        before: Option<&(Position, Vec<Arc<str>>)>,
        scope: &Scope,
    ) -> (Arc<TypeResources>, (Position, Vec<Arc<str>>)) {
        let own = by_name(self.own_clusters(scope));
        let names = own.keys().cloned().collect();
        let own = own.into_iter().map(|(name, resource)| (name, Some(resource)));
        let news = before.and_then(|(position, had)| Some((all.changed_since(*position)?, had)));
        let clusters = match news {
            Some((changed, had)) => {
                let of_all = |name: &Arc<str>| (Arc::clone(name), all.resources.get(name).cloned());
                let mut changes: Changes = changed.chain(had).map(of_all).collect();
                changes.extend(own);
                known.with(changes)
            }
            None => all.fork().with(own.collect()),
        };
        (clusters, (all.position(), names))
    }

    /// The listener for what pods call, of sidecars that are given everything: the same for all.
    fn outbound_of_sidecars(&self, kind: ProxyKind) -> Arc<Resource> {
        let [culvert, foreign] = &*self.sidecars_outbound;
        let made = if kind == ProxyKind::Culvert { culvert } else { foreign };
        Arc::clone(made.get_or_init(|| {
            let outbound = listeners::outbound(&self.mesh, None, &self.options, (kind, Role::Sidecar));
            Arc::new(Resource::new(type_url::LISTENER, OUTBOUND_LISTENER, &outbound))
        }))
    }

    /// The listeners of a proxy with this scope. `mesh`: what there is in it.
    fn listeners(&self, mesh: &Mesh, kind: ProxyKind, scope: &Scope) -> BTreeMap<Arc<str>, Arc<Resource>> {
        let one = |name: &str, listener: &Listener| Arc::new(Resource::new(type_url::LISTENER, name, listener));
        let listeners = match scope.role {
            Role::Edge => encode(type_url::LISTENER, edge::listeners(mesh, &self.options, kind)),
            role => {
                let outbound = if role == Role::Sidecar && scope.services.is_none() {
                    self.outbound_of_sidecars(kind)
                } else {
                    let rest = scope.rest_on_demand.then_some(&*self.mesh);
                    one(OUTBOUND_LISTENER, &listeners::outbound(mesh, rest, &self.options, (kind, role)))
                };
                let inbound = (role == Role::Sidecar)
                    .then(|| one(INBOUND_LISTENER, &sidecar::inbound(&self.mesh, &scope.own, &self.options)));
                [outbound].into_iter().chain(inbound).collect()
            }
        };
        by_name(listeners)
    }
}
