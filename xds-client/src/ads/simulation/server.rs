//! The server's side of one stream. It is strict: state-of-the-world requests whose nonce is not that of its newest
//! response are passed over.

use std::collections::{BTreeMap, BTreeSet};

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Duration;
use prost::Message as _;

use super::super::type_url::{CLUSTER, LISTENER};
use super::super::{DeltaDiscoveryResponse, DiscoveryResponse, Request, Response, Variant};
use super::world::{Item, World, body, is_on_demand};
use crate::Any;

#[derive(Default)]
pub(super) struct Session {
    pub(super) nonce: u64,
    pub(super) types: BTreeMap<String, Subscribed>,
    /// Sends the next response of a type before the last one was answered.
    pub(super) hasty: bool,
    /// State of the world: sends only what has changed, where absence does not remove.
    pub(super) partial: bool,
}

#[derive(Default)]
pub(super) struct Subscribed {
    wildcard: bool,
    names: BTreeSet<String>,
    /// Names were given: from then on, none means none.
    named: bool,
    /// The newest nonce, and all that were not answered yet.
    newest: String,
    unanswered: Vec<String>,
    /// State of the world: the last version sent, or claimed by the client.
    sent: String,
    /// The client's versions.
    known: BTreeMap<String, String>,
    /// State of the world: something must be sent whatever the version.
    due: bool,
}

impl Subscribed {
    fn wants(&self, name: &str) -> bool {
        self.wildcard && !is_on_demand(name) || self.names.contains(name)
    }
}

impl Session {
    /// Takes a request; returns the nonce in it.
    pub(super) fn request(&mut self, request: Request) -> String {
        match request {
            Request::Sotw(request) => {
                let first = !self.types.contains_key(&request.type_url);
                let state = self.types.entry(request.type_url).or_default();
                if first {
                    assert_eq!(request.response_nonce, "", "a nonce of another stream");
                    state.sent = request.version_info;
                } else if request.response_nonce != state.newest {
                    return request.response_nonce;
                }
                state.unanswered.clear();
                let mut names: BTreeSet<String> = request.resource_names.into_iter().collect();
                state.named |= !names.is_empty();
                state.wildcard = names.remove("*") || !state.named;
                if !first {
                    state.due |= names.difference(&state.names).next().is_some();
                }
                state.known.retain(|name, _| names.contains(name));
                state.names = names;
                request.response_nonce
            }
            Request::Delta(request) => {
                let first = !self.types.contains_key(&request.type_url);
                let state = self.types.entry(request.type_url).or_default();
                if first {
                    state.wildcard = request.resource_names_subscribe.is_empty();
                    state.known = request.initial_resource_versions.into_iter().collect();
                } else {
                    assert!(request.initial_resource_versions.is_empty(), "initial versions come first");
                }
                let nonce = request.response_nonce;
                if !nonce.is_empty() {
                    let at = state.unanswered.iter().position(|it| *it == nonce);
                    state.unanswered.remove(at.expect("no answer comes twice"));
                }
                for name in request.resource_names_unsubscribe {
                    state.names.remove(&name);
                    // A client that wants everything is told what that does not bring.
                    if !state.wildcard {
                        state.known.remove(&name);
                    }
                }
                for name in request.resource_names_subscribe {
                    if name == "*" {
                        state.wildcard = true;
                        continue;
                    }
                    if !first {
                        state.known.remove(&name);
                    }
                    state.names.insert(name);
                }
                nonce
            }
        }
    }

    /// A response was sent again.
    pub(super) fn repeated(&mut self, response: &Response) {
        let (type_url, nonce) = match response {
            Response::Sotw(response) => (&response.type_url, &response.nonce),
            Response::Delta(response) => (&response.type_url, &response.nonce),
        };
        if let Some(state) = self.types.get_mut(type_url) {
            state.unanswered.push(nonce.clone());
        }
    }

    /// Whether every response was answered, or superseded by the answer to a newer one.
    pub(super) fn is_answered(&self) -> bool {
        self.types.values().all(|state| state.unanswered.is_empty())
    }

    /// The next response, if there is anything to say.
    pub(super) fn response(&mut self, world: &World, variant: Variant) -> Option<Response> {
        let nonce = (self.nonce + 1).to_string();
        let (hasty, partial) = (self.hasty, self.partial);
        let (type_url, response) = self.types.iter_mut().find_map(|(type_url, state)| {
            if !state.unanswered.is_empty() && !hasty {
                return None;
            }
            let partial = partial && type_url != CLUSTER && type_url != LISTENER;
            Some((type_url.clone(), state.response(type_url, world, variant, &nonce, partial)?))
        })?;
        self.sent(&type_url, nonce);
        Some(response)
    }

