//! Clusters whose hosts are found by name, of culvertd and of the real Envoy: both ask the same kind of name server, which says one
//! thing and then another, and what requests meet is the same.

use std::collections::BTreeSet;
use std::io::BufReader;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::{Request, Response};
use culvert_tests::name_server::{NameServer, Says};
use culvert_tests::wait_until;

const DEADLINE: Duration = Duration::from_secs(20);

fn v4(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 2, last).into()
}

const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

fn addresses(last: &[u8]) -> Says {
    Says::Addresses(last.iter().map(|last| v4(*last)).collect(), 3600)
}

/// Hosts at all addresses of the loopback, which say where they are, once for each connection. [`TWO`] fails its checks.
fn hosts() -> Result<u16> {
    let v4 = TcpListener::bind("0.0.0.0:0")?;
    let port = v4.local_addr()?.port();
    let v6 = TcpListener::bind(SocketAddr::new(V6, port))?;
    for listener in [v4, v6] {
        thread::spawn(move || -> Result<()> {
            for stream in listener.incoming() {
                let mut stream = stream?;
                let request = Request::read(&mut BufReader::new(stream.try_clone()?)).ok().flatten();
                let Some(request) = request else { continue };
                let here = stream.local_addr()?.ip().to_string();
                let status = if request.target == "/check" && here == TWO { 500 } else { 200 };
                let mut response = Response::new(status, "text/plain", here.into_bytes());
                response.headers.push("connection", "close");
                let _ = response.write(&mut stream, false);
            }
            Ok(())
        });
    }
    Ok(port)
}

/// A proxy with a path for each cluster: its name, and its fields.
fn start(kind: Kind, clusters: &[(&str, String)]) -> Result<(Daemon, u16)> {
    let port = free_port()?;
    let routes: Vec<_> =
        clusters.iter().map(|(name, _)| format!("{{match: {{path: /{name}}}, route: {{cluster: {name}}}}}")).collect();
    let hosts = format!("- {{name: all, domains: ['*'], routes: [{}]}}", routes.join(", "));
    let bootstrap = clusters.iter().fold(Bootstrap::new().http(port, &hosts, &[]), |bootstrap, (name, fields)| {
        bootstrap.cluster_of(name, &[fields])
    });
    Ok((Daemon::start(kind, &bootstrap.yaml())?, port))
}

fn endpoints(name: &str, hosts: &[(&str, u16)]) -> String {
    let hosts: Vec<_> = hosts
        .iter()
        .map(|(host, port)| {
            format!("{{endpoint: {{address: {{socket_address: {{address: {host}, port_value: {port}}}}}}}}}")
        })
        .collect();
    format!("load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{}]}}]}}", hosts.join(", "))
}

/// `typed_dns_resolver_config` with a server at this port.
fn resolver(port: u16) -> String {
    resolvers(&[port], "query_tries: 1")
}

/// The same with servers at these ports, and further fields.
fn resolvers(ports: &[u16], more: &str) -> String {
    let servers: Vec<_> =
        ports.iter().map(|port| format!("{{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}")).collect();
    let servers = servers.join(", ");
    format!(
        "typed_dns_resolver_config: {{name: envoy.network.dns_resolver.cares, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: \
         [{servers}], dns_resolver_options: {{no_default_search_domain: true}}, {more}}}}}"
    )
}

/// Where requests go, or what they are answered with.
fn met(port: u16, cluster: &str) -> Result<BTreeSet<String>> {
    let mut met = BTreeSet::new();
    for _ in 0..8 {
        let response = fetch(port, Request::get(&format!("/{cluster}")))?;
        met.insert(if response.status == 200 { response.text() } else { response.status.to_string() });
    }
    Ok(met)
}

fn wait_met(port: u16, cluster: &str, expected: &[&str]) -> Result<()> {
    let expected: BTreeSet<_> = expected.iter().map(|host| (*host).to_owned()).collect();
    wait_until(DEADLINE, &format!("requests to meet {expected:?}"), || {
        let met = met(port, cluster)?;
        ensure!(met == expected, "they meet {met:?}");
        Ok(())
    })
}

