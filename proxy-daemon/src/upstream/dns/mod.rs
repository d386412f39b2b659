//! STRICT_DNS and LOGICAL_DNS: looks the names of clusters up again and again, on the control thread.

mod resolver;
mod servers;

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, future::join_all, stream::FuturesUnordered};

use tokio::task::AbortHandle;

use self::resolver::{Answer, Resolvers};
use super::{Cluster, Clusters};
use crate::config::model::{
    ClusterConfig, Discovery, DnsOptions, DnsResolver, Endpoint, EndpointAddress, LocalityEndpoints,
};

/// Looks names up for clusters that are in use, and for those that are going to be.
#[derive(Debug)]
pub struct Names {
    clusters: Arc<Clusters>,
    resolvers: Resolvers,
    /// What was found for clusters that are not in use yet, by their names; and when.
    first: Mutex<HashMap<Arc<str>, (Instant, FirstAnswers)>>,
    /// What looks names up, by the clusters that they are of.
    tasks: Mutex<HashMap<Arc<str>, AbortHandle>>,
}

/// The first answers for the names of a cluster, with these names.
type FirstAnswers = Vec<(Box<str>, io::Result<Answer>)>;

/// First answers are forgotten after this: their cluster has not come into use.
const KEPT: Duration = Duration::from_secs(300);

/// The addresses of a name; none where it has none.
pub(super) struct Found {
    /// Without doublets, in the order of the answer.
    pub(super) addresses: Vec<IpAddr>,
    /// How long they are good; `None`: nobody knows.
    pub(super) ttl: Option<Duration>,
}

/// A name of a cluster.
struct Name {
    host: Box<str>,
    port: u16,
    /// What it stands for, as far as is known.
    addresses: Vec<SocketAddr>,
    /// So often in a row nobody has answered.
    failures: u32,
    /// The last look-up has failed, and the log says so.
    failing: bool,
}

impl Names {
    /// For these clusters.
    pub fn new(clusters: Arc<Clusters>) -> Names {
        let (first, tasks) = (Mutex::default(), Mutex::default());
        Names { clusters, resolvers: Resolvers::default(), first, tasks }
    }

    /// Says who is asked where a cluster names nobody.
    pub fn set_default(&self, resolver: DnsResolver) {
        self.resolvers.set_default(resolver);
    }

    /// Looks the names of a cluster up that is not in use yet. `None`: nothing was found out, and the log says why.
    pub async fn resolve_once(&self, config: &ClusterConfig) -> Option<Arc<[LocalityEndpoints]>> {
        let options = config.discovery.dns()?;
        let mut names = names_of(&config.endpoints);
        let answers = join_all(names.iter().map(|name| self.look_up(&name.host, options))).await;
        let logical = matches!(config.discovery, Discovery::LogicalDns(_));
        let mut some = names.is_empty();
        for (name, answer) in names.iter_mut().zip(&answers) {
            match answer {
                Ok(answer) => {
                    name.take(answer, logical);
                    some = true;
                }
                Err(error) => {
                    let name = &name.host;
                    tracing::warn!(cluster = %config.name, %name, %error, "DNS look-up failed; the cluster begins without");
                }
            }
        }
        let answers = names.iter().map(|name| name.host.clone()).zip(answers).collect();
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        first.retain(|_, (found, _)| now.duration_since(*found) < KEPT);
        first.insert(Arc::clone(&config.name), (now, answers));
        drop(first);
        some.then(|| endpoints(config, &names).into())
    }

