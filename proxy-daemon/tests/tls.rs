//! TLS on either side, with real sockets, through the data plane's own handle; rustls plays the peers.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod support;
#[path = "../src/tls/testing.rs"]
mod testing;

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

#[test]
fn alpn_chooses_the_codec() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let text =
            bootstrap("alpn", &[chain("", &[&server], "alpn_protocols: [h2, http/1.1]", "", &says("hello"))], &[]);
        let (plane, addresses) = start(&text).await;
        for (offered, chosen) in [(vec![], None), (vec!["http/1.1"], Some("http/1.1"))] {
            let mut stream = connect(addresses[0], "a.test", client_config(&authority, None, &offered)).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), chosen.map(str::as_bytes));
            assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        }
        let stream = connect(addresses[0], "a.test", client_config(&authority, None, &["h2"])).await.unwrap();
        let io = hyper_util::rt::TokioIo::new(stream);
        let executor = culvert_proxy_daemon::http::LocalExecutor;
        let (mut sender, driver) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
        tokio::task::spawn_local(driver);
        let request =
            hyper::Request::get("https://a.test/").body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 200);
        assert_eq!(count("listener.alpn.ssl.handshake"), 3);
        assert_eq!(count("listener.alpn.ssl.no_certificate"), 3);
        assert_eq!(count("listener.alpn.ssl.versions.TLSv1.3"), 3);
        assert_eq!(count("http.tls.downstream_cx_ssl_total"), 3);
        plane.stop();
    });
}

#[test]
fn clients_show_certificates_with_the_right_name() {
    run(async {
        let (authority, stranger) = (Authority::new("ca"), Authority::new("other"));
        let server = authority.issue(&["a.test"], &[]);
        let validation = format!(
            "validation_context: {{ trusted_ca: {{ inline_string: {} }}, match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ exact: \
             'spiffe://td/client' }} }}] }}",
            yaml(&authority.pem)
        );
        let chain = chain("", &[&server], &validation, "require_client_certificate: true,", &says("hello"));
        let (plane, addresses) = start(&bootstrap("mtls", &[chain], &[])).await;
        let attempt = async |own: Option<&Issued>| {
            let mut stream = connect(addresses[0], "a.test", client_config(&authority, own, &[])).await?;
            ask(&mut stream, GET).await
        };
        let right = authority.issue(&[], &["spiffe://td/client"]);
        assert!(attempt(Some(&right)).await.unwrap().ends_with("hello"));
        let wrong_name = authority.issue(&[], &["spiffe://td/other"]);
        assert!(attempt(Some(&wrong_name)).await.is_err());
        counted("listener.mtls.ssl.fail_verify_san", 1).await;
        let wrong_issuer = stranger.issue(&[], &["spiffe://td/client"]);
        assert!(attempt(Some(&wrong_issuer)).await.is_err());
        counted("listener.mtls.ssl.fail_verify_error", 1).await;
        assert!(attempt(None).await.is_err());
        counted("listener.mtls.ssl.fail_verify_no_cert", 1).await;
        let mut garbage = TcpStream::connect(addresses[0]).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        counted("listener.mtls.ssl.connection_error", 1).await;
        assert_eq!(count("listener.mtls.ssl.handshake"), 1);
        plane.stop();
    });
}

#[test]
fn the_server_name_chooses_the_chain_and_the_certificate() {
    run(async {
        let authority = Authority::new("ca");
        let (a, b, wild) = (
            authority.issue(&["a.test"], &[]),
            authority.issue(&["b.test"], &[]),
            authority.issue(&["*.wild.test"], &[]),
        );
        let chains = [
            chain("server_names: [A.test, b.test]", &[&a, &b], "", "", &says("named")),
            chain("server_names: ['*.wild.test']", &[&wild], "", "", &says("wild")),
            format!("{{ filter_chain_match: {{ transport_protocol: raw_buffer }}, {} }}", says("plain")),
        ];
        let (plane, addresses) = start(&bootstrap("sni", &chains, &[])).await;
        for (name, expected) in [("a.test", "named"), ("b.test", "named"), ("x.wild.test", "wild")] {
            let mut stream = connect(addresses[0], name, client_config(&authority, None, &[])).await.unwrap();
            assert!(ask(&mut stream, GET).await.unwrap().ends_with(expected), "{name}");
        }
        assert!(connect(addresses[0], "nobody.test", client_config(&authority, None, &[])).await.is_err());
        counted("listener.sni.no_filter_chain_match", 1).await;
        let plain = tokio::task::spawn_blocking({
            let address = addresses[0];
            move || support::get(address, "/", &[])
        });
        assert_eq!(plain.await.unwrap().body, "plain");
        plane.stop();
    });
}

