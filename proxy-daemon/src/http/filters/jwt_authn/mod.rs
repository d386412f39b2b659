//! `envoy.filters.http.jwt_authn`: requests need tokens, JSON Web Tokens that providers have signed.
//!
//! **Cost.** A token is verified with every request (a signature of RSA with 2048 bits takes some 20 us, of ECDSA some 60 us), unless
//! `jwt_cache_config` has it remembered; a request that needs none costs the look for its rule, which is a scan of the rules in their order. Keys are fetched once for all
//! workers, by the first request that needs them.
//!
//! **Limits.** A set of keys has at most 1 MiB and 1000 keys, a request 100 tokens. What tokens say becomes headers only where it
//! is a header's value.

mod cache;
mod config;
mod extract;
mod jwks;
mod tell;
mod token;

use std::{
    pin::Pin,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use envoy_types::pb::google::protobuf::{Struct, Value as ProtoValue, value::Kind};
use http::{
    HeaderValue, Method, StatusCode, Uri,
    header::{ACCESS_CONTROL_REQUEST_METHOD, ORIGIN, WWW_AUTHENTICATE},
};

pub(super) use config::{parse, parse_per_route};

use self::{
    config::{Provider, Requirement, Settings},
    extract::Found,
    jwks::Keys,
    token::{Status, Token},
};
use super::{
    Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting,
    shared::{Kept, Shared},
};
use crate::{
    access_log::ResponseFlags,
    http::{
        body::Body,
        metadata,
        redirect::scheme,
        route_match::{authority, matches},
        stream::{LocalReply, RequestHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
};

/// Where its dynamic metadata is.
const NAMESPACE: &str = "envoy.filters.http.jwt_authn";
/// The longest URI that a client is told.
const MAX_URI: usize = 256;

#[derive(Debug)]
struct Stats {
    allowed: Counter,
    denied: Counter,
    cors_preflight_bypassed: Counter,
    jwks_fetch_success: Counter,
    jwks_fetch_failed: Counter,
    jwt_cache_hit: Counter,
    jwt_cache_miss: Counter,
    _lease: Lease,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        Stats {
            allowed: scope.counter("allowed"),
            denied: scope.counter("denied"),
            cors_preflight_bypassed: scope.counter("cors_preflight_bypassed"),
            jwks_fetch_success: scope.counter("jwks_fetch_success"),
            jwks_fetch_failed: scope.counter("jwks_fetch_failed"),
            jwt_cache_hit: scope.counter("jwt_cache_hit"),
            jwt_cache_miss: scope.counter("jwt_cache_miss"),
            _lease: scope.lease(),
        }
    }
}

/// What a level tells the filter.
#[derive(Debug)]
enum Told {
    Disabled,
    Requirement(Box<str>),
}

#[derive(Debug)]
struct JwtFactory(Shared<Settings>);

/// A stream that needs a token.
#[derive(Debug)]
struct JwtFilter {
    settings: Kept<Settings>,
    /// Its number.
    requirement: usize,
}

impl HttpFilterFactory for JwtFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let settings = &self.0;
        // What only verified tokens say, also where none is asked for.
        settings.providers.iter().for_each(|provider| provider.clear(head));
        let preflight = head.method == Method::OPTIONS
            && head.headers.get(ORIGIN).is_some_and(|origin| !origin.is_empty())
            && head.headers.get(ACCESS_CONTROL_REQUEST_METHOD).is_some_and(|method| !method.is_empty());
        if settings.bypass_cors_preflight && preflight {
            settings.stats.cors_preflight_bypassed.inc();
            settings.stats.allowed.inc();
            return Flow::Continue;
        }
        let requirement = match route.most_specific::<Told>() {
            Some(Told::Disabled) => None,
            Some(Told::Requirement(name)) => match settings.named.get(name) {
                Some(requirement) => Some(*requirement),
                None => return unknown_requirement(settings, name),
            },
            None => {
                let (path, by) = (head.uri.path(), cx.match_cx());
                let rule = settings.rules.iter().find(|(rule, _)| matches(rule, path, head, &by));
                match rule {
                    Some((_, requirement)) => *requirement,
                    None => settings.of_state(cx),
                }
            }
        };
        let Some(requirement) = requirement else {
            settings.stats.allowed.inc();
            return Flow::Continue;
        };
        instances.push(Box::new(JwtFilter { settings: settings.keep(), requirement }));
        Flow::Wait
    }
}

fn unknown_requirement(settings: &Settings, name: &str) -> Flow {
    settings.stats.denied.inc();
    let known: Vec<_> = settings.named.keys().map(|name| &**name).collect();
    let text = format!("Wrong requirement_name: {name}. It should be one of [{}]", known.join(","));
    let details = details(&text);
    let text =
        if settings.strip_failure_response { String::new() } else { format!("Failed JWT authentication: {text}") };
    Flow::Respond(LocalReply::new(StatusCode::FORBIDDEN, text, ResponseFlags::default(), details))
}