    /// Looks the names of a cluster up until it is [forgotten](Self::forget). A failed look-up keeps the last addresses.
    pub fn follow(self: &Arc<Names>, cluster: &Arc<Cluster>, control: &tokio::runtime::Handle) {
        let task = control.spawn(Arc::clone(self).keep_looking(Arc::downgrade(cluster)));
        let name = Arc::clone(&cluster.config.name);
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).insert(name, task.abort_handle());
    }

    /// The cluster of this name has been replaced or removed.
    pub fn forget(&self, cluster: &str) {
        let task = self.tasks.lock().unwrap_or_else(PoisonError::into_inner).remove(cluster);
        task.iter().for_each(AbortHandle::abort);
    }

    async fn keep_looking(self: Arc<Names>, cluster: Weak<Cluster>) {
        let Some(mine) = cluster.upgrade() else { return };
        let config = mine.config.clone();
        let Some(options) = config.discovery.dns() else { return };
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).remove(&config.name);
        // The cluster has begun with these, if it has waited for them.
        let first = first.filter(|_| options.wait_for_warm).map(|(_, answers)| answers);
        let mut names = names_of(&config.endpoints);
        let mut rounds = FuturesUnordered::new();
        let mut first = first.into_iter().flatten();
        for (index, name) in names.iter_mut().enumerate() {
            let answer = first.next().filter(|(host, _)| *host == name.host);
            name.failing = matches!(answer, Some((_, Err(_))));
            let wait = answer.map_or(Duration::ZERO, |(_, answer)| {
                // There was no cluster to count it before.
                mine.stats.update_attempt.inc();
                name.note(&answer, &mine, options).1
            });
            rounds.push(self.round(index, &name.host, options, wait, &cluster));
        }
        drop(mine);
        while let Some(Some((index, answer))) = rounds.next().await {
            let Some(mine) = self.in_use(&cluster) else { return };
            names[index].tell(&config.name, &answer);
            let (changed, wait) = names[index].note(&answer, &mine, options);
            if changed {
                self.clusters.set_endpoints(&config.name, &endpoints(&config, &names));
            }
            let host = names[index].host.clone();
            rounds.push(self.round(index, &host, options, wait, &cluster));
        }
    }

    /// Waits, and looks a name up; `None`: the cluster is not in use any more.
    fn round<'a>(
        &'a self,
        index: usize,
        host: &str,
        options: &'a DnsOptions,
        wait: Duration,
        cluster: &'a Weak<Cluster>,
    ) -> impl Future<Output = Option<(usize, io::Result<Answer>)>> + 'a {
        let host: Box<str> = host.into();
        async move {
            tokio::time::sleep(wait).await;
            self.in_use(cluster)?.stats.update_attempt.inc();
            Some((index, self.look_up(&host, options).await))
        }
    }

    /// The addresses of a name that is no cluster's own.
    pub(super) async fn ask(&self, host: &str, options: &DnsOptions) -> io::Result<Found> {
        let Answer { addresses, ttl } = self.look_up(host, options).await?;
        Ok(Found { addresses, ttl })
    }

    async fn look_up(&self, host: &str, options: &DnsOptions) -> io::Result<Answer> {
        self.resolvers.look_up(host, options.family, options.resolver.as_ref()).await
    }

    /// The cluster, where it has not been replaced or removed.
    fn in_use(&self, cluster: &Weak<Cluster>) -> Option<Arc<Cluster>> {
        let cluster = cluster.upgrade()?;
        let now = self.clusters.load().get(&cluster.config.name).map(Arc::clone)?;
        Arc::ptr_eq(&now, &cluster).then_some(cluster)
    }
}

impl Name {
    /// Takes an answer: whether it is another one.
    fn take(&mut self, answer: &Answer, logical: bool) -> bool {
        let addresses = answer.addresses.iter().map(|address| SocketAddr::new(*address, self.port));
        let mut addresses: Vec<_> = addresses.collect();
        if !logical {
            // Servers shuffle what they say, which only matters where the first address is the host's.
            addresses.sort();
        }
        let changed = addresses != self.addresses;
        self.addresses = addresses;
        changed
    }

    /// Says in the log when look-ups begin to fail, and when they do not any more.
    fn tell(&mut self, cluster: &str, answer: &io::Result<Answer>) {
        let (name, before) = (&self.host, std::mem::replace(&mut self.failing, answer.is_err()));
        match answer {
            Err(error) if before => tracing::debug!(%cluster, %name, %error, "DNS look-up failed again"),
            Err(error) => {
                tracing::warn!(%cluster, %name, %error, "DNS look-up failed; the last addresses stay in use");
            }
            Ok(_) if before => tracing::info!(%cluster, %name, "DNS look-ups succeed again"),
            Ok(_) => {}
        }
    }

