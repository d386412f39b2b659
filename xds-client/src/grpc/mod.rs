//! Drives the xDS client over gRPC: connects, reconnects, and passes messages between the server and [`Core`].

mod backoff;
mod stats;
mod stream;

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::Node;
use tokio::sync::mpsc;

use self::backoff::Backoff;
pub use self::stats::{AdsStats, TypeStats};
pub use self::stream::MAX_RESPONSE_BYTES;
use self::stream::{Lost, Requests};
use crate::ads::{Core, Handled, Interest, Response, Sink, Variant};

/// Where the control plane is, and what to ask it first.
#[derive(Debug, Clone)]
pub struct AdsConfig {
    /// Its addresses as host:port, tried in this order. A host name is looked up on each attempt.
    pub endpoints: Vec<String>,
    /// `:authority` of the calls.
    pub authority: String,
    /// The protocol variant.
    pub variant: Variant,
    /// Who is asking.
    pub node: Node,
    /// The longest that one attempt to connect may take.
    pub connect_timeout: Duration,
    /// Type URLs of which everything is wanted from the start.
    pub wildcards: Vec<String>,
}

/// Runs a client that needs no more than its configuration and a sink. Never returns; drop the future to stop it.
pub async fn run<S: Sink>(config: AdsConfig, sink: S) -> Infallible {
    Client::new(config, sink).run().await
}

/// A client that is ready to run.
pub struct Client<S> {
    config: AdsConfig,
    core: Core,
    sink: S,
    stats: Arc<AdsStats>,
    interests: mpsc::UnboundedReceiver<(String, Interest)>,
    /// Keeps the channel open when nobody else does.
    sender: mpsc::UnboundedSender<(String, Interest)>,
}

impl<S: Sink> Client<S> {
    /// A client that is not connected yet.
    pub fn new(config: AdsConfig, sink: S) -> Self {
        let mut core = Core::new(config.node.clone(), config.variant);
        let stats = Arc::new(AdsStats::default());
        for type_url in &config.wildcards {
            core.set_interest(type_url, Interest::Wildcard);
            stats.of(type_url);
        }
        let (sender, interests) = mpsc::unbounded_channel();
        Client { config, core, sink, stats, interests, sender }
    }

    /// Its counters, which stay up to date.
    pub fn stats(&self) -> Arc<AdsStats> {
        Arc::clone(&self.stats)
    }

    /// Changes what is wanted (type URL, interest) while the client runs.
    pub fn interests(&self) -> mpsc::UnboundedSender<(String, Interest)> {
        self.sender.clone()
    }

    /// Keeps a stream to the control plane, for ever.
    ///
    /// A lost stream is opened again after a jittered wait of at most 500 ms, which doubles up to 30 s as long as no
    /// response comes. The other addresses are tried before that wait.
    pub async fn run(mut self) -> Infallible {
        let mut backoff = Backoff::default();
        let mut next = 0;
        loop {
            let Some(address) = self.config.endpoints.get(next).cloned() else {
                tracing::error!("the control plane has no address: configuration stays as it is");
                return std::future::pending().await;
            };
            let mut answered = false;
            let Err(lost) = self.stream(&address, &mut answered).await;
            self.core.disconnected();
            self.stats.failed();
            if self.stats.connected() {
                self.stats.set_connected(false);
                self.sink.state(false);
            }
            if answered {
                backoff.reset();
            } else {
                next = (next + 1) % self.config.endpoints.len();
            }
            let wait = if answered || next == 0 { backoff.next() } else { Duration::ZERO };
            tracing::warn!(%address, retry_in = ?wait, "{lost}; configuration in force stays");
            tokio::time::sleep(wait).await;
        }
    }

    /// Runs one stream until it is lost; `answered` is set once a response has been taken.
    async fn stream(&mut self, address: &str, answered: &mut bool) -> Result<Infallible, Lost> {
        let channel = stream::connect(address, &self.config.authority, self.config.connect_timeout).await?;
        let (requests, responses) = stream::call(channel, self.core.variant());
        self.core.connected();
        self.send(&requests);

        let mut responses = pin!(responses);
        let mut responses = loop {
            tokio::select! {
                responses = &mut responses => break responses?,
                Some((type_url, interest)) = self.interests.recv() => self.want(&type_url, interest, &requests),
            }
        };
        tracing::info!(%address, "connected to the control plane");
        self.stats.set_connected(true);
        self.sink.state(true);
        loop {
            tokio::select! {
                response = responses.next() => *answered |= self.take(response?, &requests),
                Some((type_url, interest)) = self.interests.recv() => self.want(&type_url, interest, &requests),
            }
        }
    }

    /// Applies a response and answers it; whether it was one to apply.
    fn take(&mut self, response: Response, requests: &Requests) -> bool {
        let type_url = match &response {
            Response::Sotw(response) => response.type_url.clone(),
            Response::Delta(response) => response.type_url.clone(),
        };
        let (token, update) = match self.core.handle(response) {
            Handled::Update(token, update) => (token, update),
            Handled::Ignored(why) => {
                tracing::warn!(%type_url, "response of the control plane ignored: {why}");
                return false;
            }
        };
        tracing::debug!(%type_url, added = update.added.len(), removed = update.removed.len(), "update");
        let outcome = self.sink.update(update);
        for (type_url, interest) in &outcome.subscriptions {
            if *interest != Interest::None {
                self.stats.of(type_url);
            }
        }
        let rejected = self.core.finish(token, outcome);
        self.stats.answered(&type_url, rejected.is_empty());
        for rejection in &rejected {
            tracing::warn!(%type_url, name = %rejection.name, "resource rejected: {}", rejection.message);
        }
        self.send(requests);
        true
    }

    fn want(&mut self, type_url: &str, interest: Interest, requests: &Requests) {
        self.core.set_interest(type_url, interest);
        self.send(requests);
    }

    fn send(&mut self, requests: &Requests) {
        for request in self.core.outgoing() {
            requests.send(request);
        }
    }
}

#[cfg(test)]
mod tests;
