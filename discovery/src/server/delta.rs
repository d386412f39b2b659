//! The incremental variant of xDS, without I/O.
//!
//! A response holds only what changed. Rules:
//! - At most one response a type waits for its ACK or NACK. A large change goes in several, each after the ACK of the
//!   one before.
//! - The answer to an older response is stale and does not count as one; changes of the subscription that come with it
//!   do count.
//! - Whatever is newly subscribed is answered: sent, or listed as removed if it does not exist.
//! - Clusters and endpoints are taken away only after the listeners and routes that used them, and routes after the
//!   listeners (make before break), and not while the client refuses newer ones of those.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use culvert_xds_client::overrides::split_service;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use tonic::Status;
use tracing::debug;

use super::clients::ClientStatus;
use super::csds::{Held, HeldState};
use super::response::{Response, Variant};
use super::{NOTHING, Session, Types, WILDCARD, check_name_count, viewer};
use crate::kubernetes::ObjectKey;
use crate::resources::{Position, Snapshot, TypeResources, View, Viewer, type_url};
use crate::secrets::Access;

/// A response is ended when its resources have this many bytes: gRPC clients read 4 MiB unless told otherwise.
const RESPONSE_BYTES: usize = 2 * 1024 * 1024;

/// One delta stream.
#[derive(Debug)]
pub struct DeltaSession {
    viewer: Viewer,
    view: Option<View>,
    next_nonce: u64,
    types: Types<TypeState>,
    status: ClientStatus,
    response_bytes: usize,
}

impl Default for DeltaSession {
    fn default() -> Self {
        Self {
            viewer: Viewer { on_demand: Some(BTreeSet::new()), ..Viewer::default() },
            view: None,
            next_nonce: 1,
            types: Types::default(),
            status: ClientStatus::new("delta"),
            response_bytes: RESPONSE_BYTES,
        }
    }
}

#[derive(Debug, Default)]
struct TypeState {
    /// Whether a request of this type came before.
    opened: bool,
    wildcard: bool,
    names: BTreeSet<Arc<str>>,
    has: Has,
    /// Names that may have to be sent or removed. All others are known not to.
    open: BTreeSet<Arc<str>>,
    /// The state of the type in which `open` was brought up to date.
    seen: Option<Position>,
    /// Names that must be answered even if nothing changed.
    due: BTreeSet<Arc<str>>,
    /// Whether an empty response is due: the client waits to hear that there is nothing.
    greeting_due: bool,
    /// The response that has not been answered yet.
    awaiting: Option<Unanswered>,
    /// The names in what the client has refused, older versions of which it may use. Which of them it objects to is not known.
    rejected: BTreeSet<Arc<str>>,
}

/// What a client has, as far as we know. It shares what most clients have with the snapshots.
#[derive(Debug, Default)]
struct Has {
    /// What it had when it had everything that it wanted.
    all: Option<Arc<TypeResources>>,
    /// What has become of it since, by name: a version, or nothing.
    since: BTreeMap<Arc<str>, Option<Arc<str>>>,
}

/// A response that has not been answered.
#[derive(Debug)]
struct Unanswered {
    nonce: String,
    /// What it sent and removed.
    names: Vec<Arc<str>>,
}

impl TypeState {
    /// Whether the client has taken in all that there is.
    fn is_settled(&self, available: Option<&Arc<TypeResources>>) -> bool {
        let is_known = self.seen == available.map(|available| available.position());
        self.awaiting.is_none() && self.rejected.is_empty() && is_known && self.open.is_empty()
    }

    /// The client has answered a response with these names.
    fn answered(&mut self, names: Vec<Arc<str>>, accepted: bool) {
        if !accepted {
            self.rejected.extend(names);
        } else if names.iter().any(|name| self.rejected.contains(name)) {
            // What mends a refused response is one of its names, sent anew or removed. Other parts of one large change are not.
            self.rejected.clear();
        }
    }

    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    /// The version that the client has.
    fn version(&self, name: &str) -> Option<&Arc<str>> {
        match self.has.since.get(name) {
            Some(version) => version.as_ref(),
            None if self.wants(name) => self.has.all.as_ref()?.resources.get(name).map(|resource| &resource.version),
            None => None,
        }
    }

