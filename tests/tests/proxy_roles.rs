//! Sidecars and an edge proxy that culvert-discovery configures: the real Envoy and culvertd in pods whose connections NAT rules redirect.
//!
//! ```text
//! outside ---> edge --mTLS--> (15006 users' sidecar) ---> users
//!              front ---> (15001 front's sidecar) --mTLS--> (15006 users' sidecar) ---> users
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_tests::binaries::{binary_arg, envoy};
use culvert_tests::daemon::Kind;
use culvert_tests::lab::{Finished, Lab, Node, Pod, Process};
use culvert_tests::wait_until;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use serde_json::Value;

const DEADLINE: Duration = Duration::from_secs(60);
const XDS: u16 = 18000;
const HTTP: u16 = 18001;
const ADMIN: u16 = 9901;
const VIP: &str = "10.96.0.10";
/// A message that names revision feature-x of users, as a baggage item.
const OVERRIDE: &str = "overrides=CAESEgoFdXNlcnMSCWZlYXR1cmUteA%3D%3D";

/// The lab, and the directory of certificates and manifests. Processes end with the test.
struct Stage {
    _lab: Lab,
    node: Node,
    directory: PathBuf,
    authority: Issuer<'static, KeyPair>,
    kind: Kind,
    running: Vec<Process>,
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Stage {
    fn new(kind: Kind) -> Result<Stage> {
        let name = match kind {
            Kind::Culvert => "roles-culvert",
            Kind::Envoy => "roles-envoy",
        };
        let lab = Lab::new(name)?;
        let node = lab.node(&format!("node-{}", &name[6..9]))?;
        let directory = std::env::temp_dir().join(format!("culvert-{name}-{}", std::process::id()));
        fs::create_dir_all(directory.join("manifests"))?;
        let mut params = CertificateParams::new(vec![])?;
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "ca");
        let key = KeyPair::generate()?;
        fs::write(directory.join("ca.crt"), params.self_signed(&key)?.pem())?;
        let authority = Issuer::new(params, key);
        Ok(Stage { _lab: lab, node, directory, authority, kind, running: Vec::new() })
    }

    /// A certificate of this identity and address, as files in a directory of this name.
    fn issue(&self, name: &str, identity: &str) -> Result<()> {
        let directory = self.directory.join(name);
        fs::create_dir_all(&directory)?;
        let mut params = CertificateParams::new(vec![])?;
        params.subject_alt_names =
            vec![SanType::URI(identity.try_into()?), SanType::IpAddress(self.node.ipv4().into())];
        params.distinguished_name.push(DnType::CommonName, identity);
        let key = KeyPair::generate()?;
        fs::write(directory.join("tls.crt"), params.signed_by(&key, &self.authority)?.pem())?;
        fs::write(directory.join("tls.key"), key.serialize_pem())?;
        fs::copy(self.directory.join("ca.crt"), directory.join("ca.crt"))?;
        Ok(())
    }

    fn discovery(&mut self, manifests: &str) -> Result<()> {
        let directory = self.directory.display();
        fs::write(self.directory.join("manifests/all.yaml"), manifests)?;
        self.issue("server", "spiffe://mesh/discovery")?;
        for name in ["users", "front", "edge"] {
            self.issue(name, &format!("spiffe://mesh/{name}"))?;
            self.issue(&format!("secrets/{name}"), &format!("spiffe://mesh/{name}"))?;
        }
        let rule = |name: &str| {
            format!(
                "- {{identity: 'spiffe://mesh/{name}', nodes: ['{name}-*'], secrets: [users, edge], own_secret: {name}}}\n"
            )
        };
        let text = format!(
            "
clusters: [{{name: east, manifests: {directory}/manifests}}]
listen: 0.0.0.0:{XDS}
http: 0.0.0.0:{HTTP}
tls: {{certificate: {directory}/server/tls.crt, private_key: {directory}/server/tls.key, client_authorities: {directory}/ca.crt}}
secrets: {{directory: {directory}/secrets}}
edge: {{listeners: [{{port: 8080}}, {{port: 8443, tls: edge}}]}}
authorization:
{}{}{}",
            rule("users"),
            rule("front"),
            rule("edge")
        );
        let config = self.directory.join("discovery.conf");
        fs::write(&config, text)?;
        let program = self.node.spawn("discovery", &[&binary_arg("culvert-discovery")?, "-c", &text_of(&config)?])?;
        self.running.push(program);
        wait_until(DEADLINE, "culvert-discovery", || self.status().map(drop))
    }

