//! Drives the xDS client over gRPC: connects, reconnects, and passes messages between the server and
//! [`Core`](crate::ads::Core).

mod backoff;
mod dial;
mod rate_limit;
mod stream;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::time::Instant;

use self::backoff::Backoff;
pub use self::dial::{DialError, Dialer};
use self::rate_limit::Bucket;
pub use self::stream::MAX_RESPONSE_BYTES;
use self::stream::{Lost, Requests, Unanswered};
use crate::ads::{Request, Sink, Variant};
use crate::connect::Heard;
use crate::driver::Driver;
pub use crate::driver::Interests;
use crate::resource_type::ResourceType;
use crate::source::{GrpcSource, Server, Source};
use crate::stats::ClientStats;

/// Where the control plane is, and how to talk to it.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// What the sink is told that updates come from.
    pub source: Source,
    /// The server.
    pub server: Server,
    /// How it is spoken to.
    pub grpc: GrpcSource,
    /// Who is asking.
    pub node: Node,
    /// What is asked for, by the type's own service; `None`: any types, by the aggregated service.
    pub only: Option<&'static ResourceType>,
}

impl ClientConfig {
    /// The method that is called; `None` where the type has none of that variant.
    pub fn method(&self) -> Option<&'static str> {
        match (self.only, self.grpc.variant) {
            (Some(only), Variant::Sotw) => only.sotw,
            (Some(only), Variant::Delta) => Some(only.delta),
            (None, Variant::Sotw) => {
                Some("/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources")
            }
            (None, Variant::Delta) => {
                Some("/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources")
            }
        }
    }
}

/// How many answers may wait until the server, or the rate limit, takes them: then no more responses are read.
const MAX_UNSENT: usize = 32;

/// A stream that has been answered for so long is well, whatever it has not been answered.
const WELL_AFTER: Duration = Duration::from_secs(60);
/// How long a server may be silent before the log says so.
const SILENCE: Duration = Duration::from_secs(10);

/// How one stream goes.
#[derive(Debug, Default)]
struct Course {
    /// What the server said first.
    heard: Arc<Heard>,
    /// The server has accepted the call.
    began: bool,
    /// When a response was taken first.
    answered: Option<Instant>,
}

/// Whether a stream is taken to work before it has shown that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doubt {
    /// It is, as soon as it is there.
    None,
    /// Earlier ones broke before all that was asked for had been answered: when it has been.
    UntilAnswered,
    /// All was answered, and then came what could not be taken: when it lasts.
    UntilItLasts,
}

/// A client that is ready to run.
pub struct Client<S> {
    config: ClientConfig,
    driver: Driver<S>,
    /// What limits requests.
    bucket: Option<Bucket>,
    /// The next requests, one as a rule: others are made when they can be sent.
    queue: VecDeque<Request>,
    doubt: Doubt,
}

impl<S: Sink> Client<S> {
    /// A client that is not connected yet, and wants nothing.
    pub fn new(config: ClientConfig, sink: Arc<S>) -> Self {
        let driver = Driver::new(config.source.clone(), config.node.clone(), config.grpc.variant, sink);
        let transport = match config.grpc.variant {
            Variant::Sotw => "GRPC",
            Variant::Delta => "DELTA_GRPC",
        };
        driver.stats.set_server(transport, config.grpc.service.target.shown());
        let bucket = config.grpc.rate_limit.map(Bucket::new);
        Client { config, driver, bucket, queue: VecDeque::new(), doubt: Doubt::None }
    }

    /// Its counters, which stay up to date.
    pub fn stats(&self) -> Arc<ClientStats> {
        Arc::clone(&self.driver.stats)
    }

    /// Changes what is wanted, before the client runs and while it does.
    pub fn interests(&self) -> Interests {
        self.driver.interests()
    }