/// A reason as access logs show it: in one word.
fn details(text: &str) -> String {
    format!("jwt_authn_access_denied{{{}}}", text.replace(' ', "_"))
}

impl HttpFilter for JwtFilter {
    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        _body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            // Tokens in its query are taken away.
            let (asked, settings) = (head.uri.clone(), &*self.settings);
            match settings.verify(&settings.requirements[self.requirement], head, cx).await {
                Ok(()) => {
                    settings.stats.allowed.inc();
                    Flow::Continue
                }
                Err(status) => {
                    settings.stats.denied.inc();
                    Flow::Respond(denied(status, &asked_uri(&asked, head), settings.strip_failure_response))
                }
            }
        })
    }
}

fn asked_uri(asked: &Uri, head: &RequestHead) -> String {
    let path = head.headers.get("x-envoy-original-path").and_then(|path| path.to_str().ok());
    let path = path.or_else(|| asked.path_and_query().map(|path| path.as_str())).unwrap_or_default();
    let path: String = path.chars().take(MAX_URI).collect();
    format!("{}://{}{path}", scheme(head), authority(head))
}

fn denied(status: Status, uri: &str, strip: bool) -> LocalReply {
    let code = if status == Status::AudienceNotAllowed { StatusCode::FORBIDDEN } else { StatusCode::UNAUTHORIZED };
    let text = if strip { "" } else { status.text() };
    let mut reply = LocalReply::new(code, text, ResponseFlags::default(), details(status.text()));
    if strip {
        return reply;
    }
    let error = if status == Status::Missing { "" } else { ", error=\"invalid_token\"" };
    if let Ok(value) = HeaderValue::from_str(&format!("Bearer realm=\"{uri}\"{error}")) {
        reply.headers.push((WWW_AUTHENTICATE, value));
    }
    reply
}

type Verified<'a> = Pin<Box<dyn Future<Output = Result<(), Status>> + 'a>>;

impl Settings {
    /// What the filter state asks for.
    fn of_state(&self, cx: &StreamCx) -> Option<usize> {
        let (key, requirements) = self.by_state.as_ref()?;
        let told = cx.progress.metadata.borrow();
        let value = told.as_ref()?.state(key)?;
        requirements.get(&*value.as_text()).copied()
    }

