//! The xDS port with TLS: who may have what, by certificates.

mod support;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use envoy_types::pb::envoy::service::status::v3::ClientStatusRequest;
use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_client::ClientStatusDiscoveryServiceClient;
use support::certificates::{Authority, channel, host, uri};
use support::envoy::{Asks, Envoy, free_port, get, wait_until};
use support::{DEADLINE, Program, eventually};
use tonic::transport::Channel;
use tonic::{Code, Status};

const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
const OBJECTS: &str = "
apiVersion: v1
kind: Service
metadata: {name: users}
spec: {clusterIP: 10.96.0.1, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: orders}
spec: {clusterIP: 10.96.0.2, ports: [{name: http, port: 80}]}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {name: users}
spec: {egress: []}
";

struct Stage {
    directory: tempfile::TempDir,
    authority: Authority,
    program: Program,
}

impl Stage {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let authority = Authority::new(path, "ca");
        authority.issue(path, "server", &[host()]);
        authority.issue(path, "proxy", &[uri("spiffe://mesh/ns/shop/sa/proxy")]);
        authority.issue(path, "operator", &[uri("spiffe://mesh/operator")]);
        authority.issue(path, "stranger", &[uri("spiffe://elsewhere/ns/shop/sa/proxy")]);
        Authority::new(path, "other-ca").issue(path, "forged", &[uri("spiffe://mesh/ns/shop/sa/proxy")]);
        std::fs::write(path.join("all.yaml"), OBJECTS).unwrap();
        let config = path.join("discovery.conf");
        let text = format!(
            "
clusters: [{{name: east, manifests: {0}}}]
tls: {{certificate: {0}/server.crt, private_key: {0}/server.key, client_authorities: {0}/ca.crt}}
authorization:
- {{identity: 'spiffe://mesh/ns/*/sa/proxy', nodes: ['node-*'], services: [users]}}
- {{identity: 'spiffe://mesh/operator', nodes: [], status: true}}
",
            path.display()
        );
        std::fs::write(&config, text).unwrap();
        let program = Program::start(&["-c", config.to_str().unwrap()]);
        Self { directory, authority, program }
    }

    /// A connection with this certificate, which trusts this authority.
    async fn connect(&self, name: Option<&str>, authority: &str) -> Result<Channel, tonic::transport::Error> {
        channel(self.directory.path(), self.program.listen, name, authority).await
    }

    /// The names of the clusters that a node is given.
    async fn clusters(&self, certificate: &str, node: Option<Node>) -> Result<Vec<String>, Status> {
        let channel =
            self.connect(Some(certificate), "ca").await.map_err(|error| Status::unavailable(error.to_string()))?;
        let request = DeltaDiscoveryRequest { node, type_url: CLUSTER.into(), ..Default::default() };
        let requests = tokio_stream::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
        let mut ads = AggregatedDiscoveryServiceClient::new(channel);
        let mut responses = ads.delta_aggregated_resources(requests).await?.into_inner();
        let answer = tokio::time::timeout(DEADLINE, responses.message()).await.expect("an answer")?;
        Ok(answer.unwrap().resources.into_iter().map(|resource| resource.name).collect())
    }

    fn metric(&self, name: &str) -> u64 {
        let metrics = tokio::task::block_in_place(|| self.program.page("/metrics"));
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().parse().unwrap()
    }
}