    /// Keeps a stream to the control plane, for ever.
    ///
    /// A lost stream is opened again after a jittered wait of at most 500 ms, which doubles up to 30 s as long as no stream
    /// is well: has been answered all that it asked for, or lasts. The other addresses are tried before that wait.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = Backoff::new(self.config.grpc.service.backoff);
        let mut next = 0;
        // Streams in a row that began and were not well.
        let mut broken = 0_u32;
        let Some(method) = self.config.method() else {
            let only = self.config.only.map(|only| only.type_url);
            let text = "there is no state-of-the-world service for this type: use DELTA_GRPC";
            tracing::error!(?only, "{text}");
            self.driver.stats.set_connected(Err(text.to_owned()));
            return std::future::pending().await;
        };
        loop {
            let Some(address) = self.config.server.endpoints.get(next).cloned() else {
                tracing::error!("the control plane has no address: configuration stays as it is");
                self.driver.stats.set_connected(Err("the control plane has no address".to_owned()));
                return std::future::pending().await;
            };
            let mut course = Course::default();
            let Err(lost) = self.stream(&address, method, &mut course).await;
            let answered = self.driver.core.is_answered();
            let lost = lost.explained(&course.heard, self.config.server.tls.is_some(), self.unanswered());
            // What is not taken comes again at once, however well all else was answered.
            let lasted = course.answered.is_some_and(|since| since.elapsed() >= WELL_AFTER);
            let well = lasted || course.answered.is_some() && answered && !lost.is_refusal();
            self.driver.core.disconnected();
            self.queue.clear();
            self.driver.stats.pending_requests.store(0, Relaxed);
            self.driver.stats.failed();
            self.driver.sink.failed(&self.config.source, self.config.only.map(|only| only.type_url));
            let was_connected = self.driver.stats.connected();
            self.driver.stats.set_connected(Err(lost.to_string()));
            if was_connected {
                self.driver.sink.state(&self.config.source, false);
            }
            if well {
                backoff.reset();
                (self.doubt, broken) = (Doubt::None, 0);
            } else {
                next = (next + 1) % self.config.server.endpoints.len();
                broken += u32::from(course.began);
            }
            if !well && course.began && (lost.is_refusal() || broken > 1) {
                self.doubt = if answered { Doubt::UntilItLasts } else { Doubt::UntilAnswered };
            }
            let wait = if well || next == 0 { backoff.next() } else { Duration::ZERO };
            tracing::warn!(%address, retry_in = ?wait, "{lost}; configuration in force stays");
            let mut wait = pin!(tokio::time::sleep(wait));
            // What is good for some time only ends without a stream as well, and updates are finished.
            loop {
                tokio::select! {
                    () = &mut wait => break,
                    event = self.driver.next() => drop(self.driver.event(event)),
                }
            }
        }
    }

    /// The types of which a response may be that was not read.
    fn unanswered(&self) -> Unanswered {
        let named =
            |all: Vec<&str>| all.iter().map(|url| url.rsplit(['.', '/']).next().unwrap_or(url).to_owned()).collect();
        let asked: Vec<_> = self.driver.core.asked().collect();
        let missing: Vec<_> = asked.iter().filter(|(_, answered)| !answered).map(|(type_url, _)| *type_url).collect();
        if missing.is_empty() {
            return Unanswered {
                types: named(asked.into_iter().map(|(type_url, _)| type_url).collect()),
                none_yet: false,
            };
        }
        Unanswered { types: named(missing), none_yet: true }
    }

    /// The stream works: it is not doubted any more.
    fn is_well(&mut self) {
        self.doubt = Doubt::None;
        self.driver.stats.set_connected(Ok(()));
    }

    /// Runs one stream until it is lost.
    async fn stream(&mut self, address: &str, method: &'static str, course: &mut Course) -> Result<Infallible, Lost> {
        let service = &self.config.grpc.service;
        let channel = {
            let mut connecting =
                pin!(stream::connect(&self.config.server, address, &service.authority, Arc::clone(&course.heard)));
            // What is wanted is known by then, and what is good for some time only does not outlive it.
            loop {
                tokio::select! {
                    biased;
                    event = self.driver.next() => drop(self.driver.event(event)),
                    channel = &mut connecting => break channel?,
                }
            }
        };
        let _under_way = self.config.server.request();
        let (requests, responses) = stream::call(channel, service, self.config.grpc.variant, method);
        self.driver.core.connected();
        self.send(&requests);

        // Why the last attempt failed is told until it is known that this one is not going to in the same way.
        if self.driver.stats.connection().error.is_none() {
            self.driver.stats.set_connected(Err(SILENT.to_owned()));
        }
        let (mut responses, mut silence) = (pin!(responses), pin!(tokio::time::sleep(SILENCE)));
        let mut said = false;
        let mut responses = loop {
            tokio::select! {
                () = &mut silence, if !said => {
                    said = true;
                    if self.doubt == Doubt::None {
                        self.driver.stats.set_connected(Err(SILENT.to_owned()));
                    }
                    tracing::warn!(%address, method, "{SILENT}; configuration in force stays");
                }
                responses = &mut responses => break responses?,
                event = self.driver.next() => drop(self.driver.event(event)),
                () = sendable(&requests, self.bucket.as_ref(), &self.queue) => {}
            }
            self.send(&requests);
        };
        tracing::info!(%address, method, "connected to the control plane");
        course.began = true;
        match self.doubt {
            Doubt::None => self.driver.stats.set_connected(Ok(())),
            _ => self.driver.stats.set_open(),
        }
        self.driver.sink.state(&self.config.source, true);
        loop {
            let lasts = course.answered.filter(|_| self.doubt != Doubt::None).map(|since| since + WELL_AFTER);
            // A stream that is gone says so to those who read.
            let reads = self.unsent() < MAX_UNSENT || requests.is_closed();
            tokio::select! {
                biased;
                // First, for answers are counted when they are made.
                event = self.driver.next() => drop(self.driver.event(event)),
                () = sendable(&requests, self.bucket.as_ref(), &self.queue) => {}
                () = requests.closed(), if !reads => {}
                () = at(lasts) => self.is_well(),
                response = responses.next(), if reads => if self.driver.take(response?).is_some() {
                    course.answered.get_or_insert_with(Instant::now);
                    if self.doubt == Doubt::UntilAnswered && self.driver.core.is_answered() {
                        self.is_well();
                    }
                },
            }
            self.send(&requests);
        }
    }

    /// How many requests wait.
    fn unsent(&self) -> usize {
        self.queue.len() + self.driver.core.unsent_answers()
    }

    /// The next requests are in the queue; `false`: there are none.
    fn fill_queue(&mut self) -> bool {
        if !self.queue.is_empty() {
            return true;
        }
        for mut request in self.driver.core.outgoing_some(1) {
            if !self.config.grpc.set_node_on_first_message_only {
                let node = match &mut request {
                    Request::Sotw(request) => &mut request.node,
                    Request::Delta(request) => &mut request.node,
                };
                node.get_or_insert_with(|| self.config.node.clone());
            }
            self.queue.push_back(request);
        }
        !self.queue.is_empty()
    }

    /// Sends what is to be said, as far as the server and the rate limit take it.
    fn send(&mut self, requests: &Requests) {
        while self.fill_queue() && requests.has_room() {
            if !self.bucket.as_mut().is_none_or(Bucket::take) {
                self.driver.stats.rate_limit_enforced.fetch_add(1, Relaxed);
                break;
            }
            if let Some(request) = self.queue.pop_front() {
                requests.send(request);
            }
        }
        self.driver.stats.pending_requests.store(self.unsent() as u64, Relaxed);
    }
}

/// What is said of a server that has taken the connection, and no more.
const SILENT: &str = "connected, but nothing has been answered yet";

/// Waits until then; without end where there is no such time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Waits until a request that waits may be sent.
async fn sendable(requests: &Requests, bucket: Option<&Bucket>, queue: &VecDeque<Request>) {
    if queue.is_empty() {
        return std::future::pending().await;
    }
    match bucket {
        // The rate limit is what it waits for.
        Some(bucket) if requests.has_room() => tokio::time::sleep_until(bucket.next()).await,
        _ => requests.room().await,
    }
}

#[cfg(test)]
mod tests;
