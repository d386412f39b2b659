//! What requests tell of a host. Each worker counts in a cache line of its own; what all of them share is written when something
//! fails, and when something succeeds after that.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use http::HeaderMap;
use tokio::sync::mpsc;

use crate::{
    config::model::{Ejection, OutlierDetection},
    upstream::vitals::{HealthFlag, Vitals},
};

/// What a request or a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// A response with this status, or one that a gRPC status stands for.
    Status(u16),
    /// There is a connection for a request, which will be told of as well.
    Connected,
    /// There is a connection, and nothing more will be told of it.
    ConnectedOnly,
    /// There is no connection, or the one that there was broke.
    ConnectFailed,
    /// No answer came in time; a client's answer has this status.
    TimedOut(u16),
}

/// What outlier detection is told by workers.
#[derive(Debug)]
pub(super) enum Event {
    /// So many have failed in a row.
    Consecutive(Arc<Vitals>, Ejection),
    /// An ejected host has passed an active health check.
    PassedCheck(Arc<Vitals>),
    /// A host wants to be used last.
    Degraded(Arc<Vitals>),
    /// The cluster's hosts are others.
    Hosts,
}

/// What the monitors of all hosts of a cluster share.
#[derive(Debug)]
pub(in crate::upstream) struct Shared {
    pub(super) config: Arc<OutlierDetection>,
    pub(super) events: mpsc::UnboundedSender<Event>,
    /// The average and the threshold of the last interval: of requests, and of connections.
    pub(super) averages: [[AtomicU64; 2]; 2],
    workers: usize,
}

impl Shared {
    pub(super) fn new(
        config: Arc<OutlierDetection>,
        events: mpsc::UnboundedSender<Event>,
        workers: usize,
    ) -> Arc<Shared> {
        let none = || AtomicU64::new((-1.0_f64).to_bits());
        let averages = [[none(), none()], [none(), none()]];
        Arc::new(Shared { config, events, averages, workers })
    }
}

/// Announced: the host wants to be used last. Above the bits of [`Ejection`].
const DEGRADED: u32 = 1 << 31;

/// What is counted of one host.
#[derive(Debug)]
pub(in crate::upstream) struct Monitor {
    shared: Arc<Shared>,
    /// Failures in a row, whichever worker met them.
    in_a_row: [AtomicU32; Ejection::CONSECUTIVE],
    /// Which of them the control thread has been told of, and not looked at yet: a bit each. Bounds what waits for it.
    announced: AtomicU32,
    lines: OnceLock<Box<[Line]>>,
    /// In percent: of requests, and of connections.
    rates: [AtomicU64; 2],
}

/// One worker's: requests, and those of them that succeeded; the same of connections.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Line([AtomicU64; 4]);

/// So many, of which so many succeeded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) total: u64,
    pub(super) succeeded: u64,
}

impl Monitor {
    pub(in crate::upstream) fn new(shared: &Arc<Shared>) -> Monitor {
        let none = || AtomicU64::new((-1.0_f64).to_bits());
        Monitor {
            shared: Arc::clone(shared),
            in_a_row: Default::default(),
            announced: AtomicU32::new(0),
            lines: OnceLock::new(),
            rates: [none(), none()],
        }
    }

    /// `of` is what this is the monitor of.
    pub(in crate::upstream) fn saw(&self, of: &Arc<Vitals>, worker: usize, seen: Seen) {
        use Seen::{ConnectFailed, Connected, ConnectedOnly, Status, TimedOut};
        if self.shared.config.split_external_local_origin_errors {
            match seen {
                Status(status) => self.answered(of, worker, status),
                Connected | ConnectedOnly => self.connected(worker),
                ConnectFailed | TimedOut(_) => self.not_connected(of, worker),
            }
        } else {
            match seen {
                Status(status) | TimedOut(status) => self.answered(of, worker, status),
                ConnectedOnly => self.answered(of, worker, 200),
                ConnectFailed => self.answered(of, worker, 503),
                // The status will tell.
                Connected => {}
            }
        }
    }

