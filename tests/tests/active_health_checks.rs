//! Active health checks, of culvertd and of the real Envoy on the same bootstrap: the same hosts pass and fail, with the same flags, the
//! same statistics and the same log lines.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::bootstrap::telling_hosts;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::Request;
use culvert_tests::wait_until;
use serde_json::Value;

#[path = "active_health_checks/several.rs"]
mod several;

const DEADLINE: Duration = Duration::from_secs(60);
/// Keys by which requests are sent to hosts: enough that each host has some.
const KEYS: usize = 60;
const TIMES: &str =
    "timeout: 0.5s, interval: 0.1s, no_traffic_interval: 0.1s, unhealthy_threshold: 2, healthy_threshold: 2";

/// What each host answers to checks: a status, `degraded`, or `close`.
type Behaviour = Arc<Mutex<BTreeMap<u8, &'static str>>>;

/// Clusters, and how they are checked. The hosts are `127.0.2.<number>`.
fn clusters() -> Vec<(&'static str, String, &'static [u8])> {
    let three: &[u8] = &[1, 2, 3];
    let http = |more: &str| format!("http_health_check: {{path: /check{more}}}");
    vec![
        ("http", http(""), three),
        ("statuses", http(", expected_statuses: [{start: 200, end: 300}, {start: 503, end: 504}]"), three),
        ("retriable", http(", retriable_statuses: [{start: 500, end: 600}]"), three),
        ("receive", http(", receive: [{text: \"6f6b\"}]"), three),
        ("bytes", "tcp_health_check: {send: {text: \"50494e470d0a\"}, receive: [{text: \"6f6b\"}]}".to_owned(), three),
        ("connect", "tcp_health_check: {}".to_owned(), &[1, 9]),
        // Host 4 is checked at the port of host 1's, which does not know it; host 5 is not checked.
        ("other_port", http(""), &[1, 4, 5]),
        ("eds", http(""), &[]),
    ]
}

fn endpoint(number: u8, upstream: u16) -> String {
    let check = match number {
        4 => ", health_check_config: {port_value: 1}",
        5 => ", health_check_config: {disable_active_health_check: true}",
        _ => "",
    };
    format!(
        "{{endpoint: {{address: {{socket_address: {{address: 127.0.2.{number}, port_value: {upstream}}}}}{check}}}}}"
    )
}

fn bootstrap(listen: u16, upstream: u16, dir: &Path) -> String {
    let (mut routes, mut text) = (String::new(), String::new());
    for (name, check, hosts) in clusters() {
        let _ = writeln!(
            routes,
            "              - {{match: {{path: /{name}}}, route: {{cluster: {name}, hash_policy: [{{header: {{header_name: \
             x-key}}}}]}}}}"
        );
        // Those that wait for other bytes than come wait for as long.
        let timeout = if name == "bytes" { 1 } else { 9 };
        let log = dir.join("events").display().to_string();
        let sink = "type.googleapis.com/envoy.extensions.health_check.event_sinks.file.v3.HealthCheckEventFileSink";
        let _ = writeln!(
            text,
            "  - name: {name}\n    lb_policy: RING_HASH\n    common_lb_config: {{healthy_panic_threshold: {{value: 0}}}}\n    \
             health_checks: [{{timeout: {timeout}s, {TIMES}, {check}, event_logger: [{{name: a, typed_config: {{\"@type\": {sink}, event_log_path: \
             {log}}}}}]}}]"
        );
        if name == "eds" {
            let path = dir.join("eds.yaml").display().to_string();
            let _ = writeln!(
                text,
                "    type: EDS\n    eds_cluster_config: {{eds_config: {{path_config_source: {{path: {path}}}}}}}"
            );
            continue;
        }
        let hosts: Vec<_> = hosts.iter().map(|host| endpoint(*host, upstream)).collect();
        let _ = writeln!(
            text,
            "    load_assignment: {{cluster_name: {name}, endpoints: [{{locality: {{region: r}}, lb_endpoints: [{}]}}]}}",
            hosts.join(", ")
        );
    }
    telling_hosts("node: {id: a, cluster: b}", listen, &routes, &text)
}

/// The hosts, all on the same port.
fn upstream(behaviour: &Behaviour) -> Result<u16> {
    let port = free_port()?;
    for number in 1..=5 {
        let listener = TcpListener::bind((Ipv4Addr::new(127, 0, 2, number), port))?;
        let behaviour = Arc::clone(behaviour);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let behaviour = Arc::clone(&behaviour);
                thread::spawn(move || serve(stream, number, &behaviour));
            }
        });
    }
    Ok(port)
}

