//! Resources as they arrive: finding their names without decoding them.

use std::collections::BTreeSet;

use envoy_types::pb::envoy::service::discovery::v3::Resource as Wrapper;
use prost::bytes::Buf as _;
use prost::encoding::{self, DecodeContext, WireType};
use prost::{Message as _, Name as _};

use super::{Rejection, Resource};
use crate::Any;

/// The resources of one response, sorted out.
#[derive(Debug, Default)]
pub(super) struct Incoming {
    pub(super) resources: Vec<Resource>,
    /// Resources that cannot be taken for what they are, before anyone looks at their fields.
    pub(super) rejected: Vec<Rejection>,
    /// All names in the response, those of rejected resources as well.
    pub(super) names: BTreeSet<String>,
}

impl Incoming {
    /// Adds a resource of a state-of-the-world response. Its name is in its body, or on the wrapper around it.
    pub(super) fn add(&mut self, type_url: &str, version: &str, body: Any) {
        if body.type_url != Wrapper::type_url() {
            let name = name_in(&body.value).unwrap_or_default();
            return self.push(type_url, Resource { name, version: version.to_owned(), body });
        }
        match Wrapper::decode(body.value.as_slice()) {
            Ok(wrapper) => self.add_wrapped(type_url, version, wrapper),
            Err(error) => self.reject(String::new(), format!("cannot decode the resource: {error}")),
        }
    }

    /// Adds a resource with its name and version around it.
    pub(super) fn add_wrapped(&mut self, type_url: &str, response_version: &str, wrapper: Wrapper) {
        let version = if wrapper.version.is_empty() { response_version.to_owned() } else { wrapper.version };
        // A heartbeat: it has no body and prolongs the resource's life.
        let Some(body) = wrapper.resource else { return };
        let name = if wrapper.name.is_empty() { name_in(&body.value).unwrap_or_default() } else { wrapper.name };
        if wrapper.ttl.is_some() {
            self.names.insert(name.clone());
            return self.reject(name, "ttl: not supported by culvert yet".to_owned());
        }
        self.push(type_url, Resource { name, version, body });
    }

    fn push(&mut self, type_url: &str, resource: Resource) {
        let Resource { name, body, .. } = &resource;
        if name.is_empty() {
            return self.reject(String::new(), "name: the resource has none".to_owned());
        }
        if !self.names.insert(name.clone()) {
            // Which of them is meant is not known: neither is taken.
            self.resources.retain(|earlier| earlier.name != *name);
            if !self.rejected.iter().any(|rejection| rejection.name == *name) {
                self.reject(name.clone(), "name: occurs twice in one response".to_owned());
            }
            return;
        }
        if body.type_url != type_url {
            return self.reject(name.clone(), format!("a {} in a response of type {type_url}", body.type_url));
        }
        self.resources.push(resource);
    }

    fn reject(&mut self, name: String, message: String) {
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
