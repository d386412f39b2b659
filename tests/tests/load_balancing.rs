//! Load balancing, of culvertd and of the real Envoy on the same bootstrap: the same hosts, weights, health and requests give the same
//! distribution, and policies that go by hashes choose the very same hosts.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_tests::bootstrap::telling_hosts;
use culvert_tests::daemon::{Daemon, Kind, free_port};

#[path = "load_balancing/busy.rs"]
mod busy;
#[path = "load_balancing/orca.rs"]
mod orca;
#[path = "load_balancing/orca_stream.rs"]
mod orca_stream;
#[path = "load_balancing/own_hash.rs"]
mod own_hash;

/// Requests for each case and proxy.
const REQUESTS: usize = 1000;
/// Keys of requests for each policy that goes by hashes.
const KEYS: usize = 10_000;
/// So many requests are on their way at a time.
const BATCH: usize = 100;
/// The level of the test of homogeneity is 0.00001: of a normal distribution, so far out lies no more than that.
const LEVEL: f64 = 4.265;

/// Some hosts of one locality at one priority: `127.0.1.<number>`.
struct Group {
    zone: &'static str,
    zone_weight: u32,
    priority: u32,
    /// Number, weight and health of each; metadata as YAML.
    hosts: Vec<(u8, u32, &'static str, &'static str)>,
}

/// A cluster, and what is asked of it.
struct Case {
    name: &'static str,
    /// Further fields of the cluster.
    fields: &'static str,
    /// Of the assignment.
    policy: &'static str,
    groups: Vec<Group>,
    /// Further fields of the route.
    route: &'static str,
}

fn group(zone: &'static str, zone_weight: u32, priority: u32, hosts: &[(u8, u32, &'static str)]) -> Group {
    let hosts = hosts.iter().map(|(number, weight, health)| (*number, *weight, *health, "")).collect();
    Group { zone, zone_weight, priority, hosts }
}

const OK: &str = "HEALTHY";
const BAD: &str = "UNHEALTHY";
const SLOW: &str = "DEGRADED";
const GOING: &str = "DRAINING";

/// Hosts of one priority, with these weights.
fn weighted(weights: &[u32]) -> Vec<Group> {
    let hosts: Vec<_> = weights.iter().zip(1_u8..).map(|(weight, number)| (number, *weight, OK)).collect();
    vec![group("a", 1, 0, &hosts)]
}

/// Priorities, each a string of hosts: `h`ealthy, `d`egraded, `u`nhealthy, `g`oing.
fn priorities(levels: &[&str]) -> Vec<Group> {
    let mut number = 0;
    let mut groups = Vec::new();
    for (priority, level) in (0..).zip(levels) {
        let hosts: Vec<_> = level
            .chars()
            .map(|health| {
                number += 1;
                let health = match health {
                    'h' => OK,
                    'd' => SLOW,
                    'g' => GOING,
                    _ => BAD,
                };
                (number, 1, health)
            })
            .collect();
        groups.push(group("a", 1, priority, &hosts));
    }
    groups
}

fn zones() -> Vec<Group> {
    vec![
        group("a", 10, 0, &[(1, 1, OK), (2, 1, OK)]),
        group("b", 30, 0, &[(3, 1, OK), (4, 3, OK), (5, 1, BAD)]),
        group("c", 60, 0, &[(6, 1, OK), (7, 1, BAD), (8, 1, BAD), (9, 1, SLOW)]),
        group("d", 0, 0, &[(10, 1, OK)]),
    ]
}

fn typed(name: &str, config: &str) -> String {
    let package = name.chars().fold(String::new(), |mut text, letter| {
        if letter.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(letter.to_lowercase());
        text
    });
    format!(
        "load_balancing_policy: {{policies: [{{typed_extension_config: {{name: x, typed_config: {{\"@type\": \
         type.googleapis.com/envoy.extensions.load_balancing_policies.{package}.v3.{name}, {config}}}}}}}]}}"
    )
}

fn case(name: &'static str, fields: impl Into<String>, groups: Vec<Group>) -> Case {
    Case { name, fields: fields.into().leak(), policy: "", groups, route: "" }
}

