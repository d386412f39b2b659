//! `culvert override doctor`: which services do not pass on what they are sent.
//!
//! A daemon counts the requests that leave enrolled pods, by the service that they go to and by the address that they come from, and by
//! what they carry, and reports that to discovery. Daemons that do not are asked themselves.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use clap::Args;
use culvert_discovery::overrides::contexts::{ContextStatus, ContextsStatus, Passed};
use culvert_discovery::overrides::tunnels::CLUSTER_OF_TUNNELS;
use culvert_xds_client::overrides::contexts::Carried;
use serde_json::Value;

use super::DecodeOutput;
use crate::{http, table};

/// What is printed below the flags.
pub const HELP: &str = "\
Examples:
  culvert override doctor                                                     what daemons have reported to discovery
  culvert override doctor --admin http://node-a:9901 --admin http://node-b:9901

The override filters have to have `watch_context` set. Daemons whose `load_stats_config` names discovery report to it what they count, and
if the name in --discovery has several addresses, as that of a headless Service has, all replicas are asked. Numbers are since
discovery was started; with --admin, since those daemons were. Name the daemons of all nodes then: what comes in to a service is counted where its
callers are, and what it sends where its own pods are. With fewer than 20 requests that came with overrides, no service is said to drop them.";

/// Flags of `culvert override doctor`.
#[derive(Debug, Args)]
pub struct DoctorFlags {
    /// Ask a daemon itself, at its admin interface, in the place of what was reported. May be repeated
    #[arg(long, value_name = "URL")]
    admin: Vec<String>,

    /// The status address of culvert-discovery (its --http), which knows whose addresses are whose
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY", default_value = "http://127.0.0.1:18001")]
    discovery: String,

    /// How to print it
    #[arg(long, default_value = "text")]
    output: DecodeOutput,
}

/// What the daemons have counted: to services by their clusters, and from addresses.
#[derive(Debug, Default)]
struct Counted {
    to: BTreeMap<String, Carried>,
    from: BTreeMap<String, Carried>,
}

/// Looks; gives what is to be printed.
pub fn run(flags: &DoctorFlags) -> anyhow::Result<String> {
    let found = if flags.admin.is_empty() { reported(&flags.discovery)? } else { asked(flags)? };
    Ok(match flags.output {
        DecodeOutput::Text => in_words(&found),
        DecodeOutput::Json => format!("{:#}\n", serde_json::to_value(&found)?),
    })
}

/// What proxies have reported to discovery, to all replicas together.
fn reported(discovery: &str) -> anyhow::Result<ContextsStatus> {
    let mut silent = Vec::new();
    let mut all = Vec::new();
    for (address, answer) in http::get_all(discovery, "/status")? {
        let answer = answer.and_then(|body| {
            let status: Value = serde_json::from_slice(&body)?;
            let contexts =
                status.get("contexts").context("it says nothing of contexts; is it older than this command?")?;
            Ok(serde_json::from_value::<ContextsStatus>(contexts.clone())?)
        });
        match answer {
            Ok(found) => all.push(found),
            Err(error) => silent.push(format!("{address}: {error:#}")),
        }
    }
    ensure!(
        !all.is_empty(),
        "no status from {discovery}; name culvert-discovery with --discovery: {}",
        silent.join("; ")
    );
    for replica in &silent {
        eprintln!("left out: {replica}");
    }
    Ok(together(all))
}

/// What all replicas were told: one of them may know what came to a service, and another one what its pods sent.
fn together(all: Vec<ContextsStatus>) -> ContextsStatus {
    let reports = all.iter().map(|one| one.reports).sum();
    let mut services: BTreeMap<String, Passed> = BTreeMap::new();
    for ContextStatus { service, passed, .. } in all.into_iter().flat_map(|one| one.services) {
        let sum = services.entry(service).or_default();
        sum.came += passed.came;
        sum.went += passed.went;
    }
    let services = services.into_iter().filter(|(_, passed)| passed.came.overrides > 0);
    let services = services.map(|(service, passed)| ContextStatus::new(service, passed));
    ContextsStatus { reports, services: services.collect() }
}

