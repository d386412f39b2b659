//! The configuration of `envoy.filters.http.ext_authz`.

use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        config::core::v3::{ApiVersion, GrpcService},
        extensions::filters::http::ext_authz::v3::{
            AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, ExtAuthzPerRoute,
            HttpService as ProtoHttp, check_settings::ServiceOverride, ext_authz::Services,
            ext_authz_per_route::Override,
        },
        r#type::matcher::v3::ListStringMatcher,
    },
    google::protobuf::Any,
};
use http::StatusCode;

use super::{
    ClusterCounters, ExtAuthzFactory, Stats, Told,
    service::{HttpService, Service},
};
use crate::http::filters::shared::Shared;
use crate::{
    config::{
        FieldError,
        model::{HeaderMutations, MetadataMatcher, StringMatcher, StringPattern},
        parse,
    },
    http::{
        call::grpc,
        filters::{FilterCx, HttpFilterFactory, PerRouteConfig, ext_proc::rules::Rules},
        metadata::read_from,
    },
    layered_runtime::{Fraction, RuntimeFlag, RuntimeFraction},
    stats::Scope,
};

/// What is configured. Streams hold on to it while they ask.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) service: Service,
    pub(super) failure_mode_allow: bool,
    pub(super) failure_mode_allow_header_add: bool,
    pub(super) buffer: Option<Buffer>,
    pub(super) clear_route_cache: bool,
    pub(super) status_on_error: StatusCode,
    pub(super) metadata_namespaces: Box<[Box<str>]>,
    pub(super) typed_namespaces: Box<[Box<str>]>,
    pub(super) route_namespaces: Box<[Box<str>]>,
    pub(super) route_typed_namespaces: Box<[Box<str>]>,
    /// What filters before this one must have told.
    pub(super) enabled_metadata: Option<MetadataMatcher>,
    /// Headers are told one by one, as they are.
    pub(super) raw_headers: bool,
    /// What is no header is refused.
    pub(super) validates: bool,
    /// Which headers of requests the service may change.
    pub(super) rules: Option<Rules>,
    /// The longest body of an answer to a request that may not pass.
    pub(super) max_denied_body: usize,
    pub(super) enabled: RuntimeFraction,
    pub(super) deny_at_disable: Option<RuntimeFlag>,
    pub(super) include_peer_certificate: bool,
    pub(super) include_tls_session: bool,
    pub(super) allowed_headers: Option<Box<[StringMatcher]>>,
    pub(super) disallowed_headers: Box<[StringMatcher]>,
    pub(super) charge_cluster: bool,
    pub(super) takes_metadata: bool,
    pub(super) stats: Stats,
    pub(super) of_cluster: ClusterCounters,
}

/// `BufferSettings`
#[derive(Debug, Clone, Copy)]
pub(super) struct Buffer {
    pub(super) max_bytes: usize,
    pub(super) partial: bool,
    pub(super) as_bytes: bool,
}

impl Buffer {
    fn of(settings: BufferSettings) -> Buffer {
        Buffer {
            max_bytes: settings.max_request_bytes as usize,
            partial: settings.allow_partial_message,
            as_bytes: settings.pack_as_bytes,
        }
    }
}

