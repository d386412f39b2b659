//! `envoy.filters.http.stateful_session`: clients stay with the host that they had, which a cookie or a header names.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::extensions::{
        filters::http::stateful_session::v3::{
            StatefulSession, StatefulSessionPerRoute, stateful_session_per_route::Override,
        },
        http::stateful_session::{
            cookie::v3::CookieBasedSessionState, envelope::v3::EnvelopeSessionState,
            header::v3::HeaderBasedSessionState,
        },
    },
    google::protobuf::Any,
};
use http::{
    HeaderName, HeaderValue, StatusCode,
    header::{COOKIE, SET_COOKIE},
};
use prost::{Message as _, Name as _};

use super::{
    FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, PerRouteConfig,
    shared::{Kept, Shared},
};
use crate::{
    access_log::ResponseFlags,
    config::{
        FieldError,
        parse::{self, type_name},
    },
    http::{
        body::Body,
        route_match::cookie,
        stream::{OverrideHost, RequestHead, ResponseHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

#[derive(Debug)]
struct StatefulSessionFactory(Shared<Configured>);

/// What is configured, here or by a route. Streams hold on to it.
#[derive(Debug)]
struct Configured {
    /// `None`: there are no sessions.
    state: Option<State>,
    /// The answer where the session's host does not exist; `None`: another one takes over.
    strict: Option<StatusCode>,
    stats: Option<Stats>,
}

#[derive(Debug)]
struct Stats {
    routed: Counter,
    failed_open: Counter,
    failed_closed: Counter,
    no_session: Counter,
    _lease: Lease,
}

/// Where clients keep their host's address.
#[derive(Debug)]
enum State {
    Cookie(Cookie),
    Header(HeaderName),
    /// Beside what the host itself keeps in a header.
    Envelope(HeaderName),
}

/// What stands before a host's own value in an envelope.
const UPSTREAM_VALUE: &str = "UV:";

#[derive(Debug)]
struct Cookie {
    name: String,
    ttl: Duration,
    path: String,
    /// What follows the value.
    attributes: String,
}

/// What is in a cookie, as Envoy has it: the two may take turns.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct InCookie {
    #[prost(string, tag = "1")]
    address: String,
    /// Seconds since 1970; 0: never.
    #[prost(int64, tag = "2")]
    expires: i64,
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

fn decode(value: &[u8]) -> Option<Vec<u8>> {
    STANDARD.decode(value).ok()
}

impl Cookie {
    /// Whether a session goes with this path, query and all.
    fn covers(&self, path: &str) -> bool {
        match path.strip_prefix(self.path.as_str()) {
            Some(rest) => {
                self.path.is_empty() || self.path.ends_with('/') || rest.is_empty() || rest.starts_with(['/', '?', '#'])
            }
            None => false,
        }
    }

    fn address(&self, head: &RequestHead, now: i64) -> Option<String> {
        let kept = decode(cookie(&head.headers, &self.name)?.as_bytes())?;
        match InCookie::decode(kept.as_slice()) {
            Ok(kept) if kept.expires != 0 && now > kept.expires => None,
            Ok(kept) => Some(kept.address),
            // Older ones have nothing else in them.
            Err(_) => String::from_utf8(kept).ok(),
        }
    }

    fn with(&self, address: &str, now: i64) -> String {
        let ttl = i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX);
        let expires = if ttl == 0 { 0 } else { now.saturating_add(ttl) };
        let kept = InCookie { address: address.to_owned(), expires }.encode_to_vec();
        format!("{}=\"{}\"{}", self.name, STANDARD.encode(kept), self.attributes)
    }
}

impl State {
    /// The session of this request, if it may have one, with its host's address, if it has that.
    fn session(&self, head: &mut RequestHead) -> Option<Option<String>> {
        let address = match self {
            State::Cookie(cookie) => {
                if !cookie.covers(head.uri.path_and_query().map_or("/", |path| path.as_str())) {
                    return None;
                }
                cookie.address(head, now())
            }
            State::Header(name) => {
                let kept = head.headers.get(name).and_then(|value| decode(value.as_bytes()));
                kept.and_then(|kept| String::from_utf8(kept).ok())
            }
            State::Envelope(name) => open(head, name),
        };
        Some(address.filter(|address| !address.is_empty()))
    }

    /// Whether clients are told their host by each response.
    fn tells_always(&self) -> bool {
        matches!(self, State::Envelope(_))
    }

    /// Tells the client its host. Whether there was something to tell it by.
    fn tell(&self, head: &mut ResponseHead, address: &str) -> bool {
        match self {
            State::Cookie(cookie) => {
                if let Ok(value) = HeaderValue::from_str(&cookie.with(address, now())) {
                    head.headers.append(SET_COOKIE, value);
                }
            }
            State::Header(name) => {
                if let Ok(value) = HeaderValue::from_str(&STANDARD.encode(address)) {
                    head.headers.insert(name, value);
                }
            }
            State::Envelope(name) => {
                let mut values = head.headers.get_all(name).iter();
                // A host that keeps nothing has no session.
                let (Some(own), None) = (values.next(), values.next()) else { return false };
                let (host, own) = (STANDARD.encode(address), STANDARD.encode(own.as_bytes()));
                if let Ok(value) = HeaderValue::from_str(&format!("{host};{UPSTREAM_VALUE}{own}")) {
                    head.headers.insert(name, value);
                }
            }
        }
        true
    }
}

/// The host's address in an envelope, of which the host gets what is its own.
fn open(head: &mut RequestHead, name: &HeaderName) -> Option<String> {
    let value = head.headers.get(name)?.to_str().ok()?;
    let mut parts = value.split(';').filter(|part| !part.is_empty());
    let address = parts.next().and_then(|part| decode(part.as_bytes()));
    let own = decode(parts.find_map(|part| part.strip_prefix(UPSTREAM_VALUE))?.as_bytes())?;
    let own = HeaderValue::from_bytes(&own).ok().filter(|own| !own.is_empty())?;
    head.headers.insert(name, own);
    String::from_utf8(address?).ok()
}

/// A request's session.
struct StatefulSessionFilter {
    configured: Kept<Configured>,
    /// The host that it had, if it had one.
    address: Option<String>,
}

impl HttpFilterFactory for StatefulSessionFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let configured = match route.most_specific::<Option<Shared<Configured>>>() {
            Some(None) => return Flow::Continue,
            Some(Some(configured)) => configured,
            None => &self.0,
        };
        let Some(address) = configured.state.as_ref().and_then(|state| state.session(head)) else {
            if let Some(stats) = &configured.stats {
                stats.no_session.inc();
            }
            return Flow::Continue;
        };
        if let Some(address) = &address {
            cx.override_host = Some(OverrideHost { address: address.as_str().into(), strict: configured.strict });
        }
        instances.push(Box::new(StatefulSessionFilter { configured: configured.keep(), address }));
        Flow::Continue
    }
}

