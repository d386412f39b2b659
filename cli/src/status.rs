//! `culvert status`: what discovery knows, as tables.

use anyhow::Context;
use clap::{Args, ValueEnum};
use serde_json::Value;

use crate::http;
use crate::overrides::time;
use crate::table;

/// Whom to ask, and how to print: flags of all commands that ask culvert-discovery.
#[derive(Debug, Args)]
pub struct Flags {
    /// The status address of culvert-discovery (its --http)
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY", default_value = "http://127.0.0.1:18001")]
    discovery: String,

    /// How to print it
    #[arg(long, short, default_value = "text")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Tables
    #[value(alias = "plain")]
    Text,
    /// The status document as it is
    Json,
}

/// Fetches and formats the status.
///
/// # Errors
/// When discovery cannot be asked.
pub fn run(flags: &Flags) -> anyhow::Result<String> {
    let status = flags.fetch()?;
    Ok(flags.print(&status, || tables(&status)))
}

impl Flags {
    /// The document at `/status`.
    ///
    /// # Errors
    /// When discovery cannot be asked.
    pub fn fetch(&self) -> anyhow::Result<Value> {
        let body = http::get(&self.discovery, "/status").with_context(|| {
            format!("no status from {}; is culvert-discovery running with --http at that address?", self.discovery)
        })?;
        let status = http::json(&body).map_err(|found| {
            anyhow::anyhow!(
                "{} is not the status page of culvert-discovery: is that its --http address? It answered with {found}",
                self.discovery
            )
        })?;
        if status["ready"] == false {
            eprintln!("note: discovery has not read all of its clusters yet, and does not know everything");
        }
        Ok(status)
    }

    /// A document as it is, or as text.
    pub fn print(&self, document: &Value, text: impl FnOnce() -> String) -> String {
        match self.output {
            Output::Json => format!("{document:#}\n"),
            Output::Text => text(),
        }
    }
}

fn tables(status: &Value) -> String {
    let mut text = String::new();
    section(
        &mut text,
        "CLUSTERS",
        clusters(status),
        &["NAME", "REGION", "ZONE", "SERVICES", "PODS", "SOURCE", "STATE"],
    );
    section(
        &mut text,
        "SERVICES",
        services(status),
        &["ENVOY CLUSTER", "PROTOCOL", "ADDRESSES", "ENDPOINTS", "CLUSTERS"],
    );
    if !status["registrations"].is_null() {
        let row = ["storage", "hosts"].map(|key| cell(&status["registrations"][key]));
        let state = if status["registrations"]["stale"] == true { "stale" } else { "ok" };
        let rows = vec![row.into_iter().chain([state.to_owned()]).collect()];
        section(&mut text, "REGISTRATIONS", rows, &["STORAGE", "HOSTS", "STATE"]);
    }
    section(&mut text, "OFFLOADED", offloaded(status), OFFLOADED_COLUMNS);
    section(&mut text, "TUNNELS", tunnels(status), TUNNEL_COLUMNS);
    section(&mut text, "SHARES", shares(status), SHARE_COLUMNS);
    section(&mut text, "PROXIES", proxies(status), &["NODE", "PEER", "AGENT", "ROLE", "VARIANT", "STATE"]);
    let problems = problems(status);
    if !problems.is_empty() {
        text.push_str("\nPROBLEMS\n");
        for problem in problems {
            text.push_str(&format!("  {problem}\n"));
        }
    }
    text
}

fn clusters(status: &Value) -> Vec<Vec<String>> {
    let row = |cluster: &Value| {
        let source = &cluster["source"];
        let state = if source["stale"] == true {
            "stale".to_owned()
        } else if cluster["read"] == false {
            "not read".to_owned()
        } else {
            match list(&source["file_errors"]).len() {
                0 => "ok".to_owned(),
                1 => "1 bad file".to_owned(),
                bad => format!("{bad} bad files"),
            }
        };
        let state = match (cluster["drained"] == true, &*state) {
            (true, "ok") => "drained".to_owned(),
            (true, _) => format!("drained, {state}"),
            (false, _) => state,
        };
        let mut row: Vec<_> = ["name", "region", "zone", "services", "pods"].map(|key| cell(&cluster[key])).into();
        row.extend([cell(&source["location"]), state]);
        row
    };
    list(&status["clusters"]).iter().map(row).collect()
}

fn services(status: &Value) -> Vec<Vec<String>> {
    let row = |service: &Value| {
        let endpoints = list(&service["endpoints"]);
        let of = |health: &str| endpoints.iter().filter(|endpoint| endpoint["health"] == health).count();
        let (draining, unhealthy) = (of("draining"), of("unhealthy"));
        let others = [(draining, "draining"), (unhealthy, "unhealthy")].map(|(count, health)| match count {
            0 => String::new(),
            _ => format!(" (+{count} {health})"),
        });
        let count = format!("{}{}", endpoints.len() - draining - unhealthy, others.concat());
        let [name, protocol] = ["envoy_cluster", "protocol"].map(|key| cell(&service[key]));
        vec![name, protocol, joined(&service["vips"]), count, joined(&service["clusters"])]
    };
    list(&status["services"]).iter().map(row).collect()
}

/// The columns of [`offloaded`].
pub const OFFLOADED_COLUMNS: &[&str] = &["SERVICE", "REVISION", "ADDRESS", "POD", "CLUSTER"];

/// Endpoints that only overrides reach.
pub fn offloaded(status: &Value) -> Vec<Vec<String>> {
    let rows = |service: &Value| {
        let name = cell(&service["envoy_cluster"]);
        let row = move |endpoint: &Value| {
            let mut row = vec![name.clone()];
            row.extend(["revision", "address", "pod", "cluster"].map(|key| cell(&endpoint[key])));
            row
        };
        list(&service["offloaded"]).iter().map(row).collect::<Vec<_>>()
    };
    list(&status["services"]).iter().flat_map(rows).collect()
}

