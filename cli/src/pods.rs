//! `culvert status`: with `--node`, what a node's daemon knows of its pods; else what discovery knows.

use anyhow::Context;
use clap::Args;
use serde_json::Value;

use crate::{http, status, table};

/// Flags of `culvert status`.
#[derive(Debug, Args)]
pub struct StatusFlags {
    /// Show the pods of a node instead, as its daemon knows them: the admin address of culvertd
    #[arg(long, value_name = "URL", num_args = 0..=1, default_missing_value = "http://127.0.0.1:9901")]
    node: Option<String>,

    #[command(flatten)]
    discovery: status::Flags,
}

/// Fetches and formats the status.
///
/// # Errors
/// When discovery, or the daemon, cannot be asked.
pub fn run(flags: &StatusFlags) -> anyhow::Result<String> {
    let Some(node) = &flags.node else { return status::run(&flags.discovery) };
    let body = http::get(node, "/interception/pods").with_context(|| {
        format!("no pods from {node}; is culvertd running there, with the extension culvert.bootstrap.interception?")
    })?;
    let pods: Value =
        serde_json::from_slice(&body).with_context(|| format!("{node} is not the admin interface of culvertd"))?;
    Ok(flags.discovery.print(&pods, || text(&pods)))
}

/// A node's pods, and why it is not ready.
fn text(status: &Value) -> String {
    let row = |pod: &Value| {
        let state = if pod["enrolled"] == true { "enrolled" } else { "not enrolled" };
        let addresses: Vec<String> = list(&pod["addresses"]).iter().map(cell).collect();
        let mut row = vec![cell(&pod["name"]), addresses.join(","), state.to_owned()];
        row.extend(["since", "direction", "failure_policy", "acceleration", "origin"].map(|key| cell(&pod[key])));
        row.extend(["outbound_connections", "inbound_connections", "bytes_sent"].map(|key| cell(&pod[key])));
        row.extend(["bytes_received", "reason"].map(|key| cell(&pod[key])));
        row
    };
    let columns = [
        "NAME",
        "ADDRESSES",
        "STATE",
        "SINCE",
        "DIRECTION",
        "FAILS",
        "PAST TCP",
        "BY",
        "OUTBOUND",
        "INBOUND",
        "SENT",
        "RECEIVED",
        "REASON",
    ];
    let rows: Vec<Vec<String>> = list(&status["pods"]).iter().map(row).collect();
    let mut text = match rows.as_slice() {
        [] => "no pods are known\n".to_owned(),
        rows => table::lines(&columns, rows, "", table::terminal_width()),
    };
    let cgroups = list(&status["cgroups"]);
    if !cgroups.is_empty() {
        let row = |cgroup: &Value| {
            let state = if cgroup["attached"] == true { "enrolled" } else { "not there" };
            let role = if cgroup["role"] == "host" { "host mode" } else { "balanced" };
            let by = if cgroup["by_command"] == true { "command" } else { "bootstrap" };
            vec![cell(&cgroup["cgroup"]), state.to_owned(), role.to_owned(), by.to_owned()]
        };
        let rows: Vec<Vec<String>> = cgroups.iter().map(row).collect();
        text.push('\n');
        text.push_str(&table::lines(&["CGROUP", "STATE", "HAS", "BY"], &rows, "", table::terminal_width()));
    }
    let acceleration = &status["acceleration"];
    if acceleration["available"] == false {
        let (number, reason) = (cell(&acceleration["reason_number"]), cell(&acceleration["reason"]));
        text.push_str(&format!("\nPAST TCP: off, reason {number}: {reason}\n"));
    }
    for listener in list(&acceleration["listeners"]).iter().filter(|_| acceleration["available"] == true) {
        let [name, level, configured, said] =
            ["name", "in_force", "configured", "run_time"].map(|key| cell(&listener[key]));
        text.push_str(&format!(
            "\nPAST TCP: listener {name}: at most {level} (configured {configured}, at run time {said})"
        ));
    }
    if acceleration["available"] == true {
        let [pods, automatic] = ["pods", "automatic"].map(|key| cell(&acceleration[key]));
        text.push_str(&format!("\nPAST TCP: pods of which nothing is said: {pods}; automatic is {automatic} here\n"));
    }
    let faults = list(&status["not_ready"]);
    if !faults.is_empty() {
        text.push_str("\nNOT READY\n");
        faults.iter().for_each(|fault| text.push_str(&format!("  {}\n", cell(fault))));
    }
    text
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

/// A value as the text of a cell; what is empty or missing is a dash.
fn cell(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() => text.clone(),
        Value::Number(number) => number.to_string(),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn listeners_say_how_far_payload_goes() {
        let listener = json!({"name": "outbound", "configured": "joined", "run_time": "off", "in_force": "off"});
        let status = json!({"pods": [], "acceleration": {"available": true, "listeners": [listener],
            "pods": "automatic", "automatic": "shortcut"}});
        let expected = "PAST TCP: listener outbound: at most off (configured joined, at run time off)
PAST TCP: pods of which nothing is said: automatic; automatic is shortcut here\n";
        assert!(text(&status).ends_with(expected), "{}", text(&status));
    }

    #[test]
    fn cgroups_say_what_they_have() {
        let cgroup = |path: &str, role: &str, attached: bool, by_command: bool| json!({"cgroup": path, "role": role, "attached": attached, "by_command": by_command});
        let cgroups =
            [cgroup("/sys/fs/cgroup/a", "host", false, true), cgroup("/sys/fs/cgroup/b", "balance", true, false)];
        let text = text(&json!({"pods": [], "cgroups": cgroups}));
        let words = |path: &str| {
            let line = text.lines().find(|line| line.starts_with(path)).unwrap_or_else(|| panic!("{text}"));
            line[path.len()..].split_whitespace().collect::<Vec<_>>().join(" ")
        };
        assert_eq!(words("/sys/fs/cgroup/a"), "not there host mode command");
        assert_eq!(words("/sys/fs/cgroup/b"), "enrolled balanced bootstrap");
    }

    #[test]
    fn pods_say_why_they_are_not_enrolled() {
        let status = json!({
            "pods": [
                {"name": "shop/web", "origin": "manifest", "addresses": ["10.0.0.1", "fd00::1"], "enrolled": true,
                 "since": "2026-01-01T00:00:00.000Z", "reason": null, "direction": "both", "failure_policy": "open",
                 "acceleration": "joined", "outbound_connections": 7, "inbound_connections": 0, "bytes_sent": 512, "bytes_received": 9},
                {"name": "shop/db", "origin": "manifest", "addresses": ["10.0.0.2"], "reason": "no interface"},
            ],
            "not_ready": ["pod shop/db (10.0.0.2): no interface"],
            "acceleration": {"available": false, "reason_number": 2, "reason": "kernel 6.1.1 has known sockmap bugs"},
        });
        let text = text(&status);
        let web = text.lines().find(|line| line.contains("shop/web")).unwrap();
        let words: Vec<_> = web.split_whitespace().collect();
        assert_eq!(words[1..4], ["10.0.0.1,fd00::1", "enrolled", "2026-01-01T00:00:00.000Z"]);
        assert_eq!(words[4..], ["both", "open", "joined", "manifest", "7", "0", "512", "9", "-"]);
        let db = text.lines().find(|line| line.starts_with("shop/db")).unwrap();
        assert!(db.contains("not enrolled") && db.ends_with("no interface"), "{db}");
        assert!(text.contains("PAST TCP: off, reason 2: kernel 6.1.1 has known sockmap bugs\n"), "{text}");
        assert!(text.ends_with("NOT READY\n  pod shop/db (10.0.0.2): no interface\n"), "{text}");
    }
}
