//! Certificates and other secrets over xDS (SDS): who is given which, and how they are replaced.

mod support;

use std::collections::BTreeMap;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::data_source::Specifier;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::Secret;
use envoy_types::pb::envoy::extensions::transport_sockets::tls::v3::secret::Type;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use envoy_types::pb::envoy::service::secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient;
use envoy_types::pb::envoy::service::status::v3::ClientStatusRequest;
use envoy_types::pb::envoy::service::status::v3::client_status_discovery_service_client::ClientStatusDiscoveryServiceClient;
use prost::Message as _;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use support::certificates::{Authority, channel, host, uri};
use support::envoy::{Asks, Envoy, free_port, get, users, wait_until, write_manifests};
use support::{DEADLINE, Program};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";

/// A directory of secrets: those of `users` and of the nodes, and one that nobody may have.
struct Stage {
    directory: tempfile::TempDir,
    authority: Authority,
    program: Program,
}

impl Stage {
    fn new(objects: &str, outbound: u16) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let authority = Authority::new(path, "ca");
        authority.issue(path, "server", &[host()]);
        authority.issue(path, "proxy", &[uri("spiffe://mesh/proxy")]);
        authority.issue(path, "edge", &[uri("spiffe://mesh/edge")]);
        authority.issue(path, "operator", &[uri("spiffe://mesh/operator")]);
        std::fs::create_dir(path.join("manifests")).unwrap();
        std::fs::write(path.join("manifests/all.yaml"), objects).unwrap();
        for name in ["users", "orders", "node"] {
            issue_secret(&authority, path, name, &format!("spiffe://mesh/{name}/1"));
        }
        let config = path.join("discovery.conf");
        let text = format!(
            "
clusters: [{{name: east, manifests: {0}/manifests}}]
tls: {{certificate: {0}/server.crt, private_key: {0}/server.key, client_authorities: {0}/ca.crt}}
authorization:
- {{identity: 'spiffe://mesh/proxy', nodes: ['node-*'], secrets: [users, 'default/*'], own_secret: node}}
- {{identity: 'spiffe://mesh/edge'}}
- {{identity: 'spiffe://mesh/operator', nodes: [], status: true}}
secrets: {{directory: {0}/secrets}}
outbound_port: {outbound}
outbound_address: 127.0.0.1
",
            path.display()
        );
        std::fs::write(&config, text).unwrap();
        let program = Program::start(&["-c", config.to_str().unwrap()]);
        Self { directory, authority, program }
    }

    /// A stream of a node that asks for secrets, by ADS or by SDS alone.
    async fn ask(&self, certificate: &str, names: &[&str], alone: bool) -> Asking {
        let channel = channel(self.directory.path(), self.program.listen, Some(certificate), "ca").await.unwrap();
        let (requests, stream) = mpsc::channel(4);
        let node = Some(Node { id: "node-1".into(), user_agent_name: "envoy".into(), ..Default::default() });
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let first = DeltaDiscoveryRequest {
            node,
            type_url: SECRET.into(),
            resource_names_subscribe: names,
            ..Default::default()
        };
        requests.send(first).await.unwrap();
        let stream = ReceiverStream::new(stream);
        let responses = if alone {
            SecretDiscoveryServiceClient::new(channel).delta_secrets(stream).await
        } else {
            AggregatedDiscoveryServiceClient::new(channel).delta_aggregated_resources(stream).await
        };
        Asking { requests, responses: responses.unwrap().into_inner() }
    }

    /// Waits until `/status` says what keeps a node from what it asks for.
    fn wait_problem(&self, problem: &str) {
        tokio::task::block_in_place(|| {
            self.program.until("/status", problem, |status| {
                let problems = status["client_problems"].as_array().map(Vec::as_slice).unwrap_or_default();
                let said =
                    |it: &serde_json::Value| it["problem"].as_str().is_some_and(|said| said.starts_with(problem));
                problems.iter().any(said)
            })
        });
    }

    /// The names of the secrets that a node is given that asks for these by REST; none where it is refused.
    fn poll(&self, certificate: &str, names: &[&str]) -> Vec<String> {
        let path = self.directory.path();
        let asked = serde_json::json!({
            "node": {"id": "node-1", "userAgentName": "envoy"}, "resourceNames": names, "typeUrl": SECRET
        });
        let url = format!("https://127.0.0.1:{}/v3/discovery:secrets", self.program.listen.port());
        let answer = std::process::Command::new("curl")
            .args(["-sS", "-m", "20", "--cacert", "ca.crt", "--cert", &format!("{certificate}.crt")])
            .args(["--key", &format!("{certificate}.key"), "-d", &asked.to_string(), &url])
            .current_dir(path)
            .output()
            .expect("curl runs");
        assert!(answer.status.success(), "{answer:?}");
        let Ok(answer) = serde_json::from_slice::<serde_json::Value>(&answer.stdout) else { return Vec::new() };
        let given = answer["resources"].as_array().unwrap();
        let mut given: Vec<_> = given.iter().map(|secret| secret["name"].as_str().unwrap().to_owned()).collect();
        given.sort();
        given
    }
}

