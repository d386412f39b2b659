//! `envoy.filters.http.ratelimit`: asks a rate limit service how often such requests may be, by the descriptors that routes, virtual
//! hosts, or the filter itself make of them.
//!
//! **Cost.** A request without a descriptor costs nothing but the look at its route. Others wait for one call to the service, of
//! which at most `timeout` (20 ms by default).
//!
//! **Limits.** An answer has at most 4 MiB (or `max_receive_message_length`), and of each list of headers the first 1000 are added.

use std::{fmt::Write as _, rc::Rc, sync::Arc, time::Duration};

use bytes::Bytes;
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{ApiVersion, HeaderValue as ProtoHeader},
        extensions::{
            common::ratelimit::v3::{
                RateLimitDescriptor,
                rate_limit_descriptor::{Entry, RateLimitOverride},
            },
            filters::http::ratelimit::v3::{RateLimit as ProtoRateLimit, RateLimitPerRoute},
        },
        service::ratelimit::v3::{
            RateLimitRequest, RateLimitResponse,
            rate_limit_response::{Code, DescriptorStatus, rate_limit::Unit},
        },
    },
    google::protobuf::{Any, UInt64Value},
};
use http::{HeaderMap, StatusCode, header::RETRY_AFTER};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig, Waiting,
    shared::{Kept, Shared},
};
use crate::{
    access_log::{HeaderFormat, Headers, Record, ResponseFlags},
    config::{
        FieldError,
        model::{HeaderMutations, RateLimit, VirtualHostRateLimits},
        parse,
    },
    http::{
        body::Body,
        call::{self, grpc},
        changes::{Action, Change, list},
        descriptors::{self, Basis, Descriptor, When},
        headers::{mutate_response, names::X_ENVOY_RATELIMITED},
        metadata, protocol_name,
        redirect::scheme,
        route_match::authority,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::{Fraction, Key, RuntimeFraction},
};

/// Where its dynamic metadata is, unless another namespace is configured.
const NAMESPACE: &str = "envoy.filters.http.ratelimit";
const METHOD: &str = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit";
/// gRPC's RESOURCE_EXHAUSTED.
const RESOURCE_EXHAUSTED: u16 = 8;
/// The most headers that are added out of one list of them.
const MAX_HEADERS: usize = 1000;
const DEFAULT_TIMEOUT: Duration = Duration::from_millis(20);

/// What is configured. Streams hold on to it while they ask.
#[derive(Debug)]
struct Configured {
    service: grpc::Service,
    domain: Box<str>,
    stage: u32,
    /// Only requests that are internal, or only those that are not.
    internal: Option<bool>,
    deny_on_failure: RuntimeFraction,
    enabled: RuntimeFraction,
    enforced: RuntimeFraction,
    status: StatusCode,
    grpc_status: Option<u16>,
    status_on_error: StatusCode,
    shows_state: bool,
    says_limited: bool,
    /// `enable_retry_after_header`
    says_when: bool,
    response_headers: HeaderMutations,
    own: Arc<[RateLimit]>,
    /// Where the service's metadata goes.
    namespace: Box<str>,
    names: Names,
}

/// The names of what the request's cluster counts.
#[derive(Debug)]
struct Names {
    ok: Box<str>,
    error: Box<str>,
    over_limit: Box<str>,
    failure_mode_allowed: Box<str>,
}

/// What a level tells the filter.
#[derive(Debug)]
struct Told {
    of_host: VirtualHostRateLimits,
    own: Arc<[RateLimit]>,
    domain: Box<str>,
}

#[derive(Debug)]
struct RateLimitFactory(Shared<Configured>);

/// A stream that is asked about.
#[derive(Debug)]
struct RateLimitFilter {
    configured: Kept<Configured>,
    domain: Option<Box<str>>,
    descriptors: Vec<Descriptor>,
    /// Whether the response tells of these, by their places.
    told: Vec<Option<bool>>,
    /// What is asked when the stream is over.
    done: Option<Box<Done>>,
    /// What the response gets.
    response: Vec<Change>,
}

impl HttpFilterFactory for RateLimitFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let configured = &self.0;
        if configured.internal.is_some_and(|internal| internal != cx.internal)
            || !configured.enabled.includes(fastrand::u64(..))
        {
            return Flow::Continue;
        }
        let told = route.most_specific::<Told>();
        let own = told.map(|told| &*told.own).filter(|own| !own.is_empty()).unwrap_or(&configured.own);
        let of_host = told.map(|told| told.of_host).unwrap_or_default();
        let descriptors = descriptors::of_request(own, (configured.stage, When::Begin), of_host, head, cx);
        let domain = told.map(|told| &*told.domain).filter(|domain| !domain.is_empty());
        let done = descriptors::has_done(own, configured.stage, of_host, cx.route.as_ref()).then(|| {
            let own = told.map(|told| &told.own).filter(|own| !own.is_empty()).unwrap_or(&configured.own);
            let domain = domain.unwrap_or(&configured.domain).into();
            Box::new(Done { configured: configured.keep(), domain, own: Arc::clone(own), of_host })
        });
        if descriptors.is_empty() {
            done.into_iter().for_each(|done| done.begin(head, cx));
            return Flow::Continue;
        }
        instances.push(Box::new(RateLimitFilter {
            configured: configured.keep(),
            domain: domain.map(Into::into),
            told: descriptors.iter().map(|descriptor| descriptor.is_told).collect(),
            descriptors,
            done,
            response: Vec::new(),
        }));
        Flow::Wait
    }
}

