//! HTTP filters, one file each, found by their Envoy name.
//!
//! A filter is added by writing its file and one line in [`REGISTRY`]: docs/extending.md shows how.

mod admission_control;
mod bandwidth_limit;
mod buffer;
mod compression;
mod compressor;
mod cors;
mod csrf;
mod custom_response;
mod decompressor;
mod discovered;
mod dynamic_forward_proxy;
mod ext_authz;
mod ext_proc;
mod fault;
mod grpc_counts;
mod grpc_http1_bridge;
mod grpc_stats;
mod grpc_web;
mod header_mutation;
mod header_to_metadata;
mod health_check;
mod jwt_authn;
mod local_ratelimit;
mod match_delegate;
mod on_demand;
mod original_src;
mod r#override;
mod ratelimit;
mod rbac;
mod recent;
mod router;
mod set_filter_state;
mod set_metadata;
mod shared;
mod stateful_session;
pub(crate) mod tap;
mod trailers;

use std::{fmt::Debug, pin::Pin, sync::Arc};

use envoy_types::pb::google::protobuf::Any;

pub(super) use compression::fuzz as fuzz_compression;
pub(crate) use cors::of_route as cors_of_route;
pub(super) use custom_response::{Led, RedirectPolicy};
pub use discovered::{DiscoveredFilter, Factory, FilterSource};
pub(super) use grpc_counts::fuzz as fuzz_grpc_messages;
pub(super) use grpc_web::fuzz as fuzz_grpc_web;
pub use header_mutation::EarlyMutations;
pub(super) use jwt_authn::fuzz as fuzz_token;
pub use on_demand::ClustersOnDemand;
pub use r#override::{Explained, OffloadedTable, OverrideState, counted_contexts, explain};
pub use router::RouterFilter;
pub(super) use stateful_session::fuzz as fuzz_session;

use super::{
    RouteRef,
    body::Body,
    stream::{LocalReply, RequestHead, ResponseHead, StreamCx},
};
use crate::config::{
    FieldError,
    model::{ConfigSource, OriginalSrc, PerFilterConfig, SecretRef},
    parse::type_name,
};

/// What a filter says after it has seen a request's or response's head.
pub enum Flow {
    /// The next filter's turn.
    Continue,
    /// Answers the request here; filters that come later never see it, but all of them see the answer.
    Respond(LocalReply),
    /// The same in the place of a response, also of one that was made here: no further filter sees it.
    Replace(LocalReply),
    /// In the place of a response, also of one that was made here: the request is led to another route as one that begins anew. Where
    /// there is no such route the response goes on.
    Redirect(Redirect),
    /// The filter has to wait before it can say: it is asked to by [`HttpFilter::wait_request`] or
    /// [`HttpFilter::wait_response`].
    Wait,
    /// The request waits until the routes that it has none of have been asked for, where that can be; then it meets all
    /// filters anew.
    NeedsRoute,
    /// The same for the cluster that its route names.
    NeedsCluster(Arc<ClustersOnDemand>),
}

/// Where a request is led to, and by what.
pub struct Redirect {
    /// The request, with an absolute URI.
    pub(super) head: Box<RequestHead>,
    /// What wants that.
    pub(super) led: Led,
}

/// What a filter waits for.
pub type Waiting<'a> = Pin<Box<dyn Future<Output = Flow> + 'a>>;

/// One instance a stream, which lives as long as the stream.
///
/// Synchronous, so that a filter that need not wait costs a call and not a future: only what returns [`Flow::Wait`] is asked
/// for one. A filter that looks at a body or changes it puts its own around it ([`Body::wrap`]); others leave it alone.
pub trait HttpFilter {
    /// The request, on its way up. The route is chosen already: `cx.route`.
    fn request(&mut self, _head: &mut RequestHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        Flow::Continue
    }

