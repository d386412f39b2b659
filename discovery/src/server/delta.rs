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

use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as DeltaResource,
};
use tonic::Status;
use tracing::debug;

use super::clients::ClientStatus;
use super::{Session, WILDCARD, check_name_count, in_push_order, subscription, viewer};
use crate::resources::{Snapshot, TypeResources, Viewer, type_url};

/// A response is ended when its resources have this many bytes: gRPC clients read 4 MiB unless told otherwise.
const RESPONSE_BYTES: usize = 2 * 1024 * 1024;

/// One delta stream.
#[derive(Debug)]
pub struct DeltaSession {
    viewer: Viewer,
    next_nonce: u64,
    types: BTreeMap<String, TypeState>,
    status: ClientStatus,
    response_bytes: usize,
}

impl Default for DeltaSession {
    fn default() -> Self {
        Self {
            viewer: Viewer::default(),
            next_nonce: 1,
            types: BTreeMap::new(),
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
    names: BTreeSet<String>,
    /// The versions that the client has, as far as we know.
    sent: BTreeMap<String, String>,
    /// Names that must be answered even if nothing changed.
    due: BTreeSet<String>,
    /// Whether an empty response is due: the client waits to hear that there is nothing.
    greeting_due: bool,
    /// The response that has not been answered yet.
    awaiting: Option<Unanswered>,
    /// The names in what the client has refused, older versions of which it may use. Which of them it objects to is not known.
    rejected: BTreeSet<String>,
    /// The snapshot's version of the type that the client is known to have in full.
    settled_version: Option<String>,
}

/// A response that has not been answered.
#[derive(Debug)]
struct Unanswered {
    nonce: String,
    /// What it sent and removed.
    names: Vec<String>,
}

impl TypeState {
    /// Whether the client has taken in all that there is.
    fn is_settled(&self, available: Option<&Arc<TypeResources>>) -> bool {
        let is_known = self.settled_version.as_ref() == available.map(|available| &available.version);
        self.awaiting.is_none() && self.rejected.is_empty() && is_known
    }

    /// The client has answered a response with these names.
    fn answered(&mut self, names: Vec<String>, accepted: bool) {
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

    /// Names and versions of what is to be sent now, and whether that is all.
    fn news(&self, available: &TypeResources, response_bytes: usize) -> (Vec<String>, bool) {
        let changed = |name: &String| {
            available
                .resources
                .get(name)
                .is_some_and(|resource| self.due.contains(name) || self.sent.get(name) != Some(&resource.version))
        };
        let candidates: Box<dyn Iterator<Item = &String>> =
            if self.wildcard { Box::new(available.resources.keys()) } else { Box::new(self.names.iter()) };
        let mut bytes = 0;
        let mut names = Vec::new();
        for name in candidates.filter(|name| changed(name)) {
            let size = available.resources.get(name).map_or(0, |resource| resource.body.value.len());
            if !names.is_empty() && bytes + size > response_bytes {
                return (names, false);
            }
            bytes += size;
            names.push(name.clone());
        }
        (names, true)
    }

    /// Names of what does not exist: all that the client has or asked for, or only what it just asked for.
    fn gone(&self, available: &TypeResources, only_asked: bool) -> Vec<String> {
        let asked = self.due.iter().filter(|name| !self.sent.contains_key(*name));
        let had = self.sent.keys().filter(|name| self.wants(name) && !only_asked);
        asked.chain(had).filter(|name| !available.resources.contains_key(*name)).cloned().collect()
    }
}

impl Session for DeltaSession {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn handle(&mut self, request: DeltaDiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.viewer = viewer(node);
        }
        self.status.identify(request.node.as_ref());
        let state = subscription(&mut self.types, &request.type_url)?;
        if !request.response_nonce.is_empty() {
            if let Some(answered) = state.awaiting.take_if(|awaiting| awaiting.nonce == request.response_nonce) {
                state.answered(answered.names, request.error_detail.is_none());
                let rejection = request.error_detail.as_ref().map(|error| error.message.as_str());
                self.status.answered(&request.type_url, rejection);
            } else {
                debug!(client = self.status.node, nonce = request.response_nonce, "ignored a stale nonce");
            }
        }
        let subscribes = !request.resource_names_subscribe.is_empty();
        if !state.opened {
            state.opened = true;
            check_name_count(&request.type_url, request.initial_resource_versions.len())?;
            state.sent = request.initial_resource_versions.into_iter().collect();
            state.greeting_due = state.sent.is_empty();
            state.wildcard = !subscribes;
        }
        if subscribes || !request.resource_names_unsubscribe.is_empty() {
            state.settled_version = None;
        }
        for name in request.resource_names_unsubscribe {
            if name == WILDCARD {
                state.wildcard = false;
                state.sent.retain(|name, _| state.names.contains(name));
                state.rejected.retain(|name| state.names.contains(name));
            } else {
                state.names.remove(&name);
                state.rejected.remove(&name);
                state.due.remove(&name);
                // Under a wildcard the resource is still wanted, and the client may have dropped it.
                state.sent.remove(&name);
            }
        }
        // What a reconnecting client says it has need not be sent again unless it changed.
        for name in request.resource_names_subscribe {
            if name == WILDCARD {
                state.wildcard = true;
            } else {
                let known_from_before = state.sent.contains_key(&name) && !state.names.contains(&name);
                if !known_from_before {
                    state.due.insert(name.clone());
                }
                state.names.insert(name);
            }
        }
        check_name_count(&request.type_url, state.names.len())
    }

    fn poll(&mut self, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let order = in_push_order(&self.types);
        // Twice, because what was held back may be due once the types after it turn out to have no news.
        order.iter().chain(&order).find_map(|type_url| self.poll_type(type_url, snapshot))
    }

    fn status(&self) -> &ClientStatus {
        &self.status
    }
}

impl DeltaSession {
    fn poll_type(&mut self, type_url: &str, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let hold_back = !self.users_are_settled(type_url, snapshot);
        let nothing = Arc::new(TypeResources::default());
        let view = snapshot.view(&self.viewer);
        let available = view.of_type(type_url).unwrap_or(&nothing);
        let state = self.types.get_mut(type_url)?;
        if state.awaiting.is_some() || state.settled_version.as_ref() == Some(&available.version) {
            return None;
        }
        let (names, complete) = state.news(available, self.response_bytes);
        // Additions first: what takes the place of a removed resource must be there before it goes.
        let removed = if complete { state.gone(available, hold_back) } else { Vec::new() };
        let held = complete && hold_back && state.sent.keys().any(|name| !available.resources.contains_key(name));
        if complete && !held {
            state.settled_version = Some(available.version.clone());
        }
        if names.is_empty() && removed.is_empty() && !state.greeting_due {
            return None;
        }
        let mut resources = Vec::with_capacity(names.len());
        let in_response = names.iter().chain(&removed).cloned().collect();
        for name in names {
            let Some(resource) = available.resources.get(&name) else { continue };
            resources.push(DeltaResource {
                name: name.clone(),
                version: resource.version.clone(),
                resource: Some(resource.body.clone()),
                ..Default::default()
            });
            state.due.remove(&name);
            state.sent.insert(name, resource.version.clone());
        }
        for name in &removed {
            state.due.remove(name);
            state.sent.remove(name);
        }
        state.greeting_due = false;
        let nonce = self.next_nonce.to_string();
        self.next_nonce += 1;
        state.awaiting = Some(Unanswered { nonce: nonce.clone(), names: in_response });
        self.status.sent(type_url, &available.version);
        Some(DeltaDiscoveryResponse {
            system_version_info: available.version.clone(),
            resources,
            type_url: type_url.to_owned(),
            removed_resources: removed,
            nonce,
            ..Default::default()
        })
    }

    /// Whether nothing of what the client has still refers to removed resources of this type.
    fn users_are_settled(&self, type_url: &str, snapshot: &Snapshot) -> bool {
        let users: &[&str] = match type_url {
            type_url::CLUSTER | type_url::ENDPOINT => &[type_url::LISTENER, type_url::ROUTE],
            type_url::ROUTE => &[type_url::LISTENER],
            _ => &[],
        };
        let view = snapshot.view(&self.viewer);
        users.iter().all(|user| self.types.get(*user).is_none_or(|state| state.is_settled(view.of_type(user))))
    }
}

#[cfg(test)]
#[path = "delta_tests.rs"]
mod tests;
