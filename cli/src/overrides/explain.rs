//! `culvert override explain`: what proxies would do about a header.

use std::fmt::Write as _;

use anyhow::{Context, anyhow, ensure};
use clap::Args;
use culvert_proxy_daemon::http::filters::{Explained, OffloadedTable, explain};
use culvert_xds_client::api::culvert::{
    extensions::filters::http::overrides::v1::Override as Config, overrides::v1::OffloadedService,
};
use culvert_xds_client::json;
use serde_json::{Value, json};

use super::{DecodeOutput, Decoded, as_json, decode_header, header::now, in_words};
use crate::http;

/// What is printed below the flags.
pub const HELP: &str = "\
Examples:
  culvert override explain \"baggage: overrides=...\"
  culvert override explain \"$HEADER\" --admin http://127.0.0.1:9901 --admin http://node-b:9901

Each daemon's override filters and what discovery has told it (its admin pages /config_dump and /overrides) say what would become
of a request. What depends on the client, and whether a signature is good, only the daemon knows: that is named. A request with
`x-culvert-override-debug: 1` is told by the daemon itself, where the mesh allows that.";

/// What helps where no daemon answers.
const ASK: &str =
    "name the admin interface of a daemon with --admin; `culvert override decode` says what a header means without one";

/// Flags of `culvert override explain`.
#[derive(Debug, Args)]
pub struct ExplainFlags {
    /// The header as `name: value`, or only its value
    #[arg(value_name = "HEADER", allow_hyphen_values = true)]
    header: String,

    /// The admin interface of a daemon. May be repeated
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9901")]
    admin: Vec<String>,

    /// How to print it
    #[arg(long, default_value = "text")]
    output: DecodeOutput,
}

/// What one filter would do.
struct Hop {
    daemon: String,
    listener: String,
    lines: Vec<Explained>,
}

/// Explains; gives what is to be printed.
pub fn run(flags: &ExplainFlags) -> anyhow::Result<String> {
    let decoded = decode_header(flags.header.trim())?;
    let mut hops = Vec::new();
    for admin in &flags.admin {
        let read = |path: &str| -> anyhow::Result<Value> {
            let body = http::get(admin, path).map_err(|error| anyhow!("{error:#}; {ASK}"))?;
            serde_json::from_slice(&body).with_context(|| format!("{admin}{path} is not what a culvertd answers"))
        };
        hops.extend(of_daemon(admin, &read("/config_dump")?, &read("/overrides")?, &decoded)?);
    }
    Ok(match flags.output {
        DecodeOutput::Text => {
            let mut text = in_words(&decoded);
            hops.iter().for_each(|hop| hop_in_words(hop, &mut text));
            text
        }
        DecodeOutput::Json => {
            let mut object = as_json(&decoded);
            object["hops"] = hops.iter().map(hop_as_json).collect();
            format!("{object:#}\n")
        }
    })
}

/// What the filters of one daemon would do.
fn of_daemon(daemon: &str, dump: &Value, told: &Value, decoded: &Decoded) -> anyhow::Result<Vec<Hop>> {
    let services = told["services"].as_array().map(Vec::as_slice).unwrap_or_default();
    let services: Vec<OffloadedService> =
        services.iter().map(|service| json::from_json(service.clone())).collect::<Result<_, _>>()?;
    let table = OffloadedTable::from_resources(&services).map_err(|error| anyhow!("{daemon}: {error}"))?;
    let mut filters = Vec::new();
    collect(dump, "", &mut filters);
    ensure!(!filters.is_empty(), "{daemon} has no override filter");
    let Some(message) = &decoded.overrides else { return Ok(Vec::new()) };
    let when = (decoded.key_id.is_some(), now());
    let mut hops: Vec<Hop> = Vec::new();
    for (listener, config) in filters {
        let config: Config = json::from_json(config)?;
        let lines = explain(&config, &table, message, when).map_err(|error| anyhow!("{daemon}: {error}"))?;
        // A listener has a filter for each port: most do the same.
        match hops.iter_mut().find(|hop| hop.listener == listener && hop.lines == lines) {
            Some(_) => {}
            None => hops.push(Hop { daemon: daemon.to_owned(), listener, lines }),
        }
    }
    Ok(hops)
}

