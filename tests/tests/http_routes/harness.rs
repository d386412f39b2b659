//! Gives the same routes and requests to Envoy and culvertd, and compares.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, fetch_raw, free_port};
use culvert_tests::wait_until;

use super::http2;
use super::upstream::{self, Seen};

/// Headers whose values are a proxy's own: only that they are there is compared.
const OWN_VALUES: [&str; 4] =
    ["date", "x-envoy-upstream-service-time", "x-request-id", "x-envoy-expected-rq-timeout-ms"];

/// How many requests are under way at a time at each proxy.
const AT_A_TIME: usize = 8;

/// Routes, and the requests to them.
#[derive(Debug, Clone, Default)]
pub struct Case {
    name: &'static str,
    /// A list of routes; or of virtual hosts, where `hosts`.
    yaml: String,
    hosts: bool,
    requests: Vec<String>,
    /// Further fields of the virtual host, of the route configuration, of the connection manager: lines `field: value`.
    of_host: String,
    of_config: String,
    of_manager: String,
    /// How many requests the services must have seen before they are asked what they saw.
    settle: usize,
    /// Why culvertd answers otherwise.
    differs: Option<&'static str>,
}

/// A case of routes, which get a virtual host of their own.
///
/// In the YAML `$a`, `$b`, `$c` stand for a route to that service, and `$1` to `$9` for an answer with that number. A request is
/// `GET /path`, and a line for each header; after an empty line comes its body. `CONNECTION` and a line's end before it makes it a
/// whole connection, in pieces (see `follow`), in which `$host` is the case's.
pub fn case(name: &'static str, routes: &str, requests: &[&str]) -> Case {
    let requests = requests.iter().map(|request| (*request).to_owned()).collect();
    Case { name, yaml: routes.to_owned(), requests, ..Case::default() }
}

impl Case {
    /// The YAML is a list of virtual hosts, which get a listener of their own. Requests name their host.
    pub fn hosts(mut self) -> Case {
        self.hosts = true;
        self
    }

    /// A line `field: value` of the virtual host.
    pub fn of_host(mut self, line: &str) -> Case {
        self.of_host += &format!("{line}\n");
        self
    }

    /// A line `field: value` of the route configuration; cases with the same ones share a listener.
    pub fn of_config(mut self, line: &str) -> Case {
        self.of_config += &format!("{line}\n");
        self
    }

    /// A line `field: value` of the connection manager; cases with the same ones share a listener.
    pub fn of_manager(mut self, line: &str) -> Case {
        self.of_manager += &format!("{line}\n");
        self
    }

    /// The services see so many requests for each of the case's requests, some of them perhaps after the client's answer.
    pub fn settle(mut self, requests: usize) -> Case {
        self.settle = requests;
        self
    }

    /// culvertd answers otherwise than Envoy, on purpose.
    pub fn differs(mut self, why: &'static str) -> Case {
        self.differs = Some(why);
        self
    }

    /// Cases that share one share a listener.
    fn listener(&self, index: usize) -> (String, String, Option<usize>) {
        (self.of_config.clone(), self.of_manager.clone(), self.hosts.then_some(index))
    }
}

