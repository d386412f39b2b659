//! Aggregate clusters, of culvertd and of the real Envoy on the same bootstrap: requests and connections meet the same hosts, whatever
//! becomes of the members, and what is counted is counted for the same cluster.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::{server, wait_until};

const DEADLINE: Duration = Duration::from_secs(30);

/// A host that says its name; requests tell in `x-fail` which hosts answer them with 503, and in `x-hang` which do not.
fn host(name: &'static str) -> Result<u16> {
    server::start(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone()?);
        while let Some(request) = Request::read(&mut reader)? {
            let names = |header: &str| request.headers.get(header).is_some_and(|names| names.contains(name));
            if names("x-hang") {
                // Until the proxy gives it up.
                stream.read_to_end(&mut Vec::new())?;
                break;
            }
            let status = if names("x-fail") { 503 } else { 200 };
            Response::new(status, "text/plain", name.into()).write(&mut stream, false)?;
        }
        Ok(())
    })
}

fn aggregate(members: &str) -> String {
    format!(
        "{{name: envoy.clusters.aggregate, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.clusters.aggregate.v3.ClusterConfig, clusters: [{members}]}}}}"
    )
}

const PROVIDED: &str = "lb_policy: CLUSTER_PROVIDED";

fn endpoint(port: u16, health: &str) -> String {
    format!(
        "{{health_status: {health}, endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"
    )
}

/// An assignment of hosts by priority.
fn assignment(name: &str, priorities: &[&[String]]) -> String {
    let group = |(priority, hosts): (usize, &&[String])| {
        format!("{{priority: {priority}, lb_endpoints: [{}]}}", hosts.join(", "))
    };
    let groups: Vec<_> = priorities.iter().enumerate().map(group).collect();
    format!("{{cluster_name: {name}, endpoints: [{}]}}", groups.join(", "))
}

/// What is counted for a route's cluster, and what for the member that serves.
const COUNTED: [&str; 22] = [
    "upstream_rq_total",
    "upstream_rq_completed",
    "upstream_rq_2xx",
    "upstream_rq_5xx",
    "external.upstream_rq_503",
    "retry.upstream_rq_503",
    "upstream_rq_retry",
    "upstream_rq_retry_success",
    "upstream_rq_retry_limit_exceeded",
    "upstream_rq_retry_overflow",
    "upstream_rq_retry_backoff_exponential",
    "upstream_rq_timeout",
    "upstream_rq_per_try_timeout",
    "upstream_rq_maintenance_mode",
    "upstream_rq_pending_overflow",
    "upstream_rq_pending_failure_eject",
    "upstream_cx_none_healthy",
    "upstream_cx_overflow",
    "upstream_cx_total",
    "upstream_cx_connect_fail",
    "membership_total",
    "lb_healthy_panic",
];

type Met = BTreeMap<String, String>;

