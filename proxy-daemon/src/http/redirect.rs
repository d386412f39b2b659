//! Answers a request with a redirect, or tells where it has created something.

use std::borrow::Cow;

use http::{HeaderValue, header::LOCATION};

use super::{
    headers::names::X_FORWARDED_PROTO,
    look::Look as _,
    route_match::authority,
    stream::{LocalReply, RequestHead},
};
use crate::{
    access_log::ResponseFlags,
    config::model::{PathMatch, PathRewrite, RedirectAction, RedirectPath, RouteMatch, TemplatePiece},
};

/// The answer to `request`; `path` is what `path_rewrite` has made.
pub(super) fn redirect(request: &RequestHead, rule: &RouteMatch, action: &RedirectAction, path: &str) -> LocalReply {
    let mut reply = LocalReply::new(action.status, "", ResponseFlags::default(), "direct_response");
    if let Ok(location) = HeaderValue::from_str(&location(request, Some(rule), action, path)) {
        reply.headers.push((LOCATION, location));
    }
    reply
}

/// The request's own URL, which a direct response of 201 names in `location`.
pub(super) fn own_url(request: &RequestHead) -> Option<HeaderValue> {
    let path = request.uri.path_and_query().map_or("/", |path| path.as_str());
    HeaderValue::from_str(&format!("{}://{}{path}", scheme(request), authority(request))).ok()
}

/// The scheme that the client used: `x-forwarded-proto` has been set or checked by now.
pub(super) fn scheme(request: &RequestHead) -> &'static str {
    match request.headers.first(&X_FORWARDED_PROTO) {
        Some(value) if value == "https" => "https",
        _ => "http",
    }
}

/// The URL that a redirect leads to. `rule`: what the request's route matches, of which prefixes are replaced; `made`: what
/// `path_rewrite` has made.
pub(super) fn location(
    request: &RequestHead,
    rule: Option<&RouteMatch>,
    action: &RedirectAction,
    made: &str,
) -> String {
    let before = scheme(request);
    let scheme = action.scheme.as_deref().unwrap_or(before);
    let (host, port) = split_port(authority(request));
    let host = action.host.as_deref().unwrap_or(host);
    let mut location = format!("{scheme}://{host}");
    // The request's port is kept, unless the scheme changes and it was the old scheme's default.
    let default = if before == "https" { 443 } else { 80 };
    let kept = port.filter(|port| action.host.is_none() && (scheme == before || *port != default));
    if let Some(port) = action.port.or(kept) {
        location.push_str(&format!(":{port}"));
    }
    let path = request.uri.path();
    let path = match &action.path {
        RedirectPath::Format(_) if !made.is_empty() => Cow::Borrowed(made),
        RedirectPath::Keep | RedirectPath::Format(_) => Cow::Borrowed(path),
        RedirectPath::Replace(replacement) => Cow::Borrowed(&**replacement),
        RedirectPath::PrefixRewrite(prefix) => match rule {
            Some(rule) => Cow::Owned(rewrite_prefix(path, &rule.path, prefix)),
            None => Cow::Borrowed(path),
        },
        RedirectPath::RegexRewrite(rewrite) => Cow::Owned(rewrite.apply(path)),
    };
    // Without it, what a client asks for could end the host's name: `.evil.example`.
    if !path.starts_with('/') {
        location.push('/');
    }
    location.push_str(&path);
    let has_query = matches!(action.path, RedirectPath::Replace(_) | RedirectPath::Format(_)) && path.contains('?');
    if has_query {
        return location;
    }
    if let (Some(query), false) = (request.uri.query(), action.strip_query) {
        location.push('?');
        location.push_str(query);
    }
    location
}

/// The path, without its query, that a route rewrites `path` to; `None`: it stays.
pub(super) fn rewrite_path(path: &str, matched: &PathMatch, rewrite: &PathRewrite) -> Option<String> {
    match rewrite {
        // Formats need to know more.
        PathRewrite::None | PathRewrite::Format(_) => None,
        PathRewrite::Prefix(prefix) => Some(rewrite_prefix(path, matched, prefix)),
        PathRewrite::Regex(rewrite) => Some(rewrite.apply(path)),
        PathRewrite::Template(pieces) => {
            let PathMatch::Template(template) = matched else { return None };
            let captures = template.captures(path)?;
            let mut rewritten = String::new();
            for piece in pieces {
                rewritten.push_str(match piece {
                    TemplatePiece::Literal(text) => text,
                    TemplatePiece::Variable(name) => captures.name(name).map_or("", |group| group.as_str()),
                });
            }
            Some(rewritten)
        }
    }
}

/// Replaces what the path match consumed: the prefix, or the whole path.
pub(super) fn rewrite_prefix(path: &str, matched: &PathMatch, prefix: &str) -> String {
    let consumed = match matched {
        PathMatch::Prefix(text) | PathMatch::PathSeparatedPrefix(text) => text.len(),
        PathMatch::Path(_) | PathMatch::Regex(_) | PathMatch::Template(_) | PathMatch::Connect => path.len(),
    };
    format!("{prefix}{}", path.get(consumed..).unwrap_or_default())
}

fn split_port(authority: &str) -> (&str, Option<u16>) {
    match authority.rsplit_once(':') {
        Some((host, port)) => port.parse().map_or((authority, None), |port| (host, Some(port))),
        None => (authority, None),
    }
}
