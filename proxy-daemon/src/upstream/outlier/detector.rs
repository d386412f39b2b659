//! Which hosts are ejected and when they come back: Envoy's arithmetic, without I/O and without a clock.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use super::{
    event_log::{Action, Line},
    monitor::{Monitor, Shared, Sum},
    stats::OutlierStats,
};
use crate::{
    access_log::EventLog,
    config::model::{Ejection, OutlierDetection},
    upstream::{
        Host,
        vitals::{HealthFlag, Vitals},
    },
};

/// Of one cluster: what is known of its hosts.
pub(super) struct Detector {
    cluster: Arc<str>,
    shared: Arc<Shared>,
    stats: OutlierStats,
    log: Option<EventLog>,
    /// In the order of the configuration.
    hosts: Vec<Watched>,
    /// Their places, by the addresses of their vitals, which `hosts` keeps alive.
    places: HashMap<usize, usize>,
    ejected: u64,
    /// The average and the threshold of the last interval: of requests, and of connections.
    averages: [Option<(f64, f64)>; 2],
}

/// A host, and what becomes of it.
struct Watched {
    host: Arc<Host>,
    vitals: Arc<Vitals>,
    /// What had been counted at the end of the last interval, and in it.
    before: [Sum; 2],
    interval: [Sum; 2],
    ejections: u32,
    ejected_at: Option<Instant>,
    back_at: Option<Instant>,
    /// How many times the base time it is ejected for.
    backoff: u64,
    jitter: u64,
    degraded: Degraded,
}

/// What becomes of a host that wants to be used last.
#[derive(Debug, Default)]
struct Degraded {
    since: Option<Instant>,
    back_at: Option<Instant>,
    /// How many times the base time it is used last for.
    backoff: u64,
}

impl Watched {
    fn is_ejected(&self) -> bool {
        self.vitals.has(HealthFlag::FailedOutlierCheck)
    }

    fn monitor(&self) -> Option<&Monitor> {
        self.vitals.monitor()
    }
}

impl Detector {
    pub(super) fn new(cluster: Arc<str>, shared: Arc<Shared>, stats: OutlierStats, log: Option<EventLog>) -> Detector {
        let (hosts, places) = (Vec::new(), HashMap::new());
        Detector { cluster, shared, stats, log, hosts, places, ejected: 0, averages: [None; 2] }
    }

    fn config(&self) -> &OutlierDetection {
        &self.shared.config
    }

    /// The cluster has these hosts.
    pub(super) fn set_hosts(&mut self, hosts: &[Arc<Host>]) {
        let mut before: HashMap<_, _> = self.hosts.drain(..).map(|watched| (key(&watched.vitals), watched)).collect();
        let watched = hosts.iter().filter_map(|host| {
            let vitals = Arc::clone(host.vitals.as_ref().filter(|vitals| vitals.monitor().is_some())?);
            let host = Arc::clone(host);
            Some(match before.remove(&key(&vitals)) {
                Some(known) => Watched { host, ..known },
                None => Watched {
                    host,
                    vitals,
                    before: Default::default(),
                    interval: Default::default(),
                    ejections: 0,
                    ejected_at: None,
                    back_at: None,
                    backoff: 0,
                    jitter: 0,
                    degraded: Degraded::default(),
                },
            })
        });
        self.hosts = watched.collect();
        let places = self.hosts.iter().enumerate().map(|(at, watched)| (key(&watched.vitals), at));
        self.places = places.collect();
        for _ in before.values().filter(|gone| gone.is_ejected()) {
            self.ejected -= 1;
            self.stats.ejections_active.dec();
        }
    }

    /// So many have failed in a row. Returns whether hosts have to be chosen anew.
    pub(super) fn consecutive(&mut self, vitals: &Arc<Vitals>, kind: Ejection, now: Instant) -> bool {
        let Some(monitor) = vitals.monitor() else { return false };
        monitor.taken_up(kind);
        let Some(at) = self.places.get(&key(vitals)).copied() else { return false };
        if self.hosts[at].is_ejected() {
            return false;
        }
        self.stats.detected(kind).inc();
        let changed = self.eject(at, kind, now);
        if kind == Ejection::Consecutive5xx {
            self.stats.ejections_consecutive_5xx.inc();
        }
        monitor.reset(kind);
        changed
    }

    /// The host wants to be used last. Returns whether hosts have to be chosen anew.
    pub(super) fn degraded(&mut self, vitals: &Arc<Vitals>, now: Instant) -> bool {
        let Some(monitor) = vitals.monitor() else { return false };
        monitor.degraded_taken_up();
        let Some(at) = self.places.get(&key(vitals)).copied() else { return false };
        if !vitals.set(HealthFlag::DegradedOutlier, true) {
            return false;
        }
        self.stats.ejections_detected_degradation.inc();
        let (base, max) = (self.config().base_ejection_time.get(), self.config().max_ejection_time.get());
        let degraded = &mut self.hosts[at].degraded;
        degraded.since = Some(now);
        if degraded.backoff.saturating_mul(base) < max.saturating_add(base) {
            degraded.backoff += 1;
        }
        self.log(at, Ejection::Consecutive5xx, Action::Degrade, None, now);
        true
    }

