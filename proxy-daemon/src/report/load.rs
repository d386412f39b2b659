//! What a load report says: the protocol of the load reporting service, without I/O.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{
                Address, Locality as ProtoLocality, Pipe, SocketAddress, address, socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterStats, EndpointLoadMetricStats, UpstreamEndpointStats, UpstreamLocalityStats,
                cluster_stats::DroppedRequests,
            },
        },
        service::load_stats::v3::LoadStatsResponse,
    },
    google::protobuf::Duration as ProtoDuration,
};

use culvert_xds_client::overrides::contexts;

use super::contexts::ContextReporter;
use crate::{
    config::model::{Discovery, EndpointAddress, Locality},
    upstream::{Cluster, ClusterMap, Host, HostCounter, HostCounters},
};

/// The shortest time between two reports: Envoy has none, and spins where a server asks for 0.
const MIN_INTERVAL: Duration = Duration::from_millis(10);
/// The longest, so that clocks do not overflow.
const MAX_INTERVAL: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// What the server wants to know, and since when each cluster is counted. Outlives streams: what is counted while there is
/// none is told by the first message of the next one.
#[derive(Debug, Default)]
pub struct LoadReporter {
    wanted: Option<Wanted>,
    /// The clusters that the next report is about, with the time of their last one.
    since: BTreeMap<Arc<str>, Instant>,
    contexts: ContextReporter,
}

#[derive(Debug)]
struct Wanted {
    /// `None`: all.
    clusters: Option<Vec<Arc<str>>>,
    interval: Duration,
    endpoints: bool,
    /// Who carries contexts of overrides.
    contexts: bool,
}

impl LoadReporter {
    /// Takes the server's wishes. Clusters that were reported on before go on as they are; others count from now.
    pub fn answered(&mut self, answer: LoadStatsResponse, clusters: &ClusterMap, now: Instant) {
        let interval = answer.load_reporting_interval.as_ref().map(std_duration);
        let names = answer.clusters.iter().map(|name| Arc::from(name.as_str()));
        self.wanted = Some(Wanted {
            clusters: (!answer.send_all_clusters).then(|| names.collect()),
            interval: interval.unwrap_or_default().clamp(MIN_INTERVAL, MAX_INTERVAL),
            endpoints: answer.report_endpoint_granularity,
            // Beside all clusters too: it is none of them.
            contexts: answer.clusters.iter().any(|name| name == contexts::CLUSTER),
        });
        self.begin(clusters, now);
    }

    /// Time between reports; `None` until the server has said what it wants.
    pub fn interval(&self) -> Option<Duration> {
        self.wanted.as_ref().map(|wanted| wanted.interval)
    }

    /// What happened since the last report. Clusters that came since then are counted from here on.
    pub fn report(&mut self, clusters: &ClusterMap, now: Instant) -> Vec<ClusterStats> {
        let endpoints = self.wanted.as_ref().is_some_and(|wanted| wanted.endpoints);
        let mut reports = Vec::with_capacity(self.since.len());
        for (name, since) in &mut self.since {
            let Some(cluster) = clusters.get(name) else { continue };
            let mut stats = report_cluster(cluster, endpoints);
            stats.load_report_interval = Some(microseconds(now.saturating_duration_since(*since)));
            *since = now;
            reports.push(stats);
        }
        self.begin(clusters, now);
        if self.wanted.as_ref().is_some_and(|wanted| wanted.contexts) {
            reports.extend(self.contexts.report(now));
        }
        reports
    }

    /// Adopts the clusters that are wanted and exist.
    fn begin(&mut self, clusters: &ClusterMap, now: Instant) {
        let Some(wanted) = &self.wanted else { return };
        let before = std::mem::take(&mut self.since);
        let mut adopt = |name: &Arc<str>| {
            let since = before.get(name).copied().unwrap_or_else(|| {
                if let Some(cluster) = clusters.get(name) {
                    // Begins at zero.
                    report_cluster(cluster, false);
                }
                now
            });
            self.since.insert(Arc::clone(name), since);
        };
        match &wanted.clusters {
            None => clusters.keys().for_each(&mut adopt),
            Some(names) => names.iter().for_each(&mut adopt),
        }
    }
}

/// What hosts report, by name: in how many responses, and the sum of its values.
type Metrics = BTreeMap<String, (u64, f64)>;

/// Requests of one host or of many.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Load {
    issued: u64,
    successful: u64,
    errors: u64,
    in_progress: u64,
}

impl Load {
    fn latch(counters: &HostCounters) -> Load {
        Load {
            issued: counters.latch(HostCounter::RqTotal),
            successful: counters.latch(HostCounter::RqSuccess),
            errors: counters.latch(HostCounter::RqError),
            // The workers' shares are read one after the other: a request that ends meanwhile may seem to be -1.
            in_progress: u64::try_from(counters.sum(HostCounter::RqActive).cast_signed()).unwrap_or(0),
        }
    }

