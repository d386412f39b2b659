//! One request: past the checks of its head to its route and the filters, and its answer back.

mod anew;

use std::{
    cell::RefCell,
    net::{IpAddr, SocketAddr},
    ops::Range,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use http::{HeaderValue, Method, Request, Response, StatusCode, Version, header::LOCATION};

use self::anew::{lead, redirected};
use super::{
    RouteRef,
    begun::Begun,
    body::Body,
    cluster_choice::{choose_cluster, cluster_name},
    codec::{self, h1::Upgrade},
    conn_manager::ConnState,
    filters::{Flow, HttpFilter, Led, PerRoute},
    forward::forward,
    headers::{self, names::*},
    internal_redirect::Trail,
    local_reply::{self, answer, answer_stream},
    normal,
    observe::{EndHolder, RequestObserver, ResponseObserver},
    redirect::{own_url, redirect},
    stream::{LocalReply, MaxHeaders, RequestHead, ResponseHead, StreamCx},
    stream_end::StreamEnd,
    trust,
    upgrade::{self, Asked},
    waiting::{self, Counted},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{HttpConnectionManagerConfig, HttpFilterEntry, RedirectPath, RouteAction},
    listener::ConnectionInfo,
    on_demand::Wanted,
    runtime::clock,
};

/// How often one request may wait for what it lacks.
const MAX_PAUSES: u8 = 8;

/// One request, from its head to its response's head. `refused`: the codec has found it wanting.
#[inline(always)]
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
        return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head));
    }
    let (config, connection) = (&state.manager.config, &state.connection);
    if let Err(reply) = normal::apply(&mut head, &state) {
        end.keep_request(&head);
        return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head));
    }
    let local_ip = local_ip(connection);
    let upgrade = Asked::of_request(&head);
    normal::mutate_early(&mut head, &state);
    let tls = connection.tls();
    let trusted = match trust::prepare_request(&mut head, config, connection.remote, local_ip, tls) {
        Ok(trusted) => trusted,
        Err(reply) => {
            stats.downstream_rq_rejected_via_ip_detection.inc();
            end.keep_request(&head);
            return answer(end, reply, grpc, is_head, local_reply::Asked::Head(&head));
        }
    };
    end.request_id = trusted.request_id;
    if !trusted.internal {
        state.routes.remove_internal_only(&mut head);
    }
    if let Some(upgrade) = &upgrade {
        upgrade.tell(&mut head.headers);
    }
    trust::forward_client_cert(&mut head, config, connection);
    let body = if no_body {
        Body::Empty
    } else {
        Body::observed(incoming, Box::new(RequestObserver::new(Rc::clone(&progress), Rc::clone(&state))))
    };
    let (remote, internal) = (trusted.remote, trusted.internal);
    let mut arrived = Arrived { head, body, upgrade, remote, internal, trail: None, custom_response: None };
    loop {
        match serve(end, arrived).await {
            Ok(response) => return response,
            Err(again) => (end, arrived) = *again,
        }
    }
}

/// A request that is what it shall be for routes and filters.
struct Arrived {
    head: RequestHead,
    body: Body,
    upgrade: Option<Asked>,
    remote: SocketAddr,
    internal: bool,
    /// Where redirects have led it.
    trail: Option<Box<Trail>>,
    /// What has led it here in the place of a response.
    custom_response: Option<Led>,
}

