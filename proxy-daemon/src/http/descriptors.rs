//! The descriptors of a request: what rate limits count it under.

use std::{borrow::Cow, net::SocketAddr, rc::Rc};

use envoy_types::pb::{
    envoy::r#type::v3::RateLimitUnit,
    google::protobuf::{Struct, value::Kind},
};
use http::HeaderValue;
use percent_encoding::percent_decode_str;

use super::{
    RouteRef, node,
    redirect::scheme,
    route_match::{authority, header_matches, query_matches},
    stream::{Progress, RequestHead, StreamCx},
};
use crate::{
    access_log::{HeaderFormat, Headers, Record},
    config::model::{
        Cidr, HitsAmount, LimitOverride, MatchedHeader, RateLimit, RateLimitAction, RouteAction, VirtualHostRateLimits,
        value_at,
    },
    upstream::WorkerCluster,
};

/// The most that a request may count for, as in Envoy.
const MOST_HITS: f64 = 1e9;

/// Keys and values, in the order of the actions.
pub(super) type Entries = Vec<(Box<str>, Box<str>)>;

/// One of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) entries: Entries,
    pub(super) limit: Option<(u32, i32)>,
    pub(super) hits: Option<(u64, bool)>,
    pub(super) is_told: Option<bool>,
}

/// When descriptors count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    Begin,
    /// `apply_on_stream_done`
    Done,
    /// At once, whatever that says.
    Any,
}

/// What descriptors are made of besides the request's head.
#[derive(Clone, Copy)]
pub(super) struct Basis<'a> {
    pub(super) when: When,
    pub(super) stage: u32,
    pub(super) route: Option<&'a RouteRef>,
    pub(super) cluster: Option<&'a Rc<WorkerCluster>>,
    /// The client's address.
    pub(super) remote: SocketAddr,
    pub(super) progress: &'a Progress,
    /// What a format makes of the request.
    pub(super) format: &'a dyn Fn(&HeaderFormat, &mut RequestHead) -> Vec<u8>,
}

/// What one action makes of a request.
enum Entry {
    Some(Box<str>, Box<str>),
    /// The descriptor does without it.
    Skipped,
    /// There is no descriptor.
    None,
}

impl Basis<'_> {
    /// Has something done with what there is of a request before it is forwarded.
    fn of<T>(cx: &StreamCx, stage: u32, when: When, make: impl FnOnce(&Basis<'_>) -> T) -> T {
        let format = |format: &HeaderFormat, head: &mut RequestHead| {
            let mut text = Vec::new();
            cx.format_request(head, |headers, record| {
                text = format.bytes(&Record { missing: "", request_headers: Some(Headers::All(headers)), ..*record });
            });
            text
        };
        make(&Basis {
            when,
            stage,
            route: cx.route.as_ref(),
            cluster: cx.cluster.as_ref(),
            remote: cx.remote,
            progress: &cx.progress,
            format: &format,
        })
    }
}

/// What a request is counted by: `own` where there are any, otherwise what its route says, and what its virtual host says as `of_host` has it.
fn limits_of<'a>(
    own: &'a [RateLimit],
    of_host: VirtualHostRateLimits,
    route: Option<&'a RouteRef>,
) -> [&'a [RateLimit]; 2] {
    let Some(route) = route else { return Default::default() };
    let RouteAction::Forward(action) = &route.action else { return Default::default() };
    if !own.is_empty() {
        return [own, &[]];
    }
    let of_host = if action.include_vh_rate_limits { VirtualHostRateLimits::Include } else { of_host };
    let host: &[RateLimit] = match of_host {
        VirtualHostRateLimits::Include => &route.virtual_host().rate_limits,
        VirtualHostRateLimits::Override if action.rate_limits.is_empty() => &route.virtual_host().rate_limits,
        VirtualHostRateLimits::Override | VirtualHostRateLimits::Ignore => &[],
    };
    [&action.rate_limits, host]
}

/// Of a request that is forwarded.
pub(super) fn of_request(
    own: &[RateLimit],
    (stage, when): (u32, When),
    of_host: VirtualHostRateLimits,
    head: &mut RequestHead,
    cx: &StreamCx,
) -> Vec<Descriptor> {
    Basis::of(cx, stage, when, |basis| of_basis(own, of_host, head, basis))
}

/// The same, of whatever there is of it.
pub(super) fn of_basis(
    own: &[RateLimit],
    of_host: VirtualHostRateLimits,
    head: &mut RequestHead,
    basis: &Basis<'_>,
) -> Vec<Descriptor> {
    let mut found = Vec::new();
    for limits in limits_of(own, of_host, basis.route) {
        find(&mut found, limits, head, basis);
    }
    found
}

