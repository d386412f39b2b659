//! Resources as they arrive: finding their names without decoding them.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use prost::{DecodeError, Message as _, Name as _};

use super::entries::{Entries, Offered, State, Taken};
use super::{Interest, Rejection, Resource, xdstp};
use crate::Any;

/// How many faults of one response are told.
const MAX_REJECTED: usize = 1000;
const LAST_REJECTED: usize = MAX_REJECTED - 1;

/// Sorts out the resources of one response.
pub(super) struct Intake<'a> {
    pub(super) type_url: &'a str,
    /// The response's version.
    pub(super) version: Arc<str>,
    /// Each resource has a version of its own.
    pub(super) by_version: bool,
    pub(super) token: u64,
    pub(super) now: Instant,
    /// Where the resource that is being taken stands in the response.
    pub(super) place: usize,
    pub(super) interest: &'a Interest,
    pub(super) entries: &'a mut Entries,
    pub(super) taken: Intook,
}

/// What a response comes to.
#[derive(Debug, Default)]
pub(super) struct Intook {
    /// What is handed out.
    pub(super) added: Vec<Resource>,
    pub(super) unchanged: Vec<Arc<str>>,
    pub(super) absent: Vec<String>,
    pub(super) offered: Offered,
    /// Resources that cannot be taken for what they are, before anyone looks at their fields.
    pub(super) rejected: Vec<Rejection>,
    /// How many resources had a body, and how many had none.
    pub(super) bodies: usize,
    pub(super) heartbeats: usize,
    /// Something was in there of which nobody can tell what it was meant to be.
    pub(super) unidentified: bool,
    /// Names of `added` that were also removed.
    contradicted: BTreeSet<String>,
}