    fn add(&mut self, other: Load) {
        self.issued += other.issued;
        self.successful += other.successful;
        self.errors += other.errors;
        self.in_progress += other.in_progress;
    }
}

/// All but the interval.
fn report_cluster(cluster: &Cluster, endpoints: bool) -> ClusterStats {
    let service = match &cluster.config.discovery {
        Discovery::Eds { endpoints } if endpoints.name != cluster.config.name => endpoints.name.to_string(),
        _ => String::new(),
    };
    let (hosts, named) = (cluster.hosts(), cluster.named.all());
    let mut localities: BTreeMap<(u32, &Locality), (Load, Metrics, Vec<UpstreamEndpointStats>)> = BTreeMap::new();
    for host in hosts.hosts.iter().chain(&named) {
        let load = Load::latch(&host.counters);
        if load == Load::default() {
            continue;
        }
        let metrics = host.reported_metrics();
        let (total, sums, each) = localities.entry((host.priority, &host.locality)).or_default();
        total.add(load);
        for (name, (count, value)) in &metrics {
            let sum = sums.entry(name.clone()).or_default();
            *sum = (sum.0 + count, sum.1 + value);
        }
        if endpoints {
            each.push(endpoint_stats(host, load, metrics));
        }
    }
    let mut stats: Vec<_> = localities
        .into_iter()
        .map(|((priority, locality), (load, sums, each))| UpstreamLocalityStats {
            load_metric_stats: metric_stats(sums),
            ..locality_stats(priority, locality, load, each)
        })
        .collect();
    if let Some(counters) = &cluster.unlisted {
        let load = Load::latch(counters);
        if load != Load::default() {
            stats.push(locality_stats(0, &Locality::default(), load, Vec::new()));
        }
    }
    let overload = cluster.dropped_overload.latch();
    let dropped =
        (overload > 0).then(|| DroppedRequests { category: hosts.drop_category().to_owned(), dropped_count: overload });
    ClusterStats {
        cluster_name: cluster.config.name.to_string(),
        cluster_service_name: service,
        upstream_locality_stats: stats,
        total_dropped_requests: cluster.dropped.latch(),
        dropped_requests: dropped.into_iter().collect(),
        ..ClusterStats::default()
    }
}

fn locality_stats(
    priority: u32,
    locality: &Locality,
    load: Load,
    endpoints: Vec<UpstreamEndpointStats>,
) -> UpstreamLocalityStats {
    let Locality { region, zone, sub_zone } = locality.clone();
    UpstreamLocalityStats {
        locality: Some(ProtoLocality { region, zone, sub_zone }),
        priority,
        total_issued_requests: load.issued,
        total_successful_requests: load.successful,
        total_error_requests: load.errors,
        total_requests_in_progress: load.in_progress,
        upstream_endpoint_stats: endpoints,
        ..UpstreamLocalityStats::default()
    }
}

fn metric_stats(metrics: Metrics) -> Vec<EndpointLoadMetricStats> {
    let stats = metrics.into_iter().map(|(metric_name, (count, total_metric_value))| EndpointLoadMetricStats {
        metric_name,
        num_requests_finished_with_metric: count,
        total_metric_value,
    });
    stats.collect()
}

fn endpoint_stats(host: &Host, load: Load, metrics: Metrics) -> UpstreamEndpointStats {
    UpstreamEndpointStats {
        load_metric_stats: metric_stats(metrics),
        address: Some(proto_address(&host.address)),
        total_issued_requests: load.issued,
        total_successful_requests: load.successful,
        total_error_requests: load.errors,
        total_requests_in_progress: load.in_progress,
        ..UpstreamEndpointStats::default()
    }
}

/// An endpoint's address, as control planes write it.
pub(super) fn proto_address(address: &EndpointAddress) -> Address {
    let socket = |host: String, port: u16| {
        address::Address::SocketAddress(SocketAddress {
            address: host,
            port_specifier: Some(PortSpecifier::PortValue(u32::from(port))),
            ..SocketAddress::default()
        })
    };
    let address = match address {
        EndpointAddress::Ip(address) => socket(address.ip().to_string(), address.port()),
        EndpointAddress::Dns { host, port } => socket(host.to_string(), *port),
        EndpointAddress::Pipe(path) => {
            address::Address::Pipe(Pipe { path: path.display().to_string(), ..Pipe::default() })
        }
    };
    Address { address: Some(address) }
}

/// 0 where it is negative.
fn std_duration(duration: &ProtoDuration) -> Duration {
    let seconds = u64::try_from(duration.seconds).unwrap_or(0);
    Duration::new(seconds, u32::try_from(duration.nanos).unwrap_or(0).min(999_999_999))
}

/// In whole microseconds, as Envoy has it.
pub(super) fn microseconds(duration: Duration) -> ProtoDuration {
    ProtoDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: duration.subsec_micros().cast_signed() * 1000,
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