fn serve(stream: TcpStream, number: u8, behaviour: &Behaviour) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream.try_clone()?);
    let (mut stream, mut line, mut check, mut further) = (stream, String::new(), false, "");
    while lines.read_line(&mut line)? > 0 {
        let does = || behaviour.lock().map(|known| known.get(&number).copied().unwrap_or("200")).unwrap_or("200");
        check |= line.starts_with("GET /check");
        if line.starts_with("PING") {
            stream.write_all(if does() == "200" { b"ok" } else { b"no" })?;
        }
        if line.starts_with("x-says: ") {
            further = "x-envoy-immediate-health-check-fail: true\r\n";
        }
        if line == "\r\n" {
            let (status, more) = match does() {
                _ if !check => ("200", further),
                "close" => return Ok(()),
                "degraded" => ("200", "x-envoy-degraded: true\r\n"),
                status => (status, ""),
            };
            let body = if status == "200" { "ok" } else { "no" };
            let answer = format!("HTTP/1.1 {status} x\r\n{more}content-length: 2\r\n\r\n{body}");
            stream.write_all(answer.as_bytes())?;
            (check, further) = (false, "");
        }
        line.clear();
    }
    Ok(())
}

struct Proxy {
    kind: Kind,
    daemon: Daemon,
    port: u16,
    dir: PathBuf,
    upstream: u16,
}

impl Proxy {
    fn start(kind: Kind, upstream: u16) -> Result<Proxy> {
        let (port, dir) = (free_port()?, scratch_dir()?);
        write_endpoints(&dir, upstream, &[1, 2, 3])?;
        // Envoy writes its log every 10 s if not told otherwise.
        let flags: &[&str] = if kind == Kind::Envoy { &["--file-flush-interval-msec", "50"] } else { &[] };
        let daemon = Daemon::start_with(kind, &bootstrap(port, upstream, &dir), flags)?;
        Ok(Proxy { kind, daemon, port, dir, upstream })
    }

    /// The hosts that requests go to; 0: to none.
    fn hosts(&self, cluster: &str) -> Result<BTreeSet<u8>> {
        (0..KEYS).map(|key| self.ask(cluster, key, false)).collect()
    }

    fn ask(&self, cluster: &str, key: usize, says: bool) -> Result<u8> {
        let mut request = Request::get(&format!("/{cluster}")).header("x-key", &key.to_string());
        if says {
            request = request.header("x-says", "ill");
        }
        let response = fetch(self.port, request)?;
        let address = response.headers.get("x-host").unwrap_or_default().split(':').next().unwrap_or_default();
        let host = address.rsplit('.').next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Ok(if response.status == 200 { host } else { 0 })
    }

    /// The flags of hosts: `cluster host flags`.
    fn flags(&self) -> Result<BTreeSet<String>> {
        let text = self.daemon.admin("/clusters")?;
        let flag = |line: &str| {
            let (host, flags) = line.split_once("::health_flags::")?;
            let (cluster, address) = host.split_once("::127.0.2.")?;
            Some(format!("{cluster} {} {flags}", address.split(':').next()?))
        };
        Ok(text.lines().filter_map(flag).collect())
    }

    fn waits_for(&self, what: &str, holds: impl Fn(&BTreeSet<String>) -> bool) -> Result<()> {
        wait_until(DEADLINE, &format!("{:?}: {what}", self.kind), || {
            let flags = self.flags()?;
            ensure!(holds(&flags), "{flags:?}");
            Ok(())
        })
    }

    /// Waits until a cluster uses these hosts.
    fn uses(&self, cluster: &str, hosts: &[u8]) -> Result<()> {
        let expected: BTreeSet<u8> = hosts.iter().copied().collect();
        wait_until(DEADLINE, &format!("{:?} to use {hosts:?} of {cluster}", self.kind), || {
            let seen = self.hosts(cluster)?;
            ensure!(seen == expected, "it uses {seen:?}");
            Ok(())
        })
    }

    /// Lines of a host without their times, in their order.
    fn events(&self) -> Result<BTreeMap<(String, String), Vec<String>>> {
        let mut lines: BTreeMap<_, Vec<String>> = BTreeMap::new();
        for line in fs::read_to_string(self.dir.join("events"))?.lines() {
            let (before, rest) = line.split_once("\"timestamp\":\"").context("a time")?;
            let (time, after) = rest.split_once('"').context("a time")?;
            ensure!(time.len() == 24 && time.ends_with('Z'), "{time}");
            let event: Value = serde_json::from_str(line)?;
            let of = (event["cluster_name"].to_string(), event["host"].to_string());
            // Letter for letter.
            lines.entry(of).or_default().push(format!("{before}{after}"));
        }
        Ok(lines)
    }
}

