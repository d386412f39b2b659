//! The built program with API servers and a directory: what an xDS client sees of them.

mod kube_api;
mod support;

use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::address::Address;
use envoy_types::pb::envoy::config::core::v3::socket_address::PortSpecifier;
use envoy_types::pb::envoy::config::core::v3::{HealthStatus, Node};
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DiscoveryRequest, DiscoveryResponse};
use prost::Message as _;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use self::kube_api::{KubeApi, PODS, SERVICES, SLICES, pod, service, slice};
use self::support::{DEADLINE, Program};

const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";

/// A proxy that wants the endpoints of `users.default:80`.
struct Proxy {
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
    /// Region, address and health of each endpoint, as last told.
    endpoints: Vec<String>,
}

impl Proxy {
    async fn connect(program: &Program) -> Self {
        let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{}", program.listen)).await.unwrap();
        let (requests, stream) = mpsc::channel(16);
        let node = Some(Node { id: "node".into(), user_agent_name: "culvert".into(), ..Default::default() });
        let first = DiscoveryRequest {
            node,
            type_url: ENDPOINT.into(),
            resource_names: vec!["users.default:80".into()],
            ..Default::default()
        };
        requests.send(first).await.unwrap();
        let responses = client.stream_aggregated_resources(ReceiverStream::new(stream)).await.unwrap().into_inner();
        Self { requests, responses, endpoints: Vec::new() }
    }

    /// Takes what is told until it is this.
    async fn until(&mut self, expected: &[&str]) {
        let started = Instant::now();
        while self.endpoints != expected {
            let left = DEADLINE.saturating_sub(started.elapsed());
            let told = tokio::time::timeout(left, self.responses.message()).await;
            let Ok(told) = told else { panic!("expected {expected:?}, last told: {:?}", self.endpoints) };
            self.take(told.unwrap().unwrap()).await;
        }
    }

    /// Whether nothing is told for a while.
    async fn is_left_alone(&mut self, time: Duration) -> bool {
        tokio::time::timeout(time, self.responses.message()).await.is_err()
    }

    async fn take(&mut self, told: DiscoveryResponse) {
        self.requests
            .send(DiscoveryRequest {
                type_url: ENDPOINT.into(),
                resource_names: vec!["users.default:80".into()],
                version_info: told.version_info,
                response_nonce: told.nonce,
                ..Default::default()
            })
            .await
            .unwrap();
        let Some(resource) = told.resources.first() else { return };
        let assignment = ClusterLoadAssignment::decode(&*resource.value).unwrap();
        self.endpoints.clear();
        for locality in assignment.endpoints {
            let region = locality.locality.unwrap().region;
            for endpoint in locality.lb_endpoints {
                let health = endpoint.health_status();
                let Some(HostIdentifier::Endpoint(host)) = endpoint.host_identifier else { panic!("no address") };
                let Some(Address::SocketAddress(address)) = host.address.unwrap().address else { panic!("no address") };
                let Some(PortSpecifier::PortValue(port)) = address.port_specifier else { panic!("no port") };
                let drains = if health == HealthStatus::Draining { " drains" } else { "" };
                self.endpoints.push(format!("{region} {}:{port}{drains}", address.address));
            }
        }
    }
}

async fn cluster(addresses: &[&str]) -> KubeApi {
    let api = KubeApi::start().await;
    api.put(SERVICES, service("users", 80));
    api.put(SLICES, slice("users", addresses));
    api
}

fn write(directory: &tempfile::TempDir, name: &str, value: &Value) -> String {
    let path = directory.path().join(name);
    // JSON is YAML.
    std::fs::write(&path, value.to_string()).unwrap();
    path.to_str().unwrap().to_owned()
}

fn of(api: &KubeApi, name: &str) -> Value {
    json!({ "name": name, "region": name, "kubernetes": { "server": api.url() } })
}

fn source(status: &Value, cluster: usize) -> &Value {
    &status["clusters"][cluster]["source"]
}