/// Takes a request through filters and router to its response's head, or to a redirect that is followed here: the stream that
/// begins then. The future is made where it stays, see [`boxed`](super::boxed).
#[inline(always)]
async fn serve(mut end: StreamEnd, arrived: Arrived) -> Result<Response<Body>, Box<(StreamEnd, Arrived)>> {
    let Arrived { mut head, mut body, upgrade, remote, internal, trail, custom_response } = arrived;
    let (state, progress) = (Rc::clone(&end.state), Rc::clone(&end.progress));
    end.internal = internal;
    let (config, stats) = (&state.manager.config, &state.manager.stats);
    let (grpc, is_head) = (end.grpc, head.method == http::Method::HEAD);
    let random = fastrand::u64(..);
    let mut cx = StreamCx {
        worker: Rc::clone(&state.worker),
        connection: Rc::clone(&state.connection),
        remote,
        internal,
        route: None,
        random,
        cluster: None,
        override_dst: None,
        unless_connected: None,
        source: state.connection.source,
        override_host: None,
        upstream_host: None,
        local_reply: None,
        flags: ResponseFlags::default(),
        suppress_envoy_headers: false,
        respects_expected_timeout: false,
        strict_checks: None,
        keeps_request: config.local_replies.is_some(),
        reroute: false,
        max_headers: MaxHeaders { count: config.max_headers_count, kilobytes: config.max_request_headers_kb },
        shared: http::Extensions::new(),
        custom_response,
        started: end.started,
        progress: Rc::clone(&progress),
        request: RefCell::default(),
    };
    cx.route = state.routes.route(&head, &cx.match_cx());
    cx.cluster = choose_cluster(&mut cx, &head);
    if config.log_new_requests {
        end.log_now(Some(&head), &cx, "DownstreamStart");
    }

    let mut filters: Vec<Box<dyn HttpFilter>> = Vec::new();
    let mut chain = config.chain.clone();
    let mut entries = places(config, &chain);
    let mut pauses = 0;
    let mut route = cx.route.clone();
    // A CONNECT that leads nowhere is just that.
    if let Some(upgrade) = upgrade.as_ref().filter(|_| head.method != Method::CONNECT || cx.route.is_some()) {
        if !upgrade.is_allowed(&cx, &config.upgrades) {
            stats.downstream_rq_ws_on_non_ws_route.inc();
            end.keep_request(&head);
            end.keep_route(&cx);
            cx.keep_request(&head);
            filters.extend(unasked(entries, route.as_ref()));
            return answer_or_lead(end, upgrade::refused(), (grpc, is_head), &mut cx, filters).await;
        }
        end.upgraded(stats);
        chain = upgrade.chain(config);
        entries = places(config, &chain);
    }
    while let Some((position, entry)) = entries.next() {
        let told = PerRoute::new(route.as_ref(), position);
        if !told.is_enabled(!entry.disabled) {
            continue;
        }
        let flow = entry.source.with(|factory| {
            cx.suppress_envoy_headers |= factory.suppresses_envoy_headers();
            cx.respects_expected_timeout |= factory.respects_expected_timeout();
            if let Some(checks) = factory.strict_checks() {
                cx.strict_checks = Some(Arc::clone(checks));
            }
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
            Flow::Continue | Flow::Wait | Flow::Redirect(_) => continue,
            Flow::Respond(reply) | Flow::Replace(reply) => reply,
            // What was there once may be gone again by the next time.
            _ if pauses == MAX_PAUSES => continue,
            missing => {
                pauses += 1;
                match Box::pin(wait_for(missing, &state, &mut cx, &head)).await {
                    Ok(true) => {
                        // As a stream that begins anew, which is what Envoy makes of it.
                        filters.clear();
                        progress.taps.take();
                        progress.at_end.take();
                        entries = places(config, &chain);
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
        return answer_or_lead(end, reply, (grpc, is_head), &mut cx, filters).await;
    }
    // The router keeps a request that it forwards as it is sent.
    if !matches!(cx.route.as_ref().map(|route| &route.action), Some(RouteAction::Forward(_))) {
        end.keep_request(&head);
        end.keep_route(&cx);
    }
    cx.keep_request(&head);

    let route = cx.route.clone();
    stats.rq_total.inc();
    let result = match route.as_ref().map(|route| &route.action) {
        None => {
            stats.no_route.inc();
            Err(LocalReply::new(StatusCode::NOT_FOUND, "", ResponseFlags::NR, "route_not_found"))
        }
        Some(RouteAction::DirectResponse { status, body, format }) => {
            stats.rq_direct_response.inc();
            let mut reply = LocalReply::new(*status, body.clone(), ResponseFlags::default(), "direct_response");
            if let Some(format) = format {
                cx.direct_response(&head, *status, &mut reply, format);
            }
            if *status == StatusCode::CREATED || status.is_redirection() {
                reply.headers.extend(own_url(&head).map(|url| (LOCATION, url)));
            }
            Err(reply)
        }
        Some(RouteAction::Redirect(action)) => {
            stats.rq_direct_response.inc();
            let made = match &action.path {
                RedirectPath::Format(format) => cx.format_value(&mut head, format, ""),
                _ => None,
            };
            let made = made.as_ref().and_then(|path| path.to_str().ok()).unwrap_or_default();
            let rule = route.as_ref().map(|route| &route.route_match);
            Err(rule.map_or_else(
                || LocalReply::new(StatusCode::NOT_FOUND, "", ResponseFlags::NR, "route_not_found"),
                |rule| redirect(&head, rule, action, made),
            ))
        }
        Some(RouteAction::Forward(action)) => forward(&cx, &mut end, action, head, body).await,
    };
    // From here on it is the request of the cluster that it has gone to.
    if cx.progress.left_tunnel.get()
        && let Some(cluster) = cx.unless_connected.take()
    {
        cx.cluster = Some(cluster);
        end.keep_route(&cx);
    }
    let answered = match result {
        Ok(answered) => answered,
        Err(reply) => return answer_or_lead(end, reply, (grpc, is_head), &mut cx, filters).await,
    };

    let (mut response, mut incoming) = answered.response.into_parts();
    if let Some(sent) = answered.sent {
        let trail = trail.unwrap_or_default();
        if let Some(arrived) = redirected(&sent, &response, &cx, &end, trail) {
            if http_body::Body::is_end_stream(&incoming) {
                answered.connection.release();
            }
            if end.is_logged() {
                // As in Envoy, the line shows where the redirect leads.
                end.keep_sent(&arrived.head);
                if cx.route.as_ref().is_some_and(|route| route.virtual_host().include_request_attempt_count) {
                    end.keep_attempt(answered.attempts);
                }
                cx.route = state.routes.route(&arrived.head, &cx.match_cx());
                cx.cluster = choose_cluster(&mut cx, &arrived.head);
                end.keep_route(&cx);
            }
            end.redirected(&response);
            end.filters = filters;
            let next = end.renewed();
            drop(end);
            return Err(Box::new((next, arrived)));
        }
    }
    if let Some(cluster) = &cx.cluster {
        end.charge_response(cluster, response.status, &response.headers);
    }
    if let Some(upgrade) = &upgrade {
        upgrade.settle(&mut response, &mut incoming);
    }
    finish_response(&mut response, &cx, &end, answered.attempts);
    if filters.is_empty() {
        headers::sign_response(&mut response, &end.state.manager.config, end.request_id.as_ref());
        end.came_from_upstream(&mut response, &cx);
        let observer = ResponseObserver::new(EndHolder::Own(end), answered.timers, answered.connection);
        return Ok(Response::from_parts(response, Body::observed(incoming, Box::new(observer))));
    }
    cx.upstream_host = end.host.as_ref().map(|(_, host)| Rc::clone(host));
    let end = Rc::new(RefCell::new(end));
    let observer = ResponseObserver::new(EndHolder::Shared(Rc::clone(&end)), answered.timers, answered.connection);
    let mut body = Body::observed(incoming, Box::new(observer));
    let (mut reply, mut led) = (None, None);
    for filter in filters.iter_mut().rev() {
        let mut flow = filter.response(&mut response, &mut body, &mut cx);
        if let Flow::Wait = flow {
            flow = filter.wait_response(&mut response, &mut body, &mut cx).await;
        }
        end.borrow_mut().clears_details = matches!(flow, Flow::Replace(_));
        match flow {
            Flow::Respond(instead) | Flow::Replace(instead) => {
                reply = Some(instead);
                body = Body::Empty;
                break;
            }
            Flow::Redirect(redirect) => {
                led = lead(redirect, &state, &cx);
                if led.is_some() {
                    body = Body::Empty;
                    break;
                }
            }
            Flow::Continue | Flow::Wait | Flow::NeedsRoute | Flow::NeedsCluster(_) => {}
        }
    }
    if let Some(arrived) = led {
        let mut ended = end.borrow_mut();
        ended.filters = filters;
        return Err(Box::new((ended.led_on(&response), arrived)));
    }
    {
        let mut settled = end.borrow_mut();
        settled.filters = filters;
        if reply.is_none() {
            headers::sign_response(&mut response, &settled.state.manager.config, settled.request_id.as_ref());
            settled.came_from_upstream(&mut response, &cx);
        }
    }
    // A body that has not ended holds it too.
    let end = Rc::into_inner(end).map(RefCell::into_inner);
    match (reply, end) {
        (Some(reply), Some(end)) => {
            return answer_or_lead(end, reply, (grpc, is_head), &mut cx, Vec::new()).await;
        }
        (_, end) => {
            if let Body::Wrapped(_) = body {
                body.wrap(|body| Counted::new(body, progress, end));
            }
        }
    }
    Ok(Response::from_parts(response, body))
}

/// Answers a request here; or leads it on where a filter wants that in the place of the answer.
async fn answer_or_lead(
    end: StreamEnd,
    reply: LocalReply,
    (grpc, is_head): (bool, bool),
    cx: &mut StreamCx,
    mut filters: Vec<Box<dyn HttpFilter>>,
) -> Result<Response<Body>, Box<(StreamEnd, Arrived)>> {
    let state = Rc::clone(&end.state);
    let find = |redirect, cx: &StreamCx| lead(redirect, &state, cx);
    answer_stream(end, reply, grpc, is_head, cx, &mut filters, find).await.map_err(Box::new)
}

/// These filters, each with its place.
fn places<'a>(
    config: &'a HttpConnectionManagerConfig,
    chain: &Range<usize>,
) -> impl Iterator<Item = (usize, &'a HttpFilterEntry)> + use<'a> {
    // A chain is a part of the list.
    chain.clone().zip(config.http_filters.get(chain.clone()).unwrap_or_default())
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

/// Has asked for what the request lacks, and waits. Whether it is there now.
async fn wait_for(missing: Flow, state: &ConnState, cx: &mut StreamCx, head: &RequestHead) -> Result<bool, LocalReply> {
    let (wanted, limit) = match &missing {
        Flow::NeedsRoute => (state.routes.on_demand(head), None),
        Flow::NeedsCluster(clusters) => {
            let wanted = cluster_name(cx, head)
                .map(|name| Wanted::Cluster { source: Arc::clone(&clusters.from.source), name: name.into() });
            (wanted, Some(clusters.timeout))
        }
        Flow::Continue | Flow::Respond(_) | Flow::Replace(_) | Flow::Redirect(_) | Flow::Wait => (None, None),
    };
    let Some(mut wait) = wanted.and_then(|wanted| cx.worker.on_demand.ask(wanted)) else { return Ok(false) };
    let mut limits = waiting::limits(state, cx);
    tokio::select! {
        biased;
        // Where nothing has come until then, the request goes without it.
        _ = tokio::time::timeout(limit.unwrap_or(Duration::MAX / 4), wait.over()) => {}
        expired = limits.expired() => return Err(waiting::expire(state, &cx.progress, expired)),
    }
    if let Flow::NeedsRoute = missing {
        cx.route = state.routes.route(head, &cx.match_cx());
    }
    cx.cluster = choose_cluster(cx, head);
    Ok(if let Flow::NeedsRoute = missing { cx.route.is_some() } else { cx.cluster.is_some() })
}

/// What the router and the connection manager do to an upstream's response.
fn finish_response(response: &mut ResponseHead, cx: &StreamCx, end: &StreamEnd, attempts: u32) {
    // Counted from the request's end, as in Envoy: one that has not ended yet has no such time, nor has one for another protocol.
    let tunnel = response.extensions.get::<Upgrade>().is_some() || end.upgrade.is_some();
    if let Some(complete) = cx.progress.request_complete.get().filter(|_| !cx.suppress_envoy_headers && !tunnel) {
        let milliseconds = clock::since(complete).as_millis() as u64;
        response.headers.insert(X_ENVOY_UPSTREAM_SERVICE_TIME, HeaderValue::from(milliseconds));
    }
    if let Some(route) = &cx.route
        && route.virtual_host().include_attempt_count_in_response
    {
        response.headers.insert(X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(attempts));
    }
    cx.mutate_response(response, end);
    let upgrade = Asked::of_response(response);
    headers::strip_hop_by_hop(&mut response.headers);
    if let Some(upgrade) = upgrade {
        upgrade.tell(&mut response.headers);
    }
}

fn local_ip(connection: &ConnectionInfo) -> IpAddr {
    connection.node_ip.unwrap_or_else(|| connection.local.ip())
}
