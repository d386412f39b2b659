use http::HeaderValue;

use super::*;

fn config() -> OrcaWeights {
    OrcaWeights {
        metrics: [].into(),
        error_penalty: 0.0,
        blackout_period: Duration::from_secs(10),
        expiration_period: Duration::from_secs(100),
        update_period: Duration::from_secs(1),
        stream: None,
    }
}

fn reports(weights: Option<OrcaWeights>, told: &[&str]) -> Reports {
    let told = told.iter().filter_map(|name| OrcaMetric::named(name)).collect();
    Reports::new(&Arc::new(Orca { weights: weights.map(Arc::new), told, workers: 2 }))
}

fn headers(text: &str) -> HeaderMap {
    let value = HeaderValue::try_from(format!("TEXT {text}")).unwrap();
    HeaderMap::from_iter([("endpoint-load-metrics".parse().unwrap(), value)])
}

fn weight_of(report: &str, config: &OrcaWeights) -> Option<u32> {
    weight(&LoadReport::of(&headers(report)).unwrap(), config)
}

#[test]
fn weights_are_requests_at_full_load() {
    let plain = config();
    let named = OrcaWeights {
        metrics: ["named_metrics.*", "mem_utilization"].iter().filter_map(|name| OrcaMetric::named(name)).collect(),
        error_penalty: 2.0,
        ..config()
    };
    for (report, config, expected) in [
        ("rps_fractional=100,cpu_utilization=0.5", &plain, Some(200)),
        ("rps_fractional=100,cpu_utilization=0.5,application_utilization=0.25", &plain, Some(400)),
        ("rps_fractional=100,application_utilization=0.1,mem_utilization=0.2,named_metrics.a=0.5", &named, Some(200)),
        ("rps_fractional=100,application_utilization=0.1", &named, Some(1000)),
        ("rps_fractional=100,cpu_utilization=0.5,eps=25", &plain, Some(200)),
        ("rps_fractional=100,cpu_utilization=0.5,eps=25", &named, Some(100)),
        ("rps_fractional=100,eps=25", &named, Some(200)),
        ("rps_fractional=1e20,cpu_utilization=0.5", &plain, Some(u32::MAX)),
        ("rps_fractional=0.1,cpu_utilization=0.5", &plain, Some(0)),
        ("rps_fractional=100", &plain, None),
        ("cpu_utilization=0.5", &plain, None),
    ] {
        assert_eq!(weight_of(report, config), expected, "{report}");
    }
}

#[test]
fn weights_count_after_the_blackout_and_until_they_are_old() {
    let config = config();
    let reports = reports(Some(config.clone()), &[]);
    let at = |seconds| Instant::now() + Duration::from_secs(seconds);
    assert_eq!(reports.weight(&config, at(1000)), None);
    assert!(!reports.heard(0, &HeaderMap::new()));
    assert!(reports.heard(0, &headers("rps_fractional=100,cpu_utilization=0.5")));
    assert!(reports.heard(1, &headers("rps_fractional=100,cpu_utilization=0.25")));
    // It says nothing of the weight.
    assert!(reports.heard(0, &headers("cpu_utilization=1")));
    assert_eq!(reports.weight(&config, at(5)), None);
    // Of the last report, whichever worker had it.
    assert_eq!(reports.weight(&config, at(15)), Some(400));
    assert_eq!(reports.weight(&config, at(200)), None);
    // Too old: the host has to report for a while again.
    assert_eq!(reports.weight(&config, at(15)), None);
    reports.heard(0, &headers("rps_fractional=100,cpu_utilization=1"));
    assert_eq!(reports.weight(&config, at(5)), None);
    assert_eq!(reports.weight(&config, at(15)), Some(100));
}

#[test]
fn medians() {
    for (weights, expected) in
        [(vec![], 1), (vec![7], 7), (vec![9, 1], 5), (vec![9, 1, 3], 3), (vec![u32::MAX, 1, u32::MAX, 2], 0x8000_0000)]
    {
        assert_eq!(median(weights.clone()), expected, "{weights:?}");
    }
}

#[test]
fn metrics_are_told_once() {
    let reports = reports(None, &["eps", "named_metrics.*", "utilization.u"]);
    reports.heard(0, &headers("eps=1,named_metrics.a=2,named_metrics.b=0.5"));
    reports.heard(0, &headers("named_metrics.a=3"));
    reports.heard(1, &headers("eps=4,utilization.u=0.25,utilization.v=1"));
    let told = reports.latch();
    let told: Vec<_> = told.iter().map(|(name, sums)| (name.as_str(), *sums)).collect();
    let expected =
        [("eps", (3, 5.0)), ("named_metrics.a", (2, 5.0)), ("named_metrics.b", (1, 0.5)), ("utilization.u", (1, 0.25))];
    assert_eq!(told, expected);
    assert!(reports.latch().is_empty());
}

#[test]
fn names_are_bounded() {
    let reports = reports(None, &["named_metrics.*"]);
    for first in (0..MAX_METRICS * 2).step_by(100) {
        let names: Vec<_> = (first..first + 100).map(|number| format!("named_metrics.m{number}=1")).collect();
        reports.heard(0, &headers(&names.join(",")));
    }
    assert_eq!(reports.latch().len(), MAX_METRICS);
}