fn cases() -> Vec<Case> {
    let weighted_zones = "common_lb_config: {locality_weighted_lb_config: {}}";
    vec![
        case("rr", "", weighted(&[1, 1, 1, 1])),
        case("rr_weighted", "", weighted(&[1, 2, 2, 5, 10])),
        case("twice", "", vec![group("a", 1, 0, &[(1, 1, OK), (1, 5, OK), (2, 1, OK)])]),
        case(
            "twice_over",
            "lb_policy: LEAST_REQUEST",
            vec![group("a", 1, 0, &[(1, 1, OK), (2, 1, BAD)]), group("a", 1, 1, &[(2, 1, OK), (1, 1, OK), (1, 1, OK)])],
        ),
        case("random", "lb_policy: RANDOM", weighted(&[1, 2, 7, 1, 1, 1])),
        case("random_typed", typed("Random", ""), priorities(&["hhhuuuu", "hhh"])),
        case("least", "lb_policy: LEAST_REQUEST", weighted(&[1, 1, 1, 1])),
        case("least_weighted", "lb_policy: LEAST_REQUEST", weighted(&[1, 2, 4])),
        case("least_scan", typed("LeastRequest", "selection_method: FULL_SCAN"), weighted(&[2, 2, 2])),
        case("spill", "", priorities(&["hhuuu", "hhhh"])),
        case("spill_three", "lb_policy: LEAST_REQUEST", priorities(&["huuuuu", "huuuu", "hh"])),
        case("degraded", "", priorities(&["hhddu", "dd"])),
        case("degraded_late", "", priorities(&["hdddd", "h"])),
        case("draining", "", priorities(&["hgggg"])),
        case("draining_all", "", priorities(&["gggg"])),
        case("draining_panic", "", priorities(&["huuuugg"])),
        case(
            "draining_zones",
            weighted_zones,
            vec![group("a", 1, 0, &[(1, 1, OK), (2, 1, GOING)]), group("b", 1, 0, &[(3, 1, OK), (4, 1, OK)])],
        ),
        case("panic", "", priorities(&["huuuu", "uuu"])),
        case("calm", "common_lb_config: {healthy_panic_threshold: {value: 10}}", priorities(&["huuuu"])),
        case("never_panic", "common_lb_config: {healthy_panic_threshold: {value: 0}}", priorities(&["uuuu", "huu"])),
        Case { policy: "policy: {overprovisioning_factor: 100}", ..case("exact", "", priorities(&["hhhu", "hh"])) },
        Case {
            policy: "policy: {weighted_priority_health: true}",
            ..case(
                "by_weight",
                "",
                vec![group("a", 1, 0, &[(1, 9, OK), (2, 11, BAD)]), group("a", 1, 1, &[(3, 1, OK)])],
            )
        },
        case("zones", weighted_zones, zones()),
        case("zones_typed", typed("RoundRobin", "locality_lb_config: {locality_weighted_lb_config: {}}"), zones()),
    ]
}

fn cluster(case: &Case, port: u16) -> String {
    let Case { name, fields, policy, groups, .. } = case;
    let mut yaml = format!("  - name: {name}\n    connect_timeout: 5s\n");
    if !fields.is_empty() {
        let _ = writeln!(yaml, "    {fields}");
    }
    let _ = writeln!(yaml, "    load_assignment:\n      cluster_name: {name}");
    if !policy.is_empty() {
        let _ = writeln!(yaml, "      {policy}");
    }
    yaml.push_str("      endpoints:\n");
    for Group { zone, zone_weight, priority, hosts } in groups {
        let weight = if *zone_weight > 0 { format!("load_balancing_weight: {zone_weight}, ") } else { String::new() };
        let _ = writeln!(
            yaml,
            "      - {{locality: {{region: r, zone: {zone}}}, {weight}priority: {priority}, lb_endpoints: ["
        );
        for (number, weight, health, metadata) in hosts {
            let _ = writeln!(
                yaml,
                "          {{endpoint: {{address: {{socket_address: {{address: 127.0.1.{number}, port_value: {port}}}}}}}, \
                 load_balancing_weight: {weight}, health_status: {health}, metadata: {{filter_metadata: {{envoy.lb: \
                 {{{metadata}}}}}}}}},"
            );
        }
        yaml.push_str("          ]}\n");
    }
    yaml
}