const ONE: &str = "127.0.2.1";
const TWO: &str = "127.0.2.2";
const THREE: &str = "127.0.2.3";

/// One change of what a name stands for, and whom requests meet then.
type Step = (Says, &'static [&'static str]);

fn follows(kind: Kind, cluster: &str, fields: &str, steps: &[Step]) -> Result<Daemon> {
    let (names, hosts) = (NameServer::start()?, hosts()?);
    let (first, steps) = steps.split_first().context("no steps")?;
    names.say("up.example", first.0.clone());
    let fields =
        format!("{fields}\n    {}\n    {}", endpoints(cluster, &[("up.example", hosts)]), resolver(names.port));
    let (daemon, port) = start(kind, &[(cluster, fields)])?;
    wait_met(port, cluster, first.1).with_context(|| format!("{kind:?} at first"))?;
    for (says, expected) in steps {
        names.say("up.example", says.clone());
        names.wait_asked("up.example", DEADLINE)?;
        wait_met(port, cluster, expected).with_context(|| format!("{kind:?} after {says:?}"))?;
    }
    Ok(daemon)
}

#[test]
fn strict_clusters_follow_names_as_in_envoy() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let steps: [Step; 8] = [
            (addresses(&[1, 2]), &[ONE, TWO]),
            (addresses(&[2, 3]), &[TWO, THREE]),
            // A server that fails says nothing of the name.
            (Says::Failure, &[TWO, THREE]),
            (addresses(&[1]), &[ONE]),
            (Says::Unknown, &["503"]),
            (addresses(&[3]), &[THREE]),
            (Says::UnknownWith(vec![v4(2)]), &["503"]),
            (addresses(&[3]), &[THREE]),
        ];
        let fields = "type: STRICT_DNS\n    dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY";
        let daemon = follows(kind, "strict", fields, &steps)?;
        let stats = daemon.stats()?;
        for name in ["update_attempt", "update_success", "update_failure", "update_no_rebuild", "membership_change"] {
            ensure!(stats.get(&format!("cluster.strict.{name}")) > 0, "{kind:?}: {name}");
        }
        if kind == Kind::Culvert {
            // Many look-ups have failed in the meantime.
            ensure!(stats.get("cluster.strict.update_failure") > 1, "{}", daemon.stderr());
            let warnings = daemon.stderr().matches("DNS look-up failed").count();
            assert_eq!(warnings, 1, "{}", daemon.stderr());
        }
    }
    Ok(())
}

/// The check goes where the name leads, and what it has found out stays until another one says otherwise.
#[test]
fn hosts_of_logical_clusters_are_checked_as_in_envoy() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let steps: [Step; 3] = [(addresses(&[1]), &[ONE]), (addresses(&[2]), &["503"]), (addresses(&[3]), &[THREE])];
        let fields = "type: LOGICAL_DNS\n    dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY\n    common_lb_config: \
                      {healthy_panic_threshold: {value: 0}}\n    health_checks: [{timeout: 5s, interval: 0.1s, \
                      no_traffic_interval: 0.1s, unhealthy_threshold: 2, healthy_threshold: 2, http_health_check: {path: \
                      /check, retriable_statuses: [{start: 500, end: 501}]}}]";
        let daemon = follows(kind, "checked", fields, &steps)?;
        let flags = "checked::127.0.2.3:";
        let clusters = daemon.admin("/clusters")?;
        let mut lines = clusters.lines().filter(|line| line.starts_with(flags) && line.contains("::health_flags::"));
        ensure!(lines.next().is_some_and(|line| line.ends_with("::healthy")), "{kind:?}: {clusters}");
        let stats = daemon.stats()?;
        // Of the host that was well at first, one failure is not enough; then two that pass are needed.
        ensure!(stats.get("cluster.checked.health_check.failure") >= 2, "{kind:?}");
        ensure!(stats.get("cluster.checked.health_check.healthy") == 1, "{kind:?}");
        ensure!(stats.get("cluster.checked.membership_change") == 3, "{kind:?}: once for each place");
    }
    Ok(())
}

