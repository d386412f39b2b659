use envoy_types::pb::envoy::config::{cluster::v3::Cluster as ProtoCluster, endpoint::v3::ClusterLoadAssignment};

use super::*;
use crate::{config::parse, upstream::Clusters};

const WORKERS: usize = 2;

fn clusters(names: &[&str]) -> Clusters {
    let clusters = Clusters::new(WORKERS);
    names.iter().for_each(|name| add(&clusters, name));
    clusters
}

fn message<M: prost::Message + prost::Name + Default>(yaml: &str) -> M {
    culvert_xds_client::json::from_yaml(yaml).unwrap()
}

/// A STATIC cluster of two localities of which the second has two endpoints, and one of priority 1.
fn add(clusters: &Clusters, name: &str) {
    let yaml = format!(
        r#"
name: {name}
type: STATIC
load_assignment:
  cluster_name: {name}
  endpoints:
  - locality: {{region: r, zone: b}}
    lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 1}}}}}}}}]
  - locality: {{region: r, zone: a, sub_zone: s}}
    lb_endpoints:
    - {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 2}}}}}}}}
    - {{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 3}}}}}}}}
  - locality: {{region: r, zone: a, sub_zone: s}}
    priority: 1
    lb_endpoints: [{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: 4}}}}}}}}]
"#
    );
    clusters.upsert(parse::cluster(&message::<ProtoCluster>(&yaml), "").unwrap());
}

fn counters(clusters: &Clusters, name: &str, port: u16) -> Arc<HostCounters> {
    let hosts = clusters.load()[name].hosts();
    let host = hosts.hosts.iter().find(|host| host.text.ends_with(&format!(":{port}"))).unwrap();
    Arc::clone(&host.counters)
}

/// What a worker counts for a request that came to an end.
fn request(counters: &HostCounters, worker: usize, end: HostCounter) {
    counters.add(worker, HostCounter::RqTotal, 1);
    counters.add(worker, end, 1);
}

fn all(interval_ms: i32) -> LoadStatsResponse {
    let interval = ProtoDuration { seconds: 0, nanos: interval_ms * 1_000_000 };
    LoadStatsResponse {
        send_all_clusters: true,
        load_reporting_interval: Some(interval),
        ..LoadStatsResponse::default()
    }
}

/// Locality's zone and priority, issued, successful, errors, in progress.
fn loads(stats: &ClusterStats) -> Vec<(String, u32, [u64; 4])> {
    let row = |stats: &UpstreamLocalityStats| {
        let zone = stats.locality.clone().unwrap().zone;
        let (issued, successful) = (stats.total_issued_requests, stats.total_successful_requests);
        (zone, stats.priority, [issued, successful, stats.total_error_requests, stats.total_requests_in_progress])
    };
    stats.upstream_locality_stats.iter().map(row).collect()
}

#[test]
fn nothing_is_reported_before_the_server_has_asked() {
    let clusters = clusters(&["a"]);
    let mut reporter = LoadReporter::default();
    assert_eq!(reporter.report(&clusters.load(), Instant::now()), []);
    assert_eq!(reporter.interval(), None);
}

#[test]
fn counts_of_an_interval_by_locality_over_all_workers() {
    let clusters = clusters(&["a"]);
    let (first, second) = (counters(&clusters, "a", 2), counters(&clusters, "a", 3));
    // Before the first answer: not counted.
    request(&first, 0, HostCounter::RqSuccess);
    let (mut reporter, start) = (LoadReporter::default(), Instant::now());
    reporter.answered(all(500), &clusters.load(), start);
    assert_eq!(reporter.interval(), Some(Duration::from_millis(500)));

    request(&first, 0, HostCounter::RqSuccess);
    request(&first, 1, HostCounter::RqError);
    request(&second, 1, HostCounter::RqSuccess);
    second.add(0, HostCounter::RqActive, 1);
    request(&counters(&clusters, "a", 4), 0, HostCounter::RqError);
    let reports = reporter.report(&clusters.load(), start + Duration::from_micros(1_500_003));
    assert_eq!(reports.len(), 1);
    assert_eq!(reports[0].cluster_name, "a");
    assert_eq!(reports[0].load_report_interval, Some(ProtoDuration { seconds: 1, nanos: 500_003_000 }));
    let expected = [("a".to_owned(), 0, [3, 2, 1, 1]), ("a".to_owned(), 1, [1, 0, 1, 0])];
    assert_eq!(loads(&reports[0]), expected, "the locality without load is left out");
    assert_eq!(reports[0].upstream_locality_stats[0].upstream_endpoint_stats, []);

    // Only what is still in progress is left.
    let reports = reporter.report(&clusters.load(), start + Duration::from_secs(2));
    assert_eq!(loads(&reports[0]), [("a".to_owned(), 0, [0, 0, 0, 1])]);
    assert_eq!(reports[0].load_report_interval, Some(ProtoDuration { seconds: 0, nanos: 499_997_000 }));
}

#[test]
fn endpoints_are_listed_where_the_server_wants_them() {
    let clusters = clusters(&["a"]);
    let (mut reporter, now) = (LoadReporter::default(), Instant::now());
    reporter.answered(LoadStatsResponse { report_endpoint_granularity: true, ..all(1) }, &clusters.load(), now);
    request(&counters(&clusters, "a", 3), 0, HostCounter::RqSuccess);
    let reports = reporter.report(&clusters.load(), now);
    let endpoints = &reports[0].upstream_locality_stats[0].upstream_endpoint_stats;
    assert_eq!(endpoints.len(), 1, "endpoints without load are left out");
    assert_eq!(endpoints[0].address, Some(proto_address(&EndpointAddress::Ip(([127, 0, 0, 1], 3).into()))));
    assert_eq!((endpoints[0].total_issued_requests, endpoints[0].total_successful_requests), (1, 1));
}

