//! The dynamic forward proxy, of culvertd and of the real Envoy: both ask the same name server for the hosts that requests name, and what
//! requests meet, what logs say and what is counted is the same.

use std::collections::BTreeMap;
use std::fs;
use std::io::BufReader;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port, scratch_dir};
use culvert_tests::http1::{Request, Response};
use culvert_tests::name_server::{NameServer, Says};
use culvert_tests::wait_until;

const DEADLINE: Duration = Duration::from_secs(30);
const FILTER: &str = "envoy.extensions.filters.http.dynamic_forward_proxy.v3";

/// Hosts at all addresses of the loopback: they say where they are, and what host the request is for.
fn hosts() -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || -> Result<()> {
                let mut reader = BufReader::new(stream.try_clone()?);
                while let Some(request) = Request::read(&mut reader)? {
                    let host = request.headers.get("host").unwrap_or_default();
                    let text = format!("{} for {host}", stream.local_addr()?.ip());
                    Response::new(200, "text/plain", text.into()).write(&mut stream, false)?;
                }
                Ok(())
            });
        }
    });
    Ok(port)
}

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(127, 0, 3, last).into()
}

struct Proxy {
    daemon: Daemon,
    port: u16,
    log: std::path::PathBuf,
}

impl Proxy {
    /// `cache`: further fields of the cache.
    fn start(kind: Kind, names: &NameServer, up: &str, cache: &str) -> Result<Proxy> {
        let (port, log) = (free_port()?, scratch_dir()?.join("log"));
        let dns = names.port;
        let cache = format!(
            "{{name: names, dns_lookup_family: V4_ONLY, typed_dns_resolver_config: {{name: cares, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig, resolvers: \
             [{{socket_address: {{address: 127.0.0.1, port_value: {dns}}}}}], dns_resolver_options: \
             {{no_default_search_domain: true}}}}}}, {cache}}}"
        );
        let rewrite = |how: &str| {
            format!(
                "typed_per_filter_config: {{dfp: {{\"@type\": type.googleapis.com/{FILTER}.PerRouteConfig, {how}}}}}"
            )
        };
        let (literal, header) =
            (rewrite(&format!("host_rewrite_literal: \"{up}\"")), rewrite("host_rewrite_header: x-host"));
        let log_path = log.display();
        let yaml = format!(
            r#"
static_resources:
  listeners:
  - name: http
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          access_log:
          - name: file
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog
              path: {log_path}
              log_format: {{text_format_source: {{inline_string: "%REQ(x-case)% %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS%\n"}}}}
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - {{match: {{prefix: /literal}}, route: {{cluster: dynamic}}, {literal}}}
              - {{match: {{prefix: /header}}, route: {{cluster: dynamic}}, {header}}}
              - {{match: {{prefix: /direct}}, direct_response: {{status: 204}}}}
              - {{match: {{prefix: /}}, route: {{cluster: dynamic}}}}
          http_filters:
          - name: dfp
            typed_config: {{"@type": type.googleapis.com/{FILTER}.FilterConfig, dns_cache_config: {cache}}}
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  clusters:
  - name: dynamic
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 1s
    cluster_type:
      name: envoy.clusters.dynamic_forward_proxy
      typed_config: {{"@type": type.googleapis.com/envoy.extensions.clusters.dynamic_forward_proxy.v3.ClusterConfig, dns_cache_config: {cache}}}
"#
        );
        Ok(Proxy { daemon: Daemon::start(kind, &yaml)?, port, log })
    }

    fn get(&self, case: &str, target: &str, host: &str, header: &str) -> Result<String> {
        let request = Request::get(target).header("host", host).header("x-case", case).header("x-host", header);
        let response = fetch(self.port, request)?;
        Ok(format!("{} {}", response.status, response.text()))
    }
}