/// What is asked when a stream is over, of limits with `apply_on_stream_done`: what the service says to it is nobody's.
#[derive(Debug)]
struct Done {
    configured: Kept<Configured>,
    domain: Box<str>,
    own: Arc<[RateLimit]>,
    of_host: VirtualHostRateLimits,
}

impl Done {
    /// Has it asked at the end, of the request as it is now.
    fn begin(self: Box<Self>, head: &RequestHead, cx: &StreamCx) {
        let (mut head, worker, own_address) = (head.clone(), Rc::clone(&cx.worker), call::own_address(cx));
        let (route, cluster, remote) = (cx.route.clone(), cx.cluster.clone(), cx.remote);
        let progress = Rc::downgrade(&cx.progress);
        cx.progress.at_end.add(move |record| {
            let Some(progress) = progress.upgrade() else { return };
            let descriptors = {
                let format = |format: &HeaderFormat, head: &mut RequestHead| {
                    let record = Record {
                        missing: "",
                        method: Some(head.method.as_str()),
                        path: head.uri.path_and_query().map(|path| path.as_str()),
                        authority: Some(authority(head)),
                        scheme: Some(scheme(head)),
                        protocol: Some(protocol_name(head.version)),
                        request_headers: Some(Headers::All(&head.headers)),
                        ..*record
                    };
                    format.bytes(&record)
                };
                let basis = Basis {
                    when: When::Done,
                    stage: self.configured.stage,
                    route: route.as_ref(),
                    cluster: cluster.as_ref(),
                    remote,
                    progress: &progress,
                    format: &format,
                };
                descriptors::of_basis(&self.own, self.of_host, &mut head, &basis)
            };
            // With its runtime a worker ends what it does.
            if descriptors.is_empty() || tokio::runtime::Handle::try_current().is_err() {
                return;
            }
            let Done { configured, domain, .. } = *self;
            let descriptors = descriptors.into_iter().map(message).collect();
            let request = RateLimitRequest { domain: domain.into(), descriptors, hits_addend: 0 };
            tokio::task::spawn_local(async move {
                let asked =
                    configured.service.unary_from::<RateLimitResponse>(METHOD, &request, &worker.clusters, own_address);
                drop(asked.await);
            });
        });
    }
}

