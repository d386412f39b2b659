//! Whether a request is as the match of a route, or one of its matchers, wants it.

use std::{borrow::Cow, cell::RefCell};

use http::{HeaderMap, HeaderName, HeaderValue, Method, request::Parts};

use super::{look::Look as _, metadata::Metadata};
use crate::config::model::{
    CookieMatcher, FilterStateMatcher, HeaderMatcher, HeaderValueMatch, MatchedHeader, MetadataMatcher, PathMatch,
    QueryParameterMatch, QueryParameterMatcher, RouteMatch,
};

/// What routes are chosen by, besides the request's head.
#[derive(Debug, Clone, Copy, Default)]
pub struct MatchCx<'a> {
    /// The stream's random number.
    pub random: u64,
    /// The client has shown a certificate.
    pub certificate_presented: bool,
    /// It was found good.
    pub certificate_validated: bool,
    /// What filters have told; `None`: nobody can have told anything.
    pub metadata: Option<&'a RefCell<Option<Box<Metadata>>>>,
}

impl MatchCx<'_> {
    fn metadata_matches(&self, matchers: &[MetadataMatcher]) -> bool {
        if matchers.is_empty() {
            return true;
        }
        let told = self.metadata.map(RefCell::borrow);
        let told = told.as_ref().and_then(|told| told.as_deref());
        matchers.iter().all(|matcher| matcher.matches(told.and_then(|told| told.namespace(&matcher.filter))))
    }

    fn state_matches(&self, matchers: &[FilterStateMatcher]) -> bool {
        if matchers.is_empty() {
            return true;
        }
        let told = self.metadata.map(RefCell::borrow);
        let told = told.as_ref().and_then(|told| told.as_deref());
        matchers.iter().all(|matcher| matcher.matches(told))
    }
}

/// The host of a request: HTTP/2's `:authority`, or HTTP/1's `host`.
pub fn authority(request: &Parts) -> &str {
    match request.uri.authority() {
        Some(authority) => authority.as_str(),
        None => request.headers.first(&http::header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default(),
    }
}

/// Whether a request is as the rule wants it.
pub(super) fn matches(rule: &RouteMatch, path: &str, request: &Parts, cx: &MatchCx<'_>) -> bool {
    // What has no path is found by `connect_matcher` alone, as in Envoy.
    (request.method == Method::CONNECT) == matches!(rule.path, PathMatch::Connect)
        && path_matches(&rule.path, rule.case_sensitive, path)
        && rule.headers.iter().all(|matcher| header_matches(matcher, request))
        && (rule.query_parameters.is_empty()
            || rule.query_parameters.iter().all(|matcher| query_matches(matcher, request.uri.query())))
        && rule.cookies.iter().all(|matcher| cookie_matches(matcher, request))
        && rule.certificate_presented.is_none_or(|wanted| wanted == cx.certificate_presented)
        && rule.certificate_validated.is_none_or(|wanted| wanted == cx.certificate_validated)
        && cx.metadata_matches(&rule.dynamic_metadata)
        && cx.state_matches(&rule.filter_state)
        && rule.runtime_fraction.as_ref().is_none_or(|share| share.includes(cx.random))
        && (!rule.grpc || super::headers::is_grpc(&request.headers))
}

pub(super) fn path_matches(rule: &PathMatch, case_sensitive: bool, path: &str) -> bool {
    let same = |a: &str, b: &str| if case_sensitive { a == b } else { a.eq_ignore_ascii_case(b) };
    let begins = |prefix: &str| path.get(..prefix.len()).is_some_and(|start| same(start, prefix));
    match rule {
        PathMatch::Prefix(prefix) => begins(prefix),
        PathMatch::Path(whole) => same(path, whole),
        PathMatch::Regex(regex) | PathMatch::Template(regex) => regex.is_match(path),
        PathMatch::Connect => true,
        PathMatch::PathSeparatedPrefix(prefix) => {
            begins(prefix) && (path.len() == prefix.len() || path.as_bytes()[prefix.len()] == b'/')
        }
    }
}

/// Whether a header is as the matcher wants it; of several values one will do, as in Envoy.
pub(super) fn header_matches(matcher: &HeaderMatcher, request: &Parts) -> bool {
    match &matcher.name {
        MatchedHeader::Name(name) if !is_split_cookie(name, request) => values_match(matcher, name, &request.headers),
        name => matches_any(matcher, value_of(name, request).into_iter()),
    }
}

/// Cookies that came in several fields are one value (RFC 9113, 8.2.3).
fn is_split_cookie(name: &HeaderName, request: &Parts) -> bool {
    *name == http::header::COOKIE && request.version == http::Version::HTTP_2
}

/// The value of a header, or of all of its fields with commas between them; `None` where it is not there.
pub(crate) fn value_of<'a>(name: &MatchedHeader, request: &'a Parts) -> Option<Cow<'a, str>> {
    Some(Cow::Borrowed(match name {
        MatchedHeader::Method => request.method.as_str(),
        MatchedHeader::Path => request.uri.path_and_query()?.as_str(),
        MatchedHeader::Authority => authority(request),
        MatchedHeader::Scheme => request.uri.scheme_str().unwrap_or_else(|| super::redirect::scheme(request)),
        MatchedHeader::Name(name) if is_split_cookie(name, request) => {
            return super::headers::joined_by(&request.headers, name, "; ").filter(|joined| !joined.is_empty());
        }
        MatchedHeader::Name(name) => return super::headers::joined(&request.headers, name),
    }))
}

