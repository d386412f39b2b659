//! `envoy.filters.http.fault`: delays requests, answers them in a service's place, and slows responses down.

use std::{
    collections::HashSet,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::{
        common::fault::v3::{FaultDelay, FaultRateLimit, fault_delay::FaultDelaySecifier, fault_rate_limit::LimitType},
        http::fault::v3::{FaultAbort, HttpFault, fault_abort::ErrorType},
    },
    google::protobuf::Any,
};
use http::StatusCode;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig, Waiting,
    shared::{Kept, Shared},
};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, model::HeaderMatcher, parse},
    http::{
        body::{Body, BodyError, WrappedBody},
        route_match::header_matches,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::{Fraction, Key, RuntimeInteger},
    stats::{Counter, Gauge, Lease, Scope},
};

/// How often a slowed response goes on.
const SLICE: Duration = Duration::from_millis(50);

#[derive(Debug)]
struct FaultFactory {
    configured: Shared<Configured>,
    /// The filter's, also for faults of routes: streams with a fault hold on to them.
    stats: Shared<Stats>,
}

/// What is configured: of the filter, or of a route in its place. Streams with a fault hold on to it.
#[derive(Debug)]
struct Configured {
    /// Only requests to this cluster.
    upstream_cluster: Option<Box<str>>,
    /// Only requests of these nodes; empty: of all.
    downstream_nodes: HashSet<String>,
    /// Only requests with all of these.
    headers: Vec<HeaderMatcher>,
    delay: Option<Delay>,
    abort: Option<Abort>,
    rate_limit: Option<RateLimit>,
    max_active: RuntimeInteger,
}

#[derive(Debug)]
struct Stats {
    delays_injected: Counter,
    aborts_injected: Counter,
    response_rl_injected: Counter,
    faults_overflow: Counter,
    active_faults: Gauge,
    _lease: Lease,
}

impl Stats {
    fn answer(&self, reply: LocalReply) -> Flow {
        self.aborts_injected.inc();
        Flow::Respond(reply)
    }
}

/// The share of requests that get a fault.
#[derive(Debug)]
struct Share {
    default: Fraction,
    key: Key,
    /// A request may ask for less by this header.
    header: Option<&'static str>,
}

impl Share {
    fn includes(&self, head: &RequestHead) -> bool {
        let mut default = self.default;
        if let Some(asked) = self.header.and_then(|name| number(head, name)) {
            default.numerator = default.numerator.min(u32::try_from(asked).unwrap_or(u32::MAX));
        }
        self.key.fraction().unwrap_or(default).includes(fastrand::u64(..))
    }
}

/// A number that is configured, or that a request's header says.
#[derive(Debug)]
enum Amount {
    Fixed(u64),
    Header(&'static str),
}

impl Amount {
    fn of(&self, head: &RequestHead) -> Option<u64> {
        match self {
            Amount::Fixed(amount) => Some(*amount),
            Amount::Header(name) => number(head, name),
        }
    }
}

fn number(head: &RequestHead, header: &str) -> Option<u64> {
    head.headers.get(header)?.to_str().ok()?.parse().ok()
}

#[derive(Debug)]
struct Delay {
    share: Share,
    milliseconds: Amount,
    key: Key,
}

#[derive(Debug)]
struct Abort {
    share: Share,
    http_status: Option<Amount>,
    http_key: Key,
    grpc_status: Option<Amount>,
    grpc_key: Key,
    body: Bytes,
}

#[derive(Debug)]
struct RateLimit {
    share: Share,
    kib_per_second: Amount,
}

impl Configured {
    fn concerns(&self, head: &RequestHead, cx: &StreamCx) -> bool {
        let cluster = cx.cluster.as_ref().map(|cluster| &*cluster.cluster.config.name);
        let node = || head.headers.get("x-envoy-downstream-service-node").and_then(|node| node.to_str().ok());
        self.upstream_cluster.as_ref().is_none_or(|wanted| cluster == Some(&**wanted))
            && (self.downstream_nodes.is_empty() || node().is_some_and(|node| self.downstream_nodes.contains(node)))
            && self.headers.iter().all(|matcher| header_matches(matcher, head))
    }

