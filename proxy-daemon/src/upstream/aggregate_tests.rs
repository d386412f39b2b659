use std::net::Ipv4Addr;

use super::*;
use crate::{
    config::model::{
        ClusterConfig, Endpoint, EndpointAddress, HappyEyeballs, HealthOptions, HealthStatus, Http1ClientOptions,
        LbPolicy, LocalityEndpoints, PoolOptions, Thresholds, UpstreamProtocol,
    },
    upstream::Clusters,
};

fn cluster(name: &str, discovery: Discovery, endpoints: Vec<LocalityEndpoints>) -> ClusterConfig {
    ClusterConfig {
        name: name.into(),
        stat_name: name.to_owned(),
        lb_policy: if discovery.chooses_hosts() { LbPolicy::ClusterProvided } else { LbPolicy::RoundRobin },
        discovery,
        lb: LbOptions::default(),
        connect_timeout: std::time::Duration::from_secs(1),
        protocol: UpstreamProtocol::Http1,
        http1: Http1ClientOptions::default(),
        tracked: Default::default(),
        max_requests_per_connection: 0,
        max_stream_duration: None,
        idle_timeout: None,
        pool: PoolOptions::default(),
        circuit_breakers: [Thresholds::default(), Thresholds::default()],
        per_connection_buffer_limit_bytes: 0,
        tcp_keepalive: None,
        bind: None,
        happy_eyeballs: HappyEyeballs::default(),
        tls: None,
        health: HealthOptions::default(),
        reported_metrics: [].into(),
        socket_matches: Default::default(),
        peer_name: None,
        endpoints,
    }
}

fn aggregate(name: &str, members: &[&str]) -> ClusterConfig {
    let clusters = members.iter().map(|name| Arc::from(*name)).collect();
    cluster(name, Discovery::Aggregate { clusters }, Vec::new())
}

/// Hosts of a priority: 10.0.0.`number`, and how they are.
fn level(priority: u32, hosts: &[(u8, HealthStatus)]) -> LocalityEndpoints {
    let endpoint = |(number, health): &(u8, HealthStatus)| Endpoint {
        address: EndpointAddress::Ip((Ipv4Addr::new(10, 0, 0, *number), 80).into()),
        weight: 1,
        health: *health,
        hostname: Box::default(),
        details: None,
        additional_addresses: Box::default(),
    };
    LocalityEndpoints { priority, endpoints: hosts.iter().map(endpoint).collect(), ..LocalityEndpoints::default() }
}

const WELL: HealthStatus = HealthStatus::Healthy;
const ILL: HealthStatus = HealthStatus::Unhealthy;

struct Shared {
    clusters: Arc<Clusters>,
    worker: Rc<WorkerClusters>,
}

impl Shared {
    fn new(configs: Vec<ClusterConfig>) -> Shared {
        let clusters = Arc::new(Clusters::new(1));
        configs.into_iter().for_each(|config| clusters.upsert(config));
        Shared { worker: WorkerClusters::new(Arc::clone(&clusters), 0), clusters }
    }

    /// The clusters and the last numbers of the hosts that requests go to, with how many of 1,000 do.
    fn shares(&self, name: &str) -> Vec<(String, u8, u32)> {
        let mut shares: HashMap<(String, u8), u32> = HashMap::new();
        let cluster = self.worker.get(name).unwrap();
        for _ in 0..1000 {
            let Some(chosen) = cluster.choose(PickCx::default(), |_| None) else { continue };
            let EndpointAddress::Ip(address) = chosen.host.host.address else { panic!("no address") };
            let std::net::IpAddr::V4(ip) = address.ip() else { panic!("IPv6") };
            *shares.entry((chosen.cluster.cluster.config.name.to_string(), ip.octets()[3])).or_default() += 1;
        }
        let mut shares: Vec<_> = shares.into_iter().map(|((name, host), count)| (name, host, count)).collect();
        shares.sort();
        shares
    }

    fn hosts(&self, name: &str) -> Vec<(String, u8)> {
        self.shares(name).into_iter().map(|(name, host, _)| (name, host)).collect()
    }
}