    /// Called when [`request`](Self::request) said [`Flow::Wait`]. The stream's time limits hold meanwhile; a client that
    /// gives up drops the future.
    fn wait_request<'a>(
        &'a mut self,
        _head: &'a mut RequestHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(std::future::ready(Flow::Continue))
    }

    /// The response, on its way down, in the reverse order of the filters. It may be one that was made here, whose body is in
    /// memory then; it may come without that the request did, where an earlier filter answered it.
    fn response(&mut self, _head: &mut ResponseHead, _body: &mut Body, _cx: &mut StreamCx) -> Flow {
        Flow::Continue
    }

    /// Called when [`response`](Self::response) said [`Flow::Wait`]. [`Flow::Respond`] puts an answer that no filter sees in the
    /// response's place, also where that was made here.
    fn wait_response<'a>(
        &'a mut self,
        _head: &'a mut ResponseHead,
        _body: &'a mut Body,
        _cx: &'a mut StreamCx,
    ) -> Waiting<'a> {
        Box::pin(std::future::ready(Flow::Continue))
    }
}

/// A configured filter: makes an instance for each stream, which may outlive it: ECDS replaces filters while they serve.
pub trait HttpFilterFactory: Debug + Send + Sync {
    /// `None` where this stream has no need of the filter: so it is for all where nothing else is said. `route` is what the stream's
    /// route tells the filter.
    fn stream(&self, _route: PerRoute<'_>) -> Option<Box<dyn HttpFilter>> {
        None
    }

    /// The request, on its way up. A filter that knows all it has to say at once and has no interest in the response
    /// overrides this, and has no instances: nothing is allocated for it, and nothing counted.
    fn request(
        &self,
        head: &mut RequestHead,
        body: &mut Body,
        cx: &mut StreamCx,
        route: PerRoute<'_>,
        instances: &mut Vec<Box<dyn HttpFilter>>,
    ) -> Flow {
        let Some(mut filter) = self.stream(route) else { return Flow::Continue };
        let flow = filter.request(head, body, cx);
        instances.push(filter);
        flow
    }

    /// Whether this is the router, which ends a filter chain.
    fn is_terminal(&self) -> bool {
        false
    }

    /// Whether the filter looks at the offloaded services that discovery lists, which are then subscribed to.
    fn needs_offloaded_services(&self) -> bool {
        false
    }

    /// From where the filter has connections to hosts come, if it does that.
    fn original_src(&self) -> Option<OriginalSrc> {
        None
    }

    /// The generic secret that the filter needs.
    fn secret(&self) -> Option<&SecretRef> {
        None
    }

    /// Where the filter has resources asked for when requests need them, and of which type.
    fn source(&self) -> Option<(&ConfigSource, &'static str)> {
        None
    }

    /// `suppress_envoy_headers` of the router.
    fn suppresses_envoy_headers(&self) -> bool {
        false
    }

    /// `respect_expected_rq_timeout` of the router.
    fn respects_expected_timeout(&self) -> bool {
        false
    }
}

/// What a filter's parser may use.
pub struct FilterCx<'a> {
    /// The path of `typed_config`, for errors.
    pub path: &'a str,
    /// The connection manager's `stat_prefix`, for stats names.
    pub stat_prefix: &'a str,
}

/// Reads a filter's configuration.
pub type Parse = fn(&Any, &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError>;

/// What a route tells a filter: of a type that the filter knows.
pub type PerRouteConfig = Arc<dyn std::any::Any + Send + Sync>;

/// Reads what a route tells a filter; the second argument is the path of the message, for errors.
pub type ParsePerRoute = fn(&Any, &str) -> Result<PerRouteConfig, FieldError>;

/// What the configuration of a stream's route, its virtual host and their route configuration tells one filter.
#[derive(Debug, Clone, Copy, Default)]
pub struct PerRoute<'a>(&'a [Arc<PerFilterConfig>]);

impl<'a> PerRoute<'a> {
    /// For the filter at this place of its connection manager's list.
    pub(super) fn new(route: Option<&'a RouteRef>, position: usize) -> PerRoute<'a> {
        PerRoute(route.map(|route| route.per_filter(position)).unwrap_or_default())
    }

    /// Whether the filter takes part. The most specific word counts; without one `by_default`.
    pub fn is_enabled(&self, by_default: bool) -> bool {
        self.0.last().map_or(by_default, |config| !config.disabled)
    }

    /// What the most specific level says.
    pub fn most_specific<T: 'static>(&self) -> Option<&'a T> {
        self.all().next_back()
    }

    /// What all levels say, the least specific first.
    pub fn all<T: 'static>(&self) -> impl DoubleEndedIterator<Item = &'a T> + use<'a, T> {
        self.0.iter().filter_map(|config| config.config.as_ref()?.downcast_ref())
    }
}