fn bootstrap(cases: &[Case], listen: u16, upstream: u16, head: &str) -> String {
    let routes: String = cases.iter().fold(String::new(), |mut text, case| {
        let (name, route) = (case.name, case.route);
        let route = if route.is_empty() { String::new() } else { format!(", {route}") };
        let _ = writeln!(text, "              - {{match: {{path: /{name}}}, route: {{cluster: {name}{route}}}}}");
        text
    });
    let clusters: String = cases.iter().map(|case| cluster(case, upstream)).collect();
    telling_hosts(head, listen, &routes, &clusters)
}

/// A server on all addresses of the loopback, which says yes to every request.
fn upstream() -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || -> Result<()> {
                let _ = stream.set_nodelay(true);
                let mut lines = BufReader::new(stream.try_clone()?);
                let (mut stream, mut line) = (stream, String::new());
                while lines.read_line(&mut line)? > 0 {
                    if line == "\r\n" {
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")?;
                    }
                    line.clear();
                }
                Ok(())
            });
        }
    });
    Ok(port)
}

struct Proxy {
    kind: Kind,
    daemon: Daemon,
    port: u16,
}

impl Proxy {
    fn start(kind: Kind, cases: &[Case], upstream: u16, head: &str) -> Result<Proxy> {
        let port = free_port()?;
        let daemon = Daemon::start(kind, &bootstrap(cases, port, upstream, head))?;
        Ok(Proxy { kind, daemon, port })
    }

    /// Where requests went, in their order, by the last number of the address; 0: nowhere. `header` of each of them.
    fn ask(&self, path: &str, count: usize, header: impl Fn(usize) -> String) -> Result<Vec<u8>> {
        let mut hosts = Vec::with_capacity(count);
        while hosts.len() < count {
            let before = hosts.len();
            self.ask_once(path, count, &header, &mut hosts)?;
            ensure!(hosts.len() > before, "{:?} closes every connection", self.kind);
        }
        Ok(hosts)
    }

    /// The same on one connection: until it is closed, which Envoy does after some of its own answers.
    fn ask_once(&self, path: &str, count: usize, header: &impl Fn(usize) -> String, hosts: &mut Vec<u8>) -> Result<()> {
        let stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_nodelay(true)?;
        let (mut lines, mut stream) = (BufReader::new(stream.try_clone()?), stream);
        let mut line = String::new();
        for first in (hosts.len()..count).step_by(BATCH) {
            let numbers = first..count.min(first + BATCH);
            let requests: String = numbers.clone().fold(String::new(), |mut text, number| {
                let _ = write!(text, "GET /{path} HTTP/1.1\r\nhost: a\r\n{}\r\n", header(number));
                text
            });
            if stream.write_all(requests.as_bytes()).is_err() {
                return Ok(());
            }
            for _ in numbers {
                let (mut host, mut length) = (0, 0);
                loop {
                    line.clear();
                    if lines.read_line(&mut line).unwrap_or(0) == 0 {
                        return Ok(());
                    }
                    match line.trim_end().split_once(": ") {
                        Some(("x-host", address)) => {
                            let address = address.split(':').next().unwrap_or_default();
                            let number = address.rsplit('.').next().unwrap_or_default();
                            host = number.parse().unwrap_or(0);
                        }
                        Some(("content-length", value)) => length = value.parse()?,
                        Some(_) => {}
                        None if line == "\r\n" => break,
                        None => {}
                    }
                }
                lines.by_ref().take(length).read_to_end(&mut Vec::new())?;
                hosts.push(host);
            }
        }
        Ok(())
    }

    fn distribution(&self, path: &str, requests: usize) -> Result<BTreeMap<u8, f64>> {
        let mut counts = BTreeMap::new();
        for host in self.ask(path, requests, |_| String::new())? {
            *counts.entry(host).or_insert(0.0) += 1.0;
        }
        Ok(counts)
    }
}

