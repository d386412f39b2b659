//! The state-of-the-world variant of xDS, without I/O.
//!
//! A response holds every subscribed resource of its type. Rules:
//! - At most one response a type waits for its ACK or NACK; what changes meanwhile is said after it, once.
//! - A request with the nonce of an older response is stale and ignored: the client will answer the newer one.
//! - A client's first request of a type is answered even when there is nothing to say, so that it can finish
//!   starting up. No names at first, or the name `*`, stand for everything.
//! - Clusters are taken away only after the listeners and routes that used them (make before break), and not while the
//!   client refuses the newest listeners or routes: it goes on with older ones.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use tonic::Status;
use tracing::debug;

use super::clients::ClientStatus;
use super::{Session, WILDCARD, check_name_count, in_push_order, subscription, viewer};
use crate::resources::{Resource, Snapshot, TypeResources, Viewer, type_url};

/// One SotW stream.
#[derive(Debug)]
pub struct SotwSession {
    viewer: Viewer,
    next_nonce: u64,
    types: BTreeMap<String, TypeState>,
    status: ClientStatus,
}

impl Default for SotwSession {
    fn default() -> Self {
        Self { viewer: Viewer::default(), next_nonce: 1, types: BTreeMap::new(), status: ClientStatus::new("sotw") }
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
    sent: BTreeMap<String, Arc<Resource>>,
    /// The snapshot's version of the type that `sent` is known to agree with.
    settled_version: Option<String>,
}

impl TypeState {
    fn wanted(&self, available: &TypeResources) -> BTreeMap<String, Arc<Resource>> {
        if self.wildcard {
            return available.resources.clone();
        }
        let named = self.names.iter().filter_map(|name| available.resources.get_key_value(name));
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
    type Response = DiscoveryResponse;

    fn handle(&mut self, request: DiscoveryRequest) -> Result<(), Status> {
        if let Some(node) = &request.node {
            self.viewer = viewer(node);
        }
        self.status.identify(request.node.as_ref());
        let state = subscription(&mut self.types, &request.type_url)?;
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

    fn poll(&mut self, snapshot: &Snapshot) -> Option<DiscoveryResponse> {
        let order = in_push_order(&self.types);
        // Twice, because what was held back may be due once the types after it turn out to have no news.
        order.iter().chain(&order).find_map(|type_url| self.poll_type(type_url, snapshot))
    }

    fn status(&self) -> &ClientStatus {
        &self.status
    }
}

impl SotwSession {
    fn poll_type(&mut self, type_url: &str, snapshot: &Snapshot) -> Option<DiscoveryResponse> {
        let hold_back = type_url == type_url::CLUSTER && !self.users_of_clusters_are_settled(snapshot);
        let nothing = Arc::new(TypeResources::default());
        let view = snapshot.view(&self.viewer);
        let available = view.of_type(type_url).unwrap_or(&nothing);
        let state = self.types.get_mut(type_url)?;
        if state.awaiting || (!state.due && state.settled_version.as_ref() == Some(&available.version)) {
            return None;
        }
        let mut wanted = state.wanted(available);
        let mut version = available.version.clone();
        // Clusters that are gone stay until nothing refers to them any more.
        let gone = state.sent.iter().any(|(name, _)| !wanted.contains_key(name));
        let held = hold_back && gone && state.wildcard;
        if held {
            for (name, resource) in &state.sent {
                wanted.entry(name.clone()).or_insert_with(|| Arc::clone(resource));
            }
            version.push_str("-before-removals");
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
        let resources = wanted.values().map(|resource| resource.body.clone()).collect();
        state.sent = wanted;
        self.status.sent(type_url, &version);
        Some(DiscoveryResponse {
            version_info: version,
            resources,
            type_url: type_url.to_owned(),
            nonce,
            ..Default::default()
        })
    }

    /// Whether the client has taken in the newest listeners and routes, so that it no longer uses older clusters.
    fn users_of_clusters_are_settled(&self, snapshot: &Snapshot) -> bool {
        let view = snapshot.view(&self.viewer);
        [type_url::LISTENER, type_url::ROUTE]
            .into_iter()
            .all(|type_url| self.types.get(type_url).is_none_or(|state| state.is_settled(view.of_type(type_url))))
    }
}

/// Whether a response would tell the client nothing. Only clusters and listeners can be taken away by leaving them out
/// of a response; of other types only what is new or changed counts.
fn is_no_news(
    type_url: &str,
    sent: &BTreeMap<String, Arc<Resource>>,
    wanted: &BTreeMap<String, Arc<Resource>>,
) -> bool {
    let all_known = wanted.iter().all(|(name, new)| sent.get(name).is_some_and(|old| old.version == new.version));
    let full_state = type_url != type_url::ENDPOINT && type_url != type_url::ROUTE;
    all_known && (!full_state || sent.len() == wanted.len())
}

#[cfg(test)]
#[path = "sotw_tests.rs"]
mod tests;