    fn answered(&self, of: &Arc<Vitals>, worker: usize, status: u16) {
        let failed = (500..600).contains(&status);
        self.count(worker, 0, !failed);
        if (502..=504).contains(&status) {
            self.failed(of, Ejection::ConsecutiveGatewayFailure);
        } else {
            self.reset(Ejection::ConsecutiveGatewayFailure);
        }
        if failed {
            self.failed(of, Ejection::Consecutive5xx);
        } else {
            self.reset(Ejection::Consecutive5xx);
        }
    }

    fn connected(&self, worker: usize) {
        self.count(worker, 2, true);
        self.reset(Ejection::ConsecutiveLocalOriginFailure);
    }

    fn not_connected(&self, of: &Arc<Vitals>, worker: usize) {
        self.count(worker, 2, false);
        self.failed(of, Ejection::ConsecutiveLocalOriginFailure);
    }

    fn count(&self, worker: usize, at: usize, succeeded: bool) {
        let lines = self.lines.get_or_init(|| (0..self.shared.workers).map(|_| Line::default()).collect());
        // No other worker writes this line.
        let add = |counter: &AtomicU64| counter.store(counter.load(Relaxed).wrapping_add(1), Relaxed);
        add(&lines[worker].0[at]);
        if succeeded {
            add(&lines[worker].0[at + 1]);
        }
    }

    #[cold]
    fn failed(&self, of: &Arc<Vitals>, kind: Ejection) {
        let row = self.in_a_row[kind as usize].fetch_add(1, Relaxed).wrapping_add(1);
        if u64::from(row) == self.shared.config.consecutive[kind as usize].get() {
            let bit = 1 << kind as usize;
            if self.announced.fetch_or(bit, Relaxed) & bit == 0 {
                // Nobody listens where the cluster is gone.
                let _ = self.shared.events.send(Event::Consecutive(Arc::clone(of), kind));
            }
        }
    }

    /// A response with this status has these headers.
    #[inline]
    pub(in crate::upstream) fn heard(&self, of: &Arc<Vitals>, status: u16, headers: &HeaderMap) {
        if self.shared.config.detects_degraded
            && headers.contains_key("x-envoy-degraded")
            && !(500..600).contains(&status)
            && !of.has(HealthFlag::DegradedOutlier)
            && self.announced.load(Relaxed) & DEGRADED == 0
            && self.announced.fetch_or(DEGRADED, Relaxed) & DEGRADED == 0
        {
            let _ = self.shared.events.send(Event::Degraded(Arc::clone(of)));
        }
    }

    /// The control thread has looked at a host that wants to be used last.
    pub(super) fn degraded_taken_up(&self) {
        self.announced.fetch_and(!DEGRADED, Relaxed);
    }

    /// The row is at an end, or has been looked at.
    pub(super) fn reset(&self, kind: Ejection) {
        let row = &self.in_a_row[kind as usize];
        // Mostly nothing has failed: then nothing is written that others read.
        if row.load(Relaxed) != 0 {
            row.store(0, Relaxed);
        }
    }

    /// The control thread looks at what it has been told.
    pub(super) fn taken_up(&self, kind: Ejection) {
        self.announced.fetch_and(!(1 << kind as usize), Relaxed);
    }

    /// What has been counted since the host was first used: of requests, and of connections.
    pub(super) fn sums(&self) -> [Sum; 2] {
        let lines = self.lines.get().map(|lines| &**lines).unwrap_or_default();
        let sum = |at: usize| lines.iter().fold(0_u64, |sum, line| sum.wrapping_add(line.0[at].load(Relaxed)));
        // What succeeded first: a request that ends meanwhile is missing there rather than counted twice.
        [0, 2].map(|at| {
            let succeeded = sum(at + 1);
            Sum { succeeded, total: sum(at) }
        })
    }

    pub(in crate::upstream) fn success_rate(&self, local_origin: bool) -> f64 {
        f64::from_bits(self.rates[usize::from(local_origin)].load(Relaxed))
    }

    pub(super) fn set_success_rate(&self, local_origin: bool, rate: f64) {
        self.rates[usize::from(local_origin)].store(rate.to_bits(), Relaxed);
    }
}