/// A proxy, its services, and the ports of its listeners.
struct Stage {
    proxy: Daemon,
    seen: Arc<Seen>,
    /// By case.
    ports: Vec<u16>,
    /// The ports of its services and listeners, and what they are shown as.
    names: Vec<(String, &'static str)>,
}

impl Stage {
    fn start(kind: Kind, cases: &[Case]) -> Result<Stage> {
        let seen = Arc::new(Seen::default());
        let (mut names, mut ports_of) = (Vec::new(), Vec::new());
        let mut clusters = "  - {name: empty, type: STATIC, load_assignment: {cluster_name: empty}}\n".to_owned();
        for name in ["a", "b", "c", "dead"] {
            let port = if name == "dead" { free_port()? } else { upstream::start(name, Arc::clone(&seen))? };
            names.push((port.to_string(), "SERVICE"));
            clusters += &cluster(name, port);
            ports_of.push(port);
        }
        clusters += &hashed(&ports_of[..3]);
        for (name, budget) in [
            ("no-retries", "{budget_percent: {value: 0}, min_retry_concurrency: 0}"),
            ("all-retries", "{budget_percent: {value: 0}, min_retry_concurrency: 100}"),
            ("recent", "{budget_percent: {value: 25}, min_retry_concurrency: 0, budget_interval: 1s}"),
        ] {
            let budget = format!("retry_budget: {budget}");
            clusters += &cluster(name, ports_of[0]).replace("max_retries: 100", &budget);
        }
        let port = http2::start("h2", Arc::clone(&seen))?;
        names.push((port.to_string(), "SERVICE"));
        clusters += &cluster("h2", port);
        clusters += "    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                     type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                     {http2_protocol_options: {}}}}\n";
        clusters += &cluster("brief", ports_of[0]);
        clusters += "    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                     type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, common_http_protocol_options: \
                     {max_stream_duration: 1s}, explicit_http_config: {http_protocol_options: {}}}}\n";
        let mut listeners: BTreeMap<_, (u16, String)> = BTreeMap::new();
        let mut ports = Vec::new();
        for (index, case) in cases.iter().enumerate() {
            let (port, hosts) = match listeners.entry(case.listener(index)) {
                std::collections::btree_map::Entry::Occupied(known) => known.into_mut(),
                std::collections::btree_map::Entry::Vacant(new) => new.insert((free_port()?, String::new())),
            };
            ports.push(*port);
            *hosts += &virtual_hosts(case, index);
        }
        let mut yaml = "static_resources:\n  listeners:\n".to_owned();
        for ((config, manager, _), (port, hosts)) in &listeners {
            names.push((port.to_string(), "PORT"));
            yaml += &listener(*port, config, manager, hosts);
        }
        yaml += &format!("  clusters:\n{clusters}");
        Ok(Stage { proxy: Daemon::start(kind, &yaml)?, seen, ports, names })
    }

    /// What a client and the services see of one request.
    fn outcome(&self, case: &Case, index: usize, request: usize) -> Result<String> {
        let id = format!("{index}-{request}");
        if let Some(script) = case.requests[request].strip_prefix("CONNECTION\n") {
            let text = follow(self.ports[index], &script.replace("$host", &format!("case-{index}.test")));
            return Ok(text.unwrap_or_else(|error| format!("{error:#}\n")));
        }
        let bytes = bytes(&case.requests[request], index, &id);
        let method = bytes.split(' ').next().unwrap_or_default();
        let mut text = if case.requests[request].contains("\nupgrade:") {
            converse(self.ports[index], &bytes).unwrap_or_else(|error| format!("{error:#}\n"))
        } else {
            self.fetch(index, &bytes, method)
        };
        let seen = match case.settle {
            0 => self.seen.of(&id),
            wanted => wait_until(Duration::from_secs(3), "the services to see the requests", || {
                Some(self.seen.of(&id)).filter(|seen| seen.len() >= wanted).context("too few")
            })
            .unwrap_or_else(|_| self.seen.of(&id)),
        };
        let mut seen = seen;
        if case.settle > 0 {
            seen.sort();
        }
        text += &seen.join("\n");
        for (port, name) in &self.names {
            text = text.replace(port, name);
        }
        Ok(text)
    }

    /// The counters and gauges that are not 0 and whose names hold one of `parts`.
    fn counted(&self, parts: &[&str]) -> Result<Vec<String>> {
        if parts.is_empty() {
            return Ok(Vec::new());
        }
        let stats = self.proxy.stats()?;
        // Those of listeners have their ports in their names.
        let counts = |name: &str| !name.starts_with("listener.") && stats.get(name) > 0;
        let wanted = |name: &&str| parts.iter().any(|part| name.contains(part)) && counts(name);
        Ok(stats.names().filter(wanted).map(|name| format!("{name}: {}", stats.get(name))).collect())
    }

    /// What a client sees.
    fn fetch(&self, index: usize, bytes: &str, method: &str) -> String {
        match fetch_raw(self.ports[index], bytes.as_bytes(), method) {
            Ok(response) => {
                let mut headers: Vec<_> = response.headers.0.iter().map(|(name, value)| shown(name, value)).collect();
                headers.sort_by(|a, b| a.split(':').next().cmp(&b.split(':').next()));
                // What the answer to a GET would be framed by: Envoy says chunked where there is nothing, too.
                headers.retain(|header| method != "HEAD" || !header.starts_with("transfer-encoding"));
                let body = match response.body.len() {
                    0..2000 => format!("{:?}", response.text()),
                    bytes => format!("of {bytes} bytes"),
                };
                format!("status {} {}\n{}\nbody {body}\n", response.status, response.reason, headers.join("\n"))
            }
            Err(_) => "no response\n".to_owned(),
        }
    }

