//! What a request is hashed by where its cluster's load balancer wants a hash: `hash_policy` of routes, or of the load balancer. All hashes are
//! Envoy's.

use std::{borrow::Cow, fmt::Write as _, net::SocketAddr};

use http::HeaderValue;
use twox_hash::XxHash64;

use super::{
    metadata::Metadata,
    route_match::{authority, cookie_bytes},
    stream::{RequestHead, StreamCx},
};
use crate::config::model::{HashCookie, HashPolicy, HashSource, MatchedHeader, RegexRewrite};

/// The hash of a request; `None`: it has nothing to hash. Cookies that are made for it are added to `made`.
pub(super) fn hash(
    policies: &[HashPolicy],
    head: &RequestHead,
    cx: &StreamCx,
    made: &mut Vec<HeaderValue>,
) -> Option<u64> {
    let told = cx.progress.metadata.borrow();
    hash_by(policies, Some(head), Some((cx.remote, cx.connection.local)), told.as_deref(), made)
}

/// The same of what may be no request (`head`), or no client's (`ends`: the client, and our end).
pub(crate) fn hash_of(
    policies: &[HashPolicy],
    head: Option<&RequestHead>,
    ends: Option<(SocketAddr, SocketAddr)>,
    made: &mut Vec<HeaderValue>,
) -> Option<u64> {
    hash_by(policies, head, ends, None, made)
}

fn hash_by(
    policies: &[HashPolicy],
    head: Option<&RequestHead>,
    ends: Option<(SocketAddr, SocketAddr)>,
    told: Option<&Metadata>,
    made: &mut Vec<HeaderValue>,
) -> Option<u64> {
    let mut hash: Option<u64> = None;
    for policy in policies {
        let next = match &policy.source {
            HashSource::Header { name, rewrite } => head.and_then(|head| of_header(name, rewrite.as_deref(), head)),
            HashSource::Cookie(wanted) => of_cookie(wanted, head, ends, made),
            HashSource::SourceIp => ends.map(|(remote, _)| of_bytes(remote.ip().to_canonical().to_string().as_bytes())),
            HashSource::QueryParameter(name) => head.and_then(|head| of_parameter(name, head.uri.query())),
            HashSource::FilterState(key) => {
                let state = told.and_then(|told| told.state(key)).filter(|state| state.hashable);
                state.map(|state| of_bytes(&state.text))
            }
        };
        if let Some(next) = next {
            // Equal parts do not cancel each other out.
            hash = Some(hash.map_or(0, |before| before.rotate_left(1)) ^ next);
        }
        if policy.terminal && hash.is_some() {
            break;
        }
    }
    hash
}

fn of_bytes(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

fn of_header(name: &MatchedHeader, rewrite: Option<&RegexRewrite>, head: &RequestHead) -> Option<u64> {
    // What is no text is hashed as it is.
    let rewritten = |value| match (rewrite, str::from_utf8(value)) {
        (Some(rewrite), Ok(text)) => Cow::Owned(rewrite.apply(text).into_bytes()),
        _ => Cow::Borrowed(value),
    };
    let single = match name {
        MatchedHeader::Method => head.method.as_str(),
        MatchedHeader::Path => head.uri.path_and_query()?.as_str(),
        MatchedHeader::Authority => authority(head),
        MatchedHeader::Scheme => head.uri.scheme_str().unwrap_or_else(|| super::redirect::scheme(head)),
        MatchedHeader::Name(name) => {
            let mut values = head.headers.get_all(name).iter().map(|value| rewritten(value.as_bytes()));
            let first = values.next()?;
            let Some(second) = values.next() else { return Some(of_bytes(&first)) };
            let mut values: Vec<_> = [first, second].into_iter().chain(values).collect();
            values.sort_unstable();
            return Some(values.iter().fold(0, |seed, value| XxHash64::oneshot(seed, value)));
        }
    };
    Some(of_bytes(&rewritten(single.as_bytes())))
}

fn of_parameter(name: &str, query: Option<&str>) -> Option<u64> {
    let pairs = query?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(known, _)| *known == name);
    values.next().map(|(_, value)| of_bytes(value.as_bytes()))
}

fn of_cookie(
    wanted: &HashCookie,
    head: Option<&RequestHead>,
    ends: Option<(SocketAddr, SocketAddr)>,
    made: &mut Vec<HeaderValue>,
) -> Option<u64> {
    let value = head.and_then(|head| cookie_bytes(&head.headers, &wanted.name));
    if let Some(value) = value.filter(|value| !value.is_empty()) {
        return Some(of_bytes(value));
    }
    let ttl = wanted.ttl?;
    // The same for all requests of a connection: they may come before the first answer.
    let (remote, local) = ends?;
    let value = format!("{remote}{local}");
    let value = format!("{:016x}", of_bytes(value.as_bytes()));
    let mut text = format!("{}=\"{value}\"", wanted.name);
    // Writing to a String cannot fail.
    if ttl.as_secs() > 0 {
        let _ = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if !wanted.path.is_empty() {
        let _ = write!(text, "; Path={}", wanted.path);
    }
    for (name, value) in &wanted.attributes {
        let _ = match &**value {
            "" => write!(text, "; {name}"),
            value => write!(text, "; {name}={value}"),
        };
    }
    text.push_str("; HttpOnly");
    made.extend(HeaderValue::from_str(&text).ok());
    Some(of_bytes(value.as_bytes()))
}
