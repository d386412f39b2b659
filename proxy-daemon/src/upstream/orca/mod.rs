//! What hosts report of their load (ORCA): the weights that `client_side_weighted_round_robin` makes of it, and the metrics that
//! load reports tell (`lrs_report_endpoint_metrics`).
//!
//! A worker reads a report and keeps what it comes to in a cache line of its own ([`Reports`]); or the control thread has hosts report
//! apart from responses ([`outside`]). At intervals the control thread makes
//! weights of that, and a balancer where some are others than before ([`watch`]).

pub(crate) mod outside;
mod report;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, LazyLock, OnceLock, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use arc_swap::ArcSwapOption;
use http::HeaderMap;

use self::report::LoadReport;
pub use self::report::fuzz;
use super::{Cluster, Clusters, Host};
use crate::config::model::{ClusterConfig, OrcaMetric, OrcaWeights};

/// So many metrics of a host are kept in each worker until they are told: hosts choose the names.
const MAX_METRICS: usize = 1000;

/// What the hosts of a cluster are asked to report.
#[derive(Debug)]
pub(super) struct Orca {
    weights: Option<Arc<OrcaWeights>>,
    told: Arc<[OrcaMetric]>,
    workers: usize,
}

impl Orca {
    /// `None` where nobody goes by what hosts report.
    pub(super) fn new(config: &ClusterConfig, workers: usize) -> Option<Arc<Orca>> {
        let (weights, told) = (config.lb.weights.clone(), Arc::clone(&config.reported_metrics));
        (weights.is_some() || !told.is_empty()).then(|| Arc::new(Orca { weights, told, workers }))
    }

    /// The hosts whose weights are others now, as Envoy makes them: those that have none of their own have the median of their priority.
    pub(super) fn weigh(&self, hosts: &[Arc<Host>]) -> Vec<(usize, u32)> {
        let Some(config) = &self.weights else { return Vec::new() };
        let now = Instant::now();
        let mut priorities: BTreeMap<u32, Vec<(usize, Option<u32>)>> = BTreeMap::new();
        for (number, host) in hosts.iter().enumerate() {
            let reports = host.vitals.as_ref().and_then(|vitals| vitals.reports());
            let weight = reports.and_then(|reports| reports.weight(config, now));
            priorities.entry(host.priority).or_default().push((number, weight));
        }
        let mut changes = Vec::new();
        for hosts_of in priorities.values() {
            let default = median(hosts_of.iter().filter_map(|(_, weight)| *weight).collect());
            let weights = hosts_of.iter().map(|(number, weight)| (*number, weight.unwrap_or(default).max(1)));
            changes.extend(weights.filter(|(number, weight)| hosts[*number].weight != *weight));
        }
        changes
    }

    /// Gives hosts the weights that they have now.
    pub(super) fn apply(&self, hosts: &mut [Arc<Host>]) {
        for (number, weight) in self.weigh(hosts) {
            let host = &mut hosts[number];
            *host = Arc::new(Host { weight, ..Host::clone(host) });
        }
    }
}

/// 1 where there are none.
fn median(mut weights: Vec<u32>) -> u32 {
    if weights.is_empty() {
        return 1;
    }
    let (middle, even) = (weights.len() / 2, weights.len().is_multiple_of(2));
    let (below, upper, _) = weights.select_nth_unstable(middle);
    match below.iter().max() {
        Some(lower) if even => lower.midpoint(*upper),
        _ => *upper,
    }
}

/// Before any host reported.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Nanoseconds since [`EPOCH`], and one.
fn stamp(now: Instant) -> u64 {
    now.saturating_duration_since(*EPOCH).as_nanos() as u64 + 1
}

/// What a host has reported, shared by all its versions in one version of its cluster. It takes memory from the first report on.
#[derive(Debug)]
pub(super) struct Reports {
    orca: Arc<Orca>,
    lines: OnceLock<Box<[Line]>>,
}

/// What a host has reported to one worker, or apart from responses; whoever it is alone writes it, but for [`first`](Self::first).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Line {
    /// Of the last report that made one.
    weight: AtomicU32,
    /// When the first one came: a [`stamp`]; 0: none. The control thread begins anew where the last one is too old.
    first: AtomicU64,
    /// When the last one came.
    last: AtomicU64,
    /// What is to be told. Whoever takes it leaves nothing; the worker puts back what it has added to.
    told: ArcSwapOption<Told>,
}

/// How many reports had a metric, and the sum of its values; by its name.
type Told = HashMap<Box<str>, (u64, f64)>;

impl Reports {
    pub(super) fn new(orca: &Arc<Orca>) -> Reports {
        Reports { orca: Arc::clone(orca), lines: OnceLock::new() }
    }

