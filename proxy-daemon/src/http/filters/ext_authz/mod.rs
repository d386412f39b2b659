//! `envoy.filters.http.ext_authz`: asks a service whether a request may pass, by gRPC or by HTTP.
//!
//! **Cost.** A request waits for one call to the service, for which its headers are copied once; the calls of a worker share the
//! cluster's connections. With `with_request_body` up to `max_request_bytes`, and a piece more, are in memory until the service has
//! answered.
//!
//! **Limits.** A gRPC answer has at most 4 MiB (or `max_receive_message_length`), an HTTP answer's body 1 MiB, and of each list of
//! changes the first 1000 are carried out. What is longer is no answer, and counts as an error. A
//! request that is to have what is no header, or more headers than a client may send, is refused.

mod attributes;
mod config;
mod service;
mod verdict;

use std::collections::HashMap;

use envoy_types::pb::google::protobuf::{Value, value::Kind};
use http::{HeaderName, HeaderValue, StatusCode};

pub(super) use config::{parse, parse_per_route};

use self::{
    attributes::Read,
    config::{Buffer, Settings},
    service::Service,
    verdict::{Outcome, Verdict},
};
use super::{
    Flow, HttpFilter, HttpFilterFactory, PerRoute, Waiting,
    shared::{Kept, Shared},
};
use crate::{
    access_log::ResponseFlags,
    http::{
        body::Body,
        buffered::{gather, peek},
        changes::Change,
        codec::h1::Upgrade,
        metadata,
        stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
    },
    stats::{Counter, Lease, Scope},
    upstream::WorkerCluster,
};

/// Where its dynamic metadata is.
const NAMESPACE: &str = "envoy.filters.http.ext_authz";
const FAILURE_MODE_ALLOWED: HeaderName = HeaderName::from_static("x-envoy-auth-failure-mode-allowed");

#[derive(Debug)]
struct Stats {
    ok: Counter,
    denied: Counter,
    error: Counter,
    disabled: Counter,
    failure_mode_allowed: Counter,
    ignored_dynamic_metadata: Counter,
    invalid: Counter,
    request_header_limits_reached: Counter,
    _lease: Lease,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        // Shown, and never counted: what they count is refused.
        for name in [
            "filter_state_name_collision",
            "omitted_response_headers",
            "response_header_limits_reached",
            "shadow_denied",
            "shadow_error",
        ] {
            scope.counter(name);
        }
        Stats {
            ok: scope.counter("ok"),
            denied: scope.counter("denied"),
            error: scope.counter("error"),
            disabled: scope.counter("disabled"),
            failure_mode_allowed: scope.counter("failure_mode_allowed"),
            ignored_dynamic_metadata: scope.counter("ignored_dynamic_metadata"),
            invalid: scope.counter("invalid"),
            request_header_limits_reached: scope.counter("request_header_limits_reached"),
            _lease: scope.lease(),
        }
    }
}

/// The names of what the request's own cluster counts.
#[derive(Debug)]
struct ClusterCounters {
    ok: Box<str>,
    denied: Box<str>,
    error: Box<str>,
    invalid: Box<str>,
    failure_mode_allowed: Box<str>,
}

impl ClusterCounters {
    fn new(prefix: &str) -> ClusterCounters {
        let dot = if prefix.is_empty() { "" } else { "." };
        let name = |leaf: &str| format!("ext_authz.{prefix}{dot}{leaf}").into();
        ClusterCounters {
            ok: name("ok"),
            denied: name("denied"),
            error: name("error"),
            invalid: name("invalid"),
            failure_mode_allowed: name("failure_mode_allowed"),
        }
    }
}

/// What a level tells the filter.
#[derive(Debug, Default)]
struct Told {
    disabled: bool,
    /// Who is asked in the place of the filter's own service.
    service: Option<Shared<Service>>,
    context_extensions: HashMap<String, String>,
    without_body: bool,
    buffer: Option<Buffer>,
}

#[derive(Debug)]
struct ExtAuthzFactory(Shared<Settings>);

/// A stream that is asked about.
#[derive(Debug)]
struct ExtAuthzFilter {
    settings: Kept<Settings>,
    /// In the place of the settings'.
    service: Option<Kept<Service>>,
    context_extensions: HashMap<String, String>,
    /// How much of its body is read first.
    buffer: Option<Buffer>,
    /// What the response gets.
    response: Vec<Change>,
}

impl HttpFilterFactory for ExtAuthzFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let settings = &self.0;
        let told = route.most_specific::<Told>();
        if told.is_some_and(|told| told.disabled) {
            return Flow::Continue;
        }
        let told_so = || {
            let metadata = cx.progress.metadata.borrow();
            let namespace = |filter: &str| metadata.as_ref().and_then(|metadata| metadata.namespace(filter));
            settings.enabled_metadata.as_ref().is_none_or(|matcher| matcher.matches(namespace(&matcher.filter)))
        };
        if !settings.enabled.includes(fastrand::u64(..)) || !told_so() {
            settings.stats.disabled.inc();
            return match &settings.deny_at_disable {
                Some(deny) if deny.get() => Flow::Respond(failed(settings)),
                _ => Flow::Continue,
            };
        }
        // How it is packed is not for routes to say, as in Envoy.
        let as_bytes = settings.buffer.is_some_and(|own| own.as_bytes);
        let by_route = told.and_then(|told| told.buffer).map(|buffer| Buffer { as_bytes, ..buffer });
        let buffer = by_route.or(settings.buffer);
        let no_body = http_body::Body::is_end_stream(body) || head.extensions.get::<Upgrade>().is_some();
        let skips = no_body || told.is_some_and(|told| told.without_body);
        let levels = route.all::<Told>().flat_map(|told| &told.context_extensions);
        instances.push(Box::new(ExtAuthzFilter {
            settings: settings.keep(),
            service: told.and_then(|told| told.service.as_ref()).map(Shared::keep),
            context_extensions: levels.map(|(key, value)| (key.clone(), value.clone())).collect(),
            buffer: buffer.filter(|_| !skips),
            response: Vec::new(),
        }));
        Flow::Wait
    }
}

