//! Every HTTP filter that there is.

use envoy_types::pb::google::protobuf::Any;

use super::{
    Factory, FilterCx, Parse, ParsePerRoute, PerRouteConfig, admission_control, bandwidth_limit, buffer, compressor,
    cors, csrf, custom_response, decompressor, dynamic_forward_proxy, ext_authz, ext_proc, fault, grpc_http1_bridge,
    grpc_stats, grpc_web, header_mutation, header_to_metadata, health_check, jwt_authn, local_ratelimit,
    match_delegate, on_demand, original_src, r#override, ratelimit, rbac, router, set_filter_state, set_metadata,
    stateful_session, tap,
};
use crate::config::{FieldError, parse::type_name};

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
pub(super) fn find(typed_config: &Any, path: &str) -> Result<&'static Registered, FieldError> {
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