impl Proxy {
    /// What `/clusters` says of the cluster's hosts whose addresses begin so.
    fn hosts(&self, address: &str) -> Result<String> {
        let text = self.daemon.admin("/clusters")?;
        let begins = format!("dynamic::{address}");
        // A host's requests that wait are not told of here.
        let told = |line: &&str| line.starts_with(&begins) && !line.contains("::rq_pending_active::");
        let mut lines: Vec<_> = text.lines().filter(told).collect();
        lines.sort_unstable();
        Ok(lines.join("\n"))
    }
}

const COUNTED: [&str; 17] = [
    "dns_cache.names.dns_query_attempt",
    "dns_cache.names.dns_query_success",
    "dns_cache.names.dns_query_failure",
    "dns_cache.names.dns_query_timeout",
    "dns_cache.names.dns_rq_pending_overflow",
    "dns_cache.names.host_added",
    "dns_cache.names.host_removed",
    "dns_cache.names.host_address_changed",
    "dns_cache.names.host_overflow",
    "dns_cache.names.num_hosts",
    "dns_cache.names.circuit_breakers.rq_pending_open",
    "dns_cache.names.circuit_breakers.rq_pending_remaining",
    "cluster.dynamic.membership_total",
    "cluster.dynamic.membership_healthy",
    "cluster.dynamic.membership_change",
    "cluster.dynamic.upstream_rq_total",
    "cluster.dynamic.upstream_cx_total",
];

fn meets(kind: Kind, up: u16) -> Result<BTreeMap<String, String>> {
    let names = NameServer::start()?;
    names.say("one.example", Says::Addresses(vec![address(1)], 3600));
    names.say("two.example", Says::Addresses(vec![address(2)], 3600));
    names.say("fails.example", Says::Failure);
    names.say("silent.example", Says::Nothing);
    let at = |name: &str| format!("{name}:{up}");
    let proxy = Proxy::start(kind, &names, &at("two.example"), "max_hosts: 7, dns_query_timeout: 0.5s")?;
    let mut met = BTreeMap::new();
    for (case, target, host, header) in [
        ("first", "/", &*at("one.example"), ""),
        ("again", "/", &at("one.example"), ""),
        ("literal", "/literal", &at("one.example"), ""),
        ("header", "/header", "nowhere.example", &at("one.example")),
        ("unknown", "/", "unknown.example", ""),
        ("unknown again", "/", "unknown.example", ""),
        ("fails", "/", "fails.example", ""),
        ("silent", "/", "silent.example", ""),
        ("address", "/", &at("127.0.3.9"), ""),
        ("address of the other family", "/", &at("[::1]"), ""),
        ("no cluster", "/direct", "other.example", ""),
        ("too many", "/", &at("seventh.example"), ""),
        ("known still", "/", &at("one.example"), ""),
    ] {
        met.insert(case.to_owned(), proxy.get(case, target, host, header)?);
    }
    let stats = proxy.daemon.stats()?;
    for name in COUNTED {
        met.insert(name.to_owned(), stats.get(name).to_string());
    }
    met.extend(proxy.hosts("127.0.")?.lines().map(|line| (line.to_owned(), String::new())));
    let full = Proxy::start(kind, &names, "x", "dns_cache_circuit_breaker: {max_pending_requests: 0}")?;
    met.insert("pending".to_owned(), full.get("pending", "/", &at("one.example"), "")?);
    let stats = full.daemon.stats()?;
    for name in COUNTED {
        met.insert(format!("{name} when full"), stats.get(name).to_string());
    }
    for (proxy, last) in [(&proxy, "known still"), (&full, "pending")] {
        let lines = wait_until(DEADLINE, "the log", || {
            let text = fs::read_to_string(&proxy.log)?;
            ensure!(text.contains(last), "{text}");
            Ok(text)
        })?;
        for line in lines.lines() {
            met.insert(format!("log: {}", line.split(" 50").next().unwrap_or(line)), line.to_owned());
        }
    }
    Ok(met)
}

