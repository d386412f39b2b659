//! Resources that are polled over HTTP (`api_type: REST`).

use std::{
    convert::Infallible,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use envoy_types::pb::envoy::{
    config::core::v3::Node,
    service::discovery::v3::{DiscoveryRequest, DiscoveryResponse},
};
use http::{StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn;
use hyper_util::rt::{TokioExecutor, TokioIo};

use crate::{
    ads::{Request, Response, Sink, Variant},
    connect::{self, ConnectError},
    driver::{Came, Driver, Interests},
    grpc::MAX_RESPONSE_BYTES,
    json,
    resource_type::ResourceType,
    source::{RestSource, Server, Source},
    stats::ClientStats,
};

/// The shortest wait between polls, whatever the configuration says.
const SHORTEST_WAIT: Duration = Duration::from_millis(10);

/// Why a poll brought nothing.
#[derive(Debug, thiserror::Error)]
enum Failed {
    #[error("cannot connect to the control plane: {0}")]
    Connect(#[from] ConnectError),
    #[error("the control plane's connection failed: {0}")]
    Http(#[from] hyper::Error),
    #[error("the control plane answered {0}")]
    Status(StatusCode),
    #[error("the control plane's answer is cut off or larger than {MAX_RESPONSE_BYTES} bytes: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("the control plane's answer is no DiscoveryResponse: {0}")]
    Parse(json::ConfigError),
    #[error("the control plane did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the request cannot be sent: {0}")]
    Request(#[from] http::Error),
    #[error("the control plane has no address")]
    NoAddress,
}

/// The last answer that was handed to the sink.
struct Last {
    hash: u64,
    version: String,
    /// Whether all of it was accepted; `None`: that is not known yet.
    accepted: Option<bool>,
}

/// Polls one type of resources from one server.
pub(crate) struct RestClient<S> {
    rest: RestSource,
    server: Server,
    only: &'static ResourceType,
    path: &'static str,
    driver: Driver<S>,
    last: Option<Last>,
    next_address: usize,
    well: bool,
}

impl<S: Sink> RestClient<S> {
    /// `None` for a type that cannot be polled.
    pub(crate) fn new(
        rest: RestSource,
        server: Server,
        only: &'static ResourceType,
        node: Node,
        sink: Arc<S>,
    ) -> Option<Self> {
        let path = only.rest?;
        let driver = Driver::new(Source::Rest(rest.clone()), node, Variant::Sotw, sink);
        Some(RestClient { rest, server, only, path, driver, last: None, next_address: 0, well: false })
    }

    pub(crate) fn stats(&self) -> Arc<ClientStats> {
        Arc::clone(&self.driver.stats)
    }

    pub(crate) fn interests(&self) -> Interests {
        self.driver.interests()
    }

    /// Polls, for ever: at once when something else is wanted, else after `refresh_delay` and at most as long again.
    pub(crate) async fn run(mut self) -> Infallible {
        let delay = self.rest.refresh_delay.max(SHORTEST_WAIT);
        let mut due = tokio::time::Instant::now();
        let mut wanted = false;
        loop {
            tokio::select! {
                biased;
                event = self.driver.next() => match self.driver.event(event) {
                    Came::Wanted => {
                        // What was passed over then may be wanted now.
                        self.last = None;
                        wanted = true;
                        due = tokio::time::Instant::now();
                    }
                    Came::Finished(accepted) => {
                        if let Some(last) = &mut self.last {
                            last.accepted = Some(accepted);
                        }
                    }
                    Came::Expired => {}
                },
                () = tokio::time::sleep_until(due), if wanted => {
                    self.poll().await;
                    due = tokio::time::Instant::now() + delay + delay.mul_f64(fastrand::f64());
                }
            }
        }
    }

    async fn poll(&mut self) {
        // Every poll is a stream of its own: it says all that is wanted and in force.
        self.driver.core.connected();
        let Some(Request::Sotw(mut request)) = self.driver.core.outgoing().into_iter().next() else { return };
        request.response_nonce.clear();
        let limit = self.rest.request_timeout;
        let fetched = tokio::time::timeout(limit, self.fetch(request)).await;
        match fetched.unwrap_or(Err(Failed::Timeout(limit))) {
            Ok(body) => self.answered(body),
            Err(error) => self.failed(&error),
        }
    }

    fn answered(&mut self, body: Option<Bytes>) {
        // 304: nothing has changed.
        let Some(body) = body else { return self.is_well() };
        let mut hasher = DefaultHasher::new();
        body.hash(&mut hasher);
        let hash = hasher.finish();
        if let Some(last) = self.last.as_ref().filter(|last| last.hash == hash) {
            let stats = self.driver.stats.of(self.only.type_url);
            match last.accepted {
                Some(true) => stats.accepted(&last.version),
                Some(false) => stats.rejected(),
                None => {}
            }
            return self.is_well();
        }
        let text = String::from_utf8_lossy(&body);
        match json::from_yaml::<DiscoveryResponse>(&text) {
            Ok(response) => {
                self.is_well();
                self.last = Some(Last { hash, version: response.version_info.clone(), accepted: None });
                let type_url = self.only.type_url.to_owned();
                let response = DiscoveryResponse { type_url, nonce: String::new(), ..response };
                self.driver.take(Response::Sotw(response));
            }
            Err(error) => self.failed(&Failed::Parse(error)),
        }
    }

    fn is_well(&mut self) {
        if !std::mem::replace(&mut self.well, true) {
            self.driver.sink.state(&self.driver.source, true);
        }
    }

    fn failed(&mut self, error: &Failed) {
        self.next_address = (self.next_address + 1) % self.server.endpoints.len().max(1);
        if std::mem::replace(&mut self.well, false) {
            self.driver.sink.state(&self.driver.source, false);
        }
        tracing::warn!(cluster = %self.rest.cluster, path = self.path, "{error}; configuration in force stays");
        self.driver.stats.of(self.only.type_url).failed();
    }

    /// One request; `None`: nothing has changed.
    async fn fetch(&self, request: DiscoveryRequest) -> Result<Option<Bytes>, Failed> {
        let address = self.server.endpoints.get(self.next_address).ok_or(Failed::NoAddress)?;
        let body = Full::new(Bytes::from(json::to_json(&request).to_string()));
        let protocol = if self.server.http2 { "h2" } else { "http/1.1" };
        let stream = TokioIo::new(connect::connect(&self.server, address, protocol).await?);
        let request = http::Request::post(self.path).header(header::CONTENT_TYPE, "application/json");
        let (response, _driver) = if self.server.http2 {
            let (mut sender, connection) = conn::http2::handshake(TokioExecutor::new(), stream).await?;
            let driver = AbortOnDrop(tokio::spawn(async move { drop(connection.await) }));
            let scheme = if self.server.tls.is_some() { "https" } else { "http" };
            let authority = self.rest.cluster.as_str();
            let uri = Uri::builder().scheme(scheme).authority(authority).path_and_query(self.path).build()?;
            (sender.send_request(request.uri(uri).body(body)?).await?, driver)
        } else {
            let (mut sender, connection) = conn::http1::handshake(stream).await?;
            let driver = AbortOnDrop(tokio::spawn(async move { drop(connection.await) }));
            let request = request.header(header::HOST, self.rest.cluster.as_str());
            (sender.send_request(request.body(body)?).await?, driver)
        };
        match response.status() {
            StatusCode::OK => {}
            StatusCode::NOT_MODIFIED => return Ok(None),
            status => return Err(Failed::Status(status)),
        }
        let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await.map_err(Failed::Body)?;
        Ok(Some(body.to_bytes()))
    }
}

/// A task that ends with its owner.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests;