    fn subscribe(&mut self, name: Arc<str>) {
        // What a reconnecting client says it has need not be sent again unless it changed.
        let known_from_before = self.version(&name).is_some() && !self.names.contains(&name);
        if !known_from_before {
            self.due.insert(Arc::clone(&name));
            self.has.since.entry(Arc::clone(&name)).or_insert(None);
        }
        self.open.insert(Arc::clone(&name));
        self.names.insert(name);
    }

    fn unsubscribe(&mut self, name: &str) {
        self.names.remove(name);
        self.rejected.remove(name);
        self.due.remove(name);
        self.open.remove(name);
        if self.wildcard {
            // The resource is still wanted, and the client may have dropped it.
            let name = Arc::<str>::from(name);
            self.has.since.insert(Arc::clone(&name), None);
            self.open.insert(name);
        } else {
            self.has.since.remove(name);
        }
    }

    fn subscribe_wildcard(&mut self) {
        if !self.wildcard {
            // Of what is shared it has its names alone.
            self.write_down_names();
            self.wildcard = true;
            self.seen = None;
        }
    }

    fn unsubscribe_wildcard(&mut self) {
        self.write_down_names();
        self.wildcard = false;
        self.has.since.retain(|name, _| self.names.contains(name));
        self.rejected.retain(|name| self.names.contains(name));
        self.open.retain(|name| self.names.contains(name));
    }

    /// Shares what the client has with no snapshot any more.
    fn write_down_names(&mut self) {
        let named = self.names.iter().map(|name| (Arc::clone(name), self.version(name).cloned()));
        let named: Vec<_> = named.collect();
        self.has.all = None;
        self.has.since.extend(named);
    }

    /// Finds out which names may have to be sent or removed.
    fn look(&mut self, available: &TypeResources) {
        if self.seen == Some(available.position()) {
            return;
        }
        match self.seen.and_then(|seen| available.changed_since(seen)) {
            Some(changed) => {
                let wanted = changed.filter(|name| self.wildcard || self.names.contains(*name));
                self.open.extend(wanted.cloned());
            }
            None => {
                let differs = |name: &Arc<str>, version: Option<&Arc<str>>| self.version(name) != version;
                let all = available.resources.iter().filter(|(name, _)| self.wants(name));
                let mut open: BTreeSet<Arc<str>> = all
                    .filter(|(name, new)| differs(name, Some(&new.version)))
                    .map(|(name, _)| Arc::clone(name))
                    .collect();
                let had = self.has.all.iter().flat_map(|all| all.resources.keys()).chain(self.has.since.keys());
                let gone = had.filter(|name| self.wants(name) && !available.resources.contains_key(*name));
                open.extend(gone.filter(|name| differs(name, None)).cloned());
                open.extend(self.due.iter().cloned());
                self.open = open;
            }
        }
        self.seen = Some(available.position());
    }

    /// Names of what is to be sent now, and whether that is all. What turns out to be no news is not open any more.
    fn news(&mut self, available: &TypeResources, response_bytes: usize) -> (Vec<Arc<str>>, bool) {
        let (mut bytes, mut complete) = (0, true);
        let (mut names, mut same) = (Vec::new(), Vec::new());
        for name in &self.open {
            let Some(resource) = available.resources.get(name) else { continue };
            if !self.due.contains(name) && self.version(name) == Some(&resource.version) {
                same.push(Arc::clone(name));
                continue;
            }
            if !names.is_empty() && bytes + resource.length() > response_bytes {
                complete = false;
                break;
            }
            bytes += resource.length();
            names.push(Arc::clone(&resource.name));
        }
        for name in same {
            self.open.remove(&name);
        }
        (names, complete)
    }