/// A TLS server that answers every HTTP/1 request with the protocol and the name that it was asked for, and echoes what
/// else it gets; by its handshake count.
async fn https_server(issued: &Issued, clients: Option<&Authority>, alpn: &[&str]) -> (SocketAddr, Arc<AtomicUsize>) {
    let (chain, key) = der(issued);
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let verifier = match clients {
        None => WebPkiClientVerifier::no_client_auth(),
        Some(authority) => {
            WebPkiClientVerifier::builder_with_provider(roots(authority), Arc::clone(provider())).build().unwrap()
        }
    };
    let mut config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key).unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let handshakes = Arc::new(AtomicUsize::new(0));
    let counting = Arc::clone(&handshakes);
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, counting) = (acceptor.clone(), Arc::clone(&counting));
            tokio::task::spawn_local(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                counting.fetch_add(1, Ordering::Relaxed);
                let session = stream.get_ref().1;
                let text = format!(
                    "{} {}",
                    session.alpn_protocol().map_or("-".into(), String::from_utf8_lossy),
                    session.server_name().unwrap_or("-")
                );
                let service = hyper::service::service_fn(move |_| {
                    let text = text.clone();
                    async move {
                        Ok::<_, std::convert::Infallible>(hyper::Response::new(http_body_util::Full::new(
                            bytes::Bytes::from(text),
                        )))
                    }
                });
                let io = hyper_util::rt::TokioIo::new(stream);
                let http2 = io.inner().get_ref().1.alpn_protocol() == Some(b"h2");
                if http2 {
                    let executor = culvert_proxy_daemon::http::LocalExecutor;
                    drop(hyper::server::conn::http2::Builder::new(executor).serve_connection(io, service).await);
                } else {
                    drop(hyper::server::conn::http1::Builder::new().serve_connection(io, service).await);
                }
            });
        }
    });
    (address, handshakes)
}

async fn fetch(address: SocketAddr) -> support::Response {
    tokio::task::spawn_blocking(move || support::get(address, "/", &[])).await.unwrap()
}

fn plain_chain() -> String {
    format!("{{ {} }}", http_filters("plain", "route: { cluster: up }"))
}

#[test]
fn hosts_are_verified_and_see_our_certificate() {
    run(async {
        let authority = Authority::new("ca");
        let own = authority.issue(&[], &["spiffe://td/proxy"]);
        let server = authority.issue(&["host.test"], &["spiffe://td/server"]);
        let (address, handshakes) = https_server(&server, Some(&authority), &["h2", "http/1.1"]).await;
        let context = |more: &str| {
            format!(
                "{more} common_tls_context: {{ tls_certificates: [{}], validation_context: {{ trusted_ca: {{ inline_string: {} }}, \
                 match_typed_subject_alt_names: [{{ san_type: URI, matcher: {{ prefix: 'spiffe://td/' }} }}] }} }}",
                certificate(&own),
                yaml(&authority.pem)
            )
        };
        let (plane, addresses) =
            start(&bootstrap("up1", &[plain_chain()], &[cluster(address, &context("sni: a.test,"), "")])).await;
        assert_eq!(fetch(addresses[0]).await.body, "http/1.1 a.test");
        assert_eq!(fetch(addresses[0]).await.body, "http/1.1 a.test");
        assert_eq!(handshakes.load(Ordering::Relaxed), 1, "the connection is pooled");
        assert_eq!(count("cluster.up.ssl.handshake"), 1);
        plane.stop();
        // What the host's certificate must be for is the name that is sent.
        for (name, status) in [("auto_host_sni: true,", 200), ("sni: other.test,", 503)] {
            let context = context(&format!("{name} auto_sni_san_validation: true,"));
            let (plane, addresses) =
                start(&bootstrap("up2", &[plain_chain()], &[cluster(address, &context, "")])).await;
            assert_eq!(fetch(addresses[0]).await.status, status, "{name}");
            if status == 503 {
                counted("cluster.up.ssl.fail_verify_san", 1).await;
                assert_eq!(count("cluster.up.upstream_cx_connect_fail"), 1);
            }
            plane.stop();
        }
    });
}

