//! TLS on either side, with real sockets, through the data plane's own handle; rustls plays the peers.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod downstream;
#[path = "../support/executor.rs"]
mod executor;
mod secrets;
#[path = "../support/mod.rs"]
mod support;
#[path = "../../src/tls/testing.rs"]
mod testing;
mod told;
mod upstream;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use culvert_proxy_daemon::{
    config::parse,
    runtime::{DataPlane, Options},
    tls::provider,
};
use culvert_xds_client::json;
use envoy_types::pb::envoy::{
    config::bootstrap::v3::Bootstrap, extensions::transport_sockets::tls::v3::Secret as ProtoSecret,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use testing::{Authority, Issued, yaml};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};

const DOWNSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext";
const UPSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const ROUTER: &str = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router";
const MANAGER: &str =
    "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
const TCP_PROXY: &str = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy";
const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn run(test: impl Future<Output = ()>) {
    let test = async { tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test hangs") };
    tokio::task::LocalSet::new().block_on(&support::runtime(), test);
}

/// The data plane with what the bootstrap holds, and its listeners' addresses.
async fn start(text: &str) -> (DataPlane, Vec<SocketAddr>) {
    let message: Bootstrap = json::from_yaml(text).unwrap();
    let bootstrap = parse::bootstrap(&message).unwrap();
    let options = Options { workers: 1, drain_time: Duration::from_secs(5), interception: None };
    let plane = DataPlane::start(options).unwrap();
    for it in bootstrap.secrets {
        plane.secrets().set(it.name, it.secret);
    }
    bootstrap.clusters.into_iter().for_each(|cluster| plane.upsert_cluster(cluster));
    let mut addresses = Vec::new();
    for listener in bootstrap.listeners {
        let name = Arc::clone(&listener.name);
        plane.upsert_listener(Arc::new(listener)).await.unwrap();
        addresses.push(plane.listeners().into_iter().find(|it| it.name == name).unwrap().addresses[0]);
    }
    (plane, addresses)
}

fn bootstrap(listener: &str, chains: &[String], clusters: &[String]) -> String {
    let list = |items: &[String]| items.join(", ");
    format!(
        "static_resources: {{ listeners: [{{ name: {listener}, stat_prefix: {listener}, address: {{ socket_address: {{ address: 127.0.0.1, \
         port_value: 0 }} }}, filter_chains: [{}] }}], clusters: [{}] }}",
        list(chains),
        list(clusters)
    )
}

fn certificate(issued: &Issued) -> String {
    format!(
        "{{ certificate_chain: {{ inline_string: {} }}, private_key: {{ inline_string: {} }} }}",
        yaml(&issued.chain),
        yaml(&issued.key)
    )
}

fn http_filters(prefix: &str, action: &str) -> String {
    format!(
        "filters: [{{ name: hcm, typed_config: {{ '@type': {MANAGER}, stat_prefix: {prefix}, route_config: {{ virtual_hosts: [{{ name: v, \
         domains: ['*'], routes: [{{ match: {{ prefix: / }}, {action} }}] }}] }}, http_filters: [{{ name: router, typed_config: {{ '@type': \
         {ROUTER} }} }}] }} }}]"
    )
}

fn says(text: &str) -> String {
    http_filters("tls", &format!("direct_response: {{ status: 200, body: {{ inline_string: {text} }} }}"))
}

fn tcp_filters() -> String {
    format!("filters: [{{ name: tcp, typed_config: {{ '@type': {TCP_PROXY}, stat_prefix: t, cluster: up }} }}]")
}

/// A filter chain: `rule` is its match, `context` is added to its TLS context.
fn chain(rule: &str, certificates: &[&Issued], common: &str, context: &str, filters: &str) -> String {
    let certificates: Vec<_> = certificates.iter().map(|issued| certificate(issued)).collect();
    format!(
        "{{ filter_chain_match: {{ {rule} }}, transport_socket: {{ name: tls, typed_config: {{ '@type': {DOWNSTREAM}, {context} \
         common_tls_context: {{ tls_certificates: [{}], {common} }} }} }}, {filters} }}",
        certificates.join(", ")
    )
}

fn cluster(host: SocketAddr, context: &str, more: &str) -> String {
    format!(
        "{{ name: up, type: STATIC, {more} load_assignment: {{ cluster_name: up, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ hostname: \
         host.test, address: {{ socket_address: {{ address: {}, port_value: {} }} }} }} }}] }}] }}, transport_socket: {{ name: tls, \
         typed_config: {{ '@type': {UPSTREAM}, {context} }} }} }}",
        host.ip(),
        host.port()
    )
}

fn der(issued: &Issued) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let chain = CertificateDer::pem_slice_iter(issued.chain.as_bytes()).collect::<Result<_, _>>().unwrap();
    (chain, PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap())
}

fn roots(authority: &Authority) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
    Arc::new(roots)
}

fn client_config(authority: &Authority, own: Option<&Issued>, alpn: &[&str]) -> Arc<ClientConfig> {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_root_certificates(roots(authority));
    let mut config = match own {
        None => builder.with_no_client_auth(),
        Some(issued) => {
            let (chain, key) = der(issued);
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

async fn connect(address: SocketAddr, name: &str, config: Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
    let stream = TcpStream::connect(address).await?;
    TlsConnector::from(config).connect(ServerName::try_from(name.to_owned()).unwrap(), stream).await
}

/// One request and the end of its answer; an error where the server refused us after the handshake.
async fn ask(stream: &mut TlsStream<TcpStream>, request: &str) -> std::io::Result<String> {
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    while !answer.windows(4).any(|end| end == b"\r\n\r\n") || !complete(&answer) {
        let mut part = [0; 4096];
        match stream.read(&mut part).await? {
            0 => break,
            length => answer.extend_from_slice(&part[..length]),
        }
    }
    match answer.is_empty() {
        true => Err(std::io::ErrorKind::UnexpectedEof.into()),
        false => Ok(String::from_utf8(answer).unwrap()),
    }
}

fn complete(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    length.is_some_and(|length: usize| body.len() >= length)
}

const GET: &str = "GET / HTTP/1.1\r\nhost: a.test\r\n\r\n";

fn count(name: &str) -> u64 {
    culvert_proxy_daemon::stats::counter(name).value()
}

/// Waits until a counter has this value: workers count after they have answered.
async fn counted(name: &str, value: u64) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    while count(name) != value {
        assert!(tokio::time::Instant::now() < deadline, "{name} is {}, not {value}", count(name));
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
