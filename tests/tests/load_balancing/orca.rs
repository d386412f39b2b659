//! What hosts report of their load (ORCA), and what `client_side_weighted_round_robin` makes of it: the weights that `/clusters` shows, and
//! where requests go by them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::fetch;
use culvert_tests::http1::Request;
use culvert_tests::server;

use super::*;

const DEADLINE: Duration = Duration::from_secs(30);
/// What hosts have that nobody has reported anything of.
const DEFAULT: u64 = 1;

/// The further settings of the policy, what a host reports, and the weight that it gets.
type Report = (&'static str, &'static str, &'static str, u64);

const REPORTS: &[Report] = &[
    ("equals", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5", 200),
    ("colons", "", "endpoint-load-metrics: TEXT  rps_fractional:100, cpu_utilization=+5e-1,,", 200),
    (
        "application",
        "",
        "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,application_utilization=0.25",
        400,
    ),
    (
        "named",
        "metric_names_for_computing_utilization: [named_metrics.foo]",
        "endpoint-load-metrics: TEXT rps_fractional=100,application_utilization=0.25,named_metrics.foo=0.1",
        1000,
    ),
    (
        "greatest",
        "metric_names_for_computing_utilization: [\"named_metrics.*\", mem_utilization, nothing]",
        "endpoint-load-metrics: TEXT rps_fractional=100,mem_utilization=0.4,named_metrics.foo=0.1,named_metrics.b=0.5",
        200,
    ),
    (
        "not_named",
        "metric_names_for_computing_utilization: [utilization.foo]",
        "endpoint-load-metrics: TEXT rps_fractional=100,utilization.bar=0.2,cpu_utilization=1",
        100,
    ),
    (
        "cost",
        "metric_names_for_computing_utilization: [request_cost.foo]",
        "endpoint-load-metrics: JSON {\"rpsFractional\":100,\"request_cost\":{\"foo\":\"0.2\"},\"rps\":7}",
        500,
    ),
    ("errors", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,eps=50", 200),
    (
        "penalty",
        "error_utilization_penalty: 2",
        "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,eps=75",
        50,
    ),
    ("json", "", "endpoint-load-metrics: JSON {\"rps_fractional\":100,\"cpuUtilization\":\"0.5\"}", 200),
    ("binary", "", "endpoint-load-metrics-bin: CQAAAAAAAOA/MQAAAAAAAFlA", 200),
    ("unpadded", "", "endpoint-load-metrics-bin: CQAAAAAAAOA/MQAAAAAAAFlAOQAAAAAAAABAQg4KA3JpZhEAAAAAAAAQQA", 200),
    ("either", "", "endpoint-load-metrics: BIN CQAAAAAAAOA/MQAAAAAAAFlA", 200),
    (
        "binary_first",
        "",
        "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=1\r\nendpoint-load-metrics-bin: CQAAAAAAAOA/MQAAAAAAAFlA",
        200,
    ),
    ("greater_than_all", "", "endpoint-load-metrics: TEXT rps_fractional=1e20,cpu_utilization=0.5", 4_294_967_295),
    (
        "long_blackout",
        "blackout_period: 1000s",
        "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=1",
        DEFAULT,
    ),
    (
        "never_made",
        "weight_update_period: 1000s",
        "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=1",
        7,
    ),
    ("tiny", "", "endpoint-load-metrics: TEXT rps_fractional=0.1,cpu_utilization=1", DEFAULT),
    ("no_requests", "", "endpoint-load-metrics: TEXT cpu_utilization=0.5", DEFAULT),
    ("no_utilization", "", "endpoint-load-metrics: TEXT rps_fractional=100", DEFAULT),
    ("blanks", "", "endpoint-load-metrics: TEXT rps_fractional = 100,cpu_utilization = 0.5", DEFAULT),
    ("two_colons", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=1,named_metrics.a:b=1", DEFAULT),
    ("no_format", "", "endpoint-load-metrics: rps_fractional=100,cpu_utilization=0.5", DEFAULT),
    ("other_format", "", "endpoint-load-metrics: text rps_fractional=100,cpu_utilization=0.5", DEFAULT),
    ("negative", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,eps=-5", DEFAULT),
    ("no_number", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,eps=nan", DEFAULT),
    ("twice", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,rps_fractional=100", DEFAULT),
    ("unknown", "", "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5,foo=1", DEFAULT),
    (
        "unknown_json",
        "",
        "endpoint-load-metrics: JSON {\"rps_fractional\":100,\"cpu_utilization\":0.5,\"x\":1}",
        DEFAULT,
    ),
    ("negative_json", "", "endpoint-load-metrics: JSON {\"rps_fractional\":100,\"cpu_utilization\":-1}", DEFAULT),
    (
        "broken_binary",
        "",
        "endpoint-load-metrics-bin: //8=\r\nendpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=1",
        DEFAULT,
    ),
];

fn policy(settings: &str) -> String {
    let period = if settings.contains("weight_update_period") { "" } else { "weight_update_period: 0.1s, " };
    let blackout = if settings.contains("blackout_period") { "" } else { "blackout_period: 0s, " };
    typed("ClientSideWeightedRoundRobin", &format!("{period}{blackout}{settings}"))
}

impl Proxy {
    /// The weights of a cluster's hosts, in the order of their addresses.
    fn weights(&self, cluster: &str) -> Result<Vec<u64>> {
        let text = self.daemon.admin("/clusters")?;
        let mut weights = BTreeMap::new();
        for line in text.lines() {
            if let [of, host, "weight", weight] = line.split("::").collect::<Vec<_>>()[..]
                && of == cluster
            {
                weights.insert(host.to_owned(), weight.parse()?);
            }
        }
        Ok(weights.into_values().collect())
    }

    /// Waits until the hosts have these weights.
    fn wait_for_weights(&self, cluster: &str, wanted: &[u64]) -> Result<()> {
        let since = Instant::now();
        loop {
            let weights = self.weights(cluster)?;
            if weights == wanted {
                return Ok(());
            }
            ensure!(since.elapsed() < DEADLINE, "{:?}: {cluster}: {weights:?}, not {wanted:?}", self.kind);
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A server on all addresses of the loopback whose responses have the header lines that `report` makes of the number of the host and of the
/// request's `x-report`.
fn reporting(report: impl Fn(u8, &str) -> String + Send + Sync + 'static) -> Result<u16> {
    let listener = TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let report = Arc::new(report);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let report = Arc::clone(&report);
            thread::spawn(move || -> Result<()> {
                let _ = stream.set_nodelay(true);
                let number = match stream.local_addr()?.ip() {
                    std::net::IpAddr::V4(address) => address.octets()[3],
                    std::net::IpAddr::V6(_) => 0,
                };
                let mut lines = BufReader::new(stream.try_clone()?);
                let (mut stream, mut line, mut asked) = (stream, String::new(), String::new());
                while lines.read_line(&mut line)? > 0 {
                    if let Some(value) = line.strip_prefix("x-report: ") {
                        value.trim_end().clone_into(&mut asked);
                    }
                    if line == "\r\n" {
                        let lines = report(number, &asked);
                        write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n{lines}\r\n")?;
                    }
                    line.clear();
                }
                Ok(())
            });
        }
    });
    Ok(port)
}

/// Each report by itself: what is malformed changes nothing.
#[test]
fn reports_are_read_as_envoy_reads_them() -> Result<()> {
    let upstream = reporting(|_, asked| {
        let report = asked.parse().ok().and_then(|number: usize| REPORTS.get(number));
        report.map_or(String::new(), |(_, _, lines, _)| format!("{lines}\r\n"))
    })?;
    let cases: Vec<_> =
        REPORTS.iter().map(|(name, settings, ..)| case(name, policy(settings), weighted(&[7]))).collect();
    for kind in [Kind::Culvert, Kind::Envoy] {
        let proxy = Proxy::start(kind, &cases, upstream, "")?;
        // Those that change nothing first: when the others have their weights, these would have theirs.
        for (number, (name, ..)) in REPORTS.iter().enumerate().rev() {
            proxy.ask(name, 1, |_| format!("x-report: {number}\r\n"))?;
        }
        // Weights are made anew at the same time for all, or a period later.
        for again in [REPORTS[0].3, 400] {
            proxy.wait_for_weights(REPORTS[0].0, &[again])?;
            let (number, _) = REPORTS.iter().enumerate().find(|(_, it)| it.3 == 400).context("no such report")?;
            proxy.ask(REPORTS[0].0, 1, |_| format!("x-report: {number}\r\n"))?;
        }
        for (name, _, report, weight) in &REPORTS[1..] {
            proxy.wait_for_weights(name, &[*weight]).with_context(|| (*report).to_owned())?;
        }
    }
    Ok(())
}

/// Weights, what hosts without a report get, and the distributions; then others report something else.
#[test]
fn requests_go_by_what_hosts_report() -> Result<()> {
    // By phase: what the hosts with these numbers report as their weight.
    const PHASES: [&[(u8, u32)]; 3] =
        [&[], &[(1, 100), (2, 200), (3, 500), (5, 900), (7, 300)], &[(1, 900), (2, 100), (4, 300), (6, 50)]];
    let phase = Arc::new(AtomicUsize::new(0));
    let now = Arc::clone(&phase);
    let upstream = reporting(move |host, _| {
        let reports = PHASES[now.load(Ordering::SeqCst)];
        reports.iter().find(|(number, _)| *number == host).map_or(String::new(), |(_, weight)| {
            format!("endpoint-load-metrics: TEXT rps_fractional={weight},cpu_utilization=1\r\n")
        })
    })?;
    let within = |name: &str, field: &str| {
        let inner = policy("");
        let inner = inner.strip_prefix("load_balancing_policy: ").unwrap_or(&inner);
        typed(name, &format!("{field}: {inner}"))
    };
    let zones = || {
        vec![
            group("a", 1, 0, &[(1, 1, OK), (2, 9, OK), (3, 1, OK)]),
            group("b", 3, 0, &[(4, 1, OK), (5, 4, OK), (6, 1, BAD)]),
            group("a", 1, 1, &[(7, 1, OK), (8, 1, OK)]),
        ]
    };
    let cases = [
        case("flat", policy(""), zones()),
        case("zones", within("WrrLocality", "endpoint_picking_policy"), zones()),
        case(
            "overridden",
            within("OverrideHost", "override_host_sources: [{header: x-none}], fallback_policy"),
            zones(),
        ),
    ];
    let proxies =
        [Proxy::start(Kind::Culvert, &cases, upstream, "")?, Proxy::start(Kind::Envoy, &cases, upstream, "")?];
    // Host 7 is of a priority that nothing is asked of, so that 8 has nothing to be the median of, and it has nothing to report.
    let expected: [&[u64]; 3] = [&[1; 8], &[100, 200, 500, 350, 900, 350, 1, 1], &[900, 100, 500, 300, 900, 500, 1, 1]];
    for (number, weights) in expected.iter().enumerate() {
        phase.store(number, Ordering::SeqCst);
        for proxy in &proxies {
            for case in &cases {
                let since = Instant::now();
                // They report with their responses only.
                while proxy.weights(case.name)? != *weights {
                    proxy.ask(case.name, 20, |_| String::new())?;
                    let weights = proxy.weights(case.name)?;
                    ensure!(since.elapsed() < DEADLINE, "{:?}: {}: {weights:?}", proxy.kind, case.name);
                }
            }
        }
        let [culvert, envoy] = &proxies;
        compare(culvert, envoy, &cases)?;
    }
    Ok(())
}

/// A host that does not report any more is one like the others after a while.
#[test]
fn reports_grow_old() -> Result<()> {
    let upstream = reporting(|_, asked| match asked {
        "" => String::new(),
        _ => "endpoint-load-metrics: TEXT rps_fractional=100,cpu_utilization=0.5\r\n".to_owned(),
    })?;
    let cases = [case("old", policy("weight_expiration_period: 0.5s"), weighted(&[7]))];
    for kind in [Kind::Culvert, Kind::Envoy] {
        let proxy = Proxy::start(kind, &cases, upstream, "")?;
        let since = Instant::now();
        while proxy.weights("old")? != [200] {
            proxy.ask("old", 1, |_| "x-report: 1\r\n".to_owned())?;
            ensure!(since.elapsed() < DEADLINE, "{kind:?}: {:?}", proxy.weights("old")?);
        }
        proxy.wait_for_weights("old", &[DEFAULT])?;
    }
    Ok(())
}

/// Trailers report where the headers do not.
#[test]
fn trailers_report_too() -> Result<()> {
    let host = server::start_async(|stream| async move {
        let mut connection = h2::server::handshake(stream).await?;
        while let Some(request) = connection.accept().await {
            let (request, mut respond) = request?;
            let report = |requests: u32| format!("TEXT rps_fractional={requests},cpu_utilization=1");
            let mut response = http::Response::new(());
            if request.uri().path() == "/headers" {
                response.headers_mut().insert("endpoint-load-metrics", report(300).parse()?);
            }
            let trailers = http::HeaderMap::from_iter([("endpoint-load-metrics".parse()?, report(70).parse()?)]);
            respond.send_response(response, false)?.send_trailers(trailers)?;
        }
        Ok(())
    })?;
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: \
                 {\"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, \
                 explicit_http_config: {http2_protocol_options: {}}}}";
    for kind in [Kind::Culvert, Kind::Envoy] {
        let (port, policy) = (free_port()?, policy(""));
        let routes = "- {name: all, domains: [\"*\"], routes: [{match: {path: /headers}, route: {cluster: headers}}, \
                      {match: {path: /trailers}, route: {cluster: trailers}}]}";
        let fields = [http2, &policy];
        let bootstrap = Bootstrap::new().http(port, routes, &[]);
        let bootstrap = bootstrap.cluster("headers", &[host], &fields).cluster("trailers", &[host], &fields);
        let daemon = Daemon::start(kind, &bootstrap.yaml())?;
        let proxy = Proxy { kind, daemon, port };
        for (cluster, weight) in [("trailers", 70), ("headers", 300)] {
            let answer = fetch(port, Request::get(&format!("/{cluster}")))?;
            ensure!(answer.status == 200, "{kind:?}: {}", answer.status);
            proxy.wait_for_weights(cluster, &[weight])?;
        }
    }
    Ok(())
}