/// Chi-square of two samples of the same size, and the value that it passes with the probability of the level.
fn homogeneity(one: &BTreeMap<u8, f64>, two: &BTreeMap<u8, f64>) -> (f64, f64) {
    let mut all: Vec<_> = one.keys().chain(two.keys()).collect();
    all.sort_unstable();
    all.dedup();
    let of = |counts: &BTreeMap<u8, f64>, host: &u8| counts.get(host).copied().unwrap_or(0.0);
    let chi: f64 =
        all.iter().map(|host| (of(one, host) - of(two, host)).powi(2) / (of(one, host) + of(two, host))).sum();
    // Wilson and Hilferty.
    let freedom = (all.len().max(2) - 1) as f64;
    let part = 2.0 / (9.0 * freedom);
    (chi, freedom * (1.0 - part + LEVEL * part.sqrt()).powi(3))
}

#[test]
fn distributions_are_envoys() -> Result<()> {
    let (upstream, cases) = (upstream()?, cases());
    let culvert = Proxy::start(Kind::Culvert, &cases, upstream, "")?;
    let envoy = Proxy::start(Kind::Envoy, &cases, upstream, "")?;
    compare(&culvert, &envoy, &cases)?;
    for (proxy, cluster) in [(&culvert, "panic"), (&envoy, "panic")] {
        let panics = proxy.daemon.stats()?.get(&format!("cluster.{cluster}.lb_healthy_panic"));
        ensure!(panics == REQUESTS as u64, "{:?}: {panics} panics", proxy.kind);
    }
    Ok(())
}

/// Distributions of every case on both proxies, which must be alike.
fn compare(culvert: &Proxy, envoy: &Proxy, cases: &[Case]) -> Result<()> {
    let mut different = Vec::new();
    for case in cases {
        let (ours, theirs) = (culvert.distribution(case.name, REQUESTS)?, envoy.distribution(case.name, REQUESTS)?);
        let (chi, limit) = homogeneity(&ours, &theirs);
        println!("{}: chi-square {chi:.1} of {limit:.1}; {ours:?}, Envoy {theirs:?}", case.name);
        if chi > limit {
            different.push(format!("{}: chi-square {chi:.1} > {limit:.1}: {ours:?}, Envoy {theirs:?}", case.name));
        }
    }
    ensure!(different.is_empty(), "{}", different.join("\n"));
    Ok(())
}

#[test]
fn hashes_choose_the_very_same_hosts() -> Result<()> {
    let upstream = upstream()?;
    let hashed = "hash_policy: [{header: {header_name: x-key}}]";
    let spread = || {
        vec![
            group("a", 3, 0, &[(1, 1, OK), (2, 4, OK), (3, 1, BAD), (4, 2, BAD)]),
            group("b", 1, 0, &[(5, 1, OK), (6, 1, BAD), (7, 3, SLOW)]),
            group("a", 1, 1, &[(8, 1, OK), (9, 2, OK)]),
        ]
    };
    let cases = [
        ("ring", "lb_policy: RING_HASH".to_owned()),
        ("maglev_zones", "lb_policy: MAGLEV\n    common_lb_config: {locality_weighted_lb_config: {}}".to_owned()),
        ("maglev", typed("Maglev", "table_size: 1009, consistent_hashing_lb_config: {hash_balance_factor: 110}")),
        ("ring_zones", typed("RingHash", "hash_function: MURMUR_HASH_2, locality_weighted_lb_config: {}")),
    ];
    let own = "consistent_hashing_lb_config: {hash_policy: [{query_parameter: {name: none}}, {header: {header_name: x-key}}]}";
    let own = [("own_maglev", typed("Maglev", own)), ("own_ring", typed("RingHash", own))];
    // What the route says does not count then.
    let other = "hash_policy: [{header: {header_name: x-other}}]";
    let cases: Vec<_> = (cases.into_iter().map(|case| (hashed, case)))
        .chain(own.into_iter().map(|case| (other, case)))
        .map(|(route, (name, fields))| Case { route, ..case(name, fields, spread()) })
        .collect();
    let culvert = Proxy::start(Kind::Culvert, &cases, upstream, "")?;
    let envoy = Proxy::start(Kind::Envoy, &cases, upstream, "")?;
    for (number, case) in cases.iter().enumerate() {
        // All keys of the first two, and enough of the others.
        let keys = if number < 2 { KEYS } else { KEYS / 5 };
        let key = |number: usize| format!("x-key: key-{number}\r\n");
        let (ours, theirs) = (culvert.ask(case.name, keys, key)?, envoy.ask(case.name, keys, key)?);
        let differs = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
        if let Some(at) = differs {
            let count = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs).count();
            anyhow::bail!(
                "{}: {count} keys differ; key-{at} goes to {}, with Envoy to {}",
                case.name,
                ours[at],
                theirs[at]
            );
        }
        let used: std::collections::BTreeSet<_> = ours.iter().collect();
        ensure!(used.len() >= 3, "{}: only {used:?} are used", case.name);
    }
    Ok(())
}

