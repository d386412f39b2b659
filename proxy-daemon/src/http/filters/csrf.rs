//! `envoy.filters.http.csrf`: refuses requests that change something and come from another site than the one that they go to.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::csrf::v3::CsrfPolicy, google::protobuf::Any};
use http::{
    HeaderName, Method, StatusCode,
    header::{ORIGIN, REFERER},
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, model::StringMatcher, parse},
    http::{
        body::Body,
        route_match::authority,
        stream::{LocalReply, RequestHead, StreamCx},
    },
    layered_runtime::{Fraction, RuntimeFraction},
    stats::{Counter, Lease, Scope},
};

#[derive(Debug)]
struct CsrfFactory {
    policy: Policy,
    missing_source_origin: Counter,
    request_invalid: Counter,
    request_valid: Counter,
    _lease: Lease,
}

/// `CsrfPolicy`
#[derive(Debug)]
struct Policy {
    enabled: RuntimeFraction,
    shadow: RuntimeFraction,
    additional_origins: Vec<StringMatcher>,
}

/// Host and port of a URL; what is no URL as it is.
fn host_and_port(url: &str) -> &str {
    let Some((_, rest)) = url.split_once("://") else { return url };
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let host = rest[..end].rsplit('@').next().unwrap_or_default();
    if host.is_empty() { url } else { host }
}

/// Where the request comes from; empty: nobody says.
fn source<'a>(head: &'a RequestHead) -> &'a str {
    let of = |name: &HeaderName| -> &'a str {
        let text = head.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        host_and_port(text)
    };
    match of(&ORIGIN) {
        "" => of(&REFERER),
        // Of a site that does not tell; then the other header does not count.
        "null" => "",
        origin => origin,
    }
}

impl HttpFilterFactory for CsrfFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        _instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        if !matches!(head.method, Method::POST | Method::PUT | Method::DELETE | Method::PATCH) {
            return Flow::Continue;
        }
        let policy = route.most_specific::<Policy>().unwrap_or(&self.policy);
        let enabled = policy.enabled.includes(cx.random);
        if !enabled && !policy.shadow.includes(cx.random) {
            return Flow::Continue;
        }
        let source = source(head);
        let counter = if source.is_empty() {
            self.missing_source_origin
        } else if source == host_and_port(authority(head))
            || policy.additional_origins.iter().any(|origin| origin.matches(source))
        {
            self.request_valid.inc();
            return Flow::Continue;
        } else {
            self.request_invalid
        };
        counter.inc();
        if !enabled {
            return Flow::Continue;
        }
        let (text, flags) = ("Invalid origin", ResponseFlags::default());
        Flow::Respond(LocalReply::new(StatusCode::FORBIDDEN, text, flags, "csrf_origin_mismatch"))
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let policy = policy(typed_config, cx.path)?;
    let scope = Scope::http(cx.stat_prefix).child("csrf");
    Ok(Arc::new(CsrfFactory {
        policy,
        missing_source_origin: scope.counter("missing_source_origin"),
        request_invalid: scope.counter("request_invalid"),
        request_valid: scope.counter("request_valid"),
        _lease: scope.lease(),
    }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    Ok(Arc::new(policy(config, path)?))
}

fn policy(config: &Any, path: &str) -> Result<Policy, FieldError> {
    let CsrfPolicy { filter_enabled, shadow_enabled, additional_origins } = unpack(config, path)?;
    let never = RuntimeFraction { default: Fraction::percent(0), key: None };
    let share = |share: Option<&_>| share.map_or_else(|| never.clone(), parse::runtime_fraction);
    let matcher = |(index, matcher)| parse::matcher::string(matcher, &format!("{path}.additional_origins[{index}]"));
    Ok(Policy {
        enabled: share(filter_enabled.as_ref()),
        shadow: share(shadow_enabled.as_ref()),
        additional_origins: additional_origins.iter().enumerate().map(matcher).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
#[path = "csrf_tests.rs"]
mod tests;
