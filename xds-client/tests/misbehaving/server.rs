//! A server that can do anything that HTTP/2 lets it, and a client to do it to.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use bytes::Bytes;
use culvert_xds_client::{
    ads::{Done, Interest, Outcome, Sink, Update, Variant, type_url::CLUSTER},
    json,
    source::{BackoffLimits, GrpcService, GrpcSource, Server as Address, Source, Target},
    sources::{self, Subscriptions},
    stats::SourceStats,
};
use envoy_types::pb::envoy::{
    config::{cluster::v3::Cluster, core::v3::Node},
    service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
};
use h2::{
    Reason, RecvStream, SendStream,
    server::{Connection, SendResponse},
};
use prost::Message;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it happens in time")
}

/// A message as gRPC frames it.
pub fn frame(flag: u8, message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[flag], length.as_slice(), message].concat()
}

/// A response with one cluster.
pub fn response(version: &str, nonce: &str, cluster: &str) -> Vec<u8> {
    let cluster = Cluster { name: cluster.to_owned(), ..Default::default() };
    let response = DiscoveryResponse {
        version_info: version.to_owned(),
        nonce: nonce.to_owned(),
        type_url: CLUSTER.to_owned(),
        resources: vec![json::pack(&cluster)],
        ..Default::default()
    };
    response.encode_to_vec()
}

/// A port.
pub struct Server {
    listener: TcpListener,
    address: String,
}

/// What is done to a connection besides.
enum Order {
    Drain,
    GoAway(Reason),
}

/// A stream that the client has opened. Dropping it closes the connection.
pub struct Session {
    requests: RecvStream,
    received: Vec<u8>,
    responses: SendStream<Bytes>,
    orders: mpsc::UnboundedSender<Order>,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        Server { listener, address }
    }

    /// The next connection.
    pub async fn accept(&mut self) -> TcpStream {
        soon(self.listener.accept()).await.unwrap().0
    }

    async fn call(&mut self) -> (Connection<TcpStream, Bytes>, http::Request<RecvStream>, SendResponse<Bytes>) {
        // The client may give a connection up that it was promised before.
        loop {
            let Ok(mut connection) = h2::server::handshake(self.accept().await).await else { continue };
            if let Some(Ok((request, respond))) = soon(connection.accept()).await {
                return (connection, request, respond);
            }
        }
    }

    /// The next stream that the client opens; it has the headers of an answer.
    pub async fn session(&mut self) -> Session {
        let (mut connection, request, mut respond) = self.call().await;
        let headers = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let responses = respond.send_response(headers, false).unwrap();
        let (orders, mut ordered) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                tokio::select! {
                    next = connection.accept() => if !matches!(next, Some(Ok(_))) { return },
                    Some(order) = ordered.recv() => match order {
                        Order::Drain => connection.graceful_shutdown(),
                        Order::GoAway(reason) => connection.abrupt_shutdown(reason),
                    },
                }
            }
        });
        Session { requests: request.into_body(), received: Vec::new(), responses, orders, task }
    }

    /// Answers the next call with headers alone, and closes the connection when the client has them.
    pub async fn answer(&mut self, status: u16, headers: &[(&str, &str)]) {
        let (mut connection, _request, mut respond) = self.call().await;
        let mut answer = http::Response::builder().status(status);
        for (name, value) in headers {
            answer = answer.header(*name, *value);
        }
        respond.send_response(answer.body(()).unwrap(), true).unwrap();
        connection.graceful_shutdown();
        while let Some(Ok(_)) = soon(connection.accept()).await {}
    }

    /// Takes a call and says nothing, until that is dropped.
    pub async fn silent(&mut self) -> impl Sized + use<> {
        self.call().await
    }
}

impl Session {
    /// The next request.
    pub async fn request(&mut self) -> DiscoveryRequest {
        loop {
            if let Some((head, rest)) = self.received.split_at_checked(5) {
                let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
                if let Some(message) = rest.get(..length) {
                    let request = DiscoveryRequest::decode(message).unwrap();
                    self.received.drain(..5 + length);
                    return request;
                }
            }
            let data = soon(self.requests.data()).await.expect("the stream goes on").expect("no error");
            self.requests.flow_control().release_capacity(data.len()).unwrap();
            self.received.extend(data);
        }
    }

    /// Sends bytes, when the client is ready to take them.
    pub async fn send(&mut self, bytes: &[u8], end: bool) {
        self.responses.send_data(Bytes::copy_from_slice(bytes), end).unwrap();
        // Each call has a frame of its own.
        tokio::task::yield_now().await;
    }

    /// Sends a cluster.
    pub async fn push(&mut self, version: &str, nonce: &str, cluster: &str) {
        self.send(&frame(0, &response(version, nonce, cluster)), false).await;
    }