/// What these daemons say themselves.
fn asked(flags: &DoctorFlags) -> anyhow::Result<ContextsStatus> {
    let mut counted = Counted::default();
    let mut silent = Vec::new();
    for admin in &flags.admin {
        match http::get(admin, "/stats?filter=%5Eoverride_context%5C.") {
            Ok(stats) => counted.read(&String::from_utf8_lossy(&stats)),
            Err(error) => silent.push(format!("{admin}: {error:#}")),
        }
    }
    ensure!(silent.len() < flags.admin.len(), "{}", silent.join("; "));
    // The others' numbers are worth having all the same.
    for daemon in &silent {
        eprintln!("left out: {daemon}");
    }
    let status = http::get(&flags.discovery, "/status")
        .with_context(|| format!("no status from {}; name culvert-discovery with --discovery", flags.discovery))?;
    let status: Value = serde_json::from_slice(&status).context("the status of culvert-discovery")?;
    Ok(findings(&counted, &status))
}

impl Counted {
    /// Adds what one daemon's `/stats` says.
    fn read(&mut self, stats: &str) {
        for line in stats.lines() {
            let Some((name, number)) = line.split_once(": ") else { continue };
            let Some((side, rest)) = name.strip_prefix("override_context.").and_then(|it| it.split_once('.')) else {
                continue;
            };
            let (Some((who, leaf)), Ok(number)) = (rest.rsplit_once('.'), number.trim().parse::<u64>()) else {
                continue;
            };
            let side = match side {
                "to" => &mut self.to,
                "from" => &mut self.from,
                _ => continue,
            };
            let carried = side.entry(who.to_owned()).or_default();
            match leaf {
                "overrides" => carried.overrides += number,
                "trace_only" => carried.trace_only += number,
                "nothing" => carried.nothing += number,
                _ => {}
            }
        }
    }
}

/// As stats write what has colons.
fn in_stats(text: &str) -> String {
    text.replace(':', "_")
}

/// The address without its port and brackets.
fn address_of(endpoint: &Value) -> Option<&str> {
    let (address, _) = endpoint["address"].as_str()?.rsplit_once(':')?;
    Some(address.trim_matches(['[', ']']))
}

/// What is known of the services that requests with overrides came to.
fn findings(counted: &Counted, status: &Value) -> ContextsStatus {
    let mut services: BTreeMap<&str, (Carried, BTreeSet<&str>)> = BTreeMap::new();
    for port in status["services"].as_array().into_iter().flatten() {
        let (Some(service), Some(cluster)) = (port["service"].as_str(), port["envoy_cluster"].as_str()) else {
            continue;
        };
        let (came, addresses) = services.entry(service).or_default();
        *came += counted.to.get(&in_stats(cluster)).copied().unwrap_or_default();
        let listed = ["endpoints", "offloaded"].into_iter().flat_map(|key| port[key].as_array().into_iter().flatten());
        // What comes from the address of a tunnel comes from discovery.
        let listed = listed.filter(|endpoint| endpoint["cluster"] != CLUSTER_OF_TUNNELS);
        addresses.extend(listed.filter_map(address_of));
    }
    let finding = |(service, (came, addresses)): (&str, (Carried, BTreeSet<&str>))| {
        let mut went = Carried::default();
        for address in addresses {
            went += counted.from.get(&in_stats(address)).copied().unwrap_or_default();
        }
        ContextStatus::new(service.to_owned(), Passed { came, went })
    };
    let services = services.into_iter().filter(|(_, (came, _))| came.overrides > 0).map(finding).collect();
    // Each daemon that answered counts as a report.
    ContextsStatus { reports: 1, services }
}

