//! The service in this process: manifests in, xDS out over real gRPC streams.
#![allow(dead_code, reason = "each file of tests uses a part of it")]

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
use culvert_discovery::resources::Options;
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

pub const DEADLINE: Duration = Duration::from_secs(20);

/// A configuration of one cluster, of the manifests in a directory.
pub fn config(directory: &Path, listen: SocketAddr) -> Config {
    let info = ClusterInfo { name: "east".into(), region: "eu".into(), zone: "eu-1".into(), ..Default::default() };
    Config {
        listen,
        http: ([127, 0, 0, 1], 0).into(),
        clusters: vec![ClusterConfig { info, source: SourceConfig::Manifests(directory.into()), drained: false }],
        initial_wait: INITIAL_WAIT,
        drain: drain::Settings::default(),
        overrides: overrides::Settings::default(),
        registration: None,
        options: Options::default(),
        serving: server::Settings::default(),
        secrets: None,
    }
}

pub struct Running {
    pub directory: tempfile::TempDir,
    pub listen: SocketAddr,
    pub http: SocketAddr,
    pub stop: oneshot::Sender<()>,
    pub task: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    pub async fn start(directory: tempfile::TempDir, listen: SocketAddr) -> Self {
        let discovery = Discovery::start(config(directory.path(), listen)).await.unwrap();
        let (stop, stopped) = oneshot::channel();
        let (listen, http) = (discovery.listen, discovery.http);
        let task = tokio::spawn(discovery.run(async {
            let _ = stopped.await;
        }));
        Self { directory, listen, http, stop, task }
    }

    pub async fn with_service(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        write_service(directory.path(), name, "10.1.0.1");
        Self::start(directory, ([127, 0, 0, 1], 0).into()).await
    }

    pub async fn stop(self) -> tempfile::TempDir {
        self.stop.send(()).unwrap();
        within("the service to end", self.task).await.unwrap().unwrap();
        self.directory
    }

    pub async fn client(&self) -> AggregatedDiscoveryServiceClient<Channel> {
        within("a connection", AggregatedDiscoveryServiceClient::connect(format!("http://{}", self.listen)))
            .await
            .unwrap()
            .max_decoding_message_size(64 << 20)
    }

    pub async fn page(&self, path: &str) -> (u16, String) {
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

    pub async fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.page("/status").await.1).unwrap()
    }

    /// Asks for the status until it is as wanted.
    pub async fn status_until(&self, what: &str, holds: impl Fn(&serde_json::Value) -> bool) {
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

pub async fn within<F: Future>(what: &str, future: F) -> F::Output {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(output) => output,
        Err(_) => panic!("waited too long for {what}"),
    }
}

pub fn write_service(directory: &Path, name: &str, address: &str) {
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

pub fn node() -> Option<Node> {
    Some(Node { id: "test-node".into(), user_agent_name: "culvert".into(), ..Default::default() })
}

pub struct Sotw {
    pub requests: mpsc::Sender<DiscoveryRequest>,
    pub responses: Streaming<DiscoveryResponse>,
}

impl Sotw {
    pub async fn open(running: &Running) -> Self {
        let (requests, stream) = mpsc::channel(16);
        let mut client = running.client().await;
        let responses = client.stream_aggregated_resources(ReceiverStream::new(stream));
        Self { requests, responses: within("a stream", responses).await.unwrap().into_inner() }
    }

    pub async fn send(&self, request: DiscoveryRequest) {
        self.requests.send(DiscoveryRequest { node: node(), ..request }).await.unwrap();
    }

    pub async fn subscribe(&self, type_url: &str, names: &[&str]) {
        let resource_names = names.iter().map(|name| (*name).to_owned()).collect();
        self.send(DiscoveryRequest { type_url: type_url.into(), resource_names, ..Default::default() }).await;
    }

    pub async fn next(&mut self) -> DiscoveryResponse {
        within("a response", self.responses.message()).await.unwrap().expect("the stream ended")
    }

    pub async fn ack(&self, response: &DiscoveryResponse, names: &[&str]) {
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

pub struct Delta {
    pub requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub responses: Streaming<DeltaDiscoveryResponse>,
}

impl Delta {
    pub async fn open(running: &Running) -> Self {
        Self::open_over(running.client().await).await
    }

    pub async fn open_over(mut client: AggregatedDiscoveryServiceClient<Channel>) -> Self {
        let (requests, stream) = mpsc::channel(16);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(stream));
        Self { requests, responses: within("a stream", responses).await.unwrap().into_inner() }
    }

    pub async fn send(&self, type_url: &str, request: DeltaDiscoveryRequest) {
        self.send_as(type_url, DeltaDiscoveryRequest { node: node(), ..request }).await;
    }

    pub async fn send_as(&self, type_url: &str, request: DeltaDiscoveryRequest) {
        self.requests.send(DeltaDiscoveryRequest { type_url: type_url.into(), ..request }).await.unwrap();
    }

    /// The next response: added and removed names. It is acknowledged.
    pub async fn next(&mut self) -> (Vec<String>, Vec<String>) {
        self.next_as(&node().unwrap()).await
    }

    pub async fn next_as(&mut self, node: &Node) -> (Vec<String>, Vec<String>) {
        let response = within("a response", self.responses.message()).await.unwrap().expect("the stream ended");
        let ack =
            DeltaDiscoveryRequest { node: Some(node.clone()), response_nonce: response.nonce, ..Default::default() };
        self.send_as(&response.type_url, ack).await;
        (response.resources.into_iter().map(|resource| resource.name).collect(), response.removed_resources)
    }
}
