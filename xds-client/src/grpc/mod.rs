//! Drives the xDS client over gRPC: connects, reconnects, and passes messages between the server and [`Core`].

mod backoff;
mod dial;
mod stats;
mod stream;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::sync::mpsc;

use self::backoff::Backoff;
pub use self::dial::{DialError, Dialer};
pub use self::stats::{AdsStats, TypeStats};
pub use self::stream::MAX_RESPONSE_BYTES;
use self::stream::{Lost, Requests};
use crate::ads::{Core, Done, Handled, Interest, Outcome, Response, Sink, Token, Update};
use crate::source::{GrpcSource, Server, Source};

/// The longest that one attempt to connect may take where nothing else says so.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

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
}

/// A client that is ready to run.
pub struct Client<S> {
    config: ClientConfig,
    core: Core,
    sink: Arc<S>,
    stats: Arc<AdsStats>,
    /// One queue for both, so that what is wanted because of an update is asked for before the update is answered.
    events: mpsc::UnboundedReceiver<Event>,
    sender: mpsc::UnboundedSender<Event>,
}

enum Event {
    /// What is wanted of a type.
    Want(String, Interest),
    /// An update of which the sink has said what became, or that it will never be applied.
    Applied { token: Token, type_url: String, outcome: Option<Outcome> },
}

/// Changes what a client wants.
#[derive(Clone)]
pub struct Interests(mpsc::UnboundedSender<Event>);

impl Interests {
    /// Sets what is wanted of a type.
    pub fn set(&self, type_url: impl Into<String>, interest: Interest) {
        // A client that is gone wants nothing.
        let _ = self.0.send(Event::Want(type_url.into(), interest));
    }
}

impl<S: Sink> Client<S> {
    /// A client that is not connected yet, and wants nothing.
    pub fn new(config: ClientConfig, sink: Arc<S>) -> Self {
        let core = Core::new(config.node.clone(), config.grpc.variant);
        let (sender, events) = mpsc::unbounded_channel();
        let stats = Arc::new(AdsStats::default());
        Client { config, core, sink, stats, events, sender }
    }

    /// Its counters, which stay up to date.
    pub fn stats(&self) -> Arc<AdsStats> {
        Arc::clone(&self.stats)
    }

    /// Changes what is wanted, before the client runs and while it does.
    pub fn interests(&self) -> Interests {
        Interests(self.sender.clone())
    }

    /// Keeps a stream to the control plane, for ever.
    ///
    /// A lost stream is opened again after a jittered wait of at most 500 ms, which doubles up to 30 s as long as no
    /// response comes. The other addresses are tried before that wait.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = Backoff::default();
        let mut next = 0;
        loop {
            let Some(address) = self.config.server.endpoints.get(next).cloned() else {
                tracing::error!("the control plane has no address: configuration stays as it is");
                return std::future::pending().await;
            };
            let mut answered = false;
            let Err(lost) = self.stream(&address, &mut answered).await;
            self.core.disconnected();
            self.stats.failed();
            if self.stats.connected() {
                self.stats.set_connected(false);
                self.sink.state(&self.config.source, false);
            }
            if answered {
                backoff.reset();
            } else {
                next = (next + 1) % self.config.server.endpoints.len();
            }
            let wait = if answered || next == 0 { backoff.next() } else { Duration::ZERO };
            tracing::warn!(%address, retry_in = ?wait, "{lost}; configuration in force stays");
            let mut wait = std::pin::pin!(tokio::time::sleep(wait));
            // What is good for some time only ends without a stream as well.
            loop {
                tokio::select! {
                    () = &mut wait => break,
                    () = expiry(self.core.next_expiry()) => self.expire(),
                }
            }
        }
    }

    /// Runs one stream until it is lost; `answered` is set once a response has been taken.
    async fn stream(&mut self, address: &str, answered: &mut bool) -> Result<Infallible, Lost> {
        let channel =
            stream::connect(address, &self.config.grpc.service.authority, self.config.server.connect_timeout).await?;
        let (requests, responses) = stream::call(channel, self.core.variant());
        self.core.connected();
        self.send(&requests);

        let mut responses = pin!(responses);
        let mut responses = loop {
            tokio::select! {
                responses = &mut responses => break responses?,
                Some(event) = self.events.recv() => self.event(event, &requests),
                () = expiry(self.core.next_expiry()) => self.expire(),
            }
        };
        tracing::info!(%address, "connected to the control plane");
        self.stats.set_connected(true);
        self.sink.state(&self.config.source, true);
        loop {
            tokio::select! {
                response = responses.next() => *answered |= self.take(response?),
                Some(event) = self.events.recv() => self.event(event, &requests),
                () = expiry(self.core.next_expiry()) => self.expire(),
            }
        }
    }

    /// Hands a response to the sink; whether it was one to apply.
    fn take(&mut self, response: Response) -> bool {
        let type_url = match &response {
            Response::Sotw(response) => response.type_url.clone(),
            Response::Delta(response) => response.type_url.clone(),
        };
        let (token, update) = match self.core.handle(response, Instant::now()) {
            Handled::Update(token, update) => (token, update),
            Handled::Ignored(why) => {
                tracing::warn!(%type_url, "response of the control plane ignored: {why}");
                return false;
            }
        };
        self.hand_out(token, update);
        true
    }

    /// Removes what has outlived its time to live.
    fn expire(&mut self) {
        for (token, update) in self.core.expire(Instant::now()) {
            tracing::warn!(type_url = %update.type_url, names = ?update.removed, "time to live has run out");
            self.hand_out(token, update);
        }
    }

    fn hand_out(&self, token: Token, update: Update) {
        let Update { type_url, added, unchanged, removed, .. } = &update;
        let (added, unchanged, removed) = (added.len(), unchanged.len(), removed.len());
        tracing::debug!(%type_url, added, unchanged, removed, "update");
        let (sender, type_url) = (self.sender.clone(), type_url.clone());
        // A client that is gone has nobody left to answer.
        let done = Done::new(move |outcome| drop(sender.send(Event::Applied { token, type_url, outcome })));
        self.sink.update(&self.config.source, update, done);
    }

    fn event(&mut self, event: Event, requests: &Requests) {
        match event {
            Event::Want(type_url, interest) => {
                if interest != Interest::None {
                    self.stats.of(&type_url);
                }
                self.core.set_interest(&type_url, interest);
            }
            Event::Applied { token, outcome: None, .. } => self.core.abandon(token),
            Event::Applied { token, type_url, outcome: Some(outcome) } => {
                let rejected = self.core.finish(token, outcome);
                self.stats.answered(&type_url, rejected.is_empty());
                for rejection in &rejected {
                    tracing::warn!(%type_url, name = %rejection.name, "resource rejected: {}", rejection.message);
                }
            }
        }
        self.send(requests);
    }

    fn send(&mut self, requests: &Requests) {
        for request in self.core.outgoing() {
            requests.send(request);
        }
    }
}

/// Waits for a point in time, if there is one.
async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