    /// Names of what does not exist: all that the client has or asked for, or only what it just asked for.
    fn gone(&mut self, available: &TypeResources, only_asked: bool) -> Vec<Arc<str>> {
        let missing = self.open.iter().filter(|name| !available.resources.contains_key(*name));
        let (mut gone, mut nothing) = (Vec::new(), Vec::new());
        for name in missing {
            match self.version(name) {
                Some(_) if only_asked => {}
                Some(_) => gone.push(Arc::clone(name)),
                None if self.due.contains(name) => gone.push(Arc::clone(name)),
                None => nothing.push(Arc::clone(name)),
            }
        }
        for name in nothing {
            self.open.remove(&name);
        }
        gone
    }

    /// Notes what the client is sent of a name.
    fn note(&mut self, name: &Arc<str>, version: Option<Arc<str>>) {
        self.open.remove(name);
        self.due.remove(name);
        if self.names.contains(name) {
            // The snapshot's name takes the place of the client's, so that a thousand clients do not have one each.
            self.names.replace(Arc::clone(name));
        }
        self.has.since.insert(Arc::clone(name), version);
    }

    /// If the client has all that it wants, that is written down as a whole.
    fn settle(&mut self, available: &Arc<TypeResources>) {
        if self.open.is_empty() {
            let Self { wildcard, names, has, .. } = self;
            has.all = Some(Arc::clone(available));
            has.since.retain(|name, version| version.is_some() && !*wildcard && !names.contains(name));
        }
    }
}

/// The service that an Envoy cluster is called after, whether there is one or not.
fn service_of(cluster: &str) -> ObjectKey {
    let (name, namespace) = split_service(cluster.rsplit_once(':').map_or(cluster, |(service, _)| service));
    ObjectKey::new(namespace, name)
}

impl Session for DeltaSession {
    type Request = DeltaDiscoveryRequest;

    fn handle(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            let Viewer { secrets, on_demand, .. } = self.viewer.clone();
            let viewer = Viewer { secrets, on_demand, ..viewer(node) };
            if viewer != self.viewer {
                (self.viewer, self.view) = (viewer, None);
            }
        }
        self.status.identify(request.node.as_ref());
        let state = self.types.open(&request.type_url)?;
        if !request.response_nonce.is_empty() {
            if let Some(answered) = state.awaiting.take_if(|awaiting| awaiting.nonce == request.response_nonce) {
                state.answered(answered.names, request.error_detail.is_none());
                let rejection = request.error_detail.as_ref().map(|error| error.message.as_str());
                self.status.answered(&request.type_url, rejection);
            } else {
                debug!(client = self.status.node, nonce = request.response_nonce, "ignored a stale nonce");
            }
        }
        if !state.opened {
            state.opened = true;
            check_name_count(&request.type_url, request.initial_resource_versions.len())?;
            let versions = request.initial_resource_versions.into_iter();
            state.has.since = versions.map(|(name, version)| (name.into(), Some(version.into()))).collect();
            state.greeting_due = state.has.since.is_empty();
            state.wildcard = request.resource_names_subscribe.is_empty();
        }
        for name in request.resource_names_unsubscribe {
            if name == WILDCARD {
                state.unsubscribe_wildcard();
            } else {
                state.unsubscribe(&name);
            }
        }
        for name in request.resource_names_subscribe {
            if name == WILDCARD {
                state.subscribe_wildcard();
            } else {
                state.subscribe(name.into());
            }
        }
        check_name_count(&request.type_url, state.names.len())?;
        if request.type_url == type_url::CLUSTER {
            let named = state.names.iter().map(|name| service_of(name)).collect();
            if self.viewer.on_demand.as_ref() != Some(&named) {
                (self.viewer.on_demand, self.view) = (Some(named), None);
            }
        }
        Ok(())
    }

    fn allow(&mut self, secrets: Access) {
        if *self.viewer.secrets != secrets {
            self.viewer.secrets = Arc::new(secrets);
            self.view = None;
        }
    }

    fn poll(&mut self, snapshot: &Snapshot) -> Option<Response> {
        let view = snapshot.view(&self.viewer, self.view.as_ref());
        // Twice, because what was held back may be due once the types after it turn out to have no news.
        let types = 0..self.types.0.len();
        let response = types.clone().chain(types).find_map(|index| self.poll_type(index, &view));
        if let Some(state) = self.types.get(type_url::SECRET) {
            self.status.asks(state.names.iter().map(|name| &**name), view.of_type(type_url::SECRET));
        }
        self.view = Some(view);
        response
    }

    fn status(&self) -> &ClientStatus {
        &self.status
    }

    fn held(&self) -> Vec<Held> {
        let mut held = Vec::new();
        for (type_url, state) in &self.types.0 {
            let shared = state.has.all.iter().flat_map(|all| all.resources.keys());
            let known: BTreeSet<&Arc<str>> =
                shared.chain(state.has.since.keys()).chain(&state.names).filter(|name| state.wants(name)).collect();
            let sent = |name: &Arc<str>| state.awaiting.as_ref().is_some_and(|sent| sent.names.contains(name));
            let available = self.view.as_ref().and_then(|view| view.of_type(type_url));
            for name in known {
                let version = state.version(name).cloned();
                let outcome = match &version {
                    None if state.names.contains(name) => HeldState::Missing,
                    None => continue,
                    Some(_) if sent(name) => HeldState::Sent,
                    Some(_) if state.rejected.contains(name) => HeldState::Refused,
                    Some(_) => HeldState::Accepted,
                };
                let resource = available.and_then(|available| available.resources.get(name)).cloned();
                let resource = resource.filter(|resource| Some(&resource.version) == version.as_ref());
                let (type_url, name) = (type_url.clone(), Arc::clone(name));
                held.push(Held { type_url, name, version, state: outcome, resource });
            }
        }
        held
    }

    fn node(request: &DeltaDiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }
}