    /// The outcomes of all requests of all cases.
    fn outcomes(&self, cases: &[Case]) -> Vec<Vec<String>> {
        let all: Vec<_> = cases
            .iter()
            .enumerate()
            .flat_map(|(index, case)| (0..case.requests.len()).map(move |request| (index, request)))
            .collect();
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            while let Some((index, request)) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                let outcome = self.outcome(&cases[*index], *index, *request);
                done.push((*index, *request, outcome.unwrap_or_else(|error| format!("{error:#}"))));
            }
            done
        };
        let mut outcomes: Vec<Vec<String>> =
            cases.iter().map(|case| vec![String::new(); case.requests.len()]).collect();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_A_TIME).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                for (index, request, outcome) in worker.join().unwrap_or_default() {
                    outcomes[index][request] = outcome;
                }
            }
        });
        outcomes
    }
}

/// Fails with all cases in which the two differ.
pub fn compare(cases: Vec<Case>) -> Result<()> {
    compare_counting(cases, &[])
}

/// As [`compare`]; the counters and gauges whose names hold one of `parts` must be the same, too.
pub fn compare_counting(cases: Vec<Case>, parts: &[&str]) -> Result<()> {
    // For work on one case.
    let only = std::env::var("ONLY").unwrap_or_default();
    let cases: Vec<_> = cases.into_iter().filter(|case| case.name.contains(&only)).collect();
    let (envoy, culvert) = thread::scope(|scope| {
        let run = |kind| {
            let cases = &cases;
            scope.spawn(move || -> Result<_> {
                let stage = Stage::start(kind, cases)?;
                let outcomes = stage.outcomes(cases);
                Ok((outcomes, stage))
            })
        };
        let (envoy, culvert) = (run(Kind::Envoy), run(Kind::Culvert));
        (envoy.join(), culvert.join())
    });
    let ended = |_| anyhow::anyhow!("a thread panicked");
    let ((expected, envoy), (seen, culvert)) = (envoy.map_err(ended)??, culvert.map_err(ended)??);
    let mut problems = Vec::new();
    let mut counted = (Vec::new(), Vec::new());
    let same = wait_until(Duration::from_secs(3), "the same counters", || {
        counted = (envoy.counted(parts)?, culvert.counted(parts)?);
        ensure!(counted.0 == counted.1);
        Ok(())
    });
    if same.is_err() {
        let only = |a: &[String], b: &[String]| a.iter().filter(|line| !b.contains(line)).cloned().collect::<Vec<_>>();
        let (envoy, culvert) = (only(&counted.0, &counted.1), only(&counted.1, &counted.0));
        problems.push(format!("--- counters\nEnvoy:\n{}\nculvertd:\n{}\n", envoy.join("\n"), culvert.join("\n")));
    }
    let mut count = 0;
    for ((case, expected), seen) in cases.iter().zip(&expected).zip(&seen) {
        count += expected.len();
        let same = expected == seen;
        match case.differs {
            Some(why) if same => problems.push(format!("--- {}: the same by now, not: {why}", case.name)),
            None if !same => {
                for ((request, expected), seen) in case.requests.iter().zip(expected).zip(seen) {
                    if expected != seen {
                        let name = case.name;
                        problems.push(format!("--- {name}: {request}\nEnvoy:\n{expected}\nculvertd:\n{seen}\n"));
                    }
                }
            }
            _ => {}
        }
    }
    ensure!(problems.is_empty(), "{} of {count} requests differ:\n{}", problems.len(), problems.join("\n"));
    Ok(())
}

