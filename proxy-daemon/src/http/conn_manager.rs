//! One downstream connection: its codec, its streams, its end.

use std::{
    cell::{Cell, RefCell},
    convert::Infallible,
    net::IpAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderValue, Request, Response, StatusCode, Version, header::LOCATION};
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::TokioTimer;
use tokio::sync::Notify;

use super::{
    LocalExecutor, RouteRef, Routes,
    aside::aside,
    begun::Begun,
    body::Body,
    codec::{self, h1::ServerConnection},
    filters::{Flow, HttpFilter, PerRoute},
    forward::forward,
    headers::{self, names::*},
    io::DownstreamIo,
    local_reply::{self, answer},
    normal,
    observe::{EndHolder, LoggedHeaders, RequestObserver, ResponseObserver, StreamEnd},
    redirect::{own_url, redirect},
    scopes::RouteFinder,
    stats::HcmStats,
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    trust,
    upgrade::{self, Asked},
    waiting::{self, Counted},
};
use crate::{
    access_log::{AccessLog, ResponseFlags},
    config::model::{ClusterChoice, CodecType, HttpConnectionManagerConfig, HttpFilterEntry, RouteAction},
    listener::{ConnectionInfo, DownstreamStream, DrainSignal},
    on_demand::Wanted,
    runtime::Worker,
    stats::Counter,
    upstream::WorkerCluster,
};

/// How often one request may wait for what it lacks.
const MAX_PAUSES: u8 = 8;

/// A configured connection manager, shared by all workers.
#[derive(Debug)]
pub struct ConnectionManager {
    /// As configured.
    pub config: Arc<HttpConnectionManagerConfig>,
    pub(super) routes: Routes,
    /// The names of its filters.
    filters: Arc<[Arc<str>]>,
    pub(super) stats: HcmStats,
    pub(super) access_logs: Vec<AccessLog>,
    pub(super) logged: LoggedHeaders,
}

impl ConnectionManager {
    /// Takes its slots in the statistics and opens its access logs.
    pub fn new(
        config: Arc<HttpConnectionManagerConfig>,
        routes: Routes,
    ) -> Result<ConnectionManager, crate::config::FieldError> {
        let access_logs: Vec<_> = config.access_logs.iter().map(AccessLog::new).collect::<Result<_, _>>()?;
        let logged = LoggedHeaders::new(&access_logs);
        let stats = HcmStats::new(&config.stat_prefix);
        let filters = config.http_filters.iter().map(|entry| Arc::clone(&entry.name)).collect();
        Ok(ConnectionManager { config, routes, filters, stats, access_logs, logged })
    }

    /// A connection that got no further than its TLS handshake.
    pub(crate) fn count_failed_handshake(&self) {
        self.stats.downstream_cx_total.inc();
        self.stats.downstream_cx_ssl_total.inc();
        self.stats.downstream_cx_destroy.inc();
    }
}

/// What the streams of one connection share.
pub(super) struct ConnState {
    pub(super) manager: Arc<ConnectionManager>,
    pub(super) connection: Rc<ConnectionInfo>,
    worker: Rc<Worker>,
    routes: RouteFinder,
    active: Cell<u32>,
    requests: Cell<u32>,
    idle_since: Cell<Instant>,
    /// When anything last passed to the client.
    pub(super) last_progress: Cell<Instant>,
    /// How long nothing may pass to the client while a stream is open: the longest idle timeout of its streams.
    stall_limit: Cell<Option<Duration>>,
    /// Told when the connection has served its last request.
    worn_out: Notify,
}

impl ConnState {
    pub(super) fn stream_begins(&self) {
        self.active.set(self.active.get() + 1);
        self.last_progress.set(Instant::now());
        self.requests.set(self.requests.get().saturating_add(1));
        let limit = self.manager.config.max_requests_per_connection;
        if limit != 0 && self.requests.get() == limit {
            self.manager.stats.downstream_cx_max_requests_reached.inc();
            self.worn_out.notify_one();
        }
    }

    /// A stream may be idle for so long; `None`: for ever.
    pub(super) fn allow_stall(&self, idle: Option<Duration>) {
        self.stall_limit.set(self.stall_limit.get().zip(idle).map(|(known, new)| known.max(new)));
    }

