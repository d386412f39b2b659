//! How proxies tell discovery which requests carried a context: as a part of their load reports (LRS), for servers that name the
//! cluster [`CLUSTER`] among those that they want to hear of.
//!
//! It is a cluster that there is not, with an endpoint for each service and each address that something was counted of: its metadata has
//! `to` or `from`, its metrics are the numbers of requests since the last report.

use std::ops::{Add, AddAssign};

use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterStats, EndpointLoadMetricStats, UpstreamEndpointStats, UpstreamLocalityStats,
};
use envoy_types::pb::google::protobuf::value::Kind;
use envoy_types::pb::google::protobuf::{Duration, Struct, Value};

/// The cluster that stands for contexts in load reports.
pub const CLUSTER: &str = "culvert.override_context";

const TO: &str = "to";
const FROM: &str = "from";
const OVERRIDES: &str = "overrides";
const TRACE_ONLY: &str = "trace_only";
const NOTHING: &str = "nothing";

/// Requests, by what they carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Carried {
    /// Overrides.
    pub overrides: u64,
    /// A trace context without overrides.
    pub trace_only: u64,
    /// Neither.
    pub nothing: u64,
}

impl Carried {
    /// All of them.
    #[must_use]
    pub fn total(self) -> u64 {
        self.overrides.saturating_add(self.trace_only).saturating_add(self.nothing)
    }

    /// What was counted since `before`. Numbers that are lower than before began anew.
    #[must_use]
    pub fn since(self, before: Carried) -> Carried {
        let since = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        Carried {
            overrides: since(self.overrides, before.overrides),
            trace_only: since(self.trace_only, before.trace_only),
            nothing: since(self.nothing, before.nothing),
        }
    }
}

impl Add for Carried {
    type Output = Carried;

    fn add(self, other: Carried) -> Carried {
        Carried {
            overrides: self.overrides.saturating_add(other.overrides),
            trace_only: self.trace_only.saturating_add(other.trace_only),
            nothing: self.nothing.saturating_add(other.nothing),
        }
    }
}

impl AddAssign for Carried {
    fn add_assign(&mut self, other: Carried) {
        *self = *self + other;
    }
}

/// Whose requests were counted.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counted {
    /// Those to a cluster.
    To(String),
    /// Those from an address.
    From(String),
}

/// What a load report says of contexts since the last one.
#[must_use]
pub fn report(counted: impl IntoIterator<Item = (Counted, Carried)>, interval: Duration) -> ClusterStats {
    let endpoints = counted.into_iter().map(|(whose, carried)| {
        let (key, who) = match whose {
            Counted::To(cluster) => (TO, cluster),
            Counted::From(address) => (FROM, address),
        };
        let metric = |(name, number): (&str, u64)| EndpointLoadMetricStats {
            metric_name: name.to_owned(),
            num_requests_finished_with_metric: number,
            total_metric_value: 0.0,
        };
        let Carried { overrides, trace_only, nothing } = carried;
        let metrics = [(OVERRIDES, overrides), (TRACE_ONLY, trace_only), (NOTHING, nothing)];
        let metadata = Struct { fields: [(key.to_owned(), Value { kind: Some(Kind::StringValue(who)) })].into() };
        UpstreamEndpointStats {
            metadata: Some(metadata),
            load_metric_stats: metrics.into_iter().filter(|(_, number)| *number > 0).map(metric).collect(),
            ..UpstreamEndpointStats::default()
        }
    });
    ClusterStats {
        cluster_name: CLUSTER.to_owned(),
        upstream_locality_stats: vec![UpstreamLocalityStats {
            upstream_endpoint_stats: endpoints.collect(),
            ..UpstreamLocalityStats::default()
        }],
        load_report_interval: Some(interval),
        ..ClusterStats::default()
    }
}

/// What such a report says. What makes no sense in it is passed over.
pub fn read(report: &ClusterStats) -> impl Iterator<Item = (Counted, Carried)> {
    let endpoints = report.upstream_locality_stats.iter().flat_map(|locality| &locality.upstream_endpoint_stats);
    endpoints.filter_map(|endpoint| {
        let who = |key: &str| match &endpoint.metadata.as_ref()?.fields.get(key)?.kind {
            Some(Kind::StringValue(who)) => Some(who.clone()),
            _ => None,
        };
        let whose = who(TO).map(Counted::To).or_else(|| who(FROM).map(Counted::From))?;
        let mut carried = Carried::default();
        for metric in &endpoint.load_metric_stats {
            let number = match &*metric.metric_name {
                OVERRIDES => &mut carried.overrides,
                TRACE_ONLY => &mut carried.trace_only,
                NOTHING => &mut carried.nothing,
                _ => continue,
            };
            *number = number.saturating_add(metric.num_requests_finished_with_metric);
        }
        Some((whose, carried))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reported_is_read() {
        let counted = [
            (Counted::To("users.default:80".to_owned()), Carried { overrides: 1, trace_only: 2, nothing: 3 }),
            (Counted::From("fd00::1".to_owned()), Carried { overrides: 0, trace_only: 0, nothing: u64::MAX }),
        ];
        let mut report = report(counted.clone(), Duration::default());
        assert_eq!(read(&report).collect::<Vec<_>>(), counted);
        report.upstream_locality_stats[0].upstream_endpoint_stats.push(UpstreamEndpointStats::default());
        assert_eq!(read(&report).count(), 2, "of nobody");
    }

    #[test]
    fn numbers_that_begin_anew_count_whole() {
        let carried = |overrides, nothing| Carried { overrides, trace_only: 0, nothing };
        assert_eq!(carried(5, 2).since(carried(3, 7)), carried(2, 2));
        assert_eq!(carried(u64::MAX, 1).total(), u64::MAX);
    }
}