#[test]
fn a_host_that_cannot_be_trusted_gets_nothing() {
    run(async {
        let (authority, stranger) = (Authority::new("ca"), Authority::new("other"));
        let server = stranger.issue(&["host.test"], &[]);
        let (address, _) = https_server(&server, None, &[]).await;
        let trusting = format!(
            "common_tls_context: {{ validation_context: {{ trusted_ca: {{ inline_string: {} }} }} }}",
            yaml(&authority.pem)
        );
        for (context, status) in [(trusting.as_str(), 503), ("sni: x.test", 200)] {
            let (plane, addresses) = start(&bootstrap("up3", &[plain_chain()], &[cluster(address, context, "")])).await;
            let response = fetch(addresses[0]).await;
            assert_eq!(response.status, status, "without a validation context nothing is verified, as in Envoy");
            if status == 503 {
                assert!(response.body.ends_with("reset reason: remote connection failure"), "{}", response.body);
                // Before the cluster goes: its statistics go with it.
                counted("cluster.up.ssl.fail_verify_error", 1).await;
            }
            plane.stop();
        }
    });
}

#[test]
fn the_host_chooses_the_protocol() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["host.test"], &[]);
        let options = format!(
            "typed_extension_protocol_options: {{ {HTTP_OPTIONS}: {{ '@type': type.googleapis.com/{HTTP_OPTIONS}, auto_config: {{}} }} }},"
        );
        for (offered, chosen) in [(&["h2", "http/1.1"][..], "h2"), (&["http/1.1"], "http/1.1"), (&[], "-")] {
            let (address, handshakes) = https_server(&server, None, offered).await;
            let (plane, addresses) =
                start(&bootstrap("up4", &[plain_chain()], &[cluster(address, "sni: host.test", &options)])).await;
            for _ in 0..3 {
                assert_eq!(fetch(addresses[0]).await.body, format!("{chosen} host.test"));
            }
            assert_eq!(handshakes.load(Ordering::Relaxed), 1, "{chosen}");
            plane.stop();
        }
    });
}

/// A TLS server that sends back what it gets, until it gets no more.
async fn echo_server(issued: &Issued) -> SocketAddr {
    let (chain, key) = der(issued);
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
    let acceptor = TlsAcceptor::from(Arc::new(builder.with_single_cert(chain, key).unwrap()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::task::spawn_local(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::task::spawn_local(async move {
                let Ok(stream) = acceptor.accept(stream).await else { return };
                let (mut from, mut to) = tokio::io::split(stream);
                drop(tokio::io::copy(&mut from, &mut to).await);
                drop(to.shutdown().await);
            });
        }
    });
    address
}

#[test]
fn tcp_passes_through_two_tls_connections() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let host = echo_server(&server).await;
        let chain = chain("", &[&server], "", "", &tcp_filters());
        let (plane, addresses) = start(&bootstrap("tcp", &[chain], &[cluster(host, "sni: a.test", "")])).await;
        let stream = connect(addresses[0], "a.test", client_config(&authority, None, &[])).await.unwrap();
        let (mut from, mut to) = tokio::io::split(stream);
        let payload: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut received = Vec::new();
        let send = async {
            to.write_all(&payload).await.unwrap();
            to.shutdown().await.unwrap();
        };
        let (_, read) = tokio::join!(send, from.read_to_end(&mut received));
        read.unwrap();
        assert!(received == payload, "{} of {} bytes came back", received.len(), payload.len());
        // A small message does not wait for a larger one.
        let mut stream = connect(addresses[0], "a.test", client_config(&authority, None, &[])).await.unwrap();
        for _ in 0..3 {
            stream.write_all(b"ping").await.unwrap();
            let mut pong = [0; 4];
            stream.read_exact(&mut pong).await.unwrap();
            assert_eq!(&pong, b"ping");
        }
        plane.stop();
    });
}

