//! `envoy.filters.http.health_check`: answers health checks, by the daemon's own state and that of clusters, or lets them pass and
//! remembers the answer for a while.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::health_check::v3::HealthCheck, google::protobuf::Any};
use http::{HeaderName, HeaderValue, StatusCode};
use http_body_util::BodyExt;

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting,
    shared::{Kept, Shared},
};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, model::HeaderMatcher, parse},
    http::{
        body::Body,
        leaving::health_checks_fail,
        route_match::header_matches,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

const CHECKED_CLUSTER: HeaderName = HeaderName::from_static("x-envoy-upstream-healthchecked-cluster");
const IMMEDIATE_FAIL: HeaderName = HeaderName::from_static("x-envoy-immediate-health-check-fail");
const DEGRADED: HeaderName = HeaderName::from_static("x-envoy-degraded");

#[derive(Debug)]
struct HealthCheckFactory(Shared<Configured>);

#[derive(Debug)]
struct Configured {
    pass_through: bool,
    cache: Option<Cache>,
    /// Of each cluster, how much of it must be healthy.
    min_healthy: BTreeMap<String, f64>,
    headers: Vec<HeaderMatcher>,
    stats: Stats,
    _lease: Lease,
}

/// Checks that were answered here.
#[derive(Debug)]
struct Stats {
    request_total: Counter,
    ok: Counter,
    failed: Counter,
    cached_response: Counter,
    failed_cluster_not_found: Counter,
    failed_cluster_empty: Counter,
    failed_cluster_unhealthy: Counter,
    degraded: Counter,
}

/// The last answer. It is forgotten at the end of the period in which it came, as by Envoy's timer.
#[derive(Debug)]
struct Cache {
    since: Instant,
    period: Duration,
    /// The period's number, whether the host is degraded, the status.
    last: AtomicU64,
}

impl Cache {
    fn period(&self) -> u64 {
        let passed = self.since.elapsed().as_nanos() / self.period.as_nanos().max(1);
        // One more than those passed: 0 is none.
        u64::try_from(passed).unwrap_or(0) + 1
    }

    fn set(&self, status: StatusCode, degraded: bool) {
        let value = self.period() << 17 | u64::from(degraded) << 16 | u64::from(status.as_u16());
        self.last.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> Option<(StatusCode, bool)> {
        let value = self.last.load(Ordering::Relaxed);
        let status = StatusCode::from_u16((value & 0xffff) as u16).ok()?;
        (value >> 17 == self.period()).then_some((status, value >> 16 & 1 == 1))
    }
}

impl Configured {
    /// Whether the check is answered here.
    fn answers(&self) -> bool {
        !self.pass_through || health_checks_fail() || self.cache.as_ref().is_some_and(|cache| cache.get().is_some())
    }

    fn reply(&self, cx: &StreamCx) -> LocalReply {
        let stats = &self.stats;
        stats.request_total.inc();
        let (status, degraded, details) = if health_checks_fail() {
            (StatusCode::SERVICE_UNAVAILABLE, false, "health_check_failed")
        } else if let Some((status, degraded)) = self.cache.as_ref().and_then(Cache::get) {
            stats.cached_response.inc();
            (status, degraded, "health_check_cached")
        } else {
            let (status, details) = self.clusters(cx);
            (status, false, details)
        };
        let (counter, flags) =
            if status.is_success() { (stats.ok, ResponseFlags::default()) } else { (stats.failed, ResponseFlags::LH) };
        counter.inc();
        let mut reply = LocalReply::new(status, "", flags, details);
        if degraded {
            stats.degraded.inc();
            reply.headers.push((DEGRADED, HeaderValue::from_static("")));
        }
        reply
    }

    fn clusters(&self, cx: &StreamCx) -> (StatusCode, &'static str) {
        let down = StatusCode::SERVICE_UNAVAILABLE;
        for (name, least) in &self.min_healthy {
            let Some(cluster) = cx.worker.clusters.get(name) else {
                self.stats.failed_cluster_not_found.inc();
                return (down, "health_check_failed_no_cluster_found");
            };
            let stats = &cluster.cluster.stats;
            let total = stats.membership_total.value() as f64;
            let healthy = (stats.membership_healthy.value() + stats.membership_degraded.value()) as f64;
            if total == 0.0 && *least > 0.0 {
                self.stats.failed_cluster_empty.inc();
                return (down, "health_check_failed_cluster_empty");
            }
            if 100.0 * healthy < total * least {
                self.stats.failed_cluster_unhealthy.inc();
                return (down, "health_check_failed_cluster_unhealthy");
            }
        }
        (
            StatusCode::OK,
            if self.min_healthy.is_empty() { "health_check_ok" } else { "health_check_ok_cluster_healthy" },
        )
    }
}

impl HttpFilterFactory for HealthCheckFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let check = self.0.headers.iter().all(|matcher| header_matches(matcher, head));
        if !check {
            if health_checks_fail() {
                instances.push(Box::new(Failing));
            }
            return Flow::Continue;
        }
        cx.progress.health_check.set(true);
        instances.push(Box::new(HealthCheckFilter(self.0.keep())));
        match (self.0.answers(), http_body::Body::is_end_stream(body)) {
            (false, _) => Flow::Continue,
            (true, true) => Flow::Respond(self.0.reply(cx)),
            (true, false) => Flow::Wait,
        }
    }
}