/// Whether there may be some when the request is over.
pub(super) fn has_done(
    own: &[RateLimit],
    stage: u32,
    of_host: VirtualHostRateLimits,
    route: Option<&RouteRef>,
) -> bool {
    limits_of(own, of_host, route).into_iter().flatten().any(|limit| limit.on_done && limit.stage == stage)
}

/// Of any request, by `own`.
pub(super) fn of_own(own: &[RateLimit], stage: u32, head: &mut RequestHead, cx: &StreamCx) -> Vec<Descriptor> {
    let mut found = Vec::new();
    Basis::of(cx, stage, When::Begin, |basis| find(&mut found, own, head, basis));
    found
}

fn find(found: &mut Vec<Descriptor>, limits: &[RateLimit], head: &mut RequestHead, cx: &Basis<'_>) {
    let counts = |limit: &RateLimit| cx.when == When::Any || limit.on_done == (cx.when == When::Done);
    let wanted = limits.iter().filter(|limit| limit.stage == cx.stage && counts(limit));
    for limit in wanted.filter(|limit| limit.enabled.as_ref().is_none_or(|share| share.includes(fastrand::u64(..)))) {
        let Some(entries) = entries(&limit.actions, head, cx).filter(|entries| !entries.is_empty()) else { continue };
        let hits = match &limit.hits {
            None => None,
            Some(hits) => match amount(&hits.amount, head, cx) {
                Some(amount) => Some((amount, hits.negative)),
                None => continue,
            },
        };
        let overridden = limit.limit.as_ref().and_then(|limit| overridden(limit, cx));
        found.push(Descriptor { entries, limit: overridden, hits, is_told: limit.is_told });
    }
}

/// `None` where an action has nothing to say.
fn entries(actions: &[RateLimitAction], head: &RequestHead, cx: &Basis<'_>) -> Option<Entries> {
    let mut entries = Vec::with_capacity(actions.len());
    for action in actions {
        match entry(action, head, cx) {
            Entry::Some(key, value) => entries.push((key, value)),
            Entry::Skipped => {}
            Entry::None => return None,
        }
    }
    Some(entries)
}

/// What a request counts for; `None`: that is no number, or too large.
fn amount(amount: &HitsAmount, head: &mut RequestHead, cx: &Basis<'_>) -> Option<u64> {
    let format = match amount {
        HitsAmount::Fixed(amount) => return Some(*amount),
        HitsAmount::Format(format) => format,
    };
    let text = (cx.format)(format, head);
    let number: f64 = std::str::from_utf8(&text).ok()?.trim().parse().ok()?;
    (0.0..=MOST_HITS).contains(&number).then_some(number as u64)
}

/// The limit that is to be in the place of the service's.
fn overridden(limit: &LimitOverride, cx: &Basis<'_>) -> Option<(u32, i32)> {
    let (namespace, path) = match limit {
        LimitOverride::Fixed(requests, unit) => return Some((*requests, *unit)),
        LimitOverride::Metadata { namespace, path } => (namespace, path),
    };
    let metadata = cx.progress.metadata.borrow();
    let path = path.iter().map(|key| &**key);
    let told = value_at(metadata.as_ref()?.namespace(namespace), path)?;
    let Some(Kind::StructValue(told)) = &told.kind else { return None };
    let field = |name: &str| told.fields.get(name)?.kind.as_ref();
    match (field("requests_per_unit")?, field("unit")?) {
        // Numbers that are none of requests end at the limits of what can be told.
        (Kind::NumberValue(requests), Kind::StringValue(unit)) => {
            Some((*requests as u32, RateLimitUnit::from_str_name(unit)?.into()))
        }
        _ => None,
    }
}