impl DeltaSession {
    fn poll_type(&mut self, index: usize, view: &View) -> Option<Response> {
        let (type_url, state) = &mut self.types.0[index];
        if state.awaiting.is_some() {
            return None;
        }
        let available = view.of_type(type_url).unwrap_or(&NOTHING);
        state.look(available);
        if state.open.is_empty() && !state.greeting_due {
            state.settle(available);
            self.status.came_with(type_url, &available.version);
            return None;
        }
        let hold_back = !self.users_are_settled(index, view);
        let (type_url, state) = &mut self.types.0[index];
        let (names, complete) = state.news(available, self.response_bytes);
        // Additions first: what takes the place of a removed resource must be there before it goes.
        let removed = if complete { state.gone(available, hold_back) } else { Vec::new() };
        if names.is_empty() && removed.is_empty() && !state.greeting_due {
            state.settle(available);
            if state.open.is_empty() {
                self.status.came_with(type_url, &available.version);
            }
            return None;
        }
        let resources: Vec<_> = names.iter().filter_map(|name| available.resources.get(name)).cloned().collect();
        for resource in &resources {
            state.note(&resource.name, Some(Arc::clone(&resource.version)));
        }
        for name in &removed {
            state.note(name, None);
        }
        state.settle(available);
        state.greeting_due = false;
        let nonce = self.next_nonce.to_string();
        self.next_nonce += 1;
        let in_response = names.into_iter().chain(removed.iter().cloned()).collect();
        state.awaiting = Some(Unanswered { nonce: nonce.clone(), names: in_response });
        let (version, type_url) = (Arc::clone(&available.version), type_url.clone());
        self.status.sent(&type_url, &version);
        Some(Response { variant: Variant::Delta, version, resources, removed, type_url, nonce })
    }

    /// Whether nothing of what the client has still refers to removed resources of this type.
    fn users_are_settled(&self, index: usize, view: &View) -> bool {
        let users: &[&str] = match &*self.types.0[index].0 {
            type_url::CLUSTER | type_url::ENDPOINT => &[type_url::LISTENER, type_url::ROUTE],
            type_url::ROUTE => &[type_url::LISTENER],
            _ => &[],
        };
        users.iter().all(|user| self.types.get(user).is_none_or(|state| state.is_settled(view.of_type(user))))
    }
}

#[cfg(test)]
#[path = "delta_tests.rs"]
mod tests;
