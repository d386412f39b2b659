//! `culvert override doctor`: which services do not pass on what they are sent.
//!
//! A daemon counts the requests that leave enrolled pods, by the service that they go to and by the address that they come from, and by
//! what they carry. What comes in to a service is told by the daemons of those who call it, what goes out by the daemons of its
//! own pods. Nobody knows which request was made because of which: these are shares.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};

use super::DecodeOutput;
use crate::{http, table};

/// What is printed below the flags.
pub const HELP: &str = "\
Examples:
  culvert override doctor --admin http://node-a:9901 --admin http://node-b:9901

Name the daemons of all nodes: what comes in to a service is counted where its callers are, and what it sends where its own pods
are. Numbers are since the daemons started; with fewer than 20 requests that came with overrides, nothing is said of shares. The override filters have to have `watch_context` set.";

/// So many requests have to have come in before shares are compared.
const ENOUGH: u64 = 20;

/// Flags of `culvert override doctor`.
#[derive(Debug, Args)]
pub struct DoctorFlags {
    /// The admin interface of a daemon. May be repeated
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:9901")]
    admin: Vec<String>,

    /// The status address of culvert-discovery (its --http), which knows whose addresses are whose
    #[arg(long, value_name = "URL", env = "CULVERT_DISCOVERY", default_value = "http://127.0.0.1:18001")]
    discovery: String,

    /// How to print it
    #[arg(long, default_value = "text")]
    output: DecodeOutput,
}

/// Requests, by what they carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Carried {
    overrides: u64,
    trace_only: u64,
    nothing: u64,
}

impl Carried {
    fn total(self) -> u64 {
        self.overrides + self.trace_only + self.nothing
    }

    fn add(&mut self, other: Carried) {
        self.overrides += other.overrides;
        self.trace_only += other.trace_only;
        self.nothing += other.nothing;
    }
}

/// What the daemons have counted: to services by their clusters, and from addresses.
#[derive(Debug, Default)]
struct Counted {
    to: BTreeMap<String, Carried>,
    from: BTreeMap<String, Carried>,
}

/// What is known of one service.
#[derive(Debug)]
struct Finding {
    service: String,
    came: Carried,
    went: Carried,
}

