//! Hosts of ORIGINAL_DST clusters. A worker that is asked for a destination which the cluster does not have makes a host of it, uses that
//! at once, and tells the control thread, which has it among the cluster's hosts, for all workers, as long as anybody uses it.

use std::{
    cell::RefCell,
    collections::HashMap,
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    rc::Rc,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::{Duration, Instant},
};

use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval_at, sleep},
};

use super::{
    Cluster, Clusters, HostSet,
    host::{Extras, Host, HostCounter, HostCounters},
    worker::WorkerHost,
};
use crate::config::model::{Discovery, EndpointAddress, HealthStatus, Locality};

/// How many destinations a cluster has at a time; a scan of the address space must not fill the memory.
const MAX_HOSTS: usize = 65_536;
/// No sweep comes earlier after the one before.
const MIN_INTERVAL: Duration = Duration::from_millis(1);
/// A set of many hosts takes a while to make: the control thread has this many times that for other things before the next one.
const REST: u32 = 10;

/// What the workers of one version of a cluster tell the control thread.
#[derive(Debug)]
pub(super) struct Destinations {
    news: mpsc::UnboundedSender<Arc<Host>>,
    /// Until the task has it.
    received: Mutex<Option<mpsc::UnboundedReceiver<Arc<Host>>>>,
    workers: usize,
}

impl Destinations {
    pub(super) fn new(workers: usize) -> Destinations {
        let (news, received) = mpsc::unbounded_channel();
        Destinations { news, received: Mutex::new(Some(received)), workers }
    }
}

/// Hosts that one worker has made, and that the cluster does not have yet.
#[derive(Default)]
pub(super) struct NewHosts(RefCell<HashMap<SocketAddr, New>>);

struct New {
    host: Rc<WorkerHost>,
    last_used: Instant,
}

impl NewHosts {
    /// The host at `destination`, which the cluster does not have.
    pub(super) fn host(&self, destination: SocketAddr, cluster: &Cluster, worker: usize) -> Option<Rc<WorkerHost>> {
        let now = Instant::now();
        let mut hosts = self.0.borrow_mut();
        if let Some(known) = hosts.get_mut(&destination) {
            known.last_used = now;
            return Some(Rc::clone(&known.host));
        }
        let destinations = cluster.destinations.as_ref()?;
        if hosts.len() >= MAX_HOSTS {
            let counters = Arc::clone(cluster.unlisted.as_ref()?);
            let host = WorkerHost::new(Arc::new(made(destination, cluster, counters)), worker);
            // Serves this one request, and its connection is not kept.
            host.retire();
            return Some(host);
        }
        let made = Arc::new(made(destination, cluster, Arc::new(HostCounters::new(destinations.workers))));
        // Nobody listens where the cluster has been replaced. There are never more of them than in the map.
        let _ = destinations.news.send(Arc::clone(&made));
        let host = WorkerHost::new(made, worker);
        hosts.insert(destination, New { host: Rc::clone(&host), last_used: now });
        Some(host)
    }

    /// What is this worker's of a destination that the cluster has by now.
    pub(super) fn take(&self, destination: SocketAddr) -> Option<Rc<WorkerHost>> {
        Some(self.0.borrow_mut().remove(&destination)?.host)
    }

    /// Lets go of hosts that the cluster has by now, which are told of, or that nobody has used for so long.
    pub(super) fn settle(&self, set: &HostSet, unused: Duration, mut has: impl FnMut(&Arc<Host>, Rc<WorkerHost>)) {
        let mut hosts = self.0.borrow_mut();
        hosts.retain(|destination, new| {
            if let Some(listed) = set.at(&EndpointAddress::Ip(*destination)) {
                has(listed, Rc::clone(&new.host));
                return false;
            }
            let keep = new.host.active() > 0 || new.last_used.elapsed() < unused;
            if !keep {
                new.host.retire();
            }
            keep
        });
        // What a burst has taken is given back.
        if hosts.is_empty() && hosts.capacity() > 0 {
            *hosts = HashMap::new();
        }
    }

    /// The cluster is gone.
    pub(super) fn retire(&self) {
        self.0.borrow().values().for_each(|new| new.host.retire());
    }
}

