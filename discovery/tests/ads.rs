//! The whole service in process: manifests in, xDS out over real gRPC streams.

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use culvert_discovery::Discovery;
use culvert_discovery::config::{ClusterConfig, Config, INITIAL_WAIT, SourceConfig};
use culvert_discovery::drain;
use culvert_discovery::overrides;
use culvert_discovery::registry::ClusterInfo;
use culvert_discovery::resources::{Options, type_url};
use culvert_discovery::server;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

const DEADLINE: Duration = Duration::from_secs(20);

struct Running {
    directory: tempfile::TempDir,
    listen: SocketAddr,
    http: SocketAddr,
    stop: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    async fn start(directory: tempfile::TempDir, listen: SocketAddr) -> Self {
        let info = ClusterInfo { name: "east".into(), region: "eu".into(), zone: "eu-1".into(), ..Default::default() };
        let config = Config {
            listen,
            http: ([127, 0, 0, 1], 0).into(),
            clusters: vec![ClusterConfig {
                info,
                source: SourceConfig::Manifests(directory.path().into()),
                drained: false,
            }],
            initial_wait: INITIAL_WAIT,
            drain: drain::Settings::default(),
            overrides: overrides::Settings::default(),
            registration: None,
            options: Options::default(),
            serving: server::Settings::default(),
            secrets: None,
        };
        let discovery = Discovery::start(config).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let (listen, http) = (discovery.listen, discovery.http);
        let task = tokio::spawn(discovery.run(async {
            let _ = stopped.await;
        }));
        Self { directory, listen, http, stop, task }
    }

    async fn with_service(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        write_service(directory.path(), name, "10.1.0.1");
        Self::start(directory, ([127, 0, 0, 1], 0).into()).await
    }

    async fn stop(self) -> tempfile::TempDir {
        self.stop.send(()).unwrap();
        within("the service to end", self.task).await.unwrap().unwrap();
        self.directory
    }

    async fn client(&self) -> AggregatedDiscoveryServiceClient<Channel> {
        within("a connection", AggregatedDiscoveryServiceClient::connect(format!("http://{}", self.listen)))
            .await
            .unwrap()
            .max_decoding_message_size(64 << 20)
    }

    async fn page(&self, path: &str) -> (u16, String) {
        let (address, path) = (self.http, path.to_owned());
        let response = tokio::task::spawn_blocking(move || {
            let mut connection = std::net::TcpStream::connect(address).unwrap();
            write!(connection, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
            let mut response = String::new();
            connection.read_to_string(&mut response).unwrap();
            response
        });
        let response = within("a page", response).await.unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.page("/status").await.1).unwrap()
    }

    /// Asks for the status until it is as wanted.
    async fn status_until(&self, what: &str, holds: impl Fn(&serde_json::Value) -> bool) {
        let started = Instant::now();
        loop {
            let status = self.status().await;
            if holds(&status) {
                return;
            }
            assert!(started.elapsed() < DEADLINE, "not reached: {what}: {status:#}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited too long for {what}"),
    }
}

fn write_service(directory: &Path, name: &str, address: &str) {
    let text = format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{clusterIP: 10.96.0.1, selector: {{app: {name}}}, ports: [{{name: http, port: 80}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{{addresses: [{address}]}}]
---
apiVersion: v1
kind: Pod
metadata: {{name: x, labels: {{app: {name}, culvert.dev/offloaded: 'true', culvert.dev/revision: r1}}}}
status: {{podIP: 10.1.0.99}}
"
    );
    let temporary = directory.join(".tmp");
    fs::write(&temporary, text).unwrap();
    fs::rename(temporary, directory.join(format!("{name}.yaml"))).unwrap();
}

fn node() -> Option<Node> {
    Some(Node { id: "test-node".into(), user_agent_name: "culvert".into(), ..Default::default() })
}

struct Sotw {
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
}

impl Sotw {
    async fn open(running: &Running) -> Self {
        let (requests, stream) = mpsc::channel(16);
        let mut client = running.client().await;
        let responses = client.stream_aggregated_resources(ReceiverStream::new(stream));
        Self { requests, responses: within("a stream", responses).await.unwrap().into_inner() }
    }

    async fn send(&self, request: DiscoveryRequest) {
        self.requests.send(DiscoveryRequest { node: node(), ..request }).await.unwrap();
    }

    async fn subscribe(&self, type_url: &str, names: &[&str]) {
        let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
        self.send(DiscoveryRequest { type_url: type_url.into(), resource_names, ..Default::default() }).await;
    }

    async fn next(&mut self) -> DiscoveryResponse {
        within("a response", self.responses.message()).await.unwrap().expect("the stream ended")
    }

    async fn ack(&self, response: &DiscoveryResponse, names: &[&str]) {
        self.send(DiscoveryRequest {
            type_url: response.type_url.clone(),
            resource_names: names.iter().map(|name| (*name).to_owned()).collect(),
            version_info: response.version_info.clone(),
            response_nonce: response.nonce.clone(),
            ..Default::default()
        })
        .await;
    }
}

struct Delta {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
}

impl Delta {
    async fn open(running: &Running) -> Self {
        Self::open_over(running.client().await).await
    }

    async fn open_over(mut client: AggregatedDiscoveryServiceClient<Channel>) -> Self {
        let (requests, stream) = mpsc::channel(16);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(stream));
        Self { requests, responses: within("a stream", responses).await.unwrap().into_inner() }
    }

    async fn send(&self, type_url: &str, request: DeltaDiscoveryRequest) {
        self.send_as(type_url, DeltaDiscoveryRequest { node: node(), ..request }).await;
    }

    async fn send_as(&self, type_url: &str, request: DeltaDiscoveryRequest) {
        self.requests.send(DeltaDiscoveryRequest { type_url: type_url.into(), ..request }).await.unwrap();
    }

    /// The next response: added and removed names. It is acknowledged.
    async fn next(&mut self) -> (Vec<String>, Vec<String>) {
        self.next_as(&node().unwrap()).await
    }

    async fn next_as(&mut self, node: &Node) -> (Vec<String>, Vec<String>) {
        let response = within("a response", self.responses.message()).await.unwrap().expect("the stream ended");
        let ack =
            DeltaDiscoveryRequest { node: Some(node.clone()), response_nonce: response.nonce, ..Default::default() };
        self.send_as(&response.type_url, ack).await;
        (response.resources.into_iter().map(|resource| resource.name).collect(), response.removed_resources)
    }
}

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
    let config = Config {
        listen: running.listen,
        http: ([127, 0, 0, 1], 0).into(),
        clusters: vec![ClusterConfig {
            info: ClusterInfo { name: "east".into(), ..Default::default() },
            source: SourceConfig::Manifests(running.directory.path().into()),
            drained: false,
        }],
        registration: None,
        initial_wait: INITIAL_WAIT,
        drain: drain::Settings::default(),
        overrides: overrides::Settings::default(),
        options: Options::default(),
        serving: server::Settings::default(),
        secrets: None,
    };
    let error = format!("{:#}", Discovery::start(config).await.unwrap_err());
    assert!(error.contains(&format!("cannot listen on {}", running.listen)) && error.contains("--listen"), "{error}");
    running.stop().await;
}