    /// Sends an empty response of any type.
    pub async fn push_type(&mut self, type_url: &str, version: &str, nonce: &str) {
        let (version_info, nonce, type_url) = (version.to_owned(), nonce.to_owned(), type_url.to_owned());
        let response = DiscoveryResponse { version_info, nonce, type_url, ..Default::default() };
        self.send(&frame(0, &response.encode_to_vec()), false).await;
    }

    /// Ends the stream with a status of gRPC.
    pub fn trailers(&mut self, status: &str) {
        let mut trailers = http::HeaderMap::new();
        trailers.insert("grpc-status", status.parse().unwrap());
        self.responses.send_trailers(trailers).unwrap();
    }

    pub fn reset(&mut self, reason: Reason) {
        self.responses.send_reset(reason);
    }

    /// No new streams, please.
    pub fn drain(&self) {
        self.orders.send(Order::Drain).unwrap();
    }

    pub fn go_away(&self, reason: Reason) {
        self.orders.send(Order::GoAway(reason)).unwrap();
    }

    /// Waits until the client has reset the stream, or closed the connection.
    pub async fn gives_up(&mut self) {
        // Whatever it is.
        let _ = soon(std::future::poll_fn(|cx| self.responses.poll_reset(cx))).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // What was sent is on its way first: the connection ends when the client has had it, or here.
        let (orders, mut task) = (self.orders.clone(), std::mem::replace(&mut self.task, tokio::spawn(async {})));
        tokio::spawn(async move {
            let _ = orders.send(Order::Drain);
            if tokio::time::timeout(Duration::from_millis(200), &mut task).await.is_err() {
                task.abort();
            }
        });
    }
}

/// What the client hands out, a line an update.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Sink for Notes {
    fn update(&self, _: &Source, update: Update, done: Done) {
        let names: Vec<String> = update.added.iter().map(|resource| resource.name.clone()).collect();
        // What is in force already changes nothing.
        if !names.is_empty() || !update.removed.is_empty() {
            self.0.lock().unwrap().push(format!("+{} -{}", names.join(","), update.removed.join(",")));
        }
        done.finish(Outcome::default());
    }

    fn state(&self, _: &Source, _: bool) {}
}

/// A client that wants all clusters of the aggregated stream.
pub struct Client {
    notes: Arc<Notes>,
    stats: Arc<SourceStats>,
    task: JoinHandle<std::convert::Infallible>,
    subscriptions: Subscriptions,
}

impl Client {
    pub fn start(server: &Server, backoff: Option<BackoffLimits>) -> Client {
        let service = GrpcService {
            target: Target::Cluster("xds".to_owned()),
            authority: "xds".to_owned(),
            initial_metadata: Vec::new(),
            max_receive_message_length: None,
            backoff,
        };
        let ads =
            GrpcSource { service, variant: Variant::Sotw, set_node_on_first_message_only: true, rate_limit: None };
        let config = sources::Config {
            node: Node { id: "node".to_owned(), ..Default::default() },
            servers: BTreeMap::from([("xds".to_owned(), Address::plain(vec![server.address.clone()]))]),
            ads: Some(ads),
            ..Default::default()
        };
        let (notes, stats) = (Arc::new(Notes::default()), Arc::new(SourceStats::default()));
        let (subscriptions, wanted) = Subscriptions::channel();
        subscriptions.set(Source::Ads, CLUSTER, Interest::Wildcard);
        let task = tokio::spawn(sources::run(config, Arc::clone(&notes), wanted, Arc::clone(&stats)));
        Client { notes, stats, task, subscriptions }
    }

    /// What was handed out so far.
    pub fn updates(&self) -> Vec<String> {
        self.notes.0.lock().unwrap().clone()
    }

    /// Waits until as much was handed out; it must be this.
    pub async fn expect(&self, expected: &[&str]) {
        let started = Instant::now();
        while self.updates().len() < expected.len() {
            assert!(started.elapsed() < PATIENCE, "{:?} instead of {expected:?}", self.updates());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(self.updates(), expected);
    }

    /// Wants a type besides.
    pub fn wants(&self, type_url: &str) {
        self.subscriptions.set(Source::Ads, type_url, Interest::Wildcard);
    }

    /// How it stands with its server.
    pub fn connection(&self) -> culvert_xds_client::stats::Connection {
        self.stats.clients().remove(0).2.connection()
    }

    /// Waits until the reason why there is no stream begins so.
    pub async fn is_told(&self, said: &str) {
        let started = Instant::now();
        while !self.connection().error.is_some_and(|why| why.starts_with(said)) {
            assert!(started.elapsed() < PATIENCE, "{:?}", self.connection());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// `update_failure`
    pub fn failures(&self) -> u64 {
        self.stats.of(&Source::Ads, CLUSTER).map_or(0, |stats| stats.update_failure.load(Relaxed))
    }

    pub fn is_running(&self) {
        assert!(!self.task.is_finished(), "the client has ended");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}