    fn status(&self) -> Result<Value> {
        let page = format!("http://127.0.0.1:{HTTP}/status");
        Ok(serde_json::from_str(&self.node.run(&["curl", "-sS", &page])?.success()?)?)
    }

    /// A proxy in a pod, which says that it is for this.
    fn proxy(&mut self, pod: &Pod, role: &str) -> Result<()> {
        let (name, directory, discovery) = (pod.name(), self.directory.display(), self.node.ipv4());
        let bootstrap = format!(
            r#"
node: {{id: {name}-1, cluster: {name}, metadata: {{culvert.proxy: {role}}}}}
admin: {{address: {{socket_address: {{address: 0.0.0.0, port_value: {ADMIN}}}}}}}
dynamic_resources:
  ads_config: {{api_type: DELTA_GRPC, transport_api_version: V3, grpc_services: [{{envoy_grpc: {{cluster_name: discovery}}}}]}}
  lds_config: {{resource_api_version: V3, ads: {{}}}}
  cds_config: {{resource_api_version: V3, ads: {{}}}}
static_resources:
  clusters:
  - name: discovery
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{http2_protocol_options: {{}}}}
    transport_socket:
      name: tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_certificates: [{{certificate_chain: {{filename: {directory}/{name}/tls.crt}}, private_key: {{filename: {directory}/{name}/tls.key}}}}]
          validation_context: {{trusted_ca: {{filename: {directory}/ca.crt}}}}
    load_assignment:
      cluster_name: discovery
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: {discovery}, port_value: {XDS}}}}}}}}}]}}]
"#
        );
        let file = self.directory.join(format!("{name}.yaml"));
        fs::write(&file, bootstrap)?;
        let program = match self.kind {
            Kind::Culvert => vec![binary_arg("culvertd")?],
            Kind::Envoy => vec![text_of(&envoy()?)?, "--disable-hot-restart".to_owned()],
        };
        let flags =
            ["-c".to_owned(), text_of(&file)?, "--concurrency".into(), "1".into(), "-l".into(), "warning".into()];
        let command: Vec<String> = program.into_iter().chain(flags).collect();
        let command: Vec<&str> = command.iter().map(String::as_str).collect();
        self.running.push(pod.spawn("proxy", &command)?);
        Ok(())
    }
}

fn text_of(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path that is not text")
}

/// What a pod's sidecar needs: what the pod calls of the mesh, and what calls the pod, comes to it.
fn redirect(pod: &Pod) -> Result<()> {
    let rules = "
add table ip nat
add chain ip nat prerouting { type nat hook prerouting priority -100; }
add chain ip nat output { type nat hook output priority -100; }
add rule ip nat prerouting iifname eth0 tcp dport { 8080, 9100 } redirect to :15006
add rule ip nat output ip daddr 10.96.0.0/16 tcp dport 1-65535 redirect to :15001
add rule ip nat output oifname lo ip daddr != 127.0.0.0/8 meta priority != 0:6 tcp dport { 8080, 9100 } redirect to :15006";
    for rule in rules.trim().lines() {
        let ran = pod.run(&["nft", rule]).context("running nft, which `cargo xtask setup` installs")?;
        ran.success()?;
    }
    Ok(())
}

fn app(pod: &Pod, port: u16) -> Result<Process> {
    let listen = format!("0.0.0.0:{port}");
    let command = [&*binary_arg("lab-http")?, "--listen", &listen, "--pod", pod.name()];
    pod.spawn("app", &command)
}

fn curl(pod: &Pod, arguments: &[&str]) -> Result<Finished> {
    pod.run(&[&["curl", "-sS", "-k", "--max-time", "10", "-w", "\n%{http_code}"], arguments].concat())
}