/// The answer where nobody can say whether the request may pass.
fn failed(settings: &Settings) -> LocalReply {
    LocalReply::new(settings.status_on_error, "", ResponseFlags::UAEX, "ext_authz_error")
}

/// The answer where the service wants what cannot be.
fn invalid() -> LocalReply {
    LocalReply::new(StatusCode::INTERNAL_SERVER_ERROR, "", ResponseFlags::UAEX, "ext_authz_invalid")
}

impl HttpFilter for ExtAuthzFilter {
    fn wait_request<'a>(
        &'a mut self,
        head: &'a mut RequestHead,
        body: &'a mut Body,
        cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(async move {
            let read = match self.read(body).await {
                Ok(read) => read,
                Err(reply) => return Flow::Respond(reply),
            };
            let began = std::time::Instant::now();
            let extensions = std::mem::take(&mut self.context_extensions);
            let request = attributes::request(&self.settings, head, cx, read.as_ref(), extensions);
            let service = self.service.as_deref().unwrap_or(&self.settings.service);
            let verdict = service.check(request, head, cx).await;
            self.settle(verdict, head, cx, began.elapsed().as_millis() as f64)
        })
    }

    fn response(&mut self, head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        self.response.iter().for_each(|change| change.apply_to_fields(&mut head.headers));
        Flow::Continue
    }
}

impl ExtAuthzFilter {
    /// What the service is to see of the body, which stays as it is.
    async fn read(&self, body: &mut Body) -> Result<Option<Read>, LocalReply> {
        let Some(buffer) = self.buffer else { return Ok(None) };
        if !buffer.partial {
            gather(body, buffer.max_bytes).await?;
        }
        let enough = if buffer.partial { buffer.max_bytes } else { usize::MAX };
        let (data, whole) = peek(body, enough).await?;
        Ok(Some(Read { data, whole, buffer }))
    }

    fn settle(&mut self, mut verdict: Verdict, head: &mut RequestHead, cx: &mut StreamCx, took: f64) -> Flow {
        let (stats, names) = (&self.settings.stats, &self.settings.of_cluster);
        let cluster = cx.cluster.clone();
        let count = |counter: Counter, name: &str| {
            counter.inc();
            if let Some(cluster) = &cluster {
                cluster.counter(name).inc();
            }
        };
        if let Some(mut told) = verdict.metadata.take().filter(|told| !told.fields.is_empty()) {
            if self.settings.takes_metadata {
                if verdict.outcome == Outcome::Ok {
                    told.fields.insert("ext_authz_duration".to_owned(), Value { kind: Some(Kind::NumberValue(took)) });
                }
                cx.progress.with_metadata(|all| metadata::update(all.namespace_mut(NAMESPACE), &told));
            } else {
                stats.ignored_dynamic_metadata.inc();
            }
        }
        let illegal = self.settings.validates && verdict.reply.iter().any(|change| !change.is_legal());
        match verdict.outcome {
            Outcome::Ok => {
                if !verdict.restrict(self.settings.validates, self.settings.rules.as_ref()) {
                    count(stats.invalid, &names.invalid);
                    return Flow::Respond(invalid());
                }
                cx.reroute = self.settings.clear_route_cache && verdict.changes_request();
                verdict.apply(head);
                if verdict.exceeds(head, cx.max_headers) {
                    stats.request_header_limits_reached.inc();
                    count(stats.invalid, &names.invalid);
                    return Flow::Respond(invalid());
                }
                self.response = verdict.response;
                count(stats.ok, &names.ok);
                Flow::Continue
            }
            Outcome::Denied => {
                count(stats.denied, &names.denied);
                if illegal {
                    count(stats.invalid, &names.invalid);
                    return Flow::Respond(invalid());
                }
                let status = verdict.status.unwrap_or(StatusCode::FORBIDDEN);
                if self.settings.charge_cluster {
                    charge(cluster.as_deref(), status.as_u16());
                }
                let headers = verdict.reply_headers();
                verdict.body.truncate(self.settings.max_denied_body);
                let mut reply = LocalReply::new(status, verdict.body, ResponseFlags::UAEX, "ext_authz_denied");
                reply.headers = headers;
                Flow::Respond(reply)
            }
            Outcome::Error => {
                count(stats.error, &names.error);
                if self.settings.failure_mode_allow {
                    count(stats.failure_mode_allowed, &names.failure_mode_allowed);
                    if self.settings.failure_mode_allow_header_add {
                        head.headers.insert(FAILURE_MODE_ALLOWED, HeaderValue::from_static("true"));
                    }
                    return Flow::Continue;
                }
                let mut reply = failed(&self.settings);
                if illegal {
                    return Flow::Respond(reply);
                }
                verdict.body.truncate(self.settings.max_denied_body);
                reply.status = verdict.status.unwrap_or(reply.status);
                reply.headers = verdict.reply_headers();
                reply.body = verdict.body;
                Flow::Respond(reply)
            }
        }
    }
}

/// An answer that was made in the place of the cluster's hosts.
fn charge(cluster: Option<&WorkerCluster>, status: u16) {
    if let Some(cluster) = cluster {
        cluster.cluster.stats.upstream_rq.inc(status);
    }
}