/// The destination that a header says. An address that is only good on one link may name the interface, as Envoy takes it.
pub(super) fn destination_of(text: &str) -> Option<SocketAddr> {
    text.parse().ok().or_else(|| {
        let (address, rest) = text.strip_prefix('[')?.split_once('%')?;
        let (interface, port) = rest.split_once("]:")?;
        let address: Ipv6Addr = address.parse().ok().filter(Ipv6Addr::is_unicast_link_local)?;
        let port = port.parse().ok().filter(|_| port.bytes().all(|byte| byte.is_ascii_digit()))?;
        let scope = nix::net::if_::if_nametoindex(interface).ok()?;
        Some(SocketAddrV6::new(address, port, 0, scope).into())
    })
}

fn made(destination: SocketAddr, cluster: &Cluster, counters: Arc<HostCounters>) -> Host {
    let address = EndpointAddress::Ip(destination);
    let text = Host::text_of(&address);
    Host {
        // As Envoy calls it.
        extras: Extras::new(format!("{}{text}", cluster.config.name).into(), Box::default(), None),
        text,
        address,
        weight: 1,
        said_weight: 1,
        health: HealthStatus::Unknown,
        socket: cluster.socket_of_new(),
        locality: Arc::new(Locality::default()),
        priority: 0,
        healthy_since: None,
        slot: 0,
        vitals: cluster.vitals_of_new(),
        counters,
    }
}

/// Takes up what workers find, and forgets what nobody uses, until the cluster is gone or replaced.
pub(crate) async fn watch(clusters: Weak<Clusters>, cluster: Weak<Cluster>) {
    let Some((mut received, unused)) = cluster.upgrade().and_then(|cluster| {
        let Discovery::OriginalDst { cleanup_interval, .. } = cluster.config.discovery else { return None };
        let received = &cluster.destinations.as_ref()?.received;
        let received = received.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some((received, cleanup_interval.max(MIN_INTERVAL)))
    }) else {
        return;
    };
    let now = tokio::time::Instant::now();
    // One that is too far in the future for the clock never comes.
    let first = now.checked_add(unused).unwrap_or_else(|| now + Duration::from_secs(86_400 * 365));
    let mut sweeps = interval_at(first, unused);
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut news, mut uses) = (Vec::new(), HashMap::new());
    loop {
        let sweeps_now = tokio::select! {
            count = received.recv_many(&mut news, usize::MAX) => {
                // All senders are gone with the cluster.
                if count == 0 {
                    return;
                }
                false
            }
            _ = sweeps.tick() => true,
        };
        let (Some(clusters), Some(cluster)) = (clusters.upgrade(), cluster.upgrade()) else { return };
        let began = Instant::now();
        let change = |set: &HostSet| {
            let mut keeps = |host: &Arc<Host>| !sweeps_now || is_used(host, &mut uses);
            let mut kept: Vec<_> = set.hosts.iter().filter(|host| keeps(host)).cloned().collect();
            let listed = kept.len();
            for host in news.drain(..) {
                if kept.len() < MAX_HOSTS && set.at(&host.address).is_none() {
                    kept.push(host);
                }
            }
            (listed != set.hosts.len() || kept.len() != listed).then_some((kept, listed))
        };
        if !clusters.set_destinations(&cluster, change) {
            return;
        }
        if sweeps_now {
            let set = cluster.hosts();
            uses.retain(|slot, _| set.in_slot(*slot as usize).is_some());
        }
        drop((clusters, cluster));
        sleep(began.elapsed() * REST).await;
    }
}