/// Zone-aware routing: this node is in zone a, with as many of its own cluster as the numbers of hosts say.
#[test]
fn zones_are_kept_as_far_as_they_can() -> Result<()> {
    let upstream = upstream()?;
    let head = "node: {id: node-1, cluster: test, locality: {region: r, zone: a}}\n\
                cluster_manager: {local_cluster_name: local}";
    let three = |a: &[u8], b: &[u8], c: &[u8]| {
        let hosts = |numbers: &[u8]| numbers.iter().map(|number| (*number, 1, OK)).collect::<Vec<_>>();
        vec![group("a", 1, 0, &hosts(a)), group("b", 1, 0, &hosts(b)), group("c", 1, 0, &hosts(c))]
    };
    let few = "common_lb_config: {zone_aware_lb_config: {min_cluster_size: {value: 20}}}";
    let half = "common_lb_config: {zone_aware_lb_config: {routing_enabled: {value: 50}}}";
    let forced = "locality_lb_config: {zone_aware_lb_config: {force_local_zone: {min_size: 1}}}";
    let heavy = "locality_lb_config: {zone_aware_lb_config: {locality_basis: HEALTHY_HOSTS_WEIGHT}}";
    let cases = [
        case("local", "", three(&[1, 2], &[3, 4], &[5])),
        case("direct", "", three(&[1, 2, 3, 4], &[5, 6], &[7])),
        case("residual", "", three(&[1], &[2, 3, 4, 5], &[6, 7, 8])),
        case("nothing_here", "", three(&[], &[2, 3, 4, 5], &[6, 7, 8])),
        case("too_small", few, three(&[1, 2, 3, 4], &[5, 6], &[7])),
        case("half", half, three(&[1, 2, 3, 4], &[5, 6], &[7])),
        case("forced", typed("Random", forced), three(&[1], &[2, 3, 4, 5], &[6, 7, 8])),
        case("by_weight", typed("LeastRequest", heavy), three(&[1], &[2, 3, 4, 5], &[6, 7, 8])),
    ];
    let culvert = Proxy::start(Kind::Culvert, &cases, upstream, head)?;
    let envoy = Proxy::start(Kind::Envoy, &cases, upstream, head)?;
    compare(&culvert, &envoy, &cases)?;
    let stat = |proxy: &Proxy, name: &str| -> Result<u64> { Ok(proxy.daemon.stats()?.get(name)) };
    for (cluster, name) in [("direct", "lb_zone_routing_all_directly"), ("forced", "lb_zone_routing_all_directly")] {
        let name = format!("cluster.{cluster}.{name}");
        let (ours, theirs) = (stat(&culvert, &name)?, stat(&envoy, &name)?);
        ensure!(ours == theirs && ours == REQUESTS as u64, "{name}: {ours}, Envoy {theirs}");
    }
    let name = "cluster.residual.lb_zone_routing_cross_zone";
    ensure!(stat(&culvert, name)? > 0 && stat(&envoy, name)? > 0, "{name}");
    let name = "cluster.too_small.lb_zone_cluster_too_small";
    ensure!(stat(&culvert, name)? > 0 && stat(&envoy, name)? > 0, "{name}");
    Ok(())
}

