//! Resources that are polled over HTTP (`api_type: REST`).

mod session;

use std::{convert::Infallible, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use envoy_types::pb::envoy::{config::core::v3::Node, service::discovery::v3::DiscoveryRequest};
use http::StatusCode;
use http_body_util::{BodyExt, Limited};

use self::session::Session;
use crate::{
    ads::{Counted, Request, Sink, Variant},
    connect::ConnectError,
    document::{Documents, Encoding, Judged},
    driver::{Came, Driver, Event, Interests},
    grpc::MAX_RESPONSE_BYTES,
    json::{self, UnknownFields},
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
    #[error("the control plane did not answer within {0:?}")]
    Timeout(Duration),
    #[error("the request cannot be sent: {0}")]
    Request(#[from] http::Error),
    #[error("the control plane has no address")]
    NoAddress,
}

/// How far a poll came.
#[derive(PartialEq, Eq)]
enum Polled {
    /// All that is wanted was asked for.
    All,
    /// Something else is wanted by now.
    Part,
    /// Likewise, and the answer was not waited for.
    Stopped,
}

/// Polls one type of resources from one server.
pub(crate) struct RestClient<S> {
    rest: RestSource,
    server: Server,
    path: &'static str,
    documents: Documents,
    driver: Driver<S>,
    /// The connection of the last poll, if that was answered.
    session: Option<Session>,
    next_address: usize,
    well: bool,
}

impl<S: Sink> RestClient<S> {
    /// `None` for a type that cannot be polled.
    pub(crate) fn new(
        rest: RestSource,
        server: Server,
        only: &'static ResourceType,
        (node, unknown): (Node, UnknownFields),
        sink: Arc<S>,
    ) -> Option<Self> {
        let path = only.rest?;
        let documents = Documents::new(only.type_url, format!("cluster {}, {path}", rest.cluster), unknown);
        let driver = Driver::new(Source::Rest(rest.clone()), node, Variant::Sotw, sink);
        driver.stats.set_server("REST", format!("cluster {}", rest.cluster));
        Some(RestClient { rest, server, path, documents, driver, session: None, next_address: 0, well: false })
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
        // Or what is wanted could change more often than a slow server answers.
        let mut may_stop = true;
        loop {
            tokio::select! {
                biased;
                event = self.driver.next() => if self.is_to_poll(event) {
                    wanted = true;
                    due = tokio::time::Instant::now();
                },
                () = tokio::time::sleep_until(due), if wanted => {
                    let polled = self.poll(may_stop).await;
                    may_stop = polled != Polled::Stopped;
                    due = tokio::time::Instant::now();
                    if polled == Polled::All {
                        due += delay + delay.mul_f64(fastrand::f64());
                    }
                }
            }
        }
    }

    /// Whether something else is wanted than before.
    fn is_to_poll(&mut self, event: Event) -> bool {
        match self.driver.event(event) {
            Came::Wanted => {
                self.documents.wanted();
                true
            }
            Came::Finished(token, accepted) => {
                self.documents.finished(&token, accepted);
                false
            }
            Came::Expired => false,
        }
    }

    /// Polls once. Where something else is wanted meanwhile, that is to be asked for at once: the poll stops, if it may.
    async fn poll(&mut self, may_stop: bool) -> Polled {
        // Every poll is a stream of its own: it says all that is wanted and in force.
        self.driver.core.connected();
        let Some(Request::Sotw(mut request)) = self.driver.core.outgoing().into_iter().next() else {
            return Polled::All;
        };
        request.response_nonce.clear();
        let limit = self.rest.request_timeout;
        let address = self.server.endpoints.get(self.next_address).cloned();
        let fetched = fetch(self.session.take(), self.rest.clone(), self.server.clone(), address, self.path, request);
        let mut fetched = pin!(tokio::time::timeout(limit, fetched));
        let mut polled = Polled::All;
        let fetched = loop {
            tokio::select! {
                biased;
                event = self.driver.next() => if self.is_to_poll(event) {
                    if may_stop {
                        return Polled::Stopped;
                    }
                    polled = Polled::Part;
                },
                fetched = &mut fetched => break fetched,
            }
        };
        match fetched.unwrap_or(Err(Failed::Timeout(limit))) {
            Ok((body, session)) => {
                self.session = Some(session);
                self.driver.stats.set_connected(Ok(()));
                self.answered(body);
            }
            Err(error) => {
                self.driver.stats.set_connected(Err(error.to_string()));
                self.driver.sink.failed(&self.driver.source, Some(self.documents.type_url()));
                self.is_unwell();
                self.documents.not_fetched(&error.to_string(), &self.driver.stats);
            }
        }
        polled
    }

    fn answered(&mut self, body: Option<Bytes>) {
        // 304: nothing has changed.
        let Some(body) = body else {
            self.documents.unchanged(&self.driver.stats);
            self.counted(Counted::Unmodified);
            return self.is_well();
        };
        match self.documents.came(&body, Encoding::Json, &self.driver.stats) {
            Judged::New(response) => {
                self.is_well();
                self.documents.handed_out(self.driver.take(response));
            }
            Judged::Same { accepted } => {
                self.counted(Counted::Same { accepted });
                self.is_well();
            }
            // As Envoy counts it, whatever is wrong with an answer.
            Judged::Unusable { .. } => {
                self.counted(Counted::Rejected);
                self.is_unwell();
            }
        }
    }

    fn counted(&self, answer: Counted) {
        self.driver.sink.counted(&self.driver.source, self.documents.type_url(), answer);
    }

    fn is_well(&mut self) {
        if !std::mem::replace(&mut self.well, true) {
            self.driver.sink.state(&self.driver.source, true);
        }
    }

    fn is_unwell(&mut self) {
        self.next_address = (self.next_address + 1) % self.server.endpoints.len().max(1);
        if std::mem::replace(&mut self.well, false) {
            self.driver.sink.state(&self.driver.source, false);
        }
    }
}

/// What a poll brought, `None` where nothing has changed, and the connection for the next one.
type Fetched = (Option<Bytes>, Session);

/// One request, on the connection of the poll before where that is still open.
async fn fetch(
    kept: Option<Session>,
    rest: RestSource,
    server: Server,
    address: Option<String>,
    path: &'static str,
    request: DiscoveryRequest,
) -> Result<Fetched, Failed> {
    let address = address.ok_or(Failed::NoAddress)?;
    let body = Bytes::from(json::to_json(&request).to_string());
    let _under_way = server.request();
    let mut answered = None;
    if let Some(mut session) = kept
        && session.leads_to(&address).await
    {
        // The server may close it meanwhile: that is no fault of the next one.
        let response = session.post(&server, &rest.cluster, path, body.clone()).await;
        answered = response.ok().map(|response| (response, session));
    }
    let (response, session) = match answered {
        Some(answered) => answered,
        None => {
            let mut session = Session::open(&server, &address, &rest.cluster).await?;
            (session.post(&server, &rest.cluster, path, body).await?, session)
        }
    };
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_MODIFIED => return Ok((None, session)),
        status => return Err(Failed::Status(status)),
    }
    let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await.map_err(Failed::Body)?;
    Ok((Some(body.to_bytes()), session))
}

#[cfg(test)]
mod tests;