    fn verify<'a>(
        &'a self,
        requirement: &'a Requirement,
        head: &'a mut RequestHead,
        cx: &'a mut StreamCx,
    ) -> Verified<'a> {
        Box::pin(async move {
            match requirement {
                Requirement::Provider(number, audiences) => {
                    // What another one has told there is not this one's word.
                    self.providers[*number].clear(head);
                    let tokens = extract::tokens(&self.providers, &[*number], head);
                    self.verify_all(tokens, Some(*number), audiences.as_deref(), head, cx).await
                }
                Requirement::All(of) => {
                    for requirement in of {
                        self.verify(requirement, head, cx).await?;
                    }
                    Ok(())
                }
                Requirement::Any { of, allow_missing, allow_failed } => {
                    let mut worst = Status::Missing;
                    for requirement in of {
                        match self.verify(requirement, head, cx).await {
                            Ok(()) => return Ok(()),
                            // What says more counts.
                            Err(status) => {
                                let weak = matches!(status, Status::Missing | Status::UnknownIssuer);
                                if !weak || worst == Status::Missing {
                                    worst = status;
                                }
                            }
                        }
                    }
                    let allowed = *allow_failed || *allow_missing && worst == Status::Missing;
                    if allowed { Ok(()) } else { Err(worst) }
                }
                Requirement::AllowMissing => match self.verify_any(head, cx).await {
                    Err(Status::Missing) => Ok(()),
                    other => other,
                },
                Requirement::AllowMissingOrFailed => {
                    let _ = self.verify_any(head, cx).await;
                    Ok(())
                }
            }
        })
    }

    /// The tokens of whatever provider.
    async fn verify_any(&self, head: &mut RequestHead, cx: &mut StreamCx) -> Result<(), Status> {
        self.providers.iter().for_each(|provider| provider.clear(head));
        let all: Vec<_> = (0..self.providers.len()).collect();
        let tokens = extract::tokens(&self.providers, &all, head);
        self.verify_all(tokens, None, None, head, cx).await
    }

    /// All that were found must be good, and there must be one. Without a provider the first that was found decides.
    async fn verify_all(
        &self,
        tokens: Vec<Found>,
        of: Option<usize>,
        audiences: Option<&[String]>,
        head: &mut RequestHead,
        cx: &mut StreamCx,
    ) -> Result<(), Status> {
        if tokens.is_empty() {
            // As in Envoy, no provider has missed it, unless there is but one.
            self.tell_failure(None, Status::Missing, cx);
        }
        let mut last = Err(Status::Missing);
        // As Envoy does, from the last.
        for found in tokens.into_iter().rev() {
            last = self.verify_one(&found, of, audiences, head, cx).await;
            if of.is_some() {
                last?;
            }
        }
        last
    }

    async fn verify_one(
        &self,
        found: &Found,
        of: Option<usize>,
        audiences: Option<&[String]>,
        head: &mut RequestHead,
        cx: &mut StreamCx,
    ) -> Result<(), Status> {
        // The one whose token it should be, and then the one whose it is: that one tells what is wrong with it.
        let mut provider = of.map(|number| &self.providers[number]);
        let verified = self.verify_of(found, of, audiences, head, cx, &mut provider).await;
        if let Err(status) = verified {
            self.tell_failure(provider, status, cx);
        }
        verified
    }

    async fn verify_of<'a>(
        &'a self,
        found: &Found,
        of: Option<usize>,
        audiences: Option<&[String]>,
        head: &mut RequestHead,
        cx: &mut StreamCx,
        blamed: &mut Option<&'a Provider>,
    ) -> Result<(), Status> {
        // Only where a provider is asked for are tokens kept, and every token misses the cache of one that has none.
        let asked = of.map(|number| &self.providers[number]);
        let cache = asked.and_then(|provider| provider.cache.as_ref());
        let is_known = asked.is_some_and(|provider| provider.knows(&found.text, cx, &self.stats));
        if of.is_some() {
            let counter = if is_known { &self.stats.jwt_cache_hit } else { &self.stats.jwt_cache_miss };
            counter.inc();
        }
        let token = Token::parse(&found.text)?;
        let by_issuer = |number: &&usize| {
            let issuer = &*self.providers[**number].issuer;
            issuer.is_empty() || issuer == token.issuer
        };
        let number = match of {
            Some(number) => Some(number).filter(|number| by_issuer(&number)),
            None => found.providers.iter().find(by_issuer).copied(),
        };
        let provider = number.map(|number| &self.providers[number]).ok_or(Status::UnknownIssuer)?;
        *blamed = Some(provider);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if let Err(status) = token.check_time(now.as_secs(), provider.skew) {
            if let Some(cache) = cache.filter(|_| is_known) {
                cache.forget(&found.text);
            }
            return Err(status);
        }
        if let Some(longest) = provider.max_lifetime {
            token.check_lifetime(now, longest)?;
        }
        if provider.subjects.as_ref().is_some_and(|subjects| !subjects.matches(&token.subject)) {
            return Err(Status::VerificationFails);
        }
        let allowed = audiences.unwrap_or(&provider.audiences);
        let has = |audience: &String| token.audiences.iter().any(|it| same(it, audience));
        if !allowed.is_empty() && !allowed.iter().any(has) {
            return Err(Status::AudienceNotAllowed);
        }
        if !is_known {
            let keys = provider.keys.verify(&token, cx, &self.stats).await?;
            if let Some(cache) = cache {
                cache.keep(&found.text, keys);
            }
        }
        provider.tell(&token, found, head, cx);
        Ok(())
    }

    /// Tells other filters what is wrong with a provider's tokens, where it wants that. Where none is known it is the only one.
    fn tell_failure(&self, provider: Option<&Provider>, status: Status, cx: &StreamCx) {
        let only = match &*self.providers {
            [only] => Some(only),
            _ => None,
        };
        let name = provider.or(only).map_or("", |provider| &provider.failed_status_in_metadata);
        if name.is_empty() {
            return;
        }
        let fields = [
            ("code", Kind::NumberValue(status.number().into())),
            ("message", Kind::StringValue(status.text().to_owned())),
        ];
        let fields = fields.map(|(name, kind)| (name.to_owned(), ProtoValue { kind: Some(kind) })).into();
        tell(name, Struct { fields }, cx);
    }
}

/// Tells other filters something under this name.
fn tell(name: &str, fields: Struct, cx: &StreamCx) {
    let value = ProtoValue { kind: Some(Kind::StructValue(fields)) };
    let told = Struct { fields: [(name.to_owned(), value)].into() };
    cx.progress.with_metadata(|all| metadata::update(all.namespace_mut(NAMESPACE), &told));
}

/// Audiences are the same whether or not they begin with a scheme or end with a slash.
fn same(a: &str, b: &str) -> bool {
    fn plain(text: &str) -> &str {
        let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        text.strip_suffix('/').unwrap_or(text)
    }
    plain(a) == plain(b)
}

/// What the fuzzer `token` feeds: a token, and after a line's end a set of keys.
pub(in crate::http) fn fuzz(bytes: &[u8]) {
    let (token, keys) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n').unwrap_or(bytes.len()));
    let keys = Keys::parse(keys);
    let Some(Ok(token)) = std::str::from_utf8(token).ok().map(Token::parse) else { return };
    // A time of no account: none may overflow.
    let _ = token.check_time(u64::MAX, u64::MAX);
    let _ = token.check_lifetime(Duration::MAX, Some(Duration::ZERO));
    if let Ok(keys) = keys {
        let _ = keys.verify(&token);
    }
}