impl HttpFilter for RateLimitFilter {
    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        _body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let request = RateLimitRequest {
                domain: self.domain.take().unwrap_or_else(|| self.configured.domain.clone()).into(),
                descriptors: std::mem::take(&mut self.descriptors).into_iter().map(message).collect(),
                hits_addend: 0,
            };
            let flow = match self.configured.service.unary(METHOD, &request, cx).await {
                Ok(answer) => self.settle(answer, head, cx),
                Err(_) => self.failed(cx),
            };
            self.done.take().into_iter().for_each(|done| done.begin(head, cx));
            flow
        })
    }

    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        self.response.iter().for_each(|change| change.apply_to_fields(&mut head.headers));
        Flow::Continue
    }
}

fn message(descriptor: Descriptor) -> RateLimitDescriptor {
    let entry = |(key, value): (Box<str>, Box<str>)| Entry { key: key.into(), value: value.into() };
    RateLimitDescriptor {
        entries: descriptor.entries.into_iter().map(entry).collect(),
        limit: descriptor.limit.map(|(requests_per_unit, unit)| RateLimitOverride { requests_per_unit, unit }),
        hits_addend: descriptor.hits.map(|(value, _)| UInt64Value { value }),
        is_negative_hits: descriptor.hits.is_some_and(|(_, negative)| negative),
    }
}

fn count(cx: &StreamCx, name: &str) {
    if let Some(cluster) = &cx.cluster {
        cluster.counter(name).inc();
    }
}

fn added(headers: &[ProtoHeader]) -> Vec<Change> {
    // `raw_value` is not looked at, as in Envoy.
    let change = |header: &ProtoHeader| Change::new(&header.key, header.value.as_bytes(), Action::Add);
    headers.iter().take(MAX_HEADERS).map(change).collect()
}

impl RateLimitFilter {
    fn failed(&self, cx: &StreamCx) -> Flow {
        let configured = &self.configured;
        count(cx, &configured.names.error);
        if !configured.deny_on_failure.includes(fastrand::u64(..)) {
            count(cx, &configured.names.failure_mode_allowed);
            return Flow::Continue;
        }
        let flags = ResponseFlags::RLSE;
        Flow::Respond(LocalReply::new(configured.status_on_error, "", flags, "rate_limiter_error"))
    }

    fn settle(&mut self, answer: RateLimitResponse, head: &mut RequestHead, cx: &mut StreamCx) -> Flow {
        let configured = &self.configured;
        if let Some(told) = answer.dynamic_metadata.filter(|told| !told.fields.is_empty()) {
            cx.progress.with_metadata(|all| metadata::update(all.namespace_mut(&configured.namespace), &told));
        }
        let over = answer.overall_code == Code::OverLimit as i32;
        let mut response = added(&answer.response_headers_to_add);
        if over {
            count(cx, &configured.names.over_limit);
            if let Some(cluster) = &cx.cluster {
                cluster.cluster.stats.upstream_rq.inc(configured.status.as_u16());
            }
            if configured.says_limited {
                response.push(Change::new(X_ENVOY_RATELIMITED.as_str(), b"true", Action::Set));
            }
        } else {
            count(cx, &configured.names.ok);
        }
        // There is one for each of them.
        let is_told = |at: usize| self.told.get(at).copied().flatten().unwrap_or(configured.shows_state);
        response.extend(state(&answer.statuses, is_told));
        if !(over && configured.enforced.includes(fastrand::u64(..))) {
            for change in added(&answer.request_headers_to_add) {
                change.apply_to_request(head);
            }
            self.response = response;
            return Flow::Continue;
        }
        let mut reply =
            LocalReply::new(configured.status, Bytes::from(answer.raw_body), ResponseFlags::RL, "request_rate_limited");
        reply.grpc_status = configured.grpc_status;
        let mut headers = HeaderMap::new();
        response.iter().for_each(|change| change.apply_to_fields(&mut headers));
        if configured.says_when
            && !headers.contains_key(RETRY_AFTER)
            && let Some(seconds) = until_reset(&answer.statuses)
        {
            headers.insert(RETRY_AFTER, seconds.into());
        }
        cx.format_request(head, |request, record| {
            let record = Record { request_headers: Some(Headers::All(request)), ..*record };
            mutate_response(&mut headers, &configured.response_headers, &record);
        });
        reply.headers = list(headers);
        Flow::Respond(reply)
    }
}

