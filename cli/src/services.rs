//! `culvert services` and `culvert endpoints`: parts of what discovery knows.

use anyhow::bail;
use clap::Args;
use serde_json::Value;

use crate::status::{self, cell, joined, list};
use crate::table;

/// Shown after the help of `culvert services`.
pub const SERVICES_HELP: &str = "\
Examples:
  culvert services                  all services
  culvert services users            the ports of users, in whatever namespace
  culvert services users.shop:80    one port
  culvert services -o json | jq '.[] | select(.endpoints == []).envoy_cluster'";

/// Shown after the help of `culvert endpoints`.
pub const ENDPOINTS_HELP: &str = "\
Examples:
  culvert endpoints users           of all its ports
  culvert endpoints users.shop:80   of one port
  culvert endpoints users -o json";

/// Flags of `culvert services`.
#[derive(Debug, Args)]
pub struct ServicesFlags {
    /// A service: name, name.namespace or name.namespace:port
    #[arg(value_name = "NAME")]
    name: Option<String>,

    #[command(flatten)]
    from: status::Flags,
}

/// Flags of `culvert endpoints`.
#[derive(Debug, Args)]
pub struct EndpointsFlags {
    /// A service: name, name.namespace or name.namespace:port
    #[arg(value_name = "SERVICE")]
    service: String,

    #[command(flatten)]
    from: status::Flags,
}

/// Runs `culvert services`.
///
/// # Errors
/// When discovery cannot be asked, or has no such service.
pub fn services(flags: &ServicesFlags) -> anyhow::Result<String> {
    let status = flags.from.fetch()?;
    let found = find(&status, flags.name.as_deref())?;
    let shown = || {
        let mut text = services_table(&found, table::terminal_width());
        if flags.name.is_none() {
            text.push_str(&beside(&status));
        }
        text
    };
    Ok(flags.from.print(&Value::Array(found.clone()), shown))
}

/// Runs `culvert endpoints`.
///
/// # Errors
/// When discovery cannot be asked, or has no such service.
pub fn endpoints(flags: &EndpointsFlags) -> anyhow::Result<String> {
    let status = flags.from.fetch()?;
    let found = find(&status, Some(&flags.service))?;
    Ok(flags.from.print(&Value::Array(found.clone()), || endpoints_table(&found, table::terminal_width())))
}

/// The service ports that go by a name; all without one.
///
/// # Errors
/// When there is none.
pub fn find(status: &Value, name: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let all = list(&status["services"]);
    let Some(name) = name else { return Ok(all.to_vec()) };
    // As clients in Kubernetes write it.
    let (host, port) = name.split_once(':').map_or((name, String::new()), |(host, port)| (host, format!(":{port}")));
    let short = host.trim_end_matches(".cluster.local").trim_end_matches(".svc");
    let name = &*format!("{short}{port}");
    let is_meant = |service: &&Value| {
        let port = service["envoy_cluster"].as_str().unwrap_or_default();
        let full = port.rsplit_once(':').map_or(port, |(full, _)| full);
        name == port || name == full || full.split_once('.').is_some_and(|(short, _)| name == short)
    };
    let found: Vec<Value> = all.iter().filter(is_meant).cloned().collect();
    if found.is_empty() {
        let similar = all.iter().filter_map(|service| service["envoy_cluster"].as_str());
        let similar: Vec<_> = similar.filter(|port| port.contains(name)).take(5).collect();
        match similar.is_empty() {
            true => bail!("there is no service `{name}`; `culvert services` lists them"),
            false => bail!("there is no service `{name}`; there is {}", similar.join(", ")),
        }
    }
    Ok(found)
}

/// What only overrides reach, and what they are kept in, as far as there is any.
fn beside(status: &Value) -> String {
    let mut text = String::new();
    for (title, rows, columns) in [
        ("OFFLOADED", status::offloaded(status), status::OFFLOADED_COLUMNS),
        ("TUNNELS", status::tunnels(status), status::TUNNEL_COLUMNS),
        ("SHARES", status::shares(status), status::SHARE_COLUMNS),
    ] {
        if !rows.is_empty() {
            status::section(&mut text, title, rows, columns);
        }
    }
    if text.is_empty() { text } else { format!("\n{text}") }
}

fn services_table(services: &[Value], width: Option<usize>) -> String {
    if services.is_empty() {
        return "no services\n".to_owned();
    }
    let rows: Vec<_> = services
        .iter()
        .map(|service| {
            let endpoints = list(&service["endpoints"]);
            let count = |health: &str| endpoints.iter().filter(|endpoint| endpoint["health"] == health).count();
            let counts = ["healthy", "unhealthy", "draining"].map(count).into_iter();
            let [name, protocol] = ["envoy_cluster", "protocol"].map(|key| cell(&service[key]));
            let mut row = vec![name, protocol];
            row.extend(counts.chain([list(&service["offloaded"]).len()]).map(|count| count.to_string()));
            // An external name has no endpoints: proxies resolve it.
            let addresses =
                service["external"].as_str().map_or_else(|| joined(&service["vips"]), |name| format!("-> {name}"));
            row.extend([addresses, joined(&service["clusters"])]);
            row
        })
        .collect();
    let columns = ["NAME", "PROTOCOL", "HEALTHY", "UNHEALTHY", "DRAINING", "OFFLOADED", "ADDRESSES", "CLUSTERS"];
    table::lines(&columns, &rows, "", width)
}

