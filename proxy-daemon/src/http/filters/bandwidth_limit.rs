//! `envoy.filters.http.bandwidth_limit`: bodies pass at a rate that all streams of a configuration share.

use std::{
    cell::Cell,
    pin::Pin,
    rc::Rc,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::filters::http::bandwidth_limit::v3::{BandwidthLimit, bandwidth_limit::EnableMode},
    google::protobuf::Any,
};
use http::{HeaderMap, HeaderName};
use http_body::{Body as _, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
use crate::{
    config::{FieldError, parse},
    http::{
        body::{Body, BodyError, WrappedBody},
        stream::{RequestHead, ResponseHead, StreamCx},
        token_bucket::TokenBucket,
    },
    layered_runtime::RuntimeFlag,
    stats::{Counter, Gauge, Histogram, Lease, Scope},
};

const DEFAULT_FILL: Duration = Duration::from_millis(50);

/// What is configured, here or by a route. Streams hold on to it.
#[derive(Debug)]
struct Configured {
    mode: EnableMode,
    enabled: RuntimeFlag,
    /// Bytes: as many as pass in a second, which come back steadily.
    bucket: TokenBucket,
    fill_interval: Duration,
    request: Stats,
    response: Stats,
    /// `None`: responses' trailers do not tell of delays.
    trailers: Option<Trailers>,
    _lease: Lease,
}

#[derive(Debug, Clone, Copy)]
struct Stats {
    enabled: Counter,
    enforced: Counter,
    pending: Gauge,
    incoming_size: Gauge,
    allowed_size: Gauge,
    incoming_total_size: Counter,
    allowed_total_size: Counter,
    transfer_duration: Histogram,
}

impl Stats {
    fn new(scope: &Scope, direction: &str) -> Stats {
        let name = |what: &str| format!("{direction}_{what}");
        Stats {
            enabled: scope.counter(&name("enabled")),
            enforced: scope.counter(&name("enforced")),
            pending: scope.gauge(&name("pending")),
            incoming_size: scope.gauge(&name("incoming_size")),
            allowed_size: scope.gauge(&name("allowed_size")),
            incoming_total_size: scope.counter(&name("incoming_total_size")),
            allowed_total_size: scope.counter(&name("allowed_total_size")),
            transfer_duration: scope.histogram(&name("transfer_duration")),
        }
    }
}

/// The names of the trailers that tell how long bodies took.
#[derive(Debug)]
struct Trailers {
    request: HeaderName,
    response: HeaderName,
    request_filter: HeaderName,
    response_filter: HeaderName,
}

/// How long the bodies of a stream took.
#[derive(Debug, Default)]
struct Delays {
    request: Cell<Duration>,
    request_filter: Cell<Duration>,
    response_filter: Cell<Duration>,
}

#[derive(Debug)]
struct BandwidthLimitFactory(Shared<Configured>);

/// One stream's filter, for its response.
#[derive(Debug)]
struct BandwidthLimitFilter {
    configured: Kept<Configured>,
    delays: Rc<Delays>,
}

impl BandwidthLimitFactory {
    fn filter(&self, route: PerRoute<'_>) -> BandwidthLimitFilter {
        let configured = route.most_specific::<Shared<Configured>>().unwrap_or(&self.0);
        BandwidthLimitFilter { configured: configured.keep(), delays: Rc::default() }
    }
}

impl HttpFilterFactory for BandwidthLimitFactory {
    fn stream(&self, route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        Some(Box::new(self.filter(route)))
    }

    fn request(
        &self,
        _head: &mut RequestHead,
        body: &mut Body,
        _cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let filter = self.filter(route);
        let configured = &filter.configured;
        let limited = matches!(configured.mode, EnableMode::Request | EnableMode::RequestAndResponse);
        if limited && configured.enabled.get() {
            configured.request.enabled.inc();
            filter.limit(body, false);
        }
        instances.push(Box::new(filter));
        Flow::Continue
    }
}

impl BandwidthLimitFilter {
    fn limit(&self, body: &mut Body, of_response: bool) {
        if body.is_end_stream() {
            return;
        }
        let (configured, delays) = (self.configured.clone(), Rc::clone(&self.delays));
        let stats = if of_response { configured.response } else { configured.request };
        let in_memory = matches!(body, Body::Full(_));
        body.wrap(|body| Limited {
            body,
            in_memory,
            configured,
            delays,
            stats,
            of_response,
            held: Bytes::new(),
            trailers: None,
            timer: None,
            began: None,
            ended: false,
        });
    }
}

impl HttpFilter for BandwidthLimitFilter {
    fn response(&mut self, _head: &mut ResponseHead, body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let configured = &self.configured;
        let limited = matches!(configured.mode, EnableMode::Response | EnableMode::RequestAndResponse);
        if limited && configured.enabled.get() {
            configured.response.enabled.inc();
            self.limit(body, true);
        }
        Flow::Continue
    }
}

/// A body that passes as far as there are bytes in the bucket.
struct Limited {
    body: Body,
    /// It was made here, and comes in one piece.
    in_memory: bool,
    configured: Kept<Configured>,
    delays: Rc<Delays>,
    stats: Stats,
    of_response: bool,
    /// What has come and may not pass yet.
    held: Bytes,
    trailers: Option<HeaderMap>,
    timer: Option<Pin<Box<Sleep>>>,
    /// When its first bytes came. Until its end it is pending.
    began: Option<Instant>,
    ended: bool,
}

impl Limited {
    /// All has passed; returns the trailers.
    fn end(&mut self) -> Option<HeaderMap> {
        self.ended = true;
        let mut trailers = self.trailers.take();
        let Some(began) = self.began.take() else { return trailers };
        self.stats.pending.dec();
        // What streams ends with an empty piece, as Envoy has it.
        if !self.in_memory {
            self.stats.incoming_size.set(0);
        }
        let took = began.elapsed();
        self.stats.transfer_duration.record(u64::try_from(took.as_millis()).unwrap_or(u64::MAX));
        if !self.of_response {
            self.delays.request.set(took);
            return trailers;
        }
        let Some(names) = &self.configured.trailers else { return trailers };
        let Delays { request, request_filter, response_filter } = &*self.delays;
        for (name, delay) in [
            (&names.request, request.get()),
            (&names.request_filter, request_filter.get()),
            (&names.response, took),
            (&names.response_filter, response_filter.get()),
        ] {
            let milliseconds = delay.as_millis() as u64;
            if milliseconds > 0 {
                trailers.get_or_insert_default().insert(name, milliseconds.into());
            }
        }
        trailers
    }

    fn filter_delay(&self) -> &Cell<Duration> {
        if self.of_response { &self.delays.response_filter } else { &self.delays.request_filter }
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        if self.began.is_some() {
            self.stats.pending.dec();
        }
    }
}

impl WrappedBody for Limited {}

impl http_body::Body for Limited {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if this.ended {
            return Poll::Ready(None);
        }
        while this.held.is_empty() {
            let frame = match this.trailers {
                None => ready!(Pin::new(&mut this.body).poll_frame(cx)).transpose()?,
                Some(_) => None,
            };
            match frame.map(Frame::into_data) {
                Some(Ok(data)) => {
                    if this.began.is_none() {
                        this.began = Some(Instant::now());
                        this.stats.pending.inc();
                    }
                    this.stats.incoming_size.set(data.len() as u64);
                    this.stats.incoming_total_size.add(data.len() as u64);
                    this.held = data;
                }
                Some(Err(frame)) => this.trailers = frame.into_trailers().ok(),
                None => return Poll::Ready(this.end().map(|trailers| Ok(Frame::trailers(trailers)))),
            }
        }
        loop {
            if let Some(timer) = &mut this.timer {
                ready!(timer.as_mut().poll(cx));
                this.timer = None;
            }
            let allowed = this.configured.bucket.take_up_to(this.held.len(), Instant::now().into_std());
            this.stats.allowed_size.set(allowed as u64);
            this.stats.allowed_total_size.add(allowed as u64);
            if allowed < this.held.len() {
                let interval = this.configured.fill_interval;
                this.stats.enforced.inc();
                let delay = this.filter_delay();
                delay.set(delay.get() + interval);
                this.timer = Some(Box::pin(sleep(interval)));
            }
            if allowed > 0 {
                return Poll::Ready(Some(Ok(Frame::data(this.held.split_to(allowed)))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        let (inner, held) = (self.body.size_hint(), self.held.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(inner.lower() + held);
        if let Some(upper) = inner.upper() {
            hint.set_upper(upper + held);
        }
        hint
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: BandwidthLimit = unpack(typed_config, cx.path)?;
    Ok(Arc::new(BandwidthLimitFactory(Shared::new(configured(&config, cx.path)?))))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let config: BandwidthLimit = unpack(config, path)?;
    if config.limit_kbps.is_none() {
        return Err(FieldError::new(format!("{path}.limit_kbps"), "limit must be set for per route filter config"));
    }
    Ok(Arc::new(Shared::new(configured(&config, path)?)))
}

fn configured(config: &BandwidthLimit, path: &str) -> Result<Configured, FieldError> {
    let scope = Scope::new(&config.stat_prefix).child("http_bandwidth_limit");
    let limit = config.limit_kbps.map_or(0, |limit| limit.value);
    if limit == 0 && config.enable_mode() != EnableMode::Disabled {
        return Err(FieldError::new(format!("{path}.limit_kbps"), "a limit is needed where the filter is enabled"));
    }
    let prefix = &config.response_trailer_prefix;
    let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}-") };
    let trailer = |name: &str| {
        let bad = |_| FieldError::new(format!("{path}.response_trailer_prefix"), "is not a header name");
        HeaderName::try_from(format!("{prefix}bandwidth-{name}-delay-ms")).map_err(bad)
    };
    let trailers = Trailers {
        request: trailer("request")?,
        response: trailer("response")?,
        request_filter: trailer("request-filter")?,
        response_filter: trailer("response-filter")?,
    };
    let bytes = limit.saturating_mul(1024);
    let bucket = TokenBucket::new(bytes, bytes, Duration::from_secs(1));
    Ok(Configured {
        mode: config.enable_mode(),
        enabled: parse::runtime_switch(config.runtime_enabled.as_ref()),
        bucket,
        fill_interval: parse::duration(config.fill_interval, path, "fill_interval")?.unwrap_or(DEFAULT_FILL),
        request: Stats::new(&scope, "request"),
        response: Stats::new(&scope, "response"),
        trailers: config.enable_response_trailers.then_some(trailers),
        _lease: scope.lease(),
    })
}

#[cfg(test)]
#[path = "bandwidth_limit_tests.rs"]
mod tests;