    /// Ends when a client has not taken anything for too long. A body's own timer cannot tell: nobody polls a body while
    /// its client does not read.
    async fn stalled(&self) {
        loop {
            let Some(limit) = self.stall_limit.get().filter(|limit| !limit.is_zero()) else {
                return std::future::pending().await;
            };
            // The body's timer comes first where it can.
            let limit = limit + Duration::from_secs(1);
            let left = limit.saturating_sub(self.last_progress.get().elapsed());
            if left.is_zero() && self.active.get() > 0 {
                return;
            }
            tokio::time::sleep(if left.is_zero() { limit } else { left }).await;
        }
    }

    pub(super) fn stream_ends(&self) {
        self.active.set(self.active.get() - 1);
        self.idle_since.set(Instant::now());
    }
}

/// Serves a downstream connection to its end.
pub async fn serve(
    stream: DownstreamStream,
    manager: Arc<ConnectionManager>,
    connection: Rc<ConnectionInfo>,
    worker: Rc<Worker>,
    mut drain: DrainSignal,
) {
    let stats = &manager.stats;
    stats.downstream_cx_total.inc();
    let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_active);
    let _encrypted = connection.tls.is_some().then(|| {
        stats.downstream_cx_ssl_total.inc();
        crate::upstream::Decrement::after_inc(stats.downstream_cx_ssl_active)
    });
    let started = Instant::now();
    let chosen = stream.alpn().map(|protocol| protocol == b"h2");
    let mut io = DownstreamIo::new(stream);
    let http2 = match (manager.config.codec_type, chosen) {
        (CodecType::Http1, _) => false,
        (CodecType::Http2, _) => true,
        (CodecType::Auto, Some(http2)) => http2,
        (CodecType::Auto, None) => {
            let limit = manager.config.idle_timeout.unwrap_or(Duration::MAX / 4);
            // A connection that has said nothing yet loses nothing when it is closed.
            let sniffed = tokio::select! {
                sniffed = tokio::time::timeout(limit, io.sniff_http2()) => sniffed.ok().and_then(Result::ok),
                () = drain.triggered() => None,
            };
            match sniffed {
                Some(http2) => http2,
                None => {
                    stats.downstream_cx_destroy.inc();
                    return;
                }
            }
        }
    };
    let state = Rc::new(ConnState {
        routes: RouteFinder::new(&manager.routes, &manager.filters),
        manager: Arc::clone(&manager),
        connection,
        worker,
        active: Cell::new(0),
        requests: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        last_progress: Cell::new(Instant::now()),
        stall_limit: Cell::new(manager.config.stream_idle_timeout),
        worn_out: Notify::new(),
    });
    if http2 {
        stats.downstream_cx_http2_total.inc();
        let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_http2_active);
        drive_http2(io, state, drain).await;
    } else {
        stats.downstream_cx_http1_total.inc();
        let _open = crate::upstream::Decrement::after_inc(stats.downstream_cx_http1_active);
        drive_http1(io, state, drain).await;
    }
    stats.downstream_cx_destroy.inc();
    stats.downstream_cx_length_ms.record(started.elapsed().as_millis() as u64);
}

/// How far a connection's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It serves.
    Open,
    /// Its client is told with the next answer.
    Draining,
    /// It ends with what is in flight.
    Closing,
}

macro_rules! drive {
    ($connection:expr, $state:expr, $drain:expr, $end:expr) => {{
        let (state, mut drain) = ($state, $drain);
        let mut connection = std::pin::pin!($connection);
        let mut stage = Stage::Open;
        // Counts from the first word of the end.
        let mut drained = std::pin::pin!(tokio::time::sleep(Duration::ZERO));
        let opened = Instant::now();
        loop {
            tokio::select! {
                biased;
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        protocol_error(&state, &error);
                    }
                    break;
                }
                (next, reason) = aside(end_of_life(&state, &mut drain, stage, opened)), if stage != Stage::Closing => {
                    if stage == Stage::Open {
                        reason.inc();
                        drained.set(tokio::time::sleep(state.worker.drain_time));
                    }
                    stage = next;
                    $end(connection.as_mut(), next);
                }
                () = drained.as_mut(), if stage != Stage::Open => break,
                () = aside(state.stalled()) => {
                    state.manager.stats.downstream_rq_idle_timeout.inc();
                    break;
                }
            }
        }
    }};
}