/// After how many seconds, at least one, all limits that are exceeded have been set back.
fn until_reset(statuses: &[DescriptorStatus]) -> Option<u64> {
    let exceeded = statuses.iter().take(MAX_HEADERS).filter(|status| status.code == Code::OverLimit as i32);
    let seconds = exceeded.map(|status| status.duration_until_reset.map_or(0, |duration| duration.seconds));
    Some(u64::try_from(seconds.max()?).unwrap_or_default().max(1))
}

/// The state of the limit that is the nearest, as `x-ratelimit-*` tell it: where that, by its place, is told of.
fn state(statuses: &[DescriptorStatus], is_told: impl Fn(usize) -> bool) -> Vec<Change> {
    let mut policy = String::new();
    let mut nearest: Option<(&DescriptorStatus, u32, bool)> = None;
    for (at, status) in statuses.iter().take(MAX_HEADERS).enumerate() {
        let Some(limit) = &status.current_limit else { continue };
        let is_told = is_told(at);
        if nearest.is_none_or(|(before, ..)| status.limit_remaining < before.limit_remaining) {
            nearest = Some((status, limit.requests_per_unit, is_told));
        }
        if !is_told {
            continue;
        }
        let window = match Unit::try_from(limit.unit) {
            Ok(Unit::Second) => 1,
            Ok(Unit::Minute) => 60,
            Ok(Unit::Hour) => 3600,
            Ok(Unit::Day) => 86_400,
            Ok(Unit::Week) => 604_800,
            Ok(Unit::Month) => 2_592_000,
            Ok(Unit::Year) => 31_536_000,
            Ok(Unit::Unknown) | Err(_) => continue,
        };
        // Writing to a String cannot fail.
        let _ = write!(policy, ", {};w={window}", limit.requests_per_unit);
        if !limit.name.is_empty() {
            let _ = write!(policy, ";name=\"{}\"", limit.name);
        }
    }
    let Some((status, requests, true)) = nearest else { return Vec::new() };
    let reset = status.duration_until_reset.map_or(0, |duration| duration.seconds);
    let headers = [
        ("x-ratelimit-limit", format!("{requests}{policy}")),
        ("x-ratelimit-remaining", status.limit_remaining.to_string()),
        ("x-ratelimit-reset", reset.to_string()),
    ];
    headers.iter().map(|(name, value)| Change::new(name, value.as_bytes(), Action::Add)).collect()
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: ProtoRateLimit = unpack(typed_config, cx.path)?;
    let field = |name: &str| format!("{}.{name}", cx.path);
    let Some(service) = config.rate_limit_service.as_ref() else {
        return Err(FieldError::new(field("rate_limit_service"), "value is required"));
    };
    #[expect(deprecated, reason = "this is where it is refused")]
    const V2: i32 = ApiVersion::V2 as i32;
    if service.transport_api_version == V2 {
        let path = field("rate_limit_service.transport_api_version");
        return Err(FieldError::unsupported_value(path, "V2", "V3"));
    }
    let Some(grpc) = &service.grpc_service else {
        return Err(FieldError::new(field("rate_limit_service.grpc_service"), "value is required"));
    };
    let timeout = parse::duration(config.timeout, cx.path, "timeout")?.unwrap_or(DEFAULT_TIMEOUT);
    let service = grpc::Service::parse_unary(grpc, None, &field("rate_limit_service.grpc_service"))?.within(timeout);
    let prefix = config.stat_prefix.as_str();
    let dot = if prefix.is_empty() { "" } else { "." };
    let name = |leaf: &str| format!("ratelimit.{prefix}{dot}{leaf}").into();
    let share = |share: Option<&_>, key: &str| {
        let always = || RuntimeFraction { default: Fraction::percent(100), key: Key::optional(key) };
        share.map_or_else(always, parse::runtime_fraction)
    };
    let deny =
        RuntimeFraction { default: Fraction::percent(if config.failure_mode_deny { 100 } else { 0 }), key: None };
    let response_add = parse::headers_to_add(&config.response_headers_to_add, cx.path, "response_headers_to_add")?;
    // As in Envoy, what is no error is no answer here.
    let status = parse::status(config.rate_limited_status.map(|it| it.code), 400, StatusCode::TOO_MANY_REQUESTS);
    Ok(Arc::new(RateLimitFactory(Shared::new(Configured {
        service,
        domain: config.domain.into(),
        stage: config.stage,
        internal: match config.request_type.as_str() {
            "internal" => Some(true),
            "external" => Some(false),
            _ => None,
        },
        deny_on_failure: config.failure_mode_deny_percent.as_ref().map_or(deny, parse::runtime_fraction),
        enabled: share(config.filter_enabled.as_ref(), "ratelimit.http_filter_enabled"),
        enforced: share(config.filter_enforced.as_ref(), "ratelimit.http_filter_enforcing"),
        status,
        grpc_status: config.rate_limited_as_resource_exhausted.then_some(RESOURCE_EXHAUSTED),
        status_on_error: parse::status(
            config.status_on_error.map(|it| it.code),
            400,
            StatusCode::INTERNAL_SERVER_ERROR,
        ),
        shows_state: config.enable_x_ratelimit_headers != 0,
        says_limited: !config.disable_x_envoy_ratelimited_header,
        says_when: config.enable_retry_after_header && status == StatusCode::TOO_MANY_REQUESTS,
        response_headers: HeaderMutations { response_add, ..HeaderMutations::default() },
        own: parse::rate_limits(&config.rate_limits, cx.path, "rate_limits")?.into(),
        namespace: match config.metadata_namespace.as_str() {
            "" => NAMESPACE.into(),
            other => other.into(),
        },
        names: Names {
            ok: name("ok"),
            error: name("error"),
            over_limit: name("over_limit"),
            failure_mode_allowed: name("failure_mode_allowed"),
        },
    }))))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let RateLimitPerRoute { vh_rate_limits, override_option: _, rate_limits, domain } = unpack(config, path)?;
    Ok(Arc::new(Told {
        of_host: of_host(vh_rate_limits),
        own: parse::rate_limits(&rate_limits, path, "rate_limits")?.into(),
        domain: domain.into(),
    }))
}

