//! Sends a request to its cluster within its time limits, as its route wants it to look.

use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use http::{
    HeaderName, HeaderValue, Method, Response, StatusCode, Uri,
    header::{HOST, SET_COOKIE},
    uri::Authority,
};

use super::{
    attempts::{Attempts, Shared},
    body::Body,
    choice,
    codec::{Incoming, h1::Upgrade},
    hash_policy,
    headers::{self, names::*},
    illegal,
    internal_redirect::Sent,
    mirror::mirror,
    path::set_path,
    redirect::rewrite_path,
    replay::Replay,
    request_stats::Counted,
    retry::RetryState,
    route_table::RouteRef,
    stream::{LocalReply, RequestHead, StreamCx},
    stream_end::{Budget, StreamEnd},
    strict_check,
    timeouts::Timeouts,
    timers::{Expired, Timers},
    upgrade,
    upstream_head::peer_name,
    waiting,
};
use crate::{
    access_log::ResponseFlags,
    config::model::{ForwardAction, HeaderMutations, HostRewrite, PathRewrite},
    runtime::clock,
    upstream::{Connection, HostCounter, Overload, Seen, WorkerCluster},
};

const DROP: HeaderName = HeaderName::from_static("x-envoy-drop-overload");
const UNCONDITIONAL_DROP: HeaderName = HeaderName::from_static("x-envoy-unconditional-drop-overload");

/// An upstream's answer.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    pub(super) connection: Connection,
    pub(super) timers: Timers,
    /// How many attempts it took.
    pub(super) attempts: u32,
    /// The request, where the response may redirect it.
    pub(super) sent: Option<Box<Sent>>,
}