pub(in crate::http::filters) fn parse(
    typed_config: &Any,
    cx: &FilterCx<'_>,
) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: ExtAuthz = unpack(typed_config, cx.path)?;
    let field = |name: &str| format!("{}.{name}", cx.path);
    #[expect(deprecated, reason = "this is where it is refused")]
    const V2: i32 = ApiVersion::V2 as i32;
    if config.transport_api_version == V2 {
        return Err(FieldError::unsupported_value(field("transport_api_version"), "V2", "V3"));
    }
    let mut of_service = None;
    let service = match &config.services {
        Some(Services::GrpcService(service)) => grpc_service(service, &field("grpc_service"))?,
        Some(Services::HttpService(http)) => {
            #[expect(deprecated, reason = "Envoy still obeys it")]
            let list = http.authorization_request.as_ref().and_then(|request| request.allowed_headers.as_ref());
            of_service = list.map(|list| (list, field("http_service.authorization_request.allowed_headers")));
            Service::Http(Box::new(http_service(http, &field("http_service"))?))
        }
        None => return Err(FieldError::new(field("services"), "value is required")),
    };
    let own = config.allowed_headers.as_ref().map(|list| (list, field("allowed_headers")));
    if let (Some(_), Some((_, path))) = (&own, &of_service) {
        return Err(FieldError::new(&**path, "Invalid duplicate configuration for allowed_headers."));
    }
    let mut allowed = own.or(of_service).map(|(list, path)| matchers(list, &path)).transpose()?;
    if let Service::Http(_) = service {
        // What no service can do without.
        let always = [":authority", ":method", ":path", "authorization"];
        let exact = always.map(|name| StringMatcher { pattern: StringPattern::Exact(name.into()), ignore_case: true });
        allowed = Some(allowed.unwrap_or_default().into_vec().into_iter().chain(exact).collect());
    }
    let scope = Scope::http(cx.stat_prefix).child("ext_authz");
    let prefix = config.stat_prefix.as_str();
    let scope = if prefix.is_empty() { scope } else { scope.child(prefix) };
    let everything = RuntimeFraction { default: Fraction::percent(100), key: None };
    let disallowed = config.disallowed_headers.as_ref();
    let settings = Settings {
        service,
        failure_mode_allow: config.failure_mode_allow,
        failure_mode_allow_header_add: config.failure_mode_allow_header_add,
        buffer: config.with_request_body.map(Buffer::of),
        clear_route_cache: config.clear_route_cache,
        status_on_error: parse::status(config.status_on_error.map(|it| it.code), 100, StatusCode::FORBIDDEN),
        metadata_namespaces: config.metadata_context_namespaces.iter().map(|name| read_from(name)).collect(),
        typed_namespaces: names(&config.typed_metadata_context_namespaces),
        route_namespaces: names(&config.route_metadata_context_namespaces),
        route_typed_namespaces: names(&config.route_typed_metadata_context_namespaces),
        enabled_metadata: (config.filter_enabled_metadata.as_ref())
            .map(|matcher| parse::metadata_match::metadata(matcher, &field("filter_enabled_metadata")))
            .transpose()?,
        raw_headers: config.encode_raw_headers,
        validates: config.validate_mutations,
        rules: (config.decoder_header_mutation_rules.as_ref())
            .map(|rules| Rules::parse(Some(rules), &field("decoder_header_mutation_rules")))
            .transpose()?,
        max_denied_body: match config.max_denied_response_body_bytes {
            0 => usize::MAX,
            bytes => bytes as usize,
        },
        enabled: config.filter_enabled.as_ref().map_or(everything, parse::runtime_fraction),
        deny_at_disable: config.deny_at_disable.as_ref().map(parse::runtime_flag),
        include_peer_certificate: config.include_peer_certificate,
        include_tls_session: config.include_tls_session,
        allowed_headers: allowed,
        disallowed_headers: disallowed
            .map_or_else(|| Ok(Box::default()), |list| matchers(list, &field("disallowed_headers")))?,
        charge_cluster: config.charge_cluster_response_stats.is_none_or(|value| value.value),
        takes_metadata: config.enable_dynamic_metadata_ingestion.is_none_or(|value| value.value),
        stats: Stats::new(&scope),
        of_cluster: ClusterCounters::new(prefix),
    };
    Ok(Arc::new(ExtAuthzFactory(Shared::new(settings))))
}

pub(in crate::http::filters) fn parse_per_route(config: &Any, path: &str) -> Result<PerRouteConfig, FieldError> {
    let ExtAuthzPerRoute { r#override } = unpack(config, path)?;
    Ok(Arc::new(match r#override {
        Some(Override::Disabled(true)) => Told { disabled: true, ..Told::default() },
        Some(Override::Disabled(false)) => {
            return Err(FieldError::new(format!("{path}.disabled"), "value must equal true"));
        }
        Some(Override::CheckSettings(settings)) => {
            if settings.disable_request_body_buffering && settings.with_request_body.is_some() {
                let text = "Invalid configuration for check_settings. Only one of disable_request_body_buffering or \
                            with_request_body can be set.";
                return Err(FieldError::new(format!("{path}.check_settings"), text));
            }
            let at = |field: &str| format!("{path}.check_settings.{field}");
            let service = match &settings.service_override {
                None => None,
                Some(ServiceOverride::GrpcService(service)) => Some(grpc_service(service, &at("grpc_service"))?),
                Some(ServiceOverride::HttpService(service)) => {
                    Some(Service::Http(Box::new(http_service(service, &at("http_service"))?)))
                }
            };
            Told {
                disabled: false,
                service: service.map(Shared::new),
                context_extensions: settings.context_extensions,
                without_body: settings.disable_request_body_buffering,
                buffer: settings.with_request_body.map(Buffer::of),
            }
        }
        None => return Err(FieldError::new(format!("{path}.override"), "value is required")),
    }))
}

