//! Keeps the kernel's tables of balanced services as the clusters are.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use crate::{
    config::model::{
        ClusterChoice, EndpointAddress, FilterChain, FilterChainMatch, Listener, NetworkFilterConfig, SourceType,
    },
    intercept::{BalancedService, ConnectBalancing, Interception},
    listener::ActiveListener,
    upstream::{Cluster, ClusterMap},
};

/// How often clusters are looked at. A look at one that has not changed is a comparison.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long the start waits for clusters that have not come: what an earlier daemon left serves until then.
const PATIENCE: Duration = Duration::from_secs(5);
/// How soon what the kernel refused is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What the kernel is fed from.
pub(super) trait Plane: Send + Sync {
    /// Interception; `None` when it is over.
    fn with_interception(&self, work: &mut dyn FnMut(&Interception));
    fn clusters(&self) -> Arc<ClusterMap>;
    /// The listener that redirected connections go to.
    fn outbound(&self) -> Option<Arc<ActiveListener>>;
}

/// Follows the clusters until the data plane is gone.
pub(super) async fn follow<P: Plane>(plane: Weak<P>, config: ConnectBalancing) {
    let mut follower = Follower { config, known: HashMap::new(), found: None, begun: Instant::now(), serving: false };
    let mut tick = tokio::time::interval(INTERVAL);
    loop {
        tick.tick().await;
        let Some(plane) = plane.upgrade() else { return };
        follower.look(&*plane);
    }
}

struct Follower {
    config: ConnectBalancing,
    /// What each service was given.
    known: HashMap<BalancedService, Given>,
    /// The services of this version of the outbound listener.
    found: Option<(Weak<ActiveListener>, Vec<BalancedService>)>,
    begun: Instant,
    /// The programs are attached.
    serving: bool,
}

/// What a service was given last.
struct Given {
    cluster: Weak<Cluster>,
    version: u64,
    /// The kernel did not take it.
    failed: Option<Instant>,
}

impl Follower {
    fn look<P: Plane>(&mut self, plane: &P) {
        let (clusters, services) = (plane.clusters(), self.services(plane));
        let (mut due, mut missing) = (Vec::new(), false);
        for service in &services {
            let Some(cluster) = clusters.get(&service.cluster) else {
                missing = true;
                continue;
            };
            let version = cluster.hosts_version();
            let given = self.known.get(service);
            let same = given.is_some_and(|given| {
                given.version == version
                    && given.failed.is_none_or(|at| at.elapsed() < RETRY)
                    && given.cluster.upgrade().is_some_and(|known| Arc::ptr_eq(&known, cluster))
            });
            missing |= cluster.hosts().hosts.is_empty();
            if !same {
                due.push((service, cluster, version));
            }
        }
        let wanted: HashSet<&BalancedService> =
            services.iter().filter(|service| clusters.contains_key(&service.cluster)).collect();
        let gone: Vec<_> = self.known.keys().filter(|service| !wanted.contains(service)).cloned().collect();
        let starts = !self.serving && (!missing || self.begun.elapsed() > PATIENCE);
        if due.is_empty() && gone.is_empty() && !starts {
            return;
        }
        let known = &mut self.known;
        plane.with_interception(&mut |interception| {
            for service in &gone {
                known.remove(service);
                if let Err(error) = interception.remove_service(service) {
                    tracing::warn!(address = %service.address, %error, "a service is still balanced");
                }
            }
            for (service, cluster, version) in &due {
                let result = give(interception, service, cluster);
                if let Err(error) = &result {
                    tracing::error!(address = %service.address, cluster = &*service.cluster, error, "not balanced");
                }
                let failed = result.is_err().then(Instant::now);
                let given = Given { cluster: Arc::downgrade(cluster), version: *version, failed };
                known.insert((*service).clone(), given);
            }
            if starts {
                interception.balance();
            }
        });
        self.serving |= starts;
    }

    /// What is named, and what the outbound listener has.
    fn services<P: Plane>(&mut self, plane: &P) -> Vec<BalancedService> {
        let mut services = self.config.services.clone();
        if !self.config.tcp_proxies {
            return services;
        }
        let Some(listener) = plane.outbound() else { return services };
        let same =
            |(known, _): &&(Weak<ActiveListener>, _)| known.upgrade().is_some_and(|it| Arc::ptr_eq(&it, &listener));
        let found = match self.found.as_ref().filter(same) {
            Some((_, found)) => found.clone(),
            None => {
                let found = of_listener(&listener.config);
                self.found = Some((Arc::downgrade(&listener), found.clone()));
                found
            }
        };
        let named: HashSet<_> = services.iter().map(|service| (service.address, service.udp)).collect();
        services.extend(found.into_iter().filter(|service| !named.contains(&(service.address, false))));
        services
    }
}

/// Gives the kernel the hosts of a service's cluster.
fn give(interception: &Interception, service: &BalancedService, cluster: &Cluster) -> Result<(), String> {
    let refused = |why: &str| {
        // It goes its own way, through the daemon where it is intercepted.
        let removed = interception.remove_service(service).map_err(|error| error.to_string());
        removed.and_then(|()| Err(format!("the cluster {why}")))
    };
    if cluster.sockets.encrypted().next().is_some() {
        return refused("is encrypted");
    }
    let hosts = cluster.hosts();
    let Some(shares) = hosts.shares() else { return refused("chooses hosts by what requests say") };
    let shares: Vec<(SocketAddr, f64)> = shares
        .into_iter()
        .filter_map(|(host, share)| match &host.address {
            EndpointAddress::Ip(address) => Some((*address, share)),
            EndpointAddress::Dns { .. } | EndpointAddress::Pipe(_) => None,
        })
        .collect();
    interception.set_service(service, &shares).map_err(|error| error.to_string())
}

/// What of a listener the kernel can do: chains that match on one address and port, and have nothing but a TCP proxy that
/// does no more than choose a host.
fn of_listener(listener: &Listener) -> Vec<BalancedService> {
    if !listener.access_logs.is_empty() {
        return Vec::new();
    }
    listener.filter_chains.iter().flat_map(|chain| of_chain(chain)).collect()
}

fn of_chain(chain: &FilterChain) -> Vec<BalancedService> {
    let FilterChainMatch { destination_port: Some(port), prefix_ranges, .. } = &chain.chain_match else {
        return Vec::new();
    };
    let nothing_else = FilterChainMatch {
        destination_port: Some(*port),
        prefix_ranges: prefix_ranges.clone(),
        source_type: SourceType::default(),
        ..FilterChainMatch::default()
    };
    let [NetworkFilterConfig::TcpProxy(proxy)] = chain.filters.as_slice() else { return Vec::new() };
    let ClusterChoice::Cluster(cluster) = &proxy.cluster else { return Vec::new() };
    let plain = chain.tls.is_none()
        && proxy.metadata_match.is_none()
        && proxy.max_downstream_connection_duration.is_none()
        && proxy.hash_policy.is_empty()
        && proxy.access_logs.is_empty()
        && proxy.tunneling.is_none();
    let whole = |range: &crate::config::model::Cidr| range.prefix_len == if range.network.is_ipv4() { 32 } else { 128 };
    if !plain || chain.chain_match != nothing_else || !prefix_ranges.iter().all(whole) {
        return Vec::new();
    }
    let service = |range: &crate::config::model::Cidr| BalancedService {
        address: SocketAddr::new(range.network, *port),
        udp: false,
        cluster: Arc::clone(cluster),
    };
    prefix_ranges.iter().map(service).collect()
}
