use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use culvert_xds_client::{ads::Variant, json::unpack, source::Source};
use envoy_types::pb::envoy::config::{
    core::v3::HeaderValueOption,
    route::v3::{
        CorsPolicy, DirectResponseAction, FilterConfig, RedirectAction as ProtoRedirect, Route as ProtoRoute,
        RouteConfiguration, Vhds, VirtualCluster as ProtoVirtualCluster, VirtualHost as ProtoHost,
        redirect_action::{PathRewriteSpecifier, RedirectResponseCode, SchemeRewriteSpecifier},
        route::Action,
        virtual_host::TlsRequirementType,
    },
};
use envoy_types::pb::google::protobuf::{Any as ProtoAny, UInt32Value, UInt64Value};
use http::StatusCode;

use super::{
    common::{
        Result, header_name, header_value, headers_to_add, headers_to_remove, number, port, required, text_of,
        type_name,
    },
    config_source::config_source,
    local_reply::body_format,
    matcher::{header, regex_rewrite, route_match},
    mirror::mirror_policies,
    rate_limit,
    retry::retry_policy,
    route_action::forward,
    route_matcher::route_matcher,
    support::{self, join},
};
use crate::{
    access_log::HeaderFormat,
    config::{
        FieldError,
        model::{
            AddedValue, ClusterChoice, ConfigSource, FilterConfigOf, ForwardAction, HeaderMutations, PerFilterConfig,
            PerFilterConfigs, RedirectAction, RedirectPath, Route, RouteAction, RouteConfig, TlsRequirement,
            VirtualCluster, VirtualHost,
        },
    },
    http::{filters, metadata::Metadata},
};

/// The longest body of a direct response, in bytes, where nothing else is said.
const MAX_DIRECT_RESPONSE_BODY: u32 = 4096;

/// A checked route configuration.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn route_config(config: &RouteConfiguration, path: &str) -> Result<RouteConfig> {
    support::check(config, path)?;
    routes(config, path)
}

/// The routes of a message that has been checked.
pub(super) fn routes(config: &RouteConfiguration, path: &str) -> Result<RouteConfig> {
    let mut domains = HashSet::new();
    let max_body = number(config.max_direct_response_body_size_bytes, MAX_DIRECT_RESPONSE_BODY);
    let parse = |(index, host): (usize, &ProtoHost)| {
        host_of(host, max_body, &mut domains, &format!("{}[{index}]", join(path, "virtual_hosts"))).map(Arc::new)
    };
    Ok(RouteConfig {
        name: config.name.clone(),
        mirrors: mirror_policies(&config.request_mirror_policies, path)?.into(),
        virtual_hosts: config.virtual_hosts.iter().enumerate().map(parse).collect::<Result<_>>()?,
        vhds: config.vhds.as_ref().map(|vhds| vhds_source(vhds, &join(path, "vhds"))).transpose()?,
        headers: mutations(
            (&config.request_headers_to_add, &config.request_headers_to_remove),
            (&config.response_headers_to_add, &config.response_headers_to_remove),
            path,
        )?,
        per_filter: per_filter(&config.typed_per_filter_config, path)?,
        internal_only_headers: headers_to_remove(&config.internal_only_headers, path, "internal_only_headers")?.into(),
        validate_clusters: config.validate_clusters.map(|value| value.value),
        ignore_port_in_host_matching: config.ignore_port_in_host_matching,
        ignore_path_parameters_in_path_matching: config.ignore_path_parameters_in_path_matching,
        most_specific_header_mutations_wins: config.most_specific_header_mutations_wins,
        vhost_header: match config.vhost_header.as_str() {
            "" => None,
            name => Some(header_name(name, &join(path, "vhost_header"))?),
        },
    })
}

/// A checked virtual host, of VHDS.
///
/// # Errors
/// The field that is wrong or not honoured.
pub fn virtual_host(host: &ProtoHost, path: &str) -> Result<VirtualHost> {
    support::check(host, path)?;
    host_of(host, MAX_DIRECT_RESPONSE_BODY, &mut HashSet::new(), path)
}