fn names(names: &[String]) -> Box<[Box<str>]> {
    names.iter().map(|name| name.as_str().into()).collect()
}

fn grpc_service(service: &GrpcService, path: &str) -> Result<Service, FieldError> {
    let limit = Some(Duration::from_millis(200));
    Ok(Service::Grpc(grpc::Service::parse_unary(service, limit, path)?))
}

fn http_service(service: &ProtoHttp, path: &str) -> Result<HttpService, FieldError> {
    use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
    let Some(uri) = &service.server_uri else {
        return Err(FieldError::new(format!("{path}.server_uri"), "value is required"));
    };
    let Some(HttpUpstreamType::Cluster(cluster)) = &uri.http_upstream_type else {
        return Err(FieldError::new(format!("{path}.server_uri.cluster"), "value is required"));
    };
    for (field, value) in [("path_prefix", &service.path_prefix), ("path_override", &service.path_override)] {
        if !value.is_empty() && !value.starts_with('/') {
            return Err(FieldError::new(format!("{path}.{field}"), format!("{field} should start with \"/\".")));
        }
    }
    if !service.path_prefix.is_empty() && !service.path_override.is_empty() {
        let text = "Only one of path_prefix or path_override can be set.";
        return Err(FieldError::new(format!("{path}.path_override"), text));
    }
    let AuthorizationRequest { headers_to_add, .. } = service.authorization_request.clone().unwrap_or_default();
    let options: Vec<_> = headers_to_add
        .into_iter()
        .map(|header| envoy_types::pb::envoy::config::core::v3::HeaderValueOption {
            header: Some(header),
            append_action: 2,
            ..Default::default()
        })
        .collect();
    let request_add = parse::headers_to_add(&options, &format!("{path}.authorization_request"), "headers_to_add")?;
    let AuthorizationResponse {
        allowed_upstream_headers: upstream,
        allowed_upstream_headers_to_append: append,
        allowed_client_headers: client,
        allowed_client_headers_on_success: on_success,
        dynamic_metadata_from_headers: metadata,
    } = service.authorization_response.clone().unwrap_or_default();
    let list = |list: &Option<ListStringMatcher>, name: &str| {
        let path = format!("{path}.authorization_response.{name}");
        list.as_ref().map_or_else(|| Ok(Box::default()), |list| matchers(list, &path))
    };
    let client = list(&client, "allowed_client_headers")?;
    Ok(HttpService {
        cluster: cluster.as_str().into(),
        timeout: parse::duration(uri.timeout, &format!("{path}.server_uri"), "timeout")?.filter(|it| !it.is_zero()),
        path_prefix: service.path_prefix.as_str().into(),
        path_override: service.path_override.as_str().into(),
        headers_to_add: HeaderMutations { request_add, ..HeaderMutations::default() },
        upstream: list(&upstream, "allowed_upstream_headers")?,
        upstream_append: list(&append, "allowed_upstream_headers_to_append")?,
        client_on_success: list(&on_success, "allowed_client_headers_on_success")?,
        client: (!client.is_empty()).then_some(client),
        metadata: list(&metadata, "dynamic_metadata_from_headers")?,
        retry: (service.retry_policy.as_ref())
            .map(|policy| parse::retry_policy_of_calls(policy, &format!("{path}.retry_policy")))
            .transpose()?,
    })
}

fn matchers(list: &ListStringMatcher, path: &str) -> Result<Box<[StringMatcher]>, FieldError> {
    let patterns = list.patterns.iter().enumerate();
    patterns.map(|(index, matcher)| parse::matcher::string(matcher, &format!("{path}.patterns[{index}]"))).collect()
}
