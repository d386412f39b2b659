//! The driver against a real gRPC server in this process, whose side of the stream the test plays.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Mutex;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource as Wrapper,
};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::AbortHandle;
use tokio_stream::Stream;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::{Status, Streaming};

use super::*;
use crate::ads::type_url::{CLUSTER, ENDPOINT};
use crate::ads::{Done, Interest, Outcome, Rejection, Update, Variant};
use crate::json::pack;
use crate::source::{GrpcService, RateLimit, Target};

const PATIENCE: Duration = Duration::from_secs(20);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// One stream, as the server sees it.
struct Session<Q, A> {
    requests: Streaming<Q>,
    answers: UnboundedSender<Result<A, Status>>,
    authority: Option<String>,
}

impl<Q, A> Session<Q, A> {
    async fn request(&mut self) -> Q {
        let next = tokio::time::timeout(PATIENCE, self.requests.message()).await;
        next.expect("a request within the time").expect("no error").expect("the stream is open")
    }

    fn send(&self, answer: A) {
        self.answers.send(Ok(answer)).expect("the client is there");
    }
}

struct Service {
    sotw: UnboundedSender<Session<DiscoveryRequest, DiscoveryResponse>>,
    delta: UnboundedSender<Session<DeltaDiscoveryRequest, DeltaDiscoveryResponse>>,
}

fn session<Q, A: Send + 'static>(
    request: tonic::Request<Streaming<Q>>,
    sessions: &UnboundedSender<Session<Q, A>>,
) -> Result<tonic::Response<Answers<A>>, Status> {
    let (answers, receiver) = unbounded_channel();
    let authority = request.extensions().get::<Authority>().map(|authority| authority.0.clone());
    let session = Session { requests: request.into_inner(), answers, authority };
    sessions.send(session).map_err(|_| Status::unavailable("the test is over"))?;
    Ok(tonic::Response::new(Box::pin(UnboundedReceiverStream::new(receiver))))
}

#[derive(Clone)]
struct Authority(String);

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Answers<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Answers<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: tonic::Request<Streaming<DiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::StreamAggregatedResourcesStream>, Status> {
        session(request, &self.sotw)
    }

    async fn delta_aggregated_resources(
        &self,
        request: tonic::Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<tonic::Response<Self::DeltaAggregatedResourcesStream>, Status> {
        session(request, &self.delta)
    }
}

struct Server {
    address: SocketAddr,
    sotw: UnboundedReceiver<Session<DiscoveryRequest, DiscoveryResponse>>,
    delta: UnboundedReceiver<Session<DeltaDiscoveryRequest, DeltaDiscoveryResponse>>,
    task: AbortHandle,
}

impl Server {
    async fn start(address: &str) -> Server {
        // A port that was just in use may take a moment to be free again.
        let started = Instant::now();
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) => assert!(started.elapsed() < PATIENCE, "cannot listen on {address}: {error}"),
            }
            tokio::task::yield_now().await;
        };
        let address = listener.local_addr().unwrap();
        let (sotw_sender, sotw) = unbounded_channel();
        let (delta_sender, delta) = unbounded_channel();
        let service = AggregatedDiscoveryServiceServer::new(Service { sotw: sotw_sender, delta: delta_sender });
        let note_authority = |mut request: tonic::codegen::http::Request<tonic::body::Body>| {
            let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
            request.extensions_mut().insert(Authority(authority));
            request
        };
        let server = tonic::transport::Server::builder()
            .layer(tower::util::MapRequestLayer::new(note_authority))
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(server).abort_handle();
        Server { address, sotw, delta, task }
    }

    async fn sotw(&mut self) -> Session<DiscoveryRequest, DiscoveryResponse> {
        tokio::time::timeout(PATIENCE, self.sotw.recv()).await.expect("a stream within the time").expect("a server")
    }

    async fn delta(&mut self) -> Session<DeltaDiscoveryRequest, DeltaDiscoveryResponse> {
        tokio::time::timeout(PATIENCE, self.delta.recv()).await.expect("a stream within the time").expect("a server")
    }
}

/// Rejects resources called "bad", follows clusters with endpoints, and keeps notes.
#[derive(Clone, Default)]
struct Notes {
    log: Arc<Mutex<Vec<String>>>,
    /// Where the client is told what is wanted.
    interests: Arc<Mutex<Option<Interests>>>,
}

