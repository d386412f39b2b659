use std::{collections::HashMap, time::Instant};

use envoy_types::pb::envoy::config::{cluster::v3::Cluster as ProtoCluster, endpoint::v3::ClusterLoadAssignment};

use super::*;
use crate::config::model::{
    DnsOptions, Endpoint, EndpointAddress, EndpointCheck, EndpointDetails, HealthOptions, HealthStatus, SocketMatch,
    SocketMatches,
};
use crate::config::parse;
use crate::upstream::{PickCx, Standing, WorkerClusters};
use crate::{
    config::model::{
        HappyEyeballs, Http1ClientOptions, LbOptions, LbPolicy, LeastRequest, PoolOptions, Thresholds, UpstreamProtocol,
    },
    layered_runtime::{Layer, LayerSource, Runtime},
};

fn cluster(name: &str) -> ClusterConfig {
    ClusterConfig {
        name: name.into(),
        stat_name: name.to_owned(),
        discovery: Discovery::Static,
        lb_policy: LbPolicy::RoundRobin,
        lb: LbOptions::default(),
        reported_metrics: [].into(),
        socket_matches: Default::default(),
        peer_name: None,
        connect_timeout: std::time::Duration::from_secs(1),
        protocol: UpstreamProtocol::Http1,
        http1: Http1ClientOptions::default(),
        tracked: Default::default(),
        max_requests_per_connection: 0,
        max_stream_duration: None,
        idle_timeout: None,
        pool: PoolOptions::default(),
        circuit_breakers: [Thresholds { max_requests: 7, ..Thresholds::default() }, Thresholds::default()],
        per_connection_buffer_limit_bytes: 0,
        tcp_keepalive: None,
        bind: None,
        happy_eyeballs: HappyEyeballs::default(),
        tls: None,
        health: HealthOptions::default(),
        endpoints: Vec::new(),
    }
}

#[test]
fn limits_follow_runtime_values() {
    let runtime = Runtime::start(vec![Layer { name: "a".to_owned(), source: LayerSource::Admin }]).unwrap();
    let clusters = Arc::new(Clusters::new(1));
    clusters.follow_runtime();
    clusters.upsert(cluster("a.b"));
    let limits = |name: &str| {
        let cluster = clusters.load()[name].clone();
        (cluster.limits(false).max_requests(), cluster.limits(true).max_retries(), cluster.refuses_for_maintenance())
    };
    assert_eq!(limits("a.b"), (7, 3, false));
    let set = |values: &[(&str, &str)]| runtime.modify(values.iter().copied()).unwrap();
    set(&[
        ("circuit_breakers.a.b.default.max_requests", "1"),
        ("circuit_breakers.a.b.high.max_retries", "99999999999"),
        ("circuit_breakers.later.default.max_requests", "2"),
        ("upstream.maintenance_mode.a.b", "100"),
    ]);
    assert_eq!(limits("a.b"), (1, u32::MAX, true));
    clusters.upsert(cluster("later"));
    assert_eq!(limits("later"), (2, 3, false), "a cluster that comes later");
    set(&[
        ("circuit_breakers.a.b.default.max_requests", "many"),
        ("circuit_breakers.a.b.high.max_retries", ""),
        ("upstream.maintenance_mode.a.b", ""),
    ]);
    assert_eq!(limits("a.b"), (7, 3, false));
}

fn endpoint(number: u32, weight: u32, health: HealthStatus) -> Endpoint {
    let ip = std::net::Ipv4Addr::from_bits(0x0a00_0000 + number);
    Endpoint {
        address: EndpointAddress::Ip((ip, 80).into()),
        weight,
        health,
        hostname: Box::default(),
        details: None,
        additional_addresses: Box::default(),
    }
}

fn group(numbers: impl IntoIterator<Item = u32>) -> LocalityEndpoints {
    let endpoints = numbers.into_iter().map(|number| endpoint(number, 1, HealthStatus::Healthy)).collect();
    LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }
}

