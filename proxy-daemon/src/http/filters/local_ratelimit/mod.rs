//! `envoy.filters.http.local_ratelimit`: a token bucket that all workers share.

mod buckets;

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{extensions::filters::http::local_ratelimit::v3::LocalRateLimit, r#type::v3::TokenBucket as ProtoBucket},
    google::protobuf::Any,
};
use http::{HeaderName, HeaderValue, StatusCode};

use self::buckets::{Limit, Limiter, Limits, Rule, Shown, Taken, Wanted};
use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig, shared::Shared};
use crate::{
    access_log::{Headers, Record, ResponseFlags},
    config::{
        FieldError,
        model::{HeaderMutations, RateLimit, VirtualHostRateLimits},
        parse,
    },
    http::{
        body::Body,
        changes::list,
        descriptors::{self, Descriptor, Entries, When},
        headers::{mutate_request, mutate_response},
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::{Fraction, RuntimeFraction},
    runtime::clock,
    stats::{Counter, Lease, Scope},
};

const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const X_RATELIMIT_RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");

/// The shortest interval that Envoy takes.
const SHORTEST_FILL: Duration = Duration::from_millis(50);

/// gRPC's RESOURCE_EXHAUSTED.
const RESOURCE_EXHAUSTED: u16 = 8;

/// What is configured.
#[derive(Debug)]
struct Configured {
    status: StatusCode,
    grpc_status: Option<u16>,
    limits: Limits,
    /// Of all connections; `None`: each has its own.
    limiter: Option<Limiter>,
    /// What makes them, in the place of what routes say.
    own: Box<[RateLimit]>,
    stage: u32,
    of_host: VirtualHostRateLimits,
    enabled: RuntimeFraction,
    enforced: RuntimeFraction,
    when_not_enforced: HeaderMutations,
    response_headers: HeaderMutations,
    shows_bucket: bool,
    says_when: bool,
    stats: Stats,
    _lease: Lease,
}

#[derive(Debug)]
struct Stats {
    enabled: Counter,
    enforced: Counter,
    ok: Counter,
    rate_limited: Counter,
    shadow_mode: Counter,
}

/// The buckets of a connection, which all filters of this name share there.
#[derive(Clone)]
struct OfConnection(Arc<Limiter>);

#[derive(Debug)]
struct LocalRateLimitFactory(Shared<Configured>);

/// One stream's filter, where responses tell of the bucket. Answers to requests that an earlier filter has kept from this one do not.
#[derive(Debug)]
struct LocalRateLimitFilter(Shown);

impl Configured {
    /// The descriptors of a request, where they count.
    fn descriptors(&self, limiter: &Limiter, head: &mut RequestHead, cx: &StreamCx) -> Vec<Descriptor> {
        match (limiter.has_descriptors(), &*self.own) {
            (false, _) => Vec::new(),
            // As in Envoy, those of routes count at once.
            (true, []) => descriptors::of_request(&[], (self.stage, When::Any), self.of_host, head, cx),
            (true, own) => descriptors::of_own(own, self.stage, head, cx),
        }
    }

    /// The buckets of the stream's connection: those of the first of these filters that had a request of it, as in Envoy.
    fn of_connection(&self, cx: &StreamCx) -> Arc<Limiter> {
        let mut kept = cx.connection.kept.borrow_mut();
        let OfConnection(limiter) =
            kept.get_or_insert_with(|| OfConnection(Arc::new(Limiter::new(&self.limits, false))));
        Arc::clone(limiter)
    }

    /// The answer to a request for which there is no token.
    fn decide(&self, taken: &Taken<'_>, now: Instant, head: &mut RequestHead, cx: &StreamCx) -> Flow {
        self.stats.enabled.inc();
        if taken.allowed && !taken.shadowed {
            self.stats.ok.inc();
            return Flow::Continue;
        }
        self.stats.rate_limited.inc();
        if taken.allowed {
            self.stats.shadow_mode.inc();
            return Flow::Continue;
        }
        if !self.enforced.includes(cx.random) {
            cx.format_request(head, |headers, record| mutate_request(headers, &self.when_not_enforced, record));
            return Flow::Continue;
        }
        self.stats.enforced.inc();
        let text = "local_rate_limited";
        let mut reply = LocalReply::new(self.status, text, ResponseFlags::RL, text);
        reply.grpc_status = self.grpc_status;
        let mut headers = http::HeaderMap::new();
        cx.format_request(head, |request, record| {
            let record = Record { request_headers: Some(Headers::All(request)), ..*record };
            mutate_response(&mut headers, &self.response_headers, &record);
        });
        if let Some(bucket) = taken.bucket.as_ref().filter(|_| self.says_when) {
            headers.insert(http::header::RETRY_AFTER, seconds(bucket.get().next(now)));
        }
        reply.headers = list(headers);
        Flow::Respond(reply)
    }
}

/// Whole seconds, rounded up.
fn seconds(duration: Duration) -> HeaderValue {
    HeaderValue::from(duration.as_nanos().div_ceil(1_000_000_000) as u64)
}

impl HttpFilterFactory for LocalRateLimitFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        // A route's bucket is in the place of the filter's own.
        let configured: &Shared<Configured> = route.most_specific().unwrap_or(&self.0);
        if !configured.enabled.includes(cx.random) {
            return Flow::Continue;
        }
        let now = clock::now();
        let of_connection;
        let limiter: &Limiter = match &configured.limiter {
            Some(limiter) => limiter,
            None => {
                of_connection = configured.of_connection(cx);
                &of_connection
            }
        };
        let descriptors = configured.descriptors(limiter, head, cx);
        let taken = limiter.take(&descriptors, now);
        if let Some(bucket) = taken.bucket.as_ref().filter(|_| taken.is_told.unwrap_or(configured.shows_bucket)) {
            instances.push(Box::new(LocalRateLimitFilter(bucket.keep())));
        }
        configured.decide(&taken, now, head, cx)
    }
}