/// Finds the filters' configurations, with the names of their listeners.
fn collect(value: &Value, listener: &str, found: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(object) => {
            let type_url = object.get("@type").and_then(Value::as_str).unwrap_or_default();
            if type_url.ends_with("culvert.extensions.filters.http.overrides.v1.Override") {
                let mut config = object.clone();
                config.remove("@type");
                found.push((listener.to_owned(), Value::Object(config)));
                return;
            }
            let is_listener = type_url.ends_with("envoy.config.listener.v3.Listener");
            let name = object.get("name").and_then(Value::as_str).filter(|_| is_listener).unwrap_or(listener);
            // What was refused is told beside what is in force, and does not count.
            let counts = |key: &String| key != "error_state" && key != "warming_state" && key != "draining_state";
            object.iter().filter(|(key, _)| counts(key)).for_each(|(_, value)| collect(value, name, found));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, listener, found)),
        _ => {}
    }
}

fn hop_in_words(hop: &Hop, text: &mut String) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}, listener {}:", hop.daemon, hop.listener);
    for line in &hop.lines {
        let what = match (&line.cluster, &line.service) {
            (Some(cluster), _) => cluster.clone(),
            (None, Some(service)) => format!("{service} (discovery has told nothing of it)"),
            (None, None) => "all of it".to_owned(),
        };
        let _ = writeln!(text, "  {what}");
        for applied in &line.applied {
            let _ = writeln!(text, "    would be done: {applied}");
        }
        for (action, refusal) in &line.refused {
            let action = action.map_or_else(String::new, |action| format!("{} ", action.name()));
            let _ = writeln!(text, "    would be refused: {action}{refusal}");
        }
        for depends in line.depends.iter().filter(|_| !line.applied.is_empty()) {
            let _ = writeln!(text, "    if {depends}");
        }
    }
}

fn hop_as_json(hop: &Hop) -> Value {
    let lines = hop.lines.iter().map(|line| {
        let refused = line
            .refused
            .iter()
            .map(|(action, reason)| json!({ "action": action.map(|action| action.name()), "reason": reason }));
        json!({
            "cluster": line.cluster,
            "service": line.service,
            "applied": line.applied,
            "refused": refused.collect::<Vec<_>>(),
            "depends_on": line.depends,
        })
    });
    json!({ "daemon": hop.daemon, "listener": hop.listener, "overrides": lines.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dump() -> Value {
        let filter = json!({
            "@type": "type.googleapis.com/culvert.extensions.filters.http.overrides.v1.Override",
            "original_dst_cluster": "original_dst",
            "actions": ["FAULT"],
        });
        let listener = json!({
            "@type": "type.googleapis.com/envoy.config.listener.v3.Listener",
            "name": "outbound",
            "filter_chains": [{ "filters": [{ "typed_config": { "http_filters": [{ "typed_config": filter }] } }] }],
        });
        json!({ "configs": [{ "dynamic_listeners": [{
            "name": "outbound",
            "active_state": { "listener": listener },
            "error_state": { "failed_configuration": listener },
        }] }] })
    }

    #[test]
    fn filters_are_found_where_they_are_in_force() {
        let mut found = Vec::new();
        collect(&dump(), "", &mut found);
        assert_eq!(found.len(), 1);
        assert_eq!((&*found[0].0, &found[0].1["actions"]), ("outbound", &json!(["FAULT"])));
    }

    #[test]
    fn each_hop_is_told() {
        let told = json!({ "services": [{
            "cluster_name": "users.default:80",
            "service": "users.default",
            "endpoints": [{ "revision": "x", "address": "10.0.0.9", "port": 80 }],
            "policy": { "allowed": true, "actions": ["ROUTE"], "sources": { "pods": ["default/front-*"] } },
        }] });
        // users=x and a fault of users, which its policy does not allow.
        let overrides = culvert_xds_client::overrides::Overrides::new([("users", "x")]).unwrap();
        let decoded = decode_header(&format!("ot-baggage-overrides: {}", overrides.to_baggage_item())).unwrap();
        let hops = of_daemon("node-a", &dump(), &told, &decoded).unwrap();
        let mut text = String::new();
        hops.iter().for_each(|hop| hop_in_words(hop, &mut text));
        let expected = "node-a, listener outbound:\n  users.default:80\n    would be done: revision x (10.0.0.9:80)\n    \
                        if the service allows the client\n";
        assert_eq!(text, expected);
        let error = of_daemon("node-a", &json!({}), &told, &decoded).err().unwrap().to_string();
        assert_eq!(error, "node-a has no override filter");
    }
}