fn entry(action: &RateLimitAction, head: &RequestHead, cx: &Basis<'_>) -> Entry {
    let absent = |skip_if_absent: &bool| if *skip_if_absent { Entry::Skipped } else { Entry::None };
    let if_so = |holds: bool, key: &str, value: &str| {
        if holds { Entry::Some(key.into(), value.into()) } else { Entry::None }
    };
    match action {
        RateLimitAction::SourceCluster => {
            let cluster = node::this().and_then(|node| node.cluster.to_str().ok()).unwrap_or_default();
            Entry::Some("source_cluster".into(), cluster.into())
        }
        RateLimitAction::DestinationCluster => match cx.cluster {
            Some(cluster) => Entry::Some("destination_cluster".into(), (*cluster.cluster.config.name).into()),
            None => Entry::None,
        },
        RateLimitAction::RequestHeaders { header, key, skip_if_absent } => match value(header, head) {
            Some(value) => Entry::Some(key.clone(), value),
            None => absent(skip_if_absent),
        },
        RateLimitAction::QueryParameters { name, key, skip_if_absent } => match parameter(head, name) {
            Some(value) => Entry::Some(key.clone(), value),
            None => absent(skip_if_absent),
        },
        RateLimitAction::RemoteAddress => {
            Entry::Some("remote_address".into(), cx.remote.ip().to_canonical().to_string().into())
        }
        RateLimitAction::MaskedRemoteAddress { v4, v6 } => {
            let address = cx.remote.ip().to_canonical();
            let bits = if address.is_ipv4() { *v4 } else { *v6 };
            match Cidr::new(address, bits) {
                Some(range) => {
                    let text = format!("{}/{}", range.network, range.prefix_len);
                    Entry::Some("masked_remote_address".into(), text.into())
                }
                None => Entry::None,
            }
        }
        RateLimitAction::GenericKey { key, value } => Entry::Some(key.clone(), value.clone()),
        RateLimitAction::HeaderValueMatch { key, value, expect_match, headers } => {
            let all = headers.iter().all(|matcher| header_matches(matcher, head));
            if_so(all == *expect_match, key, value)
        }
        RateLimitAction::QueryParameterValueMatch { key, value, expect_match, parameters } => {
            let all = parameters.iter().all(|matcher| query_matches(matcher, head.uri.query()));
            if_so(all == *expect_match, key, value)
        }
        RateLimitAction::RemoteAddressMatch { key, value, ranges, inverted } => {
            let address = cx.remote.ip().to_canonical();
            if_so(ranges.iter().any(|range| range.contains(address)) != *inverted, key, value)
        }
        RateLimitAction::Metadata { of_route, key, namespace, path, default, skip_if_absent } => {
            let told = if *of_route {
                let metadata = cx.route.and_then(|route| route.metadata.as_deref());
                text_at(metadata.and_then(|metadata| metadata.namespace(namespace)), path)
            } else {
                let metadata = cx.progress.metadata.borrow();
                text_at(metadata.as_ref().and_then(|metadata| metadata.namespace(namespace)), path)
            };
            match told.or_else(|| (!default.is_empty()).then(|| default.clone())) {
                Some(value) => Entry::Some(key.clone(), value),
                None => absent(skip_if_absent),
            }
        }
    }
}

/// The first value of a header.
fn value(header: &MatchedHeader, head: &RequestHead) -> Option<Box<str>> {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into();
    match header {
        MatchedHeader::Name(name) => head.headers.get(name).map(text),
        MatchedHeader::Method => Some(head.method.as_str().into()),
        MatchedHeader::Path => head.uri.path_and_query().map(|path| path.as_str().into()),
        MatchedHeader::Authority => Some(authority(head).into()),
        MatchedHeader::Scheme => Some(scheme(head).into()),
    }
}

/// The first value of a query parameter, decoded.
pub(super) fn parameter(head: &RequestHead, name: &str) -> Option<Box<str>> {
    let pairs = head.uri.query()?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let (_, value) = { pairs }.find(|(key, _)| percent_decoded(key) == name)?;
    Some(percent_decoded(value).into_owned().into())
}

/// What is no UTF-8 becomes U+FFFD.
fn percent_decoded(text: &str) -> Cow<'_, str> {
    percent_decode_str(text).decode_utf8_lossy()
}

/// A text in metadata.
fn text_at(namespace: Option<&Struct>, path: &[Box<str>]) -> Option<Box<str>> {
    match &value_at(namespace, path.iter().map(|key| &**key))?.kind {
        Some(Kind::StringValue(text)) if !text.is_empty() => Some(text.as_str().into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_parameters_are_decoded() {
        let (mut head, ()) = http::Request::new(()).into_parts();
        head.uri = http::Uri::from_static("/?a%20b=1%2f&c=%zz%4&c=2&%ff=x&e=%+f");
        assert_eq!(parameter(&head, "a b").as_deref(), Some("1/"));
        assert_eq!(parameter(&head, "c").as_deref(), Some("%zz%4"));
        assert_eq!(parameter(&head, "e").as_deref(), Some("%+f"));
        assert_eq!(parameter(&head, "d"), None);
    }
}
