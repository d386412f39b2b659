//! `culvert override list`: the offloaded revisions that discovery knows.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::terminal::time;
use crate::status::{self, cell, list};
use crate::{services, table};

/// Shown after the help.
pub const HELP: &str = "\
Examples:
  culvert override list
  culvert override list users                  of one service: name, name.namespace or name.namespace:port
  culvert override list --output json | jq -r '.[] | .service + \"=\" + .revision'

A line is a revision of a service in one cluster, with all its pods. `tunnel` as the cluster is a developer's machine
(`culvert override connect`). Name one of them in a request: `culvert override header --set SERVICE=REVISION`.";

/// The most reasons that are shown why nothing is listed.
const MOST_REASONS: usize = 10;

/// Flags of `culvert override list`.
#[derive(Debug, Args)]
pub struct ListFlags {
    /// A service: name, name.namespace or name.namespace:port
    #[arg(value_name = "SERVICE")]
    service: Option<String>,

    #[command(flatten)]
    from: status::Flags,
}

/// Runs the command; gives what is to be printed.
///
/// # Errors
/// When discovery cannot be asked, or has no such service.
pub fn run(flags: &ListFlags) -> anyhow::Result<String> {
    let status = flags.from.fetch()?;
    // Of a service that there is not, nothing could be offloaded.
    services::find(&status, flags.service.as_deref())?;
    let found = deployments(&status, flags.service.as_deref());
    let shown = || match found.is_empty() {
        true => nothing(&status, flags.service.as_deref()),
        false => {
            // Somebody else's branch is no sign that one's own is well.
            let reasons = flags.service.as_deref().map(|service| reasons(&status, Some(service))).unwrap_or_default();
            text(&found, table::terminal_width()) + &reasons
        }
    };
    Ok(flags.from.print(&Value::Array(found.clone()), shown))
}

/// A service's revision in a cluster.
#[derive(Debug, Default)]
struct Deployment {
    pods: Vec<String>,
    addresses: Vec<String>,
    since: Option<i64>,
}

fn deployments(status: &Value, service: Option<&str>) -> Vec<Value> {
    let mut found: BTreeMap<[String; 3], Deployment> = BTreeMap::new();
    for port in list(&status["services"]) {
        let name = cell(&port["envoy_cluster"]);
        if service.is_some_and(|wanted| !is_meant(wanted, &name)) {
            continue;
        }
        for endpoint in list(&port["offloaded"]) {
            let key = [name.clone(), cell(&endpoint["revision"]), cell(&endpoint["cluster"])];
            let deployment = found.entry(key).or_default();
            deployment.pods.push(cell(&endpoint["pod"]));
            deployment.addresses.push(cell(&endpoint["address"]));
            // A deployment is there since its first pod is.
            deployment.since = [deployment.since, endpoint["since"].as_i64()].into_iter().flatten().min();
        }
    }
    let deployment =
        |([service, revision, cluster], Deployment { pods, addresses, since }): ([String; 3], Deployment)| {
            let name = service.rsplit_once(':').map_or(&*service, |(name, _)| name).to_owned();
            json!({
                "service": name, "envoy_cluster": service, "revision": revision, "cluster": cluster, "pods": pods,
                "addresses": addresses, "since": since.map(time),
            })
        };
    found.into_iter().map(deployment).collect()
}

/// Whether a service's name (name, name.namespace or name.namespace:port) means the port of this name.
fn is_meant(wanted: &str, name: &str) -> bool {
    let full = full_name(name);
    [name, full, full.split_once('.').map_or(full, |(short, _)| short)].contains(&wanted)
}

/// The service's name in that of a port.
fn full_name(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(full, _)| full)
}

/// Whether what is wrong with a pod may be why it is not listed as a revision of a service: of those of its namespace only.
fn may_concern(warning: &str, name: &str) -> bool {
    let namespace = warning.strip_prefix("Pod ").and_then(|rest| rest.split_once('/')).map(|(namespace, _)| namespace);
    // One that clusters do not have together is `users.default.east`.
    let mut parts = full_name(name).split('.');
    let (service, of) = (parts.next().unwrap_or_default(), parts.next());
    let named = warning.split_once(" of Service ").and_then(|(_, rest)| rest.split(' ').next()?.split_once('/'));
    namespace.is_some() && namespace == of && named.is_none_or(|(_, named)| named == service)
}

/// What to do where nothing is listed; and what is wrong of all that may be the reason.
fn nothing(status: &Value, service: Option<&str>) -> String {
    let of = service.map(|name| format!(" of {name}")).unwrap_or_default();
    let mut text = format!(
        "nothing{of} is offloaded; a pod with the labels culvert.dev/offloaded: \"true\" and culvert.dev/revision: NAME is, once it is \
         ready, and so is what `culvert override connect` offers\n"
    );
    text.push_str(&reasons(status, service));
    text
}

