//! `/config_dump`: the configuration in force, as Envoy's `ConfigDump` prints it.

use std::{collections::BTreeMap, time::SystemTime};

use culvert_xds_client::json;
use serde_json::{Value, json};

use super::store::{Apply, ConfigStore, Stored};

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
        let routes = dynamic(&state.routes, "route_config");
        json!({ "configs": [
            { "@type": format!("{PREFIX}BootstrapConfigDump"), "bootstrap": bootstrap, "last_updated": updated },
            {
                "@type": format!("{PREFIX}ClustersConfigDump"),
                "static_clusters": fixed("clusters", "cluster"),
                "dynamic_active_clusters": dynamic(&state.clusters, "cluster"),
            },
            { "@type": format!("{PREFIX}EndpointsConfigDump"), "dynamic_endpoint_configs": dynamic(&state.endpoints, "endpoint_config") },
            {
                "@type": format!("{PREFIX}ListenersConfigDump"),
                "static_listeners": fixed("listeners", "listener"),
                "dynamic_listeners": listeners(&state.listeners),
            },
            { "@type": format!("{PREFIX}RoutesConfigDump"), "dynamic_route_configs": routes },
        ]})
    }
}

fn dynamic(resources: &BTreeMap<String, Stored>, field: &str) -> Vec<Value> {
    let entry = |stored: &Stored| {
        let mut entry = json!({
            "version_info": stored.version,
            field: json::any_to_json(&stored.body),
            "last_updated": timestamp(stored.updated),
        });
        if let Some(error) = error_state(stored) {
            entry["error_state"] = error;
        }
        entry
    };
    resources.values().map(entry).collect()
}

fn listeners(resources: &BTreeMap<String, Stored>) -> Vec<Value> {
    let entry = |(name, stored): (&String, &Stored)| {
        let mut entry = json!({
            "name": name,
            "active_state": {
                "version_info": stored.version,
                "listener": json::any_to_json(&stored.body),
                "last_updated": timestamp(stored.updated),
            },
        });
        if let Some(error) = error_state(stored) {
            entry["error_state"] = error;
        }
        entry
    };
    resources.iter().map(entry).collect()
}

fn error_state(stored: &Stored) -> Option<Value> {
    let (details, at) = stored.error.as_ref()?;
    Some(json!({ "last_update_attempt": timestamp(*at), "details": details }))
}

/// RFC 3339, in UTC, with milliseconds.
fn timestamp(at: SystemTime) -> String {
    crate::access_log::rfc3339(at)
}