fn secret(text: &str) -> culvert_proxy_daemon::config::model::Secret {
    let message: ProtoSecret = json::from_yaml(text).unwrap();
    parse::secret(&message, "").unwrap()
}

#[test]
fn a_changed_secret_is_used_by_the_next_handshake() {
    run(async {
        let (old, new) = (Authority::new("old"), Authority::new("new"));
        let named = |authority: &Authority| {
            format!("name: s\ntls_certificate: {}", certificate(&authority.issue(&["a.test"], &[])))
        };
        let chain = format!(
            "{{ transport_socket: {{ name: tls, typed_config: {{ '@type': {DOWNSTREAM}, common_tls_context: {{ \
             tls_certificate_sds_secret_configs: [{{ name: s }}] }} }} }}, {} }}",
            says("hello")
        );
        let text = bootstrap("sds", &[chain], &[]);
        let first = format!(
            "{}, secrets: [{{ name: s, tls_certificate: {} }}] }}",
            text.strip_suffix(" }").unwrap(),
            certificate(&old.issue(&["a.test"], &[]))
        );
        let (plane, addresses) = start(&first).await;
        let mut before = connect(addresses[0], "a.test", client_config(&old, None, &[])).await.unwrap();
        assert!(connect(addresses[0], "a.test", client_config(&new, None, &[])).await.is_err());
        let name = culvert_proxy_daemon::config::model::SecretName { source: None, name: "s".into() };
        plane.secrets().set(name.clone(), secret(&named(&new)));
        let mut after = connect(addresses[0], "a.test", client_config(&new, None, &[])).await.unwrap();
        assert!(connect(addresses[0], "a.test", client_config(&old, None, &[])).await.is_err());
        for stream in [&mut before, &mut after] {
            assert!(ask(stream, GET).await.unwrap().ends_with("hello"), "connections in force stay");
        }
        assert_eq!(count("listener.sds.server_ssl_socket_factory.ssl_context_update_by_sds"), 1);
        // One that is gone leaves the context as it is.
        plane.secrets().remove(&name);
        assert!(connect(addresses[0], "a.test", client_config(&new, None, &[])).await.is_ok());
        plane.stop();
    });
}

/// What the second connection of a client to the listener of each of these contexts came to, the first having been to the
/// first of them. `versions`: what the client speaks.
async fn resumed(
    name: &str,
    versions: &[&'static rustls::SupportedProtocolVersion],
    contexts: &[&str],
    secrets: &str,
) -> Vec<bool> {
    let authority = Authority::new("ca");
    let server = authority.issue(&["a.test"], &[]);
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_protocol_versions(versions).unwrap().with_root_certificates(roots(&authority));
    let config = Arc::new(builder.with_no_client_auth());
    let mut outcomes = Vec::new();
    for context in contexts {
        let chain = chain("", &[&server], "", context, &says("hello"));
        let text = bootstrap(name, &[chain], &[]);
        let text = format!("{}, secrets: [{secrets}] }}", text.strip_suffix(" }").unwrap());
        // Each is a process of its own, as far as tickets are concerned.
        let (plane, addresses) = start(&text).await;
        let mut stream = connect(addresses[0], "a.test", Arc::clone(&config)).await.unwrap();
        // The tickets of TLS 1.3 come with the answer.
        assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        outcomes.push(stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed));
        plane.stop();
    }
    outcomes
}

fn ticket_keys(seeds: &[u8]) -> String {
    let keys: Vec<_> = seeds
        .iter()
        .map(|seed| format!("{{ inline_string: {} }}", yaml(&char::from(*seed).to_string().repeat(80))))
        .collect();
    format!("session_ticket_keys: {{ keys: [{}] }}", keys.join(", "))
}