/// What requests and connections meet, and what is counted of them.
fn meets(kind: Kind, hosts: [u16; 3]) -> Result<Met> {
    let [one, two, three] = hosts;
    let (http, tcp, dead) = (free_port()?, free_port()?, free_port()?);
    let previous = "retry_policy: {retry_on: 5xx, num_retries: 3, retry_priority: {name: p, typed_config: {\"@type\": \
                    type.googleapis.com/envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig, \
                    update_frequency: 1}}}";
    let routes = format!(
        "
- name: all
  domains: ['*']
  routes:
  - {{match: {{prefix: /previous}}, route: {{cluster: all, {previous}}}}}
  - {{match: {{prefix: /retry}}, route: {{cluster: all, retry_policy: {{retry_on: 5xx, num_retries: 2}}}}}}
  - {{match: {{prefix: /no_retry}}, route: {{cluster: no_retries, retry_policy: {{retry_on: 5xx}}}}}}
  - {{match: {{prefix: /slow}}, route: {{cluster: all, timeout: 0.3s}}}}
  - {{match: {{prefix: /try}}, route: {{cluster: all, retry_policy: {{retry_on: 5xx, num_retries: 1, per_try_timeout: 0.3s}}}}}}
  - {{match: {{prefix: /maintained}}, route: {{cluster: maintained}}}}
  - {{match: {{prefix: /}}, route: {{cluster_header: x-to}}}}"
    );
    let group = |name: &str, priorities: &[&[String]]| format!("load_assignment: {}", assignment(name, priorities));
    let well = |port| endpoint(port, "HEALTHY");
    let ill = |port| endpoint(port, "UNHEALTHY");
    let none = "circuit_breakers: {thresholds: [{max_requests: 0, max_connections: 0, max_pending_requests: 0}]}";
    let mut bootstrap = Bootstrap::new().http(http, &routes, &[]).tcp(tcp, "all");
    for (name, members, more) in [
        ("all", "a, unknown, b", ""),
        ("no_retries", "a", "circuit_breakers: {thresholds: [{max_retries: 0}]}"),
        ("nested", "all, b", ""),
        ("only_nested", "all", ""),
        ("cycle", "cycle, other_cycle, b", ""),
        ("other_cycle", "cycle", ""),
        ("nothing", "unknown, empty", ""),
        ("to_dead", "dead", ""),
        ("narrow", "a", none),
        ("full", "full_member", ""),
        ("spilled", "ill, b", ""),
        ("all_ill", "ill", ""),
        ("calm", "calm_member", ""),
        ("degraded", "degraded_member, ill", ""),
        ("maintained", "a", ""),
    ] {
        let members = format!("cluster_type: {}", aggregate(members));
        bootstrap = bootstrap.cluster_of(name, &[PROVIDED, &members, more]);
    }
    let calm = "common_lb_config: {healthy_panic_threshold: {value: 0}}";
    for (name, priorities, more) in [
        ("a", &[&[well(one)][..], &[], &[well(three)]][..], ""),
        ("b", &[&[well(two)]], ""),
        ("empty", &[], ""),
        ("dead", &[&[well(dead)]], ""),
        ("full_member", &[&[well(two)]], none),
        ("ill", &[&[ill(one)]], ""),
        ("calm_member", &[&[ill(three)]], calm),
        ("degraded_member", &[&[endpoint(three, "DEGRADED")]], ""),
    ] {
        bootstrap = bootstrap.cluster_of(name, &["connect_timeout: 1s", &group(name, priorities), more]);
    }
    let runtime = "layered_runtime: {layers: [{name: s, static_layer: {upstream.maintenance_mode.maintained: 100}}]}\n";
    let daemon = Daemon::start(kind, &format!("{runtime}{}", bootstrap.yaml()))?;
    let mut met = Met::new();
    let mut get = |what: &str, request: Request| -> Result<()> {
        let response = fetch(http, request)?;
        let overloaded = response.headers.get("x-envoy-overloaded").unwrap_or_default();
        met.insert(what.to_owned(), format!("{} {} {overloaded}", response.status, response.text()));
        Ok(())
    };
    for name in [
        "all",
        "nested",
        "only_nested",
        "cycle",
        "other_cycle",
        "nothing",
        "to_dead",
        "narrow",
        "full",
        "spilled",
        "all_ill",
        "degraded",
        "calm",
    ] {
        get(name, Request::get("/").header("x-to", name))?;
    }
    get("once", Request::get("/previous").header("x-fail", "one"))?;
    get("twice", Request::get("/previous").header("x-fail", "one, three"))?;
    get("always", Request::get("/previous").header("x-fail", "one, two, three"))?;
    get("same", Request::get("/retry").header("x-fail", "one"))?;
    get("no retries", Request::get("/no_retry").header("x-fail", "one"))?;
    get("timeout", Request::get("/slow").header("x-hang", "one"))?;
    get("try timeout", Request::get("/try").header("x-hang", "one"))?;
    get("maintained", Request::get("/maintained"))?;
    let stats = daemon.stats()?;
    for cluster in
        ["all", "a", "b", "to_dead", "dead", "nothing", "full", "full_member", "no_retries", "maintained", "spilled"]
    {
        for name in COUNTED {
            let name = format!("cluster.{cluster}.{name}");
            met.insert(name.clone(), stats.get(&name).to_string());
        }
    }
    let mut stream = TcpStream::connect(("127.0.0.1", tcp))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")?;
    met.insert("tcp".to_owned(), Response::read(&mut BufReader::new(stream), "GET")?.text());
    let after = daemon.stats()?;
    for name in ["cluster.a.upstream_cx_total", "cluster.all.upstream_cx_total"] {
        met.insert(format!("{name} by TCP"), (after.get(name) - stats.get(name)).to_string());
    }
    Ok(met)
}