#[test]
fn a_host_that_stays_keeps_its_slot_and_others_share_what_is_free() {
    let clusters = Clusters::new(1);
    clusters.upsert(ClusterConfig { endpoints: vec![group(0..4)], ..cluster("a") });
    let hosts = || clusters.load()["a"].hosts();
    let slots = |set: &HostSet| set.hosts.iter().map(|host| host.slot).collect::<Vec<_>>();
    let before = hosts();
    assert_eq!(slots(&before), [0, 1, 2, 3]);
    clusters.set_endpoints("a", &[group([3, 7, 1, 8, 9])]);
    let after = hosts();
    assert_eq!(slots(&after), [3, 0, 1, 2, 4]);
    assert!(Arc::ptr_eq(&before.hosts[3], &after.hosts[0]), "it is as it was");
    for host in &after.hosts {
        assert!(Arc::ptr_eq(after.in_slot(host.slot as usize).unwrap(), host));
    }
    let mut one = group([3]);
    one.endpoints[0].weight = 5;
    clusters.set_endpoints("a", &[one]);
    let last = hosts();
    assert!(Arc::ptr_eq(&last.hosts[0].counters, &before.hosts[3].counters), "it is the same with another weight");
    assert_eq!((slots(&last), last.in_slot(0).is_none()), (vec![3], true));
}

#[test]
fn a_worker_keeps_what_stays_and_lets_go_of_the_rest() {
    let clusters = Arc::new(Clusters::new(1));
    clusters.upsert(ClusterConfig { endpoints: vec![group(0..3)], ..cluster("a") });
    let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
    let mine = worker.get("a").unwrap();
    let pick = || mine.pick(&PickCx::default()).unwrap();
    let first: HashMap<_, _> = (0..3).map(|_| pick()).map(|host| (host.host.text.clone(), host)).collect();
    assert_eq!(first.len(), 3, "in turn");
    clusters.set_endpoints("a", &[group([2, 5])]);
    let hosts: HashMap<_, _> = (0..2).map(|_| pick()).map(|host| (host.host.text.clone(), host)).collect();
    let (stays, comes) = (&hosts["10.0.0.2:80"], &hosts["10.0.0.5:80"]);
    assert!(std::rc::Rc::ptr_eq(stays, &first["10.0.0.2:80"]));
    assert!(first.values().all(|old| !std::rc::Rc::ptr_eq(old, comes)));
    clusters.set_endpoints("a", &[]);
    assert!(mine.pick(&PickCx::default()).is_none());
}

#[tokio::test]
async fn what_a_worker_has_of_many_hosts_moves_little_by_little() {
    let tasks = tokio::task::LocalSet::new();
    tasks.run_until(many_hosts_move()).await;
}

async fn many_hosts_move() {
    let clusters = Arc::new(Clusters::new(1));
    clusters.upsert(ClusterConfig { endpoints: vec![group(0..1000)], ..cluster("a") });
    let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
    let mine = worker.get("a").unwrap();
    let at = |number: u32| mine.host_at(&format!("{}:80", std::net::Ipv4Addr::from_bits(0x0a00_0000 + number)));
    let first: Vec<_> = (0..1000).map(|number| at(number).unwrap()).collect();
    first[10].begin_request();
    first[990].begin_request();
    // Every second one stays, and all of those have other weights; others come into the slots of those that go.
    let endpoints = |weight: u32| -> Vec<_> {
        let stay = (0..1000).step_by(2).map(|number| endpoint(number, weight, HealthStatus::Healthy));
        let come = (2000..2100).map(|number| endpoint(number, 1, HealthStatus::Healthy));
        vec![LocalityEndpoints { endpoints: stay.chain(come).collect(), ..LocalityEndpoints::default() }]
    };
    let same = |number: u32| std::rc::Rc::ptr_eq(&at(number).unwrap().pool, &first[number as usize].pool);
    for weight in 2..12 {
        // More often than anything is moved in between.
        clusters.set_endpoints("a", &endpoints(weight));
        assert!(at(11).is_none() && at(2011).is_some(), "the new hosts are those to choose from at once");
        let (host, other) = (at(10).unwrap(), at(990).unwrap());
        assert!(same(10) && same(990));
        assert_eq!((host.host.weight, host.active(), other.active()), (weight, 1, 1), "as it is now, with its load");
    }
    assert!(mine.settles(), "what is left is gone through by a task");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(!mine.settles());
    assert!((0..1000).step_by(2).all(same));
    let retired: Vec<_> = (0..1000).filter(|number| first[*number as usize].pool.is_retired()).collect();
    assert_eq!(retired, (1..1000).step_by(2).collect::<Vec<u32>>());
}

