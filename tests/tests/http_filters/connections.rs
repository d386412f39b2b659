//! What access log services are told of connections.

#[allow(dead_code, clippy::unwrap_used, reason = "shared with the daemon's own tests")]
#[path = "../../../proxy-daemon/src/tls/testing.rs"]
mod testing;

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use culvert_tests::daemon::{Daemon, Kind, free_port};
use culvert_tests::{server, wait_until};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use testing::{Authority, Issued, yaml};

use super::services::{self, Asked};

const DEADLINE: Duration = Duration::from_secs(30);

fn config([plain, tls, dead]: [u16; 3], service: u16, grpc: u16, authority: &Authority, own: &Issued) -> String {
    let log = |name: &str| {
        format!(
            "[{{name: grpc, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.access_loggers.grpc.v3.TcpGrpcAccessLogConfig, \
             common_config: {{log_name: {name}, buffer_size_bytes: 0, transport_api_version: V3, grpc_service: {{envoy_grpc: {{cluster_name: grpc}}}}}}}}}}]"
        )
    };
    let listener = |name: &str, port: u16, cluster: &str, socket: &str| {
        format!(
            r#"
  - name: {name}
    address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: tcp
        typed_config: {{"@type": type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy, stat_prefix: {name}, cluster: {cluster}, access_log: {log}}}
{socket}"#,
            log = log(name)
        )
    };
    let socket = format!(
        "      transport_socket: {{name: tls, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext, \
         common_tls_context: {{tls_certificates: [{{certificate_chain: {{inline_string: {}}}, private_key: {{inline_string: {}}}}}], \
         validation_context: {{trusted_ca: {{inline_string: {}}}}}}}}}}}\n    \
         listener_filters: [{{name: tls, typed_config: {{\"@type\": type.googleapis.com/envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector}}}}]\n",
        yaml(&own.chain),
        yaml(&own.key),
        yaml(&authority.pem)
    );
    let listeners = [
        listener("plain", plain, "service", ""),
        listener("tls", tls, "service", &socket),
        listener("dead", dead, "dead", ""),
    ];
    let cluster = |name: &str, port: u16, http2: &str| {
        format!(
            "  - {{name: {name}, type: STATIC, connect_timeout: 10s{http2}, load_assignment: {{cluster_name: {name}, \
             endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}]}}]}}}}\n"
        )
    };
    let clusters = [
        cluster("service", service, ""),
        cluster("dead", 1, ""),
        cluster("grpc", grpc, ", http2_protocol_options: {}"),
    ];
    format!("static_resources:\n  listeners:{}  clusters:\n{}", listeners.concat(), clusters.concat())
}

/// Says something, is answered, and goes.
fn converse(stream: &mut (impl std::io::Read + std::io::Write)) -> Result<()> {
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    stream.read_exact(&mut answer).context("the answer")
}

fn client(authority: &Authority, own: &Issued) -> Result<Arc<ClientConfig>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    // Envoy tells the session's id of TLS 1.2 only.
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    let chain = vec![CertificateDer::from_pem_slice(own.chain.as_bytes())?];
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes())?;
    Ok(Arc::new(builder.with_root_certificates(roots).with_client_auth_cert(chain, key)?))
}

/// What the services were told, and what was counted of that.
fn outcome(kind: Kind, authority: &Authority, [own, shown]: [&Issued; 2]) -> Result<String> {
    let service = server::start(|mut stream| {
        let mut asked = [0; 5];
        stream.read_exact(&mut asked)?;
        stream.write_all(&asked)?;
        std::io::copy(&mut stream, &mut std::io::sink())?;
        Ok(())
    })?;
    let asked = Arc::new(Asked::default());
    let grpc = services::start(Arc::clone(&asked))?;
    let ports = [free_port()?, free_port()?, free_port()?];
    let [plain, tls, dead] = ports;
    let daemon = Daemon::start(kind, &config(ports, service, grpc, authority, own))?;
    let mut stream = TcpStream::connect(("127.0.0.1", plain))?;
    converse(&mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    let connection = ClientConnection::new(client(authority, shown)?, "a.test".try_into()?)?;
    let mut stream = StreamOwned::new(connection, TcpStream::connect(("127.0.0.1", tls))?);
    converse(&mut stream)?;
    stream.conn.send_close_notify();
    stream.conn.complete_io(&mut stream.sock)?;
    drop(stream);
    let mut stream = TcpStream::connect(("127.0.0.1", dead))?;
    stream.read_to_end(&mut Vec::new())?;
    let all = || {
        let told = asked.of("");
        ensure!(told.len() >= 3, "too few entries: {told:#?}");
        Ok(told)
    };
    let mut told = wait_until(DEADLINE, "the services to be told of all connections", all)?;
    told.sort();
    let stats = daemon.admin("/stats?filter=access_logs.grpc_access_log")?;
    let hide = [(plain, "PLAIN"), (tls, "TLS"), (dead, "DEAD"), (service, "SERVICE"), (grpc, "GRPC")];
    let text = format!("{}\n{stats}", told.join("\n"));
    Ok(hide.into_iter().fold(text, |text, (port, name)| text.replace(&port.to_string(), name)))
}

#[test]
fn log_services_are_told_of_connections_what_envoy_tells() -> Result<()> {
    let authority = Authority::new("ca");
    let own = authority.issue(&["a.test"], &["spiffe://td/server"]);
    let shown = authority.issue(&["client.test"], &["spiffe://td/client"]);
    let envoy = outcome(Kind::Envoy, &authority, [&own, &shown])?;
    let culvert = outcome(Kind::Culvert, &authority, [&own, &shown])?;
    ensure!(envoy == culvert, "Envoy:\n{envoy}\nculvertd:\n{culvert}");
    Ok(())
}
