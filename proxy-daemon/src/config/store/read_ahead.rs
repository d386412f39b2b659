//! Secrets are read and parsed before the store is locked: their files may be slow, and certificates take a while.

use std::collections::HashMap;

use culvert_xds_client::ads::{Update, type_url};
use tokio::runtime::{Handle, RuntimeFlavor};

use super::kinds::{Kind, Value};
use crate::config::FieldError;

/// What the secrets of an update were read as, by name. Nothing of other types.
pub(super) type Read = HashMap<String, Result<Value, FieldError>>;

/// Reads the secrets of an update.
pub(super) fn read(update: &Update) -> Read {
    if update.type_url != type_url::SECRET || update.added.is_empty() {
        return Read::new();
    }
    let all = update.added.iter();
    aside(|| all.map(|it| (it.name.clone(), Kind::Secrets.parse(&it.name, &it.body))).collect())
}

/// Does what may take long. The other tasks of this thread go on elsewhere meanwhile, where there are such.
pub(super) fn aside<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
