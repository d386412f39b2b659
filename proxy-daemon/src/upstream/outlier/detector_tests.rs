use tokio::sync::mpsc;

use super::*;
use crate::{
    config::model::{EndpointAddress, HealthStatus, Locality},
    layered_runtime::RuntimeInteger,
    stats::Scope,
    upstream::{HostCounters, Seen, outlier::monitor::Event},
};

fn number(default: u64) -> RuntimeInteger {
    RuntimeInteger { default, key: None }
}

/// Envoy's defaults, with half of the hosts to be ejected at most and everything enforced.
fn config() -> OutlierDetection {
    OutlierDetection {
        interval: number(10_000),
        base_ejection_time: number(30_000),
        max_ejection_time: number(100_000),
        max_ejection_time_jitter: number(0),
        max_ejection_percent: number(50),
        always_eject_one_host: false,
        detects_degraded: false,
        split_external_local_origin_errors: false,
        consecutive: [number(5), number(3), number(4)],
        enforcing: std::array::from_fn(|_| number(100)),
        success_rate_minimum_hosts: number(5),
        success_rate_request_volume: number(100),
        success_rate_stdev_factor: number(1900),
        failure_percentage_threshold: number(85),
        failure_percentage_minimum_hosts: number(5),
        failure_percentage_request_volume: number(50),
        successful_active_health_check_uneject_host: true,
    }
}

struct Bench {
    detector: Detector,
    hosts: Vec<Arc<Host>>,
    events: mpsc::UnboundedReceiver<Event>,
    start: Instant,
}

impl Bench {
    fn new(name: &str, config: OutlierDetection, hosts: u16) -> Bench {
        let (sender, events) = mpsc::unbounded_channel();
        let shared = Shared::new(Arc::new(config), sender, 2);
        let stats = OutlierStats::new(Scope::cluster(name));
        let host = |number: u16| {
            let address = EndpointAddress::Ip(([10, 0, 0, 1], number).into());
            Arc::new(Host {
                text: Host::text_of(&address),
                address,
                weight: 1,
                said_weight: 1,
                health: HealthStatus::Healthy,
                extras: None,
                socket: Default::default(),
                locality: Arc::new(Locality::default()),
                priority: 0,
                healthy_since: None,
                slot: number.into(),
                vitals: Some(Arc::new(Vitals::new(Some(Monitor::new(&shared))))),
                counters: Arc::new(HostCounters::new(2)),
            })
        };
        let hosts: Vec<_> = (0..hosts).map(host).collect();
        let mut detector = Detector::new(name.into(), shared, stats, None);
        detector.set_hosts(&hosts);
        Bench { detector, hosts, events, start: Instant::now() }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    /// Requests of both workers in turn.
    fn saw(&self, host: usize, seen: &[Seen]) {
        let vitals = self.hosts[host].vitals.as_ref().unwrap();
        seen.iter().enumerate().for_each(|(number, seen)| vitals.saw(number % 2, *seen));
    }

    /// What has been told is looked at: the number of events.
    fn look(&mut self, seconds: u64) -> usize {
        let (mut count, now) = (0, self.at(seconds));
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Consecutive(vitals, kind) => self.detector.consecutive(&vitals, kind, now),
                Event::Degraded(vitals) => self.detector.degraded(&vitals, now),
                Event::PassedCheck(_) | Event::Hosts => continue,
            };
            count += 1;
        }
        count
    }

    fn ejected(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|at| self.detector.hosts[*at].is_ejected()).collect()
    }

    fn rate(&self, host: usize) -> f64 {
        self.hosts[host].vitals.as_ref().unwrap().success_rate(false)
    }
}

const OK: Seen = Seen::Status(200);
const BAD: Seen = Seen::Status(500);

#[test]
fn failures_in_a_row_eject_whichever_worker_met_them() {
    let mut bench = Bench::new("od_row", config(), 4);
    bench.saw(0, &[BAD, BAD, BAD, BAD, OK, BAD, BAD, BAD, BAD]);
    assert_eq!(bench.look(0), 0);
    bench.saw(0, &[BAD, BAD, BAD]);
    assert_eq!((bench.look(0), bench.ejected()), (1, vec![0]));
    // Gateway failures have a row of their own, which any other answer ends.
    bench.saw(1, &[Seen::Status(503), Seen::ConnectFailed, BAD, Seen::Status(502), Seen::TimedOut(504)]);
    assert_eq!((bench.look(0), bench.ejected()), (1, vec![0, 1]), "five 5xx");
    let stats = &bench.detector.stats;
    assert_eq!(stats.detected(Ejection::ConsecutiveGatewayFailure).value(), 0);
    assert_eq!(stats.ejections_active.value(), 2);
    // No more than half of them.
    bench.saw(2, &[Seen::Status(503), Seen::Status(503), Seen::Status(503)]);
    assert_eq!((bench.look(0), bench.ejected()), (1, vec![0, 1]));
    let stats = &bench.detector.stats;
    assert_eq!(stats.ejections_overflow.value(), 1);
    assert_eq!(stats.detected(Ejection::ConsecutiveGatewayFailure).value(), 1);
    assert_eq!(stats.enforced(Ejection::ConsecutiveGatewayFailure).value(), 0);
    // What was told is told again only after a further row.
    bench.saw(2, &[Seen::Status(503), Seen::Status(503)]);
    assert_eq!(bench.look(0), 1, "five 5xx in a row");
}