    /// Takes an answer: whether it is another one, and how long it is good.
    fn note(&mut self, answer: &io::Result<Answer>, cluster: &Cluster, options: &DnsOptions) -> (bool, Duration) {
        let stats = &cluster.stats;
        let logical = matches!(cluster.config.discovery, Discovery::LogicalDns(_));
        match answer {
            // What a LOGICAL_DNS cluster had is better than nothing.
            Ok(answer) if !logical || !answer.addresses.is_empty() => {
                stats.update_success.inc();
                self.failures = 0;
                let changed = self.take(answer, logical);
                if !changed {
                    stats.update_no_rebuild.inc();
                }
                (changed, good_for(answer, options))
            }
            Ok(_) | Err(_) => {
                stats.update_failure.inc();
                let wait = after_failure(self.failures, options);
                self.failures = self.failures.saturating_add(1);
                (false, wait)
            }
        }
    }
}

/// How long an answer is good.
fn good_for(answer: &Answer, options: &DnsOptions) -> Duration {
    let ttl = answer.ttl.filter(|ttl| options.respect_ttl && !ttl.is_zero());
    let rate = ttl.map_or(options.refresh_rate, |ttl| ttl.max(options.min_ttl));
    let jitter = options.jitter.as_millis().try_into().unwrap_or(u64::MAX);
    let jitter = if jitter == 0 { 0 } else { fastrand::u64(..jitter) };
    rate.saturating_add(Duration::from_millis(jitter))
}

/// When to ask again after so many failures before this one.
pub(super) fn after_failure(failures: u32, options: &DnsOptions) -> Duration {
    let Some((base, max)) = options.failure_refresh else { return options.refresh_rate };
    let most = base.saturating_mul(2_u32.saturating_pow(failures)).min(max);
    most.mul_f64(fastrand::f64()).max(Duration::from_millis(1))
}

fn names_of(groups: &[LocalityEndpoints]) -> Vec<Name> {
    let endpoints = groups.iter().flat_map(|group| &group.endpoints);
    let names = endpoints.filter_map(|endpoint| match &endpoint.address {
        EndpointAddress::Dns { host, port } => {
            Some(Name { host: host.clone(), port: *port, addresses: Vec::new(), failures: 0, failing: false })
        }
        EndpointAddress::Ip(_) | EndpointAddress::Pipe(_) => None,
    });
    names.collect()
}

/// What a cluster's endpoints are, by what its names stand for: the names are in the order of its endpoints.
fn endpoints(config: &ClusterConfig, names: &[Name]) -> Vec<LocalityEndpoints> {
    let logical = matches!(config.discovery, Discovery::LogicalDns(_));
    let mut names = names.iter();
    let groups = config.endpoints.iter().map(|group| {
        let mut endpoints = Vec::with_capacity(group.endpoints.len());
        for endpoint in &group.endpoints {
            if !matches!(endpoint.address, EndpointAddress::Dns { .. }) {
                endpoints.push(endpoint.clone());
                continue;
            }
            let Some(Name { host, addresses, .. }) = names.next() else { break };
            let hostname = if endpoint.hostname.is_empty() { host } else { &endpoint.hostname };
            let at = |address: SocketAddr, also: &[SocketAddr]| Endpoint {
                address: EndpointAddress::Ip(address),
                additional_addresses: also.into(),
                hostname: hostname.clone(),
                ..endpoint.clone()
            };
            match &addresses[..] {
                [first, others @ ..] if logical => endpoints.push(at(*first, others)),
                addresses => endpoints.extend(addresses.iter().map(|address| at(*address, &[]))),
            }
        }
        // As in Envoy: there is only one host, whose priority says nothing.
        let priority = if logical { 0 } else { group.priority };
        LocalityEndpoints { endpoints, priority, ..group.clone() }
    });
    groups.collect()
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