#[test]
fn logical_clusters_go_where_the_name_leads_as_in_envoy() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let steps: [Step; 5] = [
            (addresses(&[1]), &[ONE]),
            (addresses(&[2]), &[TWO]),
            (Says::Failure, &[TWO]),
            (Says::Unknown, &[TWO]),
            (addresses(&[3]), &[THREE]),
        ];
        let fields = "type: LOGICAL_DNS\n    dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY";
        let daemon = follows(kind, "logical", fields, &steps)?;
        let stats = daemon.stats()?;
        // One host, wherever it is.
        assert_eq!(stats.get("cluster.logical.membership_total"), 1, "{kind:?}");
        ensure!(stats.get("cluster.logical.update_failure") > 0, "{kind:?}");
    }
    Ok(())
}

#[test]
fn answers_are_good_for_as_long_as_they_say() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (names, hosts) = (NameServer::start()?, hosts()?);
        names.say("up.example", Says::Addresses(vec![v4(1)], 1));
        let dns = "cluster_type: {name: envoy.cluster.dns, typed_config: {\"@type\": \
                   type.googleapis.com/envoy.extensions.clusters.dns.v3.DnsCluster, dns_refresh_rate: 3600s, \
                   respect_dns_ttl: true, dns_lookup_family: V4_ONLY";
        let fields = |more: &str, name: &str| {
            format!("{dns}, {more}{}}}}}\n    {}", resolver(names.port), endpoints(name, &[("up.example", hosts)]))
        };
        let clusters = [
            ("each", fields("", "each")),
            ("all", fields("all_addresses_in_single_endpoint: true, ", "all")),
            ("slow", fields("dns_min_refresh_rate: 3600s, ", "slow")),
        ];
        let (_daemon, port) = start(kind, &clusters)?;
        for (name, _) in &clusters {
            wait_met(port, name, &[ONE])?;
        }
        names.say("up.example", Says::Addresses(vec![v4(2)], 1));
        wait_met(port, "each", &[TWO]).with_context(|| format!("{kind:?}"))?;
        wait_met(port, "all", &[TWO]).with_context(|| format!("{kind:?}"))?;
        wait_met(port, "slow", &[ONE]).with_context(|| format!("{kind:?}"))?;
    }
    Ok(())
}

#[test]
fn families_are_chosen_as_by_envoy() -> Result<()> {
    let expected: [(&str, &[&str]); 5] = [
        ("AUTO", &["::1"]),
        ("V4_ONLY", &[ONE]),
        ("V6_ONLY", &["::1"]),
        ("V4_PREFERRED", &[ONE]),
        ("ALL", &[ONE, "::1"]),
    ];
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (names, hosts) = (NameServer::start()?, hosts()?);
        names.say("both.example", Says::Addresses(vec![v4(1), V6], 60));
        names.say("old.example", Says::Addresses(vec![v4(2)], 60));
        let cluster = |name: &str, family: &str| {
            let hosts = [("both.example", hosts)];
            format!("type: STRICT_DNS\n    dns_lookup_family: {family}\n    {}", endpoints(name, &hosts))
        };
        let mut clusters: Vec<_> = expected.map(|(family, _)| (family, cluster(family, family))).into();
        clusters.push(("old", format!("type: STRICT_DNS\n    {}", endpoints("old", &[("old.example", hosts)]))));
        for (_, fields) in &mut clusters {
            *fields = format!("{fields}\n    {}", resolver(names.port));
        }
        let (_daemon, port) = start(kind, &clusters)?;
        for (family, expected) in expected {
            wait_met(port, family, expected).with_context(|| format!("{kind:?}: {family}"))?;
        }
        wait_met(port, "old", &[TWO]).with_context(|| format!("{kind:?}: IPv4 where there is no IPv6"))?;
    }
    Ok(())
}