impl HttpFilter for StatefulSessionFilter {
    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, cx: &mut StreamCx) -> Flow {
        let Configured { state, strict, stats } = &*self.configured;
        let count = |counter: fn(&Stats) -> &Counter| {
            if let Some(stats) = stats {
                counter(stats).inc();
            }
        };
        let Some(host) = &cx.upstream_host else {
            if strict.is_some() && cx.flags.contains(ResponseFlags::UH) {
                count(|stats| &stats.failed_closed);
            }
            return Flow::Continue;
        };
        let address = host.host.display();
        let changed = self.address.as_deref() != Some(address);
        let told = match state {
            Some(state) if changed || state.tells_always() => state.tell(head, address),
            _ => true,
        };
        if !changed || !told {
            count(|stats| &stats.routed);
        } else if strict.is_none() {
            count(|stats| &stats.failed_open);
        }
        Flow::Continue
    }
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: StatefulSession = unpack(typed_config, cx.path)?;
    let scope = Scope::http(cx.stat_prefix).child("stateful_session");
    Ok(Arc::new(StatefulSessionFactory(Shared::new(configured(&config, scope, cx.path)?))))
}

/// `None`: there are no sessions on this route.
pub(super) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let config: StatefulSessionPerRoute = unpack(config, path)?;
    let configured: Option<Shared<Configured>> = match config.r#override {
        Some(Override::Disabled(true)) => None,
        Some(Override::StatefulSession(session)) => {
            let path = format!("{path}.stateful_session");
            Some(Shared::new(configured(&session, Scope::new("stateful_session"), &path)?))
        }
        Some(Override::Disabled(false)) => return Err(FieldError::new(format!("{path}.disabled"), "can only be true")),
        None => return Err(FieldError::new(path, "says nothing: `disabled` or `stateful_session` is needed")),
    };
    Ok(Arc::new(configured))
}