/// What a client sees on one connection, and in which second that ends. The pieces between `|` are sent as they are, but for their
/// ends of lines; `wait 300` waits so many milliseconds.
fn follow(port: u16, script: &str) -> Result<String> {
    let started = Instant::now();
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(6)))?;
    let mut reader = stream.try_clone()?;
    let reading = thread::spawn(move || {
        let mut read = Vec::new();
        let ended = match reader.read_to_end(&mut read) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => "open".to_owned(),
            _ => format!("ended in second {}", started.elapsed().as_secs()),
        };
        (read, ended)
    });
    for piece in script.split('|') {
        match piece.strip_prefix("wait ").and_then(|time| time.parse().ok()) {
            Some(time) => thread::sleep(Duration::from_millis(time)),
            // It may be too late for that.
            None => drop(stream.write_all(piece.replace('\n', "\r\n").as_bytes())),
        }
    }
    let (read, ended) = reading.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    let text = String::from_utf8_lossy(&read).into_owned();
    // The order of headers is a proxy's own.
    let heads = text.split("\r\n\r\n").map(|head| {
        let line = |line: &str| line.split_once(": ").map_or(line.to_owned(), |(name, value)| shown(name, value));
        let mut lines: Vec<_> = head.split("\r\n").map(line).collect();
        lines.sort();
        lines.join("\n")
    });
    let heads: Vec<_> = heads.collect();
    Ok(format!("{}\n{ended}\n", heads.join("\n\n")))
}

/// What a client sees that asks for another protocol. The request's body is what it says then: the pieces between `|`, each once the
/// one before it has come back; `end` closes its side.
fn converse(port: u16, request: &str) -> Result<String> {
    let (head, body) = request.split_once("\r\n\r\n").context("a request has a head")?;
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(3)))?;
    stream.write_all(format!("{head}\r\n\r\n").as_bytes())?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        ensure!(reader.read_line(&mut line)? > 0, "closed before the response");
        match line.trim_end() {
            "" => break,
            line => lines.push(line.split_once(": ").map_or(line.to_owned(), |(name, value)| shown(name, value))),
        }
    }
    let mut text = lines.remove(0);
    lines.sort();
    text += &format!("\n{}\n", lines.join("\n"));
    if text.contains(" 101 ") {
        for piece in body.split('|').filter(|piece| !piece.is_empty()) {
            if piece == "end" {
                stream.shutdown(Shutdown::Write)?;
                break;
            }
            stream.write_all(piece.as_bytes())?;
            let mut answer = vec![0; piece.len()];
            reader.read_exact(&mut answer).context("no answer to a piece")?;
            text += &format!("{}\n", String::from_utf8_lossy(&answer));
        }
    }
    let mut rest = Vec::new();
    let ended = match reader.read_to_end(&mut rest) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => "open",
        _ => "closed",
    };
    Ok(format!("{text}{} {ended}\n", String::from_utf8_lossy(&rest)))
}

/// A header as it is compared.
pub fn shown(name: &str, value: &str) -> String {
    let name = name.to_lowercase();
    // A request id like this comes from a case.
    let own = OWN_VALUES.contains(&name.as_str()) && !value.starts_with("12345678-");
    // A cookie that is made of ports.
    let hash = |text: &&str| text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if let Some(hash) = value.split('"').nth(1).filter(hash).filter(|_| name == "set-cookie") {
        return format!("{name}: {}", value.replace(hash, "HASH"));
    }
    if own { name } else { format!("{name}: {value}") }
}

fn bytes(request: &str, index: usize, id: &str) -> String {
    let (head, body) = request.split_once("\n\n").unwrap_or((request, ""));
    let (line, headers) = head.split_once('\n').unwrap_or((head, ""));
    let mut bytes = format!("{line} HTTP/1.1\r\n");
    if !headers.lines().any(|header| header.starts_with("host:")) {
        bytes += &format!("host: case-{index}.test\r\n");
    }
    for header in headers.lines() {
        bytes += &format!("{header}\r\n");
    }
    if !body.is_empty() && !headers.contains("upgrade:") {
        bytes += &format!("content-length: {}\r\n", body.len());
    }
    let connection = if headers.contains("connection:") { "" } else { "connection: close\r\n" };
    bytes + &format!("x-id: {id}\r\n{connection}\r\n{body}")
}