fn vhds_source(vhds: &Vhds, path: &str) -> Result<ConfigSource> {
    let from = config_source(vhds.config_source.as_ref(), &join(path, "config_source"))?;
    match &*from.source {
        Source::Ads => Ok(from),
        Source::Grpc(grpc) if grpc.variant == Variant::Delta => Ok(from),
        // Envoy's words.
        _ => Err(FieldError::new(path, "vhds: only 'DELTA_GRPC' is supported as an api_type.")),
    }
}

/// Virtual hosts are discovered for route configurations of RDS alone.
pub(super) fn without_vhds(routes: RouteConfig, path: &str) -> Result<RouteConfig> {
    match &routes.vhds {
        Some(_) => Err(FieldError::unsupported(join(path, "vhds"))),
        None => Ok(routes),
    }
}

pub(super) type Edits<'a> = (&'a [HeaderValueOption], &'a [String]);

pub(super) fn mutations(request: Edits<'_>, response: Edits<'_>, path: &str) -> Result<HeaderMutations> {
    Ok(HeaderMutations {
        request_remove: headers_to_remove(request.1, path, "request_headers_to_remove")?,
        request_add: headers_to_add(request.0, path, "request_headers_to_add")?,
        response_remove: headers_to_remove(response.1, path, "response_headers_to_remove")?,
        response_add: headers_to_add(response.0, path, "response_headers_to_add")?,
    })
}

#[expect(deprecated, reason = "per_request_buffer_limit_bytes and cors, which Envoy still takes")]
fn host_of(host: &ProtoHost, max_body: u32, seen: &mut HashSet<String>, path: &str) -> Result<VirtualHost> {
    let mut domains = Vec::with_capacity(host.domains.len());
    for domain in &host.domains {
        let domain = domain.to_ascii_lowercase();
        if !seen.insert(domain.clone()) {
            let text = if domain == "*" {
                "Only a single wildcard domain is permitted".to_owned()
            } else {
                format!("Only unique values for domains are permitted. Duplicate entry of domain {domain}")
            };
            return Err(FieldError::new(join(path, "domains"), text));
        }
        domains.push(domain);
    }
    let (routes, matcher) = match &host.matcher {
        Some(_) if !host.routes.is_empty() => {
            return Err(FieldError::new(path, "cannot set both matcher and routes on virtual host"));
        }
        Some(matcher) => {
            let (matcher, routes) = route_matcher(matcher, max_body, &join(path, "matcher"))?;
            (routes, Some(matcher))
        }
        None => (all_routes(&host.routes, max_body, &join(path, "routes"))?, None),
    };
    let retry = host.retry_policy.as_ref().map(|policy| retry_policy(policy, &join(path, "retry_policy")));
    Ok(VirtualHost {
        name: host.name.clone(),
        virtual_clusters: virtual_clusters(&host.virtual_clusters, path)?,
        domains,
        routes,
        matcher,
        headers: mutations(
            (&host.request_headers_to_add, &host.request_headers_to_remove),
            (&host.response_headers_to_add, &host.response_headers_to_remove),
            path,
        )?,
        retry_policy: retry.transpose()?.map(Arc::new),
        hedge_on_per_try_timeout: host.hedge_policy.as_ref().is_some_and(|policy| policy.hedge_on_per_try_timeout),
        body_buffer_limit: body_limit(host.request_body_buffer_limit, host.per_request_buffer_limit_bytes),
        mirrors: mirror_policies(&host.request_mirror_policies, path)?,
        rate_limits: rate_limit::of_routes(&host.rate_limits, path)?,
        include_is_timeout_retry_header: host.include_is_timeout_retry_header,
        include_request_attempt_count: host.include_request_attempt_count,
        include_attempt_count_in_response: host.include_attempt_count_in_response,
        per_filter: per_filter(&host.typed_per_filter_config, path)?,
        cors: host.cors.as_ref().map(|policy| cors(policy, path)).transpose()?,
        require_tls: match TlsRequirementType::try_from(host.require_tls) {
            Ok(TlsRequirementType::All) => TlsRequirement::All,
            Ok(TlsRequirementType::ExternalOnly) => TlsRequirement::ExternalOnly,
            Ok(TlsRequirementType::None) | Err(_) => TlsRequirement::None,
        },
    })
}

