//! Lines of `cluster_manager.outlier_detection.event_log_path`: `envoy.data.cluster.v3.OutlierDetectionEvent` as Envoy prints it.

use std::{
    fmt::{self, Display, Formatter},
    time::SystemTime,
};

use serde_json::json;

use crate::{access_log::rfc3339, config::model::Ejection};

/// What is done with a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Eject {
        enforced: bool,
    },
    Uneject,
    /// It is used last: an ejection of a type of its own in Envoy's messages.
    Degrade,
}

/// One event.
pub(super) struct Line<'a> {
    pub(super) kind: Ejection,
    pub(super) at: SystemTime,
    /// Whole seconds since what was done with it before.
    pub(super) since_last: Option<u64>,
    pub(super) cluster: &'a str,
    pub(super) host: &'a str,
    pub(super) action: Action,
    /// How often it has been ejected, this time included.
    pub(super) ejections: u32,
    /// In percent.
    pub(super) rate: f64,
    /// Of all hosts that had enough requests, and what is too far from that.
    pub(super) averages: (f64, f64),
}

impl Display for Line<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Ejection::Consecutive5xx => "CONSECUTIVE_5XX",
            Ejection::ConsecutiveGatewayFailure => "CONSECUTIVE_GATEWAY_FAILURE",
            Ejection::ConsecutiveLocalOriginFailure => "CONSECUTIVE_LOCAL_ORIGIN_FAILURE",
            Ejection::SuccessRate => "SUCCESS_RATE",
            Ejection::SuccessRateLocalOrigin => "SUCCESS_RATE_LOCAL_ORIGIN",
            Ejection::FailurePercentage => "FAILURE_PERCENTAGE",
            Ejection::FailurePercentageLocalOrigin => "FAILURE_PERCENTAGE_LOCAL_ORIGIN",
        };
        let kind = if self.action == Action::Degrade { "DEGRADED" } else { kind };
        write!(f, "{{\"type\":\"{kind}\",\"timestamp\":\"{}\"", rfc3339(self.at))?;
        if let Some(seconds) = self.since_last {
            write!(f, ",\"secs_since_last_action\":\"{seconds}\"")?;
        }
        let (action, enforced) = match self.action {
            Action::Eject { enforced } => ("EJECT", enforced),
            Action::Uneject => ("UNEJECT", false),
            Action::Degrade => ("EJECT", true),
        };
        write!(
            f,
            ",\"cluster_name\":{},\"upstream_url\":{},\"action\":\"{action}\",\"num_ejections\":{},\"enforced\":{enforced}",
            json!(self.cluster),
            json!(self.host),
            self.ejections
        )?;
        // Whole percents, as the message has them.
        let whole = |rate: f64| rate as u32;
        match self.kind {
            _ if self.action == Action::Uneject => {}
            Ejection::SuccessRate | Ejection::SuccessRateLocalOrigin => {
                let (average, threshold) = self.averages;
                write!(
                    f,
                    ",\"eject_success_rate_event\":{{\"host_success_rate\":{},\"cluster_average_success_rate\":{},\
                     \"cluster_success_rate_ejection_threshold\":{}}}",
                    whole(self.rate),
                    whole(average),
                    whole(threshold)
                )?;
            }
            Ejection::FailurePercentage | Ejection::FailurePercentageLocalOrigin => {
                write!(f, ",\"eject_failure_percentage_event\":{{\"host_success_rate\":{}}}", whole(self.rate))?;
            }
            Ejection::Consecutive5xx
            | Ejection::ConsecutiveGatewayFailure
            | Ejection::ConsecutiveLocalOriginFailure => f.write_str(",\"eject_consecutive_event\":{}")?,
        }
        f.write_str("}")
    }
}
