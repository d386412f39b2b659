//! The real culvertd, and control planes behind TLS, on Unix domain sockets, without TLS where it is wanted, and silent.

#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

#[path = "../src/tls/testing.rs"]
mod testing;

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_proxy_daemon::tls::provider;
use culvert_xds_client::json;
use envoy_types::pb::envoy::{
    config::cluster::v3::Cluster,
    service::discovery::v3::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
        aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
    },
};
use futures_util::{
    StreamExt,
    stream::{self, BoxStream},
};
use http_body_util::{BodyExt, Full};
use hyper::rt;
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    service::TowerToHyperService,
};
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use testing::{Authority, Issued, yaml};
use tokio::{
    net::{TcpListener, UnixListener},
    sync::Notify,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Request, Response, Status, Streaming};

const UPSTREAM: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext";
const DEADLINE: Duration = Duration::from_secs(30);

/// What came before any handshake: the first byte of each connection.
type FirstBytes = Arc<Mutex<Vec<u8>>>;

/// A server's acceptor, whose clients need a certificate of `clients` where that is set.
fn acceptor(issued: &Issued, clients: Option<&Authority>, alpn: &str) -> TlsAcceptor {
    let builder = ServerConfig::builder_with_provider(Arc::clone(provider()));
    let builder = builder.with_safe_default_protocol_versions().unwrap();
    let builder = match clients {
        Some(authority) => {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).unwrap()).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider()));
            builder.with_client_cert_verifier(verifier.build().unwrap())
        }
        None => builder.with_no_client_auth(),
    };
    let chain = vec![CertificateDer::from_pem_slice(issued.chain.as_bytes()).unwrap()];
    let key = PrivateKeyDer::from_pem_slice(issued.key.as_bytes()).unwrap();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = vec![alpn.as_bytes().to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

/// Serves connections on which the handshake has been done.
async fn server(
    acceptor: TlsAcceptor,
    serve: impl Fn(TokioIo<TlsStream<tokio::net::TcpStream>>) + Send + 'static,
) -> (SocketAddr, FirstBytes) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let first = FirstBytes::default();
    let seen = Arc::clone(&first);
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut byte = [0];
            if stream.peek(&mut byte).await.is_ok_and(|read| read == 1) {
                seen.lock().unwrap().push(byte[0]);
            }
            // A handshake that fails is the client's decision.
            if let Ok(stream) = acceptor.accept(stream).await {
                serve(TokioIo::new(stream));
            }
        }
    });
    (address, first)
}

struct OneCluster;

