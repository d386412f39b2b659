//! Resources as they come: unpacked, validated, parsed.

use std::{borrow::Cow, sync::Arc, time::SystemTime};

use culvert_xds_client::{
    Any,
    ads::{Resource, xdstp},
    json::{self, UnknownFields},
};
use prost::Name;

use crate::config::{
    FieldError,
    status::{Failure, Version},
};

/// What was received, to be kept.
pub(super) fn version(resource: Resource) -> Arc<Version> {
    Arc::new(Version { version: resource.version, body: resource.body, updated: SystemTime::now() })
}

/// What was received and not taken.
pub(super) fn failure(resource: Resource, details: String) -> Arc<Failure> {
    Arc::new(Failure { attempt: version(resource), details })
}

/// Whether the resource is what is known already, under whatever version. Then only the version is taken over.
pub(super) fn is_unchanged(known: &mut Option<Arc<Version>>, resource: &Resource) -> bool {
    let Some(known) = known.as_mut().filter(|known| known.body == resource.body) else { return false };
    if known.version != resource.version {
        let Version { body, updated, .. } = &**known;
        *known = Arc::new(Version { version: resource.version.clone(), body: body.clone(), updated: *updated });
    }
    true
}

/// Unpacks, validates and parses a resource, which must carry its own name; of the form `xdstp:`, in whatever way.
pub(super) fn parse<M, T>(
    name: &str,
    body: &Any,
    named: fn(&M) -> &str,
    parse: impl Fn(&M, &str) -> Result<T, FieldError>,
) -> Result<T, FieldError>
where
    M: prost::Message + Name + Default + Clone,
{
    parse_any(body, |message: &M, path| {
        if named(message) != name && xdstp::normalise(named(message)) != name {
            let text = format!("the resource is named {name:?}, and its content {:?}", named(message));
            return Err(FieldError::new("name", text));
        }
        parse(message, path)
    })
}

/// The same of a resource whose name is not in itself.
pub(super) fn parse_any<M, T>(body: &Any, parse: impl Fn(&M, &str) -> Result<T, FieldError>) -> Result<T, FieldError>
where
    M: prost::Message + Name + Default + Clone,
{
    let unknown = super::unknown_fields();
    let message: M = json::unpack(body, "")?;
    // Seldom, and what came is there to be looked at.
    let message = match json::may_hold_typed_structs(&body.value) {
        true => json::resolve_typed_structs(&message, unknown)?,
        false => Cow::Borrowed(&message),
    };
    // As it came: fields that are not known are seen there only, and it need not be encoded again to be looked at.
    let resolved = matches!(message, Cow::Owned(_)) || !body.type_url.ends_with(&M::full_name());
    if !resolved || !matches!(unknown, UnknownFields::Ignore) {
        json::validate_any(body, "", unknown)?;
    }
    if resolved {
        json::validate(&*message)?;
    }
    parse(&message, "")
}