#[test]
fn a_hundred_thousand_hosts_are_no_trouble() {
    const HOSTS: u32 = 100_000;
    let clusters = Arc::new(Clusters::new(1));
    let policies = [
        LbPolicy::RoundRobin,
        LbPolicy::Random,
        LbPolicy::LeastRequest(LeastRequest::default()),
        LbPolicy::PickFirst { shuffle: false },
    ];
    for policy in policies {
        clusters.upsert(ClusterConfig { lb_policy: policy.clone(), endpoints: vec![group(0..HOSTS)], ..cluster("a") });
        let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
        let mine = worker.get("a").unwrap();
        // Few enough to be let go of at once.
        for _ in 0..50 {
            mine.pick(&PickCx::default()).unwrap();
        }
        let bytes = mine.bytes();
        assert!(bytes <= 16 * HOSTS as usize, "{policy:?}: {bytes} bytes");
        // All of them are replaced.
        clusters.set_endpoints("a", &[group(HOSTS..2 * HOSTS)]);
        let host = mine.pick(&PickCx::default()).unwrap();
        assert!(host.host.slot < HOSTS, "slots are used again");
        assert!(mine.bytes() <= 16 * HOSTS as usize);
    }
}

#[test]
fn a_slow_start_ends_in_turns_by_weight() {
    let clusters = Arc::new(Clusters::new(1));
    let window = std::time::Duration::from_millis(20);
    let aggression = crate::layered_runtime::RuntimeNumber { default: 1.0, key: None };
    let slow_start = Some(crate::config::model::SlowStart { window, aggression, min_weight: 0.1 });
    let endpoints =
        [1, 1, 2, 2].iter().zip(0..).map(|(weight, number)| endpoint(number, *weight, HealthStatus::Healthy)).collect();
    let groups = vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }];
    let lb = LbOptions { slow_start, ..LbOptions::default() };
    clusters.upsert(ClusterConfig { endpoints: groups, lb, ..cluster("a") });
    let mine = WorkerClusters::new(clusters, 0).get("a").unwrap();
    let begun = Instant::now();
    let mut heavy = [0, 0];
    while begun.elapsed() < 3 * window {
        mine.pick(&PickCx::default()).unwrap();
    }
    for _ in 0..600 {
        heavy[usize::from(mine.pick(&PickCx::default()).unwrap().host.weight == 2)] += 1;
    }
    assert!((398..=402).contains(&heavy[1]), "{heavy:?}");
}

#[test]
fn weights_of_few_kinds_cost_little() {
    let bytes = heavy_hosts_get_their_share(LbPolicy::RoundRobin, 2);
    assert!(bytes <= 9, "{bytes}");
}

#[test]
fn the_least_busy_of_many_hosts_are_found_by_their_weights() {
    // Nobody has anything to do.
    let bytes = heavy_hosts_get_their_share(LbPolicy::LeastRequest(LeastRequest::default()), 2);
    assert!(bytes <= 9, "{bytes}");
}

#[test]
fn of_many_hosts_those_with_more_to_do_get_less() {
    const HOSTS: u32 = 2_000;
    let clusters = Arc::new(Clusters::new(1));
    let endpoints = (0..HOSTS).map(|number| endpoint(number, 1 + number % 2 * 2, HealthStatus::Healthy)).collect();
    let groups = vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }];
    let lb_policy = LbPolicy::LeastRequest(LeastRequest::default());
    clusters.upsert(ClusterConfig { endpoints: groups, lb_policy, ..cluster("a") });
    let mine = WorkerClusters::new(clusters, 0).get("a").unwrap();
    // Each has one request for each of its weight, and half of them have ten.
    let busy = |host: &Host| host.slot % 4 < 2;
    for host in &mine.cluster.hosts().hosts {
        let requests = if busy(host) { 10 * host.weight } else { host.weight };
        let host = mine.host_at(host.display()).unwrap();
        (0..requests).for_each(|_| host.begin_request());
    }
    let picks = (0..HOSTS).map(|_| mine.pick(&PickCx::default()).unwrap());
    let to_busy = picks.filter(|mine| busy(&mine.host)).count();
    // By weight alone half of them, and by the better of two a quarter.
    assert!((400..600).contains(&to_busy), "{to_busy}");
}

