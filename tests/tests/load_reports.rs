//! What culvertd reports of its load, compared with what the real Envoy reports of the same traffic.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::app::App;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::report_server::{LoadCall, ReportServer};
use culvert_tests::server;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterStats, UpstreamLocalityStats};
use envoy_types::pb::envoy::service::load_stats::v3::LoadStatsResponse;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;
use tonic::Status;

const DEADLINE: Duration = Duration::from_secs(20);

/// Issued, successful, errors, in progress.
type Counts = [u64; 4];

/// By cluster: dropped requests, and the counts by locality (zone).
type Loads = BTreeMap<String, (u64, BTreeMap<String, Counts>)>;

/// A proxy and its traffic's ports.
struct Subject {
    daemon: Daemon,
    http: u16,
    tcp: u16,
}

impl Subject {
    /// Starts it, and takes the first message of its stream.
    fn start(kind: Kind, server: &ReportServer) -> Result<(Self, LoadCall)> {
        let app = || App { pod: "app".to_owned(), revision: String::new(), upstream: None }.start();
        let (http, tcp) = (free_port()?, free_port()?);
        let ports = Ports { http, tcp, a: app()?, b: app()?, grpc: grpc_app()?, dead: free_port()?, lrs: server.port };
        let daemon = Daemon::start(kind, &bootstrap(&ports))?;
        let call = server.load_call(DEADLINE)?;
        let first = call.next(DEADLINE)?;
        let node = first.node.context("no node")?;
        ensure!((node.id.as_str(), node.cluster.as_str()) == ("node-1", "edge"), "node: {} {}", node.id, node.cluster);
        ensure!(node.client_features == ["envoy.lrs.supports_send_all_clusters"], "{:?}", node.client_features);
        ensure!(first.cluster_stats.is_empty(), "{:?}", first.cluster_stats);
        Ok((Self { daemon, http, tcp }, call))
    }

    fn get(&self, path: &str) -> Result<u16> {
        Ok(fetch(self.http, Request::get(path))?.status)
    }

    fn get_grpc(&self, path: &str) -> Result<u16> {
        let request = Request::get(path).header("content-type", "application/grpc");
        Ok(fetch(self.http, request)?.status)
    }
}

/// What the reports since the last call say together, up to two that have not come yet: the second of those was made after
/// all that happened before this call.
fn loads(call: &LoadCall) -> Result<Loads> {
    let mut loads = Loads::new();
    let mut reports: Vec<_> = std::iter::from_fn(|| call.next(Duration::ZERO).ok()).collect();
    reports.extend([call.next(DEADLINE)?, call.next(DEADLINE)?]);
    for report in reports {
        for cluster in report.cluster_stats {
            let (dropped, zones) = loads.entry(cluster.cluster_name.clone()).or_default();
            *dropped += cluster.total_dropped_requests;
            zones.values_mut().for_each(|counts| counts[3] = 0);
            for stats in cluster.upstream_locality_stats {
                let zone = stats.locality.clone().unwrap_or_default().zone;
                let counts = zones.entry(zone).or_default();
                counts[0] += stats.total_issued_requests;
                counts[1] += stats.total_successful_requests;
                counts[2] += stats.total_error_requests;
                counts[3] = stats.total_requests_in_progress;
            }
        }
    }
    // The report's own stream: Envoy's goes through the cluster, culvertd's does not.
    loads.remove("lrs");
    Ok(loads)
}

/// Answers every request with the gRPC status in its path, `/grpc/<status>`; none: without.
fn grpc_app() -> Result<u16> {
    server::start(answer_grpc)
}

fn answer_grpc(mut stream: TcpStream) -> Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        let status = line.split_whitespace().nth(1).and_then(|path| path.rsplit('/').next()).unwrap_or("").to_owned();
        while line.trim() != "" {
            line.clear();
            reader.read_line(&mut line)?;
        }
        line.clear();
        let status = if status.is_empty() { String::new() } else { format!("grpc-status: {status}\r\n") };
        write!(stream, "HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n{status}content-length: 0\r\n\r\n")?;
    }
    Ok(())
}

struct Ports {
    http: u16,
    tcp: u16,
    a: u16,
    b: u16,
    grpc: u16,
    dead: u16,
    lrs: u16,
}