fn configured(config: &StatefulSession, scope: Scope, path: &str) -> Result<Configured, FieldError> {
    let StatefulSession { session_state, strict, stat_prefix, status_on_strict_destination_not_found } = config;
    let state = session_state.as_ref().map(|state| {
        let path = format!("{path}.session_state.typed_config");
        let nothing = Any::default();
        self::state(state.typed_config.as_ref().unwrap_or(&nothing), &path)
    });
    let status = match *status_on_strict_destination_not_found {
        0 => StatusCode::SERVICE_UNAVAILABLE,
        status => u16::try_from(status)
            .ok()
            .and_then(|status| StatusCode::from_u16(status).ok())
            .ok_or_else(|| FieldError::new(format!("{path}.status_on_strict_destination_not_found"), "is no status"))?,
    };
    let stats = (!stat_prefix.is_empty()).then(|| {
        let scope = scope.child(stat_prefix);
        Stats {
            routed: scope.counter("routed"),
            failed_open: scope.counter("failed_open"),
            failed_closed: scope.counter("failed_closed"),
            no_session: scope.counter("no_session"),
            _lease: scope.lease(),
        }
    });
    Ok(Configured { state: state.transpose()?, strict: strict.then_some(status), stats })
}

fn state(config: &Any, path: &str) -> Result<State, FieldError> {
    let wanted = type_name(config);
    if wanted == HeaderBasedSessionState::full_name() {
        let HeaderBasedSessionState { name } = unpack(config, path)?;
        let name = name.parse().map_err(|_| FieldError::new(format!("{path}.name"), "is not a header name"))?;
        return Ok(State::Header(name));
    }
    if wanted == EnvelopeSessionState::full_name() {
        let EnvelopeSessionState { header } = unpack(config, path)?;
        let name = header.unwrap_or_default().name;
        let name = name.parse().map_err(|_| FieldError::new(format!("{path}.header.name"), "is not a header name"))?;
        return Ok(State::Envelope(name));
    }
    if wanted != CookieBasedSessionState::full_name() {
        return Err(FieldError::new(path, format!("session state of type {wanted} is not supported by culvert yet")));
    }
    let config: CookieBasedSessionState = unpack(config, path)?;
    let path = format!("{path}.cookie");
    let cookie = config.cookie.unwrap_or_default();
    if cookie.name.is_empty() {
        let text = "Cookie key cannot be empty for cookie based stateful sessions";
        return Err(FieldError::new(format!("{path}.name"), text));
    }
    let ttl = parse::duration(cookie.ttl, &path, "ttl")?.unwrap_or_default();
    let mut attributes = String::new();
    if ttl.as_secs() > 0 {
        attributes += &format!("; Max-Age={}", ttl.as_secs());
    }
    if !cookie.path.is_empty() {
        attributes += &format!("; Path={}", cookie.path);
    }
    for attribute in &cookie.attributes {
        attributes += &format!("; {}", attribute.name);
        if !attribute.value.is_empty() {
            attributes += &format!("={}", attribute.value);
        }
    }
    attributes += "; HttpOnly";
    let cookie = Cookie { name: cookie.name, ttl, path: cookie.path, attributes };
    if HeaderValue::from_str(&cookie.with("", 0)).is_err() {
        return Err(FieldError::new(path, "has a byte that no header may have"));
    }
    Ok(State::Cookie(cookie))
}

/// What the fuzzer `session` feeds: what a client says its session is, and the address of a host, which it says when it has been told.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let name = HeaderName::from_static("x-session");
    let path = "/".to_owned();
    let kept = Cookie { name: "s".to_owned(), ttl: Duration::ZERO, path, attributes: String::new() };
    let states = [(State::Cookie(kept), COOKIE), (State::Header(name.clone()), name.clone())];
    for (state, header) in states.into_iter().chain([(State::Envelope(name.clone()), name)]) {
        let (mut request, ()) = http::Request::new(()).into_parts();
        if let Ok(value) = HeaderValue::from_bytes(bytes) {
            request.headers.insert(&header, value);
            let _ = state.session(&mut request);
        }
        let Ok(address) = std::str::from_utf8(bytes) else { continue };
        let (mut response, ()) = http::Response::new(()).into_parts();
        response.headers.insert("x-session", HeaderValue::from_static("own"));
        assert!(state.tell(&mut response, address));
        let told = response.headers.remove(if header == COOKIE { &SET_COOKIE } else { &header });
        request.headers.insert(&header, told.expect("it has been told"));
        let known = (!address.is_empty()).then(|| address.to_owned());
        assert_eq!(state.session(&mut request), Some(known), "{state:?}");
    }
}

#[cfg(test)]
#[path = "stateful_session_tests.rs"]
mod tests;
