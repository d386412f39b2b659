//! What the results of a host's checks make of it, and when it is checked again: without I/O.

use std::time::Duration;

use crate::config::model::HealthCheckConfig;

/// How a check failed, as Envoy tells them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The host says that it is not well: unhealthy at once.
    Active,
    /// The host says so with a status that may pass: counts towards the threshold.
    Retriable,
    /// The host has said in a response to a request that it is not well: unhealthy at once.
    Passive,
    /// No connection, or one that broke: counts towards the threshold.
    Network,
    /// No answer in time: counts towards the threshold.
    Timeout,
}

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Whether it passed, and how not.
    pub result: Result<Passed, Failure>,
    /// The status of an HTTP response, where a whole one came.
    pub http_status: Option<u16>,
}

/// A check that passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Passed {
    /// The host asks to be used last: `x-envoy-degraded`.
    pub degraded: bool,
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Outcome {
        Outcome { result: Err(failure), http_status: None }
    }
}

/// A host's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Health {
    /// It passes its checks. Not before the first one has.
    pub healthy: bool,
    /// It asks to be used last.
    pub degraded: bool,
    /// The last check failed for want of time.
    pub timed_out: bool,
    /// The status of the last check's HTTP response.
    pub http_status: Option<u16>,
}

/// What a check changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transition {
    Unchanged,
    /// On the way: the threshold is not reached.
    Pending,
    Changed,
}

/// A host's health, and how far it is from the other one.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) health: Health,
    first: bool,
    passed: u32,
    failed: u32,
}

impl Session {
    /// `health` is what is known from before.
    pub(super) fn new(health: Health) -> Session {
        Session { health, first: true, passed: 0, failed: 0 }
    }

    /// Whether nothing has been found out yet.
    pub(super) fn is_first(&self) -> bool {
        self.first
    }

    /// Takes the result of a check.
    pub(super) fn record(&mut self, config: &HealthCheckConfig, outcome: Outcome) -> Transition {
        self.health.http_status = outcome.http_status;
        let transition = match outcome.result {
            Ok(passed) => self.pass(config, passed),
            Err(failure) => self.fail(config, failure),
        };
        self.first = false;
        transition
    }

    fn pass(&mut self, config: &HealthCheckConfig, Passed { degraded }: Passed) -> Transition {
        self.failed = 0;
        let mut transition = Transition::Unchanged;
        if !self.health.healthy {
            self.passed += 1;
            // The very first result counts at once, so that a start does not take long.
            if !self.first && self.passed < config.healthy_threshold {
                transition = Transition::Pending;
            } else {
                transition = Transition::Changed;
                self.health.healthy = true;
            }
        }
        self.health.timed_out &= !self.health.healthy;
        if self.health.degraded != degraded {
            self.health.degraded = degraded;
            if transition == Transition::Unchanged {
                transition = Transition::Changed;
            }
        }
        transition
    }

    fn fail(&mut self, config: &HealthCheckConfig, failure: Failure) -> Transition {
        self.passed = 0;
        self.health.timed_out = failure == Failure::Timeout;
        if !self.health.healthy {
            return Transition::Unchanged;
        }
        self.failed += 1;
        let at_once = matches!(failure, Failure::Active | Failure::Passive);
        if !at_once && self.failed < config.unhealthy_threshold {
            return Transition::Pending;
        }
        self.health.healthy = false;
        self.failed = 0;
        Transition::Changed
    }

    /// Time until the next check, after one that changed this. `traffic`: the cluster has had any.
    pub(super) fn wait(
        &self,
        config: &HealthCheckConfig,
        transition: Transition,
        passed: bool,
        traffic: bool,
    ) -> Duration {
        let pending = transition == Transition::Pending;
        let base = match (traffic, passed, pending) {
            (false, true, false) => config.no_traffic_healthy_interval,
            (false, ..) => config.no_traffic_interval,
            (true, true, false) => config.interval,
            (true, true, true) => config.healthy_edge_interval,
            (true, false, false) => config.unhealthy_interval,
            (true, false, true) => config.unhealthy_edge_interval,
        };
        let percent = base.saturating_mul(config.interval_jitter_percent) / 100;
        base.saturating_add(part(percent)).saturating_add(part(config.interval_jitter))
    }
}

/// A random part of a duration.
pub(in crate::upstream) fn part(duration: Duration) -> Duration {
    // At most a random factor below 1: cannot overflow.
    duration.mul_f64(fastrand::f64())
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
