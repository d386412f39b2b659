//! The resources of one type: which are in force, and which were refused.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};

use culvert_xds_client::{
    ads::{Rejection, Resource},
    json::{self, UnknownFields},
};
use prost::Name;

use crate::config::{
    FieldError,
    status::{Failure, Version},
};

/// All resources of one type.
#[derive(Debug, Default)]
pub(in crate::config) struct Resources {
    /// The last good version of each.
    pub(in crate::config) accepted: BTreeMap<String, Arc<Version>>,
    /// Where the newest version of one was refused: that.
    pub(in crate::config) refused: BTreeMap<String, Arc<Failure>>,
}

/// How a batch of resources went.
#[derive(Debug, Default)]
pub(super) struct Accepted {
    pub(super) added: u64,
    pub(super) modified: u64,
    pub(super) errors: Vec<Rejection>,
}

impl Resources {
    /// Takes each resource by itself; one that did not change is not taken again. `complete`: there are no others.
    pub(super) fn accept(
        &mut self,
        resources: Vec<Resource>,
        complete: bool,
        mut take: impl FnMut(&Resource) -> Result<(), FieldError>,
    ) -> Accepted {
        let mut outcome = Accepted::default();
        if complete {
            let names: BTreeSet<&str> = resources.iter().map(|resource| resource.name.as_str()).collect();
            self.refused.retain(|name, _| names.contains(name.as_str()));
        }
        for resource in resources {
            if let Some(before) = self.accepted.get_mut(&resource.name).filter(|before| before.body == resource.body) {
                self.refused.remove(&resource.name);
                if before.version != resource.version {
                    let Resource { version, body, .. } = resource;
                    *before = Arc::new(Version { version, body, updated: before.updated });
                }
                continue;
            }
            let taken = take(&resource);
            let Resource { name, version, body, .. } = resource;
            let stored = Arc::new(Version { version, body, updated: SystemTime::now() });
            match taken {
                Ok(()) => {
                    self.refused.remove(&name);
                    match self.accepted.insert(name, stored) {
                        None => outcome.added += 1,
                        Some(_) => outcome.modified += 1,
                    }
                }
                Err(error) => {
                    let details = error.to_string();
                    let failure = Failure { attempt: stored, details: details.clone() };
                    self.refused.insert(name.clone(), Arc::new(failure));
                    outcome.errors.push(Rejection { name, message: details });
                }
            }
        }
        outcome
    }

    /// Forgets a resource; whether it was in force.
    pub(super) fn remove(&mut self, name: &str) -> bool {
        self.refused.remove(name);
        self.accepted.remove(name).is_some()
    }

    /// Forgets all but these.
    pub(super) fn keep(&mut self, names: &BTreeSet<&str>) {
        self.accepted.retain(|name, _| names.contains(name.as_str()));
        self.refused.retain(|name, _| names.contains(name.as_str()));
    }
}

/// Unpacks, validates and parses a resource, which must carry its own name.
pub(super) fn parse<M, T>(
    resource: &Resource,
    name: fn(&M) -> &str,
    parse: impl Fn(&M, &str) -> Result<T, FieldError>,
) -> Result<T, FieldError>
where
    M: prost::Message + Name + Default + Clone,
{
    if super::unknown_fields() == UnknownFields::Reject {
        json::validate_any(&resource.body, "", UnknownFields::Reject)?;
    }
    let message: M = json::unpack(&resource.body, "")?;
    let message = json::resolve_typed_structs(&message)?;
    json::validate(&*message)?;
    if name(&message) != resource.name {
        let text = format!("the resource is named {:?}, and its content {:?}", resource.name, name(&message));
        return Err(FieldError::new("name", text));
    }
    parse(&message, "")
}
