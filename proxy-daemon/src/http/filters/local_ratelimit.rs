//! `envoy.filters.http.local_ratelimit`: a token bucket that all workers share.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
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
        descriptors::{self, Descriptor, Entries},
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

/// What is configured.
#[derive(Debug)]
struct Configured {
    status: StatusCode,
    grpc_status: Option<u16>,
    bucket: Option<Shared<TokenBucket>>,
    /// By the descriptors that requests have.
    buckets: HashMap<Entries, Shared<TokenBucket>>,
    /// For those that have none there.
    wildcards: Box<[Wildcard]>,
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

/// A key, and its value; `None`: any.
type Wanted = (Box<str>, Option<Box<str>>);

/// A descriptor with entries that have any value: each of those that requests have gets a bucket of its own.
#[derive(Debug)]
struct Wildcard {
    entries: Box<[Wanted]>,
    limit: Limit,
    buckets: Mutex<Recent>,
}

/// The buckets of a wildcard that were used last. Beyond `most` of them the one that has not been used for the longest time is forgotten.
#[derive(Debug)]
struct Recent {
    most: usize,
    uses: u64,
    buckets: HashMap<Arc<Entries>, (u64, Arc<TokenBucket>)>,
    /// By their last uses.
    by_use: BTreeMap<u64, Arc<Entries>>,
}

/// `TokenBucket`
#[derive(Debug, Clone, Copy)]
struct Limit {
    max_tokens: u64,
    tokens_per_fill: u64,
    interval: Duration,
}

impl Limit {
    fn bucket(self) -> TokenBucket {
        TokenBucket::new(self.max_tokens, self.tokens_per_fill, self.interval)
    }
}

impl Wildcard {
    /// The bucket of a descriptor; `None`: it is another one.
    fn bucket(&self, descriptor: &Entries) -> Option<Arc<TokenBucket>> {
        let mut pairs = descriptor.iter().zip(&self.entries);
        let all = descriptor.len() == self.entries.len()
            && pairs.all(|((key, value), (own, wanted))| key == own && wanted.as_ref().is_none_or(|it| it == value));
        // What is kept there is whole at any time.
        all.then(|| self.buckets.lock().unwrap_or_else(PoisonError::into_inner).get(descriptor, self.limit))
    }
}

impl Recent {
    fn new(most: usize) -> Recent {
        Recent { most, uses: 0, buckets: HashMap::new(), by_use: BTreeMap::new() }
    }

    fn get(&mut self, descriptor: &Entries, limit: Limit) -> Arc<TokenBucket> {
        self.uses += 1;
        if let Some((used, bucket)) = self.buckets.get_mut(descriptor) {
            if let Some(name) = self.by_use.remove(used) {
                self.by_use.insert(self.uses, name);
            }
            *used = self.uses;
            return Arc::clone(bucket);
        }
        let (name, bucket) = (Arc::new(descriptor.clone()), Arc::new(limit.bucket()));
        self.buckets.insert(Arc::clone(&name), (self.uses, Arc::clone(&bucket)));
        self.by_use.insert(self.uses, name);
        if self.buckets.len() > self.most
            && let Some((_, oldest)) = self.by_use.pop_first()
        {
            self.buckets.remove(&oldest);
        }
        bucket
    }
}

/// One stream's filter, where responses tell of the bucket. Answers to requests that an earlier filter has kept from this one do not.
#[derive(Debug)]
struct LocalRateLimitFilter(Shown);

/// The bucket that is shown.
#[derive(Debug)]
enum Shown {
    Known(Kept<TokenBucket>),
    OfWildcard(Arc<TokenBucket>),
}

/// A bucket that counts a request.
#[derive(Clone)]
enum Bucket<'a> {
    Known(&'a Shared<TokenBucket>),
    OfWildcard(Arc<TokenBucket>),
}

impl Bucket<'_> {
    fn get(&self) -> &TokenBucket {
        match self {
            Bucket::Known(bucket) => bucket,
            Bucket::OfWildcard(bucket) => bucket,
        }
    }

    fn keep(&self) -> Shown {
        match self {
            Bucket::Known(bucket) => Shown::Known(bucket.keep()),
            Bucket::OfWildcard(bucket) => Shown::OfWildcard(Arc::clone(bucket)),
        }
    }
}

/// What became of a request.
struct Taken<'a> {
    allowed: bool,
    /// The bucket that decided.
    bucket: Option<Bucket<'a>>,
}