    /// A response has these headers or trailers. Returns whether they report anything. `worker` must be the calling worker.
    pub(super) fn heard(&self, worker: usize, headers: &HeaderMap) -> bool {
        let Some(report) = LoadReport::of(headers) else { return false };
        let line = self.line(worker);
        if let Some(weight) = self.orca.weights.as_ref().and_then(|config| weight(&report, config)) {
            line.weigh(weight);
        }
        if !self.orca.told.is_empty() {
            line.add(&self.orca.told, &report);
        }
        true
    }

    /// The host has reported this apart from responses. Returns whether it makes a weight. Of the control thread.
    fn told_outside(&self, report: &LoadReport) -> bool {
        let weight = self.orca.weights.as_ref().and_then(|config| weight(report, config));
        weight.inspect(|weight| self.line(self.orca.workers).weigh(*weight)).is_some()
    }

    /// What a worker writes; that of the control thread comes after those of all workers.
    fn line(&self, number: usize) -> &Line {
        &self.lines.get_or_init(|| (0..=self.orca.workers).map(|_| Line::default()).collect())[number]
    }

    /// The weight that the host has now; `None` where it has not reported for long enough, or not of late.
    fn weight(&self, config: &OrcaWeights, now: Instant) -> Option<u32> {
        let lines = self.lines.get()?;
        let ago = |past: u64| Duration::from_nanos(stamp(now).saturating_sub(past));
        let first = lines.iter().map(|line| line.first.load(Relaxed)).filter(|first| *first != 0).min()?;
        if ago(first) < config.blackout_period {
            return None;
        }
        let latest = lines.iter().max_by_key(|line| line.last.load(Relaxed))?;
        if ago(latest.last.load(Relaxed)) > config.expiration_period {
            lines.iter().for_each(|line| line.first.store(0, Relaxed));
            return None;
        }
        Some(latest.weight.load(Relaxed))
    }

    /// What is to be told since the last call, by name: how many reports had the metric, and the sum of its values.
    pub(super) fn latch(&self) -> BTreeMap<String, (u64, f64)> {
        let mut sums = BTreeMap::<String, (u64, f64)>::new();
        for line in self.lines.get().map(|lines| &**lines).unwrap_or_default() {
            let Some(told) = line.told.swap(None) else { continue };
            for (name, (count, sum)) in &*told {
                let (counts, values) = sums.entry(name.to_string()).or_default();
                *counts += count;
                *values += sum;
            }
        }
        sums
    }
}

impl Line {
    fn weigh(&self, weight: u32) {
        let now = stamp(Instant::now());
        self.weight.store(weight, Relaxed);
        self.last.store(now, Relaxed);
        if self.first.load(Relaxed) == 0 {
            self.first.store(now, Relaxed);
        }
    }

    fn add(&self, metrics: &[OrcaMetric], report: &LoadReport) {
        let mut told = self.told.swap(None).unwrap_or_default();
        // Nobody else has it: whoever takes it out of its place has it alone.
        if let Some(told) = Arc::get_mut(&mut told) {
            let mut buffer = String::new();
            report.each(metrics, |(map, key), value| {
                let name = if map.is_empty() {
                    key
                } else {
                    buffer.clear();
                    buffer.extend([map, ".", key]);
                    &buffer
                };
                if let Some((count, sum)) = told.get_mut(name) {
                    *count += 1;
                    *sum += value;
                } else if told.len() < MAX_METRICS {
                    told.insert(name.into(), (1, value));
                }
            });
        }
        self.told.store(Some(told));
    }
}

/// What a report makes of a host's weight, as in Envoy: the requests that it would have at full load. `None`: nothing.
fn weight(report: &LoadReport, config: &OrcaWeights) -> Option<u32> {
    let positive = |value: f64| (value > 0.0).then_some(value);
    let requests = positive(report.rps_fractional)?;
    let mut greatest = 0.0;
    report.each(&config.metrics, |_, value| greatest = f64::max(greatest, value));
    let utilization = positive(greatest).or(positive(report.application_utilization));
    let utilization = utilization.unwrap_or(report.cpu_utilization) + config.error_penalty * report.eps / requests;
    // What is too great is the greatest.
    positive(utilization).map(|utilization| (requests / utilization) as u32)
}

/// Weighs a cluster's hosts at intervals until the cluster is gone or replaced. Ends at once where they are not weighted so.
pub(crate) async fn watch(clusters: Weak<Clusters>, cluster: Weak<Cluster>) {
    let Some(period) = cluster.upgrade().and_then(|it| Some(it.config.lb.weights.as_ref()?.update_period)) else {
        return;
    };
    loop {
        tokio::time::sleep(period).await;
        let (Some(clusters), Some(cluster)) = (clusters.upgrade(), cluster.upgrade()) else { return };
        if !clusters.reweigh(&cluster) {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
