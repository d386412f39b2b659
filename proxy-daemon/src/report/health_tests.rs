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
async fn of_two_clusters_of_a_name_the_first_counts() {
    let mut reporter = HealthReporter::default();
    let twice = specifier("[{ cluster_name: a }, { cluster_name: b }, { cluster_name: a }, {}, {}]");
    reporter.assign(&twice).unwrap();
    let names: Vec<_> = reporter.report().cluster_endpoints_health.into_iter().map(|it| it.cluster_name).collect();
    assert_eq!(names, ["a", "b", "", ""]);
}