    /// Says of what has a time to live that it is still good, for a random type.
    pub(super) fn heartbeat(&mut self, world: &World, variant: Variant, rng: &mut fastrand::Rng) -> Option<Response> {
        let nonce = (self.nonce + 1).to_string();
        let types: Vec<&String> = self.types.keys().collect();
        let type_url = rng.choice(types)?.clone();
        let state = self.types.get(&type_url)?;
        if !state.unanswered.is_empty() && !self.hasty {
            return None;
        }
        // What the client does not have in this version needs more than a heartbeat.
        let known = |name: &str, item: &Item| state.known.get(name).is_some_and(|it| *it == item.version.to_string());
        let resources = world.items(&type_url).filter(|(name, item)| item.ttl.is_some() && known(name, item));
        let wrappers: Vec<Wrapper> = resources.map(|(name, item)| wrapper(&type_url, name, item, false)).collect();
        if wrappers.is_empty() {
            return None;
        }
        let response = response(&type_url, variant, &state.sent, &nonce, wrappers, Vec::new());
        self.sent(&type_url, nonce);
        Some(response)
    }

    fn sent(&mut self, type_url: &str, nonce: String) {
        self.nonce += 1;
        if let Some(state) = self.types.get_mut(type_url) {
            state.unanswered.push(nonce.clone());
            state.newest = nonce;
        }
    }
}

impl Subscribed {
    fn response(
        &mut self,
        type_url: &str,
        world: &World,
        variant: Variant,
        nonce: &str,
        partial: bool,
    ) -> Option<Response> {
        let version = world.version(type_url).to_string();
        let is_known = |name: &str, item: &Item| self.known.get(name).is_some_and(|it| *it == item.version.to_string());
        let wanted: Vec<(&String, &Item)> = world.items(type_url).filter(|(name, _)| self.wants(name)).collect();
        let changed: Vec<(&String, &Item)> =
            wanted.iter().filter(|(name, item)| !is_known(name, item)).copied().collect();
        let is_gone = |name: &&String| world.item(type_url, name).is_none() || !self.wants(name);
        let removed: Vec<String> = self.known.keys().filter(is_gone).cloned().collect();
        let (resources, removed) = match variant {
            Variant::Sotw => {
                if self.sent == version && !self.due || self.names.is_empty() && !self.wildcard {
                    return None;
                }
                (self.due, self.sent) = (false, version);
                (if partial { changed } else { wanted }, Vec::new())
            }
            Variant::Delta if changed.is_empty() && removed.is_empty() => return None,
            Variant::Delta => (changed, removed),
        };
        self.known.retain(|name, _| !removed.contains(name));
        self.known.extend(resources.iter().map(|(name, item)| ((*name).clone(), item.version.to_string())));
        let wrappers = resources.iter().map(|(name, item)| wrapper(type_url, name, item, true)).collect();
        Some(response(type_url, variant, &self.sent, nonce, wrappers, removed))
    }
}

fn wrapper(type_url: &str, name: &str, item: &Item, with_body: bool) -> Wrapper {
    Wrapper {
        name: name.to_owned(),
        version: item.version.to_string(),
        resource: with_body.then(|| body(type_url, name, item.version)),
        ttl: item.ttl.map(|ttl| Duration { seconds: ttl.cast_signed(), nanos: 0 }),
        ..Default::default()
    }
}

fn response(
    type_url: &str,
    variant: Variant,
    version: &str,
    nonce: &str,
    wrappers: Vec<Wrapper>,
    removed_resources: Vec<String>,
) -> Response {
    let (type_url, nonce, version_info) = (type_url.to_owned(), nonce.to_owned(), version.to_owned());
    match variant {
        Variant::Sotw => {
            let any = |wrapper: Wrapper| match wrapper {
                // One without a time to live goes without the wrapper as well.
                Wrapper { ttl: None, resource: Some(body), .. } => body,
                wrapper => Any {
                    type_url: "type.googleapis.com/envoy.service.discovery.v3.Resource".to_owned(),
                    value: wrapper.encode_to_vec(),
                },
            };
            let resources = wrappers.into_iter().map(any).collect();
            Response::Sotw(DiscoveryResponse { version_info, resources, type_url, nonce, ..Default::default() })
        }
        Variant::Delta => {
            let resources = wrappers;
            let response =
                DeltaDiscoveryResponse { resources, type_url, nonce, removed_resources, ..Default::default() };
            Response::Delta(response)
        }
    }
}
