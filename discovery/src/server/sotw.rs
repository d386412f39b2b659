//! The state-of-the-world variant of xDS, without I/O.
//!
//! A response holds every subscribed resource of its type. Rules:
//! - At most one response a type waits for its ACK or NACK; what changes meanwhile is said after it, once.
//! - A request with the nonce of an older response is stale and ignored: the client will answer the newer one.
//! - A client's first request of a type is answered even when there is nothing to say, so that it can finish
//!   starting up. No names at first, or the name `*`, stand for everything.
//! - Clusters are taken away only after the listeners and routes that used them (make before break), and not while the
//!   client refuses the newest listeners or routes: it goes on with older ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::DiscoveryRequest;
use tonic::Status;
use tracing::debug;

use super::clients::ClientStatus;
use super::csds::{Held, HeldState};
use super::response::{Response, Variant};
use super::{NOTHING, Session, Types, WILDCARD, check_name_count, viewer};
use crate::resources::{ByName, ProxyKind, Resource, Snapshot, TypeResources, View, Viewer, type_url};
use crate::secrets::Access;

/// One SotW stream.
#[derive(Debug)]
pub struct SotwSession {
    viewer: Viewer,
    view: Option<View>,
    next_nonce: u64,
    types: Types<TypeState>,
    status: ClientStatus,
}

impl Default for SotwSession {
    fn default() -> Self {
        Self {
            viewer: Viewer::default(),
            view: None,
            next_nonce: 1,
            types: Types::default(),
            status: ClientStatus::new("sotw"),
        }
    }
}

#[derive(Debug, Default)]
struct TypeState {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Whether the client ever named resources, after which an empty list means none instead of all.
    named: bool,
    /// The nonce of the newest response.
    nonce: Option<String>,
    /// Whether that response has not been answered yet.
    awaiting: bool,
    /// Whether the client refused the newest response that it has answered, and so uses something older.
    rejected: bool,
    /// Whether a response is due even if nothing changed.
    due: bool,
    /// What the newest response held.
    sent: ByName,
    /// The snapshot's version of the type that `sent` is known to agree with.
    settled_version: Option<Arc<str>>,
}

impl TypeState {
    fn wanted(&self, available: &TypeResources) -> ByName {
        if self.wildcard {
            return available.resources.clone();
        }
        let named = self.names.iter().filter_map(|name| available.resources.get_key_value(&**name));
        named.map(|(name, resource)| (name.clone(), Arc::clone(resource))).collect()
    }

    /// Whether the client has taken in all that there is.
    fn is_settled(&self, available: Option<&Arc<TypeResources>>) -> bool {
        let is_known = self.settled_version.as_ref() == available.map(|available| &available.version);
        !self.awaiting && !self.rejected && !self.due && is_known
    }
}

impl Session for SotwSession {
    type Request = DiscoveryRequest;

    fn handle(&mut self, request: DiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            let viewer = Viewer { secrets: Arc::clone(&self.viewer.secrets), ..viewer(node) };
            if viewer != self.viewer {
                (self.viewer, self.view) = (viewer, None);
            }
        }
        self.status.identify(request.node.as_ref());
        let state = self.types.open(&request.type_url)?;
        let first = state.nonce.is_none();
        if !first && !request.response_nonce.is_empty() && state.nonce.as_ref() != Some(&request.response_nonce) {
            debug!(client = self.status.node, nonce = request.response_nonce, "ignored a stale nonce");
            return Ok(());
        }
        if !request.response_nonce.is_empty() && state.awaiting {
            state.awaiting = false;
            state.rejected = request.error_detail.is_some();
            let rejection = request.error_detail.as_ref().map(|error| error.message.as_str());
            self.status.answered(&request.type_url, rejection);
        }
        check_name_count(&request.type_url, request.resource_names.len())?;
        let mut names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let wildcard = names.remove(WILDCARD) || (names.is_empty() && !state.named);
        state.named |= !names.is_empty();
        let asks_for_more = (wildcard && !state.wildcard) || !names.is_subset(&state.names);
        state.due |= first || asks_for_more;
        if asks_for_more || wildcard != state.wildcard || names != state.names {
            state.settled_version = None;
        }
        state.wildcard = wildcard;
        state.names = names;
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
            self.status.asks(state.names.iter().map(String::as_str), view.of_type(type_url::SECRET));
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
            let outcome = match state {
                TypeState { awaiting: true, .. } => HeldState::Sent,
                TypeState { rejected: true, .. } => HeldState::Refused,
                _ => HeldState::Accepted,
            };
            let describe = |name: Arc<str>, resource: Option<Arc<Resource>>| Held {
                type_url: type_url.clone(),
                name,
                version: resource.as_ref().map(|resource| Arc::clone(&resource.version)),
                state: if resource.is_some() { outcome } else { HeldState::Missing },
                resource,
            };
            held.extend(state.sent.iter().map(|(name, sent)| describe(Arc::clone(name), Some(Arc::clone(sent)))));
            let missing = state.names.iter().filter(|name| !state.sent.contains_key(&***name));
            held.extend(missing.map(|name| describe(name.as_str().into(), None)));
        }
        held
    }

    fn node(request: &DiscoveryRequest) -> Option<&Node> {
        request.node.as_ref()
    }
}

