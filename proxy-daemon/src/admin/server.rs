//! The HTTP server of the admin interface.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task,
    time::{Instant, timeout},
};
use tonic::{body::Body, codegen::Service as _};

use super::{
    AdminState, csds,
    endpoints::{self, DRAIN_LISTENERS, RUNTIME_MODIFY, TAP},
    request::{Parameters, Reply},
};
use crate::{
    http::{filters::tap, leaving},
    stats::{self, Counter, Gauge, ResponseCodes, Scope},
    upstream::Decrement,
};

/// A request's head must be there within this.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a form.
const MAX_FORM: usize = 1 << 20;
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
    csds: csds::Server,
}

/// Serves the admin interface until the future is dropped. Must be called within a runtime.
pub async fn run(state: AdminState, listener: TcpListener) {
    let scope = Scope::http("admin");
    // Listeners may use the same prefix, and go.
    let _lease = scope.lease();
    let server = Arc::new(Server {
        csds: csds::server(Arc::clone(&state.config)),
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

/// How an HTTP/2 connection begins; no method of HTTP/1 does.
const HTTP2: &[u8] = b"PRI ";
/// Requests at a time on an HTTP/2 connection.
const MAX_STREAMS: u32 = 32;

async fn serve(server: Arc<Server>, stream: TcpStream) -> hyper::Result<()> {
    let mut first = [0; HTTP2.len()];
    // A client that does not say anything is not waited for; what the others say is seen again below.
    let Ok(Ok(seen)) = timeout(HEADER_TIMEOUT, stream.peek(&mut first)).await else { return Ok(()) };
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(respond(server, request).await) }
    });
    if first[..seen] == *HTTP2 {
        let mut http2 = http2::Builder::new(TokioExecutor::new());
        http2.timer(TokioTimer::new()).max_concurrent_streams(MAX_STREAMS);
        // Finds out that a client is gone, which otherwise would keep its place.
        http2.keep_alive_interval(HEADER_TIMEOUT);
        return http2.serve_connection(TokioIo::new(stream), service).await;
    }
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service)
        .await
}

async fn respond(server: Arc<Server>, mut request: Request<Incoming>) -> Response<Body> {
    server.rq_total.inc();
    // Also where the client leaves before it is answered.
    let _active = Decrement::after_inc(server.rq_active);
    if request.uri().path().starts_with(csds::PATH) {
        let mut service = server.csds.clone();
        let Ok(response) = service.call(request).await;
        server.rq.inc(response.status().as_u16());
        return response;
    }
    if request.uri().path() == TAP && request.method() == Method::POST && tap::is_registered() {
        let response = attach_tap(&mut request).await;
        server.rq.inc(response.status().as_u16());
        return response;
    }
    let parameters = parameters(&mut request).await;
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let drain = path == DRAIN_LISTENERS && method == Method::POST;
    let [graceful, skip_exit, inbound_only] =
        ["graceful", "skip_exit", "inboundonly"].map(|name| parameters.get(name).is_some());
    let handler = {
        let server = Arc::clone(&server);
        // Thousands of statistics take longer than other clients should be kept waiting.
        task::spawn_blocking(move || endpoints::handle(&server.state, &method, &path, &parameters))
    };
    let reply = handler.await.unwrap_or_else(|error| {
        tracing::error!(%error, "an admin handler failed; please report this");
        Reply::error(StatusCode::INTERNAL_SERVER_ERROR, "internal error: see the log\n")
    });
    if drain && reply.status == StatusCode::OK {
        drain_listeners(&server, DrainRequest { graceful, skip_exit, inbound_only }).await;
    }
    server.rq.inc(reply.status.as_u16());
    response(reply)
}

/// The parameters of the request's target; of `/runtime_modify`, where there are none, those of its form.
async fn parameters(request: &mut Request<Incoming>) -> Parameters {
    let parameters = Parameters::parse(request.uri().query().unwrap_or(""));
    let form = HeaderValue::from_static("application/x-www-form-urlencoded");
    if request.uri().path() != RUNTIME_MODIFY
        || parameters.iter().next().is_some()
        || request.headers().get(header::CONTENT_TYPE) != Some(&form)
    {
        return parameters;
    }
    let body = Limited::new(request.body_mut(), MAX_FORM).collect();
    match timeout(HEADER_TIMEOUT, body).await {
        Ok(Ok(body)) => Parameters::parse(&String::from_utf8_lossy(&body.to_bytes())),
        // Too long, too slow, or broken: as if there were none.
        _ => parameters,
    }
}

/// Has filters tap what the request's body says; the response goes on until the client is gone.
async fn attach_tap(request: &mut Request<Incoming>) -> Response<Body> {
    let body = Limited::new(request.body_mut(), MAX_FORM).collect();
    let attached = match timeout(HEADER_TIMEOUT, body).await {
        Ok(Ok(body)) => tap::attach(&body.to_bytes()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err("the body did not come in time".to_owned()),
    };
    match attached {
        Ok(attached) => response(Reply::text("")).map(|_| Body::new(attached)),
        Err(error) => response(Reply::bad_request(error)),
    }
}

/// What `/drain_listeners` is asked for.
struct DrainRequest {
    graceful: bool,
    skip_exit: bool,
    inbound_only: bool,
}

async fn drain_listeners(server: &Arc<Server>, DrainRequest { graceful, skip_exit, inbound_only }: DrainRequest) {
    if !graceful && !skip_exit {
        return close_listeners(server, inbound_only).await;
    }
    // A second one is passed over, as by Envoy.
    if !leaving::begin_drain(server.state.drain_time, inbound_only) || skip_exit {
        return;
    }
    // The answer does not wait for it.
    let server = Arc::clone(server);
    task::spawn(async move {
        tokio::time::sleep(server.state.drain_time).await;
        close_listeners(&server, inbound_only).await;
    });
}

async fn close_listeners(server: &Server, inbound_only: bool) {
    // Pods' connections are not to meet closed listeners, which their failure policies may refuse.
    if !inbound_only {
        server.state.data_plane.let_go().await;
    }
    server.state.data_plane.drain_listeners(inbound_only).await;
}

fn response(reply: Reply) -> Response<Body> {
    let mut response = Response::new(Body::new(Full::new(reply.body)));
    *response.status_mut() = reply.status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(reply.content_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::SERVER, HeaderValue::from_static("envoy"));
    response
}
