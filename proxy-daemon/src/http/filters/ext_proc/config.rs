//! The configuration of `envoy.filters.http.ext_proc`.

use std::{sync::Arc, time::Duration};

use culvert_xds_client::json::unpack;
use envoy_types::pb::{
    envoy::{
        extensions::filters::http::ext_proc::v3::{
            ExternalProcessor, HeaderForwardingRules, ProcessingMode, external_processor::RouteCacheAction,
            metadata_options::MetadataNamespaces,
        },
        r#type::matcher::v3::ListStringMatcher,
    },
    google::protobuf::Any,
};
use http::StatusCode;

use super::{ExtProcFactory, attributes::Attributes, mode::Mode, rules::Rules};
use crate::http::filters::shared::Shared;
use crate::{
    config::{FieldError, model::StringMatcher, parse},
    http::{
        call::grpc::Service,
        filters::{FilterCx, HttpFilterFactory},
        metadata::read_from,
    },
    stats::{Counter, Lease, Scope},
};

/// What is configured. Streams hold on to it.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) service: Shared<Service>,
    pub(super) failure_mode_allow: bool,
    pub(super) mode: Mode,
    /// As it is written.
    pub(super) written_mode: ProcessingMode,
    pub(super) message_timeout: Duration,
    /// The most that a processor may ask for; zero: it may not.
    pub(super) max_message_timeout: Duration,
    pub(super) rules: Rules,
    pub(super) forward: ForwardRules,
    pub(super) allow_mode_override: bool,
    /// Empty: all.
    pub(super) allowed_override_modes: Box<[ProcessingMode]>,
    pub(super) disable_immediate_response: bool,
    pub(super) observability: bool,
    pub(super) deferred_close_timeout: Duration,
    pub(super) route_cache: RouteCacheAction,
    pub(super) status_on_error: StatusCode,
    pub(super) allow_content_length: bool,
    pub(super) request_attributes: Attributes,
    pub(super) response_attributes: Attributes,
    pub(super) forwarded: Shared<Box<[Box<str>]>>,
    pub(super) received: Shared<Box<[Box<str>]>>,
    pub(super) stats: Stats,
}

/// `HeaderForwardingRules`
#[derive(Debug, Default)]
pub(super) struct ForwardRules {
    allowed: Box<[StringMatcher]>,
    disallowed: Box<[StringMatcher]>,
}

impl ForwardRules {
    /// Whether the processor is told of a header.
    pub(super) fn forwards(&self, name: &str) -> bool {
        let any = |matchers: &[StringMatcher]| matchers.iter().any(|matcher| matcher.matches(name));
        !any(&self.disallowed) && (self.allowed.is_empty() || any(&self.allowed))
    }
}

/// What is counted.
#[derive(Debug)]
pub(super) struct Stats {
    pub(super) streams_started: Counter,
    pub(super) stream_msgs_sent: Counter,
    pub(super) stream_msgs_received: Counter,
    pub(super) spurious_msgs_received: Counter,
    pub(super) streams_closed: Counter,
    pub(super) streams_failed: Counter,
    pub(super) failure_mode_allowed: Counter,
    pub(super) message_timeouts: Counter,
    pub(super) rejected_header_mutations: Counter,
    pub(super) override_message_timeout_received: Counter,
    pub(super) override_message_timeout_ignored: Counter,
    pub(super) clear_route_cache_ignored: Counter,
    pub(super) clear_route_cache_disabled: Counter,
    pub(super) immediate_responses_sent: Counter,
    pub(super) server_half_closed: Counter,
    _lease: Lease,
}

impl Stats {
    fn new(scope: &Scope) -> Stats {
        // Of what culvertd has not: processors that are asked by HTTP, and filters of clusters.
        for name in
            ["clear_route_cache_upstream_ignored", "http_not_ok_resp_received", "send_immediate_resp_upstream_ignored"]
        {
            scope.counter(name);
        }
        Stats {
            streams_started: scope.counter("streams_started"),
            stream_msgs_sent: scope.counter("stream_msgs_sent"),
            stream_msgs_received: scope.counter("stream_msgs_received"),
            spurious_msgs_received: scope.counter("spurious_msgs_received"),
            streams_closed: scope.counter("streams_closed"),
            streams_failed: scope.counter("streams_failed"),
            failure_mode_allowed: scope.counter("failure_mode_allowed"),
            message_timeouts: scope.counter("message_timeouts"),
            rejected_header_mutations: scope.counter("rejected_header_mutations"),
            override_message_timeout_received: scope.counter("override_message_timeout_received"),
            override_message_timeout_ignored: scope.counter("override_message_timeout_ignored"),
            clear_route_cache_ignored: scope.counter("clear_route_cache_ignored"),
            clear_route_cache_disabled: scope.counter("clear_route_cache_disabled"),
            immediate_responses_sent: scope.counter("immediate_responses_sent"),
            server_half_closed: scope.counter("server_half_closed"),
            _lease: scope.lease(),
        }
    }
}