fn in_words(found: &ContextsStatus) -> String {
    if found.reports == 0 {
        return "no daemon has reported to discovery what requests carry: their `load_stats_config` has to name it, and their override \
                filters to have watch_context set; or name daemons with --admin\n"
            .to_owned();
    }
    if found.services.is_empty() {
        return "no request with overrides has been seen on its way to a service that discovery knows; do the override filters \
                have watch_context set?\n"
            .to_owned();
    }
    let heading = ["SERVICE", "CAME WITH", "OF", "WENT WITH", "TRACE ONLY", "OF", "IT"];
    let rows = found.services.iter().map(|it| {
        let number = |number: u64| number.to_string();
        let Passed { came, went } = it.passed;
        vec![
            it.service.clone(),
            number(came.overrides),
            number(came.total()),
            number(went.overrides),
            number(went.trace_only),
            number(went.total()),
            it.verdict.clone(),
        ]
    });
    table::lines(&heading, &rows.collect::<Vec<_>>(), "", table::terminal_width())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status() -> Value {
        let port = |name: &str, address: &str| {
            json!({
                "service": format!("{name}.default"),
                "envoy_cluster": format!("{name}.default:80"),
                "endpoints": [{ "address": address }],
                "offloaded": [{ "address": "10.0.0.99:19000", "cluster": "tunnel" }],
            })
        };
        json!({ "services": [
            port("front", "10.0.0.1:8080"), port("users", "10.0.0.2:8080"), port("orders", "[fd00::3]:8080"),
            port("quiet", "10.0.0.4:8080"), port("leaf", "10.0.0.5:8080"),
        ] })
    }

    #[test]
    fn who_drops_is_found_over_several_daemons() {
        let mut counted = Counted::default();
        counted.read(
            "override_context.to.front.default_80.overrides: 3\noverride_context.to.front.default_80.nothing: 7\n\
             override_context.from.10.0.0.1.overrides: 2\noverride_context.from.10.0.0.1.trace_only: 5\n\
             override_context.to.users.default_80.overrides: 20\noverride_context.from.10.0.0.2.trace_only: 4\n\
             override_context.to.quiet.default_80.nothing: 9\n",
        );
        counted.read(
            "override_context.from.fd00__3.nothing: 6\noverride_context.to.orders.default_80.overrides: 1\n\
             override_context.from.10.0.0.1.overrides: 1\noverride_context.to.leaf.default_80.overrides: 1\n\
             override_context.from.10.0.0.99.nothing: 5\noverride_context.to.other.overrides: 1\nhttp.x.override.applied: 4\nnonsense\n",
        );
        let found = findings(&counted, &status());
        let verdicts: Vec<_> = found.services.iter().map(|it| (&*it.service, &*it.verdict, it.drops)).collect();
        let expected = [
            ("front.default", "passes on what came so far", false),
            ("leaf.default", "calls nobody that is seen", false),
            ("orders.default", "passed on none so far; too few have come to say more", false),
            ("users.default", "DROPS them: it passes on trace headers, but not their baggage", true),
        ];
        assert_eq!(verdicts, expected);
        assert_eq!(found.services[0].passed.went, Carried { overrides: 3, trace_only: 5, nothing: 0 });
        assert!(in_words(&found).lines().nth(1).unwrap().starts_with("front.default"));
    }

    #[test]
    fn replicas_know_halves() {
        let carried = |overrides| Carried { overrides, ..Carried::default() };
        let one = |came, went| ContextsStatus {
            reports: 1,
            services: vec![ContextStatus::new("users.default".to_owned(), Passed { came, went })],
        };
        let found = together(vec![one(carried(30), carried(0)), one(carried(0), carried(30))]);
        assert_eq!(found.reports, 2);
        assert_eq!(found.services[0].verdict, "passes them on");
        assert_eq!(together(vec![one(carried(0), carried(30))]).services, []);
    }
}
