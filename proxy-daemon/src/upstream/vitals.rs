//! What is found out about a host while it is in use, besides what discovery says of it.

use std::{
    num::NonZeroU64,
    sync::{
        Arc, LazyLock, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderMap;
use tokio::sync::Notify;

use super::{
    orca::Reports,
    outlier::{Monitor, Seen},
};
use crate::config::model::HealthStatus;

/// What may be wrong with a host; Envoy's names for `/clusters`, in Envoy's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum HealthFlag {
    /// It does not pass its active health checks.
    FailedActiveHc = 1,
    /// Outlier detection has ejected it.
    FailedOutlierCheck = 1 << 1,
    /// Its active health checks say that it wants to be used last.
    DegradedActiveHc = 1 << 2,
    /// Discovery does not have it any more; as long as it passes its checks, it stays.
    PendingDynamicRemoval = 1 << 3,
    /// It is not counted before its first check.
    PendingActiveHc = 1 << 4,
    /// It has said in a response that it wants no more requests.
    ExcludedViaImmediateHcFail = 1 << 5,
    /// Its last active health check had no answer in time.
    ActiveHcTimeout = 1 << 6,
    /// It has said in a response that it wants to be used last, and outlier detection goes by that.
    DegradedOutlier = 1 << 7,
}

/// Shared by all versions of a host in one version of its cluster. Flags change under the lock of
/// [`Clusters`](super::Clusters) only, so that whoever makes a balancer sees one state of them.
#[derive(Debug, Default)]
pub struct Vitals {
    flags: AtomicU32,
    /// How often checks or outlier detection have found it to be ill.
    failures: AtomicU32,
    monitor: OnceLock<Monitor>,
    /// Told when the host says in a response that it is not well.
    check: OnceLock<Arc<Notify>>,
    /// What it reports of its load, where somebody goes by that.
    reports: OnceLock<Box<Reports>>,
    /// When it last began to pass its checks, as a [`Moment`]; 0: it has not yet.
    well_since: AtomicU64,
}

/// Before any host was known.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);

/// A time, to the millisecond, in eight bytes: milliseconds since [`EPOCH`], and one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moment(NonZeroU64);

impl Moment {
    pub(super) fn now() -> Moment {
        Moment(NonZeroU64::MIN.saturating_add(EPOCH.elapsed().as_millis() as u64))
    }

    /// `None`: too far in the future for the clock, which does not happen.
    pub(super) fn instant(self) -> Option<Instant> {
        EPOCH.checked_add(Duration::from_millis(self.0.get() - 1))
    }
}

impl Vitals {
    /// Of a host of which nothing bad is known yet; `monitor` where outlier detection goes by its requests.
    pub(super) fn new(monitor: Option<Monitor>) -> Vitals {
        let vitals = Vitals::default();
        if let Some(monitor) = monitor {
            vitals.watch(|| monitor);
        }
        vitals
    }

    /// Outlier detection goes by its requests from now on.
    pub(super) fn watch(&self, monitor: impl FnOnce() -> Monitor) {
        self.monitor.get_or_init(monitor);
    }

    /// What it reports of its load is kept from now on.
    pub(super) fn keep_reports(&self, reports: impl FnOnce() -> Reports) {
        self.reports.get_or_init(|| Box::new(reports()));
    }

    /// What it has reported of its load.
    pub(super) fn reports(&self) -> Option<&Reports> {
        self.reports.get().map(|reports| &**reports)
    }

    /// It is checked.
    pub(super) fn is_checked_by(&self, check: Arc<Notify>) {
        // There is one check for each.
        let _ = self.check.set(check);
    }

    /// Whether checks say how it is.
    pub(super) fn is_checked(&self) -> bool {
        self.check.get().is_some()
    }

    /// It passes its checks from now on.
    pub(super) fn is_well(&self) {
        self.well_since.store(Moment::now().0.get(), Ordering::Relaxed);
    }

    /// Since when it has passed its checks.
    pub(super) fn well_since(&self) -> Option<Moment> {
        NonZeroU64::new(self.well_since.load(Ordering::Relaxed)).map(Moment)
    }

    /// A response with this status has these headers: the host may say in them that it is not well.
    #[inline]
    pub(super) fn heard(self: &Arc<Self>, status: u16, headers: &HeaderMap) {
        if let Some(monitor) = self.monitor.get() {
            monitor.heard(self, status, headers);
        }
        if let Some(check) = self.check.get()
            && headers.contains_key("x-envoy-immediate-health-check-fail")
        {
            check.notify_one();
        }
    }

    /// Whether this is so.
    pub fn has(&self, flag: HealthFlag) -> bool {
        self.flags.load(Ordering::Relaxed) & flag as u32 != 0
    }

    /// Whether any of these is so: a sum of flags.
    fn has_any(&self, flags: u32) -> bool {
        self.flags.load(Ordering::Relaxed) & flags != 0
    }

    /// Sets or clears a flag; returns whether it changed.
    pub(super) fn set(&self, flag: HealthFlag, on: bool) -> bool {
        let flag = flag as u32;
        let before = match on {
            true => self.flags.fetch_or(flag, Ordering::Relaxed),
            false => self.flags.fetch_and(!flag, Ordering::Relaxed),
        };
        let changed = (before & flag != 0) != on;
        if changed && on && flag & (HealthFlag::FailedActiveHc as u32 | HealthFlag::FailedOutlierCheck as u32) != 0 {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
        changed
    }

    /// How often checks or outlier detection have found it to be ill: other than before, and its connections are not used again.
    pub(super) fn failures(&self) -> u32 {
        self.failures.load(Ordering::Relaxed)
    }

    /// What outlier detection counts of it.
    pub(super) fn monitor(&self) -> Option<&Monitor> {
        self.monitor.get()
    }

    /// What outlier detection found of it in the last interval, in percent; negative where it had too few requests.
    pub fn success_rate(&self, local_origin: bool) -> f64 {
        self.monitor.get().map_or(-1.0, |monitor| monitor.success_rate(local_origin))
    }

    /// A request or connection of `worker`, which must be the calling worker, came to this.
    #[inline]
    pub(super) fn saw(self: &Arc<Self>, worker: usize, seen: Seen) {
        if let Some(monitor) = self.monitor.get() {
            monitor.saw(self, worker, seen);
        }
    }
}

/// How a host stands for requests that name it: what has been found out comes before what discovery says.
pub(super) fn status(said: HealthStatus, vitals: Option<&Vitals>) -> HealthStatus {
    const FAILED: u32 = HealthFlag::FailedActiveHc as u32 | HealthFlag::FailedOutlierCheck as u32;
    let any = |flags| vitals.is_some_and(|vitals| vitals.has_any(flags));
    match said {
        _ if any(FAILED) => HealthStatus::Unhealthy,
        HealthStatus::Unhealthy | HealthStatus::Draining | HealthStatus::Timeout => said,
        _ if any(HealthFlag::DegradedActiveHc as u32) => HealthStatus::Degraded,
        HealthStatus::Unknown | HealthStatus::Healthy | HealthStatus::Degraded => said,
    }
}

/// What a host's health makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It is used.
    Healthy,
    /// It is used where no healthy host is left.
    Degraded,
    /// It is not used.
    Unhealthy,
    /// As if it were not there: what the others can take is not less for it.
    Excluded,
}

impl Standing {
    /// By what discovery says, and by what has been found out.
    pub(super) fn new(said: HealthStatus, vitals: Option<&Vitals>) -> Standing {
        const EXCLUDED: u32 = HealthFlag::PendingActiveHc as u32 | HealthFlag::ExcludedViaImmediateHcFail as u32;
        const FAILED: u32 = HealthFlag::FailedActiveHc as u32 | HealthFlag::FailedOutlierCheck as u32;
        const DEGRADED: u32 = HealthFlag::DegradedActiveHc as u32 | HealthFlag::DegradedOutlier as u32;
        let any = |flags| vitals.is_some_and(|vitals| vitals.has_any(flags));
        if said == HealthStatus::Draining || any(EXCLUDED) {
            Standing::Excluded
        } else if matches!(said, HealthStatus::Unhealthy | HealthStatus::Timeout) || any(FAILED) {
            Standing::Unhealthy
        } else if said == HealthStatus::Degraded || any(DEGRADED) {
            Standing::Degraded
        } else {
            Standing::Healthy
        }
    }

    /// Whether new requests may go there.
    pub fn is_usable(self) -> bool {
        matches!(self, Standing::Healthy | Standing::Degraded)
    }
}
