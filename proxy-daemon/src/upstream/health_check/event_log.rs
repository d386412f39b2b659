//! Lines of health check event logs: `envoy.data.core.v3.HealthCheckEvent` as Envoy prints it.

use std::time::SystemTime;

use serde_json::json;

use super::{Failure, Report};
use crate::{
    access_log::rfc3339,
    config::model::{Check, Endpoint, EndpointAddress, HealthCheckConfig, Locality},
};

/// What a check may have to say.
pub(super) struct Line<'a> {
    pub(super) config: &'a HealthCheckConfig,
    pub(super) cluster: &'a str,
    pub(super) report: &'a Report,
}

impl Line<'_> {
    /// The lines, in Envoy's order. Fields before the time have lower numbers in the message than it, the others higher ones.
    pub(super) fn events(&self, endpoint: &Endpoint, locality: &Locality) -> Vec<String> {
        let Report { before, health, first, result, .. } = *self.report;
        let mut lines = Vec::new();
        let mut add = |early: Option<String>, late: Option<String>, last: Option<&str>| {
            lines.push(self.line(endpoint, locality, early, late, last));
        };
        let status = |failure| match failure {
            Failure::Active | Failure::Retriable => health.http_status.unwrap_or(0),
            Failure::Passive | Failure::Network | Failure::Timeout => 0,
        };
        match result {
            Ok(_) => {
                if !before.healthy && health.healthy {
                    add(Some(format!("\"add_healthy_event\":{{\"first_check\":{first}}}")), None, None);
                } else if self.config.always_log_success {
                    add(None, None, Some("\"successful_health_check_event\":{}"));
                }
                match (before.degraded, health.degraded) {
                    (false, true) => add(None, Some("\"degraded_healthy_host\":{}".to_owned()), None),
                    (true, false) => add(None, Some("\"no_longer_degraded_host\":{}".to_owned()), None),
                    _ => {}
                }
            }
            Err(failure) => {
                let (kind, code) = (name(failure), status(failure));
                if before.healthy && !health.healthy {
                    let event = format!(
                        "\"eject_unhealthy_event\":{{\"failure_type\":\"{kind}\",\"http_status_code\":{code}}}"
                    );
                    add(Some(event), None, None);
                }
                if first || self.config.always_log_failures {
                    let event = format!(
                        "\"health_check_failure_event\":{{\"failure_type\":\"{kind}\",\"first_check\":{first},\
                         \"http_status_code\":{code}}}"
                    );
                    add(None, Some(event), None);
                }
            }
        }
        lines
    }

    fn line(
        &self,
        endpoint: &Endpoint,
        locality: &Locality,
        early: Option<String>,
        late: Option<String>,
        last: Option<&str>,
    ) -> String {
        let kind = match self.config.check {
            Check::Http(_) => "HTTP",
            Check::Tcp(_) => "TCP",
            Check::Grpc(_) => "GRPC",
            Check::Redis(_) => "REDIS",
        };
        let socket = |address: &str, port: u16| {
            format!(
                "{{\"socket_address\":{{\"protocol\":\"TCP\",\"address\":{},\"port_value\":{port},\"resolver_name\":\"\",\
                 \"ipv4_compat\":false,\"network_namespace_filepath\":\"\"}}}}",
                json!(address)
            )
        };
        let host = match &endpoint.address {
            EndpointAddress::Ip(address) => socket(&address.ip().to_string(), address.port()),
            EndpointAddress::Dns { host, port } => socket(host, *port),
            EndpointAddress::Pipe(path) => {
                format!("{{\"pipe\":{{\"path\":{},\"mode\":0}}}}", json!(path.display().to_string()))
            }
        };
        let metadata = endpoint.details.as_ref().and_then(|details| details.metadata.as_ref()).map(|metadata| {
            format!(
                "\"metadata\":{{\"filter_metadata\":{{\"envoy.lb\":{}}},\"typed_filter_metadata\":{{}}}}",
                json!(*metadata)
            )
        });
        let parts = [
            Some(format!(
                "{{\"health_checker_type\":\"{kind}\",\"host\":{host},\"cluster_name\":{}",
                json!(self.cluster)
            )),
            early,
            Some(format!("\"timestamp\":\"{}\"", rfc3339(SystemTime::now()))),
            late,
            metadata,
            Some(format!(
                "\"locality\":{{\"region\":{},\"zone\":{},\"sub_zone\":{}}}",
                json!(locality.region),
                json!(locality.zone),
                json!(locality.sub_zone)
            )),
            last.map(str::to_owned),
        ];
        let parts: Vec<_> = parts.into_iter().flatten().collect();
        format!("{}}}", parts.join(","))
    }
}

fn name(failure: Failure) -> &'static str {
    match failure {
        Failure::Active | Failure::Retriable => "ACTIVE",
        Failure::Passive => "PASSIVE",
        Failure::Network => "NETWORK",
        Failure::Timeout => "NETWORK_TIMEOUT",
    }
}
