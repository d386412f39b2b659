//! What culvertd reports of its load, compared with what the real Envoy reports of the same traffic.

use std::time::Duration;

use anyhow::Result;
use culvert_tests::app::App;
use culvert_tests::daemon::{Daemon, Kind, fetch, free_port};
use culvert_tests::http1::Request;
use culvert_tests::report_server::ReportServer;
use envoy_types::pb::envoy::service::load_stats::v3::LoadStatsResponse;
use envoy_types::pb::google::protobuf::Duration as ProtoDuration;

const DEADLINE: Duration = Duration::from_secs(20);

#[test]
fn explore() -> Result<()> {
    let server = ReportServer::start()?;
    let app = |pod: &str| App { pod: pod.to_owned(), revision: String::new(), upstream: None }.start();
    let (a, b, dead) = (app("a")?, app("b")?, free_port()?);
    let (port, tcp) = (free_port()?, free_port()?);
    let lrs = server.port;
    let yaml = format!(r#"
node: {{id: node-1, cluster: edge}}
cluster_manager:
  load_stats_config: {{api_type: GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: lrs}}}}]}}
static_resources:
  listeners:
  - name: h
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
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
              - {{match: {{prefix: /slow}}, route: {{cluster: app, timeout: 0.1s}}}}
              - {{match: {{prefix: /retry}}, route: {{cluster: app, retry_policy: {{retry_on: 5xx, num_retries: 2}}}}}}
              - {{match: {{prefix: /}}, route: {{cluster: app}}}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}}
  - name: t
    address: {{socket_address: {{address: 127.0.0.1, port_value: {tcp}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.tcp_proxy
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: tcp, cluster: tcpapp}}
  clusters:
  - name: lrs
    type: STATIC
    connect_timeout: 1s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    load_assignment:
      cluster_name: lrs
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {lrs}}}}}}}}}]}}]
  - name: app
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: app
      endpoints:
      - locality: {{region: r, zone: a, sub_zone: s}}
        lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {a}}}}}}}}}]
      - locality: {{region: r, zone: b}}
        lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {b}}}}}}}}}]
  - name: tcpapp
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: tcpapp
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {a}}}}}}}}}]}}]
  - name: dead
    type: STATIC
    connect_timeout: 1s
    load_assignment:
      cluster_name: dead
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {dead}}}}}}}}}]}}]
  - name: full
    type: STATIC
    connect_timeout: 1s
    circuit_breakers: {{thresholds: [{{max_requests: 0, max_pending_requests: 0}}]}}
    load_assignment:
      cluster_name: full
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {a}}}}}}}}}]}}]
"#);
    let daemon = Daemon::start(Kind::Envoy, &yaml)?;
    let call = server.load_call(DEADLINE)?;
    println!("{:?}", call.next(DEADLINE)?);
    fetch(port, Request::get("/before"))?;
    call.send(LoadStatsResponse { send_all_clusters: true, load_reporting_interval: Some(ProtoDuration{seconds:1,nanos:0}), report_endpoint_granularity: true, ..Default::default() });
    println!("{:#?}", call.next(DEADLINE)?.cluster_stats);
    for path in ["/", "/x", "/?status=404", "/?status=500", "/?status=200"] { println!("{path} {}", fetch(port, Request::get(path))?.status); }
    println!("MIXED {:#?}", call.next(DEADLINE)?.cluster_stats);
    println!("slow {}", fetch(port, Request::get("/slow?delay_ms=300"))?.status);
    println!("SLOW {:#?}", call.next(DEADLINE)?.cluster_stats);
    println!("dead {}", fetch(port, Request::get("/dead"))?.status);
    println!("full {}", fetch(port, Request::get("/full"))?.status);
    println!("DEAD, FULL {:#?}", call.next(DEADLINE)?.cluster_stats);
    println!("retry {}", fetch(port, Request::get("/retry?status=503"))?.status);
    println!("RETRY {:#?}", call.next(DEADLINE)?.cluster_stats);
    { let s = std::net::TcpStream::connect(("127.0.0.1", port))?; use std::io::Write; (&s).write_all(b"GET /?delay_ms=600 HTTP/1.1\r\nhost: x\r\n\r\n")?; std::thread::sleep(Duration::from_millis(200)); }
    println!("DISCONNECT {:#?}", call.next(DEADLINE)?.cluster_stats);
    let s = std::net::TcpStream::connect(("127.0.0.1", tcp))?; use std::io::Write; (&s).write_all(b"GET /?x HTTP/1.1\r\nhost: x\r\n\r\n")?; 
    let h = std::net::TcpStream::connect(("127.0.0.1", port))?; (&h).write_all(b"GET /?delay_ms=4000 HTTP/1.1\r\nhost: x\r\n\r\n")?;
    println!("TCP {:#?}", call.next(DEADLINE)?.cluster_stats);
    drop(s);
    println!("TCP+1 {:#?}", call.next(DEADLINE)?.cluster_stats);
    for _ in 0..3 { call.send(LoadStatsResponse { clusters: vec!["dead".into(), "nope".into(), "app".into()], load_reporting_interval: Some(ProtoDuration{seconds:1,nanos:0}), report_endpoint_granularity: false, ..Default::default() }); }
    println!("LIST {:#?}", call.next(DEADLINE)?.cluster_stats);
    println!("LIST {:#?}", call.next(DEADLINE)?.cluster_stats);
    let st = daemon.stats()?; for n in st.names().filter(|n| n.contains("load_rep")) { println!("{n} {}", st.get(n)); }
    call.fail(tonic::Status::internal("no"));
    let t = std::time::Instant::now();
    let call = server.load_call(DEADLINE)?;
    println!("again after {:?}", t.elapsed());
    fetch(port, Request::get("/"))?;
    println!("AGAIN {:#?}", call.next(DEADLINE)?);
    call.send(LoadStatsResponse { clusters: vec!["app".into()], load_reporting_interval: Some(ProtoDuration{seconds:1,nanos:0}), report_endpoint_granularity: false, ..Default::default() });
    println!("AGAIN {:#?}", call.next(DEADLINE)?.cluster_stats);
    let st = daemon.stats()?; for n in st.names().filter(|n| n.contains("load_rep")) { println!("{n} {}", st.get(n)); }
    // zero interval
    call.send(LoadStatsResponse { clusters: vec!["app".into()], load_reporting_interval: None, report_endpoint_granularity: false, ..Default::default() });
    std::thread::sleep(Duration::from_millis(300));
    let mut n = 0; while call.next(Duration::from_millis(1)).is_ok() { n += 1; if n > 1000 {break} } println!("zero interval: {n}");
    println!("{}", daemon.stderr());
    Ok(())
}
