//! Outlier detection: hosts whose requests fail are ejected for a while.
//!
//! A worker counts what its requests come to ([`Monitor`]) and tells the control thread when as many as configured have failed in a
//! row. There a task for each cluster ([`watch`]) decides, sets the hosts' flags, and has a balancer made without them, which all
//! workers take over with their next request. LIFECYCLE.md has the states.

mod detector;
mod event_log;
mod monitor;
mod stats;

use std::{
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

pub(super) use self::monitor::Monitor;
pub use self::monitor::Seen;
use self::{
    detector::Detector,
    monitor::{Event, Shared},
    stats::OutlierStats,
};
use super::{Cluster, Clusters, vitals::Vitals};
use crate::{access_log::EventLog, config::model::OutlierDetection, stats::Scope};

/// No interval is shorter, whatever a runtime value says.
const MIN_INTERVAL: Duration = Duration::from_millis(1);

/// The outlier detection of a cluster: what its hosts' monitors share, and what the task that watches them takes.
#[derive(Debug)]
pub struct OutlierDetector {
    shared: Arc<Shared>,
    stats: OutlierStats,
    /// Until the task has it.
    events: Mutex<Option<mpsc::UnboundedReceiver<Event>>>,
}

impl OutlierDetector {
    pub(super) fn new(config: &Arc<OutlierDetection>, cluster: Scope, workers: usize) -> OutlierDetector {
        let (sender, events) = mpsc::unbounded_channel();
        let shared = Shared::new(Arc::clone(config), sender, workers);
        OutlierDetector { shared, stats: OutlierStats::new(cluster), events: Mutex::new(Some(events)) }
    }

    /// For a new host.
    pub(super) fn monitor(&self) -> Monitor {
        Monitor::new(&self.shared)
    }

    /// The average success rate of the last interval and the rate below which hosts were ejected, in percent; negative where too few
    /// hosts had enough requests.
    pub fn averages(&self, local_origin: bool) -> (f64, f64) {
        let [average, threshold] = &self.shared.averages[usize::from(local_origin)];
        (f64::from_bits(average.load(Relaxed)), f64::from_bits(threshold.load(Relaxed)))
    }

    /// The hosts are others.
    pub(super) fn hosts_changed(&self) {
        let _ = self.shared.events.send(Event::Hosts);
    }

    /// A host has passed an active health check while it was ejected.
    pub(super) fn passed_check(&self, vitals: &Arc<Vitals>) {
        let _ = self.shared.events.send(Event::PassedCheck(Arc::clone(vitals)));
    }
}

/// Watches a cluster's hosts until the cluster is gone or replaced. Ends at once where it has no outlier detection.
pub(crate) async fn watch(clusters: Weak<Clusters>, cluster: Weak<Cluster>, log: Option<EventLog>) {
    let Some((mut events, mut detector, config)) = cluster.upgrade().and_then(|cluster| {
        let outlier = cluster.outlier.as_ref()?;
        let events = outlier.events.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let (name, shared) = (Arc::clone(&cluster.config.name), Arc::clone(&outlier.shared));
        let config = Arc::clone(&shared.config);
        Some((events, Detector::new(name, shared, outlier.stats.clone(), log), config))
    }) else {
        return;
    };
    let wait = || Duration::from_millis(config.interval.get()).max(MIN_INTERVAL);
    let mut due = Instant::now().checked_add(wait());
    let mut known = 0;
    loop {
        let tick = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        let first = tokio::select! {
            biased;
            event = events.recv() => match event {
                Some(event) => Some(event),
                // Never: the cluster's own sender is there as long as the cluster.
                None => return,
            },
            () = tick => None,
        };
        let (Some(clusters), Some(cluster)) = (clusters.upgrade(), cluster.upgrade()) else { return };
        // Whatever came first: with many events the interval would be over again and again without anybody noticing.
        let overdue = due.is_none_or(|due| due <= Instant::now());
        let is_there = clusters.change_health(&cluster, || {
            let now = Instant::now().into_std();
            let version = cluster.hosts_version();
            if version != known {
                detector.set_hosts(&cluster.hosts().hosts);
                known = version;
            }
            let mut changed = first.is_some_and(|event| handle(&mut detector, event, now));
            // What has come meanwhile costs one balancer, and not one each.
            while let Ok(event) = events.try_recv() {
                changed |= handle(&mut detector, event, now);
            }
            if overdue && due.is_some() {
                changed |= detector.interval(now);
            }
            changed
        });
        if !is_there {
            return;
        }
        if overdue {
            due = Instant::now().checked_add(wait());
        }
    }
}

fn handle(detector: &mut Detector, event: Event, now: std::time::Instant) -> bool {
    match event {
        Event::Consecutive(vitals, kind) => detector.consecutive(&vitals, kind, now),
        Event::PassedCheck(vitals) => detector.passed_check(&vitals, now),
        Event::Degraded(vitals) => detector.degraded(&vitals, now),
        // They have been looked at.
        Event::Hosts => false,
    }
}
