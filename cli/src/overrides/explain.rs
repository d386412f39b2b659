//! `culvert override explain`: what proxies would do about a header.

use std::fmt::Write as _;

use anyhow::{Context, anyhow, bail, ensure};
use clap::Args;
use culvert_discovery::overrides::SHARES;
use culvert_proxy_daemon::http::filters::{Explained, OffloadedTable, explain};
use culvert_xds_client::api::culvert::{
    extensions::filters::http::overrides::v1::Override as Config, overrides::v1::OffloadedService,
};
use culvert_xds_client::json;
use culvert_xds_client::overrides::Overrides;
use serde_json::{Value, json};

use super::access::Access;
use super::{DecodeOutput, Decoded, as_json, decode_header, header::now, in_words};
use crate::http;

/// What is printed below the flags.
pub const HELP: &str = "\
Examples:
  culvert override explain \"baggage: overrides=...\"
  culvert override explain \"$HEADER\" --admin http://127.0.0.1:9901 --admin http://node-b:9901

Each daemon's override filters and what discovery has told it (its admin pages /config_dump and /overrides) say what would become
of a request. What a share stands for says discovery, which may want the developers' token for it. What depends on the client, and whether a signature is good, only the daemon knows: that is named. A request with
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

    /// Discovery, which is asked what a share stands for
    #[command(flatten)]
    access: Access,
}

/// What discovery says of the share that a header names.
enum Shared {
    /// It stands for these.
    Stands { name: String, overrides: Overrides },
    /// Daemons refuse all that a request asks for with it, for this reason.
    Refused(&'static str),
}

/// What one filter would do.
struct Hop {
    daemon: String,
    listener: String,
    lines: Vec<Explained>,
}

/// Explains; gives what is to be printed.
pub fn run(flags: &ExplainFlags) -> anyhow::Result<String> {
    let mut decoded = decode_header(flags.header.trim())?;
    let mut text = in_words(&decoded);
    let mut object = as_json(&decoded);
    if let Some(message) = decoded.overrides.as_mut().filter(|message| !message.share.is_empty()) {
        match share(&flags.access, &message.share) {
            // What the header says itself is worth knowing all the same.
            Err(error) => {
                let _ = writeln!(text, "its share: not known: {error:#}");
                let _ = writeln!(text, "what daemons would do without the share:");
                object["share"] = json!({ "error": format!("{error:#}") });
                message.share.clear();
            }
            Ok(Shared::Refused(reason)) => {
                object["share"] = json!({ "refused": reason });
                let _ = writeln!(text, "the share's token: all of it would be refused: {reason}");
                // Whatever else the header says.
                decoded.overrides = None;
            }
            Ok(Shared::Stands { name, overrides }) => {
                let routes = overrides.overrides.iter().map(|entry| format!("{}={}", entry.service, entry.revision));
                let routes = routes.collect::<Vec<_>>();
                let _ = writeln!(text, "its share is `{name}`: {}", routes.join(", "));
                object["share"] = json!({ "name": name, "overrides": routes });
                *message = message.joined_with(&overrides)?;
            }
        }
    }
    let (mut hops, mut silent) = (Vec::new(), Vec::new());
    for admin in &flags.admin {
        let read = |path: &str| -> anyhow::Result<Value> {
            let body = http::get(admin, path)?;
            serde_json::from_slice(&body).with_context(|| format!("{admin}{path} is not what a culvertd answers"))
        };
        match read("/config_dump").and_then(|dump| of_daemon(admin, &dump, &read("/overrides")?, &decoded)) {
            Ok(found) => hops.extend(found),
            Err(error) => silent.push(format!("{admin}: {error:#}")),
        }
    }
    ensure!(silent.len() < flags.admin.len(), "{}; {ASK}", silent.join("; "));
    // What the others would do is worth knowing all the same.
    for daemon in &silent {
        eprintln!("left out: {daemon}");
    }
    Ok(match flags.output {
        DecodeOutput::Text => {
            hops.iter().for_each(|hop| hop_in_words(hop, &mut text));
            text
        }
        DecodeOutput::Json => {
            object["hops"] = hops.iter().map(hop_as_json).collect();
            format!("{object:#}\n")
        }
    })
}

/// What discovery keeps under a token.
fn share(access: &Access, token: &str) -> anyhow::Result<Shared> {
    let answer = match access.try_ask("GET", &format!("{SHARES}/{token}"), None)? {
        Ok(answer) => answer,
        Err((404, _)) => return Ok(Shared::Refused("share_unknown")),
        Err((_, said)) => bail!("what the share stands for is not told: {said}"),
    };
    if answer["expired"] == true {
        return Ok(Shared::Refused("share_expired"));
    }
    let item = answer["item"].as_str().unwrap_or_default();
    let overrides = Overrides::from_baggage_item(item).context("what discovery keeps under the token")?;
    Ok(Shared::Stands { name: answer["name"].as_str().unwrap_or_default().to_owned(), overrides })
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
            // The listeners of the bootstrap are among the others, too.
            let passed_over = ["error_state", "warming_state", "draining_state", "bootstrap"];
            let counts = |key: &String| !passed_over.contains(&key.as_str());
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
        let bootstrap = json!({ "static_resources": { "listeners": [{
            "name": "outbound",
            "filter_chains": [{ "filters": [{ "typed_config": { "http_filters": [{ "typed_config": filter }] } }] }],
        }] } });
        json!({ "configs": [{ "bootstrap": bootstrap }, { "dynamic_listeners": [{
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