/// Hosts with metadata, and hosts that are worth nothing.
fn labelled() -> Vec<Group> {
    let hosts = vec![
        (1, 1, OK, "stage: prod, version: v1"),
        (2, 1, OK, "stage: prod, version: v2"),
        (3, 2, OK, "stage: prod, version: v2"),
        (4, 1, OK, "stage: dev, version: v1, kind: [a, b]"),
        (5, 1, BAD, "stage: dev, version: v2"),
        (6, 1, OK, "kind: a, number: 7"),
        (7, 1, OK, ""),
    ];
    let more = vec![(8, 1, OK, "stage: prod, version: v2"), (9, 1, OK, "stage: old")];
    vec![
        Group { zone: "a", zone_weight: 1, priority: 0, hosts },
        Group { zone: "b", zone_weight: 3, priority: 0, hosts: more },
    ]
}

fn subset(name: &'static str, rest: &str, asked: &str) -> Case {
    let fields = format!("lb_subset_config: {{{rest}}}");
    let route = format!("metadata_match: {{filter_metadata: {{envoy.lb: {{{asked}}}}}}}");
    let route = if asked.is_empty() { "" } else { route.leak() };
    Case { route, ..case(name, fields, labelled()) }
}

#[test]
fn subsets_are_envoys() -> Result<()> {
    let upstream = upstream()?;
    let by = "subset_selectors: [{keys: [stage, version]}, {keys: [stage]}]";
    let with = |rest: &str| format!("{by}, {rest}");
    let list = "fallback_list: [{stage: none}, {stage: dev}, {stage: prod}]";
    let single = "subset_selectors: [{keys: [version], single_host_per_subset: true}], fallback_policy: NO_FALLBACK";
    let own = |policy: &str| {
        format!(
            "fallback_policy: ANY_ENDPOINT, default_subset: {{stage: prod}}, subset_selectors: [{{keys: [stage, version], {policy}}}, {{keys: [stage]}}]"
        )
    };
    let typed_subset = typed(
        "Subset",
        "allow_redundant_keys: true, subset_selectors: [{keys: [version]}], subset_lb_policy: {policies: \
         [{typed_extension_config: {name: z, typed_config: {\"@type\": \
         type.googleapis.com/envoy.extensions.load_balancing_policies.random.v3.Random}}}]}",
    );
    let cases = [
        subset("both", by, "stage: prod, version: v2"),
        subset("one_key", by, "stage: prod"),
        subset("panics_within", by, "stage: dev, version: v2"),
        subset("unknown_key", &with("fallback_policy: ANY_ENDPOINT"), "colour: red"),
        subset("nothing_asked", &with("fallback_policy: ANY_ENDPOINT"), ""),
        subset("default", &with("fallback_policy: DEFAULT_SUBSET, default_subset: {stage: prod}"), "stage: none"),
        subset(
            "panic_any",
            &with("fallback_policy: DEFAULT_SUBSET, default_subset: {a: b}, panic_mode_any: true"),
            "stage: x",
        ),
        subset("lists", "list_as_any: true, subset_selectors: [{keys: [kind]}]", "kind: a"),
        subset("no_lists", "subset_selectors: [{keys: [kind]}]", "kind: a"),
        subset("numbers", "subset_selectors: [{keys: [number]}]", "number: 7"),
        subset("single", single, "version: v2"),
        subset("fallback_list", &with("metadata_fallback_policy: FALLBACK_LIST"), list),
        subset("own_default", &own("fallback_policy: DEFAULT_SUBSET"), "stage: prod, version: v9"),
        subset(
            "own_keys",
            &own("fallback_policy: KEYS_SUBSET, fallback_keys_subset: [stage]"),
            "stage: dev, version: v9",
        ),
        Case {
            fields: "lb_subset_config: {subset_selectors: [{keys: [stage]}], locality_weight_aware: true, \
                     scale_locality_weight: true}\n    common_lb_config: {locality_weighted_lb_config: {}}",
            ..subset("scaled", "", "stage: prod")
        },
        Case {
            fields: "lb_subset_config: {subset_selectors: [{keys: [stage]}], locality_weight_aware: true}\n    \
                     common_lb_config: {locality_weighted_lb_config: {}}",
            ..subset("localities", "", "stage: prod")
        },
        Case { fields: typed_subset.leak(), ..subset("redundant", "", "colour: red, version: v2") },
    ];
    let nowhere = [
        subset("no_fallback", by, "stage: none"),
        subset("own_none", &own("fallback_policy: NO_FALLBACK"), "stage: prod, version: v9"),
    ];
    let counted = cases.len();
    let cases: Vec<_> = cases.into_iter().chain(nowhere).collect();
    let culvert = Proxy::start(Kind::Culvert, &cases, upstream, "")?;
    let envoy = Proxy::start(Kind::Envoy, &cases, upstream, "")?;
    compare(&culvert, &envoy, &cases[..counted])?;
    for (proxy, case) in
        [&culvert, &envoy].into_iter().flat_map(|proxy| cases[counted..].iter().map(move |it| (proxy, it)))
    {
        ensure!(proxy.ask(case.name, 1, |_| String::new())? == [0], "{:?}: {} has a host", proxy.kind, case.name);
    }
    let (ours, theirs) = (culvert.daemon.stats()?, envoy.daemon.stats()?);
    let mut different = Vec::new();
    for case in &cases {
        for stat in ["selected", "fallback", "fallback_panic", "active", "single_host_per_subset_duplicate"] {
            let name = format!("cluster.{}.lb_subsets_{stat}", case.name);
            if ours.get(&name) != theirs.get(&name) {
                different.push(format!("{name}: {}, Envoy {}", ours.get(&name), theirs.get(&name)));
            }
        }
    }
    ensure!(different.is_empty(), "{}", different.join("\n"));
    Ok(())
}