/// Whether a host has connections, or has been used since the last time. A new one has, as in Envoy. `uses`: by the hosts' slots.
fn is_used(host: &Host, uses: &mut HashMap<u32, u64>) -> bool {
    let sum = |counter| host.counters.sum(counter);
    let now = sum(HostCounter::RqTotal).wrapping_add(sum(HostCounter::CxTotal));
    let before = uses.insert(host.slot, now);
    before != Some(now) || sum(HostCounter::CxActive) > 0 || sum(HostCounter::RqActive) > 0
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::envoy::config::cluster::v3::Cluster as ProtoCluster;

    use super::*;
    use crate::{
        config::parse,
        upstream::{PickCx, WorkerClusters},
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn add(clusters: &Clusters, cleanup: &str) {
        let yaml = format!("{{name: o, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED, cleanup_interval: {cleanup}}}");
        let cluster: ProtoCluster = culvert_xds_client::json::from_yaml(&yaml).unwrap();
        clusters.upsert(parse::cluster(&cluster, "").unwrap());
    }

    fn at(port: u16) -> PickCx<'static> {
        PickCx { original_dst: Some(([10, 0, 0, 1], port).into()), ..PickCx::default() }
    }

    /// What the control thread has said by then.
    async fn listed(cluster: &Cluster, wanted: usize) {
        while cluster.hosts().hosts.len() != wanted {
            sleep(SECOND / 100).await;
        }
    }

    #[test]
    fn interfaces_are_named_where_an_address_needs_one() {
        let said = |text: &str| destination_of(text).map(|destination| destination.to_string());
        let lo = nix::net::if_::if_nametoindex("lo").unwrap();
        assert_eq!(said("[fe80::1%lo]:80"), Some(format!("[fe80::1%{lo}]:80")));
        assert_eq!(said("[fe80::1%7]:80"), Some("[fe80::1%7]:80".to_owned()));
        assert_eq!(said("[::1%9]:80"), Some("[::1%9]:80".to_owned()));
        assert_eq!(said("10.0.0.1:80"), Some("10.0.0.1:80".to_owned()));
        for wrong in [
            "[::1%lo]:80",
            "[fe80::1%]:80",
            "[fe80::1%nowhere]:80",
            "127.0.0.1%lo:80",
            "[fe80::1%lo]:+80",
            "[fe80::1%lo]",
        ] {
            assert_eq!(said(wrong), None, "{wrong}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn workers_share_the_hosts_that_they_find() {
        let clusters = Arc::new(Clusters::new(2));
        add(&clusters, "10s");
        let cluster = Arc::clone(&clusters.load()["o"]);
        let workers: Vec<_> = (0..2).map(|worker| WorkerClusters::new(Arc::clone(&clusters), worker)).collect();
        let pick = |worker: usize, port| workers[worker].get("o").unwrap().pick(&at(port)).unwrap();
        // Both find the first one before the control thread has heard of it, and each one of its own.
        let (one, other) = (pick(0, 1), pick(1, 1));
        assert!(!one.is(&other.host) && Rc::ptr_eq(&one, &pick(0, 1)));
        pick(0, 2);
        pick(1, 3);
        let watching = tokio::spawn(watch(Arc::downgrade(&clusters), Arc::downgrade(&cluster)));
        listed(&cluster, 3).await;
        for (port, pool) in [(1, &one.pool), (1, &pick(0, 1).pool)] {
            assert!(Rc::ptr_eq(&pick(0, port).pool, pool), "connections stay");
        }
        assert!(Rc::ptr_eq(&pick(1, 1).pool, &other.pool));
        assert!(pick(0, 1).is(&pick(1, 1).host), "it is one host now");
        assert!(pick(0, 3).is(&pick(1, 3).host), "one that only the other worker has found");
        let slots: std::collections::BTreeSet<_> = cluster.hosts().hosts.iter().map(|host| host.slot).collect();
        assert_eq!(slots, [0, 1, 2].into());
        // Two of them are used: a connection, and requests in between.
        pick(1, 2).count(HostCounter::CxActive, 1);
        for _ in 0..4 {
            sleep(SECOND * 6).await;
            pick(0, 3).count(HostCounter::RqTotal, 1);
        }
        assert!(cluster.hosts().at(&one.host.address).is_none());
        assert_eq!(cluster.hosts().hosts.len(), 2);
        workers.iter().for_each(|worker| worker.tick());
        assert!(one.pool.is_retired() && other.pool.is_retired());
        assert!(!pick(0, 2).pool.is_retired() && !pick(1, 3).pool.is_retired());
        pick(1, 2).count(HostCounter::CxActive, -1);
        listed(&cluster, 0).await;
        // It comes back as another one, in a slot that is free.
        assert!(!pick(0, 1).is(&one.host));
        listed(&cluster, 1).await;
        assert_eq!(cluster.hosts().by_slot, [0, u32::MAX, u32::MAX]);
        clusters.remove("o");
        watching.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_the_control_thread_does_not_take_is_forgotten() {
        let clusters = Arc::new(Clusters::new(1));
        add(&clusters, "0s");
        let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
        let host = worker.get("o").unwrap().pick(&at(1)).unwrap();
        host.begin_request();
        worker.tick();
        assert!(!host.pool.is_retired(), "it has a request");
        host.end_request();
        worker.tick();
        assert!(host.pool.is_retired());
        let again = worker.get("o").unwrap().pick(&at(1)).unwrap();
        assert!(!Rc::ptr_eq(&host, &again));
    }
}