#[test]
fn sessions_survive_a_restart_by_their_ticket_keys() {
    run(async {
        let (old, both, new) = (ticket_keys(b"A"), ticket_keys(b"BA"), ticket_keys(b"B"));
        let (old, both, new) = (format!("{old},"), format!("{both},"), format!("{new},"));
        for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
            // The same key; rotated: the old one still opens; the new one has sealed; the old one is gone.
            let outcome = resumed("keys", &[version], &[&old, &old, &both, &new, &old], "").await;
            assert_eq!(outcome, [false, true, true, true, false], "{version:?}");
            let without = resumed("own", &[version], &["", ""], "").await;
            assert_eq!(without, [false, false], "every process has its own keys");
        }
        // What lets clients in differs: a session of the one is none of the other.
        let other = format!("{old} require_client_certificate: false,");
        assert_eq!(resumed("same", &[&rustls::version::TLS13], &[&old, &other], "").await, [false, true]);
        let secrets = format!("{{ name: t, {} }}", ticket_keys(b"A"));
        let by_name = "session_ticket_keys_sds_secret_config: { name: t },";
        assert_eq!(resumed("named", &[&rustls::version::TLS13], &[by_name, &old], &secrets).await, [false, true]);
    });
}

/// Two connections of one client to one listener; whether the second took up the session of the first.
async fn resumed_at(
    address: SocketAddr,
    authority: &Authority,
    version: &'static rustls::SupportedProtocolVersion,
    pause: Duration,
) -> bool {
    let builder = ClientConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_protocol_versions(&[version]).unwrap().with_root_certificates(roots(authority));
    let config = Arc::new(builder.with_no_client_auth());
    let mut kind = None;
    for wait in [Duration::ZERO, pause] {
        // A session's age is what is tested: nothing but time makes it.
        tokio::time::sleep(wait).await;
        let mut stream = connect(address, "a.test", Arc::clone(&config)).await.unwrap();
        assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
        kind = stream.get_ref().1.handshake_kind();
    }
    kind == Some(rustls::HandshakeKind::Resumed)
}

#[test]
fn resumption_is_switched_off_and_ends_with_its_time() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let (no_ids, no_tickets) =
            ("disable_stateful_session_resumption: true,", "disable_stateless_session_resumption: true,");
        let neither = format!("{no_ids} {no_tickets}");
        let keyed = format!("session_timeout: 1s, {},", ticket_keys(b"A"));
        let late = Duration::from_millis(2100);
        for (context, pause, tls12, tls13) in [
            ("", Duration::ZERO, true, true),
            (no_ids, Duration::ZERO, true, true),
            (no_tickets, Duration::ZERO, true, false),
            (neither.as_str(), Duration::ZERO, false, false),
            ("session_timeout: 60s,", Duration::ZERO, true, true),
            ("session_timeout: 1s,", late, false, false),
            ("session_timeout: 1s, disable_stateless_session_resumption: true,", late, false, false),
            (keyed.as_str(), late, false, false),
        ] {
            let chain = chain("", &[&server], "", context, &says("hello"));
            let (plane, addresses) = start(&bootstrap("switched", &[chain], &[])).await;
            for (version, expected) in [(&rustls::version::TLS12, tls12), (&rustls::version::TLS13, tls13)] {
                let outcome = resumed_at(addresses[0], &authority, version, pause).await;
                assert_eq!(outcome, expected, "{context:?} {version:?}");
            }
            plane.stop();
        }
    });
}

