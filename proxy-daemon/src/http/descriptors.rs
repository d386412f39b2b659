//! The descriptors of a request: what rate limits count it under.

use std::borrow::Cow;

use envoy_types::pb::{
    envoy::r#type::v3::RateLimitUnit,
    google::protobuf::{Struct, value::Kind},
};
use http::HeaderValue;
use percent_encoding::percent_decode_str;

use super::{
    node,
    redirect::scheme,
    route_match::{authority, header_matches, query_matches},
    stream::{RequestHead, StreamCx},
};
use crate::{
    access_log::{Headers, Record},
    config::model::{
        Cidr, HitsAmount, LimitOverride, MatchedHeader, RateLimit, RateLimitAction, RouteAction, VirtualHostRateLimits,
        value_at,
    },
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
}

/// What one action makes of a request.
enum Entry {
    Some(Box<str>, Box<str>),
    /// The descriptor does without it.
    Skipped,
    /// There is no descriptor.
    None,
}

/// Of a request that is forwarded: by `own` where there are any, otherwise by its route, and by its virtual host as `of_host` says.
pub(super) fn of_request(
    own: &[RateLimit],
    stage: u32,
    of_host: VirtualHostRateLimits,
    head: &mut RequestHead,
    cx: &StreamCx,
) -> Vec<Descriptor> {
    let mut found = Vec::new();
    let Some(route) = &cx.route else { return found };
    let RouteAction::Forward(action) = &route.action else { return found };
    if !own.is_empty() {
        find(&mut found, own, stage, head, cx);
        return found;
    }
    let of_host = if action.include_vh_rate_limits { VirtualHostRateLimits::Include } else { of_host };
    let host: &[RateLimit] = match of_host {
        VirtualHostRateLimits::Include => &route.virtual_host().rate_limits,
        VirtualHostRateLimits::Override if action.rate_limits.is_empty() => &route.virtual_host().rate_limits,
        VirtualHostRateLimits::Override | VirtualHostRateLimits::Ignore => &[],
    };
    find(&mut found, &action.rate_limits, stage, head, cx);
    find(&mut found, host, stage, head, cx);
    found
}

/// Of any request, by `own`.
pub(super) fn of_own(own: &[RateLimit], stage: u32, head: &mut RequestHead, cx: &StreamCx) -> Vec<Descriptor> {
    let mut found = Vec::new();
    find(&mut found, own, stage, head, cx);
    found
}

fn find(found: &mut Vec<Descriptor>, limits: &[RateLimit], stage: u32, head: &mut RequestHead, cx: &StreamCx) {
    let wanted = limits.iter().filter(|limit| limit.stage == stage);
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
        found.push(Descriptor { entries, limit: overridden, hits });
    }
}

/// `None` where an action has nothing to say.
fn entries(actions: &[RateLimitAction], head: &RequestHead, cx: &StreamCx) -> Option<Entries> {
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
fn amount(amount: &HitsAmount, head: &mut RequestHead, cx: &StreamCx) -> Option<u64> {
    let format = match amount {
        HitsAmount::Fixed(amount) => return Some(*amount),
        HitsAmount::Format(format) => format,
    };
    let mut text = Vec::new();
    cx.format_request(head, |headers, record| {
        text = format.bytes(&Record { missing: "", request_headers: Some(Headers::All(headers)), ..*record });
    });
    let number: f64 = std::str::from_utf8(&text).ok()?.trim().parse().ok()?;
    (0.0..=MOST_HITS).contains(&number).then_some(number as u64)
}

/// The limit that is to be in the place of the service's.
fn overridden(limit: &LimitOverride, cx: &StreamCx) -> Option<(u32, i32)> {
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

fn entry(action: &RateLimitAction, head: &RequestHead, cx: &StreamCx) -> Entry {
    let absent = |skip_if_absent: &bool| if *skip_if_absent { Entry::Skipped } else { Entry::None };
    let if_so = |holds: bool, key: &str, value: &str| {
        if holds { Entry::Some(key.into(), value.into()) } else { Entry::None }
    };
    match action {
        RateLimitAction::SourceCluster => {
            let cluster = node::this().and_then(|node| node.cluster.to_str().ok()).unwrap_or_default();
            Entry::Some("source_cluster".into(), cluster.into())
        }
        RateLimitAction::DestinationCluster => match &cx.cluster {
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
                let metadata = cx.route.as_ref().and_then(|route| route.metadata.as_deref());
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
