//! `envoy.filters.http.cors`: answers preflights and tells browsers who may read an answer. What is allowed stands in the policies of
//! routes; without one the filter does nothing.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::route::v3::{CorsPolicy as OfRoute, cors_policy::EnabledSpecifier},
        extensions::filters::http::cors::v3::{Cors, CorsPolicy},
    },
    google::protobuf::Any,
};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
        ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
        ACCESS_CONTROL_REQUEST_HEADERS, ACCESS_CONTROL_REQUEST_METHOD, ORIGIN,
    },
};

use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig};
use crate::{
    access_log::ResponseFlags,
    config::{
        FieldError,
        model::{RouteAction, StringMatcher, StringPattern},
        parse,
    },
    http::{
        body::Body,
        headers::joined,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    layered_runtime::{Fraction, RuntimeFraction},
    stats::{Counter, Lease, Scope},
};

const REQUEST_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-request-private-network");
const ALLOW_PRIVATE_NETWORK: HeaderName = HeaderName::from_static("access-control-allow-private-network");
const TRUE: HeaderValue = HeaderValue::from_static("true");
const EMPTY: HeaderValue = HeaderValue::from_static("");

#[derive(Debug)]
struct CorsFactory {
    origin_valid: Counter,
    origin_invalid: Counter,
    _lease: Lease,
}

/// What one level says. What it leaves open the next less specific one may say.
#[derive(Debug)]
struct Policy {
    allow_origin: Vec<StringMatcher>,
    allow_methods: Option<HeaderValue>,
    allow_headers: Option<HeaderValue>,
    expose_headers: Option<HeaderValue>,
    max_age: Option<HeaderValue>,
    allow_credentials: Option<bool>,
    allow_private_network_access: Option<bool>,
    forward_not_matching_preflights: Option<bool>,
    enabled: RuntimeFraction,
    shadow: RuntimeFraction,
}

/// The policies of a request's levels, the most specific first.
struct Policies<'a>(Vec<&'a Policy>);

impl<'a> Policies<'a> {
    /// What the most specific level says that says something.
    fn first<T>(&self, of: impl Fn(&'a Policy) -> Option<T>) -> Option<T> {
        self.0.iter().find_map(|policy| of(policy))
    }

    fn allows(&self, origin: &[u8]) -> bool {
        let Ok(origin) = std::str::from_utf8(origin) else { return false };
        let said = self.first(|policy| (!policy.allow_origin.is_empty()).then_some(&policy.allow_origin));
        said.is_some_and(|matchers| matchers.iter().any(|matcher| is_star(matcher) || matcher.matches(origin)))
    }

    fn allow_credentials(&self) -> bool {
        self.first(|policy| policy.allow_credentials).unwrap_or(false)
    }
}

/// What a request says in a header, in one line.
fn all(headers: &HeaderMap, name: &HeaderName) -> HeaderValue {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => EMPTY,
        (Some(value), None) => value.clone(),
        // Valid values and commas make a valid value.
        _ => joined(headers, name).and_then(|all| HeaderValue::from_bytes(all.as_bytes()).ok()).unwrap_or(EMPTY),
    }
}

/// Stands for every origin.
fn is_star(matcher: &StringMatcher) -> bool {
    matches!(&matcher.pattern, StringPattern::Exact(text) if &**text == "*")
}

impl HttpFilterFactory for CorsFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        // Redirects and direct responses are nobody's, as in Envoy.
        let Some(chosen) = cx.route.clone() else { return Flow::Continue };
        let RouteAction::Forward(action) = &chosen.action else { return Flow::Continue };
        let mut policies = Policies(route.all().rev().collect());
        if policies.0.is_empty() {
            // The deprecated fields.
            let all = [&action.cors, &chosen.virtual_host().cors].into_iter().flatten();
            policies.0.extend(all.filter_map(|policy| policy.downcast_ref::<Policy>()));
        }
        let Some(policy) = policies.0.first().copied() else { return Flow::Continue };
        let enabled = policy.enabled.includes(cx.random);
        if !enabled && !policy.shadow.includes(cx.random) {
            return Flow::Continue;
        }
        let origin = all(&head.headers, &ORIGIN);
        if origin.is_empty() {
            return Flow::Continue;
        }
        let asked = head.headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty());
        let preflight = head.method == Method::OPTIONS && asked;
        let valid = policies.allows(origin.as_bytes());
        let counter = if valid { self.origin_valid } else { self.origin_invalid };
        counter.inc();
        if !enabled {
            return Flow::Continue;
        }
        if valid {
            instances.push(Box::new(CorsFilter {
                origin,
                credentials: policies.allow_credentials(),
                expose_headers: policies.first(|policy| policy.expose_headers.clone()),
            }));
        }
        let forwards = policies.first(|policy| policy.forward_not_matching_preflights).unwrap_or(true);
        if !preflight || !valid && forwards {
            return Flow::Continue;
        }
        let mut reply = LocalReply::new(StatusCode::OK, "", ResponseFlags::default(), "cors_response");
        if !valid && policies.allow_credentials() {
            // As in Envoy: everything but the origin, without which the rest says nothing.
            reply.headers.push((ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE));
        }
        // For all of them stands what was asked for.
        let named = |allowed: Option<HeaderValue>, asked| match allowed {
            Some(star) if star == "*" => Some(all(&head.headers, &asked)),
            allowed => allowed,
        };
        let methods = policies.first(|policy| policy.allow_methods.clone());
        let methods = named(methods, ACCESS_CONTROL_REQUEST_METHOD);
        let headers = policies.first(|policy| policy.allow_headers.clone());
        let headers = named(headers, ACCESS_CONTROL_REQUEST_HEADERS);
        let max_age = policies.first(|policy| policy.max_age.clone());
        reply.headers.extend(methods.map(|methods| (ACCESS_CONTROL_ALLOW_METHODS, methods)));
        reply.headers.extend(headers.map(|headers| (ACCESS_CONTROL_ALLOW_HEADERS, headers)));
        reply.headers.extend(max_age.map(|age| (ACCESS_CONTROL_MAX_AGE, age)));
        let private = head.headers.get(REQUEST_PRIVATE_NETWORK).is_some_and(|wanted| wanted == "true")
            && policies.first(|policy| policy.allow_private_network_access).unwrap_or(false);
        if private {
            reply.headers.push((ALLOW_PRIVATE_NETWORK, TRUE));
        }
        Flow::Respond(reply)
    }
}