/// Looks; gives what is to be printed.
pub fn run(flags: &DoctorFlags) -> anyhow::Result<String> {
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
    let findings = findings(&counted, &status);
    Ok(match flags.output {
        DecodeOutput::Text => in_words(&findings),
        DecodeOutput::Json => format!("{:#}\n", as_json(&findings)),
    })
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
fn findings(counted: &Counted, status: &Value) -> Vec<Finding> {
    let mut services: BTreeMap<&str, (Carried, BTreeSet<&str>)> = BTreeMap::new();
    for port in status["services"].as_array().into_iter().flatten() {
        let (Some(service), Some(cluster)) = (port["service"].as_str(), port["envoy_cluster"].as_str()) else {
            continue;
        };
        let (came, addresses) = services.entry(service).or_default();
        came.add(counted.to.get(&in_stats(cluster)).copied().unwrap_or_default());
        let listed = ["endpoints", "offloaded"].into_iter().flat_map(|key| port[key].as_array().into_iter().flatten());
        addresses.extend(listed.filter_map(address_of));
    }
    let finding = |(service, (came, addresses)): (&str, (Carried, BTreeSet<&str>))| {
        let mut went = Carried::default();
        for address in addresses {
            went.add(counted.from.get(&in_stats(address)).copied().unwrap_or_default());
        }
        Finding { service: service.to_owned(), came, went }
    };
    services.into_iter().filter(|(_, (came, _))| came.overrides > 0).map(finding).collect()
}

impl Finding {
    /// What that means, in words; and whether the service drops what it is sent.
    fn verdict(&self) -> (&'static str, bool) {
        let Finding { came, went, .. } = self;
        if went.total() == 0 {
            return ("calls nobody that is seen", false);
        }
        if went.overrides == 0 && went.trace_only > 0 {
            return ("DROPS them: it passes on trace headers, but not their baggage", true);
        }
        if went.overrides == 0 {
            return ("DROPS them", true);
        }
        // The share that goes out is less than half of the share that comes in.
        let (out_share, in_share) = (
            u128::from(went.overrides) * u128::from(came.total()),
            u128::from(came.overrides) * u128::from(went.total()),
        );
        let less = 2 * out_share < in_share;
        match (came.overrides >= ENOUGH, less) {
            (true, true) => ("passes on some, and may drop others", true),
            (true, false) => ("passes them on", false),
            (false, true) => ("passes on some; too few have come to say more", false),
            (false, false) => ("passes on what came so far", false),
        }
    }
}

fn in_words(findings: &[Finding]) -> String {
    if findings.is_empty() {
        return "no request with overrides has been seen on its way to a service that discovery knows; do the override filters \
                have watch_context set?\n"
            .to_owned();
    }
    let heading = ["SERVICE", "CAME WITH", "OF", "WENT WITH", "TRACE ONLY", "OF", "IT"];
    let rows = findings.iter().map(|finding| {
        let number = |number: u64| number.to_string();
        let Finding { service, came, went } = finding;
        vec![
            service.clone(),
            number(came.overrides),
            number(came.total()),
            number(went.overrides),
            number(went.trace_only),
            number(went.total()),
            finding.verdict().0.to_owned(),
        ]
    });
    table::lines(&heading, &rows.collect::<Vec<_>>(), "", table::terminal_width())
}

fn as_json(findings: &[Finding]) -> Value {
    let carried =
        |it: Carried| json!({ "overrides": it.overrides, "trace_only": it.trace_only, "nothing": it.nothing });
    let services = findings.iter().map(|finding| {
        let (verdict, drops) = finding.verdict();
        json!({
            "service": finding.service,
            "came": carried(finding.came),
            "went": carried(finding.went),
            "drops": drops,
            "verdict": verdict,
        })
    });
    json!({ "services": services.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Value {
        let port = |name: &str, address: &str| {
            json!({
                "service": format!("{name}.default"),
                "envoy_cluster": format!("{name}.default:80"),
                "endpoints": [{ "address": address }],
                "offloaded": [],
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
             override_context.to.users.default_80.overrides: 2\noverride_context.from.10.0.0.2.trace_only: 4\n\
             override_context.to.quiet.default_80.nothing: 9\n",
        );
        counted.read(
            "override_context.from.fd00__3.nothing: 6\noverride_context.to.orders.default_80.overrides: 1\n\
             override_context.from.10.0.0.1.overrides: 1\noverride_context.to.leaf.default_80.overrides: 1\n\
             override_context.to.other.overrides: 1\nhttp.x.override.applied: 4\nnonsense\n",
        );
        let found = findings(&counted, &status());
        let verdicts: Vec<_> = found.iter().map(|it| (&*it.service, it.verdict())).collect();
        let expected = [
            ("front.default", ("passes on what came so far", false)),
            ("leaf.default", ("calls nobody that is seen", false)),
            ("orders.default", ("DROPS them", true)),
            ("users.default", ("DROPS them: it passes on trace headers, but not their baggage", true)),
        ];
        assert_eq!(verdicts, expected);
        assert_eq!(found[0].went, Carried { overrides: 3, trace_only: 5, nothing: 0 });
        assert!(in_words(&found).lines().nth(1).unwrap().starts_with("front.default"));
    }

    #[test]
    fn shares_are_compared_where_there_are_enough() {
        let finding = |came, went| Finding { service: String::new(), came, went };
        let carried = |overrides, nothing| Carried { overrides, trace_only: 0, nothing };
        assert!(!finding(carried(19, 0), carried(1, 99)).verdict().1);
        assert!(finding(carried(20, 0), carried(1, 99)).verdict().1);
        assert!(!finding(carried(20, 80), carried(11, 89)).verdict().1);
        let few = finding(carried(14, 0), Carried { overrides: 3, trace_only: 6, nothing: 0 });
        assert_eq!(few.verdict(), ("passes on some; too few have come to say more", false));
    }
}