async fn drive_http1(io: DownstreamIo, state: Rc<ConnState>, drain: DrainSignal) {
    let (stream, read_ahead) = io.into_parts();
    let connection = ServerConnection::new(stream, read_ahead, &state.manager.config);
    let serving = Rc::clone(&connection).serve(Rc::clone(&state));
    let serving = async {
        serving.await;
        Ok::<(), hyper::Error>(())
    };
    drive!(serving, state, drain, |_, stage| match stage {
        Stage::Draining => connection.drain(),
        _ => connection.graceful_shutdown(),
    });
}

async fn drive_http2(io: DownstreamIo, state: Rc<ConnState>, drain: DrainSignal) {
    let config = &state.manager.config;
    let mut builder = http2::Builder::new(LocalExecutor);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.http2.max_concurrent_streams)
        .initial_stream_window_size(config.http2.initial_stream_window_size)
        .initial_connection_window_size(config.http2.initial_connection_window_size)
        .max_header_list_size(config.max_request_headers_kb.saturating_mul(1024));
    let service = {
        let state = Rc::clone(&state);
        service_fn(move |request: Request<Incoming>| {
            let begun = Begun::new(&state, Instant::now(), Version::HTTP_2);
            let handled = begun.handle(request.map(codec::Incoming::Http2), None);
            async { Ok::<_, Infallible>(handled.await) }
        })
    };
    // GOAWAY tells an idle client as well, and costs it nothing.
    let end = |connection: std::pin::Pin<&mut http2::Connection<_, _, _>>, _| connection.graceful_shutdown();
    drive!(builder.serve_connection(io, service), state, drain, end);
}