fn write_endpoints(dir: &Path, upstream: u16, hosts: &[u8]) -> Result<()> {
    let hosts: Vec<_> = hosts.iter().map(|host| endpoint(*host, upstream)).collect();
    let text = format!(
        "resources:\n- {{\"@type\": type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment, cluster_name: eds, endpoints: \
         [{{lb_endpoints: [{}]}}]}}\n",
        hosts.join(", ")
    );
    fs::write(dir.join("new"), text)?;
    fs::rename(dir.join("new"), dir.join("eds.yaml"))?;
    Ok(())
}

#[test]
fn hosts_are_checked_as_by_envoy() -> Result<()> {
    let behaviour = Behaviour::default();
    let set = |host: u8, does: &'static str| behaviour.lock().map(|mut known| known.insert(host, does)).map(drop);
    let does = |host, does| set(host, does).map_err(|_| anyhow::anyhow!("poisoned"));
    does(3, "503")?;
    let upstream = upstream(&behaviour)?;
    let proxies = [Proxy::start(Kind::Envoy, upstream)?, Proxy::start(Kind::Culvert, upstream)?];
    let both = |what: &dyn Fn(&Proxy) -> Result<()>| proxies.iter().try_for_each(what);
    // Each checks in its own time: what nothing has waited for yet may still be on its way with one of them.
    let same_flags = || {
        wait_until(DEADLINE, "the flags of both to be the same", || {
            let (envoys, culverts) = (proxies[0].flags()?, proxies[1].flags()?);
            ensure!(envoys == culverts, "Envoy's: {envoys:?}, Culvert's: {culverts:?}");
            Ok(())
        })
    };
    // Once they say that they are ready, each host has been checked: none is used that has failed.
    for (cluster, hosts) in [
        ("http", &[1, 2][..]),
        ("statuses", &[1, 2, 3]),
        ("retriable", &[1, 2]),
        ("bytes", &[1, 2]),
        ("connect", &[1]),
        ("other_port", &[1, 5]),
        ("eds", &[1, 2]),
    ] {
        let expected: BTreeSet<u8> = hosts.iter().copied().collect();
        both(&|proxy| {
            assert_eq!(proxy.hosts(cluster)?, expected, "{:?} {cluster}", proxy.kind);
            Ok(())
        })?;
    }
    same_flags()?;
    // One fails, another one comes back.
    does(3, "200")?;
    does(1, "503")?;
    both(&|proxy| {
        proxy.waits_for("1 to fail, and 3 to pass", |flags| {
            ["http", "retriable", "receive", "eds"].iter().all(|cluster| {
                flags.contains(&format!("{cluster} 1 /failed_active_hc"))
                    && flags.contains(&format!("{cluster} 3 healthy"))
            }) && flags.contains("bytes 1 /failed_active_hc/active_hc_timeout")
                && flags.contains("bytes 3 healthy")
                && flags.contains("other_port 1 /failed_active_hc")
        })?;
        proxy.uses("http", &[2, 3])
    })?;
    same_flags()?;
    does(2, "degraded")?;
    does(1, "200")?;
    both(&|proxy| {
        proxy.waits_for("2 to be degraded", |flags| {
            flags.contains("http 2 /degraded_active_hc")
                && flags.contains("http 1 healthy")
                && flags.contains("eds 1 healthy")
                && flags.contains("eds 2 /degraded_active_hc")
                && flags.contains("statuses 2 /degraded_active_hc")
                && flags.contains("receive 2 /degraded_active_hc")
                && flags.contains("retriable 2 /degraded_active_hc")
                && flags.contains("retriable 1 healthy")
                && flags.contains("receive 1 healthy")
                && flags.contains("bytes 1 healthy")
                && flags.contains("bytes 2 /failed_active_hc/active_hc_timeout")
                && flags.contains("other_port 1 healthy")
        })
    })?;
    same_flags()?;
    does(2, "200")?;
    both(&|proxy| {
        proxy.waits_for("2 to be well", |flags| {
            ["http", "statuses", "retriable", "receive", "bytes", "eds"]
                .iter()
                .all(|cluster| flags.contains(&format!("{cluster} 2 healthy")))
        })?;
        proxy.uses("http", &[1, 2, 3])
    })?;
    // One that is well stays although discovery does not have it, until it fails.
    both(&|proxy| {
        write_endpoints(&proxy.dir, proxy.upstream, &[1, 2])?;
        proxy.waits_for("3 to be on its way", |flags| flags.contains("eds 3 /pending_dynamic_removal"))?;
        proxy.uses("eds", &[1, 2, 3])
    })?;
    does(3, "503")?;
    both(&|proxy| {
        proxy.waits_for("3 to be gone", |flags| !flags.iter().any(|line| line.starts_with("eds 3")))?;
        proxy.waits_for("3 to fail", |flags| {
            ["http", "retriable", "receive"]
                .iter()
                .all(|cluster| flags.contains(&format!("{cluster} 3 /failed_active_hc")))
                && flags.contains("bytes 3 /failed_active_hc/active_hc_timeout")
        })?;
        proxy.uses("eds", &[1, 2])
    })?;
    same_flags()?;
    // Envoy never takes away from `health_check.degraded` what it has added.
    let names = [
        "health_check.healthy",
        "health_check.verify_cluster",
        "membership_total",
        "membership_healthy",
        "membership_degraded",
        "membership_excluded",
    ];
    let (envoy, culvert) = (proxies[0].daemon.stats()?, proxies[1].daemon.stats()?);
    for (cluster, ..) in clusters() {
        for name in names {
            let name = format!("cluster.{cluster}.{name}");
            assert!(culvert.has(&name), "{name}");
            assert_eq!(culvert.get(&name), envoy.get(&name), "{name}");
        }
    }
    wait_until(DEADLINE, "the same lines", || {
        let (expected, seen) = (proxies[0].events()?, proxies[1].events()?);
        for (of, lines) in &expected {
            ensure!(seen.get(of) == Some(lines), "Envoy: {lines:#?}, culvertd: {:#?}", seen.get(of));
        }
        ensure!(seen.len() == expected.len(), "{seen:#?}");
        Ok(())
    })
}