/// Hosts that have nothing to do are not chosen for that alone.
#[test]
fn of_many_hosts_idle_light_ones_get_little() {
    const HOSTS: u32 = 2_000;
    let clusters = Arc::new(Clusters::new(1));
    let endpoints = (0..HOSTS).map(|number| endpoint(number, 1 + number % 2 * 99, HealthStatus::Healthy)).collect();
    let groups = vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }];
    let lb_policy = LbPolicy::LeastRequest(LeastRequest::default());
    clusters.upsert(ClusterConfig { endpoints: groups, lb_policy, ..cluster("a") });
    let mine = WorkerClusters::new(clusters, 0).get("a").unwrap();
    for host in mine.cluster.hosts().hosts.iter().filter(|host| host.weight == 100) {
        let host = mine.host_at(host.display()).unwrap();
        (0..5).for_each(|_| host.begin_request());
    }
    let picks = (0..10 * HOSTS).map(|_| mine.pick(&PickCx::default()).unwrap());
    let light = picks.filter(|mine| mine.host.weight == 1).count();
    // By weight alone one of a hundred, and twice that where the better one of two is light. By Envoy's arithmetic, in which a light host is
    // worth 1 and a heavy one 100 / 6, it would be one of eighteen.
    assert!((1..HOSTS as usize / 2).contains(&light), "{light} of {}", 10 * HOSTS);
}

/// Each second host has three times the weight of the others, and so many picks more or less than its share. Returns what a worker keeps
/// for each host, in bytes.
fn heavy_hosts_get_their_share(lb_policy: LbPolicy, chance: u32) -> usize {
    const HOSTS: u32 = 10_000;
    let clusters = Arc::new(Clusters::new(1));
    let endpoints = (0..HOSTS).map(|number| endpoint(number, 1 + number % 2 * 2, HealthStatus::Healthy)).collect();
    let groups = vec![LocalityEndpoints { endpoints, ..LocalityEndpoints::default() }];
    clusters.upsert(ClusterConfig { endpoints: groups, lb_policy, ..cluster("a") });
    let mine = WorkerClusters::new(clusters, 0).get("a").unwrap();
    let mut heavy = 0;
    for _ in 0..2 * HOSTS {
        heavy += u32::from(mine.pick(&PickCx::default()).unwrap().host.weight == 3);
    }
    // Three of four.
    assert!(heavy.abs_diff(HOSTS / 2 * 3) <= chance, "{heavy}");
    mine.bytes() / HOSTS as usize
}

#[test]
fn pick_first_leaves_a_host_that_cannot_be_connected_to() {
    let clusters = Arc::new(Clusters::new(1));
    let policy = LbPolicy::PickFirst { shuffle: false };
    clusters.upsert(ClusterConfig { lb_policy: policy, endpoints: vec![group([1, 2, 3])], ..cluster("first") });
    let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
    let pick = || worker.get("first").unwrap().pick(&PickCx::default()).unwrap();
    let stays = |number| (0..3).for_each(|_| assert_eq!(pick().host.display(), format!("10.0.0.{number}:80")));
    for number in [1, 2, 3, 1] {
        stays(number);
        pick().connect_failed();
    }
    stays(2);
    // One that was connected to after all.
    pick().connect_failed();
    clusters.load()["first"].hosts().hosts.iter().for_each(|host| assert_eq!(host.weight, 1));
    stays(3);
    clusters.set_endpoints("first", &[group([1, 2, 3, 4])]);
    stays(1);
}

/// With the endpoints, how each is checked: where discovery says nothing of a new version, what it said last is still true.
#[tokio::test]
async fn a_cluster_that_keeps_its_hosts_checks_them_as_before() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let (secrets, clusters) = (Arc::default(), Arc::new(Clusters::new(1)));
    // It listens nowhere, and is checked elsewhere.
    let yaml = format!(
        "{{cluster_name: checked, endpoints: [{{lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, \
         port_value: 1}}}}, health_check_config: {{port_value: {}}}}}}}]}}]}}",
        listener.local_addr().unwrap().port()
    );
    let assignment: ClusterLoadAssignment = culvert_xds_client::json::from_yaml(&yaml).unwrap();
    let endpoints: Arc<[LocalityEndpoints]> = parse::endpoints(&assignment, "").unwrap().into();
    let version = |timeout: &str| {
        let yaml = format!(
            "{{name: checked, type: EDS, eds_cluster_config: {{eds_config: {{ads: {{}}}}}}, connect_timeout: {timeout}, health_checks: \
             [{{timeout: 5s, interval: 0.05s, no_traffic_interval: 0.05s, unhealthy_threshold: 1, healthy_threshold: 1, \
             tcp_health_check: {{}}}}]}}"
        );
        let config: ProtoCluster = culvert_xds_client::json::from_yaml(&yaml).unwrap();
        parse::cluster(&config, "").unwrap()
    };
    let is_well = async || {
        let host = Arc::clone(&clusters.load()["checked"].hosts().hosts[0]);
        let well = async {
            while host.standing() != Standing::Healthy {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(30), well).await.is_ok()
    };
    for (timeout, said) in [("1s", Some(Arc::clone(&endpoints))), ("2s", None)] {
        let config = version(timeout);
        let begun = said.clone().unwrap_or_default();
        let checks = ClusterChecks::start(&config, &begun, &clusters, &secrets, None);
        clusters.change(vec![ClusterChange::Upsert(Box::new(config), said, checks)]);
        assert!(is_well().await, "{timeout}");
    }
}