/// What may keep pods from being listed, as revisions of any service or of one.
fn reasons(status: &Value, service: Option<&str>) -> String {
    let ports: Vec<_> = list(&status["services"]).iter().map(|port| cell(&port["envoy_cluster"])).collect();
    let concerns = |warning: &String| match service {
        Some(service) => ports.iter().any(|name| is_meant(service, name) && may_concern(warning, name)),
        None => warning.starts_with("Pod "),
    };
    let mut text = String::new();
    let warnings = list(&status["warnings"]).iter().map(cell).filter(concerns);
    let reasons: Vec<_> = status::unread(status).into_iter().chain(warnings).collect();
    if !reasons.is_empty() {
        text.push_str("what may keep one from being listed (`culvert status` has all problems):\n");
    }
    for reason in reasons.iter().take(MOST_REASONS) {
        text.push_str(&format!("  {reason}\n"));
    }
    if reasons.len() > MOST_REASONS {
        text.push_str(&format!("  and {} more\n", reasons.len() - MOST_REASONS));
    }
    text
}

fn text(found: &[Value], width: Option<usize>) -> String {
    let joined = |value: &Value| list(value).iter().map(cell).collect::<Vec<_>>().join(",");
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|deployment| {
            let mut row: Vec<_> = ["envoy_cluster", "revision", "cluster"].map(|key| cell(&deployment[key])).into();
            row.extend([joined(&deployment["pods"]), joined(&deployment["addresses"]), cell(&deployment["since"])]);
            row
        })
        .collect();
    table::lines(&["SERVICE", "REVISION", "CLUSTER", "PODS", "ADDRESSES", "SINCE"], &rows, "", width)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Value {
        let pod = |revision: &str, pod: &str, address: &str, cluster: &str, since: i64| json!({ "revision": revision, "pod": pod, "address": address, "cluster": cluster, "since": since });
        let users = [
            pod("x", "default/u2", "10.1.0.2:80", "east", 2000),
            pod("x", "default/u1", "10.1.0.1:80", "east", 1000),
            pod("x", "default/u3", "10.2.0.1:80", "west", 3000),
            pod("me", "tunnel/me", "10.9.0.1:19000", "tunnel", 4000),
        ];
        json!({ "services": [
            { "envoy_cluster": "users.default:80", "offloaded": users },
            { "envoy_cluster": "front.shop:80", "offloaded": [pod("y", "shop/f", "10.1.0.7:80", "east", 1)] },
            { "envoy_cluster": "echo.default:7", "offloaded": [] },
        ]})
    }

    #[test]
    fn pods_of_one_revision_and_cluster_are_one_line() {
        let found = deployments(&status(), None);
        assert_eq!(found.len(), 4);
        let expected = json!({
            "service": "users.default", "envoy_cluster": "users.default:80", "revision": "x", "cluster": "east",
            "pods": ["default/u2", "default/u1"], "addresses": ["10.1.0.2:80", "10.1.0.1:80"],
            "since": "1970-01-01T00:16:40Z",
        });
        assert_eq!(found[2], expected);
        let count = |name| deployments(&status(), Some(name)).len();
        assert_eq!(
            ["users", "users.default", "users.default:80", "front", "echo", "nobody"].map(count),
            [3, 3, 3, 1, 0, 0]
        );
    }

    #[test]
    fn the_table_says_what_to_do_when_there_is_nothing() {
        let shown = text(&deployments(&status(), None), None);
        let rows: Vec<Vec<_>> = shown.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["front.shop:80", "y", "east", "shop/f", "10.1.0.7:80", "1970-01-01T00:00:01Z"]);
        assert_eq!(rows[2][..3], ["users.default:80", "me", "tunnel"]);
        let text = nothing(&status(), Some("echo"));
        assert!(
            text.starts_with("nothing of echo is offloaded; a pod with the labels") && text.lines().count() == 1,
            "{text}"
        );
        let pods: Vec<_> =
            (0..11).map(|number| format!("Pod default/p{number} in cluster east has no container port")).collect();
        let mut status = json!({ "warnings": pods, "clusters": [
            { "name": "east", "read": true, "source": { "error": "Pods: 403 Forbidden" } },
            { "name": "west", "read": false, "source": {} },
        ]});
        status["warnings"].as_array_mut().unwrap().push("10.96.0.1:80 is the address of".into());
        let text = nothing(&status, None);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2], "  cluster east: Pods: 403 Forbidden; its last objects stay in force");
        assert_eq!(lines[3], "  cluster west: not all of it has been read yet; it is left out");
        assert_eq!(
            (lines[4], lines.last()),
            ("  Pod default/p0 in cluster east has no container port", Some(&"  and 3 more"))
        );
    }

    #[test]
    fn what_is_wrong_with_a_service_s_pods_is_told_beside_those_that_are_listed() {
        let mut status = status();
        status["warnings"] = json!([
            "Pod default/y in cluster east has no container port that port 80 of Service default/users names",
            "Pod default/e in cluster east has no container port that port 7 of Service default/echo names",
            "Pod default/z in cluster east is offloaded but has no label or annotation culvert.dev/revision: no request can reach it",
            "Pod shop/z in cluster east is offloaded but has no label or annotation culvert.dev/revision: no request can reach it",
            "Service default/users is something else",
        ]);
        let told = |service| {
            let text = reasons(&status, Some(service));
            text.lines().skip(1).map(|line| line.split(' ').nth(3).unwrap().to_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(told("users"), "default/y default/z");
        assert_eq!(told("echo.default:7"), "default/e default/z");
        assert_eq!(told("front.shop"), "shop/z");
        assert_eq!(told("nobody"), "");
    }
}