/// The status and the body of an answer.
fn answer(pod: &Pod, arguments: &[&str]) -> Result<(u16, String)> {
    let text = curl(pod, arguments)?.success()?;
    let (body, status) = text.rsplit_once('\n').context("curl says no status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// An answer of the service, once it comes.
fn reached(pod: &Pod, arguments: &[&str]) -> Result<Value> {
    wait_until(DEADLINE, "an answer of the service", || {
        let (status, body) = answer(pod, arguments)?;
        ensure!(status == 200, "{status}: {body}");
        Ok(serde_json::from_str(&body)?)
    })
}

fn stat(pod: &Pod, name: &str) -> Result<u64> {
    let page = format!("http://127.0.0.1:{ADMIN}/stats?filter=^{name}$");
    let text = pod.run(&["curl", "-sS", "-g", &page])?.success()?;
    let value = text.trim().rsplit_once(": ").with_context(|| format!("no {name}"))?.1;
    Ok(value.parse()?)
}

fn manifests(users: &Pod) -> String {
    let address = users.ipv4();
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: users}}
spec: {{clusterIP: {VIP}, ports: [{{name: http, port: 80, targetPort: web}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: users-1, labels: {{kubernetes.io/service-name: users}}}}
addressType: IPv4
ports: [{{name: http, port: 8080}}]
endpoints: [{{addresses: [{address}]}}]
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: users}}
spec:
  circuitBreakers: {{maxRequests: 30}}
  mtls: {{authority: users, subjectAltNames: ['spiffe://mesh/users']}}
  edge: {{domains: [shop.example], prefix: /users}}
---
apiVersion: v1
kind: Service
metadata: {{name: front}}
spec: {{clusterIP: 10.96.0.11, ports: [{{name: http, port: 80}}]}}
---
apiVersion: culvert.dev/v1alpha1
kind: ServiceManifest
metadata: {{name: front}}
spec: {{egress: [users]}}
---
apiVersion: v1
kind: Service
metadata: {{name: orders}}
spec: {{clusterIP: 10.96.0.12, ports: [{{name: http, port: 80}}]}}
"
    )
}