    /// What has been used last for long enough is used as the others are. Returns whether it is.
    fn end_degradation_in_time(&mut self, at: usize, now: Instant) -> bool {
        let config = Arc::clone(&self.shared.config);
        let watched = &mut self.hosts[at];
        let degraded = &mut watched.degraded;
        if !watched.vitals.has(HealthFlag::DegradedOutlier) {
            let interval = Duration::from_millis(config.interval.get());
            if degraded.back_at.is_some_and(|back| now.saturating_duration_since(back) >= interval) {
                degraded.backoff = degraded.backoff.saturating_sub(1);
            }
            return false;
        }
        let time = config.base_ejection_time.get().saturating_mul(degraded.backoff).min(config.max_ejection_time.get());
        let over =
            degraded.since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_millis(time));
        if over {
            degraded.back_at = Some(now);
            watched.vitals.set(HealthFlag::DegradedOutlier, false);
            let last = watched.ejected_at;
            self.log(at, Ejection::Consecutive5xx, Action::Uneject, last, now);
        }
        over
    }

    /// The host has passed an active check. Returns whether hosts have to be chosen anew.
    pub(super) fn passed_check(&mut self, vitals: &Arc<Vitals>, now: Instant) -> bool {
        if !self.config().successful_active_health_check_uneject_host || vitals.has(HealthFlag::FailedActiveHc) {
            return false;
        }
        match self.places.get(&key(vitals)).copied() {
            Some(at) if self.hosts[at].is_ejected() => {
                self.take_back(at, now);
                true
            }
            _ => false,
        }
    }

    /// An interval is over. Returns whether hosts have to be chosen anew.
    pub(super) fn interval(&mut self, now: Instant) -> bool {
        let mut changed = false;
        for at in 0..self.hosts.len() {
            changed |= self.take_back_in_time(at, now);
            changed |= self.end_degradation_in_time(at, now);
            let watched = &mut self.hosts[at];
            let Some(monitor) = watched.vitals.monitor() else { continue };
            let sums = monitor.sums();
            for (kind, sum) in sums.iter().enumerate() {
                let before = watched.before[kind];
                watched.interval[kind] =
                    Sum { total: sum.total - before.total, succeeded: sum.succeeded - before.succeeded };
                monitor.set_success_rate(kind == 1, -1.0);
            }
            watched.before = sums;
        }
        changed |= self.judge_rates(false, now);
        changed |= self.judge_rates(true, now);
        let interval = Duration::from_millis(self.config().interval.get());
        for watched in self.hosts.iter_mut().filter(|watched| !watched.is_ejected()) {
            if watched.back_at.is_some_and(|back| now.saturating_duration_since(back) >= interval) {
                watched.backoff = watched.backoff.saturating_sub(1);
            }
        }
        changed
    }

    fn take_back_in_time(&mut self, at: usize, now: Instant) -> bool {
        let watched = &self.hosts[at];
        let Some(since) = watched.ejected_at.filter(|_| watched.is_ejected()) else { return false };
        let config = self.config();
        let base = config.base_ejection_time.get().saturating_mul(watched.backoff);
        let time = base.min(config.max_ejection_time.get()).saturating_add(watched.jitter);
        let over = Duration::from_millis(time) <= now.saturating_duration_since(since);
        if over {
            self.take_back(at, now);
        }
        over
    }

    fn take_back(&mut self, at: usize, now: Instant) {
        self.ejected -= 1;
        self.stats.ejections_active.dec();
        let watched = &mut self.hosts[at];
        watched.vitals.set(HealthFlag::FailedOutlierCheck, false);
        if let Some(monitor) = watched.monitor() {
            // It is not ejected again for a few failures on top of those before.
            Ejection::ALL[..Ejection::CONSECUTIVE].iter().for_each(|kind| monitor.reset(*kind));
        }
        watched.back_at = Some(now);
        let last = watched.ejected_at;
        self.log(at, Ejection::Consecutive5xx, Action::Uneject, last, now);
    }

    /// Of requests, or of connections: `local_origin`.
    fn judge_rates(&mut self, local_origin: bool, now: Instant) -> bool {
        let number = usize::from(local_origin);
        let config = Arc::clone(&self.shared.config);
        self.set_averages(number, None);
        let hosts = self.hosts.len() as u64;
        let (rate_hosts, percentage_hosts) =
            (config.success_rate_minimum_hosts.get(), config.failure_percentage_minimum_hosts.get());
        if hosts < rate_hosts && hosts < percentage_hosts {
            return false;
        }
        let (rate_volume, percentage_volume) =
            (config.success_rate_request_volume.get(), config.failure_percentage_request_volume.get());
        let (mut rates, mut percentages) = (Vec::new(), Vec::new());
        for (at, watched) in self.hosts.iter().enumerate().filter(|(_, watched)| !watched.is_ejected()) {
            let Sum { total, succeeded } = watched.interval[number];
            if total == 0 {
                continue;
            }
            let rate = succeeded as f64 * 100.0 / total as f64;
            if total >= rate_volume.min(percentage_volume)
                && let Some(monitor) = watched.monitor()
            {
                monitor.set_success_rate(local_origin, rate);
            }
            if total >= rate_volume {
                rates.push((at, rate));
            }
            if total >= percentage_volume {
                percentages.push((at, rate));
            }
        }
        let mut changed = false;
        if !rates.is_empty() && rates.len() as u64 >= rate_hosts {
            let factor = config.success_rate_stdev_factor.get() as f64 / 1000.0;
            let (average, threshold) = ejection_threshold(rates.iter().map(|(_, rate)| *rate), factor);
            self.set_averages(number, Some((average, threshold)));
            let kind = if local_origin { Ejection::SuccessRateLocalOrigin } else { Ejection::SuccessRate };
            for (at, _) in rates.into_iter().filter(|(_, rate)| *rate < threshold) {
                self.stats.ejections_success_rate.inc();
                self.stats.detected(kind).inc();
                changed |= self.eject(at, kind, now);
            }
        }
        if !percentages.is_empty() && percentages.len() as u64 >= percentage_hosts {
            let threshold = config.failure_percentage_threshold.get() as f64;
            let kind = if local_origin { Ejection::FailurePercentageLocalOrigin } else { Ejection::FailurePercentage };
            for (at, _) in percentages.into_iter().filter(|(_, rate)| 100.0 - rate >= threshold) {
                self.stats.detected(kind).inc();
                changed |= self.eject(at, kind, now);
            }
        }
        changed
    }

    fn set_averages(&mut self, number: usize, found: Option<(f64, f64)>) {
        self.averages[number] = found;
        let (average, threshold) = found.unwrap_or((-1.0, -1.0));
        self.shared.averages[number][0].store(average.to_bits(), Relaxed);
        self.shared.averages[number][1].store(threshold.to_bits(), Relaxed);
    }

    /// Ejects a host, unless as many are as may be, or it is not enforced.
    fn eject(&mut self, at: usize, kind: Ejection, now: Instant) -> bool {
        let config = Arc::clone(&self.shared.config);
        let share = 100.0 * (self.ejected + 1) as f64 / self.hosts.len() as f64;
        let may = share <= config.max_ejection_percent.get().min(100) as f64
            || (config.always_eject_one_host && self.ejected == 0);
        if !may {
            self.stats.ejections_overflow.inc();
            return false;
        }
        if matches!(kind, Ejection::Consecutive5xx | Ejection::SuccessRate) {
            self.stats.ejections_total.inc();
        }
        let last = self.hosts[at].back_at;
        if fastrand::u64(..100) >= config.enforcing[kind as usize].get() {
            self.log(at, kind, Action::Eject { enforced: false }, last, now);
            return false;
        }
        let watched = &mut self.hosts[at];
        // In an interval both of its rates may be too bad: it is ejected once more then, as in Envoy, and counted once.
        if watched.vitals.set(HealthFlag::FailedOutlierCheck, true) {
            self.ejected += 1;
            self.stats.ejections_active.inc();
        }
        watched.ejections += 1;
        watched.ejected_at = Some(now);
        watched.jitter = fastrand::u64(..=config.max_ejection_time_jitter.get());
        let (base, max) = (config.base_ejection_time.get(), config.max_ejection_time.get());
        if watched.backoff.saturating_mul(base) < max.saturating_add(base) {
            watched.backoff += 1;
        }
        self.stats.ejections_enforced_total.inc();
        self.stats.enforced(kind).inc();
        self.log(at, kind, Action::Eject { enforced: true }, last, now);
        true
    }

    fn log(&self, at: usize, kind: Ejection, action: Action, last: Option<Instant>, now: Instant) {
        let Some(log) = &self.log else { return };
        let watched = &self.hosts[at];
        let local = matches!(kind, Ejection::SuccessRateLocalOrigin | Ejection::FailurePercentageLocalOrigin);
        let line = Line {
            kind,
            at: SystemTime::now(),
            since_last: last.map(|last| now.saturating_duration_since(last).as_secs()),
            cluster: &self.cluster,
            host: watched.host.display(),
            action,
            ejections: watched.ejections,
            rate: watched.vitals.success_rate(local),
            averages: self.averages[usize::from(local)].unwrap_or((-1.0, -1.0)),
        };
        log.write(&line.to_string());
    }
}

impl Drop for Detector {
    fn drop(&mut self) {
        self.stats.ejections_active.sub(self.ejected);
    }
}

/// What tells the hosts of one version of a cluster apart.
fn key(vitals: &Arc<Vitals>) -> usize {
    Arc::as_ptr(vitals).addr()
}

/// The average of these rates, and the rate below which a host is an outlier.
fn ejection_threshold(rates: impl ExactSizeIterator<Item = f64> + Clone, factor: f64) -> (f64, f64) {
    let count = rates.len() as f64;
    let mean = rates.clone().sum::<f64>() / count;
    let variance = rates.map(|rate| (rate - mean).powi(2)).sum::<f64>() / count;
    (mean, mean - factor * variance.sqrt())
}

#[cfg(test)]
#[path = "detector_tests.rs"]
mod tests;