fn bootstrap(ports: &Ports) -> String {
    let Ports { http, tcp, a, b, grpc, dead, lrs } = ports;
    let endpoint = |port: &u16| {
        format!("{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}")
    };
    let cluster = |name: &str, port: &u16, more: &str| {
        let endpoint = endpoint(port);
        format!(
            "  - name: {name}\n    type: STATIC\n    connect_timeout: 1s\n{more}    load_assignment: {{cluster_name: \
             {name}, endpoints: [{{lb_endpoints: [{endpoint}]}}]}}\n"
        )
    };
    let http2 = "    typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                 {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                 explicit_http_config: {http2_protocol_options: {}}}}\n";
    let full = "    circuit_breakers: {thresholds: [{max_requests: 0, max_pending_requests: 0}]}\n";
    let clusters = [
        cluster("lrs", lrs, http2),
        cluster("dead", dead, ""),
        cluster("grpc", grpc, ""),
        cluster("full", a, full),
        cluster("busy", a, "    circuit_breakers: {thresholds: [{max_requests: 0}]}\n"),
        cluster("tcp", a, ""),
    ];
    format!(
        r#"
node: {{id: node-1, cluster: edge}}
cluster_manager:
  load_stats_config:
    api_type: GRPC
    transport_api_version: V3
    grpc_services: [{{envoy_grpc: {{cluster_name: lrs}}}}]
static_resources:
  listeners:
  - name: http
    address: {{socket_address: {{address: 127.0.0.1, port_value: {http}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ingress
          route_config:
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - {{match: {{prefix: /dead}}, route: {{cluster: dead}}}}
              - {{match: {{prefix: /full}}, route: {{cluster: full}}}}
              - {{match: {{prefix: /busy}}, route: {{cluster: busy}}}}
              - {{match: {{prefix: /grpc}}, route: {{cluster: grpc}}}}
              - {{match: {{prefix: /slow}}, route: {{cluster: app, timeout: 0.1s}}}}
              - {{match: {{prefix: /retry}}, route: {{cluster: app, retry_policy: {{retry_on: 5xx, num_retries: 1}}}}}}
              - {{match: {{prefix: /}}, route: {{cluster: app}}}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  - name: tcp
    address: {{socket_address: {{address: 127.0.0.1, port_value: {tcp}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: tcp}}
  clusters:
{clusters}  - name: app
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: app
      endpoints:
      - locality: {{region: r, zone: b}}
        lb_endpoints: [{b}]
      - locality: {{region: r, zone: a, sub_zone: s}}
        lb_endpoints: [{a}]
"#,
        clusters = clusters.concat(),
        a = endpoint(a),
        b = endpoint(b),
    )
}

fn answer(interval_ms: i32) -> LoadStatsResponse {
    let interval = ProtoDuration { seconds: 0, nanos: interval_ms * 1_000_000 };
    LoadStatsResponse { load_reporting_interval: Some(interval), ..LoadStatsResponse::default() }
}

/// What each kind of traffic comes to, in the order in which it was sent.
fn observe(kind: Kind) -> Result<Vec<(&'static str, Loads)>> {
    let server = ReportServer::start()?;
    let (subject, call) = Subject::start(kind, &server)?;
    // Before the server has asked: never reported.
    subject.get("/")?;
    call.send(LoadStatsResponse { send_all_clusters: true, ..answer(300) });
    let mut seen = vec![("nothing", loads(&call)?)];

    // In pairs: each locality gets one of two.
    for path in ["/", "/", "/?status=404", "/?status=404", "/?status=500", "/?status=500"] {
        subject.get(path)?;
    }
    seen.push(("statuses", loads(&call)?));
    for _ in 0..2 {
        ensure!(subject.get("/slow?delay_ms=300")? == 504, "the route's timeout");
    }
    seen.push(("timeouts", loads(&call)?));
    ensure!(subject.get("/retry?status=503")? == 503, "the retry's status");
    seen.push(("a retry", loads(&call)?));
    ensure!(subject.get("/dead")? == 503 && subject.get("/full")? == 503, "dead, full");
    ensure!(subject.get("/busy")? == 503, "busy");
    seen.push(("no connection, no place", loads(&call)?));
    for status in ["0", "1", "2", "3", "4", "5", "7", "8", "12", "13", "14", "15", "16", "99", ""] {
        subject.get_grpc(&format!("/grpc/{status}"))?;
    }
    seen.push(("gRPC statuses", loads(&call)?));
    for _ in 0..2 {
        let mut client = TcpStream::connect(("127.0.0.1", subject.http))?;
        let before = subject.daemon.stats()?.get("cluster.app.upstream_rq_total");
        client.write_all(b"GET /?delay_ms=600 HTTP/1.1\r\nhost: test.example\r\n\r\n")?;
        culvert_tests::wait_until(DEADLINE, "the request to be sent", || {
            ensure!(subject.daemon.stats()?.get("cluster.app.upstream_rq_total") > before, "it is not");
            Ok(())
        })?;
    }
    seen.push(("clients that give up", loads(&call)?));

    let tcp = TcpStream::connect(("127.0.0.1", subject.tcp))?;
    let waiting = TcpStream::connect(("127.0.0.1", subject.http))?;
    // Twice, to keep both localities at the same number.
    let second = TcpStream::connect(("127.0.0.1", subject.http))?;
    for mut client in [&waiting, &second] {
        client.write_all(b"GET /?delay_ms=1500 HTTP/1.1\r\nhost: test.example\r\n\r\n")?;
    }
    seen.push(("in progress", loads(&call)?));
    drop(tcp);
    for client in [waiting, second] {
        BufReader::new(client).read_line(&mut String::new())?;
    }
    seen.push(("ended", loads(&call)?));
    Ok(seen)
}

#[test]
fn the_same_traffic_is_reported_as_envoy_reports_it() -> Result<()> {
    let envoys = thread::spawn(|| observe(Kind::Envoy));
    let ours = observe(Kind::Culvert)?;
    let envoys = envoys.join().map_err(|_| anyhow::anyhow!("the other side panicked"))??;
    for ((what, ours), (_, envoys)) in ours.iter().zip(&envoys) {
        assert_eq!(ours, envoys, "{what}");
    }
    // Both are right, and not only equal.
    let zones = |zones: [(&str, Counts); 2]| zones.map(|(zone, counts)| (zone.to_owned(), counts)).into();
    assert_eq!(ours[0].1["app"], (0, BTreeMap::new()));
    assert_eq!(ours[1].1["app"], (0, zones([("a", [3, 2, 1, 0]), ("b", [3, 2, 1, 0])])));
    assert_eq!(ours[4].1["full"], (1, BTreeMap::new()));
    assert_eq!(ours[7].1["app"], (0, zones([("a", [1, 0, 0, 1]), ("b", [1, 0, 0, 1])])));
    Ok(())
}

/// Everything about a cluster's report but its counts.
fn shape(cluster: &ClusterStats) -> String {
    let locality = |stats: &UpstreamLocalityStats| {
        let locality = stats.locality.clone().unwrap_or_default();
        let (priority, endpoints) = (stats.priority, stats.upstream_endpoint_stats.len());
        format!(" {}/{}/{} {priority} {endpoints}", locality.region, locality.zone, locality.sub_zone)
    };
    cluster.cluster_name.clone() + &cluster.upstream_locality_stats.iter().map(locality).collect::<String>()
}

/// The shapes of the next report that has a load, in the order of the clusters' names.
fn shapes(call: &LoadCall) -> Result<Vec<String>> {
    loop {
        let mut report = call.next(DEADLINE)?.cluster_stats;
        if report.iter().any(|cluster| !cluster.upstream_locality_stats.is_empty()) {
            for cluster in &report {
                let interval = cluster.load_report_interval.context("no interval")?;
                let seconds = interval.seconds as f64 + f64::from(interval.nanos) / 1e9;
                ensure!((0.001..DEADLINE.as_secs_f64()).contains(&seconds), "an interval of {seconds} s");
            }
            report.sort_by(|a, b| a.cluster_name.cmp(&b.cluster_name));
            return Ok(report.iter().map(shape).collect());
        }
    }
}

/// What the server asks for, and what outlives a stream.
fn converse(kind: Kind) -> Result<Vec<String>> {
    let server = ReportServer::start()?;
    let (subject, call) = Subject::start(kind, &server)?;
    let traffic = || (0..2).try_for_each(|_| subject.get("/").map(drop));
    let ask = |call: &LoadCall, clusters: &[&str], endpoints| {
        let clusters = clusters.iter().map(|name| (*name).to_owned()).collect();
        call.send(LoadStatsResponse { clusters, report_endpoint_granularity: endpoints, ..answer(500) });
    };
    ask(&call, &["app", "nobody"], true);
    // The first report has nothing to tell, and shows that the answer has been taken.
    call.next(DEADLINE)?;
    traffic()?;
    let mut seen = shapes(&call)?;
    // In the middle of an interval.
    traffic()?;
    ask(&call, &["dead", "app"], false);
    seen.extend(shapes(&call)?);

    // What is counted without a stream is told on the next one, before the server asks again.
    call.fail(Status::unavailable("later"));
    traffic()?;
    let call = server.load_call(DEADLINE)?;
    seen.extend(shapes(&call)?);
    // And the reports go on without a word of the server.
    traffic()?;
    seen.extend(shapes(&call)?);
    let stats = subject.daemon.stats()?;
    let counted = ["requests", "errors", "retries"].map(|name| stats.get(&format!("load_reporter.{name}")));
    seen.push(format!("requests, errors, retries: {counted:?}"));
    ensure!(stats.get("load_reporter.responses") > 3, "responses");
    Ok(seen)
}

#[test]
fn the_server_is_obeyed_as_envoy_obeys_it() -> Result<()> {
    let envoys = thread::spawn(|| converse(Kind::Envoy));
    let ours = converse(Kind::Culvert)?;
    let envoys = envoys.join().map_err(|_| anyhow::anyhow!("the other side panicked"))??;
    assert_eq!(ours, envoys);
    assert_eq!(ours[..3], ["app r/a/s 0 1 r/b/ 0 1", "app r/a/s 0 0 r/b/ 0 0", "dead"]);
    assert_eq!(ours.last().map(String::as_str), Some("requests, errors, retries: [2, 1, 1]"));
    Ok(())
}

#[test]
fn a_server_that_comes_late_or_goes_is_found_again() -> Result<()> {
    let server = ReportServer::start()?;
    let (subject, call) = Subject::start(Kind::Culvert, &server)?;
    call.send(LoadStatsResponse { send_all_clusters: true, ..answer(100) });
    call.next(DEADLINE)?;
    let port = server.port;
    drop((call, server));
    subject.get("/")?;
    culvert_tests::wait_until(DEADLINE, "connects that fail", || {
        ensure!(subject.daemon.stats()?.get("load_reporter.retries") >= 2, "not yet");
        Ok(())
    })?;
    let start = Instant::now();
    let server = culvert_tests::wait_until(DEADLINE, "the port to be free", || ReportServer::start_on(port))?;
    let call = server.load_call(DEADLINE)?;
    let report = call.next(DEADLINE)?;
    let app = report.cluster_stats.iter().find(|cluster| cluster.cluster_name == "app").context("no app")?;
    let issued: u64 = app.upstream_locality_stats.iter().map(|stats| stats.total_issued_requests).sum();
    ensure!(issued == 1, "{app:?}");
    ensure!(start.elapsed() < DEADLINE, "the backoff is bounded");
    Ok(())
}

/// By locality and by endpoint, of each metric the number of reports that had it, and the sum.
type Metrics = BTreeMap<String, BTreeMap<String, (u64, f64)>>;

/// What the next reports say of metrics, until so many requests have been told of.
fn metrics(call: &LoadCall, requests: u64) -> Result<Metrics> {
    let (mut told, mut seen) = (0, Metrics::new());
    while told < requests {
        for cluster in call.next(DEADLINE)?.cluster_stats {
            for locality in cluster.upstream_locality_stats.iter().filter(|_| cluster.cluster_name != "lrs") {
                told += locality.total_successful_requests + locality.total_error_requests;
                let of_endpoints =
                    locality.upstream_endpoint_stats.iter().flat_map(|endpoint| &endpoint.load_metric_stats);
                for (of, metric) in locality
                    .load_metric_stats
                    .iter()
                    .map(|metric| ("locality", metric))
                    .chain(of_endpoints.map(|metric| ("endpoint", metric)))
                {
                    let place = seen.entry(format!("{} {of}", cluster.cluster_name)).or_default();
                    let (count, sum) = place.entry(metric.metric_name.clone()).or_default();
                    *count += metric.num_requests_finished_with_metric;
                    *sum += metric.total_metric_value;
                }
            }
        }
    }
    Ok(seen)
}

/// What hosts report of their load (ORCA), as far as the cluster wants it told.
#[test]
fn metrics_of_hosts_are_told_as_by_envoy() -> Result<()> {
    let run = |kind| -> Result<Vec<Metrics>> {
        let server = ReportServer::start()?;
        let host = server::start(|stream| {
            let mut lines = BufReader::new(stream.try_clone()?);
            let (mut stream, mut line, mut report) = (stream, String::new(), String::new());
            while lines.read_line(&mut line)? > 0 {
                if let Some(value) = line.strip_prefix("x-report: ") {
                    report = format!("endpoint-load-metrics: {value}");
                }
                if line == "\r\n" {
                    write!(stream, "HTTP/1.1 200 OK\r\n{report}content-length: 0\r\n\r\n")?;
                    report.clear();
                }
                line.clear();
            }
            Ok(())
        })?;
        let http = free_port()?;
        let names = ["none", "all", "some"];
        let routes = names.map(|name| format!("{{match: {{prefix: /{name}}}, route: {{cluster: {name}}}}}")).join(", ");
        let hosts = format!("- {{name: all, domains: [\"*\"], routes: [{routes}]}}");
        let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                     type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                     {http2_protocol_options: {}}}}";
        let bootstrap = Bootstrap::new()
            .http(http, &hosts, &[])
            .cluster("lrs", &[server.port], &[http2])
            .cluster("none", &[host], &[])
            .cluster("all", &[host], &["lrs_report_endpoint_metrics: [\"named_metrics.*\", \"utilization.*\"]"])
            .cluster(
                "some",
                &[host],
                &["lrs_report_endpoint_metrics: [cpu_utilization, eps, named_metrics.a, request_cost.b, mem_utilization, x]"],
            );
        let node = "node: {id: node-1, cluster: edge}\ncluster_manager: {load_stats_config: {api_type: GRPC, \
                    transport_api_version: V3, grpc_services: [{envoy_grpc: {cluster_name: lrs}}]}}\n";
        let _daemon = Daemon::start(kind, &format!("{node}{}", bootstrap.yaml()))?;
        let call = server.load_call(DEADLINE)?;
        call.next(DEADLINE)?;
        let ask = LoadStatsResponse { send_all_clusters: true, report_endpoint_granularity: true, ..answer(100) };
        call.send(ask);
        // It shows that the answer has been taken.
        call.next(DEADLINE)?;
        let reports = [
            "TEXT cpu_utilization=0.5,eps=2,named_metrics.a=1,named_metrics.b=0.25,utilization.u=0.75",
            "TEXT named_metrics.a=3,mem_utilization=0.125",
            "JSON {\"request_cost\": {\"b\": 4}, \"named_metrics\": {\"c.d\": -1}}",
            "TEXT named_metrics.a=3,named_metrics.a=3",
        ];
        let mut seen = Vec::new();
        for reports in [&reports[..], &reports[1..2]] {
            for (name, report) in names.iter().flat_map(|name| reports.iter().map(move |report| (name, report))) {
                let answer = fetch(http, Request::get(&format!("/{name}")).header("x-report", report))?;
                ensure!(answer.status == 200, "{kind:?}: {}", answer.status);
            }
            seen.push(metrics(&call, (names.len() * reports.len()) as u64)?);
        }
        Ok(seen)
    };
    let (ours, theirs) = (run(Kind::Culvert)?, run(Kind::Envoy)?);
    assert_eq!(ours, theirs);
    // Both are right, and not only equal.
    let all = BTreeMap::from([("named_metrics.a".to_owned(), (2, 4.0)), ("named_metrics.b".to_owned(), (1, 0.25))]);
    let told = &ours[0]["all locality"];
    ensure!(all.iter().all(|(name, sums)| told.get(name) == Some(sums)) && ours[0].len() == 4, "{ours:?}");
    Ok(())
}