#[test]
fn a_host_is_away_for_longer_each_time_up_to_a_limit() {
    let mut bench = Bench::new("od_backoff", config(), 2);
    let mut now = 0;
    for away in [30, 60, 90, 100, 100] {
        bench.saw(0, &[BAD; 5]);
        bench.look(now);
        assert_eq!(bench.ejected(), [0]);
        bench.detector.interval(bench.at(now + away - 1));
        assert_eq!(bench.ejected(), [0], "before {away} s");
        now += away;
        assert!(bench.detector.interval(bench.at(now)));
        assert_eq!(bench.ejected(), [0; 0]);
    }
    // Each interval without an ejection takes one off.
    for _ in 0..3 {
        now += 10;
        bench.detector.interval(bench.at(now));
    }
    assert_eq!(bench.detector.hosts[0].backoff, 2, "of five");
    assert_eq!(bench.detector.stats.ejections_active.value(), 0);
}

#[test]
fn the_success_rate_is_judged_by_mean_and_deviation() {
    let (average, threshold) = ejection_threshold([50.0, 100.0, 100.0, 100.0, 100.0].into_iter(), 1.9);
    assert_eq!((average, threshold), (90.0, 52.0));
    let mut bench = Bench::new("od_rate", config(), 6);
    for host in 0..5 {
        bench.saw(host, &[OK; 100]);
    }
    bench.saw(5, &[BAD; 4]);
    // Too few requests to be judged.
    bench.detector.interval(bench.at(10));
    assert_eq!((bench.ejected(), bench.rate(0), bench.rate(5)), (vec![], 100.0, -1.0));
    assert_eq!(bench.detector.averages[0], Some((100.0, 100.0)));
    for host in 0..5 {
        bench.saw(host, &[OK; 100]);
    }
    for _ in 0..50 {
        bench.saw(5, &[OK, BAD]);
    }
    bench.look(11);
    bench.detector.interval(bench.at(20));
    assert_eq!((bench.ejected(), bench.rate(5)), (vec![5], 50.0));
    let (average, threshold) = bench.detector.averages[0].unwrap();
    assert!((average - 550.0 / 6.0).abs() < 1e-9 && threshold < average && threshold > 50.0);
    assert_eq!(bench.detector.stats.enforced(Ejection::SuccessRate).value(), 1);
    // Nothing happens in the next interval, and nothing is said of it.
    bench.detector.interval(bench.at(30));
    assert_eq!((bench.rate(0), bench.detector.averages[0]), (-1.0, None));
}

#[test]
fn too_many_failures_eject_where_that_is_enforced() {
    let fails = |bench: &mut Bench| {
        for host in 0..4 {
            bench.saw(host, &[OK; 50]);
        }
        for _ in 0..8 {
            bench.saw(4, &[BAD, BAD, BAD, BAD, OK, BAD, BAD]);
        }
        bench.detector.interval(bench.at(10));
    };
    let mut bench = Bench::new("od_percentage", config(), 5);
    fails(&mut bench);
    assert_eq!(bench.ejected(), [4], "6 of 7 are 85.7 %");
    let mut enforcing = config().enforcing;
    enforcing[Ejection::FailurePercentage as usize] = number(0);
    let mut bench = Bench::new("od_percentage_off", OutlierDetection { enforcing, ..config() }, 5);
    fails(&mut bench);
    assert_eq!(bench.ejected(), [0; 0]);
    let stats = &bench.detector.stats;
    assert_eq!(stats.detected(Ejection::FailurePercentage).value(), 1);
    assert_eq!(stats.enforced(Ejection::FailurePercentage).value(), 0);
}