/// Ends when the connection shall take no further request, or one more: the next stage, and the counter that says why.
async fn end_of_life(state: &ConnState, drain: &mut DrainSignal, stage: Stage, opened: Instant) -> (Stage, Counter) {
    let (config, stats) = (&state.manager.config, &state.manager.stats);
    let too_old = async {
        match config.max_connection_duration {
            Some(limit) => tokio::time::sleep(limit.saturating_sub(opened.elapsed())).await,
            None => std::future::pending().await,
        }
    };
    let idle = async {
        let Some(limit) = config.idle_timeout else { return std::future::pending().await };
        loop {
            let busy = state.active.get() > 0;
            let left = if busy { limit } else { limit.saturating_sub(state.idle_since.get().elapsed()) };
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    };
    let drained = async {
        if stage == Stage::Open {
            drain.triggered().await;
        } else {
            drain.daemon_leaves().await;
        }
    };
    tokio::select! {
        () = drained => (if stage == Stage::Open { Stage::Draining } else { Stage::Closing }, stats.downstream_cx_drain_close),
        () = too_old => (Stage::Closing, stats.downstream_cx_max_duration_reached),
        () = idle => (Stage::Closing, stats.downstream_cx_idle_timeout),
        () = state.worn_out.notified() => (Stage::Closing, stats.downstream_cx_drain_close),
    }
}

fn protocol_error(state: &ConnState, error: &hyper::Error) {
    if error.is_parse() || error.is_parse_too_large() {
        state.manager.stats.downstream_cx_protocol_error.inc();
    }
    tracing::debug!(connection = state.connection.id, peer = %state.connection.remote, %error, "connection ended");
}

/// One request, from its head to its response's head. `refused`: the codec has found it wanting.
pub(super) async fn handle(
    begun: Begun,
    request: Request<codec::Incoming>,
    refused: Option<LocalReply>,
) -> Response<Body> {
    let Begun { mut end, progress, started } = begun;
    let state = Rc::clone(&end.state);
    let (mut head, incoming) = request.into_parts();
    let stats = &state.manager.stats;
    let no_body = http_body::Body::is_end_stream(&incoming);
    if no_body {
        progress.request_complete.set(Some(started));
    }
    let grpc = headers::is_grpc(&head.headers);
    end.grpc = grpc;
    end.http1 = head.version != Version::HTTP_2;
    let is_head = head.method == http::Method::HEAD;

    if let Err(reply) = headers::check_request(&head, state.manager.config.max_headers_count, refused) {
        end.keep_request(&head);
        return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head), &mut Vec::new());
    }
    let (config, connection) = (&state.manager.config, &state.connection);
    if let Err(reply) = normal::apply(&mut head, &state) {
        end.keep_request(&head);
        return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head), &mut Vec::new());
    }
    let random = fastrand::u64(..);
    let local_ip = local_ip(connection);
    let upgrade = Asked::of_request(&head);
    normal::mutate_early(&mut head, &state);
    let tls = connection.tls.as_ref();
    let trusted = match trust::prepare_request(&mut head, config, connection.remote, local_ip, tls) {
        Ok(trusted) => trusted,
        Err(reply) => {
            stats.downstream_rq_rejected_via_ip_detection.inc();
            end.keep_request(&head);
            return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head), &mut Vec::new());
        }
    };
    end.request_id = trusted.request_id;
    if let Some(upgrade) = &upgrade {
        upgrade.tell(&mut head.headers);
    }
    let mut cx = StreamCx {
        worker: Rc::clone(&state.worker),
        connection: Rc::clone(connection),
        remote: trusted.remote,
        internal: trusted.internal,
        route: None,
        random,
        cluster: None,
        weighted: None,
        override_dst: None,
        flags: ResponseFlags::default(),
        suppress_envoy_headers: false,
        keeps_request: config.local_replies.is_some(),
        reroute: false,
        shared: http::Extensions::new(),
        started,
        progress: Rc::clone(&progress),
        request: RefCell::default(),
    };
    cx.route = state.routes.route(&head, &cx.match_cx());
    cx.cluster = choose_cluster(&mut cx, &head);
    let mut body = if no_body {
        Body::Empty
    } else {
        Body::observed(incoming, Box::new(RequestObserver::new(Rc::clone(&progress))))
    };

    let mut filters: Vec<Box<dyn HttpFilter>> = Vec::new();
    let mut entries = config.http_filters.iter().enumerate();
    let mut pauses = 0;
    let mut route = cx.route.clone();
    if let Some(upgrade) = &upgrade {
        if !upgrade.is_allowed(&cx, &config.upgrades) {
            stats.downstream_rq_ws_on_non_ws_route.inc();
            end.keep_request(&head);
            end.keep_route(&cx);
            cx.keep_request(&head);
            filters.extend(unasked(entries, route.as_ref()));
            return answer(end, upgrade::refused(), grpc, is_head, local_reply::Asked::Stream(&mut cx), &mut filters);
        }
        end.upgraded(stats);
    }
    while let Some((position, entry)) = entries.next() {
        let told = PerRoute::new(route.as_ref(), position);
        if !told.is_enabled(!entry.disabled) {
            continue;
        }
        let flow = entry.source.with(|factory| {
            cx.suppress_envoy_headers |= factory.suppresses_envoy_headers();
            factory.request(&mut head, &mut body, &mut cx, told, &mut filters)
        });
        let flow = match (flow, filters.last_mut()) {
            (Some(Flow::Wait), Some(filter)) => {
                end.keep_request(&head);
                end.keep_route(&cx);
                let limits = waiting::limits(&state, &cx);
                let waiting = filter.wait_request(&mut head, &mut body, &mut cx);
                Box::pin(waiting::within(waiting, limits, &state, &progress)).await
            }
            (Some(flow), _) => flow,
            // ECDS has not delivered it in time, and there is no default.
            (None, _) => Flow::Respond(LocalReply::new(StatusCode::INTERNAL_SERVER_ERROR, "", ResponseFlags::NFCF, "")),
        };
        if std::mem::take(&mut cx.reroute) {
            cx.route = state.routes.route(&head, &cx.match_cx());
            cx.cluster = choose_cluster(&mut cx, &head);
            route.clone_from(&cx.route);
        }
        let reply = match flow {
            Flow::Continue | Flow::Wait => continue,
            Flow::Respond(reply) => reply,
            // What was there once may be gone again by the next time.
            _ if pauses == MAX_PAUSES => continue,
            missing => {
                pauses += 1;
                match Box::pin(wait_for(missing, &state, &mut cx, &head)).await {
                    Ok(true) => {
                        // As a stream that begins anew, which is what Envoy makes of it.
                        filters.clear();
                        entries = config.http_filters.iter().enumerate();
                        route.clone_from(&cx.route);
                        continue;
                    }
                    Ok(false) => continue,
                    Err(reply) => reply,
                }
            }
        };
        end.keep_request(&head);
        end.keep_route(&cx);
        cx.keep_request(&head);
        // Filters that have not seen the request see the answer.
        filters.extend(unasked(entries, route.as_ref()));
        return answer(end, reply, grpc, is_head, local_reply::Asked::Stream(&mut cx), &mut filters);
    }
    end.keep_request(&head);
    end.keep_route(&cx);
    cx.keep_request(&head);

    let route = cx.route.clone();
    let result = match route.as_ref().map(|route| &route.action) {
        None => {
            stats.no_route.inc();
            Err(LocalReply::new(StatusCode::NOT_FOUND, "", ResponseFlags::NR, "route_not_found"))
        }
        Some(RouteAction::DirectResponse { status, body }) => {
            stats.rq_direct_response.inc();
            let mut reply = LocalReply::new(*status, body.clone(), ResponseFlags::default(), "direct_response");
            if *status == StatusCode::CREATED || status.is_redirection() {
                reply.headers.extend(own_url(&head).map(|url| (LOCATION, url)));
            }
            Err(reply)
        }
        Some(RouteAction::Redirect(action)) => {
            stats.rq_redirect.inc();
            let rule = route.as_ref().map(|route| &route.route_match);
            Err(rule.map_or_else(
                || LocalReply::new(StatusCode::NOT_FOUND, "", ResponseFlags::NR, "route_not_found"),
                |rule| redirect(&head, rule, action),
            ))
        }
        Some(RouteAction::Forward(action)) => {
            stats.rq_total.inc();
            forward(&cx, &mut end, action, head, body).await
        }
    };
    let answered = match result {
        Ok(answered) => answered,
        Err(reply) => return answer(end, reply, grpc, is_head, local_reply::Asked::Stream(&mut cx), &mut filters),
    };

    let (mut response, mut incoming) = answered.response.into_parts();
    if let Some(upgrade) = &upgrade {
        upgrade.settle(&mut response, &mut incoming);
    }
    finish_response(&mut response, &cx, &end, answered.attempts);
    if filters.is_empty() {
        end.came_from_upstream(&response, &cx);
        let observer = ResponseObserver::new(EndHolder::Own(end), answered.timers, answered.connection);
        return Response::from_parts(response, Body::observed(incoming, Box::new(observer)));
    }
    let end = Rc::new(RefCell::new(end));
    let observer = ResponseObserver::new(EndHolder::Shared(Rc::clone(&end)), answered.timers, answered.connection);
    let mut body = Body::observed(incoming, Box::new(observer));
    let mut reply = None;
    for filter in filters.iter_mut().rev() {
        let mut flow = filter.response(&mut response, &mut body, &mut cx);
        if let Flow::Wait = flow {
            flow = filter.wait_response(&mut response, &mut body, &mut cx).await;
        }
        if let Flow::Respond(instead) = flow {
            reply = Some(instead);
            body = Body::Empty;
            break;
        }
    }
    let mut settled = end.borrow_mut();
    settled.filters = filters;
    if reply.is_none() {
        settled.came_from_upstream(&response, &cx);
    }
    drop(settled);
    // A body that has not ended holds it too.
    let end = Rc::into_inner(end).map(RefCell::into_inner);
    match (reply, end) {
        (Some(reply), Some(end)) => {
            return answer(end, reply, grpc, is_head, local_reply::Asked::Stream(&mut cx), &mut Vec::new());
        }
        (_, end) => {
            if let Body::Wrapped(_) = body {
                body.wrap(|body| Counted::new(body, progress, end));
            }
        }
    }
    Response::from_parts(response, body)
}