/// The columns of [`tunnels`].
pub const TUNNEL_COLUMNS: &[&str] = &["SERVICE", "REVISION", "FROM", "CONNECTIONS", "SINCE"];

/// Tunnels to developers' machines.
pub fn tunnels(status: &Value) -> Vec<Vec<String>> {
    let row = |tunnel: &Value| {
        let mut row: Vec<_> = ["envoy_cluster", "revision", "peer", "connections"].map(|key| cell(&tunnel[key])).into();
        row.push(time(tunnel["since"].as_i64().unwrap_or_default()));
        row
    };
    list(&status["tunnels"]).iter().map(row).collect()
}

/// The columns of [`shares`].
pub const SHARE_COLUMNS: &[&str] = &["NAME", "UNTIL", "OVERRIDES"];

/// Stored sets of overrides.
pub fn shares(status: &Value) -> Vec<Vec<String>> {
    let row = |share: &Value| {
        let entries = list(&share["overrides"]).iter();
        let entries: Vec<_> =
            entries.map(|entry| format!("{}={}", cell(&entry["service"]), cell(&entry["revision"]))).collect();
        let expires = time(share["expires"].as_i64().unwrap_or_default());
        let until = if share["expired"] == true { format!("ended {expires}") } else { expires };
        vec![cell(&share["name"]), until, entries.join(",")]
    };
    list(&status["shares"]).iter().map(row).collect()
}

fn proxies(status: &Value) -> Vec<Vec<String>> {
    let row = |client: &Value| {
        let types: Vec<&Value> = client["types"].as_object().map(|types| types.values().collect()).unwrap_or_default();
        // A rejection that a later version has made up for is history.
        let rejected = |status: &&&Value| status["nack"]["version"] == status["sent"] && !status["nack"].is_null();
        let state = if types.iter().any(|status| rejected(&status)) {
            "rejected the newest configuration"
        } else if types.iter().all(|status| status["sent"] == status["acked"]) {
            "in sync"
        } else {
            "has not answered yet"
        };
        let mut row: Vec<_> = ["node", "peer", "user_agent", "role", "variant"].map(|key| cell(&client[key])).into();
        row.push(state.to_owned());
        row
    };
    list(&status["clients"]).iter().map(row).collect()
}

/// Clusters that cannot be read at present.
pub fn unread(status: &Value) -> Vec<String> {
    list(&status["clusters"]).iter().filter_map(unread_of).collect()
}

fn unread_of(cluster: &Value) -> Option<String> {
    let name = cell(&cluster["name"]);
    match (cluster["source"]["error"].as_str(), cluster["read"] == false) {
        (Some(error), true) => Some(format!("cluster {name}: {error}; it has never been read, and is left out")),
        (Some(error), false) => Some(format!("cluster {name}: {error}; its last objects stay in force")),
        (None, true) => Some(format!("cluster {name}: not all of it has been read yet; it is left out")),
        (None, false) => None,
    }
}

fn problems(status: &Value) -> Vec<String> {
    let mut problems = Vec::new();
    for cluster in list(&status["clusters"]) {
        let source = &cluster["source"];
        problems.extend(unread_of(cluster));
        for file in list(&source["file_errors"]) {
            let kept = if file["last_good_in_force"] == true {
                "the last good version stays in force"
            } else {
                "not in force"
            };
            problems.push(format!("{}: {} ({kept})", cell(&file["file"]), cell(&file["error"])));
        }
        problems.extend(list(&source["warnings"]).iter().map(cell));
    }
    if let Some(error) = status["registrations"]["error"].as_str() {
        problems.push(format!("registrations: {error}; what was registered stays in force"));
    }
    if let Some(error) = status["share_storage"]["error"].as_str() {
        problems.push(format!("shares: {error}; what was stored last stays in force"));
    }
    for (name, error) in status["secret_errors"].as_object().into_iter().flatten() {
        problems.push(format!("secret {name}: {}; what was there before stays in force", cell(error)));
    }
    problems.extend(list(&status["warnings"]).iter().map(cell));
    for it in list(&status["client_problems"]) {
        problems.push(format!("node {}: {}", cell(&it["node"]), cell(&it["problem"])));
    }
    for client in list(&status["clients"]) {
        for (type_url, state) in client["types"].as_object().into_iter().flatten() {
            if !state["nack"].is_null() {
                let kind = type_url.rsplit('.').next().unwrap_or(type_url);
                let (version, reason) = (cell(&state["nack"]["version"]), cell(&state["nack"]["reason"]));
                problems.push(format!("{} rejected {kind} version {version}: {reason}", cell(&client["node"])));
            }
        }
    }
    problems
}

pub fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A value as the text of a cell; what is empty or missing is a dash.
pub fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => "-".to_owned(),
    }
}

pub fn joined(value: &Value) -> String {
    let parts: Vec<_> = list(value).iter().map(cell).collect();
    if parts.is_empty() { "-".to_owned() } else { parts.join(",") }
}

/// A table under a title; what has no rows is said to be none.
pub fn section(text: &mut String, title: &str, rows: Vec<Vec<String>>, columns: &[&str]) {
    if !text.is_empty() {
        text.push('\n');
    }
    text.push_str(title);
    if rows.is_empty() {
        text.push_str(": none\n");
        return;
    }
    text.push('\n');
    text.push_str(&table::lines(columns, &rows, "  ", table::terminal_width()));
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