#[test]
fn requests_meet_the_hosts_that_they_name_as_in_envoy() -> Result<()> {
    let up = hosts()?;
    let (theirs, ours) = (meets(Kind::Envoy, up)?, meets(Kind::Culvert, up)?);
    let different: Vec<_> = theirs
        .iter()
        .filter(|(what, met)| ours.get(*what) != Some(met))
        .map(|(what, met)| format!("{what}: Envoy {met:?}, Culvert {:?}", ours.get(what)))
        .collect();
    ensure!(different.is_empty(), "{}", different.join("\n"));
    ensure!(
        ours.len() == theirs.len(),
        "{:?}",
        ours.keys().filter(|what| !theirs.contains_key(*what)).collect::<Vec<_>>()
    );
    assert!(theirs.contains_key(&format!("dynamic::127.0.3.1:{up}::rq_success::4")), "{theirs:?}");
    assert_eq!(theirs["first"], format!("200 127.0.3.1 for one.example:{up}"));
    assert_eq!(theirs["literal"], format!("200 127.0.3.2 for two.example:{up}"));
    Ok(())
}

#[test]
fn names_are_looked_up_again_and_forgotten_as_in_envoy() -> Result<()> {
    let up = hosts()?;
    for kind in [Kind::Envoy, Kind::Culvert] {
        let names = NameServer::start()?;
        names.say("early.example", Says::Addresses(vec![address(1)], 3600));
        names.say("moves.example", Says::Addresses(vec![address(1)], 1));
        names.say("comes.example", Says::Unknown);
        let cache = format!(
            "dns_refresh_rate: 0.2s, dns_min_refresh_rate: 1s, host_ttl: 4s, preresolve_hostnames: [{{address: \
             early.example, port_value: {up}}}]"
        );
        let proxy = Proxy::start(kind, &names, "x", &cache)?;
        wait_until(DEADLINE, "the name that is looked up first", || {
            let stats = proxy.daemon.stats()?;
            ensure!(stats.get("cluster.dynamic.membership_total") == 1);
            Ok(())
        })?;
        let (moves, comes) = (format!("moves.example:{up}"), format!("comes.example:{up}"));
        ensure!(proxy.get("a", "/", &moves, "")?.starts_with("200 127.0.3.1"), "{kind:?}");
        ensure!(proxy.get("a", "/", &comes, "")?.starts_with("503"), "{kind:?}");
        names.say("comes.example", Says::Addresses(vec![address(3)], 1));
        wait_until(DEADLINE, "the name that comes", || {
            let met = proxy.get("a", "/", &comes, "")?;
            ensure!(met.starts_with("200 127.0.3.3"), "{kind:?}: {met}");
            Ok(())
        })?;
        // New connections go to the new address; a name that is gone keeps the last one.
        names.say("moves.example", Says::Addresses(vec![address(2)], 1));
        wait_until(DEADLINE, "the name's other address", || {
            ensure!(proxy.daemon.stats()?.get("dns_cache.names.host_address_changed") == 4, "{kind:?}");
            Ok(())
        })?;
        // Nobody asks for any of them any more, except for the one that is good for an hour.
        wait_until(DEADLINE, "the names to be forgotten", || {
            let stats = proxy.daemon.stats()?;
            ensure!(stats.get("dns_cache.names.num_hosts") == 1, "{kind:?}");
            ensure!(stats.get("dns_cache.names.host_removed") == 2, "{kind:?}");
            ensure!(stats.get("cluster.dynamic.membership_total") == 1, "{kind:?}");
            Ok(())
        })?;
        let left = proxy.hosts("")?;
        ensure!(left.contains(&format!("dynamic::127.0.3.1:{up}::hostname::early.example:{up}")), "{kind:?}: {left}");
        ensure!(!left.contains("moves.example") && !left.contains("comes.example"), "{kind:?}: {left}");
        ensure!(proxy.get("a", "/", &moves, "")?.starts_with("200 127.0.3.2"), "{kind:?}");
        let moved = proxy.hosts("127.0.3.2")?;
        ensure!(moved.contains("rq_total::1"), "{kind:?}: {moved}");
    }
    Ok(())
}