fn endpoints_table(services: &[Value], width: Option<usize>) -> String {
    let mut rows = Vec::new();
    for service in services {
        let name = cell(&service["envoy_cluster"]);
        if let Some(external) = service["external"].as_str() {
            let dash = || "-".to_owned();
            rows.push(vec![
                name.clone(),
                external.to_owned(),
                "external".to_owned(),
                dash(),
                dash(),
                dash(),
                joined(&service["clusters"]),
                "proxies resolve it".to_owned(),
            ]);
        }
        for endpoint in list(&service["endpoints"]) {
            let mut row = vec![name.clone()];
            row.extend(["address", "health", "region", "zone", "weight", "cluster"].map(|key| cell(&endpoint[key])));
            row.push(if endpoint["canary"] == true { "canary".to_owned() } else { "-".to_owned() });
            rows.push(row);
        }
        for endpoint in list(&service["offloaded"]) {
            let note = format!("revision {}", cell(&endpoint["revision"]));
            let [address, cluster] = ["address", "cluster"].map(|key| cell(&endpoint[key]));
            let dash = || "-".to_owned();
            rows.push(vec![name.clone(), address, "offloaded".to_owned(), dash(), dash(), dash(), cluster, note]);
        }
    }
    if rows.is_empty() {
        return "no endpoints\n".to_owned();
    }
    let columns = ["SERVICE", "ADDRESS", "STATE", "REGION", "ZONE", "WEIGHT", "CLUSTER", "NOTE"];
    table::lines(&columns, &rows, "", width)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Value {
        let endpoint = |address: &str, health: &str| {
            json!({
                "address": address, "health": health, "cluster": "east", "region": "eu", "zone": "", "weight": 1,
                "canary": false,
            })
        };
        json!({ "services": [
            { "envoy_cluster": "users.shop:80", "protocol": "http", "vips": ["10.96.0.1"], "clusters": ["east", "west"],
              "endpoints": [endpoint("10.1.0.1:80", "healthy"), endpoint("10.1.0.2:80", "draining")],
              "offloaded": [{ "address": "10.1.0.9:80", "revision": "x", "cluster": "west", "pod": "shop/users-x" }] },
            { "envoy_cluster": "users.default:80", "protocol": "grpc", "vips": [], "clusters": [], "endpoints": [],
              "offloaded": [] },
        ] })
    }

    fn words(text: &str) -> Vec<Vec<&str>> {
        text.lines().map(|line| line.split_whitespace().collect()).collect()
    }

    #[test]
    fn services_are_found_by_each_of_their_names() {
        let count = |name| find(&status(), name).map(|found| found.len()).unwrap_or_default();
        let names = [
            None,
            Some("users"),
            Some("users.shop"),
            Some("users.shop:80"),
            Some("users.shop:81"),
            Some("user"),
            Some("users.shop.svc:80"),
            Some("users.shop.svc.cluster.local"),
        ];
        assert_eq!(names.map(count), [2, 2, 1, 1, 0, 0, 1, 1]);
        let error = find(&status(), Some("shop")).unwrap_err().to_string();
        assert!(error.ends_with("there is users.shop:80"), "{error}");
        let error = find(&status(), Some("orders")).unwrap_err().to_string();
        assert!(error.contains("`culvert services` lists them"), "{error}");
    }

    #[test]
    fn tables_show_what_matters() {
        let services = find(&status(), None).unwrap();
        let text = services_table(&services, None);
        let rows = words(&text);
        assert_eq!(rows[1], ["users.shop:80", "http", "1", "0", "1", "1", "10.96.0.1", "east,west"]);
        assert_eq!(rows[2], ["users.default:80", "grpc", "0", "0", "0", "0", "-", "-"]);
        let text = endpoints_table(&services, None);
        let rows = words(&text);
        assert_eq!(rows[2], ["users.shop:80", "10.1.0.2:80", "draining", "eu", "-", "1", "east", "-"]);
        assert_eq!(rows[3], ["users.shop:80", "10.1.0.9:80", "offloaded", "-", "-", "-", "west", "revision", "x"]);
        assert_eq!(endpoints_table(&find(&status(), Some("users.default")).unwrap(), None), "no endpoints\n");
        assert!(services_table(&services, Some(60)).lines().all(|line| line.chars().count() <= 60));
    }
}