impl SotwSession {
    fn poll_type(&mut self, index: usize, view: &View) -> Option<Response> {
        let hold_back = self.types.0[index].0 == type_url::CLUSTER && !self.users_of_clusters_are_settled(view);
        let (type_url, state) = &mut self.types.0[index];
        let type_url = type_url.as_str();
        let available = view.of_type(type_url).unwrap_or(&NOTHING);
        if state.awaiting || (!state.due && state.settled_version.as_ref() == Some(&available.version)) {
            return None;
        }
        let mut wanted = state.wanted(available);
        let mut version = Arc::clone(&available.version);
        // Clusters that are gone stay until nothing refers to them any more.
        let gone = state.sent.iter().any(|(name, _)| !wanted.contains_key(name));
        let held = hold_back && gone && state.wildcard;
        if held {
            for (name, resource) in &state.sent {
                if !wanted.contains_key(name) {
                    wanted.insert_mut(name.clone(), Arc::clone(resource));
                }
            }
            version = format!("{version}-before-removals").into();
        }
        if !state.due && is_no_news(type_url, &state.sent, &wanted) {
            if !held {
                state.sent = wanted;
                state.settled_version = Some(version);
            }
            return None;
        }
        let nonce = self.next_nonce.to_string();
        self.next_nonce += 1;
        state.nonce = Some(nonce.clone());
        state.awaiting = true;
        state.due = false;
        state.settled_version = (!held).then(|| version.clone());
        let resources = wanted.values().cloned().collect();
        let missing = match self.viewer.kind {
            // It waits 15 s for what is merely not among the resources.
            ProxyKind::Grpc => state
                .names
                .iter()
                .filter(|name| !wanted.contains_key(&***name))
                .map(|name| name.as_str().into())
                .collect(),
            ProxyKind::Culvert | ProxyKind::Foreign => Vec::new(),
        };
        state.sent = wanted;
        self.status.sent(type_url, &version);
        Some(Response {
            variant: Variant::Sotw,
            version,
            resources,
            removed: missing,
            type_url: type_url.to_owned(),
            nonce,
        })
    }

    /// Whether the client has taken in the newest listeners and routes, so that it no longer uses older clusters.
    fn users_of_clusters_are_settled(&self, view: &View) -> bool {
        [type_url::LISTENER, type_url::ROUTE]
            .into_iter()
            .all(|type_url| self.types.get(type_url).is_none_or(|state| state.is_settled(view.of_type(type_url))))
    }
}

/// Whether a response would tell the client nothing. Only clusters and listeners can be taken away by leaving them out
/// of a response; of other types only what is new or changed counts.
fn is_no_news(type_url: &str, sent: &ByName, wanted: &ByName) -> bool {
    let all_known = wanted.iter().all(|(name, new)| sent.get(name).is_some_and(|old| old.version == new.version));
    let full_state = ![type_url::ENDPOINT, type_url::ROUTE, type_url::SECRET].contains(&type_url);
    all_known && (!full_state || sent.size() == wanted.size())
}

#[cfg(test)]
#[path = "sotw_tests.rs"]
mod tests;