/// Whether the header `name` of a message is as the matcher wants it.
pub(crate) fn values_match(matcher: &HeaderMatcher, name: &HeaderName, headers: &HeaderMap) -> bool {
    matches_any(matcher, headers.get_all(name).iter().map(text_of))
}

/// What of a header is compared: bytes that are no UTF-8 are replaced, for a value with them is there all the same.
fn text_of(value: &HeaderValue) -> Cow<'_, str> {
    String::from_utf8_lossy(value.as_bytes())
}

/// Whether one of a header's values is as the matcher wants it.
pub(crate) fn matches_any<T: AsRef<str>>(matcher: &HeaderMatcher, values: impl Iterator<Item = T>) -> bool {
    let mut values = values.peekable();
    let missing = values.peek().is_none();
    let one = |value: &str| match &matcher.value {
        HeaderValueMatch::Present(wanted) => *wanted,
        HeaderValueMatch::String(matcher) => matcher.matches(value),
        HeaderValueMatch::Range { start, end } => {
            value.parse::<i64>().is_ok_and(|number| (*start..*end).contains(&number))
        }
    };
    let verdict = match (&matcher.value, missing) {
        (_, true) if matcher.treat_missing_header_as_empty => one(""),
        (HeaderValueMatch::Present(wanted), true) => !wanted,
        // A header that is missing does not match, inverted or not, as in Envoy.
        (_, true) => return false,
        (_, false) => values.any(|value| one(value.as_ref())),
    };
    verdict != matcher.invert_match
}

pub(super) fn query_matches(matcher: &QueryParameterMatcher, query: Option<&str>) -> bool {
    let pairs = query.unwrap_or_default().split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let mut values = pairs.filter(|(name, _)| *name == matcher.name).map(|(_, value)| value);
    match (&matcher.value, values.next()) {
        (QueryParameterMatch::Present(wanted), value) => value.is_some() == *wanted,
        (QueryParameterMatch::String(wanted), value) => value.is_some_and(|value| wanted.matches(value)),
    }
}

fn cookie_matches(matcher: &CookieMatcher, request: &Parts) -> bool {
    cookie(&request.headers, &matcher.name).is_some_and(|value| matcher.value.matches(&value)) != matcher.invert_match
}

/// The value of the first cookie of this name, as text.
pub(super) fn cookie<'a>(headers: &'a http::HeaderMap, name: &str) -> Option<Cow<'a, str>> {
    cookie_bytes(headers, name).map(String::from_utf8_lossy)
}

/// The value of the first cookie of this name.
pub(super) fn cookie_bytes<'a>(headers: &'a http::HeaderMap, name: &str) -> Option<&'a [u8]> {
    let lines = headers.get_all(http::header::COOKIE).iter();
    let mut pairs = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b';')).filter_map(|pair| {
        let pair = pair.trim_ascii();
        let (known, value) = pair.split_at_checked(name.len())?;
        value.strip_prefix(b"=").filter(|_| known == name.as_bytes())
    });
    pairs.next().map(unquoted)
}

/// A cookie's value without the quotes around it.
fn unquoted(value: &[u8]) -> &[u8] {
    value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value)
}

#[cfg(test)]
#[path = "route_match_tests.rs"]
mod tests;
