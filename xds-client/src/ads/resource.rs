//! Resources as they arrive: finding their names without decoding them.

use std::sync::Arc;

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use prost::bytes::Buf as _;
use prost::encoding::{self, DecodeContext, WireType};
use prost::{Message as _, Name as _};

use super::entries::{Entries, Offered, State};
use super::{Interest, Rejection, Resource};
use crate::Any;

/// Sorts out the resources of one response.
pub(super) struct Intake<'a> {
    pub(super) type_url: &'a str,
    /// The response's version.
    pub(super) version: Arc<str>,
    pub(super) token: u64,
    pub(super) interest: &'a Interest,
    pub(super) entries: &'a mut Entries,
    /// What is handed out.
    pub(super) added: Vec<Resource>,
    pub(super) offered: Offered,
    /// Resources that cannot be taken for what they are, before anyone looks at their fields.
    pub(super) rejected: Vec<Rejection>,
}

impl Intake<'_> {
    /// Adds a resource of a state-of-the-world response. Its name is in its body, or on the wrapper around it.
    pub(super) fn add(&mut self, body: Any) {
        if body.type_url != Wrapper::type_url() {
            let name = name_in(&body.value).unwrap_or_default();
            return self.push(name, Arc::clone(&self.version), body);
        }
        match Wrapper::decode(body.value.as_slice()) {
            Ok(wrapper) => self.add_wrapped(wrapper),
            Err(error) => self.reject(String::new(), format!("cannot decode the resource: {error}")),
        }
    }

    /// Adds a resource with its name and version around it.
    pub(super) fn add_wrapped(&mut self, wrapper: Wrapper) {
        let version = if wrapper.version.is_empty() { Arc::clone(&self.version) } else { wrapper.version.into() };
        // A heartbeat: it has no body and prolongs the resource's life.
        let Some(body) = wrapper.resource else { return };
        let name = if wrapper.name.is_empty() { name_in(&body.value).unwrap_or_default() } else { wrapper.name };
        if wrapper.ttl.is_some() {
            self.entries.see(&name, self.token);
            return self.reject(name, "ttl: not supported by culvert yet".to_owned());
        }
        self.push(name, version, body);
    }

    /// Adds a removal of an incremental response.
    pub(super) fn remove(&mut self, name: String, server_owned: bool) {
        if self.entries.was_seen(&name, self.token) {
            self.entries.withdraw(&name, self.token);
            self.added.retain(|resource| resource.name != name);
            self.reject(name, "name: both sent and removed in one response".to_owned());
        } else if server_owned {
            self.entries.offer_removal(&name, self.token, &mut self.offered);
        } else {
            // Stays in force, and yet a new stream must not claim to have it.
            self.entries.disclaim(&name);
        }
    }

    fn push(&mut self, name: String, version: Arc<str>, body: Any) {
        if name.is_empty() {
            return self.reject(name, "name: the resource has none".to_owned());
        }
        // Nobody asked for it (or no longer): acknowledged all the same, as in Envoy.
        if !self.interest.includes(&name) {
            return;
        }
        if !self.entries.see(&name, self.token) {
            return self.reject(name, "name: occurs twice in one response".to_owned());
        }
        if body.type_url != self.type_url {
            let message = format!("a {} in a response of type {}", body.type_url, self.type_url);
            return self.reject(name, message);
        }
        self.entries.offer(&name, self.token, State::new(Arc::clone(&version)), &mut self.offered);
        self.added.push(Resource { name, version: version.to_string(), body });
    }

    fn reject(&mut self, name: String, message: String) {
        self.entries.forget_void(&name);
        self.rejected.push(Rejection { name, message });
    }
}

/// The resource's name: in every resource type of xDS it is the string in field 1.
fn name_in(mut body: &[u8]) -> Option<String> {
    const NAME: u32 = 1;
    let mut name = None;
    while body.has_remaining() {
        let (tag, wire_type) = encoding::decode_key(&mut body).ok()?;
        if (tag, wire_type) == (NAME, WireType::LengthDelimited) {
            let length = usize::try_from(encoding::decode_varint(&mut body).ok()?).ok()?;
            let (value, rest) = body.split_at_checked(length)?;
            // Of a field that occurs more than once, the last counts.
            name = Some(std::str::from_utf8(value).ok()?.to_owned());
            body = rest;
        } else {
            encoding::skip_field(wire_type, tag, &mut body, DecodeContext::default()).ok()?;
        }
    }
    name
}