struct Asking {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryResponse>,
}

impl Asking {
    /// The next secrets, accepted: by name, what they are. And the names of those that there are not.
    async fn next(&mut self) -> (BTreeMap<String, Type>, Vec<String>) {
        let response = tokio::time::timeout(DEADLINE, self.responses.message()).await.expect("an answer");
        let response = response.unwrap().unwrap();
        let ack =
            DeltaDiscoveryRequest { type_url: SECRET.into(), response_nonce: response.nonce, ..Default::default() };
        self.requests.send(ack).await.unwrap();
        let secrets = response.resources.into_iter().map(|resource| {
            let secret = Secret::decode(&*resource.resource.unwrap().value).unwrap();
            assert_eq!(secret.name, resource.name);
            (resource.name, secret.r#type.unwrap())
        });
        (secrets.collect(), response.removed_resources)
    }
}

/// A certificate and its key, and their authority, as a secret. What was there before is replaced in one step, as Kubernetes does it.
fn issue_secret(authority: &Authority, path: &Path, name: &str, identity: &str) {
    let names = [uri(identity), host()];
    authority.issue(path, "new", &names);
    let directory = path.join("secrets").join(name);
    std::fs::create_dir_all(&directory).unwrap();
    for (from, to) in [("new.key", "tls.key"), ("new.crt", "tls.crt"), ("ca.crt", "ca.crt")] {
        std::fs::copy(path.join(from), path.join(".part")).unwrap();
        std::fs::rename(path.join(".part"), directory.join(to)).unwrap();
    }
}

fn chain(secret: &Type) -> Vec<u8> {
    let Type::TlsCertificate(certificate) = secret else { panic!("no certificate: {secret:?}") };
    assert!(certificate.private_key.is_some());
    match &certificate.certificate_chain.as_ref().unwrap().specifier {
        Some(Specifier::InlineBytes(bytes)) => bytes.clone(),
        other => panic!("{other:?}"),
    }
}

const KEYS: &str = "
apiVersion: v1
kind: Secret
metadata: {name: keys, labels: {culvert.dev/sds: 'true'}}
stringData: {2026-11: '0123456789abcdef0123456789abcdef'}
---
apiVersion: v1
kind: Secret
metadata: {name: unmarked}
stringData: {a: b}
";

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_given_what_its_certificate_may_have_and_what_replaces_it() {
    let stage = Stage::new(KEYS, 15001);
    let path = stage.directory.path();
    let all = ["users", "users/ca", "own", "orders", "default/keys", "default/unmarked", "node"];
    for alone in [false, true] {
        let mut proxy = stage.ask("proxy", &all, alone).await;
        let (given, missing) = proxy.next().await;
        assert_eq!(given.keys().collect::<Vec<_>>(), ["default/keys", "own", "users", "users/ca"]);
        assert_eq!(missing, ["default/unmarked", "node", "orders"]);
        assert!(matches!(&given["default/keys"], Type::GenericSecret(keys) if keys.secrets.contains_key("2026-11")));
        assert!(matches!(&given["users/ca"], Type::ValidationContext(_)));
        assert_ne!(chain(&given["own"]), chain(&given["users"]));
        stage.wait_problem("asks for secrets that there are not, or that no rule of `authorization` gives it: default/unmarked, node, orders");
    }
    // An identity that no rule gives secrets has none, whatever its node is called.
    let (given, missing) = stage.ask("edge", &all, false).await.next().await;
    assert_eq!((given.len(), missing.len()), (0, all.len()));

    // The same by REST.
    for (certificate, expected) in
        [("proxy", &["default/keys", "own", "users", "users/ca"][..]), ("edge", &[]), ("operator", &[])]
    {
        assert_eq!(tokio::task::block_in_place(|| stage.poll(certificate, &all)), expected, "{certificate}");
    }
    stage.wait_problem("this certificate may not be used by a node of this id");

    // Rotation: what has changed is told, and nothing else.
    let mut proxy = stage.ask("proxy", &["users", "own"], false).await;
    let before = proxy.next().await.0;
    issue_secret(&stage.authority, path, "users", "spiffe://mesh/users/2");
    let (after, _) = proxy.next().await;
    assert_eq!(after.keys().collect::<Vec<_>>(), ["users"]);
    assert_ne!(chain(&after["users"]), chain(&before["users"]));
    // A key that is another certificate's is not served.
    std::fs::copy(path.join("server.key"), path.join("secrets/users/tls.key")).unwrap();
    tokio::task::block_in_place(|| {
        let status = stage.program.until("/status", "the error", |status| !status["secret_errors"]["users"].is_null());
        let error = status["secret_errors"]["users"].as_str().unwrap();
        assert!(error.contains("do not go together"), "{error}");
        let shown = status.to_string();
        assert!(!shown.contains("PRIVATE KEY") && !shown.contains("0123456789abcdef"), "{shown}");
    });
    issue_secret(&stage.authority, path, "node", "spiffe://mesh/node/2");
    let (after, _) = proxy.next().await;
    assert_eq!(after.keys().collect::<Vec<_>>(), ["own"], "the bad one was not told");

    // Who may see what others have does not see what is secret.
    let operator = channel(path, stage.program.listen, Some("operator"), "ca").await.unwrap();
    let mut csds = ClientStatusDiscoveryServiceClient::new(operator);
    let answer = csds.fetch_client_status(ClientStatusRequest::default()).await.unwrap().into_inner();
    let shown: Vec<_> = answer.config.iter().flat_map(|client| &client.generic_xds_configs).collect();
    assert!(shown.iter().any(|config| config.name == "own"));
    assert!(shown.iter().all(|config| config.xds_config.is_none()), "{shown:?}");
}

/// A server that wants certificates of an authority, and answers which one it was shown.
fn serve_with_tls(path: &Path) -> u16 {
    let roots = CertificateDer::pem_file_iter(path.join("ca.crt")).unwrap().map(Result::unwrap);
    let mut store = RootCertStore::empty();
    roots.for_each(|root| store.add(root).unwrap());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(store.into(), Arc::clone(&provider)).build().unwrap();
    let chain = vec![CertificateDer::from_pem_file(path.join("secrets/users/tls.crt")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(path.join("secrets/users/tls.key")).unwrap();
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let config = Arc::clone(&config);
            std::thread::spawn(move || {
                let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), connection);
                let mut seen = [0; 4096];
                // One request a connection, so that the next one is with the newest certificate.
                let Ok(1..) = stream.read(&mut seen) else { return };
                let leaf = stream.conn.peer_certificates().unwrap()[0].clone();
                let text = String::from_utf8_lossy(&leaf).into_owned();
                let start = text.find("spiffe://").unwrap();
                let name: String =
                    text[start..].chars().take_while(|c| c.is_ascii_alphanumeric() || "/:".contains(*c)).collect();
                let length = name.len();
                let _ =
                    write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{name}");
                stream.conn.send_close_notify();
                let _ = stream.flush();
            });
        }
    });
    port
}