/// Retries leave the priority that failed, and requests may name their hosts.
#[test]
fn retries_and_requests_choose_hosts() -> Result<()> {
    let upstream = upstream()?;
    // Nothing listens on the ports of these addresses: the server is on 127.0.1.x.
    let refused = free_port()?;
    let priority = "retry_policy: {retry_on: connect-failure, num_retries: 3, retry_priority: {name: \
                    envoy.retry_priorities.previous_priorities, typed_config: {\"@type\": \
                    type.googleapis.com/envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig, \
                    update_frequency: 1}}}";
    let named = typed(
        "OverrideHost",
        "override_host_sources: [{header: x-wanted}], fallback_policy: {policies: [{typed_extension_config: {name: z, \
         typed_config: {\"@type\": \
         type.googleapis.com/envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin}}}]}",
    );
    let cases = [
        Case { route: priority, ..case("previous", "", priorities(&["h", "h", "h"])) },
        case("named", named, weighted(&[1, 1, 1])),
    ];
    let head = "";
    let start = |kind| -> Result<Proxy> {
        let port = free_port()?;
        let yaml = bootstrap(&cases, port, upstream, head);
        // The first two priorities refuse connections.
        let one = format!("address: 127.0.1.1, port_value: {upstream}");
        let two = format!("address: 127.0.1.2, port_value: {upstream}");
        let yaml = yaml.replacen(&one, &format!("address: 127.0.1.1, port_value: {refused}"), 1);
        let yaml = yaml.replacen(&two, &format!("address: 127.0.1.2, port_value: {refused}"), 1);
        Ok(Proxy { kind, daemon: Daemon::start(kind, &yaml)?, port })
    };
    for proxy in [start(Kind::Culvert)?, start(Kind::Envoy)?] {
        let hosts = proxy.ask("previous", 50, |_| String::new())?;
        ensure!(hosts.iter().all(|host| *host == 3), "{:?}: {hosts:?}", proxy.kind);
        let stats = proxy.daemon.stats()?;
        ensure!(stats.get("cluster.previous.upstream_rq_retry") == 100, "{:?}", proxy.kind);
        let wanted = |list: &str| proxy.ask("named", 6, |_| format!("x-wanted: {list}\r\n"));
        let second = format!("127.0.1.2:{upstream}");
        let hosts = wanted(&second)?;
        ensure!(hosts == [2; 6], "{:?}: {hosts:?}", proxy.kind);
        let hosts = wanted(&format!("127.9.9.9:1, {second} ,127.0.1.1:{upstream}"))?;
        ensure!(hosts == [2; 6], "{:?}: {hosts:?}", proxy.kind);
        let mut hosts = wanted("nobody")?;
        hosts.sort_unstable();
        ensure!(hosts == [1, 1, 2, 2, 3, 3], "{:?}: {hosts:?}", proxy.kind);
    }
    Ok(())
}