/// A proxy asks for a cluster by its name, beside what it is given, and gets all that goes with it; then it wants it no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_given_the_rest_when_it_asks() {
    let running = Running::with_service("users").await;
    for name in ["orders", "payments"] {
        write_service(running.directory.path(), name, "10.1.0.3");
    }
    let manifest = "{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {name: users}, spec: {egress: [], onDemand: true}}";
    fs::write(running.directory.path().join("policy.yaml"), manifest).unwrap();
    running.status_until("the manifest", |status| status["services"][2]["manifest"] == true).await;
    let of_users =
        Node { id: "n".into(), cluster: "users".into(), user_agent_name: "culvert".into(), ..Default::default() };
    let mut proxy = Delta::open(&running).await;
    let node = || Some(of_users.clone());
    proxy.send_as(type_url::CLUSTER, DeltaDiscoveryRequest { node: node(), ..Default::default() }).await;
    assert_eq!(proxy.next_as(&of_users).await.0, ["original_dst", "users.default:80"]);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["orders.default:80", "nobody.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::CLUSTER, ask).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&["orders.default:80"]), names(&["nobody.default:80"])));
    // Its endpoints, and what its policy is.
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["orders.default:80", "payments.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::ENDPOINT, ask).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&["orders.default:80"]), names(&["payments.default:80"])));
    // The routes know all of them.
    let ask = DeltaDiscoveryRequest {
        node: node(),
        resource_names_subscribe: names(&["outbound_http_80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::ROUTE, ask).await;
    assert_eq!(proxy.next_as(&of_users).await.0, ["outbound_http_80"]);
    let leave = DeltaDiscoveryRequest {
        node: node(),
        resource_names_unsubscribe: names(&["orders.default:80", "nobody.default:80"]),
        ..Default::default()
    };
    proxy.send_as(type_url::CLUSTER, leave).await;
    let (added, removed) = proxy.next_as(&of_users).await;
    assert_eq!((added, removed), (names(&[]), names(&["orders.default:80"])));
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_given_what_its_service_may_call() {
    let running = Running::with_service("users").await;
    for name in ["orders", "payments"] {
        write_service(running.directory.path(), name, "10.1.0.3");
    }
    let manifest = |egress: &str| {
        let text = format!(
            "{{apiVersion: culvert.dev/v1alpha1, kind: ServiceManifest, metadata: {{name: users}}, spec: {{egress: {egress}}}}}"
        );
        let temporary = running.directory.path().join(".tmp");
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, running.directory.path().join("policy.yaml")).unwrap();
    };
    manifest("[orders]");
    running.status_until("the manifest", |status| status["services"][2]["manifest"] == true).await;
    let subscribe = |node: Node| DeltaDiscoveryRequest { node: Some(node), ..Default::default() };
    let of_users =
        Node { id: "n".into(), cluster: "users".into(), user_agent_name: "culvert".into(), ..Default::default() };
    let mut scoped = Delta::open(&running).await;
    scoped.send_as(type_url::CLUSTER, subscribe(of_users.clone())).await;
    assert_eq!(scoped.next_as(&of_users).await.0, ["orders.default:80", "original_dst", "users.default:80"]);
    // Another one is given everything.
    let mut all = Delta::open(&running).await;
    all.send(type_url::CLUSTER, DeltaDiscoveryRequest::default()).await;
    assert_eq!(all.next().await.0.len(), 4);
    // What may be called changes.
    manifest("[payments]");
    let (mut added, mut removed) = scoped.next_as(&of_users).await;
    if removed.is_empty() {
        removed = scoped.next_as(&of_users).await.1;
    }
    assert_eq!(
        (added.pop().as_deref(), removed.pop().as_deref()),
        (Some("payments.default:80"), Some("orders.default:80"))
    );
    running.stop().await;
}