/// The routes of a list.
pub(super) fn all_routes(routes: &[ProtoRoute], max_body: u32, path: &str) -> Result<Vec<Arc<Route>>> {
    let parse = |(index, item): (usize, &ProtoRoute)| Ok(Arc::new(route(item, max_body, &format!("{path}[{index}]"))?));
    routes.iter().enumerate().map(parse).collect()
}

#[expect(deprecated, reason = "per_request_buffer_limit_bytes, which Envoy still takes")]
pub(super) fn route(route: &ProtoRoute, max_body: u32, path: &str) -> Result<Route> {
    let rule = route.r#match.as_ref().ok_or_else(|| required(path, "match"))?;
    let route_match = route_match(rule, &join(path, "match"))?;
    let action = match &route.action {
        Some(Action::Route(action)) => {
            RouteAction::Forward(Box::new(forward(action, &route_match, &join(path, "route"))?))
        }
        Some(Action::Redirect(action)) => RouteAction::Redirect(Box::new(redirect(action, &join(path, "redirect"))?)),
        Some(Action::DirectResponse(action)) => direct_response(action, max_body, &join(path, "direct_response"))?,
        // Envoy looks for a cluster without a name, and answers that it is not there.
        Some(Action::FilterAction(_) | Action::NonForwardingAction(_)) => {
            RouteAction::Forward(Box::new(ForwardAction::to(ClusterChoice::Cluster("".into()))))
        }
        None => return Err(required(path, "route")),
    };
    Ok(Route {
        name: route.name.clone(),
        metadata: route.metadata.as_ref().map(|metadata| Arc::new(Metadata::of_config(metadata))),
        stat_prefix: Some(route.stat_prefix.as_str()).filter(|prefix| !prefix.is_empty()).map(Into::into),
        route_match,
        per_filter: per_filter(&route.typed_per_filter_config, path)?,
        body_buffer_limit: body_limit(route.request_body_buffer_limit, route.per_request_buffer_limit_bytes),
        action,
        headers: mutations(
            (&route.request_headers_to_add, &route.request_headers_to_remove),
            (&route.response_headers_to_add, &route.response_headers_to_remove),
            path,
        )?,
    })
}

fn virtual_clusters(clusters: &[ProtoVirtualCluster], path: &str) -> Result<Box<[VirtualCluster]>> {
    let parse = |(index, cluster): (usize, &ProtoVirtualCluster)| {
        let path = format!("{}[{index}]", join(path, "virtual_clusters"));
        if cluster.headers.is_empty() {
            return Err(FieldError::new(join(&path, "headers"), "virtual clusters must define 'headers'"));
        }
        let headers = cluster.headers.iter().enumerate();
        let headers = headers.map(|(index, rule)| header(rule, &format!("{}[{index}]", join(&path, "headers"))));
        Ok(VirtualCluster { name: cluster.name.as_str().into(), headers: headers.collect::<Result<_>>()? })
    };
    clusters.iter().enumerate().map(parse).collect()
}

/// How much of a request's body is kept; the newer field counts where both are there.
fn body_limit(bytes: Option<UInt64Value>, deprecated: Option<UInt32Value>) -> Option<u64> {
    bytes.map(|limit| limit.value).or(deprecated.map(|limit| u64::from(limit.value)))
}

/// A format; or a text that is always the same.
pub(super) fn formatted(text: &str, path: &str) -> Result<AddedValue> {
    Ok(match HeaderFormat::parse(text).map_err(|text| FieldError::new(path, text))? {
        Ok(format) => AddedValue::Format(Arc::new(format)),
        Err(literal) => AddedValue::Literal(header_value(&literal, path)?),
    })
}

/// `cors`: the older message of the filter's, which has the same fields.
pub(super) fn cors(policy: &CorsPolicy, path: &str) -> Result<FilterConfigOf> {
    filters::cors_of_route(policy, &join(path, "cors"))
}