#[test]
fn other_addresses_of_a_host_are_tried() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (names, hosts) = (NameServer::start()?, hosts()?);
        // Nobody has this port.
        let closed = free_port()?;
        names.say("both.example", Says::Addresses(vec![v4(1), V6], 60));
        let also = format!(
            "load_assignment: {{cluster_name: also, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: \
             {{address: {ONE}, port_value: {closed}}}}}, additional_addresses: [{{address: {{socket_address: {{address: \
             {TWO}, port_value: {closed}}}}}}}, {{address: {{socket_address: {{address: {THREE}, port_value: \
             {hosts}}}}}}}]}}}}]}}]}}"
        );
        let first = |family: &str| {
            let endpoints = endpoints(family, &[("both.example", hosts)]);
            format!(
                "type: LOGICAL_DNS\n    dns_lookup_family: ALL\n    upstream_connection_options: {{happy_eyeballs_config: \
                 {{first_address_family_version: {family}}}}}\n    {endpoints}\n    {}",
                resolver(names.port)
            )
        };
        let clusters = [("also", also), ("V4", first("V4")), ("V6", first("V6"))];
        let (daemon, port) = start(kind, &clusters)?;
        wait_met(port, "also", &[THREE]).with_context(|| format!("{kind:?}"))?;
        wait_met(port, "V4", &[ONE]).with_context(|| format!("{kind:?}"))?;
        wait_met(port, "V6", &["::1"]).with_context(|| format!("{kind:?}"))?;
        // An address that does not answer is no failure of the connection.
        assert_eq!(daemon.stats()?.get("cluster.also.upstream_cx_connect_fail"), 0, "{kind:?}");
    }
    Ok(())
}

/// As long as one of them answers, it does not matter which.
#[test]
fn dead_name_servers_are_gone_around_as_by_envoy() -> Result<()> {
    let fields = "type: STRICT_DNS\n    dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY";
    for kind in [Kind::Envoy, Kind::Culvert] {
        let (hosts, silent, answers) = (hosts()?, NameServer::start()?, NameServer::start()?);
        let all = [free_port()?, silent.port, answers.port];
        silent.say("up.example", Says::Nothing);
        answers.say("up.example", addresses(&[1]));
        let cluster = |name, ports: &[u16]| {
            let (endpoints, resolvers) =
                (endpoints(name, &[("up.example", hosts)]), resolvers(ports, "query_timeout_seconds: 1"));
            (name, format!("{fields}\n    wait_for_warm_on_init: false\n    {endpoints}\n    {resolvers}"))
        };
        let clusters = [cluster("some", &all), cluster("dies", &[answers.port, silent.port])];
        let (_daemon, port) = start(kind, &clusters)?;
        wait_met(port, "some", &[ONE]).with_context(|| format!("{kind:?} with two that are dead"))?;
        wait_met(port, "dies", &[ONE]).with_context(|| format!("{kind:?} with the first"))?;
        // It has answered until now.
        answers.say("up.example", Says::Nothing);
        silent.say("up.example", addresses(&[3]));
        wait_met(port, "dies", &[THREE]).with_context(|| format!("{kind:?} with the second"))?;
        wait_met(port, "some", &[THREE]).with_context(|| format!("{kind:?} with one that was dead"))?;
        // And back again.
        silent.say("up.example", Says::Failure);
        answers.say("up.example", addresses(&[2]));
        wait_met(port, "dies", &[TWO]).with_context(|| format!("{kind:?} with the first again"))?;
    }
    Ok(())
}

/// A server that says more at a time than it was asked for is heard nevertheless.
#[test]
fn long_answers_are_taken_as_by_envoy() -> Result<()> {
    for kind in [Kind::Envoy, Kind::Culvert] {
        let names = NameServer::start()?;
        names.say("many.example", Says::Addresses((1..=200).map(v4).collect(), 60));
        let cluster = format!(
            "type: STRICT_DNS\n    dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY\n    {}\n    {}",
            endpoints("many", &[("many.example", 80)]),
            resolver(names.port)
        );
        let (daemon, _) = start(kind, &[("many", cluster)])?;
        names.wait_asked("many.example", DEADLINE)?;
        let stats = daemon.stats()?;
        assert_eq!(stats.get("cluster.many.membership_total"), 200, "{kind:?}");
        assert_eq!(stats.get("cluster.many.update_failure"), 0, "{kind:?}");
    }
    Ok(())
}

