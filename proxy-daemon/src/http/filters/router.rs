//! `envoy.filters.http.router`: the end of every filter chain. What it does is in `http/forward.rs`.

use std::sync::Arc;

use culvert_xds_client::json::unpack;
use envoy_types::pb::{envoy::extensions::filters::http::router::v3::Router, google::protobuf::Any};

use super::{FilterCx, HttpFilterFactory};
use crate::{config::FieldError, http::strict_check::StrictCheck};

/// A configured router.
#[derive(Debug)]
pub struct RouterFilter {
    suppress_envoy_headers: bool,
    respect_expected_rq_timeout: bool,
    strict_checks: Option<Arc<[StrictCheck]>>,
}

#[expect(deprecated, reason = "a deprecated field that is set must be refused, not passed over")]
pub(super) fn parse(typed_config: &Any, cx: &FilterCx<'_>) -> Result<Arc<dyn HttpFilterFactory>, FieldError> {
    let Router {
        dynamic_stats,
        start_child_span,
        upstream_log,
        upstream_log_options,
        suppress_envoy_headers,
        strict_check_headers,
        respect_expected_rq_timeout,
        suppress_grpc_request_failure_code_stats,
        upstream_http_filters,
        reject_connect_request_early_data,
    } = unpack(typed_config, cx.path)?;
    let refused = [
        ("dynamic_stats", dynamic_stats.is_some_and(|value| !value.value)),
        ("start_child_span", start_child_span),
        ("upstream_log", !upstream_log.is_empty()),
        ("upstream_log_options", upstream_log_options.is_some()),
        ("suppress_grpc_request_failure_code_stats", suppress_grpc_request_failure_code_stats),
        ("upstream_http_filters", !upstream_http_filters.is_empty()),
        ("reject_connect_request_early_data", reject_connect_request_early_data.is_some_and(|value| value.value)),
    ];
    match refused.iter().find(|(_, set)| *set) {
        Some((field, _)) => Err(FieldError::unsupported(format!("{}.{field}", cx.path))),
        None => {
            let checks = strict_check_headers.iter().enumerate().map(|(index, name)| {
                let wrong = |text| FieldError::new(format!("{}.strict_check_headers[{index}]", cx.path), text);
                StrictCheck::of(name).map_err(wrong)
            });
            let checks: Arc<[StrictCheck]> = checks.collect::<Result<_, _>>()?;
            let strict_checks = (!checks.is_empty()).then_some(checks);
            Ok(Arc::new(RouterFilter { suppress_envoy_headers, respect_expected_rq_timeout, strict_checks }))
        }
    }
}

impl HttpFilterFactory for RouterFilter {
    fn is_terminal(&self) -> bool {
        true
    }

    fn suppresses_envoy_headers(&self) -> bool {
        self.suppress_envoy_headers
    }

    fn respects_expected_timeout(&self) -> bool {
        self.respect_expected_rq_timeout
    }

    fn strict_checks(&self) -> Option<&Arc<[StrictCheck]>> {
        self.strict_checks.as_ref()
    }
}
