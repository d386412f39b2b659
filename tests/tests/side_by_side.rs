//! culvertd and the real Envoy on the same YAML: the same requests must bring the same answers, and show the services behind
//! them the same requests.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use culvert_tests::app::App;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, fetch_raw, free_port, scratch_dir};
use culvert_tests::http1::Response;
use serde_json::Value;

/// Headers whose values are a proxy's own: only that they are there is compared.
const OWN_VALUES: [&str; 3] = ["date", "x-envoy-upstream-service-time", "x-request-id"];

/// Cases in which culvertd is known to answer otherwise, and how. A case that no longer differs must leave the list.
const DIFFERENT_ANSWERS: [(&str, &str); 0] = [];

/// Stats of Envoy's that culvertd does not have, by the end of their names: what they count does not exist in it yet.
const MISSING_STATS: [&str; 3] = ["upstream_rq_0rtt", "downstream_rq_tx_reset", "upstream_rq_504"];

/// What is not counted here of every cluster: there is no HTTP/3, and what waits in buffers is not summed up.
const MISSING_OF_CLUSTERS: [&str; 6] = [
    "upstream_cx_connect_with_0_rtt",
    "upstream_cx_http3_total",
    "upstream_cx_rx_bytes_buffered",
    "upstream_cx_tx_bytes_buffered",
    "upstream_http3_broken",
    "upstream_rq_0rtt",
];

const ROUTES: &str = r#"
- name: hosts
  domains: ["exact.example", "*.suffix.example", "prefix.*"]
  routes:
  - {match: {prefix: /}, direct_response: {status: 200, body: {inline_string: "by host\n"}}}
- name: all
  domains: ["*"]
  routes:
  - {match: {path: /exact}, direct_response: {status: 200, body: {inline_string: "exact\n"}}}
  - {match: {path: /created}, direct_response: {status: 201}}
  - {match: {path: /bad}, direct_response: {status: 400, body: {inline_string: "no"}}}
  - {match: {path: /empty}, direct_response: {status: 503}}
  - {match: {prefix: /to-https}, redirect: {https_redirect: true}}
  - {match: {prefix: /to-host}, redirect: {host_redirect: other.example, response_code: FOUND}}
  - {match: {prefix: /to-path}, redirect: {path_redirect: /new, response_code: TEMPORARY_REDIRECT, strip_query: true}}
  - {match: {prefix: /to-prefix}, redirect: {prefix_rewrite: /elsewhere, response_code: PERMANENT_REDIRECT}}
  - {match: {prefix: /dead}, route: {cluster: dead}}
  - {match: {prefix: /empty-cluster}, route: {cluster: empty}}
  - {match: {prefix: /slow}, route: {cluster: app, timeout: 0.2s}}
  - match: {prefix: /header, headers: [{name: x-version, string_match: {exact: "2"}}]}
    direct_response: {status: 200, body: {inline_string: "version 2\n"}}
  - match: {prefix: /header, headers: [{name: x-any, present_match: true}]}
    direct_response: {status: 200, body: {inline_string: "any\n"}}
  - {match: {prefix: /app}, route: {cluster: app}}
"#;

struct Case {
    name: &'static str,
    request: String,
}

fn case(name: &'static str, request: &str) -> Case {
    Case { name, request: request.replace('\n', "\r\n") }
}