impl Intake<'_> {
    /// Adds a resource of a state-of-the-world response. Its name is in its body, or on the wrapper around it.
    pub(super) fn add(&mut self, body: Any) {
        if body.type_url != Wrapper::type_url() {
            return self.push(Wrapper { resource: Some(body), ..Default::default() });
        }
        match Wrapper::decode(body.value.as_slice()) {
            Ok(wrapper) => self.add_wrapped(wrapper),
            Err(error) => {
                self.taken.unidentified = true;
                self.reject(String::new(), format!("resources[{}]: cannot decode the resource: {error}", self.place));
            }
        }
    }

    /// Adds a resource with its name and version around it.
    pub(super) fn add_wrapped(&mut self, wrapper: Wrapper) {
        if wrapper.resource.is_some() {
            return self.push(wrapper);
        }
        self.taken.heartbeats += 1;
        let name = xdstp::normalise(&wrapper.name);
        let expires = match self.expiry(wrapper.ttl) {
            Ok(expires) => expires,
            Err(message) => return self.reject(name.into_owned(), message),
        };
        // A state-of-the-world version is that of all resources, and the last one that was sent is meant.
        let version = self.by_version.then_some(wrapper.version.as_str());
        if self.entries.heartbeat(&name, self.token, version, expires) {
            return;
        }
        if !wrapper.aliases.is_empty() {
            // What was asked for by an alias resolves to nothing.
            self.taken.absent.extend(wrapper.aliases.iter().filter(|alias| **alias != *name).cloned());
            self.taken.absent.push(name.into_owned());
        } else if self.interest.includes(self.type_url, &name) {
            let version = wrapper.version;
            let message = format!("resource: there is none, and version {version:?} is not the one in force");
            self.reject(name.into_owned(), message);
        }
    }

    /// Adds a removal of an incremental response. `obey`: it is up to the server.
    pub(super) fn remove(&mut self, name: &str, obey: bool) {
        let name = xdstp::normalise(name);
        if self.entries.was_seen(&name, self.token) {
            self.entries.withdraw(&name, self.token);
            self.taken.contradicted.insert(name.clone().into_owned());
            self.reject(name.into_owned(), "name: both sent and removed in one response".to_owned());
        } else if !(obey && self.entries.remove(&name, self.token, &mut self.taken.offered)) {
            // Stays in force, and yet a new stream must not claim to have it.
            self.entries.disclaim(&name);
            if self.interest.names().is_some_and(|names| names.contains(&*name)) {
                self.taken.absent.push(name.into_owned());
            }
        }
    }

    pub(super) fn finish(mut self) -> Intook {
        let contradicted = std::mem::take(&mut self.taken.contradicted);
        if !contradicted.is_empty() {
            self.taken.added.retain(|resource| !contradicted.contains(&resource.name));
        }
        self.taken
    }

    /// Adds what has a body.
    fn push(&mut self, wrapper: Wrapper) {
        self.taken.bodies += 1;
        let Wrapper { name, aliases, version, resource, ttl, cache_control, .. } = wrapper;
        let body = resource.unwrap_or_default();
        let name = match name.is_empty() {
            true => match name_in(&body.value) {
                Ok(name) => name,
                Err(error) => {
                    self.taken.unidentified = true;
                    // What whoever reads a resource whose name stands around it says of such a body.
                    let message_name = body.type_url.rsplit('/').next().unwrap_or_default();
                    let message = format!("resources[{}]: cannot decode {message_name}: {error}", self.place);
                    return self.reject(String::new(), message);
                }
            },
            false => name,
        };
        let name = match xdstp::normalise(&name) {
            Cow::Borrowed(_) => name,
            Cow::Owned(normal) => normal,
        };
        if name.is_empty() {
            self.taken.unidentified = true;
            return self.reject(String::new(), format!("resources[{}].name: the resource has none", self.place));
        }
        // Nobody asked for it (or no longer): acknowledged all the same, as in Envoy.
        if !self.interest.includes(self.type_url, &name) {
            return;
        }
        if body.type_url != self.type_url {
            let (place, is, of) = (self.place, &body.type_url, self.type_url);
            let message = format!("resources[{place}]: a {is} in a response of type {of}");
            self.entries.see(&name, self.token);
            self.taken.unidentified = true;
            return self.reject(name, message);
        }
        let expires = match self.expiry(ttl) {
            Ok(expires) => expires,
            Err(message) => {
                self.entries.see(&name, self.token);
                return self.reject(name, message);
            }
        };
        let version = if version.is_empty() { Arc::clone(&self.version) } else { version.into() };
        let state = State::new(Arc::clone(&version), &body);
        match self.entries.take(&name, self.token, state, expires, &mut self.taken.offered) {
            Taken::Unchanged(name) => self.taken.unchanged.push(name),
            Taken::Duplicate => {
                let message = format!("name: occurs twice in one response, again in resources[{}]", self.place);
                self.reject(name, message);
            }
            Taken::Offered => {
                let (name, version) = (name, version.to_string());
                let do_not_cache = cache_control.is_some_and(|it| it.do_not_cache);
                self.taken.added.push(Resource { name, aliases, version, body, do_not_cache });
            }
        }
    }

    /// Until when a resource is good.
    fn expiry(&self, ttl: Option<ProtoDuration>) -> Result<Option<Instant>, String> {
        let Some(ttl) = ttl else { return Ok(None) };
        let parts = (u64::try_from(ttl.seconds), u32::try_from(ttl.nanos));
        let (Ok(seconds), Ok(nanos @ 0..1_000_000_000)) = parts else {
            return Err("ttl: is negative, or no duration".to_owned());
        };
        let ttl = Duration::new(seconds, nanos);
        // One that is beyond the clock's range never ends.
        Ok(self.now.checked_add(ttl))
    }

    fn reject(&mut self, name: String, message: String) {
        match self.taken.rejected.len() {
            MAX_REJECTED.. => {}
            LAST_REJECTED => {
                let message = "and others are at fault as well".to_owned();
                self.taken.rejected.push(Rejection { name: String::new(), message });
            }
            _ => self.taken.rejected.push(Rejection { name, message }),
        }
    }
}

/// What all resource types of xDS have in common.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// The resource's name, empty where it has none: in every resource type of xDS it is the string in field 1.
pub(crate) fn name_in(body: &[u8]) -> Result<String, DecodeError> {
    Named::decode(body).map(|it| it.name)
}
