//! Active health checks: a task on the control runtime for each host and check, which never meets a worker.

mod grpc;
mod http;
mod state;
mod tcp;

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle};

pub use self::state::{Failure, Health, Outcome, Passed};
use self::{
    grpc::GrpcProbe,
    http::HttpProbe,
    state::{Session, Transition, part},
    tcp::TcpProbe,
};
use crate::{
    config::model::{Check, EndpointAddress, HealthCheckConfig},
    stats::{Counter, Gauge, Lease, Scope},
};

/// No host is checked more often than this, whatever is configured.
const MIN_WAIT: Duration = Duration::from_millis(1);

/// `cluster.<name>.health_check.*`, as Envoy names them.
#[derive(Debug, Clone)]
pub struct HealthCheckStats {
    attempt: Counter,
    success: Counter,
    failure: Counter,
    network_failure: Counter,
    verify_cluster: Counter,
    degraded: Gauge,
    healthy: Gauge,
    /// Every check holds it, so that the slots stay its own until it has ended.
    _lease: Arc<Lease>,
}

impl HealthCheckStats {
    /// Those of a cluster, whose scope `cluster` is.
    pub fn new(cluster: Scope) -> HealthCheckStats {
        let scope = cluster.child("health_check");
        let lease = Arc::new(scope.lease());
        // There are no passive checks yet; Envoy shows it all the same.
        scope.counter("passive_failure");
        HealthCheckStats {
            attempt: scope.counter("attempt"),
            success: scope.counter("success"),
            failure: scope.counter("failure"),
            network_failure: scope.counter("network_failure"),
            verify_cluster: scope.counter("verify_cluster"),
            degraded: scope.gauge("degraded"),
            healthy: scope.gauge("healthy"),
            _lease: lease,
        }
    }
}

/// Whether the cluster has had any traffic; without, its hosts are checked at leisure.
pub type HasTraffic = Arc<dyn Fn() -> bool + Send + Sync>;

/// Checks one host, until it is dropped.
#[derive(Debug)]
pub struct HealthChecker {
    health: watch::Receiver<Health>,
    task: JoinHandle<()>,
}

impl HealthChecker {
    /// Starts to check the host at `address`, of which `health` is known from before. Must be called within the control
    /// runtime.
    pub fn start(
        config: Arc<HealthCheckConfig>,
        address: EndpointAddress,
        health: Health,
        stats: HealthCheckStats,
        traffic: HasTraffic,
    ) -> HealthChecker {
        let (sender, receiver) = watch::channel(health);
        HealthChecker { health: receiver, task: tokio::spawn(run(config, address, stats, traffic, sender)) }
    }

    /// The host's health now.
    pub fn health(&self) -> Health {
        *self.health.borrow()
    }

    /// Tells of each change.
    pub fn watch(&self) -> watch::Receiver<Health> {
        self.health.clone()
    }
}

impl Drop for HealthChecker {
    fn drop(&mut self) {
        self.task.abort();
    }
}

enum Probe {
    Http(HttpProbe),
    Tcp(TcpProbe),
    Grpc(GrpcProbe),
}

impl Probe {
    fn new(check: &Check, reuse: bool, address: EndpointAddress, stats: &HealthCheckStats) -> Probe {
        match check {
            Check::Http(_) => Probe::Http(HttpProbe::new(address, reuse, stats.verify_cluster)),
            Check::Tcp(_) => Probe::Tcp(TcpProbe::new(address, reuse)),
            Check::Grpc(_) => Probe::Grpc(GrpcProbe::new(address, reuse)),
        }
    }

    /// Checks once. Dropped before it is done, it closes its connection.
    async fn probe(&mut self, check: &Check) -> Outcome {
        match (self, check) {
            (Probe::Http(probe), Check::Http(check)) => probe.probe(check).await,
            (Probe::Tcp(probe), Check::Tcp(check)) => probe.probe(check).await,
            (Probe::Grpc(probe), Check::Grpc(check)) => probe.probe(check).await,
            // A probe is made for its check and keeps it.
            _ => Failure::Network.into(),
        }
    }
}

/// Counts a host in the gauges for as long as it is checked.
struct Shown {
    stats: HealthCheckStats,
    healthy: bool,
    degraded: bool,
}

impl Shown {
    fn show(&mut self, healthy: bool, degraded: bool) {
        for (gauge, before, now) in
            [(self.stats.healthy, self.healthy, healthy), (self.stats.degraded, self.degraded, degraded)]
        {
            match (before, now) {
                (false, true) => gauge.inc(),
                (true, false) => gauge.dec(),
                _ => {}
            }
        }
        (self.healthy, self.degraded) = (healthy, degraded);
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.show(false, false);
    }
}

async fn run(
    config: Arc<HealthCheckConfig>,
    address: EndpointAddress,
    stats: HealthCheckStats,
    traffic: HasTraffic,
    sender: watch::Sender<Health>,
) {
    let mut session = Session::new(*sender.borrow());
    let mut shown = Shown { stats: stats.clone(), healthy: false, degraded: false };
    shown.show(session.health.healthy, session.health.degraded);
    let mut probe = Probe::new(&config.check, config.reuse_connection, address, &stats);
    tokio::time::sleep(part(config.initial_jitter)).await;
    loop {
        stats.attempt.inc();
        let outcome = tokio::time::timeout(config.timeout, probe.probe(&config.check)).await;
        let outcome = outcome.unwrap_or_else(|_elapsed| Failure::Timeout.into());
        match outcome.result {
            Ok(_) => stats.success.inc(),
            Err(failure) => {
                stats.failure.inc();
                if matches!(failure, Failure::Network | Failure::Timeout) {
                    stats.network_failure.inc();
                }
            }
        }
        let transition = session.record(&config, outcome);
        shown.show(session.health.healthy, session.health.degraded);
        if transition == Transition::Changed {
            tracing::debug!(health = ?session.health, "health changed");
        }
        sender.send_if_modified(|health| std::mem::replace(health, session.health) != session.health);
        let wait = session.wait(&config, transition, outcome.result.is_ok(), traffic());
        tokio::time::sleep(wait.max(MIN_WAIT)).await;
    }
}

/// Whether `text` has all `blocks`, one after the other, with anything between them.
fn contains(text: &[u8], blocks: &[Vec<u8>]) -> bool {
    let mut rest = text;
    blocks.iter().all(|block| {
        let found = block.is_empty().then_some(0).or_else(|| rest.windows(block.len()).position(|part| part == block));
        found.is_some_and(|at| {
            rest = &rest[at + block.len()..];
            true
        })
    })
}

#[cfg(test)]
mod tests;