impl Notes {
    async fn wait_for(&self, line: &str) {
        let started = Instant::now();
        while !self.log.lock().unwrap().iter().any(|entry| entry == line) {
            assert!(started.elapsed() < PATIENCE, "{line:?} is not in {:?}", self.log.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Sink for Notes {
    fn update(&self, _: &Source, update: Update, done: Done) {
        let names: Vec<String> = update.added.iter().map(|resource| resource.name.clone()).collect();
        let kind = update.type_url.rsplit('.').next().unwrap();
        self.log.lock().unwrap().push(format!("{kind} +{} -{}", names.join(","), update.removed.join(",")));
        let (bad, good): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| name == "bad");
        if update.type_url == CLUSTER
            && let Some(interests) = self.interests.lock().unwrap().as_ref()
        {
            interests.set(ENDPOINT, Interest::Names(good.into_iter().collect()));
        }
        let message = "connect_timeout: no".to_owned();
        let rejected = bad.into_iter().map(|name| Rejection { name, message: message.clone() }).collect();
        done.finish(Outcome { rejected });
    }

    fn failed(&self, _: &Source, type_url: Option<&str>) {
        self.log.lock().unwrap().push(format!("failed {type_url:?}"));
    }

    fn state(&self, _: &Source, connected: bool) {
        self.log.lock().unwrap().push(format!("connected {connected}"));
    }
}

fn config(variant: Variant, endpoints: &[SocketAddr]) -> ClientConfig {
    ClientConfig {
        source: Source::Ads,
        server: crate::source::Server {
            connect_timeout: Duration::from_secs(1),
            ..crate::source::Server::plain(endpoints.iter().map(ToString::to_string).collect())
        },
        grpc: GrpcSource {
            service: GrpcService {
                target: Target::Cluster("xds".to_owned()),
                authority: "xds_cluster".to_owned(),
                initial_metadata: Vec::new(),
                max_receive_message_length: None,
                backoff: None,
            },
            variant,
            set_node_on_first_message_only: true,
            rate_limit: None,
        },
        node: Node { id: "node-1".to_owned(), ..Default::default() },
        only: None,
    }
}

/// A client that wants all clusters, and the endpoints of all good ones.
fn client(variant: Variant, endpoints: &[SocketAddr], notes: &Notes) -> Client<Notes> {
    let client = Client::new(config(variant, endpoints), Arc::new(notes.clone()));
    client.interests().set(CLUSTER, Interest::Wildcard);
    *notes.interests.lock().unwrap() = Some(client.interests());
    client
}

fn clusters(version: &str, nonce: &str, names: &[&str]) -> DiscoveryResponse {
    let resource = |name: &&str| {
        let (name, alt_stat_name) = ((*name).to_owned(), version.to_owned());
        pack(&Cluster { name, alt_stat_name, ..Default::default() })
    };
    DiscoveryResponse {
        version_info: version.to_owned(),
        type_url: CLUSTER.to_owned(),
        nonce: nonce.to_owned(),
        resources: names.iter().map(resource).collect(),
        ..Default::default()
    }
}

#[tokio::test]
async fn sotw_over_grpc() {
    let mut server = Server::start("127.0.0.1:0").await;
    let notes = Notes::default();
    let client = client(Variant::Sotw, &[server.address], &notes);
    let stats = client.stats();
    let client = tokio::spawn(client.run());

    let mut session = server.sotw().await;
    assert_eq!(session.authority.as_deref(), Some("xds_cluster"));
    let first = session.request().await;
    assert_eq!((first.type_url.as_str(), first.node.unwrap().id.as_str()), (CLUSTER, "node-1"));
    session.send(clusters("1", "a", &["x"]));
    let endpoints = session.request().await;
    assert_eq!((endpoints.type_url.as_str(), endpoints.resource_names), (ENDPOINT, vec!["x".to_owned()]));
    let ack = session.request().await;
    assert_eq!((ack.version_info.as_str(), ack.response_nonce.as_str(), ack.error_detail), ("1", "a", None));
    session.send(clusters("2", "b", &["x", "bad"]));
    let nack = session.request().await;
    assert_eq!((nack.version_info.as_str(), nack.response_nonce.as_str()), ("1", "b"));
    assert_eq!(nack.error_detail.unwrap().message, "bad: connect_timeout: no");

    assert!(stats.connected());
    assert_eq!(stats.connection().error, None);
    let cds = stats.of(CLUSTER);
    let counts = [&cds.update_attempt, &cds.update_success, &cds.update_rejected, &cds.update_failure];
    assert_eq!(counts.map(|counter| counter.load(Relaxed)), [2, 1, 1, 0]);
    client.abort();
}

/// Waits until a NACK is held, or none is.
async fn nack(stats: &ClientStats, there: bool) -> Option<crate::stats::Nack> {
    let (counts, started) = (stats.of(CLUSTER), Instant::now());
    while counts.nack().is_some() != there {
        assert!(started.elapsed() < PATIENCE, "{:?}", counts.nack());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    counts.nack()
}

#[tokio::test]
async fn a_nack_of_the_response_itself_is_held_until_one_is_accepted() {
    let mut server = Server::start("127.0.0.1:0").await;
    let client = client(Variant::Sotw, &[server.address], &Notes::default());
    let stats = client.stats();
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    session.request().await;
    let faulty = [&["x", "x"][..], &["x", ""]];
    for (version, names) in ["1", "2"].into_iter().zip(faulty) {
        session.send(clusters(version, version, names));
        let told = loop {
            let request = session.request().await;
            if let Some(error) = request.error_detail.filter(|_| request.response_nonce == version) {
                break error.message;
            }
        };
        let held = nack(&stats, true).await.unwrap();
        assert_eq!((held.version.as_str(), &held.fault.details), (version, &told));
        assert!(told.contains("resources[1]"), "{told}");
    }
    // What was handed out and refused is shown with the resource, and yet the response before it was not mended.
    session.send(clusters("3", "3", &["x", "bad"]));
    while session.request().await.response_nonce != "3" {}
    assert_eq!(nack(&stats, true).await.unwrap().version, "2");
    session.send(clusters("4", "4", &["x"]));
    nack(&stats, false).await;
    session.send(clusters("5", "5", &["x", "bad"]));
    while session.request().await.response_nonce != "5" {}
    assert_eq!(stats.of(CLUSTER).nack(), None);
    client.abort();
}

#[tokio::test]
async fn incremental_nacks_are_held_as_well() {
    let mut server = Server::start("127.0.0.1:0").await;
    let client = client(Variant::Delta, &[server.address], &Notes::default());
    let (stats, interests) = (client.stats(), client.interests());
    let client = tokio::spawn(client.run());
    let mut session = server.delta().await;
    session.request().await;
    let wrapped = |name: &str| Wrapper {
        name: name.to_owned(),
        version: "7".to_owned(),
        resource: Some(pack(&Cluster { name: name.to_owned(), ..Default::default() })),
        ..Default::default()
    };
    for (names, there) in [(&["x", "x"][..], true), (&["x"], false), (&[""], true)] {
        session.send(DeltaDiscoveryResponse {
            system_version_info: "s".to_owned(),
            type_url: CLUSTER.to_owned(),
            nonce: "n".to_owned(),
            resources: names.iter().copied().map(wrapped).collect(),
            ..Default::default()
        });
        assert_eq!(nack(&stats, there).await.map(|nack| nack.version), there.then(|| "s".to_owned()));
    }
    interests.set(CLUSTER, Interest::None);
    nack(&stats, false).await;
    client.abort();
}

#[tokio::test]
async fn delta_over_grpc() {
    let mut server = Server::start("127.0.0.1:0").await;
    let notes = Notes::default();
    let client = client(Variant::Delta, &[server.address], &notes);
    let interests = client.interests();
    let client = tokio::spawn(client.run());

    let mut session = server.delta().await;
    assert_eq!(session.request().await.type_url, CLUSTER);
    let cluster = Cluster { name: "x".to_owned(), ..Default::default() };
    session.send(DeltaDiscoveryResponse {
        type_url: CLUSTER.to_owned(),
        nonce: "a".to_owned(),
        resources: vec![Wrapper {
            name: "x".to_owned(),
            version: "7".to_owned(),
            resource: Some(pack(&cluster)),
            ..Default::default()
        }],
        ..Default::default()
    });
    assert_eq!(session.request().await.resource_names_subscribe, ["x"]);
    assert_eq!(session.request().await.response_nonce, "a");
    interests.set("type.googleapis.com/x.Y", Interest::Names(["z".to_owned()].into()));
    let other = session.request().await;
    assert_eq!(
        (other.type_url.as_str(), other.resource_names_subscribe),
        ("type.googleapis.com/x.Y", vec!["z".to_owned()])
    );
    interests.set_names("type.googleapis.com/x.Y", vec![("y".to_owned(), true), ("z".to_owned(), false)]);
    let other = session.request().await;
    assert_eq!(
        (other.resource_names_subscribe, other.resource_names_unsubscribe),
        (vec!["y".to_owned()], vec!["z".to_owned()])
    );
    notes.wait_for("Cluster +x -").await;
    drop(session);
    let mut session = server.delta().await;
    assert_eq!(session.request().await.initial_resource_versions, [("x".to_owned(), "7".to_owned())].into());
    client.abort();
}

#[tokio::test]
async fn a_restarted_server_is_found_soon_and_told_the_versions_in_force() {
    let mut server = Server::start("127.0.0.1:0").await;
    let notes = Notes::default();
    let client = client(Variant::Sotw, &[server.address], &notes);
    let stats = client.stats();
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    session.request().await;
    session.send(clusters("1", "a", &["x"]));
    session.request().await;
    let address = server.address.to_string();
    drop(session);
    server.task.abort();
    drop(server);
    notes.wait_for("connected false").await;
    notes.wait_for("failed None").await;
    assert!(!stats.connected());
    assert!(stats.connection().error.is_some());

    let mut server = Server::start(&address).await;
    let started = Instant::now();
    let mut session = server.sotw().await;
    assert!(started.elapsed() < Duration::from_secs(5), "found only after {:?}", started.elapsed());
    let first = session.request().await;
    assert_eq!((first.version_info.as_str(), first.response_nonce.as_str()), ("1", ""));
    assert!(first.node.is_some(), "a new stream does not know the node");
    assert!(stats.of(CLUSTER).update_failure.load(Relaxed) >= 1);
    client.abort();
}

/// Drops the first update, and takes the others.
#[derive(Default)]
struct Dropping(Mutex<usize>);

impl Sink for Dropping {
    fn update(&self, _: &Source, _: Update, done: Done) {
        let mut updates = self.0.lock().unwrap();
        *updates += 1;
        if *updates > 1 {
            done.finish(Outcome::default());
        }
    }
}

#[tokio::test]
async fn a_response_that_is_never_applied_is_not_answered_and_does_not_hold_back_requests() {
    let mut server = Server::start("127.0.0.1:0").await;
    let client = Client::new(config(Variant::Sotw, &[server.address]), Arc::new(Dropping::default()));
    let interests = client.interests();
    interests.set(CLUSTER, Interest::Wildcard);
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    session.request().await;
    session.send(clusters("1", "a", &["x"]));
    // As long as it counted as being applied, this would wait for its answer.
    interests.set(CLUSTER, Interest::WildcardAnd(["y".to_owned()].into()));
    let changed = session.request().await;
    assert_eq!((changed.version_info.as_str(), changed.response_nonce.as_str()), ("", ""));
    interests.set(CLUSTER, Interest::WildcardAnd(["y".to_owned(), "z".to_owned()].into()));
    assert_eq!(session.request().await.resource_names.len(), 3);
    // It is sent anew, and then it is not what is there already.
    session.send(clusters("1", "b", &["x"]));
    let ack = session.request().await;
    assert_eq!((ack.version_info.as_str(), ack.response_nonce.as_str()), ("1", "b"));
    client.abort();
}

#[tokio::test]
async fn the_next_address_is_tried_when_one_does_not_answer() {
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut server = Server::start("127.0.0.1:0").await;
    let client = tokio::spawn(client(Variant::Sotw, &[gone, server.address], &Notes::default()).run());
    assert_eq!(server.sotw().await.request().await.type_url, CLUSTER);
    client.abort();
}

#[tokio::test]
async fn a_response_beyond_the_limit_ends_the_stream_and_changes_nothing() {
    let mut server = Server::start("127.0.0.1:0").await;
    let notes = Notes::default();
    let client = client(Variant::Sotw, &[server.address], &notes);
    let stats = client.stats();
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    session.request().await;
    session.send(clusters("1", "a", &["x"]));
    session.request().await;
    let name = "y".repeat(MAX_RESPONSE_BYTES);
    session.send(clusters("2", "b", &[&name]));
    let mut session = server.sotw().await;
    assert_eq!(session.request().await.version_info, "1");
    // The stream is there again, and not trusted before the endpoints have been answered as well.
    let told = stats.connection().error.unwrap();
    assert!(told.contains("67108864") && told.ends_with(": it is of ClusterLoadAssignment"), "{told}");
    assert!(!stats.connection().is_well());
    let mut asked = session.request().await;
    while asked.type_url != ENDPOINT {
        asked = session.request().await;
    }
    session.send(clusters("2", "b", &["x"]));
    while session.request().await.response_nonce != "b" {}
    assert_eq!(stats.connection().error, Some(told));
    let (type_url, nonce) = (ENDPOINT.to_owned(), "e".to_owned());
    session.send(DiscoveryResponse { type_url, nonce, ..Default::default() });
    while session.request().await.response_nonce != "e" {}
    assert!(stats.connection().is_well());
    let updates = notes.log.lock().unwrap().iter().filter(|entry| entry.starts_with("Cluster +")).count();
    assert_eq!(updates, 2);
    client.abort();
}

/// Has `limited` pushed to more often than it can answer; no more is taken than may wait, and the end of the stream is noticed.
async fn push_to(limited: ClientConfig, mut server: Server, reads: usize) {
    let notes = Notes::default();
    let client = Client::new(limited, Arc::new(notes.clone()));
    let (stats, interests) = (client.stats(), client.interests());
    // What each request of clusters says.
    let names = (0..1000).map(|i| format!("{i:0>300}")).collect();
    interests.set(CLUSTER, Interest::WildcardAnd(names));
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    for _ in 0..reads {
        session.request().await;
    }
    for i in 0..300 {
        session.send(clusters(&i.to_string(), &i.to_string(), &["x"]));
    }
    let wait = async |holds: &dyn Fn() -> bool| {
        let started = Instant::now();
        while !holds() {
            assert!(started.elapsed() < PATIENCE, "{} wait", stats.pending_requests.load(Relaxed));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    wait(&|| stats.pending_requests.load(Relaxed) >= MAX_UNSENT as u64).await;
    // It would have read on meanwhile.
    for i in 0..20 {
        let type_url = format!("type.googleapis.com/x.Y{i}");
        interests.set(&type_url, Interest::Wildcard);
        wait(&|| stats.types().iter().any(|(known, _)| *known == type_url)).await;
    }
    let taken = notes.log.lock().unwrap().iter().filter(|entry| entry.starts_with("Cluster")).count();
    assert!((MAX_UNSENT..MAX_UNSENT + 10).contains(&taken), "{taken} responses were taken");
    server.task.abort();
    drop((session, server));
    notes.wait_for("connected false").await;
    client.abort();
}

#[tokio::test]
async fn a_server_that_does_not_read_is_not_read_from_without_end() {
    let server = Server::start("127.0.0.1:0").await;
    push_to(config(Variant::Sotw, &[server.address]), server, 1).await;
}

#[tokio::test]
async fn what_the_rate_limit_holds_back_is_bounded() {
    let server = Server::start("127.0.0.1:0").await;
    let mut config = config(Variant::Sotw, &[server.address]);
    config.grpc.rate_limit = Some(RateLimit { max_tokens: 1, fill_interval: Duration::from_secs(1000) });
    push_to(config, server, 1).await;
}

#[tokio::test]
async fn requests_of_a_client_without_interests_wait_for_one() {
    let mut server = Server::start("127.0.0.1:0").await;
    let client = Client::new(config(Variant::Sotw, &[server.address]), Arc::new(Notes::default()));
    let interests = client.interests();
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    interests.set(CLUSTER, Interest::Wildcard);
    assert_eq!(session.request().await.type_url, CLUSTER);
    client.abort();
}

/// Notes down what a cluster would count.
#[derive(Debug, Default)]
struct Counts(Mutex<Vec<&'static str>>);

impl Counts {
    async fn wait_for(&self, expected: &[&str]) {
        let started = Instant::now();
        while *self.0.lock().unwrap() != expected {
            assert!(started.elapsed() < PATIENCE, "{expected:?}: {:?}", self.0.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.0.lock().unwrap().clear();
    }
}

impl crate::source::Usage for Counts {
    fn connecting(&self, http2: bool) {
        self.0.lock().unwrap().push(if http2 { "connecting" } else { "connecting without HTTP/2" });
    }

    fn connected(&self, _: Duration) {
        self.0.lock().unwrap().push("connected");
    }

    fn failed(&self, timed_out: bool) {
        self.0.lock().unwrap().push(if timed_out { "timeout" } else { "failed" });
    }

    fn closed(&self, _: Duration) {
        self.0.lock().unwrap().push("closed");
    }

    fn request(&self) {
        self.0.lock().unwrap().push("request");
    }

    fn request_ended(&self) {
        self.0.lock().unwrap().push("request ended");
    }
}

#[tokio::test]
async fn connections_and_streams_are_told_to_who_counts_them() {
    let mut server = Server::start("127.0.0.1:0").await;
    let dead = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let counts = Arc::new(Counts::default());
    let mut config = config(Variant::Sotw, &[dead, server.address]);
    config.server.usage = Some(Arc::clone(&counts) as _);
    let client = Client::new(config, Arc::new(Notes::default()));
    client.interests().set(CLUSTER, Interest::Wildcard);
    let client = tokio::spawn(client.run());
    let mut session = server.sotw().await;
    session.request().await;
    counts.wait_for(&["connecting", "failed", "closed", "connecting", "connected", "request"]).await;
    client.abort();
    assert!(client.await.unwrap_err().is_cancelled());
    counts.wait_for(&["request ended", "closed"]).await;
}