#[test]
fn ticket_keys_of_sds_are_waited_for_and_rotate() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let ads = "{ name: t, sds_config: { ads: {}, resource_api_version: V3 } }";
        let context = format!("session_ticket_keys_sds_secret_config: {ads},");
        let text = bootstrap("tickets", &[chain("", &[&server], "", &context, &says("hello"))], &[]);
        let text = format!(
            "node: {{ id: node, cluster: c }}, dynamic_resources: {{ ads_config: {{ api_type: GRPC, transport_api_version: V3, \
             grpc_services: [{{ envoy_grpc: {{ cluster_name: up }} }}] }} }}, {text}"
        );
        let text = format!("{{ {} }}", text.replace("clusters: []", &format!("clusters: [{}]", PLAIN_CLUSTER)));
        let (plane, addresses) = start(&text).await;
        let config = client_config(&authority, None, &[]);
        assert!(connect(addresses[0], "a.test", Arc::clone(&config)).await.is_err(), "the keys are missing");
        let name = culvert_proxy_daemon::config::model::SecretName {
            source: Some(Arc::new(culvert_xds_client::source::Source::Ads)),
            name: "t".into(),
        };
        let rotate =
            |seeds: &[u8]| plane.secrets().set(name.clone(), secret(&format!("{{ name: t, {} }}", ticket_keys(seeds))));
        for (keys, expected) in [(&b"A"[..], false), (b"BA", true), (b"B", true), (b"C", false)] {
            rotate(keys);
            let mut stream = connect(addresses[0], "a.test", Arc::clone(&config)).await.unwrap();
            assert!(ask(&mut stream, GET).await.unwrap().ends_with("hello"));
            let resumed = stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
            assert_eq!(resumed, expected, "{keys:?}");
        }
        plane.stop();
    });
}

const PLAIN_CLUSTER: &str = "{ name: up, type: STATIC, http2_protocol_options: {}, load_assignment: { cluster_name: up, endpoints: [{ \
    lb_endpoints: [{ endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 1 } } } }] }] } }";