/// `typed_per_filter_config`: for each filter its own message, or a `FilterConfig` around it. What is optional and of no use to any
/// filter here only switches the filter on, as in Envoy.
pub(super) fn per_filter(configs: &HashMap<String, ProtoAny>, path: &str) -> Result<PerFilterConfigs> {
    let parse = |(name, config): (&String, &ProtoAny)| {
        let path = format!("{}[\"{name}\"]", join(path, "typed_per_filter_config"));
        if type_name(config) != "envoy.config.route.v3.FilterConfig" {
            let config = Some(filters::parse_per_route(config, &path)?);
            return Ok((name.as_str().into(), Arc::new(PerFilterConfig { disabled: false, config })));
        }
        let wrapped: FilterConfig = unpack(config, &path)?;
        let config = match wrapped.config {
            // Nobody is told what he is not asked to do.
            _ if wrapped.disabled => None,
            // Envoy's words.
            None => {
                let text = format!("Empty route/virtual host per filter configuration for {name} filter");
                return Err(FieldError::new(path, text));
            }
            // The filter is only switched on.
            Some(config) if config.type_url.is_empty() => None,
            Some(config) if wrapped.is_optional && filters::is_nobodys(type_name(&config)) => None,
            Some(config) => Some(filters::parse_per_route(&config, &join(&path, "config"))?),
        };
        Ok((name.as_str().into(), Arc::new(PerFilterConfig { disabled: wrapped.disabled, config })))
    };
    configs.iter().map(parse).collect()
}

pub(crate) fn redirect(action: &ProtoRedirect, path: &str) -> Result<RedirectAction> {
    let status = match RedirectResponseCode::try_from(action.response_code) {
        Ok(RedirectResponseCode::Found) => StatusCode::FOUND,
        Ok(RedirectResponseCode::SeeOther) => StatusCode::SEE_OTHER,
        Ok(RedirectResponseCode::TemporaryRedirect) => StatusCode::TEMPORARY_REDIRECT,
        Ok(RedirectResponseCode::PermanentRedirect) => StatusCode::PERMANENT_REDIRECT,
        _ => StatusCode::MOVED_PERMANENTLY,
    };
    let scheme = match &action.scheme_rewrite_specifier {
        Some(SchemeRewriteSpecifier::HttpsRedirect(true)) => Some("https".into()),
        Some(SchemeRewriteSpecifier::SchemeRedirect(scheme)) => Some(scheme.as_str().into()),
        _ => None,
    };
    let rewrite = match &action.path_rewrite_specifier {
        // Empty, they say nothing, as in Envoy.
        Some(PathRewriteSpecifier::PathRedirect(path)) if path.is_empty() => RedirectPath::Keep,
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) if prefix.is_empty() => RedirectPath::Keep,
        Some(PathRewriteSpecifier::PathRedirect(path)) => RedirectPath::Replace(path.as_str().into()),
        Some(PathRewriteSpecifier::PrefixRewrite(prefix)) => RedirectPath::PrefixRewrite(prefix.as_str().into()),
        Some(PathRewriteSpecifier::RegexRewrite(rewrite)) => {
            RedirectPath::RegexRewrite(Box::new(regex_rewrite(rewrite, &join(path, "regex_rewrite"))?))
        }
        Some(PathRewriteSpecifier::PathRewrite(format)) => {
            RedirectPath::Format(formatted(format, &join(path, "path_rewrite"))?)
        }
        None => RedirectPath::Keep,
    };
    let to_port = (action.port_redirect != 0).then(|| port(action.port_redirect, path, "port_redirect"));
    Ok(RedirectAction {
        status,
        scheme,
        host: Some(action.host_redirect.as_str()).filter(|host| !host.is_empty()).map(Into::into),
        port: to_port.transpose()?,
        path: rewrite,
        strip_query: action.strip_query,
    })
}

fn direct_response(action: &DirectResponseAction, max_body: u32, path: &str) -> Result<RouteAction> {
    let status = u16::try_from(action.status).ok().and_then(|status| StatusCode::from_u16(status).ok());
    let status = status.filter(|status| (200..600).contains(&status.as_u16())).ok_or_else(|| {
        FieldError::new(join(path, "status"), format!("{} is not a status from 200 to 599", action.status))
    })?;
    let body = match &action.body {
        Some(source) => text_of(source, max_body, &join(path, "body"))?,
        None => Vec::new(),
    };
    if body.len() as u64 > u64::from(max_body) {
        let text = format!("response body size is {} bytes; maximum is {max_body}", body.len());
        return Err(FieldError::new(join(path, "body"), text));
    }
    let format = action.body_format.as_ref().map(|format| body_format(format, &join(path, "body_format")));
    Ok(RouteAction::DirectResponse { status, body: body.into(), format: format.transpose()?.map(Box::new) })
}