/// A request from an origin that is allowed.
#[derive(Debug)]
struct CorsFilter {
    origin: HeaderValue,
    credentials: bool,
    expose_headers: Option<HeaderValue>,
}

impl HttpFilter for CorsFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        let headers: &mut HeaderMap = &mut head.headers;
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, self.origin.clone());
        if self.credentials {
            headers.insert(ACCESS_CONTROL_ALLOW_CREDENTIALS, TRUE);
        }
        if let Some(exposed) = &self.expose_headers {
            headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, exposed.clone());
        }
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Cors {} = unpack(typed_config, cx.path)?;
    let scope = Scope::http(cx.stat_prefix).child("cors");
    let (origin_valid, origin_invalid) = (scope.counter("origin_valid"), scope.counter("origin_invalid"));
    Ok(Arc::new(CorsFactory { origin_valid, origin_invalid, _lease: scope.lease() }))
}

pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    policy(&unpack(config, path)?, path)
}

/// Reads the deprecated `cors` of routes and virtual hosts: the same message by another name.
pub(crate) fn of_route(config: &OfRoute, path: &str) -> Result<PerRouteConfig, FieldError> {
    let config = config.clone();
    let same = CorsPolicy {
        allow_origin_string_match: config.allow_origin_string_match,
        allow_methods: config.allow_methods,
        allow_headers: config.allow_headers,
        expose_headers: config.expose_headers,
        max_age: config.max_age,
        allow_credentials: config.allow_credentials,
        filter_enabled: config.enabled_specifier.map(|EnabledSpecifier::FilterEnabled(share)| share),
        shadow_enabled: config.shadow_enabled,
        allow_private_network_access: config.allow_private_network_access,
        forward_not_matching_preflights: config.forward_not_matching_preflights,
    };
    policy(&same, path)
}

fn policy(config: &CorsPolicy, path: &str) -> Result<PerRouteConfig, FieldError> {
    let value = |text: &str, field: &str| {
        let bad = |_| FieldError::new(format!("{path}.{field}"), format!("{text:?} is not a header value"));
        (!text.is_empty()).then(|| HeaderValue::from_str(text).map_err(bad)).transpose()
    };
    let share = |share: Option<&_>, default| {
        share.map_or(RuntimeFraction { default: Fraction::percent(default), key: None }, parse::runtime_fraction)
    };
    let matchers = config.allow_origin_string_match.iter().enumerate();
    let matcher =
        |(index, matcher)| parse::matcher::string(matcher, &format!("{path}.allow_origin_string_match[{index}]"));
    Ok(Arc::new(Policy {
        allow_origin: matchers.map(matcher).collect::<Result<_, _>>()?,
        allow_methods: value(&config.allow_methods, "allow_methods")?,
        allow_headers: value(&config.allow_headers, "allow_headers")?,
        expose_headers: value(&config.expose_headers, "expose_headers")?,
        max_age: value(&config.max_age, "max_age")?,
        allow_credentials: config.allow_credentials.map(|allow| allow.value),
        allow_private_network_access: config.allow_private_network_access.map(|allow| allow.value),
        forward_not_matching_preflights: config.forward_not_matching_preflights.map(|forward| forward.value),
        enabled: share(config.filter_enabled.as_ref(), 100),
        shadow: share(config.shadow_enabled.as_ref(), 0),
    }))
}
