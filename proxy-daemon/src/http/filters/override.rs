//! `culvert.filters.http.override`: does for one request what its baggage asks for, such as sending it to an offloaded revision of the
//! chosen service. docs/overrides.md has the messages and the rules.
//!
//! Only an endpoint that discovery lists as offloaded *for the very cluster that the route chose* can be reached, and only what the
//! filter and the service's policy allow is done. Whatever else a request asks for is counted and ignored, and the request goes
//! where it would have gone.

mod explain;
mod offloaded;
mod refusal;
mod settings;
mod state;
mod stream;

use std::{
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use culvert_xds_client::{
    api::culvert::{
        extensions::filters::http::overrides::v1::{Override as Config, r#override::Edge},
        overrides::v1::{Action, Fault, Override},
    },
    json::unpack,
    overrides::{
        CONFIG, ContextError, DEBUG, DEFAULT_NAMESPACE, Found, Overrides, Signed, find, has_trace_context, set_sampled,
        strip,
    },
};
use envoy_types::pb::google::protobuf::Any;
use http::{HeaderValue, StatusCode};

pub use self::{
    explain::{Explained, explain},
    offloaded::OffloadedTable,
    state::{OverrideState, counted_contexts},
};
use self::{
    offloaded::Policy,
    refusal::{Refusal, Stats},
    settings::Settings,
    state::Carries,
    stream::{Outcome, OverrideStream, Tunnelled, described},
};
use super::{FilterCx, Flow, HttpFilter, HttpFilterFactory, PerRoute, shared::Shared};
use crate::{
    access_log::ResponseFlags,
    config::{FieldError, model::SecretRef},
    http::{
        body::Body,
        headers::names::{X_ENVOY_ORIGINAL_DST_HOST, X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS},
        stream::{LocalReply, RequestHead, StreamCx},
    },
};

/// The full name of its configuration message.
pub(super) const TYPE_NAME: &str = "culvert.extensions.filters.http.overrides.v1.Override";

/// What is configured. Streams hold on to it: what they count in must last.
#[derive(Debug)]
struct Configured {
    settings: Settings,
    stats: Stats,
}

pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let config: Config = unpack(typed_config, cx.path)?;
    let settings = Settings::parse(&config, cx.path)?;
    Ok(Arc::new(OverrideFactory(Shared::new(Configured { settings, stats: Stats::new(cx.stat_prefix) }))))
}

#[derive(Debug)]
struct OverrideFactory(Shared<Configured>);

impl HttpFilterFactory for OverrideFactory {
    fn request(
        &self,
        head: &mut RequestHead,
        _body: &mut Body,
        cx: &mut StreamCx,
        _route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let Configured { settings, stats } = &*self.0;
        // Envoy obeys this header in any ORIGINAL_DST cluster and strips it nowhere: whoever can set it reaches anything.
        if head.headers.remove(X_ENVOY_ORIGINAL_DST_HOST).is_some() {
            stats.header_removed.inc();
        }
        // Services may trust what it says: policies have let it pass.
        if head.headers.remove(CONFIG).is_some() {
            stats.config_removed.inc();
        }
        let strips = match settings.edge {
            Edge::Keep => false,
            Edge::Strip => true,
            Edge::StripExternal => !cx.internal,
        };
        if strips {
            head.headers.remove(DEBUG);
            if strip(&mut head.headers) {
                stats.refused(Refusal::Stripped);
            }
        }
        let found = find(&head.headers, settings.limits.header_bytes);
        if settings.watch_context {
            let carries = match &found {
                Some(_) => Carries::Overrides,
                None if has_trace_context(&head.headers) => Carries::Trace,
                None => Carries::Nothing,
            };
            let cluster = cx.cluster.as_ref().map(|cluster| &*cluster.cluster.config.name);
            cx.worker.overrides.count(cluster, cx.connection.remote.ip().to_canonical(), carries);
        }
        let tells = settings.debug_response && head.headers.get(DEBUG).is_some_and(|value| value == "1");
        if found.is_none() && !tells {
            return Flow::Continue;
        }
        let hop = cx.cluster.as_ref().map_or_else(|| "no cluster".into(), |it| Arc::clone(&it.cluster.config.name));
        let mut stream = OverrideStream { delay: Duration::ZERO, fault: None, told: None, tunnel: None, logged: None };
        let mut outcome = Outcome::default();
        if let Some(found) = found {
            match self.0.open(found, cx) {
                Ok(overrides) => Configured::apply(&self.0, &overrides, head, cx, (&mut stream, &mut outcome)),
                Err(refusal) => {
                    stats.refused(refusal);
                    match refusal {
                        Refusal::Undecodable | Refusal::TooLarge | Refusal::Contradiction => stats.undecodable.inc(),
                        _ => stats.rejected.inc(),
                    }
                    outcome.refused(None, refusal);
                }
            }
        }
        if let Some(logged) = &stream.logged {
            tracing::info!("override: {logged}: {}", outcome.in_words(&hop));
        }
        stream.told = tells.then_some((hop, outcome));
        let flow = stream.begin(cx);
        if stream.is_needed() {
            instances.push(Box::new(stream));
        }
        flow
    }

    fn needs_offloaded_services(&self) -> bool {
        true
    }

    fn secret(&self) -> Option<&SecretRef> {
        self.0.settings.signing.as_ref().map(|signing| &signing.secret)
    }
}

impl Configured {
    /// The message that counts, if it may be obeyed at all.
    fn open(&self, found: Result<Found, ContextError>, cx: &StreamCx) -> Result<Overrides, Refusal> {
        let settings = &self.settings;
        if settings.refuses_all {
            return Err(Refusal::Production);
        }
        if settings.sources.as_ref().is_some_and(|sources| !sources.include(cx)) {
            return Err(Refusal::Source);
        }
        let read = |error: ContextError| {
            tracing::debug!(%error, "overrides ignored");
            Refusal::from(&error)
        };
        let found = found.map_err(read)?;
        let message = Overrides::from_baggage_item(&found.value).map_err(read)?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let message = match (&message.signed, &settings.signing) {
            (None, Some(signing)) if signing.required => return Err(Refusal::NotSigned),
            (None, _) => message,
            // Without keys it says no more than one that is not signed.
            (Some(signed), None) => signed.message().map_err(read)?,
            (Some(signed), Some(signing)) => {
                let keys = cx.worker.clusters.secrets().generic(&signing.name);
                let key = keys.as_ref().and_then(|keys| keys.keys.get(&signed.key_id));
                let message = verified(signed, key.ok_or(Refusal::UnknownKey)?)
                    .map_err(|error| error.map_or(Refusal::BadSignature, read))?;
                if message.expires.saturating_sub(now) > signing.max_lifetime {
                    return Err(Refusal::LastsTooLong);
                }
                message
            }
        };
        // What was signed is the token: who may make shares vouches for what it stands for.
        let message = match &*message.share {
            "" => message,
            token => cx.worker.with_offloaded(|table| match table.share(token, now) {
                Ok(share) => message.joined_with(share).map_err(read),
                Err(refusal) => Err(refusal),
            })?,
        };
        if message.is_expired(now) {
            return Err(Refusal::Expired);
        }
        if message.overrides.len() > settings.limits.overrides {
            return Err(Refusal::TooMany);
        }
        Ok(message)
    }

    /// Does what is asked of the service of this hop, as far as that is allowed.
    fn apply(
        this: &Shared<Self>,
        overrides: &Overrides,
        head: &mut RequestHead,
        cx: &mut StreamCx,
        (stream, outcome): (&mut OverrideStream, &mut Outcome),
    ) {
        let Some(cluster) = &cx.cluster else { return };
        let name = Arc::clone(&cluster.cluster.config.name);
        let Some(wanted) = overrides.overrides.iter().find(|entry| names(&entry.service, &name)) else { return };
        let policy = cx.worker.with_offloaded(|table| table.policy(&name));
        let excludes = |sources: &settings::Sources| !sources.include(cx);
        let refused = if !this.settings.opts_in(policy.as_deref()) {
            Some(Refusal::NotOptedIn)
        } else {
            let sources = policy.as_ref().and_then(|policy| policy.sources.as_ref());
            sources.is_some_and(excludes).then_some(Refusal::ServiceSource)
        };
        if let Some(refusal) = refused {
            this.stats.refused(refusal);
            this.stats.rejected.inc();
            outcome.refused(None, refusal);
            return;
        }
        let mut rejected = false;
        for action in wanted.actions() {
            // What is answered here goes nowhere.
            if action == Action::Route && stream.fault.is_some() {
                continue;
            }
            let allowed = this.settings.allows(action, wanted, policy.as_deref());
            match allowed.and_then(|()| Self::act(this, action, wanted, head, cx, stream)) {
                Ok(()) => {
                    this.stats.done(action);
                    outcome.done(wanted.in_words(action));
                }
                Err(refusal) => {
                    this.stats.refused(refusal);
                    outcome.refused(Some(action), refusal);
                    rejected = true;
                }
            }
        }
        if rejected {
            this.stats.rejected.inc();
        }
    }

    fn act(
        this: &Shared<Self>,
        action: Action,
        wanted: &Override,
        head: &mut RequestHead,
        cx: &mut StreamCx,
        stream: &mut OverrideStream,
    ) -> Result<(), Refusal> {
        let Settings { limits, original_dst_cluster, .. } = &this.settings;
        match action {
            Action::Debug => {
                if !cx.worker.overrides.may_log(Instant::now(), limits.debug_per_second) {
                    return Err(Refusal::DebugBusy);
                }
                stream.logged = Some(described(head, cx));
            }
            Action::Sample => {
                set_sampled(&mut head.headers, wanted.sample == Some(true));
            }
            Action::Config => {
                let config = HeaderValue::try_from(wanted.config_header()).map_err(|_| Refusal::OverLimit)?;
                head.headers.insert(CONFIG, config);
            }
            // The router takes it out again, and has it in the place of the route's.
            Action::Timeout => {
                head.headers.insert(X_ENVOY_UPSTREAM_RQ_TIMEOUT_MS, HeaderValue::from(wanted.timeout_ms));
            }
            Action::Delay => stream.delay = Duration::from_millis(wanted.delay_ms.into()),
            Action::Fault => stream.fault = wanted.fault.as_ref().map(reply),
            Action::Route => {
                let Some(cluster) = &cx.cluster else { return Err(Refusal::Unlisted) };
                let name = &*cluster.cluster.config.name;
                let target = cx.worker.with_offloaded(|table| table.find(name, wanted)).ok_or(Refusal::Unlisted)?;
                let original_dst = cx.worker.clusters.get(original_dst_cluster).ok_or(Refusal::Unlisted)?;
                if target.tunnel {
                    if cx.worker.overrides.is_gone(target.address, Instant::now()) {
                        return Err(Refusal::TunnelGone);
                    }
                    cx.unless_connected = Some(Rc::clone(cluster));
                    stream.tunnel = Some(Tunnelled { by: this.keep(), what: wanted.in_words(action) });
                }
                cx.override_dst = Some(target.address);
                cx.cluster = Some(original_dst);
            }
            Action::Unspecified => {}
        }
        Ok(())
    }
}

impl Settings {
    /// Whether the filter and the service allow this, and it is within the limits.
    fn allows(&self, action: Action, wanted: &Override, policy: Option<&Policy>) -> Result<(), Refusal> {
        let Settings { actions, limits, .. } = self;
        if !actions.contains(action) {
            return Err(Refusal::ActionNotAllowed);
        }
        if policy.and_then(|policy| policy.actions).is_some_and(|actions| !actions.contains(action)) {
            return Err(Refusal::ActionNotOptedIn);
        }
        let is_within = match action {
            Action::Delay => wanted.delay_ms <= limits.delay_ms,
            Action::Timeout => wanted.timeout_ms <= limits.timeout_ms,
            Action::Config => wanted.config_header().len() <= limits.config_bytes,
            _ => true,
        };
        if is_within { Ok(()) } else { Err(Refusal::OverLimit) }
    }

    /// Whether a service's requests may be overridden, where its policy names no sources that the client is not one of.
    fn opts_in(&self, policy: Option<&Policy>) -> bool {
        policy.map_or(!self.require_opt_in, |policy| policy.allowed)
    }
}

/// The message of a signature that is the key's; `None`: it is not.
fn verified(signed: &Signed, key: &[u8]) -> Result<Overrides, Option<ContextError>> {
    if signed.is_of(key) { signed.message().map_err(Some) } else { Err(None) }
}

/// The answer that a fault is.
fn reply(fault: &Fault) -> LocalReply {
    let status = fault.http_status.and_then(|status| StatusCode::from_u16(u16::try_from(status).ok()?).ok());
    let details = "override_fault";
    let mut reply =
        LocalReply::new(status.unwrap_or(StatusCode::OK), "fault of an override", ResponseFlags::FI, details);
    reply.grpc_status = fault.grpc_status.and_then(|status| u16::try_from(status).ok());
    reply
}

/// Whether `service` (`name` or `name.namespace`) is the service of the cluster `name.namespace:port`.
fn names(service: &str, cluster: &str) -> bool {
    let of_cluster = cluster.rsplit_once(':').map_or(cluster, |(service, _)| service);
    match of_cluster.strip_prefix(service) {
        Some("") => true,
        Some(rest) => !service.contains('.') && rest.strip_prefix('.') == Some(DEFAULT_NAMESPACE),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_with_or_without_its_namespace() {
        assert!(names("users", "users.default:80"));
        assert!(names("users.default", "users.default:80"));
        assert!(names("users.shop", "users.shop:80"));
        assert!(!names("users", "users.shop:80"), "without a namespace, only `default`");
        assert!(!names("user", "users.default:80"));
        assert!(!names("users.def", "users.default:80"));
    }

    #[test]
    fn faults_are_answers() {
        let http = reply(&Fault { http_status: Some(418), grpc_status: None });
        assert_eq!((http.status.as_u16(), http.grpc_status, http.flags), (418, None, ResponseFlags::FI));
        let grpc = reply(&Fault { http_status: None, grpc_status: Some(14) });
        assert_eq!((grpc.status, grpc.grpc_status), (StatusCode::OK, Some(14)));
    }
}
