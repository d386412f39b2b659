//! A management server that proxies report to: the load reporting service and the health discovery service, each stream in
//! the hands of the test.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use envoy_types::pb::envoy::service::health::v3::{
    HealthCheckRequestOrEndpointHealthResponse, HealthCheckSpecifier,
    health_discovery_service_server::{HealthDiscoveryService, HealthDiscoveryServiceServer},
};
use envoy_types::pb::envoy::service::load_stats::v3::{
    LoadStatsRequest, LoadStatsResponse,
    load_reporting_service_server::{LoadReportingService, LoadReportingServiceServer},
};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// One stream of a proxy's. Dropping it ends the stream.
pub struct Call<Q, A> {
    requests: Receiver<Q>,
    answers: mpsc::UnboundedSender<Result<A, Status>>,
}

impl<Q, A> Call<Q, A> {
    /// The next message of the proxy's.
    pub fn next(&self, deadline: Duration) -> Result<Q> {
        self.requests.recv_timeout(deadline).with_context(|| format!("no message within {deadline:?}"))
    }

    /// Sends an answer.
    pub fn send(&self, answer: A) {
        // A stream that is gone is noticed by whoever waits for its next message.
        let _ = self.answers.send(Ok(answer));
    }

    /// Ends the stream with an error.
    pub fn fail(self, status: Status) {
        let _ = self.answers.send(Err(status));
    }
}

/// A load reporting stream.
pub type LoadCall = Call<LoadStatsRequest, LoadStatsResponse>;

/// A health discovery stream.
pub type HealthCall = Call<HealthCheckRequestOrEndpointHealthResponse, HealthCheckSpecifier>;

/// The server, on a port of 127.0.0.1. Dropping it ends it, and all streams.
pub struct ReportServer {
    /// Its port.
    pub port: u16,
    loads: Receiver<LoadCall>,
    healths: Receiver<HealthCall>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

struct Calls<Q, A>(Sender<Call<Q, A>>);

impl<Q: Send + 'static, A: Send + 'static> Calls<Q, A> {
    fn open(&self, request: Request<Streaming<Q>>) -> Response<UnboundedReceiverStream<Result<A, Status>>> {
        let (answers, outgoing) = mpsc::unbounded_channel();
        let (sender, requests) = channel();
        let mut incoming = request.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(message)) = incoming.message().await {
                if sender.send(message).is_err() {
                    return;
                }
            }
        });
        // The test is over when nobody wants the call.
        let _ = self.0.send(Call { requests, answers });
        Response::new(UnboundedReceiverStream::new(outgoing))
    }
}

#[tonic::async_trait]
impl LoadReportingService for Calls<LoadStatsRequest, LoadStatsResponse> {
    type StreamLoadStatsStream = UnboundedReceiverStream<Result<LoadStatsResponse, Status>>;

    async fn stream_load_stats(
        &self,
        request: Request<Streaming<LoadStatsRequest>>,
    ) -> Result<Response<Self::StreamLoadStatsStream>, Status> {
        Ok(self.open(request))
    }
}

#[tonic::async_trait]
impl HealthDiscoveryService for Calls<HealthCheckRequestOrEndpointHealthResponse, HealthCheckSpecifier> {
    type StreamHealthCheckStream = UnboundedReceiverStream<Result<HealthCheckSpecifier, Status>>;

    async fn stream_health_check(
        &self,
        request: Request<Streaming<HealthCheckRequestOrEndpointHealthResponse>>,
    ) -> Result<Response<Self::StreamHealthCheckStream>, Status> {
        Ok(self.open(request))
    }

    async fn fetch_health_check(
        &self,
        _request: Request<HealthCheckRequestOrEndpointHealthResponse>,
    ) -> Result<Response<HealthCheckSpecifier>, Status> {
        Err(Status::unimplemented("streams only"))
    }
}

impl ReportServer {
    /// Starts it on a free port.
    pub fn start() -> Result<Self> {
        Self::start_on(0)
    }

    /// Starts it on `port`.
    pub fn start_on(port: u16) -> Result<Self> {
        let ((load_sender, loads), (health_sender, healths)) = (channel(), channel());
        let (stop, stopped) = oneshot::channel();
        let (bound, port_of) = channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = thread::spawn(move || {
            runtime.block_on(async move {
                let listener = TcpListener::bind(("127.0.0.1", port)).await;
                let listener = listener.and_then(|listener| Ok((listener.local_addr()?.port(), listener)));
                let listener = match listener {
                    Ok((port, listener)) => {
                        let _ = bound.send(Ok(port));
                        listener
                    }
                    Err(error) => return drop(bound.send(Err(error))),
                };
                let serve = Server::builder()
                    .add_service(LoadReportingServiceServer::new(Calls(load_sender)))
                    .add_service(HealthDiscoveryServiceServer::new(Calls(health_sender)))
                    .serve_with_incoming(TcpListenerStream::new(listener));
                // Not gracefully: streams end when the test says so.
                tokio::select! {
                    _ = serve => {}
                    _ = stopped => {}
                }
            });
        });
        let port = port_of.recv().context("the server's thread ended")?.context("binding the server's port")?;
        Ok(Self { port, loads, healths, stop: Some(stop), thread: Some(thread) })
    }

    /// The next load reporting stream that a proxy opens.
    pub fn load_call(&self, deadline: Duration) -> Result<LoadCall> {
        self.loads.recv_timeout(deadline).with_context(|| format!("no load reporting stream within {deadline:?}"))
    }

    /// The next health discovery stream that a proxy opens.
    pub fn health_call(&self, deadline: Duration) -> Result<HealthCall> {
        self.healths.recv_timeout(deadline).with_context(|| format!("no health discovery stream within {deadline:?}"))
    }
}

impl Drop for ReportServer {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