#[test]
fn requests_meet_the_members_that_they_meet_in_envoy() -> Result<()> {
    let hosts = [host("one")?, host("two")?, host("three")?];
    let (theirs, ours) = (meets(Kind::Envoy, hosts)?, meets(Kind::Culvert, hosts)?);
    let different: Vec<_> = theirs.iter().filter(|(what, met)| ours[*what] != **met).collect();
    let different: Vec<_> =
        different.into_iter().map(|(what, met)| format!("{what}: Envoy {met:?}, Culvert {:?}", ours[what])).collect();
    ensure!(different.is_empty(), "{}", different.join("\n"));
    // So that they do not agree on nothing.
    for (what, expected) in [("all", "200 one "), ("once", "200 three "), ("twice", "200 two "), ("tcp", "one")] {
        assert_eq!(theirs[what], expected, "{what}");
    }
    Ok(())
}

/// Replaces a file in one step.
fn replace(path: &Path, text: &str) -> Result<()> {
    let aside = path.with_extension("new");
    fs::write(&aside, text)?;
    fs::rename(aside, path)?;
    Ok(())
}

#[test]
fn members_come_and_go_as_in_envoy() -> Result<()> {
    let hosts = [host("one")?, host("two")?, host("three")?];
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (dir, port) = (scratch_dir()?, free_port()?);
        let (clusters, endpoints) = (dir.join("clusters.yaml"), dir.join("endpoints.yaml"));
        let say_endpoints = |ports: &[u16]| {
            let hosts: Vec<_> = ports.iter().map(|port| endpoint(*port, "HEALTHY")).collect();
            let type_url = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
            let assignment = assignment("a", &[&hosts]);
            replace(&endpoints, &format!("resources: [{{\"@type\": {type_url}, {}]\n", &assignment[1..]))
        };
        let say_clusters = |all: &[&str]| {
            let type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
            let one = |fields: &&str| format!("- {{\"@type\": {type_url}, connect_timeout: 1s, {fields}}}\n");
            replace(&clusters, &format!("resources:\n{}", all.iter().map(one).collect::<String>()))
        };
        let a = format!(
            "name: a, type: EDS, eds_cluster_config: {{eds_config: {{path_config_source: {{path: {}}}, resource_api_version: V3}}}}",
            endpoints.display()
        );
        let static_of =
            |port| format!("name: b, load_assignment: {}", assignment("b", &[&[endpoint(port, "HEALTHY")]]));
        let (b, other_b) = (static_of(hosts[1]), static_of(hosts[2]));
        let all = |members: &str| format!("name: all, {PROVIDED}, cluster_type: {}", aggregate(members));
        let (a_b, b_a) = (all("a, b"), all("b, a"));
        say_endpoints(&hosts[..1])?;
        say_clusters(&[&a_b])?;
        let routes = "- {name: all, domains: ['*'], routes: [{match: {prefix: /}, route: {cluster_header: x-to}}]}";
        let bootstrap = Bootstrap::new().http(port, routes, &[]).yaml();
        let source = format!("path_config_source: {{path: {}}}, resource_api_version: V3", clusters.display());
        let head = format!("node: {{id: node-1, cluster: test}}\ndynamic_resources: {{cds_config: {{{source}}}}}\n");
        let _daemon = Daemon::start(kind, &format!("{head}{bootstrap}"))?;
        let meets = |expected: &str| {
            wait_until(DEADLINE, &format!("{kind:?} to meet {expected}"), || {
                let response = fetch(port, Request::get("/").header("x-to", "all"))?;
                let text = response.text();
                let met = if response.status == 200 { &text } else { "nobody" };
                ensure!(met == expected, "{met}");
                Ok(())
            })
        };
        meets("nobody")?;
        say_clusters(&[&a_b, &b])?;
        meets("two")?;
        say_clusters(&[&a_b, &b, &a])?;
        meets("one")?;
        say_endpoints(&[])?;
        meets("two")?;
        say_clusters(&[&a_b, &other_b, &a])?;
        meets("three")?;
        say_endpoints(&hosts[1..2])?;
        meets("two")?;
        say_clusters(&[&b_a, &other_b, &a])?;
        meets("three")?;
        say_clusters(&[&b_a, &a])?;
        meets("two")?;
        say_clusters(&[&b_a])?;
        meets("nobody")?;
    }
    Ok(())
}