/// Reads what a route tells the filter whose message `config` is.
///
/// # Errors
/// No filter takes such a message, or the field that is wrong or not honoured.
pub fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let wanted = type_name(config);
    let parse = REGISTRY.iter().filter_map(|filter| filter.per_route).find(|(name, _)| *name == wanted);
    match parse {
        Some((_, parse)) => parse(config, path),
        None => Err(FieldError::new(
            path,
            format!("per-route configuration of type {wanted} is not supported by culvert yet"),
        )),
    }
}

/// Whether a filter's configuration of this type may be passed over where the filter is optional: neither Culvert nor Envoy has such a
/// filter. What Envoy has would do something there: that is refused, optional or not.
pub fn is_nobodys(type_name: &str) -> bool {
    let known = |filter: &Registered| {
        filter.type_name == type_name || filter.per_route.is_some_and(|(known, _)| known == type_name)
    };
    !type_name.starts_with("envoy.") && !REGISTRY.iter().any(known)
}

/// One filter that Culvert knows.
pub struct Registered {
    /// Envoy's canonical name, for example `envoy.filters.http.router`.
    pub name: &'static str,
    /// The full name of its configuration message.
    pub type_name: &'static str,
    /// Reads its configuration.
    pub parse: Parse,
    /// The full name of the message that routes tell it something by, and what reads that; `None`: routes can only switch
    /// it off.
    pub per_route: Option<(&'static str, ParsePerRoute)>,
}

/// Every HTTP filter, by name.
pub const REGISTRY: &[Registered] = &[
    Registered {
        name: "culvert.filters.http.override",
        type_name: r#override::TYPE_NAME,
        parse: r#override::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.admission_control",
        type_name: "envoy.extensions.filters.http.admission_control.v3.AdmissionControl",
        parse: admission_control::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.bandwidth_limit",
        type_name: "envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit",
        parse: bandwidth_limit::parse,
        per_route: Some((
            "envoy.extensions.filters.http.bandwidth_limit.v3.BandwidthLimit",
            bandwidth_limit::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.buffer",
        type_name: "envoy.extensions.filters.http.buffer.v3.Buffer",
        parse: buffer::parse,
        per_route: Some(("envoy.extensions.filters.http.buffer.v3.BufferPerRoute", buffer::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.compressor",
        type_name: "envoy.extensions.filters.http.compressor.v3.Compressor",
        parse: compressor::parse,
        per_route: Some((
            "envoy.extensions.filters.http.compressor.v3.CompressorPerRoute",
            compressor::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.cors",
        type_name: "envoy.extensions.filters.http.cors.v3.Cors",
        parse: cors::parse,
        per_route: Some(("envoy.extensions.filters.http.cors.v3.CorsPolicy", cors::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.csrf",
        type_name: "envoy.extensions.filters.http.csrf.v3.CsrfPolicy",
        parse: csrf::parse,
        per_route: Some(("envoy.extensions.filters.http.csrf.v3.CsrfPolicy", csrf::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.custom_response",
        type_name: "envoy.extensions.filters.http.custom_response.v3.CustomResponse",
        parse: custom_response::parse,
        per_route: Some((
            "envoy.extensions.filters.http.custom_response.v3.CustomResponse",
            custom_response::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.ext_authz",
        type_name: "envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
        parse: ext_authz::parse,
        per_route: Some(("envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute", ext_authz::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.ext_proc",
        type_name: "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        parse: ext_proc::parse,
        per_route: Some(("envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute", ext_proc::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.decompressor",
        type_name: "envoy.extensions.filters.http.decompressor.v3.Decompressor",
        parse: decompressor::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.dynamic_forward_proxy",
        type_name: "envoy.extensions.filters.http.dynamic_forward_proxy.v3.FilterConfig",
        parse: dynamic_forward_proxy::parse,
        per_route: Some((
            "envoy.extensions.filters.http.dynamic_forward_proxy.v3.PerRouteConfig",
            dynamic_forward_proxy::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.fault",
        type_name: "envoy.extensions.filters.http.fault.v3.HTTPFault",
        parse: fault::parse,
        per_route: Some(("envoy.extensions.filters.http.fault.v3.HTTPFault", fault::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.grpc_http1_bridge",
        type_name: "envoy.extensions.filters.http.grpc_http1_bridge.v3.Config",
        parse: grpc_http1_bridge::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.grpc_stats",
        type_name: "envoy.extensions.filters.http.grpc_stats.v3.FilterConfig",
        parse: grpc_stats::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.grpc_web",
        type_name: "envoy.extensions.filters.http.grpc_web.v3.GrpcWeb",
        parse: grpc_web::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.header_mutation",
        type_name: "envoy.extensions.filters.http.header_mutation.v3.HeaderMutation",
        parse: header_mutation::parse,
        per_route: Some((
            "envoy.extensions.filters.http.header_mutation.v3.HeaderMutationPerRoute",
            header_mutation::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.header_to_metadata",
        type_name: "envoy.extensions.filters.http.header_to_metadata.v3.Config",
        parse: header_to_metadata::parse,
        per_route: Some((
            "envoy.extensions.filters.http.header_to_metadata.v3.Config",
            header_to_metadata::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.health_check",
        type_name: "envoy.extensions.filters.http.health_check.v3.HealthCheck",
        parse: health_check::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.jwt_authn",
        type_name: "envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
        parse: jwt_authn::parse,
        per_route: Some(("envoy.extensions.filters.http.jwt_authn.v3.PerRouteConfig", jwt_authn::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.local_ratelimit",
        type_name: "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
        parse: local_ratelimit::parse,
        per_route: Some((
            "envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit",
            local_ratelimit::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.match_delegate",
        type_name: "envoy.extensions.common.matching.v3.ExtensionWithMatcher",
        parse: match_delegate::parse,
        per_route: Some((
            "envoy.extensions.common.matching.v3.ExtensionWithMatcherPerRoute",
            match_delegate::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.on_demand",
        type_name: "envoy.extensions.filters.http.on_demand.v3.OnDemand",
        parse: on_demand::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.original_src",
        type_name: "envoy.extensions.filters.http.original_src.v3.OriginalSrc",
        parse: original_src::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.ratelimit",
        type_name: "envoy.extensions.filters.http.ratelimit.v3.RateLimit",
        parse: ratelimit::parse,
        per_route: Some(("envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute", ratelimit::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.rbac",
        type_name: "envoy.extensions.filters.http.rbac.v3.RBAC",
        parse: rbac::parse,
        per_route: Some(("envoy.extensions.filters.http.rbac.v3.RBACPerRoute", rbac::parse_per_route)),
    },
    Registered {
        name: "envoy.filters.http.set_filter_state",
        type_name: "envoy.extensions.filters.http.set_filter_state.v3.Config",
        parse: set_filter_state::parse,
        per_route: Some((
            "envoy.extensions.filters.http.set_filter_state.v3.Config",
            set_filter_state::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.set_metadata",
        type_name: "envoy.extensions.filters.http.set_metadata.v3.Config",
        parse: set_metadata::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.stateful_session",
        type_name: "envoy.extensions.filters.http.stateful_session.v3.StatefulSession",
        parse: stateful_session::parse,
        per_route: Some((
            "envoy.extensions.filters.http.stateful_session.v3.StatefulSessionPerRoute",
            stateful_session::parse_per_route,
        )),
    },
    Registered {
        name: "envoy.filters.http.router",
        type_name: "envoy.extensions.filters.http.router.v3.Router",
        parse: router::parse,
        per_route: None,
    },
    Registered {
        name: "envoy.filters.http.tap",
        type_name: "envoy.extensions.filters.http.tap.v3.Tap",
        parse: tap::parse,
        per_route: None,
    },
];

/// The filter whose configuration `typed_config` is: found by its type URL, as Envoy does.
fn find(typed_config: &Any, path: &str) -> Result<&'static Registered, FieldError> {
    let type_name = type_name(typed_config);
    let known = REGISTRY.iter().find(|filter| filter.type_name == type_name);
    known.ok_or_else(|| {
        let names: Vec<_> = REGISTRY.iter().map(|filter| filter.name).collect();
        FieldError::new(
            path,
            format!("HTTP filter type {type_name} is not supported by culvert yet; it has {}", names.join(", ")),
        )
    })
}

/// Reads the configuration of whatever filter `typed_config` is for.
///
/// # Errors
/// There is no such filter, or the field that is wrong or not honoured.
pub fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Factory, FieldError> {
    (find(typed_config, cx.path)?.parse)(typed_config, cx)
}
