//! Active health checks: a task on the control runtime for each host and check, which never meets a worker.

mod cluster;
mod event_log;
mod grpc;
mod http;
mod redis;
mod state;
mod tcp;

use std::{
    net::{Ipv4Addr, SocketAddr},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use ::http::HeaderValue;
use arc_swap::ArcSwap;
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
};

pub(super) use self::cluster::Changed;
pub use self::cluster::ClusterChecks;
pub(super) use self::http::HttpConnection;
pub(super) use self::state::part;
pub use self::state::{Failure, Health, Outcome, Passed};
use self::{
    grpc::GrpcProbe,
    http::HttpProbe,
    redis::RedisProbe,
    state::{Session, Transition},
    tcp::TcpProbe,
};
use crate::{
    access_log::Record,
    config::model::{Check, EndpointAddress, HealthCheckConfig, UpstreamBind},
    stats::{Counter, Gauge, Lease, Scope},
    tls::ClientTls,
    upstream::{Host, SocketSettings},
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
    passive_failure: Counter,
    verify_cluster: Counter,
    gauges: Gauges,
    /// Those of the cluster, where checks count as its traffic.
    cluster: Scope,
    /// Every check holds it, so that the slots stay its own until it has ended.
    _lease: Arc<Lease>,
}

impl HealthCheckStats {
    /// Those of a cluster, whose scope `cluster` is, for the check of this name; it may have none.
    pub fn new(cluster: Scope, name: &str) -> HealthCheckStats {
        let scope = cluster.clone().child("health_check");
        let scope = if name.is_empty() { scope } else { scope.health_check(name) };
        let lease = Arc::new(scope.lease());
        HealthCheckStats {
            attempt: scope.counter("attempt"),
            success: scope.counter("success"),
            failure: scope.counter("failure"),
            network_failure: scope.counter("network_failure"),
            passive_failure: scope.counter("passive_failure"),
            verify_cluster: scope.counter("verify_cluster"),
            gauges: Gauges::new(&scope),
            cluster,
            _lease: lease,
        }
    }
}

/// How many hosts pass, and how many of all want to be used last.
#[derive(Debug, Clone)]
struct Gauges {
    degraded: Gauge,
    healthy: Gauge,
    _lease: Arc<Lease>,
}

impl Gauges {
    fn new(scope: &Scope) -> Gauges {
        let lease = Arc::new(scope.lease());
        Gauges { degraded: scope.gauge("degraded"), healthy: scope.gauge("healthy"), _lease: lease }
    }
}

/// Whether the cluster has had any traffic; without, its hosts are checked at leisure.
pub type HasTraffic = Arc<dyn Fn() -> bool + Send + Sync>;

/// Where a host is, and how connections to it are encrypted: otherwise now and then.
#[derive(Debug, Clone)]
pub(crate) struct Place(Arc<ArcSwap<Way>>);

/// How a host is reached.
#[derive(Debug)]
pub(crate) struct Way {
    pub(crate) address: EndpointAddress,
    /// What the host is called: checks may go elsewhere.
    pub(crate) host: Box<str>,
    /// `None`: connections are plain.
    pub(crate) tls: Option<Arc<ClientTls>>,
    /// Counts connections, where the check itself has chosen how they are encrypted.
    pub(crate) chosen: Option<Counter>,
}

impl Place {
    pub(crate) fn new(way: Way) -> Place {
        Place(Arc::new(ArcSwap::from_pointee(way)))
    }

    fn now(&self) -> Arc<Way> {
        self.0.load_full()
    }

    /// The next connection goes there.
    fn move_to(&self, way: Way) {
        self.0.store(Arc::new(way));
    }
}

/// What is checked, and how it is reached.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where.
    pub(crate) place: Place,
    /// The host's name, for TLS.
    pub(crate) name: Box<str>,
    /// What it is called in requests, where the check does not say it.
    pub(crate) host: Option<HeaderValue>,
    /// Where connections come from.
    pub(crate) bind: Option<Arc<UpstreamBind>>,
}

impl Target {
    /// Whether its next connection is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        self.place.now().tls.is_some()
    }

    /// What there is to tell in headers of a check, as in Envoy: nobody has asked for it but this process.
    fn told<R>(&self, protocol: &str, tell: impl FnOnce(&Record<'_>) -> R) -> R {
        let (way, nobody) = (self.place.now(), Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))));
        tell(&Record {
            start: SystemTime::now(),
            protocol: Some(protocol),
            upstream_host: Some(&way.host),
            upstream_host_name: Some(if self.name.is_empty() { &way.host } else { &self.name }),
            downstream_remote_address: nobody,
            downstream_direct_remote_address: nobody,
            downstream_local_address: nobody,
            ..Record::default()
        })
    }

    fn socket(&self) -> SocketSettings<'_> {
        SocketSettings { bind: self.bind.as_deref(), ..SocketSettings::default() }
    }

    /// A host without a name, on plain connections.
    pub fn plain(address: EndpointAddress) -> Target {
        let host = Host::text_of(&address);
        let place = Place::new(Way { address, host, tls: None, chosen: None });
        Target { place, name: Box::default(), host: None, bind: None }
    }
}

/// What a check has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Report {
    /// What was known before it.
    pub(crate) before: Health,
    /// What is known now.
    pub(crate) health: Health,
    /// It is the host's first.
    pub(crate) first: bool,
    /// What it came to.
    pub(crate) result: Result<Passed, Failure>,
}

/// Is told of every check.
type Told = Box<dyn FnMut(Report) + Send>;

