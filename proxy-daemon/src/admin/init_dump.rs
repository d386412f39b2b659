//! `/init_dump`: what is waited for.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use serde_json::{Value as Json, json};

use super::{
    AdminState,
    request::{Parameters, Reply},
};
use crate::config::status::Unready;

/// Answers a request. As in Envoy there is one component, and any other mask selects nothing.
pub(super) fn reply(state: &AdminState, parameters: &Parameters) -> Reply {
    let unready = match parameters.get("mask") {
        None | Some("" | "listener") => state.config.snapshot().unready,
        Some(_) => Vec::new(),
    };
    if unready.is_empty() {
        return Reply::json(&json!({}));
    }
    let dumps: Vec<Json> = unready.iter().map(dump).collect();
    Reply::json(&json!({ "unready_targets_dumps": dumps }))
}

fn dump(unready: &Unready) -> Json {
    let mut hasher = DefaultHasher::new();
    unready.listener.hash(&mut hasher);
    let name = format!("init manager Listener-local-init-manager {} {}", unready.listener, hasher.finish());
    let mut dump = json!({ "name": name });
    if !unready.targets.is_empty() {
        dump["target_names"] = json!(unready.targets);
    }
    dump
}