#[test]
fn envoy_speaks_tls_with_secrets_it_is_given() {
    for by in ["DELTA_GRPC", "REST"] {
        speaks_tls(by);
    }
}

fn speaks_tls(by: &str) {
    let port = free_port();
    let stage = Stage::new("", port);
    let path = stage.directory.path();
    let backend = serve_with_tls(path);
    let write = |names: &str| {
        let manifest = format!(
            "---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: users}}
spec: {{mtls: {{authority: users, subjectAltNames: [{names}]}}}}
"
        );
        write_manifests(&path.join("manifests"), &(users(port, backend) + &manifest));
    };
    write("'spiffe://mesh/users/1'");
    let (admin, xds) = (free_port(), stage.program.listen.port());
    let (node, certificate) = ("id: node-1, cluster: front", Some((path, "proxy")));
    let bootstrap = Asks { node, admin, xds, by, certificate, ..Asks::default() }.bootstrap();
    let _envoy = Envoy::start(&bootstrap);
    let body =
        || get(port, "/").and_then(|answer| Some(answer.split_once("\r\n\r\n")?.1.to_owned())).unwrap_or_default();
    wait_until("an answer over TLS", || body() == "spiffe://mesh/node/1");
    issue_secret(&stage.authority, path, "node", "spiffe://mesh/node/2");
    wait_until("the newer certificate", || body() == "spiffe://mesh/node/2");
    // An endpoint with a certificate of another name is not spoken to.
    write("users.example");
    wait_until("no answer", || get(port, "/").is_some_and(|answer| answer.starts_with("HTTP/1.1 503")));
    let stats = get(admin, "/stats").unwrap();
    for name in ["cluster_manager.cds.update_rejected: 0", "listener_manager.lds.update_rejected: 0"] {
        assert!(stats.contains(name), "{stats}");
    }
}