#[test]
fn priorities_of_members_follow_each_other() {
    let shared = Shared::new(vec![
        aggregate("all", &["a", "unknown", "b"]),
        cluster("a", Discovery::Static, vec![level(0, &[(1, WELL), (2, ILL), (3, ILL)]), level(2, &[(4, WELL)])]),
        cluster("b", Discovery::Static, vec![level(0, &[(5, WELL)])]),
    ]);
    // The first priority can take 140 % of a third, the second one the rest.
    let shares = shared.shares("all");
    let [(a, 1, first), (also_a, 4, second)] = &shares[..] else { panic!("{shares:?}") };
    assert_eq!((&**a, &**also_a), ("a", "a"));
    assert!((380..540).contains(first) && first + second == 1000, "{shares:?}");
}

#[test]
fn members_come_go_and_change_while_requests_are_made() {
    let one = |number| vec![level(0, &[(number, WELL)])];
    let shared = Shared::new(vec![aggregate("all", &["a", "b"])]);
    assert!(shared.hosts("all").is_empty());
    shared.clusters.upsert(cluster("b", Discovery::Static, one(2)));
    assert_eq!(shared.hosts("all"), [("b".to_owned(), 2)]);
    shared.clusters.upsert(cluster("a", Discovery::Static, one(1)));
    assert_eq!(shared.hosts("all"), [("a".to_owned(), 1)]);
    shared.clusters.set_endpoints("a", &[level(0, &[(1, ILL)])]);
    assert_eq!(shared.hosts("all"), [("b".to_owned(), 2)]);
    shared.clusters.set_endpoints("a", &[level(0, &[(7, WELL)])]);
    assert_eq!(shared.hosts("all"), [("a".to_owned(), 7)]);
    shared.clusters.remove("a");
    assert_eq!(shared.hosts("all"), [("b".to_owned(), 2)]);
    shared.clusters.upsert(aggregate("all", &["c"]));
    assert!(shared.hosts("all").is_empty());
    shared.clusters.upsert(cluster("b", Discovery::Static, one(3)));
    assert!(shared.hosts("all").is_empty(), "it is of the aggregate no more");
}

#[test]
fn aggregates_within_aggregates_have_no_hosts() {
    let shared = Shared::new(vec![
        aggregate("outer", &["inner"]),
        aggregate("inner", &["outer", "inner", "a"]),
        cluster("a", Discovery::Static, vec![level(0, &[(1, WELL)])]),
    ]);
    assert!(shared.hosts("outer").is_empty());
    assert_eq!(shared.hosts("inner"), [("a".to_owned(), 1)]);
}

#[test]
fn a_member_that_panics_uses_all_its_hosts() {
    let shared = Shared::new(vec![
        aggregate("all", &["a", "b"]),
        cluster("a", Discovery::Static, vec![level(0, &[(1, ILL), (2, ILL)])]),
        cluster("b", Discovery::Static, vec![level(0, &[(3, ILL), (4, ILL)])]),
    ]);
    let hosts: Vec<_> = shared.hosts("all").into_iter().map(|(_, host)| host).collect();
    assert_eq!(hosts, [1, 2, 3, 4]);
}

#[test]
fn a_retry_goes_to_priorities_that_have_not_been() {
    let shared = Shared::new(vec![
        aggregate("all", &["a", "b"]),
        cluster("a", Discovery::Static, vec![level(0, &[(1, WELL)]), level(1, &[(2, WELL)])]),
        cluster("b", Discovery::Static, vec![level(0, &[(3, WELL)])]),
    ]);
    let (cluster, tried) = (shared.worker.get("all").unwrap(), TriedPriorities::new(1));
    let mut names = Vec::new();
    for _ in 0..4 {
        let chosen = cluster.choose(PickCx { tried: Some(&tried), ..PickCx::default() }, |_| None).unwrap();
        names.push(chosen.host.host.text.to_string());
        tried.add(cluster.priority_of(&chosen));
    }
    assert_eq!(names, ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.3:80", "10.0.0.1:80"]);
}
