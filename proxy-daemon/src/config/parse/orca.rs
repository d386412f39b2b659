//! What hosts report of their load (ORCA), and who goes by that.

use std::{sync::Arc, time::Duration};

use envoy_types::pb::envoy::{
    config::cluster::v3::Cluster,
    extensions::load_balancing_policies::client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
};

use super::{
    common::{Result, duration, port},
    support::join,
};
use crate::{
    config::{
        FieldError,
        model::{Discovery, OrcaMetric, OrcaStream, OrcaWeights},
    },
    http::metadata::object,
};

/// Weights are not made anew more often than this.
const MIN_UPDATE_PERIOD: Duration = Duration::from_millis(100);

/// What `ClientSideWeightedRoundRobin` says; `path` is its own. Its fields have been checked against what is honoured.
pub(super) fn weights(config: &ClientSideWeightedRoundRobin, path: &str) -> Result<OrcaWeights> {
    let has_stream = config.enable_oob_load_report.is_some_and(|enabled| enabled.value);
    let period = |value, field, default| -> Result<Duration> { Ok(duration(value, path, field)?.unwrap_or(default)) };
    let update_period = period(config.weight_update_period, "weight_update_period", Duration::from_secs(1))?;
    Ok(OrcaWeights {
        metrics: metrics(&config.metric_names_for_computing_utilization),
        error_penalty: config.error_utilization_penalty.map_or(0.0, |penalty| penalty.value.into()),
        blackout_period: period(config.blackout_period, "blackout_period", Duration::from_secs(10))?,
        expiration_period: period(
            config.weight_expiration_period,
            "weight_expiration_period",
            Duration::from_secs(180),
        )?,
        update_period: update_period.max(MIN_UPDATE_PERIOD),
        stream: has_stream.then(|| stream(config, path).map(Arc::new)).transpose()?,
    })
}

/// How hosts report apart from responses.
fn stream(config: &ClientSideWeightedRoundRobin, path: &str) -> Result<OrcaStream> {
    let period = duration(config.oob_reporting_period, path, "oob_reporting_period")?;
    let path = join(path, "oob_reporting_config");
    let options = config.oob_reporting_config.clone().unwrap_or_default();
    let authority = match options.authority.as_str() {
        "" => None,
        name => Some(
            name.parse()
                .map_err(|_| FieldError::new(join(&path, "authority"), format!("{name:?} is not an authority")))?,
        ),
    };
    let wanted = options.port_value;
    Ok(OrcaStream {
        period: period.filter(|period| !period.is_zero()).unwrap_or(Duration::from_secs(10)),
        port: (wanted > 0).then(|| port(wanted, &path, "port_value")).transpose()?,
        authority,
        socket_labels: options.transport_socket_match_criteria.as_ref().map(object),
    })
}

/// `lrs_report_endpoint_metrics`
pub(super) fn reported(cluster: &Cluster, discovery: &Discovery, path: &str) -> Result<Arc<[OrcaMetric]>> {
    let names = &cluster.lrs_report_endpoint_metrics;
    if !names.is_empty() && matches!(discovery, Discovery::DynamicForwardProxy { .. }) {
        // Its hosts are not among those that are told of one by one.
        return Err(FieldError::unsupported(join(path, "lrs_report_endpoint_metrics")));
    }
    Ok(metrics(names).into())
}

/// Names that no report has are passed over, as in Envoy.
fn metrics(names: &[String]) -> Box<[OrcaMetric]> {
    names.iter().filter_map(|name| OrcaMetric::named(name)).collect()
}
