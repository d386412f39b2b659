//! What else is served at the xDS port: REST, load reports and CSDS, with the real Envoy as client where it is one.

mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_client::ClientStatusDiscoveryServiceClient;
use envoy_types::pb::envoy::service::status::v3::{ClientStatusRequest, ConfigStatus};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{NodeMatcher, StringMatcher};
use serde_json::{Value, json};
use support::envoy::{Asks, Envoy, free_port, get, serve, status, users, wait_until, write_manifests};
use support::{DEADLINE, Program};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";

fn write_users(directory: &Path, port: u16, backend: u16) {
    write_manifests(directory, &users(port, backend));
}

fn start(directory: &Path, port: u16) -> Program {
    let config = directory.join("discovery.conf");
    let text = format!(
        "clusters: [{{name: east, manifests: {}}}]\noutbound_port: {port}\noutbound_address: 127.0.0.1\nload_report_interval: 1\n",
        directory.display()
    );
    std::fs::write(&config, text).unwrap();
    Program::start(&["-c", config.to_str().unwrap()])
}

#[test]
fn envoy_polls_over_rest() {
    let directory = tempfile::tempdir().unwrap();
    let asked = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
    let [first, second] = [0, 1].map(|i| serve(Arc::clone(&asked[i])));
    let (port, admin) = (free_port(), free_port());
    write_users(directory.path(), port, first);
    let program = start(directory.path(), port);
    let asks = Asks { admin, xds: program.listen.port(), by: "REST", ..Asks::default() };
    let _envoy = Envoy::start(&asks.bootstrap());
    wait_until("an answer through Envoy", || status(port, "/") == "200");
    assert!(asked[0].load(Ordering::SeqCst) > 0);
    // All that it was given came over REST, and nothing was refused.
    let stats = get(admin, "/stats").unwrap();
    for line in ["cluster_manager.cds.update_rejected: 0", "listener_manager.lds.update_rejected: 0"] {
        assert!(stats.contains(line), "{line} is not in {stats}");
    }
    assert_eq!(program.json("/status")["clients"], json!([]));
    write_users(directory.path(), port, second);
    wait_until("an answer of the other server", || {
        status(port, "/");
        asked[1].load(Ordering::SeqCst) > 0
    });
}