fn cases() -> Vec<Case> {
    let get = |name, target: &str, headers: &str| {
        let host = if headers.to_lowercase().contains("host:") { "" } else { "host: test.example\n" };
        case(name, &format!("GET {target} HTTP/1.1\n{host}{headers}connection: close\n\n"))
    };
    vec![
        get("a cluster's answer", "/app?a=b&c", ""),
        get("request headers pass", "/app", "X-Mixed-Case: Value\nx-empty: \ncookie: a=b\ncookie: c=d\n"),
        get(
            "hop-by-hop headers stay here",
            "/app",
            "keep-alive: timeout=5\nproxy-connection: keep-alive\nte: trailers\n",
        ),
        get(
            "x-forwarded-for and -proto from the client",
            "/app",
            "x-forwarded-for: 192.0.2.1\nx-forwarded-proto: https\n",
        ),
        get("a request id from the client", "/app", "x-request-id: 12345678-1234-4234-8234-123456789012\n"),
        get(
            "Envoy's own headers from the client",
            "/app",
            "x-envoy-internal: true\nx-envoy-expected-rq-timeout-ms: 7\n",
        ),
        get("a percent-encoded path", "/app/%41%2f%2F/x%20y", ""),
        get("dots in a path", "/app/../app/./x//y", ""),
        case("a body", "POST /app HTTP/1.1\nhost: test.example\ncontent-length: 5\nconnection: close\n\nhello"),
        case(
            "a chunked body",
            "POST /app HTTP/1.1\nhost: test.example\ntransfer-encoding: chunked\nconnection: close\n\n5\nhello\n0\n\n",
        ),
        case("HEAD", "HEAD /app HTTP/1.1\nhost: test.example\nconnection: close\n\n"),
        case("another method", "PATCH /app HTTP/1.1\nhost: test.example\ncontent-length: 0\nconnection: close\n\n"),
        get("an upstream's status", "/app?status=503", ""),
        get("an upstream's 204", "/app?status=204", ""),
        get("a large body", "/app?bytes=300000", ""),
        get("a direct response", "/exact", ""),
        get("a path matches without its query", "/exact?x=1", ""),
        get("an exact path does not match what is below", "/exact/", ""),
        get("a direct 201", "/created", ""),
        get("a direct 400", "/bad", ""),
        get("a direct response without a body", "/empty", ""),
        get("no route", "/nowhere", ""),
        get("a host", "/", "host: exact.example\n"),
        get("a host with a port", "/", "host: exact.example:8080\n"),
        get("a host in capitals", "/", "host: EXACT.Example\n"),
        get("a host by suffix", "/", "host: a.suffix.example\n"),
        get("a suffix needs something before it", "/", "host: suffix.example\n"),
        get("a host by prefix", "/", "host: prefix.any\n"),
        get("a redirect to https", "/to-https/x?y=z", ""),
        get("a redirect to a host", "/to-host/x?y=z", "host: test.example:8080\n"),
        get("a redirect to a path", "/to-path/x?y=z", ""),
        get("a redirect to a prefix", "/to-prefix/x?y=z", ""),
        get("a redirect by a client that came by https", "/to-host", "x-forwarded-proto: https\n"),
        get("a cluster that refuses connections", "/dead", ""),
        get("a cluster without endpoints", "/empty-cluster", ""),
        get("a route's timeout", "/slow?delay_ms=1500", ""),
        get("a header's value", "/header", "x-version: 2\n"),
        get("a header's presence", "/header", "X-Any: thing\n"),
        get("no matching header", "/header", "x-version: 3\n"),
        get("no host", "/app", "host:\n").without_host(),
        case("HTTP/1.0", "GET /app HTTP/1.0\nhost: test.example\n\n"),
        get("an upgrade that is not configured", "/app", "upgrade: websocket\n"),
        get("an unknown transfer coding", "/app", "transfer-encoding: gzip\n"),
        case("both lengths", "POST /app HTTP/1.1\nhost: a\ncontent-length: 5\ntransfer-encoding: chunked\n\n0\n\n"),
        case("no request line", "nonsense\n\n"),
        case("a header name with a blank", "GET /app HTTP/1.1\nhost: a\nbad name: x\n\n"),
        get("headers that are too large", "/app", &format!("x-large: {}\n", "x".repeat(70_000))),
        get("gRPC: no route", "/nowhere", "content-type: application/grpc\n"),
        get("gRPC: a cluster without endpoints", "/empty-cluster", "content-type: application/grpc\n"),
        get("gRPC: a redirect", "/to-path", "content-type: application/grpc\n"),
    ]
}

impl Case {
    /// The request without the line `host:`.
    fn without_host(mut self) -> Self {
        self.request = self.request.replace("host:\r\n", "");
        self
    }
}

/// A proxy and the service behind it.
struct Stage {
    proxy: Daemon,
    port: u16,
}

impl Stage {
    fn start(kind: Kind) -> Result<Self> {
        let app = App { pod: "app".to_owned(), revision: "main".to_owned(), upstream: None }.start()?;
        let port = free_port()?;
        let dead = free_port()?;
        let yaml = Bootstrap::new()
            .http(port, ROUTES, &[])
            .cluster("app", &[app], &[])
            .cluster("dead", &[dead], &[])
            .cluster("empty", &[], &[])
            .yaml();
        Ok(Self { proxy: Daemon::start(kind, &yaml)?, port })
    }

