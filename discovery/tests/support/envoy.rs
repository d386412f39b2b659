//! The real Envoy as a client, and servers behind it.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::DEADLINE;

/// `$ENVOY`, else the one that `cargo xtask test` installed.
pub fn envoy() -> PathBuf {
    let installed = || PathBuf::from(env!("CARGO_BIN_EXE_culvert-discovery")).join("../../envoy/envoy/_bin/envoy");
    let path = std::env::var_os("ENVOY").map_or_else(installed, PathBuf::from);
    assert!(path.exists(), "{} does not exist: run `cargo xtask test`, or set ENVOY", path.display());
    path
}

/// A port that is free.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A running Envoy. Killed when dropped.
pub struct Envoy(Child);

impl Envoy {
    /// Starts it with this bootstrap.
    pub fn start(bootstrap: &str) -> Self {
        let child = Command::new(envoy())
            .args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "--config-yaml", bootstrap])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How an Envoy asks discovery.
pub struct Asks<'a> {
    /// The fields of its node.
    pub node: &'a str,
    /// The port of its admin pages.
    pub admin: u16,
    /// The port of discovery's xDS.
    pub xds: u16,
    /// `DELTA_GRPC` or `GRPC`, over ADS, or `REST`.
    pub by: &'a str,
    /// Whether it wants listeners beside clusters.
    pub listeners: bool,
    /// Where its certificate is and what it is called, if discovery wants one.
    pub certificate: Option<(&'a Path, &'a str)>,
    /// Further lines of the bootstrap.
    pub more: &'a str,
}

impl Default for Asks<'_> {
    fn default() -> Self {
        let node = "id: test, cluster: test";
        Self { node, admin: 0, xds: 0, by: "DELTA_GRPC", listeners: true, certificate: None, more: "" }
    }
}

impl Asks<'_> {
    /// The bootstrap. Its cluster `discovery` leads there.
    pub fn bootstrap(&self) -> String {
        let Self { node, admin, xds, by, listeners, certificate, more } = self;
        let (ads, source, http) = match *by {
            "REST" => {
                let rest = "api_type: REST, transport_api_version: V3, refresh_delay: 0.2s, cluster_names: [discovery]";
                (
                    String::new(),
                    format!("{{resource_api_version: V3, api_config_source: {{{rest}}}}}"),
                    "http_protocol_options",
                )
            }
            by => {
                let services = "[{envoy_grpc: {cluster_name: discovery}}]";
                let ads =
                    format!("ads_config: {{api_type: {by}, transport_api_version: V3, grpc_services: {services}}}, ");
                (ads, "{resource_api_version: V3, ads: {}}".to_owned(), "http2_protocol_options")
            }
        };
        let lds = if *listeners { format!(", lds_config: {source}") } else { String::new() };
        let tls = certificate.map_or_else(String::new, |(path, name)| {
            let path = path.display();
            format!(
                "
    transport_socket:
      name: tls
      typed_config:
        \"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context:
          tls_certificates: [{{certificate_chain: {{filename: {path}/{name}.crt}}, private_key: {{filename: {path}/{name}.key}}}}]
          validation_context:
            trusted_ca: {{filename: {path}/ca.crt}}
            match_typed_subject_alt_names: [{{san_type: IP_ADDRESS, matcher: {{exact: 127.0.0.1}}}}]"
            )
        });
        format!(
            "
node: {{{node}}}
admin: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {admin}}}}}}}
dynamic_resources: {{{ads}cds_config: {source}{lds}}}
{more}
static_resources:
  clusters:
  - name: discovery
    connect_timeout: 5s
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{http}: {{}}}}{tls}
    load_assignment:
      cluster_name: discovery
      endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {xds}}}}}}}}}]}}]
"
        )
    }
}

/// Answers `/fail` with 500, `/slow` never, and anything else with 200. Counts what it is asked.
pub fn serve(asked: Arc<AtomicUsize>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let (mut connection, asked) = (connection.unwrap(), Arc::clone(&asked));
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                let mut bytes = [0; 4096];
                while let Ok(count @ 1..) = connection.read(&mut bytes) {
                    seen.extend_from_slice(&bytes[..count]);
                    if !seen.ends_with(b"\r\n\r\n") {
                        continue;
                    }
                    asked.fetch_add(1, Ordering::SeqCst);
                    let answer = match seen.split(|byte| *byte == b' ').nth(1) {
                        Some(b"/fail") => "HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n",
                        Some(b"/slow") => "",
                        _ => "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
                    };
                    let _ = connection.write_all(answer.as_bytes());
                    seen.clear();
                }
            });
        }
    });
    port
}

/// The whole answer of a server on this machine, if there is one.
pub fn get(port: u16, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).ok()?;
    connection.set_read_timeout(Some(DEADLINE)).ok()?;
    write!(connection, "GET {path} HTTP/1.1\r\nHost: users\r\nConnection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).ok()?;
    Some(answer)
}

/// The status of an answer, empty without one.
pub fn status(port: u16, path: &str) -> String {
    get(port, path).and_then(|answer| answer.split(' ').nth(1).map(str::to_owned)).unwrap_or_default()
}

/// Waits, not for ever.
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < DEADLINE, "not reached: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Manifests of a service `users` at `port` with one endpoint, on this machine at `backend`.
pub fn users(port: u16, backend: u16) -> String {
    format!(
        "
apiVersion: v1
kind: Service
metadata: {{name: users}}
spec: {{clusterIP: 10.96.0.1, ports: [{{name: http, port: {port}}}]}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: users-1, labels: {{kubernetes.io/service-name: users}}}}
addressType: IPv4
ports: [{{name: http, port: {backend}}}]
endpoints: [{{addresses: [127.0.0.1]}}]
"
    )
}

/// Puts these manifests in the place of those that a directory has, at once.
pub fn write_manifests(directory: &Path, manifests: &str) {
    std::fs::write(directory.join(".new"), manifests).unwrap();
    std::fs::rename(directory.join(".new"), directory.join("all.yaml")).unwrap();
}