/// Sends the request that `head` and `body` are. The future is made where it stays, see [`boxed`](super::boxed).
#[inline(always)]
pub(super) async fn forward(
    cx: &StreamCx,
    end: &mut StreamEnd,
    action: &ForwardAction,
    mut head: RequestHead,
    mut body: Body,
) -> Result<Answer, LocalReply> {
    let state = Rc::clone(&end.state);
    let config = &state.manager.config;
    let cluster = match admitted(cx, end, action, &head) {
        Ok(cluster) => cluster,
        Err(reply) => {
            end.keep_request(&head);
            end.keep_route(cx);
            return Err(reply);
        }
    };
    let virtual_host = cx.route.as_ref().map(RouteRef::virtual_host);
    let policy = action.retry_policy.as_deref().or(virtual_host.and_then(|host| host.retry_policy.as_deref()));
    let mut timeouts =
        Timeouts::take(action, policy, (config.max_stream_duration, cx.respects_expected_timeout), &mut head);
    let hedges = action.hedge_on_per_try_timeout;
    let hedges = hedges.unwrap_or_else(|| virtual_host.is_some_and(|host| host.hedge_on_per_try_timeout));
    timeouts.hedges = hedges;
    timeouts.tell(&mut head, cx);
    if upgrade::is_websocket(&head) {
        // The request has no end before its tunnel has: its answer is waited for from here on.
        cx.progress.awaited.set(Some(clock::now()));
    }
    let finished = finish_request(cx, action, &mut head, end.notes.counted.as_deref());
    let (mut hash, mut cookies) = (None, Vec::new());
    let wants_hash = |cluster: &Rc<WorkerCluster>| cluster.wants_hash();
    if !action.hash_policy.is_empty() && (wants_hash(&cluster) || cx.unless_connected.as_ref().is_some_and(wants_hash))
    {
        hash = hash_policy::hash(&action.hash_policy, &head, cx, &mut cookies);
    }
    if cluster.cluster.stats.budgets.is_some() {
        end.budget = Some(Budget { global: timeouts.global, per_try: timeouts.per_try(), attempt: clock::now() });
    }
    let mut retry = RetryState::take((policy, hedges), &mut head, end.notes.counted.clone());
    // Taps have been told of it, unless it is not sent.
    if finished.is_err() {
        end.keep_request(&head)
    } else {
        end.keep_sent(&head)
    }
    end.keep_route(cx);
    finished?;
    let limit = cx.route.as_ref().and_then(|route| route.body_buffer_limit);
    let limit = limit.or(virtual_host.and_then(|host| host.body_buffer_limit));
    let limit = limit.unwrap_or(u64::from(cx.connection.buffer_limit));
    let counter = cluster.cluster.stats.retry_or_shadow_abandoned;
    let mirrors = match &cx.route {
        Some(route) if action.mirrors.is_empty() => match &*route.virtual_host().mirrors {
            [] => route.mirrors_of_config(),
            mirrors => mirrors,
        },
        _ => &action.mirrors,
    };
    // What follows an upgrade is no request.
    if !mirrors.is_empty() && head.extensions.get::<Upgrade>().is_none() {
        mirror(mirrors, cx, &head, &mut body, timeouts.global, (limit, counter));
    }
    // A client that asks for another protocol has more to say than a request.
    let redirects = action.internal_redirect.is_some() && head.extensions.get::<Upgrade>().is_none();
    let mut replay = None;
    if (retry.is_some() || redirects) && !matches!(body, Body::Empty) {
        replay = Some(Replay::new(std::mem::take(&mut body), limit, counter));
    }
    let sent = redirects.then(|| Box::new(Sent { head: head.clone(), body: replay.clone() }));
    match (&mut retry, replay) {
        (Some(retry), replay) => {
            if retry.hedges {
                replay.iter().for_each(Replay::share);
            }
            retry.body = replay;
        }
        (None, Some(replay)) => body = replay.reader(),
        (None, None) => {}
    }
    let method = head.method.clone();
    let idle = action.idle_timeout.unwrap_or(config.stream_idle_timeout);
    end.state.allow_stall(idle);
    // A route's `idle_timeout` is not this in its place, whatever Envoy's API says: nor is it in Envoy.
    if let Some(flush) = action.flush_timeout.filter(|_| !end.http1) {
        cx.progress.flush.set(Some(flush));
        end.state.allow_stall(flush);
    }
    let sleeps = &cx.worker.sleeps;
    let mut timers =
        Timers::new(sleeps, Rc::clone(&cx.progress), cx.started, timeouts.global, idle, config.request_timeout);

    timers.limit_duration(timeouts.stream);
    let scheme_matches_upstream = config.scheme_matches_upstream;
    let peer = peer_name(&cluster, &head);
    let peer = peer.as_ref();
    let other_peer = cx.unless_connected.as_ref().and_then(|cluster| peer_name(cluster, &head));
    let other_peer = other_peer.as_ref();
    let shared =
        Shared { cx, cluster: &cluster, action, timeouts: &timeouts, peer, other_peer, scheme_matches_upstream };
    let metadata_match = choice::metadata_match(cx, action, &cluster);
    let (under_way, until) = (Cell::new(1), Cell::new(None));
    let mut attempts = Attempts {
        shared,
        retry,
        hash,
        cookies: RefCell::default(),
        count: 0,
        under_way,
        metadata_match,
        named: Cell::new(0),
        until,
    };
    let result = tokio::select! {
        biased;
        result = attempts.run(end, head, body) => result,
        expired = timers.expired() => {
            Err(expire(end, attempts.shared.cluster, expired, (&timeouts, attempts.under_way.get())))
        }
    };
    let (count, until) = (attempts.count, attempts.until.get());
    cookies.append(&mut attempts.cookies.take());
    drop(attempts);
    let (mut response, connection) = result.map_err(|mut reply| {
        if virtual_host.is_some_and(|host| host.include_attempt_count_in_response) {
            reply.headers.push((X_ENVOY_ATTEMPT_COUNT, HeaderValue::from(count)));
        }
        reply
    })?;
    for cookie in cookies {
        response.headers_mut().append(SET_COOKIE, cookie);
    }
    timers.limit_pauses(timeouts.per_try_idle);
    timers.limit_attempt(until);
    if upgrade::is_switched(&method, response.status()) {
        timers.request_answered();
        cx.progress.awaited.set(None);
        end.switched = true;
    }
    Ok(Answer { response, connection, timers, attempts: count, sent })
}