/// A poll: status and body.
fn poll(program: &Program, kind: &str, body: &Value) -> (u16, String) {
    let mut connection = TcpStream::connect(program.listen).unwrap();
    connection.set_read_timeout(Some(DEADLINE)).unwrap();
    let body = body.to_string();
    let head = "Host: discovery\r\nConnection: close";
    write!(connection, "POST /v3/discovery:{kind} HTTP/1.1\r\n{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        .unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[test]
fn polls_are_answered_by_version_name_and_node() {
    let directory = tempfile::tempdir().unwrap();
    write_users(directory.path(), 80, 8080);
    let program = start(directory.path(), 15001);
    let read = |(status, body): (u16, String)| -> Value {
        assert_eq!(status, 200, "{body}");
        serde_json::from_str(&body).unwrap()
    };
    let all = read(poll(&program, "clusters", &json!({ "node": { "id": "n" } })));
    let names: Vec<_> = all["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["original_dst", "users.default:80"]);
    assert_eq!(
        all["resources"][1]["eds_cluster_config"]["eds_config"]["api_config_source"]["cluster_names"],
        json!(["discovery"])
    );
    let again = json!({ "version_info": all["version_info"], "node": { "id": "n" } });
    assert_eq!(poll(&program, "clusters", &again).0, 304);
    let one = read(poll(&program, "endpoints", &json!({ "resource_names": ["users.default:80", "nobody"] })));
    assert_eq!(one["resources"].as_array().unwrap().len(), 1);
    let listeners = read(poll(&program, "listeners", &json!({ "node": { "id": "n", "user_agent_name": "culvert" } })));
    assert!(listeners.to_string().contains("culvert.filters.http.override"), "{listeners}");
    assert!(!listeners.to_string().contains("\"ads\""), "{listeners}");
    assert_eq!(poll(&program, "runtime", &json!({})).0, 404);
    let elsewhere = json!({ "node": { "id": "n", "metadata": { "discovery_cluster": "control" } } });
    let listeners = read(poll(&program, "listeners", &elsewhere)).to_string();
    assert!(listeners.contains("\"cluster_names\":[\"control\"]"), "{listeners}");
    let gateway = json!({ "node": { "id": "n", "metadata": { "culvert.proxy": "gateway" } } });
    let (status, said) = poll(&program, "listeners", &gateway);
    assert!(status == 400 && said.contains("`gateway` is not node, sidecar or edge"), "{status} {said}");
    assert_eq!(poll(&program, "routes", &json!({ "type_url": CLUSTER })).0, 400);
    assert_eq!(poll(&program, "routes", &json!([1])).0, 400);
    assert!(program.page("/metrics").contains("\nculvert_discovery_polls_total 5\n"));
}

#[test]
fn envoy_reports_its_loads() {
    let directory = tempfile::tempdir().unwrap();
    let backend = serve(Arc::default());
    let (port, admin) = (free_port(), free_port());
    write_users(directory.path(), port, backend);
    let program = start(directory.path(), port);
    let services = "[{envoy_grpc: {cluster_name: discovery}}]";
    let reports =
        format!("load_stats_config: {{api_type: GRPC, transport_api_version: V3, grpc_services: {services}}}");
    let more = format!("cluster_manager: {{{reports}}}");
    let asks = Asks { admin, xds: program.listen.port(), by: "GRPC", more: &more, ..Asks::default() };
    let _envoy = Envoy::start(&asks.bootstrap());
    wait_until("an answer through Envoy", || status(port, "/") == "200");
    // Envoy counts for this from its first report on.
    let name = format!("users.default:{port}");
    let load = || program.json("/status")["loads"][&name].clone();
    wait_until("a first load", || {
        assert_eq!(status(port, "/"), "200");
        load()["succeeded"].as_u64() > Some(0)
    });
    let reports = || {
        let metrics = program.page("/metrics");
        let count = metrics.lines().find_map(|line| line.strip_prefix("culvert_discovery_load_reports_total "));
        count.unwrap().parse::<u64>().unwrap()
    };
    // What is on its way comes with the next report or the one after it.
    let so_far = reports();
    wait_until("two more reports", || reports() >= so_far + 2);
    let before = load();
    for i in 0..7 {
        assert_eq!(status(port, if i < 5 { "/fail" } else { "/" }), if i < 5 { "500" } else { "200" });
    }
    let expected = |field: &str, more: u64| before[field].as_u64().unwrap() + more;
    program.until("/status", "the loads", |status| {
        let load = &status["loads"][&name];
        load["failed"] == expected("failed", 5)
            && load["succeeded"] == expected("succeeded", 2)
            && load["issued"] == expected("issued", 7)
    });
    let metrics = program.page("/metrics");
    let line = format!(
        "culvert_discovery_load_requests_total{{cluster=\"{name}\",what=\"failed\"}} {}\n",
        expected("failed", 5)
    );
    assert!(metrics.contains(&line), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_are_asked_what_they_have() {
    let directory = tempfile::tempdir().unwrap();
    write_users(directory.path(), 80, 8080);
    let program = start(directory.path(), 15001);
    let address = format!("http://{}", program.listen);
    let node = |id: &str| Some(Node { id: id.into(), user_agent_name: "envoy".into(), ..Default::default() });
    let mut ads = AggregatedDiscoveryServiceClient::connect(address.clone()).await.unwrap();
    // One that accepts clusters by delta and does not answer to listeners; one that refuses clusters.
    let (delta, stream) = mpsc::channel(4);
    let mut responses = ads.delta_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let ask = |kind: &str, nonce: &str| DeltaDiscoveryRequest {
        node: node("one"),
        type_url: kind.into(),
        response_nonce: nonce.into(),
        ..Default::default()
    };
    delta.send(ask(CLUSTER, "")).await.unwrap();
    let nonce = responses.message().await.unwrap().unwrap().nonce;
    delta.send(ask(CLUSTER, &nonce)).await.unwrap();
    let listener = CLUSTER.replace("cluster.v3.Cluster", "listener.v3.Listener");
    delta.send(ask(&listener, "")).await.unwrap();
    responses.message().await.unwrap().unwrap();
    let (sotw, stream) = mpsc::channel(4);
    let mut refused = ads.stream_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let ask = DiscoveryRequest { node: node("two"), type_url: CLUSTER.into(), ..Default::default() };
    sotw.send(ask.clone()).await.unwrap();
    let response_nonce = refused.message().await.unwrap().unwrap().nonce;
    let error_detail = Some(envoy_types::pb::google::rpc::Status { message: "no".into(), ..Default::default() });
    sotw.send(DiscoveryRequest { response_nonce, error_detail, ..ask }).await.unwrap();
    tokio::task::block_in_place(|| {
        program.until("/status", "the refusal", |status| status["clients"][1]["state"] == "rejected");
    });

    let mut csds = ClientStatusDiscoveryServiceClient::connect(address).await.unwrap();
    let answer = csds.fetch_client_status(ClientStatusRequest::default()).await.unwrap().into_inner();
    let mut found = BTreeMap::new();
    for client in &answer.config {
        for config in &client.generic_xds_configs {
            assert!(!config.version_info.is_empty() && config.xds_config.is_some(), "{config:?}");
            let key = (client.node.as_ref().unwrap().id.as_str(), config.type_url.as_str(), config.name.as_str());
            found.insert(key, config.config_status());
        }
    }
    let expected = [
        (("one", CLUSTER, "original_dst"), ConfigStatus::Synced),
        (("one", CLUSTER, "users.default:80"), ConfigStatus::Synced),
        (("one", listener.as_str(), "outbound"), ConfigStatus::Stale),
        (("two", CLUSTER, "original_dst"), ConfigStatus::Error),
        (("two", CLUSTER, "users.default:80"), ConfigStatus::Error),
    ];
    assert_eq!(found, expected.into());
    let matching = |match_pattern| ClientStatusRequest {
        node_matchers: vec![NodeMatcher {
            node_id: Some(StringMatcher { match_pattern, ..Default::default() }),
            ..Default::default()
        }],
        exclude_resource_contents: true,
        ..Default::default()
    };
    let two = matching(Some(MatchPattern::Prefix("tw".into())));
    let answer = csds.stream_client_status(tokio_stream::once(two)).await.unwrap().into_inner().message().await;
    let [client] = &*answer.unwrap().unwrap().config else { panic!("one client expected") };
    assert_eq!(client.node.as_ref().unwrap().id, "two");
    assert!(client.generic_xds_configs.iter().all(|config| config.xds_config.is_none()));
    let error = csds.fetch_client_status(matching(None)).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::InvalidArgument);
}