/// A health check.
#[derive(Debug)]
struct HealthCheckFilter(Kept<Configured>);

impl HttpFilter for HealthCheckFilter {
    fn wait_request<'a>(
        &'a mut self,
        _head: &'a mut RequestHead,
        body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async {
            // Nobody wants it, but it has to be over.
            while let Some(Ok(_)) = body.frame().await {}
            Flow::Respond(self.0.reply(cx))
        })
    }

    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        if let Some(cache) = &self.0.cache {
            cache.set(head.status, head.headers.contains_key(DEGRADED));
        }
        let cluster = crate::http::node::this().map_or(HeaderValue::from_static(""), |node| node.cluster.clone());
        head.headers.insert(CHECKED_CLUSTER, cluster);
        if health_checks_fail() {
            head.headers.insert(IMMEDIATE_FAIL, HeaderValue::from_static("true"));
        }
        Flow::Continue
    }
}

/// Any other request while the daemon fails health checks.
#[derive(Debug)]
struct Failing;

impl HttpFilter for Failing {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        head.headers.insert(IMMEDIATE_FAIL, HeaderValue::from_static("true"));
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let HealthCheck { pass_through_mode, cache_time, cluster_min_healthy_percentages, headers } =
        unpack(typed_config, cx.path)?;
    let pass_through = pass_through_mode.is_some_and(|mode| mode.value);
    let period = parse::duration(cache_time, cx.path, "cache_time")?.filter(|period| !period.is_zero());
    if !pass_through && period.is_some() {
        let text = "cache_time_ms must not be set when path_through_mode is disabled";
        return Err(FieldError::new(format!("{}.cache_time", cx.path), text));
    }
    let cache = period.map(|period| Cache { since: Instant::now(), period, last: AtomicU64::new(0) });
    let matcher = |(index, matcher)| parse::matcher::header(matcher, &format!("{}.headers[{index}]", cx.path));
    let scope = Scope::http(cx.stat_prefix).child("health_check");
    let counter = |name| scope.counter(name);
    let stats = Stats {
        request_total: counter("request_total"),
        ok: counter("ok"),
        failed: counter("failed"),
        cached_response: counter("cached_response"),
        failed_cluster_not_found: counter("failed_cluster_not_found"),
        failed_cluster_empty: counter("failed_cluster_empty"),
        failed_cluster_unhealthy: counter("failed_cluster_unhealthy"),
        degraded: counter("degraded"),
    };
    Ok(Arc::new(HealthCheckFactory(Shared::new(Configured {
        stats,
        _lease: scope.lease(),
        pass_through,
        cache,
        min_healthy: if pass_through {
            BTreeMap::new()
        } else {
            cluster_min_healthy_percentages.into_iter().map(|(name, percent)| (name, percent.value)).collect()
        },
        headers: headers.iter().enumerate().map(matcher).collect::<Result<_, _>>()?,
    }))))
}