/// `VhRateLimitsOptions`, of which there are two with the same values.
pub(super) fn of_host(option: i32) -> VirtualHostRateLimits {
    match option {
        1 => VirtualHostRateLimits::Include,
        2 => VirtualHostRateLimits::Ignore,
        _ => VirtualHostRateLimits::Override,
    }
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::service::ratelimit::v3::rate_limit_response::RateLimit;

    use super::*;

    #[test]
    fn the_nearest_limit_is_told() {
        let status = |requests_per_unit, unit: Unit, limit_remaining, name: &str| DescriptorStatus {
            current_limit: Some(RateLimit { name: name.to_owned(), requests_per_unit, unit: unit as i32 }),
            limit_remaining,
            ..DescriptorStatus::default()
        };
        let told = |statuses: &[DescriptorStatus]| -> Vec<String> {
            state(statuses, |at| at != 2).iter().map(|change| change.value.to_str().unwrap().to_owned()).collect()
        };
        assert_eq!(told(&[DescriptorStatus::default()]), [""; 0]);
        assert_eq!(
            told(&[status(10, Unit::Second, 5, ""), status(100, Unit::Week, 2, "a")]),
            ["100, 10;w=1, 100;w=604800;name=\"a\"", "2", "0"]
        );
        // One that is not to be told of.
        let far = status(1000, Unit::Hour, 500, "b");
        let all = [status(10, Unit::Second, 5, ""), status(100, Unit::Week, 2, "a"), far.clone()];
        assert_eq!(told(&all)[0], "100, 10;w=1, 100;w=604800;name=\"a\"");
        let nearest = [far.clone(), far, status(10, Unit::Second, 5, "")];
        assert_eq!(told(&nearest), [""; 0]);
    }
}