/// Hosts at all addresses of the loopback, which keep their connections and say where they are, those asked for `?held` when they may.
fn kept_hosts(held: Receiver<()>) -> Result<u16> {
    let held = Arc::new(Mutex::new(held));
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let held = Arc::clone(&held);
            thread::spawn(move || -> Result<()> {
                let here = stream.local_addr()?.ip().to_string();
                let mut requests = BufReader::new(stream.try_clone()?);
                while let Some(request) = Request::read(&mut requests)? {
                    if request.target.ends_with("?held") {
                        let _ = held.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    }
                    Response::new(200, "text/plain", here.clone().into_bytes()).write(&mut stream, false)?;
                }
                Ok(())
            });
        }
    });
    Ok(port)
}

/// The host is another one with each change of its addresses: what is under way there ends, and nothing new begins there.
#[test]
fn connections_of_logical_clusters_end_with_the_address_as_in_envoy() -> Result<()> {
    let met = |kind| -> Result<Vec<(u64, u64, u64, String)>> {
        let (release, held) = mpsc::channel();
        let (names, hosts) = (NameServer::start()?, kept_hosts(held)?);
        names.say("up.example", addresses(&[1, 2]));
        let more = "dns_refresh_rate: 0.05s\n    dns_lookup_family: V4_ONLY";
        let end = format!("{}\n    {}", endpoints("x", &[("up.example", hosts)]), resolver(names.port));
        let (daemon, port) = start(kind, &[("kept", format!("type: LOGICAL_DNS\n    {more}\n    {end}"))])?;
        wait_met(port, "kept", &[ONE])?;
        let under_way = thread::spawn(move || fetch(port, Request::get("/kept?held")));
        wait_until(DEADLINE, "the request that is held", || {
            let active = daemon.stats()?.get("cluster.kept.upstream_rq_active");
            ensure!(active == 1, "{active} are active");
            Ok(())
        })?;
        let mut counted = Vec::new();
        let steps =
            [(addresses(&[2, 1]), TWO), (addresses(&[2, 3]), TWO), (addresses(&[2]), TWO), (addresses(&[3]), THREE)];
        for (says, host) in steps {
            let before = daemon.stats()?.get("cluster.kept.membership_change");
            names.say("up.example", says);
            wait_until(DEADLINE, "the change", || {
                let stats = daemon.stats()?;
                ensure!(stats.get("cluster.kept.membership_change") == before + 1, "there is none");
                Ok(())
            })?;
            wait_met(port, "kept", &[host])?;
            let stats = daemon.stats()?;
            let clusters = daemon.admin("/clusters")?;
            let total = clusters.lines().find(|line| line.contains("::cx_total::")).context("no host")?;
            counted.push((
                stats.get("cluster.kept.upstream_cx_total"),
                stats.get("cluster.kept.upstream_cx_destroy_local"),
                stats.get("cluster.kept.upstream_cx_active"),
                total.replace(&hosts.to_string(), "PORT"),
            ));
        }
        release.send(())?;
        let response = under_way.join().map_err(|_| anyhow!("it has panicked"))??;
        ensure!(response.status == 200 && response.text() == ONE, "{kind:?}: {} {}", response.status, response.text());
        wait_until(DEADLINE, "the end of its connection", || {
            let active = daemon.stats()?.get("cluster.kept.upstream_cx_active");
            ensure!(active == 1, "{active} are open");
            Ok(())
        })?;
        wait_until(DEADLINE, "an answer like the one before", || {
            ensure!(daemon.stats()?.get("cluster.kept.update_no_rebuild") > 0, "{kind:?}");
            Ok(())
        })?;
        Ok(counted)
    };
    let (envoy, culvert) = (met(Kind::Envoy)?, met(Kind::Culvert)?);
    assert_eq!(culvert, envoy);
    Ok(())
}
