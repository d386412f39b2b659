use std::{
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use super::*;

/// The registry is the process's own, and some of what is tested changes all of it: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The statistics under `prefix`.
fn under(prefix: &str) -> Vec<Metric> {
    snapshot().into_iter().filter(|metric| metric.name().starts_with(prefix)).collect()
}

fn text(prefix: &str) -> String {
    let mut text = String::new();
    write_text(&mut text, &under(prefix), HistogramBuckets::Summary).unwrap();
    text
}

fn prometheus(prefix: &str) -> String {
    let mut text = String::new();
    write_prometheus(&mut text, &under(prefix)).unwrap();
    text
}

#[test]
fn one_name_is_one_counter_whichever_thread_counts() {
    let _alone = alone();
    let total = counter("t1.total");
    assert_eq!(total, counter("t1.total"));
    let workers: Vec<_> = (0..8)
        .map(|index| {
            thread::spawn(move || {
                if index % 2 == 0 {
                    register_worker(index);
                }
                // As a filter that is configured later: its slot did not exist when the thread registered.
                let late = counter("t1.late");
                for _ in 0..10_000 {
                    total.inc();
                    late.add(2);
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| worker.join().unwrap());
    assert_eq!(total.value(), 80_000);
    assert_eq!(counter("t1.late").value(), 160_000);
}

#[test]
fn a_worker_finds_slots_that_were_made_after_it_registered() {
    let _alone = alone();
    let (to_worker, slots) = mpsc::channel::<Counter>();
    let worker = thread::spawn(move || {
        register_worker(0);
        slots.into_iter().for_each(Counter::inc);
    });
    // More than one chunk.
    let counters: Vec<_> = (0..5000).map(|index| counter(&format!("t2.{index}"))).collect();
    counters.iter().for_each(|counter| to_worker.send(*counter).unwrap());
    drop(to_worker);
    worker.join().unwrap();
    assert!(counters.iter().all(|counter| counter.value() == 1));
}

#[test]
fn a_gauge_is_the_sum_of_its_shares() {
    let _alone = alone();
    let active = gauge("t3.active");
    active.add(5);
    let worker = thread::spawn(move || {
        register_worker(0);
        active.inc();
        active.sub(4);
    });
    worker.join().unwrap();
    assert_eq!(active.value(), 2);
    active.set(7);
    assert_eq!(active.value(), 7);
    active.sub(9);
    assert_eq!(active.value(), 0, "never below zero");
}

#[test]
fn counters_are_reset_and_go_on() {
    let _alone = alone();
    let (total, open) = (counter("t4.total"), gauge("t4.open"));
    total.add(9);
    open.add(3);
    registry::reset_counters_where(|name| name.starts_with("t4."));
    assert_eq!((total.value(), open.value()), (0, 3));
    total.inc();
    assert_eq!(total.value(), 1);
}

#[test]
fn a_removed_scope_disappears_and_begins_anew() {
    let _alone = alone();
    let (short, long) =
        (Scope::new("t5").tagged("envoy_cluster_name", "a"), Scope::new("t5").tagged("envoy_cluster_name", "a.b"));
    let (total, open) = (short.counter("total"), short.gauge("open"));
    total.add(3);
    open.inc();
    long.counter("total").inc();
    registry::remove_scope(&short);
    assert_eq!(text("t5."), "t5.a.b.total: 1\n");
    open.dec();
    assert_eq!(short.counter("total"), total);
    assert_eq!(text("t5."), "t5.a.b.total: 1\nt5.a.total: 0\n");
    assert_eq!(short.gauge("open").value(), 0, "what was still open has been closed");
}

#[test]
fn text_is_envoys() {
    let _alone = alone();
    counter("t6.cx_total").add(3);
    gauge("t6.cx_active").set(2);
    histogram("t6.never_ms");
    let length = histogram("t6.length_ms");
    assert_eq!(text("t6.l"), "t6.length_ms: No recorded values\n");
    length.record(1);
    let quantiles = "P0(nan,1) P25(nan,1) P50(nan,1) P75(nan,1) P90(nan,1) P95(nan,1) P99(nan,1) P99.5(nan,1) \
                     P99.9(nan,1) P100(nan,1)";
    assert_eq!(
        text("t6."),
        format!("t6.cx_active: 2\nt6.cx_total: 3\nt6.length_ms: {quantiles}\nt6.never_ms: No recorded values\n")
    );
    flush_intervals();
    assert_eq!(text("t6.l"), format!("t6.length_ms: {}\n", quantiles.replace("nan", "1")));
    flush_intervals();
    assert_eq!(text("t6.l"), format!("t6.length_ms: {quantiles}\n"), "nothing was recorded in the last interval");

    let mut cumulative = String::new();
    write_text(&mut cumulative, &under("t6.l"), HistogramBuckets::Cumulative).unwrap();
    assert!(cumulative.starts_with("t6.length_ms: B0.5(0,0) B1(0,1) B5(0,1) "), "{cumulative}");
    let mut disjoint = String::new();
    write_text(&mut disjoint, &under("t6.l"), HistogramBuckets::Disjoint).unwrap();
    assert!(disjoint.starts_with("t6.length_ms: B0.5(0,0) B1(0,1) B5(0,0) "), "{disjoint}");
}

#[test]
fn json_is_envoys() {
    let _alone = alone();
    counter("t7.total").add(3);
    histogram("t7.ms").record(4);
    let json = write_json(&under("t7."), HistogramBuckets::Summary);
    assert_eq!(json["stats"][0], serde_json::json!({ "name": "t7.total", "value": 3 }));
    let histograms = &json["stats"][1]["histograms"];
    assert_eq!(histograms["supported_quantiles"].to_string(), "[0.0,25.0,50.0,75.0,90.0,95.0,99.0,99.5,99.9,100.0]");
    assert_eq!(histograms["computed_quantiles"][0]["name"], "t7.ms");
    assert_eq!(
        histograms["computed_quantiles"][0]["values"][9],
        serde_json::json!({ "cumulative": 4.0, "interval": null })
    );
}

#[test]
fn prometheus_has_labels_and_buckets() {
    let _alone = alone();
    let scope = Scope::new("t8").tagged("envoy_cluster_name", "users.default:80");
    scope.counter("upstream_rq_200").add(3);
    scope.counter("upstream_rq_2xx").add(3);
    Scope::new("t8").tagged("envoy_cluster_name", "od\"d\\").counter("upstream_rq_200").inc();
    scope.clone().child("circuit_breakers.default").gauge("cx-open").set(1);
    counter("t8.plain").inc();
    let ms = scope.histogram("rq_ms");
    [1, 7, 7].into_iter().for_each(|value| ms.record(value));
    let expected = r#"# TYPE envoy_t8_plain counter
envoy_t8_plain{} 1

# TYPE envoy_t8_upstream_rq counter
envoy_t8_upstream_rq{envoy_response_code="200",envoy_cluster_name="od\"d\\"} 1
envoy_t8_upstream_rq{envoy_response_code="200",envoy_cluster_name="users.default_80"} 3

# TYPE envoy_t8_upstream_rq_xx counter
envoy_t8_upstream_rq_xx{envoy_response_code_class="2",envoy_cluster_name="users.default_80"} 3

# TYPE envoy_t8_circuit_breakers_default_cx_open gauge
envoy_t8_circuit_breakers_default_cx_open{envoy_cluster_name="users.default_80"} 1

# TYPE envoy_t8_rq_ms histogram
envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="0.5"} 0
envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="1"} 1
envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="5"} 1
envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="10"} 3
"#;
    let text = prometheus("t8.");
    assert_eq!(&text[..expected.len().min(text.len())], expected);
    let end = r#"envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="3600000"} 3
envoy_t8_rq_ms_bucket{envoy_cluster_name="users.default_80",le="+Inf"} 3
envoy_t8_rq_ms_sum{envoy_cluster_name="users.default_80"} 15
envoy_t8_rq_ms_count{envoy_cluster_name="users.default_80"} 3

"#;
    assert!(text.ends_with(end), "{text}");
}

#[test]
fn scopes_make_envoys_names() {
    let _alone = alone();
    let names = [
        Scope::cluster("a.b:80"),
        Scope::listener("0.0.0.0:80").worker(1),
        Scope::listener_http("[::1]:80", "in"),
        Scope::tcp("x"),
    ]
    .map(|scope| scope.name());
    assert_eq!(names, ["cluster.a.b_80", "listener.0.0.0.0_80.worker_1", "listener.[__1]_80.http.in", "tcp.x"]);
}

#[test]
fn a_scope_knows_better_than_the_name() {
    let _alone = alone();
    let guessed = counter("cluster.t11.b.total");
    let labels = |metrics: Vec<Metric>| metrics[0].labels().next().unwrap().1.to_owned();
    assert_eq!(labels(under("cluster.t11.")), "t11");
    assert_eq!(Scope::cluster("t11.b").counter("total"), guessed);
    assert_eq!(labels(under("cluster.t11.")), "t11.b");
    assert_eq!(counter("cluster.t11.b.total"), guessed);
    assert_eq!(labels(under("cluster.t11.")), "t11.b");
}

#[test]
fn response_codes_are_counted_by_code_and_class() {
    let _alone = alone();
    let scope = Scope::new("t9");
    let codes = ResponseCodes::new(&scope.clone().child("cluster"), "upstream_rq");
    [200, 200, 204, 503, 7, 999].into_iter().for_each(|code| codes.inc(code));
    assert_eq!(
        text("t9.cluster"),
        "t9.cluster.upstream_rq_200: 2\nt9.cluster.upstream_rq_204: 1\nt9.cluster.upstream_rq_2xx: 3\n\
         t9.cluster.upstream_rq_503: 1\nt9.cluster.upstream_rq_5xx: 1\nt9.cluster.upstream_rq_completed: 6\n"
    );
    ResponseCodes::classes_only(&scope.child("http"), "downstream_rq").inc(404);
    assert_eq!(
        text("t9.http"),
        "t9.http.downstream_rq_1xx: 0\nt9.http.downstream_rq_2xx: 0\nt9.http.downstream_rq_3xx: 0\n\
         t9.http.downstream_rq_4xx: 1\nt9.http.downstream_rq_5xx: 0\nt9.http.downstream_rq_completed: 1\n"
    );
}

#[test]
fn a_gauge_that_is_set_holds_any_number() {
    let _alone = alone();
    // As the hash of a version often is.
    gauge("t14.version").set(u64::MAX - 1);
    assert_eq!(text("t14."), format!("t14.version: {}\n", u64::MAX - 1));
    gauge("t14.open").dec();
    assert_eq!(text("t14.open"), "t14.open: 0\n", "closed before it was opened, as another worker sees it");
}

#[test]
fn a_query_chooses() {
    let _alone = alone();
    counter("t10.used").inc();
    counter("t10.unused");
    gauge("t10.level").set(0);
    let (back, _untouched) = (gauge("t10.back"), gauge("t10.untouched"));
    back.inc();
    back.dec();
    let chosen = |parameters: &[(&str, &str)]| {
        let query = Query::parse(parameters.iter().copied()).unwrap();
        let chosen = under("t10.").into_iter().filter(|metric| query.wants(metric));
        chosen.map(|metric| metric.name()[4..].to_owned()).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(chosen(&[]), "back level untouched unused used");
    assert_eq!(chosen(&[("usedonly", "")]), "back level used");
    assert_eq!(chosen(&[("type", "Counters")]), "unused used");
    assert_eq!(chosen(&[("filter", "use")]), "unused used");
    assert_eq!(chosen(&[("filter", r"\.use"), ("invert_filter", "")]), "back level untouched unused");
    for (name, value, text) in [
        ("filter", "(", "Invalid re2 regex: unclosed group\n"),
        ("type", "Bogus", "invalid &type= param\n"),
        ("histogram_buckets", "bogus", "usage: /stats?histogram_buckets=(cumulative|disjoint|summary)\n"),
    ] {
        assert_eq!(Query::parse([(name, value)]).unwrap_err(), text);
    }
}

#[test]
fn a_scope_goes_with_its_last_holder_and_its_slots_are_used_again() {
    let _alone = alone();
    flush_intervals();
    let scope = Scope::cluster("t9");
    let (first, second) = (scope.lease(), scope.lease());
    let (total, open, length) = (scope.counter("total"), scope.gauge("open"), scope.histogram("length_ms"));
    scope.set_text("version_text", "one");
    total.add(3);
    open.inc();
    length.record(7);
    drop(first);
    assert!(
        text("cluster.t9.").starts_with("cluster.t9.version_text: \"one\"\ncluster.t9.open: 1\n"),
        "{}",
        text("cluster.t9.")
    );
    drop(second);
    assert_eq!(text("cluster.t9."), "");
    flush_intervals();
    let other = Scope::cluster("t9-other");
    assert!(other.counter("total") != total && other.gauge("open") != open, "a stream is open: its slots are its own");

    open.dec();
    flush_intervals();
    let slots = registry::slots();
    let another = Scope::cluster("t9-another");
    let (a, b, c) = (another.counter("a"), another.gauge("b"), another.histogram("c"));
    assert_eq!(registry::slots(), slots, "slots are used again");
    assert_eq!((a.value(), b.value(), c.summary().count()), (0, 0, 0));
    assert!(!under("cluster.t9-another.b")[0].is_used());
}

#[test]
fn what_comes_back_before_its_slots_are_free_keeps_them() {
    let _alone = alone();
    let scope = Scope::cluster("t10");
    let lease = scope.lease();
    let (total, open) = (scope.counter("total"), scope.gauge("open"));
    total.inc();
    open.inc();
    let code = scope.counter("code_200");
    drop(lease);
    assert_eq!(text("cluster.t10."), "");
    let lease = scope.lease();
    assert_eq!((scope.counter("total"), scope.gauge("open")), (total, open));
    assert_eq!((total.value(), open.value()), (0, 1));
    // A stream of before counts in what the new one has not asked for yet.
    open.dec();
    flush_intervals();
    code.inc();
    assert_eq!(scope.counter("code_200"), code, "the scope is held: nothing in it is given away");
    drop(lease);
}

#[test]
fn names_are_in_order_whatever_group_they_are_in() {
    let _alone = alone();
    let scope = |name: &str| Scope::new("t20").tagged("envoy_cluster_name", name);
    let leases = [scope("a"), scope("a.b"), scope("a-b")].map(|scope| scope.lease());
    for name in ["a-b", "a.b", "a"] {
        ["z", "c.d", "b"].into_iter().for_each(|leaf| scope(name).counter(leaf).add(0));
    }
    counter("t20.a0").inc();
    let guessed = counter("t20.a.guessed");
    assert_eq!(scope("a").counter("guessed"), guessed, "a name is looked for in the groups");
    let names: Vec<_> = under("t20.").iter().map(|metric| metric.name().into_owned()).collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!((names.len(), &names), (11, &sorted));
    drop(leases);
    assert_eq!(text("t20."), "t20.a0: 1\n", "with their scopes all go");
    flush_intervals();
    let (slots, again) = (registry::slots(), scope("c"));
    ["z", "c.d", "b"].into_iter().for_each(|leaf| again.counter(leaf).add(0));
    assert_eq!(registry::slots(), slots, "slots are used again");
}
