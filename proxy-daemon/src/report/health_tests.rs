use super::*;
use crate::stats;

fn specifier(clusters: &str) -> HealthCheckSpecifier {
    culvert_xds_client::json::from_yaml(&format!("cluster_health_checks: {clusters}")).unwrap()
}

/// A cluster with one endpoint, at a port where nobody listens, and `checks`.
fn cluster(name: &str, checks: &str) -> String {
    format!(
        "[{{ cluster_name: '{name}', health_checks: {checks}, locality_endpoints: [{{ locality: {{ zone: z }}, endpoints: [{{ address: {{ \
         socket_address: {{ address: 127.0.0.1, port_value: 1 }} }} }}] }}] }}]"
    )
}

const TCP: &str = "{ timeout: 1s, interval: 1s, unhealthy_threshold: 1, healthy_threshold: 1, tcp_health_check: {} }";

fn shown(name: &str) -> bool {
    let prefix = format!("cluster.{name}.health_check.");
    stats::snapshot().iter().any(|metric| metric.name().starts_with(&prefix))
}

#[tokio::test]
async fn what_is_refused_leaves_everything_as_it_was() {
    let mut reporter = HealthReporter::default();
    reporter.assign(&specifier(&cluster("stays", &format!("[{TCP}]")))).unwrap();
    let bad = specifier(&cluster("bad", &format!("[{}]", TCP.replace("interval: 1s", "interval: 0s"))));
    let error = reporter.assign(&bad).unwrap_err();
    assert_eq!(error.path, "cluster_health_checks[0].health_checks[0].interval");
    assert_eq!(reporter.report().cluster_endpoints_health[0].cluster_name, "stays");
}

#[tokio::test]
async fn without_checks_a_host_is_not_healthy() {
    let mut reporter = HealthReporter::default();
    reporter.assign(&specifier(&cluster("unchecked", "[]"))).unwrap();
    let report = reporter.report();
    let locality = &report.cluster_endpoints_health[0].locality_endpoints_health[0];
    assert_eq!(locality.locality.as_ref().unwrap().zone, "z");
    assert_eq!(locality.endpoints_health[0].health_status(), HealthStatus::Unhealthy);
    assert_eq!(locality.endpoints_health[0].health_metadata, None);
}

#[tokio::test]
async fn statistics_go_with_their_cluster() {
    let mut reporter = HealthReporter::default();
    reporter.assign(&specifier(&cluster("leaves", &format!("[{TCP}]")))).unwrap();
    assert!(shown("leaves"));
    reporter.assign(&specifier(&cluster("comes", &format!("[{TCP}]")))).unwrap();
    assert!(shown("comes"));
    // They go when the check that counted in them has ended.
    let gone = async {
        while shown("leaves") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(10), gone).await.unwrap();
}

#[tokio::test]
async fn each_check_counts_by_its_name_in_a_cluster_that_has_all_statistics() {
    let named = |name: &str| TCP.replace("timeout:", &format!("name: {name}, timeout:"));
    let mut reporter = HealthReporter::default();
    reporter.assign(&specifier(&cluster("several", &format!("[{}, {}]", named("one"), named("two"))))).unwrap();
    let names: Vec<String> = stats::snapshot()
        .iter()
        .filter_map(|metric| metric.name().strip_prefix("cluster.several.").map(str::to_owned))
        .collect();
    let has = |name: &str| names.iter().any(|it| it == name);
    assert!(has("health_check.name.one.attempt") && has("health_check.name.two.attempt"), "{names:?}");
    assert!(!has("health_check.attempt"));
    assert!(has("upstream_cx_total") && has("membership_total"));
}

#[tokio::test]
async fn of_two_clusters_of_a_name_the_first_counts() {
    let mut reporter = HealthReporter::default();
    let twice = specifier("[{ cluster_name: a }, { cluster_name: b }, { cluster_name: a }, {}, {}]");
    reporter.assign(&twice).unwrap();
    let names: Vec<_> = reporter.report().cluster_endpoints_health.into_iter().map(|it| it.cluster_name).collect();
    assert_eq!(names, ["a", "b", "", ""]);
}

#[tokio::test]
async fn an_endpoint_that_is_checked_otherwise_is_checked_anew() {
    let mut reporter = HealthReporter::default();
    let with = |check: &str, more: &str| {
        let text = cluster("same", &format!("[{TCP}]"));
        let text =
            text.replace("port_value: 1 } }", &format!("port_value: 1 }} }}, health_check_config: {{ {check} }}"));
        specifier(&text.replace("cluster_name: 'same',", &format!("cluster_name: 'same', {more}")))
    };
    let checks = |reporter: &HealthReporter| reporter.clusters[0].localities[0].1[0].checkers.len();
    let mut watched = Vec::new();
    let bind = "upstream_bind_config: { source_address: { address: 127.0.0.1, port_value: 0 } },";
    for (check, more, anew) in [
        ("port_value: 2", "", true),
        ("port_value: 2", "", false),
        ("port_value: 3", "", true),
        ("hostname: a", "", true),
        ("hostname: a", bind, true),
        ("hostname: a", bind, false),
    ] {
        reporter.assign(&with(check, more)).unwrap();
        assert_eq!(checks(&reporter), 1);
        let watch = reporter.clusters[0].localities[0].1[0].checkers[0].1.watch();
        let same = watched.last().is_some_and(|last: &tokio::sync::watch::Receiver<Health>| last.same_channel(&watch));
        assert_eq!(same, !anew, "{check} {more}");
        watched.push(watch);
    }
    reporter.assign(&with("disable_active_health_check: true", "")).unwrap();
    assert_eq!(checks(&reporter), 0);
    let report = reporter.report();
    let endpoints = &report.cluster_endpoints_health[0].locality_endpoints_health[0].endpoints_health;
    assert_eq!(endpoints.len(), 0, "as by Envoy nothing is said of it: {endpoints:?}");
    let error = reporter.assign(&with("port_value: 70000", "")).unwrap_err();
    assert_eq!(
        error.path,
        "cluster_health_checks[0].locality_endpoints[0].endpoints[0].health_check_config.port_value"
    );
}