impl HttpFilter for LocalRateLimitFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let bucket = self.0.get();
        let now = clock::now();
        let remaining = bucket.remaining(now);
        // As in Envoy, beside what others tell.
        for (name, value) in [
            (X_RATELIMIT_LIMIT, HeaderValue::from(bucket.max_tokens())),
            (X_RATELIMIT_REMAINING, HeaderValue::from(remaining as u64)),
            (X_RATELIMIT_RESET, seconds(bucket.next(now))),
        ] {
            let _ = head.headers.try_append(name, value);
        }
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    Ok(Arc::new(LocalRateLimitFactory(Shared::new(configured(typed_config, cx.path)?))))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let configured = configured(config, path)?;
    if configured.limits.of_all.is_none() {
        let text = "local rate limit token bucket must be set for per filter configs";
        return Err(FieldError::new(format!("{path}.token_bucket"), text));
    }
    Ok(Arc::new(Shared::new(configured)))
}

fn configured(config: &Any, path: &str) -> Result<Configured, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: LocalRateLimit = unpack(config, path)?;
    let field = |name: &str| format!("{path}.{name}");
    let bucket = config.token_bucket.as_ref().map(|bucket| limit(bucket, &field("token_bucket"))).transpose()?;
    let most = config.max_dynamic_descriptors.map_or(20, |most| most.value as usize);
    let (mut of_descriptors, mut of_wildcards) = (HashMap::new(), Vec::<(Box<[Wanted]>, Rule)>::new());
    for (index, descriptor) in config.descriptors.iter().enumerate() {
        let at = format!("{path}.descriptors[{index}]");
        let bucket = descriptor.token_bucket.as_ref();
        let bucket = bucket.ok_or_else(|| FieldError::new(format!("{at}.token_bucket"), "value is required"))?;
        let rule = Rule { limit: limit(bucket, &format!("{at}.token_bucket"))?, shadow: descriptor.shadow_mode };
        let pairs = descriptor.entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_str()));
        let is_known = if descriptor.entries.iter().any(|entry| entry.value.is_empty()) {
            let value = |value: &str| (!value.is_empty()).then(|| value.into());
            let entries: Box<[Wanted]> = pairs.map(|(key, text)| (key.into(), value(text))).collect();
            let is_known = of_wildcards.iter().any(|(known, _)| *known == entries);
            of_wildcards.push((entries, rule));
            is_known
        } else {
            let entries: Entries = pairs.map(|(key, value)| (key.into(), value.into())).collect();
            of_descriptors.insert(entries, rule).is_some()
        };
        if is_known {
            let text = "duplicate descriptor in the local rate limit descriptor";
            return Err(FieldError::new(field("descriptors"), text));
        }
    }
    let limits = Limits {
        of_all: bucket,
        of_descriptors,
        of_wildcards,
        always_default: config.always_consume_default_token_bucket.is_none_or(|value| value.value),
        most,
    };
    let never = RuntimeFraction { default: Fraction::percent(0), key: None };
    let share = |share: Option<&_>| share.map_or_else(|| never.clone(), parse::runtime_fraction);
    // As in Envoy, what is no error is no answer here.
    let status = parse::status(config.status.map(|it| it.code), 400, StatusCode::TOO_MANY_REQUESTS);
    let scope = Scope::new("").tagged("envoy_local_http_ratelimit_prefix", &config.stat_prefix);
    let scope = scope.child("http_local_rate_limit");
    let counter = |name| scope.counter(name);
    let stats = Stats {
        enabled: counter("enabled"),
        enforced: counter("enforced"),
        ok: counter("ok"),
        rate_limited: counter("rate_limited"),
        shadow_mode: counter("shadow_mode"),
    };
    let when_not_enforced = HeaderMutations {
        request_add: parse::headers_to_add(
            &config.request_headers_to_add_when_not_enforced,
            path,
            "request_headers_to_add_when_not_enforced",
        )?,
        ..HeaderMutations::default()
    };
    let response_headers = HeaderMutations {
        response_add: parse::headers_to_add(&config.response_headers_to_add, path, "response_headers_to_add")?,
        ..HeaderMutations::default()
    };
    Ok(Configured {
        status,
        grpc_status: config.rate_limited_as_resource_exhausted.then_some(RESOURCE_EXHAUSTED),
        limiter: (!config.local_rate_limit_per_downstream_connection).then(|| Limiter::new(&limits, true)),
        limits,
        own: parse::rate_limits(&config.rate_limits, path, "rate_limits")?,
        stage: config.stage,
        of_host: super::ratelimit::of_host(config.vh_rate_limits),
        enabled: share(config.filter_enabled.as_ref()),
        enforced: share(config.filter_enforced.as_ref()),
        when_not_enforced,
        response_headers,
        shows_bucket: config.enable_x_ratelimit_headers != 0,
        says_when: config.enable_retry_after_header && status == StatusCode::TOO_MANY_REQUESTS,
        stats,
        _lease: scope.lease(),
    })
}

fn limit(bucket: &ProtoBucket, path: &str) -> Result<Limit, FieldError> {
    let interval = parse::duration(bucket.fill_interval, path, "fill_interval")?.unwrap_or_default();
    if interval < SHORTEST_FILL {
        let text = "local rate limit token bucket fill timer must be >= 50ms";
        return Err(FieldError::new(format!("{path}.fill_interval"), text));
    }
    let tokens = bucket.tokens_per_fill.map_or(1, |tokens| tokens.value);
    Ok(Limit { max_tokens: bucket.max_tokens.into(), tokens_per_fill: tokens.into(), interval })
}