    /// What a client can see of the answer, one line a fact.
    fn outcome(&self, case: &Case) -> String {
        let method = case.request.split(' ').next().unwrap_or_default();
        match fetch_raw(self.port, case.request.as_bytes(), method) {
            Ok(response) => describe(&response, self.port),
            Err(error) => format!("no response: {error:#}"),
        }
    }
}

fn describe(response: &Response, port: u16) -> String {
    let own_port = port.to_string();
    let mut lines = vec![format!("status {} {}", response.status, response.reason)];
    let mut headers: Vec<String> = response.headers.0.iter().map(|(name, value)| shown(name, value)).collect();
    headers.sort();
    lines.extend(headers);
    match serde_json::from_slice::<Value>(&response.body) {
        // The service's word on what it saw.
        Ok(mut seen) if seen.is_object() => {
            let headers: BTreeMap<String, Value> = serde_json::from_value(seen["headers"].take()).unwrap_or_default();
            for (name, value) in &headers {
                lines.push(format!("upstream saw {}", shown(name, value.as_str().unwrap_or_default())));
            }
            for field in ["method", "path", "body_bytes"] {
                lines.push(format!("upstream saw {field}: {}", seen[field]));
            }
        }
        _ if response.body.len() > 1000 => lines.push(format!("a body of {} bytes", response.body.len())),
        _ => lines.push(format!("body {:?}", response.text())),
    }
    // Lengths of the service's JSON differ with the ports in it.
    lines.retain(|line| !(line.starts_with("content-length") && line.len() > "content-length: 99".len()));
    lines.join("\n").replace(&own_port, "PORT")
}

fn shown(name: &str, value: &str) -> String {
    let name = name.to_lowercase();
    let is_own = OWN_VALUES.contains(&name.as_str()) && !value.starts_with("12345678-");
    if is_own { name } else { format!("{name}: {value}") }
}

#[test]
fn the_same_answers_as_envoy() -> Result<()> {
    let (envoy, culvert) = (Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?);
    let mut differences = Vec::new();
    for case in cases() {
        let (expected, seen) = (envoy.outcome(&case), culvert.outcome(&case));
        let known = is_known(&case);
        if expected == seen && known {
            differences.push(format!("--- {}: the same by now, take it off DIFFERENT_ANSWERS", case.name));
        } else if expected != seen && !known {
            differences.push(format!("--- {}\nEnvoy:\n{expected}\nculvertd:\n{seen}\n", case.name));
        }
    }
    assert!(differences.is_empty(), "{} cases differ:\n{}", differences.len(), differences.join("\n"));
    Ok(())
}

/// What an operator's dashboards are made of.
#[test]
fn the_same_stats_as_envoy() -> Result<()> {
    let (envoy, culvert) = (Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?);
    // Not the timeout either, which Envoy counts as the cluster's 504.
    let counted = |case: &&Case| !is_known(case) && case.name != "a route's timeout";
    for stage in [&envoy, &culvert] {
        for request in cases().iter().filter(counted) {
            stage.outcome(request);
        }
    }
    let (expected, seen) = (envoy.proxy.stats()?, culvert.proxy.stats()?);
    let prefixes = [
        "http.ingress.downstream_rq",
        "http.ingress.downstream_cx_total",
        "http.ingress.no_route",
        "cluster.app.upstream_rq",
        "cluster.app.external.upstream_rq",
        "cluster.app.upstream_cx_total",
        "cluster.app.membership",
        "cluster.empty.upstream_cx_none_healthy",
    ];
    let mut differences = Vec::new();
    for name in expected.names().filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))) {
        let known_missing = MISSING_STATS.iter().any(|missing| name.ends_with(missing));
        match seen.has(name) {
            true if known_missing => differences.push(format!("{name} is there, take it off MISSING_STATS")),
            false if !known_missing => differences.push(format!("{name} is missing (Envoy: {})", expected.get(name))),
            true if expected.get(name) != seen.get(name) && !is_a_matter_of_timing(name) => {
                differences.push(format!("{name}: Envoy {}, culvertd {}", expected.get(name), seen.get(name)));
            }
            _ => {}
        }
    }
    assert!(differences.is_empty(), "{} stats differ:\n{}", differences.len(), differences.join("\n"));
    Ok(())
}