#[test]
fn connections_are_counted_apart_where_that_is_wanted() {
    let split = OutlierDetection { split_external_local_origin_errors: true, ..config() };
    let mut bench = Bench::new("od_split", split, 2);
    bench.saw(0, &[Seen::ConnectFailed, Seen::TimedOut(504), Seen::ConnectFailed, Seen::Connected]);
    bench.saw(0, &[BAD, BAD, BAD, BAD]);
    assert_eq!(bench.look(0), 0);
    bench.saw(0, &[Seen::ConnectFailed, Seen::ConnectFailed, Seen::TimedOut(504), Seen::ConnectFailed]);
    assert_eq!((bench.look(0), bench.ejected()), (1, vec![0]));
    let stats = &bench.detector.stats;
    assert_eq!(stats.enforced(Ejection::ConsecutiveLocalOriginFailure).value(), 1);
    // Without, all of it is one row, and a connection alone says nothing.
    let mut bench = Bench::new("od_joined", config(), 2);
    bench.saw(0, &[BAD, Seen::ConnectFailed, Seen::Connected, BAD, BAD, BAD]);
    assert_eq!((bench.look(0), bench.ejected()), (1, vec![0]));
    bench.saw(1, &[BAD, BAD, BAD, BAD, Seen::ConnectedOnly, BAD]);
    assert_eq!(bench.look(0), 0, "it is all that a TCP proxy says of a host");
}

#[test]
fn one_host_may_be_ejected_whatever_the_percentage() {
    let few = OutlierDetection { max_ejection_percent: number(1), ..config() };
    let mut bench = Bench::new("od_few", few.clone(), 3);
    bench.saw(0, &[BAD; 5]);
    bench.look(0);
    assert_eq!(bench.ejected(), [0; 0]);
    let mut bench = Bench::new("od_one", OutlierDetection { always_eject_one_host: true, ..few }, 3);
    bench.saw(0, &[BAD; 5]);
    bench.saw(1, &[BAD; 5]);
    bench.look(0);
    assert_eq!(bench.ejected(), [0]);
}

#[test]
fn hosts_that_leave_are_counted_no_more() {
    let mut bench = Bench::new("od_leave", config(), 3);
    bench.saw(0, &[BAD; 5]);
    bench.look(0);
    let gauge = bench.detector.stats.ejections_active;
    assert_eq!(gauge.value(), 1);
    let left = bench.hosts.split_off(1);
    bench.detector.set_hosts(&left);
    assert_eq!((gauge.value(), bench.detector.ejected), (0, 0));
    // A word about one that is gone comes too late.
    bench.saw(0, &[OK]);
    bench.saw(0, &[BAD; 5]);
    bench.look(1);
    assert_eq!(gauge.value(), 0);
}

#[test]
fn an_active_check_brings_a_host_back() {
    let mut bench = Bench::new("od_checked", config(), 2);
    bench.saw(0, &[BAD; 5]);
    bench.look(0);
    let vitals = Arc::clone(bench.hosts[0].vitals.as_ref().unwrap());
    vitals.set(HealthFlag::FailedActiveHc, true);
    assert!(!bench.detector.passed_check(&vitals, bench.at(1)), "it is not well yet");
    vitals.set(HealthFlag::FailedActiveHc, false);
    assert!(bench.detector.passed_check(&vitals, bench.at(1)));
    assert_eq!(bench.ejected(), [0; 0]);
}

#[test]
fn a_host_that_wants_to_be_used_last_is_for_a_while() {
    let mut bench = Bench::new("od_degraded", OutlierDetection { detects_degraded: true, ..config() }, 2);
    let degraded = |bench: &Bench| bench.hosts[0].vitals.as_ref().unwrap().has(HealthFlag::DegradedOutlier);
    let says = |bench: &Bench, status| {
        let headers = http::HeaderMap::from_iter([("x-envoy-degraded".parse().unwrap(), "1".parse().unwrap())]);
        bench.hosts[0].vitals.as_ref().unwrap().heard(status, &headers);
    };
    says(&bench, 503);
    assert_eq!(bench.look(0), 0, "it fails");
    let mut now = 0;
    for (times, last) in [30, 60, 90, 100, 100].into_iter().enumerate() {
        says(&bench, 404);
        says(&bench, 200);
        assert_eq!(bench.look(now), 1, "it is told once");
        assert!(degraded(&bench) && bench.ejected().is_empty());
        says(&bench, 200);
        assert_eq!(bench.look(now), 0, "it is known");
        assert!(!bench.detector.interval(bench.at(now + last - 1)));
        assert!(bench.detector.interval(bench.at(now + last)));
        assert!(!degraded(&bench));
        now += last;
        assert_eq!(bench.detector.stats.ejections_detected_degradation.value(), times as u64 + 1);
    }
    assert_eq!(bench.detector.stats.ejections_active.value(), 0);
    // Each interval in peace takes one off the times.
    for _ in 0..10 {
        now += 10;
        bench.detector.interval(bench.at(now));
    }
    says(&bench, 200);
    bench.look(now);
    assert!(bench.detector.interval(bench.at(now + 30)));
}
