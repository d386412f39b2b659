//! When clients are told to leave with their next answer, as by Envoy's drain manager: while the daemon fails health checks, and,
//! more and more of them, while it drains in good order.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// What `/healthcheck/fail` and `/healthcheck/ok` of the admin interface say, for the whole daemon.
static HEALTH_CHECKS_FAIL: AtomicBool = AtomicBool::new(false);
/// What `/drain_listeners?graceful` says.
static DRAIN: OnceLock<Drain> = OnceLock::new();

#[derive(Debug)]
struct Drain {
    since: Instant,
    /// After this all are told.
    time: Duration,
    inbound_only: bool,
}

/// From now on the daemon fails health checks, or passes them again.
pub fn fail_health_checks(fail: bool) {
    HEALTH_CHECKS_FAIL.store(fail, Ordering::Relaxed);
}

/// Whether the daemon fails health checks.
pub(super) fn health_checks_fail() -> bool {
    HEALTH_CHECKS_FAIL.load(Ordering::Relaxed)
}

/// From now on clients are told to leave, more and more of them within `time`, as by Envoy's `--drain-strategy gradual`: all, or those of
/// listeners whose `traffic_direction` is `INBOUND`. False: they are already.
pub fn begin_drain(time: Duration, inbound_only: bool) -> bool {
    DRAIN.set(Drain { since: Instant::now(), time, inbound_only }).is_ok()
}

/// Whether the client of a connection is told now.
pub(super) fn is_told(inbound: bool) -> bool {
    health_checks_fail()
        || DRAIN.get().is_some_and(|drain| {
            (inbound || !drain.inbound_only) && drain.since.elapsed() >= drain.time.mul_f64(fastrand::f64())
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_told_while_health_checks_fail() {
        assert!(!is_told(true));
        fail_health_checks(true);
        assert!(is_told(true) && is_told(false));
        fail_health_checks(false);
        assert!(!is_told(false));
    }

    #[test]
    fn a_drain_is_for_those_whom_it_is_meant_for() {
        assert!(begin_drain(Duration::ZERO, true));
        assert!(is_told(true) && !is_told(false));
        // The first one counts.
        assert!(!begin_drain(Duration::from_secs(600), false));
        assert!(is_told(true) && !is_told(false));
    }
}