fn answer() -> DiscoveryResponse {
    let cluster: Cluster = json::from_yaml("{ name: from_tls, type: STATIC, connect_timeout: 1s }").unwrap();
    let resource = json::pack(&cluster);
    DiscoveryResponse {
        version_info: "1".to_owned(),
        type_url: resource.type_url.clone(),
        nonce: "1".to_owned(),
        resources: vec![resource],
        ..Default::default()
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for OneCluster {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let requests = request.into_inner();
        let answers = requests.filter_map(|request| async {
            let request = request.ok()?;
            let first = request.type_url == answer().type_url && request.response_nonce.is_empty();
            first.then(|| Ok(answer()))
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

/// An ADS server behind TLS.
async fn ads_server(acceptor: TlsAcceptor) -> (SocketAddr, FirstBytes) {
    server(acceptor, |stream| serve(stream, OneCluster)).await
}

/// Serves ADS on a connection.
fn serve(stream: impl rt::Read + rt::Write + Unpin + Send + 'static, control_plane: impl AggregatedDiscoveryService) {
    let service = TowerToHyperService::new(AggregatedDiscoveryServiceServer::new(control_plane));
    let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service);
    tokio::spawn(async move { drop(serving.await) });
}

/// A REST server behind TLS, over HTTP/1.1.
async fn rest_server(acceptor: TlsAcceptor) -> (SocketAddr, FirstBytes) {
    server(acceptor, |stream| {
        let service = hyper::service::service_fn(|request: http::Request<hyper::body::Incoming>| async {
            request.into_body().collect().await?;
            let body = Full::new(bytes::Bytes::from(json::to_json(&answer()).to_string()));
            Ok::<_, hyper::Error>(http::Response::new(body))
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(stream, service));
    })
    .await
}

fn at(server: SocketAddr) -> String {
    format!("socket_address: {{ address: 127.0.0.1, port_value: {} }}", server.port())
}

struct Culvertd {
    process: Child,
    folder: tempfile::TempDir,
}

impl Drop for Culvertd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Culvertd {
    /// `context`: of the cluster `xds`; `dynamic`: the `dynamic_resources`; `more`: other `static_resources`.
    fn start(server: SocketAddr, context: &str, options: &str, dynamic: &str, more: &str) -> Culvertd {
        let options =
            format!("{options} transport_socket: {{ name: tls, typed_config: {{ '@type': {UPSTREAM}, {context} }} }},");
        Self::start_at(&at(server), &options, dynamic, more)
    }

    /// `address`: of the one host of the cluster `xds`.
    fn start_at(address: &str, options: &str, dynamic: &str, more: &str) -> Culvertd {
        let folder = tempfile::tempdir().unwrap();
        let config = format!(
            "node: {{ id: node-1, cluster: c }}\nadmin: {{ address: {{ socket_address: {{ address: 127.0.0.1, port_value: 0 }} }} }}\n\
             dynamic_resources: {{ {dynamic} }}\nstatic_resources:\n  {more}\n  clusters: [{{ name: xds, type: STATIC, {options} \
             load_assignment: {{ cluster_name: xds, endpoints: [{{ lb_endpoints: [{{ endpoint: {{ hostname: host.test, address: {{ \
             {address} }} }} }}] }}] }} }}]\n"
        );
        fs::write(folder.path().join("c.yaml"), config).unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_culvertd"))
            .arg("--config-path")
            .arg(folder.path().join("c.yaml"))
            .arg("--admin-address-path")
            .arg(folder.path().join("admin"))
            .arg("--log-path")
            .arg(folder.path().join("log"))
            .args(["--concurrency", "1"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Culvertd { process, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// A page of the admin port; empty as long as there is none.
    fn page(&self, path: &str) -> String {
        let Ok(address) = fs::read_to_string(self.path("admin")) else { return String::new() };
        let Ok(mut stream) = TcpStream::connect(address) else { return String::new() };
        let mut page = String::new();
        let asked = write!(stream, "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        if asked.and_then(|()| stream.read_to_string(&mut page)).is_err() {
            page.clear();
        }
        page
    }

    async fn wait(&self, what: &str, holds: impl Fn(&Culvertd) -> bool) {
        let started = Instant::now();
        while !holds(self) {
            let log = self.log();
            assert!(started.elapsed() < DEADLINE, "{what}; log: {log}\nstats: {}", self.page("/stats"));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn is_connected(&self, update: &str) {
        self.wait("the cluster arrives", |it| it.page("/stats").contains(update)).await;
        assert!(self.page("/clusters").contains("from_tls::"), "{}", self.page("/clusters"));
    }

    /// It cannot connect, for a reason that the log tells.
    async fn is_refused(&self, reason: &str) {
        self.wait(reason, |it| it.log().contains(reason)).await;
        let stats = self.page("/stats");
        assert!(stats.contains("control_plane.connected_state: 0\n"), "{stats}");
        assert!(!stats.contains("cluster.xds.ssl.handshake: 1\n"), "{stats}");
    }
}

const ADS: &str = "ads_config: { api_type: GRPC, transport_api_version: V3, grpc_services: [{ envoy_grpc: { cluster_name: xds } }] }, \
                   cds_config: { ads: {}, resource_api_version: V3 }";
const REST: &str = "cds_config: { resource_api_version: V3, api_config_source: { api_type: REST, transport_api_version: V3, \
                    cluster_names: [xds], refresh_delay: 0.1s } }";
const HTTP2: &str = "typed_extension_protocol_options: { envoy.extensions.upstreams.http.v3.HttpProtocolOptions: { '@type': \
                     type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions, explicit_http_config: { \
                     http2_protocol_options: {} } } },";

fn trust(authority: &Authority, name: &str) -> String {
    format!(
        "validation_context: {{ trusted_ca: {{ inline_string: {} }}, match_typed_subject_alt_names: [{{ san_type: DNS, matcher: {{ exact: \
         {name} }} }}] }}",
        yaml(&authority.pem)
    )
}

fn certificate(issued: &Issued) -> String {
    let (chain, key) = (yaml(&issued.chain), yaml(&issued.key));
    format!("{{ certificate_chain: {{ inline_string: {chain} }}, private_key: {{ inline_string: {key} }} }}")
}

/// Nobody ever began with anything but a TLS handshake record.
fn never_plain(first: &FirstBytes) {
    let first = first.lock().unwrap();
    assert!(!first.is_empty() && first.iter().all(|byte| *byte == 22), "{first:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ads_over_tls_names_the_server_and_verifies_it() {
    let authority = Authority::new("ca");
    let (server, first) = ads_server(acceptor(&authority.issue(&["xds.test"], &[]), None, "h2")).await;
    let context = format!("sni: xds.test, common_tls_context: {{ {} }}", trust(&authority, "xds.test"));
    let culvertd = Culvertd::start(server, &context, HTTP2, ADS, "");
    culvertd.is_connected("cluster_manager.cds.update_success: 1\n").await;
    let stats = culvertd.page("/stats");
    for line in ["control_plane.connected_state: 1\n", "cluster.xds.ssl.handshake: 1\n"] {
        assert!(stats.contains(line), "{line} {stats}");
    }
    never_plain(&first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ads_over_mutual_tls_with_secrets_of_the_bootstrap() {
    let (authority, clients) = (Authority::new("ca"), Authority::new("clients"));
    // The name of the endpoint is the one that is asked for and must match.
    let (server, first) = ads_server(acceptor(&authority.issue(&["host.test"], &[]), Some(&clients), "h2")).await;
    let own = clients.issue(&["me.test"], &[]);
    let ca = format!("validation_context: {{ trusted_ca: {{ inline_string: {} }} }}", yaml(&authority.pem));
    let secrets = format!("secrets: [{{ name: own, tls_certificate: {} }}]", certificate(&own));
    let context = format!(
        "auto_host_sni: true, auto_sni_san_validation: true, common_tls_context: {{ tls_certificate_sds_secret_configs: [{{ name: own }}], \
         {ca} }}"
    );
    let culvertd = Culvertd::start(server, &context, HTTP2, ADS, &secrets);
    culvertd.is_connected("cluster_manager.cds.update_success: 1\n").await;

    let nameless = format!("auto_host_sni: true, common_tls_context: {{ {ca} }}");
    let refused = Culvertd::start(server, &nameless, HTTP2, ADS, "");
    refused.is_refused("CertificateRequired").await;
    never_plain(&first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_authority_and_a_wrong_name_are_refused() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    let (server, first) = ads_server(acceptor(&authority.issue(&["xds.test"], &[]), None, "h2")).await;
    let context = |authority, name| format!("sni: xds.test, common_tls_context: {{ {} }}", trust(authority, name));
    let wrong_authority = Culvertd::start(server, &context(&other, "xds.test"), HTTP2, ADS, "");
    let wrong_name = Culvertd::start(server, &context(&authority, "else.test"), HTTP2, ADS, "");
    for refused in [&wrong_authority, &wrong_name] {
        refused
            .is_refused("cannot connect to the control plane: transport error: the TLS handshake failed: invalid peer certificate")
            .await;
    }
    wrong_authority.wait("counted", |it| it.page("/stats").contains("cluster.xds.ssl.fail_verify_error: ")).await;
    never_plain(&first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rest_over_tls() {
    let (authority, other) = (Authority::new("ca"), Authority::new("other"));
    let (server, first) = rest_server(acceptor(&authority.issue(&["xds.test"], &[]), None, "http/1.1")).await;
    let context = |authority| format!("sni: xds.test, common_tls_context: {{ {} }}", trust(authority, "xds.test"));
    let culvertd = Culvertd::start(server, &context(&authority), "", REST, "");
    culvertd.is_connected("cluster_manager.cds.version_text: \"1\"\n").await;
    let refused = Culvertd::start(server, &context(&other), "", REST, "");
    let reason = "the TLS handshake failed: invalid peer certificate";
    refused.wait(reason, |it| it.log().contains(reason)).await;
    assert!(refused.page("/stats").contains("cluster_manager.cds.update_success: 0\n"));
    never_plain(&first);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ads_on_a_unix_socket() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("xds");
    let accept = |listener: UnixListener| {
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                serve(TokioIo::new(stream), OneCluster);
            }
        })
    };
    // Nobody listens yet.
    let culvertd = Culvertd::start_at(&format!("pipe: {{ path: {} }}", path.display()), HTTP2, ADS, "");
    let reason = "cannot connect to the control plane";
    culvertd.wait(reason, |it| it.log().contains(reason)).await;
    accept(UnixListener::bind(&path).unwrap());
    culvertd.is_connected("cluster_manager.cds.update_success: 1\n").await;
    assert!(culvertd.page("/stats").contains("control_plane.connected_state: 1\n"));
}

/// A server that wants no TLS: its first bytes are no handshake, and the client says so and waits before it tries again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_is_not_spoken_to() {
    let authority = Authority::new("ca");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let (connections, first) = (Arc::new(AtomicUsize::new(0)), FirstBytes::default());
    let (counted, seen) = (Arc::clone(&connections), Arc::clone(&first));
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            let mut byte = [0];
            if stream.peek(&mut byte).await.is_ok_and(|read| read == 1) {
                seen.lock().unwrap().push(byte[0]);
            }
            serve(TokioIo::new(stream), OneCluster);
        }
    });
    let context = format!("sni: xds.test, common_tls_context: {{ {} }}", trust(&authority, "xds.test"));
    let culvertd = Culvertd::start(server, &context, HTTP2, ADS, "");
    culvertd.is_refused("cannot connect to the control plane: transport error: the TLS handshake failed: ").await;
    // What is measured is how many attempts there are in two seconds. The waits are at most 0.5 s, 1 s, 2 s, ..., and random: a dozen
    // would be much, and a spinning client makes thousands.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let attempts = connections.load(Ordering::Relaxed);
    assert!((1..30).contains(&attempts), "{attempts} attempts; {}", culvertd.log());
    assert!(culvertd.log().lines().count() < 60, "{}", culvertd.log());
    assert!(culvertd.page("/stats").contains("cluster_manager.cds.update_success: 0\n"));
    never_plain(&first);
}

/// What a silent control plane has been asked, and when.
type Asked = Arc<Mutex<Vec<(Instant, String)>>>;

/// Takes every request and says nothing, until it is told to answer the one for clusters.
#[derive(Clone, Default)]
struct Silent {
    asked: Asked,
    speak: Arc<Notify>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Silent {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (asked, speak) = (Arc::clone(&self.asked), Arc::clone(&self.speak));
        let requests = request.into_inner().filter_map(move |request| {
            asked.lock().unwrap().extend(request.ok().map(|it| (Instant::now(), it.type_url)));
            std::future::ready(None)
        });
        let late = stream::once(async move {
            speak.notified().await;
            Ok(answer())
        });
        Ok(Response::new(Box::pin(stream::select(requests, late))))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_server_is_waited_for_no_longer_than_it_may() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (server, silent) = (listener.local_addr().unwrap(), Silent::default());
    let control_plane = silent.clone();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            serve(TokioIo::new(stream), control_plane.clone());
        }
    });
    let ads = ADS.replace("cds_config: { ads", "cds_config: { initial_fetch_timeout: 1s, ads");
    let dynamic = format!("{ads}, lds_config: {{ ads: {{}}, resource_api_version: V3, initial_fetch_timeout: 0.5s }}");
    let culvertd = Culvertd::start_at(&at(server), HTTP2, &dynamic, "");
    let asked = |end: &str| {
        let all = silent.asked.lock().unwrap();
        all.iter().find(|(_, type_url)| type_url.ends_with(end)).map(|(when, _)| *when)
    };
    culvertd.wait("clusters are asked for", |_| asked(".Cluster").is_some()).await;
    assert!(!culvertd.page("/ready").contains("LIVE"));
    culvertd.wait("listeners are asked for", |_| asked(".Listener").is_some()).await;
    let waited = asked(".Listener").unwrap() - asked(".Cluster").unwrap();
    // The time begins when it is subscribed, a little before the request is here.
    assert!((Duration::from_millis(700)..Duration::from_secs(10)).contains(&waited), "{waited:?}");
    culvertd.wait("it serves without them", |it| it.page("/ready").contains("LIVE")).await;
    let stats = culvertd.page("/stats");
    for kind in ["cluster_manager.cds", "listener_manager.lds"] {
        for line in ["init_fetch_timeout: 1\n", "update_success: 0\n"] {
            assert!(stats.contains(&format!("{kind}.{line}")), "{kind}.{line} {stats}");
        }
    }

    // What comes late is taken all the same.
    silent.speak.notify_one();
    culvertd.is_connected("cluster_manager.cds.update_success: 1\n").await;
}