    /// How long this request is to be delayed.
    fn delay(&self, head: &RequestHead) -> Option<Duration> {
        let delay = self.delay.as_ref().filter(|delay| delay.share.includes(head))?;
        let milliseconds = delay.milliseconds.of(head)?;
        let milliseconds = delay.key.integer().unwrap_or(milliseconds);
        Some(Duration::from_millis(milliseconds)).filter(|delay| !delay.is_zero())
    }

    /// The answer that this request is to get.
    fn abort(&self, head: &RequestHead) -> Option<LocalReply> {
        let abort = self.abort.as_ref().filter(|abort| abort.share.includes(head))?;
        let status = |code: u64| u16::try_from(code).ok().and_then(|code| StatusCode::from_u16(code).ok());
        let in_range = |code: &u64| (200..600).contains(code);
        let http_status = abort.http_status.as_ref().and_then(|amount| amount.of(head)).filter(in_range);
        let http_status = http_status.map(|code| abort.http_key.integer().unwrap_or(code)).and_then(status);
        let grpc_status = || abort.grpc_status.as_ref().and_then(|amount| amount.of(head));
        let grpc_status = || grpc_status().map(|code| abort.grpc_key.integer().unwrap_or(code));
        let (status, grpc_status) = match (http_status, grpc_status) {
            (Some(status), _) => (status, None),
            (None, grpc_status) => (StatusCode::OK, Some(u16::try_from(grpc_status()?).ok()?)),
        };
        let mut reply = LocalReply::new(status, abort.body.clone(), ResponseFlags::FI, "fault_filter_abort");
        reply.grpc_status = grpc_status;
        Some(reply)
    }

    /// How many bytes a second the response is to be slowed to.
    fn rate(&self, head: &RequestHead) -> Option<u64> {
        let limit = self.rate_limit.as_ref().filter(|limit| limit.share.includes(head))?;
        limit.kib_per_second.of(head).filter(|kib| *kib > 0).map(|kib| kib.saturating_mul(1024))
    }

    /// A place among the faults that there may be at a time.
    fn begin(configured: &Shared<Configured>, stats: &Shared<Stats>) -> Option<FaultFilter> {
        if stats.active_faults.value() >= configured.max_active.get() {
            stats.faults_overflow.inc();
            return None;
        }
        stats.active_faults.inc();
        let (configured, stats) = (configured.keep(), stats.keep());
        Some(FaultFilter { configured, stats, delay: Duration::ZERO, rate: None })
    }
}

impl HttpFilterFactory for FaultFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let stats = &self.stats;
        let configured: &Shared<Configured> = route.most_specific().unwrap_or(&self.configured);
        if !configured.concerns(head, cx) {
            return Flow::Continue;
        }
        // All faults of a request are one.
        let mut fault: Option<FaultFilter> = None;
        if let Some(rate) = configured.rate(head) {
            fault = Configured::begin(configured, stats);
            if let Some(fault) = &mut fault {
                stats.response_rl_injected.inc();
                fault.rate = Some(rate);
            }
        }
        let mut flow = Flow::Continue;
        if let Some(delay) = configured.delay(head) {
            fault = fault.or_else(|| Configured::begin(configured, stats));
            if let Some(fault) = &mut fault {
                stats.delays_injected.inc();
                cx.flags |= ResponseFlags::DI;
                fault.delay = delay;
                flow = Flow::Wait;
            }
        }
        if let (Flow::Continue, Some(reply)) = (&flow, configured.abort(head)) {
            fault = fault.or_else(|| Configured::begin(configured, stats));
            if fault.is_some() {
                flow = stats.answer(reply);
            }
        }
        if let Some(fault) = fault {
            instances.push(Box::new(fault));
        }
        flow
    }
}

