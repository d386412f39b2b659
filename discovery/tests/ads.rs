//! The whole service in process: how both variants of xDS follow what there is.

mod in_process;

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use culvert_discovery::Discovery;
use culvert_discovery::resources::type_url;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest, DiscoveryResponse};
use in_process::{DEADLINE, Delta, Running, Sotw, config, within, write_service};

#[tokio::test(flavor = "multi_thread")]
async fn state_of_the_world_follows_the_files() {
    let running = Running::with_service("users").await;
    let mut stream = Sotw::open(&running).await;
    stream.subscribe(type_url::ENDPOINT, &["users.default:80"]).await;
    let first = stream.next().await;
    assert_eq!(first.resources.len(), 1);
    stream.ack(&first, &["users.default:80"]).await;
    write_service(running.directory.path(), "users", "10.1.0.2");
    let second = stream.next().await;
    assert_ne!(first.version_info, second.version_info);
    let text = second.resources[0].value.as_slice();
    assert!(text.windows(8).any(|window| window == b"10.1.0.2"));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn delta_follows_the_files() {
    let running = Running::with_service("users").await;
    let mut stream = Delta::open(&running).await;
    stream.send(type_url::CLUSTER, DeltaDiscoveryRequest::default()).await;
    assert_eq!(stream.next().await.0, ["original_dst", "users.default:80"]);
    stream.send(type_url::OFFLOADED_SERVICE, DeltaDiscoveryRequest::default()).await;
    assert_eq!(stream.next().await.0, ["users.default:80"]);
    let path = running.directory.path().join("users.yaml");
    let text = fs::read(&path).unwrap();
    fs::remove_file(&path).unwrap();
    let mut removed = [stream.next().await, stream.next().await];
    removed.sort();
    assert_eq!(removed, [(); 2].map(|()| (vec![], vec!["users.default:80".to_owned()])));
    fs::write(&path, text).unwrap();
    let added = [stream.next().await.0, stream.next().await.0];
    assert_eq!(added, [(); 2].map(|()| ["users.default:80"]));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_nonce_changes_nothing() {
    let running = Running::with_service("users").await;
    let mut stream = Sotw::open(&running).await;
    stream.subscribe(type_url::CLUSTER, &[]).await;
    let first = stream.next().await;
    let stale = DiscoveryResponse { nonce: "stale".into(), ..first.clone() };
    stream.ack(&stale, &[]).await;
    // Had it counted as the answer, this change would be pushed before the real answer.
    write_service(running.directory.path(), "orders", "10.1.0.3");
    running.status_until("both services", |status| status["services"].as_array().unwrap().len() == 2).await;
    let cluster = |status: &serde_json::Value| status["clients"][0]["types"][type_url::CLUSTER].clone();
    assert_eq!(cluster(&running.status().await)["acked"], serde_json::Value::Null);
    stream.ack(&first, &[]).await;
    assert_eq!(stream.next().await.resources.len(), 3);
    assert_eq!(cluster(&running.status().await)["acked"], first.version_info);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_serves_the_same_versions_and_a_delta_client_is_sent_nothing_again() {
    let running = Running::with_service("users").await;
    let listen = running.listen;
    let mut stream = Delta::open(&running).await;
    stream.send(type_url::CLUSTER, DeltaDiscoveryRequest::default()).await;
    let response = within("a response", stream.responses.message()).await.unwrap().unwrap();
    let versions = response.resources.into_iter().map(|resource| (resource.name, resource.version)).collect();
    let directory = running.stop().await;
    // The stream ends with the server, without an error that would look like a fault.
    while within("the end", stream.responses.message()).await.ok().flatten().is_some() {}

    write_service(directory.path(), "orders", "10.1.0.3");
    let running = Running::start(directory, listen).await;
    let mut stream = Delta::open(&running).await;
    let known = DeltaDiscoveryRequest { initial_resource_versions: versions, ..Default::default() };
    stream.send(type_url::CLUSTER, known).await;
    assert_eq!(stream.next().await, (vec!["orders.default:80".to_owned()], vec![]));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_hold_nobody_back_and_get_what_is_newest() {
    let running = Running::with_service("users").await;
    // More than the windows below let through.
    let endpoints: Vec<_> = (0..2000).map(|i| format!("{{addresses: [10.2.{}.{}]}}", i / 250, i % 250)).collect();
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: big, labels: {{kubernetes.io/service-name: \
         users}}}}\naddressType: IPv4\nports: [{{name: http, port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    );
    fs::write(running.directory.path().join("big.yaml"), slice).unwrap();
    let has_all = |status: &serde_json::Value| status["services"][0]["endpoints"].as_array().unwrap().len() == 2001;
    running.status_until("all endpoints", has_all).await;
    let everything = DeltaDiscoveryRequest { resource_names_subscribe: vec!["*".into()], ..Default::default() };
    let mut stuck = Vec::new();
    for _ in 0..20 {
        let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{}", running.listen)).unwrap();
        let endpoint = endpoint.initial_stream_window_size(1024).initial_connection_window_size(1024);
        let channel = within("a connection", endpoint.connect()).await.unwrap();
        let client = Delta::open_over(AggregatedDiscoveryServiceClient::new(channel)).await;
        client.send(type_url::ENDPOINT, everything.clone()).await;
        stuck.push(client);
    }
    let mut quick = Delta::open(&running).await;
    quick.send(type_url::ENDPOINT, everything.clone()).await;
    quick.next().await;
    let sent = |status: &serde_json::Value| {
        let clients = status["clients"].as_array().unwrap();
        clients.iter().filter(|client| client["responses"] == 1).count()
    };
    running.status_until("all are sent something", |status| sent(status) == 21).await;
    for i in 1..=20 {
        write_service(running.directory.path(), "users", &format!("10.1.1.{i}"));
        assert_eq!(quick.next().await.0, ["users.default:80"]);
    }
    assert_eq!(sent(&running.status().await), 20, "nothing is made for those that have not read");
    // Whoever reads after all gets what was being sent, and then the newest.
    let mut late = stuck.swap_remove(7);
    for expected in ["10.1.0.1", "10.1.1.20"] {
        let response = within("a response", late.responses.message()).await.unwrap().unwrap();
        let body = response.resources.into_iter().next().unwrap().resource.unwrap().value;
        assert!(body.windows(expected.len()).any(|window| window == expected.as_bytes()), "no {expected}");
        let ack = DeltaDiscoveryRequest { response_nonce: response.nonce, ..Default::default() };
        late.send(type_url::ENDPOINT, ack).await;
    }
    let stopping = Instant::now();
    running.stop().await;
    assert!(stopping.elapsed() < DEADLINE, "nor do they hold back the end");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_status_page_tells_what_is_wrong() {
    let running = Running::with_service("users").await;
    assert_eq!(running.page("/healthcheck").await, (200, "OK".to_owned()));
    assert_eq!(running.page("/ready").await.0, 200);
    assert_eq!(running.page("/nothing").await.0, 404);
    fs::write(running.directory.path().join("bad.yaml"), "kind: [").unwrap();
    running
        .status_until("the bad file", |status| {
            let errors = &status["clusters"][0]["source"]["file_errors"];
            errors[0]["file"].as_str().is_some_and(|file| file.ends_with("bad.yaml"))
        })
        .await;
    let status = running.status().await;
    assert_eq!(status["services"][0]["offloaded"][0]["revision"], "r1");
    assert_eq!(status["services"][0]["endpoints"][0]["address"], "10.1.0.1:8080");

    let mut stream = Sotw::open(&running).await;
    stream.subscribe(type_url::CLUSTER, &[]).await;
    let response = stream.next().await;
    let error = envoy_types::pb::google::rpc::Status { message: "clusters[0].name: no".into(), ..Default::default() };
    stream
        .send(DiscoveryRequest {
            type_url: type_url::CLUSTER.into(),
            response_nonce: response.nonce.clone(),
            error_detail: Some(error),
            ..Default::default()
        })
        .await;
    running
        .status_until("the rejection", |status| {
            let client = &status["clients"][0];
            client["node"] == "test-node"
                && client["types"][type_url::CLUSTER]["nack"]["reason"] == "clusters[0].name: no"
        })
        .await;
    drop(stream);
    running.status_until("the client to go", |status| status["clients"] == serde_json::json!([])).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_services_reach_both_variants() {
    let directory = tempfile::tempdir().unwrap();
    for i in 0..1000 {
        write_service(directory.path(), &format!("s{i}"), "10.1.0.3");
    }
    let running = Running::start(directory, ([127, 0, 0, 1], 0).into()).await;
    let mut sotw = Sotw::open(&running).await;
    sotw.subscribe(type_url::CLUSTER, &[]).await;
    let names: BTreeMap<_, _> = sotw.next().await.resources.into_iter().map(|any| (any.value, ())).collect();
    assert_eq!(names.len(), 1001);
    let mut delta = Delta::open(&running).await;
    delta.send(type_url::ENDPOINT, DeltaDiscoveryRequest::default()).await;
    assert_eq!(delta.next().await.0.len(), 1000);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_in_use_is_named() {
    let running = Running::with_service("users").await;
    let config = config(running.directory.path(), running.listen);
    let error = format!("{:#}", Discovery::start(config).await.unwrap_err());
    assert!(error.contains(&format!("cannot listen on {}", running.listen)) && error.contains("--listen"), "{error}");
    running.stop().await;
}