/// What a cluster has in Envoy's statistics, it has in ours.
#[test]
fn clusters_have_the_statistics_of_envoys() -> Result<()> {
    let (envoy, culvert) = (Stage::start(Kind::Envoy)?, Stage::start(Kind::Culvert)?);
    for stage in [&envoy, &culvert] {
        stage.outcome(&case("one request", "GET /app HTTP/1.1\nhost: test.example\nconnection: close\n\n"));
    }
    let (expected, seen) = (envoy.proxy.stats()?, culvert.proxy.stats()?);
    let leaf = |name: &str| name.strip_prefix("cluster.app.").map(str::to_owned);
    let missing: Vec<_> = expected.names().filter(|name| !seen.has(name)).filter_map(leaf).collect();
    assert_eq!(missing, MISSING_OF_CLUSTERS);
    let numbers =
        ["version", "warming_state", "assignment_stale", "assignment_timeout_received", "assignment_use_cached"];
    for name in numbers.map(|name| format!("cluster.app.{name}")) {
        assert_eq!((seen.has(&name), seen.get(&name)), (true, expected.get(&name)), "{name}");
    }
    Ok(())
}

fn is_known(case: &Case) -> bool {
    DIFFERENT_ANSWERS.iter().any(|(name, _)| *name == case.name)
}

/// Gauges that depend on how far connections have been torn down, and counts of kept upstream connections.
fn is_a_matter_of_timing(name: &str) -> bool {
    name.ends_with("_active") || name.contains("upstream_cx_total") || name.contains("_rq_pending_total")
}

#[test]
fn the_default_access_log_is_envoys() -> Result<()> {
    let line = |kind| -> Result<String> {
        let app = App { pod: "app".to_owned(), revision: "main".to_owned(), upstream: None }.start()?;
        let port = free_port()?;
        let log = scratch_dir()?.join("access.log");
        let access_log = format!(
            "access_log: [{{name: envoy.access_loggers.file, typed_config: {{\"@type\": \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}}}}}]",
            log.display()
        );
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {prefix: /}, route: {cluster: app}}]}";
        let yaml = Bootstrap::new().http(port, routes, &[&access_log]).cluster("app", &[app], &[]).yaml();
        let daemon = Daemon::start(kind, &yaml)?;
        let request = culvert_tests::http1::Request::get("/app?x=1")
            .header("x-request-id", "12345678-1234-4234-8234-123456789012")
            .header("user-agent", "test \"quoted\"");
        fetch(port, request)?;
        // Both flush on SIGTERM.
        daemon.signal(nix::sys::signal::Signal::SIGTERM)?;
        let line = culvert_tests::wait_until(std::time::Duration::from_secs(12), "a line in the access log", || {
            let text = std::fs::read_to_string(&log)?;
            text.lines().next().map(str::to_owned).context("it is empty")
        })?;
        Ok(line.replace(&app.to_string(), "APP"))
    };
    let (expected, seen) = (line(Kind::Envoy)?, line(Kind::Culvert)?);
    // The start time, and the two durations before the quoted part: "... 0 431 DURATION SERVICE_TIME".
    let comparable = |line: &str| -> Vec<String> {
        let after_time = line.split_once("] ").map_or(line, |(_, rest)| rest);
        let mut words: Vec<String> = after_time.split(' ').map(str::to_owned).collect();
        // bytes sent depend on the length of the ports in the answer, durations on the machine.
        for index in [6, 7, 8] {
            if let Some(word) = words.get_mut(index) {
                *word = word.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect::<String>();
                *word = "9".repeat(usize::from(word.starts_with('9')));
            }
        }
        words
    };
    assert_eq!(comparable(&seen), comparable(&expected), "\nculvertd: {seen}\nEnvoy:    {expected}");
    assert!(seen.starts_with("[20") && seen.contains("Z] \"GET /app?x=1 HTTP/1.1\" 200 - 0 "), "{seen}");
    Ok(())
}