fn node(id: &str, cluster: &str) -> Option<Node> {
    Some(Node { id: id.into(), cluster: cluster.into(), ..Default::default() })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_is_given_what_its_certificate_may_have() {
    let stage = Stage::new();
    let given = stage.clusters("proxy", node("node-1", "users")).await.unwrap();
    assert_eq!(given, ["original_dst", "users.default:80"]);
    for (certificate, node, reason, text) in [
        ("proxy", node("edge", "users"), "node", "node `edge`: this certificate may not be used by a node of this id"),
        ("proxy", node("node-1", "orders"), "services", "may not be used by a node of these services"),
        ("proxy", node("node-1", ""), "services", "or of none"),
        ("proxy", None, "nameless", "the first request needs a node"),
        (
            "stranger",
            node("node-1", "users"),
            "identity",
            "names in this certificate: spiffe://elsewhere/ns/shop/sa/proxy",
        ),
    ] {
        let metric = format!("culvert_discovery_refused_total{{reason=\"{reason}\"}} ");
        let before = stage.metric(&metric);
        let status = stage.clusters(certificate, node).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{status}");
        assert!(status.message().contains(text), "{status}");
        assert_eq!(stage.metric(&metric), before + 1, "{reason}");
    }
    // State of the world is no way around it, nor is another node on a stream that was let pass.
    let channel = stage.connect(Some("proxy"), "ca").await.unwrap();
    let mut ads = AggregatedDiscoveryServiceClient::new(channel);
    let ask = |node| DiscoveryRequest { node, type_url: CLUSTER.into(), ..Default::default() };
    let requests = tokio_stream::iter([ask(node("node-1", "users")), ask(node("edge", ""))]);
    let mut responses = ads.stream_aggregated_resources(requests).await.unwrap().into_inner();
    let ended = loop {
        match tokio::time::timeout(DEADLINE, responses.message()).await.expect("an answer") {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended well"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::PermissionDenied, "{ended}");
    // What others have is for those who may know.
    for (certificate, expected) in [("operator", Ok(())), ("proxy", Err(Code::PermissionDenied))] {
        let channel = stage.connect(Some(certificate), "ca").await.unwrap();
        let mut csds = ClientStatusDiscoveryServiceClient::new(channel);
        let answer = csds.fetch_client_status(ClientStatusRequest::default()).await;
        assert_eq!(answer.map(drop).map_err(|status| status.code()), expected, "{certificate}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_certificate_or_a_forged_one_is_no_connection_and_files_are_read_again() {
    let stage = Stage::new();
    for name in [None, Some("forged")] {
        let before = stage.metric("culvert_discovery_tls_failures_total ");
        // By TLS 1.3 the client hears of it with the first answer only.
        let outcome = match stage.connect(name, "ca").await {
            Ok(channel) => {
                let mut csds = ClientStatusDiscoveryServiceClient::new(channel);
                csds.fetch_client_status(ClientStatusRequest::default()).await.map(drop)
            }
            Err(error) => Err(Status::unavailable(error.to_string())),
        };
        assert!(outcome.is_err(), "{name:?}");
        let is_counted = async || stage.metric("culvert_discovery_tls_failures_total ") > before;
        eventually("the count of failures", is_counted).await;
    }
    assert!(stage.connect(Some("proxy"), "other-ca").await.is_err(), "the server is another's");
    let path = stage.directory.path();
    Authority::new(path, "newer-ca").issue(path, "server", &[host()]);
    let connects = async || stage.connect(Some("proxy"), "newer-ca").await.is_ok();
    eventually("the newer certificate", connects).await;
    // A certificate without its key changes nothing.
    std::fs::write(path.join("server.key"), "nothing").unwrap();
    stage.authority.issue(path, "unused", &[host()]);
    // It looks when somebody connects.
    eventually("a look at the files", async || {
        assert!(connects().await);
        stage.program.has_said("what was there before stays in force")
    })
    .await;
    assert!(connects().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn envoy_shows_its_certificate() {
    let stage = Stage::new();
    let (path, port) = (stage.directory.path(), stage.program.listen.port());
    for (id, expected) in [("node-1", true), ("edge", false)] {
        let admin = free_port();
        let node = format!("id: {id}, cluster: users");
        let certificate = Some((path, "proxy"));
        let asks = Asks { node: &node, admin, xds: port, listeners: false, certificate, ..Asks::default() };
        let bootstrap = asks.bootstrap();
        let _envoy = Envoy::start(&bootstrap);
        let page = |path: &str| tokio::task::block_in_place(|| get(admin, path)).unwrap_or_default();
        if expected {
            tokio::task::block_in_place(|| {
                wait_until("its clusters", || page("/clusters").contains("users.default:80::"));
            });
            assert!(!page("/clusters").contains("orders.default"), "users may call nobody else");
        } else {
            tokio::task::block_in_place(|| {
                wait_until("the refusal", || stage.metric("culvert_discovery_refused_total{reason=\"node\"} ") > 0);
            });
            assert!(!page("/clusters").contains("users.default"), "it was given nothing");
        }
    }
}
