use std::time::Duration;

use envoy_types::pb::{
    envoy::config::cluster::v3::OutlierDetection as Proto,
    google::protobuf::{BoolValue, Duration as ProtoDuration, UInt32Value},
};

use super::{
    common::{Result, duration},
    support::join,
};
use crate::{
    config::{FieldError, model::OutlierDetection},
    layered_runtime::{Key, RuntimeInteger},
};

/// What `outlier_detection` says; `path` is its own. Its fields have been checked against what is honoured.
pub(super) fn outlier_detection(config: &Proto, path: &str) -> Result<OutlierDetection> {
    let key = |name: &str| Some(Key::new(&format!("outlier_detection.{name}")));
    let number = |value: Option<UInt32Value>, name: &str, default: u32| RuntimeInteger {
        default: value.map_or(default, |value| value.value).into(),
        key: key(name),
    };
    let time = |value: Option<ProtoDuration>, name: &str, default: Duration| -> Result<RuntimeInteger> {
        let default = duration(value, path, name)?.unwrap_or(default).as_millis();
        let default = u64::try_from(default).unwrap_or(u64::MAX);
        Ok(RuntimeInteger { default, key: key(&format!("{name}_ms")) })
    };
    let on = |value: Option<BoolValue>, default| value.map_or(default, |value| value.value);
    let base = time(config.base_ejection_time, "base_ejection_time", Duration::from_secs(30))?;
    let longest = Duration::from_secs(300).max(Duration::from_millis(base.default));
    let max = time(config.max_ejection_time, "max_ejection_time", longest)?;
    if max.default < base.default {
        let text = "outlier detector's max_ejection_time cannot be smaller than base_ejection_time";
        return Err(FieldError::new(join(path, "max_ejection_time"), text));
    }
    Ok(OutlierDetection {
        interval: time(config.interval, "interval", Duration::from_secs(10))?,
        base_ejection_time: base,
        max_ejection_time: max,
        max_ejection_time_jitter: time(config.max_ejection_time_jitter, "max_ejection_time_jitter", Duration::ZERO)?,
        max_ejection_percent: number(config.max_ejection_percent, "max_ejection_percent", 10),
        detects_degraded: on(config.detect_degraded_hosts, false),
        always_eject_one_host: on(config.always_eject_one_host, false),
        split_external_local_origin_errors: config.split_external_local_origin_errors,
        consecutive: [
            number(config.consecutive_5xx, "consecutive_5xx", 5),
            number(config.consecutive_gateway_failure, "consecutive_gateway_failure", 5),
            number(config.consecutive_local_origin_failure, "consecutive_local_origin_failure", 5),
        ],
        // In the order of `Ejection`.
        enforcing: [
            number(config.enforcing_consecutive_5xx, "enforcing_consecutive_5xx", 100),
            number(config.enforcing_consecutive_gateway_failure, "enforcing_consecutive_gateway_failure", 0),
            number(
                config.enforcing_consecutive_local_origin_failure,
                "enforcing_consecutive_local_origin_failure",
                100,
            ),
            number(config.enforcing_success_rate, "enforcing_success_rate", 100),
            number(config.enforcing_local_origin_success_rate, "enforcing_local_origin_success_rate", 100),
            number(config.enforcing_failure_percentage, "enforcing_failure_percentage", 0),
            number(config.enforcing_failure_percentage_local_origin, "enforcing_failure_percentage_local_origin", 0),
        ],
        success_rate_minimum_hosts: number(config.success_rate_minimum_hosts, "success_rate_minimum_hosts", 5),
        success_rate_request_volume: number(config.success_rate_request_volume, "success_rate_request_volume", 100),
        success_rate_stdev_factor: number(config.success_rate_stdev_factor, "success_rate_stdev_factor", 1900),
        failure_percentage_threshold: number(config.failure_percentage_threshold, "failure_percentage_threshold", 85),
        failure_percentage_minimum_hosts: number(
            config.failure_percentage_minimum_hosts,
            "failure_percentage_minimum_hosts",
            5,
        ),
        failure_percentage_request_volume: number(
            config.failure_percentage_request_volume,
            "failure_percentage_request_volume",
            50,
        ),
        successful_active_health_check_uneject_host: on(config.successful_active_health_check_uneject_host, true),
    })
}
