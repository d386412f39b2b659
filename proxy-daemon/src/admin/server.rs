//! The HTTP server of the admin interface.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task,
    time::Instant,
};

use super::{
    AdminState,
    endpoints::{self, DRAIN_LISTENERS},
    request::{Parameters, Reply},
};
use crate::stats::{self, Counter, Gauge, ResponseCodes, Scope};

/// A request's head must be there within this.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at a time: an idle client must not use up the daemon's file descriptors.
const MAX_CONNECTIONS: usize = 256;
/// Envoy's `stats_flush_interval`: what `/stats` shows as a histogram's interval.
const FLUSH_INTERVAL: Duration = Duration::from_secs(5);

struct Server {
    state: AdminState,
    cx_total: Counter,
    cx_active: Gauge,
    rq_total: Counter,
    rq_active: Gauge,
    rq: ResponseCodes,
}

/// Serves the admin interface until the future is dropped. Must be called within the control runtime.
pub async fn run(state: AdminState, listener: TcpListener) {
    let scope = Scope::http("admin");
    let server = Arc::new(Server {
        state,
        cx_total: scope.counter("downstream_cx_total"),
        cx_active: scope.gauge("downstream_cx_active"),
        rq_total: scope.counter("downstream_rq_total"),
        rq_active: scope.gauge("downstream_rq_active"),
        rq: ResponseCodes::classes_only(&scope, "downstream_rq"),
    });
    super::stats::refresh(&server.state);
    tokio::join!(flush_intervals(), accept(server, listener));
}

async fn flush_intervals() {
    let mut tick = tokio::time::interval_at(Instant::now() + FLUSH_INTERVAL, FLUSH_INTERVAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        // Merging takes a while where there are many histograms. It only fails when the runtime ends.
        let _ = task::spawn_blocking(stats::flush_intervals).await;
    }
}

async fn accept(server: Arc<Server>, listener: TcpListener) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropping the set, with this future, ends the connections.
    let mut connections = task::JoinSet::new();
    loop {
        // The semaphore is never closed.
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = Arc::clone(&server);
                connections.spawn(async move {
                    let _slot = slot;
                    server.cx_total.inc();
                    server.cx_active.inc();
                    if let Err(error) = serve(Arc::clone(&server), stream).await {
                        tracing::debug!(%error, "admin connection failed");
                    }
                    server.cx_active.dec();
                });
            }
            Err(error) => {
                if !is_of_one_connection(&error) {
                    tracing::warn!(%error, "the admin interface cannot accept; check the limit of open files");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Whether it was the client that went away.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

async fn serve(server: Arc<Server>, stream: TcpStream) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(respond(server, request).await) }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn respond(server: Arc<Server>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    server.rq_total.inc();
    server.rq_active.inc();
    let parameters = Parameters::parse(request.uri().query().unwrap_or(""));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let drain = path == DRAIN_LISTENERS && method == Method::POST;
    let graceful = parameters.get("graceful").is_some();
    let handler = {
        let server = Arc::clone(&server);
        // Thousands of statistics take longer than the control runtime should be kept waiting.
        task::spawn_blocking(move || endpoints::handle(&server.state, &method, &path, &parameters))
    };
    let reply = handler.await.unwrap_or_else(|error| {
        tracing::error!(%error, "an admin handler failed; please report this");
        Reply::error(StatusCode::INTERNAL_SERVER_ERROR, "internal error: see the log\n")
    });
    if drain && reply.status == StatusCode::OK {
        drain_listeners(&server, graceful).await;
    }
    server.rq.inc(reply.status.as_u16());
    server.rq_active.dec();
    response(reply)
}

async fn drain_listeners(server: &Arc<Server>, graceful: bool) {
    if !graceful {
        return server.state.data_plane.drain_listeners().await;
    }
    // The answer does not wait for it.
    let server = Arc::clone(server);
    task::spawn(async move {
        tokio::time::sleep(server.state.drain_time).await;
        server.state.data_plane.drain_listeners().await;
    });
}

fn response(reply: Reply) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(reply.body));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::SERVER, HeaderValue::from_static("envoy"));
    response
}