#[test]
fn hosts_whose_cluster_is_replaced_keep_what_is_said_of_them() {
    let labels = |value: &str| serde_json::Map::from_iter([("tls".to_owned(), value.into())]);
    let matches = |value: &str| {
        let one = SocketMatch { name: value.into(), labels: labels(value), tls: None };
        SocketMatches(Arc::new([SocketMatch { name: "other".into(), labels: labels("other"), tls: None }, one]))
    };
    let dns = |value: &str| ClusterConfig {
        discovery: Discovery::StrictDns(DnsOptions::default()),
        socket_matches: matches(value),
        peer_name: None,
        ..cluster("a")
    };
    let details = EndpointDetails {
        socket_labels: Some(labels("on")),
        check: Some(EndpointCheck { disabled: true, ..EndpointCheck::default() }),
        ..EndpointDetails::default()
    };
    let host = Endpoint { details: Some(Arc::new(details)), ..endpoint(1, 1, HealthStatus::Healthy) };
    let found = LocalityEndpoints { endpoints: vec![host], ..LocalityEndpoints::default() };
    let clusters = Clusters::new(1);
    clusters.upsert(dns("off"));
    assert!(clusters.set_endpoints("a", &[found]));
    let host = || Arc::clone(&clusters.load()["a"].hosts().hosts[0]);
    assert_eq!(host().socket, SocketIndex(0), "none fits");
    // Nothing is looked up between.
    clusters.upsert(dns("on"));
    assert_eq!(host().socket, SocketIndex(2));
    assert!(host().details().and_then(|details| details.check.as_ref()).is_some_and(|check| check.disabled));
}

#[test]
fn the_membership_changes_once_for_each_priority() {
    let at = |priority, numbers: std::ops::Range<u32>| LocalityEndpoints { priority, ..group(numbers) };
    let clusters = Clusters::new(1);
    let config = ClusterConfig { endpoints: vec![at(0, 0..2), at(1, 2..3), at(2, 0..0)], ..cluster("members") };
    let dns = ClusterConfig { discovery: Discovery::StrictDns(DnsOptions::default()), ..cluster("members") };
    clusters.upsert(config);
    let mut before = 0;
    let mut more = || {
        let count = clusters.load()["members"].stats.membership_change.value();
        count - std::mem::replace(&mut before, count)
    };
    assert_eq!(more(), 2, "a priority without hosts has no change");
    clusters.upsert(dns);
    assert_eq!(more(), 0);
    let mut set = |groups: &[LocalityEndpoints]| {
        assert!(clusters.set_endpoints("members", groups));
        more()
    };
    assert_eq!(set(&[at(0, 0..2), at(1, 2..3)]), 2);
    assert_eq!(clusters.load()["members"].stats.max_host_weight.value(), 1);
    assert_eq!(set(&[at(0, 0..2), at(1, 2..4)]), 1);
    assert_eq!(set(&[at(0, 0..2), at(1, 2..4)]), 0, "they are the same");
    assert_eq!(set(&[at(0, 0..1), at(1, 1..4)]), 2, "one has moved");
    assert_eq!(set(&[]), 2);
}

#[test]
fn counters_that_clients_name_are_bounded_over_all_versions_of_a_cluster() {
    let clusters = Arc::new(Clusters::new(1));
    let worker = WorkerClusters::new(Arc::clone(&clusters), 0);
    for (version, most) in [(1, 2), (2, 2), (3, 2)] {
        clusters.upsert(ClusterConfig { max_requests_per_connection: version, ..cluster("a") });
        let of_version = |method: &str| {
            let cluster = worker.get("a").unwrap();
            cluster.counter_within(&format!("grpc.{method}{version}.total"), most).is_some()
        };
        assert_eq!((of_version("x"), of_version("y"), of_version("z")), (version == 1, version == 1, false));
    }
}