/// Checks one host, until it is dropped.
#[derive(Debug)]
pub struct HealthChecker {
    health: watch::Receiver<Health>,
    passive: Arc<Notify>,
    task: JoinHandle<()>,
}

impl HealthChecker {
    /// Starts to check a host, of which `health` is known from before. Must be called within the control
    /// runtime.
    pub fn start(
        config: Arc<HealthCheckConfig>,
        target: Target,
        health: Health,
        stats: HealthCheckStats,
        traffic: HasTraffic,
    ) -> HealthChecker {
        HealthChecker::start_told(config, target, health, stats, traffic, None)
    }

    /// The same; `told` of each check.
    fn start_told(
        config: Arc<HealthCheckConfig>,
        target: Target,
        health: Health,
        stats: HealthCheckStats,
        traffic: HasTraffic,
        told: Option<Told>,
    ) -> HealthChecker {
        let (sender, receiver) = watch::channel(health);
        let passive = Arc::new(Notify::new());
        let (session, shown) = (Session::new(health), Shown::new(&stats.gauges, health));
        let probe = Probe::new(&config.check, config.reuse_connection, target, &stats);
        let running = Running { config, stats, sender, told, session, shown };
        let task = tokio::spawn(running.run(probe, traffic, Arc::clone(&passive)));
        HealthChecker { health: receiver, passive, task }
    }

    /// By which it is told that the host has said in a response that it is not well.
    fn passive(&self) -> Arc<Notify> {
        Arc::clone(&self.passive)
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
    Redis(RedisProbe),
}

impl Probe {
    fn new(check: &Check, reuse: bool, target: Target, stats: &HealthCheckStats) -> Probe {
        match check {
            Check::Http(_) => Probe::Http(HttpProbe::new(target, reuse, stats.verify_cluster)),
            Check::Tcp(_) => Probe::Tcp(TcpProbe::new(target, reuse)),
            Check::Grpc(_) => Probe::Grpc(GrpcProbe::new(target, reuse)),
            Check::Redis(_) => Probe::Redis(RedisProbe::new(target, reuse, &stats.cluster)),
        }
    }

    /// Checks once. Dropped before it is done, it closes its connection.
    async fn probe(&mut self, check: &Check) -> Outcome {
        match (self, check) {
            (Probe::Http(probe), Check::Http(check)) => probe.probe(check).await,
            (Probe::Tcp(probe), Check::Tcp(check)) => probe.probe(check).await,
            (Probe::Grpc(probe), Check::Grpc(check)) => probe.probe(check).await,
            (Probe::Redis(probe), Check::Redis(check)) => probe.probe(check).await,
            // A probe is made for its check and keeps it.
            _ => Failure::Network.into(),
        }
    }
}

/// Counts a host in the gauges for as long as it is checked.
struct Shown {
    gauges: Gauges,
    healthy: bool,
    degraded: bool,
}

impl Shown {
    fn new(gauges: &Gauges, health: Health) -> Shown {
        let mut shown = Shown { gauges: gauges.clone(), healthy: false, degraded: false };
        shown.show(health.healthy, health.degraded);
        shown
    }

    fn show(&mut self, healthy: bool, degraded: bool) {
        for (gauge, before, now) in
            [(self.gauges.healthy, self.healthy, healthy), (self.gauges.degraded, self.degraded, degraded)]
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

/// A host that is being checked.
struct Running {
    config: Arc<HealthCheckConfig>,
    stats: HealthCheckStats,
    sender: watch::Sender<Health>,
    told: Option<Told>,
    session: Session,
    shown: Shown,
}

impl Running {
    async fn run(mut self, mut probe: Probe, traffic: HasTraffic, passive: Arc<Notify>) {
        let config = Arc::clone(&self.config);
        self.wait(part(config.initial_jitter), &passive).await;
        loop {
            self.stats.attempt.inc();
            let outcome = {
                let mut checking = pin!(tokio::time::timeout(config.timeout, probe.probe(&config.check)));
                loop {
                    tokio::select! {
                        biased;
                        outcome = &mut checking => break outcome,
                        () = passive.notified() => drop(self.record(Failure::Passive.into())),
                    }
                }
            };
            let outcome = outcome.unwrap_or_else(|_elapsed| Failure::Timeout.into());
            let transition = self.record(outcome);
            let wait = self.session.wait(&config, transition, outcome.result.is_ok(), traffic());
            self.wait(wait.max(MIN_WAIT), &passive).await;
        }
    }

    /// Waits, and takes what the host says of itself meanwhile.
    async fn wait(&mut self, time: Duration, passive: &Notify) {
        let mut sleep = pin!(tokio::time::sleep(time));
        loop {
            tokio::select! {
                biased;
                () = &mut sleep => return,
                () = passive.notified() => drop(self.record(Failure::Passive.into())),
            }
        }
    }

    fn record(&mut self, outcome: Outcome) -> Transition {
        match outcome.result {
            Ok(_) => self.stats.success.inc(),
            Err(failure) => {
                self.stats.failure.inc();
                match failure {
                    Failure::Network | Failure::Timeout => self.stats.network_failure.inc(),
                    Failure::Passive => self.stats.passive_failure.inc(),
                    Failure::Active | Failure::Retriable => {}
                }
            }
        }
        let (before, first) = (self.session.health, self.session.is_first());
        let transition = self.session.record(&self.config, outcome);
        let health = self.session.health;
        self.shown.show(health.healthy, health.degraded);
        if transition == Transition::Changed {
            tracing::debug!(?health, "health changed");
        }
        self.sender.send_if_modified(|known| std::mem::replace(known, health) != health);
        if let Some(told) = &mut self.told {
            told(Report { before, health, first, result: outcome.result });
        }
        transition
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