#[test]
fn named_clusters_only_and_those_that_exist() {
    let clusters = clusters(&["a", "b"]);
    let (mut reporter, now) = (LoadReporter::default(), Instant::now());
    let named = LoadStatsResponse { clusters: vec!["b".into(), "later".into(), "b".into()], ..Default::default() };
    reporter.answered(named, &clusters.load(), now);
    let names = |reports: Vec<ClusterStats>| reports.into_iter().map(|report| report.cluster_name).collect::<Vec<_>>();
    assert_eq!(names(reporter.report(&clusters.load(), now)), ["b"]);
    add(&clusters, "later");
    assert_eq!(names(reporter.report(&clusters.load(), now)), ["b", "later"]);
    clusters.remove("b");
    assert_eq!(names(reporter.report(&clusters.load(), now)), ["later"]);
}

#[test]
fn another_answer_does_not_lose_what_was_counted() {
    let clusters = clusters(&["a", "b"]);
    let (mut reporter, start) = (LoadReporter::default(), Instant::now());
    let named = LoadStatsResponse { clusters: vec!["a".into()], ..Default::default() };
    reporter.answered(named, &clusters.load(), start);
    request(&counters(&clusters, "a", 1), 0, HostCounter::RqSuccess);
    request(&counters(&clusters, "b", 1), 0, HostCounter::RqSuccess);
    reporter.answered(all(1), &clusters.load(), start + Duration::from_secs(1));
    let reports = reporter.report(&clusters.load(), start + Duration::from_secs(2));
    assert_eq!(loads(&reports[0]), [("b".to_owned(), 0, [1, 1, 0, 0])]);
    assert_eq!(reports[0].load_report_interval, Some(ProtoDuration { seconds: 2, nanos: 0 }));
    // The other one was not asked for before.
    assert_eq!(loads(&reports[1]), []);
    assert_eq!(reports[1].load_report_interval, Some(ProtoDuration { seconds: 1, nanos: 0 }));
}

#[test]
fn intervals_are_bounded() {
    let clusters = clusters(&[]);
    let mut reporter = LoadReporter::default();
    for (seconds, expected) in [(0, MIN_INTERVAL), (-5, MIN_INTERVAL), (i64::MAX, MAX_INTERVAL)] {
        let interval = Some(ProtoDuration { seconds, nanos: 0 });
        let answer = LoadStatsResponse { load_reporting_interval: interval, ..Default::default() };
        reporter.answered(answer, &clusters.load(), Instant::now());
        assert_eq!(reporter.interval(), Some(expected));
    }
}

#[test]
fn dropped_requests_are_counted_once_and_begin_anew_with_the_cluster() {
    let clusters = clusters(&["dropping"]);
    let (mut reporter, now) = (LoadReporter::default(), Instant::now());
    reporter.answered(all(1), &clusters.load(), now);
    (0..3).for_each(|_| clusters.load()["dropping"].dropped.inc());
    assert_eq!(reporter.report(&clusters.load(), now)[0].total_dropped_requests, 3);
    assert_eq!(reporter.report(&clusters.load(), now)[0].total_dropped_requests, 0);
    add(&clusters, "dropping");
    assert_eq!(reporter.report(&clusters.load(), now)[0].total_dropped_requests, 0);
}

#[test]
fn an_original_dst_cluster_is_one_locality() {
    let clusters = Clusters::new(WORKERS);
    let yaml = "{name: o, type: ORIGINAL_DST, lb_policy: CLUSTER_PROVIDED}";
    clusters.upsert(parse::cluster(&message::<ProtoCluster>(yaml), "").unwrap());
    let (mut reporter, now) = (LoadReporter::default(), Instant::now());
    reporter.answered(all(1), &clusters.load(), now);
    request(clusters.load()["o"].unlisted.as_ref().unwrap(), 1, HostCounter::RqSuccess);
    assert_eq!(loads(&reporter.report(&clusters.load(), now)[0]), [(String::new(), 0, [1, 1, 0, 0])]);
}

#[test]
fn the_service_name_of_an_eds_cluster_is_told() {
    let clusters = Clusters::new(WORKERS);
    for (name, service) in [("own", "other"), ("same", "")] {
        let yaml = format!(
            "{{name: {name}, type: EDS, eds_cluster_config: {{eds_config: {{ads: {{}}}}, service_name: '{service}'}}}}"
        );
        clusters.upsert(parse::cluster(&message::<ProtoCluster>(&yaml), "").unwrap());
    }
    let assignment = message::<ClusterLoadAssignment>("{cluster_name: other}");
    clusters.set_endpoints("own", &parse::endpoints(&assignment, "").unwrap());
    let (mut reporter, now) = (LoadReporter::default(), Instant::now());
    reporter.answered(all(1), &clusters.load(), now);
    let names: Vec<_> =
        reporter.report(&clusters.load(), now).into_iter().map(|report| report.cluster_service_name).collect();
    assert_eq!(names, ["other", ""]);
}
