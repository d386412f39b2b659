//! Redirects of upstreams that are followed here: `internal_redirect_policy`. The request is then one that begins anew, with the head
//! that it was sent with.

use http::{
    HeaderValue, Method, StatusCode, Uri,
    header::{CONTENT_LENGTH, HOST, LOCATION, TRANSFER_ENCODING},
};

use super::{
    RouteRef,
    body::Body,
    headers::names::X_ENVOY_ORIGINAL_URL,
    redirect,
    replay::Replay,
    route_match::authority,
    stats::HcmStats,
    stream::{RequestHead, ResponseHead},
};
use crate::config::model::{InternalRedirectPolicy, InternalRedirectPredicate, Route};

/// The request as it was sent: what may be sent again.
pub(super) struct Sent {
    pub(super) head: RequestHead,
    /// `None`: it has no body.
    pub(super) body: Option<Replay>,
}

/// What one request has come past, in all its streams. Requests that were never redirected have none.
#[derive(Debug, Default)]
pub(super) struct Trail {
    redirects: u32,
    /// The routes that redirects of a route with `previous_routes` led to: its name, and theirs.
    visited: Vec<(Box<str>, Box<str>)>,
}

/// The request that `response` redirects to; `None`: the response is for the client, and the statistics know why.
///
/// `encrypted`: the client came by TLS. `find` finds the route of a request.
pub(super) fn follow(
    sent: &Sent,
    (policy, route): (&InternalRedirectPolicy, &Route),
    response: &ResponseHead,
    (encrypted, trail): (bool, &mut Trail),
    stats: &HcmStats,
    find: impl FnOnce(&RequestHead) -> Option<RouteRef>,
) -> Option<(RequestHead, Body)> {
    let location = response.headers.get(LOCATION)?;
    // The request must be here whole.
    if sent.body.as_ref().is_some_and(|body| !body.is_whole()) {
        return None;
    }
    let Some(target) = absolute(location) else {
        stats.passthrough_internal_redirect_bad_location.inc();
        return None;
    };
    let https = encrypted && redirect::scheme(&sent.head) == "https";
    let to_https = target.scheme_str() != Some("http");
    if !policy.allow_cross_scheme_redirect && https != to_https {
        stats.passthrough_internal_redirect_unsafe_scheme.inc();
        return None;
    }
    if trail.redirects >= policy.max_internal_redirects {
        stats.passthrough_internal_redirect_too_many_redirects.inc();
        return None;
    }
    let mut head = sent.head.clone();
    for name in &policy.response_headers_to_copy {
        head.headers.remove(name);
        for value in response.headers.get_all(name) {
            head.headers.append(name, value.clone());
        }
    }
    // Before the host goes.
    let path = sent.head.uri.path_and_query().map_or("/", |path| path.as_str());
    let original = format!("{}://{}{path}", if https { "https" } else { "http" }, authority(&sent.head));
    head.headers.remove(HOST);
    head.uri = target;
    let Some(next) = find(&head) else {
        stats.passthrough_internal_redirect_no_route.inc();
        return None;
    };
    let accepted = policy.predicates.iter().all(|predicate| match predicate {
        InternalRedirectPredicate::PreviousRoutes => trail.is_new(&route.name, &next.name),
        InternalRedirectPredicate::AllowListedRoutes(names) => names.contains(next.name.as_str()),
        InternalRedirectPredicate::SafeCrossScheme => https || !to_https,
    });
    if !accepted {
        stats.passthrough_internal_redirect_predicate.inc();
        return None;
    }
    let mut body = sent.body.as_ref().map_or(Body::Empty, Replay::reader);
    // RFC 9110, section 15.4.4.
    if response.status == StatusCode::SEE_OTHER && head.method != Method::GET && head.method != Method::HEAD {
        head.method = Method::GET;
        head.headers.remove(CONTENT_LENGTH);
        head.headers.remove(TRANSFER_ENCODING);
        body = Body::Empty;
    }
    if let Ok(original) = HeaderValue::from_str(&original) {
        head.headers.insert(X_ENVOY_ORIGINAL_URL, original);
    }
    trail.redirects += 1;
    Some((head, body))
}

impl Trail {
    /// Whether redirects of the route `from` lead to the route `to` for the first time.
    fn is_new(&mut self, from: &str, to: &str) -> bool {
        let known = self.visited.iter().any(|(a, b)| (&**a, &**b) == (from, to));
        if !known {
            self.visited.push((from.into(), to.into()));
        }
        !known
    }
}

/// A URL with a scheme and a host, without what follows a `#`.
pub(super) fn absolute(location: &HeaderValue) -> Option<Uri> {
    let text = location.to_str().ok()?;
    let text = text.split('#').next().unwrap_or_default();
    let mut parts = text.parse::<Uri>().ok()?.into_parts();
    let scheme = parts.scheme.as_ref()?.as_str();
    if scheme != "http" && scheme != "https" {
        return None;
    }
    let authority = parts.authority?;
    // Whom the client claims to be is nobody's business.
    parts.authority = match authority.as_str().rsplit_once('@') {
        Some((_, host)) => Some(host.parse().ok()?),
        None => Some(authority),
    };
    parts.path_and_query = match parts.path_and_query {
        Some(path) if path.as_str().starts_with('/') => Some(path),
        // It is written with one.
        Some(path) => Some(path.to_string().parse().ok()?),
        None => Some(http::uri::PathAndQuery::from_static("/")),
    };
    Uri::from_parts(parts).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_absolute() {
        let read = |text: &'static str| absolute(&HeaderValue::from_static(text)).map(|uri| uri.to_string());
        assert_eq!(read("http://a.test/x?y=z#f").as_deref(), Some("http://a.test/x?y=z"));
        assert_eq!(read("https://a.test:8443").as_deref(), Some("https://a.test:8443/"));
        assert_eq!(read("http://a.test?x").as_deref(), Some("http://a.test/?x"));
        assert_eq!(read("http://me@a.test/x").as_deref(), Some("http://a.test/x"));
        for text in ["", "/x", "a.test/x", "//a.test/x", "http:///x", "ftp://a.test/x", "http://"] {
            assert_eq!(read(text), None, "{text}");
        }
    }
}