#[test]
fn a_host_may_say_itself_that_it_is_ill() -> Result<()> {
    let behaviour = Behaviour::default();
    let upstream = upstream(&behaviour)?;
    for kind in [Kind::Envoy, Kind::Culvert] {
        let proxy = Proxy::start(kind, upstream)?;
        let ill = proxy.ask("http", 7, true)?;
        proxy.waits_for("it to be excluded", |flags| {
            flags.contains(&format!("http {ill} /failed_active_hc/excluded_via_immediate_hc_fail"))
        })?;
        let stats = proxy.daemon.stats()?;
        assert_eq!(stats.get("cluster.http.health_check.passive_failure"), 1, "{kind:?}");
        // Its checks pass.
        proxy.waits_for("it to be back", |flags| flags.contains(&format!("http {ill} healthy")))?;
    }
    Ok(())
}

/// Before there is any traffic, hosts are checked at another interval; with the first request that is over.
#[test]
fn checks_go_by_whether_there_is_traffic_as_by_envoy() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (upstream, port) = (upstream(&Behaviour::default())?, free_port()?);
        let routes = "              - {match: {prefix: /}, route: {cluster: idle}}\n";
        let hosts = endpoint(1, upstream);
        let clusters = format!(
            "  - name: idle\n    health_checks: [{{timeout: 5s, interval: 3600s, no_traffic_interval: 0.05s, unhealthy_threshold: 2, \
             healthy_threshold: 2, http_health_check: {{path: /check}}}}]\n    load_assignment: {{cluster_name: idle, endpoints: \
             [{{lb_endpoints: [{hosts}]}}]}}\n"
        );
        let daemon = Daemon::start(kind, &telling_hosts("node: {id: a, cluster: b}", port, routes, &clusters))?;
        let checks = || -> Result<u64> { Ok(daemon.stats()?.get("cluster.idle.health_check.attempt")) };
        wait_until(DEADLINE, "checks without traffic", || {
            let checks = checks()?;
            ensure!(checks >= 5, "{checks}");
            Ok(())
        })?;
        ensure!(fetch(port, Request::get("/"))?.status == 200, "{kind:?}: an answer");
        // One is due already, and the one after it is not for an hour: in the time of twenty there is none.
        let before = checks()?;
        thread::sleep(Duration::from_secs(1));
        let after = checks()?;
        ensure!(after <= before + 1, "{kind:?}: {} checks too many", after - before);
    }
    Ok(())
}