pub(in crate::http::filters) fn parse(
    typed_config: &Any,
    cx: &FilterCx<'_>,
) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    // What is not here is refused by the table of honoured fields.
    let config: ExternalProcessor = unpack(typed_config, cx.path)?;
    let field = |name: &str| format!("{}.{name}", cx.path);
    let Some(service) = &config.grpc_service else {
        let text = "One and only one of grpc_service or http_service must be configured";
        return Err(FieldError::new(field("grpc_service"), text));
    };
    let mut route_cache = RouteCacheAction::try_from(config.route_cache_action).unwrap_or(RouteCacheAction::Default);
    if config.disable_clear_route_cache {
        if route_cache != RouteCacheAction::Default {
            // Envoy's words.
            let text =
                "disable_clear_route_cache and route_cache_action can not be set to none-default at the same time.";
            return Err(FieldError::new(field("disable_clear_route_cache"), text));
        }
        route_cache = RouteCacheAction::Retain;
    }
    let duration = |value, name: &str, default: Duration| -> Result<Duration, FieldError> {
        Ok(parse::duration(value, cx.path, name)?.unwrap_or(default))
    };
    let allowed = config.allowed_override_modes.iter().enumerate();
    let allowed = allowed.map(|(index, mode)| {
        Mode::parse_override(mode, &field(&format!("allowed_override_modes[{index}]")))?;
        Ok(*mode)
    });
    let written_mode = config.processing_mode.unwrap_or_default();
    let options = config.metadata_options.unwrap_or_default();
    let names = |namespaces: Option<MetadataNamespaces>| {
        namespaces.unwrap_or_default().untyped.iter().map(|name| read_from(name)).collect()
    };
    let scope = Scope::http(cx.stat_prefix).child("ext_proc");
    let scope = if config.stat_prefix.is_empty() { scope } else { scope.child(&config.stat_prefix) };
    let settings = Settings {
        service: Shared::new(Service::parse(service, None, &field("grpc_service"))?),
        failure_mode_allow: config.failure_mode_allow,
        mode: Mode::parse(&written_mode, &field("processing_mode"))?,
        written_mode,
        message_timeout: duration(config.message_timeout, "message_timeout", Duration::from_millis(200))?,
        max_message_timeout: duration(config.max_message_timeout, "max_message_timeout", Duration::ZERO)?,
        rules: Rules::parse(config.mutation_rules.as_ref(), &field("mutation_rules"))?,
        forward: forward_rules(config.forward_rules.as_ref(), &field("forward_rules"))?,
        allow_mode_override: config.allow_mode_override,
        allowed_override_modes: allowed.collect::<Result<_, FieldError>>()?,
        disable_immediate_response: config.disable_immediate_response,
        observability: config.observability_mode,
        deferred_close_timeout: duration(
            config.deferred_close_timeout,
            "deferred_close_timeout",
            Duration::from_secs(5),
        )?,
        route_cache,
        status_on_error: parse::status(
            config.status_on_error.map(|it| it.code),
            100,
            StatusCode::INTERNAL_SERVER_ERROR,
        ),
        allow_content_length: config.allow_content_length_header,
        request_attributes: Attributes::parse(&config.request_attributes, &field("request_attributes"))?,
        response_attributes: Attributes::parse(&config.response_attributes, &field("response_attributes"))?,
        forwarded: names(options.forwarding_namespaces),
        received: names(options.receiving_namespaces),
        stats: Stats::new(&scope),
    };
    Ok(Arc::new(ExtProcFactory(Shared::new(settings))))
}

fn forward_rules(rules: Option<&HeaderForwardingRules>, path: &str) -> Result<ForwardRules, FieldError> {
    let Some(rules) = rules else { return Ok(ForwardRules::default()) };
    let list = |list: &Option<ListStringMatcher>, name: &str| {
        let patterns = list.as_ref().map(|list| list.patterns.as_slice()).unwrap_or_default();
        let pattern = |(index, matcher)| parse::matcher::string(matcher, &format!("{path}.{name}.patterns[{index}]"));
        patterns.iter().enumerate().map(pattern).collect::<Result<_, _>>()
    };
    Ok(ForwardRules {
        allowed: list(&rules.allowed_headers, "allowed_headers")?,
        disallowed: list(&rules.disallowed_headers, "disallowed_headers")?,
    })
}
