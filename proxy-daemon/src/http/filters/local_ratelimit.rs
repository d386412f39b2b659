//! `envoy.filters.http.local_ratelimit`: a token bucket that all workers share.

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

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
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
        descriptors::{self, Entries},
        headers::{mutate_request, mutate_response},
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
        token_bucket::TokenBucket,
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

/// What is configured. Streams that show the state of the bucket hold on to it.
#[derive(Debug)]
struct Configured {
    status: StatusCode,
    grpc_status: Option<u16>,
    bucket: Option<TokenBucket>,
    /// By the descriptors that requests have.
    buckets: HashMap<Entries, TokenBucket>,
    /// What makes them, in the place of what routes say.
    own: Box<[RateLimit]>,
    stage: u32,
    of_host: VirtualHostRateLimits,
    /// The bucket of all requests counts also those that have one of their own.
    always_default: bool,
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
}

#[derive(Debug)]
struct LocalRateLimitFactory(Shared<Configured>);

/// One stream's filter, where responses tell of the bucket. Answers to requests that an earlier filter has kept from this one do not.
#[derive(Debug)]
struct LocalRateLimitFilter {
    configured: Kept<Configured>,
    /// Which one that is; `None`: that of all requests.
    descriptor: Option<Entries>,
}

/// What became of a request.
struct Taken<'a> {
    allowed: bool,
    /// The bucket that decided, with its descriptor.
    bucket: Option<(Option<&'a Entries>, &'a TokenBucket)>,
}

impl Configured {
    /// Takes the tokens of a request, of all buckets that count it.
    fn take(&self, head: &RequestHead, cx: &StreamCx, now: Instant) -> Taken<'_> {
        let default = self.bucket.as_ref().map(|bucket| (None, bucket));
        let mut buckets = Vec::new();
        if !self.buckets.is_empty() {
            let descriptors = descriptors::of_request(&self.own, self.stage, self.of_host, head, cx);
            let known = descriptors.iter().filter_map(|it| self.buckets.get_key_value(&it.entries));
            buckets = known.map(|(descriptor, bucket)| (Some(descriptor), bucket)).collect();
            // The slowest first, as in Envoy.
            buckets.sort_by_key(|(_, bucket)| std::cmp::Reverse(bucket.per_token()));
        }
        let first = buckets.first().copied();
        let counts_all = buckets.is_empty() || self.always_default;
        for bucket in buckets.into_iter().chain(default.filter(|_| counts_all)) {
            if !bucket.1.take(now) {
                return Taken { allowed: false, bucket: Some(bucket) };
            }
        }
        Taken { allowed: true, bucket: first.or(default) }
    }

    /// The answer to a request for which there is no token.
    fn decide(&self, taken: &Taken<'_>, now: Instant, head: &mut RequestHead, cx: &StreamCx) -> Flow {
        self.stats.enabled.inc();
        if taken.allowed {
            self.stats.ok.inc();
            return Flow::Continue;
        }
        self.stats.rate_limited.inc();
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
        if let Some((_, bucket)) = taken.bucket.filter(|_| self.says_when) {
            headers.insert(http::header::RETRY_AFTER, seconds(bucket.next(now)));
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
        let taken = configured.take(head, cx, now);
        if let Some((descriptor, _)) = taken.bucket.filter(|_| configured.shows_bucket) {
            let (configured, descriptor) = (configured.keep(), descriptor.cloned());
            instances.push(Box::new(LocalRateLimitFilter { configured, descriptor }));
        }
        configured.decide(&taken, now, head, cx)
    }
}

impl HttpFilter for LocalRateLimitFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let bucket = match &self.descriptor {
            Some(descriptor) => self.configured.buckets.get(descriptor),
            None => self.configured.bucket.as_ref(),
        };
        let Some(bucket) = bucket else { return Flow::Continue };
        let now = clock::now();
        let remaining = bucket.remaining(now);
        head.headers.insert(X_RATELIMIT_LIMIT, HeaderValue::from(bucket.max_tokens()));
        head.headers.insert(X_RATELIMIT_REMAINING, HeaderValue::from(remaining as u64));
        head.headers.insert(X_RATELIMIT_RESET, seconds(bucket.next(now)));
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    Ok(Arc::new(LocalRateLimitFactory(Shared::new(configured(typed_config, cx.path)?))))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    Ok(Arc::new(Shared::new(configured(config, path)?)))
}

fn configured(config: &Any, path: &str) -> Result<Configured, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: LocalRateLimit = unpack(config, path)?;
    let field = |name: &str| format!("{path}.{name}");
    let bucket = config.token_bucket.as_ref().map(|bucket| token_bucket(bucket, &field("token_bucket"))).transpose()?;
    let buckets = config.descriptors.iter().enumerate().map(|(index, descriptor)| {
        let path = format!("{path}.descriptors[{index}]");
        let entries = descriptor.entries.iter().map(|entry| match entry.value.as_str() {
            "" => Err(FieldError::new(
                format!("{path}.entries"),
                "entries without a value, which stand for all values, are not supported by culvert yet",
            )),
            value => Ok((entry.key.as_str().into(), value.into())),
        });
        let bucket = descriptor.token_bucket.as_ref();
        let bucket = bucket.ok_or_else(|| FieldError::new(format!("{path}.token_bucket"), "value is required"))?;
        Ok((entries.collect::<Result<_, _>>()?, token_bucket(bucket, &format!("{path}.token_bucket"))?))
    });
    let buckets = buckets.collect::<Result<HashMap<_, _>, FieldError>>()?;
    if buckets.len() < config.descriptors.len() {
        return Err(FieldError::new(field("descriptors"), "duplicate descriptor in the local rate limit descriptor"));
    }
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
        bucket,
        buckets,
        own: parse::rate_limits(&config.rate_limits, path, "rate_limits")?,
        stage: config.stage,
        of_host: super::ratelimit::of_host(config.vh_rate_limits),
        always_default: config.always_consume_default_token_bucket.is_none_or(|value| value.value),
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

fn token_bucket(bucket: &ProtoBucket, path: &str) -> Result<TokenBucket, FieldError> {
    let interval = parse::duration(bucket.fill_interval, path, "fill_interval")?.unwrap_or_default();
    if interval < SHORTEST_FILL {
        let text = "local rate limit token bucket fill timer must be >= 50ms";
        return Err(FieldError::new(format!("{path}.fill_interval"), text));
    }
    let tokens = bucket.tokens_per_fill.map_or(1, |tokens| tokens.value);
    Ok(TokenBucket::new(bucket.max_tokens.into(), tokens.into(), interval))
}