/// The filters of these that are on, for a request that they do not see.
fn unasked<'a>(
    entries: impl Iterator<Item = (usize, &'a HttpFilterEntry)>,
    route: Option<&RouteRef>,
) -> impl Iterator<Item = Box<dyn HttpFilter>> {
    entries.filter_map(move |(position, entry)| {
        let told = PerRoute::new(route, position);
        let made = told.is_enabled(!entry.disabled).then(|| entry.source.with(|factory| factory.stream(told)));
        made.flatten().flatten()
    })
}

fn choose_cluster(cx: &mut StreamCx, head: &RequestHead) -> Option<Rc<WorkerCluster>> {
    let RouteAction::Forward(action) = &cx.route.as_ref()?.action else { return None };
    match &action.cluster {
        ClusterChoice::Cluster(name) => cx.worker.clusters.get(name),
        ClusterChoice::Weighted(weighted) => match weighted.choose_index(cx.random) {
            Some(index) => {
                cx.weighted = Some(index);
                cx.worker.clusters.get(weighted.name(index))
            }
            // Runtime values leave it no cluster: as in Envoy, it is no route then.
            None => {
                cx.route = None;
                None
            }
        },
        ClusterChoice::Header(header) => cx.worker.clusters.get(head.headers.get(header)?.to_str().ok()?),
    }
}

