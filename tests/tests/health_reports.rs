//! culvertd as a management server's health checker, compared with the real Envoy doing the same work.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use culvert_tests::bootstrap::Bootstrap;
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::report_server::{HealthCall, ReportServer};
use culvert_tests::server;
use envoy_types::pb::envoy::config::core::v3::health_check::{
    GrpcHealthCheck, HealthChecker, HttpHealthCheck, Payload, TcpHealthCheck, payload,
};
use envoy_types::pb::envoy::config::core::v3::{
    Address, BindConfig, HeaderValue, HeaderValueOption, HealthCheck, HealthStatus, Locality, RequestMethod,
    SocketAddress, address, socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::config::endpoint::v3::Endpoint;
use envoy_types::pb::envoy::config::endpoint::v3::endpoint::HealthCheckConfig;
use envoy_types::pb::envoy::service::health::v3::{
    ClusterHealthCheck, EndpointHealthResponse, HealthCheckSpecifier, LocalityEndpoints,
    health_check_request_or_endpoint_health_response::RequestType,
};
use envoy_types::pb::envoy::r#type::matcher::v3::{StringMatcher, string_matcher::MatchPattern};
use envoy_types::pb::envoy::r#type::v3::{CodecClientType, Int64Range};
use envoy_types::pb::google::protobuf::{Duration as ProtoDuration, UInt32Value, value::Kind as ValueKind};
use tonic::Status;

const DEADLINE: Duration = Duration::from_secs(20);

/// A host's status, and the HTTP status that its check came to.
type State = (HealthStatus, Option<u16>);

/// The host that is checked: what it answers is in the path of the request.
#[derive(Clone, Default)]
struct Host {
    /// Request heads by path: those of the first.
    seen: Arc<Mutex<BTreeMap<String, Vec<String>>>>,
    hits: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl Host {
    fn start(&self) -> Result<u16> {
        let host = self.clone();
        server::start(move |stream| host.serve(stream))
    }

    fn serve(&self, mut stream: TcpStream) -> Result<()> {
        let mut reader = BufReader::new(stream.try_clone()?);
        loop {
            let mut lines = Vec::new();
            loop {
                let mut line = String::new();
                if reader.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                match line.trim_end() {
                    "" => break,
                    line => lines.push(line.to_owned()),
                }
            }
            let path = lines[0].split(' ').nth(1).unwrap_or_default().to_owned();
            let length = lines.iter().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            let mut body = vec![0; length];
            reader.read_exact(&mut body)?;
            // Where connections come from.
            lines.push(format!("from {}", stream.peer_addr()?.ip()));
            lines.sort();
            self.seen.lock().unwrap_or_else(PoisonError::into_inner).entry(path.clone()).or_insert(lines);
            let hit = {
                let mut hits = self.hits.lock().unwrap_or_else(PoisonError::into_inner);
                let hit = hits.entry(path.clone()).or_default();
                *hit += 1;
                *hit - 1
            };
            // `/a,b,c?name`: the first time a, then b, from then on c.
            let plan: Vec<&str> =
                path.trim_start_matches('/').split('?').next().unwrap_or_default().split(',').collect();
            let (mut status, mut headers, mut answer) = ("200", "", "it works".to_owned());
            match plan.get(hit).or(plan.last()).copied().unwrap_or_default() {
                "close" => return Ok(()),
                "slow" => thread::sleep(Duration::from_millis(700)),
                "echo" => answer = String::from_utf8(body)?,
                "degraded" => headers = "x-envoy-degraded: true\r\n",
                "named" => headers = "x-envoy-upstream-healthchecked-cluster: right\r\n",
                other => status = other,
            }
            write!(stream, "HTTP/1.1 {status} X\r\n{headers}content-length: {}\r\n\r\n{answer}", answer.len())?;
        }
    }
}

/// A host that answers any bytes with `answer`, and closes where that is empty.
fn tcp_host(answer: &'static [u8]) -> Result<u16> {
    server::start(move |mut stream| {
        let mut buffer = [0; 64];
        while !answer.is_empty() && stream.read(&mut buffer)? > 0 {
            stream.write_all(answer)?;
        }
        Ok(())
    })
}

fn milliseconds(milliseconds: u32) -> Option<ProtoDuration> {
    let nanos = (milliseconds % 1000 * 1_000_000).cast_signed();
    Some(ProtoDuration { seconds: i64::from(milliseconds / 1000), nanos })
}

fn check(checker: HealthChecker) -> HealthCheck {
    HealthCheck {
        timeout: milliseconds(350),
        interval: milliseconds(400),
        // What counts where there is no traffic.
        no_traffic_interval: milliseconds(400),
        unhealthy_threshold: Some(UInt32Value { value: 2 }),
        healthy_threshold: Some(UInt32Value { value: 3 }),
        health_checker: Some(checker),
        ..HealthCheck::default()
    }
}

fn http(path: &str) -> HttpHealthCheck {
    HttpHealthCheck { path: path.to_owned(), ..HttpHealthCheck::default() }
}

fn hex(text: &str) -> Payload {
    Payload { payload: Some(payload::Payload::Text(text.bytes().map(|byte| format!("{byte:02x}")).collect())) }
}

fn endpoint(port: u16) -> Endpoint {
    let port_specifier = Some(PortSpecifier::PortValue(u32::from(port)));
    let address = SocketAddress { address: "127.0.0.1".to_owned(), port_specifier, ..SocketAddress::default() };
    Endpoint {
        address: Some(Address { address: Some(address::Address::SocketAddress(address)) }),
        ..Endpoint::default()
    }
}

fn locality(zone: &str, ports: &[u16]) -> LocalityEndpoints {
    let locality = Locality { region: "r".to_owned(), zone: zone.to_owned(), sub_zone: String::new() };
    LocalityEndpoints { locality: Some(locality), endpoints: ports.iter().map(|port| endpoint(*port)).collect() }
}

/// An endpoint at `port` that is checked as `config` says.
fn special_endpoint(name: &str, port: u16, path: &str, config: HealthCheckConfig) -> ClusterHealthCheck {
    let mut special = cluster(name, port, HealthChecker::HttpHealthCheck(http(path)));
    special.locality_endpoints[0].endpoints[0].health_check_config = Some(config);
    special
}

fn cluster(name: &str, port: u16, checker: HealthChecker) -> ClusterHealthCheck {
    ClusterHealthCheck {
        cluster_name: name.to_owned(),
        health_checks: vec![check(checker)],
        locality_endpoints: vec![locality("a", &[port])],
        ..ClusterHealthCheck::default()
    }
}

fn start(kind: Kind, server: &ReportServer) -> Result<(Daemon, HealthCall)> {
    let http2 = "typed_extension_protocol_options: {envoy.extensions.upstreams.http.v3.HttpProtocolOptions: {\"@type\": \
                 type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: \
                 {http2_protocol_options: {}}}}";
    let yaml = Bootstrap::new().cluster("hds", &[server.port], &[http2]).yaml();
    let hds = "node: {id: node-1, cluster: edge}\nhds_config: {api_type: GRPC, transport_api_version: V3, grpc_services: \
               [{envoy_grpc: {cluster_name: hds}}]}\n";
    let daemon = Daemon::start(kind, &format!("{hds}{yaml}"))?;
    let call = server.health_call(DEADLINE)?;
    greet(&call)?;
    Ok((daemon, call))
}

/// Takes the first message of a stream.
fn greet(call: &HealthCall) -> Result<()> {
    match call.next(DEADLINE)?.request_type {
        Some(RequestType::HealthCheckRequest(request)) => {
            let node = request.node.context("no node")?;
            ensure!(node.id == "node-1" && node.cluster == "edge", "{node:?}");
            let protocols = request.capability.context("no capability")?.health_check_protocols;
            ensure!(protocols == [0, 1], "HTTP and TCP, not {protocols:?}");
            Ok(())
        }
        other => anyhow::bail!("first came {other:?}"),
    }
}

fn report(call: &HealthCall) -> Result<EndpointHealthResponse> {
    match call.next(DEADLINE)?.request_type {
        Some(RequestType::EndpointHealthResponse(report)) => Ok(report),
        // Envoy's way to say that there is nothing.
        None => Ok(EndpointHealthResponse::default()),
        other => anyhow::bail!("not a report: {other:?}"),
    }
}

/// The states of a report, by `cluster/zone`, in its order.
fn states(report: &EndpointHealthResponse) -> Vec<(String, State)> {
    let mut states = Vec::new();
    for cluster in &report.cluster_endpoints_health {
        for locality in &cluster.locality_endpoints_health {
            for endpoint in &locality.endpoints_health {
                let zone = locality.locality.clone().unwrap_or_default().zone;
                let code = endpoint.health_metadata.as_ref().and_then(|metadata| {
                    match metadata.fields.get("http_status_code")?.kind {
                        Some(ValueKind::NumberValue(code)) => Some(code as u16),
                        _ => None,
                    }
                });
                states.push((format!("{}/{zone}", cluster.cluster_name), (endpoint.health_status(), code)));
            }
        }
    }
    states
}

fn work(host: u16) -> Result<Vec<ClusterHealthCheck>> {
    let plain = |name: &str| (name.to_owned(), host, HealthChecker::HttpHealthCheck(http(&format!("/{name}?plain"))));
    let special = |name: &str, check: HttpHealthCheck| (name.to_owned(), host, HealthChecker::HttpHealthCheck(check));
    let tcp = |name: &str, port: u16, send: &str, receive: &[&str]| {
        let send = Some(hex(send)).filter(|_| !send.is_empty());
        let receive = receive.iter().map(|text| hex(text)).collect();
        let check = TcpHealthCheck { send, receive, ..TcpHealthCheck::default() };
        (name.to_owned(), port, HealthChecker::TcpHealthCheck(check))
    };
    let range = |start, end| vec![Int64Range { start, end }];
    let name = |name: &str| {
        Some(StringMatcher { match_pattern: Some(MatchPattern::Exact(name.to_owned())), ..StringMatcher::default() })
    };
    let post = i32::from(RequestMethod::Post);
    let header = HeaderValue { key: "x-probe".to_owned(), value: "yes".to_owned(), ..HeaderValue::default() };
    let header = HeaderValueOption { header: Some(header), ..HeaderValueOption::default() };
    let cases = vec![
        plain("200"),
        plain("201"),
        plain("503"),
        plain("degraded"),
        plain("slow"),
        plain("close"),
        special("expected", HttpHealthCheck { expected_statuses: range(201, 202), ..http("/201?expected") }),
        special(
            "200 is not expected",
            HttpHealthCheck { expected_statuses: range(201, 202), ..http("/200?unexpected") },
        ),
        special("the right name", HttpHealthCheck { service_name_matcher: name("right"), ..http("/named?right") }),
        special("the wrong name", HttpHealthCheck { service_name_matcher: name("wrong"), ..http("/named?wrong") }),
        special("no name", HttpHealthCheck { service_name_matcher: name("right"), ..http("/200?noname") }),
        special("the body", HttpHealthCheck { receive: vec![hex("it"), hex("works")], ..http("/200?body") }),
        special("not in this order", HttpHealthCheck { receive: vec![hex("works"), hex("it")], ..http("/200?order") }),
        special(
            "a body and a host",
            HttpHealthCheck {
                host: "other.example".to_owned(),
                method: post,
                send: Some(hex("hello")),
                receive: vec![hex("hello")],
                request_headers_to_add: vec![header],
                request_headers_to_remove: vec!["user-agent".to_owned()],
                ..http("/echo?body")
            },
        ),
        special("OPTIONS", HttpHealthCheck { method: i32::from(RequestMethod::Options), ..http("/200?options") }),
        special("http2", HttpHealthCheck { codec_client_type: i32::from(CodecClientType::Http2), ..http("/200?h2") }),
        // One step a check: what counts at once, what towards the threshold, and what it takes to recover.
        special(
            "retriable",
            HttpHealthCheck {
                retriable_statuses: range(429, 430),
                ..http("/200,429,200,429,429,200,200,200?retriable")
            },
        ),
        special("at once", http("/200,500,200,200,200?at-once")),
        special("broken", http("/200,close,200,close,close,200,200,200?broken")),
        special("late", http("/200,slow,slow,503,200,200,200?late")),
        special("bad at first", http("/503,200,200,200?bad-first")),
        ("refused".to_owned(), free_port()?, HealthChecker::HttpHealthCheck(http("/200"))),
        tcp("an answer", tcp_host(b"..pong!")?, "ping", &["po", "g"]),
        tcp("another answer", tcp_host(b"nothing")?, "ping", &["pong"]),
        tcp("a connection", tcp_host(b"x")?, "", &[]),
        tcp("a closed connection", tcp_host(b"")?, "ping", &["pong"]),
        tcp("no connection", free_port()?, "", &[]),
        ("grpc".to_owned(), host, HealthChecker::GrpcHealthCheck(GrpcHealthCheck::default())),
    ];
    let nowhere = free_port()?;
    let other_port = HealthCheckConfig { port_value: u32::from(host), ..HealthCheckConfig::default() };
    let other_address = HealthCheckConfig { address: endpoint(host).address, ..HealthCheckConfig::default() };
    let other_name = HealthCheckConfig { hostname: "told.example".to_owned(), ..HealthCheckConfig::default() };
    let bind = SocketAddress { address: "127.0.0.7".to_owned(), ..SocketAddress::default() };
    let bind = SocketAddress { port_specifier: Some(PortSpecifier::PortValue(0)), ..bind };
    let bound = ClusterHealthCheck {
        upstream_bind_config: Some(BindConfig { source_address: Some(bind), ..BindConfig::default() }),
        ..cluster("bound", host, HealthChecker::HttpHealthCheck(http("/200?bound")))
    };
    let special = [
        special_endpoint("another port", nowhere, "/200?port", other_port),
        special_endpoint("another address", nowhere, "/503?address", other_address),
        special_endpoint("another name", host, "/200?name", other_name),
        bound,
    ];
    Ok(cases.into_iter().map(|(name, port, checker)| cluster(&name, port, checker)).chain(special).collect())
}

/// The states that were reported of each host, the requests that each saw, and the statistics of one cluster.
type Observed = (BTreeMap<String, Vec<State>>, BTreeMap<String, Vec<String>>, BTreeMap<String, u64>);

/// The states that each host goes through, and the requests that it sees.
fn observe(kind: Kind) -> Result<Observed> {
    let server = ReportServer::start()?;
    let host = Host::default();
    let port = host.start()?;
    let (daemon, call) = start(kind, &server)?;
    let cluster_health_checks = work(port)?;
    let expected: Vec<_> = cluster_health_checks.iter().map(|it| format!("{}/a", it.cluster_name)).collect();
    call.send(HealthCheckSpecifier { cluster_health_checks, interval: milliseconds(50) });
    let (mut histories, begin) = (BTreeMap::<String, Vec<State>>::new(), Instant::now());
    // The longest plan has eight steps.
    while begin.elapsed() < Duration::from_millis(400 * 9 + 1500) {
        let report = report(&call).with_context(|| daemon.stderr())?;
        let states = states(&report);
        ensure!(states.iter().map(|(name, _)| name).eq(&expected), "the order of the specifier: {states:?}");
        #[expect(deprecated, reason = "Envoy fills both")]
        let flat = report.endpoints_health.len();
        ensure!(flat == states.len(), "the flat list has {flat}");
        for (name, state) in states {
            let history = histories.entry(name).or_default();
            // Before its first check a host is unhealthy.
            let unknown = history.is_empty() && state == (HealthStatus::Unhealthy, None);
            if !unknown && history.last() != Some(&state) {
                history.push(state);
            }
        }
    }
    let seen = host.seen.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let stats = daemon.stats()?;
    let counted =
        stats.names().filter_map(|name| Some((name.strip_prefix("cluster.200.")?.to_owned(), stats.get(name))));
    Ok((histories, seen, counted.collect()))
}

#[test]
fn the_same_work_has_the_same_results_as_envoys() -> Result<()> {
    // One after the other: what counts is time.
    let (envoys, envoys_requests, envoys_counted) = observe(Kind::Envoy)?;
    let (ours, our_requests, we_counted) = observe(Kind::Culvert)?;
    for (name, value) in envoys_counted {
        let is_counted = name.starts_with("health_check.") && !name.ends_with("healthy");
        // Those are looked up where there are circuit breakers. There is no HTTP/3 here, and no watermarks as those of Envoy.
        let is_missing = ["circuit_breakers", "http3", "0rtt", "0_rtt", "buffered", "flow_control"]
            .iter()
            .any(|it| name.contains(it));
        if !is_missing {
            let ours = we_counted.get(&name);
            assert!(ours.is_some_and(|ours| is_counted || *ours == value), "{name}: Envoy {value}, culvertd {ours:?}");
        }
    }
    assert!(we_counted["health_check.success"] > 0);
    for (name, history) in &ours {
        assert_eq!(history, &envoys[name], "{name}");
    }
    for (path, request) in &our_requests {
        assert_eq!(Some(request), envoys_requests.get(path), "{path}");
    }
    // Both are right, and not only equal.
    use HealthStatus::{Healthy, Timeout, Unhealthy};
    assert_eq!(ours["200/a"], [(Healthy, Some(200))]);
    assert_eq!(ours["slow/a"], [(Timeout, None)]);
    assert_eq!(ours["refused/a"], []);
    assert_eq!(ours["the body/a"], [(Healthy, Some(200))]);
    assert_eq!(ours["a body and a host/a"], [(Healthy, Some(200))]);
    let at_once = [(Healthy, Some(200)), (Unhealthy, Some(500)), (Unhealthy, Some(200)), (Healthy, Some(200))];
    assert_eq!(ours["at once/a"], at_once);
    assert_eq!(ours["an answer/a"], [(Healthy, None)]);
    assert_eq!(ours["another port/a"], [(Healthy, Some(200))]);
    assert_eq!(ours["another address/a"], [(Unhealthy, Some(503))]);
    assert!(our_requests["/200?name"].contains(&"host: told.example".to_owned()), "{our_requests:?}");
    assert!(our_requests["/200?bound"].contains(&"from 127.0.0.7".to_owned()), "{our_requests:?}");
    Ok(())
}

/// What becomes of the work when the server changes its mind, and when the stream is lost.
fn converse(kind: Kind) -> Result<Vec<String>> {
    let server = ReportServer::start()?;
    let host = Host::default();
    let port = host.start()?;
    let (daemon, call) = start(kind, &server)?;
    let hits = |path: &str| host.hits.lock().unwrap_or_else(PoisonError::into_inner).get(path).copied().unwrap_or(0);
    // Checked once a minute: the default without traffic.
    let slow_check = |path: &str| {
        let check = check(HealthChecker::HttpHealthCheck(http(path)));
        HealthCheck { no_traffic_interval: None, ..check }
    };
    let two = |zones: &[&str], path: &str| HealthCheckSpecifier {
        cluster_health_checks: vec![ClusterHealthCheck {
            cluster_name: "c".to_owned(),
            health_checks: vec![slow_check(path)],
            locality_endpoints: zones.iter().map(|zone| locality(zone, &[port])).collect(),
            ..ClusterHealthCheck::default()
        }],
        interval: milliseconds(200),
    };
    let settled = |call: &HealthCall, wanted: &str| {
        culvert_tests::wait_until(DEADLINE, wanted, || {
            let states = format!("{:?}", states(&report(call)?));
            ensure!(states.contains(wanted), "{states}");
            Ok(states)
        })
    };
    let mut seen = Vec::new();
    call.send(two(&["a"], "/200?first"));
    seen.push(settled(&call, "Healthy")?);
    // The same once more changes nothing; nor does one that cannot be.
    call.send(two(&["a"], "/200?first"));
    let mut bad = two(&["b"], "/200?bad");
    bad.cluster_health_checks[0].health_checks[0].timeout = None;
    call.send(bad);
    report(&call)?;
    seen.push(format!("{:?}", states(&report(&call)?)));
    // The same endpoint and check elsewhere: not checked again.
    call.send(two(&["b"], "/200?first"));
    seen.push(settled(&call, "c/b")?);
    if kind == Kind::Culvert {
        // Envoy checks it once more.
        ensure!(hits("/200?first") == 1, "checks");
    }
    // Another check of the same endpoint: it stays healthy until that says otherwise.
    call.send(two(&["b"], "/503?second"));
    seen.push(settled(&call, "503")?);
    // The stream is lost: nothing is told on the next one before it is asked for, and then at once what is known.
    call.fail(Status::unavailable("later"));
    let call = server.health_call(DEADLINE)?;
    greet(&call)?;
    ensure!(call.next(Duration::from_millis(600)).is_err(), "a report that nobody has asked for");
    call.send(two(&["b"], "/503?second"));
    seen.push(format!("{:?}", states(&report(&call)?)));
    seen.push(format!("checks: {}", hits("/503?second")));
    // Nothing to do.
    call.send(HealthCheckSpecifier { interval: milliseconds(200), ..HealthCheckSpecifier::default() });
    seen.push(settled(&call, "[]")?);
    let stats = daemon.stats()?;
    let counted = ["requests", "errors", "updates"].map(|name| stats.get(&format!("hds_delegate.{name}")));
    seen.push(format!("requests, errors, updates: {counted:?}"));
    ensure!(stats.get("hds_delegate.responses") > 5, "responses");
    if kind == Kind::Culvert {
        let log = daemon.stderr();
        ensure!(log.contains("cluster_health_checks[0].health_checks[0].timeout: a value is required"), "{log}");
    }
    Ok(seen)
}

#[test]
fn the_server_is_obeyed_as_envoy_obeys_it() -> Result<()> {
    let envoys = thread::spawn(|| converse(Kind::Envoy));
    let ours = converse(Kind::Culvert)?;
    let envoys = envoys.join().map_err(|_| anyhow::anyhow!("the other side panicked"))??;
    assert_eq!(ours, envoys);
    assert_eq!(ours.last().map(String::as_str), Some("requests, errors, updates: [7, 2, 5]"));
    Ok(())
}

#[test]
fn a_field_that_is_not_honoured_is_named() -> Result<()> {
    let server = ReportServer::start()?;
    let (daemon, call) = start(Kind::Culvert, &server)?;
    let mut specifier = cluster("c", 1, HealthChecker::HttpHealthCheck(http("/")));
    specifier.health_checks[0].always_log_health_check_failures = true;
    call.send(HealthCheckSpecifier { cluster_health_checks: vec![specifier], interval: milliseconds(50) });
    culvert_tests::wait_until(DEADLINE, "the refusal", || {
        let (log, field) =
            (daemon.stderr(), "cluster_health_checks[0].health_checks[0].always_log_health_check_failures");
        ensure!(log.contains(&format!("{field}: not supported by culvert yet")), "{log}");
        ensure!(daemon.stats()?.get("hds_delegate.errors") == 1, "errors");
        Ok(())
    })
}
