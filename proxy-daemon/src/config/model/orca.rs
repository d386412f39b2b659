use std::{sync::Arc, time::Duration};

use http::uri::Authority;

use super::LbMetadata;

/// A metric of hosts' load reports (`xds.data.orca.v3.OrcaLoadReport`), as configuration names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OrcaMetric {
    /// A field, by the name that is told.
    Field(OrcaField, Box<str>),
    /// An entry of a map: the map, the key, and the name that is told.
    Entry(OrcaMap, Box<str>, Box<str>),
    /// All entries of a map.
    All(OrcaMap),
}

/// A field of a load report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrcaField {
    /// `cpu_utilization`
    Cpu,
    /// `mem_utilization`
    Memory,
    /// `application_utilization`
    Application,
    /// `eps`
    Errors,
    /// `rps_fractional`
    Requests,
}

/// A map of a load report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrcaMap {
    /// `named_metrics`
    Named,
    /// `request_cost`
    Cost,
    /// `utilization`
    Utilization,
}

impl OrcaField {
    /// By its name in a report.
    pub fn named(name: &str) -> Option<OrcaField> {
        Some(match name {
            "cpu_utilization" => OrcaField::Cpu,
            "mem_utilization" => OrcaField::Memory,
            "application_utilization" => OrcaField::Application,
            "eps" => OrcaField::Errors,
            "rps_fractional" => OrcaField::Requests,
            _ => return None,
        })
    }
}

impl OrcaMap {
    /// By its name in a report.
    pub fn named(name: &str) -> Option<OrcaMap> {
        Some(match name {
            "named_metrics" => OrcaMap::Named,
            "request_cost" => OrcaMap::Cost,
            "utilization" => OrcaMap::Utilization,
            _ => return None,
        })
    }

    /// Its name in a report.
    pub fn name(self) -> &'static str {
        match self {
            OrcaMap::Named => "named_metrics",
            OrcaMap::Cost => "request_cost",
            OrcaMap::Utilization => "utilization",
        }
    }
}

impl OrcaMetric {
    /// What a name stands for; `None`: nothing that a report has.
    pub fn named(name: &str) -> Option<OrcaMetric> {
        if let Some(field) = OrcaField::named(name) {
            return Some(OrcaMetric::Field(field, name.into()));
        }
        let (map, key) = name.split_once('.')?;
        let map = OrcaMap::named(map)?;
        Some(if key == "*" { OrcaMetric::All(map) } else { OrcaMetric::Entry(map, key.into(), name.into()) })
    }
}

/// `ClientSideWeightedRoundRobin`: hosts are weighted by the load that they report.
#[derive(Debug, Clone, PartialEq)]
pub struct OrcaWeights {
    /// `metric_names_for_computing_utilization`: the greatest of them is a host's utilization, where it is more than 0.
    pub metrics: Box<[OrcaMetric]>,
    /// So much of the share of errors is added to it. Default 0, as in Envoy (its documentation says 1).
    pub error_penalty: f64,
    /// A host's reports count when it has reported for so long. Default 10 s.
    pub blackout_period: Duration,
    /// They count no longer when the last one is so old. Default 3 min.
    pub expiration_period: Duration,
    /// Weights are made anew so often. At least 100 ms. Default 1 s.
    pub update_period: Duration,
    /// `enable_oob_load_report`: hosts report on a stream too, and not only with their responses.
    pub stream: Option<Arc<OrcaStream>>,
}

/// The stream on which hosts report: `oob_reporting_period` and `oob_reporting_config`.
#[derive(Debug, Clone, PartialEq)]
pub struct OrcaStream {
    /// They shall report so often. Default 10 s.
    pub period: Duration,
    /// The port of that; `None`: that of the host.
    pub port: Option<u16>,
    /// What hosts are called there; `None`: by their names, or their addresses.
    pub authority: Option<Authority>,
    /// What chooses the transport socket instead of what hosts say of themselves.
    pub socket_labels: Option<LbMetadata>,
}