const OPERATOR: &str = "X-Culvert-Operator: test\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn two_api_servers_and_a_directory_are_one_mesh_that_outlives_each_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let manifests = directory.path().join("manifests");
    std::fs::create_dir(&manifests).unwrap();
    let list =
        json!({ "kind": "List", "apiVersion": "v1", "items": [service("users", 80), slice("users", &["10.3.0.1"])] });
    std::fs::write(manifests.join("all.json"), list.to_string()).unwrap();
    let (east, mut west) = (cluster(&["10.1.0.1"]).await, cluster(&["10.2.0.1", "10.2.0.2"]).await);
    let config = json!({
        "drain_file": directory.path().join("drained"),
        "clusters": [of(&east, "east"), of(&west, "west"), { "name": "files", "region": "files", "manifests": manifests }],
    });
    let config = write(&directory, "discovery.yaml", &config);
    let program = Program::start(&["-c", &config]);
    let mut proxy = Proxy::connect(&program).await;
    proxy.until(&["east 10.1.0.1:8080", "files 10.3.0.1:8080", "west 10.2.0.1:8080", "west 10.2.0.2:8080"]).await;

    // A pod that is being deleted drains while its slice still has it as ready.
    let mut leaving = pod("pod-2", "10.2.0.2");
    leaving["metadata"]["deletionTimestamp"] = "2024-01-01T00:00:00Z".into();
    west.put(PODS, leaving);
    proxy
        .until(&["east 10.1.0.1:8080", "files 10.3.0.1:8080", "west 10.2.0.1:8080", "west 10.2.0.2:8080 drains"])
        .await;

    // One API server dies: what it said stays, and it is shown.
    west.down();
    let status = program.until("/status", "a stale cluster", |status| source(status, 1)["stale"] == true);
    assert!(source(&status, 1)["error"].as_str().unwrap().contains("onnect"), "{status:#}");
    assert!(source(&status, 1)["stale_since"].as_str().unwrap().ends_with('Z'), "{status:#}");
    assert_eq!((&source(&status, 0)["stale"], &source(&status, 2)["stale"]), (&json!(false), &json!(false)));
    assert!(proxy.is_left_alone(Duration::from_millis(300)).await);

    // The others go on, and it returns with what changed meanwhile.
    east.put(SLICES, slice("users", &["10.1.0.1", "10.1.0.4"]));
    let meanwhile = ["east 10.1.0.1:8080", "east 10.1.0.4:8080", "files 10.3.0.1:8080", "west 10.2.0.1:8080"];
    proxy.until(&[&meanwhile[..], &["west 10.2.0.2:8080 drains"]].concat()).await;
    west.put(SLICES, slice("users", &["10.2.0.1", "10.2.0.3"]));
    west.up().await;
    proxy.until(&[&meanwhile[..], &["west 10.2.0.3:8080"]].concat()).await;
    program.until("/status", "all well", |status| source(status, 1)["stale"] == false);

    // An operator takes it out, and a restart does not bring it back.
    let (status, _, told) = program.request("POST", "/clusters/west/drain", OPERATOR, "");
    assert_eq!((status, &*told), (200, "cluster west is drained\n"));
    let drained = ["west 10.2.0.1:8080 drains", "west 10.2.0.3:8080 drains"];
    proxy.until(&[&meanwhile[..3], &drained].concat()).await;
    assert_eq!(program.json("/status")["clusters"][1]["drained"], true);
    program.kill();
    let program = Program::start(&["-c", &config]);
    let mut proxy = Proxy::connect(&program).await;
    proxy.until(&[&meanwhile[..3], &drained].concat()).await;
    assert_eq!(program.request("POST", "/clusters/west/undrain", OPERATOR, "").0, 200);
    proxy.until(&[&meanwhile[..], &["west 10.2.0.3:8080"]].concat()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_api_server_does_not_keep_the_others_from_being_served() {
    let directory = tempfile::tempdir().unwrap();
    let (east, mut west) = (cluster(&["10.1.0.1"]).await, cluster(&["10.2.0.1"]).await);
    west.down();
    let config = json!({ "initial_wait": 1, "clusters": [of(&east, "east"), of(&west, "west")] });
    let program = Program::start(&["-c", &write(&directory, "discovery.yaml", &config)]);
    let mut proxy = Proxy::connect(&program).await;
    proxy.until(&["east 10.1.0.1:8080"]).await;
    assert_eq!(program.request("GET", "/ready", "", "").0, 200);
    let status = program.json("/status");
    assert_eq!((&source(&status, 1)["stale"], &status["clusters"][1]["services"]), (&json!(true), &json!(0)));
    west.up().await;
    proxy.until(&["east 10.1.0.1:8080", "west 10.2.0.1:8080"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_waits_for_its_clusters_ends_when_it_is_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let mut east = cluster(&["10.1.0.1"]).await;
    east.down();
    let config = write(&directory, "discovery.yaml", &json!({ "initial_wait": 0, "clusters": [of(&east, "east")] }));
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_culvert-discovery"))
        .args(["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "-c", &config])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().contains("cluster `east`")), "it ended without a word");
    let id = child.id().to_string();
    assert!(std::process::Command::new("kill").arg(id).status().unwrap().success());
    let started = Instant::now();
    let ended = loop {
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        if started.elapsed() > DEADLINE {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(ended.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn only_operators_drain_clusters() {
    let directory = tempfile::tempdir().unwrap();
    let east = cluster(&["10.1.0.1"]).await;
    let token = write(&directory, "token", &json!("secret"));
    for (token_file, headers, method, path, expected) in [
        (None, OPERATOR, "POST", "/clusters/east/drain", 200),
        (None, OPERATOR, "GET", "/clusters/east/drain", 405),
        (None, OPERATOR, "POST", "/clusters/north/drain", 404),
        (None, OPERATOR, "POST", "/clusters/east/sink", 404),
        // What a page in a browser can send.
        (None, "", "POST", "/clusters/east/drain", 403),
        (Some(&token), OPERATOR, "POST", "/clusters/east/drain", 401),
        (
            Some(&token),
            "X-Culvert-Operator: test\r\nAuthorization: Bearer guess\r\n",
            "POST",
            "/clusters/east/drain",
            401,
        ),
        (
            Some(&token),
            "X-Culvert-Operator: test\r\nAuthorization: Bearer \"secret\"\r\n",
            "POST",
            "/clusters/east/drain",
            200,
        ),
    ] {
        let config = json!({ "operator_token_file": token_file, "clusters": [of(&east, "east")] });
        let program = Program::start(&["-c", &write(&directory, "discovery.yaml", &config)]);
        let (status, _, said) = program.request(method, path, headers, "");
        assert_eq!(status, expected, "{method} {path} {headers:?}: {said}");
        if expected == 200 {
            assert!(said.contains("until discovery restarts"), "{said}");
        }
    }
}