fn virtual_hosts(case: &Case, index: usize) -> String {
    let mut yaml = case.yaml.clone();
    for service in ["a", "b", "c"] {
        yaml = yaml.replace(&format!("${service}"), &format!("route: {{cluster: {service}}}"));
    }
    for number in 1..=9 {
        let answer = format!("direct_response: {{status: 200, body: {{inline_string: \"{number}\"}}}}");
        yaml = yaml.replace(&format!("${number}"), &answer);
    }
    if case.hosts {
        return indent(&yaml, 12);
    }
    let host = format!("- name: case-{index}\n  domains: [\"case-{index}.test\"]\n");
    host_with(&host, &case.of_host, &yaml)
}

fn host_with(host: &str, fields: &str, routes: &str) -> String {
    indent(host, 12) + &indent(fields, 14) + &indent("routes:", 14) + &indent(routes, 14)
}

fn cluster(name: &str, port: u16) -> String {
    format!(
        "  - name: {name}\n    type: STATIC\n    connect_timeout: 10s\n    circuit_breakers: {{thresholds: \
         [{{max_retries: 100}}]}}\n    load_assignment:\n      cluster_name: {name}\n      \
         endpoints: [{{lb_endpoints: [{{endpoint: {{hostname: {name}.service, address: {{socket_address: {{address: \
         127.0.0.1, port_value: {port}}}}}}}}}]}}]\n"
    )
}

/// Clusters of the first three services that go by hashes. What is hashed of a host is not its port: that is another for each proxy.
fn hashed(ports: &[u16]) -> String {
    let labels = [
        "hash_key: first, canary: true, kind: slow, number: 2",
        "hash_key: second, kind: slow, number: 3, zones: [z1, z2]",
        "hash_key: third, canary: false, kind: fast, zones: [z3]",
    ];
    let keyed = |index: usize| format!("metadata: {{filter_metadata: {{envoy.lb: {{{}}}}}}}, ", labels[index]);
    let host = |index: usize, rest: &str| {
        format!(
            "{{{rest}endpoint: {{hostname: host-{index}, address: {{socket_address: {{address: 127.0.0.1, port_value: \
             {}}}}}}}}}",
            ports[index]
        )
    };
    let cluster = |name: &str, policy: &str, hosts: Vec<String>| {
        format!(
            "  - {{name: {name}, connect_timeout: 1s, {policy}, circuit_breakers: {{thresholds: [{{max_retries: \
             100}}]}}, load_assignment: {{cluster_name: {name}, endpoints: [{{lb_endpoints: [{}]}}]}}}}\n",
            hosts.join(", ")
        )
    };
    let all = |with: &dyn Fn(usize) -> String| (0..3).map(|index| host(index, &with(index))).collect::<Vec<_>>();
    let weights = ["1", "2", "5"];
    let weighted = |index: usize| format!("load_balancing_weight: {}, ", weights[index]);
    [
        cluster("ring", "lb_policy: RING_HASH", all(&keyed)),
        cluster("alone", "lb_policy: RING_HASH", vec![host(0, "")]),
        cluster(
            "small-ring",
            "lb_policy: RING_HASH, ring_hash_lb_config: {minimum_ring_size: 4, maximum_ring_size: 10}",
            all(&keyed),
        ),
        cluster(
            "murmur",
            "lb_policy: RING_HASH, ring_hash_lb_config: {minimum_ring_size: 100, hash_function: MURMUR_HASH_2}",
            all(&|index| keyed(index) + &weighted(index)),
        ),
        cluster("maglev", "lb_policy: MAGLEV", all(&keyed)),
        cluster(
            "small-maglev",
            "type: STRICT_DNS, lb_policy: MAGLEV, maglev_lb_config: {table_size: 17}, common_lb_config: {consistent_hashing_lb_config: \
             {use_hostname_for_hashing: true}}",
            all(&weighted),
        ),
    ]
    .concat()
}

fn listener(port: u16, config: &str, manager: &str, hosts: &str) -> String {
    let (config, manager) = (indent(config, 12), indent(manager, 10));
    format!(
        r#"  - name: http_{port}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
{manager}          route_config:
            name: local
{config}            virtual_hosts:
{hosts}          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
"#
    )
}

/// Puts a block below a key: removes the indentation of its first line from every line and adds `width` blanks.
fn indent(block: &str, width: usize) -> String {
    let block = block.trim_start_matches('\n').trim_end();
    let own = block.len() - block.trim_start().len();
    block.lines().map(|line| format!("{:width$}{}\n", "", line.get(own..).unwrap_or_default())).collect()
}