/// The cluster that the route names.
fn cluster_name<'a>(cx: &'a StreamCx, head: &'a RequestHead) -> Option<&'a str> {
    let RouteAction::Forward(action) = &cx.route.as_ref()?.action else { return None };
    let name = match &action.cluster {
        ClusterChoice::Cluster(name) => name,
        ClusterChoice::Weighted(weighted) => weighted.choose(cx.random)?,
        ClusterChoice::Header(header) => head.headers.get(header)?.to_str().ok()?,
    };
    Some(name).filter(|name| !name.is_empty())
}

/// Has asked for what the request lacks, and waits. Whether it is there now.
async fn wait_for(missing: Flow, state: &ConnState, cx: &mut StreamCx, head: &RequestHead) -> Result<bool, LocalReply> {
    let idle = state.manager.config.stream_idle_timeout;
    let (wanted, limit) = match &missing {
        Flow::NeedsRoute => (state.routes.on_demand(head), None),
        Flow::NeedsCluster(clusters) => {
            let wanted = cluster_name(cx, head)
                .map(|name| Wanted::Cluster { source: Arc::clone(&clusters.from.source), name: name.into() });
            (wanted, Some(clusters.timeout))
        }
        Flow::Continue | Flow::Respond(_) | Flow::Wait => (None, None),
    };
    let Some(mut wait) = wanted.and_then(|wanted| cx.worker.on_demand.ask(wanted)) else { return Ok(false) };
    let earlier = limit.into_iter().chain(idle).min().unwrap_or(Duration::MAX / 4);
    let over = tokio::time::timeout(earlier, wait.over()).await;
    if over.is_err() && limit != Some(earlier) {
        state.manager.stats.downstream_rq_idle_timeout.inc();
        let complete = cx.progress.request_complete.get().is_some();
        let status = if complete { StatusCode::GATEWAY_TIMEOUT } else { StatusCode::REQUEST_TIMEOUT };
        return Err(LocalReply::new(status, "stream timeout", ResponseFlags::SI, "stream_idle_timeout"));
    }
    if let Flow::NeedsRoute = missing {
        cx.route = state.routes.route(head, &cx.match_cx());
    }
    cx.cluster = choose_cluster(cx, head);
    Ok(if let Flow::NeedsRoute = missing { cx.route.is_some() } else { cx.cluster.is_some() })
}

/// What the router and the connection manager do to an upstream's response.
fn finish_response(response: &mut ResponseHead, cx: &StreamCx, end: &StreamEnd, attempts: u32) {
    let manager = &end.state.manager;
    // Envoy counts from the request's end, which one for another protocol does not have.
    if !cx.suppress_envoy_headers && end.upgrade.is_none() {
        let milliseconds = cx.started.elapsed().as_millis() as u64;
        response.headers.insert(X_ENVOY_UPSTREAM_SERVICE_TIME, HeaderValue::from(milliseconds));
    }
    if let Some(route) = &cx.route
        && route.virtual_host().include_attempt_count_in_response
    {
        response.headers.insert(X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(attempts));
    }
    cx.mutate_response(response, end.host.as_ref().map(|(_, host)| host.host.display()));
    let upgrade = Asked::of_response(response);
    headers::prepare_response(response, &manager.config, end.request_id.as_ref());
    if let Some(upgrade) = upgrade {
        upgrade.tell(&mut response.headers);
    }
}

fn local_ip(connection: &ConnectionInfo) -> IpAddr {
    connection.node_ip.unwrap_or_else(|| connection.local.ip())
}