/// The cluster that the request may go to.
fn admitted(
    cx: &StreamCx,
    end: &mut StreamEnd,
    action: &ForwardAction,
    head: &RequestHead,
) -> Result<Rc<WorkerCluster>, LocalReply> {
    let Some(cluster) = cx.cluster.as_ref().map(Rc::clone) else {
        end.state.manager.stats.no_cluster.inc();
        return Err(LocalReply::new(action.cluster_not_found_status, "", ResponseFlags::NC, "cluster_not_found"));
    };
    end.notes.counted = cx.route.as_ref().and_then(|route| Counted::of(route, head));
    if let Some(reply) = strict_check::refusal(cx.strict_checks.as_deref().unwrap_or_default(), &head.headers) {
        return Err(reply);
    }
    admits(cx, end, &cluster)?;
    Ok(cluster)
}

/// Whether a cluster takes requests now.
///
/// # Errors
/// The answer in the place of its response.
pub(super) fn admits(cx: &StreamCx, end: &StreamEnd, cluster: &WorkerCluster) -> Result<(), LocalReply> {
    if cluster.cluster.refuses_for_maintenance() {
        return Err(maintenance(cluster, end));
    }
    match cluster.overload() {
        Overload::Passes => Ok(()),
        overload => Err(dropped(cx, cluster, end, overload == Overload::DropsAll)),
    }
}

/// The answer to a request that `upstream.maintenance_mode.<cluster>` refuses.
fn maintenance(cluster: &WorkerCluster, end: &StreamEnd) -> LocalReply {
    let stats = &cluster.cluster.stats;
    stats.upstream_rq_maintenance_mode.inc();
    let status = StatusCode::SERVICE_UNAVAILABLE;
    end.charge(cluster, status, None);
    let mut reply = LocalReply::new(status, "maintenance mode", ResponseFlags::UO, "maintenance_mode");
    reply.headers.push((X_ENVOY_OVERLOADED, HeaderValue::from_static("true")));
    reply
}

/// The answer to a request that `drop_overloads` has dropped.
fn dropped(cx: &StreamCx, cluster: &WorkerCluster, end: &StreamEnd, all: bool) -> LocalReply {
    let status = StatusCode::SERVICE_UNAVAILABLE;
    end.charge(cluster, status, None);
    cluster.cluster.dropped_overload.inc();
    let (text, flags, details, header) = if all {
        ("unconditional drop overload", ResponseFlags::UDO, "unconditional_drop_overload", UNCONDITIONAL_DROP)
    } else {
        ("drop overload", ResponseFlags::DO, "drop_overload", DROP)
    };
    let mut reply = LocalReply::new(status, text, flags, details);
    if !cx.suppress_envoy_headers {
        reply.headers.push((header, HeaderValue::from_static("true")));
    }
    reply
}

/// What the router does to a request's head, once for all attempts.
fn finish_request(
    cx: &StreamCx,
    action: &ForwardAction,
    head: &mut RequestHead,
    counted: Option<&Counted>,
) -> Result<(), LocalReply> {
    let suppress = cx.suppress_envoy_headers;
    if let Some(route) = &cx.route {
        mutate_request(cx, head, counted.and_then(Counted::virtual_cluster));
        // Before the path is rewritten: it may be made of that.
        let host = match &action.host_rewrite {
            HostRewrite::Format(format) => {
                Some(cx.format_value(head, format, "-").unwrap_or_else(illegal::value)).filter(|host| !host.is_empty())
            }
            HostRewrite::Literal(host) => Some(host.clone()),
            HostRewrite::Header(name) => head.headers.get(name).filter(|host| !host.is_empty()).cloned(),
            HostRewrite::PathRegex(rewrite) => HeaderValue::from_str(&rewrite.apply(head.uri.path())).ok(),
            HostRewrite::Auto | HostRewrite::None => None,
        };
        // The weighted cluster's comes first, as in Envoy, and is no rewrite that upstreams are told of.
        if let Some(host) = cx.weighted_options().and_then(|options| options.host_rewrite.clone()) {
            set_host(head, host, false, Original::Untold);
        }
        if let Some(host) = host {
            let original = if suppress { Original::Untold } else { Original::IfOther };
            set_host(head, host, action.append_x_forwarded_host, original);
        }
        let path = match (&head.method, &action.path_rewrite) {
            (&Method::CONNECT, _) => None,
            (_, PathRewrite::Format(format)) => {
                let path = cx.format_value(head, format, "");
                if path.is_none() {
                    illegal::pseudo(head, ":path");
                }
                path.and_then(|path| path.to_str().ok().map(str::to_owned)).filter(|path| !path.is_empty())
            }
            _ => rewrite_path(head.uri.path(), &route.route_match.path, &action.path_rewrite),
        };
        if let Some(mut path) = path {
            if let Some(query) = head.uri.query() {
                path = format!("{path}?{query}");
            }
            let before = head.uri.path_and_query().and_then(|path| HeaderValue::from_str(path.as_str()).ok());
            if let Some(before) = before.filter(|_| !suppress) {
                head.headers.insert(X_ENVOY_ORIGINAL_PATH, before);
            }
            if set_path(head, &path).is_err() {
                let none = ResponseFlags::default();
                return Err(LocalReply::new(StatusCode::INTERNAL_SERVER_ERROR, "", none, "rewritten_path_too_long"));
            }
        }
    }
    cx.keep_request(head);
    cx.progress.taps.borrow().iter().for_each(|tap| tap.request_now(head));
    Ok(())
}