fn scenario(kind: Kind) -> Result<()> {
    let mut stage = Stage::new(kind)?;
    let [users, front, edge, outside] = {
        let pod = |name| stage.node.pod(name);
        [pod("users")?, pod("front")?, pod("edge")?, pod("outside")?]
    };
    stage.discovery(&manifests(&users))?;
    let _apps = [app(&users, 8080)?, app(&users, 9100)?];
    for pod in [&users, &front] {
        redirect(pod)?;
        stage.proxy(pod, "sidecar")?;
    }
    stage.proxy(&edge, "edge")?;

    // Through both sidecars, over TLS between them.
    let vip = format!("http://{VIP}/hello");
    let seen = reached(&front, &["-H", "host: users", &vip])?;
    assert_eq!((&seen["pod"], &seen["path"]), (&"users".into(), &"/hello".into()), "{seen}");
    assert!(
        stat(&users, "listener.0.0.0.0_15006.ssl.handshake")
            .or_else(|_| stat(&users, "listener.\\[__\\]_15006.ssl.handshake"))?
            >= 1
    );
    assert!(stat(&users, "cluster.inbound_users.default_80.upstream_rq_200")? >= 1);
    assert!(stat(&front, "cluster.users.default_80.upstream_rq_200")? >= 1);
    let clusters = front.run(&["curl", "-sS", &format!("http://127.0.0.1:{ADMIN}/clusters")])?.success()?;
    assert!(clusters.contains("users.default:80::") && !clusters.contains("orders.default"), "{clusters}");
    let limits = users.run(&["curl", "-sS", &format!("http://127.0.0.1:{ADMIN}/clusters")])?.success()?;
    assert!(limits.contains("inbound_users.default:80::default_priority::max_requests::30"), "{limits}");

    // A pod that calls its own service comes to itself over TLS too, and to its other ports.
    let before = stat(&users, "cluster.inbound_users.default_80.upstream_rq_200")?;
    let seen = reached(&users, &["-H", "host: users", &format!("http://{VIP}/self")])?;
    assert_eq!((&seen["pod"], &seen["path"]), (&"users".into(), &"/self".into()), "{seen}");
    assert!(stat(&users, "cluster.inbound_users.default_80.upstream_rq_200")? > before);
    let other = reached(&users, &[&format!("http://{}:9100/", users.ipv4())])?;
    assert_eq!(other["pod"], "users");

    // Without a certificate nobody is spoken to; ports that are not the service's pass through; the listener itself is no way in.
    let refused = curl(&outside, &[&format!("http://{}:8080/", users.ipv4())])?;
    assert!(!refused.status.success(), "{refused:?}");
    let refused = curl(&outside, &[&format!("https://{}:8080/", users.ipv4())])?;
    assert!(!refused.status.success(), "{refused:?}");
    let other = reached(&outside, &[&format!("http://{}:9100/", users.ipv4())])?;
    assert_eq!(other["pod"], "users");
    let looped = curl(&outside, &[&format!("http://{}:15006/", users.ipv4())])?;
    assert!(!looped.status.success(), "{looped:?}");
    assert_eq!(stat(&users, "cluster.nowhere.upstream_cx_none_healthy")?, 1);

    // The edge: by host and path, over TLS or not; overrides do not come in, and who asks is told.
    let baggage = format!("baggage: {OVERRIDE},a=b");
    for url in [format!("http://{}:8080/users/1", edge.ipv4()), format!("https://{}:8443/users/1", edge.ipv4())] {
        let seen = reached(&outside, &["-H", "host: shop.example:8080", "-H", &baggage, &url])?;
        assert_eq!((&seen["pod"], &seen["path"]), (&"users".into(), &"/users/1".into()), "{seen}");
        let forwarded = seen["headers"]["x-forwarded-for"].as_str().unwrap_or_default();
        assert_eq!(forwarded, outside.ipv4().to_string(), "{seen}");
        let left = &seen["headers"]["baggage"];
        match kind {
            Kind::Culvert => assert_eq!(left, "a=b"),
            Kind::Envoy => assert!(left.is_null(), "{left}"),
        }
    }
    let at_edge =
        |path: &str, host: &str| answer(&outside, &["-H", host, &format!("http://{}:8080{path}", edge.ipv4())]);
    for (path, host) in [("/", "host: shop.example"), ("/usersx", "host: shop.example"), ("/users", "host: users")] {
        assert_eq!(at_edge(path, host)?.0, 404, "{host} {path}");
    }
    assert_eq!(at_edge("/users", "host: SHOP.example")?.0, 200);

    // What works without a proxy works with them: requests for a WebSocket, which this service does not grant, and old clients.
    let edge_url = format!("http://{}:8080/users/1", edge.ipv4());
    for more in [&["-H", "connection: upgrade", "-H", "upgrade: websocket"][..], &["-0"]] {
        for (pod, host, url) in [(&front, "host: users", &vip), (&outside, "host: shop.example", &edge_url)] {
            let (status, _) = answer(pod, &[more, &["-H", host, url]].concat())?;
            assert_eq!(status, 200, "{more:?} {url}");
        }
    }

    // Nobody has refused anything.
    let status = stage.status()?;
    assert_eq!(status["client_problems"], serde_json::json!([]), "{status:#}");
    let clients = status["clients"].as_array().context("clients")?;
    let roles: Vec<_> = clients.iter().map(|client| (&client["role"], &client["rejections"])).collect();
    let expected = ["sidecar", "sidecar", "edge"].map(Value::from);
    assert_eq!(roles.len(), expected.len(), "{status:#}");
    assert!(roles.iter().all(|(role, rejections)| expected.contains(role) && **rejections == 0), "{status:#}");
    Ok(())
}

#[test]
fn culvertd_as_a_sidecar_and_at_the_edge() -> Result<()> {
    scenario(Kind::Culvert)
}

#[test]
fn envoy_as_a_sidecar_and_at_the_edge() -> Result<()> {
    scenario(Kind::Envoy)
}
