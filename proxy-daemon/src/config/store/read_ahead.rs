//! Secrets are read and parsed before the store is locked: their files may be slow, and certificates take a while. So are large endpoints.

use std::collections::HashMap;

use culvert_xds_client::ads::{Update, type_url};
pub(super) use culvert_xds_client::aside;

use super::kinds::{Kind, Value};
use crate::config::FieldError;

/// What the secrets and the large endpoints of an update were read as, by name. Nothing of other types.
pub(super) type Read = HashMap<String, Result<Value, FieldError>>;

/// Bytes of an update that take too long for other tasks of the control thread to wait.
pub(super) const LONG: usize = 64 << 10;

/// Reads the secrets and the large endpoints of an update.
pub(super) fn read(update: &Update) -> Read {
    let (kind, least) = match &*update.type_url {
        type_url::SECRET => (Kind::Secrets, 0),
        type_url::ENDPOINT => (Kind::Endpoints, LONG),
        _ => return Read::new(),
    };
    let mut all = update.added.iter().filter(|it| it.body.value.len() >= least).peekable();
    if all.peek().is_none() {
        return Read::new();
    }
    aside(|| all.map(|it| (it.name.clone(), kind.parse(&it.name, &it.body))).collect())
}

/// What the update's resources are long.
pub(super) fn bytes(update: &Update) -> usize {
    update.added.iter().map(|it| it.body.value.len()).sum()
}