/// Applies the mutations of all levels.
fn mutate_request(cx: &StreamCx, head: &mut RequestHead, virtual_cluster: Option<&str>) {
    if cx.header_mutations().all(HeaderMutations::is_empty) {
        return;
    }
    cx.format_counted(head, virtual_cluster, |headers, record| {
        for mutations in cx.header_mutations() {
            headers::mutate_request(headers, mutations, record);
        }
    });
}

/// Whether `x-envoy-original-host` tells the host before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Original {
    /// It does not.
    Untold,
    /// Where it was another one.
    IfOther,
    /// Also where it is the same.
    Told,
}

/// Replaces the request's host; the one before it is told in further headers.
pub(super) fn set_host(head: &mut RequestHead, host: HeaderValue, append_forwarded: bool, original: Original) {
    let before = match head.uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).ok(),
        None => head.headers.get(HOST).cloned(),
    };
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        if append_forwarded {
            headers::append(&mut head.headers, X_FORWARDED_HOST, &before, ",");
        }
        if original == Original::Told || original == Original::IfOther && before != host {
            head.headers.insert(X_ENVOY_ORIGINAL_HOST, before);
        }
    }
    if head.method == Method::CONNECT {
        // The host is where the tunnel leads to.
        if let Ok(authority) = Authority::try_from(host.as_bytes()) {
            head.uri = Uri::from(authority);
        }
        return;
    }
    if head.uri.authority().is_some() {
        head.uri = head.uri.path_and_query().map_or_else(Uri::default, |path| Uri::from(path.clone()));
    }
    head.headers.insert(HOST, host);
}

fn expire(
    end: &mut StreamEnd,
    cluster: &WorkerCluster,
    expired: Expired,
    (timeouts, attempts): (&Timeouts, usize),
) -> LocalReply {
    match expired {
        Expired::Route => {
            // Each attempt counts, also where there are several at a time.
            for _ in 0..attempts.max(1) {
                cluster.cluster.stats.upstream_rq_timeout.inc();
                end.count(|stats| stats.upstream_rq_timeout.inc());
                end.charge(cluster, timeouts.status, end.attempted());
            }
            end.judge(true);
            if let Some((_, host)) = &end.host {
                host.count(HostCounter::RqTimeout, 1);
                // As long as it had no connection it was not the host that took its time.
                if end.notes.has_connection() {
                    host.saw(Seen::TimedOut(timeouts.status.as_u16()));
                }
            }
            LocalReply::new(timeouts.status, timeouts.text(), ResponseFlags::UT, "response_timeout")
        }
        Expired::Attempt
        | Expired::Duration
        | Expired::Idle
        | Expired::PerTryIdle
        | Expired::Request
        | Expired::Answered
        | Expired::Malformed(_) => waiting::expire(&end.state, &end.progress, expired),
    }
}