/// A stream with a fault.
#[derive(Debug)]
struct FaultFilter {
    configured: Kept<Configured>,
    stats: Kept<Stats>,
    delay: Duration,
    rate: Option<u64>,
}

impl Drop for FaultFilter {
    fn drop(&mut self) {
        self.stats.active_faults.dec();
    }
}

impl HttpFilter for FaultFilter {
    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async {
            tokio::time::sleep(self.delay).await;
            match self.configured.abort(head) {
                Some(reply) => self.stats.answer(reply),
                None => Flow::Continue,
            }
        })
    }

    fn response(&mut self, _head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        if let Some(rate) = self.rate
            && !http_body::Body::is_end_stream(body)
        {
            body.wrap(|body| Slowed::new(body, rate));
        }
        Flow::Continue
    }
}

/// A body that passes at a rate.
struct Slowed {
    body: Body,
    bytes_per_second: u64,
    /// What has come and may not pass yet.
    held: Bytes,
    /// When more may pass.
    at: Instant,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Slowed {
    fn new(body: Body, bytes_per_second: u64) -> Slowed {
        Slowed { body, bytes_per_second, held: Bytes::new(), at: Instant::now(), timer: None }
    }

    /// How much passes at a time.
    fn slice(&self) -> usize {
        usize::try_from(self.bytes_per_second.saturating_mul(SLICE.as_millis() as u64) / 1000)
            .unwrap_or(usize::MAX)
            .max(1)
    }
}

impl WrappedBody for Slowed {}

impl http_body::Body for Slowed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<Bytes>, BodyError>>> {
        if self.held.is_empty() {
            match ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()?.map(Frame::into_data) {
                Some(Ok(data)) => self.held = data,
                Some(Err(trailers)) => return Poll::Ready(Some(Ok(trailers))),
                None => return Poll::Ready(None),
            }
        }
        let at = self.at;
        if at > Instant::now() {
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
            if timer.deadline() != at {
                timer.as_mut().reset(at);
            }
            ready!(timer.as_mut().poll(cx));
        }
        let bytes = self.slice().min(self.held.len());
        let data = self.held.split_to(bytes);
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        self.at = at.max(Instant::now()) + takes;
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && http_body::Body::is_end_stream(&self.body)
    }