/// What the access log of a connection manager says of a request with and one without a certificate, each with a header
/// `x-forwarded-client-cert: By=old`.
async fn logged(
    manager: &str,
    format: &str,
    clients: &[Option<&Issued>],
    servers: &[&Issued],
    ca: &Authority,
) -> String {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("log");
    let log = format!(
        "access_log: [{{ name: f, typed_config: {{ '@type': type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, \
         path: {}, log_format: {{ text_format_source: {{ inline_string: {} }} }} }} }}]",
        path.display(),
        yaml(&format!("{format}\n"))
    );
    let filters = says("hello").replace("stat_prefix: tls,", &format!("stat_prefix: tls, {log}, {manager}"));
    let validation = format!("validation_context: {{ trusted_ca: {{ inline_string: {} }} }}", yaml(&ca.pem));
    let (plane, addresses) = start(&bootstrap("xfcc", &[chain("", servers, &validation, "", &filters)], &[])).await;
    for (index, own) in clients.iter().enumerate() {
        let mut stream = connect(addresses[0], "a.test", client_config(ca, *own, &[])).await.unwrap();
        let request = "GET / HTTP/1.1\r\nhost: a.test\r\nx-forwarded-client-cert: By=old\r\n\r\n";
        assert!(ask(&mut stream, request).await.unwrap().ends_with("hello"));
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while std::fs::read_to_string(&path).unwrap_or_default().lines().count() <= index {
            assert!(tokio::time::Instant::now() < deadline, "no line {index} in the access log");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    plane.stop();
    std::fs::read_to_string(&path).unwrap()
}

#[test]
fn what_a_client_shows_is_told_to_hosts_as_configured() {
    run(async {
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &["spiffe://td/a", "spiffe://td/b"]);
        let client = authority.issue(&["c.test", "d.test"], &["spiffe://td/c", "spiffe://td/x,y"]);
        let bare = authority.issue(&[], &[]);
        let hash = |issued: &Issued| {
            let digest = culvert_proxy_daemon::tls::sha256(&der(issued).0[0]);
            digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        let of = |issued: &Issued| format!("By=spiffe://td/a;By=spiffe://td/b;Hash={}", hash(issued));
        let pem = client.chain.replace("\r\n", "\n");
        let pem =
            pem.replace('\n', "%0A").replace(' ', "%20").replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        let all = format!(
            "{};Cert=\"{pem}\";Chain=\"{pem}\";Subject=\"O=Org\\, Inc,CN=c.test\";URI=spiffe://td/c;URI=spiffe://td/x,y;DNS=c.test;\
             DNS=d.test",
            of(&client)
        );
        let details =
            "set_current_client_cert_details: { subject: true, cert: true, chain: true, dns: true, uri: true },";
        let uri = "set_current_client_cert_details: { subject: false, uri: true, dns: true },";
        for (mode, details, with, without, barely) in [
            ("SANITIZE", details, "-".to_owned(), "-", "-".to_owned()),
            ("FORWARD_ONLY", details, "By=old".to_owned(), "-", "By=old".to_owned()),
            ("ALWAYS_FORWARD_ONLY", details, "By=old".to_owned(), "By=old", "By=old".to_owned()),
            ("SANITIZE_SET", "", of(&client), "-", of(&bare)),
            (
                "APPEND_FORWARD",
                uri,
                format!("By=old,{};URI=spiffe://td/c;URI=spiffe://td/x,y;DNS=c.test;DNS=d.test", of(&client)),
                "-",
                format!("By=old,{};URI=", of(&bare)),
            ),
            ("SANITIZE_SET", details, all.clone(), "-", String::new()),
        ] {
            let manager = format!("forward_client_cert_details: {mode}, {details}");
            let format = "%REQ(X-FORWARDED-CLIENT-CERT)%";
            let lines = logged(&manager, format, &[Some(&client), None, Some(&bare)], &[&server], &authority).await;
            let lines: Vec<_> = lines.lines().collect();
            assert_eq!(lines[..2], [with.as_str(), without], "{mode} {details}");
            assert!(barely.is_empty() || lines[2] == barely, "{mode} {details}: {}", lines[2]);
        }
    });
}

#[test]
fn certificates_of_both_ends_are_logged() {
    run(async {
        let authority = Authority::new("ca");
        let other = authority.issue(&["b.test"], &["spiffe://td/other"]);
        let server = authority.issue(&["a.test"], &["spiffe://td/a"]);
        let client = authority.issue(&["c.test"], &["spiffe://td/c"]);
        let format = "%DOWNSTREAM_LOCAL_SUBJECT%|%DOWNSTREAM_LOCAL_URI_SAN%|%DOWNSTREAM_LOCAL_DNS_SAN%|\
                      %DOWNSTREAM_PEER_IP_SAN%|%DOWNSTREAM_PEER_EMAIL_SAN%|%DOWNSTREAM_PEER_FINGERPRINT_1%|%DOWNSTREAM_PEER_CERT%";
        // With one certificate and with several, of which the client's name chooses.
        for servers in [&[&server][..], &[&other, &server]] {
            let lines = logged("", format, &[Some(&client), None], servers, &authority).await;
            let lines: Vec<Vec<&str>> = lines.lines().map(|line| line.split('|').collect()).collect();
            let own = ["O=Org\\, Inc,CN=a.test", "spiffe://td/a", "a.test", "-", "-"];
            assert_eq!(lines[0][..5], own);
            assert_eq!(lines[0][5].len(), 40);
            assert!(lines[0][6].starts_with("-----BEGIN%20CERTIFICATE-----%0A"), "{}", lines[0][6]);
            assert_eq!(lines[1][..5], own);
            assert_eq!(lines[1][5..], ["-", "-"]);
        }
    });
}

#[test]
fn why_a_handshake_failed_is_in_the_listeners_log() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let authority = Authority::new("ca");
        let server = authority.issue(&["a.test"], &[]);
        let text = bootstrap("failing", &[chain("", &[&server], "", "", &says("hello"))], &[]);
        let log = format!(
            "name: failing, access_log: [{{ name: f, typed_config: {{ '@type': \
             type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: {}, log_format: {{ text_format_source: {{ \
             inline_string: \"%DOWNSTREAM_TRANSPORT_FAILURE_REASON%\\n\" }} }} }} }}]",
            path.display()
        );
        let (plane, addresses) = start(&text.replace("name: failing", &log)).await;
        let mut garbage = TcpStream::connect(addresses[0]).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        loop {
            let line = std::fs::read_to_string(&path).unwrap_or_default();
            if line.ends_with('\n') {
                assert!(line.starts_with("TLS_error:") && line.trim_end().ends_with(":TLS_error_end"), "{line}");
                assert!(!line.trim_end().contains(' ') && line.len() > 30, "one word: {line}");
                break;
            }
            assert!(tokio::time::Instant::now() < deadline, "no line in the access log");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        plane.stop();
    });
}