impl Configured {
    /// Takes the tokens of a request, of all buckets that count it.
    fn take(&self, head: &mut RequestHead, cx: &StreamCx, now: Instant) -> Taken<'_> {
        let default = self.bucket.as_ref().map(Bucket::Known);
        let mut buckets = Vec::new();
        if !self.buckets.is_empty() || !self.wildcards.is_empty() {
            let descriptors = descriptors::of_request(&self.own, self.stage, self.of_host, head, cx);
            let counted =
                |it: &Descriptor| Some((self.of_descriptor(&it.entries)?, it.hits.map_or(1, |(hits, _)| hits)));
            buckets = descriptors.iter().filter_map(counted).collect();
            // The slowest first, as in Envoy.
            buckets.sort_by_key(|(bucket, _)| std::cmp::Reverse(bucket.get().per_token()));
        }
        let counts_all = buckets.is_empty() || self.always_default;
        for (bucket, hits) in &buckets {
            if !bucket.get().take_all(*hits, now) {
                return Taken { allowed: false, bucket: Some(bucket.clone()) };
            }
        }
        if let Some(default) = default.as_ref().filter(|_| counts_all)
            && !default.get().take(now)
        {
            return Taken { allowed: false, bucket: Some(default.clone()) };
        }
        Taken { allowed: true, bucket: buckets.into_iter().next().map(|(bucket, _)| bucket).or(default) }
    }

    fn of_descriptor(&self, descriptor: &Entries) -> Option<Bucket<'_>> {
        let of_wildcards = || self.wildcards.iter().find_map(|wildcard| wildcard.bucket(descriptor));
        self.buckets.get(descriptor).map(Bucket::Known).or_else(|| of_wildcards().map(Bucket::OfWildcard))
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
        let taken = configured.take(head, cx, now);
        if let Some(bucket) = taken.bucket.as_ref().filter(|_| configured.shows_bucket) {
            instances.push(Box::new(LocalRateLimitFilter(bucket.keep())));
        }
        configured.decide(&taken, now, head, cx)
    }
}

impl HttpFilter for LocalRateLimitFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let bucket: &TokenBucket = match &self.0 {
            Shown::Known(bucket) => bucket,
            Shown::OfWildcard(bucket) => bucket,
        };
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
    let bucket = config.token_bucket.as_ref().map(|bucket| limit(bucket, &field("token_bucket"))).transpose()?;
    let most = config.max_dynamic_descriptors.map_or(20, |most| most.value as usize);
    let (mut buckets, mut wildcards) = (HashMap::new(), Vec::new());
    for (index, descriptor) in config.descriptors.iter().enumerate() {
        let at = format!("{path}.descriptors[{index}]");
        let bucket = descriptor.token_bucket.as_ref();
        let bucket = bucket.ok_or_else(|| FieldError::new(format!("{at}.token_bucket"), "value is required"))?;
        let limit = limit(bucket, &format!("{at}.token_bucket"))?;
        let pairs = descriptor.entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_str()));
        let is_known = if descriptor.entries.iter().any(|entry| entry.value.is_empty()) {
            let value = |value: &str| (!value.is_empty()).then(|| value.into());
            let entries: Box<[Wanted]> = pairs.map(|(key, text)| (key.into(), value(text))).collect();
            let is_known = wildcards.iter().any(|wildcard: &Wildcard| wildcard.entries == entries);
            wildcards.push(Wildcard { entries, limit, buckets: Mutex::new(Recent::new(most)) });
            is_known
        } else {
            let entries: Entries = pairs.map(|(key, value)| (key.into(), value.into())).collect();
            buckets.insert(entries, Shared::new(limit.bucket())).is_some()
        };
        if is_known {
            let text = "duplicate descriptor in the local rate limit descriptor";
            return Err(FieldError::new(field("descriptors"), text));
        }
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
        bucket: bucket.map(|limit| Shared::new(limit.bucket())),
        buckets,
        wildcards: wildcards.into(),
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

fn limit(bucket: &ProtoBucket, path: &str) -> Result<Limit, FieldError> {
    let interval = parse::duration(bucket.fill_interval, path, "fill_interval")?.unwrap_or_default();
    if interval < SHORTEST_FILL {
        let text = "local rate limit token bucket fill timer must be >= 50ms";
        return Err(FieldError::new(format!("{path}.fill_interval"), text));
    }
    let tokens = bucket.tokens_per_fill.map_or(1, |tokens| tokens.value);
    Ok(Limit { max_tokens: bucket.max_tokens.into(), tokens_per_fill: tokens.into(), interval })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOURLY: Limit = Limit { max_tokens: 1, tokens_per_fill: 1, interval: Duration::from_secs(3600) };

    fn entries(pairs: &[(&str, &str)]) -> Entries {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn wildcards_have_a_bucket_for_each_value() {
        let wildcard = Wildcard {
            entries: [("user".into(), None), ("plan".into(), Some("free".into()))].into(),
            limit: HOURLY,
            buckets: Mutex::new(Recent::new(20)),
        };
        let bucket = |pairs: &[(&str, &str)]| wildcard.bucket(&entries(pairs));
        let (one, other) = ([("user", "1"), ("plan", "free")], [("user", "2"), ("plan", "free")]);
        assert!(bucket(&one).unwrap().take(Instant::now()));
        assert!(!bucket(&one).unwrap().take(Instant::now()), "it is the same bucket");
        assert!(bucket(&other).unwrap().take(Instant::now()), "it is another one");
        assert!(bucket(&[("user", "1"), ("plan", "paid")]).is_none());
        assert!(bucket(&[("plan", "free"), ("user", "1")]).is_none());
        assert!(bucket(&[("user", "1")]).is_none());
    }

    #[test]
    fn what_was_not_used_for_long_is_forgotten() {
        let mut recent = Recent::new(2);
        let mut is_new = |value: &str| recent.get(&entries(&[("user", value)]), HOURLY).take(Instant::now());
        assert!(is_new("1") && is_new("2"));
        assert!(!is_new("1"));
        assert!(is_new("3"), "in the place of 2");
        assert!(!is_new("1"));
        assert!(is_new("2"), "in the place of 3");
        assert!(!is_new("1") && !is_new("2"));
        assert_eq!((recent.buckets.len(), recent.by_use.len()), (2, 2));
    }
}
