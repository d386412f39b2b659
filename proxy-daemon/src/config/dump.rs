//! `/config_dump`: the configuration in force, as Envoy's `ConfigDump` prints it.

use std::{collections::BTreeSet, time::SystemTime};

use culvert_xds_client::json;
use serde_json::{Value, json};

use super::store::{Apply, ConfigStore, Refused, Resources, State, Stored};

const PREFIX: &str = "type.googleapis.com/envoy.admin.v3.";

impl<A: Apply> ConfigStore<A> {
    /// The whole dump; `bootstrap` is the message that the daemon started with, as JSON.
    pub fn config_dump(&self, bootstrap: &Value, started: SystemTime) -> Value {
        let state = self.lock();
        let updated = timestamp(started);
        let fixed = |kind: &str, field: &str| -> Vec<Value> {
            let resources = bootstrap["static_resources"][kind].as_array().cloned().unwrap_or_default();
            resources.into_iter().map(|item| json!({ field: item, "last_updated": updated })).collect()
        };
        let typed = |name: &str| format!("{PREFIX}{name}");
        json!({ "configs": [
            { "@type": typed("BootstrapConfigDump"), "bootstrap": bootstrap, "last_updated": updated },
            {
                "@type": typed("ClustersConfigDump"),
                "static_clusters": fixed("clusters", "cluster"),
                "dynamic_active_clusters": dynamic(&state.clusters, "cluster"),
            },
            {
                "@type": typed("EndpointsConfigDump"),
                "dynamic_endpoint_configs": dynamic(&state.endpoints, "endpoint_config"),
            },
            {
                "@type": typed("ListenersConfigDump"),
                "static_listeners": fixed("listeners", "listener"),
                "dynamic_listeners": listeners(&state, |name| self.listener_failure(name)),
            },
            { "@type": typed("RoutesConfigDump"), "dynamic_route_configs": dynamic(&state.routes, "route_config") },
        ]})
    }
}

/// The resources of one type: those in force, and those of which no version was ever taken.
fn dynamic(resources: &Resources, field: &str) -> Vec<Value> {
    let names: BTreeSet<&String> = resources.accepted.keys().chain(resources.refused.keys()).collect();
    let entry = |name: &String| {
        let mut entry = resources.accepted.get(name).map_or_else(|| json!({}), |stored| state(stored, field));
        if let Some(refused) = resources.refused.get(name) {
            entry["error_state"] = error_state(refused);
        }
        entry
    };
    names.into_iter().map(entry).collect()
}

fn listeners(all: &State, failure: impl Fn(&str) -> Option<String>) -> Vec<Value> {
    let resources = &all.listeners;
    let names: BTreeSet<&String> = resources.accepted.keys().chain(resources.refused.keys()).collect();
    let entry = |name: &String| {
        let mut entry = json!({ "name": name });
        if let Some(stored) = all.live.get(name) {
            entry["active_state"] = state(stored, "listener");
        }
        if all.warming.contains_key(name)
            && let Some(stored) = resources.accepted.get(name)
        {
            entry["warming_state"] = state(stored, "listener");
        }
        if let Some(refused) = resources.refused.get(name) {
            entry["error_state"] = error_state(refused);
        } else if let Some(details) = failure(name) {
            entry["error_state"] = json!({ "details": details });
        }
        entry
    };
    names.into_iter().map(entry).collect()
}

fn state(stored: &Stored, field: &str) -> Value {
    json!({
        "version_info": stored.version,
        field: json::any_to_json(&stored.body),
        "last_updated": timestamp(stored.updated),
    })
}

/// `UpdateFailureState`
fn error_state(refused: &Refused) -> Value {
    json!({
        "failed_configuration": json::any_to_json(&refused.stored.body),
        "last_update_attempt": timestamp(refused.stored.updated),
        "details": refused.details,
        "version_info": refused.stored.version,
    })
}

/// RFC 3339, in UTC, with milliseconds.
fn timestamp(at: SystemTime) -> String {
    crate::access_log::rfc3339(at)
}