    fn size_hint(&self) -> http_body::SizeHint {
        let inner = http_body::Body::size_hint(&self.body);
        let held = self.held.len() as u64;
        let mut hint = http_body::SizeHint::new();
        hint.set_lower(inner.lower() + held);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let configured = Shared::new(configured(typed_config, cx.path)?);
    let scope = Scope::http(cx.stat_prefix).child("fault");
    let stats = Shared::new(Stats {
        delays_injected: scope.counter("delays_injected"),
        aborts_injected: scope.counter("aborts_injected"),
        response_rl_injected: scope.counter("response_rl_injected"),
        faults_overflow: scope.counter("faults_overflow"),
        active_faults: scope.gauge("active_faults"),
        _lease: scope.lease(),
    });
    Ok(Arc::new(FaultFactory { configured, stats }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    Ok(Arc::new(Shared::new(configured(config, path)?)))
}

fn configured(config: &Any, path: &str) -> Result<Configured, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: HttpFault = unpack(config, path)?;
    let field = |name: &str| format!("{path}.{name}");
    let key = |configured: &str, default: &str| Key::new(if configured.is_empty() { default } else { configured });
    let delay_share = key(&config.delay_percent_runtime, "fault.http.delay.fixed_delay_percent");
    let delay_key = key(&config.delay_duration_runtime, "fault.http.delay.fixed_duration_ms");
    let delay = config.delay.map(|delay| self::delay(&delay, delay_share, delay_key, &field("delay"))).transpose()?;
    let abort = config.abort.as_ref().map(|abort| {
        let (http_status, grpc_status, header) = match &abort.error_type {
            Some(ErrorType::HttpStatus(status)) => (Some(Amount::Fixed(u64::from(*status))), None, None),
            Some(ErrorType::GrpcStatus(status)) => (None, Some(Amount::Fixed(u64::from(*status))), None),
            Some(ErrorType::HeaderAbort(_)) => (
                Some(Amount::Header("x-envoy-fault-abort-request")),
                Some(Amount::Header("x-envoy-fault-abort-grpc-request")),
                Some("x-envoy-fault-abort-request-percentage"),
            ),
            None => return Err(FieldError::new(field("abort.error_type"), "value is required")),
        };
        let FaultAbort { percentage, response_body, .. } = abort;
        let text = if response_body.is_empty() { "fault filter abort" } else { response_body };
        Ok(Abort {
            share: Share {
                default: parse::fraction(percentage.unwrap_or_default()),
                key: key(&config.abort_percent_runtime, "fault.http.abort.abort_percent"),
                header,
            },
            http_status,
            http_key: key(&config.abort_http_status_runtime, "fault.http.abort.http_status"),
            grpc_status,
            grpc_key: key(&config.abort_grpc_status_runtime, "fault.http.abort.grpc_status"),
            body: Bytes::copy_from_slice(text.as_bytes()),
        })
    });
    let limit_share = key(&config.response_rate_limit_percent_runtime, "fault.http.rate_limit.response_percent");
    let limit = config.response_rate_limit.as_ref();
    let rate_limit = limit.map(|limit| rate_limit(limit, limit_share, &field("response_rate_limit"))).transpose()?;
    let matcher = |(index, matcher)| parse::matcher::header(matcher, &format!("{}[{index}]", field("headers")));
    Ok(Configured {
        upstream_cluster: (!config.upstream_cluster.is_empty()).then(|| config.upstream_cluster.into()),
        downstream_nodes: config.downstream_nodes.into_iter().collect(),
        headers: config.headers.iter().enumerate().map(matcher).collect::<Result<_, _>>()?,
        delay,
        abort: abort.transpose()?,
        rate_limit,
        max_active: RuntimeInteger {
            default: config.max_active_faults.map_or(u64::MAX, |most| u64::from(most.value)),
            key: Some(key(&config.max_active_faults_runtime, "fault.http.max_active_faults")),
        },
    })
}

fn delay(delay: &FaultDelay, share: Key, key: Key, path: &str) -> Result<Delay, FieldError> {
    let (milliseconds, header) = match &delay.fault_delay_secifier {
        Some(FaultDelaySecifier::FixedDelay(fixed)) => {
            let fixed = parse::duration(Some(*fixed), path, "fixed_delay")?.unwrap_or_default();
            (Amount::Fixed(u64::try_from(fixed.as_millis()).unwrap_or(u64::MAX)), None)
        }
        Some(FaultDelaySecifier::HeaderDelay(_)) => {
            let header = Some("x-envoy-fault-delay-request-percentage");
            (Amount::Header("x-envoy-fault-delay-request"), header)
        }
        None => return Err(FieldError::new(format!("{path}.fault_delay_secifier"), "value is required")),
    };
    let default = parse::fraction(delay.percentage.unwrap_or_default());
    Ok(Delay { share: Share { default, key: share, header }, milliseconds, key })
}

fn rate_limit(limit: &FaultRateLimit, share: Key, path: &str) -> Result<RateLimit, FieldError> {
    let (kib_per_second, header) = match &limit.limit_type {
        Some(LimitType::FixedLimit(fixed)) => (Amount::Fixed(fixed.limit_kbps), None),
        Some(LimitType::HeaderLimit(_)) => {
            let header = Some("x-envoy-fault-throughput-response-percentage");
            (Amount::Header("x-envoy-fault-throughput-response"), header)
        }
        None => return Err(FieldError::new(format!("{path}.limit_type"), "value is required")),
    };
    let default = parse::fraction(limit.percentage.unwrap_or_default());
    Ok(RateLimit { share: Share { default, key: share, header }, kib_per_second })
}
